"""Explicit Runge–Kutta methods: one step for every tableau."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..layout import forward_mode, transforms_active
from .base import METHODS, StepOut, TableauMethod
from .stages import BufferStages, HostStages, ListStages, Row, RowStages
from .tableau import Tableau
from .tableaus import TABLEAUS


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
class RungeKutta(TableauMethod):
    """y1 = y0 + dt sum_i b_i k_i, k_i = f(t0 + c_i dt, y0 + dt sum_{j<i} a_ij k_j).

    Fixed steps or, where the tableau has an embedded pair, adaptive ones: that is the controller's business.
    """

    tableau: Tableau

    @property
    def real_limit(self) -> float:  # type: ignore[override]
        return self.tableau.real_limit

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> RKState:
        tableau = self.tableau
        rows = tableau.stages + len(tableau.extension.c_extra)
        work = Workspace(self._stages(field, dt, rows))
        if f0 is not None and not tableau.fsal:
            work.stages.start(f0)
            work.k0_of = y0
        return RKState(f0 if tableau.fsal else None, work)

    @staticmethod
    def _stages(field: Any, dt: Any, rows: int) -> ListStages | BufferStages:
        layout = field.layout
        # A joint step of tensor length carries a gradient, or repeats one that does: the buffers take numbers only.
        listed = torch.is_grad_enabled() or transforms_active() or forward_mode() or (layout.joint and isinstance(dt, Tensor))
        if listed:
            return ListStages(layout)
        if layout.is_tensor and layout.same_dtype and field.norm.on_host:
            return HostStages(layout, rows)
        return BufferStages(layout, rows) if layout.joint else RowStages(layout, rows)

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: RKState, active: Any) -> StepOut:
        tableau, work = self.tableau, state.work
        stages = work.stages
        calls = self._first_stage(field, t0, y0, state)
        if tableau.stages > 1:
            y, k = stages.sweep(field, field.times(t0, dt, tableau.later_c), y0, dt, tableau.later_a)
            calls += tableau.stages - 1
        # With FSAL the last stage's argument is the solution itself.
        y1 = y if tableau.fsal else stages.point(y0, dt, tableau.b)
        dense = RKDense(t0, dt, y0, y1, stages, work)
        return StepOut(y1, dense, dense, RKState(k if tableau.fsal else None, work), calls)

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
        stages.start(field(field.time(t0), y0))
        work.k0_of = y0
        return 1

    def replay(
        self, field: Any, t0: Any, dt: Any, y0: Tensor, state: Any, active: Any, interior: bool
    ) -> StepOut:
        """The step without an error estimate; with FSAL the last stage is left out unless an output needs it."""
        tableau, stages = self.tableau, ListStages(field.layout)
        stages.start(field(field.time(t0), y0))
        rows = tableau.later_a
        if tableau.fsal:
            rows, own = (rows, None) if interior else (rows[:-1], rows[-1])
        else:
            own = tableau.b
        y1 = y0
        if rows:
            y1, _ = stages.sweep(field, field.times(t0, dt, tableau.later_c)[: len(rows)], y0, dt, rows)
        if own is not None:
            y1 = stages.point(y0, dt, own)
        dense = RKDense(t0, dt, y0, y1, stages, None)
        extra = self.prepare(field, dense)[1] if interior else 0
        return StepOut(y1, None, dense, None, 1 + len(rows) + extra)

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
        weights = self._weights(theta, derivative, len(k))
        power = (0 if dense.stages.scaled else 1) - derivative
        if power and isinstance(dense.dt, Tensor):
            weights = weights * (dense.dt**power).unsqueeze(-1)
        elif power:
            weights = weights * dense.dt**power
        weights = weights.to(layout.real_dtype)
        if layout.joint:
            result = weights.to(layout.dtype) @ k.reshape(k.shape[0], -1)
        else:
            # One stage after the other: the order in which a sum over a dimension is taken depends on the batch.
            wide = layout.per_row(weights.movedim(-1, 0)).unsqueeze(-1)
            result = wide[0] * k[0]
            for weight, stage in zip(wide[1:], k[1:], strict=True):
                result = torch.addcmul(result, weight, stage)
        return result + dense.y0 if derivative == 0 else result

    def _weights(self, theta: Tensor, derivative: int, stages: int) -> Tensor:
        """d^n/dtheta^n b_i(theta), ``(n, [B,] s)``, float64."""
        plain = theta.device.type == "cpu" and not theta.requires_grad and not transforms_active()
        if derivative == 0 and theta.dim() == 1 and plain:
            # A handful of numbers: numpy takes a fraction of the time.
            exponents, columns = _host_extension(self.tableau, stages)
            return torch.from_numpy((theta.numpy()[:, None] ** exponents).dot(columns))
        powers, P = _extension(self.tableau, theta.device)
        if derivative == 0:
            # Horner's rule, not a matrix product, whose rounding depends on its size and so on the batch.
            rows, theta = P[:, :stages].unbind(0), theta.unsqueeze(-1)
            weights = rows[-1] * theta
            for row in rows[-2::-1]:
                weights = (weights + row) * theta
            return weights
        factor = torch.ones_like(powers)
        for n in range(derivative):
            factor = factor * (powers - n)
        return factor * theta.unsqueeze(-1) ** (powers - derivative).clamp(min=0) @ P[:, :stages]

    def last_two(self, out: StepOut) -> tuple[Tensor, Tensor]:
        """By how much the arguments of the last two stages differ, and dt times the stages themselves."""
        before, last = self.tableau.a[-2:]
        change = tuple(b - a for a, b in zip((*before, 0.0), last, strict=True))
        slopes = (*(0.0 for _ in before), -1.0, 1.0)
        stages, dt = out.dense.stages, out.dense.dt
        return stages.error(dt, change), stages.error(dt, slopes)

    def ratio(self, norm: Any, y0: Tensor, out: StepOut) -> Any:
        dt, stages, rows = out.error.dt, out.error.stages, self.tableau.b_error
        if norm.on_host and stages.on_host and not isinstance(dt, Tensor):
            ratios = [stages.ratio(norm, dt, row, y0, out.y1) for row in rows]
        else:
            scale = norm.scale(y0, out.y1)
            ratios = [norm(stages.error(dt, row), scale) for row in rows]
        return ratios[0] if len(ratios) == 1 else _paired(*ratios)


def _paired(fifth: Any, third: Any) -> Any:
    """Two estimates of orders 5 and 3 combined (Hairer, Nørsett & Wanner I, II.10)."""
    return fifth * fifth / ((fifth * fifth + 0.01 * third * third) ** 0.5 + 1e-30)


@functools.lru_cache(maxsize=256)
def _extension(tableau: Tableau, device: torch.device) -> tuple[Tensor, Tensor]:
    """Exponents ``(d,)`` and coefficients ``(d, s)`` of the continuous extension's weights."""
    P = torch.tensor(tableau.extension.P, dtype=torch.float64, device=device).T.contiguous()
    return torch.arange(1, len(P) + 1, dtype=torch.float64, device=device), P


@functools.lru_cache(maxsize=256)
def _host_extension(tableau: Tableau, stages: int) -> tuple[np.ndarray, np.ndarray]:
    """The same as arrays, of the first ``stages`` stages."""
    P = np.array(tableau.extension.P).T[:, :stages].copy()
    return np.arange(1, len(P) + 1, dtype=np.float64), P


for _tableau in TABLEAUS.values():
    METHODS.register(_tableau.name, RungeKutta(_tableau))
