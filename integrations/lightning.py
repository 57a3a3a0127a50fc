"""Lightning: `Trainer(callbacks=[SpectralClip(1.0)])`, for `lightning` and `pytorch_lightning` alike."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch.optim import Optimizer

from spectral_hooks import hooks
from spectral_hooks.selection import Patterns


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


class HookCallback(_Callback):
    """Lightning's events as those of a hook: started when training starts, called at every real optimizer step.

    The hook is installed on the trainer's optimizers, so gradient accumulation, manual optimization, several optimizers, LBFGS
    and steps that loss scaling skips are seen as they are.

    Args:
        hook: any `spectral_hooks.hooks.Hook`.
    """

    def __init__(self, hook: Any) -> None:
        super().__init__()
        self.hook = hook
        self._handle: hooks.Handle | None = None

    @property
    def state_key(self) -> str:
        return repr(self.hook)

    def state_dict(self) -> dict[str, Any]:
        return self.hook.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.hook.load_state_dict(state_dict)

    # by now the checkpoint is restored and the optimizers exist; no later event covers the first weights
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        optimizers: list[Optimizer] = trainer.optimizers
        self._handle = self.hook.attach(pl_module, optimizers)

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

    Args:
        max_norm, layers, exclude, every, rounds: as for `spectral_hooks.SpectralClip`.
        log: log `spectral_clip/norm_before` (the largest norm of all layers before clipping) and `spectral_clip/clipped` (how
            many were clipped) at every batch; costs a certified norm of every layer at every step.

    Example:
        >>> from spectral_hooks.integrations.lightning import SpectralClip
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(max_epochs=1, callbacks=[SpectralClip(1.0, exclude="head")])  # doctest: +SKIP
    """

    def __init__(
        self,
        max_norm: float = 1.0,
        *,
        layers: Patterns = None,
        exclude: Patterns = None,
        every: int = 1,
        rounds: int = 3,
        log: bool = False,
    ) -> None:
        clip = hooks.SpectralClip(max_norm, layers=layers, exclude=exclude, every=every, rounds=rounds, record=log)
        super().__init__(clip)
        self.logs = log

    @property
    def skipped(self) -> dict[str, str]:
        """For each layer with weights that is not constrained, why."""
        return self.hook.skipped

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.logs:
            self.log("spectral_clip/norm_before", self.hook.largest_norm)
            self.log("spectral_clip/clipped", float(self.hook.clipped))

    # with every > 1 the last steps may not have been projected
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.hook.project()
