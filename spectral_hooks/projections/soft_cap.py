"""Press large singular values down by polynomials, to a bound or just so."""

from __future__ import annotations

from math import isfinite, prod

import torch
from torch import Tensor

from ..linalg.scaling import check_finite
from ..norms.bracket import TOLERANCE, bracket
from ..operators.arguments import on_kernel
from ..operators.base import KernelOperator, is_number
from .arguments import check_max_norm, check_share
from .coupled import REACH, cap_matrices, coefficient, share_left
from .outside import project_outside, unchanged
from .rescale import rescale
from .settle import settle, settled
from .spectral_map import changed, map_singular_values

#: Norms beyond so many bounds are scaled to that first; from there a dozen caps, each by 19/81, reach the bound.
_MOST = 32.0


@on_kernel
@torch.no_grad()
def soft_cap(op: KernelOperator, max_norm: float = 1.0, *, strength: float | None = None, excess: float | None = None) -> Tensor:
    """Press large singular values down by odd polynomials, `p₂ ∘ p₁`, with `p₁(x) = x - αx³`, `p₂(x) = x + αx³` in units of `c`.

    Small values stay as they are up to `3 α² x⁵`; those near and above the bound shrink, all keep their order and their vectors.

    Without `strength` the cap is **coupled to the excess and guarantees the bound**: `α` is the least for which nothing up to the
    norm ends above `c`, the least root of `k - 3α²k⁵ + 3α³k⁷ - α⁴k⁹ = 1` with `k = ‖A‖ / c`. One such cap reaches `c` from up to
    `81/62 c`; for what is farther outside there are several, each taking 19/81 off the largest values, and above `32 c` a
    scaling before.

    With a `strength` `α` is that, and **there is no guarantee**: called at every step it balances growth, as a weight decay for
    large singular values only. Values above `1 / √(3α)` bounds, where `p₁` turns, are out of its reach: use `clip` first.

    Args:
        op: any operator; convolutions act on the clip's grid, crop, and, where the bound is guaranteed, are certified and scaled.
        max_norm: the bound, or the unit, `c > 0`.
        strength: `α`, from 0 to 1; None for the coupled cap.
        excess: a proven bound of how far the norm lies above `c`: `‖A‖₂ ≤ c + excess`. A matrix is then capped by products alone,
            and nothing is measured, so the guarantee is as good as this number. None to certify the norm.

    Returns:
        A weight of the same shape, dtype and device. Coupled: the norm of the stored values is at most `max_norm`, and what is
        inside stays bit for bit, as by `clip`.

    Raises:
        ValueError: an argument out of range, both `strength` and `excess`, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.soft_cap(sh.DenseOperator(torch.diag(torch.tensor([1.2, 0.1]))), excess=0.2)
        tensor([[1.0000, 0.0000],
                [0.0000, 0.1000]])
        >>> sh.projections.soft_cap(sh.DenseOperator(torch.diag(torch.tensor([1.0, 0.1]))), strength=0.1)
        tensor([[0.9729, 0.0000],
                [0.0000, 0.1000]])

    Source: Newhouse et al. (2025).
    """
    max_norm = check_max_norm(max_norm)
    if strength is not None:
        return _pressed(op, max_norm, strength, excess)
    if excess is None:
        return project_outside(op, max_norm, lambda part: _capped(part, max_norm))
    if not is_number(excess) or not (isfinite(excess) and excess >= 0):
        raise ValueError(f"`excess` must be a finite number of at least 0, or None; got {excess!r}.")
    if op.weight.numel() == 0:
        return unchanged(op)
    check_finite(op.weight)
    if not excess > TOLERANCE * max_norm:
        return unchanged(op)
    if not _is_matrix(op):
        return _mapped(op, max_norm, max_norm + float(excess))
    groups = op.canonical_shape[0]
    return _by_products(op, max_norm, torch.full((groups,), max_norm + float(excess), dtype=torch.float64))[0]


def _pressed(op: KernelOperator, max_norm: float, strength: float, excess: float | None) -> Tensor:
    """With a given `α`: no guarantee."""
    check_share("strength", strength)
    if excess is not None:
        raise ValueError("give `strength`, which guarantees nothing, or `excess`, which finds the strength that does; not both.")

    def pressed(s: Tensor, c: float) -> Tensor:
        # not in units of a bound so far above that nothing would be left
        s = s - strength * s * (s / c) ** 2
        return s + strength * s * (s / c) ** 2

    return changed(op, max_norm, pressed)


def _capped(op: KernelOperator, max_norm: float) -> Tensor:
    """The coupled cap of an operator all of whose groups are outside, by their certified norms."""
    check_finite(op.weight)
    norms = bracket(op)
    if bool((norms > _MOST * max_norm).any()):
        op = op.with_weight(rescale(op, _MOST * max_norm))
        norms = norms.clamp(max=_MOST * max_norm * (1 + TOLERANCE))
    if not _is_matrix(op):
        return _mapped(op, max_norm, float(norms.max()))
    weight, norms = _by_products(op, max_norm, norms)
    # among the smallest numbers of a dtype there may be no room for rounding
    return weight if bool((norms <= max_norm).all()) else settle(op, weight, max_norm)[0]


def _is_matrix(op: KernelOperator) -> bool:
    """Whether the norm of every group is that of the matrix in the canonical kernel."""
    shape = op.canonical_shape
    whole = prod(shape) == op.weight.numel() and prod(shape[3:]) == 1
    return whole and op.kind in ("matrix", "lattice") and op.lattice_factor == 1


def _by_products(op: KernelOperator, max_norm: float, norms: Tensor) -> tuple[Tensor, Tensor]:
    """Caps of matrices whose norms are at most these, each as far as it reaches, and what then bounds the norms."""
    kernel = op.canonical().detach()
    matrices = kernel.flatten(2) if kernel.ndim > 3 else kernel
    for level in _levels(float(norms.max()), max_norm):
        matrices, norms, _ = cap_matrices(matrices, norms, level)
    return op.from_canonical(matrices.reshape(kernel.shape)), norms


def _mapped(op: KernelOperator, max_norm: float, norm: float) -> Tensor:
    """The same for a kernel, on its grid and cropped, which takes it out again: so it is certified and scaled."""
    ratio = norm / max_norm

    def capped(s: Tensor, c: float) -> Tensor:
        top = ratio
        for level in _levels(ratio, 1.0):
            x = coefficient(torch.tensor(1 - level / top, dtype=torch.float64).clamp(0, 19 / 81))
            s = s * share_left((s / (top * c)).clamp(max=1), x.to(s))
            top = level
        return s

    unit, scale = map_singular_values(op, max_norm, capped)
    return settled(op, unit, scale, max_norm)[0]


def _levels(norm: float, max_norm: float) -> list[float]:
    """Where caps end that take a norm to the bound, each as far as it reaches."""
    levels: list[float] = []
    while norm > REACH * max_norm and norm < 2 * _MOST * max_norm:
        norm /= REACH
        levels.append(norm)
    return [*levels, max_norm]
