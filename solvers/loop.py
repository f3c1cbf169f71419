"""The time loop. Nothing else in this package steps through time.

One attempt: clip the step to the next stop, take it, judge it, keep or drop it, save what lies in it. ``_Run`` holds what
every mode shares; ``_JointRun`` and ``_RowRun`` differ only in how a judged step is settled: with Python control flow, or
with masks and a single read from the device per step.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .control import Controller, JointClock, Jump, RowClock, initial_step
from .events import Chunk, Event, Found, Log, Lookout, Outcome, carry_out, log
from .field import Field
from .layout import Layout, carries_gradient, transforms_active
from .methods import Method
from .norms import ErrorNorm
from .optim.base import joined
from .saveat import JointSaver, RowSaver, SaveAt, Segment
from .status import ArgumentError, Status

ROUNDING = 1.0 / 16.0
"""A step is below rounding when a sixteenth of it does not change t: stages could not be told apart."""


SHORTER = 0.25
"""What becomes of the size of a step in which an event function is NaN."""


IN_PLACE = "f changed its argument y in place, which is the solver's state: let it work on y.clone()"


class Step(NamedTuple):
    """What an observer sees after a step: its end ``t``, ``dt``, the user's ``y``, the error in units of the tolerance
    (None for fixed steps) and, in the batched modes, which samples accepted it."""

    t: Any
    dt: Any
    y: Any
    error: Any
    accepted: Any


class Record(NamedTuple):
    """One accepted step, as much of it as a replay needs. ``y`` and ``state`` are those before the step; ``dense`` is
    None unless the tape has a true attribute ``dense``, and good until the next step only. ``after``: whether the step starts
    at a jump (a mask in the batched modes). Where ``events`` cut the step
    short, ``t1``, ``h`` and ``hit`` are those of the whole one."""

    t: Any
    t1: Any
    h: Any
    hit: Any
    stop: Any
    outputs: Any
    jumps: Any
    accept: Any
    active: Any
    y: Tensor | None
    state: Any
    dense: Any = None
    events: Found | None = None
    after: Any = False


class Piece(NamedTuple):
    """One step of the dense output: from ``t`` to ``t1``; ``lo`` and ``h`` are its start and length with the gradients that
    they carry."""

    t: Any
    t1: Any
    dense: Any
    accept: Any
    lo: Any
    h: Any


@dataclass
class Plan:
    """Everything that a solve is made of, checked and resolved."""

    field: Field
    layout: Layout
    method: Method
    controller: Controller
    norm: ErrorNorm
    clock: JointClock | RowClock
    save: SaveAt
    jumps: tuple[Jump, ...] = ()
    dt0: Any = None
    dt_min: float = 0.0
    dt_max: float = math.inf
    force_dt_min: bool = False
    max_steps: int = 100_000
    observer: Callable[[Step], Any] | None = None
    dense: bool = False
    times: Times | None = None
    initial: Callable[..., tuple[Any, int]] = initial_step
    events: tuple[Event, ...] = ()
    max_events: int | None = None

    def rebind(self, t: Tensor, args: tuple[Any, ...], jump_times: tuple[Any, ...]) -> Plan:
        """The same plan on other (differentiable) times and arguments of the same shapes and values."""
        field, norm = self.field, self.norm
        assert self.times is not None
        jumps = tuple(Jump(time, jump.map) for time, jump in zip(jump_times, self.jumps, strict=True))
        norm = copy.copy(norm)
        return dataclasses.replace(
            self,
            field=field.renewed(args, norm),
            norm=norm,
            jumps=jumps,
            times=self.times._replace(t=t),
            clock=self.times._replace(t=t).clock(self.layout, jumps),
        )


class Times(NamedTuple):
    """The user's times: ``t`` ``(T,)`` or ``(B, T)`` float64; ``step_t`` columns; ``fixed``: None, "grid", a signed dt,
    or an int, the number of steps; ``clip_end``: whether the last step is shortened to the end (joint mode may leave it);
    ``moving``: whether steps may start at the time of an event."""

    t: Tensor
    step_t: tuple[Any, ...] = ()
    fixed: Any = None
    clip_end: bool = True
    moving: bool = False

    def clock(self, layout: Layout, jumps: tuple[Jump, ...]) -> JointClock | RowClock:
        t = self.t
        # Those that may carry a gradient come first: of coinciding ones the first counts.
        stops: list[tuple[Any, int | None]] = [(jump.t, number) for number, jump in enumerate(jumps)]
        stops += [(time, None) for time in self.step_t]
        if self.fixed == "grid":
            live = carries_gradient(t)
            inner = t[..., 1:-1] if live else t[..., 1:-1].detach()
            columns = inner.unbind(-1) if live or not layout.joint else inner.tolist()
            stops = [(column, None) for column in columns] + stops
        fixed = None if self.fixed is None else self._fixed_dt()
        if layout.joint:
            return JointClock(t, stops, fixed, self.clip_end, self.moving)
        return RowClock(t, stops, fixed, self.moving)

    def _fixed_dt(self) -> Tensor:
        t = self.t
        last = t[..., -1]
        if t.dim() == 2:
            last = t.gather(1, ((t.detach() == t.detach()).sum(1) - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        span = last - t[..., 0]
        if self.fixed == "grid":
            return torch.copysign(torch.full_like(span.detach(), torch.inf), span.detach())
        if isinstance(self.fixed, int):
            return span / self.fixed
        return torch.copysign(torch.as_tensor(self.fixed, dtype=span.dtype, device=span.device), span.detach())


class Trajectory(NamedTuple):
    """What the loop found; times float64. ``values``: flat ``(T, *layout.shape)``, or a tree of what ``save.fn`` gave."""

    t: Tensor
    values: Any
    status: Any
    t_last: Any
    y_last: Tensor
    dt_last: Any
    counts: dict[str, Any]
    pieces: list[Piece]
    events: Log | None = None


def drive(
    plan: Plan, y0: Tensor, tape: Callable[[Record], None] | None = None, slope: Tensor | None = None
) -> Trajectory:
    """Integrate the flat state ``y0`` over ``plan.clock``; gradients flow where autograd is enabled.

    ``tape`` is called with a :class:`Record` of every step in which something was accepted. ``slope``: f at the start, where
    somebody has evaluated it; it counts as a call of f.
    """
    run: _Run = _JointRun(plan, y0, tape) if plan.layout.joint else _RowRun(plan, y0, tape)
    run.first_slope = slope
    run.start()
    while run.running:
        run.attempt()
    return run.finish()


class _Run(ABC):
    def __init__(self, plan: Plan, y0: Tensor, tape: Callable[[Record], None] | None) -> None:
        self.plan, self.layout = plan, plan.layout
        self.field = plan.field
        self.ops: Any = plan.layout.ops
        self.clock: Any = plan.clock
        self.tape = tape
        self.taped_dense = getattr(tape, "dense", False)
        self.y = y0
        self.t: Any = self.clock.start
        self.lo: Any = self.clock.first()
        self.running = True
        self.active: Any = True
        self.moving: Any = True
        self.attempts = 0
        self.nfe = 0
        self.algebra: dict[str, Any] = {}
        self.pieces: list[Piece] = []
        self.readable = plan.controller.adaptive or not transforms_active()
        self.grad = torch.is_grad_enabled()
        self.lookout = Lookout(plan.events, plan.max_events, plan.field) if plan.events else None
        self.happened: list[tuple[Found, Chunk]] = []
        self.ready: Any = None
        self.first_slope: Tensor | None = None
        self.controls: Any = ()
        self.after: Any = False

    def begin(self) -> None:
        """First evaluation, first step size, method and controller state."""
        plan = self.plan
        if self.lookout is not None:
            self.lookout.begin(self.t, self.y)
        version = None if self.y.is_inference() else self.y._version
        f0 = self.slope(self.y) if self.first_slope is None else self.first_slope
        self.nfe += self.first_slope is not None
        if version is not None and self.y._version != version:
            raise ArgumentError(IN_PLACE)
        with torch.no_grad():
            self.defined = self.layout.finite(f0) if self.readable else True
            self.dt = self._first_dt(f0)
            self.controls = plan.controller.init(self.ops, self.dt)
        self.state = plan.method.init(plan.field, self.lo, self.dt, self.y, f0)

    def _first_dt(self, f0: Tensor) -> Any:
        plan, clock = self.plan, self.clock
        if plan.dt0 is not None:
            return plan.dt0
        order = plan.method.error_order or plan.method.order + 1
        span = clock.end - clock.start
        if plan.method.exact and math.isfinite(float(torch.as_tensor(span).abs().max())):
            return self.ops.copysign(self.ops.minimum(abs(span), plan.dt_max), span)
        dt, work = plan.initial(plan.field, plan.norm, self.t, self.y, f0, order, span)
        self.nfe += work
        dt = _constant(dt)
        dt = self.ops.maximum(self.ops.minimum(dt, plan.dt_max), plan.dt_min)
        return self.ops.copysign(dt, span)

    def attempt(self) -> None:
        plan, clock = self.plan, self.clock
        if self.attempts >= plan.max_steps:
            self.give_up(Status.MAX_STEPS)
            return
        self.attempts += 1
        t1, h, hit = clock.propose(self.t, self.dt, self.moving)
        if plan.jumps:
            self.field = between_jumps(plan, self.t, t1, hit, self.after)
        if clock.differentiable:
            step, end = clock.graph(self.lo, t1, h, hit)
            out = plan.method.step(self.field, self.lo, step, self.y, self.state, self.active)
        else:
            step, end = h, t1
            out = plan.method.step(self.field, self.t, h, self.y, self.state, self.active)
        self.nfe += out.work
        self._count(out)
        if self.grad:
            with torch.no_grad():
                ratio, decision = self.judge(out)
        else:
            ratio, decision = self.judge(out)
        error = ratio[1] if isinstance(ratio, tuple) else ratio
        self.settle(out, decision, error, t1, h, hit, step, end)

    def _count(self, out: Any) -> None:
        algebra = out.algebra
        if out.spent is not None:
            total = self.algebra.setdefault("nfe_by_method", {})
            for name, work in out.spent.items():
                total[name] = total.get(name, 0) + work
        if algebra is not None:
            for name, number in (("njac", algebra.njac), ("nlu", algebra.nlu), ("nvjp", algebra.nvjp)):
                self.algebra[name] = self.algebra.get(name, 0) + number
            self.algebra["jacobian"] = algebra.how or self.algebra.get("jacobian", "")
            if algebra.inner:
                self.algebra["inner"] = joined(self.algebra.get("inner", ()), algebra.inner)

    def judge(self, out: Any) -> tuple[Any, Any]:
        """Error of the step and what the controller makes of it."""
        plan = self.plan
        ratio = self.measure(out)
        order = plan.method.error_order or 1
        return ratio, plan.controller.update(self.ops, ratio, order, self.controls, self.state)

    def measure(self, out: Any) -> Any:
        """Error in units of the tolerance; infinite where the step failed, 0 for a good fixed step."""
        plan, ops = self.plan, self.ops
        if plan.controller.adaptive:
            ratio = plan.method.ratio(plan.norm, self.y, out)
            ratio = tuple(map(_constant, ratio)) if isinstance(ratio, tuple) else _constant(ratio)
        elif self.readable:
            ratio = ops.where(self.layout.finite(out.y1), 0.0, math.inf)
        else:
            ratio = 0.0 if self.layout.joint else torch.zeros_like(self.clock.start)
        if out.status is None or (plan.method.graded_failure and plan.controller.adaptive and not plan.force_dt_min):
            return ratio
        good = out.status == Status.SUCCESS
        if isinstance(ratio, tuple):
            return tuple(ops.where(good, r, math.inf) for r in ratio)
        return ops.where(good, ratio, math.inf)

    def interpolator(self, out: Any, needed: bool) -> tuple[Any, Callable[[Tensor], Tensor]]:
        """The step's dense data, completed if ``needed``, and its interpolant."""
        if self.ready is not None and self.ready[0] is out:
            return self.ready[1:]
        method, dense = self.plan.method, out.dense
        if needed or self.plan.dense or self.taped_dense:
            dense, work = method.prepare(self.field, dense)
            self.nfe += work
        return dense, lambda theta, derivative=0: method.interpolate(dense, theta, derivative)

    def look(self, out: Any, t1: Any, accept: Any) -> Found | None:
        """The events in an accepted step to ``t1``."""
        dense, interpolate = self.interpolator(out, True)
        self.ready = out, dense, interpolate
        return self.lookout.search(interpolate, self.t, t1, out.y1, accept)  # type: ignore[union-attr]

    def happen(self, found: Found, interpolate: Any, lo: Any, h: Any, y: Tensor, end: Any) -> Outcome:
        """Events of a step that leads to ``y`` at ``end`` unless they cut it."""
        outcome = carry_out(self.plan.events, self.plan.field, found, interpolate, lo, h, y, end)
        self.happened.append((found, outcome.chunk))
        return outcome

    def restarted(self, y: Tensor) -> Any:
        """Method state for a new start from ``y`` at the current time."""
        return self.plan.method.init(self.plan.field, self.lo, self.dt, y, self.slope(y))

    def slope(self, y: Tensor) -> Tensor:
        """f at the current time and ``y``, after a jump there."""
        field = after_jump(self.plan, self.t, self.after)
        self.nfe += 1
        return field(field.time(self.lo), y)

    @abstractmethod
    def start(self) -> None:
        """Everything before the first attempt."""

    @abstractmethod
    def settle(self, out: Any, decision: Any, error: Any, t1: Any, h: Any, hit: Any, step: Any, end: Any) -> None:
        """Keep or drop a judged step. ``step`` and ``end`` are ``h`` and ``t1`` with the gradients they carry."""

    @abstractmethod
    def give_up(self, status: Status) -> None:
        """End every sample that still moves with ``status``."""

    @abstractmethod
    def finish(self) -> Trajectory:
        """Put together what was found."""


class _JointRun(_Run):
    """All of the state in one step: Python floats and branches."""

    def start(self) -> None:
        self.saver = JointSaver(self.plan.save, self.layout, self.clock)
        self.saver.start(self.y)
        self.status = Status.RUNNING
        self.accepted = self.rejected = self.inner = self.forced = 0
        self.dt = 0.0 if self.plan.dt0 is None else self.plan.dt0
        if self.clock.start == self.clock.end:
            self.give_up(Status.SUCCESS)
            return
        self.begin()
        if not self.defined:
            self.give_up(Status.NON_FINITE)

    def give_up(self, status: Status) -> None:
        self.status, self.running = status, False

    def settle(self, out, decision, error, t1, h, hit, step, end) -> None:
        plan = self.plan
        self.inner += out.inner
        accept = decision.accept or self._force(h, error)
        dt = self._next_dt(h * decision.factor, accept, hit)
        if decision.order is not None and not accept:
            self.state = self.state._replace(order=decision.order)
        self.controls = decision.state
        if not accept:
            self.rejected += 1
            if not plan.controller.adaptive or self._stuck(h):
                self.give_up(_cause(out.status, error))
            self.dt = dt
            return
        found = None if self.lookout is None else self.look(out, t1, True)
        if found is not None and found.undefined[0]:
            self.rejected += 1
            if found.hopeless[0] or not plan.controller.adaptive or self._stuck(h):
                self.give_up(Status.NON_FINITE)
            self.dt = h * SHORTER
            return
        self.accepted += 1
        start = self.t
        self._keep(out, decision, t1, h, hit, step, end, found)
        if found is not None and found.cut[0]:
            t1, h, dt = self.t, self.t - start, math.copysign(min(abs(dt), float(found.longest[0])), dt)
        self.dt = dt if plan.controller.adaptive else self.dt
        if plan.observer is not None:
            ratio = error if plan.controller.adaptive else None
            stop = plan.observer(Step(t1, h, self.layout.unflatten(self.y), ratio, True))
            if stop and self.running:
                self.give_up(Status.STOPPED)

    def _keep(self, out, decision, t1, h, hit, step, end, found) -> None:
        plan, clock = self.plan, self.clock
        lo, before, state, stop = self.lo if clock.differentiable else self.t, self.y, self.state, clock.next
        whole, length = (t1, h, hit), step if clock.differentiable else t1 - self.t
        cut = found is not None and bool(found.cut[0])
        if cut:
            t1, hit = float(found.t[0]), hit and found.t[0] == t1
        jumps, tied = clock.jumps(True, hit), cut or clock.tied(hit)
        ended = clock.advance(True, hit)
        pending = self.saver.pending(t1, tied)
        interior = pending is not None and pending[1] > pending[0]
        dense, interpolate = self.interpolator(out, interior)
        if plan.dense:
            self.pieces.append(Piece(self.t, t1, plan.method.snapshot(dense), True, lo, length))
        over = cut and found.code[0] >= 0
        jumps = () if over else jumps
        if self.tape is not None:
            stored = None if plan.method.one_step else state
            kept = dense if self.taped_dense else None
            self.tape(Record(self.t, *whole, stop, pending, jumps, True, True, before, stored, kept, found, self.after))
        self.t, self.lo, self.y = t1, end if clock.differentiable else t1, out.y1
        self.state = out.state if decision.order is None else out.state._replace(order=decision.order)
        met = self.y
        if found is not None:
            outcome = self.happen(found, interpolate, lo, length, self.y, self.lo)
            self.y, met = outcome.y, outcome.before
            self.lo = outcome.end if clock.differentiable else t1
        if jumps:
            self.y = apply_jumps(plan, jumps, self.lo, self.y)
        self.after = bool(jumps)
        self.saver.step(pending, Segment(lo, length, t1, self.y, interpolate), ended or over, over)
        if over or ended:
            self.give_up(Status(int(found.code[0])) if over else Status.SUCCESS)
        elif cut or jumps:
            self._restart(met, found)

    def _restart(self, before: Tensor, found: Found | None) -> None:
        """After a jump, or the reset of an event, from the state ``before`` it."""
        self.state = self.restarted(self.y)
        if self.lookout is not None:
            self.lookout.renew(True, self.t, before, self.y, found)

    def _next_dt(self, dt: float, accept: bool, hit: bool) -> float:
        plan = self.plan
        size = min(abs(dt), plan.dt_max)
        if accept and hit:
            # The clip says nothing about the error: go on with the step that was wanted before it.
            size = max(size, min(abs(self.dt), plan.dt_max))
        return math.copysign(max(size, plan.dt_min), dt)

    def _stuck(self, h: float) -> bool:
        return abs(h) <= self.plan.dt_min * (1 + 1e-12) or self.t + h * ROUNDING == self.t

    def _force(self, h: float, error: float) -> bool:
        plan = self.plan
        if not plan.force_dt_min or not math.isfinite(error) or abs(h) > plan.dt_min * (1 + 1e-12):
            return False
        self.forced += 1
        return True

    def finish(self) -> Trajectory:
        arrived = self.status in (Status.SUCCESS, Status.EVENT, Status.MAX_EVENTS)
        if arrived and self.readable and not self.layout.finite(self.y.detach()):
            self.status = Status.NON_FINITE
        t, values = self.saver.finish(self.t, self.y)
        counts = {
            "nfe": self.nfe,
            "nfe_per_sample": self.nfe,
            "accepted": self.accepted,
            "rejected": self.rejected,
            "inner_iterations": self.inner,
            "forced": self.forced,
            "switches": getattr(self.controls, "switches", 0),
            **self.algebra,
        }
        return Trajectory(t, values, self.status, self.t, self.y, self.dt, counts, self.pieces, log(self.happened))


class _RowRun(_Run):
    """Every sample its own step: masks, and one read from the device per attempt."""

    def start(self) -> None:
        clock, layout = self.clock, self.layout
        self.saver = RowSaver(self.plan.save, layout, clock)
        alone = clock.start == clock.end
        self.saver.start(self.t, self.y, alone)
        self.status = torch.where(alone, int(Status.SUCCESS), int(Status.RUNNING)).to(torch.int8)
        zero = torch.zeros(layout.batch, dtype=torch.int64, device=layout.device)
        self.accepted, self.inner, self.forced = zero, zero.clone(), zero.clone()
        self.ended = zero.clone()
        self.extra = zero.clone()
        self.history: list[int] = []
        self.replaced: tuple[Tensor, Tensor] | None = None
        self.active = ~alone
        self.moving = self.active.to(self.t.dtype)
        self._codes = {code: torch.tensor(int(code), dtype=torch.int8, device=layout.device) for code in Status}
        self.dt = self.dt_last = torch.zeros_like(clock.start)
        self.first_nfe = 0
        self._recount()
        if self.running:
            self.begin()
            self.dt_last, self.first_nfe = self.dt, self.nfe
            self.steady = self.nfe
            undefined = self.active & ~self.defined
            if bool(undefined.any()):
                self._end(undefined, Status.NON_FINITE)
                self._recount()
                if self.running and (self.grad or self.tape is not None):
                    self._stand_in(undefined)

    def _stand_in(self, undefined: Tensor) -> None:
        """An active row's state in place of those where f is not finite: f still sees every row, and a NaN in one would
        reach the gradient of all that the rows share. :meth:`finish` puts the states back."""
        layout = self.layout
        donor = int(layout.per_row(self.active).nonzero()[0])
        self.replaced = undefined, self.y
        self.y = torch.where(layout.spread(undefined), self.y[donor].detach(), self.y)
        self.state = self.restarted(self.y)

    def _recount(self) -> None:
        """Samples that still move; only where the loop waits for the device anyway."""
        self.left = int(self.active.sum())
        self.running = self.left > 0

    def _end(self, mask: Tensor, status: Any) -> None:
        """Samples in ``mask`` freeze with ``status`` (a code or ``(B,)`` codes)."""
        code = status if isinstance(status, Tensor) else self._codes[status]
        self.status = torch.where(mask, code, self.status)
        self.ended = torch.where(mask, self.attempts, self.ended)
        self.active = self.active & ~mask
        self.moving = self.active.to(self.t.dtype)

    def give_up(self, status: Status) -> None:
        self.dt_last = torch.where(self.active, self.dt, self.dt_last)
        self._end(self.active, status)
        self.running = False

    def settle(self, out, decision, error, t1, h, hit, step, end) -> None:
        plan, clock = self.plan, self.clock
        with torch.no_grad():
            accept = decision.accept & self.active
            forced = self._force(h, error) & ~accept if plan.force_dt_min else None
            if forced is not None:
                accept = accept | forced
                self.forced = self.forced + forced
        events = None
        if self.lookout is not None:
            events, t1, hit, accept, error = self._events(out, t1, h, hit, accept, error)
        with torch.no_grad():
            reject = self.active > accept
            bad = reject & self._stuck(h) if plan.controller.adaptive else reject
            # With the end as the only stop, to hit a stop is to finish.
            stopping = accept & hit
            done = stopping if clock.single else clock.finishes(accept, t1)
            going = accept
            if events is not None:
                done, bad, going = done | events.over, bad | events.hopeless, accept & ~events.over
            tied = _tied(clock, hit, events)
            count, inside = self.saver.pending(accept, t1, tied) if self.saver.interior else (None, None)
            jumping = clock.jumping(going, t1)
            flags = self._read(done, bad, reject, error, stopping, jumping, count, inside)
            dt = self._next_dt(h * decision.factor, stopping if flags.hit else None)
            if events is not None:
                dt = torch.where(events.undefined, h * SHORTER, dt)
        failure, inner = out.status, out.inner
        if flags.redo:
            out, step = self._redo(error, step)
        if inner is not None and plan.method.implicit:
            self.inner = self.inner + inner * self.active
        self.controls = decision.state
        self.accepted.add_(accept)
        start = self.t
        self._keep(out, decision, accept, t1, h, hit, step, end, flags, (count, inside), jumping, events)
        if flags.bad:
            self._end(bad, _causes(failure, error, self.status))
        if flags.done:
            self._end(done, Status.SUCCESS if events is None else events.code)
        if flags.bad or flags.done:
            self.running = flags.running
        if plan.controller.adaptive:
            if events is not None:
                dt = torch.copysign(torch.minimum(dt.abs(), events.longest), dt)
            if flags.done:
                # The last clip says nothing about the error: the step wanted before it is what to go on with.
                wanted = torch.copysign(torch.maximum(dt.abs(), self.dt.abs()), dt)
                self.dt_last = torch.where(done, wanted, self.dt_last)
            if flags.bad:
                self.dt_last = torch.where(bad, dt, self.dt_last)
            self.dt = dt
        if plan.observer is not None:
            h = h if events is None else torch.where(events.cut, t1 - start, h)
            self._observe(Step(t1, h, self.layout.unflatten(self.y), error if plan.controller.adaptive else None, accept))

    def _events(self, out, t1, h, hit, accept, error) -> tuple[_Events | None, Tensor, Tensor, Tensor, Tensor]:
        """The events of the step, and its end, whether that is a stop, who accepts it, and its error in view of them."""
        before = self.nfe
        found = self.look(out, t1, accept)
        if self.nfe > before:
            self.extra = self.extra + (self.nfe - before) * self.active
        if found is None:
            return None, t1, hit, accept, error
        cut, t, code, longest, undefined, hopeless = (torch.from_numpy(x).to(t1.device) for x in found[1:])
        code = code.to(torch.int8)
        events = _Events(found, cut, code >= 0, code.clamp(min=0), longest, undefined, hopeless, (t1, h, hit))
        hit = hit & (~cut | (t == t1))
        return events, torch.where(cut, t, t1), hit, accept & ~undefined, torch.where(undefined, torch.nan, error)

    def _read(self, done, bad, reject, error, hit, jumping, count, inside) -> _Flags:
        """The one read of this step: how many samples ended, failed, hit a stop, met a NaN, jump."""
        masks = {"done": done, "bad": bad}
        if not self.clock.single:
            masks["hit"] = hit
        if self.grad:
            masks["redo"] = reject & ~torch.isfinite(error)
        masks |= jumping
        values = torch.stack(list(masks.values())).sum(1)
        if count is not None:
            values = torch.cat([values, torch.stack([count, inside]).amax(1)])
        read = values.tolist()
        found = dict(zip(masks, read, strict=False))
        most, inner = read[-2:] if count is not None else (0, 0)
        ended, failed = found["done"], found["bad"]
        self.left -= ended + failed
        jumps = tuple(j for j in jumping if found[j])
        hits = bool(found.get("hit", 0))
        return _Flags(self.left > 0, bool(ended), bool(failed), hits, bool(found.get("redo", 0)), jumps, most, inner)

    def _redo(self, error: Tensor, step: Tensor) -> tuple[Any, Tensor]:
        """The step again, with samples that met a NaN standing still: 0 * NaN would poison the gradient of all."""
        plan = self.plan
        still = torch.where(torch.isfinite(error), step, 0.0)
        lo = self.lo if self.clock.differentiable else self.t
        out = plan.method.step(self.field, lo, still, self.y, self.state, self.active)
        self.nfe += out.work
        self._count(out)
        return out, still

    def _keep(self, out, decision, accept, t1, h, hit, step, end, flags, pending, jumping, events) -> None:
        plan, clock, layout = self.plan, self.clock, self.layout
        count, inside = pending
        lo, before, state, following = self.lo, self.y, self.state, clock.next
        before_extra = self.nfe
        found = events.found if events is not None and events.found.rounds else None
        dense, interpolate = self.interpolator(out, flags.inner > 0 or found is not None)
        if self.nfe > before_extra:
            # Only samples with an output in this step needed those: a sample's count must not depend on its batch.
            needing = self.active if inside is None or plan.dense or found is not None else inside > 0
            self.extra = self.extra + (self.nfe - before_extra) * needing
        self.steady += out.work
        self.history.append(self.steady)
        if plan.dense:
            start = lo if clock.differentiable else self.t
            self.pieces.append(Piece(self.t, t1, plan.method.snapshot(dense), accept, start, step))
        if self.tape is not None:
            stored = None if plan.method.one_step else state
            outputs = (self.saver.done, count, flags.most, flags.inner)
            jumps = {j: jumping[j] for j in flags.jumps}
            kept = dense if self.taped_dense else None
            end1, length, stop = (t1, h, hit) if events is None else events.whole
            taken = self.t, end1, length, stop, following, outputs, jumps, accept, self.active
            self.tape(Record(*taken, before, stored, kept, found, self.after))
        order = decision.order
        new, old = out.state, self.state
        if order is not None:
            new, old = new._replace(order=order), old._replace(order=torch.where(self.active, order, old.order))
        self.y, self.state = layout.merge(accept, (out.y1, new), (self.y, old))
        segment_lo, tied = lo if clock.differentiable else self.t, _tied(clock, hit, events)
        self.t = torch.where(accept, t1, self.t)
        self.lo = torch.where(accept, end, lo) if clock.differentiable else self.t
        if flags.hit:
            clock.advance(accept, hit, t1)
        met = self.y
        if found is not None:
            outcome = self.happen(found, interpolate, segment_lo, step, self.y, self.lo)
            self.y, met = outcome.y, outcome.before
            self.lo = outcome.end if clock.differentiable else self.t
        for number in flags.jumps:
            mapped = apply_jumps(plan, (number,), self.lo, self.y)
            self.y = torch.where(layout.spread(jumping[number]), mapped, self.y)
        if plan.jumps:
            jumped = torch.stack([jumping[number] for number in flags.jumps]).any(0) if flags.jumps else torch.zeros_like(accept)
            self.after = jumped if self.after is False else torch.where(accept, jumped, self.after)
        segment = Segment(segment_lo, step, self.t, self.y, interpolate, tied, None if events is None else events.cut)
        if flags.most:
            self.saver.step(count, flags.most, flags.inner, segment)
        elif plan.save.kind == "steps":
            self.saver.step_end(accept, segment)
        if flags.running:
            self._restart([jumping[number] for number in flags.jumps], met, found, events)

    def _restart(self, masks: list[Tensor], met: Tensor, found: Found | None, events: _Events | None) -> None:
        """The method, for samples in ``masks`` that jumped and those that go on after an event, from the states ``met``."""
        if found is not None and (found.cut & (found.code < 0)).any():
            masks = [*masks, events.cut & ~events.over]  # type: ignore[union-attr]
        if not masks:
            return
        some = torch.stack(masks).any(0)
        self.state = self.layout.merge(some, self.restarted(self.y), self.state)
        self.extra = self.extra + some
        if self.lookout is not None:
            self.lookout.renew(some, self.t, met, self.y, found)

    def _next_dt(self, dt: Tensor, clipped: Tensor | None) -> Tensor:
        plan = self.plan
        if clipped is not None:
            dt = torch.where(clipped & (dt.abs() < self.dt.abs()), self.dt, dt)
        if plan.dt_max < math.inf or plan.dt_min > 0:
            dt = torch.copysign(dt.abs().clamp(plan.dt_min, plan.dt_max), dt)
        return dt

    def _stuck(self, h: Tensor) -> Tensor:
        stuck = torch.add(self.t, h, alpha=ROUNDING) == self.t
        return stuck | (h.abs() <= self.plan.dt_min * (1 + 1e-12)) if self.plan.dt_min else stuck

    def _force(self, h: Tensor, error: Tensor) -> Tensor:
        small = h.abs() <= self.plan.dt_min * (1 + 1e-12)
        return small & self.active & torch.isfinite(error)

    def _observe(self, step: Step) -> None:
        stop = self.plan.observer(step)  # type: ignore[misc]
        if stop is None or stop is False:
            return
        stop = torch.as_tensor(stop, device=self.active.device).to(torch.bool)
        if stop.shape not in ((), self.active.shape):
            raise ArgumentError(
                f"observer must return a bool or a mask of shape {tuple(self.active.shape)}, found {tuple(stop.shape)}"
            )
        mask = self.active & stop
        self.dt_last = torch.where(mask, self.dt, self.dt_last)
        self._end(mask, Status.STOPPED)
        self._recount()

    def finish(self) -> Trajectory:
        if self.replaced is not None:
            undefined, y = self.replaced
            self.y = torch.where(self.layout.spread(undefined), y, self.y)
        success = self.status == Status.SUCCESS
        if self.lookout is not None:
            ended = (self.status == Status.EVENT) | (self.status == Status.MAX_EVENTS)
            broken = (success | ended) & ~self.layout.finite(self.y.detach())
            # One that happens to end at its last output has arrived there.
            success = success | (ended & (self.t == self.clock.end))
        else:
            broken = success & ~self.layout.finite(self.y.detach())
        self.status = torch.where(broken, int(Status.NON_FINITE), self.status).to(torch.int8)
        t, values = self.saver.finish(self.t, self.y, success)
        nfe = torch.tensor([self.first_nfe, *self.history], device=self.t.device)[self.ended] + self.extra
        counts = {
            "nfe": self.nfe,
            "nfe_per_sample": nfe,
            "accepted": self.accepted,
            "rejected": self.ended - self.accepted,
            "inner_iterations": self.inner,
            "forced": self.forced,
            "switches": getattr(self.controls, "switches", 0),
            **self.algebra,
        }
        dt = torch.where(self.active, self.dt, self.dt_last)
        return Trajectory(t, values, self.status, self.t, self.y, dt, counts, self.pieces, log(self.happened))


class _Flags(NamedTuple):
    running: bool
    done: bool
    bad: bool
    hit: bool
    redo: bool
    jumps: tuple[int, ...]
    most: int
    inner: int


class _Events(NamedTuple):
    """Events of a step of a batch as masks: whose steps are ``cut``, who is ``over``, and with what ``code``; whose functions
    are ``undefined``, and at the start, ``hopeless``. ``longest``: limit on the next step. ``whole``: (t1, h, hit) of the
    step before it was cut."""

    found: Found
    cut: Tensor
    over: Tensor
    code: Tensor
    longest: Tensor
    undefined: Tensor
    hopeless: Tensor
    whole: tuple[Tensor, Tensor, Tensor]


def _tied(clock: Any, hit: Tensor, events: _Events | None) -> Any:
    """``clock.tied``; an output at the time of an event is the state after it."""
    tied = clock.tied(hit)
    return tied if events is None or tied is True else tied | events.cut


def apply_jumps(plan: Plan, numbers: tuple[int, ...], t: Any, y: Tensor) -> Tensor:
    """The flat state after the maps of jumps ``numbers`` at time ``t``."""
    for number in numbers:
        jump = plan.jumps[number]
        if jump.map is not None:
            mapped = jump.map(plan.field.time(t), plan.layout.unflatten(y))
            y = plan.layout.flatten(mapped, f"the value returned by the map of jump {number}")
    return y


def between_jumps(plan: Plan, t: Any, t1: Any, hit: Any, after: Any) -> Any:
    """The field for a step from ``t`` to ``t1``: at the time of a jump f is met on the side of the step only.

    ``after``: whether ``t`` is one, or the mask of samples for which it is.
    """
    clock = plan.clock
    if isinstance(clock, JointClock):
        end = t1 if hit and clock.stops[clock.next].jumps else None
        return plan.field if end is None and not after else plan.field.within(t if after else None, end, clock.sign)
    at_jump = torch.stack([t1 == time for time in clock.jump_times.values()]).any(0)
    start = None if after is False else torch.where(after, t, torch.nan)
    return plan.field.within(start, torch.where(at_jump, t1, torch.nan), clock.sign)


def after_jump(plan: Plan, t: Any, after: Any) -> Any:
    """The field for f at ``t``, where ``after`` tells (of samples) whether there was a jump."""
    if after is False:
        return plan.field
    start = t if after is True else torch.where(after, t, torch.nan)
    return plan.field.within(start, None, plan.clock.sign)


def _constant(x: Any) -> Any:
    """Without a derivative: ``no_grad`` holds back reverse mode only."""
    return x.detach() if isinstance(x, Tensor) else x


def _cause(status: Any, error: float) -> Status:
    if status is not None and status != Status.SUCCESS:
        return Status(int(status))
    return Status.STEP_UNDERFLOW if math.isfinite(error) else Status.NON_FINITE


def _causes(status: Any, error: Tensor, like: Tensor) -> Tensor:
    cause = torch.where(torch.isfinite(error), int(Status.STEP_UNDERFLOW), int(Status.NON_FINITE)).to(like.dtype)
    return cause if status is None else torch.where(status != Status.SUCCESS, status.to(like.dtype), cause)
