"""What a hook measures and writes: a whole weight, a part of a fused one, or one with LoRA adapters on top."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..operators import DenseOperator, as_operator
from ..operators.base import KernelOperator
from ..operators.layers import lora_factors
from ..projections.low_rank import clip_update
from .sharded import full
from .writing import held, pruning_mask, write_

#: What `LoraTarget.clipped` has found: the base weight and the left factors, each None where it stays.
LoraChange = tuple[Tensor | None, list[Tensor] | None]


@dataclass
class Target:
    """One weight, or the part of it that makes some of the outputs, and the layers that use it: several when it is tied."""

    name: str
    layers: list[nn.Module]
    outputs: slice | None = None

    def operators(self) -> list[KernelOperator]:
        """An operator for each layer, all of one weight; tied layers may apply it with different geometries, or transposed."""
        operators = [_part(as_operator(layer), self.outputs) for layer in self.layers]
        return [operators[0], *(_as_it_lies(op, operators[0].weight) for op in operators[1:])]

    def leaves(self) -> list[Tensor]:
        """The parameters that the weight is made of."""
        return list(held(self.layers[0]).leaves)

    def trains(self) -> bool:
        """Whether any of these requires a gradient."""
        # most layers are frozen whole or not at all, and to make a weight may cost more than to look
        each = {p.requires_grad for p in self.layers[0].parameters()}
        return each.pop() if len(each) == 1 else any(leaf.requires_grad for leaf in self.leaves())

    def mask(self) -> Tensor | None:
        """What torch's pruning lays over the weight, if anything."""
        mask = pruning_mask(self.layers[0])
        if mask is None or self.outputs is None:
            return mask
        return _rows(mask, self.outputs, as_operator(self.layers[0]).transposed)

    def may_refuse(self) -> list[nn.Module]:
        """The layers whose weight `write_` sets through an inverse map, which may refuse it or round it."""
        return [layer for layer in self.layers[:1] if not held(layer).plain]

    def write_(self, weight: Tensor) -> None:
        """Give the layers this weight, of the shape of the operators'."""
        _write_part_(self.layers[0], weight, self.outputs)


@dataclass
class LoraTarget:
    """A linear layer's weight together with its LoRA adapters, `W + Σ s B A`; or, without a `base`, `Σ s B A` alone.

    Never the factors apart: with `A` and `B` of norm 1 the sum may still have norm `‖W‖ + s`.
    """

    name: str
    layers: list[nn.Module]
    outputs: slice | None = None
    #: The base layer's own weight.
    base: Target | None = None
    #: The bound that it is known to obey: a frozen one is looked at until then.
    _base_within: float = field(default=float("inf"), repr=False)

    def operators(self) -> list[KernelOperator]:
        """One operator: that of the sum."""
        weight, left, right = self._sum()
        return [DenseOperator(weight.to(right) + left.to(right) @ right)]

    def leaves(self) -> list[Tensor]:
        """The parameters of the adapters, and of the base weight."""
        own = [leaf for a, b, _ in lora_factors(self.layers[0]) for layer in (a, b) for leaf in held(layer).leaves]
        return own if self.base is None else own + self.base.leaves()

    def trains(self) -> bool:
        """Whether any of these requires a gradient; the base weight is most often frozen."""
        return any(leaf.requires_grad for leaf in self.leaves())

    def may_refuse(self) -> list[nn.Module]:
        """The layers whose weight `write_` sets through an inverse map, which may refuse it or round it."""
        own = [b for _, b, _ in lora_factors(self.layers[0]) if not held(b).plain]
        return own if self.base is None else own + self.base.may_refuse()

    @torch.no_grad()
    def clipped(self, project: Callable[[Target], Tensor | None], max_norm: float) -> LoraChange | None:
        """What brings the sum inside, or None if it is there.

        If the base alone exceeds the bound, `project` takes it inside first, frozen or not. Then the adapters' `B` go as near to
        what they are as the room that the base leaves allows; their `A` stay.
        """
        weight, left, right = self._sum()
        base = None
        if self.base is not None and max_norm < self._base_within:
            base = project(self.base)
            if base is not None:
                # half-precision factors cannot meet a wall exactly: room for their rounding
                eps = torch.finfo(left.dtype).eps
                base = base * (1 - eps) if eps > 1e-6 else base
                weight = _matrix(self.base.operators()[0].with_weight(base))
            else:
                self._base_within = max_norm
        new = clip_update(weight, left, right, max_norm)
        if new is left:
            return None if base is None else (base, [])
        return base, list(new.split([a.weight.shape[0] for a, _, _ in lora_factors(self.layers[0])], dim=1))

    def write_(self, change: LoraChange) -> None:
        """Give the base layer and the adapters what `clipped` has found."""
        base, lefts = change
        if self.base is not None and base is not None:
            self.base.write_(base)
        if lefts:
            for (_, b, _), left in zip(lora_factors(self.layers[0]), lefts, strict=True):
                _write_part_(b, left, self.outputs)

    def _sum(self) -> tuple[Tensor, Tensor, Tensor]:
        """`W` as (out, in), all `B` side by side, and all `s A` one below the other."""
        factors = [
            (_matrix(as_operator(a)), _matrix(_part(as_operator(b), self.outputs)), s) for a, b, s in lora_factors(self.layers[0])
        ]
        rights = [scale * a.to(torch.promote_types(a.dtype, torch.float32)) for a, _, scale in factors]
        left, right = torch.cat([b for _, b, _ in factors], dim=1), torch.cat(rights)
        if self.base is None:
            return right.new_zeros(len(left), right.shape[1]), left, right
        return _matrix(self.base.operators()[0]), left, right


def _matrix(op: KernelOperator) -> Tensor:
    """The operator's weight as (out, in)."""
    weight = full(op.weight)
    return weight.T if op.transposed else weight


def _rows(weight: Tensor, outputs: slice, transposed: bool) -> Tensor:
    """The part of a matrix that makes these outputs, as a view."""
    return weight[:, outputs] if transposed else weight[outputs]


def _as_it_lies(op: KernelOperator, weight: Tensor) -> KernelOperator:
    """The operator with its matrix the way round that `weight` has, if it lies in memory transposed to that."""
    here = op.weight
    turned = here.shape != weight.shape or (min(here.shape) > 1 and here.stride() != weight.stride())
    return DenseOperator(here.T, transposed=not op.transposed) if turned and isinstance(op, DenseOperator) else op


def _part(op: KernelOperator, outputs: slice | None) -> KernelOperator:
    if outputs is None:
        return op
    return DenseOperator(_rows(full(op.weight), outputs, op.transposed), transposed=op.transposed)


def _write_part_(layer: nn.Module, weight: Tensor, outputs: slice | None) -> None:
    if outputs is not None:
        op = as_operator(layer)
        whole = full(op.weight).clone()
        _rows(whole, outputs, op.transposed).copy_(weight)
        weight = whole
    write_(layer, weight)
