"""Layers that satisfy a constraint by construction: each function takes a layer and returns it or what replaces it.

DDP and FSDP2 (`fully_shard`) work: parametrize first, shard afterwards; measure between `layer.unshard()` and
`layer.reshard()`. Under FSDP the parameters of `rescaled`, `clipped` and `banded` come back inside by their gradients alone, for
what a forward writes to gathered weights is lost.
"""

from .cayley import cayley as cayley
from .clipped import banded as banded
from .clipped import clipped as clipped
from .conv_norm import conv_norm as conv_norm
from .group_shuffle import group_shuffle as group_shuffle
from .orthogonal import orthogonal as orthogonal
from .remove import remove_spectral as remove_spectral
from .remove import spectral_report as spectral_report
from .rescaled import rescaled as rescaled
from .skew import skew as skew
from .tensor_train import tensor_train as tensor_train
