"""Backward differentiation: its coefficients, and stiff problems in every mode, by every kind of inner solver."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import torch

from solvers import ArgumentError, Status, solve
from solvers.control.bdf import BDFController
from solvers.layout import Layout
from solvers.methods.adams_weights import distances
from solvers.methods.backward_weights import base_weights, fixed_leading, lagrange, values
from solvers.methods.bdf import BDFState
from solvers.optim import INNER_OPTIMIZERS

D = torch.float64

# --- coefficients ----------------------------------------------------------------------------------------------------

CLASSICAL = {  # Hairer, Nørsett & Wanner I, III.1.22', solved for y_{n+1}
    1: ([1.0], 1.0),
    2: ([4 / 3, -1 / 3], 2 / 3),
    3: ([18 / 11, -9 / 11, 2 / 11], 6 / 11),
    4: ([48 / 25, -36 / 25, 16 / 25, -3 / 25], 12 / 25),
    5: ([300 / 137, -300 / 137, 200 / 137, -75 / 137, 12 / 137], 60 / 137),
}


@pytest.mark.parametrize("k", CLASSICAL)
def test_equal_steps_give_the_classical_formulas(k):
    weights = fixed_leading(distances(0.1, (0.1,) * 7), k)
    expected = CLASSICAL[k][0]
    assert weights.base == pytest.approx([*expected, *[0.0] * (k + 1 - len(expected))], abs=1e-12)
    assert weights.errors[1] == pytest.approx(1 / (k + 1))


def grid(k, batch=3):
    """Times t_n - 1, t_n = 0, t_n - s_1, .. of irregular steps, ``(k + 3, batch)``, and the steps."""
    steps = torch.rand(k + 2, batch, dtype=D) + 0.3
    return torch.cat([torch.ones(1, batch, dtype=D), torch.zeros(1, batch, dtype=D), -steps.cumsum(0)]), steps


@pytest.mark.parametrize("k", CLASSICAL)
def test_formula_and_predictor_are_exact_for_polynomials_of_their_degree(k):
    t, steps = grid(k)
    one = torch.ones(3, dtype=D)
    weights = fixed_leading(distances(one, tuple(steps)), torch.full((3,), k))
    g = 1.0 / sum(1 / j for j in range(1, k + 1))
    for degree in range(k + 1):
        y, slope = t**degree, degree * torch.ones(3, dtype=D)
        torch.testing.assert_close((weights.predicted * y[1:]).sum(0), y[0], atol=1e-10, rtol=0)
        torch.testing.assert_close((weights.base * y[1:]).sum(0) + g * slope, y[0], atol=1e-10, rtol=0)
        if degree <= k - 1:
            torch.testing.assert_close((weights.lower * y[1:]).sum(0), y[0], atol=1e-10, rtol=0)
        torch.testing.assert_close((weights.higher * y[1:]).sum(0), y[0], atol=1e-10, rtol=0)
    assert ((weights.predicted * t[1:] ** (k + 1)).sum(0) - 1).abs().min() > 1e-2
    # For y = t^(q + 1) / (q + 1)! the derivative of order q + 1 is 1, and the errors of the two orders are 1 / (q + 1), dt = 1.
    for combination, order, multiple in ((weights.lower, k - 1, 0), (weights.higher, k + 1, 2)):
        y = t ** (order + 1) / math.factorial(order + 1)
        left = y[0] - (combination * y[1:]).sum(0)
        if order >= 1:
            torch.testing.assert_close(weights.errors[multiple] * left, one / (order + 1), rtol=1e-9, atol=0)


def test_samples_of_different_order_get_what_each_gets_alone():
    steps = torch.rand(6, 5, dtype=D) + 0.3
    dt = torch.rand(5, dtype=D) + 0.5
    s, k = distances(dt, tuple(steps)), torch.tensor([1, 2, 3, 4, 5])
    together = fixed_leading(s, k)
    for sample in range(5):
        alone = fixed_leading(s[:, sample].tolist(), sample + 1)
        for one, all_ in zip(alone[:4], together[:4], strict=True):
            if one is not None:
                padded = one + [0.0] * (len(s) - len(one))
                assert all_[:, sample].tolist() == pytest.approx(padded, abs=1e-12)
        assert [float(x[sample]) for x in together.errors][1:] == pytest.approx(alone.errors[1:])


def test_weights_are_differentiable_functions_of_the_steps():
    def weights(dt, *steps):
        return base_weights(distances(dt, steps), 3)

    steps = [torch.tensor(x, dtype=D, requires_grad=True) for x in (0.4, 0.7, 0.5, 0.6)]
    assert torch.autograd.gradcheck(weights, steps)


def test_lagrange_polynomials_of_some_of_the_nodes():
    x = torch.tensor([[1.0, 1.0], [0.0, 0.0], [-0.5, -2.0], [-1.5, -3.0]], dtype=D)
    count = torch.tensor([3, 4])
    rows = lagrange(x, count)
    theta = torch.rand(7, 2, dtype=D)
    for sample in range(2):
        n = int(count[sample])
        y = torch.randn(n, dtype=D)
        fit = np.polynomial.Polynomial.fit(x[:n, sample].numpy(), y.numpy(), n - 1).convert()
        for derivative in range(3):
            found = (values(rows, theta, derivative)[:n, :, sample] * y[:, None]).sum(0)
            wanted = (fit.deriv(derivative) if derivative else fit)(theta[:, sample].numpy())
            np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-9, atol=1e-9)
        assert (values(rows, theta)[n:, :, sample] == 0).all()


# --- steps and orders ------------------------------------------------------------------------------------------------


def decide(k, ratios, streak=(9, 9, 0)):
    ops = Layout(torch.zeros(1, dtype=D)).ops
    state = BDFState((), (), 7, k, (), None)
    control = BDFController()
    held, taken, rejections = streak
    before = control.init(ops, 0.0)._replace(held=held, taken=taken, rejections=rejections, even=9)
    return control.update(ops, (*ratios, 0.0), 2, before, state)


def test_order_and_step_follow_the_errors():
    assert decide(3, (1.0, 0.4, 0.9)).factor == 1.0  # too little to gain
    assert decide(3, (1.0, 1e-4, 0.9)).factor == 2.0
    higher = decide(3, (1.0, 0.4, 1e-3))
    assert higher.order == 4 and higher.state.held == 0 and higher.factor > 1.2
    assert decide(3, (1.0, 0.4, 1e-3), streak=(1, 9, 0)).order == 3  # not yet
    lower = decide(3, (1e-4, 0.9, 0.9))
    assert lower.order == 2 and lower.factor > 1.2
    assert 0.5 <= decide(3, (1.0, 0.99, 1.0)).factor < 1.0


def test_rejections_cut_the_step_and_in_the_end_the_order():
    once = decide(4, (math.inf, 30.0, math.inf))
    assert not once.accept and once.order == 4 and 0.2 <= once.factor < 0.9
    assert decide(4, (math.inf, 30.0, math.inf), streak=(3, 9, 2)).order == 1
    failed = decide(4, (math.inf, math.inf, math.inf))
    assert not failed.accept and failed.factor == 0.25


def swinging(rate):
    """A mode of eigenvalues ``rate`` around (sin t, cos t), which is a solution."""
    a = torch.tensor([[rate.real, rate.imag], [-rate.imag, rate.real]], dtype=D)

    def f(t, y):
        s, c = torch.sin(t), torch.cos(t)
        if y.dim() == 1:
            return a @ (y - torch.stack([s, c])) + torch.stack([c, -s])
        return (y - torch.stack([s, c], -1)) @ a.T + torch.stack([c, -s], -1)

    return f


@pytest.mark.parametrize("max_order", [3, 4, 5])
@pytest.mark.parametrize("rate", [-1 + 1000j, -10 + 1000j, 1000j])
def test_a_mode_that_swings_below_the_tolerance_is_damped(rate, max_order):
    """10 tolerances, for 300 periods: left to themselves, formulas of order 3 to 5 keep it, and the step, for ever, in 3,300 to
    11,600 steps, and end with errors of 7e-6 to 1.6e-3. Measured: up to 2,480 steps, 2e-8."""
    end = torch.tensor(2.0, dtype=D)
    s = solve(swinging(rate), torch.tensor([1e-5, 1.0], dtype=D), [0.0, 2.0], method="prox_bdf", max_order=max_order)
    assert s.stats.accepted < 2800
    assert (s.y[-1] - torch.stack([end.sin(), end.cos()])).abs().max() < 1e-6


def test_waves_of_many_tolerances_are_followed():
    """A chain of 20 masses, set swinging by a force: 2.0e-7, dopri5 1.4e-6; BDF that damps whatever it finds 4.2e-7."""
    n = 20
    beside = torch.diag(torch.ones(n - 1, dtype=D), 1)
    matrix = 1e4 * (n + 1) ** 2 * (beside + beside.T - 2 * torch.eye(n, dtype=D))
    whole = torch.zeros(2 * n, 2 * n, dtype=D)
    whole[:n, n:], whole[n:, :n], whole[n:, n:] = torch.eye(n, dtype=D), matrix, -0.1 * torch.eye(n, dtype=D)
    force = torch.cat([torch.zeros(n, dtype=D), torch.ones(n, dtype=D)])
    f = lambda t, y: y @ whole.T + force * torch.sin(t)
    y0 = torch.zeros(2 * n, dtype=D)
    exact = solve(f, y0, [0.0, 1.0], method="dop853", rtol=1e-10, atol=1e-14).y[-1]
    s = solve(f, y0, [0.0, 1.0], method="prox_bdf")
    assert (s.y[-1] - exact).abs().max() < 3e-7


def test_each_sample_damps_its_own():
    start, end = torch.tensor([[1e-5, 1.0], [0.0, 1.0], [1e-4, 1.0]], dtype=D), torch.tensor(2.0, dtype=D)
    s = solve(swinging(-10 + 1000j), start, [0.0, 2.0], method="prox_bdf", batch_dim=0)
    assert (s.stats.accepted < 1800).all()
    assert (s.y[-1] - torch.stack([end.sin(), end.cos()])).abs().max() < 1e-6


def test_a_mode_that_is_seen_to_swing_is_followed_with_even_steps():
    ops = Layout(torch.zeros(1, dtype=D)).ops
    control = BDFController()
    state = control.init(ops, 0.0)._replace(held=9, taken=99, even=9)
    for _ in range(30):
        decided = control.update(ops, (0.5, 0.6, math.inf, 0.5), 2, state, BDFState((), (), 7, 5, (), None))
        state = decided.state
    assert decided.factor == 1.0 and decided.order == 5 and decided.state.calm.mode > 0
    state = state._replace(even=11, calm=state.calm._replace(peak=0.0))
    lowered = control.update(ops, (0.5, 1e-3, math.inf, 0.5), 2, state, BDFState((), (), 7, 5, (), None))
    assert lowered.order == 2 and lowered.factor == 1.0


@pytest.mark.parametrize("max_order", [1, 2, 3, 4, 5])
def test_higher_orders_take_fewer_steps(max_order):
    """The number of steps grows like rtol^(-1 / (k + 1))."""
    counts = []
    for rtol in (1e-3, 1e-5):
        sol = solve(
            lambda t, y: -5 * (y - torch.cos(t)), torch.zeros(2, dtype=D), [0.0, 10.0], method="prox_bdf", rtol=rtol,
            atol=rtol, max_order=max_order,
        )  # fmt: skip
        counts.append(sol.stats.accepted)
    gain = counts[1] / counts[0]
    assert gain < 1.35 * 100 ** (1 / (max_order + 1)), counts


# --- stiff problems --------------------------------------------------------------------------------------------------


def robertson(t, y):
    a, b, c = y.unbind(-1)
    first, third = -0.04 * a + 1e4 * b * c, 3e7 * b * b
    return torch.stack([first, -first - third, third], -1)


def hires(t, y):
    a, b, c, d, e, f, g, h = y.unbind(-1)
    fast = 280 * f * h
    slopes = [
        -1.71 * a + 0.43 * b + 8.32 * c + 0.0007, 1.71 * a - 8.75 * b, -10.03 * c + 0.43 * d + 0.035 * e,
        8.32 * b + 1.71 * c - 1.12 * d, -1.745 * e + 0.43 * (f + g), -fast + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
        fast - 1.81 * g, -fast + 1.81 * g,
    ]  # fmt: skip
    return torch.stack(slopes, -1)


def oregonator(t, y):
    a, b, c = y.unbind(-1)
    return torch.stack([77.27 * (b + a * (1 - 8.375e-6 * a - b)), (c - (1 + a) * b) / 77.27, 0.161 * (a - c)], -1)


def van_der_pol(t, y, mu=1000.0):
    a, b = y.unbind(-1)
    return torch.stack([b, mu * (1 - a * a) * b - a], -1)


def start(*values):
    return torch.tensor(values, dtype=D)


SMALL = {  # field, start, outputs, atol / rtol
    "robertson": (robertson, start(1, 0, 0), (1.0, 1e3, 1e5), 1e-6),
    "hires": (hires, start(1, 0, 0, 0, 0, 0, 0, 0.0057), (1.0, 50.0, 321.8122), 1e-4),
    "oregonator": (oregonator, start(1, 2, 3), (30.0, 200.0, 360.0), 1e-6),
    "van_der_pol": (van_der_pol, start(2, 0), (500.0, 1500.0, 2000.0), 1e-3),
}
QUICK = ("robertson", "hires")
KNOWN = {  # by scipy's Radau with the exact Jacobian at rtol = 1e-12
    "robertson": [
        [0.9664597373, 3.074626579e-05, 0.0335095164],
        [0.3368745307, 2.013702318e-06, 0.6631234556],
        [0.01786592114, 7.274751468e-08, 0.9821340061],
    ],
    "hires": [
        [0.255492693, 0.05690878909, 0.01945807498, 0.4585194697, 0.02014773913, 0.1822879578, 0.005499081272, 0.0002009187276],
        [
            0.005418869475, 0.001059403575, 0.0009726850858, 0.009383039048,
            0.1633660074, 0.6558748346, 0.00564437038, 5.562961981e-05,
        ],
        [
            0.0007371312573, 0.0001442485726, 5.888729741e-05, 0.001175651343,
            0.002386356199, 0.006238968253, 0.002849998395, 0.002850001605,
        ],
    ],
    "oregonator": [
        [1.000661467, 1512.778937, 10358.54313],
        [1.033616386, 30.74678529, 1.02884276],
        [1.00081487, 1228.178522, 132.0554943],
    ],
    "van_der_pol": [
        [1.596768951, -0.001030391188],
        [-1.354745919, 0.001621788728],
        [1.706167732, -0.000892809701],
    ],
}


def error(name, y):
    exact = torch.tensor(KNOWN[name], dtype=D)
    return float(((y[1:].double() - exact).abs() / (exact.abs() + SMALL[name][3])).max())


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SMALL])
def test_small_stiff_problems_with_fewer_evaluations_than_scipy(name):
    field, y0, times, part = SMALL[name]
    sol = solve(field, y0, [0.0, *times], method="prox_bdf", rtol=1e-6, atol=1e-6 * part)
    assert error(name, sol.y) < 1e-4
    assert sol.stats.jacobian == "autograd"
    work = sol.stats.nfe + sol.stats.nvjp
    assert work <= {"robertson": 850, "hires": 800, "oregonator": 3900, "van_der_pol": 2600}[name]
    f = lambda t, y: field(t, torch.from_numpy(y)).numpy()
    for peer in ("BDF", "LSODA"):
        assert work < scipy.integrate.solve_ivp(f, (0, times[-1]), y0.numpy(), peer, rtol=1e-6, atol=1e-6 * part).nfev


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SMALL])
def test_small_stiff_problems_in_single_precision(name):
    field, y0, times, part = SMALL[name]
    sol = solve(field, y0.float(), [0.0, *times], method="prox_bdf", rtol=1e-5, atol=1e-5 * part)
    assert sol.y.dtype == torch.float32 and error(name, sol.y) < 5e-3


def ring(points):
    """Diffusion on a periodic line (Xia 2023, 5.3): the field, a start, and the solution at a time."""
    x = torch.linspace(0, 1, points, dtype=D)
    y0 = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    scale = (points - 1) ** 2
    rates = (2 * torch.cos(2 * math.pi * torch.arange(points) / points) - 2) * scale

    def field(t, y):
        return (torch.roll(y, 1, -1) - 2 * y + torch.roll(y, -1, -1)) * scale

    return field, y0, lambda t: torch.fft.ifft(torch.fft.fft(y0) * torch.exp(rates.double() * t)).real


@pytest.mark.parametrize(
    ("options", "most", "limit", "how"),
    [
        ({}, 580, 2e-5, "autograd"),
        ({"inner": "newton_krylov"}, 1300, 1e-5, "matrix-free"),
        ({"inner": "newton_krylov", "krylov": "gmres"}, 1700, 2e-5, "matrix-free"),
        ({"inner": "fletcher_reeves"}, 1700, 2e-5, ""),
        ({"inner": "fletcher_reeves", "rate": "line_search"}, 3000, 2e-5, ""),
    ],
    ids=["auto", "minres", "gmres", "cg", "line_search"],
)
def test_diffusion_by_every_kind_of_inner_solver(options, most, limit, how):
    field, y0, exact = ring(128)
    calls = []

    def counted(t, y):
        calls.append(t)
        return field(t, y)

    times = [0.0, 0.001, 0.01, 0.1, 1.0]
    sol = solve(counted, y0, times, method="prox_bdf", rtol=1e-5, atol=1e-7, **options)
    worst = max(float((sol.y[i] - exact(t)).abs().max() / exact(t).abs().max()) for i, t in enumerate(times) if t)
    assert worst < limit
    assert sol.stats.nfe == len(calls) and sol.stats.nfe + sol.stats.nvjp <= most
    assert sol.stats.jacobian == how


def test_diffusion_in_single_precision_stops_at_rounding():
    field, y0, exact = ring(128)
    sol = solve(field, y0.float(), [0.0, 0.001, 0.01, 0.1, 1.0], method="prox_bdf", rtol=1e-4, atol=1e-6, inner="newton_krylov")
    assert sol.stats.nfe <= 900 and float((sol.y[-1].double() - exact(1.0)).abs().max()) < 1e-3 * float(exact(1.0).max())


def test_many_unknowns_are_solved_without_a_matrix_and_nonsymmetric_ones_by_gmres():
    """Advection and diffusion; MINRES, where it is asked for, gives way to GMRES."""
    n = 500
    x = torch.linspace(0, 1, n, dtype=D)

    def field(t, y):
        right, left = torch.roll(y, -1, -1), torch.roll(y, 1, -1)
        return 0.01 * n**2 * (right - 2 * y + left) - 2.0 * n * (right - left) / 2

    y0 = torch.exp(-100 * (x - 0.5) ** 2)
    wave = torch.exp(2j * math.pi * torch.arange(n, dtype=D) / n)
    rates = 0.01 * n**2 * (wave + 1 / wave - 2) - n * (wave - 1 / wave)
    exact = torch.fft.ifft(torch.fft.fft(y0) * torch.exp(rates * 0.3)).real
    found = {}
    for krylov in ("auto", "gmres", "minres"):
        sol = solve(field, y0, [0.0, 0.3], method="prox_bdf", rtol=1e-6, atol=1e-8, inner="newton_krylov", krylov=krylov)
        assert float((sol.y[-1] - exact).abs().max()) < 2e-5
        found[krylov] = sol.stats.nfe
    assert sol.stats.jacobian == "matrix-free"
    assert found["auto"] == found["gmres"] + 2 < found["minres"]


# --- batches ---------------------------------------------------------------------------------------------------------


def oscillators(count, end):
    """``count`` of them, mu from 1 to 1000, over ``end`` mu, with the tolerance of each, scipy's solution, and what its BDF gives
    at these tolerances."""
    mu = torch.logspace(0, 3, count, dtype=D)
    y0 = torch.tensor([2.0, 0.0], dtype=D).expand(count, 2)
    t = torch.stack([torch.zeros(count, dtype=D), end * mu], 1)
    rtol = torch.logspace(-4, -6, count, dtype=D).unsqueeze(1)
    sol = solve(lambda t, y: van_der_pol(t, y, mu), y0, t, method="prox_bdf", batch_dim=0, rtol=rtol, atol=1e-2 * rtol)
    exact, peer = [], []
    for m, r in zip(mu.tolist(), rtol[:, 0].tolist(), strict=True):
        f = lambda t, y, m=m: [y[1], m * (1 - y[0] ** 2) * y[1] - y[0]]
        exact.append(scipy.integrate.solve_ivp(f, (0, end * m), [2.0, 0.0], "Radau", rtol=1e-9, atol=1e-11).y[:, -1])
        peer.append(scipy.integrate.solve_ivp(f, (0, end * m), [2.0, 0.0], "BDF", rtol=r, atol=1e-2 * r).y[:, -1])
    return sol, rtol, torch.from_numpy(np.stack(exact)), torch.from_numpy(np.stack(peer))


@pytest.mark.parametrize("count, end", [(4, 0.75), pytest.param(64, 2.0, marks=pytest.mark.slow)])
def test_oscillators_of_very_different_stiffness_each_to_its_own_tolerance(count, end):
    """Two, with mu about 8, end near a jump, which makes more of errors: ours 264 rtol, scipy's BDF 238, LSODA 222."""
    sol, rtol, exact, peer = oscillators(count, end)
    ours, theirs = (((y - exact).abs() / (exact.abs() + 0.01)).amax(1) for y in (sol.y[-1], peer))
    assert (ours < torch.maximum(50 * rtol[:, 0], 2 * theirs)).all()
    assert sol.stats.accepted.unique().numel() > count // 2


@pytest.mark.parametrize("inner", ["newton", "newton_krylov", "fletcher_reeves"])
def test_a_sample_without_a_solution_leaves_the_others_bit_for_bit(inner):
    def field(t, y):
        return torch.where(y[:, :1] > 50, torch.nan, 1.0) * (torch.roll(y, 1, 1) - 2 * y + 0.1 * y * y)

    y0 = torch.tensor([[1.0, 2.0, 0.5], [60.0, 1.0, 1.0], [30.0, 30.0, 30.0], [0.2, 0.1, 0.9]], dtype=D)
    settings = {"method": "prox_bdf", "batch_dim": 0, "inner": inner, "throw": False, "rtol": 1e-5}
    sol = solve(field, y0, [0.0, 0.2, 1.0], **settings)
    fine = solve(field, y0[[0, 3]], [0.0, 0.2, 1.0], **settings)
    assert torch.equal(sol.y[:, [0, 3]], fine.y) and fine.success
    assert sol.status[1] == Status.NON_FINITE and sol.status[2] >= Status.NON_FINITE
    assert sol.y[-1, 1:3].isnan().all()


@pytest.mark.parametrize("inner", ["newton", "newton_krylov"])
def test_groups_of_unequal_size_give_what_each_gives_alone(inner):
    index = torch.tensor([0, 1, 1, 1, 2, 2, 0, 1])

    def field(index):
        # A star: every row is drawn to the mean of its group, fast, and decays.
        count = torch.bincount(index).to(D).unsqueeze(1)

        def f(t, y):
            mean = torch.zeros(len(count), y.shape[1], dtype=D).index_add(0, index, y) / count
            return 300 * (mean[index] - y) - y**3 + torch.cos(t[index]).unsqueeze(1)

        return f

    y0 = torch.randn(8, 2, dtype=D)
    settings = {"method": "prox_bdf", "rtol": 1e-6, "atol": 1e-8, "inner": inner}
    sol = solve(field(index), y0, [0.0, 0.1, 0.4], batch_index=index, **settings)
    assert sol.success and sol.stats.accepted.unique().numel() > 1
    for group in range(3):
        mine = index == group
        alone = solve(field(index[mine] * 0), y0[mine], [0.0, 0.1, 0.4], batch_index=index[mine] * 0, **settings)
        torch.testing.assert_close(sol.y[:, mine], alone.y, rtol=1e-9, atol=1e-10)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_step_that_cannot_be_solved_is_shortened_or_ends_with_the_status():
    """By an inner solver that may try once only."""
    cubic = lambda t, y: -1e4 * y**3
    settings = {"method": "prox_bdf", "max_iters": 1, "rtol": 1e-2, "atol": 1e-2, "dt0": 1e-3, "throw": False}
    sol = solve(cubic, start(2, 3), [0.0, 1e-3], **settings)
    exact = 1 / torch.sqrt(1 / start(2, 3) ** 2 + 20)
    assert sol.success and sol.stats.rejected > 0 and float((sol.y[-1] - exact).abs().max()) < 0.03
    sol = solve(cubic, start(2, 3), [0.0, 1.0], dt_min=1e-3, **settings)
    assert Status(int(sol.status)) == Status.INNER_NOT_CONVERGED
    assert "inner" in sol.message and torch.isnan(sol.y[-1]).all()


@pytest.mark.parametrize("inner", list(INNER_OPTIMIZERS))
def test_no_inner_solver_passes_off_an_unsolved_step(inner):
    """Each succeeds to the tolerance, or ends with a status; never a wrong value."""
    options = {"jac_sparsity": np.ones((3, 3))} if inner == "newton_sparse" else {}
    for field, y0, times in ((robertson, start(1, 0, 0), (0.0, 40.0)), (lorenz, start(1, 2, 20), (0.0, 0.5))):
        sol = solve(
            field, y0, times, method="prox_bdf", inner=inner, rtol=1e-4, atol=1e-8, max_steps=300, max_iters=30, throw=False,
            **options,
        )
        if sol.success:
            exact = solve(field, y0, times, method="prox_bdf", rtol=1e-8, atol=1e-12).y[-1]
            assert float(((sol.y[-1] - exact).abs() / (exact.abs() + 1e-4)).max()) < 5e-3
        else:
            assert sol.y[-1].isnan().all()


def lorenz(t, y):
    a, b, c = y.unbind(-1)
    return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - c * (8 / 3)], -1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_order": 6}, "max_order of 'prox_bdf' must be an integer from 1 to 5, found 6"),
        ({"max_order": 0}, "found 0"),
        ({"inner_tol": 0.0}, "inner_tol must be positive"),
        ({"max_iters": 0}, "max_iters must be positive"),
        ({"dt": 0.1}, "chooses its own steps and order"),
        ({"controller": "pid"}, "take 'bdf'"),
        ({"dead_band": 0.5}, "dead_band must be at least 1"),
        ({"inner": "newton_krylov", "krylov": "cg"}, "krylov must be one of auto, minres, gmres"),
        ({"inner": "fletcher_reves"}, "fletcher_reeves"),
    ],
)
def test_bad_options(options, words):
    def f(t, y):
        raise AssertionError("f was called")

    with pytest.raises(ArgumentError, match=words):
        solve(f, start(1, 2), [0.0, 1.0], method="prox_bdf", **options)


# --- gradients -------------------------------------------------------------------------------------------------------


def reaction(y0, k, rtol, adjoint):
    """A weighted sum of outputs of Robertson's problem with rates ``k``, and the work."""

    def field(t, y, k):
        a, b, c = y.unbind(-1)
        first, third = -k[0] * a + k[1] * b * c, k[2] * b * b
        return torch.stack([first, -first - third, third], -1)

    sol = solve(field, y0, [0.0, 1.0, 40.0], args=(k,), method="prox_bdf", rtol=rtol, atol=1e-6 * rtol, adjoint=adjoint)
    return (sol.y[1:] * torch.tensor([1.0, 1e4, 0.5], dtype=D)).sum(), sol.stats


def sensitivities(y0, k):
    """The gradient of the same sum to y0 and k, from scipy's solution of the variational equations."""

    def f(t, z):
        a, b, c = z[:3]
        J = np.array([
            [-k[0], k[1] * c, k[1] * b], [k[0], -k[1] * c - 2 * k[2] * b, -k[1] * b], [0.0, 2 * k[2] * b, 0.0],
        ])  # fmt: skip
        rates = np.array([[-a, b * c, 0.0], [a, -b * c, -b * b], [0.0, 0.0, b * b]])
        slope = np.array([-k[0] * a + k[1] * b * c, k[0] * a - k[1] * b * c - k[2] * b * b, k[2] * b * b])
        S = z[3:].reshape(3, 6)
        return np.concatenate([slope, (J @ S + np.hstack([np.zeros((3, 3)), rates])).ravel()])

    z0 = np.concatenate([y0, np.hstack([np.eye(3), np.zeros((3, 3))]).ravel()])
    z = scipy.integrate.solve_ivp(f, (0, 40), z0, "Radau", (1.0, 40.0), rtol=1e-9, atol=1e-14).y.T
    return np.tensordot([1.0, 1e4, 0.5], z[:, 3:].reshape(2, 3, 6).sum(0), 1)


@pytest.mark.parametrize("adjoint", [pytest.param("backprop", marks=pytest.mark.slow), "checkpoint"])
def test_gradients_of_a_stiff_solve_against_the_variational_equations(adjoint):
    """To the start and to the rates of a reaction, through changes of order and step."""
    y0, k = start(1, 1e-6, 0.1).requires_grad_(), start(0.04, 1e4, 3e7).requires_grad_()
    value, stats = reaction(y0, k, 1e-6, adjoint)
    found = torch.cat(torch.autograd.grad(value, (y0, k))).numpy()
    wanted = sensitivities(y0.detach().numpy(), k.detach().numpy())
    # In units of each input, of which the gradients differ by eight orders of magnitude.
    unit = np.array([1.0, 1e-4, 1.0, *k.detach().numpy()])
    assert np.abs((found - wanted) * unit).max() < 1e-4 * np.abs(wanted * unit).max()
    assert np.abs(found / wanted - 1)[3:].max() < 1e-3
    if adjoint == "checkpoint":
        # A product for each of three rows of the Jacobian, one or two for the linear system, one for the rates.
        assert stats.backward.nvjp <= 8 * stats.accepted


@pytest.mark.parametrize("batch_dim", [None, pytest.param(0, marks=pytest.mark.slow)])
def test_second_derivatives_against_a_closed_form(batch_dim):
    k = torch.tensor(30.0, dtype=D, requires_grad=True)
    y0 = start(1, 2).requires_grad_()
    sol = solve(
        lambda t, y: -k * y**2, y0 if batch_dim is None else y0[None], [0.0, 1.0], method="prox_bdf", rtol=1e-7, atol=1e-9,
        batch_dim=batch_dim,
    )  # fmt: skip
    y = sol.y[-1].reshape(2)
    first = torch.autograd.grad(y[0] + 2 * y[1], (y0, k), create_graph=True)
    exact = 1 / (1 / y0 + k)
    wanted = torch.autograd.grad(exact[0] + 2 * exact[1], (y0, k), create_graph=True)
    second = torch.autograd.grad(first[0][0] * first[1], (y0, k))
    wanted_second = torch.autograd.grad(wanted[0][0] * wanted[1], (y0, k))
    for one, other in zip((*first, *second), (*wanted, *wanted_second), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-9)
