"""Inexact Newton iterations without a matrix: linear systems by Krylov methods on products with the Jacobian."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..linalg import gmres, minres
from ..status import ArgumentError, UnsupportedError
from .base import CURVED, FADES, INNER_OPTIMIZERS, ROUNDING, InnerOptimizer, InnerStep, Point, StageProblem, any_true
from .precondition import NAMES, Preconditioner, check
from .probes import waves

KRYLOV = ("auto", "minres", "gmres")
MINRES_ITERS, GMRES_ITERS = 2000, 500
"""Products for one linear system. MINRES keeps what it has gained, so that giving up costs more than going on (diffusion on 4096
points: 34,456 evaluations, 49,782 with 500); what restarts have thrown away in ten rounds, GMRES does not find in more."""
FORCING = 0.5
"""Residual of a linear system relative to its right-hand side, at most."""
COUPLED_FORCING = 0.1
"""The same where several stages are solved together, to a much smaller tolerance."""
SHARE = 0.65
"""Share of the tolerance that the residual of a linear system need not get below."""
ROUGH_SHARE = 0.035
"""The same of what rounding leaves of a residual, where that is more. Rounding is in the stiffest parts, of which hardly anything
gets into a correction; a linear residual as large may lie in the slow ones, and then disturbs the steps (single precision:
128 cells at 1e-5, 3,257 calls of f and an error of 1.1e-4 with .35, 1,306 and 4e-5 so; Cahn-Hilliard, 1e-4: 1.7e-2, 1.4e-3)."""
DIVERGED = 2.0
"""Ratio of successive residuals from which an iteration is given up. That of the corrections says nothing: what a linear
system leaves of its right-hand side, a tenth, may be a larger part of the correction."""
SHORTER, CUTS = 0.5, 8
"""Factor by which a correction is cut after which the residual has grown by that, and times that is tried."""
BELIEVED = 0.5
"""Ratio of successive residuals up to which the next one need not be evaluated: a singular M, which differences make regular,
gives corrections without end that change no residual."""
SYMMETRIC = 30.0
"""Multiple of the root of the rounding unit up to which two products that a symmetric J makes equal may differ."""


class KrylovMemory(NamedTuple):
    """precond: the preconditioner with what it keeps, or None. bend: part of a correction that came back as residual, by
    nonlinearity (0: not seen yet). rho: the largest |J v| / |v| seen (1/time). symmetric: whether J is (1: yes, -1: no, 0:
    unknown)."""

    bend: Any
    rho: Any
    symmetric: Any
    precond: Any = None


class KrylovState(NamedTuple):
    """point: the iterate, if its residual is known. base: the one before. expected: the residual it would have if r were
    linear. before: norm of the last correction (0: none yet). floor: what rounding leaves of a correction. residual: norm of
    the last one (infinite: none yet)."""

    point: Point | None
    base: Point
    expected: Tensor
    before: Any
    floor: Any
    residual: Any
    memory: KrylovMemory
    curvature: Any


@dataclass(frozen=True)
class NewtonKrylov(InnerOptimizer):
    """z' = z - d with M d = r(z) solved nearly, by products with M at the iterate itself (Brown & Hindmarsh 1989, Appl. Math.
    Comput. 31).

    Products are forward differences, one call of f for each stage. A symmetric J has its systems solved by MINRES, another
    one by GMRES, in units of the error norm's scale. The residual of the last iterate is not evaluated where the
    nonlinearity of earlier corrections says that it is small. Memory: five states, for GMRES ``restart`` more.

    Args:
        krylov: "minres", "gmres", or "auto", which tests with two products whether J is symmetric, and goes over to GMRES
            for good where MINRES breaks down or gains nothing.
        precond: nearly the inverse of I - g J, for GMRES: a callable ``(t, y, g, v)``, g the scaled step; "jacobi", by the
            diagonal of J: for graphs with hubs and other J of uneven rows; "ilu", an incomplete LU of J by ``jac_sparsity``,
            joint mode. The diagonal is what a method ``jacobian_diagonal(t, y, *args)`` of f returns, a tree like the state,
            or else found by 40 random probes (exactly with ``jac_sparsity``); one that was found, or J, serves 50 systems.
        jac_sparsity: a scipy matrix or an array, 0 where the Jacobian always is, ``(N, N)``; joint mode.
        restart: vectors of GMRES before it starts again. krylov_iters: products for one linear system (None: 2000 by
            MINRES, whose count grows with the root of g rho, 500 by GMRES).
    """

    _: KW_ONLY
    krylov: str = "auto"
    restart: int = 50
    krylov_iters: int | None = None
    precond: Any = None
    jac_sparsity: Any = None

    refresh: ClassVar[int] = 1 << 30  # type: ignore[misc]  # no residual is carried along
    rests: ClassVar[bool] = False
    patience: ClassVar[int] = 10

    def __post_init__(self) -> None:
        if self.krylov not in KRYLOV:
            raise ArgumentError(f"krylov must be one of {', '.join(KRYLOV)}, found {self.krylov!r}")
        check(self.precond, self.jac_sparsity)
        for option in ("restart", "krylov_iters"):
            value = getattr(self, option)
            if value is not None and not value >= 1:
                raise ArgumentError(f"{option} must be at least 1, found {value}")

    def chosen(self, layout: Any) -> InnerOptimizer:
        if self.precond in NAMES and layout.dtype.is_complex:
            raise UnsupportedError(f"precond={self.precond!r} serves real states, found {layout.dtype}")
        if self.jac_sparsity is not None and not layout.joint:
            raise UnsupportedError("jac_sparsity serves joint mode: leave batch_dim and batch_index away")
        return self

    def remember(self, layout: Any, y0: Tensor) -> KrylovMemory:
        known = {"auto": 0, "minres": 1, "gmres": -1}[self.krylov]
        precond = None
        if self.precond is not None:
            known, precond = -1, Preconditioner(self.precond, self.jac_sparsity)
        if layout.joint:
            return KrylovMemory(0.0, 0.0, known, precond)
        zero = torch.zeros(layout.batch, dtype=torch.float64, device=layout.device)
        return KrylovMemory(zero, zero, torch.full_like(zero, known, dtype=torch.int64), precond)

    def init(self, problem: Any, point: Point, running: Any, memory: KrylovMemory) -> KrylovState:
        zero = 0.0 if problem.layout.joint else torch.zeros_like(running, dtype=problem.layout.real_dtype)
        floor = 2 * ROUNDING * torch.finfo(point.z.dtype).eps * problem.norm(point.z)
        unknown = running & (memory.symmetric == 0)
        if any_true(unknown):
            found = -1 if problem.coupled else self._test(problem, point, unknown)
            memory = memory._replace(symmetric=problem.ops.where(unknown, found, memory.symmetric))
        known = 1.0 + abs(problem.g) * memory.rho
        return KrylovState(point, point, point.r, zero, floor, zero + math.inf, memory, known)

    def _test(self, problem: Any, point: Point, unknown: Any) -> Any:
        """1 for samples in which <u, J v> = <v, J u> for two directions, else -1."""
        u, v = (problem.keep(unknown, waves(problem.layout, point.z, rate), 0.0) for rate in (0.7, 0.3))
        along = problem.dot(u, v)
        one, other = problem.dot(u, problem.jv(point, v)) - along, problem.dot(v, problem.jv(point, u)) - along
        limit = SYMMETRIC * torch.finfo(u.dtype).eps ** 0.5
        return problem.ops.where(abs(one - other) <= limit * (abs(one) + abs(other)), 1, -1)

    def curvature(self, state: KrylovState) -> Any:
        return state.curvature

    def memory(self, problem: Any, state: KrylovState) -> KrylovMemory:
        return state.memory

    def bound(self, memory: KrylovMemory) -> Any:
        return memory.rho

    def step(self, problem: Any, z: Tensor, r: Tensor, state: KrylovState, running: Any) -> InnerStep:
        ops = problem.ops
        point = state.point or problem.evaluate(z)
        if state.point is None:
            state = self._learn(problem, point, state, running)
            point = self._nearer(problem, point, state, running)
            z = point.z
        delta, expected, state, solved = self._solve(problem, point, state, running)
        size, bend, linear = problem.norm(delta), state.memory.bend, problem.norm(expected)
        # A correction within rounding changes nothing by its nonlinearity; what the linear system has left, it has.
        left = linear + ops.where(size <= state.floor, 0.0, ops.where(bend > 0, CURVED * bend, 1.0)) * size
        residual = problem.norm(point.r)
        # Where the last correction did not do what it was to, this one is not believed unseen.
        left = ops.where(residual > BELIEVED * state.residual, ops.maximum(left, residual), left)
        worse = (residual >= DIVERGED * state.residual) | (ops.invert(solved) & (linear > FORCING * residual))
        hopeless = (left > problem.tol) & worse | ops.invert(ops.isfinite(size) & ops.isfinite(residual))
        left = ops.where(hopeless, math.nan, left)
        before, residual = ops.where(running, size, state.before), ops.where(running, residual, state.residual)
        state = state._replace(point=None, base=point, expected=expected, before=before, residual=residual)
        return InnerStep(z - delta, point.r, state, None, left)

    def _nearer(self, problem: Any, point: Point, state: KrylovState, running: Any) -> Point:
        """``point``, or, where the residual has grown there, what lies between it and the iterate before: the correction is a
        direction in which |r| falls, even where M is indefinite. Each cut is one call of f."""
        ops = problem.ops
        for _ in range(CUTS):
            grown = running & ops.invert(problem.norm(point.r) < DIVERGED * state.residual)
            if not any_true(grown):
                break
            point = problem.evaluate(problem.keep(grown, state.base.z + SHORTER * (point.z - state.base.z), point.z))
        return point

    def _learn(self, problem: Any, point: Point, state: KrylovState, running: Any) -> KrylovState:
        """The nonlinearity, by a residual that was evaluated and what the linear system had left of it."""
        ops, bend = problem.ops, state.memory.bend
        known = running & (state.before > 0)
        seen = problem.norm(point.r - state.expected) / ops.where(known, state.before, 1.0)
        # Where f is not defined there is nothing to learn; NaN would be taken for ignorance from then on.
        known = known & ops.isfinite(seen)
        bend = ops.where(known, ops.maximum(ops.maximum(seen, FADES * bend), 1e-12), bend)
        return state._replace(memory=state.memory._replace(bend=bend))

    def _solve(self, problem: Any, point: Point, state: KrylovState, running: Any) -> tuple[Tensor, Tensor, KrylovState, Any]:
        """d, the residual that is left, what was learnt, and whose systems were solved."""
        problem.algebra.how = "matrix-free"
        ops, memory = problem.ops, state.memory
        first = _First(problem, point)
        forcing = COUPLED_FORCING if problem.coupled else FORCING
        size = problem.norm(point.r)
        rounding = problem.floor(ROUNDING * torch.finfo(point.z.dtype).eps * problem.norm(point.z) * state.curvature)
        enough = ops.maximum(ops.minimum(forcing * size, SHARE * problem.tol), ROUGH_SHARE * rounding)
        x, left, symmetric, unsolved = torch.zeros_like(point.r), point.r, memory.symmetric, running & False
        good = running & (symmetric == 1)
        if any_true(good):
            x, left, unsolved, broken = minres(
                first.product, point.r, problem, problem.norm, enough, running=good,
                max_iters=self.krylov_iters or MINRES_ITERS,
            )
            broken = broken | (unsolved & (problem.norm(left) > FORCING * size))
            symmetric = ops.where(broken, -1, symmetric)
        rest = running & (symmetric != 1)
        if any_true(rest):
            other, residual, failed = self._gmres(problem, first, point, rest, enough, memory.precond)
            x, left = problem.keep(rest, other, x), problem.keep(rest, residual, left)
            unsolved = ops.where(rest, failed, unsolved)
        rho = ops.maximum(memory.rho, ops.where(running, first.rho(), 0.0))
        curvature = 1.0 + abs(problem.g) * rho
        state = state._replace(memory=memory._replace(rho=rho, symmetric=symmetric), curvature=curvature)
        return x, left, state, ops.invert(unsolved)

    def _gmres(
        self, problem: Any, first: _First, point: Point, running: Any, enough: Any, precond: Preconditioner | None = None
    ) -> tuple[Tensor, Tensor, Any]:
        near = None if precond is None else precond.at(problem, point)
        scale = problem.scales if problem.coupled else problem.scale
        b = point.r / scale
        # The Euclidean norm of a scaled vector is this multiple of its error norm.
        length = problem.dot(b, b) ** 0.5
        unit = problem.ops.where(length > 0, length / problem.ops.maximum(problem.norm(point.r), 1e-300), 1.0)
        x, left, unsolved = gmres(
            lambda v: first.product(scale * v) / scale, b, problem, enough * unit, running=running, restart=self.restart,
            max_iters=self.krylov_iters or GMRES_ITERS, precond=None if near is None else lambda v: near(scale * v) / scale,
        )  # fmt: skip
        return scale * x, scale * left, unsolved

    def resume(self, problem: Any, point: Point, state: KrylovState, again: Any) -> KrylovState:
        return self.init(problem, point, again, state.memory)

    def filtered(self, problem: StageProblem, memory: Any, weight: float, x: Tensor) -> Tensor:
        """(I - g weight J)^-1 x with J at the origin of ``problem``, to a tenth."""
        t, y = problem.origin  # type: ignore[misc]
        one = StageProblem(
            problem.field, (problem.field.time(t),), y, problem.g, problem.error_norm, problem.scale, ((weight,),)
        )
        # Products are all that is asked of this point: its residual does not matter.
        point = one.evaluate(y)._replace(r=x)
        size = one.norm(x)
        found, _, _ = self._gmres(one, _First(one, point), point, problem.ops.isfinite(size), COUPLED_FORCING * size)
        problem.calls += one.calls
        return found


class _First:
    """Products with M at ``point``; of the first, how much it stretches, from which rho follows."""

    def __init__(self, problem: Any, point: Point) -> None:
        self.problem, self.point = problem, point
        self.v: Any = None
        self.mv: Any = None

    def product(self, v: Tensor) -> Tensor:
        mv = self.problem.jv(self.point, v)
        if self.v is None:
            self.v, self.mv = v, mv
        return mv

    def rho(self) -> Any:
        """|J v| / |v| (1/time) of the first product; 0 without one."""
        problem = self.problem
        if self.v is None:
            return 0.0 if problem.layout.joint else torch.zeros_like(problem.norm(self.point.r))
        gjv = self.v - self.mv
        found = problem.ratio(problem.dot(gjv, gjv), problem.dot(self.v, self.v)) ** 0.5
        found = problem.ratio(found, abs(problem.g))
        return problem.ops.where(problem.ops.isfinite(found), found, 0.0)


INNER_OPTIMIZERS.register("newton_krylov", NewtonKrylov())
