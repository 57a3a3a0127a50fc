"""Kernels in two sets at once: the ball `‖F(θ)‖ ≤ c` at the frequencies of a grid, and the kernels of `k` taps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from math import inf, prod

import torch
from torch import Tensor

from . import polynomial
from .group_norms import each, grid_norms
from .krylov import largest
from .lattice import lattice_norm
from .operators.base import KernelOperator, float32_is_kept
from .operators.dense import DenseOperator
from .operators.symbols import half_plane, product, symbol
from .spectrum import spectral_norm

#: Frequencies of the clip's grid per axis, as a multiple of the kernel's degree `k - 1`: for up to 32 channels, and for more.
_OVERSAMPLING = (6, 4)
#: How far to go along a correction.
_STRETCHES = (0.85, 1.0, 1.2, 1.45, 1.75, 2.1, 2.5, 3.0)
#: From this size on a matrix is tried for few values above the level: so many, by so many restarts of a Krylov method.
_LARGE, _FEW, _FEW_RESTARTS = 384, 12, 4
#: Matrices of this size or more are clipped by products alone on accelerators, if that is seen to be off by at most so much.
_PRODUCTS_FROM, _ACCURATE = 32, 5e-5
#: Kernels of more taps go through FFTs, and symbols of up to this size are then measured as they come.
_FEW_TAPS, _SMALL_SYMBOLS = 100, 16
#: Levels so far below the norm are reached by a decomposition: the difference of a matrix and its excess would be rounding.
_CANCELS = 1e-4
#: Bytes of symbols held at once.
_CHUNK_BYTES = 1 << 25


def clip_kernel(
    op: KernelOperator, kernel: Tensor, max_norm: float, rounds: int, *, stretch: bool = True
) -> tuple[Tensor, Tensor]:
    """The kernel after `rounds` on the dual problem, nearly inside, and per group the largest norm of the original on the grid.

    With `E` the symbol on the grid, over the root of the number of frequencies, and `E*` its adjoint, which crops to the taps,
    the dual of the projection is to minimize `½ ‖K₀ - E* Y‖² + c ‖Y‖_nuclear` over blocks `Y`, one for each frequency, with
    `K = K₀ - E* Y`. A round is a proximal step, which takes the excess of `Y + τ E K` over `τ c`, and a line search. At the end
    the correction may `stretch`, which pays where it is large. Every group is a problem of its own, with steps of its own.
    """
    if prod(kernel.shape[3:]) == 1:
        level = max_norm / op.lattice_factor
        matrices = kernel.reshape(kernel.shape[:3])
        excess, peak = _few_over(matrices, level) or excess_over(matrices, level)[::2]
        if bool((level > peak * _CANCELS).all()):
            return kernel - excess.reshape(kernel.shape), peak
        u, sigma, vh = torch.linalg.svd(matrices, full_matrices=False)
        return (u * sigma.clamp(max=level).unsqueeze(-2) @ vh).reshape(kernel.shape), peak
    sizes, level = _clip_grid(op, kernel, max_norm)
    grid = _FrequencyGrid(sizes, kernel)
    counts, crop = grid.shares, _cropping(op, kernel, grid)

    def step_length(change: Tensor, cropped: Tensor) -> Tensor:
        """Barzilai & Borwein's: large where the change lies at few frequencies, since a crop spreads those over all."""
        spread = _squares(cropped)
        return torch.where(spread > 0, counts @ torch.view_as_real(change).square().flatten(2).sum(2) / spread, 1.0)

    excess, sums, peak = excess_over(grid.symbols(kernel), level)
    if not bool((peak > level).any()):  # what little the kernel is outside lies between these frequencies
        return kernel, peak
    tau = step_length(excess, crop(excess))
    dual, nuclear = excess.mul_(each(tau)), tau * (counts @ sums)
    weight = kernel - crop(dual)
    for _ in range(rounds - 1):
        excess, sums, _ = excess_over(grid.symbols(weight).mul_(each(tau)).add_(dual), tau * level)
        change, growth = excess.sub_(dual), counts @ sums - nuclear
        cropped = crop(change)
        length = _squares(cropped)
        moving = length > 1e-24 * _squares(kernel)
        if not bool(moving.any()):
            break
        # the nuclear norm is convex: along the segment it is at most its chord, and the rest is a parabola
        share = (((weight * cropped).flatten(1).sum(1) - level * growth) / length).clamp(0, 1)
        share = torch.where(moving, share, 0.0)
        tau = step_length(change, cropped).clamp(min=1)
        dual, nuclear = dual.add_(change.mul_(each(share))), nuclear + share * growth
        weight = weight - each(share, kernel.ndim - 1) * cropped
    if not stretch:
        return weight, peak
    fine = sizes if op.frequency_grid is not None else tuple(2 * n if n > 1 else 1 for n in sizes)
    return _extended(kernel, kernel - weight, level, fine), peak


def _squares(kernel: Tensor) -> Tensor:
    """Squared Frobenius norms of the groups."""
    return kernel.square().flatten(1).sum(1)


def grid_symbols(op: KernelOperator, kernel: Tensor) -> Tensor:
    """The symbols of the kernel at the frequencies of the clip's grid; of a matrix, itself."""
    if prod(kernel.shape[3:]) == 1:
        return kernel.reshape(1, *kernel.shape[:3])
    return _FrequencyGrid(_clip_sizes(op, kernel), kernel).symbols(kernel)


def crop_kernel(op: KernelOperator, kernel: Tensor, symbols: Tensor) -> Tensor:
    """The kernel, of the shape and the taps of `kernel`, nearest to what has these symbols on the clip's grid."""
    if prod(kernel.shape[3:]) == 1:
        return symbols.reshape(kernel.shape)
    return _cropping(op, kernel, _FrequencyGrid(_clip_sizes(op, kernel), kernel))(symbols)


class _FrequencyGrid:
    """Half of the frequencies `2π j / sizes`: symbols there, and their adjoint, which gives back a kernel.

    For few taps a matrix product, which leaves the symbols as they are needed; its matrices are of size taps × frequencies, so
    for many taps an FFT.
    """

    def __init__(self, sizes: tuple[int, ...], kernel: Tensor) -> None:
        self.sizes, self.taps = sizes, tuple(kernel.shape[3:])
        self.axes = tuple(range(len(sizes)))
        self.fast = prod(self.taps) > _FEW_TAPS and all(n >= k for n, k in zip(sizes, self.taps, strict=True))
        if self.fast:
            self.half = (*sizes[:-1], sizes[-1] // 2 + 1)
            counts = torch.full((self.half[-1],), 2.0).to(kernel)
            counts[0] = 1
            if sizes[-1] % 2 == 0:
                counts[-1] = 1
            counts = counts.expand(self.half).flatten()
        else:
            theta, counts = half_plane(sizes, kernel)
            self._theta = theta
        #: What share of all frequencies each stands for.
        self.shares = counts / prod(sizes)

    def symbols(self, kernel: Tensor) -> Tensor:
        """`F(θ)` of every group: `(frequencies, groups, rows, columns)`."""
        if not self.fast:
            return symbol(kernel, self._theta)
        last = tuple(range(-len(self.sizes), 0))
        return self._transform(kernel).movedim(last, self.axes).flatten(0, len(self.sizes) - 1).contiguous()

    def _transform(self, kernel: Tensor) -> Tensor:
        """The same, with the frequencies last."""
        return torch.fft.rfftn(kernel, self.sizes, tuple(range(-len(self.sizes), 0)))

    def adjoint(self, symbols: Tensor) -> Tensor:
        """The mean over all frequencies of `Re(exp(i t·θ) Y(θ))`, at every tap `t`: `(groups, rows, columns, *taps)`."""
        if not self.fast:
            flat, (cos, sin) = symbols.flatten(1), self._waves
            return (cos @ flat.real - sin @ flat.imag).T.reshape(*symbols.shape[1:], *self.taps)
        found = torch.fft.irfftn(symbols.unflatten(0, self.half), self.sizes, self.axes)
        for axis, k in enumerate(self.taps):
            found = found.narrow(axis, 0, k)
        return found.movedim(self.axes, tuple(range(-len(self.sizes), 0)))

    @cached_property
    def _waves(self) -> tuple[Tensor, Tensor]:
        angles = product([torch.arange(k) for k in self.taps], self._theta) @ self._theta.T
        return angles.cos() * self.shares, angles.sin() * self.shares

    def norms(self, kernel: Tensor) -> Tensor:
        """The largest norm of each group on the grid, up to rounding: from the symbols where they are small."""
        small = min(kernel.shape[1:3])
        if not self.fast or small > _SMALL_SYMBOLS:
            return grid_norms(kernel, self.sizes, screen=torch.float32).to(kernel)
        if small == 1:
            # group by group, and as they lie: a copy in another order would take longer
            squares = [torch.view_as_real(self._transform(group)).square().sum((0, 1, -1)).amax() for group in kernel]
            return torch.stack(squares).sqrt()
        symbols = self.symbols(kernel)
        symbols = symbols.mT if symbols.shape[-2] > symbols.shape[-1] else symbols
        chunk = max(_CHUNK_BYTES // (16 * symbols[0].numel()), 1)
        tops = [torch.linalg.eigvalsh(part @ part.mH)[..., -1].amax(0) for part in symbols.split(chunk)]
        return torch.stack(tops).amax(0).clamp(min=0).sqrt()


def _cropping(op: KernelOperator, kernel: Tensor, grid: _FrequencyGrid) -> Callable[[Tensor], Tensor]:
    """The adjoint of the symbol on a grid, at the taps that exist."""
    support = (op.with_weight(torch.ones_like(op.weight)).canonical() != 0).to(kernel.device)
    return lambda symbols: grid.adjoint(symbols) * support


def _extended(kernel: Tensor, correction: Tensor, level: float, sizes: tuple[int, ...]) -> Tensor:
    """`K₀ - t D` for the correction `D` so far and the `t` that ends nearest to `K₀` after the scaling that is still needed.

    A few rounds correct too little, most of all between the frequencies of their grid. Going on in the same direction costs far
    less than scaling everything.
    """
    grid = _FrequencyGrid(sizes, kernel)
    best, shortest = kernel, _squares(kernel) + inf
    nearing = torch.ones_like(shortest, dtype=torch.bool)
    for t in _STRETCHES:
        trial = kernel - t * correction
        trial = trial * each((level / grid.norms(trial)).clamp(max=1), kernel.ndim - 1)
        distance = _squares(trial - kernel)
        nearing = nearing & (distance < shortest)
        if not bool(nearing.any()):
            break
        best, shortest = torch.where(each(nearing, kernel.ndim - 1), trial, best), torch.where(nearing, distance, shortest)
    return best


def _clip_grid(op: KernelOperator, kernel: Tensor, max_norm: float) -> tuple[tuple[int, ...], float]:
    """Frequencies per axis for the clip, and the level to clip at there."""
    sizes = _clip_sizes(op, kernel)
    if op.frequency_grid is not None:
        return sizes, max_norm
    if not op.is_finite:
        return sizes, max_norm / op.lattice_factor
    # a finite operator may have a smaller norm than the lattice's, or with reflection a larger one
    norm = float(spectral_norm(op.with_weight(op.from_canonical(kernel))))
    return sizes, max_norm * lattice_norm(kernel).value / norm


def _clip_sizes(op: KernelOperator, kernel: Tensor) -> tuple[int, ...]:
    taps = tuple(kernel.shape[3:])
    oversampling = _OVERSAMPLING[min(kernel.shape[1:3]) > 32]
    sizes = tuple(max(oversampling * (k - 1), 1) for k in taps)
    grid = op.frequency_grid
    if grid is None:
        return sizes
    # a circular layer's own frequencies, or, when they are many, fewer; at least as many as there are taps
    exact = tuple(n * -(-k // n) for (n, _), k in zip(grid, taps, strict=True))
    return tuple(min(n, 2 * m) if m > 1 else 1 for n, m in zip(exact, sizes, strict=True))


def _few_over(matrices: Tensor, level: float) -> tuple[Tensor, Tensor] | None:
    """The excess of one large matrix that has few singular values above the level, and its norm; None if it has more."""
    if len(matrices) > 1 or min(matrices.shape[1:]) < _LARGE:
        return None
    try:
        values, left, right = largest(DenseOperator(matrices[0]), _FEW, above=level, tol=1e-7, max_restarts=_FEW_RESTARTS)
    except RuntimeError:
        return None
    if values[-1] > level:
        return None
    over = (values - level).clamp(min=0)
    return (left.T * over @ right)[None], values[:1]


def excess_over(blocks: Tensor, level: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What clipping the singular values at `level` takes away, its sum for each block, and the largest value of each group.

    By the Gram matrix on the smaller side: with `B B* = U diag(σ²) U*` the excess is `U diag(max(1 - level / σ, 0)) U* B`.

    Args:
        blocks: `(*frequencies, groups, rows, columns)`.
        level: one, or one for each group.
    """
    rows, columns = blocks.shape[-2:]
    if rows > columns:
        excess, total, largest = excess_over(blocks.mT, level)
        return excess.mT, total, largest
    level = torch.as_tensor(level, dtype=blocks.real.dtype, device=blocks.device).reshape(-1)
    chunk = max(_CHUNK_BYTES // (16 * blocks[0].numel()), 1) if blocks.ndim > 3 else len(blocks)
    excess = torch.empty_like(blocks)
    sums: list[Tensor] = []
    highest: list[Tensor] = []
    for part, out in zip(blocks.split(chunk), excess.split(chunk), strict=True):
        quick = _by_products(part, level, out) if products_pay(part) else None
        total, top = quick or _by_eigenvalues(part, level, out)
        sums.append(total)
        highest.append(top.reshape(-1, blocks.shape[-3]))
    return excess, torch.cat(sums), torch.cat(highest).amax(0)


def _by_eigenvalues(blocks: Tensor, level: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Write the excess to `out`; its sum and the largest value for each block."""
    if blocks.shape[-2] == 1:  # a row is its own singular vector
        sigma = torch.linalg.vector_norm(blocks, dim=-1)
        over = (sigma - level[:, None]).clamp(min=0)
        torch.mul(blocks, (over / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)).unsqueeze(-1), out=out)
        return over.sum(-1), sigma[..., -1]
    squared, u = torch.linalg.eigh(blocks @ blocks.mH)
    sigma = squared.clamp(min=0).sqrt()
    over = (sigma - level[:, None]).clamp(min=0)
    # ascending: in many blocks few are above
    first = sigma.shape[-1] - int((over > 0).sum(-1).amax())
    u, gain = u[..., first:], over[..., first:] / sigma[..., first:].clamp(min=torch.finfo(sigma.dtype).tiny)
    torch.matmul(u * gain.unsqueeze(-2), u.mH @ blocks, out=out)
    return over.sum(-1), sigma[..., -1]


def products_pay(blocks: Tensor) -> bool:
    """Whether matrix products in float32 are far faster than a decomposition, and as precise as they say."""
    return blocks.is_cuda and min(blocks.shape[-2:]) >= _PRODUCTS_FROM and float32_is_kept()


def _by_products(blocks: Tensor, level: Tensor, out: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same by matrix products alone, in float32; None where the error that they are measured to make is too large.

    The largest values are bounds from below, within some per cent.
    """
    single = blocks.to(torch.complex64 if blocks.is_complex() else torch.float32)
    if not bool(torch.isfinite(single).all()):
        return None
    excess, sums, error = polynomial.excess(single, level)
    clipped = torch.linalg.matrix_norm(single - excess)
    # frequencies of small symbols need not be more accurate than the others
    error, clipped = (torch.linalg.vector_norm(x.reshape(-1, blocks.shape[-3]), dim=0) for x in (error, clipped))
    if not bool((error <= _ACCURATE * clipped).all()):
        return None
    out.copy_(excess)
    return sums.to(blocks.real.dtype), polynomial.norm_bracket(single)[0].to(blocks.real.dtype)
