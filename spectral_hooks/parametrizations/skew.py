"""Orthogonal convolutions under zero padding: a polynomial of a skew-symmetric convolution whose modulus is one."""

from __future__ import annotations

from itertools import pairwise
from math import asinh, cosh, pi, prod, sin, sinh, sqrt

import torch
from torch import Tensor, nn

from ..linalg.precision import widest
from ..linalg.symbols import half_plane, symbol
from ..norms.quick import quick, sampling_grid
from ..operators import ConvOperator
from ..operators.padding import pad
from .modules import CONV, OrthogonalConv
from .stiefel import held

#: How far, below one, the squared modulus of the polynomial may fall.
_RIPPLE = 6e-6
#: Beyond, coefficients are so large that rounding in float32 is no longer small against the ripple.
_HIGHEST_DEGREE = 8
#: Squarings of a symbol before its length is taken: with `n` rows at most `n^(1/64)` times the norm, 1.07 for 64.
_SQUARINGS = 5
#: Singular values below this share of the largest one count as this in a derivative by them; where even that is tiny, as one.
_SMALLEST, _TINY = 1e-4, 1e-12


def skew(layer: nn.modules.conv._ConvNd, *, degree: int = 4) -> SkewConv:
    """Replace a convolution by an orthogonal one of the same shapes, orthogonal under zero padding too.

        A = p(J) C,   J = α (M Cᵀ - C Mᵀ),   |p(iω)| = 1 for |ω| ≤ 1,

    `M` the convolution with the layer's kernel and `Mᵀ` its adjoint: the flipped kernel, channels swapped. Zero padding keeps `J`
    skew, so its eigenvalues are imaginary, `iω`. `α = min(1, 1 / bound(J))` keeps them in `[-i, i]` by a certified bound.

    With as many outputs as inputs times strides `C` is the identity, or space to depth. Else it is the convolution of patches as
    large as the stride, with orthonormal rows or columns, that is nearest to `M`: the polar factor of the taps which `M` has
    there, as a matrix outputs × (inputs · strides). So what is exponentiated has the channels and the size of the output.

    In place of a truncated exponential `Σ Jᵗ / t!`, whose error `‖J‖^{T+1} / (T+1)!` asks for 8 terms up to an angle of 1 and for
    16 up to π, `p` is the polynomial whose modulus stays nearest to one: the denominator of Chebyshev's low-pass filter. Its
    phase, the angle by which `A` turns, is close to linear in `ω` like the exponential's, and reaches per degree

        3: 0.43   4: 0.98   5: 1.71   6: 2.56   7: 3.51   8: 4.54

    Guaranteed: all singular values of `A` lie in `1 ± 3e-6`, up to the rounding of the dtype, in training and evaluation, for
    every weight and at every input size, with `AᵀA = I`, or `AAᵀ = I` where outputs are fewer than inputs times strides. For even
    degrees none exceeds one.

    Args:
        layer: an `nn.Conv1d/2d/3d` with zero or circular padding that keeps the size, or divides it by the stride. The parameters
            become those of the result, under the same names and in the same shapes, so plain checkpoints load.
        degree: of `p`, from 2 to 8: as many convolutions, for as large an angle.

    Returns:
        The module to put in the place of the layer: `model.conv = skew(model.conv)`. The stride must divide the input size.

    Cost: `degree` convolutions of outputs by outputs channels without stride, at the size of the output; that of `C`; and in
    training a bound, and the singular value decomposition for `C`. In evaluation without gradients, uncompiled, these are
    remembered while the weight stays the same. The bound is 3 % to 17 % too high for random kernels of up to 64 outputs, and at
    most 25 %; beyond, it is twice too high for a random kernel, and the largest angle half as large.

    Raises:
        TypeError: `layer` is no convolution.
        ValueError: `degree` out of range, the layer changes the size by more than its stride, or its weight is no parameter.
        NotImplementedError: transposed, reflect or replicate padding, dilation together with a stride or an even kernel.

    Example:
        >>> import torch
        >>> from spectral_hooks.parametrizations.skew import skew
        >>> layer = skew(torch.nn.Conv2d(4, 4, 3, padding=1, bias=False))
        >>> x = torch.randn(2, 4, 7, 5)
        >>> bool((layer(x).norm() / x.norm() - 1).abs() < 1e-5)
        True

    Sources: Singla and Feizi (2021), with the exponential, and space to depth before and a selection of channels after in place
    of `C`; the polynomial is this library's.
    """
    if isinstance(degree, bool) or not isinstance(degree, int) or not 2 <= degree <= _HIGHEST_DEGREE:
        raise ValueError(f"`degree` must be an int from 2 to {_HIGHEST_DEGREE}; got {degree!r}.")
    return SkewConv(layer, degree)


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


class SkewConv(OrthogonalConv):
    """What `skew` puts in the place of a layer: a norm-preserving convolution, of no single kernel.

    Args:
        layer: the convolution whose parameters this takes over.
        degree: as for `skew`.
    """

    def __init__(self, layer: nn.modules.conv._ConvNd, degree: int) -> None:
        super().__init__(layer, "skew")
        self.degree = degree
        coefficients = modulus_one(degree)
        self._ratios = [after / before for before, after in pairwise(coefficients)]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, degree={self.degree}"

    def _map(self, x: Tensor) -> Tensor:
        """`p(J) C x`; the polynomial by Horner's rule, a convolution per degree."""
        geometry, conv = self.geometry, CONV[self.geometry.dims]
        generator, frame = self._memory(self, self.weight, self._factors)
        x = geometry.to_depth(x) if frame is None else conv(x, frame, None, geometry.stride, 0, 1, geometry.groups)
        reach = tuple(radius * geometry.dilation for radius in geometry.radius)
        circular = geometry.padding_mode == "circular"
        result = x
        for ratio in reversed(self._ratios):
            if circular:
                result = pad(result, "circular", tuple((amount, amount) for amount in reach))
            padding = 0 if circular else reach
            result = conv(result, generator * ratio, None, 1, padding, geometry.dilation, geometry.groups).add_(x)
        return result

    def _factors(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """The kernels of `J`, of stride 1, and of `C`, as large as its stride; none where that is the identity."""
        geometry = self.geometry
        kernel = geometry.kernel(weight.to(geometry.wide(weight)))
        frame = None
        if geometry.rows != geometry.columns:
            taps = kernel.flatten(3).movedim(-1, 1)
            middle = taps[:, taps.shape[1] // 2]
            if any(geometry.unread):
                # the identity there keeps the rank
                unread = torch.tensor(geometry.unread, dtype=middle.dtype, device=middle.device)
                middle = middle + torch.eye(*middle.shape[1:], dtype=middle.dtype, device=middle.device) * unread
            frames = nearest(middle)
            frame = frames.flatten(0, 1).unflatten(1, (geometry.in_channels, *geometry.stride))
            # of M Cᵀ
            kernel = (taps @ frames.mT.unsqueeze(1)).movedim(1, -1).unflatten(3, kernel.shape[3:])
        kernel = kernel - kernel.transpose(1, 2).flip(tuple(range(3, kernel.ndim)))
        return kernel.flatten(0, 1) / skew_bound(kernel).clamp(min=1.0).to(kernel.dtype), frame


def nearest(x: Tensor) -> Tensor:
    """`UVᵀ` of `x = UΣVᵀ`, batches of tall or wide matrices. Its derivative is finite everywhere, also where it has none."""
    if x.shape[-2] < x.shape[-1]:
        return nearest(x.mT).mT
    fixed = held(x)
    with torch.no_grad():
        wide = fixed.to(widest(x.device))
        # solvers raise on NaN, which the skew part shows
        u, s, vh = torch.linalg.svd(torch.nan_to_num(wide), full_matrices=False)
        u, s, vh, result = (part.to(x.dtype) for part in (u, s, vh, u @ vh))
        floor = torch.where(s[..., :1] > _TINY, s[..., :1] * _SMALLEST, 1.0)
    # zero, with the derivative of x
    change = x - fixed
    right = change @ vh.mT
    turned = u.mT @ right
    sums = (s.unsqueeze(-1) + s.unsqueeze(-2)).clamp(min=floor.unsqueeze(-1))
    inside = (turned - turned.mT) / sums
    outside = (right - u @ turned) / s.clamp(min=floor).unsqueeze(-2)
    return result + (u @ inside + outside) @ vh


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
