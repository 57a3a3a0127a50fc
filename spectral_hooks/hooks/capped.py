"""Keep matrices inside by the coupled soft cap: no decomposition in a step, and nothing that waits for a device.

A bound `b` of the norm of a matrix `V` is carried along on the device, from step to step. With `e` a bound of how far the weight
has moved from `V`, `‖W‖ ≤ b + e`, and where that exceeds `c` the cap brings it to `c`, whatever the weight is. So the norm obeys
by induction. What is proven grows by `e` with every step while the norm may not, so in every eighth step it is certified anew by
Cholesky factors: else weights would settle well below the bound.

That a weight is not finite can only be told by waiting. On the host it is told at once. On a device the answer of a step is
copied to the host while work goes on, and is read at the next step, or when the hook projects outside of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .. import projections
from ..linalg.host import is_at_hand
from ..linalg.precision import device_with_float64
from ..linalg.scaling import check_finite
from ..projections.carried import certified_norms, moved_bounds
from ..projections.coupled import TOLERANCE, Capped, cap_matrices
from .watch import Geometry, Job, Known, geometry, together

#: After how many steps a matrix is certified anew; and above which ratio of proven norm to bound at once, where the host knows:
#: a weight that was replaced is not to be taken for one that has grown.
_REST, _FAR = 8, 1.1

Naming = Callable[[str], AbstractContextManager[None]]


class Carried(NamedTuple):
    """A matrix as a weight, a bound of its norm (0-d, float64, on a device that has it), and after which step it was certified.

    The norm is that of the map which the weight made with this geometry.
    """

    weight: Tensor
    norm: Tensor
    certified: int
    geometry: Geometry | None


class Late:
    """Whether weights were finite, on the way to the host."""

    def __init__(self, names: Sequence[str], finite: Tensor) -> None:
        self.names, self._event = list(names), None
        self._finite = finite
        if finite.is_cuda:
            self._finite = torch.empty(finite.shape, dtype=finite.dtype, pin_memory=True)
            self._finite.copy_(finite, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(finite.device))

    def read(self) -> list[str]:
        """The names of those that were not. It waits until the device was done with that, a step ago, and for nothing since."""
        if self._event is not None:
            self._event.synchronize()
        return [name for name, finite in zip(self.names, self._finite.tolist(), strict=True) if not finite]


class Capping:
    """What is carried along of the matrices of a model, and what is still to be read.

    Attributes:
        carried: by what they stand for (the weights "", or what optimizers keep apart from them) and by name.
        uncertain: how many changes of the last call may be none, for only the device knows.
        acted: how many of these are some.
    """

    def __init__(self) -> None:
        self.carried: dict[str, dict[str, Carried]] = {}
        self.uncertain = 0
        self.acted: Tensor | int = 0
        self._late: list[Late] = []

    def check(self, naming: Naming) -> None:
        """Refuse weights that were not finite when they were looked at last.

        Raises:
            ValueError: with the name of the first.
        """
        late, self._late = self._late, []
        for name in (name for each in late for name in each.read()):
            with naming(name):
                raise ValueError(
                    "`weight` contained NaN or infinity, or was beyond all range, when it was looked at last, and was left as it "
                    "was: look at the training step before."
                )

    def saved(self, which: str, step: int) -> dict[str, Known]:
        """What is carried as plain numbers and weights; this waits for the device."""
        return {
            name: Known(now.weight, float(now.norm), step - now.certified, now.geometry)
            for name, now in self.carried.get(which, {}).items()
        }

    def kept(self, jobs: Sequence[Job], max_norm: float, which: str, step: int, naming: Naming, *, waits: bool) -> list[Job]:
        """The jobs, of those that are coupled all `is_inside`, with what their target is to be given.

        Where only the device knows which weights stay, those too are given what they have.

        Args:
            max_norm: the bound.
            which: what they stand for.
            step: how many the optimizer has made.
            naming: errors say which it is.
            waits: whether the host may wait for the device.

        Raises:
            ValueError: a weight is not finite; nothing has changed.
        """
        self.check(naming)
        carried, self.uncertain, self.acted = self.carried.setdefault(which, {}), 0, 0
        results, new = list(jobs), dict(carried)
        groups: dict[object, list[int]] = {}
        for i, job in ((i, job) for i, job in enumerate(jobs) if _is_coupled(job)):
            name, now = job.whole.target.name, _known(job, carried.get(job.whole.target.name), step)
            if now is None:
                with naming(name):
                    results[i], new[name] = _first(job, max_norm, step)
            else:
                new[name] = now
                groups.setdefault((job.matrix(job.op.weight).shape, job.op.weight.dtype, job.device), []).append(i)
        late: list[Late] = []
        for members in groups.values():
            names = [jobs[i].whole.target.name for i in members]
            batch = _Batch([jobs[i] for i in members], [new[name] for name in names], max_norm, step)
            if waits or is_at_hand(batch.bounds):
                with naming(names[batch.not_finite[0]]) if batch.not_finite else nullcontext():
                    after = batch.on_the_host()
            else:
                after, acted = batch.on_the_device()
                self.uncertain, self.acted = self.uncertain + len(members), self.acted + acted.sum()
                late.append(Late(names, batch.bounds.isfinite()))
            for i, name, (change, now) in zip(members, names, after, strict=True):
                results[i], new[name] = replace(jobs[i], known=None, is_inside=True, change=change), now
        self.carried[which], self._late = new, late
        return results


class _Batch:
    """Matrices of one shape in a step."""

    def __init__(self, jobs: Sequence[Job], carried: Sequence[Carried], max_norm: float, step: int) -> None:
        self.jobs, self.carried, self.max_norm, self.step = jobs, carried, max_norm, step
        self.now = together([job.matrix(job.op.weight) for job in jobs])
        self.then = together([job.matrix(last.weight) for job, last in zip(jobs, carried, strict=True)])
        self.norms = torch.stack([last.norm for last in carried])
        self.inside = max_norm * (1 + TOLERANCE)
        self.bounds = self.norms + moved_bounds(self.now, self.then, max_norm, self.inside - self.norms)

    @property
    def not_finite(self) -> list[int]:
        """Which matrices have no bound; the host waits."""
        return (~self.bounds.isfinite()).nonzero().flatten().tolist()

    def _is_due(self, some: Sequence[Carried]) -> bool:
        """Whether one of these is to be certified anew."""
        return self.step - min(last.certified for last in some) >= _REST

    def on_the_device(self) -> tuple[list[tuple[Tensor | None, Carried]], Tensor]:
        """What each weight is to be, itself or capped, with what is carried from here, and which were capped."""
        due = self._is_due(self.carried)
        capped, renewed = _capped(self.now, self.bounds, self.max_norm, due)
        weights = torch.where(renewed.to(self.now.device)[:, None, None], capped.weights, self.then)
        norms = torch.where(renewed, capped.norms, self.norms)
        after: list[tuple[Tensor | None, Carried]] = []
        for job, last, change, weight, norm in zip(self.jobs, self.carried, capped.weights, weights, norms, strict=True):
            last = last._replace(certified=self.step) if due else last
            after.append((_as_weight(job, change), last._replace(weight=_as_weight(job, weight), norm=norm)))
        return after, capped.acted

    def on_the_host(self) -> list[tuple[Tensor | None, Carried]]:
        """The same with None for what stays; nothing is done for those that are proven to be inside.

        Raises:
            ValueError: a weight is not finite.
        """
        after: list[tuple[Tensor | None, Carried]] = [(None, last) for last in self.carried]
        for i in self.not_finite:
            check_finite(self.jobs[i].op.weight)
            self.bounds[i] = torch.finfo(torch.float64).max  # beyond the range of what is measured with
        doubtful = (self.bounds > self.inside).nonzero().flatten()
        chosen = doubtful.tolist()
        if not chosen:
            return after
        some = slice(None) if len(chosen) == len(after) else doubtful
        bounds, now = self.bounds[some], self.now[some if isinstance(some, slice) else some.to(self.now.device)]
        far = bool((bounds > _FAR * self.max_norm).any())
        due = far or self._is_due([self.carried[i] for i in chosen])
        capped, renewed = _capped(now, bounds, self.max_norm, due)
        for i, weight, norm, acted, new in zip(
            chosen, capped.weights, capped.norms, capped.acted.tolist(), renewed.tolist(), strict=True
        ):
            job, last = self.jobs[i], self.carried[i]._replace(certified=self.step) if due else self.carried[i]
            weight = _as_weight(job, weight)
            if new:  # by itself: a view would keep all matrices of this step as long as one of them rests
                last = last._replace(weight=weight.clone(), norm=norm.clone())
            after[i] = (weight if acted else None, last)
        return after


def _capped(now: Tensor, bounds: Tensor, max_norm: float, certifies: bool) -> tuple[Capped, Tensor]:
    """Matrices whose norms are proven not to exceed these bounds, capped, and of which something better is known than before."""
    sharper = torch.zeros_like(bounds, dtype=torch.bool)
    if certifies:
        proven = certified_norms(now, max_norm)
        sharper = proven < bounds
        bounds = torch.minimum(proven, bounds)
    capped = cap_matrices(now, bounds, max_norm)
    if capped.weights is now:  # what is kept must not move with the weight
        capped = capped._replace(weights=now.clone())
    return capped, capped.acted | sharper


def _as_weight(job: Job, matrix: Tensor) -> Tensor:
    """The weight of a job that has this matrix."""
    op = job.op
    return matrix if op.weight.ndim == 2 else op.from_canonical(matrix.reshape(op.canonical_shape))


def _first(job: Job, max_norm: float, step: int) -> tuple[Job, Carried]:
    """A weight of which nothing is known brought inside, certified."""
    op = job.op
    weight = projections.soft_cap(op, max_norm)
    norm = torch.tensor(max_norm, dtype=torch.float64, device=device_with_float64(op.device))
    carried = Carried(weight.detach().clone(), norm, step - _REST, geometry(op))
    return replace(job, known=None, is_inside=True, change=None if weight is op.weight else weight), carried


def _is_coupled(job: Job) -> bool:
    """Whether a weight is a matrix that is used once and written entry by entry: then what is proven can be carried along."""
    return job.whole.is_plain and job.is_matrix and job.op.weight.numel() > 0 and not job.whole.target.may_refuse()


def _known(job: Job, carried: Carried | None, step: int) -> Carried | None:
    """What is known of this map, here or from a run that was saved; None if it is another one."""
    op, last = job.op, job.known
    if carried is None and last is not None:
        carried = Carried(last.weight, torch.tensor(last.norm, dtype=torch.float64), step - last.age, last.geometry)
    if carried is None or carried.geometry is None or carried.geometry != geometry(op):
        return None
    weight = carried.weight
    if weight.shape != op.weight.shape or weight.dtype != op.weight.dtype:
        return None
    return carried._replace(weight=weight.to(op.device), norm=carried.norm.to(device_with_float64(op.device)))
