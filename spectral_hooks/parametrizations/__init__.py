"""Layers that satisfy a constraint by construction: each function takes a layer and returns it or what replaces it.

Where there is a bound, or a gain that all singular values have, it is the second argument, `max_norm`.

DDP and FSDP2 (`fully_shard`) work: parametrize first, shard afterwards; measure between `layer.unshard()` and
`layer.reshard()`. Under FSDP the parameters of `rescaled`, `clipped` and `banded` come back inside by their gradients alone, for
what a forward writes to gathered weights is lost.
"""

from .cayley import cayley
from .clipped import banded, clipped
from .conv_norm import conv_norm
from .group_shuffle import group_shuffle
from .orthogonal import orthogonal
from .remove import remove_spectral, spectral_report
from .rescaled import rescaled
from .skew import skew
from .tensor_train import tensor_train

#: Every parametrization, what takes it away again, and what tells of it.
__all__ = [
    "banded",
    "cayley",
    "clipped",
    "conv_norm",
    "group_shuffle",
    "orthogonal",
    "remove_spectral",
    "rescaled",
    "skew",
    "spectral_report",
    "tensor_train",
]


def __dir__() -> list[str]:
    return __all__
