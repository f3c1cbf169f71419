"""Reductions over segments, and sparse products over graphs: checks and meaning; kernels and derivatives lie below.

``over`` is a ``Graph`` (the edges into each node; ``g.outgoing`` for those out of it), ``Segments``, or an index ``(E,)``
int64 in any order together with ``size=``. Values have shape ``(E, ...)``; reductions return ``(size, ...)``.

Sums are deterministic, forward and backward: elements are added in their own order. bfloat16 and float16 are computed in
float32 and returned as they came.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import autograd
from .errors import ArgumentError, ArgumentTypeError
from .graph import Graph
from .pattern import Segments

__all__ = [
    "attend",
    "gather",
    "log_softmax",
    "logsumexp",
    "max",
    "mean",
    "min",
    "prod",
    "sddmm",
    "softmax",
    "spmm",
    "std",
    "sum",
]

Over = Graph | Segments | Tensor


def segments_of(over: Over, size: int | None) -> Segments:
    """The segments that ``over`` stands for."""
    if isinstance(over, Graph):
        over = over.incoming
    if isinstance(over, Segments):
        if size is not None and size != over.size:
            raise ArgumentError(f"size = {size}, but over has {over.size} segments: leave size out")
        return over
    return Segments.from_index(over, size)


def check_values(values: Tensor, count: int, device: torch.device, what: str = "values", unit: str = "E, elements") -> None:
    """A tensor with ``count`` rows on ``device``."""
    if not isinstance(values, Tensor):
        raise ArgumentTypeError(f"{what} must be a tensor, not {type(values).__name__}")
    if values.dim() == 0 or values.shape[0] != count:
        raise ArgumentError(f"{what} has shape {tuple(values.shape)}; its first dimension must be {count} ({unit})")
    if values.device != device:
        raise ArgumentError(f"{what} is on {values.device}, the segments or the graph on {device}: move one of them")
    if values.dtype == torch.bool:
        raise ArgumentTypeError(f"{what} is boolean: use {what}.long() or {what}.float()")


def check_floating(values: Tensor, name: str) -> None:
    if not values.is_floating_point():
        raise ArgumentTypeError(f"{name} needs floating point values, not {values.dtype}: use values.float()")


def widened(values: Tensor) -> Tensor:
    """Half precision as float32, in which it is accumulated."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def prepared(over: Over, values: Tensor, size: int | None, floating: str | None = None) -> tuple[Segments, Tensor]:
    segments = segments_of(over, size)
    check_values(values, segments.count, segments.device)
    if floating:
        check_floating(values, floating)
    return segments, widened(values)


def column(values: Tensor, like: Tensor) -> Tensor:
    """``(size,)`` shaped to stand against ``(size, ...)``."""
    return values.view(-1, *[1] * (like.dim() - 1))


def sum(over: Over, values: Tensor, *, size: int | None = None) -> Tensor:
    """Sum of each segment, 0 without elements."""
    segments, wide = prepared(over, values, size)
    return autograd.total(segments, wide).to(values.dtype)


def mean(over: Over, values: Tensor, *, size: int | None = None) -> Tensor:
    """Mean of each segment, 0 without elements."""
    segments, wide = prepared(over, values, size)
    if not values.is_complex():
        check_floating(values, "mean")
    return _mean(segments, wide).to(values.dtype)


def counts_of(segments: Segments, like: Tensor) -> Tensor:
    """Elements of each segment in the dtype of ``like``; without a read of the device while tracing."""
    if not torch.compiler.is_compiling():
        return segments.counts.to(like.dtype)
    return like.new_zeros(segments.size).index_add(0, segments.index, like.new_ones(segments.count))


def _mean(segments: Segments, wide: Tensor) -> Tensor:
    total = autograd.total(segments, wide)
    real = wide.real if wide.is_complex() else wide
    return total / column(counts_of(segments, real).clamp(min=1), total)


def _extremum(over: Over, values: Tensor, size: int | None, fill: float | None, largest: bool) -> Tensor:
    segments = segments_of(over, size)
    check_values(values, segments.count, segments.device)
    if values.is_complex():
        raise ArgumentTypeError("complex numbers have no order: take the maximum of values.abs()")
    if fill is None:
        fill = float("-inf") if largest else float("inf")
        if not values.is_floating_point():
            fill = torch.iinfo(values.dtype).min if largest else torch.iinfo(values.dtype).max
    return extremum_and_place(segments, values, largest, fill)[0]


def extremum_and_place(segments: Segments, values: Tensor, largest: bool, fill: float) -> tuple[Tensor, Tensor]:
    """The extremum of each segment, ``fill`` without elements, and the first element that attains it, E without elements."""
    if segments.count == 0 or segments.size == 0:
        shape = (segments.size, *values.shape[1:])
        return values.new_full(shape, fill), segments.index.new_full(shape, segments.count)
    first = autograd.first_extremum(segments, widened(values), largest)
    empty = first == segments.count
    return torch.where(empty, fill, values.gather(0, first.masked_fill(empty, 0))), first


def max(over: Over, values: Tensor, *, size: int | None = None, fill: float | None = None) -> Tensor:
    """Maximum of each segment; ``fill`` without elements, by default -inf (of integers the least there is).

    NaN if an element is. Of equal elements the first has the whole derivative, as in torch-scatter; torch's ``amax`` shares it.
    """
    return _extremum(over, values, size, fill, True)


def min(over: Over, values: Tensor, *, size: int | None = None, fill: float | None = None) -> Tensor:
    """Minimum of each segment; ``fill`` without elements, by default inf (of integers the greatest there is). See ``max``."""
    return _extremum(over, values, size, fill, False)


def prod(over: Over, values: Tensor, *, size: int | None = None) -> Tensor:
    """Product of each segment, 1 without elements; derivatives of any order are right with any number of zeros."""
    segments, wide = prepared(over, values, size)
    return autograd.product(segments, wide).to(values.dtype)


def std(over: Over, values: Tensor, *, size: int | None = None, unbiased: bool = True) -> Tensor:
    """Standard deviation of each segment, 0 for one or no element; the divisor is n - 1, or n without ``unbiased``.

    Where a segment is constant the root has no derivative; 0 is taken, the one of least norm.
    """
    segments, wide = prepared(over, values, size, "std")
    centred = wide - autograd.gather(segments, _mean(segments, wide))
    squares = autograd.total(segments, centred * centred)
    divisor = (counts_of(segments, wide) - (1 if unbiased else 0)).clamp(min=1)
    variance = squares / column(divisor, squares)
    flat = variance <= 0
    return torch.where(flat, 0.0, torch.where(flat, 1.0, variance).sqrt()).to(values.dtype)


def softmax(over: Over, values: Tensor, *, size: int | None = None) -> Tensor:
    """exp(values) over its sum in each segment, ``(E, ...)``, in the order of ``values``; shifted by each segment's maximum.

    A segment of nothing but -inf gives 0, so that what is masked out altogether adds nothing.
    """
    segments, wide = prepared(over, values, size, "softmax")
    return autograd.softmax(segments, wide).to(values.dtype)


def logsumexp(over: Over, values: Tensor, *, size: int | None = None) -> Tensor:
    """log of the sum of exp(values) in each segment; -inf without elements, or with nothing but -inf."""
    segments, wide = prepared(over, values, size, "logsumexp")
    return autograd.logsumexp(segments, wide).to(values.dtype)


def log_softmax(over: Over, values: Tensor, *, size: int | None = None) -> Tensor:
    """log of ``softmax``, ``(E, ...)``; -inf where that is 0."""
    segments, wide = prepared(over, values, size, "log_softmax")
    level = autograd.logsumexp(segments, wide)
    level = torch.where(level == float("-inf"), 0.0, level)
    return (wide - autograd.gather(segments, level)).to(values.dtype)


def gather(over: Over, values: Tensor, *, size: int | None = None) -> Tensor:
    """The value of its segment at each element, ``(size, ...) -> (E, ...)``: the transpose of ``sum``.

    Of a graph, the value at each edge's target; ``gather(g.outgoing, x)`` has that at its source.
    """
    segments = segments_of(over, size)
    check_values(values, segments.size, segments.device, unit="segments")
    return autograd.gather(segments, values)


def _same_dtype(*tensors: Tensor) -> tuple[list[Tensor], torch.dtype]:
    dtype = tensors[0].dtype
    if any(other.dtype != dtype for other in tensors):
        dtype = functools.reduce(torch.promote_types, (x.dtype for x in tensors))
        tensors = tuple(x.to(dtype) for x in tensors)
    return [widened(x) for x in tensors], dtype


def spmm(graph: Graph, weights: Tensor | None, x: Tensor) -> Tensor:
    """Sum over the edges e from j into i of w_e x_j, for each target i.

    ``weights`` ``(E,)`` or None (ones) with ``x`` ``(sources, ...) -> (targets, ...)``; or ``(E, H)`` with ``x``
    ``(sources, H, F) -> (targets, H, F)``. The graph's own weights count only if given: ``spmm(g, g.weight, x)``. With
    ``g.reverse()`` it is the product with the transpose.
    """
    check_values(x, graph.num_sources, graph.device, "x", "sources")
    wide, dtype = widened(x), x.dtype
    if weights is not None:
        check_values(weights, graph.num_edges, graph.device, "weights", "E, edges")
        if weights.dim() not in (1, 2):
            raise ArgumentError(f"weights must have shape (E,) or (E, H), not {tuple(weights.shape)}")
        if weights.dim() == 2 and (x.dim() != 3 or x.shape[1] != weights.shape[1]):
            raise ArgumentError(f"weights {tuple(weights.shape)} of H heads need x of shape (n, H, F), not {tuple(x.shape)}")
        (weights, wide), dtype = _same_dtype(weights, x)
    if x.dim() == 2 or (weights is not None and weights.dim() == 2):
        return autograd.spmm(graph.pattern, weights, wide).to(dtype)
    features = x.shape[1:]
    flat = wide.reshape(x.shape[0], math.prod(features))
    return autograd.spmm(graph.pattern, weights, flat).reshape(graph.num_targets, *features).to(dtype)


def sddmm(graph: Graph, q: Tensor, k: Tensor) -> Tensor:
    """<q_i, k_j> at each edge from j to i.

    ``q`` ``(targets, F)`` and ``k`` ``(sources, F) -> (E,)``; with H before F ``-> (E, H)``.
    """
    check_values(q, graph.num_targets, graph.device, "q", "targets")
    check_values(k, graph.num_sources, graph.device, "k", "sources")
    if q.dim() not in (2, 3) or q.shape[1:] != k.shape[1:]:
        raise ArgumentError(f"q and k must agree in (F,) or (H, F) after the nodes, not {tuple(q.shape)} and {tuple(k.shape)}")
    (q, k), dtype = _same_dtype(q, k)
    return autograd.sddmm(graph.pattern, q, k).to(dtype)


def attend(graph: Graph, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Scaled dot-product attention over incoming edges: sum over j of softmax_j(scale <q_i, k_j>) v_j.

    ``q`` ``(targets, F)`` and ``k`` ``(sources, F)`` with ``v`` ``(sources, D) -> (targets, D)``; or all three with H before
    the last. ``scale`` is 1/sqrt(F) by default. Memory is O(E H + n H F): no value of F or D numbers is formed at an edge.
    A target without edges gets 0.
    """
    check_values(v, graph.num_sources, graph.device, "v", "sources")
    if v.dim() != q.dim() or v.shape[1:-1] != q.shape[1:-1]:
        raise ArgumentError(f"v must have the heads of q, (n, H, D) or (n, D), not {tuple(v.shape)} against {tuple(q.shape)}")
    if not torch.compiler.is_compiling():
        graph = graph.sort(weighted=False)  # no value at an edge leaves, so its order is free
    (wide_q, wide_k, wide_v), dtype = _same_dtype(q, k, v)
    scores = sddmm(graph, wide_q * (q.shape[-1] ** -0.5 if scale is None else scale), wide_k)
    return spmm(graph, softmax(graph, scores), wide_v).to(dtype)
