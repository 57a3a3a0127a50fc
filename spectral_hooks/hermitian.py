"""The largest eigenvalue of many Hermitian positive semidefinite matrices: estimated, proven not to exceed, exact."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Up to this size an eigenvalue solver is as fast as a few Krylov steps.
SMALL = 32
#: Width of the panels of the Cholesky factorization, small so that its rounding is, and of the strips of what they update.
_PANEL, _STRIP = 64, 128
#: Restarts of 24 Krylov steps before an eigenvalue solver takes over.
_MOST_RESTARTS = 8
#: Keeps the direction of a zero vector from being NaN.
_TINY = torch.finfo(torch.float32).tiny


def top(matrices: Tensor, vectors: Tensor | None = None, *, steps: int) -> tuple[Tensor, Tensor]:
    """Estimates from below of the largest eigenvalues, exact for small matrices, with the unit vectors that attain them."""
    if matrices.shape[-1] <= SMALL:
        values, every = torch.linalg.eigh(matrices)
        return values[..., -1], every[..., -1]
    if vectors is None:
        start = matrices.diagonal(dim1=-2, dim2=-1).real.argmax(-1)
        vectors = matrices.take_along_dim(start[:, None, None], dim=-1).squeeze(-1)
    return lanczos(matrices, vectors, steps)


def norms(matrices: Tensor, *, steps: int) -> Tensor:
    """Estimates from below of the largest eigenvalues, exact for small matrices."""
    if matrices.shape[-1] <= 2 * SMALL:  # without vectors a solver is faster
        return torch.linalg.eigvalsh(matrices)[..., -1]
    return top(matrices, steps=steps)[0]


def lanczos(matrices: Tensor, vectors: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Lanczos from a vector for every matrix: the largest Ritz values, from below, and their unit vectors."""
    shape = (*matrices.shape[:-1], steps + 1)
    basis, images = matrices.new_zeros(shape), matrices.new_zeros(shape)
    noise = 100 * torch.finfo(matrices.dtype).eps
    image = fresh = vectors.unsqueeze(-1)
    for step in range(steps + 1):
        length, reference = (torch.linalg.vector_norm(x, dim=-2, keepdim=True) for x in (fresh, image))
        # what is left of an exhausted space is noise, and not orthogonal
        basis[..., step : step + 1] = fresh / length.clamp(min=_TINY) * (length > noise * reference)
        image = images[..., step : step + 1] = matrices @ basis[..., step : step + 1]
        fresh = image - basis @ (basis.mH @ image)
        fresh = fresh - basis @ (basis.mH @ fresh)  # once leaves too much where the values fall off
    ritz = torch.linalg.eigh(basis.mH @ images).eigenvectors[..., -1:]
    # whatever rounding has left of the orthogonality: the quotient holds all the same
    vectors = basis @ ritz
    length = torch.linalg.vector_norm(vectors, dim=-2, keepdim=True).clamp(min=_TINY)
    vectors, image = vectors / length, images @ ritz / length
    return (vectors.conj() * image).sum((-2, -1)).real, vectors.squeeze(-1)


def exact_top(matrix: Tensor, vector: Tensor) -> tuple[Tensor, Tensor]:
    """The largest eigenvalue of one matrix, to rounding, and its vector, from an approximate one."""
    if matrix.shape[-1] > SMALL:
        for _ in range(_MOST_RESTARTS):
            value, vector = (x[0] for x in lanczos(matrix[None], vector[None], steps=24))
            residual = matrix @ vector - value * vector
            # the error of the value is the square of this, over the gap
            if float(torch.linalg.vector_norm(residual)) <= max(1e-8, 30 * torch.finfo(value.dtype).eps) * float(value):
                return value, vector
    values, vectors = torch.linalg.eigh(matrix)
    return values[-1], vectors[:, -1]


class Verdict(NamedTuple):
    """Which matrices are proven; for which only rounding prevents the proof; how far `‖|R|‖²` grew, relative to the level."""

    proven: Tensor
    doubtful: Tensor
    growth: float


def below_(matrices: Tensor, level: float, *, error: float, slack: float, growth: float = 0.0) -> Verdict:
    """Which matrices are proven to have no eigenvalue above `level`. Overwrites them.

    A Cholesky factor `R` of `A = (level - s) I - G` that exists proves `A + ΔA ⪰ 0` for the rounding `|ΔA| ≤ γ |R|* |R|`
    (Demmel 1989; Rump 2006), and `‖|R|‖ ≤ max R_jj + ‖off-diagonal R‖_F` tells whether `s` paid for that.

    Args:
        matrices: Hermitian positive semidefinite, `(n, size, size)`.
        level: the largest eigenvalue to be proven.
        error: by how much each matrix may be off in norm.
        slack: the most that rounding may take, `s ≤ slack`; eigenvalues closer to the level are not proven below.
        growth: that of matrices like these, to choose `s`; 0 to guess.
    """
    size = matrices.shape[-1]
    if size == 1:
        proven = matrices[:, 0, 0].real + error + slack < level
        return Verdict(proven, torch.zeros_like(proven), 1.0)
    shifted = matrices.neg_()
    # `‖|R|‖² ≤ ‖R‖_F² = tr A ≤ size · level`, if there is room for that
    if 8 * (_rounding(min(size, _PANEL), matrices) * size * level + error) < slack:
        growth = float(size)
    growth = (growth or _guess(shifted[0], level)) * level
    # short sums round less, a single panel is faster
    panel = size if _rounding(size, matrices) * growth + error < slack / 4 else min(size, _PANEL)
    s = min(slack, 1.3 * _rounding(panel, matrices) * growth + 1.01 * error)
    shifted.diagonal(dim1=-2, dim2=-1).add_(level - s)
    positive, grown = _factorize_(shifted, panel)
    enough = _rounding(panel, matrices) * grown + error < s
    growth = float(grown[positive].amax()) if positive.any() else growth
    return Verdict(positive & enough, positive & ~enough, growth / level)


def _rounding(panel: int, like: Tensor) -> float:
    """`γ` of the factorization: of a sum of `panel` complex products, of some partial sums, and of the shift."""
    return (panel + -(-like.shape[-1] // panel) + 10) * torch.finfo(like.dtype).eps


def _guess(negated: Tensor, level: float) -> float:
    """The growth of a factor whose rows are, off the diagonal, half of the matrix's, over the root of the diagonal."""
    diagonal = negated.diagonal().real
    squares = (torch.linalg.matrix_norm(negated).square() - diagonal.square().sum()).clamp(min=0) / 2
    root = (level + diagonal).clamp(min=0.01 * level).mean().sqrt()
    return float(3 * (root + squares.sqrt() / root).square() / level)


def _factorize_(matrices: Tensor, panel: int) -> tuple[Tensor, Tensor]:
    """For which matrices the Cholesky factorization runs to its end, and a bound of `‖|R|‖²`. They are overwritten."""
    size = matrices.shape[-1]
    positive = torch.ones(len(matrices), dtype=torch.bool, device=matrices.device)
    # ‖R‖_F² = tr A, up to rounding
    rest = trace = matrices.diagonal(dim1=-2, dim2=-1).real.sum(-1) * (1 + 4 * _rounding(panel, matrices))
    largest = torch.zeros_like(rest)
    for start in range(0, size, panel):
        end = min(start + panel, size)
        factor, failed = torch.linalg.cholesky_ex(matrices[:, start:end, start:end])
        positive &= failed == 0
        diagonal = factor.diagonal(dim1=-2, dim2=-1).real
        rest, largest = rest - diagonal.square().sum(-1), torch.maximum(largest, diagonal.amax(-1))
        if end < size:
            rows = torch.linalg.solve_triangular(factor, matrices[:, start:end, end:], upper=False)
            for left in range(0, size - end, _STRIP):  # only what lies on and above the diagonal is read again
                right = min(left + _STRIP, size - end)
                matrices[:, end + left : end + right, end + left :] -= rows[:, :, left:right].mH @ rows[:, :, left:]
    return positive, torch.minimum((largest + rest.clamp(min=0).sqrt()).square(), trace)
