"""Weights that are sharded over processes (DTensor)."""

from __future__ import annotations

from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import is_available

if is_available():
    from torch.distributed.tensor import DTensor, distribute_tensor

    #: Every rank holds the whole result, so nothing needs to be sent; torch 2.5 cannot be told so, and sends what is there.
    _UNSENT: dict[str, Any] = {"src_data_rank": None} if "src_data_rank" in signature(distribute_tensor).parameters else {}


def is_sharded(weight: Tensor) -> bool:
    """Whether this process holds but its part."""
    return is_available() and isinstance(weight, DTensor)


def full(weight: Tensor) -> Tensor:
    """The whole weight where it is sharded over processes, else the weight itself; no gradient.

    Collective: all ranks must ask for the same weights in the same order.
    """
    weight = weight.detach()
    return cast(Any, weight).full_tensor() if is_sharded(weight) else weight


@torch.no_grad()
def copy_into_(parameter: Any, weight: Tensor) -> None:
    """Give a parameter these values; a sharded one its own part of them."""
    if is_sharded(parameter):
        weight = distribute_tensor(weight.to(parameter.dtype), parameter.device_mesh, parameter.placements, **_UNSENT)
    parameter.copy_(weight)
