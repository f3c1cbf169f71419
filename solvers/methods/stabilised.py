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
from ..status import ArgumentError, Status, UnsupportedError
from .base import METHODS, Method, StepOut, number
from .rock4_recursion import recursion
from .rock4_table import ROCK4 as ROCK4_TABLE
from .tableau import polynomial

HERMITE = ((0.0, 0.0, 3.0, -2.0), (0.0, 1.0, -2.0, 1.0), (0.0, 0.0, -1.0, 1.0))
"""Coefficients in theta of the cubic's weights: of y1 - y0, dt f0 and dt f1."""
SHORTER = 0.5
"""A step offered below this share of the last one follows a rejection, or an output: the spectrum is looked at again."""
SAFETY = 0.9
"""The controllers' own."""
ROCK4_REACH = {s: 2 * shape[5] * s * s + shape[4] for s, (shape, _, _) in ROCK4_TABLE.items()}
"""dt rho that so many stages are stable for."""
WEIGHT = 0.03
"""Of the error estimate of ROCK4: about where it equals the error on diffusion."""
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
class Stabilised(Method):
    """What steps of many stages share: how many, for which spectral radius, and how long a step they allow.

    Each sample of a batch has its own number of stages. The spectral radius of df/dy comes from a nonlinear power method
    begun where it last ended, every 25 steps and whenever the step size has been cut, unless f has a method
    ``spectral_bound``; it is a constant to gradients. Near the imaginary axis none of this helps.

    Calls of f a step: one per stage, and those of the power method; in a batch as many as the sample with the most stages
    needs. Adaptive steps stay below the length at which the rounding errors of the stages reach rtol.
    """

    one_step: ClassVar[bool] = False
    reads_values: ClassVar[bool] = True
    graded_failure: ClassVar[bool] = True
    real_limit: ClassVar[float] = math.inf  # type: ignore[misc]

    def stages(self, layout: Any, z: Any) -> Any:
        """Smallest number of stages that is stable for dt rho = ``z``; int or ``(B,)`` int64."""
        raise NotImplementedError

    def reach(self, rtol: float, eps: float) -> tuple[float, float]:
        """dt rho that the most stages are stable for, and that at which their rounding errors reach ``rtol``."""
        raise NotImplementedError

    def sweep(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor, stages: Any) -> tuple[Tensor, Any]:
        """The state at the end, and what the estimate needs of the stages."""
        raise NotImplementedError

    def estimate(self, wide: Any, y0: Tensor, y1: Tensor, f0: Tensor, f1: Tensor, rest: Any) -> Tensor:
        """Of the local error; ``wide``: dt, broadcastable to the state."""
        raise NotImplementedError

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> StabilisedState:
        layout = field.layout
        none = 0.0 if layout.joint else torch.zeros(layout.batch, dtype=torch.float64, device=layout.device)
        if f0 is None:
            f0 = field(field.time(t0), y0)
        return StabilisedState(f0, none, PowerMemory.fresh(layout, y0.detach()))

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: StabilisedState, active: Any) -> StepOut:
        layout, size, ops = field.layout, number(dt), field.layout.ops
        with torch.no_grad():
            rho, memory, work = _radius(field, number(t0), size, y0.detach(), state, active)
            z = abs(size) * rho
            longest, quiet = self.reach(_relative(field.norm), torch.finfo(y0.dtype).eps)
            stable = z <= longest
            stages = ops.where(stable, self.stages(layout, z), self.stages(layout, z * 0.0))
        y1, rest = self.sweep(field, t0, dt, y0, state.f0, stages)
        f1 = field(field.times(t0, dt, (1.0,))[0], y1)
        work += int(stages if layout.joint else stages.max())
        with torch.no_grad():
            estimate = self.estimate(layout.spread(size), y0, y1, state.f0, f1, rest)
            error = StabilisedError(estimate, z / min(longest, quiet))
        dense = StabilisedDense(layout, dt, y0, y1, state.f0, f1)
        return StepOut(y1, error, dense, StabilisedState(f1, size, memory), work, _status(layout, stable))

    def ratio(self, norm: Any, y0: Tensor, out: StepOut) -> Any:
        """The error; at least so much that the next step, too, stays below the longest one."""
        value = norm(out.error.error, norm.scale(y0, out.y1))
        ops, share = norm.layout.ops, out.error.share
        least = (SAFETY * share) ** self.error_order
        least = ops.where(share > 1, ops.maximum(least, FAILED), least)
        return max(value, least) if norm.layout.joint else torch.maximum(value, least.to(value.dtype))

    def replay(
        self, field: Any, t0: Any, dt: Any, y0: Tensor, state: StabilisedState, active: Any, interior: bool
    ) -> StepOut:
        """The step with f at its start as a function of ``y0``: the stored one has no graph behind the first step."""
        out = self.step(field, t0, dt, y0, state._replace(f0=field(field.time(t0), y0)), active)
        return out._replace(work=out.work + 1)

    def interpolate(self, dense: StabilisedDense, theta: Tensor, derivative: int = 0) -> Tensor:
        layout, dt = dense.layout, _size(dense)
        theta = layout.spread(theta)
        if layout.joint:
            theta = theta.unsqueeze(-1)
        weights = [polynomial(c, theta, derivative) for c in HERMITE]
        change = weights[0] * (dense.y1 - dense.y0) + dt * (weights[1] * dense.f0 + weights[2] * dense.f1)
        return dense.y0 + change if derivative == 0 else change * dt**-derivative


@dataclass(frozen=True)
class RKC2(Stabilised):
    """Runge–Kutta–Chebyshev method of second order: s stages are stable for dt |lambda| up to 0.65 s**2 along the negative real
    axis, so that the cost grows with the root of the stiffness.

    Working memory: 12 states, 2 of them kept per step where gradients are replayed. Rounding errors: about s**2 eps / 10.

    ``max_stages``: a step that would need more is rejected.
    """

    _: KW_ONLY
    max_stages: int = 20_000

    name: ClassVar[str] = "rkc2"  # type: ignore[misc]
    order: ClassVar[int] = 2  # type: ignore[misc]
    error_order: ClassVar[int | None] = 3  # type: ignore[misc]
    reference: ClassVar[str] = "Sommeijer, Shampine and Verwer 1998"  # type: ignore[misc]
    remedy: ClassVar[str] = "smaller steps or a larger max_stages="

    def __post_init__(self) -> None:
        if not isinstance(self.max_stages, int) or self.max_stages < 2:
            raise ArgumentError(f"max_stages must be an integer >= 2, found {self.max_stages!r}")

    def stages(self, layout: Any, z: Any) -> Any:
        if layout.joint:
            return max(2, math.ceil(math.sqrt(1 + 1.54 * z))) if math.isfinite(z) else 2
        return torch.ceil((1 + 1.54 * z.nan_to_num(0.0, 0.0)).sqrt()).clamp(min=2).long()

    def reach(self, rtol: float, eps: float) -> tuple[float, float]:
        return (self.max_stages**2 - 1) / 1.54, max(3.0, 10 * rtol / eps - 1) / 1.54

    def sweep(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor, stages: Any) -> tuple[Tensor, Any]:
        """Equation (2.2): the three-term recursion over the stages."""
        table, wide = _Table(field.layout, stages, _rkc2), field.layout.spread(dt)
        first = table.row(1)[2]
        before, y = y0, _combine((y0, 1.0), (f0, wide * first))
        for j in range(2, table.count):
            mu, nu, weight, gamma, node, live = table.row(j)
            f = field.raw(field.time(t0 + dt * node), y)
            terms = (y, mu), (before, nu), (y0, 1.0 - mu - nu), (f, wide * weight), (f0, wide * gamma)
            new = _combine(*terms)
            before, y = y, new if live is None else torch.where(live, new, y)
        return y, None

    def estimate(self, wide: Any, y0: Tensor, y1: Tensor, f0: Tensor, f1: Tensor, rest: Any) -> Tensor:
        """Equation (2.11), the local error up to the next order."""
        return 0.8 * (y0 - y1) + (0.4 * wide) * (f0 + f1)


@dataclass(frozen=True)
class ROCK4(Stabilised):
    """Orthogonal-Runge–Kutta–Chebyshev method of fourth order, of 8 to 150 stages, stable for dt |lambda| up to 0.35 s**2.

    Coefficients of this package's own (``benchmarks/derive_rock4.py``), after Abdulle's construction. For double precision:
    rounding errors of the stages are amplified by about s**8 / 2500 at most, which at rtol 1e-5 leaves 57 stages to use. For
    tighter tolerances than ``rkc2``, and milder stiffness.

    Working memory: 16 states, 2 of them kept per step where gradients are replayed.
    """

    name: ClassVar[str] = "rock4"  # type: ignore[misc]
    order: ClassVar[int] = 4  # type: ignore[misc]
    error_order: ClassVar[int | None] = 4  # type: ignore[misc]
    reference: ClassVar[str] = "Abdulle 2002, SIAM J. Sci. Comput. 23; own coefficients"  # type: ignore[misc]
    remedy: ClassVar[str] = "smaller steps or method='rkc2'"

    def check(self, layout: Any) -> None:
        if layout.real_dtype != torch.float64:
            raise UnsupportedError(
                f"method 'rock4' amplifies rounding errors too much for {layout.dtype}: take method='rkc2', or a float64 state"
            )

    def stages(self, layout: Any, z: Any) -> Any:
        if layout.joint:
            return next((s for s, reach in ROCK4_REACH.items() if reach >= z), 8)
        counts, reach = (torch.tensor(list(x), device=layout.device) for x in (ROCK4_REACH, ROCK4_REACH.values()))
        place = torch.searchsorted(reach.to(z.dtype), z.contiguous())
        return counts[torch.where(place < len(counts), place, 0)]

    def reach(self, rtol: float, eps: float) -> tuple[float, float]:
        quiet = (2500 * rtol / eps) ** 0.125
        return max(ROCK4_REACH.values()), max(z for s, z in ROCK4_REACH.items() if s <= max(8, quiet))

    def sweep(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor, stages: Any) -> tuple[Tensor, Any]:
        """The orthogonal recursion, then the four stages that carry out the rest of the stability polynomial."""
        layout = field.layout
        table, wide = _Table(layout, stages, _rock4), layout.spread(dt)
        before, y, f = y0, y0, f0
        for j in range(table.count):
            mu, kappa, time, live = table.row(j)
            if j > 0:
                f = field.raw(field.time(t0 + dt * time), y)
            new = _combine((y, 1 + kappa), (before, -kappa), (f, wide * mu))
            before, y = y, new if live is None else torch.where(live, new, y)
        a, b, rest, times = _finish(layout, stages)
        k: list[Tensor] = []
        for row, time in zip(a, times, strict=True):
            x = _combine((y, 1.0), *((x, wide * c) for x, c in zip(k, row, strict=True)))
            k.append(field(field.time(t0 + dt * time), x))
        y = _combine((y, 1.0), *((x, wide * c) for x, c in zip(k, b, strict=True)))
        with torch.no_grad():
            return y, _combine(*zip(k, rest, strict=True))

    def estimate(self, wide: Any, y0: Tensor, y1: Tensor, f0: Tensor, f1: Tensor, rest: Any) -> Tensor:
        return (wide * WEIGHT) * (f1 + rest)


def _size(dense: StabilisedDense) -> Any:
    """The step's size broadcast to the state; 1 for samples that stand still."""
    dt = dense.layout.spread(dense.dt)
    if dense.layout.joint:
        return dt
    return torch.where(dt == 0, 1.0, dt)


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


@functools.lru_cache(maxsize=64)
def _rock4(s: int) -> tuple[tuple[float, ...], ...]:
    """Rows (mu, kappa, c of the argument) of the recursion; the last one's time is where the four stages begin."""
    rows, before, time = [], 0.0, 0.0
    for mu, kappa in zip(*(x.tolist() for x in recursion(s, ROCK4_TABLE[s][0])), strict=True):
        rows.append((mu, kappa, time))
        before, time = time, mu + (1 + kappa) * time - kappa * before
    return tuple(rows)


@functools.lru_cache(maxsize=64)
def _rock4_end(s: int) -> tuple[float, ...]:
    """Where the four stages begin, in steps; their coefficients; the embedded weights."""
    mu, kappa, time = _rock4(s)[-1]
    before = _rock4(s)[-2][2]
    return (mu + (1 + kappa) * time - kappa * before, *ROCK4_TABLE[s][1], *ROCK4_TABLE[s][2])


def _finish(layout: Any, stages: Any) -> tuple[Any, Any, Any, Any]:
    """a (rows of growing length), b and the embedded weights, broadcastable to the state; the times of the four stages."""
    if layout.joint:
        raw: Any = _rock4_end(stages)
    else:
        kinds = {s: torch.tensor(_rock4_end(s), dtype=torch.float64) for s in set(stages.tolist())}
        raw = torch.stack([kinds[s] for s in stages.tolist()], 1).to(layout.device).unbind(0)
    start, c = raw[0], [layout.spread(x) for x in raw[1:]]
    times = (start, start + raw[1], start + (raw[2] + raw[3]), start + (raw[4] + raw[5] + raw[6]))
    return ([], c[:1], c[1:3], c[3:6]), c[6:10], c[10:], times


class _Table:
    """Coefficients of a recursion, rows of ``rows(stages)``: numbers in joint mode, else a column for each sample's own."""

    def __init__(self, layout: Any, stages: Any, rows: Any) -> None:
        self.layout = layout
        if layout.joint:
            self.rows = rows(stages)
            self.count = len(self.rows)
            return
        each = stages.tolist()
        kinds = {s: i for i, s in enumerate(sorted(set(each)))}
        known = [torch.tensor(rows(s), dtype=torch.float64) for s in kinds]
        which = torch.tensor([kinds[s] for s in each], device=layout.device)
        self.table = torch.nn.utils.rnn.pad_sequence(known, batch_first=True).to(layout.device)[which]
        self.lengths = torch.tensor([len(x) for x in known], device=layout.device)[which]
        self.count = self.table.shape[1]

    def row(self, j: int) -> tuple[Any, ...]:
        """The coefficients broadcastable to the state, the last, a time in steps, as it is, and which samples have a row ``j``
        (None: all)."""
        if self.layout.joint:
            return (*self.rows[j], None)
        *columns, time = self.table[:, j].unbind(1)
        return (*(self.layout.spread(c) for c in columns), time, self.layout.spread(self.lengths > j))


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


def _relative(norm: Any) -> float:
    return float(norm.rtol.min()) if isinstance(norm.rtol, Tensor) else norm.rtol


def _status(layout: Any, low: Any) -> Any:
    if layout.joint:
        return None if low else Status.INNER_NOT_CONVERGED
    return torch.where(low, int(Status.SUCCESS), int(Status.INNER_NOT_CONVERGED)).to(torch.int8)


METHODS.register("rkc2", RKC2())
METHODS.register("rock4", ROCK4())
