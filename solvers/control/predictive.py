"""Step-size control for implicit methods: predictive, and reluctant to change a step whose matrix is factorised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..status import ArgumentError
from .base import CONTROLLERS, Controller, Decision

SMALLEST_RATIO = 1e-6
"""An error of exactly 0 must not become an infinite factor."""


class Past(NamedTuple):
    """Ratio of the last accepted step, and the factor that was wanted after it; 0 before the first."""

    ratio: Any
    factor: Any


@dataclass(frozen=True, kw_only=True)
class PredictiveController(Controller):
    """The smaller of the I rule's factor and Gustafsson's prediction from the last two errors (ACM TOMS 20, 1994; Hairer &
    Wanner II, IV.8.25); a wish to grow by less than ``dead_band`` is not granted.

    Args:
        safety, factor_min, factor_max: as in :class:`~solvers.control.pid.PIDController`.
        dead_band: >= 1; 1 follows every wish.
    """

    safety: float = 0.9
    factor_min: float = 0.2
    factor_max: float = 8.0
    dead_band: float = 1.2

    def __post_init__(self) -> None:
        if not 0 < self.safety <= 1:
            raise ArgumentError(f"safety must be in (0, 1], found {self.safety}")
        if not 0 < self.factor_min < 1 < self.factor_max:
            raise ArgumentError(f"need 0 < factor_min < 1 < factor_max, found {self.factor_min} and {self.factor_max}")
        if not self.dead_band >= 1:
            raise ArgumentError(f"dead_band must be at least 1, found {self.dead_band}")

    def init(self, ops: Any, like: Any) -> Past:
        zero = like * 0.0
        return Past(zero, zero)

    def update(self, ops: Any, ratio: Any, error_order: int, state: Past, method_state: Any) -> Decision:
        accept = ratio <= 1.0
        bounded = ops.maximum(ops.where(ops.isfinite(ratio), ratio, 1e30), SMALLEST_RATIO)
        wish = self.safety * ops.power(bounded, -1.0 / error_order)
        known = (state.ratio > 0) & accept
        trend = ops.power(ops.where(known, state.ratio / bounded, 1.0), 1.0 / error_order)
        factor = ops.where(known, ops.minimum(wish, wish * state.factor * trend), wish)
        factor = ops.clip(factor, self.factor_min, self.factor_max)
        factor = ops.where(accept & (factor > 0.99) & (factor < self.dead_band), 1.0, factor)
        past = Past(ops.where(accept, bounded, state.ratio), ops.where(accept, factor, state.factor))
        return Decision(accept, factor, past)


CONTROLLERS.register("predictive", PredictiveController())
