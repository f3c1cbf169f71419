"""Linear systems: factorised, or by products with the matrix only."""

from .factor import DenseFactor, HostFactor, SparseFactor
from .krylov import gcr, gmres

__all__ = ["DenseFactor", "HostFactor", "SparseFactor", "gcr", "gmres"]
