"""The work of a hook shared over the processes of torch.distributed, which all hold the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from ..weights.targets import AnyTarget, Whole, WholeSum


def is_first() -> bool:
    """Whether this is the first process of torch.distributed, or the only one."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def from_first(value: int) -> int:
    """What the first process gives, on all of them; every process must call it."""
    values = [value]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def shared(function: Callable[[Whole | WholeSum], Any], targets: Sequence[AnyTarget]) -> list[Any]:
    """`function` of every target's whole weight, each computed by one process, its owner, and sent to all.

    All processes take part in gathering every weight, in the same order.

    Raises:
        ValueError: on every process, if the function raised on the owner.
    """
    rank, world = _place()
    mine: dict[int, tuple[Any, str | None]] = {}
    for i, target in enumerate(targets):
        whole = target.gathered()
        if i % world != rank:
            continue
        try:
            mine[i] = function(whole), None
        except ValueError as error:  # the others wait for an answer
            mine[i] = None, str(error)
    results = {i: result for part in of_all_processes(mine) for i, result in part.items()} | mine
    ordered = [results[i] for i in range(len(targets))]
    failed = [message for _, message in ordered if message is not None]
    if failed:
        raise ValueError(failed[0])
    return [value for value, _ in ordered]


def of_all_processes(value: Any) -> list[Any]:
    """The values that all processes call this with, in the order of their ranks; a process alone has its own."""
    _, world = _place()
    if world == 1:
        return [value]
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, value)
    return everyone


def _place() -> tuple[int, int]:
    """The rank of this process, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
