"""How large an operator is, and whether it is at most so large: of every group of channels by itself, the cheapest way.

The groups of a grouped convolution are operators of their own. `bracket` answers the first question and `at_most` the second,
which costs less: a proof needs no digits, and only a failing one looks for more.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ..linalg.krylov import seen_above
from ..linalg.precision import at_least_float32
from ..operators.base import KernelOperator
from .groups import grid_norms, lattice_norms
from .spectral_norm import spectral_norm

#: A norm this little above a bound is rounding, and counts as equal to it.
TOLERANCE = 1e-6
#: What a matrix-free norm may lack.
_MATRIX_FREE_ERROR = 1e-5


def bracket(op: KernelOperator, rtol: float | None = None) -> Tensor:
    """For each group a number that its norm does not exceed, as near as pays.

    Guaranteed for matrices, circular and lattice operators; for finite ones as far as the matrix-free norm has converged.

    Args:
        op: any operator with a weight.
        rtol: how much too large a certificate on the lattice may be; None for `usual_rtol`. All others are exact up to
            rounding, or 1e-5 of the norm too large (finite ones).

    Returns:
        `(groups,)`, in float64, on the host.
    """
    form = op.canonical_form()
    match form.kind:
        case "circular":
            return grid_norms(form.kernel, form.sizes)
        case "matrix" | "lattice":
            return form.factor * lattice_norms(form.kernel, rtol or usual_rtol(form.kernel))
    return torch.tensor([_by_products(part) for part in op.each_group()], dtype=torch.float64)


def at_most(op: KernelOperator, max_norm: float) -> Tensor:
    """For which groups the norm is proven to be at most `max_norm`, but for rounding (1e-6 of it).

    The proof can fail within a limit of work, and then the answer is no, for norms nearer to the bound than `usual_rtol`.

    Args:
        op: any operator with a weight.
        max_norm: the bound.

    Returns:
        `(groups,)`, bool, on the host.
    """
    form, level = op.canonical_form(), max_norm * (1 + TOLERANCE)
    match form.kind:
        case "circular":
            return grid_norms(form.kernel, form.sizes) <= level
        case "matrix" if seen_above(form.kernel[0], max_norm):
            return torch.zeros(1, dtype=torch.bool)
        case "matrix" | "lattice":
            return lattice_norms(form.kernel, usual_rtol(form.kernel), level / form.factor) < inf
    everywhere = lattice_norms(form.kernel, usual_rtol(form.kernel), max_norm / form.factor) < inf
    return everywhere if everywhere.all() else everywhere | (bracket(op) <= level)


def usual_rtol(kernel: Tensor) -> float:
    """Relative width of a certificate, which a scaling by it may take too much: 1e-3, up to 1e-2 where it is dear.

    A clipped kernel has its largest singular value at many frequencies; proving that takes some `1 / rtol` of them, at the cube
    of the channels each.
    """
    size = min(kernel.shape[1:3])
    return 1e-3 if size <= 8 else min(2e-3 * max(size / 64, 1.0), 1e-2)


def _by_products(op: KernelOperator) -> float:
    """The matrix-free norm of an operator with one group, raised by what it may lack."""
    # over a power of two, so that a norm between the smallest numbers of the dtype is not rounded to one of them
    unit, scale = op.of_order_one(at_least_float32(op.dtype))
    return float(spectral_norm(unit)) * scale * (1 + _MATRIX_FREE_ERROR)
