"""Stabilised explicit methods: the cost of stiffness, each sample's own stages, gradients."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from torch import Tensor

from solvers import METHODS, ArgumentError, InnerSolverError, UnsupportedError, solve
from solvers.field import Field
from solvers.layout import Layout
from solvers.methods.rock4_table import ROCK4
from solvers.methods.stabilised import ROCK4_REACH


def diffusion(n: int) -> tuple[float, Tensor]:
    """The factor 1 / dx^2 and a smooth start with a jump across the periodic boundary."""
    x = torch.linspace(0, 1, n, dtype=torch.float64)
    return (n - 1.0) ** 2, torch.exp(-x.square() / 2)


def laplacian(c: float | Tensor, y: Tensor) -> Tensor:
    return c * (torch.roll(y, 1, -1) - 2 * y + torch.roll(y, -1, -1))


def heat(c: float, y0: Tensor, t: float) -> Tensor:
    """The exact solution of dy/dt = laplacian(c, y)."""
    wave = 2 * torch.pi * torch.arange(len(y0), dtype=torch.float64) / len(y0)
    decay = torch.exp(-2 * c * t * (1 - torch.cos(wave)))
    return torch.fft.ifft(torch.fft.fft(y0) * decay).real


@pytest.mark.parametrize(
    "rtol, dtype, most, worst",
    [(1e-3, torch.float64, 1400, 1e-3), (1e-5, torch.float64, 2200, 5e-5), (1e-7, torch.float64, 4400, 5e-6),
     (1e-3, torch.float32, 2000, 5e-4)],
)  # fmt: skip
def test_diffusion_costs_the_root_of_its_stiffness(rtol, dtype, most, worst):
    """dt rho reaches 10^4; explicit pairs need 70,000 evaluations and more."""
    c, y0 = diffusion(128)
    calls = 0

    def f(t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return laplacian(c, y)

    t = torch.tensor([0.0, 0.001, 0.01, 0.1, 1.0], dtype=torch.float64)
    sol = solve(f, y0.to(dtype), t, method="rkc2", rtol=rtol, atol=rtol / 100)
    assert calls == sol.stats.nfe <= most
    for time, y in zip(t, sol.y):
        exact = heat(c, y0, float(time))
        assert ((y - exact).abs().max() / exact.abs().max()) < worst


@pytest.mark.parametrize("name", ["rkc2", "rock4"])
def test_each_sample_has_its_own_stages_and_none_sees_another(name):
    """Conductivities from 0 to 1000: the rows are what each alone gives, whatever the others need."""
    k = torch.tensor([[0.0], [1.0], [30.0], [1000.0]], dtype=torch.float64)
    y0 = diffusion(32)[1].expand(4, -1)
    settings = {"method": name, "rtol": 1e-4, "atol": 1e-6}
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    together = solve(lambda t, y: laplacian(k, y), y0, t, batch_dim=0, **settings)
    for row in range(4):
        alone = solve(lambda t, y, k=k[row]: laplacian(k, y), y0[row : row + 1], t, batch_dim=0, **settings)
        assert torch.equal(alone.y[:, 0], together.y[:, row])
        exact = heat(float(k[row]), y0[row], 1.0)
        assert (together.y[-1, row] - exact).abs().max() < 3e-3


@pytest.mark.parametrize("adjoint", ["backprop", "checkpoint"])
@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("name", ["rkc2", "rock4"])
def test_gradcheck_of_many_stages(name, adjoint, batch_dim):
    """A stiff nonlinear field whose steps take about ten stages; to y0, t and a parameter."""
    y0 = torch.rand(2, 6, dtype=torch.float64, requires_grad=True)
    k = torch.tensor(150.0, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 0.17, 0.4], dtype=torch.float64, requires_grad=True)

    def run(y0: Tensor, k: Tensor, t: Tensor) -> Tensor:
        return solve(
            lambda t, y, k: laplacian(k, y) - y**3, y0, t, method=name, num_steps=2, args=(k,),
            adjoint=adjoint, batch_dim=batch_dim,
        ).y  # fmt: skip

    assert torch.autograd.gradcheck(run, (y0, k, t), atol=1e-6, fast_mode=True)


class Bounded:
    """A field that knows its spectral radius."""

    def __init__(self, c: Tensor, bound: object) -> None:
        self.c, self.bound, self.calls = c, bound, 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return laplacian(self.c, y)

    def spectral_bound(self) -> object:
        return self.bound


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_a_bound_that_the_field_knows_saves_the_power_iterations(batch_dim):
    """Every call that is made is a stage then, or one of the three before the first step."""
    c = torch.tensor([[30.0], [1000.0]], dtype=torch.float64)
    y0 = diffusion(32)[1].expand(2, -1)
    bound = 4 * c[:, 0] if batch_dim == 0 else float(4 * c.max())
    f, plain = Bounded(c, bound), Bounded(c, None)
    settings = {"method": "rkc2", "batch_dim": batch_dim, "rtol": 1e-4, "atol": 1e-6}
    sol = solve(f, y0, [0.0, 1.0], **settings)
    other = solve(plain.__call__, y0, [0.0, 1.0], **settings)
    assert f.calls == sol.stats.nfe < plain.calls
    for row in range(2):
        exact = heat(float(c[row]), y0[row], 1.0)
        assert (sol.y[-1, row] - exact).abs().max() < 3e-3
        assert (other.y[-1, row] - exact).abs().max() < 3e-3


@pytest.mark.parametrize("bound", [-1.0, torch.nan, torch.ones(3)])
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(ArgumentError, match="spectral_bound"):
        solve(Bounded(torch.tensor(1.0), bound), torch.ones(2, 4), [0.0, 1.0], method="rkc2", batch_dim=0)


def test_groups_of_unequal_size_give_what_each_alone_gives():
    k = torch.tensor([1.0, 300.0], dtype=torch.float64)
    index = torch.tensor([0] * 5 + [1] * 9)
    y0 = torch.randn(14, 2, dtype=torch.float64)

    def f(t: Tensor, y: Tensor) -> Tensor:
        parts = [rate * (part.mean(0) - part) - part**3 for rate, part in zip(k, y.split([5, 9]))]
        return torch.cat(parts)

    settings = {"method": "rkc2", "rtol": 1e-6, "atol": 1e-8}
    together = solve(f, y0, [0.0, 1.0], batch_index=index, **settings)
    for group, part in enumerate(y0.split([5, 9])):
        alone = solve(lambda t, y, k=k[group]: k * (y.mean(0) - y) - y**3, part, [0.0, 1.0], **settings)
        torch.testing.assert_close(together.y[-1][index == group], alone.y[-1], rtol=1e-5, atol=1e-7)


# --- rock4 -----------------------------------------------------------------------------------------------------------


def trees(s: int) -> dict[str, float]:
    """Errors of a step with s stages in the order conditions of the rooted trees to order 4: each by a system of its own
    whose solution is the tree's elementary differential."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        a, b, c, d, *_ = y.unbind()
        return torch.stack([torch.ones_like(a), a, a**2, b, a**3, a * b, c, d])

    y = torch.zeros(8, dtype=torch.float64)
    method, layout = METHODS["rock4"], Layout(y)
    field = Field(f, layout)
    end, _ = method.sweep(field, 0.0, 1.0, y, f(None, y), s)
    wanted = [1, 1 / 2, 1 / 3, 1 / 6, 1 / 4, 1 / 8, 1 / 12, 1 / 24]
    names = ("t", "[t]", "[tt]", "[[t]]", "[ttt]", "[t[t]]", "[[tt]]", "[[[t]]]")
    return {name: abs(float(x) - w) for name, x, w in zip(names, end, wanted)}


@pytest.mark.parametrize("s", ROCK4)
def test_rock4_has_order_four_and_is_stable_as_far_as_it_says(s):
    assert max(trees(s).values()) < 1e-10
    reach = ROCK4_REACH[s]
    assert s < 10 or reach > 0.32 * s * s
    z = torch.linspace(0, reach, 40 * s, dtype=torch.float64)[1:]
    field = Field(lambda t, y: -z * y, Layout(z))
    method = METHODS["rock4"]
    end, _ = method.sweep(field, 0.0, 1.0, torch.ones_like(z), -z, s)
    # Rounding, amplified, hides what is left of the bound 1 at many stages.
    assert end.abs().max() < 1.0 + 1e-15 * s**8 / 2500
    assert end[z > 10].abs().max() < 0.97 + 1e-15 * s**8 / 2500


def test_the_coefficients_are_what_the_derivation_gives():
    from benchmarks.derive_rock4 import rows

    for s, row in rows((8, 9, 10)).items():
        np.testing.assert_allclose(row, [x for part in ROCK4[s] for x in part], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rtol, most, worst", [(1e-3, 3600, 1e-2), (1e-5, 5200, 2e-4), (1e-7, 8800, 2e-6)])
def test_rock4_on_diffusion(rtol, most, worst):
    """The rounding of its stages, not their number, limits its steps here: dt rho = 1100 at 1e-5."""
    c, y0 = diffusion(128)
    t = torch.tensor([0.0, 0.001, 0.01, 0.1, 1.0], dtype=torch.float64)
    sol = solve(lambda t, y: laplacian(c, y), y0, t, method="rock4", rtol=rtol, atol=rtol / 100)
    assert sol.stats.nfe <= most
    for time, y in zip(t, sol.y):
        exact = heat(c, y0, float(time))
        assert ((y - exact).abs().max() / exact.abs().max()) < worst


def test_rock4_refuses_single_precision_and_names_what_takes_it():
    with pytest.raises(UnsupportedError, match="rkc2"):
        solve(lambda t, y: -y, torch.ones(2), [0.0, 1.0], method="rock4")


def test_steps_that_need_too_many_stages_are_no_success():
    c, y0 = diffusion(64)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(InnerSolverError, match="max_stages"):
        solve(lambda t, y: laplacian(c, y), y0, t, method="rkc2", num_steps=1, max_stages=20)
    sol = solve(lambda t, y: laplacian(c, y), y0, t, method="rkc2", max_stages=20, rtol=1e-4, atol=1e-6)
    assert (sol.y[-1] - heat(c, y0, 1.0)).abs().max() < 1e-3
    with pytest.raises(ArgumentError, match="max_stages"):
        solve(lambda t, y: -y, y0, t, method="rkc2", max_stages=1)


@pytest.mark.slow
@pytest.mark.parametrize("name, options, most", [("rkc2", {}, 12), ("rock4", {}, 16), ("exp_linear", {"krylov_dim": 30}, 40)])
def test_working_memory_is_as_many_states_as_the_method_says(name, options, most):
    """Counted at some of the calls of f: what Python holds then in tensors of the size of the state."""
    size, seen, number = 5000, [0], [0]

    class Heat:
        symmetric = True

        def matvec(self, y: Tensor) -> Tensor:
            number[0] += 1
            if number[0] % 29 == 28:
                tensors = [x for x in gc.get_objects() if type(x) is Tensor and x.layout is torch.strided]
                held = [x for x in tensors if x.untyped_storage().nbytes() >= 8 * size]
                seen.append(len({x.untyped_storage().data_ptr() for x in held}))
            return laplacian(500.0, y)

        def __call__(self, t: Tensor, y: Tensor) -> Tensor:
            return self.matvec(y)

    y0 = torch.randn(size, dtype=torch.float64).cumsum(0)
    with torch.no_grad():
        solve(Heat(), y0, [0.0, 0.3], method=name, rtol=1e-4, save="final", **options)
    assert number[0] > 60 and max(seen) <= most, seen
