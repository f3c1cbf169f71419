"""Graph operators on PyTorch: segment reductions and sparse products, twice differentiable, without a compiled wheel."""

from . import data, fields, message, rewire
from .attention import Attention
from .backends import backend
from .calculus import (
    Dirichlet,
    Energy,
    GraphOperator,
    PeronaMalik,
    PLaplacian,
    TotalVariation,
    dirichlet_energy,
    divergence,
    gradient,
    gradient_adjoint,
    laplacian,
    laplacian_operator,
)
from .errors import (
    ArgumentError,
    ArgumentTypeError,
    GraphopsError,
    MissingDataError,
    MissingPackageError,
    UnknownNameError,
    UnsupportedError,
)
from .graph import Graph
from .pattern import Segments
from .segment import attend, gather, log_softmax, logsumexp, max, mean, min, prod, sddmm, softmax, spmm, std, sum

__all__ = [
    "Graph",
    "Segments",
    "sum",
    "mean",
    "max",
    "min",
    "prod",
    "std",
    "softmax",
    "log_softmax",
    "logsumexp",
    "gather",
    "spmm",
    "sddmm",
    "attend",
    "Attention",
    "gradient",
    "divergence",
    "gradient_adjoint",
    "laplacian",
    "laplacian_operator",
    "GraphOperator",
    "dirichlet_energy",
    "Energy",
    "Dirichlet",
    "PLaplacian",
    "TotalVariation",
    "PeronaMalik",
    "backend",
    "data",
    "fields",
    "message",
    "rewire",
    "GraphopsError",
    "ArgumentError",
    "ArgumentTypeError",
    "UnknownNameError",
    "UnsupportedError",
    "MissingPackageError",
    "MissingDataError",
]
