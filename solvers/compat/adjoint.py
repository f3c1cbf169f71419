"""``odeint_adjoint`` with torchdiffeq's signature.

By default its gradient is the exact one of the steps that were taken, from stored states, each step taken again: faster than
the backward ODE and free of its error. The backward ODE itself is solved where the caller can tell the difference: another
method, tolerance, norm or grid for it, or callbacks on its steps.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adjoint import Adjoint
from ..adjoint.backsolve import Backsolve, Continuous
from ..adjoint.discrete import Discrete
from ..adjoint.whole import Sweep, solve_whole
from ..control import CONTROLLERS
from ..field import Field
from ..loop import Plan, Trajectory, drive
from ..norms import ErrorNorm, rms
from ..status import ArgumentError, ArgumentTypeError
from . import classes
from .errors import CheckTypeError
from .event import check_event_times, solve_event
from .odeint import Problem
from .options import SCIPY, Choice, callbacks, choose, on_grid
from .wrappers import perturbed


def odeint_adjoint(
    func: Any,
    y0: Any,
    t: Any,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Any = None,
    event_fn: Any = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: Any = None,
    adjoint_params: Any = None,
    batch_dim: int | None = None,
    args: tuple[Any, ...] = (),
) -> Any:
    """``odeint`` in the memory of one step and one state for each step, as ``torchdiffeq.odeint_adjoint``.

    Args:
        adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options: of the ODE that is solved backwards; None: those of the
            solve, options without "norm". The option "norm" is a function of the tuple (t, y, adj_y, *adjoint_params),
            "seminorm" leaves the parameters out.
        adjoint_params: tensors to differentiate for, beside y0 and t; None: the parameters of ``func``, a module. What func
            captures otherwise is found, and differentiated for too, unless this is given.
        others: as in :func:`~solvers.odeint`. With ``event_fn`` the gradient is always that of the steps taken.

    Raises as ``odeint``, and ``ArgumentError`` where the parameters, or the options of the backward ODE, are missing.
    """
    problem = Problem.checked(func, y0, t, rtol, atol)
    if event_fn is not None:
        check_event_times(problem.t)
    solver = classes.own(method)
    if solver is not None:
        classes.refuse(method, batch_dim)
        _parameters(func, adjoint_params, False)
        return classes.run(solver, func, y0, problem.t, rtol, atol, method, options, event_fn, args)
    choice = choose(method, options, func, y0, problem.t)
    request = Request(adjoint_method, adjoint_options, adjoint_rtol, adjoint_atol)
    backward = _backward(problem, choice, request, adjoint_params)
    if event_fn is not None:
        backward = dataclasses.replace(backward, exact=True, final=True)
        return solve_event(problem, choice, event_fn, backward, batch_dim=batch_dim, args=args)
    solution = problem.run(choice, backward, batch_dim, args)
    return _labelled(solution.y, backward.label)


class Request(NamedTuple):
    """The ``adjoint_*`` arguments."""

    method: Any
    options: Any
    rtol: Any
    atol: Any


class Label:
    """Carries ``adjoint_options``, which code for torchdiffeq looks up, and changes, on the node of the result's graph."""

    def __init__(self, adjoint_options: dict[str, Any], params: tuple[Tensor, ...]) -> None:
        self.adjoint_options, self.adjoint_params = adjoint_options, params


def find_parameters(module: nn.Module) -> list[Tensor]:
    """The parameters of ``module``; in a replica of DataParallel, which has none, the tensors that stand for them."""
    if not isinstance(module, nn.Module):
        raise CheckTypeError(f"module must be an nn.Module, found {type(module).__name__}")
    if getattr(module, "_is_replica", False):
        found = []
        for part in module.modules():
            found += [x for x in vars(part).values() if isinstance(x, Tensor) and x.requires_grad]
        return found
    return list(module.parameters())


def _parameters(func: Any, given: Any, custom_norm: bool) -> tuple[tuple[Tensor, ...], bool]:
    """The adjoint parameters that require a gradient, and whether the caller named them."""
    if given is None:
        if not isinstance(func, nn.Module):
            raise ArgumentError(
                "func must be an instance of nn.Module to specify the adjoint parameters; alternatively they can be "
                "specified explicitly via the `adjoint_params` argument. If there are no parameters then it is allowable to "
                "set `adjoint_params=()`."
            )
        return tuple(p for p in find_parameters(func) if p.requires_grad), False
    if not isinstance(given, Iterable) or isinstance(given, Tensor):
        raise ArgumentTypeError(f"adjoint_params must be an iterable of tensors, found {type(given).__name__}")
    params = tuple(given)
    for p in params:
        if not isinstance(p, Tensor):
            raise ArgumentTypeError(f"adjoint_params must hold tensors, found {type(p).__name__}")
    kept = tuple(p for p in params if p.requires_grad)
    if custom_norm and len(kept) < len(params):
        warnings.warn(
            "An adjoint parameter was passed without requiring gradient. For efficiency this will be excluded from the "
            "adjoint pass, and will not appear as a tensor in the adjoint norm.",
            stacklevel=4,
        )
    return kept, True


def _backward(problem: Problem, choice: Choice, request: Request, adjoint_params: Any) -> TwoWays:
    method, options = request.method, request.options
    if method is not None and method != choice.name and choice.options and options is None:
        raise ArgumentError(
            "If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`. So as `options` has been "
            "passed then `adjoint_options` must be passed as well."
        )
    if options is None:
        chosen = {key: value for key, value in choice.options.items() if key != "norm"}
    else:
        chosen = dict(options)
    norm: Any = chosen.get("norm")
    params, named = _parameters(problem.func, adjoint_params, callable(norm))
    default = Norms.default(problem.y0, with_params=norm != "seminorm")
    flat = norm is None or norm == "seminorm"
    usual: Any = default if flat else norm if not isinstance(problem.y0, tuple) else _per_part(norm, problem.y0)
    label = Label(chosen | {"norm": usual}, params)
    name = choice.name if method is None else method
    if classes.own(name) is not None:
        warnings.warn(
            f"adjoint_method={name!r} is a solver class, which cannot solve the backward ODE here: the gradient is that of the "
            "steps taken",
            stacklevel=4,
        )
        name, options, chosen = choice.name, None, dict(choice.options)
    backward = choice
    if name != choice.name or options is not None:
        rest = {key: value for key, value in chosen.items() if key not in ("norm", "grid_constructor")}
        backward = choose(name, rest, problem.func, problem.y0, problem.t)
    watch = callbacks(problem.func, backward, _seen_backward(problem.y0), "_adjoint")
    # The backward ODE cannot be solved past jumps; steps taken again have them.
    exact = choice.keywords.get("jumps") is not None or not (
        callable(norm)
        or watch is not None
        or choice.name == SCIPY
        or name != choice.name
        or "grid_constructor" in chosen
        or "perturb" in chosen
        or any(key not in FORWARD and not _same(x, choice.options.get(key)) for key, x in chosen.items())
        or _differs(request.rtol, problem.rtol)
        or _differs(request.atol, problem.atol)
    )
    rtol, atol = (None if x is None else _smallest(x) for x in (request.rtol, request.atol))
    other = backward is not choice
    return TwoWays(exact, label, usual, backward.watched(watch), rtol, atol, named, callable(norm) or watch is not None, other)


FORWARD = ("norm", "step_t", "jump_t")
"""Options of the backward ODE that need not make the steps of the solve, taken again, another answer."""


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and bool((a == b).all())
    return a is b or a == b


def _seen_backward(y0: Any) -> Callable[[Any], Any]:
    """The backward state (y, adj_y, *params) as callbacks of torchdiffeq see it, (t, y, adj_y, *params)."""
    shape = y0.shape if isinstance(y0, Tensor) else (-1,)
    return lambda state: (state[0].new_zeros(()), state[0].view(shape), state[1].view(shape), *state[2:])


def _differs(given: Any, usual: Any) -> bool:
    if given is None or given is usual:
        return False
    return not (isinstance(given, (int, float)) and isinstance(usual, (int, float)) and given == usual)


def _smallest(tolerance: Any) -> float:
    parts = tolerance if isinstance(tolerance, (tuple, list)) else (tolerance,)
    return min(float(torch.as_tensor(part).min()) for part in parts)


class Norms:
    """Norms of the backward state (t, y, adj_y, *params), y flat for tuple states."""

    @staticmethod
    def default(y0: Any, with_params: bool) -> Callable[[Any], Tensor]:
        sizes = [part.numel() for part in y0] if isinstance(y0, tuple) else None

        def of_state(y: Tensor) -> Tensor:
            parts = [part for part in (y.reshape(-1).split(sizes) if sizes else (y,)) if part.numel()]
            return torch.stack([rms(part) for part in parts]).amax() if parts else y.new_zeros(()).abs()

        def norm(state: tuple[Tensor, ...]) -> Tensor:
            t, y, adj_y, *params = state
            found = [t.abs(), of_state(y), of_state(adj_y)]
            if with_params:
                found += [rms(p) for p in params if p.numel()]
            return torch.stack([x.to(found[1].dtype) for x in found]).amax()

        return norm


def _per_part(norm: Callable[[Any], Any], y0: tuple[Tensor, ...]) -> Callable[[Any], Any]:
    """A user's norm of (t, *y, *adj_y, *params) as one of (t, y, adj_y, *params)."""

    def split(x: Tensor) -> list[Tensor]:
        parts = x.reshape(-1).split([part.numel() for part in y0])
        return [part.view(like.shape) for part, like in zip(parts, y0)]

    def whole(state: tuple[Tensor, ...]) -> Any:
        t, y, adj_y, *params = state
        return norm((t, *split(y), *split(adj_y), *params))

    return whole


# -- the adjoint ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TwoWays(Adjoint):
    """Exact gradients by steps taken again, or those of the backward ODE.

    exact: the first, unless the norm in ``label`` is another one than ``norm`` when the backward pass comes. backward: the
    method and options of the backward ODE. named: whether the parameters are all that is differentiated for. asked: whether
    the backward state is to hold the parameters, since somebody looks at it. other: whether the backward ODE has a method or
    options of its own. final: exact whatever becomes of the norm: an event ends the solve.
    """

    exact: bool
    label: Label
    norm: Callable[[Any], Any]
    backward: Choice
    rtol: float | None
    atol: float | None
    named: bool
    asked: bool
    other: bool = False
    final: bool = False

    @property
    def more(self) -> tuple[Tensor, ...]:
        return self.label.adjoint_params

    def run(self, plan: Plan, y0: Tensor, stats: Any) -> Trajectory:
        return solve_whole(_Either, plan, y0, stats, more=self.more, adjoint=self)

    def chosen(
        self, inputs: Any, tensors: Sequence[Tensor], found: list[Tensor | None], needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """``found`` with 0 for parameters that f does not use, and nothing for tensors that were not asked for."""
        wanted = {id(p) for p in self.more}
        result = list(found)
        for i in range(len(tensors) - len(inputs.captured.tensors), len(tensors)):
            if id(tensors[i]) in wanted:
                result[i] = torch.zeros_like(tensors[i]) if found[i] is None and needed[i] else found[i]
            elif self.named:
                result[i] = None
        return result

    def options(self) -> Backsolve:
        return Backsolve(
            self.adapt,
            adjoint_method=self.backward.method,
            adjoint_rtol=self.rtol,
            adjoint_atol=self.atol,
            adjoint_norm="full" if self.full else "state",
        )

    @property
    def full(self) -> bool:
        """Whether parameters are part of the backward state: where somebody's own norm wants to see them."""
        return self.label.adjoint_options["norm"] is not self.norm or self.asked

    def adapt(self, plan: Plan, parameters: list[Tensor]) -> Plan:
        """The plan of the backward ODE with the norm, grid and steps that were asked for."""
        choice = self.backward
        norm = plan.norm
        if plan.layout.joint and self.full:
            norm = ErrorNorm(plan.layout, plan.norm.rtol, plan.norm.atol, self._measure(plan, parameters))
        controller = choice.controller or CONTROLLERS[choice.method.controller]
        field = Field(plan.field.func, plan.layout, (), plan.field.time_dtype, norm)
        plan = dataclasses.replace(plan, norm=norm, field=field, controller=controller)
        if self.label.adjoint_options.get("perturb"):
            plan = perturbed(plan)
        build = self.label.adjoint_options.get("grid_constructor")
        return plan if build is None else _on_grids(plan, build)

    def _measure(self, plan: Plan, parameters: list[Tensor]) -> Callable[[Any], Any]:
        norm = self.label.adjoint_options["norm"]
        place = {id(p): i for i, p in enumerate(parameters)}
        shape = self.shape

        def measure(state: Any) -> Any:
            y, a, *found = state
            params = [found[place[id(p)]] if id(p) in place else torch.zeros_like(p) for p in self.more]
            return norm((y.new_zeros((), dtype=plan.layout.real_dtype), y.view(shape), a.view(shape), *params))

        return measure

    shape: Any = (-1,)


def _with_steps_of(choice: Choice, plan: Plan) -> Plan:
    """``plan`` with the kind and limits of steps that ``choice`` asks for."""
    assert plan.times is not None
    given = choice.keywords
    times = plan.times._replace(fixed=None if choice.adaptive else given.get("dt", "grid"))
    return dataclasses.replace(
        plan,
        times=times,
        clock=times.clock(plan.layout, plan.jumps),
        controller=choice.controller or CONTROLLERS[choice.method.controller],
        dt_min=given.get("dt_min", 0.0),
        dt_max=given.get("dt_max", math.inf),
        force_dt_min=given.get("force_dt_min", False),
        max_steps=choice.max_steps,
    )


def _on_grids(plan: Plan, build: Any) -> Plan:
    """Steps on the grid that ``build`` makes of each interval between outputs."""
    assert plan.times is not None
    ends = [plan.clock.start, *(jump.t for jump in plan.jumps), plan.clock.end]
    columns: list[float] = []
    for first, last in pairwise(ends):
        t = torch.tensor([first, last], dtype=torch.float64, device=plan.layout.device)
        grid = build(plan.field.func, None, t)
        columns += on_grid(grid, t)["step_t"].to(torch.float64).tolist()
    times = plan.times._replace(step_t=tuple(columns), fixed=abs(ends[-1] - ends[0]))
    clock = times.clock(plan.layout, plan.jumps)
    fixed: Any = clock.fixed_dt
    return dataclasses.replace(plan, times=times, clock=clock, dt0=fixed.item())


class _Either(Sweep):
    """Decides in the backward pass, when the norm that was left in the label is known."""

    name = "checkpoint"

    def __init__(self, plan: Plan, inputs: Any, stats: Any, adjoint: TwoWays) -> None:
        super().__init__(plan, inputs, stats)
        layout = plan.layout
        if layout.is_tensor:
            object.__setattr__(adjoint, "shape", layout.shapes[0])
        self.adjoint = adjoint
        self.discrete = Discrete(plan, inputs, stats, limit=None) if adjoint.exact else None

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Trajectory, list[Tensor]]:
        if self.discrete is not None:
            trajectory, saved = self.discrete.forward(tensors)
        else:
            plan = self.inputs.rebind(self.plan, self.inputs.detached(tensors))
            trajectory, saved = drive(plan, tensors[0].detach(), slope=self.inputs.captured.slope), []
        self.times, self.t_last = trajectory.t.detach(), trajectory.t_last
        return trajectory, saved

    def backward(self, tensors, saved, values, last, needed) -> list[Tensor | None]:
        adjoint = self.adjoint
        replaced = adjoint.label.adjoint_options["norm"] is not adjoint.norm
        if self.discrete is not None and (adjoint.final or not replaced):
            self.discrete.of_events = self.of_events
            found = self.discrete.backward(tensors, saved, values, last, needed)
        else:
            plan = _with_steps_of(adjoint.backward, self.plan) if adjoint.other else self.plan
            continuous = Continuous(plan, self.inputs, self.stats, options=adjoint.options())
            continuous.times, continuous.t_last = self.times, self.t_last
            found = continuous.backward(tensors, saved[-2:], values, last, needed)
        return adjoint.chosen(self.inputs, tensors, found, needed)


class _Labelled(torch.autograd.Function):
    """The same values, on a node that has the label's attributes."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, label: Label) -> Tensor:
        ctx.adjoint_options, ctx.adjoint_params = label.adjoint_options, label.adjoint_params
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, None]:
        return c, None


def _labelled(y: Any, label: Label) -> Any:
    if isinstance(y, Tensor):
        return _Labelled.apply(y, label) if y.requires_grad else y
    if not any(part.requires_grad for part in y) or len({part.dtype for part in y}) > 1:
        return y
    flat = torch.cat([part.reshape(len(part), -1) for part in y], dim=1)
    parts = _Labelled.apply(flat, label).split([part[0].numel() for part in y], dim=1)
    return tuple(part.view(like.shape) for part, like in zip(parts, y))
