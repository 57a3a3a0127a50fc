"""Checks of what parametrizations are asked for."""

from __future__ import annotations

import torch


def check_reachable(name: str, value: float, dtype: torch.dtype) -> None:
    """Refuse a singular value that weights of this dtype cannot have: they would be infinite, or rounded to nothing."""
    numbers = torch.finfo(dtype)
    if not numbers.smallest_normal <= value <= numbers.max:
        raise ValueError(
            f"`{name}` must be a number of the weight's dtype, from {numbers.smallest_normal:.3g} to {numbers.max:.3g} for "
            f"{dtype}; got {value!r}. Use a dtype with a wider range: layer.double()."
        )
