"""The clip of a wide kernel few of whose singular values lie above the level.

A kernel that is kept inside while it trains has a few singular values above the level at every frequency, a tenth of its
channels or fewer, and from step to step they are nearly the same. Subspaces of some more columns follow them: one step of
subspace iteration at each frequency of a sparse grid, and what is above the level there is taken away, in a few products instead
of a decomposition. Nothing is proven here.
"""

from __future__ import annotations

from math import pi, prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg.memory import STREAMED, at_once
from ..linalg.scaling import each
from ..linalg.symbols import half_plane, product, symbol
from ..operators.base import KernelOperator

#: Frequencies of the grid per axis, as a multiple of the kernel's degree `k - 1`; of these every other is taken, as of the white
#: squares of a chessboard.
_OVERSAMPLING = 4
#: Columns of a subspace: so many for every value above the level, and some more; a subspace that is filled by more than this
#: share has lost values, and one of more than this share of all channels is no gain over decompositions.
_COLUMNS_EACH, _MORE_COLUMNS, _FILLED, _LARGEST_SHARE = 1.5, 12, 0.9, 0.4
#: Rounds: the second one sees what the crop has left of the first.
_ROUNDS = 2


class Leading(NamedTuple):
    """A clipped kernel, and what the next clip starts from."""

    kernel: Tensor
    #: Orthonormal columns near the left singular vectors (of the smaller side) of the largest singular values, at each frequency
    #: and of each group: `(frequencies, groups, size, columns)`.
    vectors: Tensor


@torch.no_grad()
def clip_leading(op: KernelOperator, kernel: Tensor, level: float, leading: Tensor | None = None) -> Leading | None:
    """The canonical kernel with what is above the level taken away, nearly; None if that is not a few values.

        K ← K - τ P Σ_θ w(θ) exp(i t·θ) U₊ (1 - level / Σ₊) U₊* F(θ)

    with `P` the crop to the taps that the weight has, and the step length `τ ≥ 1` of Barzilai and Borwein (1988), since a crop
    takes away from a correction: the first round of `clip_kernel`, on a sparser grid, twice, with `U₊` from subspaces.

    Args:
        op: a lattice operator.
        kernel: its canonical kernel, or one of that shape, in the dtype to compute in.
        level: where to clip.
        leading: what the last clip of this operator returned; without it the symbols are decomposed, for some ten times the cost.

    Cost: for `N = (4 (k - 1))^d / 4` frequencies, `m` channels on the smaller side and `b` columns, some `10 N b m n` each round.
    """
    theta, shares = _chessboard(kernel)
    if leading is None:
        leading = _decomposed(kernel, theta, level)
    elif leading.shape[:3] != (len(theta), len(kernel), min(kernel.shape[1:3])):
        raise ValueError(f"`leading` must be of this kernel's last clip; got shape {tuple(leading.shape)}.")
    if leading is None:
        return None
    leading = leading.to(kernel.device, kernel.dtype.to_complex())
    for _ in range(_ROUNDS):
        correction, length, leading, most = _above(kernel, theta, shares, level, leading)
        if most > _FILLED * leading.shape[-1]:
            return None
        if not most:
            break
        cropped = op.with_weight(op.from_canonical(correction).to(kernel)).canonical()
        spread = cropped.square().flatten(1).sum(1)
        step = (length / spread.clamp(min=torch.finfo(spread.dtype).tiny)).clamp(min=1)
        kernel = kernel - cropped * each(step, kernel.ndim - 1)
    return Leading(kernel, leading)


def _chessboard(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Half of the white squares of a grid, `(n, d)`, and the share of them all that each stands for."""
    sizes = tuple(max(_OVERSAMPLING * (k - 1), 1) for k in kernel.shape[3:])
    theta, counts = half_plane(sizes, kernel)
    place = (theta * theta.new_tensor(sizes) / (2 * pi)).round().sum(1)
    white = place % 2 == 0
    return theta[white], counts[white] / counts[white].sum()


def _wide(blocks: Tensor) -> Tensor:
    """The same with no more rows than columns."""
    return blocks if blocks.shape[-2] <= blocks.shape[-1] else blocks.mT


def _parts(kernel: Tensor, theta: Tensor) -> list[slice]:
    """Frequencies a few at a time."""
    some = at_once(2 * kernel.element_size() * prod(kernel.shape[:3]), STREAMED // 4)
    return [slice(start, start + some) for start in range(0, len(theta), some)]


def _decomposed(kernel: Tensor, theta: Tensor, level: float) -> Tensor | None:
    """The leading vectors by decompositions; None if there are too many above the level."""
    size = min(kernel.shape[1:3])
    most, every = 0, []
    kept = int(_LARGEST_SHARE * size)
    for part in _parts(kernel, theta):
        blocks = _wide(symbol(kernel, theta[part]))
        squared, vectors = torch.linalg.eigh(blocks @ blocks.mH)
        most = max(most, int((squared > level**2).sum(-1).amax()))
        if _columns(most) > kept:
            return None
        every.append(vectors[..., size - kept :].clone())
    return torch.cat(every)[..., kept - _columns(most) :].clone()


def _columns(most: int) -> int:
    """Of a subspace for so many values."""
    return int(_COLUMNS_EACH * most) + _MORE_COLUMNS


def _above(kernel: Tensor, theta: Tensor, shares: Tensor, level: float, leading: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """What is above the level, as a kernel of these taps; of each group its mean square; the subspaces; the most values found."""
    angles = product([torch.arange(k) for k in kernel.shape[3:]], theta) @ theta.T
    waves = torch.polar(shares.expand_as(angles), angles)
    total = torch.zeros(len(waves), prod(kernel.shape[:3]), dtype=waves.dtype, device=kernel.device)
    length, most, subspaces = kernel.new_zeros(len(kernel)), 0, []
    for part in _parts(kernel, theta):
        blocks = symbol(kernel, theta[part])
        wide = _wide(blocks)
        basis = _orthonormal(wide @ (wide.mH @ leading[part]))
        image = wide.mH @ basis
        squared, turn = torch.linalg.eigh(image.mH @ image)
        sigma = squared.clamp(min=torch.finfo(squared.dtype).tiny).sqrt()
        gain = (1 - level / sigma).clamp(min=0)
        count = int((gain > 0).sum(-1).amax())  # ascending: the last ones
        most = max(most, count)
        first = gain.shape[-1] - count
        left = basis @ turn
        subspaces.append(left)
        if count:
            excess = (left[..., first:] * gain[..., None, first:]) @ (image @ turn[..., first:]).mH
            excess = excess if wide is blocks else excess.mT
            length = length + shares[part] @ torch.view_as_real(excess).square().flatten(2).sum(2)
            total += waves[:, part] @ excess.flatten(1)
    return total.real.T.reshape(kernel.shape), length, torch.cat(subspaces), most


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis, for columns that are not far from one: of Gram matrices, which costs a third of Householder's."""
    factor, failed = torch.linalg.cholesky_ex(columns.mH @ columns)
    if bool((failed != 0).any()):
        return torch.linalg.qr(columns).Q
    return torch.linalg.solve_triangular(factor.mH, columns, upper=True, left=False)
