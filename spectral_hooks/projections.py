"""Operator → weight of the same shape whose norm obeys a bound.

A convolution's kernel must lie in two sets at once: the ball `‖F(θ)‖ ≤ c` at every frequency, and the kernels of `k` taps.
`clip` nears the closest such kernel and ends with a scaling by the certified norm, so that the promise holds whatever the
rounds have reached.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, prod

import torch
from torch import Tensor

from .lattice import grid_norm, lattice_norm, normalized
from .operators.base import LinearOperator, full_precision
from .operators.symbols import half_plane, product, symbol
from .spectrum import spectral_norm

#: A projection: operator, largest norm → weight.
Projection = Callable[[LinearOperator, float], Tensor]

#: Frequencies of the clip's grid per axis, as a multiple of the kernel's degree `k - 1`: for up to 32 channels, and for more.
_OVERSAMPLING = (6, 4)
#: How far to go along a correction.
_STRETCHES = (0.85, 1.0, 1.2, 1.45, 1.75, 2.1, 2.5, 3.0)
#: A norm this little above the bound is rounding, and counts as inside.
_TOLERANCE = 1e-6
#: What a matrix-free norm may lack.
_MATRIX_FREE_ERROR = 1e-5
#: Bytes of symbols held at once.
_CHUNK_BYTES = 1 << 27


@full_precision
@torch.no_grad()
def clip(op: LinearOperator, max_norm: float = 1.0, *, rounds: int = 3) -> Tensor:
    """Clip the singular values at `max_norm`: near the closest weight, in Frobenius distance, with `‖A‖₂ ≤ max_norm`.

    For a matrix `W = U Σ Vᵀ`, and for every convolution that is one (a single tap after the polyphase form), exactly the
    closest: `U min(Σ, c) Vᵀ`. For other convolutions each of `rounds` clips the symbol's singular values on a frequency grid
    and crops to the kernel's taps (Sedghi, Gupta, Long 2019); the rounds are proximal steps on the dual of

        minimize ‖K - K₀‖²  subject to  ‖F(θ)‖₂ ≤ c on the grid.

    At the end the kernel is scaled by the certified norm.

    Args:
        op: any operator. The lattice operator of a convolution bounds the layer at every input size.
        max_norm: the bound `c > 0`.
        rounds: more bring a convolution closer to the original; `O(N^d c³)` each, with `N = 4 (k - 1)` or `6 (k - 1)`, whatever
            the input size.

    Returns:
        A weight of the same shape, dtype and device; the very same values if the norm is already at most `max_norm`.
        Guaranteed: the norm of the returned, stored values is at most `max_norm` (certified for matrices, lattice and circular
        operators, to 1e-5 for others), and they are never farther from the original than `rescale`'s.

    Raises:
        ValueError: `max_norm` or `rounds` out of range, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.clip(sh.DenseOperator(torch.diag(torch.tensor([3.0, 0.5]))), max_norm=1.0)
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])

    Sources: Sedghi, Gupta, Long 2019 (clip and crop); Wright, Nowak, Figueiredo 2009 (the proximal steps and their lengths).
    """
    check_max_norm(max_norm)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ValueError(f"`rounds` must be a positive int; got {rounds!r}.")
    if _norm_above(op, max_norm) <= max_norm * (1 + _TOLERANCE):
        return _unchanged(op)
    kernel, scale = normalized(op.canonical())
    clipped, peak = _clip_kernel(op, kernel, max_norm / scale, rounds)
    clipped = _settle(op, op.from_canonical(clipped) * scale, max_norm)
    # scaling moves by at least ‖W‖ (1 - c / peak), where the norm is no smaller than the grid's peak: on the lattice
    if not op.is_finite and _distance(clipped, op) <= _distance(0, op) * (1 - max_norm / max(peak * scale, max_norm)):
        return clipped
    return min(clipped, rescale(op, max_norm), key=lambda weight: _distance(weight, op))


@full_precision
@torch.no_grad()
def rescale(op: LinearOperator, max_norm: float = 1.0) -> Tensor:
    """Scale the weight into the ball: `W / max(1, ‖A‖₂ / c)` (Gouk et al. 2018), with the certified norm.

    Args:
        op: any operator.
        max_norm: the bound `c > 0`.

    Returns:
        A weight of the same shape, dtype and device; the very same values if the norm is already at most `max_norm`. The bound is
        guaranteed as by `clip`.

    Raises:
        ValueError: `max_norm` out of range, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.rescale(sh.DenseOperator(torch.diag(torch.tensor([2.0, 0.5]))), max_norm=1.0)
        tensor([[1.0000, 0.0000],
                [0.0000, 0.2500]])
    """
    check_max_norm(max_norm)
    if _norm_above(op, max_norm) <= max_norm * (1 + _TOLERANCE):
        return _unchanged(op)
    return _settle(op, op.weight.detach().to(torch.promote_types(op.weight.dtype, torch.float32)), max_norm)


def _unchanged(op: LinearOperator) -> Tensor:
    """The operator's own tensor, so that a caller can tell by identity that nothing was done."""
    return op.weight.detach() if op.weight.requires_grad else op.weight


def _distance(weight: Tensor | int, op: LinearOperator) -> float:
    """Frobenius distance to the operator's weight."""
    return float(torch.linalg.vector_norm((weight - op.weight).to(torch.promote_types(op.weight.dtype, torch.float32))))


def check_max_norm(max_norm: float) -> None:
    """Refuse what is no positive, finite number."""
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)) or not (isfinite(max_norm) and max_norm > 0):
        raise ValueError(f"`max_norm` must be a positive, finite number; got {max_norm!r}.")


def _norm_above(op: LinearOperator, target: float | None = None) -> float:
    """A number not below the norm; with a `target`, only so close as is needed to tell on which side of it the norm lies."""
    grid, kernel = op.frequency_grid, op.canonical()
    if grid is not None and grid != ():
        return grid_norm(kernel, tuple(size for size, _ in grid)).upper
    if not op.is_finite or grid == ():
        factor = op.lattice_factor
        goal = None if target is None else target * (1 + _TOLERANCE) / factor
        return factor * lattice_norm(kernel, _rtol(kernel), goal).upper
    if target is not None:
        factor = op.lattice_factor
        everywhere = factor * lattice_norm(kernel, _rtol(kernel), target / factor).upper
        if everywhere <= target:
            return everywhere
    return float(spectral_norm(op)) * (1 + _MATRIX_FREE_ERROR)


def _rtol(kernel: Tensor) -> float:
    """Relative width of the certificate, which the final scaling may take too much: 1e-3, up to 1e-2 where it is dear.

    A clipped kernel has its largest singular value at many frequencies; proving that takes some `1 / rtol` of them, at the cube
    of the channels each.
    """
    size = min(kernel.shape[1:3])
    return 1e-3 if size <= 8 else min(2e-3 * max(size / 64, 1.0), 1e-2)


def _settle(op: LinearOperator, weight: Tensor, max_norm: float) -> Tensor:
    """The weight in the dtype of the operator's, scaled down until the stored values obey the bound."""
    eps = torch.finfo(op.weight.dtype).eps
    fine = eps < _TOLERANCE
    measured = op.is_finite and op.frequency_grid is None
    for attempt in range(1, 100):
        stored = weight.to(op.weight)
        norm = _norm_above(op.with_weight(stored))
        if norm <= max_norm:
            return stored
        weight = weight * (max_norm / norm * (1 - attempt * (max(4 * eps, 1e-12) if fine else eps / 4)))
        if fine and not measured:  # neither rounding nor a new certificate can bring the norm back above the bound
            return weight.to(op.weight)
    raise RuntimeError(f"no {op.weight.dtype} weight near this one has norm at most {max_norm}.")


def _clip_kernel(op: LinearOperator, kernel: Tensor, max_norm: float, rounds: int) -> tuple[Tensor, float]:
    """The kernel after `rounds` on the dual problem, nearly inside, and the largest norm of the original on the grid.

    With `E` the symbol on the grid, over the root of the number of frequencies, and `E*` its adjoint, which crops to the taps,
    the dual of the projection is to minimize `½ ‖K₀ - E* Y‖² + c ‖Y‖_nuclear` over blocks `Y`, one for each frequency, with
    `K = K₀ - E* Y`. A round is a proximal step, which takes the excess of `Y + τ E K` over `τ c`, and a line search.
    """
    if prod(kernel.shape[3:]) == 1:
        excess, _, peak = _excess(kernel.reshape(kernel.shape[:3]), max_norm / op.lattice_factor)
        return kernel - excess.reshape(kernel.shape), peak
    sizes, level = _clip_grid(op, kernel, max_norm)
    theta, counts = half_plane(sizes, kernel)
    counts = counts / prod(sizes)
    angles = product([torch.arange(k) for k in kernel.shape[3:]], theta) @ theta.T
    cos, sin = angles.cos() * counts, angles.sin() * counts
    support = (op.with_weight(torch.ones_like(op.weight)).canonical() != 0).to(kernel.device)

    def crop(symbols: Tensor) -> Tensor:
        flat = symbols.flatten(1)
        return (cos @ flat.real - sin @ flat.imag).T.reshape(kernel.shape) * support

    def step_length(change: Tensor, cropped: Tensor) -> float:
        """Barzilai & Borwein's: large where the change lies at few frequencies, since a crop spreads those over all."""
        return float(counts @ torch.view_as_real(change).square().flatten(1).sum(1)) / float(cropped.square().sum())

    excess, sums, peak = _excess(symbol(kernel, theta), level)
    if peak <= level:  # what little the kernel is outside lies between these frequencies
        return kernel, peak
    tau = step_length(excess, crop(excess))
    dual, nuclear = tau * excess, tau * float(counts @ sums)
    weight = kernel - crop(dual)
    for _ in range(rounds - 1):
        excess, sums, _ = _excess(dual + tau * symbol(weight, theta), tau * level)
        change, growth = excess - dual, float(counts @ sums) - nuclear
        cropped = crop(change)
        length = float(cropped.square().sum())
        if length <= 1e-24 * float(kernel.square().sum()):
            break
        # the nuclear norm is convex: along the segment it is at most its chord, and the rest is a parabola
        share = min(1.0, max(0.0, (float((weight * cropped).sum()) - level * growth) / length))
        dual, nuclear, weight = dual + share * change, nuclear + share * growth, weight - share * cropped
        tau = max(1.0, step_length(change, cropped))
    fine = sizes if op.frequency_grid is not None else tuple(2 * n if n > 1 else 1 for n in sizes)
    return _extended(kernel, kernel - weight, level, fine), peak


def _extended(kernel: Tensor, correction: Tensor, level: float, sizes: tuple[int, ...]) -> Tensor:
    """`K₀ - t D` for the correction `D` so far and the `t` that ends nearest to `K₀` after the scaling that is still needed.

    A few rounds correct too little, most of all between the frequencies of their grid. Going on in the same direction costs far
    less than scaling everything.
    """
    best, shortest = kernel, float("inf")
    for t in _STRETCHES:
        trial = kernel - t * correction
        trial = trial * min(1.0, level / grid_norm(trial, sizes, screen=torch.float32).value)
        distance = float(torch.linalg.vector_norm(trial - kernel))
        if distance >= shortest:
            break
        best, shortest = trial, distance
    return best


def _clip_grid(op: LinearOperator, kernel: Tensor, max_norm: float) -> tuple[tuple[int, ...], float]:
    """Frequencies per axis for the clip, and the level to clip at there."""
    taps = tuple(kernel.shape[3:])
    oversampling = _OVERSAMPLING[min(kernel.shape[1:3]) > 32]
    sizes = tuple(max(oversampling * (k - 1), 1) for k in taps)
    grid = op.frequency_grid
    if grid is not None:
        # a circular layer's own frequencies, or, when they are many, fewer; at least as many as there are taps
        exact = tuple(n * -(-k // n) for (n, _), k in zip(grid, taps, strict=True))
        return tuple(min(n, 2 * m) if m > 1 else 1 for n, m in zip(exact, sizes, strict=True)), max_norm
    if not op.is_finite:
        return sizes, max_norm / op.lattice_factor
    # a finite operator may have a smaller norm than the lattice's, or with reflection a larger one
    norm = float(spectral_norm(op.with_weight(op.from_canonical(kernel))))
    return sizes, max_norm * lattice_norm(kernel).value / norm


def _excess(blocks: Tensor, level: float) -> tuple[Tensor, Tensor, float]:
    """What clipping the singular values at `level` takes away, per frequency the sum of it, and the largest singular value.

    By the Gram matrix on the smaller side: with `B B* = U diag(σ²) U*` the excess is `U diag(max(1 - level / σ, 0)) U* B`.
    """
    rows, columns = blocks.shape[-2:]
    if rows > columns:
        excess, total, largest = _excess(blocks.mT, level)
        return excess.mT, total, largest
    chunk = max(_CHUNK_BYTES // (16 * blocks[0].numel()), 1)
    parts, sums, largest = [], [], 0.0
    for part in blocks.split(chunk):
        squared, u = torch.linalg.eigh(part @ part.mH)
        sigma = squared.clamp(min=0).sqrt()
        gain = (1 - level / sigma).clamp(min=0)
        parts.append((u * gain.unsqueeze(-2)) @ (u.mH @ part))
        sums.append((sigma - level).clamp(min=0).flatten(1).sum(1))
        largest = max(largest, float(sigma.amax()))
    return torch.cat(parts), torch.cat(sums), largest
