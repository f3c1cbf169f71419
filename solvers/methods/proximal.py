"""Proximal methods: implicit steps taken as minimisations (Xia 2023, chapter 5)."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..optim import INNER_OPTIMIZERS, Algebra, InnerOptimizer, Point, ProximalProblem, any_true
from .adams_weights import distances
from .backward_weights import combined, increments, lagrange, values, variable_coefficients
from .base import METHODS, Method, StepOut, inverse, number
from .solving import FALLBACK, check_inner, check_inner_options, guarded, held, inner_named, quiet, remembered, solve_stage

NOISE = 3.0
"""Multiples of the inner tolerance below which the second-order term of the predictor is noise: it amplifies the errors of
three solved steps by about that much."""


SHARE = 0.3
"""The same of a BDF's predictor, for its term of degree 2; twice as much for each degree more."""
DRIFT = 3.0
"""A BDF of fixed order solves to this part of the inner tolerance: from starts as good as its own, what iterations leave is
smooth and of one sign from step to step, so that its effects add up."""


class ProxState(NamedTuple):
    """slope: f where the solve began. past, steps: the two states before, the latest first, and the sizes of the steps from them
    (0: none yet); what they say of the next step is worked out anew, so that a backward pass that keeps the states of all
    steps has no more to keep. memory: the inner optimiser's."""

    slope: Tensor
    past: tuple[Tensor, Tensor]
    steps: tuple[Any, Any]
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
    step (None: what suits the inner solver). ``backward_tol``: relative tolerance of the linear solves in the backward pass.
    ``fallback``: names of inner solvers that are tried in turn on steps that ``inner`` does not solve (a stall, negative
    curvature, a growing residual); None leaves them to shorter steps. ``energy``: whether the energy of a
    :class:`~solvers.GradientField` is used: the iteration then starts at the lower of the two starts, and what it finds is
    only taken if the objective has fallen; else one that lowers it at every iteration goes on from the start.
    ``implicit_diff``: False differentiates through the recorded iterations of gradients or conjugate gradients instead: their
    number in memory, and as exact as ``inner_tol``.

    Units: dt and t in the units of t, error in those of y. Calls of f a step: one and the inner solver's, two more where
    gradients are recorded.
    """

    inner: InnerOptimizer = INNER_OPTIMIZERS["fletcher_reeves"]
    _: KW_ONLY
    inner_tol: float = 0.1
    max_iters: int | None = None
    backward_tol: float = 1e-8
    fallback: str | tuple[str, ...] | None = FALLBACK
    energy: bool = True
    implicit_diff: bool = True

    name: ClassVar[str] = "prox_euler"  # type: ignore[misc]
    order: ClassVar[int] = 1  # type: ignore[misc]
    error_order: ClassVar[int | None] = 2  # type: ignore[misc]
    reference: ClassVar[str] = "Xia 2023, section 5.1; implicit Euler"  # type: ignore[misc]
    remedy: ClassVar[str] = "smaller steps, a larger max_iters= or inner_tol=, or another inner="
    implicit: ClassVar[bool] = True
    one_step: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_inner_options(self)

    def choose_inner(self, inner: Any) -> InnerOptimizer:
        """The optimiser that ``inner`` names; "auto": the one this instance has.

        Raises ``UnknownNameError`` for other names, ``ArgumentTypeError`` for what is neither a name nor an optimiser.
        """
        return inner_named(inner, self.inner)

    def check(self, layout: Any) -> None:
        check_inner(self, layout)

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> ProxState:
        y0 = held(self, y0)
        layout = field.layout
        none = 0.0 if layout.joint else torch.zeros(layout.batch, dtype=torch.float64, device=layout.device)
        slope = torch.zeros_like(y0) if f0 is None else held(self, f0)
        return ProxState(slope, (y0, y0), (none, none), remembered(self, layout, y0))

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: ProxState, active: Any) -> StepOut:
        size, base = number(dt), held(self, y0)
        with torch.no_grad():
            scale = field.norm.scale(y0)
        with quiet(self):
            slope, bend = _slopes(field.layout, base, state)
        start = lambda problem, evaluate: self._predict(problem, evaluate, slope, bend, state.steps[0])
        done = solve_stage(self, field, t0, dt, base, size, start, lambda: (y0, dt), state.memory, active, scale)
        with quiet(self):
            # The leading term of the local error, (dt / 2) (f1 - f0).
            error = 0.5 * (done.found.z - base - field.layout.spread(size) * slope)
        after = _after(field.layout, base, size, state, done.found.memory)
        dense = ProxDense(field.layout, dt, y0, done.z)
        return StepOut(done.z, error, dense, after, done.calls, done.status, done.found.iterations, done.problem.algebra)

    def _predict(self, problem: ProximalProblem, evaluate: Any, slope: Tensor, bend: Tensor, last: Any) -> Point:
        """Extrapolation of the past, or the start where that has the smaller residual."""
        y0, wide = problem.a, problem.wide
        slope = wide * slope
        bend = wide * problem.layout.spread(problem.g + last) * bend
        z = y0 + slope
        z = problem.keep(problem.norm(bend) > NOISE * self.inner_tol, z + bend, z)
        # |dt f| is the residual of y0, nearly; below the tolerance both are good enough.
        return guarded(problem, evaluate, z, y0, slope, self.inner_tol)

    def interpolate(self, dense: ProxDense, theta: Tensor, derivative: int = 0) -> Tensor:
        layout, change = dense.layout, dense.y1 - dense.y0
        weight = layout.spread(theta)
        if layout.joint:
            weight = weight.unsqueeze(-1)
        if derivative == 0:
            return dense.y0 + weight * change
        if derivative > 1:
            return torch.zeros_like(weight * change)
        rate = layout.spread(inverse(dense.dt))
        return torch.ones_like(weight) * (change * rate)


def _slopes(layout: Any, y0: Tensor, state: ProxState) -> tuple[Tensor, Tensor]:
    """dy/dt at ``y0``, and its divided difference over the last two steps (0: none yet).

    From the solved equations, (y1 - y0) / dt: f itself would cost a call and multiply the inner error by the stiffness.
    """
    (before, earlier), (last, one) = state.past, state.steps
    slope = layout.merge(last != 0, (y0 - before) * layout.spread(inverse(last)), state.slope)
    bend = (slope - (before - earlier) * layout.spread(inverse(one))) * layout.spread(inverse(last + one))
    return slope, layout.merge(one != 0, bend, torch.zeros_like(bend))


def _after(layout: Any, y0: Tensor, dt: Any, state: ProxState, memory: Any) -> ProxState:
    """The state after a step from ``y0``; samples that stood still have the one before."""
    past, steps = layout.merge(dt != 0, ((y0, state.past[0]), (dt, state.steps[0])), (state.past, state.steps))
    return ProxState(state.slope, past, steps, memory)


# -- fixed steps ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FixedProximal(Method):
    """What the proximal methods with fixed steps share: each solves r(z) = z - a - g f(t*, z) = 0 once or several times.

    ``inner``: any inner solver; "auto": Fletcher-Reeves with exact line searches. Where it does not get to ``inner_tol`` (a
    stall, negative curvature, a growing residual), the solvers of ``fallback`` try the step from the start again.

    Args:
        inner_tol: bound of |r| in the error norm, in units of the tolerance. max_iters: inner iterations (None: what suits
            the inner solver). backward_tol: relative tolerance of the linear solves in the backward pass. fallback: as
            of :class:`ProxEuler`. energy, implicit_diff: as of :class:`ProxEuler`.
    """

    inner: InnerOptimizer = INNER_OPTIMIZERS["fletcher_reeves"]
    _: KW_ONLY
    inner_tol: float = 0.1
    max_iters: int | None = None
    backward_tol: float = 1e-8
    fallback: str | tuple[str, ...] | None = FALLBACK
    energy: bool = True
    implicit_diff: bool = True

    error_order: ClassVar[int | None] = None  # type: ignore[misc]
    remedy: ClassVar[str] = "a smaller dt=, another inner= or fallback=, or a larger inner_tol="
    implicit: ClassVar[bool] = True
    one_step: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_inner_options(self)

    def choose_inner(self, inner: Any) -> InnerOptimizer:
        return inner_named(inner, self.inner)

    def check(self, layout: Any) -> None:
        check_inner(self, layout)


class CrankNicolsonState(NamedTuple):
    """slope: f at the start of the step, with its gradient."""

    slope: Tensor
    memory: Any


class QuadraticDense(NamedTuple):
    """y0, y1, and dy/dt at the end ``at`` (0 or 1) of the step."""

    layout: Any
    dt: Any
    y0: Tensor
    y1: Tensor
    slope: Tensor
    at: int


@dataclass(frozen=True)
class ProxCrankNicolson(FixedProximal):
    """Crank-Nicolson, y1 = argmin_z |z - y0|**2 / dt + F(t1, z) - <z - y0, f(t0, y0)> (Xia 2023, section 5.1): a = y0 + dt/2 f0,
    g = dt / 2.

    f at the end follows from the solved equation, f1 = (y1 - a) / g: asking f would cost a call and multiply the inner
    error by the stiffness. Not damped at infinity: fast modes of a rough start go on swinging. Dense output is the
    quadratic with these slopes.
    """

    name: ClassVar[str] = "prox_cn"  # type: ignore[misc]
    order: ClassVar[int] = 2  # type: ignore[misc]
    reference: ClassVar[str] = "Crank & Nicolson 1947; Xia 2023, section 5.1"  # type: ignore[misc]

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> CrankNicolsonState:
        slope = torch.zeros_like(y0) if f0 is None else f0
        return CrankNicolsonState(slope, remembered(self, field.layout, y0))

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: CrankNicolsonState, active: Any) -> StepOut:
        layout, size = field.layout, number(dt)

        def live() -> tuple[Tensor, Any]:
            return y0 + layout.spread(0.5 * dt) * state.slope, 0.5 * dt

        with quiet(self):
            start, scale = held(self, y0), field.norm.scale(y0.detach())
            change = layout.spread(size) * held(self, state.slope)
            base = start + 0.5 * change
        first = lambda problem, evaluate: guarded(problem, evaluate, start + change, start, change, self.inner_tol)
        done = solve_stage(self, field, t0, dt, base, 0.5 * size, first, live, state.memory, active, scale)
        slope = (done.z - live()[0]) * layout.spread(inverse(0.5 * dt))
        after = CrankNicolsonState(slope, done.found.memory)
        dense = QuadraticDense(layout, dt, y0, done.z, state.slope, 0)
        return StepOut(done.z, None, dense, after, done.calls, done.status, done.found.iterations, done.problem.algebra)

    def interpolate(self, dense: QuadraticDense, theta: Tensor, derivative: int = 0) -> Tensor:
        return _quadratic(dense, theta, derivative)


def _quadratic(dense: QuadraticDense, theta: Tensor, derivative: int) -> Tensor:
    layout, dt = dense.layout, dense.dt
    away = theta - dense.at
    u = layout.spread(away).unsqueeze(-1) if layout.joint else layout.spread(away)
    tangent = layout.spread(dt) * dense.slope
    # y0 + theta m + theta^2 (y1 - y0 - m), or the same seen from the end.
    near, sign = (dense.y0, 1.0) if dense.at == 0 else (dense.y1, -1.0)
    bend = sign * (dense.y1 - dense.y0 - tangent)
    if derivative == 0:
        return near + u * tangent + u * u * bend
    rate = layout.spread(inverse(dt)) ** derivative
    one = torch.ones_like(u)
    parts = {1: lambda: one * tangent + 2 * u * bend, 2: lambda: 2 * one * bend}
    return parts.get(derivative, lambda: 0 * one * bend)() * rate


# -- several stages ---------------------------------------------------------------------------------------------------

PRINTED: dict[int, tuple[tuple[float, ...], ...]] = {
    1: ((1.0,),),
    2: ((5.0,), (-2.0, 6.0), (-2.0, 3 / 14, 44 / 7)),
    3: (
        (11.17,), (-7.5, 19.43), (-1.05, -4.75, 13.98), (1.8, 0.05, -7.83, 13.8), (6.2, -7.17, -1.33, 1.63, 11.52),
        (-2.83, 4.69, 2.46, -11.55, 6.68, 11.95),
    ),
}  # fmt: skip
"""gamma_{m,i}, m = 1, 2, .., i < m, of order 1 to 3 (Zaitzeff, Esedoglu & Garikipati 2020; Xia 2023, section 5.5). Those of
order 3 are rounded to a hundredth, which leaves order 0."""


def butcher(gamma: Any) -> tuple[np.ndarray, np.ndarray]:
    """A and c of the Runge-Kutta method that the stages z_m = argmin sum_i gamma_{m,i} |z - z_i|**2 / (2 dt) + F(z) are."""
    A = np.zeros((len(gamma), len(gamma)))
    for m, row in enumerate(gamma):
        total = sum(row)
        for i in range(1, len(row)):
            A[m] += row[i] / total * A[i - 1]
        A[m, m] += 1.0 / total
    return A, A.sum(1)


def order_conditions(gamma: Any, order: int) -> np.ndarray:
    """What is left of the conditions of order 2 to ``order`` (Hairer, Nørsett & Wanner I, II.2); the last stage is y1."""
    A, c = butcher(gamma)
    b = A[-1]
    return np.array([[], [c @ b - 1 / 2], [c @ b - 1 / 2, c**2 @ b - 1 / 3, b @ A @ c - 1 / 6]][order - 1])


def projected(gamma: tuple[tuple[float, ...], ...], order: int) -> tuple[tuple[float, ...], ...]:
    """The nearest coefficients that satisfy the order conditions, and sum_i b_i = 1, by Gauss-Newton steps of least length."""

    def unpack(x: np.ndarray) -> list[np.ndarray]:
        return np.split(x, np.cumsum([len(row) for row in gamma])[:-1])

    def left(x: np.ndarray) -> np.ndarray:
        rows = unpack(x)
        return np.concatenate([[butcher(rows)[1][-1] - 1.0], order_conditions(rows, order)])

    x = np.concatenate([np.array(row) for row in gamma])
    for _ in range(8):
        slope = np.stack([(left(x + e) - left(x - e)) / 2e-6 for e in 1e-6 * np.eye(len(x))], 1)
        x = x - np.linalg.lstsq(slope, left(x), rcond=None)[0]
    if np.abs(left(x)).max() > 1e-13:
        raise ArithmeticError(f"the multi-stage coefficients of order {order} leave {np.abs(left(x)).max():.1e}")
    return tuple(tuple(row.tolist()) for row in unpack(x))


GAMMA = {order: projected(gamma, order) for order, gamma in PRINTED.items()}


@lru_cache
def _gain(order: int) -> float:
    """The sum of what errors of the stages, of size 1 each, do to y1 where f does not change them."""
    found = [np.zeros(len(GAMMA[order]))]
    for m, row in enumerate(GAMMA[order]):
        found.append(sum(w / sum(row) * e for w, e in zip(row, found, strict=True)) + np.eye(len(GAMMA[order]))[m])
    return float(np.abs(found[-1]).sum())


class MultistageState(NamedTuple):
    """slope: dy/dt at the start of the step, from the equation that gave y0, with its gradient."""

    slope: Tensor
    memory: Any


class CubicDense(NamedTuple):
    """y0 and y1 with dy/dt at both."""

    layout: Any
    dt: Any
    y0: Tensor
    y1: Tensor
    slope0: Tensor
    slope1: Tensor


@dataclass(frozen=True)
class ProxMultistage(FixedProximal):
    """One step of several proximal ones, z_m = argmin_z sum_{i<m} gamma_{m,i} |z - z_i|**2 / (2 dt) + F(t_m, z), z_0 = y0, y1 the
    last (Zaitzeff, Esedoglu & Garikipati 2020; Xia 2023, section 5.5).

    A diagonally implicit Runge-Kutta method of ``order`` 1 (backward Euler), 2 (three stages) or 3 (six), whose steps lower
    a potential. Of stage order 1: on stiff problems that are forced from outside the order falls towards that; with z = dt
    lambda the error is dt**2 (c1 / z + c2 / z**2 + ..) y'', and of order 3, where c2 = -86 c1, the order comes to 1 from
    below (0.8 at z = -300, 0.98 at z = -10**4). Coefficients without c2 are not among those that the printed digits allow.
    Stages are solved to a part of ``inner_tol``, since errors of the early ones grow on their way to y1.
    """

    order: int = 2

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"prox_multistage{self.order}"

    @property
    def reference(self) -> str:  # type: ignore[override]
        return "Zaitzeff, Esedoglu & Garikipati 2020; Xia 2023, section 5.5"

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> MultistageState:
        return MultistageState(torch.zeros_like(y0) if f0 is None else f0, remembered(self, field.layout, y0))

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: MultistageState, active: Any) -> StepOut:
        layout, run = field.layout, _Stages(self, field, t0, dt, y0, state, active)
        for row, node in zip(GAMMA[self.order], _nodes(self.order), strict=True):
            if not run.take(row, node):
                break
        y1, slope = run.stages[-1], run.slope
        dense: Any = QuadraticDense(layout, dt, y0, y1, slope, 1)
        if self.order == 3:
            dense = CubicDense(layout, dt, y0, y1, state.slope, slope)
        after = MultistageState(slope, run.memory)
        return StepOut(y1, None, dense, after, run.calls, run.status, run.iterations, run.algebra)

    def interpolate(self, dense: Any, theta: Tensor, derivative: int = 0) -> Tensor:
        return (_quadratic if isinstance(dense, QuadraticDense) else _cubic)(dense, theta, derivative)


@lru_cache
def _nodes(order: int) -> tuple[float, ...]:
    return tuple(butcher(GAMMA[order])[1].tolist())


class _Stages:
    """The stages of one step: values so far, dy/dt at the last, what they took, and who is still good."""

    def __init__(self, method: Any, field: Any, t0: Any, dt: Any, y0: Tensor, state: MultistageState, active: Any) -> None:
        self.method, self.field, self.t0, self.dt = method, field, t0, dt
        self.stages, self.slope, self.memory, self.active = [y0], state.slope, state.memory, active
        self.last = 0.0
        self.calls, self.status, self.algebra = 0, None, Algebra()
        self.iterations: Any = 0
        self.scale = field.norm.scale(y0.detach())

    def take(self, row: tuple[float, ...], node: float) -> bool:
        """One stage more; whether any sample goes on."""
        layout, total = self.field.layout, sum(row)
        weights = [w / total for w in row]

        def live() -> tuple[Tensor, Any]:
            return _sum(weights, self.stages), self.dt * (1.0 / total)

        with quiet(self.method):
            before = held(self.method, self.stages[-1])
            base = _sum(weights, [held(self.method, z) for z in self.stages])
            change = layout.spread(number(self.dt) * (node - self.last)) * held(self.method, self.slope)
        start = lambda problem, evaluate: guarded(
            problem, evaluate, before + change, before, change, self.method.inner_tol
        )
        done = solve_stage(
            self.method, self.field, self.t0, self.dt, base, number(self.dt) * (1.0 / total), start, live, self.memory,
            self.active, self.scale, node, self.method.inner_tol / _gain(self.method.order),
        )  # fmt: skip
        self.slope = (done.z - live()[0]) * layout.spread(inverse(self.dt) * total)
        self.stages.append(done.z)
        self.last, self.memory = node, done.found.memory
        self.calls, self.iterations = self.calls + done.calls, self.iterations + done.found.iterations
        self.algebra.add(done.problem.algebra)
        return self._judge(done)

    def _judge(self, done: Any) -> bool:
        if self.field.layout.joint:
            self.status = done.status
            return done.status is None
        self.status = done.status if self.status is None else torch.where(self.status == 0, done.status, self.status)
        self.active = self.active & done.found.converged
        return bool(any_true(self.active))


def _sum(weights: Any, tensors: Any) -> Tensor:
    total: Any = weights[0] * tensors[0]
    for weight, x in zip(weights[1:], tensors[1:], strict=True):
        total = torch.add(total, x, alpha=weight)
    return total


def _cubic(dense: CubicDense, theta: Tensor, derivative: int) -> Tensor:
    """Hermite's cubic."""
    layout, dt = dense.layout, dense.dt
    u = layout.spread(theta)
    u = u.unsqueeze(-1) if layout.joint else u
    wide = layout.spread(dt)
    m0, m1, rise = wide * dense.slope0, wide * dense.slope1, dense.y1 - dense.y0
    columns = (m0, 3 * rise - 2 * m0 - m1, m0 + m1 - 2 * rise)
    if derivative == 0:
        return dense.y0 + u * (columns[0] + u * (columns[1] + u * columns[2]))
    total = torch.zeros_like(u) * rise
    for power, column in reversed(list(enumerate(columns, 1))):
        if power >= derivative:
            total = total * u + math.perm(power, derivative) * column
    return total * layout.spread(inverse(dt)) ** derivative


# -- backward differentiation of fixed order --------------------------------------------------------------------------


class FixedBDFState(NamedTuple):
    """past, steps, count: as of :class:`~solvers.methods.bdf.BDFState`, one state more than the formula has, for the predictor.
    start: state of the method of the first steps. settled: nobody lacks history any more."""

    past: tuple[Tensor, ...]
    steps: tuple[Any, ...]
    count: Any
    start: Any
    memory: Any
    settled: bool = False


class FixedBDFDense(NamedTuple):
    """The polynomial through y1, y0 and ``past``, ``steps`` apart; ``start``: dense data of a start step for the samples in
    ``starting`` (True, False or a mask)."""

    layout: Any
    dt: Any
    y1: Tensor
    y0: Tensor
    past: tuple[Tensor, ...]
    steps: tuple[Any, ...]
    start: Any
    starting: Any


@dataclass(frozen=True)
class ProxBDF(FixedProximal):
    """Backward differentiation of fixed ``order`` 2 to 4 with the coefficients that the steps before ask for, so that clipped
    steps and given grids keep the order; on equal steps, with F/2: |z - y0|**2 - |z - y_{-1}|**2 / 4 and so on (Xia 2023,
    section 5.1; the formula of order 4 with y_{n-3} in its last term).

    The first steps are those of ``prox_multistage`` of one order less, whose error a start can bear. Later ones start from the
    polynomial through one state more than the formula has, and are solved to a third of ``inner_tol``. Dense output is the
    polynomial of the formula.
    """

    order: int = 2

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"prox_bdf{self.order}"

    @property
    def reference(self) -> str:  # type: ignore[override]
        return "Curtiss & Hirschfelder 1952; HNW III.5 (variable steps); Xia 2023, section 5.1"

    def starter(self) -> ProxMultistage:
        """The method of the first steps."""
        return ProxMultistage(
            self.inner, self.order - 1, inner_tol=self.inner_tol, max_iters=self.max_iters, backward_tol=self.backward_tol,
            fallback=self.fallback, energy=self.energy, implicit_diff=self.implicit_diff,
        )  # fmt: skip

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> FixedBDFState:
        layout, depth = field.layout, self.order
        start, memory = self.starter().init(field, t0, dt, y0, f0), remembered(self, layout, y0)
        if layout.joint:
            return FixedBDFState((), (), 0, start, memory)
        step = torch.where(torch.as_tensor(dt).detach() < 0, -1.0, 1.0).to(torch.float64).expand(layout.batch)
        none = torch.zeros(layout.batch, dtype=torch.int64, device=layout.device)
        return FixedBDFState((torch.zeros_like(y0),) * depth, (step,) * depth, none, start, memory)

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: FixedBDFState, active: Any) -> StepOut:
        starting, settled = self._starting(state, active)
        if starting is True:
            out = self._start(field, t0, dt, y0, state, active)
        elif starting is False:
            out = self._formula(field, t0, dt, y0, state, active)
        else:
            out = self._both(field, t0, dt, y0, state, active, starting)
        depth, count = self.order, state.count
        count = min(count + 1, depth) if isinstance(count, int) else (count + 1).clamp(max=depth)
        start, memory = out.state
        after = FixedBDFState((y0, *state.past)[:depth], (dt, *state.steps)[:depth], count, start, memory, settled)
        return out._replace(state=after)

    def _starting(self, state: FixedBDFState, active: Any) -> tuple[Any, bool]:
        """Who lacks history (True, False or a mask), and whether nobody ever will again. Reads only while some may."""
        needed = self.order - 1
        if isinstance(state.count, int):
            return state.count < needed, False
        if state.settled:
            return False, True
        starting = state.count < needed
        some, others = torch.stack([starting & active, ~starting & active]).any(1).tolist()
        return (starting if others else True) if some else False, not some

    def _start(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: FixedBDFState, active: Any) -> StepOut:
        out = self.starter().step(field, t0, dt, y0, state.start, active)
        dense = FixedBDFDense(field.layout, dt, out.y1, y0, (), (), out.dense, True)
        return out._replace(dense=dense, state=(out.state, state.memory))

    def _formula(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: FixedBDFState, active: Any) -> StepOut:
        layout, size, depth = field.layout, number(dt), self.order - 1
        past, between = state.past[:depth], state.steps[:depth]

        def live() -> tuple[Tensor, Any]:
            weights, g = variable_coefficients(distances(dt, between), dt)
            return combined(layout, weights, (y0, *past)), g

        with quiet(self):
            states = tuple(held(self, x) for x in (y0, *state.past))
            weights, g = variable_coefficients(distances(size, tuple(number(x) for x in between)), size)
            base = combined(layout, weights, states)
            steps = tuple(number(x) for x in state.steps)
            terms = [combined(layout, part, states) for part in increments(distances(size, steps))]
            if isinstance(state.count, Tensor):
                terms[-1] = torch.where(layout.spread(state.count > depth), terms[-1], 0.0)
            scale = field.norm.scale(states[0].detach())
        tol = self.inner_tol / DRIFT
        start = lambda problem, evaluate: self._predict(problem, evaluate, states[0], terms, tol)
        done = solve_stage(self, field, t0, dt, base, g, start, live, state.memory, active, scale, tol=tol)
        dense = FixedBDFDense(layout, dt, done.z, y0, past, between, None, False)
        after, found = (state.start, done.found.memory), done.found
        return StepOut(done.z, None, dense, after, done.calls, done.status, found.iterations, done.problem.algebra)

    def _predict(self, problem: ProximalProblem, evaluate: Any, y0: Tensor, terms: list[Tensor], tol: float) -> Point:
        """Extrapolation of the past, without the terms of higher degree that are noise of the inner solver."""
        z = y0 + terms[0]
        for degree, term in enumerate(terms[1:], 2):
            limit = SHARE * 2.0 ** (degree - 2) * tol
            z = problem.keep(problem.norm(term) > limit, z + term, z)
        return guarded(problem, evaluate, z, y0, z - y0, tol)

    def _both(self, field, t0, dt, y0, state, active, starting) -> StepOut:
        """The start for the samples in ``starting``, and the formula for the others, who stand still for it."""
        layout = field.layout
        first = self._start(field, t0, torch.where(starting, dt, 0.0), y0, state, active & starting)
        out = self._formula(field, t0, torch.where(starting, 0.0, dt), y0, state, active & ~starting)
        wide = layout.spread(starting)
        y1 = torch.where(wide, first.y1, out.y1)
        dense = out.dense._replace(dt=dt, y1=y1, start=first.dense.start, starting=starting)
        status = torch.where(starting, first.status, out.status)
        after = (layout.merge(starting, first.state[0], state.start), out.state[1])
        first.algebra.add(out.algebra)
        return out._replace(
            y1=y1, dense=dense, status=status, state=after, work=first.work + out.work, inner=first.inner + out.inner,
            algebra=first.algebra,
        )  # fmt: skip

    def interpolate(self, dense: FixedBDFDense, theta: Tensor, derivative: int = 0) -> Tensor:
        layout, dt = dense.layout, dense.dt
        first = None if dense.start is None else self.starter().interpolate(dense.start, theta, derivative)
        if dense.starting is True:
            return first  # type: ignore[return-value]
        s = distances(dt, dense.steps)
        s = s if isinstance(s, Tensor) else theta.new_tensor(s)
        rows = lagrange(torch.cat([torch.ones_like(s[:1]), -s]), len(s) + 1)
        weights = values(rows, theta, derivative)
        if derivative:
            weights = weights * (inverse(dt) ** derivative)
        states = (dense.y1, dense.y0, *dense.past)
        if layout.joint:
            return torch.einsum("kn,ki->ni", weights.to(layout.dtype), torch.stack(states))
        result = combined(layout, weights, states)
        return result if first is None else torch.where(layout.spread(dense.starting), first, result)


METHODS.register("prox_euler", ProxEuler())
METHODS.register("prox_cn", ProxCrankNicolson())
for _order in (2, 3, 4):
    METHODS.register(f"prox_bdf{_order}", ProxBDF(order=_order))
for _order in (2, 3):
    METHODS.register(f"prox_multistage{_order}", ProxMultistage(order=_order))
