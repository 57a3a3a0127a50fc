"""Absolute sums of powers of the kernel's autocorrelation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import log, pi, prod, sqrt

import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d

from ...linalg.krylov import with_gradient
from ...linalg.precision import float32_is_kept
from ...operators.arguments import on_kernel
from ...operators.base import KernelOperator
from .certified import SQRT2, certified, check_steps, squared_lengths

#: Bytes of symbols of the rows that `kernel_gram` keeps, and of one block where these are all.
_PANEL_BYTES, _BLOCK_BYTES = 3 << 26, 1 << 23
#: Channels from which the last powers of a kernel are held in float32, and the share of a bound that its rounding may be.
_SINGLE_FROM, _SINGLE_SHARE = 32, 1e-3


@on_kernel
def kernel_gram(op: KernelOperator, *, steps: int = 4) -> Tensor:
    """Squares of the kernel's self-convolution, and a sum of absolute values: no frequencies are sampled.

        ‖A‖ ≤ max_i (Σ_{j, l} |R_t[i, j, l]|)^(1 / 2^t),   R_1 = K ⋆ K,   R_{t+1} = R_t ∗ R_t,

    with `R_t`, of `2^t (k - 1) + 1` taps per axis, the kernel of `(A Aᵀ)^(2^(t-1))` on the lattice. Zero padding in the
    convolutions makes it hold for every input size. Each is computed by Fourier transforms of its own length, block after block
    on and above the diagonal; the last, whose error counts `2^t` times less, in float32 where its rounding is bounded by 1e-3 of
    the result.

    Args:
        op: any operator.
        steps: `t ≥ 1`; each doubles the support and takes the root of what is left.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. Upper bound, differentiable where the largest row is unique.

    Cost: `O((2^t k)^d c³)` time, with `c` the smaller number of channels; memory for `R_{t-1}`, of `(2^(t-1) k)^d c²` entries,
    in float32 from 32 channels on, and 0.5 GiB. The gradient, of one row, is a few per cent of that.

    Raises:
        ValueError: `steps` is no positive int, or NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> op = sh.ConvOperator(torch.tensor([[[1.0, 2.0, -1.0]]]))  # norm √8
        >>> [round(sh.bounds.kernel_gram(op, steps=t).item(), 3) for t in (1, 3, 5)]
        [2.828, 2.828, 2.828]

    Source: Delattre, Barthélemy and Allauzen (2024).
    """
    check_steps(steps, least=1)

    def formula(kernel: Tensor) -> Tensor:
        if kernel.ndim == 3:
            kernel = kernel.unsqueeze(-1)
        if kernel.shape[1] > kernel.shape[2]:
            kernel = kernel.transpose(1, 2)
        norm, group, row = _by_powers(kernel.detach().movedim((0, 1, 2), (-3, -2, -1)), steps)
        if not kernel.requires_grad:
            return norm
        return with_gradient(norm, _row_of_power(kernel[group], row, steps))

    return certified(op, formula)


def _by_powers(kernel: Tensor, steps: int) -> tuple[Tensor, int, int]:
    """The bound of `kernel_gram`, for a kernel `(*taps, groups, n, m)`, and the group and row that attain it.

    With `R̃` for what is computed, `‖R̃_t‖² ≤ ‖R̃_{t+1}‖ + e_{t+1}`, where `e` bounds the rounding of one step. So the sums at the
    end are carried back step by step, and `e_t` counts `2^-t`.
    """
    single = kernel.shape[-2] >= _SINGLE_FROM and steps > 1 and float32_is_kept()
    factors = kernel, kernel.flip(tuple(range(kernel.ndim - 3))).mT
    passed: list[tuple[Tensor, Tensor]] = []
    for step in range(1, steps):
        power, scale, error = _convolved(*factors, torch.float32 if single and step == steps - 1 else torch.float64)
        factors = power, power
        passed.append((scale, error))
    for dtype in (torch.float32, torch.float64) if single else (torch.float64,):
        sums, error = _row_sums(*factors, dtype)
        if bool((error <= _SINGLE_SHARE * 2**steps * sums.amax(1)).all()):
            break
    norms = (sums.amax(1) + error).sqrt()
    for scale, error in reversed(passed):
        norms = (scale * norms + error).sqrt()
    group = int(norms.argmax())
    return norms[group], group, int(sums[group].argmax())


def _convolved(first: Tensor, second: Tensor, store: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The product, exactly symmetric, over a power of two per group, these powers, and what rounding takes from its norm."""
    *taps, groups, n, _ = first.shape
    lags = tuple(range(len(taps)))
    found = first.new_empty(*(2 * k - 1 for k in taps), groups, n, n, dtype=store)

    def take(rows: slice, columns: slice, block: Tensor) -> None:
        found[..., rows, columns] = block
        if columns.start >= rows.stop:
            found[..., columns, rows] = block.flip(lags).mT
        elif columns.stop >= rows.stop:
            square = found[..., rows, rows]
            square.copy_((square + square.flip(lags).mT) / 2)

    error = _each_block(first, second, torch.float64, store, take)
    dims = (*lags, -2, -1)
    largest = torch.maximum(found.amax(dims), -found.amin(dims)).double()
    scale = torch.where(largest > 0, largest, 1).log2().floor().exp2()
    return found.div_(scale.to(store)[:, None, None]), scale, error


def _row_sums(first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The absolute sums of the rows of the product, `(groups, n)`, and per group what rounding takes from its norm."""
    *taps, groups, n, _ = first.shape
    sums = first.new_zeros(groups, n, dtype=torch.float64)

    def take(rows: slice, columns: slice, block: Tensor) -> None:
        sizes = block.abs_().sum(tuple(range(len(taps)))).double()
        # in the squares on the diagonal both triangles are there, equal but for rounding
        share = 1.0 if columns.start >= rows.stop else 0.5
        sums[:, rows] += share * sizes.sum(-1)
        sums[:, columns] += share * sizes.sum(-2)

    error = _each_block(first, second, dtype, dtype, take)
    return sums * (1 + prod(2 * k - 1 for k in taps) * torch.finfo(dtype).eps), error


def _each_block(
    first: Tensor, second: Tensor, dtype: torch.dtype, store: torch.dtype, take: Callable[[slice, slice, Tensor], None]
) -> Tensor:
    """Convolve two kernels whose product is symmetric, in blocks of rows and columns that cover the diagonal and what is above.

    Returns a bound of the rounding, in the norm of the product, per group. Let `F` be the symbol of either. In root mean square
    over the frequencies, where `‖F(θ)‖_F` has that of `‖K‖_F`, the transform along axis `i`, of sums of `k_i` products with a
    relative error `a_i`, takes `a_i √k_i ‖K‖_F`. From the products of symbols, of norm `‖F(θ)‖_F² ≤ g²`, rounding takes
    `√2 m eps ‖F(θ)‖_F²`, and the transform back then `b_i √N_i ‖F(θ)‖_F²`. And a kernel of `L` lags has at most the norm `√L`
    times the root mean square of its symbol's.
    """
    *taps, groups, n, m = first.shape
    sizes = tuple(2 * k - 1 for k in taps)
    half = sizes[0] // 2 + 1
    row_bytes = 2 * dtype.itemsize * half * prod(sizes[1:]) * groups * max(n, m)
    square_sums = first.new_zeros(half, *sizes[1:], groups, dtype=torch.float64)
    for rows in _parts(0, n, _PANEL_BYTES // row_bytes):
        left = _spectra(first[..., rows, :].to(dtype), sizes)
        square_sums += squared_lengths(left)
        whole = first is second and rows == slice(0, n)
        most = _BLOCK_BYTES // row_bytes if whole else _PANEL_BYTES // (3 * row_bytes)
        for columns in _parts(rows.start, n, most, rows.stop):
            right = left[..., columns] if whole else _spectra(second[..., columns].to(dtype), sizes)
            take(rows, columns, _kernel_of(left @ right, sizes))
            del right
        del left  # the next is as large
    counts = square_sums.new_tensor([1.0] + [2.0] * (half - 1)).reshape(-1, *[1] * len(taps)) / prod(sizes)
    largest, mean = square_sums.flatten(0, -2).amax(0), (counts * square_sums).flatten(0, -2).sum(0)
    rms = (counts * square_sums.square()).flatten(0, -2).sum(0).sqrt()
    symbols, back = (sum(SQRT2 * (k + 6) * sqrt(k) for k in lengths) for lengths in (taps, sizes))
    products = (SQRT2 * m + back) * rms + 2 * symbols * (largest * mean).sqrt()
    return 1.1 * sqrt(prod(sizes)) * (torch.finfo(dtype).eps * products + torch.finfo(store).eps * rms)


def _parts(start: int, end: int, most: int, stop: int | None = None) -> list[slice]:
    """Nearly equal parts of at most so many, with one that ends at `stop`."""
    if stop is not None and stop < end:
        return _parts(start, stop, most) + _parts(stop, end, most)
    count = -(-(end - start) // max(most, 1))
    edges = [start + (end - start) * i // count for i in range(count + 1)]
    return [slice(*pair) for pair in pairwise(edges)]


def _waves(frequencies: Tensor, positions: Tensor, size: int) -> Tensor:
    """`2π f t / size` for every frequency and position, reduced first."""
    return (frequencies[:, None] * positions % size).double() * (2 * pi / size)


def _spectra(kernel: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The symbols at the frequencies `2π j / sizes`, the first axis up to π: `(*frequencies, groups, n, m)`; real without taps.

    One axis after the other is a matrix product, faster here than an FFT, and with a known bound of its rounding.
    """
    if prod(sizes) == 1:
        return kernel
    index = [torch.arange(n, device=kernel.device) for n in (*kernel.shape[: len(sizes)], *sizes)]
    positions, frequencies = index[: len(sizes)], index[len(sizes) :]
    angles = _waves(frequencies[0][: sizes[0] // 2 + 1], positions[0], sizes[0])
    flat = kernel.flatten(1)
    found = torch.complex(angles.cos().to(kernel) @ flat, -angles.sin().to(kernel) @ flat)
    found = found.unflatten(1, kernel.shape[1:])
    for axis in range(1, len(sizes)):
        angles = _waves(frequencies[axis], positions[axis], sizes[axis])
        wave = torch.complex(angles.cos(), -angles.sin()).to(found)
        rest = found.shape[axis + 1 :]
        found = (wave @ found.flatten(axis + 1)).unflatten(axis + 1, rest)
    return found


def _kernel_of(spectra: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The real kernel with these symbols: the inverse of `_spectra`."""
    if prod(sizes) == 1:
        return spectra.clone()
    index = [torch.arange(n, device=spectra.device) for n in sizes]
    for axis in range(len(sizes) - 1, 0, -1):
        angles = _waves(index[axis], index[axis], sizes[axis])
        wave = torch.complex(angles.cos(), angles.sin()).to(spectra) / sizes[axis]
        rest = spectra.shape[axis + 1 :]
        spectra = (wave @ spectra.flatten(axis + 1)).unflatten(axis + 1, rest)
    half = index[0][: sizes[0] // 2 + 1]
    angles = _waves(index[0], half, sizes[0])
    counts = (1 + (half > 0).double()) / sizes[0]
    flat = spectra.flatten(1)
    found = (angles.cos() * counts).to(flat.real) @ flat.real
    found -= (angles.sin() * counts).to(flat.real) @ flat.imag
    return found.unflatten(1, spectra.shape[1:])


def _row_of_power(kernel: Tensor, row: int, steps: int) -> Tensor:
    """`(Σ |R_t[row]|)^(1 / 2^t)` for a kernel `(n, m, *taps)`, from `R_t[row] = (A Aᵀ)^(2^(t-1)) δ_row` by convolutions."""
    dims = kernel.ndim - 2
    forward = (conv1d, conv2d, conv3d)[dims - 1]
    adjoint = (conv_transpose1d, conv_transpose2d, conv_transpose3d)[dims - 1]
    x = kernel.new_zeros(1, len(kernel), *[1] * dims)
    x[0, row] = 1
    logs = 0.0
    for _ in range(2 ** (steps - 1)):
        x = forward(adjoint(x, kernel), kernel, padding=[k - 1 for k in kernel.shape[2:]])
        # a number, not a function of the kernel
        length = max(float(torch.linalg.vector_norm(x.detach())), 1e-150)
        x, logs = x / length, logs + log(length)
    return ((x.abs().sum().clamp(min=1e-300).log() + logs) / 2**steps).exp()
