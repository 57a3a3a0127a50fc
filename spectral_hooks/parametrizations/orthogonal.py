"""Orthogonal layers: matrices on the Stiefel manifold, and explicit kernels that are orthogonal at every frequency."""

from __future__ import annotations

import logging
from math import prod
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ..linalg.precision import at_least_float32, in_full_precision
from ..operators import ConvOperator, DenseOperator, as_operator
from ..projections.arguments import check_max_norm
from .arguments import check_reachable
from .block_conv import Blocks, compose
from .nearest_blocks import decompose
from .remove import check_assigned, register
from .stiefel import MAPS, origin, polar_factor

Layer = TypeVar("Layer", bound=nn.Module)

_logger = logging.getLogger("spectral_hooks")


def orthogonal(layer: Layer, max_norm: float = 1.0, *, orthogonal_map: str = "cayley") -> Layer:
    """Make a layer orthogonal, times a gain: all its singular values are `max_norm`, whatever its parameters become.

        weight = c Q,   QᵀQ = I  or  QQᵀ = I,

    for parameters of zero and of 1e30 alike.

    **Linear**: `QᵀQ = I` for at least as many outputs as inputs, else `QQᵀ = I`; exact up to rounding. It starts at the nearest
    such matrix, `c` times the polar factor of the present weight.

    **Convolution** in any dimension, transposed too: an explicit kernel, a product of projector pairs (see `block_conv`), of any
    kernel size, stride, dilation, number of groups and of channels.

    - On the lattice and with circular padding (as wide as the kernel needs, sizes that the strides divide): orthogonal, exact up
      to rounding. Inputs that a stride beyond the kernel never reads count for nothing: where the others are fewer than the
      outputs no kernel is orthogonal, and singular values are `c` on what is read and 0 on the rest; a warning is logged.
    - With zero padding, any amount: norm at most `c`, but **not** orthogonal: the border loses some of the signal.
    - It starts close to a local optimum of the distance to the present kernel, found by optimizing one factor after the other.
    - Depthwise with as many outputs as inputs, stride 1: only ± a shift is orthogonal, so there is nothing left to train; a
      warning is logged.

    `layer.weight = V`, like a plain checkpoint, is taken as it is where it is such a weight, to 1e-5, and else moved to the
    nearest one, for kernels the nearest that is found. How far, `‖W - V‖_F / ‖V‖_F`, is logged to
    `logging.getLogger("spectral_hooks")` and kept as `layer.parametrizations.weight[0].distance`. Kernels that are orthogonal
    and yet are moved:

    - Not all are products of projector pairs. With as many outputs as inputs a single tap, as of `delta_orthogonal_`, is one only
      in the middle of an odd kernel.
    - Where ten pairs and more (kernels of 7×7) act on few channels, the outermost taps can be so faint that the rounding of
      float32 hides the factors, and up to 1e-3 is lost.
    - With a stride and so few outputs that times the taps of a side of the kernel they are fewer than half of the inputs, they do
      not determine the projectors, and the search comes only near, to some 1e-2.

    Baked weights are no more orthogonal when averaged (EMA, SWA) or stored in half precision. Averaged parameters of one run
    give an orthogonal weight again, as long as nothing is assigned in between.

    Args:
        layer: a linear or convolutional layer, changed in place. Create the optimizer afterwards.
        max_norm: all singular values, `c > 0`, a number that the weight's dtype has. It is no parameter and not trained.
        orthogonal_map: from free parameters to orthonormal columns: "cayley", "qr", "exp" or "householder", see `stiefel`.
            "cayley" and "exp" start at zero from a buffer, with the gradient of the tangent space, and keep the determinant.

    Returns:
        The layer. `sh.remove_spectral` makes it plain again.

    Cost: a matrix `p × q`, `p ≥ q`: `O(p q²)`. A kernel `c → c` with `k^d` taps: about `2 k^d c³`, whatever the batch and the
    size of the input. Finding the start of a kernel takes some dozen times that: on one core 0.1, 1.2 and 6 seconds for a 3×3
    kernel of 64, 256 and 512 channels.

    Raises:
        ValueError: `max_norm` is no such number; the map is unknown; the weight is not finite, pruned, or carries a
            parametrization from elsewhere; reflect or replicate padding, which repeats inputs.
        TypeError, NotImplementedError: as `as_operator`.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> from spectral_hooks.parametrizations.orthogonal import orthogonal
        >>> layer = orthogonal(torch.nn.Conv2d(4, 8, 3, stride=2, padding=1))
        >>> values = sh.singular_values(sh.as_operator(layer).circular(8))
        >>> bool((values - 1).abs().max() < 1e-5)
        True
        >>> layer.parametrizations.weight[0]
        OrthogonalKernel(max_norm=1.0; all singular values for circular padding, a bound for zero padding)

    Source: Lezcano-Casado and Martínez-Rubio (2019); Li et al. (2019); Boissin et al. (2025).
    """
    max_norm = check_max_norm(max_norm)
    if orthogonal_map not in list(MAPS):
        raise ValueError(f"`orthogonal_map` must be one of {', '.join(MAPS)}; got {orthogonal_map!r}.")
    op = as_operator(layer)
    op.check_bounded()
    check_reachable("max_norm", max_norm, op.dtype)
    if isinstance(op, ConvOperator):
        blocks = Blocks.of(op.weight.shape, op.groups, op.stride, op.dilation)
        _warn(op, blocks)
        return register(layer, OrthogonalKernel(blocks, max_norm, orthogonal_map, like=op.weight))
    if isinstance(op, DenseOperator):
        return register(layer, Orthogonal(op.weight.shape, max_norm, orthogonal_map, like=op.weight))
    raise TypeError(f"`layer` must be linear or a convolution; got {type(layer).__name__}.")


def _warn(op: ConvOperator, blocks: Blocks) -> None:
    """Log where little is left to train, and where no kernel is orthogonal."""
    if all(shape[-2:] == (1, 1) for shape in blocks.shapes.values()):
        _logger.warning("orthogonal: with one channel in and out of each group only ± a shift is left, and nothing to train")
    read, of = blocks.columns * prod(blocks.strides), blocks.columns * prod(op.stride)
    if read < min(blocks.rows, of):
        verb, side = ("reaches", "outputs") if op.transposed else ("reads", "inputs")
        _logger.warning(
            f"orthogonal: a kernel of {blocks.taps} taps with stride {op.stride} and dilation {op.dilation} {verb} {read} of "
            f"every {of} {side}, so none is orthogonal: singular values are `max_norm` on these, and 0 on the other {side}"
        )


class Orthogonal(nn.Module):
    """The parametrization that `orthogonal` registers for matrices: a gain times orthonormal columns, or rows of a wide one.

    Args:
        shape: of the matrices, `(*batch, rows, columns)`.
        max_norm, orthogonal_map: as for `orthogonal`.
        like: for dtype and device of the buffer `base`, which "cayley" and "exp" need.
    """

    base: Tensor | None

    def __init__(self, shape: tuple[int, ...], max_norm: float, orthogonal_map: str, like: Tensor) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.wide = shape[-2] < shape[-1]
        self.max_norm = max_norm
        self.orthogonal_map = orthogonal_map
        self.distance = 0.0
        tall = (*shape[:-2], max(shape[-2:]), min(shape[-2:]))
        self.register_buffer("base", like.new_zeros(tall, requires_grad=False) if MAPS[orthogonal_map][1] else None)

    def extra_repr(self) -> str:
        return _shown(self.max_norm, self.orthogonal_map)

    def forward(self, x: Tensor) -> Tensor:
        return in_full_precision(self._scaled)(x)

    def _scaled(self, x: Tensor) -> Tensor:
        return self.frame(x) * self.max_norm

    def frame(self, x: Tensor) -> Tensor:
        """The weight over the gain."""
        function, based = MAPS[self.orthogonal_map]
        free = (x.mT if self.wide else x,)
        frame = function(*free, self.base) if based else function(*free)
        return frame.mT if self.wide else frame

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor:
        check_assigned(weight, self.shape)
        _check_finite(weight)
        wide = weight.to(at_least_float32(weight.dtype))
        frame = polar_factor(wide)
        self.distance = _report(frame * self.max_norm, wide)
        return self.free(frame).to(weight.dtype)

    @torch.no_grad()
    def free(self, frame: Tensor) -> Tensor:
        """What is mapped to an orthonormal frame; `base` becomes that frame."""
        x, base = origin(self.orthogonal_map, frame.mT if self.wide else frame)
        if self.base is not None and base is not None:
            self.base.copy_(base)
        return (x.mT if self.wide else x).contiguous()


class OrthogonalKernel(nn.Module):
    """The parametrization that `orthogonal` registers for convolutions: a gain times `compose` of factors, each from its own map.

    Args:
        blocks: the sizes of the factors.
        max_norm, orthogonal_map, like: as for `Orthogonal`.
    """

    def __init__(self, blocks: Blocks, max_norm: float, orthogonal_map: str, like: Tensor) -> None:
        super().__init__()
        self.blocks = blocks
        self.max_norm = max_norm
        self.orthogonal_map = orthogonal_map
        self.distance = 0.0
        self.parts = nn.ModuleDict({name: Orthogonal(shape, 1.0, orthogonal_map, like) for name, shape in blocks.shapes.items()})

    def __repr__(self) -> str:
        shown = _shown(self.max_norm, self.orthogonal_map)
        return f"OrthogonalKernel({shown}; all singular values for circular padding, a bound for zero padding)"

    def _parts(self) -> list[tuple[str, Orthogonal]]:
        return list(cast(Any, self.parts).items())

    def forward(self, *free: Tensor) -> Tensor:
        return in_full_precision(self._composed)(*free)

    def _composed(self, *free: Tensor) -> Tensor:
        frames = {name: part.frame(x) for (name, part), x in zip(self._parts(), free, strict=True)}
        return compose(self.blocks, frames) * self.max_norm

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        blocks = self.blocks
        check_assigned(weight, (blocks.groups * blocks.rows, blocks.columns, *blocks.taps))
        _check_finite(weight)
        found = decompose(blocks, weight, self.max_norm)
        self.distance = _report(compose(blocks, found) * self.max_norm, weight)
        free = tuple(part.free(found[name]).to(weight.dtype) for name, part in self._parts())
        return free[0] if len(free) == 1 else free


def _shown(max_norm: float, orthogonal_map: str) -> str:
    return f"max_norm={max_norm}" + ("" if orthogonal_map == "cayley" else f", orthogonal_map={orthogonal_map!r}")


def _check_finite(weight: Tensor) -> None:
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise ValueError("`weight` contains NaN or infinity, so no orthogonal one is nearest; it is left as it is.")


def _report(taken: Tensor, given: Tensor) -> float:
    """The relative distance, logged."""
    if given.is_meta:
        return float("nan")
    scale = _length(given.to(taken))
    distance = _length(taken - given.to(taken)) / scale if scale else float("inf")
    _logger.info("orthogonal: a weight of shape %s was moved by %.2g of its norm", tuple(given.shape), distance)
    return distance


def _length(x: Tensor) -> float:
    """The Frobenius norm, without a square that overflows or vanishes."""
    unit = float(x.abs().amax()) if x.numel() else 0.0
    return unit * float((x / unit).norm()) if unit else 0.0
