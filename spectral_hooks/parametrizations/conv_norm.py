"""A normalizer of convolutions: every output channel's filter gets gain one at every frequency."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, pi, prod
from typing import Any

import torch
from torch import Tensor, nn

from ..linalg.fourier import from_frequencies, to_frequencies
from ..linalg.precision import widest
from ..linalg.symbols import product, symbol
from ..operators import ConvOperator, KernelOperator, as_operator
from ..operators.padding import pad
from .geometry import CONV, convolution
from .memory import Memory
from .modules import plain, take_over
from .recording import held

#: Relative to its mean over the frequencies: where a filter's energy is less, it is not raised all the way to one. A gain is then
#: at most 1e3 times the mean one, and the energy has a few digits left above the rounding of float32.
_FLOOR = 1e-6


def conv_norm(layer: nn.modules.conv._ConvNd) -> ConvNorm:
    """Normalize a convolution's output channels in the Fourier domain: a normalizer, like batch norm, and not a constraint.

        y_o = v_o * (K_o * x),   v̂_o(θ) = 1 / ‖F_o(θ)‖₂,   F_o the row of the symbol that makes output `o`,

    with `v̂` on the frequencies of the output: what whitens each channel by itself. Nothing is learned but the layer's own weight
    and bias, no statistics are kept, and training and evaluation agree.

    Guaranteed, for circular padding that keeps the size or divides it by the stride: every output channel is a map `A_o` with
    `A_o A_oᵀ = I` (where its energy at a frequency is below 1e-6 of its mean there, less). Together they have a norm between 1
    and the square root of the channels in a group, which depends on the weight: so there is no `max_norm` here, for no gain makes
    that norm a given one. For a bound see `skew`, `cayley` and `rescaled`. For other paddings it is the same filter after the
    layer's own convolution.

    Args:
        layer: an `nn.Conv1d/2d/3d`. The parameters become those of the result, under the same names and in the same shapes, so
            plain checkpoints load.

    Returns:
        The module to put in the place of the layer: `model.conv = conv_norm(model.conv)`.

    Cost: two Fourier transforms of the output, and in training the energies, small against the convolution; in evaluation without
    gradients those are remembered for the last eight output sizes, while the weight stays the same.

    Raises:
        TypeError: `layer` is no convolution.
        NotImplementedError: a transposed convolution.
        ValueError: the weight is no parameter.

    Example:
        >>> import torch
        >>> from spectral_hooks.parametrizations.conv_norm import conv_norm
        >>> layer = conv_norm(torch.nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular", bias=False))
        >>> matrix = layer(torch.eye(60).reshape(60, 3, 4, 5)).detach().flatten(1).T.reshape(8, 20, 60)
        >>> bool((matrix @ matrix.mT - torch.eye(20)).abs().amax() < 1e-5)
        True

    Source: Liu, Li, Zhai, You, Zhu, Fernandez-Granda and Qu (2021), "Convolutional normalization".
    """
    if convolution(layer, "conv_norm").transposed:
        raise NotImplementedError("conv_norm of a transposed convolution is not supported: use a convolution and upsampling.")
    return ConvNorm(layer)


class ConvNorm(nn.Module):
    """What `conv_norm` puts in the place of a layer.

    Args:
        layer: the convolution whose parameters this takes over.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        self.padding, self.padding_mode = layer.padding, layer.padding_mode
        take_over(self, layer)
        self._memory = Memory()

    def extra_repr(self) -> str:
        out, in_, *taps = self.weight.shape
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings.items())
        settings += "" if self.bias is not None else ", bias=False"
        return f"{in_ * self.groups}, {out}, kernel_size={tuple(taps)}, {settings}"

    def forward(self, x: Tensor) -> Tensor:
        weight, dims = self._rows(), self.weight.ndim - 2
        padding = self.padding
        if self.padding_mode != "zeros":
            padding, x = 0, pad(x, self.padding_mode, self._operator(weight).padding)
        y = CONV[dims](x, weight, None, self.stride, padding, self.dilation, self.groups)
        sizes, axes = tuple(y.shape[y.ndim - dims :]), tuple(range(-dims, 0))
        gain = self._memory(self, weight, lambda w: self._gain(w, sizes), sizes)
        filtered = from_frequencies(to_frequencies(y.to(gain.dtype), axes) * gain, sizes, axes).to(y.dtype)
        return filtered if self.bias is None else filtered + self.bias.to(y.dtype).unflatten(0, (-1, *[1] * dims))

    def to_plain(self) -> nn.Module:
        """The equal plain convolution, with normalized rows: for layers whose patches do not overlap.

        Raises:
            NotImplementedError: patches overlap; then the filter is as large as the input.
        """
        with torch.no_grad():
            op = self._equal()
        return plain(self, op.weight, **self._settings)

    @property
    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}

    def _operator(self, weight: Tensor, **other: Any) -> ConvOperator:
        """That of the convolution alone."""
        return ConvOperator(weight, **{**self._settings, **other})

    def _equal(self, input_size: int | Sequence[int] | None = None) -> ConvOperator:
        """That of the plain convolution that equals this, or the reason why there is none."""
        op = self._operator(self.weight, padding_mode="zeros")
        if prod(op.canonical().shape[3:]) > 1:
            raise NotImplementedError(
                "ConvNorm filters the outputs of its convolution over the whole image and is no convolution of a small kernel; "
                "it has no weight to measure, to change or to make plain. It is a normalizer and bounds no norm: exclude it."
            )
        dims = self.weight.ndim - 2
        rows = self._rows()
        gain = self._gain(rows, (1,) * dims).reshape(-1, *[1] * (dims + 1))
        return self._operator((rows.to(gain.dtype) * gain).to(self.weight.dtype), input_size=input_size)

    def _rows(self) -> Tensor:
        """The weight with a largest entry of one in each filter: the result is the same, and does not overflow on the way."""
        largest = held(self.weight).abs().flatten(1).amax(1)
        # a filter of zeros stays one
        unit = torch.where(largest > 0, largest, 1.0).unflatten(0, (-1, *[1] * (self.weight.ndim - 1)))
        return self.weight / unit

    def _gain(self, weight: Tensor, sizes: tuple[int, ...]) -> Tensor:
        """`v̂` at the half of the frequencies that `rfftn` keeps, `(out, *frequencies)`.

        The energy `‖F_o(θ)‖²` is a cosine polynomial of degree `k - 1`, known from `2k - 1` samples per axis.
        """
        # on the lattice: whether the stride divides the size makes no difference to a row by itself
        op = self._operator(weight, padding_mode="zeros")
        working = torch.promote_types(weight.dtype, torch.float32)
        kernel = op.canonical().to(torch.promote_types(working, widest(weight.device)))
        taps = tuple(kernel.shape[3:])
        # one of each pair ±θ: half of the last axis, where all but 0 stand for two
        halved = [*(2 * k - 1 for k in taps[:-1]), taps[-1]]
        index = product([torch.arange(n) for n in halved], kernel)
        theta, counts = index * (2 * pi / kernel.new_tensor([2 * k - 1 for k in taps])), 1 + (index[:, -1] > 0).to(kernel)
        rows = symbol(kernel, theta).abs().square().sum(-1).flatten(1)  # (samples, out)
        lags = product([torch.arange(-(k - 1), k) for k in taps], kernel)
        coefficients = ((lags @ theta.T).cos() * (counts / counts.sum())) @ rows
        # taps of the same phase of the stride are this far apart
        steps = [d // gcd(s, d) for s, d in zip(op.stride, op.dilation, strict=True)]
        points = [*sizes[:-1], sizes[-1] // 2 + 1]
        frequencies = [torch.arange(m) * step for m, step in zip(points, steps, strict=True)]
        at = product(frequencies, kernel) * (2 * pi / kernel.new_tensor(sizes))
        mean = (counts / counts.sum()) @ rows
        energy = torch.maximum((at @ lags.T).cos() @ coefficients, _FLOOR * mean)
        # a filter of zeros stays one
        gain = torch.where(mean > 0, energy, torch.ones_like(energy)).rsqrt()
        return gain.T.unflatten(1, points).to(working)


@as_operator.register
def _(layer: ConvNorm, input_size: int | Sequence[int] | None = None) -> KernelOperator:
    return layer._equal(input_size)
