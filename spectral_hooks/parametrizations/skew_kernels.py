"""Skew-symmetric kernels `J`, and the polynomial of them whose modulus is one: an orthogonal map under zero padding.

Zero padding keeps the convolution with a kernel `K` minus its adjoint, the flipped kernel with channels swapped, skew-symmetric.
Its eigenvalues are imaginary, `iω`, and a certified bound keeps them in `[-i, i]`, where `|p(iω)| = 1`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import asinh, cosh, pi, prod, sin, sinh, sqrt

import torch
from torch import Tensor

from ..linalg.precision import widest
from ..linalg.symbols import half_plane, symbol
from ..norms.quick import quick, sampling_grid
from ..operators import ConvOperator
from ..operators.padding import pad
from .geometry import CONV, Unstrided

#: How far, below one, the squared modulus of the polynomial may fall: half of it is seen in a singular value, about as much as a
#: few convolutions round in float32. The angle that a degree reaches grows only like a root of it.
_RIPPLE = 6e-6
#: Squarings of a symbol before its length is taken: with `n` rows at most `n^(1/64)` times the norm, 1.07 for 64.
_SQUARINGS = 5


def modulus_one(degree: int, ripple: float = _RIPPLE) -> list[float]:
    """Coefficients, ascending, of a real polynomial with `p(0) = 1` and `|p(iω)|² = 1` up to `ripple` for `|ω| ≤ 1`.

    `|p(iω)|² ∝ 1 + ε² T(ω)²` with Chebyshev's polynomial `T`: among all of its degree whose modulus deviates no more, the one
    with the largest leading coefficient. Its roots lie on an ellipse in the left half-plane. An odd degree has its smallest
    modulus, an even one its largest at 0, so the ripple is above one, or below.
    """
    spread = asinh(sqrt((1 - ripple) / ripple)) / degree
    coefficients = [1.0]
    for k in range(1, degree + 1, 2):
        angle = k * pi / (2 * degree)
        real, imaginary = -sinh(spread) * sin(angle), cosh(spread) * sin(pi / 2 - angle)
        # the root and its conjugate; the one in the middle of an odd degree is real
        factor = [-real, 1.0] if k == degree else [real**2 + imaginary**2, -2 * real, 1.0]
        product = [0.0] * (len(coefficients) + len(factor) - 1)
        for i, a in enumerate(coefficients):
            for j, b in enumerate(factor):
                product[i + j] += a * b
        coefficients = product
    return [c / coefficients[0] for c in coefficients]


def ratios(degree: int) -> list[float]:
    """Of neighbouring coefficients of `modulus_one`: what Horner's rule multiplies by."""
    return [after / before for before, after in pairwise(modulus_one(degree))]


def horner(x: Tensor, generator: Tensor, steps: Sequence[float], geometry: Unstrided, groups: int) -> Tensor:
    """`p(J) x`, a convolution per degree. With the negative of the steps `p(-J) x = p(J)ᵀ x`.

    Args:
        x: `(batch, channels, *size)`.
        generator: kernel of `J`, as `skew_kernel` gives it.
        steps: as `ratios` gives them.
        geometry: its radius, dilation and padding mode.
        groups: of the channels.
    """
    conv, dilation = CONV[geometry.dims], geometry.dilation
    reach = tuple(radius * dilation for radius in geometry.radius)
    circular = geometry.padding_mode == "circular"
    result = x
    for step in reversed(steps):
        if circular:
            result = pad(result, "circular", tuple((amount, amount) for amount in reach))
        result = conv(result, generator * step, None, 1, 0 if circular else reach, dilation, groups).add_(x)
    return result


def skew_kernel(kernel: Tensor) -> Tensor:
    """The kernel of `J = α (M - Mᵀ)`, no longer than 1, `(groups · n, n, *taps)`, for kernels of `M`, `(groups, n, n, *taps)`."""
    kernel = kernel - kernel.transpose(1, 2).flip(tuple(range(3, kernel.ndim)))
    return kernel.flatten(0, 1) / skew_bound(kernel).clamp(min=1.0).to(kernel.dtype)


def skew_bound(kernel: Tensor) -> Tensor:
    """An upper bound of the norm of skew kernels of stride 1, `(groups, n, n, *taps)`; 0-d. On the grid that `quick` takes,

        max_θ ‖J(θ)‖ ≤ factor · max_{θ on the grid} ‖J(θ)^(2^t)‖_F^(1 / 2^t),

    since `J(θ)` is normal: matrix products in place of its eigenvalues. Without a grid, `quick`. The derivative is that at the
    winner.
    """
    sizes, factor = sampling_grid(kernel)
    if not sizes:
        radius = [k // 2 for k in kernel.shape[3:]]
        return quick(ConvOperator(kernel.flatten(0, 1), padding=radius, groups=len(kernel)))
    theta, _ = half_plane(tuple(sizes), kernel)
    with torch.no_grad():
        index = _powered(kernel, theta).argmax().reshape(1)
    group, place = index % len(kernel), torch.div(index, len(kernel), rounding_mode="floor")
    n = kernel.shape[1]
    # of every squaring: the Frobenius norm is at most √n times the norm, and a sum of n products rounds n times
    rounding = 1 + 4 * n * (n + prod(kernel.shape[3:])) * torch.finfo(kernel.dtype).eps
    return _powered(kernel.index_select(0, group), theta.index_select(0, place)).squeeze(0) * (factor * rounding)


def _powered(kernel: Tensor, theta: Tensor) -> Tensor:
    """`‖J(θ)^(2^t)‖_F^(1 / 2^t)`, for every frequency and group."""
    taps = prod(kernel.shape[3:])
    # the largest norm of the symbol lies between the Frobenius norm over √n and times √taps, so no power overflows
    length = torch.linalg.vector_norm(kernel.detach().flatten(1), dim=1, dtype=widest(kernel.device)).amax()
    scale = (length * (taps / kernel.shape[1]) ** 0.25).clamp(min=torch.finfo(kernel.dtype).tiny)
    power = symbol(kernel / scale.to(kernel.dtype), theta).flatten(0, 1)
    for _ in range(_SQUARINGS):
        power = power @ power
    parts = torch.view_as_real(power).flatten(1)
    lengths = torch.linalg.vector_norm(parts, dim=1, dtype=widest(parts.device))
    # a root has no derivative at zero
    return lengths.clamp(min=torch.finfo(lengths.dtype).tiny).pow(2.0**-_SQUARINGS) * scale
