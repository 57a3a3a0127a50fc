"""A Keras model on torch as torch modules in the same memory: what acts on the layers of a torch model acts on it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spectral_hooks.operators import ConvOperator, DenseOperator, KernelOperator, as_operator


def _backend() -> str:
    """The backend that Keras runs on, or would run on: the import of another may fail, and cannot be undone."""
    if "keras" in sys.modules:
        return sys.modules["keras"].config.backend()
    if named := os.environ.get("KERAS_BACKEND"):
        return named
    try:
        settings = Path(os.environ.get("KERAS_HOME", "~/.keras"), "keras.json").expanduser()
        return json.loads(settings.read_text(encoding="utf-8"))["backend"]
    except (OSError, ValueError, KeyError):
        return "tensorflow"


if find_spec("keras") is None:
    raise ImportError("Keras is not installed: pip install 'spectral_hooks[keras]'.")
if _backend() != "torch":
    raise ImportError(
        f"spectral_hooks works with Keras on torch; got the backend {_backend()!r}. Set the environment variable "
        "KERAS_BACKEND=torch before Keras is imported for the first time."
    )

import keras  # noqa: E402
from keras import layers as kl  # noqa: E402

Kind = Literal["dense", "conv", "depthwise", "transposed"]
#: From a kernel as Keras lays it to the lattice operator, whose weight is a view: what is written into it is in the kernel.
Layout = Callable[[Tensor], KernelOperator]


# -- from Keras' kernels to operators ------------------------------------------------------------------------------------


def kernel_operator(kernel: Tensor, kind: Kind, strides: Any = 1, dilation_rate: Any = 1, groups: int = 1) -> KernelOperator:
    """The lattice operator of a kernel as Keras lays it; its weight is a view, so what is written into it is in the kernel."""
    if kind == "dense":
        return DenseOperator(kernel.mT)
    # (*taps, in, out) to (out, in, *taps); transposed ones are (*taps, out, in), and (in, out, *taps) in torch
    weight = kernel.permute(-1, -2, *range(kernel.ndim - 2))
    if kind == "depthwise":
        # (*taps, in, multiplier): a group for each input channel
        groups = kernel.shape[-2]
        weight = weight.transpose(0, 1).view(-1, 1, *kernel.shape[:-2])
    return ConvOperator(weight, stride=strides, dilation=dilation_rate, groups=groups, transposed=kind == "transposed")


def _einsum_operator(kernel: Tensor, equation: str) -> KernelOperator:
    """The matrix of an EinsumDense: the kernel's axes that only the output has, by those that only the input has."""
    inputs, axes, outputs = equation.replace(" ", "").replace("->", ",").split(",")
    rows = [i for i, axis in enumerate(axes) if axis in outputs and axis not in inputs]
    columns = [i for i, axis in enumerate(axes) if axis in inputs and axis not in outputs]
    if len(rows) + len(columns) < len(axes) or set(inputs) - set(axes) - set(outputs):
        raise NotImplementedError(f"the equation {equation!r} is more than a product with one matrix.")
    kernel = kernel.permute(*rows, *columns)
    try:
        return DenseOperator(kernel.view(prod(kernel.shape[: len(rows)]), -1))
    except RuntimeError:
        raise NotImplementedError(f"the kernel of {equation!r} does not lie in memory as a matrix.") from None


def _check_plain(layer: Any) -> None:
    """Refuse a layer whose weights may not be what it computes with."""
    name = type(layer).__name__
    base = next(cls for cls in type(layer).__mro__ if cls.__module__.startswith("keras."))
    if any(getattr(type(layer), call, None) is not getattr(base, call, None) for call in ("call", "convolution_op")):
        raise NotImplementedError(f"{name} has a call of its own, so its kernel may not be the map that it computes.")
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        raise NotImplementedError(f"LoRA or quantization makes the kernel of this {name} anew in every call.")


def _layouts(layer: Any) -> dict[str, Layout]:
    """How the kernels of a layer are laid, by the kernels' names; NotImplementedError says why there are none."""
    geometry: dict[str, Any] = {"strides": getattr(layer, "strides", 1), "dilation_rate": getattr(layer, "dilation_rate", 1)}
    depthwise = partial(kernel_operator, kind="depthwise", **geometry)
    match layer:
        case kl.Dense():
            return {"kernel": partial(kernel_operator, kind="dense")}
        case kl.EinsumDense():
            return {"kernel": partial(_einsum_operator, equation=layer.equation)}
        case kl.Conv1D() | kl.Conv2D() | kl.Conv3D():
            return {"kernel": partial(kernel_operator, kind="conv", groups=layer.groups, **geometry)}
        case kl.Conv1DTranspose() | kl.Conv2DTranspose() | kl.Conv3DTranspose():
            return {"kernel": partial(kernel_operator, kind="transposed", **geometry)}
        case kl.DepthwiseConv1D() | kl.DepthwiseConv2D():
            return {"kernel": depthwise}
        case kl.SeparableConv1D() | kl.SeparableConv2D():
            return {"depthwise_kernel": depthwise, "pointwise_kernel": partial(kernel_operator, kind="conv")}
        case kl.SpectralNormalization():
            raise NotImplementedError("SpectralNormalization rewrites the kernel in every call; take the wrapper off.")
    recurrent = " Its recurrent_constraint=SpectralClip(...) bounds all gates together."
    raise NotImplementedError(
        f"{type(layer).__name__} has no operator.{recurrent if hasattr(layer, 'recurrent_constraint') else ''}"
    )


def _contiguous(variable: Any) -> Tensor:
    """A variable's value, its axes in order in memory, so that they flatten without a copy."""
    # an initializer may leave them in another (orthogonal does)
    variable.value.data = variable.value.data.contiguous()
    return variable.value.detach()


# -- the modules ---------------------------------------------------------------------------------------------------------


class BoundingConstraint(keras.constraints.Constraint):
    """A constraint that bounds the norm of what it constrains, so that this is not free for want of support."""


class Kernel(nn.Module):
    """A kernel of a Keras layer as a torch module: `weight` is the same memory, with its axes as torch orders them."""

    def __init__(self, layer: Any, variable: Any, layout: Layout) -> None:
        super().__init__()
        self.operator = layout(_contiguous(variable))
        self.weight = nn.Parameter(self.operator.weight, requires_grad=bool(variable.trainable))
        self.variable, self.layout = variable, layout
        # in a tuple, for a Keras layer is a torch module and would become a part of this one
        self._layer = (layer,)

    @property
    def layer(self) -> Any:
        """The Keras layer."""
        return self._layer[0]


class Unsupported(nn.Module):
    """A Keras layer that has no operator, with the reason in its place.

    Its weights are parameters as they are, but for those that a `SpectralClip` of its own constrains and those of embeddings.
    What does not train in Keras has `requires_grad=False`.
    """

    def __init__(self, layer: Any, variables: Sequence[Any], reason: str) -> None:
        super().__init__()
        self.reason, self._layer = reason, (layer,)
        # hooks ask for the reason of each layer with weights, and there may be none but in the way that they are kept
        self.weight = nn.Parameter(torch.empty(0), requires_grad=any(variable.trainable for variable in variables))
        for i, variable in enumerate(() if isinstance(layer, kl.Embedding) else variables):
            if variable.value.is_floating_point() and not isinstance(variable.constraint, BoundingConstraint):
                value = variable.value.detach()
                self.register_parameter(f"weight_{i}", nn.Parameter(value, requires_grad=variable.trainable))


class BatchNormalization(_BatchNorm):
    """A batch normalization of Keras as one of torch: `weight` (`γ`) and `running_var` are the same memory."""

    def __init__(self, layer: Any) -> None:
        variance = layer.moving_variance.value.detach()
        super().__init__(len(variance), layer.epsilon, affine=False, track_running_stats=False)
        self._layer = (layer,)
        if layer.gamma is not None:
            self.weight = nn.Parameter(layer.gamma.value.detach(), requires_grad=bool(layer.gamma.trainable))
        self.running_var = variance


@as_operator.register
def _operator_of_kernel(layer: Kernel, input_size: Any = None) -> KernelOperator:
    if input_size is not None:
        raise NotImplementedError("`input_size` is not supported for Keras' layers: leave it out for the lattice operator.")
    return layer.operator.with_weight(layer.weight)


@as_operator.register
def _operator_of_unsupported(layer: Unsupported, input_size: Any = None) -> KernelOperator:
    raise NotImplementedError(layer.reason)


@as_operator.register
def _operator_of_normalization(layer: BatchNormalization, input_size: Any = None) -> KernelOperator:
    raise NotImplementedError("BatchNormalization has no operator; batch_norm='clip' bounds its gains.")


def layer_of(module: nn.Module) -> Any:
    """The Keras layer that a module of a mirror stands for; None for what only holds others."""
    return module._layer[0] if isinstance(module, (Kernel, Unsupported, BatchNormalization)) else None


def kernels_of(image: nn.Module) -> Iterator[Kernel]:
    """The kernels of a mirror."""
    return (module for module in image.modules() if isinstance(module, Kernel))


# -- from Keras' models to modules ---------------------------------------------------------------------------------------


def mirror(model: Any) -> nn.Module:
    """A torch module with a `Kernel` for every kernel of a Keras model or layer, in the model's own memory.

    What acts on the layers of a torch model acts on this: attach a hook to it and to the torch optimizer of your own loop, or
    measure its modules with `spectral_norm(as_operator(kernel))`. Names are those of the layers, with dots between a model and
    its parts; a separable convolution has two kernels, `conv.depthwise_kernel` and `conv.pointwise_kernel`. A batch
    normalization is one of torch, and a layer that has no operator an `Unsupported` with the reason.

    Args:
        model: built: called once, or given an input shape.

    Example:
        >>> import keras, spectral_hooks as sh
        >>> model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Conv2D(4, 3, strides=2, name="conv")])
        >>> sh.as_operator(mirror(model).conv).stride
        (2, 2)
    """
    return _mirror(model, {})


def _mirror(layer: Any, done: dict[int, nn.Module]) -> nn.Module:
    if id(layer) in done:
        return done[id(layer)]
    # what SpectralNormalization wraps is not for others to write
    parts = [] if isinstance(layer, kl.SpectralNormalization) else layer._flatten_layers(include_self=False, recursive=False)
    inherited = {id(weight) for part in parts for weight in part.weights}
    own = [weight for weight in layer.weights if id(weight) not in inherited]
    image = _own_image(layer, own) if own else nn.Module()
    for part in parts:
        name = part.name
        # a subclassed model may give two layers the same name
        while name in image._modules:
            name += "_"
        # straight into the dictionary: add_module refuses names that modules have anyway, such as "type"
        image._modules[name] = _mirror(part, done)
    done[id(layer)] = image
    return image


def _own_image(layer: Any, variables: Sequence[Any]) -> nn.Module:
    """What stands for a layer with weights of its own."""
    try:
        _check_plain(layer)
        if isinstance(layer, kl.BatchNormalization):
            return BatchNormalization(layer)
        kernels = {name: Kernel(layer, getattr(layer, name), layout) for name, layout in _layouts(layer).items()}
    except NotImplementedError as reason:
        return Unsupported(layer, variables, str(reason))
    if len(kernels) == 1:
        return next(iter(kernels.values()))
    image = nn.Module()
    image._modules.update(kernels)
    return image


@contextmanager
def gradients_laid(image: nn.Module, gradients: Mapping[int, Tensor]) -> Iterator[list[Tensor]]:
    """While in here the kernels of a mirror have their gradients; what becomes of these is in the given tensors afterwards.

    Gives the parameters of the mirror that have one.

    Args:
        image: of `mirror`.
        gradients: contiguous, by the `id` of Keras' variables. A kernel without one has None.
    """
    found = [(kernel, gradients.get(id(kernel.variable))) for kernel in kernels_of(image)]
    laid = {kernel: kernel.layout(gradient).weight for kernel, gradient in found if gradient is not None}
    for kernel, gradient in laid.items():
        kernel.weight.grad = gradient
    try:
        yield [kernel.weight for kernel in laid]
        for kernel, gradient in laid.items():
            if kernel.weight.grad is not None and kernel.weight.grad is not gradient:
                gradient.copy_(kernel.weight.grad)
    finally:
        for kernel in laid:
            kernel.weight.grad = None
