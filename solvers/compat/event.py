"""``event_fn=``: torchdiffeq's events on those of ``solve``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..adjoint import Adjoint
from ..events import Event
from ..status import ArgumentError, ArgumentTypeError
from .errors import CheckError
from .options import SCIPY, Choice

ALONE = 8
"""Elements of an event function up to which each is looked for by itself; beyond, the first change of sign among them all."""

FIXED_ITERATIONS = 20_000
"""Fixed steps after which an event that does not come is given up, as torchdiffeq does."""


def solve_event(problem: Any, choice: Choice, event_fn: Any, adjoint: Adjoint, **more: Any) -> tuple[Tensor, Any]:
    """(time of the event, states at the start and there) of a ``Problem``: from t[0] in the direction of t[1], as far as it
    takes.

    Raises ``ArgumentError`` unless t holds two times, ``CheckError`` for fixed steps without ``step_size``, and what ``solve``
    raises where no event comes.
    """
    t, y0 = problem.t, problem.y0
    if choice.name == SCIPY:
        raise ArgumentError(f"events need a method of this package, found {SCIPY!r}")
    if not choice.adaptive and "step_size" not in choice.options:
        raise CheckError(
            "Event handling for fixed step solvers currently requires `step_size` to be provided in options."
        )
    sign = 1.0 if float(t[1].detach()) > float(t[0].detach()) else -1.0
    end = torch.tensor([sign * math.inf], dtype=torch.float64, device=t.device)
    endless = dataclasses.replace(problem, t=torch.cat([t[:1].to(torch.float64), end]))
    if not choice.adaptive:
        choice = choice._replace(max_steps=FIXED_ITERATIONS)
    events = _events(event_fn, t[0], y0, more.get("batch_dim"))
    solution = endless.run(choice, adjoint, events=events, throw=True, save="final", **more)
    fired = solution.events[0]
    states = torch.utils._pytree.tree_map(lambda start, there: torch.stack([start, there]), y0, fired.y)
    return fired.t.to(t.dtype), states


def check_event_times(t: Tensor) -> None:
    if len(t) != 2:
        raise ArgumentError(f"We require len(t) == 2 when in event handling mode, but got len(t)={len(t)}.")


def _events(event_fn: Any, t0: Tensor, y0: Any, batch_dim: Any) -> list[Event]:
    """``event_fn`` as native events: one for each of a few elements, else one for all of them together."""
    if not callable(event_fn):
        raise ArgumentTypeError(f"event_fn must be callable as event_fn(t, y), found {type(event_fn).__name__}")
    if batch_dim is not None:
        return [Event(event_fn)]
    with torch.no_grad():
        first = event_fn(t0.detach(), y0)
    if not isinstance(first, Tensor):
        raise ArgumentTypeError(f"event_fn must return a tensor, found {type(first).__name__}")
    if first.numel() == 1:
        return [Event(lambda t, y, *args: event_fn(t, y).reshape(()))]
    if first.numel() <= ALONE:
        return [Event(_element(event_fn, i)) for i in range(first.numel())]
    combined = combined_events(event_fn, first)
    return [Event(lambda t, y, *args: combined(t, y))]


def combined_events(event_fn: Callable[..., Tensor], first: Tensor) -> Callable[..., Tensor]:
    """One function for all elements of ``event_fn``, whose first values are ``first``: > 0 until one changes its sign."""

    def number(value: Tensor) -> Tensor:
        return torch.where(value, 1.0, -1.0) if value.dtype == torch.bool else value

    sign = torch.sign(number(first))
    signs = torch.where(sign == 0, 1, sign)
    return lambda t, y: (number(event_fn(t, y)) * signs).amin()


def _element(event_fn: Callable[..., Tensor], i: int) -> Callable[..., Tensor]:
    return lambda t, y, *args: event_fn(t, y).reshape(-1)[i]
