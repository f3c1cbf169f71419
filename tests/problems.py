"""Problems with known solutions, and the batched or mirrored versions of them, for tests of every method."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from solvers import METHODS, UnsupportedError
from solvers.field import Field
from solvers.layout import Layout
from solvers.norms import ErrorNorm
from solvers.optim import ProximalProblem

ANY_FIELD = [name for name in METHODS if METHODS[name].demands is None]
"""Methods for any f: those that live on more structure have tests of their own."""


def problem_of(f, y0, g, atol=1e-8, **how):
    """The equation of a step of backward Euler of size ``g`` from y0, and the flat y0; ``how``: batch_dim or batch_index."""
    layout = Layout(y0, **how)
    norm = ErrorNorm(layout, 1e-300, atol)
    y = layout.flatten(y0)
    return ProximalProblem(Field(f, layout), torch.zeros(()), y, g, norm, norm.scale(y)), y


def takes(name: str, dtype: torch.dtype) -> bool:
    """Whether a method does not refuse states of a dtype."""
    try:
        METHODS[name].check(Layout(torch.zeros(1, dtype=dtype)))
    except UnsupportedError:
        return False
    return True


class Problem(NamedTuple):
    """dy/dt = f(t, y) over [0, end]; f takes t () with y (n,), or (B,) with (B, n); ``exact``: times (T,) -> (T, n)."""

    name: str
    f: Callable[[Tensor, Tensor], Tensor]
    end: float
    exact: Callable[[Tensor], Tensor]

    def __repr__(self) -> str:
        return self.name

    def backwards(self) -> Problem:
        """The mirror image, y(-t): the same solution, over [0, -end]."""
        return self._replace(f=lambda t, y: -self.f(-t, y), end=-self.end, exact=lambda t: self.exact(-t))

    def times(self, count: int = 11) -> Tensor:
        """Output times, not equidistant, ``(count,)``."""
        return self.end * torch.linspace(0, 1, count, dtype=torch.float64) ** 1.3


def relative_error(y: Tensor, reference: Tensor, floor: float = 1.0) -> float:
    """Maximum of |y - ref| / (|ref| + floor) over everything; floor = atol / rtol."""
    return float(((y - reference).abs() / (reference.abs() + floor)).max())


# --- a nonlinear, non-autonomous problem for measured orders ---------------------------------------------------------


def entire(t: Tensor, y: Tensor) -> Tensor:
    """Nonlinear and not autonomous, with an entire solution: orders show at moderate steps."""
    a, b, c, d = y.unbind(-1)
    slopes = [torch.cos(t) * b.sqrt(), 2 * d * torch.exp(2 * (c - 1)), d * a**2 / b, -torch.sin(t) * b / a**2]
    return torch.stack(slopes, dim=-1)


def entire_exact(t: Tensor) -> Tensor:
    """``(...,)`` -> ``(..., 4)``."""
    s = torch.sin(t)
    return torch.stack([torch.exp(s), torch.exp(2 * s), s + 1, torch.cos(t)], dim=-1)


# --- problems for adaptive steps -------------------------------------------------------------------------------------


def lotka_volterra(t: Tensor, y: Tensor) -> Tensor:
    prey, predator = y.unbind(-1)
    return torch.stack([prey * (1.5 - predator), predator * (prey - 3.0)], dim=-1)


@cache
def _scipy_reference(problem: str, times: tuple[float, ...]) -> np.ndarray:
    def f(t: float, y: np.ndarray) -> np.ndarray:
        return np.array([y[0] * (1.5 - y[1]), y[1] * (y[0] - 3.0)])

    assert problem == "lotka_volterra"
    # At its start, too, where scipy has no step to interpolate.
    return solve_ivp(f, (0.0, 4.0), [1.0, 1.0], "DOP853", times, rtol=1e-13, atol=1e-13).y.T


def lotka_volterra_exact(t: Tensor) -> Tensor:
    return torch.from_numpy(_scipy_reference("lotka_volterra", tuple(t.abs().tolist())))


def track(t: Tensor) -> Tensor:
    return torch.stack([torch.sin(t), torch.cos(1.3 * t)], dim=-1)


def track_slope(t: Tensor) -> Tensor:
    return torch.stack([torch.cos(t), -1.3 * torch.sin(1.3 * t)], dim=-1)


def turned(y: Tensor) -> Tensor:
    return torch.stack([-y[..., 1], y[..., 0]], dim=-1)


def driven(t: Tensor, y: Tensor, rate: Any = 2.0) -> Tensor:
    """Linear and not autonomous: turns around a point that moves."""
    return rate * turned(y - track(t)) + track_slope(t)


def driven_exact(t: Tensor, y0: Tensor, t0: Any = 0.0, rate: Any = 2.0) -> Tensor:
    """The solution through (t0, y0); ``t`` (T,) -> (T, 2). Differentiable in everything."""
    t0, rate = torch.as_tensor(t0, dtype=t.dtype), torch.as_tensor(rate, dtype=t.dtype)
    angle = (rate * (t - t0)).unsqueeze(-1)
    away = y0 - track(t0)
    return track(t) + torch.cos(angle) * away + torch.sin(angle) * turned(away)


HAMILTONIAN = torch.tensor([[2, 0.5 - 0.3j, 0], [0.5 + 0.3j, -1, 0.4j], [0, -0.4j, 0.5]], dtype=torch.complex128)
WAVE = torch.tensor([1.0, 0.5j, -0.5 + 0.5j], dtype=torch.complex128)


def schroedinger(t: Tensor, y: Tensor) -> Tensor:
    return -1j * (y @ HAMILTONIAN.to(y).T)


def schroedinger_exact(t: Tensor) -> Tensor:
    return torch.stack([torch.linalg.matrix_exp(-1j * HAMILTONIAN * x) @ WAVE for x in t.tolist()])


SMOOTH = [
    Problem("lotka_volterra", lotka_volterra, 4.0, lotka_volterra_exact),
    Problem("driven", driven, 5.0, lambda t: driven_exact(t, torch.tensor([0.3, 1.6], dtype=torch.float64))),
    Problem("schroedinger", schroedinger, 4.0, schroedinger_exact),
]
"""Neither damped nor growing: the error at the end is the sum of all errors."""


# --- damped problems, for methods of order 1: there an error per step of tol sums up to sqrt(tol) --------------------


def follower(t: Tensor, y: Tensor) -> Tensor:
    return 10.0 * (track(t) - y) + track_slope(t)


def follower_exact(t: Tensor) -> Tensor:
    away = torch.tensor([1.0, 0.5], dtype=torch.float64)
    return track(t) + torch.exp(-10.0 * t).unsqueeze(-1) * away


def cubic_decay(t: Tensor, y: Tensor) -> Tensor:
    """Gradient flow of y**2 + y**4 / 4."""
    return -2 * y - y**3


def cubic_decay_exact(t: Tensor) -> Tensor:
    y0 = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    # 1 / y**2 obeys a linear equation.
    return torch.sign(y0) / torch.sqrt((1 / y0**2 + 0.5) * torch.exp(4 * t).unsqueeze(-1) - 0.5)


def heat(t: Tensor, y: Tensor) -> Tensor:
    """Diffusion between 6 cells with walls at value 0."""
    padded = torch.nn.functional.pad(y, (1, 1))
    return 20.0 * (padded[..., 2:] - 2 * y + padded[..., :-2])


def heat_exact(t: Tensor) -> Tensor:
    mode = torch.arange(1, 7, dtype=torch.float64) * math.pi / 7
    one = torch.outer(torch.exp(-80.0 * torch.sin(mode[0] / 2) ** 2 * t), torch.sin(mode))
    three = torch.outer(torch.exp(-80.0 * torch.sin(mode[2] / 2) ** 2 * t), torch.sin(3 * mode))
    return one + 0.5 * three


DAMPED = [
    Problem("follower", follower, 2.0, follower_exact),
    Problem("cubic_decay", cubic_decay, 1.5, cubic_decay_exact),
    Problem("heat", heat, 0.5, heat_exact),
]
