"""Scale a weight into the ball."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.arguments import on_kernel
from ..operators.base import KernelOperator
from .arguments import check_max_norm
from .outside import project_outside
from .settle import settle


@on_kernel
@torch.no_grad()
def rescale(op: KernelOperator, max_norm: float = 1.0) -> Tensor:
    """Scale the weight into the ball: `W / max(1, ‖A‖₂ / c)` (Gouk et al. 2018), with the certified norm; every group by its own.

    Args:
        op: any operator.
        max_norm: the bound `c > 0`.

    Returns:
        A weight of the same shape, dtype and device; the bound is guaranteed, and what is inside stays bit for bit, as by `clip`.

    Raises:
        ValueError: `max_norm` out of range, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.rescale(sh.DenseOperator(torch.diag(torch.tensor([2.0, 0.5]))), max_norm=1.0)
        tensor([[1.0000, 0.0000],
                [0.0000, 0.2500]])
    """
    max_norm = check_max_norm(max_norm)
    return project_outside(op, max_norm, lambda part: settle(part, part.weight.detach(), max_norm)[0])
