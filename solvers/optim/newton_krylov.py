"""Inexact Newton iterations without a matrix: linear systems by Krylov methods on products with the Jacobian."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..linalg import gmres
from ..status import ArgumentError
from .base import INNER_OPTIMIZERS, ROUNDING, InnerOptimizer, InnerStep, Point, StageProblem

FORCING = 0.1
"""Residual of a linear system relative to its right-hand side, at most."""
SHARE = 0.3
"""Share of the tolerance that the residual of a linear system need not get below."""
DIVERGED = 2.0
"""Ratio of successive residuals from which an iteration is given up. That of the corrections says nothing: what a linear
system leaves of its right-hand side, a tenth, may be a larger part of the correction."""
FIRST = 1.0
"""Multiple of the first correction, of which no ratio is known, that must be within the tolerance to do without a second."""


class KrylovState(NamedTuple):
    """point: the iterate, if its residual is known. before: norm of the last correction (0: none yet). floor: what rounding
    leaves of a correction. residual: norm of the last one (infinite: none yet)."""

    point: Point | None
    before: Any
    floor: Any
    residual: Any


@dataclass(frozen=True)
class NewtonKrylov(InnerOptimizer):
    """z' = z - d with M d = r(z) solved by GMRES, nearly, M at the iterate itself (Brown & Hindmarsh 1989, Appl. Math. Comput.
    31).

    Products with M are forward differences, one call of f for each stage. Systems are solved in units of the error norm's
    scale, to a tenth of the right-hand side or to what the tolerance needs. Memory: ``restart`` states.

    Args:
        restart: vectors of GMRES before it starts again. krylov_iters: products for one linear system.
    """

    _: KW_ONLY
    restart: int = 30
    krylov_iters: int = 150

    refresh: ClassVar[int] = 1 << 30  # type: ignore[misc]  # no residual is carried along
    rests: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for option in ("restart", "krylov_iters"):
            if not getattr(self, option) >= 1:
                raise ArgumentError(f"{option} must be at least 1, found {getattr(self, option)}")

    def init(self, problem: Any, point: Point, running: Any, memory: Any) -> KrylovState:
        zero = 0.0 if problem.layout.joint else torch.zeros_like(running, dtype=problem.layout.real_dtype)
        floor = 2 * ROUNDING * torch.finfo(point.z.dtype).eps * problem.norm(point.z)
        return KrylovState(point, zero, floor, zero + math.inf)

    def step(self, problem: Any, z: Tensor, r: Tensor, state: KrylovState, running: Any) -> InnerStep:
        ops = problem.ops
        point = state.point or problem.evaluate(z)
        delta, error = self._solve(problem, point, running)
        size = problem.norm(delta)
        known = state.before > 0
        rate = ops.where(known, size / ops.where(known, state.before, 1.0), 0.0)
        left = ops.where(known, rate / ops.maximum(1.0 - rate, 1e-3), FIRST) * size + error
        left = ops.where(size <= state.floor, 0.0, left)
        residual = problem.norm(point.r)
        hopeless = (left > problem.tol) & (residual >= DIVERGED * state.residual) | ops.invert(ops.isfinite(size))
        left = ops.where(hopeless, math.nan, left)
        after = KrylovState(
            None, ops.where(running, size, state.before), state.floor, ops.where(running, residual, state.residual)
        )
        return InnerStep(z - delta, point.r, after, None, left)

    def _solve(self, problem: StageProblem, point: Point, running: Any) -> tuple[Tensor, Any]:
        """d, and the residual that is left of it, in the error norm."""
        problem.algebra.how = "matrix-free"
        scale = problem.scales if problem.coupled else problem.scale
        b = point.r / scale
        # The Euclidean norm of a scaled vector is this multiple of its error norm.
        length = problem.dot(b, b) ** 0.5
        unit = problem.ops.where(length > 0, length / problem.ops.maximum(problem.norm(point.r), 1e-300), 1.0)
        enough = problem.ops.minimum(FORCING * length, SHARE * problem.tol * unit)

        def product(v: Tensor) -> Tensor:
            return problem.jv(point, scale * v) / scale

        x = gmres(product, b, problem, enough, running=running, restart=self.restart, max_iters=self.krylov_iters)
        return scale * x, enough / unit

    def resume(self, problem: Any, point: Point, state: KrylovState, again: Any) -> KrylovState:
        return self.init(problem, point, again, ())

    def filtered(self, problem: StageProblem, memory: Any, weight: float, x: Tensor) -> Tensor:
        """(I - g weight J)^-1 x with J at the origin of ``problem``, to a tenth."""
        t, y = problem.origin  # type: ignore[misc]
        one = StageProblem(
            problem.field, (problem.field.time(t),), y, problem.g, problem.error_norm, problem.scale, ((weight,),)
        )
        # Products are all that is asked of this point: its residual does not matter.
        point = one.evaluate(y)._replace(r=x)
        b = x / problem.scale
        enough = FORCING * one.dot(b, b) ** 0.5
        running = problem.ops.isfinite(enough)
        found = gmres(lambda v: one.jv(point, problem.scale * v) / problem.scale, b, one, enough, running=running,
                      restart=self.restart, max_iters=self.krylov_iters)  # fmt: skip
        problem.calls += one.calls
        return problem.scale * found


INNER_OPTIMIZERS.register("newton_krylov", NewtonKrylov())
