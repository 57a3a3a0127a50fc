"""The padding map of a convolution and its adjoint, one spatial axis at a time.

Every mode but zeros is a gather: padded position `j` reads input position `source[j]`. The adjoint adds back. Both are
exact, differentiable, and hold for any amount on either side (negative amounts crop).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = ("zeros", "circular", "reflect", "replicate")

#: Amounts before and after, one pair per spatial axis.
Pairs = tuple[tuple[int, int], ...]


def source(mode: str, size: int, before: int, after: int, device: torch.device | None = None) -> Tensor:
    """Input position that each padded position reads, for the modes that copy."""
    position = torch.arange(-before, size + after, device=device)
    if mode == "circular":
        return position % size
    if mode == "replicate":
        return position.clamp(0, size - 1)
    period = max(2 * size - 2, 1)
    position = position % period
    return torch.where(position < size, position, period - position)


def pad(x: Tensor, mode: str, pairs: Pairs) -> Tensor:
    """Pad the last `len(pairs)` axes of `x`."""
    if mode == "zeros":
        return F.pad(x, [amount for pair in reversed(pairs) for amount in pair])
    for axis, (before, after) in enumerate(pairs, start=x.ndim - len(pairs)):
        if before or after:
            x = x.index_select(axis, source(mode, x.shape[axis], before, after, x.device))
    return x


def unpad(y: Tensor, mode: str, pairs: Pairs, sizes: tuple[int, ...]) -> Tensor:
    """The adjoint of `pad` from inputs of `sizes`."""
    if mode == "zeros":
        return F.pad(y, [-amount for pair in reversed(pairs) for amount in pair])
    for axis, (size, (before, after)) in enumerate(zip(sizes, pairs, strict=True), start=y.ndim - len(pairs)):
        if before or after:
            total = y.new_zeros(*y.shape[:axis], size, *y.shape[axis + 1 :])
            y = total.index_add(axis, source(mode, size, before, after, y.device), y)
    return y


def largest_multiplicity(mode: str, size: int, before: int, after: int) -> int:
    """How often the most-read input position is read: the squared norm of the padding map along one axis."""
    if mode == "zeros":
        return 1
    return int(torch.bincount(source(mode, size, before, after)).max())


def worst_multiplicity(mode: str, least: int, before: int, after: int) -> int:
    """The largest of `largest_multiplicity` over every input size from `least` on.

    Reflect: 3 where a position is met from both sides, at sizes up to `before + after + 1`, and 2 beyond. Replicate: the
    border is read `1 + before` or `1 + after` times, `1 + before + after` times where it is the only position.
    """
    # from `before + after + 2` on the two sides do not meet, and the size makes no difference
    return max(largest_multiplicity(mode, n, before, after) for n in range(least, max(least, before + after + 2) + 1))
