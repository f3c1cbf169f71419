"""The continuous adjoint: the gradient from an ODE of its own, solved backwards in time.

With a(t) = dL/dy(t): da/dt = -(df/dy)^T a, dL/dp = int a^T df/dp dt (Chen et al., "Neural Ordinary Differential Equations",
2018, appendix B; Pontryagin 1962). Nothing is stored but the outputs: y runs backwards together with a, and is put back to
the stored value at each output, where a takes up the output's own cotangent. Both happen in jumps of one backward solve, so
that it goes on with its step size, and in the batched modes each sample has its own steps and times.

The gradients of parameters are quadratures along the accepted backward steps: at Gauss points of the step's continuous
extension, summed over the samples as they come. They are no part of the state, so they cost nothing per stage, do not
enter the error norm, and no sample has a copy. ``adjoint_norm="full"`` makes them part of the state, and of the norm.

The result differs from the gradient of the discrete solution by an error of the order of the tolerance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..control import CONTROLLERS, Jump
from ..events import Chunk, rate, shifted
from ..field import Field
from ..layout import Layout
from ..loop import Plan, Record, Times, Trajectory, drive
from ..methods import METHODS, Method
from ..norms import ErrorNorm
from ..saveat import SaveAt
from ..solution import Stats
from ..status import ERRORS, FIRST_FAILURE, ArgumentError, ArgumentTypeError, Status, UnsupportedError
from .base import ADJOINTS, Adjoint
from .capture import Strangers
from .whole import Sweep, solve_whole


@dataclass(frozen=True)
class Backsolve(Adjoint):
    """Solves the adjoint equation backwards: memory of the outputs alone, a gradient good to about the tolerance.

    For problems that are stable backwards too; a dissipative f makes y run away between outputs. Not differentiable again;
    refuses jumps and, unless ``adjoint_method`` is given, implicit methods.

    Args:
        adjoint_method: name or instance; None: that of the solve.
        adjoint_rtol, adjoint_atol: tolerances of the backward solve, numbers; None: those of the solve.
        adjoint_norm: "state": the error norm sees y and a; "full": also the gradients of parameters (joint mode only).
        adapt: a last change to the plan of the backward solve, ``(plan, parameters) -> plan``; its state is the tuple
            (y, a), flat, and with the full norm the gradients of ``parameters``.
    """

    adapt: Callable[[Plan, list[Tensor]], Plan] | None = None

    _: KW_ONLY
    adjoint_method: str | Method | None = None
    adjoint_rtol: float | None = None
    adjoint_atol: float | None = None
    adjoint_norm: str = "state"

    def __post_init__(self) -> None:
        if self.adjoint_norm not in ("state", "full"):
            raise ArgumentError(f"adjoint_norm must be 'state' or 'full', found {self.adjoint_norm!r}")
        if not isinstance(self.adjoint_method, (str, Method, type(None))):
            found = type(self.adjoint_method).__name__
            raise ArgumentTypeError(f"adjoint_method must be a name or a Method, found {found}")
        for name in ("adjoint_rtol", "adjoint_atol"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and value > 0):
                raise ArgumentError(f"{name} must be a positive number or None, found {value!r}")

    def run(self, plan: Plan, y0: Tensor, stats: Any) -> Trajectory:
        return solve_whole(Continuous, plan, y0, stats, options=self)


ADJOINTS.register("backsolve", Backsolve())


class _Output(NamedTuple):
    """Column ``number`` of the output: its time (float or ``(B,)``, NaN where a sample has none), the flat state there, and
    its cotangent."""

    number: int
    t: Any
    y: Tensor
    cotangent: Tensor | None


class _Start(NamedTuple):
    """Where the backward solve starts: the end of the solve, with the sum of all cotangents there."""

    t: Any
    y: Tensor
    cotangent: Tensor


class Continuous(Sweep):
    name: ClassVar[str] = "backsolve"

    def __init__(self, *arguments: Any, options: Backsolve) -> None:
        super().__init__(*arguments)
        self.options = options
        choice = options.adjoint_method
        self.method = METHODS[choice] if isinstance(choice, str) else (choice or self.plan.method)
        self._check()

    def _check(self) -> None:
        plan, method = self.plan, self.method
        if plan.jumps:
            raise UnsupportedError("adjoint='backsolve' does not go back through jumps: use adjoint='checkpoint'")
        for number, event in enumerate(plan.events):
            if event.reset is not None or not event.terminal:
                raise UnsupportedError(
                    f"adjoint='backsolve' takes terminal events without a reset, which events[{number}] is not: use "
                    "adjoint='checkpoint'"
                )
        if plan.events and plan.save.kind == "steps":
            raise UnsupportedError("adjoint='backsolve' with events does not take save='steps': use adjoint='checkpoint'")
        if method.demands is not None:
            raise UnsupportedError(
                f"adjoint='backsolve' can't take method {method.name!r} backwards, for the adjoint equation is no "
                f"{method.demands.__name__}: use adjoint='checkpoint' or 'backprop', or give adjoint_method="
            )
        if method.implicit and self.options.adjoint_method is None:
            raise UnsupportedError(
                f"adjoint='backsolve' would run {method.name!r} backwards, where the problem is not dissipative: use "
                "adjoint='checkpoint', or name an explicit adjoint_method="
            )
        if plan.controller.adaptive and method.error_order is None:
            raise ArgumentError(f"adjoint_method {method.name!r} has no error estimate to choose steps by")
        if not plan.controller.adaptive and method.variable_order:
            raise ArgumentError(f"adjoint_method {method.name!r} chooses its own steps: the solve has fixed ones")
        if self.options.adjoint_norm == "full" and not plan.layout.joint:
            raise UnsupportedError("adjoint_norm='full' needs joint mode: else each sample would need its own parameters")

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Trajectory, list[Tensor]]:
        plan = self.inputs.rebind(self.plan, self.inputs.detached(tensors))
        trajectory = drive(plan, tensors[0].detach(), slope=self.inputs.captured.slope)
        self.times, self.t_last = trajectory.t.detach(), trajectory.t_last
        return trajectory, []

    def backward(self, tensors, saved, values, last, needed) -> list[Tensor | None]:
        plan = self.inputs.rebind(self.plan, self.inputs.detached(tensors))
        # t reaches f as a number; the end points' share in dL/dt is added below.
        leaves = self.inputs.detached(tensors, [wanted and i != 1 for i, wanted in enumerate(needed)])
        parameters = [x for x in leaves[2:] if x.requires_grad]
        dynamics = _Dynamics(self.inputs.rebind(self.plan, leaves).field, parameters, leaves, self.inputs.captured.through)
        start, outputs = self._outputs(plan, saved, values, last)
        a, sums = self._solve(plan, dynamics, start, outputs)
        found = {id(x): total for x, total in zip(parameters, sums)}
        times = self._times(plan, dynamics, start, outputs, a, tensors[0].detach()) if needed[1] else None
        self.stats.backward = dynamics.stats
        if values is not None and self.plan.save.kind != "final":
            a = a + values[0]
        return [a, times, *(found.get(id(x)) for x in leaves[2:])]

    def _outputs(self, plan, saved, values, last) -> tuple[_Start, list[_Output]]:
        """The start, and the outputs strictly before it and after output 0."""
        layout, t_last = plan.layout, self.t_last
        states, y_last = (x.detach() for x in saved)
        given = [None] * len(states) if values is None else list(values.unbind(0))
        total = torch.zeros_like(y_last) if last is None else last
        if self.plan.save.kind == "final":
            return _Start(t_last, y_last, total if given[0] is None else total + given[0]), []
        times = self.times.tolist() if layout.joint else self.times.unbind(1)
        sign, outputs = plan.clock.sign, []
        for number, (t, y, cotangent) in enumerate(zip(times, states.unbind(0), given)):
            if number == 0:
                continue
            ends, before = t == t_last, sign * t < sign * t_last
            if cotangent is not None and layout.joint:
                total = total + cotangent if ends else total
            elif cotangent is not None:
                total = total + torch.where(layout.spread(ends), cotangent, 0.0)
            if not layout.joint:
                outputs.append(_Output(number, torch.where(before, t, torch.nan), y, cotangent))
            elif before:
                outputs.append(_Output(number, t, y, cotangent))
        return _Start(t_last, y_last, total), outputs

    def attached(self, plan, trajectory) -> Trajectory:
        """The end of a solve is a root of an event function: its time moves with the solution, the state along the slope."""
        layout, field = plan.layout, plan.field
        log, y = trajectory.events, trajectory.y_last
        t = torch.as_tensor(trajectory.t_last, dtype=torch.float64, device=layout.device)
        which = np.full(layout.batch, -1)
        for round_ in log.rounds:
            which[round_.samples] = round_.which[round_.samples]
        with torch.no_grad():
            slope = field(field.time(t), y.detach())
        numbers = [number for number in np.unique(which).tolist() if number >= 0]
        rates = {n: rate(plan.events, n, field, t, y, slope)[0] for n in numbers}
        moved = shifted(plan.events, field, which, rates, t, y)
        y = y + layout.spread(moved - t) * slope
        samples, rows = (torch.from_numpy(np.concatenate(x)).to(layout.device) for x in zip(*(r[4:] for r in log.rounds)))
        chunk = Chunk(moved.reshape(1), y[None], y[None]) if layout.joint else Chunk(moved[samples], y[rows], y[rows])
        values = y[None] if plan.save.kind == "final" else trajectory.values
        counts = {name: count + 1 if name.startswith("nfe") else count for name, count in trajectory.counts.items()}
        return trajectory._replace(values=values, y_last=y, events=log._replace(chunk=chunk), counts=counts)

    # -- the backward solve -------------------------------------------------------------------------------------------

    def _solve(self, plan, dynamics, start, outputs) -> tuple[Tensor, list[Tensor | None]]:
        """a at the start of the solve, without the cotangent of output 0, and the gradients of the parameters.

        Raises the error of the backward solve if that fails.
        """
        full = self.options.adjoint_norm == "full"
        state = (start.y, start.cotangent, *(torch.zeros_like(p) for p in dynamics.parameters if full))
        backward = self._plan(plan, dynamics.full if full else dynamics, state, start, outputs)
        if self.options.adapt is not None:
            backward = self.options.adapt(backward, dynamics.parameters)
        quadrature = None if full or not dynamics.parameters else _Quadrature(dynamics, backward)
        trajectory = drive(backward, backward.layout.flatten(state), quadrature)
        worst = Status(int(torch.as_tensor(trajectory.status).max()))
        if worst >= FIRST_FAILURE:
            raise ERRORS[worst](
                f"the backward solve of adjoint='backsolve' failed ({worst.name}): the problem may be unstable in that "
                "direction, use adjoint='checkpoint'"
            )
        for name, count in trajectory.counts.items():
            setattr(dynamics.stats, name, count + getattr(dynamics.stats, name))
        _, a, *sums = backward.layout.unflatten(trajectory.y_last)
        return a, sums if quadrature is None else quadrature.sums

    def _plan(self, plan, function, state, start, outputs) -> Plan:
        index = plan.layout.index
        layout = Layout(state, 0 if not plan.layout.joint and index is None else None, index)
        norm = self._norm(plan, layout)
        ends = [torch.as_tensor(t, dtype=torch.float64, device=layout.device) for t in (start.t, plan.clock.start)]
        times = Times(torch.stack(ends, -1), plan.times.step_t, plan.times.fixed)
        jumps = tuple(Jump(output.t, _arrival(output)) for output in outputs)
        clock = times.clock(layout, jumps)
        fixed = clock.fixed_dt
        dt0 = None if fixed is None else fixed.item() if layout.joint else fixed.clone()
        controller = plan.controller
        if controller.adaptive and self.method.controller != plan.method.controller:
            controller = CONTROLLERS[self.method.controller]
        return dataclasses.replace(
            plan,
            field=Field(function, layout, (), plan.field.time_dtype, norm),
            layout=layout,
            method=self.method,
            controller=controller,
            norm=norm,
            clock=clock,
            save=SaveAt("final"),
            jumps=jumps,
            dt0=dt0,
            observer=None,
            times=times,
            events=(),
        )

    def _norm(self, plan: Plan, layout: Layout) -> ErrorNorm:
        """That of the solve, of y and of a: the larger one."""
        own, custom = plan.layout, plan.norm.custom
        rest = len(layout.shapes) - 2

        def tolerance(chosen: Any, usual: Any) -> Any:
            if chosen is not None or not isinstance(usual, Tensor):
                return usual if chosen is None else chosen
            # Given per element it holds for y and for a; for parameters, the strictest.
            return (*(usual.broadcast_to(own.shape),) * 2, *(float(usual.min()),) * rest)

        def larger(tree: Any) -> Any:
            measure: Any = custom
            return torch.stack([torch.as_tensor(measure(own.unflatten(part))) for part in tree[:2]]).amax(0)

        rtol = tolerance(self.options.adjoint_rtol, plan.norm.rtol)
        atol = tolerance(self.options.adjoint_atol, plan.norm.atol)
        return ErrorNorm(layout, rtol, atol, None if custom is None else larger)

    # -- gradient to t ------------------------------------------------------------------------------------------------

    def _times(self, plan, dynamics, start, outputs, a, y0) -> Tensor:
        """dL/dt: the cotangent of each output times f there; at the start, where y is given, -a f.

        Inner steps of ``save="steps"`` count as constants, fixed ones too.
        """
        layout, t, clock = plan.layout, plan.times.t, plan.clock
        result = torch.zeros_like(t)

        def add(column: Any, time: Any, y: Tensor, cotangent: Tensor) -> None:
            if not layout.joint:
                good = torch.isfinite(time)
                time = torch.where(good, time, clock.start)
                y = torch.where(layout.spread(good), y, y0)
                cotangent = torch.where(layout.spread(good), cotangent, 0.0)
            slope = plan.field(plan.field.time(time), y)
            dynamics.stats.nfe += 1
            product = layout.sum((cotangent.conj() * slope).real)
            if layout.joint:
                result[column] += product
            else:
                result.scatter_add_(1, column.unsqueeze(1), product.to(result.dtype).unsqueeze(1))

        joint = layout.joint
        add(0 if joint else torch.zeros_like(clock.counts), clock.start, y0, -a)
        if not joint:
            # A sample that did not get to its end stopped at a time that is nobody's.
            add((clock.counts - 1).clamp(min=0), torch.where(start.t == clock.end, start.t, torch.nan), start.y, start.cotangent)
        elif start.t == clock.end:
            add(len(t) - 1, start.t, start.y, start.cotangent)
        for output in outputs if self.plan.save.kind == "t" else ():
            if output.cotangent is not None:
                number = output.number if joint else torch.full_like(clock.counts, output.number)
                add(number, output.t, output.y, output.cotangent)
        return result


def _arrival(output: _Output) -> Any:
    """What happens at an output on the way back: y is the stored one again, a takes up the cotangent."""

    def arrive(t: Tensor, state: Any) -> Any:
        a = state[1] if output.cotangent is None else state[1] + output.cotangent
        return (output.y, a, *state[2:])

    return arrive


class _Dynamics:
    """f as the backward solve needs it: d/dt (y, a) = (f, -(df/dy)^T a), as a function of (t, (y, a)).

    Args:
        field: f on the flat state, with arguments that can be differentiated for.
        parameters: tensors to differentiate for. known: all tensors that f is known to use.
        through: whether graphs that existed before must be kept.
    """

    def __init__(self, field: Field, parameters: list[Tensor], known: list[Tensor], through: bool) -> None:
        self.field, self.parameters, self.through = field, parameters, through
        self.strangers = Strangers(known, field.func)
        self.stats = Stats()

    def __call__(self, t: Tensor, state: Any) -> Any:
        f, (rate,) = self._pulled(t, state, ())
        return f, rate

    def full(self, t: Tensor, state: Any) -> Any:
        """The same with the rates of the parameters' gradients."""
        f, rates = self._pulled(t, state, self.parameters)
        return (f, *rates)

    def _pulled(self, t: Tensor, state: Any, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        with torch.enable_grad():
            y = state[0].detach().requires_grad_()
            f = self.field(t, y)
        self.strangers.refuse([f], [y])
        self.stats.nvjp += 1
        wanted = (y, *parameters)
        found = self.pull([f], wanted, [state[1]])
        return f.detach(), [torch.zeros_like(x) if g is None else g.neg() for x, g in zip(wanted, found)]

    def pull(self, roots: list[Tensor], wanted: Sequence[Tensor], cotangents: list[Tensor]) -> Sequence[Tensor | None]:
        pairs = [(x, c) for x, c in zip(roots, cotangents) if x.requires_grad]
        if not pairs:
            return [None] * len(wanted)
        roots, cotangents = map(list, zip(*pairs))
        return torch.autograd.grad(roots, wanted, cotangents, allow_unused=True, retain_graph=self.through)


class _Quadrature:
    """Sums up int a^T df/dp dt over the accepted steps of the backward solve, by Gauss's rule in each; a tape for ``drive``."""

    dense = True

    def __init__(self, dynamics: _Dynamics, plan: Plan) -> None:
        self.dynamics, self.plan, self.layout = dynamics, plan, plan.layout
        nodes, weights = _gauss((plan.method.order + 1) // 2)
        self.weights = weights
        self.nodes = torch.tensor(nodes, dtype=torch.float64, device=plan.layout.device)
        self.sums: list[Tensor | None] = [None] * len(dynamics.parameters)

    def __call__(self, record: Record) -> None:
        layout, dynamics = self.layout, self.dynamics
        theta = self.nodes if layout.joint else self.nodes.unsqueeze(1).expand(-1, layout.batch)
        points = self.plan.method.interpolate(record.dense, theta)
        h = record.t1 - record.t
        if not layout.joint:
            h = torch.where(record.accept, h, 0.0)
            # What a rejected step has met must not reach f: 0 times a NaN is one.
            points = torch.where(layout.spread(record.accept), points, record.y)  # type: ignore[arg-type]
        y, a, *_ = layout.unflatten(points)
        roots, cotangents = [], []
        for i, weight in enumerate(self.weights):
            with torch.enable_grad():
                roots.append(dynamics.field(dynamics.field.time(record.t + float(self.nodes[i]) * h), y[i]))
            cotangents.append(a[i] * layout.spread(-weight * h))
        dynamics.stats.nfe += len(roots)
        dynamics.stats.nvjp += len(roots)
        for i, found in enumerate(dynamics.pull(roots, dynamics.parameters, cotangents)):
            total = self.sums[i]
            if found is not None:
                self.sums[i] = found if total is None else total + found


@cache
def _gauss(count: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Nodes in (0, 1) and weights of Gauss's rule, exact for polynomials of degree 2 ``count`` - 1."""
    nodes, weights = np.polynomial.legendre.leggauss(max(count, 1))
    return tuple((0.5 * (nodes + 1.0)).tolist()), tuple((0.5 * weights).tolist())
