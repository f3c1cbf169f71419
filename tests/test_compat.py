"""``import solvers as torchdiffeq``: signatures, semantics, errors and warnings of torchdiffeq's public functions."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import solvers as torchdiffeq
from solvers import ProxodeError, UnsupportedError
from solvers.compat.options import ADAPTIVE

ROOT = Path(__file__).resolve().parents[1]
T = torch.tensor([0.0, 1.0], dtype=torch.float64)
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")


def decay(t, y):
    return -y


def y0(*shape, **kwargs):
    return torch.ones(*shape, dtype=torch.float64, **kwargs)


class Net(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.linear = nn.Linear(2, 2, dtype=dtype)
        self.unused = nn.Linear(2, 2, dtype=dtype)
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return torch.tanh(self.linear(y)) * t.cos()


# -- signatures and semantics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, positional, keywords",
    [
        ("odeint", "func y0 t", {"rtol": 1e-7, "atol": 1e-9, "method": None, "options": None, "event_fn": None}),
        (
            "odeint_adjoint",
            "func y0 t",
            {"rtol": 1e-7, "atol": 1e-9, "method": None, "options": None, "event_fn": None, "adjoint_rtol": None,
             "adjoint_atol": None, "adjoint_method": None, "adjoint_options": None, "adjoint_params": None},
        ),
        ("odeint_dense", "func y0 t0 t1", {"rtol": 1e-7, "atol": 1e-9, "method": None, "options": None}),
    ],
)
def test_signatures(name, positional, keywords):
    parameters = inspect.signature(getattr(torchdiffeq, name)).parameters
    assert " ".join(p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD) == positional
    found = {p.name: p.default for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert {key: found[key] for key in keywords} == keywords


@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED, "explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver"])
@pytest.mark.parametrize("backwards", [False, True])
def test_every_method_solves_a_tensor_and_a_tuple(method, backwards):
    options = {"max_order": 5} if "adams" in method else {}
    if method in FIXED or "adams" in method:
        options["step_size"] = 0.002
    t = torch.linspace(0, 1, 4, dtype=torch.float64)
    t = t.flip(0) if backwards else t
    exact = torch.exp(-(t - t[0])).view(-1, 1, 1) * y0(2, 3)
    y = torchdiffeq.odeint(decay, y0(2, 3), t, method=method, options=options)
    assert torch.equal(y[0], y0(2, 3))
    assert (y - exact).abs().max() < 4e-3
    pair = torchdiffeq.odeint(lambda t, y: (-y[0], y[1]), (y0(2, 3), y0(4)), t, method=method, options=options)
    assert isinstance(pair, tuple) and pair[0].shape == (4, 2, 3) and pair[1].shape == (4, 4)
    assert (pair[0] - exact).abs().max() < 4e-3


def test_t_is_a_tensor_of_the_states_dtype_and_user_code_may_mark_its_arguments():
    seen = []

    def f(t, y):
        seen.append((t.dtype, t.dim()))
        with torch.enable_grad():
            t.requires_grad_(True)
            y.requires_grad_(True)
            (slope,) = torch.autograd.grad((torch.sin(t) * y).sum(), y)
        return slope

    state = torch.zeros(3)
    with torch.no_grad():
        y = torchdiffeq.odeint(f, state, T, rtol=1e-6, atol=1e-6)
    assert set(seen) == {(torch.float32, 0)}
    assert (y[-1] - (1 - math.cos(1.0))).abs().max() < 1e-5


def test_one_time_gives_the_start_and_options_are_left_alone():
    options = {"first_step": 0.1, "jump_t": [0.5]}
    torchdiffeq.odeint(decay, y0(2), T, options=options)
    assert options == {"first_step": 0.1, "jump_t": [0.5]}
    for method in ("dopri5", "rk4", "scipy_solver"):
        assert torch.equal(torchdiffeq.odeint(decay, y0(2), T[:1], method=method), y0(1, 2))


def test_dopri5_takes_no_more_evaluations_than_documented():
    net = Net()
    accepted, attempts = [], []
    net.callback_step = lambda t, y, dt: attempts.append(float(t))
    net.callback_accept_step = lambda t, y, dt: accepted.append(float(dt))
    torchdiffeq.odeint(net, y0(2), T)
    assert net.calls == 2 + 6 * len(attempts)
    assert sum(accepted) == pytest.approx(1.0, abs=1e-12)


def test_callbacks_see_times_as_they_are_and_tuples_as_tuples():
    net = Net()
    seen = []

    class Pair(nn.Module):
        def forward(self, t, y):
            return net(t, y[0]), -y[1]

        def callback_step(self, t, y, dt):
            seen.append((float(t), type(y), float(dt)))

    torchdiffeq.odeint(Pair(), (y0(2), y0(3)), T.flip(0), method="euler", options={"step_size": 0.5})
    assert [(t, kind) for t, kind, _ in seen] == [(1.0, tuple), (0.5, tuple)]
    assert [dt for _, _, dt in seen] == pytest.approx([0.5, 0.5], rel=1e-15)


@pytest.mark.parametrize("method", FIXED)
def test_perturbed_times_lie_inside_their_steps(method):
    for perturb in (False, True):
        times = []

        def f(t, y, times=times):
            times.append(float(t))
            return -y

        torchdiffeq.odeint(f, y0(2), T, method=method, options={"step_size": 0.5, "perturb": perturb})
        assert not ({0.0, 0.5, 1.0} & set(times)) if perturb else {0.0, 0.5} <= set(times)
        assert min(times) >= 0 and max(times) <= 1


def test_a_grid_constructor_says_where_steps_end():
    def grid(func, y0, t):
        return t[0] + (t[1] - t[0]) * torch.linspace(0, 1, 11, dtype=t.dtype) ** 2

    times = []

    def f(t, y):
        times.append(float(t))
        return y

    y = torchdiffeq.odeint(f, y0(1), T, method="euler", options={"grid_constructor": grid})
    nodes = torch.linspace(0, 1, 11, dtype=torch.float64) ** 2
    assert times == pytest.approx(nodes[:-1].tolist(), abs=1e-15)
    assert float(y[-1]) == pytest.approx(float((1 + nodes.diff()).prod()), rel=1e-14)


def test_interpolation_between_fixed_steps():
    t = torch.tensor([0.0, 0.123, 1.0], dtype=torch.float64)
    error = {}
    for interp in ("linear", "cubic", None):
        options = {"step_size": 0.05} | ({} if interp is None else {"interp": interp})
        y = torchdiffeq.odeint(decay, y0(1), t, method="rk4", options=options)
        error[interp] = abs(float(y[1, 0]) - math.exp(-0.123))
    assert error["cubic"] == error[None] < 1e-6 < 1e-4 < error["linear"]


def test_min_step_is_obeyed_with_a_warning():
    with pytest.warns(UserWarning, match="min_step were accepted"):
        torchdiffeq.odeint(lambda t, y: -1000 * y, y0(1), T, options={"min_step": 0.1})


def test_adams_orders_and_warnings():
    def observed(method, max_order):
        errors = []
        for n in (20, 40):
            t = torch.linspace(0, 2, n + 1, dtype=torch.float64)
            options = {"max_order": max_order, "max_iters": 20}
            if method == "explicit_adams":
                del options["max_iters"]
            y = torchdiffeq.odeint(lambda t, y: -y + t.sin(), y0(1), t, method=method, options=options)
            exact = 1.5 * torch.exp(-t) + (t.sin() - t.cos()) / 2
            errors.append(float((y[:, 0] - exact).abs().max()))
        return math.log2(errors[0] / errors[1])

    assert observed("explicit_adams", 5) == pytest.approx(4, abs=0.6)
    assert observed("implicit_adams", 4) == pytest.approx(4, abs=0.6)
    with pytest.warns(UserWarning, match="'max_order': 5"):
        torchdiffeq.odeint(decay, y0(1), T, method="explicit_adams")
    with pytest.warns(UserWarning, match="reduces to `rk4`"):
        torchdiffeq.odeint(decay, y0(1), T, method="implicit_adams", options={"max_order": 3})


def test_an_adams_corrector_stops_when_it_has_converged_and_warns_when_it_has_not():
    def solved(rate, calls):
        def func(t, y):
            calls.append(0)
            return -rate * y

        options = {"step_size": 0.02, "max_order": 4, "max_iters": 30}
        return torchdiffeq.odeint(func, y0(2), T, method="implicit_adams", options=options)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few, many = [], []
        assert (solved(0.1, few)[-1] - math.exp(-0.1)).abs().max() < 1e-8
        assert (solved(10.0, many)[-1] - math.exp(-10.0)).abs().max() < 1e-4
    assert len(few) < len(many) < 50 * 30
    with pytest.warns(UserWarning, match="Functional iteration did not converge. Solution may be incorrect."):
        solved(1000.0, [])


def test_native_methods_samples_and_arguments():
    mu = torch.tensor([1.0, 30.0], dtype=torch.float64)
    y = torchdiffeq.odeint(lambda t, y, mu: -mu.unsqueeze(-1) * y, y0(2, 1), T, method="tsit5", batch_dim=0, args=(mu,))
    assert torch.allclose(y[-1, :, 0], torch.exp(-mu), rtol=1e-5, atol=1e-9)
    y = torchdiffeq.odeint(decay, y0(2), T, method="prox_euler", options={"step_size": 0.01, "inner_tol": 1e-3})
    assert (y[-1] - math.exp(-1)).abs().max() < 5e-3


def test_answers_in_another_dtype_or_shape_are_taken_as_torchdiffeq_takes_them():
    y = torchdiffeq.odeint(lambda t, y: -y.double(), torch.ones(3), T)
    assert y.dtype == torch.float32
    pair = torchdiffeq.odeint(lambda t, y: [-y[0], y[1].sum(1)], (y0(2, 3), y0(2, 1)), T)
    assert pair[1].shape == (2, 2, 1)
    with pytest.raises(ProxodeError, match="shape"):
        torchdiffeq.odeint(lambda t, y: y.sum(), y0(3), T, method="euler")


# -- scipy and dense --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA"])
def test_scipy_reports_that_a_solution_ends(solver):
    t = torch.linspace(0, 2, 11, dtype=torch.float64)
    with pytest.raises(torchdiffeq.SolveError, match="scipy's") as caught:
        torchdiffeq.odeint(lambda t, y: y**2, y0(1), t, method="scipy_solver", options={"solver": solver, "max_nfe": 3000})
    y = caught.value.solution.y
    assert y.shape == (11, 1) and torch.allclose(y[:4, 0], 1 / (1 - t[:4]), rtol=1e-4) and torch.isnan(y[-1]).all()


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "rk4", "prox_euler"])
def test_dense_output_backwards_by_its_own_times(method):
    t0 = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    options = {"step_size": 0.01} if method in ("rk4", "prox_euler") else {}
    solution = torchdiffeq.odeint_dense(decay, y0(3), t0, T[0], method=method, options=options)
    t = torch.tensor([0.25, 0.9], dtype=torch.float64, requires_grad=True)
    y = solution(t)
    exact = torch.exp(1 - t.detach())
    assert y.shape == (2, 3) and (y[:, 0] - exact).abs().max() < (1e-2 if method == "prox_euler" else 1e-5)
    assert solution(0.5).shape == (3,)
    slope, start = torch.autograd.grad(y[0, 0], (t, t0))
    assert slope[0] == pytest.approx(-float(exact[0]), rel=2e-2) and start == pytest.approx(float(exact[0]), rel=2e-2)
    with pytest.raises(ProxodeError, match="outside"):
        solution(1.5)


# -- adjoint ----------------------------------------------------------------------------------------------------------


def gradients(odeint, net, t, **kwargs):
    start = y0(3, 2).requires_grad_()
    t = t.clone().requires_grad_()
    y = odeint(net, start, t, **kwargs)
    weight = torch.linspace(0, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return torch.autograd.grad((y * weight).sum(), (start, t, net.linear.weight))


ASKED = [
    {},
    {"adjoint_rtol": 1e-9},
    {"adjoint_method": "dopri8"},
    {"adjoint_options": {"norm": "seminorm"}},
    {"adjoint_options": {"norm": lambda s: torch.stack([x.abs().max() for x in s if x.numel()]).max()}},
    {"adjoint_options": {"first_step": 0.01}},
    {"options": {"jump_t": torch.tensor([0.5])}},
    {"rtol": torch.full((3, 2), 1e-7, dtype=torch.float64)},
]


@pytest.mark.parametrize("kwargs", ASKED, ids=[" ".join(k) or "default" for k in ASKED])
def test_adjoint_gradients_agree_with_backprop(kwargs):
    net = Net()
    t = torch.linspace(0, 2, 5, dtype=torch.float64)
    mine = gradients(torchdiffeq.odeint_adjoint, net, t, **kwargs)
    same = {key: value for key, value in kwargs.items() if not key.startswith("adjoint")}
    for found, expected in zip(mine, gradients(torchdiffeq.odeint, net, t, **same)):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_adjoint_callbacks_see_the_backward_steps():
    net = Net()
    steps = []
    net.callback_step_adjoint = lambda t, y, dt: steps.append((float(t), float(dt)))
    y = torchdiffeq.odeint_adjoint(net, y0(2), T, method="rk4", options={"step_size": 0.25})
    assert steps == []
    y.sum().backward()
    assert [t for t, _ in steps] == [1.0, 0.75, 0.5, 0.25]
    assert [dt for _, dt in steps] == pytest.approx([0.25] * 4, rel=1e-15)
    assert torch.equal(net.unused.weight.grad, torch.zeros(2, 2, dtype=torch.float64))


def test_adjoint_parameters_restrict_and_captured_tensors_are_found():
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    net = Net()

    class Captures(nn.Module):
        def forward(self, t, y):
            return scale * net(t, y)

    torchdiffeq.odeint_adjoint(Captures(), y0(2), T)[-1].sum().backward()
    assert scale.grad is not None and net.linear.weight.grad is not None
    scale.grad = net.linear.weight.grad = None
    start = y0(2, requires_grad=True)
    torchdiffeq.odeint_adjoint(Captures(), start, T, adjoint_params=(x for x in [scale]))[-1].sum().backward()
    assert scale.grad is not None and net.linear.weight.grad is None and start.grad is not None


def test_the_backward_norm_can_be_replaced_on_the_graph():
    called = []
    y = torchdiffeq.odeint_adjoint(Net(), y0(3, 2).requires_grad_(), T)

    def norm(state):
        called.append([tuple(x.shape) for x in state])
        return torch.stack([x.abs().max() for x in state]).max()

    y.grad_fn.adjoint_options["norm"] = norm
    y.sum().backward()
    assert called[0] == [(), (3, 2), (3, 2), (2, 2), (2,), (2, 2), (2,)]


# -- events -----------------------------------------------------------------------------------------------------------


def falling(t, y):
    speed = y[1]
    return speed, torch.full_like(speed, -9.81)


@pytest.mark.parametrize("interface", ["odeint", "odeint_adjoint"])
@pytest.mark.parametrize("method, options", [("dopri5", {}), ("bosh3", {}), ("rk4", {"step_size": 0.01})])
def test_an_event_has_the_time_and_gradients_of_the_closed_form(interface, method, options):
    start = y0(1).mul(10).requires_grad_()
    ground = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    t0 = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    extra = {"adjoint_params": (ground,)} if interface == "odeint_adjoint" else {}
    time, (height, speed) = torchdiffeq.odeint_event(
        falling, (start, torch.zeros(1, dtype=torch.float64)), t0, event_fn=lambda t, y: y[0] - ground, method=method,
        options=options, odeint_interface=getattr(torchdiffeq, interface), **extra,
    )
    fall = math.sqrt(2 * 8 / 9.81)
    assert float(time.detach()) == pytest.approx(1 + fall, rel=1e-6)
    assert height.shape == (2, 1) and height[0] == start and float(height[1].detach()) == pytest.approx(2, rel=1e-9)
    found = torch.autograd.grad(time, (start, ground, t0), retain_graph=True)
    assert [float(x) for x in found] == pytest.approx([1 / (9.81 * fall), -1 / (9.81 * fall), 1.0], rel=1e-5)
    (slope,) = torch.autograd.grad(speed[-1], start)
    assert float(slope) == pytest.approx(-1 / fall, rel=1e-5)


def test_events_backwards_of_several_elements_and_in_second_order():
    state = y0(3, requires_grad=True)
    levels = torch.tensor([3.0, 2.0, 4.0], dtype=torch.float64)
    time, _ = torchdiffeq.odeint_event(decay, state, T[0], event_fn=lambda t, y: y - levels, reverse_time=True)
    assert time.dtype == T.dtype and float(time.detach()) == pytest.approx(-math.log(2), rel=1e-6)
    (first,) = torch.autograd.grad(time, state, create_graph=True)
    assert torch.allclose(first.detach(), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64), atol=1e-6)
    (second,) = torch.autograd.grad(first[1], state)
    assert float(second[1]) == pytest.approx(-1.0, rel=1e-4)
    many = torch.linspace(2, 5, 20, dtype=torch.float64)
    time, _ = torchdiffeq.odeint(decay, y0(20), T.flip(0), event_fn=lambda t, y: y - many)
    assert float(time) == pytest.approx(1 - math.log(2), rel=1e-6)


def test_what_is_zero_at_the_start_fires_when_it_comes_back():
    up = torch.tensor([5.0], dtype=torch.float64)
    time, _ = torchdiffeq.odeint_event(falling, (0 * up, up), T[0], event_fn=lambda t, y: y[0])
    assert float(time) == pytest.approx(10 / 9.81, rel=1e-6)
    time, _ = torchdiffeq.odeint_event(falling, (0 * up, up), T[0], event_fn=lambda t, y: y[1] < 0)
    assert float(time) == pytest.approx(5 / 9.81, rel=1e-5)


def test_an_event_that_never_comes_is_given_up_with_fixed_steps():
    with pytest.raises(RuntimeError) as caught:
        torchdiffeq.odeint_event(decay, y0(1), T[0], event_fn=lambda t, y: y + 1, method="euler", options={"step_size": 0.1})
    assert caught.value.solution.stats.nfe >= 20_000


# -- strict -----------------------------------------------------------------------------------------------------------


def matrix(dtype):
    return torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=dtype)


PROBLEMS = {
    "decay": lambda t, y: -y,
    "growth": lambda t, y: 0.7 * y,
    "forced": lambda t, y: -y + torch.sin(3 * t),
    "spiral": lambda t, y: (y**3) @ matrix(y.dtype),
    "rotation": lambda t, y: y @ matrix(y.dtype),
    "logistic": lambda t, y: y * (1 - y / 3),
    "pendulum": lambda t, y: torch.stack([y[..., 1], -torch.sin(y[..., 0])], -1),
    "van_der_pol": lambda t, y: torch.stack([y[..., 1], 3 * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1),
    "time_only": lambda t, y: torch.cos(5 * t) * torch.ones_like(y),
    "bernoulli": lambda t, y: -(y**2) * (1 + t),
    "stiffish": lambda t, y: -10 * (y - torch.cos(t)),
    "lotka": lambda t, y: y * torch.stack([1 - y[..., 1], y[..., 0] - 1], -1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "euler", "midpoint", "rk4"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_strict_takes_the_steps_of_torchdiffeq(problem, method, backwards, dtype):
    original = pytest.importorskip("torchdiffeq")
    field = PROBLEMS[problem]
    t = torch.linspace(0, 1.5, 8, dtype=torch.float64)
    if backwards:
        t = -t if problem in ("stiffish", "bernoulli") else t.flip(0)
    state = torch.tensor([1.2, 0.6], dtype=dtype)
    adaptive = method in ADAPTIVE
    rtol, atol = (1e-5, 1e-7) if adaptive else (1e-10, 1e-10)
    options = {} if adaptive else {"step_size": 0.04}
    found = {}
    for name, package, extra in (("ours", torchdiffeq, {"strict": True}), ("theirs", original, {})):
        steps = []

        class Watched(nn.Module):
            def forward(self, t, y):
                return field(t, y)

            def callback_step(self, t0, y0, dt, steps=steps):
                steps.append((float(t0), float(dt)))

        y = package.odeint(Watched(), state, t, rtol=rtol, atol=atol, method=method, options=options, **extra)
        found[name] = y, torch.tensor(steps, dtype=torch.float64)
    (mine, steps), (theirs, expected) = found["ours"], found["theirs"]
    if dtype == torch.float64:
        assert steps.shape == expected.shape
        assert torch.allclose(steps, expected, rtol=1e-10, atol=1e-13)
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-13)
    else:
        assert abs(len(steps) - len(expected)) <= 1
        assert ((mine - theirs).abs() <= 10 * (1e-5 * theirs.abs() + 1e-6)).all()


# -- errors and warnings ----------------------------------------------------------------------------------------------

BAD = {
    "method": ("odeint(f, y, T, method='foo')", ValueError, 'Invalid method "foo". Must be one of {'),
    "t type": ("odeint(f, y, [0.0, 1.0])", AssertionError, "t must be a torch.Tensor"),
    "t shape": ("odeint(f, y, T[None])", AssertionError, "t must be one dimensional"),
    "t order": ("odeint(f, y, torch.tensor([0.0, 1.0, 0.5]))", AssertionError, "t must be strictly increasing or decreasing"),
    "t nan": ("odeint(f, y, torch.tensor([0.0, float('nan')]))", AssertionError, "t must be strictly increasing"),
    "t integer": ("odeint(f, y, torch.tensor([0, 1]))", TypeError, "`t` must be a floating point Tensor but is a torch.LongT"),
    "y0 list": ("odeint(f, [y], T)", AssertionError, "y0 must be either a torch.Tensor or a tuple"),
    "y0 dict": ("odeint(f, {'a': y}, T)", AssertionError, "y0 must be either a torch.Tensor or a tuple"),
    "y0 integer": ("odeint(f, torch.ones(2, dtype=torch.int64), T)", TypeError, "y0 must be floating"),
    "rtol grad": ("odeint(f, y, T, rtol=torch.tensor(1e-3, requires_grad=True))", AssertionError, "rtol cannot require gradient"),
    "atol grad": ("odeint(f, y, T, atol=torch.tensor(1e-3, requires_grad=True))", AssertionError, "atol cannot require gradient"),
    "rtol length": ("odeint(f, (y,), T, rtol=(1e-3, 1e-3))", AssertionError, "If using tupled rtol it must have the same length"),
    "grid and size": (
        "odeint(f, y, T, method='euler', options={'step_size': 0.1, 'grid_constructor': len})", ValueError, "mutually exclusive",
    ),
    "grid": (
        "odeint(f, y, T, method='euler', options={'grid_constructor': lambda *_: torch.linspace(0, 0.5, 3)})",
        AssertionError, "grid from t[0] to t[-1]",
    ),
    "interp": ("odeint(f, y, T, method='rk4', options={'interp': 'bad'})", ValueError, "Unknown interpolation method bad"),
    "step_t": ("odeint(f, y, T, options={'step_t': [0.1, 0.1]})", ValueError, "must not have any repeated elements"),
    "steps": ("odeint(f, y, T, options={'max_num_steps': 2})", AssertionError, "max_num_steps exceeded (2>=2)"),
    "underflow": ("odeint(lambda t, y: y**2, y, 2 * T)", AssertionError, "underflow in dt"),
    "nan": ("odeint(f, y * float('nan'), T)", AssertionError, "non-finite values in state `y`"),
    "nan underflow": ("odeint(f, y * float('nan'), T)", AssertionError, "underflow in dt"),
    "adjoint params": ("odeint_adjoint(f, y, T)", ValueError, "func must be an instance of nn.Module"),
    "adjoint options": (
        "odeint_adjoint(f, y, T, adjoint_params=(), adjoint_method='euler', options={'first_step': 0.1})",
        ValueError, "If `adjoint_method != method`",
    ),
    "event times": (
        "odeint(f, y, torch.linspace(0, 1, 3), event_fn=lambda t, y: y.sum() - 1)", ValueError, "We require len(t) == 2",
    ),
    "event steps": (
        "odeint(f, y, T, event_fn=lambda t, y: y.sum() - 1, method='euler')", AssertionError, "requires `step_size`",
    ),
    "event type": ("odeint(f, y, T, event_fn=3)", TypeError, "event_fn must be callable"),
    "max_order": ("odeint(f, y, T, method='explicit_adams', options={'max_order': 13})", AssertionError, "at most 12"),
    "first_step": ("odeint(f, y, T, options={'first_step': -0.1})", ValueError, "first_step must be positive"),
    "options": ("odeint(f, y, T, options=3)", TypeError, "options must be a dict"),
    "scipy": ("odeint(f, y, T, method='scipy_solver', options={'solver': 'x'})", ValueError, "solver must be one of"),
    "strict": ("odeint(f, y, T, method='dopri8', strict=True)", ValueError, "strict=True reproduces"),
    "dense": ("odeint_dense(f, y, 'a', 1.0)", AssertionError, "t0 must be a torch.Tensor"),
}
NAMES = {
    "torch": torch, "T": T, "f": decay, "y": y0(2), "odeint": torchdiffeq.odeint,
    "odeint_adjoint": torchdiffeq.odeint_adjoint, "odeint_dense": torchdiffeq.odeint_dense,
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_raises_what_torchdiffeq_raises(case):
    call, kind, text = BAD[case]
    with pytest.raises(kind) as caught:
        eval(call, NAMES)
    assert text in str(caught.value)
    if case != "t integer":
        assert isinstance(caught.value, ProxodeError)


def test_bad_input_is_refused_without_assertions():
    lines = [
        f"try:\n    {call}\nexcept {kind.__name__} as error:\n    check(str(error), {text!r})\nelse:\n    missed.append({case!r})"
        for case, (call, kind, text) in BAD.items()
    ]
    program = "\n".join(
        [
            "import torch", "from solvers import *", "T = torch.tensor([0.0, 1.0], dtype=torch.float64)",
            "y = torch.ones(2, dtype=torch.float64)", "f = lambda t, y: -y", "missed = []",
            "def check(found, text):\n    if text not in found: missed.append((text, found))",
            *lines, "raise SystemExit(repr(missed) if missed else 0)",
        ]
    )
    done = subprocess.run([sys.executable, "-O", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "kwargs, text",
    [
        ({"options": {"foo": 1}}, "Dopri5Solver: Unexpected arguments {'foo': 1}"),
        ({"method": "rk4", "options": {"first_step": 1}}, "RK4: Unexpected arguments {'first_step': 1}"),
        ({"method": "scipy_solver", "options": {"foo": 1}}, "ScipyWrapperODESolver: Unexpected arguments {'foo': 1}"),
        ({"method": "scipy_solver", "options": {"solver": "RK45", "min_step": 0}}, "no effect for a chosen solver: `min_step`"),
    ],
)
def test_warnings_of_options(kwargs, text):
    with pytest.warns(UserWarning) as caught:
        torchdiffeq.odeint(decay, y0(2), T, **kwargs)
    assert any(text in str(item.message) for item in caught)


def test_warnings_of_callbacks_and_parameters():
    net = Net()
    net.callback_accept_step = lambda *_: None
    with pytest.warns(UserWarning, match="Solver 'rk4' does not support callbacks {'callback_accept_step'}"):
        torchdiffeq.odeint(net, y0(2), T, method="rk4")
    with pytest.warns(UserWarning, match="An adjoint parameter was passed without requiring gradient"):
        torchdiffeq.odeint_adjoint(
            Net(), y0(2), T, adjoint_params=(torch.ones(2),), adjoint_options={"norm": lambda s: s[1].abs().max()}
        )


def test_a_fixed_step_solve_that_overflows_warns_and_returns():
    with pytest.warns(UserWarning, match="not finite"):
        y = torchdiffeq.odeint(lambda t, y: y**3, y0(1), 100 * T, method="euler", options={"step_size": 1.0})
    assert torch.isfinite(y[0]).all() and torch.isnan(y[-1]).all()


def test_quiet_where_nothing_is_wrong():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torchdiffeq.odeint(decay, y0(2), T, options={"norm": lambda x: x.abs().max(), "dtype": torch.float64})
        torchdiffeq.odeint(decay, y0(2), T, method="euler", options={"norm": None})


@pytest.mark.parametrize("how", [{}, {"method": "rk4", "options": {"step_size": 0.1}}], ids=["dopri5", "rk4"])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.hessian, torch.func.jacfwd])
def test_transforms_go_through_explicit_methods(transform, how) -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    y0 = torch.ones(2, dtype=torch.float64)
    found = transform(lambda y: torchdiffeq.odeint(lambda t, y: -(y**2), y, t, **how)[-1].sum())(y0)
    exact = torch.eye(2, dtype=torch.float64) * -0.25 if transform is torch.func.hessian else torch.full_like(y0, 0.25)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-6)


def test_vmap_is_refused_in_words_where_values_decide() -> None:
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    solution = lambda y, t, **how: torchdiffeq.odeint(lambda t, y: -(y**2), y, t, **how)[-1]
    with pytest.raises(UnsupportedError, match="batch_dim=0"):
        torch.func.vmap(solution, in_dims=(0, None))(torch.ones(2, 2, dtype=torch.float64), t)
    with pytest.raises(UnsupportedError, match="values of t"):
        torch.func.vmap(lambda t: solution(torch.ones(2, dtype=torch.float64), t, method="rk4"))(torch.stack([t, 2 * t]))
