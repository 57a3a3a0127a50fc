"""Keep weights inside that what is known of them does not prove to be: certify, clip, certify again.

Layers of one canonical shape go through it together, and one layer is a batch of one; matrices go all together.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from .. import projections
from ..linalg.host import read
from ..linalg.precision import exact, float32_is_kept, full_precision
from ..linalg.scaling import each, normalized
from ..norms.proofs import certificates
from ..operators.base import KernelOperator
from ..projections.dual import clip_kernel
from ..projections.matrices import clip_matrices
from ..projections.settle import settle
from .watch import Job, alike, together, unit
from .wide import is_wide, kept_wide

#: How much deeper than the bound weights are clipped at most, relative to it, unless it is said: kernels, whose certificates cost
#: much, and matrices.
_SLACK, _SLACK_OF_MATRICES = 0.08, 0.02
#: For how many steps at its pace a matrix is given room: beyond, a clip costs less than the bounds of its moves.
_REST = 16

#: Up to this ratio of norm to bound what is taken away is small: one proximal step, with half the digits, will do.
_NEAR = 1.2
#: The least depth of a clip, and from how many channels on it grows with them.
_LEAST_DEPTH, _WIDE = 0.005, 64
#: How often a clip that is not proven inside is scaled by a little, before it is measured.
_ATTEMPTS = 2


class _Move(NamedTuple):
    """By how much a weight moves per projection at most, and how deep to clip it, both relative to the bound."""

    pace: float
    depth: float


@full_precision
def keep_inside(jobs: Sequence[Job], max_norm: float, *, rounds: int, slack: float | None) -> list[Job]:
    """The jobs, each with what is known of it now, and with its clip if it is not proven inside as it is.

    A weight of which nothing is known comes as close to the bound as `projections.clip` takes it. Later clips go deeper, by at
    most `slack`, of which None is the default: that leaves room in which to move, and for certificates that cost little.
    """
    results = list(jobs)
    slack, of_matrices = (_SLACK, _SLACK_OF_MATRICES) if slack is None else (slack, slack)
    matrices = [i for i, job in enumerate(jobs) if job.is_matrix]
    for i, job in zip(matrices, _kept_matrices([jobs[i] for i in matrices], max_norm, of_matrices), strict=True):
        results[i] = job
    moving: list[tuple[int, Tensor]] = []
    for i, job in enumerate(jobs):
        if job.is_matrix:
            continue
        kernel = job.op.canonical().detach()
        if slack >= _LEAST_DEPTH and _moves(job, kernel):
            moving.append((i, kernel))
        else:
            results[i] = _to_the_bound(job, max_norm, rounds)
    for members, kernels in alike(moving):
        kept = _kept([jobs[i] for i in members], kernels, max_norm, rounds, slack)
        for i, job in zip(members, kept, strict=True):
            results[i] = job
    return results


def _kept_matrices(jobs: list[Job], max_norm: float, slack: float) -> list[Job]:
    """`keep_inside` of matrices of any shapes, in one call."""
    groups: dict[object, list[int]] = {}
    for i, job in enumerate(jobs):
        # without slack the result must not depend, by its rounding, on which others are in doubt: what is known decides that
        key = (job.op.weight.shape, job.op.weight.dtype, job.op.weight.device) if slack else i
        groups.setdefault(key, []).append(i)
    batches = [together([jobs[i].matrix(jobs[i].op.weight) for i in members]) for members in groups.values()]
    depths = [
        torch.tensor([_depth_of_matrix(jobs[i], max_norm, slack) for i in members], dtype=torch.float64)
        for members in groups.values()
    ]
    found = clip_matrices(batches, max_norm, depth=depths)
    differ = read([(now.weights != batch).flatten(1).any(1) for now, batch in zip(found, batches, strict=True)])
    results = list(jobs)
    for members, now, changed in zip(groups.values(), found, differ, strict=True):
        for i, weight, norm, is_new in zip(members, now.weights, now.norms.tolist(), changed.tolist(), strict=True):
            job, proven = jobs[i], min(norm, max_norm)  # what is above by half of what counts as equal
            new = weight if job.op.weight.ndim == 2 else job.op.from_canonical(weight.reshape(job.op.canonical_shape))
            results[i] = job.changed(new, proven) if is_new else job.proven(proven)
    return results


def _depth_of_matrix(job: Job, max_norm: float, slack: float) -> float:
    """How deep to clip, relative to the bound: what it moves in some steps."""
    if job.far is None or not job.far < inf:
        return 0.0
    return min(_REST * _pace(job, max_norm), slack)


def _moves(job: Job, kernel: Tensor) -> bool:
    """Whether it is known from where it has moved, and is either certified on the lattice or made of matrices."""
    is_matrix = prod(kernel.shape[3:]) == 1
    return job.far is not None and job.far < inf and (is_matrix or not job.op.is_finite)


def _kept(jobs: list[Job], kernels: Tensor, max_norm: float, rounds: int, slack: float) -> list[Job]:
    """`keep_inside` of a batch of one canonical shape, of weights that have moved, with their canonical kernels."""
    moves = [_move(job, kernels.shape, max_norm, slack) for job in jobs]
    if not is_wide(kernels):
        return _kept_together(jobs, kernels, moves, max_norm, rounds)
    parts = zip(jobs, kernels.split(len(kernels) // len(jobs)), moves, strict=True)
    return [
        kept_wide(job, part, *move, max_norm) or _kept_together([job], part, [move], max_norm, rounds)[0]
        for job, part, move in parts
    ]


def _kept_together(jobs: list[Job], kernels: Tensor, moves: list[_Move], max_norm: float, rounds: int) -> list[Job]:
    """The same by certificates and clips that know nothing of earlier ones."""
    results = list(jobs)
    outside: dict[int, KernelOperator] = {}
    groups = kernels.unflatten(0, (len(jobs), -1))
    found = _certified([job.op for job in jobs], kernels, moves, max_norm)
    for i, (job, (estimate, proven)) in enumerate(zip(jobs, found, strict=True)):
        if proven <= 1:
            results[i] = job.proven(proven * max_norm)
        elif moves[i].depth:
            outside[i] = _clip(job.op, groups[i], moves[i].depth, estimate, max_norm, rounds)
        else:
            results[i] = _to_the_bound(job, max_norm, rounds)
    for _ in range(_ATTEMPTS if outside else 0):
        ops, members = list(outside.values()), list(outside)
        canonical = torch.cat([op.canonical() for op in ops]) if ops else kernels[:0]
        for i, (estimate, proven) in zip(members, _certified(ops, canonical, [moves[i] for i in members], max_norm), strict=True):
            op, depth = outside[i], moves[i].depth
            if proven <= 1:
                results[i] = jobs[i].changed(op.weight, proven * max_norm)
                del outside[i]
            elif estimate * (1 - depth / 4) > 1 - depth:  # not deeper than meant, and cheaper than to find out by how much
                outside[i] = op.with_weight(op.weight * (1 - depth / 4))
    for i, op in outside.items():
        results[i] = jobs[i].changed(*settle(op, op.weight, max_norm, moves[i].depth / 4))
    return results


def _move(job: Job, shape: torch.Size, max_norm: float, slack: float) -> _Move:
    """Of a job whose canonical kernel has this shape."""
    pace = _pace(job, max_norm)
    # for a room `x` the certificates of a convolution cost some `pace / x²` a step, and more for wide ones; a matrix's little
    wish = sqrt(pace * max(min(shape[1:3]) / _WIDE, 1))
    return _Move(pace, 0.0 if prod(shape[3:]) == 1 else min(max(wish, _LEAST_DEPTH), slack))


def _pace(job: Job, max_norm: float) -> float:
    """By how much it moves per projection at most, relative to the bound."""
    age = 0 if job.known is None else job.known.age
    return (job.far or 0.0) * job.op.lattice_factor * (unit(max_norm) / max_norm) / (age + 1)


def _to_the_bound(job: Job, max_norm: float, rounds: int) -> Job:
    return job.changed(projections.clip(job.op, max_norm, rounds=rounds), max_norm)


def _certified(ops: list[KernelOperator], kernels: Tensor, moves: list[_Move], max_norm: float) -> list[tuple[float, float]]:
    """Relative to the bound, estimates of the norms and what they are proven not to exceed, at most 1, or infinity."""
    if not ops:
        return []
    precise = exact(kernels)
    groups = len(kernels) // len(ops)
    pace, depth, scale = (
        torch.tensor(values, dtype=torch.float64).repeat_interleave(groups)
        for values in (*zip(*moves, strict=True), [op.lattice_factor / max_norm for op in ops])
    )
    found = certificates(precise * each(scale.to(precise.device), kernels.ndim - 1), pace, depth)
    estimates, proven = (x.unflatten(0, (-1, groups)).amax(1).tolist() for x in found)
    return list(zip(estimates, proven, strict=True))


def _clip(op: KernelOperator, kernel: Tensor, depth: float, estimate: float, max_norm: float, rounds: int) -> KernelOperator:
    """The operator of this canonical kernel with its weight clipped to a depth, nearly: not certified."""
    near = estimate < _NEAR
    kernel, scale = normalized(kernel)
    level = max_norm * (1 - depth) / scale
    single = near and float32_is_kept()
    clipped, _ = clip_kernel(op, kernel.float() if single else kernel, level, 1 if near else rounds, stretch=not near)
    weight = op.from_canonical(clipped.to(kernel)) * scale
    # an entry can grow beyond the largest number of the stored dtype; what that takes is seen by the proof that follows
    largest = torch.finfo(op.weight.dtype).max
    return op.with_weight(weight.clamp(-largest, largest).to(op.weight))
