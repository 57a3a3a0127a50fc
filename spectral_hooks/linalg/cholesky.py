"""Proofs that no eigenvalue of Hermitian positive semidefinite matrices exceeds a level."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

#: How far `‖|R|‖²` may grow over the level in a proof that does not ask the host, for every row: a quarter was seen where half of
#: the singular values are at 0.98 of it, and less for others.
_GROWTH = 0.3
#: Rows of a block of the Cholesky factorization, of small and of large matrices: few, so that its rounding is small.
_PANEL, _WIDE_PANEL = 32, 64
#: Up to this size narrow blocks are faster.
_NARROW = 128


class Verdict(NamedTuple):
    """Which matrices are proven; for which only rounding prevents the proof; how far `‖|R|‖²` grew, relative to the level."""

    proven: Tensor
    doubtful: Tensor
    growth: float


class Rows(NamedTuple):
    """Hermitian positive semidefinite matrices that need never be there as a whole.

    `block(start, end)` makes the rows of every matrix from the diagonal block on to the right, `G[:, start:end, start:]`, in
    memory that may be overwritten; `first()` is the first matrix.
    """

    number: int
    size: int
    dtype: torch.dtype
    block: Callable[[int, int], Tensor]
    first: Callable[[], Tensor]

    @classmethod
    def of(cls, matrices: Tensor) -> Rows:
        """The rows of matrices that are there."""
        number, size, _ = matrices.shape
        return cls(number, size, matrices.dtype, lambda start, end: matrices[:, start:end, start:].clone(), lambda: matrices[0])


def below(rows: Rows, level: float, *, error: float, slack: float, growth: float = 0.0) -> Verdict:
    """Which matrices are proven to have no eigenvalue above `level`.

    A Cholesky factor `R` of `A = (level - s) I - G` that exists proves `A + ΔA ⪰ 0` for the rounding
    `|ΔA| ≤ γ |R|* |R| + δ level I` (Demmel 1989; Rump 2006), and `‖|R|‖ ≤ max R_jj + ‖off-diagonal R‖_F` tells whether `s` paid
    for that. The blocks of a column are summed before the level is added: before that, a sum on the diagonal can be as large as
    the level, and each rounds by that much, whence `δ`; elsewhere a sum is, but for its sign, the products still to come.

    Args:
        rows: those of the matrices.
        level: the largest eigenvalue to be proven.
        error: by how much each matrix may be off in norm.
        slack: the most that rounding may take, `s ≤ slack`; eigenvalues closer to the level are not proven below.
        growth: that of matrices like these, to choose `s`; 0 to guess.
    """
    if not level > 0:  # no factor can show that a matrix is zero
        none = torch.zeros(rows.number, dtype=torch.bool, device=rows.first().device)
        return Verdict(none, none, 1.0)
    if rows.size == 1:
        proven = rows.block(0, 1)[:, 0, 0].real < level * (1 - 4 * torch.finfo(rows.dtype).eps) - error
        return Verdict(proven, torch.zeros_like(proven), 1.0)
    rounding = _rounding(rows.size, rows.dtype)
    error += _shifting(rows.size, rows.dtype) * level
    # `‖|R|‖² ≤ ‖R‖_F² = tr A ≤ size · level`, if there is room for that
    if 8 * (rounding * rows.size * level + error) < slack:
        growth = float(rows.size)
    growth = (growth or _guess(rows.first(), level)) * level
    s = min(slack, 1.3 * rounding * growth + 1.01 * error)
    positive, grown = _factorize(rows, level - s, rounding)
    enough = rounding * grown + error < s
    growth = float(grown[positive].amax()) if positive.any() else growth
    return Verdict(positive & enough, positive & ~enough, growth / level)


def below_(matrices: Tensor, level: float, *, error: float, slack: float, growth: float = 0.0) -> Verdict:
    """`below` of matrices that are there, `(n, size, size)`; they may be overwritten."""
    return below(Rows.of(matrices), level, error=error, slack=slack, growth=growth)


def within_one(matrices: Tensor, error: Tensor) -> Tensor:
    """Which matrices `(n, size, size)` are proven to have no eigenvalue above 1, `(n,)`: as `below`, and the host never waits.

    Args:
        matrices: Hermitian positive semidefinite.
        error: by how much each may be off in norm, `(n,)`, in float64; one that is not finite is not proven.
    """
    size, dtype = matrices.shape[-1], matrices.dtype
    rounding, shifting = _rounding(size, dtype), _shifting(size, dtype)
    room = 1.3 * rounding * max(_GROWTH * size, 4.0) + 1.01 * (error + shifting)
    positive, grown = _factorize(Rows.of(matrices), (1 - room).to(dtype), rounding)
    return positive & (rounding * grown + error + shifting < room)


def _panel(size: int) -> int:
    """Rows of a block."""
    return _PANEL if size <= _NARROW else _WIDE_PANEL


def _rounding(size: int, dtype: torch.dtype) -> float:
    """`γ` of the factorization.

    Each part of an entry is a sum of up to two real products for every row of a panel, and of a partial sum for every panel
    above; some more for the division. `γ |a| |b|` in the real and in the imaginary part is `√2 γ |a| |b|` in all.
    """
    panel = _panel(size)
    return 1.5 * (min(size, panel) + ceil(size / panel) / 2 + 4) * torch.finfo(dtype).eps


def _shifting(size: int, dtype: torch.dtype) -> float:
    """`δ` of the factorization: half an eps for every partial sum of the diagonal, for the level and its sum."""
    return (ceil(size / _panel(size)) / 2 + 2) * torch.finfo(dtype).eps


def _guess(matrix: Tensor, level: float) -> float:
    """The growth of a factor whose rows are, off the diagonal, half of the matrix's, over the root of the diagonal."""
    diagonal = matrix.diagonal().real
    entries = torch.view_as_real(matrix) if matrix.is_complex() else matrix
    squares = (torch.linalg.vector_norm(entries).square() - diagonal.square().sum()).clamp(min=0) / 2
    root = (level - diagonal).clamp(min=0.01 * level).mean().sqrt()
    return float(3 * (root + squares.sqrt() / root).square() / level)


def _factorize(rows: Rows, level: float | Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """For which matrices the factorization `level I - G = R* R` runs to its end, and a bound of `‖|R|‖²`.

    A block of rows after the other, each from those above: it stays in the cache until it is done. Off the diagonal the rows
    have the other sign, which nothing notices.
    """
    done: list[Tensor] = []
    traces, squares, largest, failures = [], [], [], []
    panel, each = _panel(rows.size), level if isinstance(level, float) else level[:, None]
    for start in range(0, rows.size, panel):
        end = min(start + panel, rows.size)
        width = end - start
        block = rows.block(start, end)
        # a sum of what is left, not what is left of two sums: that may be nothing where all eigenvalues are near the level
        traces.append((each - block.diagonal(dim1=-2, dim2=-1).real).sum(-1))
        product = torch.empty_like(block) if done else block
        for above in done:
            right = above[:, :, -block.shape[-1] :]
            block += torch.bmm(right[:, :, :width].mH, right, out=product)
        diagonal = block[:, :, :width].neg_()
        diagonal.diagonal(dim1=-2, dim2=-1).add_(each)
        factor, failed = torch.linalg.cholesky_ex(diagonal)
        roots = factor.diagonal(dim1=-2, dim2=-1).real
        squares.append(roots.square().sum(-1))
        largest.append(roots.amax(-1))
        failures.append(failed)
        if end < rows.size:
            # given a place for the result, it is not copied twice
            right = block.new_empty(rows.number, width, rows.size - end)
            done.append(torch.linalg.solve_triangular(factor, block[:, :, width:], upper=False, out=right))
    positive = torch.stack(failures).sum(0) == 0
    # ‖R‖_F² = tr (A + ΔA), and of the `δ level` in ΔA much may be left where A is small
    trace = torch.stack(traces).sum(0) * (1 + 4 * rounding) + rows.size * _shifting(rows.size, rows.dtype) * level
    rest = (trace - torch.stack(squares).sum(0)).clamp(min=0)
    return positive, torch.minimum((torch.stack(largest).amax(0) + rest.sqrt()).square(), trace)
