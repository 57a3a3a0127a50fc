"""Hugging Face transformers: `Trainer(callbacks=[SpectralClip(1.0)])`, PEFT's LoRA included."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from spectral_hooks import as_operator, hooks
from spectral_hooks.weights.patterns import Patterns
from spectral_hooks.weights.selection import Split

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ImportError("transformers is not installed: pip install 'spectral_hooks[transformers]'.") from error

_log = logging.getLogger(__name__)

#: What trains on copies of its own of the weights, by the name of a module's or the optimizer's class.
_OWN_COPIES = {"FullyShardedDataParallel", "XlaFullyShardedDataParallel", "DeepSpeedOptimizerWrapper"}
#: The layer that makes query, key and value, one after another, by model type.
_FUSED = {"gpt2": "c_attn", "imagegpt": "c_attn", "decision_transformer": "c_attn", "modernbert": "Wqkv", "mpt": "Wqkv"}


class HookCallback(TrainerCallback):
    """The Trainer's events as those of a hook: when training begins, right before and right after every update.

    The hook is attached to the Trainer's optimizer, whatever `optim=` makes it: it counts its steps, without those that loss
    scaling skips, and meets what the optimizer keeps of the weights elsewhere (schedule-free ones). Where the Trainer names no
    optimizer its events are enough. Checkpoints get a file of what the hook knows, as large as the weights. A run that is
    resumed from a checkpoint in its own `output_dir` goes on from that; from one elsewhere it counts on from the Trainer's global
    step. DeepSpeed and the old FSDP, which train on copies of the weights, are a NotImplementedError at the start.

    Args:
        hook: a `spectral_hooks.hooks.Hook` that also has `attach`, `state_dict` and `load_state_dict`; its `repr` names its file.
    """

    def __init__(self, hook: Any) -> None:
        self.hook = hook
        self._handle: hooks.Handle | None = None

    def __getstate__(self) -> dict[str, Any]:
        # settings and progress, without the hooks on the optimizer
        return self.__dict__ | {"_handle": None}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        if found := _OWN_COPIES & {cls.__name__ for part in (optimizer, *model.modules()) for cls in type(part).__mro__}:
            remedy = "Use DDP, or FSDP with fsdp_config={'version': 2}."
            raise NotImplementedError(
                f"{found.pop()} trains on copies of the weights: what is written to a layer is lost. {remedy}"
            )
        self._remove()  # a training that an error has ended left it
        self.hook.load_state_dict(self._saved(args, state) or {"step": state.global_step})
        if optimizer is not None:
            self._handle = self.hook.attach(model, optimizer)
        else:
            self.hook.training = True
            self.hook.start(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._handle is None:
            self.hook.before_step()

    # before the global step is counted, logged and saved
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._handle is None:
            self.hook.after_step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        file = self._file(args, state)
        if args.should_save and not args.save_only_model and file.parent.is_dir():
            torch.save(self.hook.state_dict(), file)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._remove()

    def _saved(self, args: Any, state: Any) -> dict[str, Any] | None:
        """What the hook knew at the step that is resumed, if its file is where this run would have written it."""
        if state.global_step == 0:
            return None
        file = self._file(args, state)
        if file.is_file():
            return torch.load(file, map_location=args.device, weights_only=True)
        _log.info("There is no %s: the run counts on from step %d, and starts anew to know its weights.", file, state.global_step)
        return None

    def _file(self, args: Any, state: Any) -> Path:
        name = f"spectral_hooks-{crc32(repr(self.hook).encode()):08x}.pt"
        return Path(args.output_dir, f"checkpoint-{state.global_step}", name)

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class SpectralClip(HookCallback):
    """`spectral_hooks.SpectralClip` as a callback: every layer's operator norm at most `max_norm` after every update.

    Guaranteed: the bound holds when training begins, after every `every`-th update, in the last checkpoint and in the model that
    `train` leaves; with `every=1` in every checkpoint (PEFT's hold adapters only, to be laid on the projected model).
    A run that is resumed from a checkpoint in its own `output_dir` equals an uninterrupted one bit for bit; from one elsewhere so
    do models of linear layers alone, or with `slack=0`, and others are within the slack. Frozen weights are left as they are.

    Args:
        max_norm, layers, exclude, every, rounds, and further options: as for `spectral_hooks.SpectralClip`.
        split_qkv: fused projections of query, key and value (GPT-2's `c_attn`) are bounded whole if False, each of the three by
            itself if True, each head of each if "heads". Where the layout is not known here, a mapping from patterns to the
            number of equal parts or their sizes: `{"*.query_key_value": 3 * heads}`.
        lora: "merged" bounds base + scaling · B A by way of B; a base weight that alone exceeds the bound is projected at the
            start, though frozen. "product" bounds scaling · B A and leaves the base.
        log: measure at every update, at the cost of a certified norm of every layer: `spectral_clip/norm_before` (the largest
            before clipping) and `spectral_clip/clipped` (how many were clipped) go to the Trainer's logs, and for every
            projection to `history`. Reporters (TensorBoard, W&B) run before what stands in `callbacks=`: for them use `add_to`.

    Example:
        >>> from spectral_hooks.integrations.transformers import SpectralClip
        >>> trainer = transformers.Trainer(model, args, callbacks=[SpectralClip(1.0, split_qkv=True)])  # doctest: +SKIP
    """

    def __init__(
        self,
        max_norm: float = 1.0,
        *,
        layers: Patterns = None,
        exclude: Patterns = None,
        every: int = 1,
        rounds: int = 3,
        split_qkv: bool | str | Split = False,
        lora: str = "merged",
        log: bool = False,
        **options: Any,
    ) -> None:
        known = split_qkv in (False, True, "heads")
        options |= {"split": None if known else split_qkv, "lora": lora, "record": log}
        clip = hooks.SpectralClip(max_norm, layers=layers, exclude=exclude, every=every, rounds=rounds, **options)
        super().__init__(clip)
        self.split_qkv, self.logs = split_qkv if known else False, log
        self.history: list[dict[str, float]] = []
        self._step = 0

    @property
    def skipped(self) -> dict[str, str]:
        """For each layer with weights that is not constrained, why."""
        return self.hook.skipped

    def add_to(self, trainer: Any) -> SpectralClip:
        """Make this the first callback of a Trainer, so that its metrics are in the logs when the reporters read them."""
        handler = trainer.callback_handler
        handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.split_qkv:
            self.hook.split = fused_projections(kwargs["model"], per_head=self.split_qkv == "heads")
        frozen = {p: p._version for p in kwargs["model"].parameters() if not p.requires_grad}
        super().on_train_begin(args, state, control, **kwargs)
        self.history.clear()
        changed = sum(p._version != version for p, version in frozen.items())
        if changed and hasattr(kwargs["model"], "peft_config"):
            what = f"{changed} frozen weights exceeded {self.hook.max_norm} by themselves and were projected."
            remedy = "PEFT's checkpoints do not hold them: save the merged model (merge_and_unload), or the base model as well."
            warnings.warn(f"{what} {remedy}", stacklevel=2)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = self.hook.step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # not for a step that loss scaling has skipped
        if self.logs and self.hook.step > self._step and self.hook.step % self.hook.every == 0:
            measured = {"spectral_clip/norm_before": self.hook.largest_norm, "spectral_clip/clipped": float(self.hook.clipped)}
            self.history.append({"step": state.global_step} | measured)
        # with every > 1 the last steps may not have been projected; before the last checkpoint
        if self.hook.every > 1 and (control.should_training_stop or state.global_step >= state.max_steps):
            self.hook.project()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.history and "loss" in logs:
            for each in (logs, state.log_history[-1]):
                each.update({key: value for key, value in self.history[-1].items() if key != "step"})

    # the best checkpoint may have become the model
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook.project()
        super().on_train_end(args, state, control, **kwargs)


def fused_projections(model: Any, per_head: bool = False) -> dict[str, list[int]]:
    """The output sizes of query (unless in cross-attention), key and value, or of each of their heads, by layer."""
    split: dict[str, list[int]] = {}
    for prefix, part in model.named_modules():
        config: Any = getattr(part, "config", None)
        fused = _FUSED.get(getattr(config, "model_type", ""))
        for name, layer in part.named_modules(prefix=prefix) if fused else ():
            if name.endswith(f".{fused}"):
                size = config.hidden_size // (config.num_attention_heads if per_head else 1)
                split[name.replace("_orig_mod.", "")] = [size] * (as_operator(layer).out_shape[0] // size)
    if not split:
        known, got = ", ".join(_FUSED), type(model).__name__
        raise ValueError(f"`split_qkv` knows {known}; got {got}: give layers and parts yourself, like split_qkv={{'*.qkv': 3}}.")
    return split
