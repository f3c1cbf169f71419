"""Rewiring: diffusion matrices against dense inverses and exponentials, bounds of the push, what is kept of the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from graphs import awkward, dense, needs, random_graph
from hypothesis import given
from hypothesis import strategies as st

import graphops as go
from graphops import rewire
from graphops.rewire import Heat, PageRank, diffuse, drop_edges, gdc, knn, threshold, top_k, transition, two_hop

DOUBLE = torch.float64
KERNELS = [PageRank(0.2), Heat(3.0), [0.5, 0.0, 0.3, 0.2]]


def weighted(nodes: int = 30, edges: int = 60, seed: int = 0, symmetric: bool = True) -> go.Graph:
    """Random weights in both directions, the last node without edges."""
    graph = random_graph(nodes - 1, edges, seed).coalesce()
    weight = torch.rand(graph.num_edges, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)) + 0.2
    graph = go.Graph(graph.edge_index, nodes, weight)
    return graph.to_undirected() if symmetric else graph


def normalised(w: np.ndarray, normalisation: str) -> np.ndarray:
    degree = w.sum(1)
    with np.errstate(divide="ignore"):
        if normalisation == "random_walk":
            return np.where(degree > 0, 1 / degree, 0)[:, None] * w
        scale = np.where(degree > 0, degree**-0.5, 0)
    return scale[:, None] * w * scale


def exact(t: np.ndarray, kernel) -> np.ndarray:
    """The diffusion matrix by dense algebra."""
    one = np.eye(len(t))
    if isinstance(kernel, PageRank):
        return kernel.alpha * np.linalg.inv(one - (1 - kernel.alpha) * t)
    if isinstance(kernel, Heat):
        return scipy.linalg.expm(-kernel.t * (one - t))
    return sum(c * np.linalg.matrix_power(t, k) for k, c in enumerate(kernel))


def matrix(graph: go.Graph) -> np.ndarray:
    return dense(graph, graph.weight).numpy()


def with_loops(graph: go.Graph, fill: float | None) -> np.ndarray:
    w = matrix(graph)
    return w if fill is None else w + fill * np.diag(np.diag(w) == 0)


# --- transition matrices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [1.0, 0.5, None])
@pytest.mark.parametrize("normalisation", ["symmetric", "random_walk"])
def test_transition_matrix(normalisation, fill):
    for graph in (weighted(), weighted(symmetric=False), awkward(DOUBLE)):
        found = matrix(transition(graph, normalisation, fill))
        np.testing.assert_allclose(found, normalised(with_loops(graph, fill), normalisation), atol=1e-15)
    bare = transition(random_graph(9, 12), normalisation, fill)
    assert bare.weight.dtype == torch.float32 and bare.weight.isfinite().all()


@pytest.mark.parametrize("fill", [1.0, None])
@pytest.mark.parametrize("normalisation", ["symmetric", "random_walk"])
def test_transition_is_differentiable_in_the_weights(normalisation, fill):
    graph = awkward(DOUBLE)
    weight = graph.weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w: transition(graph.with_weight(w), normalisation, fill).weight, (weight,))


# --- series ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [1e-3, 1e-8])
@pytest.mark.parametrize("kernel", [PageRank(0.02), PageRank(0.15), PageRank(0.9), Heat(0.1), Heat(5.0), Heat(200.0)])
def test_coefficients_leave_out_what_they_may(kernel, tol):
    """The function of a number z in [-1, 1]; at z = 1 all terms are positive and the error is what is left out."""
    z = np.cos(np.linspace(0, math.pi, 301))
    value = kernel.alpha / (1 - (1 - kernel.alpha) * z) if isinstance(kernel, PageRank) else np.exp(-kernel.t * (1 - z))
    powers, chebyshev = kernel.powers(tol), kernel.chebyshev(tol)
    for found in (np.polynomial.polynomial.polyval(z, powers), np.polynomial.chebyshev.chebval(z, chebyshev)):
        error = np.abs(found - value)
        assert error.max() <= tol * (1 + 1e-4)
        assert error[0] > 1e-3 * tol  # nor is much more taken than needed
    assert (powers >= 0).all() and len(chebyshev) <= len(powers)


@pytest.mark.parametrize("normalisation", ["symmetric", "random_walk"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_diffuse_is_the_dense_matrix(kernel, normalisation):
    for symmetric in (True, False):
        graph = transition(weighted(symmetric=symmetric), normalisation)
        x = torch.randn(30, 2, 3, dtype=DOUBLE)
        expected = np.tensordot(exact(matrix(graph), kernel), x.numpy(), 1)
        np.testing.assert_allclose(diffuse(graph, kernel, x, tol=1e-13), expected, atol=1e-11)
        if symmetric and not isinstance(kernel, list):
            np.testing.assert_allclose(diffuse(graph, kernel, x, basis="chebyshev", tol=1e-13), expected, atol=1e-11)


def test_chebyshev_takes_a_third_of_the_products():
    assert len(PageRank(0.15).chebyshev(1e-6)) < len(PageRank(0.15).powers(1e-6)) / 3
    assert len(Heat(64.0).chebyshev(1e-6)) < len(Heat(64.0).powers(1e-6)) / 2


def test_diffuse_learns_its_coefficients():
    graph, theta = transition(awkward(DOUBLE)), torch.tensor([0.3, 0.5, -0.2], dtype=DOUBLE, requires_grad=True)
    x = torch.randn(7, 2, dtype=DOUBLE, requires_grad=True)
    weight = graph.weight.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda w, c, x: diffuse(graph.with_weight(w), c, x), (weight, theta, x))
    with torch.no_grad():
        diffuse(graph, PageRank(), x)
    assert torch.autograd.gradcheck(lambda x: diffuse(graph, Heat(1.0), x, basis="chebyshev"), (x,))


# --- diffusion convolution -------------------------------------------------------------------------------------------


def kept_of(s: np.ndarray, k: int) -> np.ndarray:
    """The k largest entries of each row, without zeros."""
    level = -np.sort(-s, axis=1)[:, min(k, s.shape[1]) - 1 : min(k, s.shape[1])]
    return np.where((s >= level) & (s > 1e-9), s, 0)


@pytest.mark.parametrize("normalisation", ["symmetric", "random_walk"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gdc_is_the_thinned_dense_matrix(kernel, normalisation, monkeypatch):
    monkeypatch.setattr(rewire, "BLOCK", 7)
    for symmetric in (True, False):
        graph = weighted(symmetric=symmetric)
        s = exact(normalised(with_loops(graph, 0.7), normalisation), kernel)
        found = gdc(graph, kernel, k=5, normalisation=normalisation, self_loops=0.7)
        assert found.is_sorted and found.degree().max() <= 5
        np.testing.assert_allclose(matrix(found), kept_of(s, 5), atol=1e-9)
        found = gdc(graph, kernel, threshold=0.031, normalisation=normalisation, self_loops=0.7)
        np.testing.assert_allclose(matrix(found), np.where(s >= 0.031, s, 0), atol=1e-9)


@pytest.mark.parametrize("eps", [1e-2, 1e-4, 1e-8])
@pytest.mark.parametrize("normalisation", ["symmetric", "random_walk"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_pushed_weights_keep_their_bound(kernel, normalisation, eps, monkeypatch):
    """Below the exact entry, by no more than eps times the degree at the source (or the root of both degrees)."""
    monkeypatch.setattr(rewire, "BLOCK", 11)
    for graph, fill in ((weighted(), None), (weighted(50, 60, 3), 0.3)):
        w = with_loops(graph, fill)
        degree, s = w.sum(1), exact(normalised(w, normalisation), kernel)
        found = matrix(gdc(graph, kernel, threshold=1e-300, normalisation=normalisation, self_loops=fill, eps=eps))
        bound = np.sqrt(np.outer(degree, degree)) if normalisation == "symmetric" else degree
        missing = s - found
        assert (missing >= -1e-12).all() and (missing <= eps * bound + 1e-12).all()


def test_push_is_local():
    """On a long cycle only the neighbourhood of a node is reached, and the number of edges grows with n alone."""
    sizes = [gdc(go.Graph.grid((n,), periodic=True), threshold=1e-12, eps=1e-3).num_edges / n for n in (100, 1000)]
    assert sizes[0] == sizes[1] < 40


def test_exact_and_pushed_agree_on_an_asymmetric_graph():
    """Where a node has no edge into it and no loop, the symmetric normalisation cuts those out of it, in both."""
    graph = awkward(DOUBLE)
    for normalisation in ("symmetric", "random_walk"):
        for fill in (1.0, None):
            options = dict(threshold=1e-8, normalisation=normalisation, self_loops=fill)
            exactly, pushed = (dense(g, g.weight) for g in (gdc(graph, **options), gdc(graph, eps=1e-9, **options)))
            torch.testing.assert_close(pushed, exactly, rtol=0, atol=1e-7)


def test_gdc_keeps_dtype_and_batches():
    graph = go.Graph.batch([go.Graph.grid((4,)), go.Graph.grid((5,), periodic=True)])
    found = gdc(graph, Heat(1.0), k=3)
    assert found.node_counts == (4, 5) and found.weight.dtype == torch.float32
    assert (graph.batch_index[found.source] == graph.batch_index[found.target]).all()
    assert not gdc(graph.with_weight(torch.ones(graph.num_edges, requires_grad=True)), k=3).weight.requires_grad
    assert gdc(go.Graph.grid((1,)), k=9).edge_index.tolist() == [[0], [0]]
    nothing = go.Graph(torch.empty(2, 0, dtype=torch.int64), 0)
    for options in (dict(), dict(eps=1e-3), dict(eps=1e-3, kernel=Heat())):
        assert gdc(nothing, k=2, **options).num_edges == 0
    assert gdc(graph, k=2, eps=0.9).num_edges == 0  # not even a node itself matters so much
    skipping = gdc(graph, [0.5, 0.0, 0.5], k=9, eps=1e-4, self_loops=None)
    assert skipping.weight.min() > 0 and skipping.num_edges == (4 + 4) + (5 + 10)
    learned = torch.tensor([0.5, 0.5], requires_grad=True)
    assert gdc(graph, learned, k=3).num_edges == gdc(graph, learned, k=3, eps=1e-4).num_edges == 3 * 9 - 2


@needs["torch_geometric"]
@pytest.mark.parametrize(
    ("kernel", "options"),
    [(PageRank(0.15), dict(method="ppr", alpha=0.15)), (Heat(4.0), dict(method="heat", t=4.0)), ([0.2, 0.5, 0.3], None)],
)
def test_gdc_of_pyg(kernel, options):
    from torch_geometric.transforms import GDC

    graph = go.Graph.grid((5, 6)).to_undirected()
    options = options or dict(method="coeff", coeffs=kernel)
    transform = GDC(1.0, "sym", "row", options, dict(method="threshold", eps=0.02), exact=True)
    theirs = go.Graph.from_pyg(transform(graph.to_pyg()), weight="edge_attr")
    # Their matrices are our transposes; S is symmetric, so "row" there is by the edges out of a node.
    ours = transition(gdc(graph, kernel, threshold=0.02), "random_walk", self_loops=None).reverse()
    torch.testing.assert_close(dense(ours, ours.weight), dense(theirs, theirs.weight), rtol=1e-4, atol=1e-5)


# --- some of the edges -----------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 6))
def test_top_k_keeps_the_largest(seed, k):
    graph = random_graph(6, 25, seed)
    values = torch.randint(5, (25,), generator=torch.Generator().manual_seed(seed)).double()
    kept, edges = top_k(graph, k, values)
    assert torch.equal(kept.edge_index, graph.edge_index[:, edges]) and (edges.diff() > 0).all()
    for node in range(6):
        into = [e for e in range(25) if graph.target[e] == node]
        best = sorted(sorted(into, key=lambda e: (-values[e], e))[:k])
        assert [e for e in edges.tolist() if graph.target[e] == node] == best


def test_edges_by_threshold_with_heads():
    graph = awkward(DOUBLE)
    attention = go.softmax(graph, torch.randn(11, 4, dtype=DOUBLE))
    kept, edges = threshold(graph, 0.4, attention)
    assert edges.tolist() == [e for e in range(11) if attention[e].mean() > 0.4] and 0 < len(edges) < 11
    assert torch.equal(kept.weight, graph.weight[edges])
    assert threshold(graph, 1.0)[1].tolist() == (graph.weight > 1).nonzero()[:, 0].tolist()


def test_edges_are_dropped_at_random():
    graph = weighted(200, 2000)
    kept, edges = drop_edges(graph, 0.3, generator=torch.Generator().manual_seed(1))
    count = graph.num_edges
    assert abs(len(edges) - 0.7 * count) < 4 * math.sqrt(0.21 * count)
    assert torch.equal(kept.weight, graph.weight[edges])
    assert torch.equal(edges, drop_edges(graph, 0.3, generator=torch.Generator().manual_seed(1))[1])
    assert not torch.equal(edges, drop_edges(graph, 0.3, generator=torch.Generator().manual_seed(2))[1])
    assert kept.to_undirected().num_edges != kept.num_edges
    assert (drop_edges(graph, 0.0)[0].num_edges, drop_edges(graph, 1.0)[0].num_edges) == (count, 0)
    both = drop_edges(graph, 0.3, undirected=True, generator=torch.Generator().manual_seed(1))[0]
    assert both.to_undirected().num_edges == both.num_edges
    assert abs(both.num_edges - 0.7 * count) < 8 * math.sqrt(0.21 * count)


# --- new edges -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000))
def test_two_hops(seed):
    graph = random_graph(8, 12, seed)
    w = torch.rand(12, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)) + 0.1
    found, dense_w = two_hop(graph.with_weight(w)), dense(graph, w)
    square = dense_w @ dense_w
    torch.testing.assert_close(dense(found, found.weight), dense_w + square - square.diag().diag())
    bare = two_hop(graph)
    assert bare.weight is None and torch.equal(bare.edge_index, found.edge_index) and bare.is_sorted
    assert bare.coalesce().num_edges == bare.num_edges


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_nearest_neighbours_in_feature_space(metric, monkeypatch):
    monkeypatch.setattr(rewire, "BLOCK", 13)
    x = torch.randn(40, 25) + 1e3  # far from the origin, where products lose the digits of float32
    apart = torch.cdist(x.double(), x.double()) if metric == "euclidean" else 1 - torch.nn.functional.cosine_similarity(
        x.double()[:, None], x.double()[None], dim=2
    )  # fmt: skip
    apart.fill_diagonal_(math.inf)
    expected = apart.argsort(1)[:, :6]
    graph = knn(x, 6, metric)
    assert torch.equal(graph.source.view(40, 6), expected) and graph.is_sorted
    if metric == "euclidean":
        low = torch.randn(50, 3)
        assert torch.equal(knn(low, 4).edge_index, go.Graph.knn(low, 4).edge_index)


def test_rows_of_zeros_are_neighbours_of_none():
    x = torch.tensor([[0.0, 0], [1, 0], [1, 0.1], [0, 1]])
    assert knn(x, 1, "cosine").source[1:].tolist() == [2, 1, 2]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda g: transition(g, "sym"), go.UnknownNameError, "did you mean 'symmetric'"),
        (lambda g: transition(g.with_weight(-g.weight)), go.ArgumentError, "not below 0"),
        (lambda g: transition(go.Graph(g.edge_index, (7, 7))), go.UnsupportedError, "bipartite"),
        (lambda g: PageRank(1.0), go.ArgumentError, "alpha = 1.0"),
        (lambda g: Heat(0.0), go.ArgumentError, "t = 0.0"),
        (lambda g: Heat(math.nan), go.ArgumentError, "t = nan"),
        (lambda g: diffuse(g, [], torch.ones(7, 1)), go.ArgumentError, "coefficients of T"),
        (lambda g: diffuse(g, "ppr", torch.ones(7, 1)), go.ArgumentError, "PageRank"),
        (lambda g: diffuse(g, PageRank(), torch.ones(7, 1), tol=0.0), go.ArgumentError, "tol"),
        (lambda g: diffuse(g, PageRank(), torch.ones(7, 1), basis="taylor"), go.UnknownNameError, "basis"),
        (lambda g: diffuse(g, [1.0], torch.ones(7, 1), basis="chebyshev"), go.ArgumentError, "'power'"),
        (lambda g: diffuse(g, PageRank(), torch.ones(6, 1)), go.ArgumentError, "n, nodes"),
        (lambda g: diffuse(awkward(), PageRank(), torch.ones(7, 1)), go.ArgumentError, "transition"),
        (lambda g: gdc(g), go.ArgumentError, "give one of them"),
        (lambda g: gdc(g, k=3, threshold=0.1), go.ArgumentError, "give one of them"),
        (lambda g: gdc(g, k=0), go.ArgumentError, "k = 0"),
        (lambda g: gdc(g, threshold=0.0), go.ArgumentError, "threshold"),
        (lambda g: gdc(g, k=3, eps=0.0), go.ArgumentError, "eps"),
        (lambda g: gdc(g, [1.0, -0.1], k=3), go.ArgumentError, "not negative"),
        (lambda g: gdc(g, [], k=3), go.ArgumentError, "coefficients of T"),
        (lambda g: gdc(g, "heat", k=3), go.ArgumentError, "PageRank"),
        (lambda g: gdc(g, k=3, normalisation="row"), go.UnknownNameError, "random_walk"),
        (lambda g: top_k(g, 0), go.ArgumentError, "k = 0"),
        (lambda g: top_k(awkward(), 2), go.ArgumentError, "give values"),
        (lambda g: top_k(g, 2, torch.ones(3)), go.ArgumentError, "E, edges"),
        (lambda g: threshold(g, 0.1, torch.ones(11, 2, 2)), go.ArgumentError, "\\(E, H\\)"),
        (lambda g: threshold(g, 0.1, torch.ones(11).long()), go.ArgumentTypeError, "floating"),
        (lambda g: drop_edges(g, 1.1), go.ArgumentError, "probability"),
        (lambda g: two_hop(go.Graph(g.edge_index, (7, 7))), go.UnsupportedError, "bipartite"),
        (lambda g: knn(torch.ones(4), 1), go.ArgumentError, "\\(n, F\\)"),
        (lambda g: knn(torch.ones(4, 2), 4), go.ArgumentError, "from 1 to 3"),
        (lambda g: knn(torch.full((4, 2), math.inf), 1), go.ArgumentError, "infinity"),
        (lambda g: knn(torch.ones(4, 2), 1, "l1"), go.UnknownNameError, "metric"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(awkward(DOUBLE))
