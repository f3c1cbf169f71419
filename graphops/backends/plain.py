"""The same kernels as ordinary torch operations, which compile, batch and differentiate by themselves, forward mode included.

Chosen automatically while ``torch.compile`` traces and inside forward-mode differentiation, and for what is not floating
point of 32 or 64 bits. It forms a message per edge, so it needs memory O(E F); on CUDA its sums are not deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..pattern import Pattern, Segments
from .base import Backend

__all__ = ["Plain"]


def spread(index: Tensor, values: Tensor) -> Tensor:
    """``index`` ``(E,)`` expanded to the shape of ``values`` ``(E, ...)``."""
    return index.view(-1, *[1] * (values.dim() - 1)).expand_as(values)


class Plain(Backend):
    name = "plain"
    traceable = True

    def sum(self, segments: Segments, values: Tensor) -> Tensor:
        return values.new_zeros(segments.size, *values.shape[1:]).index_add(0, segments.index, values)

    def extremum(self, segments: Segments, values: Tensor, largest: bool) -> Tensor:
        if values.is_floating_point():
            limit = float("-inf") if largest else float("inf")
        else:
            limit = torch.iinfo(values.dtype).min if largest else torch.iinfo(values.dtype).max
        start = values.new_full((segments.size, *values.shape[1:]), limit)
        return start.scatter_reduce(0, spread(segments.index, values), values, "amax" if largest else "amin")

    def first(self, segments: Segments, values: Tensor, largest: bool) -> Tensor:
        best = self.extremum(segments, values, largest).index_select(0, segments.index)
        places = spread(torch.arange(segments.count, device=values.device), values)
        places = torch.where((values == best) | (values != values), places, segments.count)
        start = places.new_full((segments.size, *values.shape[1:]), segments.count)
        return start.scatter_reduce(0, spread(segments.index, places), places, "amin")

    def product(self, segments: Segments, values: Tensor) -> Tensor:
        start = values.new_ones(segments.size, *values.shape[1:])
        return start.scatter_reduce(0, spread(segments.index, values), values, "prod")

    def _shifted(self, segments: Segments, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        top = self.extremum(segments, values.detach(), True)
        top = torch.where(top == float("-inf"), 0.0, top)
        powers = (values - top.index_select(0, segments.index)).exp()
        return top, powers, self.sum(segments, powers)

    def softmax(self, segments: Segments, values: Tensor) -> Tensor:
        _, powers, total = self._shifted(segments, values)
        return powers / torch.where(total == 0, 1.0, total).index_select(0, segments.index)

    def logsumexp(self, segments: Segments, values: Tensor) -> Tensor:
        top, _, total = self._shifted(segments, values)
        nothing = total == 0
        return torch.where(nothing, float("-inf"), top + torch.where(nothing, 1.0, total).log())

    def spmm(self, pattern: Pattern, weights: Tensor | None, x: Tensor) -> Tensor:
        messages = x.index_select(0, pattern.columns.index)
        return self.sum(pattern.rows, messages if weights is None else weights.unsqueeze(-1) * messages)

    def sddmm(self, pattern: Pattern, q: Tensor, k: Tensor) -> Tensor:
        return (q.index_select(0, pattern.rows.index) * k.index_select(0, pattern.columns.index)).sum(-1)
