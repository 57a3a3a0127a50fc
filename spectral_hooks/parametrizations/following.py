"""A parameter that follows what is made of it: brought inside on its way into the forward, with the gradient there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .recording import is_recorded, is_transformed


class At(torch.autograd.Function):
    """A value in the place of a parameter, whose gradient is the parameter's."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.to(ctx.dtype), None


def may_follow(module: nn.Module, weight: Tensor) -> bool:
    """Whether a parameter may be brought inside on its way into the forward: in training, and where it is itself what trains.

    Not where a function of it is recorded or transformed, which is to stay one; nor under FSDP, where a forward sees a copy.
    """
    if getattr(module, "_is_fsdp_managed_module", False):
        return False
    trained = module.training and torch.is_grad_enabled() and weight.requires_grad and weight.is_leaf
    return trained and isinstance(weight, nn.Parameter) and not (is_recorded(weight) or is_transformed(weight) or is_part(weight))


def start_inside(layer: Any) -> None:
    """Give a layer's parameter the value that its parametrization makes of it: outside it would have nowhere to go."""
    original = layer.parametrizations.weight.original
    if original.requires_grad and not (original.is_meta or is_part(original)) and bool(original.isfinite().all()):
        with torch.no_grad():
            original.copy_(layer.weight)


def is_part(weight: Tensor) -> bool:
    """Whether it is sharded over processes (DTensor)."""
    return hasattr(weight, "full_tensor")
