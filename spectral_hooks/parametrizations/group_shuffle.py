"""Orthogonal matrices as two block-diagonal ones around a shuffle: cheap orthogonal layers, and fine-tuning by rotation."""

from __future__ import annotations

from math import prod
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from ..linalg.precision import exact
from ..linalg.scaling import check_finite
from ..operators import ConvOperator, as_operator
from ..projections.arguments import check_max_norm
from .arguments import check_reachable
from .group_shuffle_conv import GroupShuffleConv
from .layout import as_stored, by_groups
from .remove import check_assigned, register
from .shuffles import check_blocks, check_mixing, near, rotated, shuffle_matrix, start

Layer = TypeVar("Layer", bound=nn.Module)


@overload
def group_shuffle(
    layer: nn.modules.conv._ConvNd,
    max_norm: float = 1.0,
    *,
    blocks: int = 8,
    fine_tune: bool = False,
    two_sided: bool = False,
) -> nn.Module: ...


@overload
def group_shuffle(
    layer: Layer, max_norm: float = 1.0, *, blocks: int = 8, fine_tune: bool = False, two_sided: bool = False
) -> Layer: ...


def group_shuffle(layer: Any, max_norm: float = 1.0, *, blocks: int = 8, fine_tune: bool = False, two_sided: bool = False) -> Any:
    """Make a layer's weight a group-shuffle matrix, or a convolution orthogonal by one, or fine-tune any layer by one.

        weight = c Q,   Q = Pᵀ L P R,

    with `L` and `R` block-diagonal, their `k` blocks of `b = n / k` by `b` orthogonal, and `P` the shuffle that deals the
    entries of every block out to all others. Exactly orthogonal; `n (b - 1)` degrees of freedom in place of `n (n - 1) / 2`.

    - **A square matrix**, linear or a kernel of size one: `weight = c Q`. Starts near the layer's weight: at the weight itself
      if it is of this form. The blocks are products of Householder reflections, which reach every orthogonal one.
    - **Any other convolution** (GS-SOC): a module `A = c p(J) Q` in the layer's place, no convolution of a small kernel. `Q`
      mixes the channels, of a patch as large as the stride; where outputs are more or fewer than inputs it is a corner of `Q`.
      `p(J)` is the orthogonal convolution of `skew`, of degree 4, with `k` groups. Orthogonal under zero and circular padding:
      all singular values lie in `c [1 - 3e-6, 1]`, up to the rounding of the dtype, for every weight and at every input size,
      with `AᵀA = c² I`, or `AAᵀ = c² I` where there are fewer outputs than inputs. For a kernel `c K`, `Q` starts near the middle
      tap of `K`, and `J` at the skew part of the blocks of `K Qᵀ`, no longer than 1. A transposed convolution becomes the adjoint
      `Aᵀ` of what the convolution with the same kernel and geometry, from its outputs to its inputs, would become.
    - `fine_tune=True` (GSOFT): `weight = Q W` with `W` frozen, or `Q W Q₂` if `two_sided`; `Q` acts on the output channels (of
      each group), `Q₂` on the inputs. At the start `L = R = I`, the shuffles cancel, and the weight is `W`, bit for bit. No
      singular value of the layer ever changes, whatever its kernel, stride and padding. The blocks are Cayley transforms, of
      `n (b - 1)` parameters. `sh.remove_spectral` merges: the plain layer has the same weight, bit for bit.

    All but GS-SOC are registered by `torch.nn.utils.parametrize`, and `sh.remove_spectral` makes them plain.

    Args:
        layer: linear, convolutional, or transformers' `Conv1D`; without `fine_tune` one with a square matrix (in each group) as
            its weight, or a convolution as `skew` takes it: zero or circular padding that keeps the size, or divides it by
            the stride, or multiplies it, transposed. Changed in place, or to be replaced. Its bias stays as it is.
        max_norm: the gain `c > 0`, which all singular values are. Not with `fine_tune`, which keeps those of the layer's weight:
            bring that to the norm that it is to have before, by `sh.projections.clip` or `rescale`.
        blocks: `k`, a divisor of the channels (for GS-SOC of the outputs, and of the inputs of a patch if these are more;
            transposed the other way around). At most their square root, every output depends on every input; without `fine_tune`
            it may not be more.
        fine_tune: rotate the frozen weight in place of making a new one.
        two_sided: rotate the inputs too; only with `fine_tune`.

    Returns:
        The layer, or the module to put in its place: `model.conv = group_shuffle(model.conv)`. Plain checkpoints load into it: as
        the start above, or, for `fine_tune`, such that the weight is the checkpoint's with the rotations as they are.

    Cost: in each forward `2k` systems of `b × b`, and `2 n b` products for each column of the weight, whatever the batch.
    GS-SOC: a 1×1 convolution (of a patch), four of the layer's kernel with `k` groups on the output channels, and their bound.

    Raises:
        ValueError: `max_norm` is no positive number, or is given with `fine_tune`; `blocks` does not divide the channels, or
            another argument does not fit the layer; the weight is not finite, pruned, or parametrized from elsewhere; a
            convolution changes the size by more than its stride.
        TypeError, NotImplementedError: as `as_operator`, and as `skew` for convolutions of more than one tap.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> from spectral_hooks.parametrizations.group_shuffle import group_shuffle
        >>> layer = group_shuffle(torch.nn.Linear(64, 64), blocks=8)
        >>> bool((layer.weight @ layer.weight.T - torch.eye(64)).abs().max() < 1e-6)
        True
        >>> x, conv = torch.randn(2, 16, 7, 5), group_shuffle(torch.nn.Conv2d(16, 16, 3, padding=1, bias=False), blocks=4)
        >>> bool((conv(x).norm() / x.norm() - 1).abs() < 1e-5)
        True
        >>> conv = group_shuffle(torch.nn.Conv2d(3, 16, 3, stride=2), blocks=4, fine_tune=True)
        >>> [name for name, p in conv.named_parameters() if p.requires_grad]
        ['bias', 'parametrizations.weight.0.outer']

    Source: Gorbunov, Yudin, Soboleva, Alanov, Naumov and Rakhuba (2024).
    """
    check_max_norm(max_norm)
    op = as_operator(layer)
    check_finite(op.weight)
    groups = getattr(op, "groups", 1)
    outputs, inputs, *taps = by_groups(op.weight, groups, op.transposed).shape[1:]
    if fine_tune:
        _check_frozen(max_norm)
        check_blocks(blocks, outputs, "output")
        if two_sided:
            check_blocks(blocks, inputs, "input")
        turned = Rotated(int(blocks), groups, op.transposed, tuple(op.weight.shape), two_sided)
        register(layer, turned.to(op.weight))
        layer.parametrizations.weight.original.requires_grad_(False)  # type: ignore[union-attr]
        return layer
    if two_sided:
        raise ValueError("`two_sided` is for `fine_tune=True`: an orthogonal weight has one matrix.")
    if outputs == inputs and prod(taps) == 1:
        check_blocks(blocks, outputs, "output")
        check_mixing(blocks, outputs)
        check_reachable("max_norm", float(max_norm), op.dtype)
        return register(layer, GroupShuffle(int(blocks), groups, op.transposed, tuple(op.weight.shape), max_norm))
    if isinstance(op, ConvOperator):
        return GroupShuffleConv(layer, max_norm, blocks)
    raise ValueError(
        f"`layer` must be a convolution or have a square matrix as its weight; got {outputs} x {inputs}. For other shapes "
        "there is `fine_tune=True`, or another orthogonal parametrization."
    )


def _check_frozen(max_norm: float) -> None:
    if max_norm != 1:
        raise ValueError(
            f"`max_norm` is for orthogonal weights; got {max_norm!r} with `fine_tune=True`, which keeps the singular values of "
            "the layer's weight: bring that to a norm before, by sh.projections.clip or rescale."
        )


class GroupShuffle(nn.Module):
    """The parametrization that `group_shuffle` registers: what it keeps in place of the weight becomes `max_norm · Q`.

    Args:
        blocks: as for `group_shuffle`.
        groups, transposed, shape: the layout of the weight.
        max_norm: the gain.
    """

    def __init__(self, blocks: int, groups: int, transposed: bool, shape: tuple[int, ...], max_norm: float = 1.0) -> None:
        super().__init__()
        self.blocks, self.groups, self.transposed, self.shape = blocks, groups, transposed, shape
        self.max_norm = check_max_norm(max_norm)

    def extra_repr(self) -> str:
        return f"max_norm={self.max_norm}, blocks={self.blocks}"

    def forward(self, free: Tensor) -> Tensor:
        return as_stored(shuffle_matrix(free, self.max_norm), self.transposed).reshape(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        check_assigned(weight, self.shape)
        kernel = exact(by_groups(weight, self.groups, self.transposed).flatten(2))
        return near(kernel / self.max_norm, self.blocks).to(weight)


class Rotated(nn.Module):
    """The parametrization that `group_shuffle` registers for fine-tuning: `W ↦ Q W`, or `Q W Q₂`.

    Args:
        blocks: as for `group_shuffle`.
        groups, transposed, shape: the layout of the weight.
        two_sided: whether the inputs are rotated too.
    """

    def __init__(self, blocks: int, groups: int, transposed: bool, shape: tuple[int, ...], two_sided: bool) -> None:
        super().__init__()
        self.blocks, self.groups, self.transposed, self.shape = blocks, groups, transposed, shape
        outputs, inputs = by_groups(torch.empty(shape, device="meta"), groups, transposed).shape[1:3]
        self.outer = nn.Parameter(start(blocks, groups, outputs))
        self.inner = nn.Parameter(start(blocks, groups, inputs)) if two_sided else None

    def extra_repr(self) -> str:
        return f"blocks={self.blocks}, two_sided={self.inner is not None}"

    def forward(self, weight: Tensor) -> Tensor:
        return self._turned(weight, back=False)

    def right_inverse(self, weight: Tensor) -> Tensor:
        check_assigned(weight, self.shape)
        return self._turned(weight, back=True)

    def _turned(self, weight: Tensor, back: bool) -> Tensor:
        kernel = by_groups(weight, self.groups, self.transposed)
        shape = kernel.shape
        kernel = rotated(kernel.flatten(2), self.outer, self.blocks, back).reshape(shape)
        if self.inner is not None:
            columns = kernel.transpose(1, 2)
            turned = rotated(columns.flatten(2), self.inner, self.blocks, not back)
            kernel = turned.reshape(columns.shape).transpose(1, 2)
        return as_stored(kernel, self.transposed)
