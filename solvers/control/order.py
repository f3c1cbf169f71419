"""Step and order together, for methods of variable order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..status import ArgumentError
from .base import CONTROLLERS, Controller, Decision

SMALLEST_RATIO = 1e-30
"""An error of exactly 0 must not become an infinite factor."""
GRAINS = 64.0
"""Factors are rounded down to multiples of 1 / GRAINS: the last bits of a norm, amplified by high differences from step to
step, would otherwise make every machine and batch mode take different steps."""
REPEATED = 0.7
"""Largest dt_next / dt after a rejection, whose estimate is of a step that was too long."""


@dataclass(frozen=True, kw_only=True)
class OrderController(Controller):
    """The order, out of k - 1, k, k + 1, that allows the longest next step.

    The error of order q behaves like dt^(q + 1), so with r_q its error in units of the tolerance order q allows the factor
    safety r_q^(-1/(q+1)). k - 1 is taken where its factor is larger than that of k; else, after an accepted step, k + 1
    where its factor is larger and its error smaller (Hairer, Nørsett & Wanner I, III.7, with the limits below applied
    first: errors far below the tolerance, at a start often mere rounding, do not choose the order).

    Reads ``order`` of the method's state.

    Args:
        safety: in (0, 1].
        factor_min, factor_max: limits on dt_next / dt, 0 < factor_min < 1 < factor_max. Multistep formulas lose their
            stability where steps go on growing by much more than 2.
    """

    variable_order: ClassVar[bool] = True

    safety: float = 0.8
    factor_min: float = 0.2
    factor_max: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.safety <= 1:
            raise ArgumentError(f"safety must be in (0, 1], found {self.safety}")
        if not 0 < self.factor_min < 1:
            raise ArgumentError(f"factor_min must be in (0, 1), found {self.factor_min}")
        if not self.factor_max > 1:
            raise ArgumentError(f"factor_max must be above 1, found {self.factor_max}")

    def update(self, ops: Any, ratio: Any, error_order: int, state: Any, method_state: Any) -> Decision:
        k = method_state.order
        below, own, above = ratio
        accept = own <= 1.0
        shorter, same, longer = (self._factor(ops, r, q + 1) for r, q in ((below, k - 1), (own, k), (above, k + 1)))
        lower = shorter > same
        higher = accept & (longer > same) & (above < own) & ops.invert(lower)
        order = ops.where(lower, k - 1, ops.where(higher, k + 1, k))
        factor = ops.where(lower, shorter, ops.where(higher, longer, same))
        return Decision(accept, ops.where(accept, factor, ops.minimum(factor, REPEATED)), state, order)

    def _factor(self, ops: Any, ratio: Any, exponent: Any) -> Any:
        ratio = ops.maximum(ops.where(ops.isfinite(ratio), ratio, 1e30), SMALLEST_RATIO)
        # An exponent of whole numbers would be divided in torch's default dtype.
        factor = self.safety * ratio ** (-1.0 / (exponent + 0.0 * ratio))
        return ops.clip(factor * GRAINS // 1.0 / GRAINS, self.factor_min, self.factor_max)


CONTROLLERS.register("order", OrderController())
