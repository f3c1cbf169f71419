"""Solving the equation of an implicit step: the problem, what an optimiser is, and the one loop that drives any of them.

The loop owns what is the same for all: when to stop, which samples still move, how many calls of f were made, and when to
give up. An optimiser only proposes the next iterate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..registry import Registry

GROWTH = 1e6
"""A residual this many times the best one is divergence; exact conjugate gradients may rise by the root of the condition."""
STALLED = 3
"""Times in a row that a sample may claim to be done, wrongly and without a tenth of progress, before it is given up."""
SHORTER = 0.25
"""Factor by which a step is cut that ran past the minimum along its direction."""
CUTS = 12
"""Times that is tried."""
ROUNDING = 4.0
"""Units in the last place of z below which a residual of z is noise."""


class Point(NamedTuple):
    """An iterate whose residual was evaluated. ``f`` is what the problem wants to keep of that evaluation."""

    z: Tensor
    r: Tensor
    f: Any = None


class InnerProblem(ABC):
    """Find z with r(z) = 0; z is a flat state, ``(N,)`` in joint mode and ``(B, M)`` in the batched modes.

    Lives for one attempted step. Everything that is one number per sample is a float in joint mode, else ``(B,)``.

    Attributes:
        calls: calls of f made so far.
        ops: the algebra of per-sample numbers.
    """

    def __init__(self, layout: Any, norm: Any, scale: Tensor) -> None:
        self.layout = layout
        self.ops = layout.ops
        self.error_norm = norm
        self.scale = scale
        self.calls = 0
        self._size: Any = None

    @abstractmethod
    def evaluate(self, z: Tensor) -> Point:
        """z with its residual; one call of f."""

    def jv(self, point: Point, v: Tensor) -> Tensor:
        """Derivative of the residual at ``point`` along ``v``, by a forward difference; one call of f."""
        step = self.layout.spread(self.difference_step(point, v))
        return (self.evaluate(point.z + step * v).r - point.r) / step

    def shorten(self, base: Point, point: Point, moved: Any) -> tuple[Point, Any]:
        """``point``, or nearer to ``base`` where the way there ran past the minimum, and where that was so.

        r is the gradient along the way d: past the minimum is where <r, d> has changed its sign and grown, with |r|. So is
        where r does not exist. A linear model of a strongly nonlinear f leads there. Each cut is one call of f.
        """
        ops, cut = self.ops, moved & False
        before = self.norm(base.r)
        for _ in range(CUTS):
            d = point.z - base.z
            slope, now = self.dot(base.r, d), self.norm(point.r)
            fine = (now <= before) | (self.dot(point.r, d) <= abs(slope)) & ops.isfinite(now)
            past = moved & ops.invert(fine) & (slope < 0)
            if not any_true(past):
                break
            cut = cut | past
            point = self.evaluate(self.keep(past, base.z + SHORTER * d, point.z))
        return point, cut

    def value(self, z: Tensor) -> Any:
        """The function whose gradient the residual is, one number per sample; None where there is none."""
        return None

    # -- geometry -----------------------------------------------------------------------------------------------------

    def norm(self, x: Tensor) -> Any:
        """Error norm: 1 is an error as large as the tolerance."""
        return self.error_norm(x, self.scale)

    def dot(self, x: Tensor, y: Tensor) -> Any:
        """Real inner product of each sample."""
        product = x * y
        if product.is_complex():
            product = (x.conj() * y).real
        total = self.layout.sum(product)
        # The same reduction as for rows, so that one sample alone gives the bits it gives in a batch.
        return total.item() if self.layout.joint else total

    def keep(self, moved: Any, new: Tensor, old: Tensor | float) -> Tensor:
        """``new`` in the samples that ``moved``, ``old`` bit for bit in the others."""
        if self.layout.joint:
            return new if moved else torch.as_tensor(old)
        return torch.where(self.layout.spread(moved), new, old)

    def ratio(self, numerator: Any, denominator: Any) -> Any:
        """numerator / denominator, NaN where the denominator is not positive."""
        if self.layout.joint:
            return numerator / denominator if denominator > 0 else math.nan
        return numerator / torch.where(denominator > 0, denominator, math.nan)

    def difference_step(self, point: Point, v: Tensor) -> Any:
        """Length of a forward difference along ``v``: sqrt(eps) |z| / |v|, as a power of two.

        The residual stands in for z where z is (nearly) 0. A power of two costs no rounding, and does not move when a
        last bit of the norms does.
        """
        if self._size is None:
            self._size = self.ops.maximum(self.dot(point.z, point.z), self.dot(point.r, point.r)) ** 0.5
        root = math.sqrt(torch.finfo(v.dtype).eps)
        length = self.dot(v, v) ** 0.5
        if self.layout.joint:
            h = root * self._size / length if length > 0 else 1.0
            return math.ldexp(1.0, math.frexp(h)[1]) if 0 < h < math.inf else 1.0
        h = root * self._size / length
        power = h / torch.frexp(h).mantissa
        return torch.where((h > 0) & torch.isfinite(power), power, 1.0)


class ProximalProblem(InnerProblem):
    """The scaled residual of an implicit stage, r(z) = z - a - g f(t, z), with curvature in [1, 1 + g rho].

    For f = -grad F it is the gradient of |z - a|**2 / 2 + g F(z): z is the proximal point of a (Xia 2023, section 5.1).

    Args:
        field: f on the flat state. t: time of the stage, as f wants it. a: flat state. g: signed, float or ``(B,)``.
        norm, scale: an error norm and its scale (units of y).
        energy: F(t, z) of the user's state, one number per sample, or None.

    Attributes:
        depends: whether an evaluation under ``enable_grad`` has shown f to depend on something that requires a gradient.
    """

    def __init__(
        self, field: Any, t: Tensor, a: Tensor, g: Any, norm: Any, scale: Tensor, energy: Callable | None = None
    ) -> None:
        super().__init__(field.layout, norm, scale)
        self.field, self.t, self.a, self.g, self.energy = field, t, a, g, energy
        self.wide = field.layout.spread(g)
        self.depends = False

    def evaluate(self, z: Tensor) -> Point:
        self.calls += 1
        f = self.field(self.t, z)
        if f.requires_grad:
            self.depends, f = True, f.detach()
        return Point(z, z - self.a - self.wide * f, f)

    def jv(self, point: Point, v: Tensor) -> Tensor:
        """v - g J v: only f is differenced, so that the identity keeps all its digits."""
        step = self.layout.spread(self.difference_step(point, v))
        self.calls += 1
        change = self.field(self.t, point.z + step * v) - point.f
        return v - change * (self.wide / step)

    def value(self, z: Tensor) -> Any:
        """|z - a|**2 / 2 + g F(t, z)."""
        if self.energy is None:
            return None
        away = z - self.a
        return self.dot(away, away) / 2 + self.g * self.energy(self.t, self.layout.unflatten(z))


class InnerStep(NamedTuple):
    """One iteration: the iterate, its residual, the optimiser's state.

    ``point`` is set where the residual was evaluated, None where it was carried along by a recurrence. A sample that could
    not make its step has a residual that is not finite.
    """

    z: Tensor
    r: Tensor
    state: Any
    point: Point | None = None


class InnerOptimizer(ABC):
    """Proposes iterates. Instances are frozen dataclasses; keyword-only fields are the options ``solve`` accepts for it.

    What an implementation may rely on, and must keep:

    1. ``init`` and ``step`` are pure and run under ``no_grad``. Whoever calls f does it through the problem, which counts.
    2. Per-sample numbers go through ``problem.ops``, reductions through ``problem.dot`` and ``problem.norm``: no sample
       sees another. Samples outside ``running`` stay where they are whatever is proposed for them, and f must see them
       there: evaluate ``problem.keep(running, z, point.z)``.
    3. Memory is what an optimiser keeps from one step in time to the next, a nest of tuples as in a method's state. It
       must be sound for every sample, whenever that one stopped.
    """

    refresh: int = 50
    """Iterations after which a residual carried by a recurrence is evaluated again."""

    def remember(self, layout: Any, y0: Tensor) -> Any:
        """The memory of a solve that begins."""
        return ()

    @abstractmethod
    def init(self, problem: InnerProblem, point: Point, running: Any, memory: Any) -> Any:
        """State at the start ``point``."""

    def curvature(self, state: Any) -> Any:
        """Largest curvature of the problem as far as it is known, per sample (>= 1): what rounding errors grow by."""
        return 1.0

    def memory(self, problem: InnerProblem, state: Any) -> Any:
        """The memory to hand on after the last iteration."""
        return ()

    @abstractmethod
    def step(self, problem: InnerProblem, z: Tensor, r: Tensor, state: Any, running: Any) -> InnerStep:
        """The next iterate after ``z``, whose residual is ``r``."""

    @abstractmethod
    def resume(self, problem: InnerProblem, point: Point, state: Any, again: Any) -> Any:
        """State to go on from ``point``, the current iterate with its residual evaluated.

        ``again``: samples whose residual had been thought small enough, or whose step had failed: they start afresh.
        """


class InnerResult(NamedTuple):
    """z; the error norm of its residual; iterations, int or ``(B,)``; whether it converged, bool or ``(B,)``; memory."""

    z: Tensor
    norm: Any
    iterations: Any
    converged: Any
    memory: Any


def minimise(
    problem: InnerProblem,
    optimizer: InnerOptimizer,
    start: Point,
    *,
    tol: float,
    max_iters: int,
    active: Any = True,
    memory: Any = (),
) -> InnerResult:
    """Iterate from ``start`` until |r| <= ``tol`` in the error norm. Call under ``no_grad``.

    At least one iteration is made, since a start that passes the test at every step would let the solution drift; unless
    the residual is at rounding already. A residual that was carried by a recurrence is evaluated before it is believed.
    Samples stop one by one; one that claims to be done waits, untouched, until all that run have claimed or are due for a
    fresh residual, and one evaluation then serves them all. So what a sample does never depends on its neighbours.

    Args:
        tol: in units of the tolerance. max_iters: per sample. active: True or the ``(B,)`` mask of samples to be solved.
    """
    run = _Run(problem, start, tol, active)
    state = optimizer.init(problem, start, run.running, memory)
    run.begin(optimizer.curvature(state))
    while any_true(run.running):
        out = optimizer.step(problem, run.z, run.r, state, run.running)
        run.judge(out, optimizer.curvature(out.state), max_iters)
        if run.age >= optimizer.refresh or not any_true(run.running):
            again = run.close(max_iters)
            if any_true(run.running):
                state = optimizer.resume(problem, run.point, out.state, again)
                continue
        state = out.state
    return InnerResult(run.z, run.norm, run.iterations, run.done, optimizer.memory(problem, state))


class _Run:
    """Where every sample stands: running, waiting for its residual to be evaluated, done, or (none of these) given up.

    A round is the iterations between two evaluations of the residual; all running samples began theirs together.
    """

    def __init__(self, problem: InnerProblem, start: Point, tol: float, active: Any) -> None:
        self.problem, self.tol = problem, tol
        self.point, self.z, self.r = start, start.z, start.r
        self.exact = True
        self.norm = problem.norm(start.r)
        self.rounding = ROUNDING * torch.finfo(start.z.dtype).eps * problem.norm(start.z)
        finite = problem.ops.isfinite(self.norm)
        self.running = active & finite
        self.waiting = finite & False
        self.done = problem.ops.invert(active | self.waiting)
        self.best = self.base = self.norm
        self.iterations: Any = 0 if problem.layout.joint else torch.zeros_like(self.done, dtype=torch.int64)
        self.stale: Any = self.iterations
        self.curvature: Any = 1.0
        self.age = 0

    def limit(self) -> Any:
        """The tolerance, or what rounding allows: 4 eps L |z| (a residual multiplies errors of z by up to L)."""
        return self.problem.ops.maximum(self.rounding * self.curvature, self.tol)

    def begin(self, curvature: Any) -> None:
        """Leave alone what rests within rounding."""
        self.curvature = curvature
        resting = self.running & (self.norm <= self.rounding * curvature)
        self.done = self.done | resting
        self.running = self.running & self.problem.ops.invert(resting)

    def judge(self, out: InnerStep, curvature: Any, max_iters: int) -> None:
        """Take the iterates that are any good; see who claims to be done."""
        problem, ops = self.problem, self.problem.ops
        norm = problem.norm(out.r)
        moved = self.running & ops.isfinite(norm) & (norm <= GROWTH * self.best)
        self.z, self.r = problem.keep(moved, out.z, self.z), problem.keep(moved, out.r, self.r)
        self.norm = ops.where(moved, norm, self.norm)
        self.curvature = ops.where(self.running, curvature, self.curvature)
        self.iterations = self.iterations + self.running
        broken = self.running & ops.invert(moved)
        claim = moved & (norm <= self.limit())
        # From a residual that met the tolerance the recurrence has moved by less than the tolerance: no need to look again.
        sure = claim if out.point is not None else claim & (self.base <= self.limit())
        self.done = self.done | sure
        self.waiting = self.waiting | (claim & ops.invert(sure))
        if self.age > 0:
            # The recurrence may be to blame; one that fails from a fresh residual is lost.
            self.waiting = self.waiting | broken
        self.running = moved & ops.invert(claim) & (self.iterations < max_iters)
        self.exact = out.point is not None
        self.point = out.point or self.point
        self.age += 1

    def close(self, max_iters: int) -> Any:
        """End the round: evaluate the residual of whoever waits or runs. Returns the samples that have to start afresh."""
        problem, ops = self.problem, self.problem.ops
        alive, again = self.running | self.waiting, self.waiting
        self.age, self.waiting = 0, self.waiting & False
        if not any_true(alive):
            return again
        if not self.exact:
            point, cut = problem.shorten(self.point, problem.evaluate(self.z), alive)
            self.point, again = point, again | cut
        elif any_true(again):
            self.point = problem.evaluate(self.z)
        self.z, self.r = self.point.z, self.point.r
        norm = problem.norm(self.r)
        self.norm = ops.where(alive, norm, self.norm)
        self.done = self.done | (alive & (norm <= self.limit()))
        self.stale = ops.where(norm <= 0.9 * self.best, self.stale * 0, self.stale + again)
        self.best = ops.minimum(self.best, norm)
        self.base = norm
        fit = ops.isfinite(norm) & (self.stale < STALLED) & (self.iterations < max_iters)
        self.running = alive & ops.invert(self.done) & fit
        return again


def any_true(mask: Any) -> bool:
    """Whether any sample is in the mask."""
    return bool(mask.any()) if isinstance(mask, Tensor) else mask


def all_true(mask: Any) -> bool:
    """Whether all samples are in the mask."""
    return bool(mask.all()) if isinstance(mask, Tensor) else mask


INNER_OPTIMIZERS: Registry[InnerOptimizer] = Registry("inner solver")
