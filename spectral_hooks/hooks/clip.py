"""SpectralClip: every selected weight inside the ball, after every step."""

from __future__ import annotations

import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import projections
from ..linalg.precision import widest
from ..linalg.scaling import check_finite
from ..norms.spectral_norm import spectral_norm
from ..operators.base import KernelOperator
from ..projections import Projection
from ..projections.arguments import check_max_norm
from ..weights.gains import clipped_gain, write_gain_
from ..weights.names import called, named_layers
from ..weights.patterns import Patterns, listed
from ..weights.selection import Selection, Split, select
from ..weights.sharded import full
from ..weights.targets import LoraTarget, Target
from ..weights.writing import remember
from .attach import Handle, attach
from .averages import Average, averaged, interpolated
from .progress import shown
from .share import shared
from .watch import Known, keep_inside, still_inside

_log = logging.getLogger(__name__)

#: From which share of the weights on, free for want of support, there is a warning.
_SHARE = 0.1
#: Up to what excess, relative to the bound, a norm counts as equal to it.
_TOLERANCE = 1e-6
#: Up to what rounding of it, relative to the bound, a weight is made smaller by that; beyond, it is measured.
_COARSE = 1e-3
#: How often a weight that comes back rounded is made smaller.
_ATTEMPTS = 4
_FROZEN = "frozen (requires_grad=False): left as it is while training"


class SpectralClip:
    """Keep the operator norm of every convolution and linear layer at most `max_norm` while a model trains.

    After each optimizer step the weights whose norm exceeds the bound are projected, in place, by `projections.clip` on the
    lattice operator: the bound holds for each layer at every input size. Classes, parameters, state-dict keys and the forward
    stay those of the plain model.

    Guaranteed: after `attach`, and after every `every`-th step, the norm of each selected layer, in the dtype that it is
    stored in, is at most `max_norm` (certified; within 1e-6 counts as equal).

    Most steps cost little: with `V` a weight that was certified, `‖A(W)‖ ≤ ‖A(V)‖ + ‖A(W - V)‖`, and a coarse bound of the second
    term will do until the weight has moved far. The hook keeps such a `V` of every weight (as much memory again as the weights).

    Nothing is left free in silence: every parameter of two or more dimensions is constrained, or `skipped` has the reason. When
    more than a tenth of them (in elements) is free for want of support there is a warning at the start. Frozen weights
    (`requires_grad=False`) are left as they are while training, until they are thawed; `start(model)` alone projects them too.

    Args:
        max_norm: the bound.
        layers: which layers, as glob on qualified names, type, predicate of `(name, layer)` or of the layer, or a list of these;
            None for all that are supported.
        exclude: which of them to leave out.
        every: project after every so many optimizer steps; between, the weights may leave the ball.
        rounds: quality of the projection of convolutions, see `projections.clip`.
        projection: a function `(operator, max_norm) -> weight`, or the name of one in `projections`. With those that do not
            guarantee the bound (see `repr`) the hook does not either.
        slack: how much deeper than `max_norm`, relative to it, convolutions are clipped at most while training, so that they
            can move for some steps before the next clip; as little as that takes. 0 clips at every step, to what can be
            certified. Matrices are always clipped exactly.
        schedule: `step -> max_norm`, to let the bound change; `max_norm` counts where there is none.
        batch_norm: "clip" to keep the gains `|γ| / √(running_var + ε)` of batch normalization at most `max_norm` too; None
            leaves them alone. The bound holds for the numbers as they are stored, in half precision too.
        split, lora: as for `selection.select`: fused projections in parts, and how LoRA adapters count.
        distribute: share the work over the processes of torch.distributed: each weight has an owner that projects it and sends
            the result. All processes must hold the same weights (DDP, FSDP2).
        record: measure `largest_norm` too, which costs a certified norm of every layer at every projection.

    Attributes:
        skipped: for each layer with weights that is not constrained, why; `report()` is that as a text.
        training: whether frozen weights are left as they are. `attach` sets it, and so do the callbacks for frameworks.
        step: optimizer steps seen, of all optimizers together; those within one backward pass are one.
        bound: `max_norm` as it is now.
        clipped: how many weights the last projection changed.
        largest_norm: the largest norm of all selected layers before the last projection, to 1 %; None unless `record`.

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
        every: int = 1,
        rounds: int = 3,
        projection: str | Projection = "clip",
        slack: float = 0.08,
        schedule: Callable[[int], float] | None = None,
        batch_norm: str | None = None,
        split: Split = None,
        lora: str = "merged",
        distribute: bool = False,
        record: bool = False,
    ) -> None:
        check_max_norm(max_norm)
        for name, value in (("every", every), ("rounds", rounds)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be a positive int; got {value!r}.")
        if isinstance(slack, bool) or not isinstance(slack, (int, float)) or not 0 <= slack <= 0.5:
            raise ValueError(f"`slack` must lie in [0, 0.5]; got {slack!r}.")
        if schedule is not None and not callable(schedule):
            raise TypeError(f"`schedule` must be a function of the step that returns the bound; got {schedule!r}.")
        if batch_norm not in (None, "clip"):
            raise ValueError(f"`batch_norm` must be None or 'clip'; got {batch_norm!r}.")
        self.max_norm = max_norm
        self.layers = None if layers is None else listed(layers)
        self.exclude = None if exclude is None else listed(exclude)
        self.every = every
        self.rounds = rounds
        self.projection = projections.named(projection)
        self.slack = slack
        self.schedule = schedule
        self.batch_norm = batch_norm
        self.split = split
        self.lora = lora
        self.distribute = distribute
        self.record = record
        self.step = 0
        self.clipped = 0
        self.largest_norm: float | None = None
        self.training = False
        self._resumed = False
        self._selection = Selection()
        self._normalizations: dict[str, nn.Module] = {}
        self._known: dict[str, Known] = {}
        # the same of what optimizers keep apart from the weights: their average "x" and their fast iterate "z"
        self._iterates: dict[str, dict[str, Known]] = {}
        # what was stepped in the present update, by backward passes; and when each weight was last projected
        self._round: set[int] = set()
        self._projected_at: dict[str, int] = {}
        self._handle: Handle | None = None

    def __repr__(self) -> str:
        layers, exclude = _shown(self.layers), _shown(self.exclude)
        text = f"SpectralClip({self.max_norm!r}, layers={layers}, exclude={exclude}, every={self.every}, rounds={self.rounds}"
        if self.projection is not projections.clip:
            kept = "guarantees" if self.projection in projections.GUARANTEED else "does not guarantee"
            text += f", projection={_shown(self.projection)} ({kept} the bound)"
        others = {"slack": (self.slack, 0.08), "schedule": (self.schedule, None), "batch_norm": (self.batch_norm, None)}
        text += "".join(f", {name}={_shown(value)}" for name, (value, default) in others.items() if value != default)
        return text + ")"

    def __getstate__(self) -> dict[str, Any]:
        # copies and pickles carry the settings, not the model that the original works on
        progress: dict[str, Any] = {"_known": {}, "_iterates": {}, "_round": set(), "_projected_at": {}}
        return {**self.__dict__, **progress, "_selection": Selection(), "_normalizations": {}, "_handle": None}

    @property
    def skipped(self) -> dict[str, str]:
        frozen = [target.name for target in self._selection.targets if not self._is_acted_on(target)]
        frozen += [name for name, layer in self._normalizations.items() if not self._is_acted_on(layer)]
        return self._selection.skipped | dict.fromkeys(frozen, _FROZEN)

    def report(self) -> str:
        """What is constrained and what is not, as a text: the reasons for all that is left out, with the layers of each."""
        skipped = self.skipped
        free, numel = self._free()
        constrained = sum(target.name not in skipped for target in self._selection.targets)
        lines = [f"{constrained} weights constrained to norm <= {self.bound:g}, {len(skipped)} layers or weights left out."]
        if free:
            lines.append(f"Free for want of support: {sum(free.values()) / numel:.0%} of the elements of weights.")
        layers: dict[str, list[str]] = defaultdict(list)
        for name, reason in skipped.items():
            layers[reason].append(name or "the model itself")
        for reason, names in sorted(layers.items(), key=lambda pair: -sum(free.get(name, 0) for name in pair[1])):
            lines += [f"- {reason}", f"    {', '.join(names)}"]
        return "\n".join(lines)

    @property
    def bound(self) -> float:
        if self.schedule is None:
            return self.max_norm
        bound = self.schedule(self.step)
        check_max_norm(bound)
        return bound

    def attach(self, model: nn.Module, optimizer: Any) -> Handle:
        """Project now, and after every step of the optimizer, or of each of several.

        Give the optimizer that the loop steps. It may be wrapped around another (SAM, Lookahead, ZeRO, Opacus, Accelerate): the
        weights are inside after the last write, and slow weights too. Of a schedule-free optimizer the fast iterate and the
        average are projected, so that the weights are inside where it trains and, after `optimizer.eval()`, where it evaluates.
        Optimizers that step in the backward pass act at its end. A copy or pickle of an optimizer does not call the hook.

        Attaching again to the same model adds optimizers that are new and returns the same handle.

        Returns:
            A handle: `handle.remove()`, or use it as a context manager.

        Raises:
            ValueError: this hook is attached to another model; the optimizer steps float32 copies of this model's weights.
            TypeError: `model` or `optimizer` is none.
            NotImplementedError: DeepSpeed, the old FSDP, an optimizer with `eval()` whose average cannot be told.

        Warns:
            UserWarning: the optimizer steps none of the selected weights.
        """
        if self._handle is not None and self._handle.attached:
            if self._handle.model is not model:
                raise ValueError("this SpectralClip is attached to another model: make a new one, or remove() its handle first.")
            return attach(self, model, optimizer, self._handle)
        self.training = True
        self._handle = Handle(self, model)  # by now, for the first projection meets what the optimizers keep
        attach(self, model, optimizer, self._handle)
        stepped = {id(p) for p in self._handle.parameters}
        targets = self._selection.targets
        if not any(id(p) in stepped for target in targets for p in _parameters(target)):
            warnings.warn(
                f"none of the {len(targets)} selected weights ({targets[0].name}, ...) is stepped by this optimizer: they are "
                "projected now, and whenever it steps. Attach the optimizer that trains them, made of this model's own "
                "parameters; one that trains on flattened or partitioned copies writes over what is projected.",
                stacklevel=2,
            )
        return self._handle

    def start(self, model: nn.Module) -> None:
        """Select the layers and project, unless a resumed run was between two projections.

        By itself this is a projection for once, of frozen weights too: `SpectralClip(1.0).start(model)`.
        """
        self._selection = select(model, self.layers, self.exclude, split=self.split, lora=self.lora)
        self._normalizations = self._chosen_normalizations(model)
        self._warn_of_free_weights()
        if not self._resumed:
            self._known, self._iterates = {}, {}
        self._round, self._projected_at = set(), dict.fromkeys((target.name for target in self._selection.targets), self.step)
        if not self._resumed or self.step % self.every == 0:
            self.project()
        self._resumed = False

    def before_step(self) -> None:
        """Nothing to do before a step."""

    def after_step(self, stepped: Collection[Tensor] | None = None) -> None:
        """Count the step and project when it is due.

        Args:
            stepped: for optimizers that step in the backward pass, what they have stepped: nothing else is written. They count as
                one step until one of these parameters is stepped again; every weight is projected once in `every` of them.
        """
        if stepped is None:
            self.step, self._round = self.step + 1, set()
            if self.step % self.every == 0:
                self._project_all(self.slack)
            return
        moved = {id(p) for p in stepped}
        if not self._round or self._round & moved:
            self.step, self._round = self.step + 1, set()
        self._round |= moved
        due = [
            target
            for target in self._selection.targets
            if self.step // self.every > self._projected_at.get(target.name, 0) // self.every
            and any(id(p) in moved for p in _parameters(target))
        ]
        if due:
            normalizations = {
                name: layer for name, layer in self._normalizations.items() if any(id(p) in moved for p in layer.parameters())
            }
            self._project_all(self.slack, due, normalizations)

    def rewritten(self) -> None:
        """Project again where the last step was due: something was written after it."""
        if self.step % self.every == 0:
            self._project_all(self.slack)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on like an uninterrupted one.

        Without `known`, which holds tensors, it goes on within `slack` of that.
        """
        state: dict[str, Any] = {"step": self.step, "known": _plain(self._known)}
        if self._iterates:
            state["iterates"] = {which: _plain(known) for which, known in self._iterates.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`; call it before the hook is attached."""
        self.step = state["step"]
        self._known = _knowledge(state.get("known", {}))
        self._iterates = {which: _knowledge(known) for which, known in state.get("iterates", {}).items()}
        self._resumed = True

    def project(self) -> None:
        """Project every selected weight that is outside now. All results are computed before the first weight is written."""
        self._project_all(slack=0)

    @torch.no_grad()
    def _project_all(
        self, slack: float, targets: list[Target | LoraTarget] | None = None, normalizations: dict[str, nn.Module] | None = None
    ) -> None:
        """Project these, or all; first what optimizers keep of them elsewhere."""
        # looked at anew each time: layers may be frozen and thawed
        targets = [target for target in targets or self._selection.targets if self._is_acted_on(target)]
        normalizations = self._normalizations if normalizations is None else normalizations
        if self.record:
            operators = (op for target in targets for op in self._gathered(target))
            self.largest_norm = max((float(spectral_norm(op, rtol=1e-2)) for op in operators), default=None)
        averages = [] if self._handle is None else self._handle.averages
        clipped = self._project_iterates(averages, targets, normalizations, slack) if averages else 0
        with self._known_of("x" if self._handle is not None and self._handle.evaluates else None):
            self._project_weights(targets, normalizations, slack)
        self.clipped = max(self.clipped, clipped)
        self._projected_at.update(dict.fromkeys((target.name for target in targets), self.step))

    def _project_iterates(
        self,
        averages: list[Average],
        targets: list[Target | LoraTarget],
        normalizations: dict[str, nn.Module],
        slack: float,
    ) -> int:
        """Project averages and fast iterates, each in the place of the weights; then set these between them.

        Three times the work of other optimizers, and for the while four copies of the weights. Nothing has changed if it fails.
        """
        chosen = {id(p) for target in targets for p in _parameters(target)}
        chosen |= {id(p) for layer in normalizations.values() for p in layer.parameters()}
        averages = [each for each in averages if id(each.parameter) in chosen]
        before = [each.parameter.clone() for each in averages]
        clipped = 0

        def projected(which: str, values: list[Tensor]) -> list[Tensor]:
            nonlocal clipped
            for each, value in zip(averages, values, strict=True):
                each.parameter.copy_(value)
            with self._known_of(which):
                self._project_weights(targets, normalizations, slack, follow=False)
            clipped = max(clipped, self.clipped)
            return [each.parameter.clone() for each in averages] if self.clipped else values

        means, fasts = [averaged(each) for each in averages], [each.fast.to(each.parameter) for each in averages]
        try:
            new_means, new_fasts = projected("x", means), projected("z", fasts)
        finally:
            for each, value in zip(averages, before, strict=True):
                each.parameter.copy_(value)
        if clipped:
            for i, each in enumerate(averages):
                same = (new_means[i] == means[i]) & (new_fasts[i] == fasts[i])
                kept = [] if self._handle is None else self._handle.copies(each.parameter)
                each.parameter.copy_(torch.where(same, before[i], interpolated(each, new_means[i], new_fasts[i])))
                each.fast.copy_(new_fasts[i])
                if each.mean is not None:
                    each.mean.copy_(new_means[i])
                for copy in kept:
                    copy.copy_(each.parameter)
        return clipped

    @contextmanager
    def _known_of(self, which: str | None) -> Iterator[None]:
        """While something else stands in the place of the weights, what is known is of that."""
        if which is None:
            yield
            return
        known, self._known = self._known, self._iterates.setdefault(which, {})
        try:
            yield
        finally:
            self._known = known

    def _project_weights(
        self, targets: list[Target | LoraTarget], normalizations: dict[str, nn.Module], slack: float, *, follow: bool = True
    ) -> None:
        """Project what stands in the place of the weights; copies of it `follow`."""
        results: Iterable[Any]
        if self.distribute:
            # only an owner knows its weights, so none can be left out beforehand
            results = shared(partial(self._projected_if_in_doubt, slack=slack), targets, self._gathered)
        else:
            targets = self._in_doubt(targets)
            results = self._projected_together(targets, slack)
        changed = [(target, new) for target, new in zip(targets, results, strict=True) if new is not None]
        gains = self._clipped_gains(normalizations)
        # only weights that are set through an inverse map can refuse: they go first, and all go back if one does
        jobs = sorted(((target, new, target.may_refuse()) for target, new in changed), key=lambda job: not job[2])
        undo: list[Callable[[], None]] = []
        for target, new, refusing in jobs:
            with self._named(target.name):
                try:
                    undo += [remember(layer) for layer in refusing]
                    with self._copies_follow(target) if follow else nullcontext():
                        target.write_(new)
                        if refusing and isinstance(target, Target):
                            self._make_room_for_rounding(target, new)
                except ValueError:
                    for restore_ in reversed(undo):  # parts of one weight share its parametrization
                        restore_()
                    raise
        for layer, gamma in gains:
            write_gain_(layer, gamma)
        self.clipped = len(changed) + len(gains)

    def _make_room_for_rounding(self, target: Target, weight: Tensor) -> None:
        """Have a weight obey that was inside, and that comes back from an inverse map with its rounding."""
        if self.projection not in projections.GUARANTEED:
            return
        scale = 1.0
        for _ in range(_ATTEMPTS):
            operators = self._gathered(target)
            given = (scale * weight).to(widest(weight.device))
            off = max(_coarse_norm(op.with_weight(op.weight.to(given) - given)) for op in operators) / self.bound
            # what was given has at most `scale` times the bound
            if scale + off <= 1 + _TOLERANCE:
                return
            norm = max(float(spectral_norm(op)) for op in operators) if off > _COARSE else 0.0
            if off > _COARSE and norm <= self.bound * (1 + _TOLERANCE):
                return
            scale = scale * self.bound / norm * (1 - _TOLERANCE) if off > _COARSE else 1 - 1.5 * off
            target.write_(scale * weight)
        raise ValueError(
            f"the layer rounds what it is given, so that it exceeds {self.bound}; exclude it, or keep it in float32."
        )

    def _clipped_gains(self, normalizations: dict[str, nn.Module]) -> list[tuple[nn.Module, Tensor]]:
        """The normalizations whose gains are outside, with those that are inside."""
        clipped = []
        for name, layer in normalizations.items():
            if self._is_acted_on(layer):
                with self._named(name):
                    gamma = clipped_gain(layer, self.bound)
                clipped += [] if gamma is None else [(layer, gamma)]
        return clipped

    def _is_acted_on(self, item: Target | LoraTarget | nn.Module) -> bool:
        """Whether this is to be projected now: in training not if it is frozen."""
        if not self.training:
            return True
        if isinstance(item, nn.Module):
            return any(p.requires_grad for p in item.parameters(recurse=False))
        return item.trains()

    @contextmanager
    def _copies_follow(self, target: Target | LoraTarget) -> Iterator[None]:
        """What an optimizer keeps that equals a parameter, and will write back, gets what the parameter gets."""
        kept = [] if self._handle is None else [(p, copy) for p in _parameters(target) for copy in self._handle.copies(p)]
        yield
        for parameter, copy in kept:
            copy.copy_(parameter)

    def _gathered(self, target: Target | LoraTarget) -> list[KernelOperator]:
        """The target's operators, with whole weights: a sharded one is gathered from all processes."""
        return [op.with_weight(full(op.weight)) for op in target.operators()]

    def _projected_together(self, targets: list[Target | LoraTarget], slack: float) -> list[Any]:
        """`_projected` of each; those that are judged by what is known at once, so that layers of equal shape share the work."""
        operators = [self._gathered(target) for target in targets]
        together = [
            i for i, target in enumerate(targets) if target.name in self._known and self._is_watched(target, operators[i])
        ]
        for i in together:
            with self._named(targets[i].name):
                check_finite(operators[i][0].weight)
        kept = self._kept([targets[i].name for i in together], [operators[i][0] for i in together], slack)
        results = dict(zip(together, kept, strict=True))
        return [
            results[i] if i in results else self._projected(target, operators[i], slack)
            for i, target in enumerate(shown(targets, "projecting weights"))
        ]

    def _projected(self, target: Target | LoraTarget, operators: list[KernelOperator], slack: float) -> Any:
        """What to write so that the target is inside the ball, or None if it is there already."""
        with self._named(target.name):
            if isinstance(target, LoraTarget):
                return target.clipped(self._inside, self.bound)
            return self._inside(target, operators, slack)

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Errors say which weight it is, and when."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{called(name)}, after step {self.step}: {error}") from error

    def _inside(self, target: Target, operators: list[KernelOperator] | None = None, slack: float = 0.0) -> Tensor | None:
        """The weight inside the ball, or None if it is there already."""
        operators, mask = operators or self._gathered(target), target.mask()
        weight = before = operators[0].weight
        check_finite(before)
        if self._is_watched(target, operators):
            return self._kept([target.name], operators, slack)[0]
        for i, op in enumerate(operators):
            # the first use decides the shape of the result; scaling for another keeps the bound of all before it
            project = self._project if i == 0 else projections.rescale
            weight = project(op.with_weight(weight), self.bound)
        if weight is not before and mask is not None:
            weight = projections.rescale(operators[0].with_weight(weight * mask), self.bound)
        return None if weight is before else weight

    def _is_watched(self, target: Target | LoraTarget, operators: list[KernelOperator]) -> bool:
        """Whether the weight is kept inside by way of what is known of it."""
        return (
            isinstance(target, Target) and len(operators) == 1 and target.mask() is None and self.projection is projections.clip
        )

    def _kept(self, names: list[str], operators: list[KernelOperator], slack: float) -> list[Tensor | None]:
        """The weights inside the ball, or None for those that are there already; and remember what is known of them now."""
        known = [self._known.get(name) for name in names]
        kept = keep_inside(operators, known, self.bound, rounds=self.rounds, slack=slack)
        self._known.update(zip(names, (now for _, now in kept), strict=True))
        return [None if weight is op.weight else weight for op, (weight, _) in zip(operators, kept, strict=True)]

    def _project(self, op: KernelOperator, max_norm: float) -> Tensor:
        if self.projection is projections.clip:
            return projections.clip(op, max_norm, rounds=self.rounds)
        return self.projection(op, max_norm)

    def _projected_if_in_doubt(self, target: Target | LoraTarget, operators: list[KernelOperator], slack: float) -> Any:
        return self._projected(target, operators, slack) if self._in_doubt([target], operators) else None

    def _in_doubt(
        self, targets: list[Target | LoraTarget], operators: list[KernelOperator] | None = None
    ) -> list[Target | LoraTarget]:
        """The targets that what is known does not prove to be inside; `operators` of a single one, if they are gathered."""
        if self.projection is not projections.clip:
            return targets
        watched = [i for i, target in enumerate(targets) if target.name in self._known]
        firsts = operators or [self._gathered(targets[i])[0] for i in watched]
        known = still_inside(firsts[: len(watched)], [self._known[targets[i].name] for i in watched], self.bound)
        settled = {i: now for i, now in zip(watched, known, strict=True) if now is not None}
        self._known.update((targets[i].name, now) for i, now in settled.items())
        return [target for i, target in enumerate(targets) if i not in settled]

    def _chosen_normalizations(self, model: nn.Module) -> dict[str, nn.Module]:
        """The batch normalizations to clip; if there are some and none is to be, say so."""
        apart = ("excluded", "not among `layers`")
        skipped = self._selection.skipped
        found = {
            name: layer
            for name, layer in named_layers(model)
            if isinstance(layer, _BatchNorm) and skipped.get(name) not in apart and layer.running_var is not None
        }
        if self.batch_norm is None:
            if found:
                _log.info("%d batch normalizations are left alone; batch_norm='clip' bounds their gains too.", len(found))
            return {}
        without = {name: "affine=False: there are no gains to clip" for name, layer in found.items() if layer.weight is None}
        self._selection.skipped = {name: reason for name, reason in skipped.items() if name not in found} | without
        return {name: layer for name, layer in found.items() if name not in without}

    def _free(self) -> tuple[dict[str, int], int]:
        """Elements of weights that nothing bounds for want of support, by name; and of these and the constrained together."""

        def count(parameters: Iterable[Tensor]) -> int:
            # while training, what is frozen is not free to move
            return sum(p.numel() for p in parameters if p.ndim > 1 and (p.requires_grad or not self.training))

        constrained = {id(leaf): leaf for target in self._selection.targets for leaf in target.leaves()}
        free = {name: count(parameters) for name, parameters in self._selection.free.items()}
        return {name: n for name, n in free.items() if n}, count(constrained.values()) + sum(free.values())

    def _warn_of_free_weights(self) -> None:
        free, numel = self._free()
        share = sum(free.values()) / max(numel, 1)
        if share <= _SHARE:
            return
        largest = sorted(free, key=lambda name: -free[name])
        shown = ", ".join(f"{name or 'the model itself'} ({free[name] / numel:.0%})" for name in largest[:3])
        more = f" and {len(largest) - 3} more" if len(largest) > 3 else ""
        warnings.warn(
            f"SpectralClip leaves {share:.0%} of the weights (elements of parameters with two or more dimensions) free for want "
            f"of support: {shown}{more}. Of the first: {self._selection.skipped[largest[0]]} print(hook.report()) lists all; "
            "`exclude` those that are meant to be free.",
            UserWarning,
            stacklevel=5 if self.training else 3,  # whoever calls `attach` or `start`
        )


def _parameters(target: Target | LoraTarget) -> list[Tensor]:
    """All parameters of the layers that use a weight."""
    return list({id(p): p for layer in target.layers for p in layer.parameters()}.values())


def _plain(known: dict[str, Known]) -> dict[str, tuple[Any, ...]]:
    return {name: tuple(now) for name, now in known.items()}


def _knowledge(state: dict[str, Any]) -> dict[str, Known]:
    return {name: Known(*now) for name, now in state.items()}


def _coarse_norm(op: KernelOperator) -> float:
    """A bound of the operator norm that costs nothing: rank one at every tap, all in phase."""
    kernel = op.canonical()
    return float(torch.linalg.vector_norm(kernel.flatten(1), dim=1).amax()) * sqrt(prod(kernel.shape[3:])) * op.lattice_factor


def _shown(patterns: Any) -> str:
    """Like `repr` but the same in every process, for checkpoints know a hook by it; that of a function shows an address."""
    if isinstance(patterns, list):
        return f"[{', '.join(map(_shown, patterns))}]"
    if isinstance(patterns, partial):
        options = "".join(f", {name}={value!r}" for name, value in patterns.keywords.items())
        return f"partial({_shown(patterns.func)}{options})"
    if callable(patterns) and hasattr(patterns, "__qualname__"):
        return f"{patterns.__module__}.{patterns.__qualname__}"
    return repr(patterns)
