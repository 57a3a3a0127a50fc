"""Keras 3 on torch: `Conv2D(..., kernel_constraint=SpectralClip(1.0))`, and a callback that knows every layer's geometry."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from spectral_hooks import hooks, projections
from spectral_hooks.operators import ConvOperator, DenseOperator, KernelOperator, as_operator
from spectral_hooks.weights.patterns import Patterns, listed, matches


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


# -- from Keras' kernels to operators ------------------------------------------------------------------------------------


def _operator(kernel: Tensor, kind: Kind, strides: Any = 1, dilation_rate: Any = 1, groups: int = 1) -> KernelOperator:
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


def _operators(layer: Any) -> dict[str, KernelOperator]:
    """The operators of a layer's kernels, by the kernels' names; NotImplementedError says why there are none."""
    name = type(layer).__name__
    base = next(cls for cls in type(layer).__mro__ if cls.__module__.startswith("keras."))
    if any(getattr(type(layer), call, None) is not getattr(base, call, None) for call in ("call", "convolution_op")):
        raise NotImplementedError(f"{name} has a call of its own, so its kernel may not be the map that it computes.")
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        raise NotImplementedError(f"LoRA or quantization makes the kernel of this {name} anew in every call.")

    def kernel(attribute: str = "kernel") -> Tensor:
        value = getattr(layer, attribute).value
        # an initializer may leave the axes in another order in memory (orthogonal does), and they must flatten without a copy
        value.data = value.data.contiguous()
        return value.detach()

    geometry = getattr(layer, "strides", 1), getattr(layer, "dilation_rate", 1)
    match layer:
        case kl.Dense():
            return {"kernel": _operator(kernel(), "dense")}
        case kl.EinsumDense():
            return {"kernel": _einsum_operator(kernel(), layer.equation)}
        case kl.Conv1D() | kl.Conv2D() | kl.Conv3D():
            return {"kernel": _operator(kernel(), "conv", *geometry, layer.groups)}
        case kl.Conv1DTranspose() | kl.Conv2DTranspose() | kl.Conv3DTranspose():
            return {"kernel": _operator(kernel(), "transposed", *geometry)}
        case kl.DepthwiseConv1D() | kl.DepthwiseConv2D():
            return {"kernel": _operator(kernel(), "depthwise", *geometry)}
        case kl.SeparableConv1D() | kl.SeparableConv2D():
            depthwise = _operator(kernel("depthwise_kernel"), "depthwise", *geometry)
            return {"depthwise_kernel": depthwise, "pointwise_kernel": _operator(kernel("pointwise_kernel"), "conv")}
        case kl.SpectralNormalization():
            raise NotImplementedError("SpectralNormalization rewrites the kernel in every call; take the wrapper off.")
    recurrent = " Its recurrent_constraint=SpectralClip(...) bounds all gates together."
    raise NotImplementedError(f"{name} has no operator.{recurrent if hasattr(layer, 'recurrent_constraint') else ''}")


class Kernel(nn.Module):
    """A kernel of a Keras layer as a torch module: `weight` is the same memory, with its axes as torch orders them.

    For a layer that has no operator there is the reason in its place, and its weights are parameters as they are, but for those
    that a `SpectralClip` of its own constrains and those of embeddings. What does not train in Keras has `requires_grad=False`.
    """

    def __init__(self, layer: Any, operator: KernelOperator | str, variables: Sequence[Any]) -> None:
        super().__init__()
        self.operator = operator
        # hooks ask for the reason of each layer with weights, and there may be none but in the way that they are kept
        kernel = torch.empty(0) if isinstance(operator, str) else operator.weight
        self.weight = nn.Parameter(kernel, requires_grad=any(variable.trainable for variable in variables))
        free = variables if isinstance(operator, str) and not isinstance(layer, kl.Embedding) else ()
        for i, variable in enumerate(free):
            if variable.value.is_floating_point() and not isinstance(variable.constraint, SpectralClip):
                value = variable.value.detach()
                self.register_parameter(f"weight_{i}", nn.Parameter(value, requires_grad=variable.trainable))
        # in a tuple, for a Keras layer is a torch module and would become a part of this one
        self._layer = (layer,)

    @property
    def layer(self) -> Any:
        """The Keras layer."""
        return self._layer[0]


@as_operator.register
def _kernel_operator(layer: Kernel, input_size: Any = None) -> KernelOperator:
    if isinstance(layer.operator, str):
        raise NotImplementedError(layer.operator)
    if input_size is not None:
        raise NotImplementedError("`input_size` is not supported for Keras' layers: leave it out for the lattice operator.")
    return layer.operator.with_weight(layer.weight)


def mirror(model: Any) -> nn.Module:
    """A torch module with a `Kernel` for every kernel of a Keras model or layer, in the model's own memory.

    What acts on the layers of a torch model acts on this: attach a hook to it and to the torch optimizer of your own loop, or
    measure its modules with `spectral_norm(as_operator(kernel))`. Names are those of the layers, with dots between a model and
    its parts; a separable convolution has two kernels, `conv.depthwise_kernel` and `conv.pointwise_kernel`.

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
    image = nn.Module()
    own = [weight for weight in layer.weights if id(weight) not in inherited]
    if own:
        try:
            kernels = {name: Kernel(layer, op, [getattr(layer, name)]) for name, op in _operators(layer).items()}
        except NotImplementedError as reason:
            kernels = {"": Kernel(layer, str(reason), own)}
        if len(kernels) == 1:
            (image,) = kernels.values()
        # straight into the dictionary: add_module refuses names that modules have anyway, such as "type"
        else:
            image._modules.update(kernels)
    for part in parts:
        name = part.name
        # a subclassed model may give two layers the same name
        while name in image._modules:
            name += "_"
        image._modules[name] = _mirror(part, done)
    done[id(layer)] = image
    return image


# -- the constraint ------------------------------------------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="spectral_hooks")
class SpectralClip(keras.constraints.Constraint):
    """Project a layer's kernel after every update: its operator norm stays at most `max_norm`.

    A constraint sees the kernel alone. With the defaults it takes the kernel for that of a convolution without strides or
    groups (of a matrix, if it has two axes): the norm of that is never below the norm of `Conv`, `Conv...Transpose`,
    `DepthwiseConv` and `Dense` layers, so the bound holds for them all. The geometry, given in the layer's own words, makes the
    bound sharp: without it strided, grouped and depthwise kernels are clipped more than they need.

    Guaranteed: after every update the norm at every input size and padding is at most `max_norm` (certified, as by
    `projections.clip`). Keras applies constraints neither to the first weights nor to the averages that `use_ema=True` writes
    into the model after training: `SpectralClipCallback` does both.

    Args:
        max_norm: the bound.
        kind: `"dense"`, `"conv"`, `"depthwise"` or `"transposed"`; None for `"dense"` with two axes and `"conv"` with more.
            For an `EinsumDense` kernel of more than two axes, which is no convolution, use the callback.
        strides, dilation_rate, groups: of the layer.
        rounds: quality of the projection of convolutions, see `projections.clip`.

    Raises:
        ValueError: an argument out of range; in training, a NaN or infinite kernel.

    Example:
        >>> import keras
        >>> from spectral_hooks.integrations.keras import SpectralClip
        >>> layer = keras.layers.Conv2D(8, 3, strides=2, kernel_constraint=SpectralClip(1.0, strides=2))
        >>> layer = keras.layers.DepthwiseConv2D(3, depthwise_constraint=SpectralClip(1.0, kind="depthwise"))
    """

    def __init__(
        self,
        max_norm: float = 1.0,
        *,
        kind: Kind | None = None,
        strides: int | tuple[int, ...] = 1,
        dilation_rate: int | tuple[int, ...] = 1,
        groups: int = 1,
        rounds: int = 3,
    ) -> None:
        hooks.SpectralClip(max_norm, rounds=rounds)  # for its checks
        if kind not in (None, *get_args(Kind)):
            raise ValueError(f"`kind` must be one of {', '.join(get_args(Kind))}, or None; got {kind!r}.")
        self.max_norm, self.kind, self.rounds = max_norm, kind, rounds
        self.strides, self.dilation_rate, self.groups = strides, dilation_rate, groups

    # a compiled training step must not trace into the projection
    @torch.compiler.disable
    def __call__(self, w: Any) -> Tensor:
        """The kernel inside the ball: a new tensor."""
        kernel = keras.ops.convert_to_tensor(w).detach().clone(memory_format=torch.contiguous_format)
        if kernel.ndim < 2:
            raise ValueError(f"SpectralClip constrains kernels, of two axes or more; got {w!r}.")
        kind = self.kind or ("dense" if kernel.ndim == 2 else "conv")
        op = _operator(kernel, kind, self.strides, self.dilation_rate, self.groups)
        try:
            op.weight.copy_(projections.clip(op, self.max_norm, rounds=self.rounds))
        except ValueError as error:
            raise ValueError(f"{getattr(w, 'path', 'kernel')}: {error}") from error
        return kernel

    def get_config(self) -> dict[str, Any]:
        names = ("max_norm", "kind", "strides", "dilation_rate", "groups", "rounds")
        return {name: getattr(self, name) for name in names}


# -- the callback --------------------------------------------------------------------------------------------------------


class HookCallback(keras.callbacks.Callback):
    """Keras' events as those of a hook: started when training starts, called after every update of the weights.

    Updates are those that the model's optimizers count: neither the micro-steps of gradient accumulation nor steps that loss
    scaling skips. `before_step` is never called, for Keras has no event between the gradients and the update.

    Args:
        hook: a `spectral_hooks.hooks.Hook`; it sees the `mirror` of the model, and `training=True`.
    """

    def __init__(self, hook: Any) -> None:
        super().__init__()
        self.hook = hook
        self._updates = 0

    def on_train_begin(self, logs: Any = None) -> None:
        self._updates = self._count()
        self.hook.training = True  # leave frozen layers as they are
        self.hook.start(mirror(self.model))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        before, self._updates = self._updates, self._count()
        if self._updates != before:
            self.hook.after_step()

    def _count(self) -> int:
        # a model with a train_step of its own may hold several
        optimizers = [each for each in vars(self.model).values() if isinstance(each, keras.optimizers.Optimizer)]
        return sum(int(keras.ops.convert_to_numpy(each.iterations)) for each in optimizers)


class SpectralClipCallback(HookCallback):
    """`spectral_hooks.SpectralClip` as a callback: the operator norm of layers at most `max_norm`, from the first step on.

    It knows each layer's strides, dilation and groups. A separable convolution is two maps, each of which obeys the bound.
    `skipped` has the reason for every layer with weights that is left out: recurrent cells, for example, and frozen layers, which
    stay as they are. When more than a tenth of the weights is free for want of support, training starts with a warning.
    List it after callbacks that change weights (`SwapEMAWeights`) and before those that save them or read logs.

    Guaranteed: the bound holds when training starts, after every `every`-th update, and in the model that `fit` leaves,
    averages of `use_ema=True` included. With `every=1` it also holds for the averages that `ema_overwrite_frequency` and
    `SwapEMAWeights` put into the model. Keras saves no state of callbacks: a run that is loaded and continued equals an
    uninterrupted one with `slack=0`, else within the slack.

    Args:
        max_norm, every, rounds, projection, slack, schedule: as for `spectral_hooks.SpectralClip`.
        layers, exclude: likewise; types and predicates are those of Keras' layers, and globs match their names, with dots between
            a model and its parts.
        log: add to each epoch's logs, and so to the `History`, `spectral_clip/norm_before` (the largest norm of a constrained
            layer that an update has led to, before clipping) and `spectral_clip/clipped` (how many kernels were clipped, on
            average over the updates); costs a certified norm of every layer after every update.

    Example:
        >>> import keras
        >>> from spectral_hooks.integrations.keras import SpectralClipCallback
        >>> clip = SpectralClipCallback(1.0, exclude=["head", keras.layers.Conv2DTranspose])
        >>> history = model.fit(x, y, callbacks=[clip])  # doctest: +SKIP
    """

    hook: hooks.SpectralClip

    def __init__(
        self,
        max_norm: float = 1.0,
        *,
        layers: Patterns = None,
        exclude: Patterns = None,
        every: int = 1,
        rounds: int = 3,
        projection: str | projections.Projection = "clip",
        slack: float = 0.08,
        schedule: Callable[[int], float] | None = None,
        log: bool = False,
    ) -> None:
        layers, exclude = _of_keras("layers", layers), _of_keras("exclude", exclude)
        options: dict[str, Any] = {"projection": projection, "slack": slack, "schedule": schedule, "record": log}
        super().__init__(hooks.SpectralClip(max_norm, layers=layers, exclude=exclude, every=every, rounds=rounds, **options))
        self._seen: list[tuple[float, int]] = []
        self._training = False

    @property
    def skipped(self) -> dict[str, str]:
        """For each layer with weights that is not constrained, why."""
        return self.hook.skipped

    def on_train_begin(self, logs: Any = None) -> None:
        super().on_train_begin(logs)
        self._training = True
        self._seen.clear()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        step = self.hook.step
        super().on_train_batch_end(batch, logs)
        if self.hook.step == step:
            # no update was seen; but averages may be written at micro-steps too, and a train_step may hold an optimizer elsewhere
            self._project()
        elif self.hook.largest_norm is not None:
            self._seen.append((self.hook.largest_norm, self.hook.clipped))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None and self._seen:
            norms, clipped = zip(*self._seen, strict=True)
            logs |= {"spectral_clip/norm_before": max(norms), "spectral_clip/clipped": sum(clipped) / len(clipped)}
        self._seen.clear()
        self._project()

    # BackupAndRestore and SwapEMAWeights have put other weights into the model by now; a weight inside stays bit for bit
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._project()

    def on_test_begin(self, logs: Any = None) -> None:
        self._project()

    # after the optimizer's averages have become the model
    def on_train_end(self, logs: Any = None) -> None:
        self.hook.project()
        self._training = False

    def _project(self) -> None:
        # with every > 1 it would make training depend on when it is validated
        if self._training and self.hook.every == 1:
            self.hook.project()


def _of_keras(argument: str, patterns: Patterns) -> Patterns:
    """Patterns for the mirror: types and predicates are asked about the Keras layer."""
    if patterns is None:
        return None
    return [pattern if isinstance(pattern, str) else partial(_matches_layer, argument, pattern) for pattern in listed(patterns)]


def _matches_layer(argument: str, pattern: Any, name: str, module: nn.Module) -> bool:
    return isinstance(module, Kernel) and matches(argument, pattern, name, module.layer)
