"""Symbols on a grid of frequencies, and back."""

from __future__ import annotations

from functools import cached_property
from math import pi, prod

import torch
from torch import Tensor

from ..linalg.memory import at_once
from ..linalg.symbols import half_plane, product, symbol
from ..norms.groups import grid_norms

#: Kernels of more taps go through FFTs, and symbols of up to this size are then measured as they come.
_FEW_TAPS, _SMALL_SYMBOLS = 100, 16


class FrequencyGrid:
    """Half of the frequencies `2π j / sizes`: symbols there, and their adjoint, which gives back a kernel.

    For few taps a matrix product, which leaves the symbols as they are needed; its matrices are of size taps × frequencies, so
    for many taps an FFT.
    """

    def __init__(self, sizes: tuple[int, ...], kernel: Tensor, *, checkerboard: bool = False) -> None:
        self.sizes, self.taps = sizes, tuple(kernel.shape[3:])
        self.axes = tuple(range(len(sizes)))
        self.fast = prod(self.taps) > _FEW_TAPS and all(n >= k for n, k in zip(sizes, self.taps, strict=True))
        if self.fast:
            self.half = (*sizes[:-1], sizes[-1] // 2 + 1)
            counts = torch.full((self.half[-1],), 2.0).to(kernel)
            counts[0] = 1
            if sizes[-1] % 2 == 0:
                counts[-1] = 1
            counts = counts.expand(self.half).flatten()
        else:
            theta, counts = half_plane(sizes, kernel)
            if checkerboard:
                index = (theta[:, :2] * (theta.new_tensor(sizes[:2]) / (2 * pi))).round().sum(1)
                theta, counts = theta[index % 2 == 0], 2 * counts[index % 2 == 0]
            #: The frequencies, `(n, d)`; of an FFT's there is no list.
            self.theta = theta
        #: What share of all frequencies each stands for.
        self.shares = counts / prod(sizes)

    def symbols(self, kernel: Tensor) -> Tensor:
        """`F(θ)` of every group: `(frequencies, groups, rows, columns)`."""
        if not self.fast:
            return symbol(kernel, self.theta)
        last = tuple(range(-len(self.sizes), 0))
        return self._transform(kernel).movedim(last, self.axes).flatten(0, len(self.sizes) - 1).contiguous()

    def _transform(self, kernel: Tensor) -> Tensor:
        """The same, with the frequencies last."""
        return torch.fft.rfftn(kernel, self.sizes, tuple(range(-len(self.sizes), 0)))

    def adjoint(self, symbols: Tensor) -> Tensor:
        """The mean over all frequencies of `Re(exp(i t·θ) Y(θ))`, at every tap `t`: `(groups, rows, columns, *taps)`."""
        if not self.fast:
            flat, (cos, sin) = symbols.flatten(1), self._waves
            return (cos @ flat.real - sin @ flat.imag).T.reshape(*symbols.shape[1:], *self.taps)
        found = torch.fft.irfftn(symbols.unflatten(0, self.half), self.sizes, self.axes)
        for axis, k in enumerate(self.taps):
            found = found.narrow(axis, 0, k)
        return found.movedim(self.axes, tuple(range(-len(self.sizes), 0)))

    @cached_property
    def _waves(self) -> tuple[Tensor, Tensor]:
        angles = product([torch.arange(k) for k in self.taps], self.theta) @ self.theta.T
        return angles.cos() * self.shares, angles.sin() * self.shares

    def norms(self, kernel: Tensor) -> Tensor:
        """The largest norm of each group on the grid, up to rounding: from the symbols where they are small."""
        small = min(kernel.shape[1:3])
        if not self.fast or small > _SMALL_SYMBOLS:
            return grid_norms(kernel, self.sizes, screen=torch.float32).to(kernel)
        if small == 1:
            # group by group, and as they lie: a copy in another order would take longer
            squares = [torch.view_as_real(self._transform(group)).square().sum((0, 1, -1)).amax() for group in kernel]
            return torch.stack(squares).sqrt()
        symbols = self.symbols(kernel)
        symbols = symbols.mT if symbols.shape[-2] > symbols.shape[-1] else symbols
        chunk = at_once(16 * symbols[0].numel())
        tops = [torch.linalg.eigvalsh(part @ part.mH)[..., -1].amax(0) for part in symbols.split(chunk)]
        return torch.stack(tops).amax(0).clamp(min=0).sqrt()
