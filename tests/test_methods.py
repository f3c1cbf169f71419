"""What every registered method and controller must keep, through ``solve``; a new one is picked up without an edit."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import ANY_FIELD, DAMPED, SMOOTH, Problem, entire, entire_exact, relative_error, takes
from torch import Tensor

from solvers import CONTROLLERS, METHODS, ArgumentError, Status, registry, solve
from solvers.methods.implicit import ImplicitRungeKutta
from solvers.methods.rk import RungeKutta
from solvers.methods.tableau import Tableau
from solvers.registry import claim_options, options_of

FIXED = [name for name in ANY_FIELD if not METHODS[name].variable_order]
ADAPTIVE = [name for name in ANY_FIELD if METHODS[name].error_order is not None]
STEERED = [name for name in ADAPTIVE if not METHODS[name].variable_order]
ORDERED = [name for name in FIXED if "order" in options_of(METHODS[name])]
CASES = [(name, METHODS[name].order, {}) for name in FIXED if METHODS[name].order <= 8] + [
    (name, order, {"order": order}) for name in ORDERED for order in range(1, 9) if order != METHODS[name].order
]
OF_ONE_ERROR = [name for name, item in CONTROLLERS.items() if item.adaptive and not item.variable_order]

EACH_CASE = pytest.mark.parametrize(
    "name, order, options", CASES, ids=["-".join([name, *map(str, extra.values())]) for name, _, extra in CASES]
)
EACH_FIXED = pytest.mark.parametrize("name", FIXED)
EACH_ADAPTIVE = pytest.mark.parametrize("name", ADAPTIVE)
BOTH_WAYS = pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0)], ids=["forwards", "backwards"])


def tight(name: str) -> dict[str, float]:
    """Options that make the equations of implicit steps all but exact."""
    # High orders show at errors that a stage solved to 1e-10 would hide.
    return {"inner_tol": 1e-7 if implicit_tableau(name) else 1e-4} if "inner_tol" in options_of(METHODS[name]) else {}


def implicit_tableau(name: str) -> bool:
    """Whether a method is an implicit Runge-Kutta method: of one step, though its state remembers the last one."""
    return isinstance(METHODS[name], ImplicitRungeKutta)


def times(*values: float, device: torch.device | None = None) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


# --- observed orders at fixed steps ----------------------------------------------------------------------------------


def counts(name: str, order: int) -> tuple[int, ...]:
    """Numbers of steps at which errors show the order: neither too few for it nor so many that rounding does."""
    if implicit_tableau(name) and order == 5:
        return (14, 20, 28)
    if METHODS[name].one_step or implicit_tableau(name) or order == 1:
        return {1: (30, 60), 2: (20, 40), 3: (14, 28), 4: (14, 28), 5: (20, 28, 40)}.get(order, (4, 5, 7))
    return {6: (20, 40), 7: (20, 28, 40), 8: (28, 40)}.get(order, (40, 80))


def slope(steps: tuple[int, ...], errors: list[float]) -> float:
    """The least-squares slope of -log error over log steps."""
    assert min(errors) > 1e-12, f"errors {errors} drown in rounding"
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


def rms(y: Tensor, reference: Tensor) -> float:
    """Root mean square of |y - ref| / (1 + |ref|): smooth in the step size, unlike a maximum."""
    return float(((y - reference) / (1 + reference.abs())).square().mean().sqrt())


def offsets(device: torch.device) -> Tensor:
    """The same problem at several times, all in one state: a single error can be small by accident."""
    return torch.linspace(0, 1.5, 6, dtype=torch.float64, device=device)


def shifted(device: torch.device):
    """f and its solution for the state (6, 4) of copies that are ahead by ``offsets``."""
    ahead = offsets(device)
    return (lambda t, y: entire(t + ahead, y)), (lambda t: entire_exact(torch.as_tensor(t).unsqueeze(-1) + ahead))


@BOTH_WAYS
@EACH_CASE
def test_observed_order_of_the_solution(name, order, options, ends, device):
    f, exact = shifted(device)
    t = times(*ends, device=device)
    steps, errors = counts(name, order), []
    for n in steps:
        sol = solve(f, exact(t[0]), t, method=name, num_steps=n, **tight(name), **options)
        assert sol.stats.accepted == n
        errors.append(rms(sol.y[-1], exact(t[1])))
    assert slope(steps, errors) >= order - 0.2, errors


@EACH_CASE
def test_observed_order_of_the_solution_in_a_batch_of_both_directions(name, order, options, device):
    """Each sample with its own ends and step size."""
    ahead = offsets(device)
    there = torch.stack([ahead, ahead + 1.0], dim=1)
    t = torch.cat([there, there.flip(1)])
    steps, errors = counts(name, order), []
    for n in steps:
        sol = solve(entire, entire_exact(t[:, 0]), t, method=name, batch_dim=0, num_steps=n, **tight(name), **options)
        assert (sol.stats.accepted == n).all()
        errors.append([rms(sol.y[-1][rows], entire_exact(t[rows, 1])) for rows in (slice(0, 6), slice(6, 12))])
    for column in zip(*errors):
        assert slope(steps, list(column)) >= order - 0.2, errors


@pytest.mark.parametrize("order", [9, 10, 11, 12])
@pytest.mark.parametrize("name", ORDERED)
def test_high_orders_are_exact_for_polynomials_on_random_grids(name, order, device):
    """A method of order p integrates polynomials of degree p - 1 over steps of any lengths; joint and per sample."""
    grids = (torch.rand(3, 25, dtype=torch.float64, device=device) + 0.15).cumsum(1)
    grids = 2 * (grids - grids[:, :1]) / (grids[:, -1:] - grids[:, :1]) - 1
    t = torch.stack([grids[0], grids[1], grids[2].flip(0)])
    weights = torch.randn(order, dtype=torch.float64, device=device)
    powers = torch.arange(1, order + 1, dtype=torch.float64, device=device)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return (weights * powers * t.unsqueeze(-1) ** (powers - 1)).sum(-1, keepdim=True)

    def exact(t: Tensor) -> Tensor:
        return (weights * t.unsqueeze(-1) ** powers).sum(-1, keepdim=True)

    options = {"method": name, "order": order, "controller": "fixed"}
    sol = solve(f, exact(t[:, 0]), t, batch_dim=0, **options)
    assert (sol.stats.accepted == 24).all()
    torch.testing.assert_close(sol.y, exact(t).transpose(0, 1), rtol=1e-10, atol=1e-10)
    for row, grid in enumerate(t):
        joint = solve(f, exact(grid[0]), grid, **options)
        torch.testing.assert_close(joint.y, sol.y[:, row], rtol=0, atol=1e-11)
    # One degree more is too much, or the test would say nothing about the order.
    higher = order + 1
    beyond = solve(lambda t, y: higher * t.unsqueeze(-1) ** order, grids[0, :1] ** higher, grids[0], **options).y[-1]
    assert rms(beyond, torch.ones_like(beyond)) > 1e-9


# --- the continuous extension ----------------------------------------------------------------------------------------


def promised(name: str, order: int) -> int:
    """Order of the extension: at least p - 1 for p <= 5, at least 3 for p >= 3, 5 for 8(7)13M, 7 for 8(5,3); of implicit
    methods what they declare, which for collocation is the number of stages."""
    if implicit_tableau(name):
        return METHODS[name].tableau.extension.order
    if order <= 5:
        return max(order - 1, 3 if order >= 3 else 1)
    return {"dop853": 7}.get(name, 5)


def between(ends: tuple[float, float], steps: int, device: torch.device) -> Tensor:
    """Times at which every step shows how good it is inside."""
    inside = times(0.15, 0.35, 0.5, 0.65, 0.85)
    theta = (torch.arange(steps).unsqueeze(1) + inside).flatten() / steps
    return (ends[0] + (ends[1] - ends[0]) * theta).to(device)


@BOTH_WAYS
@EACH_CASE
def test_observed_order_between_the_steps(name, order, options, ends, device):
    """The values have the order of the steps (an extension of order p - 1 has a local error of dt^p); their derivative
    in t has the order of the extension, or that of the steps if that is less."""
    f, exact = shifted(device)
    t, extension = times(*ends, device=device), promised(name, order)
    steps = counts(name, order)
    values, slopes = [], []
    for n in steps:
        dense = solve(f, exact(t[0]), t, method=name, num_steps=n, dense=True, **tight(name), **options).dense
        points = between(ends, n, device)
        reference = exact(points)
        values.append(rms(dense(points), reference))
        wanted = torch.stack([f(time, y) for time, y in zip(points, reference)])
        slopes.append(rms(dense(points, derivative=1), wanted))
    assert slope(steps, values) >= min(order, extension + 1) - 0.2, values
    assert slope(steps, slopes) >= min(order, extension) - 0.2, slopes


@EACH_CASE
def test_outputs_inside_steps_are_the_dense_output_and_do_not_move_the_steps(name, order, options, device):
    f, exact = shifted(device)
    ends, n = times(0.0, 1.0, device=device), 14
    inside = torch.cat([ends[:1], between((0.0, 1.0), n, device), ends[1:]])
    settings = {"method": name, "num_steps": n, **tight(name), **options}
    sparse = solve(f, exact(ends[0]), ends, dense=True, **settings)
    full = solve(f, exact(ends[0]), inside, **settings)
    torch.testing.assert_close(full.y, sparse.dense(inside), rtol=0, atol=1e-12)
    torch.testing.assert_close(full.y[-1], sparse.y[-1], rtol=0, atol=1e-14)
    t = torch.stack([inside, (1 - inside), 0.5 + 0.5 * inside])
    rows = solve(entire, entire_exact(t[:, 0]), t, batch_dim=0, **settings)
    sparse = solve(entire, entire_exact(t[:, 0]), t[:, [0, -1]], batch_dim=0, dense=True, **settings)
    torch.testing.assert_close(rows.y, sparse.dense(t), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows.y[-1], sparse.y[-1], rtol=0, atol=1e-14)


@EACH_ADAPTIVE
def test_outputs_cost_at_most_the_extra_stages_of_steps_that_hold_one(name, device):
    """Every call of f is counted; FSAL pairs up to order 5 and multistep methods give outputs for nothing."""
    calls = 0

    def f(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return entire(t, y)

    method = METHODS[name]
    y0, ends, found = entire_exact(times(0.0, device=device))[0], times(0.0, 1.0, device=device), []
    for t in (ends, torch.linspace(0, 1, 400, dtype=torch.float64, device=device)):
        calls = 0
        stats = solve(f, y0, t, method=name, rtol=1e-4, atol=1e-4).stats
        assert calls == stats.nfe
        found.append(stats)
    plain, full = found
    assert (plain.accepted, plain.rejected) == (full.accepted, full.rejected)
    extra = 0
    if isinstance(method, RungeKutta):
        extension = method.tableau.extension
        # The extra stage at the end of a step, where there is one, is the first of the next.
        extra = len(extension.c_extra) - (1.0 in extension.c_extra)
    assert plain.nfe <= full.nfe <= plain.nfe + extra * full.accepted + 1


# --- adaptive steps --------------------------------------------------------------------------------------------------


def own_estimate(name: str) -> bool:
    """Whether the error that is estimated is that of the solution itself, not that of one of lower order beside it."""
    # Adams methods of variable order carry on the corrected value, backward differentiation formulas do not.
    return METHODS[name].error_order == METHODS[name].order + 1 or name == "prox_bdf"


def problems(name: str) -> list[Problem]:
    """An own error of tol per step sums up to tol^(p / (p + 1)), sqrt(tol) at order 1, unless the problem damps it."""
    return DAMPED if own_estimate(name) else SMOOTH


def tolerances(name: str) -> list[float]:
    if METHODS[name].order == 1:
        return [1e-2, 1e-3, 1e-4]
    last = {2: 6, 3: 8, 4: 8}.get(METHODS[name].order, 10)
    return [10.0**-digits for digits in range(3, last + 1)]


def allowed(name: str) -> float:
    """Largest error in units of the tolerance."""
    # The estimate of this pair, (k3 - k1) / 512, is that of a formula that is very nearly of second order itself.
    return 1500.0 if name == "fehlberg2" else 50.0


def many_steps(name: str, problem: Problem) -> bool:
    """Implicit methods on problems that are not stiff: one of them is enough for every day."""
    implicit = implicit_tableau(name) or name == "prox_bdf"
    return implicit and (name == "sdirk2" or problem is not problems(name)[1])


ACCURACY = [(name, problem) for name in ADAPTIVE for problem in problems(name)]
EACH_ACCURACY = pytest.mark.parametrize(
    "name, problem",
    [
        pytest.param(name, p, id=f"{name}-{p.name}", marks=[pytest.mark.slow] if many_steps(name, p) else [])
        for name, p in ACCURACY
    ],
)


def joint_errors(
    problem: Problem, device: torch.device, tols: list[float], outputs: int = 11, **options
) -> list[float]:
    """Errors in units of the tolerance, forwards and backwards in turn."""
    found = []
    for tol in tols:
        for way in (problem, problem.backwards()):
            t = way.times(outputs)
            reference = way.exact(t)
            y0, there = reference[0].to(device), t.to(device)
            y = solve(way.f, y0, there, rtol=tol, atol=tol, **options).y
            found.append(relative_error(y.cpu(), reference) / tol)
    return found


@EACH_ACCURACY
def test_error_stays_near_the_tolerance(name, problem, device):
    """And a smaller one gives a smaller error, about in proportion (or, for the solution's own error, in that of its power)."""
    tols = tolerances(name)
    errors = joint_errors(problem, device, tols, method=name)
    assert max(errors) < allowed(name), errors
    order = METHODS[name].order
    gain = (tols[-1] / tols[0]) ** (0.8 * order / (order + 1) if own_estimate(name) else 0.7)
    assert errors[-1] * tols[-1] < errors[0] * tols[0] * gain, errors


@EACH_ACCURACY
def test_error_stays_near_the_tolerance_in_a_batch(name, problem, device):
    """All tolerances and both directions as samples of one batch, each with its own outputs."""
    tols = tolerances(name)
    t = problem.times()
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(len(tols))
    tol = torch.tensor(tols * 2, dtype=torch.float64)
    reference = problem.exact(t)
    way = sign.to(device)
    y0 = reference[0].expand(len(tol), -1).to(device)
    bound = tol.unsqueeze(1).to(device)
    sol = solve(
        lambda time, y: way.unsqueeze(1) * problem.f(way * time, y),
        y0, torch.outer(sign, t).to(device), method=name, rtol=bound, atol=bound, batch_dim=0,
    )  # fmt: skip
    errors = (sol.y.cpu() - reference.unsqueeze(1)).abs() / (reference.unsqueeze(1).abs() + 1)
    assert ((errors.amax((0, 2)) / tol) < allowed(name)).all(), errors.amax((0, 2)) / tol
    # The mirrored problem asks for the same steps.
    accepted = sol.stats.accepted.tolist()
    assert accepted[: len(tols)] == accepted[len(tols) :]


# --- one sample is a joint solve, complex states are pairs of real ones, single precision is single precision -------


@EACH_FIXED
def test_one_sample_equals_a_joint_solve_at_fixed_steps(name, device):
    t = times(0.0, 0.13, 0.25, 0.38, 0.5, 0.55, 0.65, 0.77, 0.9, 1.0, device=device)
    y0 = entire_exact(t[0])
    for steps in ({"num_steps": 9}, {"dt": 0.11}, {"controller": "fixed"}):
        joint = solve(entire, y0, t, method=name, **steps, **tight(name))
        alone = solve(entire, y0.unsqueeze(0), t, method=name, batch_dim=0, **steps, **tight(name))
        torch.testing.assert_close(alone.y[:, 0], joint.y, rtol=1e-12, atol=1e-12)
        assert alone.stats.accepted.tolist() == [joint.stats.accepted]


@EACH_ADAPTIVE
def test_one_sample_equals_a_joint_solve_at_adaptive_steps(name, device):
    problem = problems(name)[0]
    t = problem.times().to(device)
    y0 = problem.exact(problem.times())[0].to(device)
    # From a first step that is neither too short nor too long: an estimate far below the tolerance is half rounding,
    # and the step after it would show that.
    dt0 = 0.2 if METHODS[name].one_step else 0.01
    settings = {"method": name, "rtol": 1e-4, "atol": 1e-4, "dt0": dt0, **tight(name)}
    joint = solve(problem.f, y0, t, dense=True, **settings)
    alone = solve(problem.f, y0.unsqueeze(0), t, batch_dim=0, dense=True, **settings)
    torch.testing.assert_close(alone.y[:, 0], joint.y, rtol=1e-12, atol=1e-12)
    points = torch.linspace(0, problem.end, 37, dtype=torch.float64, device=device)
    torch.testing.assert_close(alone.dense(points)[:, 0], joint.dense(points), rtol=1e-11, atol=1e-11)
    assert alone.stats.accepted.tolist() == [joint.stats.accepted]
    assert alone.stats.rejected.tolist() == [joint.stats.rejected]


@pytest.mark.parametrize("batch_dim", [None, 0], ids=["joint", "rows"])
@EACH_FIXED
def test_a_complex_state_equals_the_pair_of_its_parts(name, batch_dim, device):
    def f(t: Tensor, z: Tensor) -> Tensor:
        return (-0.3 + 1j) * z * (1 - 0.2 * z * z.conj()) + torch.cos(t).unsqueeze(-1)

    def g(t: Tensor, y: Tensor) -> Tensor:
        return torch.view_as_real(f(t, torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()))).flatten(-2)

    z0 = torch.tensor([[0.5 + 1j, -1.0 + 0.2j], [0.1j, 1.5 + 0j]], dtype=torch.complex128, device=device)
    z0 = z0 if batch_dim == 0 else z0[0]
    t = times(0.0, 0.4, 1.0, device=device)
    settings = {"method": name, "num_steps": 8, "batch_dim": batch_dim, **tight(name)}
    settings |= {"inner_tol": min(settings["inner_tol"], 1e-6)} if "inner_tol" in settings else {}
    z = solve(f, z0, t, **settings).y
    y = solve(g, torch.view_as_real(z0).flatten(-2), t, **settings).y
    assert z.dtype == torch.complex128
    torch.testing.assert_close(torch.view_as_real(z).flatten(-2), y, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("batch_dim", [None, 0], ids=["joint", "rows"])
@pytest.mark.parametrize("name", [name for name in FIXED if takes(name, torch.float32)])
def test_single_precision_in_and_out(name, batch_dim, device):
    seen = set()

    def f(t: Tensor, y: Tensor) -> Tensor:
        seen.add((t.dtype, y.dtype))
        return entire(t, y)

    t = times(0.0, 0.3, 1.0, device=device)
    t = torch.stack([t, t + 0.3]) if batch_dim == 0 else t
    y0 = entire_exact(t[..., 0])
    exact = solve(entire, y0, t, method=name, num_steps=12, batch_dim=batch_dim, **tight(name)).y
    sol = solve(f, y0.float(), t, method=name, num_steps=12, batch_dim=batch_dim)
    assert sol.y.dtype == torch.float32
    assert seen == {(torch.float32, torch.float32)}
    # An implicit step is solved to its tolerance only.
    limit = 2e-5 if tight(name) else 5e-6
    torch.testing.assert_close(sol.y.double(), exact, rtol=limit, atol=limit)


@pytest.mark.parametrize("name", [name for name in ADAPTIVE if takes(name, torch.float32)])
def test_single_precision_at_adaptive_steps(name, device):
    problem = problems(name)[1]
    t = problem.times()
    reference = problem.exact(t)
    y0 = reference[0].float().to(device)
    for batch_dim, start in ((None, y0), (0, y0.unsqueeze(0))):
        y = solve(problem.f, start, t.to(device), method=name, rtol=1e-3, atol=1e-3, batch_dim=batch_dim).y
        assert y.dtype == torch.float32
        assert relative_error(y.cpu().double().reshape(reference.shape), reference) < 1e-3 * allowed(name)


def test_one_sample_fails_for_the_reason_a_joint_solve_fails_for():
    """An implicit step that needs more iterations than it may have; gradients recorded or not."""
    heat = DAMPED[2]
    y0, t = torch.linspace(1, 2, 6, dtype=torch.float64) ** 3, times(0.0, heat.end)
    settings = {"method": "prox_euler", "num_steps": 3, "max_iters": 2, "inner_tol": 1e-3, "fallback": None, "throw": False}
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            joint = solve(heat.f, y0, t, **settings)
            alone = solve(heat.f, y0.unsqueeze(0), t, batch_dim=0, **settings)
        assert joint.status == Status.INNER_NOT_CONVERGED
        assert alone.status.tolist() == [int(joint.status)]
        assert alone.stats.inner_iterations.tolist() == [joint.stats.inner_iterations]


# --- controllers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("controller", OF_ONE_ERROR)
@pytest.mark.parametrize("name", STEERED)
def test_every_controller_meets_the_tolerance(name, controller, device):
    tols = tolerances(name)
    tols = [tols[0], tols[len(tols) // 2]]
    errors = joint_errors(problems(name)[1], device, tols, method=name, controller=controller)
    assert max(errors) < allowed(name), errors


STEERING = [name for name in CONTROLLERS if CONTROLLERS[name].adaptive]
UNFIT = [(m, c) for m in ADAPTIVE for c in STEERING if METHODS[m].variable_order != CONTROLLERS[c].variable_order]


@pytest.mark.parametrize("name, controller", UNFIT)
def test_a_controller_that_does_not_fit_the_method_is_refused(name, controller):
    with pytest.raises(ArgumentError, match=rf"controller='{controller}' does not fit method '{name}'"):
        solve(lambda t, y: -y, torch.ones(2, dtype=torch.float64), [0.0, 1.0], method=name, controller=controller)


def known_steps(name: str, batch_dim: int | None, device: torch.device, end: float = 1.0, **options):
    """Accepted steps where the error estimate is exactly dt^2 in units of y: y' = 2 t by Heun's method with Euler's."""
    found: list[float] = []
    y0 = torch.zeros((1,), dtype=torch.float64, device=device)
    y0 = y0 if batch_dim is None else y0.unsqueeze(0)
    settings = {"method": "adaptive_heun", "controller": name, "rtol": 1e-30, "atol": 1e-3, "batch_dim": batch_dim}
    settings |= options

    def note(step) -> None:
        if bool(step.accepted):
            found.append(float(step.dt))

    sol = solve(lambda t, y: 2 * t.unsqueeze(-1).expand_as(y), y0, [0.0, end], observer=note, **settings)
    return found, int(sol.stats.rejected)


GAINS = {"i": (1, 0, 0), "pi": (0.3, 0.4, 0), "pid": (0.47, 0.01, 0.1)}
"""kI, kP, kD: the classical rule; PI3040 (Gustafsson 1991); exponents (0.58, -0.21, 0.1), the PID of ARKODE."""
H312PID = (2 / 9, -2 / 9, 1 / 18)
"""Söderlind 2003, table III: exponents (1/18, 1/9, 1/18)."""


@pytest.mark.parametrize("batch_dim", [None, 0], ids=["joint", "rows"])
@pytest.mark.parametrize("gains", [*GAINS.values(), H312PID], ids=[*GAINS, "h312pid"])
def test_step_sizes_follow_the_formula_of_the_gains(gains, batch_dim, device):
    """dt_{n+1} / dt_n = safety r_n^(-b1/k) r_{n-1}^(-b2/k) r_{n-2}^(-b3/k), k = 2, with Söderlind's
    (b1, b2, b3) = (kI + kP + kD, -kP - 2 kD, kD)."""
    kI, kP, kD = map(float, gains)
    found, rejected = known_steps(
        "pid", batch_dim, device, dt0=0.012, kI=kI, kP=kP, kD=kD, safety=0.85, factor_max=5.0, factor_min=0.3
    )
    assert not rejected
    expected, ratios = [0.012], [1.0, 1.0]
    while len(expected) < 12:
        ratios.append(expected[-1] ** 2 / 1e-3)
        powers = (kI + kP + kD, -kP - 2 * kD, kD)
        factor = 0.85 * math.prod(r ** (-b / 2) for r, b in zip(reversed(ratios), powers))
        expected.append(expected[-1] * min(max(factor, 0.3), 5.0))
    assert found[:12] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", GAINS)
def test_gains_are_those_of_the_literature(name):
    assert (CONTROLLERS[name].kI, CONTROLLERS[name].kP, CONTROLLERS[name].kD) == pytest.approx(GAINS[name])


@pytest.mark.parametrize("controller", OF_ONE_ERROR)
def test_step_sizes_settle_where_the_error_is_even(controller, device):
    """A closed loop that is stable: constant error coefficients give constant steps, and none is rejected."""
    found, rejected = known_steps(controller, None, device, end=4.0, dt0=0.01)
    assert rejected == 0
    late = found[-30:-1]
    assert max(late) < 1.01 * min(late)


@pytest.mark.parametrize("batch_dim", [None, 0], ids=["joint", "rows"])
def test_a_rejected_step_is_repeated_with_the_factor_of_its_error(batch_dim, device):
    """r = (0.1 / 0.0316)^2 = 10: 0.9 / sqrt(10) of the step."""
    for name in ("i", "pi"):
        found, rejected = known_steps(name, batch_dim, device, dt0=0.1, end=0.5)
        assert rejected == 1
        assert found[0] == pytest.approx(0.1 * 0.9 / math.sqrt(0.1**2 / 1e-3))


def test_the_factors_are_limited(device):
    grown, _ = known_steps("i", None, device, dt0=1e-5, factor_max=3.0)
    assert grown[:5] == pytest.approx([1e-5 * 3.0**n for n in range(5)])
    shrunk, rejected = known_steps("i", None, device, dt0=0.9, factor_min=0.5)
    assert rejected == 5
    # Four times by a half, then by 0.9 / sqrt(r) = 0.506 with r = dt^2 / atol.
    assert shrunk[0] == pytest.approx(0.9 / math.sqrt(1 / 1e-3))
    assert shrunk[0] == pytest.approx(0.9 * 0.5**4 * 0.9 * math.sqrt(1e-3) / (0.9 * 0.5**4))


@pytest.mark.parametrize("batch_dim", [None, 0], ids=["joint", "rows"])
def test_factor_min_accepted_bounds_shrinking_after_accepted_steps(batch_dim, device):
    """y' grows: without the bound the steps shrink steadily, with 1 only a rejection shrinks them."""

    def ratios(**options) -> tuple[list[float], int]:
        seen: list[float] = []
        y0 = torch.ones((1, 1) if batch_dim == 0 else (1,), dtype=torch.float64, device=device)
        stats = solve(
            lambda t, y: y**2, y0, [0.0, 0.95], batch_dim=batch_dim, rtol=1e-7, atol=1e-7,
            observer=lambda s: seen.append(float(s.dt)) if bool(s.accepted) else None, **options,
        ).stats  # fmt: skip
        # The last step is cut to the end.
        return [b / a for a, b in pairwise(seen[:-1])], int(stats.rejected)

    free, _ = ratios()
    assert sum(r < 0.99 for r in free) > 10
    held, rejected = ratios(factor_min_accepted=1.0)
    assert 0 < rejected >= sum(r < 0.999 for r in held)
    mild, _ = ratios(factor_min_accepted=0.97, safety=0.5)
    assert min(mild) < 1.0


@EACH_ADAPTIVE
def test_dt_max_and_dt0_are_kept(name, device):
    problem = problems(name)[1]
    y0 = problem.exact(problem.times())[0].to(device)
    settings = {"method": name, "rtol": 1e-2, "atol": 1e-2, "dt0": 1e-3, "dt_max": 0.02}
    seen: list[Tensor] = []
    for batch_dim, start in ((None, y0), (0, y0.expand(2, -1))):
        seen.clear()
        observer = lambda step: seen.append(torch.as_tensor(step.dt).clone())
        solve(problem.f, start, [0.0, 1.0], batch_dim=batch_dim, observer=observer, **settings)
        steps = torch.stack(seen)
        assert (steps[0] == 1e-3).all()
        assert steps.max() <= 0.02 * (1 + 1e-12)
        assert steps.max() > 0.0199, "the limit was not in force"


# --- the registries --------------------------------------------------------------------------------------------------


@pytest.fixture
def scratch(monkeypatch):
    """Registries that forget what a test registers."""
    for table in (METHODS, CONTROLLERS):
        monkeypatch.setattr(table, "_items", dict(table._items))
    monkeypatch.setattr(registry, "_OPTION_OWNER", dict(registry._OPTION_OWNER))


def cash_karp() -> Tableau:
    """A pair of orders 5 and 4 that is not registered."""
    rows = (
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (3 / 10, -9 / 10, 6 / 5),
        (-11 / 54, 5 / 2, -70 / 27, 35 / 27),
        (1631 / 55296, 175 / 512, 575 / 13824, 44275 / 110592, 253 / 4096),
    )
    fifth = (37 / 378, 0.0, 250 / 621, 125 / 594, 0.0, 512 / 1771)
    fourth = (2825 / 27648, 0.0, 18575 / 48384, 13525 / 55296, 277 / 14336, 1 / 4)
    return Tableau(
        "cash_karp",
        5,
        c=(0.0, 1 / 5, 3 / 10, 3 / 5, 1.0, 7 / 8),
        a=rows,
        b=fifth,
        b_error=(tuple(x - y for x, y in zip(fifth, fourth)),),
        embedded_order=4,
        reference="Cash & Karp 1990, ACM Trans. Math. Softw. 16",
    )


def test_one_new_tableau_is_a_method(scratch, device):
    """Fixed and adaptive steps, outputs, batches and gradients, from one entry."""
    METHODS.register("cash_karp", RungeKutta(cash_karp()))
    assert METHODS["cash_karp"].error_order == 5
    f, exact = shifted(device)
    t = times(0.0, 1.0, device=device)
    errors = [rms(solve(f, exact(t[0]), t, method="cash_karp", num_steps=n).y[-1], exact(t[1])) for n in (20, 40)]
    assert slope((20, 40), errors) > 4.8
    # At the end only: the extension that every tableau gets for nothing is of order 3.
    assert max(joint_errors(SMOOTH[0], device, [1e-3, 1e-6, 1e-9], outputs=2, method="cash_karp")) < 50
    t = torch.stack([t, t.flip(0)])
    y0 = entire_exact(t[:, 0]).requires_grad_()
    y = solve(entire, y0, t, method="cash_karp", batch_dim=0).y[-1]
    assert rms(y.detach(), entire_exact(t[:, 1])) < 1e-5
    (gradient,) = torch.autograd.grad(y.sum(), y0)
    assert torch.isfinite(gradient).all()


def test_one_new_method_of_fixed_order_is_a_method(scratch, device):
    """Ralston's third-order formula has no error estimate: fixed steps work, adaptive ones say what to give."""
    rows = ((), (1 / 2,), (0.0, 3 / 4))
    ralston3 = Tableau("ralston3", 3, c=(0.0, 1 / 2, 3 / 4), a=rows, b=(2 / 9, 1 / 3, 4 / 9), reference="Ralston 1962")
    METHODS.register("ralston3", RungeKutta(ralston3))
    f, exact = shifted(device)
    t = times(1.0, 0.0, device=device)
    errors = [rms(solve(f, exact(t[0]), t, method="ralston3", num_steps=n).y[-1], exact(t[1])) for n in (20, 40)]
    assert slope((20, 40), errors) > 2.8
    with pytest.raises(ArgumentError, match="num_steps"):
        solve(f, exact(t[0]), t, method="ralston3")


@pytest.mark.parametrize("table", [METHODS, CONTROLLERS], ids=lambda table: table.kind)
def test_a_name_is_registered_once(scratch, table):
    name = next(iter(table))
    with pytest.raises(ArgumentError, match=rf"{table.kind} '{name}' is already registered"):
        table.register(name, table[name])


def test_an_option_has_one_owner(scratch):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Greedy:
        factor_max: float = 2.0

    with pytest.raises(ArgumentError, match=r"option 'factor_max' of a method is already an option of a controller"):
        METHODS.register("greedy", Greedy())
    assert "greedy" not in METHODS
    with pytest.raises(ArgumentError, match=r"option 'rtol' of a controller is already an option of a solve"):
        claim_options("controller", ["rtol"])
    claim_options("controller", ["factor_max"])  # its owner may share it among its own


def test_everything_registered_names_its_source_and_its_options():
    for name, method in METHODS.items():
        assert method.name == name
        assert method.reference
        assert method.order >= 1
        for option in options_of(method):
            assert registry.option_owner(option) == METHODS.kind
    for controller in CONTROLLERS.values():
        for option in options_of(controller):
            assert registry.option_owner(option) == CONTROLLERS.kind
