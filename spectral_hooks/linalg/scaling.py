"""Numbers of order one: powers of two are divided out before anything is squared, and what is no number is refused."""

from __future__ import annotations

from math import floor, log2

import torch
from torch import Tensor

from .precision import at_least_float32, exact, widest

_NOT_FINITE = "`weight` contains NaN or infinity: look at the training step before; the weight is left as it is."


def normalized(kernel: Tensor) -> tuple[Tensor, float]:
    """The kernel in float64 with its largest entry in [1, 2), and the power of two that was divided out.

    Raises:
        ValueError: it holds NaN or infinity, or has no values.
    """
    check_has_values(kernel)
    kernel = exact(kernel)
    largest = float(kernel.abs().amax()) if kernel.numel() else 0.0
    if not largest < float("inf"):
        raise ValueError(_NOT_FINITE)
    scale = 2.0 ** floor(log2(largest)) if largest else 1.0
    return kernel / scale, scale


def unit_scale(weight: Tensor) -> Tensor:
    """The power of two that takes the largest entry to [1, 2), or as near as it can itself be a number of the dtype.

    0-d and on the device, for what nothing is to wait for.
    """
    # the maximum norm of `vector_norm` takes ten times as long
    largest = weight.detach().abs().amax().to(widest(weight.device))
    most = -log2(torch.finfo(at_least_float32(weight.dtype)).smallest_normal)
    return largest.log2().floor().clamp(-most, most).neg().exp2()


def normalized_each(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel in float64 with the largest entry of every group in [1, 2), and the powers of two divided out; 0 for a zero."""
    kernel, scale = normalized(kernel.detach())
    largest = kernel.abs().flatten(1).amax(1)
    own = torch.where(largest > 0, largest.log2().floor().exp2(), 0.0)
    return kernel / each(own.where(own > 0, torch.ones_like(own)), kernel.ndim - 1), own * scale


def each(factors: Tensor, dims: int = 2) -> Tensor:
    """Factors of the groups, to multiply what has so many dimensions after that of the groups."""
    return factors.reshape(-1, *(1,) * dims)


def check_finite(weight: Tensor) -> None:
    """Refuse NaN and infinity, and weights without values."""
    check_has_values(weight)
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(_NOT_FINITE)


def check_has_values(weight: Tensor) -> None:
    """Refuse what lies on the meta device."""
    if weight.is_meta:
        raise ValueError("`weight` is on the meta device and has no values: materialize the model first.")
