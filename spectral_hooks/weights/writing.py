"""Read and write a layer's weight: the only place that changes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from ..operators import as_operator
from .places import ids, is_view, layout, parameters_in, place_of
from .sharded import copy_into_, full

#: How far, relative to the largest entry, a parametrized weight may come back from what was assigned, at least.
_ROUND_TRIP = 1e-5


@dataclass(frozen=True)
class Held:
    """How a layer holds the weight of its operator."""

    #: The operator's weight as it is now.
    weight: Tensor
    #: The parameters that it is made of.
    leaves: tuple[Tensor, ...]
    #: Where it lies in memory, or which parameters make it: equal places hold one weight.
    place: tuple[Any, ...]
    #: Makes the layer hold another; None where there is no way.
    give_: Callable[[Tensor], None] | None
    #: Whether it is a parameter, and written entry by entry.
    plain: bool = False
    #: Whether it is a parameter or a view of one, that `overlap` can judge.
    is_view: bool = False


@torch.enable_grad()  # only then does a computed weight know its parameters
def held(layer: nn.Module) -> Held:
    """How a layer holds the weight of its operator: as a parameter, a view of one, by an inverse map, or with no way to set it.

    Raises:
        TypeError, NotImplementedError, ValueError: as `as_operator`.
    """
    # within, a parametrized attribute is the same tensor whenever it is asked for
    with parametrize.cached():
        op = as_operator(layer)
        weight = op.weight
        if op.assign is not None:
            made_of = parameters_in(weight) or tuple(layer.parameters())
            # another layer may compute another weight from the same parameters
            return Held(weight, made_of, (id(layer),), op.assign)
        # the attribute `weight` is that of the last forward
        if (mask := pruning_mask(layer)) is not None and weight.shape == mask.shape and weight is not layer.weight:
            original = cast(Tensor, layer.weight_orig)
            return Held(weight, (original,), ids((original,)), partial(_write_open_, layer, mask), plain=True)
        for module in layer.modules():
            for parameter in module.parameters(recurse=False):
                if weight is parameter:
                    return Held(
                        weight, (parameter,), place_of(parameter), partial(copy_into_, parameter), plain=True, is_view=True
                    )
                if is_view(weight, parameter):
                    return Held(weight, (parameter,), place_of(weight), partial(copy_into_, weight.detach()), is_view=True)
            for name, made in getattr(module, "parametrizations", {}).items():
                whole = getattr(module, name)
                if weight is whole or is_view(weight, whole):
                    made_of = tuple(made.parameters())
                    place = (*ids(made_of), name, *layout(weight))
                    return Held(weight, made_of, place, partial(_assign, module, name, whole.detach(), weight.detach()))
    made_of = parameters_in(weight) or tuple(layer.parameters())
    return Held(weight, made_of, (id(layer),), None)


def leaves(layer: nn.Module) -> tuple[Tensor, ...]:
    """The parameters that the weight of a layer's operator is made of."""
    return held(layer).leaves


def check_writable(layer: nn.Module) -> None:
    """Refuse a layer whose weight can be measured and not set.

    Raises:
        ValueError: its operator's weight is neither a parameter nor a view of one, and has no inverse map.
    """
    if held(layer).give_ is None:
        raise ValueError(
            f"{type(layer).__name__} computes the weight of its operator, which is neither a parameter nor a view of one, so it "
            "cannot be set. Give the operator that is registered for it the inverse map (`assign=`, see as_operator), or exclude "
            "the layer."
        )


@torch.no_grad()
def write_(layer: nn.Module, weight: Tensor) -> None:
    """Make this the weight of the layer's operator, in place: the parameter objects, their dtype and their device stay.

    - a plain parameter, or a view of one, is copied into; a sharded one (DTensor) gets its own shards;
    - a parametrized one is assigned through `right_inverse`, one that the layer computes through its operator's `assign`;
    - a pruned one is written where its mask is open.

    What is not written as it is is read back.

    Raises:
        ValueError: there is no inverse map, or another weight comes back; the old one is put back.
    """
    now = held(layer)
    if now.give_ is None:
        check_writable(layer)
    elif now.plain:
        now.give_(weight)
    else:
        restore_ = remember(layer)
        try:
            now.give_(weight)
            _check_taken(layer, weight)
        except BaseException:
            restore_()
            raise


def _check_taken(layer: Any, weight: Tensor) -> None:
    """Complain unless the layer's operator has this weight now, but for rounding."""
    back = full(as_operator(layer).weight)
    weight = weight.to(back)
    off, largest = float((back - weight).abs().max()), float(weight.abs().max())
    # written so that NaN counts as failure
    if not off <= max(_ROUND_TRIP, 4 * torch.finfo(back.dtype).eps) * largest:
        what = "the layer"
        if parametrize.is_parametrized(layer):
            what = "the parametrization " + ", ".join(type(p).__name__ for made in layer.parametrizations.values() for p in made)
        raise ValueError(
            f"{what} did not take the projected weight (off by {off:.2g}); exclude the layer, or remove its parametrization."
        )


def _write_open_(layer: Any, mask: Tensor, weight: Tensor) -> None:
    """Write where a pruning mask is open."""
    original = layer.weight_orig
    original.copy_(torch.where(mask != 0, weight.to(original), original))
    layer.weight = original * mask


def _assign(module: Any, name: str, whole: Tensor, view: Tensor, weight: Tensor) -> None:
    """Set a parametrized attribute, of which the operator's weight is the whole or a view."""
    kinds = module.parametrizations[name]
    one_way = (
        f"the parametrization {', '.join(type(p).__name__ for p in kinds)} has no right_inverse, so its weight cannot be set; "
        "exclude the layer, or remove its parametrization."
    )
    if not all(hasattr(p, "right_inverse") for p in kinds):
        raise ValueError(one_way)
    if view is not whole:
        value = whole.clone()
        start = view.storage_offset() - whole.storage_offset() + value.storage_offset()
        value.as_strided(view.shape, view.stride(), start).copy_(weight)
        weight = value
    try:
        setattr(module, name, weight)
    except NotImplementedError:
        raise ValueError(one_way) from None


def remember(layer: nn.Module) -> Callable[[], None]:
    """What puts a layer's parameters and buffers back bit for bit; `right_inverse` may change buffers (torch's orthogonal)."""
    registered = [(each, dict(each._parameters), dict(each._buffers)) for each in layer.modules()]
    before = [(tensor, tensor.detach().clone()) for tensor in (*layer.parameters(), *layer.buffers())]

    @torch.no_grad()
    def restore_() -> None:
        for module, parameters, buffers in registered:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        for tensor, value in before:
            tensor.copy_(value)

    return restore_


def pruning_mask(layer: nn.Module) -> Tensor | None:
    """The mask that torch's pruning lays over the layer's weight before every forward, if any."""
    pruned = any(isinstance(h, prune.BasePruningMethod) and h._tensor_name == "weight" for h in layer._forward_pre_hooks.values())
    return cast(Tensor, layer.weight_mask) if pruned else None
