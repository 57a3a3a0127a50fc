"""Operators one after the other: as one kernel where that is the same map, else lazily, with the crop between."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .base import Grid, KernelOperator, LinearOperator, check_ends_with
from .conv import ConvOperator
from .dense import DenseOperator
from .layers import InputSize, as_operator

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ComposedOperator(LinearOperator):
    """`A₁ A₂ … A_n`, the outermost first: `x ↦ A₁(A₂(… A_n(x)))`.

    Args:
        factors: the operators; all finite, or all without an input size.

    Raises:
        ValueError: there are none, or the outputs of one are not the inputs of the next.
    """

    def __init__(self, factors: Sequence[LinearOperator]) -> None:
        self.factors: tuple[LinearOperator, ...] = tuple(chain.from_iterable(map(_factors, factors)))
        if not self.factors:
            raise ValueError("`factors` must hold at least one operator.")
        for outer, inner in pairwise(self.factors):
            if not _fit(outer, inner):
                raise ValueError(f"the outputs of {inner!r} are not the inputs of {outer!r}, which comes after it.")

    def __repr__(self) -> str:
        return f"compose({', '.join(map(repr, self.factors))})"

    @property
    def in_shape(self) -> tuple[int, ...]:
        return self.factors[-1].in_shape

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.factors[0].out_shape

    @property
    def is_finite(self) -> bool:
        return all(op.is_finite for op in self.factors)

    @property
    def dtype(self) -> torch.dtype:
        dtype = self.factors[0].dtype
        for op in self.factors[1:]:
            dtype = torch.promote_types(dtype, op.dtype)
        return dtype

    @property
    def device(self) -> torch.device:
        return self.factors[0].device

    def matvec(self, x: Tensor) -> Tensor:
        check_ends_with("x", x, self.in_shape)
        batch = x.shape[: x.ndim - len(self.in_shape)]
        for op in reversed(self.factors):
            x = op.matvec(x.reshape(*batch, *op.in_shape))
        return x

    def rmatvec(self, y: Tensor) -> Tensor:
        check_ends_with("y", y, self.out_shape)
        batch = y.shape[: y.ndim - len(self.out_shape)]
        for op in self.factors:
            y = op.rmatvec(y.reshape(*batch, *op.out_shape))
        return y

    def to(self, dtype: torch.dtype) -> ComposedOperator:
        return ComposedOperator([op.to(dtype) for op in self.factors])

    def of_order_one(self, dtype: torch.dtype) -> tuple[LinearOperator, float]:
        factors, scales = zip(*(op.of_order_one(dtype) for op in self.factors), strict=True)
        return ComposedOperator(factors), prod(scales)

    def collapsed(self) -> LinearOperator:
        """The same map with neighbours taken together wherever their product is one matrix or one kernel.

        - Matrices: the product. Channel gains: into the matrix or kernel beside them.
        - Two convolutions: one kernel, of which that of the outer one is spread by the inner one's stride, if the outer one does
          not pad, or if both pad circularly to the same size without strides. Zeros that the outer one pads with are **not** what
          the inner one computes there, and the norm of the one kernel can lie below that of the map: these stay apart.
        """
        factors: list[LinearOperator] = []
        for op in self.factors:
            merged = _merged(factors[-1], op) if factors else None
            if merged is None:
                factors.append(op)
            else:
                factors[-1] = merged
        return factors[0] if len(factors) == 1 else ComposedOperator(factors)


class ChannelGains(KernelOperator):
    """`y_c = g_c x_c` for every channel, at every position.

    Args:
        weight: the gains `g`, `(channels,)`.
        sizes: spatial size, empty for features without positions; None for every size.
    """

    def __init__(self, weight: Tensor, sizes: tuple[int, ...] | None) -> None:
        self.weight = weight
        self.sizes = sizes

    def __repr__(self) -> str:
        return f"ChannelGains({len(self.weight)}, sizes={self.sizes})"

    @property
    def in_shape(self) -> tuple[int, ...]:
        if self.sizes is None:
            raise ValueError("channel gains without an input size have no shapes: give `input_size=`.")
        return (len(self.weight), *self.sizes)

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.in_shape

    @property
    def channels(self) -> tuple[int, int]:
        return len(self.weight), len(self.weight)

    @property
    def is_finite(self) -> bool:
        return self.sizes is not None

    def matvec(self, x: Tensor) -> Tensor:
        return x * self.weight.reshape(-1, *(1,) * len(self.in_shape[1:]))

    def rmatvec(self, y: Tensor) -> Tensor:
        return self.matvec(y)

    def canonical(self) -> Tensor:
        return self.weight.reshape(-1, 1, 1, *(1,) * len(self.sizes or ()))

    def from_canonical(self, kernel: Tensor) -> Tensor:
        return kernel.flatten()

    @property
    def frequency_grid(self) -> Grid | None:
        return None if self.sizes is None else tuple((n, 1) for n in self.sizes)

    @property
    def lattice_factor(self) -> float:
        return 1.0


def compose(*layers: Any, input_size: InputSize = None) -> LinearOperator:
    """The composition of layers as one linear map, the outermost first: `compose(C, B, A)` is `x ↦ C(B(A(x)))`, without biases.

    Where the product is one matrix or one kernel it is that (a convolution with the batch normalization after it; linear layers;
    convolutions of which the outer one does not pad), else the factors act one after the other, with the crop between, as in the
    network. Nonlinearities are not seen: what lies between is for the caller to account for, by its Lipschitz constant.

    `spectral_norm` of one kernel or matrix is as exact as for a layer. Of finite factors that stay apart it is matrix-free, to
    1e-5 from below. Of factors that stay apart and have no input size it is the product of their norms: an upper bound,
    certified, at every input size.

    Args:
        layers: layers or operators, the outermost first. A batch normalization counts as in evaluation, `γ / √(running_var + ε)`
            for every channel. Between a convolution and a linear layer the positions are flattened.
        input_size: spatial size of the input of the innermost layer, from which the sizes of all others follow; None for lattice
            operators. Operators have theirs already.

    Returns:
        A ConvOperator or DenseOperator where the product is one, else a ComposedOperator, which has `matvec`, `rmatvec`,
        `to_dense`, and no weight of its own: projections take single layers.

    Raises:
        ValueError: no layer, shapes that do not fit, some with and others without an input size.
        TypeError, NotImplementedError: as `as_operator`.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> conv, norm = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.BatchNorm2d(8)
        >>> norm.weight.data[0] = 10.0
        >>> both = sh.compose(norm, conv)
        >>> bool(sh.spectral_norm(both) < 10 * sh.spectral_norm(sh.as_operator(conv)))
        True
    """
    operators: list[LinearOperator] = []
    size = input_size
    for i, layer in reversed(list(enumerate(layers))):
        if isinstance(layer, _BatchNorm):
            beside = [other for other in (*layers[i + 1 :], *layers[:i]) if not isinstance(other, _BatchNorm)]
            op: LinearOperator = _batch_norm(layer, size, operators[-1] if operators else None, beside)
        else:
            op = as_operator(layer, size)
        if op.is_finite:
            size = op.out_shape[1:] or None
        operators.append(op)
    if len({op.is_finite for op in operators}) > 1:
        raise ValueError("some of `layers` have an input size and others have none: give `input_size=`, of the innermost one.")
    return ComposedOperator(operators[::-1]).collapsed()


def _batch_norm(layer: Any, size: InputSize, inner: LinearOperator | None, others: list[Any]) -> ChannelGains:
    """The gains of a batch normalization in evaluation, at the positions of its input."""
    if layer.running_var is None:
        raise ValueError("a batch normalization without running statistics divides by those of each batch, and is no linear map.")
    gains = (layer.running_var + layer.eps).rsqrt()
    gains = gains if layer.weight is None else gains * layer.weight
    if inner is not None:
        return ChannelGains(gains, inner.out_shape[1:] if inner.is_finite else None)
    if isinstance(size, int):
        size = (size,) * {"BatchNorm1d": 1, "BatchNorm2d": 2, "BatchNorm3d": 3}.get(type(layer).__name__, 2)
    matrix = bool(others) and isinstance(as_operator(others[0]), DenseOperator)
    return ChannelGains(gains, tuple(size) if size is not None else () if matrix else None)


def _merged(outer: LinearOperator, inner: LinearOperator) -> LinearOperator | None:
    """One operator for the two, or None where there is none."""
    if isinstance(outer, ChannelGains) and isinstance(inner, ChannelGains):
        return inner.with_weight(outer.weight * inner.weight)
    if isinstance(outer, ChannelGains):
        return _scaled(inner, outer.weight, of_outputs=True)
    if isinstance(inner, ChannelGains):
        # a matrix after a flattening has more inputs than channels
        return _scaled(outer, inner.weight, of_outputs=False) if outer.channels[1] == len(inner.weight) else None
    if isinstance(outer, DenseOperator) and isinstance(inner, DenseOperator):
        return DenseOperator(outer.to_dense() @ inner.to_dense())
    if isinstance(outer, ConvOperator) and isinstance(inner, ConvOperator) and not (outer.transposed or inner.transposed):
        return _one_kernel(outer, inner)
    return None


def _scaled(op: LinearOperator, gains: Tensor, *, of_outputs: bool) -> LinearOperator | None:
    """The operator with gains on its channels."""
    if isinstance(op, DenseOperator):
        return op.with_weight(op.weight * (gains.unsqueeze(1) if of_outputs != op.transposed else gains))
    if not isinstance(op, ConvOperator):
        return None
    by_groups = op.weight.unflatten(0, (op.groups, -1))
    # the first channels of a kernel are its outputs, those of a transposed one its inputs
    axis = 1 if of_outputs != op.transposed else 2
    shape = [op.groups, 1, 1, *(1,) * (by_groups.ndim - 3)]
    shape[axis] = -1
    return op.with_weight((by_groups * gains.reshape(shape)).flatten(0, 1))


def _one_kernel(outer: ConvOperator, inner: ConvOperator) -> ConvOperator | None:
    """Two convolutions as one: tap `t` of the outer kernel stands `s d t` inputs apart, with `s` the inner stride."""
    cropped = outer.padding_mode == "zeros" and not any(map(any, outer.padding)) and inner.padding_mode == "zeros"
    if not cropped and not _one_period(outer, inner):
        return None
    spread = [s * d for s, d in zip(inner.stride, outer.dilation, strict=True)]
    first, second = _spread(_ungrouped(inner), inner.dilation), _spread(_ungrouped(outer), spread)
    dims = first.ndim - 2
    reach = [n - 1 for n in second.shape[2:]]
    # `conv` correlates, and a composition of correlations convolves their kernels
    padded = F.pad(first.transpose(0, 1), [r for n in reversed(reach) for r in (n, n)])
    kernel = _CONV[dims](padded, second.flip(tuple(range(2, 2 + dims)))).transpose(0, 1)
    pairs = zip(inner.padding, outer.padding, strict=True)
    return ConvOperator(
        kernel,
        stride=[s * t for s, t in zip(inner.stride, outer.stride, strict=True)],
        padding=[(a + c, b + d) for (a, b), (c, d) in pairs],
        padding_mode=inner.padding_mode,
        input_size=inner.input_size,
    )


def _one_period(outer: ConvOperator, inner: ConvOperator) -> bool:
    """Whether both are circular on one period, which the padding of the two together does not exceed: torch goes around once."""
    if outer.padding_mode != "circular" or inner.padding_mode != "circular" or outer.input_size is None:
        return False
    unstrided = set(outer.stride) | set(inner.stride) == {1}
    same = inner.input_size == outer.input_size == outer.out_shape[1:]
    amounts = zip(inner.padding, outer.padding, outer.input_size, strict=True)
    return unstrided and same and all(max(a + c, b + d) <= n for (a, b), (c, d), n in amounts)


def _ungrouped(op: ConvOperator) -> Tensor:
    """The kernel of the same convolution with one group, `(out, in, *taps)`: zeros off the blocks."""
    if op.groups == 1:
        return op.weight
    blocks = op.weight.unflatten(0, (op.groups, -1))
    eye = torch.eye(op.groups, dtype=op.weight.dtype, device=op.weight.device)
    rows = torch.einsum("goi...,gh->gohi...", blocks, eye)
    return rows.flatten(2, 3).flatten(0, 1)


def _spread(kernel: Tensor, spacing: Sequence[int]) -> Tensor:
    """The kernel with its taps so far apart, zeros between."""
    shape = [d * (k - 1) + 1 for d, k in zip(spacing, kernel.shape[2:], strict=True)]
    spread = kernel.new_zeros(*kernel.shape[:2], *shape)
    places = (slice(None), slice(None), *(slice(None, None, d) for d in spacing))
    spread[places] = kernel
    return spread


def _fit(outer: LinearOperator, inner: LinearOperator) -> bool:
    """Whether the outputs of one are the inputs of the other; a matrix takes all positions in a row."""
    if not (outer.is_finite and inner.is_finite):
        return outer.channels[1] == inner.channels[0]
    flat = isinstance(outer, DenseOperator) and prod(inner.out_shape) == prod(outer.in_shape)
    return flat or inner.out_shape == outer.in_shape


def _factors(op: LinearOperator) -> Sequence[LinearOperator]:
    return op.factors if isinstance(op, ComposedOperator) else (op,)
