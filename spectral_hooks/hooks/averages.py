"""Optimizers that evaluate an average of their iterates: what is trained is neither the average nor the iterate.

Schedule-free ones (Defazio et al. 2024) keep a fast iterate `z`, train at `y = β x + (1 - β) z`, and evaluate the average
`x`. With `x` and `z` inside the ball `y` is too, for a ball is convex; of `y` alone nothing follows for `x`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Average(NamedTuple):
    """A parameter that stands at `y`, its `z`, and `β`; and `x` where the optimizer keeps that."""

    parameter: Tensor
    fast: Tensor
    beta: float
    mean: Tensor | None = None


def interpolation(optimizer: Any, group: dict[str, Any]) -> float | None:
    """`β`, if the optimizer says it: as its own attribute where it lies around another, else in the group."""
    betas = group.get("betas") or (None,)
    named = (getattr(optimizer, "momentum", None), group.get("momentum"), group.get("beta"), betas[0])
    return next((float(beta) for beta in named if isinstance(beta, (int, float)) and 0 < beta <= 1), None)


def average_of(parameter: Tensor, optimizer: Any, group: dict[str, Any]) -> Average | None:
    """What an optimizer keeps of a parameter that stands at `y`; None before its first step."""
    state, beta = optimizer.state.get(parameter, {}), interpolation(optimizer, group)
    fast = state.get("z")
    return Average(parameter, fast, beta, state.get("x")) if isinstance(fast, Tensor) and beta is not None else None


@torch.no_grad()
def averaged(average: Average) -> Tensor:
    """`x = z + (y - z) / β`."""
    if average.mean is not None:
        return average.mean.clone()
    return average.parameter.lerp(average.fast.to(average.parameter), 1 - 1 / average.beta)


@torch.no_grad()
def interpolated(average: Average, mean: Tensor, fast: Tensor) -> Tensor:
    """`y = β x + (1 - β) z`."""
    return mean.lerp(fast, 1 - average.beta)
