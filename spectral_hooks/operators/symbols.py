"""The symbol of a canonical kernel: what a convolution does to one frequency.

A canonical kernel is real, `(groups, rows, columns, *taps)`. Its symbol `F(θ) = Σ_t K[..., t] exp(-i t·θ)` is a complex
`rows × columns` matrix for every group and every `θ ∈ [0, 2π)^d`. The kernel is real, so `F(-θ) = conj F(θ)`: half of
the frequencies tell all.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from math import pi, prod

import torch
from torch import Tensor


def product(axes: Sequence[Tensor], like: Tensor) -> Tensor:
    """The points of a grid with these coordinates per axis, `(n, d)`; one empty point without axes."""
    if not axes:
        return like.new_zeros(1, 0)
    return torch.cartesian_prod(*axes).reshape(-1, len(axes)).to(like)


def symbol(kernel: Tensor, theta: Tensor) -> Tensor:
    """`F(θ)` of every group at frequencies `theta` of shape `(n, d)`: `(n, groups, rows, columns)`, complex.

    One small DFT matmul, exact up to rounding, differentiable.
    """
    positions = product([torch.arange(k) for k in kernel.shape[3:]], theta)
    angles = theta @ positions.T
    taps = kernel.flatten(3) if kernel.ndim > 3 else kernel.unsqueeze(-1)
    flat = taps.movedim(-1, 0).flatten(1)
    values = torch.complex(angles.cos() @ flat, -angles.sin() @ flat)
    return values.unflatten(1, kernel.shape[:3])


def half_plane(sizes: tuple[int, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """One of each pair `±θ` of the grid `2π j / sizes`: frequencies `(n, d)` and how many each stands for, 1 or 2."""
    index = product([torch.arange(n) for n in sizes], torch.empty(0, dtype=torch.long))
    shape = index.new_tensor(sizes)
    place = index.new_tensor([prod(sizes[i + 1 :]) for i in range(len(sizes))])
    here, mirrored = (index * place).sum(1), ((-index % shape) * place).sum(1)
    first = here <= mirrored
    counts = 1 + (here < mirrored)[first].to(torch.float64)
    theta = index[first].to(torch.float64) * (2 * pi) / shape
    return theta.to(like), counts.to(like)


def trim(kernel: Tensor) -> tuple[Tensor, list[int]]:
    """The kernel without its outer taps that are zero and without the axes that then have a single tap; and the axes left.

    Neither changes a singular value: a shift of all taps multiplies the symbol by a number of modulus one.
    """
    axes: list[int] = []
    for axis in range(kernel.ndim - 1, 2, -1):
        others = [a for a in range(kernel.ndim) if a != axis]
        used = (kernel != 0).sum(dim=others).nonzero()
        first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
        kernel = kernel.narrow(axis, first, last - first + 1)
        if kernel.shape[axis] == 1:
            kernel = kernel.squeeze(axis)
        else:
            axes.insert(0, axis - 3)
    return kernel, axes


class Gram:
    """`G(θ) = F(θ) F(θ)*`, or `F(θ)* F(θ)` where that is smaller, as a trigonometric polynomial of its own.

    Its coefficients are the autocorrelation of the kernel, found once: after that a value costs one DFT matmul of
    `(2k - 1)^d` lags instead of a product of two symbols. `R(-l) = R(l)ᵀ`, so half of the lags are kept:
    `G = Σ_l cos(l·θ) (R_l + R_lᵀ) - i sin(l·θ) (R_l - R_lᵀ)`, with `R_0` counted once.
    """

    def __init__(self, kernel: Tensor) -> None:
        taps = tuple(kernel.shape[3:])
        if kernel.shape[1] > kernel.shape[2]:
            kernel = kernel.transpose(1, 2)
        # a Gram polynomial of degree k - 1 is known from 2k - 1 samples per axis
        sizes = tuple(2 * k - 1 for k in taps)
        theta, counts = half_plane(sizes, kernel)
        #: Whether it is real everywhere: that of a matrix, which has no frequencies.
        self.is_real = not taps
        samples = symbol(kernel, theta) if taps else kernel.unsqueeze(0)
        samples = samples @ samples.mH
        lags = product([torch.arange(-(k - 1), k) for k in taps], kernel)
        lags = lags[len(lags) // 2 :]  # the zero lag stands in the middle
        angles = lags @ theta.T
        weights = counts / prod(sizes)
        flat = samples.flatten(1)
        coefficients = (angles.cos() * weights) @ flat.real
        if taps:
            coefficients -= (angles.sin() * weights) @ flat.imag
        coefficients = coefficients.unflatten(1, samples.shape[1:])  # (lags, groups, n, n)
        even = coefficients + coefficients.mT
        even[0] /= 2
        self.lags = lags
        self.even = even.movedim(1, 0).flatten(2).contiguous()  # (groups, lags, n²)
        self.odd = (coefficients - coefficients.mT).movedim(1, 0).flatten(2).contiguous()
        self.size = kernel.shape[1]
        self.groups = kernel.shape[0]
        # |G| is at most the product of the absolute kernels; sums over columns, samples and lags round
        reach = kernel.abs().flatten(3).sum(-1).flatten(1) if taps else kernel.abs().flatten(1)
        longest = kernel.shape[2] + len(theta) + len(lags) + 16
        self.error = longest * torch.finfo(kernel.dtype).eps * float(reach.square().sum(1).amax())

    def single(self) -> Gram:
        """The same polynomial with coefficients in float32, at half the cost; values are off by at most `error` in norm."""
        other = copy.copy(self)
        other.even, other.odd = self.even.float(), self.odd.float()
        # of each entry: two roundings of every term, and one of every partial sum
        terms = self.even.abs().sum(1) + self.odd.abs().sum(1)
        longest = float(torch.linalg.vector_norm(terms, dim=1).amax())
        other.error = self.error + (len(self.lags) + 4) * torch.finfo(torch.float32).eps * longest
        return other

    def __call__(self, group: Tensor, theta: Tensor) -> Tensor:
        """`G(θ)` of `group[i]` at `theta[i]`, `(n, size, size)`, complex Hermitian; real symmetric for a matrix."""
        if self.is_real:
            return self.even[group].unflatten(2, (self.size, self.size)).squeeze(1)
        angles = theta.to(self.lags) @ self.lags.T
        cos, sin = angles.cos().to(self.even), -angles.sin().to(self.even)
        if self.groups == 1:
            real, imag = cos @ self.even[0], sin @ self.odd[0]
        else:
            real = torch.bmm(cos.unsqueeze(1), self.even[group]).squeeze(1)
            imag = torch.bmm(sin.unsqueeze(1), self.odd[group]).squeeze(1)
        return torch.complex(real, imag).unflatten(1, (self.size, self.size))

    def along(self, group: Tensor, theta: Tensor, vector: Tensor) -> Tensor:
        """The polynomial `vᵢ* G(θ) vᵢ` of `group[i]`, for unit vectors, at frequencies `(n, points, d)`: `(n, points)`."""
        outer = (vector.conj().unsqueeze(2) * vector.unsqueeze(1)).flatten(1).unsqueeze(2)
        held = (0 if self.groups == 1 else group,)
        even = (self.even[held] @ outer.real.to(self.even)).squeeze(2)  # (n, lags)
        odd = (self.odd[held] @ outer.imag.to(self.odd)).squeeze(2)
        angles = theta.to(self.lags) @ self.lags.T
        cos, sin = angles.cos().to(self.even), angles.sin().to(self.even)
        return (cos @ even.unsqueeze(2) + sin @ odd.unsqueeze(2)).squeeze(2)
