"""``solve``: the front door. It checks and resolves everything before f is called for the first time."""

from __future__ import annotations

import dataclasses
import inspect
import math
import numbers
import operator
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .adjoint import ADJOINTS, Adjoint
from .control import CONTROLLERS, Controller, Jump
from .events import Event, check_events, report
from .field import Field
from .interpolate import DenseOutput
from .layout import Layout, transforms_active
from .loop import Plan, Step, Times, Trajectory
from .methods import METHODS, Method, stiffness, unseen
from .norms import ErrorNorm
from .problem import callable_field, demand, potential
from .registry import all_options, claim_options, nearest, option_owner, options_of
from .saveat import KINDS, SaveAt
from .solution import Last, Solution, Stats
from .status import (
    ERRORS,
    FIRST_FAILURE,
    ArgumentError,
    ArgumentTypeError,
    RoundingWarning,
    Status,
    StiffnessWarning,
    UnknownNameError,
    UnsupportedError,
)

FAR = 1e300
"""Longest step of a solve without an end: a solution at rest lets steps grow until t overflows."""


def solve(
    field: Callable[..., Any],
    y0: Any,
    t: Any,
    *,
    method: str | Method = "dopri5",
    rtol: Any = 1e-6,
    atol: Any = 1e-9,
    controller: str | Controller | None = None,
    adjoint: str | Adjoint = "backprop",
    inner: Any = "auto",
    save: Any = None,
    batch_dim: int | None = None,
    batch_index: Tensor | None = None,
    args: tuple[Any, ...] = (),
    throw: bool = True,
    progress: bool = False,
    dense: bool = False,
    dt: Any = None,
    num_steps: int | None = None,
    dt0: Any = None,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
    force_dt_min: bool = False,
    max_steps: int = 100_000,
    step_t: Any = (),
    jumps: Sequence[Jump] = (),
    events: Sequence[Event] = (),
    max_events: int | None = None,
    observer: Callable[[Step], Any] | None = None,
    norm: Callable[[Any], Tensor] | None = None,
    time_dtype: torch.dtype | None = None,
    **options: Any,
) -> Solution:
    """Integrate dy/dt = f(t, y, *args) and return the solution at the times ``t``.

    Args:
        field: f, called as ``f(t, y, *args)`` with ``t`` 0-dim (joint) or ``(B,)`` and ``y`` like ``y0``.
        y0: the state: a tensor of any shape, or a tuple, list, dict or nested tree of tensors; real or complex.
        t: output times, strictly monotone: ``(T,)``, or ``(B, T)`` in the batched modes, where rows may start, end and run
            differently and be NaN-padded at their end. ``y[0]`` is the state at ``t[0]``. Differentiable. The last one may be
            infinite where a terminal event or ``max_events`` ends the solve.
        method: a name in ``solvers.METHODS`` or a :class:`~solvers.Method`.
        rtol, atol: tolerances of the local error: numbers, or tensors broadcastable to the state (units: none; those of y).
        controller: "i" (default), "pi", "pid", "fixed", or a :class:`~solvers.Controller`. "fixed" alone steps on ``t``.
        adjoint: "backprop", "checkpoint", "backsolve", or an :class:`~solvers.Adjoint`.
        inner: the inner solver of an implicit method, by name or instance; "auto": the method's own choice.
        save: None or "t": at ``t``; "final"; "steps": every accepted step; or a function ``(t, y) -> tree`` kept at ``t``
            in place of y; or a pair of one of those names and a function.
        batch_dim: None: one step size for the whole state. 0: dimension 0 counts samples, each with its own steps.
        batch_index: ``(R,)`` integers: dimension 0 counts rows that belong to groups, each group with its own steps.
        args: passed on to f; any gradient it needs is found.
        throw: raise the exception of a failed solve (it carries ``.solution``); False: return what was reached.
        progress: show a bar in t on a terminal.
        dense: keep every step, for ``solution.dense(t)``.
        dt, num_steps: constant steps of this size (> 0) or number. dt0: the first step of an adaptive solve.
        dt_min: a smaller step is a failure (``force_dt_min``: is accepted and counted instead). dt_max: limit on steps.
        max_steps: attempted steps, per sample.
        step_t: times that steps must end at, ``(S,)`` (or ``(B, S)``). jumps: :class:`~solvers.Jump` s.
        events: :class:`~solvers.Event` s; those that fire are in ``solution.events``. max_events: the solve (the sample) ends
            at the event that makes so many.
        observer: called with a :class:`~solvers.Step` after every accepted step; true stops the solve (or, ``(B,)``, samples).
        norm: of the scaled error, from a tree like the state to a 0-dim tensor (``(B,)`` in the batched modes).
        time_dtype: dtype of the ``t`` that f sees; None: the state's real dtype.
        **options: options of the chosen method, controller, adjoint or inner solver.

    Returns a :class:`~solvers.Solution`.

    Raises ``ArgumentError`` / ``ArgumentTypeError`` / ``UnknownNameError`` before any work for what cannot be used, and
    one of ``NonFiniteError, StepUnderflowError, MaxStepsError, InnerSolverError`` after a failed solve. Warns with
    ``StiffnessWarning`` after a solve in many steps that stability, not accuracy, had kept short, with ``RoundingWarning``
    after one whose steps rounding errors had decided.
    """
    field = callable_field(field)
    _check_field(field, args)
    layout = Layout(y0, batch_dim, batch_index)
    events = check_events(events, max_events)
    times = _parse_times(t, layout, open_end=max_events is not None or any(event.terminal for event in events))
    endless = bool(events) and bool(torch.isinf(times.detach()).any())
    fixed = _fixed_mode(controller, dt, num_steps, dt0, layout, endless)
    scheme = _choose("method", METHODS, method, Method)
    demand(scheme, field)
    steering = _choose_controller(controller, scheme, fixed)
    derivative = _choose("adjoint", ADJOINTS, adjoint, Adjoint)
    scheme, steering, derivative = _apply_options(scheme, steering, derivative, inner, options)
    scheme = scheme if fixed is None else scheme.at_fixed_steps()
    scheme.check(layout)
    error_norm = ErrorNorm(layout, rtol, atol, norm)
    jumps = _check_jumps(jumps, layout)
    moving = any(event.reset is not None for event in events)
    user_times = Times(times, _parse_step_t(step_t, layout), fixed, moving=moving)
    _check_limits(dt_min, dt_max, force_dt_min, max_steps, observer, time_dtype)
    clock = user_times.clock(layout, jumps)
    plan = Plan(
        field=Field(field, layout, args, time_dtype, error_norm),
        layout=layout,
        method=scheme,
        controller=steering,
        norm=error_norm,
        clock=clock,
        save=_parse_save(save)._replace(time_dtype=time_dtype or layout.real_dtype),
        jumps=jumps,
        dt0=_first_dt(dt0, clock, fixed, layout, dt_min, dt_max),
        dt_min=float(dt_min),
        dt_max=min(float(dt_max), FAR) if endless else float(dt_max),
        force_dt_min=force_dt_min,
        max_steps=max_steps,
        observer=_with_progress(observer, clock, layout) if progress else observer,
        dense=dense,
        times=user_times,
        events=events,
        max_events=max_events,
    )
    if transforms_active() and events:
        raise UnsupportedError("torch.func transforms hide the values that events depend on: use torch.autograd")
    if transforms_active() and (scheme.implicit or scheme.reads_values):
        raise UnsupportedError(
            f"torch.func transforms do not go through the systems that method {scheme.name!r} solves: use torch.autograd, or an "
            "explicit Runge-Kutta or Adams method"
        )
    stats = Stats()
    start = layout.flatten(y0).resolve_conj().resolve_neg()
    if dense:  # which begins with this tensor, and the caller may change his later
        start = start.clone()
    run = partial(_transformed, derivative.run) if transforms_active() and steering.adaptive else derivative.run
    return _finish(plan, run(plan, start, stats), stats, throw)


def _transformed(run: Callable[..., Trajectory], plan: Plan, start: Tensor, stats: Stats) -> Trajectory:
    """A solve under torch.func whose steps are chosen: by values, which derivatives leave readable and ``vmap`` hides."""
    try:
        start.detach().sum().item()  # a mapped y0 is refused before f is called
        return run(plan, start, stats)
    except RuntimeError as error:
        if "vmap" not in str(error):
            raise
        raise UnsupportedError(
            "torch.func.vmap hides the values that the sizes of steps depend on: map over a solve with fixed steps (dt= or "
            "num_steps=), or solve the batch in one call, batch_dim=0, with steps of its own for every sample"
        ) from error


# -- arguments --------------------------------------------------------------------------------------------------------


def check_options(field: Any, **options: Any) -> None:
    """Raise what ``solve(field, y0, t, **options)`` would about everything that needs neither a state nor times."""
    defaults = {p.name: p.default for p in inspect.signature(solve).parameters.values() if p.kind is p.KEYWORD_ONLY}
    given = defaults | {name: value for name, value in options.items() if name in defaults}
    rest = {name: value for name, value in options.items() if name not in defaults}
    field = callable_field(field)
    _check_field(field, given["args"])
    dt = given["dt"]
    whole: Any = 1.0 if isinstance(dt, Tensor) and dt.dim() > 0 else dt  # one dt per sample is a matter of the state
    fixed = _fixed_mode(given["controller"], whole, given["num_steps"], given["dt0"], None)
    method = _choose("method", METHODS, given["method"], Method)
    demand(method, field)
    controller = _choose_controller(given["controller"], method, fixed)
    adjoint = _choose("adjoint", ADJOINTS, given["adjoint"], Adjoint)
    _apply_options(method, controller, adjoint, given["inner"], rest)
    check_events(given["events"], given["max_events"])
    _check_limits(*(given[name] for name in _LIMITS))
    _parse_save(given["save"])


_LIMITS = ("dt_min", "dt_max", "force_dt_min", "max_steps", "observer", "time_dtype")


def _check_field(field: Any, args: Any) -> None:
    if not callable(field):
        raise ArgumentTypeError(f"field must be callable as f(t, y, *args), found {type(field).__name__}")
    if not isinstance(args, tuple):
        raise ArgumentTypeError(f"args must be a tuple, found {type(args).__name__}: write args=(x,)")


def _choose(kind: str, registry: Any, choice: Any, base: type) -> Any:
    if isinstance(choice, str):
        return registry[choice]
    if isinstance(choice, base):
        return choice
    raise ArgumentTypeError(f"{kind} must be a name or a {base.__name__}, found {type(choice).__name__}")


def _fixed_mode(
    controller: Any, dt: Any, num_steps: Any, dt0: Any, layout: Layout | None, endless: bool = False
) -> Any:
    """None for adaptive steps, "grid", a positive dt, or an int number of steps."""
    if dt is not None and num_steps is not None:
        raise ArgumentError(f"dt={dt!r} and num_steps={num_steps!r} exclude each other")
    named = controller is not None and not (controller == "fixed" or getattr(controller, "adaptive", True) is False)
    if (dt is not None or num_steps is not None) and named:
        raise ArgumentError(f"dt= and num_steps= mean fixed steps, which controller={controller!r} does not take")
    if num_steps is not None:
        if not isinstance(num_steps, numbers.Integral) or isinstance(num_steps, bool) or num_steps < 1:
            raise ArgumentError(f"num_steps must be an integer >= 1, found {num_steps!r}")
        fixed: Any = int(num_steps)
    elif dt is not None:
        fixed = _positive_step(dt, "dt", layout)
    elif controller is not None and not named:
        fixed = "grid"
    else:
        return None
    if dt0 is not None:
        raise ArgumentError("dt0 is the first step of an adaptive solve: for fixed steps give dt= or num_steps=")
    if endless and dt is None:
        raise ArgumentError("a solve without an end (t[-1] infinite) in fixed steps needs their size, dt=")
    return fixed


def _positive_step(dt: Any, what: str, layout: Layout | None) -> Any:
    if isinstance(dt, Tensor) and dt.requires_grad:
        raise ArgumentError(f"{what} cannot require a gradient: pass {what}.detach(), or num_steps= with a t that requires one")
    if isinstance(dt, Tensor) and dt.dim() > 0:
        if layout is None or layout.joint or dt.shape != (layout.batch,):
            raise ArgumentError(f"{what} must be a number or of shape (B,) in a batched mode, found {tuple(dt.shape)}")
        low = float(dt.min())
    elif isinstance(dt, (numbers.Real, Tensor)) and not isinstance(dt, bool):
        low = dt = float(dt)
    else:
        raise ArgumentTypeError(f"{what} must be a number, found {type(dt).__name__}")
    if not low > 0 or not math.isfinite(low):
        raise ArgumentError(f"{what} must be positive and finite, found {low} (its sign follows t)")
    return dt


def _first_dt(dt0: Any, clock: Any, fixed: Any, layout: Layout, dt_min: float, dt_max: float) -> Any:
    if fixed is not None:
        value = clock.fixed_dt.detach()
        return value.item() if layout.joint else value.clone()
    if dt0 is None:
        return None
    # Its sign is that of t, so that the dt of an earlier solve, which has one, can be given.
    signless = isinstance(dt0, (int, float, Tensor)) and not isinstance(dt0, bool)
    size = _positive_step(abs(dt0.detach() if isinstance(dt0, Tensor) else dt0) if signless else dt0, "dt0", layout)
    if layout.joint:
        return math.copysign(min(max(size, dt_min), dt_max), clock.end - clock.start)
    return torch.as_tensor(size, dtype=torch.float64, device=layout.device).clamp(dt_min, dt_max) * clock.sign


def _choose_controller(controller: Any, method: Method, fixed: Any) -> Controller:
    if fixed is not None:
        if method.variable_order:
            raise ArgumentError(
                f"method {method.name!r} chooses its own steps and order: for fixed steps take 'explicit_adams' or "
                "'implicit_adams'"
            )
        return controller if isinstance(controller, Controller) else CONTROLLERS["fixed"]
    if method.error_order is None:
        raise ArgumentError(
            f"method {method.name!r} has no error estimate to choose steps by: give dt=, num_steps= or "
            "controller='fixed' (steps on t)"
        )
    chosen = _choose("controller", CONTROLLERS, method.controller if controller is None else controller, Controller)
    if chosen.adaptive and chosen.variable_order != method.variable_order:
        raise ArgumentError(
            f"controller={controller!r} does not fit method {method.name!r}, whose order is "
            f"{'variable' if method.variable_order else 'fixed'}: leave it away, or take {method.controller!r}"
        )
    return chosen


def _apply_options(
    method: Method, controller: Controller, adjoint: Adjoint, inner: Any, options: dict[str, Any]
) -> tuple[Method, Controller, Adjoint]:
    """Route each option to the part that owns it; unknown ones raise with the nearest known name."""
    parts: dict[str, Any] = {"method": method, "controller": controller, "adjoint": adjoint}
    optimiser = method.choose_inner(inner)
    if optimiser is not None:
        parts["inner solver"] = optimiser
    chosen: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        owner = option_owner(name)
        if owner is None:
            raise UnknownNameError(f"unknown option {name!r}: {nearest(name, all_options())}")
        part = parts.get(owner)
        if part is None or name not in options_of(part):
            label = "none" if part is None else getattr(part, "name", type(part).__name__)
            raise ArgumentError(f"option {name!r} belongs to another {owner} than the chosen one ({label})")
        chosen.setdefault(owner, {})[name] = value
    for owner, values in chosen.items():
        parts[owner] = dataclasses.replace(parts[owner], **values)
    if "inner solver" in parts:
        parts["method"] = dataclasses.replace(parts["method"], inner=parts["inner solver"])
    return parts["method"], parts["controller"], parts["adjoint"]


def _parse_times(t: Any, layout: Layout, open_end: bool = False) -> Tensor:
    """Times as ``(T,)`` or, in the batched modes, ``(B, T)``, float64 on the state's device.

    ``open_end``: whether the last one may be infinite.
    """
    if isinstance(t, Tensor):
        times = t
    elif isinstance(t, np.ndarray) or (isinstance(t, (list, tuple)) and len(t) and isinstance(t[0], (list, tuple))):
        try:
            times = torch.as_tensor(t)
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentTypeError(f"t must hold numbers, in rows of one length, found {t!r:.60}") from None
    else:
        try:
            entries = [torch.as_tensor(entry, dtype=torch.float64, device=layout.device) for entry in t]
            times = torch.stack(torch.broadcast_tensors(*entries), dim=-1) if entries else torch.zeros(0)
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentTypeError(f"t must be a tensor or a sequence of numbers, found {t!r:.60}") from None
    if times.is_complex() or times.dtype == torch.bool:
        raise ArgumentTypeError(f"t must be real, found {times.dtype}")
    times = times.to(device=layout.device, dtype=torch.float64)
    if layout.joint and times.dim() != 1:
        raise ArgumentError(
            f"t must have shape (T,), found {tuple(times.shape)}: times per sample need batch_dim=0 or batch_index="
        )
    if not layout.joint:
        if times.dim() == 1:
            times = times.expand(layout.batch, -1)
        if times.dim() != 2 or times.shape[0] != layout.batch:
            raise ArgumentError(f"t must have shape (T,) or ({layout.batch}, T), found {tuple(times.shape)}")
    if times.shape[-1] == 0:
        raise ArgumentError("t must hold at least one time, found none")
    _check_times(times.detach(), layout.joint, open_end)
    return times


def _check_times(t: Tensor, joint: bool, open_end: bool) -> None:
    if joint:
        try:
            v = t.tolist()
        except RuntimeError as error:
            raise UnsupportedError(
                "the values of t decide what is done, so torch.func.vmap cannot map over them: give (B, T) times and batch_dim=0"
            ) from error
        ordered = all(map(operator.lt, v, v[1:])) or all(map(operator.gt, v, v[1:]))
        if ordered and math.isfinite(v[0]) and (math.isfinite(v[-1]) or open_end):
            return
    rows = t.unsqueeze(0) if joint else t
    bad = torch.isinf(rows) | (torch.isnan(rows) if joint else torch.zeros_like(rows, dtype=torch.bool))
    known = ~torch.isnan(rows)
    # NaN pads rows at their end only: none first, none before a time.
    needed = known.long().flip(1).cumsum(1).flip(1) > 0
    needed[:, 0] = True
    if open_end:
        last = needed & ~needed.roll(-1, 1)
        last[:, -1] = needed[:, -1]
        last[:, 0] = False
        bad &= ~(last & torch.isinf(rows))
    bad |= needed & ~known
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        place = f"t[{column}]" if joint else f"t[{row}, {column}]"
        raise ArgumentError(
            f"t must be finite (NaN may only pad the end of a row, and infinity needs a terminal event to end at), found "
            f"{place} = {rows[row, column]}"
        )
    difference = rows.diff(dim=1)
    if difference.numel() == 0:
        return
    wrong = ~torch.isnan(difference) & (difference * torch.where(difference[:, :1] >= 0, 1.0, -1.0) <= 0)
    # Two equal times are an empty interval, which is solved without a step.
    wrong &= ~((known.sum(1, keepdim=True) == 2) & (difference == 0))
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        prefix = "" if joint else f"{row}, "
        raise ArgumentError(
            f"t must be strictly increasing or decreasing, found t[{prefix}{column}] = {rows[row, column]:.17g} followed by "
            f"t[{prefix}{column + 1}] = {rows[row, column + 1]:.17g}"
        )


def _parse_step_t(step_t: Any, layout: Layout) -> tuple[Any, ...]:
    if step_t is None:
        return ()
    try:
        times = torch.as_tensor(step_t, dtype=torch.float64, device=layout.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentTypeError(f"step_t must be a tensor or a sequence of numbers, found {step_t!r:.60}") from None
    if times.dim() == 1 or (times.dim() == 2 and not layout.joint and times.shape[0] == layout.batch):
        finite = torch.isfinite(times)
        if not bool(finite.all()):
            raise ArgumentError(f"step_t must be finite, found {times[~finite][0].item()}")
        return tuple(times.tolist()) if times.dim() == 1 else tuple(times.unbind(1))
    raise ArgumentError(f"step_t must have shape (S,), or (B, S) in a batched mode, found {tuple(times.shape)}")


def _check_jumps(jumps: Any, layout: Layout) -> tuple[Jump, ...]:
    if not isinstance(jumps, (list, tuple)):
        found = type(jumps).__name__
        raise ArgumentTypeError(f"jumps must be a sequence of Jump, found {found}: write jumps=[Jump(...)]")
    for number, jump in enumerate(jumps):
        if not isinstance(jump, Jump):
            raise ArgumentTypeError(f"jumps[{number}] must be a Jump, found {type(jump).__name__}")
        if jump.map is not None and not callable(jump.map):
            found = type(jump.map).__name__
            raise ArgumentTypeError(f"the map of jumps[{number}] must be callable or None, found {found}")
        shape = tuple(jump.t.shape) if isinstance(jump.t, Tensor) else ()
        if shape not in ((), (layout.batch,)) or (layout.joint and shape):
            raise ArgumentError(f"t of jumps[{number}] must be a number, or (B,) in a batched mode, found shape {shape}")
        if not isinstance(jump.t, (int, float, Tensor)):
            raise ArgumentTypeError(f"t of jumps[{number}] must be a number or tensor, found {type(jump.t).__name__}")
        times = torch.as_tensor(jump.t).detach()
        bad = torch.isinf(times) | (torch.isnan(times) & layout.joint)
        if not transforms_active() and bool(bad.any()):
            worst = times[bad][0].item()
            raise ArgumentError(f"t of jumps[{number}] must be finite (NaN, per sample: no jump), found {worst}")
    return tuple(jumps)


def _check_limits(dt_min: Any, dt_max: Any, force_dt_min: Any, max_steps: Any, observer: Any, time_dtype: Any) -> None:
    for name, value in (("dt_min", dt_min), ("dt_max", dt_max)):
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ArgumentTypeError(f"{name} must be a number, found {value!r:.40}")
    if not 0 <= dt_min < math.inf:
        raise ArgumentError(f"dt_min must be a finite number >= 0, found {dt_min!r}")
    if not dt_max > 0:
        raise ArgumentError(f"dt_max must be a number > 0, found {dt_max!r}")
    if dt_min > dt_max:
        raise ArgumentError(f"dt_min={dt_min} must not exceed dt_max={dt_max}")
    if force_dt_min and dt_min == 0:
        raise ArgumentError("force_dt_min=True needs a dt_min= > 0 to accept steps at, found 0")
    if not isinstance(max_steps, numbers.Integral) or isinstance(max_steps, bool) or max_steps < 1:
        raise ArgumentError(f"max_steps must be an integer >= 1, found {max_steps!r}")
    if observer is not None and not callable(observer):
        raise ArgumentTypeError(f"observer must be callable, found {type(observer).__name__}")
    if time_dtype not in (None, torch.float32, torch.float64):
        raise ArgumentError(f"time_dtype must be None, torch.float32 or torch.float64, found {time_dtype!r}")


def _parse_save(save: Any) -> SaveAt:
    if save is None:
        return SaveAt()
    if isinstance(save, tuple) and len(save) == 2 and isinstance(save[0], str) and callable(save[1]):
        return _parse_save(save[0])._replace(fn=save[1])
    if isinstance(save, str):
        if save not in KINDS:
            raise UnknownNameError(f"unknown save {save!r}: {nearest(save, KINDS)}")
        return SaveAt(save)
    if callable(save):
        return SaveAt(fn=save)
    raise ArgumentTypeError(f"save must be None, one of {KINDS}, a function (t, y), or a pair of both, found {save!r:.40}")


# -- results ----------------------------------------------------------------------------------------------------------


def _finish(plan: Plan, trajectory: Trajectory, stats: Stats, throw: bool) -> Solution:
    layout = plan.layout
    for name, value in trajectory.counts.items():
        setattr(stats, name, value)
    stats.energy = _energies(plan, trajectory)
    status = torch.as_tensor(trajectory.status, dtype=torch.int8)
    last = Last(trajectory.t_last, layout.unflatten(trajectory.y_last), trajectory.dt_last)
    solution = Solution(
        t=trajectory.t,
        y=trajectory.values if plan.save.fn is not None else layout.unflatten(trajectory.values),
        status=status,
        message=_message(plan, trajectory, status, stats),
        stats=stats,
        last=last,
        events=report(layout, trajectory.events),
    )
    if plan.dense:
        start = plan.clock.start
        solution.dense_output = DenseOutput(
            plan.method, layout, trajectory.pieces, start, trajectory.t_last, trajectory.y_last
        )
    if throw and not solution.success:
        worst = Status(int(status.max()))
        raise ERRORS[worst](solution.message, solution)
    if solution.success:
        _warn_of_stiffness(plan, trajectory, stats)
        _warn_of_rounding(plan, stats)
    return solution


@torch.no_grad()
def _energies(plan: Plan, trajectory: Trajectory) -> Tensor | None:
    """The energy of every output where the method minimises it."""
    field = plan.field
    used = getattr(plan.method, "energy", False) and plan.save.fn is None
    value = potential(field.func, plan.layout, field.args) if used else None
    if value is None:
        return None
    return torch.stack([value(field.time(t), y) for t, y in zip(trajectory.t.unbind(-1), trajectory.values, strict=True)])


def _message(plan: Plan, trajectory: Trajectory, status: Tensor, stats: Stats) -> str:
    worst = Status(int(status.max())) if status.numel() else Status.SUCCESS
    if worst < FIRST_FAILURE:
        done = _DONE[worst]
        return f"{plan.method.name} {done} with {stats.nfe} evaluations of f."
    samples = (status == worst).flatten().nonzero().flatten()
    first = int(samples[0])
    t, dt = trajectory.t_last, trajectory.dt_last
    if not plan.layout.joint:
        t, dt = float(t[first]), float(dt[first])
        shown = ", ".join(str(i) for i in samples[:8].tolist()) + (", ..." if len(samples) > 8 else "")
        who = f" in {len(samples)} of {status.numel()} samples ({shown}; the first: "
    else:
        who = " ("
    place = f"{who}t = {t:.9g}, dt = {dt:.3g}, nfe = {stats.nfe})"
    what = _WHAT[worst]
    if plan.events and worst == Status.NON_FINITE:
        what = what.replace("f or", "f, an event function or")
    return f"{what}{place}. {_remedy(plan, trajectory, worst, first, stats)}"


_DONE = {
    Status.SUCCESS: "reached the end",
    Status.STOPPED: "stopped by the observer",
    Status.EVENT: "ended at an event",
    Status.MAX_EVENTS: "ended after max_events events",
}

_WHAT = {
    Status.NON_FINITE: "f or the state is not finite, however small the step",
    Status.STEP_UNDERFLOW: "the step size underflowed",
    Status.MAX_STEPS: "max_steps was reached before the end",
    Status.INNER_NOT_CONVERGED: "the inner solver of an implicit step did not converge",
    Status.EVENTS_ACCUMULATE: "events follow each other faster than t can tell apart",
}


def _remedy(plan: Plan, trajectory: Trajectory, status: Status, sample: int, stats: Stats) -> str:
    if status == Status.NON_FINITE:
        fixed = "" if plan.controller.adaptive else "a smaller dt= or an adaptive controller, "
        return f"The state that was reached is in .last; look at f there, or try {fixed}batch_dim=0 to spare other samples"
    if status == Status.EVENTS_ACCUMULATE:
        return "End the solve before that: by max_events=, or a terminal event for what the others lead to"
    if status == Status.INNER_NOT_CONVERGED:
        return f"Try {plan.method.remedy}"
    text = (
        f"Raise max_steps (now {plan.max_steps}) or loosen rtol and atol"
        if status == Status.MAX_STEPS
        else f"The solution may be singular here; else loosen rtol and atol or lower dt_min (now {plan.dt_min:g})"
    )
    held = _held_back(plan, trajectory, sample, stats)
    return f"{text}; {held}" if held else text


STIFF = 0.6
"""Share of the method's stability limit that a controller keeps to where stability, not accuracy, limits the step."""
MANY = 1000
"""Accepted steps from which on it is worth the dozen calls of f to ask whether they had to be so many."""
MANY_IMPLICIT = 300
"""The same of an implicit method, to judge by how many it repeated."""
GUARD_DIGITS = 1e4
"""rtol in units of the machine epsilon below which rounding is suspected."""
FOR_STIFF = ("auto", "prox_bdf", "esdirk547")
"""Methods for any stiff problem: the first that there is."""


def _warn_of_stiffness(plan: Plan, trajectory: Trajectory, stats: Stats) -> None:
    """``StiffnessWarning`` after a long solve whose steps, where it ended, stability had limited."""
    accepted = torch.as_tensor(stats.accepted).reshape(-1)
    if not accepted.numel() or int(accepted.max()) < MANY:
        return
    held = _held_back(plan, trajectory, int(accepted.argmax()), stats)
    if held:
        warnings.warn(
            f"{plan.method.name} took {int(accepted.max())} steps: {held}", StiffnessWarning, stacklevel=_outside()
        )


def _warn_of_rounding(plan: Plan, stats: Stats) -> None:
    """``RoundingWarning`` where a tolerance is near rounding and implicit steps were repeated as chance would have it: errors of
    a method shrink with the step, and few steps are repeated; those of f, where rates cancel, do not."""
    precision = torch.finfo(plan.layout.real_dtype).eps
    fine = float(torch.as_tensor(plan.norm.rtol).min()) < GUARD_DIGITS * precision
    if not (fine and plan.method.implicit and plan.controller.adaptive):
        return
    # Explicit steps of the same solve are repeated for reasons of their own.
    explicit = sum(int(n) for name, n in stats.nfe_by_method.items() if not METHODS[name].implicit)
    limit = plan.controller.repeats if explicit < 0.1 * int(stats.nfe) else Controller.repeats
    accepted, rejected = (torch.as_tensor(x).reshape(-1) for x in (stats.accepted, stats.rejected))
    if bool(((accepted >= MANY_IMPLICIT) & (rejected > limit * accepted)).any()):
        warnings.warn(
            f"{plan.method.name} took {int(accepted.max())} steps and repeated {int(rejected.max())}: rounding errors of f in "
            f"{plan.layout.dtype} are as large as its tolerance, and what they decide may be wrong altogether. Try "
            "torch.float64, another unit for the largest rates, or a larger rtol",
            RoundingWarning, stacklevel=_outside(),
        )  # fmt: skip


def _outside() -> int:
    """The ``stacklevel``, for a warning by the caller, of the first frame that is neither in this package nor in torch."""
    level, frame = 2, sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith((f"{__package__}.", "torch.")):
        level, frame = level + 1, frame.f_back
    return level


def _held_back(plan: Plan, trajectory: Trajectory, sample: int, stats: Stats) -> str | None:
    """What to say of a sample whose steps stability limited where it ended; None of others."""
    if not math.isfinite(plan.method.real_limit):
        return None
    ratio = _stiffness(plan, trajectory, sample, stats)
    if ratio is None or ratio <= STIFF * plan.method.real_limit:
        return None
    names = [name for name in FOR_STIFF if name in METHODS]
    return (
        f"the step size is limited by stability (dt times the spectral radius is {ratio:.2g}), "
        f"try method={names[0]!r}, or 'rkc2' for diffusion"
    )


@torch.no_grad()
def _stiffness(plan: Plan, trajectory: Trajectory, sample: int, stats: Stats, iterations: int = 12) -> float | None:
    """|dt| rho(df/dy) of a sample where the solve ended, by the nonlinear power method; None if it cannot be told, 0 if the
    mode found does not decay (of growing and swinging ones, accuracy asks for small steps)."""
    if plan.method.implicit or not plan.controller.adaptive:
        return None
    field, layout = plan.field, plan.layout
    y = trajectory.y_last.detach()
    t = field.time(trajectory.t_last)
    try:
        stats.nfe += 1
        base = field(t, y)
        direction = base + 1e-3 * torch.sin(torch.arange(y.numel(), device=y.device)).view_as(y).to(y.dtype)
        small, seen = torch.finfo(layout.real_dtype).eps ** 0.5 * (layout.norm(y) + 1e-8), unseen(layout, y)
        for _ in range(iterations):
            stats.nfe += 1
            unit = direction / layout.spread(layout.ops.maximum(layout.norm(direction), 1e-30))
            direction = (field(t, y + layout.spread(small) * unit) - base) / layout.spread(small)
            found, seen = stiffness(layout, 1.0, unit, layout.spread(trajectory.dt_last) * direction, seen)
    except Exception:  # f failing here must not hide the failure that is being reported
        return None
    value = torch.as_tensor(found).reshape(-1)[sample].item()
    return value if math.isfinite(value) else None


def _with_progress(observer: Any, clock: Any, layout: Layout) -> Callable[[Step], Any]:
    """``observer`` plus a line on the terminal that shows how far t has come."""
    if not sys.stderr.isatty():
        return observer if observer is not None else lambda step: False

    def show(step: Step) -> Any:
        done = torch.as_tensor(step.t - clock.start) / (clock.end - clock.start)
        # Samples whose interval is empty are there already.
        done = float(done.nan_to_num(1.0).min())
        bar = "#" * int(30 * done)
        sys.stderr.write(f"\r[{bar:<30}] {100 * done:5.1f} % of t{chr(10) if done >= 1 else ''}")
        sys.stderr.flush()
        return observer(step) if observer is not None else False

    return show


claim_options("solve", [p for p in inspect.signature(solve).parameters if p != "options"])
