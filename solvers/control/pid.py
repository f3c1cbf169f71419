"""I, PI and PID step-size control on the error per step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..registry import options_of
from ..status import ArgumentError, ArgumentTypeError
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
    Nørsett & Wanner I, II.4.12). A rejected step is repeated with the I rule.

    Args:
        kI, kP, kD: integral, proportional, derivative gains (dimensionless).
        safety: in (0, 1].
        factor_min, factor_max: limits on dt_next / dt, 0 < factor_min < 1 < factor_max.
        factor_min_accepted: lower limit after an accepted step (kP = kD = 0 only). 1 never shrinks then, as torchdiffeq
            does; measured, that rejects 2 to 15 times as many steps and needs 3 to 18 % more evaluations.
    """

    kI: float = 1.0
    kP: float = 0.0
    kD: float = 0.0
    safety: float = 0.9
    factor_min: float = 0.2
    factor_max: float = 10.0
    factor_min_accepted: float = 0.0

    def __post_init__(self) -> None:
        for name in options_of(self):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ArgumentTypeError(f"{name} must be a number, found {value!r:.40}")
            if not math.isfinite(value):
                raise ArgumentError(f"{name} must be finite, found {value}")
        if not 0 < self.safety <= 1:
            raise ArgumentError(f"safety must be in (0, 1], found {self.safety}")
        if not 0 < self.factor_min < 1:
            raise ArgumentError(f"factor_min must be in (0, 1), found {self.factor_min}")
        if not 0 <= self.factor_min_accepted <= 1:
            raise ArgumentError(f"factor_min_accepted must be in [0, 1], found {self.factor_min_accepted}")
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
        if self._integral:
            exponent = -self.kI / error_order
            factor = ops.rescale(ratio, exponent, self.safety, self.factor_min, self.factor_max)
            if self.factor_min_accepted > self.factor_min:
                factor = ops.where(accept, ops.maximum(factor, self.factor_min_accepted), factor)
            return Decision(accept, factor, state)
        ratio = ops.maximum(ops.where(ops.isfinite(ratio), ratio, 1e30), SMALLEST_RATIO)
        rejected = self.safety * ops.power(ratio, -1.0 / error_order)
        accepted = (
            self.safety
            * ops.power(ratio, -(self.kI + self.kP + self.kD) / error_order)
            * ops.power(state.previous, (self.kP + 2 * self.kD) / error_order)
            * ops.power(state.before, -self.kD / error_order)
        )
        factor = ops.clip(ops.where(accept, accepted, rejected), self.factor_min, self.factor_max)
        history = History(ops.where(accept, ratio, state.previous), ops.where(accept, state.previous, state.before))
        return Decision(accept, factor, history)


CONTROLLERS.register("i", PIDController())
CONTROLLERS.register("pi", PIDController(kI=0.3, kP=0.4))  # Hairer & Wanner II, IV.2.43c: PI3040
# Exponents 0.58, -0.21, 0.1: the PID defaults of ARKODE (SUNDIALS). Söderlind's H312PID (2/9, -2/9, 1/18) is smoother;
# measured on four problems, it takes 15 to 30 % more steps.
CONTROLLERS.register("pid", PIDController(kI=0.47, kP=0.01, kD=0.1))
