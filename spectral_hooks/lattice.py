"""The certified norm of the lattice operator: `S = sup_θ ‖F(θ)‖₂` by branch and bound over the frequencies.

By M. Riesz's lemma on the trigonometric polynomial `‖F(θ) v‖²`, of degree `k - 1` and between 0 and `S²`, the angle
`φ(θ) = arccos(‖F(θ)‖ / S)` obeys `|φ(θ) - φ(θ')| ≤ Σ_i (k_i - 1) |θ_i - θ'_i| / 2`. So a cell of frequencies whose points are at
most `a` from its centre, in that metric, holds the supremum only if `‖F(centre)‖ ≥ S cos(a)`: when `‖F(centre)‖ < U cos(a)` for
the centres of cells that cover the torus, `S ≤ U`. Cells that pass are dropped, the others split, until none is left for
`U = (1 + rtol) L`, with `L` the largest norm seen.

The metric is a sum over the axes, and its balls in two dimensions are diamonds. They tile the plane, and take half as many
evaluations as squares: centres form a checkerboard, and a diamond splits into four.

All in float64, which holds every weight exactly. `‖F(centre)‖ < τ` is proven by a Cholesky factor of `τ² I - F F*`; its rounding,
at most `n (n + 1) eps` relative (Rump 2006), is added to the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import acos, ceil, cos, floor, inf, log2, pi, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from .operators.symbols import Gram, half_plane, product, trim

#: Bytes of Gram matrices held at once: few enough to stay in a cache.
_CHUNK_BYTES = 1 << 24
#: Up to this size an eigenvalue solver is as fast as a test by Cholesky.
_SMALL = 24
#: Evaluations, times the matrix size, spent on proving a norm below a target that is closer than `rtol`.
_CLOSE_CALL_BUDGET = 1 << 15
#: Frequencies looked at for a good start.
_SAMPLE = 64
#: The angle of the cells that judge many points of a fine grid at once.
_COARSE = 0.2
#: Cells per level whose norm is found more closely.
_LEADERS = 4
#: The largest angle of a first cell.
_WIDEST = 0.8
#: Restarts of 24 Krylov steps before an eigenvalue solver takes over.
_MOST_RESTARTS = 8
#: Keeps the direction of a zero vector from being NaN.
_TINY = torch.finfo(torch.float32).tiny
#: No cell is halved more often: the angle is then below the rounding.
_MOST_LEVELS = 40


class LatticeNorm(NamedTuple):
    """`value ≤ S ≤ upper`; `value` is the norm of the symbol of `group` at the frequency `theta`."""

    upper: float
    value: float
    group: int
    theta: Tensor


class Cells(NamedTuple):
    """Cells of one size: groups, centres, and an approximate top vector for each (of size 0 where none is needed).

    `radius` is their extent along each axis: a diamond in the first two axes, an interval in the third.
    """

    group: Tensor
    centre: Tensor
    vector: Tensor
    radius: Tensor

    def at(self, index: Tensor) -> Cells:
        """The cells with these indices, or under this mask."""
        return Cells(self.group[index], self.centre[index], self.vector[index], self.radius)

    def split(self, keep: Tensor) -> Cells:
        """The cells to keep, each split into `2^d` of half the radius; they inherit its vector."""
        offsets = _split_pattern(self.radius.numel(), self.radius) * self.radius / 2
        centre = (self.centre[keep].unsqueeze(1) + offsets).flatten(0, 1)
        copies = len(offsets)
        return Cells(
            self.group[keep].repeat_interleave(copies),
            centre,
            self.vector[keep].repeat_interleave(copies, dim=0),
            self.radius / 2,
        )


def _split_pattern(dims: int, like: Tensor) -> Tensor:
    """Where the parts of a cell of radius 2 have their centres, `(2^d, d)`."""
    ends = like.new_tensor([[-1.0], [1.0]])
    if dims == 1:
        return ends
    diamond = like.new_tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    if dims == 2:
        return diamond
    return torch.cat([diamond.repeat_interleave(2, dim=0), ends.repeat(4, 1)], dim=1)


class Peak(NamedTuple):
    """The largest norm seen so far, and where."""

    value: float
    group: int
    theta: Tensor

    def or_at(self, squared: float, cells: Cells, index: int) -> Peak:
        """This, or that of a cell if it is larger."""
        if squared <= self.value**2:
            return self
        return Peak(sqrt(squared), int(cells.group[index]), cells.centre[index])


def lattice_norm(kernel: Tensor, rtol: float = 1e-3, target: float | None = None) -> LatticeNorm:
    """Bracket the supremum of the symbol's norm: `upper ≤ value (1 + rtol)`.

    Args:
        kernel: canonical kernel `(groups, rows, columns, *taps)`.
        rtol: relative width of the bracket.
        target: only find out on which side of it the supremum lies: `upper` is `target` if it is proven not to lie above, and
            infinite if it does or, within limits, no proof was found.

    Raises:
        ValueError: the kernel holds NaN or infinity.
    """
    kernel, scale = normalized(kernel.detach())
    taps = kernel.ndim - 3
    kernel, axes = trim(kernel)
    gram = Gram(kernel)
    degree = torch.tensor(kernel.shape[3:]).to(kernel) - 1
    if degree.numel() == 0:
        found = _largest_of(gram, degree[None])
    else:
        found = _search(gram, degree, rtol, None if target is None else target / scale)
    theta = kernel.new_zeros(taps)
    theta[axes] = found.theta
    return LatticeNorm(found.upper * scale, found.value * scale, found.group, theta)


def grid_norm(kernel: Tensor, sizes: tuple[int, ...], *, screen: torch.dtype = torch.float64) -> LatticeNorm:
    """The largest norm of the symbol over the full frequency grid of `sizes`: exact for a circular convolution.

    Args:
        kernel: canonical kernel `(groups, rows, columns, *taps)`.
        sizes: frequencies per axis.
        screen: in float32 the winner is found twice as fast, and can be one whose norm is 1e-6 short; `upper` is no proof then.

    Raises:
        ValueError: the kernel holds NaN or infinity.
    """
    kernel, scale = normalized(kernel.detach())
    theta, _ = half_plane(sizes, kernel)
    gram = Gram(kernel)
    degree = torch.tensor(kernel.shape[3:]).to(kernel) - 1
    if screen == torch.float32:
        single = gram.single()
        theta = _largest_of(single, _promising(single, degree, theta)).theta[None]
    else:
        theta = _promising(gram, degree, theta)
    found = _largest_of(gram, theta)
    return found._replace(upper=found.upper * scale, value=found.value * scale)


def normalized(kernel: Tensor) -> tuple[Tensor, float]:
    """The kernel in float64 with its largest entry in [1, 2), and the power of two that was divided out."""
    if kernel.is_meta:
        raise ValueError("`weight` is on the meta device and has no values: materialize the model first.")
    # Apple's GPUs have no float64
    kernel = kernel.to("cpu" if kernel.device.type == "mps" else kernel.device, torch.float64)
    largest = float(kernel.abs().amax())
    if not largest < float("inf"):
        raise ValueError("`weight` contains NaN or infinity: look at the training step before; the weight is left as it is.")
    scale = 2.0 ** floor(log2(largest)) if largest else 1.0
    return kernel / scale, scale


def _search(gram: Gram, degree: Tensor, rtol: float, goal: float | None) -> LatticeNorm:
    """Branch and bound."""
    # the last level is then as wide as it may be
    finest = acos(1 / (1 + rtol))
    cells = _tiling(gram, degree, finest * 2 ** max(floor(log2(_WIDEST / finest)), 0))
    best = Peak(0.0, 0, cells.centre[0])
    evaluations = 0
    for _ in range(_MOST_LEVELS):
        evaluations += len(cells.group)
        close_call = goal is not None and goal < best.value * (1 + rtol)
        if close_call and evaluations * gram.size > _CLOSE_CALL_BUDGET:
            return LatticeNorm(inf, *best)
        cosine = cos(min(_angle(degree, cells.radius), pi / 2))
        keep, lowers, vectors = [], [], []
        for part in _chunks(gram, cells):
            matrices = gram(part.group, part.centre)
            lower, vector = _estimates(matrices, part.vector)
            top = int(lower.argmax())
            best = best.or_at(float(lower[top]), part, top)
            if goal is not None and best.value > goal:
                return LatticeNorm(inf, *best)
            bound = best.value * (1 + rtol) if goal is None else goal
            keep.append(~_below(matrices, lower, (bound * cosine) ** 2 / (1 + _rounding(gram.size))))
            lowers.append(lower)
            vectors.append(vector)
        kept = torch.cat(keep)
        if not kept.any():
            break
        cells = cells._replace(vector=torch.cat(vectors))
        # the closer the best to the supremum, the more cells go; near-ties defeat a few Krylov steps
        best = _leader(gram, cells.at(torch.cat(lowers).topk(min(_LEADERS, len(kept))).indices), best)
        cells = cells.split(kept)
    else:
        raise RuntimeError("the branch and bound did not end; please report this weight.")
    found = _largest_of(gram, best.theta[None])
    return found._replace(upper=max(found.value, best.value) * (1 + rtol) if goal is None else goal)


def _largest_of(gram: Gram, theta: Tensor) -> LatticeNorm:
    """The largest norm at these frequencies: `upper` exceeds it by rounding only."""
    cells = _at(gram, theta, theta.new_zeros(theta.shape[1]))
    best = _leader(gram, cells.at(torch.arange(0, len(cells.group), len(cells.group) // _SAMPLE + 1)))
    ties = 1 + (max(_rounding(gram.size), 1e-10) if gram.lags.dtype == torch.float64 else 1e-6)
    for part in _chunks(gram, cells):
        matrices = gram(part.group, part.centre)
        # most are proven at once not to exceed a good start; of the others, one after the other becomes exact
        rest = ~_below(matrices, None, best.value**2 * ties)
        part, matrices = part.at(rest), matrices[rest]
        lower, vector = _estimates(matrices, part.vector)
        left = torch.arange(len(lower), device=lower.device)
        while len(left):
            top = int(left[lower[left].argmax()])
            value, _ = _exact(matrices[top], vector[top], lower[top])
            best = best.or_at(float(value), part, top)
            left = left[~_below(matrices[left], lower[left], best.value**2 * ties)]
            if top in left.tolist():
                # Krylov steps can settle on a vector that is not the top one; an eigenvalue solver cannot
                best = best.or_at(float(_squared_norms(matrices[top])), part, top)
                left = left[left != top]
    return LatticeNorm(best.value * sqrt(ties) * (1 + _rounding(gram.size)), *best)


def _leader(gram: Gram, cells: Cells, best: Peak | None = None) -> Peak:
    """The largest norm among these cells' centres and `best`, quickly: a few Krylov steps more at the most promising ones."""
    best = best or Peak(0.0, 0, cells.centre[0])
    matrices = gram(cells.group, cells.centre)
    lower, vector = _estimates(matrices, cells.vector)
    leaders = lower.topk(min(_LEADERS, len(lower))).indices
    if gram.size > _SMALL:
        lower[leaders], _ = _krylov(matrices[leaders], vector[leaders], steps=12)
    top = int(leaders[lower[leaders].argmax()])
    return best.or_at(float(lower[top]), cells, top)


def _promising(gram: Gram, degree: Tensor, theta: Tensor) -> Tensor:
    """The frequencies of a fine grid at which its largest norm can be, judged by cells of the torus that hold many of them."""
    if gram.groups > 1 or gram.size <= _SMALL or not degree.numel() or bool((degree == 0).any()):
        return theta
    cells = _tiling(gram, degree, _COARSE)
    if 2 * len(cells.group) > len(theta):
        return theta
    angle = _angle(degree, cells.radius)
    best = _leader(gram, _at(gram, theta[:: len(theta) // _SAMPLE + 1], cells.radius))
    parts = [_below(gram(p.group, p.centre), None, (best.value * cos(angle)) ** 2) for p in _chunks(gram, cells)]
    centres = cells.centre[~torch.cat(parts)]
    apart = (theta.unsqueeze(1) - centres).remainder(2 * pi)
    distance = torch.minimum(apart, 2 * pi - apart) @ (degree / 2)
    return theta[(distance <= angle * (1 + 1e-9)).any(1)]


def _tiling(gram: Gram, degree: Tensor, angle: float) -> Cells:
    """Cells that cover half of the torus (the symbol at `-θ` is the conjugate), their points at most `angle` from the centres."""
    share = {1: [1.0], 2: [1.0, 1.0], 3: [2 / 3, 2 / 3, 1 / 3]}[degree.numel()]
    counts, radius = [], []
    for axis, (k, part) in enumerate(zip(degree.tolist(), share, strict=True)):
        diamond = degree.numel() > 1 and axis < 2
        spacings = 2 if diamond else 1  # a diamond reaches to its neighbours' centres, an interval half as far
        count = ceil(pi * k * spacings / (2 * part * angle))
        counts.append(count + count % spacings)
        radius.append(pi * spacings / counts[-1])
    steps = product([torch.arange(n // 2 + 1 if axis == 0 else n) for axis, n in enumerate(counts)], degree)
    if degree.numel() > 1:
        steps = steps[(steps[:, 0] + steps[:, 1]) % 2 == 0]
    return _at(gram, steps * (2 * pi / degree.new_tensor(counts)), degree.new_tensor(radius))


def _at(gram: Gram, centre: Tensor, radius: Tensor) -> Cells:
    """Cells at these centres for every group."""
    groups = torch.arange(gram.groups, device=centre.device).repeat_interleave(len(centre))
    vector = torch.empty(len(groups), 0, device=centre.device)
    return Cells(groups, centre.repeat(gram.groups, 1), vector, radius)


def _angle(degree: Tensor, radius: Tensor) -> float:
    """The largest distance of a cell's points from its centre."""
    reach = (degree * radius / 2).tolist()
    return max(reach[:2]) + sum(reach[2:])


def _chunks(gram: Gram, cells: Cells) -> Iterator[Cells]:
    count = max(_CHUNK_BYTES // (16 * gram.size**2), 1)
    parts = zip(cells.group.split(count), cells.centre.split(count), cells.vector.split(count), strict=True)
    return (Cells(*part, cells.radius) for part in parts)


def _estimates(matrices: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues, exact if small, else from below by a few Krylov steps; and the vectors that attain them."""
    if matrices.shape[-1] <= _SMALL:
        return _squared_norms(matrices), vector
    if vector.shape[1] == 0:
        start = matrices.diagonal(dim1=-2, dim2=-1).real.argmax(-1)
        return _krylov(matrices, matrices.take_along_dim(start[:, None, None], dim=-1).squeeze(-1), steps=4)
    return _krylov(matrices, vector, steps=2)


def _exact(matrix: Tensor, vector: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue of one matrix, to rounding, from an approximate vector and its value."""
    if matrix.shape[-1] <= _SMALL:
        return lower, vector
    matrix, vector = matrix[None], vector[None]
    for _ in range(_MOST_RESTARTS):
        value, vector = _krylov(matrix, vector, steps=24)
        residual = (matrix @ vector.unsqueeze(-1)).squeeze(-1) - value.unsqueeze(-1) * vector
        # the error of the value is the square of this, over the gap
        if float(torch.linalg.vector_norm(residual)) <= max(1e-8, 30 * torch.finfo(lower.dtype).eps) * float(value):
            return value[0], vector[0]
    return _squared_norms(matrix)[0], vector[0]


def _krylov(matrices: Tensor, vector: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Lanczos from a vector for every Hermitian matrix: the largest Ritz values, from below, and their unit vectors."""
    basis = _unit(vector).unsqueeze(-1)
    images = matrices @ basis
    for _ in range(steps):
        fresh = images[..., -1:]
        for _ in range(2):
            fresh = fresh - basis @ (basis.mH @ fresh)
        fresh = _unit(fresh.squeeze(-1)).unsqueeze(-1)
        basis = torch.cat([basis, fresh], -1)
        images = torch.cat([images, matrices @ fresh], -1)
    ritz = torch.linalg.eigh(basis.mH @ images).eigenvectors[..., -1:]
    # a start that is an eigenvector leaves a basis that is not orthonormal: the quotient holds all the same
    length = torch.linalg.vector_norm(basis @ ritz, dim=-2, keepdim=True).clamp(min=_TINY)
    vector, image = (basis @ ritz / length).squeeze(-1), (images @ ritz / length).squeeze(-1)
    return (vector.conj() * image).sum(-1).real, vector


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True).clamp(min=_TINY)


def _squared_norms(matrices: Tensor) -> Tensor:
    if matrices.shape[-1] == 1:
        return matrices[..., 0, 0].real
    return torch.linalg.eigvalsh(matrices)[..., -1]


def _below(matrices: Tensor, lower: Tensor | None, level: float) -> Tensor:
    """Which of the matrices are proven to have no eigenvalue above `level`; lower estimates save the hopeless tests."""
    size = matrices.shape[-1]
    if size <= _SMALL:  # the estimates are exact
        return (_squared_norms(matrices) if lower is None else lower) < level
    below = torch.ones(len(matrices), dtype=torch.bool, device=matrices.device) if lower is None else lower < level
    if below.any():
        shifted = -(matrices if bool(below.all()) else matrices[below])
        shifted.diagonal(dim1=-2, dim2=-1).add_(level)
        below[below.clone()] = torch.linalg.cholesky_ex(shifted).info == 0
    return below


def _rounding(size: int) -> float:
    return 4 * size * (size + 1) * torch.finfo(torch.float64).eps
