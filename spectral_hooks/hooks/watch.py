"""What a hook knows of a weight from earlier steps, so that most steps need no certificate of their own.

With `V` a weight whose norm was certified and `D = W - V` how far it has moved since, `‖A(W)‖ ≤ ‖A(V)‖ + ‖A(D)‖`. The second
term is small, so a coarse bound of it will do. Where that is not enough the weight is certified anew. That takes some `π² / 2x`
factorizations for a relative room `x`, a few dozen where there is room, so clips go deeper than the bound: the deeper the faster
the weights move. Matrices are looked at all at once, whatever their shapes. Where `‖D‖_F`, the coarsest bound, does not suffice,
a sharper one of `D` costs as much as to look at `W` itself, which tells all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from math import floor, inf, log2, prod, sqrt
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..linalg.cholesky import below_
from ..linalg.precision import float32_is_kept, full_precision, widest
from ..operators.base import KernelOperator
from ..operators.dense import DenseOperator
from ..weights.targets import Whole, WholeSum

#: Entries whose squares are summed at once: longer sums are sums of such sums.
_BLOCK = 256
#: Bounds and moves beyond these powers of two are not handled in single precision.
_SINGLE_RANGE = 64
#: What the unfolding is asked to prove, relative to the cheapest bound: true of most steps of training.
_UNFOLDING_SHARE = 0.65
#: Bytes of kernels that travel together.
_BATCH_BYTES = 1 << 26

#: What makes a map of a weight, by name: stride, padding, groups and the like.
Geometry = tuple[tuple[str, object], ...]


class Known(NamedTuple):
    """A weight, a number that its operator's norm was proven not to exceed, and for how many projections that has sufficed.

    The norm is that of the map which the weight made with this geometry; without one it is of no use.
    """

    weight: Tensor
    norm: float
    age: int = 0
    geometry: Geometry | None = None
    #: Of a matrix that moves too fast for `‖D‖_F`: how many of its singular values were above the bound the last time.
    few: int | None = None
    #: Of a wide kernel that was clipped, where its large singular values were: the next clip costs little with it, and is as good
    #: without.
    leading: Tensor | None = None

    def moved(self) -> Known:
        """The same after a step that has not led outside; to look again at what has not moved is no step."""
        return self._replace(age=self.age + 1)


@dataclass(frozen=True)
class Job:
    """A weight on its way through a step: gathered once, with all that was found of it so far."""

    whole: Whole | WholeSum
    #: From an earlier step; once `is_inside`, or changed, of the weight as it is then.
    known: Known | None = None
    #: A bound of how far the lattice operator has moved from what is known, in `unit`s of the bound; None if not looked at.
    far: float | None = None
    #: Whether it is proven to be inside.
    is_inside: bool = False
    #: What its target is to be given; None if it stays as it is.
    change: Any = None

    @property
    def op(self) -> KernelOperator:
        """The operator of its only, or first, use."""
        return self.whole.operators[0]

    @property
    def is_matrix(self) -> bool:
        """Whether its norm is that of one matrix with the entries of the weight."""
        op = self.op
        if isinstance(op, DenseOperator):
            return True
        if prod(op.weight.shape[2:]) > 1 or op.kind not in ("lattice", "matrix"):
            return False
        shape = op.canonical_shape
        return shape[0] == 1 == prod(shape[3:]) and prod(shape) == op.weight.numel() and op.lattice_factor == 1

    def matrix(self, weight: Tensor) -> Tensor:
        """That matrix, of this weight in the place of the operator's."""
        return weight.detach() if weight.ndim == 2 else self.op.with_weight(weight.detach()).canonical().flatten(0, 1).flatten(1)

    @property
    def device(self) -> torch.device:
        """Where it is worked on."""
        return self.op.device

    def pace(self, max_norm: float) -> float:
        """How far the lattice operator has moved per projection at most, relative to the bound; 0 if that was not looked at."""
        age = 0 if self.known is None else self.known.age
        return (self.far or 0.0) * (unit(max_norm) / max_norm) / (age + 1)

    def proven(self, norm: float) -> Job:
        """The same once its norm was proven not to exceed a number."""
        return replace(self, known=self._know(norm), is_inside=True)

    def changed(self, weight: Tensor, norm: float) -> Job:
        """The same with a weight that is to be written, whose norm was proven not to exceed a number; the same one stays."""
        return replace(self, known=self._know(norm, weight), change=None if weight is self.op.weight else weight)

    def _know(self, norm: float, weight: Tensor | None = None) -> Known:
        # a run may be resumed with another layer of this name
        leading = self.known.leading if self.known is not None and _is_known(self) else None
        return know(self.op, norm, weight)._replace(leading=leading)


def know(op: KernelOperator, norm: float, weight: Tensor | None = None) -> Known:
    """That the norm of this operator, or of this weight in its place, was proven not to exceed a number."""
    weight = op.weight if weight is None else weight
    return Known(weight.detach().clone(), norm, geometry=geometry(op))


def geometry(op: KernelOperator) -> Geometry | None:
    """All that an operator is besides its weight; None if that is more than plain values, which are compared at once."""
    derived = _derived(type(op))
    settings = [(name, value) for name, value in vars(op).items() if name != "weight" and name not in derived]
    return (("kind", type(op).__name__), *settings) if all(_is_plain(value) for _, value in settings) else None


@cache
def _derived(kind: type) -> frozenset[str]:
    """What operators of a class keep once it was computed."""
    return frozenset(name for cls in kind.__mro__ for name, value in vars(cls).items() if isinstance(value, cached_property))


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def still_inside(jobs: Sequence[Job], max_norm: float) -> list[Job]:
    """The jobs, those `is_inside` that what is known proves to be; of the others how far they have moved.

    By bounds of `‖A(D)‖`, the cheapest first; layers of equal canonical shape are judged together, and all matrices.
    """
    results, measure = list(jobs), unit(max_norm)
    known = [i for i, job in enumerate(jobs) if _is_known(job)]
    matrices = [i for i in known if jobs[i].is_matrix]
    for i, job in zip(matrices, _judged_matrices([jobs[i] for i in matrices], max_norm), strict=True):
        results[i] = job
    differences = ((i, _difference(jobs[i], measure)) for i in known if not jobs[i].is_matrix)
    for members, kernels in alike(differences):
        judged = _judged([jobs[i] for i in members], kernels, max_norm)
        for i, job in zip(members, judged, strict=True):
            results[i] = job
    return results


def _judged_matrices(jobs: list[Job], max_norm: float) -> list[Job]:
    """`still_inside` of matrices of any shapes, by `‖D‖_F`; those that move too fast for that are left to be looked at."""
    results, measure = list(jobs), unit(max_norm)
    slow = [(i, job) for i, job in enumerate(jobs) if cast(Known, job.known).few is None]
    for i, far in moves(slow, measure).items():
        last = cast(Known, jobs[i].known)
        room = (max_norm - last.norm) / measure
        is_inside = far <= room and room >= 0
        results[i] = replace(jobs[i], known=last.moved() if is_inside and far else last, far=far, is_inside=is_inside)
    fast = [(i, job) for i, job in enumerate(jobs) if cast(Known, job.known).few is not None]
    for (i, job), length in zip(fast, _sizes([job for _, job in fast], measure), strict=True):
        results[i] = replace(job, far=length + cast(Known, job.known).norm / measure)
    return results


def _sizes(jobs: list[Job], measure: float) -> list[float]:
    """The `‖W‖_F` in this unit, about: finite if the weights are; the host waits once for each kind."""
    sizes = [0.0] * len(jobs)
    kinds: dict[object, list[int]] = {}
    for i, job in enumerate(jobs):
        kinds.setdefault((job.device, _dtype(job.op.weight, measure)), []).append(i)
    with torch.no_grad():
        for members in kinds.values():
            dtype = _dtype(jobs[members[0]].op.weight, measure)
            weights = [w if w.dtype == dtype else w.to(dtype) for w in (jobs[i].op.weight for i in members)]
            lengths = torch.stack(list(torch._foreach_norm(weights))).to(widest(jobs[members[0]].device)) / measure
            for i, length in zip(members, lengths.tolist(), strict=True):
                sizes[i] = length
    return sizes


def _key(job: Job) -> tuple[object, ...]:
    """What matrices of one batch have in common."""
    return job.op.weight.shape, job.op.weight.dtype, job.op.weight.device


def moves(jobs: list[tuple[int, Job]], measure: float) -> dict[int, float]:
    """Bounds of the `‖D‖_F` of known matrices in this unit, by their numbers; the host waits once for each device."""
    kinds: dict[object, list[tuple[int, Job]]] = {}
    for i, job in jobs:
        kinds.setdefault(_key(job)[1:], []).append((i, job))
    bounds: list[tuple[list[int], Tensor]] = []
    for members in kinds.values():
        some = max(_BATCH_BYTES // max(job.op.weight.nbytes for _, job in members), 1)
        for part in (members[start : start + some] for start in range(0, len(members), some)):
            dtype = _dtype(part[0][1].op.weight, measure)
            now = [job.op.weight.detach().to(dtype) for _, job in part]
            then = [cast(Known, job.known).weight.to(x.device, dtype) for (_, job), x in zip(part, now, strict=True)]
            differences = list(torch._foreach_sub(now, then))
            if measure != 1:
                torch._foreach_div_(differences, measure)
            shapes: dict[object, list[int]] = {}
            for j, difference in enumerate(differences):
                shapes.setdefault(difference.shape, []).append(j)
            for same in shapes.values():
                bounds.append(([part[j][0] for j in same], lengths(together([differences[j] for j in same]))))
    found: dict[int, float] = {}
    for device in {bound.device for _, bound in bounds}:
        here = [(numbers, bound) for numbers, bound in bounds if bound.device == device]
        found.update(zip((i for numbers, _ in here for i in numbers), torch.cat([x for _, x in here]).tolist(), strict=True))
    return found


def together(matrices: list[Tensor]) -> Tensor:
    """Matrices of one shape as a batch; one alone is not copied."""
    return matrices[0][None] if len(matrices) == 1 else torch.stack(matrices)


def _judged(jobs: list[Job], kernels: Tensor, max_norm: float) -> list[Job]:
    """`still_inside` of a batch of one canonical shape, by the kernels of their `D`, which have been divided by the `unit`."""
    measure, groups = unit(max_norm), len(kernels) // len(jobs)
    # `‖F(θ)‖ ≤ √taps ‖D‖_F`: rank one at every tap, all in phase
    phase = sqrt(prod(kernels.shape[3:])) * (1 + 4 * torch.finfo(kernels.dtype).eps)
    results: list[Job] = []
    shares: dict[int, float] = {}
    for job, length in zip(jobs, lengths(kernels).unflatten(0, (-1, groups)).amax(1).tolist(), strict=True):
        last, far = cast(Known, job.known), phase * length
        room = (max_norm - last.norm) / measure / job.op.lattice_factor
        if room >= 0 and far <= room:  # also if neither is there; NaN compares as not inside
            results.append(replace(job, known=last.moved() if length else last, is_inside=True))
            continue
        if room > 0 and far < inf:
            shares[len(results)] = min(room, _UNFOLDING_SHARE * far)
        results.append(replace(job, far=far))
    if shares:
        scales = kernels.new_tensor(list(shares.values()))
        asked = kernels.unflatten(0, (len(jobs), groups))[list(shares)] / scales.reshape(-1, *(1,) * kernels.ndim)
        proven = _unfolding_within_one(asked.flatten(0, 1)).unflatten(0, (-1, groups)).all(1).tolist()
        for i, share in (pair for pair, yes in zip(shares.items(), proven, strict=True) if yes):
            job = results[i]
            # from here on, so that the next steps need the cheapest bound only
            moved = share * measure * job.op.lattice_factor
            results[i] = job.proven(min(cast(Known, job.known).norm + moved, max_norm))
    return results


def alike(kernels: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[list[int], Tensor]]:
    """Canonical kernels of equal shape as the groups of one, with their indices; not many bytes at once."""
    waiting: dict[object, tuple[list[int], list[Tensor]]] = {}
    for i, kernel in kernels:
        key = (kernel.shape, kernel.dtype, kernel.device)
        indices, members = waiting.setdefault(key, ([], []))
        indices.append(i)
        members.append(kernel)
        if len(members) * kernel.nbytes >= _BATCH_BYTES:
            del waiting[key]
            yield indices, _together(members)
    for indices, members in waiting.values():
        yield indices, _together(members)


def _together(kernels: list[Tensor]) -> Tensor:
    return kernels[0] if len(kernels) == 1 else torch.cat(kernels)


def unit(max_norm: float) -> float:
    """The power of two just below the bound: moves are measured in it, so that their squares neither vanish nor overflow."""
    return 2.0 ** floor(log2(max_norm))


def _is_known(job: Job) -> bool:
    """Whether something is known of this map."""
    last, op = job.known, job.op
    if last is None or last.geometry is None:
        return False
    return last.weight.shape == op.weight.shape and last.weight.dtype == op.weight.dtype and last.geometry == geometry(op)


def _dtype(weight: Tensor, measure: float) -> torch.dtype:
    """In which differences of a weight are taken: half precision would round the difference itself."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return widest(weight.device) if abs(log2(measure)) > _SINGLE_RANGE and dtype != torch.float64 else dtype


def _difference(job: Job, measure: float) -> Tensor:
    """The canonical kernel of `D` in this unit."""
    op, old = job.op, cast(Known, job.known).weight
    dtype = _dtype(op.weight, measure)
    difference = op.weight.detach().to(dtype) - old.to(op.weight.device, dtype)
    return op.with_weight(difference.div_(measure)).canonical()


def lengths(kernels: Tensor) -> Tensor:
    """Bounds from above of the `‖·‖_F` of the groups: those of the stored entries, whatever the number of them.

    A sum of `n` squares in any order is off by at most `(n + 1) u`, relative, with `u` half an eps (Higham 2002, §4.2), and its
    root by half of that; torch's sum of a long axis uses that up, so only blocks are summed like that, then the blocks alike.
    Entries smaller than the root of the smallest normal number may count for nothing: that is `1e-19` of the unit for each, far
    below what counts as equal.
    """
    flat, rounding = kernels.flatten(1), 1.0
    while rounding == 1.0 or flat.shape[1] > 1:
        whole = flat.shape[1] // _BLOCK * _BLOCK
        parts = [flat[:, :whole].unflatten(1, (-1, _BLOCK))] if whole else []
        parts += [flat[:, None, whole:]] if whole < flat.shape[1] else []
        flat = torch.cat([torch.linalg.vector_norm(part, dim=-1) for part in parts], dim=1)
        rounding *= 1 + (_BLOCK / 4 + 8) * torch.finfo(kernels.dtype).eps
    return flat[:, 0] * rounding


@full_precision
def _unfolding_within_one(kernels: Tensor) -> Tensor:
    """For which groups of a canonical kernel the unfolding proves the norm to be at most one.

    The symbol is the unfolding `rows × (columns · taps)` times a matrix of norm `√taps` (Singla & Feizi 2021). The kernels may
    be off by some roundings of their entries.
    """
    unfolding = (kernels if kernels.shape[1] <= kernels.shape[2] else kernels.transpose(1, 2)).flatten(2)
    unfolding = (unfolding if float32_is_kept() else unfolding.double()) * sqrt(prod(kernels.shape[3:]))
    squares = lengths(unfolding).square()
    # of the products, with `n u` for each sum of `n`, and of the entries that they are made of
    rounding = unfolding.shape[2] * torch.finfo(unfolding.dtype).eps + 8 * torch.finfo(kernels.dtype).eps
    proven = rounding * squares < 0.2
    if proven.any():
        error = rounding * float(squares[proven].amax())
        part = unfolding[proven]
        proven[proven.clone()] = below_(part @ part.mT, 1.0, error=error, slack=0.4).proven
    return proven
