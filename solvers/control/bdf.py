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
SEEN, SEEN_OFTEN = 5, 80
"""What an attempt counts that a swinging mode limits (-1 another one, 0 where nobody knows), and the count from which on it is
taken to be so: about 20 such attempts, a fifth of all."""
CALM_ORDERS = (2, 5)
"""The orders that damp such modes: the first at every step, the second up to ``FOLLOWED`` = |dt lambda|."""
FOLLOWED, CROSSED, LOST = 0.55, 20.0, 0.2
"""|dt lambda| up to which order 5 damps them, from which on all orders do, and below which order 2 does not, while order 5
follows them, and it is accuracy that keeps its steps short."""
LOW_ERROR = 0.2
"""Error of steps of order 2, over two times ``CALM_STEPS``, above which they have slower modes to follow, which they all damp: an
elastic chain of 50 masses, whose waves are 100 to 3,000 tolerances, had lost 16 % of them instead of 2 %."""
FOLLOWING = 200
"""Steps of order 5 before order 2 is tried again after that."""
CALM_STEPS = 12
"""Steps of the same size between two decisions meanwhile, about a period."""
CALM_PATIENCE = 1000
"""Steps of order 2 after which higher ones are tried again; doubled every time."""
MOST_REJECTIONS = 3
"""Rejections in a row from which the order goes back to 1: the past says nothing about what comes."""


class Calm(NamedTuple):
    """count: of attempts that a swinging mode limits. mode: |dt lambda| of it for the next step, 0 while steps are chosen freely.
    low: whether the lower of ``CALM_ORDERS`` is in use. peak: largest error since the size or order changed. steps: of the
    lower; below 0: how many have to pass before it. times: modes met so far. over: 1 where errors of the lower order were
    large when last looked at, -1 where they do not matter."""

    count: Any
    mode: Any
    low: Any
    peak: Any
    steps: Any
    times: Any
    over: Any


class Streak(NamedTuple):
    """Accepted steps of the present order since it was chosen or a step was rejected; accepted steps since the start;
    rejections in a row; accepted steps in a row of the same size; what is done about a mode that swings."""

    held: Any
    taken: Any
    rejections: Any
    even: Any
    calm: Calm


@dataclass(frozen=True, kw_only=True)
class BDFController(Controller):
    """The order, out of k - 1, k, k + 1, that allows the longest next step, asked for after k + 1 steps of order k; and a step
    that grows only after k + 1 of the same size, where it may grow by ``dead_band`` (Shampine & Reichelt 1997; Byrne &
    Hindmarsh 1975, ACM TOMS 1).

    Reads ``order`` and ``count`` of the method's state, and of the error a fourth part: |dt lambda| of the mode that makes it,
    if that swings, 0 if nothing does, less where nobody knows.

    Args:
        safety: in (0, 1]. factor_max: limit on dt_next / dt. dead_band: >= 1; growth by less is not granted (None: 1.5 where
            another step is another matrix to be factorised, as the method's state says by ``factorises``, else 1.2).
    """

    variable_order: ClassVar[bool] = True
    repeats: ClassVar[float] = 0.13  # the suite's problems: up to 0.09

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
        return Streak(none, none, none, none, Calm(none, none + 0.0, none != 0, none + 0.0, none, none, none))

    def update(self, ops: Any, ratio: Any, error_order: int, state: Streak, method_state: Any) -> Decision:
        k, own = method_state.order, ratio[1]
        accept, finite = own <= 1.0, ops.isfinite(own)
        starts = method_state.count == 0
        held = ops.where(starts, 0, state.held) + 1
        taken = ops.where(starts, 0, state.taken) + 1
        even = ops.where(starts, 0, state.even) + 1
        order, wish = self._choose(ops, ratio, k, held, taken)
        band = self.dead_band or DEAD_BAND[getattr(method_state, "factorises", False)]
        growth = ops.minimum(wish, ops.where(taken <= YOUNG, YOUNG_FACTOR, self.factor_max))
        grows = (wish >= band) & ((taken <= YOUNG) | (even >= k + 1))
        factor = ops.where(wish < 1.0, ops.clip(wish, *SHRINK), ops.where(grows, growth, 1.0))
        rejections = ops.where(accept, 0, state.rejections + 1)
        cut = ops.clip(REJECTED[0] * self._factor(ops, REJECTED_BIAS, own, k), REJECTED[1], REJECTED[0])
        factor = ops.where(accept, factor, ops.where(finite, cut, FAILED))
        again = ops.where(finite & (rejections >= MOST_REJECTIONS), 1, k)
        order = ops.where(accept, order, again)
        factor, order, calm = self._calmed(ops, ratio, k, accept, even, held, factor, order, state.calm)
        held = ops.where(accept & (order == k), held, 0)
        even = ops.where(accept & (factor == 1.0), even, 0)
        return Decision(accept, factor, Streak(held, ops.where(accept, taken, state.taken), rejections, even, calm), order)

    def _calmed(
        self, ops: Any, ratio: Any, k: Any, accept: Any, even: Any, held: Any, factor: Any, order: Any, calm: Calm
    ) -> tuple[Any, Any, Calm]:
        """Step and order where a mode that swings, hardly damped, limits them, however small it is.

        Its error comes and goes with its phase, and steps that follow it drive it, like a swing; so do the formulas of order
        3 to 5 where |dt lambda| is not small (Hindmarsh & al. 2005, ACM TOMS 31, 2.3: CVODE lowers the order). Even steps of
        order 5 damp it, below ``FOLLOWED``, better than those of order 2 that its error then allows, until it has become so
        small that order 2 may take the same steps. These damp it at once, and may grow beyond where it would be a nuisance.
        """
        low, high = CALM_ORDERS
        _, own, above, seen = ratio
        if ops.joint and not (seen or calm.count or calm.mode):
            return factor, order, calm
        count = ops.maximum(calm.count + ops.where(seen > 0, SEEN, ops.where(seen < 0, 0, -1)), 0)
        begins = (calm.mode == 0) & (count >= SEEN_OFTEN) & (k > low)
        on = (calm.mode > 0) | begins
        mode = ops.where(seen > 0, seen, calm.mode)
        peak = ops.where(accept, ops.maximum(calm.peak, own), 0.0)
        # Even steps, whose errors are known over some time, and by how much they may then grow.
        even = accept & (even % CALM_STEPS == 0)
        expected = peak * ops.where(k > low, BIAS[1], 1.0 / LOW_ERROR)
        wish = self._granted(self._factor(ops, 1.0, expected, k))
        room = ops.where(k > low, FOLLOWED / ops.maximum(mode, 1e-3), self.factor_max)
        wish = ops.minimum(ops.minimum(wish, room), self.factor_max)
        highest = (held > k) & ops.invert(ops.isfinite(above))
        small = peak * (high + 1) / (low + 1) < 0.5 * mode ** (high - low)
        lowers = on & highest & (calm.steps == 0) & ops.where(k == high, even & small, k > low)
        grows = even & (wish >= DEAD_BAND[False]) & ops.invert(lowers)
        rises = accept & (k < ops.where(calm.low, low, high)) & (held > k) & ops.isfinite(above)
        settled = ops.where(accept, ops.where(grows, wish, 1.0), factor)
        factor = ops.where(on, settled, factor)
        order = ops.where(on, ops.where(lowers, low, ops.where(rises, k + 1, ops.where(accept, k, order))), order)
        is_low = on & (calm.low | lowers)
        mode = ops.where(on, mode * factor, 0.0)
        lost = is_low & ((mode < LOST) | (calm.low & even & (peak > LOW_ERROR) & (calm.over > 0)))
        times = calm.times + ops.where(begins, 1, 0)
        steps = ops.where(is_low | (calm.steps < 0), calm.steps + 1, 0)
        ends = (mode > CROSSED) | (ops.invert(is_low) & (mode < LOST)) | (is_low & (steps > CALM_PATIENCE * 2**calm.times))
        steps = ops.where(lost, -FOLLOWING, ops.where(ends, ops.minimum(steps, 0), steps))
        over = ops.where(even, ops.where(calm.low & (peak > LOW_ERROR), 1, 0), calm.over)
        # Where order 5 is not to be had, order 2 is the only one that damps, however large the mode.
        over = ops.where(lowers, ops.where(k < high, -1, 0), ops.where(is_low & (calm.over < 0), -1, over))
        peak = ops.where(even | (factor != 1.0) | (order != k), 0.0, peak)
        return factor, order, Calm(
            ops.where(on, 0, count), ops.where(ends, 0.0, mode), is_low & ops.invert(lost | ends), peak, steps, times, over,
        )  # fmt: skip

    def _choose(self, ops: Any, ratio: Any, k: Any, held: Any, taken: Any) -> tuple[Any, Any]:
        """The order, and the factor that it wishes for."""
        wishes = [self._factor(ops, bias, r, q) for bias, r, q in zip(BIAS, ratio[:3], (k - 1, k, k + 1), strict=True)]
        settled = held >= k + 1
        shorter = ops.where(settled | ((taken <= k + 2) & (held >= k)), wishes[0], 0.0)
        longer = ops.where(settled, wishes[2], 0.0)
        wish = ops.maximum(ops.maximum(shorter, wishes[1]), longer)
        order = ops.where(wish == wishes[1], k, ops.where(wish == shorter, k - 1, k + 1))
        return order, self._granted(wish)

    def _granted(self, wish: Any) -> Any:
        return self.safety * wish * GRAINS // 1.0 / GRAINS

    def _factor(self, ops: Any, bias: float, ratio: Any, order: Any) -> Any:
        """(bias ratio)^(-1 / (order + 1)); 0 where the error is not known."""
        known = ops.isfinite(ratio)
        ratio = ops.maximum(ops.where(known, ratio, 1.0), SMALLEST_RATIO)
        # An exponent of whole numbers would be divided in torch's default dtype.
        factor = ops.power(bias * ratio, -1.0 / (order + 1 + 0.0 * ratio))
        return ops.where(known, factor, 0.0)


CONTROLLERS.register("bdf", BDFController())
