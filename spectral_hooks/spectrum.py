"""The singular values of an operator, and the largest of them."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from .krylov import largest
from .lattice import grid_norm, lattice_norm
from .operators.base import Grid, LinearOperator
from .operators.symbols import half_plane, symbol, trim

#: Entries of the largest dense matrix that is decomposed when all singular values are asked for (2 GiB in float64).
_DENSE_ENTRIES = 1 << 28
#: Entries up to which a dense matrix is faster than a matrix-free method.
_SMALL_ENTRIES = 1 << 18
#: Bytes of symbols held at once.
_CHUNK_BYTES = 1 << 27


def singular_values(op: LinearOperator, k: int | None = None) -> Tensor:
    """Singular values of a finite operator, descending, repeated ones as often as they occur.

    - matrices: exact, by SVD, `O(mn min(m, n))`;
    - circular convolutions: exact, `O(n² c³)`: the union over the frequency grid of the symbol's (Sedghi, Gupta, Long 2019);
    - all others (zero padding): exact, by SVD of the dense matrix, when that is small; the `k` largest of any size by a
      matrix-free block Krylov method, to 1e-6 of the largest or better.

    Args:
        op: a finite operator.
        k: only the `k` largest.

    Returns:
        Tensor of shape `(k,)` or `(min(numel(in_shape), numel(out_shape)),)`, in the dtype of the weight, at least float32.
        Differentiable, but for matrix-free results.

    Raises:
        ValueError: the lattice operator (its singular values are a continuum), a `k` out of range, NaN or infinity in the
            weight, or an operator too large for all of them.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> conv = torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
        >>> _ = torch.nn.init.constant_(conv.weight, 1 / 9)
        >>> sh.singular_values(sh.as_operator(conv, input_size=(6, 6)), k=3)
        tensor([1.0000, 0.6667, 0.6667], grad_fn=<SliceBackward0>)
    """
    count = min(prod(op.in_shape), prod(op.out_shape))
    if k is not None and not (isinstance(k, int) and 1 <= k <= count):
        raise ValueError(f"`k` must be an int from 1 to {count}, the number of singular values; got {k!r}.")
    weight = op.weight
    check_finite(weight)
    op = op.with_weight(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    grid = op.frequency_grid
    if grid is not None:
        return _on_grid(op, grid, count)[:k]
    entries = prod(op.in_shape) * prod(op.out_shape)
    if k is not None and entries > _SMALL_ENTRIES and 4 * k < count:
        return largest(op, k).values
    if entries > _DENSE_ENTRIES:
        raise ValueError(f"the dense matrix of this operator has {entries} entries: ask for the `k` largest singular values.")
    return torch.linalg.svdvals(op.to_dense())[:k]


def _on_grid(op: LinearOperator, grid: Grid, count: int) -> Tensor:
    """The union of the symbol's singular values over a frequency grid."""
    kernel = op.canonical()
    theta, copies = half_plane(tuple(size for size, _ in grid), kernel)
    repeats = prod(repeat for _, repeat in grid)
    chunk = max(_CHUNK_BYTES // (2 * kernel.element_size() * prod(kernel.shape[:3])), 1)
    values = torch.cat([torch.linalg.svdvals(_real_if_matrix(symbol(kernel, t))) for t in theta.split(chunk)])
    values = values.repeat_interleave(copies.long() * repeats, dim=0).flatten()
    values = values.sort(descending=True).values[:count]
    return torch.cat([values, values.new_zeros(count - len(values))])


def _real_if_matrix(blocks: Tensor) -> Tensor:
    """A kernel with one frequency, zero, has a real symbol, and a real SVD is four times faster."""
    return blocks.real if len(blocks) == 1 else blocks


def spectral_norm(op: LinearOperator, rtol: float = 1e-3) -> Tensor:
    """The operator norm `‖A‖₂ = σ₁`.

    - lattice operator (a convolution without an input size): **certified**, `S ≤ value ≤ S (1 + rtol)` with
      `S = sup_θ ‖F(θ)‖₂`: an upper bound for the layer at every input size. Branch and bound in float64, some hundred to some
      thousand evaluations of the symbol, whatever the input size;
    - matrices and circular convolutions: exact up to rounding;
    - other finite operators: matrix-free, to 1e-5 (an estimate from below; the lattice norm bounds it from above).

    Args:
        op: any operator.
        rtol: relative width of the lattice certificate, at least 1e-6.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. Differentiable where the norm is (the largest singular value is
        simple), by the singular vectors at the winning frequency.

    Raises:
        ValueError: `rtol` out of range, NaN or infinity in the weight, or reflect / replicate padding without an input size.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
        >>> everywhere = sh.spectral_norm(sh.as_operator(conv))
        >>> here = sh.spectral_norm(sh.as_operator(conv, input_size=(32, 24)))
        >>> bool(here <= everywhere)
        True
    """
    if not 1e-6 <= rtol < 1:
        raise ValueError(f"`rtol` must lie in [1e-6, 1); got {rtol!r}.")
    return _norm(op, rtol)


def _norm(op: LinearOperator, rtol: float) -> Tensor:
    weight = op.weight
    check_finite(weight)
    op = op.with_weight(weight.to(torch.promote_types(weight.dtype, torch.float32)))
    grid = op.frequency_grid
    if op.is_finite and grid is None:
        value, left, right = (t[0] for t in largest(op))
        return value if not weight.requires_grad else _with_gradient(value, (left * op.matvec(right)).sum())
    kernel = op.canonical()
    if grid is not None:
        found = grid_norm(kernel, tuple(size for size, _ in grid))
        norm = kernel.new_tensor(found.value)
    else:
        factor = op.lattice_factor
        kernel = trim(kernel)
        # a little closer than asked: casts, and whoever compares with a sampled supremum, need room too
        found = lattice_norm(kernel, 0.8 * rtol)
        # the cast must not round below
        norm = kernel.new_tensor(found.upper * factor * (1 + torch.finfo(kernel.dtype).eps))
    if not weight.requires_grad:
        return norm
    block = symbol(kernel[found.group : found.group + 1], found.theta[None].to(kernel))[0, 0]
    u, s, vh = torch.linalg.svd(block.detach(), full_matrices=False)
    return _with_gradient(norm, (u[:, 0].conj() @ block @ vh[0].conj()).real * (norm / s[0]).detach())


def _with_gradient(value: Tensor, differentiable: Tensor) -> Tensor:
    """The `value`, bit for bit, with the gradient of an expression that equals it up to rounding."""
    return differentiable + (value - differentiable).detach()


def check_finite(weight: Tensor) -> None:
    """Refuse NaN and infinity, and weights without values."""
    if weight.is_meta:
        raise ValueError("`weight` is on the meta device and has no values: materialize the model first.")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("`weight` contains NaN or infinity: look at the training step before; the weight is left as it is.")
