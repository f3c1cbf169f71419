"""Events: roots of functions of the solution, found on the interpolant of each accepted step.

The search (:class:`Lookout`) works on values: each function is sampled inside the step, sign changes are bracketed and
refined to the rounding of t by Chandrupatla's method. What it decides about, one number per sample (one in joint mode), lives
on the host, so that one code serves all modes with a single read of the device for a step without an event.

What fires is then carried out (:func:`carry_out`) with autograd on, by the loop and again by whatever replays a step. The
time of an event carries its gradient through a Newton correction whose value is 0: te - (g - stop(g)) / (dg/dt). One gives
the first derivatives of the root (implicit function theorem), a second one, around the first, the second derivatives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .field import Field
from .layout import Layout
from .status import ArgumentError, ArgumentTypeError, Status

QUICK = 64
"""Events less than this many roundings of t apart follow each other too quickly to be told apart."""

PATIENCE = 8
"""How many of those in a row, beyond two for each event, are an accumulation and no coincidence."""

REFINEMENTS = 200
"""A bracket of two floats is reached long before."""


@dataclass(frozen=True)
class Event:
    """Something happens where ``fn(t, y, *args)`` crosses 0, or turns True.

    Args:
        fn: called as f is, with the user's state: a real or boolean 0-dim tensor, ``(B,)`` in the batched modes. A boolean
            one fires where it turns True (``direction=-1``: False); its time counts as a constant in derivatives.
        direction: 1: fires where fn rises through 0 in the direction of travel; -1: where it falls; 0: both.
        terminal: whether the solve (the sample) ends there.
        reset: ``(t, y, *args) -> y``, the state to go on from (or, if terminal, to end with); the method restarts.
        samples: points inside each step at which fn is looked at, so that it is seen to cross twice in one step.

    fn fires where it leaves one sign: on reaching 0 exactly, too, but not on leaving it. One that is 0 to rounding at the
    start, or after its own reset, fires when it has left 0 and comes back. A change of sign by a reset or jump is no crossing.
    Events that coincide are handled in the order of the list, those first that only take note.

    Raises ``ArgumentError`` or ``ArgumentTypeError`` for what cannot be used.
    """

    fn: Callable[..., Tensor]
    direction: int = 0
    terminal: bool = True
    reset: Callable[..., Any] | None = None
    samples: int = 8

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise ArgumentTypeError(f"fn of an Event must be callable as fn(t, y, *args), found {type(self.fn).__name__}")
        if self.direction not in (-1, 0, 1) or isinstance(self.direction, bool):
            raise ArgumentError(f"direction of an Event must be -1, 0 or 1, found {self.direction!r}")
        if not isinstance(self.terminal, bool):
            raise ArgumentTypeError(f"terminal of an Event must be True or False, found {self.terminal!r:.40}")
        if self.reset is not None and not callable(self.reset):
            raise ArgumentTypeError(f"reset of an Event must be callable or None, found {type(self.reset).__name__}")
        if not isinstance(self.samples, int) or isinstance(self.samples, bool) or self.samples < 0:
            raise ArgumentError(f"samples of an Event must be an integer >= 0, found {self.samples!r}")

    @property
    def cuts(self) -> bool:
        """Whether the step ends at it."""
        return self.terminal or self.reset is not None


class Fired(NamedTuple):
    """An event that fired. In the batched modes entry n of ``solution.events`` is the n-th event of every sample.

    which: number in ``events``; ``(B,)``, -1 for samples that had fewer events. t: its time, float64, 0-dim or ``(B,)``
    (NaN for none). y: the state there; after: the state after its reset (y where it has none). Differentiable.
    """

    which: Any
    t: Tensor
    y: Any
    after: Any


def check_events(events: Any, max_events: Any) -> tuple[Event, ...]:
    """``events`` as a tuple; raises ``ArgumentTypeError`` / ``ArgumentError`` for anything else than events."""
    if not isinstance(events, (list, tuple)):
        raise ArgumentTypeError(f"events must be a sequence of Event, found {type(events).__name__}: write events=[Event(...)]")
    for number, event in enumerate(events):
        if not isinstance(event, Event):
            raise ArgumentTypeError(f"events[{number}] must be an Event, found {type(event).__name__}: write Event(fn)")
    if max_events is not None:
        if not isinstance(max_events, int) or isinstance(max_events, bool) or max_events < 1:
            raise ArgumentError(f"max_events must be None or an integer >= 1, found {max_events!r}")
        if not events:
            raise ArgumentError(f"max_events={max_events} needs events=[Event(...)] to count, found none")
    return tuple(events)


def evaluate(events: Sequence[Event], number: int, field: Field, t: Any, y: Tensor) -> Tensor:
    """Function ``number`` at time ``t`` and flat state ``y``: 0-dim or ``(B,)``, real or boolean.

    Raises ``ArgumentTypeError`` / ``ArgumentError`` if it returns something else.
    """
    layout = field.layout
    found = events[number].fn(field.time(t), layout.unflatten(y), *field.args)
    what = f"the value returned by fn of events[{number}]"
    if not isinstance(found, Tensor):
        raise ArgumentTypeError(f"{what} must be a tensor, found {type(found).__name__}")
    if found.dtype != torch.bool and not found.is_floating_point():
        raise ArgumentTypeError(f"{what} must be real or boolean, found {found.dtype}")
    shape = () if layout.joint else (layout.batch,)
    if found.shape != shape:
        raise ArgumentError(f"{what} must have shape {shape}, one number per sample, found {tuple(found.shape)}")
    return found


# -- what was found in a step -----------------------------------------------------------------------------------------


class Round(NamedTuple):
    """Events of one step, at most one for each sample; arrays on the host. ``which``: ``(B,)``, -1 for none; ``t``: their
    times; ``number``: how many the sample had before; ``cut``: whether the step ends there. ``samples``, ``rows``: those that
    have one."""

    which: np.ndarray
    t: np.ndarray
    number: np.ndarray
    cut: np.ndarray
    samples: np.ndarray
    rows: np.ndarray


class Found(NamedTuple):
    """What fires in one step. ``cut``: ``(B,)``, whose steps end early, at ``t``; ``code``: the status that samples end with,
    -1 for those that go on; ``longest``: limit on their next step. ``undefined``: samples that must not take the step, for a
    function is NaN in it; ``hopeless``: those of them where it is NaN at the start."""

    rounds: list[Round]
    cut: np.ndarray
    t: np.ndarray
    code: np.ndarray
    longest: np.ndarray
    undefined: np.ndarray
    hopeless: np.ndarray

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of events, and of rows of states at them."""
        return sum(len(r.samples) for r in self.rounds), sum(len(r.rows) for r in self.rounds)


class Chunk(NamedTuple):
    """Times ``(P,)`` and rows of states at and after some events, in the order of their rounds."""

    t: Tensor
    y: Tensor
    after: Tensor


class Log(NamedTuple):
    """All events of a solve, and which ones they are."""

    chunk: Chunk
    rounds: list[Round]


def log(outcomes: list[tuple[Found, Chunk]]) -> Log | None:
    """What happened in all steps; None if nothing did."""
    if not outcomes:
        return None
    chunk = Chunk(*(torch.cat(parts) for parts in zip(*(chunk for _, chunk in outcomes), strict=True)))
    return Log(chunk, [r for found, _ in outcomes for r in found.rounds])


def report(layout: Layout, found: Log | None) -> tuple[Fired, ...]:
    """The log as users see it."""
    if found is None:
        return ()
    (t, y, after), rounds = found
    if layout.joint:
        return tuple(
            Fired(int(r.which[0]), time, layout.unflatten(a), layout.unflatten(b))
            for r, time, a, b in zip(rounds, t.unbind(0), y.unbind(0), after.unbind(0), strict=True)
        )
    device, count = layout.device, 1 + max(int(r.number[r.samples].max()) for r in rounds)
    which = np.full((count, layout.batch), -1)
    for r in rounds:
        which[r.number[r.samples], r.samples] = r.which[r.samples]
    group = np.arange(layout.rows) if layout.index is None else layout.index.cpu().numpy()
    places = [(r.number[r.samples], r.samples) for r in rounds]
    row_places = [(r.number[group[r.rows]], r.rows) for r in rounds]
    times = _scattered((count, layout.batch), places, t, device)
    states = [_scattered((count, *layout.shape), row_places, x, device) for x in (y, after)]
    return tuple(
        Fired(torch.from_numpy(w).to(device), *rest[:1], *(layout.unflatten(x) for x in rest[1:]))
        for w, *rest in zip(which, times.unbind(0), *(x.unbind(0) for x in states), strict=True)
    )


def _scattered(shape: tuple[int, ...], places: list[tuple[np.ndarray, np.ndarray]], x: Tensor, device: Any) -> Tensor:
    index = tuple(torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*places, strict=True))
    return torch.full(shape, torch.nan, dtype=x.dtype, device=device).index_put(index, x)


# -- carrying it out --------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """After the events of a step: the state ``y`` and the node ``end`` (with gradient) to go on from, the state ``before``
    the reset, and what is to be reported."""

    y: Tensor
    end: Any
    before: Tensor
    chunk: Chunk


def carry_out(
    events: Sequence[Event], field: Field, found: Found, interpolate: Any, lo: Any, h: Any, y1: Tensor, end: Any
) -> Outcome:
    """States at the events of a step and after their resets; differentiable in whatever the step is, where autograd is on.

    Args:
        interpolate: ``(theta, derivative=0)``, of the whole step from ``lo`` over ``h``. y1, end: at its end.
    """
    layout = field.layout
    y = before = y1
    chunks = []
    for r in found.rounds:
        t, here = _place(events, field, r, interpolate, lo, h)
        after = here
        for number in np.unique(r.which[r.cut]).tolist():
            reset = events[number].reset
            if reset is not None:
                mapped = reset(field.time(t), layout.unflatten(here.clone()), *field.args)
                mapped = layout.flatten(mapped, f"the value returned by the reset of events[{number}]")
                after = _select(layout, r.cut & (r.which == number), mapped, after)
        if r.cut.any():
            y, before = _select(layout, r.cut, after, y), _select(layout, r.cut, here, before)
            end = t if layout.joint else torch.where(_mask(layout, r.cut), t, end)
        if layout.joint:
            chunks.append(Chunk(t.reshape(1), here.unsqueeze(0), after.unsqueeze(0)))
        else:
            samples, rows = (torch.from_numpy(x).to(layout.device) for x in (r.samples, r.rows))
            chunks.append(Chunk(t[samples], here[rows], after[rows]))
    return Outcome(y, end, before, Chunk(*(torch.cat(parts) for parts in zip(*chunks, strict=True))))


def _mask(layout: Layout, mask: np.ndarray) -> Tensor:
    return torch.from_numpy(mask).to(layout.device)


def _select(layout: Layout, mask: np.ndarray, new: Tensor, old: Tensor) -> Tensor:
    if layout.joint:
        return new if mask[0] else old
    return torch.where(layout.spread(_mask(layout, mask)), new, old)


def _place(events: Sequence[Event], field: Field, r: Round, interpolate: Any, lo: Any, h: Any) -> tuple[Tensor, Tensor]:
    """Times of the events of a round, 0-dim or ``(B,)``, and the flat state then. Samples without one stay at ``lo``."""
    layout = field.layout
    if layout.joint:
        t = torch.tensor(float(r.t[0]), dtype=torch.float64, device=layout.device)
    else:
        t = torch.where(_mask(layout, r.which >= 0), torch.from_numpy(r.t).to(layout.device), lo.detach())
        h = torch.where(h == 0, 1.0, h)

    def at(time: Tensor, derivative: int = 0) -> Tensor:
        return interpolate(((time - lo) / h).unsqueeze(0), derivative)[0]

    here = at(t)
    if not torch.is_grad_enabled():
        return t, here
    numbers = [n for n in np.unique(r.which).tolist() if n >= 0]
    if not any(evaluate(events, n, field, t, here).requires_grad for n in numbers):
        return t, here
    slope = at(t, 1).detach()
    rates = {n: rate(events, n, field, t, here, slope)[0] for n in numbers}
    for _ in range(2):
        t = shifted(events, field, r.which, rates, t, here)
        here = at(t)
    return t, here


def shifted(
    events: Sequence[Event], field: Field, which: np.ndarray, rates: dict[int, Tensor], t: Tensor, y: Tensor
) -> Tensor:
    """``t`` itself, with the gradient of the time at which events ``which`` happen: a Newton step of value 0.

    ``y``: the state as a function of ``t``; ``rates``: dg/dt of each event, constants.
    """
    layout = field.layout
    result = t
    for number, change in rates.items():
        g = evaluate(events, number, field, t, y)
        if not g.requires_grad:
            continue
        moved = t - (g - g.detach()).to(torch.float64) / change
        result = moved if layout.joint else torch.where(_mask(layout, which == number), moved, result)
    return result


def rate(events: Sequence[Event], number: int, field: Field, t: Any, y: Tensor, slope: Any) -> tuple[Tensor, Tensor]:
    """dg/dt of function ``number`` along the solution, whose ``slope`` is dy/dt, and the size of g that is rounding of y.

    Constants, 0-dim or ``(B,)``, float64.
    """
    layout = field.layout
    inference = torch.is_inference_mode_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        if inference:
            field = field.renewed(torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, field.args), field.norm)
        time = torch.as_tensor(t, dtype=torch.float64, device=layout.device).detach().clone().requires_grad_()
        state = y.detach().clone().requires_grad_()
        g = evaluate(events, number, field, time, state)
        if not g.requires_grad:
            return torch.zeros_like(time), torch.zeros_like(time)
        by_t, by_y = torch.autograd.grad(g.sum(), (time, state), allow_unused=True)
    total = torch.zeros_like(time) if by_t is None else by_t
    if by_y is None:
        return total.detach(), torch.zeros_like(time)
    total = total + layout.sum((by_y.conj() * slope).real).to(torch.float64)
    size = layout.sum((by_y * y).abs()).to(torch.float64) * torch.finfo(layout.real_dtype).eps
    return total.detach(), size.detach()


# -- the search -------------------------------------------------------------------------------------------------------


class Lookout:
    """Knows the sign of every event function where the solve stands, and looks for changes in each accepted step.

    Arrays are ``(K, B)``, of K events and B samples (1 in joint mode).
    """

    def __init__(self, events: tuple[Event, ...], limit: int | None, field: Field) -> None:
        self.events, self.limit, self.field, self.layout = events, limit, field, field.layout
        shape = (len(events), field.layout.batch)
        self.value, self.sign, self.residual = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.fresh = np.ones(shape, dtype=bool)
        self.boolean = [False] * len(events)
        self.count = np.zeros(shape[1], dtype=np.int64)
        self.quick = np.zeros(shape[1], dtype=np.int64)
        self.departed = np.zeros(shape, dtype=bool)
        index = field.layout.index
        self.group = np.arange(field.layout.rows) if index is None else index.cpu().numpy()
        # Those that only take note come first: of two at the same time, the other one ends the step.
        self.order = np.array(sorted(range(len(events)), key=lambda k: events[k].cuts))
        self.nodes = [np.arange(event.samples + 2) / (event.samples + 1) for event in events]

    @torch.no_grad()
    def begin(self, t: Any, y: Tensor) -> None:
        """The functions at the start."""
        values = [evaluate(self.events, k, self.field, t, y) for k in range(len(self.events))]
        self.boolean = [g.dtype == torch.bool for g in values]
        self.value = self._read(values)
        self.sign = np.sign(self.value)
        self.last = np.broadcast_to(np.asarray(torch.as_tensor(t, dtype=torch.float64).cpu()), self.count.shape).copy()
        self.longest = np.full(self.count.shape, np.inf)

    def _read(self, values: list[Tensor]) -> np.ndarray:
        """``(n, B)`` on the host; True is 1, False is -1."""
        signed = [g.to(torch.float64) * 2 - 1 if g.dtype == torch.bool else g.to(torch.float64) for g in values]
        return torch.stack(signed).reshape(len(signed), -1).cpu().numpy()

    # -- one step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def search(self, interpolate: Any, t: Any, t1: Any, y1: Tensor, accept: Any) -> Found | None:
        """What fires in the step from ``t`` to ``t1``, ``y1``, for samples that ``accept`` it; None: nothing."""
        step = _Step(self, interpolate, t, t1, accept)
        tables = step.sampled(y1)
        defined = np.minimum.reduce([_first(np.isnan(table), nodes) for table, nodes in zip(tables, self.nodes, strict=True)])
        self._depart(step, tables)
        signs = [np.sign(table) for table in tables]
        for k, s in enumerate(signs):
            s[0] = self.sign[k]
        crossings = [self._crossings(k, s) & step.accept for k, s in enumerate(signs)]
        found = None
        if (step.accept & (defined < np.inf)).any() or any(c.any() for c in crossings):
            found, pending = self._order(step, tables, signs, crossings, defined)
            # Where the step is cut, what was still to cross has its old sign, whatever rounding says (NaN: ask later).
            signs = [np.where(found.cut, p, s[-1])[None] for p, s in zip(pending, signs, strict=True)]
            step.accept = step.accept & ~found.undefined
        self.fresh &= ~step.accept
        for k, (table, s) in enumerate(zip(tables, signs, strict=True)):
            self.value[k] = np.where(step.accept, table[-1], self.value[k])
            self.sign[k] = np.where(step.accept, s[-1], self.sign[k])
        return found

    def _crossings(self, k: int, s: np.ndarray) -> np.ndarray:
        """``(n + 1, B)``: whether function k fires between one sample and the next."""
        direction = self.events[k].direction or int(self.boolean[k])
        change = s[1:] - s[:-1]
        return (s[:-1] != 0) & ~np.isnan(change) & (change * direction > 0 if direction else change != 0)

    def _depart(self, step: _Step, tables: list[np.ndarray]) -> None:
        """Signs of functions that start from 0, as far as rounding can tell: that of their derivative."""
        self.departed[:] = False
        for k, table in enumerate(tables):
            small = (np.abs(table[0]) <= 1e-3 * np.abs(table[1:]).max(0)) | (self.residual[k] > 0)
            small &= self.fresh[k] & step.accept
            if self.boolean[k] or not small.any():
                continue
            start = step.theta(np.zeros(len(small)))
            y, slope = step.interpolate(start)[0], step.interpolate(start, 1)[0]
            change, noise = (x.reshape(-1).cpu().numpy() for x in rate(self.events, k, self.field, step.start, y, slope))
            limit = 4 * self.residual[k] + 8 * noise + 4 * np.abs(change) * np.spacing(np.abs(step.t0))
            departing = np.where(np.abs(change * step.length) > limit, np.sign(change * step.length), 0.0)
            zero = small & (np.abs(table[0]) <= limit)
            self.sign[k] = np.where(zero, departing, self.sign[k])
            self.departed[k] = zero & (departing != 0)

    def _order(
        self, step: _Step, tables: Any, signs: Any, crossings: Any, defined: np.ndarray
    ) -> tuple[Found, np.ndarray]:
        """Fire what crosses in the order of time, for each sample up to the first event that cuts its step.

        ``defined``: position of the first sample with a NaN. It does no harm in a part of the step that is cut off.
        """
        batch, lanes = len(step.accept), np.arange(len(step.accept))
        roots, place = np.full((len(tables), batch), np.inf), np.zeros((len(tables), batch), dtype=np.int64)
        cuts, terminal = (np.array([getattr(e, name) for e in self.events]) for name in ("cuts", "terminal"))

        def look(k: int, who: np.ndarray) -> None:
            """The next crossing of function k, at or after its place, for samples in ``who``."""
            ahead = crossings[k] & (np.arange(len(crossings[k]))[:, None] >= place[k])
            some = ahead.any(0) & who
            place[k] = np.where(who, np.where(some, ahead.argmax(0), len(ahead)), place[k])
            roots[k] = np.where(who, np.inf, roots[k])
            if some.any():
                roots[k] = np.where(some, step.root(k, place[k], tables[k], signs[k], some), roots[k])

        for k in range(len(tables)):
            look(k, np.ones(batch, dtype=bool))
        undefined = step.accept & (np.where(cuts[:, None], roots, np.inf).min(0) > defined)
        roots[:, undefined] = np.inf
        cut, code, at = np.zeros(batch, dtype=bool), np.full(batch, -1), step.t1.copy()
        rounds = []
        while True:
            first = self.order[roots[self.order].argmin(0)]
            theta = roots[first, lanes]
            fires = np.isfinite(theta) & ~cut
            if not fires.any():
                break
            time = step.time(np.where(fires, theta, 0.0))
            ends = fires & (cuts[first] | self._last())
            rounds.append(self._round(np.where(fires, first, -1), time, ends))
            # It has left 0 and is back before t could change.
            caught = self.departed[first, lanes] & (theta == 0.0)
            code = np.where(ends, self._code(terminal[first], caught, time, ends), code)
            cut, at = cut | ends, np.where(ends, time, at)
            for k in np.unique(first[fires & ~ends]).tolist():
                going = fires & ~ends & (first == k)
                place[k] += going
                look(k, going)
        pending = self._pending(step, signs, roots, place, at)
        longest = np.where(cut, self.longest, np.inf)
        return Found(rounds, cut, at, code, longest, undefined, undefined & (defined == 0.0)), pending

    def _last(self) -> np.ndarray:
        """Samples whose next event is the last one allowed."""
        return self.count + 1 == self.limit if self.limit is not None else np.zeros(len(self.count), dtype=bool)

    def _round(self, which: np.ndarray, t: np.ndarray, cut: np.ndarray) -> Round:
        fires = which >= 0
        number = self.count.copy()
        self.count = self.count + fires
        return Round(which, t, number, cut, fires.nonzero()[0], fires[self.group].nonzero()[0])

    def _code(self, terminal: np.ndarray, caught: np.ndarray, t: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The status that samples end with at an event that cuts their step, -1 for those that go on.

        Keeps account of the time between such events: the next step is not to be longer, for it is likely to be cut, too, and
        rounding errors of a much longer one would be large.
        """
        since = np.abs(t - self.last)
        quick = since <= QUICK * np.spacing(np.maximum(np.abs(t), np.abs(self.last)))
        self.longest = np.where(ends & ~quick, since, self.longest)
        self.last = np.where(ends, t, self.last)
        self.quick = np.where(ends, np.where(quick, self.quick + 1, 0), self.quick)
        code = np.where(caught | (self.quick > 2 * len(self.events) + PATIENCE), int(Status.EVENTS_ACCUMULATE), -1)
        if self.limit is not None:
            code = np.where(self.count == self.limit, int(Status.MAX_EVENTS), code)
        return np.where(terminal, int(Status.EVENT), code)

    def _pending(self, step: _Step, signs: Any, roots: np.ndarray, place: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Signs before crossings that lie around the times ``at`` but have not come; NaN where there is none."""
        pending = np.full(roots.shape, np.nan)
        for k, s in enumerate(signs):
            left = np.minimum(place[k], len(s) - 1)
            started = (step.time(self.nodes[k][left]) - at) * np.sign(step.length) <= 0
            pending[k] = np.where(np.isfinite(roots[k]) & started, s[left, np.arange(len(at))], np.nan)
        return pending

    @torch.no_grad()
    def renew(self, changed: Any, t: Any, before: Tensor, after: Tensor, found: Found | None) -> None:
        """The functions after a reset or jump at ``t`` that led from ``before`` to ``after``, for samples in ``changed``."""
        numbers = range(len(self.events))
        values = [evaluate(self.events, k, self.field, t, y) for y in (before, after) for k in numbers]
        old, new = np.split(self._read(values), 2)
        who = np.array([True]) if self.layout.joint else changed.cpu().numpy()
        own, fired = np.zeros_like(self.fresh), np.zeros_like(self.fresh)
        for r in found.rounds if found is not None else ():
            own[r.which[r.cut], r.cut.nonzero()[0]] = True
            fired[r.which[r.samples], r.samples] = True
        moved = new != old
        keep = ~fired & ~moved & ~np.isnan(self.sign)
        self.sign = np.where(who & ~keep, np.sign(new), self.sign)
        # One that has just turned may, by rounding of t, still be seen before it has.
        turned = np.array([event.direction or 1 for event in self.events])[:, None]
        still = own & ~moved & np.array(self.boolean)[:, None]
        self.sign = np.where(who & still, turned, self.sign)
        # What g still was at its own event is rounding; more of it may be left after the reset.
        self.residual = np.where(who & own, np.abs(old), np.where(who, 0.0, self.residual))
        self.fresh = np.where(who, fired | moved, self.fresh)
        self.value = np.where(who, new, self.value)


def _first(mask: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """The first of ``nodes`` ``(n,)`` where ``mask`` ``(n, B)`` is true; infinite where none is."""
    return np.where(mask.any(0), nodes[mask.argmax(0)], np.inf)


class _Step:
    """One accepted step, for the search."""

    def __init__(self, lookout: Lookout, interpolate: Any, t: Any, t1: Any, accept: Any) -> None:
        self.lookout, self.layout, self.interpolate = lookout, lookout.layout, interpolate
        self.start, self.end = t, t1
        self._accept = accept

    def theta(self, theta: np.ndarray) -> Tensor:
        """Positions ``(B,)`` as the interpolant takes one of them."""
        x = torch.from_numpy(np.ascontiguousarray(theta)).to(self.layout.device)
        return x if self.layout.joint else x.unsqueeze(0)

    def sampled(self, y1: Tensor) -> list[np.ndarray]:
        """Functions at the start, at their samples and at the end, ``(n + 2, B)`` each; one read of the device."""
        lookout, layout = self.lookout, self.layout
        events, field, values, states = lookout.events, lookout.field, [], {}
        for k, event in enumerate(events):
            if event.samples not in states:
                inner = lookout.nodes[k][1:-1]
                theta = torch.from_numpy(inner).to(layout.device)
                theta = theta if layout.joint else theta.unsqueeze(1).expand(-1, layout.batch)
                states[event.samples] = (inner.tolist(), self.interpolate(theta) if event.samples else ())
            for place, y in zip(*states[event.samples], strict=True):
                values.append(evaluate(events, k, field, self.start + place * (self.end - self.start), y))
            values.append(evaluate(events, k, field, self.end, y1))
        if layout.joint:
            self.accept, self.t0, self.t1 = np.array([True]), np.array([self.start]), np.array([self.end])
            rest = iter(lookout._read(values))
        else:
            read = lookout._read([self._accept, self.start, self.end, *values])
            self.accept, self.t0, self.t1 = read[0] > 0, read[1], read[2]
            rest = iter(read[3:])
        self.length = self.t1 - self.t0
        return [np.stack([lookout.value[k], *itertools.islice(rest, e.samples + 1)]) for k, e in enumerate(events)]

    def time(self, theta: np.ndarray) -> np.ndarray:
        return np.where(theta == 1.0, self.t1, self.t0 + theta * self.length)

    def probe(self, k: int, theta: np.ndarray) -> np.ndarray:
        """Function k at positions ``(B,)``."""
        lookout, layout = self.lookout, self.layout
        t = self.time(theta)
        time = float(t[0]) if layout.joint else torch.from_numpy(t).to(layout.device)
        y = self.interpolate(self.theta(theta))[0]
        return lookout._read([evaluate(lookout.events, k, lookout.field, time, y)])[0]

    def root(self, k: int, place: np.ndarray, table: np.ndarray, s: np.ndarray, who: np.ndarray) -> np.ndarray:
        """Positions ``(B,)`` at which function k crosses after sample ``place``, for samples in ``who``."""
        lanes, nodes = np.arange(len(who)), self.lookout.nodes[k]
        left = np.minimum(place, len(nodes) - 2)
        a, b, fa, fb = nodes[left], nodes[left + 1], table[left, lanes], table[left + 1, lanes]
        sign = s[left, lanes]
        lost = who & (np.sign(fa) != sign)
        for _ in range(REFINEMENTS):
            if not lost.any():
                break
            # It has left 0 with this sign, but had it only near the start.
            trial = np.where(lost, a + 0.25 * (b - a), a)
            f = self.probe(k, trial)
            same = np.sign(f) == sign
            a, fa = np.where(lost & same, trial, a), np.where(lost & same, f, fa)
            b, fb = np.where(lost & ~same, trial, b), np.where(lost & ~same, f, fb)
            lost &= ~same & self.wide(a, b)
        bracketed = who & (np.sign(fa) == sign)
        return np.where(bracketed, chandrupatla(lambda x: self.probe(k, x), a, b, fa, fb, bracketed, self.least), a)

    def wide(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.abs(b - a) > self.least(a, b)

    def least(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """How near positions can come to each other before t cannot tell them apart."""
        rounding = np.spacing(np.maximum(np.abs(self.time(a)), np.abs(self.time(b))))
        span = np.where(self.length == 0, 1.0, np.abs(self.length))
        return np.maximum(np.spacing(np.maximum(a, b)), rounding / span)


def chandrupatla(
    f: Callable[[np.ndarray], np.ndarray], a: Any, b: Any, fa: Any, fb: Any, live: np.ndarray, least: Any
) -> np.ndarray:
    """Roots of f between ``a`` and ``b``, where it has values of opposite sign (or 0 at b), to within ``least(a, b)``.

    Arrays ``(B,)``; entries that are not ``live`` are left alone. Of the last bracket the end is taken that is nearer to 0, or
    beyond the crossing where both are as near. Chandrupatla, Adv. Eng. Software 28 (1997), p. 145: inverse quadratic
    interpolation where it can be trusted, else bisection.
    """
    left = a
    c, fc, share = a, fa, np.full_like(a, 0.5)
    best, fbest = b, fb
    going = live & (fb != 0) & (np.abs(b - a) > least(a, b))
    for _ in range(REFINEMENTS):
        if not going.any():
            break
        x = np.where(going, a + share * (b - a), a)
        fx = f(x)
        same = np.sign(fx) == np.sign(fa)
        c, fc = np.where(going, np.where(same, a, b), c), np.where(going, np.where(same, fa, fb), fc)
        b, fb = np.where(going & ~same, a, b), np.where(going & ~same, fa, fb)
        a, fa = np.where(going, x, a), np.where(going, fx, fa)
        # The end beyond the crossing is the one farther from where the search began.
        beyond = np.abs(a - left) > np.abs(b - left)
        first = (np.abs(fa) < np.abs(fb)) | ((np.abs(fa) == np.abs(fb)) & beyond)
        best, fbest = np.where(going, np.where(first, a, b), best), np.where(going, np.where(first, fa, fb), fbest)
        narrow = least(a, b)
        going &= (np.abs(b - a) > narrow) & (fbest != 0)
        with np.errstate(all="ignore"):
            xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
            trusted = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi)
            share = np.where(
                trusted, fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb), 0.5
            )
            edge = np.minimum(0.5 * narrow / np.abs(b - a), 0.5)
        share = np.clip(np.nan_to_num(share, nan=0.5), edge, 1 - edge)
    return best
