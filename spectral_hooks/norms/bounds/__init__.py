"""Upper bounds of an operator's norm: operator → 0-d tensor, differentiable, never below `‖A‖₂`.

Each is a formula on the canonical kernel, so stride, dilation, groups, transposition and dimension are dealt with once. It
bounds the lattice operator; zero padding and every input size are compressions of that, and padding that repeats inputs or
outputs is paid for by a factor (`padding_factor`), which the bounds apply themselves.

They hold as computed: all is done in float64 on a kernel scaled to entries of order one, the result is raised by a bound of
the rounding, and the cast to the weight's dtype rounds up.
"""

from .absolute_sum import absolute_sum
from .certified import Bound as Bound
from .cosine_grid import cosine_grid
from .frobenius_grid import frobenius_grid
from .gram_iteration import gram_iteration
from .kernel_gram import kernel_gram
from .tap_sum import tap_sum
from .unfolding import unfolding

#: Every bound.
__all__ = ["absolute_sum", "cosine_grid", "frobenius_grid", "gram_iteration", "kernel_gram", "tap_sum", "unfolding"]


def __dir__() -> list[str]:
    return __all__
