"""Solving the equation of an implicit step: the problem, what an optimiser is, and the one loop that drives any of them.

The loop owns what is the same for all: when to stop, which samples still move, how many calls of f were made, and when to
give up. An optimiser only proposes the next iterate.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..registry import Registry
from .probes import signs

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
NOISE = 10.0
"""Times what a change of the last place of z is seen to do to its residual: below, that is noise."""
LONGEST = 1e-4
"""Share of z that a difference along a direction may be."""
RESTS = 0.01
"""Share of the tolerance below which no start needs an iteration, whatever rounding makes of it."""
CURVED = 3.0
"""Safety of the nonlinearity seen lately, where that judges a residual which is not evaluated."""
FADES = 0.3
"""What a nonlinearity seen once is worth one evaluation later."""


class Point(NamedTuple):
    """An iterate whose residual was evaluated. ``f`` is what the problem wants to keep of that evaluation."""

    z: Tensor
    r: Tensor
    f: Any = None


class Algebra:
    """Linear algebra that was done: Jacobians, factorisations, exact products with J^T, how Jacobians were found, and the names
    of the inner solvers at work."""

    __slots__ = ("how", "inner", "njac", "nlu", "nvjp")

    def __init__(self) -> None:
        self.njac = self.nlu = self.nvjp = 0
        self.how = ""
        self.inner: tuple[str, ...] = ()

    def add(self, other: Algebra) -> None:
        self.njac, self.nlu, self.nvjp = self.njac + other.njac, self.nlu + other.nlu, self.nvjp + other.nvjp
        self.how = other.how or self.how
        self.inner = joined(self.inner, other.inner)


def joined(names: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
    """Each name once, in the order in which they came."""
    return names if names == more else tuple(dict.fromkeys((*names, *more)))


class InnerProblem(ABC):
    """Find z with r(z) = 0; z is a flat state, ``(N,)`` in joint mode and ``(B, M)`` in the batched modes.

    Lives for one attempted step. Everything that is one number per sample is a float in joint mode, else ``(B,)``.

    Attributes:
        calls: calls of f made so far.
        algebra: what else was done.
        tol: the bound that an iteration is to reach, in the error norm.
        noise: what rounding z was seen to do to its residual, in the error norm; negative where nobody has looked.
        ops: the algebra of per-sample numbers.
    """

    tol: float = 1.0

    def __init__(self, layout: Any, norm: Any, scale: Tensor) -> None:
        self.layout = layout
        self.ops = layout.ops
        self.error_norm = norm
        self.scale = scale
        self.calls = 0
        self.algebra = Algebra()
        self.noise: Any = -1.0 if layout.joint else torch.full((layout.batch,), -1.0, device=layout.device)
        self._size: Any = None

    @abstractmethod
    def evaluate(self, z: Tensor) -> Point:
        """z with its residual; one call of f."""

    def jv(self, point: Point, v: Tensor) -> Tensor:
        """Derivative of the residual at ``point`` along ``v``, by a forward difference; one call of f."""
        step = self.layout.spread(self.difference_step(point, v))
        return (self.evaluate(point.z + step * v).r - point.r) / step

    def measure_noise(self, point: Point, wanted: Any) -> None:
        """See what a change of the last place of z, up or down at random, does to the residual at ``point``; one call of f."""
        with torch.no_grad():
            z = point.z * (1 + torch.finfo(point.z.dtype).eps * signs(self.layout, point.z))
            found = self.norm(self.evaluate(self.keep(wanted, z, point.z)).r - point.r)
        self.noise = self.ops.where(wanted, found, self.noise)

    def floor(self, bound: Any) -> Any:
        """The residual that rounding leaves: ``bound``, or what was seen of it where that is less."""
        seen = self.ops.where(self.noise < 0, bound, NOISE * self.noise)
        return self.ops.minimum(bound, seen)

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

        The residual stands in for z where z is (nearly) 0, unless the difference were more than a ten-thousandth of z, or than
        the tolerance: a stiff residual says nothing about z. A power of two costs no rounding, and does not move when a last
        bit of the norms does.
        """
        root = math.sqrt(torch.finfo(v.dtype).eps)
        if self._size is None:
            ops = self.ops
            z, r, least = (self.dot(x, x) ** 0.5 for x in (point.z, point.r, self.scale))
            self._size = ops.maximum(z, ops.minimum(r, ops.maximum(LONGEST * z, least) / root))
        length = self.dot(v, v) ** 0.5
        if self.layout.joint:
            h = root * self._size / length if length > 0 else 1.0
            return math.ldexp(1.0, math.frexp(h)[1]) if 0 < h < math.inf else 1.0
        h = root * self._size / length
        power = h / torch.frexp(h).mantissa
        return torch.where((h > 0) & torch.isfinite(power), power, 1.0)


class StageProblem(InnerProblem):
    """Implicit stages solved together: R_i = Z_i - a_i - g sum_j A_ij f(t_j, Z_j), the Z_i side by side in z.

    Args:
        field: f on the flat state. times: of the stages, as f wants them. a: like z, the a_i side by side.
        g: signed, float or ``(B,)``. norm, scale: an error norm and its scale (units of y). matrix: A, square.
        origin: (t, y) where a Jacobian for all stages is taken, t float or ``(B,)``; None: the start of the iteration.

    Attributes:
        depends: whether an evaluation under ``enable_grad`` has shown f to depend on something that requires a gradient.
    """

    def __init__(
        self,
        field: Any,
        times: tuple[Tensor, ...],
        a: Tensor,
        g: Any,
        norm: Any,
        scale: Tensor,
        matrix: tuple[tuple[float, ...], ...] = ((1.0,),),
        origin: tuple[Any, Tensor] | None = None,
    ) -> None:
        super().__init__(field.layout, norm, scale)
        self.field, self.times, self.a, self.g = field, times, a, g
        self.matrix, self.origin = matrix, origin
        self.wide = field.layout.spread(g)
        self.depends = False
        self.coupled = len(times) > 1
        if self.coupled:
            self.scales = torch.cat([scale] * len(times), -1)

    def evaluate(self, z: Tensor) -> Point:
        f = self.slopes(z)
        if f.requires_grad:
            self.depends, f = True, f.detach()
        return Point(z, z - self.a - self.wide * self.mixed(f), f)

    def residual(self, z: Tensor) -> Tensor:
        return z - self.a - self.wide * self.mixed(self.slopes(z))

    def slopes(self, z: Tensor) -> Tensor:
        """f of every stage, side by side."""
        self.calls += len(self.times)
        if not self.coupled:
            return self.field(self.times[0], z)
        return torch.cat([self.field(t, x) for t, x in zip(self.times, self.split(z), strict=True)], -1)

    def split(self, z: Tensor) -> tuple[Tensor, ...]:
        """The stages, each a flat state."""
        if not self.coupled:
            return (z,)
        return z.tensor_split(len(self.times), -1)

    def mixed(self, f: Tensor) -> Tensor:
        """sum_j A_ij f_j, side by side."""
        if not self.coupled:
            weight = self.matrix[0][0]
            return f if weight == 1.0 else weight * f
        whole, columns = _tensors(self.matrix, self.layout.dtype, f.device)
        if self.layout.joint:
            return torch.mm(whole, f.view(len(whole), -1)).view(-1)
        # Not as a matrix product, whose rounding depends on the batch.
        parts = f.unflatten(-1, (len(whole), -1)).unsqueeze(-3).unbind(-2)
        total = columns[0] * parts[0]
        for column, part in zip(columns[1:], parts[1:], strict=True):
            total = total + column * part
        return total.flatten(-2)

    def jv(self, point: Point, v: Tensor) -> Tensor:
        """v - g A (J v): only f is differenced, so that the identity keeps all its digits; one call of f a stage."""
        step = self.layout.spread(self.difference_step(point, v))
        change = self.slopes(point.z + step * v) - point.f
        return v - self.mixed(change) * (self.wide / step)

    def norm(self, x: Tensor) -> Any:
        """Error norm; the root mean square of the stages'."""
        if not self.coupled:
            return super().norm(x)
        layout, count = self.layout, len(self.times)
        if layout.single and layout.index is None and self.error_norm.custom is None:
            return layout.norm(x / self.scales) * count**-0.5
        squares = [self.error_norm(part, self.scale) ** 2 for part in self.split(x)]
        return (sum(squares[1:], squares[0]) / count) ** 0.5


@lru_cache(maxsize=64)
def _tensors(matrix: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Any]:
    """A, and its columns ``(s, 1)``."""
    whole = torch.tensor(matrix, dtype=dtype, device=device)
    return whole, whole.unsqueeze(-1).unbind(1)


class ProximalProblem(StageProblem):
    """The scaled residual of an implicit stage, r(z) = z - a - g f(t, z), with curvature in [1, 1 + g rho].

    For f = -grad F it is the gradient of |z - a|**2 / 2 + g F(z): z is the proximal point of a (Xia 2023, section 5.1).

    Args: as of :class:`StageProblem`, for one stage at time ``t``.
        energy: F(t, z) of the flat state, one number per sample as ``(B,)`` or 0-dim, or None.
    """

    def __init__(
        self, field: Any, t: Tensor, a: Tensor, g: Any, norm: Any, scale: Tensor, energy: Callable | None = None
    ) -> None:
        super().__init__(field, (t,), a, g, norm, scale)
        self.t, self.energy = t, energy

    def value(self, z: Tensor) -> Any:
        """|z - a|**2 / 2 + g F(t, z)."""
        if self.energy is None:
            return None
        away = z - self.a
        found = self.energy(self.t, z)
        return self.dot(away, away) / 2 + self.g * (found.item() if self.layout.joint else found)


class InnerStep(NamedTuple):
    """One iteration: the iterate, its residual, the optimiser's state.

    ``point`` is set where the residual was evaluated, None where it was carried along by a recurrence. A sample that could
    not make its step has a residual that is not finite. error: where the optimiser bounds the error that is left in z
    better than |r| does, that bound, in the error norm (then r may be that of the iterate before); infinite: the step
    failed, and ``resume`` may do better; NaN: it failed, and nothing helps. doubt: called where a residual was carried along,
    what it may be off by, in the error norm; None: nobody can say.
    """

    z: Tensor
    r: Tensor
    state: Any
    point: Point | None = None
    error: Any = None
    doubt: Callable[[], Any] | None = None


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
    rests: ClassVar[bool] = True
    """Whether a start is left alone whose residual is rounding. A correction that costs nothing more is better: what is left
    out at every step adds up, in single precision to hundreds of roundings."""
    unrolls: ClassVar[bool] = False
    """Whether its iterations can be recorded by autograd: all that is done with z and r are torch's operations."""
    patience: ClassVar[int] = 1000
    """Iterations for a step, where the user does not say how many."""

    @property
    def name(self) -> str:
        """The name that this kind of optimiser is registered under; that of its class where it is not."""
        kind = type(self)
        return _name(kind, _variant(kind, self))

    def chosen(self, layout: Any) -> InnerOptimizer:
        """What serves a state of this layout: itself, or another. Raises ``UnsupportedError`` / ``ArgumentError``."""
        return self

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

    def bound(self, memory: Any) -> Any:
        """An upper estimate of |lambda| of df/dy (1/time), float or ``(B,)``, by what ``memory`` knows; infinite: nothing."""
        return math.inf

    @abstractmethod
    def step(self, problem: InnerProblem, z: Tensor, r: Tensor, state: Any, running: Any) -> InnerStep:
        """The next iterate after ``z``, whose residual is ``r``."""

    def direct(self, problem: InnerProblem, z: Tensor) -> Callable[[Tensor, bool], Tensor] | None:
        """(b, transposed) -> x with M x = b or M^T x = b, nearly, M the derivative of the residual at ``z``; None: unknown."""
        return None

    def checked(self, problem: InnerProblem, point: Point, carried: Tensor, state: Any, who: Any) -> Any:
        """State now that the residual ``carried`` along to the current iterate was evaluated there, for ``who``."""
        return state

    @abstractmethod
    def resume(self, problem: InnerProblem, point: Point, state: Any, again: Any) -> Any:
        """State to go on from ``point``, the current iterate with its residual evaluated.

        ``again``: samples whose residual had been thought small enough, or whose step had failed: they start afresh.
        """


class InnerResult(NamedTuple):
    """z; the error norm of its residual; iterations, int or ``(B,)``; whether it converged, and whether its residual was
    evaluated, not only bounded or carried along, bool or ``(B,)``; memory."""

    z: Tensor
    norm: Any
    iterations: Any
    converged: Any
    evaluated: Any
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
    the residual is at rounding already. A residual that was carried by a recurrence is evaluated before it is believed, unless
    the optimiser bounds what it is off by. Samples stop one by one; one that claims to be done waits, untouched, until all
    that run have claimed or are due for a fresh residual, and one evaluation then serves them all. So what a sample does
    never depends on its neighbours.

    Args:
        tol: in units of the tolerance. max_iters: per sample. active: True or the ``(B,)`` mask of samples to be solved.
    """
    problem.tol = tol
    problem.algebra.inner = joined(problem.algebra.inner, (optimizer.name,))
    run = _Run(problem, start, tol, active)
    state = optimizer.init(problem, start, run.running, memory)
    run.begin(optimizer.curvature(state), optimizer.rests)
    while any_true(run.running):
        out = optimizer.step(problem, run.z, run.r, state, run.running)
        run.judge(out, optimizer.curvature(out.state), max_iters)
        if run.age >= optimizer.refresh or not any_true(run.running):
            state, again = run.close(optimizer, out.state, max_iters)
            if any_true(run.running):
                state = optimizer.resume(problem, run.point, state, again)
            continue
        state = out.state
    return InnerResult(run.z, run.norm, run.iterations, run.done, problem.ops.invert(run.blind), optimizer.memory(problem, state))


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
        self.blind = self.waiting
        self.done = problem.ops.invert(active | self.waiting)
        self.best = self.base = self.norm
        self.iterations: Any = 0 if problem.layout.joint else torch.zeros_like(self.done, dtype=torch.int64)
        self.stale: Any = self.iterations
        self.curvature: Any = 1.0
        self.age = 0

    def hoped(self) -> Any:
        """The tolerance, or what rounding may leave of a residual, which multiplies errors of z by up to L: 4 eps L |z|."""
        return self.problem.ops.maximum(self.problem.floor(self.rounding * self.curvature), self.tol)

    def reached(self, norm: Any, who: Any, point: Point | None = None) -> Any:
        """Who of ``who`` has a ``norm`` within the tolerance, or within what rounding is seen to leave at ``point``.

        4 eps L |z| is rounding only where the stiff part of z is as large as the rest; else that much residual is an error of
        the slow part, as large as it is.
        """
        problem, fine = self.problem, norm <= self.tol
        near = who & problem.ops.invert(fine) & (norm <= self.hoped())
        if not any_true(near):
            return who & fine
        if point is None:
            # The norm is a bound that the optimiser has worked out: rounding has to be seen in what is left indeed.
            point = problem.evaluate(self.z)
            norm = problem.norm(point.r)
        problem.measure_noise(point, near)
        return who & (fine | near & (norm <= self.hoped()))

    def begin(self, curvature: Any, rests: bool) -> None:
        """Where that is the optimiser's way, leave alone what rests within rounding."""
        self.curvature = curvature
        if not rests:
            return
        bound = self.rounding * curvature
        resting = self.running & (self.norm <= bound)
        doubtful = resting & (bound > RESTS * self.tol)
        if any_true(doubtful):
            self.problem.measure_noise(self.point, doubtful)
            resting = resting & (self.norm <= self.problem.floor(bound))
        self.done = self.done | resting
        self.running = self.running & self.problem.ops.invert(resting)

    def judge(self, out: InnerStep, curvature: Any, max_iters: int) -> None:
        """Take the iterates that are any good; see who claims to be done."""
        problem, ops, own = self.problem, self.problem.ops, out.error is not None
        norm = out.error if own else problem.norm(out.r)
        moved = self.running & ops.isfinite(norm) & (own | (norm <= GROWTH * self.best))
        self.z, self.r = problem.keep(moved, out.z, self.z), problem.keep(moved, out.r, self.r)
        self.norm = ops.where(moved, norm, self.norm)
        self.curvature = ops.where(self.running, curvature, self.curvature)
        self.iterations = self.iterations + self.running
        broken = self.running & ops.invert(moved)
        claim = moved & (norm <= self.hoped())
        if own or out.point is not None:
            claim = self.reached(norm, claim, out.point)
        sure = claim
        if not own and out.point is None:
            # From a residual that met the tolerance the recurrence has moved by less than the tolerance: no need to look again.
            sure = claim & (self.base <= self.tol)
            if out.doubt is not None and any_true(claim & ops.invert(sure)):
                sure = sure | claim & (norm + out.doubt() <= self.tol)
        self.done = self.done | sure
        if out.point is None:
            self.blind = self.blind | sure
        self.waiting = self.waiting | (claim & ops.invert(sure))
        if own:
            self.waiting = self.waiting | (broken & (norm == math.inf))
        elif self.age > 0:
            # The recurrence may be to blame; one that fails from a fresh residual is lost.
            self.waiting = self.waiting | broken
        self.running = moved & ops.invert(claim) & (self.iterations < max_iters)
        # An optimiser with a bound of its own keeps no residual by a recurrence that could have gone wrong.
        self.exact = own or out.point is not None
        self.point = out.point or self.point
        self.age += 1

    def close(self, optimizer: InnerOptimizer, state: Any, max_iters: int) -> tuple[Any, Any]:
        """End the round: evaluate the residual of whoever waits or runs. The state of ``optimizer``, who has seen that, and the
        samples that have to start afresh."""
        problem, ops = self.problem, self.problem.ops
        alive, again = self.running | self.waiting, self.waiting
        self.age, self.waiting = 0, self.waiting & False
        if not any_true(alive):
            return state, again
        if not self.exact:
            point = problem.evaluate(self.z)
            state = optimizer.checked(problem, point, self.r, state, alive)
            self.point, cut = problem.shorten(self.point, point, alive)
            again = again | cut
        elif any_true(again):
            self.point = problem.evaluate(self.z)
        self.z, self.r = self.point.z, self.point.r
        norm = problem.norm(self.r)
        self.norm = ops.where(alive, norm, self.norm)
        self.done = self.done | self.reached(norm, alive, self.point)
        self.stale = ops.where(norm <= 0.9 * self.best, self.stale * 0, self.stale + again)
        self.best = ops.minimum(self.best, norm)
        self.base = norm
        fit = ops.isfinite(norm) & (self.stale < STALLED) & (self.iterations < max_iters)
        self.running = alive & ops.invert(self.done) & fit
        return state, again


def any_true(mask: Any) -> bool:
    """Whether any sample is in the mask."""
    return bool(mask.any()) if isinstance(mask, Tensor) else mask


def all_true(mask: Any) -> bool:
    """Whether all samples are in the mask."""
    return bool(mask.all()) if isinstance(mask, Tensor) else mask


INNER_OPTIMIZERS: Registry[InnerOptimizer] = Registry("inner solver")


@lru_cache(maxsize=64)
def _name(kind: type, variant: Any) -> str:
    same = {name: _variant(kind, item) for name, item in INNER_OPTIMIZERS.items() if type(item) is kind}
    fitting = [name for name, value in same.items() if value == variant]
    return (fitting or list(same) or [kind.__name__])[0]


def _variant(kind: type, optimizer: Any) -> Any:
    """What tells entries of one class apart: the first field that is no option."""
    name = _first_field(kind)
    return None if name is None else getattr(optimizer, name)


@lru_cache(maxsize=64)
def _first_field(kind: type) -> str | None:
    return next((field.name for field in dataclasses.fields(kind) if not field.kw_only), None)
