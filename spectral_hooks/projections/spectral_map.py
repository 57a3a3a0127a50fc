"""A function of the singular values."""

from __future__ import annotations

from collections.abc import Callable
from math import frexp

import torch
from torch import Tensor

from ..linalg.scaling import check_finite, normalized
from ..operators.base import KernelOperator
from .dual import crop_kernel, grid_symbols
from .outside import unchanged
from .settle import fitting, in_dtype

#: How far from one the bound that a function sees may be, in powers of two: sums of matrices of such a norm do not overflow.
_RANGE = 1000


def map_singular_values(op: KernelOperator, max_norm: float, function: Callable[[Tensor, float], Tensor]) -> tuple[Tensor, float]:
    """A function of the singular values and the bound, of a matrix exactly, of a convolution on the clip's grid, cropped.

    Returns a float64 weight and what to multiply it with: the function is homogeneous, and sees values of order one, or, where
    the bound would then be out of range, a power of two between.
    """
    check_finite(op.weight)
    kernel, scale = normalized(op.canonical())
    blocks = grid_symbols(op, kernel)
    u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
    power = frexp(max_norm)[1]
    unit = max(min(scale, 2.0 ** min(power + _RANGE, 1023)), 2.0 ** (power - _RANGE), scale * 2.0**-_RANGE)
    # not the kernel and a change, which would cancel where the bound is far below the norm
    mapped = (u * function(s * (scale / unit), max_norm / unit).unsqueeze(-2)) @ vh
    return op.from_canonical(crop_kernel(op, kernel, mapped)), unit


def changed(op: KernelOperator, max_norm: float, function: Callable[[Tensor, float], Tensor]) -> Tensor:
    """`mapped` in the dtype of the operator's weight, without a guarantee of its norm."""
    if op.weight.numel() == 0:
        return unchanged(op)
    unit, scale = map_singular_values(op, max_norm, function)
    if not bool(torch.isfinite(unit).all()):
        raise ValueError(f"the norm is so far above `max_norm` {max_norm} that the result is not finite: use `clip` first.")
    scales = torch.full((op.canonical_shape[0],), scale, dtype=torch.float64, device=unit.device)
    return in_dtype(unit, fitting(unit, scales, op.weight), op.weight)
