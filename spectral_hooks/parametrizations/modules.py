"""What the modules that take the place of a convolution have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linalg.precision import without_autocast
from ..operators import ConvOperator, KernelOperator, as_operator
from .geometry import MODULES, Unstrided
from .memory import Memory
from .remove import check_whole, remove_spectral, spectral_tensors

CONV: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


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
