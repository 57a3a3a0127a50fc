"""The geometry of a convolution that a module takes the place of: as one of stride 1, after space to depth."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linalg.precision import at_least_float32, is_autocast, without_autocast
from ..operators import ConvOperator, as_operator

MODULES: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


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
