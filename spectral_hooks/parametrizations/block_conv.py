"""Explicit orthogonal kernels: a convolution that is orthogonal at every frequency, as a product of projector pairs.

With an orthogonal projector `P`, the two taps `[P, I - P]` have the symbol `P + (I - P) exp(-iθ)`, which is unitary. So is a
product of such pairs along the axes, and a matrix with orthonormal rows or columns on either side keeps them orthonormal. In the
canonical form of a kernel with `k` taps and stride `s` per axis (dilation only changes which stride counts) each group is

    K = E ⊛ F₁ ⊛ … ⊛ F_L ⊛ N,     F_i = [P_i, I - P_i] along one axis,  k - s of them for each axis,

- `E`, the exit: `s` taps, orthonormal as a matrix `rows × (middle · Πs)`;
- the pairs: projectors of `middle` channels, of rank `⌊c/2⌋` and `⌈c/2⌉` in turn, so that a single tap in the middle is possible;
- `N`, the entry: `middle × columns` with orthonormal columns, where there are more rows than `columns · Πs`, so that `middle` is
  more than `columns`. Without a stride the exit then falls away.

Square orthogonal kernels of one size fall into components, which no path connects: along each axis one has a mean delay, which
counts in steps, and that of these products is the middle one. So a single tap is among them in the middle of an odd kernel, and
nowhere in an even one.

Source: Li, Haque, Anil, Lucas, Grosse and Jacobsen (2019); strides, dilations and groups: Boissin et al. (2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

#: The factors of a kernel by name, those that it has: `exit`, `frames` of the projectors, `entry`.
Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Blocks:
    """The sizes of one kernel's factors; no stride exceeds its axis' taps."""

    groups: int
    rows: int
    columns: int
    taps: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], groups: int, stride: Sequence[int], dilation: Sequence[int]) -> Blocks:
        """For a convolution with a weight of this shape, `(out, in / groups, *taps)`."""
        taps = tuple(shape[2:])
        # dilated taps t and t + s / gcd(s, δ) meet the same samples
        strides = tuple(min(s // gcd(s, d), k) for s, d, k in zip(stride, dilation, taps, strict=True))
        return cls(groups, shape[0] // groups, shape[1], taps, strides)

    @property
    def axes(self) -> list[tuple[int, bool]]:
        """For each pair its axis, and whether it is `[I - P, P]`: every other one, for ranks in turn."""
        return [(axis, i % 2 == 1) for axis, (k, s) in enumerate(zip(self.taps, self.strides, strict=True)) for i in range(k - s)]

    @property
    def middle(self) -> int:
        """Channels of the projectors: as many as leave the exit orthonormal."""
        return max(self.columns, self.rows // prod(self.strides)) if self.axes else self.columns

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each factor; `frames` span the projectors' ranges."""
        phases, middle = prod(self.strides), self.middle
        shapes: dict[str, tuple[int, ...]] = {}
        if phases > 1 or middle == self.columns:
            shapes["exit"] = (self.groups, self.rows, middle * phases)
        if self.axes and middle > 1:
            shapes["frames"] = (self.groups, len(self.axes), middle, middle // 2)
        if middle > self.columns:
            shapes["entry"] = (self.groups, middle, self.columns)
        return shapes


def compose(blocks: Blocks, parts: Parts) -> Tensor:
    """The weight `(groups · rows, columns, *taps)` of these factors. Multi-affine in exit, projectors and entry."""
    frames = parts.get("frames")
    projectors = parts["exit"].new_zeros(()) if frames is None else frames @ frames.mT
    exit, entry = parts.get("exit"), parts.get("entry")
    factors = list(
        zip(blocks.axes, projectors.expand(blocks.groups, len(blocks.axes), *[blocks.middle] * 2).unbind(1), strict=True)
    )
    if exit is not None:
        exit = lay_out(exit.unflatten(2, (blocks.middle, *blocks.strides)))
    if entry is None:
        kernel = cast(Tensor, exit)
        for (axis, flipped), projector in factors:
            kernel = times_pair(kernel, projector, 1 + axis, flipped)
    else:
        # from the side with fewer channels; projectors are symmetric
        kernel = entry.mT.reshape(blocks.groups, *[1] * len(blocks.taps), blocks.columns, blocks.middle)
        for (axis, flipped), projector in reversed(factors):
            kernel = times_pair(kernel, projector, 1 + axis, flipped)
        kernel = kernel.mT
        kernel = kernel if exit is None else block_convolution(exit, kernel)
    return kernel.movedim((-2, -1), (1, 2)).flatten(0, 1)


def lay_out(kernel: Tensor) -> Tensor:
    """`(groups, rows, columns, *taps)` as `(groups, *taps, rows, columns)`, as the functions below take it."""
    return kernel.movedim((1, 2), (-2, -1))


def times_pair(kernel: Tensor, projector: Tensor, axis: int, flipped: bool) -> Tensor:
    """`kernel ⊛ [P, I - P]` along an axis, or `kernel ⊛ [I - P, P]`."""
    inside = (kernel.flatten(1, -2) @ projector).view(kernel.shape)
    outside = kernel - inside
    first, second = (outside, inside) if flipped else (inside, outside)
    edge = torch.zeros_like(kernel.narrow(axis, 0, 1))
    return torch.cat([first, edge], axis) + torch.cat([edge, second], axis)


def divided_by_pair(kernel: Tensor, projector: Tensor, axis: int, flipped: bool) -> Tensor:
    """The inverse of `times_pair`, which is its adjoint: of a kernel that is no such product, the nearest factor."""
    size = kernel.shape[axis] - 1
    now, after = (kernel.narrow(axis, int(flipped) ^ at, size) for at in (0, 1))
    return after + ((now - after).flatten(1, -2) @ projector).view(after.shape)


def block_convolution(left: Tensor, right: Tensor) -> Tensor:
    """The kernel of two convolutions in turn."""
    places = torch.cartesian_prod(*[torch.arange(n) for n in left.shape[1:-2]]).reshape(-1, left.ndim - 3)
    ones = [1] * (left.ndim - 3)
    terms = []
    for place in places.tolist():
        index: tuple[Any, ...] = (slice(None), *place)
        tap = left[index].reshape(len(left), *ones, *left.shape[-2:])
        # F.pad counts axes from the last one
        pads = [amount for at, n in zip(reversed(place), reversed(left.shape[1:-2]), strict=True) for amount in (at, n - 1 - at)]
        terms.append(F.pad(tap @ right, [0, 0, 0, 0, *pads]))
    return torch.stack(terms).sum(0)
