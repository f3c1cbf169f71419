"""torch_scatter's functions on the kernels of this package: ``import graphops.scatter_api as torch_scatter``.

They differ from torch-scatter 2.1.2 where that is wrong: second derivatives of ``segment_*`` and the derivative of a product
with a zero are right, ``scatter_logsumexp`` of a group of nothing but -inf is -inf, ``scatter_std`` has derivative 0, not NaN,
on a constant group, NaN is not passed over by a maximum, and everything compiles and goes through ``torch.func``. An index or
a pointer out of range raises instead of reading or writing beside the tensor; ``segment_coo`` needs no sorted index. As there,
a group without elements gives 0 (a product 1), of equal elements the first is the maximum, and ``eps`` is taken, and unused.

``dim_size=None`` is the largest index plus one, which waits for the device; give it where that matters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import segment
from .errors import ArgumentError, ArgumentTypeError, unknown_name
from .pattern import Segments

__all__ = [
    "gather_coo",
    "gather_csr",
    "scatter",
    "scatter_add",
    "scatter_log_softmax",
    "scatter_logsumexp",
    "scatter_max",
    "scatter_mean",
    "scatter_min",
    "scatter_mul",
    "scatter_softmax",
    "scatter_std",
    "scatter_sum",
    "segment_add_coo",
    "segment_add_csr",
    "segment_coo",
    "segment_csr",
    "segment_max_coo",
    "segment_max_csr",
    "segment_mean_coo",
    "segment_mean_csr",
    "segment_min_coo",
    "segment_min_csr",
    "segment_sum_coo",
    "segment_sum_csr",
]


class Layout:
    """A reduction along one dimension of a tensor, as segments of rows.

    An index of one dimension groups whole rows ``(E, ...)``. Another one may group each column in its own way: then every
    number is an element, and ``columns`` of them make a row.
    """

    def __init__(self, index: Tensor, dim: int, like: Tensor, size: int | None) -> None:
        if index.dtype != torch.int64:
            raise ArgumentTypeError(f"index must be an int64 tensor, not {index.dtype}: use index.long()")
        if not -like.dim() <= dim < like.dim():
            raise ArgumentError(f"dim = {dim} is none of the {like.dim()} dimensions of src")
        self.dim = dim % like.dim()
        self.shape = like.movedim(self.dim, 0).shape[1:]
        self.by_row = index.dim() == 1
        self.columns = 1 if self.by_row else math.prod(self.shape)
        if not self.by_row:
            index = expanded(index, like).movedim(self.dim, 0)
        checked = Segments.from_index(index.reshape(-1), size)
        self.rows = checked.size
        self.segments = checked if self.by_row else self._by_column(index)

    def _by_column(self, index: Tensor) -> Segments:
        column = torch.arange(self.columns, device=index.device).view(self.shape)
        return Segments((index * self.columns + column).reshape(-1), self.rows * self.columns)

    def flat(self, values: Tensor) -> Tensor:
        """Elements first."""
        values = values.movedim(self.dim, 0)
        return values if self.by_row else values.reshape(-1)

    def shaped(self, values: Tensor) -> Tensor:
        """A result for each element, in the dimensions of the tensor."""
        rows = self.segments.count // self.columns if self.columns else 0
        return values.reshape(rows, *self.shape).movedim(0, self.dim)

    def reduced(self, values: Tensor) -> Tensor:
        """A result for each group, in the dimensions of the tensor."""
        return values.reshape(self.rows, *self.shape).movedim(0, self.dim)


def expanded(index: Tensor, like: Tensor) -> Tensor:
    """``index`` broadcast to ``like``, from the first dimension on."""
    try:
        return index.reshape(*index.shape, *[1] * (like.dim() - index.dim())).expand_as(like)
    except RuntimeError as error:
        raise ArgumentError(f"index of shape {tuple(index.shape)} does not broadcast to src, {tuple(like.shape)}") from error


def _scattered(index: Tensor, dim: int, src: Tensor, out: Tensor | None, size: int | None) -> Layout:
    if out is not None:
        size = out.shape[dim]
    return Layout(index, dim, src, size)


def _written(out: Tensor | None, value: Tensor) -> Tensor:
    """``value``, put into ``out`` if there is one."""
    return value if out is None else out.copy_(value)


def _sum(src: Tensor, layout: Layout, out: Tensor | None) -> Tensor:
    total = layout.reduced(segment.sum(layout.segments, layout.flat(src)))
    return total if out is None else _written(out, out + total)


def _mean(src: Tensor, layout: Layout, out: Tensor | None, rounding: str = "floor") -> Tensor:
    flat = layout.flat(src)
    counts = segment.counts_of(layout.segments, flat.real if src.is_complex() else flat).clamp(min=1)
    counts = layout.reduced(segment.column(counts, flat).expand(-1, *flat.shape[1:]))
    total = _sum(src, layout, None) if out is None else out + _sum(src, layout, None)
    if src.is_floating_point() or src.is_complex():
        return _written(out, total / counts)
    return _written(out, torch.div(total, counts, rounding_mode=rounding))


def _mul(src: Tensor, layout: Layout, out: Tensor | None) -> Tensor:
    product = layout.reduced(segment.prod(layout.segments, layout.flat(src)))
    return product if out is None else _written(out, out * product)


def _extremum(src: Tensor, layout: Layout, out: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    segments, count = layout.segments, src.shape[layout.dim]
    best, first = segment.extremum_and_place(segments, layout.flat(src), largest, 0)
    place = torch.where(first == segments.count, count, first // max(layout.columns, 1))
    best, place = layout.reduced(best), layout.reduced(place)
    if out is None:
        return best, place
    wins = (place < count) & ((best > out) if largest else (best < out))
    return _written(out, torch.where(wins, best, out)), torch.where(wins, place, count)


def _max(src: Tensor, layout: Layout, out: Tensor | None) -> Tensor:
    return _extremum(src, layout, out, True)[0]


def _min(src: Tensor, layout: Layout, out: Tensor | None) -> Tensor:
    return _extremum(src, layout, out, False)[0]


Reduction = Callable[[Tensor, Layout, Tensor | None], Tensor]

SCATTERS: dict[str, Reduction] = {
    "sum": _sum,
    "add": _sum,
    "mean": _mean,
    "mul": _mul,
    "max": _max,
    "min": _min,
}
SEGMENTS: dict[str, Reduction] = {
    # torch-scatter rounds a mean of integers down in scatter, towards 0 here
    "sum": _sum,
    "add": _sum,
    "mean": functools.partial(_mean, rounding="trunc"),
    "max": _max,
    "min": _min,
}


def _named(reduce: str, known: dict[str, Reduction]) -> Reduction:
    if reduce not in known:
        raise unknown_name("reduce", reduce, known)
    return known[reduce]


# --- scatter ---------------------------------------------------------------------------------------------------------


def scatter(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None, reduce: str = "sum"
) -> Tensor:
    """``src`` reduced along ``dim`` in the groups that ``index``, broadcast to it, names; ``out``, if given, takes part."""
    return _named(reduce, SCATTERS)(src, _scattered(index, dim, src, out, dim_size), out)


def scatter_sum(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> Tensor:
    return scatter(src, index, dim, out, dim_size, "sum")


scatter_add = scatter_sum


def scatter_mul(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> Tensor:
    return scatter(src, index, dim, out, dim_size, "mul")


def scatter_mean(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> Tensor:
    return scatter(src, index, dim, out, dim_size, "mean")


def scatter_max(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The maximum, and where along ``dim`` it is (``src.size(dim)`` if nowhere)."""
    return _extremum(src, _scattered(index, dim, src, out, dim_size), out, True)


def scatter_min(
    src: Tensor, index: Tensor, dim: int = -1, out: Tensor | None = None, dim_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """The minimum, and where along ``dim`` it is (``src.size(dim)`` if nowhere)."""
    return _extremum(src, _scattered(index, dim, src, out, dim_size), out, False)


def scatter_softmax(src: Tensor, index: Tensor, dim: int = -1, dim_size: int | None = None) -> Tensor:
    layout = Layout(index, dim, src, dim_size)
    return layout.shaped(segment.softmax(layout.segments, layout.flat(src)))


def scatter_log_softmax(
    src: Tensor, index: Tensor, dim: int = -1, eps: float = 1e-12, dim_size: int | None = None
) -> Tensor:
    layout = Layout(index, dim, src, dim_size)
    return layout.shaped(segment.log_softmax(layout.segments, layout.flat(src)))


def scatter_logsumexp(
    src: Tensor,
    index: Tensor,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
    eps: float = 1e-12,
) -> Tensor:
    """log of the sum of exp(src), with that of ``out`` if given; 0 for a group without elements."""
    layout = _scattered(index, dim, src, out, dim_size)
    flat = layout.flat(src)
    level = segment.logsumexp(layout.segments, flat)
    if out is not None:
        return _written(out, torch.logaddexp(out, layout.reduced(level)))
    empty = segment.column(segment.counts_of(layout.segments, flat) == 0, flat)
    return layout.reduced(torch.where(empty, 0.0, level))


def scatter_std(
    src: Tensor,
    index: Tensor,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
    unbiased: bool = True,
) -> Tensor:
    layout = _scattered(index, dim, src, out, dim_size)
    return _written(out, layout.reduced(segment.std(layout.segments, layout.flat(src), unbiased=unbiased)))


# --- sorted index ----------------------------------------------------------------------------------------------------


def segment_coo(
    src: Tensor, index: Tensor, out: Tensor | None = None, dim_size: int | None = None, reduce: str = "sum"
) -> Tensor:
    """``src`` reduced along the last dimension of ``index``, which broadcasts over what follows."""
    dim = index.dim() - 1
    return _named(reduce, SEGMENTS)(src, _scattered(index, dim, src, out, dim_size), out)


def segment_sum_coo(src: Tensor, index: Tensor, out: Tensor | None = None, dim_size: int | None = None) -> Tensor:
    return segment_coo(src, index, out, dim_size, "sum")


segment_add_coo = segment_sum_coo


def segment_mean_coo(src: Tensor, index: Tensor, out: Tensor | None = None, dim_size: int | None = None) -> Tensor:
    return segment_coo(src, index, out, dim_size, "mean")


def segment_max_coo(
    src: Tensor, index: Tensor, out: Tensor | None = None, dim_size: int | None = None
) -> tuple[Tensor, Tensor]:
    return scatter_max(src, index, index.dim() - 1, out, dim_size)


def segment_min_coo(
    src: Tensor, index: Tensor, out: Tensor | None = None, dim_size: int | None = None
) -> tuple[Tensor, Tensor]:
    return scatter_min(src, index, index.dim() - 1, out, dim_size)


def gather_coo(src: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """The value of its group at each element: ``src`` read along the last dimension of ``index``."""
    dim = index.dim() - 1
    if index.dim() == 1:
        segments = Segments.from_index(index, src.shape[0])
        return _written(out, segment.gather(segments, src))
    shape = (*src.shape[:dim], index.shape[dim], *src.shape[dim + 1 :])
    layout = Layout(index, dim, torch.empty(shape, device="meta"), src.shape[dim])
    values = src.movedim(dim, 0).reshape(-1)
    return _written(out, layout.shaped(segment.gather(layout.segments, values)))


# --- pointers --------------------------------------------------------------------------------------------------------


def _check_pointers(indptr: Tensor, count: int | None) -> None:
    if indptr.dtype != torch.int64:
        raise ArgumentTypeError(f"indptr must be an int64 tensor, not {indptr.dtype}: use indptr.long()")
    if indptr.dim() == 0 or indptr.shape[-1] == 0:
        raise ArgumentError(f"indptr must have one pointer more than groups, not shape {tuple(indptr.shape)}")
    if not indptr.numel():
        return
    low, high = (int(v) for v in torch.aminmax(indptr))
    if low < 0 or (count is not None and high > count):
        raise ArgumentError(f"indptr has values from {low} to {high}, outside [0, {count}], the elements there are")
    if bool((indptr.diff(dim=-1) < 0).any()):
        raise ArgumentError("indptr descends: pointers must be sorted along their last dimension")


def _index_of(indptr: Tensor, count: int) -> Tensor:
    """The group of each of ``count`` elements along the last dimension; one more than there are for those in no group."""
    places = torch.arange(count, device=indptr.device).expand(*indptr.shape[:-1], count).contiguous()
    found = torch.searchsorted(indptr.contiguous(), places, right=True) - 1
    return torch.where(found < 0, indptr.shape[-1] - 1, found)


def _by_pointers(src: Tensor, indptr: Tensor) -> tuple[Layout, int]:
    """The layout along the last dimension of ``indptr``, with one more group for what lies in none, and how many to keep."""
    dim = indptr.dim() - 1
    if indptr.dim() > src.dim():
        raise ArgumentError(f"indptr has {indptr.dim()} dimensions, src {src.dim()}: it may not have more")
    _check_pointers(indptr, src.shape[dim])
    groups = indptr.shape[-1] - 1
    indptr = indptr.expand(*src.shape[:dim], groups + 1)
    return Layout(_index_of(indptr, src.shape[dim]), dim, src, groups + 1), groups


def segment_csr(src: Tensor, indptr: Tensor, out: Tensor | None = None, reduce: str = "sum") -> Tensor:
    """``src`` reduced along the last dimension of ``indptr``, from each pointer up to the next; ``out`` is overwritten."""
    reduction = _named(reduce, SEGMENTS)
    layout, groups = _by_pointers(src, indptr)
    return _written(out, reduction(src, layout, None).narrow(layout.dim, 0, groups))


def segment_sum_csr(src: Tensor, indptr: Tensor, out: Tensor | None = None) -> Tensor:
    return segment_csr(src, indptr, out, "sum")


segment_add_csr = segment_sum_csr


def segment_mean_csr(src: Tensor, indptr: Tensor, out: Tensor | None = None) -> Tensor:
    return segment_csr(src, indptr, out, "mean")


def _extremum_csr(src: Tensor, indptr: Tensor, out: Tensor | None, largest: bool) -> tuple[Tensor, Tensor]:
    layout, groups = _by_pointers(src, indptr)
    best, place = _extremum(src, layout, None, largest)
    return _written(out, best.narrow(layout.dim, 0, groups)), place.narrow(layout.dim, 0, groups)


def segment_max_csr(src: Tensor, indptr: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _extremum_csr(src, indptr, out, True)


def segment_min_csr(src: Tensor, indptr: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return _extremum_csr(src, indptr, out, False)


def gather_csr(src: Tensor, indptr: Tensor, out: Tensor | None = None) -> Tensor:
    """The value of its group at each element; all rows of ``indptr`` end at the same number of elements."""
    _check_pointers(indptr, None)
    count = int(indptr.reshape(-1, indptr.shape[-1])[0, -1]) if indptr.numel() else 0
    if bool((indptr[..., -1] != count).any()) or bool((indptr[..., 0] != 0).any()):
        raise ArgumentError("every row of indptr must start at 0 and end at the same number of elements")
    return gather_coo(src, _index_of(indptr, count), out)
