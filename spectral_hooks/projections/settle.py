"""Scale a weight until its stored values obey a bound."""

from __future__ import annotations

from math import inf, isfinite, prod, sqrt

import torch
from torch import Tensor

from ..linalg.scaling import each, normalized
from ..norms.bracket import TOLERANCE, bracket
from ..norms.groups import lattice_norms
from ..operators.base import KernelOperator

#: Where rounding to the stored dtype can add no more than this share of the bound, room is left for it, and nothing proven again.
_LITTLE_ROUNDING = 1e-4


def fitting(unit: Tensor, scales: Tensor, like: Tensor) -> Tensor:
    """The scales of the groups, smaller where `unit` times them would overflow in the dtype of `like`."""
    largest = unit.unflatten(0, (len(scales), -1)).abs().flatten(1).amax(1)
    return torch.minimum(scales, torch.finfo(like.dtype).max / largest)  # a zero divides to infinity


def in_dtype(unit: Tensor, scales: Tensor, like: Tensor) -> Tensor:
    """`unit` times the scale of each group, which is as by `fitting`, in the dtype and on the device of `like`."""
    limit = torch.finfo(like.dtype).max  # a product may round to a little more
    product = unit.unflatten(0, (len(scales), -1)) * each(scales, unit.ndim)
    return product.flatten(0, 1).clamp(-limit, limit).to(like)


def settle(op: KernelOperator, weight: Tensor, max_norm: float, rtol: float | None = None) -> tuple[Tensor, float]:
    """The weight in the dtype of the operator's, scaled down until the stored values obey the bound, and what bounds their norm.

    By certificates of width `rtol`, chosen by the number of channels if None. A bound so small that no other weight of that dtype
    obeys it gives zeros.
    """
    return settled(op, weight, 1.0, max_norm, rtol)


def settled(op: KernelOperator, unit: Tensor, scale: float, max_norm: float, rtol: float | None = None) -> tuple[Tensor, float]:
    """`settle` of `unit` times `scale`, which together may be beyond the range of any dtype."""
    unit, power = normalized(unit)
    info, (groups, *_) = torch.finfo(op.dtype), op.canonical_shape
    fine, measured = info.eps < TOLERANCE, op.kind == "finite"
    scales = torch.full((groups,), scale * power, dtype=torch.float64, device=unit.device)
    if fine and op.is_pointwise and not measured:
        # a clipped matrix has many equal singular values, which a proof minds less than a measurement
        stored = in_dtype(unit, fitting(unit, scales * (1 - _little_room(op, unit, scales / max_norm)), op.weight), op.weight)
        if bool((lattice_norms(op.with_weight(stored).canonical(), 1e-3, max_norm / op.lattice_factor) < inf).all()):
            return stored, max_norm
    for attempt in range(1, 1000):
        scales = fitting(unit, scales, op.weight)
        stored = in_dtype(unit, scales, op.weight)
        norms = bracket(op.with_weight(stored), rtol).to(unit.device)
        norm = float(norms.amax())
        if norm <= max_norm:
            return stored, norm
        if not isfinite(norm):
            raise ValueError(
                "the norm of `weight` exceeds the largest float64: scale the weight down first; it is left as it is."
            )
        outside = norms > max_norm
        shares = torch.where(outside, scales / norms, 1.0)
        unit = (unit.unflatten(0, (groups, -1)) * each(shares, unit.ndim)).flatten(0, 1)
        scales = torch.where(outside, max_norm, scales)
        rounding, grain = _rounding(op, unit, max_norm), _grain(op, unit, scales)
        if fine and not measured and bool((rounding[outside] <= _LITTLE_ROUNDING).all()):
            scales = torch.where(outside, scales * (1 - rounding), scales)
            return in_dtype(unit, fitting(unit, scales, op.weight), op.weight), max_norm
        margin = (attempt * grain * (4 if fine else 0.25)).clamp(max=0.5)
        scales = torch.where(outside, scales * (1 - margin), scales)
    raise RuntimeError(f"no {op.dtype} weight near this one has norm at most {max_norm}.")


def _little_room(op: KernelOperator, unit: Tensor, scales: Tensor) -> Tensor:
    """What rounding can add to the norm of each matrix, relative to it, or, where many values are large, hardly ever does."""
    lengths = torch.linalg.vector_norm(unit.unflatten(0, (len(scales), -1)).flatten(1), dim=1) * scales
    return torch.finfo(op.dtype).eps * (op.lattice_factor * lengths / 2).clamp(max=4) + 1e-12


def _rounding(op: KernelOperator, unit: Tensor, max_norm: float) -> Tensor:
    """What rounding every entry of `max_norm · unit` to the stored dtype can add to the norm of each group, relative to that.

    At any frequency the Frobenius norm of all that is added, times the root of the number of taps.
    """
    info, (groups, *_, taps) = torch.finfo(op.dtype), (*op.canonical_shape[:3], prod(op.canonical_shape[3:]))
    parts = unit.unflatten(0, (groups, -1)).flatten(1)
    spacing = info.tiny * info.eps * sqrt(parts.shape[1]) / max_norm
    lengths = (info.eps + 1e-15) * torch.linalg.vector_norm(parts, dim=1) + spacing
    return op.lattice_factor * sqrt(taps) * lengths + 1e-12


def _grain(op: KernelOperator, unit: Tensor, scales: Tensor) -> Tensor:
    """How coarse the steps of the dtype are, relative to the largest entry: among its smallest numbers as coarse as that."""
    info = torch.finfo(op.dtype)
    largest = unit.unflatten(0, (len(scales), -1)).abs().flatten(1).amax(1)
    return (info.tiny * info.eps / scales / largest).clamp(min=info.eps)
