"""SpectralClip: every selected weight inside the ball, after every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .. import projections
from ..operators.base import LinearOperator
from ..selection import Patterns, Selection, Target, listed, select
from ..spectrum import check_finite, spectral_norm
from ..weights import full, pruning_mask, remember, write_
from .attach import Handle, attach


class SpectralClip:
    """Keep the operator norm of every convolution and linear layer at most `max_norm` while a model trains.

    After each optimizer step the weights whose norm exceeds the bound are projected, in place, by `projections.clip` on the
    lattice operator: the bound holds for each layer at every input size. Classes, parameters, state-dict keys and the forward
    stay those of the plain model.

    Guaranteed: after `attach`, and after every `every`-th step, the norm of each selected layer, in the dtype that it is
    stored in, is at most `max_norm` (certified; within 1e-6 counts as equal).

    Args:
        max_norm: the bound.
        layers: which layers, as glob on qualified names, type, predicate of `(name, layer)` or of the layer, or a list of these;
            None for all that are supported.
        exclude: which of them to leave out.
        every: project after every so many optimizer steps; between, the weights may leave the ball.
        rounds: quality of the projection of convolutions, see `projections.clip`.
        record: measure `largest_norm` too, which costs a certified norm of every layer at every projection.

    Attributes:
        skipped: for each layer with weights that is not constrained, why.
        step: optimizer steps seen, of all optimizers together.
        clipped: how many weights the last projection changed.
        largest_norm: the largest norm of all selected layers before the last projection, to 1 %; None unless `record`.

    Raises:
        ValueError: an argument out of range; at the start, a pattern that matches nothing or an unsupported layer named in full;
            in training, a NaN or infinite weight (layer and step are named, all weights stay as they are).

    Example:
        >>> import torch, spectral_hooks as sh
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(),
        ...                             torch.nn.Linear(8 * 8 * 8, 10))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
        >>> with sh.SpectralClip(1.0).attach(model, optimizer):
        ...     model(torch.randn(4, 1, 8, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> bool(sh.spectral_norm(sh.as_operator(model[0])) <= 1.0)
        True
    """

    def __init__(
        self,
        max_norm: float = 1.0,
        *,
        layers: Patterns = None,
        exclude: Patterns = None,
        every: int = 1,
        rounds: int = 3,
        record: bool = False,
    ) -> None:
        projections.check_max_norm(max_norm)
        for name, value in (("every", every), ("rounds", rounds)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive int; got {value!r}.")
        self.max_norm = max_norm
        self.layers = None if layers is None else listed(layers)
        self.exclude = None if exclude is None else listed(exclude)
        self.every = every
        self.rounds = rounds
        self.record = record
        self.step = 0
        self.clipped = 0
        self.largest_norm: float | None = None
        self._resumed = False
        self._selection = Selection()
        self._handle: Handle | None = None

    def __repr__(self) -> str:
        layers, exclude = _shown(self.layers), _shown(self.exclude)
        return f"SpectralClip({self.max_norm!r}, layers={layers}, exclude={exclude}, every={self.every}, rounds={self.rounds})"

    def __getstate__(self) -> dict[str, Any]:
        # copies and pickles carry the settings, not the model that the original works on
        return {**self.__dict__, "_selection": Selection(), "_handle": None}

    @property
    def skipped(self) -> dict[str, str]:
        return self._selection.skipped

    def attach(self, model: nn.Module, optimizer: Any) -> Handle:
        """Project now, and after every step of the optimizer, or of each of several.

        Attaching again to the same model adds optimizers that are new and returns the same handle.

        Returns:
            A handle: `handle.remove()`, or use it as a context manager.

        Raises:
            ValueError: this hook is attached to another model.
            TypeError: `model` or `optimizer` is none.
        """
        if self._handle is not None and self._handle.attached:
            if self._handle.model is not model:
                raise ValueError("this SpectralClip is attached to another model: make a new one, or remove() its handle first.")
            return attach(self, model, optimizer, self._handle)
        self._handle = attach(self, model, optimizer)
        return self._handle

    def start(self, model: nn.Module) -> None:
        """Select the layers and project, unless a resumed run was between two projections."""
        self._selection = select(model, self.layers, self.exclude)
        if not self._resumed or self.step % self.every == 0:
            self.project()
        self._resumed = False

    def before_step(self) -> None:
        """Nothing to do before a step."""

    def after_step(self) -> None:
        """Count the step and project when it is due."""
        self.step += 1
        if self.step % self.every == 0:
            self.project()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on like an uninterrupted one."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; call it before the hook is attached."""
        self.step = state["step"]
        self._resumed = True

    @torch.no_grad()
    def project(self) -> None:
        """Project every selected weight now. All results are computed before the first weight is written."""
        if self.record:
            operators = (op.with_weight(full(op.weight)) for target in self._selection.targets for op in target.operators())
            self.largest_norm = max(float(spectral_norm(op, rtol=1e-2)) for op in operators)
        results = [(target, self._projected(target)) for target in self._selection.targets]
        changed = [(target, weight) for target, weight in results if weight is not None]
        # only parametrized weights can refuse: they go first, and all go back if one does
        changed.sort(key=lambda pair: not is_parametrized(pair[0].layers[0], "weight"))
        undo: list[Callable[[], None]] = []
        for target, weight in changed:
            layer = target.layers[0]
            try:
                if is_parametrized(layer, "weight"):
                    undo.append(remember(layer))
                write_(layer, weight)
            except ValueError as error:
                for restore_ in undo:
                    restore_()
                raise ValueError(f"{target.name}: {error}") from error
        self.clipped = len(changed)

    def _projected(self, target: Target) -> Tensor | None:
        """The weight inside the ball, or None if it is there already."""
        operators = target.operators()
        weight = before = full(operators[0].weight)
        try:
            check_finite(before)
            for i, op in enumerate(operators):
                # the first use decides the shape of the result; scaling for another keeps the bound of all before it
                weight = (self._clip if i == 0 else self._rescale)(op.with_weight(weight))
            mask = pruning_mask(target.layers[0])
            if weight is not before and mask is not None:
                weight = self._rescale(operators[0].with_weight(weight * mask))
        except ValueError as error:
            raise ValueError(f"{target.name}, after step {self.step}: {error}") from error
        return None if weight is before else weight

    def _clip(self, op: LinearOperator) -> Tensor:
        return projections.clip(op, self.max_norm, rounds=self.rounds)

    def _rescale(self, op: LinearOperator) -> Tensor:
        return projections.rescale(op, self.max_norm)


def _shown(patterns: Any) -> str:
    """Like `repr` but the same in every process, for checkpoints know a hook by it; that of a function shows an address."""
    if isinstance(patterns, list):
        return f"[{', '.join(map(_shown, patterns))}]"
    if callable(patterns) and hasattr(patterns, "__qualname__"):
        return f"{patterns.__module__}.{patterns.__qualname__}"
    return repr(patterns)
