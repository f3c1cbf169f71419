"""Solver classes by name: torchdiffeq's ``SOLVERS``, where its users insert their own, and how ``odeint`` runs those."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def run(solver: type, func: Any, y0: Any, t: Any, rtol: Any, atol: Any, method: Any, options: Any) -> Any:
    """What ``solver`` integrates, in torchdiffeq's protocol; gradients by backpropagation."""
    from .private.misc import _check_inputs, _flat_to_shape

    checked = _check_inputs(func, y0, t, rtol, atol, method, options, None, SOLVERS)
    shapes, func, y0, t, rtol, atol, method, options, _, _ = checked
    solution = solver(func=func, y0=y0, rtol=rtol, atol=atol, **options).integrate(t)
    return solution if shapes is None else _flat_to_shape(solution, (len(t),), shapes)
