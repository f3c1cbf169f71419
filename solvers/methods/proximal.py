"""Proximal methods: implicit steps solved as minimisations (Xia 2023, chapter 5)."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..optim import INNER_OPTIMIZERS, InnerOptimizer, Point, ProximalProblem, minimise
from ..status import Status
from .base import METHODS, Method, StepOut


class ProxState(NamedTuple):
    slope: Any
    bend: Any
    dt: Any
    memory: Any


class ProxDense(NamedTuple):
    layout: Any
    dt: Any
    y0: Tensor
    y1: Tensor


@dataclass(frozen=True)
class ProxEuler(Method):
    inner: InnerOptimizer = INNER_OPTIMIZERS["fletcher_reeves"]
    _: KW_ONLY
    inner_tol: float = 0.3
    max_iters: int = 1000
    predictor: int = 2

    name: ClassVar[str] = "prox_euler"
    order: ClassVar[int] = 1
    error_order: ClassVar[int | None] = 2
    implicit: ClassVar[bool] = True
    one_step: ClassVar[bool] = False
    reference: ClassVar[str] = "Xia 2023"

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> ProxState:
        none = 0.0 if field.layout.joint else torch.zeros_like(dt)
        return ProxState(f0, torch.zeros_like(y0), none, self.inner.remember(field.layout, y0))

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: ProxState, active: Any) -> StepOut:
        (t,) = field.times(t0, dt, (1.0,))
        with torch.no_grad():
            scale = field.norm.scale(y0)
            problem = ProximalProblem(field, t, y0, dt, field.norm, scale)
            start = self._start(problem, dt, y0, state)
            res = minimise(problem, self.inner, start, tol=self.inner_tol, max_iters=self.max_iters, active=active, memory=state.memory)
        y1 = res.z
        spread = field.layout.spread
        slope = (y1 - y0) / spread(dt)
        if not field.layout.joint:
            slope=torch.where(spread(dt==0), state.slope, slope)
        bend = torch.where(torch.as_tensor(spread(state.dt != 0)), (slope - state.slope) / spread(state.dt + dt), 0.0)
        error = 0.5 * spread(dt) * (slope - state.slope)
        status = None
        if field.layout.joint:
            if not res.converged: status = Status.INNER_NOT_CONVERGED
        else:
            status = torch.where(res.converged, 0, int(Status.INNER_NOT_CONVERGED)).to(torch.int8)
        return StepOut(y1, error, ProxDense(field.layout, dt, y0, y1), ProxState(slope, bend, dt, res.memory), problem.calls, status, res.iterations)

    def _start(self, problem, dt, y0, state):
        w = problem.wide
        z = y0
        if self.predictor >= 1: z = y0 + w * state.slope
        if self.predictor >= 2: z = z + w * problem.layout.spread(dt + state.dt) * state.bend
        point = problem.evaluate(z)
        if self.predictor==0: return point
        known = problem.norm(w * state.slope)
        n = problem.norm(point.r)
        good = n <= problem.ops.maximum(known, self.inner_tol)
        if bool(good if problem.layout.joint else good.all()): return point
        return problem.evaluate(problem.keep(good, z, y0))

    def interpolate(self, dense: Any, theta: Tensor, derivative: int = 0) -> Tensor:
        raise NotImplementedError


METHODS.register("prox_euler", ProxEuler())
