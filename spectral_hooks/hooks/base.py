"""What all hooks share: which weights, the count of real steps, resuming, attaching, what errors and reports say."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, nn

from ..operators.base import is_whole
from ..weights.names import called
from ..weights.patterns import Patterns, check_patterns
from ..weights.places import memory_of
from ..weights.selection import Selection, Split, check_lora, check_split, select
from ..weights.targets import AnyTarget
from . import settings
from .attach import Handle, attach
from .free import warn_of_free_weights
from .pace import AUTO, Pace, check_every, warn_of_cost
from .report import Row, report
from .share import from_first, is_first

_log = logging.getLogger(__name__)

FROZEN = "frozen (requires_grad=False): left as it is while training"


class Hook:
    """Something that is done to the weights of a model while it trains.

    The events are `start`, `before_step`, `after_step`, `rewritten` and `finish`. A framework's adapter turns its own events into
    these; `attach` those of optimizers. What a hook does is said by `act`, after every `every`-th real step, or by `before_step`
    if it is done to gradients; all else may stay as it is here. A subclass passes the arguments below on, keeps its own under
    their names, which `repr` shows, and is final.

    Args:
        layers: which layers, as glob on qualified names, type, predicate of `(name, layer)` or of the layer, or a list of these;
            None for all that are supported.
        exclude: which of them to leave out.
        every: act after every so many optimizer steps; "auto" finds a number for which that takes at most a tenth of the time of
            training, once, from the times of the first steps (see `period`). Then `finish` is due before each evaluation and
            checkpoint too. With torch.distributed the first process decides, so all must attach the hook.
        split, lora: as for `weights.selection.select`: fused projections in parts, and how LoRA adapters count.
        log: whether to measure what `metrics` tells.

    Attributes:
        step: optimizer steps seen, of all optimizers together; those within one backward pass are one.
        acted_after: the last step that it has acted after.
        period: every how many steps it acts: `every`, or of "auto" what was found, and until then what is tried.
        training: whether frozen weights are left as they are. `attach` sets it, and so do the callbacks for frameworks.
        shows_bars: whether what takes long may show a progress bar. Callbacks for frameworks set it.
        selection: the weights that were chosen at the start, and the reasons for all others.

    Raises:
        TypeError, ValueError: an argument of another type, or out of range.
    """

    def __init__(
        self, *, layers: Patterns, exclude: Patterns, every: int | Literal["auto"], split: Split, lora: str, log: bool
    ) -> None:
        self.layers = check_patterns("layers", layers)
        self.exclude = check_patterns("exclude", exclude)
        check_split(split)
        check_lora(lora)
        check_flag("log", log)
        self.every, self.split, self.lora, self.log = check_every(every), split, lora, bool(log)
        self.step = self.acted_after = 0
        self.training, self.shows_bars = False, True
        self.selection = Selection()
        self._resumed = False
        self.handle: Handle | None = None
        self._pace: Pace | None = None
        self._set_pace()
        # what was stepped in the present update, by backward passes; and when each weight was last acted on
        self._round: set[int] = set()
        self._acted_at: dict[str, int] = {}

    def __repr__(self) -> str:
        return self._shown(f" ({self.period})" if self.every == AUTO and self._pace is None else "")

    @property
    def key(self) -> str:
        """The settings as a text, the same in every process and at every step: checkpoints know a hook by it."""
        return self._shown()

    def _shown(self, found: str = "") -> str:
        """The settings; behind `every` what was found of it."""

        def shown(name: str, value: Any) -> str:
            return self.shown_setting(name, value) + (found if name == "every" and value == AUTO else "")

        return f"{type(self).__name__}({', '.join(settings.changed(self, shown))})"

    def shown_setting(self, name: str, value: Any) -> str:
        """How `repr` shows the value of a setting."""
        return settings.text(value)

    def __getstate__(self) -> dict[str, Any]:
        # copies and pickles carry the settings, not the model that the original works on
        pace = None if self._pace is None else Pace(self.every)
        return {**self.__dict__, "selection": Selection(), "handle": None, "_round": set(), "_acted_at": {}, "_pace": pace}

    # -- what a hook does -------------------------------------------------------------------------------------------------

    def act(self, targets: list[AnyTarget], stepped: set[int] | None) -> None:
        """Do it, after a step that was due.

        Args:
            targets: the weights that it is due for; none that is frozen while training.
            stepped: None, or the `id` of the only parameters that may be written.
        """

    def choose(self, model: nn.Module) -> Selection:
        """The weights to act on."""
        return select(model, self.layers, self.exclude, split=self.split, lora=self.lora)

    def begin(self) -> None:
        """Bring everything in order at the start; not called where a resumed run was between two actions."""

    def forget(self) -> None:
        """Drop what is known of weights from before: the run that starts is no resumed one."""

    def finish(self) -> None:
        """Bring everything in order outside of steps: before weights are saved or evaluated, and at the end."""

    def metrics(self) -> dict[str, float]:
        """What was measured when it last acted, by the names for loggers; empty unless `log`."""
        return {}

    def bound_of(self, target: AnyTarget) -> float | None:
        """What `report` gives as the bound of a weight's norm; None where there is none."""
        return None

    def input_of(self, target: AnyTarget) -> str:
        """What `report` gives as the size of the inputs for which the bound of a weight holds; empty for all that it can have."""
        return ""

    def rows(self) -> list[Row]:
        """Lines of `report` for what is acted on besides the weights."""
        return []

    # -- events -----------------------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module, optimizer: Any) -> Handle:
        """Start now, and act after every step of the optimizer, or of each of several.

        Give the optimizer that the loop steps. It may be wrapped around another (SAM, Lookahead, ZeRO, Opacus, Accelerate): the
        hook acts after the last write. Optimizers that step in the backward pass act at its end. A copy or pickle of an optimizer
        does not call the hook.

        Attaching again to the same model adds optimizers that are new and returns the same handle.

        Returns:
            A handle: `handle.remove()`, or use it as a context manager.

        Raises:
            ValueError: this hook is attached to another model; the optimizer steps float32 copies of this model's weights.
            TypeError: `model` or `optimizer` is none.
            NotImplementedError: DeepSpeed, the old FSDP, an optimizer with `eval()` whose average cannot be told.

        Warns:
            UserWarning: the optimizer steps none of the selected weights; more than a tenth of the weights is free for want of
                support.
        """
        if self.handle is not None and self.handle.attached:
            if self.handle.model is not model:
                raise ValueError(
                    f"this {type(self).__name__} is attached to another model: make a new one, or remove() its handle first."
                )
            return attach(self, model, optimizer, self.handle)
        self.training = True
        self.handle = Handle(self, model)  # by now, for the first action meets what the optimizers keep
        attach(self, model, optimizer, self.handle)
        self._warn_of_other_parameters(self.handle)
        if _log.isEnabledFor(logging.INFO):
            _log.info("%r\n%s", self, report(self, measures=not self.selection.is_sharded))
        return self.handle

    def _warn_of_other_parameters(self, handle: Handle) -> None:
        # by memory, for the mirror of another framework's model has parameters of its own there
        stepped = {memory_of(p) for p in handle.parameters}
        if not any(memory_of(p) in stepped for target in self.targets for p in target.parameters()):
            warnings.warn(
                f"none of the {len(self.targets)} selected weights ({self.targets[0].name}, ...) is stepped by this optimizer: "
                f"the {type(self).__name__} acts now, and whenever it steps. Attach the optimizer that trains them, made of this "
                "model's own parameters; one that trains on flattened or partitioned copies writes over what is projected.",
                stacklevel=3,
            )

    def start(self, model: nn.Module) -> None:
        """Training begins or resumes: the weights are loaded, no step has been taken."""
        self.selection = self.choose(model)
        warn_of_free_weights(type(self).__name__, self.selection, self.training)
        if not self._resumed:
            self.forget()
            self._set_pace()
        self._round, self._acted_at, self.acted_after = set(), {}, self.step
        self.acted(self.targets)
        if not self._resumed or self.step % self.period == 0:
            self.begin()
        self._resumed = False
        if self._pace is not None:
            self._pace.start(p.device for target in self.targets for p in target.parameters())

    def before_step(self, parameters: Collection[Tensor]) -> None:
        """Gradients are complete; an optimizer is about to step these parameters, and no others."""

    def after_step(self, stepped: Collection[Tensor] | None = None) -> None:
        """Count the step and act when it is due: once per update, not per micro-batch, and not for a step that was skipped.

        Args:
            stepped: for optimizers that step in the backward pass, what they have stepped: nothing else is written, for the graph
                may still need it. They count as one step until one of these parameters is stepped again; every weight is acted on
                once in `every` of them.
        """
        with self._timed():
            if stepped is None:
                self.step, self._round = self.step + 1, set()
                if self.step % self.period == 0:
                    self._act(self.targets)
            else:
                self._after_some(stepped)

    def _after_some(self, stepped: Collection[Tensor]) -> None:
        """Of a step that is made in parts, these were stepped."""
        moved = {id(p) for p in stepped}
        if not self._round or self._round & moved:
            self.step, self._round = self.step + 1, set()
        self._round |= moved
        due = [
            target
            for target in self.targets
            if self.step // self.period > self._acted_at.get(target.name, 0) // self.period
            and any(id(p) in moved for p in target.parameters())
        ]
        if due:
            self._act(due, moved)

    def rewritten(self) -> None:
        """Weights were replaced after a step that was counted: by an average, by slow weights, or back. Act again if due."""
        with self._timed():
            if self.step % self.period == 0:
                self._act(self.targets)

    def _act(self, targets: list[AnyTarget], stepped: set[int] | None = None) -> None:
        # looked at anew each time: layers may be frozen and thawed
        targets = [target for target in targets if self.acts_on(target)]
        self.act(targets, stepped)
        self.acted(targets)
        self.acted_after = self.step

    def acted(self, targets: list[AnyTarget]) -> None:
        """Remember that the hook has acted on these at this step."""
        self._acted_at.update(dict.fromkeys((target.name for target in targets), self.step))

    # -- every how many steps -------------------------------------------------------------------------------------------------

    @property
    def finishes_between(self) -> bool:
        """Whether `finish` is due before each evaluation and checkpoint, and not only at the end.

        With a number above 1 it is not: training would depend on when it is evaluated and saved.
        """
        return self.every in (1, AUTO)

    def _set_pace(self, found: int | None = None) -> None:
        """As the setting says; of "auto" as was found, or to be found out from now on."""
        pace = Pace(self.every)
        self.period, self._pace = (found, None) if self.every == AUTO and found else (pace.period, pace)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Have what is done be timed, as long as anybody looks at the clock; and go by what the first steps have taken."""
        pace, before = self._pace, self.step
        if pace is not None:
            pace.enter()
        yield
        figures = None if pace is None else pace.leave(is_new=self.step > before)
        if pace is None or figures is None:
            return
        is_last = pace.look(from_first(figures.fits) if self.every == AUTO else self.period)
        self.period, self._pace = pace.period, None if is_last else pace
        if self.every != AUTO and is_first():
            warn_of_cost(self, figures, self.period)
        elif is_last:
            _log.info("%r: acting takes %.3g s, a step of training %.3g s.", self, figures.acting, figures.training)

    # -- resuming ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on like an uninterrupted one."""
        return {"step": self.step} | ({"every": self.period} if self.every == AUTO and self._pace is None else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; call it before the hook is attached."""
        if "step" not in state:
            raise ValueError(f"`state` must be what `state_dict()` of a hook returned; got one with {sorted(map(str, state))}.")
        self.step = state["step"]
        self._set_pace(state.get("every"))
        self._resumed = True

    # -- what it tells ----------------------------------------------------------------------------------------------------

    @property
    def targets(self) -> list[AnyTarget]:
        """The selected weights, in the model's order."""
        return self.selection.targets

    @property
    def skipped(self) -> dict[str, str]:
        """For each layer with weights that is not acted on, why."""
        frozen = [target.name for target in self.targets if not self.acts_on(target)]
        return self.selection.skipped | dict.fromkeys(frozen, FROZEN)

    def acts_on(self, target: AnyTarget) -> bool:
        """Whether this is to be acted on now: in training not if it is frozen."""
        return not self.training or target.trains()

    def report(self) -> str:
        """A table of the selected weights (layer, kind, norm to 1 %, bound, status), and the reasons for all that is left out.

        Costs a certified norm of every layer. Where weights are sharded over processes, all must call it.
        """
        return report(self)

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Errors say which weight it is, and when."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{called(name)}, after step {self.step}: {error}") from error


def check_count(name: str, value: int) -> None:
    """Refuse what is no positive integer."""
    if not is_whole(value) or value < 1:
        raise ValueError(f"`{name}` must be a positive int; got {value!r}.")


def check_flag(name: str, value: bool) -> None:
    """Refuse what is neither True nor False."""
    if value not in (True, False):
        raise ValueError(f"`{name}` must be True or False; got {value!r}.")
