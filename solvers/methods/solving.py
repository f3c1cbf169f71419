"""An implicit stage solved and differentiated: z = a + g f(t1, z), whatever formula a and g come from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..optim import INNER_OPTIMIZERS, InnerOptimizer, InnerResult, Point, ProximalProblem, any_true, attach, minimise
from ..status import ArgumentError, ArgumentTypeError, Status


class Solved(NamedTuple):
    """z with its gradients; what ``minimise`` found; the problem, for its geometry and its counts; calls of f made; the
    status of the step."""

    z: Tensor
    found: InnerResult
    problem: ProximalProblem
    calls: int
    status: Any


def check_inner_options(method: Any) -> None:
    """Raise ``ArgumentError`` unless ``inner_tol``, ``max_iters`` and ``backward_tol`` are positive."""
    for option in ("inner_tol", "max_iters", "backward_tol"):
        value = getattr(method, option)
        if value is not None and not value > 0:
            raise ArgumentError(f"{option} must be positive, found {value}")


def inner_named(inner: Any, auto: InnerOptimizer) -> InnerOptimizer:
    """The optimiser that ``inner`` means, ``auto`` for "auto".

    Raises ``UnknownNameError`` for other names, ``ArgumentTypeError`` for what is neither a name nor an optimiser.
    """
    if isinstance(inner, InnerOptimizer):
        return inner
    if not isinstance(inner, str):
        raise ArgumentTypeError(f"inner must be a name or an InnerOptimizer, found {type(inner).__name__}")
    return auto if inner == "auto" else INNER_OPTIMIZERS[inner]


def solve_stage(
    method: Any,
    field: Any,
    t0: Any,
    dt: Any,
    base: Tensor,
    g: Any,
    start: Callable[[ProximalProblem], Point],
    live: Callable[[], tuple[Tensor, Any]],
    memory: Any,
    active: Any,
    scale: Tensor,
) -> Solved:
    """Solve r(z) = z - base - g f(t0 + dt, z) = 0 by ``method.inner`` to ``method.inner_tol``.

    Args:
        base, g: detached; g float or ``(B,)``. start: the first iterate, its residual evaluated. live: a and g again, with
            the gradients that they carry; called where gradients are recorded. scale: of the error norm, in units of y.
    """
    size, grad, inner = number(dt), torch.is_grad_enabled(), method.inner.chosen(field.layout)
    with torch.no_grad():
        (t1,) = field.times(number(t0), size, (1.0,))
        problem = ProximalProblem(field, t1, base, g, field.norm, scale)
        with torch.set_grad_enabled(grad):
            first = start(problem)
        found = minimise(
            problem, inner, detached(first), tol=method.inner_tol, max_iters=method.max_iters or inner.patience,
            active=active, memory=memory,
        )  # fmt: skip
    z, calls = found.z, problem.calls
    if grad and any_true(found.converged):
        base, g = live()
        if problem.depends or any(isinstance(x, Tensor) and x.requires_grad for x in (base, t0, dt, g)):
            z, calls = _recorded(method, field, t0, dt, base, g, problem, found, inner), calls + 2
    return Solved(z, found, problem, calls, _status(problem, found))


def _recorded(
    method: Any, field: Any, t0: Any, dt: Any, base: Tensor, g: Any, problem: ProximalProblem, found: InnerResult, inner: Any
) -> Tensor:
    """The solution as a function of everything the step depends on; samples without one stay constants."""
    wide = field.layout.spread(g)

    def residual(z: Tensor) -> Tensor:
        (t1,) = field.times(t0, dt, (1.0,))
        return z - base - wide * field(t1, z)

    # f and its derivative need not exist at an iterate that failed.
    z = problem.keep(found.converged, found.z, problem.a)
    solved = attach(residual, z, problem, method.backward_tol, inner.direct(problem, z))
    return problem.keep(found.converged, solved, found.z)


def _status(problem: ProximalProblem, found: InnerResult) -> Any:
    code = problem.ops.where(problem.ops.isfinite(found.norm), int(Status.INNER_NOT_CONVERGED), int(Status.NON_FINITE))
    if problem.layout.joint:
        return None if found.converged else Status(code)
    return torch.where(found.converged, int(Status.SUCCESS), code).to(torch.int8)


def detached(point: Point) -> Point:
    return Point(point.z, point.r.detach(), point.f)


def inverse(dt: Any) -> Any:
    """1 / dt, 0 where dt is 0."""
    if not isinstance(dt, Tensor):
        return 1.0 / dt if dt else 0.0
    still = dt == 0
    return torch.where(still, 0.0, 1.0 / torch.where(still, 1.0, dt))


def number(x: Any) -> Any:
    """Without a gradient: a float in joint mode, else ``(B,)``."""
    if not isinstance(x, Tensor):
        return x
    return x.item() if x.dim() == 0 else x.detach()
