"""When a hook acts: projecting now, and right after every real optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class Hook(Protocol):
    """The three events that a hook answers to. A framework's adapter, or `attach`, turns its own events into these."""

    def start(self, model: nn.Module) -> None:
        """Training begins or resumes: the weights are loaded, no step has been taken."""

    def before_step(self) -> None:
        """Gradients are complete; the optimizer is about to step."""

    def after_step(self) -> None:
        """The optimizer has stepped: once per update, not per micro-batch, and not for a step that was skipped."""


class Handle:
    """What `attach` returns: removes the hook, also as a context manager."""

    def __init__(self, hook: Hook, model: nn.Module) -> None:
        self.hook = hook
        self.model = model
        self._installed: dict[int, tuple[Optimizer, list[RemovableHandle]]] = {}

    @property
    def attached(self) -> bool:
        """Whether any optimizer still calls the hook."""
        return bool(self._installed)

    def install(self, optimizer: Optimizer) -> None:
        """Have this optimizer call the hook; once, however often it is asked for."""
        if id(optimizer) in self._installed:
            return

        # a compiled optimizer step must not trace into the projection
        @torch.compiler.disable
        def before(*_: Any) -> None:
            self.hook.before_step()

        @torch.compiler.disable
        def after(*_: Any) -> None:
            self.hook.after_step()

        handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
        self._installed[id(optimizer)] = (optimizer, handles)

    def remove(self) -> None:
        """Stop acting. The weights stay as they are."""
        for _, handles in self._installed.values():
            for handle in handles:
                handle.remove()
        self._installed.clear()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def attach(hook: Hook, model: nn.Module, optimizer: Any, handle: Handle | None = None) -> Handle:
    """Start the hook on a model and have the optimizers call it.

    Args:
        hook: any object with the three events.
        model: the model whose weights the optimizers step.
        optimizer: a torch optimizer, or several; wrappers that keep the real one (Accelerate's, Lightning's, timm's Lookahead)
            are looked through, because their own hooks never fire.
        handle: of an earlier call for the same model, to add optimizers to; the hook is not started again.

    Raises:
        TypeError: `model` is no module or `optimizer` no optimizer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module; got {type(model).__name__}.")
    several = isinstance(optimizer, Iterable) and not isinstance(optimizer, Optimizer)
    optimizers = [unwrap(each) for each in (optimizer if several else [optimizer])]
    if handle is None:
        handle = Handle(hook, model)
        hook.start(model)
    for each in optimizers:
        handle.install(each)
    return handle


def unwrap(optimizer: Any) -> Optimizer:
    """The optimizer whose `step` changes the weights."""
    inner = optimizer
    for name in ("_base_optimizer", "_optimizer", "optimizer"):
        if name in getattr(inner, "__dict__", {}) and isinstance(getattr(inner, name), Optimizer):
            inner = getattr(inner, name)
    if not isinstance(inner, Optimizer):
        raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, or a list of them; got {type(optimizer).__name__}.")
    return inner
