"""Read and write a layer's weight: the only place that changes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import is_available as _has_distributed
from torch.nn.utils import parametrize, prune

from .operators import as_operator
from .spectrum import check_finite

if _has_distributed():
    from torch.distributed.tensor import DTensor, distribute_tensor

    #: Every rank holds the whole result, so nothing needs to be sent; torch 2.5 cannot be told so, and sends what is there.
    _UNSENT: dict[str, Any] = {"src_data_rank": None} if "src_data_rank" in signature(distribute_tensor).parameters else {}


def _is_sharded(weight: Tensor) -> bool:
    return _has_distributed() and isinstance(weight, DTensor)


#: How far, relative to the largest entry, a parametrized weight may come back from what was assigned, at least.
_ROUND_TRIP = 1e-5
_EPS = torch.finfo(torch.float64).eps
#: Integers of as many bytes.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def full(weight: Tensor) -> Tensor:
    """The whole weight where it is sharded over processes, else the weight itself; no gradient.

    Collective: all ranks must ask for the same weights in the same order.
    """
    weight = weight.detach()
    return cast(Any, weight).full_tensor() if _is_sharded(weight) else weight


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
            made_of = _made_of(weight) or tuple(layer.parameters())
            # another layer may compute another weight from the same parameters
            return Held(weight, made_of, (id(layer),), op.assign)
        # the attribute `weight` is that of the last forward
        if (mask := pruning_mask(layer)) is not None and weight.shape == mask.shape and weight is not layer.weight:
            original = cast(Tensor, layer.weight_orig)
            return Held(weight, (original,), _ids((original,)), partial(_write_open_, layer, mask), plain=True)
        for module in layer.modules():
            for parameter in module.parameters(recurse=False):
                if weight is parameter:
                    return Held(weight, (parameter,), _place(parameter), partial(_copy, parameter), plain=True, is_view=True)
                if _is_view(weight, parameter):
                    return Held(weight, (parameter,), _place(weight), partial(_copy, weight.detach()), is_view=True)
            for name, made in getattr(module, "parametrizations", {}).items():
                whole = getattr(module, name)
                if weight is whole or _is_view(weight, whole):
                    made_of = tuple(made.parameters())
                    place = (*_ids(made_of), name, *_layout(weight))
                    return Held(weight, made_of, place, partial(_assign, module, name, whole.detach(), weight.detach()))
    made_of = _made_of(weight) or tuple(layer.parameters())
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


def _copy(parameter: Any, weight: Tensor) -> None:
    if _is_sharded(parameter):
        weight = distribute_tensor(weight.to(parameter.dtype), parameter.device_mesh, parameter.placements, **_UNSENT)
    parameter.copy_(weight)


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


# -- where a weight lies ----------------------------------------------------------------------------------------------------


def _made_of(weight: Tensor) -> tuple[Tensor, ...]:
    """The parameters in the graph of a computed weight, in the order in which they are met."""
    found: dict[int, Tensor] = {}
    waiting, seen = [weight.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found[id(node.variable)] = node.variable
        waiting += [before for before, _ in node.next_functions]
    return tuple(found.values())


def _ids(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(map(id, tensors))


def _memory(tensor: Tensor) -> int | None:
    """Which memory a tensor lies in; None for what is no plain stretch of it (sharded, sparse)."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return tensor.untyped_storage()._cdata if plain else None


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """Where in its memory a tensor lies; a matrix and its transpose are at one place."""
    axes = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    return (tensor.storage_offset(), *(axis for axis in axes if axis[1] != 1))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    memory = _memory(tensor)
    return (id(tensor),) if memory is None else (memory, *_layout(tensor))


def _is_view(weight: Tensor, whole: Tensor) -> bool:
    """Whether writing into `weight` writes into `whole`: same memory, and every entry apart from the others."""
    memory = _memory(weight)
    apart = all(stride > 0 or size <= 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)) if memory else False
    return memory is not None and apart and memory == _memory(whole) and weight.dtype == whole.dtype


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have entries at the same place of the same memory."""
    if memory_of(a) != memory_of(b):
        return False
    if _memory(a) is None:
        return True
    (start, end), (other_start, other_end) = _bytes(a), _bytes(b)
    if end <= other_start or other_end <= start:
        return False
    if a.dtype != b.dtype:
        return True
    marks = torch.zeros(a.untyped_storage().nbytes() // a.element_size(), dtype=torch.bool)
    marks.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(marks.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def memory_of(tensor: Tensor) -> tuple[str, int]:
    """Which memory a tensor lies in: what does not lie in the same does not overlap."""
    memory = _memory(tensor)
    return ("tensor", id(tensor)) if memory is None else ("memory", memory)


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """From where to where a tensor reaches in its memory."""
    start, size = int(tensor.storage_offset()), tensor.element_size()
    reach = sum(int(stride) * (int(n) - 1) for stride, n in zip(tensor.stride(), tensor.shape, strict=True))
    return int(start * size), int((start + reach + 1) * size if tensor.numel() else start * size)


def pruning_mask(layer: nn.Module) -> Tensor | None:
    """The mask that torch's pruning lays over the layer's weight before every forward, if any."""
    pruned = any(isinstance(h, prune.BasePruningMethod) and h._tensor_name == "weight" for h in layer._forward_pre_hooks.values())
    return cast(Tensor, layer.weight_mask) if pruned else None


# -- gains ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def clipped_gain(layer: Any, max_norm: float) -> Tensor | None:
    """The `γ` nearest to a batch normalization's whose gains `|γ| / √(running_var + ε)` are at most `max_norm`; None if it is it.

    The operator in evaluation is diagonal, so clipping each gain is the nearest. The bound holds for the numbers as they are
    stored: in half precision both the limit and what is rounded to it may be off by more than a clip may be.

    Raises:
        ValueError: `γ` is not finite, or the variance no number from 0 on.
    """
    # Apple's GPUs have no float64
    gamma, variance = (full(x).to("cpu" if x.device.type == "mps" else x.device) for x in (layer.weight, layer.running_var))
    check_finite(gamma)
    # half a unit of rounding in each operation
    limit = max_norm * (1 - 4 * _EPS) * (variance.double() + layer.eps).sqrt()
    if limit.isnan().any():
        raise ValueError("`running_var` has entries that are negative or NaN: look at the batches before.")
    outside = gamma.double().abs() > limit
    if not outside.any():
        return None
    return torch.where(outside, _towards_zero(torch.copysign(limit, gamma.double()), gamma.dtype), gamma).to(layer.weight.device)


def write_gain_(layer: Any, gamma: Tensor) -> None:
    """Give a normalization this `γ`, in place."""
    with torch.no_grad():
        _copy(layer.weight, gamma)


def _towards_zero(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype`, never away from zero."""
    rounded = x.to(dtype)
    bits = rounded.view(_BITS[rounded.element_size()])
    # of all formats: the next number towards zero has the next smaller bits, sign apart
    return torch.where(rounded.double().abs() > x.abs(), (bits - 1).view(dtype), rounded)
