"""Which layers of a model a hook acts on, and why not on the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..operators import DenseOperator, as_operator
from ..operators.base import is_whole
from ..operators.layers import is_adapter, lora_factors
from .names import a_kind, called, holds_packed, is_trainable, kind_of, named_layers, naming, type_name
from .patterns import Pattern, Patterns, check_patterns, listed, matcher, what_matches
from .sharded import is_sharded
from .sharing import Owners
from .targets import AnyTarget, LoraTarget, Target
from .writing import check_writable, held

#: Parts of a fused projection's outputs: so many equal ones, or their sizes.
Parts = int | Sequence[int]
Split = Mapping[Pattern, Parts] | None
_LORA = ("merged", "product")


@dataclass
class Selection:
    """The weights to act on, in the model's order, and the reason for each layer that is not among them."""

    targets: list[AnyTarget] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    #: Of the skipped, for want of support: their parameters of two or more dimensions, embeddings not counted.
    free: dict[str, list[Tensor]] = field(default_factory=dict)
    #: Of the skipped, those whose weight is that of a target all the same, and of what kind they are.
    tied: dict[str, str] = field(default_factory=dict)

    @property
    def is_sharded(self) -> bool:
        """Whether processes hold but parts of a weight, so that to look at it all must take part."""
        return any(is_sharded(leaf) for target in self.targets for leaf in target.leaves())


def select(
    model: nn.Module, layers: Patterns = None, exclude: Patterns = None, *, split: Split = None, lora: str = "merged"
) -> Selection:
    """Choose layers by glob on qualified names, by type, or by predicate.

    A glob matches a layer's name or that of any module around it: `"encoder"` is everything inside, `"*.conv1"` every such
    layer. Each weight is chosen once, however many layers share it. Names are those of the plain model: what wrappers prefix
    (compiling, data-parallel, Fabric's, Opacus') is taken off. A linear layer with LoRA adapters is one layer; its factors are
    never apart.

    Every parameter of two or more dimensions is in a target, or `skipped` has the reason under its layer's name, or under its own
    if its layer is chosen and makes another use of it.

    Args:
        model: any module.
        layers: what to choose; None for every supported layer.
        exclude: what to leave out, even if chosen by `layers`.
        split: linear layers whose outputs are several maps side by side (fused query, key and value; heads), and their parts: a
            number of equal ones, or their sizes. Each part becomes a target of its own; all other layers are whole.
        lora: "merged" for the weight together with its LoRA adapters, "product" for the adapters' `scaling · B A` alone.

    Raises:
        ValueError: a glob that matches nothing; an unsupported layer, or one without weights, named in full; a layer whose weight
            is computed with no way to set it; layers that use the same parameters in different ways; parts that do not fit; or
            nothing left to act on.
        TypeError: a pattern of another type.
    """
    check_split(split)
    check_lora(lora)
    modules = dict(named_layers(model))
    wanted = matcher("layers", layers, modules) if layers is not None else lambda name: True
    unwanted = matcher("exclude", exclude, modules) if exclude is not None else lambda name: False
    parts = {name: p for pattern, p in (split or {}).items() for name in filter(matcher("split", pattern, modules), modules)}
    explicit = _named_in_full(layers, modules)

    result, owners, unsupported = Selection(), Owners(), set()
    for name, layer in modules.items():
        if not _has_weight(layer):
            continue
        if unwanted(name):
            reason: str | None = "excluded"
        elif not wanted(name):
            reason = "not among `layers`"
        elif reason := _unsupported(layer):
            if name in explicit:
                raise ValueError(f"`layers` names {name or 'the model itself'}, but {reason}")
            unsupported.add(name)
        else:
            reason = _choose(result, owners, name, layer, parts.get(name), lora)
        if reason is not None:
            result.skipped[name] = reason
    if not result.targets:
        raise ValueError(_nothing_left(model, result, layers, exclude, modules))
    _account(result, modules, unsupported)
    return result


def _named_in_full(layers: Patterns, modules: dict[str, nn.Module]) -> set[str]:
    """The layers that the user has named one by one, for which an error is better than to skip them."""
    explicit = {p for p in listed(layers) if isinstance(p, str)} & set(modules)
    for name in explicit:
        if not any(_has_weight(part) for part in modules[name].modules()):
            raise ValueError(f"`layers` names {name}, {a_kind(modules[name])}, which has no weight.")
    return explicit


def _choose(result: Selection, owners: Owners, name: str, layer: Any, parts: Parts | None, lora: str) -> str | None:
    """Add the targets of a layer that is wanted and supported, or say why there are none."""
    if is_adapter(layer) and lora_factors(layer):
        for part, outputs in _parts(name, layer, parts):
            base = None if lora == "product" else Target(part, [layer.base_layer], outputs)
            result.targets.append(LoraTarget(part, [layer], outputs, base))
        return None
    if is_adapter(layer) and lora == "product":
        return "no LoRA adapter is active"
    layer = layer.base_layer if is_adapter(layer) else layer
    how = held(layer)
    if how.weight.numel() == 0:
        return f"its weight is empty, of shape {tuple(how.weight.shape)}"
    with naming(name):
        check_writable(layer)
    if (owner := owners.of(layer, how)) is not None:
        owner.share(name, layer, how)
        result.tied[name] = kind_of(layer)
        return f"shares the weight of {owner.targets[0].name or 'the model itself'}"
    targets = [Target(part, [layer], outputs) for part, outputs in _parts(name, layer, parts)]
    owners.add(name, layer, how, targets)
    result.targets += targets
    return None


def _nothing_left(model: nn.Module, result: Selection, layers: Patterns, exclude: Patterns, modules: dict[str, nn.Module]) -> str:
    """The error for a selection of nothing."""
    reasons = [f"{name or 'the model itself'}: {reason}" for name, reason in list(result.skipped.items())[:5]]
    matched = [what_matches("layers", layers, modules), what_matches("exclude", exclude, modules)] if reasons or layers else []
    found = "; ".join([each for each in matched if each] + reasons) or "it has no weights"
    return f"no layer to act on is left in {type(model).__name__} ({found})."


def check_split(split: Split) -> None:
    """Refuse what does not map patterns to numbers of parts, or to their sizes."""
    if not isinstance(split, (Mapping, type(None))):
        raise TypeError(f"`split` must map patterns to parts, like {{'*.c_attn': 3}}; got {split!r}.")
    for pattern, parts in (split or {}).items():
        check_patterns("split", pattern)
        sizes = [parts] if is_whole(parts) else list(parts) if isinstance(parts, Sequence) else []
        if not sizes or not all(is_whole(size) and size > 0 for size in sizes):
            raise ValueError(
                f"`split` of {pattern!r} must be a divisor of the outputs, or sizes that sum to them, from 1 on; got {parts!r}."
            )


def check_lora(lora: str) -> None:
    """Refuse what is no way to count LoRA adapters."""
    if lora not in _LORA:
        raise ValueError(f"`lora` must be one of {', '.join(map(repr, _LORA))}; got {lora!r}.")


def _account(result: Selection, modules: dict[str, nn.Module], unsupported: set[str]) -> None:
    """Give the reason of every parameter of two or more dimensions that no target has; some are free for want of support."""
    bounded = {id(leaf): target.name for target in result.targets for leaf in target.leaves()}
    for name, layer in modules.items():
        own = [(key, p) for key, p in _own_parameters(layer) if p.ndim > 1]
        left = [(key, p) for key, p in own if id(p) not in bounded]
        if name in unsupported and own and not left:
            result.tied[name] = kind_of(layer)
            result.skipped[name] = f"the weight of this {result.tied[name]} is bounded as that of {bounded[id(own[0][1])]}"
        elif name in unsupported and not isinstance(layer, (nn.Embedding, nn.EmbeddingBag)):
            result.free[name] = [p for _, p in left]
        elif name not in result.skipped:
            for key, p in left:
                qualified = f"{name}.{key}" if name else key
                isometric = key in getattr(layer, "isometries", ())
                why = "makes an isometry" if isometric else f"not a part of the weight that {called(name)} is bounded by"
                result.skipped[qualified] = why
                if not (isometric or is_adapter(layer)):  # of an adapter, what is not active
                    result.free[qualified] = [p]


def _parts(name: str, layer: nn.Module, parts: Parts | None) -> list[tuple[str, slice | None]]:
    """A name and the outputs of each part of a layer."""
    if parts is None:
        return [(name, None)]
    op = as_operator(layer)
    if not isinstance(op, DenseOperator):
        raise ValueError(f"`split` is for linear layers; {name} is a {type(layer).__name__}.")
    (out,) = op.out_shape
    sizes = list(parts) if isinstance(parts, Sequence) else [out // parts] * parts
    if sum(sizes) != out or min(sizes) < 1:
        raise ValueError(f"`split` of {name} must be a divisor of its {out} outputs, or sizes that sum to them; got {parts!r}.")
    return [(f"{name}[{start}:{stop}]", slice(start, stop)) for start, stop in pairwise(accumulate(sizes, initial=0))]


def _unsupported(layer: nn.Module) -> str | None:
    """Why a layer has no operator whose norm can be bounded without an input size."""
    if not is_trainable(layer):
        return (
            f"the weight of this {type_name(layer)} is no parameter (quantized or packed), so it does not train and cannot be set"
        )
    try:
        as_operator(layer).lattice_factor  # noqa: B018 (asked for its error)
    except (TypeError, NotImplementedError, ValueError) as error:
        return str(error)
    return None


def _own_parameters(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A layer's parameters, those behind its parametrizations, and all that an adapter holds."""
    yield from layer.named_parameters(recurse=is_adapter(layer))
    if is_parametrized(layer) and not is_adapter(layer):
        yield from ((f"parametrizations.{name}", p) for name, p in layer.parametrizations.named_parameters())  # type: ignore[union-attr]


def _has_weight(layer: nn.Module) -> bool:
    return is_trainable(layer) or holds_packed(layer)
