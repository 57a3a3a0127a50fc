"""Which layers of a model a hook acts on, and why not on the others."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .operators import as_operator
from .operators.base import LinearOperator
from .weights import leaves

#: A glob on qualified names, a type of layer, or a predicate of `(name, layer)` or of the layer alone.
Pattern = str | type[nn.Module] | Callable[..., bool]
Patterns = Pattern | Iterable[Pattern] | None


@dataclass
class Target:
    """One weight and the layers that use it: several when it is tied."""

    name: str
    layers: list[nn.Module]

    def operators(self) -> list[LinearOperator]:
        """An operator for each layer; tied layers may apply the same weight with different geometries."""
        return [as_operator(layer) for layer in self.layers]


@dataclass
class Selection:
    """The weights to act on, in the model's order, and the reason for each layer that is not among them."""

    targets: list[Target] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def select(model: nn.Module, layers: Patterns = None, exclude: Patterns = None) -> Selection:
    """Choose layers by glob on qualified names, by type, or by predicate.

    A glob matches a layer's name or that of any module around it: `"encoder"` is everything inside, `"*.conv1"` every such
    layer. Each weight is chosen once, however many layers share it. Names are those of the plain model: what compiling or
    data-parallel wrappers prefix is taken off.

    Args:
        model: any module.
        layers: what to choose; None for every supported layer.
        exclude: what to leave out, even if chosen by `layers`.

    Raises:
        ValueError: a glob that matches nothing, an unsupported layer named in full, or nothing left to act on.
        TypeError: a pattern of another type.
    """
    modules = dict(_walk(model))
    wanted = _matcher("layers", layers, modules) if layers is not None else lambda name: True
    unwanted = _matcher("exclude", exclude, modules) if exclude is not None else lambda name: False
    explicit = {p for p in listed(layers) if isinstance(p, str)}

    result = Selection()
    owners: dict[tuple[int, ...], Target] = {}
    for name, layer in modules.items():
        if not any(True for _ in layer.parameters(recurse=False)) and not _weight_is_made(layer):
            continue
        if unwanted(name):
            result.skipped[name] = "excluded"
        elif not wanted(name):
            result.skipped[name] = "not among `layers`"
        elif reason := _unsupported(layer):
            if name in explicit:
                raise ValueError(f"`layers` names {name}, but {reason}")
            result.skipped[name] = reason
        else:
            key = tuple(id(leaf) for leaf in leaves(layer))
            if key in owners:
                owners[key].layers.append(layer)
                result.skipped[name] = f"shares the weight of {owners[key].name}"
            else:
                owners[key] = Target(name, [layer])
                result.targets.append(owners[key])
    if not result.targets:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(result.skipped.items())[:5])
        raise ValueError(f"no layer to act on is left in {type(model).__name__} ({reasons or 'it has no weights'}).")
    return result


def _unsupported(layer: nn.Module) -> str | None:
    """Why a layer has no operator whose norm can be bounded without an input size."""
    try:
        as_operator(layer).lattice_factor  # noqa: B018 (asked for its error)
    except (TypeError, NotImplementedError, ValueError) as error:
        return str(error)
    return None


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules under the names of the plain model; not those inside a parametrization."""
    while isinstance(model, (DistributedDataParallel, DataParallel)):
        model = model.module
    for name, module in model.named_modules():
        parts = [part for part in name.split(".") if part != "_orig_mod"]
        if "parametrizations" not in parts:
            yield ".".join(parts), module


def _weight_is_made(layer: nn.Module) -> bool:
    return torch.nn.utils.parametrize.is_parametrized(layer, "weight")


def listed(patterns: Patterns) -> list[Pattern]:
    """The patterns as a list; a generator can be read only once."""
    if patterns is None:
        return []
    if isinstance(patterns, (str, type)) or callable(patterns):
        return [patterns]
    return list(patterns)


def _matcher(argument: str, patterns: Patterns, modules: dict[str, nn.Module]) -> Callable[[str], bool]:
    """The union of the patterns as a test of names."""
    chosen: set[str] = set()
    for pattern in listed(patterns):
        found = {name for name, module in modules.items() if _matches(argument, pattern, name, module)}
        if not found and isinstance(pattern, str):
            close = difflib.get_close_matches(pattern, modules, n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else f"the model has {', '.join(list(modules)[1:6])}, ..."
            raise ValueError(f"`{argument}` pattern {pattern!r} matches no layer; {hint}")
        chosen |= found
    return chosen.__contains__


def _matches(argument: str, pattern: Pattern, name: str, module: nn.Module) -> bool:
    if isinstance(pattern, str):
        parts = name.split(".")
        return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
    if isinstance(pattern, type):
        return isinstance(module, pattern)
    if callable(pattern):
        takes_name = len(inspect.signature(pattern).parameters) > 1
        return bool(pattern(name, module) if takes_name else pattern(module))
    raise TypeError(f"`{argument}` takes globs, layer types and predicates; got {pattern!r}.")
