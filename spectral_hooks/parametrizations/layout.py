"""Weights as torch stores them, and group by group."""

from __future__ import annotations

from torch import Tensor


def by_groups(weight: Tensor, groups: int, transposed: bool) -> Tensor:
    """A stored weight as `(groups, outputs, inputs, *taps)`."""
    kernel = weight.unflatten(0, (groups, -1))
    return kernel.transpose(1, 2) if transposed else kernel


def as_stored(kernel: Tensor, transposed: bool) -> Tensor:
    """The inverse of `by_groups`."""
    return (kernel.transpose(1, 2) if transposed else kernel).flatten(0, 1).contiguous()
