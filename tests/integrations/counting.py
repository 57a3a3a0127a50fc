"""What the tests of all adapters use: a second kind of hook, and a value of every option of the first."""

from __future__ import annotations

import inspect
from typing import Any

import torch

import spectral_hooks as sh
from spectral_hooks.hooks import Hook
from spectral_hooks.weights.targets import AnyTarget


class Counting(Hook):
    """Writes down what it is asked for, and adds `pull · W` to the gradient of every selected weight, as weight decay does."""

    def __init__(
        self,
        pull: float = 0.0,
        *,
        layers: Any = None,
        exclude: Any = None,
        every: int = 1,
        split: Any = None,
        lora: str = "merged",
        log: bool = False,
    ) -> None:
        super().__init__(layers=layers, exclude=exclude, every=every, split=split, lora=lora, log=log)
        self.pull = pull
        self.events: list[str] = []

    def begin(self) -> None:
        self.events.append("begin")

    def before_step(self, parameters) -> None:
        self.events.append("before")
        for target in self.targets:
            for weight in target.leaves():
                if not any(weight is p for p in parameters):
                    continue
                assert weight.grad is not None, target.name
                weight.grad.add_(weight.detach(), alpha=self.pull)

    def act(self, targets: list[AnyTarget], stepped: set[int] | None) -> None:
        assert [target.name for target in targets] == [target.name for target in self.targets]
        self.events.append("act")

    def finish(self) -> None:
        self.events.append("finish")

    def metrics(self) -> dict[str, float]:
        return {"counting/step": float(self.step)} if self.log else {}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"events": list(self.events)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.events = list(state.get("events", []))


def halved(step: int) -> float:
    """A schedule."""
    return 0.5**step


#: Of every option of `SpectralClip` a value that is not its default.
OPTIONS: dict[str, Any] = {
    "max_norm": 0.5,
    "layers": "encoder.*",
    "exclude": ["head"],
    "every": 3,
    "rounds": 5,
    "projection": "rescale",
    "slack": 0.0,
    "schedule": halved,
    "batch_norm": "clip",
    "split": {"*.qkv": 3},
    "lora": "product",
    "distribute": True,
    "example": (torch.zeros(1, 3, 8, 8),),
    "log": True,
}
assert OPTIONS.keys() == inspect.signature(sh.SpectralClip).parameters.keys(), "an option without a value here"

#: What no adapter's constructor takes.
WRONG: list[tuple[dict[str, Any], type[Exception]]] = [
    ({"max_norm": 0.0}, ValueError),
    ({"layers": 3}, TypeError),
    ({"every": 0}, ValueError),
    ({"rounds": 1.5}, ValueError),
    ({"projection": "shrink"}, ValueError),
    ({"slack": 2}, ValueError),
    ({"schedule": 1.0}, TypeError),
    ({"batch_norm": "freeze"}, ValueError),
    ({"split": 3}, TypeError),
    ({"distribute": "all"}, ValueError),
    ({"example": 3}, TypeError),
    ({"log": "yes"}, ValueError),
    ({"no_such_option": 1}, TypeError),
]
