"""Part of the way to the clip."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.arguments import on_kernel
from ..operators.base import KernelOperator
from .arguments import check_share
from .clip import clip


@on_kernel
@torch.no_grad()
def clipped_decay(op: KernelOperator, max_norm: float = 1.0, *, decay: float = 0.1, rounds: int = 3) -> Tensor:
    """Part of the way to the clip: `(1 - λ) W + λ clip(W)`.

    **Does not guarantee the bound**, but comes nearer by the factor `1 - λ` at every call.

    Args:
        op: any operator.
        max_norm: the bound `c > 0`.
        decay: `λ` in [0, 1].
        rounds: as for `clip`.

    Raises:
        ValueError: an argument out of range, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.clipped_decay(sh.DenseOperator(torch.tensor([[3.0]])), decay=0.5)
        tensor([[2.]])

    Source: Newhouse et al. (2025).
    """
    check_share("decay", decay)
    clipped = clip(op, max_norm, rounds=rounds)
    # neither term overflows, as the difference may
    if clipped is op.weight:
        return clipped
    precise, limit = torch.promote_types(op.weight.dtype, torch.float32), torch.finfo(op.weight.dtype).max
    part = (1 - decay) * op.weight.detach().to(precise) + decay * clipped.to(precise)
    return part.clamp(-limit, limit).to(op.weight)
