"""Weights whose singular values are moved into a band on their way into the forward: `U Σ Vᵀ ↦ U f(Σ) Vᵀ`."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite, prod, sqrt
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..bounds import cosine_grid
from ..krylov import matrix_norm
from ..lattice import lattice_norm
from ..operators import as_operator
from ..operators.base import LinearOperator, full_precision
from ..operators.symbols import half_plane, product, symbol
from ..projections import check_max_norm
from ..spectrum import check_finite
from .modules import Memory
from .remove import register
from .rescaled import Rescaled
from .stiefel import in_full_precision

Layer = TypeVar("Layer", bound=nn.Module)

#: Frequencies of the clip's grid per axis, as a multiple of the kernel's degree `k - 1`.
_OVERSAMPLING = 4
#: Relative width of the certificate that the crop is scaled by.
_RTOL = 3e-3
#: The same of the search for a proof that nothing needs to be done, and where not to begin with it.
_INSIDE_RTOL, _SURELY_OUTSIDE = 1e-2, 1e-4
#: The same for finite operators, by a grid: at most 1 % above the norm in two dimensions.
_CERTIFIED_OVERSAMPLING = 16
#: Beyond, relative to the bound, squares of singular values have too few digits near it.
_HIGHEST = 30.0
#: A norm this little above the bound is rounding, and counts as inside.
_TOLERANCE = 1e-6
#: Roundings of a product `U f(Σ) Vᵀ`, each of the size of the working precision, that its norm may be off by.
_ROUNDINGS = 8
#: Relative to the largest singular value: below, two vectors do not turn any faster.
_SMALLEST_SUM = 1e-6


def clipped(layer: Layer, max_norm: float = 1.0, *, input_size: int | Sequence[int] | None = None) -> Layer:
    """Clip the singular values of a layer's weight at `max_norm` on its way into the forward, differentiably.

        weight = U min(Σ, c) Vᵀ,   W = U Σ Vᵀ,

    registered by `torch.nn.utils.parametrize`. Exact for matrices and for convolutions that are one (a single tap after the
    polyphase form, like 1×1 and patches). Of any other kernel the symbol is clipped at every frequency of a grid of `4 (k - 1)`
    points per axis, cropped to the kernel's taps, and at last scaled by `min(1, c / bound)`, since the crop brings that above `c`
    again. The bound is a search's, 0.3 % above the norm; for finite operators `bounds.cosine_grid`, 1 % above. That is near
    the closest kernel inside, not the closest; `projections.clip` comes nearer.

    Guaranteed (certified): `‖A‖₂ ≤ max_norm` for the lattice operator, so at every input size; for the stored dtype too.
    Gradients are exact, that of the clip and that of the bound, and finite where singular values coincide.

    Args:
        layer: a linear or convolutional layer, changed in place.
        max_norm: the bound `c > 0`.
        input_size: the spatial size at which the bound is to hold, for reflect and replicate padding; others need none.

    Returns:
        The layer. A plain checkpoint loads into it as before. `layer.weight = V` keeps `V` if it is inside: a matrix up to a
        relative 1e-5 in float32, another kernel bit for bit, unless it is so close to the bound that no proof is found. Otherwise
        it gives the clip of `V`.

    Cost: in training forwards an SVD of the matrix, or the eigenvectors of `(4 (k - 1))^d / 2` complex matrices of the channels,
    and the bound, which takes most of the time: many times the convolution itself. `rescaled` holds the same bound for a small
    share of that. None in evaluation without gradients while `W` stays the same, but for the comparison of `W` with a copy of it.

    Raises:
        ValueError: `max_norm` is no positive number; the padding needs an `input_size`; the weight is pruned or carries a
            parametrization from elsewhere; in a forward, NaN or infinity in a kernel.
        TypeError, NotImplementedError: as `as_operator`.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> from spectral_hooks.parametrizations.clipped import clipped
        >>> layer = torch.nn.Linear(2, 2)
        >>> layer.weight.data = torch.diag(torch.tensor([3.0, 0.5]))
        >>> clipped(layer).weight.detach()
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])

    Source: Sedghi, Gupta and Long (2019), for the clip of the symbol.
    """
    check_max_norm(max_norm)
    op = _bounded(layer, input_size)
    return register(layer, Clipped(op, 0.0, max_norm))


def banded(layer: Layer, low: float = 1.0, high: float = 1.0) -> Layer:
    """Keep all singular values of a layer's weight between `low` and `high`, whatever its parameter becomes, differentiably.

        weight = U min(max(Σ, low), high) Vᵀ,   W = U Σ Vᵀ,

    registered by `torch.nn.utils.parametrize`, for matrices and convolutions that are one (a single tap after the polyphase form,
    like 1×1 and patches). With `low = high` it is the polar factor, scaled.

    Guaranteed: the `min(rows, columns)` singular values of the matrix lie in the band, up to the rounding of the stored dtype,
    and so do those of the layer on the inputs that it reads. The gradient is exact and finite where singular values coincide; it
    grows like `low / σ` where the weight loses rank, up to a factor of 1e6.

    Args:
        layer: a linear layer, or a convolution whose patches do not overlap, without padding; changed in place.
        low, high: `0 ≤ low ≤ high`, `high` positive.

    Returns:
        The layer. `layer.weight = V` keeps `V` up to a relative 1e-5 in float32 if it is inside, else gives the nearest weight
        inside.

    Cost: an SVD in training forwards; none in evaluation without gradients while `W` stays the same.

    Raises:
        ValueError: `low` and `high` are no band; the weight is pruned or carries a parametrization from elsewhere.
        NotImplementedError: a convolution with overlapping patches: after the crop to its taps the lower bound cannot be kept.
        TypeError: as `as_operator`.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> from spectral_hooks.parametrizations.clipped import banded
        >>> layer = banded(torch.nn.Linear(20, 30), low=0.5, high=2.0)
        >>> values = sh.singular_values(sh.as_operator(layer))
        >>> bool(0.5 - 1e-6 < values.min() and values.max() < 2 + 1e-6)
        True
    """
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and isfinite(v) for v in (low, high)):
        raise ValueError(f"`low` and `high` must be finite numbers; got {low!r} and {high!r}.")
    if not 0 <= low <= high or high == 0:
        raise ValueError(f"`low` and `high` must obey 0 <= low <= high and high > 0; got low={low!r} and high={high!r}.")
    op = as_operator(layer)
    if prod(op.canonical().shape[3:]) > 1:
        raise NotImplementedError(
            f"{type(layer).__name__} has overlapping patches: what is raised at every frequency falls again with the crop to the "
            "kernel's taps, so no lower bound can be promised. Use skew, cayley or orthogonal for singular values of one, or "
            "clipped for the upper bound alone."
        )
    if any(before or after for before, after in getattr(op, "padding", ())):
        raise NotImplementedError(
            f"{type(layer).__name__} pads patches that do not overlap, so those at the border are cut or repeated and leave the "
            "band. Set padding=0, or use clipped for the upper bound alone."
        )
    return register(layer, Clipped(op, float(low), float(high)))


def _bounded(layer: nn.Module, input_size: int | Sequence[int] | None) -> LinearOperator:
    """The layer's operator on the lattice, or at the size without which it has no bound."""
    op = as_operator(layer)
    try:
        op.lattice_factor  # noqa: B018 (asked for its error)
    except ValueError:
        if input_size is None:
            raise
        op = as_operator(layer, input_size)
    return op


class Clipped(nn.Module):
    """The parametrization that `clipped` and `banded` register.

    Args:
        op: the layer's operator; of its weight only the shape is kept.
        low, high: where singular values end. A positive `low` is for kernels of one tap.
    """

    def __init__(self, op: LinearOperator, low: float, high: float) -> None:
        super().__init__()
        self.op = op.with_weight(torch.empty_like(op.weight, device="meta", requires_grad=False))
        self.low = low
        self.high = high
        self._is_matrix = prod(op.canonical().shape[3:]) == 1
        self._into_ball = Rescaled(op, high, _certified)
        self._memory = Memory()

    def __repr__(self) -> str:
        return f"Clipped(max_norm={self.high})" if self.low == 0 else f"Clipped(low={self.low}, high={self.high})"

    def forward(self, weight: Tensor) -> Tensor:
        # neither what is remembered nor the parameter is to be written to through `layer.weight`
        return self._memory(self, weight, self._moved).clone()

    def right_inverse(self, weight: Tensor) -> Tensor:
        # the parameter would share the storage of what is assigned
        return weight.clone()

    def _moved(self, weight: Tensor) -> Tensor:
        op = self.op.with_weight(weight.to(torch.promote_types(weight.dtype, torch.float32)))
        if self._is_matrix:
            return _banded_matrix(op, self.low, self.high, weight.dtype)
        return _clipped_kernel(op, self.high, weight, self._into_ball)


def _banded_matrix(op: LinearOperator, low: float, high: float, dtype: torch.dtype) -> Tensor:
    """For a canonical kernel of one tap; in `dtype` it is still inside."""
    kernel = op.canonical()
    high = high / op.lattice_factor
    rounding = torch.finfo(kernel.dtype).eps * _ROUNDINGS
    if dtype != kernel.dtype:
        rounding += torch.finfo(dtype).eps / 2
    # of every entry, so by the Frobenius norm at most the root of the rank as much in norm
    room = 1 + sqrt(min(kernel.shape[1:3])) * rounding
    low, high = min(low * room, high), max(high / room, min(low, high))
    moved = in_full_precision(lambda matrices: _BandedValues.apply(matrices, low, high))(kernel.flatten(2))
    return op.from_canonical(moved.reshape(kernel.shape)).to(dtype)


@torch.compiler.disable  # decides by values
@full_precision
def _clipped_kernel(op: LinearOperator, max_norm: float, weight: Tensor, into_ball: Rescaled) -> Tensor:
    """The clip on a grid, cropped to the taps and scaled; the `weight` itself where that is proven to be inside at once."""
    check_finite(weight)
    kernel = op.canonical()
    level = max_norm / op.lattice_factor
    taps = tuple(kernel.shape[3:])
    sizes = tuple(max(_OVERSAMPLING * (k - 1), 1) for k in taps)
    theta, counts = half_plane(sizes, kernel)
    excess, peak = _excess(symbol(kernel, theta), level)
    goal = level * (1 + _TOLERANCE)
    if peak <= level * (1 + _SURELY_OUTSIDE) and lattice_norm(kernel, _INSIDE_RTOL, goal).upper <= goal:
        return weight
    excess = excess.flatten(1)
    # back to the taps: the mean over the frequencies of the real part
    angles = product([torch.arange(k) for k in taps], theta) @ theta.T
    shares = counts / prod(sizes)
    cropped = (angles.cos() * shares) @ excess.real - (angles.sin() * shares) @ excess.imag
    return into_ball((op.weight - op.from_canonical(cropped.T.reshape(kernel.shape))).to(weight.dtype))


def _certified(op: LinearOperator) -> Tensor:
    """A bound of the norm, smooth but where another frequency takes over."""
    if op.is_finite:
        return cosine_grid(op, oversampling=_CERTIFIED_OVERSAMPLING)
    kernel = op.canonical()
    found = lattice_norm(kernel, _RTOL)
    theta = found.theta[None]
    block = symbol(kernel[found.group : found.group + 1].to(theta), theta)[0, 0]
    # the search compares values in float32, whose rounding is not smooth
    upper = max(found.upper, found.value * (1 + _RTOL + _TOLERANCE))
    return matrix_norm(block) * (upper / found.value * op.lattice_factor)


def _excess(matrices: Tensor, level: float) -> tuple[Tensor, float]:
    """What `min(Σ, level)` takes away from each matrix, and the largest singular value or something above `_HIGHEST` levels."""
    peak = float(matrices.detach().abs().amax())
    if peak <= _HIGHEST * level:
        tall = matrices.shape[-2] > matrices.shape[-1]
        excess, largest = _Excess.apply((matrices.mT if tall else matrices) / level)
        peak = float(largest) * level
    if peak > _HIGHEST * level:
        return matrices - _BandedValues.apply(matrices, 0.0, level), peak
    return (excess.mT if tall else excess) * level, peak


class _Excess(torch.autograd.Function):
    """`U max(Σ - 1, 0) V*` of wide matrices, in half the time of an SVD: `h(X X*) X` with `h(σ²) = max(1 - 1 / σ, 0)`.

    In the basis `U` the derivative of `h` multiplies by the divided differences

        (h(σᵢ²) - h(σⱼ²)) / (σᵢ² - σⱼ²) = shareᵢⱼ / (max(σⱼ, 1) σᵢ (σᵢ + σⱼ)),   σᵢ ≥ σⱼ,

    where `shareᵢⱼ` of the interval `[σⱼ, σᵢ]` lies above one, so nothing is lost where they are close.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> tuple[Tensor, Tensor]:
        squares, u = torch.linalg.eigh(matrices @ matrices.mH)
        s = squares.clamp(min=0).sqrt()
        turned = u.mH @ matrices
        ctx.save_for_backward(u, s, turned)
        largest = s.amax()
        ctx.mark_non_differentiable(largest)
        return (u * (1 - 1 / s.clamp(min=1)).unsqueeze(-2)) @ turned, largest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Tensor:
        u, s, turned = ctx.saved_tensors
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


class _BandedValues(torch.autograd.Function):
    """`U f(Σ) V*` of a batch of matrices, with `f(σ) = min(max(σ, low), high)`; those inside already stay as they are.

    Its derivative is, with `P = U* dX V` split into its Hermitian and its skew-Hermitian part `P₊ + P₋`,

        U (D ∘ P₊ + S ∘ P₋) V* + what lies outside of U and V,
        D = (f(σᵢ) - f(σⱼ)) / (σᵢ - σⱼ),   S = (f(σᵢ) + f(σⱼ)) / (σᵢ + σⱼ).

    `f` is linear in pieces, so `D` is the share of `[σⱼ, σᵢ]` that lies in the band, and nothing is lost where they are close.
    `D` and `S` are symmetric: the derivative is its own adjoint.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor, low: float, high: float) -> Tensor:
        # solvers raise on NaN; the scale carries it to the result
        scale = matrices.abs().amax().clamp(min=torch.finfo(matrices.real.dtype).tiny)
        scale = torch.where(scale < inf, scale, scale * torch.nan)
        u, s, vh = torch.linalg.svd(torch.nan_to_num(matrices / scale), full_matrices=False)
        s = s * scale
        ctx.save_for_backward(u, s, vh)
        ctx.band = low, high
        outside = (s[..., :1] > high) | (s[..., -1:] < low) | s[..., :1].isnan()
        return torch.where(outside.unsqueeze(-1), (u * s.clamp(low, high).unsqueeze(-2)) @ vh, matrices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        u, s, vh = ctx.saved_tensors
        low, high = ctx.band
        f = s.clamp(low, high)
        larger = torch.maximum(s.unsqueeze(-1), s.unsqueeze(-2))
        smaller = torch.minimum(s.unsqueeze(-1), s.unsqueeze(-2))
        length = larger - smaller
        shared = larger.clamp(low, high) - smaller.clamp(low, high)
        within = ((larger <= high) & (smaller >= low)).to(s.dtype)
        differences = torch.where((length > 0) & (within == 0), shared / length, within)
        floor = s[..., :1, None].clamp(min=low) * _SMALLEST_SUM + torch.finfo(s.dtype).tiny
        sums = (f.unsqueeze(-1) + f.unsqueeze(-2)) / (s.unsqueeze(-1) + s.unsqueeze(-2)).clamp(min=floor)
        if low == 0:  # S is then the share of an interval too, up to one where a sum vanishes
            sums = torch.where(larger <= high, torch.ones_like(sums), sums)
        p = u.mH @ gradient @ vh.mH
        inner = (differences + sums) / 2 * p + (differences - sums) / 2 * p.mH
        result = u @ inner @ vh
        rows, columns = gradient.shape[-2:]
        ratio = f / s.clamp(min=floor.squeeze(-1)) if low else torch.where(s <= high, torch.ones_like(s), high / s)
        if rows > columns:
            beside = gradient @ vh.mH - u @ p
            result = result + (beside * ratio.unsqueeze(-2)) @ vh
        elif rows < columns:
            beside = u.mH @ gradient - p @ vh
            result = result + (u * ratio.unsqueeze(-2)) @ beside
        return result, None, None
