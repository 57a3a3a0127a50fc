"""Which layers of a model a hook acts on, and why not on the others."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .operators import DenseOperator, as_operator
from .operators.layers import is_adapter, lora_factors
from .targets import LoraTarget, Target
from .weights import leaves

#: A glob on qualified names, a type of layer, or a predicate of `(name, layer)` or of the layer alone.
Pattern = str | type[nn.Module] | Callable[..., bool]
Patterns = Pattern | Iterable[Pattern] | None

#: Parts of a fused projection's outputs: so many equal ones, or their sizes.
Parts = int | Sequence[int]
Split = Mapping[Pattern, Parts] | None

_LORA = ("merged", "product")


@dataclass
class Selection:
    """The weights to act on, in the model's order, and the reason for each layer that is not among them."""

    targets: list[Target | LoraTarget] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def select(
    model: nn.Module, layers: Patterns = None, exclude: Patterns = None, *, split: Split = None, lora: str = "merged"
) -> Selection:
    """Choose layers by glob on qualified names, by type, or by predicate.

    A glob matches a layer's name or that of any module around it: `"encoder"` is everything inside, `"*.conv1"` every such
    layer. Each weight is chosen once, however many layers share it. Names are those of the plain model: what compiling or
    data-parallel wrappers prefix is taken off. A linear layer with LoRA adapters is one layer; its factors are never apart.

    Args:
        model: any module.
        layers: what to choose; None for every supported layer.
        exclude: what to leave out, even if chosen by `layers`.
        split: linear layers whose outputs are several maps side by side (fused query, key and value; heads), and their parts: a
            number of equal ones, or their sizes. Each part becomes a target of its own; all other layers are whole.
        lora: "merged" for the weight together with its LoRA adapters, "product" for the adapters' `scaling · B A` alone.

    Raises:
        ValueError: a glob that matches nothing, an unsupported layer named in full, parts that do not fit, or nothing left to act
            on.
        TypeError: a pattern of another type.
    """
    modules = dict(named_layers(model))
    wanted = _matcher("layers", layers, modules) if layers is not None else lambda name: True
    unwanted = _matcher("exclude", exclude, modules) if exclude is not None else lambda name: False
    explicit = {p for p in listed(layers) if isinstance(p, str)}
    if not isinstance(split, (Mapping, type(None))):
        raise TypeError(f"`split` must map patterns to parts, like {{'*.c_attn': 3}}; got {split!r}.")
    parts = {name: p for pattern, p in (split or {}).items() for name in filter(_matcher("split", pattern, modules), modules)}
    if lora not in _LORA:
        raise ValueError(f"`lora` must be one of {', '.join(map(repr, _LORA))}; got {lora!r}.")

    result = Selection()
    owners: dict[tuple[int, ...], list[Target]] = {}
    for name, layer in modules.items():
        if not (any(True for _ in layer.parameters(recurse=False)) or _weight_is_made(layer) or is_adapter(layer)):
            continue
        if unwanted(name):
            result.skipped[name] = "excluded"
        elif not wanted(name):
            result.skipped[name] = "not among `layers`"
        elif reason := _unsupported(layer):
            if name in explicit:
                raise ValueError(f"`layers` names {name}, but {reason}")
            result.skipped[name] = reason
        elif is_adapter(layer) and lora_factors(layer):
            for part, outputs in _parts(name, layer, parts.get(name)):
                base = None if lora == "product" else Target(part, [layer.base_layer], outputs)
                result.targets.append(LoraTarget(part, [layer], outputs, base))
        elif is_adapter(layer) and lora == "product":
            result.skipped[name] = "no LoRA adapter is active"
        else:
            layer = layer.base_layer if is_adapter(layer) else layer
            key = tuple(id(leaf) for leaf in leaves(layer))
            if key in owners:
                for owner in owners[key]:
                    owner.layers.append(layer)
                result.skipped[name] = f"shares the weight of {owners[key][0].name}"
            else:
                owners[key] = [Target(part, [layer], outputs) for part, outputs in _parts(name, layer, parts.get(name))]
                result.targets += owners[key]
    if not result.targets:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(result.skipped.items())[:5])
        raise ValueError(f"no layer to act on is left in {type(model).__name__} ({reasons or 'it has no weights'}).")
    return result


def _parts(name: str, layer: nn.Module, parts: Parts | None) -> list[tuple[str, slice | None]]:
    """A name and the outputs of each part of a layer."""
    if parts is None:
        return [(name, None)]
    op = as_operator(layer)
    if not isinstance(op, DenseOperator):
        raise ValueError(f"`split` is for linear layers; {name} is a {type(layer).__name__}.")
    (out,) = op.out_shape
    sizes = [out // parts] * parts if isinstance(parts, int) and parts > 0 else list(parts) if isinstance(parts, Sequence) else []
    if sum(sizes) != out or min(sizes) < 1:
        raise ValueError(f"`split` of {name} must be a divisor of its {out} outputs, or sizes that sum to them; got {parts!r}.")
    return [(f"{name}[{start}:{stop}]", slice(start, stop)) for start, stop in pairwise(accumulate(sizes, initial=0))]


def _unsupported(layer: nn.Module) -> str | None:
    """Why a layer has no operator whose norm can be bounded without an input size."""
    try:
        as_operator(layer).lattice_factor  # noqa: B018 (asked for its error)
    except (TypeError, NotImplementedError, ValueError) as error:
        return str(error)
    return None


def named_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All modules under the names of the plain model; not those inside a parametrization or an adapter."""
    while isinstance(model, (DistributedDataParallel, DataParallel)):
        model = model.module
    adapted = ""
    for name, module in model.named_modules():
        parts = [part for part in name.split(".") if part != "_orig_mod"]
        # a layer that adapters were laid around is one with them
        if "parametrizations" in parts or (adapted and name.startswith(adapted)):
            continue
        if is_adapter(module):
            adapted = f"{name}."
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
