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

from .base import float32_is_kept

#: Up to so many entries the matrices of several groups are found by one batched product.
_FEW_ENTRIES = 64
#: A symmetric product is made of so many blocks of rows, each of this size at least.
_PANELS, _LEAST_PANEL = 8, 128


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
    kept = (prod(sizes) + prod(2 if n % 2 == 0 else 1 for n in sizes)) // 2
    first = (here > mirrored).to(torch.uint8).argsort(stable=True)[:kept]
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
        if taps:
            samples = symbol(kernel, theta)
            real, imag = samples.real.contiguous(), samples.imag.contiguous()
            mixed = imag @ real.mT
            squares, mixed = (real @ real.mT + imag @ imag.mT), mixed - mixed.mT
        else:
            squares = symmetric_product(kernel).unsqueeze(0)
        lags = product([torch.arange(-(k - 1), k) for k in taps], kernel)
        lags = lags[len(lags) // 2 :]  # the zero lag stands in the middle
        angles = lags @ theta.T
        weights = counts / prod(sizes)
        coefficients = (angles.cos() * weights) @ squares.flatten(1)
        if taps:
            coefficients -= (angles.sin() * weights) @ mixed.flatten(1)
        coefficients = coefficients.unflatten(1, squares.shape[1:])  # (lags, groups, n, n)
        even = coefficients + coefficients.mT
        even[0] /= 2
        self.lags = lags
        self.even = even.movedim(1, 0).flatten(2).contiguous()  # (groups, lags, n²)
        self.odd = (coefficients - coefficients.mT).movedim(1, 0).flatten(2).contiguous()
        self.size = kernel.shape[1]
        self.groups = kernel.shape[0]
        self._blocks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        # |G| is at most the product of the absolute kernels; sums over columns, samples and lags round
        reach = kernel.abs().flatten(3).sum(-1).flatten(1) if taps else kernel.abs().flatten(1)
        longest = kernel.shape[2] + len(theta) + len(lags) + 16
        self.error = longest * torch.finfo(kernel.dtype).eps * float(reach.square().sum(1).amax())

    def single(self) -> Gram:
        """The same polynomial with coefficients in float32, at half the cost; values are off by at most `error` in norm.

        Itself where float32 products are less than that.
        """
        if not float32_is_kept():
            return self
        other = copy.copy(self)
        other.even, other.odd = self.even.float(), self.odd.float()
        other._blocks = {}
        # of each entry: two roundings of every term, and one of every partial sum
        terms = self.even.abs().sum(1) + self.odd.abs().sum(1)
        longest = float(torch.linalg.vector_norm(terms, dim=1).amax())
        other.error = self.error + (len(self.lags) + 4) * torch.finfo(torch.float32).eps * longest
        return other

    def some(self, index: Tensor, scale: Tensor) -> Gram:
        """The polynomials of these groups, each over its `scale`."""
        other = copy.copy(self)
        other.even, other.odd = (x[index] / scale[:, None, None] for x in (self.even, self.odd))
        other.groups, other.error = len(index), self.error / float(scale.amin())
        other._blocks = {}
        return other

    @property
    def dtype(self) -> torch.dtype:
        """That of the values."""
        return self.even.dtype if self.is_real else self.even.dtype.to_complex()

    def __call__(self, group: Tensor, theta: Tensor) -> Tensor:
        """`G(θ)` of `group[i]` at `theta[i]`, `(n, size, size)`, complex Hermitian; real symmetric for a matrix."""
        if self.is_real:
            return self.even[group].unflatten(2, (self.size, self.size)).squeeze(1)
        return self._combine(self.even, self.odd, group, theta).unflatten(1, (self.size, self.size))

    def block(self, group: Tensor, theta: Tensor, start: int, end: int) -> Tensor:
        """Rows `start` to `end` of the same, from the diagonal block on to the right: `(n, end - start, size - start)`."""
        shape = (end - start, self.size - start)
        if (start, end) not in self._blocks:
            whole = (x.unflatten(2, (self.size, self.size))[..., start:end, start:] for x in (self.even, self.odd))
            self._blocks[start, end] = tuple(x.flatten(2) for x in whole)
        even, odd = self._blocks[start, end]
        if self.is_real:
            return even[group].unflatten(2, shape).squeeze(1)
        return self._combine(even, odd, group, theta).unflatten(1, shape)

    def _combine(self, even: Tensor, odd: Tensor, group: Tensor, theta: Tensor) -> Tensor:
        """`Σ_l cos(l·θ) even_l - i sin(l·θ) odd_l` of entries in a row."""
        angles = theta.to(self.lags) @ self.lags.T
        cos, sin = angles.cos().to(even), -angles.sin().to(even)
        if self.groups == 1:
            return torch.complex(cos @ even[0], sin @ odd[0])
        if even.shape[2] <= _FEW_ENTRIES:
            real = torch.bmm(cos.unsqueeze(1), even[group]).squeeze(1)
            return torch.complex(real, torch.bmm(sin.unsqueeze(1), odd[group]).squeeze(1))
        # a product for each group, without copies of its coefficients for every frequency
        present, counts = group.unique_consecutive(return_counts=True)
        parts = zip(present.tolist(), cos.split(counts.tolist()), sin.split(counts.tolist()), strict=True)
        return torch.cat([torch.complex(c @ even[g], s @ odd[g]) for g, c, s in parts])

    def along(self, group: Tensor, theta: Tensor, vector: Tensor) -> Tensor:
        """The polynomial `vᵢ* G(θ) vᵢ` of `group[i]`, for unit vectors, at frequencies `(n, points, d)`: `(n, points)`."""
        outer = (vector.conj().unsqueeze(2) * vector.unsqueeze(1)).flatten(1).unsqueeze(2)
        held = (0 if self.groups == 1 else group,)
        even = (self.even[held] @ outer.real.to(self.even)).squeeze(2)  # (n, lags)
        odd = (self.odd[held] @ outer.imag.to(self.odd)).squeeze(2)
        angles = theta.to(self.lags) @ self.lags.T
        cos, sin = angles.cos().to(self.even), angles.sin().to(self.even)
        return (cos @ even.unsqueeze(2) + sin @ odd.unsqueeze(2)).squeeze(2)
