"""Simplified Newton iterations: the Jacobian is kept while they converge, its factorisation while the step size stays.

Convergence is judged by the corrections, in the error norm of the solve: the residual of a stiff problem multiplies the
rounding errors of the solution by the stiffness, and may never get below any tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor

from ..status import ArgumentError, ArgumentTypeError, UnsupportedError
from . import jacobian
from .base import INNER_OPTIMIZERS, ROUNDING, InnerOptimizer, InnerStep, Point, StageProblem, any_true
from .linearisation import Linearisation, Memory, factorise, forgotten, solved

SLOW, DIVERGED = 0.5, 2.0
"""Ratios of successive corrections from which an iteration is given up: with an older Jacobian, and with one of this step."""
OLD = {"dense": 0.2, "sparse": 0.5}
"""Ratio above which the next step gets a Jacobian of its own: an iteration more is cheap beside a sparse factorisation."""
AHEAD = {"dense": 5, "sparse": 12}
"""Iterations in which an iteration with an older Jacobian must be going to converge."""
STALLED = 8.0
"""Multiple of what rounding leaves of a correction below which corrections that no longer shrink are rounding errors."""
FIRST = 10.0
"""Multiple of the first correction, of which no ratio is known, that must be within the tolerance to do without a second."""
SMALLEST_RATE = 0.02
"""Least ratio that is expected of corrections to come."""
DOUBT = 0.8
"""Power that an expected ratio is raised to at each step that did not measure it (Hairer & Wanner II, IV.8)."""
DENSE_LIMIT = 400
"""Unknowns of a sample up to which a matrix of its own pays."""
LARGEST_MATRICES = 4 << 30
"""Bytes that the dense matrices of all samples may take (23,170 unknowns of one float64 state); a step holds some of them."""


class NewtonState(NamedTuple):
    """lin: J. fresh: samples whose J is of this step. full: samples that take J anew at every iterate. point: the iterate, if
    its residual is known. before: norm of the last correction (0: none yet). rate: the largest ratio of corrections. floor:
    what rounding leaves of a correction. expected: what a first correction leaves, in units of its own size, by the ratios of
    earlier steps."""

    lin: Linearisation
    fresh: Any
    full: Any
    point: Point | None
    before: Any
    rate: Any
    floor: Any
    expected: Any
    memory: Memory


@dataclass(frozen=True, eq=False)
class Newton(InnerOptimizer):
    """z' = z - M^-1 r(z), M = I - g A x J, with J from the start of the step or from an earlier one (HW IV.8).

    A sample whose iteration is slow with an older J starts again with a new one; with a new one it is given up, or, if
    ``patient``, starts from the state before the step with J of every iterate: the last resort where the step cannot be made
    smaller.

    ``kind``: "dense", LU of each sample's matrix; "sparse", SuperLU on the CPU, joint mode; "auto", sparse where
    ``jac_sparsity`` is given, else dense up to 400 unknowns a sample, else "newton_krylov".

    Args:
        jac: the Jacobian, ``jac(t, y, *args)`` of shape ``(N, N)`` (joint) or ``(B, M, M)``, or a scipy matrix. Without it,
            reverse-mode differentiation finds J, or, where f can't be differentiated, differences; ``stats.jacobian`` says
            which.
        jac_sparsity: a scipy matrix or an array, 0 where the Jacobian always is, ``(N, N)``; joint mode.
    """

    kind: str = "dense"
    patient: bool = False
    _: KW_ONLY
    jac: Callable[..., Any] | None = None
    jac_sparsity: Any = None

    refresh: ClassVar[int] = 1 << 30  # type: ignore[misc]  # no residual is carried along
    rests: ClassVar[bool] = False
    patience: ClassVar[int] = 10

    def __post_init__(self) -> None:
        if self.jac is not None and not callable(self.jac):
            raise ArgumentTypeError(f"jac must be callable as jac(t, y, *args), found {type(self.jac).__name__}")
        if self.jac_sparsity is not None:
            pattern_of(self.jac_sparsity)

    def chosen(self, layout: Any) -> InnerOptimizer:
        """What serves a state of this layout; raises ``ArgumentError`` / ``UnsupportedError`` where this can't."""
        if self.kind == "auto":
            return self._choose(layout).chosen(layout)
        if self.kind == "sparse":
            if self.jac_sparsity is None and self.jac is None:
                raise ArgumentError("inner='newton_sparse' needs jac_sparsity=, a scipy matrix, or a jac= that returns one")
            if not layout.joint or layout.dtype.is_complex:
                raise UnsupportedError("jac_sparsity serves real states in joint mode: leave batch_dim and batch_index away")
            if self.jac_sparsity is not None and pattern_of(self.jac_sparsity).size != layout.width:
                shape, n = pattern_of(self.jac_sparsity).csc.shape, layout.width
                raise ArgumentError(f"jac_sparsity must have shape ({n}, {n}) like the state, found {shape}")
        elif self.jac_sparsity is not None:
            raise ArgumentError("jac_sparsity belongs to inner='newton_sparse' (or 'auto')")
        elif layout.index is not None and self.jac is not None:
            raise UnsupportedError("jac= serves joint mode and batch_dim=0, not groups of rows: leave it away")
        elif _matrices(layout) > LARGEST_MATRICES:
            what = f"{layout.batch} matrices" if layout.batch > 1 else "a matrix"
            raise UnsupportedError(
                f"inner='newton' would make {what} of {_unknowns(layout)} x {_unknowns(layout)} numbers, "
                f"{_matrices(layout):.3g} bytes, more than {LARGEST_MATRICES:.3g}: take inner='newton_krylov', or "
                "inner='newton_sparse' with jac_sparsity="
            )
        return self

    def _choose(self, layout: Any) -> InnerOptimizer:
        if self.jac_sparsity is not None:
            return replace(self, kind="sparse")
        fits = _unknowns(layout) <= DENSE_LIMIT and _matrices(layout) <= LARGEST_MATRICES
        if fits or self.jac is not None:
            return replace(self, kind="dense")
        return INNER_OPTIMIZERS["newton_krylov"]

    def take(self, problem: StageProblem, t: Tensor, y: Tensor) -> Any:
        """J at (t, y): a scipy matrix, a numpy one for one sample on the CPU, else a tensor."""
        if self.jac is not None:
            found = jacobian.given(problem, self.jac, t, y)
        elif self.kind == "sparse":
            return jacobian.coloured(problem, pattern_of(self.jac_sparsity), t, y)
        else:
            found = jacobian.dense(problem, t, y)
        if scipy.sparse.issparse(found):
            return found if self.kind == "sparse" else np.asfortranarray(found.toarray())
        if self.kind == "sparse":
            return scipy.sparse.csc_matrix(found.cpu().numpy())
        return np.asfortranarray(found.numpy(), np.float64) if found.dim() == 2 and found.device.type == "cpu" else found

    # -- the iteration ------------------------------------------------------------------------------------------------

    def remember(self, layout: Any, y0: Tensor) -> Memory:
        return forgotten(layout, y0.detach())

    def init(self, problem: Any, point: Point, running: Any, memory: Memory) -> NewtonState:
        ops = problem.ops
        t, y = _origin(problem, point)
        unknown = running & (memory.stamp == 0)
        known = running & ops.invert(unknown)
        lin = None
        if any_true(known):
            lin = memory.cache.recall(problem, memory, known, self.take)
        if any_true(unknown) or lin is None:
            new = memory.cache.renew(problem, t, y, unknown, self.take)
            lin = new if lin is None else memory.cache.merged(problem, unknown, new, lin)
        memory.cache.current = lin
        zero = 0.0 if problem.layout.joint else torch.zeros_like(unknown, dtype=problem.layout.real_dtype)
        floor = 2 * ROUNDING * torch.finfo(point.z.dtype).eps * problem.norm(point.z)
        # Another step's factorisation is as good a reason as another step's J to begin anew where the iteration is slow.
        aged = lin.aged(problem.g)
        fresh = unknown if aged else unknown | (lin.t == t)
        # Nor does an earlier step's ratio say what it does to this one.
        rate = ops.where(known & (memory.rate > 0) & (not aged), memory.rate, 1.0)
        expected = ops.where(rate < 1.0, rate / ops.maximum(1.0 - rate, 1e-3), FIRST)
        return NewtonState(lin, fresh, unknown & False, point, zero, zero, floor, expected, memory)

    def step(self, problem: Any, z: Tensor, r: Tensor, state: NewtonState, running: Any) -> InnerStep:
        ops = problem.ops
        point = state.point or problem.evaluate(z)
        if state.point is None and any_true(state.full & running):
            state = self._renewed(problem, point, state, state.full & running)
        delta = self.correction(problem, point, state, running)
        size = problem.norm(delta)
        known = state.before > 0
        rate = ops.where(known, size / ops.where(known, state.before, 1.0), 0.0)
        left = ops.where(known, rate / ops.maximum(1.0 - rate, 1e-3), state.expected) * size
        rounding = (size <= state.floor) | ((rate > SLOW) & (size <= STALLED * state.floor))
        left = ops.where(rounding, 0.0, left)
        slow = (rate >= SLOW) | (left * rate ** AHEAD[self.kind] > problem.tol)
        lost = ops.where(state.full, False, ops.where(state.fresh, rate >= DIVERGED, slow))
        hopeless = (left > problem.tol) & lost | ops.invert(ops.isfinite(size))
        last = state.full if self.patient else state.fresh
        left = ops.where(hopeless, ops.where(last, math.nan, math.inf), left)
        state = state._replace(
            point=None,
            before=ops.where(running, size, state.before),
            rate=ops.where(running, ops.maximum(state.rate, rate), state.rate),
        )
        return InnerStep(point.z - delta, point.r, state, None, left)

    def correction(self, problem: Any, point: Point, state: NewtonState, running: Any) -> Tensor:
        """M^-1 r."""
        return state.lin.solve(problem, point.r)

    def resume(self, problem: Any, point: Point, state: NewtonState, again: Any) -> NewtonState:
        full = state.full | (again & state.fresh)
        before = problem.ops.where(again, 0.0, state.before)
        rate = problem.ops.where(again, 0.0, state.rate)
        expected = problem.ops.where(again, FIRST, state.expected)
        origin = _origin(problem, point)
        if any_true(again & full):
            # Iterations that diverged may have left the neighbourhood of the solution that belongs to this step.
            start = problem.evaluate(torch.cat([origin[1]] * len(problem.times), -1))
            point = Point(*(problem.keep(again & full, new, old) for new, old in zip(start, point, strict=True)))
        fresh = state.fresh | again
        state = state._replace(fresh=fresh, full=full, point=point, before=before, rate=rate, expected=expected)
        return self._renewed(problem, point, state, again, origin)

    def _renewed(self, problem: Any, point: Point, state: NewtonState, mask: Any, origin: Any = None) -> NewtonState:
        """``state`` with J of the samples in ``mask`` taken at ``origin``, else at the iterate (its last stage)."""
        t, y = origin or _place(problem, problem.times[-1], problem.split(point.z)[-1])
        cache = state.memory.cache
        new = cache.renew(problem, t, y, mask, self.take)
        lin = cache.merged(problem, mask, new, state.lin)
        lin.exact = problem.g
        return state._replace(lin=lin)

    def memory(self, problem: Any, state: NewtonState) -> Memory:
        lin, ops = state.lin, problem.ops
        stamp = ops.where(state.rate > OLD[self.kind], 0, lin.stamp)
        doubted = ops.power(state.expected / (1.0 + state.expected), DOUBT)
        rate = ops.where(state.rate > 0, ops.maximum(state.rate, SMALLEST_RATE), doubted)
        return Memory(lin.t, lin.y, stamp, state.memory.cache, rate)

    def bound(self, memory: Memory) -> Any:
        lin = memory.cache.current
        return math.inf if lin is None else lin.size

    # -- linear systems beside the iteration --------------------------------------------------------------------------

    def filtered(self, problem: StageProblem, memory: Memory, weight: float, x: Tensor) -> Tensor:
        """(I - g weight J)^-1 x with the J of the iteration that gave ``memory``."""
        assert memory.cache.current is not None
        return memory.cache.current.single(problem, weight, x)

    def direct(self, problem: Any, z: Tensor) -> Callable[[Tensor, bool], Tensor]:
        """By factorisation of the whole of M, made when it is first needed."""
        made: list[Any] = []

        def solve(b: Tensor, transposed: bool) -> Tensor:
            if not made:
                parts = zip(problem.times, problem.split(z), strict=True)
                made.append(_whole([self.take(problem, t, x) for t, x in parts], problem.matrix, problem.g))
            return solved(made[0], b, problem, transposed)

        return solve


def _unknowns(layout: Any) -> int:
    """Real numbers of a sample, the largest group's in groups."""
    rows = 1 if layout.index is None else layout.members[0].shape[1]
    return rows * layout.width * (2 if layout.dtype.is_complex else 1)


def _matrices(layout: Any) -> int:
    """Bytes of one dense matrix for every sample."""
    count = 1 if layout.joint else layout.batch
    return count * _unknowns(layout) ** 2 * torch.finfo(layout.real_dtype).bits // 8


def _whole(parts: list[Any], matrix: tuple[tuple[float, ...], ...], g: Any) -> Any:
    """Factorisation of I - g (A_ij J_j)."""
    if scipy.sparse.issparse(parts[0]):
        return factorise(scipy.sparse.bmat([[w * part for w, part in zip(row, parts)] for row in matrix], format="csc"), g)
    if isinstance(parts[0], np.ndarray):
        return factorise(np.block([[w * part for w, part in zip(row, parts)] for row in matrix]), g)
    rows = [torch.cat([w * part for w, part in zip(row, parts)], -1) for row in matrix]
    return factorise(torch.cat(rows, -2), g)


def _origin(problem: StageProblem, point: Point) -> tuple[Any, Tensor]:
    """Where J is taken: t, float or ``(B,)``, and the state."""
    if problem.origin is not None:
        return problem.origin
    return _place(problem, problem.times[0], point.z)


def _place(problem: Any, t: Tensor, y: Tensor) -> tuple[Any, Tensor]:
    return (t.item() if problem.layout.joint else t.double()), y


class _ById:
    """Hashed by identity: a scipy matrix as a key."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.value is self.value


@lru_cache(maxsize=8)
def _pattern(sparsity: _ById) -> jacobian.Pattern:
    return jacobian.Pattern(sparsity.value)


def pattern_of(sparsity: Any) -> jacobian.Pattern:
    """The pattern with its colours, which are found once."""
    return _pattern(_ById(sparsity))


INNER_OPTIMIZERS.register("newton", Newton())
INNER_OPTIMIZERS.register("newton_sparse", Newton("sparse"))
