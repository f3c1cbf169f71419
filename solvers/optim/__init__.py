"""Inner solvers of implicit steps, registered by name in :data:`INNER_OPTIMIZERS`."""

from . import conjugate
from .base import (
    INNER_OPTIMIZERS,
    InnerOptimizer,
    InnerProblem,
    InnerResult,
    InnerStep,
    Point,
    ProximalProblem,
    all_true,
    any_true,
    minimise,
)
from .implicit import attach

__all__ = [
    "INNER_OPTIMIZERS",
    "InnerOptimizer",
    "InnerProblem",
    "InnerResult",
    "InnerStep",
    "Point",
    "ProximalProblem",
    "all_true",
    "any_true",
    "attach",
    "minimise",
]
