"""When a hook acts: at once, and right after the last write of every real optimizer step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial, wraps
from types import MethodType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import optimizers
from .averages import Average, average_of

if TYPE_CHECKING:
    from .base import Hook

#: What trains on flattened copies of its own of the weights, by the name of its class.
_OWN_COPIES = {"DeepSpeedEngine", "FullyShardedDataParallel", "XlaFullyShardedDataParallel"}


class Handle:
    """What `attach` returns: removes the hook, also as a context manager."""

    def __init__(self, hook: Hook, model: nn.Module) -> None:
        self.hook = hook
        self.model = model
        #: Whether any optimizer evaluates other weights than it trains.
        self.averaging = False
        self._installed: dict[int, _Installed] = {}
        # optimizers that stepped in a backward pass which has not ended, and the number of that pass
        self._stepped: list[Tensor] = []
        self._backward = -1
        # how often parameters had been written when the hook had started, until a step is seen
        self._versions: list[int] | None = None

    def __repr__(self) -> str:
        kinds = dict.fromkeys(type(each.levels[0]).__name__ for each in self._installed.values())
        return f"Handle({self.hook!r} on {type(self.model).__name__}, {'with ' + ', '.join(kinds) if kinds else 'removed'})"

    @property
    def attached(self) -> bool:
        """Whether any optimizer still calls the hook."""
        return bool(self._installed)

    @property
    def parameters(self) -> list[Tensor]:
        """What the optimizers step."""
        return [p for each in self._installed.values() for p in each.parameters]

    @property
    def averages(self) -> list[Average]:
        """Of parameters that train apart from their average, what the optimizers keep of them."""
        return [average for each in self._installed.values() for average in each.averages()]

    @property
    def evaluates(self) -> bool:
        """Whether parameters that train apart from their average stand at it now."""
        return any(not each.trains(level, group) for each in self._installed.values() for level, group in each.averaged_groups())

    def copies(self, parameter: Tensor) -> list[Tensor]:
        """What the optimizers keep that equals this parameter bit for bit: slow weights, for example."""
        return [copy for each in self._installed.values() for copy in each.copies(parameter)]

    def install(self, optimizer: Any) -> None:
        """Have this optimizer call the hook; once, however often it is asked for."""
        if id(optimizer) not in self._installed:
            self._installed[id(optimizer)] = installed = _Installed(self, optimizer)
            self.averaging |= bool(installed.averaging)

    def started(self) -> None:
        """From now on a weight that changes without a step is worth a warning."""
        self._versions = [p._version for p in self.model.parameters()]

    def remove(self) -> None:
        """Stop acting. The weights stay as they are."""
        if self.attached and self._versions not in (None, [p._version for p in self.model.parameters()]):
            names = ", ".join(dict.fromkeys(type(each.levels[0]).__name__ for each in self._installed.values()))
            warnings.warn(
                f"the weights have changed, but no step of the optimizer ({names}) was seen, so the hook did not act: attach the "
                "object whose `step` the loop calls; a copy of an optimizer does not call hooks.",
                stacklevel=2,
            )
        self._versions = None
        for each in self._installed.values():
            each.remove()
        self._installed.clear()
        self.averaging = False
        self._stepped, self._backward = [], -1

    def stepped(self, parameters: list[Tensor]) -> None:
        """An optimizer has stepped these; if within a backward pass, wait for its end: the graph may need the other weights."""
        self._versions = None
        now = torch._C._current_graph_task_id()
        if now == -1:
            self.hook.after_step()
            return
        self._stepped += parameters
        if now != self._backward:  # one that an error has ended never called back
            self._backward = now
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)

    def _end_of_backward(self) -> None:
        stepped, self._stepped, self._backward = self._stepped, [], -1
        if stepped and self.attached:
            self.hook.after_step(stepped)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


class _Installed:
    """One optimizer as the user has it, with those inside it.

    Those at the bottom change the weights, and are heard by torch's own hooks. What lies around one may write after it (Lookahead
    writes slow weights back, ZeRO gathers) or drive it by methods of its own (SAM), and torch's hooks need not work there: `step`
    is wrapped on the instance. A copy or pickle of an optimizer has neither.
    """

    def __init__(self, handle: Handle, optimizer: Any) -> None:
        self.handle = handle
        self.levels = list(dict.fromkeys(optimizers.levels(optimizer)))
        self.bottom = [level for level in self.levels if not optimizers.inside(level)]
        self.averaging = [level for level in self.levels if optimizers.averages(level)]
        self.evaluating: Any = None  # of one that does not say
        self.running: list[Any] = []
        self.waiting = False
        self._undo: list[Callable[[], None]] = []
        for level in self.bottom:
            self._listen(level)
        for level in self.levels:
            if level not in self.bottom and not optimizers.only_delegates(level):
                self._wrap(level, "step", self._around_step)
        for level in self.averaging:
            self._wrap(level, "eval", partial(self._around_switch, evaluating=level))
            if hasattr(level, "train"):
                self._wrap(level, "train", self._around_switch)

    @property
    def parameters(self) -> list[Tensor]:
        """What these optimizers step."""
        return optimizers.parameters_of(self.levels)

    def averaged_groups(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        return ((level, group) for level in self.averaging for group in level.param_groups)

    def trains(self, level: Any, group: dict[str, Any]) -> bool:
        """Whether the parameters of a group stand where they are trained, not at their average."""
        return bool(group.get("train_mode", getattr(level, "train_mode", level is not self.evaluating)))

    def averages(self) -> Iterator[Average]:
        for level, group in self.averaged_groups():
            if self.trains(level, group):
                yield from (found for p in group["params"] if (found := average_of(p, level, group)) is not None)

    def copies(self, parameter: Tensor) -> Iterator[Tensor]:
        for level in self.levels:
            yield from optimizers.copies(level, parameter)

    def remove(self) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _listen(self, level: Any) -> None:
        """Hear an optimizer with nothing inside."""
        if not optimizers.has_hooks(level):
            self._wrap(level, "step", self._around_bottom)
            return

        # a compiled optimizer step must not trace into what the hook does; a compiled model in a closure stays compiled
        @torch.compiler.disable
        def ready() -> None:
            self.handle.hook.before_step(optimizers.parameters_of([level]))

        def closed(closure: Callable[[], Any]) -> Any:
            result = closure()
            ready()
            return result

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if closure is None:
                ready()
                return None
            # it makes the gradients within the step, those of LBFGS several times
            closure = partial(closed, closure)
            return ((args[0], closure, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"closure": closure})

        @torch.compiler.disable
        def after(*_: Any) -> None:
            self._after(level)

        handles: list[RemovableHandle] = [level.register_step_pre_hook(before), level.register_step_post_hook(after)]
        self._undo += [handle.remove for handle in handles]

    def _after(self, level: Any) -> None:
        """An optimizer at the bottom has called back from its step."""
        if self._overflown():
            return
        if any(outer in self.averaging for outer in self.running):
            self.waiting = True  # the weights of its step stand in their places for a while
        else:
            self._act(level)

    def _overflown(self) -> bool:
        """Whether a gradient scaler has told an optimizer to leave the weights: fused ones are stepped all the same."""
        found = (getattr(level, "found_inf", None) for level in self.levels)
        return any(isinstance(inf, Tensor) and bool(inf) for inf in found)

    def _act(self, level: Any) -> None:
        self.handle.stepped(optimizers.parameters_of([level]))

    @torch.compiler.disable
    def _around_bottom(self, level: Any, call: Callable[[], Any]) -> Any:
        self.handle.hook.before_step(optimizers.parameters_of([level]))
        result = call()
        self._after(level)
        return result

    def _around_step(self, level: Any, call: Callable[[], Any]) -> Any:
        self.running.append(level)
        try:
            result = call()
        finally:
            self.running.pop()
        self._left(level)
        return result

    @torch.compiler.disable
    def _left(self, level: Any) -> None:
        """A wrapper has stepped what is inside it."""
        if self.waiting and not any(outer in self.averaging for outer in self.running):
            self.waiting = False
            self._act(level)
        elif not self.running and torch._C._current_graph_task_id() == -1:
            self.handle.hook.rewritten()

    def _around_switch(self, level: Any, call: Callable[[], Any], evaluating: Any = None) -> Any:
        result = call()
        self.evaluating = evaluating
        if not self.running:
            self.handle.hook.rewritten()
        return result

    def _wrap(self, owner: Any, name: str, around: Callable[[Any, Callable[[], Any]], Any]) -> None:
        """Put a method of our own in the place of one of this instance: bound, for schedulers wrap it again."""
        before = vars(owner).get(name)
        plain = getattr(type(owner), name) if before is None else before
        installed = True

        @wraps(plain)
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            call = partial(plain, self, *args, **kwargs) if before is None else partial(before, *args, **kwargs)
            return around(owner, call) if installed and self is owner else call()

        bound = MethodType(method, owner)
        setattr(owner, name, bound)

        def undo() -> None:
            nonlocal installed
            installed = False  # for whoever holds it
            if vars(owner).get(name) is bound:
                setattr(owner, name, before) if before is not None else delattr(owner, name)

        self._undo.append(undo)


def attach(hook: Hook, model: nn.Module, optimizer: Any, handle: Handle | None = None) -> Handle:
    """Start the hook on a model and have the optimizers call it.

    The hook acts after every optimizer's own step, and again after the step of what is wrapped around it, which may write slow
    weights back (Lookahead). Steps that a fused optimizer skips because a gradient scaler found an overflow do not count.
    Optimizers that step in the backward pass are one update: the hook acts at the end of the pass, on what was stepped.

    Args:
        hook: any object with the events of `Hook`.
        model: the model whose weights the optimizers step.
        optimizer: a torch optimizer, or several; also what is wrapped around one. Give the outermost that the loop uses.
        handle: a new one, for a hook that needs it at its start, or that of an earlier call for the same model, to add optimizers
            to; then the hook is not started again.

    Raises:
        TypeError: `model` is no module or `optimizer` no optimizer.
        ValueError: the optimizer steps none of the model's parameters, or copies of them.
        NotImplementedError: DeepSpeed and the old FSDP, which train on flattened copies; an optimizer that evaluates an average
            of the weights which cannot be told from what it keeps.
    """
    given = list(optimizer) if isinstance(optimizer, Iterable) and not optimizers.steps(optimizer) else [optimizer]
    _check(model, given, [] if handle is None else handle.parameters)
    starts = handle is None or not handle.attached
    handle = handle or Handle(hook, model)
    for each in given:
        handle.install(each)
    if starts:
        try:
            hook.start(model)
        except BaseException:
            handle.remove()
            raise
        handle.started()
    return handle


def _check(model: nn.Module, given: list[Any], elsewhere: list[Tensor]) -> None:
    """Refuse what is no model or no optimizer, and what trains on copies of the weights; other optimizers step `elsewhere`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module; got {type(model).__name__}.")
    for each in given:
        if not optimizers.steps(each) and not optimizers.inside(each):
            raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, or a list of them; got {type(each).__name__}.")
        for level in optimizers.levels(each):
            optimizers.check_averages(level)
    if found := _OWN_COPIES & {cls.__name__ for part in (*given, *model.modules()) for cls in type(part).__mro__}:
        raise NotImplementedError(
            f"{found.pop()} trains on flattened copies of the weights, so what is written into a layer is lost: "
            "use DistributedDataParallel or fully_shard (FSDP2)."
        )
    optimizers.check_parameters(model, given, elsewhere)
