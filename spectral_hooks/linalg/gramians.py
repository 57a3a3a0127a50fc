"""Gram matrices of many matrices with a bound of their rounding, and their largest eigenpairs by products."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from .precision import exact

#: Columns of which products are summed before they are added to those of others, so that sums are short and round little.
_BLOCK = 128
#: A Gram matrix is made of so many blocks of rows, each of this size at least.
_PANELS, _LEAST_PANEL = 8, 128
#: What numbers so small that their squares vanish can add to matrices whose norms are of order one.
_VANISHING = 1e-12
#: After so many products a block is scaled, so that matrices far above the level do not overflow.
_SCALED = 4


class Gramians(NamedTuple):
    """`G = M Mᵀ`, `(n, rows, rows)`; numbers not below `‖M‖_F²` and `‖G - M Mᵀ‖`, `(n,)`, in float64."""

    gram: Tensor
    squares: Tensor
    error: Tensor


class Pairs(NamedTuple):
    """Ritz values `(n, k)`, ascending, and unit vectors `(n, rows, k)`."""

    values: Tensor
    vectors: Tensor


def gramians(matrices: Tensor) -> Gramians:
    """The Gram matrices of `(n, rows, columns)` in their dtype, by blocks; what is not finite has an infinite error.

    `|ΔG| ≤ γ |M| |M|ᵀ` with a `γ` of as many half eps as there are sums that a product passes, in any order: those of its block,
    and one for each block. So `‖ΔG‖ ≤ γ ‖M‖_F²`.
    """
    rows, columns = matrices.shape[1:]
    panel = max(-(-rows // _PANELS), _LEAST_PANEL)
    gram = matrices.new_zeros(len(matrices), rows, rows)
    for part in matrices.split(_BLOCK, dim=2):
        for start in range(0, rows, panel):
            gram[:, start : start + panel, start:].add_(part[:, start : start + panel] @ part[:, start:].mT)
    for start in range(panel, rows, panel):
        gram[:, start:, start - panel : start] = gram[:, start - panel : start, start:].mT
    relative = rounding(rows, columns, matrices.dtype)
    squares = exact(gram.diagonal(dim1=-2, dim2=-1)).sum(-1) * (1 + 2 * relative) + _VANISHING
    error = relative * squares + _VANISHING
    return Gramians(gram, squares, torch.where(error < torch.inf, error, torch.inf))


def rounding(rows: int, columns: int, dtype: torch.dtype) -> float:
    """`γ` of `gramians`."""
    return 1.01 * (min(columns, _BLOCK) + ceil(columns / _BLOCK) + 2) * torch.finfo(dtype).eps / 2


def largest_pairs(grams: Tensor, level: float, number: int, degree: int) -> Pairs:
    """The largest eigenpairs of matrices `(n, rows, rows)` from a space in which those above `level` were made large.

    A block from a fixed seed times two Chebyshev polynomials of half of this degree that are at most 1 on `[0, level]`; at
    `(1 + e) level` they are `cosh(degree √e)²` or so. The values are estimates from below: eigenvalues near the level may be
    missed, by little. Matrices whose products overflow get pairs without meaning.
    """
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(grams.shape[1], number, generator=generator, dtype=torch.float64).to(grams).expand(len(grams), -1, -1)
    step = grams * (4 / level)
    step.diagonal(dim1=-2, dim2=-1).sub_(2)
    # at once, those that are far above would leave nothing of the others' digits
    for _ in range(2):
        block = torch.linalg.qr(_chebyshev(step, block, -(-degree // 2)).nan_to_num(0.0, 0.0, 0.0)).Q
    small = (block.mT @ (grams @ block)).nan_to_num(0.0, 0.0, 0.0)
    values, turn = torch.linalg.eigh((small + small.mT) / 2)
    return Pairs(values, block @ turn)


def _chebyshev(step: Tensor, block: Tensor, degree: int) -> Tensor:
    """The Chebyshev polynomial of half of `step`, times a block, up to a factor for each matrix."""
    before, now = block, torch.bmm(step, block) / 2
    for count in range(1, degree):
        before, now = now, torch.baddbmm(before, step, now, beta=-1)
        if count % _SCALED == 0:
            size = now.abs().amax((1, 2), keepdim=True).clamp(min=torch.finfo(now.dtype).tiny)
            before, now = before / size, now / size
    return now
