"""Attention: scores against their definitions edge by edge, shares that add up, derivatives, transforms, batches."""

from __future__ import annotations

import math

import pytest
import torch
from graphs import EACH_BACKEND, EDGES, awkward, random_graph
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.nn.functional import cosine_similarity, leaky_relu

import graphops as go
from graphops import Attention, autograd
from graphops import attention as at

DOUBLE = torch.float64
E, N = EDGES.shape[1], 7


def correlation(a, b):
    return torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a.flatten(0, -2), b.flatten(0, -2))])


BY_EDGE = {
    "dot_product": lambda q, k: (q * k).sum(-1) / math.sqrt(q.shape[-1]),
    "cosine": lambda q, k: cosine_similarity(q, k, dim=-1),
    "pearson": lambda q, k: correlation(q, k).view(q.shape[:-1]),
    "exponential_kernel": lambda q, k: torch.exp(-(q - k).square().sum(-1) / 2),
    "additive": lambda q, k: leaky_relu(q + k, 0.2),
}
"""Each score of queries and keys that stand at the edges already, by torch's own functions where there are any."""


def ends(name, heads=2, dtype=DOUBLE, nodes=N, **kwargs):
    shape = (nodes, *([heads] if heads else []), *([] if name == "additive" else [4]))
    return [torch.randn(*shape, dtype=dtype, **kwargs) for _ in range(2)]


@pytest.fixture
def graph():
    return awkward(DOUBLE)


# --- scores ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [0, 2])
@pytest.mark.parametrize("name", BY_EDGE)
def test_scores_are_those_of_each_edge(graph, name, heads):
    assert set(BY_EDGE) == set(at.SCORES)
    q, k = ends(name, heads)
    torch.testing.assert_close(at.SCORES[name](graph, q, k), BY_EDGE[name](q[graph.target], k[graph.source]))


@pytest.mark.parametrize("name", BY_EDGE)
def test_scores_between_two_sets_of_nodes(name):
    graph = go.Graph(torch.tensor([[0, 2, 1, 2], [1, 0, 1, 1]]), (3, 2))
    (_, k), (q, _) = ends(name, nodes=3), ends(name, nodes=2)
    torch.testing.assert_close(at.SCORES[name](graph, q, k), BY_EDGE[name](q[graph.target], k[graph.source]))
    v = torch.randn(3, 5, dtype=DOUBLE)
    assert Attention(name)(graph, q, k, v).shape == (2, 5)


def test_scales_and_parameters(graph):
    q, k = ends("dot_product")
    plain = (q[graph.target] * k[graph.source]).sum(-1)
    torch.testing.assert_close(at.dot_product(graph, q, k, scale="d_k"), plain / 4)
    torch.testing.assert_close(at.dot_product(graph, q, k, scale=3.0), plain * 3)
    variance, lengthscale = torch.tensor([0.5, 2.0], dtype=DOUBLE), torch.tensor([1.5, 0.7], dtype=DOUBLE)
    squares = (q[graph.target] - k[graph.source]).square().sum(-1)
    expected = variance * torch.exp(-squares / (2 * lengthscale**2))
    torch.testing.assert_close(at.exponential_kernel(graph, q, k, variance, lengthscale), expected)
    expected = (q[graph.target] + k[graph.source])[..., 0].relu()
    torch.testing.assert_close(at.additive(graph, q[..., 0], k[..., 0], slope=0.0), expected)


def test_directions_of_nothing_have_score_and_derivative_zero():
    graph = go.Graph(torch.tensor([[0, 1], [1, 0]]))
    for name, q in (("cosine", torch.zeros(2, 3)), ("pearson", torch.full((2, 3), 0.1))):
        q = q.double().requires_grad_()
        k = torch.randn(2, 3, dtype=DOUBLE)
        scores = at.SCORES[name](graph, q, k)
        assert scores.tolist() == [0, 0]
        assert torch.autograd.grad(scores.sum(), q)[0].eq(0).all()


def test_kernel_keeps_its_digits_far_from_the_origin():
    graph = go.Graph.knn(torch.rand(50, 2), 5)
    x = torch.rand(50, 2) + 1000
    expected = torch.exp(-(x[graph.target] - x[graph.source]).square().sum(-1).double() / 2)
    torch.testing.assert_close(at.exponential_kernel(graph, x, x).double(), expected, rtol=1e-4, atol=0)


# --- shares ----------------------------------------------------------------------------------------------------------

REWEIGHTINGS = [None, "scores", "shares"]


def by_node(graph, scores, by, over, reweight):
    """The definition, one node after the other."""
    index = graph.target if over == "incoming" else graph.source
    out = torch.empty_like(scores)
    weight = graph.weight[:, None]
    for i in index.unique():
        s, w = scores[index == i], weight[index == i]
        s = s * w if reweight == "scores" else s
        positive = s.exp() if by == "softmax" else (s + (s * s + 4).sqrt()) / 2
        positive = positive * w if reweight == "shares" else positive
        out[index == i] = positive / positive.sum(0)
    return out


@pytest.mark.parametrize("reweight", REWEIGHTINGS)
@pytest.mark.parametrize("over", ["incoming", "outgoing"])
@pytest.mark.parametrize("by", ["softmax", "squareplus"])
def test_shares_are_those_of_each_node(graph, by, over, reweight):
    scores = 3 * torch.randn(E, 2, dtype=DOUBLE)
    found = at.normalise(graph, scores, by, over, reweight)
    torch.testing.assert_close(found, by_node(graph, scores, by, over, reweight))


edges = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=20)


@given(edges, st.sampled_from(sorted(BY_EDGE)), st.sampled_from(["softmax", "squareplus"]), st.sampled_from(REWEIGHTINGS))
def test_shares_add_up_to_one(pairs, name, by, reweight):
    graph = go.Graph(torch.tensor(pairs).t(), 6, torch.rand(len(pairs), dtype=DOUBLE) + 0.1)
    q, k = (10 * x for x in ends(name, nodes=6))
    for over, segments in (("incoming", graph.incoming), ("outgoing", graph.outgoing)):
        kept = Attention(name, normaliser=by, over=over, reweight=reweight, heads="concat").weights(graph, q, k)
        mean = Attention(name, normaliser=by, over=over, reweight=reweight).weights(graph, q, k)
        assert kept.shape == (len(pairs), 2) and kept.min() >= 0
        torch.testing.assert_close(kept.mean(1), mean)
        torch.testing.assert_close(go.sum(segments, mean), (segments.counts > 0).double())


@given(edges)
def test_averages_stay_between_the_least_and_the_greatest_value(pairs):
    """The maximum principle of incoming shares (Chamberlain et al. 2021, eq. 3)."""
    graph = go.Graph(torch.tensor(pairs).t(), 6).add_self_loops()
    q, k = ends("dot_product", nodes=6)
    x = torch.randn(6, 3, dtype=DOUBLE)
    out = Attention()(graph, q, k, x)
    assert ((out <= x.amax(0) + 1e-12) & (out >= x.amin(0) - 1e-12)).all()


def test_squareplus_far_out_and_at_zero():
    x = torch.tensor([-1e6, -3, 0, 3, 1e6])
    wide = x.double()
    # Of a negative number the root cancels in float32; the product with the value at -x is 1.
    torch.testing.assert_close(at.squareplus(x) * at.squareplus(-x), torch.ones(5))
    torch.testing.assert_close(at.squareplus(wide[1:4]), (wide[1:4] + (wide[1:4] ** 2 + 4).sqrt()) / 2)
    zero = torch.zeros((), dtype=DOUBLE, requires_grad=True)
    (first,) = torch.autograd.grad(at.squareplus(zero), zero, create_graph=True)
    (second,) = torch.autograd.grad(first, zero)
    assert (first.item(), second.item()) == (0.5, 0.25)


@pytest.mark.parametrize("by", ["softmax", "squareplus"])
def test_an_edge_of_weight_zero_takes_no_part(graph, by):
    """Not even where its score is so far above the others that they underflow beside it."""
    masked = graph.target.eq(2) & graph.source.eq(4)
    weight = torch.where(masked, 0.0, 1.0).double().requires_grad_()
    scores = torch.where(masked, 1000.0, torch.randn(E, dtype=DOUBLE))
    shares = at.normalise(graph.with_weight(weight), scores, by, reweight="shares")
    rest = at.normalise(graph.edge_subgraph(~masked), scores[~masked], by)
    assert shares[masked].tolist() == [0, 0]
    torch.testing.assert_close(shares[~masked], rest)
    assert torch.autograd.grad(shares.square().sum(), weight)[0].isfinite().all()


# --- application -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("over", ["incoming", "outgoing"])
@pytest.mark.parametrize("name", BY_EDGE)
def test_application_is_the_product_with_the_weights(graph, name, over):
    q, k = ends(name)
    shared, own = torch.randn(N, 3, dtype=DOUBLE), torch.randn(N, 2, 3, dtype=DOUBLE)
    how = dict(over=over, reweight="shares")
    mean, kept = Attention(name, **how), Attention(name, heads="concat", **how)
    heads = kept.weights(graph, q, k)
    each = torch.stack([go.spmm(graph, heads[:, h], own[:, h]) for h in range(2)], 1)
    torch.testing.assert_close(mean(graph, q, k, own), each.mean(1))
    torch.testing.assert_close(kept(graph, q, k, own), each.flatten(1))
    torch.testing.assert_close(mean(graph, q, k, shared), go.spmm(graph, mean.weights(graph, q, k), shared))
    torch.testing.assert_close(kept(graph, q, k, shared)[:, 3:], go.spmm(graph, heads[:, 1], shared))
    torch.testing.assert_close(mean(graph, q, k, shared[:, 0]), mean(graph, q, k, shared)[:, 0])
    one = Attention(name, **how)
    torch.testing.assert_close(one(graph, q[:, 0], k[:, 0], shared), go.spmm(graph, heads[:, 0], shared))


def test_the_default_is_the_fused_attention(graph):
    q, k = ends("dot_product")
    v = torch.randn(N, 2, 3, dtype=DOUBLE)
    torch.testing.assert_close(Attention(heads="concat")(graph, q, k, v), go.attend(graph, q, k, v).flatten(1))


def test_values_are_in_the_order_of_the_users_edges():
    graph = random_graph(30, 200).with_weight(torch.rand(200, dtype=DOUBLE))
    shuffle = torch.randperm(200)
    other = graph.edge_subgraph(shuffle)
    q, k = ends("cosine", nodes=30)
    x = torch.randn(30, 3, dtype=DOUBLE)
    bias = torch.randn(200, dtype=DOUBLE)

    def biased(values):
        return lambda g, q, k: at.cosine(g, q, k) + values[:, None]

    for how in (dict(reweight="scores"), dict(over="outgoing", normaliser="squareplus")):
        attention = Attention("cosine", **how)
        torch.testing.assert_close(attention.weights(other, q, k), attention.weights(graph, q, k)[shuffle])
        torch.testing.assert_close(attention(other, q, k, x), attention(graph, q, k, x))
        # A score of one's own may bring numbers for the edges along.
        own, theirs = (Attention(biased(values), **how) for values in (bias, bias[shuffle]))
        torch.testing.assert_close(theirs(other, q, k, x), own(graph, q, k, x))


def test_no_features_are_formed_at_edges():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                    self.numbers = max(self.numbers, tensor.numel())
            return out

    graph = random_graph(100, 3000)
    for name in BY_EDGE:
        q, k = (x.requires_grad_() for x in ends(name, heads=2, nodes=100))
        v = torch.randn(100, 2, 64, dtype=DOUBLE, requires_grad=True)
        with Largest() as largest:
            Attention(name, heads="concat")(graph, q, k, v).square().sum().backward()
        assert largest.numbers <= 100 * 2 * 64, name


# --- derivatives and transforms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_EDGE)
@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_derivatives(backend, name):
    with go.backend(backend) as kernels:
        graph = awkward(DOUBLE).to("cuda" if "cpu" not in kernels.devices else "cpu")
        leaf = dict(device=graph.device, requires_grad=True)
        inputs = (*ends(name, **leaf), torch.randn(N, 3, dtype=DOUBLE, **leaf), graph.weight.clone().requires_grad_())
        attention = Attention(name, normaliser="softmax" if name != "cosine" else "squareplus", reweight="shares")

        def function(q, k, v, w):
            return attention(graph.with_weight(w), q, k, v)

        assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
        assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


def test_derivatives_of_the_kernels_parameters(graph):
    q, k = ends("exponential_kernel")
    inputs = [torch.rand(2, dtype=DOUBLE, requires_grad=True) for _ in range(2)]
    function = lambda variance, lengthscale: Attention("exponential_kernel", over="outgoing", normaliser="squareplus").weights(
        graph, q, k, variance=variance, lengthscale=lengthscale + 1
    )
    assert gradcheck(function, inputs) and gradgradcheck(function, inputs)


@pytest.mark.parametrize("name", BY_EDGE)
def test_vmap_over_states_and_over_weights(graph, name):
    attention = Attention(name, reweight="shares")
    q, k = (torch.stack(pair) for pair in zip(*(ends(name) for _ in range(3))))
    found = torch.func.vmap(lambda q, k: attention.weights(graph, q, k))(q, k)
    torch.testing.assert_close(found, torch.stack([attention.weights(graph, *pair) for pair in zip(q, k)]))
    weights = torch.rand(3, E, dtype=DOUBLE)
    found = torch.func.vmap(lambda w: attention.weights(graph.with_weight(w), q[0], k[0]))(weights)
    torch.testing.assert_close(found, torch.stack([attention.weights(graph.with_weight(w), q[0], k[0]) for w in weights]))


@pytest.mark.parametrize("name", [n if n == "pearson" else pytest.param(n, marks=pytest.mark.slow) for n in BY_EDGE])
def test_compiles_as_one_graph(name):
    graph = awkward(torch.float32)
    attention = Attention(name, reweight="shares", normaliser="squareplus" if name == "pearson" else "softmax")
    inputs = [*ends(name, dtype=torch.float32, requires_grad=True), torch.randn(N, 3, requires_grad=True)]

    def function(q, k, v):
        return attention(graph, q, k, v)

    torch._dynamo.reset()
    outputs = [run(*inputs) for run in (torch.compile(function, fullgraph=True, backend="aot_eager"), function)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), inputs) for out in outputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(graph, dtype):
    graph = awkward(torch.float32)
    for name in BY_EDGE:
        q, k = (x.to(dtype) for x in ends(name))
        attention = Attention(name, reweight="shares", normaliser="squareplus")
        found, wide = attention.weights(graph, q, k), attention.weights(graph, q.float(), k.float())
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), wide, rtol=2e-2, atol=2e-2)


# --- batches and bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, dict(normaliser="squareplus", over="outgoing", reweight="scores")])
def test_a_batch_of_unequal_graphs_is_each_graph_alone(how):
    graphs = [random_graph(3 + i % 7, 5 + i, seed=i) for i in range(64)]
    graphs = [g.with_weight(torch.rand(g.num_edges, dtype=DOUBLE)) for g in graphs]
    batch = go.Graph.batch(graphs)
    for name in BY_EDGE:
        q, k = ends(name, nodes=batch.num_nodes)
        attention = Attention(name, **how)
        sizes = [g.num_nodes for g in graphs]
        alone = [attention.weights(g, *pair) for g, *pair in zip(graphs, q.split(sizes), k.split(sizes))]
        torch.testing.assert_close(attention.weights(batch, q, k), torch.cat(alone))


def test_bad_input(graph):
    q, k = ends("cosine")
    cases = [
        (lambda: Attention("dot"), go.UnknownNameError, "dot_product"),
        (lambda: Attention(normaliser="softmx"), go.UnknownNameError, "softmax"),
        (lambda: Attention(over="in"), go.UnknownNameError, "incoming"),
        (lambda: Attention(heads="average"), go.UnknownNameError, "concat"),
        (lambda: Attention(reweight="share"), go.UnknownNameError, "shares"),
        (lambda: Attention("cosine", scale="d_k"), go.ArgumentError, "belongs to the dot product"),
        (lambda: Attention(scale="dk").weights(graph, q, k), go.UnknownNameError, "d_k"),
        (lambda: Attention().weights(graph, q[:3], k), go.ArgumentError, r"q has shape.*7 \(targets\)"),
        (lambda: Attention("pearson").weights(graph, q, k[:, :1]), go.ArgumentError, "must agree"),
        (lambda: Attention("additive").weights(graph, q, k), go.ArgumentError, "must agree"),
        (lambda: Attention("cosine").weights(graph, q.long(), k.long()), go.ArgumentTypeError, "floating point"),
        (lambda: Attention()(graph, q, k, torch.ones(3, 2)), go.ArgumentError, r"x has shape.*7 \(sources\)"),
        (lambda: Attention()(graph, q, k, torch.ones(7, 3, 2)), go.ArgumentError, "H heads"),
        (lambda: at.normalise(graph, torch.ones(3)), go.ArgumentError, r"scores has shape.*11 \(E, edges\)"),
        (lambda: Attention(reweight="shares").weights(awkward(), q, k), go.ArgumentError, "needs a graph with weights"),
        (lambda: Attention(reweight="shares").weights(graph.with_weight(-graph.weight), q, k), go.ArgumentError, "below 0"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("by", ["softmax", "squareplus"])
@pytest.mark.parametrize("over", ["incoming", "outgoing"])
def test_the_mean_of_heads_in_one_function_is_that_of_its_parts(by, over):
    """An empty segment, parallel edges, a row masked out; batched cotangents; first and second derivatives."""
    graph = go.Graph(torch.randint(0, 6, (2, 20), generator=torch.Generator().manual_seed(0)), 7)
    segments = getattr(graph, over)
    scores = 3 * torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def parts(x):
        return at.averaged(at.normalise(graph, x, by, over))

    def whole(x):
        return autograd.mean_shares(segments, x, by)

    masked = torch.where(segments.index[:, None] == 1, -torch.inf, scores) if by == "softmax" else scores
    torch.testing.assert_close(whole(masked), parts(masked))
    x = scores.clone().requires_grad_()
    cotangents = torch.randn(4, 20, dtype=torch.float64)
    own, theirs = (torch.autograd.grad(f(x), x, cotangents, is_grads_batched=True)[0] for f in (whole, parts))
    torch.testing.assert_close(own, theirs)
    assert torch.autograd.gradcheck(whole, x) and torch.autograd.gradgradcheck(whole, x)
    assert whole(x[:, :0]).shape == (20,)
