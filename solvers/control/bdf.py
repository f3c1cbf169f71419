"""Step and order of backward differentiation formulas, which want both left alone for some steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from ..status import ArgumentError
from .base import CONTROLLERS, Controller, Decision

SMALLEST_RATIO = 1e-10
"""An error of exactly 0 must not become an infinite factor."""
GRAINS = 64.0
"""Factors are rounded down to multiples of 1 / GRAINS, so that the last bits of a norm do not change the steps."""
BIAS = (2.0, 2.0, 2.5)
"""Multiples of the errors of orders k - 1, k, k + 1 that must meet the tolerance at the next step."""
REJECTED_BIAS = 1.2
REJECTED = (0.9, 0.2)
"""Safety and largest cut of a step that was repeated for its error."""
FAILED = 0.25
"""Factor of a step whose equation was not solved, or where f was not finite."""
SHRINK = (0.5, 0.95)
"""Limits of the factor of a shorter step after an accepted one."""
YOUNG, YOUNG_FACTOR = 5, 5.0
"""Steps from a start during which a step may grow by more."""
DEAD_BAND = {False: 1.2, True: 1.5}
"""Factor from which a step grows, without and with matrices to factorise: of those there are a third fewer then, for as many
calls of f, and the longer runs of equal steps bring errors down (diffusion on 128 points at 1e-5: from 1.3e-5 to 4e-6)."""
MOST_REJECTIONS = 3
"""Rejections in a row from which the order goes back to 1: the past says nothing about what comes."""


class Streak(NamedTuple):
    """Accepted steps of the present order since it was chosen or a step was rejected; accepted steps since the start;
    rejections in a row."""

    held: Any
    taken: Any
    rejections: Any


@dataclass(frozen=True, kw_only=True)
class BDFController(Controller):
    """The order, out of k - 1, k, k + 1, that allows the longest next step, asked for after k + 1 steps of order k; and a step
    that grows only where it may grow by ``dead_band`` (Shampine & Reichelt 1997; Byrne & Hindmarsh 1975, ACM TOMS 1).

    Reads ``order`` and ``count`` of the method's state.

    Args:
        safety: in (0, 1]. factor_max: limit on dt_next / dt. dead_band: >= 1; growth by less is not granted (None: 1.5 where
            another step is another matrix to be factorised, as the method's state says by ``factorises``, else 1.2).
    """

    variable_order: ClassVar[bool] = True

    safety: float = 0.95
    factor_max: float = 2.0
    dead_band: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.safety <= 1:
            raise ArgumentError(f"safety must be in (0, 1], found {self.safety}")
        if not self.factor_max > 1:
            raise ArgumentError(f"factor_max must be above 1, found {self.factor_max}")
        if self.dead_band is not None and not self.dead_band >= 1:
            raise ArgumentError(f"dead_band must be at least 1, found {self.dead_band}")

    def init(self, ops: Any, like: Any) -> Streak:
        none = ops.where(like == 0, 0, 0)
        return Streak(none, none, none)

    def update(self, ops: Any, ratio: Any, error_order: int, state: Streak, method_state: Any) -> Decision:
        k, own = method_state.order, ratio[1]
        accept, finite = own <= 1.0, ops.isfinite(own)
        starts = method_state.count == 0
        held = ops.where(starts, 0, state.held) + 1
        taken = ops.where(starts, 0, state.taken) + 1
        order, wish = self._choose(ops, ratio, k, held, taken)
        band = self.dead_band or DEAD_BAND[getattr(method_state, "factorises", False)]
        growth = ops.minimum(wish, ops.where(taken <= YOUNG, YOUNG_FACTOR, self.factor_max))
        factor = ops.where(wish < 1.0, ops.clip(wish, *SHRINK), ops.where(wish >= band, growth, 1.0))
        rejections = ops.where(accept, 0, state.rejections + 1)
        cut = ops.clip(REJECTED[0] * self._factor(ops, REJECTED_BIAS, own, k), REJECTED[1], REJECTED[0])
        factor = ops.where(accept, factor, ops.where(finite, cut, FAILED))
        again = ops.where(finite & (rejections >= MOST_REJECTIONS), 1, k)
        order = ops.where(accept, order, again)
        held = ops.where(accept & (order == k), held, 0)
        return Decision(accept, factor, Streak(held, ops.where(accept, taken, state.taken), rejections), order)

    def _choose(self, ops: Any, ratio: Any, k: Any, held: Any, taken: Any) -> tuple[Any, Any]:
        """The order, and the factor that it wishes for."""
        wishes = [self._factor(ops, bias, r, q) for bias, r, q in zip(BIAS, ratio, (k - 1, k, k + 1), strict=True)]
        settled = held >= k + 1
        shorter = ops.where(settled | ((taken <= k + 2) & (held >= k)), wishes[0], 0.0)
        longer = ops.where(settled, wishes[2], 0.0)
        wish = ops.maximum(ops.maximum(shorter, wishes[1]), longer)
        order = ops.where(wish == wishes[1], k, ops.where(wish == shorter, k - 1, k + 1))
        return order, self.safety * wish * GRAINS // 1.0 / GRAINS

    def _factor(self, ops: Any, bias: float, ratio: Any, order: Any) -> Any:
        """(bias ratio)^(-1 / (order + 1)); 0 where the error is not known."""
        known = ops.isfinite(ratio)
        ratio = ops.maximum(ops.where(known, ratio, 1.0), SMALLEST_RATIO)
        # An exponent of whole numbers would be divided in torch's default dtype.
        factor = ops.power(bias * ratio, -1.0 / (order + 1 + 0.0 * ratio))
        return ops.where(known, factor, 0.0)


CONTROLLERS.register("bdf", BDFController())
