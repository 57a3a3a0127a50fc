"""Set the largest singular value to a bound."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.arguments import on_kernel
from ..operators.base import KernelOperator
from .arguments import check_max_norm
from .spectral_map import changed


@on_kernel
@torch.no_grad()
def hammer(op: KernelOperator, max_norm: float = 1.0) -> Tensor:
    """Set the largest singular value to `max_norm` if it is larger: `W + (c - σ₁) u₁ v₁ᵀ`.

    **Does not guarantee the bound**: the second largest is left as it is. Convolutions act on the clip's grid and crop.

    Args:
        op: any operator.
        max_norm: `c > 0`.

    Raises:
        ValueError: `max_norm` out of range, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.hammer(sh.DenseOperator(torch.diag(torch.tensor([3.0, 2.0]))))
        tensor([[1., 0.],
                [0., 2.]])

    Source: Newhouse et al. (2025).
    """
    max_norm = check_max_norm(max_norm)

    def struck(s: Tensor, c: float) -> Tensor:
        return torch.cat([s[..., :1].clamp(max=c), s[..., 1:]], dim=-1)

    return changed(op, max_norm, struck)
