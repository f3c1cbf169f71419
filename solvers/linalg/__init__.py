"""Linear systems, factorised or by products with the matrix only, and exponentials by such products."""

from .exponential import KrylovSpace, combine, crossed, expm, integrated, poisson_tails, poisson_terms
from .factor import DenseFactor, HostFactor, SparseFactor
from .krylov import gcr, gmres, minres

__all__ = [
    "DenseFactor",
    "HostFactor",
    "KrylovSpace",
    "SparseFactor",
    "combine",
    "crossed",
    "expm",
    "gcr",
    "gmres",
    "integrated",
    "minres",
    "poisson_tails",
    "poisson_terms",
]
