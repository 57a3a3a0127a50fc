"""Lightning: `Trainer(callbacks=[SpectralClip(1.0)])`, for `lightning` and `pytorch_lightning` alike."""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from spectral_hooks import hooks
from spectral_hooks.weights.selection import Split

from .shared import ClipOptions, HookHolder

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _callback_classes() -> tuple[type, ...]:
    """The Callback of each namespace that is installed; a class deriving from both serves both trainers."""
    found = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(import_module(name).Callback)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                raise
    if not found:
        raise ImportError("Lightning is not installed: pip install 'spectral_hooks[lightning]'.")
    return tuple(found)


_Callback: Any = type("_Callback", _callback_classes(), {})

#: Strategies that train on copies of their own of the weights, by the name of their class.
_OWN_COPIES = {"DeepSpeedStrategy", "FSDPStrategy"}


class HookCallback(HookHolder, _Callback):
    """Lightning's events as those of a hook: started when training starts, called around every real optimizer step.

    The hook is installed on the trainer's optimizers, so gradient accumulation, manual optimization, several optimizers, LBFGS
    and steps that loss scaling skips are seen as they are. Every fit starts from the state that the hook was given in, or from
    that of the checkpoint which it resumes; a run that is resumed with other settings says so. With `every=1` the hook also
    brings in order what other callbacks do to weights between steps (pruning, averaging), wherever they stand in the list,
    before it is validated or saved; in any case what `fit` leaves.

    What the hook measures (its option `log`) at the last step goes to `trainer.callback_metrics`, and to the loggers at the
    Trainer's `log_every_n_steps` where it has acted since.

    Args:
        hook: any `spectral_hooks.hooks.Hook`; its `repr` is the `state_key`.

    Raises:
        NotImplementedError: at the start of a fit, the strategy trains on copies of its own (DeepSpeed, the old FSDP).
    """

    def __init__(self, hook: hooks.Hook) -> None:
        super().__init__()
        self.hook = hook
        self._initial = hook.state_dict()
        self._handle: hooks.Handle | None = None
        self._logged = 0

    def __getstate__(self) -> dict[str, Any]:
        # settings and progress; neither the hooks on the optimizers nor the model, whose `log` the trainer puts here
        return {k: v for k, v in self.__dict__.items() if k not in ("log", "log_dict")} | {"_handle": None}

    @property
    def state_key(self) -> str:
        return self.hook.key

    def state_dict(self) -> dict[str, Any]:
        return self.hook.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.hook.load_state_dict(state_dict)

    # comes before a checkpoint is restored
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        if _OWN_COPIES & {cls.__name__ for cls in type(trainer.strategy).__mro__}:
            raise NotImplementedError(
                f"{type(trainer.strategy).__name__} trains on flattened copies of the weights, so what is written into a layer "
                "is lost. Use DDPStrategy, or ModelParallelStrategy with fully_shard."
            )
        self._remove()
        self.hook.load_state_dict(self._initial)

    # comes with the whole checkpoint; Lightning hands over the state only to a callback of the same settings
    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        present, saved = {each.state_key for each in trainer.callbacks}, checkpoint.get("callbacks", {})
        others = [key for key in saved if key not in present and key.startswith(f"{type(self.hook).__name__}(")]
        if others and self.state_key not in saved and trainer.state.fn == "fit" and trainer.is_global_zero:
            what = f"the checkpoint was saved with {', '.join(others)}, and this run goes on with {self.state_key}"
            warnings.warn(f"{what}: its settings hold from the first step on, and it counts its steps from 0.", stacklevel=2)

    # by now the checkpoint is restored and the optimizers exist; no later event covers the first weights
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.hook.shows_bars = trainer.progress_bar_callback is not None
        self._handle = self.hook.attach(pl_module, trainer.optimizers)
        self._logged = self.hook.acted_after

    # As Lightning's own callbacks log: what `self.log` is given once goes to the loggers again with every batch until the next
    # value, those of accumulated gradients and between two actions included.
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.hook.acted_after == self._logged or not (metrics := self.hook.metrics()):
            return
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        if trainer._logger_connector.should_update_logs:
            self._logged = self.hook.acted_after
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    # Pruning and averaging change weights at these events, before or after this callback as the user has listed them. A weight
    # inside stays bit for bit; with a number above 1 acting here would make training depend on when it is validated and saved.
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish(final=False)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._finish(final=False)

    # by now an average of weights from between two actions may stand in the model
    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == dataloader_idx == 0 and self.hook.every != 1:
            self._finish(final=False)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish(final=False)

    # the checkpoint's tensors are those of the model, but for what was gathered of shards; and it has what the hook knew before
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._finish(final=False)
        if self._handle is not None and self.hook.every != 1 and self.hook.finishes_between:
            if self.hook.selection.is_sharded:
                checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
            if self.state_key in checkpoint.get("callbacks", {}):
                checkpoint["callbacks"][self.state_key] = self.state_dict()

    # with every > 1 the hook may not have acted after the last steps; before the last checkpoint is written
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish(final=True)

    # after all callbacks' on_train_end, where averages become the model
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._finish(final=True)

    def _finish(self, final: bool) -> None:
        if self._handle is not None and (final or self.hook.finishes_between):
            self.hook.finish()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._remove()

    # Lightning does not call teardown after an exception
    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._remove()

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class SpectralClip(HookCallback):
    """`spectral_hooks.SpectralClip` as a callback: every layer's operator norm at most `max_norm` after every step.

    Guaranteed: the bound holds when training starts, after every `every`-th optimizer step, and in the model that `fit` leaves.
    With `every=1` it also holds in every checkpoint, wherever in the list callbacks stand that change weights between steps
    (pruning, averaging). With `every="auto"` it holds in what is validated and saved too, but for averages that other callbacks
    save, and for checkpoints of weights alone within an epoch (`save_weights_only`), of which Lightning tells no callback.

    Args:
        max_norm, layers, exclude, every, rounds, projection, slack, schedule, batch_norm, split, lora, distribute, example: as
            for `spectral_hooks.SpectralClip`; the example is what the module's `forward` takes.
        log: send `spectral_clip/norm_before` (the largest norm of all layers before clipping) and `spectral_clip/clipped` (how
            many were clipped) of the last projection to `trainer.callback_metrics`, and to the loggers at the Trainer's
            `log_every_n_steps` where there was a projection since; costs a certified norm of every layer at every projection.

    Raises:
        ValueError, TypeError: as for `spectral_hooks.SpectralClip`.

    Example:
        >>> from spectral_hooks.integrations.lightning import SpectralClip
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_epochs=1, callbacks=[SpectralClip(1.0, exclude="head")])  # doctest: +SKIP
    """

    def __init__(self, max_norm: float = 1.0, *, split: Split = None, **options: Unpack[ClipOptions]) -> None:
        super().__init__(hooks.SpectralClip(max_norm, split=split, **options))
