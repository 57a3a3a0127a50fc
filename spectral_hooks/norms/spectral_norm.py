"""The largest singular value of an operator."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from typing import cast

import torch
from torch import Tensor, nn

from ..linalg.krylov import largest, matrix_norm, seen_by, with_gradient
from ..linalg.memory import at_once
from ..linalg.precision import rounded_down
from ..linalg.scaling import check_finite, normalized
from ..linalg.symbols import half_plane, symbol
from ..operators.arguments import on_operator
from ..operators.base import KernelOperator, LinearOperator
from ..operators.composed import ComposedOperator
from ..operators.layers import as_operator
from .grid import grid_norm
from .lattice import lattice_norm

#: Symbols up to this size are decomposed in batches when many norms are asked for.
_BATCHED = 24


@on_operator
def spectral_norm(op: LinearOperator, rtol: float = 1e-3) -> Tensor:
    """The operator norm `‖A‖₂ = σ₁`.

    - lattice operator (a convolution without an input size): **certified**, `S ≤ value ≤ S (1 + rtol)` with
      `S = sup_θ ‖F(θ)‖₂`: an upper bound for the layer at every input size. Branch and bound, some hundred to some
      thousand evaluations of the symbol, whatever the input size, with proofs in float32 or, where rounding asks for it, float64;
    - matrices and circular convolutions: exact up to rounding;
    - other finite operators: matrix-free, to 1e-5, from below: what the operator does in float64 to the vector that was found
      (for convolutions the lattice norm bounds it from above).

    Args:
        op: any operator.
        rtol: relative width of the lattice certificate, at least 1e-6. Where the norm is attained at a point the cost hardly
            grows; where it is attained on a whole region, as after `projections.clip`, it grows like `rtol^(-d / 2)`.

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
    op = checked(op)
    if isinstance(op, KernelOperator):
        if op.weight.numel() == 0:  # no inputs or no outputs
            return op.weight.sum()
        if op.frequency_grid is not None or not op.is_finite:
            return _kernel_norm(op, rtol)
    if op.is_finite:
        _, left, right = largest(op)
        value = rounded_down(seen_by(op, right)[0], op.dtype)
        attained = (left[0] * op.matvec(right[0])).sum()
        return with_gradient(value, attained) if attained.requires_grad else value
    norms = torch.stack([_norm(factor, rtol) for factor in cast(ComposedOperator, op).factors])
    # a product of n numbers rounds n times
    return norms.prod() * (1 + len(norms) * torch.finfo(norms.dtype).eps)


def _kernel_norm(op: KernelOperator, rtol: float) -> Tensor:
    """The largest norm of a symbol: on the operator's own frequency grid, or anywhere."""
    weight, grid, kernel = op.weight, op.frequency_grid, op.canonical()
    if grid is not None:
        screen = torch.float64 if grid == () else kernel.dtype
        found = grid_norm(kernel, tuple(size for size, _ in grid), screen=screen)
        norm = found.value
    else:
        factor = op.lattice_factor
        # a little closer than asked: casts, and whoever compares with a sampled supremum, need room too
        found = lattice_norm(kernel, 0.8 * rtol)
        norm = found.upper * factor * (1 + torch.finfo(kernel.dtype).eps)
    value = kernel.new_tensor(norm)
    if grid is None and float(value) < norm:  # the cast must not round below, not even of what has few digits
        value = torch.nextafter(value, value.new_tensor(inf))
    if not weight.requires_grad:
        return value
    theta = found.theta[None]
    block = symbol(kernel[found.group : found.group + 1].to(theta), theta)[0, 0]
    attained = matrix_norm(block) * (norm / found.value if found.value else 1.0)
    return with_gradient(value, attained.to(kernel))


def checked(op: LinearOperator) -> LinearOperator:
    """The operator in float32 or better, if its weights are finite."""
    for factor in op.factors if isinstance(op, ComposedOperator) else (op,):
        if isinstance(factor, KernelOperator):
            check_finite(factor.weight)
    return op.to(torch.promote_types(op.dtype, torch.float32))


def spectral_norms(ops: Sequence[LinearOperator | nn.Module], rtol: float = 1e-3) -> list[Tensor]:
    """The norm of each of many operators, as by `spectral_norm`, with layers of equal shape treated together.

    Matrices and circular convolutions with equal canonical shape, of at most 24 rows or columns, go through one batched
    evaluation: up to ten times faster where the layers are small. All others take their turn: the branch and bound of a
    lattice operator looks at frequencies of its own for every kernel.

    Args:
        ops: any operators or layers, of any dtypes and devices.
        rtol: relative width of the lattice certificates, at least 1e-6.

    Returns:
        0-d tensors in the order of `ops`, each with the guarantee and the gradient of `spectral_norm`.

    Raises:
        ValueError: as `spectral_norm`.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> norms = sh.spectral_norms([sh.as_operator(layer) for layer in model])
        >>> [norm.shape for norm in norms], bool(norms[0] == sh.spectral_norm(sh.as_operator(model[0])))
        ([torch.Size([]), torch.Size([]), torch.Size([])], True)
    """
    if not 1e-6 <= rtol < 1:
        raise ValueError(f"`rtol` must lie in [1e-6, 1); got {rtol!r}.")
    alike: dict[tuple[object, ...], list[tuple[int, KernelOperator]]] = {}
    norms: dict[int, Tensor] = {}
    for i, op in enumerate(map(as_operator, ops)):
        grid = op.frequency_grid if isinstance(op, KernelOperator) else None
        if isinstance(op, KernelOperator) and grid is not None and min((kernel := op.canonical()).shape[1:3]) <= _BATCHED:
            alike.setdefault((grid, kernel.shape, kernel.dtype, kernel.device), []).append((i, op))
        else:
            norms[i] = spectral_norm(op, rtol)
    for members in alike.values():
        indices, together = zip(*members, strict=True)
        found = _norms_together(together) if len(together) > 1 else [spectral_norm(together[0], rtol)]
        norms.update(zip(indices, found, strict=True))
    return [norms[i] for i in range(len(ops))]


def _norms_together(ops: Sequence[KernelOperator]) -> list[Tensor]:
    """The norms of small operators with equal canonical shapes on equal frequency grids: one batch of eigenvalues."""
    grid = ops[0].frequency_grid
    assert grid is not None
    scaled = [normalized(op.canonical().detach()) for op in ops]
    kernels = torch.stack([kernel for kernel, _ in scaled])
    groups = kernels.shape[1]
    kernels = kernels.flatten(0, 1)
    theta, _ = half_plane(tuple(size for size, _ in grid), kernels)
    chunk = at_once(32 * prod(kernels.shape[:3]))
    squares = []
    for part in theta.split(chunk):
        blocks = symbol(kernels, part) if grid else symbol(kernels, part).real
        blocks = blocks.mT if blocks.shape[-2] > blocks.shape[-1] else blocks
        squares.append(torch.linalg.eigvalsh(blocks @ blocks.mH)[..., -1])
    # per operator, frequencies × groups
    table = torch.cat(squares).unflatten(1, (-1, groups)).movedim(1, 0).flatten(1)
    values, winners = table.clamp(min=0).sqrt().max(1)
    norms = []
    for i, (op, (_, scale)) in enumerate(zip(ops, scaled, strict=True)):
        dtype = torch.promote_types(op.weight.dtype, torch.float32)
        norm = (values[i] * scale).to(op.weight.device, dtype)
        if op.weight.requires_grad:
            where, group = divmod(int(winners[i]), groups)
            kernel = op.canonical()[group : group + 1].to(theta) / scale
            block = symbol(kernel, theta[where : where + 1])[0, 0]
            found = matrix_norm(block if grid else block.real)
            norm = with_gradient(norm, (found * scale).to(op.weight.device, dtype))
        norms.append(norm)
    return norms
