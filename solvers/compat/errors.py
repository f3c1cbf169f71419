"""Errors of the torchdiffeq front door: what ``solve`` raises, and also what code written for torchdiffeq catches."""

from __future__ import annotations

from typing import Any

from ..solution import Solution
from ..status import (
    ArgumentError,
    ArgumentTypeError,
    InnerSolverError,
    MaxStepsError,
    NonFiniteError,
    SolveError,
    StepUnderflowError,
    UnknownNameError,
)


class CheckError(ArgumentError, AssertionError):
    """A value that torchdiffeq refuses with an assertion."""


class CheckTypeError(ArgumentTypeError, AssertionError):
    """A type that torchdiffeq refuses with an assertion."""


class MethodNameError(UnknownNameError):
    """A method that is not known here (torchdiffeq: ValueError)."""


class StepUnderflow(StepUnderflowError, AssertionError):
    """The step size underflowed; the message begins with "underflow in dt"."""


class NonFiniteState(NonFiniteError, AssertionError):
    """f or the state is not finite however small the step; the message has both of torchdiffeq's phrases for it."""


class MaxStepsExceeded(MaxStepsError, AssertionError):
    """``max_num_steps`` attempted steps did not reach the end."""


class EventNotReached(MaxStepsError):
    """Fixed steps by a solver object did not come to an event."""


class ScipyError(SolveError):
    """scipy's solver gave up; ``.solution`` holds what it had reached."""


def failure(error: SolveError, max_steps: int) -> SolveError:
    """``error`` of ``solve`` as its relative here, with the key words of torchdiffeq in front."""
    solution: Solution = error.solution
    dt = solution.last.dt
    if isinstance(error, StepUnderflowError):
        return StepUnderflow(f"underflow in dt {_shown(dt)}: {error}", solution)
    if isinstance(error, MaxStepsError):
        return MaxStepsExceeded(f"max_num_steps exceeded ({max_steps}>={max_steps}): {error}", solution)
    if isinstance(error, NonFiniteError):
        return NonFiniteState(f"non-finite values in state `y`, underflow in dt {_shown(dt)}: {error}", solution)
    if isinstance(error, InnerSolverError):
        return InnerSolverError(f"Functional iteration did not converge: {error}", solution)
    return error


def _shown(dt: Any) -> str:
    return f"{dt:.3g}" if isinstance(dt, float) else f"{dt.abs().min().item():.3g}"
