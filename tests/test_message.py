"""Message passing: against loops over nodes and edges, against PyG's layers, alone and in batches."""

from __future__ import annotations

import math

import pytest
import torch
from graphs import EDGES, awkward, dense, needs, random_graph
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphops as go
from graphops.message import (
    AGGREGATIONS,
    GATConv,
    GCNConv,
    GINConv,
    GraphState,
    SAGEConv,
    graph_network,
    message_passing,
    reference_operator,
)
from graphops.rewire import PageRank, diffuse, transition

DOUBLE = torch.float64
N, E = 7, EDGES.shape[1]

LOOPS = {
    "sum": lambda rows: rows.sum(0),
    "mean": lambda rows: rows.mean(0),
    "max": lambda rows: rows.amax(0),
    "min": lambda rows: rows.amin(0),
    "std": lambda rows: rows.std(0) if len(rows) > 1 else 0 * rows[0],
}


def looped(graph, x_source, x_target, message, update, edge, reduce):
    """Gilmer et al. 2017, equations 1 and 2, node by node and edge by edge."""
    out = []
    for i in range(graph.num_targets):
        sent = [message(x_target[i], x_source[graph.source[e]], edge[e]) for e in range(graph.num_edges) if graph.target[e] == i]
        width = message(x_target[0], x_source[0], edge[0])
        out.append(update(x_target[i], reduce(torch.stack(sent)) if sent else torch.zeros_like(width)))
    return torch.stack(out)


# --- message, aggregate, update --------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregate", LOOPS)
def test_messages_are_those_of_a_loop(aggregate):
    def message(xi, xj, e):
        return torch.tanh(xi - 2 * xj) * e

    def update(x, m):
        return torch.cat([x, m.square()], -1)

    x, edge = torch.randn(N, 3, dtype=DOUBLE), torch.rand(E, 1, dtype=DOUBLE)
    found = message_passing(awkward(), x, message, update, edge=edge, aggregate=aggregate)
    torch.testing.assert_close(found, looped(awkward(), x, x, message, update, edge, LOOPS[aggregate]))
    assert not found[6, 3:].any()  # the node without edges


@pytest.mark.parametrize("aggregate", AGGREGATIONS)
def test_no_message_is_the_neighbour_itself(aggregate):
    both = torch.randn(6, 2, 2, dtype=DOUBLE), torch.randn(9, 3, dtype=DOUBLE)
    graph = go.Graph(EDGES, (6, 9))
    found = message_passing(graph, both, aggregate=aggregate)
    copied = message_passing(graph, both, lambda xi, xj, e: xj, aggregate=aggregate)
    assert found.shape == (9, 2, 2)
    torch.testing.assert_close(found, copied)


def test_an_aggregation_of_ones_own():
    x = torch.randn(N, 2, dtype=DOUBLE)
    found = message_passing(awkward(), x, aggregate=lambda segments, values: go.logsumexp(segments, values).exp())
    torch.testing.assert_close(found, message_passing(awkward(), x.exp(), aggregate="sum"))


@pytest.mark.parametrize("aggregate", AGGREGATIONS)
def test_derivatives_of_a_layer(aggregate):
    x, edge = torch.randn(N, 2, dtype=DOUBLE, requires_grad=True), torch.rand(E, 1, dtype=DOUBLE, requires_grad=True)

    def layer(x, edge):
        messages = dict(message=lambda i, j, e: (i * j).sin() + e, update=lambda x, m: x * m, edge=edge)
        return message_passing(awkward(), x, **messages, aggregate=aggregate)

    assert torch.autograd.gradcheck(layer, (x, edge))
    assert torch.autograd.gradgradcheck(layer, (x, edge))


def test_reference_operator_in_either_order():
    graph, x = awkward(DOUBLE), torch.randn(N, 3, dtype=DOUBLE)
    for width in (2, 3, 5):
        theta = torch.randn(3, width, dtype=DOUBLE)
        torch.testing.assert_close(reference_operator(graph, x, theta), dense(graph, graph.weight) @ x @ theta)
    torch.testing.assert_close(reference_operator(awkward(), x), dense(graph, torch.ones(E, dtype=DOUBLE)) @ x)


@pytest.mark.slow
def test_a_layer_compiles():
    layer = nn.Linear(3, 4)

    def run(x, edge):
        return message_passing(graph, x, lambda i, j, e: (i + j) * e, lambda x, m: layer(x + m), edge=edge, aggregate="mean")

    graph, x, edge = awkward(), torch.randn(N, 3), torch.rand(E, 1)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, edge), run(x, edge))


# --- graph networks --------------------------------------------------------------------------------------------------


def joined(*parts):
    """All that is there, side by side."""
    return torch.cat([part for part in parts if part is not None], -1)


def block(dtype=DOUBLE):
    """Updates as small networks of everything they are given, and the aggregations, all different."""
    edge, node, whole = nn.Linear(2 + 3 + 3 + 4, 5), nn.Linear(5 + 3 + 4, 6), nn.Linear(5 + 6 + 4, 2)
    edge, node, whole = (layer.to(dtype) for layer in (edge, node, whole))
    return dict(
        update_edges=lambda e, target, source, u: edge(joined(e, target, source, u)).tanh(),
        update_nodes=lambda e, v, u: node(joined(e, v, u)).tanh(),
        update_globals=lambda e, v, u: whole(joined(e, v, u)).tanh(),
        edges_to_nodes="mean",
        edges_to_globals="max",
        nodes_to_globals="sum",
    )


def state_of(graph, graphs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (graph.num_nodes, 3), (graph.num_edges, 2), (graphs, 4)
    return GraphState(*(torch.randn(size, dtype=DOUBLE, generator=generator) for size in sizes))


def looped_block(graph, state, update_edges, update_nodes, update_globals, **_):
    """Algorithm 1 of Battaglia et al. 2018, one edge, then one node at a time, for one graph."""
    v, e, u = state.nodes, state.edges, state.globals[0]
    edges = [update_edges(e[k], v[graph.target[k]], v[graph.source[k]], u) for k in range(graph.num_edges)]
    into = [[edges[k] for k in range(graph.num_edges) if graph.target[k] == i] for i in range(graph.num_nodes)]
    zero = torch.zeros(5, dtype=DOUBLE)
    nodes = [update_nodes(torch.stack(own).mean(0) if own else zero, v[i], u) for i, own in enumerate(into)]
    whole = update_globals(torch.stack(edges).amax(0) if edges else zero, torch.stack(nodes).sum(0), u)
    return GraphState(torch.stack(nodes), torch.stack(edges) if edges else e.new_zeros(0, 5), whole[None])


def test_a_block_is_the_algorithm_of_the_paper():
    updates, state = block(), state_of(awkward(), 1)
    for found, expected in zip(graph_network(awkward(), state, **updates), looped_block(awkward(), state, **updates)):
        torch.testing.assert_close(found, expected)


def batch_of(count: int) -> list[go.Graph]:
    """Graphs of unequal size, among them one of a single node and some without edges."""
    sizes = [1 + (7 * i) % 11 for i in range(count)]
    return [random_graph(size, (5 * i) % 23 if size > 1 else 0, i) for i, size in enumerate(sizes)]


def test_each_graph_of_a_batch_is_what_it_is_alone():
    graphs = batch_of(64)
    whole, updates = go.Graph.batch(graphs), block()
    states = [state_of(graph, 1, seed) for seed, graph in enumerate(graphs)]
    found = graph_network(whole, GraphState(*(torch.cat(parts) for parts in zip(*states))), **updates)
    alone = [graph_network(graph, state, **updates) for graph, state in zip(graphs, states)]
    for value, parts in zip(found, zip(*alone)):
        torch.testing.assert_close(value, torch.cat(parts), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(alone[40].nodes, looped_block(graphs[40], states[40], **updates).nodes)


@pytest.mark.parametrize("layer", [GCNConv(3, 4), GATConv(3, 2, heads=3), SAGEConv(3, 4, "std"), GINConv(nn.Linear(3, 4))])
def test_layers_treat_each_graph_of_a_batch_alone(layer):
    graphs = batch_of(64)
    layer = layer.double()
    features = [torch.randn(graph.num_nodes, 3, dtype=DOUBLE) for graph in graphs]
    together = layer(torch.cat(features), go.Graph.batch(graphs))
    alone = torch.cat([layer(x, graph) for x, graph in zip(features, graphs)])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


@given(st.integers(0, 10**6))
def test_a_block_follows_a_renumbering(seed):
    generator = torch.Generator().manual_seed(seed)
    graph, updates = random_graph(6, 14, seed), block()
    state = state_of(graph, 1, seed)
    nodes, edges = torch.randperm(6, generator=generator), torch.randperm(14, generator=generator)
    number = torch.empty_like(nodes).scatter_(0, nodes, torch.arange(6))
    moved = go.Graph(number[graph.edge_index[:, edges]], 6)
    found = graph_network(moved, GraphState(state.nodes[nodes], state.edges[edges], state.globals), **updates)
    expected = graph_network(graph, state, **updates)
    torch.testing.assert_close(found.nodes, expected.nodes[nodes])
    torch.testing.assert_close(found.edges, expected.edges[edges])
    torch.testing.assert_close(found.globals, expected.globals)


def test_what_a_state_has_not_is_none():
    graph = awkward()
    edges = graph_network(graph, GraphState(torch.eye(N)), update_edges=lambda e, i, j, u: (j if e is u is None else None)).edges
    assert torch.equal(edges, torch.eye(N)[graph.source])
    assert graph_network(graph, GraphState(edges=edges), update_nodes=lambda e, v, u: e).nodes.sum() == E
    nothing = graph_network(graph, GraphState(), update_globals=lambda *parts: torch.tensor([[parts.count(None)]]))
    assert nothing.globals.tolist() == [[3]] and nothing.nodes is None
    same = state_of(graph, 1)
    assert graph_network(graph, same) == same


def test_derivatives_of_a_block():
    graph, updates, state = awkward(), block(), state_of(awkward(), 1)
    leaves = [part.requires_grad_() for part in state]
    assert torch.autograd.gradcheck(lambda *parts: tuple(graph_network(graph, GraphState(*parts), **updates)), leaves)


def test_readout_of_a_batch():
    graph = go.Graph.batch([awkward(), random_graph(3, 4)])
    assert go.mean(graph.node_groups, torch.arange(10.0)).tolist() == [3.0, 8.0]
    assert graph.edge_groups.counts.tolist() == [11, 4]
    assert awkward().node_groups.counts.tolist() == [7]


# --- layers ----------------------------------------------------------------------------------------------------------


def test_gcn_is_the_dense_formula():
    graph, x, layer = awkward(DOUBLE), torch.randn(N, 3, dtype=DOUBLE), GCNConv(3, 5).double()
    w = dense(graph, graph.weight)
    w = w + torch.diag((w.diag() == 0).to(DOUBLE))
    scale = w.sum(1).rsqrt()
    expected = scale[:, None] * w * scale @ x @ layer.lin.weight.T + layer.bias
    torch.testing.assert_close(layer(x, graph), expected)
    bare = layer(x, graph.with_weight(None))  # its weights are as exact as x
    torch.testing.assert_close(bare, layer(x, graph.with_weight(torch.ones(E, dtype=DOUBLE))), rtol=1e-14, atol=1e-14)
    layer.normalize = False
    torch.testing.assert_close(layer(x, transition(graph)), expected)


@pytest.mark.parametrize("concat", [True, False])
def test_gat_is_the_formula_of_the_paper(concat):
    graph, x, layer = awkward(), torch.randn(N, 3, dtype=DOUBLE), GATConv(3, 4, heads=2, concat=concat).double()
    h = (x @ layer.lin.weight.T).view(N, 2, 4)
    expected = torch.zeros(N, 2, 4, dtype=DOUBLE)
    for i in range(N):
        sources = [int(j) for j, k in zip(graph.source, graph.target) if k == i and j != i] + [i]
        for head in range(2):
            own, other = h[i, head] @ layer.att_dst[0, head], h[sources, head] @ layer.att_src[0, head]
            share = torch.softmax(nn.functional.leaky_relu(own + other, 0.2), 0)
            expected[i, head] = share @ h[sources, head]
    torch.testing.assert_close(layer(x, graph), expected.flatten(1) if concat else expected.mean(1))


def test_attention_is_dropped_in_training_alone():
    layer, x = GATConv(3, 4, dropout=0.5), torch.randn(N, 3)
    still = GATConv(3, 4)
    still.load_state_dict(layer.state_dict())
    assert not torch.equal(layer(x, awkward()), layer(x, awkward()))
    torch.testing.assert_close(layer.eval()(x, awkward()), still(x, awkward()))


def theirs_and_ours():
    from torch_geometric import nn as pyg

    def net():
        return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4))

    return [
        (pyg.GCNConv(3, 4), GCNConv(3, 4)),
        (pyg.GCNConv(3, 4, normalize=False), GCNConv(3, 4, normalize=False)),
        (pyg.GCNConv(3, 4), GCNConv(3, 4)),
        (pyg.GATConv(3, 4, heads=2), GATConv(3, 4, heads=2)),
        (pyg.GATConv(3, 4, heads=2, concat=False, add_self_loops=False, negative_slope=0.1),
         GATConv(3, 4, heads=2, concat=False, add_self_loops=False, negative_slope=0.1)),
        (pyg.SAGEConv(3, 4), SAGEConv(3, 4)),
        (pyg.SAGEConv(3, 4, aggr="max"), SAGEConv(3, 4, "max")),
        (pyg.GINConv(net()), GINConv(net())),
        (pyg.GINConv(net(), eps=0.3, train_eps=True), GINConv(net(), train_eps=True)),
    ]  # fmt: skip


@needs["torch_geometric"]
@pytest.mark.parametrize("number", range(9))
def test_layers_are_those_of_pyg(number):
    """With PyG's parameters loaded, the same numbers and the same gradients, in float64."""
    theirs, ours = (layer.double() for layer in theirs_and_ours()[number])
    ours.load_state_dict(theirs.state_dict())
    graph = awkward(DOUBLE if number < 2 else None)
    x = torch.randn(N, 3, dtype=DOUBLE, requires_grad=True)
    expected = theirs(x, graph.edge_index, *(() if graph.weight is None else (graph.weight,)))
    found = ours(x, graph)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(found)
    leaves = [{"x": x, **dict(layer.named_parameters())} for layer in (ours, theirs)]
    mine, other = (torch.autograd.grad((out * probe).sum(), list(of.values())) for out, of in zip((found, expected), leaves))
    other = dict(zip(leaves[1], other))
    assert leaves[0].keys() == leaves[1].keys()
    for name, gradient in zip(leaves[0], mine):
        torch.testing.assert_close(gradient, other[name], rtol=1e-11, atol=1e-11)


@needs["torch_geometric"]
def test_powers_of_the_operator_are_appnp():
    """Gasteiger et al. 2019: K steps of z = (1 - alpha) T z + alpha x are PageRank with the rest in the last power."""
    from torch_geometric.nn import APPNP

    graph, x, alpha, steps = awkward().to_undirected(), torch.randn(N, 3), 0.1, 4
    theirs = APPNP(steps, alpha)(x, graph.edge_index)
    powers = [alpha * (1 - alpha) ** k for k in range(steps)] + [(1 - alpha) ** steps]
    torch.testing.assert_close(diffuse(transition(graph), powers, x), theirs)
    assert math.isclose(sum(powers), 1) and len(PageRank(alpha).powers(0.5)) > steps


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda g, x: message_passing(g, x[1:]), go.ArgumentError, "sources"),
        (lambda g, x: message_passing(g, (x, x[1:])), go.ArgumentError, "targets"),
        (lambda g, x: message_passing(g, x, aggregate="median"), go.UnknownNameError, "aggregation"),
        (lambda g, x: message_passing(g, x, aggregate="means"), go.UnknownNameError, "did you mean 'mean'"),
        (lambda g, x: message_passing(g, x, lambda i, j, e: j[1:]), go.ArgumentError, "message has shape"),
        (lambda g, x: message_passing(g, x, lambda i, j, e: None), go.ArgumentTypeError, "message must be a tensor"),
        (lambda g, x: reference_operator(g, x, torch.ones(2, 2)), go.ArgumentError, "x and theta"),
        (lambda g, x: graph_network(g, GraphState(x[1:])), go.ArgumentError, "nodes has shape"),
        (lambda g, x: graph_network(g, GraphState(x, x)), go.ArgumentError, "edges has shape"),
        (lambda g, x: graph_network(g, GraphState(x, None, x)), go.ArgumentError, "must be 1 \\(graphs\\)"),
        (lambda g, x: graph_network(g, GraphState(x), update_edges=lambda *_: x), go.ArgumentError, "update_edges returned"),
        (lambda g, x: graph_network(g, GraphState(x), update_nodes=lambda *_: None), go.ArgumentTypeError, "update_nodes"),
        (lambda g, x: graph_network(go.Graph(EDGES, (7, 7)), GraphState(x)), go.UnsupportedError, "bipartite"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(awkward(), torch.ones(N, 3))
