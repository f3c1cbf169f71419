"""Stabilised explicit methods: more stages instead of smaller steps, for stiff fields with a nearly real spectrum."""

from __future__ import annotations

import functools
import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..optim import Point, ProximalProblem
from ..optim.linesearch import PowerMemory, spectral_radius
from ..status import ArgumentError, Status
from .base import METHODS, Method, StepOut

HERMITE = ((0.0, 0.0, 3.0, -2.0), (0.0, 1.0, -2.0, 1.0), (0.0, 0.0, -1.0, 1.0))
"""Coefficients in theta of the cubic's weights: of y1 - y0, dt f0 and dt f1."""
SHORTER = 0.5
"""A step offered below this share of the last one follows a rejection, or an output: the spectrum is looked at again."""


SAFETY = 0.9
"""The controllers' own."""
FAILED = 1.01
"""An error that no controller accepts."""


class StabilisedState(NamedTuple):
    """f at the start; the last step's size (0: none yet); the power method's memory (detached)."""

    f0: Tensor
    dt: Any
    memory: PowerMemory


class StabilisedError(NamedTuple):
    """Estimate of the local error (units of y), and the step's length in units of the longest that the stages allow."""

    error: Tensor
    share: Any


class StabilisedDense(NamedTuple):
    layout: Any
    dt: Any
    y0: Tensor
    y1: Tensor
    f0: Tensor
    f1: Tensor


@dataclass(frozen=True)
class RKC2(Method):
    """Runge–Kutta–Chebyshev method of second order with as many stages as dt times the spectral radius asks for.

    s stages are stable for dt |lambda| up to 0.65 s**2 along the negative real axis, so that the cost grows with the root of
    the stiffness; near the imaginary axis it is no better than other explicit methods. Each sample of a batch has its own
    number of stages. The spectral radius of df/dy comes from a nonlinear power method begun where it last ended, every
    25 steps and whenever the step size has been cut, unless f has a method ``spectral_bound``; it is a constant to gradients.

    Working memory: 8 states, 2 of them kept per step where gradients are replayed. Calls of f a step: one per stage,
    and those of the power method; in a batch as many as the sample with the most stages needs.

    Adaptive steps stay below the length at which the rounding errors of the stages, about s**2 eps / 10, reach rtol.

    ``max_stages``: a step that would need more is rejected.
    """

    _: KW_ONLY
    max_stages: int = 20_000

    name: ClassVar[str] = "rkc2"  # type: ignore[misc]
    order: ClassVar[int] = 2  # type: ignore[misc]
    error_order: ClassVar[int | None] = 3  # type: ignore[misc]
    reference: ClassVar[str] = "Sommeijer, Shampine and Verwer 1998"  # type: ignore[misc]
    remedy: ClassVar[str] = "smaller steps or a larger max_stages="
    one_step: ClassVar[bool] = False
    reads_values: ClassVar[bool] = True
    graded_failure: ClassVar[bool] = True
    real_limit: ClassVar[float] = math.inf  # type: ignore[misc]

    def __post_init__(self) -> None:
        if not isinstance(self.max_stages, int) or self.max_stages < 2:
            raise ArgumentError(f"max_stages must be an integer >= 2, found {self.max_stages!r}")

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> StabilisedState:
        layout = field.layout
        none = 0.0 if layout.joint else torch.zeros(layout.batch, dtype=torch.float64, device=layout.device)
        if f0 is None:
            f0 = field(field.time(t0), y0)
        return StabilisedState(f0, none, PowerMemory.fresh(layout, y0.detach()))

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: StabilisedState, active: Any) -> StepOut:
        layout, size = field.layout, _number(dt)
        with torch.no_grad():
            rho, memory, work = _radius(field, _number(t0), size, y0.detach(), state, active)
            stages = _stages(layout, abs(size) * rho)
            low = stages <= self.max_stages
            stages = layout.ops.where(low, stages, 2)
        y1 = self._sweep(field, t0, dt, y0, state.f0, _Coefficients(layout, stages))
        f1 = field(field.times(t0, dt, (1.0,))[0], y1)
        work += int(stages if layout.joint else stages.max())
        with torch.no_grad():
            # Equation (2.11), the local error of the step up to the next order.
            estimate = 0.8 * (y0 - y1) + (0.4 * layout.spread(size)) * (state.f0 + f1)
            error = StabilisedError(estimate, abs(size) * rho / _longest(field.norm, y0.dtype, self.max_stages))
        dense = StabilisedDense(layout, dt, y0, y1, state.f0, f1)
        return StepOut(y1, error, dense, StabilisedState(f1, size, memory), work, _status(layout, low))

    def ratio(self, norm: Any, y0: Tensor, out: StepOut) -> Any:
        """The error; at least so much that the next step, too, stays below the longest one."""
        value = norm(out.error.error, norm.scale(y0, out.y1))
        ops, share = norm.layout.ops, out.error.share
        least = ops.where(share > 1, ops.maximum((SAFETY * share) ** 3, FAILED), (SAFETY * share) ** 3)
        return max(value, least) if norm.layout.joint else torch.maximum(value, least.to(value.dtype))

    def replay(
        self, field: Any, t0: Any, dt: Any, y0: Tensor, state: StabilisedState, active: Any, interior: bool
    ) -> StepOut:
        """The step with f at its start as a function of ``y0``: the stored one has no graph behind the first step."""
        out = self.step(field, t0, dt, y0, state._replace(f0=field(field.time(t0), y0)), active)
        return out._replace(work=out.work + 1)

    def _sweep(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor, table: _Coefficients) -> Tensor:
        """Equation (2.2): the three-term recursion over the stages."""
        wide = field.layout.spread(dt)
        _, _, first, _, _, _ = table.row(1)
        before, y = y0, _combine((y0, 1.0), (f0, wide * first))
        for j in range(2, table.most + 1):
            mu, nu, weight, gamma, node, live = table.row(j)
            f = field(field.time(t0 + dt * node), y)
            terms = (y, mu), (before, nu), (y0, 1.0 - mu - nu), (f, wide * weight), (f0, wide * gamma)
            new = _combine(*terms)
            before, y = y, new if live is None else torch.where(live, new, y)
        return y

    def interpolate(self, dense: StabilisedDense, theta: Tensor, derivative: int = 0) -> Tensor:
        layout, dt = dense.layout, _size(dense)
        theta = layout.spread(theta)
        if layout.joint:
            theta = theta.unsqueeze(-1)
        weights = [_polynomial(c, theta, derivative) for c in HERMITE]
        change = weights[0] * (dense.y1 - dense.y0) + dt * (weights[1] * dense.f0 + weights[2] * dense.f1)
        return dense.y0 + change if derivative == 0 else change * dt**-derivative


def _size(dense: StabilisedDense) -> Any:
    """The step's size broadcast to the state; 1 for samples that stand still."""
    dt = dense.layout.spread(dense.dt)
    if dense.layout.joint:
        return dt
    return torch.where(dt == 0, 1.0, dt)


def _polynomial(coefficients: tuple[float, ...], theta: Tensor, derivative: int) -> Tensor:
    for _ in range(derivative):
        coefficients = tuple(k * c for k, c in enumerate(coefficients))[1:]
    value = torch.zeros_like(theta)
    for c in reversed(coefficients):
        value = value * theta + c
    return value


def _combine(*terms: tuple[Tensor, Any]) -> Tensor:
    """sum of tensor times coefficient (number, or broadcastable tensor); in place only where nothing is recorded."""
    x, c = terms[0]
    total, recorded = x * c, torch.is_grad_enabled()
    for x, c in terms[1:]:
        out = None if recorded else total
        total = torch.addcmul(total, c, x, out=out) if isinstance(c, Tensor) else torch.add(total, x, alpha=c, out=out)
    return total


@functools.lru_cache(maxsize=2048)
def _rkc2(s: int) -> tuple[tuple[float, ...], ...]:
    """Rows (mu, nu, mu~, gamma~, c of the argument) for j = 0 .. s, equations (2.3) to (2.9)."""
    w0 = 1 + 2 / (13 * s * s)
    root = math.sqrt(w0 * w0 - 1)
    angle = s * math.log(w0 + root)
    w1 = math.sinh(angle) * root * root / (math.cosh(angle) * s * root - w0 * math.sinh(angle))
    b = [1 / (2 * w0) ** 2] * 2
    T, dT, ddT, c = [1.0, w0], [0.0, 1.0], [0.0, 0.0], [0.0, w1 * b[0]]
    rows = [(1.0, 0.0, 0.0, 0.0, 0.0), (1.0, 0.0, w1 * b[0], 0.0, 0.0)]
    for j in range(2, s + 1):
        T.append(2 * w0 * T[-1] - T[-2])
        dT.append(2 * w0 * dT[-1] - dT[-2] + 2 * T[j - 1])
        ddT.append(2 * w0 * ddT[-1] - ddT[-2] + 4 * dT[j - 1])
        b.append(ddT[j] / dT[j] ** 2)
        mu, nu = 2 * w0 * b[j] / b[j - 1], -b[j] / b[j - 2]
        weight, a = mu * w1 / w0, 1 - T[j - 1] * b[j - 1]
        rows.append((mu, nu, weight, -a * weight, c[j - 1]))
        c.append(mu * c[j - 1] + nu * c[j - 2] + weight * (1 - a))
    return tuple(rows)


class _Coefficients:
    """The recursion's coefficients: numbers in joint mode, else a column for each sample's own number of stages."""

    def __init__(self, layout: Any, stages: Any) -> None:
        self.layout, self.stages = layout, stages
        if layout.joint:
            self.most, self.rows = stages, _rkc2(stages)
            return
        counts = stages.tolist()
        self.most = max(counts)
        kinds = {s: i for i, s in enumerate(sorted(set(counts)))}
        table = torch.zeros(len(kinds), self.most + 1, 5, dtype=torch.float64)
        for s, i in kinds.items():
            table[i, : s + 1] = torch.tensor(_rkc2(s), dtype=torch.float64)
        which = torch.tensor([kinds[s] for s in counts], device=layout.device)
        self.table = table.to(layout.device)[which]

    def row(self, j: int) -> tuple[Any, ...]:
        """mu, nu, mu~, gamma~ broadcastable to the state, the time of the argument in steps, and which samples still
        have a stage ``j`` (None: all)."""
        if self.layout.joint:
            return (*self.rows[j], None)
        spread, columns = self.layout.spread, self.table[:, j].unbind(1)
        return (*(spread(c) for c in columns[:4]), columns[4], spread(self.stages >= j))


def _radius(
    field: Any, t0: Any, dt: Any, y0: Tensor, state: StabilisedState, active: Any
) -> tuple[Any, PowerMemory, int]:
    """Upper estimate of the spectral radius of df/dy at the start, the memory after it and the calls of f it took."""
    ops, memory = field.layout.ops, state.memory
    bound = field.spectral_bound()
    if bound is not None:
        return bound, memory, 0
    memory = memory._replace(age=ops.where(abs(dt) < SHORTER * abs(state.dt), 0, memory.age))
    problem = ProximalProblem(field, field.time(t0), y0, dt, field.norm, field.norm.scale(y0))
    f0 = state.f0.detach()
    rho, memory = spectral_radius(problem, Point(y0, -problem.wide * f0, f0), active, memory)
    return rho, memory, problem.calls


def _longest(norm: Any, dtype: torch.dtype, most: int) -> float:
    """dt rho at which ``most`` stages are needed, or rounding reaches the relative tolerance."""
    rtol = float(norm.rtol.min()) if isinstance(norm.rtol, Tensor) else norm.rtol
    return (min(most**2, max(4.0, 10 * rtol / torch.finfo(dtype).eps)) - 1) / 1.54


def _stages(layout: Any, z: Any) -> Any:
    """Smallest number of stages that is stable for dt rho = ``z``, at least 2; int or ``(B,)`` int64."""
    if layout.joint:
        return max(2, math.ceil(math.sqrt(1 + 1.54 * z))) if math.isfinite(z) else 2
    return torch.ceil((1 + 1.54 * z.nan_to_num(0.0, 0.0)).sqrt()).clamp(min=2).long()


def _status(layout: Any, low: Any) -> Any:
    if layout.joint:
        return None if low else Status.INNER_NOT_CONVERGED
    return torch.where(low, int(Status.SUCCESS), int(Status.INNER_NOT_CONVERGED)).to(torch.int8)


def _number(x: Any) -> Any:
    """Without a gradient: a float in joint mode, else ``(B,)``."""
    if not isinstance(x, Tensor):
        return x
    return x.item() if x.dim() == 0 else x.detach()


METHODS.register("rkc2", RKC2())
