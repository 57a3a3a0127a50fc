"""The work of a hook shared over the processes of torch.distributed, which all hold the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

Item = TypeVar("Item")
Whole = TypeVar("Whole")


def shared(function: Callable[[Whole], Any], items: Sequence[Item], gather: Callable[[Item], Whole]) -> list[Any]:
    """`function(gather(item))` of every item, each computed by one process, its owner, and sent to all.

    All processes take part in every `gather`, in the same order.

    Raises:
        ValueError: on every process, if the function raised on the owner.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)
    mine: dict[int, tuple[Any, str | None]] = {}
    for i, item in enumerate(items):
        gathered = gather(item)
        if i % world != rank:
            continue
        try:
            mine[i] = function(gathered), None
        except ValueError as error:  # the others wait for an answer
            mine[i] = None, str(error)
    everyone: list[Any] = [mine]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, mine)
    results = {i: result for part in everyone for i, result in part.items()} | mine
    ordered = [results[i] for i in range(len(items))]
    failed = [message for _, message in ordered if message is not None]
    if failed:
        raise ValueError(failed[0])
    return [value for value, _ in ordered]
