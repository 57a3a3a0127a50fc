"""The singular values of an operator, and the largest of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, inf, prod
from typing import cast

import torch
from torch import Tensor, nn

from .krylov import largest, matrix_norm, with_gradient
from .lattice import grid_norm, lattice_norm, normalized
from .operators.arguments import on_operator
from .operators.base import Grid, KernelOperator, LinearOperator
from .operators.composed import ComposedOperator
from .operators.conv import ConvOperator
from .operators.layers import as_operator
from .operators.symbols import Gram, half_plane, symbol

#: Entries of the largest dense matrix that is decomposed when all singular values are asked for (2 GiB in float64).
_DENSE_ENTRIES = 1 << 28
#: Entries up to which a dense matrix is faster than a matrix-free method.
_SMALL_ENTRIES = 1 << 18
#: Bytes of symbols held at once.
_CHUNK_BYTES = 1 << 27
#: Symbols up to this size are decomposed in batches when many norms are asked for.
_BATCHED = 24
#: Points per axis on which the spectral density is sampled, by dimension.
_DENSITY_POINTS = {1: 512, 2: 32, 3: 16}


@on_operator
def singular_values(op: LinearOperator, k: int | None = None) -> Tensor:
    """Singular values of a finite operator, descending, repeated ones as often as they occur.

    - matrices: exact, by SVD, `O(mn min(m, n))`;
    - circular convolutions: exact, `O(n² c³)`: the union over the frequency grid of the symbol's (Sedghi, Gupta, Long 2019).
      A float32 symbol that is far from square (strides, unequal channels) and needs no gradient goes through the eigenvalues of
      `F F*` in float64: faster, and no less accurate;
    - all others (zero padding): exact, by SVD of the dense matrix, when that is small; the `k` largest of any size by a
      matrix-free block Krylov method, to 1e-6 of the largest or better.

    Args:
        op: a finite operator.
        k: only the `k` largest.

    Returns:
        Tensor of shape `(k,)` or `(min(numel(in_shape), numel(out_shape)),)`, in the dtype of the weight, at least float32.
        Differentiable, but for matrix-free results.

    Raises:
        ValueError: the lattice operator (its singular values are a continuum), a `k` out of range, NaN or infinity in the
            weight, or an operator too large for all of them.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> conv = torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
        >>> _ = torch.nn.init.constant_(conv.weight, 1 / 9)
        >>> sh.singular_values(sh.as_operator(conv, input_size=(6, 6)), k=3)
        tensor([1.0000, 0.6667, 0.6667], grad_fn=<MulBackward0>)
    """
    count = min(prod(op.in_shape), prod(op.out_shape))
    if k is not None and not (isinstance(k, int) and 1 <= k <= count):
        raise ValueError(f"`k` must be an int from 1 to {count}, the number of singular values; got {k!r}.")
    op = _checked(op)
    if isinstance(op, KernelOperator):
        if op.weight.numel() == 0:  # no inputs or no outputs
            return op.weight.new_zeros(0)
        # a power of two, so that no sum of large entries overflows
        _, scale = normalized(op.weight.detach())
        return _all_or_largest(op.with_weight(op.weight / scale), k, count) * scale
    return _all_or_largest(op, k, count)


def _all_or_largest(op: LinearOperator, k: int | None, count: int) -> Tensor:
    if isinstance(op, KernelOperator) and op.frequency_grid is not None:
        return _on_grid(op, op.frequency_grid, count)[:k]
    entries = prod(op.in_shape) * prod(op.out_shape)
    if k is not None and entries > _SMALL_ENTRIES and 4 * k < count:
        return largest(op, k).values
    if entries > _DENSE_ENTRIES:
        raise ValueError(f"the dense matrix of this operator has {entries} entries: ask for the `k` largest singular values.")
    return torch.linalg.svdvals(op.to_dense())[:k]


def _on_grid(op: KernelOperator, grid: Grid, count: int) -> Tensor:
    """The union of the symbol's singular values over a frequency grid."""
    kernel = op.canonical()
    # along an axis with one tap only the phase of the symbol changes
    constant = [axis for axis in range(len(grid)) if kernel.shape[3 + axis] == 1]
    sizes = tuple(size for axis, (size, _) in enumerate(grid) if axis not in constant)
    repeats = prod(repeat for _, repeat in grid) * prod(grid[axis][0] for axis in constant)
    kernel = kernel.squeeze([3 + axis for axis in constant])
    theta, copies = half_plane(sizes, kernel)
    chunk = max(_CHUNK_BYTES // (2 * kernel.element_size() * prod(kernel.shape[:3])), 1)
    if len(theta) == 1:  # the only frequency is zero, where the symbol is real
        values = torch.linalg.svdvals(symbol(kernel, theta).real)
    else:
        at = _symbol_values(kernel, len(theta))
        values = torch.cat([at(part) for part in theta.split(chunk)])
    values = values.repeat_interleave(copies.long() * repeats, dim=0).flatten()
    values = values.sort(descending=True).values[:count]
    return torch.cat([values, values.new_zeros(count - len(values))])


def _symbol_values(kernel: Tensor, frequencies: int) -> Callable[[Tensor], Tensor]:
    """The function from frequencies to the singular values of the symbol, `(n, groups, min(rows, columns))`."""
    rows, columns = kernel.shape[1:3]
    if min(rows, columns) == 1:
        return lambda theta: torch.linalg.vector_norm(symbol(kernel, theta), dim=(-2, -1)).unsqueeze(-1)
    lags = prod(2 * taps - 1 for taps in kernel.shape[3:]) // 2 + 1
    oblong = 2 * max(rows, columns) >= 3 * min(rows, columns)
    traced = kernel.requires_grad and torch.is_grad_enabled()
    if oblong and not traced and frequencies > 2 * lags and kernel.dtype == torch.float32 and kernel.device.type == "cpu":
        # roots of eigenvalues lose half of the digits, and float64 has twice those of float32
        gram = Gram(kernel.double())
        return lambda theta: _gram_values(gram, theta).to(kernel.dtype)
    return lambda theta: torch.linalg.svdvals(symbol(kernel, theta))


def _gram_values(gram: Gram, theta: Tensor) -> Tensor:
    """Singular values as roots of the eigenvalues of `G(θ)`: `(n, groups, size)`, ascending."""
    angles = theta.to(gram.lags) @ gram.lags.T
    blocks = torch.complex(angles.cos() @ gram.even, -angles.sin() @ gram.odd).transpose(0, 1)
    return torch.linalg.eigvalsh(blocks.unflatten(2, (gram.size, gram.size))).clamp(min=0).sqrt()


@on_operator
def spectral_norm(op: LinearOperator, rtol: float = 1e-3) -> Tensor:
    """The operator norm `‖A‖₂ = σ₁`.

    - lattice operator (a convolution without an input size): **certified**, `S ≤ value ≤ S (1 + rtol)` with
      `S = sup_θ ‖F(θ)‖₂`: an upper bound for the layer at every input size. Branch and bound, some hundred to some
      thousand evaluations of the symbol, whatever the input size, with proofs in float32 or, where rounding asks for it, float64;
    - matrices and circular convolutions: exact up to rounding;
    - other finite operators: matrix-free, to 1e-5 (an estimate from below; the lattice norm bounds it from above).

    Args:
        op: any operator.
        rtol: relative width of the lattice certificate, at least 1e-6. Where the norm is attained at a point the cost hardly
            grows; where it is attained on a whole region, as after `projections.clip`, it grows like `rtol^(-d / 2)`.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. Differentiable where the norm is (the largest singular value is
        simple), by the singular vectors at the winning frequency.

    Raises:
        ValueError: `rtol` out of range, NaN or infinity in the weight, or reflect / replicate padding without an input size.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        >>> everywhere = sh.spectral_norm(sh.as_operator(conv))
        >>> here = sh.spectral_norm(sh.as_operator(conv, input_size=(32, 24)))
        >>> bool(here <= everywhere)
        True
    """
    if not 1e-6 <= rtol < 1:
        raise ValueError(f"`rtol` must lie in [1e-6, 1); got {rtol!r}.")
    return _norm(op, rtol)


def _norm(op: LinearOperator, rtol: float) -> Tensor:
    op = _checked(op)
    if isinstance(op, KernelOperator):
        if op.weight.numel() == 0:  # no inputs or no outputs
            return op.weight.sum()
        if op.frequency_grid is not None or not op.is_finite:
            return _kernel_norm(op, rtol)
    if op.is_finite:
        value, left, right = (t[0] for t in largest(op))
        attained = (left * op.matvec(right)).sum()
        return with_gradient(value, attained) if attained.requires_grad else value
    norms = torch.stack([_norm(factor, rtol) for factor in cast(ComposedOperator, op).factors])
    # a product of n numbers rounds n times
    return norms.prod() * (1 + len(norms) * torch.finfo(norms.dtype).eps)


def _kernel_norm(op: KernelOperator, rtol: float) -> Tensor:
    """The largest norm of a symbol: on the operator's own frequency grid, or anywhere."""
    weight, grid, kernel = op.weight, op.frequency_grid, op.canonical()
    if grid is not None:
        screen = torch.float64 if grid == () else kernel.dtype
        found = grid_norm(kernel, tuple(size for size, _ in grid), screen=screen)
        norm = found.value
    else:
        factor = op.lattice_factor
        # a little closer than asked: casts, and whoever compares with a sampled supremum, need room too
        found = lattice_norm(kernel, 0.8 * rtol)
        norm = found.upper * factor * (1 + torch.finfo(kernel.dtype).eps)
    value = kernel.new_tensor(norm)
    if grid is None and float(value) < norm:  # the cast must not round below, not even of what has few digits
        value = torch.nextafter(value, value.new_tensor(inf))
    if not weight.requires_grad:
        return value
    theta = found.theta[None]
    block = symbol(kernel[found.group : found.group + 1].to(theta), theta)[0, 0]
    attained = matrix_norm(block) * (norm / found.value if found.value else 1.0)
    return with_gradient(value, attained.to(kernel))


def _checked(op: LinearOperator) -> LinearOperator:
    """The operator in float32 or better, if its weights are finite."""
    for factor in op.factors if isinstance(op, ComposedOperator) else (op,):
        if isinstance(factor, KernelOperator):
            check_finite(factor.weight)
    return op.to(torch.promote_types(op.dtype, torch.float32))


def check_finite(weight: Tensor) -> None:
    """Refuse NaN and infinity, and weights without values."""
    if weight.is_meta:
        raise ValueError("`weight` is on the meta device and has no values: materialize the model first.")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("`weight` contains NaN or infinity: look at the training step before; the weight is left as it is.")


def spectral_norms(ops: Sequence[LinearOperator | nn.Module], rtol: float = 1e-3) -> list[Tensor]:
    """The norm of each of many operators, as by `spectral_norm`, with layers of equal shape treated together.

    Matrices and circular convolutions with equal canonical shape, of at most 24 rows or columns, go through one batched
    evaluation: up to ten times faster where the layers are small. All others take their turn: the branch and bound of a
    lattice operator looks at frequencies of its own for every kernel.

    Args:
        ops: any operators or layers, of any dtypes and devices.
        rtol: relative width of the lattice certificates, at least 1e-6.

    Returns:
        0-d tensors in the order of `ops`, each with the guarantee and the gradient of `spectral_norm`.

    Raises:
        ValueError: as `spectral_norm`.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> norms = sh.spectral_norms([sh.as_operator(layer) for layer in model])
        >>> [norm.shape for norm in norms], bool(norms[0] == sh.spectral_norm(sh.as_operator(model[0])))
        ([torch.Size([]), torch.Size([]), torch.Size([])], True)
    """
    if not 1e-6 <= rtol < 1:
        raise ValueError(f"`rtol` must lie in [1e-6, 1); got {rtol!r}.")
    alike: dict[tuple[object, ...], list[tuple[int, KernelOperator]]] = {}
    norms: dict[int, Tensor] = {}
    for i, op in enumerate(map(as_operator, ops)):
        grid = op.frequency_grid if isinstance(op, KernelOperator) else None
        if isinstance(op, KernelOperator) and grid is not None and min((kernel := op.canonical()).shape[1:3]) <= _BATCHED:
            alike.setdefault((grid, kernel.shape, kernel.dtype, kernel.device), []).append((i, op))
        else:
            norms[i] = spectral_norm(op, rtol)
    for members in alike.values():
        indices, together = zip(*members, strict=True)
        found = _norms_together(together) if len(together) > 1 else [spectral_norm(together[0], rtol)]
        norms.update(zip(indices, found, strict=True))
    return [norms[i] for i in range(len(ops))]


def _norms_together(ops: Sequence[KernelOperator]) -> list[Tensor]:
    """The norms of small operators with equal canonical shapes on equal frequency grids: one batch of eigenvalues."""
    grid = ops[0].frequency_grid
    assert grid is not None
    scaled = [normalized(op.canonical().detach()) for op in ops]
    kernels = torch.stack([kernel for kernel, _ in scaled])
    groups = kernels.shape[1]
    kernels = kernels.flatten(0, 1)
    theta, _ = half_plane(tuple(size for size, _ in grid), kernels)
    chunk = max(_CHUNK_BYTES // (32 * prod(kernels.shape[:3])), 1)
    squares = []
    for part in theta.split(chunk):
        blocks = symbol(kernels, part) if grid else symbol(kernels, part).real
        blocks = blocks.mT if blocks.shape[-2] > blocks.shape[-1] else blocks
        squares.append(torch.linalg.eigvalsh(blocks @ blocks.mH)[..., -1])
    # per operator, frequencies × groups
    table = torch.cat(squares).unflatten(1, (-1, groups)).movedim(1, 0).flatten(1)
    values, winners = table.clamp(min=0).sqrt().max(1)
    norms = []
    for i, (op, (_, scale)) in enumerate(zip(ops, scaled, strict=True)):
        dtype = torch.promote_types(op.weight.dtype, torch.float32)
        norm = (values[i] * scale).to(op.weight.device, dtype)
        if op.weight.requires_grad:
            where, group = divmod(int(winners[i]), groups)
            kernel = op.canonical()[group : group + 1].to(theta) / scale
            block = symbol(kernel, theta[where : where + 1])[0, 0]
            found = matrix_norm(block if grid else block.real)
            norm = with_gradient(norm, (found * scale).to(op.weight.device, dtype))
        norms.append(norm)
    return norms


@on_operator
def asymptotic_singular_values(op: LinearOperator, input_size: int | Sequence[int] | None = None) -> Tensor:
    """All singular values of a zero-padded convolution, approximately, at a cost that does not grow with the input.

    As the input grows they distribute like `σ_j(F(θ))` with `θ` uniform (Szegő; Avram and Parter). Each branch `σ_j` of this
    spectral density is sampled on a frequency grid of its own and sorted; its quantile function is interpolated at the ranks of
    a Toeplitz matrix, `i / (m + 1)` for `i = 1 … m`, with `m` the singular values of one branch.

    Measured, against the singular values of the dense matrix and relative to the largest (random and smooth kernels of 2 to 8
    channels, stride 1; largest error and root mean square, with those of the circular operator of the same size behind):

        random 4 → 4, 3×3, padding 1, n = 8       9.3 %   5.0 %     (9.3 %   5.0 %)
        the same at n = 16                        4.8 %   2.5 %     (4.9 %   2.5 %)
        smooth 4 → 4, 3×3, padding 1, n = 16      3.8 %   0.6 %     (6.6 %   0.8 %)
        random 4 → 3, 5×5, padding 2, n = 12      9.3 %   6.0 %    (10.2 %   6.2 %)
        random 3 → 3, 3×3, no padding, n = 16     4.6 %   2.5 %    (14.0 %   9.0 %)
        random 3 → 4, stride 2, n = 16           18.7 %   4.4 %    (18.5 %   4.4 %)

    The mean error shrinks with the input (from 3.5 % at n = 16 to 1.1 % at n = 128 for a random one-dimensional kernel); the few
    singular values that belong to the border need not.

    Args:
        op: a zero-padded convolution, transposed or not.
        input_size: spatial size of the input, int or one per axis; may be left out for a finite operator.

    Returns:
        Tensor of shape `(min(numel(in_shape), numel(out_shape)),)`, descending, in the dtype of the weight, at least float32.
        An **approximation**, neither from above nor from below. Differentiable.

    Cost: `O(c³)` for each of 512, 32² or 16³ frequencies in one, two or three dimensions (half of them by symmetry).

    Raises:
        TypeError: no convolution.
        ValueError: padding other than zeros, no input size, or NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> op = sh.ConvOperator(torch.tensor([[[1.0, 2.0, 1.0]]]), padding=1, input_size=6)
        >>> sh.singular_values(op)[:3], sh.asymptotic_singular_values(op)[:3]
        (tensor([3.8019, 3.2470, 2.4450]), tensor([3.8011, 3.2497, 2.4399]))

    Source: Yi (2020).
    """
    if not isinstance(op, ConvOperator):
        raise TypeError(f"`op` must be a ConvOperator; got {type(op).__name__}. Its singular values are exact: singular_values.")
    if op.padding_mode != "zeros":
        raise ValueError(f"`op` must be zero-padded; got {op.padding_mode} padding. Use singular_values.")
    check_finite(op.weight)
    if input_size is not None:
        op = ConvOperator(
            op.weight, op.stride, op.padding, op.output_padding, op.dilation, op.groups, op.transposed, input_size=input_size
        )
    count = min(prod(op.in_shape), prod(op.out_shape))
    weight = op.weight
    kernel = op.with_weight(weight.to(torch.promote_types(weight.dtype, torch.float32))).canonical()
    theta, copies = half_plane((_DENSITY_POINTS[kernel.ndim - 3],) * (kernel.ndim - 3), kernel)
    chunk = max(_CHUNK_BYTES // (2 * kernel.element_size() * prod(kernel.shape[:3])), 1)
    samples = torch.cat([torch.linalg.svdvals(symbol(kernel, part)) for part in theta.split(chunk)])
    branches = samples.flatten(1).repeat_interleave(copies.long(), dim=0).sort(dim=0, descending=True).values
    per_branch = ceil(count / branches.shape[1])
    ranks = torch.arange(1, per_branch + 1, device=kernel.device, dtype=torch.float64) / (per_branch + 1)
    # the j-th of N sorted samples stands in the middle of its share, (j + 1/2) / N
    place = (ranks * len(branches) - 0.5).clamp(0, len(branches) - 1)
    before = place.long()
    after = (before + 1).clamp(max=len(branches) - 1)
    part = (place - before).to(kernel.dtype).unsqueeze(1)
    values = torch.lerp(branches[before], branches[after], part)
    return values.flatten().sort(descending=True).values[:count]
