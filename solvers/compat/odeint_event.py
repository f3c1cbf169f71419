"""``odeint_event``: solve until an event, wherever that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import CheckTypeError
from .odeint import odeint


def odeint_event(
    func: Any,
    y0: Any,
    t0: Any,
    *,
    event_fn: Callable[[Any, Any], Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> Any:
    """Solve from ``t0`` until ``event_fn(t, y)`` crosses 0 in one of its elements, or changes if it is boolean.

    ``reverse_time``: towards smaller t. ``odeint_interface``: :func:`~solvers.odeint` or :func:`~solvers.odeint_adjoint`;
    ``kwargs`` go there. What is 0 at t0 fires when it comes back to 0.

    Returns (time of the event, states ``(2, *y0.shape)`` at t0 and there), both differentiable, also with respect to what
    ``event_fn`` uses, and again.

    Raises as :func:`~solvers.odeint`.
    """
    if not isinstance(t0, Tensor):
        if isinstance(t0, bool) or not isinstance(t0, (int, float)):
            raise CheckTypeError(f"t0 must be a torch.Tensor or a number, found {type(t0).__name__}")
        leaf = y0[0] if isinstance(y0, tuple) and y0 else y0
        t0 = torch.tensor(float(t0), dtype=torch.float64, device=getattr(leaf, "device", None))
    t0 = t0.reshape(())
    t = torch.stack([t0, t0.detach() + (-1.0 if reverse_time else 1.0)])
    return odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
