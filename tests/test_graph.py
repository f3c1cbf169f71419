"""Graph: what it refuses, what it keeps, what it makes of edges, and its way into other packages and back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse
import torch
from graphs import EDGES, awkward, dense, needs, random_graph
from hypothesis import given
from hypothesis import strategies as st

import graphops as go

DOUBLE = torch.float64
E = EDGES.shape[1]


def as_set(graph):
    """Edges with their weights, as a sorted list that does not depend on order."""
    weights = [None] * graph.num_edges if graph.weight is None else graph.weight.tolist()
    return sorted(zip(graph.source.tolist(), graph.target.tolist(), weights), key=str)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: go.Graph(EDGES.tolist()), go.ArgumentTypeError, "int64"),
        (lambda: go.Graph(EDGES.int()), go.ArgumentTypeError, "edge_index.long"),
        (lambda: go.Graph(EDGES.t()), go.ArgumentError, "row 0 sources"),
        (lambda: go.Graph(-EDGES), go.ArgumentError, "negative index -5"),
        (lambda: go.Graph(EDGES, 5), go.ArgumentError, "give 6 or more"),
        (lambda: go.Graph(EDGES, (6, 5)), go.ArgumentError, "target 5"),
        (lambda: go.Graph(EDGES, -1), go.ArgumentError, "num_nodes = -1"),
        (lambda: go.Graph(EDGES, 7.0), go.ArgumentTypeError, "num_nodes"),
        (lambda: go.Graph(EDGES, (7, None)), go.ArgumentTypeError, "num_nodes"),
        (lambda: go.Graph(EDGES, (7, 7, 7)), go.ArgumentTypeError, "num_nodes"),
        (lambda: go.Graph(EDGES, True), go.ArgumentTypeError, "num_nodes"),
        (lambda: go.Graph(EDGES, 7, torch.ones(E - 1)), go.ArgumentError, f"\\({E},\\)"),
        (lambda: go.Graph(EDGES, 7, torch.ones(E).long()), go.ArgumentTypeError, "weight.float"),
        (lambda: go.Graph(EDGES, 7, [1.0] * E), go.ArgumentTypeError, "floating point"),
        (lambda: go.Graph(EDGES, 7, torch.full((E,), float("nan"))), go.ArgumentError, "NaN"),
        (lambda: go.Graph(EDGES, 7, torch.full((E,), float("inf"))), go.ArgumentError, "infinity"),
        (lambda: go.Graph(EDGES, 7, torch.ones(E, device="meta")), go.ArgumentError, "move one"),
        (lambda: awkward().with_weight(torch.ones(3)), go.ArgumentError, "weight"),
        (lambda: awkward().degree("both"), go.ArgumentError, "'in' or 'out'"),
        (lambda: awkward().degree(weighted=True), go.ArgumentError, "no weights"),
        (lambda: awkward().add_self_loops(1.0), go.ArgumentError, "leave fill out"),
        (lambda: awkward(DOUBLE).add_self_loops(), go.ArgumentError, "give fill"),
        (lambda: awkward().coalesce("median"), go.ArgumentError, "sum, mean"),
        (lambda: awkward().subgraph(torch.tensor([0, 7])), go.ArgumentError, "\\[0, 7\\)"),
        (lambda: awkward().subgraph(torch.tensor([0, 0])), go.ArgumentError, "twice"),
        (lambda: awkward().subgraph(torch.ones(3, dtype=torch.bool)), go.ArgumentError, "mask"),
        (lambda: go.Graph(EDGES, (6, 9)).subgraph(torch.tensor([0])), go.UnsupportedError, "bipartite"),
        (lambda: go.Graph(EDGES, (6, 9)).batch_index, go.UnsupportedError, "bipartite"),
        (lambda: go.Graph.batch([]), go.ArgumentError, "at least one"),
        (lambda: go.Graph.batch([awkward(), awkward(DOUBLE)]), go.ArgumentError, "1 of 2"),
        (lambda: go.Graph.grid((3, 0)), go.ArgumentError, "positive"),
        (lambda: go.Graph.grid((3, 3), periodic=(True,)), go.ArgumentError, "1 entries for 2 axes"),
        (lambda: go.Graph.knn(torch.zeros(4), 1), go.ArgumentError, "\\(n, dimensions\\)"),
        (lambda: go.Graph.knn(torch.zeros(4, 2), 4), go.ArgumentError, "from 1 to 3"),
        (lambda: go.Graph.knn(torch.full((4, 2), float("nan")), 2), go.ArgumentError, "NaN"),
        (lambda: go.Graph.from_scipy(np.eye(3)), go.ArgumentTypeError, "scipy sparse"),
        (lambda: go.Graph.from_torch_sparse(torch.eye(3)), go.ArgumentTypeError, "to_sparse"),
    ],
)
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        awkward().num_nodes = 3


# --- what it is ------------------------------------------------------------------------------------------------------


def test_number_of_nodes_is_worked_out_if_not_given():
    assert go.Graph(EDGES).num_nodes == 6
    assert go.Graph(torch.empty(2, 0, dtype=torch.int64)).num_nodes == 0
    assert go.Graph(EDGES, (6, 9)).num_targets == 9


def test_degrees_count_what_the_matrix_adds():
    graph = awkward(DOUBLE)
    ones, weights = dense(graph, torch.ones(E)), dense(graph, graph.weight)
    assert graph.degree().tolist() == ones.sum(1).tolist()
    assert graph.degree("out").tolist() == ones.sum(0).tolist()
    torch.testing.assert_close(graph.degree(weighted=True), weights.sum(1))
    torch.testing.assert_close(graph.degree("out", weighted=True), weights.sum(0))


def test_stored_order_is_sorted_by_target_and_stable():
    graph = awkward()
    assert graph.target[graph.perm].tolist() == sorted(graph.target.tolist())
    into_two = graph.perm[graph.target[graph.perm] == 2]
    assert into_two.tolist() == sorted(into_two.tolist())
    assert torch.equal(graph.incoming.stored(graph.target), graph.target[graph.perm])
    assert torch.equal(graph.incoming.unstored(graph.incoming.stored(torch.arange(E))), torch.arange(E))


def test_other_weights_share_the_topology():
    graph = awkward(DOUBLE)
    other = graph.with_weight(torch.ones(E, requires_grad=True))
    assert other.pattern is graph.pattern and other.edge_index is graph.edge_index
    go.spmm(other, other.weight, torch.ones(7, 1)).sum().backward()
    assert other.weight.grad.tolist() == [1.0] * E
    assert graph.weight.dtype == DOUBLE


def test_sorting_follows_weights_that_learn():
    """Sorted weights that were kept would be differentiated twice, and outlive the optimiser's change."""
    graph = awkward(DOUBLE).with_weight(torch.ones(E, dtype=DOUBLE, requires_grad=True))
    for value in (1.0, 2.0):
        with torch.no_grad():
            graph.weight.fill_(value)
        tidy = graph.sort()
        go.spmm(tidy, tidy.weight, torch.ones(7, 1)).sum().backward()
        assert tidy.weight.tolist() == [value] * E
    assert graph.weight.grad.tolist() == [2.0] * E
    assert graph.sort().pattern is tidy.pattern and graph.sort(weighted=False).weight is None


def test_symmetry_is_of_the_matrix_to_rounding():
    there = torch.tensor([[0, 1, 1, 2, 2], [1, 0, 2, 1, 2]])
    pairs = torch.tensor([0.1, 0.3, 0.7, 0.7, 5.0], dtype=DOUBLE)
    assert go.Graph(there).is_symmetric and not go.Graph(there[:, :3]).is_symmetric
    assert not go.Graph(there, weight=pairs).is_symmetric
    # 0.1 + 0.2 from 0 to 1 in two edges, 0.3 back.
    split = go.Graph(torch.cat([there, there[:, :1]], 1), weight=torch.cat([pairs, torch.tensor([0.2], dtype=DOUBLE)]))
    assert split.is_symmetric
    assert not split.with_weight(torch.full((6,), math.nan)).is_symmetric
    assert go.Graph.grid((3, 4)).is_symmetric and awkward().to_undirected().is_symmetric
    assert split.is_nonnegative and not split.with_weight(-split.weight).is_nonnegative


def test_reverse_turns_edges_and_keeps_their_order():
    graph = awkward(DOUBLE)
    back = graph.reverse()
    assert torch.equal(back.edge_index, graph.edge_index.flip(0)) and back.weight is graph.weight
    x = torch.randn(7, 2, dtype=DOUBLE)
    torch.testing.assert_close(go.spmm(back, back.weight, x), dense(graph, graph.weight).t() @ x)


def test_to_moves_everything(device):
    graph = awkward(torch.float32)
    go.spmm(graph, graph.weight, torch.ones(7, 1))
    moved = graph.to(device)
    out = go.spmm(moved, moved.weight, torch.ones(7, 1, device=device))
    assert out.device.type == device.type and moved.perm.device.type == device.type
    assert graph.to("meta").incoming.pointers.device.type == "meta"


# --- other edges -----------------------------------------------------------------------------------------------------


def test_self_loops_come_and_go():
    graph = awkward(DOUBLE)
    looped = graph.add_self_loops(3.0)
    diagonal = dense(looped, looped.weight).diag()
    assert diagonal.tolist() == [3, 3, 3, 3, 3, graph.weight[9].item(), 3]
    assert torch.equal(looped.edge_index[:, :E], graph.edge_index)
    assert as_set(looped.remove_self_loops()) == as_set(graph.remove_self_loops())
    assert graph.remove_self_loops().num_edges == E - 1
    assert looped.add_self_loops(1.0).num_edges == looped.num_edges


@pytest.mark.parametrize(("reduce", "merged"), [("sum", sum), ("max", max), ("min", min), ("mean", lambda w: sum(w) / len(w))])
def test_coalesce_merges_parallel_edges(reduce, merged):
    graph = awkward(DOUBLE)
    known: dict[tuple[int, int], list[float]] = {}
    for i, j, w in as_set(graph):
        known.setdefault((i, j), []).append(w)
    found = graph.coalesce(reduce)
    assert found.is_sorted and found.num_edges == len(known) < E
    for i, j, w in as_set(found):
        assert w == pytest.approx(merged(known[i, j]), abs=1e-15)


def test_undirected_is_symmetric_and_leaves_symmetric_graphs_alone():
    graph = awkward(DOUBLE).to_undirected("sum")
    matrix = dense(graph, graph.weight)
    assert torch.equal(matrix, matrix.t())
    assert matrix[5, 5] == awkward(DOUBLE).weight[9]  # a loop counts once
    assert as_set(graph.to_undirected()) == as_set(graph)


def test_subgraph_renumbers_in_the_order_given():
    graph = awkward(DOUBLE)
    nodes = torch.tensor([4, 2, 5])
    part = graph.subgraph(nodes)
    expected = dense(graph, graph.weight)[nodes][:, nodes]
    assert torch.equal(dense(part, part.weight), expected)
    mask = torch.zeros(7, dtype=torch.bool).index_fill(0, nodes, True)
    assert as_set(graph.subgraph(mask)) == as_set(graph.subgraph(nodes.sort().values))


def test_largest_component_is_weakly_connected_and_first_of_equals():
    graph, nodes = awkward(DOUBLE).largest_component()
    assert nodes.tolist() == [0, 1, 2, 3, 4, 5] and graph.num_edges == E
    pairs = go.Graph(torch.tensor([[3, 0], [2, 1]]), 5)
    assert pairs.largest_component()[1].tolist() == [0, 1]


# --- made from nothing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("periodic", [False, True, (True, False, True)])
def test_grid_is_the_stencil(periodic):
    shape = (4, 2, 3)
    graph = go.Graph.grid(shape, periodic=periodic)
    x = torch.randn(shape, dtype=DOUBLE)
    expected = torch.zeros_like(x)
    wraps = (periodic,) * 3 if isinstance(periodic, bool) else periodic
    for axis, wrap in enumerate(wraps):
        for step in (1, -1):
            moved = torch.roll(x, step, axis)
            if not wrap:
                moved.select(axis, 0 if step == 1 else -1).zero_()
            expected += moved
    assert graph.is_sorted
    torch.testing.assert_close(go.spmm(graph, None, x.reshape(-1)), expected.reshape(-1))


def test_grid_of_one_node_has_no_edges():
    assert go.Graph.grid((1, 1), periodic=True).num_edges == 0


def test_knn_finds_the_nearest():
    points = torch.randn(60, 3)
    graph = go.Graph.knn(points, 5)
    distances = torch.cdist(points.double(), points.double()).fill_diagonal_(float("inf"))
    nearest = distances.topk(5, largest=False).indices
    assert torch.equal(graph.source.view(60, 5).sort().values, nearest.sort().values)
    assert graph.is_sorted and graph.degree().eq(5).all()


def test_knn_among_coincident_points_takes_no_point_for_its_own_neighbour():
    graph = go.Graph.knn(torch.zeros(12, 2), 3)
    assert graph.degree().eq(3).all() and not (graph.source == graph.target).any()


# --- batches ---------------------------------------------------------------------------------------------------------


def test_sixty_four_graphs_together_are_what_they_are_alone():
    sizes = torch.randint(1, 40, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    graphs = [random_graph(n, 3 * n, seed).with_weight(torch.rand(3 * n, dtype=DOUBLE)) for seed, n in enumerate(sizes)]
    batch = go.Graph.batch(graphs)
    assert batch.batch_index.tolist() == [i for i, n in enumerate(sizes) for _ in range(n)]

    xs = [torch.randn(n, 4, dtype=DOUBLE) for n in sizes]
    together = torch.cat(xs)
    out = go.spmm(batch, go.softmax(batch, batch.weight), together)
    alone = [go.spmm(g, go.softmax(g, g.weight), x) for g, x in zip(graphs, xs)]
    assert torch.equal(out, torch.cat(alone))
    pooled = go.mean(batch.batch_index, out, size=64)
    torch.testing.assert_close(pooled, torch.stack([y.mean(0) for y in alone]))

    for one, back in zip(graphs, batch.unbatch()):
        assert back.num_nodes == one.num_nodes
        assert torch.equal(back.edge_index, one.edge_index) and torch.equal(back.weight, one.weight)
    assert len(batch.add_self_loops(1.0).to_undirected().unbatch()) == 64
    assert awkward().unbatch()[0].num_nodes == 7 and awkward().batch_index.eq(0).all()


# --- round trips -----------------------------------------------------------------------------------------------------


weighted = st.booleans()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=15), weighted)
def test_scipy_and_torch_sparse_and_back(pairs, has_weights):
    edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).t()
    graph = go.Graph(edges, 6, torch.rand(len(pairs), dtype=DOUBLE) if has_weights else None)
    x = torch.randn(6, 2, dtype=DOUBLE)
    expected = go.spmm(graph, graph.weight, x)
    matrix, tensor = graph.to_scipy(), graph.to_torch_sparse()
    torch.testing.assert_close(torch.from_numpy(matrix.T @ x.numpy()), expected)
    torch.testing.assert_close(tensor.t().to(DOUBLE) @ x, expected)
    for back in (go.Graph.from_scipy(matrix), go.Graph.from_torch_sparse(tensor)):
        assert torch.equal(back.edge_index, graph.edge_index) and back.num_nodes == 6
        assert back.weight.tolist() == (graph.weight.tolist() if has_weights else [1.0] * len(pairs))


def test_matrices_of_other_layouts_and_shapes():
    matrix = torch.tensor([[0.0, 2, 0], [3, 0, 4]])
    for sparse in (matrix.to_sparse_csr(), matrix.to_sparse_coo(), matrix.to_sparse_csc()):
        graph = go.Graph.from_torch_sparse(sparse)
        assert graph.num_nodes == (2, 3) and as_set(graph) == [(0, 1, 2.0), (1, 0, 3.0), (1, 2, 4.0)]
    graph = go.Graph.from_scipy(scipy.sparse.csc_array(matrix.numpy()))
    assert graph.to_scipy().shape == (2, 3) and graph.is_bipartite
    assert go.spmm(graph, graph.weight, torch.ones(2)).tolist() == [3, 2, 4]


@needs["networkx"]
def test_networkx_and_back():
    import networkx

    graph = awkward(DOUBLE)
    back = go.Graph.from_networkx(graph.to_networkx())
    assert as_set(back) == as_set(graph) and back.num_nodes == 7
    bare = go.Graph.from_networkx(awkward().to_networkx())
    assert as_set(bare) == as_set(awkward())

    club = networkx.karate_club_graph()
    graph = go.Graph.from_networkx(club)
    assert graph.num_nodes == 34 and graph.num_edges == 2 * club.number_of_edges()
    torch.testing.assert_close(dense(graph, graph.weight).numpy(), networkx.to_numpy_array(club).T)
    named = networkx.DiGraph([("b", "a"), ("a", "a")])
    named.add_edge("a", "c", weight=5)
    assert as_set(go.Graph.from_networkx(named)) == [(0, 1, 1.0), (1, 1, 1.0), (1, 2, 5.0)]


@needs["torch_geometric"]
def test_pyg_and_back():
    from torch_geometric.data import Data, HeteroData

    graph = awkward(DOUBLE)
    data = graph.to_pyg(x=torch.ones(7, 2))
    assert data.num_nodes == 7 and data.x.shape == (7, 2) and data.is_directed()
    back = go.Graph.from_pyg(data)
    assert torch.equal(back.edge_index, graph.edge_index) and torch.equal(back.weight, graph.weight)
    assert go.Graph.from_pyg(awkward().to_pyg()).weight is None
    column = Data(edge_index=EDGES, edge_attr=torch.ones(E, 1), num_nodes=7)
    assert go.Graph.from_pyg(column, weight="edge_attr").weight.shape == (E,)
    with pytest.raises(go.UnsupportedError, match="heterogeneous"):
        go.Graph.from_pyg(HeteroData())
    with pytest.raises(go.ArgumentError, match="edge_index"):
        go.Graph.from_pyg(Data(x=torch.ones(3, 1)))


@needs["torch_geometric"]
def test_graph_convolution_is_that_of_pyg():
    """Kipf & Welling 2017, eq. 2, with PyG's layer and weights as the reference."""
    from torch_geometric.nn import GCNConv

    graph = random_graph(40, 200).with_weight(torch.rand(200))
    layer = GCNConv(6, 3)
    x = torch.randn(40, 6)
    looped = graph.add_self_loops(1.0)
    scale = looped.degree(weighted=True).rsqrt()
    weights = go.gather(looped.incoming, scale) * looped.weight * go.gather(looped.outgoing, scale)
    ours = go.spmm(looped, weights, layer.lin(x)) + layer.bias
    torch.testing.assert_close(ours, layer(x, graph.edge_index, graph.weight))


def test_networkx_and_pyg_absent_are_named(monkeypatch):
    import sys

    for module, call in (("networkx", awkward().to_networkx), ("torch_geometric.data", awkward().to_pyg)):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(go.MissingPackageError, match="pip install"):
            call()
