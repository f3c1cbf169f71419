"""Methods and controllers that do something beside the step: callbacks, times moved off the grid, torchdiffeq's warnings.

They stand around an ordinary method, so the one loop runs them and knows nothing of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..control import Controller
from ..control.base import Decision
from ..field import Field
from ..loop import Plan
from ..methods import Method, StepOut
from ..methods.adams import ImplicitAdams
from ..methods.rk import RungeKutta
from ..methods.tableau import Extension

Callback = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Wrapped(Method):
    """A method that is another one in all respects that a subclass does not change."""

    wrapped: Method

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.wrapped.name

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.wrapped.order

    @property
    def error_order(self) -> int | None:  # type: ignore[override]
        return self.wrapped.error_order

    @property
    def reference(self) -> str:  # type: ignore[override]
        return self.wrapped.reference

    @property
    def real_limit(self) -> float:  # type: ignore[override]
        return self.wrapped.real_limit

    @property
    def implicit(self) -> bool:  # type: ignore[override]
        return self.wrapped.implicit

    @property
    def reads_values(self) -> bool:  # type: ignore[override]
        return self.wrapped.reads_values

    @property
    def one_step(self) -> bool:  # type: ignore[override]
        return self.wrapped.one_step

    @property
    def variable_order(self) -> bool:  # type: ignore[override]
        return self.wrapped.variable_order

    @property
    def remedy(self) -> str:  # type: ignore[override]
        return self.wrapped.remedy

    @property
    def controller(self) -> str:  # type: ignore[override]
        return self.wrapped.controller

    def at_fixed_steps(self) -> Method:
        return replace(self, wrapped=self.wrapped.at_fixed_steps())

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> Any:
        return self.wrapped.init(field, t0, dt, y0, f0)

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: Any, active: Any) -> StepOut:
        return self.wrapped.step(field, t0, dt, y0, state, active)

    def prepare(self, field: Any, dense: Any) -> tuple[Any, int]:
        return self.wrapped.prepare(field, dense)

    def replay(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: Any, active: Any, interior: bool) -> StepOut:
        return self.wrapped.replay(field, t0, dt, y0, state, active, interior)

    def interpolate(self, dense: Any, theta: Tensor, derivative: int = 0) -> Tensor:
        return self.wrapped.interpolate(dense, theta, derivative)

    def snapshot(self, dense: Any) -> Any:
        return self.wrapped.snapshot(dense)

    def ratio(self, norm: Any, y0: Tensor, out: StepOut) -> Any:
        return self.wrapped.ratio(norm, y0, out)


@dataclass(frozen=True)
class FromStart(Wrapped):
    """An implicit method that asks for f at the start of every step, as torchdiffeq's do, to begin its iterations from."""

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: Any, active: Any) -> StepOut:
        with torch.no_grad():
            start = t0.detach() if isinstance(t0, Tensor) else t0
            slope = field(field.time(start), y0.detach())
        out = self.wrapped.step(field, t0, dt, y0, state._replace(slope=slope), active)
        return out._replace(work=out.work + 1)


class InsideField(Field):
    """f is met strictly inside each step: just after its start, just before its end (torchdiffeq's ``perturb``)."""

    __slots__ = ("_sign",)

    _sign: float

    @classmethod
    def of(cls, field: Field, sign: float) -> InsideField:
        """``field`` in this manner; ``sign``: of the direction of travel."""
        moved = cls(field.func, field.layout, field.args, field.time_dtype, field.norm)
        moved._sign = sign
        return moved

    def renewed(self, args: tuple[Any, ...], norm: Any) -> InsideField:
        return InsideField.of(super().renewed(args, norm), self._sign)

    def time(self, t: Any) -> Tensor:
        return _next(super().time(t), self._sign)

    def times(self, t0: Any, dt: Any, nodes: tuple[float, ...]) -> tuple[Tensor, ...]:
        found = super().times(t0, dt, nodes)
        toward = {0.0: self._sign, 1.0: -self._sign}
        return tuple(_next(t, toward[c]) if c in toward else t for t, c in zip(found, nodes, strict=True))


def _next(t: Tensor, sign: float) -> Tensor:
    """The neighbour of ``t`` in that direction, with the gradient of ``t``."""
    value = t.detach()
    moved = torch.nextafter(value, torch.full_like(value, sign * torch.inf))
    return t + (moved - value) if t.requires_grad else moved


def perturbed(plan: Plan) -> Plan:
    """``plan`` on an :class:`InsideField`."""
    return replace(plan, field=InsideField.of(plan.field, float(plan.clock.sign)))


@dataclass(frozen=True)
class Watched(Wrapped):
    """Calls the user's ``callback_step(t0, y0, dt)`` before every attempted step; dt is positive, t0 as it is.

    Not before the steps that an adjoint takes again: those are no new ones.
    """

    watch: Watch

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: Any, active: Any) -> StepOut:
        self.watch.attempt(field.layout, t0, y0, dt)
        return self.wrapped.step(field, t0, dt, y0, state, active)

    def replay(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: Any, active: Any, interior: bool) -> StepOut:
        return self.wrapped.replay(field, t0, dt, y0, state, active, interior)


@dataclass(frozen=True)
class WatchedController(Controller):
    """Tells the user of every accepted and rejected step."""

    wrapped: Controller
    watch: Watch

    @property
    def adaptive(self) -> bool:  # type: ignore[override]
        return self.wrapped.adaptive

    @property
    def variable_order(self) -> bool:  # type: ignore[override]
        return self.wrapped.variable_order

    def init(self, ops: Any, like: Any) -> Any:
        return self.wrapped.init(ops, like)

    def update(self, ops: Any, ratio: Any, error_order: int, state: Any, method_state: Any) -> Decision:
        decision = self.wrapped.update(ops, ratio, error_order, state, method_state)
        self.watch.judged(decision.accept)
        return decision


class Watch:
    """The callbacks of one solve, and the step that they are about."""

    def __init__(
        self, step: Callback | None, accept: Callback | None, reject: Callback | None, view: Callable[[Any], Any]
    ) -> None:
        self.step, self.accept, self.reject, self.view = step, accept, reject, view
        self._now: tuple[Any, Any, Any] = (None, None, None)

    def attempt(self, layout: Any, t0: Any, y0: Tensor, dt: Any) -> None:
        def number(x: Any) -> Tensor:
            return torch.as_tensor(x, dtype=torch.float64, device=layout.device).detach()

        self._now = (number(t0), self.view(layout.unflatten(y0)), number(dt).abs())
        if self.step is not None:
            self.step(*self._now)

    def judged(self, accepted: Any) -> None:
        """Joint mode: one step, one verdict."""
        told = self.accept if accepted else self.reject
        if told is not None:
            told(*self._now)


def linear(method: Method) -> Method:
    """The method with straight lines between its nodes, where that can be had."""
    if not isinstance(method, RungeKutta):
        return method
    tableau = method.tableau
    straight = Extension(1, tuple((weight,) for weight in tableau.b))
    return RungeKutta(replace(tableau, name=f"{tableau.name} (linear)", extension=straight))


class Corrected(ImplicitAdams):
    """Adams-Moulton that warns where its corrector did not converge, and carries on as torchdiffeq does."""

    def _iterate(self, field: Any, t1: Any, y: Tensor, base: Any, own: Any, active: Any) -> tuple[Tensor, Tensor, int, Any]:
        y, slope, calls, status = super()._iterate(field, t1, y, base, own, active)
        if status is not None and bool(status.any() if isinstance(status, Tensor) else status):
            warnings.warn(
                "Functional iteration did not converge. Solution may be incorrect. Take smaller steps or more max_iters",
                stacklevel=2,
            )
        return y, slope, calls, None
