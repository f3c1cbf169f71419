"""Events: where they are, what they do to a solve, and derivatives through them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_states import Dispatches
from torch import Tensor, nn

from solvers import (
    ArgumentError,
    ArgumentTypeError,
    Event,
    EventsAccumulateError,
    Jump,
    MaxStepsError,
    NonFiniteError,
    Status,
    UnsupportedError,
    solve,
)
from solvers.events import chandrupatla

D = torch.float64
INF = math.inf
G = 9.81


def double(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=D)


def fall(t: Tensor, y: Tensor, *args: Any) -> Tensor:
    return torch.stack([y[..., 1], torch.full_like(y[..., 0], -G)], -1)


def decay(t: Tensor, y: Tensor, *args: Any) -> Tensor:
    return -y


def turn(t: Tensor, y: Tensor, *args: Any) -> Tensor:
    return torch.stack([y[..., 1], -y[..., 0]], -1)


def height(t: Tensor, y: Tensor, *args: Any) -> Tensor:
    return y[..., 0]


def below_one(t: Tensor, y: Tensor, *args: Any) -> Tensor:
    return y[..., 0] - 1


def bounce(t: Tensor, y: Tensor, restitution: Any) -> Tensor:
    return torch.stack([y[..., 0], -restitution * y[..., 1]], -1)


BALL = Event(height, direction=-1, terminal=False, reset=bounce)


def bounces(h: Tensor, restitution: Tensor, count: int) -> Tensor:
    """Times of the bounces of a ball dropped from ``h``: the first fall, then flights that shrink geometrically."""
    first = torch.sqrt(2 * h / G)
    flights = torch.stack([2 * first * restitution**k for k in range(1, count)])
    return torch.cat([first.unsqueeze(0), first + flights.cumsum(0)])


def times(solution: Any) -> Tensor:
    return torch.stack([event.t for event in solution.events])


# --- the bouncing ball -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", ["backprop", "checkpoint"])
def test_twenty_bounces_and_their_gradients(adjoint):
    restitution = torch.tensor(0.9, dtype=D, requires_grad=True)
    y0 = double(2.0, 0.0).requires_grad_()
    solution = solve(fall, y0, [0, INF], args=(restitution,), events=[BALL], max_events=20, adjoint=adjoint)
    exact = bounces(y0[0], restitution, 20)
    assert solution.status == Status.MAX_EVENTS
    assert solution.success
    assert [event.which for event in solution.events] == [0] * 20
    assert (times(solution) - exact).abs().max() < 1e-8
    found = torch.autograd.grad(solution.events[-1].t, (restitution, y0), retain_graph=True)
    wanted = torch.autograd.grad(exact[-1], (restitution, y0), retain_graph=True)
    assert abs(found[0] - wanted[0]) < 1e-6
    assert abs(found[1][0] - wanted[1][0]) < 1e-6
    # The speed after the last bounce, too: it depends on the restitution and on all that went before.
    speed = torch.sqrt(2 * G * y0[0]) * restitution**20
    assert abs(solution.last.y[1] - speed) < 1e-8
    slope = torch.autograd.grad(solution.last.y[1], restitution)[0]
    assert abs(slope - torch.autograd.grad(speed, restitution)[0]) < 1e-6


@pytest.mark.parametrize("adjoint", ["backprop", "checkpoint"])
def test_a_batch_of_balls_bounces_each_as_alone(adjoint):
    h = 0.5 + 2 * torch.rand(256, dtype=D)
    restitution = (0.6 + 0.35 * torch.rand(256, dtype=D)).requires_grad_()
    y0 = torch.stack([h, torch.zeros_like(h)], -1)
    how = dict(events=[BALL], max_events=20, batch_dim=0, adjoint=adjoint)
    solution = solve(fall, y0, [0, INF], args=(restitution,), **how)
    assert (solution.status == Status.MAX_EVENTS).all()
    exact = bounces(h, restitution, 20)
    assert (times(solution) - exact).abs().max() < 1e-8
    found = torch.autograd.grad(times(solution)[-1].sum(), restitution)[0]
    wanted = torch.autograd.grad(exact[-1].sum(), restitution)[0]
    assert (found - wanted).abs().max() < 1e-6
    for b in (0, 100, 255):
        own = restitution.detach()[b : b + 1].requires_grad_()
        alone = solve(fall, y0[b : b + 1], [0, INF], args=(own,), **how)
        assert torch.equal(times(alone)[:, 0], times(solution)[:, b])
        assert torch.equal(alone.stats.nfe_per_sample[0], solution.stats.nfe_per_sample[b])
        joint = solve(fall, y0[b], [0, INF], args=(own[0],), events=[BALL], max_events=20)
        assert (times(joint) - times(solution)[:, b]).abs().max() < 1e-12


@pytest.mark.parametrize("restitution", [0.9, 0.5, 0.1, 1e-3])
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_bounces_that_accumulate_end_with_a_status(restitution, batch_dim):
    y0 = double(2.0, 0.0) if batch_dim is None else double([2.0, 0.0])
    with pytest.raises(EventsAccumulateError, match=r"max_events") as raised:
        solve(fall, y0, [0, 30], args=(restitution,), events=[BALL], batch_dim=batch_dim)
    solution = raised.value.solution
    limit = math.sqrt(4 / G) * (1 + 2 * restitution / (1 - restitution))
    assert abs(float(solution.last.t) - limit) < 1e-9
    assert (solution.status == Status.EVENTS_ACCUMULATE).all()


def test_a_ball_without_bounce_goes_on_as_the_reset_left_it():
    solution = solve(fall, double(2.0, 0.0), [0, 2], args=(0.0,), events=[BALL])
    assert len(solution.events) == 1
    wanted = -0.5 * G * (2 - math.sqrt(4 / G)) ** 2
    assert abs(solution.y[-1, 0] - wanted) < 1e-9


# --- where events are ------------------------------------------------------------------------------------------------


def test_an_event_that_is_zero_at_the_start_waits_until_it_has_left_zero():
    solution = solve(lambda t, y: torch.stack([y[1], -9.8 + 0 * y[1]]), double(0.0, 5.0), [0, INF], events=[Event(height)])
    assert abs(solution.events[0].t - 1.0204081632653061) < 1e-12
    assert solution.status == Status.EVENT


@pytest.mark.parametrize("start", [-0.3, 0.0, 0.3])
def test_a_boolean_event_fires_where_it_turns_true(start):
    event = Event(lambda t, y: y[0] < 0)
    solution = solve(turn, double(math.cos(start), -math.sin(start)), [0, INF], events=[event], rtol=1e-9, atol=1e-12)
    assert abs(solution.events[0].t - (math.pi / 2 - start)) < 1e-8
    assert abs(solution.events[0].y[0]) < 1e-15


def test_a_boolean_event_fires_once_for_each_time_that_it_turns_true():
    """Its reset leaves it as it is."""
    event = Event(lambda t, y: y[0] < 0, terminal=False, reset=lambda t, y: y * 1.0)
    solution = solve(turn, double(1.0, 0.0), [0, 20], events=[event], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(times(solution), math.pi * double(0.5, 2.5, 4.5), rtol=0, atol=1e-7)


def test_a_boolean_event_that_is_true_at_the_start_waits_for_the_next_time():
    below = Event(lambda t, y: y[0] < 0)
    solution = solve(turn, double(-1.0, 0.0), [0, INF], events=[below], rtol=1e-9, atol=1e-12)
    assert abs(solution.events[0].t - 1.5 * math.pi) < 1e-8
    above = Event(lambda t, y: y[0] < 0, direction=-1)
    solution = solve(turn, double(-1.0, 0.0), [0, INF], events=[above], rtol=1e-9, atol=1e-12)
    assert abs(solution.events[0].t - 0.5 * math.pi) < 1e-8


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_two_crossings_in_one_large_step_are_both_found(batch_dim):
    top = 1.25 * 1.25 / (2 * G)
    y0 = double(0.0, 1.25) if batch_dim is None else double([0.0, 1.25])
    event = Event(lambda t, y: height(t, y) - 0.98 * top, terminal=False)
    how = dict(method="rk4", num_steps=1, batch_dim=batch_dim)
    solution = solve(fall, y0, [0, 0.25], events=[event], **how)
    half = 1.25 / G * math.sqrt(0.02)
    wanted = double(1.25 / G - half, 1.25 / G + half)
    torch.testing.assert_close(times(solution).flatten(), wanted, rtol=0, atol=1e-14)
    blind = solve(fall, y0, [0, 0.25], events=[Event(event.fn, terminal=False, samples=0)], **how)
    assert blind.events == ()


def test_direction_is_that_of_travel():
    level = lambda t, y: y[0]
    for direction, found in ((0, [0.5, 1.5, 2.5]), (-1, [0.5, 2.5]), (1, [1.5])):
        event = Event(level, direction=direction, terminal=False)
        forward = solve(turn, double(1.0, 0.0), [0, 3 * math.pi], events=[event], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(times(forward), math.pi * double(*found), rtol=0, atol=1e-7)
        backward = solve(turn, double(1.0, 0.0), [0, -3 * math.pi], events=[event], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(times(backward), -math.pi * double(*found), rtol=0, atol=1e-7)


METHODS = [
    ("dopri5", {}, 3e-6), ("dopri8", {}, 3e-6), ("dop853", {}, 3e-6), ("bosh3", {}, 3e-6), ("abm", {}, 3e-6),
    ("euler", dict(dt=1e-3), 1e-3), ("midpoint", dict(dt=1e-2), 1e-4), ("rk4", dict(dt=0.05), 1e-6),
    ("explicit_adams", dict(dt=0.02), 1e-6), ("implicit_adams", dict(dt=0.02), 1e-6),
    ("prox_euler", dict(dt=1e-3), 1e-3), ("prox_euler", dict(rtol=1e-5), 1e-2), ("prox_bdf", dict(rtol=1e-5), 1e-4),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options", "tolerance"), METHODS)
@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("sign", [1, -1])
def test_every_method_finds_the_time_of_an_event(method, options, tolerance, batch_dim, sign):
    y0 = double(3.0) if batch_dim is None else double([3.0], [2.0])
    solution = solve(
        lambda t, y: -sign * y, y0, [0.2, sign * INF], method=method, batch_dim=batch_dim, events=[Event(below_one)], **options
    )
    wanted = 0.2 + sign * torch.log(y0[..., 0])
    assert (solution.status == Status.EVENT).all()
    assert (solution.events[0].t - wanted).abs().max() < tolerance
    assert (solution.events[0].y - 1).abs().max() < 1e-12
    assert torch.equal(torch.as_tensor(solution.last.t, dtype=D), solution.events[0].t)
    assert torch.equal(solution.last.y, solution.events[0].after)


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_float32_states(batch_dim):
    y0 = torch.tensor([3.0] if batch_dim is None else [[3.0], [5.0]], requires_grad=True)
    solution = solve(decay, y0, [0, INF], rtol=1e-5, atol=1e-6, events=[Event(below_one)], batch_dim=batch_dim)
    t = solution.events[0].t
    assert t.dtype == torch.float64
    assert solution.events[0].y.dtype == torch.float32
    assert (t - torch.log(y0.detach()[..., 0])).abs().max() < 2e-5
    slope = torch.autograd.grad(t.sum(), y0)[0]
    torch.testing.assert_close(slope, 1 / y0.detach(), rtol=1e-4, atol=0)


def test_float32_bounces():
    restitution = torch.tensor(0.8)
    how = dict(args=(restitution,), events=[BALL], max_events=12, rtol=1e-5, atol=1e-6)
    solution = solve(fall, torch.tensor([2.0, 0.0]), [0, INF], **how)
    exact = bounces(double(2.0)[0], restitution.double(), 12)
    assert (times(solution) - exact).abs().max() < 2e-5


def test_trees_as_states():
    def spring(t, state):
        x, v = state.values()
        return {"x": v, "v": -x}

    turned = lambda t, state: {"x": state["x"], "v": -state["v"]}
    event = Event(lambda t, state: state["x"][0], terminal=False, reset=turned)
    y0 = {"x": double(1.0), "v": double(0.0)}
    solution = solve(spring, y0, [0, INF], events=[event], max_events=2, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(times(solution), math.pi * double(0.5, 1.5), rtol=0, atol=1e-8)
    first = solution.events[0]
    assert first.y["v"] < 0 < first.after["v"]
    assert first.y["x"] == first.after["x"]
    pair = solve(lambda t, s: (s[1], -s[0]), (double(1.0), double(0.0)), [0, INF], events=[Event(lambda t, s: s[0][0])])
    assert abs(pair.events[0].t - math.pi / 2) < 1e-6
    assert isinstance(pair.events[0].y, tuple)


def test_complex_states():
    event = Event(lambda t, y: y.real[0])
    y0 = torch.ones(1, dtype=torch.complex128, requires_grad=True)
    solution = solve(lambda t, y: 1j * y, y0, [0, INF], events=[event], rtol=1e-9, atol=1e-12)
    assert abs(solution.events[0].t - math.pi / 2) < 1e-8
    slope = torch.autograd.grad(solution.events[0].t, y0)[0]  # turning y0 forward by an angle makes the event earlier
    assert abs(slope - -1j) < 1e-7


def test_groups_of_rows_have_one_number_each():
    index = torch.tensor([0, 1, 1, 0])
    total = lambda t, y: torch.zeros(2, dtype=D).index_add(0, index, y[:, 0]) - 1
    y0 = double([2.0], [3.0], [1.0], [1.0]).requires_grad_()
    solution = solve(decay, y0, [0, INF], batch_index=index, events=[Event(total)], rtol=1e-9, atol=1e-12)
    assert (solution.events[0].t - torch.log(double(3.0, 4.0))).abs().max() < 1e-9
    slope = torch.autograd.grad(solution.events[0].t.sum(), y0)[0].flatten()
    torch.testing.assert_close(slope, 1 / double(3.0, 4.0, 4.0, 3.0), rtol=1e-7, atol=0)
    assert solution.events[0].y.shape == (4, 1)


# --- several ---------------------------------------------------------------------------------------------------------


def test_several_events_in_one_step_come_in_the_order_of_time():
    levels = [0.5, 0.9, 0.7, 0.1]
    events = [Event(lambda t, y, c=c: y[0] - c, terminal=c == 0.1) for c in levels]
    solution = solve(lambda t, y: -torch.ones_like(y), double(1.0), [0, 5], events=events, method="rk4", num_steps=1)
    assert [event.which for event in solution.events] == [1, 2, 0, 3]
    assert (times(solution).diff() > 0).all()
    assert solution.stats.accepted == 1
    assert solution.status == Status.EVENT


def test_each_sample_of_a_batch_has_its_own_events():
    level = lambda c: lambda t, y: y[:, 0] - c
    events = [Event(level(0.5), terminal=False), Event(level(2.0), terminal=False), Event(level(0.25))]
    y0 = double([3.0], [1.0], [0.3], [0.1])
    solution = solve(decay, y0, [0, 0.7, 3.0], batch_dim=0, events=events, rtol=1e-9, atol=1e-12)
    which = torch.stack([event.which for event in solution.events], 1)
    assert which.tolist() == [[1, 0, 2], [0, 2, -1], [2, -1, -1], [-1, -1, -1]]
    wanted = torch.log(double([1.5, 6, 12], [2, 4, INF], [1.2, INF, INF], [INF, INF, INF]))
    wanted = torch.where(torch.isinf(wanted), torch.nan, wanted)
    torch.testing.assert_close(times(solution).T, wanted, rtol=0, atol=1e-8, equal_nan=True)
    assert solution.status.tolist() == [Status.EVENT] * 3 + [Status.SUCCESS]
    assert torch.isnan(solution.y[-1, :3]).all()
    assert torch.isfinite(solution.y[-1, 3]).all()
    assert torch.isnan(solution.y[1, 2]).all()
    assert torch.isfinite(solution.y[1, :2]).all()
    torch.testing.assert_close(solution.events[0].y[:3, 0], double(2.0, 0.5, 0.25), rtol=0, atol=1e-12)
    assert torch.isnan(solution.events[0].y[3]).all()


def test_events_at_the_same_time_follow_the_order_of_the_list():
    """A billiard ball in a corner: both walls turn it round."""
    wall = lambda i: lambda t, y: 1 - y[i]
    back = lambda i: lambda t, y: torch.cat([y[:2], y[2:] * torch.where(torch.arange(2) == i, -1.0, 1.0)])
    events = [Event(wall(i), direction=-1, terminal=False, reset=back(i)) for i in range(2)]
    f = lambda t, y: torch.cat([y[2:], torch.zeros(2, dtype=D)])
    solution = solve(f, double(0.25, 0.25, 0.5, 0.5), [0, 2], events=events)
    assert [event.which for event in solution.events] == [0, 1]
    torch.testing.assert_close(times(solution), double(1.5, 1.5), rtol=0, atol=1e-12)
    torch.testing.assert_close(solution.y[-1], double(0.75, 0.75, -0.5, -0.5), rtol=0, atol=1e-12)
    noting = Event(wall(0), direction=-1, terminal=False)
    solution = solve(f, double(0.25, 0.25, 0.5, 0.5), [0, 2], events=[Event(wall(0), direction=-1), noting])
    assert [event.which for event in solution.events] == [1, 0], "one that only takes note is not lost"


def test_after_a_reset_the_new_sign_counts():
    """A thermostat with hysteresis: each event moves the function of the other."""
    f = lambda t, y: torch.stack([torch.where(y[1] > 0, 1.0, -1.0) * torch.ones_like(y[0]), torch.zeros_like(y[1])])
    switch = lambda t, y: torch.stack([y[0], -y[1]])
    event = Event(lambda t, y: y[0] * torch.sign(y[1]) - 1, direction=1, terminal=False, reset=switch)
    solution = solve(f, double(0.0, 1.0), [0, 10], events=[event])
    torch.testing.assert_close(times(solution), double(1.0, 3.0, 5.0, 7.0, 9.0), rtol=0, atol=1e-12)


def test_max_events_counts_events_of_every_kind():
    events = [Event(lambda t, y: y[0], terminal=False), Event(lambda t, y: y[1], terminal=False)]
    solution = solve(turn, double(1.0, 0.5), [0, 50], events=events, max_events=5)
    assert len(solution.events) == 5
    assert solution.status == Status.MAX_EVENTS
    assert solution.last.t == float(solution.events[-1].t)
    assert "max_events" in solution.message


# --- what belongs to the event, and what to the outputs --------------------------------------------------------------


@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("adjoint", ["backprop", "checkpoint"])
def test_outputs_before_an_event_are_saved_and_those_after_it_are_nan(batch_dim, adjoint):
    y0 = (double(0.0, 5.0) if batch_dim is None else double([0.0, 5.0], [0.0, 5.0])).requires_grad_()
    t = torch.linspace(0, 2, 9, dtype=D)
    solution = solve(fall, y0, t, events=[Event(height)], batch_dim=batch_dim, dense=adjoint == "backprop", adjoint=adjoint)
    end = 10 / G
    reached = t < end
    exact = 5 * t - 0.5 * G * t * t
    torch.testing.assert_close(solution.y[reached][..., 0].reshape(5, -1)[:, 0], exact[reached], rtol=0, atol=1e-12)
    assert torch.isnan(solution.y[~reached]).all()
    if adjoint == "backprop":
        place = solution.last.t if batch_dim is None else solution.last.t.unsqueeze(1)
        torch.testing.assert_close(solution.dense(place).reshape(y0.shape), solution.last.y)
        with pytest.raises(ArgumentError, match="outside"):
            solution.dense(end + 1e-3)


def test_an_output_or_jump_or_stop_at_the_time_of_an_event():
    """All at t = 0.5, to the last bit: outputs show what comes after the reset, and after the jump, which comes later."""
    one = lambda t, y: torch.ones_like(y)
    for batch_dim in (None, 0):
        y0 = double(0.0) if batch_dim is None else double([0.0], [0.0])
        how = dict(method="euler", dt=0.25, batch_dim=batch_dim)
        ten = Event(lambda t, y: t - 0.5, terminal=False, reset=lambda t, y: y + 10)
        for extra in ({}, dict(step_t=[0.5]), dict(step_t=[0.3])):
            y = solve(one, y0, [0, 0.25, 0.5, 1.0], events=[ten], **how, **extra).y
            torch.testing.assert_close(y.reshape(4, -1)[:, 0], double(0.0, 0.25, 10.5, 11.0), rtol=0, atol=1e-12)
        both = dict(events=[ten], jumps=[Jump(0.5, lambda t, y: 2 * y)])
        y = solve(one, y0, [0, 0.5, 1.0], **both, **how).y
        torch.testing.assert_close(y.reshape(3, -1)[:, 0], double(0.0, 21.0, 21.5), rtol=0, atol=1e-12)
        last = solve(one, y0, [0, 0.25, 0.5], events=[Event(lambda t, y: t - 0.5)], **how)
        assert (last.status == Status.EVENT).all()
        torch.testing.assert_close(last.y.reshape(3, -1)[:, 0], double(0.0, 0.25, 0.5), rtol=0, atol=1e-15)


def test_a_jump_over_zero_is_no_crossing():
    jump = Jump(0.5, lambda t, y: y - 2)
    solution = solve(lambda t, y: torch.ones_like(y), double(0.5), [0, 3], events=[Event(height)], jumps=[jump])
    assert len(solution.events) == 1
    assert abs(solution.events[0].t - 1.5) < 1e-12


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_the_observer_sees_the_step_as_it_was_cut(batch_dim):
    seen = []
    y0 = double(0.0, 5.0) if batch_dim is None else double([0.0, 5.0])
    solution = solve(fall, y0, [0, INF], events=[Event(height)], observer=seen.append, batch_dim=batch_dim)
    total = sum(float(step.dt) for step in seen)
    assert float(seen[-1].t) == float(solution.last.t)
    assert abs(total - float(solution.last.t)) < 1e-12
    assert torch.equal(seen[-1].y, solution.last.y)


@pytest.mark.parametrize("save", ["final", "steps"])
@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("adjoint", ["backprop", "checkpoint"])
def test_what_is_saved_of_a_solve_that_ends_at_an_event(save, batch_dim, adjoint):
    y0 = (double(3.0) if batch_dim is None else double([3.0], [3.0])).requires_grad_()
    solution = solve(decay, y0, [0, INF], events=[Event(below_one)], save=save, batch_dim=batch_dim, adjoint=adjoint)
    torch.testing.assert_close(solution.y[-1], torch.ones_like(y0), rtol=0, atol=1e-12)
    assert (solution.t[..., -1] - math.log(3)).abs().max() < 1e-6
    # y = 1 at the event, whatever y0 is.
    assert torch.autograd.grad(solution.y[-1].sum(), y0)[0].abs().max() < 1e-12


@pytest.mark.parametrize("method", ["dopri5", "dop853", "rk4", "abm"])
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_calls_of_f_are_counted(method, batch_dim):
    calls = []

    def f(t, y, *args):
        calls.append(t)
        return fall(t, y)

    y0 = double(2.0, 0.0) if batch_dim is None else double([2.0, 0.0], [1.0, 0.0])
    how = dict(dt=0.01) if method == "rk4" else {}
    how |= dict(method=method, batch_dim=batch_dim, args=(0.8,), events=[BALL], max_events=5)
    solution = solve(f, y0, [0, INF], **how)
    assert solution.stats.nfe == len(calls)
    if batch_dim is None:
        assert solution.stats.nfe_per_sample == len(calls)
        return
    # The call that starts a sample again after its own event is no other sample's. Without FSAL, where another sample starts
    # again, what is known of f may be shared: by no more than a call an event.
    shared = 0 if method == "dopri5" else 5
    for i, count in enumerate(solution.stats.nfe_per_sample.tolist()):
        assert 0 <= solve(f, y0[i : i + 1], [0, INF], **how).stats.nfe - count <= shared


def test_looking_for_an_event_takes_no_calls_of_f():
    plain = solve(turn, double(1.0, 0.0), [0, 1.5], rtol=1e-9)
    watched = solve(turn, double(1.0, 0.0), [0, 1.5], rtol=1e-9, events=[Event(height)])
    assert plain.stats.nfe == watched.stats.nfe
    cut = solve(turn, double(1.0, 0.0), [0, 1.6], rtol=1e-9, events=[Event(height)])
    assert cut.status == Status.EVENT
    assert cut.stats.nfe <= solve(turn, double(1.0, 0.0), [0, 1.6], rtol=1e-9).stats.nfe


@pytest.mark.parametrize(("shape", "how"), [((3,), {}), ((4, 3), dict(batch_dim=0))])
def test_a_step_with_events_reads_the_device_once_more(monkeypatch, shape, how):
    event = Event(lambda t, y: y[..., 0] + 1)
    found = []
    for end in (1.0, 2.0):
        with monkeypatch.context() as patch, torch.no_grad():
            count = Dispatches(patch)
            with count:
                events = [event, event]
                stats = solve(count.field(decay), torch.ones(shape, dtype=D), [0, end], dt_max=0.02, events=events, **how).stats
        found.append((int(torch.as_tensor(stats.accepted).max()), count.reads))
    (steps, reads), (more_steps, more_reads) = found
    # Joint mode turns positions in the step, which are on the host anyway, into an array by the same name.
    names = {"numpy": 2 if not how else 1}
    for name in more_reads:
        assert more_reads[name] - reads[name] <= names.get(name, 1) * (more_steps - steps), name


# --- how it can fail -------------------------------------------------------------------------------------------------


def test_without_the_event_a_solve_without_an_end_reaches_max_steps():
    for f in (decay, lambda t, y: 0 * y):
        with pytest.raises(MaxStepsError):
            solve(f, double(1.0), [0, INF], events=[Event(lambda t, y: y[0] + 1)], max_steps=200)


def test_nan_of_an_event_function():
    root = Event(lambda t, y: torch.log(height(t, y)))
    found = solve(decay, double(3.0), [0, INF], events=[root]).events[0]
    assert abs(found.t - math.log(3)) < 1e-6
    # Beyond the event the function may be undefined: only before it that is a failure.
    edge = Event(lambda t, y: torch.sqrt(height(t, y) - 1) - 0.1)
    assert abs(solve(decay, double(3.0), [0, 5], events=[edge]).events[0].t - math.log(3 / 1.01)) < 1e-6
    with pytest.raises(NonFiniteError, match="event function") as raised:
        solve(decay, double(3.0), [0, 5], events=[Event(lambda t, y: 9 + torch.sqrt(y[0] - 1))])
    assert abs(raised.value.solution.last.t - math.log(3)) < 1e-4
    with pytest.raises(NonFiniteError, match="event function"):
        solve(decay, double(3.0), [0, 5], events=[Event(lambda t, y: y[0] * torch.nan)])


@pytest.mark.parametrize("grad", [False, True])
def test_nan_of_an_event_function_ends_its_own_sample_only(grad):
    event = Event(lambda t, y: 9 + torch.sqrt(y[:, 0] - 1))
    y0 = double([3.0], [1e4], [2e4]).requires_grad_(grad)
    solution = solve(decay, y0, [0, 2], batch_dim=0, events=[event], throw=False)
    good = solve(decay, y0[1:], [0, 2], batch_dim=0, events=[event])
    assert solution.status.tolist() == [Status.NON_FINITE, Status.SUCCESS, Status.SUCCESS]
    assert torch.equal(solution.y[:, 1:], good.y)
    if grad:
        slope = torch.autograd.grad(solution.y[-1, 1:].sum(), y0)[0]
        assert torch.isfinite(slope).all()


BAD = [
    (dict(events=Event(height)), ArgumentTypeError, "events=\\[Event"),
    (dict(events=[height]), ArgumentTypeError, "events\\[0\\]"),
    (dict(events=[Event(height)], max_events=0), ArgumentError, "max_events"),
    (dict(events=[Event(height)], max_events=1.5), ArgumentError, "max_events"),
    (dict(max_events=3), ArgumentError, "max_events=3"),
    (dict(events=[Event(lambda t, y: y)]), ArgumentError, "events\\[0\\].*shape \\(\\).*\\(2,\\)"),
    (dict(events=[Event(lambda t, y: float(y[0]))]), ArgumentTypeError, "events\\[0\\].*float"),
    (dict(events=[Event(lambda t, y: y[0] + 1j)]), ArgumentTypeError, "real or boolean.*complex"),
    (dict(events=[Event(lambda t, y: y[0])], batch_dim=0, y0=torch.ones(3, 2)), ArgumentError, "\\(3,\\).*\\(2,\\)"),
    (dict(t=[0, INF]), ArgumentError, "finite"),
    (dict(t=[0, INF], events=[Event(height, terminal=False)]), ArgumentError, "finite"),
    (dict(t=[-INF, 0], events=[Event(height)]), ArgumentError, "finite"),
    (dict(t=[0, INF, 1], events=[Event(height)]), ArgumentError, "increasing|finite"),
    (dict(t=[0, INF], events=[Event(height)], num_steps=4), ArgumentError, "dt="),
    (dict(t=[0, INF], events=[Event(height)], method="rk4", controller="fixed"), ArgumentError, "dt="),
]


@pytest.mark.parametrize(("changes", "error", "words"), BAD)
def test_bad_input_is_named_before_f_is_called(changes, error, words):
    def f(t, y):
        raise AssertionError("f was called")

    arguments = dict(y0=double(1.0, 2.0), t=[0, 1]) | changes
    with pytest.raises(error, match=words):
        solve(f, arguments.pop("y0"), arguments.pop("t"), **arguments)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (dict(fn=3), ArgumentTypeError),
        (dict(direction=2), ArgumentError),
        (dict(direction=True), ArgumentError),
        (dict(terminal=1), ArgumentTypeError),
        (dict(reset=3), ArgumentTypeError),
        (dict(samples=-1), ArgumentError),
        (dict(samples=1.5), ArgumentError),
    ],
)
def test_a_bad_event_is_refused_when_it_is_made(fields, error):
    with pytest.raises(error, match=next(iter(fields))):
        Event(**(dict(fn=height) | fields))


def test_a_reset_that_returns_something_else_is_named():
    for answer, error in ((lambda t, y: y[:1], ArgumentError), (lambda t, y: 3.0, ArgumentTypeError)):
        with pytest.raises(error, match=r"reset of events\[0\]"):
            solve(fall, double(1.0, 0.0), [0, 2], events=[Event(height, reset=answer)])


def test_transforms_are_refused():
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.vmap(lambda y: solve(fall, y, [0, 1], num_steps=3, events=[Event(height)]).y)(torch.ones(3, 2))


def test_a_reset_in_place_does_not_change_what_is_reported():
    def turned(t, y):
        y[1] *= -1
        return y

    event = solve(fall, double(1.0, 0.0), [0, INF], events=[Event(height, reset=turned)]).events[0]
    assert event.y[1] == -event.after[1] < 0


def test_inference_mode():
    with torch.inference_mode():
        restitution = torch.tensor(0.5, dtype=D)
        solution = solve(fall, double(1.0, 0.0), [0, INF], args=(restitution,), events=[BALL], max_events=5)
        assert (times(solution) - bounces(double(1.0)[0], restitution, 5)).abs().max() < 1e-10


def test_roots_of_many_functions_at_once():
    """Simple, multiple, flat and steep ones, and a step."""
    roots = torch.linspace(0.05, 0.95, 7, dtype=D).numpy()
    import numpy as np

    functions = [
        lambda x: x - roots, lambda x: (x - roots) ** 3, lambda x: np.exp(20 * (x - roots)) - 1,
        lambda x: np.arctan(1e6 * (x - roots)), lambda x: np.where(x < roots, -1.0, 1.0),
    ]  # fmt: skip
    for f in functions:
        calls = []

        def counted(x, f=f, calls=calls):
            calls.append(x)
            return f(x)

        a, b = np.zeros(7), np.ones(7)
        least = lambda a, b: np.spacing(np.maximum(a, b))
        found = chandrupatla(counted, a, b, f(a), f(b), np.ones(7, dtype=bool), least)
        assert np.abs(found - roots).max() < 1e-5 if f is functions[1] else 1e-15
        assert len(calls) <= 70


# --- derivatives -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_second_derivatives_of_the_time_of_an_event(batch_dim):
    """te = t0 + ln(y0 / c) for y' = -y: the Hessian in (y0, c) is diag(-1 / y0^2, 1 / c^2)."""
    y0 = double(3.0) if batch_dim is None else double([3.0], [5.0])
    level = lambda t, y, c: y[..., 0] - c

    def time(y0, c, t0):
        t = torch.stack([t0, t0 + 50])
        how = dict(args=(c,), events=[Event(level)], rtol=1e-11, atol=1e-13, batch_dim=batch_dim)
        return solve(decay, y0, t, **how).events[0].t.sum()

    c, t0 = torch.tensor(1.2, dtype=D), torch.tensor(0.3, dtype=D)
    inputs = [x.clone().requires_grad_() for x in (y0, c, t0)]
    count = y0.shape[0]
    first = torch.autograd.grad(time(*inputs), inputs, create_graph=True)
    for found, wanted in zip(first, (1 / y0, -count / c, torch.tensor(float(count), dtype=D)), strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-8, atol=1e-8)
    by_y = torch.autograd.grad(first[0].sum(), inputs, retain_graph=True, materialize_grads=True)
    by_c = torch.autograd.grad(first[1], inputs, materialize_grads=True)
    for found, wanted in zip((*by_y, *by_c), (-1 / y0**2, 0 * c, 0 * t0, 0 * y0, count / c**2, 0 * t0), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("method", "batch_dim"), [("rk4", None), ("rk4", 0), ("explicit_adams", None)])
def test_derivatives_through_resets_are_those_of_differences(method, batch_dim):
    """With fixed steps everything is a smooth function: first and second derivatives to all that there is."""

    def f(t, y, w):
        return torch.stack([y[..., 1], -w * torch.sin(y[..., 0]) - 0.1 * t * y[..., 0]], -1)

    level = lambda t, y, w, c: y[..., 0] - c - 0.05 * t
    kick = lambda t, y, w, c: torch.stack([y[..., 0] + 0.3 * c, -0.8 * y[..., 1] + 0.1 * t * w], -1)
    events = [Event(level, direction=-1, terminal=False, reset=kick), Event(lambda t, y, w, c: y[..., 1] - c, terminal=False)]

    def everything(y0, w, c, t0):
        t = torch.stack([t0, t0 + 0.7, t0 + 1.9])
        g = lambda t, y, w, c: f(t, y, w)
        how = dict(args=(w, c), events=events, method=method, dt=0.3, batch_dim=batch_dim)
        solution = solve(g, y0, t, **how)
        parts = [x for event in solution.events for x in (event.t, event.y, event.after)]
        assert len(solution.events) >= 2
        return torch.cat([x.nan_to_num().flatten() for x in (*parts, solution.y, solution.last.y)])

    y0 = double(0.5, -0.4) if batch_dim is None else double([0.5, -0.4], [0.7, -0.2])
    inputs = [x.requires_grad_() for x in (y0, *double(1.7, 0.2, 0.1).unbind())]
    inputs = [x.detach().requires_grad_() for x in inputs]
    # The position of the event differs by its rounding from one call to the next.
    assert torch.autograd.gradcheck(everything, inputs, atol=1e-6, rtol=1e-5)
    assert torch.autograd.gradgradcheck(everything, inputs, atol=1e-5, rtol=1e-4, fast_mode=True)


INDEX = torch.tensor([0, 1, 1, 2, 0, 2])
MODES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "joint": ((2,), {}),
    "samples": ((4, 2), dict(batch_dim=0)),
    "groups": ((6, 2), dict(batch_index=INDEX)),
}


class Pendulum(nn.Module):
    """Nonlinear, not autonomous, with events that have a parameter of their own and a captured tensor."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.captured = [torch.tensor(0.15, dtype=D, requires_grad=True)]
        self.level = Level(self)

    def wide(self, t: Tensor) -> Tensor:
        return t if self.mode == "joint" else (t[INDEX] if self.mode == "groups" else t).unsqueeze(-1)

    def forward(self, t: Tensor, y: Tensor, w: Tensor) -> Tensor:
        slope = torch.stack([y[..., 1], -w * torch.sin(y[..., 0]) - 0.1 * y[..., 1]], -1)
        return slope + 0.03 * torch.sin(self.wide(t)) * y

    def kick(self, t: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return y * double(1.0, -0.8) + 0.01 * self.wide(t) * w * self.captured[0]


class Level(nn.Module):
    def __init__(self, field: Pendulum) -> None:
        super().__init__()
        self.field = [field]
        self.bias = nn.Parameter(torch.tensor(0.2, dtype=D))

    def forward(self, t: Tensor, y: Tensor, w: Tensor) -> Tensor:
        x = y[..., 0]
        if self.field[0].mode == "groups":
            x = torch.zeros(3, dtype=D).index_add(0, INDEX, x)
        return x - self.bias * w - 0.1 * t - 0.1 * self.field[0].captured[0]


def gradients(mode: str, adjoint: str, kind: str, **options: Any) -> tuple[Any, list[Tensor]]:
    """A solution, and the gradients of a weighted sum of all of it to y0, w, t, the captured tensor and the parameter."""
    torch.manual_seed(1)
    shape, how = MODES[mode]
    field = Pendulum(mode)
    y0 = (torch.randn(shape, dtype=D) + double(1.0, 0.5)).requires_grad_()
    w = torch.tensor(1.7, dtype=D, requires_grad=True)
    t = double(0, 0.7, 1.5, 2.2, 4.0).requires_grad_()
    level, kick = field.level, field.kick
    events = {
        "terminal": [Event(level)],
        "reset": [Event(level, terminal=False, reset=kick)],
        "notes": [Event(level, terminal=False)],
        "both": [Event(level, terminal=False), Event(level, direction=-1, terminal=False, reset=kick)],
    }[kind]
    solution = solve(field, y0, t, args=(w,), events=events, adjoint=adjoint, **how, **options)
    torch.manual_seed(2)
    parts = [x for event in solution.events for x in (event.t, event.y, event.after)]
    assert parts
    loss = sum((x.nan_to_num() * torch.randn_like(x)).sum() for x in (*parts, solution.y, solution.last.y))
    return solution, list(torch.autograd.grad(loss, [y0, w, t, field.captured[0], level.bias]))


def distance(found: list[Tensor], reference: list[Tensor]) -> float:
    return max(float((x - r).norm() / r.norm()) for x, r in zip(found, reference, strict=True))


QUICK = [("dopri5", {}), ("rk4", dict(dt=0.05))]
LONG = [
    ("bosh3", {}), ("abm", {}), ("implicit_adams", dict(dt=0.05)), ("prox_euler", dict(dt=0.05)),
    ("prox_bdf", dict(rtol=1e-4)), ("explicit_adams", dict(num_steps=80)), ("rk4", dict(controller="fixed")),
]  # fmt: skip
REPLAYED = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)]


@pytest.mark.parametrize("kind", ["terminal", "reset", "notes", "both"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("method", "options"), REPLAYED)
def test_checkpoints_have_the_gradient_of_backprop(mode, kind, method, options):
    reference = gradients(mode, "backprop", kind, method=method, **options)
    found = gradients(mode, "checkpoint", kind, method=method, **options)
    assert len(found[0].events) == len(reference[0].events)
    assert distance(found[1], reference[1]) < 1e-10
    few = gradients(mode, "checkpoint", kind, method=method, checkpoints=2, **options)
    assert distance(few[1], reference[1]) < 1e-10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("save", [None, "final"])
def test_backsolve_to_a_terminal_event(mode, save):
    tight = dict(rtol=1e-10, atol=1e-12, save=save)
    reference = gradients(mode, "backprop", "terminal", **tight)
    found = gradients(mode, "backsolve", "terminal", **tight)
    assert (found[0].status == Status.EVENT).all()
    assert distance(found[1], reference[1]) < 1e-6


@pytest.mark.parametrize("fields", [dict(terminal=False), dict(reset=lambda t, y: y), dict(terminal=False, reset=lambda t, y: y)])
def test_backsolve_refuses_other_events(fields):
    y0 = double(3.0).requires_grad_()
    with pytest.raises(UnsupportedError, match=r"events\[0\].*checkpoint"):
        solve(decay, y0, [0, 2], adjoint="backsolve", events=[Event(below_one, **fields)])


def test_the_time_of_a_boolean_event_is_a_constant():
    y0 = double(3.0).requires_grad_()
    for adjoint in ("backprop", "checkpoint", "backsolve"):
        solution = solve(decay, y0, [0, INF], events=[Event(lambda t, y: y[0] < 1)], adjoint=adjoint)
        slope = torch.autograd.grad(solution.events[0].y.sum(), y0)[0]
        assert abs(slope - 1 / 3) < 1e-5  # exp(-te), te fixed


def test_dense_output_up_to_an_event_carries_gradients():
    y0 = double(2.0, 0.0).requires_grad_()
    restitution = torch.tensor(0.7, dtype=D, requires_grad=True)
    solution = solve(fall, y0, [0, INF], args=(restitution,), events=[BALL], max_events=3, dense=True)
    place = double(0.9)
    found = torch.autograd.grad(solution.dense(place)[0, 0], (y0, restitution))
    # After the first bounce: y = e v1 s - g s^2 / 2 with s = t - t1.
    t1 = torch.sqrt(2 * y0[0] / G)
    s = place[0] - t1
    wanted = torch.autograd.grad(restitution * G * t1 * s - 0.5 * G * s * s, (y0, restitution))
    assert abs(found[0][0] - wanted[0][0]) < 1e-8
    assert abs(found[1] - wanted[1]) < 1e-8
