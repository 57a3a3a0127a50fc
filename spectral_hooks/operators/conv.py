"""A convolution as an operator: geometry, the finite map, the canonical (polyphase) kernel."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from math import ceil, gcd, prod, sqrt
from typing import Any, TypeGuard

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from . import padding as paddings
from .base import Grid, KernelOperator, check_ends_with, check_weight, is_whole

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


class ConvOperator(KernelOperator):
    """A convolution or a transposed convolution in one, two or three dimensions, as torch computes it.

    Without an `input_size` it is the **lattice operator**: the same kernel on an infinite grid. It has no shapes; its norm
    `S = sup_θ ‖F(θ)‖₂`, with the symbol `F(θ) = Σ_t K[:, :, t] exp(-i t·θ)`, holds for the layer at every input size.
    With one it is the finite operator, with the layer's own padding.

    Args:
        weight: kernel, `(out, in / groups, *taps)`; `(in, out / groups, *taps)` when `transposed`.
        stride, dilation: int, or one per spatial axis.
        padding: int, one per axis, one `(before, after)` pair per axis, `"same"` or `"valid"`.
        output_padding: extra size at the end of each output axis, transposed only.
        groups: number of independent blocks of channels.
        transposed: the adjoint of the convolution with this kernel.
        padding_mode: `"zeros"`, `"circular"`, `"reflect"` or `"replicate"`.
        input_size: spatial size of the input, int or one per axis; None for the lattice operator.
        assign: of a layer that computes its kernel from its parameters: makes the layer hold another one, see `as_operator`.

    Raises:
        TypeError: `weight` is no real floating-point tensor.
        ValueError: an argument does not fit the kernel, or torch would refuse this input size.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> op = sh.ConvOperator(torch.ones(1, 1, 3), padding=1, input_size=4)
        >>> op.to_dense()
        tensor([[1., 1., 0., 0.],
                [1., 1., 1., 0.],
                [0., 1., 1., 1.],
                [0., 0., 1., 1.]])
        >>> sh.singular_values(op.circular(4)).round(decimals=4)
        tensor([3., 1., 1., 1.])
    """

    def __init__(
        self,
        weight: Tensor,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] | Sequence[tuple[int, int]] = 0,
        output_padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        transposed: bool = False,
        padding_mode: str = "zeros",
        input_size: int | Sequence[int] | None = None,
        assign: Callable[[Tensor], None] | None = None,
    ) -> None:
        check_weight(weight)
        dims = weight.ndim - 2
        if dims not in _CONV or 0 in weight.shape[2:]:
            raise ValueError(
                "`weight` must be a kernel (out, in / groups, *taps) with taps along one to three spatial axes; "
                f"got shape {tuple(weight.shape)}. For a matrix use DenseOperator."
            )
        if not is_whole(groups) or groups < 1 or weight.shape[0] % groups:
            raise ValueError(f"`groups` must divide the {weight.shape[0]} channels of `weight`; got {groups!r}.")
        if padding_mode not in paddings.MODES:
            raise ValueError(f"`padding_mode` must be one of {', '.join(paddings.MODES)}; got {padding_mode!r}.")
        if transposed and padding_mode != "zeros":
            raise ValueError(f"`padding_mode` of a transposed convolution must be 'zeros'; got {padding_mode!r}.")
        self.weight = weight
        self.assign = assign
        self.stride = _per_axis("stride", stride, dims, least=1)
        self.dilation = _per_axis("dilation", dilation, dims, least=1)
        self.output_padding = _per_axis("output_padding", output_padding, dims, least=0)
        self.groups = int(groups)
        self.transposed = transposed
        self.padding_mode = padding_mode
        self.padding = self._padding_pairs(padding)
        self.input_size = None if input_size is None else _per_axis("input_size", input_size, dims, least=1)
        self._check_sizes()

    def _padding_pairs(self, padding: int | str | Sequence[int] | Sequence[tuple[int, int]]) -> paddings.Pairs:
        dims = self.weight.ndim - 2
        if _is_listing(padding) and padding and all(isinstance(letter, str) for letter in padding):
            padding = "".join(map(str, padding))  # torch makes a tuple of letters of the word for a transposed convolution
        if isinstance(padding, str) and self.transposed:
            raise ValueError(
                f"`padding` of a transposed convolution must be numbers, as torch's forward wants them; got {padding!r}. "
                "Give the number of samples that the output loses on each side: an int, or one per axis."
            )
        if isinstance(padding, str) and padding == "valid":
            return ((0, 0),) * dims
        if isinstance(padding, str) and padding == "same":
            if any(s != 1 for s in self.stride):
                raise ValueError(f"`padding='same'` needs stride 1; got stride {self.stride}.")
            # torch puts the odd one at the end
            return tuple((reach // 2, reach - reach // 2) for reach in self._reach)
        if isinstance(padding, str):
            raise ValueError(f"`padding` must be numbers, 'same' or 'valid'; got {padding!r}.")
        if _is_listing(padding) and any(_is_listing(pair) for pair in padding):
            if len(padding) != dims or not all(
                _is_listing(pair) and len(pair) == 2 and all(map(is_whole, pair)) for pair in padding
            ):
                raise ValueError(f"`padding` must be {dims} pairs (before, after) of ints; got {padding!r}.")
            return tuple((int(before), int(after)) for before, after in padding)
        return tuple((p, p) for p in _per_axis("padding", padding, dims, least=0))  # type: ignore[arg-type]

    def _check_sizes(self) -> None:
        """What torch refuses in forward is refused here."""
        if any(self.output_padding) and not self.transposed:
            raise ValueError(f"`output_padding` is for transposed convolutions; got {self.output_padding}.")
        for extra, s, d in zip(self.output_padding, self.stride, self.dilation, strict=True):
            if extra >= max(s, d):
                raise ValueError(f"`output_padding` must be smaller than stride or dilation; got {self.output_padding}.")
        if self.input_size is None:
            return
        if min(self._sizes[0] + self._sizes[1]) < 1:
            raise ValueError(f"`input_size` {self.input_size} is too small for this kernel and padding: no output is left.")
        slack = {"zeros": None, "replicate": None, "reflect": -1, "circular": 0}[self.padding_mode]
        if slack is not None and any(max(p) > n + slack for p, n in zip(self.padding, self.input_size, strict=True)):
            raise ValueError(f"`input_size` {self.input_size} is too small for {self.padding_mode} padding of {self.padding}.")

    def __repr__(self) -> str:
        names = ("stride", "padding", "output_padding", "dilation", "groups", "transposed", "padding_mode", "input_size")
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"ConvOperator(weight={tuple(self.weight.shape)}, {settings})"

    # -- geometry ---------------------------------------------------------------------------------------------------

    @property
    def _dims(self) -> int:
        return self.weight.ndim - 2

    @property
    def _taps(self) -> tuple[int, ...]:
        return tuple(self.weight.shape[2:])

    @property
    def _reach(self) -> tuple[int, ...]:
        """Distance from the first to the last tap."""
        return tuple(d * (k - 1) for d, k in zip(self.dilation, self._taps, strict=True))

    @property
    def is_finite(self) -> bool:
        return self.input_size is not None

    @cached_property
    def _sizes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Spatial sizes on both sides of the plain (not transposed) convolution: its input, its output."""
        if self.input_size is None:
            raise ValueError(
                "a convolution without an input size is the lattice operator and has no shapes: "
                "give `input_size=` to as_operator or ConvOperator, or use circular(input_size)."
            )
        near = self.input_size
        axes = zip(near, self.stride, self.padding, self._reach, self.output_padding, strict=True)
        if self.transposed:
            far = tuple((n - 1) * s - sum(p) + reach + 1 + extra for n, s, p, reach, extra in axes)
            return far, near
        far = tuple((n + sum(p) - reach - 1) // s + 1 for n, s, p, reach, _ in axes)
        return near, far

    @property
    def channels(self) -> tuple[int, int]:
        first, second = self.weight.shape[0], self.weight.shape[1] * self.groups
        return (second, first) if self.transposed else (first, second)

    @property
    def in_shape(self) -> tuple[int, ...]:
        sizes = self._sizes
        if self.transposed:
            return (self.weight.shape[0], *sizes[1])
        return (self.weight.shape[1] * self.groups, *sizes[0])

    @property
    def out_shape(self) -> tuple[int, ...]:
        sizes = self._sizes
        if self.transposed:
            return (self.weight.shape[1] * self.groups, *sizes[0])
        return (self.weight.shape[0], *sizes[1])

    def circular(self, input_size: int | Sequence[int]) -> ConvOperator:
        """The same kernel with periodic boundary.

        The output has `ceil(n / stride)` positions per axis, `n · stride` when transposed; output 0 reads where the padded
        layer's does. Singular values are exact through the symbol wherever the stride divides the input size.

        Args:
            input_size: spatial size of the input, int or one per axis.
        """
        other = copy.copy(self)
        other.__dict__.pop("_sizes", None)
        other.padding_mode = "circular"
        other.output_padding = (0,) * self._dims
        other.input_size = sizes = _per_axis("input_size", input_size, self._dims, least=1)
        pairs = []
        for n, s, (before, _), reach in zip(sizes, self.stride, self.padding, self._reach, strict=True):
            rows, period = (n, n * s) if self.transposed else (ceil(n / s), n)
            pairs.append((before, (rows - 1) * s + reach + 1 - period - before))
        other.padding = tuple(pairs)
        return other

    # -- the finite map -----------------------------------------------------------------------------------------------

    def matvec(self, x: Tensor) -> Tensor:
        check_ends_with("x", x, self.in_shape)
        return self._conv_adjoint(x) if self.transposed else self._conv(x)

    def rmatvec(self, y: Tensor) -> Tensor:
        check_ends_with("y", y, self.out_shape)
        return self._conv(y) if self.transposed else self._conv_adjoint(y)

    def _conv(self, x: Tensor) -> Tensor:
        batch = x.shape[: x.ndim - self._dims - 1]
        x = x.reshape(prod(batch), *x.shape[len(batch) :])
        x = paddings.pad(x, self.padding_mode, self.padding)
        y = _CONV[self._dims](x, self.weight, None, self.stride, 0, self.dilation, self.groups)
        # an output padding beyond the stride makes the plain convolution one row too long
        for axis, size in enumerate(self._sizes[1], start=2):
            y = y.narrow(axis, 0, size)
        return y.reshape(*batch, *y.shape[1:])

    def _conv_adjoint(self, y: Tensor) -> Tensor:
        batch = y.shape[: y.ndim - self._dims - 1]
        y = y.reshape(prod(batch), *y.shape[len(batch) :])
        x = _CONV_TRANSPOSE[self._dims](y, self.weight, None, self.stride, 0, 0, self.groups, self.dilation)
        sizes = self._sizes[0]
        unread = [n + sum(p) - full for n, p, full in zip(sizes, self.padding, x.shape[2:], strict=True)]
        x = F.pad(x, [amount for extra in reversed(unread) for amount in (0, extra)])
        x = paddings.unpad(x, self.padding_mode, self.padding, sizes)
        return x.reshape(*batch, *x.shape[1:])

    # -- the canonical form ---------------------------------------------------------------------------------------------

    @property
    def _phases(self) -> tuple[int, ...]:
        """Phases per axis: taps `t`, `t + phases`, ... meet the same samples of the input.

        Dilated taps sit at `δt`, in phase `δt mod s`, which takes `s / gcd(s, δ)` values. Within a phase they stand
        `δ / gcd` samples apart, from a start of the phase's own; on the lattice neither changes a singular value.
        """
        strides = self.stride
        if self.padding_mode == "circular":
            strides = tuple(1 if paddings.crosses_seam(*self._seam(i)) else s for i, s in enumerate(strides))
        axes = zip(strides, self.dilation, self._taps, strict=True)
        return tuple(min(s // gcd(s, d), k) for s, d, k in axes)

    def _seam(self, axis: int) -> tuple[int | None, int, int, int, int, int]:
        """The period of an axis, if it is known, and all else that decides which rows meet around it."""
        size = self._sizes[0][axis] if self.is_finite else None
        return size, self.stride[axis], self.dilation[axis], self._taps[axis], *self.padding[axis]

    def canonical(self) -> Tensor:
        kernel = self.weight.unflatten(0, (self.groups, -1))
        phases = self._phases
        missing = [-k % p for k, p in zip(self._taps, phases, strict=True)]
        kernel = F.pad(kernel, [amount for extra in reversed(missing) for amount in (0, extra)])
        for axis, p in enumerate(phases):
            kernel = kernel.unflatten(3 + 2 * axis, (-1, p))
        taps = range(3, 3 + 2 * len(phases), 2)
        kernel = kernel.permute(0, 1, 2, *(axis + 1 for axis in taps), *taps)
        return kernel.flatten(2, 2 + len(phases))

    @property
    def canonical_shape(self) -> tuple[int, ...]:
        first, columns, *_ = self.weight.shape
        phases = self._phases
        taps = (-(-k // p) for k, p in zip(self._taps, phases, strict=True))
        return self.groups, first // self.groups, columns * prod(phases), *taps

    def part(self, groups: Tensor) -> ConvOperator:
        other = super().part(groups)
        other.groups = len(groups)
        return other

    def from_canonical(self, kernel: Tensor) -> Tensor:
        phases, dims = self._phases, self._dims
        kernel = kernel.unflatten(2, (-1, *phases))
        pairs = [axis for i in range(dims) for axis in (3 + dims + i, 3 + i)]
        kernel = kernel.permute(0, 1, 2, *pairs)
        for axis, k in enumerate(self._taps, start=3):
            kernel = kernel.flatten(axis, axis + 1).narrow(axis, 0, k)
        return kernel.flatten(0, 1)

    @property
    def frequency_grid(self) -> Grid | None:
        if self.padding_mode != "circular" or not self.is_finite:
            return None
        grid = []
        for axis, (n, rows) in enumerate(zip(*self._sizes, strict=True)):
            s, d = self.stride[axis], self.dilation[axis]
            if n != rows * s:
                return None
            repeats = gcd(rows, d // gcd(s, d))
            grid.append((rows // repeats, repeats))
        return tuple(grid)

    @property
    def lattice_factor(self) -> float:
        if self.padding_mode == "zeros":
            return 1.0
        if self.padding_mode == "circular":
            return sqrt(prod(paddings.row_repeats(*self._seam(axis)) for axis in range(self._dims)))
        if self.input_size is None:
            raise ValueError(
                f"{self.padding_mode} padding repeats inputs, so the lattice norm is no bound for this layer and there is "
                "none without `input_size`: give `input_size=`, or use zero or circular padding."
            )
        axes = zip(self.input_size, self.padding, strict=True)
        return sqrt(prod(paddings.largest_multiplicity(self.padding_mode, n, *p) for n, p in axes))

    @property
    def padding_factor(self) -> float:
        if self.is_finite or self.padding_mode in ("zeros", "circular"):
            return self.lattice_factor
        worst = 1
        for reach, (before, after) in zip(self._reach, self.padding, strict=True):
            fits = max(before, after) + 1 if self.padding_mode == "reflect" else 1
            worst *= paddings.worst_multiplicity(self.padding_mode, max(fits, reach + 1 - before - after), before, after)
        return sqrt(worst)


def _per_axis(name: str, value: int | Sequence[int], dims: int, *, least: int) -> tuple[int, ...]:
    values = (value,) * dims if is_whole(value) else tuple(value) if _is_listing(value) else ()
    if len(values) != dims or not all(is_whole(v) and v >= least for v in values):
        raise ValueError(f"`{name}` must be an int or {dims} ints, each at least {least}; got {value!r}.")
    return tuple(int(v) for v in values)


def _is_listing(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether this holds numbers in a row: a list, a tuple, an array; no word."""
    return isinstance(value, (Sequence, np.ndarray)) and not isinstance(value, str)
