"""One solve of one problem by one solver: what came out, under a time budget, ours and the peers' alike."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .problems import DiffusionProblem
from .timing import Deadline, OutOfTime

__all__ = ["Ours", "Outcome", "TimedField", "adaptive_explicit", "ending", "solve_ours"]


@dataclass
class Outcome:
    """What a solver gave: outputs `(T-1, *shape)` or None, its work, and why it ended if not at the end."""

    y: Tensor | None
    evaluations: int
    accepted: int | None = None
    rejected: int | None = None
    stopped_at: float | None = None
    failed: str | None = None

    @property
    def ended(self) -> str:
        """One word or phrase for the table."""
        if self.stopped_at is not None:
            return f"stopped at t={self.stopped_at:.3g}"
        return f"failed: {self.failed}" if self.failed else "done"


class TimedField:
    """A field that counts its calls, remembers how far t came, and raises OutOfTime once the deadline is over."""

    def __init__(self, field: Any, deadline: Deadline) -> None:
        self.field = field
        self.deadline = deadline
        self.calls = 0
        self.reached = 0.0

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        self.calls += 1
        if self.deadline.over():
            raise OutOfTime(self.reached)
        self.reached = max(self.reached, float(t))
        return self.field(t, y)


@dataclass(frozen=True)
class Ours:
    """One of our methods: fixed step with `steps`, or by tolerance for None; `options` of solve, which `variant` names."""

    method: str
    steps: int | None = None
    variant: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return ", ".join(
            [self.method, *([self.variant] if self.variant else []), *([] if self.steps is None else [f"{self.steps} steps"])]
        )


def ending(solution: Any) -> str:
    """How a solve with ``throw=False`` ended, in words: "done", or the status."""
    from solvers import Status

    status = Status(int(solution.status))
    return "done" if status == Status.SUCCESS else status.name.lower().replace("_", " ")


def adaptive_explicit() -> list[str]:
    """Every registered method that is explicit and chooses its own step."""
    from solvers.methods import METHODS

    chosen = [method for method in METHODS.values() if not method.implicit and method.demands is None]
    return [method.name for method in chosen if method.error_order is not None]


def solve_ours(problem: DiffusionProblem, ours: Ours, deadline: Deadline) -> Outcome:
    """Solve `problem` by one of our methods; the observer stops it when the deadline is over."""
    from solvers import Status, StiffnessWarning, solve

    options: dict[str, Any] = {**ours.options} if ours.steps is None else {"num_steps": ours.steps, **ours.options}
    deadline.start()
    times = torch.tensor(problem.times, dtype=torch.float64, device=problem.y0.device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", StiffnessWarning)  # that explicit methods crawl is what is to be shown
        solution = solve(
            problem.field,
            problem.y0,
            times,
            method=ours.method,
            throw=False,
            max_steps=10**7,
            observer=lambda step: deadline.over(),
            **{"rtol": problem.rtol, "atol": problem.atol, **options},
        )
    stats, status = solution.stats, Status(int(solution.status))
    stopped = float(solution.last.t) if status == Status.STOPPED else None
    failed = None if status in (Status.SUCCESS, Status.STOPPED) else ending(solution)
    whole = status == Status.SUCCESS
    work = int(stats.nfe) + int(stats.njvp) + int(stats.nvjp)
    return Outcome(solution.y[1:] if whole else None, work, int(stats.accepted), int(stats.rejected), stopped, failed)
