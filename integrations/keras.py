"""Keras 3 on torch: `Conv2D(..., kernel_constraint=SpectralClip(1.0))`, and a callback that knows every layer's geometry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, get_args

# before Keras, whose backend it checks
from .keras_mirror import BoundingConstraint, Kind, gradients_laid, kernel_operator, layer_of
from .keras_mirror import Kernel as Kernel
from .keras_mirror import mirror as mirror

# isort: split
import keras
import torch
from torch import Tensor, nn

from spectral_hooks import hooks, projections
from spectral_hooks.operators.base import is_whole
from spectral_hooks.weights.patterns import matches
from spectral_hooks.weights.selection import Split

from .shared import ClipOptions, HookHolder

if TYPE_CHECKING:
    from typing_extensions import Unpack


@keras.saving.register_keras_serializable(package="spectral_hooks")
class SpectralClip(BoundingConstraint):
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
        for name, value in (("strides", strides), ("dilation_rate", dilation_rate), ("groups", groups)):
            each = value if isinstance(value, (tuple, list)) and name != "groups" else (value,)
            if not all(is_whole(number) and number > 0 for number in each):
                raise ValueError(f"`{name}` must be positive whole numbers, as the layer has them; got {value!r}.")
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
        op = kernel_operator(kernel, kind, self.strides, self.dilation_rate, self.groups)
        try:
            op.weight.copy_(projections.clip(op, self.max_norm, rounds=self.rounds))
        except ValueError as error:
            raise ValueError(f"{getattr(w, 'path', 'kernel')}: {error}") from error
        return kernel

    def get_config(self) -> dict[str, Any]:
        names = ("max_norm", "kind", "strides", "dilation_rate", "groups", "rounds")
        return {name: getattr(self, name) for name in names}


class HookCallback(HookHolder, keras.callbacks.Callback):
    """Keras' events as those of a hook: when training starts, around every update, and wherever other weights are put in.

    Updates are those that the model's optimizers count: neither the micro-steps of gradient accumulation nor steps that loss
    scaling skips. Before each the hook finds the gradients, as Keras has clipped them, on the kernels of the `mirror`; what it
    makes of them is what the optimizer gets. With `every=1` the hook also brings in order what averages put into the model.
    What the hook measures goes to each epoch's logs, and so to the `History`, on average over the epoch's actions. Keras saves no
    state of callbacks: what `hook.state_dict()` gives may be saved by hand, and given to `hook.load_state_dict` before `fit`.

    Args:
        hook: any `spectral_hooks.hooks.Hook`; it sees the `mirror` of the model, and `training=True`. Types and predicates among
            its patterns are asked about Keras' layers from now on.
    """

    def __init__(self, hook: hooks.Hook) -> None:
        super().__init__()
        hook.layers, hook.exclude = _of_keras("layers", hook.layers), _of_keras("exclude", hook.exclude)
        if hook.split is not None:
            hook.split = dict(zip(_of_keras("split", list(hook.split)), hook.split.values(), strict=True))
        self.hook = hook
        self._updates = 0
        self._training = False
        self._measured: list[dict[str, float]] = []
        self._undo: list[Callable[[], None]] = []

    def on_train_begin(self, logs: Any = None) -> None:
        self._release()  # a training that an error has ended left it
        self._training, self._updates, image = True, self._count(), mirror(self.model)
        self._measured.clear()
        self.hook.training = True  # leave frozen layers as they are
        self.hook.shows_bars = (self.params or {}).get("verbose") != 0
        self.hook.start(image)
        if type(self.hook).before_step is not hooks.Hook.before_step:
            for optimizer in self._optimizers():
                self._listen(getattr(optimizer, "inner_optimizer", optimizer), image)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        before, self._updates = self._updates, self._count()
        if self._updates == before:
            # averages may be written at micro-steps too, and a train_step may hold an optimizer elsewhere
            if self.hook.every == 1:
                self._finish()
            return
        self.hook.after_step()
        if self.hook.acted_after == self.hook.step and (measured := self.hook.metrics()):
            self._measured.append(measured)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None and self._measured:
            names = dict.fromkeys(name for each in self._measured for name in each)
            logs |= {name: self.of_epoch(name, [each[name] for each in self._measured if name in each]) for name in names}
        self._measured.clear()
        self._finish()

    # BackupAndRestore and SwapEMAWeights have put other weights into the model by now; a weight inside stays bit for bit
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._finish()

    def on_test_begin(self, logs: Any = None) -> None:
        self._finish()

    # after the optimizer's averages have become the model
    def on_train_end(self, logs: Any = None) -> None:
        self.hook.finish()
        self._training = False
        self._release()

    def of_epoch(self, name: str, values: list[float]) -> float:
        """What the logs of an epoch say of what was measured in it."""
        return fmean(values)

    def _finish(self) -> None:
        # with a number above 1 it would make training depend on when it is validated
        if self._training and self.hook.finishes_between:
            self.hook.finish()

    def _optimizers(self) -> list[Any]:
        # a model with a train_step of its own may hold several
        return [each for each in vars(self.model).values() if isinstance(each, keras.optimizers.Optimizer)]

    def _count(self) -> int:
        return sum(int(keras.ops.convert_to_numpy(each.iterations)) for each in self._optimizers())

    def _listen(self, optimizer: Any, image: nn.Module) -> None:
        """Be called right before a real update, gradients in hand: Keras has no event there."""
        plain = optimizer._backend_update_step

        @torch.compiler.disable
        def before(gradients: Sequence[Tensor], variables: Sequence[Any]) -> list[Tensor]:
            contiguous = [gradient.contiguous() for gradient in gradients]
            given = {id(variable): each for variable, each in zip(variables, contiguous, strict=True)}
            with gradients_laid(image, given) as parameters:
                self.hook.before_step(parameters)
            return contiguous

        def update(gradients: Sequence[Tensor], variables: Sequence[Any], learning_rate: Any) -> None:
            plain(before(gradients, variables), variables, learning_rate)

        optimizer._backend_update_step = update
        self._undo.append(lambda: vars(optimizer).pop("_backend_update_step", None))

    def _release(self) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()


class SpectralClipCallback(HookCallback):
    """`spectral_hooks.SpectralClip` as a callback: the operator norm of layers at most `max_norm`, from the first step on.

    It knows each layer's strides, dilation and groups. A separable convolution is two maps, each of which obeys the bound.
    `skipped` has the reason for every layer with weights that is left out: recurrent cells, for example, and frozen layers, which
    stay as they are. When more than a tenth of the weights is free for want of support, training starts with a warning.
    List it after callbacks that change weights (`SwapEMAWeights`) and before those that save them or read logs.

    Guaranteed: the bound holds when training starts, after every `every`-th update, and in the model that `fit` leaves,
    averages of `use_ema=True` included. With `every=1` it also holds for the averages that `ema_overwrite_frequency` and
    `SwapEMAWeights` put into the model; with `every="auto"` when validation begins and an epoch ends.
    Keras saves no state of callbacks: a run that is loaded and continued equals an
    uninterrupted one with `slack=0`, else it is within the slack.

    Args:
        max_norm, every, rounds, projection, slack, schedule, batch_norm, distribute: as for `spectral_hooks.SpectralClip`.
        layers, exclude: likewise; types and predicates are those of Keras' layers, and globs match their names, with dots between
            a model and its parts.
        split: likewise, for `Dense` and `EinsumDense` layers: the parts of their outputs, of several axes one after another.
        lora: is refused. A layer after `enable_lora()` makes its kernel anew in every call, and is left out.
        example: is refused. Kernels are bounded at every input size.
        log: add to each epoch's logs, and so to the `History`, `spectral_clip/norm_before` (the largest norm of a constrained
            layer that an update has led to, before clipping) and `spectral_clip/clipped` (how many weights were clipped, on
            average over the projections); costs a certified norm of every layer at every projection.

    Raises:
        NotImplementedError: `lora` or `example` is given.
        ValueError, TypeError: as for `spectral_hooks.SpectralClip`.

    Example:
        >>> import keras
        >>> from spectral_hooks.integrations.keras import SpectralClipCallback
        >>> clip = SpectralClipCallback(1.0, exclude=["head", keras.layers.Conv2DTranspose])
        >>> history = model.fit(x, y, callbacks=[clip])  # doctest: +SKIP
    """

    def __init__(self, max_norm: float = 1.0, *, split: Split = None, **options: Unpack[ClipOptions]) -> None:
        if "lora" in options:
            raise NotImplementedError(
                f"`lora` has no meaning in Keras; got {options['lora']!r}: leave it away. A layer after enable_lora() makes its "
                "kernel anew in every call, so it is left out, and `skipped` says so."
            )
        if options.get("example") is not None:  # whatever it is: arrays too
            raise NotImplementedError(
                "`example` is not supported in Keras, for the hook sees kernels and no forward: leave it away, and layers are "
                "bounded at every input size."
            )
        super().__init__(hooks.SpectralClip(max_norm, split=split, **options))

    def of_epoch(self, name: str, values: list[float]) -> float:
        if name == "spectral_clip/every":
            return values[-1]
        return max(values) if name == "spectral_clip/norm_before" else fmean(values)


class _OfKeras:
    """A type or a predicate, asked about the Keras layer that a module of the mirror stands for."""

    def __init__(self, argument: str, pattern: Any) -> None:
        self.argument, self.pattern = argument, pattern

    def __call__(self, name: str, module: nn.Module) -> bool:
        layer = layer_of(module)
        return layer is not None and matches(self.argument, self.pattern, name, layer)

    def __repr__(self) -> str:
        return getattr(self.pattern, "__qualname__", None) or repr(self.pattern)


def _of_keras(argument: str, patterns: Sequence[Any] | None) -> Any:
    """Patterns for the mirror; globs, and what is for it already, as they are."""
    if patterns is None:
        return None
    return [each if isinstance(each, (str, _OfKeras)) else _OfKeras(argument, each) for each in patterns]
