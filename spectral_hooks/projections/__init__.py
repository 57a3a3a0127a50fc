"""Operator → weight of the same shape, whose norm obeys a bound or comes nearer to one.

A convolution's kernel must lie in two sets at once: the ball `‖F(θ)‖ ≤ c` at every frequency, and the kernels of `k` taps.
`clip` nears the closest such kernel and ends with a scaling by the certified norm, so that the promise holds whatever the
rounds have reached.
"""

from .arguments import Projection as Projection
from .band import band, polar
from .clip import clip
from .clipped_decay import clipped_decay
from .hammer import hammer
from .parseval import parseval
from .rescale import rescale
from .soft_cap import soft_cap

#: Those whose result is certified to obey the bound, and the others.
GUARANTEED = (clip, rescale, band, polar)
OTHERS = (soft_cap, hammer, clipped_decay, parseval)

#: Every projection.
__all__ = [function.__name__ for function in (*GUARANTEED, *OTHERS)]


def named(projection: str | Projection) -> Projection:
    """The projection of this name, or the given function."""
    if callable(projection):
        return projection
    if projection not in __all__:
        raise ValueError(
            f"`projection` must be a function (operator, max_norm) -> weight or one of {', '.join(__all__)}; got {projection!r}."
        )
    return globals()[projection]


def __dir__() -> list[str]:
    return __all__
