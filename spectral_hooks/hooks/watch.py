"""What a hook knows of a weight from earlier steps, so that most steps need no certificate of their own.

With `V` a weight whose norm was certified and `D = W - V` how far it has moved since, `‖A(W)‖ ≤ ‖A(V)‖ + ‖A(D)‖`. The second
term is small, so a coarse bound of it will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from .. import projections
from ..hermitian import below_
from ..intersection import clip_kernel
from ..lattice import lattice_norm, normalized, surely_below
from ..operators.base import LinearOperator, full_precision

#: Wider matrices are not tested at several frequencies: a certificate of the weight itself costs little more.
_WIDE = 256
#: What the rounding of a difference and of its norm in single precision leaves of the room.
_ROUNDING = 1 - 1e-5
#: Up to this ratio of norm to bound what is taken away is small: one proximal step, with half the digits, will do.
_NEAR = 1.2
#: How deep the first clip after a certificate goes, and the least.
_FIRST_SLACK, _LEAST_SLACK = 0.02, 0.005
#: Steps that a clip should last.
_LIFE = 8


class Known(NamedTuple):
    """A weight, a number that its operator's norm was proven not to exceed, and how the last clip has lasted."""

    weight: Tensor
    norm: float
    slack: float = _FIRST_SLACK
    age: int = 0


def still_inside(ops: Sequence[LinearOperator], known: Sequence[Known | None], max_norm: float) -> list[bool]:
    """For which operators what is known proves the norm to be at most `max_norm`: by bounds of `‖A(D)‖`, the cheapest first.

    Layers of equal canonical shape are judged together.
    """
    inside = [False] * len(ops)
    alike: dict[tuple[object, ...], list[tuple[int, Tensor]]] = {}
    for i, (op, last) in enumerate(zip(ops, known, strict=True)):
        if (
            last is None
            or not last.norm <= max_norm
            or last.weight.shape != op.weight.shape
            or last.weight.dtype != op.weight.dtype
        ):
            continue
        # half precision would round the difference itself
        dtype = torch.promote_types(op.weight.dtype, torch.float32)
        moved = op.weight.detach().to(dtype) - last.weight.to(op.weight.device, dtype)
        kernel = op.with_weight(moved).canonical()
        room = (max_norm - last.norm) / op.lattice_factor * _ROUNDING
        # rank one at every tap, all in phase: also for a weight that has not moved at all; NaN compares as not inside
        far = float(torch.linalg.vector_norm(kernel.flatten(1), dim=1).amax()) * sqrt(prod(kernel.shape[3:]))
        inside[i] = far <= room
        if not inside[i] and 0 < room < inf and far < inf:
            alike.setdefault((kernel.shape, kernel.dtype, kernel.device), []).append((i, kernel / room))
    for members in alike.values():
        kernels = torch.cat([kernel for _, kernel in members])
        proven = _within_one(kernels).unflatten(0, (len(members), -1)).all(1)
        for (i, _), yes in zip(members, proven.tolist(), strict=True):
            inside[i] = yes
    return inside


def _within_one(kernels: Tensor) -> Tensor:
    """Which groups of a canonical kernel are proven to have norm at most one."""
    taps = prod(kernels.shape[3:])
    # the symbol is the unfolding `rows × (columns · taps)` times a matrix of norm `√taps` (Singla & Feizi 2021)
    unfolding = (kernels if kernels.shape[1] <= kernels.shape[2] else kernels.transpose(1, 2)).flatten(2) * sqrt(taps)
    squares = unfolding.square().sum((1, 2))
    rounding = (unfolding.shape[2] + 8) * torch.finfo(kernels.dtype).eps
    proven = rounding * squares < 0.2
    if proven.any():
        error = rounding * float(squares[proven].amax())
        part = unfolding[proven]
        proven[proven.clone()] = below_(part @ part.mT, 1.0, error=error, slack=0.4).proven
    if taps > 1 and min(kernels.shape[1:3]) <= _WIDE and not proven.all():
        rest = ~proven
        proven[rest] = surely_below(kernels[rest], 1.0)
    return proven


@full_precision
def keep_inside(op: LinearOperator, known: Known | None, max_norm: float, *, rounds: int, slack: float) -> tuple[Tensor, Known]:
    """The operator's own weight if it is inside, else its clip; and what is known of it now.

    The first clip of a convolution comes as close to the bound as `projections.clip`. Later ones go deeper, by at most `slack`:
    the weight can then move for some steps before it must be looked at again, and what is not close to the bound is certified at
    a fraction of the cost.
    """
    weight, kernel = op.weight.detach(), op.canonical()
    if known is None or slack < _LEAST_SLACK or op.is_finite or prod(kernel.shape[3:]) == 1:
        weight = projections.clip(op, max_norm, rounds=rounds)
        return weight, Known(weight.clone(), max_norm)
    factor = op.lattice_factor
    kernel, scale = normalized(kernel)
    deeper = min(slack, max(_LEAST_SLACK, known.slack * min(2.0, sqrt(_LIFE / (known.age + 1)))))
    goal = max_norm * (1 - deeper / 4)
    found = lattice_norm(kernel, deeper / 4, limit=goal / scale / factor)
    if found.upper < inf:
        return op.weight, Known(weight.clone(), found.upper * scale * factor, deeper)
    near = found.value * scale * factor < _NEAR * max_norm
    level = max_norm * (1 - deeper) / scale
    clipped, _ = clip_kernel(op, kernel.float() if near else kernel, level, 1 if near else rounds, stretch=not near)
    weight, norm = projections.settle(op, op.from_canonical(clipped.to(kernel)) * scale, goal, deeper / 2)
    return weight, Known(weight, norm, deeper)
