"""What clipping takes away from matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import matrix_functions as polynomial
from ..linalg.krylov import Matrix, largest
from ..linalg.memory import at_once
from ..linalg.precision import float32_is_kept

#: From this size on a matrix is tried for few values above the level: so many, by so many restarts of a Krylov method.
_LARGE, _FEW, _FEW_RESTARTS = 384, 12, 4
#: Matrices of this size or more are clipped by products alone on accelerators, if that is seen to be off by at most so much.
_PRODUCTS_FROM, _ACCURATE = 32, 5e-5


def few_over(matrices: Tensor, level: float, tol: float) -> tuple[Tensor, Tensor] | None:
    """The excess of one large matrix that has few singular values above the level, and its norm; None if it has more.

    Off by `tol` times the level, nearly.
    """
    if len(matrices) > 1 or min(matrices.shape[1:]) < _LARGE:
        return None
    # that of a wide random matrix is some 30 times its norm, which is not known yet
    length = float(torch.linalg.vector_norm(matrices))
    tol = tol * min(30 * level / length, 1.0) if length else tol
    try:
        values, left, right = largest(Matrix(matrices[0]), _FEW, above=level, tol=tol, max_restarts=_FEW_RESTARTS)
    except RuntimeError:
        return None
    if values[-1] > level:
        return None
    over = (values - level).clamp(min=0)
    return (left.T * over @ right)[None], values[:1]


def excess_over(blocks: Tensor, level: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What clipping the singular values at `level` takes away, its sum for each block, and the largest value of each group.

    By the Gram matrix on the smaller side: with `B B* = U diag(σ²) U*` the excess is `U diag(max(1 - level / σ, 0)) U* B`.

    Args:
        blocks: `(*frequencies, groups, rows, columns)`.
        level: one, or one for each group.
    """
    rows, columns = blocks.shape[-2:]
    if rows > columns:
        excess, total, largest = excess_over(blocks.mT, level)
        return excess.mT, total, largest
    level = torch.as_tensor(level, dtype=blocks.real.dtype, device=blocks.device).reshape(-1)
    chunk = at_once(16 * blocks[0].numel()) if blocks.ndim > 3 else len(blocks)
    excess = torch.empty_like(blocks)
    sums: list[Tensor] = []
    highest: list[Tensor] = []
    for part, out in zip(blocks.split(chunk), excess.split(chunk), strict=True):
        quick = _by_products(part, level, out) if products_pay(part) else None
        total, top = quick or _by_eigenvalues(part, level, out)
        sums.append(total)
        highest.append(top.reshape(-1, blocks.shape[-3]))
    return excess, torch.cat(sums), torch.cat(highest).amax(0)


def _by_eigenvalues(blocks: Tensor, level: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Write the excess to `out`; its sum and the largest value for each block."""
    if blocks.shape[-2] == 1:  # a row is its own singular vector
        sigma = torch.linalg.vector_norm(blocks, dim=-1)
        over = (sigma - level[:, None]).clamp(min=0)
        torch.mul(blocks, (over / sigma.clamp(min=torch.finfo(sigma.dtype).tiny)).unsqueeze(-1), out=out)
        return over.sum(-1), sigma[..., -1]
    squared, u = torch.linalg.eigh(blocks @ blocks.mH)
    sigma = squared.clamp(min=0).sqrt()
    over = (sigma - level[:, None]).clamp(min=0)
    # ascending: in many blocks few are above
    first = sigma.shape[-1] - int((over > 0).sum(-1).amax())
    u, gain = u[..., first:], over[..., first:] / sigma[..., first:].clamp(min=torch.finfo(sigma.dtype).tiny)
    torch.matmul(u * gain.unsqueeze(-2), u.mH @ blocks, out=out)
    return over.sum(-1), sigma[..., -1]


def products_pay(blocks: Tensor) -> bool:
    """Whether matrix products in float32 are far faster than a decomposition, and as precise as they say."""
    return blocks.is_cuda and min(blocks.shape[-2:]) >= _PRODUCTS_FROM and float32_is_kept()


def _by_products(blocks: Tensor, level: Tensor, out: Tensor) -> tuple[Tensor, Tensor] | None:
    """The same by matrix products alone, in float32; None where the error that they are measured to make is too large.

    The largest values are bounds from below, within some per cent.
    """
    single = blocks.to(torch.complex64 if blocks.is_complex() else torch.float32)
    if not bool(torch.isfinite(single).all()):
        return None
    excess, sums, error = polynomial.excess(single, level)
    clipped = torch.linalg.matrix_norm(single - excess)
    # frequencies of small symbols need not be more accurate than the others
    error, clipped = (torch.linalg.vector_norm(x.reshape(-1, blocks.shape[-3]), dim=0) for x in (error, clipped))
    if not bool((error <= _ACCURATE * clipped).all()):
        return None
    out.copy_(excess)
    return sums.to(blocks.real.dtype), polynomial.norm_bracket(single)[0].to(blocks.real.dtype)
