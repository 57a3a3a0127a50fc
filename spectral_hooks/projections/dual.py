"""Kernels in two sets at once: the ball `‖F(θ)‖ ≤ c` at the frequencies of a grid, and the kernels of `k` taps."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, sqrt

import torch
from torch import Tensor

from ..linalg.scaling import each
from ..norms.lattice import lattice_norm
from ..norms.spectral_norm import spectral_norm
from ..operators.base import KernelOperator
from .excess import excess_over, few_over
from .frequencies import FrequencyGrid

#: Frequencies of the clip's grid per axis, as a multiple of the kernel's degree `k - 1`: for up to 32 channels, and for more.
_OVERSAMPLING = (6, 4)
#: How far to go along a correction.
_STRETCHES = (0.85, 1.0, 1.2, 1.45, 1.75, 2.1, 2.5, 3.0)
#: What the clip of a matrix may be off by, relative to the level: as its dtype's rounding, but no more and no less than these.
_FINEST, _COARSEST = 1e-10, 1e-7
#: Levels above this share of the norm need no decomposition in any precision.
_NEAR = 0.1


def clip_kernel(
    op: KernelOperator, kernel: Tensor, max_norm: float, rounds: int, *, stretch: bool = True
) -> tuple[Tensor, Tensor]:
    """The kernel after `rounds` on the dual problem, nearly inside, and per group the largest norm of the original on the grid.

    With `E` the symbol on the grid, over the root of the number of frequencies, and `E*` its adjoint, which crops to the taps,
    the dual of the projection is to minimize `½ ‖K₀ - E* Y‖² + c ‖Y‖_nuclear` over blocks `Y`, one for each frequency, with
    `K = K₀ - E* Y`. A round is a proximal step, which takes the excess of `Y + τ E K` over `τ c`, and a line search. At the end
    the correction may `stretch`, which pays where it is large. Every group is a problem of its own, with steps of its own.
    """
    if op.is_pointwise:
        return _clip_matrices(kernel, max_norm / op.lattice_factor, op.dtype)
    sizes, level = _clip_grid(op, kernel, max_norm)
    if _crops_nothing(op, kernel, sizes):  # one step is all
        rounds, stretch = 1, False
    grid = FrequencyGrid(sizes, kernel)
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
    return (_extended(op, kernel, kernel - weight, level, sizes) if stretch else weight), peak


def _clip_matrices(kernel: Tensor, level: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`U min(Σ, level) Vᵀ` of every group of a kernel with one tap, to the rounding of a dtype, and the norms that they had."""
    matrices = kernel.reshape(kernel.shape[:3])
    goal = min(max(torch.finfo(dtype).eps, _FINEST), _COARSEST)
    excess, peak = few_over(matrices, level, goal) or excess_over(matrices, level)[::2]
    # squares lose the digits of what is small: relative to the level an eps times the square of the norm over it
    if bool((level > peak * min(sqrt(torch.finfo(kernel.dtype).eps / goal), _NEAR)).all()):
        return kernel - excess.reshape(kernel.shape), peak
    u, sigma, vh = torch.linalg.svd(matrices, full_matrices=False)
    return (u * sigma.clamp(max=level).unsqueeze(-2) @ vh).reshape(kernel.shape), peak


def _squares(kernel: Tensor) -> Tensor:
    """Squared Frobenius norms of the groups."""
    return kernel.square().flatten(1).sum(1)


def grid_symbols(op: KernelOperator, kernel: Tensor) -> Tensor:
    """The symbols of the kernel at the frequencies of the clip's grid; of a matrix, itself."""
    if op.is_pointwise:
        return kernel.reshape(1, *kernel.shape[:3])
    return FrequencyGrid(_clip_sizes(op, kernel), kernel).symbols(kernel)


def crop_kernel(op: KernelOperator, kernel: Tensor, symbols: Tensor) -> Tensor:
    """The kernel, of the shape and the taps of `kernel`, nearest to what has these symbols on the clip's grid."""
    if op.is_pointwise:
        return symbols.reshape(kernel.shape)
    return _cropping(op, kernel, FrequencyGrid(_clip_sizes(op, kernel), kernel))(symbols)


def _cropping(op: KernelOperator, kernel: Tensor, grid: FrequencyGrid) -> Callable[[Tensor], Tensor]:
    """The adjoint of the symbol on a grid, at the taps that exist."""
    support = (op.with_weight(torch.ones_like(op.weight)).canonical() != 0).to(kernel.device)
    return lambda symbols: grid.adjoint(symbols) * support


def _crops_nothing(op: KernelOperator, kernel: Tensor, sizes: tuple[int, ...]) -> bool:
    """Whether every symbol on the grid is that of a kernel: of a circular operator with as many frequencies as taps."""
    return op.kind == "circular" and sizes == tuple(kernel.shape[3:]) and kernel.numel() == op.weight.numel()


def _extended(op: KernelOperator, kernel: Tensor, correction: Tensor, level: float, sizes: tuple[int, ...]) -> Tensor:
    """`K₀ - t D` for the correction `D` so far and the `t` that ends nearest to `K₀` after the scaling that is still needed.

    A few rounds correct too little, most of all between the frequencies of their grid. Going on in the same direction costs far
    less than scaling everything.
    """
    fine = sizes if op.kind == "circular" else tuple(2 * n if n > 1 else 1 for n in sizes)
    grid = FrequencyGrid(fine, kernel)
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
    if op.kind == "circular":
        return sizes, max_norm
    if op.kind == "lattice":
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
