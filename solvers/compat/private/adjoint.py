"""``torchdiffeq._impl.adjoint``: its private names on ``odeint_adjoint``."""

from __future__ import annotations

from typing import Any

from ..adjoint import find_parameters, odeint_adjoint
from ..classes import SOLVERS
from ..odeint import odeint
from .misc import _all_adjoint_callback_names, _all_callback_names, _check_inputs, _flat_to_shape, _mixed_norm

__all__ = [
    "SOLVERS",
    "OdeintAdjointMethod",
    "_all_adjoint_callback_names",
    "_all_callback_names",
    "_check_inputs",
    "find_parameters",
    "handle_adjoint_norm_",
    "odeint",
    "odeint_adjoint",
]


def handle_adjoint_norm_(adjoint_options: dict[str, Any], shapes: Any, state_norm: Any) -> None:
    """Put into ``adjoint_options`` the norm of the backward state (t, y, adj_y, *params) that its entry "norm" asks for."""
    asked = adjoint_options.get("norm")
    if asked is not None and asked != "seminorm":
        if shapes is not None:
            adjoint_options["norm"] = _of_parts(asked, shapes)
        return

    def norm(state: Any) -> Any:
        t, y, adj_y, *params = state
        found = [t.abs(), state_norm(y), state_norm(adj_y)]
        return max(found if asked == "seminorm" else [*found, _mixed_norm(params)])

    adjoint_options["norm"] = norm


def _of_parts(norm: Any, shapes: Any) -> Any:
    def whole(state: Any) -> Any:
        t, y, adj_y, *params = state
        return norm((t, *_flat_to_shape(y, (), shapes), *_flat_to_shape(adj_y, (), shapes), *params))

    return whole


class OdeintAdjointMethod:
    """``apply`` of torchdiffeq's autograd function, by :func:`~solvers.odeint_adjoint`."""

    @staticmethod
    def apply(
        shapes: Any, func: Any, y0: Any, t: Any, rtol: Any, atol: Any, method: Any, options: Any, event_fn: Any,
        adjoint_rtol: Any, adjoint_atol: Any, adjoint_method: Any, adjoint_options: Any, t_requires_grad: bool,
        *adjoint_params: Any,
    ) -> Any:
        return odeint_adjoint(
            func, y0, t if t_requires_grad else t.detach(), rtol=rtol, atol=atol, method=method, options=options,
            event_fn=event_fn, adjoint_rtol=adjoint_rtol, adjoint_atol=adjoint_atol, adjoint_method=adjoint_method,
            adjoint_options=adjoint_options, adjoint_params=adjoint_params,
        )
