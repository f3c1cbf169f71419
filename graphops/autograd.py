"""Derivatives of the kernels, written once for all backends, with the kernels themselves: any order of reverse mode follows.

Sum and gather are each other's transpose; a sparse product with a pattern and the sampled product at its entries are each
other's derivatives, with the transposed pattern where x is concerned. Every backward calls these same functions again, so
second derivatives come from kernels too, and what tracing or forward mode asks for is decided afresh (`backends.chosen`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from .backends import asked_for, chosen
from .pattern import Pattern, Segments

__all__ = [
    "averaged",
    "difference",
    "exclusive_product",
    "first_extremum",
    "fusible",
    "gather",
    "hidden",
    "logsumexp",
    "mean_shares",
    "product",
    "sddmm",
    "softmax",
    "spmm",
    "squareplus",
    "total",
    "weighted_total",
]

Dims = tuple[int | None, ...]

# Not public, and only for speed: without them every call goes through `Function.apply`.
_TRANSFORMS_ACTIVE = getattr(torch._C, "_are_functorch_transforms_active", None)
_IS_WRAPPED = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", None)


def total(segments: Segments, values: Tensor, using: str | None = None) -> Tensor:
    """Sum of each segment, ``(E, ...) -> (size, ...)``."""
    kernels = chosen("sum", using, values)
    if kernels.traceable or _unrecorded(values):
        return kernels.sum(segments, values)
    return _record(_Sum, values, rest=(segments, using or asked_for()))


def gather(segments: Segments, values: Tensor, using: str | None = None) -> Tensor:
    """The value of its segment at each element, ``(size, ...) -> (E, ...)``; its derivative is summed deterministically."""
    if chosen("sum", using, values).traceable or _unrecorded(values):
        return values.index_select(0, segments.index)
    return _record(_Gather, values, rest=(segments, using or asked_for()))


def softmax(segments: Segments, values: Tensor, using: str | None = None) -> Tensor:
    kernels = chosen("softmax", using, values)
    if kernels.traceable or _unrecorded(values):
        return kernels.softmax(segments, values)
    return _record(_Softmax, values, rest=(segments, using or asked_for()))


def fusible(values: Tensor) -> bool:
    """Whether ``mean_shares`` takes ``values`` now: kernels serve them, and no transform asks for a rule of its own."""
    return not (chosen("softmax", None, values).traceable or _under_transform((values,)))


def mean_shares(segments: Segments, values: Tensor, by: str, using: str | None = None) -> Tensor:
    """The mean over heads of ``by``, softmax or squareplus over its sum, of values that are ``fusible``: ``(E, H) -> (E,)``.

    One derivative for all of it, which forms two numbers an edge and head, in place of one for each of its parts.
    """
    if _unrecorded(values):
        return _MeanShares.forward(values, segments, by, using or asked_for())[0]
    return _record(_MeanShares, values, rest=(segments, by, using or asked_for()))[0]


def logsumexp(segments: Segments, values: Tensor, using: str | None = None) -> Tensor:
    kernels = chosen("logsumexp", using, values)
    if kernels.traceable or _unrecorded(values):
        return kernels.logsumexp(segments, values)
    return _record(_LogSumExp, values, rest=(segments, using or asked_for()))


def product(segments: Segments, values: Tensor, using: str | None = None) -> Tensor:
    """Product of each segment; under forward mode from exclusive products, as that of ``scatter_reduce`` is 0 in torch 2.13."""
    kernels = chosen("product", using, values)
    if kernels.traceable and torch.compiler.is_compiling():
        return kernels.product(segments, values)
    if kernels.traceable:
        return product_of_scan(segments, values)
    if _unrecorded(values):
        return kernels.product(segments, values)
    return _record(_Product, values, rest=(segments, using or asked_for()))


def first_extremum(segments: Segments, values: Tensor, largest: bool, using: str | None = None) -> Tensor:
    """The first element that is the extremum of its segment, ``(size, ...)`` int64, E where there is none; no derivative."""
    kernels = chosen("first", using, values)
    if kernels.traceable or _unrecorded(values):
        return kernels.first(segments, values.detach(), largest)
    return _record(_First, values, rest=(segments, largest, using or asked_for()))


def spmm(pattern: Pattern, weights: Tensor | None, x: Tensor, using: str | None = None) -> Tensor:
    kernels = chosen("spmm", using, x, *(() if weights is None else (weights,)))
    if kernels.traceable or _unrecorded(weights, x):
        return kernels.spmm(pattern, weights, x)
    return _record(_SpMM, weights, x, rest=(pattern, using or asked_for()))


def sddmm(pattern: Pattern, q: Tensor, k: Tensor, using: str | None = None) -> Tensor:
    kernels = chosen("sddmm", using, q, k)
    if kernels.traceable or _unrecorded(q, k):
        return kernels.sddmm(pattern, q, k)
    return _record(_SDDMM, q, k, rest=(pattern, using or asked_for()))


def squareplus(x: Tensor) -> Tensor:
    """(x + sqrt(x^2 + 4)) / 2 (Barron 2021, eq. 1 with b = 4), without cancellation where x is far below 0."""
    # The leaky one is |x| with the derivative at 0 that the second line needs; no step changes what autograd keeps.
    large = leaky_relu(x, -1.0).add_((x * x).add_(4).sqrt_()).mul_(0.5)
    return torch.where(x > 0, large, large.reciprocal())


def averaged(shares: Tensor) -> Tensor:
    """The mean over heads, ``(E, H) -> (E,)``, as a product: a reduction of so short rows takes four times as long."""
    return torch.mv(shares, shares.new_full((shares.shape[1],), 1 / max(shares.shape[1], 1)))


def weighted_total(segments: Segments, weights: Tensor, values: Tensor, using: str | None = None) -> Tensor:
    """Sum of w_e X_e over each segment, ``(E,), (E, F) -> (size, F)``, without w X, whose memory costs more than the sum."""
    kernels = chosen("spmm", using, weights, values)
    if kernels.traceable:
        return kernels.sum(segments, weights.unsqueeze(-1) * values)
    return spmm(segments.membership, weights, values, using)


def difference(pattern: Pattern, x: Tensor, using: str | None = None) -> Tensor:
    """x at the column less x at the row of each entry, ``(n, F) -> (E, F)``, in one product that forms nothing else."""
    if chosen("spmm", using, x).traceable:
        return x.index_select(0, pattern.columns.index) - x.index_select(0, pattern.rows.index)
    return spmm(pattern.incidence, pattern.signs(x.dtype), x, using)


def hidden(*tensors: Tensor | None) -> bool:
    """Whether values cannot be read now: `torch.compile` is tracing, or a transform of `torch.func` holds one of them."""
    if torch.compiler.is_compiling():
        return True
    return _IS_WRAPPED is not None and any(_IS_WRAPPED(x) for x in tensors if x is not None)


def _under_transform(operands: tuple[Tensor | None, ...]) -> bool:
    """Whether a transform of `torch.func` is at work, or left its wrapper on an operand; True where torch cannot say."""
    if _TRANSFORMS_ACTIVE is None or _IS_WRAPPED is None:
        return True
    return _TRANSFORMS_ACTIVE() or any(_IS_WRAPPED(x) for x in operands if x is not None)


def _unrecorded(*operands: Tensor | None) -> bool:
    """Whether the kernel alone will do: nothing asks for a derivative, and no transform is at work."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in operands if x is not None):
        return False
    return not _under_transform(operands)


def _record(function: type[torch.autograd.Function], *operands: Tensor | None, rest: tuple[Any, ...]) -> Tensor:
    """``function.apply``, less what it need not do: on a small graph its reading of signatures costs more than the kernel."""
    if _under_transform(operands):
        return function.apply(*operands, *rest)
    return super(torch.autograd.Function, function).apply(*operands, *rest)  # type: ignore[misc]


class _OverSegments(torch.autograd.Function):
    """What the functions of values over segments share; features are independent of each other."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.segments, ctx.using = inputs

    @classmethod
    def batched(cls, in_dims: Dims, values: Tensor, *rest: Any) -> tuple[Tensor, int]:
        """Under vmap the batch becomes one more feature."""
        return cls.apply(values.movedim(in_dims[0] or 0, 1), *rest), 1


class _Sum(_OverSegments):
    @staticmethod
    def forward(values: Tensor, segments: Segments, using: str) -> Tensor:
        return chosen("sum", using, values).sum(segments, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return gather(ctx.segments, grad, ctx.using), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Tensor, int]:
        return _Sum.batched(in_dims, *args)


class _Gather(_OverSegments):
    @staticmethod
    def forward(values: Tensor, segments: Segments, using: str) -> Tensor:
        return values.index_select(0, segments.index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return total(ctx.segments, grad, ctx.using), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Tensor, int]:
        return _Gather.batched(in_dims, *args)


class _Softmax(_OverSegments):
    @staticmethod
    def forward(values: Tensor, segments: Segments, using: str) -> Tensor:
        return chosen("softmax", using, values).softmax(segments, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.segments, ctx.using = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (shares,) = ctx.saved_tensors
        weighted = shares * grad
        mean = gather(ctx.segments, total(ctx.segments, weighted, ctx.using), ctx.using)
        return weighted - shares * mean, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Tensor, int]:
        return _Softmax.batched(in_dims, *args)


class _MeanShares(torch.autograd.Function):
    """Shares p are an output too, so that they are saved with their own derivative; s' is that of the logarithm of what is
    divided by its sum: dp = p s' (g - sum of p g over the segment)."""

    @staticmethod
    def forward(values: Tensor, segments: Segments, by: str, using: str) -> tuple[Tensor, Tensor]:
        if by == "softmax":
            shares = chosen("softmax", using, values).softmax(segments, values)
        else:
            positive = squareplus(values)
            total = chosen("sum", using, values).sum(segments, positive)
            scale = total.masked_fill_(total == 0, 1.0).reciprocal_()
            shares = positive.mul_(scale.index_select(0, segments.index))
        return averaged(shares), shares

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        values, ctx.segments, by, ctx.using = inputs
        ctx.save_for_backward(output[1], *(() if by == "softmax" else (values,)))
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, to_shares: Tensor | None) -> tuple[Any, ...]:
        shares, *values = ctx.saved_tensors
        slope = to_shares
        if grad is not None:
            each = grad / max(shares.shape[1], 1)
            slope = each.unsqueeze(1) if slope is None else slope + each.unsqueeze(1)
        if slope is None:
            return None, None, None, None
        if to_shares is None:
            mean = weighted_total(ctx.segments, each, shares, ctx.using)
        else:
            mean = total(ctx.segments, shares * slope, ctx.using)
        out = (slope - gather(ctx.segments, mean, ctx.using)) * shares
        for x in values:
            out = out * (x * x + 4).rsqrt()
        return out, None, None, None


class _LogSumExp(_OverSegments):
    @staticmethod
    def forward(values: Tensor, segments: Segments, using: str) -> Tensor:
        return chosen("logsumexp", using, values).logsumexp(segments, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, ctx.segments, ctx.using = inputs
        ctx.save_for_backward(values, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        values, output = ctx.saved_tensors
        finite = torch.where(output == float("-inf"), 0.0, output)  # such a segment has shares of 0, not NaN
        shares = (values - gather(ctx.segments, finite, ctx.using)).exp()
        return shares * gather(ctx.segments, grad, ctx.using), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Tensor, int]:
        return _LogSumExp.batched(in_dims, *args)


class _Product(_OverSegments):
    @staticmethod
    def forward(values: Tensor, segments: Segments, using: str) -> Tensor:
        return chosen("product", using, values).product(segments, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, ctx.segments, ctx.using = inputs
        ctx.save_for_backward(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (values,) = ctx.saved_tensors
        return gather(ctx.segments, grad, ctx.using) * exclusive_product(ctx.segments, values), None, None

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Tensor, int]:
        return _Product.batched(in_dims, *args)


def scan(values: Tensor, places: Tensor, longest: int, backward: bool) -> Tensor:
    """Running products within segments, of stored values ``(E, ...)``, by doubling (Hillis & Steele 1986).

    ``places`` ``(E,)`` counts the elements of its own segment before (or, ``backward``, after) each element.
    """
    shape = (-1, *[1] * (values.dim() - 1))
    step = 1
    while step < longest:
        ones = torch.ones_like(values[:step])
        moved = torch.cat([values[step:], ones] if backward else [ones, values[:-step]])
        values = values * torch.where((places >= step).view(shape), moved, 1.0)
        step *= 2
    return values


def exclusive_product(segments: Segments, values: Tensor) -> Tensor:
    """Product of the other elements of its segment, for each element: no division, so right with any number of zeros.

    Written in products of values alone, it is differentiable to any order, in either mode.
    """
    stored = segments.stored(values)
    index = segments.stored(segments.index)
    every = torch.arange(segments.count, device=values.device)
    before = every - segments.pointers[:-1].index_select(0, index)
    after = segments.pointers[1:].index_select(0, index) - 1 - every
    result = torch.ones_like(stored)
    for places, backward in ((before, False), (after, True)):
        running = scan(stored, places, segments.longest, backward)
        ones = torch.ones_like(running[:1])
        moved = torch.cat([running[1:], ones] if backward else [ones, running[:-1]])
        result = result * torch.where((places >= 1).view(-1, *[1] * (values.dim() - 1)), moved, 1.0)
    return segments.unstored(result)


def product_of_scan(segments: Segments, values: Tensor) -> Tensor:
    """Product of each segment as the last of its running products."""
    if segments.count == 0:
        return values.new_ones(segments.size, *values.shape[1:])
    stored = segments.stored(values)
    places = torch.arange(segments.count, device=values.device)
    before = places - segments.pointers[:-1].index_select(0, segments.stored(segments.index))
    running = scan(stored, before, segments.longest, backward=False)
    last = running.index_select(0, (segments.pointers[1:] - 1).clamp(min=0))
    empty = (segments.counts == 0).view(-1, *[1] * (values.dim() - 1))
    return torch.where(empty, torch.ones_like(last), last)


class _First(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, segments: Segments, largest: bool, using: str) -> Tensor:
        return chosen("first", using, values).first(segments, values, largest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Dims, values: Tensor, *rest: Any) -> tuple[Tensor, int]:
        return _First.apply(values.movedim(in_dims[0] or 0, 1), *rest), 1


class _SpMM(torch.autograd.Function):
    @staticmethod
    def forward(weights: Tensor | None, x: Tensor, pattern: Pattern, using: str) -> Tensor:
        return chosen("spmm", using, x, *(() if weights is None else (weights,))).spmm(pattern, weights, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weights, x, ctx.pattern, ctx.using = inputs
        ctx.save_for_backward(weights, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weights, x = ctx.saved_tensors
        to_weights = sddmm(ctx.pattern, grad, x, ctx.using) if ctx.needs_input_grad[0] else None
        to_x = spmm(ctx.pattern.transposed, weights, grad, ctx.using) if ctx.needs_input_grad[1] else None
        return to_weights, to_x, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Dims, weights: Tensor | None, x: Tensor, pattern: Pattern, using: str) -> tuple[Tensor, int]:
        if weights is None or in_dims[0] is None:  # the batch is more features
            x = x.movedim(in_dims[1] or 0, -2)
            out = _SpMM.apply(weights, x.flatten(-2), pattern, using)
            return out.unflatten(-1, x.shape[-2:]), out.dim() - 1
        weights = weights.movedim(in_dims[0], 1)
        batch = weights.shape[1]
        x = x.unsqueeze(1).expand(-1, batch, *x.shape[1:]) if in_dims[1] is None else x.movedim(in_dims[1], 1)
        if weights.dim() == 2:  # the batch is the heads
            return _SpMM.apply(weights, x, pattern, using), 1
        out = _SpMM.apply(weights.flatten(1), x.flatten(1, 2), pattern, using)
        return out.unflatten(1, (batch, -1)), 1


class _SDDMM(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, pattern: Pattern, using: str) -> Tensor:
        return chosen("sddmm", using, q, k).sddmm(pattern, q, k)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, ctx.pattern, ctx.using = inputs
        ctx.save_for_backward(q, k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k = ctx.saved_tensors
        to_q = spmm(ctx.pattern, grad, k, ctx.using) if ctx.needs_input_grad[0] else None
        to_k = spmm(ctx.pattern.transposed, grad, q, ctx.using) if ctx.needs_input_grad[1] else None
        return to_q, to_k, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Dims, q: Tensor, k: Tensor, pattern: Pattern, using: str) -> tuple[Tensor, int]:
        batch = info.batch_size
        q, k = (
            x.unsqueeze(1).expand(-1, batch, *x.shape[1:]) if dim is None else x.movedim(dim, 1)
            for x, dim in ((q, in_dims[0]), (k, in_dims[1]))
        )
        if q.dim() == 3:
            return _SDDMM.apply(q, k, pattern, using), 1
        return _SDDMM.apply(q.flatten(1, 2), k.flatten(1, 2), pattern, using).unflatten(1, (batch, -1)), 1
