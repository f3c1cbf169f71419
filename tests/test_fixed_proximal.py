"""Proximal methods with fixed steps: their coefficients, orders on stiff problems, energies, and what serves when CG fails."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from solvers import Jump, Status, UnknownNameError, solve
from solvers.methods.adams_weights import distances
from solvers.methods.backward_weights import variable_coefficients
from solvers.methods.proximal import GAMMA, PRINTED, butcher, order_conditions

D = torch.float64
ORDERS = {
    "prox_euler": 1, "prox_cn": 2, "prox_bdf2": 2, "prox_bdf3": 3, "prox_bdf4": 4, "prox_multistage2": 2, "prox_multistage3": 3
}  # fmt: skip
EACH = pytest.mark.parametrize("name", ORDERS)


# --- coefficients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "a", "g"),
    [
        (2, [4 / 3, -1 / 3], 2 / 3),
        (3, [18 / 11, -9 / 11, 2 / 11], 6 / 11),
        (4, [48 / 25, -36 / 25, 16 / 25, -3 / 25], 12 / 25),
    ],
)
def test_equal_steps_give_the_formulas_of_the_thesis(k, a, g):
    weights, size = variable_coefficients(distances(0.1, (0.1,) * (k - 1)), 0.1)
    assert weights == pytest.approx(a) and size == pytest.approx(0.1 * g)


@pytest.mark.parametrize("k", [2, 3, 4])
def test_formulas_are_exact_for_polynomials_on_any_grid(k):
    steps = torch.rand(k - 1, 3, dtype=D) + 0.3
    dt = torch.rand(3, dtype=D) + 0.5
    weights, g = variable_coefficients(distances(dt, tuple(steps)), dt)
    t = torch.cat([torch.zeros(1, 3, dtype=D), -steps.cumsum(0)])
    for degree in range(k + 1):
        slope = degree * dt ** max(degree - 1, 0)
        torch.testing.assert_close((weights * t**degree).sum(0) + g * slope, dt**degree, rtol=1e-10, atol=1e-10)
    assert ((weights * t ** (k + 1)).sum(0) + g * (k + 1) * dt**k - dt ** (k + 1)).abs().min() > 1e-3


@pytest.mark.parametrize("order", [2, 3])
def test_multistage_coefficients_satisfy_the_order_conditions(order):
    assert np.abs(order_conditions(GAMMA[order], order)).max() < 1e-13
    pairs = zip(GAMMA[order], PRINTED[order], strict=True)
    change = max(abs(a - b) for row, old in pairs for a, b in zip(row, old, strict=True))
    assert change < (1e-12 if order == 2 else 4e-3)
    A, _ = butcher(GAMMA[order])
    eye, one = np.eye(len(A)), np.ones(len(A))
    for z in -np.logspace(-2, 6, 100):
        # R(z) of a method whose last stage is its result.
        assert abs(np.linalg.solve(eye - z * A, one)[-1]) < 1
    if order == 3:
        assert np.abs(order_conditions(PRINTED[3], 3)).max() > 1e-3


# --- orders on stiff problems ----------------------------------------------------------------------------------------


def prothero_robinson(rate):
    return lambda t, y: rate * (y - torch.sin(t + 0.3)) + torch.cos(t + 0.3)


def kaps(t, y, stiffness=1e3):
    a, b = y.unbind(-1)
    return torch.stack([-(stiffness + 2) * a + stiffness * b * b, a - b * (1 + b)], -1)


def uneven(n, end):
    """A grid whose steps differ by a factor of two."""
    x = torch.linspace(0, 1, n + 1, dtype=D)
    return end * (x + 0.1 * torch.sin(2 * math.pi * x) / math.pi)


def slope(name, field, exact, end, counts, grid, inner_tol=1e-4):
    errors = []
    for n in counts:
        steps = {"num_steps": n} if grid == "even" else {"step_t": uneven(n, end)[1:-1], "dt": 10.0}
        steps |= {"fallback": "newton_krylov"}
        y = solve(field, exact(0.0), [0.0, end], method=name, rtol=1e-6, atol=1e-9, inner_tol=inner_tol, **steps).y[-1]
        errors.append(float((y - exact(end)).abs().max()))
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0], errors


@pytest.mark.parametrize("grid", ["even", "uneven"])
@EACH
def test_orders_on_prothero_and_robinson(name, grid):
    exact = lambda t: torch.full((1,), math.sin(t + 0.3), dtype=D)
    found, errors = slope(name, prothero_robinson(-10.0), exact, 1.0, (32, 64), grid)
    assert abs(found - ORDERS[name]) < 0.2, errors


@pytest.mark.parametrize("grid", ["even", pytest.param("uneven", marks=pytest.mark.slow)])
@EACH
def test_orders_on_a_very_stiff_problem(name, grid):
    """Backward differentiation keeps its order, Crank-Nicolson too; of stages, the order is that of the stages."""
    exact = lambda t: torch.full((1,), math.sin(t + 0.3), dtype=D)
    found, errors = slope(name, prothero_robinson(-1e4), exact, 1.0, (16, 32), grid, 1e-6)
    wanted, below = (1, 0.25) if "multistage" in name else (ORDERS[name], 0.2)
    assert found > wanted - below and max(errors) < 1e-2, errors


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["even", "uneven"])
@EACH
def test_orders_on_kaps_problem(name, grid):
    exact = lambda t: torch.tensor([math.exp(-2 * t), math.exp(-t)], dtype=D)
    found, errors = slope(name, kaps, exact, 1.0, (40, 80), grid, 1e-6)
    assert found > (1.0 if "multistage" in name else ORDERS[name]) - 0.2, errors


@pytest.mark.parametrize("name", ["prox_euler", "prox_bdf2"])
def test_the_global_error_grows_linearly_with_the_inner_tolerance(name):
    """Xia 2023, section 5.3.2: against the same steps solved all but exactly, up to where their starts are within it."""
    x = torch.arange(32, dtype=D) * (2 * math.pi / 32)
    field = lambda t, y: 40 * (torch.roll(y, 1, -1) - 2 * y + torch.roll(y, -1, -1)) - y**3 + torch.cos(t + x)

    def run(inner_tol):
        how = {"num_steps": 40, "inner_tol": inner_tol, "rtol": 1e-300, "atol": 1e-6, "inner": "gradient_descent"}
        return solve(field, torch.sin(x), [0.0, 1.0], method=name, max_iters=5000, **how).y[-1]

    exact = run(1e-6)
    tolerances = (0.1, 1.0, 10.0, 100.0)
    errors = [float((run(tol) - exact).abs().max()) for tol in tolerances]
    grown = np.polyfit(np.log(tolerances), np.log(errors), 1)[0]
    assert 0.8 < grown < 1.2 and errors[0] < 40 * 1e-7, errors


def test_a_root_beside_the_extrapolated_start_is_taken_though_the_jacobian_is_not_normal():
    """On the slow manifold of Kaps' problem <w, M w> < 0 for the corrections w of good starts; conjugate gradients fail there."""
    exact = torch.tensor([math.exp(-2), math.exp(-1)], dtype=D)
    how = {"num_steps": 80, "rtol": 1e-6, "atol": 1e-9, "inner_tol": 1e-6, "fallback": "newton_krylov"}
    sol = solve(kaps, torch.ones(2, dtype=D), [0.0, 1.0], method="prox_bdf2", **how)
    assert float((sol.y[-1] - exact).abs().max()) < 1e-4 and "newton_krylov" in sol.stats.inner


# --- the diffusion of the thesis, and energies -----------------------------------------------------------------------


def ring():
    x = torch.linspace(0, 1, 128, dtype=D)
    y0 = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    rates = (2 * torch.cos(2 * math.pi * torch.arange(128) / 128) - 2).double() * 127**2

    def field(t, y):
        return (torch.roll(y, 1, -1) - 2 * y + torch.roll(y, -1, -1)) * 127**2

    return field, y0, lambda t: torch.fft.ifft(torch.fft.fft(y0) * torch.exp(rates * t)).real


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "most", "early"), [("prox_bdf2", 5300, 1e-6), ("prox_bdf4", 5600, 1e-6), ("prox_cn", 8500, 1e-5)]
)
def test_evaluations_for_the_diffusion_of_the_thesis(name, most, early):
    """Xia 2023, section 5.3: 2000 steps to t = 1, residuals of 1e-7; the mass stays."""
    field, y0, exact = ring()
    with torch.no_grad():
        sol = solve(field, y0, [0.0, 0.1, 1.0], method=name, num_steps=2000, inner_tol=1.0, rtol=1e-300, atol=1e-7)
    assert float((sol.y[1] - exact(0.1)).abs().max()) < early and float((sol.y[2] - exact(1.0)).abs().max()) < 1e-6
    assert sol.stats.nfe <= most
    assert abs(float(sol.y[2].mean() - y0.mean())) < 1e-9


@pytest.mark.parametrize("name", ["prox_euler", "prox_bdf2"])
def test_the_energy_falls_at_steps_a_thousand_times_the_explicit_limit(name):
    """Allen-Cahn with wide interfaces (Xia 2023, section 5.3.3), where such a step still has one minimum; of two steps, the
    energy with the distance of the last two states."""
    scale = 300.0

    def energy(u):
        right, down = torch.roll(u, -1, -1) - u, torch.roll(u, -1, -2) - u
        return float((scale / 2 * (right**2 + down**2) + (u**2 - 1) ** 2 / 4).sum())

    def field(t, u):
        near = torch.roll(u, 1, -1) + torch.roll(u, -1, -1) + torch.roll(u, 1, -2) + torch.roll(u, -1, -2)
        return scale * (near - 4 * u) + u - u**3

    dt = 1000 * 2 / (8 * scale + 2)
    u = 0.3 + torch.randn(32, 32, dtype=D)
    steps = solve(field, u, [0.0, 12 * dt], method=name, dt=dt, save="steps", rtol=1e-6, atol=1e-8).y
    total = [energy(steps[0])]
    for before, after in itertools.pairwise(steps):
        moved = float((after - before).square().sum())
        total.append(energy(after) + (moved / (4 * dt) if name == "prox_bdf2" else 0.0))
    assert all(b <= a + 1e-9 * abs(a) for a, b in itertools.pairwise(total[1:]))
    assert total[1] < total[0] and energy(steps[-1]) < 1e-3 * 32 * 32


# --- inner solvers ---------------------------------------------------------------------------------------------------


def rotation(t, y):
    """So fast that conjugate gradients find no way: M turns every vector by nearly a right angle."""
    a, b = y.unbind(-1)
    return torch.stack([1e4 * b - a, -1e4 * a - b], -1)


@pytest.mark.parametrize("batch_dim", [None, 0])
@EACH
def test_what_the_first_inner_solver_cannot_do_the_second_does(name, batch_dim):
    y0 = torch.tensor([1.0, 0.5], dtype=D)
    y0 = y0 if batch_dim is None else torch.stack([y0, 2 * y0])
    settings = {"method": name, "num_steps": 5, "batch_dim": batch_dim, "rtol": 1e-6, "max_iters": 2, "throw": False}
    sol = solve(rotation, y0, [0.0, 1.0], **settings)
    assert sol.success and sol.stats.jacobian == "matrix-free"
    direct = solve(rotation, y0, [0.0, 1.0], **(settings | {"inner": "newton", "max_iters": 10}))
    torch.testing.assert_close(sol.y, direct.y, rtol=1e-3, atol=1e-5)
    alone = solve(rotation, y0, [0.0, 1.0], fallback=None, **settings)
    assert (alone.status == Status.INNER_NOT_CONVERGED).all() and alone.y[-1].isnan().all()


def attention(spread):
    """dy/dt = (A(y) - I) y with A(y) the softmax of scaled products of y, the sharper the larger ``spread``."""
    W = spread * torch.randn(3, 3, dtype=D)
    return lambda t, y: torch.softmax(y @ W @ y.transpose(-1, -2), -1) @ y - y


@pytest.mark.parametrize("inner", ["fletcher_reeves", "newton", "newton_krylov"])
@pytest.mark.parametrize("tau", [10.0, 100.0])
def test_steps_over_which_attention_saturates(tau, inner):
    """I - tau J is indefinite where the step begins: Newton's method alone goes astray, and what the others find is solved."""
    x, names = torch.randn(12, 3, dtype=D), set()
    for spread in (1.0, 2.0):
        field = attention(spread)
        with torch.no_grad():
            sol = solve(field, x, [0.0, tau], method="prox_euler", num_steps=1, inner=inner, rtol=1e-6, atol=1e-9)
        z = sol.y[-1]
        assert float((z - x - tau * field(None, z)).abs().max()) < 1e-5
        assert float(z.abs().max()) <= float(x.abs().max())
        names |= set(sol.stats.inner)
    assert sol.stats.inner[0] == inner
    if inner == "newton":
        assert "newton_krylov" in names


@pytest.mark.parametrize("name", ["prox_cn", "prox_bdf4", "prox_multistage3"])
def test_samples_that_start_again_at_jumps_of_their_own(name):
    """A multistep method starts anew where its sample jumps, while others go on."""
    field = lambda t, y: -3 * y**3 + torch.cos(t).unsqueeze(-1)
    y0 = torch.tensor([[1.0, 0.2], [0.5, -1.0], [2.0, 0.1]], dtype=D)
    when = torch.tensor([0.31, 0.57, math.nan], dtype=D)
    times = [0.0, 0.4, 1.0]
    settings = {"method": name, "dt": 0.05, "inner_tol": 1e-4}
    sol = solve(field, y0, times, batch_dim=0, jumps=[Jump(when, lambda t, y: -y)], **settings)
    for row in range(3):
        jumps = [Jump(float(when[row]), lambda t, y: -y)] if row < 2 else []
        alone = solve(field, y0[row], times, jumps=jumps, **settings)
        torch.testing.assert_close(sol.y[:, row], alone.y, rtol=1e-11, atol=1e-11)
        assert sol.stats.accepted[row] == alone.stats.accepted


def test_an_unknown_fallback_is_refused():
    with pytest.raises(UnknownNameError, match="newton_krylov"):
        solve(rotation, torch.ones(2, dtype=D), [0.0, 1.0], method="prox_cn", num_steps=2, fallback="newton_krilov")
