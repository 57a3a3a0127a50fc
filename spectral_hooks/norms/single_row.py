"""Suprema of symbols that have a single row: depthwise convolutions above all, with many taps and many groups.

There `‖F(θ)‖₂² = Σ_c |F_c(θ)|²` needs no decomposition, and no Gram polynomial, which has four times as many coefficients as the
kernel has taps: on a product of coordinates per axis it is evaluated axis after axis, which takes a few multiplications for a
frequency, however many taps there are. The search is that of `lattice.py`: cells that cover the torus, each dropped if its centre
shows that the supremum is not in it, the others split. As long as many cells are left a whole finer tiling is evaluated, since
that is cheaper than the single frequencies.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from math import cos, inf, log2, pi, prod, sin
from typing import NamedTuple

import torch
from torch import Tensor

from .cells import Cells, Tiling, angle_of, tiling

#: The angle of the first cells.
_FIRST_ANGLE = 0.4
#: Bytes of symbols held at once.
_CHUNK_BYTES = 1 << 24
#: How much dearer a frequency by itself is than one of a grid, at least.
_SINGLE_COST = 8
#: Single frequencies spent on a group whose norm is closer to the goal than `rtol`.
_CLOSE_CALL_BUDGET = 1 << 17
#: Groups with fewer frequencies than this share one batched product.
_FEW = 32
_EPS = torch.finfo(torch.float64).eps


class Suprema(NamedTuple):
    """For each group `value ≤ sup_θ ‖F(θ)‖ ≤ upper`, and the frequency at which the symbol's norm is `value`."""

    upper: Tensor
    value: Tensor
    theta: Tensor


class Row:
    """`‖F(θ)‖²` of every group of a kernel `(groups, rows, columns, *taps)` with a single row or column, in float64."""

    def __init__(self, kernel: Tensor) -> None:
        #: `(groups, columns, *taps)`
        self.kernel = kernel.flatten(1, 2)
        self.taps = tuple(kernel.shape[3:])
        columns = self.kernel.shape[1]
        sizes = self.kernel.flatten(2)
        #: By how much a value of each group may be off: `ΔF` is an eps of `Σ |K|` for every term, and for every turn of an angle.
        self.error = (
            _EPS * (2 * sum(4.2 * k + 6 for k in self.taps) + columns + 4) * sizes.abs().sum(2).square().sum(1)
        )  # (groups,)
        #: `(Σ_t ‖K_t‖)²`, which no value exceeds.
        self.most = (torch.linalg.vector_norm(sizes, dim=1).sum(1) * (1 + _EPS * (columns + prod(self.taps)))).square()

    @cached_property
    def extent(self) -> tuple[Tensor, Tensor]:
        """Between which numbers the values of every group lie, `(groups,)` each, by the coefficients `r_l = Σ_t ⟨K_t, K_{t+l}⟩`:

            r_0 - Σ_l |r_l| ≤ ‖F(θ)‖² ≤ r_0 + Σ_l |r_l|,   l ≠ 0.

        Where one tap alone matters in each column, so that the norm is the same everywhere, no cell could be dropped but by this.
        """
        axes, sizes = tuple(range(1, 1 + len(self.taps))), tuple(2 * k - 1 for k in self.taps)
        transformed = torch.fft.rfftn(self.kernel, s=sizes, dim=[1 + axis for axis in axes])
        lags = torch.fft.irfftn(torch.view_as_real(transformed).square().sum(-1).sum(1), s=sizes, dim=axes).flatten(1)
        mean, number = lags[:, 0], lags.shape[1]
        # each transform is off by less than 64 ε log₂ n of its length, in all coefficients together three times `√n` of that
        rounding = 200 * number * (1 + log2(number)) * _EPS * mean
        others = lags[:, 1:].abs().sum(1) + rounding
        return (mean - others).clamp(min=0), torch.minimum(mean + others, self.most)

    def on_grid(self, groups: slice | Tensor, axes: list[Tensor]) -> Tensor:
        """At the frequencies with these coordinates per axis, one axis after the other: `(groups, *frequencies)`."""
        waves = [_waves(axis, k) for axis, k in zip(axes, self.taps, strict=True)]
        values = self.kernel[groups]
        values = torch.complex(values @ waves[-1].real.T, values @ waves[-1].imag.T)
        for axis in range(len(waves) - 2, -1, -1):
            rest = values.shape[3 + axis :]
            values = (waves[axis] @ values.flatten(3 + axis)).unflatten(-1, rest)
        return torch.view_as_real(values).square().sum(-1).sum(1)

    def at(self, group: Tensor, theta: Tensor) -> Tensor:
        """Of `group[i]` at `theta[i]`, `(n, d)`; cells of a group stand together."""
        waves = [_waves(theta[:, axis], k) for axis, k in enumerate(self.taps)]
        by_first = self.kernel.transpose(1, 2)  # (groups, first taps, columns, other taps)
        present, counts = group.unique_consecutive(return_counts=True)
        if len(group) < _FEW * len(present):
            values = (waves[0].unsqueeze(1) @ by_first.flatten(2)[group].to(waves[0])).squeeze(1)
        else:
            parts = zip(present.tolist(), waves[0].split(counts.tolist()), strict=True)
            values = torch.cat([_times_real(wave, by_first[g].flatten(1)) for g, wave in parts])
        values = values.unflatten(1, by_first.shape[2:])
        for wave in waves[:0:-1]:
            values = (values @ wave.reshape(len(wave), *(1,) * (values.ndim - 3), -1, 1)).squeeze(-1)
        return torch.view_as_real(values).square().sum((-2, -1))

    def bytes_on_grid(self, points: int) -> int:
        """Held by `on_grid` for a group, nearly."""
        return 48 * self.kernel.shape[1] * points

    def bytes_at(self) -> int:
        """Held by `at` for a frequency, nearly."""
        return 16 * self.kernel[0].numel() + 48 * self.kernel[0, :, 0].numel() + 64 * sum(self.taps)


def _waves(angle: Tensor, taps: int) -> Tensor:
    """`exp(-i θ t)` for every frequency of an axis and every tap."""
    return torch.polar(angle.new_ones(1), -angle.unsqueeze(1) * torch.arange(taps).to(angle))


def _times_real(complex_: Tensor, real: Tensor) -> Tensor:
    return torch.complex(complex_.real @ real, complex_.imag @ real)


def suprema(kernel: Tensor, rtol: float, goal: Tensor | None = None, *, together: bool = False, budget: float = inf) -> Suprema:
    """Bracket the supremum of every group: `upper ≤ value (1 + rtol)`.

    Args:
        kernel: `(groups, rows, columns, *taps)` with a single row or column and at least one axis of taps, in float64 and with
            entries of order one.
        rtol: relative width of the brackets.
        goal: one for each group, only to find out on which side of it the supremum lies: `upper` is the goal where it is proven
            not to lie above, and infinite where it does, or where no proof was found within limits.
        together: only the largest of the suprema counts: `upper` is that of all.
        budget: single frequencies, or as many times `_SINGLE_COST` of a grid, after which a group's proof is given up; only with
            a goal.
    """
    row, degree = Row(kernel), torch.tensor(kernel.shape[3:]).to(kernel) - 1
    search = _Search(row, degree, rtol, goal, together, budget)
    angle, left = _FIRST_ANGLE, torch.arange(len(kernel), device=kernel.device)
    cells: list[Cells] = []
    while len(left):
        left, some = search.tiled(left, angle)
        cells += some
        angle /= 2
    search.split(cells)
    value = search.best.sqrt()
    if goal is not None:
        return Suprema(torch.where(search.failed, inf, goal), value, search.theta)
    return Suprema(torch.minimum(search.bound(), row.extent[1]).sqrt(), value, search.theta)


class _Search:
    """What a branch and bound knows: the largest squared norms so far, where, and which goals are given up."""

    def __init__(self, row: Row, degree: Tensor, rtol: float, goal: Tensor | None, together: bool, budget: float) -> None:
        self.row, self.degree, self.rtol, self.together, self.budget = row, degree, rtol, together, budget
        self.goal = None if goal is None else goal.to(row.error).square()
        self.best = torch.zeros_like(row.error)
        self.theta = self.best.unsqueeze(1) * degree
        self.spent = torch.zeros_like(self.best)
        self.failed = torch.zeros_like(self.best, dtype=torch.bool)
        # a matrix product of all frequencies of an axis at once, and no angles: less than that for a frequency of a grid
        self.single_cost = max(row.taps[0], _SINGLE_COST)

    def bound(self) -> Tensor:
        """The squares of what is to be proven, of every group."""
        if self.goal is not None:
            return self.goal
        best = self.best.amax().expand_as(self.best) if self.together else self.best
        return best * (1 + self.rtol) ** 2

    def open(self) -> Tensor:
        """The groups for which something is left to be proven."""
        return ~self.failed & (self.row.extent[1] > self.bound())

    def _level_of(self, radius: Tensor) -> Tensor:
        """What the squared norm at the centre of a cell exceeds if the supremum, above the bound, is in it; of every group."""
        angle = min(angle_of(self.degree, radius), pi / 2)
        return self.bound() * cos(angle) ** 2 + self.row.extent[0] * sin(angle) ** 2 - self.row.error

    def give_up(self, left: Tensor) -> None:
        """Mark what is outside, and of the groups that have cells left, `(groups,)`, those that took too much."""
        if self.goal is None:
            return
        close = self.best * (1 + self.rtol) ** 2 > self.goal
        too_much = (self.spent > self.budget) | (close & (self.spent > _CLOSE_CALL_BUDGET))
        self.failed |= (self.best > self.goal) | (left & too_much)

    def seen(self, group: Tensor, squared: Tensor, theta: Tensor) -> None:
        """Remember the largest of these values of every group."""
        best = self.best.scatter_reduce(0, group, squared, "amax")
        new = (squared == best[group]) & (squared > self.best[group])
        self.theta[group[new]] = theta[new]
        self.best = best

    def tiled(self, groups: Tensor, angle: float) -> tuple[Tensor, list[Cells]]:
        """Evaluate a whole tiling for these groups: those for which the next one pays too, and the cells left of the others."""
        groups = groups[self.open()[groups]]
        if not len(groups):
            return groups, []
        cover = tiling(self.degree, angle)
        again, cells = [], []
        for part in groups.split(max(_CHUNK_BYTES // self.row.bytes_on_grid(cover.number), 1)):
            self.spent[part] += cover.number / self.single_cost
            many, member, squared, centre = self._survivors(part, cover)
            group = part[member]
            alive = (squared > self._level_of(cover.radius)[group]) & ~many[member]
            self.give_up(self._marked(torch.cat([group[alive], part[many]])))
            alive &= self.open()[group]
            order = member[alive].argsort(stable=True)
            cells.append(Cells(group[alive][order], centre[alive][order], cover.radius))
            again.append(part[many])
        return torch.cat(again), cells

    def _survivors(self, groups: Tensor, cover: Tiling) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the cells of a tiling those that may hold the supremum: places of their groups, squared norms and centres.

        Of groups that have so many that a whole finer tiling is cheaper, which come first, not all.
        """
        counts = torch.zeros_like(groups)
        found = []
        for axes in cover.lattices:
            for squared, coordinates in self._over(groups, axes):
                flat = squared.flatten(1)
                kept = flat > self._level_of(cover.radius)[groups].unsqueeze(1)
                counts += kept.sum(1)
                kept &= (counts * self.single_cost <= cover.number).unsqueeze(1)
                member, place = kept.nonzero(as_tuple=True)
                found.append((member, flat[member, place], _points(place, squared.shape[1:], coordinates)))
        member, values, centres = (torch.cat(parts) for parts in zip(*found, strict=True))
        return counts * self.single_cost > cover.number, member, values, centres

    def _over(self, groups: Tensor, axes: list[Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """The squared norms on a grid, some rows at a time, with their coordinates; the largest are remembered."""
        row_bytes = self.row.bytes_on_grid(prod(len(axis) for axis in axes[1:]))
        for first in axes[0].split(max(_CHUNK_BYTES // (len(groups) * row_bytes), 1)):
            coordinates = [first, *axes[1:]]
            squared = self.row.on_grid(groups, coordinates)
            top, where = squared.flatten(1).max(1)
            self.seen(groups, top, _points(where, squared.shape[1:], coordinates))
            yield squared, coordinates

    def split(self, cells: list[Cells]) -> None:
        """Split cells until none is left, not many at a time."""
        count = max(_CHUNK_BYTES // self.row.bytes_at(), 1)
        stack = [part.split() for part in cells if len(part.group)]
        while stack:
            whole = stack.pop()
            # depth first where there are more
            if len(whole.group) > count:
                stack.append(whole.at(torch.arange(count, len(whole.group), device=whole.group.device)))
                whole = whole.at(torch.arange(count, device=whole.group.device))
            part = whole.at(self.open()[whole.group])
            if not len(part.group):
                continue
            squared = self.row.at(part.group, part.centre)
            self.seen(part.group, squared, part.centre)
            self.spent += torch.bincount(part.group, minlength=len(self.spent))
            part = part.at(squared > self._level_of(part.radius)[part.group])
            self.give_up(self._marked(part.group))
            part = part.at(self.open()[part.group])
            if len(part.group):
                stack.append(part.split())

    def _marked(self, group: Tensor) -> Tensor:
        """Which groups are among these."""
        return torch.zeros_like(self.failed).index_fill_(0, group, True)


def _points(index: Tensor, shape: tuple[int, ...], axes: list[Tensor]) -> Tensor:
    """The frequencies with these flat indices of a grid, `(n, d)`."""
    places = []
    for size in reversed(shape):
        places.append(index % size)
        index = index // size
    return torch.stack([axis[place] for axis, place in zip(axes, reversed(places), strict=True)], 1)


def grid_maxima(kernel: Tensor, sizes: tuple[int, ...]) -> Suprema:
    """The largest norm of every group over the frequencies `2π j / sizes`, for a kernel as `suprema` takes."""
    row = Row(kernel)
    axes = [torch.arange(n // 2 + 1 if i == 0 else n).to(kernel) * (2 * pi / n) for i, n in enumerate(sizes)]
    search = _Search(row, torch.tensor(kernel.shape[3:]).to(kernel) - 1, 0.0, None, False, inf)
    points = prod(len(axis) for axis in axes)
    for groups in torch.arange(len(kernel), device=kernel.device).split(max(_CHUNK_BYTES // row.bytes_on_grid(points), 1)):
        for _ in search._over(groups, axes):
            pass
    return Suprema((search.best + row.error).sqrt(), search.best.sqrt(), search.theta)
