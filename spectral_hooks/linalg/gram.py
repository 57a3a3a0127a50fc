"""The Gram polynomial `G(θ) = F(θ) F(θ)*` of a kernel, by its coefficients."""

from __future__ import annotations

import copy
from math import ceil, inf, pi, prod

import torch
from torch import Tensor

from .precision import float32_is_kept
from .symbols import half_plane, product, symbol, symmetric_product

#: Up to so many entries the matrices of several groups are found by one batched product.
_FEW_ENTRIES = 64
#: Groups with fewer frequencies than this, on the average, share one batched product.
_FEW_FREQUENCIES = 16
#: Up to so many lags a block of one group is one product.
_FEW_WOVEN = 32
#: Up to so many lags their norms are bounded by products.
_FEW_LAGS = 64


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
        self.taps = taps
        self.lags = lags
        self.even = even.movedim(1, 0).flatten(2).contiguous()  # (groups, lags, n²)
        self.odd = (coefficients - coefficients.mT).movedim(1, 0).flatten(2).contiguous()
        self.size = kernel.shape[1]
        self.groups = kernel.shape[0]
        self._blocks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        # |G| is at most the product of the absolute kernels; sums over columns, samples and lags round
        reach = kernel.abs().flatten(3).sum(-1).flatten(1) if taps else kernel.abs().flatten(1)
        turns = sum(2 * k - 2 for k in taps)  # an angle `l·θ` is off by an eps of each
        longest = kernel.shape[2] + len(theta) + len(lags) + 16 + ceil(2 * pi) * turns
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

    def extent(self) -> tuple[Tensor, Tensor]:
        """Between which numbers all eigenvalues lie, at all frequencies: those of the mean, less and plus the norms of all lags.

            λ_min(R_0) - Σ_l ‖R_l‖ ≤ λ(G(θ)) ≤ λ_max(R_0) + Σ_l ‖R_l‖,   l ≠ 0

        Both for every group, `(groups,)`; 0 and infinity where the sum is too large to tell anything. Nearly flat spectra, as
        those of orthogonal kernels, need no other proof.
        """
        size, eps = self.size, torch.finfo(self.even.dtype).eps
        mean = self.even[:, 0].unflatten(1, (size, size))
        # `R_l exp(-i l·θ)` and its adjoint are `cos E - i sin O` together: the norm is at most the larger of theirs
        others = torch.maximum(*(torch.linalg.vector_norm(x[:, 1:], dim=2) for x in (self.even, self.odd)))
        low, high = torch.zeros_like(others[:, 0]), torch.full_like(others[:, 0], inf)
        near = (others.sum(1) < mean.diagonal(dim1=1, dim2=2).mean(1)).nonzero().flatten()
        for group in near.tolist():
            sums = others[group]
            if len(sums) <= _FEW_LAGS:
                # 2 ‖R‖ ≤ 2 ‖R Rᵀ‖_F^½ is closer where many singular values are of one size
                lags = ((self.even[group, 1:] + self.odd[group, 1:]) / 2).unflatten(1, (size, size))
                closer = 2 * torch.linalg.vector_norm((lags @ lags.mT).flatten(1), dim=1).sqrt()
                sums = torch.minimum(sums, closer * (1 + size**1.5 * eps))
            values = torch.linalg.eigvalsh(mean[group])
            width = sums.sum() * (1 + size**2 * eps) + 4 * size * eps * values[-1] + self.error
            low[group], high[group] = (values[0] - width).clamp(min=0), values[-1] + width
        return low, high

    @property
    def _is_woven(self) -> bool:
        """Whether real and imaginary parts of a block come from one product, beside each other as complex numbers have them.

        That takes twice the products, with zeros, which round nothing, and saves two passes and new memory for each.
        """
        return self.groups == 1 and not self.is_real and len(self.lags) <= _FEW_WOVEN

    @property
    def bytes_each(self) -> int:
        """Held for a value while it is found: the matrix, and the waves of all lags."""
        return 2 * self.even.element_size() * self.even.shape[2] + 5 * self.lags.element_size() * len(self.lags)

    def _waves(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """`cos(l·θ)` and `sin(l·θ)` of all lags, for `theta` of shape `(*n, d)`: `(*n, lags)`."""
        theta = theta.to(self.lags)
        if len(self.lags) <= _FEW_LAGS:
            angles = theta @ self.lags.T
            return angles.cos(), angles.sin()
        # products of the waves of each axis are far cheaper than cosines
        waves = theta.new_ones(*theta.shape[:-1], 1, dtype=theta.dtype.to_complex())
        for axis, k in enumerate(self.taps):
            places = torch.arange(0 if axis == 0 else 1 - k, k).to(theta)
            wave = torch.polar(theta.new_ones(1), theta[..., axis, None] * places)
            waves = (waves.unsqueeze(-1) * wave.unsqueeze(-2)).flatten(-2)
        waves = waves[..., -len(self.lags) :]
        return waves.real, waves.imag

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
            even, odd = (x.unflatten(2, (self.size, self.size))[..., start:end, start:].flatten(2) for x in (self.even, self.odd))
            if self._is_woven:
                zero = torch.zeros_like(even[0])
                even = torch.cat([torch.stack([even[0], zero], -1), torch.stack([zero, odd[0]], -1)]).flatten(1)
            self._blocks[start, end] = even, odd
        even, odd = self._blocks[start, end]
        if self._is_woven:
            cos, sin = self._waves(theta)
            return torch.view_as_complex((torch.cat([cos, -sin], -1).to(even) @ even).unflatten(1, (*shape, 2)))
        if self.is_real:
            return even[group].unflatten(2, shape).squeeze(1)
        return self._combine(even, odd, group, theta).unflatten(1, shape)

    def _combine(self, even: Tensor, odd: Tensor, group: Tensor, theta: Tensor) -> Tensor:
        """`Σ_l cos(l·θ) even_l - i sin(l·θ) odd_l` of entries in a row."""
        cos, sin = self._waves(theta)
        cos, sin = cos.to(even), -sin.to(even)
        if self.groups == 1:
            return torch.complex(cos @ even[0], sin @ odd[0])
        present, counts = group.unique_consecutive(return_counts=True)
        if even.shape[2] <= _FEW_ENTRIES and len(group) < _FEW_FREQUENCIES * len(present):
            real = torch.bmm(cos.unsqueeze(1), even[group]).squeeze(1)
            return torch.complex(real, torch.bmm(sin.unsqueeze(1), odd[group]).squeeze(1))
        # a product for each group, without copies of its coefficients for every frequency
        parts = zip(present.tolist(), cos.split(counts.tolist()), sin.split(counts.tolist()), strict=True)
        return torch.cat([torch.complex(c @ even[g], s @ odd[g]) for g, c, s in parts])

    def along(self, group: Tensor, theta: Tensor, vector: Tensor) -> Tensor:
        """The polynomial `vᵢ* G(θ) vᵢ` of `group[i]`, for unit vectors, at frequencies `(n, points, d)`: `(n, points)`."""
        outer = (vector.conj().unsqueeze(2) * vector.unsqueeze(1)).flatten(1).unsqueeze(2)
        held = (0 if self.groups == 1 else group,)
        even = (self.even[held] @ outer.real.to(self.even)).squeeze(2)  # (n, lags)
        odd = (self.odd[held] @ outer.imag.to(self.odd)).squeeze(2)
        cos, sin = (wave.to(self.even) for wave in self._waves(theta))
        return (cos @ even.unsqueeze(2) + sin @ odd.unsqueeze(2)).squeeze(2)
