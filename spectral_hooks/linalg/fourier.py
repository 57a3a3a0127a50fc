"""Fourier transforms that take what autograd hands on."""

from __future__ import annotations

import torch
from torch import Tensor


def to_frequencies(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """`rfftn`, of an expanded tensor too: MKL's refuses strides of zero, and many versions of torch hand them on."""
    return torch.fft.rfftn(x.contiguous() if 0 in x.stride() else x, dim=axes)


def from_frequencies(x: Tensor, sizes: tuple[int, ...], axes: tuple[int, ...]) -> Tensor:
    """`irfftn`, whose gradient may be expanded too, as that of a sum is."""
    y = torch.fft.irfftn(x, s=sizes, dim=axes)
    # what a product hands back is never expanded; a trace is the same with gradients and without
    return y * 1 if y.requires_grad or torch.jit.is_tracing() else y
