"""The largest singular value of many matrices, from above: Krylov steps tell about where it is, and Cholesky factors prove it.

On the host, where looking at a value costs nothing, so that no more is done than is needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor

#: The least margin between what is estimated and what is tried to be proven, over the rounding of float64 and of float32.
_MARGIN = {torch.float64: 1e-6, torch.float32: 1e-4}
#: Terms of a product that are summed at once: sums of fewer lose fewer digits.
_CHUNK = 64
#: Power steps for all matrices; after them some are looked at more closely, until the error seems as small as the margin.
_STEPS, _CLOSER = 4, 2
#: Below this share of the largest, what the power steps have found is not looked at more closely.
_HOPELESS = 1e-3
#: Bytes of matrices that are factorized at once: what is larger is given back to the system each time, and has to be asked for.
_AT_ONCE = 1 << 18
#: The most Krylov spaces for that.
_MOST_SPACES = 8
#: The most proofs: each time the estimate or the margin has grown.
_MOST_PROOFS = 20


class Top(NamedTuple):
    """The matrix with the largest norm, the unit vector `u` of its largest singular value, an estimate of the square of that from
    below, and about how far below it is, relative."""

    place: int
    left: Tensor
    squared: float
    doubt: float


def proven_top(batches: Iterable[Tensor], share: float) -> tuple[Top, float] | None:
    """The largest norm of a batch, and a number not below its square; None where rounding takes more than a share of that.

    With `G = M M*` as computed, a Cholesky factor `R` of `level I - G` that exists proves

        ‖M‖² ≤ level + γ ‖|R|‖² + γ' ‖M‖_F²,      ‖|R|‖ ≤ max R_jj + ‖off-diagonal R‖_F,

    whatever the order of the sums (Demmel 1989; Higham 2002, §10.1). The level is an estimate of `‖M‖²` and its doubt; of the
    matrices that have no factor then one is looked at, and raises the estimate, or else the margin grows.

    Args:
        batches: matrices `(n, rows, columns)`, real or complex, with no more rows than columns; finite, the largest entry of
            order one. Of one batch after the other only the Gram matrices are kept.
    """
    columns, parts = 0, []
    for matrices in batches:
        columns = matrices.shape[2]
        parts.append(_grams(matrices))
        del matrices
    grams = torch.cat(parts) if len(parts) > 1 else parts[0]
    parts.clear()
    eps, size = torch.finfo(grams.dtype).eps, grams.shape[1]
    widened = 3.0 if grams.is_complex() else 1.0
    traces = grams.diagonal(dim1=-2, dim2=-1).real.sum(-1)
    summed = min(_CHUNK, columns) + -(-columns // _CHUNK)
    error = 0.51 * widened * (summed + 4) * eps * float(traces.amax())
    rounding, proven = 0.5 * widened * (size + 4) * eps, 0.0
    rows, ranks = _ranked(grams)
    places = torch.arange(len(grams))
    top = _closely(grams, rows, ranks, places)
    margin, times = _MARGIN[ranks.dtype], 1
    for _ in range(_MOST_PROOFS):
        level = top.squared * (1 + times * (top.doubt + margin))
        if error > share * level:
            return None
        exists, grown = _factorized(grams, level, rounding)
        if exists.any():
            proven = max(proven, level * (1 + 2 * eps) + rounding * float(grown[exists].amax()) + error)
        if exists.all():
            return (top, proven) if proven <= level * (1 + share) else None
        grams, rows, ranks, places = (x[~exists] for x in (grams, rows, ranks, places))
        found = _closely(grams, rows, ranks, places)
        if not found.squared > top.squared * (1 + margin):
            times *= 4
        top = max(top, found, key=lambda each: each.squared)
    return None


def _grams(matrices: Tensor) -> Tensor:
    """`M M*`, summed in chunks."""
    first, *others = matrices.split(_CHUNK, -1)
    grams = first @ first.mH
    for part in others:
        grams.baddbmm_(part, part.mH)
    return grams


def _factorized(grams: Tensor, level: float, rounding: float) -> tuple[Tensor, Tensor]:
    """Which matrices `level I - G` have a Cholesky factor `R`, and bounds of `‖|R|‖²` for those."""
    size, found = grams.shape[-1], []
    for part in grams.split(max(_AT_ONCE // (size * size * grams.element_size()), 1)):
        shifted = -part
        diagonal = shifted.diagonal(dim1=-2, dim2=-1).add_(level).real
        # ‖R‖_F² = tr A, up to rounding; a sum of what is left, not what is left of two sums
        trace = diagonal.sum(-1, dtype=torch.float64) * (1 + 8 * rounding)
        factors, info = torch.linalg.cholesky_ex(shifted)
        roots = factors.diagonal(dim1=-2, dim2=-1).real
        found.append((info, roots.amax(-1), trace - roots.square().sum(-1, dtype=torch.float64)))
    infos, largest, rest = (torch.cat(each) for each in zip(*found, strict=True))
    return infos == 0, (largest + rest.clamp(min=0).sqrt()).square()


def _ranked(grams: Tensor) -> tuple[Tensor, Tensor]:
    """A few power steps: for each matrix `u*` of its largest eigenvalue, as a row, and that, both roughly."""
    start = torch.arange(1, grams.shape[-1] + 1).mul(1.618).cos()  # to which no matrix of a model is blind
    rows = start.to(grams).expand(len(grams), 1, -1).contiguous()
    for _ in range(_STEPS):
        # a row times a matrix is four times as fast as a matrix times a column
        rows = torch.bmm(rows, grams)
        rows = rows * (1 / _lengths(rows).clamp(min=torch.finfo(rows.dtype).tiny))[:, None, None]
    return rows, _lengths(torch.bmm(rows, grams))


def _lengths(rows: Tensor) -> Tensor:
    """Of `(n, 1, size)`. As real numbers: for complex ones torch takes ten times as long."""
    return torch.linalg.vector_norm((torch.view_as_real(rows) if rows.is_complex() else rows).flatten(1), dim=1)


def _closely(grams: Tensor, rows: Tensor, ranks: Tensor, places: Tensor) -> Top:
    """The largest eigenvalue of the first in rank, in Krylov spaces, each from the vector that the one before has found."""
    first, *others = ranks.topk(min(_CLOSER, len(ranks))).indices.tolist()
    if not float(ranks[first]) > torch.finfo(ranks.dtype).tiny:
        return Top(int(places[first]), rows[first, 0].conj(), 0.0, 0.0)
    found = []
    # a matrix may be zero, or as good as that: nothing can be divided by its norm, and it is not the largest
    for index in (first, *(i for i in others if float(ranks[i]) > _HOPELESS * float(ranks[first]))):
        vector, value = rows[index, 0].conj(), float(ranks[index])
        for _ in range(_MOST_SPACES):
            vector, value, doubt = _ritz(grams[index], vector, value)
            if doubt <= _MARGIN[ranks.dtype]:
                break
        found.append(Top(int(places[index]), vector, value, doubt))
    return max(found, key=lambda top: top.squared)


def _ritz(gram: Tensor, start: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """The vector and value nearest to the largest eigenvalue in a Krylov space, and its error, relative, about.

    Chebyshev polynomials of a matrix on a vector stay independent for many steps. The error is the square of the residual over
    the gap to the next value, or, without a gap, the residual.
    """
    basis = gram.new_empty(max(isqrt(len(gram)), min(len(gram), 2)), len(gram))
    basis[0] = start
    for step in range(1, len(basis)):
        first = step == 1
        before = basis[max(step - 2, 0)]
        torch.addmv(before, gram, basis[step - 1], beta=first - 1, alpha=(2 - first) / (1.1 * scale), out=basis[step])
    frame = torch.linalg.qr(basis.mT).Q
    images = gram @ frame
    small = frame.mH @ images
    if not bool(small.isfinite().all()):  # Householder's vectors, where all but a few entries nearly vanish
        return start, scale, 0.0
    values, vectors = torch.linalg.eigh(small)
    top = vectors[:, -1]
    vector, value = frame @ top, float(values[-1])
    residual = float(torch.linalg.vector_norm(images @ top - value * vector))
    gap = value - float(values[-2]) if len(values) > 1 else value
    return vector, value, residual / value * min(residual / gap if gap > 0 else 1.0, 1.0)
