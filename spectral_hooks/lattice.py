"""The certified norm of the lattice operator: `S = sup_θ ‖F(θ)‖₂` by branch and bound over the frequencies.

Two facts, both from M. Riesz's lemma on the trigonometric polynomial `‖F(θ) v‖²` of degree `k - 1`, `0 ≤ · ≤ S²`:

- **cells.** `φ(θ) = arccos(‖F(θ)‖ / S)` obeys `|φ(θ) - φ(θ')| ≤ Σ_i (k_i - 1) |θ_i - θ'_i| / 2`. So the cell that holds the
  supremum has `‖F(centre)‖ ≥ S cos(a)`, with `a = Σ_i (k_i - 1) w_i / 4` for cells of widths `w`: all others go.
- **grid.** `S ≤ max_grid ‖F‖ · Π_i 1 / cos((k_i - 1) w_i / 4)` for a full grid of spacings `w` (tighter than the sum of the
  angles, but about the whole grid). Cells are dropped with so much slack that the largest value on the *finest* full
  grid is always among those kept: the result is that of the full grid, whatever path the search took.

All in float64, which holds every weight exactly; the rounding of a Cholesky test (Rump 2006), at most `4 n² eps`, is added.
"""

from __future__ import annotations

from math import acos, ceil, cos, floor, inf, log2, pi, prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from .operators.symbols import Gram, half_plane, product, trim

#: Bytes of Gram matrices held at once.
_CHUNK_BYTES = 1 << 26
#: Up to this size an eigenvalue solver is as fast as a test by Cholesky.
_SMALL = 24
#: Evaluations spent on a weight below the target, but so close that `rtol` does not tell.
_CLOSE_CALL_BUDGET = 4096


class LatticeNorm(NamedTuple):
    """`value ≤ S ≤ upper`; `value` is the norm of the symbol of `group` at `theta`, a frequency of the trimmed kernel."""

    upper: float
    value: float
    group: int
    theta: Tensor


class Peak(NamedTuple):
    """The largest norm seen so far, and where."""

    value: float
    group: int
    theta: Tensor


class Cells(NamedTuple):
    """Boxes of frequencies: the group that each belongs to, its centre, and the widths that all share."""

    group: Tensor
    centre: Tensor
    width: Tensor

    def split(self, keep: Tensor) -> Cells:
        """The halves, along every axis, of the cells to keep."""
        offsets = product([torch.tensor([-0.25, 0.25])] * self.width.numel(), self.width) * self.width
        centre = (self.centre[keep].unsqueeze(1) + offsets).flatten(0, 1)
        return Cells(self.group[keep].repeat_interleave(len(offsets)), centre, self.width / 2)


def lattice_norm(kernel: Tensor, rtol: float = 1e-3, target: float | None = None) -> LatticeNorm:
    """Bracket the supremum of the symbol's norm.

    Args:
        kernel: canonical kernel `(groups, rows, columns, *taps)`.
        rtol: the bracket ends with `upper ≤ S (1 + rtol)`.
        target: stop as soon as `upper ≤ target` or `lower > target` is proven; look closer than `rtol` where that helps.

    Raises:
        ValueError: the kernel holds NaN or infinity.
    """
    kernel, scale = normalized(kernel.detach())
    kernel = trim(kernel)
    goal = None if target is None else target / scale
    found = _search(Gram(kernel), torch.tensor(kernel.shape[3:]).to(kernel) - 1, rtol, goal)
    return found._replace(upper=found.upper * scale, value=found.value * scale)


def grid_norm(kernel: Tensor, sizes: tuple[int, ...]) -> LatticeNorm:
    """The largest norm of the symbol over the full frequency grid of `sizes`: exact for a circular convolution.

    Raises:
        ValueError: the kernel holds NaN or infinity.
    """
    kernel, scale = normalized(kernel.detach())
    gram = Gram(kernel)
    theta, _ = half_plane(sizes, kernel)
    groups = torch.arange(gram.groups, device=theta.device)
    cells = Cells(groups.repeat_interleave(len(theta)), theta.repeat(gram.groups, 1), theta.new_zeros(len(sizes)))
    best, _ = _survey(gram, cells, Peak(0.0, 0, theta[0]), cosine=1.0)
    return LatticeNorm(best.value * scale, best.value * scale, best.group, best.theta)


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
    dims = degree.numel()
    groups = torch.arange(gram.groups, device=degree.device)
    # the symbol is often largest at zero or at the Nyquist frequency, which no centre of a cell meets
    corners = product([torch.tensor([0.0, pi], dtype=torch.float64)] * dims, degree)
    first = Cells(groups.repeat_interleave(len(corners)), corners.repeat(len(groups), 1), degree)
    best, _ = _survey(gram, first, Peak(0.0, 0, corners[0]), cosine=1.0)
    margin = 1 + 4 * gram.size**2 * torch.finfo(degree.dtype).eps
    if dims == 0:
        return LatticeNorm(best.value * margin, *best)

    # widths that halve `levels` times, down to a full grid whose factor is 1 + rtol
    finest_angle = acos((1 + rtol) ** (-1 / dims))
    levels = max(floor(log2(pi / (2 * finest_angle) / 3)), 0)
    counts = [ceil(pi * d / (2 * finest_angle) / 2**levels) for d in degree.tolist()]
    cells = _first_cells(groups, degree.new_tensor(counts))
    finest = cells.width / 2**levels
    slack = acos((1 + rtol) ** -1)

    level = evaluated = 0
    while True:
        angle = float(degree @ cells.width) / 4
        reach = max(float(degree @ (cells.width - finest)) / 4 + slack, angle)
        best, keep = _survey(gram, cells, best, cosine=cos(min(reach, pi / 2)))
        evaluated += len(keep)
        factor = 1 / cos(angle) if angle < pi / 2 else inf
        if level == levels:
            factor = min(factor, prod(1 / cos(a) for a in (degree * cells.width / 4).tolist()))
        upper = best.value * factor * margin
        if goal is not None and (upper <= goal or best.value > goal):
            break
        if level >= levels and (goal is None or level == levels + 10 or evaluated > _CLOSE_CALL_BUDGET):
            break
        cells = cells.split(keep)
        level += 1
    return LatticeNorm(upper, *best)


def _first_cells(groups: Tensor, counts: Tensor) -> Cells:
    """Cells that tile half of the torus (the symbol at `-θ` is the conjugate), for every group."""
    width = 2 * pi / counts
    half = [(n + 1) // 2 if axis == 0 else n for axis, n in enumerate(counts.long().tolist())]
    centres = (product([torch.arange(n) for n in half], counts) + 0.5) * width
    return Cells(groups.repeat_interleave(len(centres)), centres.repeat(len(groups), 1), width)


def _survey(gram: Gram, cells: Cells, best: Peak, cosine: float) -> tuple[Peak, Tensor]:
    """The largest norm over `best` and the centres, and which centres reach `cosine` times that norm."""
    keep = []
    chunk = max(_CHUNK_BYTES // (16 * gram.size**2), 1)
    for group, centre in zip(cells.group.split(chunk), cells.centre.split(chunk), strict=True):
        matrices = gram(group, centre)
        lower = _squared_norms(matrices) if gram.size <= _SMALL else _power(matrices)
        candidates = torch.ones_like(lower, dtype=torch.bool)
        while candidates.any():
            top = int(torch.where(candidates, lower, -1.0).argmax())
            squared = float(_squared_norms(matrices[top : top + 1]))
            if squared > best.value**2:
                best = Peak(sqrt(squared), int(group[top]), centre[top])
            lower[top] = squared
            candidates[top] = False
            candidates &= _may_reach(matrices, lower, best.value**2, candidates)
        threshold = (best.value * cosine) ** 2
        keep.append((lower >= threshold) | _may_reach(matrices, lower, threshold, lower < threshold))
    return best, torch.cat(keep)


def _squared_norms(matrices: Tensor) -> Tensor:
    if matrices.shape[-1] == 1:
        return matrices[..., 0, 0].real.clone()
    return torch.linalg.eigvalsh(matrices)[..., -1]


def _power(matrices: Tensor, steps: int = 4) -> Tensor:
    """Lower estimates of the largest eigenvalues, from the column with the largest diagonal entry."""
    start = matrices.diagonal(dim1=-2, dim2=-1).real.argmax(-1)
    vector = matrices.take_along_dim(start[:, None, None], dim=-1)
    for _ in range(steps):
        vector = matrices @ (vector / torch.linalg.vector_norm(vector, dim=-2, keepdim=True))
    return torch.linalg.vector_norm(vector, dim=(-2, -1))


def _may_reach(matrices: Tensor, lower: Tensor, level: float, asked: Tensor) -> Tensor:
    """Which of the `asked` matrices are not proven below `level`: those for which `level · I - G` has no Cholesky factor."""
    size = matrices.shape[-1]
    if size <= _SMALL:  # `lower` is exact
        return asked & (lower > level)
    result = torch.zeros_like(asked)
    if asked.any():
        shifted = level * torch.eye(size, dtype=matrices.dtype, device=matrices.device) - matrices[asked]
        result[asked] = torch.linalg.cholesky_ex(shifted).info != 0
    return result
