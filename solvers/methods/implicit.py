"""Implicit Runge-Kutta methods: one step for every tableau, its equations solved by Newton iterations."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..optim import (
    INNER_OPTIMIZERS,
    Algebra,
    InnerOptimizer,
    StageProblem,
    any_true,
    attach,
    minimise,
)
from ..optim.newton import Newton
from ..status import ArgumentError, Status
from .base import METHODS, StepOut, TableauMethod, inverse, number
from .implicit_tableaus import IMPLICIT_TABLEAUS, ImplicitTableau
from .solving import check_inner_options, detached, inner_named
from .tableau import polynomial

CHOOSING = Newton("auto")

FAR = 4.0
"""Multiple of the last step beyond which its polynomial says nothing about the next."""


class ImplicitState(NamedTuple):
    """slope: f at the start of the step. past, dt: increments of the stages of the last step, detached, and its size (0: none
    yet). memory: the inner solver's."""

    slope: Tensor
    past: tuple[Tensor, ...]
    dt: Any
    memory: Any


class ImplicitDense(NamedTuple):
    """increments: dt k_i of every stage."""

    layout: Any
    dt: Any
    y0: Tensor
    increments: tuple[Tensor, ...]


class Work:
    """What one attempted step did."""

    def __init__(self, good: Any) -> None:
        self.calls, self.algebra, self.good = 0, Algebra(), good
        self.inner: Any = 0
        self.finite: Any = good | True

    def add(self, problem: StageProblem, found: Any) -> None:
        self.algebra.add(problem.algebra)
        self.calls, self.inner = self.calls + problem.calls, self.inner + found.iterations
        self.good = self.good & found.converged
        self.finite = self.finite & problem.ops.isfinite(found.norm)


@dataclass(frozen=True)
class ImplicitRungeKutta(TableauMethod):
    """k_i = f(t0 + c_i dt, y0 + dt sum_j a_ij k_j), y1 = y0 + dt sum_i b_i k_i; the stages are solved by Newton iterations.

    One by one where the matrix is triangular, else together, in the coordinates in which it is diagonal. The increments
    dt k_i are taken from the solved equations: f itself would multiply the error of a stage by the stiffness. A stage is
    first guessed by the polynomial of the step before.

    Gradients are those of the exact solution, by the implicit function theorem, twice differentiable. Steps are rejected,
    or the solve ends with ``Status.INNER_NOT_CONVERGED``, where the equations are not solved with a new Jacobian either.

    ``inner``: "newton", "newton_sparse", "newton_krylov", or "auto", which chooses by the size of the state and by whether
    ``jac_sparsity`` is given. ``inner_tol``: error left in a stage, in units of the tolerance. ``max_iters``: iterations for
    a block of stages. ``backward_tol``: relative tolerance of the linear solves in the backward pass.

    Memory: as many states as twice the stages and some; of Newton iterations, J and up to four factorisations.
    """

    tableau: ImplicitTableau
    inner: InnerOptimizer = CHOOSING
    _: KW_ONLY
    inner_tol: float = 0.01
    max_iters: int = 20
    backward_tol: float = 1e-8

    implicit: ClassVar[bool] = True
    one_step: ClassVar[bool] = False
    controller: ClassVar[str] = "predictive"
    remedy: ClassVar[str] = "smaller steps, jac=, or a larger max_iters= or inner_tol="

    def __post_init__(self) -> None:
        check_inner_options(self)

    def choose_inner(self, inner: Any) -> InnerOptimizer:
        """Raises ``ArgumentError`` for an inner solver that is no Newton iteration, ``UnknownNameError`` for unknown names."""
        inner = inner_named(inner, self.inner)
        if not hasattr(inner, "filtered"):
            names = ", ".join(repr(name) for name, item in INNER_OPTIMIZERS.items() if hasattr(item, "filtered"))
            raise ArgumentError(f"method {self.name!r} needs a Newton iteration, inner= one of {names}")
        return inner

    def at_fixed_steps(self) -> ImplicitRungeKutta:
        return replace(self, inner=replace(self.inner, patient=True)) if isinstance(self.inner, Newton) else self

    def check(self, layout: Any) -> None:
        self.inner.chosen(layout)

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> ImplicitState:
        layout, still = field.layout, torch.zeros_like(y0.detach())
        none = 0.0 if layout.joint else torch.zeros(layout.batch, dtype=torch.float64, device=layout.device)
        slope = still if f0 is None else f0 if self.tableau.explicit_first else f0.detach()
        return ImplicitState(slope, (still,) * self.tableau.stages, none, self.inner.chosen(layout).remember(layout, y0))

    # -- the step -----------------------------------------------------------------------------------------------------

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: ImplicitState, active: Any) -> StepOut:
        tableau, layout = self.tableau, field.layout
        attempt = _Attempt(self, field, t0, dt, y0, state, active)
        wide = layout.spread(dt)
        increments: list[Any] = [None] * tableau.stages
        if tableau.explicit_first:
            increments[0] = wide * state.slope
        last = y0
        for block in tableau.blocks:
            last = attempt.solve(block, increments)
            if not any_true(attempt.work.good):
                return self._failed(attempt, active)
        y1 = last if tableau.stiffly_accurate else y0 + _sum(tableau.b, increments)
        end = increments[-1] * layout.spread(inverse(dt)) if tableau.stiffly_accurate else None
        error = self._error(attempt, increments)
        slope = self._slope(attempt, y1, end)
        past = tuple(x.detach() for x in increments)
        work = attempt.work
        after = ImplicitState(slope, past, attempt.size, attempt.memory)
        dense = ImplicitDense(layout, dt, y0, tuple(increments))
        return StepOut(y1, error, dense, after, work.calls, _status(layout, work, active), work.inner, work.algebra)

    def _failed(self, attempt: _Attempt, active: Any) -> StepOut:
        y0, layout, work = attempt.y0, attempt.field.layout, attempt.work
        still = torch.zeros_like(y0)
        dense = ImplicitDense(layout, attempt.dt, y0, (still,) * self.tableau.stages)
        status = _status(layout, work, active)
        return StepOut(y0, still, dense, attempt.state, work.calls, status, work.inner, work.algebra)

    @torch.no_grad()
    def _error(self, attempt: _Attempt, increments: list[Any]) -> Tensor | None:
        tableau = self.tableau
        if not tableau.b_error:
            return None
        error = _sum(tableau.b_error[0], [x.detach() for x in increments])
        if tableau.start_weight:
            error = error + (tableau.start_weight * attempt.wide) * attempt.state.slope.detach()
        return attempt.filtered(tableau.gamma, error) if tableau.filtered else error

    def _slope(self, attempt: _Attempt, y1: Tensor, end: Tensor | None) -> Tensor:
        """f at the end: from the equation of the last stage where that is there. Else nothing needs it."""
        if end is None:
            return attempt.state.slope
        return end if self.tableau.explicit_first else end.detach()

    def interpolate(self, dense: ImplicitDense, theta: Tensor, derivative: int = 0) -> Tensor:
        layout, columns = dense.layout, self.tableau.extension.P
        wide = layout.spread(theta)
        wide = wide.unsqueeze(-1) if layout.joint else wide
        result: Any = dense.y0 if derivative == 0 else torch.zeros_like(dense.y0)
        scale = layout.spread(inverse(dense.dt)) ** derivative if derivative else 1.0
        for column, increment in zip(columns, dense.increments, strict=True):
            result = result + polynomial((0.0, *column), wide, derivative) * (increment * scale if derivative else increment)
        return result


class _Attempt:
    """One attempted step: what its blocks of stages share."""

    def __init__(
        self, method: ImplicitRungeKutta, field: Any, t0: Any, dt: Any, y0: Tensor, state: ImplicitState, active: Any
    ) -> None:
        self.method, self.field, self.state = method, field, state
        self.t0, self.dt, self.y0 = t0, dt, y0
        self.start, self.size, self.begin = y0.detach(), number(dt), number(t0)
        self.wide = field.layout.spread(self.size)
        self.inner: Any = method.inner.chosen(field.layout)
        self.memory = state.memory
        self.work = Work(active)
        self.guesses: Tensor | None = None
        self.depends = any(isinstance(x, Tensor) and x.requires_grad for x in (y0, t0, dt, state.slope))
        with torch.no_grad():
            self.scale = field.norm.scale(self.start)
            self.reach = self._reach()

    def _reach(self) -> Any:
        """dt over the last dt; 0 where there was none or its polynomial does not reach so far."""
        ops = self.field.layout.ops
        known = self.state.dt != 0
        reach = ops.where(known, self.size / ops.where(known, self.state.dt, 1.0), 0.0)
        return ops.where(reach <= FAR, reach, 0.0)

    def problem(self, block: tuple[int, ...], base: Tensor) -> StageProblem:
        tableau = self.method.tableau
        nodes, matrix = _block(tableau, block)
        times = self.field.times(self.begin, self.size, nodes)
        origin = (self.begin, self.start)
        return StageProblem(self.field, times, base, self.size, self.field.norm, self.scale, matrix, origin)

    def solve(self, block: tuple[int, ...], increments: list[Any]) -> Tensor:
        """The stages of ``block``: puts their increments in place and returns the last one's argument."""
        method, grad = self.method, torch.is_grad_enabled()
        with torch.no_grad():
            base = self._base(block, self.start, [None if x is None else x.detach() for x in increments])
            problem = self.problem(block, base)
            guess = self._guess(block)
            with torch.set_grad_enabled(grad):
                first = problem.evaluate(guess)
            found = minimise(
                problem, self.inner, detached(first), tol=method.inner_tol, max_iters=method.max_iters,
                active=self.work.good, memory=self.memory,
            )  # fmt: skip
            self.memory = found.memory
            self.depends = self.depends or problem.depends
            # Samples that failed rest where they were: f and its derivative need not exist where they got to.
            z = problem.keep(found.converged, found.z, torch.cat([self.start] * len(block), -1))
        if grad and self.depends and any_true(found.converged):
            z, base = self._record(block, increments, problem, z)
        self.work.add(problem, found)
        inverse = _inverted(self.method.tableau, block)
        away = [x - b for x, b in zip(problem.split(z), problem.split(base), strict=True)]
        for i, row in zip(block, inverse, strict=True):
            increments[i] = _sum(row, away)
        return problem.split(z)[-1]

    def _record(self, block: tuple[int, ...], increments: list[Any], problem: StageProblem, z: Tensor) -> tuple[Tensor, Tensor]:
        """The solution and its base as functions of everything that they depend on."""
        base = self._base(block, self.y0, increments)
        times = self.field.times(self.t0, self.dt, _block(self.method.tableau, block)[0])
        live = StageProblem(self.field, times, base, self.dt, self.field.norm, self.scale, problem.matrix)
        solved = attach(live.residual, z, problem, self.method.backward_tol, self.inner.direct(problem, z))
        self.work.calls += live.calls
        return solved, base

    def _base(self, block: tuple[int, ...], start: Tensor, increments: list[Any]) -> Tensor:
        """a_i = y0 + sum_j a_ij (dt k_j) over the stages before the block."""
        a = self.method.tableau.a
        rows = [a[i][: block[0]] for i in block]
        parts = [start + _sum(row, increments[: block[0]]) if any(row) else start for row in rows]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def _guess(self, block: tuple[int, ...]) -> Tensor:
        """The last step's polynomial at the stages of ``block``, less its end, which is the start of this one."""
        tableau, layout = self.method.tableau, self.field.layout
        if layout.joint:
            if self.reach == 0.0:
                return torch.cat([self.start] * len(block), -1)
            if self.guesses is None:
                powers, columns, nodes = _extrapolation(tableau)
                theta = (1.0 + self.reach * nodes)[:, None] ** powers - 1.0
                weights = torch.from_numpy(theta @ columns).to(layout.device, layout.dtype)
                self.guesses = torch.addmm(self.start, weights, torch.stack(self.state.past).detach())
            return self.guesses[block[0] : block[-1] + 1].view(-1)
        return torch.cat([self._extrapolated(1.0 + tableau.c[i] * self.reach) for i in block], -1)

    def _extrapolated(self, theta: Tensor) -> Tensor:
        tableau, spread = self.method.tableau, self.field.layout.spread
        z = self.start
        for column, weight, increment in zip(tableau.extension.P, tableau.b, self.state.past, strict=True):
            z = z + spread(polynomial((0.0, *column), theta, 0) - weight) * increment.detach()
        return z

    def filtered(self, weight: float, x: Tensor) -> Tensor:
        """(I - dt weight J)^-1 x."""
        problem = StageProblem(
            self.field, (), self.start, self.size, self.field.norm, self.scale, ((weight,),), (self.begin, self.start)
        )
        y = self.inner.filtered(problem, self.memory, weight, x)
        self.work.calls += problem.calls
        self.work.algebra.add(problem.algebra)
        return y


@lru_cache(maxsize=128)
def _block(tableau: ImplicitTableau, block: tuple[int, ...]) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...]]:
    """Nodes and matrix of some stages."""
    return tuple(tableau.c[i] for i in block), tuple(tuple(tableau.a[i][j] for j in block) for i in block)


@lru_cache(maxsize=128)
def _extrapolation(tableau: ImplicitTableau) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Powers of theta ``(p,)``, weights of the increments ``(p, s)``, nodes ``(s,)``."""
    columns = np.array(tableau.extension.P).T
    return np.arange(1.0, len(columns) + 1), columns, np.array(tableau.c)


@lru_cache(maxsize=128)
def _inverted(tableau: ImplicitTableau, block: tuple[int, ...]) -> list[list[float]]:
    return np.linalg.inv(np.array(_block(tableau, block)[1])).tolist()


def _sum(weights: Any, terms: list[Any]) -> Any:
    """sum_i weights_i terms_i, leaving out what has no weight."""
    total: Any = None
    for weight, term in zip(weights, terms, strict=True):
        if weight:
            total = weight * term if total is None else torch.add(total, term, alpha=weight)
    return total


def _status(layout: Any, work: Work, active: Any) -> Any:
    code = layout.ops.where(work.finite, int(Status.INNER_NOT_CONVERGED), int(Status.NON_FINITE))
    if layout.joint:
        return None if work.good else Status(code)
    return torch.where(active & ~work.good, code, int(Status.SUCCESS)).to(torch.int8)


for _tableau in IMPLICIT_TABLEAUS.values():
    METHODS.register(_tableau.name, ImplicitRungeKutta(_tableau))
