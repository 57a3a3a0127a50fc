"""A layer as a linear map."""

from .adjoint import AdjointOperator, adjoint
from .base import KernelOperator, LinearOperator
from .composed import ComposedOperator, compose
from .conv import ConvOperator
from .dense import DenseOperator
from .layers import as_operator

__all__ = [
    "AdjointOperator",
    "ComposedOperator",
    "ConvOperator",
    "DenseOperator",
    "KernelOperator",
    "LinearOperator",
    "adjoint",
    "as_operator",
    "compose",
]
