"""Stiff problems that nobody tuned for: three right digits at the default tolerances, from ``prox_bdf`` and ``auto``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.special import wrightomega

from solvers import Jump, solve

D = torch.float64
FLOOR = 1e-3
"""Default atol / rtol: what a component below is not asked to be right in."""


class Problem(NamedTuple):
    """f(t, y), y0, output times; ``exact``: at these, ``(T, n)``; None: scipy's Radau at 1e-10 is asked; ``methods``: that are
    held to it."""

    f: Callable[..., Any]
    y0: torch.Tensor
    t: list[float]
    exact: Any = None
    jumps: tuple[float, ...] = ()
    rtol: float = 1e-10
    methods: tuple[str, ...] = ("prox_bdf", "auto")


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=D)


def robertson() -> Problem:
    """To 1e11; reference: test set for IVP solvers (Bari), ROBER."""

    def f(t, y):
        a, b, c = y.unbind(-1)
        r1, r2, r3 = 0.04 * a, 1e4 * b * c, 3e7 * b * b
        return torch.stack([r2 - r1, r1 - r2 - r3, r3], -1)

    return Problem(f, vector(1, 0, 0), [0.0, 1e11], [[0.2083340149701255e-7, 0.8333360770334713e-13, 0.9999999791665050]])


def van_der_pol() -> Problem:
    """mu = 10^3 in the time of the fast mode, eps = 1e-6; reference: test set for IVP solvers (Bari), VDPOL."""

    def f(t, y):
        a, b = y.unbind(-1)
        return torch.stack([b, ((1 - a * a) * b - a) / 1e-6], -1)

    return Problem(f, vector(2, 0), [0.0, 2.0], [[0.1706167732170483e1, -0.8928097010247975]])


def akzo() -> Problem:
    """Chemical Akzo Nobel, with the equilibrium put into the balance of its sixth species."""

    def f(t, y):
        a, b, c, d, e, g = y.unbind(-1)
        root = b.abs().sqrt()
        r1, r2, r3 = 18.7 * a**4 * root, 0.58 * c * d, 0.58 / 34.4 * a * e
        r4, r5 = 0.09 * a * d * d, 0.42 * g * g * root
        flow = 3.3 * (0.9 / 737 - b)
        sixth = 1e4 * (115.83 * a * d - g)
        return torch.stack(
            [-2 * r1 + r2 - r3 - r4, -0.5 * r1 - r4 - 0.5 * r5 + flow, r1 - r2 + r3, -r2 + r3 - 2 * r4, r2 - r3 + r5, sixth], -1
        )

    return Problem(f, vector(0.444, 0.00123, 0, 0.007, 0, 115.83 * 0.444 * 0.007), [0.0, 20.0, 180.0])


def flame() -> Problem:
    """y' = y**2 - y**3 from 1e-4: slow, explosive, stiff; y = 1 / (1 + W(a exp(a - t))), a = 1 / y0 - 1."""

    times = [9000.0, 2e4]
    exact = [[1 / (1 + wrightomega(math.log(9999) + 9999 - t))] for t in times]
    return Problem(lambda t, y: y * y - y**3, vector(1e-4), [0.0, *times], exact)


def swinging() -> Problem:
    """Linear, eigenvalues -10 +- 1000 i, -1 +- 10 i and -1: the errors of the 2,000 to 12,000 steps that it takes add up. Those
    of ``auto``, which stays explicit, to 1.7e-4; of ``prox_bdf`` to 1.3e-3, see the test of oscillations below."""
    t = vector(0.5, 3.0)

    def pair(a, b, c, d):
        return [-a * c - b * d, b * c - a * d]

    def f(t, y):
        a, b, c, d, e = y.unbind(-1)
        return torch.stack([*pair(10.0, 1000.0, a, b), *pair(1.0, 10.0, c, d), -e], -1)

    one, two = torch.exp(-10 * t), torch.exp(-t)
    exact = [one * torch.cos(1000 * t), one * torch.sin(1000 * t), two * torch.cos(10 * t), two * torch.sin(10 * t), two]
    return Problem(f, vector(1, 0, 1, 0, 1), [0.0, *t.tolist()], torch.stack(exact, -1), methods=("auto",))


def prothero_robinson() -> Problem:
    t = vector(1.0, 10.0)

    def f(t, y):
        return -1e6 * (y - torch.cos(t)) - torch.sin(t)

    return Problem(f, vector(1.5), [0.0, *t.tolist()], torch.cos(t).unsqueeze(-1))


def square_wave(t):
    return torch.where(torch.remainder(t, 2.0) < 1.0, 1.0, -1.0).to(D)


def switched() -> Problem:
    """Relaxation to a forcing that jumps; told so."""
    rates = vector(1e5, 2.0)
    exact = [[-1.0, 0.0], [1.0, 0.0]]
    slow, at = 0.0, 0.0
    values = []
    for t in (1.5, 4.9):
        while at < t:
            end, level = min(math.floor(at) + 1, t), 1.0 if int(at) % 2 == 0 else -1.0
            slow, at = level + (slow - level) * math.exp(-2.0 * (end - at)), end
        values.append(slow)
    exact[0][1], exact[1][1] = values
    return Problem(
        lambda t, y: -rates * (y - square_wave(t)), vector(0, 0), [0.0, 1.5, 4.9], exact, tuple(float(i) for i in range(1, 5))
    )


def untold() -> Problem:
    return switched()._replace(jumps=())


def corners() -> Problem:
    """f with a kink in t, and one in y."""
    k = 1e4

    def f(t, y):
        a, b = y.unbind(-1)
        return torch.stack([-k * (a - torch.sin(3 * t).abs()), -k * b.abs() * b + a], -1)

    return Problem(f, vector(0, 2), [0.0, 1.0, 5.0])


def diurnal() -> Problem:
    """Two species in units of 1e6 and 1e12 per cm^3; rates are 0 by night and grow from exp(-infinity) at dawn."""
    q1, q2, c3, w = 1.63e-16, 4.66e-16, 3.7e16, math.pi / 43200

    def f(t, y):
        a, b = y.unbind(-1)
        height = torch.sin(w * t)
        day, safe = height > 0, torch.where(height > 0, height, 1.0)
        q3, q4 = (torch.where(day, torch.exp(-x / safe), 0.0) for x in (22.62, 7.601))
        r1, r2 = q1 * a * c3, q2 * a * b
        return torch.stack([-r1 - r2 + 2 * q3 * c3 + q4 * b, r1 - r2 - q4 * b], -1)

    return Problem(f, vector(1e6, 1e12), [0.0, 2e4, 86400.0, 1.2e5])


def scaled() -> Problem:
    """The Oregonator's kin with species 1e8 apart; two of them start at 0."""

    def f(t, y):
        a, b, c = y.unbind(-1)
        a, c = a * 1e-4, c * 1e4
        r1, r2, r3 = 2.0 * a, 5e6 * b * b, 3e3 * b * c
        return torch.stack([1e4 * (r3 - r1), r1 - r2 - r3, 1e-4 * (r2 - 0.1 * c)], -1)

    return Problem(f, vector(1e4, 0, 0), [0.0, 0.1, 40.0])


def roots() -> Problem:
    """Square roots and logarithms that are NaN beside the solution."""

    def f(t, y):
        a, b = y.unbind(-1)
        return torch.stack([-1e4 * (a.sqrt() - b), 1e-3 - 50 * b * b.log().abs() * b.sqrt()], -1)

    return Problem(f, vector(1.0, 0.9), [0.0, 1.0, 10.0])


def burgers(n: int = 100) -> Problem:
    x = torch.linspace(0, 1, n + 2, dtype=D)[1:-1]
    h = 1 / (n + 1)

    def f(t, u):
        v = torch.nn.functional.pad(u, (1, 1))
        left, right = v[..., :-2], v[..., 2:]
        return 5e-3 * (left - 2 * u + right) / h**2 - (right**2 - left**2) / (4 * h)

    return Problem(f, torch.sin(2 * math.pi * x) ** 2 * (1 - x), [0.0, 0.3, 1.0], rtol=1e-8)


def fitzhugh(n: int = 60) -> Problem:
    x = torch.linspace(0, 1, n, dtype=D)

    def f(t, y):
        u, v = y.tensor_split(2, -1)
        w = torch.cat([u[..., :1], u, u[..., -1:]], -1)
        spread = 1e-3 * (w[..., 2:] - 2 * u + w[..., :-2]) * (n - 1) ** 2
        return torch.cat([spread + 100 * (u * (1 - u) * (u - 0.1) - v), 0.5 * (u - 2 * v)], -1)

    y0 = torch.cat([torch.where(x < 0.2, 1.0, 0.0).to(D), torch.zeros(n, dtype=D)])
    return Problem(f, y0, [0.0, 0.2, 2.0], rtol=1e-8)


def brusselator(n: int = 40) -> Problem:
    x = torch.arange(1, n + 1, dtype=D) / (n + 1)
    c = (n + 1) ** 2 / 50

    def f(t, y):
        u, v = y.tensor_split(2, -1)
        p, q = torch.nn.functional.pad(u, (1, 1), value=1.0), torch.nn.functional.pad(v, (1, 1), value=3.0)
        r = u * u * v
        one = 1 + r - 4 * u + c * (p[..., 2:] - 2 * u + p[..., :-2])
        return torch.cat([one, 3 * u - r + c * (q[..., 2:] - 2 * v + q[..., :-2])], -1)

    return Problem(f, torch.cat([1 + torch.sin(2 * math.pi * x), torch.full((n,), 3.0, dtype=D)]), [0.0, 4.0, 10.0], rtol=1e-8)


def network() -> Problem:
    """A field like a trained network's: two layers, rates from 1 to 1e4 behind them."""
    random = torch.Generator().manual_seed(0)
    w, v = (torch.randn(*shape, generator=random, dtype=D) / 3 for shape in ((16, 6), (6, 16)))
    rates = torch.logspace(0, 4, 6, dtype=D)

    def f(t, y):
        return rates * (torch.tanh(y @ w.T + torch.sin(t)) @ v.T - 2 * y)

    return Problem(f, torch.ones(6, dtype=D), [0.0, 0.5, 5.0])


def spiral() -> Problem:
    """A slow solution and modes -500 +- 2000 i beside it: outside the sectors in which BDF4 and BDF5 are stable."""

    def f(t, y):
        a, b = y[..., 0] - torch.sin(t), y[..., 1] - torch.cos(2 * t)
        return torch.stack([torch.cos(t) - 500 * a + 2000 * b, -2 * torch.sin(2 * t) - 2000 * a - 500 * b], -1)

    t = vector(0.5, 2.0)
    return Problem(f, vector(1, 0), [0.0, *t.tolist()], torch.stack([torch.sin(t), torch.cos(2 * t)], -1))


def chain(n: int = 20) -> Problem:
    """Far from normal: each unknown decays at rate 1000 and is driven at rate 1800 by the next, the last ones by sines."""
    a = 1800 * torch.diag(torch.ones(n - 1, dtype=D), 1) - 1000 * torch.eye(n, dtype=D)
    w, t = torch.linspace(1, 2, n, dtype=D), vector(0.5, 5.0)
    # After the transient: the sum of the answers to the single sines.
    forms = [torch.linalg.solve(1j * x * torch.eye(n) - a, 1000 * row + 0j) for x, row in zip(w, torch.eye(n, dtype=D))]
    exact = (torch.exp(1j * t[:, None] * w) @ torch.stack(forms)).imag
    return Problem(lambda t, y: y @ a.T + 1000 * torch.sin(w * t), torch.zeros(n, dtype=D), [0.0, *t.tolist()], exact)


def nerve() -> Problem:
    """Hodgkin & Huxley 1952 under a current from t = 10 on, which nobody is told of."""

    def f(t, y):
        v, m, h, n = y.unbind(-1)
        am, bm = 0.1 * (v + 40) / (1 - torch.exp(-(v + 40) / 10)), 4 * torch.exp(-(v + 65) / 18)
        ah, bh = 0.07 * torch.exp(-(v + 65) / 20), 1 / (1 + torch.exp(-(v + 35) / 10))
        an, bn = 0.01 * (v + 55) / (1 - torch.exp(-(v + 55) / 10)), 0.125 * torch.exp(-(v + 65) / 80)
        current = 120 * m**3 * h * (v - 50) + 36 * n**4 * (v + 77) + 0.3 * (v + 54.387)
        rates = am * (1 - m) - bm * m, ah * (1 - h) - bh * h, an * (1 - n) - bn * n
        return torch.stack([torch.where(t > 10, 10.0, 0.0) - current, *rates], -1)

    return Problem(f, vector(-65, 0.0529, 0.5961, 0.3177), [0.0, 20.0, 40.0], rtol=1e-8)


def medical(n: int = 30) -> Problem:
    """Medical Akzo Nobel (test set for IVP solvers), coarse: antibodies in a tumour; the supply ends at t = 5."""
    z = torch.arange(1, n + 1, dtype=D) / n
    drift, spread = (z - 1) ** 3 / 8 * n / 2, (z - 1) ** 4 / 16 * n * n

    def f(t, y):
        u, v = y.tensor_split(2, -1)
        left = torch.cat([torch.where(t <= 5, 2.0, 0.0).to(D).expand(u[..., :1].shape), u[..., :-1]], -1)
        right = torch.cat([u[..., 1:], u[..., -1:]], -1)
        lost = 100 * u * v
        return torch.cat([drift * (right - left) + spread * (left - 2 * u + right) - lost, -lost], -1)

    return Problem(f, torch.cat([torch.zeros(n, dtype=D), torch.ones(n, dtype=D)]), [0.0, 4.0, 20.0], rtol=1e-8)


def pendulum() -> Problem:
    """On a damped spring of stiffness 1e6 in place of a rod: nearly an algebraic equation of index 3."""

    def f(t, y):
        a, b, u, v = y.unbind(-1)
        r = torch.sqrt(a * a + b * b)
        pull = (1e6 * (r - 1) + 2e3 * (a * u + b * v) / r) / r
        return torch.stack([u, v, -pull * a, -pull * b - 9.81], -1)

    return Problem(f, vector(1, 0, 0, 0), [0.0, 0.5, 2.0], rtol=1e-8)


def spring() -> Problem:
    """The same without damping, on a spring of stiffness 1e8: 1,600 periods of 1e-4 in the velocities that nobody asked for."""

    def f(t, y):
        a, b, u, v = y.unbind(-1)
        r = torch.sqrt(a * a + b * b)
        pull = 1e8 * (r - 1) / r
        return torch.stack([u, v, -pull * a, -pull * b - 1], -1)

    return Problem(f, vector(1, 0, 0, 0), [0.0, 0.5, 1.0], rtol=1e-8)


ZOO = {
    make.__name__: make
    for make in (
        robertson, van_der_pol, akzo, flame, swinging, prothero_robinson, switched, untold, corners, diurnal, scaled, roots,
        burgers, fitzhugh, brusselator, network, spiral, chain, nerve, medical, pendulum, spring,
    )
}  # fmt: skip


def reference(problem: Problem) -> torch.Tensor:
    if problem.exact is not None:
        return torch.as_tensor(problem.exact, dtype=D)

    def f(t, y):
        return problem.f(torch.tensor(t, dtype=D), torch.from_numpy(np.array(y))).numpy()

    found = solve_ivp(
        f, (problem.t[0], problem.t[-1]), problem.y0.numpy(), "Radau", problem.t[1:], rtol=problem.rtol, atol=problem.rtol * 1e-3
    )
    assert found.success, found.message
    return torch.from_numpy(found.y.T)


def error(y: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((y - exact).abs() / (exact.abs() + FLOOR)).max())


QUICK = ("robertson", "prothero_robinson", "spiral", "chain")


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ZOO])
def test_three_right_digits_at_the_default_tolerances(name):
    problem = ZOO[name]()
    exact = reference(problem)
    for method in problem.methods:
        s = solve(problem.f, problem.y0, problem.t, method=method, jumps=[Jump(t) for t in problem.jumps])
        assert error(s.y[1:], exact) < 1e-3


@pytest.mark.parametrize("tol", [1e-4, 1e-5])
def test_errors_of_an_oscillation_add_up_by_less_than_half_a_tolerance_a_step(tol):
    """y' = (-10 + 1000 i) y, followed for 25 periods; measured: a quarter, scipy's BDF 0.08 to 0.18, dopri5 0.05 to 0.13."""

    def f(t, y):
        return (-10 + 1000j) * y

    end = 0.16
    exact = np.exp((-10 + 1000j) * end)
    s = solve(f, torch.ones(1, dtype=torch.complex128), [0.0, end], method="prox_bdf", rtol=tol, atol=1e-3 * tol)
    found = abs(s.y[-1].item() - exact) / abs(exact)
    peer = solve_ivp(f, (0.0, end), [1 + 0j], "BDF", rtol=tol, atol=1e-3 * tol)
    assert found < 0.5 * tol * s.stats.accepted
    assert found < 4 * abs(peer.y[0, -1] - exact) / abs(exact)
