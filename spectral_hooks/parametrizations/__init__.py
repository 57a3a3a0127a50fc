"""Layers that satisfy a constraint by construction: each function takes a layer and returns it, parametrized."""

from .remove import remove_spectral as remove_spectral
from .remove import spectral_report as spectral_report
from .rescaled import rescaled as rescaled
