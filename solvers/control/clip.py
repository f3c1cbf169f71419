"""Where steps must end: the end of the solve, ``step_t``, jumps, and the output grid of a fixed-step solve.

A clock knows the user's times. ``propose`` shortens a step that would pass the next stop; nodes that come from the user
carry the gradient of the tensor they came from, all others are constants (fixed steps: functions of the start).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import carries_gradient

TOUCH = 1e-10
"""A step that ends within this fraction of itself before a stop is stretched to it: no slivers."""

TOUCH_FIXED = 1e-5
"""The same for constant steps, whose nodes are sums of 10^5 terms."""

INSIDE = 1.0 - 2.0**-52
"""Makes fl(t + fl(stop - t)) <= stop, so that f is never called an ulp beyond the end."""


@dataclass(frozen=True)
class Jump:
    """The state changes at time ``t``: y <- map(t, y), and the method restarts.

    Args:
        t: a number or 0-dim tensor, or ``(B,)`` per sample (NaN: none); differentiable.
        map: ``(t, y) -> y`` on the user's state; None where only f is discontinuous.

    Jumps in (t0, t1] are applied, in the given order where they coincide. An output at the time of a jump shows the
    state after it.
    """

    t: Any
    map: Callable[[Any, Any], Any] | None = None


class Stop(NamedTuple):
    value: float
    source: Tensor | None
    jumps: tuple[int, ...]


def joint_stops(sources: list[tuple[Any, int | None]], start: float, end: float, end_source: Any) -> list[Stop]:
    """Stops in (start, end] in the order of travel, coinciding ones merged; ``sources`` are (time, jump number)."""
    sign = 1.0 if end >= start else -1.0
    found: dict[float, tuple[Tensor | None, tuple[int, ...]]] = {}
    for time, jump in sources:
        value = float(time.detach() if isinstance(time, Tensor) else time)
        if not 0.0 < sign * (value - start) <= sign * (end - start):
            continue
        source, jumps = found.get(value, (None, ()))
        if carries_gradient(time):
            source = time
        found[value] = (source, jumps if jump is None else (*jumps, jump))
    source, jumps = found.get(end, (None, ()))
    found[end] = (end_source if carries_gradient(end_source) else source, jumps)
    return [Stop(v, *found[v]) for v in sorted(found, reverse=sign < 0)]


class JointClock:
    """Times of a joint solve, as Python floats.

    ``moving``: nodes that are nobody's times may carry gradients, too (those after the reset of an event).
    """

    def __init__(
        self, t: Tensor, stops: list[tuple[Any, int | None]], fixed_dt: Tensor | None = None, clip_end: bool = True,
        moving: bool = False,
    ) -> None:
        times = t.detach().tolist()
        self.outputs = times
        self.start, self.end = times[0], times[-1]
        self.sign = 1.0 if self.end >= self.start else -1.0
        self.source = t
        self.fixed_dt = fixed_dt
        self.fixed = fixed_dt is not None
        self.touch = TOUCH_FIXED if self.fixed else TOUCH
        self.stops = joint_stops(stops, self.start, self.end, t[-1])
        self.clip_end = clip_end
        self.next = 0
        self.keys = [self.sign * v for v in times]
        self.differentiable = torch.is_grad_enabled() and (
            moving
            or carries_gradient(t)
            or any(s.source is not None for s in self.stops)
            or carries_gradient(fixed_dt)
        )

    def first(self) -> Any:
        """The first node, with its gradient if one is wanted."""
        return self.source[0] if self.differentiable else self.start

    def cut(self, leaf: Callable[[Any], Any]) -> None:
        """Put ``leaf(x)`` in the place of every x that may be a function of the user's times (None among them)."""
        self.fixed_dt = leaf(self.fixed_dt)
        self.stops = [stop._replace(source=leaf(stop.source)) for stop in self.stops]

    def propose(self, t: float, dt: float, active: Any) -> tuple[float, float, bool]:
        """End of the step, its length, and whether it ends on a stop."""
        stop = self.stops[self.next].value
        rest = stop - t
        if self.sign * (rest - dt) <= self.touch * abs(dt):
            last = self.next == len(self.stops) - 1
            if self.clip_end or not last or rest == dt:
                return stop, rest * INSIDE, True
            return t + dt, dt, True
        return t + dt, dt, False

    def graph(self, lo: Any, t1: Any, h: Any, hit: bool) -> tuple[Any, Any]:
        """(dt, end) of the step as tensors carrying the gradients that the conventions give them."""
        if hit:
            source = self.stops[self.next].source
            end = source if source is not None else torch.tensor(t1, dtype=torch.float64, device=self.source.device)
            return end - lo, end
        if self.fixed:
            return self.fixed_dt, lo + self.fixed_dt
        end = torch.tensor(t1, dtype=torch.float64, device=self.source.device)
        return end - lo, end

    def advance(self, accept: bool, hit: bool) -> bool:
        """Move past the stop that was reached; whether that was the end."""
        if not (accept and hit):
            return False
        self.next += 1
        return self.next == len(self.stops)

    def jumps(self, accept: bool, hit: bool) -> tuple[int, ...]:
        """Numbers of the jumps at the stop that is about to be reached."""
        return self.stops[self.next].jumps if accept and hit else ()

    def tied(self, hit: bool) -> bool:
        """Whether an output at the end of the step gets its gradient to t through that end.

        Not where it lies there by chance, on a node that is nobody's time: there the interpolant has that gradient. At a
        jump it has the wrong value.
        """
        if not self.differentiable:
            return True
        stop = self.stops[self.next] if hit else None
        return stop is not None and (stop.source is not None or bool(stop.jumps))

    def reached(self, t1: float, done: int) -> int:
        """How many outputs lie at or before ``t1``, ``done`` of them known."""
        return bisect.bisect_right(self.keys, self.sign * t1, lo=done)

    def theta(self, first: int, last: int, lo: Any, h: Any) -> Tensor:
        """Positions of outputs first..last-1 in the step, ``(n,)`` float64."""
        if isinstance(lo, Tensor) or isinstance(h, Tensor):
            return (self.source[first:last] - lo) / h
        values = [min(max((v - lo) / h, 0.0), 1.0) for v in self.outputs[first:last]]
        return torch.tensor(values, dtype=torch.float64, device=self.source.device)


class RowClock:
    """Times of a batched solve, ``(B,)`` float64 tensors.

    ``t``: ``(B, T)``, rows NaN-padded at their end. ``stops``: (time, jump number) pairs, times 0-dim or ``(B,)``.
    """

    def __init__(
        self, t: Tensor, stops: list[tuple[Any, int | None]], fixed_dt: Tensor | None = None, moving: bool = False
    ) -> None:
        self.source = t
        values = t.detach()
        # NaN pads; infinity is the end of a solve that an event ends.
        self.counts = (values == values).sum(1)
        last = (self.counts - 1).clamp(min=0).unsqueeze(1)
        self.start = values[:, 0].clone()
        self.end = values.gather(1, last).squeeze(1)
        self.sign = torch.where(self.end >= self.start, 1.0, -1.0).to(values)
        self.keys = torch.nan_to_num(values * self.sign.unsqueeze(1), nan=torch.inf, posinf=torch.inf).contiguous()
        self.fixed_dt: Any = fixed_dt
        self.fixed = fixed_dt is not None
        self.touch = 1.0 + (TOUCH_FIXED if self.fixed else TOUCH)
        self._collect(stops, t.gather(1, last).squeeze(1))
        self.next = torch.zeros_like(self.counts)
        self.differentiable = torch.is_grad_enabled() and (
            moving or carries_gradient(self.stop_source) or carries_gradient(t) or carries_gradient(fixed_dt)
        )

    def _collect(self, stops: list[tuple[Any, int | None]], end: Tensor) -> None:
        columns, owned, self.jump_times = [end], [True], {}
        for time, jump in stops:
            column = torch.as_tensor(time, dtype=torch.float64, device=end.device).expand_as(end)
            inside = (self.sign * (column.detach() - self.start) > 0) & (self.sign * (self.end - column.detach()) >= 0)
            column = torch.where(inside, column, torch.nan)
            columns.append(column)
            owned.append(jump is not None or carries_gradient(column))
            if jump is not None:
                self.jump_times[jump] = column.detach()
        source = torch.stack(columns, 1)
        keys = torch.nan_to_num(source.detach() * self.sign.unsqueeze(1), nan=torch.inf, posinf=torch.inf)
        # Stable: of coinciding stops the end is first, so that its gradient is the one that counts.
        keys, order = torch.sort(keys, dim=1, stable=True)
        self.owned = torch.tensor(owned, device=end.device).expand_as(order).gather(1, order)
        self.stop_keys = keys
        self.stop_source = source.gather(1, order)
        self.stop_values = self.stop_source.detach()
        self.single = keys.shape[1] == 1
        self._only: tuple[Tensor, Tensor | None] = (self.stop_values[:, 0], self.stop_source[:, 0])

    def cut(self, leaf: Callable[[Any], Any]) -> None:
        """Put ``leaf(x)`` in the place of every x that may be a function of the user's times (None among them)."""
        self.fixed_dt, self.stop_source = leaf(self.fixed_dt), leaf(self.stop_source)
        # Selected anew in every step, so that no two steps share a part of the graph.
        self._only = (self.stop_values[:, 0], None)

    def first(self) -> Tensor:
        return self.source[:, 0] if self.differentiable else self.start

    def _current(self, table: Tensor) -> Tensor:
        if self.single:
            known = self._only[table is self.stop_source]
            return table[:, 0] if known is None else known
        return table.gather(1, self.next.clamp(max=table.shape[1] - 1).unsqueeze(1)).squeeze(1)

    def propose(self, t: Tensor, dt: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """End of each step, its length (0 for samples that do not move), and whether it ends on a stop."""
        stop = self._current(self.stop_values)
        rest = stop - t
        hit = rest / dt <= self.touch
        h = torch.where(hit, rest * INSIDE, dt)
        # Samples that rest: their dt is 0, but for constant steps, where it may be infinite (a grid), so no product.
        h = torch.where(active > 0, h, 0.0) if self.fixed else h * active
        return torch.where(hit, stop, t + h), h, hit

    def graph(self, lo: Tensor, t1: Tensor, h: Tensor, hit: Tensor) -> tuple[Tensor, Tensor]:
        """(dt, end) of the step carrying the gradients that the conventions give them; rows that rest have dt = 0."""
        inner = lo + self.fixed_dt if self.fixed else t1
        end = torch.where(h == 0, lo, torch.where(hit, self._current(self.stop_source), inner))
        return end - lo, end

    def tied(self, hit: Tensor) -> Any:
        """Samples whose outputs at the end of the step get their gradient to t through it (as in JointClock); or True."""
        if not self.differentiable:
            return True
        return hit if self.single else hit & self._current(self.owned)

    def finishes(self, accept: Tensor, t1: Tensor) -> Tensor:
        """Samples that have reached their end."""
        return accept & (t1 == self.end)

    def advance(self, accept: Tensor, hit: Tensor, t1: Tensor) -> None:
        """Move past the stops that were reached."""
        if not self.single:
            passed = torch.searchsorted(self.stop_keys, (t1 * self.sign).unsqueeze(1), right=True).squeeze(1)
            self.next = torch.where(accept & hit, passed, self.next)

    def jumping(self, accept: Tensor, t1: Tensor) -> dict[int, Tensor]:
        """Jump number -> mask of the samples that jump at the end of this step."""
        return {jump: accept & (t1 == times) for jump, times in self.jump_times.items()}

    def reached(self, t1: Tensor) -> Tensor:
        """How many outputs lie at or before ``t1``, ``(B,)``."""
        return torch.searchsorted(self.keys, (t1 * self.sign).unsqueeze(1), right=True).squeeze(1)

    def theta(self, index: Tensor, lo: Tensor, h: Tensor) -> Tensor:
        """Positions of outputs ``index`` ``(n, B)`` in the step, in [0, 1]; 1 where a row has no such output."""
        wanted = self.source.T.gather(0, index.clamp(max=self.source.shape[1] - 1))
        good = (index < self.counts) & (h != 0)
        # Harmless operands where there is no output, so that the backward pass meets no 0 * inf.
        theta = (torch.where(good, wanted, lo) - lo) / torch.where(good, h, 1.0)
        return torch.where(good, theta.clamp(0.0, 1.0), 1.0)
