"""Clipping by matrix products alone, for accelerators, where a decomposition costs many times as much.

With the polar decomposition `X = O H`, `H = (X* X)^½`, what clipping at 1 takes away is

    X - clip(X) = O W,  W = ½ (H - I + |H - I|) = ½ (I + S) (H - I),  S = sign(H - I).

`O` and `S` are limits of odd polynomials. `O` must be right for singular values above 1 only, since `W` vanishes on the others;
`S` has no gap, but where it is wrong `H - I` is small. What is left is rounding. It is of the order of `‖X‖`, so in float32 the
result is of use near the ball only. How large the error is can be measured, and it is: see `excess`.
"""

from __future__ import annotations

from math import ceil, log
from typing import NamedTuple

import torch
from torch import Tensor

#: Odd quintics `x (a + b x² + c x⁴)`, each the nearest to 1 on `[least, 1.001]`, scaled to be 1 at most: `least`, `a`, `b`, `c`.
#: In a row each maps the interval of one into that of the next (Amsel, Persson, Musco, Gower 2025). The first is repeated until
#: the smallest values are large enough for it. Their optimum would start from the smallest value and save one step in ten, but
#: it throws values near 1 back to the smallest, and rounding grows with every return.
_QUINTICS = (
    (0.1000000000, 3.8520763658, -9.5266120526, 6.6658958311),
    (0.3757476835, 2.9130287799, -4.3622502372, 2.4471480343),
    (0.8814736786, 1.9962721193, -1.5044735678, 0.5081771395),
    (0.9996796536, 1.8750000000, -1.2500000000, 0.3750000000),
)
#: Nearer to the level, relative to the norm, `S` may be wrong: rounding is that large.
_FINEST = 2e-7
#: A bound of a norm by `‖G^(2^p)‖_F^(2^-p)` is too large by up to `rank^(2^-(p + 1))`: powers `p`.
_POWERS = 4
#: Room for rounding in that bound, and in the one from below.
_ROOM = 1e-4


class Excess(NamedTuple):
    """What clipping takes away, `O W`; per matrix the sum of its singular values, and by how much `O W` is measured to be off."""

    excess: Tensor
    total: Tensor
    error: Tensor


def excess(matrices: Tensor, level: float | Tensor) -> Excess:
    """What clipping the singular values at `level` takes away, by matrix products alone, in the dtype of the matrices.

    The error is the sum of what each part is measured to contribute, in Frobenius norm, each up to rounding:

    - `‖(I - S²) (H - I)‖`: where `|S| < 1`, at singular values near the level;
    - `‖(I - O* O) W‖`: where `O` is no isometry although the excess is not zero;
    - `‖H - H*‖` and `‖(X - O H) P‖`, `P = ½ (I + S)`: what rounding has done to the polar decomposition.

    Args:
        matrices: `(*batch, rows, columns)`, real or complex.
        level: one for all, or of a shape that broadcasts with the batch.
    """
    if matrices.shape[-2] < matrices.shape[-1]:
        mirrored = excess(matrices.mH, level)
        return mirrored._replace(excess=mirrored.excess.mH)
    level = torch.as_tensor(level, dtype=matrices.real.dtype, device=matrices.device)[..., None, None]
    x = matrices / level
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    largest = norm_bracket(x)[1].clamp(min=1)
    # half of the level: where `O` is no isometry below, it still tells which side of the level a value is on
    o = sign(x, largest, 0.5 / float(largest.amax()))
    h = o.mH @ x
    skew = h - h.mH
    h = (h + h.mH) / 2
    over = h - identity
    s = sign(over, largest, _FINEST)
    s = (s + s.mH) / 2
    p = (identity + s) / 2
    w = p @ over
    w = (w + w.mH) / 2
    parts = (over - s @ (s @ over), w - o.mH @ (o @ w), skew, (x - o @ h) @ p)
    error = sum(torch.linalg.matrix_norm(part) for part in parts)
    level = level[..., 0, 0]
    return Excess(o @ w * level[..., None, None], w.diagonal(dim1=-2, dim2=-1).real.sum(-1) * level, error * level)


def sign(matrices: Tensor, largest: Tensor, least: float) -> Tensor:
    """`U V*` of matrices `U Σ V*` with no more columns than rows, by odd polynomials; of Hermitian ones the sign.

    Args:
        matrices: `(*batch, rows, columns)`.
        largest: bounds of their norms, of a shape that broadcasts with the batch.
        least: singular values above this share of `largest` come to 1, up to rounding; smaller ones to something in [0, 1].
    """
    x = matrices / largest[..., None, None]
    start, end = _QUINTICS[0][0], _QUINTICS[1][0]
    repeats = max(ceil(log(start / least) / log(end / start)), 0)
    for _, a, b, c in (*_QUINTICS[:1] * repeats, *_QUINTICS):
        g = x.mH @ x
        x = a * x + x @ (b * g + c * (g @ g))
    return x


def norm_bracket(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the norms from below and from above, by powers of the Gram matrix (Delattre et al. 2023)."""
    squares = matrices.mH @ matrices
    logarithm = torch.zeros_like(squares.real[..., 0, 0])
    tiny = torch.finfo(logarithm.dtype).tiny
    for power in range(_POWERS + 1):
        size = torch.linalg.matrix_norm(squares).clamp(min=tiny)
        logarithm = logarithm + size.log() / 2**power
        squares = squares / size[..., None, None]
        if power < _POWERS:
            squares = squares @ squares
    # λ₁ᵐ ≥ tr G²ᵐ / tr Gᵐ, the numerator now being 1
    trace = squares.diagonal(dim1=-2, dim2=-1).real.sum(-1).clamp(min=1)
    lower = logarithm - trace.log() / 2**_POWERS
    return (lower / 2).exp() * (1 - _ROOM), (logarithm / 2).exp() * (1 + _ROOM)
