"""Derivative of a solved step: the implicit function theorem, attached to autograd.

Unrolling the inner iterations would keep all of them in memory and differentiate the path to the solution. The solution z
of r(z; theta) = 0 does not depend on the path: dz = -M^-1 dr with M = dr/dz, so one transposed linear system per step in the
backward pass gives the exact derivative, whatever found z.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..linalg import gcr
from ..status import InnerSolverError, UnsupportedError
from .base import ROUNDING, StageProblem, any_true

Direct = Callable[[Tensor, bool], Tensor]
MAX_ITERS = 2000


def attach(
    residual: Callable[[Tensor], Tensor],
    z: Tensor,
    problem: StageProblem,
    tol: float,
    direct: Direct | None = None,
    known: Tensor | None = None,
) -> Tensor:
    """``z``, which solves residual(z) = 0, as a function of every tensor that ``residual`` depends on. Two calls of it.

    The value is that of ``z``. It can be differentiated twice: with S = M^-1 held constant, z - S r(z) has the first
    derivative of the solution (a Newton step squares an error, and a change of theta is an error of first order); the same
    once more, from there, has the second (each simplified Newton step gains one order).

    Args:
        residual: one call of f, recorded by autograd. z: flat, detached. problem: the same one, detached, for its geometry.
        tol: of the linear solves in the backward pass, relative to the right-hand side of each sample.
        direct: (b, transposed) -> nearly M^-1 b or M^-T b, by a factorisation: one or two products with M then do.
        known: residual(z), recorded, if it is: then one call.
    """

    def again() -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            at = z.detach().requires_grad_()
            # Not the residual that carries gradients: a graph that goes on into all steps before would be searched.
            return at, problem.residual(at)

    wanted = _Flag()
    once = z - _Correction.apply(residual(z) if known is None else known, _System(problem, tol, again, direct), wanted)
    at = _Gate.apply(once, wanted)
    r = residual(at)
    return at - _Correction.apply(r, _System(problem, tol, lambda: (at, r), direct), wanted)


class _Flag:
    """Whether second derivatives are wanted."""

    up = False


class _System:
    """M at a solution, known through a recorded residual there, and its inverse.

    The first correction, which only second derivatives go through, records one when it is needed (a call of f): held on
    to, the one of the second would make a cycle with the graph it is part of.
    """

    def __init__(
        self, problem: StageProblem, tol: float, record: Callable[[], tuple[Tensor, Tensor]], direct: Direct | None
    ) -> None:
        self.problem, self.tol, self.record, self.direct = problem, tol, record, direct

    def product(self, transposed: bool) -> Callable[[Tensor], Tensor]:
        """v -> M v or M^T v (its adjoint where z is complex)."""
        at, r = self.record()
        if transposed:
            return lambda v: torch.autograd.grad(r, at, v, retain_graph=True)[0]
        # M v is the derivative of the linear function u -> M^T u, transposed.
        with torch.enable_grad():
            u = torch.zeros_like(r, requires_grad=True)
            (w,) = torch.autograd.grad(r, at, u, create_graph=True)
        return lambda v: torch.autograd.grad(w, u, v, retain_graph=True)[0]

    def solve(self, b: Tensor, transposed: bool) -> Tensor:
        """x with M x = b (or M^T x = b) to ``tol`` |b| in each sample.

        Raises ``InnerSolverError`` when that many iterations do not get there.
        """
        problem, direct = self.problem, self.direct
        enough = max(self.tol, ROUNDING * torch.finfo(b.dtype).eps) * problem.dot(b, b) ** 0.5
        precond = None if direct is None else lambda r: direct(r, transposed)
        x, unsolved = gcr(self.product(transposed), b, problem, enough, MAX_ITERS, precond=precond)
        if not any_true(unsolved):
            return x
        raise InnerSolverError(
            f"the linear equations of an implicit step's derivative were not solved to {self.tol:g} in {MAX_ITERS} "
            "iterations: take smaller steps, or a larger backward_tol"
        )


class _Correction(torch.autograd.Function):
    """0 in place of M^-1 r, which is as good as 0 at a solution; its derivative is that of M^-1 r with M constant."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, system: _System, wanted: _Flag) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.system, ctx.wanted = system, wanted
        return torch.zeros_like(r)

    @staticmethod
    def backward(ctx: Any, c: Tensor | None) -> tuple[Tensor | None, None, None]:
        if c is None:
            return None, None, None
        ctx.wanted.up |= torch.is_grad_enabled()
        return _Solve.apply(c, ctx.system, True), None, None


class _Solve(torch.autograd.Function):
    """M^-1 b or M^-T b with M constant: each is the other's derivative."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, system: _System, transposed: bool) -> Tensor:
        ctx.system, ctx.transposed = system, transposed
        return system.solve(b, transposed)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, None, None]:
        return _Solve.apply(c, ctx.system, not ctx.transposed), None, None


class _Gate(torch.autograd.Function):
    """Identity that lets a derivative through only where second ones are wanted: the first is complete without it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flag: _Flag) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.flag = flag
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, c: Tensor | None) -> tuple[Tensor | None, None]:
        return (_Last.apply(c) if c is not None and ctx.flag.up else None), None


class _Last(torch.autograd.Function):
    """Identity that refuses to be differentiated twice: third derivatives would lack terms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "an implicit step can be differentiated twice, not three times: ask for the second derivative without "
                "create_graph=True"
            )
        return c
