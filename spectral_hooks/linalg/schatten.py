"""Bounds of the norms of many matrices by sums of squares: Schatten norms, by products alone.

    ‖D‖ ≤ ‖D‖_F,      ‖D‖² ≤ ‖D Dᵀ‖_F,      ‖D‖⁴ ≤ ‖(D Dᵀ)²‖_F

are too large by at most the square root of the rank, its fourth and its eighth root. Every rounding is bounded: what is returned
is never below the norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import exact
from .symbols import symmetric_product

#: What numbers so small that their squares vanish can add to the norm of matrices whose entries are of order one or smaller.
_VANISHING = 1e-12
#: From here on squares may overflow in float32.
_LARGE = 1e15


def frobenius_bounds(matrices: Tensor) -> Tensor:
    """Numbers not below the `‖·‖_F` of matrices `(n, rows, columns)` with one rounding in every entry; float64.

    A sum of `n` squares in any order is off by at most `(n + 1) u`, relative, with `u` half an eps (Higham 2002, §4.2), so rows
    are summed in the precision of the entries, and the rest in float64.
    """
    lengths = exact(torch.linalg.vector_norm(matrices, dim=-1))
    relative = 1 + (matrices.shape[-1] + 8) * torch.finfo(matrices.dtype).eps
    return torch.linalg.vector_norm(lengths, dim=-1) * relative + _VANISHING


def schatten_bounds(matrices: Tensor, frobenius: Tensor) -> Tensor:
    """Numbers not below the `‖·‖₂` of matrices `(n, rows, columns)` with one rounding in every entry; float64.

    By the eighth Schatten norm: one product with the transpose and one of the small result with itself. The product of `D` has
    an error of at most `γ ‖|D| |D|ᵀ‖ ≤ γ ‖D‖_F²`, whatever the order of its sums.

    Args:
        matrices: with no more rows than columns, for the cost.
        frobenius: `frobenius_bounds` of them.
    """
    rows, columns = matrices.shape[-2:]
    eps = torch.finfo(matrices.dtype).eps
    gram = symmetric_product(matrices) / frobenius.square().to(matrices)[:, None, None]
    fourth = frobenius_bounds(gram)
    eighth = frobenius_bounds(symmetric_product(gram)) + rows * eps * fourth.square()
    squared = torch.minimum(fourth, eighth.sqrt()) + (columns + 8) * eps
    sharp = frobenius * (squared.sqrt() + eps) + _VANISHING
    return torch.minimum(sharp, frobenius).where(frobenius < _LARGE, frobenius)
