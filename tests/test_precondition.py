"""Preconditioned matrix-free Newton iterations: as few products as was measured, and the same solutions."""

from __future__ import annotations

import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

from benchmarks.stiff_checks import graph_step
from solvers import ArgumentError, ArgumentTypeError, UnsupportedError, solve

D = torch.float64


def power_law(n: int):
    """Laplacian of a graph whose degrees fall like a power, with hubs of hundreds of neighbours."""
    random = torch.Generator().manual_seed(0)
    weight = torch.arange(1, n + 1, dtype=D) ** -0.8
    i, j = (torch.multinomial(weight, 4 * n, replacement=True, generator=random).numpy() for _ in range(2))
    keep = i != j
    one = scipy.sparse.coo_matrix(([1.0] * int(keep.sum()), (i[keep], j[keep])), (n, n))
    adjacency = (one + one.T).tocsr()
    return scipy.sparse.diags(adjacency.sum(1).A1) - adjacency


def graph_problem(n: int):
    laplacian = power_law(n).tocsr()
    y0 = torch.randn(n, generator=torch.Generator().manual_seed(5), dtype=D)
    exact = scipy.sparse.linalg.spsolve((scipy.sparse.identity(n) + 10.0 * laplacian).tocsc(), y0.numpy())
    return lambda t, y: torch.from_numpy(-(laplacian @ y.numpy())), y0, torch.from_numpy(exact)


@pytest.mark.slow
def test_jacobi_takes_a_fifth_of_the_products_of_conjugate_gradients_on_a_power_law_graph():
    f, y0, exact = graph_problem(5000)
    options = {"method": "prox_euler", "dt": 10.0, "rtol": 1e-5, "atol": 1e-5, "inner_tol": 0.1}
    plain = solve(f, y0, [0.0, 10.0], inner="fletcher_reeves", **options)
    jacobi = solve(f, y0, [0.0, 10.0], inner="newton_krylov", precond="jacobi", **options)
    assert (jacobi.y[-1] - exact).abs().max() < 1e-5
    assert jacobi.stats.nfe - 41 < plain.stats.nfe / 5  # 41: the diagonal, for the next 50 systems too


def stiff(t, y):
    """Reaction and diffusion on a line, with diffusivities from 1 to 1e3 along it."""
    n = y.shape[-1]
    c = torch.logspace(0, 3, n + 1, dtype=y.dtype)
    v = torch.cat([y[..., :1], y, y[..., -1:]], -1)
    flux = c * (v[..., 1:] - v[..., :-1])
    return flux[..., 1:] - flux[..., :-1] + 5 * y * (1 - y)


def band(n: int):
    return scipy.sparse.diags([1.0, 1.0, 1.0], [-1, 0, 1], (n, n))


def exact_diagonal(t, y, g, v):
    c = torch.logspace(0, 3, y.shape[-1] + 1, dtype=y.dtype)
    return v / (1 + g * (c[1:] + c[:-1]))


@pytest.mark.parametrize(
    "how", [{"precond": "jacobi"}, {"precond": "jacobi", "jac_sparsity": band(60)}, {"precond": "ilu", "jac_sparsity": band(60)},
            {"precond": exact_diagonal}],
)  # fmt: skip
@pytest.mark.parametrize("method", ["prox_bdf", "auto"])
def test_the_solution_does_not_depend_on_the_preconditioner(method, how):
    y0 = torch.linspace(0.1, 0.9, 60, dtype=D)
    plain = solve(stiff, y0, [0.0, 0.2], method=method, inner="newton_krylov", rtol=1e-6)
    other = solve(stiff, y0, [0.0, 0.2], method=method, inner="newton_krylov", rtol=1e-6, **how)
    assert (plain.y - other.y).abs().max() < 1e-5
    if how["precond"] == "ilu":
        assert other.stats.nfe < 0.75 * plain.stats.nfe


class Known:
    """dy/dt = -c y**2 + a little of the sum, with the diagonal of its Jacobian."""

    def __init__(self, rates, wrong=None):
        self.rates, self.wrong, self.asked = rates, wrong, 0

    def __call__(self, t, y, scale):
        return -scale * self.rates * y**2 + 0.01 * y.sum(-1, keepdim=True)

    def jacobian_diagonal(self, t, y, scale):
        self.asked += 1
        return -2 * scale * self.rates * y + 0.01 if self.wrong is None else self.wrong


@pytest.mark.parametrize("how", [{}, {"batch_dim": 0}, {"batch_index": torch.tensor([0, 1, 1])}], ids=["joint", "rows", "groups"])
@pytest.mark.parametrize("method", ["prox_bdf", "radauIIA5"])
def test_a_field_that_knows_its_diagonal_is_asked_in_place_of_probes(method, how):
    y0 = torch.stack([torch.linspace(0.1, 0.9, 30, dtype=D) * scale for scale in (1.0, 0.7, 0.4)])
    options = {"method": method, "inner": "newton_krylov", "rtol": 1e-7, "atol": 1e-9, "args": (2.0,), "precond": "jacobi", **how}
    field = Known(torch.logspace(0, 5, 30, dtype=D))
    found = solve(field, y0, [0.0, 0.3], **options)
    probed = solve(field.__call__, y0, [0.0, 0.3], **options)
    assert (found.y - probed.y).abs().max() < 1e-7
    assert field.asked > 0 and found.stats.jacobian == "matrix-free"
    assert (torch.as_tensor(found.stats.nfe) <= torch.as_tensor(probed.stats.nfe) - 20).all()


def test_the_known_diagonal_of_a_power_law_graph_saves_four_fifths_of_the_evaluations():
    """Of one implicit Euler step, to 1e-6 of its residual."""
    known = graph_step(precond="jacobi", known=True)
    assert known < graph_step() / 5 and known < graph_step(precond="jacobi") - 40


@pytest.mark.parametrize(
    "wrong, error",
    [(torch.ones(29, dtype=D), ArgumentError), (1.0, ArgumentTypeError), (torch.ones(30).cfloat(), ArgumentTypeError)],
)
def test_a_diagonal_that_is_not_like_the_state_is_refused(wrong, error):
    field = Known(torch.ones(30, dtype=D), wrong)
    with pytest.raises(error, match="jacobian_diagonal"):
        solve(field, torch.ones(30, dtype=D), [0.0, 1.0], method="prox_bdf", inner="newton_krylov", precond="jacobi", args=(1.0,))


@pytest.mark.parametrize("how", [{"batch_dim": 0}, {"batch_index": torch.tensor([0, 0, 1])}])
def test_a_batch_finds_the_diagonal_of_each_sample(how):
    y0 = torch.stack([torch.linspace(0.1, 0.9, 30, dtype=D) * scale for scale in (1.0, 0.7, 0.4)])
    options = {"method": "prox_bdf", "inner": "newton_krylov", "rtol": 1e-6, "precond": "jacobi"}
    both = solve(stiff, y0, [0.0, 0.1], **options, **how)
    for i in range(3):
        alone = solve(stiff, y0[i], [0.0, 0.1], **options)
        assert (both.y[-1, i] - alone.y[-1]).abs().max() < 1e-5


def test_what_is_no_preconditioner_is_refused_before_any_work():
    y0 = torch.ones(4, dtype=D)
    calls: list[int] = []

    def f(t, y):
        calls.append(1)
        return -y

    for error, options in (
        (ArgumentError, {"precond": "multigrid"}),
        (ArgumentError, {"precond": "ilu"}),
        (ArgumentError, {"jac_sparsity": band(4)}),
    ):
        with pytest.raises(error, match="precond"):
            solve(f, y0, [0.0, 1.0], method="prox_bdf", inner="newton_krylov", **options)
    with pytest.raises(UnsupportedError, match="joint mode"):
        solve(
            f, y0.unsqueeze(0), [0.0, 1.0], method="prox_bdf", inner="newton_krylov", precond="ilu", jac_sparsity=band(4),
            batch_dim=0,
        )  # fmt: skip
    assert not calls
