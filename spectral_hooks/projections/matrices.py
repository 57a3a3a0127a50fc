"""Clips of many matrices that live at the bound, each with a proof: one batch a shape, and little that the host waits for.

With `G = W Wᵀ = U diag(σ²) Uᵀ` the nearest matrix of norm `c` is `W - U₊ diag(1 - c / σ₊) U₊ᵀ W` over the `σ₊ > c`. Nothing in it
needs more digits than the weight has. The proof does: it is the Cholesky factor of `c² I - G` for the stored values in float64,
whose rounding is some 1e-10 of the bound at a thousand rows. That is less than what the clip is off by, so it is clipped that
little deeper, and the proof succeeds at the first attempt.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log2
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg.host import read
from ..linalg.precision import at_least_float32, exact, float32_is_kept, full_precision, widest
from ..linalg.symbols import symmetric_product
from ..norms.bracket import TOLERANCE
from ..operators.dense import DenseOperator
from .arguments import check_max_norm, check_share
from .clip import clip

#: A norm this little above the bound counts as inside, for what was not touched: far more than the rounding of a proof.
_TOLERANCE = TOLERANCE / 2
#: An estimate in float32 may be off by this; closer to the bound a proof is tried before anything is cut.
_UNSURE = 1e-5
#: Above this ratio to the bound, squares in float32 have lost the digits of values near the bound.
_FAR = 1.5
#: Bounds beyond these powers of two are not handled in single precision.
_SINGLE_RANGE = 64
#: What a clip is off by, in eps of the precision in which it is computed, and for every root of the rows; and of what rounding to
#: storage adds, a typical share.
_CLIP_ERROR, _CLIP_GROWTH, _STORAGE_ERROR = 4, 0.5, 0.3
#: What a clip in one go may be off by, relative; what is so far outside that it is more is left to the clip that measures.
_MOST_LOST = 1e-3
#: Each attempt leaves this much more room than the last one; after so many the clip that measures is asked.
_WIDEN, _ATTEMPTS = 4, 4
#: Bytes of matrices, in float64, that are handled together.
_BATCH_BYTES = 1 << 27


class Clipped(NamedTuple):
    """Matrices `(n, rows, columns)`, and numbers `(n,)` that their norms are proven not to exceed, in float64 on the host.

    And how many singular values were above the bound, `(n,)`, as far as they were looked at.
    """

    weights: Tensor
    norms: Tensor
    above: Tensor | None = None


class _Job(NamedTuple):
    """Some matrices of a batch, with no more rows than columns: `unit` and `level` make their bound, `level` lies in [1, 2)."""

    batch: int
    members: Tensor
    weights: Tensor
    unit: Tensor
    level: Tensor
    depth: Tensor
    precise: bool
    attempt: int = 0

    def some(self, which: list[int], *, precise: bool, attempt: int) -> _Job:
        """The same for some of these."""
        host, index = torch.tensor(which), torch.tensor(which, device=self.weights.device)
        weights = self.weights.index_select(0, index)
        return _Job(
            self.batch, self.members[host], weights, self.unit[host], self.level[host], self.depth[host], precise, attempt
        )

    def values(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """These weights over the unit: a power of two, so nothing is rounded."""
        values = exact(weights) if dtype == torch.float64 else weights.to(dtype)
        return values / self.unit.to(values)[:, None, None]


class _Spectrum(NamedTuple):
    """The values of a job over its unit, their singular values, ascending, left vectors, what a clip goes to, and the bound."""

    values: Tensor
    sigma: Tensor
    vectors: Tensor
    target: Tensor
    bound: Tensor

    def above(self, level: Tensor) -> Tensor:
        """How many singular values are above a level."""
        return (self.sigma > level[:, None]).sum(1).to(level)


@full_precision
@torch.no_grad()
def clip_matrices(
    batches: Sequence[Tensor], max_norm: float | Sequence[Tensor], *, depth: float | Sequence[Tensor] = 0.0
) -> list[Clipped]:
    """Each matrix itself if its norm is at most `max_norm`, else the nearest of norm `(1 - depth) max_norm`; with proofs.

    `W - U₊ diag(1 - c / σ₊) U₊ᵀ W` by `W Wᵀ = U diag(σ²) Uᵀ`, over the singular values above `c = (1 - depth) max_norm`.

    Args:
        batches: matrices `(n, rows, columns)`, one batch a shape. They are not changed.
        max_norm: the bound, or for each batch those of its matrices, `(n,)`.
        depth: how far below the bound a matrix that is outside is clipped, in [0, 1); or for each batch those of its matrices.

    Returns:
        For each batch the weights, in their dtype, and what the norms of these stored values are proven not to exceed: at most
        `max_norm`, and `max_norm (1 + 5e-7)` for what was inside by that little and stays. What is inside stays bit for bit; what
        is not is the nearest up to rounding.

    Cost: a Gram matrix, an `eigh` and two products in the precision of the weights, a Gram matrix and a Cholesky factor in
        float64. The host reads twice for all batches, and again for what has more than 1.5 times the bound or fails a proof.

    Raises:
        ValueError: an argument out of range, or NaN or infinity in a matrix.

    Example:
        >>> import torch
        >>> from spectral_hooks.projections.matrices import clip_matrices
        >>> [clipped] = clip_matrices([torch.diag(torch.tensor([3.0, 0.5]))[None]], 1.0)
        >>> clipped.weights, bool(clipped.norms <= 1)
        (tensor([[[1.0000, 0.0000],
                 [0.0000, 0.5000]]]), True)
    """
    weights = [batch.detach().clone() for batch in batches]
    bounds = bounds_of(batches, max_norm)
    norms, outside = ([bound.new_zeros(len(bound)) for bound in bounds] for _ in range(2))
    depths = _depths(batches, depth)
    jobs = [job for i, batch in enumerate(batches) if batch.numel() for job in _jobs(i, batch.detach(), bounds[i], depths[i])]
    while jobs:
        jobs, done = _attempt(jobs)
        for job, stored, which, proven, above in done:
            _put(weights[job.batch], job.members[which], stored, which)
            index = torch.tensor(which, dtype=torch.long)
            at = job.members.index_select(0, index)
            norms[job.batch].index_copy_(0, at, (proven * job.unit).index_select(0, index))
            outside[job.batch].index_copy_(0, at, above.index_select(0, index))
        jobs, given_up = [x for x in jobs if x.attempt < _ATTEMPTS], [x for x in jobs if x.attempt >= _ATTEMPTS]
        for batch, i in ((job.batch, i) for job in given_up for i in job.members.tolist()):
            norms[batch][i] = _measure_(weights[batch][i], float(bounds[batch][i]))
    return [Clipped(*each) for each in zip(weights, norms, outside, strict=True)]


def bounds_of(batches: Sequence[Tensor], max_norm: float | Sequence[Tensor]) -> list[Tensor]:
    """The bounds of all matrices, `(n,)` for each batch, in float64 on the host."""
    if not isinstance(max_norm, Sequence):
        c = check_max_norm(max_norm)
        return [torch.full((len(batch),), c, dtype=torch.float64) for batch in batches]
    shapes = [tuple(bound.shape) for bound in max_norm]
    if shapes != [(len(batch),) for batch in batches]:
        raise ValueError(f"`max_norm` must be a number or have one for each matrix of each batch; got tensors of shape {shapes}.")
    bounds = [bound.detach().to("cpu", torch.float64) for bound in max_norm]
    for bound in bounds:
        if not bool(((bound > 0) & (bound < torch.inf)).all()):
            raise ValueError(f"`max_norm` must hold positive, finite numbers; got {bound.tolist()}.")
    return bounds


def _measure_(weight: Tensor, bound: float) -> float:
    """Clip one matrix by `clip`, which measures what it has done until that is inside, and what its norm does not exceed."""
    measured = clip(DenseOperator(weight), bound)
    same = torch.equal(measured, weight)
    weight.copy_(measured)
    return bound * (1 + TOLERANCE) if same else bound


def _depths(batches: Sequence[Tensor], depth: float | Sequence[Tensor]) -> list[Tensor]:
    """The depths of all matrices, `(n,)` for each batch, in float64 on the host."""
    if not isinstance(depth, Sequence):
        check_share("depth", depth)
        return [torch.full((len(batch),), float(depth), dtype=torch.float64) for batch in batches]
    depths = [each.detach().to("cpu", torch.float64) for each in depth]
    for each in depths:
        if not bool(((each >= 0) & (each < 1)).all()):
            raise ValueError(f"`depth` must lie in [0, 1); got {each.tolist()}.")
    return depths


def _jobs(index: int, batch: Tensor, bounds: Tensor, depths: Tensor) -> list[_Job]:
    """The matrices of a batch, not many bytes at once."""
    wide = batch if batch.shape[1] <= batch.shape[2] else batch.mT
    powers = [floor(log2(c)) for c in bounds.tolist()]
    unit = torch.tensor([2.0**power for power in powers], dtype=torch.float64)
    single = at_least_float32(batch.dtype) == torch.float32 and float32_is_kept() and max(map(abs, powers)) <= _SINGLE_RANGE
    # a device without float64 has the proofs done on the host, where half of the work is not worth a copy
    precise = not single or widest(batch.device) != torch.float64
    some = max(_BATCH_BYTES // (8 * batch[0].numel()), 1)
    places = torch.arange(len(batch)).split(some)
    parts = zip(places, wide.split(some), unit.split(some), (bounds / unit).split(some), depths.split(some), strict=True)
    return [_Job(index, *part, precise) for part in parts]


def _attempt(jobs: list[_Job]) -> tuple[list[_Job], list[tuple[_Job, Tensor, list[int], Tensor, Tensor]]]:
    """Clip what is outside and prove it all: what is left to do, and of each job its weights, which are proven, by what, and how
    many singular values were above the bound."""
    left: list[_Job] = []
    spectra = [_spectrum(job) for job in jobs]
    tops = read([torch.stack([exact(s.sigma[:, -1]), s.above(s.target), s.above(s.bound)]) for s in spectra])
    tried: list[tuple[_Job, Tensor, Tensor, Tensor, Tensor]] = []
    for job, spectrum, (top, count, above) in zip(jobs, spectra, tops, strict=True):
        sure = torch.tensor(-_UNSURE if job.attempt else _UNSURE, dtype=torch.float64)
        cut = top > job.level * (1 + sure)
        near = job.precise | (top <= _FAR * job.level)
        far = (~near).nonzero().flatten().tolist()
        if far:
            left.append(job.some(far, precise=True, attempt=job.attempt))
            cut &= near
        stored = _cut(job, spectrum, cut, count.int().tolist()) if cut.any() else job.weights
        # what is seen to be far inside is proven to be so, which gives it room to move
        kept = job.level * (1 + _TOLERANCE)
        kept = kept if job.attempt else torch.minimum(kept, (1.001 * top).clamp(min=1e-3))
        claim = torch.where(cut, job.level * (1 - job.depth), kept)
        tried.append((job, stored, claim.where(near, torch.zeros(())), near, above))
    verdicts = read([_proven(job, stored, claim) for job, stored, claim, _, _ in tried])
    done: list[tuple[_Job, Tensor, list[int], Tensor, Tensor]] = []
    for (job, stored, claim, near, above), verdict in zip(tried, verdicts, strict=True):
        proven = verdict > 0
        done.append((job, stored, proven.nonzero().flatten().tolist(), claim, above))
        failed = (near & ~proven).nonzero().flatten().tolist()
        if failed:
            left.append(job.some(failed, precise=job.precise, attempt=job.attempt + 1))
    return left, done


def _spectrum(job: _Job) -> _Spectrum:
    """Singular values and left vectors, by the Gram matrix; what is not finite has infinity as its largest value."""
    dtype = torch.float64 if job.precise else torch.float32
    values = job.values(job.weights, dtype)
    gram = symmetric_product(values)
    squares = gram.diagonal(dim1=-2, dim2=-1).sum(-1)  # ‖W‖_F²: NaN and infinity end up here
    finite = torch.isfinite(squares)
    squared, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], gram, 0.0))
    sigma = squared.clamp(min=0).sqrt()
    sigma[:, -1].masked_fill_(~finite, torch.inf)
    bound = job.level.to(values.device)
    level = bound * (1 - job.depth).to(values.device)
    top = exact(sigma[:, -1])
    # an eigenvalue is off by some eps of the largest one, so those at the level by more where that is far above
    own = _CLIP_ERROR + _CLIP_GROWTH * values.shape[1] ** 0.5
    lost = torch.finfo(dtype).eps * (own + 2 * (top / level).square())
    gap = _gap(job, level, exact(squares), lost.clamp(max=_MOST_LOST))
    return _Spectrum(values, sigma, vectors, level * (1 - gap.clamp(max=0.9)), bound)


def _gap(job: _Job, level: Tensor, squares: Tensor, lost: Tensor) -> Tensor:
    """How much deeper to clip, relative to the level, so that the proof of the stored values has room for its and their rounding.

    Rounding every entry by `e` adds about `e (√rows + √columns)` to the norm. Proofs tell whether that was enough.
    """
    rows, columns = job.weights.shape[1:]
    stored, spacing = torch.finfo(job.weights.dtype), torch.finfo(job.weights.dtype).smallest_normal
    squares = torch.minimum(squares, rows * level.square())
    entry = (squares / (rows * columns)).sqrt() * stored.eps + spacing * stored.eps / job.unit.to(level.device)
    rounding = lost + _STORAGE_ERROR * entry * (rows**0.5 + columns**0.5) / level
    return rounding * _WIDEN**job.attempt + _proof_rounding(rows, columns, level.square(), squares) / level.square()


def _cut(job: _Job, spectrum: _Spectrum, cut: Tensor, above: list[int]) -> Tensor:
    """The stored weights with the largest values, as many as are `above`, clipped at the target, where `cut` says so."""
    values, sigma, vectors, target, _ = spectrum
    rows = values.shape[1]
    over = torch.where(sigma > target[:, None], 1 - target[:, None] / sigma, 0.0).to(values)
    taken = vectors * over[:, None]
    clipped = values.clone()
    each = zip(clipped.unbind(), taken.unbind(), vectors.mT.unbind(), values.unbind(), cut.tolist(), above, strict=True)
    # one after the other: how one is rounded must not depend on how many values of others are above
    for result, u, ut, value, is_cut, number in each:
        if is_cut and 2 * number <= rows:
            result.addmm_(u[:, rows - number :], ut[rows - number :] @ value, alpha=-1)
        elif is_cut:
            result.addmm_(u @ ut, value, alpha=-1)
    largest = torch.finfo(job.weights.dtype).max
    clipped *= job.unit.to(values)[:, None, None]
    stored = clipped.clamp_(-largest, largest).to(job.weights)
    return stored if cut.all() else torch.where(cut.to(stored.device)[:, None, None], stored, job.weights)


def _proven(job: _Job, stored: Tensor, claim: Tensor) -> Tensor:
    """Whether the stored values are proven to have norms of at most `claim` units: 1 or 0.

    A Cholesky factor of `A = (claim² - s) I - G` that exists proves `A + ΔA ⪰ 0`, with `s` for the rounding.
    """
    values = job.values(stored, torch.float64)
    gram = symmetric_product(values)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    squared = claim.to(gram.device).square()
    rows, columns = values.shape[1:]
    room = squared - _proof_rounding(rows, columns, squared, diagonal.sum(-1))
    gram.neg_()
    diagonal += room[:, None]
    _, failed = torch.linalg.cholesky_ex(gram)
    return ((failed == 0) & (room > 0)).double()


def _proof_rounding(rows: int, columns: int, squared: Tensor, squares: Tensor) -> Tensor:
    """What rounding in float64 can add to the largest eigenvalue of `G = W Wᵀ`, as the proof sees it.

    `|ΔG| ≤ γ_columns |W| |W|ᵀ`, so `‖ΔG‖ ≤ γ_columns ‖W‖_F²`, in any order of the sums; and the factor of `A` is that of `A + ΔA`
    with `‖ΔA‖ ≤ γ_{rows + 1} tr A`, `tr A ≤ rows · claim²` (Demmel 1989; Rump 2006); four times that, as blocks may be inverted.
    """
    u = torch.finfo(torch.float64).eps / 2
    return 1.01 * u * ((columns + rows + 4) * squares + (4 * (rows + 2) * rows + 8) * squared)


def _put(weights: Tensor, members: Tensor, stored: Tensor, which: list[int]) -> None:
    """Write some of the stored matrices, which are those or their transposes, to their places in a batch."""
    stored = stored if stored.shape[1:] == weights.shape[1:] else stored.mT
    if len(which) == len(stored) == len(weights):
        weights.copy_(stored)
    elif which:
        index = members.to(weights.device)
        weights.index_copy_(0, index, stored.index_select(0, torch.tensor(which, device=weights.device)))
