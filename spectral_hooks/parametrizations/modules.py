"""What the modules that take the place of a convolution have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..linalg.precision import without_autocast
from ..linalg.scaling import check_finite
from ..operators import ConvOperator, KernelOperator, as_operator
from ..projections.arguments import check_max_norm
from .arguments import check_reachable
from .geometry import MODULES, MODULES_TRANSPOSE, Unstrided
from .memory import Memory
from .remove import check_whole, remove_spectral, spectral_tensors


class OrthogonalConv(nn.Module):
    """`max_norm` times an isometry, or its adjoint, in the place of a convolution; of no single small kernel.

    `_map` and `_adjoint` are what subclasses define: the isometry of the convolution, or of the one that a transposed layer is
    the adjoint of, and the adjoint of that.

    Args:
        layer: the convolution whose parameters this takes over.
        name: of the function that makes it, for errors.
        max_norm: the gain.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.modules.conv._ConvNd, name: str, max_norm: float) -> None:
        super().__init__()
        self.max_norm = check_max_norm(max_norm)
        self.geometry = Unstrided.of(layer, name)
        check_reachable("max_norm", self.max_norm, self.geometry.wide(layer.weight))
        take_over(self, layer)
        self._memory = Memory()

    def extra_repr(self) -> str:
        return f"{self.geometry}{'' if self.bias is not None else ', bias=False'}, max_norm={self.max_norm}"

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if output_size is not None:
            self.geometry.check_output(x, output_size)
        return self.geometry.around(x, self.bias, self._transposed if self.geometry.transposed else self._plain)

    def to_plain(self) -> nn.Module:
        """The equal plain convolution, whose kernel is as large as its stride: for layers whose patches do not overlap.

        Raises:
            NotImplementedError: patches overlap; then no convolution of a small kernel is this map.
        """
        with torch.no_grad():
            op = self._operator()
        return plain(self, op.weight, op.transposed, stride=op.stride, output_padding=op.output_padding, groups=op.groups)

    def _map(self, x: Tensor) -> Tensor:
        """The isometry applied to a batch, in float32 at least."""
        raise NotImplementedError

    def _adjoint(self, y: Tensor) -> Tensor:
        """The adjoint of `_map`."""
        raise NotImplementedError

    def _plain(self, x: Tensor) -> Tensor:
        return self._with_gain(self._map(x))

    def _transposed(self, x: Tensor) -> Tensor:
        return self._with_gain(self._adjoint(x))

    def _with_gain(self, y: Tensor) -> Tensor:
        return y if self.max_norm == 1 else self.max_norm * y

    def _operator(self, input_size: int | Sequence[int] | None = None) -> ConvOperator:
        """That of the equal plain convolution, or the reason why there is none."""
        geometry, weight = self.geometry, self.weight
        if any(geometry.radius):
            raise NotImplementedError(
                f"{type(self).__name__} is orthogonal by construction and no convolution of a small kernel: it has no weight to "
                f"measure, to change or to make plain. Its norm is {self.max_norm:g}: keep it, and exclude it where weights are "
                "acted on."
            )
        # without overlap nothing is seen of the neighbours, and a single patch tells all; of the adjoint, the same kernel
        patches = torch.eye(geometry.columns, device=weight.device, dtype=geometry.wide(weight))
        patches = patches.unflatten(1, (-1, *geometry.stride)).repeat(1, geometry.groups, *[1] * geometry.dims)
        kernel = without_autocast(self._plain, patches).flatten(1).T.unflatten(1, (-1, *geometry.stride)).to(weight.dtype)
        return ConvOperator(
            kernel, geometry.stride, groups=geometry.groups, transposed=geometry.transposed, input_size=input_size
        )


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


def plain(module: Any, weight: Tensor, transposed: bool = False, **settings: Any) -> nn.Module:
    """A plain convolution with this weight, and with the bias of the module in whose place it comes."""
    first, second, *taps = weight.shape
    second *= settings["groups"]
    if transposed:
        kind, channels = MODULES_TRANSPOSE[len(taps)], (first, second)
    else:
        kind, channels = MODULES[len(taps)], (second, first)
        settings.pop("output_padding", None)
    result = kind(*channels, tuple(taps), bias=False, **settings, device=weight.device, dtype=weight.dtype)
    result.weight = nn.Parameter(weight.detach().clone(), requires_grad=module.weight.requires_grad)
    result.bias = module.bias
    return result.train(module.training)


def load_plain(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded: the weight of a plain layer, known by the lack of other tensors beside it, is converted.

    A hook for modules that keep other tensors in the weight's place. They say which, `kept`, the weight's own name first, what
    shape a plain one has, `plain_shape`, and `converted` makes the one of the other.
    """
    first, *others = (f"{prefix}{name}" for name in module.kept)
    if first in state and not any(name in state for name in others) and state[first].shape == module.plain_shape:
        check_finite(state[first])
        state.update(zip((first, *others), module.converted(state[first].to(module.weight.dtype)), strict=True))
