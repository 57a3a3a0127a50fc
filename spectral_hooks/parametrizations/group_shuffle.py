"""Orthogonal matrices as two block-diagonal ones around a shuffle: cheap orthogonal layers, and fine-tuning by rotation."""

from __future__ import annotations

from math import prod
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..operators import as_operator
from ..spectrum import check_finite
from .remove import register
from .stiefel import cayley, householder, in_full_precision, origin, polar
from .tensor_train import as_stored, by_groups

Layer = TypeVar("Layer", bound=nn.Module)


def group_shuffle(layer: Layer, blocks: int = 8, *, fine_tune: bool = False, two_sided: bool = False) -> Layer:
    """Make a layer's weight a group-shuffle matrix, or fine-tune it by one.

        Q = Pᵀ L P R,

    with `L` and `R` block-diagonal, their `k` blocks of `b = n / k` by `b` orthogonal, and `P` the shuffle that deals the
    entries of every block out to all others. Exactly orthogonal; `n (b - 1)` degrees of freedom in place of `n (n - 1) / 2`.

    - `fine_tune=False`: `weight = Q`. Starts near the layer's weight: at the weight itself if it is of this form. The blocks
      are products of Householder reflections, which reach every orthogonal one.
    - `fine_tune=True` (GSOFT): `weight = Q W` with `W` frozen, or `Q W Q₂` if `two_sided`; `Q` acts on the output channels (of
      each group), `Q₂` on the inputs. At the start `L = R = I`, the shuffles cancel, and the weight is `W`, bit for bit. No
      singular value of the layer ever changes, whatever its kernel, stride and padding. The blocks are Cayley transforms, of
      `n (b - 1)` parameters. `sh.remove_spectral` merges: the plain layer has the same weight, bit for bit.

    Registered by `torch.nn.utils.parametrize`.

    Args:
        layer: for `fine_tune` any linear or convolutional layer, or transformers' `Conv1D`, else one whose weight is a square
            matrix (in each group): linear or with a kernel of size one. Changed in place. Its bias stays as it is.
        blocks: `k`, a divisor of the channels. At most their square root, every output depends on every input; without
            `fine_tune` it may not be more.
        fine_tune: rotate the frozen weight in place of making a new one.
        two_sided: rotate the inputs too; only with `fine_tune`.

    Returns:
        The layer. Plain checkpoints load into it: as the start above, or, for `fine_tune`, such that the weight is the
        checkpoint's with the rotations as they are.

    Cost: in each forward `2k` systems of `b × b`, and `2 n b` products for each column of the weight, whatever the batch.

    Raises:
        ValueError: `blocks` does not divide the channels, or another argument does not fit the layer; the weight is not finite,
            pruned, or parametrized from elsewhere.
        TypeError, NotImplementedError: as `as_operator`.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> from spectral_hooks.parametrizations.group_shuffle import group_shuffle
        >>> layer = group_shuffle(torch.nn.Linear(64, 64), blocks=8)
        >>> bool((layer.weight @ layer.weight.T - torch.eye(64)).abs().max() < 1e-6)
        True
        >>> conv = group_shuffle(torch.nn.Conv2d(3, 16, 3, stride=2), blocks=4, fine_tune=True)
        >>> [name for name, p in conv.named_parameters() if p.requires_grad]
        ['bias', 'parametrizations.weight.0.outer']

    Source: Gorbunov, Yudin, Soboleva, Alanov, Naumov and Rakhuba (2024).
    """
    op = as_operator(layer)
    check_finite(op.weight)
    groups = getattr(op, "groups", 1)
    outputs, inputs, *taps = by_groups(op.weight, groups, op.transposed).shape[1:]
    _check_blocks(blocks, outputs, "output")
    if fine_tune:
        if two_sided:
            _check_blocks(blocks, inputs, "input")
        rotated = Rotated(blocks, groups, op.transposed, outputs, inputs if two_sided else None)
        register(layer, rotated.to(op.weight))
        layer.parametrizations.weight.original.requires_grad_(False)  # type: ignore[union-attr]
        return layer
    if two_sided:
        raise ValueError("`two_sided` is for `fine_tune=True`: an orthogonal weight has one matrix.")
    if outputs != inputs or prod(taps) != 1:
        raise ValueError(
            f"`layer` must have a square matrix as its weight; got {outputs} x {inputs} with {prod(taps)} taps. For other shapes "
            "there is `fine_tune=True`, or another orthogonal parametrization."
        )
    if blocks**2 > outputs:
        raise ValueError(
            f"`blocks` must be at most the square root of the {outputs} channels, for else outputs do not see all inputs; "
            f"got {blocks}."
        )
    return register(layer, GroupShuffle(blocks, groups, op.transposed, tuple(op.weight.shape)))


def _check_blocks(blocks: int, channels: int, side: str) -> None:
    fits = isinstance(blocks, int) and not isinstance(blocks, bool) and 1 <= blocks < channels and channels % blocks == 0
    if not fits:
        raise ValueError(
            f"`blocks` must be an int that divides the {channels} {side} channels (of a group) into blocks of two or more; "
            f"got {blocks!r}."
        )


class GroupShuffle(nn.Module):
    """The parametrization that `group_shuffle` registers: what it keeps in place of the weight becomes `Q`.

    Args:
        blocks: as for `group_shuffle`.
        groups, transposed, shape: the layout of the weight.
    """

    def __init__(self, blocks: int, groups: int, transposed: bool, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.blocks, self.groups, self.transposed, self.shape = blocks, groups, transposed, shape

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}"

    def forward(self, free: Tensor) -> Tensor:
        matrix = in_full_precision(lambda free: _dense(*householder(free)))(free)
        return as_stored(matrix, self.transposed).reshape(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        kernel = by_groups(weight, self.groups, self.transposed).flatten(2)
        kernel = kernel.to("cpu" if kernel.device.type == "mps" else kernel.device).double()
        pairs = [self._factors(matrix) for matrix in kernel]
        blocks = torch.stack([torch.stack(side) for side in zip(*pairs, strict=True)])
        return origin("householder", blocks)[0].to(weight)

    def _factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks of `L` and `R` whose product is near the weight, and is the weight if that is of this form.

        Where a block of `L` and one of `R` meet, the weight is a product of a part of the columns of the one and of the rows of
        the other. Both are orthonormal, so the polar factor of the nearest matrix of that rank gives them.
        """
        k, b = self.blocks, len(weight) // self.blocks
        met = _shuffled(weight.unsqueeze(0), k).reshape(k, b, k, b)
        left, right = weight.new_zeros(2, k, b, b)
        for to in range(k):
            for source in range(k):
                # which rows of the block of R are dealt out to this block of L, and where there
                rows = [row for row in range(b) if to * b <= row * k + source < (to + 1) * b]
                places = [row * k + source - to * b for row in rows]
                u, _, vh = torch.linalg.svd(met[to, :, source])
                u, vh = u[:, : len(rows)], vh[: len(rows)]
                # any rotation between the two will do: one that takes the identity to identities
                turn = polar(vh[:, rows]).mT
                left[to][:, places] = u @ turn.mT
                right[source][rows] = turn @ vh
        return polar(left), polar(right)


class Rotated(nn.Module):
    """The parametrization that `group_shuffle` registers for fine-tuning: `W ↦ Q W`, or `Q W Q₂`.

    Args:
        blocks: as for `group_shuffle`.
        groups, transposed: the layout of the weight.
        outputs, inputs: channels of each group; None for sides that are not rotated.
    """

    def __init__(self, blocks: int, groups: int, transposed: bool, outputs: int, inputs: int | None) -> None:
        super().__init__()
        self.blocks, self.groups, self.transposed = blocks, groups, transposed
        self.outer = nn.Parameter(_start(blocks, groups, outputs))
        self.inner = None if inputs is None else nn.Parameter(_start(blocks, groups, inputs))

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, two_sided={self.inner is not None}"

    def forward(self, weight: Tensor) -> Tensor:
        return self._turned(weight, back=False)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return self._turned(weight, back=True)

    def _turned(self, weight: Tensor, back: bool) -> Tensor:
        kernel = by_groups(weight, self.groups, self.transposed)
        shape = kernel.shape
        kernel = _rotated(kernel.flatten(2), self.outer, self.blocks, back).reshape(shape)
        if self.inner is not None:
            columns = kernel.transpose(1, 2)
            turned = _rotated(columns.flatten(2), self.inner, self.blocks, not back)
            kernel = turned.reshape(columns.shape).transpose(1, 2)
        return as_stored(kernel, self.transposed)


def _start(blocks: int, groups: int, channels: int) -> Tensor:
    """What is taken to the identity."""
    size = channels // blocks
    return torch.zeros(2, groups, blocks, size * (size - 1) // 2)


def _rotated(x: Tensor, free: Tensor, blocks: int, back: bool) -> Tensor:
    """`Q x`, or `Qᵀ x` if `back`, for `x` of shape `(groups, n, columns)`."""
    return in_full_precision(lambda x, free: _product(x, free, blocks, back))(x, free)


def _product(x: Tensor, free: Tensor, blocks: int, back: bool) -> Tensor:
    left, right = _orthogonal(free, x.shape[1] // blocks)
    if back:
        return _times(right.mT, _unshuffled(_times(left.mT, _shuffled(x, blocks)), blocks))
    return _unshuffled(_times(left, _shuffled(_times(right, x), blocks)), blocks)


def _dense(left: Tensor, right: Tensor) -> Tensor:
    """`Q` as a matrix `(groups, n, n)`."""
    k, b = right.shape[1:3]
    if b % k:
        matrix = torch.stack([torch.block_diag(*blocks) for blocks in right])
        return _unshuffled(_times(left, _shuffled(matrix, k)), k)
    # Each block of L meets m = b / k entries of each block of R, so n² m products are enough.
    m = b // k
    columns = left.unflatten(3, (m, k)).permute(0, 1, 4, 2, 3)  # (groups, to, from, b, m)
    rows = right.unflatten(2, (k, m)).transpose(1, 2)  # (groups, to, from, m, b)
    return (columns @ rows).unflatten(3, (m, k)).permute(0, 4, 1, 3, 2, 5).flatten(4).flatten(1, 3)


def _times(diagonal: Tensor, x: Tensor) -> Tensor:
    """A block-diagonal matrix, given by its blocks `(groups, k, b, b)`, times `(groups, n, columns)`."""
    return (diagonal @ x.unflatten(1, diagonal.shape[1:3])).flatten(1, 2)


def _shuffled(x: Tensor, blocks: int) -> Tensor:
    return x.unflatten(1, (blocks, -1)).transpose(1, 2).flatten(1, 2)


def _unshuffled(x: Tensor, blocks: int) -> Tensor:
    return x.unflatten(1, (-1, blocks)).transpose(1, 2).flatten(1, 2)


def _orthogonal(free: Tensor, size: int) -> Tensor:
    """Free tensors `(..., size (size - 1) / 2)`, the lower triangles, as orthogonal blocks `(..., size, size)`."""
    rows, columns = torch.tril_indices(size, size, -1, device=free.device)
    lower = free.new_zeros(*free.shape[:-1], size * size).index_copy(-1, rows * size + columns, free)
    return cayley(lower.unflatten(-1, (size, size)))
