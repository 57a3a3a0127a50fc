"""Orthogonal convolutions with periodic boundary: the Cayley transform of the kernel's symbol at every frequency."""

from __future__ import annotations

from math import pi, prod, sqrt

import torch
from torch import Tensor, nn

from ..linalg.fourier import from_frequencies, to_frequencies
from ..linalg.orthonormal import polished
from ..linalg.symbols import product
from ..projections.arguments import check_max_norm
from .modules import OrthogonalConv
from .stiefel import FAR, bounded


def cayley(layer: nn.modules.conv._ConvNd, max_norm: float = 1.0) -> CayleyConv:
    """Replace a convolution by an orthogonal one of the same shapes, times a gain, with periodic boundary.

    At every frequency of the input's own grid, with `F = [U; V]` the symbol of the layer's kernel and `U` its square part,

        A = c Q,   Q = [2R - I; -2VR],   R = (I + U - U* + V*V)⁻¹,

    the Cayley transform; of `F*`, and transposed back, where there are fewer outputs than inputs. A stride is dealt with by space
    to depth before. A transposed convolution becomes `A*`, the adjoint of what the convolution with the same kernel and geometry,
    from its outputs to its inputs, would become.

    Close to its limit the transform hardly moves, and the inverse loses digits: kernels `K` with `√taps ‖K‖ > 128`, the norm that
    of the matrix `outputs · taps × inputs`, are `bounded` in length.

    Guaranteed: `AᵀA = c² I` (`AAᵀ = c² I` where there are fewer outputs than inputs) up to rounding, 2e-6 in float32, in training
    and evaluation, for every weight and at every input size, rectangular ones too. The map wraps around whatever the layer's own
    padding: zero padding becomes circular. For orthogonality under zero padding see `skew`.

    Args:
        layer: an `nn.Conv1d/2d/3d` with zero or circular padding that keeps the size, or divides it by the stride; or an
            `nn.ConvTranspose1d/2d/3d` that multiplies it by the stride, as the right `output_padding` does. The parameters
            become those of the result, under the same names and in the same shapes, so plain checkpoints load.
        max_norm: the gain `c > 0`.

    Returns:
        The module to put in the place of the layer: `model.conv = cayley(model.conv)`. The stride must divide the input size, or,
        transposed, the output is the stride times as large as the input. The kernel, as large as the input, is another one for
        every input size, though little changes near its middle.

    Cost: for half of the frequencies an inverse, of as many rows as the smaller number of channels, in every training forward. In
    evaluation without gradients, uncompiled, that is remembered for the last eight input sizes, while the weight stays the same:
    what is left is two Fourier transforms and a product of matrices. Each takes the memory of two kernels as large as the input.

    Raises:
        TypeError: `layer` is no convolution.
        ValueError: `max_norm` is no positive number, the layer changes the size by more than its stride, or its weight is no
            parameter.
        NotImplementedError: reflect or replicate padding, dilation together with a stride or an even kernel.

    Example:
        >>> import torch
        >>> from spectral_hooks.parametrizations.cayley import cayley
        >>> layer = cayley(torch.nn.Conv2d(3, 8, 3, padding=1, bias=False))
        >>> x = torch.randn(2, 3, 7, 5)
        >>> bool((layer(x).norm() / x.norm() - 1).abs() < 2e-6)
        True

    Source: Trockman and Kolter (2021), who also normalize the kernel.
    """
    check_max_norm(max_norm)
    return CayleyConv(layer, max_norm)


class CayleyConv(OrthogonalConv):
    """What `cayley` puts in the place of a layer: a norm-preserving circular convolution times a gain, or its adjoint.

    Its kernel is as large as the input.

    Args:
        layer: the convolution whose parameters this takes over.
        max_norm: as for `cayley`.
    """

    def __init__(self, layer: nn.modules.conv._ConvNd, max_norm: float = 1.0) -> None:
        super().__init__(layer, "cayley", max_norm)

    def _map(self, x: Tensor) -> Tensor:
        """`Q(θ)` applied to every frequency of `x`."""
        x = self.geometry.to_depth(x)
        sizes = tuple(x.shape[2:])
        return self._multiplied(x, self._remembered(sizes, adjoint=False))

    def _adjoint(self, y: Tensor) -> Tensor:
        """`Q(θ)*` applied to every frequency of `y`."""
        sizes = tuple(y.shape[2:])
        return self.geometry.from_depth(self._multiplied(y, self._remembered(sizes, adjoint=True)))

    def _remembered(self, sizes: tuple[int, ...], adjoint: bool) -> Tensor:
        """What rows, the channels at a frequency, are multiplied by: `Qᵀ`, or the conjugate of `Q`."""

        def make(weight: Tensor) -> Tensor:
            q = self._transform(weight, sizes)
            return _prepared(q.mH if adjoint else q)

        return self._memory(self, self.weight, make, (sizes, adjoint))

    def _multiplied(self, x: Tensor, q: Tensor) -> Tensor:
        """The channels of a batch, at every frequency, times these matrices."""
        sizes, axes = tuple(x.shape[2:]), tuple(range(2, x.ndim))
        x = to_frequencies(x, axes)
        shape = x.shape[2:]
        # (groups, frequencies, batch, channels) and back; products and transforms are faster after a copy
        x = x.flatten(2).unflatten(1, (self.geometry.groups, -1)).permute(1, 3, 0, 2).contiguous()
        y = _times(x.flatten(0, 1), q).unflatten(0, (self.geometry.groups, -1)).permute(2, 0, 3, 1).contiguous()
        return from_frequencies(y.flatten(1, 2).unflatten(2, shape), sizes, axes)

    def _transform(self, weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """`Q(θ)ᵀ` of every group at every frequency of the half that `rfftn` keeps, `(groups · frequencies, columns, rows)`."""
        geometry = self.geometry
        kernel = geometry.kernel(weight.to(geometry.wide(weight)))
        # ‖F(θ)‖ ≤ √taps ‖K‖
        matrix = kernel.movedim(2, -1)
        shorter = bounded(matrix.flatten(1, -2), FAR / sqrt(prod(kernel.shape[3:])))
        kernel = shorter.view(matrix.shape).movedim(-1, 2)
        q = _transformed(_symbol(kernel, sizes, geometry.radius, geometry.dilation))
        return q.transpose(0, 1).flatten(0, 1).mT.contiguous()


def _prepared(q: Tensor) -> Tensor:
    """Without gradients, where it is remembered: complex matrices as real ones for rows of real and imaginary parts in turn.

    That is twice the memory and as much arithmetic, but in faster products. Nothing is remembered where operations are recorded.
    """
    if torch.is_grad_enabled() or torch.jit.is_tracing() or torch.compiler.is_compiling():
        return q
    return torch.view_as_real(torch.stack([q, 1j * q], -2)).flatten(-2).flatten(-3, -2)


def _times(x: Tensor, q: Tensor) -> Tensor:
    """The products with matrices that are prepared, or not."""
    if q.is_complex():
        return torch.bmm(x, q)
    return torch.view_as_complex(torch.bmm(torch.view_as_real(x).flatten(-2), q).unflatten(-1, (-1, 2)))


def _symbol(kernel: Tensor, sizes: tuple[int, ...], radius: tuple[int, ...], dilation: int) -> Tensor:
    """`F(θ)` with the taps counted from the middle, `(frequencies, groups, rows, columns)`.

    Torch's convolutions correlate, so here the sign of the exponent is that of the inverse transform.
    """
    double = torch.empty(0, dtype=torch.float64)
    points = [*sizes[:-1], sizes[-1] // 2 + 1]
    frequencies = [torch.arange(m, dtype=torch.float64) * (2 * pi / n) for m, n in zip(points, sizes, strict=True)]
    taps = product([torch.arange(-r, r + 1) * dilation for r in radius], double)
    angles = product(frequencies, double) @ taps.T
    flat = kernel.flatten(3).movedim(-1, 0).flatten(1)
    values = torch.complex(angles.cos().to(flat) @ flat, angles.sin().to(flat) @ flat)
    return values.unflatten(1, kernel.shape[:3])


def _transformed(x: Tensor) -> Tensor:
    """The Cayley transforms of batches of matrices: orthonormal columns, or rows where there are fewer of them."""
    rows, columns = x.shape[-2:]
    if rows < columns:
        return _transformed(x.mH).mH
    upper, lower = x[..., :columns, :], x[..., columns:, :]
    identity = torch.eye(columns, dtype=x.dtype, device=x.device)
    inverse = torch.linalg.inv(identity + upper - upper.mH + lower.mH @ lower)
    return polished(torch.cat([2 * inverse - identity, -2 * lower @ inverse], -2))
