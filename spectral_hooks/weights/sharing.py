"""Layers that use the same parameters: in the same way they have one weight, in different ways they are refused."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from ..operators import DenseOperator, as_operator
from .names import called
from .places import memory_of, overlap
from .targets import Target
from .writing import Held


@dataclass
class Owner:
    """The first layer that has a weight, how it holds it, and the targets that were made of it."""

    name: str
    how: Held
    targets: list[Target]

    def share(self, name: str, layer: nn.Module, how: Held) -> None:
        """Another layer has the same weight."""
        turned = how.weight.shape != self.how.weight.shape or how.weight.stride() != self.how.weight.stride()
        made_alike = how.plain or how.is_view or torch.equal(self.how.weight, how.weight)
        if not made_alike or (turned and self.targets[0].outputs is not None):
            raise ValueError(self._clash(name))
        for target in self.targets:
            target.layers.append(layer)

    def check_apart(self, name: str, how: Held) -> None:
        """Refuse a layer that makes another weight of the same parameters: what is written to one would change the other."""
        if how.is_view and self.how.is_view:
            clash = overlap(self.how.weight, how.weight)
        else:
            clash = any(overlap(one, other) for one in self.how.leaves for other in how.leaves)
        if clash:
            raise ValueError(self._clash(name))

    def _clash(self, name: str) -> str:
        return (
            f"{called(name)} and {called(self.name)} use the same parameters in different ways, so that a projection of one "
            "would change the other: exclude one of them."
        )


class Owners:
    """The first layer of each weight that was met."""

    def __init__(self) -> None:
        self._owners: dict[object, Owner] = {}
        # by the memory of their parameters
        self._neighbours: dict[object, list[Owner]] = defaultdict(list)

    def of(self, layer: nn.Module, how: Held) -> Owner | None:
        """The owner of a layer's weight, if another has it."""
        return self._owners.get(_key(layer, how))

    def add(self, name: str, layer: nn.Module, how: Held, targets: list[Target]) -> None:
        """Make a layer the owner of its weight.

        Raises:
            ValueError: another weight is made of the same parameters.
        """
        self._owners[_key(layer, how)] = owner = Owner(name, how, targets)
        for memory in {memory_of(leaf) for leaf in how.leaves}:
            for neighbour in self._neighbours[memory]:
                neighbour.check_apart(name, how)
            self._neighbours[memory].append(owner)


def _key(layer: nn.Module, how: Held) -> object:
    # a matrix and its transpose are one weight
    shape = sorted(how.weight.shape) if isinstance(as_operator(layer), DenseOperator) else how.weight.shape
    return how.place, tuple(shape)
