"""What bounds share: a formula in float64 on a kernel of order one becomes a number that is never below."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, cos, inf, isfinite, pi, prod, sqrt

import torch
from torch import Tensor

from ...linalg.krylov import with_gradient
from ...linalg.precision import exact, full_precision
from ...linalg.scaling import normalized
from ...operators.base import KernelOperator, is_number, is_whole
from ..grid import grid_norm

#: A bound: operator → 0-d tensor.
Bound = Callable[[KernelOperator], Tensor]
#: Matrices up to this size are decomposed in batches.
_SMALL = 64
EPS = torch.finfo(torch.float64).eps
SQRT2 = sqrt(2)


@full_precision
def certified(op: KernelOperator, formula: Callable[[Tensor], Tensor], factor: float | None = None) -> Tensor:
    """A bound that holds as computed, from its formula on the canonical kernel in float64 with entries of order one."""
    weight = op.weight
    _, scale = normalized(weight.detach())
    kernel = op.canonical()
    kernel = exact(kernel) / scale
    if bool((kernel.detach() != 0).any()):
        value = formula(kernel) * ((op.padding_factor if factor is None else factor) * _room(kernel))
    else:
        value = (kernel * 0).sum()
    return rounded_up(value, scale, torch.promote_types(weight.dtype, torch.float32)).to(weight.device)


def _room(kernel: Tensor) -> float:
    """What rounding in float64 can take from a bound.

    A sum over `T` taps is off by `(T + 4) eps` relative to the sum of absolute values. So the symbol is off by
    `(T + 4) eps √T ‖K‖_F` in Frobenius norm, and `‖K‖_F ≤ √n sup ‖F‖` for `n` the smaller side. Sums over channels in
    products of `n × m` matrices are off by `m n eps` relative to the square of the norm.
    """
    rows, columns, *sizes = kernel.shape[1:]
    taps, side = prod(sizes), min(rows, columns)
    return 1 + 8 * EPS * ((taps + 4) * sqrt(taps * side) + rows * columns)


def rounded_up(value: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`value · scale`, a power of two, in a dtype, not below."""
    cast = (value * scale).to(dtype)
    if float(cast.detach()) / scale < float(value.detach()):
        above = torch.nextafter(cast.detach(), cast.new_tensor(inf))
        cast = with_gradient(above, cast)
    return cast


def sampling(op: KernelOperator, kernel: Tensor, oversampling: float, own_grid: bool = False) -> tuple[tuple[int, ...], float]:
    """Points per axis, and the factor that makes their maximum a bound.

    Axes of a circular operator are sampled at its own frequencies if these are fewer, or if `own_grid`, without a factor.
    """
    grid = op.frequency_grid
    sizes, factor = [], 1.0
    for axis in range(kernel.ndim - 3):
        others = [a for a in range(kernel.ndim) if a != 3 + axis]
        used = (kernel.detach() != 0).sum(dim=others).nonzero()
        degree = int(used[-1] - used[0])
        size = max(ceil(oversampling * degree), 1)
        if grid is not None and (own_grid or grid[axis][0] <= size):
            size = grid[axis][0]
        else:
            factor /= cos(pi * degree / (2 * size))
        sizes.append(size)
    return tuple(sizes), factor


def squared_lengths(matrices: Tensor) -> Tensor:
    """`‖·‖_F²` of every matrix, in float64."""
    parts = torch.view_as_real(matrices).flatten(-2) if matrices.is_complex() else matrices
    return torch.linalg.vector_norm(parts, dim=-1).double().square().sum(-1)


def matrix_norms(matrices: Tensor) -> Tensor:
    """The norms of a batch of matrices, not below."""
    if min(matrices.shape[1:]) > _SMALL:
        return matrices.new_tensor([grid_norm(matrix[None], ()).upper for matrix in matrices])
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mT
    return torch.linalg.eigvalsh(matrices @ matrices.mT)[:, -1].clamp(min=0).sqrt()


def check_oversampling(oversampling: float) -> None:
    """Refuse what is no number above 1."""
    if not is_number(oversampling) or not oversampling > 1 or not isfinite(oversampling):
        raise ValueError(f"`oversampling` must be a number above 1: grid points over the kernel's degree; got {oversampling!r}.")


def check_steps(steps: int, least: int) -> None:
    """Refuse what is no integer of at least so much."""
    if not is_whole(steps) or steps < least:
        raise ValueError(f"`steps` must be an int, at least {least}; got {steps!r}.")
