"""One step towards orthogonality."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.arguments import on_kernel
from ..operators.base import KernelOperator
from .arguments import check_max_norm, check_share
from .spectral_map import changed


@on_kernel
@torch.no_grad()
def parseval(op: KernelOperator, max_norm: float = 1.0, *, strength: float = 0.01) -> Tensor:
    """One step towards orthogonality: `W ← (1 + β) W - β W Wᵀ W / c²`, so `σ ← σ + β σ (1 - σ² / c²)`.

    Draws all singular values below `c √(1 + 2 / β)` towards `c`. **Does not guarantee the bound.** Convolutions act on the clip's
    grid and crop.

    Args:
        op: any operator.
        max_norm: `c > 0`.
        strength: `β` in [0, 1].

    Raises:
        ValueError: an argument out of range, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.parseval(sh.DenseOperator(torch.tensor([[0.5]])), strength=0.5)
        tensor([[0.6875]])

    Source: Cissé et al. (2017).
    """
    max_norm = check_max_norm(max_norm)
    check_share("strength", strength)
    return changed(op, max_norm, lambda s, c: s + strength * s * (1 - (s / c) ** 2))
