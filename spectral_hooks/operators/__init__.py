"""A layer as a linear map."""

from .base import LinearOperator as LinearOperator
from .conv import ConvOperator as ConvOperator
from .dense import DenseOperator as DenseOperator
from .layers import as_operator as as_operator
