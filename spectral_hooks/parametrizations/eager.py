"""The scaling of `rescaled` as one node of the graph, for weights on the host: what is decided by values is decided at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..linalg.precision import at_least_float32
from .recording import is_recorded, is_transformed


class Scale(NamedTuple):
    """A weight is multiplied by `unit`, a power of two, and `gain`: `a` and `b` of a scaling whose derivative is that of
    `share / ‖·‖` along `direction`, a multiple of the norm's gradient; of one that is constant there is none."""

    unit: float
    gain: float
    share: float
    direction: Callable[[], Tensor] | None


def is_plain(weight: Tensor) -> bool:
    """Whether its values can be looked at: on the host, and nothing records or transforms what is done."""
    if weight.device.type != "cpu" or type(weight) not in (Tensor, torch.nn.Parameter):
        return False
    return not (is_recorded(weight) or is_transformed(weight) or _get_current_dispatch_mode() is not None)


def scaled(weight: Tensor, scale: Scale, slowly: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight times a scale that is a function of it.

    Args:
        slowly: the same in tensor operations, for derivatives of the derivative.
    """
    return _Scaled.apply(weight, scale, slowly)


class _Scaled(torch.autograd.Function):
    """`V = s W` with `s = room / ‖W‖`. With `G` the loss's gradient in `V` and `N` along that of the norm the gradient in `W` is

        s (G - share · min(⟨G, V⟩, 0) N / ⟨N, V⟩),

    where `⟨N, V⟩` is `N`'s length times the norm of `V`; the derivative of the scale is left out where it would shorten `W`.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Scale, slowly: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.scale, ctx.slowly = scale, slowly
        return times(weight, scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            (result,) = torch.autograd.grad(ctx.slowly(weight), weight, gradient, create_graph=True)
            return result, None, None
        scale: Scale = ctx.scale
        gradient = gradient.to(at_least_float32(gradient.dtype))
        if scale.direction is not None:
            value = times(weight, scale)
            descent = float((gradient * value).sum())
            if not descent >= 0:
                normal = scale.direction()
                length = float((normal * value).sum())
                if length:
                    gradient = gradient - normal * (scale.share * descent / length)
        result = gradient if scale.unit * scale.gain == 1 else gradient * scale.unit * scale.gain
        return result.to(weight.dtype), None, None


def times(weight: Tensor, scale: Scale) -> Tensor:
    """The weight times a scale, in float32 at least."""
    wide = weight.detach().to(at_least_float32(weight.dtype))
    return wide.clone() if scale.unit == scale.gain == 1 else wide * scale.unit * scale.gain
