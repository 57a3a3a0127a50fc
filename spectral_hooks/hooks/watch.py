"""What a hook knows of a weight from earlier steps, so that most steps need no certificate of their own.

With `V` a weight whose norm was certified and `D = W - V` how far it has moved since, `‖A(W)‖ ≤ ‖A(V)‖ + ‖A(D)‖`. The second
term is small, so a coarse bound of it will do. Where that is not enough the weight is certified anew. That takes some `π² / 2x`
factorizations for a relative room `x`, a few dozen where there is room, so clips go deeper than the bound: the deeper the faster
the weights move.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache, cached_property
from math import floor, inf, log2, prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from .. import projections
from ..linalg.cholesky import below_
from ..linalg.precision import exact, float32_is_kept, full_precision, widest
from ..linalg.scaling import normalized
from ..norms.proofs import certificates
from ..operators.base import KernelOperator
from ..projections.dual import clip_kernel
from ..projections.settle import settle

#: Entries whose squares are summed in the precision of the kernel; longer sums are in float64.
_BLOCK = 256
#: Bounds and moves beyond these powers of two are not handled in single precision.
_SINGLE_RANGE = 64
#: Up to this ratio of norm to bound what is taken away is small: one proximal step, with half the digits, will do.
_NEAR = 1.2
#: What the unfolding is asked to prove, relative to the cheapest bound: true of most steps of training.
_UNFOLDING_SHARE = 0.65
#: The least depth of a clip, and from how many channels on it grows with them.
_LEAST_DEPTH, _WIDE = 0.005, 64
#: Bytes of kernels certified together.
_BATCH_BYTES = 1 << 26
#: How often a clip that is not proven inside is scaled by a little, before it is measured.
_ATTEMPTS = 2


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


@full_precision
def still_inside(ops: Sequence[KernelOperator], known: Sequence[Known | None], max_norm: float) -> list[Known | None]:
    """For operators that what is known proves to be inside still, what is known of them now, else None.

    By bounds of `‖A(D)‖`, the cheapest first. Layers of equal canonical shape are judged together.
    """
    results: list[Known | None] = [None] * len(ops)
    shares: dict[int, float] = {}
    unit = _unit(max_norm)

    def doubtful() -> Iterator[tuple[int, Tensor]]:
        """The others' `D`, over what is to be proven of its norm."""
        for i, (op, last) in enumerate(zip(ops, known, strict=True)):
            if last is None or not last.norm <= max_norm:
                continue
            kernel, far = _moved(op, last, unit)
            room = (max_norm - last.norm) / unit / op.lattice_factor
            if far <= room:  # also if neither is there; NaN compares as not inside
                results[i] = last._replace(age=last.age + 1)
            elif room > 0 and far < inf:
                shares[i] = min(room, _UNFOLDING_SHARE * far)
                yield i, kernel / shares[i]

    for members, kernels in _alike(doubtful()):
        proven = _unfolding_within_one(kernels).unflatten(0, (len(members), -1)).all(1)
        for i, yes in zip(members, proven.tolist(), strict=True):
            last = known[i]
            if yes and last is not None:
                # from here on, so that the next steps need the cheapest bound only
                moved = shares[i] * unit * ops[i].lattice_factor
                results[i] = know(ops[i], min(last.norm + moved, max_norm))
    return results


def _alike(kernels: Iterable[tuple[int, Tensor]]) -> Iterator[tuple[list[int], Tensor]]:
    """Canonical kernels of equal shape as the groups of one, with their indices; not many bytes at once."""
    waiting: dict[object, tuple[list[int], list[Tensor]]] = {}
    for i, kernel in kernels:
        key = (kernel.shape, kernel.dtype, kernel.device)
        indices, members = waiting.setdefault(key, ([], []))
        indices.append(i)
        members.append(kernel)
        if len(members) * kernel.nbytes >= _BATCH_BYTES:
            del waiting[key]
            yield indices, torch.cat(members)
    for indices, members in waiting.values():
        yield indices, torch.cat(members)


def _unit(max_norm: float) -> float:
    """The power of two just below the bound: moves are measured in it, so that their squares neither vanish nor overflow."""
    return 2.0 ** floor(log2(max_norm))


def _moved(op: KernelOperator, last: Known, unit: float) -> tuple[Tensor, float]:
    """The canonical kernel of `D` and a bound of its lattice norm, both in this unit; infinite if the map is of another kind.

    `‖F(θ)‖ ≤ √taps ‖D‖_F`: rank one at every tap, all in phase.
    """
    same = last.weight.shape == op.weight.shape and last.weight.dtype == op.weight.dtype
    if not same or last.geometry is None or last.geometry != geometry(op):
        return op.weight, inf
    # half precision would round the difference itself
    dtype = torch.promote_types(op.weight.dtype, torch.float32)
    if abs(log2(unit)) > _SINGLE_RANGE and dtype != torch.float64:
        dtype = widest(op.weight.device)
    difference = op.weight.detach().to(dtype) - last.weight.to(op.weight.device, dtype)
    kernel = op.with_weight(difference.div_(unit)).canonical()
    taps = prod(kernel.shape[3:])
    return kernel, sqrt(float(squared_lengths(kernel).amax()) * taps) * (1 + 4 * torch.finfo(dtype).eps)


def squared_lengths(kernels: Tensor) -> Tensor:
    """Bounds from above of the `‖·‖_F²` of the groups, in float64: those of the stored entries, whatever the number of them.

    A sum of `n` squares in any order is off by at most `(n + 1) u`, relative, with `u` half an eps (Higham 2002, §4.2); torch's
    sum of a long axis uses that up, so only blocks are summed like that. Entries smaller than the root of the smallest normal
    number may count for nothing: that is `1e-19` of the unit for each, far below what counts as equal.
    """
    flat = kernels.flatten(1)
    whole = flat.shape[1] // _BLOCK * _BLOCK
    parts = [flat[:, :whole].unflatten(1, (-1, _BLOCK))] if whole else []
    parts += [flat[:, None, whole:]] if whole < flat.shape[1] else []
    lengths = torch.cat([torch.linalg.vector_norm(part, dim=-1) for part in parts], dim=1)
    precise = exact(lengths)
    return precise.square().sum(1) * (1 + (_BLOCK + 8) * torch.finfo(kernels.dtype).eps)


def _unfolding_within_one(kernels: Tensor) -> Tensor:
    """For which groups of a canonical kernel the unfolding proves the norm to be at most one.

    The symbol is the unfolding `rows × (columns · taps)` times a matrix of norm `√taps` (Singla & Feizi 2021). The kernels may
    be off by some roundings of their entries.
    """
    unfolding = (kernels if kernels.shape[1] <= kernels.shape[2] else kernels.transpose(1, 2)).flatten(2)
    unfolding = (unfolding if float32_is_kept() else unfolding.double()) * sqrt(prod(kernels.shape[3:]))
    squares = squared_lengths(unfolding).to(unfolding.device, torch.promote_types(unfolding.dtype, torch.float32))
    # of the products, with `n u` for each sum of `n`, and of the entries that they are made of
    rounding = unfolding.shape[2] * torch.finfo(unfolding.dtype).eps + 8 * torch.finfo(kernels.dtype).eps
    proven = rounding * squares < 0.2
    if proven.any():
        error = rounding * float(squares[proven].amax())
        part = unfolding[proven]
        proven[proven.clone()] = below_(part @ part.mT, 1.0, error=error, slack=0.4).proven
    return proven


class _Moving(NamedTuple):
    """An operator whose weight moves: by how much per projection at most, and how deep to clip it, both relative to the bound.

    A matrix is clipped to the bound itself, at depth 0.
    """

    op: KernelOperator
    pace: float
    depth: float


@full_precision
def keep_inside(
    ops: Sequence[KernelOperator], known: Sequence[Known | None], max_norm: float, *, rounds: int, slack: float
) -> list[tuple[Tensor, Known]]:
    """Of each operator its own weight if it is proven inside, else its clip; and what is known of it now.

    A weight of which nothing is known comes as close to the bound as `projections.clip` takes it. Later clips go deeper, by at
    most `slack`: that leaves room in which to move, and for certificates that cost little; matrices need neither. Layers of equal
    shape are certified together.
    """
    results: dict[int, tuple[Tensor, Known]] = {}
    moving: dict[int, _Moving] = {}
    for i, (op, last) in enumerate(zip(ops, known, strict=True)):
        item = None if last is None or slack < _LEAST_DEPTH else _moving(op, last, max_norm, slack)
        if item is None:
            results[i] = _to_the_bound(op, max_norm, rounds)
        else:
            moving[i] = item
    outside: dict[int, _Moving] = {}
    for i, (estimate, proven) in _certified(moving, max_norm).items():
        op, _, depth = moving[i]
        if proven <= 1:
            results[i] = op.weight, know(op, proven * max_norm)
        elif depth:
            outside[i] = _clip(moving[i], estimate, max_norm, rounds)
        else:
            results[i] = _to_the_bound(op, max_norm, rounds)
    for _ in range(_ATTEMPTS):
        for i, (estimate, proven) in _certified(outside, max_norm).items():
            op, _, depth = outside[i]
            if proven <= 1:
                results[i] = op.weight, know(op, proven * max_norm)
                del outside[i]
            elif estimate * (1 - depth / 4) > 1 - depth:  # not deeper than meant, and cheaper than to find out by how much
                outside[i] = outside[i]._replace(op=op.with_weight(op.weight * (1 - depth / 4)))
    for i, (op, _, depth) in outside.items():
        weight, norm = settle(op, op.weight, max_norm, depth / 4)
        results[i] = weight, know(op, norm, weight)
    return [results[i] for i in range(len(ops))]


def _moving(op: KernelOperator, last: Known, max_norm: float, slack: float) -> _Moving | None:
    """None for what is neither certified on the lattice nor clipped deeper than the bound."""
    unit = _unit(max_norm)
    kernel, far = _moved(op, last, unit)
    is_matrix = prod(kernel.shape[3:]) == 1
    if not far < inf or (op.is_finite and not is_matrix):
        return None
    pace = far * op.lattice_factor * (unit / max_norm) / (last.age + 1)
    # for a room `x` the certificates of a convolution cost some `pace / x²` a step, and more for wide ones; a matrix's little
    wish = sqrt(pace * max(min(kernel.shape[1:3]) / _WIDE, 1))
    return _Moving(op, pace, 0.0 if is_matrix else min(max(wish, _LEAST_DEPTH), slack))


def _to_the_bound(op: KernelOperator, max_norm: float, rounds: int) -> tuple[Tensor, Known]:
    weight = projections.clip(op, max_norm, rounds=rounds)
    return weight, know(op, max_norm, weight)


def _certified(moving: dict[int, _Moving], max_norm: float) -> dict[int, tuple[float, float]]:
    """Relative to the bound, estimates of the norms and what they are proven not to exceed, at most 1, or infinity."""

    def kernels() -> Iterator[tuple[int, Tensor]]:
        for i, item in moving.items():
            kernel = item.op.canonical().detach()
            precise = exact(kernel)
            yield i, precise * (item.op.lattice_factor / max_norm)

    found: dict[int, tuple[float, float]] = {}
    for members, together in _alike(kernels()):
        groups = len(together) // len(members)
        pace = torch.tensor([moving[i].pace for i in members], dtype=torch.float64).repeat_interleave(groups)
        depth = torch.tensor([moving[i].depth for i in members], dtype=torch.float64).repeat_interleave(groups)
        estimates, proven = (x.unflatten(0, (-1, groups)).amax(1).tolist() for x in certificates(together, pace, depth))
        found.update(zip(members, zip(estimates, proven, strict=True), strict=True))
    return found


def _clip(item: _Moving, estimate: float, max_norm: float, rounds: int) -> _Moving:
    """The same with the weight clipped to its depth, nearly: not certified."""
    op, near = item.op, estimate < _NEAR
    kernel, scale = normalized(op.canonical())
    level = max_norm * (1 - item.depth) / scale
    single = near and float32_is_kept()
    clipped, _ = clip_kernel(op, kernel.float() if single else kernel, level, 1 if near else rounds, stretch=not near)
    weight = op.from_canonical(clipped.to(kernel)) * scale
    # an entry can grow beyond the largest number of the stored dtype; what that takes is seen by the proof that follows
    largest = torch.finfo(op.weight.dtype).max
    return item._replace(op=op.with_weight(weight.clamp(-largest, largest).to(op.weight)))
