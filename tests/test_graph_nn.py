"""The diffusion layer: every method against the exponential, gradients, cached graphs, other graphs, saving, bad input."""

from __future__ import annotations

import copy
import io
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from graphs import dense, needs, random_graph
from torch import nn
from torch.nn.functional import cross_entropy

import graphops as go
import solvers
from graphops.data import NodeData
from graphops.fields import EarlyStopping, EdgeAttention
from graphops.nn import GraphDiffusion
from graphops.pattern import Segments

DOUBLE = torch.float64
TIGHT = {"rtol": 1e-9, "atol": 1e-11}
N = 10


def graph_of(seed: int = 0, nodes: int = N) -> go.Graph:
    return random_graph(nodes, 3 * nodes, seed).remove_self_loops().to_undirected()


def layer_of(time: float = 2.0, spread: float = 0.7, **options) -> GraphDiffusion:
    """In float64, with attention that is not uniform and a rate for each channel."""
    torch.manual_seed(1)
    options = {"attention": EdgeAttention(4, heads=2), "alpha": "channel", **options}
    layer = GraphDiffusion(3, 4, 2, time, **options).double()
    for name, parameter in layer.named_parameters():
        if name.startswith("attention") or name == "raw_alpha":
            nn.init.normal_(parameter, std=spread)
    return layer


def features(nodes: int = N) -> torch.Tensor:
    return torch.randn(nodes, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))


def exact(layer: GraphDiffusion, graph: go.Graph, x: torch.Tensor) -> torch.Tensor:
    """The linear layer by matrix exponentials."""
    z = layer.encoder(x)
    whole = graph.add_self_loops()
    L = dense(whole, layer.attention(whole, z)) - torch.eye(whole.num_sources)
    rates = layer.time * torch.sigmoid(layer.raw_alpha)
    z = torch.stack([torch.matrix_exp(rate * L) @ column for rate, column in zip(rates, z.T)], 1)
    return layer.decoder(z.relu())


def gradients(layer: GraphDiffusion, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(layer.parameters()))])


# --- methods ---------------------------------------------------------------------------------------------------------

ADAPTIVE = {"exp_linear": {}, "dopri5": {}, "rkc2": {}, "prox_bdf": {}}
FIXED = {
    "euler": {},
    "rk4": {},
    "explicit_adams": {},
    "implicit_adams": {},
    "semi_implicit_euler": TIGHT,
    "semi_implicit_bdf2": TIGHT,
    "prox_euler": TIGHT,
}
ORDERS = {"euler": 1, "rk4": 4, "semi_implicit_euler": 1, "semi_implicit_bdf2": 2, "prox_euler": 1}


@pytest.mark.parametrize("method", ADAPTIVE)
def test_gradients_of_adaptive_methods(method):
    """At rtol 1e-6 within 1e-4 of the exact gradient, in the Euclidean norm relative to it; and so is the output."""
    graph, x = graph_of(), features()
    layer = layer_of(method=method, rtol=1e-6, atol=1e-8)
    out, reference = layer(x, graph), exact(layer, graph, x)
    torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-5)
    found, expected = gradients(layer, out.square().sum()), gradients(layer, reference.square().sum())
    assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps_come_near_the_exponential(method):
    graph, x = graph_of(), features()
    layer = layer_of(method=method, num_steps=32, **FIXED[method])
    with torch.no_grad():
        torch.testing.assert_close(layer(x, graph), exact(layer, graph, x), rtol=3e-2, atol=1e-2)
    assert layer.stats.nfe >= 32


@pytest.mark.parametrize("field", ["linear", "nonlinear"])
@pytest.mark.parametrize("method", ["euler", "rk4", "semi_implicit_euler"])
def test_gradients_of_fixed_steps_are_those_of_their_formulas(method, field):
    """Written out with dense matrices; to 1e-10 of the gradient, although the implicit step is solved iteratively."""
    tight = {"rtol": 1e-13, "atol": 1e-13, "backward_tol": 1e-13} if method == "semi_implicit_euler" else {}
    graph, x, steps = graph_of().add_self_loops().sort(), features(), 3
    layer = layer_of(field=field, method=method, alpha="scalar", num_steps=steps, **tight)
    dt, alpha, z = 2.0 / steps, torch.sigmoid(layer.raw_alpha), layer.encoder(x)
    start = z

    def L(state):
        return alpha * (dense(graph, layer.attention(graph, start if field == "linear" else state)) - torch.eye(N))

    def f(state):
        return L(state) @ state

    for _ in range(steps):
        if method == "euler":
            z = z + dt * f(z)
        elif method == "rk4":
            k1 = f(z)
            k2 = f(z + dt / 3 * k1)
            k3 = f(z + dt * (k2 - k1 / 3))
            k4 = f(z + dt * (k1 - k2 + k3))
            z = z + dt / 8 * (k1 + 3 * k2 + 3 * k3 + k4)
        else:
            z = torch.linalg.solve(torch.eye(N) - dt * L(z), z)
    expected = gradients(layer, layer.decoder(z.relu()).square().sum())
    found = gradients(layer, layer(x, graph).square().sum())
    assert (found - expected).norm() <= 1e-10 * expected.norm()


def smooth_gradient(**options) -> torch.Tensor:
    """Of a loss without the ReLU, whose kinks would hide the order."""
    layer = layer_of(field="nonlinear", alpha="scalar", **options)
    return gradients(layer, layer.decoder(layer.diffuse(layer.encoder(features()), graph_of())).square().sum())


@cache
def fine_gradient() -> torch.Tensor:
    return smooth_gradient(method="dopri8", rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("method", ORDERS)
def test_gradients_of_fixed_steps_converge_at_their_order(method):
    errors = [(smooth_gradient(method=method, num_steps=n, **FIXED[method]) - fine_gradient()).norm() for n in (4, 8)]
    assert 0.75 * ORDERS[method] <= torch.log2(errors[0] / errors[1]) <= 1.5 * ORDERS[method]


@pytest.mark.parametrize("field", ["linear", "nonlinear"])
def test_a_replayed_gradient_is_the_recorded_one(field):
    """Attention, its parameters and the learned rate are captured by the field, not passed to it."""
    graph, x = graph_of(), features()
    found = []
    for adjoint in ("backprop", "checkpoint"):
        layer = layer_of(field=field, method="rk4", num_steps=3, adjoint=adjoint)
        found.append(gradients(layer, layer(x, graph).square().sum()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", ["exp_linear", "dopri5"])
def test_time_is_learned(method):
    graph, x = graph_of(), features()
    layer = layer_of(nn.Parameter(torch.tensor(1.5, dtype=DOUBLE)), method=method, rtol=1e-8, atol=1e-10)
    found, expected = layer(x, graph).square().sum(), exact(layer, graph, x).square().sum()
    slopes = [torch.autograd.grad(loss, layer.time)[0] for loss in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-8)


# --- graphs ----------------------------------------------------------------------------------------------------------


def test_graphs_in_every_form_give_the_same():
    graph, x = graph_of(), features()
    layer = layer_of()
    expected = layer(x, graph)
    edges = graph.edge_index[:, torch.randperm(graph.num_edges)]
    for arguments in ((x, edges), (NodeData(graph, x),), (SimpleNamespace(x=x, edge_index=edges),)):
        torch.testing.assert_close(layer(*arguments), expected)


def test_weights_of_data_reweight_attention():
    graph, x = graph_of(), features()
    weight = torch.rand(graph.num_edges, dtype=DOUBLE)
    layer = layer_of(attention=EdgeAttention(4, heads=2, reweight="shares"))
    expected = layer(x, graph.with_weight(weight))
    data = SimpleNamespace(x=x, edge_index=graph.edge_index, edge_weight=weight)
    torch.testing.assert_close(layer(data), expected)
    weight.mul_(torch.rand_like(weight))  # another graph, told by the tensor's version
    assert (layer(data) - expected).abs().max() > 1e-6


@pytest.mark.parametrize("form", ["edge_index", "Graph"])
def test_edges_are_sorted_once(form, monkeypatch):
    counts = []
    original = Segments.__init__
    monkeypatch.setattr(Segments, "__init__", lambda self, *args, **options: counts.append(1) or original(self, *args, **options))
    x, edges = features(), graph_of().edge_index
    edges = edges.flip(1) if form == "edge_index" else go.Graph(edges.flip(1), N)
    layer = layer_of()
    layer(x, edges).sum().backward()
    first = len(counts)
    assert first > 0
    for _ in range(3):
        layer(x, edges).sum().backward()
    assert len(counts) == first
    layer(x, graph_of(1))
    layer(x, edges)  # still there after another one
    again = len(counts)
    layer(x, edges)
    assert len(counts) == again


def test_an_edge_index_written_to_is_another_graph():
    x, edges, layer = features(), graph_of().edge_index.clone(), layer_of()
    before = layer(x, edges)
    edges[:, :4] = graph_of(3).edge_index[:, :4]
    torch.testing.assert_close(layer(x, edges), layer(x, edges.clone()))
    assert not torch.equal(layer(x, edges), before)


def test_learned_edge_weights_are_used_anew():
    graph, x = graph_of(), features()
    weight = torch.rand(graph.num_edges, dtype=DOUBLE, requires_grad=True)
    layer = layer_of(attention=EdgeAttention(4, heads=2, reweight="shares"))
    weighted = graph.with_weight(weight)
    with torch.no_grad():
        layer(x, weighted)  # what is evaluated without gradients must not be kept for those with
    for _ in range(2):
        layer(x, weighted).square().sum().backward()
    assert weight.grad.abs().max() > 0


def test_training_after_inference():
    x, edges, layer = features(), graph_of().edge_index, layer_of()
    with torch.inference_mode():
        expected = layer(x, edges)
        torch.testing.assert_close(layer(x.clone(), edges.clone()), expected)
    out = layer(x, edges)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected.clone())


def test_another_graph_at_each_call():
    """Two graphs side by side are each by itself, and numbers of nodes do not matter: the layer is inductive."""
    layer, graphs = layer_of(), [graph_of(0), graph_of(1, 7)]
    x = [features(), features(7)]
    both = layer(torch.cat(x), go.Graph.batch(graphs))
    torch.testing.assert_close(both, torch.cat([layer(x[0], graphs[0]), layer(x[1], graphs[1])]), rtol=1e-5, atol=1e-6)
    order = torch.randperm(N)
    place = order.argsort()
    torch.testing.assert_close(layer(x[0][order], place[graphs[0].edge_index]), both[:N][order], rtol=1e-5, atol=1e-6)


@needs["torch_geometric"]
def test_neighbour_loader():
    from torch_geometric import typing
    from torch_geometric.loader import NeighborLoader

    if not (typing.WITH_PYG_LIB or typing.WITH_TORCH_SPARSE):
        pytest.skip("PyG samples neighbours with pyg-lib or torch-sparse, and neither is installed")
    graph, x = graph_of(), features()
    layer = layer_of()
    loader = NeighborLoader(graph.to_pyg(x=x), num_neighbors=[-1] * N, batch_size=4)
    for batch in loader:  # all neighbours of neighbours: what is computed of the seeds is that of the whole graph
        torch.testing.assert_close(layer(batch)[:4], layer(x, graph)[batch.n_id][:4], rtol=1e-5, atol=1e-6)


def test_features_as_a_graph_are_their_matrix():
    """Values, gradients, and in training the same zeros left out: dropout of a feature that is 0 is no matter."""
    graph, x = graph_of(), features() * (features() > 0)
    data, layer = NodeData(graph, x), layer_of(source="x0")
    found, expected = (gradients(layer, layer(given, graph).square().sum()) for given in (data.features, x))
    torch.testing.assert_close(found, expected)
    dropping = layer_of(input_dropout=1.0).train()
    torch.testing.assert_close(dropping.encode(data.features), dropping.encode(x))
    for bad in (data.features.with_weight(None), data.features.reverse()):
        with pytest.raises(go.ArgumentError, match="a graph from"):
            layer(bad, graph)


# --- as a module -----------------------------------------------------------------------------------------------------


def test_saving_loading_copying():
    graph, x = graph_of(), features()
    layer = layer_of(source="x0")
    expected = layer(x, graph)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = GraphDiffusion(3, 4, 2, 2.0, attention=EdgeAttention(4, heads=2), alpha="channel", source="x0").double()
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x, graph), expected)
    copied = copy.deepcopy(layer.eval())
    assert not copied._graphs
    assert torch.equal(copied(x, graph), expected)


def trained_on_communities(time: float, **options) -> tuple[GraphDiffusion, float]:
    """A layer, and its accuracy on the nodes without a label: two blocks of 20, features of which a linear classifier tells
    two thirds apart, four labels of each block."""
    generator = torch.Generator().manual_seed(0)
    block, known = torch.arange(40) >= 20, torch.arange(40) % 20 < 4
    draws = torch.rand(40, 40, generator=generator)
    graph = go.Graph((draws < torch.where(block[:, None] == block, 0.3, 0.02)).nonzero().T, 40).to_undirected()
    x = torch.randn(40, 8, generator=generator) + 0.5 * block[:, None]
    torch.manual_seed(0)
    layer = GraphDiffusion(8, 8, 2, time, **options)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02, weight_decay=0.05)
    for _ in range(15):
        optimizer.zero_grad()
        loss = cross_entropy(layer(x, graph, trusted=known)[known], block.long()[known])
        total = loss if layer.penalty is None else loss + layer.penalty
        total.backward()
        optimizer.step()
    right = layer.eval()(x, graph, trusted=known).argmax(1) == block
    return layer, float(right[~known].float().mean())


FOUR_STEPS = {"method": "rk4", "num_steps": 4}
LOOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.mark.parametrize(
    "options",
    [
        {"field": "linear", "source": "x0", **LOOSE},
        {"field": "laplacian", **LOOSE},
        {"field": "nonlinear", "source": "degree", **FOUR_STEPS},
        {"field": "rewired", "rho": 0.05, **FOUR_STEPS},
        {"field": "linear", "attention": "additive", "source": "printed", **LOOSE},
        {"field": "nonlinear", "penalties": {"kinetic": 0.01, "jacobian": 0.01}, **FOUR_STEPS},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_training_finds_communities(options):
    """Which the graph alone can tell: without time to diffuse in, the same layer misses a third of the nodes."""
    layer, accuracy = trained_on_communities(4.0, **options)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert accuracy >= 0.9
    assert (layer.penalty is None) == ("penalties" not in options)


def test_communities_are_not_found_without_diffusion():
    assert trained_on_communities(1e-3, **LOOSE)[1] <= 0.75


def test_a_solve_stopped_early_gives_the_state_it_stopped_at():
    graph, x = graph_of(), features()
    scores = iter([3.0, 2.0])
    stopping = EarlyStopping(lambda z: next(scores), patience=1)
    layer = layer_of(4.0, method="euler", num_steps=4, observer=stopping)
    shorter = layer_of(2.0, method="euler", num_steps=2)
    shorter.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x, graph), shorter(x, graph))
    assert stopping.t == 1.0


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"time": 0.0}, go.ArgumentError, "time = 0.0"),
        ({"time": torch.tensor(1.0)}, go.ArgumentTypeError, "Parameter"),
        ({"field": "nonliner"}, go.UnknownNameError, "did you mean 'nonlinear'"),
        ({"attention": "dot_produkt"}, go.UnknownNameError, "did you mean 'dot_product'"),
        ({"alpha": "chanel"}, go.UnknownNameError, "did you mean 'channel'"),
        ({"source": "x"}, go.UnknownNameError, "x0"),
        ({"field": "rewired"}, go.ArgumentError, "rho = None"),
        ({"rho": 0.1}, go.ArgumentError, "rho = 0.1"),
        ({"penalties": {"kinetics": 1.0}, "method": "dopri5"}, go.UnknownNameError, "did you mean 'kinetic'"),
        ({"field": "nonlinear", "method": "exp_linear"}, solvers.ArgumentError, "takes a LinearField"),
        ({"penalties": {"kinetic": 1.0}}, solvers.ArgumentError, "takes a LinearField"),
        ({"method": "dopri"}, solvers.UnknownNameError, "did you mean"),
        ({"method": "euler"}, solvers.ArgumentError, "no error estimate"),
        ({"rtoll": 1e-3}, solvers.UnknownNameError, "rtol"),
    ],
)
def test_bad_choices_are_named_when_the_layer_is_built(options, error, words):
    with pytest.raises(error, match=words):
        GraphDiffusion(3, 4, 2, **options)


def test_bad_calls_are_named():
    layer, x, graph = GraphDiffusion(3, 4, 2), torch.randn(N, 3), graph_of()
    with pytest.raises(go.ArgumentError, match="layer\\(x, edge_index\\)"):
        layer(x)
    with pytest.raises(go.ArgumentError, match="\\(n, 3\\)"):
        layer(torch.randn(N, 5), graph)
    with pytest.raises(go.ArgumentError, match="x has 9 nodes and the graph 10"):
        layer(x[:9], graph)
    with pytest.raises(go.ArgumentTypeError, match="edge_index"):
        layer(x, [[0], [1]])
    with pytest.raises(go.ArgumentError, match="too small"):
        layer(x, torch.tensor([[0, N], [1, 2]]))
    with pytest.raises(go.ArgumentError, match="needs trusted="):
        GraphDiffusion(3, 4, 2, source="degree")(x, graph)
