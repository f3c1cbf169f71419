"""The exact gradient of the discrete solution from recorded steps: each is taken again, under autograd, going backwards.

What the forward pass keeps is the state before each step (or, with ``checkpoints=k``, k of them) and a few numbers per step.
The backward pass evaluates f and its vector-Jacobian product as often as the accepted steps did, and for steps that have
to be reached from a checkpoint f again, each time that they are passed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..control import JointClock
from ..events import carry_out
from ..loop import Plan, Record, Trajectory, after_jump, apply_jumps, between_jumps, drive
from ..saveat import Segment, joint_values, row_values
from ..solution import Stats
from ..status import ArgumentError, Status
from .base import ADJOINTS, Adjoint
from .capture import Strangers
from .whole import Sweep, solve_whole


@dataclass(frozen=True)
class Checkpoint(Adjoint):
    """The gradient of ``backprop`` to rounding, in the memory of one step and one state for each accepted step.

    f must be deterministic. Not differentiable again: asking for that raises ``UnsupportedError``.

    Args:
        checkpoints: keep at most this many states (of multistep methods: with their histories), in the backward pass
            twice as many, and reach the others by repeating steps; the gradient is the same to rounding. None: keep all.
    """

    _: KW_ONLY
    checkpoints: int | None = None

    def __post_init__(self) -> None:
        k = self.checkpoints
        if k is not None and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
            raise ArgumentError(f"checkpoints must be None or an integer >= 1, found {k!r}")

    def run(self, plan: Plan, y0: Tensor, stats: Any) -> Trajectory:
        return solve_whole(Discrete, plan, y0, stats, limit=self.checkpoints)


ADJOINTS.register("checkpoint", Checkpoint())


# -- the forward pass -------------------------------------------------------------------------------------------------


BLOCK = 1 << 20
"""Bytes of a block of states."""


class Point(NamedTuple):
    """Where a step starts: the flat state, and the method's, or None if that can be made from y."""

    y: Tensor
    state: Any


class Tape:
    """Records of the accepted steps, in order, and the points before some of them.

    Keeps every ``stride``-th point; where they would become more than ``limit``, the stride doubles.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.stride = 1
        self.records: list[Record] = []
        self.orders: list[Any] = []
        self.points: dict[int, Any] = {}
        self._block: Any = ()
        self._used = 0

    def __call__(self, record: Record) -> None:
        number = len(self.records)
        while self.limit is not None and number % self.stride == 0 and len(self.points) == self.limit:
            self.stride *= 2
            self.points = {i: point for i, point in self.points.items() if i % self.stride == 0}
        if number % self.stride == 0:
            self.points[number] = Point(self._stored(record), record.state)
        # The controller chooses the order, so that repeating the steps does not bring it back.
        self.orders.append(getattr(record.state, "order", None))
        self.records.append(record._replace(y=None, state=None))

    def _stored(self, record: Record) -> Tensor:
        """The state before the step; small ones that are all kept are copied into blocks.

        Left where they are, each would hold its place among what the solve allocates and frees, and nearly double what the
        process takes.
        """
        y: Any = record.y
        size = y.numel() * y.element_size()
        if self.limit is not None or record.state is not None or not 4096 <= size <= BLOCK // 4:
            return y
        if self._used == len(self._block):
            self._block, self._used = y.new_empty((BLOCK // size, *y.shape)), 0
        self._used += 1
        return self._block[self._used - 1].copy_(y)

    def pack(self) -> list[Tensor]:
        """Take the tensors out of the points, for the graph to keep."""
        tensors: list[Tensor] = []
        self._block = ()
        for number, point in self.points.items():
            leaves, spec = pytree.tree_flatten(tuple(point))
            tensors += [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            self.points[number] = ([_TAKEN if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        return tensors

    def unpack(self, tensors: Sequence[Tensor]) -> dict[int, Point]:
        """The points with the tensors that were taken out of them."""
        rest = iter(tensors)
        points = {}
        for number, (leaves, spec) in self.points.items():
            leaves = [next(rest) if leaf is _TAKEN else leaf for leaf in leaves]
            points[number] = Point(*pytree.tree_unflatten(leaves, spec))
        return points


_TAKEN: Any = object()


class Discrete(Sweep):
    name: ClassVar[str] = "checkpoint"

    def __init__(self, *arguments: Any, limit: int | None) -> None:
        super().__init__(*arguments)
        self.tape = Tape(limit)

    def forward(self, tensors: Sequence[Tensor]) -> tuple[Trajectory, list[Tensor]]:
        plan = self.inputs.rebind(self.plan, self.inputs.detached(tensors))
        if not plan.method.one_step:
            # The lengths of past steps are part of the state, and have to be tensors where they carry a gradient.
            plan.clock.differentiable = self.plan.clock.differentiable
        trajectory = drive(plan, tensors[0].detach(), self.tape, self.inputs.captured.slope)
        if not plan.layout.joint:
            self.taken = trajectory.counts["accepted"] + 1
            self.reached = trajectory.status == Status.SUCCESS
            if plan.events:
                # Of those that ended early some may have done so at their last output.
                self.reached = self.reached | (trajectory.t_last == plan.clock.end)
        return trajectory, self.tape.pack()

    def backward(self, tensors, saved, values, last, needed) -> list[Tensor | None]:
        points = self.tape.unpack(saved[:-2])
        replay = (_JointReplay if self.plan.layout.joint else _RowReplay)(self, tensors, needed, values)
        replay.start(last)
        _Schedule(replay, points, self.tape.limit).run(len(self.tape.records))
        self.stats.backward = replay.stats
        return replay.finish()


# -- the order in which points are reached ----------------------------------------------------------------------------


class _Schedule:
    """Visits the steps from the last to the first with at most ``limit`` points in memory beside those of the tape."""

    def __init__(self, replay: _Replay, points: dict[int, Point], limit: int | None) -> None:
        self.replay, self.points, self.limit = replay, points, limit

    def run(self, steps: int) -> None:
        end = steps
        while self.points:
            start, point = self.points.popitem()
            # The graph holds the tape's points until the end, for it may be asked to keep them: these come on top.
            self._back(start, end, point, self.limit or 0)
            end = start

    def _back(self, start: int, end: int, point: Point, free: int) -> None:
        """Replay the steps end-1 .. start, of which ``point`` is the first, with ``free`` places for others."""
        if end - start == 1:
            self.replay.step(start, point)
        elif free >= end - start - 1:
            points = [point]
            for number in range(start, end - 1):
                points.append(self.replay.advance(number, number + 1, points[-1]))
            for number in reversed(range(start, end)):
                self.replay.step(number, points.pop())
        elif free == 0:
            for number in reversed(range(start, end)):
                self.replay.step(number, self.replay.advance(start, number, point))
        else:
            middle = (start + end) // 2
            self._back(middle, end, self.replay.advance(start, middle, point), free - 1)
            self._back(start, middle, point, free)


# -- one step ---------------------------------------------------------------------------------------------------------


class _Sums:
    """Running sums of cotangents, one for each of some tensors."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[Tensor, bool]] = {}

    def add(self, x: Tensor, cotangent: Tensor | None) -> None:
        if cotangent is None:
            return
        known = self._sums.get(id(x))
        if known is None:
            # May share memory with what autograd goes on working with: not ours to add to.
            self._sums[id(x)] = (cotangent, False)
        elif known[1]:
            known[0].add_(cotangent)
        else:
            self._sums[id(x)] = (known[0] + cotangent, True)

    def get(self, x: Tensor) -> Tensor | None:
        return self._sums.get(id(x), (None, False))[0]


class _Cut:
    """Times in a clock, made leaves: the graph from the user's t to them is passed through once, at the end.

    ``own``: 0-dim or ``(B,)`` tensors of the clock that are functions of t, with the leaves that stand for them.
    """

    def __init__(self, clock: Any) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.clock = clock
        if not clock.differentiable:
            return
        self.first = clock.first()
        clock.cut(self._leaf)

    def _leaf(self, x: Tensor | None) -> Tensor | None:
        if x is None or not x.requires_grad:
            return x
        self.pairs.append((x, x.detach().requires_grad_()))
        return self.pairs[-1][1]

    def leaves(self, record: Record) -> list[Tensor]:
        """Those that the step may depend on."""
        clock = self.clock
        found = [clock.source, clock.fixed_dt]
        found.append(clock.stops[record.stop].source if isinstance(clock, JointClock) else clock.stop_source)
        return [x for x in found if x is not None and x.requires_grad]

    def finish(self, sums: _Sums, start: Tensor | None, tensors: list[Tensor]) -> None:
        """Carry the sums for the leaves, and ``start`` for the first node, on to those ``tensors`` that require it."""
        pairs = [(own, sums.get(leaf)) for own, leaf in self.pairs] + [(self.first, start)]
        pairs = [(own, sum_) for own, sum_ in pairs if sum_ is not None and own.requires_grad]
        wanted = [x for x in tensors if x.requires_grad]
        if pairs and wanted:
            roots, cotangents = zip(*pairs)
            for x, found in zip(wanted, torch.autograd.grad(roots, wanted, cotangents, allow_unused=True)):
                sums.add(x, found)


class _Replay:
    """Carries the cotangents of y, of the method's state and of the node from each step to the one before."""

    def __init__(self, sweep: Discrete, tensors: Sequence[Tensor], needed: Sequence[bool], values: Tensor | None) -> None:
        self.sweep, self.layout = sweep, sweep.plan.layout
        self.events = _Cotangents(sweep.of_events, sweep.tape.records)
        self.values: Any = values
        self.records, self.orders = sweep.tape.records, sweep.tape.orders
        inputs = sweep.inputs
        self.inputs = inputs.detached(tensors, needed)
        with torch.enable_grad():
            self.plan = inputs.rebind(sweep.plan, self.inputs)
            self.clock: Any = self.plan.clock
            self.cut = _Cut(self.clock)
        self.graph = self.clock.differentiable
        # t is met through the clock only.
        self.constants = [x for x in self.inputs[2:] if x.requires_grad]
        self.strangers = Strangers(self.inputs, self.plan.field.func)
        self.sums = _Sums()
        self.stats = Stats()
        self.y: Any = None
        self.state: list[Tensor | None] = []
        self.node: Tensor | None = None

    # What the two modes do differently.

    def start(self, last: Tensor | None) -> None:
        """Cotangent of the end."""
        raise NotImplementedError

    def forward(self, record: Record, lo: Any, point: Point, interior: bool) -> tuple[Tensor, Any, Any, Segment, int, Any]:
        """The step: (y, state, node) after it, its segment for outputs, the calls of f it took, and a chunk of events."""
        raise NotImplementedError

    def outputs(self, number: int, segment: Segment) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Saved values in a step, and their cotangents."""
        raise NotImplementedError

    def interior(self, record: Record) -> bool:
        """Whether outputs lie inside the step."""
        raise NotImplementedError

    def again(self, record: Record, lo: Any, y: Tensor, state: Any, graph: bool) -> tuple[Tensor, Any, int]:
        """The step without a gradient, as the loop took it: (y, state) after it, and the calls of f that took."""
        raise NotImplementedError

    def first(self) -> Tensor | None:
        """Cotangent of output 0, which is y0, as all outputs of an empty interval are."""
        if self.values is None or self.plan.save.kind == "final":
            return None
        empty = self.layout.joint and self.clock.start == self.clock.end
        return self.values.sum(0) if empty else self.values[0]

    # What they share.

    def skip(self, number: int) -> bool:
        return False

    def step(self, number: int, point: Point) -> None:
        """Take step ``number`` again from ``point``, and its cotangents back to there."""
        if self.skip(number):
            return
        record = self.records[number]
        with torch.enable_grad():
            y = point.y.detach().requires_grad_()
            state, leaves = self._fresh(point.state)
            lo = self._node(record).requires_grad_() if self.graph else record.t
            interior = record.events is not None or (self.values is not None and self.interior(record))
            y1, state1, end, segment, work, chunk = self.forward(record, lo, Point(y, state), interior)
            outputs = zip(*self.outputs(number, segment)) if self.values is not None else ()
            events = zip(chunk, self.events.of(number)) if chunk is not None else ()
            pairs = [*outputs, *events]
        self.stats.nfe += work
        self.stats.nvjp += work
        self._pull(record, y, leaves, lo, (y1, _tensors(state1), end), pairs)

    def _fresh(self, state: Any) -> tuple[Any, list[Tensor]]:
        """A method's state with leaves of its own, and those to differentiate for."""
        if state is None:
            return None, []
        found: list[Tensor] = []

        def renew(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                # Workspaces must not keep this replay's graph alive, nor be written to by it.
                return copy.copy(leaf)
            leaf = leaf.detach()
            if leaf.is_floating_point() or leaf.is_complex():
                found.append(leaf)
                leaf.requires_grad_(self.graph or leaf.dim() == len(self.layout.shape))
            return leaf

        return pytree.tree_map(renew, state), found

    def _pull(self, record, y, leaves, lo, after, pairs) -> None:
        y1, state1, end = after
        pairs = [(y1, self.y), *pairs, *zip(state1, self.state)]
        if self.graph and isinstance(end, Tensor):
            pairs.append((end, self.node))
        pairs = [(x, c) for x, c in pairs if c is not None and x.requires_grad]
        sources = [y, *self.constants, *(x for x in leaves if x.requires_grad)]
        nodes = [lo, *self.cut.leaves(record)] if self.graph else []
        self.strangers.refuse([x for x, _ in pairs], sources + nodes)
        if not pairs:
            self.y, self.state, self.node = None, [None] * len(leaves), None
            return
        roots, given = zip(*pairs)
        found = torch.autograd.grad(
            roots, sources + nodes, given, allow_unused=True, retain_graph=self.sweep.inputs.captured.through
        )
        self.y = found[0]
        for x, cotangent in zip(self.constants, found[1:]):
            self.sums.add(x, cotangent)
        rest = iter(found[1 + len(self.constants) :])
        self.state = [next(rest) if x.requires_grad else None for x in leaves]
        self.node = next(rest) if self.graph else None
        for x, cotangent in zip(nodes[1:], rest):
            self.sums.add(x, cotangent)

    def advance(self, start: int, end: int, point: Point) -> Point:
        """The point before step ``end``, from that before step ``start``."""
        y, state = point
        if state is not None:
            state = self._fresh(state)[0]
        stored = state is not None
        for number in range(start, end):
            record = self.records[number]
            # As the forward pass did: past steps are tensors only where they are part of a state.
            lo = self._node(record) if stored and self.graph else record.t
            if state is None:
                state, calls = self.restarted(record, lo, y, record.after)
                self.stats.nfe += calls
            if not self.skip(number):
                y, state, work = self.again(record, lo, y, state, stored and self.graph)
                self.stats.nfe += work
            if stored and self.orders[number + 1] is not None:
                state = state._replace(order=self.orders[number + 1])
        return Point(y, state if stored else None)

    def _node(self, record: Record) -> Tensor:
        return torch.as_tensor(record.t, dtype=torch.float64, device=self.layout.device).detach().clone()

    def field(self, record: Record) -> Any:
        """f as the step met it."""
        if not self.plan.jumps or not (record.jumps or record.events is not None or record.after is not False):
            return self.plan.field
        self.clock.next = record.stop
        return between_jumps(self.plan, record.t, record.t1, record.hit, record.after)

    def bounds(self, record: Record, lo: Any, graph: bool) -> tuple[Any, Any]:
        """(dt, end) of a step."""
        if not graph:
            return record.h, record.t1
        self.clock.next = record.stop
        return self.clock.graph(lo, record.t1, record.h, record.hit)

    def _step(self, record: Record, lo: Any, dt: Any, y: Tensor, state: Any, active: Any) -> tuple[Any, Any, int]:
        """The step as the loop took it, its interpolant (good if it has events), and the calls of f."""
        field, method = self.field(record), self.plan.method
        out = method.step(field, lo, dt, y, state, active)
        if record.events is None:
            return out, None, out.work
        dense, calls = method.prepare(field, out.dense)
        return out, _interpolant(self.plan, out._replace(dense=dense)), out.work + calls

    def restarted(self, record: Record, t: Any, y: Tensor, after: Any) -> tuple[Any, int]:
        """The method's state for a new start at ``t``, ``after`` a jump or not, and the calls of f that took."""
        field = after_jump(self.plan, t.detach() if isinstance(t, Tensor) else t, after)
        f0 = field(field.time(t), y)
        return self.plan.method.init(self.plan.field, t, record.h, y, f0), 1

    def _begin(self) -> None:
        """Take the cotangents of the method's first state, which may know f at the start, back to there."""
        if all(cotangent is None for cotangent in self.state):
            return
        record = self.records[0]
        with torch.enable_grad():
            y = self.inputs[0].detach().requires_grad_()
            lo = self._node(record).requires_grad_() if self.graph else record.t
            state, work = self.restarted(record, lo, y, False)
        self.stats.nfe, self.stats.nvjp = self.stats.nfe + work, self.stats.nvjp + work
        pairs = [(x, c) for x, c in zip(_tensors(state), self.state, strict=True) if c is not None and x.requires_grad]
        if not pairs:
            return
        roots, given = zip(*pairs)
        sources = [y, *self.constants, *([lo] if self.graph else [])]
        found = torch.autograd.grad(roots, sources, given, allow_unused=True, retain_graph=self.sweep.inputs.captured.through)
        self.y = _added(self.y, found[0])
        for x, cotangent in zip(self.constants, found[1:]):
            self.sums.add(x, cotangent)
        if self.graph:
            self.node = _added(self.node, found[-1])

    def finish(self) -> list[Tensor | None]:
        """Cotangents of all inputs."""
        self._begin()
        y = self.y
        first = self.first()
        if first is not None:
            y = first if y is None else y + first
        if self.graph:
            self.cut.finish(self.sums, self.node, self.inputs[1:])
        return [y, *(self.sums.get(x) if x.requires_grad else None for x in self.inputs[1:])]


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _interpolant(plan: Plan, out: Any) -> Any:
    return lambda theta, derivative=0: plan.method.interpolate(out.dense, theta, derivative)


class _Cotangents:
    """Cotangents of the parts of the chunk of a solve, step by step."""

    def __init__(self, given: Sequence[Tensor | None], records: Sequence[Record]) -> None:
        self.given = given
        self.places, times, rows = [], 0, 0
        for record in records if given else ():
            count = (0, 0) if record.events is None else record.events.sizes
            self.places.append((slice(times, times + count[0]), slice(rows, rows + count[1])))
            times, rows = times + count[0], rows + count[1]

    def of(self, number: int) -> list[Tensor | None]:
        """Those of step ``number``: of times, and states before and after."""
        time, rows = self.places[number]
        return [None if x is None else x[place] for x, place in zip(self.given, (time, rows, rows), strict=True)]


def _tensors(state: Any) -> list[Tensor]:
    leaves = [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point() or leaf.is_complex()]


class _JointReplay(_Replay):
    def start(self, last: Tensor | None) -> None:
        self.y = last
        if self.values is not None and self.plan.save.kind == "final":
            self.y = self.values[0] if last is None else last + self.values[0]

    def interior(self, record: Record) -> bool:
        first, inner, _ = self._pending(record) or (0, 0, 0)
        return inner > first

    def _pending(self, record: Record) -> Any:
        """Outputs (first, inner, last) of the step, as they are where t is differentiated for."""
        if record.outputs is None or not self.graph:
            return record.outputs
        first, inner, last = record.outputs
        self.clock.next = record.stop
        # At an event, as in the forward pass, an output is the state after it.
        cut = record.events is not None and record.events.cut[0]
        return first, inner if cut or self.clock.tied(record.hit) else last, last

    def forward(self, record, lo, point, interior):
        plan = self.plan
        dt, end = self.bounds(record, lo, self.graph)
        out = plan.method.replay(self.field(record), lo, dt, point.y, point.state, True, interior)
        interpolate = _interpolant(plan, out)
        h = dt if self.graph else record.t1 - record.t
        y, state, end, work, chunk = self._after(record, out, point.state is not None, interpolate, lo, h, end)
        return y, state, end, Segment(lo, h, record.t1, y, interpolate), out.work + work, chunk

    def _after(self, record, out, restart, interpolate, lo, h, end):
        """(y, state, node, calls of f, chunk) after the events and jumps of a step, the state renewed if ``restart``."""
        plan, found, chunk = self.plan, record.events, None
        y, state, calls, stops = out.y1, out.state, 0, bool(record.jumps)
        if found is not None:
            outcome = carry_out(plan.events, plan.field, found, interpolate, lo, h, y, end)
            y, chunk = outcome.y, outcome.chunk
            if found.cut[0]:
                end, stops = outcome.end if self.graph else float(found.t[0]), stops or found.code[0] < 0
        if record.jumps:
            y = apply_jumps(plan, record.jumps, end, y)
        if stops and restart:
            state, calls = self.restarted(record, end, y, bool(record.jumps))
        return y, state, end, calls, chunk

    def outputs(self, number, segment):
        pending = self._pending(self.records[number])
        if self.plan.save.kind == "steps":
            self._more(self.values[number + 1])
        if pending is None:
            return (), ()
        first, inner, last = pending
        if last > inner:
            self._more(self.values[inner])
        return joint_values(segment, self.clock, first, inner, inner), (self.values[first:inner],)

    def _more(self, cotangent: Tensor) -> None:
        self.y = cotangent if self.y is None else self.y + cotangent

    def again(self, record, lo, y, state, graph):
        dt, end = self.bounds(record, lo, graph)
        out, interpolate, work = self._step(record, lo, dt, y, state, True)
        h = dt if graph else record.t1 - record.t
        y, state, _, calls, _ = self._after(record, out, True, interpolate, lo, h, end)
        return y, state, work + calls


class _RowReplay(_Replay):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        moved = [record.accept.any() for record in self.records]
        self.moved = torch.stack(moved).tolist() if moved else []
        self.lanes = torch.arange(self.layout.rows, device=self.layout.device)
        self.taken = self.sweep.taken

    def skip(self, number: int) -> bool:
        return not self.moved[number]

    def start(self, last: Tensor | None) -> None:
        self.y = last
        if self.values is None or self.plan.save.kind == "steps":
            return
        if self.plan.save.kind == "final":
            own = self.values[0]
        else:
            number = self.clock.counts - 1
            own = self._gather(number.clamp(min=0).unsqueeze(0), (self.sweep.reached & (number > 0)).unsqueeze(0))[0]
        self.y = own if last is None else last + own

    def _gather(self, index: Tensor, valid: Tensor) -> Tensor:
        """Cotangents ``(n, R, M)`` of outputs ``index`` ``(n, B)``, 0 where not ``valid``."""
        values = self.values[self.layout.per_row(index).clamp(max=len(self.values) - 1), self.lanes]
        return torch.where(self.layout.per_row(valid).unsqueeze(-1), values, 0.0)

    def interior(self, record: Record) -> bool:
        # With a gradient to t, outputs at the end may need the interpolant too.
        return record.outputs[3] > 0 or (self.graph and record.outputs[2] > 0)

    def forward(self, record, lo, point, interior):
        plan, layout = self.plan, self.layout
        dt, end = self.bounds(record, lo, self.graph)
        # A rejected trial may have met a NaN: 0 times its derivative would be one too.
        dt = torch.where(record.accept, dt, 0.0)
        out = plan.method.replay(self.field(record), lo, dt, point.y, point.state, record.active, interior)
        end = torch.where(record.accept, end, lo)
        stored = point.state is not None
        y, state = layout.merge(record.accept, (out.y1, out.state if stored else ()), (point.y, point.state or ()))
        interpolate, tied, cut = _interpolant(plan, out), self.clock.tied(record.hit), None
        y, state, end, calls, chunk = self._after(record, y, state, stored, interpolate, lo, dt, end)
        if record.events is not None:
            cut = torch.from_numpy(record.events.cut).to(layout.device)
            tied = tied if tied is True else tied | cut
        return y, state, end, Segment(lo, dt, end.detach(), y, interpolate, tied, cut), out.work + calls, chunk

    def _after(self, record, y, state, restart, interpolate, lo, h, end):
        """(y, state, node, calls of f, chunk) after the events and jumps of a step, the state renewed if ``restart``."""
        plan, layout, found, chunk = self.plan, self.layout, record.events, None
        masks = list(record.jumps.values())
        if found is not None:
            outcome = carry_out(plan.events, plan.field, found, interpolate, lo, h, y, end)
            y, end, chunk = outcome.y, outcome.end, outcome.chunk
            going = found.cut & (found.code < 0)
            masks += [torch.from_numpy(going).to(layout.device)] if going.any() else []
        for number, mask in record.jumps.items():
            y = torch.where(layout.spread(mask), apply_jumps(plan, (number,), end, y), y)
        if not masks or not restart:
            return y, state, end, 0, chunk
        jumped = torch.stack(list(record.jumps.values())).any(0) if record.jumps else False
        new, calls = self.restarted(record, end, y, jumped)
        return y, layout.merge(torch.stack(masks).any(0), new, state), end, calls, chunk

    def outputs(self, number, segment):
        record = self.records[number]
        if self.plan.save.kind == "steps":
            self.taken = self.taken - record.accept.long()
            return (segment.y.unsqueeze(0),), (self._gather(self.taken.unsqueeze(0), record.accept.unsqueeze(0)),)
        done, count, most, _ = record.outputs
        if not most:
            return (), ()
        offset = torch.arange(most, device=self.layout.device).unsqueeze(1)
        values = row_values(segment, self.clock, self.layout, done + offset, self.interior(record))[1]
        return (values,), (self._gather(done + offset, offset < count),)

    def again(self, record, lo, y, state, graph):
        layout = self.layout
        dt, end = self.bounds(record, lo, graph)
        dt = torch.where(record.accept, dt, 0.0)
        out, interpolate, work = self._step(record, lo, dt, y, state, record.active)
        end = torch.where(record.accept, end, lo)
        y, state = layout.merge(record.accept, (out.y1, out.state), (y, state))
        y, state, _, calls, _ = self._after(record, y, state, True, interpolate, lo, dt, end)
        return y, state, work + calls
