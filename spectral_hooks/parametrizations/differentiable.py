"""Maps of singular values with their derivatives: into a band, by an SVD, and what a clip takes away, by a Gram matrix.

`projections.excess` takes the same away without a derivative: in chunks, written in place, and only of the singular values above
the level. A derivative needs all of them, and their vectors, kept.
"""

from __future__ import annotations

from math import inf
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..linalg.precision import without_autocast

#: Beyond, relative to the bound, squares of singular values have too few digits near it.
_HIGHEST = 30.0
#: Relative to the largest singular value: below, two vectors do not turn any faster.
_SMALLEST_SUM = 1e-6


def excess(matrices: Tensor, level: float) -> tuple[Tensor | None, float]:
    """What `min(Σ, level)` takes away from each matrix, and the largest singular value.

    Of matrices above `_HIGHEST` levels it is None, and the number not below it: their squares have too few digits near the level.
    """
    peak = float(matrices.detach().abs().amax())
    if peak > _HIGHEST * level:
        return None, peak
    tall = matrices.shape[-2] > matrices.shape[-1]
    excess, largest = ExcessWithGradient.apply((matrices.mT if tall else matrices) / level)[:2]
    peak = float(largest) * level
    if peak > _HIGHEST * level:
        return None, peak
    return (excess.mT if tall else excess) * level, peak


class ExcessWithGradient(torch.autograd.Function):
    """`U max(Σ - 1, 0) V*` of wide matrices, in half the time of an SVD: `h(X X*) X` with `h(σ²) = max(1 - 1 / σ, 0)`.

    In the basis `U` the derivative of `h` multiplies by the divided differences

        (h(σᵢ²) - h(σⱼ²)) / (σᵢ² - σⱼ²) = shareᵢⱼ / (max(σⱼ, 1) σᵢ (σᵢ + σⱼ)),   σᵢ ≥ σⱼ,

    where `shareᵢⱼ` of the interval `[σⱼ, σᵢ]` lies above one, so nothing is lost where they are close.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        squares, u = torch.linalg.eigh(matrices @ matrices.mH)
        s = squares.clamp(min=0).sqrt()
        turned = u.mH @ matrices
        return (u * (1 - 1 / s.clamp(min=1)).unsqueeze(-2)) @ turned, s.amax(), u, s, turned

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> Tensor:
        return without_autocast(ExcessWithGradient._adjoint, gradient, *ctx.saved_tensors)

    @staticmethod
    def _adjoint(gradient: Tensor, u: Tensor, s: Tensor, turned: Tensor) -> Tensor:
        larger = torch.maximum(s.unsqueeze(-1), s.unsqueeze(-2))
        smaller = torch.minimum(s.unsqueeze(-1), s.unsqueeze(-2))
        above, below = larger.clamp(min=1), smaller.clamp(min=1)
        length = larger - smaller
        share = torch.where(length > 0, (above - below) / length, (smaller > 1).to(s.dtype))
        differences = share / (below * above * (above + smaller))
        gradient = u.mH @ gradient
        inner = differences * (gradient @ turned.mH)
        outer = (1 - 1 / s.clamp(min=1)).unsqueeze(-1) * gradient
        return u @ (outer + (inner + inner.mH) @ turned)


def banded_values(
    matrices: Tensor, low: float, high: float, *, kept: tuple[float, float] | None = None, inward: bool = False
) -> Tensor:
    """`U f(Σ) V*` of a batch of matrices, with `f(σ) = min(max(σ, low), high)`.

    Args:
        matrices: `(batch, rows, columns)`, real or complex.
        low, high: the band.
        kept: those whose singular values all lie in this band stay as they are; by default the band itself.
        inward: let the gradient lead back inside from the ends of the band. `f` is constant beyond them, so there the derivative
            vanishes in every direction `U₁ H V₁*` with `H` Hermitian, where `U₁`, `V₁` belong to values above `high`. A descent
            along the positive part of the gradient's `H` leads inside, and is let through (for values below `low`, the negative
            part). What remains is zero just where the loss has no descent inside the ball.
    """
    return cast(Tensor, _BandedValues.apply(matrices, low, high, kept or (low, high), inward)[0])


class _BandedValues(torch.autograd.Function):
    """`banded_values`. Its derivative is, with `P = U* dX V` split into its Hermitian and its skew-Hermitian part `P₊ + P₋`,

        U (D ∘ P₊ + S ∘ P₋) V* + what lies outside of U and V,
        D = (f(σᵢ) - f(σⱼ)) / (σᵢ - σⱼ),   S = (f(σᵢ) + f(σⱼ)) / (σᵢ + σⱼ).

    `f` is linear in pieces, so `D` is the share of `[σⱼ, σᵢ]` that lies in the band, and nothing is lost where they are close.
    `D` and `S` are symmetric: the derivative is its own adjoint. Both are found in units in which nothing overflows.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        matrices: Tensor, low: float, high: float, kept: tuple[float, float], inward: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        # solvers raise on NaN; the scale carries it to the result
        scale = matrices.abs().amax().clamp(min=torch.finfo(matrices.real.dtype).tiny)
        scale = torch.where(scale < inf, scale, scale * torch.nan)
        u, units, vh = torch.linalg.svd(torch.nan_to_num(matrices / scale), full_matrices=False)
        s = units * scale
        outside = (s[..., :1] > kept[1]) | (s[..., -1:] < kept[0]) | s[..., :1].isnan()
        moved = torch.where(outside.unsqueeze(-1), (u * s.clamp(low, high).unsqueeze(-2)) @ vh, matrices)
        return moved, u, units, vh, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])
        ctx.band, ctx.inward = inputs[1:3], inputs[4]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None, None]:
        adjoint = without_autocast(_BandedValues._adjoint, gradient, *ctx.saved_tensors, *ctx.band, ctx.inward)
        return adjoint, None, None, None, None

    @staticmethod
    def _adjoint(
        gradient: Tensor, u: Tensor, units: Tensor, vh: Tensor, scale: Tensor, low: float, high: float, inward: bool
    ) -> Tensor:
        unit = scale.clamp(min=high)
        s = units * (scale / unit)
        bottom, top = low / unit, high / unit
        f = s.clamp(bottom, top)
        larger = torch.maximum(s.unsqueeze(-1), s.unsqueeze(-2))
        smaller = torch.minimum(s.unsqueeze(-1), s.unsqueeze(-2))
        length = larger - smaller
        shared = larger.clamp(bottom, top) - smaller.clamp(bottom, top)
        within = ((larger <= top) & (smaller >= bottom)).to(s.dtype)
        differences = torch.where((length > 0) & (within == 0), shared / length, within)
        floor = s[..., :1, None].clamp(min=bottom) * _SMALLEST_SUM + torch.finfo(s.dtype).tiny
        sums = (f.unsqueeze(-1) + f.unsqueeze(-2)) / (s.unsqueeze(-1) + s.unsqueeze(-2)).clamp(min=floor)
        if low == 0:  # S is then the share of an interval too, up to one where a sum vanishes
            sums = torch.where(larger <= top, torch.ones_like(sums), sums)
        p = u.mH @ gradient @ vh.mH
        inner = (differences + sums) / 2 * p + (differences - sums) / 2 * p.mH
        if inward:
            inner = inner + _positive_part(p, s > top)
            inner = inner - _positive_part(-p, s < bottom) if low else inner
        result = u @ inner @ vh
        rows, columns = gradient.shape[-2:]
        ratio = f / s.clamp(min=floor.squeeze(-1)) if low else torch.where(s <= top, torch.ones_like(s), top / s)
        if rows > columns:
            beside = gradient @ vh.mH - u @ p
            result = result + (beside * ratio.unsqueeze(-2)) @ vh
        elif rows < columns:
            beside = u.mH @ gradient - p @ vh
            result = result + (u * ratio.unsqueeze(-2)) @ beside
        return result


def _positive_part(p: Tensor, which: Tensor) -> Tensor:
    """The positive part of the Hermitian part of these rows and columns."""
    mask = which.to(p.dtype)
    # solvers raise on NaN, which the rest of a gradient shows
    block = torch.nan_to_num((p + p.mH) / 2) * mask.unsqueeze(-1) * mask.unsqueeze(-2)
    values, vectors = torch.linalg.eigh(block)
    return (vectors * values.clamp(min=0).unsqueeze(-2)) @ vectors.mH
