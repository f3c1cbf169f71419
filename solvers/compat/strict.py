"""What ``strict=True`` changes: torchdiffeq 0.2.5 step for step, its overshoot and interpolation included."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..control import CONTROLLERS
from ..loop import Plan
from ..methods import METHODS as NATIVE
from ..methods import StepOut
from ..methods.rk import RKDense, RKState, RungeKutta, Workspace
from ..methods.stages import ListStages
from ..methods.tableau import Extension, Tableau
from .wrappers import linear

METHODS = ("dopri5", "bosh3", "euler", "midpoint", "rk4")

# Weights of y in the middle of the step: Shampine 1986, Math. Comp. 46, of order 4, for dopri5; half a step of the
# midpoint rule's slope for bosh3.
MIDDLE = {
    "dopri5": (
        6025192743 / 30085553152 / 2, 0.0, 51252292925 / 65400821598 / 2, -2691868925 / 45128329728 / 2,
        187940372067 / 1594534317056 / 2, -1776094331 / 19743644256 / 2, 11237099 / 235043384 / 2,
    ),
    "bosh3": (0.0, 0.5, 0.0, 0.0),
}
# Differences of the two solutions' weights as doubles: rounded before they are subtracted, which shows in small estimates.
ERROR = {
    "dopri5": (
        35 / 384 - 1951 / 21600, 0.0, 500 / 1113 - 22642 / 50085, 125 / 192 - 451 / 720, -2187 / 6784 + 12231 / 42400,
        11 / 84 - 649 / 6300, -1 / 60,
    ),
    "bosh3": (2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
}
MIDDLE_ORDER = {"dopri5": 4, "bosh3": 1}


def made(choice: Any) -> Any:
    """``choice`` with torchdiffeq's interpolation, controller, first step and overshoot."""
    if not choice.adaptive:
        cubic = choice.options.get("interp") == "cubic"
        return choice if cubic else choice._replace(method=linear(choice.method))
    tableau = _with_middle(NATIVE[choice.name].tableau)  # type: ignore[attr-defined]
    steering: Any = choice.controller or CONTROLLERS["i"]
    steering = dataclasses.replace(steering, factor_min_accepted=1.0)
    return choice._replace(method=StrictRungeKutta(tableau), controller=steering, adapt=(*choice.adapt, _unclipped))


def _with_middle(tableau: Tableau) -> Tableau:
    """The tableau with the quartic through y and f at both ends and y in the middle."""
    middle, b = MIDDLE[tableau.name], tableau.b
    first = [1.0] + [0.0] * (len(b) - 1)
    last = [0.0] * (len(b) - 1) + [1.0]
    rows = tuple(_quartic(*weights) for weights in zip(first, last, b, middle, strict=True))
    extension = Extension(MIDDLE_ORDER[tableau.name], rows)
    return dataclasses.replace(
        tableau, name=f"{tableau.name} (strict)", extension=extension, b_error=(ERROR[tableau.name],)
    )


def _quartic(f0: float, f1: float, end: float, middle: float) -> tuple[float, ...]:
    """Coefficients of theta, .., theta^4 of p with p(0) = 0, p'(0) = f0, p(1) = end, p'(1) = f1, p(1/2) = middle."""
    # q = p - f0 theta = theta^2 (c + d theta + e theta^2): three conditions at 1/2 and 1.
    value, slope, half = end - f0, f1 - f0, 4 * (middle - f0 / 2)
    e = 2 * slope - 8 * value + 4 * half
    d = slope - 2 * value - 2 * e
    return f0, value - d - e, d, e


def _unclipped(plan: Plan) -> Plan:
    assert plan.times is not None
    times = plan.times._replace(clip_end=False)
    return dataclasses.replace(plan, times=times, clock=times.clock(plan.layout, plan.jumps), initial=first_step)


@torch.no_grad()
def first_step(
    field: Any, norm: Any, t0: Any, y0: Tensor, f0: Tensor, error_order: int, span: Any
) -> tuple[Any, int]:
    """|dt| of the first step as Hairer, Nørsett & Wanner I, II.4 have it, in the state's precision, whatever the span."""
    scale = norm.scale(y0)
    d0, d1 = _norm(norm, y0 / scale), _norm(norm, f0 / scale)
    h0 = torch.full_like(d0, 1e-6) if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    step = torch.copysign(h0, torch.full_like(h0, span))
    f1 = field(torch.full_like(h0, t0) + step, y0 + step * f0)
    d2 = _norm(norm, (f1 - f0) / scale) / h0
    if d1 <= 1e-15 and d2 <= 1e-15:
        h1 = torch.clamp(h0 * 1e-3, min=1e-6)
    else:
        h1 = (0.01 / torch.maximum(d1, d2)) ** (1.0 / error_order)
    return torch.minimum(100 * h0, h1).item(), 1


def _norm(norm: Any, scaled: Tensor) -> Tensor:
    """The error norm without leaving the state's precision."""
    if norm.custom is not None or not norm.layout.single:
        return torch.as_tensor(norm.measure(scaled), dtype=norm.layout.real_dtype)
    return scaled.abs().square().mean().sqrt()


class StrictRungeKutta(RungeKutta):
    """The same step, rounded as torchdiffeq rounds it.

    Early in a solve, and in single precision throughout, error estimates are little more than rounding: only the same order
    of the same operations gives the same steps.
    """

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> RKState:
        return RKState(f0, Workspace(ListStages(field.layout)))

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: RKState, active: Any) -> StepOut:
        tableau, layout = self.tableau, field.layout
        stages, calls = ListStages(layout), tableau.stages - 1
        if state.k0 is None:
            stages.start(field(field.time(t0), y0))
            calls += 1
        else:
            stages.start(state.k0)
        start, size = (torch.as_tensor(x, dtype=torch.float64).to(layout.real_dtype) for x in (t0, dt))
        end = (torch.as_tensor(t0, dtype=torch.float64) + dt).to(layout.real_dtype)
        for c, row in zip(tableau.later_c, tableau.later_a, strict=True):
            y = y0 + _sum(stages.k, row, size).view(y0.shape)
            stages.evaluate(field, end.clone() if c == 1 else start + c * size, y)
        stages.k = [k.reshape(stages.shape) for k in stages.k]
        dense = RKDense(t0, dt, y0, y, stages, None)
        error = None if not tableau.b_error else _sum(stages.k, tableau.b_error[0], size).detach().view(y0.shape)
        return StepOut(y, error, dense, RKState(stages.k[-1].view(layout.shape), state.work), calls)

    def ratio(self, norm: Any, y0: Tensor, out: StepOut) -> Any:
        tolerance = norm.atol + norm.rtol * torch.maximum(y0.abs(), out.y1.abs())
        return float(_norm(norm, out.error / tolerance))


def _sum(k: list[Tensor], weights: tuple[float, ...], size: Tensor) -> Tensor:
    """dt sum_i weights_i k_i along a last dimension."""
    row = torch.tensor(weights, dtype=torch.float64).to(size.dtype)
    return torch.sum(torch.stack(k, -1) * (row * size), dim=-1)
