"""In which precision things are computed: what autocast, TF32 and devices without float64 would take away."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
Result = TypeVar("Result")


def exact(x: Tensor) -> Tensor:
    """In float64; on the host where the device has none, as Apple's GPUs."""
    return x.to(device_with_float64(x.device), torch.float64)


def widest(device: torch.device) -> torch.dtype:
    """The most precise dtype that a device has: float64, but for Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def device_with_float64(device: torch.device) -> torch.device:
    """The device, or the host where it has no float64."""
    return device if widest(device) == torch.float64 else torch.device("cpu")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a weight of this one is computed with."""
    return torch.promote_types(dtype, torch.float32)


def rounded_down(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in another dtype, none of them larger; infinite where they are beyond its range."""
    near = values.to(dtype)
    larger = (near.to(values.dtype) > values) & near.isfinite()
    return torch.where(larger, torch.nextafter(near, torch.full_like(near, -inf)), near)


def full_precision(function: F) -> F:
    """Run a function of something on a device, or of several, without autocast, which would take products in half precision."""

    @functools.wraps(function)
    def wrapped(first: Any, *others: Any, **settings: Any) -> Any:
        return without_autocast(function, first, *others, **settings)

    return cast(F, wrapped)


def in_full_precision(function: F) -> F:
    """Run a function of tensors in float32 or better, without autocast, and cast its result back to the first one's dtype.

    Arguments that are no tensors are handed on.
    """

    @functools.wraps(function)
    def wrapped(x: Tensor, *others: Any) -> Tensor:
        wide = at_least_float32(x.dtype)
        inputs = [t.to(wide) if isinstance(t, Tensor) else t for t in (x, *others)]
        return without_autocast(function, *inputs).to(x.dtype)

    return cast(F, wrapped)


def without_autocast(function: Callable[..., Result], first: Any, *others: Any, **settings: Any) -> Result:
    """`function(first, *others)`, undisturbed by autocast on the device of the first, or on those of a sequence."""
    devices = {each.device.type for each in (first if isinstance(first, Sequence) else (first,))}
    # nested calls and no stack of contexts, which compilers do not trace
    return _without([device for device in devices if is_autocast(device)], function, first, *others, **settings)


def _without(devices: list[str], function: Callable[..., Result], *inputs: Any, **settings: Any) -> Result:
    if not devices:
        return function(*inputs, **settings)
    with torch.autocast(devices[0], enabled=False):
        return _without(devices[1:], function, *inputs, **settings)


def is_autocast(device: str) -> bool:
    """Whether autocast is on for a type of device."""
    # older compilers cannot trace the question whether a type of device has autocast
    available = device != "meta" if torch.compiler.is_compiling() else torch.amp.autocast_mode.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def float32_is_kept() -> bool:
    """Whether float32 products are that, and not made of TF32 or bfloat16: bounds of rounding hold for nothing less."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by the newer interface, for single backends
        return False
