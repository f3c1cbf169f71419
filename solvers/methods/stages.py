"""Linear combinations of stages: y + dt sum_i w_i k_i, out of place under autograd, in one buffer without it."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

NARROW = 16
"""Columns of a batch below which broadcasting is worth avoiding."""


@functools.lru_cache(maxsize=4096)
def _terms(weights: tuple[float, ...]) -> tuple[tuple[int, float], ...]:
    """(stage, weight) of the weights that are not 0."""
    return tuple((i, w) for i, w in enumerate(weights) if w)


def combine(layout: Any, y: Tensor, dt: Any, weights: tuple[float, ...], stages: list[Tensor]) -> Tensor:
    """y + dt sum_i weights_i stages_i as a chain of additions; differentiable in everything, ``dt`` included."""
    if not isinstance(dt, Tensor):
        add = torch.add
        for i, weight in _terms(weights):
            y = add(y, stages[i], alpha=weight * dt)
        return y
    total = weighted_sum(weights, stages)
    return y if total is None else torch.addcmul(y, layout.spread(dt), total)


def weighted_sum(weights: tuple[float, ...], stages: list[Tensor]) -> Tensor | None:
    """sum_i weights_i stages_i, or None if all weights are 0."""
    total = None
    for i, weight in _terms(weights):
        total = stages[i] * weight if total is None else torch.add(total, stages[i], alpha=weight)
    return total


@functools.lru_cache(maxsize=1024)
def _array(weights: tuple[float, ...], dtype: Any) -> np.ndarray:
    return np.array(weights, dtype=dtype)


def _shaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``x`` itself where it has that shape: autograd would record even a change that is none."""
    return x if x.shape == shape else x.reshape(shape)


class ListStages:
    """Stages as separate tensors: what autograd and torch.func need.

    In joint mode they keep the user's shape, so that autograd records one change of shape per step, not two per stage.
    """

    scaled = False
    """Whether ``matrix`` holds dt k_i rather than k_i."""
    on_host = True
    """Whether ``ratio`` can measure the error by numpy."""

    def __init__(self, layout: Any) -> None:
        self.layout = layout
        self.k: list[Tensor] = []
        self.shape = layout.shapes[0] if layout.joint and layout.is_tensor and layout.same_dtype else layout.shape
        self._end: tuple[Any, Any] = (None, None)

    def start(self, k0: Any) -> None:
        self.k = [_shaped(k0, self.shape)]

    def rewind(self) -> None:
        """Forget all stages but the first."""
        self.k = self.k[:1]

    def evaluate(self, field: Any, t: Tensor, y: Tensor) -> Tensor:
        """Append the stage f(t, y); returns it in the form that ``start`` takes."""
        k = _shaped(field(t, y), self.shape)
        self.k.append(k)
        return k

    def sweep(self, field: Any, times: tuple[Tensor, ...], y: Tensor, dt: Any, rows: Any) -> tuple[Tensor, Tensor]:
        """Evaluate one stage for each of ``rows``; returns the last stage's argument and the last stage."""
        k, layout = self.k, self.layout
        f = field if layout.shape == self.shape else field.shaped
        # The next step starts from what this one returns: then it is known in the other shape.
        y = self._end[1] if self._end[0] is y else _shaped(y, self.shape)
        for row, t in zip(rows, times, strict=True):
            point = combine(layout, y, dt, row, k)
            k.append(f(t, point))
        self._end = (_shaped(point, layout.shape), point)
        return self._end[0], k[-1]

    def point(self, y: Tensor, dt: Any, weights: tuple[float, ...]) -> Tensor:
        return _shaped(combine(self.layout, _shaped(y, self.shape), dt, weights, self.k), self.layout.shape)

    @torch.no_grad()
    def error(self, dt: Any, weights: tuple[float, ...]) -> Tensor:
        """dt sum_i weights_i k_i, detached."""
        total = weighted_sum(weights, [k.detach() for k in self.k])
        if total is None:
            total = torch.zeros_like(self.k[0])
        return _shaped(total, self.layout.shape) * (self.layout.spread(dt.detach()) if isinstance(dt, Tensor) else dt)

    @torch.no_grad()
    def ratio(self, norm: Any, dt: float, weights: tuple[float, ...], y0: Tensor, y1: Tensor) -> float:
        """Norm of :meth:`error`, by numpy (where the norm is ``on_host``)."""
        count = len(weights)
        stages = torch.stack(self.k[:count]).view(count, -1).numpy()
        error = _array(weights, stages.dtype).dot(stages)
        return abs(dt) * norm.host_ratio(error, y0.detach().numpy(), y1.detach().numpy())

    def matrix(self) -> Tensor:
        """All stages, ``(s, *layout.shape)``."""
        return _shaped(torch.stack(self.k), (len(self.k), *self.layout.shape))

    def frozen(self) -> ListStages:
        """A copy that later steps do not change."""
        copy = ListStages(self.layout)
        copy.k = list(self.k)
        return copy


class Row:
    """Stands for a stage that still lies in its row of the buffer; a new object for every evaluation."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class BufferStages:
    """Stages as rows of one matrix, combined by one matrix-vector product each (under ``no_grad`` only).

    Copying what f returns also makes an f safe that answers in the same memory every time.
    """

    scaled = False
    on_host = False

    def __init__(self, layout: Any, rows: int) -> None:
        self.layout = layout
        self.buffer = torch.empty((rows, *layout.shape), dtype=layout.dtype, device=layout.device)
        flat = self.buffer.view(rows, -1)
        self._rows = self.buffer.unbind(0)
        # f writes its answer in the user's shape, which saves a view for every stage.
        self._slots: Any = [layout.unflatten(row) for row in self._rows] if layout.is_tensor and layout.same_dtype else None
        # Column-major (n, s): its product with a weight vector is what BLAS is fastest at.
        self._columns = [flat[:i].t() for i in range(rows + 1)]
        self._weights: dict[tuple[float, ...], Tensor] = {}
        self._nothing = torch.zeros((), dtype=layout.dtype, device=layout.device).expand(flat.shape[1])
        self._plan: tuple[Any, list[Any]] = (None, [])
        self.count = 0
        self.shape = layout.shape

    def start(self, k0: Tensor | Row) -> None:
        self._rows[0].copy_(self._rows[k0.index] if isinstance(k0, Row) else k0)
        self.count = 1

    def rewind(self) -> None:
        self.count = 1

    def evaluate(self, field: Any, t: Tensor, y: Tensor) -> Tensor | Row:
        row = self.count
        self.count += 1
        if self._slots is not None:
            field.into(t, y, self._slots[row])
        else:
            self._rows[row].copy_(field.raw(t, y))
        return Row(row)

    def sweep(self, field: Any, times: tuple[Tensor, ...], y: Tensor, dt: Any, rows: Any) -> tuple[Tensor, Tensor | Row]:
        """Evaluate one stage for each of ``rows``; returns the last stage's argument and the last stage."""
        if self._slots is None:
            for row, t in zip(rows, times, strict=True):
                point = self.point(y, dt, row)
                k = self.evaluate(field, t, point)
            return point, k
        # The same without a call per stage: this is the innermost loop of a small joint solve.
        if self._plan[0] is not rows:
            self._plan = (rows, [(self._columns[len(row)], self._vector(row), self._slots[len(row)]) for row in rows])
        func, args, shape, dtype = field.func, field.args, self._slots[0].shape, self._slots[0].dtype
        flat, addmv = self.layout.trivial, torch.addmv
        for (columns, vector, slot), t in zip(self._plan[1], times):
            point = addmv(y, columns, vector, alpha=dt)
            k = func(t, point if flat else point.view(shape), *args)
            if type(k) is Tensor and k.shape == shape and k.dtype == dtype:
                slot.copy_(k)
            else:
                slot.copy_(self.layout.flatten(k, "the value returned by f").view(shape))
        self.count = len(rows) + 1
        return point, Row(len(rows))

    def _vector(self, weights: tuple[float, ...]) -> Tensor:
        vector = self._weights.get(weights)
        if vector is None:
            vector = torch.tensor(weights, dtype=self.buffer.dtype, device=self.buffer.device)
            self._weights[weights] = vector
        return vector

    def point(self, y: Tensor, dt: Any, weights: tuple[float, ...]) -> Tensor:
        return torch.addmv(y, self._columns[len(weights)], self._vector(weights), alpha=dt)

    def error(self, dt: Any, weights: tuple[float, ...]) -> Tensor:
        return torch.addmv(self._nothing, self._columns[len(weights)], self._vector(weights), beta=0, alpha=dt)

    def matrix(self) -> Tensor:
        return self.buffer[: self.count]

    def frozen(self) -> ListStages:
        copy = ListStages(self.layout)
        copy.k = list(self.matrix().clone().unbind(0))
        copy.scaled = self.scaled
        return copy


class RowStages(BufferStages):
    """The buffer of a batch whose samples have their own dt: rows hold dt k_i, which costs no more than copying k_i and
    makes every combination one matrix-vector product."""

    scaled = True

    def __init__(self, layout: Any, rows: int) -> None:
        super().__init__(layout, rows)
        self._k0: Any = None
        self._dt: Any = None
        self._wide: Any = None
        self._ones = torch.ones((1, self.shape[1]), dtype=layout.real_dtype, device=layout.device)

    def start(self, k0: Any) -> None:
        self._k0, self._dt, self.count = k0, None, 1

    def _load(self, dt: Tensor) -> None:
        if self._dt is dt:
            return
        self._dt, self._wide = dt, self.layout.spread(dt)
        if self.shape[1] <= NARROW:
            # Broadcasting over a few columns costs twice what a full operand does.
            self._wide = self._wide.mm(self._ones)
        torch.mul(self._k0, self._wide, out=self._rows[0])

    def evaluate(self, field: Any, t: Tensor, y: Tensor) -> Tensor:
        # The samples of a batch are merged one by one, so the stage itself is wanted, not its row.
        k = field.raw(t, y)
        torch.mul(k, self._wide, out=self._rows[self.count])
        self.count += 1
        return k

    def sweep(self, field: Any, times: tuple[Tensor, ...], y: Tensor, dt: Any, rows: Any) -> tuple[Tensor, Tensor]:
        self._load(dt)
        if self._plan[0] is not rows:
            self._plan = (rows, [(self._columns[len(row)], self._vector(row), self._rows[len(row)]) for row in rows])
        start, wide, shape, addmv, mul = y.reshape(-1), self._wide, self.shape, torch.addmv, torch.mul
        for (columns, vector, slot), t in zip(self._plan[1], times):
            point = addmv(start, columns, vector).view(shape)
            k = field.raw(t, point)
            mul(k, wide, out=slot)
        self.count = len(rows) + 1
        return point, k

    def point(self, y: Tensor, dt: Any, weights: tuple[float, ...]) -> Tensor:
        self._load(dt)
        return torch.addmv(y.reshape(-1), self._columns[len(weights)], self._vector(weights)).view(self.shape)

    def error(self, dt: Any, weights: tuple[float, ...]) -> Tensor:
        return torch.mv(self._columns[len(weights)], self._vector(weights)).view(self.shape)


class HostStages(BufferStages):
    """The buffer of a small state on the CPU, combined by numpy: a third of the cost per operation.

    Every array that f or the loop gets to see is new; only the stages live in shared memory.
    """

    on_host = True

    def __init__(self, layout: Any, rows: int) -> None:
        super().__init__(layout, rows)
        self._array = self.buffer.numpy()
        self._arrays: tuple[tuple[Any, Any], ...] = ()
        self._host: dict[int, Any] = {}
        self._table: tuple[Any, Any, list[Any]] = (None, None, [])
        self._shape = tuple(layout.shapes[0])

    def array(self, y: Tensor) -> np.ndarray:
        """``y`` as an array; those that this object made are remembered rather than converted."""
        for seen, array in self._arrays:
            if seen is y:
                return array
        return y.detach().numpy()

    def _rows_of(self, rows: Any) -> list[Any]:
        """(weights, stages, slot) of each row; the weights are views of a table that is scaled by dt once per step."""
        table = np.zeros((len(rows), len(self._array)), dtype=self._array.dtype)
        for i, row in enumerate(rows):
            table[i, : len(row)] = row
        scaled = np.empty_like(table)
        plan = [(scaled[i, : len(row)], self._array[: len(row)], self._slots[len(row)]) for i, row in enumerate(rows)]
        self._table = (rows, (table, scaled), plan)
        return plan

    def sweep(self, field: Any, times: tuple[Tensor, ...], y: Tensor, dt: Any, rows: Any) -> tuple[Tensor, Tensor | Row]:
        known, tables, plan = self._table
        if known is not rows:
            plan = self._rows_of(rows)
            tables = self._table[1]
        np.multiply(tables[0], dt, out=tables[1])
        func, args, shape, dtype = field.func, field.args, self._slots[0].shape, self._slots[0].dtype
        start, own, wrap, flat = self.array(y), self._shape, torch.from_numpy, self.layout.trivial
        for (weights, stages, slot), t in zip(plan, times):
            point = weights.dot(stages)
            point += start
            argument = wrap(point if flat else point.reshape(own))
            k = func(t, argument, *args)
            if type(k) is Tensor and k.shape == shape and k.dtype == dtype:
                slot.copy_(k)
            else:
                slot.copy_(self.layout.flatten(k, "the value returned by f").view(shape))
        self.count = len(rows) + 1
        last = argument if flat else wrap(point)
        self._arrays = ((y, start), (last, point))
        return last, Row(len(rows))

    def point(self, y: Tensor, dt: float, weights: tuple[float, ...]) -> Tensor:
        start = self.array(y)
        point = start + (self._host_vector(weights) * dt).dot(self._array[: len(weights)])
        result = torch.from_numpy(point)
        self._arrays = ((y, start), (result, point))
        return result

    def ratio(self, norm: Any, dt: float, weights: tuple[float, ...], y0: Tensor, y1: Tensor) -> float:
        """Norm of the error estimate ``dt sum_i weights_i k_i``."""
        error = self._host_vector(weights).dot(self._array[: len(weights)])
        return abs(dt) * norm.host_ratio(error, self.array(y0), self.array(y1))

    def _host_vector(self, weights: tuple[float, ...]) -> np.ndarray:
        known = self._host.get(id(weights))
        if known is None:
            known = self._host[id(weights)] = (np.array(weights, dtype=self._array.dtype), weights)
        return known[0]
