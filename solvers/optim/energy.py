"""Steps of gradient flows: the objective |z - a|**2 / 2 + g F(z) has to fall.

Where F is not convex a root of r need not be a minimiser. A local one that is no higher than the start is all that stability
asks (Xia 2023, section 5.3.3 and proposition 10).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import InnerProblem, InnerResult, InnerStep, Point, all_true, any_true, minimise
from .secant import LBFGS

SUFFICIENT = 1e-4
"""Share of the slope that a step has to win (Armijo 1966)."""
SHORTER = 0.25
CUTS = 30
NOISE = 16.0
"""Units in the last place of the objective below which a change of it is rounding."""


@dataclass(frozen=True)
class EnergyDescent(LBFGS):
    """L-BFGS whose steps are cut until the objective falls: it does so at every iteration, to rounding.

    A call of f an iteration, and of the energy once or more. Needs a problem that has a value.
    """

    growth: ClassVar[float] = 1e12
    name: ClassVar[str] = "energy_descent"

    def step(self, problem: InnerProblem, z: Tensor, r: Tensor, state: Any, running: Any) -> InnerStep:
        proposed, state = self.propose(problem, z, r, state)
        point = problem.evaluate(self._lower(problem, z, r, proposed - z, running))
        point, state = self.learn(problem, Point(z, r), point, state, running)
        return InnerStep(point.z, point.r, state, point)

    def _lower(self, problem: InnerProblem, z: Tensor, r: Tensor, d: Tensor, running: Any) -> Tensor:
        """z + d, or nearer to z, where the objective is lower."""
        ops, level, slope = problem.ops, problem.value(z), problem.dot(r, d)
        share, high = ops.where(running, 1.0, 0.0), running
        for _ in range(CUTS):
            trial = problem.keep(running, z + problem.layout.spread(share) * d, z)
            enough = level + SUFFICIENT * share * slope + noise(problem, z, level)
            high = running & ops.invert(problem.value(trial) <= enough)
            if not any_true(high):
                break
            share = ops.where(high, SHORTER * share, share)
        return problem.keep(high, z, trial)


def noise(problem: InnerProblem, z: Tensor, value: Any) -> Any:
    return NOISE * torch.finfo(z.dtype).eps * abs(value)


def lower_of(problem: InnerProblem, point: Point, other: Tensor) -> Point:
    """``point``, or ``other`` with its residual in the samples where the objective is lower there (or that of ``point`` is not a
    number)."""
    good = problem.value(point.z) <= problem.value(other)
    return point if all_true(good) else problem.evaluate(problem.keep(good, point.z, other))


def not_higher(problem: InnerProblem, start: Tensor, found: InnerResult) -> Any:
    """Where the objective of ``found`` is at most that of ``start``, but for what a residual within the tolerance may leave:
    <r, z - start> bounds that where the objective is convex, and |r| |z - start| bounds <r, z - start>."""
    layout, level = problem.layout, problem.value(start)
    moved = (found.z - start) * problem.scale
    count = layout.width if layout.index is None else layout.width * layout.group_sizes
    left = found.norm * (problem.dot(moved, moved) * count) ** 0.5
    return problem.value(found.z) <= level + left + noise(problem, start, level)


def lowered(problem: InnerProblem, first: Point, found: InnerResult, tol: float, active: Any) -> InnerResult:
    """``found`` where it is solved and no higher than ``first``; elsewhere the result of a descent from there."""
    ops = problem.ops
    again = active & ops.invert(found.converged & not_higher(problem, first.z, found))
    if not any_true(again):
        return found
    descent = EnergyDescent()
    more = minimise(problem, descent, first, tol=tol, max_iters=descent.patience, active=again)
    return merged(problem, again, more, found)


def merged(problem: InnerProblem, mask: Any, new: InnerResult, old: InnerResult) -> InnerResult:
    """``new`` in the samples of ``mask``, the iterations of both, the memory of ``old``."""
    ops = problem.ops
    return InnerResult(
        problem.keep(mask, new.z, old.z),
        ops.where(mask, new.norm, old.norm),
        old.iterations + new.iterations,
        ops.where(mask, new.converged, old.converged),
        ops.where(mask, new.evaluated, old.evaluated),
        old.memory,
    )
