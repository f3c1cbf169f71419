"""Explicit steps while they are not held back by stability, backward differentiation where they are."""

from __future__ import annotations

import functools
import math
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..optim import InnerOptimizer, any_true
from ..optim.newton import Newton
from ..status import Status
from .base import METHODS, Method, StepOut, inverse, number
from .solving import check_inner_options
from .stiffness import Seen, stiffness, unseen

EXPLICIT, IMPLICIT = "dopri5", "prox_bdf"
CHOOSING = Newton("auto")


class AutoState(NamedTuple):
    """order: 0 for explicit steps, else that of the implicit formula, int or ``(B,)``. explicit: :class:`_Kept` in joint mode,
    else :class:`_Rows`. implicit: the implicit method's state; None in joint mode while steps are explicit. seen: what the
    last explicit step showed of the Jacobian."""

    order: Any
    explicit: Any
    implicit: Any
    seen: Seen

    @property
    def count(self) -> Any:
        """Accepted implicit steps in the history."""
        return 0 if self.implicit is None else self.implicit.count


class _Rows(NamedTuple):
    """The explicit method's state, and the samples for which it knows f at the start of the step."""

    known: Tensor
    state: Any


class AutoError(NamedTuple):
    """What the two methods made of the step, None of the one that had no sample; the samples of the implicit one; |dt lambda|
    of the explicit one."""

    explicit: StepOut | None
    implicit: StepOut | None
    stiff: Any
    measure: Any


class AutoDense(NamedTuple):
    layout: Any
    explicit: Any
    implicit: Any
    stiff: Any


class _Kept:
    """f at the start of a step, as the explicit method's states there and at its end have it. Results do not depend on it."""

    __slots__ = ("begun", "ended")

    def __init__(self, y: Any, state: Any) -> None:
        self.begun: tuple[Any, Any] = (None, None)
        self.ended: tuple[Any, Any] = (y, state)

    def at(self, y: Tensor) -> Any:
        """The explicit method's state for a step from ``y``, or None."""
        if self.ended[0] is y:
            self.begun = self.ended
        return self.begun[1] if self.begun[0] is y else None


@dataclass(frozen=True)
class Auto(Method):
    """Steps of dopri5 until stability, not accuracy, limits them, then of ``prox_bdf``, and back where those have become so short
    that explicit ones would serve; the controller "auto" decides, for each sample of a batch by itself.

    Stiffness costs no evaluation to see: the last two stages of dopri5 are both at the end of the step, and what f makes of
    their difference is the largest |lambda| that the step has met (Hairer & Wanner II, IV.2). Modes that swing are found from
    the differences of two steps, which span the plane of a pair of eigenvalues; those that hardly decay are a reason to change
    only where they are too small to be followed: steps that follow them stay below the limit. While implicit, the norm of the
    Jacobian (matrix-free: the largest product seen) bounds |lambda|.

    ``rkc2`` is not among its methods: on diffusion at 1e-2 to 1e-5, to the same error, it takes 1.6 to 2 times the evaluations of
    ``prox_bdf``, and at most 1.6 times less time where f costs next to nothing.

    ``stats.switches`` counts the changes, ``stats.nfe_by_method`` says what each method needed. In a batch, a step that some
    samples take explicitly and others implicitly calls f for both.

    Options and ``inner=`` are those of ``prox_bdf``. Gradients are those of the steps taken. Dense output is the methods' own.
    """

    inner: InnerOptimizer = CHOOSING
    _: KW_ONLY
    max_order: int = 5
    inner_tol: float = 0.3
    max_iters: int | None = None
    backward_tol: float = 1e-8

    name: ClassVar[str] = "auto"  # type: ignore[misc]
    reference: ClassVar[str] = "Hairer & Wanner II, IV.2; Petzold 1983, SIAM J. Sci. Stat. Comput. 4"  # type: ignore[misc]
    implicit: ClassVar[bool] = True
    one_step: ClassVar[bool] = False
    variable_order: ClassVar[bool] = True
    controller: ClassVar[str] = "auto"

    def __post_init__(self) -> None:
        check_inner_options(self)

    @property
    def explicit_method(self) -> Any:
        return METHODS[EXPLICIT]

    @functools.cached_property
    def stiff_method(self) -> Any:
        options = {name: getattr(self, name) for name in ("max_order", "inner_tol", "max_iters", "backward_tol")}
        method: Any = METHODS[IMPLICIT]
        return replace(method, inner=self.inner, **options)

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.max_order

    @property
    def error_order(self) -> int | None:  # type: ignore[override]
        return self.explicit_method.error_order

    @property
    def remedy(self) -> str:  # type: ignore[override]
        return self.stiff_method.remedy

    def choose_inner(self, inner: Any) -> InnerOptimizer:
        return self.stiff_method.choose_inner(inner)

    def check(self, layout: Any) -> None:
        self.stiff_method.check(layout)

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> AutoState:
        layout = field.layout
        if layout.joint:
            return AutoState(0, _Kept(y0, f0), None, unseen(layout, y0))
        known = torch.full((layout.batch,), f0 is not None, device=layout.device)
        f0 = torch.zeros_like(y0) if f0 is None else f0
        order = torch.zeros(layout.batch, dtype=torch.int64, device=layout.device)
        explicit = _Rows(known, self.explicit_method.init(field, t0, dt, y0, f0))
        return AutoState(order, explicit, self.stiff_method.init(field, t0, dt, y0, f0), unseen(layout, y0))

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: AutoState, active: Any) -> StepOut:
        if not field.layout.joint:
            return self._rows(field, t0, dt, y0, state, active)
        return (self._implicit if state.order else self._explicit)(field, t0, dt, y0, state, active)

    def _explicit(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: AutoState, active: Any) -> StepOut:
        method, kept = self.explicit_method, state.explicit
        known = kept.at(y0)
        if known is None or isinstance(known, Tensor):
            known = method.init(field, t0, dt, y0, known)
            kept.begun = y0, known
        out = method.step(field, t0, dt, y0, known, active)
        kept.ended = out.y1, out.state
        seen, measure = self._look(field, dt, y0, out, state.seen)
        return _told(field.layout, out, None, False, measure, AutoState(0, kept, None, seen), 0)

    def _implicit(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: AutoState, active: Any) -> StepOut:
        before, work = state.implicit, 0
        if before is None:
            with torch.no_grad():
                slope, work = field(field.time(t0), y0), 1
            before = self.stiff_method.init(field, t0, dt, y0, slope)
        out = self.stiff_method.step(field, t0, dt, y0, before._replace(order=state.order), active)
        after = AutoState(state.order, state.explicit, out.state, state.seen)
        return _told(field.layout, None, out, True, 0.0, after, work)

    @torch.no_grad()
    def _look(self, field: Any, dt: Any, y0: Tensor, out: StepOut, before: Seen) -> tuple[Seen, Any]:
        size = number(dt)
        change, slopes = self.explicit_method.last_two(out)
        slopes = slopes * field.layout.spread(inverse(abs(size)))
        found, seen = stiffness(field.layout, field.norm.scale(y0.detach(), out.y1.detach()), change, slopes, before)
        return seen, abs(size) * found

    def _rows(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: AutoState, active: Any) -> StepOut:
        layout, stiff, work = field.layout, state.order > 0, 0
        rest = ~stiff
        begins = active & stiff & (state.implicit.count == 0)
        kept, implicit, seen, one, other, measure = state.explicit, state.implicit, state.seen, None, None, 0.0
        need = ((active & rest) | begins) & ~kept.known
        if any_true(need):
            slope, work = field(field.time(t0), y0), 1
            kept = _Rows(kept.known | need, layout.merge(need, kept.state._replace(k0=slope), kept.state))
        if any_true(active & rest):
            one = self.explicit_method.step(field, t0, torch.where(stiff, 0.0, dt), y0, kept.state, active & rest)
            # At once, for f may write its next answer over this one.
            kept = _Rows(kept.known, layout.merge(rest, one.state, kept.state))
            seen, measure = self._look(field, torch.where(stiff, 0.0, dt), y0, one, seen)
        if any_true(begins):
            start = self.stiff_method.init(field, t0, dt, y0, kept.state.k0)._replace(memory=implicit.memory)
            implicit = layout.merge(begins, start, implicit)
        if any_true(active & stiff):
            before = implicit._replace(order=torch.where(stiff, state.order, 1))
            other = self.stiff_method.step(field, t0, torch.where(stiff, dt, 0.0), y0, before, active & stiff)
            implicit = layout.merge(stiff, other.state, implicit)
        implicit = implicit._replace(count=torch.where(stiff, implicit.count, 0))
        after = AutoState(state.order, _Rows(kept.known & rest, kept.state), implicit, seen)
        return _told(layout, one, other, stiff, measure, after, work)

    def replay(
        self, field: Any, t0: Any, dt: Any, y0: Tensor, state: AutoState, active: Any, interior: bool
    ) -> StepOut:
        """The step with the stages of the explicit method apart from those of the solve."""
        if not field.layout.joint:
            explicit = self.explicit_method.init(field, t0, dt, y0, state.explicit.state.k0)
            state = state._replace(explicit=state.explicit._replace(state=explicit))
        return super().replay(field, t0, dt, y0, state, active, interior)

    def ratio(self, norm: Any, y0: Tensor, out: StepOut) -> Any:
        """Errors for the orders k - 1, k and k + 1, infinite where there is none; |dt lambda| of what swings; and dt times
        the stiffness in units of the explicit method's stability limit."""
        layout, found = norm.layout, []
        one, other, stiff, measure = out.error
        if one is not None:
            own = self.explicit_method.ratio(norm, y0, one)
            none = own * 0.0 + math.inf
            found.append((none, own, none, own * 0.0, measure))
        if other is not None:
            inner = self.stiff_method.inner.chosen(layout)
            size = abs(number(other.dense.dt))
            # Of samples that stand still nothing is learnt.
            bound = layout.ops.where(size > 0, size * inner.bound(other.state.memory[0]), math.inf)
            found.append((*self.stiff_method.ratio(norm, y0, other), bound))
        parts = found[0] if len(found) == 1 else [layout.ops.where(stiff, b, a) for a, b in zip(*found, strict=True)]
        return (*parts[:4], parts[4] / self.explicit_method.real_limit)

    def prepare(self, field: Any, dense: AutoDense) -> tuple[AutoDense, int]:
        if dense.explicit is None:
            return dense, 0
        explicit, work = self.explicit_method.prepare(field, dense.explicit)
        return dense._replace(explicit=explicit), work

    def snapshot(self, dense: AutoDense) -> AutoDense:
        return dense if dense.explicit is None else dense._replace(explicit=self.explicit_method.snapshot(dense.explicit))

    def interpolate(self, dense: AutoDense, theta: Tensor, derivative: int = 0) -> Tensor:
        parts = [(self.explicit_method, dense.explicit), (self.stiff_method, dense.implicit)]
        found = [method.interpolate(part, theta, derivative) for method, part in parts if part is not None]
        if len(found) == 1:
            return found[0]
        return torch.where(dense.layout.spread(dense.stiff), found[1], found[0])


def _told(
    layout: Any, one: StepOut | None, other: StepOut | None, stiff: Any, measure: Any, state: AutoState, work: int
) -> StepOut:
    """What the two methods did in one step, with ``work`` calls of f besides."""
    error, dense = AutoError(one, other, stiff, measure), AutoDense(layout, one and one.dense, other and other.dense, stiff)
    spent = {name: out.work for name, out in ((EXPLICIT, one), (IMPLICIT, other)) if out is not None}
    spent[EXPLICIT if IMPLICIT not in spent else IMPLICIT] += work
    total = sum(spent.values())
    out: Any = one or other
    if one is None or other is None:
        return out._replace(error=error, dense=dense, state=state, work=total, spent=spent)
    y1 = torch.where(layout.spread(stiff), other.y1, one.y1)
    status = torch.where(stiff, other.status, int(Status.SUCCESS))
    inner = torch.where(stiff, other.inner, 0)
    return StepOut(y1, error, dense, state, total, status, inner, other.algebra, spent)


METHODS.register("auto", Auto())
