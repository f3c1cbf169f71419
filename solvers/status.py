"""What a solve can end with, and the typed errors that say so."""

from __future__ import annotations

import enum
from typing import Any


class Status(enum.IntEnum):
    """Outcome of one sample. Codes below 10 are no failure."""

    RUNNING = -1
    SUCCESS = 0
    STOPPED = 1
    EVENT = 2
    MAX_EVENTS = 3
    NON_FINITE = 10
    STEP_UNDERFLOW = 11
    MAX_STEPS = 12
    INNER_NOT_CONVERGED = 13
    EVENTS_ACCUMULATE = 14

    @property
    def failed(self) -> bool:
        return self >= FIRST_FAILURE


FIRST_FAILURE = 10


class ProxodeError(Exception):
    """Base of everything that this package raises on purpose."""


class ArgumentError(ProxodeError, ValueError):
    """An argument has a value that cannot be used; raised before any work is done."""


class ArgumentTypeError(ProxodeError, TypeError):
    """An argument has a type or dtype that cannot be used; raised before any work is done."""


class UnknownNameError(ArgumentError):
    """A name or option that nothing here is called by; the message offers the nearest one."""


class UnsupportedError(ProxodeError, NotImplementedError):
    """A combination that is understood but not provided."""


class StiffnessWarning(UserWarning):
    """An explicit method was held to small steps by stability: an implicit or a stabilised one would take fewer."""


class RoundingWarning(UserWarning):
    """Rounding errors of f, not the method's own, made an implicit method repeat its steps; the solution may be as wrong."""


class SolveError(ProxodeError, RuntimeError):
    """A solve failed. ``.solution`` holds everything that was reached before it did."""

    def __init__(self, message: str, solution: Any = None) -> None:
        super().__init__(message)
        self.solution = solution


class NonFiniteError(SolveError):
    """f returned NaN or infinity and no smaller step helped, or an event function returned NaN."""


class StepUnderflowError(SolveError):
    """The step size that the tolerance asks for is below ``dt_min`` or below rounding."""


class MaxStepsError(SolveError):
    """``max_steps`` attempted steps did not reach the end."""


class InnerSolverError(SolveError):
    """The equations of an implicit step were not solved to their tolerance."""


class EventsAccumulateError(SolveError):
    """Events with a reset follow each other faster than t can tell apart (Zeno's paradox)."""


ERRORS: dict[Status, type[SolveError]] = {
    Status.NON_FINITE: NonFiniteError,
    Status.STEP_UNDERFLOW: StepUnderflowError,
    Status.MAX_STEPS: MaxStepsError,
    Status.INNER_NOT_CONVERGED: InnerSolverError,
    Status.EVENTS_ACCUMULATE: EventsAccumulateError,
}
