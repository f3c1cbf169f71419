"""Graph: edges with their CSR form, its transpose and the permutations between, checked once when it is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph
import torch
from torch import Tensor

from . import autograd, convert, generate
from .errors import ArgumentError, ArgumentTypeError, UnsupportedError
from .pattern import Pattern, Segments

__all__ = ["Graph"]

MERGES = {"sum": "sum", "mean": "mean", "max": "amax", "min": "amin"}


@dataclass(frozen=True, eq=False, repr=False)
class Graph:
    """A directed graph; edge e goes from ``edge_index[0, e]``, its source, to ``edge_index[1, e]``, its target.

    ``edge_index``: ``(2, E)`` int64, in any order; parallel edges and self-loops are kept. ``num_nodes``: n, or
    ``(sources, targets)`` of a bipartite graph, or None for the largest index plus one. ``weight``: ``(E,)`` floating point,
    finite, or None.

    **One rule of order**: values on edges, given or returned, are in the order of ``edge_index``. Kernels work in *stored*
    order, sorted by target: stored place p holds edge ``perm[p]``. A graph that comes sorted (``is_sorted``; those built by
    ``grid``, ``knn``, ``coalesce`` and ``sort`` do) saves the rearrangement of its values at every call.

    Everything is checked here, once, and nothing again in a kernel. Raises ``ArgumentTypeError`` for a wrong dtype,
    ``ArgumentError`` for a wrong shape, an index out of range, weights that are not finite, or tensors on two devices.
    """

    edge_index: Tensor
    num_nodes: int | tuple[int, int] | None = None
    weight: Tensor | None = None
    node_counts: tuple[int, ...] | None = field(default=None, kw_only=True)
    """Nodes of each graph of a batch, or None; set by ``Graph.batch``."""
    pattern: Pattern = field(init=False)
    """The matrix with an entry (target, source) an edge, shared by every graph of this topology."""

    def __post_init__(self) -> None:
        check_edges(self.edge_index)
        object.__setattr__(self, "num_nodes", checked_counts(self.edge_index, self.num_nodes))
        if self.weight is not None:
            check_weight(self.weight, self.edge_index)
            if not bool(self.weight.detach().isfinite().all()):
                raise ArgumentError("weight holds NaN or infinity: remove these edges or mend their weights")
        if self.node_counts is not None and sum(self.node_counts) != self.num_nodes:
            raise ArgumentError(f"node_counts add up to {sum(self.node_counts)}, not to num_nodes = {self.num_nodes}")
        object.__setattr__(self, "pattern", self._new_pattern())

    def __repr__(self) -> str:
        weights = "" if self.weight is None else ", weighted"
        graphs = "" if self.node_counts is None else f", {len(self.node_counts)} graphs"
        return f"Graph({self.num_nodes} nodes, {self.num_edges} edges{weights}{graphs}, {self.device})"

    # --- what it is --------------------------------------------------------------------------------------------------

    @property
    def _nodes(self) -> int | tuple[int, int]:
        """``num_nodes``, which is None no more once the graph is built."""
        return cast("int | tuple[int, int]", self.num_nodes)

    @property
    def num_edges(self) -> int:
        return self.edge_index.shape[1]

    @property
    def num_sources(self) -> int:
        return self._nodes[0] if isinstance(self._nodes, tuple) else self._nodes

    @property
    def num_targets(self) -> int:
        return self._nodes[1] if isinstance(self._nodes, tuple) else self._nodes

    @property
    def is_bipartite(self) -> bool:
        """Whether sources and targets are two sets of nodes."""
        return isinstance(self.num_nodes, tuple)

    @property
    def device(self) -> torch.device:
        return self.edge_index.device

    @property
    def source(self) -> Tensor:
        """Source of each edge, ``(E,)``."""
        return self.edge_index[0]

    @property
    def target(self) -> Tensor:
        """Target of each edge, ``(E,)``."""
        return self.edge_index[1]

    @property
    def incoming(self) -> Segments:
        """The edges into each node: what ``graphops.sum(g, values)`` and its like reduce over."""
        return self.pattern.rows

    @property
    def outgoing(self) -> Segments:
        """The edges out of each node."""
        return self.pattern.columns

    @property
    def is_sorted(self) -> bool:
        """Whether the edges came sorted by target."""
        return self.incoming.order is None

    @cached_property
    def perm(self) -> Tensor:
        """The edge at each stored place, ``(E,)``: ``values[g.perm]`` is sorted by target."""
        order = self.incoming.order
        return torch.arange(self.num_edges, device=self.device) if order is None else order

    @cached_property
    def is_symmetric(self) -> bool:
        """Whether the edges from i to j weigh together what those from j to i do, up to rounding; read once."""
        count = self._square("is_symmetric")
        weight = torch.ones(self.num_edges, device=self.device) if self.weight is None else self.weight.detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        ways = torch.cat([self.source * count + self.target, self.target * count + self.source])
        pairs, place = torch.unique(ways, return_inverse=True)
        size = weight.new_zeros(pairs.shape).index_add(0, place, weight.abs().repeat(2))
        difference = weight.new_zeros(pairs.shape).index_add(0, place, torch.cat([weight, -weight]))
        return bool((difference.abs() <= 100 * torch.finfo(weight.dtype).eps * size).all())

    @cached_property
    def is_nonnegative(self) -> bool:
        """Whether no weight is below 0 (nor NaN); read once."""
        return self.weight is None or bool((self.weight.detach() >= 0).all())

    @property
    def batch_index(self) -> Tensor:
        """The graph of a batch that each node belongs to, ``(n,)`` int64, as `solve(batch_index=)` takes it."""
        counts = (self._square("batch_index"),) if self.node_counts is None else self.node_counts
        return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(self.device)

    @cached_property
    def node_groups(self) -> Segments:
        """The nodes of each graph of a batch: ``graphops.mean(g.node_groups, x)`` is one row a graph."""
        return Segments(self.batch_index, 1 if self.node_counts is None else len(self.node_counts))

    @cached_property
    def edge_groups(self) -> Segments:
        """The edges of each graph of a batch."""
        return Segments(self.batch_index[self.target], self.node_groups.size)

    def degree(self, direction: str = "in", weighted: bool = False) -> Tensor:
        """Edges into (``"in"``) or out of (``"out"``) each node, ``(n,)`` int64; ``weighted`` adds their weights instead."""
        if direction not in ("in", "out"):
            raise ArgumentError(f"direction must be 'in' or 'out', not {direction!r}")
        segments = self.incoming if direction == "in" else self.outgoing
        if not weighted:
            return segments.counts.clone()
        if self.weight is None:
            raise ArgumentError("the graph has no weights to add: with_weight gives it some, or leave weighted out")
        return autograd.total(segments, self.weight)

    # --- the same topology -------------------------------------------------------------------------------------------

    def _new_pattern(self) -> Pattern:
        return Pattern(Segments(self.target, self.num_targets), Segments(self.source, self.num_sources))

    def _unchecked(self, **changes: Any) -> Graph:
        """A copy with ``changes`` that need no check; a pattern of its own if the edges change and none is given."""
        other = object.__new__(Graph)
        kept = {name: getattr(self, name) for name in self.__dataclass_fields__}
        other.__dict__.update(kept | changes)
        if "edge_index" in changes and "pattern" not in changes:
            other.__dict__["pattern"] = other._new_pattern()
        return other

    def with_weight(self, weight: Tensor | None) -> Graph:
        """The same edges with other weights ``(E,)``, in the order of ``edge_index``; the topology is shared, not copied.

        Shape, dtype and device are checked, the values are not: inside a differentiable computation that would wait for the
        device at every call.
        """
        if weight is not None:
            check_weight(weight, self.edge_index)
        return self._unchecked(weight=weight)

    def to(self, device: torch.device | str) -> Graph:
        """The graph on another device, with what is worked out so far."""
        weight = None if self.weight is None else self.weight.to(device)
        return self._unchecked(edge_index=self.edge_index.to(device), weight=weight, pattern=self.pattern.to(device))

    @cached_property
    def _reversed(self) -> Graph:
        nodes = self.num_nodes[::-1] if isinstance(self.num_nodes, tuple) else self.num_nodes
        return self._unchecked(edge_index=self.edge_index.flip(0), num_nodes=nodes, pattern=self.pattern.transposed)

    def reverse(self) -> Graph:
        """Every edge turned round, in the same order: products with it are those with the transposed matrix."""
        return self._reversed

    @cached_property
    def _sorted(self) -> Graph:
        edges = self.edge_index[:, self.perm]
        return self._unchecked(edge_index=edges, weight=None, pattern=self.pattern.stored_pattern)

    def sort(self, weighted: bool = True) -> Graph:
        """The graph with its edges sorted by target; its edge p is edge ``perm[p]`` of this one. Itself if it is sorted.

        The topology is kept, the weights are taken anew at each call, so that they may learn; ``weighted=False`` leaves them.
        """
        if self.is_sorted:
            return self
        if self.weight is None or not weighted:
            return self._sorted
        return self._sorted.with_weight(self.weight[self.perm])

    # --- other edges -------------------------------------------------------------------------------------------------

    def _square(self, what: str) -> int:
        if isinstance(self._nodes, tuple):
            raise UnsupportedError(f"{what} needs one set of nodes; this graph is bipartite, {self._nodes}")
        return self._nodes

    def edge_subgraph(self, edges: Tensor) -> Graph:
        """All nodes with only the ``edges``: a mask ``(E,)`` or edge numbers, kept in that order."""
        weight = None if self.weight is None else self.weight[edges]
        return self._unchecked(edge_index=self.edge_index[:, edges], weight=weight)

    def add_self_loops(self, fill: float | None = None) -> Graph:
        """One loop appended for each node that has none; ``fill`` is their weight, needed if the graph has weights.

        Loops that are there stay as they are.
        """
        count = self._square("add_self_loops")
        if (self.weight is None) != (fill is None):
            remedy = "give fill, the weight of a loop" if fill is None else "leave fill out, or give the graph weights first"
            raise ArgumentError(f"fill = {fill} on a graph with{'' if self.weight is not None else 'out'} weights: {remedy}")
        missing = torch.ones(count, dtype=torch.bool, device=self.device)
        missing[self.source[self.source == self.target]] = False
        loops = missing.nonzero()[:, 0]
        weight = None
        if self.weight is not None and fill is not None:
            weight = torch.cat([self.weight, self.weight.new_full(loops.shape, fill)])
        return self._unchecked(edge_index=torch.cat([self.edge_index, loops.expand(2, -1)], 1), weight=weight)

    def remove_self_loops(self) -> Graph:
        """Without the edges from a node to itself."""
        self._square("remove_self_loops")
        return self.edge_subgraph(self.source != self.target)

    def coalesce(self, reduce: str = "sum") -> Graph:
        """Parallel edges merged into one, sorted by target and then source; weights by ``reduce``: sum, mean, max, min."""
        if reduce not in MERGES:
            raise ArgumentError(f"reduce must be one of {', '.join(MERGES)}, not {reduce!r}")
        keys, place = torch.unique(self.target * max(self.num_sources, 1) + self.source, return_inverse=True)
        edges = torch.stack([keys % max(self.num_sources, 1), keys // max(self.num_sources, 1)])
        weight = None
        if self.weight is not None:
            start = self.weight.new_zeros(keys.shape)
            weight = start.scatter_reduce(0, place, self.weight, MERGES[reduce], include_self=False)
        return self._unchecked(edge_index=edges, weight=weight)

    def to_undirected(self, reduce: str = "mean") -> Graph:
        """Each edge in both directions, once, sorted by target; the weights of what is merged by ``reduce``.

        With the mean a symmetric graph stays what it is; PyG's function adds, which doubles its weights. Loops count once.
        Both directions get the same number, to the last bit.
        """
        self._square("to_undirected")
        pairs = self._unchecked(edge_index=self.edge_index.sort(0).values).coalesce(reduce)
        back = pairs.edge_subgraph(pairs.source != pairs.target)
        weight = None if pairs.weight is None or back.weight is None else torch.cat([pairs.weight, back.weight])
        return self._unchecked(edge_index=torch.cat([pairs.edge_index, back.edge_index.flip(0)], 1), weight=weight).coalesce()

    def subgraph(self, nodes: Tensor) -> Graph:
        """The ``nodes``, a mask ``(n,)`` or distinct numbers, and the edges among them; node i is then ``nodes[i]``."""
        count = self._square("subgraph")
        if nodes.dtype == torch.bool:
            if nodes.shape != (count,):
                raise ArgumentError(f"nodes as a mask must have shape ({count},), not {tuple(nodes.shape)}")
            nodes = nodes.nonzero()[:, 0]
        if nodes.numel() and not 0 <= int(nodes.min()) <= int(nodes.max()) < count:
            raise ArgumentError(f"nodes must be in [0, {count}), not from {int(nodes.min())} to {int(nodes.max())}")
        number = torch.full((count,), -1, device=self.device)
        number[nodes] = torch.arange(nodes.numel(), device=self.device)
        if int((number >= 0).sum()) != nodes.numel():
            raise ArgumentError("nodes names a node twice: use nodes.unique()")
        edges = number[self.edge_index]
        kept = (edges >= 0).all(0)
        weight = None if self.weight is None else self.weight[kept]
        return self._unchecked(edge_index=edges[:, kept], num_nodes=nodes.numel(), weight=weight, node_counts=None)

    def largest_component(self) -> tuple[Graph, Tensor]:
        """The largest weakly connected component, the first of equals, and its nodes' numbers here, ascending."""
        count = self._square("largest_component")
        source, target = self.edge_index.cpu().numpy()
        matrix = scipy.sparse.coo_array((np.ones(len(source)), (source, target)), shape=(count, count)).tocsr()
        labels = scipy.sparse.csgraph.connected_components(matrix, directed=True, connection="weak")[1]
        chosen = labels == np.bincount(labels, minlength=1).argmax()
        nodes = torch.from_numpy(np.flatnonzero(chosen)).to(self.device)
        return self.subgraph(nodes), nodes

    # --- batches -----------------------------------------------------------------------------------------------------

    @staticmethod
    def batch(graphs: Sequence[Graph]) -> Graph:
        """One graph of several side by side, their nodes and edges in turn; ``batch_index`` tells them apart.

        Raises ``ArgumentError`` if there is none, or only some have weights; ``UnsupportedError`` for bipartite ones.
        """
        if not graphs:
            raise ArgumentError("graphs is empty: a batch needs at least one graph")
        counts = [g._square("batch") for g in graphs]
        weights = [g.weight for g in graphs if g.weight is not None]
        if len(weights) not in (0, len(graphs)):
            raise ArgumentError(f"{len(weights)} of {len(graphs)} graphs have weights: give all of them some, or none")
        starts = np.cumsum([0, *counts[:-1]]).tolist()
        edges = torch.cat([g.edge_index + start for g, start in zip(graphs, starts)], 1)
        return Graph(edges, sum(counts), torch.cat(weights) if weights else None, node_counts=tuple(counts))

    def unbatch(self) -> list[Graph]:
        """The graphs of a batch, each with its edges in the order that they have here. Itself alone if it is no batch."""
        if self.node_counts is None:
            return [self]
        graphs = []
        owner = self.batch_index[self.target]
        for number, count in enumerate(self.node_counts):
            start = sum(self.node_counts[:number])
            part = self.edge_subgraph(owner == number)
            graphs.append(part._unchecked(edge_index=part.edge_index - start, num_nodes=count, node_counts=None))
        return graphs

    # --- made from and into ------------------------------------------------------------------------------------------

    @classmethod
    def grid(
        cls, shape: Sequence[int], periodic: bool | Sequence[bool] = False, device: torch.device | str | None = None
    ) -> Graph:
        """A grid of nodes with edges in both directions between neighbours along each axis; the last axis runs fastest.

        ``periodic``: whether each axis is closed. A closed axis of two nodes has each edge twice, as a stencil reads it.
        """
        edges = generate.grid_edges(shape, periodic, device)
        return cls(edges, int(np.prod(shape)))

    @classmethod
    def knn(cls, points: Tensor, k: int) -> Graph:
        """Edges from the ``k`` nearest other points (Euclidean) to each of ``points`` ``(n, dimensions)``, by a KD-tree."""
        return cls(generate.knn_edges(points, k), points.shape[0])

    @classmethod
    def from_pyg(cls, data: Any, weight: str = "edge_weight") -> Graph:
        """Of a PyG ``Data``, with the attribute ``weight`` if there. Raises ``UnsupportedError`` for heterogeneous data."""
        return cls(*convert.from_pyg(data, weight))

    @classmethod
    def from_networkx(cls, graph: Any, weight: str | None = "weight") -> Graph:
        """Of a networkx graph, nodes numbered as it lists them; an undirected edge becomes two."""
        return cls(*convert.from_networkx(graph, weight))

    @classmethod
    def from_scipy(cls, matrix: Any) -> Graph:
        """Of a scipy sparse matrix ``A[source, target]``, its values as weights; bipartite if it is not square."""
        return cls(*convert.from_scipy(matrix))

    @classmethod
    def from_torch_sparse(cls, matrix: Tensor) -> Graph:
        """Of a sparse torch tensor ``A[source, target]``, its values as weights; bipartite if it is not square."""
        return cls(*convert.from_torch_sparse(matrix))

    def _edges(self) -> convert.Edges:
        return self.edge_index, self._nodes, self.weight

    def to_pyg(self, **attributes: Any) -> Any:
        """A PyG ``Data`` with these edges and the given attributes (``x=``, ``y=``, ...)."""
        self._square("to_pyg")
        return convert.to_pyg(self._edges(), attributes)

    def to_networkx(self) -> Any:
        """A networkx ``MultiDiGraph``."""
        self._square("to_networkx")
        return convert.to_networkx(self._edges())

    def to_scipy(self) -> Any:
        """A ``scipy.sparse.coo_array`` ``A[source, target]``, an entry an edge, 1 without weights."""
        return convert.to_scipy(self._edges())

    def to_torch_sparse(self) -> Tensor:
        """A sparse COO tensor ``A[source, target]``, an entry an edge, 1 without weights."""
        return convert.to_torch_sparse(self._edges())


def check_edges(edge_index: Any) -> None:
    """Type and shape of an edge index."""
    if not isinstance(edge_index, Tensor) or edge_index.dtype != torch.int64:
        found = getattr(edge_index, "dtype", type(edge_index).__name__)
        raise ArgumentTypeError(f"edge_index must be an int64 tensor, not {found}: use edge_index.long() or torch.tensor(...)")
    if edge_index.dim() != 2 or edge_index.shape[0] != 2:
        raise ArgumentError(f"edge_index must have shape (2, E), not {tuple(edge_index.shape)}: row 0 sources, row 1 targets")


def checked_counts(edge_index: Tensor, num_nodes: Any) -> int | tuple[int, int]:
    """Numbers of nodes that hold every index, worked out if None."""
    pair = tuple(num_nodes) if isinstance(num_nodes, (tuple, list)) else (num_nodes, num_nodes)
    if num_nodes is not None and (len(pair) != 2 or not all(is_count(n) for n in pair)):
        raise ArgumentTypeError(f"num_nodes must be an int, (sources, targets) or None, not {num_nodes!r}")
    ends = torch.stack([edge_index.amin(1), edge_index.amax(1)]).tolist() if edge_index.numel() else [[0, 0], [-1, -1]]
    low, high = min(ends[0]), ends[1]
    if low < 0:
        raise ArgumentError(f"edge_index holds the negative index {low}: nodes are numbered from 0")
    if num_nodes is None:
        return max(high) + 1
    for name, largest, count in zip(("source", "target"), high, pair):
        if count <= largest or count < 0:
            raise ArgumentError(f"num_nodes = {num_nodes} is too small for the {name} {largest}: give {largest + 1} or more")
    return (int(pair[0]), int(pair[1])) if isinstance(num_nodes, (tuple, list)) else int(num_nodes)


def is_count(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def check_weight(weight: Any, edge_index: Tensor) -> None:
    """Type, shape and device of weights."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        found = getattr(weight, "dtype", type(weight).__name__)
        raise ArgumentTypeError(f"weight must be a floating point tensor, not {found}: use weight.float()")
    if weight.shape != (edge_index.shape[1],):
        raise ArgumentError(f"weight must have shape (E,) = ({edge_index.shape[1]},), not {tuple(weight.shape)}")
    if weight.device != edge_index.device:
        raise ArgumentError(f"weight is on {weight.device}, edge_index on {edge_index.device}: move one of them")
