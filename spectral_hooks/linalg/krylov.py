"""The largest singular values of a linear map, from `matvec` and `rmatvec` alone."""

from __future__ import annotations

from collections.abc import Callable
from math import frexp, inf, prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .precision import at_least_float32, exact, float32_is_kept, widest
from .scaling import normalized

#: Restarts after which a decomposition of a matrix of up to some size is cheaper.
_PATIENCE, _LARGE = 12, 1024
#: Bytes of basis vectors and their images held at once.
_BASIS_BYTES = 1 << 29
#: Power steps that may show a matrix of this size to be above a level, by this much at least: more than rounding.
_GLANCES, _GLANCED_FROM, _SEEN = 6, 384, 1e-4
#: Up to this size a full decomposition of a matrix is as fast.
_SMALL = 96


class NotConverged(RuntimeError):
    """The singular values lie too close to others for this many restarts in this dtype."""


class LinearMap(Protocol):
    """What is applied from either side: an operator, or a `Matrix`."""

    @property
    def in_shape(self) -> tuple[int, ...]: ...

    @property
    def out_shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def matvec(self, x: Tensor) -> Tensor: ...

    def rmatvec(self, y: Tensor) -> Tensor: ...

    def of_order_one(self, dtype: torch.dtype) -> tuple[LinearMap, float]:
        """The map over a power of two, with numbers of order one and of this dtype, and that power."""


class Matrix:
    """A matrix as a linear map."""

    def __init__(self, entries: Tensor) -> None:
        self.entries = entries
        self.out_shape, self.in_shape = (len(entries),), tuple(entries.shape[1:])
        self.dtype, self.device = entries.dtype, entries.device

    def matvec(self, x: Tensor) -> Tensor:
        return x @ self.entries.T

    def rmatvec(self, y: Tensor) -> Tensor:
        return y @ self.entries

    def of_order_one(self, dtype: torch.dtype) -> tuple[LinearMap, float]:
        entries, scale = normalized(self.entries.detach())
        return Matrix(entries.to(self.device, dtype)), scale


class Triples(NamedTuple):
    """Singular values, descending, with left and right vectors as rows in the map's shapes."""

    values: Tensor
    left: Tensor
    right: Tensor


@torch.no_grad()
def largest(
    op: LinearMap,
    k: int = 1,
    *,
    above: float = 0.0,
    tol: float = 1e-6,
    max_restarts: int = 300,
    generator: torch.Generator | None = None,
) -> Triples:
    """The `k` largest singular values by a restarted block Krylov method (Golub & Kahan 1965; Baglama & Reichel 2005).

    A basis `V` grows by the residuals `Aᵀu - σv` of its best vectors; the singular values of `A V` approach those of `A`
    from below. The block is wider than `k`, so repeated singular values (every group of a depthwise layer, every position
    of a 1×1 convolution) are all found. It runs on the weight over a power of two, so that nothing that is squared on the way
    leaves the range of the dtype, whatever the scale of the weight.

    Args:
        op: the map, of fixed shapes.
        k: how many.
        above: smaller ones need not converge; they are then estimates from below.
        tol: stop when every `‖Aᵀu - σv‖ ≤ tol · σ₁`, or 50 times the machine epsilon where that is more; then a singular value
            lies within that distance of each one returned, and in practice within its square. For `k = 1` the square itself,
            over the distance to the next, is enough.
        generator: source of the starting block; a fixed seed by default, so that the result is deterministic.

    Raises:
        NotConverged: not converged after `max_restarts`.
    """
    dtype = at_least_float32(op.dtype)
    op, scale = op.of_order_one(dtype)
    above = above / scale
    size = prod(op.in_shape)
    block = min(k + 2, size)
    per_vector = (size + prod(op.out_shape)) * dtype.itemsize
    columns = min(size, max(4 * block, min(12 * block + 24, _BASIS_BYTES // per_vector)))
    keep = max(block, columns // 3)
    generator = generator or torch.Generator().manual_seed(0)
    start = torch.randn(size, block, generator=generator, dtype=dtype).to(op.device)
    basis = torch.linalg.qr(start).Q
    image = _applied(op.matvec, basis, op.in_shape)
    # residuals of wide layers stop shrinking at some 30 eps
    tol = max(tol, 50 * torch.finfo(dtype).eps)
    for _ in range(max_restarts):
        while True:
            s, turn, left, right = _ritz(basis, image, block)
            residual = _applied(op.rmatvec, left, op.out_shape) - right * s[:block]
            error = _errors(s, residual, k)
            if s[0] == 0 or bool(((error <= tol * s[0]) | (s[:k] + error <= above)).all()) or basis.shape[1] == size:
                return Triples(s[:k] * scale, left[:, :k].T.reshape(-1, *op.out_shape), right[:, :k].T.reshape(-1, *op.in_shape))
            if basis.shape[1] + block > columns:
                basis, image = basis @ turn[:, :keep], image @ turn[:, :keep]
                break
            basis, image = _extended(op, basis, image, residual)
        basis, image = _extended(op, basis, image, residual)
    raise NotConverged(f"the {k} largest singular values did not converge to {tol} in {max_restarts} restarts.")


def _applied(function: Callable[[Tensor], Tensor], columns: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A map of tensors of this shape, applied to the columns of a matrix."""
    return function(columns.T.reshape(-1, *shape)).flatten(1).T


def _ritz(basis: Tensor, image: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The singular values of the map on a basis, descending, how the basis turns into their vectors, and the first of these."""
    squared, turn = torch.linalg.eigh(image.T @ image)
    s, turn = squared.clamp(min=0).sqrt().flip(0), turn.flip(1)
    left = image @ turn[:, :block] / s[:block].clamp(min=torch.finfo(s.dtype).tiny)
    return s, turn, left, basis @ turn[:, :block]


def _errors(s: Tensor, residual: Tensor, k: int) -> Tensor:
    """By how much the first `k` values may be off."""
    error = torch.linalg.vector_norm(residual, dim=0)[:k]
    if k > 1 or len(s) == 1:
        return error
    # off by an angle, a vector has a value off by its square, over the distance to the next; which may be overrated
    return torch.minimum(error, 30 * error**2 / (s[0] - s[1]).clamp(min=torch.finfo(s.dtype).tiny))


def _extended(op: LinearMap, basis: Tensor, image: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """The basis with what is new in a block, and its image."""
    fresh = _orthonormal(block, basis)[:, : len(basis) - basis.shape[1]]
    return torch.cat([basis, fresh], 1), torch.cat([image, _applied(op.matvec, fresh, op.in_shape)], 1)


@torch.no_grad()
def seen_by(op: LinearMap, vectors: Tensor) -> Tensor:
    """The singular values of the map on the span of some vectors, as rows in its shape, in float64: descending.

    None exceeds that of the map with the same number, by more than rounding in float64, whatever the vectors are; on vectors that
    `largest` has found they are the largest, up to the squares of their errors.
    """
    wide = widest(op.device)
    op, scale = op.of_order_one(wide)
    basis = torch.linalg.qr(vectors.to(wide).flatten(1).T).Q
    image = op.matvec(basis.T.reshape(vectors.shape)).flatten(1)
    return torch.linalg.svdvals(image)[: len(vectors)] * scale


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """An orthonormal basis of the block's part outside the span of `basis`.

    Twice is enough for a block of some size; one that is all rounding, as after convergence, needs a third pass.
    """
    for _ in range(3):
        block = block - basis @ (basis.T @ block)
        block = torch.linalg.qr(block).Q
    return block


def matrix_norm(matrix: Tensor) -> Tensor:
    """`‖M‖₂` of one real or complex float64 matrix as `Re u* M v`, with the singular vectors held fixed.

    That is the norm up to rounding, and differentiates to `u v*`; to zero where the matrix is zero.
    """
    fixed = matrix.detach()
    if not bool(fixed.any()):
        return (matrix * 0).sum().real
    u, v = _top_vectors(fixed)
    return (u.conj() @ matrix @ v).real


def _top_vectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors `u`, `v` with `u* M v = ‖M‖`, up to rounding."""
    # the vectors are the same, and the squares of the entries are in range
    matrix = matrix * 2.0 ** min(-frexp(float(matrix.abs().amax()))[1], 1000)
    if min(matrix.shape) <= _SMALL:
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, 0], right[0].conj()
    restarts = _PATIENCE if min(matrix.shape) <= _LARGE else 300
    try:
        if not matrix.is_complex():
            _, left, right = largest(Matrix(matrix), tol=1e-9, max_restarts=restarts)
            return left[0], right[0]
        # every singular value of the real form occurs twice, and each vector of it is a complex one
        real = torch.cat([torch.cat([matrix.real, -matrix.imag], 1), torch.cat([matrix.imag, matrix.real], 1)])
        _, left, right = largest(Matrix(real), tol=1e-9, max_restarts=restarts)
        return torch.complex(*left[0].chunk(2)), torch.complex(*right[0].chunk(2))
    except NotConverged:  # many nearly equal values, as clipping leaves them
        wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mH
        u = torch.linalg.eigh(wide @ wide.mH).eigenvectors[:, -1]
        v = wide.mH @ u
        v = v / torch.linalg.vector_norm(v)
        return (u, v) if wide is matrix else (v, u)


def with_gradient(value: Tensor, differentiable: Tensor) -> Tensor:
    """The `value`, bit for bit, with the gradient of an expression that equals it up to rounding."""
    # where both overflow there is no difference
    return differentiable + torch.nan_to_num(value - differentiable, nan=0.0, posinf=inf, neginf=-inf).detach()


def seen_above(matrix: Tensor, level: float) -> bool:
    """Whether some vector shows that the norm of a large matrix lies above the level: far cheaper than a failing proof."""
    if min(matrix.shape) < _GLANCED_FROM or matrix.is_meta:
        return False
    matrix = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32 if float32_is_kept() else torch.float64))
    # the products of unit vectors with the matrix are in range where the matrix is; their squares need not be
    vector = _unit(matrix[torch.linalg.vector_norm(matrix, dim=1).argmax()])
    for _ in range(_GLANCES):
        image = matrix @ vector
        if inf > _length(image) > level * (1 + _SEEN):  # NaN is not
            # long sums in float32 lose digits
            vector = exact(vector)
            return _length(exact(matrix) @ vector) > level * _length(vector)
        vector = _unit(matrix.mT @ _unit(image))
    return False


def _length(vector: Tensor) -> float:
    """The norm of a vector, of any scale, as a float64."""
    return float(torch.linalg.vector_norm(exact(vector)))


def _unit(vector: Tensor) -> Tensor:
    """The vector, of any scale, over its norm."""
    long = exact(vector)
    return (long / torch.linalg.vector_norm(long)).to(vector)
