"""Certificates for many kernels at once that have room to spare, as hooks need them at every step.

`lattice_norm` finds out where a norm lies. A hook asks less: whether kernels are inside a ball. By the lemma in `lattice.py` the
norm is at most `U` if `‖F(centre)‖ ≤ U cos(a)` at the centres of cells of the angle `a`. An estimate of the norm from a sample
tells which `a` will do; then there is no search, and kernels of equal shape are one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, inf, pi

import torch
from torch import Tensor

from ..linalg.cholesky import below_
from ..linalg.gram import Gram
from ..linalg.lanczos import lanczos
from ..linalg.precision import exact
from ..linalg.symbols import product, trim
from ..linalg.threads import calm
from .cells import angle_of, cells_at, tiling
from .cover import covering, proven_below
from .single_row import suprema

#: Krylov steps for an estimate of the norm of a kernel, and what it may lack; of a matrix, which has a single chance, more.
_KRYLOV_STEPS, _MARGIN = 4, 1.02
_MATRIX_KRYLOV_STEPS, _MATRIX_MARGINS = 8, (1.02, 1.1)
#: What most cells of a clipped kernel are expected to have at most, over an estimate.
_PLATEAU = 1.005
#: The largest angle of a cell.
_WIDEST = 0.8
#: From this size on fewer cells are worth more than many groups with the same, and a good estimate more than its Krylov steps.
_LARGE, _MANY_KRYLOV_STEPS = 64, 16
#: The least pace, so that there is a share of the room for it.
_SLOWEST = 1e-6
#: The share of a cell's room that rounding in float32 may take.
_ROUNDING_SHARE = 0.3
#: A kernel is given up when more cells come from splitting than this, times those at the start.
_MOST_SPLIT = 2


@calm
def certificates(kernels: Tensor, pace: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
    """For each group of a canonical kernel an estimate of `sup_θ ‖F(θ)‖₂`, and a number `≤ 1` that it is proven not to exceed.

    The second is infinite where no proof was found with few cells, and for NaN. A proof costs the less the more room there is
    below 1, and it is shared: some makes the proof cheap, the rest is for the kernel to move at its pace until it needs the next.

    Args:
        kernels: `(groups, rows, columns, *taps)`.
        pace: by how much the norm may change in a step, `(groups,)`.
        depth: how far below 1 a norm is taken to lie, unless it is seen to be smaller, `(groups,)`.
    """
    # `sup ‖F‖₂² ≥ mean ‖F‖_F² / rank`: what is outside by that would spoil the bounds of the others' rounding
    estimate = (kernels.flatten(1).double().square().sum(1) / min(kernels.shape[1:3])).sqrt().cpu()
    proven = torch.full_like(estimate, inf)
    left = estimate < 1
    if not left.any():
        return estimate, proven
    kernels, _ = trim(exact(kernels[left.to(kernels.device)]))
    degree = torch.tensor(kernels.shape[3:]).to(kernels) - 1
    if degree.numel() and min(kernels.shape[1:3]) == 1:
        estimate[left], proven[left] = _of_rows(kernels, pace[left].clamp(min=_SLOWEST), depth[left])
        return estimate, proven
    gram = Gram(kernels)
    if gram.is_real:
        estimate[left], proven[left] = _of_matrices(gram.even.reshape(-1, gram.size, gram.size), gram.error)
        return estimate, proven
    sample = cells_at(_sample(degree), degree, gram.groups)
    steps = _KRYLOV_STEPS if gram.size < _LARGE else _MANY_KRYLOV_STEPS
    estimate[left] = _estimates(gram(sample.group, sample.centre), gram.groups, steps)

    def inside(members: Tensor, goal: Tensor, angle: float) -> Tensor:
        return _inside(gram.some(members.to(gram.even.device), goal.square().to(gram.even)), degree, angle)

    proven[left] = _covered(estimate[left], pace[left].clamp(min=_SLOWEST), depth[left], inside, exactly=gram.size >= _LARGE)
    return estimate, proven


def _of_rows(kernels: Tensor, pace: Tensor, depth: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates and proofs for symbols with a single row, whose suprema are nearly as cheap to find."""
    degree = torch.tensor(kernels.shape[3:]).to(kernels) - 1
    coarse = suprema(kernels, 0.0, kernels.new_ones(len(kernels)), budget=0)

    def inside(members: Tensor, goal: Tensor, angle: float) -> Tensor:
        members = members.to(kernels.device)
        budget = _MOST_SPLIT * tiling(degree, angle).number
        return (suprema(kernels[members], 0.0, goal.to(kernels), budget=budget).upper < inf).cpu()

    estimate = coarse.value.cpu()
    return estimate, _covered(estimate, pace, depth, inside)


def _sample(degree: Tensor) -> Tensor:
    """Some frequencies: the real ones, of which one is often the top, and two others."""
    ends = product([torch.tensor([0.0, pi])] * degree.numel(), degree)
    return torch.cat([ends, degree.new_tensor([[1.0, 2.2, 0.6], [2.1, 4.6, 1.7]])[:, : degree.numel()]])


def _estimates(matrices: Tensor, groups: int, steps: int) -> Tensor:
    """The roots of the largest eigenvalues, for each group, by a few Krylov steps; from below."""
    largest = matrices.diagonal(dim1=-2, dim2=-1).real.argmax(-1)
    start = matrices.take_along_dim(largest[:, None, None], dim=-1).squeeze(-1)
    squared, _ = lanczos(matrices, start, steps)
    return squared.unflatten(0, (groups, -1)).amax(1).clamp(min=0).sqrt().double().cpu()


def _of_matrices(squares: Tensor, error: float) -> tuple[Tensor, Tensor]:
    """Estimates of the norms of the matrices with these Gram matrices, and what is proven of them: about that, 1 or infinity."""
    estimate = _estimates(squares, len(squares), _MATRIX_KRYLOV_STEPS)
    proven = torch.full_like(estimate, inf)
    for goal in (*((margin * estimate).clamp(1e-3, 1) for margin in _MATRIX_MARGINS), torch.ones_like(estimate)):
        left = (proven == inf) & (estimate < goal)
        if left.any():
            level = goal[left].square()
            matrices = squares[left.to(squares.device)] / level.to(squares.device)[:, None, None]
            relative = error / float(level.amin())
            inside = below_(matrices, 1.0, error=relative, slack=1e-9 + 4 * relative).proven.cpu()
            proven[left] = proven[left].where(~inside, goal[left])
    return estimate, proven


def _covered(
    estimate: Tensor,
    pace: Tensor,
    depth: Tensor,
    inside: Callable[[Tensor, Tensor, float], Tensor],
    *,
    exactly: bool = False,
) -> Tensor:
    """What the norms of the groups are proven not to exceed, at most 1, or infinity.

    `inside(members, goal, angle)` tells which of these groups have a norm of at most their goal, tried by cells of this angle:
    one of a few values, so that many groups share it, unless it is to be taken `exactly`.
    """
    proven = torch.full_like(estimate, inf)
    promising = estimate < 1 - depth / 4
    # an estimate above the depth is what many cells of a clipped kernel have; one below can be far too low
    likely = torch.maximum(1 - depth, _PLATEAU * estimate) if exactly else 1 - depth
    for taken in (torch.minimum(_MARGIN * estimate, likely), likely):
        # a room `x` for the proof costs `1 / x` and lasts `(1 - taken - x) / pace` steps and one: least per step for this
        goal = 1 - pace * (((1 - taken) / pace - 1) / 2).round().clamp(min=0)
        angle = (taken / goal).acos()
        if not exactly:
            angle = _WIDEST * 2 ** ((angle / _WIDEST).log2() * 4).floor().div(4)
        angle = angle.clamp(max=_WIDEST)
        for value in angle[promising].unique().tolist():
            members = (promising & (angle == value)).nonzero().squeeze(1)
            passed = members[inside(members, goal[members], value)]
            proven[passed] = goal[passed]
        promising &= (proven == inf) & (taken < likely)
    return proven


def _inside(gram: Gram, degree: Tensor, angle: float) -> Tensor:
    """For which groups the norm is proven to be at most 1, by cells of this angle that are split where they fail."""
    quick = gram.single()
    cells = covering(gram, degree, angle)
    budget = _MOST_SPLIT * torch.bincount(cells.group, minlength=gram.groups)
    while True:
        level = cos(angle_of(degree, cells.radius)) ** 2
        cells = cells.at(~proven_below(quick, quick, cells, level, _ROUNDING_SHARE * (1 - level)))
        budget -= 2 ** degree.numel() * torch.bincount(cells.group, minlength=gram.groups)
        cells = cells.at((budget >= 0)[cells.group])
        if not len(cells.group):
            return (budget >= 0).cpu()
        cells = cells.split()
