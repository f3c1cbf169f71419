"""Inner solvers: each solves the same equations, and none reports as solved what is not."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from problems import problem_of

from solvers import ArgumentError, Status, UnsupportedError, optim, solve
from solvers.layout import Layout
from solvers.optim import INNER_OPTIMIZERS, minimise
from solvers.optim.newton import Newton

D = torch.float64
CONJUGATE = ("fletcher_reeves", "polak_ribiere", "hestenes_stiefel", "dai_yuan")
FIRST_ORDER = (*CONJUGATE, "gradient_descent", "nesterov", "nesterov_restart", "lbfgs", "anderson")
ALL = [name for name in INNER_OPTIMIZERS if name != "newton_sparse"]
first_order = pytest.mark.parametrize("name", FIRST_ORDER)
each = pytest.mark.parametrize("name", ALL)


@torch.no_grad()
def run(name, f, y0, g, tol=1.0, max_iters=2000, atol=1e-8, **how):
    """What one step finds, from its own start."""
    problem, y = problem_of(f, y0, g, atol, **how)
    inner = INNER_OPTIMIZERS[name]
    memory = inner.remember(problem.layout, y)
    return problem, minimise(problem, inner, problem.evaluate(y), tol=tol, max_iters=max_iters, memory=memory)


def diffusion(t, y):
    return 50 * (torch.roll(y, 1, -1) - 2 * y + torch.roll(y, -1, -1))


def advection(t, y):
    """Upwind differences with a reaction: nonlinear, and far from symmetric."""
    return 30 * (torch.roll(y, 1, -1) - y) - y**3


def flip(t, y):
    """Diffusion towards one of two states."""
    return 20 * (torch.roll(y, 1, -1) - 2 * y + torch.roll(y, -1, -1)) + y - y**3


# --- all find the same -----------------------------------------------------------------------------------------------


@first_order
@pytest.mark.parametrize("f", [diffusion, advection, flip])
def test_each_finds_the_solution(name, f):
    y0 = torch.randn(24, dtype=D)
    problem, found = run(name, f, y0, 0.5)
    if name.startswith("nesterov") and f is advection:
        # Momentum amplifies rotations: no solution, and none claimed.
        assert not found.converged
        return
    assert found.converged and problem.norm(problem.residual(found.z)) <= 1.0
    _, exact = run("newton", f, y0, 0.5, tol=1e-3)
    torch.testing.assert_close(found.z, exact.z, rtol=0, atol=3e-7)


@pytest.mark.parametrize("name", CONJUGATE)
@pytest.mark.parametrize("rate", ["cg", "line_search", "constant"])
def test_each_formula_at_each_rate(name, rate):
    y0, after = torch.randn(24, dtype=D), {}
    for inner in (name, "newton"):
        options = {"rate": rate} if inner == name else {}
        after[inner] = solve(flip, y0, [0.0, 1.0], method="prox_euler", num_steps=4, inner=inner, rtol=1e-8, **options).y[-1]
    torch.testing.assert_close(after[name], after["newton"], rtol=1e-7, atol=1e-8)


def test_conjugate_gradients_of_any_formula_are_one_method_on_a_linear_problem():
    """With exact line searches on a quadratic they are the method of Hestenes and Stiefel: as many iterations as eigenvalues."""
    scale = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=D).repeat(8)
    for name in CONJUGATE:
        _, found = run(name, lambda t, y: -scale * y, torch.randn(32, dtype=D), 1.0)
        assert found.converged and 4 <= found.iterations <= 6


def test_lbfgs_and_anderson_need_as_few_iterations_on_it():
    scale = torch.tensor([1.0, 10.0, 100.0], dtype=D).repeat(8)
    for name in ("lbfgs", "anderson"):
        _, found = run(name, lambda t, y: -scale * y, torch.randn(24, dtype=D), 1.0)
        assert found.converged and found.iterations <= 12


def test_momentum_takes_the_root_of_the_iterations():
    scale = torch.logspace(0, 2, 32, dtype=D)
    count = {}
    for name in ("gradient_descent", "nesterov", "nesterov_restart"):
        _, found = run(name, lambda t, y: -scale * y, torch.randn(32, dtype=D), 1.0, max_iters=5000, tol=1e3)
        assert found.converged
        count[name] = found.iterations
    assert count["nesterov"] < count["gradient_descent"] / 3
    assert count["nesterov_restart"] < count["gradient_descent"] / 3


def test_a_symmetric_system_that_takes_long_stays_with_minres():
    """2048 cells over a step of 1/1000 of their slowest time: conjugate residuals need about the root of g rho of iterations,
    and GMRES with restarts, which would forget, is not called in."""
    n = 2048
    field = lambda t, y: n**2 * (torch.roll(y, 1, -1) - 2 * y + torch.roll(y, -1, -1)) / (4 * math.pi**2)
    problem, found = run("newton_krylov", field, torch.randn(n, dtype=D), 1.0, atol=1e-4)
    assert found.converged and found.memory.symmetric == 1 and 500 < problem.calls < 4000


def test_fixed_point_contracts_below_and_diverges_above():
    for scale, converges in ((0.8, True), (1.25, False)):
        f = lambda t, y, scale=scale: -scale * torch.sin(y)
        _, found = run("fixed_point", f, torch.tensor([1e-3, 2e-3], dtype=D), 1.0, 1e-3)
        assert found.converged is converges
        if converges:
            # The residual shrinks by the same factor each time.
            assert found.iterations == pytest.approx(math.log(1e-11 / 1e-3) / math.log(scale), rel=0.1)


# --- samples ---------------------------------------------------------------------------------------------------------


def rows_with_different_needs():
    stiffness = torch.tensor([0.1, 2.0, 8.0, 0.0], dtype=D)

    def f(t, y):
        k = stiffness[:, None] if len(y) > 1 else f.only
        return k * (torch.roll(y, 1, -1) - 2 * y + torch.roll(y, -1, -1)) - y * y * y

    f.stiffness = stiffness
    return f, torch.randn(4, 16, dtype=D)


@first_order
def test_what_a_sample_does_does_not_depend_on_its_batch(name):
    f, y0 = rows_with_different_needs()
    how = {"method": "prox_euler", "inner": name, "batch_dim": 0, "num_steps": 1, "rtol": 1e-3, "atol": 1e-5}
    with torch.no_grad():
        together = solve(f, y0, [0.0, 1.0], **how)
        for i in range(4):
            f.only = f.stiffness[i]
            alone = solve(f, y0[i : i + 1], [0.0, 1.0], **how)
            assert torch.equal(together.y[:, i], alone.y[:, 0])
            assert together.stats.inner_iterations[i] == alone.stats.inner_iterations[0]


@first_order
def test_groups_and_a_bad_sample(name):
    y0 = torch.randn(5, 4, dtype=D)
    index = torch.tensor([1, 0, 1, 0, 2])

    def f(t, y):
        return torch.where((index == 2)[:, None], torch.nan, -2 * y**3)

    with torch.no_grad():
        sol = solve(f, y0, [0.0, 1.0], method="prox_euler", inner=name, num_steps=3, batch_index=index, rtol=1e-7, throw=False)
        assert sol.status.tolist() == [0, 0, Status.NON_FINITE]
        rows = index == 1
        index = index[rows] * 0
        alone = solve(f, y0[rows], [0.0, 1.0], method="prox_euler", inner=name, num_steps=3, batch_index=index, rtol=1e-7)
    torch.testing.assert_close(sol.y[:, rows], alone.y, rtol=1e-6, atol=1e-9)


@each
@pytest.mark.parametrize("batch_dim", [None, 0])
def test_every_call_of_f_is_counted(name, batch_dim):
    calls = [0]

    def f(t, y):
        calls[0] += 1
        return -3 * y**3

    inner_tol = {"fixed_point": 1.0}.get(name, 0.1)
    y0 = torch.tensor([[0.3, 0.2], [0.1, -0.4]], dtype=D)
    sol = solve(f, y0, [0.0, 1.0], method="prox_euler", inner=name, num_steps=4, batch_dim=batch_dim, inner_tol=inner_tol)
    assert sol.stats.nfe == calls[0] and sol.stats.inner == (name,)


# --- nothing unsolved is called solved -------------------------------------------------------------------------------

GRID = {
    "growth: no minimum": lambda t, y: 3 * y,
    "growth: singular": lambda t, y: y,
    "growth: singular in part": lambda t, y: torch.linspace(-5, 1, y.shape[-1], dtype=D) * y,
    "growth of a part": lambda t, y: torch.linspace(-50, 3, y.shape[-1], dtype=D) * y,
    "rotation": lambda t, y: 1e4 * torch.cat([y[..., 3:], -y[..., :3]], -1) - y,
    "shear": lambda t, y: 1e5 * torch.roll(y, 1, -1) * torch.linspace(0, 1, 6, dtype=D) - y,
    "no solution: a jump": lambda t, y: -10 * torch.sign(y - 0.3),
    "no solution: repulsion": lambda t, y: 5 * torch.sign(y) * (1 + y * y),
    "not defined beyond": lambda t, y: -10 * torch.sqrt(y + 0.9),
    "infinite beyond": lambda t, y: 1 / (1.2 - y) - 3 * y,
    "a switch": lambda t, y: -10 * torch.tanh(50 * y),
    "wells": lambda t, y: 20 * (y - y**3),
    "waves": lambda t, y: 30 * torch.sin(20 * y),
    "steep": lambda t, y: -(y**9) * 1e4,
    "exponential": lambda t, y: -torch.exp(8 * y),
    "nowhere": lambda t, y: torch.full_like(y, torch.nan),
    "scales": lambda t, y: -torch.logspace(-6, 6, 6, dtype=D) * y,
    "noise": lambda t, y: -y + 1e-6 * torch.sin(1e9 * y),
    "chaotic map": lambda t, y: 4 * y * (1 - y) * 10,
}


def truly_solved(problem, z, tol):
    """The residual, or what a Newton step would still change, is within the tolerance or rounding, in each sample."""
    r = problem.residual(z)
    if not r.isfinite().all():
        return r.isfinite().all(-1) & (problem.norm(r) <= tol)
    jac = torch.stack([problem.jv(problem.evaluate(z), torch.eye(6, dtype=D)[i].expand_as(z)) for i in range(6)], -1)
    size = problem.norm(r)
    rounding = 4 * torch.finfo(D).eps * problem.norm(z) * torch.linalg.matrix_norm(jac)
    change = torch.linalg.lstsq(jac, r.unsqueeze(-1)).solution.squeeze(-1)
    return (size <= torch.maximum(torch.full_like(size, tol), rounding)) | (problem.norm(change) <= 3 * tol)


@torch.no_grad()
@each
@pytest.mark.parametrize("g", [pytest.param(0.3, marks=pytest.mark.slow), 1.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_no_unconverged_value_is_called_a_success(name, g):
    """Equations that have no solution, many, or one that is hard to get to: what is said to be solved is."""
    y0 = torch.stack([torch.linspace(-0.8, 1.0, 6, dtype=D), 0.2 * torch.ones(6, dtype=D)])
    solved = 0
    for what, f in GRID.items():
        problem, found = run(name, f, y0, torch.full((2,), g, dtype=D), max_iters=60, batch_dim=0)
        assert found.z.isfinite().all(), what
        right = truly_solved(problem, found.z, 1.0) if found.converged.any() else found.converged
        assert not (found.converged & ~right).any(), (what, problem.norm(problem.residual(found.z)))
        solved += int(found.converged.sum())
    assert (solved > 0 or name == "fixed_point") and solved < 2 * len(GRID)


def slow_and_fast(fast):
    """Rates of which four are very fast: rounding allows a residual of 4 eps L |z| only where those have much of the state."""
    return torch.cat([torch.linspace(0.1, 3, 20, dtype=D), fast * torch.tensor([1, 1 / 2, 1 / 7, 1 / 30], dtype=D)])


def cubic_root(a, s):
    """z with z + s (z + z^3) = a, by Newton steps in each component."""
    z = a / (1 + s)
    for _ in range(100):
        z = z - (z + s * (z + z**3) - a) / (1 + s * (1 + 3 * z**2))
    return z


EXTREME = {
    "four fast": lambda fast: (slow_and_fast(fast), lambda s: lambda t, y: -s * y, lambda a, s: a / (1 + s)),
    "all scales": lambda fast: (
        torch.logspace(-1, math.log10(fast), 24, dtype=D), lambda s: lambda t, y: -s * y, lambda a, s: a / (1 + s)
    ),
    "four fast, cubic": lambda fast: (slow_and_fast(fast), lambda s: lambda t, y: -s * (y + y**3), cubic_root),
}  # fmt: skip
BEYOND = 5.0
"""Multiple of the tolerance that an error may have: a residual is evaluated to some digits only."""


@each
@pytest.mark.parametrize("fast", [1e9, pytest.param(1e11, marks=pytest.mark.slow), 3e13])
def test_no_stiffness_makes_an_unconverged_value_a_success(name, fast):
    """L from 1e9 on, where a residual of 4 eps L |z| is far above the tolerance without being rounding."""
    a, solved = torch.randn(24, dtype=D), 0
    for what, make in EXTREME.items():
        rates, field, exact = make(fast)
        problem, found = run(name, field(rates), a, 1.0, tol=0.1, max_iters=120, atol=1e-6)
        if found.converged:
            solved += 1
            assert problem.norm(found.z - exact(a, rates)) <= BEYOND * 0.1, what
    assert solved >= {"newton": 2, "newton_krylov": 2, "fletcher_reeves": 2}.get(name, 0)


@pytest.mark.parametrize("inner", ["newton", "newton_krylov", "fletcher_reeves", "dai_yuan"])
@pytest.mark.parametrize("fast", [1e9, 1e13])
def test_nor_a_wrong_solution_one(inner, fast):
    """Relaxation towards cos t at the same rates, y(0) = 1."""
    rates = slow_and_fast(fast)

    def exact(t):
        steady = lambda t: rates * (rates * math.cos(t) + math.sin(t)) / (rates**2 + 1)
        return steady(t) + (1 - steady(0.0)) * torch.exp(-rates * t)

    field = lambda t, y: -rates * (y - torch.cos(t))
    how = {"method": "prox_bdf", "rtol": 1e-6, "atol": 1e-9, "inner": inner, "max_steps": 120, "throw": False}
    sol = solve(field, torch.ones(24, dtype=D), [0.0, 1.0], **how)
    assert sol.success or inner != "newton"
    assert not sol.success or float((sol.y[-1] - exact(1.0)).abs().max()) < 1e-4


@pytest.mark.parametrize("method", ["prox_euler", "prox_bdf2", "prox_multistage2"])
@pytest.mark.parametrize("name", ["fixed_point", "gradient_descent", "anderson", "fletcher_reeves"])
def test_what_failed_is_solved_by_another_and_both_are_named(name, method):
    how = {"method": method, "inner": name, "num_steps": 5, "rtol": 1e-6, "max_iters": 3, "throw": False}
    y0 = torch.tensor([1.0, 0.5, -0.3, 0.1, 0.0, 0.7], dtype=D)
    sol = solve(GRID["rotation"], y0, [0.0, 1.0], fallback="newton_krylov", **how)
    assert sol.success and sol.stats.inner == (name, "newton_krylov")
    alone = solve(GRID["rotation"], y0, [0.0, 1.0], fallback=None, **how)
    assert alone.status == Status.INNER_NOT_CONVERGED and alone.y[-1].isnan().all() and alone.stats.inner == (name,)


# --- the thesis' settings ---------------------------------------------------------------------------------------------


def test_stopping_by_the_step_as_the_thesis_does():
    """Xia 2023, section 5.1: |z' - z| <= eps at the constant rate eta. It stops where |r| is still about eps / eta."""
    y0, scale = torch.linspace(-1, 1, 20, dtype=D), torch.logspace(0, 2, 20, dtype=D)
    how = {"method": "prox_euler", "num_steps": 1, "rtol": 1e-300, "atol": 1e-6, "inner_tol": 1.0, "rate": 0.01}
    f = lambda t, y: -scale * y
    error, count = {}, {}
    for stop in ("step", "residual"):
        sol = solve(f, y0, [0.0, 1.0], inner="gradient_descent", inner_stop=stop, **how)
        error[stop] = float((sol.y[-1] - y0 / (1 + scale)).square().mean().sqrt())
        count[stop] = sol.stats.inner_iterations
    assert error["residual"] <= 1e-6 < 1e-5 < error["step"] < 1e-4
    assert count["step"] < count["residual"]
    fr = solve(f, y0, [0.0, 1.0], inner="fletcher_reeves", inner_stop="step", **how)
    assert float((fr.y[-1] - y0 / (1 + scale)).abs().max()) < 1e-3
    how["rate"] = 0.1
    wild = solve(f, y0, [0.0, 1.0], inner="fletcher_reeves", inner_stop="step", fallback=None, throw=False, **how)
    assert wild.status == Status.INNER_NOT_CONVERGED


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"inner": "lbfgs", "history": 0}, ["history", "0"]),
        ({"inner": "gradient_descent", "rate": "cg"}, ["rate", "constant"]),
        ({"inner": "nesterov", "inner_stop": "soon"}, ["inner_stop", "residual, step"]),
        ({"inner": "fletcher_reeves", "inner_stop": "step"}, ["inner_stop", "line_search"]),
        ({"inner": "anderson", "rate": 0.1}, ["rate"]),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ArgumentError) as caught:
        solve(lambda t, y: pytest.fail("f was called"), torch.ones(2, dtype=D), [0, 1], method="prox_euler", dt=0.1, **options)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("method", ["prox_euler", "prox_bdf", "prox_multistage2", "radauIIA5"])
def test_a_dense_matrix_that_no_memory_holds_is_refused_before_any_work(method):
    field, step = lambda t, y: pytest.fail("f was called"), {"dt0" if method == "prox_bdf" else "dt": 0.1}
    with pytest.raises(UnsupportedError) as caught:
        solve(field, torch.ones(200_000, dtype=D), [0.0, 1.0], method=method, inner="newton", **step)
    assert all(word in str(caught.value) for word in ("200000 x 200000", "3.2e+11 bytes", "newton_krylov", "newton_sparse"))


def test_nor_does_the_automatic_choice_make_so_many_small_ones():
    rows = torch.zeros((), dtype=D).expand(100_000, 400)
    assert type(Newton("auto").chosen(Layout(rows[:100], batch_dim=0))) is Newton
    assert Newton("auto").chosen(Layout(rows, batch_dim=0)).name == "newton_krylov"


def test_the_example_of_the_guide_runs_and_solves():
    """A reader's own inner solver, as the page shows it: what it gives is what the others give, in both modes."""
    text = (Path(optim.__file__).parent / "README.md").read_text(encoding="utf-8")
    names: dict = {}
    try:
        for block in re.findall(r"```python\n(.*?)```", text, re.S):
            exec(block, names)
        assert names["sol"].stats.inner == ("barzilai_borwein",)
        y0 = torch.randn(24, dtype=D)
        for how in ({}, {"batch_dim": 0}):
            start = y0 if not how else y0.view(2, 12)
            _, found = run("barzilai_borwein", flip, start, 0.5 if not how else torch.full((2,), 0.5, dtype=D), **how)
            _, exact = run("newton", flip, start, 0.5 if not how else torch.full((2,), 0.5, dtype=D), **how, tol=1e-3)
            assert bool(torch.as_tensor(found.converged).all())
            torch.testing.assert_close(found.z, exact.z, rtol=0, atol=3e-7)
        _, found = run("barzilai_borwein", GRID["no solution: repulsion"], torch.ones(6, dtype=D), 1.0)
        assert not found.converged
    finally:
        INNER_OPTIMIZERS._items.pop("barzilai_borwein", None)
