"""A low-rank update of a fixed matrix, `W + B A`, brought inside a ball by its factor `B` alone."""

from __future__ import annotations

from math import frexp

import torch
from torch import Tensor

from ..linalg.scaling import check_finite
from ..norms.bracket import TOLERANCE
from ..norms.spectral_norm import spectral_norm
from ..operators import DenseOperator
from .arguments import check_max_norm


@torch.no_grad()
def clip_update(weight: Tensor, left: Tensor, right: Tensor, max_norm: float = 1.0, *, rounds: int = 30) -> Tensor:
    """The factor `B'` nearest to `B`, as `‖B' A - B A‖`, with `‖W + B' A‖₂ ≤ max_norm`: the update keeps its rank and its `A`.

    With `R` an orthonormal basis of the rows of `A`, `Y = (W + B A) Rᵀ` is all that `B` can change, and `M² = c² I - K Kᵀ` is the
    room that the rest, `K = (W + B A)(I - RᵀR)`, leaves for it:

        minimize ‖Y - Y₀‖²  subject to  Y Yᵀ ≼ M².

    Its Lagrange multiplier is a positive semidefinite `Θ` of the size of the rank, and in the eigenbasis of `M²`, row by row,
    `yᵢ = mᵢ² y₀ᵢ (mᵢ² I + Θ)⁻¹`. The largest multiplier needed, a multiple of the identity, is found by bisection; then each of
    `rounds` takes `Θ ← Θ^½ S^½ Θ^½` with `S = Yᵀ M⁻² Y`, which is the identity wherever the constraint is active.
    (For `W = 0` the answer is the clip of the singular values of `B A`.)

    Args:
        weight: `W`, of shape `(out, in)`, with norm at most `max_norm`.
        left: `B`, of shape `(out, rank)`.
        right: `A`, of shape `(rank, in)`.
        max_norm: the bound `c > 0`.
        rounds: of the multiplier.

    Returns:
        A factor of the shape, dtype and device of `left`; `left` itself if the sum is inside already. Guaranteed: the norm of
        the sum with the stored factor, evaluated in float32 or better, is at most `max_norm` (within 1e-6). The distance is the
        least one in the limit of many rounds; measured against dual certificates, 1e-5 above it after 30.

    Cost: one eigendecomposition of size `min(out, in)`, and `O(out · rank²)` a round.

    Raises:
        ValueError: `weight` alone exceeds `max_norm`, the shapes do not fit, NaN or infinity in a factor.

    Example:
        >>> import torch
        >>> from spectral_hooks.projections.low_rank import clip_update
        >>> W, B, A = torch.diag(torch.tensor([1.0, 0.5])), torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0, 1.0]])
        >>> clip_update(W, B, A)  # the first output has no room left, the second has half
        tensor([[0.0000],
                [0.5000]])
    """
    max_norm = check_max_norm(max_norm)
    if weight.ndim != 2 or left.shape[:1] != weight.shape[:1] or right.shape != (left.shape[-1], weight.shape[1]):
        raise ValueError(
            f"`weight`, `left`, `right` must have shapes (out, in), (out, rank), (rank, in); "
            f"got {tuple(weight.shape)}, {tuple(left.shape)}, {tuple(right.shape)}."
        )
    if _inside(weight, left, right, max_norm):
        return left
    if not _inside(weight, left[:, :0], right[:0], max_norm * (1 + 10 * TOLERANCE)):
        raise ValueError(f"`weight` alone must have norm at most {max_norm}: clip it first.")

    # in units of the bound, up to a power of two: squares are in range then
    unit = 2.0 ** (frexp(max_norm)[1] - 1)
    before = left.double() / unit
    mix, sizes, rows = torch.linalg.svd(right.double(), full_matrices=False)
    used = sizes > TOLERANCE * sizes[0]
    mix, sizes, rows = mix[:, used], sizes[used], rows[used]
    merged = weight.double() / unit + before @ right.double()
    start = merged @ rows.T
    nearest = _nearest_in_room(start, merged - start @ rows, max_norm / unit, rounds)
    back = mix / sizes
    # Y = 0 takes away from W: unlike B = 0 it is well inside, and the way there never has to be long
    for attempt in range(60):
        shrink = 1 - (2.0**attempt - 1) * 1e-7 if attempt < 23 else 0.0
        stored = ((before + (shrink * nearest - start) @ back.T) * unit).to(left.dtype)
        if _inside(weight, stored, right, max_norm):
            return stored
    return torch.zeros_like(left)


def _inside(weight: Tensor, left: Tensor, right: Tensor, max_norm: float) -> bool:
    dtype = torch.promote_types(torch.promote_types(weight.dtype, left.dtype), torch.float32)
    merged = weight.to(dtype) + left.to(dtype) @ right.to(dtype)
    check_finite(merged)
    return float(spectral_norm(DenseOperator(merged))) <= max_norm * (1 + TOLERANCE)


def _nearest_in_room(start: Tensor, rest: Tensor, max_norm: float, rounds: int) -> Tensor:
    """The `Y` nearest to `start` with `Y Yᵀ ≼ c² I - rest restᵀ`, in float64."""
    basis, room = _room(start, rest, max_norm)
    rows, depth = basis.T @ start, room.sqrt().unsqueeze(1)

    def inverse(theta: Tensor) -> Tensor:
        """`mᵢ / (mᵢ² + θ)`: with the row it makes `M⁻¹ Y`, without a division by a room of zero."""
        return depth / (depth.square() + theta).clamp(min=torch.finfo(depth.dtype).tiny)

    # a multiple of the identity only shrinks rows, the more the larger it is
    high = max_norm * float(torch.linalg.matrix_norm(rows, 2))
    low = 1e-16 * high
    for _ in range(60):
        middle = (low * high) ** 0.5
        too_little = float(torch.linalg.matrix_norm(rows * inverse(depth.new_tensor(middle)), 2)) > 1
        low, high = (middle, high) if too_little else (low, middle)

    theta, vectors = depth.new_full((rows.shape[1],), high), torch.eye(rows.shape[1], dtype=depth.dtype, device=depth.device)
    best, shortest = torch.zeros_like(rows), float("inf")
    for _ in range(rounds + 1):
        scaled = rows @ vectors * inverse(theta)
        trial = depth * scaled @ vectors.T / max(1.0, float(torch.linalg.matrix_norm(scaled, 2)))
        distance = float(torch.linalg.vector_norm(trial - rows))
        if distance < shortest:
            best, shortest = trial, distance
        squares, directions = torch.linalg.eigh(scaled.T @ scaled)
        root = theta.sqrt()
        inner = directions * squares.clamp(min=0).sqrt() @ directions.T
        theta, turn = torch.linalg.eigh(root.unsqueeze(1) * inner * root)
        theta, vectors = theta.clamp(min=0), vectors @ turn
    return basis @ best


def _room(start: Tensor, rest: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """Orthonormal columns that span `start`, eigenvectors of `c² I - rest restᵀ`, and the eigenvalues."""
    out, columns = rest.shape
    if out <= columns:
        squares, basis = torch.linalg.eigh(rest @ rest.T)
        return basis, (max_norm**2 - squares).clamp(min=0)
    squares, vectors = torch.linalg.eigh(rest.T @ rest)
    kept = squares > 1e-12 * max_norm**2
    basis, squares = rest @ vectors[:, kept] / squares[kept].sqrt(), squares[kept]
    # everywhere else the room is c²
    free = torch.linalg.qr(start - basis @ (basis.T @ start)).Q
    free = torch.linalg.qr(free - basis @ (basis.T @ free)).Q
    room = torch.cat([max_norm**2 - squares, squares.new_full((free.shape[1],), max_norm**2)])
    return torch.cat([basis, free], dim=1), room.clamp(min=0)
