"""Largest absolute row and column sums."""

from __future__ import annotations

from math import inf

from torch import Tensor

from ...operators.arguments import on_kernel
from ...operators.base import KernelOperator
from .certified import certified


@on_kernel
def absolute_sum(op: KernelOperator, *, order: float = 2) -> Tensor:
    """Sums of absolute values: the operator norms between `ℓ1` and between `ℓ∞`, and their geometric mean.

        ‖A‖_1 = max_inputs Σ_outputs |K|,   ‖A‖_∞ = max_outputs Σ_inputs |K|,   ‖A‖_2 ≤ √(‖A‖_1 ‖A‖_∞)

    Args:
        op: any operator.
        order: which norm is bounded: 2, the spectral one; or 1 or `math.inf`, whose bounds are none of the spectral norm.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. For `order=1` and `inf` exact up to rounding for matrices and on
        the lattice, an upper bound for finite convolutions; for 2 an upper bound. Differentiable but at zeros and ties.

    Cost: one pass over the weight.

    Raises:
        ValueError: `order` is none of these, or NaN or infinity in the weight.

    Example:
        >>> import math, torch, spectral_hooks as sh
        >>> op = sh.DenseOperator(torch.tensor([[1.0, -2.0], [0.0, 3.0]]))
        >>> [round(sh.bounds.absolute_sum(op, order=order).item(), 4) for order in (1, math.inf, 2)]
        [5.0, 3.0, 3.873]

    Source: Gouk, Frank, Pfahringer and Cree (2018); the mean is Schur's test.
    """
    if order not in (1, 2, inf):
        raise ValueError(f"`order` must be 1, 2 or infinity; got {order!r}.")
    # padding repeats entries of the input (in the circular case rows), which adds to the column sums only
    column_factor = op.padding_factor**2

    def formula(kernel: Tensor) -> Tensor:
        size = kernel.abs()
        rows = size.flatten(2).sum(2).amax(1)
        columns = size.transpose(1, 2).flatten(2).sum(2).amax(1)
        if order == 2:
            return (rows * columns).amax().sqrt()
        # of the adjoint the other one
        return rows.amax() if (order == inf) != op.transposed else columns.amax() * column_factor

    return certified(op, formula, factor=None if order == 2 else 1.0)
