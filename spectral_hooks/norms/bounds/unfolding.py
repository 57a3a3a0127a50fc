"""The kernel reshaped to a matrix."""

from __future__ import annotations

from itertools import product as combinations
from math import prod, sqrt

import torch
from torch import Tensor

from ...linalg.krylov import matrix_norm, with_gradient
from ...operators.arguments import on_kernel
from ...operators.base import KernelOperator
from .certified import certified, matrix_norms


@on_kernel
def unfolding(op: KernelOperator) -> Tensor:
    """The smallest norm of the kernel's unfoldings times the root of the number of taps.

        ‖A‖ ≤ √(k_1 ⋯ k_d) · min ‖unfolding‖₂

    over the `2^d` matrices that take each tap axis to the rows or to the columns: in two dimensions `out × (in k_h k_w)`,
    `(out k_h) × (in k_w)`, `(out k_w) × (in k_h)`, `(out k_h k_w) × in`. Why: `u* F(θ) v` is the kernel contracted with `u`, `v`
    and one vector of norm `√k_i` per axis. The kernel is the canonical one; the maximum over groups.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. Upper bound (the norms of the unfoldings are exact, not power
        iterations, which are too small), differentiable where the top singular value of the smallest is simple.

    Cost: the largest singular value of `2^d` matrices, whatever the input size.

    Raises:
        ValueError: NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.bounds.unfolding(sh.ConvOperator(torch.ones(1, 1, 3, 3)))
        tensor(9.0000)

    Source: Singla and Feizi (2021); two of the four in Yi (2020).
    """

    def formula(kernel: Tensor) -> Tensor:
        taps = range(3, kernel.ndim)
        unfoldings = []
        for sides in combinations((0, 1), repeat=len(taps)):
            rows, columns = ([axis for axis, side in zip(taps, sides, strict=True) if side == s] for s in (0, 1))
            matrix = kernel.permute(0, 1, *rows, 2, *columns)
            unfoldings.append(matrix.flatten(1 + len(rows) + 1).flatten(1, 1 + len(rows)))
        least, which = torch.stack([matrix_norms(matrix.detach()) for matrix in unfoldings]).min(0)
        group = int(least.argmax())
        norm = least[group]
        if kernel.requires_grad:
            norm = with_gradient(norm, matrix_norm(unfoldings[int(which[group])][group]))
        return norm * sqrt(prod(kernel.shape[3:]))

    return certified(op, formula)
