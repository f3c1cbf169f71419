"""Step and order together, for methods of variable order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..status import ArgumentError
from .base import CONTROLLERS, Controller, Decision

SMALLEST_RATIO = 1e-30


@dataclass(frozen=True, kw_only=True)
class OrderController(Controller):
    safety: float = 0.9
    factor_min: float = 0.2
    factor_max: float = 2.0
    dead: float = 1.0

    def update(self, ops: Any, ratio: Any, error_order: int, state: Any, method_state: Any) -> Decision:
        k = method_state.order
        low, own, high = ratio
        accept = own <= 1.0
        f_own = self._factor(ops, own, k + 1)
        f_low = self._factor(ops, low, k)
        f_high = self._factor(ops, high, k + 2)
        rising = k > method_state.count
        lower = (f_low > f_own) & (k > 1)
        higher = (high < own) & (f_high > f_own) & accept & ops.invert(lower)
        climb = rising & accept & ops.invert(lower) & (k < method_state.highest)
        order = ops.where(lower, k - 1, ops.where(higher | climb, k + 1, k))
        f = ops.where(lower, f_low, ops.where(higher, f_high, f_own))
        # still rising: double
        f = ops.clip(f, self.factor_min, self.factor_max)
        f = ops.where(accept, ops.where(f >= self.dead, f, ops.where(f < 1.0, f, 1.0)), ops.minimum(f, 0.9))
        return Decision(accept, f, state, order)

    def _factor(self, ops, ratio, exponent):
        ratio = ops.maximum(ops.where(ops.isfinite(ratio), ratio, 1e30), SMALLEST_RATIO)
        return self.safety * ratio ** (-1.0 / exponent)


CONTROLLERS.register("order", OrderController())
