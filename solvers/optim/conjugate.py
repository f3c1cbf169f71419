"""Nonlinear conjugate gradients on the residual of an implicit step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..status import ArgumentError
from .base import CURVED, FADES, INNER_OPTIMIZERS, InnerOptimizer, InnerProblem, InnerStep, Point, any_true
from .evaluating import check_stop, step_error
from .linesearch import STEPS, PowerMemory, Rated

RATES = ("cg", "line_search", "constant")
POWELL = 0.2
"""Successive residuals this far from orthogonal belong to no symmetric M (Powell 1977, Math. Program. 12, 241-254)."""
WINDOW = 10
"""Images M p that the next one is made orthogonal to where M is not symmetric. A symmetric M needs none or one."""
NOTHING = 1e-12
"""Share of |M p|**2 below which what is left of it, made orthogonal, is noise."""


class CGMemory(NamedTuple):
    """What iterations of earlier steps in time have seen, one number a sample.

    rho: |lambda|_max of df/dy (1/time). bend: what a carried residual was off by, as a part of the way from where one was
    evaluated (infinite: nobody has looked). age: steps in time since then.
    """

    rho: Any
    bend: Any
    age: Any

    @classmethod
    def fresh(cls, layout: Any) -> CGMemory:
        zero = 0.0 if layout.joint else torch.zeros(layout.batch, dtype=torch.float64, device=layout.device)
        return cls(zero, zero + math.inf, zero)


class CGState(NamedTuple):
    """Where the conjugate directions stand.

    p, slope: the next direction and <p, r>. r, rr: the residual and its square. point: of linearisation. eta: the constant
    rate. known, seen: the largest curvature, with what earlier steps in time knew and without. skew: samples whose M has
    turned out not to be symmetric. window: (p, M p, 1 / |M p|**2, 0 for other samples) of theirs. memory: of the start.
    begun: whether no residual but the start's was evaluated yet.
    """

    p: Tensor
    slope: Any
    r: Tensor
    rr: Any
    point: Point
    eta: Any
    known: Any
    seen: Any
    skew: Any
    window: tuple[tuple[Tensor, Tensor, Any], ...]
    memory: Any
    begun: bool = True


def fletcher_reeves(problem: InnerProblem, r: Tensor, rr: Any, state: CGState) -> Any:
    """|r'|**2 / |r|**2 (Fletcher and Reeves 1964, Comput. J. 7, 149-154)."""
    return problem.ratio(rr, state.rr)


def polak_ribiere(problem: InnerProblem, r: Tensor, rr: Any, state: CGState) -> Any:
    """<r', r' - r> / |r|**2, at least 0 (Polak and Ribiere 1969; Gilbert and Nocedal 1992, SIAM J. Optim. 2, 21-42)."""
    return problem.ops.maximum(problem.ratio(rr - problem.dot(r, state.r), state.rr), 0.0)


def hestenes_stiefel(problem: InnerProblem, r: Tensor, rr: Any, state: CGState) -> Any:
    """<r', r' - r> / <p, r' - r>, at least 0 (Hestenes and Stiefel 1952, J. Res. Nat. Bur. Stand. 49, 409-436)."""
    return problem.ops.maximum(problem.ratio(rr - problem.dot(r, state.r), problem.dot(state.p, r) - state.slope), 0.0)


def dai_yuan(problem: InnerProblem, r: Tensor, rr: Any, state: CGState) -> Any:
    """|r'|**2 / <p, r' - r> (Dai and Yuan 1999, SIAM J. Optim. 10, 177-182)."""
    return problem.ratio(rr, problem.dot(state.p, r) - state.slope)


BETA: dict[str, Callable[[InnerProblem, Tensor, Any, CGState], Any]] = {
    "fletcher_reeves": fletcher_reeves,
    "polak_ribiere": polak_ribiere,
    "hestenes_stiefel": hestenes_stiefel,
    "dai_yuan": dai_yuan,
}
"""beta in p' = -r' + beta p from r', |r'|**2 and the state before; NaN restarts. Each entry is an optimiser."""


@dataclass(frozen=True)
class ConjugateGradient(Rated, InnerOptimizer):
    """z' = z + alpha p, p = -r + beta p_before, begun along -r.

    ``rate``: how alpha is found.

    - ``"cg"``: alpha = -<p, r> / <p, M p>, M = I - g J at the last evaluated point, and r' = r + alpha M p without a second
      evaluation: one call of f an iteration. On a linear field with symmetric J, the method of conjugate gradients.
    - ``"line_search"``: the same alpha with M at the current iterate, r' evaluated: two calls of f.
    - ``"constant"``: 1 / L, L = 1 + |g| rho, with rho estimated by power iterations and kept for some steps in time, or
      given as ``lipschitz`` (of f, in 1/time): one call of f. A number in place of the word is the rate itself, in units of
      the scaled residual (Xia 2023, section 5.3, has such a number).

    ``restart``: go along -r where p is no direction of descent; cut steps that run past the minimum of a strongly
    nonlinear problem; and, as conjugate directions do not converge where J is not symmetric, go on there with directions
    whose images M p are orthogonal to those before (Vinsome 1976), which needs no symmetry, only a positive definite M.
    False: the bare iteration. Only the first applies to constant rates. ``refresh``: iterations after which "cg" evaluates
    the residual again. ``inner_stop``: as of the other first-order solvers; "step" is not for "cg".

    A sample with <p, M p> <= 0 right after an evaluated residual is given up: nothing is minimised there.
    """

    formula: str
    _: KW_ONLY
    rate: str | float = "cg"
    restart: bool = True
    lipschitz: float | None = None
    inner_stop: str = "residual"
    refresh: int = 50

    unrolls: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_rate(*RATES)
        check_stop(self.inner_stop)
        if self.rate == "cg" and self.inner_stop == "step":
            raise ArgumentError("inner_stop='step' needs every residual: take rate='line_search', 'constant' or a number")
        if self.refresh < 1:
            raise ArgumentError(f"refresh must be at least 1, found {self.refresh}")

    @property
    def searches(self) -> bool:
        """Whether alpha comes from a product with M."""
        return self.rate in ("cg", "line_search")

    def remember(self, layout: Any, y0: Tensor) -> Any:
        return PowerMemory.fresh(layout, y0) if self.estimates else CGMemory.fresh(layout)

    def init(self, problem: Any, point: Point, running: Any, memory: Any) -> CGState:
        eta, known, memory = self.begun(problem, point, running, memory)
        if self.rate == "cg":
            memory = memory._replace(age=memory.age + running)
        rr = problem.dot(point.r, point.r)
        none = problem.ops.where(running, False, False)
        seen = problem.ops.where(running, 1.0, 1.0)
        return CGState(-point.r, -rr, point.r, rr, point, eta, known, seen, none, (), memory)

    def curvature(self, state: CGState) -> Any:
        return state.known

    def memory(self, problem: Any, state: CGState) -> Any:
        if self.estimates:
            return state.memory
        rho = problem.ratio(state.seen - 1, abs(problem.g))
        return state.memory._replace(rho=problem.ops.where(state.seen > 1, rho, state.memory.rho))

    def step(self, problem: InnerProblem, z: Tensor, r: Tensor, state: CGState, running: Any) -> InnerStep:
        p, mp, alpha, seen = problem.keep(running, state.p, 0.0), None, state.eta, state.seen
        if self.searches:
            p, mp, alpha, seen, window = self._search(problem, p, r, state, running)
            state = state._replace(window=window)
        wide = problem.layout.spread(alpha)
        before, z = Point(z, r), z + wide * p
        evaluated: Point | None = None
        error = doubt = None
        if self.rate == "cg":
            point, r = state.point, r + wide * mp
            # What turned out wrong, or took long, is not believed again: z may have gone far.
            doubt = (lambda: self._doubt(problem, z, state)) if state.begun else None
        else:
            point = problem.evaluate(problem.keep(running, z, state.point.z))
            if self.searches and self.restart:
                point, _ = problem.shorten(state.point, point, running)
            evaluated, z, r = point, point.z, point.r
            error = step_error(self.inner_stop, problem, before, point)
        state = self._turn(problem, p, r, state, running)
        known = problem.ops.maximum(state.known, seen)
        return InnerStep(z, r, state._replace(point=point, known=known, seen=seen), evaluated, error, doubt)

    def _doubt(self, problem: Any, z: Tensor, state: CGState) -> Any:
        """What the residual carried along to ``z`` may be off by: by what was seen of others lately, and by what this step says.

        What changes in f over a step shows in the residual of the start, which is extrapolated over a way of about z - a = g f:
        on the shorter way from there as large a part of it may come to light, so that a nonlinearity that sets in between two
        steps is met. Of 60,000 steps over such, and over kinks, which show nowhere before, none left more than the tolerance.
        """
        ops, (_, bend, age) = problem.ops, state.memory
        way, moved = problem.norm(z - state.point.z), problem.norm(state.point.z - problem.a)
        own = ops.where(moved > 0, problem.norm(state.point.r) * problem.ratio(way, moved), math.inf)
        return ops.where(age < STEPS, CURVED * ops.maximum(bend * way, own), math.inf)

    def checked(self, problem: InnerProblem, point: Point, carried: Tensor, state: CGState, who: Any) -> CGState:
        ops, memory, way = problem.ops, state.memory, problem.norm(point.z - state.point.z)
        seen = problem.ratio(problem.norm(point.r - carried), way)
        seen = ops.where(ops.isfinite(seen) & (way > 0), seen, math.inf)
        faded = ops.where(ops.isfinite(memory.bend), FADES * memory.bend, 0.0)
        bend = ops.where(who, ops.maximum(seen, faded), memory.bend)
        return state._replace(memory=memory._replace(bend=bend, age=ops.where(who, 0.0, memory.age)))

    def _search(
        self, problem: InnerProblem, p: Tensor, r: Tensor, state: CGState, running: Any
    ) -> tuple[Tensor, Tensor, Any, Any, Any]:
        """p, M p, alpha, the largest curvature seen, and the window."""
        ops = problem.ops
        mp = problem.jv(state.point, p)
        skew = running & state.skew
        curved, window = problem.dot(p, mp), state.window
        rayleigh = problem.ratio(curved, problem.dot(p, p))
        seen = ops.where(running & (rayleigh > state.seen), rayleigh, state.seen)
        alpha = problem.ratio(-state.slope, curved)
        if any_true(skew):
            p, mp, weight, window = self._orthogonal(problem, p, mp, window, skew)
            window = (*window[1 - WINDOW :], (p, mp, ops.where(skew, weight, 0.0)))
            # Least |r'| instead of least energy.
            alpha = ops.where(skew, -problem.dot(r, mp) * weight, alpha)
        return p, mp, alpha, seen, window

    def _orthogonal(
        self, problem: InnerProblem, p: Tensor, mp: Tensor, window: Any, skew: Any
    ) -> tuple[Tensor, Tensor, Any, Any]:
        """p and M p without the components of M p along the images in the window, 1 / |M p|**2, and the window.

        Where that leaves nothing, a step within what has been searched is in vain: NaN ends the round. But where M changes
        from one iterate to the next, the images are outdated: they go, and p is as good as it was.
        """
        ops, spread = problem.ops, problem.layout.spread
        before, q, mq = problem.dot(mp, mp), p, mp
        for old, image, weight in window:
            wide = spread(problem.dot(mq, image) * weight)
            q, mq = q - wide * old, mq - wide * image
        after = problem.dot(mq, mq)
        new = after > NOTHING * before
        if self.rate == "cg":
            after = ops.where(new, after, 0.0)
        else:
            window = tuple((old, image, ops.where(new, weight, 0.0)) for old, image, weight in window)
            skew, after = skew & new, ops.where(new, after, before)
        return problem.keep(skew, q, p), problem.keep(skew, mq, mp), problem.ratio(1.0, after), window

    def _turn(self, problem: InnerProblem, p: Tensor, r: Tensor, state: CGState, running: Any) -> CGState:
        """The next direction."""
        ops, rr, skew = problem.ops, problem.dot(r, r), state.skew
        beta = BETA[self.formula](problem, r, rr, state)
        if self.searches and self.restart:
            skew = skew | (running & (abs(problem.dot(r, state.r)) > POWELL * rr))
            # M p has to be made orthogonal to the last one, which is done when it is known.
            beta = ops.where(skew, 0.0, beta)
        p, slope = self._descend(problem, -r + problem.layout.spread(beta) * p, r, rr)
        return state._replace(p=p, slope=slope, r=r, rr=rr, skew=skew)

    def _descend(self, problem: InnerProblem, p: Tensor, r: Tensor, rr: Any) -> tuple[Tensor, Any]:
        slope = problem.dot(p, r)
        if not self.restart:
            return p, slope
        descent = slope < 0
        return problem.keep(descent, p, -r), problem.ops.where(descent, slope, -rr)

    def resume(self, problem: InnerProblem, point: Point, state: CGState, again: Any) -> CGState:
        r, rr = point.r, problem.dot(point.r, point.r)
        p, slope = self._descend(problem, state.p, r, rr)
        p, slope = problem.keep(again, -r, p), problem.ops.where(again, -rr, slope)
        return state._replace(p=p, slope=slope, r=r, rr=rr, point=point, window=(), begun=False)


for _name in BETA:
    INNER_OPTIMIZERS.register(_name, ConjugateGradient(_name))
