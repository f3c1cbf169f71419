"""Where a solver object's event happens, and the gradient of that."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..event import combined_events


def find_event(interp_fn: Any, sign0: Tensor, t0: Tensor, t1: Tensor, event_fn: Any, tol: Any) -> tuple[Tensor, Tensor]:
    """(time, state) at which ``event_fn(t, interp_fn(t))`` leaves ``sign0`` in [t0, t1], to within ``tol``, by bisection."""
    width = float(torch.as_tensor(tol).min())
    with torch.no_grad():
        low, high = t0, t1
        middle = low + (high - low) / 2
        while bool(high - low > width) and bool((middle > low) & (middle < high)):
            still = torch.sign(event_fn(middle, interp_fn(middle))) == sign0
            low, high = (middle, high) if still else (low, middle)
            middle = low + (high - low) / 2
    return middle, interp_fn(middle)


def combine_event_functions(event_fn: Any, t0: Tensor, y0: Any) -> Any:
    """One function of (t, y), > 0 at the start and until an element of ``event_fn`` changes its sign."""
    with torch.no_grad():
        first = event_fn(t0, y0)
    return combined_events(event_fn, first)


class Search:
    """Follows the sign of an event function from step to step. What is 0 at the start counts from where it has left 0."""

    def __init__(self, event_fn: Any, t: Tensor, y: Tensor) -> None:
        self.event_fn = event_fn
        self.sign = torch.sign(event_fn(t, y))

    def crossed(self, t: Tensor, y: Tensor) -> bool:
        now = torch.sign(self.event_fn(t, y))
        if bool(self.sign == 0):
            self.sign = now
        return bool(now != self.sign)


class ImplicitFnGradientRerouting:
    """``apply(func, event_fn, event_t, state_t)``: the same time and state with the gradients of the event.

    By the implicit function theorem: the time moves by -dg/g', where g' is the derivative of ``event_fn`` along the solution,
    and the state along with it.
    """

    @staticmethod
    def apply(func: Any, event_fn: Any, event_t: Tensor, state_t: Tensor) -> tuple[Tensor, Tensor]:
        at = event_t.detach()
        if not torch.is_grad_enabled():
            return at, state_t
        with torch.no_grad():
            slope = func(at, state_t.detach())
        t, y = at.clone().requires_grad_(), state_t.detach().requires_grad_()
        by_t, by_y = torch.autograd.grad(event_fn(t, y).sum(), (t, y), allow_unused=True)
        rate = torch.zeros_like(at) if by_t is None else by_t
        if by_y is not None:
            rate = rate + (by_y.conj() * slope).real.sum()
        g = event_fn(at, state_t)
        if not g.requires_grad or bool(rate == 0):
            return at, state_t
        time = at - ((g - g.detach()) / rate).to(at.dtype).reshape(at.shape)
        return time, state_t + slope * (time - at).to(slope.real.dtype if slope.is_complex() else slope.dtype)
