"""The sum of the norms of the taps."""

from __future__ import annotations

import torch
from torch import Tensor

from ...linalg.krylov import matrix_norm, with_gradient
from ...operators.arguments import on_kernel
from ...operators.base import KernelOperator
from .certified import certified, matrix_norms


@on_kernel
def tap_sum(op: KernelOperator) -> Tensor:
    """The sum of the norms of the kernel's taps, the triangle inequality.

        ‖A‖ ≤ Σ_t ‖K[:, :, t]‖₂,   the maximum over groups,

    over the taps of the canonical kernel: those of one output position of a strided layer that read the same block of inputs
    count as one.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. Upper bound, exact for one tap and for a single non-negative
        channel; differentiable where the top singular values are simple.

    Cost: the largest singular value of `k^d` matrices, whatever the input size.

    Raises:
        ValueError: NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.bounds.tap_sum(sh.ConvOperator(torch.tensor([[[1.0, 2.0, -1.0]]])))
        tensor(4.0000)

    Source: Yi (2020).
    """

    def formula(kernel: Tensor) -> Tensor:
        taps = kernel.reshape(*kernel.shape[:3], -1).movedim(-1, 1)  # (groups, taps, rows, columns)
        sums = matrix_norms(taps.detach().flatten(0, 1)).unflatten(0, taps.shape[:2]).sum(1)
        group = int(sums.argmax())
        if not kernel.requires_grad:
            return sums[group]
        return with_gradient(sums[group], torch.stack([matrix_norm(tap) for tap in taps[group]]).sum())

    return certified(op, formula)
