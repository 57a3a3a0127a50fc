"""Operator → weight of the same shape, whose norm obeys a bound or comes nearer to one.

A convolution's kernel must lie in two sets at once: the ball `‖F(θ)‖ ≤ c` at every frequency, and the kernels of `k` taps.
`clip` nears the closest such kernel and ends with a scaling by the certified norm, so that the promise holds whatever the
rounds have reached.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import inf, isfinite, prod, sqrt
from typing import cast

import torch
from torch import Tensor

from .group_norms import each, grid_norms, lattice_norms
from .intersection import clip_kernel, crop_kernel, grid_symbols
from .lattice import normalized
from .operators.arguments import on_kernel
from .operators.base import KernelOperator, float32_is_kept, is_number, is_whole
from .operators.conv import ConvOperator
from .spectrum import check_finite, spectral_norm

#: A projection: operator, largest norm → weight.
Projection = Callable[[KernelOperator, float], Tensor]

#: A norm this little above the bound is rounding, and counts as inside.
_TOLERANCE = 1e-6
#: The rounds of convolutions with more channels than this are in float32, if they are no more than these.
_SINGLE_FROM, _SINGLE_ROUNDS = 32, 8
#: Power steps that may show a matrix of this size to be outside, by this much at least: more than rounding.
_GLANCES, _LARGE, _SEEN = 6, 384, 1e-4
#: What a matrix-free norm may lack.
_MATRIX_FREE_ERROR = 1e-5
#: Where rounding to the stored dtype can add no more than this share of the bound, room is left for it, and nothing proven again.
_LITTLE_ROUNDING = 1e-4
#: What is measured in float32 may be too large by this.
_SINGLE_ERROR = 1e-6


@on_kernel
@torch.no_grad()
def clip(op: KernelOperator, max_norm: float = 1.0, *, rounds: int = 3) -> Tensor:
    """Clip the singular values at `max_norm`: near the closest weight, in Frobenius distance, with `‖A‖₂ ≤ max_norm`.

    For a matrix `W = U Σ Vᵀ`, and for every convolution that is one (a single tap after the polyphase form), exactly the
    closest: `U min(Σ, c) Vᵀ`. For other convolutions each of `rounds` clips the symbol's singular values on a frequency grid
    and crops to the kernel's taps (Sedghi, Gupta, Long 2019); the rounds are proximal steps on the dual of

        minimize ‖K - K₀‖²  subject to  ‖F(θ)‖₂ ≤ c on the grid.

    At the end the kernel is scaled by the certified norm. The groups of a grouped convolution are operators of their own: each is
    clipped and scaled by itself, and those that are inside stay as they are.

    Rounds are in float32 for more than 32 channels; on CUDA devices by matrix products alone where the error, which is measured,
    is below 5e-5 of the norm (`polynomial.py`), else by eigenvalue decompositions. Neither shows in the guarantee.

    Args:
        op: any operator. The lattice operator of a convolution bounds the layer at every input size.
        max_norm: the bound `c > 0`.
        rounds: more bring a convolution closer to the original; `O(N^d c³)` each, with `N = 4 (k - 1)` or `6 (k - 1)`, whatever
            the input size.

    Returns:
        A weight of the same shape, dtype and device. Guaranteed: the norm of the returned, stored values is at most `max_norm`
        (certified for matrices, lattice and circular operators, to 1e-5 for others), and they are never farther from the
        original than `rescale`'s, in half precision too. They are finite; a bound so small that no other weight of the dtype
        obeys it gives zeros.

        The very same values, bit for bit, if the norm is already at most `max_norm`: for matrices and circular operators. For
        lattice operators of several taps if it is at most `max_norm / (1 + r)`, with `r` the width of their certificate: 1e-3 for
        up to 8 channels (of the side that has fewer), 2e-3 for up to 64, 1e-2 for 320 and more. For other finite operators with
        `r` of 1e-5. In between they stay wherever the norm is proven within a limit of work, which can fail on a flat spectrum.

    Raises:
        ValueError: `max_norm` or `rounds` out of range, NaN or infinity in the weight, or a norm beyond the largest float64.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.clip(sh.DenseOperator(torch.diag(torch.tensor([3.0, 0.5]))), max_norm=1.0)
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])

    Sources: Sedghi, Gupta, Long 2019 (clip and crop); Wright, Nowak, Figueiredo 2009 (the proximal steps and their lengths);
    Amsel, Persson, Musco, Gower 2025 (the polynomials).
    """
    max_norm = check_max_norm(max_norm)
    if not is_whole(rounds) or rounds < 1:
        raise ValueError(f"`rounds` must be a positive int; got {rounds!r}.")
    return _outside(op, max_norm, lambda part: _clip(part, max_norm, rounds))


def _clip(op: KernelOperator, max_norm: float, rounds: int) -> Tensor:
    """`clip` of an operator all of whose groups are outside."""
    if len(op.canonical()) > 1 and op.is_finite and op.frequency_grid is None:
        # the level on the grid depends on the norm here, which every group has of its own
        return torch.cat([_clip(part, max_norm, rounds) for part in _groups(op)])
    kernel, scale = normalized(op.canonical())
    rough = _rough(op, kernel, rounds)
    clipped, peak = clip_kernel(op, kernel.float() if rough else kernel, max_norm / scale, rounds)
    clipped = _settled(op, op.from_canonical(clipped.to(kernel)), scale, max_norm)[0]
    moved = _distances(clipped, op, scale)
    if not op.is_finite or (op.frequency_grid is not None and prod(kernel.shape[3:]) == 1):
        # the norm is no smaller than the peak, so scaling leaves at most this share; and rounding is monotone, so at least this
        # distance, entry by entry
        share = (max_norm / scale / peak.to(kernel) * (1 + (_SINGLE_ERROR if rough else 1e-12))).clamp(max=1)
        least = _distances(_stored(normalized(op.weight.detach())[0], scale * share, op.weight), op, scale)
        if bool((moved <= least).all()):
            return clipped
    scaled = rescale(op, max_norm)
    nearer = (moved <= _distances(scaled, op, scale)).repeat_interleave(len(scaled) // len(moved)).to(scaled.device)
    return torch.where(nearer.reshape(-1, *(1,) * (scaled.ndim - 1)), clipped, scaled)


@on_kernel
@torch.no_grad()
def rescale(op: KernelOperator, max_norm: float = 1.0) -> Tensor:
    """Scale the weight into the ball: `W / max(1, ‖A‖₂ / c)` (Gouk et al. 2018), with the certified norm; every group by its own.

    Args:
        op: any operator.
        max_norm: the bound `c > 0`.

    Returns:
        A weight of the same shape, dtype and device; the bound is guaranteed, and what is inside stays bit for bit, as by `clip`.

    Raises:
        ValueError: `max_norm` out of range, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.rescale(sh.DenseOperator(torch.diag(torch.tensor([2.0, 0.5]))), max_norm=1.0)
        tensor([[1.0000, 0.0000],
                [0.0000, 0.2500]])
    """
    max_norm = check_max_norm(max_norm)
    return _outside(op, max_norm, lambda part: settle(part, part.weight.detach(), max_norm)[0])


@on_kernel
@torch.no_grad()
def band(op: KernelOperator, max_norm: float = 1.0, *, min_norm: float = 0.0) -> Tensor:
    """Keep the singular values in a band: `U clamp(Σ, low, high) Vᵀ`, the nearest such matrix (Frobenius).

    For convolutions of several taps at each frequency of the clip's grid, cropped to the taps, and scaled by the certified norm:
    the upper end is guaranteed as by `clip`, the lower end is approached and not guaranteed: no kernel of few taps may have it.

    Args:
        op: any operator.
        max_norm: the upper end `high > 0`.
        min_norm: the lower end `0 ≤ low ≤ high`. Zero singular values have directions that are no better than others: of those
            one set is taken.

    Raises:
        ValueError: an end out of range, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.band(sh.DenseOperator(torch.diag(torch.tensor([3.0, 0.8, 0.1]))), 1.0, min_norm=0.5)
        tensor([[1.0000, 0.0000, 0.0000],
                [0.0000, 0.8000, 0.0000],
                [0.0000, 0.0000, 0.5000]])
    """
    max_norm = check_max_norm(max_norm)
    if not is_number(min_norm) or not 0 <= min_norm <= max_norm:
        raise ValueError(f"`min_norm` must lie in [0, {max_norm}], the upper end; got {min_norm!r}.")
    if op.weight.numel() == 0:
        return _unchanged(op)
    return _settled(op, *_mapped(op, max_norm, lambda s, c: s.clamp(min_norm / max_norm * c, c)), max_norm)[0]


@on_kernel
@torch.no_grad()
def polar(op: KernelOperator, max_norm: float = 1.0) -> Tensor:
    """The nearest weight all of whose singular values are `max_norm`: `c U Vᵀ`, the polar factor.

    Exact for matrices. Convolutions as by `band`: the bound holds, the singular values are `max_norm` only approximately (a
    kernel of few taps is orthogonal only in special cases: see `parametrizations.orthogonal`).

    Args:
        op: any operator.
        max_norm: the bound `c > 0`.

    Raises:
        ValueError: `max_norm` out of range, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.polar(sh.DenseOperator(torch.tensor([[3.0, 4.0]])))
        tensor([[0.6000, 0.8000]])

    Source: Fan and Hoffman (1955); Higham (1986).
    """
    return band(op, max_norm, min_norm=max_norm)


@on_kernel
@torch.no_grad()
def soft_cap(op: KernelOperator, max_norm: float = 1.0, *, strength: float = 0.1) -> Tensor:
    """Press large singular values down by odd polynomials, `p₂ ∘ p₁`, with `p₁(x) = x - αx³`, `p₂(x) = x + αx³` in units of `c`.

    Small values stay as they are up to `3 α² x⁵`; those near and above the bound shrink. **Does not guarantee the bound**: called
    at every step it balances growth, as a weight decay for large singular values only. Values above `1 / √(3α)` bounds, where
    `p₁` turns, are out of its reach: use `clip` first.

    Args:
        op: any operator; convolutions act on the clip's grid and crop.
        max_norm: the unit `c > 0`.
        strength: `α ≥ 0`.

    Raises:
        ValueError: an argument out of range, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.soft_cap(sh.DenseOperator(torch.diag(torch.tensor([1.0, 0.1]))))
        tensor([[0.9729, 0.0000],
                [0.0000, 0.1000]])

    Source: Newhouse et al. (2025).
    """
    max_norm = check_max_norm(max_norm)
    _check_share("strength", strength)

    def capped(s: Tensor, c: float) -> Tensor:
        x = s / c
        x = x - strength * x**3
        return c * (x + strength * x**3)

    return _changed(op, max_norm, capped)


@on_kernel
@torch.no_grad()
def hammer(op: KernelOperator, max_norm: float = 1.0) -> Tensor:
    """Set the largest singular value to `max_norm` if it is larger: `W + (c - σ₁) u₁ v₁ᵀ`.

    **Does not guarantee the bound**: the second largest is left as it is. Convolutions act on the clip's grid and crop.

    Args:
        op: any operator.
        max_norm: `c > 0`.

    Raises:
        ValueError: `max_norm` out of range, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.hammer(sh.DenseOperator(torch.diag(torch.tensor([3.0, 2.0]))))
        tensor([[1., 0.],
                [0., 2.]])

    Source: Newhouse et al. (2025).
    """
    max_norm = check_max_norm(max_norm)

    def struck(s: Tensor, c: float) -> Tensor:
        return torch.cat([s[..., :1].clamp(max=c), s[..., 1:]], dim=-1)

    return _changed(op, max_norm, struck)


@on_kernel
@torch.no_grad()
def clipped_decay(op: KernelOperator, max_norm: float = 1.0, *, decay: float = 0.1, rounds: int = 3) -> Tensor:
    """Part of the way to the clip: `(1 - λ) W + λ clip(W)`.

    **Does not guarantee the bound**, but comes nearer by the factor `1 - λ` at every call.

    Args:
        op: any operator.
        max_norm: the bound `c > 0`.
        decay: `λ` in [0, 1].
        rounds: as for `clip`.

    Raises:
        ValueError: an argument out of range, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.clipped_decay(sh.DenseOperator(torch.tensor([[3.0]])), decay=0.5)
        tensor([[2.]])

    Source: Newhouse et al. (2025).
    """
    _check_share("decay", decay)
    clipped = clip(op, max_norm, rounds=rounds)
    # neither term overflows, as the difference may
    if clipped is op.weight:
        return clipped
    precise, limit = torch.promote_types(op.weight.dtype, torch.float32), torch.finfo(op.weight.dtype).max
    part = (1 - decay) * op.weight.detach().to(precise) + decay * clipped.to(precise)
    return part.clamp(-limit, limit).to(op.weight)


@on_kernel
@torch.no_grad()
def parseval(op: KernelOperator, max_norm: float = 1.0, *, strength: float = 0.01) -> Tensor:
    """One step towards orthogonality: `W ← (1 + β) W - β W Wᵀ W / c²`, so `σ ← σ + β σ (1 - σ² / c²)`.

    Draws all singular values below `c √(1 + 2 / β)` towards `c`. **Does not guarantee the bound.** Convolutions act on the clip's
    grid and crop.

    Args:
        op: any operator.
        max_norm: `c > 0`.
        strength: `β` in [0, 1].

    Raises:
        ValueError: an argument out of range, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.parseval(sh.DenseOperator(torch.tensor([[0.5]])), strength=0.5)
        tensor([[0.6875]])

    Source: Cissé et al. (2017).
    """
    max_norm = check_max_norm(max_norm)
    _check_share("strength", strength)
    return _changed(op, max_norm, lambda s, c: s + strength * s * (1 - (s / c) ** 2))


#: Those whose result is certified to obey the bound.
GUARANTEED = (clip, rescale, band, polar)
_OTHERS = (soft_cap, hammer, clipped_decay, parseval)


def named(projection: str | Projection) -> Projection:
    """The projection of this name, or the given function."""
    if callable(projection):
        return projection
    names = {function.__name__: function for function in (*GUARANTEED, *_OTHERS)}
    if projection not in names:
        raise ValueError(
            f"`projection` must be a function (operator, max_norm) -> weight or one of {', '.join(names)}; got {projection!r}."
        )
    return names[projection]


def _mapped(op: KernelOperator, max_norm: float, function: Callable[[Tensor, float], Tensor]) -> tuple[Tensor, float]:
    """A function of the singular values and the bound, of a matrix exactly, of a convolution on the clip's grid, cropped.

    Returns a float64 weight and what to multiply it with: the function is homogeneous, and sees numbers of order one.
    """
    check_finite(op.weight)
    kernel, scale = normalized(op.canonical())
    blocks = grid_symbols(op, kernel)
    u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
    # not the kernel and a change, which would cancel where the bound is far below the norm
    mapped = (u * function(s, max_norm / scale).unsqueeze(-2)) @ vh
    return op.from_canonical(crop_kernel(op, kernel, mapped)), scale


def _changed(op: KernelOperator, max_norm: float, function: Callable[[Tensor, float], Tensor]) -> Tensor:
    """`_mapped` in the dtype of the operator's weight, without a guarantee of its norm."""
    if op.weight.numel() == 0:
        return _unchanged(op)
    unit, scale = _mapped(op, max_norm, function)
    if not bool(torch.isfinite(unit).all()):
        raise ValueError(f"the norm is so far above `max_norm` {max_norm} that the result is not finite: use `clip` first.")
    scales = torch.full((len(op.canonical()),), scale, dtype=torch.float64, device=unit.device)
    return _stored(unit, _fitting(unit, scales, op.weight), op.weight)


def _check_share(name: str, value: float) -> None:
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"`{name}` must lie in [0, 1]; got {value!r}.")


def _unchanged(op: KernelOperator) -> Tensor:
    """The operator's own tensor, so that a caller can tell by identity that nothing was done."""
    return op.weight.detach() if op.weight.requires_grad else op.weight


def _outside(op: KernelOperator, max_norm: float, projection: Callable[[KernelOperator], Tensor]) -> Tensor:
    """The weight with the projection of the groups that are outside of the ball; the others stay as they are."""
    if op.weight.numel() == 0:
        return _unchanged(op)
    outside = _norms_above(op, max_norm) > max_norm * (1 + _TOLERANCE)
    if not outside.any():
        return _unchanged(op)
    if outside.all():
        return projection(op)
    weight, index = op.weight.detach().clone(), outside.nonzero().flatten().to(op.weight.device)
    weight.unflatten(0, (len(outside), -1))[index] = projection(_part(op, index)).unflatten(0, (len(index), -1))
    return weight


def _part(op: KernelOperator, groups: Tensor) -> KernelOperator:
    """The operator of these groups of a convolution alone."""
    part = cast(ConvOperator, copy.copy(op))
    part.weight = op.weight.detach().unflatten(0, (part.groups, -1))[groups].flatten(0, 1)
    part.groups = len(groups)
    return part


def _groups(op: KernelOperator) -> list[KernelOperator]:
    """Each group as an operator of its own."""
    return [_part(op, group) for group in torch.arange(len(op.canonical()), device=op.weight.device).split(1)]


def _rough(op: KernelOperator, kernel: Tensor, rounds: int) -> bool:
    """Whether rounds in float32, twice as fast, end as near: what few of them leave is far more than its rounding."""
    large = prod(kernel.shape[3:]) > 1 and min(kernel.shape[1:3]) > _SINGLE_FROM
    return large and rounds <= _SINGLE_ROUNDS and op.weight.dtype != torch.float64 and float32_is_kept()


def _distances(weight: Tensor, op: KernelOperator, scale: float) -> Tensor:
    """Frobenius distances to the operator's weight over `scale`, of every group, in float64."""
    weight, original = (x.to("cpu" if x.device.type == "mps" else x.device, torch.float64) / scale for x in (weight, op.weight))
    return torch.linalg.vector_norm((weight - original).unflatten(0, (len(op.canonical()), -1)).flatten(1), dim=1)


def _fitting(unit: Tensor, scales: Tensor, like: Tensor) -> Tensor:
    """The scales of the groups, smaller where `unit` times them would overflow in the dtype of `like`."""
    largest = unit.unflatten(0, (len(scales), -1)).abs().flatten(1).amax(1)
    return torch.minimum(scales, torch.finfo(like.dtype).max / largest)  # a zero divides to infinity


def _stored(unit: Tensor, scales: Tensor, like: Tensor) -> Tensor:
    """`unit` times the scale of each group, which is as by `_fitting`, in the dtype and on the device of `like`."""
    limit = torch.finfo(like.dtype).max  # a product may round to a little more
    product = unit.unflatten(0, (len(scales), -1)) * each(scales, unit.ndim)
    return product.flatten(0, 1).clamp(-limit, limit).to(like)


def check_max_norm(max_norm: float) -> float:
    """Refuse what is no positive, finite number."""
    if not is_number(max_norm) or not (isfinite(max_norm) and max_norm > 0):
        raise ValueError(f"`max_norm` must be a positive, finite number; got {max_norm!r}.")
    return float(max_norm)


def _norms_above(op: KernelOperator, target: float | None = None, rtol: float | None = None) -> Tensor:
    """For each group a number not below its norm; with a `target`, only so close as tells on which side of it the norm lies."""
    grid, kernel = op.frequency_grid, op.canonical()
    rtol = rtol or _rtol(kernel)
    if grid is not None and grid != ():
        return grid_norms(kernel, tuple(size for size, _ in grid))
    factor = op.lattice_factor
    if grid == () and target is not None and _seen_above(kernel, target):
        return torch.full((1,), inf, dtype=torch.float64)
    if not op.is_finite or grid == ():
        return factor * lattice_norms(kernel, rtol, None if target is None else target * (1 + _TOLERANCE) / factor)
    if target is not None:
        everywhere = factor * lattice_norms(kernel, rtol, target / factor)
        if bool((everywhere <= target).all()):
            return everywhere
    if len(kernel) == 1:
        # over a power of two, so that a norm between the smallest numbers of the dtype is not rounded to one of them
        unit, scale = normalized(op.weight.detach())
        dtype = torch.promote_types(op.weight.dtype, torch.float32)
        norm = float(spectral_norm(op.with_weight(unit.to(op.weight.device, dtype)))) * scale
        return torch.tensor([norm * (1 + _MATRIX_FREE_ERROR)], dtype=torch.float64)
    return torch.cat([_norms_above(part, target, rtol) for part in _groups(op)])


def _seen_above(kernel: Tensor, target: float) -> bool:
    """Whether some vector shows that the norm of a large matrix lies above the target: far cheaper than a failing proof."""
    if min(kernel.shape[1:]) < _LARGE or kernel.is_meta:
        return False
    matrix = kernel[0].detach().to(torch.promote_types(kernel.dtype, torch.float32 if float32_is_kept() else torch.float64))
    # the products of unit vectors with the matrix are in range where the matrix is; their squares need not be
    vector = _unit(matrix[torch.linalg.vector_norm(matrix, dim=1).argmax()])
    for _ in range(_GLANCES):
        image = matrix @ vector
        if inf > _length(image) > target * (1 + _SEEN):  # NaN is not
            # long sums in float32 lose digits
            vector = _exact(vector)
            return _length(_exact(matrix) @ vector) > target * _length(vector)
        vector = _unit(matrix.mT @ _unit(image))
    return False


def _exact(x: Tensor) -> Tensor:
    """In float64, which Apple's GPUs do not have."""
    return x.detach().to("cpu" if x.device.type == "mps" else x.device, torch.float64)


def _length(vector: Tensor) -> float:
    """The norm of a vector, of any scale, as a float64."""
    return float(torch.linalg.vector_norm(_exact(vector)))


def _unit(vector: Tensor) -> Tensor:
    """The vector, of any scale, over its norm."""
    long = _exact(vector)
    return (long / torch.linalg.vector_norm(long)).to(vector)


def _rtol(kernel: Tensor) -> float:
    """Relative width of the certificate, which the final scaling may take too much: 1e-3, up to 1e-2 where it is dear.

    A clipped kernel has its largest singular value at many frequencies; proving that takes some `1 / rtol` of them, at the cube
    of the channels each.
    """
    size = min(kernel.shape[1:3])
    return 1e-3 if size <= 8 else min(2e-3 * max(size / 64, 1.0), 1e-2)


def settle(op: KernelOperator, weight: Tensor, max_norm: float, rtol: float | None = None) -> tuple[Tensor, float]:
    """The weight in the dtype of the operator's, scaled down until the stored values obey the bound, and what bounds their norm.

    By certificates of width `rtol`, chosen by the number of channels if None. A bound so small that no other weight of that dtype
    obeys it gives zeros.
    """
    return _settled(op, weight, 1.0, max_norm, rtol)


def _settled(op: KernelOperator, unit: Tensor, scale: float, max_norm: float, rtol: float | None = None) -> tuple[Tensor, float]:
    """`settle` of `unit` times `scale`, which together may be beyond the range of any dtype."""
    unit, power = normalized(unit)
    kernel, info = op.canonical(), torch.finfo(op.weight.dtype)
    groups, spacing = len(kernel), info.tiny * info.eps
    fine = info.eps < _TOLERANCE
    measured = op.is_finite and op.frequency_grid is None
    scales = torch.full((groups,), scale * power, dtype=torch.float64, device=unit.device)
    if fine and prod(kernel.shape[3:]) == 1 and not measured:
        # a clipped matrix has many equal singular values, which a proof minds less than a measurement
        stored = _stored(unit, _fitting(unit, scales * (1 - 4 * info.eps), op.weight), op.weight)
        if bool((lattice_norms(op.with_weight(stored).canonical(), 1e-3, max_norm / op.lattice_factor) < inf).all()):
            return stored, max_norm
    for attempt in range(1, 1000):
        scales = _fitting(unit, scales, op.weight)
        stored = _stored(unit, scales, op.weight)
        norms = _norms_above(op.with_weight(stored), rtol=rtol)
        norm = float(norms.amax())
        if norm <= max_norm:
            return stored, norm
        if not isfinite(norm):
            raise ValueError(
                "the norm of `weight` exceeds the largest float64: scale the weight down first; it is left as it is."
            )
        norms = norms.to(unit.device)
        outside = norms > max_norm
        shares = torch.where(outside, scales / norms, 1.0)
        unit = (unit.unflatten(0, (groups, -1)) * each(shares, unit.ndim)).flatten(0, 1)
        scales = torch.where(outside, max_norm, scales)
        parts = unit.unflatten(0, (groups, -1)).flatten(1)
        # what rounding every entry can add to the norm, relative to the bound: at any frequency the Frobenius norm of all that is
        # added, times the root of the number of taps
        lengths = (info.eps + 1e-15) * torch.linalg.vector_norm(parts, dim=1) + spacing * sqrt(parts.shape[1]) / max_norm
        rounding = op.lattice_factor * sqrt(prod(kernel.shape[3:])) * lengths + 1e-12
        if fine and not measured and bool((rounding[outside] <= _LITTLE_ROUNDING).all()):
            scales = torch.where(outside, scales * (1 - rounding), scales)
            return _stored(unit, _fitting(unit, scales, op.weight), op.weight), max_norm
        # among the smallest numbers of the dtype the steps are as coarse as the entries
        grain = (spacing / scales / parts.abs().amax(1)).clamp(min=info.eps)
        margin = (attempt * grain * (4 if fine else 0.25)).clamp(max=0.5)
        scales = torch.where(outside, scales * (1 - margin), scales)
    raise RuntimeError(f"no {op.weight.dtype} weight near this one has norm at most {max_norm}.")
