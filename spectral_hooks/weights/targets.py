"""What a hook measures and writes: a whole weight, a part of a fused one, or one with LoRA adapters on top."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ..linalg.scaling import check_finite
from ..operators import DenseOperator, as_operator
from ..operators.base import KernelOperator
from ..operators.covering import Sizes, at_sizes
from ..operators.layers import lora_factors
from ..projections import rescale
from ..projections.low_rank import clip_update
from .names import kind_of
from .places import place_of
from .sharded import full
from .writing import held, pruning_mask, write_

#: Operator, largest norm → weight.
Project = Callable[[KernelOperator, float], Tensor]
#: What brings a sum inside: the base weight and the left factors of the adapters, each None where it stays.
LoraChange = tuple[Tensor | None, list[Tensor] | None]


@dataclass
class Target:
    """One weight, or the part of it that makes some of the outputs, and the layers that use it: several when it is tied."""

    name: str
    layers: list[nn.Module]
    outputs: slice | None = None
    #: Of some layers, the input sizes that they are bounded at; all others are at every size.
    sizes: dict[nn.Module, Sizes] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The class of the first layer."""
        return kind_of(self.layers[0])

    def operators(self) -> list[KernelOperator]:
        """An operator for each layer, all of one weight; tied layers may apply it with different geometries, or transposed.

        Its norm bounds that of the layer at the sizes that this is bounded at.
        """
        each = (at_sizes(layer, self.sizes[layer]) if layer in self.sizes else as_operator(layer) for layer in self.layers)
        operators = [_part(op, self.outputs) for op in each]
        return [operators[0], *(_as_it_lies(op, operators[0].weight) for op in operators[1:])]

    def gathered(self) -> Whole:
        """The weight as it is now: one that is sharded is gathered from all processes, which must all take part."""
        return Whole(self, [op.with_weight(full(op.weight)) for op in self.operators()])

    def parameters(self) -> list[Tensor]:
        """All parameters of the layers that use the weight."""
        return list({id(p): p for layer in self.layers for p in layer.parameters()}.values())

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


@dataclass(frozen=True)
class Whole:
    """The weight of a target, all of it, as it was when it was gathered; and what brings it inside a ball."""

    target: Target
    #: One for each use.
    operators: list[KernelOperator]

    @property
    def is_single(self) -> bool:
        """Whether there is one use."""
        return len(self.operators) == 1

    @property
    def is_plain(self) -> bool:
        """Whether a projection of its operator may be written as it is: there is one use, and no mask."""
        return self.is_single and self.target.mask() is None

    def inside(self, project: Project, max_norm: float) -> Tensor | None:
        """What `Target.write_` is to be given so that the weight is inside the ball, or None if it is there already.

        Raises:
            ValueError: NaN or infinity in the weight.
        """
        weight = before = self.operators[0].weight
        check_finite(before)
        for i, op in enumerate(self.operators):
            # the first use decides the shape of the result; scaling for another keeps the bound of all before it
            weight = (project if i == 0 else rescale)(op.with_weight(weight), max_norm)
        if weight is before:
            return None
        mask = self.target.mask()
        return weight if mask is None else rescale(self.operators[0].with_weight(weight * mask), max_norm)


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
    #: A bound that the base weight was found to obey, and what its parameters were then.
    _obeyed: tuple[float, object] | None = field(default=None, repr=False)

    @property
    def kind(self) -> str:
        """The class of the base layer, and that there are adapters."""
        return f"{kind_of(cast(nn.Module, self.layers[0].base_layer))} + LoRA" if self.base is not None else "LoRA"

    def operators(self) -> list[KernelOperator]:
        """One operator: that of the sum."""
        return self.gathered().operators

    def gathered(self) -> WholeSum:
        """The base weight and the factors as they are now: sharded ones are gathered from all processes."""
        factors = [
            (_matrix(as_operator(a)), _matrix(_part(as_operator(b), self.outputs)), s) for a, b, s in lora_factors(self.layers[0])
        ]
        rights = [scale * a.to(torch.promote_types(a.dtype, torch.float32)) for a, _, scale in factors]
        base = None if self.base is None else self.base.gathered()
        return WholeSum(self, torch.cat([b for _, b, _ in factors], dim=1), torch.cat(rights), base)

    def parameters(self) -> list[Tensor]:
        """All parameters of the layer and its adapters."""
        return list({id(p): p for layer in self.layers for p in layer.parameters()}.values())

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

    def base_obeys(self, max_norm: float) -> bool:
        """Whether the base weight was found to obey this bound and has not been written since: a frozen one is looked at once."""
        return self._obeyed is not None and self._obeyed[0] <= max_norm and self._obeyed[1] == self._base_state()

    def base_was_inside(self, max_norm: float) -> None:
        """Remember that the base weight, as it is now, obeys this bound."""
        state = self._base_state()
        self._obeyed = None if state is None else (max_norm, state)

    def _base_state(self) -> object:
        """What changes with every write into the frozen parameters of the base weight; None where that cannot be told."""
        leaves = [] if self.base is None else self.base.leaves()
        # what trains may be written by way of `.data`, which no version counts
        if any(leaf.requires_grad or leaf.is_inference() for leaf in leaves):
            return None
        return [(id(leaf), place_of(leaf), leaf._version) for leaf in leaves]

    def write_(self, change: LoraChange) -> None:
        """Give the base layer and the adapters what brings the sum inside."""
        base, lefts = change
        if self.base is not None and base is not None:
            self.base.write_(base)
        if lefts:
            for (_, b, _), left in zip(lora_factors(self.layers[0]), lefts, strict=True):
                _write_part_(b, left, self.outputs)


@dataclass(frozen=True)
class WholeSum:
    """The parts of a target's sum `W + B A`, all of them, as they were when they were gathered; and what brings it inside."""

    target: LoraTarget
    #: All `B` side by side.
    left: Tensor
    #: All `s A`, one below the other.
    right: Tensor
    base: Whole | None

    @property
    def operators(self) -> list[KernelOperator]:
        """One operator: that of the sum."""
        return [DenseOperator(self._base_matrix().to(self.right) + self.left.to(self.right) @ self.right)]

    #: What is inside is the sum, and what is written its parts.
    is_single = is_plain = False

    @torch.no_grad()
    def inside(self, project: Project, max_norm: float) -> LoraChange | None:
        """What `LoraTarget.write_` is to be given so that the sum is inside the ball, or None if it is there already.

        If the base alone exceeds the bound, `project` takes it inside first, frozen or not. Then the adapters' `B` go as near to
        what they are as the room that the base leaves allows; their `A` stay.
        """
        weight, base = self._base_matrix(), None
        if self.base is not None and not self.target.base_obeys(max_norm):
            base = self.base.inside(project, max_norm)
            if base is None:
                self.target.base_was_inside(max_norm)
            else:
                # half-precision factors cannot meet a wall exactly: room for their rounding
                eps = torch.finfo(self.left.dtype).eps
                base = base * (1 - eps) if eps > 1e-6 else base
                weight = _matrix(self.base.operators[0].with_weight(base))
        new = clip_update(weight, self.left, self.right, max_norm)
        if new is self.left:
            return None if base is None else (base, [])
        return base, list(new.split([a.weight.shape[0] for a, _, _ in lora_factors(self.target.layers[0])], dim=1))

    def _base_matrix(self) -> Tensor:
        """`W` as (out, in)."""
        if self.base is None:
            return self.right.new_zeros(len(self.left), self.right.shape[1])
        return _matrix(self.base.operators[0])


#: What hooks act on.
AnyTarget = Target | LoraTarget


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
