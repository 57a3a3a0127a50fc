"""A layer as a linear map."""

from .adjoint import AdjointOperator as AdjointOperator
from .adjoint import adjoint as adjoint
from .base import KernelOperator as KernelOperator
from .base import LinearOperator as LinearOperator
from .composed import ComposedOperator as ComposedOperator
from .composed import compose as compose
from .conv import ConvOperator as ConvOperator
from .dense import DenseOperator as DenseOperator
from .layers import as_operator as as_operator
