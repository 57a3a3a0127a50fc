"""The layers of a model under the names of the plain model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from ..operators.layers import is_adapter

#: What wrappers call the module that they wrap. A user's own module may have a `module` too: that is only of these packages.
_WRAPPED = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_WRAPPERS = ("torch", "lightning", "lightning_fabric", "pytorch_lightning", "opacus", "timm", "deepspeed", "fairscale")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors say which layer it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{called(name)}: {error}") from error


def called(name: str) -> str:
    """What errors call a layer."""
    return f"layer {name}" if name else "the model itself"


def type_name(layer: nn.Module) -> str:
    """The qualified name of a layer's type."""
    kind = type_before_parametrizations(layer)
    return f"{kind.__module__}.{kind.__qualname__}"


def kind_of(layer: nn.Module) -> str:
    """Like "Linear": the class of a layer, whatever is laid over it."""
    return type_before_parametrizations(layer).__name__


def a_kind(layer: nn.Module) -> str:
    """Like "a Linear"."""
    kind = kind_of(layer)
    return f"{'an' if kind[0] in 'AEIO' else 'a'} {kind}"


def named_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """All modules under the names of the plain model; not those inside a parametrization, an adapter or a packed layer."""
    whole: tuple[str, ...] = ()
    for raw, name, module in _named_modules(model):
        # a layer that adapters were laid around is one with them
        if "parametrizations" in raw.split(".") or (whole and raw.startswith(whole)):
            continue
        if is_adapter(module) or (holds_packed(module) and not is_trainable(module)):
            whole = (*whole, f"{raw}.") if raw else whole
        yield name, module


def unwrapped(model: nn.Module) -> nn.Module:
    """The plain model: what wrappers (compiling, data-parallel, Fabric's, Opacus') were laid around."""
    inner = next((child for name, child in model._modules.items() if child is not None and _wraps(model, name)), None)
    return model if inner is None else unwrapped(inner)


def _named_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Each module once, under its full name and that without what wrappers prefix."""
    plain = {"": ""}
    for raw, module in model.named_modules():
        if raw:
            parent, _, last = raw.rpartition(".")
            outer = plain[parent]
            plain[raw] = outer if _wraps(model.get_submodule(parent), last) else f"{outer}.{last}" if outer else last
        yield raw, plain[raw], module


def _wraps(module: nn.Module, child: str) -> bool:
    """Whether a module is but a wrapper around this child."""
    if child in _WRAPPED:
        return True
    package, _, rest = type(module).__module__.partition(".")
    of_a_library = package in _WRAPPERS and not f"{rest}.".startswith("nn.modules.")
    return child in ("module", "_module") and of_a_library and len(module._modules) == 1


def is_trainable(layer: nn.Module) -> bool:
    """Whether a layer has parameters of its own, though they be behind a parametrization or an adapter."""
    return any(True for _ in layer.parameters(recurse=False)) or is_parametrized(layer) or is_adapter(layer)


def holds_packed(layer: nn.Module) -> bool:
    """Whether a layer has a weight that is no parameter: torch's quantized layers have methods, other libraries' have buffers."""
    if any(inspect.isfunction(getattr(type(layer), name, None)) for name in ("weight", "get_weight")):
        return True
    tensors = {**layer._buffers, **{name: value for name, value in vars(layer).items() if name == "weight"}}
    return any("weight" in name and isinstance(value, Tensor) and value.ndim > 1 for name, value in tensors.items())
