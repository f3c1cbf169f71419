"""Linear fields solved exactly in time: y(t0 + tau) = y0 + tau phi_1(tau L) (L y0 + b), by products with L only."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..linalg import KrylovSpace, combine, crossed, expm, integrated, poisson_tails, poisson_terms
from ..optim import any_true
from ..problem import FlatOperator, Function, LinearField
from ..status import ArgumentError, InnerSolverError, Status
from .base import METHODS, Method, StepOut

WAYS = ("auto", "lanczos", "arnoldi", "uniformisation")
SAFETY = 0.9
"""The controllers' own."""
SHORTER = 0.7
"""Factor by which the length of a step is lowered in search of the longest that a Krylov space is good for."""
LARGER = 4
"""Krylov spaces of the backward pass may be so many times larger than those of the steps."""


class ExpState(NamedTuple):
    """f at the start, if it is known; whether it is yet to be compared with L y + b; the Krylov space of a rejected step."""

    f0: Tensor | None
    unchecked: bool
    work: Workspace


class Workspace:
    """The Krylov space that a step from the state ``of`` has built, for a shorter one from there."""

    __slots__ = ("of", "space")

    def __init__(self) -> None:
        self.of: Any = None
        self.space: Any = None


class ExpDense(NamedTuple):
    flow: Any
    dt: Any
    y0: Tensor
    f0: Tensor


@dataclass(frozen=True)
class ExpLinear(Method):
    """y1 = y0 + dt phi_1(dt L) (L y0 + b): the exact solution of a :class:`~solvers.LinearField`, as far as products with L tell.

    Symmetric L: Lanczos' short recurrence. ``rate``, where L + rate I = rate P with stochastic P: uniformisation,
    sum_k P(N > k) P^k f0 / rate with N Poisson of mean rate dt, whose terms are never larger than the first (in the maximum
    norm or, where the columns of P are shares, the 1-norm). Otherwise Arnoldi. The estimate is that of the Krylov space, or
    the bound of the terms left out; a step is as long as the solve or as ``krylov_dim`` vectors reach, and outputs inside it
    cost no product.

    Gradients are those of the solution, once differentiable for Krylov spaces (again for uniformisation): the backward pass
    builds a space of L^T for every output, and has the derivative of every product that the forward pass made.

    Working memory: a state for each product of a step, twice as many with gradients. Calls: products with L, counted as f.

    ``expm``: "auto", or "lanczos", "arnoldi", "uniformisation". ``krylov_dim``: products a step may take. ``inner_tol``: bound
    of the error in units of the tolerance. ``backward_tol``: relative tolerance in the backward pass.
    """

    _: KW_ONLY
    expm: str = "auto"
    krylov_dim: int = 60
    inner_tol: float = 0.1
    backward_tol: float = 1e-8

    name: ClassVar[str] = "exp_linear"  # type: ignore[misc]
    order: ClassVar[int] = 1  # type: ignore[misc]
    error_order: ClassVar[int | None] = 1  # type: ignore[misc]
    reference: ClassVar[str] = "Saad 1992 (Krylov); Jensen 1953 (uniformisation)"  # type: ignore[misc]
    remedy: ClassVar[str] = "smaller steps or a larger krylov_dim="
    demands: ClassVar[Any] = LinearField
    exact: ClassVar[bool] = True
    reads_values: ClassVar[bool] = True
    graded_failure: ClassVar[bool] = True
    real_limit: ClassVar[float] = float("inf")  # type: ignore[misc]

    def __post_init__(self) -> None:
        if self.expm not in WAYS:
            raise ArgumentError(f"expm must be one of {', '.join(WAYS)}, found {self.expm!r}")
        if not isinstance(self.krylov_dim, int) or self.krylov_dim < 2:
            raise ArgumentError(f"krylov_dim must be an integer >= 2, found {self.krylov_dim!r}")
        for option in ("inner_tol", "backward_tol"):
            if not getattr(self, option) > 0:
                raise ArgumentError(f"{option} must be positive, found {getattr(self, option)}")

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> ExpState:
        return ExpState(f0, f0 is not None and not isinstance(field.func, Function), Workspace())

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: ExpState, active: Any) -> StepOut:
        op = FlatOperator(field.func, field.layout, field.args)
        f0 = op.slope(y0) if state.f0 is None else state.f0
        if state.unchecked:
            _compare(op, y0, f0.detach())
        tau = _times(field.layout, dt)
        with torch.no_grad():
            scale = field.norm.scale(y0.detach())
            ahead = tau.detach()
        if self._uniform(op, ahead):
            flow: Any = _Poisson(op, f0)
        else:
            flow = self._space(op, y0, f0, state.work)
        error, share = flow.extend(ahead[0], field.norm, scale, active, self)
        y1 = flow.values(tau, y0, f0, 0)[0]
        after = ExpState(None, False, Workspace())
        return StepOut(y1, (error, share), ExpDense(flow, dt, y0, f0), after, op.calls, _status(field.layout, error))

    def _uniform(self, op: FlatOperator, tau: Tensor) -> bool:
        """Whether this step is for uniformisation: it goes forwards and not too far."""
        if self.expm != "auto":
            if self.expm == "uniformisation" and not op.rate:
                raise ArgumentError("expm='uniformisation' needs a field with rate=, for which L + rate I has no negative entry")
            return self.expm == "uniformisation"
        if op.symmetric or not op.rate or op.layout.dtype.is_complex:
            return False
        return bool((tau >= 0).all()) and float(tau.max()) * op.rate <= 2 * self.krylov_dim

    def _space(self, op: FlatOperator, y0: Tensor, f0: Tensor, work: Workspace) -> _Krylov:
        symmetric = self.expm == "lanczos" or (self.expm == "auto" and op.symmetric)
        if work.of is not y0:
            work.of, work.space = y0, KrylovSpace(op.layout, f0.detach(), symmetric)
        return _Krylov(op, work.space, self)

    def ratio(self, norm: Any, y0: Tensor, out: StepOut) -> Any:
        """The error, or where it is too large what shortens the step to what the Krylov space is good for."""
        error, share = out.error
        return norm.layout.ops.where(error <= 1, error, norm.layout.ops.maximum(SAFETY * share, 1.01))

    def interpolate(self, dense: ExpDense, theta: Tensor, derivative: int = 0) -> Tensor:
        return dense.flow.values(theta * dense.dt, dense.y0, dense.f0, derivative)


class _Krylov:
    """A step by the Krylov space of f0."""

    def __init__(self, op: FlatOperator, space: KrylovSpace, method: ExpLinear) -> None:
        self.op, self.layout, self.space, self.method = op, op.layout, space, method
        self.H: Any = None
        self._largest: float | None = None

    def extend(self, tau: Tensor, norm: Any, scale: Tensor, active: Any, method: ExpLinear) -> tuple[Any, Any]:
        """Enlarge the space until it is good for ``tau``: the error, and ``tau`` in units of what it is good for."""
        space, ops, recorded = self.space, self.layout.ops, torch.is_grad_enabled()
        target = max(1, len(space))
        running, error, used = _begin(self.layout, active, tau)
        with torch.no_grad():
            while True:
                self._grow(target, recorded)
                found = self._estimate(tau, norm, scale)
                error, used = ops.where(running, found, error), ops.where(running, target, used)
                running = running & (found > method.inner_tol)
                if not any_true(running) or target >= method.krylov_dim:
                    break
                target = min(method.krylov_dim, target + max(1, target // 6))
            self._check()
            self.H = space.matrix(used)
            return error, self._share(tau, error, norm, scale)

    def _grow(self, target: int, recorded: bool) -> None:
        with torch.set_grad_enabled(recorded):
            while len(self.space) < target:
                self.space.grow(self.op.product)

    def _estimate(self, tau: Tensor, norm: Any, scale: Tensor) -> Any:
        """Norm of the last vector's part in the solution, which the space without it lacks."""
        space = self.space
        last = expm(integrated(space.matrix()), tau.unsqueeze(0))[0, ..., -2, -1].abs() * space.length
        if not self.layout.joint:
            return last * norm(space.vectors[-1], scale)
        if norm.custom is None:
            # A unit vector's norm is at least this: far from the tolerance, no need to look at the vector.
            least = last.item() / (self.largest(scale) * self.layout.width**0.5)
            if least > 1:
                return least
        return last.item() * norm(space.vectors[-1], scale)

    def largest(self, scale: Tensor) -> float:
        """Largest of the tolerances."""
        if self._largest is None:
            self._largest = float(scale.max())
        return self._largest

    def _share(self, tau: Tensor, error: Any, norm: Any, scale: Tensor) -> Any:
        ops, trial, share = self.layout.ops, tau, error * 0.0 + 1.0
        over = error > 1
        while any_true(over) and not any_true(share > 1e12):
            share = ops.where(over, share / SHORTER, share)
            trial = tau / share
            over = over & (self._estimate(trial, norm, scale) > 1)
        return share

    def _check(self) -> None:
        worst = float(self.space.skew.max())
        if worst > torch.finfo(self.layout.dtype).eps ** 0.5:
            raise ArgumentError("the field says symmetric=True, but its matvec is not: <u, L v> and <v, L u> differ")

    def coefficients(self, tau: Tensor, derivative: int) -> Tensor:
        """Of the ``derivative``-th derivative of y at ``tau`` ``(n,)`` or ``(n, B)``, in the vectors of the space."""
        if derivative == 0:
            c = expm(integrated(self.H), tau)[..., :-1, -1]
        else:
            c = expm(self.H, tau)[..., 0]
            for _ in range(derivative - 1):
                c = (self.H @ c.unsqueeze(-1)).squeeze(-1)
        return c * self.space.length.unsqueeze(-1)

    def values(self, tau: Tensor, y0: Tensor, f0: Tensor, derivative: int) -> Tensor:
        return _Evolve.apply(tau, y0, f0, self, derivative, *self.space.images)

    def back(self, cotangent: Tensor, tau: Tensor) -> KrylovSpace:
        """The Krylov space of L^T and ``cotangent`` that is good for ``tau``."""
        space = KrylovSpace(self.layout, cotangent, self.space.symmetric)
        tol = max(self.method.backward_tol, 16 * torch.finfo(cotangent.dtype).eps)
        target = 1
        while target <= LARGER * self.method.krylov_dim:
            while len(space) < target:
                space.grow(self.op.adjoint)
            c = expm(integrated(space.matrix()), tau.unsqueeze(0))[0, ..., :-1, -1].abs()
            if bool((c[..., -1] <= tol * torch.linalg.vector_norm(c, dim=-1)).all()):
                return space
            target += max(1, target // 6)
        raise InnerSolverError(
            f"the exponential of a step's derivative was not found to {tol:g} by {target} products: take a larger "
            "backward_tol= or krylov_dim=, or smaller steps (dt_max=)"
        )


class _Evolve(torch.autograd.Function):
    """States ``(n, *state)`` at times ``tau``, or their derivatives, as a function of everything they depend on.

    With y' = L y + b a change of L gives int_0^tau e^{(tau - s) L} dL x(s) ds, where x(s) = s phi_1(s L) f0 is a combination of
    the space's vectors v_j with coefficients c_j(s): <cotangent, that> = sum_j <u_j, dL v_j>, where u_j is a combination of the
    vectors of the space of L^T whose coefficients are integrals over s of exponentials, hence known exactly.
    """

    @staticmethod
    def forward(
        ctx: Any, tau: Tensor, y0: Tensor, f0: Tensor, flow: _Krylov, derivative: int, *images: Tensor
    ) -> Tensor:
        ctx.flow, ctx.derivative = flow, derivative
        ctx.save_for_backward(tau)
        value = combine(flow.layout, flow.space.vectors, flow.coefficients(tau, derivative))
        return y0 + value if derivative == 0 else value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangents: Tensor) -> tuple[Any, ...]:
        flow, derivative, (tau,) = ctx.flow, ctx.derivative, ctx.saved_tensors
        if derivative > 1:
            raise ArgumentError("gradients of dense output go up to its first derivative in t")
        moved = None
        if ctx.needs_input_grad[0]:
            slopes = combine(flow.layout, flow.space.vectors, flow.coefficients(tau, derivative + 1))
            products = (cotangents.conj() * slopes).real
            moved = torch.stack([flow.layout.sum(p) for p in products]).to(tau)
        start: Any = 0.0
        images: list[Any] = [None] * len(flow.space.images)
        wanted = any(ctx.needs_input_grad[5:])
        for cotangent, time in zip(cotangents, tau):
            if not (wanted or ctx.needs_input_grad[2]):
                break
            f, u = _pull(flow, cotangent, time, derivative, wanted)
            start = start + f
            images = [x if old is None else old + x for old, x in zip(images, u)]
        return moved, cotangents.sum(0) if derivative == 0 else None, start, None, None, *images


def _pull(flow: _Krylov, cotangent: Tensor, tau: Tensor, derivative: int, wanted: bool) -> tuple[Tensor, Any]:
    """A cotangent of the state at ``tau`` taken back to f0, and to the products that made the space."""
    back = flow.back(cotangent, tau)
    T, tau = back.matrix(), tau.unsqueeze(0)
    if derivative == 0:
        # The last of the rows that are integrated is 1: its integral is tau phi_1(tau T) e_1.
        G = crossed(T, integrated(flow.H).mH, flow.H.shape[-1], tau)[0]
        first, G = G[..., -1], G[..., :-1]
    else:
        first, G = expm(T, tau)[0, ..., 0], crossed(T, flow.H.mH, 0, tau)[0]
    length = back.length.unsqueeze(-1)
    start = combine(flow.layout, back.vectors, (first * length).unsqueeze(0))[0]
    if not wanted:
        return start, [None] * len(flow.space.images)
    weights = (G * (length * flow.space.length.unsqueeze(-1)).unsqueeze(-1)).movedim(-1, 0)
    return start, combine(flow.layout, back.vectors, weights[: len(flow.space.images)]).unbind(0)


class _Poisson:
    """A step by uniformisation: the terms P^k f0."""

    def __init__(self, op: FlatOperator, f0: Tensor) -> None:
        self.op, self.layout, self.rate = op, op.layout, float(op.rate)  # type: ignore[arg-type]
        self.terms = [f0]
        self.used: Any = None

    def extend(self, tau: Tensor, norm: Any, scale: Tensor, active: Any, method: ExpLinear) -> tuple[Any, Any]:
        """Add terms until those left out, which are no larger, sum up to less than the tolerance.

        A joint state is looked at only where its norm would do if it went on falling as between the last two looks, and every
        fifth of the way: a norm may cost a sixth of a product.
        """
        ops, x, joint = self.layout.ops, (tau * self.rate).cpu(), self.layout.joint
        largest, mass = _sizes(self.terms[0])
        most = int(float(x.max()) + 10 * float(x.max()) ** 0.5 + 40)
        tails = poisson_tails(x, most)
        left = tails.flip(-1).cumsum(-1).flip(-1) / self.rate
        running, error, used = _begin(self.layout, active, tau)
        fall = _Fall()
        for k in range(1, most):
            weight = left[k].item() if joint else left[..., k].to(self.terms[0].device)
            if not joint or k == most - 1 or fall.expected(k) * weight <= method.inner_tol:
                with torch.no_grad():
                    size = norm(self.terms[-1].detach(), scale)
                if joint:
                    fall.see(k, size)
                found = size * weight
                error, used = ops.where(running, found, error), ops.where(running, k, used)
                running = running & (found > method.inner_tol)
                if not any_true(running):
                    break
            self.terms.append(torch.add(self.terms[-1], self.op.product(self.terms[-1]), alpha=1 / self.rate))
        last, rest = _sizes(self.terms[-1])
        if last > 1.001 * largest and rest > 1.001 * mass:
            raise ArgumentError(
                f"the field says rate={self.rate:g}, but the products with I + L / rate grow: its entries off the diagonal must "
                "not be negative, and its rows, or its columns, sum to 0"
            )
        self.used = used
        return error, error * 0.0 + 1.0

    def values(self, tau: Tensor, y0: Tensor, f0: Tensor, derivative: int) -> Tensor:
        x, count = tau * self.rate, len(self.terms)
        if derivative == 0:
            weights = poisson_tails(x, count) / self.rate
        else:
            weights = poisson_terms(x, count, derivative - 1) * self.rate ** (derivative - 1)
        if isinstance(self.used, Tensor):
            weights = torch.where(torch.arange(count, device=x.device) < self.used.unsqueeze(-1), weights, 0.0)
        value = combine(self.layout, self.terms, weights)
        return y0 + value if derivative == 0 else value


class _Fall:
    """The norm of the terms of a series as it was seen to fall last."""

    def __init__(self) -> None:
        self.size, self.rate, self.at = 0.0, 0.0, 0

    def expected(self, k: int) -> float:
        """That of term ``k``; 0 before two were seen, and where the last look is long ago."""
        return self.size * self.rate ** (k - self.at) if k - self.at <= k // 4 else 0.0

    def see(self, k: int, size: float) -> None:
        if self.size > 0:
            self.rate = min(1.0, (size / self.size) ** (1 / (k - self.at)))
        self.size, self.at = size, k


def _sizes(v: Tensor) -> tuple[float, float]:
    """Maximum norm and 1-norm: the first of P v is no larger if the rows of P are shares, the second if its columns are."""
    size = v.detach().abs()
    return float(size.max()), float(size.sum(dtype=torch.float64))


def _compare(op: FlatOperator, y0: Tensor, f0: Tensor) -> None:
    """Raise ``ArgumentError`` where f is not what its parts say."""
    with torch.no_grad():
        own = op.slope(y0.detach())
        off = float(torch.linalg.vector_norm(own - f0))
        if off > torch.finfo(f0.dtype).eps ** 0.5 * float(torch.linalg.vector_norm(f0) + torch.linalg.vector_norm(own)):
            raise ArgumentError(
                f"f(t, y) is not matvec(y) + source() at the start: they differ by {off:.2g} in the Euclidean norm. A linear "
                "field has nothing else, and no t"
            )


def _begin(layout: Any, active: Any, tau: Tensor) -> tuple[Any, Any, Any]:
    """Who still runs; no error; nothing used."""
    return (active, 0.0, 0) if layout.joint else (active, torch.zeros_like(tau), torch.zeros_like(tau, dtype=torch.int64))


def _times(layout: Any, dt: Any) -> Tensor:
    """``(1,)`` or ``(1, B)`` float64 with the gradient of ``dt``."""
    return torch.as_tensor(dt, dtype=torch.float64, device=layout.device).unsqueeze(0)


def _status(layout: Any, error: Any) -> Any:
    if layout.joint:
        return None if error <= 1 else Status.NON_FINITE if error != error else Status.INNER_NOT_CONVERGED
    code = torch.where(error > 1, int(Status.INNER_NOT_CONVERGED), int(Status.NON_FINITE))
    return torch.where(error <= 1, int(Status.SUCCESS), code).to(torch.int8)


METHODS.register("exp_linear", ExpLinear())
