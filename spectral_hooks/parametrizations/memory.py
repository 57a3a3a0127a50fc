"""What a layer makes of its weight, remembered in evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .recording import is_recorded, is_transformed

Value = TypeVar("Value")

#: Resolutions for which something is remembered.
_MOST_KEPT = 8


class Memory:
    """Functions of a weight, remembered in evaluation while the weight keeps its values; in no state dict, in no copy."""

    def __init__(self) -> None:
        self._seen: tuple[Tensor, dict[Any, Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": None}

    def __call__(self, module: nn.Module, weight: Tensor, make: Callable[[Tensor], Value], key: Any = None) -> Value:
        """`make(weight)`, or what that gave before for this `key`."""
        if module.training or is_recorded(weight) or _is_differentiated(weight):
            return make(weight)
        # By value: neither its address nor its version tells of a tensor changed through `.data`. Read once, for threads.
        seen = self._seen
        if seen is None or seen[0].dtype != weight.dtype or seen[0].device != weight.device or not torch.equal(seen[0], weight):
            seen = (weight.detach().clone(), {})
        if key not in seen[1]:
            # what is made in inference mode could not be used outside
            with torch.inference_mode(False), torch.no_grad():
                value = make(weight.detach())
            kept = list(seen[1].items())[-_MOST_KEPT + 1 :]
            self._seen = seen = (seen[0], {**dict(kept), key: value})
        return seen[1][key]


def _is_differentiated(weight: Tensor) -> bool:
    """Whether a function of this would be more than a value: tracked, or of a transform of `torch.func`."""
    tracked = torch.is_grad_enabled() and weight.requires_grad
    return tracked or is_transformed(weight)
