"""What a backend provides: forward kernels, without a thought for derivatives."""

from __future__ import annotations

import math
from abc import ABC
from typing import ClassVar

import torch
from torch import Tensor

from ..pattern import Pattern, Segments

__all__ = ["KERNELS", "Backend", "as_rows"]

KERNELS = ("sum", "extremum", "first", "product", "softmax", "logsumexp", "spmm", "sddmm")


def as_rows(values: Tensor) -> Tensor:
    """``(E, ...)`` as a contiguous ``(E, F)``."""
    return values.reshape(values.shape[0], math.prod(values.shape[1:])).contiguous()


def _moderate(values: Tensor) -> bool:
    """Whether exp(values) and sums of 10^25 of them neither overflow nor lose digits: what a shift would be for.

    Two passes over the segments cost three times this one over the values. A device is not asked: it would have to wait.
    """
    if values.device.type != "cpu" or values.numel() == 0:
        return False
    bound = math.log(torch.finfo(values.dtype).max) / 3
    low, high = torch.aminmax(values)
    return -bound <= low.item() and high.item() <= bound  # false for NaN too


class Backend(ABC):
    """Forward kernels over segments and patterns, in floating point of 32 or 64 bits.

    A backend names in ``provides`` what it has of ``KERNELS``; the rest is served by ``native``, and the conformance tests
    hold it to each name. ``devices`` are the types of device it runs on. Kernels get plain tensors and record no gradient;
    a ``traceable`` backend consists of ordinary torch operations instead, which differentiate and compile by themselves.

    A segment without elements sums to 0, its product is 1, its maximum -inf, its minimum inf, its logsumexp -inf; a segment
    of nothing but -inf has a softmax of 0, so that a row masked out altogether adds nothing instead of NaN.
    """

    name: ClassVar[str]
    provides: ClassVar[frozenset[str]] = frozenset(KERNELS)
    devices: ClassVar[frozenset[str]] = frozenset({"cpu", "cuda"})
    traceable: ClassVar[bool] = False

    def sum(self, segments: Segments, values: Tensor) -> Tensor:
        """``(E, ...) -> (size, ...)``."""
        raise NotImplementedError

    def extremum(self, segments: Segments, values: Tensor, largest: bool) -> Tensor:
        """Maximum, or minimum, of each segment: ``(E, ...) -> (size, ...)``; NaN where one element is."""
        raise NotImplementedError

    def first(self, segments: Segments, values: Tensor, largest: bool) -> Tensor:
        """The first element that is the extremum of its segment, ``(size, ...)`` int64; E for a segment without elements."""
        best = self.extremum(segments, values, largest).index_select(0, segments.index)
        places = torch.arange(segments.count, device=values.device).view(-1, *[1] * (values.dim() - 1))
        places = torch.where((values == best) | values.isnan(), places, segments.count)
        index = segments.index.view(-1, *[1] * (values.dim() - 1)).expand_as(places)
        found = places.new_full((segments.size, *values.shape[1:]), segments.count)
        return found.scatter_reduce_(0, index, places, "amin")

    def product(self, segments: Segments, values: Tensor) -> Tensor:
        """``(E, ...) -> (size, ...)``."""
        raise NotImplementedError

    def _shifted(self, segments: Segments, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each segment's finite shift, exp(values - shift) and its sum: what softmax and logsumexp share."""
        top = self.extremum(segments, values, True).clamp_(min=torch.finfo(values.dtype).min)
        powers = (values - top.index_select(0, segments.index)).exp_()
        return top, powers, self.sum(segments, powers)

    def softmax(self, segments: Segments, values: Tensor) -> Tensor:
        """exp(values) over its sum in each segment, ``(E, ...)``, shifted by each segment's maximum where that is needed."""
        if _moderate(values):
            powers = values.exp()
            total = self.sum(segments, powers)
        else:
            _, powers, total = self._shifted(segments, values)
        scale = total.masked_fill_(total == 0, 1.0).reciprocal_()
        return powers.mul_(scale.index_select(0, segments.index))

    def logsumexp(self, segments: Segments, values: Tensor) -> Tensor:
        """log of the sum of exp(values) in each segment, ``(size, ...)``."""
        top, _, total = self._shifted(segments, values)
        return total.log_().add_(top)

    def spmm(self, pattern: Pattern, weights: Tensor | None, x: Tensor) -> Tensor:
        """sum over the entries e of row i of w_e x_(column of e).

        ``weights`` ``(E,)`` or None with ``x`` ``(columns, F)``, or ``(E, H)`` with ``(columns, H, F)``.
        """
        raise NotImplementedError

    def sddmm(self, pattern: Pattern, q: Tensor, k: Tensor) -> Tensor:
        """<q_row, k_column> at each entry: ``(rows, F), (columns, F) -> (E,)``, or with H before F ``-> (E, H)``."""
        raise NotImplementedError
