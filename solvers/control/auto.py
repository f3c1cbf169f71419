"""Step control of a method that is explicit at times and implicit at others, and the choice between the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch.utils._pytree import tree_map

from .base import CONTROLLERS, Controller, Decision

EXPLICIT = 0
"""The order that stands for explicit steps."""
STIFF = 0.5
"""Share of the limit of stability that explicit steps come near to where stability, not accuracy, limits them."""
STIFF_STEPS = 10
"""Such steps from which on the problem is stiff."""
MILD_STEPS = 6
"""Other steps in a row that make the former forgotten."""
CALM = 0.1
"""Share of the limit of stability below which an implicit step could as well be explicit."""
CALM_STEPS = 50
"""Such steps in a row from which on the problem is no longer stiff; doubled by every return."""
GROWN = 3.0
"""Growth of the step over these at which they are counted anew: a transient, which will soon be over."""


class Phases(NamedTuple):
    """States of the two controllers; whether the steps are implicit; steps counted for the other kind, and of the present one
    since; the stiffness of the first of those counted; changes made so far, restarts excepted."""

    explicit: Any
    implicit: Any
    stiff: Any
    count: Any
    others: Any
    first: Any
    switches: Any


@dataclass(frozen=True, kw_only=True)
class AutoController(Controller):
    """The controller "i" for explicit steps, "bdf" for implicit ones.

    Reads ``order`` and ``count`` of the method's state, order 0 being explicit, and of the error a fifth part: dt times the
    stiffness, in units of the explicit limit of stability. A problem is stiff from ten explicit steps at that limit
    on, with fewer than six others in a row between (Hairer & Wanner II, IV.2), and no longer after fifty implicit steps far
    below it that do not grow. After a jump the steps stay of their kind.
    """

    variable_order: ClassVar[bool] = True
    repeats: ClassVar[float] = 0.15  # the suite's problems: up to 0.12

    def init(self, ops: Any, like: Any) -> Phases:
        none = ops.where(like == 0, 0, 0)
        explicit, implicit = CONTROLLERS["i"], CONTROLLERS["bdf"]
        return Phases(explicit.init(ops, like), implicit.init(ops, like), none != 0, none, none, like * 0.0, none)

    def update(self, ops: Any, ratio: Any, error_order: int, state: Phases, method_state: Any) -> Decision:
        k, measure = method_state.order, ratio[4]
        implicit = k > EXPLICIT
        decision, state = self._judged(ops, ratio, error_order, state, method_state)
        # A start at a jump knows nothing of what was found before it, but that still holds.
        again = state.stiff & ops.invert(implicit)
        accept = decision.accept
        explicit = accept & ops.invert(implicit)
        stiff, calm = explicit & (measure > STIFF), accept & implicit & (measure < CALM)
        seen = stiff | calm
        others = ops.where(seen, 0, state.others + ops.where(accept, 1, 0))
        forget = (others >= ops.where(implicit, 1, MILD_STEPS)) | (implicit & (measure > GROWN * state.first))
        count = ops.where(forget, 0, state.count + ops.where(seen, 1, 0))
        enter = ops.invert(implicit) & (again | (count >= STIFF_STEPS))
        leave = implicit & (count >= CALM_STEPS * 2 ** (state.switches // 2))
        order = ops.where(enter, 1, ops.where(leave, EXPLICIT, decision.order))
        change = enter | leave
        after = Phases(
            state.explicit, state.implicit, order > EXPLICIT, ops.where(change, 0, count), ops.where(change, 0, others),
            ops.where(forget | change | (count == 0), measure, state.first),
            state.switches + ops.where(change & ops.invert(again), 1, 0),
        )  # fmt: skip
        return Decision(accept, decision.factor, after, order)

    def _judged(self, ops: Any, ratio: Any, error_order: int, state: Phases, method_state: Any) -> tuple[Decision, Phases]:
        """The decision of the controller that each sample's step belongs to, and both their states."""
        k, own = method_state.order, ratio[1]
        explicit, implicit = CONTROLLERS["i"], CONTROLLERS["bdf"]
        if ops.joint and k == EXPLICIT:
            found = explicit.update(ops, own, error_order, state.explicit, method_state)
            return found._replace(order=EXPLICIT), state._replace(explicit=found.state)
        if ops.joint:
            found = implicit.update(ops, ratio[:4], error_order, state.implicit, method_state)
            return found, state._replace(implicit=found.state)
        stiff = k > EXPLICIT
        one = explicit.update(ops, own, error_order, state.explicit, method_state)
        other = implicit.update(ops, ratio[:4], error_order, state.implicit, method_state._replace(order=k.clamp(min=1)))
        found = Decision(one.accept, ops.where(stiff, other.factor, one.factor), (), ops.where(stiff, other.order, EXPLICIT))
        kept = tree_map(lambda new, old: ops.where(stiff, new, old), other.state, state.implicit)
        return found, state._replace(explicit=one.state, implicit=kept)


CONTROLLERS.register("auto", AutoController())
