"""Orthogonal convolutions under zero padding: a polynomial of a skew-symmetric convolution whose modulus is one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..linalg.precision import widest
from ..operators.base import is_whole
from ..projections.arguments import check_max_norm
from .geometry import CONV, CONV_TRANSPOSE
from .modules import OrthogonalConv
from .recording import held
from .skew_kernels import horner, ratios, skew_kernel

#: Beyond, coefficients are so large that rounding in float32 is no longer small against the ripple.
_HIGHEST_DEGREE = 8
#: Singular values below this share of the largest one count as this in a derivative by them, so that it is at most 1e4 times as
#: long as the change, of the 1e7 that float32 tells apart; where even the largest is tiny, as one.
_SMALLEST, _TINY = 1e-4, 1e-12


def skew(layer: nn.modules.conv._ConvNd, max_norm: float = 1.0, *, degree: int = 4) -> SkewConv:
    """Replace a convolution by an orthogonal one of the same shapes, times a gain, orthogonal under zero padding too.

        A = c p(J) C,   J = α (M Cᵀ - C Mᵀ),   |p(iω)| = 1 for |ω| ≤ 1,

    `M` the convolution with the layer's kernel and `Mᵀ` its adjoint: the flipped kernel, channels swapped. Zero padding keeps `J`
    skew, so its eigenvalues are imaginary, `iω`. `α = min(1, 1 / bound(J))` keeps them in `[-i, i]` by a certified bound.

    With as many outputs as inputs times strides `C` is the identity, or space to depth. Else it is the convolution of patches as
    large as the stride, with orthonormal rows or columns, that is nearest to `M`: the polar factor of the taps which `M` has
    there, as a matrix outputs × (inputs · strides). So what is exponentiated has the channels and the size of the output.

    In place of a truncated exponential `Σ Jᵗ / t!`, whose error `‖J‖^{T+1} / (T+1)!` asks for 8 terms up to an angle of 1 and for
    16 up to π, `p` is the polynomial whose modulus stays nearest to one: the denominator of Chebyshev's low-pass filter. Its
    phase, the angle by which `A` turns, is close to linear in `ω` like the exponential's, and reaches per degree

        3: 0.43   4: 0.98   5: 1.71   6: 2.56   7: 3.51   8: 4.54

    A transposed convolution becomes the adjoint `Aᵀ = c Cᵀ p(-J)` of what the convolution with the same kernel and geometry, from
    its outputs to its inputs, would become.

    Guaranteed: all singular values of `A` lie in `c (1 ± 3e-6)`, up to the rounding of the dtype, in training and evaluation, for
    every weight and at every input size, with `AᵀA = c² I`, or `AAᵀ = c² I` where outputs are fewer than inputs times strides.
    For even degrees none exceeds `c`.

    Args:
        layer: an `nn.Conv1d/2d/3d` with zero or circular padding that keeps the size, or divides it by the stride; or an
            `nn.ConvTranspose1d/2d/3d` that multiplies it by the stride, as the right `output_padding` does. The parameters
            become those of the result, under the same names and in the same shapes, so plain checkpoints load.
        max_norm: the gain `c > 0`.
        degree: of `p`, from 2 to 8: as many convolutions, for as large an angle.

    Returns:
        The module to put in the place of the layer: `model.conv = skew(model.conv)`. The stride must divide the input size, or,
        transposed, the output is the stride times as large as the input.

    Cost: `degree` convolutions of outputs by outputs channels without stride, at the size of the output; that of `C`; and in
    training a bound, and the singular value decomposition for `C`. In evaluation without gradients, uncompiled, these are
    remembered while the weight stays the same. The bound is 3 % to 17 % too high for random kernels of up to 64 outputs, and at
    most 25 %; beyond, it is twice too high for a random kernel, and the largest angle half as large.

    Raises:
        TypeError: `layer` is no convolution.
        ValueError: `max_norm` or `degree` out of range, the layer changes the size by more than its stride, or its weight is no
            parameter.
        NotImplementedError: reflect or replicate padding, dilation together with a stride or an even kernel.

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
    check_max_norm(max_norm)
    if not is_whole(degree) or not 2 <= degree <= _HIGHEST_DEGREE:
        raise ValueError(f"`degree` must be an int from 2 to {_HIGHEST_DEGREE}; got {degree!r}.")
    return SkewConv(layer, max_norm, int(degree))


class SkewConv(OrthogonalConv):
    """What `skew` puts in the place of a layer: a norm-preserving convolution times a gain, of no single kernel, or its adjoint.

    Args:
        layer: the convolution whose parameters this takes over.
        max_norm, degree: as for `skew`.
    """

    def __init__(self, layer: nn.modules.conv._ConvNd, max_norm: float = 1.0, degree: int = 4) -> None:
        super().__init__(layer, "skew", max_norm)
        self.degree = degree
        self._ratios = ratios(degree)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, degree={self.degree}"

    def _map(self, x: Tensor) -> Tensor:
        """`p(J) C x`."""
        geometry = self.geometry
        generator, frame = self._memory(self, self.weight, self._factors)
        if frame is None:
            x = geometry.to_depth(x)
        else:
            x = CONV[geometry.dims](x, frame, None, geometry.stride, groups=geometry.groups)
        return horner(x, generator, self._ratios, geometry, geometry.groups)

    def _adjoint(self, y: Tensor) -> Tensor:
        """`Cᵀ p(-J) y`."""
        geometry = self.geometry
        generator, frame = self._memory(self, self.weight, self._factors)
        y = horner(y, generator, [-ratio for ratio in self._ratios], geometry, geometry.groups)
        if frame is None:
            return geometry.from_depth(y)
        return CONV_TRANSPOSE[geometry.dims](y, frame, None, geometry.stride, groups=geometry.groups)

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
            frames = nearest_frames(middle)
            frame = frames.flatten(0, 1).unflatten(1, (geometry.in_channels, *geometry.stride))
            # of M Cᵀ
            kernel = (taps @ frames.mT.unsqueeze(1)).movedim(1, -1).unflatten(3, kernel.shape[3:])
        return skew_kernel(kernel), frame


def nearest_frames(x: Tensor) -> Tensor:
    """`UVᵀ` of `x = UΣVᵀ`, batches of tall or wide matrices. Its derivative is finite everywhere, also where it has none."""
    if x.shape[-2] < x.shape[-1]:
        return nearest_frames(x.mT).mT
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
