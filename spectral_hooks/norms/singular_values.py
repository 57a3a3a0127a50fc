"""The singular values of an operator."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from ..linalg.gram import Gram
from ..linalg.krylov import NotConverged, largest, seen_by
from ..linalg.memory import at_once
from ..linalg.precision import rounded_down
from ..linalg.scaling import normalized
from ..linalg.symbols import half_plane, symbol
from ..operators.arguments import on_operator
from ..operators.base import Grid, KernelOperator, LinearOperator
from .spectral_norm import checked

#: Entries of the largest dense matrix that is decomposed when all singular values are asked for (2 GiB in float64).
_DENSE_ENTRIES = 1 << 28
#: Entries up to which a dense matrix is faster than a matrix-free method.
_SMALL_ENTRIES = 1 << 18


@on_operator
def singular_values(op: LinearOperator, k: int | None = None) -> Tensor:
    """Singular values of a finite operator, descending, repeated ones as often as they occur.

    - matrices: exact, by SVD, `O(mn min(m, n))`;
    - circular convolutions: exact, `O(n² c³)`: the union over the frequency grid of the symbol's (Sedghi, Gupta, Long 2019).
      A float32 symbol that is far from square (strides, unequal channels) and needs no gradient goes through the eigenvalues of
      `F F*` in float64: faster, and no less accurate;
    - all others (zero padding): exact, by SVD of the dense matrix, when that is small; the `k` largest of any size by a
      matrix-free block Krylov method, to 1e-6 of the largest or better, from below; where that does not converge, by SVD of the
      dense matrix, unless it is large.

    Args:
        op: a finite operator.
        k: only the `k` largest.

    Returns:
        Tensor of shape `(k,)` or `(min(numel(in_shape), numel(out_shape)),)`, in the dtype of the weight, at least float32.
        Differentiable, but for matrix-free results.

    Raises:
        ValueError: the lattice operator (its singular values are a continuum), a `k` out of range, NaN or infinity in the
            weight, or an operator too large for all of them.
        RuntimeError: the `k` largest did not converge, and the dense matrix has more than 2²⁸ entries.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> conv = torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
        >>> _ = torch.nn.init.constant_(conv.weight, 1 / 9)
        >>> sh.singular_values(sh.as_operator(conv, input_size=(6, 6)), k=3)
        tensor([1.0000, 0.6667, 0.6667], grad_fn=<MulBackward0>)
    """
    count = min(prod(op.in_shape), prod(op.out_shape))
    if k is not None and not (isinstance(k, int) and 1 <= k <= count):
        raise ValueError(f"`k` must be an int from 1 to {count}, the number of singular values; got {k!r}.")
    op = checked(op)
    if isinstance(op, KernelOperator):
        if op.weight.numel() == 0:  # no inputs or no outputs
            return op.weight.new_zeros(0)
        # a power of two, so that no sum of large entries overflows
        _, scale = normalized(op.weight.detach())
        return _all_or_largest(op.with_weight(op.weight / scale), k, count) * scale
    return _all_or_largest(op, k, count)


def _all_or_largest(op: LinearOperator, k: int | None, count: int) -> Tensor:
    if isinstance(op, KernelOperator) and op.frequency_grid is not None:
        return _on_grid(op, op.frequency_grid, count)[:k]
    entries = prod(op.in_shape) * prod(op.out_shape)
    if k is not None and entries > _SMALL_ENTRIES and 4 * k < count:
        try:
            return rounded_down(seen_by(op, largest(op, k).right), op.dtype)
        except NotConverged as error:
            if entries > _DENSE_ENTRIES:
                raise RuntimeError(
                    f"the `k` = {k} largest singular values of this operator, with {entries} entries as a dense matrix, did not "
                    "converge: they lie too close to others. Ask for another `k`, fewer or more, build the operator from a "
                    "float64 layer, or decompose the matrix, if memory allows: `torch.linalg.svdvals(op.to_dense())`."
                ) from error
    if entries > _DENSE_ENTRIES:
        raise ValueError(f"the dense matrix of this operator has {entries} entries: ask for the `k` largest singular values.")
    return torch.linalg.svdvals(op.to_dense())[:k]


def _on_grid(op: KernelOperator, grid: Grid, count: int) -> Tensor:
    """The union of the symbol's singular values over a frequency grid."""
    kernel = op.canonical()
    # along an axis with one tap only the phase of the symbol changes
    constant = [axis for axis in range(len(grid)) if kernel.shape[3 + axis] == 1]
    sizes = tuple(size for axis, (size, _) in enumerate(grid) if axis not in constant)
    repeats = prod(repeat for _, repeat in grid) * prod(grid[axis][0] for axis in constant)
    kernel = kernel.squeeze([3 + axis for axis in constant])
    theta, copies = half_plane(sizes, kernel)
    chunk = at_once(2 * kernel.element_size() * prod(kernel.shape[:3]))
    if len(theta) == 1:  # the only frequency is zero, where the symbol is real
        values = torch.linalg.svdvals(symbol(kernel, theta).real)
    else:
        at = _symbol_values(kernel, len(theta))
        values = torch.cat([at(part) for part in theta.split(chunk)])
    values = values.repeat_interleave(copies.long() * repeats, dim=0).flatten()
    values = values.sort(descending=True).values[:count]
    return torch.cat([values, values.new_zeros(count - len(values))])


def _symbol_values(kernel: Tensor, frequencies: int) -> Callable[[Tensor], Tensor]:
    """The function from frequencies to the singular values of the symbol, `(n, groups, min(rows, columns))`."""
    rows, columns = kernel.shape[1:3]
    if min(rows, columns) == 1:
        return lambda theta: torch.linalg.vector_norm(symbol(kernel, theta), dim=(-2, -1)).unsqueeze(-1)
    lags = prod(2 * taps - 1 for taps in kernel.shape[3:]) // 2 + 1
    oblong = 2 * max(rows, columns) >= 3 * min(rows, columns)
    traced = kernel.requires_grad and torch.is_grad_enabled()
    if oblong and not traced and frequencies > 2 * lags and kernel.dtype == torch.float32 and kernel.device.type == "cpu":
        # roots of eigenvalues lose half of the digits, and float64 has twice those of float32
        gram = Gram(kernel.double())
        return lambda theta: _gram_values(gram, theta).to(kernel.dtype)
    return lambda theta: torch.linalg.svdvals(symbol(kernel, theta))


def _gram_values(gram: Gram, theta: Tensor) -> Tensor:
    """Singular values as roots of the eigenvalues of `G(θ)`: `(n, groups, size)`, ascending."""
    angles = theta.to(gram.lags) @ gram.lags.T
    blocks = torch.complex(angles.cos() @ gram.even, -angles.sin() @ gram.odd).transpose(0, 1)
    return torch.linalg.eigvalsh(blocks.unflatten(2, (gram.size, gram.size))).clamp(min=0).sqrt()
