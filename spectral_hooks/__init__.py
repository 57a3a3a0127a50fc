"""Singular values of a network's layers as the linear maps that they really are."""

from . import hooks, parametrizations, projections
from .hooks import SpectralClip
from .norms import (
    asymptotic_singular_values,
    bounds,
    estimates,
    padding_factor,
    singular_values,
    spectral_norm,
    spectral_norms,
)
from .operators import (
    ComposedOperator,
    ConvOperator,
    DenseOperator,
    KernelOperator,
    LinearOperator,
    adjoint,
    as_operator,
    compose,
)
from .parametrizations import remove_spectral
from .weights import initializers

__all__ = [
    "ComposedOperator",
    "ConvOperator",
    "DenseOperator",
    "KernelOperator",
    "LinearOperator",
    "SpectralClip",
    "adjoint",
    "as_operator",
    "asymptotic_singular_values",
    "bounds",
    "compose",
    "estimates",
    "hooks",
    "initializers",
    "padding_factor",
    "parametrizations",
    "projections",
    "remove_spectral",
    "singular_values",
    "spectral_norm",
    "spectral_norms",
]
