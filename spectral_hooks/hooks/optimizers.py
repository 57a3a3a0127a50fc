"""What is found inside an optimizer: others that it steps, averages that it evaluates, copies of weights that it writes back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .averages import interpolation

#: Wrappers that only pass a step on: nothing is written once the optimizer inside has stepped.
_DELEGATES = ("accelerate", "lightning", "lightning_fabric", "pytorch_lightning")
#: State that is certainly no copy of the weight. Others are compared with it.
_MOMENTS = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum", "acc_delta"}


def steps(value: Any) -> bool:
    """Whether something is an optimizer, or behaves like one."""
    return isinstance(value, Optimizer) or (callable(getattr(value, "step", None)) and hasattr(value, "param_groups"))


def inside(optimizer: Any) -> list[Any]:
    """The optimizers that one keeps, to step them itself."""
    kept = [v for value in getattr(optimizer, "__dict__", {}).values() for v in (value if isinstance(value, list) else [value])]
    return [value for value in kept if value is not optimizer and not isinstance(value, (Tensor, nn.Module)) and steps(value)]


def levels(optimizer: Any, around: tuple[Any, ...] = ()) -> Iterator[Any]:
    """An optimizer and all inside it, from without."""
    yield optimizer
    for each in inside(optimizer):
        if not any(each is outer for outer in around):
            yield from levels(each, (*around, optimizer))


def parameters_of(optimizers: list[Any]) -> list[Tensor]:
    """What these step."""
    groups = [group for each in optimizers for group in getattr(each, "param_groups", [])]
    return list({id(p): p for group in groups for p in group["params"]}.values())


def has_hooks(optimizer: Any) -> bool:
    """Whether torch calls hooks after its step; not where `Optimizer.__init__` has never run."""
    return "_optimizer_step_post_hooks" in vars(optimizer) and hasattr(type(optimizer).step, "hooked")


def only_delegates(optimizer: Any) -> bool:
    """Whether it is a wrapper that writes nothing itself."""
    return type(optimizer).__module__.partition(".")[0] in _DELEGATES


def averages(optimizer: Any) -> bool:
    """Whether an optimizer evaluates other weights than it trains."""
    return callable(getattr(optimizer, "eval", None)) and not only_delegates(optimizer)


def copies(optimizer: Any, parameter: Tensor) -> Iterator[Tensor]:
    """What an optimizer keeps that equals this parameter bit for bit, and that it may write back: slow weights, for example."""
    kept = getattr(optimizer, "state", {}).get(parameter, {})
    yield from _alike(parameter, [value for name, value in kept.items() if name not in _MOMENTS])
    if inside(optimizer):  # slow weights in lists of a wrapper's own
        yield from _alike(parameter, [value for value in vars(optimizer).values() if isinstance(value, list)])


def _alike(parameter: Tensor, value: Any) -> Iterator[Tensor]:
    """All tensors within lists that equal a parameter."""
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _alike(parameter, each)
    elif isinstance(value, Tensor) and value is not parameter and type(value) in (Tensor, nn.Parameter):
        same = value.shape == parameter.shape and (value.dtype, value.device) == (parameter.dtype, parameter.device)
        if same and torch.equal(value, parameter):
            yield value


def check_averages(optimizer: Any) -> None:
    """Refuse an optimizer whose average cannot be told from what it keeps."""
    if averages(optimizer) and any(interpolation(optimizer, group) is None for group in getattr(optimizer, "param_groups", [])):
        raise NotImplementedError(
            f"{type(optimizer).__name__} has `eval()`: it evaluates other weights than it trains. How they are made is read from "
            "`momentum`, `beta` or `betas` and the state `z`, as the package schedulefree has them; this optimizer has none, so "
            "the weights that it evaluates would leave the ball. Use one of that package, or one without `eval()`."
        )


def check_parameters(model: nn.Module, optimizers: list[Any], elsewhere: list[Tensor]) -> None:
    """Refuse optimizers that step float32 copies of the model and write them back over it.

    Args:
        elsewhere: what other optimizers step.
    """
    bottom = [level for each in optimizers for level in levels(each) if not inside(level)]
    held = {id(p): p for p in parameters_of(bottom)}
    own, others = {id(p) for p in model.parameters()}, {id(p) for p in elsewhere}
    names = ", ".join(dict.fromkeys(type(each).__name__ for each in optimizers))
    masters = {tuple(p.shape) for key, p in held.items() if key not in own and p.dtype == torch.float32}
    for name, p in model.named_parameters():
        half = p.dtype in (torch.float16, torch.bfloat16) and p.requires_grad
        if half and id(p) not in held and id(p) not in others and tuple(p.shape) in masters and p.ndim > 1:
            raise ValueError(
                f"`optimizer` ({names}) steps a float32 copy in the place of {name}, which is {p.dtype}, and writes over what is "
                "projected: keep the model in float32 and train with autocast, or step the half-precision weights themselves."
            )
