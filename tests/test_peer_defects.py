"""Known defects of torchdiffeq and torchode: each row asserts what is right, here and, as a strict xfail, of the peer.

A row takes the module that serves as torchdiffeq. The letters are those of the defects' list: a to u solver logic, A to N
differentiation and events. Rows of torchode take a front that has either package behind it. Rows of torchdiffeq's development
version, which is not to be had as a package, have no counterpart.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
F64 = torch.float64
ROWS: dict[str, Any] = {}


def row(function):
    ROWS[function.__name__] = function
    return function


def times(*values):
    return torch.tensor(values, dtype=F64)


def one(*shape):
    return torch.ones(*shape, dtype=F64)


def ours(td):
    return hasattr(td, "solve")


class Recorded(nn.Module):
    """y' = rhs(t, y), remembering times and accepted steps."""

    def __init__(self, rhs):
        super().__init__()
        self.rhs, self.t, self.ends, self.dts = rhs, [], [], []

    def forward(self, t, y):
        self.t.append(float(t))
        return self.rhs(t, y)

    def callback_accept_step(self, t0, y0, dt):
        self.ends.append(float(t0 + dt))

    def callback_step(self, t0, y0, dt):
        self.dts.append(float(dt))


# -- numerics and solver logic ----------------------------------------------------------------------------------------


@row
def c_heun_is_as_stable_as_heun(td):
    options = {"first_step": 0.1, "min_step": 0.1, "max_step": 0.1}
    y = td.odeint(lambda t, y: -12 * y, one(1), times(0.0, 10.0), method="adaptive_heun", options=options)
    assert abs(y[-1].item()) < 1e-3


@row
def d_output_times_are_as_accurate_as_steps(td):
    t = torch.linspace(0.0, 5.0, 101, dtype=F64)
    for method, bound in (("dopri8", 1e-7), ("bosh3", 1e-6)):
        y = td.odeint(lambda t, y: torch.cos(t) * y, one(1), t, rtol=1e-9, atol=1e-9, method=method)
        assert (y[:, 0] - torch.exp(torch.sin(t))).abs().max() < bound, method


@row
def e_every_step_t_is_met(td):
    f = Recorded(lambda t, y: -y)
    points = times(0.25, 0.6, 0.85)
    options = {"step_t": points, "max_step": 0.25, "first_step": 0.25}
    td.odeint(f, one(1), times(0.0, 1.0), rtol=1e-3, atol=1e-3, options=options)
    assert all(any(abs(end - p) < 1e-12 for end in f.ends) for p in points.tolist())


@row
def f_func_is_not_called_outside_of_the_interval(td):
    f = Recorded(lambda t, y: -y)
    td.odeint(f, one(1), times(0.0, 1.0), rtol=1e-3, atol=1e-3)
    assert min(f.t) >= 0 and max(f.t) <= 1
    short = Recorded(lambda t, y: -y)
    td.odeint(short, one(1), times(0.0, 1e-12))
    assert max(short.t) <= 1e-12


@row
def g_a_nan_in_a_trial_step_makes_it_shorter(td):
    y = td.odeint(lambda t, y: -torch.sqrt(y), one(1), times(0.0, 1.999), rtol=1e-3, atol=1e-9)
    assert y[-1].item() == pytest.approx((1 - 1.999 / 2) ** 2, abs=1e-4)


@row
def h_a_forced_step_is_not_silent(td):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        td.odeint(lambda t, y: -1000 * y, one(1), times(0.0, 1.0), options={"min_step": 0.1})
    assert any("min_step" in str(w.message) for w in caught)


@row
def j_a_sample_does_not_depend_on_its_batch(td):
    rates = torch.cat([20 * one(1), 0.01 * one(999)])
    extra = {"batch_dim": 0} if ours(td) else {}

    def error(k):
        rate = rates[:k]
        f = lambda t, y: (torch.sin(rate * t) * rate).unsqueeze(-1) * y
        y = td.odeint(f, one(k, 1), times(0.0, 3.0), rtol=1e-4, atol=1e-4, **extra)
        return abs(y[-1, 0, 0].item() - math.exp(1 - math.cos(60.0)))

    assert error(1000) < 2 * error(1) + 1e-6


@row
def k_gradients_to_t_with_step_size(td):
    f = lambda t, y: torch.sin(3 * t) * y

    def final(t):
        return (td.odeint(f, one(1), t, method="rk4", options={"step_size": 0.01}) * times(1.0, 2.0, 3.0).view(3, 1)).sum()

    t = times(0.0, 0.5, 1.0).requires_grad_()
    (found,) = torch.autograd.grad(final(t), t)
    y = torch.exp((1 - torch.cos(3 * times(0.0, 0.5, 1.0))) / 3)
    slope = torch.sin(3 * times(0.0, 0.5, 1.0)) * y
    # dy_i/dt_i = f_i; the start's gradient is 0 here, where f(t0) = 0.
    assert found.tolist() == pytest.approx([0.0, 2 * slope[1].item(), 3 * slope[2].item()], abs=1e-5)


@row
def l_outputs_off_the_grid_keep_the_order(td):
    t = torch.linspace(0.0, 2.0, 38, dtype=F64)
    y = td.odeint(lambda t, y: torch.cos(t) * y, one(1), t, method="rk4", options={"step_size": 0.025})
    assert (y[:, 0] - torch.exp(torch.sin(t))).abs().max() < 1e-7


@row
def m_no_step_of_length_zero(td):
    f = Recorded(lambda t, y: -y)
    t = torch.tensor([0.0, 1.1])
    td.odeint(f, torch.ones(1), t, method="euler", options={"step_size": 0.01})
    assert min(f.dts) > 1e-3


@row
def n_adams_keeps_its_order_on_any_grid(td):
    def error(n):
        s = torch.linspace(0.0, 1.0, n + 1, dtype=F64)
        t = 2 * s + 0.3 * torch.sin(2 * math.pi * s)
        y = td.odeint(lambda t, y: torch.cos(t) * y, one(1), t, method="implicit_adams", options={"max_order": 4})
        return (y[-1, 0] - torch.exp(torch.sin(t[-1]))).abs().item()

    assert math.log2(error(80) / error(160)) > 3


@row
def p_a_failure_of_scipy_is_not_silent(td):
    t = torch.linspace(0.0, 2.0, 11, dtype=F64)
    for solver in ("RK45", "BDF"):
        try:
            y = td.odeint(lambda t, y: y**2, one(1), t, method="scipy_solver", options={"solver": solver})
        except RuntimeError as error:
            assert "scipy" in str(error).lower() or hasattr(error, "solution")
        else:
            assert len(y) == len(t)


@row
def q_bfloat16_is_not_silently_wrong(td):
    y0 = torch.full((1,), 1e4, dtype=torch.bfloat16)
    y = td.odeint(lambda t, y: -y, y0, torch.tensor([0.0, 1.0]))
    assert y[-1].item() == pytest.approx(1e4 / math.e, rel=0.01)


@row
def r_parts_of_a_tuple_keep_their_dtypes(td):
    y = td.odeint(lambda t, y: (-y[0], -y[1]), (torch.ones(2), one(3)), times(0.0, 1.0), rtol=1e-5, atol=1e-5)
    assert [part.dtype for part in y] == [torch.float32, F64]


@row
def s_a_wrong_shape_raises(td):
    with pytest.raises(Exception, match="shape"):
        td.odeint(lambda t, y: y.sum(), one(3), times(0.0, 1.0), method="euler")


@row
def t_max_num_steps_counts_the_solve(td):
    t = torch.linspace(0.0, 10.0, 101, dtype=F64)
    with pytest.raises(AssertionError, match="max_num_steps"):
        td.odeint(lambda t, y: torch.cos(9 * t) * y, one(1), t, options={"max_num_steps": 20})


@row
def u_dense_output_of_any_method_backwards(td):
    if not ours(td):
        from torchdiffeq._impl.odeint import odeint_dense
    else:
        odeint_dense = td.odeint_dense
    solution = odeint_dense(lambda t, y: -y, one(1), times(1.0)[0], times(0.0)[0], method="bosh3", rtol=1e-8, atol=1e-8)
    assert solution(times(0.5)[0]).item() == pytest.approx(math.exp(0.5), abs=1e-6)


# -- differentiation --------------------------------------------------------------------------------------------------


class Rate(nn.Module):
    def __init__(self, value, dtype=F64):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(value, dtype=dtype))
        self.calls = 0

    def forward(self, t, y):
        self.calls += 1
        return -self.rate * y


@row
def A_a_second_derivative_is_right_or_an_error(td):
    f = Rate(0.7)
    y0 = one(1).requires_grad_()
    y = td.odeint_adjoint(f, y0, times(0.0, 1.0))[-1]
    loss = (y**2).sum() + (y0**3).sum()
    (first,) = torch.autograd.grad(loss, y0, create_graph=True)
    try:
        (second,) = torch.autograd.grad(first.sum(), y0)
    except RuntimeError:
        return
    assert second.item() == pytest.approx(2 * math.exp(-1.4) + 6, rel=1e-5)


@row
def C_captured_tensors_get_their_gradient(td):
    c = torch.tensor(0.5, dtype=F64, requires_grad=True)

    class Captures(nn.Module):
        def forward(self, t, y):
            return -c * y

    td.odeint_adjoint(Captures(), one(1), times(0.0, 1.0))[-1].sum().backward()
    assert c.grad is not None
    assert c.grad.item() == pytest.approx(-math.exp(-0.5), rel=1e-5)


@row
def D_tolerances_of_parts_in_the_adjoint(td):
    y0 = one(2).requires_grad_()
    f = Rate(0.7)
    wrapped = type("F", (nn.Module,), {"forward": lambda self, t, y: (f(t, y[0]), -y[1])})()
    y = td.odeint_adjoint(
        wrapped, (y0, one(1)), times(0.0, 1.0), rtol=(1e-6, 1e-7), atol=(1e-8, 1e-9), adjoint_params=tuple(f.parameters())
    )
    y[0][-1].sum().backward()
    assert y0.grad.tolist() == pytest.approx([math.exp(-0.7)] * 2, rel=1e-5)


@row
def E_complex_states_with_real_parameters(td):
    f = Rate(0.7)
    y0 = torch.ones(1, dtype=torch.complex128)
    td.odeint_adjoint(f, y0, times(0.0, 1.0))[-1].real.sum().backward()
    assert f.rate.grad.item() == pytest.approx(-math.exp(-0.7), rel=1e-5)


@row
def F_backward_work_does_not_grow_with_the_outputs(td):
    def calls(n):
        f = Rate(0.7)
        y = td.odeint_adjoint(f, one(1), torch.linspace(0.0, 1.0, n, dtype=F64), rtol=1e-6, atol=1e-6)
        before = f.calls
        y.sum().backward()
        return f.calls - before

    assert calls(101) < 3 * calls(2)


@row
def G_parameters_are_not_part_of_the_backward_state(td):
    def calls(**more):
        f = Rate(0.7)
        f.forward = lambda t, y: Rate.forward(f, t, y) + 1e6 * torch.sin(20 * t) * (f.rate - 0.7)
        y0 = one(1).requires_grad_()
        y = td.odeint_adjoint(f, y0, times(0.0, 1.0), rtol=1e-6, atol=1e-6, **more)
        before = f.calls
        y[-1].sum().backward()
        return f.calls - before

    assert calls() <= 1.2 * calls(adjoint_params=())


@row
def H_outputs_are_not_written_into_one_tensor(td):
    y0 = one(1).requires_grad_()
    y = td.odeint(lambda t, y: -y, y0, torch.linspace(0.0, 1.0, 30, dtype=F64))
    seen, todo, names = set(), [y.grad_fn], []
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(node.name())
            todo += [following for following, _ in node.next_functions]
    assert sum("CopySlices" in name for name in names) < 10


@row
def I_forward_mode_through_adaptive_steps(td):
    """And torch.func; ``vmap`` alone, which hides the values that steps are chosen by, is refused with what to do instead."""
    with torch.autograd.forward_ad.dual_level():
        y0 = torch.autograd.forward_ad.make_dual(one(2), one(2))
        y = td.odeint(lambda t, y: -y * y, y0, times(0.0, 1.0), rtol=1e-6, atol=1e-6)[-1]
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
        assert tangent.tolist() == pytest.approx([0.25, 0.25], rel=1e-4)
    final = lambda y0: td.odeint(lambda t, y: -y * y, y0, times(0.0, 1.0), rtol=1e-6, atol=1e-6)[-1]
    assert torch.func.grad(lambda y0: final(y0).sum())(one(2)).tolist() == pytest.approx([0.25, 0.25], rel=1e-4)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        assert transform(final)(one(2)).flatten().tolist() == pytest.approx([0.25, 0, 0, 0.25], rel=1e-4, abs=1e-12)
    assert torch.func.hessian(lambda y0: final(y0).sum())(one(2)).diagonal().tolist() == pytest.approx([-0.25] * 2, rel=1e-3)


@row
def N_checks_survive_python_O(td):
    program = (
        f"import torch, {td.__name__} as td\n"
        "try:\n    td.odeint(lambda t, y: -y, torch.ones(1), torch.tensor([[0.0, 1.0]]))\n"
        "except Exception as error:\n    raise SystemExit(0 if 'one dimensional' in str(error) else 1)\nraise SystemExit(1)"
    )
    done = subprocess.run([sys.executable, "-O", "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@row
def B_second_derivative_of_an_event_time(td):
    y0 = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros((), dtype=torch.float64)
    time, _ = td.odeint_event(lambda t, y: y, y0, zero, event_fn=lambda t, y: y - 3.0, rtol=1e-9, atol=1e-11)
    (first,) = torch.autograd.grad(time, y0, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), y0)
    assert float(second) == pytest.approx(1.0, rel=1e-4)


@row
def J_an_event_that_is_zero_at_the_start(td):
    def f(t, y):
        return torch.stack([y[1], -9.81 + 0 * y[1]])

    zero = torch.zeros((), dtype=torch.float64)
    time, _ = td.odeint_event(f, torch.tensor([0.0, 5.0], dtype=torch.float64), zero, event_fn=lambda t, y: y[0])
    assert float(time) == pytest.approx(10 / 9.81, rel=1e-5)


@row
def K_boolean_event_functions(td):
    zero = torch.zeros((), dtype=torch.float64)
    y0 = torch.ones(1, dtype=torch.float64)
    time, _ = td.odeint_event(lambda t, y: -y, y0, zero, event_fn=lambda t, y: (y < 0.5).all())
    assert float(time) == pytest.approx(math.log(2), rel=1e-5)


@row
def L_tuples_of_tolerances_with_events(td):
    y0 = torch.ones(1, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    zero = torch.zeros((), dtype=torch.float64)
    time, _ = td.odeint_event(
        lambda t, y: (-y[0], y[1]), y0, zero, event_fn=lambda t, y: y[0] - 0.5, rtol=(1e-7, 1e-6), atol=(1e-9, 1e-8)
    )
    assert float(time) == pytest.approx(math.log(2), rel=1e-5)


@row
def M_gradients_of_the_event_functions_tensors(td):
    level = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros((), dtype=torch.float64)
    y0 = torch.ones(1, dtype=torch.float64, requires_grad=True)
    time, _ = td.odeint_event(lambda t, y: -y, y0, zero, event_fn=lambda t, y: y - level)
    (slope,) = torch.autograd.grad(time, level, allow_unused=True)
    assert slope is not None and float(slope) == pytest.approx(-2.0, rel=1e-5)


# -- the rows, here and there -----------------------------------------------------------------------------------------

DRIVER = """
import importlib.util, json, signal, sys, warnings
import torch
path, subject, which = sys.argv[1:]
spec = importlib.util.spec_from_file_location("rows", path)
rows = importlib.util.module_from_spec(spec)
spec.loader.exec_module(rows)
warnings.simplefilter("ignore")
exec(f"subject = {subject}")
def late(*_):
    raise TimeoutError("did not end within 10 s")
signal.signal(signal.SIGALRM, late)
found = {}
for name, check in getattr(rows, which).items():
    signal.alarm(10)
    try:
        check(subject)
        found[name] = None
    except BaseException as error:
        found[name] = f"{type(error).__name__}: {error}"[:300]
    signal.alarm(0)
print("RESULT" + json.dumps(found))
"""


def failures(subject: str, rows: str) -> dict[str, str | None]:
    """Why each of ``rows`` fails of ``subject``, an expression; None where it does not."""
    command = [sys.executable, "-c", DRIVER, str(Path(__file__).resolve()), subject, rows]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert "RESULT" in done.stdout, done.stderr
    return json.loads(done.stdout.split("RESULT")[1])


@functools.cache
def torchdiffeq_failures() -> dict[str, str | None]:
    return failures("__import__('torchdiffeq')", "ROWS")


@pytest.mark.parametrize("name", ROWS)
def test_right_here(name: str) -> None:
    import solvers

    quiet = contextlib.nullcontext() if name.startswith("h_") else warnings.catch_warnings()
    with quiet:
        warnings.simplefilter("ignore")
        ROWS[name](solvers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.xfail(strict=True, reason="the defect of torchdiffeq 0.2.5 that the row is about", raises=AssertionError)
def test_wrong_in_torchdiffeq(name: str) -> None:
    if importlib.util.find_spec("torchdiffeq") is None:
        pytest.skip("torchdiffeq is not installed")
    failure = torchdiffeq_failures()[name]
    assert failure is None, failure


# -- torchdiffeq's development version --------------------------------------------------------------------------------


def test_b_tsit5_propagates_its_fifth_order_solution() -> None:
    """Of torchdiffeq's master branch: version 0.2.5 has no tsit5."""
    import solvers

    def error(n):
        y = solvers.solve(lambda t, y: torch.cos(t) * y, one(1), times(0.0, 2.0), method="tsit5", dt=2 / n).y
        return abs(y[-1].item() - math.exp(math.sin(2.0)))

    assert math.log2(error(20) / error(40)) > 4.7


def test_i_stage_times_far_from_zero() -> None:
    """torchdiffeq has no way to give func its times in double precision; ``solve`` takes ``time_dtype``."""
    import solvers

    start = 1e7
    f = lambda t, y: torch.cos(t - start).to(y.dtype).expand_as(y)
    y = solvers.solve(f, torch.zeros(1), times(start, start + 1), rtol=1e-5, atol=1e-5, time_dtype=F64).y
    assert y[-1].item() == pytest.approx(math.sin(1.0), abs=1e-4)


def forced_decay(t, y):
    return -y + torch.sin(t) + torch.cos(t)


def test_a_gl4_is_of_order_4_where_f_depends_on_t() -> None:
    import solvers

    def error(n):
        y = solvers.odeint(forced_decay, one(1), times(0.0, 2.0), method="gl4", options={"step_size": 2 / n})
        return abs(y[-1].item() - math.exp(-2.0) - math.sin(2.0))

    assert math.log2(error(8) / error(16)) == pytest.approx(4.0, abs=0.3)


def test_o_an_implicit_step_without_a_solution_is_not_silent() -> None:
    """y1 = 1 + y1^2 + 1 has no real solution: torchdiffeq warns and carries on with whatever it has."""
    import solvers

    with pytest.raises(solvers.InnerSolverError, match="did not converge"):
        solvers.odeint(lambda t, y: y * y + 1, one(1), times(0.0, 1.0), method="implicit_euler")


def test_o_the_accuracy_of_implicit_stages_follows_the_tolerance() -> None:
    """torchdiffeq stops at a residual of 1e-8, whatever the size of the state: with 1e-9 times the state at once."""
    import solvers

    def final(scale):
        y = solvers.odeint(
            lambda t, y: -y * y / scale, scale * one(1), times(0.0, 1.0), method="gl6", options={"step_size": 0.1},
            rtol=1e-9, atol=1e-9 * scale,
        )
        return y[-1].item() / scale

    assert final(1e-9) == pytest.approx(0.5, abs=1e-8)
    assert final(1e-9) == pytest.approx(final(1.0), rel=1e-9)


def test_o_iterations_of_an_implicit_step_are_not_recorded() -> None:
    """The graph of a step is that of its solution: tighter stages, the same number of nodes."""
    import solvers

    def nodes(tolerance):
        y0 = one(1).requires_grad_()
        y = solvers.odeint(
            lambda t, y: -y * y, y0, times(0.0, 1.0), method="radauIIA5", options={"step_size": 0.5}, rtol=tolerance, atol=0.0
        )
        seen, todo = set(), [y.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [following for following, _ in node.next_functions]
        return len(seen)

    assert nodes(1e-12) == nodes(1e-2)


STIFF_METHODS = ("implicit_euler", "sdirk2", "trbdf2", "radauIIA5")


@pytest.mark.parametrize("method", STIFF_METHODS)
def test_4_2_robertsons_problem_with_fixed_steps(method: str) -> None:
    import solvers

    def robertson(t, y):
        a, b, c = y.unbind(-1)
        first, third = -0.04 * a + 1e4 * b * c, 3e7 * b * b
        return torch.stack([first, -first - third, third], -1)

    y0 = times(1.0, 0.0, 0.0)
    y = solvers.odeint(robertson, y0, times(0.0, 40.0), method=method, options={"step_size": 0.1}, rtol=1e-8, atol=1e-12)
    # Hairer & Wanner II, IV.1; the number is scipy's Radau at 1e-12.
    assert y[-1, 0].item() == pytest.approx(0.7158270688, abs=1e-3 if method == "implicit_euler" else 1e-5)
    assert y[-1].sum().item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("n", [100, 400])
def test_4_2_implicit_euler_on_the_heat_equation(n: int) -> None:
    import solvers

    h = 0.002
    matrix = (n + 1) ** 2 * (torch.diag(-2 * one(n)) + torch.diag(one(n - 1), 1) + torch.diag(one(n - 1), -1))
    y0 = torch.sin(math.pi * torch.arange(1, n + 1, dtype=F64) / (n + 1)) + 1
    t = h * torch.arange(6, dtype=F64)
    y = solvers.odeint(lambda t, y: y @ matrix, y0, t, method="implicit_euler", rtol=1e-9, atol=1e-9)
    step = torch.linalg.inv(torch.eye(n, dtype=F64) - h * matrix)
    assert (y[-1] - torch.linalg.matrix_power(step, 5) @ y0).abs().max() < 1e-7


# -- torchode ---------------------------------------------------------------------------------------------------------

TORCHODE: dict[str, Any] = {}


def torchode_row(function):
    TORCHODE[function.__name__] = function
    return function


class Front:
    """A per-sample solve: ``(y (T, B, F), which samples succeeded)``."""

    def __call__(self, f, y0, t, rtol=1e-8, atol=1e-8, backsolve=False, dt=None):
        import solvers

        kind = {"adjoint": "backsolve"} if backsolve else {}
        steps = {"method": "rk4", "dt": dt} if dt is not None else {"rtol": rtol, "atol": atol}
        solution = solvers.solve(f, y0, t, batch_dim=0, throw=False, **kind, **steps)
        return solution.y, solution.status == 0


class TorchodeFront:
    def __call__(self, f, y0, t, rtol=1e-8, atol=1e-8, backsolve=False, dt=None):
        import torchode as to

        term = to.ODETerm(f)
        method = to.Dopri5(term=term)
        steering = to.FixedStepController() if dt is not None else to.IntegralController(atol=atol, rtol=rtol, term=term)
        if backsolve:
            solver = to.BacksolveAdjoint(term, method, steering)
        else:
            solver = to.AutoDiffAdjoint(method, steering, max_steps=1000)
        first = None if dt is None else torch.full((len(y0),), dt, dtype=t.dtype)
        problem = to.InitialValueProblem(y0=y0, t_eval=t.expand(len(y0), -1))
        solution = solver.solve(problem, dt0=first)
        return solution.ys.transpose(0, 1), solution.status == 0


@torchode_row
def torchode_1_the_gradient_at_zero_is_finite(front):
    y0 = torch.zeros(1, 1, dtype=F64, requires_grad=True)
    y, _ = front(lambda t, y: -y, y0, times(0.0, 1.0))
    (first,) = torch.autograd.grad(y[-1].sum(), y0)
    # At rest the error is 0 and steps are long: the gradient is that of the steps taken.
    assert first.item() == pytest.approx(math.exp(-1), rel=1e-3)


@torchode_row
def torchode_2_second_derivatives_are_finite(front):
    y0 = times(1.0, 2.0).view(2, 1).requires_grad_()
    y, _ = front(lambda t, y: -y * y, y0, times(0.0, 1.0))
    (first,) = torch.autograd.grad(y[-1].sum(), y0, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), y0)
    # Of y0 / (1 + y0).
    assert second.flatten().tolist() == pytest.approx([-2 / 8, -2 / 27], rel=1e-4)


@torchode_row
def torchode_3_a_failed_sample_leaves_the_others(front):
    y0 = torch.tensor([[0.0], [5.0]], dtype=F64)
    f = lambda t, y: torch.where((t[:, None] > 0.5) & (y > 2), torch.nan, 90 * torch.cos(90 * t[:, None]))
    y, good = front(f, y0, times(0.0, 2.0), rtol=1e-6, atol=1e-9)
    assert good.tolist() == [True, False]
    assert y[-1, 0].item() == pytest.approx(math.sin(180.0), abs=1e-3)


@torchode_row
def torchode_4_the_backward_ode_has_gradients_to_t(front):
    t = times(0.0, 1.0).requires_grad_()
    y, _ = front(Rate(0.7), one(1, 1), t, backsolve=True)
    (slope,) = torch.autograd.grad(y[-1].sum(), t, allow_unused=True)
    assert slope is not None
    assert slope.tolist() == pytest.approx([0.7 * math.exp(-0.7), -0.7 * math.exp(-0.7)], rel=1e-4)


@torchode_row
def torchode_5_fixed_steps_backwards_end(front):
    y, good = front(lambda t, y: -y, one(1, 1), times(1.0, 0.0), dt=0.01)
    assert good.all()
    assert y[-1].item() == pytest.approx(math.e, rel=1e-7)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation made in a storage of its own."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return made


@torchode_row
def torchode_6_parameters_are_not_kept_for_every_sample(front):
    torch.manual_seed(0)
    batch, features = 32, 64
    net = nn.Linear(features, features).to(F64)
    f = type("F", (nn.Module,), {"forward": lambda self, t, y: torch.tanh(self.net(y))})()
    f.net = net
    y, _ = front(f, torch.randn(batch, features, dtype=F64), times(0.0, 1.0), rtol=1e-4, atol=1e-4, backsolve=True)
    with Largest() as seen:
        y[-1].square().sum().backward()
    assert net.weight.grad.isfinite().all()
    assert seen.elements < batch * net.weight.numel() / 2


@torchode_row
def torchode_7_complex_states_of_many_dimensions(front):
    y0 = torch.full((2, 3, 4), 1.0 + 0.5j, dtype=torch.complex128)
    y, _ = front(lambda t, y: 1j * y, y0, times(0.0, 1.0))
    assert (y[-1] - y0 * torch.exp(torch.tensor(1j))).abs().max() < 1e-6


@functools.cache
def torchode_failures() -> dict[str, str | None]:
    return failures("rows.TorchodeFront()", "TORCHODE")


@pytest.mark.parametrize("name", TORCHODE)
def test_right_where_torchode_is_not(name: str) -> None:
    TORCHODE[name](Front())


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHODE)
@pytest.mark.xfail(strict=True, reason="the defect of torchode 1.0.1 that the row is about", raises=AssertionError)
def test_wrong_in_torchode(name: str) -> None:
    if importlib.util.find_spec("torchode") is None:
        pytest.skip("torchode is not installed")
    failure = torchode_failures()[name]
    assert failure is None, failure
