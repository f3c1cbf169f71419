"""The quartic through both ends of a step, their slopes and its middle, as coefficients of 1, x, .., x^4."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import CheckError
from ..strict import _quartic


def _interp_fit(y0: Tensor, y1: Tensor, y_mid: Tensor, f0: Tensor, f1: Tensor, dt: Any) -> list[Tensor]:
    """Coefficients, lowest power first, of the quartic over a step of length ``dt``."""
    return [y0, *_quartic(dt * f0, dt * f1, y1 - y0, y_mid - y0)]  # type: ignore[arg-type, list-item]


def _interp_evaluate(coefficients: Any, t0: Any, t1: Any, t: Any) -> Tensor:
    """The polynomial at ``t`` of [t0, t1]; raises ``CheckError`` outside."""
    if not (t0 <= t <= t1):
        raise CheckError(f"invalid interpolation, fails `t0 <= t <= t1`: {t0}, {t}, {t1}")
    x = ((t - t0) / (t1 - t0)).to(coefficients[0].real.dtype if coefficients[0].is_complex() else coefficients[0].dtype)
    total = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        total = total * x + coefficient
    return total
