"""What every operator is: a real linear map between tensors of fixed shape, held by one weight."""

from __future__ import annotations

import copy
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable
from math import prod
from typing import TypeGuard, TypeVar

import torch
from torch import Tensor

from ..linalg.scaling import normalized

Self = TypeVar("Self", bound="LinearOperator")
SelfWithKernel = TypeVar("SelfWithKernel", bound="KernelOperator")

#: Sizes of the frequency grid, one per spatial axis, and how often each frequency of that axis occurs.
Grid = tuple[tuple[int, int], ...]


class LinearOperator(ABC):
    """A real linear map `A` from tensors of shape `in_shape` to tensors of shape `out_shape`."""

    @property
    @abstractmethod
    def in_shape(self) -> tuple[int, ...]:
        """Shape of one input, without batch dimensions."""

    @property
    @abstractmethod
    def out_shape(self) -> tuple[int, ...]:
        """Shape of one output, without batch dimensions."""

    @property
    def is_finite(self) -> bool:
        """Whether the map has fixed shapes; the lattice operator of a convolution without an input size has none."""
        return True

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """That of the numbers which make the map."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where they are."""

    @property
    def channels(self) -> tuple[int, int]:
        """Numbers of output and of input channels: the first entries of the shapes."""
        return self.out_shape[0], self.in_shape[0]

    @abstractmethod
    def to(self: Self, dtype: torch.dtype) -> Self:
        """The same map with its numbers in another dtype."""

    def of_order_one(self, dtype: torch.dtype) -> tuple[LinearOperator, float]:
        """The map over a power of two, with numbers of order one and of this dtype, and that power."""
        return self.to(dtype), 1.0

    @abstractmethod
    def matvec(self, x: Tensor) -> Tensor:
        """`A x`, for `x` of shape `(*batch, *in_shape)`."""

    @abstractmethod
    def rmatvec(self, y: Tensor) -> Tensor:
        """`Aᵀ y`, the exact adjoint, for `y` of shape `(*batch, *out_shape)`."""

    def to_dense(self) -> Tensor:
        """The matrix of the map, `(numel(out_shape), numel(in_shape))`, by applying it to every unit vector."""
        columns = prod(self.in_shape)
        identity = torch.eye(columns, dtype=self.dtype, device=self.device)
        return self.matvec(identity.reshape(columns, *self.in_shape)).reshape(columns, -1).T


class KernelOperator(LinearOperator):
    """A linear map that is linear in one `weight` too. An operator never copies or changes it, so gradients flow through.

    Everything spectral goes through the **canonical form**: a tensor `(groups, rows, columns, *taps)` that is the kernel
    of a stride-1, undilated convolution with the same singular values. `canonical` is a linear isometry of the weight
    (Frobenius norms agree) and `from_canonical` its adjoint: it drops what the weight cannot hold.
    """

    weight: Tensor
    #: Whether the canonical kernel is that of the adjoint.
    transposed: bool = False
    #: Where `weight` is computed from a layer's parameters: makes the layer hold another one.
    assign: Callable[[Tensor], None] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @abstractmethod
    def canonical(self) -> Tensor:
        """The canonical kernel, `(groups, rows, columns, *taps)`."""

    @abstractmethod
    def from_canonical(self, kernel: Tensor) -> Tensor:
        """The weight whose canonical kernel is `kernel`, cropped to the taps that the weight has."""

    @property
    @abstractmethod
    def frequency_grid(self) -> Grid | None:
        """The grid on which the symbol's singular values are exactly the operator's, or None when there is none."""

    @property
    @abstractmethod
    def lattice_factor(self) -> float:
        """`f` such that `‖A‖ ≤ f · sup_θ ‖F(θ)‖₂`, with `F` the symbol of the canonical kernel."""

    @property
    def padding_factor(self) -> float:
        """`lattice_factor`, and where that needs an input size and there is none, its supremum over all that torch allows."""
        return self.lattice_factor

    def check_bounded(self) -> None:
        """Raise what keeps the operator from having a bound without an input size.

        Raises:
            ValueError: the padding repeats inputs, more or less of them with the size.
        """
        _ = self.lattice_factor

    def to(self: SelfWithKernel, dtype: torch.dtype) -> SelfWithKernel:
        return self.with_weight(self.weight.to(dtype))

    def of_order_one(self, dtype: torch.dtype) -> tuple[LinearOperator, float]:
        weight, scale = normalized(self.weight.detach())
        return self.with_weight(weight.to(self.device, dtype)), scale

    def with_weight(self: SelfWithKernel, weight: Tensor) -> SelfWithKernel:
        """The same geometry with another weight of the same shape.

        Raises:
            ValueError: the shapes differ.
        """
        if weight.shape != self.weight.shape:
            raise ValueError(f"`weight` must have shape {tuple(self.weight.shape)}; got {tuple(weight.shape)}.")
        other = copy.copy(self)
        other.weight = weight
        return other


def check_ends_with(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse `x` unless its last dimensions are `shape`."""
    if tuple(x.shape[max(x.ndim - len(shape), 0) :]) != shape:
        raise ValueError(f"`{name}` must have shape (*batch, {', '.join(map(str, shape))}); got {tuple(x.shape)}.")


def is_number(value: object) -> TypeGuard[float]:
    """Whether this is a real number, NumPy's included; a bool is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether this is an integer, NumPy's included; a bool is none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_weight(weight: Tensor) -> None:
    """Refuse what is no dense, real floating-point tensor of values that stand for themselves."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"`weight` must be a torch tensor; got {type(weight).__name__}.")
    if weight.is_quantized:
        raise TypeError(
            f"`weight` must be a real floating-point tensor; got the quantized {weight.dtype}: use weight.dequantize()."
        )
    if not weight.is_floating_point():
        raise TypeError(f"`weight` must be a real floating-point tensor; got {weight.dtype}.")
    if weight.layout != torch.strided:
        raise NotImplementedError(
            f"`weight` must be dense; got the layout {weight.layout}. Use weight.to_dense(), or keep a dense weight and lay "
            "torch.nn.utils.prune over it."
        )
    if weight.dtype.itemsize == 1:
        # in use they come with a scale that is kept elsewhere, so they are not the map that is computed
        raise NotImplementedError(
            f"`weight` of {weight.dtype} is not supported: use weight.float(), times its scale if it has one."
        )
