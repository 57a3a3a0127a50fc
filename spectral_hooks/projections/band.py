"""Keep the singular values in a band, or at one value."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.arguments import on_kernel
from ..operators.base import KernelOperator, is_number
from .arguments import check_max_norm
from .outside import unchanged
from .settle import settled
from .spectral_map import map_singular_values


@on_kernel
@torch.no_grad()
def band(op: KernelOperator, max_norm: float = 1.0, *, min_norm: float = 0.0) -> Tensor:
    """Keep the singular values in a band: `U clamp(Σ, low, high) Vᵀ`, the nearest such matrix (Frobenius).

    For convolutions of several taps at each frequency of the clip's grid, cropped to the taps, and scaled by the certified norm:
    the upper end is guaranteed as by `clip`, the lower end is approached and not guaranteed: no kernel of few taps may have it.

    Args:
        op: any operator.
        max_norm: the upper end `high > 0`.
        min_norm: the lower end `0 ≤ low ≤ high`. Zero singular values have directions that are no better than others: of those
            one set is taken.

    Raises:
        ValueError: an end out of range, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.band(sh.DenseOperator(torch.diag(torch.tensor([3.0, 0.8, 0.1]))), 1.0, min_norm=0.5)
        tensor([[1.0000, 0.0000, 0.0000],
                [0.0000, 0.8000, 0.0000],
                [0.0000, 0.0000, 0.5000]])
    """
    max_norm = check_max_norm(max_norm)
    if not is_number(min_norm) or not 0 <= min_norm <= max_norm:
        raise ValueError(f"`min_norm` must lie in [0, {max_norm}], the upper end; got {min_norm!r}.")
    if op.weight.numel() == 0:
        return unchanged(op)
    return settled(op, *map_singular_values(op, max_norm, lambda s, c: s.clamp(min_norm / max_norm * c, c)), max_norm)[0]


@on_kernel
@torch.no_grad()
def polar(op: KernelOperator, max_norm: float = 1.0) -> Tensor:
    """The nearest weight all of whose singular values are `max_norm`: `c U Vᵀ`, the polar factor.

    Exact for matrices. Convolutions as by `band`: the bound holds, the singular values are `max_norm` only approximately (a
    kernel of few taps is orthogonal only in special cases: see `parametrizations.orthogonal`).

    Args:
        op: any operator.
        max_norm: the bound `c > 0`.

    Raises:
        ValueError: `max_norm` out of range, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.polar(sh.DenseOperator(torch.tensor([[3.0, 4.0]])))
        tensor([[0.6000, 0.8000]])

    Source: Fan and Hoffman (1955); Higham (1986).
    """
    return band(op, max_norm, min_norm=max_norm)
