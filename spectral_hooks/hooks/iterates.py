"""Have optimizers that evaluate an average of their iterates keep it inside: the average and the fast iterate are projected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .averages import Average, averaged, interpolated


@torch.no_grad()
def project_iterates(
    averages: Iterable[Average],
    parameters: Iterable[Tensor],
    project: Callable[[str], int],
    copies: Callable[[Tensor], Sequence[Tensor]],
) -> int:
    """Project averages and fast iterates, each in the place of the weights; then set these between them.

    Three times the work of other optimizers, and for the while four copies of the weights. Nothing has changed if it fails.

    Args:
        averages: of parameters that stand where they are trained.
        parameters: of what is to be projected; averages of others stay.
        project: projects what stands in the place of the weights, the averages "x" or the iterates "z": how many it changed.
        copies: what the optimizers keep of a parameter besides.

    Returns:
        How many were changed, of that which changed more.
    """
    chosen = {id(p) for p in parameters}
    averages = [each for each in averages if id(each.parameter) in chosen]
    before = [each.parameter.clone() for each in averages]

    def projected(which: str, values: list[Tensor]) -> tuple[list[Tensor], int]:
        for each, value in zip(averages, values, strict=True):
            each.parameter.copy_(value)
        clipped = project(which)
        return ([each.parameter.clone() for each in averages] if clipped else values), clipped

    means, fasts = [averaged(each) for each in averages], [each.fast.to(each.parameter) for each in averages]
    try:
        (new_means, slow_clipped), (new_fasts, fast_clipped) = projected("x", means), projected("z", fasts)
    finally:
        for each, value in zip(averages, before, strict=True):
            each.parameter.copy_(value)
    if slow_clipped or fast_clipped:
        for i, each in enumerate(averages):
            same = (new_means[i] == means[i]) & (new_fasts[i] == fasts[i])
            kept = copies(each.parameter)
            each.parameter.copy_(torch.where(same, before[i], interpolated(each, new_means[i], new_fasts[i])))
            each.fast.copy_(new_fasts[i])
            if each.mean is not None:
                each.mean.copy_(new_means[i])
            for copy in kept:
                copy.copy_(each.parameter)
    return max(slow_clipped, fast_clipped)
