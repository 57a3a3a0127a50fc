"""At which sizes layers see their inputs: one forward of a copy of the model, that leaves no trace."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..operators import ConvOperator, as_operator
from ..operators.covering import Sizes
from ..weights.names import called, named_layers, unwrapped
from ..weights.selection import Selection
from ..weights.targets import AnyTarget, Target
from . import settings
from .share import of_all_processes

#: What a model is run with: a tensor, its arguments, its keyword arguments, or a function that runs it.
Example = Tensor | Sequence[Any] | Mapping[str, Any] | Callable[[nn.Module], Any]

#: In the place of the size of an input whose axes are not known.
_UNKNOWN: tuple[int, ...] = ()


@dataclass(frozen=True)
class Blank:
    """The shape and the dtype of a tensor, in the place of one that is not worth to be pickled."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def check_example(example: Example | None) -> None:
    """Refuse what no model can be run with."""
    if example is None or isinstance(example, (Tensor, Blank, tuple, list, Mapping)) or callable(example):
        return
    raise TypeError(
        "`example` must be a tensor, a tuple of the arguments of the model's forward, a mapping of its keyword arguments, or a "
        f"function of the model that runs it; got {type(example).__name__}."
    )


def without_values(example: Example | None) -> Any:
    """The example with the shapes of its tensors alone, for copies and pickles: these give the same sizes."""
    return _mapped(example, lambda x: Blank(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x)


def shown(example: Example | None) -> str:
    """The example as `repr` shows it: shapes in the places of tensors."""
    return settings.text(_mapped(example, lambda x: tuple(x.shape) if isinstance(x, (Tensor, Blank)) else x))


def chosen(
    model: nn.Module, selection: Selection, example: Example | None, before: dict[str, Sizes], *, everywhere: bool
) -> dict[str, Sizes]:
    """The input sizes of the selected convolutions, by their names; from now on the targets are bounded at these.

    Args:
        example: what the model is run with; None to stay with what is known from `before`, as it does where weights are sharded,
            for such a model cannot be copied.
        everywhere: whether the examples of all processes of torch.distributed count, which then must all call this.
    """
    names = {layer: name for name, layer in named_layers(model)}
    targets = [target for target in selection.targets if isinstance(target, Target)]
    known = before
    if example is not None and not (before and selection.is_sharded):
        layers = {layer: names[layer] for target in targets for layer in target.layers if layer in names}
        known = recorded(model, example, layers, everywhere=everywhere)
    for target in targets:
        target.sizes = {layer: known[names[layer]] for layer in target.layers if names.get(layer) in known}
        for layer, found in target.sizes.items():
            axes = as_operator(layer).weight.ndim - 2
            if any(len(size) != axes for size in found):
                raise ValueError(
                    f"layer {names[layer]}: its input sizes in the state are {found}, and it takes inputs of {axes} dimensions: "
                    "the state is of another model; give the hook an `example`."
                )
    return known


def of(target: AnyTarget) -> str:
    """The sizes of a target as a text: of a convolution, and empty for what has no input size."""
    if not isinstance(target, Target) or not isinstance(op := as_operator(target.layers[0]), ConvOperator):
        return ""
    found = ["×".join(map(str, size)) for layer in target.layers for size in target.sizes.get(layer, ())]
    if len(target.sizes) < len(target.layers):
        found.append("every size" if op.is_pointwise else "every size (none recorded)")
    return ", ".join(dict.fromkeys(found))


def recorded(
    model: nn.Module, example: Example, layers: Mapping[nn.Module, str], *, everywhere: bool = False
) -> dict[str, Sizes]:
    """The spatial sizes of the inputs of convolutions, by their names, in one forward.

    The forward is that of a copy in eval mode, without gradients, on the device and in the dtype of the model; random number
    generators are set back. Layers that it does not call, or not with channels first, are not in the result, and neither are
    1×1 kernels, whose norm is that of a matrix.

    Args:
        model: it stays as it is, bit for bit.
        example: what it is run with.
        layers: the layers of interest, with their names.
        everywhere: whether the examples of all processes count.

    Returns:
        With zero padding the largest size along every axis; otherwise all sizes that were met.

    Raises:
        ValueError: the model cannot be copied or run, with the layer in which that failed; on every process.
    """
    convolutions = {
        name: (layer, op)
        for layer, name in layers.items()
        if isinstance(op := as_operator(layer), ConvOperator) and not op.is_pointwise
    }
    seen: dict[str, set[tuple[int, ...]]] = {name: set() for name in convolutions}
    failed: str | None = None
    try:
        if convolutions:
            twin, twins = _copied(unwrapped(model))
            for name, (layer, op) in convolutions.items():
                twins[layer].register_forward_pre_hook(_recording(seen[name], op), with_kwargs=True)
            _run(twin, twins, example)
    except ValueError as error:
        if not everywhere:
            raise
        failed = str(error)  # the others wait for an answer
    everyone = of_all_processes((seen, failed)) if everywhere else [(seen, failed)]
    if errors := [message for _, message in everyone if message is not None]:
        raise ValueError(errors[0])
    met = {name: set[tuple[int, ...]]().union(*(each[name] for each, _ in everyone)) for name in seen}
    return {name: _merged(convolutions[name][1], sizes) for name, sizes in met.items() if sizes and _UNKNOWN not in sizes}


def _recording(sizes: set[tuple[int, ...]], op: ConvOperator) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A hook that adds the size of the input, batched or not, if its channels stand before the spatial axes."""
    dims, channels = op.weight.ndim - 2, op.channels[1]

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs.get("input")
        shape = tuple(map(int, x.shape)) if isinstance(x, Tensor) else ()
        sizes.add(shape[-dims:] if len(shape) > dims and shape[-dims - 1] == channels else _UNKNOWN)

    return record


def _merged(op: ConvOperator, sizes: set[tuple[int, ...]]) -> Sizes:
    if op.padding_mode == "zeros":  # smaller inputs obey the bound of larger ones
        return (tuple(map(max, zip(*sizes, strict=True))),)
    return tuple(sorted(sizes))


def _copied(model: nn.Module) -> tuple[nn.Module, dict[nn.Module, nn.Module]]:
    """A copy of the model in eval mode, and of each module its copy."""
    # what a forward has computed and left in a module (pruned weights) has a graph, which is not copied
    left = (value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor))
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in left if not value.is_leaf}
    try:
        twin = copy.deepcopy(model, memo)
        twin.eval()
        return twin, {module: memo[id(module)] for module in model.modules()}
    except Exception as error:  # whatever a module's own way to copy itself raises
        raise ValueError(
            f"`example` is run through a copy of the model, and this {type(model).__name__} cannot be copied "
            f"({type(error).__name__}: {error}). The model is as it was. Leave `example` away to bound layers at every size; "
            "or start the hook on the plain model before it is sharded: sizes that were recorded then are kept."
        ) from error


def _run(twin: nn.Module, twins: Mapping[nn.Module, nn.Module], example: Example) -> None:
    """One forward of the copy; errors say in which layer."""
    names = {module: name for name, module in twin.named_modules()}
    inside: list[str] = []

    def enter(module: nn.Module, _: Any) -> None:
        if module in twins and module not in names:
            raise RuntimeError("the forward of the copy calls the model itself, which was put there by a closure")
        if module in names:
            inside.append(names[module])

    def leave(*_: Any) -> None:
        inside.pop()

    watching = register_module_forward_pre_hook(enter)
    for module in names:
        module.register_forward_hook(leave)
    try:
        with torch.no_grad(), _same_randomness(twin):
            _call(twin, _mapped(example, lambda x: _placed(x, twin)))
    except Exception as error:  # whatever a forward raises
        where = called(inside[-1]) if inside else "the model itself"
        raise ValueError(
            f"`example` of {shown(example)} does not run through the model: {where} raised {type(error).__name__}: {error}. Give "
            "what its forward takes: a tensor, a tuple of arguments or a mapping of keyword arguments (of a batch of inputs and "
            "labels the inputs alone), or a function of the model that runs it. The model is as it was."
        ) from error
    finally:
        watching.remove()


def _call(model: nn.Module, example: Any) -> None:
    if isinstance(example, Mapping):
        model(**example)
    elif isinstance(example, (tuple, list)):
        model(*example)
    elif isinstance(example, Tensor):
        model(example)
    else:
        example(model)


def _mapped(example: Any, function: Callable[[Any], Any]) -> Any:
    """The example with the function's value in the place of each of its leaves."""
    if isinstance(example, Mapping):
        return {key: _mapped(value, function) for key, value in example.items()}
    if isinstance(example, (tuple, list)):
        return tuple(_mapped(value, function) for value in example)
    return function(example)


def _placed(x: Any, model: nn.Module) -> Any:
    """A tensor where the model is, and floating-point ones in its dtype; blank ones as zeros."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if isinstance(x, Blank):
        x = torch.zeros(x.shape, dtype=x.dtype)
    if not isinstance(x, Tensor) or like is None:
        return x
    return x.detach().to(like.device, like.dtype if x.is_floating_point() else x.dtype, copy=True)


@contextmanager
def _same_randomness(model: nn.Module) -> Iterator[None]:
    """Random number generators, of the host and of the devices of a model, are afterwards as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    kinds = {p.device.type for p in model.parameters()} - {"cpu", "meta"}
    devices = [(torch.get_device_module(kind), i) for kind in kinds for i in range(torch.get_device_module(kind).device_count())]
    before, states = torch.get_rng_state(), [module.get_rng_state(i) for module, i in devices]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(before)
        for (module, i), state in zip(devices, states, strict=True):
            module.set_rng_state(state, i)
