"""I, PI and PID step-size control on the error per step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..status import ArgumentError
from .base import CONTROLLERS, Controller, Decision

SMALLEST_RATIO = 1e-12
"""An error of exactly 0 must not become an infinite factor."""


class History(NamedTuple):
    """Ratios of the last two accepted steps."""

    previous: Any
    before: Any


@dataclass(frozen=True, kw_only=True)
class PIDController(Controller):
    """factor = safety r_n^(-(kI+kP+kD)/k) r_{n-1}^((kP+2kD)/k) r_{n-2}^(-kD/k), with k the order of the error estimate.

    Söderlind, *Digital filters in adaptive time-stepping*, ACM TOMS 29 (2003); kI = 1 alone is the classical rule (Hairer,
    Nørsett & Wanner I, II.4.12). A rejected step is repeated with the I rule. With kP = kD = 0 an accepted step is never
    followed by a smaller one.

    Args:
        kI, kP, kD: integral, proportional, derivative gains (dimensionless).
        safety: in (0, 1].
        factor_min, factor_max: limits on dt_next / dt, 0 < factor_min < 1 < factor_max.
    """

    kI: float = 1.0
    kP: float = 0.0
    kD: float = 0.0
    safety: float = field(default=0.9)
    factor_min: float = 0.2
    factor_max: float = 10.0

    def __post_init__(self) -> None:
        if not 0 < self.safety <= 1:
            raise ArgumentError(f"safety must be in (0, 1], found {self.safety}")
        if not 0 < self.factor_min < 1:
            raise ArgumentError(f"factor_min must be in (0, 1), found {self.factor_min}")
        if not self.factor_max > 1:
            raise ArgumentError(f"factor_max must be above 1, found {self.factor_max}")

    @property
    def _integral(self) -> bool:
        return self.kP == 0.0 and self.kD == 0.0

    def init(self, ops: Any, like: Any) -> Any:
        one = like * 0.0 + 1.0
        return () if self._integral else History(one, one)

    def update(self, ops: Any, ratio: Any, error_order: int, state: Any, method_state: Any) -> Decision:
        accept = ratio <= 1.0
        finite = ops.isfinite(ratio)
        ratio = ops.maximum(ops.where(finite, ratio, 1e30), SMALLEST_RATIO)
        if self._integral:
            factor = self.safety * ratio ** (-self.kI / error_order)
            factor = ops.clip(factor, self.factor_min, self.factor_max)
            return Decision(accept, ops.where(accept, ops.maximum(factor, 1.0), factor), state)
        rejected = self.safety * ratio ** (-1.0 / error_order)
        accepted = (
            self.safety
            * ratio ** (-(self.kI + self.kP + self.kD) / error_order)
            * state.previous ** ((self.kP + 2 * self.kD) / error_order)
            * state.before ** (-self.kD / error_order)
        )
        factor = ops.clip(ops.where(accept, accepted, rejected), self.factor_min, self.factor_max)
        history = History(ops.where(accept, ratio, state.previous), ops.where(accept, state.previous, state.before))
        return Decision(accept, factor, history)


CONTROLLERS.register("i", PIDController())
CONTROLLERS.register("pi", PIDController(kI=0.3, kP=0.4))  # Hairer & Wanner II, IV.2.43c: PI3040
CONTROLLERS.register("pid", PIDController(kI=0.25, kP=0.5, kD=0.25))  # Söderlind 2003, H312PID
