"""Backward differentiation formulas of variable step and order, each step a proximal problem."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..optim import InnerOptimizer, any_true
from ..optim.linearisation import Memory
from ..optim.newton import Newton
from ..status import ArgumentError
from .adams_weights import distances
from .backward_weights import HARMONIC, Backward, base_weights, combined, fixed_leading, lagrange, values
from .base import METHODS, Method, StepOut, number
from .solving import check_inner_options, inner_named, remembered, solve_stage
from .stiffness import GROWING, Swing, at_rest, swinging

CHOOSING = Newton("auto")

HIGHEST_ORDER = 5
"""The formula of order 6 is stable in too small a sector to be of use (Hairer & Wanner II, V.2)."""

HARDLY_DAMPED = 0.03
"""Damping -Re lambda / |lambda| of the modes that are looked for. Those from .07 on lie in the sector of the formula of order 3,
of 86.03 degrees (Hairer & Wanner II, V.2); those in between are gone in a few periods."""
RESOLVED, STIFF = 0.25, 10.0
"""|dt lambda| at which formulas may be unstable for others: below, order 5 follows them, above, all damp them."""
UNKNOWN = -1.0
"""Told where something may swing, and nobody can say."""


class BDFState(NamedTuple):
    """History, newest first. past: y_{n-1}, y_{n-2}, ..; while there is none, the first is dy/dt at the start, detached.
    steps: t_n - t_{n-1}, .. count: how many of them there are, int or ``(B,)``; in the batched modes both tuples have their
    full length from the start, with harmless numbers behind the first ``count``. order: of the next step. memory: the inner
    solver's. swing: what the last step showed of modes that swing."""

    past: tuple[Tensor, ...]
    steps: tuple[Any, ...]
    count: Any
    order: Any
    memory: Any
    swing: Swing

    @property
    def factorises(self) -> bool:
        """Whether another step size means another matrix to be factorised."""
        return any(isinstance(part, Memory) for part in self.memory)


class BDFError(NamedTuple):
    """Differences of the solution from the polynomials of degree k - 1, k, k + 1 through the past, ``(3, *layout.shape)``, in
    joint mode without those that do not exist; which of them do; what multiples of them are errors; |dt lambda| of the modes
    which make these differences, where they swing and orders are unstable for them, else 0, or ``UNKNOWN``."""

    differences: Tensor
    exist: tuple[Any, Any, Any]
    multiples: tuple[Any, Any, Any]
    swings: Any


class BDFDense(NamedTuple):
    """The polynomial through y1, y0 and ``order - 1`` (int or ``(B,)``) of ``past``, ``steps`` apart."""

    layout: Any
    dt: Any
    y1: Tensor
    y0: Tensor
    past: tuple[Tensor, ...]
    steps: tuple[Any, ...]
    order: Any


@dataclass(frozen=True)
class BDF(Method):
    """Backward differentiation of variable step and order 1 to 5 with fixed leading coefficient, each step the proximal problem
    of a, z = argmin_z |z - a|**2 / 2 + g F(t1, z) for f = -grad F, g = dt / H_k.

    Its equation, the stationarity condition r(z) = z - a - g f(t1, z) = 0, serves any f. It is solved from the polynomial
    through the last k + 1 values; what the solution differs from that is the error estimate. The controller "bdf" raises
    the order and keeps the step where changes do not pay, so that Jacobians and factorisations serve many steps. A solve
    starts at order 1 with a small step. Steps whose equation is not solved are tried again with a quarter of their size.

    Orders 3 to 5 are not stable for modes near the imaginary axis. Where something is factorised and such a mode, below some
    hundred tolerances, keeps the steps short, it is damped (:class:`~solvers.control.bdf.BDFController`); larger ones are
    followed.

    ``inner``: any inner solver; "auto": Newton with a dense matrix up to 400 unknowns a sample (sparse with
    ``jac_sparsity``), matrix-free Newton with MINRES or GMRES above; ``stats.jacobian`` says which.

    Gradients are those of the exact solutions of the steps, by the implicit function theorem, twice differentiable, with
    the chosen steps and orders held constant. Dense output is the polynomial of the formula, of the order of the step.

    Args:
        max_order: 1 to 5. inner_tol: error left in a step, in units of the tolerance. max_iters: iterations for a step (None:
            what suits the inner solver). backward_tol: relative tolerance of the linear solves in the backward pass.

    Units: dt and t in the units of t, error in those of y. Memory: about 20 states beside the inner solver's. Jackson &
    Sacks-Davis 1980; Byrne & Hindmarsh 1975, ACM TOMS 1; Shampine & Reichelt 1997, SIAM J. Sci. Comput. 18.
    """

    inner: InnerOptimizer = CHOOSING
    _: KW_ONLY
    max_order: int = HIGHEST_ORDER
    inner_tol: float = 0.3
    max_iters: int | None = None
    backward_tol: float = 1e-8

    name: ClassVar[str] = "prox_bdf"  # type: ignore[misc]
    error_order: ClassVar[int | None] = 2  # type: ignore[misc]
    reference: ClassVar[str] = "Byrne & Hindmarsh 1975; Jackson & Sacks-Davis 1980; Xia 2023, section 5.1"  # type: ignore[misc]
    remedy: ClassVar[str] = "another inner=, jac=, or a larger max_iters= or inner_tol="
    implicit: ClassVar[bool] = True
    one_step: ClassVar[bool] = False
    variable_order: ClassVar[bool] = True
    controller: ClassVar[str] = "bdf"

    def __post_init__(self) -> None:
        check_inner_options(self)
        k = self.max_order
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= HIGHEST_ORDER:
            raise ArgumentError(f"max_order of {self.name!r} must be an integer from 1 to {HIGHEST_ORDER}, found {k!r}")

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.max_order

    def choose_inner(self, inner: Any) -> InnerOptimizer:
        return inner_named(inner, self.inner)

    def check(self, layout: Any) -> None:
        self.inner.chosen(layout)

    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> BDFState:
        layout = field.layout
        slope = torch.zeros_like(y0.detach()) if f0 is None else f0.detach()
        memory = remembered(self, layout, y0)
        swing = at_rest(layout)
        if layout.joint:
            return BDFState((slope,), (), 0, 1, memory, swing)
        step = torch.where(torch.as_tensor(dt).detach() < 0, -1.0, 1.0).to(torch.float64).expand(layout.batch)
        none = torch.zeros(layout.batch, dtype=torch.int64, device=layout.device)
        return BDFState((slope,) * self.max_order, (step,) * self.max_order, none, none + 1, memory, swing)

    # -- the step -----------------------------------------------------------------------------------------------------

    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: BDFState, active: Any) -> StepOut:
        layout, size, k = field.layout, number(dt), state.order
        with torch.no_grad():
            past, steps = _history(layout, size, y0.detach(), state)
            weights = fixed_leading(distances(size, steps), k)
            predicted, base, lower, higher = _combinations(layout, weights, (y0.detach(), *past))
            g = size * _inverse_harmonic(k)
            scale = field.norm.scale(y0.detach(), predicted)

        def live() -> tuple[Tensor, Any]:
            return self._live(layout, dt, y0, past, state, weights)

        start = lambda problem, evaluate: evaluate(predicted)
        done = solve_stage(self, field, t0, dt, base, g, start, live, state.memory, active, scale)
        found, problem = done.found, done.problem
        with torch.no_grad():
            swings, swing = self._swings(problem, found.z - predicted, found, dt, scale, state)
            error = _errors(found.z, (lower, predicted, higher), weights, state, self.max_order, swings)
        depth = self.max_order
        count = min(state.count + 1, depth) if isinstance(state.count, int) else (state.count + 1).clamp(max=depth)
        # While there is no history, its place holds the slope at the start, which must not be taken for a state.
        before = state.past[:0] if isinstance(state.count, int) and state.count == 0 else state.past
        after = BDFState((y0, *before)[:depth], (dt, *state.steps)[:depth], count, k, found.memory, swing)
        dense = BDFDense(layout, dt, done.z, y0, before, state.steps, k)
        return StepOut(done.z, error, dense, after, done.calls, done.status, found.iterations, problem.algebra)

    def _swings(self, problem: Any, v: Tensor, found: Any, dt: Any, scale: Tensor, state: BDFState) -> tuple[Any, Swing]:
        """|dt lambda| of the mode which makes ``v``, the difference of the new state from the predicted one, if it swings.

        Looked at where orders may be unstable and something has just shortened the steps; where nothing is factorised, it
        would take too many calls of f.
        """
        layout, k, memory = problem.layout, state.order, found.memory[0]
        ops, size = layout.ops, abs(number(dt))
        longest = size
        for i, step in enumerate(state.steps):
            longest = ops.where(i < state.count, ops.maximum(abs(number(step)), longest), longest)
        held = (k > 2) & (size < longest) & found.converged
        if not isinstance(memory, Memory) or not any_true(held):
            return 0.0 * size, at_rest(layout)
        inner: Any = self.inner.chosen(layout)
        u = inner.filtered(problem, memory, 1.0, v)
        q = inner.filtered(problem, memory, 1.0, u)
        p = inner.filtered(problem, memory, 1.0, q)
        known, mode, damping, swing = swinging(layout, scale, abs(problem.g), u, q, p, state.swing)
        mode = mode * _harmonic(k)
        unstable = (mode > RESOLVED) & (mode < STIFF) & (damping > -GROWING) & (damping < HARDLY_DAMPED)
        return ops.where(held, ops.where(unstable, mode, ops.where(known, 0.0, UNKNOWN)), 0.0), swing

    def _live(self, layout: Any, dt: Any, y0: Tensor, past: Any, state: BDFState, weights: Backward) -> tuple[Tensor, Any]:
        """a and g with their gradients: a is linear in the past, its weights are functions of the steps."""
        k, steps = state.order, state.steps
        begins = isinstance(state.count, int) and state.count == 0
        known = past if begins else _past(layout, past, state)
        base: Any = weights.base
        if any(isinstance(x, Tensor) and x.requires_grad for x in (dt, *steps)):
            base = base_weights(distances(dt, (dt,) if begins else _steps(layout, dt, state)), k)
        return combined(layout, base, (y0, *known)), dt * _inverse_harmonic(k)

    def ratio(self, norm: Any, y0: Tensor, out: StepOut) -> Any:
        differences, exist, multiples, swings = out.error
        scaled = differences / norm.scale(y0, out.y1)
        if norm.layout.joint:
            sizes = iter(scaled.unbind(0))
            found = [norm.measure(next(sizes)) * m if there else math.inf for there, m in zip(exist, multiples, strict=True)]
            return (*found, swings)
        found = [norm.measure(x) * multiple for x, multiple in zip(scaled.unbind(0), multiples, strict=True)]
        return (*(torch.where(there, x, math.inf) for there, x in zip(exist, found, strict=True)), swings)

    def interpolate(self, dense: BDFDense, theta: Tensor, derivative: int = 0) -> Tensor:
        layout, dt = dense.layout, dense.dt
        s = distances(dt, dense.steps)
        s = s if isinstance(s, Tensor) else theta.new_tensor(s)
        nodes = torch.cat([torch.ones_like(s[:1]), -s])
        states = (dense.y1, dense.y0, *dense.past)[: len(nodes)]
        rows = lagrange(nodes[: len(states)], dense.order + 1)
        # Resting samples (dt = 0) have no use for a derivative, but must not divide by 0.
        unit = torch.where(dt == 0, 1.0, dt) if derivative and isinstance(dt, Tensor) else dt
        weights = values(rows, theta, derivative) * unit**-derivative if derivative else values(rows, theta)
        if layout.joint:
            return torch.einsum("kn,ki->ni", weights.to(layout.dtype), torch.stack(states))
        return combined(layout, weights, states)


def _inverse_harmonic(k: Any) -> Any:
    return 1.0 / _harmonic(k)


def _harmonic(k: Any) -> Any:
    return HARMONIC[k] if isinstance(k, int) else torch.tensor(HARMONIC, dtype=torch.float64, device=k.device)[k]


def _history(layout: Any, size: Any, y0: Tensor, state: BDFState) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Past values and steps, detached; where there are none yet, of a straight line through the start."""
    if layout.joint:
        if state.count == 0:
            return (y0 - size * state.past[0],), (size,)
        return tuple(x.detach() for x in state.past), tuple(number(x) for x in state.steps)
    begins = state.count == 0
    steps = (torch.where(begins, torch.where(size == 0, state.steps[0].detach(), size), state.steps[0].detach()),)
    first = torch.where(layout.spread(begins), y0 - layout.spread(size) * state.past[0].detach(), state.past[0].detach())
    return (first, *(x.detach() for x in state.past[1:])), (*steps, *(x.detach() for x in state.steps[1:]))


def _past(layout: Any, past: tuple[Tensor, ...], state: BDFState) -> tuple[Tensor, ...]:
    """Past values with their gradients."""
    if layout.joint:
        return state.past
    return (torch.where(layout.spread(state.count == 0), past[0], state.past[0]), *state.past[1:])


def _steps(layout: Any, dt: Any, state: BDFState) -> tuple[Any, ...]:
    if layout.joint:
        return state.steps
    return (torch.where((state.count == 0) & (dt != 0), dt, state.steps[0]), *state.steps[1:])


def _combinations(layout: Any, weights: Backward, states: tuple[Tensor, ...]) -> list[Any]:
    """The four combinations, None for one without weights."""
    if not layout.joint:
        return [combined(layout, part, states) for part in weights[:4]]
    kept = [part for part in weights[:4] if part is not None]
    width = max(len(part) for part in kept)
    matrix = torch.tensor([[*part, *[0.0] * (width - len(part))] for part in kept], dtype=layout.dtype, device=layout.device)
    found = iter(torch.mm(matrix, torch.stack(states[:width])).unbind(0))
    return [None if part is None else next(found) for part in weights[:4]]


def _errors(
    z: Tensor, foreseen: tuple[Any, Any, Any], weights: Backward, state: BDFState, highest: int, swings: Any
) -> BDFError:
    k, count = state.order, state.count
    differences = torch.stack([z - x for x in foreseen if x is not None])
    if isinstance(k, int):
        above = foreseen[2] is not None and k < highest and count > k
        if foreseen[2] is not None and not above:
            differences = differences[:-1]
        return BDFError(differences, (foreseen[0] is not None, True, above), weights.errors, swings)
    exist = (k > 1, torch.ones_like(k, dtype=torch.bool), (k < highest) & (count > k))
    return BDFError(differences, exist, weights.errors, swings)


METHODS.register("prox_bdf", BDF())
