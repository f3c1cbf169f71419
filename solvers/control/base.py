"""What a step-size controller is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

from ..registry import Registry


class Decision(NamedTuple):
    """accept: bool or ``(B,)`` mask. factor: next dt / this dt (> 0). state: the controller's. order: the next order of a
    method of variable order (int or ``(B,)``), None to keep it."""

    accept: Any
    factor: Any
    state: Any
    order: Any = None


class Controller(ABC):
    """Decides over each attempted step; runs under ``no_grad`` and never enters a gradient.

    Keyword-only dataclass fields are the options that ``solve`` accepts for it. All arithmetic goes through ``ops``
    (:class:`~solvers.layout.ScalarOps` or :class:`~solvers.layout.RowOps`), so one rule serves every batch mode.
    """

    adaptive: ClassVar[bool] = True
    variable_order: ClassVar[bool] = False
    """Whether it also chooses the order, and so reads an error for each."""
    repeats: ClassVar[float] = 0.3
    """Repeated steps for each accepted one, over a long solve, that only rounding leads to."""

    def init(self, ops: Any, like: Any) -> Any:
        """State before the first step; ``like`` is the first dt (float or ``(B,)``)."""
        return ()

    @abstractmethod
    def update(self, ops: Any, ratio: Any, error_order: int, state: Any, method_state: Any) -> Decision:
        """Judge one step.

        ratio: its error in units of the tolerance (float or ``(B,)``; a tuple for the orders k-1, k, k+1 of a method of
        variable order); not finite where the step failed altogether. error_order: exponent of dt in the error.
        """


CONTROLLERS: Registry[Controller] = Registry("controller")
