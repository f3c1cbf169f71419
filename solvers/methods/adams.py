"""Adams methods on the grid as it is: of fixed order with constant or given steps, and of variable step and order.

No formula here assumes equal steps. Coefficients come from the past nodes (``adams_weights``), so that clipped last steps,
forced nodes and grids given by the user keep the order. HNW: Hairer, Nørsett & Wanner I, 2nd ed.; g, Phi*, beta as there.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import KW_ONLY, dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..layout import transforms_active
from ..status import ArgumentError, Status
from .adams_weights import (
    basis,
    continuation,
    differences,
    distances,
    evaluate,
    explicit_weights,
    implicit_weights,
    integrals,
)
from .base import METHODS, Method, StepOut
from .tableau import Tableau

HIGHEST_ORDER = 12
"""Formulas of higher order gain nothing in double precision (Shampine & Gordon 1975)."""

MOST_CORRECTIONS = 50
"""Corrections after which an iteration without a limit of its own is given up."""


class Workspace:
    """f at the last point where it was asked for: rejected steps and the start of a solve need not ask again.

    Results do not depend on it: it is good for the very same tensor y, in the same autograd mode, only.
    """

    __slots__ = ("f", "grad", "y")

    def __init__(self, y: Tensor, f: Tensor | None) -> None:
        self.y: Tensor | None = None
        self.f: Any = None
        self.grad = False
        if f is not None:
            self._keep(y, f)

    def _keep(self, y: Tensor, f: Tensor) -> None:
        self.y, self.grad = y, torch.is_grad_enabled()
        # f may answer in the same memory every time, and a history must outlive that.
        self.f = f if self.grad else f.clone()

    def slope(self, field: Any, t: Any, y: Tensor) -> tuple[Tensor, int]:
        """f(t, y), and the calls of f that took."""
        if self.y is y and self.grad == torch.is_grad_enabled():
            return self.f, 0
        self._keep(y, field(field.time(t), y))
        return self.f, 1


class FixedState(NamedTuple):
    """History of a method of fixed order, newest first.

    slopes: f at t_{n-1}, t_{n-2}, ... steps: t_n - t_{n-1}, t_{n-1} - t_{n-2}, ... count: how many of them there are, int or
    ``(B,)``; in the batched modes both tuples have their full length from the start, with harmless numbers behind the first
    ``count``. settled: nobody lacks history any more.
    """

    slopes: tuple[Tensor, ...]
    steps: tuple[Any, ...]
    count: Any
    work: Workspace
    settled: bool = False


class VariableState(NamedTuple):
    """History of the method of variable order; ``steps`` and ``count`` as above.

    foreseen: 0, and then what the polynomials of degree 0, 1, .. through f at t_{n-1}, t_{n-2}, .. give at t_n. order: of
    the next step, int or ``(B,)``; highest: the largest allowed.
    """

    foreseen: tuple[Tensor, ...]
    steps: tuple[Any, ...]
    count: Any
    order: Any
    highest: int
    work: Workspace


class VariableError(NamedTuple):
    """Errors of the formulas of orders k - 1, k, k + 1: dt (g_j - g_{j-1}) Phi_j for j = k - 1, k, k + 1 (HNW III.7).

    differences: Phi_j, ``(3, *layout.shape)``, in joint mode without those that need more history than there is. exists:
    which orders do, bool or ``(B,)`` each.
    """

    differences: Tensor
    exists: tuple[Any, Any, Any]
    dt: Any
    g: Any
    order: Any


class AdamsDense(NamedTuple):
    """y(t_n + theta dt) = y0 + dt sum_i values_i w_i(theta).

    kind: "explicit" or "implicit": values are f's, the last one (implicit) that at the new point; "divided": Phi*_0, Phi*_1,
    .. in one tensor, and Phi_k with the prediction's f. nodes: how many past values the polynomial takes, int or ``(B,)``.
    start: dense data of a start step for the samples in ``starting``; None without one.
    """

    layout: Any
    dt: Any
    y0: Tensor
    steps: tuple[Any, ...]
    values: tuple[Tensor, ...]
    kind: str
    nodes: Any
    start: Any = None
    starting: Any = False


def _add(y: Tensor, coefficient: Any, x: Tensor) -> Tensor:
    if isinstance(coefficient, Tensor):
        return torch.addcmul(y, coefficient, x)
    return torch.add(y, x, alpha=coefficient)


def _combine(layout: Any, y: Tensor, weights: Any, tensors: tuple[Tensor, ...]) -> Tensor:
    """y + sum_i weights_i tensors_i in one order of additions. ``weights``: floats, or ``(K, ...)`` per sample."""
    if isinstance(weights, Tensor):
        weights = layout.spread(weights).unbind(0)
    out_of_place = torch.is_grad_enabled() or transforms_active()
    result = y
    for weight, tensor in zip(weights, tensors):
        if out_of_place or result is y:
            result = _add(result, weight, tensor)
        elif isinstance(weight, Tensor):
            result.addcmul_(weight, tensor)
        else:
            result.add_(tensor, alpha=weight)
    return result


def _no_history(dt: Tensor, depth: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Harmless steps, and the count 0, for samples that start (batched modes)."""
    step = torch.where(dt.detach() < 0, -1.0, 1.0).to(torch.float64)
    return (step,) * depth, torch.zeros_like(dt, dtype=torch.int64)


# -- fixed order ------------------------------------------------------------------------------------------------------


def extrapolated_midpoint(order: int) -> Tableau:
    """The explicit Runge-Kutta method of even ``order`` that extrapolates Gragg's midpoint rule.

    The midpoint rule with n = 2, 4, .., ``order`` substeps has an error in even powers of 1/n, and ``order / 2`` results
    remove as many of them (HNW II.9, the harmonic sequence doubled; no smoothing step, which the order does not need).
    """
    sequence = range(2, order + 1, 2)
    c: list[float] = [0.0]
    a: list[tuple[float, ...]] = [()]
    b: dict[int, float] = {}
    for n in sequence:
        share = math.prod(n * n / (n * n - m * m) for m in sequence if m != n)
        before: dict[int, float] = {}
        here = {0: 1.0 / n}
        for i in range(1, n):
            stage = len(c)
            c.append(i / n)
            a.append(tuple(here.get(j, 0.0) for j in range(stage)))
            before, here = here, {**before, stage: 2.0 / n}
        for stage, weight in here.items():
            b[stage] = b.get(stage, 0.0) + share * weight
    row = tuple(b.get(stage, 0.0) for stage in range(len(c)))
    return Tableau(f"extrapolated_midpoint_{order}", order, tuple(c), tuple(a), row, "HNW II.9")


@cache
def start_method(order: int) -> Method:
    """The Runge-Kutta method of at least ``order`` that takes the first ``order - 1`` steps."""
    for most, name in ((4, "rk4_classic"), (5, "dopri5"), (8, "dop853")):
        if order <= most:
            return METHODS[name]
    some: Any = METHODS["rk4_classic"]
    return dataclasses.replace(some, tableau=extrapolated_midpoint(order + order % 2))


@dataclass(frozen=True)
class FixedAdams(Method):
    """What the methods of fixed order share: the history, and a start that keeps the order.

    The first ``order - 1`` steps are those of a Runge-Kutta method: ``rk4_classic`` through order 4, ``dopri5`` at 5,
    ``dop853`` through 8, and the extrapolated midpoint rule of order 10 or 12 above. In the batched modes each sample starts
    when it must, and one that does not start is not touched by others' starts.
    """

    _: KW_ONLY
    order: int = 4

    one_step: ClassVar[bool] = False
    error_order: ClassVar[int | None] = None  # type: ignore[misc]

    def __post_init__(self) -> None:
        _check_order("order", self.order)

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> FixedState:
        work, depth = Workspace(y0, f0), self.order - 1
        if field.layout.joint:
            return FixedState((), (), 0, work)
        return FixedState((torch.zeros_like(y0),) * depth, *_no_history(dt, depth), work)

    def formula(self, field: Any, t0: Any, dt: Any, y0: Tensor, past: Any, steps: Any, active: Any) -> StepOut:
        """One step where the history is complete, without the next state. ``past``: f at t_n, t_{n-1}, ..."""
        raise NotImplementedError

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: FixedState, active: Any) -> StepOut:
        slope, calls = state.work.slope(field, t0, y0)
        past = (slope, *state.slopes)
        starting, settled = self._starting(state, active)
        if starting is False:
            out = self.formula(field, t0, dt, y0, past, state.steps, active)
        else:
            out = self._start(field, t0, dt, y0, past, state.steps, active, starting)
        depth = self.order - 1
        count = min(state.count + 1, depth) if isinstance(state.count, int) else (state.count + 1).clamp(max=depth)
        following = FixedState(past[:depth], (dt, *state.steps)[:depth], count, state.work, settled)
        return out._replace(state=following, work=out.work + calls)

    def _starting(self, state: FixedState, active: Any) -> tuple[Any, bool]:
        """Who lacks history (True, False or a mask), and whether nobody ever will again. Reads only while some may."""
        needed = self.order - 1
        if isinstance(state.count, int):
            return state.count < needed, False
        if state.settled or needed == 0:
            return False, True
        starting = state.count < needed
        some, others = torch.stack([starting & active, ~starting & active]).any(1).tolist()
        return (starting if others else True) if some else False, not some

    def _start(self, field, t0, dt, y0, past, steps, active, starting) -> StepOut:
        """A Runge-Kutta step for the samples in ``starting``, which others stand still for, and the formula for those."""
        method, layout = start_method(self.order), field.layout
        h = dt if starting is True else torch.where(starting, dt, 0.0)
        first = method.step(field, t0, h, y0, method.init(field, t0, h, y0, past[0]), active)
        if starting is True:
            dense = AdamsDense(layout, dt, y0, (), (), "explicit", 0, first.dense, True)
            return StepOut(first.y1, None, dense, None, first.work)
        out = self.formula(field, t0, dt, y0, past, steps, active & ~starting)
        y1 = torch.where(layout.spread(starting), first.y1, out.y1)
        dense = out.dense._replace(start=first.dense, starting=starting)
        return out._replace(y1=y1, dense=dense, work=out.work + first.work)

    def prepare(self, field: Any, dense: AdamsDense) -> tuple[AdamsDense, int]:
        if dense.start is None:
            return dense, 0
        start, calls = start_method(self.order).prepare(field, dense.start)
        return dense._replace(start=start), calls

    def snapshot(self, dense: AdamsDense) -> AdamsDense:
        if dense.kind == "implicit" and not torch.is_grad_enabled():
            # The last value is f's own answer, which may lie in memory that f uses again.
            dense = dense._replace(values=(*dense.values[:-1], dense.values[-1].clone()))
        return dense if dense.start is None else dense._replace(start=start_method(self.order).snapshot(dense.start))

    def interpolate(self, dense: AdamsDense, theta: Tensor, derivative: int = 0) -> Tensor:
        if dense.start is None:
            return _interpolate(dense, theta, derivative)
        first = start_method(self.order).interpolate(dense.start, theta, derivative)
        if dense.starting is True:
            return first
        return torch.where(dense.layout.spread(dense.starting), first, _interpolate(dense, theta, derivative))


@dataclass(frozen=True)
class ExplicitAdams(FixedAdams):
    """y1 = y0 + the integral over the step of the polynomial through the last ``order`` values of f (Adams-Bashforth).

    One evaluation a step. HNW III.1 for equal steps, III.5 for any.

    Args:
        order: 1 to 12.
    """

    name: ClassVar[str] = "explicit_adams"  # type: ignore[misc]
    reference: ClassVar[str] = "Bashforth & Adams 1883; Hairer, Nørsett & Wanner I, III.1 and III.5"  # type: ignore[misc]

    def formula(self, field: Any, t0: Any, dt: Any, y0: Tensor, past: Any, steps: Any, active: Any) -> StepOut:
        y1 = _combine(field.layout, y0, explicit_weights(dt, steps), past)
        return StepOut(y1, None, AdamsDense(field.layout, dt, y0, steps, past, "explicit", self.order), None, 0)


@dataclass(frozen=True)
class ImplicitAdams(FixedAdams):
    """Adams-Moulton of ``order`` as P(EC)^m E: prediction by Adams-Bashforth of the same order, m corrections.

    HNW III.1 for equal steps, III.5 for any. The predictor has the corrector's order, as in the classical pairs and in
    GRAND's AM4 (Chamberlain et al. 2021, eq. 9), not one less as in HNW III.1, so that already one correction has the
    corrector's own error; at order 4 the stability limit on the real axis is then 1.28 instead of 1.93. The last evaluation
    is the first of the next step, so that PECE costs two evaluations a step.

    Args:
        order: 1 to 12.
        max_corrections: m; None: 1, or 50 with ``corrector_tol``.
        corrector_tol: stop correcting when the change is at most this in the error norm (units of the tolerance); a step
            in which that takes more than ``max_corrections`` fails with ``INNER_NOT_CONVERGED``. None: correct m times.
    """

    _: KW_ONLY
    max_corrections: int | None = None
    corrector_tol: float | None = None

    name: ClassVar[str] = "implicit_adams"  # type: ignore[misc]
    remedy: ClassVar[str] = "a smaller dt=, a larger max_corrections= or corrector_tol=, or a proximal method"
    reference: ClassVar[str] = "Moulton 1926; Hairer, Nørsett & Wanner I, III.1 and III.5"  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        m, tol = self.max_corrections, self.corrector_tol
        if m is not None and (not isinstance(m, int) or isinstance(m, bool) or m < 1):
            raise ArgumentError(f"max_corrections must be None or an integer >= 1, found {m!r}")
        if tol is not None and not (isinstance(tol, (int, float)) and tol > 0):
            raise ArgumentError(f"corrector_tol must be None or a positive number, found {tol!r}")

    def formula(self, field: Any, t0: Any, dt: Any, y0: Tensor, past: Any, steps: Any, active: Any) -> StepOut:
        layout, nodes = field.layout, self.order - 1
        y = _combine(layout, y0, explicit_weights(dt, steps), past)
        base, own = y0, dt
        if nodes:
            weights, own = implicit_weights(dt, steps[: nodes - 1])
            base = _combine(layout, y0, weights, past)
        t1, own = field.time(t0 + dt), layout.spread(own)
        if self.corrector_tol is None:
            calls, status = self.max_corrections or 1, None
            for _ in range(calls):
                slope = field(t1, y)
                y = _add(base, own, slope)
        else:
            y, slope, calls, status = self._iterate(field, t1, y, base, own, active)
        dense = AdamsDense(layout, dt, y0, steps[: max(nodes - 1, 0)], (*past[:nodes], slope), "implicit", nodes)
        return StepOut(y, None, dense, None, calls, status)

    def _iterate(self, field, t1, y, base, own, active) -> tuple[Tensor, Tensor, int, Any]:
        """Corrections until the change is small, each sample for itself: (y, the f that it came from, calls of f, status)."""
        layout, ops = field.layout, field.layout.ops
        with torch.no_grad():
            scale = field.norm.scale(y)
        slope: Any = None
        moving, failed = active, False
        for calls in range(1, (self.max_corrections or MOST_CORRECTIONS) + 1):
            f = field(t1, y)
            following = _add(base, own, f)
            if slope is None or layout.joint:
                slope = f
            else:
                wide = layout.spread(moving)
                slope, following = torch.where(wide, f, slope), torch.where(wide, following, y)
            with torch.no_grad():
                change = field.norm(following - y, scale)
            y = following
            finite = ops.isfinite(change)
            # A first change that is not finite says that f is not: that is for the loop to find.
            failed = failed | (moving & ops.invert(finite)) if calls > 1 else finite & False
            moving = moving & finite & ops.invert(change <= self.corrector_tol)
            if not (moving if layout.joint else bool(moving.any())):
                break
        failed = failed | moving
        if layout.joint:
            return y, slope, calls, Status.INNER_NOT_CONVERGED if failed else None
        return y, slope, calls, torch.where(failed, int(Status.INNER_NOT_CONVERGED), 0).to(torch.int8)


def _check_order(what: str, order: Any) -> None:
    if not isinstance(order, int) or isinstance(order, bool) or not 1 <= order <= HIGHEST_ORDER:
        raise ArgumentError(f"{what} of an Adams method must be an integer from 1 to {HIGHEST_ORDER}, found {order!r}")


# -- variable step and order ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VariableAdams(Method):
    """Adams in PECE form with variable step and order (HNW III.5 and III.7; Shampine & Gordon 1975).

    At order k: prediction p = y0 + dt sum_{j<k} g_j Phi*_j, evaluation, correction y1 = p + dt g_k Phi_k with
    Phi_k = f(t1, p) - sum_{j<k} Phi*_j. That is the Adams-Moulton formula of order k + 1; its difference to the one of order
    k is the error estimate, so that the better result is carried on (local extrapolation). Two evaluations for an accepted
    step, one for a rejected one (in the batched modes two). A solve starts at order 1 with a small step and needs no other
    method; the controller "order" raises both.

    Args:
        max_order: the largest order used, 1 to 12.
    """

    _: KW_ONLY
    max_order: int = HIGHEST_ORDER

    name: ClassVar[str] = "abm"  # type: ignore[misc]
    error_order: ClassVar[int | None] = 2  # type: ignore[misc]
    reference: ClassVar[str] = "Hairer, Nørsett & Wanner I, III.5 and III.7; Shampine & Gordon 1975"  # type: ignore[misc]
    one_step: ClassVar[bool] = False
    variable_order: ClassVar[bool] = True
    controller: ClassVar[str] = "order"

    def __post_init__(self) -> None:
        _check_order("max_order", self.max_order)

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.max_order

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> VariableState:
        work, depth, zero = Workspace(y0, f0), self.max_order - 1, torch.zeros_like(y0)
        if field.layout.joint:
            return VariableState((zero,), (), 0, 1, self.max_order, work)
        steps, count = _no_history(dt, depth)
        return VariableState((zero,) * (depth + 1), steps, count, count + 1, self.max_order, work)

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: VariableState, active: Any) -> StepOut:
        layout, k = field.layout, state.order
        slope, calls = state.work.slope(field, t0, y0)
        s = distances(dt, state.steps)
        g = integrals(s)
        beta, weights = _vectors(layout, s, g, dt, state, y0)
        # Phi_j = f - (what degree j - 1 had foreseen), then Phi*_j = beta_j Phi_j and their running sums (HNW 5.9).
        stars = (slope - torch.stack(state.foreseen)) * beta
        foreseen = stars.cumsum(0)
        p = _advance(layout, y0, weights, stars)
        differences, place, exists = _differences(layout, field(field.time(t0 + dt), p), foreseen, state)
        latest = differences[place]
        y1 = _add(p, layout.spread(dt * _pick(g, k)), latest)
        dense = AdamsDense(layout, dt, y0, state.steps, (stars, latest), "divided", k)
        error = VariableError(differences, exists, dt, g, k)
        return StepOut(y1, error, dense, self._following(state, foreseen, dt), calls + 1)

    def _following(self, state: VariableState, foreseen: Tensor, dt: Any) -> VariableState:
        depth = self.max_order - 1
        # More than the next order can use is not carried along.
        if isinstance(state.order, int):
            depth = count = min(state.count + 1, state.order + 1, depth)
        else:
            count = torch.minimum(state.count, state.order).add(1).clamp(max=depth)
        kept = (state.foreseen[0], *foreseen[:depth].unbind(0))
        return state._replace(foreseen=kept, steps=(dt, *state.steps)[:depth], count=count)

    def ratio(self, norm: Any, y0: Tensor, out: StepOut) -> Any:
        differences, exists, dt, g, k = out.error
        scaled = differences.detach() / norm.scale(y0, out.y1)
        if isinstance(k, int):
            sizes = iter(_sizes(norm, scaled))
            orders = zip((k - 1, k, k + 1), exists)
            return tuple(abs(float(dt * (g[j] - g[j - 1]))) * next(sizes) if there else math.inf for j, there in orders)
        # Indices that the masks rule out must still find a number.
        change = torch.cat([torch.zeros_like(g[:1]), g.diff(dim=0), torch.zeros_like(g[:1])])
        factors = [(dt * _pick(change, j)).abs() for j in (k - 1, k, k + 1)]
        ratios = [norm.measure(x) * factor for x, factor in zip(scaled.unbind(0), factors)]
        return tuple(torch.where(there, r, torch.inf) for there, r in zip(exists, ratios))

    def interpolate(self, dense: AdamsDense, theta: Tensor, derivative: int = 0) -> Tensor:
        return _interpolate(dense, theta, derivative)


def _vectors(layout: Any, s: Any, g: Any, dt: Any, state: VariableState, y0: Tensor) -> tuple[Tensor, Tensor]:
    """beta_j, ``(K, ..)`` to multiply differences with, and dt g_j for j < k in the same form (joint mode: ``(k,)``)."""
    k, beta = state.order, continuation(s)
    if not isinstance(dt, Tensor):
        both = _on_device(beta + [dt * x for x in g[:k]], y0)
        return both[: len(beta)].unsqueeze(1), both[len(beta) :]
    if layout.joint:
        return beta.to(y0.dtype).unsqueeze(1), (dt * g[:k]).to(y0.dtype)
    number = torch.arange(len(s), device=s.device).unsqueeze(1)
    # Differences that have no history yet stay 0.
    beta = torch.where(number <= state.count, beta, 0.0)
    return layout.spread(beta), layout.spread(torch.where(number < k, dt * g[:-1], 0.0))


def _on_device(values: list[float], like: Tensor) -> Tensor:
    if like.device.type == "cpu":
        return torch.tensor(values, dtype=like.dtype)
    # From pinned memory, so that nobody waits for the copy.
    return torch.tensor(values, dtype=like.dtype, pin_memory=True).to(like.device, non_blocking=True)


def _advance(layout: Any, y0: Tensor, weights: Tensor, stars: Tensor) -> Tensor:
    """y0 + sum_j weights_j stars_j."""
    if layout.joint:
        return torch.addmv(y0, stars[: len(weights)].t(), weights)
    # A running sum adds in the same order whatever the shape.
    return y0 + (weights * stars).cumsum(0)[-1]


def _differences(layout: Any, f1: Tensor, foreseen: Tensor, state: VariableState) -> tuple[Tensor, int, tuple]:
    """Phi_{k-1}, Phi_k, Phi_{k+1} at the new point, the place of Phi_k among them, and which of them are known.

    All are made with the prediction's f, also the last, which is good enough to choose an order by.
    """
    k = state.order
    below, above = k > 1, (k <= state.count) & (k < state.highest)
    if isinstance(k, int):
        return f1 - foreseen[k - 1 - below : k + above], int(below), (below, True, above)
    rows = torch.stack([k - 2, k - 1, k]).clamp(0, len(foreseen) - 1)
    index = layout.per_row(rows).unsqueeze(-1).expand(3, *f1.shape)
    return f1 - foreseen.gather(0, index), 1, (below, torch.ones_like(below), above)


def _pick(values: Any, index: Any) -> Any:
    """values[index]; in the batched modes ``values`` is ``(K, B)`` and every sample has its own index."""
    return values[index] if isinstance(index, int) else values.gather(0, index.unsqueeze(0))[0]


def _sizes(norm: Any, scaled: Tensor) -> list[float]:
    """Error norms of the rows of ``scaled``, joint mode, with a single read from the device."""
    layout = norm.layout
    if norm.custom is not None:
        return [norm.measure(x) for x in scaled.unbind(0)]
    parts = [scaled] if layout.single else scaled.split(layout.sizes, dim=1)
    sizes = [torch.linalg.vector_norm(part, dim=1) / max(part.shape[1], 1) ** 0.5 for part in parts]
    found: list[float] = (sizes[0] if layout.single else torch.stack(sizes).amax(0)).tolist()
    return found


# -- dense output -----------------------------------------------------------------------------------------------------


def _rows(dense: AdamsDense, s: Tensor) -> Tensor:
    """The derivatives of w_i, in powers of u = theta: ``(values, powers, ...)``."""
    N = basis(s)
    number = torch.arange(len(N), device=s.device).reshape((-1,) + (1,) * s.dim())
    taken = (number < dense.nodes).to(s.dtype)
    if dense.kind == "explicit":
        return _of_slopes(s, N * taken)
    last = torch.where(number == dense.nodes, N, 0.0).cumsum(0)[-1:]
    if dense.kind == "divided":
        return torch.cat([(N * taken)[:-1], last])
    return torch.cat([_of_slopes(s, (N - last) * taken), last])


def _of_slopes(s: Tensor, rows: Tensor) -> Tensor:
    """Factors of the differences as factors of the f's that these are made of."""
    return (differences(s).unsqueeze(2) * rows[:-1]).cumsum(1)[:, -1]


def _interpolate(dense: AdamsDense, theta: Tensor, derivative: int) -> Tensor:
    """The integral of the step's own polynomial: continuous, of the order of the formula; calls no f."""
    layout, dt, values = dense.layout, dense.dt, dense.values
    if dense.kind == "divided":
        values = (*values[0].unbind(0), values[1])
    s = distances(dt, dense.steps)
    s = s if isinstance(s, Tensor) else theta.new_tensor(s)
    # Backward Euler has no past at all: its polynomial is f at the new point.
    rows = torch.ones_like(s[None, :1]) if dense.kind == "implicit" and len(values) == 1 else _rows(dense, s)
    # Resting samples (dt = 0) have no use for a derivative, but must not divide by 0.
    unit = torch.where(dt == 0, 1.0, dt) if derivative > 1 and isinstance(dt, Tensor) else dt
    weights = evaluate(rows, theta, derivative) * unit ** (1 - derivative)
    if layout.joint:
        result = weights.to(layout.dtype).T @ torch.stack(values)
        return dense.y0 + result if derivative == 0 else result
    return _combine(layout, dense.y0 if derivative == 0 else torch.zeros_like(dense.y0), weights, values)


METHODS.register("explicit_adams", ExplicitAdams())
METHODS.register("implicit_adams", ImplicitAdams())
METHODS.register("abm", VariableAdams())
