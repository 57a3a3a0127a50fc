"""Kernels in two sets at once: the ball `‖F(θ)‖ ≤ c` at the frequencies of a grid, and the kernels of `k` taps."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from ..linalg.taps import AppliedSymbol
from ..norms.lattice import lattice_norm
from ..norms.spectral_norm import spectral_norm
from ..operators.base import KernelOperator
from .excess import excess_over, few_over
from .frequencies import FrequencyGrid
from .rounds import proximal_rounds
from .stretch import combined, stretched

#: Frequencies of the clip's grid per axis, as a multiple of the kernel's degree `k - 1`: for up to 32 channels, and for more.
_OVERSAMPLING = (6, 4)
#: Those of a checkerboard, for more than 32 channels and for more than 256, and the least per axis: for few rounds, which leave
#: more than it misses. None up to this ratio of norm to bound, where what is outside lies at few frequencies.
_CHECKERBOARD, _LEAST, _MANY, _FEW_ROUNDS, _FAR = (5, 4), 6, 256, 3, 1.5
#: Krylov steps that tell.
_GLANCES = 4
#: Symbols of more rows and columns than this are stretched by estimates of their norms.
_SMALL_SYMBOLS = 32
#: What the clip of a matrix may be off by, relative to the level: as its dtype's rounding, but no more and no less than these.
_FINEST, _COARSEST = 1e-10, 1e-7
#: Levels above this share of the norm need no decomposition in any precision.
_NEAR = 0.1


def clip_kernel(
    op: KernelOperator, kernel: Tensor, max_norm: float, rounds: int, *, stretch: bool = True
) -> tuple[Tensor, Tensor]:
    """The kernel after `rounds` on the dual problem, nearly inside, and per group the largest norm of the original on the grid.

    At the end the correction may `stretch`, which pays where it is large.
    """
    if op.is_pointwise:
        return _clip_matrices(kernel, max_norm / op.lattice_factor, op.dtype)
    sizes, level = _clip_grid(op, kernel, max_norm)
    if _crops_nothing(op, kernel, sizes):  # one step is all
        rounds, stretch = 1, False
    support = (op.with_weight(torch.ones_like(op.weight)).canonical() != 0).to(kernel.device)
    if kernel.shape[1] > kernel.shape[2]:  # the transpose has the same singular values, and fewer rows
        kernel, support = kernel.transpose(1, 2), support.transpose(1, 2)
    grid = _grid(op, kernel, sizes, level, rounds)
    found = proximal_rounds(kernel, grid, lambda symbols: grid.adjoint(symbols) * support, level, rounds)
    clipped = found.kernel
    if stretch:
        fine = sizes if op.kind == "circular" else tuple(2 * n if n > 1 else 1 for n in sizes)
        if grid.fast or kernel.shape[1] <= _SMALL_SYMBOLS:
            clipped = stretched(kernel, kernel - clipped, level, FrequencyGrid(fine, kernel))
        else:
            theta = FrequencyGrid(fine, kernel, checkerboard=op.kind != "circular" and _has_two_axes(sizes)).theta
            clipped = combined(kernel, kernel - clipped, kernel - found.before, level, theta)
    return clipped if clipped.shape == op.canonical_shape else clipped.transpose(1, 2), found.peak


def _grid(op: KernelOperator, kernel: Tensor, sizes: tuple[int, ...], level: float, rounds: int) -> FrequencyGrid:
    """The frequencies for the rounds."""
    if op.kind == "circular" or rounds > _FEW_ROUNDS or kernel.shape[1] <= _SMALL_SYMBOLS or not _has_two_axes(sizes):
        return FrequencyGrid(sizes, kernel)
    oversampling = _CHECKERBOARD[kernel.shape[1] > _MANY]
    even = tuple(max(oversampling * (k - 1) + oversampling * (k - 1) % 2, _LEAST) if k > 1 else 1 for k in kernel.shape[3:])
    grid = FrequencyGrid(even, kernel, checkerboard=True)
    if grid.fast:
        return FrequencyGrid(sizes, kernel)
    symbol = AppliedSymbol(kernel, grid.theta)
    norms, _ = symbol.top(symbol.start(), _GLANCES)
    return grid if bool((norms.amax(1) > _FAR * level).all()) else FrequencyGrid(sizes, kernel)


def _has_two_axes(sizes: tuple[int, ...]) -> bool:
    """Whether a checkerboard can be laid over the first two."""
    return len(sizes) > 1 and min(sizes[:2]) > 1


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
