"""Hugging Face transformers: `Trainer(callbacks=[SpectralClip(1.0)])`, PEFT's LoRA included."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

import torch

from spectral_hooks import as_operator, hooks
from spectral_hooks.weights.patterns import Pattern
from spectral_hooks.weights.selection import Parts, Split

from .shared import ClipOptions, HookHolder

if TYPE_CHECKING:
    from typing_extensions import Unpack

try:
    from transformers import TrainerCallback
except ModuleNotFoundError as error:
    raise ImportError("transformers is not installed: pip install 'spectral_hooks[transformers]'.") from error

_log = logging.getLogger(__name__)

#: What trains on copies of its own of the weights, by the name of a module's or the optimizer's class.
_OWN_COPIES = {"FullyShardedDataParallel", "XlaFullyShardedDataParallel", "DeepSpeedOptimizerWrapper"}
#: The layer that makes query, key and value, one after another, by model type.
_FUSED = {"gpt2": "c_attn", "imagegpt": "c_attn", "decision_transformer": "c_attn", "modernbert": "Wqkv", "mpt": "Wqkv"}


class HookCallback(HookHolder, TrainerCallback):
    """The Trainer's events as those of a hook: when training begins, right before and right after every update.

    The hook is attached to the Trainer's optimizer, whatever `optim=` makes it: it counts its steps, without those that loss
    scaling skips, and meets what the optimizer keeps of the weights elsewhere (schedule-free ones). Where the Trainer names no
    optimizer its events are enough. DeepSpeed and the old FSDP, which train on copies of the weights, are a NotImplementedError
    at the start.

    Every checkpoint gets a file of what the hook knows (of a `SpectralClip`, as large as the weights, and with wide convolutions
    that are clipped often some times that). A run that is resumed with the same settings from a checkpoint in its own
    `output_dir` goes on from that. One from a checkpoint elsewhere, from one with `save_only_model` or with other settings counts
    on from the Trainer's global step and knows nothing else, and INFO says so.

    What the hook measures (its option `log`) goes to the Trainer's logs, and for every action to `history`. Reporters
    (TensorBoard, W&B) run before what stands in `callbacks=`: for them use `add_to`.

    Args:
        hook: any `spectral_hooks.hooks.Hook`; the `repr`, which has its settings, names the file.
    """

    def __init__(self, hook: hooks.Hook) -> None:
        self.hook = hook
        self.history: list[dict[str, float]] = []
        self._handle: hooks.Handle | None = None
        self._step = 0
        # where no optimizer is named
        self._parameters: list[torch.Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        # settings and progress, without the hooks on the optimizer
        return self.__dict__ | {"_handle": None, "_parameters": []}

    def add_to(self, trainer: Any) -> HookCallback:
        """Make this the first callback of a Trainer, so that its metrics are in the logs when the reporters read them."""
        handler = trainer.callback_handler
        handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs.get("optimizer")
        if found := _OWN_COPIES & {cls.__name__ for part in (optimizer, *model.modules()) for cls in type(part).__mro__}:
            remedy = "Use DDP, or FSDP with fsdp_config={'version': 2}."
            raise NotImplementedError(
                f"{found.pop()} trains on copies of the weights: what is written to a layer is lost. {remedy}"
            )
        self._remove()  # a training that an error has ended left it
        self.history.clear()
        self.hook.load_state_dict(self._saved(args, state) or {"step": state.global_step})
        self.hook.shows_bars = not getattr(args, "disable_tqdm", False)
        if optimizer is not None:
            self._handle = self.hook.attach(model, optimizer)
        else:
            self.hook.training, self._parameters = True, list(model.parameters())
            self.hook.start(model)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = self.hook.step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._handle is None:
            self.hook.before_step(self._parameters)

    # before the global step is counted, logged and saved
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._handle is None:
            self.hook.after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # not for a step that loss scaling has skipped
        acted = self.hook.acted_after > self._step
        if acted and (measured := self.hook.metrics()):
            self.history.append({"step": state.global_step} | measured)
        # the hook may not have acted after the last steps; before the last checkpoint
        is_last = control.should_training_stop or state.global_step >= state.max_steps
        if (is_last and self.hook.every != 1) or self._is_due(control):
            self.hook.finish()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_due(control):
            self.hook.finish()

    # `on_evaluate` and `on_save` come afterwards: what is about to happen stands in the flags, of which the Trainer's own are set
    # before any callback of the user's is called
    def _is_due(self, control: Any) -> bool:
        """Whether an evaluation or a checkpoint comes next, for which the hook is to bring weights in order."""
        return self.hook.finishes_between and self.hook.every != 1 and (control.should_evaluate or control.should_save)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.history and "loss" in logs:
            for each in (logs, state.log_history[-1]):
                each.update({key: value for key, value in self.history[-1].items() if key != "step"})

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        file = self._file(args, state)
        if args.should_save and not args.save_only_model and file.parent.is_dir():
            torch.save(self.hook.state_dict(), file)

    # the best checkpoint may have become the model
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook.finish()
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
        name = f"spectral_hooks-{crc32(self.key.encode()):08x}.pt"
        return Path(args.output_dir, f"checkpoint-{state.global_step}", name)

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class SpectralClip(HookCallback):
    """`spectral_hooks.SpectralClip` as a callback: every layer's operator norm at most `max_norm` after every update.

    Guaranteed: the bound holds when training begins, after every `every`-th update, in the last checkpoint and in the model that
    `train` leaves; with `every=1` in every checkpoint (PEFT's hold adapters only, to be laid on the projected model).
    With `every="auto"` it also holds in what is evaluated and saved; list callbacks that ask for that themselves before this.
    A run that is resumed with the same settings from a checkpoint in its own `output_dir` equals an uninterrupted one bit for
    bit. One from elsewhere, or with `save_only_model`, does not know the weights that were certified before: with `slack=0` it
    equals the uninterrupted one too, else it is within the slack. Frozen weights are left as they are.

    Args:
        max_norm, layers, exclude, every, rounds, projection, slack, schedule, batch_norm, distribute, example: as for
            `spectral_hooks.SpectralClip`; a batch of a data collator is an example.
        split: fused projections of query, key and value (GPT-2's `c_attn`) are bounded whole if None or False, each of the three
            by itself if True, each head of each if "heads". Where the layout is not known here, a mapping from patterns to the
            number of equal parts or their sizes, as for `spectral_hooks.SpectralClip`: `{"*.query_key_value": 3 * heads}`.
        lora: "merged" bounds base + scaling · B A by way of B; a base weight that alone exceeds the bound is projected at the
            start, though frozen. "product" bounds scaling · B A and leaves the base.
        log: measure at every projection, at the cost of a certified norm of every layer: `spectral_clip/norm_before` (the largest
            before clipping) and `spectral_clip/clipped` (how many were clipped) go to the Trainer's logs, and for every
            projection to `history`. Reporters (TensorBoard, W&B) run before what stands in `callbacks=`: for them use `add_to`.

    Raises:
        ValueError, TypeError: as for `spectral_hooks.SpectralClip`; when training begins, `split` is True or "heads" and the
            layout of the model is not known.

    Example:
        >>> from spectral_hooks.integrations.transformers import SpectralClip
        >>> trainer = transformers.Trainer(model, args, callbacks=[SpectralClip(1.0, split=True)])  # doctest: +SKIP
    """

    hook: hooks.SpectralClip

    def __init__(
        self, max_norm: float = 1.0, *, split: Split | bool | Literal["heads"] = None, **options: Unpack[ClipOptions]
    ) -> None:
        if isinstance(split, str) and split != "heads":
            raise ValueError(f"`split` must be True, 'heads', None or a mapping like {{'*.qkv': 3}}; got {split!r}.")
        super().__init__(hooks.SpectralClip(max_norm, split=None if isinstance(split, (bool, str)) else split, **options))
        self.split = split

    def shown(self, hook: str) -> str:
        fused = f", split={self.split!r})" if self.split in (True, "heads") else ")"
        return super().shown(hook).removesuffix(")") + fused

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        given = self.hook.split
        if self.split in (True, "heads"):
            self.hook.split = fused_projections(kwargs["model"], per_head=self.split == "heads")
        frozen = {p: p._version for p in kwargs["model"].parameters() if not p.requires_grad}
        super().on_train_begin(args, state, control, **kwargs)
        self.hook.split = given  # it is a setting; the parts are those of this model
        changed = sum(p._version != version for p, version in frozen.items())
        if changed and hasattr(kwargs["model"], "peft_config"):
            what = f"{changed} frozen weights exceeded {self.hook.bound} by themselves and were projected."
            remedy = "PEFT's checkpoints do not hold them: save the merged model (merge_and_unload), or the base model as well."
            warnings.warn(f"{what} {remedy}", stacklevel=2)


def fused_projections(model: Any, per_head: bool = False) -> dict[Pattern, Parts]:
    """The output sizes of query (unless in cross-attention), key and value, or of each of their heads, by layer."""
    split: dict[Pattern, Parts] = {}
    for prefix, part in model.named_modules():
        config: Any = getattr(part, "config", None)
        fused = _FUSED.get(getattr(config, "model_type", ""))
        for name, layer in part.named_modules(prefix=prefix) if fused else ():
            if name.endswith(f".{fused}"):
                size = config.hidden_size // (config.num_attention_heads if per_head else 1)
                split[name.replace("_orig_mod.", "")] = [size] * (as_operator(layer).out_shape[0] // size)
    if not split:
        known, got = ", ".join(_FUSED), type(model).__name__
        raise ValueError(f"`split` knows {known}; got {got}: give layers and parts yourself, like split={{'*.qkv': 3}}.")
    return split
