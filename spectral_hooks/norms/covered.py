"""Many small kernels of one shape at once: estimates, and proofs at the cells of one cover, without a loop over kernels.

By the lemma in `lattice.py` the norm of a kernel is at most `U` if `‖F(centre)‖ ≤ U cos(a)` at the centres of cells of the angle
`a` that cover the torus. Small symbols are cheap, so all of them are made as they are, in single precision where its rounding
leaves room, and a Cholesky factor of each tells. The waves at the centres depend on the taps alone and are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import cos, isclose, pi, prod, sin
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg.precision import float32_is_kept
from ..linalg.symbols import product
from .cells import Cells, angle_of, tiling

#: Steps of a power iteration for an estimate.
_POWER_STEPS = 4
#: For so many frequencies of each group there are eight steps more.
_PROMISING = 6
#: The share of a cell's room that rounding may take in single precision.
_ROUNDING_SHARE = 0.15
#: Cells that come from splitting, at most, over those of the cover; no cell is split more often.
_MOST_SPLIT, _MOST_LEVELS = 1.5, 3


class Waves(NamedTuple):
    """`cos(t·θ)` and `-sin(t·θ)` at some frequencies, `(frequencies, taps)`."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, theta: Tensor, taps: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Waves:
        """Those at frequencies `(n, d)`, in float64 on the host."""
        angles = theta @ product([torch.arange(k) for k in taps], theta).T
        return cls(angles.cos().to(device, dtype), angles.sin().neg_().to(device, dtype))

    def symbols(self, kernels: Tensor) -> Tensor:
        """`F(θ)`, `(frequencies, groups, rows, columns)`, complex."""
        flat = kernels.flatten(3).movedim(-1, 0).flatten(1)
        return torch.complex(self.cos @ flat, self.sin @ flat).view(-1, *kernels.shape[:3])


class Cover(NamedTuple):
    """Cells that cover half of the torus, all of one angle, and the waves at their centres.

    The first of them are a grid, of whose frequencies each stands for a share of all.
    """

    centre: Tensor
    radius: Tensor
    angle: float
    waves: Waves
    shares: Tensor

    def crop(self, symbols: Tensor, taps: tuple[int, ...]) -> Tensor:
        """The adjoint of the symbols on the grid, in the mean over all frequencies: `(groups, rows, columns, *taps)`."""
        flat = symbols.flatten(1)
        cosines, sines = (wave[: len(self.shares)].T * self.shares for wave in self.waves)
        return (cosines @ flat.real + sines @ flat.imag).T.reshape(*symbols.shape[1:], *taps)


@lru_cache(maxsize=64)
def cover(taps: tuple[int, ...], angle: float, dtype: torch.dtype, device: torch.device) -> Cover:
    """That of cells whose points are at most `angle` from their centres, in `(0, π / 2)`; every axis has several taps."""
    degree = torch.tensor(taps, dtype=torch.float64) - 1
    cells = tiling(degree, angle)
    centre = cells.centres()
    first = cells.lattices[0]
    # of the first axis half is there, and those that are their own mirror image are there themselves
    counts = [1.0 if x == 0 or isclose(x, pi) else 2.0 for x in first[0].tolist()]
    shares = torch.tensor(counts).repeat_interleave(prod(len(axis) for axis in first[1:]))
    waves = Waves.at(centre, taps, dtype, device)
    return Cover(centre, cells.radius, angle_of(degree, cells.radius), waves, (shares / shares.sum()).to(device, dtype))


def cover_bytes(shape: tuple[int, ...], angle: float) -> int:
    """What the symbols of one group of this shape, `(rows, columns, *taps)`, and their Gram matrices take in single precision."""
    small, large = sorted(shape[:2])
    degree = torch.tensor([k for k in shape[2:] if k > 1], dtype=torch.float64) - 1
    return 8 * small * (small + large) * tiling(degree, angle).number


def tall_to_wide(kernels: Tensor) -> Tensor:
    """The kernels with no more rows than columns, and without axes of a single tap: neither changes a singular value."""
    wide = kernels if kernels.shape[1] <= kernels.shape[2] else kernels.transpose(1, 2)
    return wide.reshape(*wide.shape[:3], *(k for k in wide.shape[3:] if k > 1))


class Sample(NamedTuple):
    """Kernels `(groups, rows, columns, *taps)` with their symbols at the centres of a cover, and `F F*` there.

    `lengths` are bounds of `‖Σ_t |K_t|‖_F`, relative to which entries may be off by an eps.
    """

    kernels: Tensor
    lengths: Tensor
    cover: Cover
    symbols: Tensor
    grams: Tensor

    @classmethod
    def of(cls, kernels: Tensor, angle: float) -> Sample:
        """That of kernels in float64, no more rows than columns, and more than one tap along each axis."""
        error = _factor_error(kernels.shape[1], torch.float32)
        single = float32_is_kept() and error < _ROUNDING_SHARE * sin(angle) ** 2
        taps = tuple(kernels.shape[3:])
        # `‖Σ_t |K_t|‖_F ≤ √taps ‖K‖_F`
        lengths = torch.linalg.vector_norm(kernels.flatten(1), dim=1) * ((1 + 1e-7) * prod(taps) ** 0.5)
        working = kernels.float() if single else kernels
        there = cover(taps, angle, working.dtype, working.device)
        symbols = there.waves.symbols(working)
        return cls(working, lengths, there, symbols, grams(symbols))

    def some(self, groups: Tensor) -> Sample:
        """That of these groups alone, by their numbers."""
        if len(groups) == len(self.kernels):
            return self
        groups = groups.to(self.kernels.device)
        parts = (x.index_select(1, groups) for x in (self.symbols, self.grams))
        return Sample(self.kernels[groups], self.lengths[groups], self.cover, *parts)

    def estimates(self, *, closely: bool) -> Tensor:
        """Of the norms, `(groups,)`, by a power iteration at the centres: from below by 2 %, or, closely, by 0.5 %."""
        return _estimates(self.grams, closely)

    @property
    def taps(self) -> tuple[int, ...]:
        """Along every axis."""
        return tuple(self.kernels.shape[3:])


def grams(symbols: Tensor) -> Tensor:
    """`F F*` of symbols with no more rows than columns."""
    if symbols.shape[-2] == 1:
        return torch.view_as_real(symbols).square().sum((-2, -1)).unsqueeze(-1).to(symbols.dtype)
    return symbols @ symbols.mH


def _estimates(grams: Tensor, closely: bool) -> Tensor:
    """Of all frequencies by few steps, and of the most promising of every group, if asked, by more."""
    frequencies, groups, size, _ = grams.shape
    diagonal = grams.diagonal(dim1=-2, dim2=-1).real
    if size == 1:
        return diagonal.amax((0, 2)).double().sqrt()
    tiny = torch.finfo(diagonal.dtype).tiny
    # over the largest trace eigenvalues neither over- nor underflow
    scale = diagonal.sum(-1).amax(0).clamp(min=tiny)
    each, matrices = scale.reciprocal().repeat(frequencies)[:, None, None], grams.flatten(0, 1)
    largest, index = diagonal.flatten(0, 1).max(-1)
    row = last = matrices.take_along_dim(index[:, None, None], dim=-2) / largest.clamp(min=tiny)[:, None, None]
    for _ in range(_POWER_STEPS):
        last, row = row, torch.bmm(row, matrices).mul_(each)
    ratio = _lengths(row) / _lengths(last).clamp(min=tiny)
    if not closely:
        return (ratio.view(frequencies, groups).amax(0) * scale).double().sqrt()
    best = ratio.view(frequencies, groups).topk(min(_PROMISING, frequencies), dim=0).indices
    best = (best * groups + torch.arange(groups, device=best.device)).flatten()
    matrices = matrices[best] * each[: len(best)]
    fourth = matrices @ matrices
    fourth = fourth @ fourth
    row = row[best]
    row = row / _lengths(row).clamp(min=tiny)[:, None, None]
    row = row @ fourth @ fourth
    ratio = _lengths(row @ matrices) / _lengths(row).clamp(min=tiny)
    return (ratio.view(-1, groups).amax(0) * scale).double().sqrt()


def _lengths(rows: Tensor) -> Tensor:
    """Of vectors `(n, 1, size)`; of complex numbers it would take the absolute values first, which is far slower."""
    return torch.linalg.vector_norm(torch.view_as_real(rows), dim=(1, 2, 3))


def proven(sample: Sample, goals: Tensor, shares: Tensor | None = None, errors: Tensor | None = None) -> Tensor:
    """For which groups `sup_θ ‖F(θ)‖₂` is proven not to exceed their goal; on the host.

    Args:
        sample: that of kernels.
        goals: positive, `(groups,)`, in float64 on the host.
        shares: what is to be proven is of the kernels times these, `(groups,)`, in float64 ...
        errors: ... off by these in the Frobenius norm of all taps.

    Where the proof fails at few cells they are split a few times. The answer of a group does not depend on the others, but for
    the rounding of products, for which there is room.
    """
    phase, device = prod(sample.taps) ** 0.5, sample.lengths.device
    goals = goals.to(device)

    def limit(angle: float) -> Tensor:
        most = cos(angle) * goals if errors is None else cos(angle) * goals - phase * errors
        return most if shares is None else most / shares

    columns, cells = sample.kernels.shape[2], sample.cover
    failed = (~_below(sample.grams, limit(cells.angle), sample.lengths, sample.taps, columns)).cpu()
    number = failed.sum(0)
    few = 2 ** len(sample.taps) * number <= _MOST_SPLIT * len(cells.centre)
    centre, group = (failed & few).nonzero().T
    if not len(group):
        return number == 0
    return few & _split_inside(sample, Cells(group, cells.centre[centre], cells.radius), limit)


def _split_inside(sample: Sample, cells: Cells, limit: Callable[[float], Tensor]) -> Tensor:
    """For which groups the proof succeeds at what these cells are split into."""
    groups, angle = len(sample.kernels), sample.cover.angle
    budget = torch.full((groups,), _MOST_SPLIT * len(sample.cover.centre))
    alive = torch.ones(groups, dtype=torch.bool)
    for _ in range(_MOST_LEVELS):
        budget -= 2 ** cells.radius.numel() * torch.bincount(cells.group, minlength=groups)
        alive &= budget >= 0
        cells = cells.at(alive[cells.group])
        if not len(cells.group):
            return alive
        cells, angle = cells.split(), angle / 2
        gram, index = _grams_at(sample.kernels, cells)
        below = _below(gram, limit(angle), sample.lengths, sample.taps, sample.kernels.shape[2])
        cells = cells.at(~below.cpu().flatten()[index])
    return alive & (torch.bincount(cells.group, minlength=groups) == 0)


def _grams_at(kernels: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
    """Those at the centres of any cells, `(places, groups, size, size)`, and which of these is that of each cell.

    Places are filled group by group; groups with fewer cells have places whose symbols are zero.
    """
    taps, groups = tuple(kernels.shape[3:]), len(kernels)
    number = torch.bincount(cells.group, minlength=groups)
    order = cells.group.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - (number.cumsum(0) - number)[cells.group[order]]
    index = place * groups + cells.group
    flat, parts = kernels.flatten(3).flatten(1, 2).mT, []
    for wave in Waves.at(cells.centre, taps, kernels.dtype, torch.device("cpu")):
        padded = wave.new_zeros(int(number.max()) * groups, wave.shape[1])
        padded[index] = wave
        padded = padded.unflatten(0, (-1, groups)).to(kernels.device)
        parts.append(padded[:, 0] @ flat[0] if groups == 1 else (padded.transpose(0, 1) @ flat).transpose(0, 1))
    return grams(torch.complex(*parts).reshape(-1, groups, *kernels.shape[1:3])), index


def _below(gram: Tensor, limits: Tensor, lengths: Tensor, taps: tuple[int, ...], columns: int) -> Tensor:
    """At which centres the norm of the symbol is proven to be at most the limit of its group, from what was computed as `F F*`.

    Every bound is `√2` for the two parts of a complex number times what a real one would be off by, and a little more:

    - the symbol: `(taps + 4 + 7 degree) eps Σ |K_t|`, for the sum, the waves, and the rounding of entries and angles;
    - its Gram matrix: `columns · eps ‖F‖_F²`, for sums of `2 columns` products in any order, and `‖F‖_F²` is the trace;
    - the factor: see `_factor_error`.

    Args:
        gram: `(frequencies, groups, size, size)`.
        limits, lengths: `(groups,)`.
    """
    size, dtype = gram.shape[-1], gram.real.dtype
    eps = torch.finfo(dtype).eps
    squares = gram.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    symbol_error = 1.5 * (prod(taps) + 4 + 7 * sum(k - 1 for k in taps)) * eps * lengths
    factor = 1 / (1 + _factor_error(size, dtype))
    # two roundings of the level, and those of the trace
    level = ((limits - symbol_error).clamp(min=0).square() * (factor * (1 - 4 * eps)) - 1e-30).to(dtype)
    levels = torch.sub(level, squares, alpha=1.51 * (columns + size + 4) * eps * factor)
    possible = (levels > 0) & (squares <= size * levels)  # also false for NaN
    if size == 1:
        return possible & (squares * (1 + 4 * eps) <= levels)
    shifted = gram.neg()
    shifted.diagonal(dim1=-2, dim2=-1).add_(levels.unsqueeze(-1))
    return (torch.linalg.cholesky_ex(shifted).info == 0) & possible


def _factor_error(size: int, dtype: torch.dtype) -> float:
    """By how much the factor of `A = level I - G` may be that of another matrix, over the level.

    `|ΔA| ≤ γ |R|* |R|`, so `‖ΔA‖ ≤ γ tr A ≤ γ size · level` (Demmel 1989), with `√2 · 2 (size + 1)` roundings for complex
    numbers, four times that, as blocks may be inverted; and the difference itself is rounded.
    """
    return (6 * (size + 2) * size + 4) * torch.finfo(dtype).eps
