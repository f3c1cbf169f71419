"""Sparse products on CUDA as a kernel of Triton: one program a row and a block of features, no atomics, so deterministic.

Written for a GPU and checked on none so far but by Triton's interpreter; all else is served by ``native``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..errors import MissingPackageError
from ..pattern import Pattern
from .base import Backend

__all__ = ["Triton"]

BLOCK = 64

tl: Any = None
"""`triton.language` once the backend is built: a Triton kernel finds it among the names of its module."""


def rows_kernel(pointers, neighbours, weights, x, out, features, weighted: tl.constexpr, block: tl.constexpr):
    """Sum of w_e x_(neighbour of e) over one row, for ``block`` features: the source that Triton compiles."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * block + tl.arange(0, block)
    inside = feature < features
    total = tl.zeros((block,), dtype=out.dtype.element_ty)
    for edge in range(tl.load(pointers + row), tl.load(pointers + row + 1)):
        neighbour = tl.load(neighbours + edge).to(tl.int64)
        value = tl.load(x + neighbour * features + feature, mask=inside, other=0.0)
        if weighted:
            value = value * tl.load(weights + edge)
        total += value
    tl.store(out + row * features + feature, total, mask=inside)


class Triton(Backend):
    name = "triton"
    provides = frozenset({"spmm"})
    devices = frozenset({"cuda"})

    def __init__(self) -> None:
        global tl
        try:
            import triton
            import triton.language as tl
        except ImportError as error:
            raise MissingPackageError('the backend "triton" needs Triton: pip install triton, or stay with "native"') from error
        self.kernel: Any = triton.jit(rows_kernel)

    def spmm(self, pattern: Pattern, weights: Tensor | None, x: Tensor) -> Tensor:
        heads = x.shape[1] if x.dim() == 3 else 1
        neighbours, pointers = pattern.blocks(heads)
        table = x.reshape(-1, x.shape[-1]).contiguous()
        out = table.new_zeros(pointers.shape[0] - 1, table.shape[1])
        if out.numel():
            grid = out.shape[0], -(-table.shape[1] // BLOCK)
            given = table if weights is None else pattern.stored(weights)
            self.kernel[grid](pointers, neighbours, given, table, out, table.shape[1], weights is not None, BLOCK)
        return out.view(pattern.rows.size, *x.shape[1:])
