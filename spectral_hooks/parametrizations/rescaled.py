"""Weights scaled into the ball on their way into the forward: `W ↦ W · min(1, c / bound(W))`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod, sqrt
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..linalg.precision import at_least_float32, widest, without_autocast
from ..linalg.scaling import unit_scale
from ..norms.bounds import Bound
from ..norms.quick import quick, quick_with_direction
from ..operators import as_operator
from ..operators.base import KernelOperator
from ..projections.arguments import check_max_norm
from .eager import Scale, is_plain, scaled, times
from .following import At, may_follow, start_inside
from .memory import Memory
from .recording import exported
from .remove import register

Layer = TypeVar("Layer", bound=nn.Module)

#: A parameter of more than so many bounds is brought back in training.
_FAR = 2.0


def rescaled(
    layer: Layer, max_norm: float = 1.0, *, bound: Bound | None = None, input_size: int | Sequence[int] | None = None
) -> Layer:
    """Keep a layer's operator norm at most `max_norm`, whatever its parameter becomes.

        weight = W · min(1, c / bound(W)),   bound(W) ≥ ‖A(W)‖₂,

    registered by `torch.nn.utils.parametrize`: `layer.parametrizations.weight.original` is `W`, the same parameter object as
    before. Guaranteed (certified) for the lattice operator, so at every input size; for the stored dtype too: in half precision
    the bound is raised by what rounding may add.

    Gradients flow through the bound, but for one thing: where a descent would shorten the weight, the derivative of the scale is
    left out, since through it the length of `W` has none, and nothing outside would find back. So training ends where
    the loss has no descent inside the ball. Second derivatives leave out how singular vectors turn. `W` starts inside; a
    training forward that finds it beyond twice the bound puts the layer's weight in its place (not in compiled graphs, under
    `torch.func` and FSDP, where gradients alone lead back).

    Args:
        layer: a linear or convolutional layer, changed in place. One that is rescaled already is given the new bound.
        max_norm: the bound `c > 0`.
        bound: a function of an operator that never falls below its norm, as those of `sh.bounds`; default `quick`. The
            effective norm falls short of `max_norm` by as much as the bound exceeds the norm.
        input_size: the spatial size at which the bound is to hold, for reflect and replicate padding; others need none.

    Returns:
        The layer. A plain checkpoint loads into it as before (`weight` becomes `W`), `layer.weight = V` keeps `V` bit for bit
        if `bound(V) ≤ max_norm` (up to rounding) and else its rescaling, and `sh.remove_spectral` makes the layer plain again.

    The norm is at most `max_norm` at every forward, whatever wrote to `W` before, and the weight is a function of `W` alone: no
    bound is carried from step to step.

    Cost: the bound in every training forward; none in evaluation without gradients while `W` stays the same, but for the
    comparison of `W` with a copy of it. Several forwards of a step share one bound within `torch.nn.utils.parametrize.cached()`.

    Traced by `torch.jit.trace` or exported by `torch.export` it stays a function of `W`. For ONNX export a plain copy,
    `sh.remove_spectral(copy.deepcopy(model))`.

    Raises:
        ValueError: `max_norm` is no positive number; `bound` falls below the norm of a row or a column of ones; the padding needs
            an `input_size`; the weight is pruned or carries a parametrization from elsewhere.
        TypeError, NotImplementedError: as `as_operator`.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> layer = sh.parametrizations.rescaled(torch.nn.Conv2d(3, 8, 3, padding=1))
        >>> with torch.no_grad():
        ...     _ = layer.parametrizations.weight.original.mul_(100)
        >>> bool(0.96 < sh.spectral_norm(sh.as_operator(layer)) <= 1)
        True

    Source: Gouk, Frank, Pfahringer and Cree (2018), who scale after the step and by power iteration.
    """
    max_norm = check_max_norm(max_norm)
    if bound is not None and not callable(bound):
        raise TypeError(f"`bound` must be a function of an operator, as those of sh.bounds; got {bound!r}.")
    op = bounded_operator(layer, input_size)
    if bound is not None:
        _check_is_bound(bound, op)
    register(layer, Rescaled(op, max_norm, bound or quick))
    start_inside(layer)
    return layer


def bounded_operator(layer: nn.Module, input_size: int | Sequence[int] | None) -> KernelOperator:
    """The layer's operator on the lattice, or at the size without which it has no bound."""
    op = as_operator(layer)
    try:
        op.check_bounded()
    except ValueError:
        if input_size is None:
            raise
        op = as_operator(layer, input_size)
    return op


def shown_size(op: KernelOperator) -> str:
    """The input size at which a bound holds, if not at every one."""
    size = getattr(op, "input_size", None)
    return "" if size is None else f", input_size={size}"


@torch.no_grad()
def _check_is_bound(bound: Bound, op: KernelOperator) -> None:
    """Refuse what falls below the norm of a single row of ones, or of a column of another size."""
    if op.weight.is_meta:
        return
    kernel = torch.zeros_like(op.canonical())
    row, column = (torch.zeros_like(kernel).reshape(*kernel.shape[:3], -1) for _ in range(2))
    # what is dropped by from_canonical are taps that the weight does not have; the first is always there
    row[0, 0, :, 0] = 1
    column[0, :, 0, 0] = 4
    for probe in (row, column):
        weight = op.from_canonical(probe.reshape(kernel.shape))
        norm = float(torch.linalg.vector_norm(weight.float()))
        value = float(bound(op.with_weight(weight)))
        if not value >= norm * (1 - 1e-6):
            raise ValueError(
                "`bound` must never fall below the spectral norm, as those of sh.bounds as they stand; got "
                f"{bound!r}, which gives {value:.4g} for a weight of norm {norm:.4g}."
            )


class Rescaled(nn.Module):
    """The parametrization that `rescaled` registers.

    Args:
        op: the layer's operator; of its weight only the shape is kept.
        max_norm, bound: as for `rescaled`.
    """

    def __init__(self, op: KernelOperator, max_norm: float, bound: Bound) -> None:
        super().__init__()
        self.op = op.with_weight(torch.empty_like(op.weight, device="meta", requires_grad=False))
        self.max_norm = max_norm
        self.bound = bound
        self._memory = Memory()

    def extra_repr(self) -> str:
        name = getattr(self.bound, "__name__", repr(self.bound))
        return f"max_norm={self.max_norm}" + ("" if self.bound is quick else f", bound={name}") + shown_size(self.op)

    def forward(self, weight: Tensor) -> Tensor:
        made = self._followed if may_follow(self, weight) else self._rescaled
        if self.bound is quick and is_plain(weight) and (self.training or (torch.is_grad_enabled() and weight.requires_grad)):
            made = self._eagerly
        return exported(lambda weight: without_autocast(made, weight), weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        # the parameter would share the storage of what is assigned
        return weight.clone()

    def _rescaled(self, weight: Tensor) -> Tensor:
        unit, gain = self._memory(self, weight, self._factors)
        return _scaled(weight, unit, gain)

    def _factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`a`, a power of two, and `b` with `a b = min(1, c / bound(W))`, a number that the weight's dtype may not have."""
        unit = unit_scale(weight)
        size, rounding = self._size(_wide(weight) * unit.to(_wide(weight)), weight.dtype)
        level = self._level(unit)
        inside = size <= level
        # within rounding of the sphere it is one already, with its derivative; a small one is not to be divided by
        size = size.clamp(min=level / 2)
        gain = _outward(torch.where(inside, size.detach(), self._room(weight.dtype)) / size)
        return torch.where(inside, 1.0, unit), torch.where(size < level - 2 * rounding, 1.0, gain)

    def _followed(self, weight: Tensor) -> Tensor:
        """The same, and a parameter that is far outside becomes what is made of it, with the gradient there.

        Not one that is near: to shorten it after every step would shorten what is inside too, where several singular values meet.
        The derivative of a norm does not depend on the length, so the norm found before gives that after.
        """
        unit = unit_scale(weight)
        size, rounding = self._size(At.apply(weight, _wide(weight.detach()) * unit.to(_wide(weight))), weight.dtype)
        found, level, room = size.detach(), self._level(unit), self._room(weight.dtype)
        # what is not finite is not, and stays as it is, for its owner to see
        far, inside = found > _FAR * level, found <= level
        value = _scaled(weight.detach(), torch.where(far, unit, 1.0), torch.where(far, room / found, 1.0))
        # behind the back of autograd, since an earlier forward may still need the weight, whose values it leaves as they are
        weight.data.copy_(value)
        norm = torch.where(far, self.max_norm, found) + torch.where(far, 1.0, unit) * (size - found)
        gain = _outward(
            torch.where(far, self.max_norm, torch.where(inside, found, room)) / norm.clamp(min=torch.where(far, 0.0, level / 2))
        )
        gain = torch.where(found < level - 2 * rounding, 1.0, gain)
        return _scaled(At.apply(weight, value), torch.where(far | inside, 1.0, unit), gain)

    def _eagerly(self, weight: Tensor) -> Tensor:
        """Either of the two, for a weight whose values can be looked at."""
        unit, wide = float(unit_scale(weight)), _wide(weight.detach())
        op = self.op.with_weight(wide if unit == 1 else wide * unit)
        value, direction = quick_with_direction(op)
        rounding = float(_rounding(op, weight.dtype))
        size, level = value + rounding, min(self.max_norm * unit, torch.finfo(torch.float64).max)
        scale = Scale(1.0, 1.0, value / size if size else 1.0, None if size < level - 2 * rounding else direction)
        if not size <= level:
            scale = scale._replace(unit=unit, gain=self._room(weight.dtype) / size)
        if size > _FAR * level and may_follow(self, weight):
            weight.data.copy_(times(weight, scale))
            scale = scale._replace(unit=1.0, gain=1.0)
        return scaled(weight, scale, self._rescaled)

    def _size(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The bound for a weight with what rounding to a dtype may add, and that."""
        op = self.op.with_weight(weight)
        rounding = _rounding(op, dtype)
        return self.bound(op) + rounding, rounding

    def _level(self, unit: Tensor) -> Tensor:
        """`c` in units of the weight; of one that is zero, or nearly, no more than the largest number."""
        return (self.max_norm * unit).clamp(max=torch.finfo(unit.dtype).max)

    def _room(self, dtype: torch.dtype) -> float:
        """`c`, without what the spacing of numbers about zero can add."""
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
        kernel = self.op.canonical()
        return max(self.max_norm - least * sqrt(prod(kernel.shape[1:]) * prod(kernel.shape[3:])) * self.op.padding_factor, 0.0)


class _Outward(torch.autograd.Function):
    """A scale below one whose gradient reaches the weight only where a descent enlarges the scale.

    `W c / ‖W‖` does not change with the length of `W`, so its derivative never shortens `W`, and what has come to the sphere
    would stay there. Without the derivative of the scale the gradient is that of the layer's weight, scaled, and leads inside.
    With `G` the loss's gradient in the layer's weight `V` this is `G - min(⟨G, V⟩, 0) ∇‖V‖ / c`, which is zero on the sphere just
    where `-G` is a normal of the ball: the condition of a minimum.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(scale: Tensor) -> Tensor:
        return scale.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.clamp(max=0)


class _OutwardBothWays(_Outward):
    """The same with a tangent, which is exact; compilers refuse what has one."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:  # type: ignore[override]
        return tangent.clone()


def _outward(scale: Tensor) -> Tensor:
    return (_Outward if torch.compiler.is_compiling() else _OutwardBothWays).apply(scale)


def _wide(weight: Tensor) -> Tensor:
    return weight.to(at_least_float32(weight.dtype))


def _scaled(weight: Tensor, unit: Tensor, gain: Tensor) -> Tensor:
    wide = _wide(weight)
    return (wide * unit.to(wide) * gain.to(wide)).to(weight.dtype)


def _rounding(op: KernelOperator, dtype: torch.dtype) -> Tensor:
    """What rounding the entries of the scaled weight to a dtype can add to its norm: `‖E‖₂ ≤ √taps ‖E‖_F`, group by group."""
    kernel = op.canonical().detach()
    unit = torch.finfo(dtype).eps / 2 + torch.finfo(kernel.dtype).eps
    # summed in the precision of the kernel, and raised by what that may lose
    largest = torch.linalg.vector_norm(kernel.flatten(1), dim=1).amax().to(widest(kernel.device))
    largest = largest * (1 + kernel[0].numel() * torch.finfo(kernel.dtype).eps)
    return largest * (unit * sqrt(prod(kernel.shape[3:])) * op.padding_factor)
