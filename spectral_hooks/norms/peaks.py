"""Where the norm of a symbol is large: searched from below, and exact at given frequencies."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg.cholesky import below_
from ..linalg.gram import Gram
from ..linalg.lanczos import exact_top, top
from ..linalg.symbols import product, symbol
from .cells import Cells, cells_at
from .cover import in_chunks

#: Frequencies from which to climb, and steps.
CLIMBERS, _CLIMB_STEPS = 3, 6
#: Krylov steps for the norm of a frequency, and for one that another search goes on from.
KRYLOV_STEPS, _FEW_STEPS = 16, 4
#: Frequencies of a fine grid looked at for a good start.
STARTS = 64


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


def climb(gram: Gram, degree: Tensor, cells: Cells, best: Peak, least: float | None = None) -> Peak:
    """`best`, or the largest norm found by going up from the best of these cells' centres, if that is above `least`.

    With the top vector `v` here, `v* G(θ) v` is a polynomial, cheap everywhere and nowhere above the squared norm: where it is
    largest nearby, the norm is larger than here.
    """
    squared, vector = top(gram(cells.group, cells.centre), steps=KRYLOV_STEPS)
    highest = squared.topk(min(CLIMBERS, len(squared))).indices
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


def largest_at(gram: Gram, theta: Tensor) -> LatticeNorm:
    """The largest norm at these frequencies: `upper` exceeds it by rounding only; in float32 it is no proof."""
    cells = cells_at(theta, theta.new_zeros(theta.shape[1]), gram.groups)
    some = cells.at(torch.arange(0, len(cells.group), len(cells.group) // STARTS + 1))
    steps = _FEW_STEPS if gram.size <= 128 else KRYLOV_STEPS  # a bad start costs a factorization of every large matrix
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

    for part in in_chunks(gram, cells):
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


def closer(kernel: Tensor, found: LatticeNorm) -> LatticeNorm:
    """In float64 what was found in float32, from the symbol at that frequency: for one, a Gram polynomial is too dear."""
    block = symbol(kernel, found.theta[None])[0, 0]
    block = block.mH if block.shape[0] > block.shape[1] else block
    matrix = block @ block.mH
    value, _ = exact_top(matrix, top(matrix[None], steps=KRYLOV_STEPS)[1][0])
    if abs(float(value) - found.value**2) > 1e-5 * found.value**2:  # not the top vector
        value = torch.linalg.eigvalsh(matrix)[-1]
    norm = sqrt(float(value))
    return found._replace(upper=norm, value=norm)
