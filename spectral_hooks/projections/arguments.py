"""What projections are, and the checks of their arguments."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

from torch import Tensor

from ..operators.base import KernelOperator, is_number

#: A projection: operator, largest norm → weight.
Projection = Callable[[KernelOperator, float], Tensor]


def check_max_norm(max_norm: float) -> float:
    """Refuse what is no positive, finite number."""
    if not is_number(max_norm) or not (isfinite(max_norm) and max_norm > 0):
        raise ValueError(f"`max_norm` must be a positive, finite number; got {max_norm!r}.")
    return float(max_norm)


def check_share(name: str, value: float) -> None:
    """Refuse what is no number from 0 to 1."""
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"`{name}` must lie in [0, 1]; got {value!r}.")
