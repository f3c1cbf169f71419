"""What inner solvers share that evaluate the residual at every iterate: when they stop, how a step is taken and judged."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from ..status import ArgumentError
from .base import GROWTH, InnerOptimizer, InnerProblem, InnerStep, Point

STOPS = ("residual", "step")


@dataclass(frozen=True)
class Evaluating(InnerOptimizer):
    """z' = what :meth:`propose` says, and r(z') evaluated: one call of f an iteration.

    ``inner_stop``: "residual", until |r| <= tol, which bounds the error of a dissipative f; or "step", until |z' - z| <= tol,
    Xia's rule (2023, section 5.1), which stops up to L = 1 + |g| rho times farther from the solution.
    """

    _: KW_ONLY
    inner_stop: str = "residual"

    def __post_init__(self) -> None:
        check_stop(self.inner_stop)

    @abstractmethod
    def propose(self, problem: InnerProblem, z: Tensor, r: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next iterate, and the state there as far as it can be known before its residual is."""

    def learn(self, problem: InnerProblem, before: Point, point: Point, state: Any, running: Any) -> tuple[Point, Any]:
        """Where to go on from, now that the residual at ``point`` is known, and the state there."""
        return point, state

    def step(self, problem: InnerProblem, z: Tensor, r: Tensor, state: Any, running: Any) -> InnerStep:
        proposed, state = self.propose(problem, z, r, state)
        before = Point(z, r)
        point = problem.evaluate(problem.keep(running, proposed, z))
        error = step_error(self.inner_stop, problem, before, point)
        point, state = self.learn(problem, before, point, state, running)
        return InnerStep(point.z, point.r, state, point, error)


def check_stop(stop: Any) -> None:
    if stop not in STOPS:
        raise ArgumentError(f"inner_stop must be one of {', '.join(STOPS)}, found {stop!r}")


def step_error(stop: str, problem: InnerProblem, before: Point, point: Point) -> Any:
    """|z' - z| in the error norm where an iteration is to stop by that; NaN where the residual explodes."""
    if stop == "residual":
        return None
    grown = problem.norm(point.r) > GROWTH * problem.norm(before.r)
    return problem.ops.where(grown, torch.nan, problem.norm(point.z - before.z))
