"""What is proven of the norms of matrices that move, on their device: from how far they are from where they were, and by factors.

`‖W‖ ≤ ‖V‖ + ‖W - V‖`, by products alone, in every step; and now and then a Cholesky factor of `s² I - W Wᵀ` in float64, which
exists only if `‖W‖ ≤ s`. Nothing waits for a device that has float64.
"""

from __future__ import annotations

from math import floor, inf, log2

import torch
from torch import Tensor

from ..linalg.host import is_at_hand
from ..linalg.precision import at_least_float32, exact, float32_is_kept, full_precision, widest
from ..linalg.rounded import frobenius_bounds, norm_bounds
from ..linalg.symbols import symmetric_product

#: Squarings of `D Dᵀ`: too large by at most the 16th root of the rank.
_SQUARINGS = 2
#: Bounds within the first power of two of 1 need no other unit; those beyond the second are not handled in float32.
_MODERATE, _SINGLE_RANGE = 16, 64
#: Krylov steps for the estimate of a norm, and by how much more than that, relatively, factors are asked to prove.
_KRYLOV, _MARGINS = 10, (1e-3, 1e-2, 5e-2)
#: How often what Krylov steps have found is squared until its largest value stands alone.
_POWERS = 8
_TINY = 1e-300


@full_precision
@torch.no_grad()
def moved_bounds(now: Tensor, then: Tensor, max_norm: float, room: Tensor | None = None) -> Tensor:
    """Numbers not below `‖W - V‖₂`, by `‖(D Dᵀ)⁴‖_F^⅛`; NaN or infinite where `W` is not finite.

    Args:
        now, then: matrices `W` and `V`, `(n, rows, columns)`, in one dtype.
        max_norm: that which they matter to: what adds 1e-12 of it does not.
        room: where `‖D‖_F` is below that, `(n,)`, it will do; no products are made if it is for all, and the host knows.

    Returns:
        `(n,)` in float64, on a device that has it.
    """
    unit, dtype = _unit(max_norm), _dtype(now, max_norm)
    if dtype == torch.float64:
        now, then = exact(now), exact(then)
    moves = now.to(dtype) - then.to(dtype)
    if unit != 1:
        moves /= unit
    lengths = frobenius_bounds(moves)
    if not (is_at_hand(lengths) and lengths.isfinite().all()):  # squares of what is far away overflow
        largest = exact(torch.linalg.vector_norm(moves, inf, dim=(1, 2))) * moves[0].numel() ** 0.5
        lengths = torch.where(lengths.isfinite(), lengths, largest * (1 + 1e-6))
    if room is not None and is_at_hand(lengths) and bool((lengths * unit <= room).all()):
        return lengths * unit
    return norm_bounds(moves, lengths, squarings=_SQUARINGS) * unit


@full_precision
@torch.no_grad()
def certified_norms(weights: Tensor, max_norm: float) -> Tensor:
    """Numbers that the norms of matrices are proven not to exceed, most often by a thousandth above them; else infinite.

    Krylov steps tell from below how large the norm is, Cholesky factors in float64 of `s² I - W Wᵀ` that nothing exceeds `s`.

    Args:
        weights: `(n, rows, columns)`.
        max_norm: the unit.

    Returns:
        `(n,)` in float64, on a device that has it.
    """
    values = exact(weights) / 2.0 ** floor(log2(max_norm))
    values = values if values.shape[1] <= values.shape[2] else values.mT
    gram = symmetric_product(values)
    squares = gram.diagonal(dim1=1, dim2=2).sum(-1)
    finite = squares.isfinite()
    gram, squares = torch.where(finite[:, None, None], gram, 0.0), torch.where(finite, squares, 0.0)
    estimate = _largest(gram).clamp(min=0).sqrt()
    proven = torch.full_like(estimate, inf)
    for margin in reversed(_MARGINS):
        claim = estimate * (1 + margin) + 1e-6
        room = claim.square() - _proof_rounding(values.shape[1], values.shape[2], claim.square(), squares)
        shifted = -gram
        shifted.diagonal(dim1=1, dim2=2).add_(room[:, None])
        failed = torch.linalg.cholesky_ex(shifted).info
        proven = torch.where((failed == 0) & (room > 0) & finite, claim, proven)
    return proven * 2.0 ** floor(log2(max_norm))


def _largest(gram: Tensor) -> Tensor:
    """Estimates of the largest eigenvalues from below, by a Krylov space, without a solver that reads what it has found."""
    rows = gram.shape[1]
    steps = min(_KRYLOV, rows)
    basis = gram.new_zeros(*gram.shape[:2], steps)
    # from a start that no matrix of a model is blind to
    fresh = gram @ torch.arange(1, rows + 1, device=gram.device, dtype=gram.dtype).mul(1.618).cos()[:, None]
    for step in range(steps):
        for _ in range(2):
            fresh = fresh - basis @ (basis.mT @ fresh)
        basis[:, :, step : step + 1] = fresh / torch.linalg.vector_norm(fresh, dim=1, keepdim=True).clamp(min=_TINY)
        fresh = gram @ basis[:, :, step : step + 1]
    small = basis.mT @ (gram @ basis)
    power = small
    for _ in range(_POWERS):
        power = power / power.diagonal(dim1=1, dim2=2).sum(-1).clamp(min=_TINY)[:, None, None]
        power = power @ power
    trace = power.diagonal(dim1=1, dim2=2).sum(-1).clamp(min=_TINY)
    return (power * small).sum((1, 2)) / trace


def _proof_rounding(rows: int, columns: int, squared: Tensor, squares: Tensor) -> Tensor:
    """What rounding in float64 can add to the largest eigenvalue of `G = W Wᵀ`, as a Cholesky factor of `s² I - G` sees it.

    `‖ΔG‖ ≤ γ_columns ‖W‖_F²` in any order of the sums; the factor of `A` is that of `A + ΔA` with `‖ΔA‖ ≤ γ_{rows + 1} tr A`, and
    `tr A ≤ rows s²` (Demmel 1989; Rump 2006); four times that, as blocks may be inverted.
    """
    u = torch.finfo(torch.float64).eps / 2
    return 1.01 * u * ((columns + rows + 4) * squares + (4 * (rows + 2) * rows + 8) * squared)


def _unit(bound: float) -> float:
    """A power of two near the bound, in which moves are measured, so that squares neither vanish nor overflow."""
    power = floor(log2(bound))
    return 2.0**power if abs(power) > _MODERATE else 1.0


def _dtype(weights: Tensor, bound: float) -> torch.dtype:
    """In which differences are taken: float32 where that rounds each entry once, by little."""
    single = float32_is_kept() and widest(weights.device) == torch.float64 and abs(log2(bound)) <= _SINGLE_RANGE
    return at_least_float32(weights.dtype) if single else torch.float64
