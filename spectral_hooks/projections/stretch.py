"""How far to go along the corrections that few rounds have found."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from ..linalg.scaling import each
from ..linalg.taps import AppliedSymbol
from .frequencies import FrequencyGrid

#: How far to go along a correction.
_STRETCHES = (0.85, 1.0, 1.2, 1.45, 1.75, 2.1, 2.5, 3.0)
#: The same where it costs nothing to look, and how much of what the last round has changed to add.
_FINE_STRETCHES = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.3, 1.45, 1.6, 1.75, 2.1, 2.5, 3.0)
_TRENDS = (-0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5)
#: Krylov steps for the norms at the first weight and at each that looks best; how many of these, and when it is as it looked.
_FIRST_STEPS, _STEPS, _LOOKS, _AS_IT_LOOKED = 5, 3, 5, 1 + 4e-3
#: Half of the frequencies are left out after the first look, but not more than leaves so many.
_FEWEST = 16


def stretched(kernel: Tensor, correction: Tensor, level: float, grid: FrequencyGrid) -> Tensor:
    """`K₀ - t D` for the correction `D` so far and the `t` that ends nearest to `K₀` after the scaling that is still needed.

    A few rounds correct too little, most of all between the frequencies of their grid. Going on in the same direction costs far
    less than scaling everything. With exact norms on the grid, for small symbols.
    """
    best, shortest = kernel, _squares(kernel) + inf
    nearing = torch.ones_like(shortest, dtype=torch.bool)
    for t in _STRETCHES:
        trial = kernel - t * correction
        trial = trial * each((level / grid.norms(trial)).clamp(max=1), kernel.ndim - 1)
        distance = _squares(trial - kernel)
        nearing = nearing & (distance < shortest)
        if not bool(nearing.any()):
            break
        best, shortest = torch.where(each(nearing, kernel.ndim - 1), trial, best), torch.where(nearing, distance, shortest)
    return best


def combined(kernel: Tensor, correction: Tensor, before: Tensor, level: float, theta: Tensor) -> Tensor:
    """`K₀ - t (D + s (D - D'))`, with `D'` the correction before the last round, for the `s` and `t` that end nearest to `K₀`.

    The rounds go to and fro about the solution, or creep up to it: a mean, or going on, is often nearer by more than another
    round would be. With a vector `v` at a frequency `‖F(θ) v‖²` is a quadratic form in `(1, t, s t)` of three by three numbers,
    and never above the squared norm. So all `s` and `t` are compared by the vectors found so far, and what looks best is looked
    at closer, which gives new vectors, until it is what it looked like.
    """
    parts = torch.stack([kernel, correction, correction - before], 1)  # (groups, 3, rows, columns, *taps)
    all_parts = AppliedSymbol(parts.flatten(1, 2), theta)
    lengths = torch.einsum("gaz,gbz->gab", *(parts.flatten(2),) * 2)
    t, s = (x.flatten() for x in torch.meshgrid(kernel.new_tensor(_FINE_STRETCHES), kernel.new_tensor(_TRENDS), indexing="ij"))
    choices = torch.stack([torch.ones_like(t), -t, -s * t], 1)
    best = int(((t == 1) & (s == 0)).nonzero())
    chosen = choices.new_tensor([best] * len(kernel), dtype=torch.long)
    squares: Tensor | None = None
    vectors: Tensor | None = None
    for step in range(_LOOKS):
        weights = choices[chosen]
        symbol = AppliedSymbol(torch.einsum("ga,ga...->g...", weights, parts), theta)
        _, vectors = symbol.top(symbol.start(), _FIRST_STEPS) if vectors is None else symbol.top(vectors, _STEPS)
        images = all_parts(vectors).unflatten(1, (3, -1))
        forms = torch.einsum("garf,gbrf->gfab", images.conj(), images).real
        fresh = torch.einsum("ca,gfab,cb->gcf", choices, forms, choices).amax(2)
        seen = fresh if squares is None else torch.maximum(squares, fresh)
        here = chosen.unsqueeze(1)
        as_it_looked = squares is not None and bool((seen.gather(1, here) <= squares.gather(1, here) * _AS_IT_LOOKED).all())
        squares = seen
        scales = (level / squares.clamp(min=1e-30).sqrt()).clamp(max=1)
        own, along = torch.einsum("ca,gab,cb->gc", choices, lengths, choices), choices @ lengths[:, 0].mT
        chosen = (scales.square() * own - 2 * scales * along.mT).argmin(1)
        if as_it_looked:
            break
        if step == 0 and len(theta) > _FEWEST:  # the others are hardly ever the largest
            at_best = torch.einsum("ga,gfab,gb->gf", choices[chosen], forms, choices[chosen]).amax(0)
            kept = at_best.topk(max(len(theta) // 2, _FEWEST)).indices.sort().values
            theta, vectors = theta[kept], vectors[..., kept]
            all_parts = AppliedSymbol(parts.flatten(1, 2), theta)
    weights, scale = choices[chosen], scales.gather(1, chosen.unsqueeze(1)).squeeze(1)
    return torch.einsum("ga,ga...->g...", weights, parts) * each(scale, kernel.ndim - 1)


def _squares(kernel: Tensor) -> Tensor:
    """Squared Frobenius norms of the groups."""
    return kernel.square().flatten(1).sum(1)
