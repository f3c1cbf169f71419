"""What goes wrong in a solve is said, stays where it happened, and leaves everything that was reached."""

import io
import math
import sys
import warnings

import pytest
import torch

import solvers
from solvers import (
    METHODS,
    Jump,
    MaxStepsError,
    NonFiniteError,
    RoundingWarning,
    SolveError,
    Status,
    StepUnderflowError,
    StiffnessWarning,
    solve,
)

NAN = math.nan
MODES = {
    "joint": lambda y: (y, {}),
    "samples": lambda y: (y.expand(3, *y.shape).clone(), dict(batch_dim=0)),
    "groups": lambda y: (y.expand(3, *y.shape).clone(), dict(batch_index=torch.tensor([0, 0, 1]))),
}
modes = pytest.mark.parametrize("mode", MODES)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def batch(*values):
    return double(*values).unsqueeze(1)


def root(t, y):
    """Ends at t = 2, where y = 0; below, f is NaN."""
    return -torch.sqrt(y)


def square(t, y):
    """Blows up at t = 1 / y0."""
    return y * y


# --- a trial stage that is not finite --------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize(
    ("method", "rtol"), [("dopri5", 1e-3), ("dopri5", 1e-6), ("tsit5", 1e-3), ("dopri8", 1e-3), ("bosh3", 1e-6)]
)
def test_nan_at_a_trial_stage_is_a_rejection(mode, method, rtol):
    """y = (1 - t/2)^2: near the end, steps reach below y = 0, where f is NaN."""
    seen = []

    def f(t, y):
        dy = root(t, y)
        seen.append(bool(torch.isnan(dy).any()))
        return dy

    y0, how = MODES[mode](double(1.0))
    solution = solve(f, y0, [0.0, 1.0, 1.999], method=method, rtol=rtol, atol=1e-6, **how)
    assert any(seen), "the test wants a NaN on the way"
    assert solution.success
    assert (solution.status == Status.SUCCESS).all()
    assert torch.isfinite(solution.y).all()
    torch.testing.assert_close(solution.y[1], torch.full_like(y0, 0.25), rtol=1e-2, atol=0)
    torch.testing.assert_close(solution.y[2], torch.full_like(y0, 2.5e-7), rtol=0, atol=1e-4)


def test_nan_at_the_euler_step_of_the_first_step_size_recovers():
    """The search for the first dt steps to where f is NaN, and must fall back to less."""
    solution = solve(lambda t, y: torch.where(t > 1e-7, torch.nan, -y) if t < 1e-6 else -y, double(1.0), [0.0, 1e-8])
    assert solution.success


@pytest.mark.parametrize("loss", [lambda y: y[-1].sum(), lambda y: y.square().sum()], ids=["last", "all"])
def test_gradients_of_shared_parameters_stay_finite_when_one_row_meets_nan(loss):
    """The gradient of the batch is the sum of the gradients of the rows alone, NaN trials or not."""
    times = [0.0, 1.0, 1.999]
    trials = []

    def f(t, y, w):
        dy = -w * torch.sqrt(y)
        trials.append(bool(torch.isnan(dy.detach()).any()))
        return dy

    def gradient(y0, **how):
        w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        y0 = y0.clone().requires_grad_()
        y = solve(f, y0, times, args=(w,), rtol=1e-3, atol=1e-6, **how).y
        return torch.autograd.grad(loss(y), (w, y0))

    rows = batch(1.0, 4.0, 9.0)
    w, y0 = gradient(rows, batch_dim=0)
    assert any(trials), "the test wants a NaN on the way"
    assert torch.isfinite(w)
    assert torch.isfinite(y0).all()
    alone = [gradient(row) for row in rows]
    torch.testing.assert_close(w, sum(g for g, _ in alone), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(y0, torch.stack([g for _, g in alone]), rtol=1e-9, atol=1e-12)


# --- one sample fails, the others do not notice ----------------------------------------------------------------------

BAD = {
    "blows up": (1.1, Status.STEP_UNDERFLOW, Status.NON_FINITE),
    "undefined": (NAN, Status.NON_FINITE),
    "infinite": (math.inf, Status.NON_FINITE),
}
TIMES = torch.linspace(0.0, 2.0, 9, dtype=torch.float64)
"""No output falls on the time of a blow-up in these tests."""


def harmless(values, place, value):
    return [value if i == place else other for i, other in enumerate(values)]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dop853"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_a_failing_sample_leaves_the_rest_bit_identical(bad, place, method, grad):
    value, *statuses = BAD[bad]
    good = [0.1, -1.0, 0.2, -3.0, 0.4]
    how = dict(batch_dim=0, method=method, throw=False, rtol=1e-3, atol=1e-6)
    with torch.set_grad_enabled(grad):
        y0 = batch(*harmless(good, place, value)).requires_grad_(grad)
        broken = solve(square, y0, TIMES, **how)
        whole = solve(square, batch(*good).requires_grad_(grad), TIMES, **how)
    rest = torch.arange(5) != place
    assert broken.status[place] in statuses
    assert (broken.status[rest] == Status.SUCCESS).all()
    assert not broken.success
    assert whole.success
    assert torch.equal(broken.y[:, rest], whole.y[:, rest])
    assert torch.equal(broken.last.t[rest], whole.last.t[rest])
    names = ["accepted", "rejected", "forced"]
    if method != "dop853":  # whose outputs cost evaluations, in which all samples take part
        names.append("nfe_per_sample")
    for name in names:
        assert torch.equal(getattr(broken.stats, name)[rest], getattr(whole.stats, name)[rest]), name


def test_what_was_not_reached_is_nan_and_what_was_reached_is_not():
    y0 = batch(1.1, 0.25, 2.2)
    solution = solve(square, y0, TIMES, batch_dim=0, throw=False)
    reached = TIMES.unsqueeze(1) < 1 / y0.squeeze(1)
    assert torch.equal(torch.isfinite(solution.y.squeeze(2)), reached)
    exact = y0.squeeze(1) / (1 - y0.squeeze(1) * TIMES.unsqueeze(1))
    torch.testing.assert_close(solution.y.squeeze(2)[reached], exact[reached], rtol=1e-4, atol=0)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_what_a_joint_solve_did_not_reach_is_nan(grad):
    with torch.set_grad_enabled(grad):
        solution = solve(square, double(1.1, 0.5).requires_grad_(grad), TIMES, throw=False)
    reached = TIMES < 1 / 1.1
    assert solution.y.shape == (9, 2)
    assert torch.isfinite(solution.y[reached]).all()
    assert torch.isnan(solution.y[~reached]).all()


@pytest.mark.parametrize("save", ["final", "steps", lambda t, y: {"twice": 2 * y}])
@modes
def test_a_failed_solve_returns_what_every_kind_of_save_has(save, mode):
    y0, how = MODES[mode](double(1.0))
    solution = solve(square, y0, TIMES, save=save, throw=False, **how)
    assert not solution.success
    y = solution.y["twice"] if callable(save) else solution.y
    if save == "final":
        torch.testing.assert_close(y[0], solution.last.y)
    elif save == "steps":
        assert torch.isfinite(y).all()
        assert torch.isfinite(solution.t).all()
    else:
        assert torch.isfinite(y[:4]).all()
        assert torch.isnan(y[5:]).all()


@pytest.mark.parametrize("how", [dict(batch_dim=0), dict(batch_index=torch.arange(4))], ids=["samples", "groups"])
@pytest.mark.parametrize("adjoint", ["backprop", "checkpoint"])
@pytest.mark.parametrize("start", [NAN, -1.0, math.inf, 1.0])
def test_a_row_without_a_solution_leaves_the_gradient_of_the_others_alone(start, adjoint, how):
    """Not a number from the start, outside the domain of f, and leaving it on the way."""

    def gradient(y0, **how):
        w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        y0 = y0.clone().requires_grad_()
        solution = solve(lambda t, y: -w * torch.sqrt(y), y0, [0.0, 0.5, 2.5], throw=False, adjoint=adjoint, **how)
        arrived = solution.status == Status.SUCCESS
        return solution, *torch.autograd.grad(solution.y[:, arrived].sum(), (w, y0))

    rows = batch(9.0, start, 16.0, 25.0)
    solution, w, y0 = gradient(rows, **how)
    assert (solution.status >= 10).tolist() == [False, True, False, False]
    torch.testing.assert_close(solution.y[0], rows, equal_nan=True)
    if start != 1.0:
        torch.testing.assert_close(solution.last.y[1], rows[1], equal_nan=True)
    _, w_rest, y0_rest = gradient(rows[[0, 2, 3]], batch_dim=0)
    torch.testing.assert_close(w, w_rest)
    torch.testing.assert_close(y0[[0, 2, 3]], y0_rest)
    assert y0[1] == 0


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_gradient_through_the_rows_that_arrived_is_finite(method):
    """Whoever drops the failed rows from the loss gets the gradient of a solve without them."""

    def gradient(y0):
        w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        how = dict(dt=0.05) if method == "rk4" else {}
        solution = solve(
            lambda t, y: w * y**4, y0, [0.0, 0.5, 2.0], batch_dim=0, throw=False, method=method, max_steps=2000, **how
        )
        arrived = solution.status == Status.SUCCESS
        (g,) = torch.autograd.grad(solution.y[:, arrived].sum(), w)
        return g, arrived

    g, arrived = gradient(batch(0.1, 5.0, 0.3))
    assert arrived.tolist() == [True, False, True]
    torch.testing.assert_close(g, gradient(batch(0.1, 0.3))[0])


# --- running out of steps --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 7, 50])
@modes
def test_max_steps_bounds_the_attempts(mode, limit):
    y0, how = MODES[mode](double(1.0))
    with pytest.raises(MaxStepsError, match=f"max_steps.*now {limit}") as caught:
        solve(square, y0, [0.0, 0.99999], rtol=1e-10, atol=1e-12, max_steps=limit, **how)
    solution = caught.value.solution
    tried = torch.as_tensor(solution.stats.accepted + solution.stats.rejected)
    assert (tried == limit).all()
    assert (solution.status == Status.MAX_STEPS).all()
    assert torch.isnan(solution.y[1]).all()
    assert torch.isfinite(solution.last.y).all()
    assert (torch.as_tensor(solution.last.t) < 0.99999).all()


def test_max_steps_counts_the_whole_solve_not_an_output_interval():
    with pytest.raises(MaxStepsError) as caught:
        solve(lambda t, y: -y, double(1.0), torch.linspace(0, 10, 101), max_steps=12, dt_max=0.1)
    assert caught.value.solution.stats.accepted == 12


def test_exactly_as_many_steps_as_allowed_are_enough():
    needed = solve(lambda t, y: -y, double(1.0), [0.0, 5.0]).stats
    assert solve(lambda t, y: -y, double(1.0), [0.0, 5.0], max_steps=needed.accepted + needed.rejected).success


def message(f, y0, t1, **how):
    with pytest.raises(MaxStepsError) as caught:
        solve(f, y0, [0.0, t1], max_steps=100, **how)
    return str(caught.value)


def stiff(t, y):
    """A slow decay, and one that is over at once."""
    slow, fast = y.unbind(-1)
    return torch.stack([-slow, 1e4 * (slow - fast)], -1)


NOT_STIFF = {
    "swing": (lambda t, y: torch.stack([y[..., 1], -y[..., 0]], -1), 1e4),
    "growth": (lambda t, y: y, 600.0),
    "chaos": (lambda t, y: torch.stack([y[..., 1], torch.sin(y[..., 0]) * y[..., 1]], -1), 1e4),
    "decay": (lambda t, y: -y, 100.0),
    "blow-up": (square, 10.0),
}


@modes
@pytest.mark.parametrize("end", [1.0, -1.0])
@pytest.mark.parametrize("method", ["adaptive_heun", "bosh3", "dopri5", "tsit5", "dopri8", "dop853"])
def test_the_message_of_a_stiff_problem_names_a_method_for_it(mode, method, end):
    y0, how = MODES[mode](double(1.0, 1.0))
    text = message(lambda t, y: end * stiff(t, y), y0, end, method=method, rtol=1e-4, **how)
    assert "stability" in text
    names = [name for name in METHODS if METHODS[name].implicit]
    if names:
        assert any(f"method={name!r}" in text for name in names)
    else:
        assert "method=None" not in text


@modes
@pytest.mark.parametrize("method", ["adaptive_heun", "bosh3", "dopri5", "dop853"])
@pytest.mark.parametrize("rtol", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("problem", NOT_STIFF)
def test_the_message_of_another_problem_does_not(mode, problem, method, rtol):
    f, end = NOT_STIFF[problem]
    y0, how = MODES[mode](double(1.0, 0.5))
    solution = solve(f, y0, [0.0, end], method=method, rtol=rtol, atol=1e-3 * rtol, max_steps=5, throw=False, **how)
    assert not solution.success
    assert "stability" not in solution.message


@modes
def test_messages_name_time_step_work_and_samples(mode):
    y0, how = MODES[mode](double(1.0))
    with pytest.raises(StepUnderflowError) as caught:
        solve(square, y0, [0.0, 2.0], **how)
    text = str(caught.value)
    assert all(word in text for word in ("t = 1", "dt = ", "nfe = "))
    assert caught.value.solution.message == text
    if mode == "samples":
        assert "3 of 3 samples (0, 1, 2" in text
    if mode == "groups":
        assert "2 of 2 samples (0, 1" in text


# --- small steps -----------------------------------------------------------------------------------------------------


@modes
def test_a_step_below_dt_min_is_a_failure(mode):
    y0, how = MODES[mode](double(1.0))
    with pytest.raises(StepUnderflowError, match="dt_min") as caught:
        solve(square, y0, [0.0, 2.0], dt_min=1e-3, **how)
    last = caught.value.solution.last
    assert (torch.as_tensor(last.t) > 0.9).all()
    assert (torch.as_tensor(last.t) < 1.0).all()


@modes
def test_a_step_that_only_the_clip_makes_small_is_none(mode):
    y0, how = MODES[mode](double(1.0))
    solution = solve(lambda t, y: -y, y0, [0.0, 0.25, 1.0 + 1e-4], dt_min=0.1, step_t=[0.2501], atol=1.0, **how)
    assert solution.success
    assert (torch.as_tensor(solution.stats.forced) == 0).all()


@modes
def test_force_dt_min_accepts_and_counts(mode):
    def f(t, y):
        return -50 * (y - 1)

    y0, how = MODES[mode](double(0.0))
    how |= dict(rtol=1e-10, atol=1e-12, dt_min=0.01)
    with pytest.raises(StepUnderflowError):
        solve(f, y0, [0.0, 1.0], **how)
    solution = solve(f, y0, [0.0, 1.0], force_dt_min=True, **how)
    stats = solution.stats
    assert solution.success
    assert (torch.as_tensor(stats.forced) > 0).all()
    assert (torch.as_tensor(stats.forced) <= torch.as_tensor(stats.accepted)).all()
    torch.testing.assert_close(solution.y[-1], torch.ones_like(y0), rtol=1e-4, atol=0)


@modes
def test_force_dt_min_does_not_accept_nan(mode):
    y0, how = MODES[mode](double(1.0))
    with pytest.raises(NonFiniteError):
        solve(root, y0, [0.0, 3.0], dt_min=0.01, force_dt_min=True, **how)


# --- f itself fails --------------------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", [dict(), dict(method="rk4", dt=0.1)], ids=["adaptive", "fixed"])
def test_f_not_finite_at_the_start(mode, value, method):
    times = []

    def f(t, y):
        times.append(t.detach().clone())
        return y * value

    y0, how = MODES[mode](double(1.0))
    with pytest.raises(NonFiniteError, match=r"t = 0\b") as caught:
        solve(f, y0, [0.0, 1.0], **how, **method)
    solution = caught.value.solution
    assert torch.equal(solution.y[0], y0)
    assert torch.isnan(solution.y[1]).all()
    assert torch.equal(solution.last.y, y0)
    assert all(torch.isfinite(t).all() for t in times), "f was asked at a time that is no number"


@modes
@pytest.mark.parametrize("save", [None, "final", "steps"])
def test_f_not_finite_from_some_time_on(mode, save):
    y0, how = MODES[mode](double(1.0))
    with pytest.raises(NonFiniteError) as caught:
        solve(lambda t, y: y if (t < 0.5).all() else y * NAN, y0, [0.0, 1.0], save=save, **how)
    last = caught.value.solution.last
    torch.testing.assert_close(
        torch.as_tensor(last.t), torch.full_like(torch.as_tensor(last.t), 0.5), rtol=1e-4, atol=0
    )


class OwnError(Exception):
    pass


@modes
@pytest.mark.parametrize("after", [0, 1, 5, 30])
def test_an_exception_of_f_goes_through(mode, after):
    calls = 0

    def f(t, y):
        nonlocal calls
        calls += 1
        if calls > after:
            raise OwnError("mine")
        return -y

    y0, how = MODES[mode](double(1.0))
    with pytest.raises(OwnError, match="mine"):
        solve(f, y0, [0.0, 10.0], throw=False, **how)
    assert calls == after + 1


def test_f_failing_while_a_failure_is_explained_does_not_hide_it():
    calls = 0

    def f(t, y):
        nonlocal calls
        calls += 1
        if calls > 2 + 6 * 5:
            raise OwnError("mine")
        return square(t, y)

    with pytest.raises(MaxStepsError):
        solve(f, double(1.0), [0.0, 2.0], max_steps=5)


@modes
@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_a_fixed_step_solve_fails_where_it_overflows(mode, method):
    y0, how = MODES[mode](double(10.0))
    solution = solve(lambda t, y: y**3, y0, torch.linspace(0, 5, 6), method=method, dt=0.5, throw=False, **how)
    assert (solution.status == Status.NON_FINITE).all()
    assert torch.isfinite(solution.last.y).all()
    assert (torch.as_tensor(solution.last.t) < 5.0).all()
    reached = solution.t <= torch.as_tensor(solution.last.t).max()
    assert torch.isfinite(solution.y).flatten(1).all(1).equal(reached if mode == "joint" else reached[0])


def test_a_fixed_step_sample_that_overflows_leaves_the_rest_bit_identical():
    how = dict(batch_dim=0, method="rk4", dt=0.1, throw=False)
    broken = solve(lambda t, y: y**3, batch(0.1, 50.0, 0.2), TIMES, **how)
    whole = solve(lambda t, y: y**3, batch(0.1, 0.0, 0.2), TIMES, **how)
    assert broken.status.tolist() == [0, Status.NON_FINITE, 0]
    assert torch.equal(broken.y[:, ::2], whole.y[:, ::2])


# --- exceptions ------------------------------------------------------------------------------------------------------


def test_the_exception_comes_after_every_sample_has_ended():
    with pytest.raises(SolveError) as caught:
        solve(square, batch(10.0, 0.1, 0.3), [0.0, 2.0], batch_dim=0)
    solution = caught.value.solution
    assert isinstance(caught.value, StepUnderflowError | NonFiniteError)
    assert solution.status[1:].tolist() == [0, 0]
    assert solution.last.t[1:].tolist() == [2.0, 2.0]
    torch.testing.assert_close(solution.y[1, 1:], batch(0.125, 0.75), rtol=1e-4, atol=0)


def test_the_exception_of_several_failures_is_one_of_them():
    def f(t, y):
        return torch.where(y > 5, torch.nan, y)

    y0 = batch(10.0, 1.0, 0.1)
    solution = solve(f, y0, [0.0, 1.0], batch_dim=0, throw=False, max_steps=3)
    assert solution.status.tolist() == [Status.NON_FINITE, Status.MAX_STEPS, Status.MAX_STEPS]
    with pytest.raises(MaxStepsError, match=r"2 of 3 samples \(1, 2"):
        solve(f, y0, [0.0, 1.0], batch_dim=0, max_steps=3)


@pytest.mark.parametrize("status", [status for status in Status if status.failed])
def test_every_failing_status_has_its_own_exception(status):
    error = solvers.status.ERRORS[status]
    assert issubclass(error, SolveError)
    assert issubclass(error, RuntimeError)
    assert [other for other in solvers.status.ERRORS.values() if other is error] == [error]


# --- stopping --------------------------------------------------------------------------------------------------------


def test_an_observer_stops_a_joint_solve():
    seen = []

    def observer(step):
        seen.append((step.t, step.dt, step.y.clone(), step.error, step.accepted))
        return step.t > 0.5

    solution = solve(lambda t, y: -y, double(1.0), torch.linspace(0, 1, 11), observer=observer, dt_max=0.08)
    assert solution.success
    assert solution.status == Status.STOPPED
    assert "stopped" in solution.message
    assert 0.5 < solution.last.t < 0.6
    assert len(seen) == solution.stats.accepted
    assert [entry[0] > 0.5 for entry in seen] == [False] * (len(seen) - 1) + [True]
    reached = solution.t <= solution.last.t
    assert torch.equal(torch.isfinite(solution.y).squeeze(1), reached)
    t = 0.0
    for end, dt, y, error, accepted in seen:
        assert math.isclose(end, t + dt, rel_tol=1e-14)
        torch.testing.assert_close(y, double(math.exp(-end)), rtol=1e-5, atol=0)
        assert 0 <= error <= 1
        assert accepted
        t = end


def test_an_observer_stops_samples_of_a_batch():
    y0 = batch(1.0, 2.0, 4.0)
    how = dict(batch_dim=0, dt_max=0.05)
    times = torch.linspace(0, 1, 11, dtype=torch.float64)
    solution = solve(lambda t, y: -y, y0, times, observer=lambda step: step.y.squeeze(1) < 1.2, **how)
    assert solution.success
    assert solution.status.tolist() == [Status.STOPPED, Status.STOPPED, Status.SUCCESS]
    free = solve(lambda t, y: -y, y0, times, **how)
    assert torch.equal(solution.y[:, 2], free.y[:, 2])
    assert solution.stats.accepted[0] == 1
    assert abs(solution.last.t[1] - math.log(2 / 1.2)) < 0.06
    reached = times.unsqueeze(1) <= solution.last.t
    assert torch.equal(torch.isfinite(solution.y).squeeze(2), reached)


@modes
def test_an_observer_sees_every_accepted_step_also_the_last(mode):
    seen = []
    y0, how = MODES[mode](double(1.0))
    solution = solve(lambda t, y: -y, y0, [0.0, 1.0], observer=lambda step: seen.append(step), **how)
    accepted = sum(torch.as_tensor(step.accepted).long() for step in seen)
    assert torch.equal(torch.as_tensor(accepted), torch.as_tensor(solution.stats.accepted))
    assert (torch.as_tensor(seen[-1].t) == 1.0).all()


@modes
def test_an_observer_that_says_true_stops_everyone_at_once(mode):
    y0, how = MODES[mode](double(1.0))
    solution = solve(lambda t, y: -y, y0, [0.0, 5.0], observer=lambda step: True, **how)
    assert (solution.status == Status.STOPPED).all()
    assert (torch.as_tensor(solution.stats.accepted) == 1).all()


# --- going on --------------------------------------------------------------------------------------------------------


def swing(t, y):
    return torch.stack([y[..., 1], -torch.sin(y[..., 0])], -1)


@modes
@pytest.mark.parametrize(("method", "end"), [("dopri5", 8.0), ("dopri5", -8.0), ("bosh3", -4.0), ("dop853", 20.0)])
def test_a_solve_that_ran_out_of_steps_goes_on_from_where_it_was(mode, method, end):
    y0, how = MODES[mode](double(1.0, 0.5))
    how |= dict(method=method, rtol=1e-6, atol=1e-8)
    whole = solve(swing, y0, [0.0, end], **how)
    part = solve(swing, y0, [0.0, end], max_steps=6, throw=False, **how)
    assert (part.status == Status.MAX_STEPS).all()
    last = part.last
    rest = solve(swing, last.y, (last.t, end), dt0=last.dt, **how)
    torch.testing.assert_close(rest.y[-1], whole.y[-1], rtol=1e-4, atol=1e-5)
    tried = [torch.as_tensor(s.stats.accepted + s.stats.rejected).max() for s in (part, rest, whole)]
    assert tried[0] + tried[1] <= tried[2] + 2, "the step size was lost on the way"


def test_samples_that_stopped_at_their_own_times_go_on_together():
    y0 = batch(1.0, 2.0, 3.0)
    part = solve(lambda t, y: -y * y, y0, [0.0, 3.0], batch_dim=0, observer=lambda s: s.y.squeeze(1) < 0.7)
    assert len(set(part.last.t.tolist())) == 3
    rest = solve(lambda t, y: -y * y, part.last.y, (part.last.t, 3.0), dt0=part.last.dt, batch_dim=0)
    torch.testing.assert_close(rest.y[-1], y0 / (1 + 3 * y0), rtol=1e-5, atol=0)


def test_a_finished_solve_goes_on_from_its_end():
    first = solve(swing, double(1.0, 0.5), [0.0, 4.0], rtol=1e-8, atol=1e-10)
    second = solve(swing, first.last.y, (first.last.t, 8.0), dt0=first.last.dt, rtol=1e-8, atol=1e-10)
    whole = solve(swing, double(1.0, 0.5), [0.0, 8.0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(second.y[-1], whole.y[-1], rtol=1e-6, atol=1e-8)
    tried = [s.stats.accepted + s.stats.rejected for s in (first, second, whole)]
    assert tried[0] + tried[1] <= tried[2] + 4


def test_a_finished_batch_goes_on_although_its_samples_ended_with_different_steps():
    y0, how = MODES["samples"](double(1.0, 0.5))
    first = solve(swing, y0 * batch(1.0, 0.1, 2.0), [0.0, 4.0], **how)
    second = solve(swing, first.last.y, (first.last.t, 8.0), dt0=first.last.dt, **how)
    whole = solve(swing, y0 * batch(1.0, 0.1, 2.0), [0.0, 8.0], **how)
    torch.testing.assert_close(second.y[-1], whole.y[-1], rtol=1e-4, atol=1e-6)


# --- jumps that fail, progress ---------------------------------------------------------------------------------------


@modes
def test_a_jump_to_nowhere_is_a_failure(mode):
    y0, how = MODES[mode](double(1.0))
    jumps = [Jump(0.5, lambda t, y: y * math.nan)]
    solution = solve(lambda t, y: -y, y0, [0.0, 0.25, 1.0], jumps=jumps, throw=False, **how)
    assert (solution.status == Status.NON_FINITE).all()
    assert torch.isfinite(solution.y[:2]).all()
    assert torch.isnan(solution.y[2]).all()


class Terminal(io.StringIO):
    def isatty(self):
        return True


@modes
def test_progress_is_quiet_where_there_is_no_terminal(mode, capfd):
    y0, how = MODES[mode](double(1.0))
    solve(lambda t, y: -y, y0, [0.0, 1.0], progress=True, **how)
    assert capfd.readouterr() == ("", "")


@modes
def test_progress_on_a_terminal_ends_at_the_end(mode, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    y0, how = MODES[mode](double(1.0))
    stops = []
    solve(lambda t, y: -y, y0, [0.0, 1.0], progress=True, observer=lambda step: stops.append(step.t), **how)
    text = sys.stderr.getvalue()
    assert "100.0 %" in text
    assert text.endswith("\n")
    assert stops, "the user's own observer is still called"


def test_progress_of_a_batch_with_a_sample_that_needs_no_step(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    times = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    assert solve(lambda t, y: -y, batch(1.0, 2.0, 3.0), times, batch_dim=0, progress=True).success
    assert "100.0 %" in sys.stderr.getvalue()


# --- a long way that had not to be so long -----------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("method", ["bosh3", "dopri5", "dop853"])
def test_a_solve_that_stability_held_back_says_so_and_counts_what_that_took(mode, method):
    y0, how = MODES[mode](double(1.0, 1.0))
    calls = 0

    def f(t, y):
        nonlocal calls
        calls += 1
        return stiff(t, y)

    with pytest.warns(StiffnessWarning, match=rf"{method} took .* stability .*try method='\w+', or 'rkc2'") as caught:
        solution = solve(f, y0, [0.0, 1.0], method=method, rtol=1e-4, **how)
    assert solution.stats.nfe == calls
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("problem", NOT_STIFF)
def test_a_long_solve_that_accuracy_asks_for_is_not_blamed(problem):
    f, end = NOT_STIFF[problem]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(
            f, double(1.0, 0.5), [0.0, end], rtol=1e-9, atol=1e-12, throw=False, max_steps=1500,
            observer=lambda step, seen=[]: seen.append(1) or len(seen) >= 1100,
        )  # fmt: skip
    assert int(solution.status) >= 0


@pytest.mark.parametrize("method", ["rkc2", "rock4", "trbdf2"])
def test_methods_that_take_long_steps_are_not_blamed(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(stiff, double(1.0, 1.0), [0.0, 0.2], method=method, rtol=1e-4, dt_max=1e-4)


def cancelling(t, y, rate):
    """y' = -y, written as rates that cancel: in single precision what is left of them is off by up to 1e-6 ``rate``."""
    return -y + rate * (((y + 16) - 16) - y)


@pytest.mark.parametrize(("method", "rate"), [("prox_bdf", 3e3), ("auto", 3e4)])
def test_implicit_steps_that_rounding_decides_are_told_of(method, rate):
    how = {"method": method, "rtol": 1e-4, "atol": 1e-6}
    args = (rate,)
    with pytest.warns(RoundingWarning, match=rf"{method} took .* repeated .* torch.float32 .*Try torch.float64"):
        solve(cancelling, torch.ones(1), [0.0, 4.0], args=args, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(cancelling, double(1.0), [0.0, 4.0], args=args, **how)
        solve(lambda t, y: torch.cos(40 * t) - y, torch.ones(1), [0.0, 6.0], **how)
