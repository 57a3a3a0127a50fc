"""Whether operations are recorded or transformed rather than done, and what is a constant of them then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_recorded(weight: Tensor) -> bool:
    """Whether operations are recorded for later, on other values: compiled, exported, traced, or on no values at all."""
    return weight.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing()


def unrecorded(make: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """A function of a weight as a constant of what `torch.jit.trace` records."""
    if not torch.jit.is_tracing():
        return make(weight)
    state = torch._C._get_tracing_state()
    set_state: Any = torch._C._set_tracing_state  # type: ignore[attr-defined]
    set_state(None)
    try:
        return make(weight.detach())
    finally:
        set_state(state)


def exported(make: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """A function of a weight; in an ONNX model that is traced, for which decompositions are unknown, the constant that it is."""
    return unrecorded(make, weight) if torch.onnx.is_in_onnx_export() else make(weight)


def held(x: Tensor) -> Tensor:
    """The values alone, that no derivative goes through, neither backward nor forward."""
    # `detach` keeps the tangent of a dual tensor; the compiler knows none
    return x.detach() if torch.compiler.is_compiling() else forward_ad.unpack_dual(x).primal.detach()


def is_transformed(weight: Tensor) -> bool:
    """Whether it may stand for more than its values: within a transform of `torch.func`, or with a tangent.

    Within a transform of the inputs alone too: there autograd functions need more than elsewhere, what is made belongs to the
    transform, and parameters must not be written to.
    """
    # a batched tensor cannot be compared, a dual one would lose its tangent
    return torch._C._are_functorch_transforms_active() or forward_ad.unpack_dual(weight).tangent is not None
