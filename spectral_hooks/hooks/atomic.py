"""Write what a projection has found: all of it or nothing, and so that the weights obey as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor

from ..linalg.precision import widest
from ..norms.bracket import TOLERANCE
from ..norms.spectral_norm import spectral_norm
from ..operators.base import KernelOperator
from ..weights.targets import AnyTarget, Target
from ..weights.writing import remember

#: Up to what rounding of it, relative to the bound, a weight is made smaller by that; beyond, it is measured.
_COARSE = 1e-3
#: How often a weight that comes back rounded is made smaller.
_ATTEMPTS = 4

#: What equals a parameter bit for bit and is to go on doing so.
Copies = Callable[[Tensor], Sequence[Tensor]]


def write_all_(
    changes: Sequence[tuple[AnyTarget, Any]],
    bound: float | None,
    copies: Copies | None,
    naming: Callable[[str], AbstractContextManager[None]],
) -> None:
    """Give each target its change.

    Args:
        changes: targets, and what brings each of them inside.
        bound: what weights must obey that come back from an inverse map with its rounding; None for nothing.
        copies: what optimizers keep of a parameter, to be changed with it; None to leave it.
        naming: errors say within which target.

    Raises:
        ValueError: a layer refuses its weight; then none has changed.
    """
    # only weights that are set through an inverse map can refuse: they go first, and all go back if one does
    jobs = sorted(((target, change, target.may_refuse()) for target, change in changes), key=lambda job: not job[2])
    undo: list[Callable[[], None]] = []
    for target, change, refusing in jobs:
        with naming(target.name):
            try:
                undo += [remember(layer) for layer in refusing]
                with _following(target, copies):
                    target.write_(change)
                    if refusing and bound is not None and isinstance(target, Target):
                        _make_room_for_rounding_(target, change, bound)
            except ValueError:
                for restore_ in reversed(undo):  # parts of one weight share its parametrization
                    restore_()
                raise


@contextmanager
def _following(target: AnyTarget, copies: Copies | None) -> Iterator[None]:
    """What an optimizer keeps that equals a parameter, and will write back, gets what the parameter gets."""
    kept = [] if copies is None else [(p, copy) for p in target.parameters() for copy in copies(p)]
    yield
    for parameter, copy in kept:
        copy.copy_(parameter)


def _make_room_for_rounding_(target: Target, weight: Tensor, bound: float) -> None:
    """Have a weight obey that was inside, and that comes back from an inverse map with its rounding."""
    scale = 1.0
    for _ in range(_ATTEMPTS):
        operators = target.gathered().operators
        given = (scale * weight).to(widest(weight.device))
        off = max(_coarse_norm(op.with_weight(op.weight.to(given) - given)) for op in operators) / bound
        # what was given has at most `scale` times the bound
        if scale + off <= 1 + TOLERANCE:
            return
        norm = max(float(spectral_norm(op)) for op in operators) if off > _COARSE else 0.0
        if off > _COARSE and norm <= bound * (1 + TOLERANCE):
            return
        scale = scale * bound / norm * (1 - TOLERANCE) if off > _COARSE else 1 - 1.5 * off
        target.write_(scale * weight)
    raise ValueError(f"the layer rounds what it is given, so that it exceeds {bound}; exclude it, or keep it in float32.")


def _coarse_norm(op: KernelOperator) -> float:
    """A bound of the operator norm that costs nothing: rank one at every tap, all in phase."""
    kernel = op.canonical()
    return float(torch.linalg.vector_norm(kernel.flatten(1), dim=1).amax()) * sqrt(prod(kernel.shape[3:])) * op.lattice_factor
