"""Cells of frequencies that cover the torus, in the metric of M. Riesz's lemma: `Σ_i (k_i - 1) |θ_i - θ'_i| / 2`.

The metric is a sum over the axes, and its balls in two dimensions are diamonds. They tile the plane, and take half as many
evaluations as squares: centres form a checkerboard, and a diamond splits into four.
"""

from __future__ import annotations

from math import ceil, pi
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg.symbols import product


class Cells(NamedTuple):
    """Cells of one size: groups and centres.

    `radius` is their extent along each axis: a diamond in the first two axes, an interval in the third.
    """

    group: Tensor
    centre: Tensor
    radius: Tensor

    def at(self, index: Tensor) -> Cells:
        """The cells with these indices, or under this mask."""
        return Cells(self.group[index], self.centre[index], self.radius)

    def split(self) -> Cells:
        """Each cell split into `2^d` of half the radius."""
        offsets = _split_pattern(self.radius.numel(), self.radius) * self.radius / 2
        centre = (self.centre.unsqueeze(1) + offsets).flatten(0, 1)
        return Cells(self.group.repeat_interleave(len(offsets)), centre, self.radius / 2)


def _split_pattern(dims: int, like: Tensor) -> Tensor:
    """Where the parts of a cell of radius 2 have their centres, `(2^d, d)`."""
    ends = like.new_tensor([[-1.0], [1.0]])
    if dims == 1:
        return ends
    diamond = like.new_tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    if dims == 2:
        return diamond
    return torch.cat([diamond.repeat_interleave(2, dim=0), ends.repeat(4, 1)], dim=1)


class Tiling(NamedTuple):
    """Cells that cover half of the torus (the symbol at `-θ` is the conjugate): where their centres are.

    `lattices` holds for each of one or two interleaved grids the coordinates per axis; their products are the centres.
    """

    lattices: list[list[Tensor]]
    radius: Tensor

    @property
    def number(self) -> int:
        """How many cells there are."""
        return sum(_size(axes) for axes in self.lattices)

    def centres(self) -> Tensor:
        """All of them, `(number, d)`."""
        return torch.cat([product(axes, self.radius) for axes in self.lattices])


def _size(axes: list[Tensor]) -> int:
    count = 1
    for axis in axes:
        count *= len(axis)
    return count


def tiling(degree: Tensor, angle: float) -> Tiling:
    """Cells whose points are at most `angle` from their centres."""
    share = {1: [1.0], 2: [1.0, 1.0], 3: [2 / 3, 2 / 3, 1 / 3]}[degree.numel()]
    counts, radius = [], []
    for axis, (k, part) in enumerate(zip(degree.tolist(), share, strict=True)):
        diamond = degree.numel() > 1 and axis < 2
        spacings = 2 if diamond else 1  # a diamond reaches to its neighbours' centres, an interval half as far
        count = ceil(pi * k * spacings / (2 * part * angle))
        counts.append(count + count % spacings)
        radius.append(pi * spacings / counts[-1])
    steps = [torch.arange(n // 2 + 1 if axis == 0 else n).to(degree) * (2 * pi / n) for axis, n in enumerate(counts)]
    # a checkerboard is a grid of even and one of odd places
    lattices = [[*(s[first::2] for s in steps[:2]), *steps[2:]] for first in (0, 1)] if len(counts) > 1 else [steps]
    return Tiling(lattices, degree.new_tensor(radius))


def cells_at(centre: Tensor, radius: Tensor, groups: int) -> Cells:
    """Cells at these centres for every group."""
    group = torch.arange(groups, device=centre.device).repeat_interleave(len(centre))
    return Cells(group, centre.repeat(groups, 1), radius)


def angle_of(degree: Tensor, radius: Tensor) -> float:
    """The largest distance of a cell's points from its centre."""
    reach = (degree * radius / 2).tolist()
    return max(reach[:2], default=0.0) + sum(reach[2:])
