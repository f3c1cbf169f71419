"""The first step size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def initial_step(field: Any, norm: Any, t0: Any, y0: Tensor, f0: Tensor, error_order: int, span: Any) -> tuple[Any, int]:
    """|dt| for the first step, and the calls of f that took (one).

    Hairer, Nørsett & Wanner I, II.4 ("Starting step size"): the larger of the first two derivatives of y, measured in the
    error norm, sets the step at which an error of order ``error_order`` is a hundredth of the tolerance.

    Args:
        t0, y0, f0: the start, flat state, and f there. span: signed length of the solve (float or ``(B,)``).
    """
    ops, layout = field.layout.ops, field.layout
    scale = norm.scale(y0)
    d0, d1 = norm(y0, scale), norm(f0, scale)
    small = (d0 < 1e-5) | (d1 < 1e-5)
    h0 = ops.where(small, 1e-6, 0.01 * d0 / ops.maximum(d1, 1e-30))
    # Where f is not finite nothing is known, but f must still be asked at a time that is a number.
    h0 = ops.where(ops.isfinite(d1), h0, 0.0)
    # A shade less than the span, so that t0 + h0 does not round to a time outside.
    h0 = _as_time(ops.minimum(h0, abs(span) * (1.0 - 2.0**-52)), layout)
    step = layout.spread(ops.copysign(h0, span))
    f1 = field(field.time(t0 + ops.copysign(h0, span)), y0 + step * f0)
    d2 = norm(f1 - f0, scale) / ops.maximum(h0, 1e-300)
    steepest = ops.maximum(d1, d2)
    h1 = ops.where(
        steepest <= 1e-15,
        ops.maximum(h0 * 1e-3, 1e-6),
        ops.power(0.01 / ops.maximum(steepest, 1e-300), 1.0 / error_order),
    )
    # f may not exist where the Euler step led: then only its length is known to be too much.
    h1 = ops.where(ops.isfinite(d2), h1, h0 * 0.01)
    # 50 and not the book's 100, which for y' = -lambda y is 1 / lambda exactly: there the error estimate of bosh3 has a root.
    dt = _as_time(ops.minimum(ops.minimum(50 * h0, h1), abs(span)), layout)
    return dt, 1


def _as_time(h: Any, layout: Any) -> Any:
    return h.to(torch.float64) if isinstance(h, Tensor) else h
