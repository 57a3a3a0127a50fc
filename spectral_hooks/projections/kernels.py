"""Clips of many small kernels that are a little outside, all at once, by matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..linalg.scaling import each
from ..norms.covered import Sample

#: What clipping at 1 takes away from `σ`, relative to it, as a polynomial in `g = σ²` on `[0, 1.82]`:
#:
#:     h = g² (g² + a g + b),  m = h (h + c g² + d g + e),  f = m (p + q g + r g² + s h + t m) + u h.
#:
#: `σ (1 - f)` is within 8.1e-3 of `min(σ, 1)`, and within 8.1e-4 for `σ ≤ 0.75`: the best such `f`, by linear programs in
#: `p, …, u` and a simplex search in `a, …, e`.
_INNER = (-1.22075531, 0.36074401, -1.09577104, 1.29050864, 0.20640779)
_OUTER = (-1.39724606, -4.71461569, 4.12883554, -0.95313179, 0.03204783, 1.20480047)
#: Norms over the level for which this holds.
REACH = 1.28


def clip_kernels(sample: Sample, levels: Tensor, crop: Callable[[Tensor], Tensor]) -> Tensor:
    """What to take away from kernels so that their norms come near the levels: one proximal step, as in `dual.clip_kernel`.

    `E* f(F F*) F`, with `f` near `max(1 - level / σ, 0)`, times the length that a crop calls for. Singular values below the level
    change by at most a hundredth of it, those below 3/4 of it by a tenth of that.

    Args:
        sample: that of the kernels.
        levels: `(groups,)`; norms are at most `REACH` times as large.
        crop: takes a correction `(groups, rows, columns, *taps)` to the taps that exist.
    """
    shares = sample.cover.shares
    symbols, grams = (x[: len(shares)] for x in (sample.symbols, sample.grams))
    relative = torch.view_as_real(grams) / each(levels.square().to(shares), 3)
    excess = taken(torch.view_as_complex(relative)) @ symbols
    cropped = crop(sample.cover.crop(excess, sample.taps))
    # Barzilai & Borwein's length: large where the excess lies at few frequencies, since a crop spreads those over all
    squares = shares @ torch.view_as_real(excess).square().flatten(2).sum(2)
    spread = cropped.flatten(1).square().sum(1)
    return each(torch.where(spread > 0, squares / spread, 1.0), cropped.ndim - 1) * cropped


def taken(g: Tensor) -> Tensor:
    """`f(g)` for Hermitian positive semidefinite matrices, by four products."""
    (a, b, c, d, e), (p, q, r, s, t, u) = _INNER, _OUTER
    g2 = g @ g
    h = g2 @ _plus(g2 + a * g, b)
    m = h @ _plus(torch.add(h, g2, alpha=c).add_(g, alpha=d), e)
    outer = torch.mul(g, q).add_(g2, alpha=r).add_(h, alpha=s).add_(m, alpha=t)
    return torch.matmul(m, _plus(outer, p)).add_(h, alpha=u)


def _plus(matrices: Tensor, number: float) -> Tensor:
    """Matrices and a multiple of the identity, in place."""
    matrices.diagonal(dim1=-2, dim2=-1).add_(number)
    return matrices
