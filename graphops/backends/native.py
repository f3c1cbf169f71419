"""Kernels of torch alone, each the fastest of those measured on one thread of a CPU (`python -m benchmarks run graph-kernels`).

Sums and sparse products are ``embedding_bag`` with the sparse row as its bag: it reads each row of x where it lies and never
forms a message per edge. On 1.3 million edges it takes 3.4 ms for (E, 4), where ``index_add`` takes 16 and
``segment_reduce`` 13; on one column, 3.4 against 4.1 and 5.4. Scores at edges are ``sampled_addmm`` on the pattern.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pattern import Pattern, Segments
from .base import Backend, as_rows

__all__ = ["Native"]


def constant(x: Tensor) -> Tensor:
    """``x`` without its gradient; as it is if it has none, since what `is_grads_batched` hands in cannot be detached."""
    return x.detach() if x.requires_grad else x


def bag(table: Tensor, entries: Tensor, pointers: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted sums of rows of ``table`` ``(N, F)`` over consecutive runs of ``entries``."""
    if entries.shape[0] == 0 or table.shape[1] == 0:
        return table.new_zeros(pointers.shape[0] - 1, table.shape[1])
    # Of a table without gradient it takes its forward-only kernel, which keeps no maps for a backward of its own.
    table, weights = constant(table), None if weights is None else constant(weights)
    return torch.embedding_bag(table, entries, pointers, False, 0, False, weights, True)[0]


class Native(Backend):
    name = "native"

    def sum(self, segments: Segments, values: Tensor) -> Tensor:
        total = bag(as_rows(values), *segments.bags)
        return total.view(segments.size, *values.shape[1:])

    def extremum(self, segments: Segments, values: Tensor, largest: bool) -> Tensor:
        return self._reduce(segments, values, "max" if largest else "min")

    def product(self, segments: Segments, values: Tensor) -> Tensor:
        return self._reduce(segments, values, "prod")

    def _reduce(self, segments: Segments, values: Tensor, kind: str) -> Tensor:
        stored = segments.stored(values).contiguous()
        # Unsafe leaves out its check of the pointers, a read of the device at each call; they are checked when built.
        return torch.segment_reduce(stored, kind, offsets=segments.pointers, axis=0, unsafe=True)

    def spmm(self, pattern: Pattern, weights: Tensor | None, x: Tensor) -> Tensor:
        stored = None if weights is None else pattern.stored(weights)
        if x.dim() == 2:
            return bag(x.contiguous(), *pattern.blocks(), stored)
        heads, width = x.shape[1:]
        out = bag(x.reshape(-1, width).contiguous(), *pattern.blocks(heads), stored)
        return out.view(pattern.rows.size, heads, width)

    def sddmm(self, pattern: Pattern, q: Tensor, k: Tensor) -> Tensor:
        heads = q.shape[1] if q.dim() == 3 else 1
        if pattern.rows.count == 0 or q.numel() == 0:
            return q.new_zeros(pattern.rows.count, *q.shape[1:-1])
        if pattern.rows.count > heads * pattern.rows.size * pattern.columns.size:
            # `sampled_addmm` refuses a pattern with more entries than its matrix has places, as parallel edges can have.
            return (q.index_select(0, pattern.rows.index) * k.index_select(0, pattern.columns.index)).sum(-1)
        left, right = (constant(x).reshape(-1, x.shape[-1]).contiguous() for x in (q, k))
        scores = torch.sparse.sampled_addmm(pattern.zeros(heads, q.dtype), left, right.t(), beta=0.0).values()
        if q.dim() == 3:
            return scores.index_select(0, pattern.places(heads)).view(-1, heads)
        return pattern.rows.unstored(scores)
