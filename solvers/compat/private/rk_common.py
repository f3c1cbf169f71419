"""Runge-Kutta solver objects that can be stepped by hand: the strict step and the I controller, one attempt at a time."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...field import Field
from ...layout import Layout
from ...methods import METHODS
from ...methods.rk import RKState, Workspace
from ...methods.stages import ListStages
from ...methods.tableau import Tableau
from ...status import ArgumentError
from ..errors import CheckError
from ..strict import ERROR, MIDDLE, StrictRungeKutta, _sum
from .event_handling import Search, find_event
from .interp import _interp_evaluate, _interp_fit
from .misc import Perturb, _compute_error_ratio, _optimal_step_size, _select_initial_step
from .solvers import AdaptiveStepsizeEventODESolver

_one_third, _two_thirds, _one_sixth = 1 / 3, 2 / 3, 1 / 6
_ButcherTableau = namedtuple("_ButcherTableau", "alpha, beta, c_sol, c_error")
_RungeKuttaState = namedtuple("_RungeKuttaState", "y1, f1, t0, t1, dt, interp_coeff")


class _Coefficients(NamedTuple):
    """As much of a tableau as the strict step reads."""

    later_c: tuple[float, ...]
    later_a: tuple[tuple[float, ...], ...]
    b_error: tuple[tuple[float, ...], ...]

    @property
    def stages(self) -> int:
        return len(self.later_c) + 1


def butcher(name: str) -> Any:
    """``_ButcherTableau`` of the built-in method ``name``, whose last row is the solution where that is free."""
    tableau: Tableau = METHODS[name].tableau  # type: ignore[attr-defined]
    error = ERROR.get(name) or tableau.b_error[0]
    rows = [torch.tensor(row, dtype=torch.float64) for row in tableau.later_a]
    nodes = torch.tensor(tableau.later_c, dtype=torch.float64)
    return _ButcherTableau(
        nodes, rows, torch.tensor(tableau.b, dtype=torch.float64), torch.tensor(error, dtype=torch.float64)
    )


def middle(name: str) -> Tensor:
    """Weights of the state in the middle of a step of method ``name``."""
    if name in MIDDLE:
        return torch.tensor(MIDDLE[name], dtype=torch.float64)
    tableau: Tableau = METHODS[name].tableau  # type: ignore[attr-defined]
    rows = [sum(p * 0.5**power for power, p in enumerate(row, 1)) for row in tableau.extension.P]
    return torch.tensor(rows[: tableau.stages], dtype=torch.float64)


def _runge_kutta_step(
    func: Any, y0: Tensor, f0: Tensor, t0: Tensor, dt: Tensor, t1: Tensor, tableau: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step: (state and slope at t1, error estimate, stages along a last dimension).

    The slope is the last stage where that is f at the solution, and otherwise one more evaluation.
    """
    layout = Layout(y0)
    coefficients = _Coefficients(
        tuple(tableau.alpha.tolist()), tuple(tuple(row.tolist()) for row in tableau.beta), (tuple(tableau.c_error.tolist()),)
    )
    end = t1.to(layout.real_dtype)

    def before_end(t: Tensor, y: Tensor) -> Any:
        return func(end, y, perturb=Perturb.PREV) if t == end else func(t, y)

    field = Field(before_end, layout)
    work = Workspace(ListStages(layout))
    state = RKState(layout.flatten(f0, "f0"), work)
    out = StrictRungeKutta(coefficients).step(field, t0, dt, layout.flatten(y0), state, True)  # type: ignore[arg-type]
    stages, size = out.dense.stages.k, dt.to(layout.real_dtype)
    weights = tuple(tableau.c_sol.tolist())
    k = torch.stack(stages, -1)
    if len(weights) == len(stages) and weights[-1] == 0 and weights[:-1] == coefficients.later_a[-1]:
        y1, f1 = layout.unflatten(out.y1), k[..., -1]
    else:
        y1 = y0 + _sum(stages, weights, size).view(y0.shape)
        f1 = func(end, y1, perturb=Perturb.PREV)
    error = torch.sum(k * (torch.tensor(coefficients.b_error[0], dtype=torch.float64).to(size) * size), dim=-1)
    return y1, f1.view(y0.shape), error, k


def rk4_step_func(func: Any, t0: Any, dt: Any, t1: Any, y0: Tensor, f0: Any = None, perturb: bool = False) -> Tensor:
    """Increment of Kutta's classical method."""
    return _increment(func, t0, dt, t1, y0, _CLASSICAL, f0, perturb)


def rk4_alt_step_func(func: Any, t0: Any, dt: Any, t1: Any, y0: Tensor, f0: Any = None, perturb: bool = False) -> Tensor:
    """Increment of Kutta's 3/8 rule."""
    return _increment(func, t0, dt, t1, y0, METHODS["rk4"].tableau, f0, perturb)  # type: ignore[attr-defined]


def rk3_step_func(
    func: Any, t0: Any, dt: Any, t1: Any, y0: Tensor, butcher_tableu: Any = None, f0: Any = None, perturb: bool = False
) -> Tensor:
    """Increment of the method with the rows (c_i, a_i1, ..) of ``butcher_tableu``, the last one of (0, b_1, ..)."""
    rows = [tuple(float(x) for x in row) for row in butcher_tableu]
    table = _Table(tuple(row[0] for row in rows[1:-1]), tuple(row[1 : i + 2] for i, row in enumerate(rows[1:-1])), rows[-1][1:])
    return _increment(func, t0, dt, t1, y0, table, f0, perturb)


rk2_step_func = rk3_step_func


class _Table(NamedTuple):
    later_c: tuple[float, ...]
    later_a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


_CLASSICAL = _Table((0.5, 0.5, 1.0), ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))


def _increment(func: Any, t0: Any, dt: Any, t1: Any, y0: Tensor, table: Any, f0: Any, perturb: bool) -> Tensor:
    moved = (Perturb.NEXT, Perturb.PREV) if perturb else (Perturb.NONE, Perturb.NONE)
    # Only func of a solver object knows ``perturb``; where none is asked for any function will do.
    k = [f0 if f0 is not None else (func(t0, y0, perturb=moved[0]) if perturb else func(t0, y0))]
    for c, row in zip(table.later_c, table.later_a, strict=True):
        y = y0 + dt * _weighted(row, k)
        k.append(func(t1, y, perturb=moved[1]) if perturb and c == 1 else func(t1 if c == 1 else t0 + c * dt, y))
    return dt * _weighted(table.b, k)


def _weighted(weights: Sequence[float], k: list[Tensor]) -> Tensor:
    total = torch.zeros_like(k[0])
    for weight, stage in zip(weights, k, strict=True):
        if weight:
            total = total + weight * stage
    return total


class RKAdaptiveStepsizeODESolver(AdaptiveStepsizeEventODESolver):
    """An embedded pair with ``tableau``, ``order`` (exponent of its error estimate) and ``mid``, as an object with a state.

    ``rk_state``: (y1, f1, t0, t1, dt, interp_coeff) after the last step.
    """

    order: int
    tableau: Any
    mid: Tensor

    def __init__(
        self, func: Any, y0: Tensor, rtol: Any, atol: Any, min_step: Any = 0, max_step: Any = float("inf"),
        first_step: Any = None, step_t: Any = None, jump_t: Any = None, safety: Any = 0.9, ifactor: Any = 10.0,
        dfactor: Any = 0.2, max_num_steps: int = 2**31 - 1, dtype: torch.dtype = torch.float64, **kwargs: Any,
    ) -> None:
        super().__init__(dtype=dtype, y0=y0, **kwargs)
        self.func = func
        self.dtype = torch.promote_types(dtype, y0.real.dtype if y0.is_complex() else y0.dtype)

        def number(value: Any) -> Any:
            return None if value is None else torch.as_tensor(value, dtype=self.dtype, device=y0.device)

        self.rtol, self.atol = number(rtol), number(atol)
        self.min_step, self.max_step, self.first_step = number(min_step), number(max_step), number(first_step)
        self.safety, self.ifactor, self.dfactor = number(safety), number(ifactor), number(dfactor)
        self.step_t, self.jump_t = number(step_t), number(jump_t)
        self.max_num_steps = max_num_steps
        alpha, beta, c_sol, c_error = self.tableau

        def moved(x: Tensor) -> Tensor:
            return x.to(device=y0.device, dtype=y0.real.dtype if y0.is_complex() else y0.dtype)

        self.mid = moved(self.mid)
        self._exact = self.tableau
        self.tableau = _ButcherTableau(moved(alpha), [moved(row) for row in beta], moved(c_sol), moved(c_error))

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        return {"callback_step", "callback_accept_step", "callback_reject_step"}

    def _before_integrate(self, t: Tensor) -> None:
        """First slope and step size, and the times that steps must end at."""
        t0 = t[0]
        f0 = self.func(t0, self.y0)
        first = self.first_step
        if first is None:
            first = _select_initial_step(self.func, t0, self.y0, self.order - 1, self.rtol, self.atol, self.norm, f0=f0)
        self.rk_state = _RungeKuttaState(self.y0, f0, t0, t0, first, [self.y0] * 5)
        none = torch.zeros(0, dtype=self.dtype, device=self.y0.device)
        for name in ("step_t", "jump_t"):
            times = getattr(self, name)
            setattr(self, name, none if times is None else _sort_tvals(times, t0))
        both = torch.cat([self.step_t, self.jump_t])
        if len(both.unique()) < len(both):
            raise ArgumentError("`step_t` and `jump_t` must not have any repeated elements between them.")

    def _advance(self, next_t: Tensor) -> Tensor:
        """The state at ``next_t``, after as many steps as that takes."""
        steps = 0
        while next_t > self.rk_state.t1:
            if steps >= self.max_num_steps:
                raise CheckError(f"max_num_steps exceeded ({steps}>={self.max_num_steps})")
            self.rk_state = self._adaptive_step(self.rk_state)
            steps += 1
        return _interp_evaluate(self.rk_state.interp_coeff, self.rk_state.t0, self.rk_state.t1, next_t)

    def _advance_until_event(self, event_fn: Any) -> tuple[Tensor, Tensor]:
        """Time of the event and the state then, after as many steps as it takes to get there."""
        state = self.rk_state
        search, steps = Search(event_fn, state.t1, state.y1), 0
        while state.t1 == state.t0 or not search.crossed(state.t1, state.y1):
            if steps >= self.max_num_steps:
                raise CheckError(f"max_num_steps exceeded ({steps}>={self.max_num_steps})")
            self.rk_state = state = self._adaptive_step(state)
            steps += 1

        def inside(t: Tensor) -> Tensor:
            return _interp_evaluate(state.interp_coeff, state.t0, state.t1, t)

        return find_event(inside, search.sign, state.t0, state.t1, event_fn, self.atol)

    def _adaptive_step(self, rk_state: Any) -> Any:
        """One attempt: the state after it, with the step size for the next."""
        y0, f0, _, t0, dt, interp_coeff = rk_state
        # A step that met a NaN is tried again, shorter.
        dt = torch.where(torch.isfinite(dt), dt, self.min_step).clamp(self.min_step, self.max_step)
        self.func.callback_step(t0, y0, dt)
        self._check_attempt(t0, y0, dt)
        t1, at_jump = t0 + dt, False
        for times, jump in ((self.step_t, False), (self.jump_t, True)):
            within = times[(times > t0) & (times <= t1)]
            if len(within):
                at_jump = jump
                t1 = within[0]
        dt = t1 - t0
        y1, f1, error, k = _runge_kutta_step(self.func, y0, f0, t0, dt, t1, self._exact)
        with torch.no_grad():
            ratio = _compute_error_ratio(error, self.rtol, self.atol, y0, y1, self.norm)
        if ratio <= 1 or dt <= self.min_step:
            self.func.callback_accept_step(t0, y0, dt)
            interp_coeff = self._interp_fit(y0, y1, k, dt)
            # Beyond a jump f is another one.
            f1 = self.func(t1, y1, perturb=Perturb.NEXT) if at_jump else f1
        else:
            self.func.callback_reject_step(t0, y0, dt)
            y1, f1, t1 = y0, f0, t0
        following = _optimal_step_size(dt, ratio, self.safety, self.ifactor, self.dfactor, self.order)
        return _RungeKuttaState(y1, f1, t0, t1, following.clamp(self.min_step, self.max_step), interp_coeff)

    def _check_attempt(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        if not bool(t0 + dt > t0):
            raise CheckError(f"underflow in dt {dt.item()}")
        if not bool(torch.isfinite(y0).all()):
            raise CheckError(f"non-finite values in state `y`: {y0}")

    def _interp_fit(self, y0: Tensor, y1: Tensor, k: Tensor, dt: Tensor) -> list[Tensor]:
        size = dt.to(self.mid.dtype)
        y_mid = y0 + torch.sum(k * (size * self.mid), dim=-1).view(y0.shape)
        return _interp_fit(y0, y1, y_mid, k[..., 0].view(y0.shape), k[..., -1].view(y0.shape), size)


def _sort_tvals(tvals: Tensor, t0: Tensor) -> Tensor:
    """Times that are still to come, in their order."""
    return tvals[tvals >= t0].sort().values


class _UncheckedAssign(torch.autograd.Function):
    """``apply(scratch, value, index)``: ``value`` written into ``scratch[index]`` behind autograd's back, for a buffer that is
    filled part by part and not read where it is written later."""

    @staticmethod
    def forward(ctx: Any, scratch: Tensor, value: Tensor, index: Any) -> Tensor:
        ctx.place = index
        scratch.data.__setitem__(index, value)
        return scratch

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor, None]:
        return cotangent, cotangent[ctx.place], None


STEPPING = (
    "_optimal_step_size", "_select_initial_step", "_compute_error_ratio", "_runge_kutta_step", "_interp_evaluate", "_interp_fit",
    "find_event",
)
"""Functions of this module that its solvers look up here at each use, so that whoever replaces them is heard."""
