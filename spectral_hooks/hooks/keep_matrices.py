"""Keep matrices inside, all together: what moves slowly by its `‖D‖_F`, what moves fast by the few singular values above.

A matrix is clipped so deep that it can rest for some steps, in which `‖D‖_F` tells that it is inside. Where a step is longer than
the depth that is allowed, as those of Adam are, that never tells. Then its Gram matrix is looked at in every step: a factor
proves that it is inside, or the few singular values that have come out are found and clipped. Whole decompositions are for the
first clips, for those that come after a long rest, and for what moves by more than that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ..linalg.host import read
from ..projections.few import block_for, clip_few
from ..projections.matrices import clip_matrices
from .watch import Job, Known, moves, together, unit

#: For how many steps at its pace a matrix is given room.
_REST = 16
#: The least depth of which rounding in float32 leaves something, and the most singular values that are few, as a share of all.
_LEAST_DEPTH, _FEW = 1e-3, 1 / 4
#: So close to the bound, relative to it, there is no room for any move.
_AT_THE_BOUND = 1e-5
#: Bytes of matrices that are looked at together.
_BATCH_BYTES = 1 << 27


class _Look(NamedTuple):
    """Among how many singular values those outside are looked for, 0 for none; and whether it is expected to be outside."""

    number: int
    outside: bool


def kept_matrices(jobs: list[Job], max_norm: float, slack: float) -> list[Job]:
    """`keep_inside` of matrices of any shapes: by few singular values, and those for which that is not enough by all."""
    results = list(jobs)
    looks = {i: _look(job, max_norm, slack) for i, job in enumerate(jobs) if slack >= _LEAST_DEPTH and _is_watched(job)}
    closely = [i for i, look in looks.items() if look.number or not look.outside]
    found = _with_few([jobs[i] for i in closely], [looks[i] for i in closely], max_norm, slack)
    for i, job in zip(closely, found, strict=True):
        results[i] = job
    left = [i for i in range(len(jobs)) if results[i] is jobs[i]]
    for i, job in zip(left, _with_all(_measured([jobs[i] for i in left], max_norm), max_norm, slack), strict=True):
        results[i] = job
    return results


def _is_watched(job: Job) -> bool:
    """Whether something is known of it, and it is finite."""
    return job.known is not None and job.far is not None and job.far < inf


def _look(job: Job, max_norm: float, slack: float) -> _Look:
    """How to look at a matrix of which what was measured does not tell, by what is known of it."""
    last = cast(Known, job.known)
    if last.few is None and last.age == 0 and last.norm >= max_norm * (1 - _AT_THE_BOUND):
        return _Look(0, True)  # after a clip to the bound itself, where half of what was clipped comes out again
    number = block_for(last.few or 0)
    # after a long rest, or before one, a whole clip is worth it
    rests = last.age >= _REST or (last.few is None and _is_slow(job, max_norm, slack))
    is_few = number <= _FEW * min(job.op.weight.shape[:2]) and not rests
    return _Look(number if is_few else 0, bool(last.few) and last.age == 0)


def _is_slow(job: Job, max_norm: float, slack: float) -> bool:
    """Whether it can move for two steps by what is measured before that tells no more that it is inside."""
    return 2 * job.pace(max_norm) <= slack


def _with_few(jobs: list[Job], looks: list[_Look], max_norm: float, slack: float) -> list[Job]:
    """The jobs, those replaced that are proven to be inside as they are, or after a clip of few singular values."""
    groups = _groups(jobs)
    found = clip_few(
        [_batch(jobs, members) for members in groups],
        max_norm,
        depth=slack,
        numbers=[[looks[i].number for i in members] for members in groups],
        outside=[[looks[i].outside for i in members] for members in groups],
    )
    results = list(jobs)
    for members, few in zip(groups, found, strict=True):
        for i, weight, proven, above in zip(members, *few, strict=True):
            job = jobs[i]
            last = cast(Known, job.known)
            if proven and weight is not None:
                # what is known stays that of the last whole clip: a copy of what is not compared with would be for nothing
                results[i] = replace(job, known=last._replace(age=0, few=above), change=_as_stored(job, weight))
            elif proven:
                results[i] = replace(job, known=last.moved()._replace(few=0), is_inside=True)
    return results


def _with_all(jobs: list[Job], max_norm: float, slack: float) -> list[Job]:
    """The jobs, each proven to be inside or clipped at whatever is above the depth."""
    groups = _groups(jobs)
    batches = [_batch(jobs, members) for members in groups]
    depths = [torch.tensor([_depth(jobs[i], max_norm, slack) for i in members], dtype=torch.float64) for members in groups]
    found = clip_matrices(batches, max_norm, depth=depths)
    differ = read([(now.weights != batch).flatten(1).any(1) for now, batch in zip(found, batches, strict=True)])
    results = list(jobs)
    for members, now, changed in zip(groups, found, differ, strict=True):
        outside = cast(Tensor, now.above).int().tolist()
        for i, weight, norm, is_new, above in zip(
            members, now.weights, now.norms.tolist(), changed.tolist(), outside, strict=True
        ):
            job, proven = jobs[i], min(norm, max_norm)  # what is above by half of what counts as equal
            # at once again, if the Frobenius norm of a move does not tell
            few = above if slack >= _LEAST_DEPTH and _is_watched(job) and not _is_slow(job, max_norm, slack) else None
            job = job.changed(_as_stored(job, weight), proven) if is_new else job.proven(proven)
            results[i] = replace(job, known=cast(Known, job.known)._replace(few=few))
    return results


def _depth(job: Job, max_norm: float, slack: float) -> float:
    """How deep to clip, relative to the bound: what it moves in some steps."""
    return min(_REST * job.pace(max_norm), slack) if _is_watched(job) else 0.0


def _measured(jobs: list[Job], max_norm: float) -> list[Job]:
    """The jobs, those that rested long with how far they have moved: it was not measured, as it tells nothing of the norm."""
    results, measure = list(jobs), unit(max_norm)
    rested = [(i, job) for i, job in enumerate(jobs) if _is_watched(job) and cast(Known, job.known).age >= _REST]
    for i, far in moves(rested, measure).items():
        results[i] = replace(jobs[i], far=far)
    return results


def _groups(jobs: Sequence[Job]) -> list[list[int]]:
    """The numbers of matrices of one shape, not many bytes at once."""
    groups: dict[object, list[int]] = {}
    for i, job in enumerate(jobs):
        groups.setdefault((job.op.weight.shape, job.op.weight.dtype, job.device), []).append(i)
    parts = []
    for members in groups.values():
        some = max(_BATCH_BYTES // max(jobs[members[0]].op.weight.nbytes, 1), 1)
        parts += [members[start : start + some] for start in range(0, len(members), some)]
    return parts


def _batch(jobs: Sequence[Job], members: list[int]) -> Tensor:
    """Their matrices."""
    weights = [jobs[i].op.weight for i in members]
    return together([w if w.ndim == 2 else jobs[i].matrix(w) for i, w in zip(members, weights, strict=True)]).detach()


def _as_stored(job: Job, matrix: Tensor) -> Tensor:
    """A matrix in the shape of the weight."""
    return matrix if job.op.weight.ndim == 2 else job.op.from_canonical(matrix.reshape(job.op.canonical_shape))
