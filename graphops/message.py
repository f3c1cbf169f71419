"""Message passing: one function for a layer, one for a full graph-network block, and well-known layers in a few lines each.

A message goes along an edge from j to i; i aggregates what comes in. Where the message is x_j times a number, `spmm` (here
``reference_operator``, or ``message=None``) does both at once and forms no value of F numbers at an edge.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from . import segment
from .attention import additive, normalise
from .errors import ArgumentError, ArgumentTypeError, unknown_name
from .graph import Graph
from .pattern import Segments
from .rewire import transition
from .segment import check_values, column, gather, spmm

__all__ = [
    "AGGREGATIONS",
    "GATConv",
    "GCNConv",
    "GINConv",
    "GraphState",
    "SAGEConv",
    "graph_network",
    "message_passing",
    "reference_operator",
]

Aggregation = str | Callable[[Segments, Tensor], Tensor]
"""A name of ``AGGREGATIONS``, or a function of segments and values ``(E, ...)`` that returns ``(size, ...)``."""

AGGREGATIONS: dict[str, Callable[[Segments, Tensor], Tensor]] = {
    "sum": segment.sum,
    "mean": segment.mean,
    "max": partial(segment.max, fill=0.0),
    "min": partial(segment.min, fill=0.0),
    "std": segment.std,
}
"""Each gives 0 where there is nothing to aggregate, so that a node without neighbours passes finite values on."""


def aggregated(how: Aggregation, segments: Segments, values: Tensor) -> Tensor:
    """``values`` brought together in each segment."""
    if not isinstance(how, str):
        return how(segments, values)
    if how not in AGGREGATIONS:
        raise unknown_name("aggregation", how, AGGREGATIONS)
    return AGGREGATIONS[how](segments, values)


def message_passing(
    graph: Graph,
    x: Tensor | tuple[Tensor, Tensor],
    message: Callable[[Tensor, Tensor, Any], Tensor] | None = None,
    update: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    edge: Any = None,
    aggregate: Aggregation = "sum",
) -> Tensor:
    """update(x_i, aggregate over edges e from j to i of message(x_i, x_j, edge_e)) (Gilmer et al. 2017, eq. 1 and 2).

    Args:
        x: ``(n, ...)``; of a bipartite graph ``(x_source, x_target)``.
        message: a function of x_i, x_j ``(E, ...)`` and ``edge`` that returns ``(E, ...)``; None: x_j itself, whose sum and
            mean form nothing at the edges.
        update: a function of x_i ``(n, ...)`` and of what was aggregated; None: the latter.
        edge: what stands at the edges, ``(E, ...)`` in their order or whatever ``message`` takes.
        aggregate: sum, mean, max, min, std, or a function of segments and messages.

    Raises ``ArgumentError`` for x of another number of nodes or messages of another number of edges.
    """
    source, target = x if isinstance(x, tuple) else (x, x)
    check_values(source, graph.num_sources, graph.device, "x", "sources")
    check_values(target, graph.num_targets, graph.device, "x", "targets")
    if message is None and aggregate in ("sum", "mean"):
        incoming = spmm(graph, None, source)
        if aggregate == "mean":
            incoming = incoming / column(segment.counts_of(graph.incoming, incoming).clamp(min=1), incoming)
    else:
        sent = gather(graph.outgoing, source)
        if message is not None:
            sent = message(gather(graph.incoming, target), sent, edge)
        check_values(sent, graph.num_edges, graph.device, "message", "E, edges")
        incoming = aggregated(aggregate, graph.incoming, sent)
    return incoming if update is None else update(target, incoming)


def reference_operator(graph: Graph, x: Tensor, theta: Tensor | None = None) -> Tensor:
    """R x theta with R of the graph's sparsity, its entries the weights (1 without): ``(n, F), (F, G) -> (n, G)``.

    Of the two products that with fewer numbers goes first. R is what one makes the weights: ``transition(graph)`` that of
    the GCN, ``graph.with_weight(a)`` one of attention a; a sum of powers of R is ``rewire.diffuse``.
    """
    if theta is None:
        return spmm(graph, graph.weight, x)
    if theta.dim() != 2 or x.dim() != 2 or x.shape[1] != theta.shape[0]:
        raise ArgumentError(f"x and theta must be (n, F) and (F, G), not {tuple(x.shape)} and {tuple(theta.shape)}")
    if theta.shape[0] < theta.shape[1]:
        return spmm(graph, graph.weight, x) @ theta
    return spmm(graph, graph.weight, x @ theta)


# --- graph networks --------------------------------------------------------------------------------------------------


class GraphState(NamedTuple):
    """What a graph network reads and writes: nodes ``(n, ...)``, edges ``(E, ...)``, globals ``(graphs, ...)``, or None."""

    nodes: Tensor | None = None
    edges: Tensor | None = None
    globals: Tensor | None = None


Update = Callable[..., Tensor]


def graph_network(
    graph: Graph,
    state: GraphState,
    *,
    update_edges: Update | None = None,
    update_nodes: Update | None = None,
    update_globals: Update | None = None,
    edges_to_nodes: Aggregation = "sum",
    edges_to_globals: Aggregation = "sum",
    nodes_to_globals: Aggregation = "sum",
) -> GraphState:
    """A graph-network block (Battaglia et al. 2018, section 3.2, algorithm 1), over each graph of a batch by itself.

    In turn, each skipped where its update is None::

        e'_k = update_edges(e_k, v_target, v_source, u)
        v'_i = update_nodes(edges_to_nodes of e' into i, v_i, u)
        u'   = update_globals(edges_to_globals of e', nodes_to_globals of v', u)

    Updates get all their rows at once, u repeated for each edge or node, and None for what ``state`` has not. ``globals`` has a
    row a graph, one if the graph is no batch. Raises ``ArgumentError`` for a wrong number of rows.
    """
    nodes, edges, whole = state
    parts = (("nodes", nodes, graph._square("graph_network")), ("edges", edges, graph.num_edges))
    for name, value, count in (*parts, ("globals", whole, graph.node_groups.size)):
        if value is not None:
            check_values(value, count, graph.device, name, name if name != "globals" else "graphs")

    def at(segments: Segments, values: Tensor | None) -> Tensor | None:
        return None if values is None else gather(segments, values)

    def into(how: Aggregation, segments: Segments, values: Tensor | None) -> Tensor | None:
        return None if values is None else aggregated(how, segments, values)

    if update_edges is not None:
        ends = at(graph.incoming, nodes), at(graph.outgoing, nodes)
        edges = rows(update_edges(edges, *ends, at(graph.edge_groups, whole)), graph.num_edges, "update_edges")
    if update_nodes is not None:
        arrived = into(edges_to_nodes, graph.incoming, edges)
        nodes = rows(update_nodes(arrived, nodes, at(graph.node_groups, whole)), graph.num_targets, "update_nodes")
    if update_globals is not None:
        both = into(edges_to_globals, graph.edge_groups, edges), into(nodes_to_globals, graph.node_groups, nodes)
        whole = rows(update_globals(*both, whole), graph.node_groups.size, "update_globals")
    return GraphState(nodes, edges, whole)


def rows(value: Any, count: int, what: str) -> Tensor:
    """What an update returned, of ``count`` rows."""
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{what} must return a tensor, not {type(value).__name__}")
    if value.dim() == 0 or value.shape[0] != count:
        raise ArgumentError(f"{what} returned shape {tuple(value.shape)}; its first dimension must be {count}")
    return value


# --- layers ----------------------------------------------------------------------------------------------------------
# Their parameters have PyG's names and shapes: `load_state_dict` takes those of a trained PyG layer.


def projection(inputs: int, outputs: int) -> nn.Linear:
    """A matrix without bias, drawn as Glorot & Bengio 2010."""
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.xavier_uniform_(linear.weight)
    return linear


class GCNConv(nn.Module):
    """D^-1/2 (W + I) D^-1/2 x theta + b (Kipf & Welling 2017, eq. 2): ``(n, in_channels) -> (n, out_channels)``.

    ``normalize=False`` takes the graph's weights as they are: those of ``rewire.transition(graph)``, worked out once for all
    layers and epochs, give the same.
    """

    def __init__(self, in_channels: int, out_channels: int, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize
        self.lin = projection(in_channels, out_channels)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        graph = transition(graph, dtype=x.dtype) if self.normalize else graph
        return reference_operator(graph, x, self.lin.weight.t()) + self.bias


class GATConv(nn.Module):
    """Attention of softmax(LeakyReLU(a_1 . W x_i + a_2 . W x_j)) over incoming edges (Velickovic et al. 2018, eq. 3 to 6).

    ``(n, in_channels) -> (n, heads * out_channels)``, or ``(n, out_channels)`` with ``concat=False``, which averages heads.
    ``dropout``: of the attention, in training. ``add_self_loops``: one loop a node instead of those that there are.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int = 1,
        concat: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        add_self_loops: bool = True,
    ) -> None:
        super().__init__()
        self.concat, self.negative_slope, self.dropout, self.add_self_loops = concat, negative_slope, dropout, add_self_loops
        self.lin = projection(in_channels, heads * out_channels)
        self.att_src, self.att_dst = (nn.Parameter(torch.empty(1, heads, out_channels)) for _ in range(2))
        nn.init.xavier_uniform_(self.att_src)
        nn.init.xavier_uniform_(self.att_dst)
        self.bias = nn.Parameter(torch.zeros(heads * out_channels if concat else out_channels))

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        if self.add_self_loops:
            graph = graph.with_weight(None).remove_self_loops().add_self_loops()
        h = self.lin(x).unflatten(1, self.att_src.shape[1:])
        scores = additive(graph, (h * self.att_dst).sum(-1), (h * self.att_src).sum(-1), self.negative_slope)
        out = spmm(graph, dropout(normalise(graph, scores), self.dropout, self.training), h)
        return (out.flatten(1) if self.concat else out.mean(1)) + self.bias


class SAGEConv(nn.Module):
    """W_1 (mean of the neighbours) + b + W_2 x (Hamilton et al. 2017, algorithm 1): ``(n, in_channels) -> (n, out_channels)``.

    ``aggr`` is any aggregation. Of a bipartite graph, ``x`` is ``(x_source, x_target)``.
    """

    def __init__(self, in_channels: int, out_channels: int, aggr: Aggregation = "mean") -> None:
        super().__init__()
        self.aggr = aggr
        self.lin_l = nn.Linear(in_channels, out_channels)
        self.lin_r = nn.Linear(in_channels, out_channels, bias=False)

    def forward(self, x: Tensor | tuple[Tensor, Tensor], graph: Graph) -> Tensor:
        return message_passing(graph, x, update=lambda x, m: self.lin_l(m) + self.lin_r(x), aggregate=self.aggr)


class GINConv(nn.Module):
    """nn((1 + eps) x_i + sum of the neighbours) (Xu et al. 2019, eq. 4.1); ``train_eps`` makes eps a parameter."""

    def __init__(self, nn: nn.Module, eps: float = 0.0, train_eps: bool = False) -> None:
        super().__init__()
        self.nn = nn
        value = torch.tensor([float(eps)])
        if train_eps:
            self.eps = torch.nn.Parameter(value)
        else:
            self.register_buffer("eps", value)

    def forward(self, x: Tensor, graph: Graph) -> Tensor:
        return message_passing(graph, x, update=lambda x, m: self.nn((1 + self.eps) * x + m))
