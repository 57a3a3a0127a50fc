"""Group-shuffle matrices `Q = Pᵀ L P R`: block-diagonal ones around a shuffle, from free tensors, and near a given matrix.

`L` and `R` have `k` orthogonal blocks of `b = n / k` by `b`; `P` deals the entries of every block out to all others. The blocks
are products of Householder reflections, which reach every orthogonal one (`shuffle_matrix`), or Cayley transforms, which start
at the identity (`rotated`).

Source: Gorbunov, Yudin, Soboleva, Alanov, Naumov and Rakhuba (2024).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linalg.orthonormal import polished
from ..linalg.precision import exact, in_full_precision
from ..operators.base import is_whole
from .recording import is_transformed
from .stiefel import bounded, householder, lengths, origin, polar_factor


def check_blocks(blocks: int, channels: int, side: str) -> None:
    """Refuse a number of blocks that does not divide the channels of a side."""
    if not (is_whole(blocks) and 1 <= blocks < channels and channels % blocks == 0):
        raise ValueError(
            f"`blocks` must be an int that divides the {channels} {side} channels (of a group) into blocks of two or more; "
            f"got {blocks!r}."
        )


def check_mixing(blocks: int, channels: int) -> None:
    """Refuse more blocks than leave every output dependent on every input."""
    if blocks**2 > channels:
        raise ValueError(
            f"`blocks` must be at most the square root of the {channels} channels, for else outputs do not see all inputs; "
            f"got {blocks}."
        )


def start(blocks: int, groups: int, channels: int) -> Tensor:
    """What `rotated` takes for the identity: the lower triangles of its blocks, `(2, groups, k, b (b - 1) / 2)`."""
    size = channels // blocks
    return torch.zeros(2, groups, blocks, size * (size - 1) // 2)


@in_full_precision
def rotated(x: Tensor, free: Tensor, blocks: int, back: bool) -> Tensor:
    """`Q x`, or `Qᵀ x` if `back`, for `x` of shape `(groups, n, columns)`."""
    left, right = _rotations(free.flatten(1, 2), x.shape[1] // blocks)
    parts = x.unflatten(1, (blocks, -1))
    if back:
        parts = _times(right.mT, _unshuffled(_times(left.mT, _shuffled(parts))))
    else:
        parts = _unshuffled(_times(left, _shuffled(_times(right, parts))))
    return parts.flatten(1, 2)


@in_full_precision
def shuffle_matrix(free: Tensor, gain: float = 1.0) -> Tensor:
    """`gain · Q`, matrices `(groups, n, n)`, the blocks of `Q` the products of reflections by `free`, `(2, groups, k, b, b)`."""
    matrix = _Fused.apply(free) if _is_fused(free) else _composed(free)
    return matrix if gain == 1 else gain * matrix


def _is_fused(free: Tensor) -> bool:
    """Whether the derivative by hand will do: the blocks divide their size, and nothing but a plain backward is asked for."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return not (free.shape[3] % free.shape[2] or recorded or is_transformed(free))


def _composed(free: Tensor) -> Tensor:
    return _dense(householder(free.flatten(1, 2)), free.shape[2])


class _Fused(torch.autograd.Function):
    """`_composed` where the `k` blocks divide their size, with a derivative by hand: of small matrices the calls are what costs.

    A block is `B = (I - V Uᵀ) D` with the signs `D`. Of its gradient `G` only `A = D (BᵀG - GᵀB) D` counts, since `BᵀdB` is skew,
    and `∂f/∂V = V · below(UᵀA U) - A U`. The lengths of the columns of `V` make no difference, so they are one.
    """

    @staticmethod
    def forward(ctx: Any, free: Tensor) -> Tensor:
        k, b = free.shape[2:4]
        x = free.reshape(-1, b, b)
        eye = torch.eye(b, dtype=free.dtype, device=free.device)
        below = torch.ones_like(eye).tril(-1)
        v = torch.addcmul(eye, x, below)
        norms = lengths(v)
        v = v / norms
        triangle = torch.bmm(v.mT, v).mul_(below.mT).add_(eye, alpha=0.5)
        ut = torch.linalg.solve_triangular(triangle, v.mT, upper=True)
        signs = x.diagonal(dim1=1, dim2=2).lt(0).to(x.dtype).mul_(2).sub_(1)
        q = polished(torch.baddbmm(eye, v, ut, alpha=-1)).mul_(signs.unsqueeze(1))
        columns, rows = _meeting(q.view(2, -1, b, b), k)
        ctx.save_for_backward(free, below, v, norms, ut, signs, q, columns, rows)
        return _dealt_out(torch.bmm(columns, rows), k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        free, below, v, norms, ut, signs, q, columns, rows = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            return torch.autograd.grad(_composed(free), free, grad, create_graph=True)[0]
        k, b = free.shape[2:4]
        # `_dealt_out` and `_meeting` backwards
        met = grad.reshape(-1, k, k, b // k, k, b).permute(0, 2, 4, 3, 1, 5).reshape(-1, b, b)
        at_q = torch.empty_like(q)
        left, right = at_q.view(2, -1, b, b)
        left.view(-1, b, b // k, k).permute(0, 3, 2, 1).copy_(torch.bmm(rows, met.mT).view(-1, k, b // k, b))
        right.view(-1, k, k, b // k, b).transpose(1, 2).copy_(torch.bmm(columns.mT, met).view(-1, k, k, b // k, b))
        turn = torch.bmm(q.mT, at_q)
        moved = torch.bmm(turn - turn.mT, (ut * signs.unsqueeze(1)).mT).mul_(signs.unsqueeze(2))
        return torch.baddbmm(moved, v, torch.bmm(ut, moved).mul_(below), beta=-1).mul_(below).div_(norms).view_as(free)


def near(matrices: Tensor, blocks: int) -> Tensor:
    """What `shuffle_matrix` takes to matrices near these, `(groups, n, n)`, or to these if they are of its form."""
    wide = exact(matrices)
    pairs = [_factors(matrix, blocks) for matrix in wide]
    sides = torch.stack([torch.stack(side) for side in zip(*pairs, strict=True)])
    return origin("householder", sides)[0].to(matrices)


def _factors(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Blocks of `L` and `R` whose product is near a matrix, and is the matrix if that is of this form.

    Where a block of `L` and one of `R` meet, the matrix is a product of a part of the columns of the one and of the rows of the
    other. Both are orthonormal, so the polar factor of the nearest matrix of that rank gives them.
    """
    b = len(matrix) // k
    met = _shuffled(matrix.view(1, k, b, -1)).view(k, b, k, b)
    left, right = matrix.new_zeros(2, k, b, b)
    for to in range(k):
        for source in range(k):
            # which rows of the block of R are dealt out to this block of L, and where there
            rows = [row for row in range(b) if to * b <= row * k + source < (to + 1) * b]
            places = [row * k + source - to * b for row in rows]
            u, _, vh = torch.linalg.svd(met[to, :, source])
            u, vh = u[:, : len(rows)], vh[: len(rows)]
            # any rotation between the two will do: one that takes the identity to identities
            turn = polar_factor(vh[:, rows]).mT
            left[to][:, places] = u @ turn.mT
            right[source][rows] = turn @ vh
    return polar_factor(left), polar_factor(right)


def _dense(sides: Tensor, k: int) -> Tensor:
    """`Q` as a matrix `(groups, n, n)`, from the blocks of L and R, `(2, groups · k, b, b)`."""
    if sides.shape[-1] % k == 0:
        return _dealt_out(torch.bmm(*_meeting(sides, k)), k)
    left, right = sides
    matrix = torch.stack([torch.block_diag(*blocks) for blocks in right.unflatten(0, (-1, k))])
    return _unshuffled(_times(left, _shuffled(matrix.unflatten(1, (k, -1))))).flatten(1, 2)


def _meeting(sides: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The factors of `Q` where a block of L and one of R meet, in `m = b / k` entries: `n² m` products are enough for it all.

    Columns of the one and rows of the other, `(groups · to · from, b, m)` and `(..., m, b)`.
    """
    left, right = sides
    b = sides.shape[-1]
    columns = left.reshape(-1, b, b // k, k).permute(0, 3, 1, 2).reshape(-1, b, b // k)
    rows = right.reshape(-1, k, k, b // k, b).transpose(1, 2).reshape(-1, b // k, b)
    return columns, rows


def _dealt_out(met: Tensor, k: int) -> Tensor:
    """The products of these factors as a matrix `(groups, n, n)`."""
    b = met.shape[-1]
    return met.view(-1, k, k, b // k, k, b).permute(0, 4, 1, 3, 2, 5).reshape(-1, k * b, k * b)


def _times(diagonal: Tensor, x: Tensor) -> Tensor:
    """Block-diagonal matrices, given by their blocks `(groups · k, b, b)`, times `(groups, k, b, columns)`."""
    return torch.bmm(diagonal, x.flatten(0, 1)).view(x.shape)


def _shuffled(x: Tensor) -> Tensor:
    """`P x`, for `(groups, k, b, columns)`: the entries of a block, one after the other, to all others."""
    return x.transpose(1, 2).reshape(x.shape)


def _unshuffled(x: Tensor) -> Tensor:
    """`Pᵀ x`."""
    groups, k, b, columns = x.shape
    return x.reshape(groups, b, k, columns).transpose(1, 2).reshape(x.shape)


def _rotations(free: Tensor, size: int) -> Tensor:
    """The Cayley transforms, `(..., size, size)`, of lower triangles `(..., size (size - 1) / 2)`."""
    rows, columns = torch.tril_indices(size, size, -1, device=free.device)
    lower = free.new_zeros(*free.shape[:-1], size * size).index_copy(-1, rows * size + columns, free)
    lower = bounded(lower.unflatten(-1, (size, size)))
    eye = torch.eye(size, dtype=free.dtype, device=free.device)
    return polished(torch.linalg.inv(torch.add(eye / 2, lower.mT - lower, alpha=1 / 8)) - eye)
