"""The certified norm of the lattice operator: `S = sup_θ ‖F(θ)‖₂` by branch and bound over the frequencies.

By M. Riesz's lemma on the trigonometric polynomial `‖F(θ) v‖²`, of degree `k - 1` and between 0 and `S²`, the angle
`φ(θ) = arccos(‖F(θ)‖ / S)` obeys `|φ(θ) - φ(θ')| ≤ Σ_i (k_i - 1) |θ_i - θ'_i| / 2`. So a cell of frequencies whose points are at
most `a` from its centre, in that metric, holds the supremum only if `‖F(centre)‖ ≥ S cos(a)`: when `‖F(centre)‖ < U cos(a)` for
the centres of cells that cover the torus, `S ≤ U`. Cells that pass are dropped, the others split, until none is left for
`U = (1 + rtol) L`, with `L` the largest norm seen. Where no eigenvalue of `F F*` is below `m`, the polynomial lies between `m`
and `S²`, and the supremum needs `‖F(centre)‖² ≥ S² cos²(a) + m sin²(a)`: far fewer cells for a spectrum that is nearly flat.

That speaks of the supremum. Any other norm, as the largest on a grid that misses the supremum, is excluded from a cell only by
`φ` itself: its points have norms of at most `U cos(φ_U(centre) - a)`, with `φ_U = arccos(‖F‖ / U)` and a proven `U ≥ S`.

Three things keep it cheap. `L` is nearly the supremum from the start, by climbing from the best of a sample. The size of the
first cells is chosen by that sample: on a flat spectrum large cells would all be tested in vain. And a test is one Cholesky
factor of `(U cos a)² I - F F*`, in float32 where the bound of its rounding leaves room, else in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from math import acos, cos, floor, inf, log2, pi, prod, sin, sqrt
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from .cells import Cells, angle_of, cells_at, tiling
from .hermitian import SMALL, Rows, below, below_, exact_top, norms, top
from .operators.base import float32_is_kept
from .operators.symbols import Gram, half_plane, product, symbol, trim
from .single_row import grid_maxima, suprema

#: Bytes of Gram matrices and waves held at once: few enough for caches, and for allocators to use the same memory again.
_CHUNK_BYTES = 1 << 23
#: Cells taken together even if they need more.
_FEWEST = 12
#: What may be spent on proving a norm below a target that is closer than `rtol`: evaluations times the matrix size, and for
#: small matrices times its square.
_CLOSE_CALL_BUDGET, _SMALL_CLOSE_CALL_BUDGET = 1 << 15, 1 << 21
#: A norm in float32 is looked at again if it exceeds the target by no more than this.
_DOUBTFUL = 1e-4
#: The angle of the cells whose centres are the sample, and of those that judge what has room to spare.
_SAMPLED, _JUDGED = 0.6, 0.7
#: Frequencies from which to climb, and steps.
_CLIMBERS, _CLIMB_STEPS = 3, 6
#: Krylov steps for the norm of a frequency, and for one that another search goes on from.
_KRYLOV_STEPS, _FEW_STEPS = 16, 4
#: Up to this `rtol` it pays to climb from the sample; else its largest value is as good.
_WITHIN_SAMPLE = 4e-3
#: Surviving cells per level at whose centres the norm is found.
_LEADERS = 8
#: The largest angle of a first cell.
_WIDEST = 0.8
#: The share of a cell's room that rounding in float32 may take.
_ROUNDING_SHARE = 0.6
#: Frequencies of a fine grid looked at for a good start, and the angles of cells that may judge many of them at once.
_STARTS, _COARSE = 64, (0.2, 0.1, 0.05)
#: How far above the largest norm met the supremum is tried to be proven, for that.
_ABOVE_PEAK = 1e-3
#: Distances between frequencies held at once.
_DISTANCES = 1 << 20
#: No cell is halved more often: the angle is then below the rounding.
_MOST_LEVELS = 40
#: Up to this many rows or columns the work is many short calls, and one thread is as fast as two.
_ONE_THREAD = 128

_P = ParamSpec("_P")
_T = TypeVar("_T")


def calm(function: Callable[Concatenate[Tensor, _P], _T]) -> Callable[Concatenate[Tensor, _P], _T]:
    """Run on one thread for a small kernel, whatever torch's setting, which is as it was afterwards.

    A thousand calls of ten microseconds wait for each other a thousand times, and on a busy machine each time for the scheduler:
    seconds instead of 50 ms. The setting belongs to the calling thread, and takes a microsecond to change; only a thread that
    uses torch for the first time meanwhile takes it over.
    """

    @wraps(function)
    def on_one(kernel: Tensor, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        threads = torch.get_num_threads()
        if threads == 1 or kernel.device.type != "cpu" or min(kernel.shape[1:3]) > _ONE_THREAD:
            return function(kernel, *args, **kwargs)
        torch.set_num_threads(1)
        try:
            return function(kernel, *args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return on_one


class LatticeNorm(NamedTuple):
    """`value ≤ S ≤ upper`; `value` is the norm of the symbol of `group` at the frequency `theta`."""

    upper: float
    value: float
    group: int
    theta: Tensor


class Peak(NamedTuple):
    """The largest norm seen so far, and where."""

    value: float
    group: int
    theta: Tensor

    def or_at(self, squared: Tensor, cells: Cells) -> Peak:
        """This, or the largest of these cells' squared norms if it is larger."""
        index = int(squared.argmax())
        largest = float(squared[index])
        if not largest > self.value**2:
            return self
        return Peak(sqrt(largest), int(cells.group[index]), cells.centre[index])


@calm
def lattice_norm(kernel: Tensor, rtol: float = 1e-3, target: float | None = None, limit: float = inf) -> LatticeNorm:
    """Bracket the supremum of the symbol's norm: `upper ≤ value (1 + rtol)`.

    Args:
        kernel: canonical kernel `(groups, rows, columns, *taps)`.
        rtol: relative width of the bracket.
        target: only find out on which side of it the supremum lies: `upper` is `target` if it is proven not to lie above, and
            infinite if it does or, within limits, no proof was found.
        limit: stop as soon as it is seen that `upper` will be larger: it is infinite then.

    Raises:
        ValueError: the kernel holds NaN or infinity.
    """
    kernel, scale = normalized(kernel.detach())
    taps = kernel.ndim - 3
    if not kernel.any():
        return LatticeNorm(0.0, 0.0, 0, kernel.new_zeros(taps))
    kernel, axes = trim(kernel)
    degree = torch.tensor(kernel.shape[3:]).to(kernel) - 1
    goal = None if target is None else min(target / scale, 1e300)  # infinite is what is not proven
    if goal is not None and goal >= _at_most(kernel):
        found = LatticeNorm(goal, 0.0, 0, degree)
    elif degree.numel() and min(kernel.shape[1:3]) == 1:
        found = _of_rows(kernel, rtol, goal)
    elif degree.numel():
        found = _search(Gram(kernel), degree, rtol, goal, limit / scale)
    elif goal is not None:
        gram = Gram(kernel)
        proven = _below(gram, gram, cells_at(degree[None], degree, gram.groups), goal**2, _ROUNDING_SHARE * goal**2).all()
        found = LatticeNorm(goal if proven else inf, 0.0, 0, degree)
    else:
        found = _largest_of(Gram(kernel), degree[None])
    theta = kernel.new_zeros(taps)
    theta[axes] = found.theta
    return LatticeNorm(found.upper * scale, found.value * scale, found.group, theta)


@calm
def surely_below(kernel: Tensor, level: float) -> Tensor:
    """For which groups the supremum is proven not to exceed `level`, by a few large cells: with a third to spare it is.

    Raises:
        ValueError: the kernel holds NaN or infinity.
    """
    kernel, scale = normalized(kernel.detach())
    proven = (kernel == 0).flatten(1).all(1)
    left = ~proven
    if not left.any():
        return proven
    kernel, _ = trim(kernel[left])
    degree = torch.tensor(kernel.shape[3:]).to(kernel) - 1
    level = min(level / scale, 2 * _at_most(kernel))
    if degree.numel() and min(kernel.shape[1:3]) == 1:
        proven[left] = suprema(kernel, 0.0, kernel.new_full((len(kernel),), level), budget=0).upper <= level
        return proven
    gram = Gram(kernel)
    cells = _covering(gram, degree, _JUDGED) if degree.numel() else cells_at(degree[None], degree, gram.groups)
    squared = (level * cos(angle_of(degree, cells.radius))) ** 2
    quick = gram if gram.is_real else gram.single()
    proven[left] = _below(quick, gram, cells, squared, 0.1 * squared).unflatten(0, (gram.groups, -1)).all(1)
    return proven


@calm
def grid_norm(kernel: Tensor, sizes: tuple[int, ...], *, screen: torch.dtype = torch.float64) -> LatticeNorm:
    """The largest norm of the symbol over the full frequency grid of `sizes`: exact for a circular convolution.

    `value` is the norm at one of these frequencies; no other has a norm above `upper`, which exceeds `value` by rounding only: by
    some 1e-10 of it, for kernels of usual sizes.

    Args:
        kernel: canonical kernel `(groups, rows, columns, *taps)`.
        sizes: frequencies per axis.
        screen: in float32 the winner is found twice as fast, and can be one whose norm is 1e-6 short; `upper` is no proof then.

    Raises:
        ValueError: the kernel holds NaN or infinity.
    """
    kernel, scale = normalized(kernel.detach())
    if not kernel.any():
        return LatticeNorm(0.0, 0.0, 0, kernel.new_zeros(len(sizes)))
    degree = torch.tensor(kernel.shape[3:]).to(kernel) - 1
    if degree.numel() and min(kernel.shape[1:3]) == 1:
        rows = grid_maxima(kernel, sizes)
        group = int(rows.value.argmax())
        return LatticeNorm(float(rows.upper.amax()) * scale, float(rows.value[group]) * scale, group, rows.theta[group])
    theta, _ = half_plane(sizes, kernel)
    few_large = len(theta) <= _STARTS and kernel.shape[0] == 1 and min(kernel.shape[1:3]) > 2 * SMALL
    if screen == torch.float32 and few_large and float32_is_kept():
        found = _closer(kernel, _largest_of(Gram(kernel.float()), theta))
    else:
        gram = Gram(kernel)
        theta = _promising(gram, degree, theta)
        if screen == torch.float32:
            theta = _largest_of(gram.single(), theta).theta[None]
        found = _largest_of(gram, theta)
    return found._replace(upper=found.upper * scale, value=found.value * scale)


def normalized(kernel: Tensor) -> tuple[Tensor, float]:
    """The kernel in float64 with its largest entry in [1, 2), and the power of two that was divided out."""
    if kernel.is_meta:
        raise ValueError("`weight` is on the meta device and has no values: materialize the model first.")
    # Apple's GPUs have no float64
    kernel = kernel.to("cpu" if kernel.device.type == "mps" else kernel.device, torch.float64)
    largest = float(kernel.abs().amax()) if kernel.numel() else 0.0
    if not largest < float("inf"):
        raise ValueError("`weight` contains NaN or infinity: look at the training step before; the weight is left as it is.")
    scale = 2.0 ** floor(log2(largest)) if largest else 1.0
    return kernel / scale, scale


def _at_most(kernel: Tensor) -> float:
    """A bound of the norm that costs nothing: rank one at every tap, all in phase."""
    return 1.001 * float(torch.linalg.vector_norm(kernel.flatten(1), dim=1).amax()) * sqrt(prod(kernel.shape[3:]))


def _of_rows(kernel: Tensor, rtol: float, goal: float | None) -> LatticeNorm:
    """That of a symbol with a single row."""
    goals = None if goal is None else kernel.new_full((len(kernel),), goal)
    found = suprema(kernel, rtol, goals, together=goal is None)
    group = int(found.value.argmax())
    return LatticeNorm(float(found.upper.amax()), float(found.value[group]), group, found.theta[group])


def _search(gram: Gram, degree: Tensor, rtol: float, goal: float | None, limit: float) -> LatticeNorm:
    """Branch and bound."""
    lowest, highest = gram.extent()
    low, high = float(lowest.amin()), float(highest.amax())
    if goal is not None and high <= goal**2:
        return LatticeNorm(goal, 0.0, 0, torch.zeros_like(degree))
    quick = gram.single() if rtol > 1e-4 else gram
    sample = _covering(gram, degree, _SAMPLED)
    squared = torch.cat([norms(quick(p.group, p.centre), steps=_KRYLOV_STEPS) for p in _chunks(quick, sample)])
    best = Peak(0.0, 0, sample.centre[0]).or_at(squared, sample)

    def bound() -> float:
        return best.value * (1 + rtol) if goal is None else goal

    def settled() -> bool:
        return high <= bound() ** 2

    def hopeless() -> bool:
        nonlocal best
        if goal is None:
            return bound() > limit
        if quick is not gram and goal < best.value <= goal * (1 + _DOUBTFUL):
            best = best._replace(value=_largest_of(gram, best.theta[None]).value)  # in float64
        return best.value > goal

    if hopeless():
        return LatticeNorm(inf, *best)
    if rtol < _WITHIN_SAMPLE and not settled():
        best = _climb(quick, degree, sample.at(squared.topk(min(_CLIMBERS, len(squared))).indices), best, least=0.0)

    def above_low(norm: float) -> float:
        """The cosine of the largest angle at which a norm may be that of a cell's centre."""
        return sqrt(max(norm**2 - low, 0.0) / (bound() ** 2 - low))

    if not settled():
        finest = acos(min(above_low(bound() / (1 + rtol)), 1 - 1e-15))
        ratios = [above_low(norm) for norm in squared.sqrt().tolist()]
        cells = _covering(gram, degree, _first_angle(ratios, finest, degree.numel()))
    evaluations = 0
    budget = max(_CLOSE_CALL_BUDGET // gram.size, _SMALL_CLOSE_CALL_BUDGET // gram.size**2)
    for _ in range(_MOST_LEVELS):
        if hopeless():
            return LatticeNorm(inf, *best)
        if settled():
            break
        evaluations += len(cells.group)
        if goal is not None and goal < best.value * (1 + rtol) and evaluations > budget:
            return LatticeNorm(inf, *best)
        angle = min(angle_of(degree, cells.radius), pi / 2)
        level = (bound() * cos(angle)) ** 2 + low * sin(angle) ** 2
        kept = ~_below(quick, gram, cells, level, _ROUNDING_SHARE * (bound() ** 2 - level))
        if not kept.any():
            break
        cells = cells.at(kept)
        leaders = cells.at(torch.arange(0, len(cells.group), -(-len(cells.group) // _LEADERS)))
        best = _climb(quick, degree, leaders, best)
        cells = cells.split()
    else:
        raise RuntimeError("the branch and bound did not end; please report this weight.")
    if goal is not None:
        return LatticeNorm(goal, *best)
    found = _largest_of(gram, best.theta[None])
    return found._replace(upper=max(found.upper, min(max(found.value, best.value) * (1 + rtol), sqrt(high))))


def _below(quick: Gram, gram: Gram, cells: Cells, level: float, slack: float) -> Tensor:
    """At which centres the squared norm is proven not to exceed `level`: in float32, and where that is too coarse in float64."""
    masks, growth = [], 0.0
    for part in _chunks(quick, cells):
        proven, doubtful, growth = below(_rows(quick, part), level, error=quick.error, slack=slack, growth=1.1 * growth)
        if quick is not gram and doubtful.any():
            rest = part.at(doubtful)
            proven[doubtful] = below(_rows(gram, rest), level, error=gram.error, slack=0.1 * slack).proven
        masks.append(proven)
    return torch.cat(masks)


def _rows(gram: Gram, cells: Cells) -> Rows:
    """Those of the Gram matrices at the centres."""
    return Rows(
        len(cells.group),
        gram.size,
        gram.dtype,
        lambda start, end: gram.block(cells.group, cells.centre, start, end),
        lambda: gram(cells.group[:1], cells.centre[:1])[0],
    )


def _first_angle(ratios: list[float], finest: float, dims: int) -> float:
    """The size of the first cells with the least number of tests expected, from a sample of norms relative to the bound."""
    angles = [finest * 2**j for j in range(int(log2(max(_WIDEST / finest, 1))) + 1)]

    def expected(angle: float) -> float:
        total, size = 0.0, angle
        while size >= finest * 0.999:
            above = cos(2 * size) if size < angle else 0.0  # the cell around was tested, and kept
            total += (sum(r >= above for r in ratios) + 0.5) / size**dims
            size /= 2
        return total

    return min(angles, key=expected)


def _climb(gram: Gram, degree: Tensor, cells: Cells, best: Peak, least: float | None = None) -> Peak:
    """`best`, or the largest norm found by going up from the best of these cells' centres, if that is above `least`.

    With the top vector `v` here, `v* G(θ) v` is a polynomial, cheap everywhere and nowhere above the squared norm: where it is
    largest nearby, the norm is larger than here.
    """
    squared, vector = top(gram(cells.group, cells.centre), steps=_KRYLOV_STEPS)
    highest = squared.topk(min(_CLIMBERS, len(squared))).indices
    if not bool(squared.amax() > (best.value if least is None else least) ** 2):
        return best
    cells, vector = cells.at(highest), vector[highest]
    best = best.or_at(squared[highest], cells)
    offsets = product([torch.linspace(-1, 1, 9)] * degree.numel(), degree) / degree
    for step in range(_CLIMB_STEPS):
        nearby = cells.centre.unsqueeze(1) + 1.5 * 0.4**step * offsets
        uphill = gram.along(cells.group, nearby, vector).argmax(1)
        cells = cells._replace(centre=nearby[torch.arange(len(uphill)), uphill])
        squared, vector = top(gram(cells.group, cells.centre), vector, steps=_FEW_STEPS)
        best = best.or_at(squared, cells)
    return best


def _largest_of(gram: Gram, theta: Tensor) -> LatticeNorm:
    """The largest norm at these frequencies: `upper` exceeds it by rounding only; in float32 it is no proof."""
    cells = cells_at(theta, theta.new_zeros(theta.shape[1]), gram.groups)
    some = cells.at(torch.arange(0, len(cells.group), len(cells.group) // _STARTS + 1))
    steps = _FEW_STEPS if gram.size <= 128 else _KRYLOV_STEPS  # a bad start costs a factorization of every large matrix
    best = Peak(0.0, 0, theta[0]).or_at(top(gram(some.group, some.centre), steps=steps)[0], some)
    # in float32 nothing is proven, and the bound of its rounding would hide better frequencies
    screening = gram.even.dtype == torch.float32
    # in large matrices rounding adds up
    ties, error = (1e-6, 0.0) if screening else (1e-10 * max(gram.size / 128, 1), gram.error)

    def slack() -> float:
        return ties * best.value**2 + 2 * error

    def proven(matrices: Tensor) -> Tensor:
        growth = 1.0 if screening else 0.0  # what rounding takes does not matter
        enough, doubtful, _ = below_(matrices, best.value**2 + 2 * slack(), error=error, slack=slack(), growth=growth)
        return enough | doubtful if screening else enough

    for part in _chunks(gram, cells):
        matrices = gram(part.group, part.centre)
        # most are proven at once not to exceed a good start; of the others, one after the other becomes exact
        rest = ~proven(matrices)
        part, matrices = part.at(rest), matrices[rest]
        estimates, vectors = top(matrices, steps=steps)
        left = torch.arange(len(estimates), device=estimates.device)
        while len(left):
            highest = left[estimates[left].argmax()][None]
            value, _ = exact_top(matrices[highest[0]], vectors[highest[0]])
            best = best.or_at(value[None], part.at(highest))
            left = left[~proven(matrices[left])]
            if highest in left:
                # Krylov steps can settle on a vector that is not the top one; an eigenvalue solver cannot
                best = best.or_at(torch.linalg.eigvalsh(matrices[highest])[:, -1], part.at(highest))
                left = left[left != highest]
    return LatticeNorm(sqrt(best.value**2 + 2 * slack()), *best)


def _closer(kernel: Tensor, found: LatticeNorm) -> LatticeNorm:
    """In float64 what was found in float32, from the symbol at that frequency: for one, a Gram polynomial is too dear."""
    block = symbol(kernel, found.theta[None])[0, 0]
    block = block.mH if block.shape[0] > block.shape[1] else block
    matrix = block @ block.mH
    value, _ = exact_top(matrix, top(matrix[None], steps=_KRYLOV_STEPS)[1][0])
    if abs(float(value) - found.value**2) > 1e-5 * found.value**2:  # not the top vector
        value = torch.linalg.eigvalsh(matrix)[-1]
    norm = sqrt(float(value))
    return found._replace(upper=norm, value=norm)


def _promising(gram: Gram, degree: Tensor, theta: Tensor) -> Tensor:
    """The frequencies of a fine grid at which its largest norm can be, judged by cells of the torus that hold many of them.

    With a proven `U ≥ sup ‖F‖`, all norms in a cell are at most `U cos(arccos(‖F(centre)‖ / U) - a)`. That is below `L`, a norm
    that the grid has, if `‖F(centre)‖ < U cos(arccos(L / U) + a)`.
    """
    if gram.groups > 1 or gram.size <= 24 or not degree.numel() or bool((degree == 0).any()):
        return theta
    quick = gram.single()
    some = cells_at(theta[:: len(theta) // _STARTS + 1], degree, 1)
    squared, _ = top(quick(some.group, some.centre), steps=8)
    ratios = (squared / squared.amax()).sqrt()

    def expected(angle: float) -> float:
        kept = float((ratios >= cos(2 * angle) / cos(angle)).float().mean())
        return 2 * tiling(degree, angle).number + kept * len(theta)

    coarse = min(_COARSE, key=expected)
    if expected(coarse) > 0.9 * len(theta):
        return theta
    cells = _covering(gram, degree, coarse)
    angle = angle_of(degree, cells.radius)
    peak = _climb(quick, degree, some.at(squared.topk(min(_CLIMBERS, len(squared))).indices), Peak(0.0, 0, theta[0]), least=0.0)
    most = peak.value * (1 + _ABOVE_PEAK) / cos(angle)
    unproven = ~_below(quick, gram, cells, (most * cos(angle)) ** 2, _ROUNDING_SHARE * (most * sin(angle)) ** 2)
    if unproven.any():  # the climb has missed the summit
        most = max(most, _largest_of(gram, cells.centre[unproven]).upper / cos(angle))
    # a Rayleigh quotient in float64: the grid has a norm that is no smaller
    apart = torch.minimum(_apart(theta, peak.theta, degree), _apart(theta, -peak.theta, degree))
    nearest = theta[apart.topk(min(_CLIMBERS, len(theta)), largest=False).indices]
    known = cells_at(torch.cat([nearest, some.centre[squared.argmax()][None]]), degree, 1)
    least = sqrt(float(top(gram(known.group, known.centre), steps=_KRYLOV_STEPS)[0].amax()))
    reach = acos(min(least / most, 1.0)) + angle
    if reach >= pi / 2:
        return theta
    level = (most * cos(reach)) ** 2
    centres = cells.centre[~_below(quick, gram, cells, level, _ROUNDING_SHARE * (least**2 - level))]
    near = [
        (_apart(part.unsqueeze(1), centres, degree) <= angle * (1 + 1e-9)).any(1)
        for part in theta.split(max(_DISTANCES // max(len(centres), 1), 1))
    ]
    return theta[torch.cat(near)]


def _apart(theta: Tensor, centres: Tensor, degree: Tensor) -> Tensor:
    """Distances on the torus, in the metric of the lemma."""
    apart = (theta - centres).remainder(2 * pi)
    return torch.minimum(apart, 2 * pi - apart) @ (degree / 2)


def _covering(gram: Gram, degree: Tensor, angle: float) -> Cells:
    """Cells of all groups that cover half of the torus, their points at most `angle` from the centres."""
    cover = tiling(degree, angle)
    return cells_at(cover.centres(), cover.radius, gram.groups)


def _chunks(gram: Gram, cells: Cells) -> Iterator[Cells]:
    count = max(_CHUNK_BYTES // gram.bytes_each, _FEWEST)
    parts = zip(cells.group.split(count), cells.centre.split(count), strict=True)
    return (Cells(*part, cells.radius) for part in parts)
