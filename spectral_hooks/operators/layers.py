"""From a layer to its operator, and the layers that are refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune
from torch.nn.utils.parametrize import type_before_parametrizations

from .base import KernelOperator, LinearOperator
from .conv import ConvOperator
from .dense import DenseOperator

InputSize = int | Sequence[int] | None

#: Subclasses whose forward is another, by qualified name, and what they do to their weight.
_REWRITES = {
    "StdConv2d": "standardizes its weight in forward",
    "StdConv2dSame": "standardizes its weight in forward",
    "ScaledStdConv2d": "standardizes its weight in forward; constrain its `gain` instead",
    "ScaledStdConv2dSame": "standardizes its weight in forward; constrain its `gain` instead",
}


@singledispatch
def as_operator(layer: Any, input_size: InputSize = None) -> KernelOperator:
    """The linear map that a layer computes, without its bias.

    `nn.Linear` and transformers' `Conv1D` become a `DenseOperator`; `nn.Conv1d/2d/3d` and `nn.ConvTranspose1d/2d/3d`
    a `ConvOperator`. A parametrized layer is measured by the weight that it computes now, a linear layer with LoRA adapters of
    PEFT by the merged one, base + Σ scaling · B A over the active adapters.

    To teach it a layer of your own: `as_operator.register(MyLayer, lambda layer, input_size=None: ...)`, a function that returns
    a `DenseOperator` or a `ConvOperator`. Its weight can be written too if it is a parameter of the layer, a view of one
    (transposed, reshaped, a part), or a parametrized tensor with `right_inverse`. If the layer computes it, give the operator the
    inverse map as `assign=`, a function of the new weight that changes the layer's parameters in place. After `assign(w)` the
    operator of the layer must have the weight `w`: it is read back, and all is put back if it does not. Without one the layer can
    be measured, and hooks refuse it.

    Args:
        layer: the layer. Its weight is not copied: gradients flow through the operator.
        input_size: spatial size of the input (int or one per axis) for the finite operator of a convolution, None for its
            lattice operator, valid for every size. A matrix has one size only and ignores it.

    Raises:
        TypeError: there is no operator for this type of layer.
        NotImplementedError: the layer's forward does not apply its weight as it is stored.
        ValueError: the weight is not there (lazy, partitioned), or an argument does not fit.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.as_operator(torch.nn.Linear(3, 2)).out_shape
        (2,)
        >>> sh.as_operator(torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), input_size=(9, 6)).out_shape
        (8, 5, 3)

        A layer that scales its weight in forward:

        >>> class Scaled(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.eye(2))
        ...     def forward(self, x):
        ...         return torch.nn.functional.linear(x, 4 * self.weight)
        >>> @sh.as_operator.register
        ... def _(layer: Scaled, input_size=None):
        ...     return sh.DenseOperator(4 * layer.weight, assign=lambda w: layer.weight.copy_(w / 4))
        >>> model = torch.nn.Sequential(Scaled())
        >>> sh.SpectralClip(1.0).start(model)
        >>> model[0].weight.data
        tensor([[0.2500, 0.0000],
                [0.0000, 0.2500]])
    """
    if isinstance(layer, LinearOperator):
        return cast(KernelOperator, layer)  # as it is, though a composition has no weight
    for cls in type(layer).__mro__:
        if cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers."):
            return DenseOperator(_weight(layer, cls), transposed=True)
    if is_adapter(layer):
        return _lora(layer)
    if isinstance(layer, Tensor):
        raise TypeError("`layer` is a tensor: say which map it is, with DenseOperator(weight) or ConvOperator(weight, ...).")
    kind = type_before_parametrizations(layer) if isinstance(layer, nn.Module) else type(layer)
    # many libraries have a `Linear` of their own
    where = f"{kind.__module__}.{kind.__qualname__}"
    raise TypeError(f"`layer` of type {where} has no operator; register one with as_operator.register.")


def is_adapter(layer: Any) -> bool:
    """Whether PEFT has laid an adapter around this layer."""
    return any(cls.__name__ == "BaseTunerLayer" and cls.__module__.startswith("peft.") for cls in type(layer).__mro__)


def lora_factors(layer: Any) -> list[tuple[Any, Any, float]]:
    """The layers `A` and `B` and the scaling of each LoRA adapter that acts now."""
    if layer.merged or layer.disable_adapters:
        return []
    return [
        (layer.lora_A[name], layer.lora_B[name], layer.scaling[name]) for name in layer.active_adapters if name in layer.lora_A
    ]


def _lora(layer: Any) -> KernelOperator:
    """The merged weight, as (out, in), of plain LoRA on a linear layer."""
    base = as_operator(layer.base_layer)
    # older versions of PEFT have no variants, but say of which adapters the weight is decomposed
    dora = {name for name, is_so in getattr(layer, "use_dora", {}).items() if is_so}
    variants = dora.union(getattr(layer, "lora_variant", {}))
    plain = type(layer).__module__.startswith("peft.tuners.lora.") and not any(name in variants for name in layer.active_adapters)
    if not plain or not isinstance(base, DenseOperator):
        raise NotImplementedError(
            f"{type(layer).__name__} of {type(layer).__module__} on a {type(layer.base_layer).__name__} is no plain LoRA on a "
            "linear layer, so what it adds to the weight is not known here. Merge it first (merge_and_unload), or exclude it."
        )
    weight = base.to_dense()
    for right, left, scaling in lora_factors(layer):
        a, b = as_operator(right).weight, as_operator(left).weight
        dtype = torch.promote_types(torch.promote_types(a.dtype, weight.dtype), torch.float32)
        weight = weight.to(dtype) + scaling * (b.to(dtype) @ a.to(dtype))
    return DenseOperator(weight)


@as_operator.register
def _linear(layer: nn.Linear, input_size: InputSize = None) -> KernelOperator:
    # timm's Linear only adds casts for scripting
    kind = type_before_parametrizations(layer)
    return DenseOperator(_weight(layer, kind if kind.__module__ == "timm.layers.linear" else nn.Linear))


@as_operator.register
def _conv(layer: nn.modules.conv._ConvNd, input_size: InputSize = None) -> KernelOperator:
    kind = type_before_parametrizations(layer)
    same = kind.__name__ == "Conv2dSame" and kind.__module__.startswith("timm.")
    transposed = layer.transposed
    padding: Any = layer.padding
    if same:
        padding = _same_padding(layer, input_size)
    return ConvOperator(
        _weight(layer, kind if same else _torch_class(layer)),
        stride=layer.stride,
        padding=padding,
        output_padding=layer.output_padding if transposed else 0,
        dilation=layer.dilation,
        groups=layer.groups,
        transposed=transposed,
        padding_mode=layer.padding_mode,
        input_size=input_size,
    )


def _torch_class(layer: nn.Module) -> type[nn.Module]:
    return next(cls for cls in type(layer).__mro__ if cls.__module__ == "torch.nn.modules.conv")


def _same_padding(layer: nn.modules.conv._ConvNd, input_size: InputSize) -> Any:
    """timm's dynamic TensorFlow-style padding; on the lattice the amount changes nothing."""
    if input_size is None:
        return 0
    sizes = (input_size,) * 2 if isinstance(input_size, int) else tuple(input_size)
    pairs = []
    for n, k, s, d in zip(sizes, layer.kernel_size, layer.stride, layer.dilation, strict=False):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        pairs.append((total // 2, total - total // 2))
    return tuple(pairs)


def _weight(layer: nn.Module, forward_of: type[nn.Module]) -> Tensor:
    """The weight that the layer applies, or the reason why it cannot be told."""
    name = type_before_parametrizations(layer).__name__
    forwards = ("forward", "_conv_forward")
    if any(getattr(type(layer), f, None) is not getattr(forward_of, f, None) for f in forwards):
        why = _REWRITES.get(name, "has a forward of its own, so its weight may not be the map that it computes")
        raise NotImplementedError(f"{name} {why}. Exclude it, or register its operator with as_operator.register.")
    for hook in layer._forward_pre_hooks.values():
        if type(hook).__module__ in ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm"):
            kind = type(hook).__module__.rsplit(".", 1)[1]
            raise NotImplementedError(
                f"{name} has its weight rewritten before every forward by torch.nn.utils.{kind}. "
                f"Use torch.nn.utils.parametrizations.{kind}, or remove it."
            )
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == "weight":
            # the attribute `weight` is that of the last forward
            return hook.apply_mask(layer)
    weight: Any = layer.weight
    if is_lazy(weight):
        raise ValueError(f"{name} has no weight yet: run one forward first.")
    if hasattr(weight, "ds_id"):
        raise ValueError(f"the weight of {name} is partitioned by DeepSpeed: gather it first, or use FSDP2.")
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim < 2:
        shown = f"{weight.dtype} of shape {tuple(weight.shape)}" if isinstance(weight, Tensor) else type(weight).__name__
        raise ValueError(f"the weight of {name} is no floating-point matrix or kernel; got {shown}.")
    return weight
