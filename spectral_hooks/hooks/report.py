"""What a hook acts on and what not, as a text."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from ..norms.bracket import TOLERANCE, at_most
from ..norms.spectral_norm import spectral_norm
from ..weights.targets import AnyTarget
from .free import free_weights

if TYPE_CHECKING:
    from .base import Hook


class Row(NamedTuple):
    """A line of the table."""

    layer: str
    kind: str
    norm: str
    bound: str
    status: str
    input: str = ""


_HEADER = Row("layer", "kind", "norm", "bound", "status", "input")
#: What errors and reports call a model that is a layer itself.
_ITSELF = "the model itself"


def report(hook: Hook, measures: bool = True) -> str:
    """The table of what a hook acts on, and the reasons for all else, each with its layers.

    Args:
        measures: whether to give the norms: certified, to 1 %.
    """
    skipped, targets, tied = hook.skipped, hook.targets, hook.selection.tied
    rows = [_row(hook, target, measures, skipped.get(target.name)) for target in targets] + hook.rows()
    rows += [Row(name, kind, "", "", skipped[name]) for name, kind in tied.items() if name in skipped]
    shown = {row.layer for row in rows}
    left = {name: reason for name, reason in skipped.items() if (name or _ITSELF) not in shown}
    free, numel = free_weights(hook.selection, hook.training)
    bounds = sorted({bound for target in targets if (bound := hook.bound_of(target)) is not None})
    constrained = sum(target.name not in skipped for target in targets)
    what = f"{constrained} weights" + (f" constrained to norm <= {', '.join(f'{each:g}' for each in bounds)}" if bounds else "")
    lines = [f"{what}, {len(skipped)} layers or weights left out.", *_table(rows)]
    if free:
        lines.append(f"Free for want of support: {sum(free.values()) / numel:.0%} of the elements of weights.")
    return "\n".join(lines + _reasons(left, free))


def _row(hook: Hook, target: AnyTarget, measures: bool, reason: str | None) -> Row:
    norm, bound = None, hook.bound_of(target)
    try:
        if measures:
            operators = target.gathered().operators
            norm = max(float(spectral_norm(op, rtol=1e-2)) for op in operators)
            # the norm is up to 1 % too large, and a proof for the bound itself is not
            if bound is not None and norm > bound and all(bool(at_most(op, bound).all()) for op in operators):
                norm = bound
    except ValueError as error:  # not finite
        reason = reason or str(error)
    return row(target.name, target.kind, norm, bound, reason)._replace(input=hook.input_of(target))


def row(name: str, kind: str, norm: float | None, bound: float | None, reason: str | None) -> Row:
    """A line for what is acted on; its status is the reason why it is not, if there is one."""
    return Row(name or _ITSELF, kind, _number(norm), _number(bound), reason or status(norm, bound))


def status(norm: float | None, bound: float | None) -> str:
    """How a norm that is known to 1 % stands to its bound."""
    if bound is None:
        return "selected"
    if norm is None:
        return "constrained"
    if norm > bound * 1.01 * (1 + TOLERANCE):
        return "outside"
    return "inside" if norm <= bound * (1 + TOLERANCE) else "at the bound"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _table(rows: list[Row]) -> list[str]:
    """The rows below their header, columns in line; without the last one where there is nothing in it."""
    if not rows:
        return []
    lines = [row if any(row.input for row in rows) else row[:-1] for row in (_HEADER, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def _reasons(left: dict[str, str], free: dict[str, int]) -> list[str]:
    """Each reason with its layers, those of the largest free weights first."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name, reason in left.items():
        layers[reason].append(name or _ITSELF)
    lines = []
    for reason, names in sorted(layers.items(), key=lambda pair: -sum(free.get(name, 0) for name in pair[1])):
        lines += [f"- {reason}", f"    {', '.join(names)}"]
    return lines
