"""The largest eigenvalue of many Hermitian positive semidefinite matrices: estimated, and exact."""

from __future__ import annotations

import torch
from torch import Tensor

#: Up to this size an eigenvalue solver is as fast as a few Krylov steps.
SMALL = 32
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
        # `(v* G)*` is three times as fast as `G v`
        images[..., step : step + 1] = (basis[..., step : step + 1].mH @ matrices).mH
        image = images[..., step : step + 1]
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
