"""Method "auto": when it changes between explicit and implicit steps, and that nothing else notices."""

from __future__ import annotations

import functools
import statistics
import warnings

import pytest
import torch
from scipy.integrate import solve_ivp

from benchmarks import stiff_problems
from solvers import Event, Jump, StiffnessWarning, solve

D = torch.float64


def kaps(t, y, stiffness=1e3):
    """Kaps' problem (HW IV.12): the solution from (1, 1) is (exp(-2t), exp(-t)), whatever the stiffness."""
    a, b = y.unbind(-1)
    return torch.stack([-(stiffness + 2) * a + stiffness * b * b, a - b * (1 + b)], -1)


def kaps_exact(t):
    t = torch.as_tensor(t, dtype=D)
    return torch.stack([torch.exp(-2 * t), torch.exp(-t)], -1)


def lorenz(t, y):
    a, b, c = y.unbind(-1)
    return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)


def predator(t, y):
    a, b = y.unbind(-1)
    return torch.stack([1.5 * a - a * b, -3 * b + a * b], -1)


def van_der_pol(t, y, mu):
    a, b = y.unbind(-1)
    return torch.stack([b, mu * ((1 - a * a) * b) - a], -1)


def swinging(decay, swing, scale=1.0):
    """x'' + 2 decay x' + (decay**2 + swing**2) (x - sin t) = 0 with x' in units of ``scale``: far from normal unless that is
    near the frequency."""
    square = decay * decay + swing * swing

    def f(t, y):
        x, v = y.unbind(-1)
        return torch.stack([scale * v, square / scale * (torch.sin(t) - x) - 2 * decay * v], -1)

    return f


def spiral(t, y):
    """A slow solution, (sin t, cos 2t), and modes -500 +- 2000 i beside it."""
    target = torch.stack([torch.sin(t), torch.cos(2 * t)], -1)
    off, (a, b) = torch.stack([torch.cos(t), -2 * torch.sin(2 * t)], -1), (y - target).unbind(-1)
    return off + torch.stack([-500 * a + 2000 * b, -2000 * a - 500 * b], -1)


def counted(f):
    def g(t, y, *args):
        g.calls += 1
        return f(t, y, *args)

    g.calls = 0
    return g


ONES = torch.ones(2, dtype=D)
MILD = {
    "lorenz": (lorenz, [1.0, 1.0, 1.0], 10.0),
    "lotka-volterra": (predator, [10.0, 5.0], 10.0),
    "van der pol 5": (lambda t, y: van_der_pol(t, y, 5.0), [2.0, 0.0], 30.0),
}
MODES = {
    "joint": (lambda y: y, {}),
    "samples": (lambda y: torch.stack([y, 1.2 * y]), {"batch_dim": 0}),
    "groups": (
        lambda y: torch.stack([y, 1.1 * y, 1.2 * y]),
        {"batch_index": torch.tensor([0, 0, 1])},
    ),
}


# --- when it changes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-7])
def test_a_stiff_problem_is_found_and_solved_by_few_evaluations(tol):
    f = counted(kaps)
    s = solve(f, ONES, [0.0, 1.0, 50.0], method="auto", rtol=tol, atol=1e-3 * tol)
    assert s.stats.switches == 1
    assert set(s.stats.nfe_by_method) == {"dopri5", "prox_bdf"}
    assert s.stats.nfe == f.calls
    # Two for the first step size; the Jacobian's belong to the steps.
    assert sum(s.stats.nfe_by_method.values()) == f.calls - 2
    assert f.calls < 1200  # dopri5 alone: 90,000
    assert (s.y[1] - kaps_exact(1.0)).abs().max() < 20 * tol


def test_a_stiff_mode_of_small_components_is_seen_at_tight_tolerances():
    problem = stiff_problems.hires().at(1e-7)
    t = torch.tensor([0.0, 321.8122], dtype=D)
    s = solve(problem.field, problem.y0, t, method="auto", rtol=problem.rtol, atol=problem.atol)
    # In the Euclidean norm, which larger components rule, it is not seen before 3500.
    assert s.stats.nfe_by_method["dopri5"] < 1200


@pytest.mark.parametrize("mode", ["joint", "samples", "groups"])
def test_stiff_modes_that_swing_are_seen(mode):
    make, how = MODES[mode]
    group = torch.tensor([0, 0, 1])

    def f(t, y):
        return spiral(t if mode == "joint" else (t if mode == "samples" else t[group]), y)

    s = solve(f, make(torch.tensor([0.0, 1.1], dtype=D)), [0.0, 0.5], method="auto", **how)
    assert (torch.as_tensor(s.stats.switches) == 1).all()
    assert s.stats.nfe_by_method["dopri5"] < 1200  # dopri5 alone: 2,300, and 4,650 for each unit of time
    exact = torch.tensor([0.5, 1.0], dtype=D)
    assert (s.y[-1] - torch.stack([exact[0].sin(), exact[1].cos()])).abs().max() < 1e-6


@pytest.mark.parametrize("scale", [1.0, 50.0, 2000.0])
def test_they_are_seen_however_far_from_normal_the_jacobian_is(scale):
    s = solve(swinging(500.0, 2000.0, scale), torch.tensor([-2.35e-4, 1 / scale], dtype=D), [0.0, 0.3], method="auto", rtol=1e-4)
    assert s.stats.switches == 1
    assert s.stats.nfe_by_method["dopri5"] < 1200


def test_they_are_seen_in_complex_numbers_and_backwards_in_time():
    def f(t, y, way):
        return way * (-500 + 2000j) * (y - torch.sin(t)) + torch.cos(t)

    for way in (1.0, -1.0):
        s = solve(f, torch.ones(1, dtype=torch.complex128), [0.0, way], method="auto", args=(way,))
        assert s.stats.switches == 1
        assert (s.y[-1] - torch.sin(torch.tensor(way))).abs().max() < 1e-6


@pytest.mark.parametrize("tol", [1e-3, 1e-6])
@pytest.mark.parametrize("decay", [0.0, 1.0, 10.0])
def test_a_mode_that_hardly_decays_is_left_to_implicit_steps_while_it_is_small(decay, tol):
    """From a solution without it, dopri5 raises it to where its error is that of the tolerance, takes 7,700 to 11,000 calls,
    and ends with errors of 2e-5 to .2. Measured: 370 to 3,300, and 3e-8."""
    a = torch.tensor([[-decay, 1000.0], [-1000.0, -decay]], dtype=D)

    def f(t, y):
        s, c = torch.sin(t), torch.cos(t)
        return a @ (y - torch.stack([s, c])) + torch.stack([c, -s])

    end = torch.tensor(2.0, dtype=D)
    s = solve(f, torch.tensor([0.0, 1.0], dtype=D), [0.0, 2.0], method="auto", rtol=tol, atol=1e-3 * tol)
    assert s.stats.switches == 1 and s.stats.nfe < 4000
    assert (s.y[-1] - torch.stack([end.sin(), end.cos()])).abs().max() < 1e-6


@pytest.mark.parametrize("tol", [1e-3, 1e-5])
@pytest.mark.parametrize(("decay", "scale"), [(1.0, 1.0), (1.0, 1000.0), (10.0, 1000.0), (0.0, 1000.0)])
def test_an_oscillation_that_lasts_stays_explicit(decay, scale, tol):
    f = swinging(decay, 1000.0, scale)
    y0 = torch.tensor([1.0, 0.0], dtype=D)
    one, other = (solve(f, y0, [0.0, 0.04], method=m, rtol=tol, atol=1e-3 * tol) for m in ("auto", "dopri5"))
    assert one.stats.switches == 0
    assert torch.equal(one.y, other.y)


@pytest.mark.parametrize("tol", [1e-5, 1e-7])
@pytest.mark.parametrize("name", MILD)
def test_a_mild_problem_stays_explicit_and_costs_what_dopri5_does(name, tol):
    f, y0, end = MILD[name]
    y0 = torch.tensor(y0, dtype=D)
    one, other = (solve(f, y0, [0.0, end / 4], method=m, rtol=tol, atol=1e-3 * tol) for m in ("auto", "dopri5"))
    assert one.stats.switches == 0
    assert one.stats.nfe == other.stats.nfe
    assert torch.equal(one.y, other.y)


@pytest.mark.parametrize("mode", ["joint", "samples", pytest.param("groups", marks=pytest.mark.slow)])
def test_it_returns_when_the_stiffness_is_gone(mode):
    group = torch.tensor([0, 0, 1])

    def f(t, y):
        t = t if t.dim() == 0 else (t if mode == "samples" else t[group]).unsqueeze(-1)
        return torch.where(t < 1.0, -1e4 * (y - 1.0), 1.0 - y + 20 * torch.cos(20 * t))

    def swing(t):
        return 20 * (torch.cos(20 * t) + 20 * torch.sin(20 * t)) / 401

    make, how = MODES[mode]
    s = solve(f, make(torch.full((2,), 2.0, dtype=D)), [0.0, 1.0, 10.0], method="auto", rtol=1e-5, jumps=[Jump(1.0)], **how)
    assert (torch.as_tensor(s.stats.switches) == 2).all()
    one, ten = torch.tensor([1.0, 10.0], dtype=D)
    exact = 1 + swing(ten) - swing(one) * torch.exp(one - ten)
    assert (s.y[2] - exact).abs().max() < 2e-4


def test_after_a_jump_a_stiff_problem_is_still_known_to_be_stiff():
    jumps = [Jump(t, lambda t, y: y + 0.1) for t in (1.0, 2.0, 3.0)]
    s = solve(kaps, ONES, [0.0, 4.0], method="auto", jumps=jumps)
    alone = solve(kaps, ONES, [0.0, 4.0], method="esdirk547", jumps=jumps)
    assert s.stats.switches == 1
    # One explicit attempt at each jump.
    assert s.stats.nfe_by_method["dopri5"] < 400
    assert (s.y[-1] - alone.y[-1]).abs().max() < 1e-5


def test_the_warning_of_stiffness_names_it():
    with pytest.warns(StiffnessWarning, match="method='auto'"):
        solve(kaps, ONES, [0.0, 3.0], method="bosh3", rtol=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(kaps, ONES, [0.0, 3.0], method="auto", rtol=1e-3)


def test_the_warning_of_stiffness_sees_modes_that_swing():
    with pytest.warns(StiffnessWarning, match="method='auto'"):
        solve(spiral, torch.tensor([0.0, 1.0], dtype=D), [0.0, 1.5], method="dopri5", rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(swinging(1.0, 1000.0), torch.tensor([1.0, 0.0], dtype=D), [0.0, 0.9], method="dopri5", rtol=1e-4)


# --- batches ---------------------------------------------------------------------------------------------------------

MUS = torch.tensor([1.0, 3.0, 200.0, 1000.0], dtype=D)


def oscillators(t, y, mu):
    return van_der_pol(t, y, mu)


def test_each_sample_changes_by_itself_and_gives_the_bits_it_gives_alone():
    y0 = torch.tensor([[2.0, 0.0]], dtype=D).expand(4, 2).clone()
    both = solve(oscillators, y0, [0.0, 3.0, 30.0], method="auto", batch_dim=0, args=(MUS,), rtol=1e-4, atol=1e-7)
    assert both.stats.switches.tolist()[:2] == [0, 0]
    assert (both.stats.switches[2:] >= 1).all()
    for i in range(4):
        alone = solve(
            oscillators, y0[i : i + 1], [0.0, 3.0, 30.0], method="auto", batch_dim=0, args=(MUS[i : i + 1],), rtol=1e-4, atol=1e-7
        )
        assert torch.equal(alone.y[:, 0], both.y[:, i])
        assert alone.stats.accepted[0] == both.stats.accepted[i]


def test_a_diverging_sample_leaves_the_others_bit_for_bit():
    def f(t, y, bad):
        return kaps(t, y) + bad.unsqueeze(-1) * 1e3 * y * y * y

    y0 = torch.stack([ONES, 1.3 * ONES, 0.7 * ONES])
    solutions = [
        solve(f, y0, [0.0, 5.0], method="auto", batch_dim=0, args=(torch.tensor(bad, dtype=D),), rtol=1e-5, throw=False)
        for bad in ([0.0, 0.0, 0.0], [0.0, 1.0, 0.0])
    ]
    assert solutions[1].status.tolist()[0::2] == [0, 0]
    assert solutions[1].status[1] >= 10
    assert torch.equal(solutions[0].y[:, 0::2], solutions[1].y[:, 0::2])


def test_groups_of_unequal_size_give_what_each_gives_alone():
    sizes, mus = [1, 3, 2], [5.0, 100.0, 500.0]
    index = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    mu = torch.tensor(mus, dtype=D)[index]
    y0 = torch.tensor([[2.0, 0.0]], dtype=D) * torch.linspace(0.9, 1.1, 6, dtype=D).unsqueeze(1)
    both = solve(oscillators, y0, [0.0, 20.0], method="auto", batch_index=index, args=(mu,), rtol=1e-5, atol=1e-8)
    for group in range(3):
        rows = index == group
        alone = solve(oscillators, y0[rows], [0.0, 20.0], method="auto", args=(mu[rows],), rtol=1e-5, atol=1e-8)
        assert (alone.y[-1] - both.y[-1][rows]).abs().max() < 1e-4


def spoiled(t, y, mu, bad):
    return van_der_pol(t, y, mu) + bad.unsqueeze(-1) * 1e3 * y**3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prox_bdf", "auto"])
def test_512_oscillators_in_one_call_each_to_its_own_tolerance(method):
    mu, rtol = torch.logspace(0, 3, 512, dtype=D), torch.logspace(-4, -6, 512, dtype=D).unsqueeze(1)
    y0, bad = torch.tensor([2.0, 0.0], dtype=D).repeat(512, 1), torch.zeros(512, dtype=D)
    t, how = [0.0, 20.0], {"method": method, "batch_dim": 0}
    one = solve(spoiled, y0, t, rtol=rtol, atol=1e-3 * rtol, args=(mu, bad), **how)
    for i in (0, 100, 250, 400, 511):
        mine = slice(i, i + 1)
        args = (mu[mine], bad[mine])
        alone = solve(spoiled, y0[mine], t, rtol=rtol[mine], atol=1e-3 * rtol[mine], args=args, **how)
        assert torch.equal(alone.y[:, 0], one.y[:, i])
        f = functools.partial(scipy_oscillator, mu=float(mu[i]))
        reference = torch.from_numpy(solve_ivp(f, (0.0, 20.0), [2.0, 0.0], "Radau", rtol=1e-9, atol=1e-12).y[:, -1])
        assert ((one.y[-1, i] - reference).abs() / (reference.abs() + 1e-3)).max() < 1000 * rtol[i]
    bad[200] = 1.0
    other = solve(spoiled, y0, t, rtol=rtol, atol=1e-3 * rtol, args=(mu, bad), throw=False, **how)
    rest = bad == 0
    assert other.status[200] >= 10
    assert torch.equal(other.y[:, rest], one.y[:, rest])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["prox_bdf", "auto"])
def test_errors_of_oscillators_are_those_of_other_codes(method):
    """A relaxation cycle turns errors into errors of phase: at worst 114 rtol (``auto`` 144), scipy's BDF 121, LSODA 139."""
    which = torch.arange(3, 512, 26)
    mu, rtol = torch.logspace(0, 3, 512, dtype=D)[which], torch.logspace(-4, -6, 512, dtype=D)[which]
    y0 = torch.tensor([2.0, 0.0], dtype=D).repeat(len(mu), 1)
    own = rtol.unsqueeze(1)
    s = solve(oscillators, y0, [0.0, 20.0], method=method, batch_dim=0, args=(mu,), rtol=own, atol=1e-3 * own)
    ours, theirs = [], []
    for i, (stiff, tol) in enumerate(zip(mu.tolist(), rtol.tolist(), strict=True)):
        run = functools.partial(solve_ivp, functools.partial(scipy_oscillator, mu=stiff), (0.0, 20.0), [2.0, 0.0])
        exact = run("Radau", rtol=1e-9, atol=1e-12).y[:, -1]
        found = s.y[-1, i].numpy(), run("BDF", rtol=tol, atol=1e-3 * tol).y[:, -1]
        errors = [(abs(y - exact) / (abs(exact) + 1e-3)).max() / tol for y in found]
        ours.append(errors[0])
        theirs.append(errors[1])
    assert max(ours) < 2 * max(theirs)
    assert statistics.median(ours) < 4 * statistics.median(theirs)


def scipy_oscillator(t, y, mu):
    return [y[1], mu * (1 - y[0] * y[0]) * y[1] - y[0]]


# --- across a change -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["joint", "samples", pytest.param("groups", marks=pytest.mark.slow)])
def test_dense_output_goes_on_across_a_change(mode):
    make, how = MODES[mode]
    y0 = make(ONES)
    s = solve(kaps, y0, [0.0, 4.0], method="auto", dense=True, **how)
    assert (torch.as_tensor(s.stats.switches) >= 1).all()
    t = torch.linspace(0.0, 4.0, 201, dtype=D)
    first = s.dense(t).reshape(201, -1, 2)[:, 0]
    if mode != "groups":
        assert (first - kaps_exact(t)).abs().max() < 2e-5
    else:
        assert (first - solve(kaps, y0[0], t, method="esdirk547").y).abs().max() < 2e-5
    assert torch.allclose(s.dense(4.0), s.y[-1], rtol=1e-12, atol=1e-14)
    slope = s.dense(t[5:], derivative=1).reshape(196, -1, 2)[:, 0]
    assert (slope[:, 1] + first[5:, 1]).abs().max() < 2e-3 or mode == "groups"


@pytest.mark.parametrize("mode", ["joint", "samples"])
def test_events_on_both_sides_of_a_change(mode):
    make, how = MODES[mode]
    levels = (0.99, 0.1)
    events = [Event(lambda t, y, level=level: y[..., 1] - level, terminal=False) for level in levels]
    s = solve(kaps, make(ONES), [0.0, 3.0], method="auto", events=events, **how)
    for event, level in zip(s.events, levels, strict=True):
        assert abs(event.t.reshape(-1)[0] + torch.log(torch.tensor(level))) < 1e-5


# --- gradients -------------------------------------------------------------------------------------------------------


def run(adjoint, mode, scale, stiffness, end, **more):
    make, how = MODES[mode]
    y0 = make(ONES) * scale
    times = torch.stack([0.0 * end, 0.4 * end, end])
    return solve(kaps, y0, times, method="auto", adjoint=adjoint, args=(stiffness,), rtol=1e-6, **how, **more)


def leaves():
    return [torch.tensor(x, dtype=D, requires_grad=True) for x in (1.1, 800.0, 2.0)]


@pytest.mark.parametrize("mode", ["joint", *(pytest.param(m, marks=pytest.mark.slow) for m in ("samples", "groups"))])
def test_backprop_and_checkpoint_agree_to_rounding(mode):
    found = []
    for adjoint, more in (("backprop", {}), ("checkpoint", {}), ("checkpoint", {"checkpoints": 5})):
        x = leaves()
        s = run(adjoint, mode, *x, **more)
        assert (torch.as_tensor(s.stats.switches) == 1).all()
        found.append(torch.autograd.grad((s.y[1:] * torch.linspace(1, 2, s.y[1:].numel()).view_as(s.y[1:])).sum(), x))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert torch.allclose(a, b, rtol=1e-7, atol=1e-13)


@pytest.mark.parametrize("mode", ["joint", "samples"])
def test_the_gradient_is_that_of_the_solution(mode):
    make, how = MODES[mode]
    k = 1000.0
    a, b, end = (torch.tensor(x, dtype=D, requires_grad=True) for x in (0.7, 1.3, 2.0))

    def f(t, y, a):
        return torch.stack([-k * (y[..., 0] - a * y[..., 1]), -y[..., 1]], -1)

    y0 = torch.stack([b, b])
    s = solve(f, make(y0), torch.stack([0 * end, end]), method="auto", args=(a,), rtol=1e-7, **how)
    assert (torch.as_tensor(s.stats.switches) == 1).all()
    exact = torch.stack([k * a / (k - 1) * b * torch.exp(-end), b * torch.exp(-end)])
    for i in (0, 1):
        value = s.y[-1].reshape(-1, 2)[0, i]
        found, known = (
            torch.autograd.grad(x, (a, b, end), retain_graph=True, materialize_grads=True, allow_unused=True)
            for x in (value, exact[i])
        )
        assert (torch.stack(found) - torch.stack(known)).abs().max() < 1e-5
