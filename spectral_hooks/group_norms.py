"""The norm of every group of a convolution by itself: each is an operator of its own, and small ones are many."""

from __future__ import annotations

from math import acos, cos, inf, pi

import torch
from torch import Tensor

from .hermitian import norms
from .lattice import _angle, _chunks, _tiling, grid_norm, lattice_norm, normalized, surely_below
from .operators.symbols import Gram, half_plane, trim

#: Groups of up to so many rows or columns are measured together, and the angle of the first cells then.
_TOGETHER, _FIRST_ANGLE = 16, 0.4
#: Bytes of symbols held at once.
_CHUNK_BYTES = 1 << 25


def lattice_norms(kernel: Tensor, rtol: float, goal: float | None = None) -> Tensor:
    """What the supremum of each group does not exceed: by `lattice_norm`, or, where groups are small, all at once.

    With a `goal`, that where it is proven, and infinity elsewhere.
    """
    kernel = kernel.detach()
    if len(kernel) == 1 or min(kernel.shape[1:3]) > _TOGETHER:
        return torch.tensor([lattice_norm(group, rtol, goal).upper for group in kernel.split(1)], dtype=torch.float64)
    if goal is None:
        return _search_together(kernel, rtol, None)
    bounds = _goal_where(surely_below(kernel, goal), goal)
    left = bounds == inf
    if left.any():
        bounds[left] = _search_together(kernel[left.to(kernel.device)], rtol, goal)
    return bounds


def _goal_where(proven: Tensor, goal: float) -> Tensor:
    """The goal, where it is proven; infinity elsewhere."""
    return torch.full(proven.shape, inf, dtype=torch.float64).masked_fill(proven.cpu(), goal)


def grid_norms(kernel: Tensor, sizes: tuple[int, ...], *, screen: torch.dtype = torch.float64) -> Tensor:
    """The largest norm of the symbol of each group over a frequency grid: by `grid_norm`, or all at once."""
    if len(kernel) == 1 or min(kernel.shape[1:3]) > _TOGETHER:
        found = [grid_norm(group, sizes, screen=screen) for group in kernel.split(1)]
        return torch.tensor([f.upper if screen == torch.float64 else f.value for f in found], dtype=torch.float64)
    kernel, scale = _normalized_each(kernel)
    gram, (theta, _) = Gram(kernel), half_plane(sizes, kernel)
    squared = kernel.new_zeros(len(kernel))
    chunk = max(_CHUNK_BYTES // (16 * len(kernel) * gram.size**2), 1)
    for part in theta.split(chunk):
        angles = part @ gram.lags.T
        even, odd = angles.cos() @ gram.even, -angles.sin() @ gram.odd
        matrices = even if gram.size == 1 or gram.is_real else torch.complex(even, odd)
        squared = torch.maximum(squared, _top(matrices.unflatten(-1, (gram.size, gram.size))).amax(1))
    return ((squared.clamp(min=0) + 2 * gram.error).sqrt() * scale).cpu()


def _normalized_each(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel in float64 with the largest entry of every group in [1, 2), and the powers of two divided out; 0 for a zero."""
    kernel, scale = normalized(kernel.detach())
    largest = kernel.abs().flatten(1).amax(1)
    own = torch.where(largest > 0, largest.log2().floor().exp2(), 0.0)
    return kernel / each(own.where(own > 0, torch.ones_like(own)), kernel.ndim - 1), own * scale


def _search_together(kernel: Tensor, rtol: float, goal: float | None) -> Tensor:
    """The branch and bound of `lattice.py` for all groups at once, by eigenvalues, each cell against the best of its group."""
    kernel, scale = _normalized_each(kernel)
    kernel, _ = trim(kernel)
    gram, degree = Gram(kernel), torch.tensor(kernel.shape[3:]).to(kernel) - 1
    if not degree.numel():
        best = torch.linalg.matrix_norm(kernel, ord=2).square() + 2 * gram.error
        upper = best.sqrt() * scale
        return upper.cpu() if goal is None else _goal_where(upper <= goal, goal)
    best, failed = kernel.new_zeros(len(kernel)), torch.zeros(len(kernel), dtype=torch.bool, device=kernel.device)
    cells, finest = _tiling(gram, degree, _FIRST_ANGLE), acos(1 / (1 + rtol))
    while len(cells.group):
        squared = torch.cat([_top(gram(part.group, part.centre)) for part in _chunks(gram, cells)])
        best = best.scatter_reduce(0, cells.group, squared, "amax")
        bound = best * (1 + rtol) ** 2 if goal is None else (goal / scale) ** 2
        angle = _angle(degree, cells.radius)
        # a proof that goes far beyond what it takes to find the norm is a close call
        failed |= (best > bound) | ((goal is not None) & (best * (1 + rtol) ** 2 > bound) & (angle < finest / 2))
        kept = squared + 2 * gram.error > bound[cells.group] * cos(min(angle, pi / 2)) ** 2
        cells = cells.at(kept & ~failed[cells.group] & (scale[cells.group] > 0)).split()
    if goal is not None:
        return _goal_where(~failed, goal)
    return (best.clamp(min=0).sqrt() * scale).cpu() * (1 + rtol)


def _top(matrices: Tensor) -> Tensor:
    """The largest eigenvalues of small Gram matrices."""
    return matrices[..., 0, 0].real if matrices.shape[-1] == 1 else norms(matrices, steps=1)


def each(factors: Tensor, dims: int = 2) -> Tensor:
    """Factors of the groups, to multiply what has so many dimensions after that of the groups."""
    return factors.reshape(-1, *(1,) * dims)
