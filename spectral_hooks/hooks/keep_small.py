"""Keep small kernels inside: all of one geometry in one batch, for the proofs before and after a clip as for the clip itself.

What it does not bring to a proof (a weight far outside, rounding of half precision in the way) is left to those who measure.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, inf, prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg.host import read
from ..linalg.memory import CACHED, STREAMED, at_once
from ..linalg.precision import exact
from ..linalg.scaling import each
from ..norms.covered import Sample, cover_bytes, proven, tall_to_wide
from ..operators.base import KernelOperator
from ..projections.kernels import REACH, clip_kernels
from .watch import Job, geometry

#: Up to so many rows or columns kernels are small, and up to so many bytes of the symbols of each.
_SMALL, _MOST_BYTES = 128, 1 << 24
#: Angles of the first cells: few, so that many kernels have the same.
_ANGLES = (0.4, 0.2828, 0.2)
#: An estimate of a norm may lack this, and a close one that.
_MARGIN, _CLOSE = 1.02, 1.004
#: By so much, relative to its level, a step may go too deep.
_TOO_DEEP = 0.015
#: The least pace, so that there is a share of the room for it.
_SLOWEST = 1e-6


class Move(NamedTuple):
    """By how much a weight moves per projection at most, and how deep to clip it, both relative to the bound."""

    pace: float
    depth: float


class Kept(NamedTuple):
    """A weight, what its norm was proven not to exceed, relative to the bound, and whether it was clipped."""

    weight: Tensor
    proven: float
    is_new: bool


def are_small(op: KernelOperator) -> bool:
    """Whether canonical kernels are small, few channels and more than one tap, and are certified for every frequency."""
    shape = op.canonical_shape[1:]
    few = prod(shape[2:]) > 1 and min(shape[:2]) <= _SMALL and op.frequency_grid is None
    return few and cover_bytes(shape, _ANGLES[0]) <= _MOST_BYTES


def kept_small(jobs: Sequence[Job], moves: Sequence[Move], max_norm: float) -> list[Job | None]:
    """The jobs, inside as they are or clipped; None for those that are left to others. All have small kernels."""
    results: list[Job | None] = [None] * len(jobs)
    kinds: dict[tuple[float, object], list[int]] = {}
    for i, (job, move) in enumerate(zip(jobs, moves, strict=True)):
        # centres of norm `1 - depth` prove what lies between
        angle = next((angle for angle in _ANGLES if 1 - move.depth <= cos(angle)), None)
        if angle is not None:
            kind = (geometry(job.op) or i, job.op.weight.shape, job.op.dtype, job.op.device)
            kinds.setdefault((angle, kind), []).append(i)
    for (angle, _), members in kinds.items():
        shape, device = jobs[members[0]].op.canonical_shape, jobs[members[0]].device
        some = at_once(shape[0] * cover_bytes(shape[1:], angle), CACHED if device.type == "cpu" else STREAMED)
        for part in (members[start : start + some] for start in range(0, len(members), some)):
            kept = _kept([jobs[i].op for i in part], [moves[i] for i in part], max_norm, angle)
            for i, found in zip(part, kept, strict=True):
                if found is not None:
                    norm = found.proven * max_norm
                    results[i] = jobs[i].changed(found.weight, norm) if found.is_new else jobs[i].proven(norm)
    return results


class _Batch(NamedTuple):
    """The groups of some operators of one geometry: as one operator, their canonical kernels over the bound, and their moves."""

    op: KernelOperator
    kernels: Tensor
    unit: float
    pace: Tensor
    depth: Tensor

    @classmethod
    def of(cls, op: KernelOperator, unit: float, pace: Tensor, depth: Tensor) -> _Batch:
        """That of an operator of all these groups."""
        return cls(op, tall_to_wide(exact(op.canonical())) / unit, unit, pace, depth)

    def some(self, groups: Tensor) -> _Batch:
        """These groups alone, by their numbers."""
        there = groups.to(self.kernels.device)
        return _Batch(self.op.part(groups), self.kernels[there], self.unit, self.pace[groups], self.depth[groups])

    def weight(self, kernels: Tensor) -> Tensor:
        """The weight of other kernels over the bound, as precise as these."""
        groups, rows, columns, *taps = self.op.canonical_shape
        small, large = sorted((rows, columns))
        whole = kernels.reshape(groups, small, large, *taps)
        return self.op.from_canonical(whole if rows <= columns else whole.transpose(1, 2))

    def cropped(self, kernels: Tensor) -> Tensor:
        """The kernels at the taps that exist."""
        return tall_to_wide(self.op.with_weight(self.weight(kernels)).canonical())


def _kept(ops: list[KernelOperator], moves: list[Move], max_norm: float, angle: float) -> list[Kept | None]:
    """Operators of one geometry; None where no proof was found."""
    weights = [op.weight.detach() for op in ops]
    groups = ops[0].canonical_shape[0]
    op = ops[0].part(torch.arange(groups).repeat(len(ops))).with_weight(torch.cat(weights))
    pace, depth = torch.tensor(moves, dtype=torch.float64).repeat_interleave(groups, dim=0).T
    batch = _Batch.of(op, max_norm / op.lattice_factor, pace.clamp(min=_SLOWEST), depth)
    sample = Sample.of(batch.kernels, angle)
    (estimate,) = read([sample.estimates(closely=False)])
    norms = _proven(sample, batch, estimate)
    outside = (norms == inf).view(-1, groups).any(1)
    near = (estimate < REACH * (1 - depth)).view(-1, groups).all(1)
    clipped = ((norms == inf) & near.repeat_interleave(groups)).nonzero().flatten()
    stored = weights
    if len(clipped):
        weight, norms[clipped] = _clipped(batch.some(clipped), sample.some(clipped), estimate[clipped])
        whole = op.weight.unflatten(0, (len(norms), -1))
        whole = whole.index_copy(0, clipped.to(op.device), weight.unflatten(0, (len(clipped), -1)))
        stored = list(whole.flatten(0, 1).split(len(weights[0])))
    results = zip(stored, norms.view(-1, groups).amax(1).tolist(), outside.tolist(), strict=True)
    return [Kept(weight, norm, is_new) if norm <= 1 else None for weight, norm, is_new in results]


def _clipped(batch: _Batch, sample: Sample, before: Tensor) -> tuple[Tensor, Tensor]:
    """What kernels that are near are clipped to, as it is stored, and what its norms are proven not to exceed, or infinity.

    Args:
        before: estimates of their norms.
    """
    levels, dims = 1 - batch.depth, sample.kernels.ndim - 1
    change = clip_kernels(sample, levels, batch.cropped)
    clipped = Sample.of(exact(sample.kernels - change), sample.cover.angle)
    (estimate,) = read([clipped.estimates(closely=True)])
    too_deep = estimate < (1 - _TOO_DEEP) * levels
    if too_deep.any():
        # a norm is convex: with this share of the step it is at most at the level
        share = torch.where(too_deep, ((before - levels) / (before - estimate)).clamp(0, 1), 1.0)
        clipped = Sample.of(exact(sample.kernels - each(share.to(change), dims) * change), sample.cover.angle)
        (estimate,) = read([clipped.estimates(closely=True)])
    # what a crop has left outside: no deeper than meant
    shares = (levels / (_CLOSE * estimate)).clamp(max=1)
    there, kernels = each(shares.to(change.device), dims), exact(clipped.kernels)
    largest = torch.finfo(batch.op.dtype).max
    weight = batch.weight(kernels * (there * batch.unit)).clamp(-largest, largest).to(batch.op.weight)
    stored = tall_to_wide(exact(batch.op.with_weight(weight).canonical())) / batch.unit
    errors = torch.linalg.vector_norm((stored - kernels * there).flatten(1), dim=1) * (1 + 1e-7) + 1e-15
    return weight, _proven(clipped, batch, estimate * shares, shares.to(errors.device), errors)


def _proven(
    sample: Sample, batch: _Batch, estimate: Tensor, shares: Tensor | None = None, errors: Tensor | None = None
) -> Tensor:
    """What the norms of the groups are proven not to exceed, relative to the bound, at most 1, or infinity.

    A room `x` for the proof costs `1 / x` and lasts `(1 - taken - x) / pace` steps and one: least per step for this goal.
    """
    found = torch.full_like(estimate, inf)
    left = estimate <= 1 - batch.depth / 3  # false for NaN
    room = 1 - (_MARGIN * estimate).clamp(max=1)
    goal = 1 - batch.pace * ((room / batch.pace - 1) / 2).round().clamp(min=0)
    for goals in (goal, torch.ones_like(goal)):
        members = left.nonzero().flatten()
        if len(members):
            there = members.to(sample.lengths.device)
            others = (None if x is None else x[there] for x in (shares, errors))
            inside = members[proven(sample.some(members), goals[members], *others)]
            found[inside] = goals[inside]
        left &= (found == inf) & (goal < 1)
    return found
