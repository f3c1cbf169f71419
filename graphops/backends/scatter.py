"""Kernels of torch-scatter, for comparison and for those who trust them; sorted segments, so deterministic."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..errors import MissingPackageError
from ..pattern import Pattern, Segments
from .base import Backend

__all__ = ["Scatter"]


class Scatter(Backend):
    """It has no sampled product, and a product of elements only by atomics, 0 where there are none: ``native`` serves both."""

    name = "scatter"
    provides = frozenset({"sum", "extremum", "softmax", "logsumexp", "spmm"})

    def __init__(self) -> None:
        try:
            import torch_scatter
        except ImportError as error:
            raise MissingPackageError(
                'the backend "scatter" needs torch-scatter: pip install --no-build-isolation torch-scatter, or stay with "native"'
            ) from error
        self.kernels: Any = torch_scatter

    def sum(self, segments: Segments, values: Tensor) -> Tensor:
        return self.kernels.segment_csr(segments.stored(values).contiguous(), segments.pointers, reduce="sum")

    def extremum(self, segments: Segments, values: Tensor, largest: bool) -> Tensor:
        stored = segments.stored(values).contiguous()
        best = self.kernels.segment_csr(stored, segments.pointers, reduce="max" if largest else "min")
        empty = (segments.counts == 0).view(-1, *[1] * (values.dim() - 1))
        best = best.masked_fill(empty, -math.inf if largest else math.inf)  # it leaves 0 there
        # It compares with < and so passes NaN over.
        odd = self.sum(segments, values.isnan().to(values.dtype)) > 0
        return best.masked_fill(odd, math.nan)

    def spmm(self, pattern: Pattern, weights: Tensor | None, x: Tensor) -> Tensor:
        messages = x.index_select(0, pattern.rows.stored(pattern.columns.index))
        if weights is not None:
            messages = messages * pattern.rows.stored(weights).unsqueeze(-1)
        return self.kernels.segment_csr(messages, pattern.rows.pointers, reduce="sum")
