"""The tightest bound for a small share of a layer's own cost: what `rescaled` measures in every training forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from math import cos, floor, inf, log2, pi, prod, sqrt
from typing import Any

import torch
from torch import Tensor

from ..linalg.lanczos import lanczos
from ..linalg.precision import at_least_float32, device_with_float64, float32_is_kept, full_precision, widest
from ..linalg.symbols import half_plane, product, symbol
from ..linalg.top import proven_top
from ..operators.base import KernelOperator

#: Frequencies per axis of a grid over the kernel's degree `k - 1`, the finest first; in two dimensions 4 % and 17 % too much.
_OVERSAMPLING = (8, 4)
#: The most frequencies times channels over taps. The time of a grid over that of the layer's training step is proportional to
#: this number over the number of output positions in a batch.
_BUDGET = 400
#: Symbols up to this size are taken on a grid. There, on the host up to the other one, a solver is as fast as proofs by Cholesky.
_SMALL, _FEW = 64, 16
#: On the host proofs up to this size are tried in float32, whose rounding may be so large a share of the squared norm.
_SINGLE, _SHARE = 320, 2e-3
#: Entries of symbols there at once: less memory is asked for and given back.
_AT_ONCE = 1 << 16
#: Beyond: what is tried to be proven, relative to an estimate of the squared norm.
_MARGINS = (1e-6, 2e-3, 0.1)
#: Krylov steps for that estimate.
_STEPS = 24
#: Keeps a zero weight from being divided by its norm.
_TINY = 1e-300


@full_precision
def quick(op: KernelOperator) -> Tensor:
    """The tightest bound for a small share of the layer's own cost, in tensor operations only.

    - A matrix, and a kernel that is one (a single tap after the polyphase form): the norm itself.
    - Up to 64 channels: the largest norm on a frequency grid times the cosine factor of `bounds.cosine_grid`, with 8 or 4 points
      over the degree per axis, as the budget allows; at most 4 % or 17 % above the norm in two dimensions.
    - Beyond: `√taps · ‖M‖₂` with `M` the kernel reshaped to `out × (in · taps)`, or `in × (out · taps)` if that has fewer rows;
      twice the norm for a random 3×3 kernel, at most `√taps` times.

    Matrices of more than a few rows are measured by Krylov steps, and proven by Cholesky factors of `(1 + margin) σ² I - M Mᵀ`:
    weights in float32 of up to 320 rows in that precision, with all rounding counted, at most 0.2 % above the norm; others in
    float64, commonly less than 0.01 %. Nothing waits for a GPU, where margins grow in larger steps, up to 5 %. A model with it
    compiles and exports as one graph. It is a function of the weight alone, and remembers nothing.

    Returns:
        0-d tensor in float64. Upper bound; NaN for a weight that is not finite. Its gradient is that of the norm at the winner;
        second derivatives leave out how its vectors turn.

    Cost: with `n` the smaller number of channels, `O(frequencies · n³)`, in the last case `O(taps · n³)`; the gradient `O(n²)`.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> from spectral_hooks.norms.quick import quick
        >>> op = sh.as_operator(torch.nn.Conv2d(4, 8, 3))
        >>> norm = sh.spectral_norm(op, rtol=1e-6).detach()
        >>> bool(norm / 1.000001 <= quick(op) <= 1.04 * norm)
        True
    """
    sampled, sizes, factor = _sampled(op.canonical())
    theta = _grid(sizes)
    index, left, right, upper = _largest(sampled.detach(), theta)
    # at the winner, with the vectors held fixed: the derivative of a maximum
    group, place = index % len(sampled), torch.div(index, len(sampled), rounding_mode="floor")
    block = _blocks(_pick(sampled, group), _pick(theta.to(sampled), place))[0]
    norm = (left.to(block.dtype) @ block @ right.to(block.dtype)).real.to(upper.dtype)
    held, value = norm.detach(), upper * (factor * op.padding_factor * _raised(sampled))
    return value + (norm - held) * (value / held.clamp(min=_TINY))


def quick_with_direction(op: KernelOperator) -> tuple[float, Callable[[], Tensor]]:
    """The value of `quick` on the host, and a function that makes its gradient, of any length: in place of a graph."""
    kernel = op.canonical().detach()
    sampled, sizes, factor = _sampled(kernel)
    theta = _kept_grid(sizes)
    index, left, right, upper = _largest_of(sampled, theta)

    def direction() -> Tensor:
        group, place = int(index) % len(sampled), int(index) // len(sampled)
        dtype = sampled.dtype.to_complex() if theta.shape[1] else sampled.dtype
        outer = left.to(dtype).unsqueeze(-1) * right.to(dtype)
        if theta.shape[1]:
            angles = (product([torch.arange(k) for k in sampled.shape[3:]], theta) @ theta[place]).to(sampled)
            outer = outer.real.unsqueeze(-1) * angles.cos() + outer.imag.unsqueeze(-1) * angles.sin()
        gradient = torch.zeros(len(sampled), outer.numel(), dtype=sampled.dtype)
        gradient[group] = outer.flatten()
        rows, columns, *taps = kernel.shape[1:]
        turned = rows > columns
        gradient = gradient.reshape(len(sampled), *((columns, rows) if turned else (rows, columns)), *taps)
        return op.from_canonical(gradient.transpose(1, 2) if turned else gradient)

    return float(upper) * (factor * op.padding_factor * _raised(sampled)), direction


def _sampled(kernel: Tensor) -> tuple[Tensor, tuple[int, ...], float]:
    """A kernel with fewer rows than columns, or that reshaped; the grid on which its norm is taken; a factor for the rest."""
    kernel = kernel.to(at_least_float32(kernel.dtype))
    if kernel.shape[1] > kernel.shape[2]:
        kernel = kernel.transpose(1, 2)
    sizes, factor = sampling_grid(kernel)
    return kernel if sizes else kernel.flatten(2), tuple(sizes), factor


def _grid(sizes: tuple[int, ...]) -> Tensor:
    """Frequencies; of two conjugate ones one is enough."""
    like = torch.empty(0, dtype=torch.float64)
    return half_plane(sizes, like)[0] if sizes else torch.zeros(1, 0, dtype=torch.float64)


@lru_cache(maxsize=64)
def _kept_grid(sizes: tuple[int, ...]) -> Tensor:
    """The same, made once."""
    with torch.inference_mode(False):
        return _grid(sizes)


def _raised(kernel: Tensor) -> float:
    """A factor for what rounding in float64 takes."""
    return 1 + 1e-14 * (kernel[0].numel() + 100)


def sampling_grid(kernel: Tensor) -> tuple[list[int], float]:
    """Frequencies per axis and the factor that makes a bound of their maximum; none where the reshaped kernel has to do."""
    degrees = [k - 1 for k in kernel.shape[3:]]
    taps = prod(kernel.shape[3:])
    for oversampling in _OVERSAMPLING:
        sizes = [max(oversampling * degree, 1) for degree in degrees]
        if 1 < prod(sizes) <= 2 * _BUDGET * taps / kernel.shape[1] and kernel.shape[1] <= _SMALL:
            return sizes, prod([1 / cos(pi * degree / (2 * n)) for degree, n in zip(degrees, sizes, strict=True)])
    return [], sqrt(taps)


def _blocks(kernel: Tensor, theta: Tensor) -> Tensor:
    """The symbol at these frequencies, `(frequencies · groups, rows, columns)`; matrices as they are."""
    return symbol(kernel, theta).flatten(0, 1) if theta.shape[1] else kernel


def _pick(items: Tensor, index: Tensor) -> Tensor:
    """The item at an index of shape 1; no copy where there is one only."""
    return items if len(items) == 1 else items.index_select(0, index)


def _largest_of(kernel: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which block has the largest norm (an index of shape 1), its singular vectors `u*` and `v`, and a bound of the norm."""
    few = _FEW if len(kernel) * len(theta) > 1 else _SMALL
    if kernel.device.type == "cpu" and kernel.shape[1] > few and (found := _proven_on_host(kernel, theta)):
        return found
    device, dtype = kernel.device, widest(kernel.device)
    kernel = kernel.to(device_with_float64(device))
    scale = kernel.abs().amax().to(torch.float64).clamp(min=_TINY)
    kernel = kernel.to(torch.float64) / scale
    blocks = _blocks(kernel, theta.to(kernel))
    # solvers raise on NaN; the scale carries it to the result
    grams = torch.nan_to_num(blocks @ blocks.mH)
    size = grams.shape[-1]
    if size > _SMALL:
        # from a fixed start that no matrix of a model is blind to
        start = torch.arange(1, size + 1, device=grams.device).mul(1.618).cos().to(grams)
        values, vectors = lanczos(grams, grams @ start, _STEPS)
        squared = _proven(grams, values.amax())
        index = values.argmax(0, keepdim=True)
        left = _pick(vectors, index)[0]
    else:
        values = torch.linalg.eigvalsh(grams)[:, -1] if size > 1 else grams[:, 0, 0].real
        squared = values.amax().clamp(min=0)
        index = values.argmax(0, keepdim=True)
        left = torch.linalg.eigh(_pick(grams, index)).eigenvectors[0, :, -1]
    # conjugates are written out: a lazy one is lost in a product with a vector when this is called from a compiled graph
    left = left.conj().resolve_conj().clone()
    row = left @ _pick(blocks, index)[0]
    right = (row / torch.linalg.vector_norm(row).clamp(min=_TINY)).conj().resolve_conj().clone()
    return index.to(device), left.to(device), right.to(device), (squared.sqrt() * scale).to(device, dtype)


def _proven_on_host(kernel: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The same where looking at values costs nothing; None where it fails, as for what is zero or not finite."""
    largest = float(kernel.abs().amax())
    if not 0 < largest < inf:
        return None
    scale = 2.0 ** floor(log2(largest))
    single = kernel.dtype == torch.float32 and kernel.shape[1] <= _SINGLE and float32_is_kept()
    # what vanishes in the division is less than the rounding of the rest
    kernel = kernel if scale == 1 else (kernel if 1e-30 < scale < 1e30 else kernel.double()) / scale
    for dtype in (torch.float32, torch.float64)[1 - single :]:
        cast = kernel.to(dtype)
        if found := proven_top(_symbols(cast, theta), _SHARE):
            top, squared = found
            group, place = top.place % len(kernel), top.place // len(kernel)
            left = top.left.conj().resolve_conj()
            row = left @ _blocks(cast[group : group + 1], theta[place : place + 1])[0]
            right = (row / torch.linalg.vector_norm(row)).conj().resolve_conj()
            upper = (sqrt(squared) + _rounding(kernel, dtype)) * scale
            vector = torch.complex128 if theta.shape[1] else torch.float64
            return torch.tensor([top.place]), left.to(vector), right.to(vector), torch.tensor(upper, dtype=torch.float64)
    return None


def _symbols(kernel: Tensor, theta: Tensor) -> Iterator[Tensor]:
    """`_blocks` of some frequencies after the other; in float32 with waves that are rounded once."""
    if not theta.shape[1]:
        yield kernel
        return
    positions = product([torch.arange(k) for k in kernel.shape[3:]], theta)
    waves = torch.exp(-1j * (theta @ positions.T)).to(kernel.dtype.to_complex())
    flat = kernel.flatten(3).movedim(-1, 0).flatten(1).to(waves.dtype)
    for part in waves.split(max(_AT_ONCE // prod(kernel.shape[:3]), 1)):
        yield (part @ flat).unflatten(1, kernel.shape[:3]).flatten(0, 1)


def _rounding(kernel: Tensor, dtype: torch.dtype) -> float:
    """What rounding can take from the norms of symbols, whose entries are sums over the taps; of a matrix nothing is rounded."""
    taps = prod(kernel.shape[3:])
    largest = float(torch.linalg.vector_norm(kernel.flatten(1), dim=1).amax()) if taps > 1 else 0.0
    return (taps + 4) * torch.finfo(dtype).eps * sqrt(taps) * largest


# One node in the graph of a compiled or exported model; its results are taken as constants.
_largest = torch.library.custom_op(
    "spectral_hooks::largest",
    _largest_of,
    mutates_args=(),
    schema="(Tensor kernel, Tensor theta) -> (Tensor, Tensor, Tensor, Tensor)",
)


@_largest.register_fake
def _(kernel: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vector = torch.complex128 if theta.shape[1] else torch.float64
    left, right = (kernel.new_empty(n, dtype=vector) for n in kernel.shape[1:3])
    return kernel.new_empty(1, dtype=torch.long), left, right, kernel.new_empty((), dtype=widest(kernel.device))


@_largest.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], kernel: Tensor, theta: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    # as vmap does with what it knows no rule for, but for its warning; a grid is made of sizes, so it is one for all
    found = [_largest(each, theta) for each in kernel.movedim(in_dims[0] or 0, 0)]
    return tuple(torch.stack(each) for each in zip(*found, strict=True)), (0, 0, 0, 0)


def _proven(grams: Tensor, estimate: Tensor) -> Tensor:
    """A number that no eigenvalue exceeds: the estimate with the smallest margin for which all matrices have a factor.

    In place of `linalg.cholesky.below`, which counts its rounding, but looks at values after every panel: in every forward a GPU
    would have to be waited for.
    """
    upper = torch.linalg.vector_norm(grams.flatten(1), dim=1).amax()
    identity = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    for margin in _MARGINS:
        level = estimate * (1 + margin)
        proven = (torch.linalg.cholesky_ex(level * identity - grams).info == 0).all()
        upper = torch.where(proven, torch.minimum(level, upper), upper)
        # elsewhere it would take longer to wait for the answer than to try the others
        if grams.device.type == "cpu" and proven:
            break
    return upper
