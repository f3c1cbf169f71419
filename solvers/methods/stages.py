"""Linear combinations of stages: y + dt sum_i w_i k_i, out of place under autograd, in one buffer without it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


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


class ListStages:
    """Stages as separate tensors: what autograd and torch.func need."""

    def __init__(self, layout: Any) -> None:
        self.layout = layout
        self.k: list[Tensor] = []

    def start(self, k0: Tensor) -> None:
        self.k = [k0]

    def rewind(self) -> None:
        """Forget all stages but the first."""
        self.k = self.k[:1]

    def evaluate(self, field: Any, t: Tensor, y: Tensor) -> Tensor:
        """Append the stage f(t, y); returns it in the form that ``start`` takes."""
        k = field(t, y)
        self.k.append(k)
        return k

    def sweep(self, field: Any, times: tuple[Tensor, ...], y: Tensor, dt: Any, rows: Any) -> tuple[Tensor, Tensor]:
        """Evaluate one stage for each of ``rows``; returns the last stage's argument and the last stage."""
        k = self.k
        for row, t in zip(rows, times, strict=True):
            point = combine(self.layout, y, dt, row, k)
            k.append(field(t, point))
        return point, k[-1]

    def point(self, y: Tensor, dt: Any, weights: tuple[float, ...]) -> Tensor:
        return combine(self.layout, y, dt, weights, self.k)

    @torch.no_grad()
    def error(self, dt: Any, weights: tuple[float, ...]) -> Tensor:
        """dt sum_i weights_i k_i, detached."""
        total = weighted_sum(weights, [k.detach() for k in self.k])
        if total is None:
            return torch.zeros_like(self.k[0])
        return total * (self.layout.spread(dt.detach()) if isinstance(dt, Tensor) else dt)

    def matrix(self) -> Tensor:
        """All stages, ``(s, *layout.shape)``."""
        return torch.stack(self.k)

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

    def __init__(self, layout: Any, rows: int) -> None:
        self.layout = layout
        self.buffer = torch.empty((rows, *layout.shape), dtype=layout.dtype, device=layout.device)
        flat = self.buffer.view(rows, -1)
        self._rows = self.buffer.unbind(0)
        # f writes its answer in the user's shape, which saves a view for every stage.
        self._slots = [layout.unflatten(row) for row in self._rows] if layout.is_tensor else None
        # Column-major (n, s): its product with a weight vector is what BLAS is fastest at.
        self._columns = [flat[:i].t() for i in range(rows + 1)]
        self._weights: dict[tuple[float, ...], Tensor] = {}
        self._nothing = torch.zeros((), dtype=layout.dtype, device=layout.device).expand(flat.shape[1])
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
            self._rows[row].copy_(field(t, y))
        # Samples are merged one by one, which needs the numbers; a joint step is kept or dropped whole.
        return Row(row) if self.layout.joint else self._rows[row]

    def sweep(self, field: Any, times: tuple[Tensor, ...], y: Tensor, dt: Any, rows: Any) -> tuple[Tensor, Tensor | Row]:
        """Evaluate one stage for each of ``rows``; returns the last stage's argument and the last stage."""
        if self._slots is None or not self.layout.joint:
            for row, t in zip(rows, times, strict=True):
                point = self.point(y, dt, row)
                k = self.evaluate(field, t, point)
            return point, k
        # The same without a call per stage: this is the innermost loop of a small joint solve.
        func, args, shape, dtype = field.func, field.args, self._slots[0].shape, self._slots[0].dtype
        flat = self.layout.trivial
        for row, t in zip(rows, times, strict=True):
            count = self.count
            point = torch.addmv(y, self._columns[count], self._vector(row), alpha=dt)
            k = func(t, point if flat else point.view(shape), *args)
            if type(k) is Tensor and k.shape == shape and k.dtype == dtype:
                self._slots[count].copy_(k)
            else:
                self._rows[count].copy_(self.layout.flatten(k, "the value returned by f"))
            self.count = count + 1
        return point, Row(self.count - 1)

    def _vector(self, weights: tuple[float, ...]) -> Tensor:
        vector = self._weights.get(weights)
        if vector is None:
            vector = torch.tensor(weights, dtype=self.buffer.dtype, device=self.buffer.device)
            self._weights[weights] = vector
        return vector

    def point(self, y: Tensor, dt: Any, weights: tuple[float, ...]) -> Tensor:
        columns, vector = self._columns[len(weights)], self._vector(weights)
        if not isinstance(dt, Tensor):
            return torch.addmv(y, columns, vector, alpha=dt)
        return torch.addcmul(y, self.layout.spread(dt), torch.mv(columns, vector).view(self.shape))

    def error(self, dt: Any, weights: tuple[float, ...]) -> Tensor:
        columns, vector = self._columns[len(weights)], self._vector(weights)
        if not isinstance(dt, Tensor):
            return torch.addmv(self._nothing, columns, vector, beta=0, alpha=dt)
        return torch.mv(columns, vector).view(self.shape).mul_(self.layout.spread(dt))

    def matrix(self) -> Tensor:
        return self.buffer[: self.count]

    def frozen(self) -> ListStages:
        copy = ListStages(self.layout)
        copy.k = list(self.matrix().clone().unbind(0))
        return copy
