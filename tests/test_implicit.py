"""Implicit Runge-Kutta methods on stiff problems, their Newton iterations and Jacobians."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import scipy.sparse
import torch

from solvers import METHODS, ArgumentError, ArgumentTypeError, Status, solve
from solvers.control.predictive import PredictiveController
from solvers.methods.implicit import ImplicitRungeKutta

D = torch.float64
IMPLICIT = [name for name in METHODS if isinstance(METHODS[name], ImplicitRungeKutta)]
ADAPTIVE = [name for name in IMPLICIT if METHODS[name].error_order is not None]
CASES = [(name, 1e-4) for name in ADAPTIVE] + [(name, 1e-7) for name in ADAPTIVE if METHODS[name].order >= 4]


def robertson(t, y):
    a, b, c = y.unbind(-1)
    first, third = -0.04 * a + 1e4 * b * c, 3e7 * b * b
    return torch.stack([first, -first - third, third], -1)


def van_der_pol(t, y):
    a, b = y.unbind(-1)
    return torch.stack([b, 1000.0 * (1 - a * a) * b - a], -1)


HEAT_N = 100


def heat(t, y):
    wide = torch.nn.functional.pad(y, (1, 1))
    return (wide[..., 2:] - 2 * y + wide[..., :-2]) * (HEAT_N + 1) ** 2


def heat_start():
    x = torch.arange(1, HEAT_N + 1, dtype=D) / (HEAT_N + 1)
    return torch.sin(math.pi * x) + 0.5 * torch.sin(7 * math.pi * x) + (x > 0.5)


def reference(problem, y0, times):
    """scipy's Radau at 1e-12; of the heat equation, in its eigenvectors."""
    if problem is heat:
        eye = torch.eye(HEAT_N, dtype=D)
        values, vectors = np.linalg.eigh(heat(0, eye).numpy())
        return np.stack([vectors @ (np.exp(values * t) * (vectors.T @ y0.numpy())) for t in times])
    f = lambda t, y: problem(t, torch.from_numpy(y)).numpy()
    atol = 1e-18 if problem is robertson else 1e-14
    return scipy.integrate.solve_ivp(f, (times[0], times[-1]), y0.numpy(), "Radau", times, rtol=1e-12, atol=atol).y.T


STIFF = {
    "robertson": (robertson, torch.tensor([1.0, 0.0, 0.0], dtype=D), np.logspace(-1, 11, 12), 1e-8),
    "van_der_pol": (van_der_pol, torch.tensor([2.0, 0.0], dtype=D), np.logspace(0, np.log10(2000), 12), 1e-2),
    "heat": (heat, heat_start(), np.logspace(-4, 0, 12), 1e-2),
}
KNOWN: dict[str, np.ndarray] = {}


@pytest.mark.parametrize("problem", [pytest.param(name, marks=[] if name == "heat" else pytest.mark.slow) for name in STIFF])
@pytest.mark.parametrize(("method", "rtol"), CASES)
def test_stiff_problems_to_their_end(problem, method, rtol):
    field, y0, times, part = STIFF[problem]
    times = np.concatenate([[0.0], times])
    if problem not in KNOWN:
        KNOWN[problem] = reference(field, y0, times)
    sol = solve(field, y0, times, method=method, rtol=rtol, atol=part * rtol)
    error = (np.abs(sol.y.numpy() - KNOWN[problem]) / (np.abs(KNOWN[problem]) + part)).max()
    assert error < 20 * rtol, error / rtol


@pytest.mark.parametrize("method", IMPLICIT)
def test_fixed_steps_far_beyond_the_explicit_limit(method):
    """dt times the spectral radius is 800: torchdiffeq's solver of these methods returns NaN or 1e109 here."""
    times = np.linspace(0, 0.1, 6)
    sol = solve(heat, heat_start(), times, method=method, dt=0.02, rtol=1e-6)
    assert Status(int(sol.status)) == Status.SUCCESS
    if method in ("implicit_midpoint", "trapezoid", "gl4", "gl6"):
        # Not damped at infinity, but never amplified.
        assert sol.y.norm(dim=1).diff().max() < 1e-6
        return
    exact = reference(heat, heat_start(), times)
    limit = {"implicit_euler": 0.3, "sdirk2": 0.1}.get(method, 0.06)
    assert np.abs(sol.y.numpy()[-1] - exact[-1]).max() < limit * np.abs(exact[-1]).max()


@pytest.mark.parametrize("method", IMPLICIT)
@pytest.mark.parametrize("adjoint", ["backprop", "checkpoint"])
def test_gradients_on_a_stiff_problem(method, adjoint):
    def field(t, y, k):
        a, b, c = y.unbind(-1)
        fast = k[0] * (a * c - b)
        return torch.stack([-fast - k[1] * a, fast - b * b, k[1] * a + b * b - c.sin()], -1)

    def final(y0, k):
        return solve(
            field, y0, (0.0, 0.5), args=(k,), method=method, num_steps=12, rtol=1e-9, atol=1e-11, inner_tol=1e-3,
            adjoint=adjoint, max_iters=50,
        ).y[-1]

    y0 = torch.tensor([1.0, 0.8, 0.9], dtype=D, requires_grad=True)
    k = torch.tensor([300.0, 0.7], dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(final, (y0, k), eps=1e-5, atol=1e-6, rtol=1e-4)


# -- where the Jacobian comes from ------------------------------------------------------------------------------------


def relax(t, y, rate):
    return -rate * (y - torch.cos(t)) + 0.1 * y.roll(1, -1)


def relaxed(**options):
    rate = torch.linspace(1, 500, 6, dtype=D)
    calls = []

    def field(t, y):
        calls.append(t)
        return relax(t, y, rate)

    y0 = torch.ones(6, dtype=D)
    sol = solve(field, y0, (0.0, 2.0), rtol=1e-7, atol=1e-9, **options)
    return sol, len(calls)


PATTERN = scipy.sparse.csr_matrix(np.eye(6) + np.roll(np.eye(6), -1, 1))


def exact_jacobian(t, y):
    return -torch.diag(torch.linspace(1, 500, 6, dtype=D)) + 0.1 * torch.eye(6, dtype=D).roll(1, 0)


@pytest.mark.parametrize("method", ["radauIIA5", "esdirk547", "trbdf2"])
@pytest.mark.parametrize(
    ("options", "how"),
    [
        ({}, "autograd"),
        ({"inner": "newton", "jac": exact_jacobian}, "jac"),
        ({"inner": "newton_sparse", "jac_sparsity": PATTERN}, "coloured differences"),
        ({"inner": "newton_krylov"}, "matrix-free"),
    ],
)
def test_every_jacobian_gives_the_same_solution(method, options, how):
    sol, _ = relaxed(method=method, **options)
    best, _ = relaxed(method="radauIIA5")
    assert torch.allclose(sol.y[-1], best.y[-1], rtol=2e-5 if method == "trbdf2" else 2e-6)
    assert sol.stats.jacobian == how


@pytest.mark.parametrize("options", [{"inner": "newton_sparse", "jac_sparsity": PATTERN}, {"inner": "newton_krylov"}])
@pytest.mark.parametrize("method", ["radauIIA5", "esdirk547", "prox_euler"])
def test_calls_of_f_are_counted(method, options):
    sol, calls = relaxed(method=method, num_steps=40, **options)
    assert sol.stats.nfe == calls


def test_a_field_that_autograd_cannot_follow_is_differenced():
    def field(t, y):
        return torch.from_numpy(-50.0 * (y.detach().numpy() - math.cos(float(t))))

    y0 = torch.ones(3, dtype=D)
    sol = solve(field, y0, (0.0, 1.0), method="radauIIA5", rtol=1e-8)
    exact = (2500 * math.cos(1) + 50 * math.sin(1)) / 2501
    assert sol.stats.jacobian == "differences" and float(sol.y[-1, 0]) == pytest.approx(exact, rel=1e-6)


def test_a_sparse_factorisation_serves_steps_of_other_sizes_nearby():
    pattern = scipy.sparse.diags_array([1.0, 1.0, 1.0], offsets=[-1, 0, 1], shape=(HEAT_N, HEAT_N))
    options = {"rtol": 1e-5, "atol": 1e-7, "controller": PredictiveController(dead_band=1.0)}
    sparse = solve(heat, heat_start(), (0.0, 0.1), method="esdirk547", jac_sparsity=pattern, **options)
    dense = solve(heat, heat_start(), (0.0, 0.1), method="esdirk547", **options)
    assert torch.allclose(sparse.y[-1], dense.y[-1], rtol=2e-5, atol=1e-7)
    assert sparse.stats.nlu < 0.8 * dense.stats.nlu


def test_a_jacobian_is_kept_over_many_steps():
    sol, _ = relaxed(method="radauIIA5")
    assert sol.stats.njac <= 2 < sol.stats.accepted


def test_samples_of_very_different_stiffness():
    mu = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=D)

    def field(t, y):
        a, b = y.unbind(-1)
        return torch.stack([b, mu[: len(a)] * (1 - a * a) * b - a], -1)

    y0 = torch.tensor([[2.0, 0.0]] * 4, dtype=D)
    sol = solve(field, y0, (0.0, 3.0), method="radauIIA5", batch_dim=0, rtol=1e-6, atol=1e-8)
    for i, m in enumerate(mu.tolist()):
        f = lambda t, y, m=m: [y[1], m * (1 - y[0] ** 2) * y[1] - y[0]]
        exact = scipy.integrate.solve_ivp(f, (0, 3), [2.0, 0.0], "Radau", rtol=1e-10, atol=1e-12).y[:, -1]
        assert np.allclose(sol.y[-1, i].numpy(), exact, rtol=2e-5, atol=1e-7)


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_equations_without_a_solution_end_with_the_status():
    sol = solve(lambda t, y: y * y + 1, torch.ones(1, dtype=D), (0.0, 10.0), method="implicit_euler", dt=5.0, throw=False)
    assert Status(int(sol.status)) == Status.INNER_NOT_CONVERGED and torch.isnan(sol.y[-1]).all()


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"inner": "newton", "jac": 3}, ArgumentTypeError, "jac"),
        ({"inner": "newton", "jac": lambda t, y: torch.ones(2, 2)}, ArgumentError, "jac"),
        ({"inner": "newton_sparse", "jac_sparsity": PATTERN[:5]}, ArgumentError, "jac_sparsity"),
        ({"inner": "newton_sparse", "jac_sparsity": scipy.sparse.identity(5)}, ArgumentError, "jac_sparsity"),
        ({"inner": "newton_sparse"}, ArgumentError, "jac_sparsity"),
        ({"inner_tol": 0.0}, ArgumentError, "inner_tol"),
        ({"inner": "newtn"}, ArgumentError, "newton"),
        ({"inner": "fletcher_reeves"}, ArgumentError, "inner"),
    ],
)
def test_bad_options(options, kind, text):
    with pytest.raises(kind, match=text):
        relaxed(method="radauIIA5", **options)
