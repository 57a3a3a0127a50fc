"""Products with a bound of their rounding, and bounds of norms by such products alone: nothing of it waits for a device.

A sum of `n` products in any order is off by at most `γ_n = n u / (1 - n u)` times the sum of their sizes, `u` being half an eps
(Higham 2002, §3.1), so `‖fl(A B) - A B‖ ≤ γ_n ‖A‖_F ‖B‖_F`. Long sums are made of short ones, which keeps `γ` small.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from .precision import exact
from .symbols import symmetric_product

#: So many products are summed at once, and so many where there are more rows than the first number.
_LENGTH, _SHORT_LENGTH = 1024, 256
#: What entries whose squares vanish can add to a norm in a unit in which it matters.
_VANISHING = 1e-12
#: From here on squares may overflow in float32.
_LARGE = 1e15


def unit_roundoff(dtype: torch.dtype) -> float:
    """`u`: half the distance from one to the next number."""
    return torch.finfo(dtype).eps / 2


def gamma(terms: int, dtype: torch.dtype) -> float:
    """`γ` of a sum of so many products, where it is small."""
    return 1.01 * terms * unit_roundoff(dtype)


def gram(matrices: Tensor) -> tuple[Tensor, float]:
    """`M Mᵀ` of matrices with no more rows than columns, and its `γ`: `‖fl(M Mᵀ) - M Mᵀ‖ ≤ γ ‖M‖_F²`, in Frobenius norm too."""
    rows, columns = matrices.shape[-2:]
    length = _length(rows)
    first, *others = matrices.split(length, dim=-1)
    squares = symmetric_product(first)
    for part in others:
        squares += symmetric_product(part)
    return squares, gamma(min(columns, length) + len(others) + 1, matrices.dtype)


def product(left: Tensor, right: Tensor) -> tuple[Tensor, float]:
    """`A B` of batches, and its `γ`."""
    terms = left.shape[-1]
    length = _length(terms)
    pairs = zip(left.split(length, dim=-1), right.split(length, dim=-2), strict=True)
    first, others = next(pairs), list(pairs)
    result = torch.bmm(*first)
    for pair in others:
        result.baddbmm_(*pair)
    return result, product_gamma(terms, left.dtype)


def product_gamma(terms: int, dtype: torch.dtype) -> float:
    """The `γ` of `product` with sums of so many terms."""
    length = _length(terms)
    return gamma(min(terms, length) + ceil(terms / length), dtype)


def frobenius_bounds(matrices: Tensor) -> Tensor:
    """Numbers not below the `‖·‖_F` of matrices `(n, rows, columns)` with one rounding in every entry; float64.

    A sum of `n` squares in any order is off by at most `(n + 1) u`, relative, with `u` half an eps (Higham 2002, §4.2), so rows
    are summed in the precision of the entries, and the rest in float64.
    """
    lengths = exact(torch.linalg.vector_norm(matrices, dim=-1))
    relative = 1 + (matrices.shape[-1] + 8) * torch.finfo(matrices.dtype).eps
    return torch.linalg.vector_norm(lengths, dim=-1) * relative + _VANISHING


def norm_bounds(matrices: Tensor, frobenius: Tensor, *, squarings: int) -> Tensor:
    """Numbers not below the `‖·‖₂` of matrices `(n, rows, columns)` with one rounding in every entry; float64.

    `‖D‖ ≤ ‖(D Dᵀ)^(2ˢ)‖_F^(1 / 2^(s + 1))`, too large by at most the `2^(s + 2)`-th root of the rank.

    Args:
        matrices: of any shape, in a unit in which 1e-12 does not matter.
        frobenius: `frobenius_bounds` of them.
        squarings: `s`.
    """
    wide = matrices if matrices.shape[-2] <= matrices.shape[-1] else matrices.mT
    squares, rounding = gram(wide)
    squares /= frobenius.square().to(squares)[:, None, None]
    eps = torch.finfo(squares.dtype).eps
    squared = _symmetric_bounds(squares, squarings) + rounding + 2 * eps
    sharp = frobenius * (squared.sqrt() + eps) + _VANISHING
    return torch.minimum(sharp, frobenius).where(frobenius < _LARGE, frobenius)


def _symmetric_bounds(matrices: Tensor, squarings: int) -> Tensor:
    """The same of symmetric matrices, `‖S‖² = ‖S Sᵀ‖`, each divided by its Frobenius norm first."""
    frobenius = frobenius_bounds(matrices)
    if not squarings:
        return frobenius
    eps = torch.finfo(matrices.dtype).eps
    squares, rounding = gram(matrices / frobenius.to(matrices)[:, None, None])
    squared = _symmetric_bounds(squares, squarings - 1) + rounding * (1 + 4 * eps)
    return torch.minimum(frobenius, frobenius * (squared.sqrt() + 2 * eps))


def _length(rows: int) -> int:
    return _LENGTH if rows <= _LENGTH else _SHORT_LENGTH
