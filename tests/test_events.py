"""Events: where they are found, what follows them, and their derivatives."""

from __future__ import annotations

import math

import pytest
import torch

from solvers import ArgumentError, ArgumentTypeError, Event, Status, UnsupportedError, solve

G = 9.81
DOUBLE = torch.float64


def fall(t, y):
    return torch.stack([y[..., 1], torch.full_like(y[..., 1], -G)], -1)


def height(t, y, *args):
    return y[..., 0]


def bounce(restitution):
    return lambda t, y: torch.stack([torch.zeros_like(y[..., 0]), -restitution * y[..., 1]], -1)


def bounce_time(n, start, restitution):
    """Time of the n-th bounce of a ball dropped from ``start``."""
    return (2 * start / G) ** 0.5 * (1 + 2 * sum(restitution**k for k in range(1, n)))


def decay(t, y):
    return -y


def crossing(level=0.5, **kwargs):
    return Event(lambda t, y: y[..., 0] - level, **kwargs)


def test_twenty_bounces_in_one_call():
    e = torch.tensor(0.9, dtype=DOUBLE, requires_grad=True)
    ball = Event(height, direction=-1, terminal=False, reset=bounce(e))
    y0 = torch.tensor([10.0, 0.0], dtype=DOUBLE)
    sol = solve(fall, y0, (0.0, math.inf), rtol=1e-10, atol=1e-12, events=[ball], max_events=20)
    assert not Status(int(sol.status)).failed and len(sol.events) == 20
    for n, fired in enumerate(sol.events, 1):
        assert float(fired.t.detach()) == pytest.approx(bounce_time(n, 10.0, 0.9), rel=1e-8)
    (slope,) = torch.autograd.grad(sol.events[-1].t, e)
    exact = (2 * 10 / G) ** 0.5 * 2 * sum(k * 0.9 ** (k - 1) for k in range(1, 20))
    assert float(slope) == pytest.approx(exact, rel=1e-6)


def test_a_batch_of_balls_bounces_as_each_alone():
    count = 256
    start = torch.linspace(1, 20, count, dtype=DOUBLE)
    e = torch.linspace(0.5, 0.95, count, dtype=DOUBLE)
    ball = Event(height, direction=-1, terminal=False, reset=bounce(e))
    y0 = torch.stack([start, torch.zeros_like(start)], 1)
    sol = solve(fall, y0, (0.0, math.inf), rtol=1e-9, atol=1e-11, events=[ball], max_events=3, batch_dim=0)
    for n, fired in enumerate(sol.events, 1):
        assert torch.allclose(fired.t, bounce_time(n, start, e), rtol=1e-8)
    assert len(sol.events) == 3


def test_second_derivative_of_an_event_time():
    y0 = torch.tensor([2.0], dtype=DOUBLE, requires_grad=True)
    level = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    sol = solve(decay, y0, (0.0, 10.0), rtol=1e-10, atol=1e-12, events=[crossing(level)])
    time = sol.events[0].t
    assert float(time.detach()) == pytest.approx(math.log(4), rel=1e-9)
    first, by_level = torch.autograd.grad(time, (y0, level), create_graph=True)
    assert float(first.detach()) == pytest.approx(0.5, rel=1e-7)
    assert float(by_level.detach()) == pytest.approx(-2.0, rel=1e-7)
    (second,) = torch.autograd.grad(first.sum(), y0)
    assert float(second) == pytest.approx(-0.25, rel=1e-6)


@pytest.mark.parametrize("method, options", [("dopri5", {}), ("tsit5", {}), ("abm", {}), ("rk4", {"dt": 0.01}), ("dop853", {})])
@pytest.mark.parametrize("backwards", [False, True])
def test_every_kind_of_method_finds_it(method, options, backwards):
    end = -1.0 if backwards else 1.0
    y0 = torch.tensor([1.0], dtype=DOUBLE)
    level = math.exp(-0.6 * end)
    sol = solve(decay, y0, (0.0, end), method=method, events=[crossing(level)], **options)
    assert Status(int(sol.status)) == Status.EVENT
    assert float(sol.events[0].t) == pytest.approx(0.6 * end, rel=1e-5)
    assert float(sol.events[0].y[0]) == pytest.approx(level, rel=1e-9)


def test_an_event_that_is_zero_at_the_start_waits():
    y0 = torch.tensor([0.0, 5.0], dtype=DOUBLE)
    sol = solve(fall, y0, (0.0, 10.0), events=[Event(height)])
    assert float(sol.events[0].t) == pytest.approx(10 / G, rel=1e-6)


def test_direction_and_double_crossings():
    def swing(t, y):
        return torch.stack([y[1], -y[0]])

    y0 = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    for direction, first in ((1, 2 * math.pi + math.pi / 6), (-1, 5 * math.pi / 6), (0, math.pi / 6)):
        event = Event(lambda t, y: y[0] - 0.5, direction=direction)
        start = (1.0, 12.0) if direction == 1 else (0.0, 12.0)
        y = torch.tensor([math.sin(1.0), math.cos(1.0)], dtype=DOUBLE) if direction == 1 else y0
        sol = solve(swing, y, start, rtol=1e-8, events=[event])
        assert float(sol.events[0].t) == pytest.approx(first, rel=1e-6)
    # One step over the whole top of a parabola: up and down through the same level.
    sol = solve(fall, torch.tensor([0.0, 5.0], dtype=DOUBLE), (0.0, 0.9), dt=0.9, method="rk4", events=[
        Event(lambda t, y: y[0] - 1.0, terminal=False)
    ])
    roots = [(5 - math.sqrt(25 - 2 * G)) / G, (5 + math.sqrt(25 - 2 * G)) / G]
    assert [float(f.t) for f in sol.events] == pytest.approx(roots, rel=1e-9)


def test_boolean_events_and_trees():
    sol = solve(
        lambda t, y: {"a": -y["a"]}, {"a": torch.tensor([1.0], dtype=DOUBLE)}, (0.0, 3.0),
        events=[Event(lambda t, y: (y["a"] < 0.25).all())],
    )
    assert float(sol.events[0].t) == pytest.approx(math.log(4), rel=1e-5)
    assert sol.events[0].y["a"].shape == (1,)


def test_outputs_before_the_event_are_kept_and_the_rest_is_nan():
    t = torch.linspace(0, 2, 5, dtype=DOUBLE)
    sol = solve(decay, torch.tensor([1.0], dtype=DOUBLE), t, events=[crossing(0.5)])
    assert torch.allclose(sol.y[:2, 0], torch.exp(-t[:2]), rtol=1e-6) and torch.isnan(sol.y[2:]).all()
    assert sol.last.t == pytest.approx(math.log(2), rel=1e-6)


@pytest.mark.parametrize(
    "events, kind, text",
    [
        ([Event(height)] + [3], ArgumentTypeError, "events"),
        (Event(height), ArgumentTypeError, "events"),
    ],
)
def test_bad_lists_of_events(events, kind, text):
    with pytest.raises(kind, match=text):
        solve(decay, torch.ones(1), (0.0, 1.0), events=events)


@pytest.mark.parametrize("kwargs", [{"direction": 2}, {"samples": -1}, {"reset": 3}])
def test_bad_events(kwargs):
    with pytest.raises((ArgumentError, ArgumentTypeError)):
        Event(height, **kwargs)


def test_an_open_end_needs_a_terminal_event():
    with pytest.raises(ArgumentError):
        solve(decay, torch.ones(1), (0.0, math.inf))


@pytest.mark.parametrize("adjoint", ["checkpoint", "backsolve"])
def test_other_adjoints_refuse_events(adjoint):
    y0 = torch.ones(1, dtype=DOUBLE, requires_grad=True)
    with pytest.raises(UnsupportedError, match="backprop"):
        solve(decay, y0, (0.0, 2.0), events=[crossing(0.5)], adjoint=adjoint)
    with torch.no_grad():
        assert len(solve(decay, y0, (0.0, 2.0), events=[crossing(0.5)], adjoint=adjoint).events) == 1
