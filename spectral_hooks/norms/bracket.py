"""How large an operator is, and whether it is at most so large: of every group of channels by itself, the cheapest way.

The groups of a grouped convolution are operators of their own. `bracket` answers the first question and `at_most` the second,
which costs less: a proof needs no digits, and only a failing one looks for more.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import torch
from torch import Tensor

from ..linalg import taps
from ..linalg.krylov import seen_above
from ..linalg.precision import at_least_float32, exact
from ..linalg.scaling import check_finite, check_has_values
from ..operators.base import KernelOperator, Kind
from .groups import grid_norms, lattice_norms
from .proofs import certificates
from .spectral_norm import spectral_norm

#: A norm this little above a bound is rounding, and counts as equal to it.
TOLERANCE = 1e-6
#: A norm that is seen in float32 this much above a level is above it.
_SEEN_ABOVE = 1.001
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
    return _BRACKETS[op.kind](op, rtol)


def at_most(op: KernelOperator, max_norm: float) -> Tensor:
    """For which groups the norm is proven to be at most `max_norm`, but for rounding (1e-6 of it).

    The proof can fail within a limit of work, and then the answer is no, for norms nearer to the bound than `usual_rtol`.

    Args:
        op: any operator with a weight.
        max_norm: the bound.

    Returns:
        `(groups,)`, bool, on the host.
    """
    check_has_values(op.weight)
    return _PROOFS[op.kind](op, max_norm * (1 + TOLERANCE))


def usual_rtol(kernel: Tensor) -> float:
    """Relative width of a certificate, which a scaling by it may take too much: 1e-3, up to 1e-2 where it is dear.

    A clipped kernel has its largest singular value at many frequencies; proving that takes some `1 / rtol` of them, at the cube
    of the channels each.
    """
    size = min(kernel.shape[1:3])
    return 1e-3 if size <= 8 else min(2e-3 * max(size / 64, 1.0), 1e-2)


def _bracket_circular(op: KernelOperator, rtol: float | None) -> Tensor:
    form = op.canonical_form()
    return grid_norms(form.kernel, form.sizes)


def _bracket_lattice(op: KernelOperator, rtol: float | None) -> Tensor:
    form = op.canonical_form()
    return form.factor * lattice_norms(form.kernel, rtol or usual_rtol(form.kernel))


def _bracket_finite(op: KernelOperator, rtol: float | None) -> Tensor:
    """The matrix-free norms of the groups, raised by what they may lack."""
    norms = []
    for part in op.each_group():
        # over a power of two, so that a norm between the smallest numbers of the dtype is not rounded to one of them
        unit, scale = part.of_order_one(at_least_float32(op.dtype))
        norms.append(float(spectral_norm(unit)) * scale * (1 + _MATRIX_FREE_ERROR))
    return torch.tensor(norms, dtype=torch.float64)


def _prove_matrix(op: KernelOperator, level: float) -> Tensor:
    return torch.zeros(1, dtype=torch.bool) if seen_above(op.canonical()[0], level) else _prove_lattice(op, level)


def _prove_circular(op: KernelOperator, level: float) -> Tensor:
    """By what is quickly seen of each group, and where it is near the level by the norm."""
    check_finite(op.weight)
    form = op.canonical_form()
    kernel, free = form.kernel.detach(), torch.zeros(len(form.kernel), dtype=torch.float64)
    estimate, proven = certificates(exact(kernel) / level, free, free, form.sizes)
    inside = proven <= 1
    near = ~inside & (estimate <= _SEEN_ABOVE)
    if near.any():
        inside[near] = grid_norms(kernel[near.to(kernel.device)], form.sizes) <= level
    return inside


def _prove_lattice(op: KernelOperator, level: float) -> Tensor:
    form = op.canonical_form()
    seen = taps.seen_above(form.kernel, level / form.factor).cpu()
    if seen.all():
        return ~seen
    return (lattice_norms(form.kernel, usual_rtol(form.kernel), level / form.factor) < inf) & ~seen


def _prove_finite(op: KernelOperator, level: float) -> Tensor:
    """By what bounds it at every size, and where that is too large by itself."""
    everywhere = _prove_lattice(op, level)
    return everywhere if everywhere.all() else everywhere | (_bracket_finite(op, None) <= level)


#: How a norm is found, and how it is proven not to exceed a level, by the kind of operator.
_BRACKETS: dict[Kind, Callable[[KernelOperator, float | None], Tensor]] = {
    "matrix": _bracket_lattice,
    "circular": _bracket_circular,
    "lattice": _bracket_lattice,
    "finite": _bracket_finite,
}
_PROOFS: dict[Kind, Callable[[KernelOperator, float], Tensor]] = {
    "matrix": _prove_matrix,
    "circular": _prove_circular,
    "lattice": _prove_lattice,
    "finite": _prove_finite,
}
