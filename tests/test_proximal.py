"""Implicit Euler as a minimisation: what it solves, what it counts, what it says when it cannot, and its derivatives."""

import gc
import math
import weakref

import pytest
import torch
from problems import problem_of

from solvers import (
    ArgumentError,
    ArgumentTypeError,
    InnerSolverError,
    Jump,
    NonFiniteError,
    Status,
    UnknownNameError,
    UnsupportedError,
    solve,
)
from solvers.field import Field
from solvers.layout import Layout
from solvers.methods import solving
from solvers.methods.proximal import ProxEuler
from solvers.norms import ErrorNorm
from solvers.optim import INNER_OPTIMIZERS, ProximalProblem, minimise
from solvers.optim.linesearch import STEPS, PowerMemory, spectral_radius

RATES = ["cg", "line_search", "constant"]
rates = pytest.mark.parametrize("rate", RATES)
FR = INNER_OPTIMIZERS["fletcher_reeves"]


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def wave(t, y, w=1.0, index=None):
    """Nonlinear, with a Jacobian that is not symmetric; ``index``: the group of each row."""
    t = t if t.dim() == 0 else (t if index is None else t[index]).unsqueeze(-1)
    return torch.cos(3 * t + w * y) - 0.3 * y * torch.roll(y, 1, -1)


def cubic(t, y):
    """Only + - * /, so that nothing depends on which lanes of a vector unit a sample falls into."""
    return -y * y * y / (1 + y * y) - 0.5 * y + 0.25 * torch.roll(y, 1, -1)


def ring(points=64, spacing=1 / 63):
    """Diffusion on a periodic line, and the state after n steps of exact implicit Euler."""
    x = torch.linspace(0, 1, points, dtype=torch.float64)
    y0 = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)
    eigenvalues = (2 * torch.cos(2 * math.pi * torch.arange(points) / points) - 2) / spacing**2

    def f(t, y):
        return (torch.roll(y, 1, -1) - 2 * y + torch.roll(y, -1, -1)) / spacing**2

    def after(n, dt):
        return torch.fft.ifft(torch.fft.fft(y0) * (1 - dt * eigenvalues.double()) ** -n).real

    return f, y0, after


class Counter:
    def __init__(self, f):
        self.f, self.calls = f, 0

    def __call__(self, *args):
        self.calls += 1
        return self.f(*args)


# --- what it solves ------------------------------------------------------------------------------------------------------


@rates
@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.2)], ids=["forwards", "backwards"])
def test_first_order_at_fixed_steps(rate, times):
    y0 = double(1.0, -0.5, 0.7)
    exact = solve(wave, y0, times, method="dopri8", rtol=1e-11, atol=1e-12).y[-1]
    errors = [
        (solve(wave, y0, times, method="prox_euler", num_steps=n, rate=rate).y[-1] - exact).abs().max().item()
        for n in (80, 160)
    ]
    assert errors[1] < 0.02
    assert 0.9 < math.log2(errors[0] / errors[1]) < 1.15


@rates
def test_each_rate_solves_the_same_equations(rate):
    f, y0, after = ring()
    solution = solve(f, y0, [0.0, 0.1], method="prox_euler", num_steps=20, rate=rate, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(solution.y[-1], after(20, 0.005), rtol=1e-7, atol=0)


def test_a_given_lipschitz_constant_and_a_given_rate():
    f, y0, after = ring()
    rho = 4 * 63**2
    for options in ({"rate": "constant", "lipschitz": rho}, {"rate": 1 / (1 + 0.005 * rho)}):
        solution = solve(f, y0, [0.0, 0.1], method="prox_euler", num_steps=20, rtol=1e-8, atol=1e-12, **options)
        torch.testing.assert_close(solution.y[-1], after(20, 0.005), rtol=1e-5, atol=0)


def test_inner_error_is_proportional_to_the_inner_tolerance():
    f, y0, after = ring()
    errors = []
    for inner_tol in (1.0, 1e-2, 1e-4):
        y = solve(f, y0, [0.0, 0.1], method="prox_euler", num_steps=200, inner_tol=inner_tol, rtol=1e-4, atol=1e-7).y[-1]
        errors.append((y - after(200, 0.0005)).abs().max().item())
    assert errors[0] < 1e-3
    assert 30 < errors[0] / errors[1] < 3000
    assert 30 < errors[1] / errors[2] < 3000


@pytest.mark.parametrize("rtol", [1e-2, 1e-3, 1e-4])
def test_adaptive_steps_follow_the_tolerance(rtol):
    y0 = double(1.0, -0.5, 0.7)
    exact = solve(wave, y0, [0.0, 2.0], method="dopri8", rtol=1e-11, atol=1e-12).y[-1]
    solution = solve(wave, y0, [0.0, 2.0], method="prox_euler", rtol=rtol, atol=rtol / 100)
    # Of first order: N steps with an error of rtol each, N about 1 / sqrt(rtol).
    assert (solution.y[-1] - exact).abs().max() < math.sqrt(rtol)
    assert solution.stats.rejected < solution.stats.accepted / 3


def test_a_stiff_linear_problem_is_stable():
    """h lambda = 1e4: the fast components are gone after one step, the slow one is followed; nothing overshoots."""
    rates_of_decay = double(1.0, 1e3, 1e6)
    y0, times = double(1.0, 1.0, 1.0), [0.0, 0.01, 0.1, 1.0]
    solution = solve(lambda t, y: -rates_of_decay * y, y0, times, method="prox_euler", dt=0.01, dense=True)
    expected = (1 + 0.01 * rates_of_decay) ** -torch.tensor([[0.0], [1.0], [10.0], [100.0]], dtype=torch.float64)
    torch.testing.assert_close(solution.y, expected, rtol=1e-5, atol=1e-8)
    path = solution.dense(torch.linspace(0, 1, 777, dtype=torch.float64))
    assert path.max() <= 1
    assert path.min() >= -1e-8


@rates
@pytest.mark.parametrize("angle", [0.1, 1.0, 10.0])
def test_rotations_which_have_no_potential(rate, angle):
    """J is antisymmetric: conjugate directions alone do not converge."""
    if rate == "constant" and angle >= 1:
        pytest.skip("a constant rate with momentum does not converge here, and says so")
    y = solve(
        lambda t, y: torch.stack([-y[1], y[0]]), double(1.0, 0.5), [0.0, angle], method="prox_euler", num_steps=1, rate=rate
    ).y[-1]
    exact = double(1.0 - 0.5 * angle, 0.5 + angle) / (1 + angle**2)
    torch.testing.assert_close(y, exact, rtol=1e-6, atol=1e-6)


def test_energy_never_grows_however_large_the_step():
    """F(y1) + |y1 - y0|^2 / (2 dt) <= F(y0) (Xia 2023, 5.3.3), with a convex F whose curvature is not bounded."""

    def energy(y):
        return (torch.diff(y).square().sum() + torch.diff(y).pow(6).sum()) / 2

    def f(t, y):
        d = torch.diff(y)
        flux = d + 3 * d**5
        return torch.cat([flux, flux.new_zeros(1)]) - torch.cat([flux.new_zeros(1), flux])

    y = torch.randn(100, dtype=torch.float64)
    for dt in (0.01, 1.0, 100.0):
        solution = solve(f, y, [0.0, 5 * dt], method="prox_euler", dt=dt, save="steps")
        for before, after in zip(solution.y[:-1], solution.y[1:], strict=True):
            assert energy(after) + (after - before).square().sum() / (2 * dt) <= energy(before) * (1 + 1e-9)
        torch.testing.assert_close(solution.y.mean(-1), y.mean().expand(6), rtol=0, atol=1e-12)


def test_complex_and_tree_states():
    z0 = torch.tensor([1 + 1j, 2 - 1j]).to(torch.complex128)
    z = solve(lambda t, y: (-1 + 2j) * y, z0, [0.0, 1.0], method="prox_euler", dt=0.01)
    torch.testing.assert_close(z.y[-1], z.y[0] * (1 - 0.01 * (-1 + 2j)) ** -100, rtol=1e-5, atol=0)
    tree = solve(
        lambda t, y: {"a": -y["a"] + y["b"].sum(), "b": -4 * y["b"]},
        {"a": double(1.0), "b": torch.ones(2, 3)},
        [0.0, 1.0],
        method="prox_euler",
        dt=0.1,
    )
    assert tree.y["b"].dtype == torch.float32
    torch.testing.assert_close(tree.y["b"][-1], torch.full((2, 3), 1.4**-10), rtol=1e-5, atol=1e-7)


def test_dense_output_is_linear_and_its_derivative_is_the_slope():
    solution = solve(cubic, double(1.0, 2.0), [0.0, 1.0], method="prox_euler", dt=0.5, dense=True)
    ends = solution.dense(double(0.0, 0.5))
    torch.testing.assert_close(solution.dense(double(0.2))[0], ends[0] + 0.4 * (ends[1] - ends[0]))
    slope = solution.dense(double(0.2), derivative=1)[0]
    torch.testing.assert_close(slope, (ends[1] - ends[0]) / 0.5)
    torch.testing.assert_close(slope, cubic(0.5, ends[1]), rtol=1e-4, atol=1e-5)


@rates
@pytest.mark.parametrize("mode", ["joint", "samples", "groups"])
def test_on_every_device(rate, mode, device):
    y0 = torch.linspace(-1, 2, 12, dtype=torch.float64).view(4, 3)
    index = torch.tensor([1, 0, 1, 1])

    def run(where):
        how = {"joint": {}, "samples": {"batch_dim": 0}, "groups": {"batch_index": index.to(where)}}[mode]
        w = double(0.5).to(where).requires_grad_()
        y = solve(lambda t, y: w * cubic(t, y), y0.to(where), [0.0, 1.0], method="prox_euler", rate=rate, rtol=1e-3, **how).y
        (gradient,) = torch.autograd.grad(y[-1].sum(), w)
        assert y.device.type == where.type
        return y.detach().cpu(), gradient.cpu()

    for found, expected in zip(run(device), run(torch.device("cpu")), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


# --- what it costs ---------------------------------------------------------------------------------------------------------

MODES = {
    "joint": ({}, double(1.0, -0.5, 0.7)),
    "samples": ({"batch_dim": 0}, torch.linspace(-1, 2, 12, dtype=torch.float64).view(4, 3)),
    "groups": ({"batch_index": torch.tensor([1, 0, 1, 1])}, torch.linspace(-1, 2, 12, dtype=torch.float64).view(4, 3)),
}


@rates
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("grad", [False, True])
def test_every_call_of_f_is_counted(rate, mode, grad):
    how, y0 = MODES[mode]
    counter = Counter(lambda t, y: wave(t, y, index=how.get("batch_index")))
    y0 = y0.clone().requires_grad_(grad)
    solution = solve(counter, y0, [0.0, 1.0], method="prox_euler", rate=rate, rtol=1e-3, atol=1e-5, **how)
    assert solution.stats.nfe == counter.calls
    assert bool((torch.as_tensor(solution.stats.inner_iterations) >= torch.as_tensor(solution.stats.accepted)).all())


@pytest.mark.parametrize(("rate", "most"), [("constant", 16500), ("line_search", 10500), ("cg", 5500)])
def test_evaluations_for_the_diffusion_of_the_thesis(rate, most):
    """Xia 2023, section 5.3: 128 points, dx = 1/127, 2000 steps; at t = 1 the solution is the constant mean."""
    f, y0, _ = ring(128, 1 / 127)
    how = {"rate": rate, "inner_tol": 1.0, "rtol": 1e-300, "atol": 1e-7}
    with torch.no_grad():
        solution = solve(f, y0, [0.0, 1.0], method="prox_euler", num_steps=2000, **how)
    assert (solution.y[-1] - y0.mean()).abs().max() < 1e-6
    assert solution.stats.nfe <= most


def test_a_solution_at_rest_costs_one_call_a_step():
    counter = Counter(lambda t, y: -(y**3))
    solution = solve(counter, double(0.0, 0.0), [0.0, 1.0], method="prox_euler", num_steps=50)
    assert counter.calls == 51
    assert solution.stats.inner_iterations == 0


def test_at_least_one_iteration_from_a_start_that_passes():
    """Within the tolerance from the first step to the last, and yet the solution must not stand still or drift."""
    solution = solve(lambda t, y: -y, double(1.0), [0.0, 1.0], method="prox_euler", num_steps=1000, rtol=1e-1, atol=1e-1)
    assert solution.stats.inner_iterations == 1000
    torch.testing.assert_close(solution.y[-1], double(1.001**-1000), rtol=1e-6, atol=0)


# --- samples ---------------------------------------------------------------------------------------------------------------


@rates
def test_one_sample_alone_and_joint_agree_bit_for_bit(rate):
    y0 = torch.randn(5, dtype=torch.float64)
    joint = solve(cubic, y0, [0.0, 1.0], method="prox_euler", num_steps=7, rate=rate)
    alone = solve(cubic, y0[None], [0.0, 1.0], method="prox_euler", num_steps=7, rate=rate, batch_dim=0)
    assert torch.equal(joint.y, alone.y[:, 0])
    assert joint.stats.nfe == alone.stats.nfe
    assert joint.stats.inner_iterations == int(alone.stats.inner_iterations)


def rows_with_different_needs():
    """Scales from where one iteration does to where dozens are needed."""
    stiffness = double(0.1, 3.0, 40.0, 1000.0, 0.0)

    def f(t, y):
        k = stiffness[: len(y), None] if len(y) > 1 else f.only
        return k * (torch.roll(y, 1, -1) - 2 * y + torch.roll(y, -1, -1)) - y * y * y

    f.stiffness = stiffness
    return f, torch.randn(5, 16, dtype=torch.float64)


@rates
@pytest.mark.parametrize("steps", [{"num_steps": 4}, {"rtol": 1e-3, "atol": 1e-4}], ids=["fixed", "adaptive"])
def test_what_a_sample_does_does_not_depend_on_its_batch(rate, steps):
    f, y0 = rows_with_different_needs()
    together = solve(f, y0, [0.0, 1.0], method="prox_euler", rate=rate, batch_dim=0, **steps)
    assert len(set(together.stats.inner_iterations.tolist())) > 2
    for i in range(5):
        f.only = f.stiffness[i]
        alone = solve(f, y0[i : i + 1], [0.0, 1.0], method="prox_euler", rate=rate, batch_dim=0, **steps)
        assert torch.equal(together.y[:, i], alone.y[:, 0])
        assert together.stats.inner_iterations[i] == alone.stats.inner_iterations[0]


@rates
def test_groups_do_not_see_each_other(rate):
    y0 = torch.randn(7, 3, dtype=torch.float64)
    index = torch.tensor([2, 0, 1, 0, 2, 2, 0])
    how = {"method": "prox_euler", "rate": rate, "rtol": 1e-3, "atol": 1e-5}
    together = solve(cubic, y0, [0.0, 1.0], batch_index=index, **how)
    for group in range(3):
        rows = index == group
        alone = solve(cubic, y0[rows], [0.0, 1.0], batch_index=torch.zeros_like(index[rows]), **how)
        torch.testing.assert_close(together.y[:, rows], alone.y, rtol=1e-9, atol=1e-12)


@rates
@pytest.mark.parametrize("bad", ["nan at once", "nan on the way", "diverges"])
def test_a_bad_sample_ends_alone(rate, bad):
    f, y0 = rows_with_different_needs()

    def ill(t, y):
        dy = f(t, y)
        worse = {
            "nan at once": torch.full_like(dy[2], torch.nan),
            "nan on the way": torch.where(t[2] > 0.4, torch.nan, dy[2]),
            "diverges": 50 * y[2] + y[2] ** 3,
        }[bad]
        return torch.cat([dy[:2], worse[None], dy[3:]])

    @torch.no_grad()
    def run(field):
        return solve(field, y0, [0.0, 0.5, 1.0], method="prox_euler", rate=rate, batch_dim=0, num_steps=4, throw=False)

    well, other = run(f), run(ill)
    rest = [0, 1, 3, 4]
    assert torch.equal(other.y[:, rest], well.y[:, rest])
    assert other.status[rest].eq(0).all()
    assert other.status[2] == (Status.INNER_NOT_CONVERGED if bad == "diverges" else Status.NON_FINITE)


def test_samples_with_their_own_times_and_jumps():
    """Restarts of one row leave the history of the others alone."""
    y0 = double(1.0, 2.0).unsqueeze(1)
    t = torch.tensor([[0.0, 1.0, 2.0], [3.0, 2.5, 1.0]], dtype=torch.float64)
    jumps = [Jump(double(0.55, math.nan), lambda t, y: y + 1)]
    both = solve(cubic, y0, t, method="prox_euler", batch_dim=0, jumps=jumps, rtol=1e-3, atol=1e-5)
    first = solve(cubic, y0[0], t[0], method="prox_euler", jumps=[Jump(0.55, lambda t, y: y + 1)], rtol=1e-3, atol=1e-5)
    second = solve(cubic, y0[1], t[1], method="prox_euler", rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(both.y[:, 0], first.y, rtol=1e-10, atol=0)
    torch.testing.assert_close(both.y[:, 1], second.y, rtol=1e-10, atol=0)


# --- what cannot be solved -------------------------------------------------------------------------------------------------


@rates
def test_too_few_iterations_are_a_failure(rate):
    f, y0, _ = ring()
    with pytest.raises(InnerSolverError, match="prox_euler|inner"):
        solve(f, y0, [0.0, 1.0], method="prox_euler", dt=0.1, rate=rate, max_iters=3, fallback=None)


def test_a_step_without_a_minimum_is_a_failure():
    """dt times the growth rate above 1: the equation has a solution (here -1), but it is no minimum."""
    solution = solve(lambda t, y: 2 * y, double(1.0), [0.0, 1.0], method="prox_euler", num_steps=1, throw=False)
    assert solution.status == Status.INNER_NOT_CONVERGED
    assert torch.isnan(solution.y[-1]).all()
    assert solution.last.y.item() == 1.0


def test_adaptive_steps_shrink_until_the_equations_can_be_solved():
    f, y0, _ = ring()
    solution = solve(f, y0, [0.0, 0.01], method="prox_euler", dt0=1e-2, max_iters=5, rtol=1e-2, atol=1e-2, fallback=None)
    assert solution.success
    assert solution.stats.rejected > 0


def test_a_rate_that_is_too_large_diverges_and_says_so():
    """Xia 2023 writes eta = 0.1 for this problem; 2 / L is 0.06."""
    f, y0, _ = ring(128, 1 / 127)
    solution = solve(f, y0, [0.0, 1.0], method="prox_euler", num_steps=2000, rate=0.1, fallback=None, throw=False)
    assert solution.status == Status.INNER_NOT_CONVERGED


@pytest.mark.parametrize("rate", ["cg", "line_search"])
@pytest.mark.parametrize("k", [2.2, 10.0])
def test_f_that_is_not_defined_where_a_linear_model_leads(rate, k):
    """Explicit Euler ends below 0, where f is NaN; so do Newton steps on y + k sqrt(y) / 2 = 1. The solution does not."""
    y = solve(lambda t, y: -k * torch.sqrt(y), double(1.0), [0.0, 0.5], method="prox_euler", num_steps=1, rate=rate).y[-1]
    assert y.item() == pytest.approx((math.sqrt(k * k / 16 + 1) - k / 4) ** 2, rel=1e-5)


@pytest.mark.parametrize("rate", ["cg", "line_search"])
def test_a_switch_that_newton_steps_run_past(rate):
    """z + 10 tanh(10 z) = 1: from z = 1, where the slope is 1, Newton's method runs away."""
    y = solve(lambda t, y: -torch.tanh(10 * y), double(1.0), [0.0, 10.0], method="prox_euler", num_steps=1, rate=rate).y[-1]
    torch.testing.assert_close(y + 10 * torch.tanh(10 * y), double(1.0), rtol=1e-5, atol=1e-6)


def test_nan_is_reported_as_such():
    with pytest.raises(NonFiniteError):
        solve(lambda t, y: torch.where(t > 0.5, torch.nan, -y), double(1.0), [0.0, 1.0], method="prox_euler", dt=0.1)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"inner": "fletcher_reevs"}, UnknownNameError, ["inner solver", "fletcher_reeves"]),
        ({"inner": 3}, ArgumentTypeError, ["inner", "int"]),
        ({"rate": "fast"}, ArgumentError, ["rate", "line_search", "fast"]),
        ({"rate": None}, ArgumentTypeError, ["rate", "NoneType"]),
        ({"rate": -1.0}, ArgumentError, ["rate", "-1"]),
        ({"lipschitz": -1.0}, ArgumentError, ["lipschitz", "-1"]),
        ({"refresh": 0}, ArgumentError, ["refresh", "0"]),
        ({"inner_tol": 0.0}, ArgumentError, ["inner_tol", "0"]),
        ({"max_iters": 0}, ArgumentError, ["max_iters", "0"]),
        ({"backward_tol": -1.0}, ArgumentError, ["backward_tol", "-1"]),
    ],
)
def test_bad_options(options, error, words):
    counter = Counter(cubic)
    with pytest.raises(error) as caught:
        solve(counter, double(1.0), [0.0, 1.0], method="prox_euler", dt=0.1, **options)
    assert all(word in str(caught.value) for word in words)
    assert counter.calls == 0


# --- single precision --------------------------------------------------------------------------------------------------------


@rates
@pytest.mark.parametrize("mode", ["joint", "samples"])
def test_single_precision_stops_at_rounding(rate, mode):
    """A tolerance far below what float32 can resolve is met as well as rounding allows, not refused."""
    f, y0, after = ring()
    state = y0.float() if mode == "joint" else y0.float().expand(2, -1)
    how = {} if mode == "joint" else {"batch_dim": 0}
    solution = solve(f, state, [0.0, 0.1], method="prox_euler", num_steps=100, rate=rate, rtol=1e-8, atol=1e-9, **how)
    y = solution.y[-1].double() if mode == "joint" else solution.y[-1, 1].double()
    assert solution.y.dtype == torch.float32
    assert (y - after(100, 0.001)).abs().max() < 3e-4
    assert solution.stats.nfe < 2500


# --- derivatives -------------------------------------------------------------------------------------------------------------


def stepped(f, y0, t, *args, **how):
    return solve(f, y0, t, method="prox_euler", num_steps=3, args=args, **how).y


@pytest.mark.parametrize("mode", MODES)
def test_first_and_second_derivatives(mode):
    y0 = {"joint": double(1.0, -0.4), "samples": torch.randn(2, 2), "groups": torch.randn(3, 1)}[mode]
    index = torch.tensor([0, 1, 0])
    how = {"joint": {}, "samples": {"batch_dim": 0}, "groups": {"batch_index": index}}[mode]
    y0 = y0.double().requires_grad_()
    t = double(0.0, 0.4, 0.7).requires_grad_()
    w = double(0.8).requires_grad_()

    def run(y0, t, w):
        def f(t, y, w):
            return wave(t, y, w, index if mode == "groups" else None)

        return solve(f, y0, t, method="prox_euler", args=(w,), num_steps=2, inner_tol=1e-3, rtol=1e-9, atol=1e-9, **how).y

    assert torch.autograd.gradcheck(run, (y0, t, w), atol=1e-6, rtol=1e-6)
    assert torch.autograd.gradgradcheck(lambda *x: run(*x).sin(), (y0, t, w), atol=1e-6, rtol=1e-5)


def test_derivative_of_a_captured_parameter_and_of_a_complex_state():
    layer = torch.nn.Linear(3, 3).double()
    y0 = torch.randn(3, dtype=torch.float64)

    def run(weight):
        return stepped(lambda t, y: torch.tanh(y @ weight.T), y0, [0.0, 1.0], inner_tol=1e-4)

    assert torch.autograd.gradcheck(run, layer.weight, atol=1e-6)
    z = torch.randn(2, dtype=torch.complex128, requires_grad=True)
    a = torch.randn((), dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z, a: stepped(lambda t, y: a * y - y * y.conj() * y, z, [0.0, 0.5], inner_tol=1e-4), (z, a), atol=1e-6
    )


def test_the_derivative_does_not_wait_for_the_inner_solver():
    """However loosely the steps are solved, the derivative is that of the equations at the solution found."""
    f, y0, _ = ring(32, 1 / 31)
    y0 = y0[:32].clone().requires_grad_()
    for inner_tol in (1.0, 1e-5):
        y = solve(f, y0, [0.0, 0.1], method="prox_euler", num_steps=10, rtol=1e-2, atol=1e-2, inner_tol=inner_tol).y[-1]
        (gradient,) = torch.autograd.grad(y[0], y0)
        eigenvalues = (2 * torch.cos(2 * math.pi * torch.arange(32) / 32) - 2) * 31**2
        row = torch.fft.ifft((1 - 0.01 * eigenvalues.double()) ** -10).real
        torch.testing.assert_close(gradient, row[(-torch.arange(32)) % 32], rtol=1e-6, atol=1e-8)


def test_the_value_is_the_same_with_and_without_gradients():
    y0 = torch.randn(4, dtype=torch.float64)
    with torch.no_grad():
        plain = solve(cubic, y0, [0.0, 1.0], method="prox_euler", rtol=1e-3, atol=1e-5)
    recorded = solve(cubic, y0.clone().requires_grad_(), [0.0, 1.0], method="prox_euler", rtol=1e-3, atol=1e-5)
    assert torch.equal(plain.y, recorded.y)
    assert recorded.stats.nfe == plain.stats.nfe + 2 * (recorded.stats.accepted + recorded.stats.rejected)


def test_gradients_stay_finite_where_a_sample_fails():
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def f(t, y, w):
        return -w * torch.sqrt(y)

    y0 = double(1.0, 4.0, 9.0).unsqueeze(1).requires_grad_()
    times = double(0.0, 1.0, 3.9)  # the first row ends at t = 2
    solution = solve(f, y0, times, method="prox_euler", batch_dim=0, args=(w,), dt=0.1, throw=False)
    assert solution.status[0] != 0
    assert solution.status[1:].eq(0).all()
    solution.y[-1, 1:].sum().backward()
    alone = solve(f, y0.detach()[1:], times, method="prox_euler", batch_dim=0, args=(w.detach().requires_grad_(),), dt=0.1)
    assert torch.isfinite(w.grad)
    assert torch.equal(alone.y, solution.y[:, 1:].detach())
    assert torch.isfinite(y0.grad[1:]).all()


def test_memory_of_a_recorded_step_does_not_grow_with_the_iterations():
    """Tensors that autograd saves, counted: two evaluations a step, however hard the step is to solve."""
    f, y0, _ = ring()
    w = torch.ones((), dtype=torch.float64, requires_grad=True)

    def saved(inner_tol):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            solution = solve(
                lambda t, y: w * f(t, y), y0, [0.0, 0.1], method="prox_euler", num_steps=4, inner_tol=inner_tol
            )
        return len(kept), solution.stats.inner_iterations

    (loose, few), (tight, many) = saved(1.0), saved(1e-6)
    assert loose == tight
    assert few < many


def test_recorded_steps_hold_no_reference_cycles():
    """What a solve has recorded goes when the solution does, not when the garbage collector comes by."""

    class Observed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(double(0.7))

        def forward(self, t, y):
            return -self.w * y**3

    gc.collect()
    gc.disable()
    try:
        model = Observed()
        alive = weakref.ref(model)
        y = solve(model, double(1.0, 2.0), [0.0, 1.0], method="prox_euler", num_steps=3).y[-1].sum()
        (first,) = torch.autograd.grad(y, model.w, create_graph=True)
        torch.autograd.grad(first.sum(), model.w)
        del model, y, first
        assert alive() is None
    finally:
        gc.enable()


def test_third_derivatives_are_refused():
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y = stepped(lambda t, y, w: -w * y**3, double(1.0), [0.0, 1.0], w)[-1].sum()
    (first,) = torch.autograd.grad(y, w, create_graph=True)
    with pytest.raises(UnsupportedError, match="twice"):
        torch.autograd.grad(first, w, create_graph=True)


@pytest.mark.parametrize("how", [{}, {"batch_dim": 0}])
def test_checkpoint_equals_backprop(how):
    layer = torch.nn.Linear(3, 3).double()
    y0 = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def gradients(adjoint):
        how.update(method="prox_euler", rtol=1e-3, atol=1e-5, adjoint=adjoint)
        y = solve(lambda t, y: torch.tanh(layer(y)) - y, y0, [0.0, 0.3, 1.0], **how).y
        return torch.autograd.grad(y.square().sum(), (y0, *layer.parameters()))

    for a, b in zip(gradients("backprop"), gradients("checkpoint"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# --- the parts ---------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_minimise_leaves_finished_samples_untouched():
    f, y0 = rows_with_different_needs()
    g = torch.full((5,), 0.1, dtype=torch.float64)
    problem, y = problem_of(f, y0, g, batch_dim=0)
    active = torch.tensor([True, True, False, True, True])
    memory = FR.remember(problem.layout, y)
    found = minimise(problem, FR, problem.evaluate(y), tol=1.0, max_iters=500, active=active, memory=memory)
    assert found.converged.all()
    assert torch.equal(found.z[2], y[2])
    assert found.iterations[2] == 0
    exact = problem.evaluate(found.z)
    assert (problem.norm(exact.r)[active] <= 1).all()


@torch.no_grad()
def test_the_residual_that_is_reported_was_evaluated():
    """A field whose Jacobian changes much: the recurrence alone would stop too early."""
    problem, y = problem_of(lambda t, y: -(y**5), torch.linspace(-3, 3, 50, dtype=torch.float64), 10.0)
    found = minimise(problem, FR, problem.evaluate(y), tol=1.0, max_iters=2000, memory=FR.remember(problem.layout, y))
    assert found.converged
    assert found.norm == problem.norm(problem.evaluate(found.z).r) <= 1


def doubted(monkeypatch, f, **how):
    """|r| / tol evaluated at the end of every step whose own was carried along, and not from within the tolerance."""
    found, ratios = solving.minimise, []

    def looked(problem, optimizer, start, **options):
        result = found(problem, optimizer, start, **options)
        if result.converged and not result.evaluated and problem.norm(start.r) > options["tol"]:
            calls = problem.calls
            ratios.append(problem.norm(problem.evaluate(result.z).r) / options["tol"])
            problem.calls = calls
        return result

    monkeypatch.setattr(solving, "minimise", looked)
    y0 = torch.exp(-50 * (torch.linspace(0, 1, 65, dtype=torch.float64)[:-1] - 0.5) ** 2)
    sol = solve(f, y0, [0.0, 1.0], rtol=1e-5, atol=1e-7, num_steps=400, **how)
    assert sol.success
    return ratios


def diffused(y):
    return 200 * (torch.roll(y, 1, -1) - 2 * y + torch.roll(y, -1, -1))


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"batch_dim": 0}], ids=["joint", "rows"])
def test_a_carried_residual_is_believed_for_some_steps_after_it_was_seen_to_be_right(how):
    """Rows: the others have not been seen, were seen too long ago, or were seen to be off."""
    f, y0, _ = ring()
    y0, g = (y0.expand(4, -1), torch.full((4,), 0.01, dtype=torch.float64)) if how else (y0, 0.01)
    problem, y = problem_of(f, y0, g, **how)
    near = minimise(problem, FR, problem.evaluate(y), tol=1e-3, max_iters=500, memory=FR.remember(problem.layout, y))
    z = near.z + 1e-7 * torch.sin(torch.arange(64))
    memory = near.memory
    if how:
        age = torch.tensor([0.0, 0.0, STEPS - 1, 0.0], dtype=torch.float64)
        memory = memory._replace(bend=torch.cat([memory.bend[:1], double(math.inf, 1e-9, 0.1)]), age=age)
    problem, _ = problem_of(f, y0, g, **how)
    found = minimise(problem, FR, problem.evaluate(z), tol=1.0, max_iters=500, memory=memory)
    assert (problem.norm(problem.evaluate(found.z).r) <= torch.ones(4 if how else ())).all()
    if not how:
        assert found.evaluated is False and found.memory.age == 1
        return
    assert found.evaluated.tolist() == [False, True, True, True]
    assert found.memory.age.tolist() == [1, 0, 0, 0] and (found.memory.bend < 1e-3).tolist() == [True, True, True, False]


@pytest.mark.parametrize("method", ["prox_euler", "prox_cn", "prox_bdf2", "prox_bdf4"])
def test_a_linear_field_is_not_evaluated_again_at_the_end_of_a_step(monkeypatch, method):
    ratios = doubted(monkeypatch, lambda t, y: diffused(y), method=method)
    assert len(ratios) > 30 and max(ratios) < 1 + 1e-6


@pytest.mark.parametrize("method", ["prox_euler", "prox_cn", "prox_bdf2", "prox_bdf4"])
@pytest.mark.parametrize("onset", [lambda y: -5000 * y**3, lambda y: 20 * torch.sin(100 * y)], ids=["cubic", "sine"])
def test_a_nonlinearity_that_sets_in_on_the_way_is_not_believed_to_be_absent(monkeypatch, method, onset):
    """A linear field up to t = 0.3, of which the optimiser remembers that its recurrence is right."""
    ratios = doubted(monkeypatch, lambda t, y: diffused(y) + (onset(y) if t > 0.3 else 0.0), method=method)
    assert len(ratios) > 10 and max(ratios) < 1 + 1e-6


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"batch_dim": 0}, {"batch_index": torch.tensor([0, 0, 1])}], ids=list(MODES))
def test_spectral_radius(how):
    f, y0, _ = ring()
    y = y0 if not how else y0.expand(3, -1)
    g = 0.1 if not how else torch.full((2 if "batch_index" in how else 3,), -0.1, dtype=torch.float64)
    problem, y = problem_of(f, y, g, **how)
    running = True if not how else torch.ones_like(g, dtype=torch.bool)
    rho, memory = spectral_radius(problem, problem.evaluate(y), running, PowerMemory.fresh(problem.layout, y))
    assert ((torch.as_tensor(rho) / (4 * 63**2) - 1.05).abs() < 0.2).all()
    before = problem.calls
    spectral_radius(problem, problem.evaluate(y), running, memory)
    assert problem.calls == before + 1


@torch.no_grad()
def test_the_difference_step_survives_zero_states_and_directions():
    problem, y = problem_of(lambda t, y: 1 - y, torch.zeros(3, dtype=torch.float64), 0.5)
    point = problem.evaluate(y)
    v = double(1e-3, 0.0, 2.0)
    torch.testing.assert_close(problem.jv(point, v), 1.5 * v, rtol=1e-7, atol=1e-9)
    assert torch.equal(problem.jv(point, 0 * v), 0 * v)


def test_value_of_the_proximal_problem():
    layout = Layout(double(0.0, 0.0))
    norm = ErrorNorm(layout, 1e-6, 1e-9)
    a = double(1.0, 2.0)
    energy = lambda t, y: y.pow(4).sum() / 4
    problem = ProximalProblem(Field(lambda t, y: -(y**3), layout), torch.zeros(()), a, 0.5, norm, norm.scale(a), energy)
    z = double(0.3, -0.7).requires_grad_()
    value = (z - a).square().sum() / 2 + 0.5 * energy(0.0, z)
    (gradient,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(problem.evaluate(z.detach()).r, gradient)
    assert float(problem.value(z.detach())) == pytest.approx(float(value.detach()))


def test_methods_are_values():
    assert ProxEuler() == ProxEuler()
    assert ProxEuler(inner_tol=0.5) != ProxEuler()
