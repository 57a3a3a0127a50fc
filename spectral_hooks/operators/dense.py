"""A matrix as an operator."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .base import Grid, KernelOperator, check_ends_with, check_weight


class DenseOperator(KernelOperator):
    """The map `x ↦ W x` over the last dimension.

    Args:
        weight: `W`, of shape `(out, in)`; `(in, out)` when `transposed`.
        transposed: the map is `x ↦ Wᵀ x`, as in transformers' `Conv1D`.
        assign: of a layer that computes `W` from its parameters: makes the layer hold another one, see `as_operator`.

    Raises:
        TypeError: `weight` is no real floating-point tensor.
        ValueError: `weight` is no matrix.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> op = sh.DenseOperator(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]]))
        >>> op.matvec(torch.ones(3))
        tensor([3., 4.])
        >>> sh.spectral_norm(op)
        tensor(4.)
    """

    def __init__(self, weight: Tensor, *, transposed: bool = False, assign: Callable[[Tensor], None] | None = None) -> None:
        check_weight(weight)
        if weight.ndim != 2:
            raise ValueError(
                f"`weight` must be a matrix (out, in); got shape {tuple(weight.shape)}. For a kernel use ConvOperator."
            )
        self.weight = weight
        self.transposed = transposed
        self.assign = assign

    def __repr__(self) -> str:
        return f"DenseOperator(in_shape={self.in_shape}, out_shape={self.out_shape})"

    @property
    def _matrix(self) -> Tensor:
        return self.weight.T if self.transposed else self.weight

    @property
    def in_shape(self) -> tuple[int, ...]:
        return (self._matrix.shape[1],)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return (self._matrix.shape[0],)

    def matvec(self, x: Tensor) -> Tensor:
        check_ends_with("x", x, self.in_shape)
        return x @ self._matrix.T

    def rmatvec(self, y: Tensor) -> Tensor:
        check_ends_with("y", y, self.out_shape)
        return y @ self._matrix

    def to_dense(self) -> Tensor:
        return self._matrix

    # A transpose has the same singular values, so the canonical form is the weight as it lies.
    def canonical(self) -> Tensor:
        return self.weight.unsqueeze(0)

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        return (1, *self.weight.shape)

    def from_canonical(self, kernel: Tensor) -> Tensor:
        return kernel.squeeze(0)

    @property
    def frequency_grid(self) -> Grid | None:
        return ()

    @property
    def lattice_factor(self) -> float:
        return 1.0
