"""What a solve keeps: the state at the user's times, at the end, at every step, or a function of (t, y) there.

Outputs are collected as blocks and put together once at the end; nothing is written into a slice under autograd, which
would make the backward pass quadratic in the number of outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .layout import carries_gradient

KINDS = ("t", "final", "steps")


class SaveAt(NamedTuple):
    """``kind``: "t", "final" or "steps". ``fn``: None, or ``(t, y) -> tree`` saved in place of y, ``t`` in ``time_dtype``."""

    kind: str = "t"
    fn: Callable[[Any, Any], Any] | None = None
    time_dtype: torch.dtype = torch.float64


class Segment(NamedTuple):
    """One step for the saver: ``lo`` and ``h`` carry gradients to t; ``y`` is the state after it (and after any jump).
    ``tied``: True, or ``(B,)``, whether an output at its end is that state, and not the interpolant's value there. ``cut``:
    None, or ``(B,)``, whether the step ends at ``t1`` because of an event, short of ``lo + h``."""

    lo: Any
    h: Any
    t1: Any
    y: Tensor
    interpolate: Callable[[Tensor], Tensor]
    tied: Any = True
    cut: Any = None


def joint_values(segment: Segment, clock: Any, first: int, inner: int, last: int) -> list[Tensor]:
    """Blocks ``(n, N)`` with outputs first..last-1 of a step, those from ``inner`` on at its end."""
    blocks = []
    if inner > first:
        blocks.append(segment.interpolate(clock.theta(first, inner, segment.lo, segment.h)))
    if last > inner:
        blocks.append(segment.y.unsqueeze(0))
    return blocks


class JointSaver:
    """Outputs of a joint solve."""

    def __init__(self, save: SaveAt, layout: Any, clock: Any) -> None:
        self.save, self.layout, self.clock = save, layout, clock
        self.done = 0
        self.total = len(clock.outputs)
        self.times: list[float] = []
        self.blocks: list[Any] = []

    def _keep(self, times: list[float], block: Tensor, first: int | None = None) -> None:
        """``first``: number of the output that the block starts with, None where the times are not the user's."""
        self.times += times
        if self.save.fn is None:
            self.blocks.append(block)
            return
        source, device = self.clock.source, self.layout.device
        for i, y in enumerate(block.unbind(0)):
            if first is not None and carries_gradient(source):
                time = source[first + i]
            else:
                time = torch.full((), times[i], dtype=torch.float64, device=device)
            self.blocks.append(self.save.fn(time.to(self.save.time_dtype), self.layout.unflatten(y)))

    def start(self, y: Tensor) -> None:
        # Without a step to take, the start is every output.
        self.done = self.total if self.save.kind == "t" and self.clock.start == self.clock.end else 1
        if self.save.kind != "final" or self.total == 1:
            self._keep(self.clock.outputs[: self.done], y.expand(self.done, *y.shape), 0)

    def pending(self, t1: float, tied: bool) -> tuple[int, int, int] | None:
        """Outputs (first, inner, last) of a step that ends at ``t1``, those from inner on at its end if ``tied`` to it;
        None if there are none."""
        if self.save.kind != "t":
            return None
        last = self.clock.reached(t1, self.done)
        if last == self.done:
            return None
        inner = last - 1 if tied and self.clock.outputs[last - 1] == t1 else last
        return self.done, inner, last

    def step(self, pending: tuple[int, int, int] | None, segment: Segment, ended: bool, early: bool = False) -> None:
        """Keep what the step holds; ``ended``: it is the last one, ``early``: at a time that is not the user's."""
        if pending is not None:
            first, inner, last = pending
            at = first
            for block in joint_values(segment, self.clock, first, inner, last):
                self._keep(self.clock.outputs[at : at + len(block)], block, at)
                at += len(block)
            self.done = last
        elif self.save.kind == "steps" or (self.save.kind == "final" and ended):
            self._keep([segment.t1], segment.y.unsqueeze(0), self.total - 1 if ended and not early else None)

    def finish(self, t: float, y: Tensor) -> tuple[Tensor, Any]:
        """(t ``(T,)``, y ``(T, N)`` or a tree of ``(T, ...)``); outputs that were not reached are NaN."""
        if self.save.kind == "final" and not self.blocks:
            self._keep([t], y.unsqueeze(0))
        missing = self.total - self.done if self.save.kind == "t" else 0
        own = self.save.kind == "t"
        # Copies: what is returned must not change with the caller's t or y0.
        times = self.clock.source.detach().clone() if own else torch.tensor(self.times, dtype=torch.float64, device=y.device)
        if self.save.fn is None:
            if missing:
                self.blocks.append(torch.full((missing, *y.shape), torch.nan, dtype=y.dtype, device=y.device))
            return times, self.blocks[0].clone() if len(self.blocks) == 1 else torch.cat(self.blocks)
        return times, pytree.tree_map(lambda *x: _stack(list(x), missing), *self.blocks)


def _stack(values: list[Tensor], missing: int) -> Tensor:
    return torch.stack(values + [_nan(tuple(values[0].shape), values[0])] * missing)


class RowSaver:
    """Outputs of a batched solve: at each step every sample has its own number of them."""

    def __init__(self, save: SaveAt, layout: Any, clock: Any) -> None:
        self.save, self.layout, self.clock = save, layout, clock
        self.grad = torch.is_grad_enabled()
        self.last = (clock.counts - 1).clamp(min=0)
        self.done = torch.ones_like(clock.counts)
        self.total = clock.source.shape[1] if save.kind == "t" else 1
        self.interior = (save.kind == "t" and self.total > 2) or (self.total == 2 and bool((clock.counts == 1).any()))
        self.lanes = torch.arange(layout.rows, device=layout.device)
        self.buffers: list[Tensor] | None = None
        self.pieces: list[tuple[Tensor, Tensor, list[Tensor]]] = []
        self.times: list[tuple[Tensor, Tensor, Tensor]] = []
        self.taken = torch.zeros_like(clock.counts)
        self.spec: Any = None

    # -- one step -----------------------------------------------------------------------------------------------------

    def start(self, t: Tensor, y: Tensor, alone: Tensor) -> None:
        """Row 0 of the output; ``alone``: samples whose start is also their end."""
        if self.save.kind == "final":
            return
        everyone = torch.ones_like(alone)
        first = self.clock.source[:, 0].unsqueeze(0)
        self._put(torch.zeros_like(self.done).unsqueeze(0), everyone.unsqueeze(0), self._values(first, y[None]))
        if self.save.kind == "steps":
            self.times.append((self.taken.clone(), everyone, t))
            self.taken = self.taken + 1

    def pending(self, accept: Tensor, t1: Tensor, tied: Any) -> tuple[Tensor, Tensor]:
        """Numbers of outputs in the step, and of those inside it, ``(B,)``; a sample's last one not counted. An output at
        the end counts as inside unless it is ``tied`` to it."""
        keys = (t1 * self.clock.sign).unsqueeze(1)
        reached = torch.searchsorted(self.clock.keys, keys, right=True).squeeze(1)
        inside = torch.searchsorted(self.clock.keys, keys, right=False).squeeze(1)
        if tied is not True:
            inside = torch.where(tied, inside, reached)
        count = torch.where(accept, torch.minimum(reached, self.last) - self.done, 0)
        return count, torch.where(accept, torch.minimum(inside, self.last) - self.done, 0)

    def indices(self, count: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Output numbers ``(n, B)`` of the step, and which of them exist."""
        r = torch.arange(most, device=count.device).unsqueeze(1)
        return self.done + r, r < count

    def step(self, count: Tensor, most: int, inner: int, segment: Segment) -> None:
        index, valid = self.indices(count, most)
        self._put(index, valid, self._values(*row_values(segment, self.clock, self.layout, index, inner)))
        self.done = self.done + count

    def step_end(self, accept: Tensor, segment: Segment) -> None:
        """Keep the end of a step (``save="steps"``)."""
        self._put(self.taken.unsqueeze(0), accept.unsqueeze(0), self._values(segment.t1.unsqueeze(0), segment.y[None]))
        self.times.append((self.taken, accept, segment.t1))
        self.taken = self.taken + accept

    def _values(self, times: Tensor, y: Tensor) -> list[Tensor]:
        """Leaves ``(n, rows, ...)`` of what is saved at ``times`` ``(n, B)`` for states ``y`` ``(n, R, M)``."""
        if self.save.fn is None:
            return [y]
        trees = [
            self.save.fn(t.to(self.save.time_dtype), self.layout.unflatten(x))
            for t, x in zip(times.unbind(0), y.unbind(0), strict=True)
        ]
        flat = [pytree.tree_flatten(tree) for tree in trees]
        self.spec = flat[0][1]
        return [torch.stack(leaves) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)]

    # -- storage ------------------------------------------------------------------------------------------------------

    def _put(self, index: Tensor, valid: Tensor, values: list[Tensor]) -> None:
        """``index``, ``valid``: ``(n, B)``."""
        if values[0].shape[1] == self.layout.rows:
            index, valid = self.layout.per_row(index), self.layout.per_row(valid)
        if self.grad or self.save.kind == "steps":
            which = valid.nonzero(as_tuple=True)
            self.pieces.append((index[which], which[1], [v[which] for v in values]))
            return
        if self.buffers is None:
            self.buffers = [_nan((self.total + 1, *v.shape[1:]), v) for v in values]
        # The extra slot takes what does not exist, so that nothing has to be counted on the host.
        slot = torch.where(valid, index, self.total)
        lanes = torch.arange(slot.shape[1], device=slot.device).expand_as(slot)
        for buffer, value in zip(self.buffers, values, strict=True):
            buffer.index_put_((slot, lanes), value)

    def finish(self, t: Tensor, y: Tensor, success: Tensor) -> tuple[Tensor, Any]:
        """(t, y ``(T, R, M)`` or a tree); what was not reached is NaN."""
        end = torch.where(success, self.clock.source.gather(1, self.last.unsqueeze(1)).squeeze(1), t).unsqueeze(0)
        if self.save.kind == "t":
            self._put(self.last.unsqueeze(0), (success & (self.last > 0)).unsqueeze(0), self._values(end, y[None]))
        elif self.save.kind == "final":
            everyone = torch.ones_like(success)
            self._put(torch.zeros_like(self.last).unsqueeze(0), everyone.unsqueeze(0), self._values(end, y[None]))
        total = self.total if self.save.kind != "steps" else int(self.taken.max())
        values = self._gather(total) if self.pieces else [b[:total] for b in self.buffers]  # type: ignore[union-attr]
        tree = values[0] if self.spec is None else pytree.tree_unflatten(values, self.spec)
        return self._output_times(t, total), tree

    def _gather(self, total: int) -> list[Tensor]:
        result = []
        index = torch.cat([p[0] for p in self.pieces])
        lane = torch.cat([p[1] for p in self.pieces])
        lanes = self.layout.rows if self.layout.index is None else None
        for k in range(len(self.pieces[0][2])):
            flat = torch.cat([p[2][k] for p in self.pieces])
            width = lanes or (self.layout.rows if self.spec is None else int(lane.max()) + 1)
            lookup = torch.full((total * width,), len(flat), dtype=torch.long, device=flat.device)
            lookup[index * width + lane] = torch.arange(len(flat), device=flat.device)
            padded = torch.cat([flat, _nan((1, *flat.shape[1:]), flat)])
            result.append(padded[lookup].view(total, width, *flat.shape[1:]))
        return result

    def _output_times(self, t: Tensor, total: int) -> Tensor:
        if self.save.kind == "t":
            return self.clock.source.detach().clone()
        if self.save.kind == "final":
            return t.unsqueeze(1)
        times = torch.full((len(t), total), torch.nan, dtype=torch.float64, device=t.device)
        for index, valid, value in self.times:
            times[valid, index[valid]] = value[valid]
        return times


def row_values(segment: Segment, clock: Any, layout: Any, index: Tensor, inner: int) -> tuple[Tensor, Tensor]:
    """Times ``(n, B)`` and states ``(n, R, M)`` of outputs ``index``; ``inner``: whether any lies inside the step."""
    times = clock.source.T.gather(0, index.clamp(max=clock.source.shape[1] - 1))
    # Never NaN, which would reach the gradient of a function of (t, y) through 0 * NaN.
    times = torch.where(index < clock.counts, times, segment.t1)
    if not inner:
        return times, segment.y.expand(len(index), *segment.y.shape)
    theta = clock.theta(index, segment.lo, segment.h)
    at_end = (theta.detach() == 1.0) & segment.tied
    if segment.cut is not None:
        at_end = at_end | ((times.detach() == segment.t1) & segment.cut)
    at_end = layout.per_row(at_end).unsqueeze(-1)
    return times, torch.where(at_end, segment.y, segment.interpolate(theta))


def _nan(shape: tuple[int, ...], like: Tensor) -> Tensor:
    fill = torch.nan if like.dtype.is_floating_point or like.dtype.is_complex else 0
    return torch.full(shape, fill, dtype=like.dtype, device=like.device)
