"""Cells that cover the torus, and the proofs at their centres."""

from __future__ import annotations

from collections.abc import Iterator
from math import pi

import torch
from torch import Tensor

from ..linalg.cholesky import Rows, below
from ..linalg.gram import Gram
from ..linalg.memory import CACHED, at_once
from .cells import Cells, cells_at, tiling

#: Cells taken together even if they need more.
_FEWEST = 12
#: The share of a cell's room that rounding in float32 may take.
ROUNDING_SHARE = 0.6
#: Frequencies this near to a line are on it.
_ON_LINE = 1e-9


def proven_below(quick: Gram, gram: Gram, cells: Cells, level: float, slack: float) -> Tensor:
    """At which centres the squared norm is proven not to exceed `level`: in float32, and where that is too coarse in float64."""
    masks, growth = [], 0.0
    for part in in_chunks(quick, cells):
        proven, doubtful, growth = below(_rows(quick, part), level, error=quick.error, slack=slack, growth=1.1 * growth)
        if quick is not gram and doubtful.any():
            rest = part.at(doubtful)
            proven[doubtful] = below(_rows(gram, rest), level, error=gram.error, slack=0.1 * slack).proven
        masks.append(proven)
    return torch.cat(masks)


def _rows(gram: Gram, cells: Cells) -> Rows:
    """Those of the Gram matrices at the centres."""
    return Rows(
        len(cells.group),
        gram.size,
        gram.dtype,
        lambda start, end: gram.block(cells.group, cells.centre, start, end),
        lambda: gram(cells.group[:1], cells.centre[:1])[0],
    )


def covering(gram: Gram, degree: Tensor, angle: float) -> Cells:
    """Cells of all groups that cover half of the torus, their points at most `angle` from the centres."""
    cover = tiling(degree, angle)
    centres = cover.centres()
    # of the lines that are their own mirror images, `θ_1 ∈ {0, π}`, one half is enough too
    on_line = (torch.sin(centres[:, 0]).abs() < _ON_LINE) & (centres[:, 1:2] > pi + _ON_LINE).any(1)
    return cells_at(centres[~on_line], cover.radius, gram.groups)


def in_chunks(gram: Gram, cells: Cells) -> Iterator[Cells]:
    """The cells a few at a time, so that the Gram matrices at their centres fit into caches."""
    count = max(at_once(gram.bytes_each, CACHED), _FEWEST)
    parts = zip(cells.group.split(count), cells.centre.split(count), strict=True)
    return (Cells(*part, cells.radius) for part in parts)
