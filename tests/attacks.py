"""Random layers chosen to break promises: odd geometries, kernels with structure, scales at the ends of every dtype.

Every function takes a `numpy` generator, so that a seed gives the same attack everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, pi
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Rng = np.random.Generator

_CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def pick(rng: Rng, items: Sequence[Any], p: Sequence[float] | None = None) -> Any:
    """One of the items."""
    return items[int(rng.choice(len(items), p=p))]


def dtype(rng: Rng) -> torch.dtype:
    """Mostly float32."""
    return pick(rng, DTYPES, [0.4, 0.2, 0.2, 0.2])


# -- kernels: `(rows, columns, *taps)` of one group, entries of order one ----------------------------------------------------


def _gaussian(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    return rng.normal(size=shape)


def _positive(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    return rng.uniform(size=shape)


def _box(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """All entries equal: rank one, the supremum at frequency zero, all bounds of sums tight."""
    return np.ones(shape) * pick(rng, [-1, 1])


def _delta(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """A single entry: every frequency attains the supremum."""
    kernel = np.zeros(shape)
    kernel[tuple(rng.integers(0, shape))] = 1.0
    return kernel


def _rank_one(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """A product of vectors along every axis."""
    kernel = np.ones(())
    for n in shape:
        kernel = np.multiply.outer(kernel, rng.normal(size=n))
    return kernel


def _band_pass(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """Waves of one frequency with random channel gains: the supremum off the axes, a sharp peak."""
    phase = np.indices(shape[2:]).T @ rng.uniform(0, pi, size=len(shape) - 2) if shape[2:] else np.zeros(())
    phase = phase.T
    gains, turns = rng.normal(size=shape[:2]), rng.uniform(0, 2 * pi) * (rng.random() < 0.5)
    return gains.reshape(*shape[:2], *(1,) * phase.ndim) * np.cos(phase + turns)


def _rotations(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """`I + R e^{-iθ}`: pairs of singular values `2 |cos((θ ± α) / 2)|`, that cross at zero, far from the supremum at `±α`."""
    kernel = np.zeros(shape)
    side = min(shape[:2])
    angles = np.full(side // 2 + 1, rng.uniform(0, pi))
    if rng.random() < 0.5:  # nearly degenerate pairs
        angles = angles + rng.uniform(-1, 1, size=len(angles)) * 10.0 ** rng.uniform(-9, -1)
    turned = np.eye(side)
    for i in range(0, side - 1, 2):
        c, s = np.cos(angles[i // 2]), np.sin(angles[i // 2])
        turned[i : i + 2, i : i + 2] = [[c, -s], [s, c]]
    last = tuple(k - 1 for k in shape[2:])
    # a single tap takes both
    kernel[(slice(side), slice(side), *(0 for _ in last))] += np.eye(side)
    kernel[(slice(side), slice(side), *last)] += turned
    return kernel


def _orthogonal(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """A product of projector pairs `P + (I - P) e^{-iθ}`: all singular values one at every frequency, up to rounding."""
    size = max(shape[:2])
    kernel = np.linalg.qr(rng.normal(size=(size, size)))[0].reshape(size, size, *(1,) * (len(shape) - 2))
    for axis, k in enumerate(shape[2:], start=2):
        for _ in range(k - 1):
            frame = np.linalg.qr(rng.normal(size=(size, size)))[0][:, : int(rng.integers(0, size + 1))]
            stays = np.tensordot(frame @ frame.T, kernel, 1)
            empty = np.zeros((*kernel.shape[:axis], 1, *kernel.shape[axis + 1 :]))
            kernel = np.concatenate([stays, empty], axis) + np.concatenate([empty, kernel - stays], axis)
    return kernel[: shape[0], : shape[1]]


def _spread(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """Channels of scales from one down to 1e-12: ill-conditioned, most of it below float32's rounding."""
    scales = [10.0 ** rng.uniform(-12, 0, size=n) for n in shape[:2]]
    return rng.normal(size=shape) * np.multiply.outer(*scales).reshape(*shape[:2], *(1,) * (len(shape) - 2))


def _one_large(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """One entry that dwarfs the others."""
    return rng.normal(size=shape) * 10.0 ** rng.uniform(-8, -1) + _delta(rng, shape)


def _smooth(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """A low-pass kernel."""
    window, width = np.ones(()), rng.uniform(0.5, 8)
    for k in shape[2:]:
        window = np.multiply.outer(window, np.exp(-((np.arange(k) - (k - 1) / 2) ** 2) / width))
    return rng.normal(size=(*shape[:2], *(1,) * (len(shape) - 2))) * window


def _repeated(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """Gaussian with repeated channels: equal rows, equal columns."""
    kernel = rng.normal(size=shape)
    return kernel[rng.integers(0, shape[0], size=shape[0])][:, rng.integers(0, shape[1], size=shape[1])]


def _flat(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """At the middle tap a matrix with equal singular values, and a ripple elsewhere: nearly flat, as what was clipped."""
    kernel = rng.normal(size=shape) * 10.0 ** rng.uniform(-8, -1)
    middle = np.linalg.qr(rng.normal(size=(max(shape[:2]),) * 2))[0][: shape[0], : shape[1]]
    kernel[(..., *(k // 2 for k in shape[2:]))] = middle
    return kernel


def _whole(rng: Rng, shape: tuple[int, ...]) -> np.ndarray:
    """Small whole numbers, with zeros."""
    return rng.integers(-2, 3, size=shape).astype(float)


KERNELS: tuple[Callable[[Rng, tuple[int, ...]], np.ndarray], ...] = (
    _gaussian,
    _positive,
    _box,
    _delta,
    _rank_one,
    _band_pass,
    _rotations,
    _orthogonal,
    _spread,
    _one_large,
    _smooth,
    _repeated,
    _flat,
    _whole,
)


def values(rng: Rng, shape: tuple[int, ...], groups: int = 1) -> np.ndarray:
    """A weight of entries of order one, `(out, in / groups, *taps)`: the groups of one kind or of several, some of them zero."""
    part = (shape[0] // groups, *shape[1:])
    kinds = [pick(rng, KERNELS)] * groups if rng.random() < 0.7 else [pick(rng, KERNELS) for _ in range(groups)]
    parts = [kind(rng, part) for kind in kinds]
    if groups > 1 and rng.random() < 0.3:
        levels = 10.0 ** rng.uniform(-20, 0, size=groups) * rng.integers(0, 2, size=groups)
        parts = [kernel * level for kernel, level in zip(parts, levels, strict=True)]
    if rng.random() < 0.02:
        parts = [0 * kernel for kernel in parts]
    return np.concatenate(parts)


def scale(rng: Rng, dtype: torch.dtype, extreme: float = 0.4) -> float:
    """A factor for entries of order one: one, a power of ten that the dtype holds, or an end of the dtype's range."""
    info = torch.finfo(dtype)
    if rng.random() >= extreme:
        return 1.0
    kind = pick(rng, ["power", "power", "max", "tiny", "subnormal"])
    if kind == "power":
        low, high = max(-30.0, np.log10(info.tiny)), min(30.0, np.log10(info.max) - 2)
        return 10.0 ** rng.uniform(low, high)
    # beyond float64 the reference itself has no room
    top, tiny = min(info.max, 1e300), max(info.tiny, 1e-290)
    return {"max": top, "tiny": tiny * 10.0 ** rng.uniform(0, 2), "subnormal": tiny * 10.0 ** rng.uniform(-3, 0)}[kind]


def stored(values: np.ndarray, factor: float, dtype: torch.dtype) -> Tensor:
    """Values times a factor, rounded to a dtype, none beyond its largest number."""
    largest, limit = float(np.abs(values).max(initial=0.0)), torch.finfo(dtype).max
    factor = factor if factor * largest <= limit else limit / largest
    tensor = torch.from_numpy(np.ascontiguousarray(values * factor)).to(dtype)
    return tensor.clamp(-limit, limit)


# -- layers -----------------------------------------------------------------------------------------------------------------


def linear(rng: Rng, dtype: torch.dtype, most: int = 24, extreme: float = 0.4) -> nn.Linear:
    """A matrix."""
    shape = (int(rng.integers(1, most + 1)), int(rng.integers(1, most + 1)))
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    layer.weight.data = stored(values(rng, shape), scale(rng, dtype, extreme), dtype)
    return layer


def convolution(
    rng: Rng,
    dtype: torch.dtype,
    *,
    modes: Sequence[str] = ("zeros",),
    dims: int | None = None,
    transposed: bool | None = None,
    most: int = 6,
    extreme: float = 0.4,
) -> Any:
    """A convolution of any geometry: strides and dilations that share factors, even kernels, groups, depthwise."""
    dims = dims or pick(rng, [1, 2, 3], [0.35, 0.5, 0.15])
    longest = {1: 7, 2: 4, 3: 3}[dims]
    kernel = tuple(int(rng.integers(1, longest + 1)) for _ in range(dims))
    if rng.random() < 0.4:
        kernel = (kernel[0],) * dims
    stride = tuple(pick(rng, [1, 1, 1, 2, 2, 3, 4][: 8 - dims]) for _ in range(dims))
    dilation = tuple(pick(rng, [1, 1, 1, 2, 2, 3, 4][: 8 - dims]) for _ in range(dims))
    if rng.random() < 0.4:
        stride = (1,) * dims
    if rng.random() < 0.4:
        dilation = (1,) * dims
    groups = pick(rng, [1, 1, 1, 2, 3, 5])
    per_group = max(most // groups, 1)
    channels = [groups * int(rng.integers(1, per_group + 1)) for _ in range(2)]
    if rng.random() < 0.15:  # depthwise, with a multiplier
        groups = int(rng.integers(1, most + 1))
        channels = [groups, groups * pick(rng, [1, 1, 2])]
    transposed = rng.random() < 0.2 if transposed is None else transposed
    mode = "zeros" if transposed else pick(rng, modes)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding: Any = tuple(int(rng.integers(0, r // 2 + 2)) for r in reach)
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups, "bias": False, "dtype": dtype}
    if transposed:
        padding = tuple(min(p, r // 2) for p, r in zip(padding, reach, strict=True))
        extra = tuple(int(rng.integers(0, max(s, d))) for s, d in zip(stride, dilation, strict=True))
        layer: Any = _TRANSPOSED[dims](*channels, kernel, padding=padding, output_padding=extra, **options)
    else:
        if rng.random() < 0.1 and set(stride) == {1}:
            padding = "same"
        layer = _CONVS[dims](*channels, kernel, padding=padding, padding_mode=mode, **options)
    shape = tuple(layer.weight.shape)
    layer.weight.data = stored(values(rng, shape, groups), scale(rng, dtype, extreme), dtype)
    return layer


def wide_circular(rng: Rng, dtype: torch.dtype) -> tuple[Any, tuple[int, ...]]:
    """A circular convolution of 8 to 48 channels, with waves or nearly degenerate pairs, and a size that its strides divide."""
    dims = pick(rng, [1, 1, 2])
    channels = int(rng.integers(8, 49)) if dims == 1 else int(rng.integers(8, 33))
    columns = channels if rng.random() < 0.6 else int(rng.integers(8, 49 if dims == 1 else 33))
    kernel = tuple(int(rng.integers(2, 5 if dims == 1 else 4)) for _ in range(dims))
    stride = (pick(rng, [1, 1, 1, 2]),) * dims
    layer: Any = _CONVS[dims](columns, channels, kernel, stride=stride, padding_mode="circular", bias=False, dtype=dtype)
    kind = pick(rng, [_rotations, _rotations, _band_pass, _orthogonal, _flat, _gaussian, _smooth, _positive])
    layer.weight.data = stored(kind(rng, tuple(layer.weight.shape)), scale(rng, dtype, 0.1), dtype)
    largest = 60 if dims == 1 else 16
    return layer, tuple(s * int(rng.integers(ceil(k / s), largest // s)) for k, s in zip(kernel, stride, strict=True))


def circular_pairs(rng: Rng) -> tuple[Any, int]:
    """A circular convolution of 26 to 48 channels whose singular values cross, and a size whose grid misses the supremum.

    The norms of its symbol are `2 |cos((j θ ± α) / 2)|`: searches may not take the largest of a grid for the supremum.
    """
    channels, taps = 2 * int(rng.integers(13, 25)), int(rng.integers(2, 4))
    layer = nn.Conv1d(channels, channels, taps, padding_mode="circular", bias=False, dtype=torch.float64)
    layer.weight.data = torch.from_numpy(_rotations(rng, (channels, channels, taps)))
    return layer, int(rng.integers(16 * (taps - 1), 30 * (taps - 1)))


def size(rng: Rng, layer: Any, largest: int = 400) -> tuple[int, ...]:
    """An input size that torch takes, small enough for dense matrices."""
    if isinstance(layer, nn.Linear):
        return ()
    dims = len(layer.kernel_size)
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    padding = [(r // 2, r - r // 2) for r in reach] if layer.padding == "same" else [(p, p) for p in layer.padding]
    if layer.transposed:
        least = [1] * dims
        axes = zip(layer.stride, reach, padding, layer.output_padding, strict=True)
        least = [max(1, ceil((2 * p[0] - r - extra) / s) + 1) for s, r, p, extra in axes]
    else:
        least = [max(1, r + 1 - sum(p)) for r, p in zip(reach, padding, strict=True)]
        wrapped = {"zeros": None, "replicate": None, "reflect": 1, "circular": 0}[layer.padding_mode]
        if wrapped is not None:
            least = [max(n, max(p) + wrapped) for n, p in zip(least, padding, strict=True)]
    most = max(int((largest / layer.in_channels) ** (1 / dims)), 1)
    return tuple(int(rng.integers(n, max(n, most) + 1)) for n in least)


def divided(rng: Rng, layer: Any, largest: int = 400) -> tuple[int, ...]:
    """An input size for `circular` that the strides divide."""
    most = max(int((largest / layer.in_channels) ** (1 / len(layer.kernel_size))), 1)
    strides = (1,) * len(layer.kernel_size) if layer.transposed else layer.stride
    return tuple(s * int(rng.integers(1, max(most // s, 1) + 1)) for s in strides)


def level(rng: Rng, norm: float) -> float:
    """A bound for a weight of this norm: far below it, close to it on both sides, above; or one that knows nothing of it."""
    if norm == 0 or rng.random() < 0.1:
        return 10.0 ** rng.uniform(-30, 30)
    close = 1 + pick(rng, [-1, 1]) * 10.0 ** rng.uniform(-9, -1)
    share = pick(rng, [10.0 ** rng.uniform(-4, 0), rng.uniform(0.2, 1), close, rng.uniform(1, 3)])
    # `max_norm` is a positive float
    return float(min(max(norm * share, 5e-324), 1e300))


def shown(layer: Any) -> str:
    """A layer in a line of a report."""
    weight = layer.weight
    text = repr(layer).replace(" ", "")
    return f"{text} {str(weight.dtype).removeprefix('torch.')} max|w|={float(weight.detach().double().abs().max()):.3g}"
