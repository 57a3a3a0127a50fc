"""Singular values of a network's layers as the linear maps that they really are."""

from . import bounds as bounds
from . import estimates as estimates
from . import initializers as initializers
from . import parametrizations as parametrizations
from . import projections as projections
from .hooks import SpectralClip as SpectralClip
from .operators import ComposedOperator as ComposedOperator
from .operators import ConvOperator as ConvOperator
from .operators import DenseOperator as DenseOperator
from .operators import KernelOperator as KernelOperator
from .operators import LinearOperator as LinearOperator
from .operators import adjoint as adjoint
from .operators import as_operator as as_operator
from .operators import compose as compose
from .parametrizations import remove_spectral as remove_spectral
from .spectrum import asymptotic_singular_values as asymptotic_singular_values
from .spectrum import singular_values as singular_values
from .spectrum import spectral_norm as spectral_norm
from .spectrum import spectral_norms as spectral_norms
