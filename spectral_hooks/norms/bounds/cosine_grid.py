"""The largest norm on a frequency grid, times a factor for what lies between."""

from __future__ import annotations

from torch import Tensor

from ...linalg.krylov import matrix_norm, with_gradient
from ...linalg.symbols import symbol
from ...operators.arguments import on_kernel
from ...operators.base import KernelOperator
from ..grid import grid_norm
from .certified import certified, check_oversampling, sampling


@on_kernel
def cosine_grid(op: KernelOperator, *, oversampling: float = 8) -> Tensor:
    """The largest norm on a frequency grid times the cosine factor: the tightest bound at its price.

        ‖A‖ ≤ max_{θ in grid} ‖F(θ)‖₂ · Π_i 1 / cos(π (k_i - 1) / (2 N_i)),   N_i = ⌈oversampling · (k_i - 1)⌉ points per axis.

    Why: with `M = ‖F(θ*)‖ = sup ‖F‖` and `v` the top right singular vector there, `q(θ) = ‖F(θ) v‖²` is along each axis a
    trigonometric polynomial of degree `k - 1` between 0 and `M² = q(θ*)`. M. Riesz's lemma gives
    `q(θ* + t) ≥ M² cos²((k - 1) t / 2)`, and some grid point has `|t| ≤ π / N`. Axis after axis.

    A circular operator's axis whose own frequency grid is no finer is sampled there, without a factor; matrices and kernels of
    one tap are exact.

    Args:
        op: any operator.
        oversampling: grid points over the degree `k - 1`, more than 1. The factor in two dimensions: 1.172 for 4, 1.040 for 8,
            1.010 for 16.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. Upper bound, at most the factor above the lattice norm. Its
        gradient is that of the norm at the winning frequency. Sharp in one dimension.

    Cost: `O(N^d)` evaluations of the symbol's Gram matrix and their Cholesky tests, `c³` each, whatever the input size.

    Raises:
        ValueError: `oversampling` is no number above 1, or NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> op = sh.as_operator(torch.nn.Conv2d(4, 8, 3))
        >>> norm, bound = sh.spectral_norm(op, rtol=1e-6), sh.bounds.cosine_grid(op)
        >>> bool(norm / 1.000001 <= bound <= 1.04 * norm)
        True

    Source: this library; with the factor `1 / (1 - (k - 1) / N)` Pfister and Bresler (2019).
    """
    check_oversampling(oversampling)

    def formula(kernel: Tensor) -> Tensor:
        sizes, factor = sampling(op, kernel, oversampling)
        found = grid_norm(kernel, sizes)
        norm = kernel.new_tensor(found.upper)
        if kernel.requires_grad:
            block = symbol(kernel[found.group : found.group + 1], found.theta[None].to(kernel))[0, 0]
            norm = with_gradient(norm, matrix_norm(block if sizes else block.real))
        return norm * factor

    return certified(op, formula)
