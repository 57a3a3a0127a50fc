"""How large an operator is: exact, bounded from above, estimated."""

from . import bounds, estimates
from .asymptotic import asymptotic_singular_values
from .bracket import at_most, bracket
from .padding import padding_factor
from .singular_values import singular_values
from .spectral_norm import spectral_norm, spectral_norms

__all__ = [
    "asymptotic_singular_values",
    "at_most",
    "bounds",
    "bracket",
    "estimates",
    "padding_factor",
    "singular_values",
    "spectral_norm",
    "spectral_norms",
]
