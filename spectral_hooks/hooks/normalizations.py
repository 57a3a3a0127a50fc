"""The gains of batch normalizations, kept at the bound beside the weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..weights.gains import clipped_gain, largest_gain
from ..weights.names import kind_of, named_layers
from ..weights.selection import Selection
from .report import Row, row

_log = logging.getLogger(__name__)

#: Reasons for which a layer is no matter of a hook at all.
_APART = ("excluded", "not among `layers`")


def chosen(model: nn.Module, selection: Selection, clips: bool) -> dict[str, nn.Module]:
    """The batch normalizations to clip, which then are no more among the skipped; if there are some and none is to be, say so."""
    found: dict[str, Any] = {
        name: layer
        for name, layer in named_layers(model)
        if isinstance(layer, _BatchNorm) and selection.skipped.get(name) not in _APART and layer.running_var is not None
    }
    if not clips:
        if found:
            _log.info("%d batch normalizations are left alone; batch_norm='clip' bounds their gains too.", len(found))
        return {}
    without = {name: "affine=False: there are no gains to clip" for name, layer in found.items() if layer.weight is None}
    selection.skipped = {name: reason for name, reason in selection.skipped.items() if name not in found} | without
    return {name: layer for name, layer in found.items() if name not in without}


def clipped_gains(
    layers: dict[str, nn.Module], bound: float, naming: Callable[[str], AbstractContextManager[None]]
) -> list[tuple[nn.Module, Tensor]]:
    """Those whose gains are outside, with gains that are inside."""
    clipped = []
    for name, layer in layers.items():
        with naming(name):
            gamma = clipped_gain(layer, bound)
        clipped += [] if gamma is None else [(layer, gamma)]
    return clipped


def rows(layers: dict[str, nn.Module], bound: float, skipped: dict[str, str]) -> list[Row]:
    """A line of a report for each."""
    return [row(name, kind_of(layer), largest_gain(layer), bound, skipped.get(name)) for name, layer in layers.items()]
