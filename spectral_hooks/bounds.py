"""Upper bounds of an operator's norm: operator → 0-d tensor, differentiable, never below `‖A‖₂`.

Each is a formula on the canonical kernel, so stride, dilation, groups, transposition and dimension are dealt with once. It
bounds the lattice operator; zero padding and every input size are compressions of that, and padding that repeats inputs or
outputs is paid for by the factor `padding(op)`, which the bounds apply themselves.

They hold as computed: all is done in float64 on a kernel scaled to entries of order one, the result is raised by a bound of
the rounding, and the cast to the weight's dtype rounds up.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from itertools import product as combinations
from math import ceil, cos, inf, isfinite, log, pi, prod, sqrt

import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d

from .krylov import matrix_norm, with_gradient
from .lattice import grid_norm, normalized
from .operators.arguments import on_kernel
from .operators.base import KernelOperator, float32_is_kept, full_precision
from .operators.symbols import half_plane, symbol
from .single_row import grid_maxima

#: A bound: operator → 0-d tensor.
Bound = Callable[[KernelOperator], Tensor]

#: Bytes of symbols held at once.
_CHUNK_BYTES = 1 << 27
#: Bytes of symbols of the rows that `kernel_gram` keeps, and of one block where these are all.
_PANEL_BYTES, _BLOCK_BYTES = 3 << 26, 1 << 23
#: Matrices up to this size are decomposed in batches.
_SMALL = 64
#: Channels from which the last powers of a kernel are held in float32, and the share of a bound that its rounding may be.
_SINGLE_FROM, _SINGLE_SHARE = 32, 1e-3
_EPS = torch.finfo(torch.float64).eps
_SQRT2 = sqrt(2)
#: Below it float32 may know nothing of a symbol's norm, whose fourth power is taken.
_UNDERFLOW = 1e-8


@on_kernel
def cosine_grid(op: KernelOperator, *, oversampling: float = 8) -> Tensor:
    """The largest norm on a frequency grid times the cosine factor: the tightest bound at its price.

        ‖A‖ ≤ max_{θ in grid} ‖F(θ)‖₂ · Π_i 1 / cos(π (k_i - 1) / (2 N_i)),   N_i = ⌈oversampling · (k_i - 1)⌉ points per axis.

    Why: with `M = ‖F(θ*)‖ = sup ‖F‖` and `v` the top right singular vector there, `q(θ) = ‖F(θ) v‖²` is along each axis a
    trigonometric polynomial of degree `k - 1` between 0 and `M² = q(θ*)`. M. Riesz's lemma gives
    `q(θ* + t) ≥ M² cos²((k - 1) t / 2)`, and some grid point has `|t| ≤ π / N`. Axis after axis.

    A circular operator's axis whose own frequency grid is no finer is sampled there, without a factor; matrices and kernels of
    one tap are exact.

    Args:
        op: any operator.
        oversampling: grid points over the degree `k - 1`, more than 1. The factor in two dimensions: 1.172 for 4, 1.040 for 8,
            1.010 for 16.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. Upper bound, at most the factor above the lattice norm. Its
        gradient is that of the norm at the winning frequency. Sharp in one dimension.

    Cost: `O(N^d)` evaluations of the symbol's Gram matrix and their Cholesky tests, `c³` each, whatever the input size.

    Raises:
        ValueError: `oversampling` is no number above 1, or NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> op = sh.as_operator(torch.nn.Conv2d(4, 8, 3))
        >>> norm, bound = sh.spectral_norm(op, rtol=1e-6), sh.bounds.cosine_grid(op)
        >>> bool(norm / 1.000001 <= bound <= 1.04 * norm)
        True

    Source: this library; with the factor `1 / (1 - (k - 1) / N)` Pfister and Bresler (2019).
    """
    _check_oversampling(oversampling)

    def formula(kernel: Tensor) -> Tensor:
        sizes, factor = _sampling(op, kernel, oversampling)
        found = grid_norm(kernel, sizes)
        norm = kernel.new_tensor(found.upper)
        if kernel.requires_grad:
            block = symbol(kernel[found.group : found.group + 1], found.theta[None].to(kernel))[0, 0]
            norm = with_gradient(norm, matrix_norm(block if sizes else block.real))
        return norm * factor

    return _certified(op, formula)


@on_kernel
def gram_iteration(op: KernelOperator, *, steps: int = 6, oversampling: float = 8) -> Tensor:
    """Squares of the symbol's Gram matrices, and a Frobenius norm.

        ‖F(θ)‖₂ ≤ ‖G^(2^t)‖_F^(1 / 2^(t+1)),   G = F(θ)* F(θ),   G ← G G / ‖G‖_F² at every step,

    the maximum over the frequency grid of a circular operator as it stands. Everywhere else a maximum over a grid bounds the
    sampled frequencies only: it is multiplied by the factor of `cosine_grid`.

    Args:
        op: any operator.
        steps: squarings `t ≥ 0`. What they leave is at most a factor `rank^(1 / 2^(t+2))`: 1.016 for rank 64 and 6 steps.
        oversampling: as in `cosine_grid`; not for circular operators.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. Upper bound, differentiable everywhere but at ties between
        frequencies, without singular vectors.

    Cost: `O(N^d c³)` in float32, and `O(t c³)` in float64 for the few frequencies near the largest: one whose norm after some
        squarings is below the final norm of another is dropped. For a circular operator `N` is its input size.

    Raises:
        ValueError: an argument out of range, or NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> op = sh.DenseOperator(torch.diag(torch.tensor([3.0, 3.0, 1.0])))
        >>> [round(sh.bounds.gram_iteration(op, steps=t).item(), 3) for t in (0, 2, 6)]
        [3.573, 3.133, 3.008]

    Source: Delattre, Barthélemy, Araujo and Allauzen (2023), who have it for circular convolutions.
    """
    _check_oversampling(oversampling)
    _check_steps(steps, least=0)

    def formula(kernel: Tensor) -> Tensor:
        sizes, factor = _sampling(op, kernel, oversampling, own_grid=True)
        return _largest_iterated(kernel, sizes, steps) * factor

    return _certified(op, formula)


@on_kernel
def kernel_gram(op: KernelOperator, *, steps: int = 4) -> Tensor:
    """Squares of the kernel's self-convolution, and a sum of absolute values: no frequencies are sampled.

        ‖A‖ ≤ max_i (Σ_{j, l} |R_t[i, j, l]|)^(1 / 2^t),   R_1 = K ⋆ K,   R_{t+1} = R_t ∗ R_t,

    with `R_t`, of `2^t (k - 1) + 1` taps per axis, the kernel of `(A Aᵀ)^(2^(t-1))` on the lattice. Zero padding in the
    convolutions makes it hold for every input size. Each is computed by Fourier transforms of its own length, block after block
    on and above the diagonal; the last, whose error counts `2^t` times less, in float32 where its rounding is bounded by 1e-3 of
    the result.

    Args:
        op: any operator.
        steps: `t ≥ 1`; each doubles the support and takes the root of what is left.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. Upper bound, differentiable where the largest row is unique.

    Cost: `O((2^t k)^d c³)` time, with `c` the smaller number of channels; memory for `R_{t-1}`, of `(2^(t-1) k)^d c²` entries,
    in float32 from 32 channels on, and 0.5 GiB. The gradient, of one row, is a few per cent of that.

    Raises:
        ValueError: `steps` is no positive int, or NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> op = sh.ConvOperator(torch.tensor([[[1.0, 2.0, -1.0]]]))  # norm √8
        >>> [round(sh.bounds.kernel_gram(op, steps=t).item(), 3) for t in (1, 3, 5)]
        [2.828, 2.828, 2.828]

    Source: Delattre, Barthélemy and Allauzen (2024).
    """
    _check_steps(steps, least=1)

    def formula(kernel: Tensor) -> Tensor:
        if kernel.ndim == 3:
            kernel = kernel.unsqueeze(-1)
        if kernel.shape[1] > kernel.shape[2]:
            kernel = kernel.transpose(1, 2)
        norm, group, row = _by_powers(kernel.detach().movedim((0, 1, 2), (-3, -2, -1)), steps)
        if not kernel.requires_grad:
            return norm
        return with_gradient(norm, _row_of_power(kernel[group], row, steps))

    return _certified(op, formula)


@on_kernel
def unfolding(op: KernelOperator) -> Tensor:
    """The smallest norm of the kernel's unfoldings times the root of the number of taps.

        ‖A‖ ≤ √(k_1 ⋯ k_d) · min ‖unfolding‖₂

    over the `2^d` matrices that take each tap axis to the rows or to the columns: in two dimensions `out × (in k_h k_w)`,
    `(out k_h) × (in k_w)`, `(out k_w) × (in k_h)`, `(out k_h k_w) × in`. Why: `u* F(θ) v` is the kernel contracted with `u`, `v`
    and one vector of norm `√k_i` per axis. The kernel is the canonical one; the maximum over groups.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. Upper bound (the norms of the unfoldings are exact, not power
        iterations, which are too small), differentiable where the top singular value of the smallest is simple.

    Cost: the largest singular value of `2^d` matrices, whatever the input size.

    Raises:
        ValueError: NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.bounds.unfolding(sh.ConvOperator(torch.ones(1, 1, 3, 3)))
        tensor(9.0000)

    Source: Singla and Feizi (2021); two of the four in Yi (2020).
    """

    def formula(kernel: Tensor) -> Tensor:
        taps = range(3, kernel.ndim)
        unfoldings = []
        for sides in combinations((0, 1), repeat=len(taps)):
            rows, columns = ([axis for axis, side in zip(taps, sides, strict=True) if side == s] for s in (0, 1))
            matrix = kernel.permute(0, 1, *rows, 2, *columns)
            unfoldings.append(matrix.flatten(1 + len(rows) + 1).flatten(1, 1 + len(rows)))
        least, which = torch.stack([_norms(matrix.detach()) for matrix in unfoldings]).min(0)
        group = int(least.argmax())
        norm = least[group]
        if kernel.requires_grad:
            norm = with_gradient(norm, matrix_norm(unfoldings[int(which[group])][group]))
        return norm * sqrt(prod(kernel.shape[3:]))

    return _certified(op, formula)


@on_kernel
def tap_sum(op: KernelOperator) -> Tensor:
    """The sum of the norms of the kernel's taps, the triangle inequality.

        ‖A‖ ≤ Σ_t ‖K[:, :, t]‖₂,   the maximum over groups,

    over the taps of the canonical kernel: those of one output position of a strided layer that read the same block of inputs
    count as one.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. Upper bound, exact for one tap and for a single non-negative
        channel; differentiable where the top singular values are simple.

    Cost: the largest singular value of `k^d` matrices, whatever the input size.

    Raises:
        ValueError: NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.bounds.tap_sum(sh.ConvOperator(torch.tensor([[[1.0, 2.0, -1.0]]])))
        tensor(4.0000)

    Source: Yi (2020).
    """

    def formula(kernel: Tensor) -> Tensor:
        taps = kernel.reshape(*kernel.shape[:3], -1).movedim(-1, 1)  # (groups, taps, rows, columns)
        sums = _norms(taps.detach().flatten(0, 1)).unflatten(0, taps.shape[:2]).sum(1)
        group = int(sums.argmax())
        if not kernel.requires_grad:
            return sums[group]
        return with_gradient(sums[group], torch.stack([matrix_norm(tap) for tap in taps[group]]).sum())

    return _certified(op, formula)


@on_kernel
def frobenius_grid(op: KernelOperator, *, oversampling: float = 8) -> Tensor:
    """The largest Frobenius norm of the symbol on a frequency grid times the cosine factor: loose, and almost free.

        ‖A‖ ≤ max_{θ in grid} ‖F(θ)‖_F · Π_i 1 / cos(π (k_i - 1) / (2 N_i)),   N_i = ⌈oversampling · (k_i - 1)⌉ points per axis.

    Why the same factor as in `cosine_grid`: `‖F(θ)‖_F²` is itself a trigonometric polynomial of degree `k_i - 1` along each
    axis, between 0 and its maximum, which is all that M. Riesz's lemma asks for.

    Args:
        op: any operator.
        oversampling: as in `cosine_grid`.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. Upper bound, at most `√rank` times the factor above the norm,
        differentiable everywhere but at ties between frequencies.

    Cost: `O(c² k^2d + N^d k^(d + 1))`: no matrix of channels is decomposed, and no symbol formed.

    Raises:
        ValueError: `oversampling` is no number above 1, or NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> bool(sh.bounds.frobenius_grid(sh.DenseOperator(torch.eye(9))) >= 3)
        True

    Source: Araujo, Negrevergne, Chevaleyre and Atif (2021).
    """
    _check_oversampling(oversampling)

    def formula(kernel: Tensor) -> Tensor:
        sizes, factor = _sampling(op, kernel, oversampling)
        return _largest_frobenius(kernel, sizes) * factor

    return _certified(op, formula)


@on_kernel
def absolute_sum(op: KernelOperator, *, ord: float = 2) -> Tensor:
    """Sums of absolute values: the operator norms between `ℓ1` and between `ℓ∞`, and their geometric mean.

        ‖A‖_1 = max_inputs Σ_outputs |K|,   ‖A‖_∞ = max_outputs Σ_inputs |K|,   ‖A‖_2 ≤ √(‖A‖_1 ‖A‖_∞)

    Args:
        op: any operator.
        ord: the norm that is bounded: 2, 1 or `math.inf`. Only with 2 is the result a bound of the spectral norm.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. For `ord=1` and `inf` exact up to rounding for matrices and on
        the lattice, an upper bound for finite convolutions; for 2 an upper bound. Differentiable but at zeros and ties.

    Cost: one pass over the weight.

    Raises:
        ValueError: `ord` is none of these, or NaN or infinity in the weight.

    Example:
        >>> import math, torch, spectral_hooks as sh
        >>> op = sh.DenseOperator(torch.tensor([[1.0, -2.0], [0.0, 3.0]]))
        >>> [round(sh.bounds.absolute_sum(op, ord=ord).item(), 4) for ord in (1, math.inf, 2)]
        [5.0, 3.0, 3.873]

    Source: Gouk, Frank, Pfahringer and Cree (2018); the mean is Schur's test.
    """
    if ord not in (1, 2, inf):
        raise ValueError(f"`ord` must be 1, 2 or infinity; got {ord!r}.")
    # padding repeats entries of the input (in the circular case rows), which adds to the column sums only
    column_factor = op.padding_factor**2

    def formula(kernel: Tensor) -> Tensor:
        size = kernel.abs()
        rows = size.flatten(2).sum(2).amax(1)
        columns = size.transpose(1, 2).flatten(2).sum(2).amax(1)
        if ord == 2:
            return (rows * columns).amax().sqrt()
        # of the adjoint the other one
        return rows.amax() if (ord == inf) != op.transposed else columns.amax() * column_factor

    return _certified(op, formula, factor=None if ord == 2 else 1.0)


@on_kernel
def padding(op: KernelOperator) -> Tensor:
    """What padding that repeats inputs adds: `‖A‖ ≤ padding · sup_θ ‖F(θ)‖₂`.

    - zero padding of any amount, and matrices: 1;
    - reflect and replicate: the norm of the padding map, the root of the product over the axes of how often the most-read
      position is read. With an input size exactly that. Without, the supremum over the sizes that torch allows: per axis 3 for
      reflect on both sides (where one position is met from both; 2 from size `before + after + 2` on), and
      `1 + before + after` for replicate (a single position; `1 + max(before, after)` from size 2 on);
    - circular: 1, unless it is wider than the kernel needs or the stride does not divide the size; then how often output rows
      repeat, likewise.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. All bounds of this module contain the factor already.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> conv = torch.nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect")
        >>> sh.bounds.padding(sh.as_operator(conv, input_size=8)) ** 2, sh.bounds.padding(sh.as_operator(conv)) ** 2
        (tensor(2.0000), tensor(3.0000))
    """
    dtype = torch.promote_types(op.weight.dtype, torch.float32)
    return _rounded_up(torch.tensor(op.padding_factor, dtype=torch.float64), 1.0, dtype).to(op.weight.device)


# -- what they share --------------------------------------------------------------------------------------------------------


@full_precision
def _certified(op: KernelOperator, formula: Callable[[Tensor], Tensor], factor: float | None = None) -> Tensor:
    """A bound that holds as computed, from its formula on the canonical kernel in float64 with entries of order one."""
    weight = op.weight
    _, scale = normalized(weight.detach())
    kernel = op.canonical()
    kernel = kernel.to("cpu" if kernel.device.type == "mps" else kernel.device, torch.float64) / scale
    if bool((kernel.detach() != 0).any()):
        value = formula(kernel) * ((op.padding_factor if factor is None else factor) * _room(kernel))
    else:
        value = (kernel * 0).sum()
    return _rounded_up(value, scale, torch.promote_types(weight.dtype, torch.float32)).to(weight.device)


def _room(kernel: Tensor) -> float:
    """What rounding in float64 can take from a bound.

    A sum over `T` taps is off by `(T + 4) eps` relative to the sum of absolute values. So the symbol is off by
    `(T + 4) eps √T ‖K‖_F` in Frobenius norm, and `‖K‖_F ≤ √n sup ‖F‖` for `n` the smaller side. Sums over channels in
    products of `n × m` matrices are off by `m n eps` relative to the square of the norm.
    """
    rows, columns, *sizes = kernel.shape[1:]
    taps, side = prod(sizes), min(rows, columns)
    return 1 + 8 * _EPS * ((taps + 4) * sqrt(taps * side) + rows * columns)


def _rounded_up(value: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`value · scale`, a power of two, in a dtype, not below."""
    cast = (value * scale).to(dtype)
    if float(cast.detach()) / scale < float(value.detach()):
        above = torch.nextafter(cast.detach(), cast.new_tensor(inf))
        cast = with_gradient(above, cast)
    return cast


def _sampling(op: KernelOperator, kernel: Tensor, oversampling: float, own_grid: bool = False) -> tuple[tuple[int, ...], float]:
    """Points per axis, and the factor that makes their maximum a bound.

    Axes of a circular operator are sampled at its own frequencies if these are fewer, or if `own_grid`, without a factor.
    """
    grid = op.frequency_grid
    sizes, factor = [], 1.0
    for axis in range(kernel.ndim - 3):
        others = [a for a in range(kernel.ndim) if a != 3 + axis]
        used = (kernel.detach() != 0).sum(dim=others).nonzero()
        degree = int(used[-1] - used[0])
        size = max(ceil(oversampling * degree), 1)
        if grid is not None and (own_grid or grid[axis][0] <= size):
            size = grid[axis][0]
        else:
            factor /= cos(pi * degree / (2 * size))
        sizes.append(size)
    return tuple(sizes), factor


def _largest_frobenius(kernel: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The maximum of `‖F(θ)‖_F` over groups and a frequency grid; differentiated at the winner.

    The entries of the symbol are polynomials whose squares add up, as do those of any others with the same `KᵀK` of entries ×
    taps: of its triangular factor there are no more than taps.
    """
    if not sizes:
        return torch.linalg.vector_norm(kernel.flatten(1), dim=1).amax()
    taps = prod(kernel.shape[3:])
    flat = kernel.detach().reshape(len(kernel), -1, taps)
    room = 1 + 4 * _EPS * flat.shape[1] * taps**1.5
    if flat.shape[1] > taps:
        flat = torch.linalg.qr(flat, mode="r").R
    found = grid_maxima(flat.reshape(len(kernel), 1, -1, *kernel.shape[3:]), sizes)
    group = int(found.upper.argmax())
    norm = found.upper[group] * room
    if not kernel.requires_grad:
        return norm
    return with_gradient(norm, torch.linalg.vector_norm(symbol(kernel[group : group + 1], found.theta[group : group + 1])))


def _largest_iterated(kernel: Tensor, sizes: tuple[int, ...], steps: int) -> Tensor:
    """The maximum of `_iterated` over groups and a frequency grid; differentiated at the winner.

    A value falls with every squaring. So what is, in float32 and with room for its rounding, below a final value drops out, and
    of the rest the final values are computed in float64.
    """
    if sizes and min(kernel.shape[1:3]) == 1:  # of rank one: nothing is left to be squared away
        return _largest_frobenius(kernel, sizes)
    theta, _ = half_plane(sizes, kernel)
    best, where, group = kernel.new_tensor(-1.0), 0, 0
    with torch.no_grad():
        count = max(_CHUNK_BYTES // (64 * prod(kernel.shape[:3]) + 40 * prod(kernel.shape[3:])), 1)
        for start in range(0, len(theta), count):
            symbols = symbol(kernel, theta[start : start + count]).flatten(0, 1)
            symbols = symbols if sizes else symbols.real
            index, upper = _near_the_largest(symbols, steps, float(best))
            # one sorts out most, the others together
            for some in (upper.topk(min(1, len(upper))).indices, slice(None)):
                chosen = index[some][upper[some] >= float(best)]
                if len(chosen):
                    found, top = _iterated(symbols[chosen], steps).max(0)
                    if found > best:
                        best, (where, group) = found, divmod(int(chosen[top]), kernel.shape[0])
                        where += start
    if not kernel.requires_grad:
        return best
    block = symbol(kernel[group : group + 1], theta[where : where + 1])[0]
    return with_gradient(best, _iterated(block if sizes else block.real, steps)[0])


def _near_the_largest(symbols: Tensor, steps: int, best: float) -> tuple[Tensor, Tensor]:
    """Which of the symbols can have a value of `_iterated` above `best`, and what it is at most."""
    index = torch.arange(len(symbols), device=symbols.device)
    upper = torch.full_like(index, inf, dtype=torch.float64)
    if len(symbols) == 1:
        return index, upper
    rows, columns = sorted(symbols.shape[-2:])
    dtype = (torch.complex64 if symbols.is_complex() else torch.float32) if float32_is_kept() else symbols.dtype
    # a product is off by `√2 (m + 4) eps ‖F‖_F²`, and `‖F F*‖_F ≥ ‖F‖_F² / √n`; half of it counts, of the next a quarter, …
    room = 1 + 1.1 * _SQRT2 * (columns + 4) * (sqrt(rows) + 1) * torch.finfo(dtype).eps
    gram, logs = _gram(symbols.to(dtype)), symbols.new_zeros(len(symbols), dtype=torch.float64)
    for step in range(steps + 1):
        gram, logs = _squared(gram, logs) if step else (gram, logs)
        upper = (_root(gram, logs, step) * room).clamp(min=_UNDERFLOW)
        if best < 0 and step == 1:  # to begin with
            best = float(_iterated(symbols[index[upper.argmax()]][None], steps))
        kept = upper >= best
        index, gram, logs, upper = index[kept], gram[kept], logs[kept], upper[kept]
    return index, upper


def _iterated(symbols: Tensor, steps: int) -> Tensor:
    """`‖G^(2^t)‖_F^(1 / 2^(t+1))` with `G = F F*`, for every matrix."""
    gram = _gram(symbols)
    logs = torch.zeros(gram.shape[:-2], dtype=torch.float64, device=gram.device)
    for _ in range(steps):
        gram, logs = _squared(gram, logs)
    return _root(gram, logs, steps)


def _gram(symbols: Tensor) -> Tensor:
    if symbols.shape[-2] > symbols.shape[-1]:
        symbols = symbols.mT
    return symbols @ symbols.mH


def _squared(gram: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """The square of every matrix over its norm, and with it the logarithm of all that was divided out."""
    scale = _squares(gram.detach()).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    gram = gram / scale.to(gram.dtype)[..., None, None]
    return gram @ gram, 2 * (logs + scale.log())


def _root(gram: Tensor, logs: Tensor, steps: int) -> Tensor:
    """`(‖G_t‖_F e^logs)^(1 / 2^(t+1))`; zero for a matrix that is zero."""
    zero = (gram.detach() == 0).all(-1).all(-1)
    norms = _squares(gram).clamp(min=1e-300).sqrt()
    return torch.where(zero, 0, ((norms.log() + logs) / 2 ** (steps + 1)).exp())


def _by_powers(kernel: Tensor, steps: int) -> tuple[Tensor, int, int]:
    """The bound of `kernel_gram`, for a kernel `(*taps, groups, n, m)`, and the group and row that attain it.

    With `R̃` for what is computed, `‖R̃_t‖² ≤ ‖R̃_{t+1}‖ + e_{t+1}`, where `e` bounds the rounding of one step. So the sums at the
    end are carried back step by step, and `e_t` counts `2^-t`.
    """
    single = kernel.shape[-2] >= _SINGLE_FROM and steps > 1 and float32_is_kept()
    factors = kernel, kernel.flip(tuple(range(kernel.ndim - 3))).mT
    passed: list[tuple[Tensor, Tensor]] = []
    for step in range(1, steps):
        power, scale, error = _convolved(*factors, torch.float32 if single and step == steps - 1 else torch.float64)
        factors = power, power
        passed.append((scale, error))
    for dtype in (torch.float32, torch.float64) if single else (torch.float64,):
        sums, error = _row_sums(*factors, dtype)
        if bool((error <= _SINGLE_SHARE * 2**steps * sums.amax(1)).all()):
            break
    norms = (sums.amax(1) + error).sqrt()
    for scale, error in reversed(passed):
        norms = (scale * norms + error).sqrt()
    group = int(norms.argmax())
    return norms[group], group, int(sums[group].argmax())


def _convolved(first: Tensor, second: Tensor, store: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The product, exactly symmetric, over a power of two per group, these powers, and what rounding takes from its norm."""
    *taps, groups, n, _ = first.shape
    lags = tuple(range(len(taps)))
    found = first.new_empty(*(2 * k - 1 for k in taps), groups, n, n, dtype=store)

    def take(rows: slice, columns: slice, block: Tensor) -> None:
        found[..., rows, columns] = block
        if columns.start >= rows.stop:
            found[..., columns, rows] = block.flip(lags).mT
        elif columns.stop >= rows.stop:
            square = found[..., rows, rows]
            square.copy_((square + square.flip(lags).mT) / 2)

    error = _each_block(first, second, torch.float64, store, take)
    dims = (*lags, -2, -1)
    largest = torch.maximum(found.amax(dims), -found.amin(dims)).double()
    scale = torch.where(largest > 0, largest, 1).log2().floor().exp2()
    return found.div_(scale.to(store)[:, None, None]), scale, error


def _row_sums(first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The absolute sums of the rows of the product, `(groups, n)`, and per group what rounding takes from its norm."""
    *taps, groups, n, _ = first.shape
    sums = first.new_zeros(groups, n, dtype=torch.float64)

    def take(rows: slice, columns: slice, block: Tensor) -> None:
        sizes = block.abs_().sum(tuple(range(len(taps)))).double()
        # in the squares on the diagonal both triangles are there, equal but for rounding
        share = 1.0 if columns.start >= rows.stop else 0.5
        sums[:, rows] += share * sizes.sum(-1)
        sums[:, columns] += share * sizes.sum(-2)

    error = _each_block(first, second, dtype, dtype, take)
    return sums * (1 + prod(2 * k - 1 for k in taps) * torch.finfo(dtype).eps), error


def _each_block(
    first: Tensor, second: Tensor, dtype: torch.dtype, store: torch.dtype, take: Callable[[slice, slice, Tensor], None]
) -> Tensor:
    """Convolve two kernels whose product is symmetric, in blocks of rows and columns that cover the diagonal and what is above.

    Returns a bound of the rounding, in the norm of the product, per group. Let `F` be the symbol of either. In root mean square
    over the frequencies, where `‖F(θ)‖_F` has that of `‖K‖_F`, the transform along axis `i`, of sums of `k_i` products with a
    relative error `a_i`, takes `a_i √k_i ‖K‖_F`. From the products of symbols, of norm `‖F(θ)‖_F² ≤ g²`, rounding takes
    `√2 m eps ‖F(θ)‖_F²`, and the transform back then `b_i √N_i ‖F(θ)‖_F²`. And a kernel of `L` lags has at most the norm `√L`
    times the root mean square of its symbol's.
    """
    *taps, groups, n, m = first.shape
    sizes = tuple(2 * k - 1 for k in taps)
    half = sizes[0] // 2 + 1
    row_bytes = 2 * dtype.itemsize * half * prod(sizes[1:]) * groups * max(n, m)
    square_sums = first.new_zeros(half, *sizes[1:], groups, dtype=torch.float64)
    for rows in _parts(0, n, _PANEL_BYTES // row_bytes):
        left = _spectra(first[..., rows, :].to(dtype), sizes)
        square_sums += _squares(left)
        whole = first is second and rows == slice(0, n)
        most = _BLOCK_BYTES // row_bytes if whole else _PANEL_BYTES // (3 * row_bytes)
        for columns in _parts(rows.start, n, most, rows.stop):
            right = left[..., columns] if whole else _spectra(second[..., columns].to(dtype), sizes)
            take(rows, columns, _kernel_of(left @ right, sizes))
            del right
        del left  # the next is as large
    counts = square_sums.new_tensor([1.0] + [2.0] * (half - 1)).reshape(-1, *[1] * len(taps)) / prod(sizes)
    largest, mean = square_sums.flatten(0, -2).amax(0), (counts * square_sums).flatten(0, -2).sum(0)
    rms = (counts * square_sums.square()).flatten(0, -2).sum(0).sqrt()
    symbols, back = (sum(_SQRT2 * (k + 6) * sqrt(k) for k in lengths) for lengths in (taps, sizes))
    products = (_SQRT2 * m + back) * rms + 2 * symbols * (largest * mean).sqrt()
    return 1.1 * sqrt(prod(sizes)) * (torch.finfo(dtype).eps * products + torch.finfo(store).eps * rms)


def _parts(start: int, end: int, most: int, stop: int | None = None) -> list[slice]:
    """Nearly equal parts of at most so many, with one that ends at `stop`."""
    if stop is not None and stop < end:
        return _parts(start, stop, most) + _parts(stop, end, most)
    count = -(-(end - start) // max(most, 1))
    edges = [start + (end - start) * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in pairwise(edges)]


def _squares(matrices: Tensor) -> Tensor:
    """`‖·‖_F²` of every matrix, in float64."""
    parts = torch.view_as_real(matrices).flatten(-2) if matrices.is_complex() else matrices
    return torch.linalg.vector_norm(parts, dim=-1).double().square().sum(-1)


def _waves(frequencies: Tensor, positions: Tensor, size: int) -> Tensor:
    """`2π f t / size` for every frequency and position, reduced first."""
    return (frequencies[:, None] * positions % size).double() * (2 * pi / size)


def _spectra(kernel: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The symbols at the frequencies `2π j / sizes`, the first axis up to π: `(*frequencies, groups, n, m)`; real without taps.

    One axis after the other is a matrix product, faster here than an FFT, and with a known bound of its rounding.
    """
    if prod(sizes) == 1:
        return kernel
    index = [torch.arange(n, device=kernel.device) for n in (*kernel.shape[: len(sizes)], *sizes)]
    positions, frequencies = index[: len(sizes)], index[len(sizes) :]
    angles = _waves(frequencies[0][: sizes[0] // 2 + 1], positions[0], sizes[0])
    flat = kernel.flatten(1)
    found = torch.complex(angles.cos().to(kernel) @ flat, -angles.sin().to(kernel) @ flat)
    found = found.unflatten(1, kernel.shape[1:])
    for axis in range(1, len(sizes)):
        angles = _waves(frequencies[axis], positions[axis], sizes[axis])
        wave = torch.complex(angles.cos(), -angles.sin()).to(found)
        rest = found.shape[axis + 1 :]
        found = (wave @ found.flatten(axis + 1)).unflatten(axis + 1, rest)
    return found


def _kernel_of(spectra: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The real kernel with these symbols: the inverse of `_spectra`."""
    if prod(sizes) == 1:
        return spectra.clone()
    index = [torch.arange(n, device=spectra.device) for n in sizes]
    for axis in range(len(sizes) - 1, 0, -1):
        angles = _waves(index[axis], index[axis], sizes[axis])
        wave = torch.complex(angles.cos(), angles.sin()).to(spectra) / sizes[axis]
        rest = spectra.shape[axis + 1 :]
        spectra = (wave @ spectra.flatten(axis + 1)).unflatten(axis + 1, rest)
    half = index[0][: sizes[0] // 2 + 1]
    angles = _waves(index[0], half, sizes[0])
    counts = (1 + (half > 0).double()) / sizes[0]
    flat = spectra.flatten(1)
    found = (angles.cos() * counts).to(flat.real) @ flat.real
    found -= (angles.sin() * counts).to(flat.real) @ flat.imag
    return found.unflatten(1, spectra.shape[1:])


def _row_of_power(kernel: Tensor, row: int, steps: int) -> Tensor:
    """`(Σ |R_t[row]|)^(1 / 2^t)` for a kernel `(n, m, *taps)`, from `R_t[row] = (A Aᵀ)^(2^(t-1)) δ_row` by convolutions."""
    dims = kernel.ndim - 2
    forward = (conv1d, conv2d, conv3d)[dims - 1]
    adjoint = (conv_transpose1d, conv_transpose2d, conv_transpose3d)[dims - 1]
    x = kernel.new_zeros(1, len(kernel), *[1] * dims)
    x[0, row] = 1
    logs = 0.0
    for _ in range(2 ** (steps - 1)):
        x = forward(adjoint(x, kernel), kernel, padding=[k - 1 for k in kernel.shape[2:]])
        # a number, not a function of the kernel
        length = max(float(torch.linalg.vector_norm(x.detach())), 1e-150)
        x, logs = x / length, logs + log(length)
    return ((x.abs().sum().clamp(min=1e-300).log() + logs) / 2**steps).exp()


def _norms(matrices: Tensor) -> Tensor:
    """The norms of a batch of matrices, not below."""
    if min(matrices.shape[1:]) > _SMALL:
        return matrices.new_tensor([grid_norm(matrix[None], ()).upper for matrix in matrices])
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mT
    return torch.linalg.eigvalsh(matrices @ matrices.mT)[:, -1].clamp(min=0).sqrt()


def _check_oversampling(oversampling: float) -> None:
    if (
        isinstance(oversampling, bool)
        or not isinstance(oversampling, int | float)
        or not oversampling > 1
        or not isfinite(oversampling)
    ):
        raise ValueError(f"`oversampling` must be a number above 1: grid points over the kernel's degree; got {oversampling!r}.")


def _check_steps(steps: int, least: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < least:
        raise ValueError(f"`steps` must be an int, at least {least}; got {steps!r}.")
