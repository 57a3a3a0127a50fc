"""Which groups of an operator are outside of the ball."""

from __future__ import annotations

import copy
from collections.abc import Callable
from math import inf
from typing import cast

import torch
from torch import Tensor

from ..linalg.precision import exact, float32_is_kept
from ..linalg.scaling import normalized
from ..norms.groups import grid_norms, lattice_norms
from ..norms.spectral_norm import spectral_norm
from ..operators.base import KernelOperator
from ..operators.conv import ConvOperator

#: A norm this little above the bound is rounding, and counts as inside.
TOLERANCE = 1e-6
#: Power steps that may show a matrix of this size to be outside, by this much at least: more than rounding.
_GLANCES, _LARGE, _SEEN = 6, 384, 1e-4
#: What a matrix-free norm may lack.
_MATRIX_FREE_ERROR = 1e-5


def unchanged(op: KernelOperator) -> Tensor:
    """The operator's own tensor, so that a caller can tell by identity that nothing was done."""
    return op.weight.detach() if op.weight.requires_grad else op.weight


def project_outside(op: KernelOperator, max_norm: float, projection: Callable[[KernelOperator], Tensor]) -> Tensor:
    """The weight with the projection of the groups that are outside of the ball; the others stay as they are."""
    if op.weight.numel() == 0:
        return unchanged(op)
    outside = norms_above(op, max_norm) > max_norm * (1 + TOLERANCE)
    if not outside.any():
        return unchanged(op)
    if outside.all():
        return projection(op)
    weight, index = op.weight.detach().clone(), outside.nonzero().flatten().to(op.weight.device)
    weight.unflatten(0, (len(outside), -1))[index] = projection(_part(op, index)).unflatten(0, (len(index), -1))
    return weight


def _part(op: KernelOperator, groups: Tensor) -> KernelOperator:
    """The operator of these groups of a convolution alone."""
    part = cast(ConvOperator, copy.copy(op))
    part.weight = op.weight.detach().unflatten(0, (part.groups, -1))[groups].flatten(0, 1)
    part.groups = len(groups)
    return part


def each_group(op: KernelOperator) -> list[KernelOperator]:
    """Each group as an operator of its own."""
    return [_part(op, group) for group in torch.arange(len(op.canonical()), device=op.weight.device).split(1)]


def norms_above(op: KernelOperator, target: float | None = None, rtol: float | None = None) -> Tensor:
    """For each group a number not below its norm; with a `target`, only so close as tells on which side of it the norm lies."""
    grid, kernel = op.frequency_grid, op.canonical()
    rtol = rtol or _rtol(kernel)
    if grid is not None and grid != ():
        return grid_norms(kernel, tuple(size for size, _ in grid))
    factor = op.lattice_factor
    if grid == () and target is not None and _seen_above(kernel, target):
        return torch.full((1,), inf, dtype=torch.float64)
    if not op.is_finite or grid == ():
        return factor * lattice_norms(kernel, rtol, None if target is None else target * (1 + TOLERANCE) / factor)
    if target is not None:
        everywhere = factor * lattice_norms(kernel, rtol, target / factor)
        if bool((everywhere <= target).all()):
            return everywhere
    if len(kernel) == 1:
        # over a power of two, so that a norm between the smallest numbers of the dtype is not rounded to one of them
        unit, scale = normalized(op.weight.detach())
        dtype = torch.promote_types(op.weight.dtype, torch.float32)
        norm = float(spectral_norm(op.with_weight(unit.to(op.weight.device, dtype)))) * scale
        return torch.tensor([norm * (1 + _MATRIX_FREE_ERROR)], dtype=torch.float64)
    return torch.cat([norms_above(part, target, rtol) for part in each_group(op)])


def _seen_above(kernel: Tensor, target: float) -> bool:
    """Whether some vector shows that the norm of a large matrix lies above the target: far cheaper than a failing proof."""
    if min(kernel.shape[1:]) < _LARGE or kernel.is_meta:
        return False
    matrix = kernel[0].detach().to(torch.promote_types(kernel.dtype, torch.float32 if float32_is_kept() else torch.float64))
    # the products of unit vectors with the matrix are in range where the matrix is; their squares need not be
    vector = _unit(matrix[torch.linalg.vector_norm(matrix, dim=1).argmax()])
    for _ in range(_GLANCES):
        image = matrix @ vector
        if inf > _length(image) > target * (1 + _SEEN):  # NaN is not
            # long sums in float32 lose digits
            vector = _exact(vector)
            return _length(_exact(matrix) @ vector) > target * _length(vector)
        vector = _unit(matrix.mT @ _unit(image))
    return False


def _exact(x: Tensor) -> Tensor:
    """In float64, which Apple's GPUs do not have."""
    return exact(x.detach())


def _length(vector: Tensor) -> float:
    """The norm of a vector, of any scale, as a float64."""
    return float(torch.linalg.vector_norm(_exact(vector)))


def _unit(vector: Tensor) -> Tensor:
    """The vector, of any scale, over its norm."""
    long = _exact(vector)
    return (long / torch.linalg.vector_norm(long)).to(vector)


def _rtol(kernel: Tensor) -> float:
    """Relative width of the certificate, which the final scaling may take too much: 1e-3, up to 1e-2 where it is dear.

    A clipped kernel has its largest singular value at many frequencies; proving that takes some `1 / rtol` of them, at the cube
    of the channels each.
    """
    size = min(kernel.shape[1:3])
    return 1e-3 if size <= 8 else min(2e-3 * max(size / 64, 1.0), 1e-2)
