"""SpectralClip: every selected weight inside the ball, after every step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import projections
from ..norms.spectral_norm import spectral_norm
from ..operators.base import is_number
from ..operators.covering import Sizes
from ..projections import Projection
from ..projections.arguments import check_max_norm
from ..weights.gains import write_gain_
from ..weights.patterns import Patterns
from ..weights.selection import Selection, Split
from ..weights.targets import AnyTarget, Whole, WholeSum
from . import normalizations, settings, sizes
from .atomic import write_all_
from .base import FROZEN, Hook, check_count, check_flag
from .capped import Capping
from .inside import Way, brought_inside
from .iterates import project_iterates
from .pace import AUTO
from .report import Row
from .share import shared
from .watch import Job, Known, still_inside


class SpectralClip(Hook):
    """Keep the operator norm of every convolution and linear layer at most `max_norm` while a model trains.

    After each optimizer step the weights whose norm exceeds the bound are projected, in place, by `projections.clip` on the
    lattice operator: the bound holds for each layer at every input size; with `example` at those that it meets. Classes,
    parameters, state-dict keys and the forward stay those of the plain model.

    Guaranteed: after `attach`, and after every `every`-th step, the norm of each selected layer, in the dtype that it is
    stored in, is at most `max_norm` (certified; within 1e-6 counts as equal).

    Most steps cost little: with `V` a weight that was certified, `‖A(W)‖ ≤ ‖A(V)‖ + ‖A(W - V)‖`, and a coarse bound of the second
    term will do until the weight has moved far. The hook keeps such a `V` of every weight (as much memory again as the weights),
    and of kernels with 48 channels or more, once they were clipped, where their large singular values lie (commonly as much as
    the kernel in float32, at most four times that). Both are in `state_dict()`. Such a kernel that moves by more than half of
    `slack` in a step is brought to that depth at once, even from between it and the bound: a proof costs more than the clip.

    The weights are inside after the last write of wrapped optimizers (SAM, Lookahead, ZeRO, Opacus, Accelerate), and slow weights
    too. Of a schedule-free optimizer the fast iterate and the average are projected, so that the weights are inside where it
    trains and, after `optimizer.eval()`, where it evaluates.

    Nothing is left free in silence: every parameter of two or more dimensions is constrained, or `skipped` has the reason. When
    more than a tenth of them (in elements) is free for want of support there is a warning at the start. Frozen weights
    (`requires_grad=False`) are left as they are while training, until they are thawed; `start(model)` alone projects them too.

    Args:
        max_norm: the bound.
        layers: which layers, as glob on qualified names, type, predicate of `(name, layer)` or of the layer, or a list of these;
            None for all that are supported.
        exclude: which of them to leave out.
        every: project after every so many optimizer steps; between, the weights may leave the ball. "auto" finds a number, once
            and from the times of the first steps, for which projections take at most a tenth of the time of training; it stands
            in `repr`, in `state_dict()` and in the metrics. Frameworks' callbacks then also project before each evaluation and
            checkpoint; in a loop of your own call `project()` there.
        rounds: quality of the projection of convolutions, see `projections.clip`.
        projection: a function `(operator, max_norm) -> weight`, or the name of one in `projections`. With those that do not
            guarantee the bound (see `repr`) the hook does not either. "soft_cap" does for matrices by products, certified every
            eighth step, and waits for no device: there NaN and infinity are named a step later. All else is certified each time.
        slack: how much deeper than `max_norm`, relative to it, weights are clipped at most while training, so that they can
            move for some steps before the next clip; as little as that takes, and the first clip goes to the bound. None is 0.08
            for convolutions and 0.02 for matrices; a number counts for both. 0 clips at every step, matrices to the bound itself,
            convolutions to what can be certified.
        schedule: `step -> max_norm`, to let the bound change; `max_norm` counts where there is none.
        batch_norm: "clip" to keep the gains `|γ| / √(running_var + ε)` of batch normalization at most `max_norm` too; None
            leaves them alone. The bound holds for the numbers as they are stored, in half precision too.
        split, lora: as for `weights.selection.select`: fused projections in parts, and how LoRA adapters count.
        distribute: share the work over the processes of torch.distributed: each weight has an owner that projects it and sends
            the result. All processes must hold the same weights (DDP, FSDP2).
        example: what the model takes, to bound convolutions at the input sizes that they meet with it: a looser constraint, and
            with small inputs a cheaper one. A tensor, a tuple of arguments, a mapping of keyword arguments, or a function of the
            model that runs it; a copy of the model is run once, in eval mode, and the model stays as it is. With zero padding the
            bound holds at these sizes and all that are smaller, with circular padding at these alone, and **not for larger
            inputs**; layers that were not called stay bounded at every size. `report()` shows the sizes, `state_dict()` has them,
            pickles hold the example's shapes only. Processes must give inputs of equal sizes, or `distribute`.
        log: measure `largest_norm` too, for `metrics()`: costs a certified norm of every layer at every projection.

    Attributes:
        skipped: for each layer with weights that is not constrained, why; `report()` shows it in a table.
        training: whether frozen weights are left as they are. `attach` sets it, and so do the callbacks for frameworks.
        step: optimizer steps seen, of all optimizers together; those within one backward pass are one.
        bound: `max_norm` as it is now.
        clipped: how many weights the last projection changed. With "soft_cap" on a device, to ask for it waits.
        largest_norm: the largest norm of all selected layers before the last projection, to 1 %; None unless `log`.

    Raises:
        ValueError: an argument out of range; at the start, a pattern that matches nothing, an unsupported layer named in full, or
            a layer whose weight can be measured and not set (see `as_operator`);
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
        every: int | Literal["auto"] = 1,
        rounds: int = 3,
        projection: str | Projection = "clip",
        slack: float | None = None,
        schedule: Callable[[int], float] | None = None,
        batch_norm: str | None = None,
        split: Split = None,
        lora: str = "merged",
        distribute: bool = False,
        example: sizes.Example | None = None,
        log: bool = False,
    ) -> None:
        super().__init__(layers=layers, exclude=exclude, every=every, split=split, lora=lora, log=log)
        _check(rounds, slack, schedule, batch_norm, distribute)
        sizes.check_example(example)
        self.max_norm = check_max_norm(max_norm)
        self.rounds = int(rounds)
        self.projection = projections.named(projection)
        self.slack = None if slack is None else float(slack)
        self.schedule = schedule
        self.batch_norm = batch_norm
        self.distribute = bool(distribute)
        self.example = example
        self.largest_norm: float | None = None
        self._normalizations: dict[str, nn.Module] = {}
        # of the weights, and of what optimizers keep apart from them: their average "x" and their fast iterate "z"
        self._known: dict[str, dict[str, Known]] = {}
        self._sizes: dict[str, Sizes] = {}
        self._capping = Capping()
        self._clipped: int | Tensor = 0  # on the device, as long as nobody asks for it

    def shown_setting(self, name: str, value: Any) -> str:
        """How `repr` shows the value of a setting."""
        if name == "example":
            return sizes.shown(value)
        if name != "projection":
            return super().shown_setting(name, value)
        projection = projections.named(value)
        kept = "guarantees" if projections.guarantees(projection) else "does not guarantee"
        return f"{settings.text(projection)} ({kept} the bound)"

    def __getstate__(self) -> dict[str, Any]:
        left_out = {"_normalizations": {}, "_known": {}, "_capping": Capping(), "example": sizes.without_values(self.example)}
        return super().__getstate__() | left_out

    # -- what it does -----------------------------------------------------------------------------------------------------

    @property
    def clipped(self) -> int:
        """How many weights the last projection changed."""
        return int(self._clipped)

    @property
    def bound(self) -> float:
        return self.max_norm if self.schedule is None else check_max_norm(self.schedule(self.step))

    def choose(self, model: nn.Module) -> Selection:
        """The weights, and the batch normalizations beside them."""
        selection = super().choose(model)
        self._normalizations = normalizations.chosen(model, selection, clips=self.batch_norm is not None)
        before = self._sizes if self._resumed or self.example is not None else {}
        self._sizes = sizes.chosen(model, selection, self.example, before, everywhere=self.distribute)
        return selection

    def forget(self) -> None:
        """What is known is of other weights."""
        self._known, self._capping = {}, Capping()

    def begin(self) -> None:
        """Project every selected weight that is outside."""
        self.project()

    def finish(self) -> None:
        """Project every selected weight that is outside: the last steps may not have been followed by a projection."""
        self.project()

    def project(self) -> None:
        """Project every selected weight that is outside now. All results are computed before the first weight is written."""
        targets = [target for target in self.targets if self.acts_on(target)]
        self._project(targets, self._normalizations, slack=0)
        self._capping.check(self.naming)
        self.acted(targets)

    def act(self, targets: list[AnyTarget], stepped: set[int] | None) -> None:
        """Project those that are outside, somewhat deeper than the bound."""
        chosen = self._normalizations
        if stepped is not None:
            chosen = {name: layer for name, layer in chosen.items() if any(id(p) in stepped for p in layer.parameters())}
        self._project(targets, chosen, self.slack)

    @torch.no_grad()
    def _project(self, targets: list[AnyTarget], chosen: dict[str, nn.Module], slack: float | None) -> None:
        """Project these; first what optimizers keep of them elsewhere."""
        chosen = {name: layer for name, layer in chosen.items() if self._acts_on_gains(layer)}
        handle, clipped, measures = self.handle, 0, self.log
        averages = handle.averages if handle is not None and handle.averaging else []
        if handle is not None and averages:
            if measures:
                self._measure(target.gathered() for target in targets)
            parameters = [p for target in targets for p in target.parameters()]
            parameters += [p for layer in chosen.values() for p in layer.parameters()]

            def project(which: str) -> int:
                return int(self._project_weights(targets, chosen, slack, which, follow=False))

            clipped, measures = project_iterates(averages, parameters, project, handle.copies), False
        which = "x" if handle is not None and handle.averaging and handle.evaluates else ""
        self._clipped = self._project_weights(targets, chosen, slack, which, measures=measures)
        if averages:
            self._clipped = max(self.clipped, clipped)

    def _project_weights(
        self,
        targets: list[AnyTarget],
        chosen: dict[str, nn.Module],
        slack: float | None,
        which: str,
        *,
        follow: bool = True,
        measures: bool = False,
    ) -> int | Tensor:
        """Project what stands in the place of the weights, and what equals it elsewhere if that is to `follow`: how many."""
        self._capping.uncertain, self._capping.acted = 0, 0
        if self.distribute:
            if measures:
                self._measure(target.gathered() for target in targets)
            changes = shared(lambda whole: self._settled([whole], which, slack)[0], targets)
        else:
            wholes = [target.gathered() for target in targets]
            if measures:
                self._measure(wholes)
            changes = self._settled(wholes, which, slack)
        gains = normalizations.clipped_gains(chosen, self.bound, self.naming) if chosen else []
        changed = [(target, change) for target, change in zip(targets, changes, strict=True) if change is not None]
        if changed:
            copies = self.handle.copies if follow and self.handle is not None else None
            bound = self.bound if projections.guarantees(self.projection) else None
            write_all_(changed, bound, copies, self.naming)
        for layer, gamma in gains:
            write_gain_(layer, gamma)
        return len(changed) + len(gains) - self._capping.uncertain + self._capping.acted

    def _settled(self, wholes: list[Whole | WholeSum], which: str, slack: float | None) -> list[Any]:
        """What is to be written so that each is inside the ball, None for those that are there already."""
        known = self._known.setdefault(which, {})
        jobs = [Job(whole, known.get(whole.target.name) if whole.is_single else None) for whole in wholes]
        if self.projection is projections.soft_cap:
            jobs = self._capping.kept(jobs, self.bound, which, self.step, self.naming, waits=self.distribute)
        if self.projection in (projections.clip, projections.soft_cap):
            jobs = still_inside(jobs, self.bound)
        if not all(job.is_inside for job in jobs):
            way = Way(self.projection, self.bound, self.rounds, slack, self.naming, self.shows_bars)
            jobs = brought_inside(jobs, way)
        known.update((job.whole.target.name, job.known) for job in jobs if job.known is not None)
        return [job.change for job in jobs]

    def _measure(self, wholes: Iterable[Whole | WholeSum]) -> None:
        operators = (op for whole in wholes for op in whole.operators)
        self.largest_norm = max((float(spectral_norm(op, rtol=1e-2)) for op in operators), default=None)

    # -- resuming ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on like an uninterrupted one.

        Without `known`, which holds tensors, it goes on within `slack` of that.
        """
        plain = {
            which: {name: tuple(now) for name, now in (known | self._capping.saved(which, self.step)).items()}
            for which, known in self._known.items()
        }
        state = super().state_dict() | {"known": plain.pop("", {})}
        return state | ({"iterates": plain} if plain else {}) | ({"sizes": self._sizes} if self._sizes else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; call it before the hook is attached."""
        super().load_state_dict(state)
        self._sizes = {name: tuple(map(tuple, each)) for name, each in state.get("sizes", {}).items()}
        saved = {"": state.get("known", {}), **state.get("iterates", {})}
        self._known = {which: {name: Known(*now) for name, now in known.items()} for which, known in saved.items()}
        self._capping = Capping()

    # -- what it tells ----------------------------------------------------------------------------------------------------

    @property
    def skipped(self) -> dict[str, str]:
        frozen = [name for name, layer in self._normalizations.items() if not self._acts_on_gains(layer)]
        return super().skipped | dict.fromkeys(frozen, FROZEN)

    def metrics(self) -> dict[str, float]:
        """Of the last projection: the largest norm before it, to 1 %, how many weights it changed, and the pace if "auto"."""
        if not self.log:
            return {}
        norm = {} if self.largest_norm is None else {"spectral_clip/norm_before": self.largest_norm}
        every = {"spectral_clip/every": float(self.period)} if self.every == AUTO else {}
        return norm | {"spectral_clip/clipped": float(self.clipped)} | every

    def bound_of(self, target: AnyTarget) -> float:
        """The bound as it is now, of all weights."""
        return self.bound

    def input_of(self, target: AnyTarget) -> str:
        """The recorded input sizes at which a convolution is bounded; without `example` it is at every size."""
        return sizes.of(target) if self._sizes or self.example is not None else ""

    def rows(self) -> list[Row]:
        """Lines for the batch normalizations whose gains are kept at the bound."""
        return normalizations.rows(self._normalizations, self.bound, self.skipped)

    def _acts_on_gains(self, layer: nn.Module) -> bool:
        return not self.training or any(p.requires_grad for p in layer.parameters(recurse=False))


def _check(rounds: int, slack: float | None, schedule: Any, batch_norm: Any, distribute: bool) -> None:
    """Refuse what is out of range, and of another type."""
    check_count("rounds", rounds)
    if slack is not None and (not is_number(slack) or not 0 <= slack <= 0.5):
        raise ValueError(f"`slack` must be None or lie in [0, 0.5]; got {slack!r}.")
    if schedule is not None and not callable(schedule):
        raise TypeError(f"`schedule` must be a function of the step that returns the bound; got {schedule!r}.")
    if batch_norm not in (None, "clip"):
        raise ValueError(f"`batch_norm` must be None or 'clip'; got {batch_norm!r}.")
    check_flag("distribute", distribute)
