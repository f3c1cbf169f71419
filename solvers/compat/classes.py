"""Solver classes by name: torchdiffeq's ``SOLVERS``, where its users insert their own, and how ``odeint`` runs those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..status import ArgumentError, UnsupportedError

SOLVERS: dict[str, type] = {}
"""Method name -> class. Filled by ``private``; a name with another class than it put there belongs to the user."""

BUILT_IN: dict[str, type] = {}

OVERRIDES: list[Callable[[type], bool]] = []
"""Each tells whether functions that a built-in class relies on were replaced from outside."""


def own(method: Any) -> type | None:
    """The class that has to run ``method`` as a class: the user's, or one whose functions the user has replaced."""
    name = "dopri5" if method is None else method
    found = SOLVERS.get(name) if isinstance(name, str) else None
    if found is None or (found is BUILT_IN.get(name) and not any(replaced(found) for replaced in OVERRIDES)):
        return None
    return found


def refuse(method: Any, batch_dim: Any, strict: bool = False) -> None:
    """Raise ``UnsupportedError`` / ``ArgumentError`` for what no solver class can be asked for."""
    if batch_dim is not None:
        raise UnsupportedError(
            f"batch_dim={batch_dim} needs a method of this package, found the solver class behind method={method!r}: leave it "
            "away, then the batch is one system"
        )
    if strict:
        raise ArgumentError(f"strict=True means methods of this package, found the solver class behind method={method!r}")


def run(
    solver: type, func: Any, y0: Any, t: Any, rtol: Any, atol: Any, method: Any, options: Any, event_fn: Any = None,
    args: tuple[Any, ...] = (),
) -> Any:
    """What ``solver`` integrates, in torchdiffeq's protocol; gradients by backpropagation, of an event's time, too.

    Raises ``UnsupportedError`` for events that the class cannot look for.
    """
    from .private.event_handling import ImplicitFnGradientRerouting
    from .private.misc import _check_inputs, _flat_to_shape

    if args:
        func = _WithArguments(func, args)
    checked = _check_inputs(func, y0, t, rtol, atol, method, options, event_fn, SOLVERS)
    shapes, func, y0, t, rtol, atol, method, options, event_fn, turned = checked
    made = solver(func=func, y0=y0, rtol=rtol, atol=atol, **options)
    if event_fn is None:
        solution = made.integrate(t)
        return solution if shapes is None else _flat_to_shape(solution, (len(t),), shapes)
    if not hasattr(made, "integrate_until_event"):
        raise UnsupportedError(f"the solver class behind method={method!r} has no integrate_until_event, which event_fn needs")
    time, states = made.integrate_until_event(t[0], event_fn)
    time, last = ImplicitFnGradientRerouting.apply(func, event_fn, time, states[-1])
    states = torch.stack([states[0], last])
    time = (-time if turned else time).to(t)
    return time, states if shapes is None else _flat_to_shape(states, (2,), shapes)


class _WithArguments:
    """``func`` with further arguments; all else is that of ``func``, callbacks for example."""

    def __init__(self, func: Any, args: tuple[Any, ...]) -> None:
        self._func, self._args = func, args

    def __call__(self, t: Any, y: Any) -> Any:
        return self._func(t, y, *self._args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._func, name)
