"""The symbol of a kernel, `F(θ) = Σ_t K_t exp(-i t·θ)`, and the frequencies at which it is taken."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi, prod

import torch
from torch import Tensor

from .memory import at_once

#: A symmetric product is made of so many blocks of rows, each of this size at least.
_PANELS, _LEAST_PANEL = 8, 128


def product(axes: Sequence[Tensor], like: Tensor) -> Tensor:
    """The points of a grid with these coordinates per axis, `(n, d)`; one empty point without axes."""
    if not axes:
        return like.new_zeros(1, 0)
    return torch.cartesian_prod(*axes).reshape(-1, len(axes)).to(like)


def symbol(kernel: Tensor, theta: Tensor) -> Tensor:
    """`F(θ)` of every group at frequencies `theta` of shape `(n, d)`: `(n, groups, rows, columns)`, complex.

    One small DFT matmul, exact up to rounding, differentiable. Of a kernel in float32 at frequencies in float64 too.
    """
    positions = product([torch.arange(k) for k in kernel.shape[3:]], theta)
    some = at_once(3 * theta.element_size() * len(positions))
    if len(theta) > some:
        return torch.cat([symbol(kernel, part) for part in theta.split(some)])
    angles = theta @ positions.T
    taps = kernel.flatten(3) if kernel.ndim > 3 else kernel.unsqueeze(-1)
    flat = taps.movedim(-1, 0).flatten(1)
    values = torch.complex(angles.cos().to(flat) @ flat, -angles.sin().to(flat) @ flat)
    return values.unflatten(1, kernel.shape[:3])


def symmetric_product(matrices: Tensor) -> Tensor:
    """`M Mᵀ` by blocks of rows, each with those from it on: little more than half of the products."""
    size = matrices.shape[-2]
    panel = max(-(-size // _PANELS), _LEAST_PANEL)
    squares = matrices.new_empty(*matrices.shape[:-1], size)
    for start in range(0, size, panel):
        end = min(start + panel, size)
        squares[..., start:end, start:] = matrices[..., start:end, :] @ matrices[..., start:, :].mT
        squares[..., end:, start:end] = squares[..., start:end, end:].mT
    return squares


def half_plane(sizes: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """One of each pair `±θ` of the grid `2π j / sizes`: frequencies `(n, d)` and how many each stands for, 1 or 2."""
    index = product([torch.arange(n) for n in sizes], torch.empty(0, dtype=torch.long))
    shape = index.new_tensor(sizes)
    place = index.new_tensor([prod(sizes[i + 1 :]) for i in range(len(sizes))])
    here, mirrored = (index * place).sum(1), ((-index % shape) * place).sum(1)
    # a frequency is its own mirror image if each component is 0 or π; so many are kept, for a compiler wants to know
    kept = (prod(sizes) + prod([2 if n % 2 == 0 else 1 for n in sizes])) // 2
    first = (here > mirrored).to(torch.uint8).argsort(stable=True)[:kept]
    counts = 1 + (here < mirrored)[first].to(torch.float64)
    theta = index[first].to(torch.float64) * (2 * pi) / shape
    return theta.to(like), counts.to(like)


def trim(kernel: Tensor) -> tuple[Tensor, list[int]]:
    """The kernel without its outer taps that are zero and without the axes that then have a single tap; and the axes left.

    Neither changes a singular value: a shift of all taps of a group multiplies its symbol by a number of modulus one. So the taps
    of every group start at the corner, wherever they were.
    """
    axes: list[int] = []
    for axis in range(kernel.ndim - 1, 2, -1):
        if kernel.shape[axis] > 1 and all(bool((kernel.select(axis, end) != 0).flatten(1).any(1).all()) for end in (0, -1)):
            axes.insert(0, axis - 3)  # as most are: nothing is zero all over, and nothing is copied
            continue
        others = [a for a in range(1, kernel.ndim) if a != axis]
        used = (kernel != 0).sum(dim=others) > 0 if others else kernel != 0  # (groups, taps)
        places = torch.arange(kernel.shape[axis], device=kernel.device)
        first = torch.where(used, places, len(places)).amin(1).clamp(max=len(places) - 1)
        last = torch.where(used, places, 0).amax(1)
        spread = int((last - first).clamp(min=0).amax()) if len(kernel) else 0
        # what is taken from beyond the end is zero wherever it comes from
        index = (first.unsqueeze(1) + places[: spread + 1]) % len(places)
        shape = [len(kernel), *(1,) * (kernel.ndim - 1)]
        shape[axis] = spread + 1
        kernel = kernel.take_along_dim(index.reshape(shape), dim=axis)
        if spread == 0:
            kernel = kernel.squeeze(axis)
        else:
            axes.insert(0, axis - 3)
    return kernel, axes
