"""A convolution at the input sizes that it meets: one circular operator whose norm bounds that of the finite ones."""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, gcd, lcm, pi, prod

from torch import nn

from .base import KernelOperator
from .conv import ConvOperator
from .layers import as_operator

#: Where the supremum over all frequencies is at most so much larger than the largest norm on the grid, the bound of every input
#: size is hardly tighter, and proofs of it need fewer frequencies.
_FINE = 1.04

#: Spatial input sizes, one entry per axis.
Sizes = Sequence[tuple[int, ...]]


def at_sizes(layer: nn.Module, sizes: Sizes) -> KernelOperator:
    """An operator whose norm bounds that of a layer at these input sizes: no larger than that of the lattice operator.

    The `covering` one, or the lattice operator, which holds at every size, where there is none or it is hardly tighter: for
    matrices, for large inputs, for circular padding whose rows do not close around the seam.

    Args:
        layer: any layer that `as_operator` knows.
        sizes: spatial input sizes, at least one. With zero padding the bound holds for all that are no larger along any axis of
            one of them too; with circular padding for these alone.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> from spectral_hooks.operators.covering import at_sizes
        >>> conv = torch.nn.Conv2d(4, 4, 3, padding=1)
        >>> op = at_sizes(conv, [(2, 2)])
        >>> op.frequency_grid
        ((3, 1), (3, 1))
        >>> bool(sh.spectral_norm(sh.as_operator(conv, input_size=2)) <= sh.spectral_norm(op) * (1 + 1e-5))
        True
    """
    ops = [as_operator(layer, input_size=size) for size in sizes]
    convolutions = [op for op in ops if isinstance(op, ConvOperator) and op.is_finite and not op.is_pointwise]
    cover = covering(convolutions) if len(convolutions) == len(ops) else None
    return as_operator(layer) if cover is None or _is_fine(cover) else cover


def covering(ops: Sequence[ConvOperator]) -> ConvOperator | None:
    """A circular operator of which each of these is a compression, so that its norm bounds theirs; None where there is none.

    With stride `s`, dilation `d`, taps `0 … k-1` and `b` samples of padding before, row `i` of a zero-padded convolution reads
    the positions `s i - b + d t`. Of the circular operator with `N` rows and the period `N s` it consists of the first rows and
    columns if none of these positions meets a column around the seam. A smaller input, its padding being the same, gives first
    rows and columns of those. Transposed convolutions are the adjoints. With circular padding the rows are those of the operator
    whose period is the input size, where the stride divides that; its frequencies are among those of every multiple.

    Args:
        ops: finite operators of one convolution at different input sizes.
    """
    first = ops[0]
    if first.padding_mode not in ("zeros", "circular"):
        return None
    rows = []
    for axis in range(first.weight.ndim - 2):
        find = _rows_of_zeros if first.padding_mode == "zeros" else _rows_of_circular
        if (number := find(ops, axis)) is None:
            return None
        rows.append(number)
    return first.circular(rows if first.transposed else [n * s for n, s in zip(rows, first.stride, strict=True)])


def _plain_sizes(op: ConvOperator, axis: int) -> tuple[int, int]:
    """Inputs and outputs along an axis, of a transposed convolution those of its adjoint."""
    sizes = op.in_shape[1 + axis], op.out_shape[1 + axis]
    return (sizes[1], sizes[0]) if op.transposed else sizes


def _rows_of_zeros(ops: Sequence[ConvOperator], axis: int) -> int:
    """The least number of rows of a circular operator without meetings around the seam; no fewer frequencies than taps."""
    # a dilated kernel meets itself: multiples of this have the fewest frequencies
    repeats = ops[0].dilation[axis] // gcd(ops[0].stride[axis], ops[0].dilation[axis])
    least = repeats * ops[0].canonical_shape[3 + axis]  # else a projection on the grid could not tell the taps apart
    for op in ops:
        n, m = _plain_sizes(op, axis)
        s, d, (before, _) = op.stride[axis], op.dilation[axis], op.padding[axis]
        start, end = -before, s * (m - 1) - before + d * (op.weight.shape[2 + axis] - 1)
        left, right = max(start, 0), min(end, n - 1)  # the columns that are read
        period = max(end - left, right - start) + 1
        least = max(least, m, -(-period // s))
    return -(-least // repeats) * repeats


def _rows_of_circular(ops: Sequence[ConvOperator], axis: int) -> int | None:
    """The rows of the least common multiple of the input sizes, if the rows of each close around the seam."""
    rows = []
    for op in ops:
        n, m = _plain_sizes(op, axis)
        if n % op.stride[axis] or m > n // op.stride[axis]:
            return None
        rows.append(n // op.stride[axis])
    return lcm(*rows)


def _is_fine(op: ConvOperator) -> bool:
    """Whether the supremum over all frequencies is hardly above the largest norm on the grid (the bound of `cosine_grid`)."""
    taps = op.canonical_shape[3:]
    steps = [pi * (k - 1) / (2 * n) for k, (n, _) in zip(taps, op.frequency_grid or (), strict=True)]
    return max(steps) < pi / 2 and 1 / prod(map(cos, steps)) <= _FINE
