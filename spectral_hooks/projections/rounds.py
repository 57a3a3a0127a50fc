"""Proximal steps on the dual of the projection onto a ball at the frequencies of a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg.memory import at_once
from ..linalg.scaling import each
from .excess import excess_over, products_pay
from .frequencies import FrequencyGrid

#: From this size on later rounds stay in the spaces that the first one has found, where these are smaller by so much.
_SPACES_FROM, _SMALLER = 33, 0.9


class Rounds(NamedTuple):
    """The kernel after the last round and before it, and per group the largest norm of the original on the grid."""

    kernel: Tensor
    before: Tensor
    peak: Tensor


class _First(NamedTuple):
    """What the first round takes away, `basis @ excess`, its sums, and the largest values; no basis is the identity."""

    basis: Tensor | None
    excess: Tensor
    sums: Tensor
    peak: Tensor

    def out(self, inner: Tensor) -> Tensor:
        return inner if self.basis is None else self.basis @ inner

    def into(self, blocks: Tensor) -> Tensor:
        return blocks if self.basis is None else self.basis.mH @ blocks


def proximal_rounds(kernel: Tensor, grid: FrequencyGrid, crop: Callable[[Tensor], Tensor], level: float, rounds: int) -> Rounds:
    """`rounds` steps from zero, of a kernel with no more rows than columns.

    With `E` the symbol on the grid, over the root of the number of frequencies, and `E*` its adjoint, which crops to the taps,
    the dual of the projection is to minimize `½ ‖K₀ - E* Y‖² + c ‖Y‖_nuclear` over blocks `Y`, one for each frequency, with
    `K = K₀ - E* Y`. A round is a proximal step, which takes the excess of `Y + τ E K` over `τ c`, and a line search. Every group
    is a problem of its own, with steps of its own.

    The left vectors that are above the level at first hold nearly all of what any round takes away. In large symbols the later
    rounds are those of the problem for these rows alone, which has fewer: its solution is hardly farther from the other's than
    what few rounds leave.
    """
    counts = grid.shares

    def step_length(change: Tensor, cropped: Tensor) -> Tensor:
        """Barzilai & Borwein's: large where the change lies at few frequencies, since a crop spreads those over all."""
        spread = _squares(cropped)
        return torch.where(spread > 0, counts @ torch.view_as_real(change).square().flatten(2).sum(2) / spread, 1.0)

    first = _first(grid.symbols(kernel), level, rounds)
    if not bool((first.peak > level).any()):  # what little the kernel is outside lies between these frequencies
        return Rounds(kernel, kernel, first.peak)
    cropped = crop(first.out(first.excess))
    tau = step_length(first.excess, cropped)
    dual, nuclear = first.excess.mul_(each(tau)), tau * (counts @ first.sums)
    before, weight = kernel, kernel - each(tau, kernel.ndim - 1) * cropped
    for _ in range(rounds - 1):
        moved = first.into(grid.symbols(weight)).mul_(each(tau)).add_(dual)
        excess, sums, _ = excess_over(moved, tau * level)
        change, growth = excess.sub_(dual), counts @ sums - nuclear
        cropped = crop(first.out(change))
        length = _squares(cropped)
        moving = length > 1e-24 * _squares(kernel)
        if not bool(moving.any()):
            break
        # the nuclear norm is convex: along the segment it is at most its chord, and the rest is a parabola
        share = (((weight * cropped).flatten(1).sum(1) - level * growth) / length).clamp(0, 1)
        share = torch.where(moving, share, 0.0)
        tau = step_length(change, cropped).clamp(min=1)
        dual, nuclear = dual.add_(change.mul_(each(share))), nuclear + share * growth
        before, weight = weight, weight - each(share, kernel.ndim - 1) * cropped
    return Rounds(weight, before, first.peak)


def _first(blocks: Tensor, level: float, rounds: int) -> _First:
    """The first round, in the spaces of the left vectors above the level where others follow."""
    rows = blocks.shape[-2]
    if rounds == 1 or rows < _SPACES_FROM or products_pay(blocks):
        return _First(None, *excess_over(blocks, level))
    vectors = torch.empty_like(blocks[..., :rows])
    values = blocks.real.new_empty(blocks.shape[:-1])
    chunk = at_once(16 * blocks[0].numel())
    for start in range(0, len(blocks), chunk):
        part = blocks[start : start + chunk]
        squared, vectors[start : start + chunk] = torch.linalg.eigh(part @ part.mH)
        values[start : start + chunk] = squared.clamp(min=0).sqrt()
    over = (values - level).clamp(min=0)
    first = rows - int((over > 0).sum(-1).amax())
    if rows - first > _SMALLER * rows:
        first = 0
    over, values, basis = over[..., first:], values[..., first:], vectors[..., first:]
    gain = over / values.clamp(min=torch.finfo(values.dtype).tiny)
    peak = values[..., -1].amax(0) if first < rows else blocks.real.new_zeros(blocks.shape[1])
    return _First(basis, (basis.mH @ blocks).mul_(gain.unsqueeze(-1)), over.sum(-1), peak)


def _squares(kernel: Tensor) -> Tensor:
    """Squared Frobenius norms of the groups."""
    return kernel.square().flatten(1).sum(1)
