"""Certificates for many kernels at once that have room to spare, as hooks need them at every step.

`lattice_norm` finds out where a norm lies. A hook asks less: whether kernels are inside a ball. By the lemma in `lattice.py` the
norm is at most `U` if `‖F(centre)‖ ≤ U cos(a)` at the centres of cells of the angle `a`. An estimate of the norm from a sample
tells which `a` will do; then there is no search, and kernels of equal shape are one batch.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, inf, pi, prod, sqrt

import torch
from torch import Tensor

from ..linalg.cholesky import below_
from ..linalg.gram import Gram
from ..linalg.lanczos import lanczos, norms
from ..linalg.memory import at_once
from ..linalg.precision import exact, float32_is_kept
from ..linalg.rounded import frobenius_bounds
from ..linalg.symbols import half_plane, product, symbol, trim
from ..linalg.threads import calm
from .cells import angle_of, cells_at, tiling
from .cover import covering, proven_below
from .single_row import grid_maxima, suprema

#: Krylov steps for an estimate of the norm of a kernel, and what it may lack; of a matrix, which has a single chance, more.
_KRYLOV_STEPS, _MARGIN = 4, 1.02
_MATRIX_KRYLOV_STEPS, _MATRIX_MARGINS = 8, (1.02, 1.1)
#: Of what lies farther below the bound no more than this is asked to be proven, for a finer proof would mind its rounding.
_LOWEST_GOAL = 0.7
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
def certificates(kernels: Tensor, pace: Tensor, depth: Tensor, sizes: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """For each group of a canonical kernel an estimate of `sup_θ ‖F(θ)‖₂`, and a number `≤ 1` that it is proven not to exceed.

    The second is infinite where no proof was found with few cells, and for NaN. A proof costs the less the more room there is
    below 1, and it is shared: some makes the proof cheap, the rest is for the kernel to move at its pace until it needs the next.

    Args:
        kernels: `(groups, rows, columns, *taps)`.
        pace: by how much the norm may change in a step, `(groups,)`.
        depth: how far below 1 a norm is taken to lie, unless it is seen to be smaller, `(groups,)`.
        sizes: of circular operators, frequencies per axis: the largest norm on their grid is asked for, whatever pace and depth.
    """
    kernels = _folded(kernels, sizes) if sizes else kernels
    # `sup ‖F‖₂² ≥ mean ‖F‖_F² / rank`: what is outside by that would spoil the bounds of the others' rounding
    estimate = (kernels.flatten(1).double().square().sum(1) / min(kernels.shape[1:3])).sqrt().cpu()
    proven = torch.full_like(estimate, inf)
    left = estimate < 1
    if not left.any():
        return estimate, proven
    if sizes:
        estimate[left], proven[left] = _on_grid(exact(kernels[left.to(kernels.device)]), sizes)
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


def _folded(kernels: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Kernels with the same symbols on a grid, and no more taps than that has frequencies."""
    for axis, n in enumerate(sizes, start=3):
        places = torch.arange(kernels.shape[axis], device=kernels.device)
        if len(places) > n:
            kernels = torch.stack([kernels.index_select(axis, places[i::n]).sum(axis) for i in range(n)], dim=axis)
    return kernels


def _on_grid(kernels: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Estimates of the largest norms on a grid of frequencies, and what is proven of them: about that, 1 or infinity."""
    if min(kernels.shape[1:3]) == 1:
        upper = grid_maxima(kernels, sizes).upper.cpu()
        return upper, upper.where(upper <= 1, inf)
    kernels = kernels if kernels.shape[1] <= kernels.shape[2] else kernels.transpose(1, 2)
    theta, _ = half_plane(sizes, kernels)
    estimate = torch.zeros(len(kernels), dtype=torch.float64)
    proven = torch.zeros_like(estimate)
    # the symbols, their Gram matrices and the factors of these
    for part in theta.split(at_once(32 * len(kernels) * kernels.shape[1] * (kernels.shape[1] + kernels.shape[2]))):
        found = _at_frequencies(kernels, part)
        estimate, proven = (torch.maximum(x, y.amax(0)) for x, y in zip((estimate, proven), found, strict=True))
    return estimate, proven


def _at_frequencies(kernels: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """The same of every symbol, `(frequencies, groups)`: in float32, and in float64 where that is too coarse."""
    single = kernels.float() if float32_is_kept() else kernels
    squares, error = _squared_symbols(single, theta)
    squared = norms(squares.flatten(0, 1), steps=_MATRIX_KRYLOV_STEPS).clamp(min=0)
    estimate = squared.double().sqrt().cpu().unflatten(0, squares.shape[:2])
    proven = torch.full_like(estimate, inf)
    goals = [(_MARGIN * estimate).clamp(_LOWEST_GOAL, 1), torch.ones_like(estimate)]
    for goal in goals:
        left = ((proven == inf) & (estimate < goal)).nonzero()
        if len(left):
            where, group = left.T.to(theta.device)
            level = goal[left[:, 0], left[:, 1]].square()
            inside = below_(
                squares[where, group] / level.to(squares)[:, None, None], 1.0, error=error / float(level.amin()), slack=0.5
            )
            proven[left[:, 0], left[:, 1]] = level.sqrt().where(inside.proven.cpu(), inf)
    if single.dtype != torch.float64:
        for where, group in ((proven == inf) & (estimate < 1)).nonzero().tolist():
            square, error = _squared_symbols(kernels[group : group + 1], theta[where : where + 1])
            if below_(square[0], 1.0, error=error, slack=0.5).proven:
                proven[where, group] = 1
    return estimate, proven


def _squared_symbols(kernels: Tensor, theta: Tensor) -> tuple[Tensor, float]:
    """`F F*` at these frequencies, `(frequencies, groups, rows, rows)`, and by how much any of them may be off in norm.

    A sum of `n` products is off by `n u` of the product of the lengths, and a complex one by `√2` times as much of twice as many;
    the sums of the `T` taps are of `√T` times the length of the kernel, and an angle is off by some roundings of every turn.
    """
    symbols = symbol(kernels, theta)
    eps, taps = torch.finfo(kernels.dtype).eps, prod(kernels.shape[3:])
    turns = 7 * sum(k - 1 for k in kernels.shape[3:]) * torch.finfo(theta.dtype).eps / eps
    # row by row: a sum of millions of equal squares in float32 lacks a hundredth
    length = float(frobenius_bounds(torch.view_as_real(symbols).flatten(-2)).amax())
    sums = (taps + 8 + turns) * sqrt(taps) * float(frobenius_bounds(kernels.flatten(2)).amax())
    return symbols @ symbols.mH, eps * length * (sqrt(2) * (kernels.shape[2] + 4) * length + 2 * sums)


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
    likely = torch.maximum(1 - depth, (_PLATEAU * estimate).minimum(1 - depth / 2)) if exactly else 1 - depth
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
