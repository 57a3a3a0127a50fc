"""What a hook leaves free for want of support: nothing of that in silence."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from torch import Tensor

from ..weights.selection import Selection

#: From which share of the weights on there is a warning.
_SHARE = 0.1


def free_weights(selection: Selection, training: bool) -> tuple[dict[str, int], int]:
    """Elements of weights that nothing bounds for want of support, by name; and of these and the selected together.

    While training, what is frozen is not free to move.
    """

    def count(parameters: Iterable[Tensor]) -> int:
        return sum(p.numel() for p in parameters if p.ndim > 1 and (p.requires_grad or not training))

    selected = {id(leaf): leaf for target in selection.targets for leaf in target.leaves()}
    free = {name: count(parameters) for name, parameters in selection.free.items()}
    return {name: n for name, n in free.items() if n}, count(selected.values()) + sum(free.values())


def warn_of_free_weights(hook: str, selection: Selection, training: bool) -> None:
    """One warning if a tenth or more of the weights is free for want of support; called from the `start` of this hook."""
    free, numel = free_weights(selection, training)
    share = sum(free.values()) / max(numel, 1)
    if share <= _SHARE:
        return
    largest = sorted(free, key=lambda name: -free[name])
    reason = selection.skipped[largest[0]].rstrip(".")
    shown = ", ".join(f"{name or 'the model itself'} ({free[name] / numel:.0%})" for name in largest[:3])
    more = f" and {len(largest) - 3} more" if len(largest) > 3 else ""
    warnings.warn(
        f"{hook} leaves {share:.0%} of the weights (elements of parameters with two or more dimensions) free for want "
        f"of support: {shown}{more}. Of the first: {reason}. print(hook.report()) lists all; "
        "`exclude` those that are meant to be free.",
        UserWarning,
        stacklevel=5 if training else 3,  # whoever calls `attach` or `start`
    )
