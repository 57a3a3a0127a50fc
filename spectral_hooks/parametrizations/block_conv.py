"""Explicit orthogonal kernels: a convolution that is orthogonal at every frequency, as a product of projector pairs.

With an orthogonal projector `P`, the two taps `[P, I - P]` have the symbol `P + (I - P) exp(-iθ)`, which is unitary. So is a
product of such pairs along the axes, and a matrix with orthonormal rows or columns on either side keeps them orthonormal. In the
canonical form of a kernel with `k` taps and stride `s` per axis (dilation only changes which stride counts) each group is

    K = E ⊛ F₁ ⊛ … ⊛ F_L ⊛ N,     F_i = [P_i, I - P_i] along one axis,  k - s of them for each axis,

- `E`, the exit: `s` taps, orthonormal as a matrix `rows × (middle · Πs)`;
- the pairs: projectors of `middle` channels, of rank `⌊c/2⌋` and `⌈c/2⌉` in turn, so that a single tap in the middle is possible;
- `N`, the entry: `middle × columns` with orthonormal columns, where there are more rows than `columns · Πs`, so that `middle` is
  more than `columns`. Without a stride the exit then falls away.

Square orthogonal kernels of one size fall into components, which no path connects: along each axis one has a mean delay, which
counts in steps, and that of these products is the middle one. So a single tap is among them in the middle of an odd kernel, and
nowhere in an even one.

Source: Li, Haque, Anil, Lucas, Grosse and Jacobsen (2019); strides, dilations and groups: Boissin et al. (2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, pi, prod
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linalg.precision import widest
from .stiefel import polar_factor

#: The factors of a kernel by name, those that it has: `exit`, `frames` of the projectors, `entry`.
Parts = dict[str, Tensor]

#: The most rounds of the search for the nearest kernel, and the share that a round must gain to be followed by another.
_QUICK, _THOROUGH = (30, 1e-3), (100, 1e-6)
#: A kernel this near, relative, has been taken apart exactly, or could be but for the rounding of its entries.
_EXACT, _NEAR = 1e-7, 0.1
#: Beyond, relative to the gain, a weight is taken for its direction alone.
_HUGE = 1e10
#: Eigenvalues of a Gram matrix this small, relative, are rounding of a float32 kernel.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Blocks:
    """The sizes of one kernel's factors; no stride exceeds its axis' taps."""

    groups: int
    rows: int
    columns: int
    taps: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], groups: int, stride: Sequence[int], dilation: Sequence[int]) -> Blocks:
        """For a convolution with a weight of this shape, `(out, in / groups, *taps)`."""
        taps = tuple(shape[2:])
        # dilated taps t and t + s / gcd(s, δ) meet the same samples
        strides = tuple(min(s // gcd(s, d), k) for s, d, k in zip(stride, dilation, taps, strict=True))
        return cls(groups, shape[0] // groups, shape[1], taps, strides)

    @property
    def axes(self) -> list[tuple[int, bool]]:
        """For each pair its axis, and whether it is `[I - P, P]`: every other one, for ranks in turn."""
        return [(axis, i % 2 == 1) for axis, (k, s) in enumerate(zip(self.taps, self.strides, strict=True)) for i in range(k - s)]

    @property
    def middle(self) -> int:
        """Channels of the projectors: as many as leave the exit orthonormal."""
        return max(self.columns, self.rows // prod(self.strides)) if self.axes else self.columns

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each factor; `frames` span the projectors' ranges."""
        phases, middle = prod(self.strides), self.middle
        shapes: dict[str, tuple[int, ...]] = {}
        if phases > 1 or middle == self.columns:
            shapes["exit"] = (self.groups, self.rows, middle * phases)
        if self.axes and middle > 1:
            shapes["frames"] = (self.groups, len(self.axes), middle, middle // 2)
        if middle > self.columns:
            shapes["entry"] = (self.groups, middle, self.columns)
        return shapes


def compose(blocks: Blocks, parts: Parts) -> Tensor:
    """The weight `(groups · rows, columns, *taps)` of these factors. Multi-affine in exit, projectors and entry."""
    frames = parts.get("frames")
    return _product(blocks, parts, parts["exit"].new_zeros(()) if frames is None else frames @ frames.mT)


def _product(blocks: Blocks, parts: Parts, projectors: Tensor) -> Tensor:
    exit, entry = parts.get("exit"), parts.get("entry")
    factors = list(
        zip(blocks.axes, projectors.expand(blocks.groups, len(blocks.axes), *[blocks.middle] * 2).unbind(1), strict=True)
    )
    if exit is not None:
        exit = _lay_out(exit.unflatten(2, (blocks.middle, *blocks.strides)))
    if entry is None:
        kernel = cast(Tensor, exit)
        for (axis, flipped), projector in factors:
            kernel = _times_pair(kernel, projector, 1 + axis, flipped)
    else:
        # from the side with fewer channels; projectors are symmetric
        kernel = entry.mT.reshape(blocks.groups, *[1] * len(blocks.taps), blocks.columns, blocks.middle)
        for (axis, flipped), projector in reversed(factors):
            kernel = _times_pair(kernel, projector, 1 + axis, flipped)
        kernel = kernel.mT
        kernel = kernel if exit is None else _block_convolution(exit, kernel)
    return kernel.movedim((-2, -1), (1, 2)).flatten(0, 1)


def _lay_out(kernel: Tensor) -> Tensor:
    """`(groups, rows, columns, *taps)` as `(groups, *taps, rows, columns)`, as the functions below take it."""
    return kernel.movedim((1, 2), (-2, -1))


def _times_pair(kernel: Tensor, projector: Tensor, axis: int, flipped: bool) -> Tensor:
    """`kernel ⊛ [P, I - P]` along an axis, or `kernel ⊛ [I - P, P]`."""
    inside = (kernel.flatten(1, -2) @ projector).view(kernel.shape)
    outside = kernel - inside
    first, second = (outside, inside) if flipped else (inside, outside)
    edge = torch.zeros_like(kernel.narrow(axis, 0, 1))
    return torch.cat([first, edge], axis) + torch.cat([edge, second], axis)


def _block_convolution(left: Tensor, right: Tensor) -> Tensor:
    """The kernel of two convolutions in turn."""
    places = torch.cartesian_prod(*[torch.arange(n) for n in left.shape[1:-2]]).reshape(-1, left.ndim - 3)
    ones = [1] * (left.ndim - 3)
    terms = []
    for place in places.tolist():
        index: tuple[Any, ...] = (slice(None), *place)
        tap = left[index].reshape(len(left), *ones, *left.shape[-2:])
        # F.pad counts axes from the last one
        pads = [amount for at, n in zip(reversed(place), reversed(left.shape[1:-2]), strict=True) for amount in (at, n - 1 - at)]
        terms.append(F.pad(tap @ right, [0, 0, 0, 0, *pads]))
    return torch.stack(terms).sum(0)


# -- from a kernel to its factors ---------------------------------------------------------------------------------------------


@torch.no_grad()
def decompose(blocks: Blocks, weight: Tensor, gain: float = 1.0) -> Parts:
    """Factors whose product, times a gain, is near a weight, and the weight itself where it is such a product.

    First pair by pair from the end: the first taps of a product lie in the range of its last projector and the last taps in the
    complement, which for a product in general position tells the projector. Between an exit and an entry the pairs are laid bare
    before, see `_unfolded`. For any other weight the leading eigenvectors are a start, and rounds follow: `‖K‖_F` is fixed and
    `⟨W, K⟩` affine in each factor, so given the others the nearest kernel has a polar factor of the gradient, or the projector on
    its leading eigenvectors. No round goes away from the weight.
    """
    # rounding of the float32 kernel would decide between eigenvectors
    w = weight.detach().to(widest(weight.device))
    if w.is_meta:
        return {name: w.new_empty(shape) for name, shape in blocks.shapes.items()}
    # the length only tells whether it is a product, which a huge one is not, and its squares would overflow
    w = w / (largest if (largest := float(w.abs().amax())) > _HUGE * gain else gain)
    tall = {"exit", "entry"} <= set(blocks.shapes)
    parts = _unfolded(blocks, w) if tall else _peeled(blocks, w)
    distance = float((compose(blocks, parts) - w).norm()) / float(w.norm().clamp(min=torch.finfo(w.dtype).tiny))
    if distance <= _EXACT:
        return parts
    if tall and distance > _NEAR:
        parts = _spread(blocks, w)
    reached = float((compose(blocks, parts) * w).sum())
    rounds, gain = _THOROUGH if tall or distance <= _NEAR else _QUICK
    for _ in range(rounds):
        before, reached = reached, _round_(blocks, parts, w)
        if not reached - before > gain * abs(reached):
            break
    return parts


def _round_(blocks: Blocks, parts: Parts, w: Tensor) -> float:
    """Each factor in turn becomes the best one given the others; returns `⟨W, K⟩`."""
    frames = parts.get("frames")
    pairs = [w.new_zeros(())] * len(blocks.axes) if frames is None else [*(frames @ frames.mT).unbind(1)]

    def gradient(held: Tensor) -> Tensor:
        with torch.enable_grad():
            held.requires_grad_()
            square = (blocks.groups, blocks.middle, blocks.middle)
            projectors = torch.stack([pair.expand(square) for pair in pairs], 1) if pairs else w.new_zeros(())
            (result,) = torch.autograd.grad((_product(blocks, parts, projectors) * w).sum(), held)
        held.requires_grad_(False)
        return result

    for name in ("exit", "entry"):
        if name in parts:
            parts[name] = polar_factor(gradient(parts[name]))
    if frames is not None:
        found = []
        for i, pair in enumerate(pairs):
            found.append(_leading(gradient(pair), frames.shape[-1]))
            pairs[i] = found[i] @ found[i].mT
        parts["frames"] = torch.stack(found, 1)
    return float((compose(blocks, parts) * w).sum())


def _peeled(blocks: Blocks, w: Tensor) -> Parts:
    """The factors found one by one from the end, `w` then what is left."""
    shapes, eye = blocks.shapes, torch.eye(blocks.middle, dtype=w.dtype, device=w.device)
    # without an exit, from the other end
    mirrored = "exit" not in shapes
    kernel = _lay_out(w.unflatten(0, (blocks.groups, -1)))
    kernel = kernel.mT if mirrored else kernel
    found: dict[int, Tensor] = {}
    order = list(enumerate(blocks.axes))
    for i, (axis, flipped) in order if mirrored else reversed(order):
        first, last = (kernel.select(1 + axis, at).flatten(1, -2) for at in (0, -1))
        gram = first.mT @ first - last.mT @ last
        found[i] = _leading(-gram if flipped else gram, blocks.middle // 2)
        inside = found[i] @ found[i].mT
        now, after = (eye - inside, inside) if flipped else (inside, eye - inside)
        shape = [size - (i == 1 + axis) for i, size in enumerate(kernel.shape)]
        before, behind = (kernel.narrow(1 + axis, at, shape[1 + axis]).flatten(1, -2) for at in (0, 1))
        # the inverse of a pair is its adjoint
        kernel = (before @ now + behind @ after).view(shape)
    rest = polar_factor(kernel.movedim((-2, -1), (1, 2)).flatten(2))
    parts = {"entry": rest.mT} if mirrored else {"exit": rest}
    if "frames" in shapes:
        parts["frames"] = torch.stack([found[i] for i in range(len(blocks.axes))], 1)
    return parts


def _unfolded(blocks: Blocks, w: Tensor) -> Parts:
    """The factors of a product with an exit and an entry; of any other weight, some factors.

    With `G = F₁ ⊛ … ⊛ F_L ⊛ N` the exit drops out of the Gram matrix of the taps: over the phases `p` of the stride,

        KᵀK[t, u] = Σ_p GᵀG[t - p, u - p]    hence    GᵀG[t, u] = Σ_n KᵀK[t - ns, u - ns] - KᵀK[t - ns - 1, u - ns - 1],

    here written for a single axis. That tells `G` up to a rotation from the left, which exit and projectors take up.
    """
    dims, middle = len(blocks.taps), blocks.middle
    taps = tuple(k - s + 1 for k, s in zip(blocks.taps, blocks.strides, strict=True))
    gram = w.unflatten(0, (blocks.groups, -1)).flatten(2)
    gram = (gram.mT @ gram).unflatten(2, (-1, *blocks.taps)).unflatten(1, (-1, *blocks.taps))
    for axis, (size, stride) in enumerate(zip(taps, blocks.strides, strict=True)):
        axes = 2 + axis, 3 + dims + axis
        gram = _without_phases(gram, axes, size, stride)
    values, vectors = torch.linalg.eigh(gram.flatten(1, 1 + dims).flatten(2))
    values = torch.where(values > _ROUNDING * values.amax(), values, 0)[..., -middle:]
    inner = F.pad((vectors[..., -middle:] * values.sqrt().unsqueeze(-2)).mT, [0, 0, 0, middle - values.shape[-1]])
    # what of the kernel an inner one meets at each phase: (groups, rows, columns, phases, taps)
    windows = w.unflatten(0, (blocks.groups, -1))
    for axis, size in enumerate(taps):
        windows = windows.unfold(3 + axis, size, 1)
    windows = windows.flatten(3 + dims).flatten(3, 2 + dims)

    def exit_of(inner: Tensor) -> Tensor:
        inner = inner.unflatten(2, (blocks.columns, -1))
        return polar_factor(torch.einsum("grcpt,gmct->grmp", windows, inner).flatten(2))

    # the root has lost half of the digits of what is small; given the exit, the inner kernel is a mean over the phases
    exit = exit_of(inner).unflatten(2, (middle, -1))
    inner = torch.einsum("grcpt,grmp->gmct", windows, exit) / prod(blocks.strides)
    pairs = Blocks(blocks.groups, middle, blocks.columns, taps, (1,) * dims)
    parts = _peeled(pairs, inner.reshape(-1, blocks.columns, *taps))
    return parts | {"exit": exit_of(compose(pairs, parts).reshape(blocks.groups, middle, -1))}


def _without_phases(gram: Tensor, axes: tuple[int, int], size: int, stride: int) -> Tensor:
    """The Gram matrix whose copies, shifted along both axes by less than the stride, add up to this one."""
    shape = [size if axis in axes else n for axis, n in enumerate(gram.shape)]
    result = gram.new_zeros(shape)

    def window(x: Tensor, start: int, length: int) -> Tensor:
        return x.narrow(axes[0], start, length).narrow(axes[1], start, length)

    for shift in range(size):
        sign = (shift % stride == 0) - (shift > 0 and (shift - 1) % stride == 0)
        window(result, shift, size - shift).add_(window(gram, 0, size - shift), alpha=sign)
    return result


def _spread(blocks: Blocks, w: Tensor) -> Parts:
    """A single tap in the middle, between an exit and an entry that prefer no channel."""
    shapes, middle = blocks.shapes, blocks.middle
    angles = torch.outer(torch.arange(middle) + 0.5, torch.arange(blocks.columns) + 1.0) * (pi / middle)
    parts = {
        "exit": polar_factor(w.new_zeros(shapes["exit"])),
        "frames": torch.eye(middle, middle // 2).to(w).expand(shapes["frames"]),
        "entry": polar_factor(angles.cos().to(w).expand(shapes["entry"])),
    }
    return {name: part.clone() for name, part in parts.items()}


def _leading(symmetric: Tensor, count: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues of the symmetric part, as columns."""
    vectors = torch.linalg.eigh(symmetric + symmetric.mT).eigenvectors
    return vectors[..., vectors.shape[-1] - count :]
