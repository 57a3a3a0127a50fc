"""The largest Frobenius norm on a frequency grid."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ...linalg.krylov import with_gradient
from ...linalg.symbols import symbol
from ...operators.arguments import on_kernel
from ...operators.base import KernelOperator
from ..single_row import grid_maxima
from .certified import EPS, certified, check_oversampling, sampling


@on_kernel
def frobenius_grid(op: KernelOperator, *, oversampling: float = 8) -> Tensor:
    """The largest Frobenius norm of the symbol on a frequency grid times the cosine factor: loose, and almost free.

        ‖A‖ ≤ max_{θ in grid} ‖F(θ)‖_F · Π_i 1 / cos(π (k_i - 1) / (2 N_i)),   N_i = ⌈oversampling · (k_i - 1)⌉ points per axis.

    Why the same factor as in `cosine_grid`: `‖F(θ)‖_F²` is itself a trigonometric polynomial of degree `k_i - 1` along each
    axis, between 0 and its maximum, which is all that M. Riesz's lemma asks for.

    Args:
        op: any operator.
        oversampling: as in `cosine_grid`.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. Upper bound, at most `√rank` times the factor above the norm,
        differentiable everywhere but at ties between frequencies.

    Cost: `O(c² k^2d + N^d k^(d + 1))`: no matrix of channels is decomposed, and no symbol formed.

    Raises:
        ValueError: `oversampling` is no number above 1, or NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> bool(sh.bounds.frobenius_grid(sh.DenseOperator(torch.eye(9))) >= 3)
        True

    Source: Araujo, Negrevergne, Chevaleyre and Atif (2021).
    """
    check_oversampling(oversampling)

    def formula(kernel: Tensor) -> Tensor:
        sizes, factor = sampling(op, kernel, oversampling)
        return largest_frobenius(kernel, sizes) * factor

    return certified(op, formula)


def largest_frobenius(kernel: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The maximum of `‖F(θ)‖_F` over groups and a frequency grid; differentiated at the winner.

    The entries of the symbol are polynomials whose squares add up, as do those of any others with the same `KᵀK` of entries ×
    taps: of its triangular factor there are no more than taps.
    """
    if not sizes:
        return torch.linalg.vector_norm(kernel.flatten(1), dim=1).amax()
    taps = prod(kernel.shape[3:])
    flat = kernel.detach().reshape(len(kernel), -1, taps)
    room = 1 + 4 * EPS * flat.shape[1] * taps**1.5
    if flat.shape[1] > taps:
        flat = torch.linalg.qr(flat, mode="r").R
    found = grid_maxima(flat.reshape(len(kernel), 1, -1, *kernel.shape[3:]), sizes)
    group = int(found.upper.argmax())
    norm = found.upper[group] * room
    if not kernel.requires_grad:
        return norm
    return with_gradient(norm, torch.linalg.vector_norm(symbol(kernel[group : group + 1], found.theta[group : group + 1])))
