"""The norm of every group of a convolution by itself: each is an operator of its own, and small ones are many."""

from __future__ import annotations

from math import cos, inf, pi, prod, sin

import torch
from torch import Tensor

from ..linalg.gram import Gram
from ..linalg.lanczos import norms
from ..linalg.memory import at_once
from ..linalg.scaling import normalized_each
from ..linalg.symbols import half_plane, trim
from .cells import angle_of
from .cover import covering, in_chunks
from .grid import grid_norm
from .lattice import lattice_norm, surely_below
from .single_row import grid_maxima, suprema

#: Groups of up to so many rows or columns are measured together, and the angle of the first cells then.
_TOGETHER, _FIRST_ANGLE = 16, 0.4
#: What a sum of squares may lack for each term.
_VECTOR_ROUNDING = torch.finfo(torch.float64).eps
#: What may be spent on proving the norm of a group below a goal that is closer than `rtol`: evaluations times the matrix size.
_CLOSE_CALL_BUDGET = 1 << 16


def lattice_norms(kernel: Tensor, rtol: float, goal: float | None = None) -> Tensor:
    """What the supremum of each group does not exceed: by `lattice_norm`, or, where groups are small, all at once.

    With a `goal`, that where it is proven, and infinity elsewhere.
    """
    kernel = kernel.detach()
    if min(kernel.shape[1:3]) == 1 and prod(kernel.shape[3:]) > 1:
        return _of_rows(kernel, rtol, goal)
    if len(kernel) == 1 or min(kernel.shape[1:3]) > _TOGETHER:
        return torch.tensor([lattice_norm(group, rtol, goal).upper for group in kernel.split(1)], dtype=torch.float64)
    if goal is None:
        return _search_together(kernel, rtol, None)
    bounds = _goal_where(surely_below(kernel, goal), goal)
    left = bounds == inf
    if left.any():
        bounds[left] = _search_together(kernel[left.to(kernel.device)], rtol, goal)
    return bounds


def _of_rows(kernel: Tensor, rtol: float, goal: float | None) -> Tensor:
    """That of symbols with a single row."""
    kernel, scale = normalized_each(kernel)
    kernel, _ = trim(kernel)
    if kernel.ndim == 3:
        upper = torch.linalg.vector_norm(kernel.flatten(1), dim=1) * (1 + _VECTOR_ROUNDING * kernel[0].numel()) * scale
        return upper.cpu() if goal is None else _goal_where(upper <= goal, goal)
    if goal is None:
        return (suprema(kernel, rtol).upper * scale).cpu()
    relative = torch.where(scale > 0, goal / scale, inf)
    return _goal_where(suprema(kernel, rtol, relative).upper < inf, goal).masked_fill((scale == 0).cpu(), goal)


def _goal_where(proven: Tensor, goal: float) -> Tensor:
    """The goal, where it is proven; infinity elsewhere."""
    return torch.full(proven.shape, inf, dtype=torch.float64).masked_fill(proven.cpu(), goal)


def grid_norms(kernel: Tensor, sizes: tuple[int, ...], *, screen: torch.dtype = torch.float64) -> Tensor:
    """The largest norm of the symbol of each group over a frequency grid: by `grid_norm`, or all at once."""
    if len(kernel) == 1 or min(kernel.shape[1:3]) > _TOGETHER:
        found = [grid_norm(group, sizes, screen=screen) for group in kernel.split(1)]
        return torch.tensor([f.upper if screen == torch.float64 else f.value for f in found], dtype=torch.float64)
    kernel, scale = normalized_each(kernel)
    if min(kernel.shape[1:3]) == 1 and kernel.ndim > 3:
        return (grid_maxima(kernel, sizes).upper * scale).cpu()
    gram, (theta, _) = Gram(kernel), half_plane(sizes, kernel)
    squared = kernel.new_zeros(len(kernel))
    chunk = at_once(16 * len(kernel) * gram.size**2 + 40 * len(gram.lags))
    for part in theta.split(chunk):
        angles = part @ gram.lags.T
        even, odd = angles.cos() @ gram.even, -angles.sin() @ gram.odd
        matrices = even if gram.is_real else torch.complex(even, odd)
        squared = torch.maximum(squared, _top(matrices.unflatten(-1, (gram.size, gram.size))).amax(1))
    return ((squared.clamp(min=0) + 2 * gram.error).sqrt() * scale).cpu()


def _search_together(kernel: Tensor, rtol: float, goal: float | None) -> Tensor:
    """The branch and bound of `lattice.py` for all groups at once, by eigenvalues, each cell against the best of its group."""
    kernel, scale = normalized_each(kernel)
    kernel, _ = trim(kernel)
    gram, degree = Gram(kernel), torch.tensor(kernel.shape[3:]).to(kernel) - 1
    if not degree.numel():
        best = torch.linalg.matrix_norm(kernel, ord=2).square() + 2 * gram.error
        upper = best.sqrt() * scale
        return upper.cpu() if goal is None else _goal_where(upper <= goal, goal)
    low, high = gram.extent()
    high = torch.where(scale > 0, high, 0.0)
    best, spent = kernel.new_zeros(len(kernel)), kernel.new_zeros(len(kernel))
    failed = torch.zeros(len(kernel), dtype=torch.bool, device=kernel.device)
    cells = covering(gram, degree, _FIRST_ANGLE)

    def bound() -> Tensor:
        return best * (1 + rtol) ** 2 if goal is None else (goal / scale) ** 2

    while True:
        cells = cells.at((~failed & (high > bound()))[cells.group])
        if not len(cells.group):
            break
        squared = torch.cat([_top(gram(part.group, part.centre)) for part in in_chunks(gram, cells)])
        best = best.scatter_reduce(0, cells.group, squared, "amax")
        spent += torch.bincount(cells.group, minlength=len(spent))
        angle = min(angle_of(degree, cells.radius), pi / 2)
        level = bound() * cos(angle) ** 2 + low * sin(angle) ** 2 - 2 * gram.error
        kept = squared > level[cells.group]
        if goal is not None:
            left = torch.zeros_like(failed).index_fill_(0, cells.group[kept], True)
            close = (best * (1 + rtol) ** 2 > bound()) & (spent * gram.size > _CLOSE_CALL_BUDGET)
            failed |= (best > bound()) | (left & close)
        cells = cells.at(kept).split()
    if goal is not None:
        return _goal_where(~failed, goal)
    return (torch.minimum(bound().clamp(min=0), high).sqrt() * scale).cpu()


def _top(matrices: Tensor) -> Tensor:
    """The largest eigenvalues of small Gram matrices."""
    return norms(matrices, steps=1)
