"""The adjoint of an operator."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

from .base import Canonical, Grid, KernelOperator, LinearOperator
from .composed import ComposedOperator
from .layers import InputSize, as_operator

Self = TypeVar("Self", bound="AdjointOperator")


class AdjointOperator(KernelOperator):
    """`Aᵀ` of an operator `A`, with the same weight and so the same canonical form: singular values do not tell them apart."""

    def __init__(self, op: KernelOperator) -> None:
        self.op = op
        self.weight = op.weight
        self.transposed = not op.transposed

    def __repr__(self) -> str:
        return f"adjoint({self.op!r})"

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.op.out_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.op.in_shape

    @property
    def is_finite(self) -> bool:
        return self.op.is_finite

    @property
    def channels(self) -> tuple[int, int]:
        outputs, inputs = self.op.channels
        return inputs, outputs

    def matvec(self, x: Tensor) -> Tensor:
        return self.op.rmatvec(x)

    def rmatvec(self, y: Tensor) -> Tensor:
        return self.op.matvec(y)

    def canonical(self) -> Tensor:
        return self.op.canonical()

    def canonical_form(self) -> Canonical:
        return self.op.canonical_form()

    def from_canonical(self, kernel: Tensor) -> Tensor:
        return self.op.from_canonical(kernel)

    @property
    def frequency_grid(self) -> Grid | None:
        return self.op.frequency_grid

    @property
    def lattice_factor(self) -> float:
        return self.op.lattice_factor

    @property
    def padding_factor(self) -> float:
        return self.op.padding_factor

    def with_weight(self: Self, weight: Tensor) -> Self:
        return type(self)(self.op.with_weight(weight))


def adjoint(layer: Any, input_size: InputSize = None) -> LinearOperator:
    """The adjoint `Aᵀ` of the linear map `A` that a layer computes: `⟨A x, y⟩ = ⟨x, Aᵀ y⟩`.

    It has the singular values of `A`, and `A`'s own weight, which is not copied. The adjoint of an adjoint is the operator
    itself, that of a composition the composition of the adjoints in reverse order.

    Args:
        layer: a layer or an operator.
        input_size: of the layer (not of its adjoint), as for `as_operator`.

    Raises:
        TypeError, NotImplementedError, ValueError: as `as_operator`.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> conv = torch.nn.Conv2d(3, 8, 3, stride=2)
        >>> op = sh.adjoint(conv, input_size=(9, 9))
        >>> op.in_shape, op.out_shape
        ((8, 4, 4), (3, 9, 9))
    """
    op = as_operator(layer, input_size)
    if isinstance(op, AdjointOperator):
        return op.op
    if isinstance(op, ComposedOperator):
        return ComposedOperator([adjoint(factor) for factor in reversed(op.factors)])
    if isinstance(op, KernelOperator):
        return AdjointOperator(op)
    raise TypeError(f"`layer` must be a layer, or an operator with a weight or composed of such; got {type(op).__name__}.")
