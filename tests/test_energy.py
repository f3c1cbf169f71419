"""Gradient flows: steps that lower the objective, energies that never rise, fields that are no gradient."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from benchmarks.diffusion import HillslopeDiffusion
from solvers import ArgumentError, GradientField, check_energy, solve
from solvers.field import Field
from solvers.layout import Layout
from solvers.norms import ErrorNorm
from solvers.optim import InnerStep, ProximalProblem, minimise
from solvers.optim.energy import EnergyDescent
from solvers.problem import potential

D = torch.float64
EULER_AND_BDF2 = pytest.mark.parametrize("name", ["prox_euler", "prox_bdf2"])


class AllenCahn:
    """u' = a Lap u + (u - u^3) / eps, periodic; minus the gradient of its energy, which has many minima."""

    def __init__(self, diffusion=1.0, eps=1.0, axes=(-2, -1)):
        self.diffusion, self.eps, self.axes = diffusion, eps, axes

    def __call__(self, t, u):
        near = sum(torch.roll(u, by, axis) - u for axis in self.axes for by in (1, -1))
        return self.diffusion * near + (u - u**3) / self.eps

    def energy(self, t, u):
        steep = sum((torch.roll(u, 1, axis) - u).square() for axis in self.axes)
        density = self.diffusion * steep / 2 + (u**2 - 1).square() / (4 * self.eps)
        return density.sum(self.axes)


def falls(energy, slack=1e-9):
    return all(b <= a + slack * abs(a) for a, b in pairwise(energy))


def with_distance(sol, dt):
    """F(y_k) + |y_k - y_{k-1}|^2 / (4 dt): what BDF2 lowers (Xia 2023, section 5.3.3); the first step is backward Euler's."""
    moved = [float((b - a).square().sum()) for a, b in pairwise(sol.y)]
    return [float(f) + d / (4 * dt) for f, d in zip(sol.stats.energy[1:], moved)]


# --- the field and its energy ----------------------------------------------------------------------------------------


def test_check_energy_compares_the_gradient():
    u = torch.randn(6, 6, dtype=D)
    field = AllenCahn()
    assert isinstance(field, GradientField) and check_energy(field, u) < 1e-14
    assert check_energy(AllenCahn(axes=(-1,)), torch.randn(3, 8, dtype=D)) < 1e-14
    field.energy = lambda t, u: 1.001 * AllenCahn().energy(t, u)
    with pytest.raises(ArgumentError, match=r"minus the gradient.*0\.001"):
        check_energy(field, u)
    with pytest.raises(ArgumentError, match=r"no energy\(t, y\)"):
        check_energy(lambda t, y: -y, u)


def test_check_energy_of_a_tree_with_arguments():
    class Coupled:
        def __call__(self, t, y, k):
            return {"a": -k * (y["a"] - y["b"]), "b": k * (y["a"] - y["b"]) - t * y["b"]}

        def energy(self, t, y, k):
            return (k * (y["a"] - y["b"]).square() / 2 + t * y["b"].square() / 2).sum()

    y = {"a": torch.randn(3, dtype=D), "b": torch.randn(3, dtype=D)}
    assert check_energy(Coupled(), y, 2.0, args=(3.0,)) < 1e-14


def test_an_energy_of_another_shape_or_signature():
    """One that takes (y) alone is another thing of that name; one sum for the whole batch can't guide its samples."""

    class Flow:
        def __call__(self, t, y):
            return -y

    class Hamiltonian(Flow):
        def energy(self, y):
            raise AssertionError("was called")

    class Whole(Flow):
        def energy(self, t, y):
            return y.square().sum() / 2

    y0 = torch.ones(2, 3, dtype=D)
    how = {"method": "prox_bdf2", "num_steps": 2, "batch_dim": 0}
    assert solve(Hamiltonian(), y0, [0.0, 1.0], **how).stats.energy is None
    with pytest.raises(ArgumentError, match=r"shape \(2,\), one number per sample"):
        solve(Whole(), y0, [0.0, 1.0], **how)
    assert solve(Whole(), y0, [0.0, 1.0], energy=False, **how).stats.energy is None
    assert solve(Whole(), y0, [0.0, 1.0], method="dopri5").stats.energy is None


# --- what the steps find ---------------------------------------------------------------------------------------------


@EULER_AND_BDF2
@pytest.mark.parametrize("width", [0.3, 300.0], ids=["many minima", "one minimum"])
def test_the_energy_falls_at_steps_a_thousand_times_the_explicit_limit(name, width):
    """Allen-Cahn (Xia 2023, section 5.3.3); with thin interfaces such a step has many minima, of which one is lower than the
    start."""
    field = AllenCahn(diffusion=width)
    dt = 1000 * 2 / (8 * width + 2)
    u = 0.3 + torch.randn(16, 16, dtype=D)
    sol = solve(field, u, [0.0, 8 * dt], method=name, dt=dt, save="steps", rtol=1e-6, atol=1e-8)
    energy = sol.stats.energy.tolist()
    assert energy == pytest.approx([float(field.energy(0.0, y)) for y in sol.y])
    assert energy[1] < energy[0] and falls(energy if name == "prox_euler" else with_distance(sol, dt))


@EULER_AND_BDF2
def test_terrain_at_steps_a_thousand_times_the_explicit_limit(name):
    """Nonlinear hillslope diffusion of a rough surface: the energy falls, the mass stays."""
    x, y = torch.meshgrid(torch.linspace(0, 6, 24, dtype=D), torch.linspace(0, 4, 20, dtype=D), indexing="ij")
    height = 40 * torch.sin(x) * torch.cos(1.7 * y) + 15 * torch.randn(24, 20, dtype=D)
    field = HillslopeDiffusion((30.0, 25.0))
    limit = 2 / float(abs(field.jacobian(height)).sum(0).max())
    dt = 1000 * limit
    sol = solve(field, height, [0.0, 8 * dt], method=name, dt=dt, save="steps", rtol=1e-9, atol=1e-9)
    assert falls(sol.stats.energy.tolist() if name == "prox_euler" else with_distance(sol, dt))
    assert sol.stats.energy[-1] < 0.2 * sol.stats.energy[0]
    mass = sol.y.sum((-2, -1))
    assert float((mass - mass[0]).abs().max() / height.abs().sum()) < 1e-9


def test_a_step_that_newton_takes_to_a_maximum_ends_in_a_minimum():
    """Of z - dt (z - z^3) = 0.1 at dt = 20 the root near 0 is a maximum of the objective; wells are at about +-0.97."""

    class Well:
        def __call__(self, t, y):
            return y - y**3

        def energy(self, t, y):
            return ((y**2 - 1) ** 2 / 4).sum()

    y0 = torch.tensor([0.1], dtype=D)
    for name in ("prox_euler", "prox_bdf2", "prox_multistage2"):
        how = {"method": name, "num_steps": 1, "inner": "newton", "inner_tol": 1e-4}
        free = solve(Well(), y0, [0.0, 20.0], energy=False, **how)
        sol = solve(Well(), y0, [0.0, 20.0], **how)
        assert sol.success and sol.stats.energy[-1] < sol.stats.energy[0]
        assert abs(float(sol.y[-1])) > 0.8
        if name == "prox_euler":
            assert abs(float(free.y[-1])) < 0.1 and "energy_descent" in sol.stats.inner
            z = sol.y[-1]
            torch.testing.assert_close(z - 20 * (z - z**3), y0, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_dim", [None, 0])
def test_the_objective_falls_at_every_iteration_of_the_descent(batch_dim):
    field, seen = AllenCahn(0.5, 0.05, axes=(-1,)), []

    class Watched(EnergyDescent):
        def step(self, problem, z, r, state, running) -> InnerStep:
            out = super().step(problem, z, r, state, running)
            seen.append(torch.as_tensor(problem.value(out.z)))
            return out

    u = torch.randn(32, dtype=D) if batch_dim is None else torch.randn(3, 32, dtype=D)
    layout = Layout(u, batch_dim)
    norm = ErrorNorm(layout, 1e-300, 1e-8)
    y = layout.flatten(u)
    g = 2.0 if batch_dim is None else torch.tensor([0.1, 2.0, 30.0], dtype=D)
    energy = potential(field, layout, ())
    with torch.no_grad():
        problem = ProximalProblem(Field(field, layout), torch.zeros(()), y, g, norm, norm.scale(y), energy)
        start = torch.as_tensor(problem.value(y))
        found = minimise(problem, Watched(), problem.evaluate(y), tol=1.0, max_iters=1000)
    values = torch.stack([start, *seen])
    assert bool(torch.as_tensor(found.converged).all()) and len(seen) > 5
    assert (values.diff(dim=0) <= 1e-13 * values[:-1].abs()).all() and (values[-1] < values[0]).all()
    assert (torch.as_tensor(problem.norm(problem.residual(found.z))) <= 1).all()


def test_samples_of_a_batch_get_what_each_alone_gets():
    field = AllenCahn(0.5, 0.05, axes=(-1,))
    u = torch.randn(3, 16, dtype=D)
    how = {"method": "prox_bdf2", "num_steps": 3, "rtol": 1e-6}
    with torch.no_grad():
        sol = solve(field, u, [0.0, 6.0], batch_dim=0, **how)
        assert sol.stats.energy.shape == (2, 3)
        for i in range(3):
            alone = solve(field, u[i : i + 1], [0.0, 6.0], batch_dim=0, **how)
            torch.testing.assert_close(sol.y[:, i], alone.y[:, 0], rtol=1e-9, atol=1e-9)
            assert sol.stats.energy[1, i] < sol.stats.energy[0, i]


def test_a_convex_energy_changes_nothing_but_costs_no_f():
    """CG lowers the objective by itself: the same result with as many evaluations."""
    field = HillslopeDiffusion((1.0, 1.0))
    x = torch.linspace(0, 2 * math.pi, 8, dtype=D)
    height = torch.sin(x)[:, None] * torch.cos(x)[None, :]
    for name in ("prox_euler", "prox_bdf2"):
        how = {"method": name, "num_steps": 4, "inner_tol": 1e-3}
        with_energy = solve(field, height, [0.0, 50.0], **how)
        without = solve(field, height, [0.0, 50.0], energy=False, **how)
        torch.testing.assert_close(with_energy.y, without.y, rtol=1e-8, atol=1e-9)
        assert abs(with_energy.stats.nfe - without.stats.nfe) <= 8
