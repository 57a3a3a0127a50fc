"""Clip the singular values at a bound."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..linalg.precision import exact, float32_is_kept
from ..linalg.scaling import normalized
from ..norms.bracket import usual_rtol
from ..operators.arguments import on_kernel
from ..operators.base import KernelOperator, is_whole
from .arguments import check_max_norm
from .dual import clip_kernel
from .outside import project_outside
from .rescale import rescale
from .settle import in_dtype, settled

#: The rounds of convolutions with more channels than this are in float32, if they are no more than these.
_SINGLE_FROM, _SINGLE_ROUNDS = 32, 8
#: Only in dtypes as fine as this a clip that rounding has taken farther than scaling is preferred to that; what a proof needs.
_FINE, _PROVEN = 1e-6, 1e-10
#: From more channels on a certificate may add so much to the distance; and its largest width.
_DEAR, _WIDTH, _WIDEST = 64, 0.01, 0.015
#: What is measured in float32 may be too large by this.
_SINGLE_ERROR = 1e-6


@on_kernel
@torch.no_grad()
def clip(op: KernelOperator, max_norm: float = 1.0, *, rounds: int = 3) -> Tensor:
    """Clip the singular values at `max_norm`: near the closest weight, in Frobenius distance, with `‖A‖₂ ≤ max_norm`.

    For a matrix `W = U Σ Vᵀ`, and for every convolution that is one (a single tap after the polyphase form), the closest,
    `U min(Σ, c) Vᵀ`, to the rounding of its dtype, in float64 to 1e-9; a bound below 1e-14 of the norm clips singular values that
    are rounding themselves, and have any vectors. For other convolutions each of `rounds` clips the symbol's singular values on a
    frequency grid and crops to the kernel's taps (Sedghi, Gupta, Long 2019); the rounds are proximal steps on the dual of

        minimize ‖K - K₀‖²  subject to  ‖F(θ)‖₂ ≤ c on the grid.

    At the end the best mixture of the last two is taken, and scaled by the certified norm. For more than 64 channels the
    certificate is as wide as a hundredth of the relative change, but no wider than 1.5e-2, where that is more than the `r` below.
    The groups of a grouped convolution are operators of their own: each is clipped and scaled by itself, and those that are
    inside stay as they are.

    Rounds are in float32 for more than 32 channels; on CUDA devices by matrix products alone where the error, which is measured,
    is below 5e-5 of the norm (`linalg/matrix_functions.py`), else by eigenvalue decompositions. Neither shows in the guarantee.

    Args:
        op: any operator. The lattice operator of a convolution bounds the layer at every input size.
        max_norm: the bound `c > 0`.
        rounds: more bring a convolution closer to the original; `O(N^d c³)` each, with `N = 4 (k - 1)` or `6 (k - 1)`, whatever
            the input size. Up to three of more than 32 channels and far outside are at half of such a grid's frequencies.

    Returns:
        A weight of the same shape, dtype and device. Guaranteed: the norm of the returned, stored values is at most `max_norm`
        (certified for matrices, lattice and circular operators, to 1e-5 for others), and they are never farther from the
        original than `rescale`'s, in half precision too; a matrix's may be by their rounding. They are finite; a bound so small
        that no other weight of the dtype obeys it gives zeros.

        The very same values, bit for bit, if the norm is already at most `max_norm`: for matrices and circular operators. For
        lattice operators of several taps if it is at most `max_norm / (1 + r)`, with `r` the width of their certificate: 1e-3 for
        up to 8 channels (of the side that has fewer), 2e-3 for up to 64, 1e-2 for 320 and more. For other finite operators with
        `r` of 1e-5. In between they stay wherever the norm is proven within a limit of work, which can fail on a flat spectrum.

    Raises:
        ValueError: `max_norm` or `rounds` out of range, NaN or infinity in the weight, or a norm beyond the largest float64.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> sh.projections.clip(sh.DenseOperator(torch.diag(torch.tensor([3.0, 0.5]))), max_norm=1.0)
        tensor([[1.0000, 0.0000],
                [0.0000, 0.5000]])

    Sources: Sedghi, Gupta, Long 2019 (clip and crop); Wright, Nowak, Figueiredo 2009 (the proximal steps and their lengths);
    Amsel, Persson, Musco, Gower 2025 (the polynomials).
    """
    max_norm = check_max_norm(max_norm)
    if not is_whole(rounds) or rounds < 1:
        raise ValueError(f"`rounds` must be a positive int; got {rounds!r}.")
    return project_outside(op, max_norm, lambda part: _clip(part, max_norm, rounds))


def _clip(op: KernelOperator, max_norm: float, rounds: int) -> Tensor:
    """`clip` of an operator all of whose groups are outside."""
    if op.kind == "finite" and op.canonical_shape[0] > 1:
        # the level on the grid depends on the norm here, which every group has of its own
        return torch.cat([_clip(part, max_norm, rounds) for part in op.each_group()])
    kernel, scale = normalized(op.canonical())
    rough = _rough(op, kernel, rounds)
    clipped, peak = clip_kernel(op, kernel.float() if rough else kernel, max_norm / scale, rounds)
    clipped = clipped.to(kernel)
    clipped = settled(op, op.from_canonical(clipped), scale, max_norm, _width(kernel, clipped))[0]
    moved = _distances(clipped, op, scale) - _tie(op, clipped, scale)
    if op.kind == "lattice" or (op.kind != "finite" and op.is_pointwise):
        # the norm is no smaller than the peak, so scaling leaves at most this share; and rounding is monotone, so at least this
        # distance, entry by entry
        share = (max_norm / scale / peak.to(kernel) * (1 + (_SINGLE_ERROR if rough else 1e-12))).clamp(max=1)
        least = _distances(in_dtype(normalized(op.weight.detach())[0], scale * share, op.weight), op, scale)
        if bool((moved <= least).all()):
            return clipped
    scaled = rescale(op, max_norm)
    nearer = (moved <= _distances(scaled, op, scale)).repeat_interleave(len(scaled) // len(moved)).to(scaled.device)
    return torch.where(nearer.reshape(-1, *(1,) * (scaled.ndim - 1)), clipped, scaled)


def _width(kernel: Tensor, clipped: Tensor) -> float:
    """The relative width of the certificate: the usual one, or, of many channels, a share of how far the clip has gone.

    Scaling by it takes the kernel farther by no more than this share of its distance, and it costs some `1 / width`.
    """
    if min(kernel.shape[1:3]) <= _DEAR:
        return usual_rtol(kernel)
    moved, length = (torch.linalg.vector_norm(x.flatten(1), dim=1) for x in (clipped - kernel, clipped))
    return max(usual_rtol(kernel), min(_WIDTH * float((moved / length.clamp(min=1e-300)).amin()), _WIDEST))


def _tie(op: KernelOperator, clipped: Tensor, scale: float) -> Tensor | float:
    """By how much rounding, and the room that is left for it, may have taken a clip over `scale` farther, of every group.

    Where all but one singular value are small, a matrix is hardly nearer than its scaling, which would take these along.
    """
    eps = torch.finfo(op.weight.dtype).eps
    exactly = prod(op.canonical().shape[3:]) == 1 and not (op.is_finite and op.frequency_grid is None)
    if not exactly or eps > _FINE:
        return 0.0
    lengths = torch.linalg.vector_norm((exact(clipped) / scale).unflatten(0, (len(op.canonical()), -1)).flatten(1), dim=1)
    return 5 * max(eps, _PROVEN) * lengths


def _rough(op: KernelOperator, kernel: Tensor, rounds: int) -> bool:
    """Whether rounds in float32, twice as fast, end as near: what few of them leave is far more than its rounding."""
    large = prod(kernel.shape[3:]) > 1 and min(kernel.shape[1:3]) > _SINGLE_FROM
    return large and rounds <= _SINGLE_ROUNDS and op.weight.dtype != torch.float64 and float32_is_kept()


def _distances(weight: Tensor, op: KernelOperator, scale: float) -> Tensor:
    """Frobenius distances to the operator's weight over `scale`, of every group, in float64."""
    weight, original = (exact(x) / scale for x in (weight, op.weight))
    return torch.linalg.vector_norm((weight - original).unflatten(0, (op.canonical_shape[0], -1)).flatten(1), dim=1)
