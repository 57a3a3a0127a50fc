"""Every operator and every projection that the tests cross, once, as data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import cycle, product

import torch
from torch import Tensor, nn

from spectral_hooks import ConvOperator, bounds, projections
from spectral_hooks.operators import LinearOperator

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

#: Every bound: `operator -> 0-d tensor`; after a hyphen, with the ends of its arguments.
BOUNDS: dict[str, Callable[[LinearOperator], Tensor]] = {
    "cosine_grid": bounds.cosine_grid,
    "cosine_grid-coarse": partial(bounds.cosine_grid, oversampling=1.3),
    "gram_iteration": bounds.gram_iteration,
    "gram_iteration-0": partial(bounds.gram_iteration, steps=0, oversampling=2),
    "gram_iteration-20": partial(bounds.gram_iteration, steps=20, oversampling=2),
    "kernel_gram-1": partial(bounds.kernel_gram, steps=1),
    "kernel_gram": partial(bounds.kernel_gram, steps=3),
    "unfolding": bounds.unfolding,
    "tap_sum": bounds.tap_sum,
    "frobenius_grid": bounds.frobenius_grid,
    "frobenius_grid-coarse": partial(bounds.frobenius_grid, oversampling=1.3),
    "absolute_sum": bounds.absolute_sum,
}

#: Every projection: `(operator, max_norm) -> weight`.
PROJECTIONS: dict[str, Callable[[LinearOperator, float], Tensor]] = {
    "clip": projections.clip,
    "clip-1-round": partial(projections.clip, rounds=1),
    "rescale": projections.rescale,
}

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


class _Holder:
    one = 1.0
