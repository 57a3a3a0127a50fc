"""Weights whose singular values are moved into a band on their way into the forward: `U Σ Vᵀ ↦ U f(Σ) Vᵀ`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, isfinite, prod, sqrt
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor, is_functorch_wrapped_tensor
from torch.autograd.function import once_differentiable

from ..linalg.krylov import matrix_norm
from ..linalg.precision import full_precision
from ..linalg.scaling import check_finite
from ..linalg.symbols import half_plane, product, symbol
from ..norms.bounds.cosine_grid import cosine_grid
from ..norms.lattice import lattice_norm
from ..operators import as_operator
from ..operators.base import KernelOperator
from ..projections.arguments import check_max_norm
from .modules import At, Memory, exported, may_follow, start_inside, unrecorded, without_autocast
from .remove import register
from .rescaled import Rescaled, bounded, unit_scale

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
#: In units of the weight's largest entry: a level beyond which nothing is outside, and one for which float32 has too few digits.
_ABOVE_ALL, _FINEST = 1e30, 1e-20
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
    In training the parameter follows: a forward that finds `W` outside puts the clip in its place, and the gradient is that of
    the layer's weight (projected gradient descent, as with `SpectralClip`). Elsewhere (evaluation, frozen weights, `torch.func`,
    FSDP, compiled matrices) `W` stays, and the gradient is that of the clip and of the bound, finite where singular values
    coincide, and of a matrix's clip with the part of each backward's gradient added that leads inside, which the derivative
    itself has not.

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
        NotImplementedError: in a forward, a kernel of several taps under `torch.func.vmap`.
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
    register(layer, Clipped(bounded(layer, input_size), 0.0, max_norm))
    start_inside(layer)
    return layer


def banded(layer: Layer, low: float = 1.0, high: float = 1.0) -> Layer:
    """Keep all singular values of a layer's weight between `low` and `high`, whatever its parameter becomes, differentiably.

        weight = U min(max(Σ, low), high) Vᵀ,   W = U Σ Vᵀ,

    registered by `torch.nn.utils.parametrize`, for matrices and convolutions that are one (a single tap after the polyphase form,
    like 1×1 and patches). With `low = high` it is the polar factor, scaled.

    Guaranteed: the `min(rows, columns)` singular values of the matrix lie in the band, up to the rounding of the stored dtype,
    and so do those of the layer on the inputs that it reads. In training the parameter follows into the band and has the gradient
    of the layer's weight, as for `clipped`. Elsewhere the gradient is that of the map, finite where singular values coincide; it
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
    register(layer, Clipped(op, float(low), float(high)))
    start_inside(layer)
    return layer


class Clipped(nn.Module):
    """The parametrization that `clipped` and `banded` register.

    Args:
        op: the layer's operator; of its weight only the shape is kept.
        low, high: where singular values end. A positive `low` is for kernels of one tap.
    """

    def __init__(self, op: KernelOperator, low: float, high: float) -> None:
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
        if may_follow(self, weight):
            return self._followed(weight)
        # neither what is remembered nor the parameter is to be written to through `layer.weight`
        return exported(lambda weight: self._memory(self, weight, self._moved), weight).clone()

    def _followed(self, weight: Tensor) -> Tensor:
        """What is made of the weight, and the parameter becomes that, with its gradient: projected gradient descent."""
        with torch.no_grad():
            value = self._moved(weight.detach())
            # behind the back of autograd, since an earlier forward may still need the weight, whose values it leaves inside
            if bool(value.isfinite().all()):
                weight.data.copy_(value)
        return At.apply(weight, value.clone())

    def right_inverse(self, weight: Tensor) -> Tensor:
        # the parameter would share the storage of what is assigned
        return weight.clone()

    def _moved(self, weight: Tensor) -> Tensor:
        if self._is_matrix:
            return without_autocast(lambda weight: _banded_matrix(self._wide(weight), self.low, self.high, weight.dtype), weight)
        if is_functorch_wrapped_tensor(weight) and is_batchedtensor(weight):
            raise NotImplementedError(
                "clipped looks at the values of a kernel with several taps, which torch.func.vmap does not show: "
                "use rescaled, which holds the same bound, or call the layers one after the other."
            )
        return unrecorded(lambda weight: _clipped_kernel(self._wide(weight), self.high, weight, self._into_ball), weight)

    def _wide(self, weight: Tensor) -> KernelOperator:
        return self.op.with_weight(weight.to(torch.promote_types(weight.dtype, torch.float32)))


def _banded_matrix(op: KernelOperator, low: float, high: float, dtype: torch.dtype) -> Tensor:
    """For a canonical kernel of one tap; in `dtype` it is still inside."""
    kernel = op.canonical()
    high = high / op.lattice_factor
    found = torch.finfo(kernel.dtype).eps * _ROUNDINGS
    rounding = found + (torch.finfo(dtype).eps / 2 if dtype != kernel.dtype else 0.0)
    # of every entry, so by the Frobenius norm at most the root of the rank as much in norm
    root = sqrt(min(kernel.shape[1:3]))
    room = 1 + root * rounding
    # about zero numbers lie no closer than this, and every entry may be off by half of it
    grain = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2 * sqrt(prod(kernel.shape[1:3]))
    inner = min(low * room, high), max(high / room - grain, min(low * room, high))
    # what is half as near to the end stays as it is: a matrix that was moved is not moved again by its rounding
    kept = (
        sqrt(low * inner[0]) if inner[0] < high else low / room,
        max(sqrt(high * inner[1]), high / (1 + root * found)) if inner[1] > low else high * room,
    )
    moved = banded_values(kernel.flatten(2), *inner, kept=kept, inward=True)
    return op.from_canonical(moved.reshape(kernel.shape)).to(dtype)


@torch.compiler.disable  # decides by values
@full_precision
def _clipped_kernel(op: KernelOperator, max_norm: float, weight: Tensor, into_ball: Rescaled) -> Tensor:
    """The clip on a grid, cropped to the taps and scaled; the `weight` itself where that is proven to be inside at once."""
    check_finite(weight)
    if not weight.any():
        return weight
    # entries of order one, for squares and sums; no norm of such a kernel comes near the largest level
    unit = float(unit_scale(op.weight))
    level = min(max_norm / op.lattice_factor * unit, _ABOVE_ALL)
    if level < _FINEST:  # float32 has no digits for both
        op = op.with_weight(op.weight.double())
    kernel = op.canonical() * unit
    taps = tuple(kernel.shape[3:])
    sizes = tuple(max(_OVERSAMPLING * (k - 1), 1) for k in taps)
    theta, counts = half_plane(sizes, kernel)
    symbols = symbol(kernel, theta)
    excess, peak = _excess(symbols, level)
    goal = level * (1 + _TOLERANCE)
    if peak <= level * (1 + _SURELY_OUTSIDE) and lattice_norm(kernel, _INSIDE_RTOL, goal).upper <= goal:
        return weight
    # far outside what is left would be lost in the rounding of what is taken away
    part = (banded_values(symbols, 0.0, level) if excess is None else excess).flatten(1)
    # back to the taps: the mean over the frequencies of the real part
    angles = product([torch.arange(k) for k in taps], theta) @ theta.T
    shares = counts / prod(sizes)
    cropped = ((angles.cos() * shares) @ part.real - (angles.sin() * shares) @ part.imag).T.reshape(kernel.shape)
    inner = op.from_canonical(cropped if excess is None else kernel - cropped) / unit
    return into_ball(inner.to(weight.dtype))


def _certified(op: KernelOperator) -> Tensor:
    """A bound of the norm, smooth but where another frequency takes over."""
    if op.is_finite:
        return cosine_grid(op, oversampling=_CERTIFIED_OVERSAMPLING)
    kernel = op.canonical()
    found = lattice_norm(kernel, _RTOL)
    theta = found.theta[None]
    block = symbol(kernel[found.group : found.group + 1].to(theta), theta)[0, 0]
    # the search compares values in float32, whose rounding is not smooth
    upper = max(found.upper, found.value * (1 + _RTOL + _TOLERANCE))
    if not found.value:
        return (op.weight * 0).sum()
    return matrix_norm(block) * (upper / found.value * op.lattice_factor)


def _excess(matrices: Tensor, level: float) -> tuple[Tensor | None, float]:
    """What `min(Σ, level)` takes away from each matrix, and the largest singular value.

    Of matrices above `_HIGHEST` levels it is None, and the number not below it: their squares have too few digits near the level.
    """
    peak = float(matrices.detach().abs().amax())
    if peak > _HIGHEST * level:
        return None, peak
    tall = matrices.shape[-2] > matrices.shape[-1]
    excess, largest = _Excess.apply((matrices.mT if tall else matrices) / level)[:2]
    peak = float(largest) * level
    if peak > _HIGHEST * level:
        return None, peak
    return (excess.mT if tall else excess) * level, peak


class _Excess(torch.autograd.Function):
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
        return _without_autocast(_Excess._adjoint, gradient, *ctx.saved_tensors)

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
        adjoint = _without_autocast(_BandedValues._adjoint, gradient, *ctx.saved_tensors, *ctx.band, ctx.inward)
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


def _without_autocast(adjoint: Callable[..., Tensor], gradient: Tensor, *others: Any) -> Tensor:
    """An adjoint, undisturbed by autocast around `backward`."""
    return without_autocast(lambda gradient: adjoint(gradient, *others), gradient)
