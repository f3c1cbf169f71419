"""One node in autograd's graph for a whole solve: what every adjoint that hides its steps from autograd shares."""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..events import Chunk
from ..layout import transforms_active
from ..loop import Plan, Trajectory, drive
from ..saveat import SaveAt
from ..status import UnsupportedError
from . import capture


class Inputs:
    """Everything that a solve can be differentiated for, as one flat list of tensors.

    ``tensors``: y0 (flat), t, differentiable times of jumps, differentiable tensors in ``args``, captured tensors.
    """

    def __init__(self, plan: Plan, y0: Tensor, captured: capture.Captured) -> None:
        self.captured = captured
        self._jump_times = [jump.t for jump in plan.jumps]
        self._leaves, self._spec = pytree.tree_flatten(plan.field.args)
        self._jump_slots = _differentiable(self._jump_times)
        self._slots = _differentiable(self._leaves)
        self.tensors: list[Tensor] = [y0, plan.times.t]  # type: ignore[union-attr]
        self.tensors += [self._jump_times[i] for i in self._jump_slots]
        self.tensors += [self._leaves[i] for i in self._slots]
        self._first_captured = len(self.tensors)
        self.tensors += captured.tensors

    def detached(self, tensors: Sequence[Tensor], needed: Sequence[bool] | None = None) -> list[Tensor]:
        """Fresh leaves with the values of ``tensors`` that require a gradient where ``needed``; captured tensors stay
        themselves, for f will use them whatever it is given."""
        fresh = [x.detach() for x in tensors[: self._first_captured]]
        if needed is not None:
            for leaf, wanted in zip(fresh, needed):
                leaf.requires_grad_(wanted)
        return fresh + list(tensors[self._first_captured :])

    def rebind(self, plan: Plan, tensors: Sequence[Tensor]) -> Plan:
        """``plan`` on the times and arguments in ``tensors``."""
        rest = iter(tensors[2:])
        jump_times, leaves = list(self._jump_times), list(self._leaves)
        for values, slots in ((jump_times, self._jump_slots), (leaves, self._slots)):
            for i in slots:
                values[i] = next(rest)
        return plan.rebind(tensors[1], pytree.tree_unflatten(leaves, self._spec), tuple(jump_times))


def _differentiable(values: list[Any]) -> list[int]:
    return [i for i, x in enumerate(values) if isinstance(x, Tensor) and x.requires_grad]


class Sweep(ABC):
    """A solve in both directions. Lives as long as its node in the graph.

    ``values`` of the trajectory are flat: a function to be saved is applied outside, by :func:`solve_whole`.
    """

    name: ClassVar[str]

    def __init__(self, plan: Plan, inputs: Inputs, stats: Any) -> None:
        self.plan, self.inputs, self.stats = plan, inputs, stats
        self.result: Trajectory | None = None
        # Cotangents of the parts of the chunk of events, where there were any.
        self.of_events: Sequence[Tensor | None] = ()

    @abstractmethod
    def forward(self, tensors: Sequence[Tensor]) -> tuple[Trajectory, list[Tensor]]:
        """The trajectory, and tensors that ``backward`` will need (the graph owns and frees them)."""

    @abstractmethod
    def backward(
        self,
        tensors: Sequence[Tensor],
        saved: Sequence[Tensor],
        values: Tensor | None,
        last: Tensor | None,
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """Cotangents of ``tensors`` from those of the trajectory's ``values`` and ``y_last``, and from ``of_events``."""

    def attached(self, plan: Plan, trajectory: Trajectory) -> Trajectory:
        """The trajectory of the node, with gradients that do not come from the node."""
        return trajectory


def solve_whole(
    sweep: type[Sweep], plan: Plan, y0: Tensor, stats: Any, more: Sequence[Tensor] = (), **options: Any
) -> Trajectory:
    """Run ``plan`` as one node; without anything to differentiate for, just run it.

    ``more``: tensors to differentiate for whether or not f is found to use them.

    Raises ``UnsupportedError`` under a torch.func transform and for dense output that would need a gradient.
    """
    if not torch.is_grad_enabled():
        return drive(plan, y0)
    if transforms_active():
        raise UnsupportedError(f"torch.func transforms need adjoint='backprop', found {sweep.name!r}")
    field = copy.copy(plan.field)
    field.func = capture.Given(field.func)
    plan = dataclasses.replace(plan, field=field)
    captured = capture.find(plan, y0)
    known = {id(x) for x in captured.tensors}
    captured = captured._replace(tensors=captured.tensors + tuple(x for x in more if id(x) not in known))
    inputs = Inputs(plan, y0, captured)
    if not any(x.requires_grad for x in inputs.tensors):
        return _counted(drive(plan, y0, slope=captured.slope), captured.work)
    if plan.dense:
        raise UnsupportedError(
            f"adjoint={sweep.name!r} does not differentiate dense output: use adjoint='backprop', or solve under no_grad"
        )
    bare = dataclasses.replace(plan, save=SaveAt(plan.save.kind))
    job = sweep(bare, inputs, stats, **options)
    values, last, *chunk = _Whole.apply(job, *inputs.tensors)
    trajectory, job.result = job.result, None
    trajectory = _counted(trajectory._replace(values=values, y_last=last), captured.work)  # type: ignore[union-attr]
    if chunk:
        trajectory = trajectory._replace(events=trajectory.events._replace(chunk=Chunk(*chunk)))  # type: ignore[union-attr]
        trajectory = job.attached(bare, trajectory)
    return trajectory if plan.save.fn is None else trajectory._replace(values=_apply_save(plan, trajectory))


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, job: Sweep, *tensors: Tensor) -> tuple[Tensor, ...]:
        trajectory, saved = job.forward(tensors)
        # No output may share memory with another one or with an input.
        values = trajectory.values.clone() if len(trajectory.values) == 1 else trajectory.values
        job.result = trajectory._replace(values=None, y_last=None)  # type: ignore[arg-type]
        ctx.job, ctx.count = job, len(tensors)
        device = values.device.type
        ctx.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        ctx.set_materialize_grads(False)
        last = trajectory.y_last.detach().clone()
        ctx.save_for_backward(*tensors, *saved, values, last)
        return (values, last) if trajectory.events is None else (values, last, *trajectory.events.chunk)

    @staticmethod
    def backward(ctx: Any, values: Tensor | None, last: Tensor | None, *events: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        needed = ctx.needs_input_grad[1:]
        enabled, dtype = ctx.autocast
        again = torch.is_grad_enabled()
        # f runs as it ran in the forward pass; casts cached there must not be met here, they carry no gradient.
        with torch.no_grad(), torch.autocast(tensors[0].device.type, dtype, enabled, cache_enabled=False):
            ctx.job.of_events = events
            found = ctx.job.backward(tensors, saved, values, last, needed)
            ctx.job.of_events = ()
        if again:
            cause = [x for x in (*tensors, values, last, *events) if x is not None and x.requires_grad]
            present = [g for g in found if g is not None]
            marked = iter(_Once.apply(ctx.job.name, len(present), *present, *cause))
            found = [None if g is None else next(marked) for g in found]
        return (None, *found)


class _Once(torch.autograd.Function):
    """Hands gradients on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(x.clone() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise UnsupportedError(
            f"adjoint={ctx.name!r} has no second derivative: use adjoint='backprop', which can be differentiated again"
        )


def _counted(trajectory: Trajectory, work: int) -> Trajectory:
    counts = dict(trajectory.counts)
    for name in ("nfe", "nfe_per_sample"):
        counts[name] = counts[name] + work
    return trajectory._replace(counts=counts)


def _apply_save(plan: Plan, trajectory: Trajectory) -> Any:
    """A tree of ``(T, ...)``: ``save.fn`` at every output that was reached, NaN at the others."""
    layout, save, times = plan.layout, plan.save, _output_times(plan, trajectory)
    at = times.detach()
    end = _travelled(plan, trajectory.t_last)
    known = torch.isfinite(at) & (_travelled(plan, at) <= (end if layout.joint else end.unsqueeze(1)))
    trees = []
    for i, y in enumerate(trajectory.values.unbind(0)):
        if layout.joint and not known[i]:
            continue
        time = times[..., i]
        if not layout.joint:
            # fn must not see the NaN of what was not reached: its gradient would be NaN for all.
            y = torch.where(layout.per_row(known[:, i]).unsqueeze(-1), y, trajectory.y_last.detach())
            time = torch.where(known[:, i], time, trajectory.t_last)
        trees.append(save.fn(time.to(save.time_dtype), layout.unflatten(y)))  # type: ignore[misc]
    return pytree.tree_map(lambda *x: _stack(layout, list(x), known), *trees)


def _output_times(plan: Plan, trajectory: Trajectory) -> Tensor:
    """Times of the outputs, ``(T,)`` or ``(B, T)``; those that are the user's carry their gradient."""
    t, found, kind = plan.times.t, trajectory.t, plan.save.kind  # type: ignore[union-attr]
    if kind == "t":
        return t
    if plan.layout.joint:
        last = t[-1:] if trajectory.t_last == plan.clock.end else found[-1:]
    else:
        clock: Any = plan.clock
        last = t.gather(1, (clock.counts - 1).clamp(min=0).unsqueeze(1))
        last = torch.where((trajectory.t_last == clock.end).unsqueeze(1), last, found[:, -1:])
    if kind == "final":
        return last
    if not plan.layout.joint:
        return torch.cat([t[:, :1], found[:, 1:]], 1)
    return torch.cat([t[:1], found[1:-1], last]) if len(found) > 1 else t[:1]


def _travelled(plan: Plan, t: Any) -> Any:
    sign: Any = plan.clock.sign
    return t * (sign.unsqueeze(1) if isinstance(t, Tensor) and t.dim() == 2 else sign)


def _stack(layout: Any, values: list[Tensor], known: Tensor) -> Tensor:
    fill = torch.nan if values[0].is_floating_point() or values[0].is_complex() else 0
    result = torch.stack(values)
    if layout.joint:
        missing = result.new_full((len(known) - len(values), *result.shape[1:]), fill)
        return torch.cat([result, missing]) if len(missing) else result
    mask = layout.per_row(known.T) if result.shape[1] == layout.rows else known.T
    return torch.where(mask.reshape(mask.shape + (1,) * (result.dim() - 2)), result, fill)
