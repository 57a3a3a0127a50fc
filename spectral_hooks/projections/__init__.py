"""Operator → weight of the same shape, whose norm obeys a bound or comes nearer to one.

A convolution's kernel must lie in two sets at once: the ball `‖F(θ)‖ ≤ c` at every frequency, and the kernels of `k` taps.
`clip` nears the closest such kernel and ends with a scaling by the certified norm, so that the promise holds whatever the
rounds have reached.
"""

from functools import partial

from .arguments import Projection as Projection
from .band import band, polar
from .clip import clip
from .clipped_decay import clipped_decay
from .hammer import hammer
from .parseval import parseval
from .rescale import rescale
from .soft_cap import soft_cap

#: Those whose result is proven to obey the bound, as they are by default, and the others.
GUARANTEED = (clip, rescale, band, polar, soft_cap)
OTHERS = (hammer, clipped_decay, parseval)

#: Every projection.
__all__ = [function.__name__ for function in (*GUARANTEED, *OTHERS)]


def guarantees(projection: Projection) -> bool:
    """Whether what a projection returns is proven to obey the bound that it is given.

    Those in `GUARANTEED`, and `functools.partial` of them; of `soft_cap` only without `strength`, which undoes that, and without
    `excess`, which is the caller's promise.

    Example:
        >>> from functools import partial
        >>> import spectral_hooks as sh
        >>> sh.projections.guarantees(sh.projections.soft_cap)
        True
        >>> sh.projections.guarantees(partial(sh.projections.soft_cap, strength=0.1))
        False
    """
    if not isinstance(projection, partial):
        return projection in GUARANTEED
    free = projection.func is soft_cap and any(projection.keywords.get(name) is not None for name in ("strength", "excess"))
    return guarantees(projection.func) and not free and not projection.args and "max_norm" not in projection.keywords


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
