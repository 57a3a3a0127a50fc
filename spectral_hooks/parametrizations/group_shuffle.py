"""Orthogonal matrices as two block-diagonal ones around a shuffle: cheap orthogonal layers, and fine-tuning by rotation."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from ..linalg.precision import exact
from ..linalg.scaling import check_finite
from ..operators import ConvOperator, as_operator
from ..operators.padding import pad
from .geometry import Unstrided
from .memory import Memory
from .modules import CONV, OrthogonalConv
from .remove import check_assigned, register
from .skew import modulus_one, skew_bound
from .stiefel import bounded, householder, in_full_precision, lengths, origin, polar, polished
from .tensor_train import as_stored, by_groups

Layer = TypeVar("Layer", bound=nn.Module)

#: Of the polynomial of a skew convolution: as many convolutions, for an angle of up to 0.98.
_DEGREE = 4


@overload
def group_shuffle(
    layer: nn.modules.conv._ConvNd, blocks: int = 8, *, fine_tune: bool = False, two_sided: bool = False
) -> nn.Module: ...


@overload
def group_shuffle(layer: Layer, blocks: int = 8, *, fine_tune: bool = False, two_sided: bool = False) -> Layer: ...


def group_shuffle(layer: Any, blocks: int = 8, *, fine_tune: bool = False, two_sided: bool = False) -> Any:
    """Make a layer's weight a group-shuffle matrix, or a convolution orthogonal by one, or fine-tune any layer by one.

        Q = Pᵀ L P R,

    with `L` and `R` block-diagonal, their `k` blocks of `b = n / k` by `b` orthogonal, and `P` the shuffle that deals the
    entries of every block out to all others. Exactly orthogonal; `n (b - 1)` degrees of freedom in place of `n (n - 1) / 2`.

    - **A square matrix**, linear or a kernel of size one: `weight = Q`. Starts near the layer's weight: at the weight itself if
      it is of this form. The blocks are products of Householder reflections, which reach every orthogonal one.
    - **Any other convolution** (GS-SOC): a module `A = p(J) Q` in the layer's place, no convolution of a small kernel. `Q` mixes
      the channels, of a patch as large as the stride; where outputs are more or fewer than inputs it is a corner of `Q`.
      `p(J)` is the orthogonal convolution of `skew`, of degree 4, with `k` groups. Orthogonal under zero and circular padding:
      all singular values lie in `[1 - 3e-6, 1]`, up to the rounding of the dtype, for every weight and at every input size, with
      `AᵀA = I`, or `AAᵀ = I` where there are fewer outputs than inputs. `Q` starts near the middle tap of the layer's kernel `K`,
      `J` at the skew part of the blocks of `K Qᵀ`, no longer than 1.
    - `fine_tune=True` (GSOFT): `weight = Q W` with `W` frozen, or `Q W Q₂` if `two_sided`; `Q` acts on the output channels (of
      each group), `Q₂` on the inputs. At the start `L = R = I`, the shuffles cancel, and the weight is `W`, bit for bit. No
      singular value of the layer ever changes, whatever its kernel, stride and padding. The blocks are Cayley transforms, of
      `n (b - 1)` parameters. `sh.remove_spectral` merges: the plain layer has the same weight, bit for bit.

    All but GS-SOC are registered by `torch.nn.utils.parametrize`, and `sh.remove_spectral` makes them plain.

    Args:
        layer: linear, convolutional, or transformers' `Conv1D`; without `fine_tune` one with a square matrix (in each group) as
            its weight, or an `nn.Conv1d/2d/3d` as `skew` takes it: zero or circular padding that keeps the size, or divides it by
            the stride. Changed in place, or to be replaced. Its bias stays as it is.
        blocks: `k`, a divisor of the channels (for GS-SOC of the outputs, and of the inputs of a patch if these are more). At
            most their square root, every output depends on every input; without `fine_tune` it may not be more.
        fine_tune: rotate the frozen weight in place of making a new one.
        two_sided: rotate the inputs too; only with `fine_tune`.

    Returns:
        The layer, or the module to put in its place: `model.conv = group_shuffle(model.conv)`. Plain checkpoints load into it: as
        the start above, or, for `fine_tune`, such that the weight is the checkpoint's with the rotations as they are.

    Cost: in each forward `2k` systems of `b × b`, and `2 n b` products for each column of the weight, whatever the batch.
    GS-SOC: a 1×1 convolution (of a patch), four of the layer's kernel with `k` groups on the output channels, and their bound.

    Raises:
        ValueError: `blocks` does not divide the channels, or another argument does not fit the layer; the weight is not finite,
            pruned, or parametrized from elsewhere; a convolution changes the size by more than its stride.
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
    op = as_operator(layer)
    check_finite(op.weight)
    groups = getattr(op, "groups", 1)
    outputs, inputs, *taps = by_groups(op.weight, groups, op.transposed).shape[1:]
    _check_blocks(blocks, outputs, "output")
    if fine_tune:
        if two_sided:
            _check_blocks(blocks, inputs, "input")
        rotated = Rotated(blocks, groups, op.transposed, tuple(op.weight.shape), two_sided)
        register(layer, rotated.to(op.weight))
        layer.parametrizations.weight.original.requires_grad_(False)  # type: ignore[union-attr]
        return layer
    if two_sided:
        raise ValueError("`two_sided` is for `fine_tune=True`: an orthogonal weight has one matrix.")
    if outputs == inputs and prod(taps) == 1:
        _check_mixing(blocks, outputs)
        return register(layer, GroupShuffle(blocks, groups, op.transposed, tuple(op.weight.shape)))
    if isinstance(op, ConvOperator):
        return GroupShuffleConv(layer, blocks)
    raise ValueError(
        f"`layer` must be a convolution or have a square matrix as its weight; got {outputs} x {inputs}. For other shapes "
        "there is `fine_tune=True`, or another orthogonal parametrization."
    )


def _check_mixing(blocks: int, channels: int) -> None:
    if blocks**2 > channels:
        raise ValueError(
            f"`blocks` must be at most the square root of the {channels} channels, for else outputs do not see all inputs; "
            f"got {blocks}."
        )


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
        return as_stored(_matrix(free), self.transposed).reshape(self.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        check_assigned(weight, self.shape)
        return _near(by_groups(weight, self.groups, self.transposed).flatten(2), self.blocks)


class GroupShuffleConv(OrthogonalConv):
    """What `group_shuffle` puts in the place of a convolution: `A = p(J) Q`, a norm-preserving map of no single kernel.

    The parameters: `mixing` is what `Q` is made from, `(2, groups, k, b, b)`; `weight` the kernel `M` of `J = M - Mᵀ`, of stride
    1 and with `k` groups for each one of the layer; `bias` is the layer's.

    Args:
        layer: the convolution whose place this takes.
        blocks: as for `group_shuffle`.
    """

    mixing: Tensor

    def __init__(self, layer: Any, blocks: int) -> None:
        geometry = Unstrided.of(layer, "group_shuffle")
        channels = max(geometry.rows, geometry.columns)
        _check_blocks(blocks, channels, "output" if geometry.rows == channels else "patch")
        _check_mixing(blocks, channels)
        super().__init__(layer, "group_shuffle")
        self.blocks = blocks
        self._ratios = [after / before for before, after in pairwise(modulus_one(_DEGREE))]
        self._frames = Memory()
        for name, value in zip(("weight", "mixing"), self._converted(layer.weight), strict=True):
            setattr(self, name, nn.Parameter(value, requires_grad=layer.weight.requires_grad))
        self.register_load_state_dict_pre_hook(_load_plain)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, blocks={self.blocks}"

    def _map(self, x: Tensor) -> Tensor:
        """`p(J) Q x`; the polynomial by Horner's rule, a convolution per degree."""
        geometry, conv = self.geometry, CONV[self.geometry.dims]
        frame = self._frames(self, self.mixing, self._frame)
        x = conv(x, frame.flatten(0, 1).unflatten(1, (-1, *geometry.stride)), None, geometry.stride, groups=geometry.groups)
        generator = self._memory(self, self.weight, self._generator)
        reach = tuple(radius * geometry.dilation for radius in geometry.radius)
        circular = geometry.padding_mode == "circular"
        result = x
        for ratio in reversed(self._ratios):
            if circular:
                result = pad(result, "circular", tuple((amount, amount) for amount in reach))
            padding = 0 if circular else reach
            result = conv(result, generator * ratio, None, 1, padding, geometry.dilation, geometry.groups * self.blocks).add_(x)
        return result

    def _frame(self, mixing: Tensor) -> Tensor:
        """The corner of `Q`, `(groups, rows, columns)`: orthonormal columns, or rows where there are fewer."""
        matrix = _matrix(mixing.to(self.geometry.wide(mixing)))
        return matrix[:, : self.geometry.rows, : self.geometry.columns].contiguous()

    def _generator(self, weight: Tensor) -> Tensor:
        """The kernel of `J`, no longer than one."""
        kernel = weight.to(self.geometry.wide(weight)).unflatten(0, (self.geometry.groups * self.blocks, -1))
        kernel = kernel - kernel.transpose(1, 2).flip(tuple(range(3, kernel.ndim)))
        return kernel.flatten(0, 1) / skew_bound(kernel).clamp(min=1.0).to(kernel.dtype)

    @torch.no_grad()
    def _converted(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`weight` and `mixing` for a kernel `K`: `Q` near its middle tap, `J` the skew part of the blocks of `K Qᵀ`."""
        geometry = self.geometry
        middle: Any = (..., *geometry.radius)
        kernel = geometry.kernel(exact(weight))
        missing = geometry.columns - geometry.rows
        mixing = _near(F.pad(kernel[middle], (0, max(-missing, 0), 0, max(missing, 0))), self.blocks)
        turned = torch.einsum("goi...,gpi->gop...", kernel, self._frame(mixing))
        parts = turned.unflatten(2, (self.blocks, -1)).unflatten(1, (self.blocks, -1)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
        # strides of another memory format would make the outputs take it
        return (parts.flatten(0, 2) / 2).to(weight).contiguous(), mixing.to(weight)


def _load_plain(layer: GroupShuffleConv, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a state dict is loaded: the kernel of a plain layer, known by the lack of `mixing`, is converted."""
    names = [f"{prefix}{name}" for name in ("weight", "mixing")]
    geometry = layer.geometry
    plain = (geometry.groups * geometry.rows, geometry.in_channels, *geometry.kernel_size)
    if names[1] not in state and names[0] in state and state[names[0]].shape == plain:
        check_finite(state[names[0]])
        state.update(zip(names, layer._converted(state[names[0]].to(layer.weight.dtype)), strict=True))


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
        self.outer = nn.Parameter(_start(blocks, groups, outputs))
        self.inner = nn.Parameter(_start(blocks, groups, inputs)) if two_sided else None

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


@in_full_precision
def _rotated(x: Tensor, free: Tensor, blocks: int, back: bool) -> Tensor:
    """`Q x`, or `Qᵀ x` if `back`, for `x` of shape `(groups, n, columns)`."""
    left, right = _rotations(free.flatten(1, 2), x.shape[1] // blocks)
    parts = x.unflatten(1, (blocks, -1))
    if back:
        parts = _times(right.mT, _unshuffled(_times(left.mT, _shuffled(parts))))
    else:
        parts = _unshuffled(_times(left, _shuffled(_times(right, parts))))
    return parts.flatten(1, 2)


def _matrix(free: Tensor) -> Tensor:
    """`Q` as a matrix `(groups, n, n)`, its blocks the products of reflections by `free`, `(2, groups, k, b, b)`."""
    return in_full_precision(_Fused.apply if _is_fused(free) else _composed)(free)


def _is_fused(free: Tensor) -> bool:
    """Whether the derivative by hand will do: the blocks divide their size, and nothing but a plain backward is asked for."""
    recorded = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if free.shape[3] % free.shape[2] or recorded or is_functorch_wrapped_tensor(free):
        return False
    return forward_ad.unpack_dual(free).tangent is None


def _composed(free: Tensor) -> Tensor:
    return _dense(householder(free.flatten(1, 2)), free.shape[2])


class _Fused(torch.autograd.Function):
    """`_composed` where the `k` blocks divide their size, with a derivative by hand: of small matrices the calls are what costs.

    A block is `B = (I - V Uᵀ) D` with the signs `D`. Of its gradient `G` only `A = D (BᵀG - GᵀB) D` counts, since `BᵀdB` is skew,
    and `∂f/∂V = V · below(UᵀA U) - A U`. The lengths of the columns of `V` make no difference, so they are one.
    """

    @staticmethod
    def forward(ctx: Any, free: Tensor) -> Tensor:
        k, b = free.shape[2:4]
        x = free.reshape(-1, b, b)
        eye = torch.eye(b, dtype=free.dtype, device=free.device)
        below = torch.ones_like(eye).tril(-1)
        v = torch.addcmul(eye, x, below)
        norms = lengths(v)
        v = v / norms
        triangle = torch.bmm(v.mT, v).mul_(below.mT).add_(eye, alpha=0.5)
        ut = torch.linalg.solve_triangular(triangle, v.mT, upper=True)
        signs = x.diagonal(dim1=1, dim2=2).lt(0).to(x.dtype).mul_(2).sub_(1)
        q = polished(torch.baddbmm(eye, v, ut, alpha=-1)).mul_(signs.unsqueeze(1))
        columns, rows = _meeting(q.view(2, -1, b, b), k)
        ctx.save_for_backward(free, below, v, norms, ut, signs, q, columns, rows)
        return _dealt_out(torch.bmm(columns, rows), k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        free, below, v, norms, ut, signs, q, columns, rows = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            return torch.autograd.grad(_composed(free), free, grad, create_graph=True)[0]
        k, b = free.shape[2:4]
        # `_dealt_out` and `_meeting` backwards
        met = grad.reshape(-1, k, k, b // k, k, b).permute(0, 2, 4, 3, 1, 5).reshape(-1, b, b)
        at_q = torch.empty_like(q)
        left, right = at_q.view(2, -1, b, b)
        left.view(-1, b, b // k, k).permute(0, 3, 2, 1).copy_(torch.bmm(rows, met.mT).view(-1, k, b // k, b))
        right.view(-1, k, k, b // k, b).transpose(1, 2).copy_(torch.bmm(columns.mT, met).view(-1, k, k, b // k, b))
        turn = torch.bmm(q.mT, at_q)
        moved = torch.bmm(turn - turn.mT, (ut * signs.unsqueeze(1)).mT).mul_(signs.unsqueeze(2))
        return torch.baddbmm(moved, v, torch.bmm(ut, moved).mul_(below), beta=-1).mul_(below).div_(norms).view_as(free)


def _near(matrices: Tensor, blocks: int) -> Tensor:
    """What `_matrix` takes to matrices near these, `(groups, n, n)`, or to these if they are of its form."""
    wide = exact(matrices)
    pairs = [_factors(matrix, blocks) for matrix in wide]
    sides = torch.stack([torch.stack(side) for side in zip(*pairs, strict=True)])
    return origin("householder", sides)[0].to(matrices)


def _factors(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Blocks of `L` and `R` whose product is near a matrix, and is the matrix if that is of this form.

    Where a block of `L` and one of `R` meet, the matrix is a product of a part of the columns of the one and of the rows of the
    other. Both are orthonormal, so the polar factor of the nearest matrix of that rank gives them.
    """
    b = len(matrix) // k
    met = _shuffled(matrix.view(1, k, b, -1)).view(k, b, k, b)
    left, right = matrix.new_zeros(2, k, b, b)
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


def _dense(sides: Tensor, k: int) -> Tensor:
    """`Q` as a matrix `(groups, n, n)`, from the blocks of L and R, `(2, groups · k, b, b)`."""
    if sides.shape[-1] % k == 0:
        return _dealt_out(torch.bmm(*_meeting(sides, k)), k)
    left, right = sides
    matrix = torch.stack([torch.block_diag(*blocks) for blocks in right.unflatten(0, (-1, k))])
    return _unshuffled(_times(left, _shuffled(matrix.unflatten(1, (k, -1))))).flatten(1, 2)


def _meeting(sides: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The factors of `Q` where a block of L and one of R meet, in `m = b / k` entries: `n² m` products are enough for it all.

    Columns of the one and rows of the other, `(groups · to · from, b, m)` and `(..., m, b)`.
    """
    left, right = sides
    b = sides.shape[-1]
    columns = left.reshape(-1, b, b // k, k).permute(0, 3, 1, 2).reshape(-1, b, b // k)
    rows = right.reshape(-1, k, k, b // k, b).transpose(1, 2).reshape(-1, b // k, b)
    return columns, rows


def _dealt_out(met: Tensor, k: int) -> Tensor:
    """The products of these factors as a matrix `(groups, n, n)`."""
    b = met.shape[-1]
    return met.view(-1, k, k, b // k, k, b).permute(0, 4, 1, 3, 2, 5).reshape(-1, k * b, k * b)


def _times(diagonal: Tensor, x: Tensor) -> Tensor:
    """Block-diagonal matrices, given by their blocks `(groups · k, b, b)`, times `(groups, k, b, columns)`."""
    return torch.bmm(diagonal, x.flatten(0, 1)).view(x.shape)


def _shuffled(x: Tensor) -> Tensor:
    """`P x`, for `(groups, k, b, columns)`: the entries of a block, one after the other, to all others."""
    return x.transpose(1, 2).reshape(x.shape)


def _unshuffled(x: Tensor) -> Tensor:
    """`Pᵀ x`."""
    groups, k, b, columns = x.shape
    return x.reshape(groups, b, k, columns).transpose(1, 2).reshape(x.shape)


def _rotations(free: Tensor, size: int) -> Tensor:
    """The Cayley transforms, `(..., size, size)`, of lower triangles `(..., size (size - 1) / 2)`."""
    rows, columns = torch.tril_indices(size, size, -1, device=free.device)
    lower = free.new_zeros(*free.shape[:-1], size * size).index_copy(-1, rows * size + columns, free)
    lower = bounded(lower.unflatten(-1, (size, size)))
    eye = torch.eye(size, dtype=free.dtype, device=free.device)
    return polished(torch.linalg.inv(torch.add(eye / 2, lower.mT - lower, alpha=1 / 8)) - eye)
