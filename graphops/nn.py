"""Graph diffusion as a layer: encoder, a solve of the diffusion, decoder. The one file here that knows `solvers`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from solvers import Stats, Status, solve
from solvers.nn import ODEBlock

from .errors import ArgumentError, ArgumentTypeError, unknown_name
from .fields import (
    LinearDiffusion,
    NonlinearDiffusion,
    PenalisedField,
    attention_named,
    laplacian_diffusion,
    rewired,
    trusted_source,
)
from .graph import Graph
from .segment import spmm

__all__ = ["FIELDS", "SOURCES", "GraphDiffusion"]

FIELDS = {"linear": "exp_linear", "laplacian": "exp_linear", "nonlinear": "dopri5", "rewired": "dopri5"}
"""Kinds of field, and the method of each if none is chosen."""

SOURCES = {"x0": 0.0, "printed": 1.0, "degree": 1.0}
"""Kinds of source, and where the factor of each starts."""

KEPT_GRAPHS = 4
"""Graphs kept with their order of edges: enough for training and evaluation on different ones in turn."""


class GraphDiffusion(nn.Module):
    """Linear encoder, diffusion of its output to ``time``, ReLU, linear decoder (Chamberlain et al. 2021, GRAND).

    Args:
        in_channels, hidden_channels, out_channels: features of nodes outside, during the diffusion, and after the decoder.
        time: T > 0, a number, or a ``Parameter`` that is then learned.
        field: ``"linear"`` (A of the encoded nodes throughout), ``"nonlinear"`` (A of the state), ``"rewired"`` (the same on
            the edges whose attention exceeds ``rho`` at the start of each forward pass: in full-batch training that of an
            epoch), ``"laplacian"`` (no attention).
        method: of `solve`; None: ``"exp_linear"``, exact in time, for the first and last, else ``"dopri5"``.
        attention: a name of ``fields.ATTENTIONS``, or an ``EdgeAttention`` (or any function of graph and state) of one's own.
        alpha: rate of the diffusion, learned as a sigmoid from 1/2: ``"scalar"``, ``"channel"``, or None: 1 throughout.
        source: None; ``"x0"``: beta x(0), beta learned from 0, x(0) a constant to the gradient as in GRAND's code, without which
            Cora is overfitted sooner; ``"printed"`` or ``"degree"``: beta times GRAND++'s ``trusted_source``, divided by
            degrees in the latter, beta learned from 1.
        rho: of ``"rewired"``.
        self_loops: weight of the loops that nodes without one get, where the graph has weights at all; None: no loops.
        input_dropout, dropout: before the encoder; before the decoder.
        penalties: factor of each of ``fields.PENALTIES`` along the solution, summed up in ``penalty`` while training.
        **solve_options: of `solve`: ``dt``, ``rtol``, ``adjoint``, ``observer``, ...

    Attributes:
        stats: of the last solve; None before.
        penalty: of the last forward pass in training mode, 0-dim, to be added to a loss; None without penalties.

    Raises, when it is built: ``ArgumentError`` for T <= 0 and what does not fit together, ``UnknownNameError`` with the nearest
    name, and what `solve` raises for a method or option, such as ``exp_linear`` for a field that is not linear.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        out_channels: int,
        time: float | nn.Parameter = 1.0,
        *,
        field: str = "linear",
        method: Any = None,
        attention: Any = "dot_product",
        alpha: str | None = "scalar",
        source: str | None = None,
        rho: float | None = None,
        self_loops: float | None = 1.0,
        input_dropout: float = 0.0,
        dropout: float = 0.0,
        penalties: Mapping[str, float] | None = None,
        **solve_options: Any,
    ) -> None:
        super().__init__()
        check_choices(time, field, alpha, source, rho)
        self.time, self.field, self.source, self.rho, self.self_loops = time, field, source, rho, self_loops
        self.method = FIELDS[field] if method is None else method
        self.input_dropout, self.dropout = input_dropout, dropout
        self.penalties, self.options = dict(penalties or {}), solve_options
        self.encoder, self.decoder = nn.Linear(in_channels, hidden_channels), nn.Linear(hidden_channels, out_channels)
        self.attention: Any = None
        if field != "laplacian":
            self.attention = attention_named(attention, hidden_channels) if isinstance(attention, str) else attention
        shape = (hidden_channels,) if alpha == "channel" else ()
        self.raw_alpha = None if alpha is None else nn.Parameter(torch.zeros(shape))
        self.beta = None if source is None else nn.Parameter(torch.tensor(SOURCES[source]))
        self.stats: Stats | None = None
        self.penalty: Tensor | None = None
        self._graphs: list[tuple[tuple[Any, ...], tuple[Any, ...], Graph]] = []
        self._check_solve()

    def _check_solve(self) -> None:
        """Raise what `solve` would about method and options, by a field of this kind on one node."""
        graph = Graph(torch.zeros(2, 1, dtype=torch.int64), 1)
        linear = FIELDS[self.field] == "exp_linear"
        weight = torch.ones(1)
        field: Any = LinearDiffusion(graph, weight) if linear else NonlinearDiffusion(graph, lambda graph, x: weight)
        ODEBlock(PenalisedField(field, list(self.penalties)) if self.penalties else field, (0.0, 1.0), **self._solve_options())

    def _solve_options(self) -> dict[str, Any]:
        return {"method": self.method, **self.options}

    # --- the graph ---------------------------------------------------------------------------------------------------

    def graph_of(self, edges: Tensor | Graph, nodes: int, weight: Tensor | None = None) -> Graph:
        """The graph with its loops, sorted; kept for the next call with the same, unchanged tensors."""
        if not isinstance(edges, (Tensor, Graph)):
            raise ArgumentTypeError(f"edges must be an edge_index (2, E) or a Graph, not {type(edges).__name__}")
        parts: tuple[Any, ...] = (edges.edge_index, edges.weight) if isinstance(edges, Graph) else (edges, weight)
        # Values in place are told by their version: an edge_index that is written to is another graph.
        state = (nodes, *(None if part is None or part.is_inference() else part._version for part in parts))
        for old, was, graph in self._graphs:
            if was == state and all(a is b for a, b in zip(old, parts)):
                return graph
        graph = self._prepared(edges if isinstance(edges, Graph) else Graph(edges, nodes, weight), nodes)
        # A learned weight would bring its graph of gradients along, or, without gradients now, lose it for later calls;
        # tensors of inference mode could not be used in training.
        learned = parts[1] is not None and parts[1].requires_grad
        if not learned and not torch.is_inference_mode_enabled():
            self._graphs = [*self._graphs[1 - KEPT_GRAPHS :], (parts, state, graph)]
        return graph

    def _prepared(self, graph: Graph, nodes: int) -> Graph:
        if graph.num_nodes != nodes:
            raise ArgumentError(f"x has {nodes} nodes and the graph {graph.num_nodes}: give both of the same nodes")
        if self.self_loops is not None:
            graph = graph.add_self_loops(None if graph.weight is None else self.self_loops)
        return graph.sort()

    def __getstate__(self) -> dict[str, Any]:
        """Graphs are not part of what is copied or saved."""
        return {**self.__dict__, "_graphs": []}

    # --- the three parts ---------------------------------------------------------------------------------------------

    def encode(self, x: Tensor | Graph) -> Tensor:
        """``(n, in_channels) -> (n, hidden_channels)``; of a graph from features to nodes, at the cost of its edges."""
        if isinstance(x, Graph):  # a product with a matrix whose zeros are left out; dropout leaves zeros what they are
            weight = dropout(x.weight, self.input_dropout, self.training)  # type: ignore[arg-type]
            return spmm(x, weight, self.encoder.weight.t()) + self.encoder.bias
        return self.encoder(dropout(x, self.input_dropout, self.training))

    def decode(self, z: Tensor) -> Tensor:
        """``(n, hidden_channels) -> (n, out_channels)``."""
        return self.decoder(dropout(z.relu(), self.dropout, self.training))

    def field_of(self, graph: Graph, z: Tensor, trusted: Tensor | None = None) -> LinearDiffusion | NonlinearDiffusion:
        """The field of the diffusion that starts from ``z`` on a graph that has its loops."""
        alpha = 1.0 if self.raw_alpha is None else torch.sigmoid(self.raw_alpha)
        source = self._source(graph, z, trusted)
        if self.attention is None:
            return laplacian_diffusion(graph, alpha, source)
        if self.field == "linear":
            return LinearDiffusion(graph, self.attention(graph, z), alpha, source)
        if self.rho is not None:
            graph = rewired(graph, self.attention, z, self.rho)
        return NonlinearDiffusion(graph, self.attention, alpha, source)

    def _source(self, graph: Graph, z: Tensor, trusted: Tensor | None) -> Tensor | None:
        if self.beta is None:
            return None
        if self.source == "x0":
            return self.beta * z.detach()
        if trusted is None:
            raise ArgumentError(f"source={self.source!r} needs trusted=, the mask of the nodes whose labels are known")
        by = graph.degree(weighted=graph.weight is not None) if self.source == "degree" else None
        return self.beta * trusted_source(z, trusted, by)

    def diffuse(self, z: Tensor, edges: Tensor | Graph, trusted: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """The state at ``time`` from ``z`` at 0: ``(n, hidden_channels) -> (n, hidden_channels)``."""
        field: Any = self.field_of(self.graph_of(edges, z.shape[0], weight), z, trusted)
        start: Any = z
        penalised = self.penalties and self.training
        if penalised:
            field = PenalisedField(field, list(self.penalties))
            start = (z, field.zeros(z))
        solution = solve(field, start, [0.0, self.time], **self._solve_options())
        self.stats = solution.stats
        stopped = int(solution.status) == Status.STOPPED  # by an observer: what comes after is not there
        end = solution.last.y if stopped else solution.y
        if penalised:
            end, totals = end
            totals = totals if stopped else totals[-1]
            self.penalty = sum(factor * total for factor, total in zip(self.penalties.values(), totals))
        return end if stopped else end[-1]

    def forward(self, x: Any, edges: Tensor | Graph | None = None, *, trusted: Tensor | None = None) -> Tensor:
        """``(n, in_channels) -> (n, out_channels)`` for ``edges``, an ``edge_index`` ``(2, E)`` or a ``Graph``.

        Or ``x`` alone: data with features ``x`` and a ``graph``, or an ``edge_index`` and, if there, ``edge_weight`` (PyG). The
        graph may be another one at each call. ``x`` may be a bipartite graph from features to nodes, such as
        ``NodeData.features``: faster where most are 0. ``trusted`` ``(n,)``: mask of the nodes of GRAND++'s source.

        Raises ``ArgumentError`` without edges, without ``trusted`` where the source needs it, or for another number of nodes.
        """
        weight = None
        if edges is None:
            if not hasattr(x, "x") or not (hasattr(x, "graph") or hasattr(x, "edge_index")):
                raise ArgumentError(f"edges is None and {type(x).__name__} has no graph: layer(x, edge_index) or layer(data)")
            data, x = x, x.x
            edges = data.graph if hasattr(data, "graph") else data.edge_index
            weight = None if hasattr(data, "graph") else getattr(data, "edge_weight", None)
        self._check_features(x)
        return self.decode(self.diffuse(self.encode(x), edges, trusted, weight))

    def _check_features(self, x: Any) -> None:
        """Raise ``ArgumentError`` for what is no matrix of ``in_channels`` columns."""
        sparse = isinstance(x, Graph)
        shape = (x.num_targets, x.num_sources) if sparse else tuple(x.shape) if isinstance(x, Tensor) else ()
        if len(shape) != 2 or shape[1] != self.encoder.in_features or (sparse and x.weight is None):
            found = f"a graph from {shape[1]} features" if sparse else shape or type(x).__name__
            raise ArgumentError(
                f"x must be features (n, {self.encoder.in_features}) of the nodes, or a weighted graph from them, not {found}"
            )

    def extra_repr(self) -> str:
        time = self.time if isinstance(self.time, (float, int)) else "learned"
        return f"field={self.field!r}, method={self.method!r}, time={time}, source={self.source!r}"


def check_choices(time: Any, field: str, alpha: str | None, source: str | None, rho: float | None) -> None:
    """Choices of a layer that are not for `solve` to check."""
    if isinstance(time, Tensor) and not isinstance(time, nn.Parameter):
        raise ArgumentTypeError("time must be a number, or a Parameter to be learned: use float(time)")
    end = float(time.detach() if isinstance(time, Tensor) else time)
    if not 0 < end < math.inf:
        raise ArgumentError(f"time = {end}: the diffusion ends at a finite time after 0")
    for name, value, known in (("field", field, FIELDS), ("source", source, SOURCES), ("alpha", alpha, ("scalar", "channel"))):
        if value not in known and not (value is None and name != "field"):
            raise unknown_name(name, value, known)
    if (field == "rewired") != (rho is not None):
        raise ArgumentError(f"rho = {rho} with field={field!r}: the threshold belongs to 'rewired', which needs it")
