"""The padding map of a convolution and its adjoint, one spatial axis at a time.

Every mode but zeros is a gather: padded position `j` reads input position `source[j]`. The adjoint adds back. Both are
exact, differentiable, and hold for any amount on either side (negative amounts crop).
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, gcd

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


@lru_cache(maxsize=1024)
def crosses_seam(size: int | None, stride: int, dilation: int, taps: int, before: int, after: int) -> bool:
    """Whether circular padding makes rows meet that never meet on the strided lattice; of any size that torch admits if None.

    With the period `n`, stride `s`, dilation `d` and `k` taps, row `i` reads the positions `s i - before + d t` modulo `n`. Rows
    `i` and `j` share some where `x = s (i - j) - m n` is a multiple of `d`, at most `d (k - 1)` in size, for some `m`: with the
    autocorrelation `R` of the kernel, `(A Aᵀ)_ij = Σ_m R(s (i - j) - m n)`. On the lattice `m = 0`, and `x` is a multiple of `s`.

    If it is one for every `m`, then only those `m` count for which `m n` is a multiple of `lcm(s, n)`. So `A` consists of rows of
    the strided circular operator with the period `lcm(s, n)`, which `s` divides: its norm is at most the strided lattice's, times
    the root of how often a row repeats. If it is not, `A` consists of rows of the circular operator of stride 1.
    """
    reach = dilation * (taps - 1)
    if size is None:
        least = least_circular_size(dilation, taps, before, after)
        # from here on `m = 1` and `i > j`, and what happens depends on the size modulo the stride
        regular = max(least, reach + 1, before + after)
        return any(crosses_seam(n, stride, dilation, taps, before, after) for n in range(least, regular + stride))
    farthest = size + before + after - reach - 1
    farthest -= farthest % stride  # between the first row and the last
    return any(
        (m * size + x) % stride == 0 and abs(m * size + x) <= farthest and x % stride
        for m in range(1, (farthest + reach) // size + 1)
        for x in range(-reach, reach + 1, dilation)
    )


@lru_cache(maxsize=1024)
def row_repeats(size: int | None, stride: int, dilation: int, taps: int, before: int, after: int) -> int:
    """How often, at most, circular padding makes the same row; of any size that torch admits if None."""
    extra = before + after - dilation * (taps - 1)
    if size is not None:
        return ceil(((size + extra - 1) // stride + 1) * gcd(stride, size) / size)
    if extra <= 0:
        return 1
    # torch pads at most once around; beyond `extra + stride` positions two rows can be the same, as every stride-th size has it
    # and never three
    least = least_circular_size(dilation, taps, before, after)
    return max(2, *(row_repeats(n, stride, dilation, taps, before, after) for n in range(least, max(least, extra + stride) + 1)))


def least_circular_size(dilation: int, taps: int, before: int, after: int) -> int:
    """The smallest period that torch admits: it pads at most once around, and the padded input holds the kernel."""
    return max(before, after, 1, dilation * (taps - 1) + 1 - before - after)
