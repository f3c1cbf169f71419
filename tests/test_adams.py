"""Adams methods: coefficients, order on any grid, starts, corrections, variable step and order, gradients, batches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from solvers import METHODS, ArgumentError, InnerSolverError, Jump, Status, solve
from solvers.control.order import OrderController
from solvers.methods.adams import extrapolated_midpoint, start_method
from solvers.methods.adams_weights import explicit_weights, implicit_weights

FIXED = ("explicit_adams", "implicit_adams")
ORDERS = range(1, 13)
DOUBLE = torch.float64


def grid(count: int, sign: float = 1.0, spread: float = 4.0) -> Tensor:
    """Random times from 0 to ``sign``; neighbouring steps differ by up to the factor ``spread``."""
    steps = spread ** torch.rand(count, dtype=DOUBLE)
    return sign * torch.cat([steps.new_zeros(1), steps.cumsum(0) / steps.sum()])


SHIFT = torch.tensor([0.0, 0.5], dtype=DOUBLE)


def waves(t: Tensor, y: Tensor) -> Tensor:
    """Nonlinear, not autonomous, and smooth everywhere: y = sinh(sin t + c)."""
    return torch.cos(t if t.dim() == 0 else t.unsqueeze(-1)) * torch.sqrt(1 + y**2)


def waves_solution(t: Tensor) -> Tensor:
    return torch.sinh(torch.sin(t).unsqueeze(-1) + SHIFT)


def van_der_pol(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
    x, v = y.unbind(-1)
    return torch.stack([v, mu * (1 - x**2) * v - x], -1)


def counted(f: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[int]]:
    calls = [0]

    def g(*args):
        calls[0] += 1
        return f(*args)

    return g, calls


# -- coefficients -----------------------------------------------------------------------------------------------------


def test_equal_steps_give_the_classical_coefficients() -> None:
    """Hairer, Nørsett & Wanner I, III.1: tables after (1.5) and (1.8)."""
    h = 0.25
    assert explicit_weights(h, (h,) * 3) == pytest.approx([h * c / 24 for c in (55, -59, 37, -9)], abs=1e-15)
    past, new = implicit_weights(h, (h,) * 2)
    assert [new, *past] == pytest.approx([h * c / 24 for c in (9, 19, -5, 1)], abs=1e-15)
    assert explicit_weights(h, (h,) * 4) == pytest.approx(
        [h * c / 720 for c in (1901, -2774, 2616, -1274, 251)], abs=1e-15
    )


@pytest.mark.parametrize("order", ORDERS)
def test_tensors_get_the_coefficients_that_floats_get(order: int) -> None:
    steps = tuple((0.5 + torch.rand(order - 1)).tolist())
    rows = tuple(torch.tensor([h, -3 * h, 1.0], dtype=DOUBLE) for h in steps)
    dt = torch.tensor([0.7, -2.1, 0.0], dtype=DOUBLE)
    explicit, (past, new) = explicit_weights(dt, rows), implicit_weights(dt, rows)
    scale = max(map(abs, explicit_weights(0.7, steps)))
    for column, factor in ((0, 1.0), (1, -3.0), (2, 0.0)):
        known = torch.tensor(explicit_weights(0.7, steps), dtype=DOUBLE)
        torch.testing.assert_close(explicit[:, column], factor * known, rtol=0, atol=1e-13 * scale)
        known_past, known_new = implicit_weights(0.7, steps)
        torch.testing.assert_close(past[:, column], factor * torch.tensor(known_past, dtype=DOUBLE), rtol=0, atol=1e-13)
        assert new[column].item() == pytest.approx(factor * known_new, abs=1e-15)


def test_extrapolated_midpoint_integrates_polynomials() -> None:
    for order, stages in ((10, 26), (12, 37)):
        tableau = extrapolated_midpoint(order)
        assert tableau.stages == stages
        for power in range(order):
            value = sum(b * c**power for b, c in zip(tableau.b, tableau.c))
            assert value == pytest.approx(1 / (power + 1), abs=1e-14)


# -- fixed order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("batched", [False, True], ids=["joint", "rows"])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forwards", "backwards"])
def test_exact_on_polynomials_over_any_grid(name: str, order: int, batched: bool, sign: float) -> None:
    power = torch.arange(order, dtype=DOUBLE)
    c = torch.randn(order, dtype=DOUBLE)
    primitive = lambda t: (c / (power + 1) * t.unsqueeze(-1) ** (power + 1)).sum(-1)
    f = lambda t, y: (c * t.unsqueeze(-1) ** power).sum(-1).reshape(t.shape + (1,) * (y.dim() - t.dim())).expand_as(y)
    t = grid(40, sign)
    y0, options = torch.zeros(2, 3, dtype=DOUBLE), {}
    if batched:
        t, options = torch.stack([t, grid(40, sign)]), {"batch_dim": 0}
    sol = solve(f, y0, t, method=name, order=order, controller="fixed", dense=True, **options)
    size = primitive(t).abs().max().clamp(min=1.0)
    # The weights of order 12 over such a grid have sums of absolute values of some hundreds.
    atol = 1e-15 * 10 ** (order / 4) * size.item()
    exact = primitive(t).T if batched else primitive(t)
    torch.testing.assert_close(sol.y, exact.reshape(exact.shape + (1,) * (3 - exact.dim())).expand_as(sol.y), rtol=0, atol=atol)
    late = torch.linspace(float(t[..., order + 1].abs().max()), 1.0, 40, dtype=DOUBLE) * sign
    between = primitive(late).reshape(-1, 1, 1).expand(-1, 2, 3)
    torch.testing.assert_close(sol.dense(late), between, rtol=0, atol=atol)


def observed_order(errors: list[float], counts: list[int]) -> float:
    """Slope of the least-squares line through log error over log step."""
    return float(np.polyfit(np.log(1.0 / np.array(counts)), np.log(errors), 1)[0])


@pytest.mark.parametrize("order", range(1, 9))
@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_observed_order(name: str, order: int, backwards: bool) -> None:
    t = torch.tensor([2.0, 0.0] if backwards else [0.0, 2.0], dtype=DOUBLE)
    y0 = waves_solution(t)[0]
    counts = (64, 96, 128) if order < 4 else (40, 56, 80)
    between = torch.linspace(0.0, 2.0, 173, dtype=DOUBLE)
    errors, dense_errors = [], []
    for n in counts:
        sol = solve(waves, y0, t, method=name, order=order, num_steps=n, dense=True, save="steps")
        errors.append((sol.y - waves_solution(sol.t)).abs().max().item())
        dense_errors.append((sol.dense(between) - waves_solution(between)).abs().max().item())
    assert min(errors) > 1e-13
    assert observed_order(errors, counts) > order - 0.2
    least = order if order < 3 else min(max(order - 1, 3), 4)
    assert observed_order(dense_errors, counts) > least - 0.2


@pytest.mark.parametrize("name", FIXED)
def test_uneven_steps_keep_the_order(name: str) -> None:
    """A smooth grid that is not equidistant, and a step that does not divide the interval."""
    y0 = waves_solution(torch.zeros(1, dtype=DOUBLE))[0]
    errors = []
    for n in (20, 40, 80):
        t = 2.0 * torch.linspace(0, 1, n + 1, dtype=DOUBLE) ** 1.5
        errors.append((solve(waves, y0, t, method=name, controller="fixed").y - waves_solution(t)).abs().max().item())
    assert observed_order(errors, [20, 40, 80]) > 3.7
    t = torch.tensor([0.0, 2.0], dtype=DOUBLE)
    error = (solve(waves, y0, t, method=name, dt=0.03).y - waves_solution(t)).abs().max().item()
    even = (solve(waves, y0, t, method=name, dt=0.025).y - waves_solution(t)).abs().max().item()
    assert error < 1.2**4 * 1.5 * even


@pytest.mark.parametrize(
    ("name", "order", "per_start", "per_step"),
    [
        ("explicit_adams", 1, 0, 1),
        ("explicit_adams", 2, 4, 1),
        ("explicit_adams", 4, 4, 1),
        ("explicit_adams", 8, 12, 1),
        ("explicit_adams", 12, 37, 1),
        ("implicit_adams", 1, 0, 2),
        ("implicit_adams", 4, 4, 2),
        ("implicit_adams", 10, 26, 2),
    ],
)
@pytest.mark.parametrize("batched", [False, True], ids=["joint", "rows"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_number_of_evaluations(name, order, per_start, per_step, batched, grad) -> None:
    f, calls = counted(waves)
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    y0 = torch.ones((3, 2) if batched else 2, dtype=DOUBLE)
    with torch.set_grad_enabled(grad):
        sol = solve(f, y0, t, method=name, order=order, num_steps=30, batch_dim=0 if batched else None)
    assert sol.stats.nfe == calls[0] == (order - 1) * per_start + (31 - order) * per_step


def test_more_corrections_cost_one_evaluation_each() -> None:
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    for m in (1, 2, 3):
        f, calls = counted(waves)
        solve(f, torch.ones(2, dtype=DOUBLE), t, method="implicit_adams", num_steps=20, max_corrections=m)
        assert calls[0] == 3 * 4 + 17 * (m + 1)


def test_stability_on_the_real_axis() -> None:
    """AB4 0.30, its PECE pair 1.28 (HNW and Hairer & Wanner II, V.1); AM4's iteration converges below 8/3 only."""
    f = lambda t, y: -y
    y0, t = torch.ones(1, dtype=DOUBLE), torch.tensor([0.0, 300.0], dtype=DOUBLE)
    iterated = {"method": "implicit_adams", "corrector_tol": 1e-3, "max_corrections": 400}

    def grows(dt: float, **options) -> bool:
        return bool(solve(f, y0, t, dt=dt, **options).y[-1].abs() > 1)

    assert not grows(0.29, method="explicit_adams") and grows(0.32, method="explicit_adams")
    assert not grows(1.27, method="implicit_adams") and grows(1.4, method="implicit_adams")
    assert not grows(2.5, **iterated)
    with pytest.raises(InnerSolverError):
        solve(f, y0, t, dt=2.8, **iterated)


# -- the iterated corrector -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True], ids=["joint", "rows"])
def test_iterated_corrector_solves_its_equation(batched: bool) -> None:
    dt = 0.1
    f = lambda t, y: -4.0 * y + torch.sin(3.0 * y)
    y0 = torch.tensor([[1.0], [2.0], [-1.0]], dtype=DOUBLE)
    t = torch.arange(8, dtype=DOUBLE) * dt
    y0, options = (y0, {"batch_dim": 0}) if batched else (y0[0], {})
    y = solve(f, y0, t, method="implicit_adams", corrector_tol=1e-4, controller="fixed", **options).y
    slopes = f(None, y)
    moulton = y[-2] + dt / 24 * (9 * slopes[-1] + 19 * slopes[-2] - 5 * slopes[-3] + slopes[-4])
    torch.testing.assert_close(y[-1], moulton, rtol=0, atol=1e-9)


def test_corrector_that_does_not_converge_is_told() -> None:
    f = lambda t, y, rate: -rate * y
    rate = torch.tensor([[1.0], [200.0], [2.0]], dtype=DOUBLE)
    y0, t = torch.ones(3, 1, dtype=DOUBLE), torch.tensor([0.0, 1.0], dtype=DOUBLE)
    options = {"method": "implicit_adams", "order": 2, "dt": 0.1, "args": (rate,), "throw": False}
    with torch.no_grad():
        sol = solve(f, y0, t, batch_dim=0, corrector_tol=0.1, **options)
        alone = solve(f, y0[:1], t, batch_dim=0, corrector_tol=0.1, **{**options, "args": (rate[:1],)})
    assert sol.status.tolist() == [Status.SUCCESS, Status.INNER_NOT_CONVERGED, Status.SUCCESS]
    assert torch.equal(sol.y[:, :1], alone.y)
    sol = solve(f, y0, t, corrector_tol=0.1, **options)
    assert sol.status == Status.INNER_NOT_CONVERGED
    sol = solve(f, y0, t, corrector_tol=1e-6, max_corrections=1, **{**options, "dt": 1e-3})
    assert sol.status == Status.INNER_NOT_CONVERGED
    broken = lambda t, y: torch.where(t < 0.5, -y, torch.nan)
    assert solve(broken, y0, t, corrector_tol=0.1, **{**options, "args": ()}).status == Status.NON_FINITE


# -- variable order ---------------------------------------------------------------------------------------------------

THREE = {
    "waves": (waves, waves_solution, 5.0),
    "decay": (
        lambda t, y: torch.stack([-0.5 * y[0] ** 3, -y[1]]),
        lambda t: torch.stack([(1 + t) ** -0.5, torch.exp(-t)], -1),
        5.0,
    ),
    "growth": (lambda t, y: y * torch.cos(t), lambda t: torch.exp(torch.sin(t)).unsqueeze(-1), 10.0),
}


@pytest.mark.parametrize("exponent", range(3, 11))
@pytest.mark.parametrize("problem", THREE)
def test_abm_keeps_the_tolerance(problem: str, exponent: int) -> None:
    f, exact, end = THREE[problem]
    tol = 10.0**-exponent
    t = torch.linspace(0, end, 9, dtype=DOUBLE)
    for times in (t, t.flip(0)) if problem == "growth" else (t,):
        sol = solve(f, exact(times)[0], times, method="abm", rtol=tol, atol=tol, dense=True)
        between = torch.linspace(0, end, 83, dtype=DOUBLE)
        for y, where in ((sol.y, times), (sol.dense(between), between)):
            reference = exact(where)
            assert ((y - reference).abs() / (reference.abs() + 1)).max() < 50 * tol


def two_bodies(t: Tensor, y: Tensor) -> Tensor:
    """Eccentricity 0.3; Hull, Enright, Fellen & Sedgwick (1972), D2."""
    distance = (y[..., :2] ** 2).sum(-1, keepdim=True) ** 1.5
    return torch.cat([y[..., 2:], -y[..., :2] / distance], -1)


TWO_BODIES = torch.tensor([0.7, 0.0, 0.0, math.sqrt(1.3 / 0.7)], dtype=DOUBLE)


TIGHT = {"rtol": 1e-10, "atol": 1e-10}
TWO_PERIODS = torch.tensor([0.0, 4 * math.pi], dtype=DOUBLE)


def test_abm_needs_few_evaluations_at_tight_tolerances() -> None:
    taken = {}
    for name in ("dopri5", "dop853", "abm"):
        sol = solve(two_bodies, TWO_BODIES, TWO_PERIODS, method=name, **TIGHT)
        assert (sol.y[-1] - TWO_BODIES).abs().max() < 1e-7
        taken[name] = sol.stats.nfe
    field = lambda t, y: two_bodies(t, torch.from_numpy(y)).numpy()
    lsoda = solve_ivp(field, (0, 4 * math.pi), TWO_BODIES.numpy(), method="LSODA", **TIGHT)
    assert taken["abm"] < 0.35 * taken["dopri5"]
    assert taken["abm"] < 0.65 * taken["dop853"]
    assert taken["abm"] < lsoda.nfev


@pytest.mark.parametrize(("highest", "least"), [(12, 8), (5, 5), (1, 1)])
def test_abm_raises_its_order(highest: int, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    orders, update = [], OrderController.update

    def watched(self, ops, ratio, error_order, state, method_state):
        orders.append(method_state.order)
        return update(self, ops, ratio, error_order, state, method_state)

    monkeypatch.setattr(OrderController, "update", watched)
    end = TWO_PERIODS if highest > 1 else TWO_PERIODS / 1e4
    solve(two_bodies, TWO_BODIES, end, method="abm", max_order=highest, **TIGHT)
    assert orders[0] == 1 and least <= max(orders) <= highest


def test_abm_evaluations_per_step() -> None:
    f, calls = counted(two_bodies)
    sol = solve(f, TWO_BODIES, torch.tensor([0.0, 5.0], dtype=DOUBLE), method="abm", rtol=1e-4, atol=1e-4, dt0=1.0)
    assert sol.stats.rejected > 0
    # Two for an accepted step, one for a rejected one.
    assert sol.stats.nfe == calls[0] == 2 * sol.stats.accepted + sol.stats.rejected


def test_abm_survives_a_jump_of_f_and_nan() -> None:
    f = lambda t, y: torch.where(t < 1.0, -y, 5.0 - y)
    t = torch.tensor([0.0, 3.0], dtype=DOUBLE)
    sol = solve(f, torch.ones(1, dtype=DOUBLE), t, method="abm", rtol=1e-5, atol=1e-5)
    assert abs(sol.y[-1].item() - (math.exp(-3) + 5 * (1 - math.exp(-2)))) < 1e-3
    root = solve(lambda t, y: -torch.sqrt(y), torch.ones(1, dtype=DOUBLE), t / 3 * 1.999, method="abm", rtol=1e-8, atol=1e-10)
    assert abs(root.y[-1].item() - (1 - 1.999 / 2) ** 2) < 1e-8


def test_abm_derivatives_of_dense_output() -> None:
    exact = THREE["growth"][1]
    t = torch.tensor([0.0, 6.0], dtype=DOUBLE)
    at = torch.linspace(0, 6, 31, dtype=DOUBLE)
    y = exact(at)
    first = y * torch.cos(at).unsqueeze(-1)
    second = (torch.cos(at) ** 2 - torch.sin(at)).unsqueeze(-1) * y
    for options in ({"method": "abm", "rtol": 1e-9, "atol": 1e-9}, *({"method": m, "order": 6, "dt": 0.02} for m in FIXED)):
        sol = solve(THREE["growth"][0], exact(t)[0], t, dense=True, **options)
        torch.testing.assert_close(sol.dense(at, 1), first, rtol=0, atol=1e-5)
        torch.testing.assert_close(sol.dense(at, 2), second, rtol=0, atol=2e-3)


# -- batches ----------------------------------------------------------------------------------------------------------

MU = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=DOUBLE)
START = torch.tensor([[2.0, 0.0]] * 4, dtype=DOUBLE)
CASES = [("explicit_adams", {"order": 5}), ("implicit_adams", {"order": 9}), ("implicit_adams", {"corrector_tol": 1.0})]


def each_alone(f, y0: Tensor, t: Tensor, mu: Tensor, options: dict, joint: bool) -> Tensor:
    """Every sample solved by itself, as a batch of one or in joint mode."""
    found = []
    for i in range(len(y0)):
        own = {k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in options.items()}
        times = t[i] if t.dim() == 2 else t
        if joint:
            own = {k: v.item() if isinstance(v, Tensor) else v for k, v in own.items()}
            found.append(solve(f, y0[i], times, args=(mu[i],), **own).y)
        else:
            found.append(solve(f, y0[i : i + 1], times, args=(mu[i : i + 1],), batch_dim=0, **own).y[:, 0])
    return torch.stack(found, 1)


@pytest.mark.parametrize(("name", "more"), [*CASES, ("abm", {"rtol": 1e-7, "atol": 1e-7})])
def test_rows_do_not_depend_on_their_batch(name: str, more: dict) -> None:
    t = torch.linspace(0, 2, 6, dtype=DOUBLE) * torch.tensor([1.0, 1.2, 0.7, 1.0], dtype=DOUBLE).unsqueeze(1)
    options = {"method": name, **more}
    if name != "abm":
        options["dt"] = torch.tensor([0.05, 0.041, 0.03, 0.02], dtype=DOUBLE)
    together = solve(van_der_pol, START, t, args=(MU,), batch_dim=0, **options).y
    assert torch.equal(together, each_alone(van_der_pol, START, t, MU, options, joint=False))
    torch.testing.assert_close(together, each_alone(van_der_pol, START, t, MU, options, joint=True), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "more"), [*CASES, ("abm", {"rtol": 1e-7, "atol": 1e-7})])
def test_restarts_at_different_times(name: str, more: dict) -> None:
    """Jumps per sample: whoever starts anew does so alone."""
    when = torch.tensor([0.5, math.nan, 1.3, 1.31], dtype=DOUBLE)
    t = torch.linspace(0, 2, 5, dtype=DOUBLE)
    options = {"method": name, **more, **({} if name == "abm" else {"dt": 0.02})}
    kick = lambda t, y: y + 0.3
    f, calls = counted(van_der_pol)
    together = solve(f, START, t, args=(MU,), batch_dim=0, jumps=[Jump(when, kick)], **options)
    assert together.stats.nfe == calls[0]
    for i in range(4):
        own = [Jump(when[i], kick)] if torch.isfinite(when[i]) else []
        alone = solve(van_der_pol, START[i], t, args=(MU[i],), jumps=own, **options)
        torch.testing.assert_close(together.y[:, i], alone.y, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", [*FIXED, "abm"])
def test_groups_of_rows(name: str) -> None:
    index = torch.tensor([0, 1, 1, 0, 2])
    f = lambda t, y: -y * (1 + t[index].unsqueeze(-1)) if t.dim() else -y * (1 + t)
    y0, t = torch.rand(5, 2, dtype=DOUBLE) + 1, torch.linspace(0, 1, 4, dtype=DOUBLE)
    options = {"method": name} if name == "abm" else {"method": name, "dt": 0.01}
    sol = solve(f, y0, t, batch_index=index, **options)
    exact = y0 * torch.exp(-t - t**2 / 2).reshape(-1, 1, 1)
    torch.testing.assert_close(sol.y, exact, rtol=0, atol=1e-5 if name == "abm" else 1e-7)


@pytest.mark.parametrize("name", [*FIXED, "abm"])
@pytest.mark.parametrize("batched", [False, True], ids=["joint", "rows"])
def test_trees_complex_and_single_precision(name: str, batched: bool) -> None:
    options = {"method": name} if name == "abm" else {"method": name, "dt": 0.01}
    options |= {"batch_dim": 0} if batched else {}
    t = torch.tensor([0.0, 0.35, 1.0], dtype=DOUBLE)
    y0 = {"z": torch.ones(2, 3, dtype=torch.complex128), "x": (torch.ones(2, dtype=torch.float32),)}
    sol = solve(lambda t, y: {"z": 1j * y["z"], "x": (-y["x"][0],)}, y0, t, **options)
    assert sol.y["z"].dtype == torch.complex128 and sol.y["x"][0].dtype == torch.float32
    torch.testing.assert_close(sol.y["z"], torch.exp(1j * t).reshape(-1, 1, 1).expand(3, 2, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(sol.y["x"][0], torch.exp(-t).float().unsqueeze(1).expand(3, 2), rtol=0, atol=1e-5)
    single = solve(lambda t, y: -y, torch.ones(2, 3), t, **options).y
    assert single.dtype == torch.float32
    torch.testing.assert_close(single[:, 0, 0], torch.exp(-t).float(), rtol=0, atol=1e-5)


# -- gradients --------------------------------------------------------------------------------------------------------


def problem(rate: Tensor, t: Tensor, y: Tensor) -> Tensor:
    return torch.sin(rate * y) - t * y**2


@pytest.mark.parametrize(("name", "order"), list(itertools.product(FIXED, (1, 4, 6))))
def test_gradients_of_fixed_steps(name: str, order: int) -> None:
    """To y0, to arguments, and to every entry of t: the steps, past ones included, are functions of t."""
    y0 = torch.rand(2, dtype=DOUBLE, requires_grad=True)
    rate = torch.tensor(1.3, dtype=DOUBLE, requires_grad=True)
    t = grid(8).requires_grad_()
    f = lambda t, y, rate: problem(rate, t, y)
    run = lambda y0, t, rate: solve(f, y0, t, args=(rate,), method=name, order=order, controller="fixed").y
    assert torch.autograd.gradcheck(run, (y0, t, rate))
    if order == 4:
        dense = lambda y0, t, rate: solve(f, y0, t, args=(rate,), method=name, order=order, dt=0.13).y
        assert torch.autograd.gradcheck(dense, (y0, t, rate))
        assert torch.autograd.gradgradcheck(lambda y0, rate: run(y0, t.detach()[:6], rate), (y0, rate))


@pytest.mark.parametrize("name", FIXED)
def test_gradients_per_sample(name: str) -> None:
    y0 = torch.rand(2, 1, dtype=DOUBLE, requires_grad=True)
    t = torch.stack([grid(6), -2 * grid(6)]).requires_grad_()
    f = lambda t, y: problem(torch.tensor(1.3), t.unsqueeze(-1), y)
    run = lambda y0, t: solve(f, y0, t, method=name, controller="fixed", batch_dim=0).y
    assert torch.autograd.gradcheck(run, (y0, t))


@pytest.mark.parametrize("batched", [False, True], ids=["joint", "rows"])
def test_gradients_of_abm(batched: bool) -> None:
    """Accepted steps are constants: checked against the derivative of the flow, at a tight tolerance."""
    y0 = torch.tensor([[0.4], [0.9]], dtype=DOUBLE) if batched else torch.tensor([0.4, 0.9], dtype=DOUBLE)
    f = lambda t, y, rate: problem(rate, t if t.dim() == 0 else t.unsqueeze(-1), y)
    rate = torch.tensor(1.3, dtype=DOUBLE)
    t = torch.linspace(0, 2, 5, dtype=DOUBLE)

    def gradients(method: str, adjoint: str = "backprop") -> tuple[Tensor, ...]:
        inputs = [x.clone().requires_grad_() for x in (y0, rate, t)]
        options = {"batch_dim": 0} if batched else {}
        sol = solve(f, inputs[0], inputs[2], args=(inputs[1],), method=method, adjoint=adjoint, rtol=1e-11, atol=1e-11, **options)
        weights = torch.arange(1.0, sol.y.numel() + 1, dtype=DOUBLE).reshape(sol.y.shape)
        return torch.autograd.grad((weights * sol.y).sum(), inputs)

    own = gradients("abm")
    for a, b in zip(own, gradients("dop853")):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
    for a, b in zip(own, gradients("abm", "checkpoint")):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FIXED)
@pytest.mark.parametrize("batched", [False, True], ids=["joint", "rows"])
def test_checkpoint_equals_backprop(name: str, batched: bool) -> None:
    y0 = torch.rand(2, 2, dtype=DOUBLE)
    rate, t = torch.tensor(1.3, dtype=DOUBLE), grid(9)
    f = lambda t, y, rate: problem(rate, t if t.dim() == 0 else t.unsqueeze(-1), y)
    found = []
    for options in ({"adjoint": "backprop"}, {"adjoint": "checkpoint"}, {"adjoint": "checkpoint", "checkpoints": 2}):
        inputs = [x.clone().requires_grad_() for x in (y0, rate, t)]
        options = options | ({"batch_dim": 0} if batched else {})
        y = solve(f, inputs[0], inputs[2], args=(inputs[1],), method=name, order=3, dt=0.07, **options).y
        found.append(torch.autograd.grad((y**2).sum(), inputs))
    for other in found[1:]:
        for a, b in zip(found[0], other):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FIXED)
def test_transforms_of_torch_func(name: str) -> None:
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE)
    y0 = torch.rand(3, dtype=DOUBLE)
    run = lambda y0, rate: solve(lambda t, y: problem(rate, t, y), y0, t, method=name, num_steps=9).y[-1]
    rate = torch.tensor(1.3, dtype=DOUBLE)
    expected = torch.autograd.functional.jacobian(lambda y: run(y, rate), y0)
    torch.testing.assert_close(torch.func.jacrev(run)(y0, rate), expected)
    torch.testing.assert_close(torch.func.jacfwd(run)(y0, rate), expected)
    batch = torch.rand(4, 3, dtype=DOUBLE)
    torch.testing.assert_close(torch.vmap(run, (0, None))(batch, rate), torch.stack([run(y, rate) for y in batch]))


# -- odds and ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FIXED, "abm"])
def test_f_may_answer_in_the_same_memory(name: str) -> None:
    memory = torch.empty(2, dtype=DOUBLE)
    f = lambda t, y: torch.mul(y, -1.0 - t, out=memory)
    t = torch.linspace(0, 1, 5, dtype=DOUBLE)
    options = {"method": name, "dense": True} | ({"dt0": 1e-3} if name == "abm" else {"dt": 0.04})
    with torch.no_grad():
        sol = solve(f, torch.ones(2, dtype=DOUBLE), t, **options)
        safe = solve(lambda t, y: y * (-1.0 - t), torch.ones(2, dtype=DOUBLE), t, **options)
    assert torch.equal(sol.y, safe.y)
    assert torch.equal(sol.dense(t * 0.97), safe.dense(t * 0.97))


@pytest.mark.parametrize("name", [*FIXED, "abm"])
def test_forced_nodes_and_slivers_of_steps(name: str) -> None:
    """A node that leaves a step of 1e-4 dt behind must not hurt."""
    f, exact, _ = THREE["growth"]
    t = torch.tensor([0.0, 2.0], dtype=DOUBLE)
    options = {"rtol": 1e-8, "atol": 1e-8} if name == "abm" else {"dt": 0.01}
    sol = solve(f, exact(t)[0], t, method=name, step_t=[0.500001, 0.5100012, 1.2345], **options)
    torch.testing.assert_close(sol.y, exact(t), rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("explicit_adams", {"order": 0}, "order of an Adams method must be an integer from 1 to 12, found 0"),
        ("explicit_adams", {"order": 13}, "found 13"),
        ("implicit_adams", {"order": 2.0}, "found 2.0"),
        ("implicit_adams", {"max_corrections": 0}, "max_corrections"),
        ("implicit_adams", {"corrector_tol": -1.0}, "corrector_tol"),
        ("abm", {"max_order": 13}, "max_order"),
        ("abm", {"safety": 0.0}, "safety"),
        ("abm", {"factor_max": 1.0}, "factor_max"),
        ("abm", {"factor_min": 2.0}, "factor_min"),
    ],
)
def test_bad_options(method: str, options: dict, words: str) -> None:
    fixed = {} if method == "abm" else {"dt": 0.1}
    with pytest.raises(ArgumentError, match=words):
        solve(lambda t, y: -y, torch.ones(1), [0.0, 1.0], method=method, **fixed, **options)


def test_starts_keep_the_order() -> None:
    assert [start_method(k).order >= k for k in range(2, 13)] == [True] * 11
    assert METHODS["explicit_adams"].order == METHODS["implicit_adams"].order == 4
