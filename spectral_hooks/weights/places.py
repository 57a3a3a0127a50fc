"""Where in memory a weight lies."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def parameters_in(weight: Tensor) -> tuple[Tensor, ...]:
    """The parameters in the graph of a computed weight, in the order in which they are met."""
    found: dict[int, Tensor] = {}
    waiting, seen = [weight.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        waiting += [before for before, _ in node.next_functions]
    return tuple(found.values())


def ids(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Which objects these are."""
    return tuple(map(id, tensors))


def _memory(tensor: Tensor) -> int | None:
    """Which memory a tensor lies in; None for what is no plain stretch of it (sharded, sparse)."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return tensor.untyped_storage()._cdata if plain else None


def layout(tensor: Tensor) -> tuple[Any, ...]:
    """Where in its memory a tensor lies; a matrix and its transpose are at one place."""
    axes = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    return (tensor.storage_offset(), *(axis for axis in axes if axis[1] != 1))


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies: equal places hold the same entries."""
    memory = _memory(tensor)
    return (id(tensor),) if memory is None else (memory, *layout(tensor))


def is_view(weight: Tensor, whole: Tensor) -> bool:
    """Whether writing into `weight` writes into `whole`: same memory, and every entry apart from the others."""
    memory = _memory(weight)
    apart = all(stride > 0 or size <= 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)) if memory else False
    return memory is not None and apart and memory == _memory(whole) and weight.dtype == whole.dtype


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have entries at the same place of the same memory."""
    if memory_of(a) != memory_of(b):
        return False
    if _memory(a) is None:
        return True
    (start, end), (other_start, other_end) = _bytes(a), _bytes(b)
    if end <= other_start or other_end <= start:
        return False
    if a.dtype != b.dtype:
        return True
    marks = torch.zeros(a.untyped_storage().nbytes() // a.element_size(), dtype=torch.bool)
    marks.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(marks.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def memory_of(tensor: Tensor) -> tuple[str, int]:
    """Which memory a tensor lies in: what does not lie in the same does not overlap."""
    memory = _memory(tensor)
    return ("tensor", id(tensor)) if memory is None else ("memory", memory)


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """From where to where a tensor reaches in its memory."""
    start, size = int(tensor.storage_offset()), tensor.element_size()
    reach = sum(int(stride) * (int(n) - 1) for stride, n in zip(tensor.stride(), tensor.shape, strict=True))
    return int(start * size), int((start + reach + 1) * size if tensor.numel() else start * size)
