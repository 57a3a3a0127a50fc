"""What padding that repeats inputs can add."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.arguments import on_kernel
from ..operators.base import KernelOperator
from .bounds.certified import rounded_up


@on_kernel
def padding_factor(op: KernelOperator) -> Tensor:
    """What padding that repeats inputs adds: `‖A‖ ≤ factor · sup_θ ‖F(θ)‖₂`.

    - zero padding of any amount, and matrices: 1;
    - reflect and replicate: the norm of the padding map, the root of the product over the axes of how often the most-read
      position is read. With an input size exactly that. Without, the supremum over the sizes that torch allows: per axis 3 for
      reflect on both sides (where one position is met from both; 2 from size `before + after + 2` on), and
      `1 + before + after` for replicate (a single position; `1 + max(before, after)` from size 2 on);
    - circular: 1, unless it is wider than the kernel needs or the stride does not divide the size; then how often output rows
      repeat, likewise.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. All of `sh.bounds` contain the factor already.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> conv = torch.nn.Conv1d(1, 1, 3, padding=1, padding_mode="reflect")
        >>> sh.padding_factor(sh.as_operator(conv, input_size=8)) ** 2, sh.padding_factor(conv) ** 2
        (tensor(2.0000), tensor(3.0000))
    """
    dtype = torch.promote_types(op.weight.dtype, torch.float32)
    return rounded_up(torch.tensor(op.padding_factor, dtype=torch.float64), 1.0, dtype).to(op.weight.device)
