"""Gradients of proximal steps on stiff batches: implicit and unrolled, by every adjoint, in how much memory, what they learn."""

from __future__ import annotations

import pytest
import torch

from solvers import ArgumentError, Status, UnsupportedError, solve

D = torch.float64
SCHEMES = ("prox_euler", "prox_cn", "prox_bdf2", "prox_bdf3", "prox_bdf4", "prox_multistage2", "prox_multistage3")
DAILY = ("prox_euler", "prox_bdf2")
each = pytest.mark.parametrize("name", [n if n in DAILY else pytest.param(n, marks=pytest.mark.slow) for n in SCHEMES])


def stiff(t, y, k, w):
    """Three unknowns with rates of 1, 1e2 and 1e4, coupled by a nonlinear and nonsymmetric part."""
    rates = torch.tensor([1.0, 1e2, 1e4], dtype=y.dtype)
    return -rates * torch.exp(k) * y - y**3 + torch.tanh(y @ w) + torch.cos(t).unsqueeze(-1)


def inputs(batch=2):
    y0 = torch.randn(batch, 3, dtype=D, requires_grad=True)
    k = (0.2 * torch.randn(3, dtype=D)).requires_grad_()
    w = (0.4 * torch.randn(3, 3, dtype=D)).requires_grad_()
    return y0, k, w


@each
@pytest.mark.parametrize("adjoint", ["backprop", "checkpoint"])
def test_gradcheck_on_a_stiff_nonlinear_batch(name, adjoint):
    def run(y0, k, w):
        how = {"method": name, "num_steps": 4, "batch_dim": 0, "inner_tol": 1e-6, "backward_tol": 1e-13}
        return solve(stiff, y0, [0.0, 0.3, 0.7], args=(k, w), adjoint=adjoint, **how).y[1:]

    assert torch.autograd.gradcheck(run, inputs(), rtol=1e-5, atol=1e-7, fast_mode=True, check_undefined_grad=False)


@pytest.mark.parametrize("inner", ["newton", "newton_krylov", "fletcher_reeves"])
def test_an_iterate_that_was_not_evaluated_is_looked_at_before_it_is_differentiated(inner):
    """The first correction lands within a tolerance of 10 where f of the second row is not defined."""
    edge = torch.tensor([[-1.0], [0.5]], dtype=D)
    y0 = torch.ones(2, 3, dtype=D, requires_grad=True)
    how = {"method": "prox_euler", "num_steps": 1, "atol": 10.0, "inner_tol": 1.0, "fallback": None, "throw": False}
    sol = solve(lambda t, y: torch.where(y < edge, torch.nan, -y), y0, [0.0, 2.0], inner=inner, batch_dim=0, **how)
    assert sol.status.tolist() == [Status.SUCCESS, Status.NON_FINITE]
    torch.testing.assert_close(torch.autograd.grad(sol.y[-1, 0].sum(), y0)[0][0], torch.full((3,), 1 / 3, dtype=D))


# --- through the iterations ------------------------------------------------------------------------------------------


def ring(t, y, k, rate=60):
    """Diffusion with the logarithms of its conductivities as parameters, and a cubic sink."""
    c = torch.exp(k)
    flow = c * (torch.roll(y, -1, -1) - y)
    return rate * (flow - torch.roll(flow, 1, -1)) - y**3


def gradients(name, y0, k, **options):
    how = {"method": name, "num_steps": 5, "rtol": 1e-6, "atol": 1e-8} | options
    y = solve(ring, y0, [0.0, 0.5], args=(k,), **how).y[-1]
    return torch.autograd.grad(y.square().sum() + torch.sin(y).sum(), (y0, k))


@each
@pytest.mark.parametrize("inner", ["fletcher_reeves", "nesterov"])
def test_unrolled_iterations_have_nearly_the_gradient_of_the_solution(name, inner):
    """Start attached: the error falls with that of the iterates; less evenly where step lengths follow the residual."""
    y0 = torch.randn(12, dtype=D, requires_grad=True)
    k = (0.3 * torch.randn(12, dtype=D)).requires_grad_()
    exact = gradients(name, y0, k, inner_tol=1e-6, backward_tol=1e-13)
    for tol, bound in ((1.0, 2e-2), (1e-4, 1e-4 if inner == "nesterov" else 2e-3)):
        found = gradients(name, y0, k, implicit_diff=False, inner=inner, inner_tol=tol)
        for a, b in zip(found, exact, strict=True):
            assert float((a - b).norm() / b.norm()) < bound, tol


@pytest.mark.parametrize(
    "how",
    [{"batch_dim": 0}, *(pytest.param(how, marks=pytest.mark.slow) for how in ({"adjoint": "checkpoint"}, {"rate": "constant"}))],
)
def test_unrolled_in_other_modes(how):
    y0 = torch.randn(2, 12, dtype=D, requires_grad=True)
    k = (0.3 * torch.randn(12, dtype=D)).requires_grad_()
    for name in DAILY:
        exact = gradients(name, y0, k, inner_tol=1e-6, backward_tol=1e-13, batch_dim=how.get("batch_dim"))
        found = gradients(name, y0, k, implicit_diff=False, inner_tol=1e-4, **how)
        for a, b in zip(found, exact, strict=True):
            assert float((a - b).norm() / b.norm()) < 1e-3


def test_unrolling_needs_iterations_that_can_be_recorded():
    for name in DAILY:
        for inner in ("newton", "lbfgs", "anderson"):
            with pytest.raises(ArgumentError, match=f"implicit_diff=False.*'{inner}'.*fletcher_reeves"):
                solve(lambda t, y: pytest.fail("called"), torch.ones(2), [0.0, 1.0], method=name, dt=0.1, inner=inner,
                      implicit_diff=False)  # fmt: skip


def kept_bytes(run):
    """Bytes of the tensors that autograd keeps for the backward pass, each storage once."""
    seen: dict[int, int] = {}
    alive = []

    def pack(x):
        alive.append(x)
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = run()
    return y, sum(seen.values())


@pytest.mark.slow
def test_memory_of_200_steps_against_unrolling(capsys):
    """Implicit: a handful of states a step, whatever the number of iterations; checkpoint: less."""
    n = 256
    y0, k = torch.randn(n, dtype=D, requires_grad=True), torch.zeros(n, dtype=D, requires_grad=True)
    how = {"method": "prox_bdf2", "num_steps": 200, "args": (k, 600), "inner_tol": 1e-2}
    memory = {}
    for label, way in {
        "implicit": {}, "checkpoint": {"adjoint": "checkpoint"}, "unrolled": {"implicit_diff": False}
    }.items():  # fmt: skip
        run = lambda way=way: solve(ring, y0, [0.0, 20.0], **how, **way).y[-1]
        _, memory[label] = kept_bytes(run)
    with capsys.disabled():
        print({label: f"{size / (8 * n * 200):.1f} states a step" for label, size in memory.items()})
    assert memory["implicit"] < memory["unrolled"] / 10
    assert memory["checkpoint"] < memory["implicit"]
    assert memory["implicit"] < 8 * 200 * 8 * n


# --- the continuous adjoint ------------------------------------------------------------------------------------------


def test_backsolve_by_the_same_proximal_method_where_it_is_stable():
    """Xia 2023, (5.3). Backwards a dissipative problem grows, so that it has to be asked for by name."""
    y0 = torch.tensor([0.4, -0.3], dtype=D, requires_grad=True)
    a = torch.tensor([[-1.0, 0.6], [-0.7, -0.8]], dtype=D, requires_grad=True)
    f = lambda t, y, a: torch.tanh(a @ y)
    how = {"method": "prox_bdf2", "args": (a,), "inner_tol": 1e-4, "rtol": 1e-8, "atol": 1e-10}

    def gradient(n, **options):
        y = solve(f, y0, [0.0, 1.0], num_steps=n, **how, **options).y[-1]
        return torch.autograd.grad(y.square().sum(), (y0, a))

    error = []
    exact = gradient(160)
    for n in (10, 20):
        found = gradient(n, adjoint="backsolve", adjoint_method="prox_bdf2")
        error.append(max(float((x - y).abs().max()) for x, y in zip(found, exact, strict=True)))
    assert error[1] < 1e-2 and error[0] / error[1] > 3
    with pytest.raises(UnsupportedError, match="not dissipative.*checkpoint"):
        gradient(20, adjoint="backsolve")


# --- what can be learnt ----------------------------------------------------------------------------------------------


def fitted(observed, start, rounds):
    """Parameters by Gauss-Newton steps on the logarithms, a row of gradients for each observation."""
    log_p = start.log().requires_grad_()
    for _ in range(rounds):
        left = observed(log_p.exp())
        rows = torch.stack([torch.autograd.grad(x, log_p, retain_graph=True)[0] for x in left])
        change = torch.linalg.lstsq(rows, -left.detach().unsqueeze(-1)).solution.squeeze(-1)
        log_p = (log_p.detach() + change.clamp(-1, 1)).requires_grad_()
    return log_p.detach().exp()


@pytest.mark.slow
def test_two_rates_of_robertson_are_recovered():
    """From factors of 2 and 3 away to 1 %, by what is left of the first substance at three times."""
    true = torch.tensor([0.04, 1e4], dtype=D)
    times = torch.tensor([0.0, 0.4, 4.0, 40.0], dtype=D)
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=D)

    def field(t, y, k):
        a, b, c = y.unbind(-1)
        one, two, three = k[0] * a, k[1] * b * c, 3e7 * b**2
        return torch.stack([two - one, one - two - three, three], -1)

    def run(k):
        return solve(field, y0, times, method="prox_bdf", args=(k,), rtol=1e-6, atol=1e-10).y[1:, 0]

    with torch.no_grad():
        data = run(true)
    found = fitted(lambda k: run(k) - data, true * torch.tensor([2.0, 1 / 3], dtype=D), 5)
    assert float((found / true - 1).abs().max()) < 1e-2


@pytest.mark.slow
def test_a_reaction_diffusion_field_is_recovered():
    """u' = a Lap u + b u (1 - u) at L = 1 + dt rho = 4.7, from its values at four points and two times, by prox_bdf2."""
    n, true = 48, torch.tensor([0.8, 3.0], dtype=D)
    x = torch.arange(n, dtype=D) / n
    y0 = 0.5 + 0.3 * torch.sin(2 * torch.pi * x) + 0.1 * torch.cos(6 * torch.pi * x)

    def field(t, u, p):
        lap = (torch.roll(u, 1, -1) - 2 * u + torch.roll(u, -1, -1)) * n**2
        return p[0] * 0.01 * lap + p[1] * u * (1 - u)

    def run(p):
        y = solve(field, y0, [0.0, 0.3, 0.6], method="prox_bdf2", dt=0.05, args=(p,), rtol=1e-6, atol=1e-8).y
        return y[1:, ::12].flatten()

    with torch.no_grad():
        data = run(true)
    found = fitted(lambda p: run(p) - data, torch.tensor([2.0, 1.0], dtype=D), 6)
    assert float((found / true - 1).abs().max()) < 1e-2
