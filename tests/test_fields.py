"""Diffusion on graphs: against dense matrices, exponentials and random walks; limits, stability, gradients of the fields."""

from __future__ import annotations

import math

import pytest
import torch
from graphs import awkward, dense, random_graph

import graphops as go
from graphops.attention import SCORES
from graphops.fields import (
    ClusterAttention,
    EarlyStopping,
    EdgeAttention,
    LinearDiffusion,
    NonlinearDiffusion,
    PenalisedField,
    laplacian_diffusion,
    rewired,
    stationary_distribution,
    trusted_source,
)
from solvers import LinearField, QuasiLinearField, SolveError, solve

DOUBLE = torch.float64
TIGHT = {"rtol": 1e-10, "atol": 1e-12}
SOLVED = {"rtol": 1e-7, "atol": 1e-9}


def connected(nodes: int = 24, seed: int = 0, loops: bool = True) -> go.Graph:
    """A ring with chords, both ways: symmetric, connected, without parallel edges."""
    ring = torch.arange(nodes)
    chords = torch.randint(nodes, (2, nodes), generator=torch.Generator().manual_seed(seed))
    edges = torch.cat([torch.stack([ring, (ring + 1) % nodes]), chords], 1)
    graph = go.Graph(edges, nodes).remove_self_loops().to_undirected()
    return graph.add_self_loops().sort() if loops else graph


def stochastic(graph: go.Graph, over: str = "incoming") -> torch.Tensor:
    return go.attention.normalise(graph, torch.randn(graph.num_edges, dtype=DOUBLE), over=over)


def attention(channels: int = 3, spread: float = 1.0, **options) -> EdgeAttention:
    """With weights that make shares differ, as the customary start does not."""
    module = EdgeAttention(channels, heads=2, dim=4, **options).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return module


def nonlinear(graph: go.Graph, channels: int = 3, spread: float = 1.0, **options) -> NonlinearDiffusion:
    return NonlinearDiffusion(graph, attention(channels, spread).requires_grad_(False), **options)


# --- the linear field ------------------------------------------------------------------------------------------------

ALPHAS = {"number": 0.7, "tensor": torch.tensor(0.7, dtype=DOUBLE), "channels": torch.tensor([0.2, 0.9, 1.3], dtype=DOUBLE)}


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("loops", ["one each", "awkward"])
def test_linear_diffusion_is_its_dense_matrix(loops, alpha):
    """Also where edges are unsorted and parallel, and nodes have no loop, or no edge at all."""
    graph = awkward() if loops == "awkward" else random_graph(7, 20).remove_self_loops().add_self_loops()
    weight, b = torch.rand(graph.num_edges, dtype=DOUBLE), torch.randn(7, 3, dtype=DOUBLE)
    L, a, x = dense(graph, weight) - torch.eye(7), ALPHAS[alpha], torch.randn(7, 3, dtype=DOUBLE)
    field = LinearDiffusion(graph, weight, a, b)
    torch.testing.assert_close(field.matvec(x), a * (L @ x))
    torch.testing.assert_close(field.rmatvec(x), a * (L.T @ x))
    torch.testing.assert_close(field(0.0, x), a * (L @ x) + b)
    assert isinstance(field, LinearField)
    radius = max(torch.linalg.eigvals(float(k) * L).abs().max() for k in torch.as_tensor(a).reshape(-1))
    assert field.spectral_bound() >= radius
    torch.testing.assert_close(field.jacobian_diagonal(0.0, x), a * L.diag().unsqueeze(1) * torch.ones(7, 3, dtype=DOUBLE))
    assert field.jacobian_diagonal(0.0, x.float()).dtype == torch.float32


def test_rate_says_when_uniformisation_is_allowed():
    graph = connected()
    rows = stochastic(graph)
    assert LinearDiffusion(graph, rows, 0.7).rate == 0.7
    assert LinearDiffusion(graph, rows, torch.tensor([0.2, 0.9])).rate == pytest.approx(0.9)
    assert LinearDiffusion(graph, rows, torch.tensor([-0.2, 0.9])).rate is None
    assert LinearDiffusion(graph, stochastic(graph, "outgoing"), 0.7).rate == 0.7  # shares of the sender: columns of sum 1
    assert LinearDiffusion(graph, 0.9 * rows).rate is None
    assert LinearDiffusion(awkward(), stochastic(awkward())).rate is None  # a node without edges into it
    negative = rows.clone()
    negative[:2] = torch.tensor([-1.0, 1.0]) + negative[:2].sum() * torch.tensor([1.0, 0.0])
    assert LinearDiffusion(graph, negative).rate is None


@pytest.mark.parametrize("over", ["incoming", "outgoing"])
@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("alpha", ["number", "channels"])
def test_exp_linear_is_the_matrix_exponential(over, source, alpha):
    """With the source by an augmented matrix: exp(T [[L, b], [0, 0]])."""
    graph, T = connected(), 9.15
    weight, x = stochastic(graph, over), torch.randn(24, 3, dtype=DOUBLE)
    b = torch.randn(24, 3, dtype=DOUBLE) if source else None
    found = solve(LinearDiffusion(graph, weight, ALPHAS[alpha], b), x, [0.0, T], method="exp_linear", **TIGHT).y[-1]
    for channel, a in enumerate(torch.as_tensor(ALPHAS[alpha], dtype=DOUBLE).expand(3)):
        whole = torch.zeros(25, 25, dtype=DOUBLE)
        whole[:24, :24] = a * (dense(graph, weight) - torch.eye(24))
        whole[:24, 24] = 0.0 if b is None else b[:, channel]
        expected = torch.linalg.matrix_exp(T * whole) @ torch.cat([x[:, channel], torch.ones(1, dtype=DOUBLE)])
        torch.testing.assert_close(found[:, channel], expected[:24], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("over", ["incoming", "outgoing"])
def test_gradients_of_the_linear_field(over):
    """To the entries of A, alpha, the source and x; also of exp_linear, where the rate counts as a constant."""
    graph = connected(4)
    weight = stochastic(graph).requires_grad_()
    alpha, b, x = (torch.rand(s, dtype=DOUBLE, requires_grad=True) for s in [(2,), (4, 2), (4, 2)])

    def end(weight, alpha, b, x):
        shares = go.attention.normalise(graph, weight, over=over)
        return solve(LinearDiffusion(graph, shares, alpha, b), x, [0.0, 1.0], method="exp_linear", **TIGHT).y[-1]

    assert torch.autograd.gradcheck(end, (weight, alpha, b, x))
    assert torch.autograd.gradgradcheck(
        lambda w, a, b, x: LinearDiffusion(graph, w, a, b)(0.0, x), (weight, alpha[:1].sum().detach().requires_grad_(), b, x)
    )


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SCORES)
def test_rows_of_attention_are_shares(kind):
    graph, module = connected(), attention(kind=kind)
    shares = module(graph, torch.randn(24, 3, dtype=DOUBLE))
    assert (shares > 0).all()
    torch.testing.assert_close(go.sum(graph, shares), torch.ones(24, dtype=DOUBLE))
    columns = attention(kind=kind, over="outgoing")(graph, torch.randn(24, 3, dtype=DOUBLE))
    torch.testing.assert_close(go.sum(graph.outgoing, columns), torch.ones(24, dtype=DOUBLE))
    assert not torch.allclose(go.sum(graph, columns), torch.ones(24, dtype=DOUBLE), atol=1e-3)
    assert all(p.grad is not None for p in module.parameters() if shares.square().sum().backward(retain_graph=True) is None)


def test_dot_product_and_additive_attention_edge_by_edge():
    """Equation 10, with d_k and not its root; and GAT's scores (Velickovic et al. 2018, eq. 3), the mean of two heads."""
    graph, x = connected(6), torch.randn(6, 3, dtype=DOUBLE)
    dot, gat = EdgeAttention(3, dim=4, heads=2, scale="d_k").double(), attention(kind="additive")
    for linear in (dot.query, dot.key):
        torch.nn.init.normal_(linear.weight)
    scores = torch.zeros(2, 2, 6, 6, dtype=DOUBLE) - math.inf
    for j, i in graph.edge_index.T.tolist():
        for h in range(2):
            head = slice(2 * h, 2 * h + 2)
            scores[0, h, i, j] = dot.query(x[i])[head] @ dot.key(x[j])[head] / 2
            wi, wj = gat.project(x[i])[head], gat.project(x[j])[head]
            scores[1, h, i, j] = torch.nn.functional.leaky_relu(wi @ gat.vectors[0, h] + wj @ gat.vectors[1, h], 0.2)
    expected = scores.softmax(-1).mean(1)
    torch.testing.assert_close(dense(graph, dot(graph, x)), expected[0])
    torch.testing.assert_close(dense(graph, gat(graph, x)), expected[1])


def test_the_start_is_near_uniform_attention():
    graph = connected()
    shares = EdgeAttention(3, dim=4, heads=2)(graph, torch.randn(24, 3))
    uniform = (1.0 / graph.degree())[graph.target]
    torch.testing.assert_close(shares, uniform, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("over", ["incoming", "outgoing"])
def test_cluster_attention_is_that_of_the_means_of_clusters(over):
    """Two clouds far apart, six nodes of one and two of the other: every edge has the score of its clouds' means."""
    graph, cloud = connected(8), torch.tensor([0, 1, 0, 0, 0, 1, 0, 0])
    x = (torch.randn(8, 3, dtype=DOUBLE) + 40.0 * cloud[:, None]).requires_grad_()
    module = ClusterAttention(3, clusters=2, dim=4, heads=2, over=over).double()
    found = module(graph, x)
    means = torch.stack([x[cloud == c].mean(0) for c in (0, 1)])
    expected = torch.zeros(graph.num_edges, dtype=DOUBLE)
    for q, k in zip(module.query(means).chunk(2, 1), module.key(means).chunk(2, 1)):
        table = torch.softmax(q @ k.T / math.sqrt(2), 1)
        scores = table[cloud[graph.target], cloud[graph.source]]
        for node in range(8):
            edges = (graph.target if over == "incoming" else graph.source) == node
            expected[edges] += torch.softmax(scores[edges], 0) / 2
    torch.testing.assert_close(found, expected)
    assert set(module.groups(x.detach()).counts.tolist()) == {2, 6}
    leaves = [x, module.query.weight]
    for a, b in zip(*(torch.autograd.grad(w.square().sum(), leaves, retain_graph=True) for w in (found, expected))):
        torch.testing.assert_close(a, b)
    assert solve(NonlinearDiffusion(graph, module), x, [0.0, 1.0], method="rk4", num_steps=2).y.isfinite().all()
    alike = torch.zeros(8, 3)
    assert ClusterAttention(3, clusters=20, heads=1)(graph, alike).isfinite().all()  # more clusters than nodes, too


@pytest.mark.parametrize("bad", [{"clusters": 0}, {"iterations": 0.5}, {"heads": 2}, {"normaliser": "softmin"}, {"over": "in"}])
def test_options_of_cluster_attention(bad):
    with pytest.raises(go.ArgumentError, match=next(iter(bad)) if "over" not in bad else "direction"):
        ClusterAttention(3, **{"heads": 1, **bad})


def test_rewiring_keeps_what_is_above_rho_and_loops():
    graph, module, x = connected(), attention(spread=2.0), torch.randn(24, 3, dtype=DOUBLE)
    kept = rewired(graph, module, x, 0.3)
    old, new = dense(graph, module(graph, x)), dense(kept, torch.ones(kept.num_edges))
    assert 24 < kept.num_edges < graph.num_edges
    assert torch.equal(new.bool(), (old > 0.3) | torch.eye(24, dtype=torch.bool))
    torch.testing.assert_close(go.sum(kept, module(kept, x)), torch.ones(24, dtype=DOUBLE))


# --- properties that the papers prove --------------------------------------------------------------------------------

@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        ("exp_linear", "linear", {}),
        ("dopri5", "linear", {}),
        ("dopri5", "nonlinear", {}),
        ("euler", "linear", {"dt": 0.9}),
        ("euler", "nonlinear", {"dt": 0.9}),
        ("semi_implicit_euler", "linear", {"dt": 100.0, **SOLVED}),
        ("semi_implicit_euler", "nonlinear", {"dt": 100.0, **SOLVED}),
        ("implicit_euler", "linear", {"dt": 100.0, **SOLVED}),
        ("prox_euler", "linear", {"dt": 100.0, **SOLVED}),
        ("prox_euler", "gentle", {"dt": 100.0, **SOLVED}),
        ("prox_euler", "nonlinear", {"dt": 100.0, "inner": "anderson", **SOLVED}),
    ],
)
def test_maximum_principle(method, kind, options):
    """Equation 3, and theorems 1 and 2: explicit steps below 1, implicit and semi-implicit ones of size 100.

    The semi-implicit step has linear equations. For steep attention those of an implicit step of size 100 are solved by
    Anderson's iteration; Newton's says that it does not converge, for at the start of the step I - dt J is indefinite.
    """
    graph, x = connected(), torch.randn(24, 3, dtype=DOUBLE)
    linear = LinearDiffusion(graph, stochastic(graph))
    field = linear if kind == "linear" else nonlinear(graph, spread=0.1 if kind == "gentle" else 1.0)
    y = solve(field, x, [0.0, 300.0 if options.get("dt") == 100 else 9.0], method=method, save="steps", **options).y
    assert (y.amax(1) <= x.amax(0) + 1e-6).all()
    assert (y.amin(1) >= x.amin(0) - 1e-6).all()
    assert (y[-1].std(0) < 0.7 * x.std(0)).all()


def test_explicit_steps_are_stable_below_one_and_not_above():
    """Theorem 1. A ring of even length without loops has the eigenvalue -1 of A: Euler's factor there is 1 - 2 tau."""
    ring = go.Graph.grid((24,), periodic=True)
    x = 1.0 + torch.tensor([1.0, -1.0], dtype=DOUBLE).repeat(12).unsqueeze(1)
    for tau, factor in ((0.9, 0.8), (1.0, 1.0), (1.1, 1.2)):
        y = solve(laplacian_diffusion(ring), x, [0.0, 20 * tau], method="euler", dt=tau).y[-1]
        torch.testing.assert_close((y - 1.0).abs().max().item(), factor**20, rtol=1e-9, atol=0.0)


def test_stability_of_the_adams_corrector():
    """Not of all step sizes, as the paper has it. On the real axis, times |lambda| = 2 here: AB4 is stable to 0.30, PECE to
    1.28, and AM4 corrected until it settles to 2.67, beyond which the iteration does not converge."""
    ring = go.Graph.grid((24,), periodic=True)
    x = torch.tensor([1.0, -1.0], dtype=DOUBLE).repeat(12).unsqueeze(1)

    def end(method, z, steps=60, **options):
        t = [0.0, steps * z / 2]
        return solve(laplacian_diffusion(ring), x, t, method=method, dt=z / 2, **options).y[-1].abs().max()

    iterated = {"corrector_tol": 1e-3, "max_corrections": 150}
    assert end("explicit_adams", 0.28) < 1 < 10 < end("explicit_adams", 0.5)
    assert end("implicit_adams", 1.2) < 1 < 10 < end("implicit_adams", 1.6)
    assert end("implicit_adams", 2.3, 20, **iterated) < 1
    with pytest.raises(SolveError):
        end("implicit_adams", 2.8, **iterated)


def test_limit_is_the_mean_weighted_by_degree():
    """Proposition 7 of GRAND++ for the random walk, with the degrees; for any A with its stationary distribution."""
    graph, x = connected(), torch.randn(24, 3, dtype=DOUBLE)
    walk, degree = laplacian_diffusion(graph), graph.degree().to(DOUBLE)
    pi = stationary_distribution(walk.graph)
    torch.testing.assert_close(pi, degree / degree.sum(), rtol=1e-6, atol=1e-9)
    other = LinearDiffusion(graph, stochastic(graph))
    for field, share in ((walk, pi), (other, stationary_distribution(graph, other.weight))):
        y = solve(field, x, [0.0, 2000.0], method="exp_linear", **TIGHT).y[-1]
        torch.testing.assert_close(y, (share @ x).expand(24, 3), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("a", ["walk", "attention"])
def test_trusted_sources_drift_or_settle(a):
    """GRAND++: divided by the stationary distribution the state settles, and not to a constant (Prop. 8 and 9); as printed
    the mean weighted by it drifts by sum_I pi_i (x_i - mean) in a unit of time."""
    graph = connected()
    x = torch.randn(24, 2, dtype=DOUBLE)
    trusted = torch.arange(24) < 5
    walk = laplacian_diffusion(graph)
    weight = walk.weight if a == "walk" else stochastic(graph)
    pi = stationary_distribution(graph, weight)
    printed, divided = trusted_source(x, trusted), trusted_source(x, trusted, pi * graph.num_edges)
    if a == "walk":
        torch.testing.assert_close(divided, trusted_source(x, trusted, graph.degree()), rtol=1e-6, atol=1e-9)
    times = [0.0, 1000.0, 2000.0]
    drift = pi @ printed
    assert drift.abs().min() > 1e-3
    y = solve(LinearDiffusion(graph, weight, 1.0, printed), x, times, method="exp_linear", **TIGHT).y
    torch.testing.assert_close(pi @ (y[2] - y[1]), 1000 * drift, rtol=1e-6, atol=1e-6)
    y = solve(LinearDiffusion(graph, weight, 1.0, divided), x, times, method="exp_linear", **TIGHT).y
    torch.testing.assert_close(y[2], y[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pi @ y[2], pi @ x, rtol=1e-6, atol=1e-6)
    assert (y[2].amax(0) - y[2].amin(0)).min() > 0.1


def test_forward_euler_is_a_random_walk_in_the_mean():
    """Proposition 5: k steps of size dt are the mean over walks that stay with 1 - dt; within four standard errors."""
    graph, steps, dt, walkers = connected(12), 20, 0.5, 5_000
    x = torch.randn(12, dtype=DOUBLE)
    expected = solve(laplacian_diffusion(graph), x, [0.0, steps * dt], method="euler", dt=dt).y[-1]
    generator = torch.Generator().manual_seed(1)
    walk = dense(graph, (1.0 / graph.degree())[graph.target])
    place = torch.arange(12).repeat_interleave(walkers)
    for _ in range(steps):
        moves = torch.rand(place.shape, generator=generator) < dt
        place[moves] = torch.multinomial(walk[place[moves]], 1, generator=generator)[:, 0]
    ends = x[place].view(12, walkers)
    error = ends.std(1) / math.sqrt(walkers)
    assert ((ends.mean(1) - expected).abs() <= 4 * error).all()
    assert error.max() < 0.03


def test_laplacian_is_the_random_walk_laplacian_of_calculus():
    graph = random_graph(9, 30).to_undirected()
    graph = graph.with_weight(torch.rand(graph.num_edges, dtype=DOUBLE)).to_undirected().add_self_loops(0.5)
    x = torch.randn(9, 2, dtype=DOUBLE)
    torch.testing.assert_close(laplacian_diffusion(graph)(0.0, x), -go.laplacian(graph, x, "random_walk"))


# --- the nonlinear field ---------------------------------------------------------------------------------------------


def test_nonlinear_diffusion_is_quasi_linear():
    graph, b, x = connected(), torch.randn(24, 3, dtype=DOUBLE), torch.randn(24, 3, dtype=DOUBLE)
    field = nonlinear(graph, alpha=0.6, source=b)
    assert isinstance(field, QuasiLinearField)
    assert not isinstance(field, LinearField)
    A = dense(field.graph, field.weights(field.graph, x))
    torch.testing.assert_close(field(0.0, x), 0.6 * (A @ x - x) + b)
    torch.testing.assert_close(field(0.0, x), field.operator(0.0, x).matvec(x) + b)


def test_semi_implicit_step_solves_the_linear_system():
    """Equation 8: (I - tau A(x_0)) x_1 = x_0."""
    graph, x = connected(), torch.randn(24, 3, dtype=DOUBLE)
    field = nonlinear(graph)
    found = solve(field, x, [0.0, 100.0], method="semi_implicit_euler", dt=100.0, **TIGHT).y[-1]
    A = dense(field.graph, field.weights(field.graph, x))
    expected = torch.linalg.solve(torch.eye(24) - 100.0 * (A - torch.eye(24)), x)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


# --- penalties, early stopping ---------------------------------------------------------------------------------------


def test_penalties_are_those_of_a_dense_jacobian():
    """Euler's steps add up dt times the penalty where each starts, which a dense Jacobian tells."""
    graph, x = connected(4), torch.randn(4, 2, dtype=DOUBLE)
    field = nonlinear(graph, 2)
    penalised = PenalisedField(field, ["kinetic", "jacobian", "total_derivative"])
    y, r = solve(penalised, (x, penalised.zeros(x)), [0.0, 0.4, 0.8, 1.2], method="euler", dt=0.4).y
    torch.testing.assert_close(y[-1], solve(field, x, [0.0, 1.2], method="euler", dt=0.4).y[-1])
    rates = []
    for state in y[:-1]:
        J = torch.autograd.functional.jacobian(lambda z: field(0.0, z), state).view(8, 8)
        f = field(0.0, state).view(8)
        rates.append(torch.stack([v.square().mean() for v in (f, penalised.noise.view(8) @ J, J @ f)]))
    torch.testing.assert_close(r[1:], 0.4 * torch.stack(rates).cumsum(0))


def test_hutchinson_is_unbiased():
    graph, x = connected(6), torch.randn(6, 2, dtype=DOUBLE)
    field = nonlinear(graph, 2)
    J = torch.autograd.functional.jacobian(lambda z: field(0.0, z), x).view(12, 12)
    draws = torch.stack([PenalisedField(field, ["jacobian"])(0.0, (x, torch.zeros(1)))[1][0] for _ in range(100)])
    assert abs(draws.mean() - J.square().sum() / 12) <= 4 * draws.std() / 10


@pytest.mark.parametrize("recorded", [True, False])
def test_gradients_pass_through_penalties(recorded):
    graph, x = connected(4), torch.randn(4, 2, dtype=DOUBLE, requires_grad=True)
    field = nonlinear(graph, 2)
    noise = torch.ones(4, 2, dtype=DOUBLE)
    penalised = PenalisedField(field, ["kinetic", "jacobian", "total_derivative"], noise)

    def end(x):
        return solve(penalised, (x, penalised.zeros(x)), [0.0, 1.0], method="euler", num_steps=1).y[1][-1]

    if recorded:
        assert torch.autograd.gradcheck(end, (x,))
    else:
        with torch.no_grad():
            assert not end(x).requires_grad


def test_early_stopping_keeps_the_best_state():
    graph, x = connected(), torch.randn(24, 3, dtype=DOUBLE)
    field = LinearDiffusion(graph, stochastic(graph))
    stopping = EarlyStopping(lambda y: -abs(float(y.std()) - 0.5 * float(x.std())))
    every = solve(field, x, [0.0, 5.0], method="rk4", dt=0.1, save="steps", observer=stopping)
    scores = torch.stack([-(y.std() - 0.5 * x.std()).abs() for y in every.y[1:]])
    assert stopping.best == pytest.approx(float(scores.max()))
    assert torch.equal(stopping.state, every.y[1:][scores.argmax()])
    assert stopping.t == pytest.approx(float(every.t[1:][scores.argmax()]))
    impatient = EarlyStopping(stopping.score, patience=3)
    stopped = solve(field, x, [0.0, 5.0], method="rk4", dt=0.1, observer=impatient)
    assert stopped.last.t == pytest.approx(stopping.t + 0.3)
    assert torch.equal(impatient.state, stopping.state)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    graph, x = connected(6), torch.randn(6, 2)
    with pytest.raises(go.UnknownNameError, match="did you mean 'additive'"):
        EdgeAttention(2, "aditive")
    with pytest.raises(go.ArgumentError, match="heads = 3 must divide"):
        EdgeAttention(2, dim=4, heads=3)
    with pytest.raises(go.ArgumentError, match="belongs to the dot product"):
        EdgeAttention(2, "additive", dim=4, scale="d_k")
    with pytest.raises(go.ArgumentError, match="laplacian_diffusion"):
        LinearDiffusion(graph)
    with pytest.raises(go.ArgumentError, match="weight must be"):
        LinearDiffusion(graph, torch.ones(graph.num_edges, 2))
    with pytest.raises(go.ArgumentError, match="weight"):
        LinearDiffusion(graph, torch.ones(3))
    with pytest.raises(go.ArgumentTypeError, match="boolean mask"):
        trusted_source(x, torch.tensor([0, 1]))
    with pytest.raises(go.ArgumentError, match="labels are known"):
        trusted_source(x, torch.zeros(6, dtype=torch.bool))
    with pytest.raises(go.UnknownNameError, match="did you mean 'kinetic'"):
        PenalisedField(nonlinear(graph), ["kinetics"])
    with pytest.raises(go.ArgumentError, match="must sum to 1"):
        stationary_distribution(graph, torch.ones(graph.num_edges))
    with pytest.raises(go.ArgumentError, match="mixes slowly"):
        stationary_distribution(graph, (1.0 / graph.degree())[graph.target], max_iters=1)
    with pytest.raises(go.ArgumentError, match="patience"):
        EarlyStopping(float, patience=0)
