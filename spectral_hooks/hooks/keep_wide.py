"""Keep wide kernels inside: those whose proofs and decompositions cost seconds, so that each is to be used well.

A kernel that moves by more in a step than its clip leaves room for is clipped at once, by what the last clip knows of its large
singular values, and then proven to be inside: one proof a step. One that moves more slowly, or was never clipped so, is first
tried to be proven as it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ..linalg.precision import exact, float32_is_kept
from ..norms.proofs import certificates
from ..operators.base import KernelOperator
from ..projections.leading import clip_leading
from .watch import Job, Known

#: From how many channels on, of the side that has fewer.
_WIDE_FROM = 48
#: A kernel that moves by more than this share of its depth is hardly ever inside as it is.
_HOPELESS = 0.5
#: What is tried where the clip is not proven to be inside: to scale it by a share of the depth.
_SCALINGS = (0.0, 0.25, 0.25)


def is_wide(kernels: Tensor) -> bool:
    """Whether canonical kernels are worth subspaces of their own."""
    return min(kernels.shape[1:3]) >= _WIDE_FROM and kernels.shape[3:].numel() > 1


def kept_wide(job: Job, kernel: Tensor, pace: float, depth: float, max_norm: float) -> Job | None:
    """The job, proven to be inside, or with its clip; None if it has more than a few singular values above the depth.

    Args:
        job: of a lattice operator that has moved from what is known.
        kernel: its canonical kernel.
        pace: by how much it moves in a step at most, relative to the bound.
        depth: how deep to clip it, relative to the bound.
    """
    leading = None if job.known is None else job.known.leading
    slow = pace <= _HOPELESS * depth or (job.known is not None and job.known.age > 0)
    if (slow or leading is None) and (norm := _certified(job.op, kernel, pace, depth, max_norm)) <= max_norm:
        return job.proven(norm)
    kept = None if leading is None else _clipped(job, kernel, pace, depth, max_norm, leading)
    return kept or _clipped(job, kernel, pace, depth, max_norm, None)


def _clipped(job: Job, kernel: Tensor, pace: float, depth: float, max_norm: float, leading: Tensor | None) -> Job | None:
    """The job with its clip, proven to be inside, from what the last one knew; None where that is not found."""
    op, unit = job.op, max_norm / job.op.lattice_factor
    scaled = (exact(kernel) / unit).to(torch.float32 if float32_is_kept() else torch.float64)
    found = clip_leading(op, scaled, 1 - depth, leading)
    if found is None:
        return None
    change = scaled - found.kernel
    if not bool(change.any()):  # nothing is seen above the depth
        norm = _certified(op, kernel, pace, depth, max_norm)
        return job.proven(norm) if norm <= max_norm else None
    weight = exact(op.weight) - op.from_canonical(exact(change)) * unit
    for share in _SCALINGS:
        weight = weight * (1 - share * depth)
        stored = _stored(op, weight)
        norm = _certified(stored, stored.canonical(), pace, depth, max_norm)
        if norm <= max_norm:
            job = job.changed(stored.weight, norm)
            return replace(job, known=cast(Known, job.known)._replace(leading=found.vectors))
    return None


def _stored(op: KernelOperator, weight: Tensor) -> KernelOperator:
    """The operator of this weight in its own dtype: an entry can grow beyond its largest number."""
    largest = torch.finfo(op.dtype).max
    return op.with_weight(weight.clamp(-largest, largest).to(op.weight))


def _certified(op: KernelOperator, kernel: Tensor, pace: float, depth: float, max_norm: float) -> float:
    """What the norm is proven not to exceed, at most the bound, or infinity."""
    relative = exact(kernel) * (op.lattice_factor / max_norm)
    paces, depths = (torch.full((len(kernel),), x, dtype=torch.float64) for x in (pace, depth))
    return float(certificates(relative, paces, depths)[1].amax()) * max_norm
