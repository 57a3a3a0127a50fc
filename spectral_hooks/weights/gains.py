"""The gains of batch normalizations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linalg.precision import device_with_float64
from ..linalg.scaling import check_finite
from .sharded import copy_into_, full

_EPS = torch.finfo(torch.float64).eps
#: Integers of as many bytes.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def clipped_gain(layer: Any, max_norm: float) -> Tensor | None:
    """The `γ` nearest to a batch normalization's whose gains `|γ| / √(running_var + ε)` are at most `max_norm`; None if it is it.

    The operator in evaluation is diagonal, so clipping each gain is the nearest. The bound holds for the numbers as they are
    stored: in half precision both the limit and what is rounded to it may be off by more than a clip may be.

    Raises:
        ValueError: `γ` is not finite, or the variance no number from 0 on.
    """
    gamma, variance = (full(x).to(device_with_float64(x.device)) for x in (layer.weight, layer.running_var))
    check_finite(gamma)
    # half a unit of rounding in each operation
    limit = max_norm * (1 - 4 * _EPS) * (variance.double() + layer.eps).sqrt()
    if limit.isnan().any():
        raise ValueError("`running_var` has entries that are negative or NaN: look at the batches before.")
    outside = gamma.double().abs() > limit
    if not outside.any():
        return None
    return torch.where(outside, _towards_zero(torch.copysign(limit, gamma.double()), gamma.dtype), gamma).to(layer.weight.device)


@torch.no_grad()
def largest_gain(layer: Any) -> float:
    """The largest `|γ| / √(running_var + ε)` of a batch normalization."""
    gamma, variance = (full(x).to(device_with_float64(x.device)).double() for x in (layer.weight, layer.running_var))
    return float((gamma.abs() / (variance + layer.eps).sqrt()).amax())


def write_gain_(layer: Any, gamma: Tensor) -> None:
    """Give a normalization this `γ`, in place."""
    with torch.no_grad():
        copy_into_(layer.weight, gamma)


def _towards_zero(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, never away from zero."""
    rounded = x.to(dtype)
    bits = rounded.view(_BITS[rounded.element_size()])
    # of all formats: the next number towards zero has the next smaller bits, sign apart
    return torch.where(rounded.double().abs() > x.abs(), (bits - 1).view(dtype), rounded)
