"""How a parametrization of this package comes onto a layer, and off again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..operators import as_operator

Layer = TypeVar("Layer", bound=nn.Module)


def register(layer: Layer, parametrization: nn.Module, name: str = "weight") -> Layer:
    """Parametrize one tensor of a layer, in place, so that plain checkpoints still load.

    What another parametrization of this package has made of the tensor becomes the starting point.

    Raises:
        ValueError: the tensor is parametrized from elsewhere, is no parameter, or is sharded over processes.
    """
    _check_alone(type(layer).__name__, layer, name)
    check_whole(type(layer).__name__, layer)
    if _is_ours(layer, name):
        _bake(layer, name)
    if name not in layer._parameters:
        kind = type(layer).__name__
        raise ValueError(f"the `{name}` of {kind} is no parameter; if it is pruned, make that permanent with prune.remove first.")
    parametrize.register_parametrization(layer, name, parametrization)
    layer.register_load_state_dict_pre_hook(_load_plain)
    return layer


def remove_spectral(model: nn.Module) -> nn.Module:
    """Make a model plain again: what this package has parametrized becomes an ordinary weight of the same value.

    Layers keep their identity, their class from before and their parameter objects where there is one for the weight. A module
    of this package that stands in the place of a layer and offers `to_plain()` is replaced by what that returns. Everything
    else is left alone, so a second call changes nothing.

    Args:
        model: any module, changed in place.

    Returns:
        The model, or its replacement if it is itself such a module.

    Raises:
        ValueError: a weight also carries a parametrization from elsewhere, which could not be kept; or it is sharded over
            processes (FSDP2, tensor parallelism): load the full state dict into an unsharded copy, and make that plain.
        NotImplementedError: a module equals no plain layer, such as a `skew` convolution. In each case nothing has been changed.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> model = torch.nn.Sequential(sh.parametrizations.rescaled(torch.nn.Linear(4, 3)))
        >>> list(model.state_dict())
        ['0.bias', '0.parametrizations.weight.original']
        >>> sorted(sh.remove_spectral(model).state_dict())
        ['0.bias', '0.weight']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module; got {type(model).__name__}.")
    found = [(name, layer, tensor) for name, layer in model.named_modules() for tensor in spectral_tensors(layer)]
    remedy = "load the full state dict (torch.distributed.checkpoint.state_dict) into an unsharded copy, and make that plain."
    replacements = [(name, module) for name, module in model.named_modules() if _is_replacement(module)]
    for name, layer, tensor in found:
        _check_alone(name or type(layer).__name__, layer, tensor)
    for name, module in [*((name, layer) for name, layer, _ in found), *replacements]:
        check_whole(name or type(module).__name__, module, remedy)
    for _, module in replacements:
        cast(Any, module).to_plain()  # asked for its error before anything changes
    for _, layer, tensor in found:
        _bake(layer, tensor)
    return _plain(model, {})


def spectral_report(model: nn.Module) -> dict[str, str]:
    """For each layer with parameters the constraint that it holds by construction, or `none` and why.

    Computed from the model as it is, so it shows what `reset_classifier` and the like have made plain again.

    Example:
        >>> import torch
        >>> from spectral_hooks.parametrizations import rescaled, spectral_report
        >>> spectral_report(torch.nn.Sequential(rescaled(torch.nn.Linear(4, 3)), torch.nn.Linear(3, 2)))
        {'0': 'Rescaled(max_norm=1.0)', '1': 'none: it is plain'}
    """
    report: dict[str, str] = {}
    replaced: list[str] = []
    for name, layer in model.named_modules():
        if "parametrizations" in name.split(".") or any(name.startswith(prefix) for prefix in replaced):
            continue
        if (kind := _kind(layer)) and _is_replacement(layer):
            gain = getattr(layer, "max_norm", None)
            report[name] = kind.__name__ if gain is None else f"{kind.__name__}(max_norm={gain})"
            replaced.append(f"{name}." if name else "")
            continue
        made = [repr(p) for tensor in spectral_tensors(layer) for p in _held(layer, tensor)]
        if made:
            report[name] = ", ".join(made)
        elif any(True for _ in layer.parameters(recurse=False)) or parametrize.is_parametrized(layer):
            try:
                as_operator(layer).check_bounded()
                report[name] = "none: it is plain"
            except (TypeError, ValueError, NotImplementedError) as error:
                report[name] = f"none: {error}"
    return report


def spectral_tensors(layer: nn.Module) -> Iterator[str]:
    """The names of a layer's tensors that a parametrization of this package makes."""
    if parametrize.is_parametrized(layer):
        yield from (name for name in layer.parametrizations if _is_ours(layer, name))  # type: ignore[union-attr]


def _held(layer: Any, name: str) -> list[nn.Module]:
    return list(layer.parametrizations[name]) if parametrize.is_parametrized(layer, name) else []


def _kind(module: nn.Module) -> type | None:
    """The module's class of this package, if it has one; `fully_shard` puts a class of its own before."""
    package = __name__.split(".")[0]
    return next((kind for kind in type(module).__mro__ if kind.__module__.split(".")[0] == package), None)


def _in_package(module: nn.Module) -> bool:
    return _kind(module) is not None


def _is_replacement(module: nn.Module) -> bool:
    return _in_package(module) and hasattr(module, "to_plain")


def _is_ours(layer: nn.Module, name: str) -> bool:
    return any(map(_in_package, _held(layer, name)))


def _check_alone(where: str, layer: nn.Module, name: str) -> None:
    others = [type(p).__name__ for p in _held(layer, name) if not _in_package(p)]
    if others:
        raise ValueError(
            f"{where}: its `{name}` is parametrized by {', '.join(others)}, which is none of this package and cannot be kept "
            "beside it; call torch.nn.utils.parametrize.remove_parametrizations first."
        )


def check_whole(where: str, layer: nn.Module, remedy: str = "parametrize it before fully_shard or parallelize_module.") -> None:
    """Refuse parameters that are sharded over processes (DTensor), or are gathered by FSDP2 for a while."""
    sharded = any(hasattr(parameter, "full_tensor") for parameter in layer.parameters())
    if sharded or any(kind.__name__ == "FSDPModule" for kind in type(layer).__mro__):
        raise ValueError(f"the parameters of {where} are sharded over processes (DTensor); {remedy}")


def check_assigned(weight: Any, shape: tuple[int, ...]) -> None:
    """Refuse what cannot become a weight of this shape, before anything is made of it."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"the weight that is assigned or loaded must be a floating-point tensor; got {kind}.")
    if weight.shape != shape:
        raise ValueError(
            f"the weight that is assigned or loaded must have the layer's shape {tuple(shape)}; got {tuple(weight.shape)}; "
            "it is left as it is."
        )


def _bake(layer: nn.Module, name: str) -> None:
    # torch takes the tensor's name off the class, which a deepcopy shares with its original
    kind = type(layer)
    members = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    layer.__class__ = type(kind.__name__, kind.__bases__, members)
    parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
    if not any(spectral_tensors(layer)):
        hooks = layer._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is _load_plain]:
            del hooks[key]


def _plain(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """The module with every replacement of a layer inside it undone; one that is shared stays shared."""
    if id(module) not in done:
        done[id(module)] = module
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = _plain(child, done)
        if _is_replacement(module):
            done[id(module)] = cast(Any, module).to_plain()
    return done[id(module)]


def _load_plain(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded: a plain weight becomes what the parametrization keeps in its stead."""
    for name in spectral_tensors(layer):
        held = layer.parametrizations[name]
        if prefix + name not in state or not all(hasattr(p, "right_inverse") for p in held):
            continue
        value = state.pop(prefix + name)
        for parametrization in reversed(held):
            value = parametrization.right_inverse(value)
        originals = {"original": value} if held.is_tensor else {f"original{i}": part for i, part in enumerate(value)}
        # what right_inverse has set beside it, and what stays as it is
        made = held.state_dict() | originals
        state.update({f"{prefix}parametrizations.{name}.{key}": part for key, part in made.items()})
