"""Inner solvers of implicit steps, registered by name in :data:`INNER_OPTIMIZERS`."""

from . import conjugate, gradient, newton, newton_krylov, secant  # (registration)
from .base import (
    INNER_OPTIMIZERS,
    Algebra,
    InnerOptimizer,
    InnerProblem,
    InnerResult,
    InnerStep,
    Point,
    ProximalProblem,
    StageProblem,
    all_true,
    any_true,
    minimise,
)
from .energy import lower_of, lowered, merged, not_higher
from .implicit import attach
from .unrolled import UnrolledProblem

__all__ = [
    "INNER_OPTIMIZERS",
    "Algebra",
    "InnerOptimizer",
    "InnerProblem",
    "InnerResult",
    "InnerStep",
    "Point",
    "ProximalProblem",
    "StageProblem",
    "UnrolledProblem",
    "all_true",
    "any_true",
    "attach",
    "lower_of",
    "lowered",
    "merged",
    "minimise",
    "not_higher",
]
