"""What the host must know of devices, read at once: every reading waits until the device has done all its work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import exact


def read(tensors: Sequence[Tensor]) -> list[Tensor]:
    """These tensors on the host in float64; it waits once for all that are on one device."""
    if not tensors:
        return []
    place = exact(tensors[0]).device
    flat = torch.cat([exact(x).to(place).flatten() for x in tensors]).to("cpu")
    parts = flat.split([x.numel() for x in tensors])
    return [part.reshape(x.shape) for part, x in zip(parts, tensors, strict=True)]


def is_at_hand(x: Tensor) -> bool:
    """Whether the host knows the values without waiting for a device."""
    return x.device.type == "cpu"
