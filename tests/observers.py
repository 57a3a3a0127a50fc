"""Independent references: what the library is judged by. Nothing here uses the library.

All in float64, by other formulas than the library's. Matrices by LAPACK's singular values. Finite layers by applying torch's own
module to every unit vector. Convolutions on the infinite lattice by the **alias form**: a stride folds the `s` input frequencies
`ψ_j = (φ + 2πj) / s` onto one output frequency `φ`, so the layer is there the matrix

    A(φ) = [K̂(ψ_0), …, K̂(ψ_{s-1})] / √s,   K̂(ψ) = Σ_t K[:, :, t] exp(-i δ t ψ),

for each axis, and its norm is `sup_φ ‖A(φ)‖₂`. The library takes phases of the kernel, not aliases of the frequency.

Weights are divided by a power of two before anything is squared, so that no scale of any dtype under- or overflows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from math import ceil, frexp, ldexp, pi, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

#: Points over the degree, per axis, of the grid on which the search for the supremum starts; by dimension.
_POINTS = {1: 24, 2: 8, 3: 4}
#: Local maxima from which it climbs, and how often the step is halved: to 1e-6 of the grid's spacing, whose square counts.
_CLIMBERS, _HALVINGS = 8, 20
#: Random directions tried beside the axes and diagonals in every round of a climb, and rounds at most.
_DIRECTIONS, _ROUNDS = 24, 200
#: Bytes of symbols held at once.
_CHUNK_BYTES = 1 << 26


def unit_scaled(values: np.ndarray) -> tuple[np.ndarray, int]:
    """Values over the power of two, `2^k`, that brings the largest into [½, 1), and `k`; exact, at every scale of float64."""
    values = np.asarray(values, dtype=np.float64)
    exponent = frexp(float(np.abs(values).max(initial=0.0)))[1]
    # in two steps: 2^1074 is no float64
    half = exponent // 2
    return np.ldexp(np.ldexp(values, -half), half - exponent), exponent


def array(tensor: Tensor) -> np.ndarray:
    """The stored values in float64, exactly."""
    return tensor.detach().to("cpu", torch.float64).numpy()


def singular_values(matrix: Tensor | np.ndarray) -> np.ndarray:
    """Of a matrix, descending; LAPACK in float64."""
    scaled, exponent = unit_scaled(array(matrix) if isinstance(matrix, Tensor) else matrix)
    return np.ldexp(np.linalg.svd(scaled, compute_uv=False), exponent)


def matrix_norm(matrix: Tensor | np.ndarray) -> float:
    """The largest singular value of a matrix."""
    return float(singular_values(matrix).max(initial=0.0))


def clipped_matrix(matrix: Tensor | np.ndarray, low: float, high: float) -> np.ndarray:
    """The nearest matrix with all singular values in a band: `U clamp(Σ, low, high) Vᵀ`."""
    scaled, exponent = unit_scaled(array(matrix) if isinstance(matrix, Tensor) else matrix)
    u, s, vh = np.linalg.svd(scaled, full_matrices=False)
    return np.ldexp((u * np.clip(s, *np.ldexp([low, high], -exponent))) @ vh, exponent)


def with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """A plain float64 copy of a plain linear or convolutional layer, without bias, with this weight."""
    other: Any = copy.copy(layer)
    other._parameters = {"weight": nn.Parameter(weight.detach().double(), requires_grad=False), "bias": None}
    return other


def applied_to_identity(layer: nn.Module, in_shape: Sequence[int], dtype: torch.dtype = torch.float64) -> np.ndarray:
    """The dense matrix of a linear map, in the dtype that it computes in, by applying it to every unit vector."""
    columns = prod(in_shape)
    with torch.no_grad():
        images = layer(torch.eye(columns, dtype=dtype).reshape(columns, *in_shape))
        images = images - layer(torch.zeros(1, *in_shape, dtype=dtype))
    return array(images).reshape(columns, -1).T


def finite_matrix(layer: nn.Module, size: Sequence[int]) -> tuple[np.ndarray, int]:
    """The matrix of a plain layer at an input size, over `2^k`, and `k`: torch's own forward on the identity."""
    weight, exponent = unit_scaled(array(layer.weight))
    module = with_weight(layer, torch.from_numpy(weight))
    if isinstance(layer, nn.Linear):
        return weight, exponent
    return applied_to_identity(module, (layer.in_channels, *size)), exponent


def finite_norm(layer: nn.Module, size: Sequence[int]) -> float:
    """The norm of a plain layer at an input size, with its own padding."""
    matrix, exponent = finite_matrix(layer, size)
    return ldexp(matrix_norm(matrix), exponent)


def finite_singular_values(layer: nn.Module, size: Sequence[int]) -> np.ndarray:
    """All singular values of a plain layer at an input size, with its own padding."""
    matrix, exponent = finite_matrix(layer, size)
    return np.ldexp(singular_values(matrix), exponent)


def symbol(kernel: np.ndarray, frequencies: np.ndarray, dilation: Sequence[int]) -> np.ndarray:
    """`K̂(ψ) = Σ_t K[..., t] exp(-i δ t ψ)` by direct sum, for `(n, d)` frequencies: `(n, rows, columns)`."""
    rows, columns, *taps = kernel.shape
    places = np.array(list(product(*map(range, taps)))) * np.array(dilation)
    waves = np.exp(-1j * frequencies @ places.T)
    return (waves @ kernel.reshape(rows * columns, -1).T).reshape(-1, rows, columns)


def alias_matrices(kernel: np.ndarray, frequencies: np.ndarray, stride: Sequence[int], dilation: Sequence[int]) -> np.ndarray:
    """`A(φ)` of one group's kernel `(rows, columns, *taps)`: `(n, rows, aliases · columns)`."""
    shifts = 2 * pi * np.array(list(product(*map(range, stride))))
    inputs = (frequencies[:, None] + shifts) / np.array(stride)
    blocks = symbol(kernel, inputs.reshape(-1, len(stride)), dilation)
    blocks = blocks.reshape(len(frequencies), len(shifts), *kernel.shape[:2]).swapaxes(1, 2)
    return blocks.reshape(len(frequencies), kernel.shape[0], -1) / np.sqrt(prod(stride))


def _norms(kernel: np.ndarray, frequencies: np.ndarray, stride: Sequence[int], dilation: Sequence[int]) -> np.ndarray:
    """`‖A(φ)‖₂` at every frequency."""
    chunk = max(_CHUNK_BYTES // (16 * prod(kernel.shape[:2]) * prod(stride)), 1)
    parts = [frequencies[i : i + chunk] for i in range(0, len(frequencies), chunk)]
    return np.concatenate([np.linalg.norm(alias_matrices(kernel, part, stride, dilation), 2, (-2, -1)) for part in parts])


def by_groups(layer: nn.Module) -> tuple[list[np.ndarray], int]:
    """The kernel of every group over `2^k`, and `k`; of a transposed layer those of its adjoint."""
    weight, exponent = unit_scaled(array(layer.weight))
    return np.split(weight, layer.groups), exponent


def group_norms(layer: nn.Module) -> list[float]:
    """`sup_φ ‖A(φ)‖₂` of every group: a grid, and a climb from its best points. From below, to rounding where it climbs right."""
    kernels, exponent = by_groups(layer)
    return [ldexp(_supremum(kernel, layer.stride, layer.dilation), exponent) for kernel in kernels]


def lattice_norm(layer: nn.Module) -> float:
    """The norm of a plain convolution on the infinite lattice: the supremum over all input sizes with zero padding."""
    return matrix_norm(layer.weight) if isinstance(layer, nn.Linear) else max(group_norms(layer))


def _supremum(kernel: np.ndarray, stride: Sequence[int], dilation: Sequence[int]) -> float:
    if not kernel.any():
        return 0.0
    # without a stride a dilation only squeezes the frequency axis
    dilation = [1 if s == 1 else d for s, d in zip(stride, dilation, strict=True)]
    taps = kernel.shape[2:]
    degrees = [d * (k - 1) / s for d, k, s in zip(dilation, taps, stride, strict=True)]
    counts = [1 if k == 1 else ceil(_POINTS[len(taps)] * max(degree, 1)) + 1 for degree, k in zip(degrees, taps, strict=True)]
    grid = _half_grid(tuple(counts))
    values = _norms(kernel, grid, stride, dilation)
    step = 2 * pi / np.array(counts) * (np.array(counts) > 1)
    points = grid[np.argsort(-values, kind="stable")]
    best = float(values.max())
    # from peaks, not from neighbours of the same peak
    starts: list[np.ndarray] = []
    for point in points[: 40 * _CLIMBERS]:
        if all(np.max(_apart(point, other) - 1.5 * step) > 0 for other in starts):
            starts.append(point)
        if len(starts) == _CLIMBERS:
            break
    return max(best, _climbed(kernel, np.array(starts), step, np.array(degrees), stride, dilation)) if step.any() else best


def _climbed(
    kernel: np.ndarray, here: np.ndarray, step: np.ndarray, degrees: np.ndarray, stride: Sequence[int], dilation: Sequence[int]
) -> float:
    """The highest value that climbers reach from these points, in a pattern search whose step halves where none is higher.

    Where singular values meet, the norm has ridges: along the axes and diagonals it may fall on all sides of a point that is no
    peak. So every round tries other directions as well, of a fixed seed.
    """
    axes = len(step)
    rng = np.random.default_rng(0)
    grid = np.array(list(product((-1, 0, 1), repeat=axes)))
    steps, best = np.tile(step / 2, (len(here), 1)), 0.0
    centre = _norms(kernel, here, stride, dilation)
    for _ in range(_ROUNDS):
        turned = rng.standard_normal((_DIRECTIONS if axes > 1 else 0, axes))
        moves = np.concatenate([grid, turned / np.linalg.norm(turned, axis=1, keepdims=True)])
        tried = here[:, None] + moves * steps[:, None]
        values = _norms(kernel, tried.reshape(-1, axes), stride, dilation).reshape(len(here), -1)
        reached = values.max(1)
        best = max(best, float(reached.max()))
        # by more than rounding, or plateaus are walked for ever
        moved = reached > centre * (1 + 1e-14)
        here = np.where(moved[:, None], tried[np.arange(len(here)), values.argmax(1)], here)
        centre = np.maximum(reached, centre)
        # a peak within a step is higher by no more than this: `‖A v‖²` lies in `[0, S²]`, so its second derivative along an axis
        # is at most `S² degree² / 2`; who moved may have its peak farther off
        gain = 1.01 * (steps @ degrees) ** 2 / 4
        steps = np.where(moved[:, None], steps, steps / 2)
        stay = (moved | (centre**2 >= best**2 * (1 - gain))) & (steps.max(1) > step.max() * 0.5 ** (_HALVINGS + 1))
        here, centre, steps = here[stay], centre[stay], steps[stay]
        if not len(here):
            break
    return best


def _apart(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    gap = np.abs(first - second) % (2 * pi)
    return np.minimum(gap, 2 * pi - gap)


@lru_cache(maxsize=64)
def _half_grid(counts: tuple[int, ...]) -> np.ndarray:
    """Frequencies, of which those below zero along the first axis that has several add nothing: a real kernel's are conjugate."""
    first = next((i for i, n in enumerate(counts) if n > 1), None)
    axes = [2 * pi * np.arange(n // 2 + 1 if i == first else n) / n for i, n in enumerate(counts)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(counts))


def circular_norm(layer: nn.Module, size: Sequence[int]) -> float:
    """The norm of the layer's kernel with periodic boundary; the strides divide the size. By aliases on the output's own grid."""
    rows = [n if layer.transposed else n // s for n, s in zip(size, layer.stride, strict=True)]
    kernels, exponent = by_groups(layer)
    grid = _half_grid(tuple(rows))
    return ldexp(max(float(_norms(k, grid, layer.stride, layer.dilation).max()) for k in kernels), exponent)


def torus_matrix(layer: nn.Module, size: Sequence[int]) -> np.ndarray:
    """The dense matrix of a plain convolution's kernel with periodic boundary, by torch's forward on an input wrapped around.

    Up to a shift of the output, which changes no singular value. The strides divide the size, at least the kernel's reach.
    """
    reach = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    module = with_weight(layer, layer.weight)
    functional = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}[len(size)]
    channels = layer.weight.shape[1] * layer.groups
    columns = channels * prod(size)
    x = torch.eye(columns, dtype=torch.float64).reshape(columns, channels, *size)
    x = nn.functional.pad(x, [amount for extra in reversed(reach) for amount in (0, extra)], mode="circular")
    y = functional(x, module.weight, None, layer.stride, 0, layer.dilation, layer.groups)
    return array(y).reshape(columns, -1).T


class Counter(TorchDispatchMode):
    """Counts torch operations, and how often the host asks for what is made of the weights, as if they were on a device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2")

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.operations = self.waits = 0
        self.away = WeakIdKeyDictionary()
        for weight in weights:
            self.away[weight] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        self.operations += 1
        result = func(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(x in self.away for x in inputs):
            name = func.overloadpacket.__name__
            masked = name.startswith("index") and any(x.dtype == torch.bool for x in inputs[1:])
            self.waits += name in self.WAITING or masked
            for x in tree_leaves(result):
                if isinstance(x, Tensor):
                    self.away[x] = True
        return result
