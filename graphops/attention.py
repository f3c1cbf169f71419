"""Attention on graphs: scores at edges from what stands at their ends, and what makes weights of them.

An edge from j to i has the query q_i of its target and the key k_j of its source: ``q`` ``(targets, F)`` and ``k``
``(sources, F)`` give scores ``(E,)``; with H heads before F, ``(E, H)``. They are in the order of the graph's edges. No value
of F numbers is formed at an edge.

Self-loops take part where the graph has them: ``add_self_loops`` or ``remove_self_loops`` chooses, once and beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from . import segment
from .autograd import averaged, fusible, hidden, mean_shares, squareplus
from .errors import ArgumentError, unknown_name
from .graph import Graph
from .pattern import Segments
from .segment import check_floating, check_values, column, gather, sddmm, softmax, spmm, widened

__all__ = [
    "SCORES",
    "Attention",
    "additive",
    "cosine",
    "dot_product",
    "exponential_kernel",
    "normalise",
    "pearson",
    "squareplus",
]

Scale = str | float
Score = Callable[..., Tensor]


def check_ends(graph: Graph, q: Tensor, k: Tensor, dims: tuple[int, ...] = (2, 3), what: str = "(F,) or (H, F)") -> None:
    """Queries at targets and keys at sources, of one shape but for the number of nodes."""
    check_values(q, graph.num_targets, graph.device, "q", "targets")
    check_values(k, graph.num_sources, graph.device, "k", "sources")
    check_floating(q, "attention")
    check_floating(k, "attention")
    if q.dim() not in dims or q.shape[1:] != k.shape[1:]:
        raise ArgumentError(f"q and k must agree in {what} after the nodes, not {tuple(q.shape)} and {tuple(k.shape)}")


def dot_product(graph: Graph, q: Tensor, k: Tensor, scale: Scale = "sqrt_d_k") -> Tensor:
    """<q_i, k_j> times ``scale``: ``"sqrt_d_k"`` divides by the root of F (Vaswani et al. 2017, eq. 1), ``"d_k"`` by F
    (Chamberlain et al. 2021, eq. 10), a number multiplies."""
    check_ends(graph, q, k)
    width = max(q.shape[-1], 1)
    factors = {"sqrt_d_k": width**-0.5, "d_k": 1 / width}
    factor = factors.get(scale) if isinstance(scale, str) else scale
    if factor is None:
        raise unknown_name("scale", scale, factors)
    if graph.num_edges > q.shape[0] * width:
        return sddmm(graph, q * factor, k)
    # On a sparse graph the products are fewer numbers than the queries.
    return (sddmm(graph, widened(q), widened(k)) * factor).to(torch.promote_types(q.dtype, k.dtype))


def units(x: Tensor, least: Tensor | float = 0.0) -> Tensor:
    """Vectors of length 1 along the last dimension; 0, with derivatives of 0, where the square is at most ``least``."""
    square = x.square().sum(-1, keepdim=True)
    nothing = square <= least
    return torch.where(nothing, 0.0, x * torch.where(nothing, 1.0, square).rsqrt())


def cosine(graph: Graph, q: Tensor, k: Tensor) -> Tensor:
    """Cosine of the angle between q_i and k_j; 0 where either is 0."""
    check_ends(graph, q, k)
    return sddmm(graph, *(units(widened(x)) for x in (q, k))).to(torch.promote_types(q.dtype, k.dtype))


def pearson(graph: Graph, q: Tensor, k: Tensor) -> Tensor:
    """Correlation of q_i and k_j over their F numbers; 0 where either is constant, to rounding."""
    check_ends(graph, q, k)

    def centred(x: Tensor) -> Tensor:
        rounding = (10 * torch.finfo(x.dtype).eps) ** 2 * x.detach().square().sum(-1, keepdim=True)
        return units(x - x.mean(-1, keepdim=True), rounding)

    return sddmm(graph, centred(widened(q)), centred(widened(k))).to(torch.promote_types(q.dtype, k.dtype))


def exponential_kernel(
    graph: Graph, q: Tensor, k: Tensor, variance: float | Tensor = 1.0, lengthscale: float | Tensor = 1.0
) -> Tensor:
    """variance exp(-|q_i - k_j|^2 / (2 lengthscale^2)); ``variance`` and ``lengthscale`` are numbers, or ``(H,)``, one a head.

    Squared distances come from inner products about the mean of the keys, which keeps their digits where points lie far
    from the origin.
    """
    check_ends(graph, q, k)
    (wide_q, wide_k), dtype = (widened(q), widened(k)), torch.promote_types(q.dtype, k.dtype)
    centre = wide_k.detach().mean(0) if wide_k.shape[0] else 0.0
    wide_q, wide_k = wide_q - centre, wide_k - centre
    ends = gather(graph.incoming, wide_q.square().sum(-1)) + gather(graph.outgoing, wide_k.square().sum(-1))
    squares = ends - 2 * sddmm(graph, wide_q, wide_k)
    return (variance * torch.exp(squares / (-2 * lengthscale**2))).to(dtype)


def additive(graph: Graph, q: Tensor, k: Tensor, slope: float = 0.2) -> Tensor:
    """LeakyReLU(q_i + k_j) of one number a node and head: ``q`` ``(targets,)`` or ``(targets, H)``, ``k`` alike.

    With q = W x . a_1 and k = W x . a_2 these are the scores of GAT (Velickovic et al. 2018, eq. 3).
    """
    check_ends(graph, q, k, (1, 2), "() or (H,)")
    return leaky_relu(gather(graph.incoming, q) + gather(graph.outgoing, k), slope)


SCORES: dict[str, Score] = {
    "dot_product": dot_product,
    "cosine": cosine,
    "pearson": pearson,
    "exponential_kernel": exponential_kernel,
    "additive": additive,
}


NORMALISERS = ("softmax", "squareplus")
DIRECTIONS = ("incoming", "outgoing")
REWEIGHTINGS = ("scores", "shares")


def check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise unknown_name(name, value, known)


def edge_weights(graph: Graph, reweight: str | None) -> Tensor | None:
    """The weights that attention is to be reweighted by, if any."""
    if reweight is None:
        return None
    check_choice("reweighting", reweight, REWEIGHTINGS)
    if graph.weight is None:
        raise ArgumentError("reweight needs a graph with weights: with_weight gives it some, or leave reweight out")
    if not hidden(graph.weight) and not graph.is_nonnegative:
        raise ArgumentError("reweight needs weights that are not below 0: take their absolute values, or drop these edges")
    return graph.weight


def normalise(
    graph: Graph, scores: Tensor, by: str = "softmax", over: str = "incoming", reweight: str | None = None
) -> Tensor:
    """Scores ``(E, ...)`` as shares that add up to 1 over the edges into (or out of) each node, in the same order.

    ``by``: ``"softmax"``, or ``"squareplus"`` of each score divided by their sum. ``over``: ``"incoming"`` edges, which makes
    a right-stochastic matrix and keeps a maximum principle, or ``"outgoing"`` ones. ``reweight`` by the graph's weights:
    ``"shares"`` multiplies what is divided by its sum, so that an edge of weight 0 takes no part (its weight then has a
    derivative of 0 under softmax); ``"scores"`` multiplies the scores, as the code of Chamberlain et al. 2021 does.

    Raises ``UnknownNameError``; ``ArgumentError`` for reweighting without weights, or with negative ones, which is looked
    up once a graph and not while `torch.compile` traces.
    """
    check_choice("normaliser", by, NORMALISERS)
    check_choice("direction", over, DIRECTIONS)
    check_values(scores, graph.num_edges, graph.device, "scores", "E, edges")
    check_floating(scores, "normalise")
    weight = edge_weights(graph, reweight)
    segments = graph.incoming if over == "incoming" else graph.outgoing
    return shares_of(segments, scores, by, weight, reweight == "scores")


def shares_of(segments: Segments, scores: Tensor, by: str, weight: Tensor | None, of_scores: bool) -> Tensor:
    """The same without the checks; ``of_scores``: whether ``weight`` multiplies the scores."""
    wide = widened(scores)
    weight = None if weight is None else column(weight.to(wide.dtype), wide)
    if weight is not None and of_scores:
        wide, weight = wide * weight, None
    if by == "softmax":
        if weight is not None:
            part = weight > 0
            wide = torch.where(part, wide + torch.where(part, weight, 1.0).log(), float("-inf"))
        return softmax(segments, wide).to(scores.dtype)
    positive = squareplus(wide)
    positive = positive if weight is None else positive * weight
    total = segment.sum(segments, positive)
    return (positive / gather(segments, torch.where(total == 0, 1.0, total))).to(scores.dtype)


@dataclass(frozen=True)
class Attention:
    """Scores, normalised, as weights of the edges or applied to values: one choice of each, fixed beforehand.

    Args:
        score: a name of ``SCORES``, or a function ``(graph, q, k, **parameters)`` of scores ``(E,)`` or ``(E, H)``.
        scale: of the dot product: ``"sqrt_d_k"``, ``"d_k"`` or a number; None: ``"sqrt_d_k"``.
        normaliser, over, reweight: see ``normalise``.
        heads: ``"mean"`` averages them, ``"concat"`` keeps them.

    Raises ``UnknownNameError`` for an unknown name, ``ArgumentError`` for a scale with another score.
    """

    score: str | Score = "dot_product"
    scale: Scale | None = None
    normaliser: str = "softmax"
    over: str = "incoming"
    reweight: str | None = None
    heads: str = "mean"

    def __post_init__(self) -> None:
        if isinstance(self.score, str):
            check_choice("score", self.score, tuple(SCORES))
        check_choice("normaliser", self.normaliser, NORMALISERS)
        check_choice("direction", self.over, DIRECTIONS)
        check_choice("heads", self.heads, ("mean", "concat"))
        if self.reweight is not None:
            check_choice("reweighting", self.reweight, REWEIGHTINGS)
        if self.scale is not None and self.score != "dot_product":
            raise ArgumentError(f"scale = {self.scale!r} belongs to the dot product, not to {self.score!r}: leave it out")

    def _shares(
        self, graph: Graph, weight: Tensor | None, q: Tensor, k: Tensor, parameters: dict[str, Any], mean: bool
    ) -> Tensor:
        """``(E,)`` of one head or, if ``mean``, of the mean of all, else ``(E, H)``, every head on its own."""
        score = SCORES[self.score] if isinstance(self.score, str) else self.score
        if self.scale is not None:
            parameters = {"scale": self.scale, **parameters}
        segments = graph.incoming if self.over == "incoming" else graph.outgoing
        scores = score(graph, q, k, **parameters)
        if mean and weight is None and scores.dim() == 2 and fusible(scores):
            return mean_shares(segments, widened(scores), self.normaliser).to(scores.dtype)
        shares = shares_of(segments, scores, self.normaliser, weight, self.reweight == "scores")
        return averaged(shares) if mean and shares.dim() == 2 else shares

    def weights(self, graph: Graph, q: Tensor, k: Tensor, **parameters: Any) -> Tensor:
        """Weights of the edges, in their order: ``(E,)``, or ``(E, H)`` of kept heads. ``parameters`` go to the score."""
        return self._shares(graph, edge_weights(graph, self.reweight), q, k, parameters, self.heads == "mean")

    def __call__(self, graph: Graph, q: Tensor, k: Tensor, v: Tensor, **parameters: Any) -> Tensor:
        """Weighted sums of values over the edges into each node, in memory O(E H + n H D).

        ``v`` ``(sources, H, D)``, or ``(sources, D)`` for all heads. Averaged heads give ``(targets, D)``, kept ones
        ``(targets, H D)``. A target without edges gets 0.
        """
        weight = edge_weights(graph, self.reweight)
        if isinstance(self.score, str) and not torch.compiler.is_compiling():
            # No value at an edge leaves, so their order is free; a score of one's own may bring such values along.
            weight = weight if weight is None or graph.is_sorted else weight[graph.perm]
            graph = graph.sort(weighted=False)
        # Heads of the same values are averaged at the edges: one product.
        shares = self._shares(graph, weight, q, k, parameters, self.heads == "mean" and v.dim() < 3)
        if shares.dim() == 1:
            return spmm(graph, shares, v)
        if v.dim() < 3:
            v = v.unsqueeze(1).expand(-1, shares.shape[1], *v.shape[1:])
        out = spmm(graph, shares, v)
        return out.mean(1) if self.heads == "mean" else out.flatten(1)
