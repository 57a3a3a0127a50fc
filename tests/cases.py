"""What the tests cross, once, as data: operators, kernels, and a row for every bound, projection, penalty and parametrization."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import cycle, product
from math import inf

import torch
from torch import Tensor, nn

import spectral_hooks as sh
from spectral_hooks import ConvOperator
from spectral_hooks.operators import DenseOperator, KernelOperator, LinearOperator

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@dataclass(frozen=True)
class Case:
    """One geometry of a convolution and one input size; `layer()` is torch's module for it."""

    size: tuple[int, ...]
    kernel: int | tuple[int, ...] = 3
    channels: tuple[int, int] = (2, 3)
    stride: int | tuple[int, ...] = 1
    padding: int | str | tuple[int, ...] = 0
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    mode: str = "zeros"
    transposed: bool = False
    output_padding: int | tuple[int, ...] = 0

    def __str__(self) -> str:
        shown = (
            f"{'T' if self.transposed else ''}{len(self.size)}d-k{self.kernel}-s{self.stride}-d{self.dilation}-p{self.padding}"
        )
        shown += f"-g{self.groups}-{self.mode}-n{self.size}"
        return (shown + (f"-o{self.output_padding}" if self.output_padding else "")).replace(" ", "")

    def layer(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
        """The torch layer, with random weights and no bias."""
        torch.manual_seed(seed)
        dims = len(self.size)
        shared = {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "padding_mode": self.mode,
            "bias": False,
            "dtype": dtype,
        }
        if self.transposed:
            return _TRANSPOSED[dims](*self.channels, self.kernel, output_padding=self.output_padding, **shared)
        return _CONVS[dims](*self.channels, self.kernel, **shared)

    def operator(self, weight: Tensor, finite: bool = True) -> ConvOperator:
        """The operator of the same geometry, from a raw weight."""
        return ConvOperator(
            weight,
            stride=self.stride,
            padding=self.padding,
            output_padding=self.output_padding,
            dilation=self.dilation,
            groups=self.groups,
            transposed=self.transposed,
            padding_mode=self.mode,
            input_size=self.size if finite else None,
        )

    @property
    def in_shape(self) -> tuple[int, ...]:
        return (self.channels[0], *self.size)


def apply_to_identity(layer: nn.Module, in_shape: tuple[int, ...]) -> Tensor:
    """The dense matrix of a layer, by applying the layer itself to every unit vector, without its bias."""
    dtype = next(layer.parameters()).dtype
    columns = torch.Size(in_shape).numel()
    with torch.no_grad():
        identity = torch.eye(columns, dtype=dtype).reshape(columns, *in_shape)
        offset = layer(torch.zeros(1, *in_shape, dtype=dtype))
        return (layer(identity) - offset).reshape(columns, -1).T


def _crossed(
    sizes: dict[str, tuple[int, ...]], kernels: tuple[int, ...], strides: tuple[int, ...], modes: tuple[str, ...]
) -> list[Case]:
    """Kernels × strides × dilations × groups × modes; paddings of three kinds taken in turn."""
    # one group, two groups with fewer outputs, depthwise with a multiplier
    groupings = [((2, 3), 1), ((4, 2), 2), ((2, 4), 2)]
    turns = cycle(("half", "none", "one", "full"))
    cases = []
    for k, s, d, (channels, groups), mode in product(kernels, strides, (1, 2), groupings, modes):
        reach = d * (k - 1)
        padding = {"half": (reach + 1) // 2, "none": 0, "one": 1, "full": reach}[next(turns)]
        size = sizes["large" if padding < reach / 2 else "small"]
        if mode == "transposed":
            # what the padding crops must leave an output
            padding = min(padding, reach // 2)
            extra = max(s, d) - 1
            case = Case(sizes["small"], k, channels, s, padding, d, groups, "zeros", True, extra)
        else:
            limit = {"reflect": min(size) - 1, "circular": min(size)}.get(mode, padding)
            case = Case(size, k, channels, s, min(padding, limit), d, groups, mode)
        cases.append(case)
    return cases


_MODES = ("zeros", "circular", "reflect", "replicate", "transposed")

_1D = _crossed({"small": (6,), "large": (10,)}, (1, 2, 3, 4, 5), (1, 2, 3), _MODES)
_2D = _crossed({"small": (6, 5), "large": (9, 10)}, (1, 2, 3, 5), (1, 2, 3), _MODES)
_3D = _crossed({"small": (3, 4, 3), "large": (5, 5, 6)}, (2, 3), (1, 2), ("zeros", "circular", "transposed"))

_SPECIAL = [
    # rectangular kernels, and a setting of its own for every axis
    Case((7, 6), (3, 2), stride=(2, 1), padding=(1, 0)),
    Case((7, 6), (1, 5), stride=(1, 3), padding=(0, 2), dilation=(2, 1)),
    Case((6, 8), (4, 3), stride=(2, 2), padding=(1, 2), mode="circular"),
    Case((6, 9), (2, 3), stride=(3, 2), padding=(1, 1), dilation=(2, 1), mode="circular"),
    Case((7, 5), (3, 4), padding=(2, 3), mode="reflect"),
    Case((7, 5), (3, 4), stride=(1, 2), padding=(2, 3), mode="replicate"),
    Case((4, 5, 3), (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)),
    Case((4, 5, 3), (3, 1, 2), stride=(2, 1, 1), padding=(1, 0, 1), mode="circular"),
    Case((4, 3), (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), transposed=True),
    Case((4, 3), (2, 3), stride=(1, 2), padding=(0, 1), dilation=(2, 3), output_padding=(1, 2), transposed=True),
    Case((3, 2, 3), (2, 3, 1), stride=(2, 1, 3), padding=(1, 1, 0), output_padding=(1, 0, 2), transposed=True),
    # words for padding; with an even reach and with an odd one
    Case((7,), 4, padding="same"),
    Case((7,), 2, padding="same", dilation=3),
    Case((7, 6), 3, padding="same"),
    Case((7, 6), (4, 3), padding="same", dilation=(1, 2)),
    Case((7, 6), (4, 2), padding="same", mode="circular"),
    Case((7, 6), (4, 2), padding="same", mode="reflect"),
    Case((7, 6), (4, 2), padding="same", mode="replicate"),
    Case((7, 6), 3, padding="valid", stride=2),
    Case((7, 6), 3, padding="valid", mode="circular"),
    # stride beyond the kernel: inputs that are never read
    Case((7,), 1, stride=3),
    Case((8, 7), 2, stride=3, channels=(3, 2)),
    Case((8, 9), 2, stride=(4, 3), mode="circular"),
    # circular padding: seams, rows that repeat, all the way around
    Case((5,), 3, stride=2, padding=1, mode="circular"),
    Case((7,), 3, stride=3, padding=1, mode="circular"),
    Case((4,), 3, padding=4, mode="circular"),
    Case((5,), 3, padding=4, stride=2, mode="circular"),
    Case((4, 5), 1, padding=2, mode="circular"),
    Case((3, 3), 5, padding=2, mode="circular"),
    Case((2, 2), 3, padding=1, mode="circular"),
    Case((4, 4), 3, padding=2, dilation=2, mode="circular"),
    Case((6, 6), 3, padding=2, dilation=2, stride=2, mode="circular"),
    Case((6,), 4, padding=4, dilation=3, mode="circular"),
    # a single position
    Case((1,), 1),
    Case((1, 1), 3, padding=1),
    Case((1, 1), 1, mode="circular"),
    Case((1, 1, 1), 1, transposed=True),
    # a single channel on one side; depthwise
    Case((6, 5), 3, channels=(1, 4), padding=1),
    Case((6, 5), 3, channels=(3, 3), groups=3, padding=1),
    Case((6, 5), 3, channels=(4, 1), padding=1, stride=2),
]

#: Every geometry.
CONVS = _SPECIAL + _1D + _2D + _3D

#: Few of them, for what costs more; every kind is still there.
FEW_CONVS = _SPECIAL + _1D[3::23] + _2D[5::31] + _3D[2::11]

# -- kernels, by what their spectrum is like ----------------------------------------------------------------------------------


def random(*shape: int, seed: int = 0) -> Tensor:
    """A Gaussian kernel in float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def smooth(*shape: int) -> Tensor:
    """Low-pass in every channel: a trained kernel's kind, the symbol is largest near zero."""
    kernel = random(*shape).abs()
    for axis in range(2, len(shape)):
        bump = torch.hann_window(shape[axis] + 2, periodic=False, dtype=torch.float64)[1:-1]
        kernel = kernel * bump.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return kernel


def sparse(*shape: int) -> Tensor:
    """One entry in ten."""
    kernel = random(*shape)
    return kernel * (random(*shape, seed=1) > 1.28)


def rank_one(*shape: int) -> Tensor:
    """An outer product of channels and taps."""
    out = torch.ones((), dtype=torch.float64)
    for axis, size in enumerate(shape):
        out = out.unsqueeze(-1) * random(size, seed=axis)
    return out


def single_tap(*shape: int) -> Tensor:
    """All zero but one tap off the centre."""
    kernel = torch.zeros(shape, dtype=torch.float64)
    last = (slice(None), slice(None), *(size - 1 for size in shape[2:]))
    kernel[last] = random(*shape[:2])
    return kernel


def flat(*shape: int) -> Tensor:
    """Every singular value one at every frequency: an orthogonal matrix of shifts, no frequency can be dropped."""
    out, inner = shape[:2]
    q = torch.linalg.qr(random(out, inner)).Q
    kernel = torch.zeros(shape, dtype=torch.float64)
    for i, tap in zip(range(inner), product(*(range(k) for k in shape[2:])), strict=False):
        kernel[(slice(None), i, *tap)] = q[:, i]
    return kernel


def nearly_flat(*shape: int) -> Tensor:
    """The same, disturbed by a thousandth."""
    return flat(*shape) + 1e-3 * random(*shape, seed=2)


def off_grid(*shape: int) -> Tensor:
    """Largest at a frequency that is no simple fraction of a turn."""
    kernel = random(*shape)
    for axis in range(2, len(shape)):
        wave = torch.cos((0.7319 + 0.41 * axis) * torch.arange(shape[axis], dtype=torch.float64) + 0.3)
        kernel = (
            kernel.mean((0, 1), keepdim=True).expand(shape) * 0
            + kernel * 0.1
            + wave.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        )
    return kernel


#: name: kernel, settings of the operator
KERNELS: dict[str, tuple[Tensor, dict]] = {
    "random": (random(4, 3, 3, 3), {}),
    "random-5": (random(3, 3, 5, 5), {}),
    "random-wide": (random(30, 30, 3, 3), {}),
    "even": (random(3, 4, 2, 4), {}),
    "rectangular": (random(3, 4, 1, 5), {}),
    "smooth": (smooth(4, 4, 3, 3), {}),
    "smooth-5": (smooth(3, 4, 5, 5), {}),
    "off-grid": (off_grid(3, 3, 5, 5), {}),
    "sparse": (sparse(6, 6, 3, 3), {}),
    "rank-one": (rank_one(4, 5, 3, 3), {}),
    "zero": (torch.zeros(3, 3, 3, 3, dtype=torch.float64), {}),
    "single-tap": (single_tap(4, 3, 3, 3), {}),
    "one-by-one": (random(4, 3, 1, 1), {}),
    "flat": (flat(4, 4, 3, 3), {}),
    "flat-wide": (flat(28, 28, 3, 3), {}),
    "nearly-flat": (nearly_flat(4, 4, 3, 3), {}),
    "grouped": (random(6, 2, 3, 3), {"groups": 3}),
    "depthwise": (random(5, 1, 3, 3), {"groups": 5}),
    "one-large-group": (random(4, 1, 3, 3) * torch.tensor([1.0, 1e-3, 50.0, 0.0]).double().reshape(4, 1, 1, 1), {"groups": 4}),
    "stride-2": (random(4, 3, 3, 3), {"stride": 2, "padding": 1}),
    "stride-2-smooth": (smooth(3, 3, 4, 4), {"stride": 2}),
    "stride-3": (random(3, 2, 5, 5), {"stride": 3}),
    "stride-mixed": (random(3, 2, 3, 4), {"stride": (1, 2)}),
    "dilated": (random(3, 3, 3, 3), {"dilation": 2}),
    "dilated-strided": (random(3, 2, 3, 3), {"dilation": 2, "stride": 3}),
    "dilated-by-the-stride": (random(3, 2, 3, 3), {"dilation": 2, "stride": 2}),
    "transposed": (random(3, 4, 3, 3), {"transposed": True, "stride": 2, "output_padding": 1}),
    "transposed-grouped": (random(4, 2, 3, 3), {"transposed": True, "stride": 2, "groups": 2}),
    "tiny": (random(3, 3, 3, 3) * 1e-30, {}),
    "huge": (random(3, 3, 3, 3) * 1e30, {}),
    "badly-scaled": (random(4, 4, 3, 3) * torch.tensor([1e30, 1.0, 1e-30, 0.0]).double().reshape(4, 1, 1, 1), {}),
    "1d": (random(3, 4, 5), {}),
    "1d-long": (random(2, 2, 31), {}),
    "1d-strided": (random(3, 2, 5), {"stride": 2}),
    "1d-depthwise": (random(4, 1, 7), {"groups": 4}),
    "1d-off-grid": (off_grid(2, 2, 9), {}),
    "3d": (random(2, 3, 3, 3, 3), {}),
    "3d-smooth": (smooth(2, 2, 3, 3, 3), {}),
    "3d-strided": (random(2, 2, 3, 2, 3), {"stride": 2}),
    "3d-transposed": (random(2, 2, 2, 3, 2), {"stride": (1, 2, 1), "transposed": True}),
}

#: An operator of every kind, from one weight of shape `(3, 2, 3, 3)`.
OPERATORS: dict[str, Callable[[Tensor], KernelOperator]] = {
    "dense": lambda w: DenseOperator(w.flatten(1)),
    "lattice": lambda w: ConvOperator(w),
    "lattice-strided": lambda w: ConvOperator(w, stride=2),
    "lattice-dilated": lambda w: ConvOperator(w, dilation=2, stride=2),
    "lattice-grouped": lambda w: ConvOperator(w, groups=3),
    "lattice-transposed": lambda w: ConvOperator(w, transposed=True, stride=2),
    "circular": lambda w: ConvOperator(w).circular((5, 4)),
    "circular-strided": lambda w: ConvOperator(w, stride=2).circular((6, 4)),
    "zeros": lambda w: ConvOperator(w, padding=1, input_size=(4, 3)),
    "reflect": lambda w: ConvOperator(w, padding=1, padding_mode="reflect", input_size=(4, 3)),
}


# -- layers that are made orthogonal ------------------------------------------------------------------------------------------

#: Convolutions for what is orthogonal: channels, kernel, settings; and an input size that every stride divides.
GEOMETRIES: dict[str, tuple[tuple, dict, tuple[int, ...]]] = {
    "square": ((4, 4, 3), {"padding": 1}, (5, 6)),
    "smaller than the kernel": ((2, 2, 5), {"padding": 2}, (3, 2)),
    "more outputs": ((2, 5, 3), {"padding": 1}, (5, 4)),
    "fewer outputs": ((5, 2, 3), {"padding": 1}, (5, 4)),
    "5×3": ((3, 3, (5, 3)), {"padding": (2, 1)}, (6, 5)),
    "even": ((3, 3, (4, 2)), {"padding": "same"}, (6, 5)),
    "1×1": ((5, 3, 1), {}, (2, 3)),
    "stride": ((2, 6, 3), {"padding": 1, "stride": 2}, (6, 8)),
    "stride, more outputs": ((2, 9, 3), {"padding": 1, "stride": (2, 1)}, (6, 3)),
    "stem": ((1, 3, 7), {"padding": 3, "stride": 2}, (8, 6)),
    "patches": ((2, 5, 4), {"stride": 4}, (8, 4)),
    "patches with gaps": ((2, 9, 1), {"stride": 2}, (4, 6)),
    "gap and overlap": ((2, 5, 3), {"padding": 1, "stride": 3}, (6, 3)),
    "grouped": ((4, 6, 3), {"padding": 1, "groups": 2}, (4, 5)),
    "grouped stride": ((4, 4, 2), {"stride": 2, "groups": 2}, (4, 6)),
    "grouped stride, overlap": ((4, 6, 3), {"padding": 1, "stride": 2, "groups": 2}, (4, 6)),
    "depthwise": ((3, 3, 3), {"padding": 1, "groups": 3}, (4, 5)),
    "dilated": ((3, 3, 3), {"padding": 2, "dilation": 2}, (6, 5)),
    "1-D": ((3, 4, 5), {"padding": 2}, (9,)),
    "3-D": ((2, 2, 3), {"padding": 1}, (3, 2, 4)),
    "circular": ((3, 3, 3), {"padding": 1, "padding_mode": "circular"}, (5, 4)),
    "circular stride": ((2, 3, 3), {"padding": 1, "stride": 2, "padding_mode": "circular"}, (6, 4)),
}


def conv_layer(name: str, dtype: torch.dtype = torch.float64, gain: float = 1.0, bias: bool = False) -> nn.Module:
    """The layer of this geometry, its weight times a gain."""
    torch.manual_seed(0)
    arguments, settings, size = GEOMETRIES[name]
    layer = _CONVS[len(size)](*arguments, bias=bias, **settings).to(dtype)
    with torch.no_grad():
        layer.weight.mul_(gain)
    return layer


def in_shape(name: str) -> tuple[int, ...]:
    """Of an input of this geometry."""
    (channels, *_), _, size = GEOMETRIES[name]
    return (channels, *size)


def all_singular_values(layer: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The `min(outputs, inputs)` of them, from the dense matrix."""
    return torch.linalg.svdvals(apply_to_identity(layer, shape).double())


def train(layer: nn.Module, shape: tuple[int, ...], steps: int = 200) -> None:
    """Regression on noise: far from where it started, by a step size that is too long."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    x = torch.randn(8, *shape)
    y = torch.randn_like(layer(x).detach())
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(layer(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


# -- one row for everything that the library offers -----------------------------------------------------------------------------

#: Every bound: `operator -> 0-d tensor`; after a hyphen, with the ends of its arguments.
BOUNDS: dict[str, Callable[[LinearOperator], Tensor]] = {
    "cosine_grid": sh.bounds.cosine_grid,
    "cosine_grid-coarse": partial(sh.bounds.cosine_grid, oversampling=1.3),
    "gram_iteration": sh.bounds.gram_iteration,
    "gram_iteration-0": partial(sh.bounds.gram_iteration, steps=0, oversampling=2),
    "gram_iteration-20": partial(sh.bounds.gram_iteration, steps=20, oversampling=2),
    "kernel_gram-1": partial(sh.bounds.kernel_gram, steps=1),
    "kernel_gram": partial(sh.bounds.kernel_gram, steps=3),
    "unfolding": sh.bounds.unfolding,
    "tap_sum": sh.bounds.tap_sum,
    "frobenius_grid": sh.bounds.frobenius_grid,
    "frobenius_grid-coarse": partial(sh.bounds.frobenius_grid, oversampling=1.3),
    "absolute_sum": sh.bounds.absolute_sum,
}

#: Every projection: `(operator, max_norm) -> weight`.
PROJECTIONS: dict[str, Callable[[LinearOperator, float], Tensor]] = {
    "clip": sh.projections.clip,
    "clip-1-round": partial(sh.projections.clip, rounds=1),
    "rescale": sh.projections.rescale,
    "band": partial(sh.projections.band, min_norm=0.3),
    "band-0": sh.projections.band,
    "polar": sh.projections.polar,
    "soft_cap": sh.projections.soft_cap,
    "soft_cap-strength": partial(sh.projections.soft_cap, strength=0.1),
    "hammer": sh.projections.hammer,
    "clipped_decay": sh.projections.clipped_decay,
    "parseval": sh.projections.parseval,
}

#: Those that leave what is inside as it is, bit for bit.
KEEPING = {name: project for name, project in PROJECTIONS.items() if name.partition("-")[0] in ("clip", "rescale")}

#: Every penalty: `operator -> 0-d tensor`, differentiable.
PENALTIES: dict[str, Callable[[LinearOperator], Tensor]] = {}


@dataclass(frozen=True)
class Made:
    """A parametrization of one layer, and what it promises of it."""

    make: Callable[[nn.Module], nn.Module]
    layer: Callable[[], nn.Module]
    #: of one input
    shape: tuple[int, ...]
    #: of the layer as it is applied
    max_norm: float = 1.0
    #: whether `remove_spectral` finds a plain layer that equals it
    is_plain: bool = True


def _linear() -> nn.Module:
    return nn.Linear(6, 4)


def _conv() -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1)


def _strided() -> nn.Module:
    return nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2)


def _circular() -> nn.Module:
    return nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")


#: Every parametrization, on layers of each kind that it takes.
PARAMETRIZATIONS: dict[str, Made] = {
    "rescaled": Made(partial(sh.parametrizations.rescaled, max_norm=0.5), _conv, (4, 5, 6), 0.5),
    "rescaled-strided": Made(partial(sh.parametrizations.rescaled, max_norm=0.5), _strided, (4, 9), 0.5),
    "rescaled-matrix": Made(partial(sh.parametrizations.rescaled, max_norm=0.5), _linear, (6,), 0.5),
    "clipped": Made(partial(sh.parametrizations.clipped, max_norm=0.5), _conv, (4, 5, 6), 0.5),
    "clipped-strided": Made(partial(sh.parametrizations.clipped, max_norm=0.5), _strided, (4, 9), 0.5),
    "clipped-matrix": Made(partial(sh.parametrizations.clipped, max_norm=0.5), _linear, (6,), 0.5),
    "banded": Made(sh.parametrizations.banded, _linear, (6,)),
    "orthogonal": Made(sh.parametrizations.orthogonal, _conv, (4, 5, 6)),
    "orthogonal-strided": Made(sh.parametrizations.orthogonal, _strided, (4, 9)),
    "orthogonal-matrix": Made(sh.parametrizations.orthogonal, _linear, (6,)),
    "skew": Made(sh.parametrizations.skew, _conv, (4, 5, 6), is_plain=False),
    "cayley": Made(sh.parametrizations.cayley, _circular, (4, 5, 6), is_plain=False),
    # a normalizer of each channel: together they reach the root of their number
    "conv_norm": Made(sh.parametrizations.conv_norm, _circular, (4, 5, 6), 2.0, is_plain=False),
    "group_shuffle": Made(partial(sh.parametrizations.group_shuffle, blocks=2), _conv, (4, 5, 6), is_plain=False),
    "group_shuffle-matrix": Made(partial(sh.parametrizations.group_shuffle, blocks=2), lambda: nn.Linear(6, 6), (6,)),
    # no bound of its own
    "tensor_train": Made(partial(sh.parametrizations.tensor_train, rank=2), _conv, (4, 5, 6), inf),
    "tensor_train-matrix": Made(partial(sh.parametrizations.tensor_train, rank=2), _linear, (6,), inf),
}

#: One layer of each kind that operators tell apart, for what costs little.
SOME_CONVS = [
    Case((6, 5), 3, padding=1),
    Case((7,), 4, stride=2, padding=1),
    Case((6, 6), 3, (4, 2), padding=2, dilation=2, groups=2),
    Case((6, 6), 2, stride=2),
    Case((4, 3), 3, stride=2, padding=1, output_padding=1, transposed=True),
    Case((6, 5), 3, padding=1, mode="circular"),
    Case((6, 5), 3, padding=1, mode="reflect"),
    Case((3, 4, 3), 2, padding=1),
]

#: Shapes of matrices `(out, in)`.
MATRICES = [(1, 1), (1, 5), (5, 1), (4, 4), (3, 7), (7, 3)]


def resized(case: Case, size: tuple[int, ...]) -> Case:
    """The same layer at another input size."""
    return replace(case, size=size)


@cache
def traces_copies() -> bool:
    """Whether this torch can trace `copy.copy`, and so an operator with another weight, in one graph: 2.5 and 2.6 break there."""
    try:
        torch.compile(lambda x: copy.copy(_Holder()).one * x, fullgraph=True, backend="eager")(torch.ones(1))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


def shards_on_cpu() -> bool:
    """Whether this torch's FSDP2 works without CUDA: that of 2.5, which lies at another place, does not."""
    from torch.distributed import fsdp

    return hasattr(fsdp, "fully_shard")


def free_port() -> int:
    """Of this machine, for processes that are to meet there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class _Holder:
    one = 1.0
