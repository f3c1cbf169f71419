"""Iterations that learn the curvature from the iterates themselves: L-BFGS and Anderson acceleration."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ..status import ArgumentError
from .base import INNER_OPTIMIZERS, InnerProblem, Point, any_true
from .evaluating import Evaluating, check_stop

FLAT = 1e-14
"""<dz, dr> / |dr|**2 from which a pair is of use: below, M shows no curvature along dz."""
NOTHING = 1e-12
"""Share of |dr|**2 below which what is left of it, made orthogonal, is noise."""
SHORTER = 0.25
"""Factor by which the step along the residual is cut where an iteration went wrong."""

Pairs = tuple[tuple[Tensor, Tensor, Any], ...]


class SecantState(NamedTuple):
    """pairs: (dz, dr, weight), the oldest first; weight 0 in samples to which a pair says nothing. eta: inverse curvature along
    the last step."""

    pairs: Pairs
    eta: Any


@dataclass(frozen=True)
class Secant(Evaluating):
    """What both share: pairs of steps and changes of the residual, ``history`` of them, begun with the step along r that leaves
    the least residual (one call of f). One call of f an iteration.
    Memory: twice ``history`` states."""

    _: KW_ONLY
    history: int = 10

    growth: ClassVar[float] = 10.0
    """A step that multiplies |r| by more is taken back, and the pairs, which led there, are forgotten."""

    def __post_init__(self) -> None:
        check_stop(self.inner_stop)
        if self.history < 1:
            raise ArgumentError(f"history must be at least 1, found {self.history}")

    @abstractmethod
    def pair(self, problem: InnerProblem, dz: Tensor, dr: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Any]:
        """What is kept of a step: dz, dr, weight (not positive, or NaN, where it is of no use)."""

    def init(self, problem: InnerProblem, point: Point, running: Any, memory: Any) -> SecantState:
        r = problem.keep(running, point.r, 0.0)
        mr = problem.jv(point, r)
        square, along = problem.dot(mr, mr), problem.dot(r, mr)
        length = problem.ratio(problem.dot(r, r), square) ** 0.5
        eta = problem.ops.where(along > 0, problem.ratio(along, square), length)
        return SecantState((), problem.ops.where(running & (eta > 0), eta, 1.0))

    def learn(
        self, problem: InnerProblem, before: Point, point: Point, state: SecantState, running: Any
    ) -> tuple[Point, SecantState]:
        ops, dz, dr = problem.ops, point.z - before.z, point.r - before.r
        lost = running & ops.invert(problem.dot(point.r, point.r) <= self.growth**2 * problem.dot(before.r, before.r))
        eta = problem.ratio(problem.dot(dz, dr), problem.dot(dr, dr))
        fine = running & (eta > FLAT) & ops.invert(lost)
        dz, dr, weight = self.pair(problem, dz, dr, state.pairs)
        weight = ops.where(fine & (weight > 0), weight, 0.0)
        # What is not finite must not come back multiplied by a weight of 0.
        new = (problem.keep(fine, dz, 0.0), problem.keep(fine, dr, 0.0), weight)
        pairs = _dropped(problem, state.pairs[max(0, len(state.pairs) + 1 - self.history) :], lost)
        eta = ops.where(fine, eta, ops.where(lost, SHORTER * state.eta, state.eta))
        if any_true(lost):
            point = Point(*(problem.keep(lost, old, new) for old, new in zip(before[:2], point[:2], strict=True)))
        return point, SecantState((*pairs, new), eta)

    def resume(self, problem: InnerProblem, point: Point, state: SecantState, again: Any) -> SecantState:
        ops = problem.ops
        return SecantState(_dropped(problem, state.pairs, again), ops.where(again, SHORTER * state.eta, state.eta))


@dataclass(frozen=True)
class LBFGS(Secant):
    """z' = z - H r with H the inverse curvature that the last steps showed (Nocedal 1980, Math. Comput. 35; Nocedal & Wright,
    algorithm 7.4), scaled by that of the last one. Steps with <dz, dr> <= 0 are not kept, so that H is positive definite."""

    def pair(self, problem: InnerProblem, dz: Tensor, dr: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Any]:
        return dz, dr, problem.ratio(1.0, problem.dot(dz, dr))

    def propose(self, problem: InnerProblem, z: Tensor, r: Tensor, state: SecantState) -> tuple[Tensor, SecantState]:
        spread, q, found = problem.layout.spread, r, []
        for dz, dr, weight in reversed(state.pairs):
            a = weight * problem.dot(dz, q)
            q = q - spread(a) * dr
            found.append(a)
        q = spread(state.eta) * q
        for (dz, dr, weight), a in zip(state.pairs, reversed(found), strict=True):
            q = q + spread(a - weight * problem.dot(dr, q)) * dz
        return z - q, state


@dataclass(frozen=True)
class Anderson(Secant):
    """z' = x - eta s, x and s being z and r without the part of r that the last steps' changes of it span (Anderson 1965, J. ACM
    12; Walker & Ni 2011, SIAM J. Numer. Anal. 49, type II). The changes are kept orthogonal to each other, which makes the least
    squares problem a projection; eta is the inverse curvature along the last step. On a linear field, GMRES."""

    growth: ClassVar[float] = 2.0

    def pair(self, problem: InnerProblem, dz: Tensor, dr: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor, Any]:
        whole = problem.dot(dr, dr)
        dz, dr = _projected(problem, dz, dr, pairs)
        left = problem.dot(dr, dr)
        return dz, dr, problem.ops.where(left > NOTHING * whole, problem.ratio(1.0, left), 0.0)

    def propose(self, problem: InnerProblem, z: Tensor, r: Tensor, state: SecantState) -> tuple[Tensor, SecantState]:
        x, s = _projected(problem, z, r, state.pairs)
        return x - problem.layout.spread(state.eta) * s, state


def _dropped(problem: InnerProblem, pairs: Pairs, mask: Any) -> Pairs:
    """``pairs``, which say nothing any more to the samples in ``mask``."""
    return tuple((dz, dr, problem.ops.where(mask, 0.0, weight)) for dz, dr, weight in pairs)


def _projected(problem: InnerProblem, z: Tensor, r: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """r without its components along the dr of ``pairs``, and z changed by the same multiples of their dz."""
    for dz, dr, weight in pairs:
        wide = problem.layout.spread(problem.dot(r, dr) * weight)
        z, r = z - wide * dz, r - wide * dr
    return z, r


INNER_OPTIMIZERS.register("lbfgs", LBFGS())
INNER_OPTIMIZERS.register("anderson", Anderson())
