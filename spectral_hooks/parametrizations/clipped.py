"""Weights whose singular values are moved into a band on their way into the forward: `U Σ Vᵀ ↦ U f(Σ) Vᵀ`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import is_batchedtensor, is_functorch_wrapped_tensor

from ..linalg.krylov import matrix_norm
from ..linalg.precision import at_least_float32, full_precision, without_autocast
from ..linalg.scaling import check_finite, unit_scale
from ..linalg.symbols import symbol
from ..norms.bounds import cosine_grid
from ..norms.bracket import TOLERANCE
from ..norms.lattice import lattice_norm
from ..operators import as_operator
from ..operators.base import KernelOperator, is_number
from ..projections.arguments import check_max_norm
from ..projections.frequencies import FrequencyGrid
from .arguments import check_reachable
from .differentiable import banded_values, excess
from .following import At, may_follow, start_inside
from .memory import Memory
from .recording import exported, unrecorded
from .remove import register
from .rescaled import Rescaled, bounded_operator, shown_size

Layer = TypeVar("Layer", bound=nn.Module)

#: Frequencies of the clip's grid per axis, as a multiple of the kernel's degree `k - 1`.
_OVERSAMPLING = 4
#: Relative width of the certificate that the crop is scaled by.
_RTOL = 3e-3
#: The same of the search for a proof that nothing needs to be done, and where not to begin with it.
_INSIDE_RTOL, _SURELY_OUTSIDE = 1e-2, 1e-4
#: The same for finite operators, by a grid: at most 1 % above the norm in two dimensions.
_CERTIFIED_OVERSAMPLING = 16
#: In units of the weight's largest entry: a level beyond which nothing is outside, and one for which float32 has too few digits.
_ABOVE_ALL, _FINEST = 1e30, 1e-20
#: Roundings of a product `U f(Σ) Vᵀ`, each of the size of the working precision, that its norm may be off by.
_ROUNDINGS = 8


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
    max_norm = check_max_norm(max_norm)
    register(layer, Clipped(bounded_operator(layer, input_size), max_norm))
    start_inside(layer)
    return layer


def banded(layer: Layer, max_norm: float = 1.0, *, min_norm: float | None = None) -> Layer:
    """Keep all singular values of a layer's weight between `min_norm` and `max_norm`, whatever its parameter becomes.

        weight = U min(max(Σ, min_norm), max_norm) Vᵀ,   W = U Σ Vᵀ,

    registered by `torch.nn.utils.parametrize`, differentiable, for matrices and convolutions that are one (a single tap after the
    polyphase form, like 1×1 and patches). By default the band is a single value: all singular values are `max_norm`, and the
    weight is the polar factor, scaled.

    Guaranteed: the `min(rows, columns)` singular values of the matrix lie in the band, up to the rounding of the stored dtype,
    and so do those of the layer on the inputs that it reads. In training the parameter follows into the band and has the gradient
    of the layer's weight, as for `clipped`. Elsewhere the gradient is that of the map, finite where singular values coincide; it
    grows like `min_norm / σ` where the weight loses rank, up to a factor of 1e6.

    Args:
        layer: a linear layer, or a convolution whose patches do not overlap, without padding; changed in place.
        max_norm: the upper end of the band, positive.
        min_norm: its lower end, `0 ≤ min_norm ≤ max_norm`; None for `max_norm` itself. With 0 this is `clipped`.

    Returns:
        The layer. `layer.weight = V` keeps `V` up to a relative 1e-5 in float32 if it is inside, else gives the nearest weight
        inside.

    Cost: an SVD in training forwards; none in evaluation without gradients while `W` stays the same.

    Raises:
        ValueError: `max_norm` or `min_norm` is out of range; the weight is pruned or carries a parametrization from elsewhere.
        NotImplementedError: a convolution with overlapping patches: after the crop to its taps the lower bound cannot be kept.
        TypeError: as `as_operator`.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> from spectral_hooks.parametrizations.clipped import banded
        >>> layer = banded(torch.nn.Linear(20, 30), 2.0, min_norm=0.5)
        >>> values = sh.singular_values(sh.as_operator(layer))
        >>> bool(0.5 - 1e-6 < values.min() and values.max() < 2 + 1e-6)
        True
    """
    max_norm = check_max_norm(max_norm)
    min_norm = max_norm if min_norm is None else min_norm
    if not is_number(min_norm) or not 0 <= min_norm <= max_norm:
        raise ValueError(f"`min_norm` must lie in [0, {max_norm}], up to `max_norm`, or be None for that; got {min_norm!r}.")
    op = as_operator(layer)
    if min_norm:
        check_reachable("max_norm" if min_norm == max_norm else "min_norm", min_norm, op.dtype)
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
    register(layer, Clipped(op, max_norm, float(min_norm)))
    start_inside(layer)
    return layer


class Clipped(nn.Module):
    """The parametrization that `clipped` and `banded` register.

    Args:
        op: the layer's operator; of its weight only the shape is kept.
        max_norm, min_norm: where singular values end. A positive `min_norm` is for kernels of one tap.
    """

    def __init__(self, op: KernelOperator, max_norm: float, min_norm: float = 0.0) -> None:
        super().__init__()
        self.op = op.with_weight(torch.empty_like(op.weight, device="meta", requires_grad=False))
        self.max_norm = max_norm
        self.min_norm = min_norm
        self._is_matrix = prod(op.canonical().shape[3:]) == 1
        self._into_ball = Rescaled(op, max_norm, _certified)
        self._memory = Memory()

    def __repr__(self) -> str:
        band = f", min_norm={self.min_norm}" if self.min_norm else ""
        return f"Clipped(max_norm={self.max_norm}{band}{shown_size(self.op)})"

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
            band = self.min_norm, self.max_norm
            return without_autocast(lambda weight: _banded_matrix(self._wide(weight), *band, weight.dtype), weight)
        # the compiler knows neither question, and there is no such tensor then
        if not torch.compiler.is_compiling() and is_functorch_wrapped_tensor(weight) and is_batchedtensor(weight):
            raise NotImplementedError(
                "clipped looks at the values of a kernel with several taps, which torch.func.vmap does not show: "
                "use rescaled, which holds the same bound, or call the layers one after the other."
            )
        return unrecorded(lambda weight: _clipped_kernel(self._wide(weight), self.max_norm, weight, self._into_ball), weight)

    def _wide(self, weight: Tensor) -> KernelOperator:
        return self.op.with_weight(weight.to(at_least_float32(weight.dtype)))


def _banded_matrix(op: KernelOperator, low: float, high: float, dtype: torch.dtype) -> Tensor:
    """For a canonical kernel of one tap; in `dtype` it is still inside."""
    kernel = op.canonical()
    # where the dtype has no number for the bound, below its largest is inside too
    high = min(high / op.lattice_factor, torch.finfo(kernel.dtype).max / 2)
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
        sqrt(low) * sqrt(inner[0]) if inner[0] < high else low / room,
        max(sqrt(high) * sqrt(inner[1]), high / (1 + root * found)) if inner[1] > low else high * room,
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
    sizes = tuple(max(_OVERSAMPLING * (k - 1), 1) for k in kernel.shape[3:])
    grid = FrequencyGrid(sizes, kernel)
    symbols = grid.symbols(kernel)
    over, peak = excess(symbols, level)
    goal = level * (1 + TOLERANCE)
    if peak <= level * (1 + _SURELY_OUTSIDE) and lattice_norm(kernel, _INSIDE_RTOL, goal).upper <= goal:
        return weight
    # far outside what is left would be lost in the rounding of what is taken away
    clipped = grid.adjoint(banded_values(symbols, 0.0, level)) if over is None else kernel - grid.adjoint(over)
    inner = op.from_canonical(clipped) / unit
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
    upper = max(found.upper, found.value * (1 + _RTOL + TOLERANCE))
    if not found.value:
        return (op.weight * 0).sum()
    return matrix_norm(block) * (upper / found.value * op.lattice_factor)
