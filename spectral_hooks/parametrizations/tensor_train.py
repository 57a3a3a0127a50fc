"""Layers of low rank whose singular values are those of a small core: orthonormal frames around it, by construction."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linalg.precision import exact, in_full_precision
from ..linalg.scaling import check_finite
from ..operators import ConvOperator, DenseOperator, KernelOperator, as_operator
from ..operators.base import is_whole
from .geometry import CONV, CONV_TRANSPOSE, MODULES, MODULES_TRANSPOSE, differing
from .layout import as_stored, by_groups
from .modules import load_plain
from .remove import check_whole
from .stiefel import cayley_transform, inverse_cayley

#: Torch's classes of layers that can be replaced.
_KINDS = (nn.Linear, *MODULES.values(), *MODULES_TRANSPOSE.values())
#: What a layer's forward needs beside its weight.
_GEOMETRY = ("stride", "padding", "output_padding", "dilation", "groups", "padding_mode", "transposed")

#: From so many points on, one matrix product an image is faster than a convolution, which reorders what it reads and writes.
_MANY_POINTS = 64


def tensor_train(layer: nn.Module, rank: int | Sequence[int]) -> TensorTrain:
    """Replace a layer by one of low rank in tensor-train form, near it, whose singular values are those of its core.

        K[o, i, x, y] = Σ_ab  L[o, b] C[b, a, x, y] R[i, a],   LᵀL = I,  RᵀR = I

    The frames `L` and `R` are orthonormal by construction (Cayley transforms of free tensors), in every step and without a
    penalty. So, with any stride, padding and input size, the non-zero singular values of the layer are those of the core `C`:
    the norm, all other measures and `sh.SpectralClip` work on the core, at `r³` in place of `c³`. A linear layer's weight is `L
    C Rᵀ`.

    The start is the truncated higher-order SVD of the layer's kernel, for a matrix its truncated SVD: at most √2 times as far
    from the kernel as the nearest of this rank, and equal to it at full rank. How far, relative to the kernel (Frobenius), is
    the attribute `error` of the result and stands in its repr.

    Args:
        layer: an `nn.Linear`, `nn.Conv1d/2d/3d` or `nn.ConvTranspose1d/2d/3d`; its bias is kept as it is, itself it is not
        changed.
        rank: channels of the core, in each group; or two numbers, one for the inputs and one for the outputs. A side with fewer
            channels has as many as it has.

    Returns:
        The module to put in the place of the layer: `model.conv = tensor_train(model.conv, 16)`. Loading a plain checkpoint
        converts it; `sh.remove_spectral` and `to_plain()` give one dense layer, `to_sequential()` three thin ones.

    Modules that read the `weight` of a layer themselves see the core. `nn.TransformerEncoderLayer` does so for its linear layers
    in eval mode, and is kept from it.

    Cost: a 1×1 convolution to `r` channels, the layer's own on `r` channels, a 1×1 convolution back, and the frames at `O(c
    r²)` in each forward. The 1×1 convolutions of contiguous images are matrix products, which are faster. The conversion is an
    SVD of the kernel for each side.

    Raises:
        TypeError: another kind of layer.
        ValueError: a rank out of range; a weight that is not finite or not there, in a plain checkpoint too.
        NotImplementedError: the layer's forward does not apply its weight as it is stored, or another module reads the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> from spectral_hooks.parametrizations.tensor_train import tensor_train
        >>> conv = torch.nn.Conv2d(16, 32, 3, stride=2, padding=1)
        >>> layer = tensor_train(conv, rank=8)
        >>> layer(torch.randn(2, 16, 9, 9)).shape, sh.as_operator(layer, 9).out_shape
        (torch.Size([2, 32, 5, 5]), (8, 5, 5))
        >>> full = sh.spectral_norm(sh.as_operator(layer.to_plain()))
        >>> bool((sh.spectral_norm(sh.as_operator(layer)) / full - 1).abs() < 1e-3)
        True

    Source: Senderovich, Bulatova, Obukhov and Rakhuba (2022), with a penalty for the frames; De Lathauwer, De Moor and
    Vandewalle (2000) for the start.
    """
    kind = _kind(layer)
    check_whole(kind.__name__, layer)
    weight = as_operator(layer).weight.detach()
    check_finite(weight)
    groups = getattr(layer, "groups", 1)
    outputs, inputs, *taps = by_groups(weight, groups, getattr(layer, "transposed", False)).shape[1:]
    return TensorTrain(layer, kind, weight, _ranks(rank, outputs, inputs, prod(taps)))


class TensorTrain(nn.Module):
    """What `tensor_train` puts in the place of a layer.

    The parameters: `weight` is the core, in the layout of a layer of its kind with `r` channels; `out_free` and `in_free` are
    what `out_frame` and `in_frame` are made from, `(groups, channels, r)`; `bias` is the layer's.

    Attributes:
        error: of the conversion, `‖K - K̂‖_F / ‖K‖_F`; zero for a zero kernel.

    Args:
        layer: the layer to be replaced.
        kind: torch's class of it.
        weight: the weight that it applies.
        ranks: channels of the core, inputs and outputs.
    """

    weight: Tensor
    #: Parameters of frames, whose norm is 1 whatever they are: for hooks, which bound the core.
    isometries = ("in_free", "out_free")
    kept = ("weight", "out_free", "in_free")
    bias: nn.Parameter | None
    in_free: Tensor
    out_free: Tensor
    stride: Any
    padding: Any
    output_padding: Any
    dilation: Any
    padding_mode: str

    def __init__(self, layer: Any, kind: type[nn.Module], weight: Tensor, ranks: tuple[int, int]) -> None:
        super().__init__()
        self.kind = kind
        self.dims = weight.ndim - 2
        self.groups, self.transposed = 1, False
        if self.dims:
            for name in _GEOMETRY:
                setattr(self, name, getattr(layer, name))
            self._around = layer._reversed_padding_repeated_twice
        self.ranks = ranks
        made = self.converted(weight)
        with torch.enable_grad():  # that of a parametrized weight is computed
            trained = layer.weight.requires_grad
        for name, value in zip(self.kept, made, strict=True):
            setattr(self, name, nn.Parameter(value, requires_grad=trained))
        bias = layer.bias
        self.register_parameter("bias", bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach()))
        self.train(layer.training)
        self.register_load_state_dict_pre_hook(load_plain)
        if not self.dims:
            self.register_forward_pre_hook(_called)

    @property
    def in_frame(self) -> Tensor:
        """`R`, orthonormal columns in each group, `(groups, in / groups, r)`."""
        return cayley_transform(self.in_free)

    @property
    def out_frame(self) -> Tensor:
        """`L`, orthonormal columns in each group, `(groups, out / groups, r)`."""
        return cayley_transform(self.out_free)

    def extra_repr(self) -> str:
        ones = (1,) * self.dims
        settings: dict[str, tuple[object, object]] = {"bias": (self.bias is not None, True)}
        if self.dims:
            zeros = (0,) * self.dims
            settings |= {
                "kernel_size": (tuple(self.weight.shape[2:]), None),
                "stride": (self.stride, None),
                "padding": (self.padding, zeros),
                "output_padding": (self.output_padding, zeros),
                "dilation": (self.dilation, ones),
                "groups": (self.groups, 1),
                "padding_mode": (self.padding_mode, "zeros"),
            }
        channels = (self.groups * self.in_free.shape[1], self.groups * self.out_free.shape[1])
        shown = [self.kind.__name__, *map(str, channels), *differing(settings)]
        return ", ".join([*shown, f"rank={self.ranks}", f"error={self.error:.3g}"])

    def forward(self, x: Tensor) -> Tensor:
        outer, inner = self._frames()
        x = self._pointwise(x, inner.mT)
        return self._pointwise(self._through_core(x), outer, self.bias)

    def _frames(self) -> tuple[Tensor, Tensor]:
        """`L` and `R`: of equal shape together, for of small ones the calls are what costs."""
        if self.out_free.shape != self.in_free.shape:
            return self.out_frame, self.in_frame
        outer, inner = cayley_transform(torch.stack([self.out_free, self.in_free]))
        return outer, inner

    def _pointwise(self, x: Tensor, matrices: Tensor, bias: Tensor | None = None) -> Tensor:
        """The matrix of each group, applied to the channels at every point."""
        if not self.dims:
            return F.linear(x, matrices[0], bias)
        if not self._is_stack(x, matrices):
            return CONV[self.dims](x, self._one_tap(matrices), bias, groups=self.groups)
        images, _, *size = x.shape
        left = matrices.expand(images, *matrices.shape).flatten(0, 1)
        right = x.reshape(len(left), left.shape[2], prod(size))
        if bias is None:
            y = torch.bmm(left, right)
        else:
            y = torch.baddbmm(bias.view(self.groups, -1, 1).expand(images, -1, -1, -1).flatten(0, 1), left, right)
        return y.reshape(images, self.groups * left.shape[1], *size)

    def _is_stack(self, x: Tensor, matrices: Tensor) -> bool:
        """Whether an input is a stack of large matrices, channels × points, as it lies in memory."""
        fits = x.ndim == self.dims + 2 and x.shape[1] == self.groups * matrices.shape[2]
        return fits and x.is_contiguous() and prod(x.shape[2:]) >= _MANY_POINTS

    def _one_tap(self, matrices: Tensor) -> Tensor:
        """Matrices, one for each group, as the weight of a plain layer."""
        return matrices.flatten(0, 1).unflatten(-1, (-1, *[1] * self.dims))

    def _through_core(self, x: Tensor) -> Tensor:
        if not self.dims:
            return F.linear(x, self.weight)
        if self.transposed:
            return CONV_TRANSPOSE[self.dims](
                x, self.weight, None, self.stride, self.padding, self.output_padding, self.groups, self.dilation
            )
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._around, self.padding_mode), 0
        return CONV[self.dims](x, self.weight, None, self.stride, padding, self.dilation, self.groups)

    # -- to and from a plain layer --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def to_plain(self) -> nn.Module:
        """One dense layer of the same map, with the same bias parameter."""
        weight = self._dense(self.weight, self.out_frame, self.in_frame)
        return self._layer(self.kind, weight, self.bias, **self._geometry())

    @torch.no_grad()
    def to_sequential(self) -> nn.Sequential:
        """Three plain layers of the same map: to `r` channels, the core, and back, with the same bias parameter."""
        kind: type[nn.Module] = MODULES[self.dims] if self.dims else nn.Linear
        groups = {"groups": self.groups} if self.dims else {}
        after, before = (self._one_tap(matrices).clone() for matrices in (self.out_frame, self.in_frame.mT))
        return nn.Sequential(
            self._layer(kind, before, None, **groups),
            self._layer(self.kind, self.weight.clone(), None, **self._geometry()),
            self._layer(kind, after, self.bias, **groups),
        ).train(self.training)

    def _geometry(self) -> dict[str, Any]:
        if not self.dims:
            return {}
        return {name: getattr(self, name) for name in _GEOMETRY[:-1] if self.transposed or name != "output_padding"}

    def _layer(self, kind: Any, weight: Tensor, bias: nn.Parameter | None, **geometry: Any) -> nn.Module:
        """A plain layer with this weight."""
        groups = geometry.get("groups", 1)
        outputs, inputs = by_groups(weight, groups, issubclass(kind, nn.modules.conv._ConvTransposeNd)).shape[1:3]
        if self.dims:
            geometry["kernel_size"] = tuple(weight.shape[2:])
        layer: Any = kind(groups * inputs, groups * outputs, bias=False, device="meta", **geometry)
        layer.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        layer.bias = bias
        return layer.train(self.training)

    def _dense(self, core: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
        """The kernel that the layer applies, in the layout of its kind."""
        kernel = in_full_precision(_around_core)(by_groups(core, self.groups, self.transposed), outer, inner)
        return as_stored(kernel, self.transposed)

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """Of the weight of the layer that this is in the place of."""
        core = by_groups(self.weight, self.groups, self.transposed)
        shape = (len(core), self.out_free.shape[1], self.in_free.shape[1], *core.shape[3:])
        return as_stored(core.new_empty(shape, device="meta"), self.transposed).shape

    @torch.no_grad()
    def converted(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The core and what its frames are made from, for a plain weight, in its dtype and on its device; keeps the `error`."""
        kernel = by_groups(weight, self.groups, self.transposed)
        # Apple's GPUs have no float64
        kernel = exact(kernel)
        free = [inverse_cayley(_frame(kernel, axis, r)).to(weight) for axis, r in zip((1, 2), self.ranks[::-1], strict=True)]
        # with the frames as they are after rounding, so that at full rank nothing is lost but that
        outer, inner = (cayley_transform(x).to(kernel) for x in free)
        core = as_stored(_around_core(kernel, outer.mT, inner.mT), self.transposed).to(weight)
        lost = torch.linalg.vector_norm(self._dense(core.to(kernel), outer, inner) - as_stored(kernel, self.transposed))
        size = torch.linalg.vector_norm(kernel)
        self.error = float(lost / size) if size else 0.0
        return core, free[0], free[1]


@as_operator.register
def _core(layer: TensorTrain, input_size: int | Sequence[int] | None = None) -> KernelOperator:
    """The core's: with frames around it the non-zero singular values are the same."""
    if not layer.dims:
        return DenseOperator(layer.weight)
    geometry: dict[str, Any] = {"transposed": layer.transposed, "output_padding": 0, **layer._geometry()}
    return ConvOperator(layer.weight, **geometry, input_size=input_size)


def _called(layer: nn.Module, inputs: Any) -> None:
    """Does nothing: without a hook nn.TransformerEncoderLayer, in eval mode, multiplies by the weight of its child, the core."""


def _kind(layer: nn.Module) -> type[nn.Module]:
    """Torch's class of a layer that can be replaced."""
    name = type(layer).__name__
    kind = next((cls for cls in type(layer).__mro__ if cls in _KINDS), None)
    if kind is None or isinstance(layer, TensorTrain):
        raise TypeError(f"`layer` must be an nn.Linear, nn.Conv1d/2d/3d or nn.ConvTranspose1d/2d/3d; got {name}.")
    as_operator(layer)  # refuses a forward that is not that of the class
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise NotImplementedError(
            f"{name} is part of a module that reads its weight itself (nn.MultiheadAttention): leave it out."
        )
    if type(layer).__name__ == "Conv2dSame":
        raise NotImplementedError(
            f"{name} pads as much as each input asks for: put an nn.Conv2d with fixed padding in its place."
        )
    return kind


def _ranks(rank: int | Sequence[int], outputs: int, inputs: int, taps: int) -> tuple[int, int]:
    """Channels of the core, inputs and outputs: no more than there are, nor than the kernel's unfoldings can have."""
    pair = tuple(rank) if isinstance(rank, (Sequence, np.ndarray)) else (rank, rank)
    most = max(outputs, inputs)
    if len(pair) != 2 or not all(is_whole(r) and 1 <= r <= most for r in pair):
        raise ValueError(
            f"`rank` must be an int from 1 to {most}, the channels of a group, or two (inputs, outputs); got {rank!r}."
        )
    return min(int(pair[0]), inputs, outputs * taps), min(int(pair[1]), outputs, inputs * taps)


def _around_core(core: Tensor, outer: Tensor, inner: Tensor) -> Tensor:
    """`Σ_ab outer[o, b] core[b, a, ...] inner[i, a]`, group by group."""
    taps = core.shape[3:]
    product = (outer @ core.flatten(2)).unflatten(2, (core.shape[2], -1))
    return (inner.unsqueeze(1) @ product).unflatten(3, taps) if taps else (inner.unsqueeze(1) @ product).squeeze(3)


def _frame(kernel: Tensor, axis: int, rank: int) -> Tensor:
    """The leading left singular vectors of the kernel's unfolding along an axis, turned among themselves.

    Any basis of their span will do, for the core turns along. This one has a positive semidefinite block on top, the nearest to
    the columns of the identity, which the Cayley transform takes from a small tensor: at full rank it is the identity, from
    zero.
    """
    vectors = torch.linalg.svd(kernel.movedim(axis, 1).flatten(2), full_matrices=False).U[..., :rank]
    u, _, vh = torch.linalg.svd(vectors[..., :rank, :])
    return vectors @ (u @ vh).mT
