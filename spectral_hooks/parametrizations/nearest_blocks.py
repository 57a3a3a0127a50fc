"""From a kernel to the factors of `block_conv`: its own, where it is such a product, and else those of the nearest one found."""

from __future__ import annotations

from math import pi, prod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..linalg.precision import widest
from .block_conv import Blocks, Parts, compose, divided_by_pair, lay_out, times_pair
from .stiefel import polar_factor

#: The most rounds of the search for the nearest kernel, and the share that a round must gain to be followed by another.
_QUICK, _THOROUGH = (15, 1e-3), (100, 1e-6)
#: How far beyond its gradient a quick search goes, in units of the last change of that: fewer rounds by a third.
_MOMENTUM = 0.5
#: A kernel this near, relative, has been taken apart exactly, or could be but for the rounding of its entries.
_EXACT, _NEAR = 1e-7, 0.1
#: Beyond, relative to the gain, a weight is taken for its direction alone.
_HUGE = 1e10
#: Eigenvalues of a Gram matrix this small, relative, are rounding of a float32 kernel.
_ROUNDING = 1e-6


@torch.no_grad()
def decompose(blocks: Blocks, weight: Tensor, gain: float = 1.0) -> Parts:
    """Factors whose product, times a gain, is near a weight, and the weight itself where it is such a product.

    First pair by pair from the end: the first taps of a product lie in the range of its last projector and the last taps in the
    complement, which for a product in general position tells the projector. Between an exit and an entry the pairs are laid bare
    before, see `_unfolded`. For any other weight the leading eigenvectors are a start, and rounds follow: `‖K‖_F` is fixed and
    `⟨W, K⟩` affine in each factor, so given the others the nearest kernel has a polar factor of the gradient, or the projector on
    its leading eigenvectors. Near a product no round goes away from the weight; far from all the search looks ahead, in float32,
    and a round in float64 ends it.
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
    if tall or distance <= _NEAR:
        return _Chain(blocks, parts, w).improved(*_THOROUGH)
    # far from any product no digits count in the search, but those of its result
    single = (w / (float(w.abs().amax()) or 1.0)).float()
    parts = _Chain(blocks, {name: part.float() for name, part in parts.items()}, single, _MOMENTUM).improved(*_QUICK)
    return _Chain(blocks, {name: part.to(w) for name, part in parts.items()}, w).improved(1, 0.0)


class _Chain:
    """The factors in the order of a chain `H ⊛ F₁ ⊛ … ⊛ F_L`, and a target `T` that it comes nearer.

    `H` is the exit, or of kernels with an entry that, and the chain is that of the adjoint; an exit then stands behind the chain
    and `T = E* ⊛ W`. Since `⟨L ⊛ F, T⟩ = ⟨L, T ⊛ F*⟩`, what a pair can do depends on the product of those before it and on what
    those behind leave of the target, and a sweep along the chain, and one back, find both on their way: three products a factor.
    """

    def __init__(self, blocks: Blocks, parts: Parts, w: Tensor, momentum: float = 0.0) -> None:
        self.blocks = blocks
        self.mirrored = "entry" in parts
        order = range(len(blocks.axes))[:: -1 if self.mirrored else 1]
        self.steps = [(1 + blocks.axes[i][0], blocks.axes[i][1]) for i in order]
        self.frames = [parts["frames"][:, i] for i in order] if "frames" in parts else []
        head = parts["entry"].mT.unflatten(2, (-1, *[1] * len(blocks.taps))) if self.mirrored else _unflat(blocks, parts["exit"])
        self.head = lay_out(head)
        self.exit = parts["exit"] if self.mirrored and "exit" in parts else None
        w = w.unflatten(0, (blocks.groups, -1))
        self.windows = None if self.exit is None else _windows(blocks, w)
        self.gradients: dict[int, Tensor] = {}
        self.momentum = momentum
        self.target = lay_out(w).mT if self.mirrored else lay_out(w)

    def improved(self, most: int, least: float) -> Parts:
        """The factors after rounds of improvement: at most so many, and as long as each gains this share of `⟨W, K⟩`."""
        self._turn()
        befores = self._there(None)
        reached = self._reached(befores)
        for _ in range(most):
            behinds = self._back(befores)
            self.head = lay_out(polar_factor(_matrix(behinds[0])).unflatten(2, (-1, *behinds[0].shape[1:-2])))
            befores = self._there(behinds)
            if self.windows is not None:
                self.exit = _exit_of(self.blocks, self.windows, befores[-1])
                self._turn()
            before, reached = reached, self._reached(befores)
            if not reached - before > least * abs(reached):
                break
        return self._parts()

    def _turn(self) -> None:
        """The target of the chain, where an exit stands behind it."""
        if self.windows is not None and self.exit is not None:
            inner = _inner_of(self.blocks, self.windows, self.exit)
            self.target = lay_out(inner).mT

    def _there(self, behinds: list[Tensor] | None) -> list[Tensor]:
        """The products of the first factors, none to all of them; each improved, given what those behind leave of the target."""
        befores = [self.head]
        for i, (axis, flipped) in enumerate(self.steps):
            if behinds is not None:
                self._improve(i, befores[i], behinds[i + 1])
            befores.append(times_pair(befores[i], self._projector(i), axis, flipped))
        return befores

    def _back(self, befores: list[Tensor]) -> list[Tensor]:
        """What the last factors leave of the target, all to none of them; each improved, given those before."""
        behinds = [self.target]
        for i, (axis, flipped) in reversed(list(enumerate(self.steps))):
            self._improve(i, befores[i], behinds[0])
            behinds.insert(0, divided_by_pair(behinds[0], self._projector(i), axis, flipped))
        return behinds

    def _improve(self, i: int, before: Tensor, behind: Tensor) -> None:
        """The best pair between two ends: `⟨B ⊛ [P, I - P], T⟩` grows with `⟨P, Bᵀ (T₀ - T₁)⟩` summed over the taps."""
        if self.frames:
            axis, flipped = self.steps[i]
            size = before.shape[axis]
            change = behind.narrow(axis, int(flipped), size) - behind.narrow(axis, 1 - int(flipped), size)
            gradient = before.flatten(1, -2).mT @ change.flatten(1, -2)
            last, self.gradients[i] = self.gradients.get(i, gradient), gradient
            self.frames[i] = _leading(torch.lerp(last, gradient, 1 + self.momentum), self.frames[i].shape[-1])

    def _projector(self, i: int) -> Tensor:
        return self.frames[i] @ self.frames[i].mT if self.frames else self.head.new_zeros(len(self.head), 1, 1)

    def _reached(self, befores: list[Tensor]) -> float:
        return float((befores[-1] * self.target).sum())

    def _parts(self) -> Parts:
        head = _matrix(self.head)
        parts = {"entry": head.mT} if self.mirrored else {"exit": head}
        if self.exit is not None:
            parts["exit"] = self.exit
        if self.frames:
            parts["frames"] = torch.stack(self.frames[::-1] if self.mirrored else self.frames, 1)
        return parts


def _matrix(kernel: Tensor) -> Tensor:
    """`(groups, *taps, rows, columns)` as `(groups, rows, columns · taps)`."""
    return kernel.movedim((-2, -1), (1, 2)).flatten(2)


def _unflat(blocks: Blocks, exit: Tensor) -> Tensor:
    """An exit as a kernel, `(groups, rows, middle, *strides)`."""
    return exit.unflatten(2, (blocks.middle, *blocks.strides))


def _peeled(blocks: Blocks, w: Tensor) -> Parts:
    """The factors found one by one from the end, `w` then what is left."""
    shapes = blocks.shapes
    # without an exit, from the other end
    mirrored = "exit" not in shapes
    kernel = lay_out(w.unflatten(0, (blocks.groups, -1)))
    kernel = kernel.mT if mirrored else kernel
    found: dict[int, Tensor] = {}
    order = list(enumerate(blocks.axes))
    for i, (axis, flipped) in order if mirrored else reversed(order):
        first, last = (kernel.select(1 + axis, at).flatten(1, -2) for at in (0, -1))
        gram = first.mT @ first - last.mT @ last
        found[i] = _leading(-gram if flipped else gram, blocks.middle // 2)
        kernel = divided_by_pair(kernel, found[i] @ found[i].mT, 1 + axis, flipped)
    rest = polar_factor(_matrix(kernel))
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
    windows = _windows(blocks, w.unflatten(0, (blocks.groups, -1)))
    # the root has lost half of the digits of what is small; given the exit, the inner kernel is a mean over the phases
    inner = inner.unflatten(2, (blocks.columns, *taps))
    exit = _exit_of(blocks, windows, lay_out(inner).mT)
    inner = _inner_of(blocks, windows, exit) / prod(blocks.strides)
    pairs = Blocks(blocks.groups, middle, blocks.columns, taps, (1,) * dims)
    parts = _peeled(pairs, inner.flatten(0, 1))
    inner = compose(pairs, parts).unflatten(0, (blocks.groups, -1))
    return parts | {"exit": _exit_of(blocks, windows, lay_out(inner).mT)}


def _windows(blocks: Blocks, windows: Tensor) -> Tensor:
    """What of a kernel an inner one meets at each phase: `(groups, rows, columns, phases, taps)`."""
    for axis, (k, s) in enumerate(zip(blocks.taps, blocks.strides, strict=True)):
        windows = windows.unfold(3 + axis, k - s + 1, 1)
    dims = len(blocks.taps)
    return windows.flatten(3 + dims).flatten(3, 2 + dims)


def _exit_of(blocks: Blocks, windows: Tensor, inner: Tensor) -> Tensor:
    """The best exit for an inner kernel, `(groups, *taps, columns, middle)`."""
    inner = inner.movedim((-1, -2), (1, 2)).flatten(3)
    return polar_factor(torch.einsum("grcpt,gmct->grmp", windows, inner).flatten(2))


def _inner_of(blocks: Blocks, windows: Tensor, exit: Tensor) -> Tensor:
    """The sum over the phases of what an exit takes from a kernel, `(groups, middle, columns, *taps)`."""
    sizes = [k - s + 1 for k, s in zip(blocks.taps, blocks.strides, strict=True)]
    return torch.einsum("grcpt,grmp->gmct", windows, exit.unflatten(2, (blocks.middle, -1))).unflatten(3, sizes)


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
