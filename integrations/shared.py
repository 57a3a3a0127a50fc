"""What the callbacks of all frameworks have in common: the names of their options, and what they tell of their hook."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypedDict

from spectral_hooks.hooks import Hook
from spectral_hooks.hooks.sizes import Example
from spectral_hooks.projections import Projection
from spectral_hooks.weights.patterns import Patterns


class HookOptions(TypedDict, total=False):
    """The options of every hook, for type checkers and editors; what they mean and their defaults stand in the hook itself."""

    layers: Patterns
    exclude: Patterns
    every: int | Literal["auto"]
    lora: str
    log: bool


class ClipOptions(HookOptions, total=False):
    """Those of `spectral_hooks.SpectralClip`, but for `max_norm` and `split`."""

    rounds: int
    projection: str | Projection
    slack: float
    schedule: Callable[[int], float] | None
    batch_norm: str | None
    distribute: bool
    example: Example | None


class HookHolder:
    """A callback that has a hook, and shows and tells what that does."""

    hook: Hook

    def __repr__(self) -> str:
        return self.shown(repr(self.hook))

    @property
    def key(self) -> str:
        """The settings as a text, the same in every process and at every step: checkpoints know the callback by it."""
        return self.shown(self.hook.key)

    def shown(self, hook: str) -> str:
        """The callback as a text, from that of its hook."""
        own, its = type(self).__name__, type(self.hook).__name__
        return own + (hook.removeprefix(its) if own.startswith(its) else f"({hook})")

    @property
    def skipped(self) -> dict[str, str]:
        """For each layer with weights that is not acted on, why."""
        return self.hook.skipped

    def report(self) -> str:
        """What the hook acts on and what it leaves out, as a text: `print(callback.report())`."""
        return self.hook.report()
