"""Clips of many matrices of which few singular values are above the bound, as after a step of training: no whole decomposition.

Of a matrix that lives at the bound many singular values are close to it, and after a step few are above: 1 to 10 of 384 after one
of AdamW. With `G = W Wᵀ` on the smaller side, `U` its eigenvectors of those and `D = diag(1 - c / σ)`,

    W' = S W,    S = I - U D Uᵀ,    G' = S G S = G - U Yᵀ - Y Uᵀ,    Y = G U D - ½ U D (Uᵀ G U) D,

so one Gram matrix serves the search, the clip and the proof, which is one Cholesky factor of `I - G'`. All in the precision of
the weight: the depth of a clip pays for what rounding takes, which is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil, floor, inf, log2
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg.cholesky import within_one
from ..linalg.gramians import Gramians, Pairs, gramians, largest_pairs, rounding
from ..linalg.host import read
from ..linalg.precision import at_least_float32, float32_is_kept, full_precision, widest
from ..linalg.rounded import frobenius_bounds
from .arguments import check_max_norm

#: Bounds beyond these powers of two are handled in float64, and beyond the second not at all.
_MODERATE, _RANGE = 20, 300
#: The share of the depth that the rounding of Gram matrices may take in float32.
_ROUNDING_SHARE = 0.75
#: Estimates of squares closer to the bound than this do not tell on which side of it they are, in eps.
_UNSURE = 100
#: The degree of the polynomial that singles out the largest is this over the root of the depth, and it is small below this share
#: of the depth.
_SHARPNESS, _SINGLED = 2.6, 0.75
#: After so many attempts, each among twice as many, all are to be found.
_ATTEMPTS = 2
#: The least number of singular values that are looked for, and how many more than were above the last time.
_LEAST, _MORE = 24, 16


class Few(NamedTuple):
    """Of each matrix: what it becomes, None if it stays, whether it is proven to be inside, how many were above."""

    weights: list[Tensor | None]
    proven: list[bool]
    above: list[int]


class _Part(NamedTuple):
    """Some matrices of a batch, in the precision in which they are worked on, and their Gram matrices over the squared bound."""

    batch: int
    members: list[int]
    stored: Tensor
    values: Tensor
    grams: Gramians

    def some(self, chosen: list[int]) -> _Part:
        """The same for some of these."""
        if len(chosen) == len(self.members):
            return self
        members, stored = [self.members[j] for j in chosen], _some(self.stored, chosen)
        return _Part(self.batch, members, stored, stored.to(self.values.dtype), self.grams_of(chosen))

    def grams_of(self, chosen: list[int]) -> Gramians:
        """Their Gram matrices."""
        return Gramians(*(_some(x, chosen) for x in self.grams))


@full_precision
@torch.no_grad()
def clip_few(
    batches: Sequence[Tensor], max_norm: float, *, depth: float, numbers: Sequence[list[int]], outside: Sequence[list[bool]]
) -> list[Few]:
    """Each matrix itself if its norm is proven to be at most `max_norm`, else with its few singular values above clipped.

    `W - U diag(1 - t / σ) Uᵀ W` with `t = (1 - depth) max_norm`, over the largest singular values that are above `t`: all those
    above `max_norm`, and of those between as many as there is room for. What is inside stays bit for bit.

    Args:
        batches: matrices `(n, rows, columns)`, one batch a shape, finite. They are not changed.
        max_norm: the bound.
        depth: how far below the bound a singular value that is outside is brought, relative to it, in (0, 1).
        numbers: for each matrix among how many of its largest singular values are looked for; 0 to only try to prove it.
        outside: which are expected to be outside, so that it is not tried to prove that they are not.

    Returns:
        For each batch what becomes of its matrices. Those not proven, of which too many singular values are outside, are left to
        `clip_matrices`.

    Cost: a Gram matrix in the precision of the weights, a Cholesky factor or two, and some products with blocks of `numbers`
        columns. The host reads twice for all batches, and twice again for what is so close to the bound that it takes float64.

    Example:
        >>> import torch
        >>> from spectral_hooks.projections.few import clip_few
        >>> weight = torch.diag(torch.tensor([1.01, 0.99, 0.5, 0.1]))[None]
        >>> [clipped] = clip_few([weight], 1.0, depth=0.02, numbers=[[1]], outside=[[False]])
        >>> clipped.proven, clipped.above, clipped.weights[0].diagonal()
        ([True], [1], tensor([0.9800, 0.9900, 0.5000, 0.1000]))
    """
    c = check_max_norm(max_norm)
    found = [Few([None] * len(batch), [False] * len(batch), [0] * len(batch)) for batch in batches]
    if abs(log2(c)) > _RANGE:
        return found
    filled = [i for i, x in enumerate(batches) if x.numel() and widest(x.device) == torch.float64]
    parts = [_part(i, list(range(len(batches[i]))), batches[i], c, not _is_single(batches[i], c, depth)) for i in filled]
    asked = [[j for j, out in enumerate(outside[part.batch]) if not out] for part in parts]
    for attempt in range(_ATTEMPTS):
        parts = _unproven(parts, asked, found)
        parts = _those(parts, lambda part, m: numbers[part.batch][m] > 0)
        _clip(parts, [max(numbers[part.batch][m] for m in part.members) << attempt for part in parts], c, depth, found)
        parts = _those(parts, lambda part, m: not found[part.batch].proven[m])
        # more of them; but where all that was found is above there are too many
        more = _those(parts, lambda part, m: 0 < found[part.batch].above[m] < numbers[part.batch][m])
        near = [(part.batch, [m for m in part.members if not found[part.batch].above[m]]) for part in parts]
        close = [_part(i, members, batches[i], c, True) for i, members in near if members]
        parts, asked = more + close, [[] for _ in more] + [list(range(len(part.members))) for part in close]
    return found


def block_for(above: int) -> int:
    """Among how many singular values those above the bound are looked for, where so many were above the last time."""
    return 8 * ceil(max(1.5 * above + _MORE, _LEAST) / 8)


def _is_single(batch: Tensor, c: float, depth: float) -> bool:
    """Whether float32 is precise enough."""
    kept = at_least_float32(batch.dtype) == torch.float32 and float32_is_kept() and abs(log2(c)) <= _MODERATE
    rows, columns = sorted(batch.shape[1:])
    return kept and rounding(rows, columns, torch.float32) * rows <= _ROUNDING_SHARE * depth


def _part(index: int, members: list[int], batch: Tensor, c: float, precise: bool) -> _Part:
    """Some matrices of a batch and their Gram matrices, on the smaller side."""
    stored = _some(batch.detach(), members)
    values = stored.to(torch.float64 if precise else torch.float32)
    return _Part(index, members, stored, values, _grams(values, c))


def _some(x: Tensor, chosen: list[int]) -> Tensor:
    """These of the first axis; all are not copied."""
    return x if len(chosen) == len(x) else x.index_select(0, torch.tensor(chosen, dtype=torch.long, device=x.device))


def _grams(values: Tensor, c: float) -> Gramians:
    """Of the matrices over the bound."""
    unit = 2.0 ** floor(log2(c)) if not 0.5 < c < 2 else 1.0  # a power of two, so that nothing is rounded
    scaled = values / unit if unit != 1 else values
    gram, squares, error = gramians(scaled if scaled.shape[1] <= scaled.shape[2] else scaled.mT)
    c /= unit
    if c == 1:
        return Gramians(gram, squares, error)
    squares, error = squares / c / c, error / c / c
    return Gramians(gram * (1 / c / c), squares, error + 2 * torch.finfo(gram.dtype).eps * squares)


def _those(parts: list[_Part], which: Callable[[_Part, int], bool]) -> list[_Part]:
    """The parts with those of their members for which this is so; parts without any are left out."""
    chosen = [[j for j, m in enumerate(part.members) if which(part, m)] for part in parts]
    return [part.some(some) for part, some in zip(parts, chosen, strict=True) if some]


def _unproven(parts: list[_Part], asked: list[list[int]], found: list[Few]) -> list[_Part]:
    """The parts without those of these that are proven to be inside as they are."""
    grams = [part.grams_of(some) for part, some in zip(parts, asked, strict=True) if some]
    inside = iter(read([within_one(each.gram, each.error) for each in grams]))
    for part, some in zip(parts, asked, strict=True):
        for j, proven in zip(some, next(inside).tolist() if some else [], strict=True):
            found[part.batch].proven[part.members[j]] = bool(proven)
    return _those(parts, lambda part, m: not found[part.batch].proven[m])


def _clip(parts: list[_Part], numbers: list[int], c: float, depth: float, found: list[Few]) -> None:
    """Clip what is outside and prove all, and note of which that succeeded."""
    clipped, verdicts = [], []
    for part, number in zip(parts, numbers, strict=True):
        rows = part.grams.gram.shape[1]
        pairs = largest_pairs(part.grams.gram, (1 - _SINGLED * depth) ** 2, min(number, rows), ceil(_SHARPNESS / depth**0.5))
        above = pairs.values > 1 + _UNSURE * torch.finfo(pairs.values.dtype).eps
        stored, grams = _cut(part, pairs, above[:, -1], c, 1 - depth)
        clipped.append(stored)
        verdicts.append(torch.stack([within_one(grams.gram, grams.error), above[:, -1], above.sum(1)]))
    for part, stored, (proven, cut, above) in zip(parts, clipped, read(verdicts), strict=True):
        few = found[part.batch]
        for j, m in enumerate(part.members):
            few.proven[m], few.above[m] = bool(proven[j]), int(above[j])
            few.weights[m] = stored[j] if cut[j] and proven[j] else None


def _cut(part: _Part, pairs: Pairs, outside: Tensor, c: float, level: float) -> tuple[Tensor, Gramians]:
    """What is `outside` clipped at the level, as it is stored, and its Gram matrices, over the bound."""
    values, vectors = part.values, pairs.vectors
    sigma = pairs.values.clamp(min=torch.finfo(values.dtype).tiny).sqrt()
    share = torch.where(outside[:, None] & (sigma > level), 1 - level / sigma, 0.0)
    taken = vectors * share[:, None]
    if values.shape[1] <= values.shape[2]:
        clipped = torch.baddbmm(values, taken, vectors.mT @ values, alpha=-1)
    else:
        clipped = torch.baddbmm(values, values @ vectors, taken.mT, alpha=-1)
    if clipped.dtype == part.stored.dtype:
        return clipped, _carried(part.grams, vectors, share, taken)
    largest = torch.finfo(part.stored.dtype).max
    stored = clipped.clamp_(-largest, largest).to(part.stored.dtype)
    return stored, _grams(stored.to(values.dtype), c)


def _carried(grams: Gramians, vectors: Tensor, share: Tensor, taken: Tensor) -> Gramians:
    """`S G S` and by how much it is off from the Gram matrix of what was stored.

    With `s = Σ d ‖u‖²`, `u` half an eps, `n` rows and `k` vectors, whatever they are: `‖S‖ ≤ 1` for `s ≤ 2`. What was stored is
    `S W + E`: sums of `n` in `Uᵀ W`, of `k + 1` after that, so `‖E‖_F ≤ u ((n + 2k + 10) s + (k + 3) (1 + s)) ‖W‖_F`. And `Y` is
    made of sums of `n`, and the last product of sums of `2k + 1`: `u ((n + 2k + 10) (2s + 2s²) + (2k + 3) (1 + s)²) ‖G‖_F`.
    """
    gram, squares, error = grams
    rows, number = vectors.shape[1:]
    image = gram @ vectors
    moved = image * share[:, None] - taken @ ((vectors.mT @ image) * share[:, None]) / 2
    carried = torch.baddbmm(gram, torch.cat([vectors, moved], 2), torch.cat([moved, vectors], 2).mT, alpha=-1)
    half = 1.02 * torch.finfo(gram.dtype).eps / 2
    s = (1.001 * vectors.double().square().sum(1) * share).sum(1)
    long, short = rows + 2 * number + 10, number + 3
    stored = half * (long * s + short * (1 + s)) * squares.sqrt()
    size = frobenius_bounds(gram)  # a sum of all squares at once in float32 lacks a hundredth of millions of equal ones
    error = error + half * (long * (2 * s + 2 * s * s) + 2 * short * (1 + s) ** 2) * size
    # of the squares of norms of at most 1
    return Gramians(carried, squares, torch.where(s <= 2, error + 2 * stored, inf))
