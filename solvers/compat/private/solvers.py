"""Bases of solver classes: one that overrides only a step is run by the time loop, one that overrides ``integrate`` by itself."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...adjoint import ADJOINTS
from ...api import solve
from ...methods import Method, StepOut
from ...status import ArgumentError
from ..errors import CheckError, EventNotReached
from ..event import FIXED_ITERATIONS
from ..odeint import Adapted
from ..options import on_grid
from .event_handling import Search, find_event
from .misc import _handle_unused_kwargs


class AdaptiveStepsizeODESolver(ABC):
    """Integrates from one output time to the next by :meth:`_advance`."""

    def __init__(self, dtype: torch.dtype, y0: Tensor, norm: Any, **unused_kwargs: Any) -> None:
        _handle_unused_kwargs(self, unused_kwargs)
        self.y0, self.dtype, self.norm = y0, dtype, norm

    def _before_integrate(self, t: Tensor) -> None:  # noqa: B027 - classes that need nothing leave it as it is
        """Whatever has to happen before the first step."""

    @abstractmethod
    def _advance(self, next_t: Tensor) -> Tensor:
        """The state at ``next_t``."""

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        return set()

    def integrate(self, t: Tensor) -> Tensor:
        """States ``(T, *y0.shape)`` at the ascending times ``t``."""
        t = t.to(self.dtype)
        self._before_integrate(t)
        return torch.stack([self.y0, *(self._advance(time) for time in t[1:])])


class AdaptiveStepsizeEventODESolver(AdaptiveStepsizeODESolver):
    """One that can also look for an event."""

    @abstractmethod
    def _advance_until_event(self, event_fn: Any) -> tuple[Tensor, Tensor]:
        """Time of the event and the state then."""

    def integrate_until_event(self, t0: Tensor, event_fn: Any) -> tuple[Tensor, Tensor]:
        t0 = t0.to(self.y0.device, self.dtype)
        self._before_integrate(t0.reshape(-1))
        event_time, y1 = self._advance_until_event(event_fn)
        return event_time, torch.stack([self.y0, y1])


class FixedGridODESolver(ABC):
    """Steps on a grid of times by :meth:`_step_func`."""

    order: int

    def __init__(
        self,
        func: Any,
        y0: Tensor,
        step_size: Any = None,
        grid_constructor: Callable[..., Tensor] | None = None,
        interp: str = "linear",
        perturb: bool = False,
        **unused_kwargs: Any,
    ) -> None:
        self.atol = unused_kwargs.pop("atol", None)
        for name in ("rtol", "norm"):
            unused_kwargs.pop(name, None)
        _handle_unused_kwargs(self, unused_kwargs)
        if step_size is not None and grid_constructor is not None:
            raise ArgumentError("step_size and grid_constructor are mutually exclusive arguments.")
        if interp not in ("linear", "cubic"):
            raise ArgumentError(f"Unknown interpolation method {interp}: interp must be 'linear' or 'cubic'")
        self.func, self.y0, self.dtype, self.device = func, y0, y0.dtype, y0.device
        self.step_size, self.interp, self.perturb = step_size, interp, perturb
        if step_size is not None:
            grid_constructor = self._grid_constructor_from_step_size(step_size)
        self.grid_constructor = grid_constructor or (lambda func, y0, t: t)

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        return {"callback_step"}

    @staticmethod
    def _grid_constructor_from_step_size(step_size: Any) -> Callable[..., Tensor]:
        def grid(func: Any, y0: Tensor, t: Tensor) -> Tensor:
            start, end, size = float(t[0]), float(t[-1]), float(step_size)
            # Counted in float64, and a last step of rounding is none.
            inner = torch.arange(1, max(1, -int((start - end) / size * (1 - 1e-12) // 1)), dtype=torch.float64)
            times = (start + inner * size).to(t)
            return torch.cat([t[:1], times, t[-1:]])

        return grid

    @abstractmethod
    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        """(y1 - y0, func(t0, y0)) for the step from t0 to t1 = t0 + dt."""

    def integrate(self, t: Tensor) -> Tensor:
        """States ``(T, *y0.shape)`` at the ascending times ``t``, by the time loop."""
        if len(t) == 1:
            return self.y0.unsqueeze(0)
        grid = self.grid_constructor(self.func, self.y0, t)
        keywords: dict[str, Any] = {"controller": "fixed"} if grid is t else on_grid(grid, t)
        adjoint = Adapted(ADJOINTS["backprop"])
        solution = solve(self.func, self.y0, t, method=OfClass(self), adjoint=adjoint, throw=False, **keywords)
        if not solution.success:
            warnings.warn(f"{solution.message} The rows that were not reached are NaN.", stacklevel=4)
        return solution.y

    def integrate_until_event(self, t0: Tensor, event_fn: Any) -> tuple[Tensor, Tensor]:
        """Time of the event and states ``(2, *y0.shape)`` at ``t0`` and then.

        Raises ``CheckError`` without a step size, ``EventNotReached`` after 20,000 steps.
        """
        if self.step_size is None:
            raise CheckError(
                "Event handling for fixed step solvers currently requires `step_size` to be provided in options."
            )
        tol = 1e-9 if self.atol is None else self.atol
        start = t0.to(self.y0.real.dtype if self.y0.is_complex() else self.y0.dtype)
        y, search = self.y0, Search(event_fn, start, self.y0)
        for _ in range(FIXED_ITERATIONS):
            end = start + self.step_size
            dy, f = self._step_func(self.func, start, end - start, end, y)
            if search.crossed(end, y + dy):
                inside = self._inside(start, end, y, y + dy, f)
                time, state = find_event(inside, search.sign, start, end, event_fn, tol)
                return time, torch.stack([self.y0, state])
            start, y = end, y + dy
        raise EventNotReached(f"Reached maximum number of iterations {FIXED_ITERATIONS} without an event: t = {float(start):.9g}")

    def _inside(self, t0: Tensor, t1: Tensor, y0: Tensor, y1: Tensor, f0: Tensor) -> Callable[[Tensor], Tensor]:
        """The interpolant of a step."""
        if self.interp == "linear":
            return lambda t: self._linear_interp(t0, t1, y0, y1, t)
        f1 = self.func(t1, y1)
        return lambda t: self._cubic_hermite_interp(t0, y0, f0, t1, y1, f1, t)

    def _linear_interp(self, t0: Any, t1: Any, y0: Tensor, y1: Tensor, t: Any) -> Tensor:
        return y0 + (t - t0) / (t1 - t0) * (y1 - y0)

    def _cubic_hermite_interp(
        self, t0: Any, y0: Tensor, f0: Tensor, t1: Any, y1: Tensor, f1: Tensor, t: Any
    ) -> Tensor:
        dt = t1 - t0
        x = (t - t0) / dt
        change = y1 - y0
        bend = (1 - x) * (dt * f0 - change) + x * (change - dt * f1)
        return y0 + x * change + x * (1 - x) * bend


class _Ends(NamedTuple):
    t0: Tensor
    t1: Tensor
    y0: Tensor
    y1: Tensor
    f0: Any
    f1: Any


@dataclass(frozen=True)
class OfClass(Method):
    """A method whose step is a solver object's ``_step_func``."""

    solver: FixedGridODESolver

    error_order = None
    reference = "the user's"
    controller = "fixed"

    @property
    def name(self) -> str:  # type: ignore[override]
        return type(self.solver).__name__

    @property
    def order(self) -> int:  # type: ignore[override]
        return int(getattr(self.solver, "order", 1))

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> tuple[()]:
        return ()

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: Any, active: Any) -> StepOut:
        layout, solver, calls = field.layout, self.solver, [0]

        def func(t: Tensor, y: Tensor, **perturb: Any) -> Tensor:
            calls[0] += 1
            return field.func(t, y, **perturb)

        start, size = (torch.as_tensor(x, dtype=torch.float64, device=layout.device) for x in (t0, dt))
        start, size, end = (x.to(layout.real_dtype) for x in (start, size, start + size))
        y = layout.unflatten(y0)
        told = getattr(solver.func, "callback_step", None)
        if told is not None:
            told(start, y, size)
        dy, f0 = solver._step_func(func, start, size, end, y)
        y1 = y + dy
        dense = _Ends(start, end, y, y1, f0, None)
        return StepOut(layout.flatten(y1, "the state after _step_func"), None, dense, (), calls[0])

    def prepare(self, field: Any, dense: _Ends) -> tuple[_Ends, int]:
        if self.solver.interp == "linear":
            return dense, 0
        return dense._replace(f1=field.func(dense.t1, dense.y1)), 1

    def interpolate(self, dense: _Ends, theta: Tensor, derivative: int = 0) -> Tensor:
        t0, t1, y0, y1, f0, f1 = dense
        found = []
        for time in (t0 + theta.to(t0.dtype) * (t1 - t0)).unbind(0):
            if self.solver.interp == "linear":
                y = self.solver._linear_interp(t0, t1, y0, y1, time)
            else:
                y = self.solver._cubic_hermite_interp(t0, y0, f0, t1, y1, f1, time)
            found.append(y.reshape(-1))
        return torch.stack(found)
