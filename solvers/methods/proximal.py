"""Proximal methods: implicit steps taken as minimisations (Xia 2023, chapter 5)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..optim import (
    INNER_OPTIMIZERS,
    InnerOptimizer,
    InnerResult,
    Point,
    ProximalProblem,
    all_true,
    any_true,
    attach,
    minimise,
)
from ..status import ArgumentError, ArgumentTypeError, Status
from .base import METHODS, Method, StepOut

NOISE = 3.0
"""Multiples of the inner tolerance below which the second-order term of the predictor is noise: it amplifies the errors of
three solved steps by about that much."""


class ProxState(NamedTuple):
    """What the last accepted steps say of the next one, detached: dy/dt at the start; the divided difference of dy/dt
    over the last two steps (0: none yet); the last step's size (0: none yet); the inner optimiser's memory."""

    slope: Tensor
    bend: Tensor
    dt: Any
    memory: Any


class ProxDense(NamedTuple):
    layout: Any
    dt: Any
    y0: Tensor
    y1: Tensor


@dataclass(frozen=True)
class ProxEuler(Method):
    """Backward Euler, y1 = argmin_z |z - y0|**2 / (2 dt) + F(t1, z) for f = -grad F (Xia 2023, section 5.1).

    F is never needed: the equation solved is the stationarity condition in its scaled form, r(z) = z - y0 - dt f(t1, z) = 0,
    by the optimiser ``inner``, started from the extrapolation of the steps before. It serves any f, with a potential or
    without, in either direction of time, as long as I - dt J is positive definite (dt times the growth rate below 1).

    For a dissipative f, |r| bounds the error of a step's solution in the same norm. Steps are rejected, or the solve
    ends with ``Status.INNER_NOT_CONVERGED``, where r did not get below ``inner_tol``.

    Gradients are those of the exact solution of the step, by the implicit function theorem, twice differentiable; the inner
    iterations are not recorded. Dense output is linear in between: as accurate as the method, and free of the
    overshoot of a cubic through the slopes, which where fast modes decay are large at the start of a step.

    ``inner_tol``: bound of |r| in the error norm of the solve, in units of its tolerance. ``max_iters``: inner iterations per
    step. ``backward_tol``: relative tolerance of the linear solves in the backward pass.

    Units: dt and t in the units of t, error in those of y. Calls of f a step: one and the inner solver's, two more where
    gradients are recorded.
    """

    inner: InnerOptimizer = INNER_OPTIMIZERS["fletcher_reeves"]
    _: KW_ONLY
    inner_tol: float = 0.1
    max_iters: int = 1000
    backward_tol: float = 1e-8

    name: ClassVar[str] = "prox_euler"  # type: ignore[misc]
    order: ClassVar[int] = 1  # type: ignore[misc]
    error_order: ClassVar[int | None] = 2  # type: ignore[misc]
    reference: ClassVar[str] = "Xia 2023, section 5.1; implicit Euler"  # type: ignore[misc]
    remedy: ClassVar[str] = "smaller steps, a larger max_iters= or inner_tol=, or another inner="
    implicit: ClassVar[bool] = True
    one_step: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for option in ("inner_tol", "max_iters", "backward_tol"):
            if not getattr(self, option) > 0:
                raise ArgumentError(f"{option} must be positive, found {getattr(self, option)}")

    def choose_inner(self, inner: Any) -> InnerOptimizer:
        """The optimiser that ``inner`` names; "auto": the one this instance has.

        Raises ``UnknownNameError`` for other names, ``ArgumentTypeError`` for what is neither a name nor an optimiser.
        """
        if isinstance(inner, InnerOptimizer):
            return inner
        if not isinstance(inner, str):
            raise ArgumentTypeError(f"inner must be a name or an InnerOptimizer, found {type(inner).__name__}")
        return self.inner if inner == "auto" else INNER_OPTIMIZERS[inner]

    def check(self, layout: Any) -> None:
        self.inner.chosen(layout)

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> ProxState:
        y0 = y0.detach()
        layout = field.layout
        none = 0.0 if layout.joint else torch.zeros(layout.batch, dtype=torch.float64, device=layout.device)
        slope = torch.zeros_like(y0) if f0 is None else f0.detach()
        return ProxState(slope, torch.zeros_like(y0), none, self.inner.chosen(layout).remember(layout, y0))

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: ProxState, active: Any) -> StepOut:
        size, grad, inner = _number(dt), torch.is_grad_enabled(), self.inner.chosen(field.layout)
        with torch.no_grad():
            start = y0.detach()
            (t1,) = field.times(_number(t0), size, (1.0,))
            problem = ProximalProblem(field, t1, start, size, field.norm, field.norm.scale(y0))
            found = minimise(
                problem,
                inner,
                self._predict(problem, state, grad),
                tol=self.inner_tol,
                max_iters=self.max_iters,
                active=active,
                memory=state.memory,
            )
            error, after = _advance(problem, state, found)
        y1, calls = found.z, problem.calls
        depends = problem.depends or any(isinstance(x, Tensor) and x.requires_grad for x in (y0, t0, dt))
        if grad and depends and any_true(found.converged):
            y1, calls = self._record(field, t0, dt, y0, problem, found, inner), calls + 2
        dense, status = ProxDense(field.layout, dt, y0, y1), _status(problem, found)
        return StepOut(y1, error, dense, after, calls, status, found.iterations, problem.algebra)

    def _predict(self, problem: ProximalProblem, state: ProxState, grad: bool) -> Point:
        """Extrapolation of the past, or the start where that has the smaller residual."""
        y0, wide = problem.a, problem.wide
        slope = wide * state.slope
        bend = wide * problem.layout.spread(problem.g + state.dt) * state.bend
        z = y0 + slope
        z = problem.keep(problem.norm(bend) > NOISE * self.inner_tol, z + bend, z)
        with torch.set_grad_enabled(grad):
            point = problem.evaluate(z)
        # |dt f| is the residual of y0, nearly; below the tolerance both are good enough.
        good = problem.norm(point.r) <= problem.ops.maximum(problem.norm(slope), self.inner_tol)
        if all_true(good):
            return point
        return problem.evaluate(problem.keep(good, z, y0))

    def _record(
        self, field: Any, t0: Any, dt: Any, y0: Tensor, problem: ProximalProblem, found: InnerResult, inner: InnerOptimizer
    ) -> Tensor:
        """The solution as a function of everything the step depends on; samples without one stay constants."""
        wide = field.layout.spread(dt)

        def residual(z: Tensor) -> Tensor:
            (t1,) = field.times(t0, dt, (1.0,))
            return z - y0 - wide * field(t1, z)

        # f and its derivative need not exist at an iterate that failed.
        z = problem.keep(found.converged, found.z, problem.a)
        solved = attach(residual, z, problem, self.backward_tol, inner.direct(problem, z))
        return problem.keep(found.converged, solved, found.z)

    def interpolate(self, dense: ProxDense, theta: Tensor, derivative: int = 0) -> Tensor:
        layout, change = dense.layout, dense.y1 - dense.y0
        weight = layout.spread(theta)
        if layout.joint:
            weight = weight.unsqueeze(-1)
        if derivative == 0:
            return dense.y0 + weight * change
        if derivative > 1:
            return torch.zeros_like(weight * change)
        rate = layout.spread(_inverse(dense.dt))
        return torch.ones_like(weight) * (change * rate)


def _advance(problem: ProximalProblem, state: ProxState, found: InnerResult) -> tuple[Tensor, ProxState]:
    """Error estimate and the next state.

    The slope at the end is taken from the solved equation, (y1 - y0) / dt: f itself would cost a call and multiply the inner
    error by the stiffness. The estimate (dt / 2) (f1 - f0) is the leading term of the local error.
    """
    layout, dt = problem.layout, problem.g
    change = found.z - problem.a
    error = 0.5 * (change - problem.wide * state.slope)
    slope = problem.keep(dt != 0, change * layout.spread(_inverse(dt)), state.slope)
    bend = (slope - state.slope) * layout.spread(_inverse(dt + state.dt))
    bend = problem.keep(state.dt != 0, bend, torch.zeros_like(bend))
    return error, ProxState(slope, bend, dt, found.memory)


def _inverse(dt: Any) -> Any:
    """1 / dt, 0 where dt is 0."""
    if not isinstance(dt, Tensor):
        return 1.0 / dt if dt else 0.0
    still = dt == 0
    return torch.where(still, 0.0, 1.0 / torch.where(still, 1.0, dt))


def _number(x: Any) -> Any:
    """Without a gradient: a float in joint mode, else ``(B,)``."""
    if not isinstance(x, Tensor):
        return x
    return x.item() if x.dim() == 0 else x.detach()


def _status(problem: ProximalProblem, found: InnerResult) -> Any:
    code = problem.ops.where(problem.ops.isfinite(found.norm), int(Status.INNER_NOT_CONVERGED), int(Status.NON_FINITE))
    if problem.layout.joint:
        return None if found.converged else Status(code)
    return torch.where(found.converged, int(Status.SUCCESS), code).to(torch.int8)


METHODS.register("prox_euler", ProxEuler())
