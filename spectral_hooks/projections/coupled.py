"""The coupled soft cap: an odd polynomial that sends all singular values up to a proven bound of them below another.

With `‖W‖ ≤ t` and `k = t / c` the map `p₂ ∘ p₁`, `p₁(σ) = σ - ασ³`, `p₂(σ) = σ + ασ³` in units of `c`, has its largest value on
`[0, k]` at `k`, as long as `k ≤ 1 / √(3α)`. The least `α` that makes this value 1 couples the cap to the excess (Newhouse et al.
2025). In units of `t` instead, `x = α k²` and `Z = W Wᵀ / t²`,

    p₂(p₁(W)) = W - R(Z) W,    R(Z) = 3x² Z² - 3x³ Z³ + x⁴ Z⁴,    R(1) = 1 - 1 / k,    0 ≤ x ≤ ⅓,

so all that is done to `W` is as small as the excess, and so is the rounding of it. `x = ⅓` takes away 19/81: up to `k = 81/62`.
"""

from __future__ import annotations

from math import floor, log2, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg.host import is_at_hand
from ..linalg.precision import at_least_float32, device_with_float64, exact, float32_is_kept, full_precision
from ..linalg.rounded import frobenius_bounds, gram, norm_bounds, product, product_gamma, unit_roundoff

#: A bound this little above the largest norm counts as inside.
TOLERANCE = 5e-7
#: The largest share that one cap takes away, at `x = ⅓`, and the largest ratio of norm to bound that it takes to the bound.
_MOST_TAKEN = 19 / 81
REACH = 1 / (1 - _MOST_TAKEN)
#: Newton steps to all digits; a coefficient is then raised by so much, relatively, for the rounding of the solution.
_STEPS, _RAISE = 4, 1e-13
#: Keeps zero from being divided by zero.
_TINY = 1e-40
#: Bounds within the first power of two of 1 need no other unit; those beyond the second are not handled in float32.
_MODERATE, _SINGLE_RANGE = 16, 125
#: The largest units, as powers of two.
_MOST_POWER = {torch.float32: 126, torch.float64: 1022}
#: What entries whose squares vanish can add, and rounding in float64.
_VANISHING = 1e-12
#: Where the rounding of the last product, relative to the norm, may be more than this, the products are in float64.
_MOST_ROUNDING = 0.25
#: What rounding to storage adds to a norm, with room: a share of an eps of an entry for every root of rows and of columns.
_STORAGE_ERROR = 0.35
#: Squarings for the bound of what rounding to storage has added.
_SQUARINGS = 2


class Capped(NamedTuple):
    """Matrices `(n, rows, columns)`, what their norms are proven not to exceed, `(n,)` in float64, and which were capped."""

    weights: Tensor
    norms: Tensor
    acted: Tensor


def coefficient(taken: Tensor) -> Tensor:
    """The least `x ≥ 0` with `3x² - 3x³ + x⁴ = taken`, from 0 to 19/81, or a number above it by rounding; in float64.

    Newton's method: the left side is convex up to `x = ⅓`, so after the first step all are above the solution. The start is off
    by a hundredth at most, so each step doubles the digits from there on.
    """
    first = (taken / 3 + _TINY).sqrt()
    x = first * (1 + first * (0.5 + 0.45 * first))
    for _ in range(_STEPS):
        square = x * x
        x = x - (square * (3 - 3 * x + square) - taken) / (x * (6 - 9 * x + 4 * square))
    return (x * (1 + _RAISE)).clamp(0, 1 / 3)


def share_left(sigma: Tensor, x: Tensor | float) -> Tensor:
    """`1 - R(σ²)`: what the cap leaves of singular values in units of their bound."""
    z = sigma * sigma
    return 1 - x * x * z * z * (3 - 3 * x * z + x * x * z * z)


@full_precision
@torch.no_grad()
def cap_matrices(weights: Tensor, norms: Tensor, max_norm: float) -> Capped:
    """Matrices whose proven bounds exceed `max_norm`, by the coupled soft cap at most `max_norm`; the others bit for bit.

    `W - R(W Wᵀ / t²) W` with the least `R` for which `t (1 - R(1)) = max_norm`; above `t = 81/62 max_norm` divided besides. The
    small singular values stay up to `3α² σ⁵`, the order of all and the singular vectors stay, up to rounding.

    Args:
        weights: `(n, rows, columns)`; they are not changed.
        norms: numbers `t` that their norms are proven not to exceed, `(n,)` in float64.
        max_norm: the bound.

    Returns:
        The stored weights, in their dtype. Guaranteed: their norms are at most the numbers that come with them, whatever the
        order of the sums: at most `max_norm` for those that were capped, for in every step rounding is bounded and made room for;
        within 5e-7 of it a bound counts as inside and the matrix stays. Where a bound is not finite the matrix stays too.

    Cost: two products of the shape of `W` and two of the smaller side, in the precision of the weights; for half precision one
        more, to bound what rounding to storage has added. Nothing waits for a device that has float64.

    Example:
        >>> import torch
        >>> from spectral_hooks.projections.coupled import cap_matrices
        >>> weight, norm = torch.diag(torch.tensor([1.1, 0.2]))[None], torch.tensor([1.1], dtype=torch.float64)
        >>> capped = cap_matrices(weight, norm, 1.0)
        >>> capped.weights.diagonal(dim1=1, dim2=2), bool(capped.norms <= 1)
        (tensor([[1.0000, 0.2000]]), True)

    Source: Newhouse et al. (2025).
    """
    bound = min(max_norm, torch.finfo(weights.dtype).max)
    norms = norms.to(device_with_float64(weights.device))
    over = norms.isfinite() & (norms > bound * (1 + TOLERANCE))
    if is_at_hand(norms) and not over.any():
        return Capped(weights, norms, over)
    dtype = _dtype(weights, bound)
    scale = _scale(norms, over, bound).clamp(max=2.0 ** _MOST_POWER[dtype])
    values = _over(weights, scale, dtype)
    wide = values.shape[1] <= values.shape[2]
    squares = _Squares.of(values if wide else values.mT, norms / scale)
    level = bound / scale
    over &= squares.top > level * (1 + TOLERANCE)
    margin = _storage_error(weights, squares.length * (level / squares.top).clamp(max=1), scale, dtype).clamp(max=level / 2)
    factor, matrix = _taken_away(squares, level, over, margin)
    rest = product(matrix, values)[0] if wide else product(values, matrix)[0]
    capped = rest.addcmul_(values, factor.to(values)[:, None, None])
    stored, reached = _stored(capped, weights, scale, level - margin, level)
    if not (is_at_hand(over) and over.all()):
        stored = torch.where(over.to(stored.device)[:, None, None], stored, weights)
    return Capped(
        stored,
        torch.where(over, torch.minimum(reached * scale, norms.new_tensor(bound)), torch.minimum(norms, squares.top * scale)),
        over,
    )


class _Squares(NamedTuple):
    """`G = W Wᵀ` and `G²` as they are computed, in a unit, with the bounds of what they are made of."""

    gram: Tensor
    squared: Tensor
    #: Bounds of `‖W‖` and of `‖W‖_F`.
    top: Tensor
    length: Tensor
    #: Of the rounding of `G`, and `γ` of that of `G²`.
    error: Tensor
    gamma: float

    @classmethod
    def of(cls, values: Tensor, norms: Tensor) -> _Squares:
        """Of matrices with no more rows than columns, whose norms are proven not to exceed these numbers."""
        squares, rounding = gram(values)
        squared, gamma = gram(squares)
        trace = exact(squares.diagonal(dim1=1, dim2=2)).sum(-1) * (1 + 2 * rounding) + _VANISHING
        length = torch.minimum(trace.sqrt(), norms * values.shape[1] ** 0.5)
        error = rounding * length.square()
        # `‖W‖⁴ ≤ ‖G²‖_F`, at no cost: where a weight was replaced it says more than how far it is from the last one
        fourth = (frobenius_bounds(squared) + gamma * (norms * length + error).square()).sqrt() + error
        return cls(squares, squared, torch.minimum(norms, fourth.sqrt() + _VANISHING), length, error, gamma)


def _taken_away(squares: _Squares, level: Tensor, over: Tensor, margin: Tensor) -> tuple[Tensor, Tensor]:
    """`a` and `-M = -a R(Z)` for which `a W - M W` is the cap, `1` and zero where nothing is to be done.

    `a = (1 - h) ρ`, with `ρ` to divide by what one cap does not reach, and `h` for the rounding of all of it and for a margin.
    """
    top = squares.top
    near = ((top - level) / top).clamp(0, _MOST_TAKEN) * over
    kept, x = 1 - near, coefficient(near)
    divided = torch.where(over, level / (top * kept), 1.0)
    room = _rounding(squares, x) / kept + margin / level
    factor = torch.where(over, (1 - room).clamp(min=0) * divided, 1.0)
    ratio = x / top.square()
    scaled = factor * ratio.square() * over
    fourth, sixth, eighth = (
        each.to(squares.gram)[:, None, None] for each in (-3 * scaled, 3 * scaled * ratio, -scaled * ratio * ratio)
    )
    inner = torch.addcmul(squares.gram * sixth, squares.squared, eighth)
    inner.diagonal(dim1=1, dim2=2).add_(fourth[:, :, 0])
    return factor, product(squares.squared, inner)[0]


def _rounding(squares: _Squares, x: Tensor) -> Tensor:
    """By how much, in units of `t`, `W - R(Z) W` as computed may be off, if `Z` is off by no more than a quarter.

    With `q = 3x² (1 + 2x)` no less than the norm of `3x² - 3x³ Z + x⁴ Z²`, and `q √rows` than its Frobenius norm, as computed.
    """
    dtype, (_, rows, _) = squares.gram.dtype, squares.gram.shape
    u, gamma, root = unit_roundoff(dtype), product_gamma(rows, dtype), sqrt(rows)
    length, off = squares.length / squares.top, squares.error / squares.top.square()
    size = length + off  # ‖Z‖_F
    off_squared = squares.gamma * size.square()
    size_squared = 1.25 * size + off_squared  # ‖Z²‖_F
    # of Z² times that, of the entries of that, of Z² within, of Z with the derivative of R; and of the product with W
    each = gamma * (root + 1.3 * length) * size_squared + 12 * u * root + 1.2 * off_squared + 2.8 * off
    return each * (3 * x * x * (1 + 2 * x)) + 8 * u * length + 2 * _VANISHING


def _storage_error(weights: Tensor, length: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding to storage is expected to add to a norm, with room; where no other dtype is stored, the most that it can.

    Of matrices with this `‖W‖_F`, over the scale.
    """
    rows, columns = weights.shape[1:]
    info = torch.finfo(weights.dtype)
    if weights.dtype == dtype:
        return info.smallest_normal * info.eps * sqrt(rows * columns) / scale
    entry = length / sqrt(rows * columns) * info.eps + info.smallest_normal * info.eps / scale
    return _STORAGE_ERROR * entry * (rows**0.5 + columns**0.5)


def _stored(capped: Tensor, weights: Tensor, scale: Tensor, kept: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """What is computed in the dtype of the weights, and what bounds its norm over the scale if that of `capped` is `kept`."""
    info, given = torch.finfo(weights.dtype), scale.to(capped)[:, None, None]
    if weights.dtype == capped.dtype:
        return (capped if _is_one(scale) else capped.mul_(given)), level.clone()
    stored = (capped * given).clamp_(-info.max, info.max).to(weights)
    off = stored.to(capped) / given - capped
    added = norm_bounds(off, frobenius_bounds(off), squarings=_SQUARINGS)
    reached = kept + added
    fits = reached <= level
    if is_at_hand(fits) and fits.all():
        return stored, reached
    # by as much smaller as any rounding takes, to storage and of the two products before
    most = (unit_roundoff(weights.dtype) + 2 * unit_roundoff(capped.dtype)) * frobenius_bounds(capped)
    most += info.smallest_normal * info.eps * sqrt(capped[0].numel()) / scale
    share = ((level - most) / kept).clamp(0, 1)
    smaller = (capped * (share * scale).to(capped)[:, None, None]).clamp_(-info.max, info.max).to(weights)
    return torch.where(fits.to(stored.device)[:, None, None], stored, smaller), torch.where(fits, reached, level)


def _dtype(weights: Tensor, bound: float) -> torch.dtype:
    """In which the products are: float32 where it is that, has the range, and the room for its rounding is small."""
    single, rows = at_least_float32(weights.dtype), min(weights.shape[1:])
    roomy = product_gamma(rows, single) * rows <= _MOST_ROUNDING
    return single if float32_is_kept() and abs(log2(bound)) <= _SINGLE_RANGE and roomy else torch.float64


def _scale(norms: Tensor, over: Tensor, bound: float) -> Tensor:
    """The unit of every matrix: a power of two near the bound, larger by another where the norm may be far above it."""
    power = floor(log2(bound)) if abs(log2(bound)) > _MODERATE else 0
    beyond = (torch.where(over, norms / bound, 1.0).log2().floor() - 1).clamp(min=0)
    return (beyond + power).exp2()


def _over(weights: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in this unit: nothing is rounded."""
    values = exact(weights) if dtype == torch.float64 else weights.to(dtype)
    return values if _is_one(scale) else values / scale.to(values)[:, None, None]


def _is_one(scale: Tensor) -> bool:
    """Whether this is known to be 1 for every matrix."""
    return is_at_hand(scale) and bool((scale == 1).all())
