"""scipy's solvers behind ``method="scipy_solver"``: they report failure, are bounded, and their calls of func are counted."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from ..adjoint import Adjoint
from ..adjoint.backsolve import Backsolve, Continuous
from ..adjoint.whole import solve_whole
from ..api import solve
from ..loop import Plan, Trajectory
from ..solution import Solution
from ..status import ArgumentError, SolveError, Status
from .errors import ScipyError

SOLVERS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")
MOST_CALLS = 200_000
"""Calls of func, unless the option max_nfe says otherwise: LSODA never gives up by itself where a solution ends."""
LOOSER = 1000.0
"""Factor of the tolerances where LSODA has to be kept to a min_step."""


@dataclass(frozen=True)
class Settings:
    """``options`` of the method: ``solver``, ``min_step`` (LSODA only), ``max_step``, ``max_nfe``."""

    solver: str
    min_step: float
    max_step: float
    max_nfe: int

    @classmethod
    def read(cls, options: dict[str, Any]) -> Settings:
        solver = options.get("solver", "LSODA")
        if solver not in SOLVERS:
            raise ArgumentError(f"solver must be one of {', '.join(SOLVERS)}, found {solver!r}")
        if solver != "LSODA" and "min_step" in options:
            warnings.warn("The following arguments have no effect for a chosen solver: `min_step`.", stacklevel=5)
        limit = options.get("max_nfe", MOST_CALLS)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ArgumentError(f"max_nfe must be an integer >= 1, found {limit!r}")
        return cls(solver, float(options.get("min_step", 0.0)), float(options.get("max_step", math.inf)), limit)

    def start(self, work: Any, t: float, y: np.ndarray, end: float, rtol: Any, atol: Any) -> Any:
        """scipy's solver from (t, y)."""
        keywords: dict[str, Any] = {"max_step": max(self.max_step, self.min_step)}
        if self.solver == "LSODA" and self.min_step > 0:
            keywords["first_step"] = min(self.min_step, abs(end - t))
        return getattr(scipy.integrate, self.solver)(work, t, y, end, rtol=rtol, atol=atol, **keywords)

    def too_short(self, solver: Any) -> bool:
        """Whether a step was shorter than min_step, which LSODA takes no notice of since scipy 1.17."""
        return self.solver == "LSODA" and solver.status == "running" and solver.step_size < self.min_step * (1 - 1e-12)


def run(problem: Any, choice: Any, adjoint: Any, args: tuple[Any, ...]) -> Solution:
    """Solve ``problem`` by scipy; under ``odeint_adjoint`` its gradient is that of the continuous adjoint."""
    settings = Settings.read(choice.options)
    by_scipy = _ByScipy(settings, adjoint if hasattr(adjoint, "more") else None, [])
    try:
        return solve(
            problem.func, problem.y0, problem.t, method="dopri5", rtol=problem.rtol, atol=problem.atol, adjoint=by_scipy,
            args=args,
        )
    except SolveError as error:
        what = by_scipy.message[-1] if by_scipy.message else str(error)
        raise ScipyError(f"scipy's {settings.solver} failed: {what}", error.solution) from None


@dataclass(frozen=True)
class _ByScipy(Adjoint):
    """Runs a plan by scipy. ``adjoint``: that of ``odeint_adjoint``, or None: then there is no gradient. ``message``: takes
    scipy's complaint."""

    settings: Settings
    adjoint: Any
    message: list[str]

    def run(self, plan: Plan, y0: Tensor, stats: Any) -> Trajectory:
        plan.layout.lenient = True
        if self.adjoint is None or not torch.is_grad_enabled():
            return integrate(plan, y0, self.settings, self.message)
        return solve_whole(
            _ScipyForward, plan, y0, stats, more=self.adjoint.more, options=Backsolve(), by_scipy=self
        )


class _ScipyForward(Continuous):
    """scipy forwards, the continuous adjoint backwards."""

    def __init__(self, *arguments: Any, by_scipy: _ByScipy, options: Backsolve) -> None:
        super().__init__(*arguments, options=options)
        self.by_scipy = by_scipy

    def forward(self, tensors: Any) -> tuple[Trajectory, list[Tensor]]:
        plan = self.inputs.rebind(self.plan, self.inputs.detached(tensors))
        trajectory = integrate(plan, tensors[0].detach(), self.by_scipy.settings, self.by_scipy.message)
        self.times, self.t_last = trajectory.t.detach(), trajectory.t_last
        # The call that found what f captures: scipy makes its own first one.
        counts = {name: count + 1 for name, count in trajectory.counts.items()}
        return trajectory._replace(counts=counts), []

    def backward(self, tensors, saved, values, last, needed) -> list[Tensor | None]:
        found = super().backward(tensors, saved, values, last, needed)
        return self.by_scipy.adjoint.chosen(self.inputs, tensors, found, needed)


@torch.no_grad()
def integrate(plan: Plan, y0: Tensor, settings: Settings, message: list[str]) -> Trajectory:
    """scipy's steps from the flat ``y0`` over the plan's times, outputs from its own dense output."""
    clock: Any = plan.clock
    work = _Function(plan, y0, settings.max_nfe)
    rows = [y0.detach().clone()]
    status, t_last = Status.SUCCESS, clock.start
    if clock.start != clock.end:
        rtol, atol = _numpy(plan.norm.rtol), _numpy(plan.norm.atol)
        solver: Any = settings.start(work, clock.start, work.start, clock.end, rtol, atol)
        try:
            while solver.status == "running":
                complaint = solver.step()
                if solver.status == "failed":
                    status = Status.STEP_UNDERFLOW
                    message.append(f"{complaint} (t = {solver.t:.9g}, nfe = {work.calls})")
                    break
                _collect(solver, clock, rows, work)
                if settings.too_short(solver):
                    # The error of a step of min_step counts as small enough, whatever it is.
                    rtol, atol = LOOSER * rtol, LOOSER * atol
                    solver = settings.start(work, float(solver.t), solver.y, clock.end, rtol, atol)
        except _TooMuch:
            status = Status.MAX_STEPS
            message.append(f"max_nfe = {settings.max_nfe} calls of func did not reach the end (t = {solver.t:.9g})")
        t_last = float(solver.t)
    missing = len(clock.outputs) - len(rows)
    last = rows[-1]
    rows += [torch.full_like(y0, torch.nan)] * missing
    counts = {"nfe": work.calls, "nfe_per_sample": work.calls}
    return Trajectory(clock.source.detach().clone(), torch.stack(rows), status, t_last, last, 0.0, counts, [])


def _collect(solver: Any, clock: Any, rows: list[Tensor], work: _Function) -> None:
    """Outputs that the step reached."""
    reached = clock.reached(float(solver.t), len(rows))
    if reached == len(rows):
        return
    dense = solver.dense_output()
    for time in clock.outputs[len(rows) : reached]:
        rows.append(work.tensor(dense(time)))


def _numpy(tolerance: Any) -> Any:
    return tolerance.cpu().numpy().astype(np.float64) if isinstance(tolerance, Tensor) else tolerance


class _TooMuch(Exception):
    pass


class _Function:
    """f on numpy vectors of float64 (or complex128), counted and limited."""

    def __init__(self, plan: Plan, y0: Tensor, limit: int) -> None:
        self.plan, self.like, self.limit, self.calls = plan, y0, limit, 0
        self.dtype = np.complex128 if y0.is_complex() else np.float64
        self.start = y0.detach().cpu().numpy().astype(self.dtype)

    def tensor(self, y: np.ndarray) -> Tensor:
        return torch.as_tensor(y).to(self.like)

    def __call__(self, t: float, y: np.ndarray) -> np.ndarray:
        if self.calls >= self.limit:
            raise _TooMuch
        self.calls += 1
        field = self.plan.field
        return field(field.time(float(t)), self.tensor(y)).cpu().numpy().astype(self.dtype)
