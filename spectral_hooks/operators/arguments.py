"""What public functions do with their operator before they begin: take a layer for one, and leave autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

from torch import nn

from ..linalg.precision import full_precision
from .adjoint import AdjointOperator
from .base import KernelOperator, LinearOperator
from .layers import as_operator

P = ParamSpec("P")
T = TypeVar("T")


def on_operator(function: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[LinearOperator | nn.Module, P], T]:
    """A function of an operator that takes a layer too, through `as_operator`, and computes without autocast."""
    inner = full_precision(function)

    @functools.wraps(function)
    def wrapped(op: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        return inner(as_operator(op), *args, **kwargs)

    return wrapped


def on_kernel(function: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[LinearOperator | nn.Module, P], T]:
    """The same for a function of an operator's weight: an adjoint has that of its operator, a composition has none.

    Raises:
        TypeError: the operator has no weight of its own.
    """
    inner = full_precision(function)

    @functools.wraps(function)
    def wrapped(op: Any, *args: P.args, **kwargs: P.kwargs) -> T:
        return inner(kernel_operator(op, function.__name__), *args, **kwargs)

    return wrapped


def kernel_operator(layer: Any, name: str) -> KernelOperator:
    """The operator whose weight the function of this name is about."""
    op = as_operator(layer)
    if isinstance(op, AdjointOperator):
        return op.op
    if not isinstance(op, KernelOperator):
        raise TypeError(
            f"`op` of {name} must have a weight; a {type(op).__name__} has no weight of its own: take its factors one by one."
        )
    return op
