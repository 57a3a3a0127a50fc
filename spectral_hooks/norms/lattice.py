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

from math import acos, cos, inf, log2, pi, prod, sin, sqrt

import torch
from torch import Tensor

from ..linalg.gram import Gram
from ..linalg.lanczos import norms
from ..linalg.scaling import normalized
from ..linalg.symbols import trim
from ..linalg.taps import AppliedSymbol
from ..linalg.threads import calm
from .cells import Cells, angle_of, cells_at
from .cover import ROUNDING_SHARE, covering, in_chunks, proven_below
from .peaks import CLIMBERS, KRYLOV_STEPS, LatticeNorm, Peak, climb, largest_at
from .single_row import suprema

#: What may be spent on proving a norm below a target that is closer than `rtol`: evaluations times the matrix size, and for
#: small matrices times its square.
_CLOSE_CALL_BUDGET, _SMALL_CLOSE_CALL_BUDGET = 1 << 15, 1 << 21
#: A norm in float32 is looked at again if it exceeds the target by no more than this.
_DOUBTFUL = 1e-4
#: The angle of the cells whose centres are the sample, and of those that judge what has room to spare.
_SAMPLED, _JUDGED = 0.6, 0.7
#: From more rows on the sample is that of the symbols, by so many Krylov steps, and not of their Gram matrices.
_FEW_ROWS, _SAMPLE_STEPS = 64, 10
#: Up to this `rtol` it pays to climb from the sample; else its largest value is as good, but for large symbols.
_WITHIN_SAMPLE = 4e-3
#: Surviving cells per level at whose centres the norm is found.
_LEADERS = 8
#: The largest angle of a first cell.
_WIDEST = 0.8
#: No cell is halved more often: the angle is then below the rounding.
_MOST_LEVELS = 40


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
        found = _Search(kernel, degree, rtol, goal, limit / scale).found()
    elif goal is not None:
        gram = Gram(kernel)
        proven = proven_below(gram, gram, cells_at(degree[None], degree, gram.groups), goal**2, ROUNDING_SHARE * goal**2).all()
        found = LatticeNorm(goal if proven else inf, 0.0, 0, degree)
    else:
        found = largest_at(Gram(kernel), degree[None])
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
    cells = covering(gram, degree, _JUDGED) if degree.numel() else cells_at(degree[None], degree, gram.groups)
    squared = (level * cos(angle_of(degree, cells.radius))) ** 2
    quick = gram if gram.is_real else gram.single()
    proven[left] = proven_below(quick, gram, cells, squared, 0.1 * squared).unflatten(0, (gram.groups, -1)).all(1)
    return proven


def _at_most(kernel: Tensor) -> float:
    """A bound of the norm that costs nothing: rank one at every tap, all in phase."""
    return 1.001 * float(torch.linalg.vector_norm(kernel.flatten(1), dim=1).amax()) * sqrt(prod(kernel.shape[3:]))


def _of_rows(kernel: Tensor, rtol: float, goal: float | None) -> LatticeNorm:
    """That of a symbol with a single row."""
    goals = None if goal is None else kernel.new_full((len(kernel),), goal)
    found = suprema(kernel, rtol, goals, together=goal is None)
    group = int(found.value.argmax())
    return LatticeNorm(float(found.upper.amax()), float(found.value[group]), group, found.theta[group])


class _Search:
    """Branch and bound: what is known of the supremum, from below by the best peak, and from above by the cells that are left."""

    def __init__(self, kernel: Tensor, degree: Tensor, rtol: float, goal: float | None, limit: float) -> None:
        self.kernel, self.degree, self.rtol, self.goal, self.limit = kernel, degree, rtol, goal, limit
        gram = self.gram = Gram(kernel)
        #: In which peaks are looked for, and what is far from the bound is proven.
        self.quick = gram.single() if rtol > 1e-4 else gram
        low, high = gram.extent()
        #: All eigenvalues lie between these, at all frequencies.
        self.low, self.high = float(low.amin()), float(high.amax())
        self.best = Peak(0.0, 0, torch.zeros_like(degree))

    def found(self) -> LatticeNorm:
        """The bracket, or on which side of the goal the supremum lies."""
        if self.goal is not None and self._is_settled():
            return LatticeNorm(self.goal, *self.best)
        cells = self._screened()
        if self._is_hopeless() or not (cells is None or self._proven(cells)):
            return LatticeNorm(inf, *self.best)
        if self.goal is not None:
            return LatticeNorm(self.goal, *self.best)
        found = largest_at(self.gram, self.best.theta[None])
        most = max(found.value, self.best.value) * (1 + self.rtol)
        return found._replace(upper=max(found.upper, min(most, sqrt(self.high))))

    def _bound(self) -> float:
        """What is to be proven."""
        return self.best.value * (1 + self.rtol) if self.goal is None else self.goal

    def _is_settled(self) -> bool:
        """Whether the extent of all eigenvalues proves it."""
        return self.high <= self._bound() ** 2

    def _is_hopeless(self) -> bool:
        """Whether it is seen to be wrong, or of no use."""
        if self.goal is None:
            return self._bound() > self.limit
        if self.quick is not self.gram and self.goal < self.best.value <= self.goal * (1 + _DOUBTFUL):
            self.best = self.best._replace(value=largest_at(self.gram, self.best.theta[None]).value)  # in float64
        return self.best.value > self.goal

    def _screened(self) -> Cells | None:
        """Look for the peak, by a sample and by climbing from it, and choose the first cells; None if no proof is called for."""
        quick, degree = self.quick, self.degree
        sample = covering(self.gram, degree, _SAMPLED)
        squared = self._sampled(sample)
        self.best = self.best.or_at(squared, sample)
        if self._is_hopeless() or self._is_settled():
            return None
        if self.rtol < _WITHIN_SAMPLE or self.gram.size > _FEW_ROWS:
            highest = sample.at(squared.topk(min(CLIMBERS, len(squared))).indices)
            self.best = climb(quick, degree, highest, self.best, least=0.0)
        if self._is_settled():
            return None
        bound = self._bound()

        def above_low(norm: float) -> float:
            """The cosine of the largest angle at which a norm may be that of a cell's centre."""
            return sqrt(max(norm**2 - self.low, 0.0) / (bound**2 - self.low))

        finest = acos(min(above_low(bound / (1 + self.rtol)), 1 - 1e-15))
        ratios = [above_low(norm) for norm in squared.sqrt().tolist()]
        return covering(self.gram, degree, _first_angle(ratios, finest, degree.numel()))

    def _sampled(self, sample: Cells) -> Tensor:
        """Estimates of the squared norms at the centres, which every group has alike."""
        if self.gram.size > _FEW_ROWS:
            # in float32 where the Gram matrices are: it is no proof
            symbol = AppliedSymbol(self.kernel.to(self.quick.even), sample.centre[: len(sample.group) // self.gram.groups])
            return symbol.top(symbol.start(), _SAMPLE_STEPS)[0].square().flatten().to(self.kernel)
        parts = in_chunks(self.quick, sample)
        return torch.cat([norms(self.quick(p.group, p.centre), steps=KRYLOV_STEPS) for p in parts])

    def _proven(self, cells: Cells) -> bool:
        """Whether no cell is left in which the supremum can exceed the bound, which may rise meanwhile."""
        gram, degree, evaluations = self.gram, self.degree, 0
        budget = max(_CLOSE_CALL_BUDGET // gram.size, _SMALL_CLOSE_CALL_BUDGET // gram.size**2)
        for _ in range(_MOST_LEVELS):
            if self._is_hopeless():
                return False
            if self._is_settled():
                return True
            evaluations += len(cells.group)
            if self.goal is not None and self.goal < self.best.value * (1 + self.rtol) and evaluations > budget:
                return False
            angle, bound = min(angle_of(degree, cells.radius), pi / 2), self._bound() ** 2
            level = bound * cos(angle) ** 2 + self.low * sin(angle) ** 2
            kept = ~proven_below(self.quick, gram, cells, level, ROUNDING_SHARE * (bound - level))
            if not kept.any():
                return True
            cells = cells.at(kept)
            leaders = cells.at(torch.arange(0, len(cells.group), -(-len(cells.group) // _LEADERS)))
            self.best = climb(self.quick, degree, leaders, self.best)
            cells = cells.split()
        raise RuntimeError("the branch and bound did not end; please report this weight.")


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
