"""Keep weights inside that what is known of them does not prove to be: certify, clip, certify again.

Layers of one canonical shape go through it together, and one layer is a batch of one; matrices go all together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import inf, prod, sqrt

import torch
from torch import Tensor

from .. import projections
from ..linalg.precision import exact, float32_is_kept, full_precision
from ..linalg.scaling import each, normalized
from ..norms.proofs import certificates
from ..operators.base import Grid, KernelOperator
from ..projections.dual import clip_kernel
from ..projections.settle import settle
from .keep_matrices import kept_matrices
from .keep_small import Move, are_small, kept_small
from .keep_wide import is_wide, kept_wide
from .watch import Job, alike

#: How much deeper than the bound weights are clipped at most, relative to it, unless it is said: kernels, whose certificates cost
#: much, and matrices.
_SLACK, _SLACK_OF_MATRICES = 0.08, 0.02
#: Up to this ratio of norm to bound what is taken away is small: one proximal step, with half the digits, will do.
_NEAR = 1.2
#: The least depth of a clip, and from how many channels on it grows with them.
_LEAST_DEPTH, _WIDE = 0.005, 64
#: How often a clip that is not proven inside is scaled by a little, before it is measured.
_ATTEMPTS = 2


@full_precision
def keep_inside(jobs: Sequence[Job], max_norm: float, *, rounds: int, slack: float | None) -> list[Job]:
    """The jobs, each with what is known of it now, and with its clip if it is not proven inside as it is.

    A weight of which nothing is known comes as close to the bound as `projections.clip` takes it. Later clips go deeper, by at
    most `slack`, of which None is the default: that leaves room in which to move, and for certificates that cost little.
    """
    results: list[Job | None] = [None] * len(jobs)
    slack, of_matrices = (_SLACK, _SLACK_OF_MATRICES) if slack is None else (slack, slack)

    def fill(numbers: Iterable[int], kept: Iterable[Job | None]) -> None:
        for i, job in zip(numbers, kept, strict=True):
            results[i] = job

    matrices = [i for i, job in enumerate(jobs) if job.is_matrix]
    fill(matrices, kept_matrices([jobs[i] for i in matrices], max_norm, of_matrices))
    moves = {i: _move(job, max_norm, slack) for i, job in enumerate(jobs) if results[i] is None and _moves(job, slack)}
    small = [i for i in moves if are_small(jobs[i].op)]
    fill(small, kept_small([jobs[i] for i in small], [moves[i] for i in small], max_norm))
    grids: dict[Grid | None, list[tuple[int, Tensor]]] = {}
    for i in moves:
        if results[i] is None:
            grids.setdefault(jobs[i].op.frequency_grid, []).append((i, jobs[i].op.canonical().detach()))
    for members, kernels in (batch for others in grids.values() for batch in alike(others)):
        fill(members, _kept([jobs[i] for i in members], kernels, [moves[i] for i in members], max_norm, rounds))
    return [_to_the_bound(jobs[i], max_norm, rounds) if kept is None else kept for i, kept in enumerate(results)]


def _moves(job: Job, slack: float) -> bool:
    """Whether it is known from where it has moved, and is certified at frequencies: on the lattice or a grid, or of matrices."""
    of_matrices = prod(job.op.canonical_shape[3:]) == 1
    return slack >= _LEAST_DEPTH and job.far is not None and job.far < inf and (of_matrices or job.op.kind != "finite")


def _kept(jobs: list[Job], kernels: Tensor, moves: list[Move], max_norm: float, rounds: int) -> list[Job]:
    """`keep_inside` of a batch of one canonical shape, of weights that have moved, with their canonical kernels."""
    if not is_wide(kernels) or jobs[0].op.frequency_grid is not None:
        return _kept_together(jobs, kernels, moves, max_norm, rounds)
    parts = zip(jobs, kernels.split(len(kernels) // len(jobs)), moves, strict=True)
    return [
        kept_wide(job, part, *move, max_norm) or _kept_together([job], part, [move], max_norm, rounds)[0]
        for job, part, move in parts
    ]


def _kept_together(jobs: list[Job], kernels: Tensor, moves: list[Move], max_norm: float, rounds: int) -> list[Job]:
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


def _move(job: Job, max_norm: float, slack: float) -> Move:
    """Of a job that has moved."""
    pace, shape = job.pace(max_norm) * job.op.lattice_factor, job.op.canonical_shape
    # for a room `x` the certificates of a convolution cost some `pace / x²` a step, and more for wide ones; a matrix's little
    wish = sqrt(pace * max(min(shape[1:3]) / _WIDE, 1))
    return Move(pace, 0.0 if prod(shape[3:]) == 1 else min(max(wish, _LEAST_DEPTH), slack))


def _to_the_bound(job: Job, max_norm: float, rounds: int) -> Job:
    return job.changed(projections.clip(job.op, max_norm, rounds=rounds), max_norm)


def _certified(ops: list[KernelOperator], kernels: Tensor, moves: list[Move], max_norm: float) -> list[tuple[float, float]]:
    """Relative to the bound, estimates of the norms and what they are proven not to exceed, at most 1, or infinity."""
    if not ops:
        return []
    precise = exact(kernels)
    groups = len(kernels) // len(ops)
    pace, depth, scale = (
        torch.tensor(values, dtype=torch.float64).repeat_interleave(groups)
        for values in (*zip(*moves, strict=True), [op.lattice_factor / max_norm for op in ops])
    )
    sizes = tuple(size for size, _ in ops[0].frequency_grid or ())
    found = certificates(precise * each(scale.to(precise.device), kernels.ndim - 1), pace, depth, sizes)
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
