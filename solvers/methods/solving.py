"""An implicit stage solved and differentiated: z = a + g f(t1, z), whatever formula a and g come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..optim import (
    INNER_OPTIMIZERS,
    InnerOptimizer,
    InnerResult,
    Point,
    ProximalProblem,
    UnrolledProblem,
    all_true,
    any_true,
    attach,
    lower_of,
    lowered,
    merged,
    minimise,
    not_higher,
)
from ..problem import potential
from ..status import ArgumentError, ArgumentTypeError, Status
from .base import number

FALLBACK = ("newton_krylov", "anderson")
"""What serves a step that the inner solver of the method could not solve: Newton's method, which converges fast from near by,
and, where I - g J is not positive definite on the way, one that takes no tangent for a solution (attention that saturates over
a step of 10: Newton's corrections had to be cut a hundred times, Anderson's method came to the tolerance in 48 calls of f)."""


NEAR = 0.1
"""Part of the way of the start that a root may lie from it and be taken for the one that was extrapolated."""


class Solved(NamedTuple):
    """z with its gradients; what ``minimise`` found; the problem, for its geometry and its counts; calls of f made; the
    status of the step."""

    z: Tensor
    found: InnerResult
    problem: ProximalProblem
    calls: int
    status: Any


def check_inner_options(method: Any) -> None:
    """Raise ``ArgumentError`` unless ``inner_tol``, ``max_iters`` and ``backward_tol`` are positive, ``UnknownNameError`` for a
    ``fallback`` that nothing is called."""
    for option in ("inner_tol", "max_iters", "backward_tol"):
        value = getattr(method, option)
        if value is not None and not value > 0:
            raise ArgumentError(f"{option} must be positive, found {value}")
    for name in _fallback(method):
        INNER_OPTIMIZERS[name]


def check_inner(method: Any, layout: Any) -> None:
    """Raise what the inner solver has against this layout, ``ArgumentError`` where it can't be unrolled but should."""
    inner = method.inner.chosen(layout)
    if not method.implicit_diff and not inner.unrolls:
        raise ArgumentError(
            f"implicit_diff=False records the iterations of the inner solver, which {inner.name!r} does not allow: take "
            "inner='fletcher_reeves' or 'nesterov', or leave implicit_diff=True"
        )


def unrolled(method: Any) -> bool:
    """Whether gradients are recorded, and go through the inner iterations."""
    return not getattr(method, "implicit_diff", True) and torch.is_grad_enabled()


def quiet(method: Any) -> Any:
    """The context in which a step's start is worked out: without gradients, unless they go through it."""
    return torch.set_grad_enabled(unrolled(method))


def held(method: Any, x: Tensor) -> Tensor:
    """``x``, detached where what is made of it is only a start."""
    return x if unrolled(method) else x.detach()


def inner_named(inner: Any, auto: Any) -> Any:
    """The optimiser that ``inner`` means, ``auto`` for "auto".

    Raises ``UnknownNameError`` for other names, ``ArgumentTypeError`` for what is neither a name nor an optimiser.
    """
    if isinstance(inner, InnerOptimizer):
        return inner
    if not isinstance(inner, str):
        raise ArgumentTypeError(f"inner must be a name or an InnerOptimizer, found {type(inner).__name__}")
    return auto if inner == "auto" else INNER_OPTIMIZERS[inner]


Start = Callable[[ProximalProblem, Callable[[Tensor], Point]], Point]


def remembered(method: Any, layout: Any, y0: Tensor) -> Any:
    """The memory of the inner solvers at the start of a solve: those of the method's own and of its ``fallback``."""
    return tuple(inner.remember(layout, y0.detach()) for inner in _inners(method, layout))


def _inners(method: Any, layout: Any) -> list[Any]:
    """The method's inner solver, and what serves in turn where that fails."""
    own = method.inner.chosen(layout)
    names = _fallback(method) if getattr(method, "implicit_diff", True) else ()
    return [own, *(INNER_OPTIMIZERS[name].chosen(layout) for name in names if name != own.name)]


def _fallback(method: Any) -> tuple[str, ...]:
    found = getattr(method, "fallback", None)
    return (found,) if isinstance(found, str) else tuple(found or ())


def solve_stage(
    method: Any,
    field: Any,
    t0: Any,
    dt: Any,
    base: Tensor,
    g: Any,
    start: Start,
    live: Callable[[], tuple[Tensor, Any]],
    memory: Any,
    active: Any,
    scale: Tensor,
    node: float = 1.0,
    tol: float | None = None,
) -> Solved:
    """Solve r(z) = z - base - g f(t0 + node dt, z) = 0 by ``method.inner`` to ``tol`` (None: ``method.inner_tol``), and where
    that does not get there by ``method.fallback``.

    Args:
        base, g: detached; g float or ``(B,)``. start: the problem and its residual, ``z -> Point``, to the first iterate.
            live: a and g again, with the gradients that they carry; called where gradients are recorded. scale: of the
            error norm, in units of y.
    """
    if unrolled(method):
        return _solve_unrolled(method, field, (t0, dt, node), g, start, live, memory, active, scale, tol or method.inner_tol)
    grad, inners = torch.is_grad_enabled(), _inners(method, field.layout)
    with torch.no_grad():
        (t1,) = field.times(number(t0), number(dt), (node,))
        problem = ProximalProblem(field, t1, base, g, field.norm, scale, _energy(method, field))

        def evaluate(z: Tensor) -> Point:
            with torch.set_grad_enabled(grad):
                return detached(problem.evaluate(z))

        first = start(problem, evaluate)
        found = _found(method, problem, inners, first, memory, active, tol or method.inner_tol)
    z, calls = found.z, problem.calls
    if grad and any_true(found.converged):
        base, g = live()
        if problem.depends or any(isinstance(x, Tensor) and x.requires_grad for x in (base, t0, dt, g)):
            z, found = _recorded(method, field, (t0, dt, node), base, g, problem, found, inners[0])
            calls += 2
    return Solved(z, found, problem, calls, status(problem, found))


def _solve_unrolled(
    method: Any, field: Any, place: tuple, g: Any, start: Start, live: Callable, memory: Any, active: Any, scale: Any, tol: float
) -> Solved:
    """The same with all iterations recorded."""
    t0, dt, node = place
    (t1,) = field.times(t0, dt, (node,))
    base, size = live()
    wide = field.layout.spread(size)
    problem = UnrolledProblem(field, t1, base, number(g), field.norm, scale, _energy(method, field), wide=wide)
    found = _found(method, problem, _inners(method, field.layout), start(problem, problem.evaluate), memory, active, tol)
    found = found._replace(memory=tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, found.memory))
    return Solved(found.z, found, problem, problem.calls, status(problem, found))


def _energy(method: Any, field: Any) -> Any:
    return potential(field.func, field.layout, field.args) if getattr(method, "energy", False) else None


def _found(
    method: Any, problem: ProximalProblem, inners: list[Any], first: Point, memory: Any, active: Any, tol: float
) -> InnerResult:
    own, ops = inners[0], problem.ops
    found = minimise(
        problem, own, first, tol=tol, max_iters=method.max_iters or own.patience, active=active, memory=memory[0]
    )
    kept = [found.memory, *memory[1:]]
    if problem.energy is not None:
        found = lowered(problem, first, found, tol, active)
    for i, other in enumerate(inners[1:], 1):
        failed = active & ops.invert(found.converged)
        if not any_true(failed):
            break
        # From the start again: what a failed iteration left may be far away.
        more = minimise(problem, other, first, tol=tol, max_iters=other.patience, active=failed, memory=memory[i])
        kept[i] = more.memory
        more = more._replace(converged=_lower(problem, first, more))
        found = merged(problem, failed, more, found)
    return found._replace(memory=tuple(kept))


def _lower(problem: ProximalProblem, first: Point, found: InnerResult) -> Any:
    """Where what was found as a root is a minimum seen from the start: of the objective, or, without one, by the curvature there
    along the way from the start, unless that way is short. Else the step is longer than growth allows, and its root no
    continuation of the solution: y' = 2 y over a step of 1 has the root -y."""
    if problem.energy is not None:
        return found.converged & not_higher(problem, first.z, found)
    way = problem.keep(found.converged, found.z - first.z, 0.0)
    # A root where the past has been extrapolated to continues it, whatever M, which need not be normal, does to a correction.
    near = problem.norm(way) <= NEAR * problem.norm(first.z - problem.a)
    if all_true(near):
        return found.converged
    curved = problem.dot(way, problem.jv(problem.evaluate(problem.keep(found.converged, found.z, first.z)), way))
    return found.converged & (near | (curved > 0))


def guarded(
    problem: ProximalProblem, evaluate: Callable[[Tensor], Point], z: Tensor, plain: Tensor, rough: Tensor, tol: float
) -> Point:
    """``z``, or ``plain`` in samples where that is the better start: where the objective is lower there, or, without an energy,
    where z has a larger residual than ``rough``, which is about that of ``plain``."""
    point = evaluate(z)
    if problem.energy is not None:
        return lower_of(problem, point, plain)
    good = problem.norm(point.r) <= problem.ops.maximum(problem.norm(rough), tol)
    return point if all_true(good) else problem.evaluate(problem.keep(good, z, plain))


def _recorded(
    method: Any, field: Any, place: tuple, base: Tensor, g: Any, problem: ProximalProblem, found: InnerResult, inner: Any
) -> tuple[Tensor, InnerResult]:
    """The solution as a function of everything the step depends on; samples without one stay constants, and an iterate that
    nobody had evaluated, at which f turns out not to be defined, is none."""
    wide, (t0, dt, node) = field.layout.spread(g), place

    def residual(z: Tensor) -> Tensor:
        (t1,) = field.times(t0, dt, (node,))
        return z - base - wide * field(t1, z)

    # f and its derivative need not exist at an iterate that failed.
    z = problem.keep(found.converged, found.z, problem.a)
    r = residual(z)
    blind = found.converged & problem.ops.invert(found.evaluated)
    if any_true(blind):
        norm = problem.norm(r.detach())
        lost = blind & problem.ops.invert(problem.ops.isfinite(norm))
        if any_true(lost):
            sound = found.converged & problem.ops.invert(lost)
            found = found._replace(converged=sound, norm=problem.ops.where(lost, norm, found.norm))
            z = problem.keep(sound, z, problem.a)
            r = residual(z)
    solved = attach(residual, z, problem, method.backward_tol, inner.direct(problem, z), r)
    return problem.keep(found.converged, solved, found.z), found


def status(problem: ProximalProblem, found: InnerResult) -> Any:
    code = problem.ops.where(problem.ops.isfinite(found.norm), int(Status.INNER_NOT_CONVERGED), int(Status.NON_FINITE))
    if problem.layout.joint:
        return None if found.converged else Status(code)
    return torch.where(found.converged, int(Status.SUCCESS), code).to(torch.int8)


def detached(point: Point) -> Point:
    return Point(point.z, point.r.detach(), point.f)
