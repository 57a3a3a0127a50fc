"""Bring weights inside that nothing proves to be there: by the engine of the clip what it knows, by the projection all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from math import inf
from typing import NamedTuple

from torch import Tensor

from .. import projections
from ..linalg.scaling import check_finite
from ..operators.base import KernelOperator
from ..projections import Projection
from .keep import keep_inside
from .progress import shown
from .watch import Job


class Way(NamedTuple):
    """How weights are brought inside: what `SpectralClip` was told, and how it names a layer in errors."""

    projection: Projection
    bound: float
    rounds: int
    slack: float | None
    naming: Callable[[str], AbstractContextManager[None]]
    shows_bars: bool

    def project(self, op: KernelOperator, max_norm: float) -> Tensor:
        """The projection of one operator."""
        if self.projection is projections.clip:
            return projections.clip(op, max_norm, rounds=self.rounds)
        return self.projection(op, max_norm)


def brought_inside(jobs: Sequence[Job], way: Way) -> list[Job]:
    """The jobs, those that are in doubt proven to be inside, or with a change that brings them there."""
    results = list(jobs)
    doubtful = [i for i, job in enumerate(jobs) if not job.is_inside]
    single = {i for i in doubtful if way.projection is projections.clip and jobs[i].whole.is_plain}
    together = [i for i in doubtful if i in single and jobs[i].known is not None]
    for i in together:
        far = jobs[i].far
        if far is None or not far < inf:  # else the weight is finite: it is not far from one that is
            with way.naming(jobs[i].whole.target.name):
                check_finite(jobs[i].op.weight)
    kept = keep_inside([jobs[i] for i in together], way.bound, rounds=way.rounds, slack=way.slack)
    for i, job in zip(together, kept, strict=True):
        results[i] = job
    for i in shown([i for i in doubtful if i not in set(together)], "projecting weights", way.shows_bars):
        with way.naming(jobs[i].whole.target.name):
            if i in single:
                (results[i],) = keep_inside([jobs[i]], way.bound, rounds=way.rounds, slack=way.slack)
            else:
                results[i] = _by_itself(jobs[i], way)
    return results


def _by_itself(job: Job, way: Way) -> Job:
    """The job with what its projection makes of it, and with what is then known of it."""
    change = job.whole.inside(way.project, way.bound)
    if way.projection is not projections.soft_cap or not job.whole.is_plain:
        return replace(job, change=change)
    return job.changed(change, way.bound) if isinstance(change, Tensor) else job.proven(way.bound)
