"""What the modules that take the place of a convolution have in common."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from ..linalg.precision import is_autocast
from ..operators import ConvOperator, KernelOperator, as_operator
from .remove import check_whole, remove_spectral, spectral_tensors

Value = TypeVar("Value")

#: Resolutions for which something is remembered.
_MOST_KEPT = 8

CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MODULES: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class OrthogonalConv(nn.Module):
    """A norm-preserving map in the place of a convolution, of no single small kernel. `_map` is what subclasses define.

    Args:
        layer: the convolution whose parameters this takes over.
        name: of the function that makes it, for errors.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.modules.conv._ConvNd, name: str) -> None:
        super().__init__()
        self.geometry = Unstrided.of(layer, name)
        take_over(self, layer)
        self._memory = Memory()

    def extra_repr(self) -> str:
        return str(self.geometry)

    def forward(self, x: Tensor) -> Tensor:
        return self.geometry.around(x, self.bias, self._map)

    def to_plain(self) -> nn.Module:
        """The equal plain convolution, whose kernel is as large as its stride: for layers whose patches do not overlap.

        Raises:
            NotImplementedError: patches overlap; then no convolution of a small kernel is this map.
        """
        with torch.no_grad():
            op = self._operator()
        return plain(self, op.weight, stride=op.stride, groups=op.groups)

    def _map(self, x: Tensor) -> Tensor:
        """The map of a batch, in float32 at least, without the bias."""
        raise NotImplementedError

    def _operator(self, input_size: int | Sequence[int] | None = None) -> ConvOperator:
        """That of the equal plain convolution, or the reason why there is none."""
        geometry, weight = self.geometry, self.weight
        if any(geometry.radius):
            raise NotImplementedError(
                f"{type(self).__name__} is orthogonal by construction and no convolution of a small kernel: it has no weight "
                "to measure, to change or to make plain. Its norm is 1: keep it, and exclude it where weights are acted on."
            )
        # without overlap nothing is seen of the neighbours, and a single patch tells all
        patches = torch.eye(geometry.columns, device=weight.device, dtype=geometry.wide(weight))
        patches = patches.unflatten(1, (-1, *geometry.stride)).repeat(1, geometry.groups, *[1] * geometry.dims)
        kernel = without_autocast(self._map, patches).flatten(1).T.unflatten(1, (-1, *geometry.stride))
        return ConvOperator(kernel.to(weight.dtype), stride=geometry.stride, groups=geometry.groups, input_size=input_size)


@as_operator.register
def _(layer: OrthogonalConv, input_size: int | Sequence[int] | None = None) -> KernelOperator:
    return layer._operator(input_size)


@dataclass(frozen=True)
class Unstrided:
    """A convolution as one of stride 1, after space to depth.

    Attributes:
        rows, columns: channels per group of its outputs and, counted after space to depth, its inputs.
        radius: the kernel of stride 1 has `2 · radius + 1` taps along an axis, around the position that it writes to.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: int
    groups: int
    rows: int
    columns: int
    radius: tuple[int, ...]
    padding_mode: str

    @staticmethod
    def of(layer: Any, name: str) -> Unstrided:
        """That of a layer, or the error why there is none."""
        op = convolution(layer, name)
        if layer.padding_mode not in ("zeros", "circular"):
            raise NotImplementedError(
                f"`layer` has {layer.padding_mode} padding, which repeats inputs and is never orthogonal; use zeros or circular."
            )
        if len(set(op.dilation)) > 1 or (
            op.dilation[0] > 1 and (set(op.stride) != {1} or any(k % 2 == 0 for k in layer.kernel_size))
        ):
            raise NotImplementedError(
                f"{name} takes a dilation only at stride 1, for odd kernels and alike on every axis; got "
                f"dilation={layer.dilation}, stride={layer.stride}, kernel_size={layer.kernel_size}."
            )
        for (before, after), k, s, d in zip(op.padding, layer.kernel_size, op.stride, op.dilation, strict=True):
            if not 0 <= before + after - d * (k - 1) - 1 + s < s:
                raise ValueError(
                    f"`layer` must keep the size of its input, or divide it by the stride: with kernel_size={layer.kernel_size}, "
                    f"stride={layer.stride} and dilation={layer.dilation} that takes padding={d * (k - 1) // 2}; "
                    f"got padding={layer.padding}."
                )
        dilation = op.dilation[0]
        padding = tuple((before // dilation, after // dilation) for before, after in op.padding)
        # blocks of the stride that a kernel reads, before and after the one it writes to
        radius = tuple(
            max(-(-before // s), (k - 1 - before) // s)
            for (before, _), k, s in zip(padding, layer.kernel_size, op.stride, strict=True)
        )
        return Unstrided(
            kernel_size=tuple(layer.kernel_size),
            stride=op.stride,
            padding=padding,
            dilation=dilation,
            groups=layer.groups,
            rows=layer.out_channels // layer.groups,
            columns=layer.in_channels // layer.groups * prod(op.stride),
            radius=radius,
            padding_mode=layer.padding_mode,
        )

    def __str__(self) -> str:
        channels = f"{self.in_channels * self.groups}, {self.rows * self.groups}"
        shown = f"{channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        shown += f", dilation={self.dilation}" if self.dilation > 1 else ""
        return shown + (f", groups={self.groups}" if self.groups > 1 else "") + f", padding_mode={self.padding_mode}"

    @property
    def dims(self) -> int:
        return len(self.stride)

    @property
    def in_channels(self) -> int:
        """Per group, before space to depth."""
        return self.columns // prod(self.stride)

    @property
    def unread(self) -> list[bool]:
        """For each input channel after space to depth whether the kernel skips it at the position that it writes to."""
        read = [
            [0 <= before + phase < k for phase in range(s)]
            for (before, _), k, s in zip(self.padding, self.kernel_size, self.stride, strict=True)
        ]
        return [not all(phases) for phases in itertools.product(*read)] * self.in_channels

    @staticmethod
    def wide(x: Tensor) -> torch.dtype:
        """Float32 at least: in half precision nothing is orthogonal."""
        return torch.promote_types(x.dtype, torch.float32)

    def kernel(self, weight: Tensor) -> Tensor:
        """The weight as a kernel of stride 1, `(groups, rows, columns, *taps)`: phases of the stride as input channels."""
        amounts = []
        for (before, _), k, s, radius in zip(self.padding, self.kernel_size, self.stride, self.radius, strict=True):
            first = radius * s - before
            amounts.append((first, (2 * radius + 1) * s - first - k))
        weight = F.pad(weight, [amount for pair in reversed(amounts) for amount in pair])
        return self.to_depth(weight.unflatten(0, (self.groups, self.rows)), 3)

    def to_depth(self, x: Tensor, first: int = 2) -> Tensor:
        """Positions within a block become channels, of the axis before the `first` spatial one."""
        if set(self.stride) == {1}:
            return x
        for axis, s in enumerate(self.stride):
            x = x.unflatten(first + 2 * axis, (-1, s))
        blocks = [first + 2 * axis for axis in range(self.dims)]
        x = x.permute(*range(first), *(axis + 1 for axis in blocks), *blocks)
        return x.flatten(first - 1, first - 1 + self.dims)

    def around(self, x: Tensor, bias: Tensor | None, inner: Callable[[Tensor], Tensor]) -> Tensor:
        """A map of batches in float32 at least, and the bias, for inputs as the layer takes them."""
        channels = self.groups * self.in_channels
        if x.ndim == self.dims + 1:
            return self.around(x.unsqueeze(0), bias, inner).squeeze(0)
        if x.ndim != self.dims + 2 or x.shape[1] != channels:
            raise ValueError(f"`x` must have shape (batch, {channels}{', size' * self.dims}); got {tuple(x.shape)}.")
        if any(n % s for n, s in zip(x.shape[2:], self.stride, strict=True)):
            raise ValueError(f"`x` must have sizes that the stride {self.stride} divides; got {tuple(x.shape[2:])}.")
        device = x.device.type
        autocast = is_autocast(device)
        # autocast leaves float64 alone
        dtype = torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype
        y = without_autocast(inner, x.to(self.wide(x)))
        return (y if bias is None else y + bias.to(y.dtype).unflatten(0, (-1, *[1] * self.dims))).to(dtype)


def convolution(layer: Any, name: str) -> ConvOperator:
    """The operator of a plain convolution of torch, or the error why a layer is none."""
    if not isinstance(layer, nn.modules.conv._ConvNd):
        hint = " For a matrix use orthogonal." if isinstance(layer, nn.Linear) else ""
        raise TypeError(f"`layer` must be nn.Conv1d, nn.Conv2d or nn.Conv3d; got {type(layer).__name__}.{hint}")
    if layer.transposed:
        raise NotImplementedError(f"{name} of a transposed convolution is not supported: use a convolution and upsampling.")
    op = as_operator(layer)
    if type(layer).forward is not MODULES[layer.weight.ndim - 2].forward:
        kind = type(layer).__name__
        raise NotImplementedError(f"{kind} has a forward of its own, which {name} would lose: use a plain convolution.")
    return cast(ConvOperator, op)


def take_over(module: Any, layer: Any) -> None:
    """Give a module the parameters of the layer that it replaces; what this package has parametrized becomes plain before."""
    check_whole(type(layer).__name__, layer)
    ours = set(spectral_tensors(layer))
    for name in ("weight", "bias"):
        if name not in ours and name not in layer._parameters:
            kind = type(layer).__name__
            raise ValueError(f"the {name} of {kind} is pruned or parametrized from elsewhere: make that permanent first.")
    remove_spectral(layer)
    module.weight, module.bias = layer.weight, layer.bias
    module.train(layer.training)


def plain(module: Any, weight: Tensor, **settings: Any) -> nn.Module:
    """A plain convolution with this weight, and with the bias of the module in whose place it comes."""
    out, in_, *taps = weight.shape
    like = {"device": weight.device, "dtype": weight.dtype}
    result = MODULES[len(taps)](in_ * settings["groups"], out, tuple(taps), bias=False, **settings, **like)
    result.weight = nn.Parameter(weight.detach().clone(), requires_grad=module.weight.requires_grad)
    result.bias = module.bias
    return result.train(module.training)


def without_autocast(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of a tensor, undisturbed by autocast."""
    if not is_autocast(x.device.type):
        return function(x)
    with torch.autocast(x.device.type, enabled=False):
        return function(x)


def to_frequencies(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """`rfftn`, of an expanded tensor too: MKL's refuses strides of zero, and many versions of torch hand them on."""
    return torch.fft.rfftn(x.contiguous() if 0 in x.stride() else x, dim=axes)


def from_frequencies(x: Tensor, sizes: tuple[int, ...], axes: tuple[int, ...]) -> Tensor:
    """`irfftn`, whose gradient may be expanded too, as that of a sum is."""
    y = torch.fft.irfftn(x, s=sizes, dim=axes)
    # what a product hands back is never expanded; a trace is the same with gradients and without
    return y * 1 if y.requires_grad or torch.jit.is_tracing() else y


class Memory:
    """Functions of a weight, remembered in evaluation while the weight keeps its values; in no state dict, in no copy."""

    def __init__(self) -> None:
        self._seen: tuple[Tensor, dict[Any, Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_seen": None}

    def __call__(self, module: nn.Module, weight: Tensor, make: Callable[[Tensor], Value], key: Any = None) -> Value:
        """`make(weight)`, or what that gave before for this `key`."""
        if module.training or is_recorded(weight) or _is_differentiated(weight):
            return make(weight)
        # By value: neither its address nor its version tells of a tensor changed through `.data`. Read once, for threads.
        seen = self._seen
        if seen is None or seen[0].dtype != weight.dtype or seen[0].device != weight.device or not torch.equal(seen[0], weight):
            seen = (weight.detach().clone(), {})
        if key not in seen[1]:
            # what is made in inference mode could not be used outside
            with torch.inference_mode(False), torch.no_grad():
                value = make(weight.detach())
            kept = list(seen[1].items())[-_MOST_KEPT + 1 :]
            self._seen = seen = (seen[0], {**dict(kept), key: value})
        return seen[1][key]


class At(torch.autograd.Function):
    """A value in the place of a parameter, whose gradient is the parameter's."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, value: Tensor) -> Tensor:
        ctx.dtype = parameter.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient.to(ctx.dtype), None


def may_follow(module: nn.Module, weight: Tensor) -> bool:
    """Whether a parameter may be brought inside on its way into the forward: in training, and where it is itself what trains.

    Not where a function of it is recorded or transformed, which is to stay one; nor under FSDP, where a forward sees a copy.
    """
    if getattr(module, "_is_fsdp_managed_module", False):
        return False
    trained = module.training and torch.is_grad_enabled() and weight.requires_grad and weight.is_leaf
    return (
        trained and isinstance(weight, nn.Parameter) and not (is_recorded(weight) or _is_transformed(weight) or is_part(weight))
    )


def start_inside(layer: Any) -> None:
    """Give a layer's parameter the value that its parametrization makes of it: outside it would have nowhere to go."""
    original = layer.parametrizations.weight.original
    if original.requires_grad and not (original.is_meta or is_part(original)) and bool(original.isfinite().all()):
        with torch.no_grad():
            original.copy_(layer.weight)


def is_part(weight: Tensor) -> bool:
    """Whether it is sharded over processes (DTensor)."""
    return hasattr(weight, "full_tensor")


def is_recorded(weight: Tensor) -> bool:
    """Whether operations are recorded for later, on other values: compiled, exported, traced, or on no values at all."""
    return weight.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing()


def unrecorded(make: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """A function of a weight as a constant of what `torch.jit.trace` records."""
    if not torch.jit.is_tracing():
        return make(weight)
    state = torch._C._get_tracing_state()
    set_state: Any = torch._C._set_tracing_state  # type: ignore[attr-defined]
    set_state(None)
    try:
        return make(weight.detach())
    finally:
        set_state(state)


def exported(make: Callable[[Tensor], Tensor], weight: Tensor) -> Tensor:
    """A function of a weight; in an ONNX model that is traced, for which decompositions are unknown, the constant that it is."""
    return unrecorded(make, weight) if torch.onnx.is_in_onnx_export() else make(weight)


def _is_differentiated(weight: Tensor) -> bool:
    """Whether a function of this would be more than a value: tracked, or of a transform of `torch.func`."""
    tracked = torch.is_grad_enabled() and weight.requires_grad
    return tracked or _is_transformed(weight)


def _is_transformed(weight: Tensor) -> bool:
    """Whether it stands for more than its values: a batched tensor cannot be compared, a dual one would lose its tangent."""
    return is_functorch_wrapped_tensor(weight) or forward_ad.unpack_dual(weight).tangent is not None
