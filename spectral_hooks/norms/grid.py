"""The largest norm of a symbol over a frequency grid."""

from __future__ import annotations

from math import acos, cos, pi, sin, sqrt

import torch
from torch import Tensor

from ..linalg.gram import Gram
from ..linalg.lanczos import SMALL, top
from ..linalg.precision import float32_is_kept
from ..linalg.scaling import normalized
from ..linalg.symbols import half_plane
from ..linalg.threads import calm
from .cells import angle_of, cells_at, tiling
from .cover import ROUNDING_SHARE, covering, proven_below
from .peaks import CLIMBERS, KRYLOV_STEPS, STARTS, LatticeNorm, Peak, climb, closer, largest_at
from .single_row import grid_maxima

#: The angles of cells that may judge many frequencies of a fine grid at once.
_COARSE = (0.2, 0.1, 0.05)
#: How far above the largest norm met the supremum is tried to be proven, for that.
_ABOVE_PEAK = 1e-3
#: Distances between frequencies held at once.
_DISTANCES = 1 << 20


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
    few_large = len(theta) <= STARTS and kernel.shape[0] == 1 and min(kernel.shape[1:3]) > 2 * SMALL
    if screen == torch.float32 and few_large and float32_is_kept():
        found = closer(kernel, largest_at(Gram(kernel.float()), theta))
    else:
        gram = Gram(kernel)
        theta = _promising(gram, degree, theta)
        if screen == torch.float32:
            theta = largest_at(gram.single(), theta).theta[None]
        found = largest_at(gram, theta)
    return found._replace(upper=found.upper * scale, value=found.value * scale)


def _promising(gram: Gram, degree: Tensor, theta: Tensor) -> Tensor:
    """The frequencies of a fine grid at which its largest norm can be, judged by cells of the torus that hold many of them.

    With a proven `U ≥ sup ‖F‖`, all norms in a cell are at most `U cos(arccos(‖F(centre)‖ / U) - a)`. That is below `L`, a norm
    that the grid has, if `‖F(centre)‖ < U cos(arccos(L / U) + a)`.
    """
    if gram.groups > 1 or gram.size <= 24 or not degree.numel() or bool((degree == 0).any()):
        return theta
    quick = gram.single()
    some = cells_at(theta[:: len(theta) // STARTS + 1], degree, 1)
    squared, _ = top(quick(some.group, some.centre), steps=8)
    ratios = (squared / squared.amax()).sqrt()

    def expected(angle: float) -> float:
        kept = float((ratios >= cos(2 * angle) / cos(angle)).float().mean())
        return 2 * tiling(degree, angle).number + kept * len(theta)

    coarse = min(_COARSE, key=expected)
    if expected(coarse) > 0.9 * len(theta):
        return theta
    cells = covering(gram, degree, coarse)
    angle = angle_of(degree, cells.radius)
    peak = climb(quick, degree, some.at(squared.topk(min(CLIMBERS, len(squared))).indices), Peak(0.0, 0, theta[0]), least=0.0)
    most = peak.value * (1 + _ABOVE_PEAK) / cos(angle)
    unproven = ~proven_below(quick, gram, cells, (most * cos(angle)) ** 2, ROUNDING_SHARE * (most * sin(angle)) ** 2)
    if unproven.any():  # the climb has missed the summit
        most = max(most, largest_at(gram, cells.centre[unproven]).upper / cos(angle))
    # a Rayleigh quotient in float64: the grid has a norm that is no smaller
    apart = torch.minimum(_apart(theta, peak.theta, degree), _apart(theta, -peak.theta, degree))
    nearest = theta[apart.topk(min(CLIMBERS, len(theta)), largest=False).indices]
    known = cells_at(torch.cat([nearest, some.centre[squared.argmax()][None]]), degree, 1)
    least = sqrt(float(top(gram(known.group, known.centre), steps=KRYLOV_STEPS)[0].amax()))
    reach = acos(min(least / most, 1.0)) + angle
    if reach >= pi / 2:
        return theta
    level = (most * cos(reach)) ** 2
    centres = cells.centre[~proven_below(quick, gram, cells, level, ROUNDING_SHARE * (least**2 - level))]
    near = [
        (_apart(part.unsqueeze(1), centres, degree) <= angle * (1 + 1e-9)).any(1)
        for part in theta.split(max(_DISTANCES // max(len(centres), 1), 1))
    ]
    return theta[torch.cat(near)]


def _apart(theta: Tensor, centres: Tensor, degree: Tensor) -> Tensor:
    """Distances on the torus, in the metric of the lemma."""
    apart = (theta - centres).remainder(2 * pi)
    return torch.minimum(apart, 2 * pi - apart) @ (degree / 2)
