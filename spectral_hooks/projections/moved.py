"""How far matrices can have moved from where they were certified: `‖W‖ ≤ ‖V‖ + ‖W - V‖`, so most steps need no decomposition."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, log2
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg.host import read
from ..linalg.precision import at_least_float32, exact, float32_is_kept, full_precision, widest
from ..linalg.schatten import frobenius_bounds, schatten_bounds
from .matrices import Clipped, bounds_of

#: Above its bound by this, relative to it, a norm still counts as inside.
_TOLERANCE = 1e-6
#: Bounds within the first power of two of 1 need no other unit; those beyond the second are not handled in float32.
_MODERATE, _SINGLE_RANGE = 20, 64


class Moved(NamedTuple):
    """What the norms `(n,)` of a batch are proven not to exceed now, for which `‖W - V‖_F` was not enough, and bounds of `W - V`.

    In float64 and bool on the host; the norm is infinite where it was not proven to be inside.
    """

    norms: Tensor
    sharply: Tensor
    far: Tensor


@full_precision
@torch.no_grad()
def moved_norms(
    batches: Sequence[Tensor],
    known: Sequence[Clipped],
    max_norm: float | Sequence[Tensor],
    sharply: Sequence[Tensor] | None = None,
) -> list[Moved]:
    """Which matrices `W` are still inside for what is known of earlier ones `V`: `‖W‖ ≤ ‖V‖ + ‖W - V‖ ≤ max_norm (1 + 1e-6)`.

    The second term by `‖D‖_F`, and where that is too large by `‖(D Dᵀ)²‖_F^¼`: one product with the transpose and a small one.

    Args:
        batches: matrices `(n, rows, columns)`, one batch a shape.
        known: for each batch the earlier matrices, in any dtype that holds them exactly, and what their norms are proven not to
            exceed. The matrices must be those that were certified: their copies, not the ones that move.
        max_norm: the bound, or for each batch those of its matrices, `(n,)`.
        sharply: for which matrices the Frobenius norm was not enough the last time, as returned: bounded sharply at once.

    Returns:
        For each batch what its norms are proven not to exceed, infinite if that is not inside, and what `sharply` is to be
        the next time.

    Cost: three passes over the entries, and the products where needed. The host reads once for all batches, and once more where
        the Frobenius norm suffices no longer.

    Example:
        >>> import torch
        >>> from spectral_hooks.projections.matrices import Clipped
        >>> from spectral_hooks.projections.moved import moved_norms
        >>> known = Clipped(0.5 * torch.eye(3)[None], torch.tensor([0.5], dtype=torch.float64))
        >>> [moved] = moved_norms([0.6 * torch.eye(3)[None]], [known], max_norm=1.0)
        >>> bool(0.6 <= moved.norms <= 0.7)
        True
    """
    if not batches:
        return []
    sizes = [len(batch) for batch in batches]
    bounds = torch.cat(bounds_of(batches, max_norm))
    units = [_unit(c) for c in bounds.split(sizes)]
    moves = _differences(batches, [last.weights for last in known], units)
    unit, rank = (_each(x, sizes) for x in (units, [min(move.shape[1:]) for move in moves]))
    norms = torch.cat([last.norms for last in known])
    room = bounds * (1 + _TOLERANCE) - norms
    # `‖D‖_F ≤ √rank ‖D‖`: beyond that no other bound can do, and without room only what did not move at all is inside
    reach = room.where(room > 2 * _TOLERANCE * bounds, -1.0) * rank.sqrt()
    sharp = torch.zeros(len(norms), dtype=torch.bool) if sharply is None else torch.cat(list(sharply)) & (reach > 0)
    lengths = [frobenius_bounds(move) for move in moves]
    which = sharp.split(sizes)
    found = read([torch.cat(lengths), *_sharp(moves, lengths, which)])
    far = found[0] * unit
    moved = far if len(found) == 1 else torch.where(sharp, torch.cat(found[1:]) * unit, far)
    late = ~sharp & ~(far <= room) & (far <= reach)
    if late.any():
        moved = torch.where(late, torch.cat(read(_sharp(moves, lengths, late.split(sizes)))) * unit, moved)
    inside = torch.where(moved <= room, norms + moved, inf)
    sharp = (sharp | late) & ~(far <= room) & (far <= reach)
    return [Moved(*each) for each in zip(inside.split(sizes), sharp.split(sizes), moved.split(sizes), strict=True)]


def _unit(bounds: Tensor) -> float:
    """A power of two near the bounds of a batch, in which its moves are measured, so that squares neither vanish nor overflow."""
    power = round(log2(float(bounds[0]))) if len(bounds) else 0
    return 2.0**power if abs(power) > _MODERATE else 1.0


def _each(values: Sequence[float], sizes: Sequence[int]) -> Tensor:
    """The value of its batch for each matrix."""
    return torch.tensor([x for x, size in zip(values, sizes, strict=True) for _ in range(size)], dtype=torch.float64)


def _sharp(moves: Sequence[Tensor], lengths: Sequence[Tensor], which: Sequence[Tensor]) -> list[Tensor]:
    """Sharp bounds of some matrices of each batch, in float64, and zeros for its others; nothing if it is none of any batch."""
    chosen = [some.nonzero().flatten() for some in which]
    if not any(map(len, chosen)):
        return []
    bounds = []
    for move, length, index in zip(moves, lengths, chosen, strict=True):
        if len(index) == len(move):
            bounds.append(schatten_bounds(move, length))
            continue
        bound = torch.zeros_like(length)
        if len(index):
            index = index.to(move.device)
            bound.index_copy_(0, index, schatten_bounds(move.index_select(0, index), length.index_select(0, index)))
        bounds.append(bound)
    return bounds


def _differences(now: Sequence[Tensor], then: Sequence[Tensor], units: Sequence[float]) -> list[Tensor]:
    """`W - V` over the units, with no more rows than columns: in float32 where that rounds each entry once, by little."""
    kept = float32_is_kept() and all(abs(log2(unit)) <= _SINGLE_RANGE for unit in units)
    dtypes = [at_least_float32(w.dtype) if kept and widest(w.device) == torch.float64 else torch.float64 for w in now]
    pairs = [
        (exact(w), exact(v)) if d == torch.float64 else (w.to(d), v.to(w.device, d))
        for w, v, d in zip(now, then, dtypes, strict=True)
    ]
    moves = list(torch._foreach_sub([w for w, _ in pairs], [v for _, v in pairs])) if pairs else []
    if any(unit != 1 for unit in units):
        torch._foreach_div_(moves, list(units))
    return [move if move.shape[1] <= move.shape[2] else move.mT for move in moves]
