"""Edges out of and into other packages' graphs. Each optional package is imported only by the function that writes for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError, MissingPackageError, UnsupportedError

__all__ = ["Edges"]

Edges = tuple[Tensor, int | tuple[int, int], Tensor | None]
"""``edge_index`` ``(2, E)``, number of nodes, weights ``(E,)`` or None."""


def from_pyg(data: Any, weight: str = "edge_weight") -> Edges:
    """The edges of a PyG ``Data``; the attribute ``weight``, if there, has shape ``(E,)`` or ``(E, 1)``.

    Raises ``UnsupportedError`` for heterogeneous data, ``ArgumentError`` without an ``edge_index``.
    """
    if hasattr(data, "edge_types") or hasattr(data, "node_types"):
        raise UnsupportedError("heterogeneous PyG data has several kinds of edges: build a Graph of data[edge_type].edge_index")
    edge_index = getattr(data, "edge_index", None)
    if edge_index is None:
        raise ArgumentError("data has no edge_index; if it holds a transposed adjacency adj_t, build the graph from that matrix")
    weights = getattr(data, weight, None)
    if weights is not None and weights.dim() == 2 and weights.shape[1] == 1:
        weights = weights[:, 0]
    return edge_index, int(data.num_nodes), weights


def to_pyg(edges: Edges, attributes: dict[str, Any]) -> Any:
    """A PyG ``Data`` with ``edge_index``, ``num_nodes``, ``edge_weight`` if there are weights, and ``attributes``."""
    try:
        from torch_geometric.data import Data
    except ImportError as error:
        raise MissingPackageError("to_pyg needs PyG: pip install torch_geometric") from error
    edge_index, num_nodes, weights = edges
    if weights is not None:
        attributes = {"edge_weight": weights, **attributes}
    return Data(edge_index=edge_index, num_nodes=num_nodes, **attributes)


def from_networkx(graph: Any, weight: str | None = "weight") -> Edges:
    """The edges of a networkx graph, nodes numbered as it lists them; an undirected edge in both directions, a loop once.

    With ``weight`` the edge attribute of that name if any edge has it, 1 where one has none; float64.
    """
    number = {node: i for i, node in enumerate(graph.nodes)}
    pairs, values, weighted = [], [], False
    for source, target, attributes in graph.edges(data=True):
        weighted = weighted or weight in attributes
        ends = (number[source], number[target])
        both = [ends] if graph.is_directed() or ends[0] == ends[1] else [ends, ends[::-1]]
        pairs += both
        values += [float(attributes.get(weight, 1.0))] * len(both)
    edge_index = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).t().contiguous()
    return edge_index, len(number), torch.tensor(values, dtype=torch.float64) if weighted else None


def to_networkx(edges: Edges) -> Any:
    """A ``MultiDiGraph`` of nodes 0 ... n-1, so that parallel edges stay, with the attribute ``weight`` if there are weights."""
    try:
        import networkx
    except ImportError as error:
        raise MissingPackageError("to_networkx needs networkx: pip install networkx") from error
    edge_index, num_nodes, weights = edges
    graph = networkx.MultiDiGraph()
    graph.add_nodes_from(range(num_nodes if isinstance(num_nodes, int) else max(num_nodes)))
    pairs = edge_index.t().tolist()
    if weights is None:
        graph.add_edges_from(pairs)
    else:
        graph.add_weighted_edges_from([(i, j, w) for (i, j), w in zip(pairs, weights.tolist())])
    return graph


def from_scipy(matrix: Any) -> Edges:
    """The stored entries of a sparse matrix, ``A[source, target]`` as networkx and PyG have it."""
    if not scipy.sparse.issparse(matrix):
        raise ArgumentTypeError(f"matrix must be a scipy sparse matrix, not {type(matrix).__name__}: coo_array(matrix)")
    entries = matrix.tocoo()
    edge_index = torch.from_numpy(np.stack([entries.row, entries.col]).astype(np.int64))
    return edge_index, shape_of(*matrix.shape), torch.from_numpy(np.array(entries.data))


def to_scipy(edges: Edges) -> scipy.sparse.coo_array:
    """``A[source, target]`` with an entry an edge, parallel edges kept apart, 1 without weights: ``A.T @ x`` is ``spmm``."""
    edge_index, num_nodes, weights = edges
    source, target = edge_index.cpu().numpy()
    values = np.ones(len(source)) if weights is None else weights.detach().cpu().numpy()
    shape = (num_nodes, num_nodes) if isinstance(num_nodes, int) else num_nodes
    return scipy.sparse.coo_array((values, (source, target)), shape=shape)


def from_torch_sparse(matrix: Tensor) -> Edges:
    """The stored entries of a sparse tensor of any layout, ``A[source, target]``; an uncoalesced one keeps parallel edges."""
    if not isinstance(matrix, Tensor) or matrix.layout == torch.strided:
        raise ArgumentTypeError("matrix must be a sparse torch tensor: matrix.to_sparse()")
    if matrix.dim() != 2:
        raise ArgumentError(f"matrix must have two dimensions, not shape {tuple(matrix.shape)}")
    entries = matrix if matrix.layout == torch.sparse_coo else matrix.to_sparse_coo()
    return entries._indices(), shape_of(*matrix.shape), entries._values()


def to_torch_sparse(edges: Edges) -> Tensor:
    """``A[source, target]`` as an uncoalesced COO tensor with an entry an edge, 1 without weights."""
    edge_index, num_nodes, weights = edges
    values = torch.ones(edge_index.shape[1], device=edge_index.device) if weights is None else weights
    shape = (num_nodes, num_nodes) if isinstance(num_nodes, int) else num_nodes
    return torch.sparse_coo_tensor(edge_index, values, shape, check_invariants=False)


def shape_of(rows: int, columns: int) -> int | tuple[int, int]:
    """A square matrix is a graph of its nodes, any other one is bipartite."""
    return rows if rows == columns else (rows, columns)


