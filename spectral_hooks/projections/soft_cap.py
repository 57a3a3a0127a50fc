"""Press large singular values down by polynomials."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.arguments import on_kernel
from ..operators.base import KernelOperator
from .arguments import check_max_norm, check_share
from .spectral_map import changed


@on_kernel
@torch.no_grad()
def soft_cap(op: KernelOperator, max_norm: float = 1.0, *, strength: float = 0.1) -> Tensor:
    """Press large singular values down by odd polynomials, `p₂ ∘ p₁`, with `p₁(x) = x - αx³`, `p₂(x) = x + αx³` in units of `c`.

    Small values stay as they are up to `3 α² x⁵`; those near and above the bound shrink. **Does not guarantee the bound**: called
    at every step it balances growth, as a weight decay for large singular values only. Values above `1 / √(3α)` bounds, where
    `p₁` turns, are out of its reach: use `clip` first.

    Args:
        op: any operator; convolutions act on the clip's grid and crop.
        max_norm: the unit `c > 0`.
        strength: `α ≥ 0`.

    Raises:
        ValueError: an argument out of range, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.soft_cap(sh.DenseOperator(torch.diag(torch.tensor([1.0, 0.1]))))
        tensor([[0.9729, 0.0000],
                [0.0000, 0.1000]])

    Source: Newhouse et al. (2025).
    """
    max_norm = check_max_norm(max_norm)
    check_share("strength", strength)

    def capped(s: Tensor, c: float) -> Tensor:
        # not in units of a bound so far above that nothing would be left
        s = s - strength * s * (s / c) ** 2
        return s + strength * s * (s / c) ** 2

    return changed(op, max_norm, capped)
