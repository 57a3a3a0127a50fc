"""Columns that are orthonormal but for rounding, made so."""

from __future__ import annotations

import torch
from torch import Tensor


def polished(q: Tensor) -> Tensor:
    """`Q (I + E)^(-1/2)` for `QᵀQ = I + E`, up to its third order, held constant in the derivative: takes an error that grows
    with the map's condition to some of its cube."""
    with torch.no_grad():
        error = q.mH @ q
        error.diagonal(dim1=-2, dim2=-1).sub_(1)
        correction = q @ torch.sub(error, error @ error, alpha=0.75)
    return torch.sub(q, correction, alpha=0.5)
