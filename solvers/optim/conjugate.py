"""Nonlinear conjugate gradients on the residual of an implicit step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..status import ArgumentError
from .base import INNER_OPTIMIZERS, InnerOptimizer, InnerProblem, InnerStep, Point
from .curvature import PowerMemory, spectral_radius

RATES = ("cg", "line_search", "constant")


class CGState(NamedTuple):
    """Direction p and its slope <p, r>, with r and |r|**2; the point of linearisation; the constant rate; the largest
    curvature seen and beta / alpha, the part of the next Lanczos entry that is known already."""

    p: Tensor
    slope: Any
    r: Tensor
    rr: Any
    point: Point
    eta: Any
    curvature: Any
    tail: Any


def fletcher_reeves(problem: InnerProblem, r: Tensor, rr: Any, state: CGState) -> Any:
    """|r'|**2 / |r|**2 (Fletcher and Reeves 1964, Comput. J. 7, 149)."""
    return problem.ratio(rr, state.rr)


BETA: dict[str, Callable[[InnerProblem, Tensor, Any, CGState], Any]] = {"fletcher_reeves": fletcher_reeves}
"""Formulas for beta in p' = -r' + beta p, from r', |r'|**2 and the state before: a method each."""


@dataclass(frozen=True)
class ConjugateGradient(InnerOptimizer):
    """z' = z + alpha p, p = -r + beta p_before, begun along -r.

    ``rate``: how alpha is found.

    - ``"cg"``: alpha = -<p, r> / <p, M p>, M = I - g J at the last evaluated point, and r' = r + alpha M p without a second
      evaluation: one call of f an iteration. On a linear field with symmetric J this is the method of conjugate gradients.
    - ``"line_search"``: the same alpha with M at the current iterate, r' evaluated: two calls of f.
    - ``"constant"``: 1 / L, L = 1 + |g| rho, with rho estimated by power iterations and kept for some steps in time, or
      given as ``lipschitz`` (of f, 1/time): one call of f. A number in place of the word is the rate itself, in units of
      the scaled residual (Xia 2023, section 5.1, has such a constant).

    ``restart``: go along -r where p is no direction of descent. ``refresh``: iterations after which "cg" evaluates the
    residual again.
    """

    formula: str
    _: KW_ONLY
    rate: str | float = "cg"
    restart: bool = True
    lipschitz: float | None = None
    refresh: int = 50

    def __post_init__(self) -> None:
        if isinstance(self.rate, str):
            if self.rate not in RATES:
                raise ArgumentError(f"rate must be one of {', '.join(RATES)} or a number, found {self.rate!r}")
        elif not self.rate > 0:
            raise ArgumentError(f"rate must be positive, found {self.rate}")
        if self.lipschitz is not None and not self.lipschitz >= 0:
            raise ArgumentError(f"lipschitz must be >= 0, found {self.lipschitz}")
        if self.refresh < 1:
            raise ArgumentError(f"refresh must be at least 1, found {self.refresh}")

    def remember(self, layout: Any, y0: Tensor) -> Any:
        return PowerMemory.fresh(layout, y0) if self.rate == "constant" and self.lipschitz is None else ()

    def init(self, problem: Any, point: Point, running: Any, memory: Any) -> tuple[CGState, Any]:
        eta, curvature = 1.0, 1.0
        if self.rate == "constant":
            rho = self.lipschitz
            if rho is None:
                rho, memory = spectral_radius(problem, point, running, memory)
            curvature = 1 + abs(problem.g) * rho
            eta = 1 / curvature
        elif not isinstance(self.rate, str):
            eta = self.rate
        rr = problem.dot(point.r, point.r)
        return CGState(-point.r, -rr, point.r, rr, point, eta, curvature, 0.0), memory

    def step(self, problem: InnerProblem, z: Tensor, r: Tensor, state: CGState, running: Any) -> InnerStep:
        point, alpha, curvature = state.point, state.eta, state.curvature
        p = problem.keep(running, state.p, 0.0)
        searching = self.rate in ("cg", "line_search")
        if searching:
            mp = problem.jv(point, p)
            alpha = problem.ratio(-state.slope, problem.dot(p, mp))
            # A diagonal entry of the Lanczos matrix, which no eigenvalue's maximum is below.
            inverse = problem.ratio(1.0, alpha)
            lanczos = inverse + state.tail
            curvature = problem.ops.where(lanczos > curvature, lanczos, curvature)
        wide = problem.layout.spread(alpha)
        moved = z + wide * p
        if self.rate == "cg":
            r, evaluated = r + wide * mp, None
        else:
            point = evaluated = problem.evaluate(problem.keep(running, moved, z))
            r = point.r
        rr = problem.dot(r, r)
        beta = BETA[self.formula](problem, r, rr, state)
        p, slope = self._direction(problem, -r + problem.layout.spread(beta) * p, r, rr)
        tail = beta * inverse if searching else 0.0
        return InnerStep(moved, r, CGState(p, slope, r, rr, point, state.eta, curvature, tail), evaluated, curvature)

    def _direction(self, problem: InnerProblem, p: Tensor, r: Tensor, rr: Any) -> tuple[Tensor, Any]:
        slope = problem.dot(p, r)
        if not self.restart:
            return p, slope
        descent = slope < 0
        return problem.keep(descent, p, -r), problem.ops.where(descent, slope, -rr)

    def resume(self, problem: InnerProblem, point: Point, state: CGState, again: Any) -> CGState:
        ops, r = problem.ops, point.r
        rr = problem.dot(r, r)
        p, slope = self._direction(problem, state.p, r, rr)
        p, slope = problem.keep(again, -r, p), ops.where(again, -rr, slope)
        tail = ops.where(again, 0.0, state.tail)
        return state._replace(p=p, slope=slope, r=r, rr=rr, point=point, tail=tail)


INNER_OPTIMIZERS.register("fletcher_reeves", ConjugateGradient("fletcher_reeves"))
