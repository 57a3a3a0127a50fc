"""The geometry of a convolution that a module takes the place of: as one of stride 1, after space to depth."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linalg.precision import at_least_float32, is_autocast, without_autocast
from ..operators import ConvOperator, as_operator

#: By the number of spatial axes: torch's functions and modules, plain and transposed.
CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE: dict[int, Any] = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
MODULES: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODULES_TRANSPOSE: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@dataclass(frozen=True)
class Unstrided:
    """A convolution as one of stride 1, after space to depth. Of a transposed one the convolution that it is the adjoint of.

    Attributes:
        rows, columns: channels per group of its outputs and, counted after space to depth, its inputs.
        radius: the kernel of stride 1 has `2 · radius + 1` taps along an axis, around the position that it writes to.
        transposed: whether the layer is the adjoint: what is said of inputs here is said of its outputs then.
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
    transposed: bool = False

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
        _check_sizes(layer, op)
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
            rows=layer.weight.shape[0] // layer.groups,
            columns=layer.weight.shape[1] * prod(op.stride),
            radius=radius,
            padding_mode=layer.padding_mode,
            transposed=op.transposed,
        )

    def __str__(self) -> str:
        padding = tuple(before * self.dilation for before, _ in self.padding)
        settings: dict[str, tuple[object, object]] = {
            "kernel_size": (self.kernel_size, None),
            "stride": (self.stride, None),
            "padding": (padding if all(before == after for before, after in self.padding) else "same", (0,) * self.dims),
            "output_padding": (self.output_padding, (0,) * self.dims),
            "dilation": (self.dilation, 1),
            "groups": (self.groups, 1),
            "transposed": (self.transposed, False),
            "padding_mode": (self.padding_mode, "zeros"),
        }
        return ", ".join([*map(str, self.channels), *differing(settings)])

    @property
    def channels(self) -> tuple[int, int]:
        """Of the layer's inputs and outputs."""
        inputs, outputs = self.groups * self.in_channels, self.groups * self.rows
        return (outputs, inputs) if self.transposed else (inputs, outputs)

    @property
    def output_padding(self) -> tuple[int, ...]:
        """What a transposed layer adds for its output to be the stride times as large as its input."""
        if not self.transposed:
            return (0,) * self.dims
        per_axis = zip(self.padding, self.kernel_size, self.stride, strict=True)
        return tuple(_left_over(self.dilation * sum(pair), k, s, self.dilation) for pair, k, s in per_axis)

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
        return at_least_float32(x.dtype)

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

    def from_depth(self, x: Tensor) -> Tensor:
        """The inverse of `to_depth`, which is its adjoint."""
        if set(self.stride) == {1}:
            return x
        x = x.unflatten(1, (-1, *self.stride))
        x = x.permute(0, 1, *(axis for i in range(self.dims) for axis in (2 + self.dims + i, 2 + i)))
        for axis in range(self.dims):
            x = x.flatten(2 + axis, 3 + axis)
        return x

    def check_output(self, x: Tensor, output_size: Sequence[int]) -> None:
        """Refuse an `output_size` as torch's transposed convolutions take it, but for the only one that there is."""
        made = tuple(n * s for n, s in zip(x.shape[-self.dims :], self.stride, strict=True))
        if not self.transposed or tuple(output_size)[-self.dims :] != made:
            told = made if self.transposed else "None, for it is for transposed convolutions"
            raise ValueError(f"`output_size` must be {told}; got {tuple(output_size)}.")

    def around(self, x: Tensor, bias: Tensor | None, inner: Callable[[Tensor], Tensor]) -> Tensor:
        """A map of batches in float32 at least, and the bias, for inputs as the layer takes them."""
        channels, _ = self.channels
        if x.ndim == self.dims + 1:
            return self.around(x.unsqueeze(0), bias, inner).squeeze(0)
        if x.ndim != self.dims + 2 or x.shape[1] != channels:
            raise ValueError(f"`x` must have shape (batch, {channels}{', size' * self.dims}); got {tuple(x.shape)}.")
        if not self.transposed and any(n % s for n, s in zip(x.shape[2:], self.stride, strict=True)):
            raise ValueError(f"`x` must have sizes that the stride {self.stride} divides; got {tuple(x.shape[2:])}.")
        device = x.device.type
        autocast = is_autocast(device)
        # autocast leaves float64 alone
        dtype = torch.get_autocast_dtype(device) if autocast and x.dtype != torch.float64 else x.dtype
        y = without_autocast(inner, x.to(self.wide(x)))
        return (y if bias is None else y + bias.to(y.dtype).unflatten(0, (-1, *[1] * self.dims))).to(dtype)


def differing(settings: dict[str, tuple[object, object]]) -> list[str]:
    """`name=value` for every value, of names to values and defaults, that is not its default."""
    return [f"{name}={value!r}" for name, (value, default) in settings.items() if value != default]


def _left_over(padding: int, taps: int, stride: int, dilation: int) -> int:
    """The samples at the end of an axis at which no patch begins, `padding` of both sides; fewer than the stride."""
    return padding - dilation * (taps - 1) - 1 + stride


def _check_sizes(layer: Any, op: ConvOperator) -> None:
    """Refuse a layer that does not take sizes to those divided, or multiplied, by the stride."""
    left = [
        _left_over(before + after, k, s, d)
        for (before, after), k, s, d in zip(op.padding, layer.kernel_size, op.stride, op.dilation, strict=True)
    ]
    settings = f"kernel_size={layer.kernel_size}, stride={layer.stride} and dilation={layer.dilation}"
    if any(not 0 <= rest < s for rest, s in zip(left, op.stride, strict=True)):
        needed = tuple(d * (k - 1) // 2 for k, d in zip(layer.kernel_size, op.dilation, strict=True))
        verb = "multiply" if op.transposed else "divide"
        raise ValueError(
            f"`layer` must keep the size of its input, or {verb} it by the stride: with {settings} that takes padding="
            f"{needed[0] if len(set(needed)) == 1 else needed}; got padding={layer.padding}."
        )
    if op.transposed and tuple(left) != op.output_padding:
        raise ValueError(
            f"`layer` must multiply the size of its input by the stride: with {settings} and padding={layer.padding} that takes "
            f"output_padding={tuple(left)}; got output_padding={layer.output_padding}."
        )


def convolution(layer: Any, name: str) -> ConvOperator:
    """The operator of a plain convolution of torch, or the error why a layer is none."""
    if not isinstance(layer, nn.modules.conv._ConvNd):
        hint = " For a matrix use orthogonal." if isinstance(layer, nn.Linear) else ""
        raise TypeError(f"`layer` must be a convolution of torch, transposed or not; got {type(layer).__name__}.{hint}")
    op = as_operator(layer)
    if type(layer).forward is not (MODULES_TRANSPOSE if layer.transposed else MODULES)[layer.weight.ndim - 2].forward:
        kind = type(layer).__name__
        raise NotImplementedError(f"{kind} has a forward of its own, which {name} would lose: use a plain convolution.")
    return cast(ConvOperator, op)
