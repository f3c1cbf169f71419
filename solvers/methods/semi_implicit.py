"""Semi-implicit steps of quasi-linear fields f = A(t, y) y: linear in the unknown, stable whatever their length."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..optim import INNER_OPTIMIZERS, InnerOptimizer, InnerResult, ProximalProblem, any_true, attach, minimise
from ..problem import FlatOperator, QuasiLinearField
from .base import METHODS, Method, StepOut, inverse, number
from .solving import check_inner_options, inner_named, status


class SemiState(NamedTuple):
    """The state before the last step and that step's size (0: none yet); dy/dt over it, detached."""

    before: Tensor
    dt: Any
    slope: Tensor


class SemiDense(NamedTuple):
    """The parabola through the last three states: ``bend`` is its part that vanishes at both ends, over theta (theta - 1)."""

    layout: Any
    dt: Any
    y0: Tensor
    y1: Tensor
    bend: Tensor


class LinearStep(ProximalProblem):
    """z - a - g (L z + b) = 0, with exact products."""

    def __init__(self, op: FlatOperator, t: Tensor, a: Tensor, g: Any, norm: Any, scale: Tensor) -> None:
        super().__init__(_Frozen(op), t, a, g, norm, scale)
        self.op = op

    def jv(self, point: Any, v: Tensor) -> Tensor:
        self.calls += 1
        return v - self.wide * self.op.product(v)


class _Frozen:
    """L z + b as a field."""

    def __init__(self, op: FlatOperator) -> None:
        self.op, self.layout = op, op.layout

    def __call__(self, t: Tensor, z: Tensor) -> Tensor:
        return self.op.slope(z)


@dataclass(frozen=True)
class SemiImplicit(Method):
    """(I - g A(t1, y*)) y1 = a for a :class:`~solvers.QuasiLinearField`, with a, g and y* from states that are known.

    The linear system is solved by products with A: conjugate gradients where A says ``symmetric``, else GMRES, or the
    solver named by ``inner=``, to ``inner_tol`` in the error norm. Where -A is positive semidefinite, or I + A / rate is
    stochastic, every step is bounded by the states before it, whatever dt.

    Gradients are those of the solved step, that of A to y* included, by the implicit function theorem, twice differentiable.
    ``backward_tol``: relative tolerance of their linear systems.

    Fixed steps only. Calls: products with A, counted as f.
    """

    inner: InnerOptimizer | None = None
    _: KW_ONLY
    inner_tol: float = 0.1
    max_iters: int = 1000
    backward_tol: float = 1e-8

    error_order: ClassVar[int | None] = None  # type: ignore[misc]
    remedy: ClassVar[str] = "smaller steps, a larger max_iters= or inner_tol=, or another inner="
    implicit: ClassVar[bool] = True
    one_step: ClassVar[bool] = False
    demands: ClassVar[Any] = QuasiLinearField

    def __post_init__(self) -> None:
        check_inner_options(self)

    def choose_inner(self, inner: Any) -> InnerOptimizer | None:
        return inner_named(inner, self.inner)

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> SemiState:
        layout = field.layout
        none = 0.0 if layout.joint else torch.zeros(layout.batch, dtype=torch.float64, device=layout.device)
        return SemiState(y0, none, torch.zeros_like(y0.detach()))

    def scheme(self, layout: Any, dt: Any, y0: Tensor, state: SemiState) -> tuple[Tensor, Any, Tensor, Any]:
        """a, g, y*, and dt over the size of the last step."""
        raise NotImplementedError

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: SemiState, active: Any) -> StepOut:
        layout, grad = field.layout, torch.is_grad_enabled()
        a, g, at, omega = self.scheme(layout, dt, y0, state)
        (t1,) = field.times(t0, dt, (1.0,))
        with torch.no_grad():
            op = _operator(field, t1.detach(), at.detach())
            problem = LinearStep(op, t1.detach(), a.detach(), number(g), field.norm, field.norm.scale(y0.detach()))
            start = problem.evaluate(y0.detach() + layout.spread(number(dt)) * state.slope)
            inner = self._inner(op).chosen(layout)
            found = minimise(
                problem,
                inner,
                start,
                tol=self.inner_tol,
                max_iters=self.max_iters,
                active=active,
                memory=inner.remember(layout, y0.detach()),
            )
        y1, calls = found.z, problem.calls
        if grad and any_true(found.converged):
            y1, more = self._record(field, t1, at, a, g, problem, found, inner)
            calls += more
        change = y1 - y0
        wide = layout.spread(omega)
        bend = wide / (1 + wide) * (change - wide * (y0 - state.before))
        slope = problem.keep(number(dt) != 0, change.detach() * layout.spread(inverse(number(dt))), state.slope)
        after, dense = SemiState(y0, dt, slope), SemiDense(layout, dt, y0, y1, bend)
        return StepOut(y1, None, dense, after, calls, status(problem, found), found.iterations, problem.algebra)

    def _inner(self, op: FlatOperator) -> InnerOptimizer:
        return self.inner or INNER_OPTIMIZERS["fletcher_reeves" if op.symmetric else "newton_krylov"]

    def _record(
        self, field: Any, t1: Tensor, at: Tensor, a: Tensor, g: Any, problem: LinearStep, found: InnerResult, inner: Any
    ) -> tuple[Tensor, int]:
        """The solution as a function of everything the step depends on, and the products that took; samples without one stay
        constants."""
        op, wide = _operator(field, t1, at), field.layout.spread(g)
        # What is not finite must not reach the gradient of the others.
        z = problem.keep(found.converged, found.z, problem.a)
        solved = attach(lambda z: z - a - wide * op.slope(z), z, problem, self.backward_tol, inner.direct(problem, z))
        return problem.keep(found.converged, solved, found.z), op.calls

    def interpolate(self, dense: SemiDense, theta: Tensor, derivative: int = 0) -> Tensor:
        layout, change, bend = dense.layout, dense.y1 - dense.y0, dense.bend
        theta = layout.spread(theta)
        theta = theta.unsqueeze(-1) if layout.joint else theta
        if derivative == 0:
            return dense.y0 + theta * change + theta * (theta - 1) * bend
        rate = layout.spread(inverse(dense.dt))
        if derivative == 1:
            return (change + (2 * theta - 1) * bend) * rate
        return (2 if derivative == 2 else 0) * torch.ones_like(theta) * bend * rate**derivative


@dataclass(frozen=True)
class SemiImplicitEuler(SemiImplicit):
    """(I - dt A(t1, y0)) y1 = y0."""

    name: ClassVar[str] = "semi_implicit_euler"  # type: ignore[misc]
    order: ClassVar[int] = 1  # type: ignore[misc]
    reference: ClassVar[str] = "Chamberlain et al. 2021, equation 8"  # type: ignore[misc]

    def scheme(self, layout: Any, dt: Any, y0: Tensor, state: SemiState) -> tuple[Tensor, Any, Tensor, Any]:
        return y0, dt, y0, dt * 0.0


@dataclass(frozen=True)
class SemiImplicitBDF2(SemiImplicit):
    """BDF2 for steps of any size with A at the extrapolation of the last two states; the first step is one of Euler's, whose
    error is of second order."""

    name: ClassVar[str] = "semi_implicit_bdf2"  # type: ignore[misc]
    order: ClassVar[int] = 2  # type: ignore[misc]
    reference: ClassVar[str] = "HNW III.5 (variable steps); linearised by extrapolation"  # type: ignore[misc]

    def scheme(self, layout: Any, dt: Any, y0: Tensor, state: SemiState) -> tuple[Tensor, Any, Tensor, Any]:
        omega = dt * inverse(state.dt)
        wide, away = layout.spread(omega), y0 - state.before
        weight = wide * wide / (1 + 2 * wide)
        return y0 + weight * away, dt * (1 + omega) / (1 + 2 * omega), y0 + wide * away, omega


def _operator(field: Any, t: Tensor, y: Tensor) -> FlatOperator:
    """A(t, y) on flat states; a field that is linear is its own."""
    func, layout, args = field.func, field.layout, field.args
    if not hasattr(func, "operator"):
        return FlatOperator(func, layout, args)
    return FlatOperator(func.operator(t, layout.unflatten(y), *args), layout)


for _method in (SemiImplicitEuler(), SemiImplicitBDF2()):
    METHODS.register(_method.name, _method)
