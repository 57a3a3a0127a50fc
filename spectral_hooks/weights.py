"""Read and write a layer's weight: the only place that changes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed import is_available as _has_distributed
from torch.nn.utils import parametrize, prune

if _has_distributed():
    from torch.distributed.tensor import DTensor, distribute_tensor


def _is_sharded(weight: Tensor) -> bool:
    return _has_distributed() and isinstance(weight, DTensor)


#: How far, relative to the largest entry, a parametrized weight may come back from what was assigned.
_ROUND_TRIP = 1e-5


def full(weight: Tensor) -> Tensor:
    """The whole weight where it is sharded over processes, else the weight itself; no gradient.

    Collective: all ranks must ask for the same weights in the same order.
    """
    weight = weight.detach()
    return cast(Any, weight).full_tensor() if _is_sharded(weight) else weight


@torch.no_grad()
def write_(layer: nn.Module, weight: Tensor) -> None:
    """Give the layer this weight, in place: the parameter object, its dtype and its device stay.

    - a plain parameter is copied into; a sharded one (DTensor) gets its own shards;
    - a parametrized one is assigned through `right_inverse` and read back;
    - a pruned one is written where its mask is open.

    Raises:
        ValueError: the parametrization has no `right_inverse`, or gives another weight back; the old one is put back.
    """
    if parametrize.is_parametrized(layer, "weight"):
        _assign(layer, weight)
    elif (mask := pruning_mask(layer)) is not None:
        (original,) = leaves(layer)
        original.copy_(torch.where(mask != 0, weight.to(original), original))
        layer.weight = original * mask
    else:
        _copy(leaves(layer)[0], weight)


def _copy(parameter: Any, weight: Tensor) -> None:
    if _is_sharded(parameter):
        # every rank holds the whole result, so nothing needs to be sent
        mesh, placements = parameter.device_mesh, parameter.placements
        weight = distribute_tensor(weight.to(parameter.dtype), mesh, placements, src_data_rank=None)
    parameter.copy_(weight)


def _assign(layer: Any, weight: Tensor) -> None:
    held = layer.parametrizations.weight
    kinds = ", ".join(type(p).__name__ for p in held)
    remedy = "exclude the layer, or remove its parametrization."
    one_way = f"the parametrization {kinds} has no right_inverse, so its weight cannot be set; {remedy}"
    if not all(hasattr(p, "right_inverse") for p in held):
        raise ValueError(one_way)
    restore_ = remember(layer)
    try:
        layer.weight = weight
        error = float((layer.weight - weight).abs().max())
        # written so that NaN counts as failure
        if not error <= _ROUND_TRIP * float(weight.abs().max()):
            raise ValueError(f"the parametrization {kinds} did not take the projected weight (off by {error:.2g}); {remedy}")
    except NotImplementedError:
        restore_()
        raise ValueError(one_way) from None
    except BaseException:
        restore_()
        raise


def remember(layer: Any) -> Callable[[], None]:
    """What puts a parametrized weight back bit for bit; `right_inverse` may change buffers too (torch's orthogonal does)."""
    held = layer.parametrizations.weight

    def tensors() -> dict[str, Tensor]:
        return {**dict(held.named_parameters()), **dict(held.named_buffers())}

    before = {name: value.detach().clone() for name, value in tensors().items()}

    @torch.no_grad()
    def restore_() -> None:
        for name, value in tensors().items():
            value.copy_(before[name])

    return restore_


def pruning_mask(layer: nn.Module) -> Tensor | None:
    """The mask that torch's pruning lays over the layer's weight before every forward, if any."""
    pruned = any(isinstance(h, prune.BasePruningMethod) and h._tensor_name == "weight" for h in layer._forward_pre_hooks.values())
    return cast(Tensor, layer.weight_mask) if pruned else None


def leaves(layer: Any) -> tuple[Tensor, ...]:
    """The parameters that a layer's weight is made of: equal identities mean a tied weight."""
    if parametrize.is_parametrized(layer, "weight"):
        return tuple(layer.parametrizations.weight.parameters())
    return (layer.weight if pruning_mask(layer) is None else layer.weight_orig,)


@torch.no_grad()
def clip_gain_(layer: Any, max_norm: float) -> bool:
    """Bound the gains `|γ| / √(running_var + ε)` of a batch normalization in evaluation; whether any changed.

    Its operator is diagonal, so clipping each gain is the nearest.
    """
    limit = max_norm * (layer.running_var + layer.eps).sqrt()
    if layer.weight is None:
        return False
    gamma = full(layer.weight)
    clipped = torch.minimum(torch.maximum(gamma, -limit), limit)
    if torch.equal(clipped, gamma):
        return False
    _copy(layer.weight, clipped)
    return True
