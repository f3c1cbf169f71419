"""Explicit Runge–Kutta methods: one step for every tableau."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import transforms_active
from .base import METHODS, Method, StepOut
from .stages import BufferStages, ListStages, Row
from .tableau import Tableau
from .tableaus import TABLEAUS

BUFFER_LIMIT = 1 << 16
"""Elements of the state above which additions beat matrix-vector products (measured: `benchmarks run speed`)."""


class Workspace:
    """The stages of the current step and what is known to be in row 0. Results do not depend on it."""

    __slots__ = ("end", "k0_of", "stages")

    def __init__(self, stages: ListStages | BufferStages) -> None:
        self.stages = stages
        self.k0_of: Any = None
        self.end: tuple[Any, Any] = (None, None)


class RKState(NamedTuple):
    """f at the start of the next step (None: not known yet), and the workspace."""

    k0: Tensor | Row | None
    work: Workspace


class RKDense(NamedTuple):
    t0: Any
    dt: Any
    y0: Tensor
    y1: Tensor
    stages: Any
    work: Workspace | None


@dataclass(frozen=True)
class RungeKutta(Method):
    """y1 = y0 + dt sum_i b_i k_i, k_i = f(t0 + c_i dt, y0 + dt sum_{j<i} a_ij k_j).

    Fixed steps or, where the tableau has an embedded pair, adaptive ones: that is the controller's business.
    """

    tableau: Tableau

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.tableau.name

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.tableau.order

    @property
    def error_order(self) -> int | None:  # type: ignore[override]
        return self.tableau.error_order

    @property
    def reference(self) -> str:  # type: ignore[override]
        return self.tableau.reference

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> RKState:
        layout, tableau = field.layout, self.tableau
        rows = tableau.stages + len(tableau.extension.c_extra)
        buffered = not torch.is_grad_enabled() and y0.numel() <= BUFFER_LIMIT and not transforms_active()
        work = Workspace(BufferStages(layout, rows) if buffered else ListStages(layout))
        if f0 is not None and not tableau.fsal:
            work.stages.start(f0)
            work.k0_of = y0
        return RKState(f0 if tableau.fsal else None, work)

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: RKState, active: Any) -> StepOut:
        tableau, work = self.tableau, state.work
        stages = work.stages
        calls = self._first_stage(field, t0, y0, state)
        if tableau.stages > 1:
            y, k = stages.sweep(field, field.times(t0, dt, tableau.c[1:]), y0, dt, tableau.a[1:])
            calls += tableau.stages - 1
        # With FSAL the last stage's argument is the solution itself.
        y1 = y if tableau.fsal else stages.point(y0, dt, tableau.b)
        error = tuple(stages.error(dt, row) for row in tableau.b_error)
        return StepOut(
            y1,
            error[0] if len(error) == 1 else (error or None),
            RKDense(t0, dt, y0, y1, stages, work),
            RKState(k if tableau.fsal else None, work),
            calls,
        )

    def _first_stage(self, field: Any, t0: Any, y0: Tensor, state: RKState) -> int:
        work, stages = state.work, state.work.stages
        if self.tableau.fsal and state.k0 is not None:
            # A rejected step comes back with the same k0: row 0 still holds it.
            if work.k0_of is not state.k0:
                stages.start(state.k0)
                work.k0_of = state.k0
            else:
                stages.rewind()
            return 0
        if work.k0_of is y0:
            stages.rewind()
            return 0
        if work.end[0] is y0:
            # The extension of the step before needed f at its end, which is this stage.
            stages.start(work.end[1])
            work.k0_of = y0
            return 0
        k0 = field(field.time(t0), y0)
        stages.start(k0)
        work.k0_of = y0
        return 1

    def prepare(self, field: Any, dense: RKDense) -> tuple[RKDense, int]:
        tableau, stages = self.tableau, dense.stages
        extension = tableau.extension
        if not extension.c_extra:
            return dense, 0
        times = field.times(dense.t0, dense.dt, extension.c_extra)
        for i, (row, time) in enumerate(zip(extension.a_extra, times, strict=True)):
            at_end = tableau.stages + i == tableau.f1_stage
            y = dense.y1 if at_end else stages.point(dense.y0, dense.dt, row)
            k = stages.evaluate(field, time, y)
            if at_end and dense.work is not None:
                dense.work.end = (dense.y1, k)
        return dense, len(times)

    def snapshot(self, dense: RKDense) -> RKDense:
        return dense._replace(stages=dense.stages.frozen(), work=None)

    def interpolate(self, dense: RKDense, theta: Tensor, derivative: int = 0) -> Tensor:
        k = dense.stages.matrix()
        layout = dense.stages.layout
        weights = self._weights(theta, derivative, k)
        if isinstance(dense.dt, Tensor):
            weights = weights * (dense.dt ** (1 - derivative)).unsqueeze(-1)
        elif derivative != 1:
            weights = weights * dense.dt ** (1 - derivative)
        weights = weights.to(layout.real_dtype)
        if layout.joint:
            result = weights.to(layout.dtype) @ k.reshape(k.shape[0], -1)
        else:
            wide = layout.per_row(weights.movedim(-1, 0)).movedim(0, 1).unsqueeze(-1)
            result = (wide * k).sum(1)
        return result + dense.y0 if derivative == 0 else result

    def _weights(self, theta: Tensor, derivative: int, k: Tensor) -> Tensor:
        """d^n/dtheta^n b_i(theta), ``(n, [B,] s)``."""
        P = _matrix(self.tableau, theta.device)
        powers = torch.arange(1, P.shape[1] + 1, device=theta.device, dtype=theta.dtype)
        factor = torch.ones_like(powers)
        for n in range(derivative):
            factor = factor * (powers - n)
        basis = factor * theta.unsqueeze(-1) ** (powers - derivative).clamp(min=0)
        return basis @ P[: k.shape[0]].T

    def ratio(self, norm: Any, scale: Tensor, out: StepOut) -> Any:
        if not isinstance(out.error, tuple):
            return norm(out.error, scale)
        # Two estimates of orders 5 and 3 combined (Hairer, Nørsett & Wanner I, II.10, after (10.17)).
        fifth, third = norm(out.error[0], scale), norm(out.error[1], scale)
        return fifth**2 / ((fifth**2 + 0.01 * third**2) ** 0.5 + 1e-300)


def _matrix(tableau: Tableau, device: torch.device) -> Tensor:
    return torch.tensor(tableau.extension.P, dtype=torch.float64, device=device)


for _tableau in TABLEAUS.values():
    METHODS.register(_tableau.name, RungeKutta(_tableau))
