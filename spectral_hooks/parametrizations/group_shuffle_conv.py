"""Orthogonal convolutions of many channels: mixed by a group-shuffle matrix, then turned by a skew convolution in groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linalg.precision import exact
from .geometry import CONV, CONV_TRANSPOSE, Unstrided
from .memory import Memory
from .modules import OrthogonalConv, load_plain
from .shuffles import check_blocks, check_mixing, near, shuffle_matrix
from .skew_kernels import horner, ratios, skew_kernel

#: Of the polynomial of a skew convolution: the default of `skew`, as many convolutions, for an angle of up to 0.98.
_DEGREE = 4


class GroupShuffleConv(OrthogonalConv):
    """What `group_shuffle` puts in the place of a convolution: `A = c p(J) Q`, of no single kernel, or its adjoint.

    The parameters: `mixing` is what `Q` is made from, `(2, groups, k, b, b)`; `weight` the kernel `M` of `J = M - Mᵀ`, of stride
    1 and with `k` groups for each one of the layer; `bias` is the layer's.

    Args:
        layer: the convolution whose place this takes.
        max_norm, blocks: as for `group_shuffle`.
    """

    mixing: Tensor
    kept = ("weight", "mixing")

    def __init__(self, layer: Any, max_norm: float = 1.0, blocks: int = 8) -> None:
        geometry = Unstrided.of(layer, "group_shuffle")
        check_blocks(blocks, geometry.rows, "input" if geometry.transposed else "output")
        if geometry.columns > geometry.rows:
            check_blocks(blocks, geometry.columns, "patch")
        check_mixing(blocks, max(geometry.rows, geometry.columns))
        super().__init__(layer, "group_shuffle", max_norm)
        self.blocks = int(blocks)
        self._ratios = ratios(_DEGREE)
        self._frames = Memory()
        for name, value in zip(self.kept, self.converted(layer.weight), strict=True):
            setattr(self, name, nn.Parameter(value, requires_grad=layer.weight.requires_grad))
        self.register_load_state_dict_pre_hook(load_plain)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocks={self.blocks}"

    def _map(self, x: Tensor) -> Tensor:
        """`p(J) Q x`."""
        geometry = self.geometry
        x = CONV[geometry.dims](x, self._patches(), None, geometry.stride, groups=geometry.groups)
        return self._turned(x, self._ratios)

    def _adjoint(self, y: Tensor) -> Tensor:
        """`Qᵀ p(-J) y`."""
        geometry = self.geometry
        y = self._turned(y, [-ratio for ratio in self._ratios])
        return CONV_TRANSPOSE[geometry.dims](y, self._patches(), None, geometry.stride, groups=geometry.groups)

    def _turned(self, x: Tensor, steps: Sequence[float]) -> Tensor:
        generator = self._memory(self, self.weight, self._generator)
        return horner(x, generator, steps, self.geometry, self.geometry.groups * self.blocks)

    def _patches(self) -> Tensor:
        """The corner of `Q` as a kernel as large as its stride."""
        frame = self._frames(self, self.mixing, self._frame)
        return frame.flatten(0, 1).unflatten(1, (-1, *self.geometry.stride))

    def _frame(self, mixing: Tensor) -> Tensor:
        """The corner of `Q`, `(groups, rows, columns)`: orthonormal columns, or rows where there are fewer."""
        matrix = shuffle_matrix(mixing.to(self.geometry.wide(mixing)))
        return matrix[:, : self.geometry.rows, : self.geometry.columns].contiguous()

    def _generator(self, weight: Tensor) -> Tensor:
        """The kernel of `J`, no longer than one."""
        kernel = weight.to(self.geometry.wide(weight)).unflatten(0, (self.geometry.groups * self.blocks, -1))
        return skew_kernel(kernel)

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """Of the weight of the layer that this is in the place of."""
        geometry = self.geometry
        return geometry.groups * geometry.rows, geometry.in_channels, *geometry.kernel_size

    @torch.no_grad()
    def converted(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`weight` and `mixing` for a kernel `c K`: `Q` near the middle tap of `K`, `J` the skew part of the blocks of `K Qᵀ`."""
        geometry = self.geometry
        middle: Any = (..., *geometry.radius)
        kernel = geometry.kernel(exact(weight) / self.max_norm)
        missing = geometry.columns - geometry.rows
        mixing = near(F.pad(kernel[middle], (0, max(-missing, 0), 0, max(missing, 0))), self.blocks)
        turned = torch.einsum("goi...,gpi->gop...", kernel, self._frame(mixing))
        parts = turned.unflatten(2, (self.blocks, -1)).unflatten(1, (self.blocks, -1)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        # strides of another memory format would make the outputs take it
        return (parts.flatten(0, 2) / 2).to(weight).contiguous(), mixing.to(weight)
