"""Adams methods on the grid as it is: of fixed order with constant or given steps, and of variable step and order.

No formula here assumes equal steps: coefficients come from the past nodes (``adams_weights``), so clipped last steps, forced
nodes and grids given by the user keep the order.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import KW_ONLY, dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

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
    weigh,
)
from .base import METHODS, Method, StepOut
from .tableau import Tableau

HIGHEST_ORDER = 12

MOST_CORRECTIONS = 50
"""Corrections after which an iterated corrector without a limit of its own is given up."""


class Workspace:
    """f at the last point where it was asked for: a rejected step and the start of a solve need not ask again.

    Results do not depend on it. Valid only for the very same tensor y, in the same autograd mode.
    """

    __slots__ = ("f", "grad", "y")

    def __init__(self, y: Tensor, f: Tensor | None) -> None:
        self.y = None if f is None else y
        self._store(f)

    def _store(self, f: Any) -> None:
        self.grad = torch.is_grad_enabled()
        # f may answer in the same memory every time, and a history must outlive that.
        self.f = f if f is None or self.grad else f.clone()

    def slope(self, field: Any, t: Any, y: Tensor) -> tuple[Tensor, int]:
        """f(t, y), and the calls of f that took."""
        if self.y is y and self.grad == torch.is_grad_enabled():
            return self.f, 0
        self._store(field(field.time(t), y))
        self.y = y
        return self.f, 1


class AdamsState(NamedTuple):
    """History, newest first.

    slopes: f at t_{n-1}, t_{n-2}, .. (fixed order), or Phi*_0, Phi*_1, .. of the step before (variable order). steps:
    t_n - t_{n-1}, t_{n-1} - t_{n-2}, ... count: how many of them there are, int or ``(B,)``; in the batched modes all
    tuples have their full length from the start, with harmless numbers behind the first ``count``. order: of the next
    step (int or ``(B,)``), with ``highest`` the largest allowed. settled: nobody lacks history any more.
    """

    slopes: tuple[Tensor, ...]
    steps: tuple[Any, ...]
    count: Any
    work: Workspace
    order: Any = None
    highest: int = HIGHEST_ORDER
    settled: bool = False


class AdamsError(NamedTuple):
    """Errors of the formulas of orders k - 1, k, k + 1: ``factors`` times ``differences``, in units of y.

    dt (g_j - g_{j-1}) Phi_j for j = k - 1, k, k + 1 (HNW III.7). What needs more history than there is, is None (joint) or
    false in ``exists``.
    """

    differences: tuple[Any, Any, Any]
    factors: list[Any]
    exists: Any = None


class AdamsDense(NamedTuple):
    """y(t_n + theta dt) = y0 + dt sum_i values_i w_i(theta).

    kind: "explicit" or "implicit": values are f's, the last one (implicit) that at the new point; "divided": values are
    Phi*_0 .., and last Phi_k with the prediction's f. nodes: how many past values the polynomial takes, int or ``(B,)``.
    start: the dense data of a start step (None without one), for the samples in ``starting``.
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


def _first_state(
    field: Any, dt: Any, y0: Tensor, f0: Tensor | None, depth: int, order: int | None = None, highest: int = HIGHEST_ORDER
) -> AdamsState:
    work = Workspace(y0, f0)
    if field.layout.joint:
        return AdamsState((), (), 0, work, order, highest)
    nothing, step = torch.zeros_like(y0), torch.where(dt.detach() < 0, -1.0, 1.0).to(torch.float64)
    count = torch.zeros_like(dt, dtype=torch.int64)
    orders = None if order is None else torch.full_like(count, order)
    return AdamsState((nothing,) * depth, (step,) * depth, count, work, orders, highest)


def _coefficients(layout: Any, values: Any) -> Any:
    """A list of floats as it is; ``(K,)`` or ``(K, B)`` as K tensors broadcastable to the state."""
    return layout.spread(values).unbind(0) if isinstance(values, Tensor) else values


def _add(y: Tensor, coefficient: Any, x: Tensor) -> Tensor:
    if isinstance(coefficient, Tensor):
        return torch.addcmul(y, coefficient, x)
    return torch.add(y, x, alpha=coefficient)


def _combine(layout: Any, y: Tensor, weights: Any, tensors: tuple[Tensor, ...]) -> Tensor:
    """y + sum_i weights_i tensors_i, in one order of additions."""
    for weight, tensor in zip(_coefficients(layout, weights), tensors):
        y = _add(y, weight, tensor)
    return y


# -- fixed order ------------------------------------------------------------------------------------------------------


def extrapolated_midpoint(order: int) -> Tableau:
    """The explicit Runge-Kutta method of even ``order`` that extrapolates Gragg's midpoint rule.

    n = 2, 4, .., ``order`` substeps; the result of each has an expansion in 1/n^2, of which ``order / 2`` results remove as
    many terms (HNW II.9, without the smoothing step: for even n it is not needed for the order).
    """
    sequence = range(2, order + 1, 2)
    c, a = [0.0], [()]
    b: dict[int, float] = {}
    for n in sequence:
        share = math.prod(n * n / (n * n - m * m) for m in sequence if m != n)
        before: dict[int, float] = {}
        here = {0: 1.0 / n}
        for i in range(1, n):
            stage = len(c)
            c.append(i / n)
            a.append(tuple(here.get(j, 0.0) for j in range(stage)))  # type: ignore[arg-type]
            before, here = here, {**before, stage: 2.0 / n}
        for stage, weight in here.items():
            b[stage] = b.get(stage, 0.0) + share * weight
    row = tuple(b.get(stage, 0.0) for stage in range(len(c)))
    return Tableau(f"extrapolated_midpoint_{order}", order, tuple(c), tuple(a), row, "HNW II.9")


@cache
def start_method(order: int) -> Method:
    """The Runge-Kutta method of at least ``order`` that makes the first ``order - 1`` steps."""
    for least, name in ((4, "rk4_classic"), (5, "dopri5"), (8, "dop853")):
        if order <= least:
            return METHODS[name]
    any_tableau: Any = METHODS["rk4_classic"]
    return dataclasses.replace(any_tableau, tableau=extrapolated_midpoint(order + order % 2))


@dataclass(frozen=True)
class _FixedOrder(Method):
    """What both families share: the history, and a start that keeps the order.

    The first ``order - 1`` steps are those of a Runge-Kutta method: ``rk4_classic`` through order 4, ``dopri5`` at 5,
    ``dop853`` through 8, and the extrapolated midpoint rule of order 10 or 12 above. In the batched modes samples start
    when they must; a sample that needs no start is not touched by it.
    """

    _: KW_ONLY
    order: int = 4

    one_step: ClassVar[bool] = False
    error_order: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        if not isinstance(self.order, int) or not 1 <= self.order <= HIGHEST_ORDER:
            raise ArgumentError(f"order of {self.name!r} must be an integer from 1 to {HIGHEST_ORDER}, found {self.order!r}")

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> AdamsState:
        return _first_state(field, dt, y0, f0, self.order - 1)

    def formula(self, field: Any, t0: Any, dt: Any, y0: Tensor, past: Any, steps: Any, active: Any) -> StepOut:
        """One step where the history is complete; ``past``: f at t_n, t_{n-1}, ... ``state`` of the result is not used."""
        raise NotImplementedError

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: AdamsState, active: Any) -> StepOut:
        slope, calls = state.work.slope(field, t0, y0)
        past = (slope, *state.slopes)
        starting, settled = self._starting(state, active)
        if starting is False:
            out = self.formula(field, t0, dt, y0, past, state.steps, active)
        else:
            out = self._start(field, t0, dt, y0, past, state.steps, active, starting)
        return out._replace(state=self._following(state, past, dt, settled), work=out.work + calls)

    def _starting(self, state: AdamsState, active: Any) -> tuple[Any, bool]:
        """Who lacks history (True, False or a mask), and whether nobody ever will again. Reads only while some may."""
        needed = self.order - 1
        if not isinstance(state.count, Tensor):
            return state.count < needed, False
        if state.settled or needed == 0:
            return False, True
        starting = state.count < needed
        some, others = torch.stack([starting & active, ~starting & active]).any(1).tolist()
        return (starting if others else True) if some else False, not some

    def _start(self, field, t0, dt, y0, past, steps, active, starting) -> StepOut:
        method, layout = start_method(self.order), field.layout
        h = dt if starting is True else torch.where(starting, dt, 0.0)
        first = method.step(field, t0, h, y0, method.init(field, t0, h, y0, past[0]), active)
        if starting is True:
            dense = AdamsDense(layout, dt, y0, (), (), "explicit", 0, first.dense, True)
            return StepOut(first.y1, None, dense, None, first.work)
        out = self.formula(field, t0, dt, y0, past, steps, active & ~starting)
        y1 = torch.where(layout.spread(starting), first.y1, out.y1)
        return out._replace(
            y1=y1, dense=out.dense._replace(start=first.dense, starting=starting), work=out.work + first.work
        )

    def _following(self, state: AdamsState, past: tuple[Tensor, ...], dt: Any, settled: bool) -> AdamsState:
        depth = self.order - 1
        count = min(state.count + 1, depth) if isinstance(state.count, int) else (state.count + 1).clamp(max=depth)
        return state._replace(
            slopes=past[:depth], steps=(dt, *state.steps)[:depth], count=count, settled=settled
        )

    def prepare(self, field: Any, dense: AdamsDense) -> tuple[AdamsDense, int]:
        if dense.start is None:
            return dense, 0
        start, calls = start_method(self.order).prepare(field, dense.start)
        return dense._replace(start=start), calls

    def snapshot(self, dense: AdamsDense) -> AdamsDense:
        dense = _snapshot(dense)
        if dense.start is None:
            return dense
        return dense._replace(start=start_method(self.order).snapshot(dense.start))

    def interpolate(self, dense: AdamsDense, theta: Tensor, derivative: int = 0) -> Tensor:
        if dense.start is None:
            return _interpolate(dense, theta, derivative)
        first = start_method(self.order).interpolate(dense.start, theta, derivative)
        if dense.starting is True:
            return first
        return torch.where(dense.layout.spread(dense.starting), first, _interpolate(dense, theta, derivative))


@dataclass(frozen=True)
class ExplicitAdams(_FixedOrder):
    """y1 = y0 + integral over the step of the polynomial through the last ``order`` values of f (Adams-Bashforth).

    One evaluation a step. HNW III.1 (1.5) for equal steps, III.5 for any.

    Args:
        order: 1 to 12.
    """

    name: ClassVar[str] = "explicit_adams"
    reference: ClassVar[str] = "Bashforth & Adams 1883; Hairer, Nørsett & Wanner I, III.1 and III.5"

    def formula(self, field: Any, t0: Any, dt: Any, y0: Tensor, past: Any, steps: Any, active: Any) -> StepOut:
        y1 = _combine(field.layout, y0, explicit_weights(dt, steps), past)
        return StepOut(y1, None, AdamsDense(field.layout, dt, y0, steps, past, "explicit", self.order), None, 0)


@dataclass(frozen=True)
class ImplicitAdams(_FixedOrder):
    """Adams-Moulton of ``order`` as P(EC)^m E: prediction by Adams-Bashforth of the same order, m corrections.

    HNW III.1 for equal steps, III.5 for any. The predictor is of the corrector's order, as in the classical pairs and in
    GRAND's AM4 (Chamberlain et al. 2021, eq. 9), not of one less as in HNW III.1: so the error is the corrector's own (at
    order 4 the stability limit on the real axis is then 1.28). The last evaluation is the first of the next step, so PECE
    costs two evaluations a step.

    Args:
        order: 1 to 12.
        max_corrections: m; None: 1, or 50 with ``corrector_tol``.
        corrector_tol: stop correcting when the change is at most this in the error norm (units of the tolerance); a step in
            which that takes more than ``max_corrections`` fails with ``INNER_NOT_CONVERGED``. None: correct m times.
    """

    _: KW_ONLY
    max_corrections: int | None = None
    corrector_tol: float | None = None

    name: ClassVar[str] = "implicit_adams"
    reference: ClassVar[str] = "Moulton 1926; Hairer, Nørsett & Wanner I, III.1 and III.5"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_corrections is not None and not (isinstance(self.max_corrections, int) and self.max_corrections >= 1):
            raise ArgumentError(f"max_corrections must be an integer >= 1, found {self.max_corrections!r}")
        if self.corrector_tol is not None and not self.corrector_tol > 0:
            raise ArgumentError(f"corrector_tol must be positive, found {self.corrector_tol!r}")

    def formula(self, field: Any, t0: Any, dt: Any, y0: Tensor, past: Any, steps: Any, active: Any) -> StepOut:
        layout, nodes = field.layout, self.order - 1
        guess = _combine(layout, y0, explicit_weights(dt, steps), past)
        if nodes:
            weights, own = implicit_weights(dt, steps[: nodes - 1])
            base = _combine(layout, y0, weights, past)
        else:
            base, own = y0, dt
        (t1,) = field.times(t0, dt, (1.0,))
        own = layout.spread(own)
        if self.corrector_tol is None:
            y1, slope, calls, status = guess, None, self.max_corrections or 1, None
            for _ in range(calls):
                slope = field(t1, y1)
                y1 = _add(base, own, slope)
        else:
            y1, slope, calls, status = self._iterate(field, t1, guess, base, own, active)
        values = (*past[:nodes], slope)
        dense = AdamsDense(layout, dt, y0, steps[: max(nodes - 1, 0)], values, "implicit", nodes)
        return StepOut(y1, None, dense, None, calls, status)

    def _iterate(self, field, t1, y, base, own, active) -> tuple[Tensor, Any, int, Any]:
        """Corrections until the change is small, each sample for itself: (y, f that it came from, calls of f, status)."""
        layout, ops, most = field.layout, field.layout.ops, self.max_corrections or MOST_CORRECTIONS
        with torch.no_grad():
            scale = field.norm.scale(y)
        slope, moving, sound = None, active, None
        for calls in range(1, most + 1):
            f = field(t1, y)
            following = _add(base, own, f)
            if layout.joint or slope is None:
                slope = f
            else:
                wide = layout.spread(moving)
                slope, following = torch.where(wide, f, slope), torch.where(wide, following, y)
            with torch.no_grad():
                change = field.norm(following - y, scale)
                # A first change that is not finite means that f is not: that is no failure of the iteration.
                sound = ops.isfinite(change) if sound is None else sound
            moving = moving & ops.invert(change <= self.corrector_tol) & sound
            y = following
            if not (moving if layout.joint else bool(moving.any())):
                break
        if layout.joint:
            return y, slope, calls, Status.INNER_NOT_CONVERGED if moving else None
        return y, slope, calls, torch.where(moving, int(Status.INNER_NOT_CONVERGED), 0).to(torch.int8)


# -- dense output -----------------------------------------------------------------------------------------------------


def _snapshot(dense: AdamsDense) -> AdamsDense:
    if dense.kind == "explicit" or torch.is_grad_enabled():
        return dense
    # The last value is f's own answer, which may lie in memory that f uses again.
    return dense._replace(values=(*dense.values[:-1], dense.values[-1].clone()))


def _rows(dense: AdamsDense, s: Tensor) -> Tensor:
    """w_i' of each of the values, in powers of u: ``(values, powers, ...)``."""
    N = basis(s)
    number = torch.arange(len(N), device=s.device).reshape((-1,) + (1,) * s.dim())
    taken = N * (number < dense.nodes)
    if dense.kind == "explicit":
        rows = (differences(s).unsqueeze(2) * taken[:-1]).cumsum(1)[:, -1]
        return rows
    last = torch.where(number == dense.nodes, N, 0.0).cumsum(0)[-1:]
    if dense.kind == "divided":
        return torch.cat([taken[:-1], last])
    taken = taken - last * (number < dense.nodes)
    return torch.cat([(differences(s).unsqueeze(2) * taken[:-1]).cumsum(1)[:, -1], last])


def _interpolate(dense: AdamsDense, theta: Tensor, derivative: int) -> Tensor:
    """The integral of the step's own polynomial: continuous, of the order of the formula; calls no f."""
    layout, dt, values = dense.layout, dense.dt, dense.values
    if dense.kind == "implicit" and dense.nodes == 0:
        rows = theta.new_ones((1, 1, *theta.shape[1:]))
    else:
        s = distances(dt, dense.steps)
        rows = _rows(dense, s if isinstance(s, Tensor) else theta.new_tensor(s))
    if isinstance(dt, Tensor):
        unit = torch.where(dt == 0, 1.0, dt) if derivative > 1 and dt.dim() else dt
        weights = evaluate(rows, theta, derivative) * unit ** (1 - derivative)
    else:
        weights = evaluate(rows, theta, derivative) * dt ** (1 - derivative)
    if layout.joint:
        result = weights.to(layout.dtype).T @ torch.stack(values)
        return dense.y0 + result if derivative == 0 else result
    result = dense.y0 if derivative == 0 else torch.zeros_like(dense.y0)
    return _combine(layout, result, weights, values)


# -- variable step and order ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VariableAdams(Method):
    """Adams in PECE form with variable step and order (HNW III.5 and III.7; Shampine & Gordon 1975).

    At order k: prediction p = y0 + dt sum_{j<k} g_j Phi*_j, evaluation, correction y1 = p + dt g_k Phi_k with
    Phi_k = f(t1, p) - sum_{j<k} Phi*_j, which is the Adams-Moulton formula of order k + 1; its difference to that of order
    k is the error estimate (HNW III.7), so the better result is carried on (local extrapolation). Two evaluations per
    accepted step and one per rejected one. A solve starts at order 1 with a small step and needs no other method; the
    controller ("order") raises both.

    Args:
        max_order: the largest order used, 1 to 12.
    """

    _: KW_ONLY
    max_order: int = HIGHEST_ORDER

    name: ClassVar[str] = "abm"
    error_order: ClassVar[int | None] = 2
    reference: ClassVar[str] = "Hairer, Nørsett & Wanner I, III.5 and III.7; Shampine & Gordon 1975"
    one_step: ClassVar[bool] = False
    variable_order: ClassVar[bool] = True
    controller: ClassVar[str] = "order"

    def __post_init__(self) -> None:
        if not isinstance(self.max_order, int) or not 1 <= self.max_order <= HIGHEST_ORDER:
            raise ArgumentError(f"max_order must be an integer from 1 to {HIGHEST_ORDER}, found {self.max_order!r}")

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.max_order

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> AdamsState:
        return _first_state(field, dt, y0, f0, self.max_order - 1, 1, self.max_order)

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: AdamsState, active: Any) -> StepOut:
        layout, k = field.layout, state.order
        slope, calls = state.work.slope(field, t0, y0)
        s = distances(dt, state.steps)
        g = integrals(s)
        stars = self._continued(layout, slope, state, s)
        scale, masks = _selected(g, dt, k)
        p = _combine(layout, y0, scale, stars)
        known = _combine(layout, torch.zeros_like(y0), masks, stars)
        (t1,) = field.times(t0, dt, (1.0,))
        latest = field(t1, p) - known
        y1 = _add(p, layout.spread(dt * _pick(g, k)), latest)
        with torch.no_grad():
            error = self._errors(layout, dt, g, stars, latest, state)
        dense = AdamsDense(layout, dt, y0, state.steps, (*stars, latest), "divided", k)
        return StepOut(y1, error, dense, self._following(state, stars, dt), calls + 1)

    def _continued(self, layout: Any, slope: Tensor, state: AdamsState, s: Any) -> tuple[Tensor, ...]:
        """Phi*_0 .. Phi*_count at this point (HNW 5.9)."""
        beta = continuation(s)
        if isinstance(beta, Tensor) and not layout.joint:
            # Differences that have no history yet stay 0.
            number = torch.arange(len(s), device=s.device).unsqueeze(1)
            beta = torch.where(number <= state.count, beta, 0.0)
        phi, stars = slope, [slope]
        for factor, before in zip(_coefficients(layout, beta)[1:], state.slopes):
            phi = phi - before
            stars.append(phi if isinstance(factor, float) and factor == 1.0 else phi * factor)
        return tuple(stars)

    def _errors(self, layout: Any, dt: Any, g: Any, stars: Any, latest: Tensor, state: AdamsState) -> AdamsError:
        k, spread = state.order, layout.spread
        if isinstance(k, int):
            low = latest + stars[k - 1] if k > 1 else None
            # A difference with the prediction's f in it: good enough to choose an order by.
            high = latest - stars[k] if k <= state.count and k < state.highest else None
            factors = [dt * (g[j] - g[j - 1]) if 0 < j < len(g) else 0.0 for j in (k - 1, k, k + 1)]
            return AdamsError((low, latest, high), factors)
        stack, last = torch.stack(stars), len(stars) - 1
        low = latest + _pick(stack, layout.per_row(k - 1))
        high = latest - _pick(stack, layout.per_row(k.clamp(max=last)))
        jumps = torch.cat([torch.zeros_like(g[:1]), g[1:] - g[:-1], torch.zeros_like(g[:1])])
        factors = [dt * _pick(jumps, j) for j in (k - 1, k, k + 1)]
        exists = (k > 1, None, (k <= state.count) & (k < state.highest))
        return AdamsError((low, latest, high), factors, exists)

    def _following(self, state: AdamsState, stars: tuple[Tensor, ...], dt: Any) -> AdamsState:
        depth = self.max_order - 1
        if isinstance(state.order, int):
            kept = depth = min(state.count + 1, state.order + 1, depth)
        else:
            kept = torch.minimum(state.count + 1, state.order + 1).clamp(max=depth)
        return state._replace(slopes=stars[:depth], steps=(dt, *state.steps)[:depth], count=kept)

    def ratio(self, norm: Any, y0: Tensor, out: StepOut) -> Any:
        scale = norm.scale(y0, out.y1)
        differences, factors, exists = out.error
        if exists is None:
            known = [phi.detach() for phi in differences if phi is not None]
            sizes = iter(_sizes(norm, known, scale))
            return tuple(
                math.inf if phi is None else abs(float(factor)) * next(sizes) for phi, factor in zip(differences, factors)
            )
        ratios = [norm(phi, scale) * factor.abs() for phi, factor in zip(differences, factors)]
        return tuple(r if e is None else torch.where(e, r, torch.inf) for r, e in zip(ratios, exists))

    def snapshot(self, dense: AdamsDense) -> AdamsDense:
        return dense

    def interpolate(self, dense: AdamsDense, theta: Tensor, derivative: int = 0) -> Tensor:
        return _interpolate(dense, theta, derivative)


def _selected(g: Any, dt: Any, k: Any) -> tuple[Any, Any]:
    """(dt g_j, 1) for j < k and 0 beyond: lists of length k, or ``(K, ...)``."""
    if not isinstance(g, Tensor):
        return [dt * x for x in g[:k]], [1.0] * k
    number = torch.arange(len(g) - 1, device=g.device).reshape((-1,) + (1,) * (g.dim() - 1))
    mask = (number < k).to(g.dtype).expand(-1, *g.shape[1:])
    return dt * g[:-1] * mask, mask


def _pick(values: Any, index: Any) -> Any:
    """values[index], with one index for each sample in the batched modes (``values``: ``(K, B)`` or ``(K, R, M)``)."""
    if isinstance(index, int):
        return values[index]
    where = index.reshape((1, -1) + (1,) * (values.dim() - 2)).expand(1, *values.shape[1:])
    return values.gather(0, where)[0]


def _sizes(norm: Any, tensors: list[Tensor], scale: Tensor) -> list[float]:
    """Error norms of several tensors, joint mode, with a single read from the device."""
    layout = norm.layout
    if norm.custom is not None:
        return [norm(x, scale) for x in tensors]
    scaled = torch.stack(tensors) / scale
    parts = [scaled] if layout.single else scaled.split(layout.sizes, dim=1)
    sizes = [torch.linalg.vector_norm(part, dim=1) / math.sqrt(max(part.shape[1], 1)) for part in parts]
    found: list[float] = (sizes[0] if layout.single else torch.stack(sizes).amax(0)).tolist()
    return found


METHODS.register("explicit_adams", ExplicitAdams())
METHODS.register("implicit_adams", ImplicitAdams())
METHODS.register("abm", VariableAdams())
