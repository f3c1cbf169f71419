"""Gradients of every registered method by backprop: exact derivatives of the discrete map, and second ones."""

from __future__ import annotations

import pytest
import torch
from problems import ANY_FIELD, SMOOTH, driven, driven_exact, entire, entire_exact
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from solvers import METHODS, UnsupportedError, solve
from solvers.registry import options_of

FIXED = [name for name in ANY_FIELD if not METHODS[name].variable_order]
ADAPTIVE = [name for name in ANY_FIELD if METHODS[name].error_order is not None]
OPAQUE = [name for name in ANY_FIELD if METHODS[name].implicit or METHODS[name].reads_values]
EXPLICIT = [name for name in FIXED if name not in OPAQUE]

ALIKE = ("prox_bdf2", "prox_bdf3", "prox_multistage2", "prox_multistage3")
"""Other orders of what prox_bdf4 does, which starts by the stages of prox_multistage3."""
EACH_FIXED = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in FIXED]
)
EACH_ADAPTIVE = pytest.mark.parametrize("name", ADAPTIVE)
EACH_EXPLICIT = pytest.mark.parametrize("name", EXPLICIT)
BOTH_MODES = pytest.mark.parametrize("batch_dim", [None, 0], ids=["joint", "rows"])
DAILY = ("prox_euler", "radauIIA3", "rkc2", "semi_implicit_euler")
"""Steps that solve systems take long one sample at a time: these are tried every day so, and all of them jointly."""
MODES = {"joint": (None,), "rows": (0,)}
WAYS = {f"{mode}-{grid}": (*values, grid) for mode, values in MODES.items() for grid in ("num_steps", "dt", "grid")}
RARE = ("rows-num_steps", "rows-grid")


def in_both_modes(names: list[str], ways: dict[str, tuple] = MODES) -> pytest.MarkDecorator:
    """``name`` and ``batch_dim``, and where ``ways`` says so ``grid``."""
    seldom = lambda name, way: name in ALIKE or way in RARE or (way.startswith("rows") and name in OPAQUE and name not in DAILY)
    cases = [
        pytest.param(name, *values, marks=pytest.mark.slow if seldom(name, way) else (), id=f"{name}-{way}")
        for name in names
        for way, values in ways.items()
    ]
    return pytest.mark.parametrize(("name", "batch_dim", "grid")[: 1 + len(next(iter(ways.values())))], cases)


CLOSE = {"rtol": 1e-5, "atol": 1e-7, "check_undefined_grad": False}
GRIDS = {"num_steps": {"num_steps": 6}, "dt": {"dt": 0.15}, "grid": {"controller": "fixed"}}
"""Three ways to ask for fixed steps: six, or seven of which the last is short; or one for every output."""


def tight(name: str) -> dict[str, float]:
    """Options that make implicit steps, and the linear equations of their derivatives, all but exact."""
    wanted = {"inner_tol": 1e-7, "backward_tol": 1e-13}
    return {option: value for option, value in wanted.items() if option in options_of(METHODS[name])}


def double(*values, device: torch.device, grad: bool = True) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device, requires_grad=grad)


def field(t: Tensor, y: Tensor, weights: dict[str, Tensor], bias: Tensor) -> Tensor:
    """Nonlinear, not autonomous; a contraction, so that implicit steps of any length have a solution."""
    return torch.tanh(y @ weights["matrix"] + bias * torch.sin(3 * t).unsqueeze(-1)) - weights["rate"] * y**3


def parameters(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    matrix = double([-0.6, 0.4], [-0.5, -0.3], device=device)
    return matrix, double(0.2, device=device), double(0.7, -0.4, device=device)


def start(batch_dim: int | None, device: torch.device) -> Tensor:
    return double(0.4, -0.8, device=device) if batch_dim is None else double([0.4, -0.8], [1.1, 0.3], device=device)


def output_times(batch_dim: int | None, device: torch.device) -> Tensor:
    """Interior outputs, none on a node of ``num_steps`` or ``dt``; in a batch the second sample runs backwards."""
    t = double(0.0, 0.22, 0.58, 0.93, device=device)
    if batch_dim is None:
        return t
    return torch.stack([t.detach(), 1.3 - 0.45 * t.detach()]).requires_grad_()


def mixed(y: Tensor) -> Tensor:
    """Two sums over all outputs with irregular weights: enough for ``gradcheck`` to see any that is wrong."""
    numbers = torch.arange(1, y.numel() + 1, dtype=torch.float64, device=y.device).reshape(y.shape)
    return torch.stack([(torch.sin(7 * numbers) * y).sum(), (torch.cos(5 * numbers**2) * y).sum()])


def run(name: str, batch_dim: int | None, grid: dict):
    def solution(y0: Tensor, t: Tensor, matrix: Tensor, rate: Tensor, bias: Tensor) -> Tensor:
        args = ({"matrix": matrix, "rate": rate}, bias)
        return mixed(solve(field, y0, t, method=name, batch_dim=batch_dim, args=args, **grid, **tight(name)).y)

    return solution


# --- fixed steps: the exact derivative of the discrete map -----------------------------------------------------------


@in_both_modes(FIXED, WAYS)
def test_first_derivatives_to_state_times_and_arguments(name, batch_dim, grid, device):
    """To y0, to every entry of t, to each leaf of args, through outputs between the nodes and on them ("grid")."""
    inputs = (start(batch_dim, device), output_times(batch_dim, device), *parameters(device))
    assert gradcheck(run(name, batch_dim, GRIDS[grid]), inputs, **CLOSE)


@in_both_modes(FIXED)
def test_second_derivatives_to_state_times_and_arguments(name, batch_dim, device):
    # One step more than the start of a multistep method of order 4, and the fewest numbers.
    t = double(0.0, 0.3, 0.5, device=device)
    y0, rate = double(0.6, device=device), double(0.3, device=device)

    def solution(y0: Tensor, t: Tensor, rate: Tensor) -> Tensor:
        times = t if batch_dim is None else torch.stack([t, 0.9 * t + 0.1])
        state = y0 if batch_dim is None else torch.stack([y0, 0.7 * y0])
        f = lambda t, y, rate: torch.sin(t + 1).unsqueeze(-1) * y - rate * y**3
        steps = 4 if not METHODS[name].one_step else 2
        settings = {"method": name, "batch_dim": batch_dim, "num_steps": steps, **tight(name)}
        return solve(f, state, times, args=(rate,), **settings).y[1:]

    assert gradgradcheck(solution, (y0, t, rate), rtol=1e-4, atol=1e-6)


@in_both_modes(FIXED)
def test_derivatives_to_a_module_and_to_captured_leaves(name, batch_dim, device):
    """Parameters that f reaches by itself are inputs like any other."""
    module = nn.Linear(2, 2).double().to(device)
    scale = double(0.8, device=device)
    y0, t = start(batch_dim, device).detach(), [0.0, 0.3, 0.5]

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.tanh(self.inner(y)) * scale - t.unsqueeze(-1) * y

    wrapped = Wrapped()
    leaves = (*module.parameters(), scale)
    assert gradcheck(
        lambda *leaves: mixed(solve(wrapped, y0, t, method=name, batch_dim=batch_dim, num_steps=5, **tight(name)).y),
        leaves, **CLOSE,
    )  # fmt: skip


@pytest.mark.parametrize("grid", ["num_steps", "dt"])
@in_both_modes(FIXED)
def test_an_output_on_a_node_moves_along_the_solution(name, batch_dim, grid, device):
    """dL/dt_i at a node is g . dy/dt of the extension there: of either side where they differ. Where they don't, the
    solution is a smooth function of all times, the node's own motion with the first and last included."""
    h = 0.125
    t = torch.arange(0, 9, 2, dtype=torch.float64, device=device) * h
    t = t if batch_dim is None else torch.stack([t, t + 0.5])
    y0 = start(batch_dim, device).detach()
    args = tuple(p.detach() for p in parameters(device))
    settings = {"method": name, "batch_dim": batch_dim, "args": ({"matrix": args[0], "rate": args[1]}, args[2])}
    settings |= {"num_steps": 8} if grid == "num_steps" else {"dt": h}
    settings |= tight(name)
    dense = solve(field, y0, t, dense=True, **settings).dense
    t.requires_grad_()
    y, smooth = solve(field, y0, t, **settings).y, True
    for output in (1, 2, 3):
        weights = torch.randn_like(y0)
        (gradient,) = torch.autograd.grad((weights * y[output]).sum(), t, retain_graph=True)
        here = t.detach()[..., output : output + 1]
        sides = [(weights * dense(here + shift, derivative=1)[0]).sum(-1) for shift in (-1e-9, 1e-9)]
        low, high = torch.minimum(*sides), torch.maximum(*sides)
        found = gradient[..., output]
        assert (found >= low - 1e-7).all() and (found <= high + 1e-7).all(), (found, low, high)
        smooth = smooth and bool((high - low < 1e-7).all())
    if smooth and batch_dim is None:
        assert gradcheck(lambda t: mixed(solve(field, y0, t, **settings).y), (t,), **(CLOSE | {"atol": 1e-5}))


# --- adaptive steps: nodes inside are constants ----------------------------------------------------------------------


def accuracy(name: str) -> tuple[float, float]:
    """Tolerance of the solve, and the largest error of its gradients."""
    order = METHODS[name].order
    if order == 1:
        return 1e-5, 3e-2
    return {2: (1e-6, 3e-3), 3: (1e-8, 1e-5)}.get(order, (1e-9, 1e-6))


@in_both_modes(ADAPTIVE)
def test_gradients_of_adaptive_solves_are_those_of_the_solution(name, batch_dim, device):
    """Against a closed form: to y0, t0, every output time (the last is that of the last step) and an argument."""
    tol, limit = accuracy(name)
    y0, rate = double(0.9, 1.4, device=device), double(1.5, device=device)
    t = double(0.1, 0.3, 0.65, 1.0, device=device)
    weights = torch.randn(4, 2, dtype=torch.float64, device=device)
    state = y0 if batch_dim is None else y0.unsqueeze(0)
    y = solve(driven, state, t, method=name, rtol=tol, atol=tol, batch_dim=batch_dim, args=(rate,)).y
    y = y if batch_dim is None else y[:, 0]
    found = torch.autograd.grad((weights * y).sum(), (y0, t, rate))
    after = torch.cat([y0.unsqueeze(0), driven_exact(t[1:], y0, t[0], rate)])
    wanted = torch.autograd.grad((weights * after).sum(), (y0, t, rate))
    # The first step of a BDF is backward Euler: the derivative to its start has an error of its length.
    first = tol**0.5 if name == "prox_bdf" else limit
    for ours, exact, bound in zip(found, wanted, (limit, first, limit)):
        torch.testing.assert_close(ours, exact, rtol=bound, atol=bound)


@in_both_modes(ADAPTIVE)
def test_an_interior_output_of_an_adaptive_solve_moves_along_the_extension(name, batch_dim, device):
    """dL/dt_i = g . dy/dt exactly, with dy/dt of the continuous extension; g . f up to its accuracy."""
    tol, limit = accuracy(name)
    y0 = entire_exact(torch.zeros((), dtype=torch.float64, device=device))
    state = y0 if batch_dim is None else y0.expand(2, -1)
    t = double(0.0, 0.21, 0.47, 0.83, 1.0, device=device)
    settings = {"method": name, "rtol": tol, "atol": tol, "batch_dim": batch_dim}
    dense = solve(entire, state, t.detach(), dense=True, **settings).dense
    y = solve(entire, state, t, **settings).y
    weights = torch.randn_like(y)
    weights[0] = weights[-1] = 0
    (gradient,) = torch.autograd.grad((weights * y).sum(), t)
    slopes = dense(t.detach()[1:-1], derivative=1)
    exact = (weights[1:-1] * slopes).flatten(1).sum(1)
    torch.testing.assert_close(gradient[1:-1], exact, rtol=1e-9, atol=1e-9)
    inside = [weights[i] * entire(t[i].detach().expand(state.shape[:-1]), y[i].detach()) for i in (1, 2, 3)]
    along = torch.stack([x.sum() for x in inside])
    torch.testing.assert_close(gradient[1:-1], along, rtol=100 * limit, atol=100 * limit)


@EACH_ADAPTIVE
def test_second_derivatives_of_adaptive_solves(name, device):
    """d2y/dy0 dt at the end, from the closed form."""
    tol, limit = accuracy(name)
    y0, t = double(0.9, 1.4, device=device), double(0.0, 0.8, device=device)

    def second(final: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(final[0] ** 2 + final[1], y0, create_graph=True)
        return torch.cat([x.flatten() for x in torch.autograd.grad(first[0] * first[1], (y0, t))])

    found = second(solve(driven, y0, t, method=name, rtol=tol, atol=tol).y[-1])
    wanted = second(driven_exact(t[1:], y0, t[0])[0])
    torch.testing.assert_close(found, wanted, rtol=10 * limit, atol=10 * limit)


# --- torch.func ------------------------------------------------------------------------------------------------------


def final(name: str, batch_dim: int | None, t: Tensor):
    """(y0, bias, times) -> the outputs, for transforms."""
    matrix, rate, _ = (p.detach() for p in parameters(t.device))

    def solution(y0: Tensor, bias: Tensor, times: Tensor = t) -> Tensor:
        args = ({"matrix": matrix, "rate": rate}, bias)
        return solve(field, y0, times, method=name, batch_dim=batch_dim, num_steps=5, args=args).y

    return solution


@BOTH_MODES
@EACH_EXPLICIT
def test_functional_transforms_of_explicit_methods_at_fixed_steps(name, batch_dim, device):
    """grad, jacrev and jvp give what torch.autograd gives."""
    t = double(0.0, 0.37, 0.8, device=device, grad=False)
    y0, bias = start(batch_dim, device).detach(), parameters(device)[2].detach()
    solution = final(name, batch_dim, t)
    jacobian = torch.autograd.functional.jacobian(solution, (y0, bias))
    weights = torch.randn(3, *y0.shape, dtype=torch.float64, device=device)
    loss = lambda y0, bias: (weights * solution(y0, bias)).sum()
    leaves = (y0.clone().requires_grad_(), bias.clone().requires_grad_())
    wanted = torch.autograd.grad(loss(*leaves), leaves)
    for found, exact in zip(torch.func.grad(loss, argnums=(0, 1))(y0, bias), wanted):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    for found, exact in zip(torch.func.jacrev(solution, argnums=(0, 1))(y0, bias), jacobian):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    tangent = torch.randn_like(y0)
    value, along = torch.func.jvp(lambda y0: solution(y0, bias), (y0,), (tangent,))
    torch.testing.assert_close(value, solution(y0, bias), rtol=1e-12, atol=1e-12)
    exact = torch.einsum("...a,a->...", jacobian[0].flatten(-y0.dim()), tangent.flatten())
    torch.testing.assert_close(along, exact, rtol=1e-11, atol=1e-12)


@BOTH_MODES
@pytest.mark.parametrize("name", [name for name in ADAPTIVE if name not in OPAQUE])
def test_functional_transforms_of_explicit_methods_at_adaptive_steps(name, batch_dim, device):
    """First and second derivatives by torch.func are those of torch.autograd: they go through the same steps."""
    t = double(0.0, 0.37, 0.8, device=device, grad=False)
    matrix, rate, bias = (x.detach() for x in parameters(device))
    weights = {"matrix": matrix, "rate": rate}
    y0 = start(batch_dim, device).detach()

    def solution(y0, bias):
        return solve(field, y0, t, args=(weights, bias), method=name, rtol=1e-4, atol=1e-6, batch_dim=batch_dim).y

    loss = lambda y0, bias: solution(y0, bias).pow(3).sum()
    exact = torch.autograd.functional.jacobian(solution, (y0, bias))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(solution, argnums=(0, 1))(y0, bias), exact, rtol=1e-10, atol=1e-12)
    second = torch.autograd.functional.hessian(loss, (y0, bias))
    torch.testing.assert_close(torch.func.hessian(loss, argnums=(0, 1))(y0, bias), second, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("mode", ["jacrev", "jvp", "vmap"])
@EACH_EXPLICIT
def test_functional_transforms_to_the_times_are_right_or_refused(name, mode, device):
    t = double(0.0, 0.37, 0.8, device=device, grad=False)
    y0, bias = start(None, device).detach(), parameters(device)[2].detach()
    solution = lambda t: final(name, None, t)(y0, bias, t)
    tangent = torch.randn_like(t)
    jacobian = torch.autograd.functional.jacobian(solution, t)
    try:
        if mode == "jacrev":
            found, exact = torch.func.jacrev(solution)(t), jacobian
        elif mode == "jvp":
            found, exact = torch.func.jvp(solution, (t,), (tangent,))[1], jacobian @ tangent
        else:
            batch = torch.stack([t, 1.1 * t])
            found, exact = torch.func.vmap(solution)(batch), torch.stack([solution(x) for x in batch])
    except UnsupportedError as error:
        assert "torch.func" in str(error)
    else:
        torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-12)


@EACH_EXPLICIT
def test_vmap_of_explicit_methods_at_fixed_steps_is_a_loop(name, device):
    t = double(0.0, 0.37, 0.8, device=device, grad=False)
    y0 = torch.randn(3, 2, dtype=torch.float64, device=device)
    bias = parameters(device)[2].detach()
    solution = final(name, None, t)
    alone = torch.stack([solution(y, bias) for y in y0])
    torch.testing.assert_close(torch.func.vmap(solution, in_dims=(0, None))(y0, bias), alone, rtol=1e-12, atol=1e-12)
    per_sample = torch.func.vmap(torch.func.jacrev(solution, argnums=1), in_dims=(0, None))(y0, bias)
    wanted = torch.stack([torch.autograd.functional.jacobian(lambda b, y=y: solution(y, b), bias) for y in y0])
    torch.testing.assert_close(per_sample, wanted, rtol=1e-12, atol=1e-12)


TRANSFORMS = {
    "grad": lambda f, y: torch.func.grad(lambda y: f(y).sum())(y),
    "jacrev": lambda f, y: torch.func.jacrev(f)(y),
    "jvp": lambda f, y: torch.func.jvp(f, (y,), (torch.ones_like(y),)),
    "vmap": lambda f, y: torch.func.vmap(f)(y.expand(2, -1)),
}


@pytest.mark.parametrize(
    ("name", "transform"),
    [
        *((name, "vmap") for name in ADAPTIVE if name not in OPAQUE),
        *((name, transform) for name in ADAPTIVE if name in OPAQUE for transform in TRANSFORMS),
        *((f"{name} at fixed steps", transform) for name in FIXED if name in OPAQUE for transform in TRANSFORMS),
    ],
)
def test_transforms_of_what_depends_on_values_are_refused(name, transform, device):
    """Inner iterations, and under vmap the sizes of steps; with a word on what to do, and before f is called."""
    name, _, fixed = name.partition(" ")
    steps = {"num_steps": 4} if fixed else {}

    def f(t: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("f was called")

    y0 = double(0.4, -0.8, device=device, grad=False)
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        TRANSFORMS[transform](lambda y: solve(f, y, [0.0, 1.0], method=name, **steps).y, y0)


# --- complex states --------------------------------------------------------------------------------------------------


@EACH_FIXED
def test_derivatives_of_complex_states(name, device):
    wave = SMOOTH[2]
    y0 = wave.exact(torch.zeros(1, dtype=torch.float64))[0].to(device).requires_grad_()
    t = double(0.0, 0.23, 0.5, device=device)
    solution = lambda y0, t: mixed(solve(wave.f, y0, t, method=name, num_steps=5, **tight(name)).y)
    assert gradcheck(solution, (y0, t), **CLOSE)
