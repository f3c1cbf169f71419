"""Steps along the residual, with and without momentum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .base import INNER_OPTIMIZERS, InnerProblem, Point
from .evaluating import Evaluating, check_stop
from .linesearch import Rated

SLOWER = 0.25
"""Factor by which the rate is cut where an iteration has failed."""


class DescentState(NamedTuple):
    """eta, known: the rate and the curvature. x: where the last step along the residual led, before momentum.
    count: iterations since momentum began. memory: of the start."""

    eta: Any
    known: Any
    x: Tensor
    count: Any
    memory: Any


def _none(problem: InnerProblem, state: DescentState) -> Any:
    """No momentum (Cauchy 1847)."""
    return 0.0 * state.eta


def _strongly_convex(problem: InnerProblem, state: DescentState) -> Any:
    """(sqrt L - 1) / (sqrt L + 1), the curvature being in [1, L] (Nesterov 2004, Introductory Lectures, 2.2.22)."""
    root = problem.ops.maximum(1.0 / state.eta, 1.0) ** 0.5
    return (root - 1.0) / (root + 1.0)


def _growing(problem: InnerProblem, state: DescentState) -> Any:
    """k / (k + 3) (Nesterov 1983), begun anew where the step goes uphill (O'Donoghue & Candes 2015, Found. Comput. Math. 15)."""
    return state.count / (state.count + 3.0)


MOMENTUM: dict[str, Callable[[InnerProblem, DescentState], Any]] = {
    "gradient_descent": _none,
    "nesterov": _strongly_convex,
    "nesterov_restart": _growing,
    "fixed_point": _none,
}
"""The weight of x' - x in the next iterate. Each entry is an optimiser."""


@dataclass(frozen=True)
class Descent(Rated, Evaluating):
    """x' = z - eta r(z), z' = x' + b (x' - x) with b by ``formula``: one call of f an iteration.

    ``rate``: "constant", eta = 1 / L, L = 1 + |g| rho with rho estimated by power iterations and kept for some steps in time,
    or given as ``lipschitz`` (of f, in 1/time); or a number, eta itself, in units of the scaled residual. Of "fixed_point"
    it is 1, z' = a + g f(z), which converges where |g| rho < 1. Where an iteration fails, it goes on at a quarter of the rate.
    """

    formula: str = "gradient_descent"
    _: KW_ONLY
    rate: str | float = "constant"
    lipschitz: float | None = None

    unrolls: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_rate("constant")
        check_stop(self.inner_stop)

    def init(self, problem: Any, point: Point, running: Any, memory: Any) -> DescentState:
        eta, known, memory = self.begun(problem, point, running, memory)
        zero = 0.0 if problem.layout.joint else torch.zeros_like(running, dtype=torch.float64)
        return DescentState(zero + eta, known, point.z, zero, memory)

    def curvature(self, state: DescentState) -> Any:
        return state.known

    def memory(self, problem: Any, state: DescentState) -> Any:
        return state.memory

    def propose(self, problem: InnerProblem, z: Tensor, r: Tensor, state: DescentState) -> tuple[Tensor, DescentState]:
        spread, ops = problem.layout.spread, problem.ops
        x = z - spread(state.eta) * r
        change = x - state.x
        if self.formula == "nesterov_restart":
            state = state._replace(count=ops.where(problem.dot(r, change) > 0, 0.0, state.count))
        weight = MOMENTUM[self.formula](problem, state)
        return x + spread(weight) * change, state._replace(x=x, count=state.count + 1.0)

    def resume(self, problem: InnerProblem, point: Point, state: DescentState, again: Any) -> DescentState:
        ops = problem.ops
        eta, count = ops.where(again, SLOWER * state.eta, state.eta), ops.where(again, 0.0, state.count)
        return state._replace(eta=eta, count=count, x=problem.keep(again, point.z, state.x))


for _name in MOMENTUM:
    INNER_OPTIMIZERS.register(_name, Descent(_name, rate=1.0 if _name == "fixed_point" else "constant"))
