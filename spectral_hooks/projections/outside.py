"""Only what is outside of the ball is projected."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..norms.bracket import at_most
from ..operators.base import KernelOperator


def unchanged(op: KernelOperator) -> Tensor:
    """The operator's own tensor, so that a caller can tell by identity that nothing was done."""
    return op.weight.detach() if op.weight.requires_grad else op.weight


def project_outside(op: KernelOperator, max_norm: float, projection: Callable[[KernelOperator], Tensor]) -> Tensor:
    """The weight with the projection of the groups that are outside of the ball; the others stay as they are."""
    if op.weight.numel() == 0:
        return unchanged(op)
    outside = ~at_most(op, max_norm)
    if not outside.any():
        return unchanged(op)
    if outside.all():
        return projection(op)
    weight, index = op.weight.detach().clone(), outside.nonzero().flatten().to(op.device)
    weight.unflatten(0, (len(outside), -1))[index] = projection(op.part(index)).unflatten(0, (len(index), -1))
    return weight
