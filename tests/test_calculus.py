"""Calculus: adjoints, conservation, operators against scipy, energies against their gradients, stencils and closed forms."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import scipy.fft
import scipy.sparse.csgraph
import torch
from graphs import EACH_BACKEND, awkward, dense, random_graph
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import graphops as go
import solvers
from solvers import solve

DOUBLE = torch.float64
KINDS = ("combinatorial", "random_walk", "symmetric")

ENERGIES = {
    "dirichlet": lambda g, **how: go.Dirichlet(g, **how),
    "p_laplacian": lambda g, **how: go.PLaplacian(g, 3.0, **how),
    "p_laplacian_below_2": lambda g, **how: go.PLaplacian(g, 1.3, 0.2, **how),
    "total_variation": lambda g, **how: go.TotalVariation(g, 0.3, **how),
    "perona_malik": lambda g, **how: go.PeronaMalik(g, 0.7, **how),
    "perona_malik_exponential": lambda g, **how: go.PeronaMalik(g, 0.7, "exponential", **how),
}
each_energy = pytest.mark.parametrize("name", ENERGIES)


@st.composite
def graphs(draw, symmetric=False, most=14):
    """Directed graphs of up to 6 nodes with parallel edges, loops, nodes without edges and weights."""
    nodes = draw(st.integers(1, 6))
    pairs = draw(st.lists(st.tuples(st.integers(0, nodes - 1), st.integers(0, nodes - 1)), max_size=most))
    edges = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).t()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    weight = torch.rand(edges.shape[1], dtype=DOUBLE, generator=generator) + 0.1
    if symmetric:
        edges, weight = torch.cat([edges, edges.flip(0)], 1), weight.repeat(2)
    return go.Graph(edges, nodes, weight)


def at_nodes(graph, *features):
    return torch.randn(graph.num_nodes, *features, dtype=DOUBLE)


def at_edges(graph, *features):
    return torch.randn(graph.num_edges, *features, dtype=DOUBLE)


def product(graph, X, Y):
    """<X, Y>_E."""
    return (graph.weight * (X * Y).flatten(1).sum(1)).sum() / 2


def symmetric(graph):
    """The matrix W of a symmetric graph, for references."""
    return dense(graph, graph.weight if graph.weight is not None else torch.ones(graph.num_edges, dtype=DOUBLE))


# --- the identities of calculus --------------------------------------------------------------------------------------


@given(graphs())
def test_the_gradient_and_its_adjoint(graph):
    x, X = at_nodes(graph, 3), at_edges(graph, 3)
    torch.testing.assert_close(product(graph, go.gradient(graph, x), X), (x * go.gradient_adjoint(graph, X)).sum())


@given(graphs(symmetric=True))
def test_divergence_is_minus_the_adjoint_of_what_changes_sign(graph):
    half = graph.num_edges // 2
    X = at_edges(graph, 2)[:half]
    X = torch.cat([X, -X])
    x = at_nodes(graph, 2)
    torch.testing.assert_close(product(graph, go.gradient(graph, x), X), -(x * go.divergence(graph, X)).sum())
    torch.testing.assert_close(go.divergence(graph, X), -go.gradient_adjoint(graph, X))


@given(graphs())
def test_the_laplacian_is_minus_the_divergence_of_the_gradient(graph):
    x = at_nodes(graph, 2)
    torch.testing.assert_close(go.laplacian(graph, x), -go.divergence(graph, go.gradient(graph, x)))
    W = dense(graph, graph.weight)
    torch.testing.assert_close(go.laplacian(graph, x), (W.sum(1).diag() - W) @ x)


@given(graphs(symmetric=True))
def test_the_gradient_of_the_energy_is_the_laplacian(graph):
    x = at_nodes(graph, 2).requires_grad_()
    energy = go.dirichlet_energy(graph, x)
    torch.testing.assert_close(torch.autograd.grad(energy, x)[0], go.laplacian(graph, x.detach()))
    torch.testing.assert_close(energy, (x * go.laplacian(graph, x)).sum() / 2)


@given(graphs(symmetric=True))
def test_what_each_flow_conserves(graph):
    x = at_nodes(graph, 2)
    degree = graph.degree(weighted=True)[:, None]
    zero = torch.zeros(2, dtype=DOUBLE)
    for kind, density in (("combinatorial", 1.0), ("random_walk", degree), ("symmetric", degree.sqrt())):
        change = (density * go.laplacian(graph, x, kind)).sum(0)
        torch.testing.assert_close(change, zero, atol=1e-12 * graph.num_edges * (1 + x.abs().max()), rtol=0)
    constant = go.laplacian(graph, torch.ones_like(x), "random_walk")
    torch.testing.assert_close(constant, torch.zeros_like(x), atol=1e-14, rtol=0)


def test_adjointness_to_rounding():
    graph = random_graph(500, 5000).with_weight(torch.rand(5000, dtype=DOUBLE))
    x, X = at_nodes(graph, 8), at_edges(graph, 8)
    left, right = product(graph, go.gradient(graph, x), X), (x * go.gradient_adjoint(graph, X)).sum()
    assert abs(left - right) / (x.norm() * X.norm()) < 1e-14


def test_values_of_any_shape_and_a_weight_of_ones_own():
    graph = awkward(DOUBLE)
    for features in ((), (3,), (2, 3)):
        x, X = at_nodes(graph, *features), at_edges(graph, *features)
        flat_x, flat_X = x.reshape(7, -1), X.reshape(graph.num_edges, -1)
        torch.testing.assert_close(go.gradient(graph, x), x[graph.source] - x[graph.target])
        other = torch.rand(graph.num_edges, dtype=DOUBLE)
        expected = torch.zeros_like(flat_x).index_add(0, graph.target, other[:, None] * flat_X)
        torch.testing.assert_close(go.divergence(graph, X, other), expected.view_as(x))
        for kind in KINDS[:2]:
            torch.testing.assert_close(go.laplacian(graph, x, kind), go.laplacian(graph, flat_x, kind).view_as(x))


def test_complex_values_and_half_precision():
    graph = awkward(DOUBLE).to_undirected()
    x = torch.randn(7, 2, dtype=torch.complex128)
    for kind in KINDS:
        found = go.laplacian(graph, x, kind)
        torch.testing.assert_close(found.imag, go.laplacian(graph, x.imag, kind))
        torch.testing.assert_close(go.laplacian_operator(graph, kind).matvec(x), found)
    torch.testing.assert_close(go.dirichlet_energy(graph, x), (x.conj() * go.laplacian(graph, x)).sum().real / 2)
    star = go.Graph(torch.stack([torch.arange(1, 4097), torch.zeros(4096, dtype=torch.int64)]), 4097)
    y = torch.full((4097, 1), 2.0**-10, dtype=torch.bfloat16)
    y[0] = 0
    assert go.laplacian(star, y)[0].item() == -4  # added one at a time in half precision the sum stays below 1
    for field in (go.laplacian_operator(star).matvec, lambda y: go.Dirichlet(star)(0.0, y)):
        assert field(y).dtype == torch.bfloat16


# --- Laplacians as operators -----------------------------------------------------------------------------------------


@given(graphs(symmetric=True), st.sampled_from(KINDS))
def test_operators_are_the_functions(graph, kind):
    x = at_nodes(graph, 2)
    operator = go.laplacian_operator(graph, kind)
    torch.testing.assert_close(operator.matvec(x), go.laplacian(graph, x, kind), atol=1e-13, rtol=1e-13)
    matrix = torch.from_numpy(operator.to_scipy().toarray())
    torch.testing.assert_close(operator.matvec(x), matrix @ x)
    torch.testing.assert_close(operator.rmatvec(x), matrix.T @ x)
    torch.testing.assert_close((-operator)(0.0, x), -matrix @ x)
    torch.testing.assert_close((0.3 * operator).matvec(x), 0.3 * matrix @ x)
    torch.testing.assert_close((-0.3 * operator).jacobian_diagonal(0.0, x), -0.3 * matrix.diag().unsqueeze(1).expand_as(x))
    eigenvalues = torch.linalg.eigvals(matrix)
    assert eigenvalues.real.min() > -1e-12
    largest = eigenvalues.abs().max().item()
    assert largest <= operator.spectral_bound() * (1 + 1e-12)
    assert (2 * -operator).spectral_bound() == 2 * operator.spectral_bound()
    assert operator.symmetric == torch.allclose(matrix, matrix.T, rtol=1e-12, atol=0)


@given(graphs())
def test_operators_of_directed_graphs(graph):
    x = at_nodes(graph, 2)
    for kind in KINDS[:2]:
        operator = go.laplacian_operator(graph, kind)
        matrix = torch.from_numpy(operator.to_scipy().toarray())
        torch.testing.assert_close(operator.matvec(x), go.laplacian(graph, x, kind), atol=1e-13, rtol=1e-13)
        torch.testing.assert_close(operator.rmatvec(x), matrix.T @ x)
        assert torch.linalg.eigvals(matrix).abs().max() <= operator.spectral_bound() * (1 + 1e-12)
        rate = (-operator).rate
        shifted = rate * torch.eye(graph.num_nodes, dtype=DOUBLE) - matrix
        assert rate is not None and shifted.min() >= -1e-14
        torch.testing.assert_close(shifted.sum(1), torch.full((graph.num_nodes,), rate, dtype=DOUBLE))


@pytest.mark.parametrize("normed", [False, True])
def test_laplacians_are_those_of_scipy(normed):
    graph = random_graph(40, 100).remove_self_loops().to_undirected()
    graph = graph.with_weight(torch.rand(graph.num_edges, dtype=DOUBLE)).to_undirected()
    expected = scipy.sparse.csgraph.laplacian(graph.to_scipy().tocsr(), normed=normed)
    found = go.laplacian_operator(graph, "symmetric" if normed else "combinatorial").to_scipy()
    np.testing.assert_allclose(found.toarray(), expected.toarray(), atol=1e-14)


@given(graphs(), st.booleans())
def test_linear_energies_and_frozen_diffusions_know_the_diagonals_of_their_jacobians(graph, isotropic):
    x = at_nodes(graph)
    energy = go.Dirichlet(graph, isotropic=isotropic)
    jacobian = torch.autograd.functional.jacobian(lambda y: energy(0.0, y), x)
    torch.testing.assert_close(energy.jacobian_diagonal(0.0, x), jacobian.diag())
    frozen = go.TotalVariation(graph, 0.3, isotropic=isotropic).operator(0.0, x)
    jacobian = torch.autograd.functional.jacobian(frozen.matvec, x)
    torch.testing.assert_close(frozen.jacobian_diagonal(0.0, x.float()), jacobian.diag().float())


def test_bounds_are_sharp_where_theory_says_so():
    leaves = torch.arange(1, 9)
    star = go.Graph(torch.stack([torch.zeros_like(leaves), leaves])).to_undirected()
    assert go.laplacian_operator(star).spectral_bound() == 9  # the largest eigenvalue of a star is its number of nodes
    even = go.Graph.grid((4, 6), periodic=True)  # bipartite
    for kind, expected in (("combinatorial", 8), ("random_walk", 2), ("symmetric", 2)):
        operator = go.laplacian_operator(even, kind)
        largest = np.linalg.eigvalsh(operator.to_scipy().toarray())[-1]
        assert operator.spectral_bound() == pytest.approx(expected) == largest
    assert go.laplacian_operator(go.Graph(torch.empty(2, 0, dtype=torch.int64), 3)).spectral_bound() == 0


def test_an_operator_of_ones_own_entries():
    graph = random_graph(12, 60).add_self_loops()
    shares = go.softmax(graph, torch.randn(graph.num_edges, dtype=DOUBLE))
    with_loops = go.Graph(torch.cat([graph.edge_index, torch.arange(12).expand(2, -1)], 1), 12)
    diffusion = go.GraphOperator(with_loops.with_weight(torch.cat([shares, -torch.ones(12, dtype=DOUBLE)])))
    x = at_nodes(graph, 3)
    torch.testing.assert_close(diffusion(0.0, x), go.spmm(graph, shares, x) - x)
    loops = graph.source == graph.target
    staying = go.sum(graph, torch.where(loops, shares, 0.0))
    assert diffusion.rate == pytest.approx(1 - staying.min().item())
    torch.testing.assert_close(diffusion.jacobian_diagonal(0.0, x[:, 0]), staying - 1)  # two loops a node
    assert diffusion.spectral_bound() <= 2 and not diffusion.symmetric
    rate = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    assert (rate * diffusion).spectral_bound() == diffusion.spectral_bound() / 2
    (by_rate,) = torch.autograd.grad((rate * diffusion).matvec(x).sum(), rate)
    torch.testing.assert_close(by_rate, diffusion.matvec(x).sum())
    assert go.laplacian_operator(graph).rate is None  # its entries off the diagonal are below 0
    assert (-go.laplacian_operator(go.Graph.grid((2, 3)), "symmetric")).rate is None  # its rows do not add up to 0


def test_states_keep_their_dtype_and_entries_their_digits():
    """1/3 in float32 is wrong in the eighth digit, which a float64 state would see."""
    path = go.Graph.grid((4,))
    operator = go.laplacian_operator(path, "random_walk")
    assert operator.matvec(torch.ones(4, dtype=torch.float32)).dtype == torch.float32
    x = torch.tensor([0, 1, 0, 0], dtype=DOUBLE)
    assert operator.matvec(x).tolist() == [-1, 1, -0.5, 0]
    triangle = go.laplacian_operator(go.Graph.grid((4,), periodic=True).add_self_loops(), "random_walk")
    assert triangle.matvec(x)[0].item() == pytest.approx(-1 / 3, rel=1e-15)
    weighted = go.laplacian_operator(path.with_weight(torch.ones(path.num_edges)))
    assert weighted.matvec(x).dtype == DOUBLE and weighted.matvec(x.float()).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS[:2])
def test_operators_follow_weights_that_learn(kind):
    graph = awkward(DOUBLE)
    weight = graph.weight.clone().requires_grad_()
    x = at_nodes(graph, 2)

    def ours(w):
        return go.laplacian_operator(graph.with_weight(w), kind).matvec(x)

    def theirs(w):
        return go.laplacian(graph.with_weight(w), x, kind)

    assert gradcheck(ours, weight, fast_mode=True) and gradgradcheck(ours, weight, fast_mode=True)
    torch.testing.assert_close(*(torch.autograd.grad(f(weight).pow(3).sum(), weight)[0] for f in (ours, theirs)))


def test_nodes_of_degree_zero_have_rows_of_zeros():
    graph = awkward(DOUBLE)
    x = at_nodes(graph, 2)
    assert graph.degree()[6] == 0
    weight = graph.weight.clone().requires_grad_()
    for kind in KINDS[:2]:
        out = go.laplacian(graph.with_weight(weight), x, kind)
        assert out[6].tolist() == [0, 0] and out.isfinite().all()
        assert torch.autograd.grad(out.sum(), weight)[0].isfinite().all()
    undirected = graph.to_undirected()
    assert go.laplacian(undirected, x, "symmetric")[6].tolist() == [0, 0]


# --- derivatives and transforms --------------------------------------------------------------------------------------


def functions(graph):
    """Each operator as a function of weights and values, with the number of rows of its values."""
    nodes, edges = graph.num_nodes, graph.num_edges
    return {
        "gradient": (lambda w, x: go.gradient(graph, x) * w[:, None], nodes),
        "divergence": (lambda w, X: go.divergence(graph.with_weight(w), X), edges),
        "gradient_adjoint": (lambda w, X: go.gradient_adjoint(graph.with_weight(w), X), edges),
        "combinatorial": (lambda w, x: go.laplacian(graph.with_weight(w), x), nodes),
        "random_walk": (lambda w, x: go.laplacian(graph.with_weight(w), x, "random_walk"), nodes),
        "operator": (lambda w, x: (go.GraphOperator(graph.with_weight(w)) * 2).rmatvec(x), nodes),
        "dirichlet_energy": (lambda w, x: go.dirichlet_energy(graph.with_weight(w), x), nodes),
        **{
            name + word: (lambda w, x, make=make, how=how: make(graph.with_weight(w), isotropic=how)(0.0, x), nodes)
            for name, make in ENERGIES.items()
            for word, how in (("", False), (", isotropic", True))
        },
    }


FUNCTIONS = list(functions(awkward(DOUBLE)))
NOW = ("total_variation", "p_laplacian_below_2", "perona_malik, isotropic")
SOME_LATER = [pytest.param(n, marks=[pytest.mark.slow] * (n.split(",")[0] in ENERGIES and n not in NOW)) for n in FUNCTIONS]


@pytest.mark.parametrize("name", SOME_LATER)
@pytest.mark.parametrize("backend", EACH_BACKEND)
def test_derivatives(backend, name):
    with go.backend(backend) as kernels:
        graph = awkward(DOUBLE).to("cuda" if "cpu" not in kernels.devices else "cpu")
        function, rows = functions(graph)[name]
        values = torch.randn(rows, 2, dtype=DOUBLE, device=graph.device, requires_grad=True)
        inputs = (graph.weight.clone().requires_grad_(), values)
        assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
        assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("name", SOME_LATER)
def test_vmap_over_states_and_weights(name):
    graph = awkward(DOUBLE)
    function, rows = functions(graph)[name]
    values, weights = torch.randn(3, rows, 2, dtype=DOUBLE), torch.rand(3, graph.num_edges, dtype=DOUBLE)
    found = torch.func.vmap(function, in_dims=(None, 0))(weights[0], values)
    torch.testing.assert_close(found, torch.stack([function(weights[0], x) for x in values]))
    found = torch.func.vmap(function)(weights, values)
    torch.testing.assert_close(found, torch.stack([function(w, x) for w, x in zip(weights, values)]))


@pytest.mark.parametrize("name", ["perona_malik", "total_variation"])
def test_torch_func_agrees_with_itself(name):
    """The Jacobian of the field is minus the Hessian of the energy: reverse over forward, forward over reverse."""
    graph = awkward(DOUBLE)
    energy, y = ENERGIES[name](graph), at_nodes(graph)
    hessian = torch.func.hessian(lambda y: energy.energy(0.0, y))(y)
    torch.testing.assert_close(hessian, hessian.t())
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(lambda y: energy(0.0, y))(y), -hessian)
    torch.testing.assert_close(torch.func.grad(lambda y: energy.energy(0.0, y))(y), -energy(0.0, y))
    v = at_nodes(graph)
    (pull,) = torch.func.vjp(lambda y: energy(0.0, y), y)[1](v)
    torch.testing.assert_close(pull, torch.func.jvp(lambda y: energy(0.0, y), (y,), (v,))[1])


def test_results_do_not_depend_on_repetition_or_threads():
    graph = random_graph(300, 6000).with_weight(torch.rand(6000))
    x = torch.randn(300, 8, requires_grad=True)
    operator, energy = go.laplacian_operator(graph), go.PeronaMalik(graph, 0.5, isotropic=True)

    def everything():
        out = go.divergence(graph, go.gradient(graph, x)) + operator.rmatvec(x) + energy(0.0, x)
        return [out.detach(), *torch.autograd.grad(out.square().sum() + energy.energy(0.0, x), x)]

    known, threads = everything(), torch.get_num_threads()
    try:
        for repeat in range(10):
            torch.set_num_threads(1 + repeat % 2)
            assert all(map(torch.equal, everything(), known))
    finally:
        torch.set_num_threads(threads)


def compiled_equals_eager(function, inputs):
    torch._dynamo.reset()
    outputs = [run(*inputs) for run in (torch.compile(function, fullgraph=True, backend="aot_eager"), function)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(torch.autograd.grad(out.square().sum(), inputs) for out in outputs))


def test_compiles_as_one_graph():
    graph = awkward(torch.float32)
    heat = -go.laplacian_operator(graph, "random_walk")
    compiled_equals_eager(lambda x: go.laplacian(graph, x) + heat.rmatvec(x), [torch.randn(7, 2, requires_grad=True)])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FUNCTIONS[:7] if name != "operator"])
def test_each_compiles_as_one_graph(name):
    graph = awkward(torch.float32)
    function, rows = functions(graph)[name]
    compiled_equals_eager(function, [graph.weight.clone().requires_grad_(), torch.randn(rows, 2, requires_grad=True)])


@pytest.mark.slow
@each_energy
def test_each_energy_compiles_as_one_graph(name):
    energy = ENERGIES[name](awkward(torch.float32), isotropic=True)
    compiled_equals_eager(lambda x: energy(0.0, x) + energy.energy(0.0, x), [torch.randn(7, 2, requires_grad=True)])


# --- energies --------------------------------------------------------------------------------------------------------


@settings(max_examples=3 * settings.default.max_examples)
@given(st.sampled_from(sorted(ENERGIES)), st.booleans(), graphs())
def test_fields_are_the_negative_gradients_of_their_energies(name, isotropic, graph):
    """On any graph: directed, with loops and parallel edges."""
    energy = ENERGIES[name](graph, isotropic=isotropic)
    y = at_nodes(graph, 2).requires_grad_()
    value = energy.energy(0.0, y)
    field = energy(0.0, y.detach())
    torch.testing.assert_close(field, -torch.autograd.grad(value, y)[0])
    with torch.no_grad():
        size = field.norm()
        if size > 1e-6:
            assert energy.energy(0.0, y + 1e-4 * field / size) < value
    torch.testing.assert_close(field.sum(0), torch.zeros(2, dtype=DOUBLE), atol=1e-12, rtol=0)


@settings(max_examples=2 * settings.default.max_examples)
@given(st.sampled_from(sorted(ENERGIES)), graphs(symmetric=True))
def test_energies_are_the_sums_over_edges_and_fields_their_divergence(name, graph):
    """The definition, on symmetric graphs: F = 1/2 sum w Phi, f = div(c grad y)."""
    energy = ENERGIES[name](graph)
    y = at_nodes(graph, 2)
    between = (graph.source != graph.target).double()
    change = go.gradient(graph, y)
    squares = change.square().sum(1)
    expected = (graph.weight * between * energy.density(squares)).sum() / 2
    torch.testing.assert_close(energy.energy(0.0, y), expected)
    c = energy.diffusivity(squares)[:, None]
    torch.testing.assert_close(energy(0.0, y), go.divergence(graph, c * change), atol=1e-12, rtol=1e-10)


def test_energies_that_coincide():
    graph = awkward(DOUBLE)
    y = at_nodes(graph, 2)
    for one, other in (
        (go.PLaplacian(graph, 2.0), go.Dirichlet(graph)),
        (go.PLaplacian(graph, 1.0, 0.3), go.TotalVariation(graph, 0.3)),
        (go.Dirichlet(graph, isotropic=True), go.Dirichlet(graph)),
    ):
        torch.testing.assert_close(one(0.0, y), other(0.0, y))
        torch.testing.assert_close(one.energy(0.0, y), other.energy(0.0, y))
    both_ways = graph.to_undirected("sum")
    torch.testing.assert_close(go.Dirichlet(graph).energy(0.0, y), go.dirichlet_energy(graph, y))
    torch.testing.assert_close(go.Dirichlet(both_ways)(0.0, y), -go.laplacian(both_ways, y))


@pytest.mark.parametrize("p", [2.0, 2.5, 3.0, 4.0])
def test_flat_regions_have_finite_derivatives(p):
    """The power of 0 in the diffusivity has an infinite derivative for p < 4, times a difference of 0."""
    energy = go.PLaplacian(go.Graph.grid((5,)), p)
    y = torch.tensor([0, 0, 0, 1, 1], dtype=DOUBLE, requires_grad=True)
    field = energy(0.0, y)
    (pull,) = torch.autograd.grad(field[3], y, create_graph=True)
    assert pull.isfinite().all() and torch.autograd.grad(pull.sum(), y)[0].isfinite().all()
    (first,) = torch.autograd.grad(energy.energy(0.0, y), y, create_graph=True)
    torch.testing.assert_close(first, -field)
    assert torch.autograd.grad(first.square().sum(), y)[0].isfinite().all()


@pytest.mark.parametrize("make", [go.PeronaMalik, go.TotalVariation, lambda g, e: go.PLaplacian(g, 1.5, e)])
def test_parameters_of_energies_learn(make):
    graph = awkward(DOUBLE)
    y = at_nodes(graph)
    parameter = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    assert gradcheck(lambda c: make(graph, c)(0.0, y), parameter)
    assert gradcheck(lambda c: make(graph, c).energy(0.0, y), parameter)
    several = torch.tensor([0.2, 0.9], dtype=DOUBLE)
    found = torch.func.vmap(lambda c: make(graph, c)(0.0, y))(several)
    torch.testing.assert_close(found, torch.stack([make(graph, c.item())(0.0, y) for c in several]))


# --- grids -----------------------------------------------------------------------------------------------------------


def along(image, axis, periodic, function):
    """What leaves each cell through the faces along one axis, by a flux ``function`` of the differences."""
    if periodic:
        flux = function(torch.roll(image, -1, axis) - image)
        return flux - torch.roll(flux, 1, axis)
    flux = function(torch.diff(image, dim=axis))
    zero = torch.zeros_like(image.narrow(axis, 0, 1))
    return torch.cat([flux, zero], axis) - torch.cat([zero, flux], axis)


STENCILS = {
    "perona_malik": (lambda r: r / (1 + (r / 0.7) ** 2), lambda r: 0.7**2 / 2 * torch.log(1 + (r / 0.7) ** 2)),
    "total_variation": (lambda r: r / torch.sqrt(r * r + 0.3**2), lambda r: torch.sqrt(r * r + 0.3**2)),
}


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("name", STENCILS)
def test_grids_are_stencils(name, periodic):
    flux, density = STENCILS[name]
    image = torch.randn(33, 47, dtype=DOUBLE)
    energy = ENERGIES[name](go.Graph.grid(image.shape, periodic=periodic))
    expected = sum(along(image, axis, periodic, flux) for axis in (0, 1))
    faces = [torch.roll(image, -1, axis) - image if periodic else torch.diff(image, dim=axis) for axis in (0, 1)]
    field = energy(0.0, image.reshape(-1)).view_as(image)
    assert (field - expected).abs().max() < 1e-12
    value = sum(density(face).sum() for face in faces)
    assert abs(energy.energy(0.0, image.reshape(-1)) - value) < 1e-12 * value


def test_isotropic_grids_are_stencils():
    image, eps = torch.randn(20, 30, dtype=DOUBLE), 0.3
    energy = go.TotalVariation(go.Graph.grid(image.shape, periodic=True), eps, isotropic=True)
    steps = [torch.roll(image, -by, axis) - image for axis in (0, 1) for by in (1, -1)]
    slope = torch.sqrt(sum(s * s for s in steps) / 2 + eps**2)
    assert abs(energy.energy(0.0, image.reshape(-1)) - slope.sum()) < 1e-12 * slope.sum()
    c = 1 / slope
    expected = sum(s * (c + torch.roll(c, -by, axis)) / 2 for s, (axis, by) in zip(steps, [(0, 1), (0, -1), (1, 1), (1, -1)]))
    assert (energy(0.0, image.reshape(-1)).view_as(image) - expected).abs().max() < 1e-12


def has(method):
    return pytest.param(method, marks=pytest.mark.skipif(method not in solvers.METHODS, reason=f"no method {method} yet"))


SHAPE, TIME = (12, 17), 0.7
TOLERANCES = {"rkc2": 1e-4, "prox_bdf": 1e-4}
"""Of methods of low order, whose error at a tight tolerance is a growing multiple of it; 1e-6 for the others."""


def solved(field, y0, times, method):
    """The solution, and ten times the tolerance it was found with."""
    tolerance = TOLERANCES.get(method, 1e-6)
    return solve(field, y0, times, method=method, rtol=tolerance, atol=tolerance).y, 10 * tolerance


def error(found, expected):
    return ((found - expected).abs() / (expected.abs() + 1)).max()


def heat_on_a_grid(image, time):
    """The cosine transform diagonalises the Laplacian of a grid with closed borders."""
    waves = [2 - 2 * np.cos(np.pi * np.arange(n) / n) for n in image.shape]
    decay = np.exp(-time * (waves[0][:, None] + waves[1]))
    return scipy.fft.idctn(decay * scipy.fft.dctn(image, norm="ortho"), norm="ortho")


@pytest.mark.parametrize("method", ["dopri5", has("exp_linear")])
def test_heat_flow_is_the_closed_form(method):
    image = np.random.default_rng(0).normal(size=SHAPE)
    y0 = torch.from_numpy(image).reshape(-1)
    times = torch.tensor([0, TIME], dtype=DOUBLE)
    field = -go.laplacian_operator(go.Graph.grid(SHAPE))
    found, allowed = solved(field, y0, times, method)
    expected = torch.from_numpy(heat_on_a_grid(image, TIME)).reshape(-1)
    assert error(found[-1], expected) < allowed
    assert found[-1].sum() == pytest.approx(y0.sum().item(), abs=1e-11)


@pytest.mark.parametrize("method", [has("prox_bdf"), has("rkc2"), "dopri5"])
@pytest.mark.parametrize("name", STENCILS)
def test_solved_on_a_grid_they_are_the_solved_stencils(name, method):
    image = torch.rand(SHAPE, dtype=DOUBLE)
    energy, (flux, _) = ENERGIES[name](go.Graph.grid(SHAPE)), STENCILS[name]
    times = torch.linspace(0, 2, 5, dtype=DOUBLE)
    ours, allowed = solved(energy, image.reshape(-1), times, method)
    stencil = lambda t, y: sum(along(y, axis, False, flux) for axis in (0, 1))
    theirs = solve(stencil, image, times, method="dop853", rtol=1e-11, atol=1e-11).y
    assert error(ours.view_as(theirs), theirs) < allowed
    values = torch.stack([energy.energy(0.0, y) for y in ours])
    assert (values.diff() < 0).all()


@pytest.mark.parametrize("isotropic", [False, True])
@pytest.mark.parametrize("name", ["perona_malik", "total_variation"])
def test_the_operator_of_a_field_is_symmetric_dissipative_and_gives_the_field(name, isotropic):
    graph = awkward(DOUBLE)
    energy, y = ENERGIES[name](graph, isotropic=isotropic), at_nodes(graph, 2)
    operator = energy.operator(0.0, y)
    torch.testing.assert_close(operator.matvec(y), energy(0.0, y))
    matrix = operator.matvec(torch.eye(7, dtype=DOUBLE))
    torch.testing.assert_close(matrix, matrix.t())
    torch.testing.assert_close(operator.rmatvec(y), matrix.t() @ y)
    assert torch.linalg.eigvalsh(matrix).max() < 1e-12


@pytest.mark.skipif("semi_implicit_euler" not in solvers.METHODS, reason="no method semi_implicit_euler yet")
def test_semi_implicit_steps_are_stable_at_any_length_and_of_first_order():
    """Without the maximum principle a step of 50, two hundred times the explicit limit, would leave the range of the image."""
    image = torch.rand(16 * 16, dtype=DOUBLE)
    energy = go.PeronaMalik(go.Graph.grid((16, 16)), 0.2)
    how = dict(method="semi_implicit_euler", save="steps")
    y = solve(energy, image, torch.tensor([0, 500], dtype=DOUBLE), num_steps=10, **how).y
    assert (y.amax(1).diff() <= 1e-9).all() and (y.amin(1).diff() >= -1e-9).all()
    torch.testing.assert_close(y.sum(1), image.sum().expand(11), rtol=1e-9, atol=0)
    times = torch.tensor([0, 1], dtype=DOUBLE)
    exact = solve(energy, image, times, method="dopri5", rtol=1e-10, atol=1e-10).y[-1]
    errors = [error(solve(energy, image, times, num_steps=n, **how).y[-1], exact) for n in (20, 40)]
    assert 0.9 < math.log2(errors[0] / errors[1]) < 1.15


def test_energy_falls_at_every_step_of_an_implicit_solve_however_long():
    graph = go.Graph.knn(torch.rand(40, 2, dtype=DOUBLE), 4)
    energy = go.TotalVariation(graph, 0.1)
    y = torch.randn(40, dtype=DOUBLE)
    sol = solve(energy, y, torch.tensor([0, 4], dtype=DOUBLE), method="prox_euler", num_steps=5, save="steps")
    values = torch.stack([energy.energy(0.0, y) for y in sol.y])
    assert (values.diff() < 0).all()


def test_gradients_of_a_solve_reach_the_weights():
    graph = go.Graph.grid((3, 3))
    y0, times = torch.randn(9, dtype=DOUBLE), torch.tensor([0, 0.5], dtype=DOUBLE)
    weight = torch.rand(graph.num_edges, dtype=DOUBLE, requires_grad=True)

    def final(w):
        return solve(-go.laplacian_operator(graph.with_weight(w)), y0, times, method="rk4", num_steps=4).y[-1]

    assert gradcheck(final, weight, fast_mode=True)


# --- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch():
    """64 graphs of 3 to 12 nodes with weights, and all of them as one."""
    parts = [random_graph(3 + i % 10, 4 + i, seed=i) for i in range(64)]
    generator = torch.Generator().manual_seed(0)
    parts = [g.with_weight(torch.rand(g.num_edges, dtype=DOUBLE, generator=generator)).to_undirected() for g in parts]
    return parts, go.Graph.batch(parts)


def test_operators_on_a_batch_are_those_on_each_graph(batch):
    parts, whole = batch
    x = at_nodes(whole, 2)
    pieces = x.split([g.num_nodes for g in parts])

    def check(function):
        torch.testing.assert_close(function(whole, x), torch.cat([function(g, piece) for g, piece in zip(parts, pieces)]))

    check(go.gradient)
    check(lambda g, x: go.divergence(g, go.gradient(g, x)))
    check(lambda g, x: go.gradient_adjoint(g, go.gradient(g, x)))
    for kind in KINDS:
        check(lambda g, x, kind=kind: go.laplacian(g, x, kind))
        check(lambda g, x, kind=kind: go.laplacian_operator(g, kind).matvec(x))
    check(lambda g, x: go.dirichlet_energy(g, x).reshape(-1))
    for name in ("total_variation", "perona_malik"):
        make = functools.cache(lambda g, name=name: ENERGIES[name](g, isotropic=name == "perona_malik"))
        check(lambda g, x, make=make: make(g)(0.0, x))
        check(lambda g, x, make=make: make(g).energy(0.0, x).reshape(-1))


@pytest.mark.parametrize("name", ["heat", pytest.param("perona_malik", marks=pytest.mark.slow)])
def test_a_solve_of_a_batch_is_that_of_each_graph(batch, name):
    """Every graph has its own steps, so that their counts agree too."""
    parts, whole = batch
    make = ENERGIES.get(name, lambda g: -go.laplacian_operator(g, "random_walk"))
    y0, times = at_nodes(whole, 2), torch.tensor([0, 0.3, 1], dtype=DOUBLE)
    together = solve(make(whole), y0, times, batch_index=whole.batch_index, rtol=1e-6)
    starts = y0.split([g.num_nodes for g in parts])
    alone = [solve(make(g), y, times, rtol=1e-6) for g, y in zip(parts, starts)]
    torch.testing.assert_close(together.y, torch.cat([sol.y for sol in alone], 1), rtol=1e-9, atol=1e-9)
    assert together.stats.accepted.tolist() == [sol.stats.accepted for sol in alone]


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input():
    graph = awkward(DOUBLE)
    x, X = at_nodes(graph, 2), at_edges(graph, 2)
    two_sets = go.Graph(graph.edge_index, (7, 8))
    pairs = graph.to_undirected()
    below, broken = pairs.with_weight(-pairs.weight), pairs.with_weight(pairs.weight * math.nan)
    cases = [
        (lambda: go.gradient(graph, x[:5]), go.ArgumentError, r"x has shape \(5, 2\).*7 \(nodes\)"),
        (lambda: go.gradient(graph, x.long()), go.ArgumentTypeError, "floating point"),
        (lambda: go.gradient(graph, [1.0]), go.ArgumentTypeError, "must be a tensor"),
        (lambda: go.gradient(two_sets, x), go.UnsupportedError, "bipartite"),
        (lambda: go.divergence(graph, x), go.ArgumentError, r"X has shape.*11 \(E, edges\)"),
        (lambda: go.divergence(graph, X, torch.ones(3)), go.ArgumentError, "weight has shape"),
        (lambda: go.divergence(graph, X, torch.ones(11, 2)), go.ArgumentError, r"shape \(E,\)"),
        (lambda: go.gradient_adjoint(two_sets, X), go.UnsupportedError, "bipartite"),
        (lambda: go.laplacian(graph, x, "normalised"), go.UnknownNameError, "combinatorial"),
        (lambda: go.laplacian(graph, x, "symmetric"), go.ArgumentError, "to_undirected"),
        (lambda: go.laplacian_operator(graph, "symmetric"), go.ArgumentError, "to_undirected"),
        (lambda: go.laplacian_operator(graph, "random_wlak"), go.UnknownNameError, "random_walk"),
        (lambda: go.laplacian_operator(below, "random_walk"), go.ArgumentError, "below 0"),
        (lambda: go.laplacian(broken, x, "symmetric"), go.ArgumentError, "NaN"),
        (lambda: go.GraphOperator(awkward()), go.ArgumentError, "no weights"),
        (lambda: go.GraphOperator(graph).matvec(x[0]), go.ArgumentError, r"7 \(nodes\)"),
        (lambda: go.GraphOperator(graph) * torch.ones(2), go.ArgumentError, "0-dim tensor"),
        (lambda: go.dirichlet_energy(two_sets, x), go.UnsupportedError, "bipartite"),
        (lambda: go.Dirichlet(two_sets), go.UnsupportedError, "Dirichlet"),
        (lambda: go.Dirichlet(graph)(0.0, x + 0j), go.ArgumentTypeError, "floating point"),
        (lambda: go.Dirichlet(go.Graph.grid((3, 4)))(0.0, torch.ones(3, 4)), go.ArgumentError, r"12 \(nodes\)"),
        (lambda: go.PLaplacian(graph, 0.5), go.ArgumentError, "p must be at least 1"),
        (lambda: go.PLaplacian(graph, 1.5), go.ArgumentError, "eps > 0"),
        (lambda: go.PLaplacian(graph, 3.0, -0.1), go.ArgumentError, "eps must be above 0"),
        (lambda: go.TotalVariation(graph, 0.0), go.ArgumentError, "eps must be above 0"),
        (lambda: go.TotalVariation(graph, math.nan), go.ArgumentError, "eps must be above 0"),
        (lambda: go.PeronaMalik(graph, torch.tensor(-1.0)), go.ArgumentError, "contrast must be above 0"),
        (lambda: go.PeronaMalik(graph, 1.0, "gauss"), go.UnknownNameError, "exponential"),
    ]
    for call, error, words in cases:
        with pytest.raises(error, match=words):
            call()


def test_nan_weights_that_were_not_checked_show():
    graph = awkward(DOUBLE)
    bad = graph.with_weight(torch.full_like(graph.weight, math.nan))
    assert go.laplacian(bad, at_nodes(graph, 1))[graph.target].isnan().all()
    assert go.TotalVariation(bad, 0.1).energy(0.0, at_nodes(graph, 1)).isnan()
