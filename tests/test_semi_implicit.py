"""Semi-implicit steps of quasi-linear fields: order, stability whatever the step, gradients through A(y)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from solvers import ArgumentError, InnerSolverError, Status, solve

DOUBLE = torch.float64
NAMES = {"semi_implicit_euler": 1, "semi_implicit_bdf2": 2}
EACH = pytest.mark.parametrize("name", NAMES)
BOTH_MODES = pytest.mark.parametrize("batch_dim", [None, 0], ids=["joint", "rows"])
TIGHT = {"inner_tol": 1e-6, "backward_tol": 1e-13}


class Fixed:
    """y -> (S - I) y with S of the shape of the nodes' attention, ``([B,] n, n)``."""

    def __init__(self, share: Tensor, same: bool) -> None:
        self.share, self.symmetric, self.rate = share, same, 1.0

    def matvec(self, y: Tensor) -> Tensor:
        return self.share @ y - y


class Attention:
    """y' = (S(y) - I) y, S(y) = softmax(y K y^T): every node moves to what it attends to. ``same``: a symmetric relative."""

    def __init__(self, K: Tensor, same: bool = False, speed: Tensor | None = None) -> None:
        self.K, self.same, self.speed = K, same, speed

    def operator(self, t: Tensor, y: Tensor) -> Fixed:
        score = y @ self.K @ y.mT
        if not self.same:
            return Fixed(torch.softmax(score, -1), False)
        weight = torch.exp(-(score + score.mT).square())
        root = weight.sum(-1, keepdim=True).rsqrt()
        return Fixed(root * weight * root.mT, True)


def start(n: int = 6, d: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(n, d, dtype=DOUBLE), torch.randn(d, d, dtype=DOUBLE)


def reference(f: Attention, y0: Tensor, end: float) -> Tensor:
    def slope(t: float, y: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(y).view(y0.shape)
        return f.operator(None, state).matvec(state).flatten().numpy()

    found = solve_ivp(slope, (0, end), y0.flatten().numpy(), "DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    return torch.from_numpy(found).view(y0.shape)


@pytest.mark.parametrize("same", [False, True], ids=["attention", "symmetric"])
@EACH
def test_order_on_steps_of_any_size(name, same):
    y0, K = start()
    f = Attention(K, same)
    wanted, errors = reference(f, y0, 2.0), []
    for n in (20, 40, 80):
        # Steps that grow and shrink by a half, on average 2 / n.
        steps = torch.tensor([1.0, 1.5, 0.75, 0.75], dtype=DOUBLE).repeat(n // 4) * 2 / n
        grid = torch.cat([torch.zeros(1, dtype=DOUBLE), steps.cumsum(0)])
        with torch.no_grad():
            y = solve(f, y0, grid, method=name, controller="fixed", **TIGHT).y[-1]
        errors.append(float((y - wanted).abs().max()))
    assert np.log2(errors[0] / errors[2]) / 2 > NAMES[name] - 0.2, errors


@EACH
def test_bounded_whatever_the_step(name):
    """dt = 100: a stochastic S keeps Euler's nodes within their hull, and they meet."""
    y0, K = start(30, 4)
    sol = solve(Attention(K), y0, torch.arange(6, dtype=DOUBLE) * 100, method=name, controller="fixed")
    assert sol.y.abs().max() <= (1.0 if name == "semi_implicit_euler" else 2.0) * y0.abs().max() + 1e-6
    spread = (sol.y.amax(1) - sol.y.amin(1)).amax(1)
    assert spread[-1] < 1e-3 * spread[0]


@EACH
def test_a_linear_field_is_solved_too_and_calls_are_counted(name):
    y0 = start(5)[0]
    share = torch.softmax(torch.randn(5, 5, dtype=DOUBLE), -1)

    class Counting(Fixed):
        calls = 0

        def matvec(self, y: Tensor) -> Tensor:
            self.calls += 1
            return super().matvec(y)

    f = Counting(share, False)
    sol = solve(f, y0, [0.0, 1.0], method=name, num_steps=200, **TIGHT)
    assert sol.stats.nfe == f.calls
    torch.testing.assert_close(sol.y[-1], torch.linalg.matrix_exp(share - torch.eye(5, dtype=DOUBLE)) @ y0, rtol=1e-2, atol=1e-2)


@EACH
def test_dense_output_meets_the_nodes_and_the_solution_between_them(name):
    y0, K = start()
    f = Attention(K)
    sol = solve(f, y0, torch.linspace(0, 1, 41, dtype=DOUBLE), method=name, controller="fixed", dense=True, **TIGHT)
    torch.testing.assert_close(sol.dense(sol.t), sol.y, rtol=1e-12, atol=1e-12)
    bound = 3e-2 if name == "semi_implicit_euler" else 2e-3
    for time in (0.26, 0.511, 0.99):
        y = sol.dense(time)
        assert (y - reference(f, y0, time)).abs().max() < bound
        slope = f.operator(None, y).matvec(y)
        assert (sol.dense(time, derivative=1) - slope).abs().max() < 4 * bound


@EACH
def test_samples_of_a_batch_are_what_each_alone_gives(name):
    y0 = torch.randn(3, 6, 2, dtype=DOUBLE)
    K = start()[1]
    t = torch.tensor([[0.0, 1.0], [0.0, 300.0], [0.0, 0.0]], dtype=DOUBLE)
    sol = solve(Attention(K), y0, t, method=name, num_steps=5, batch_dim=0, **TIGHT)
    for row in range(3):
        alone = solve(Attention(K), y0[row], t[row], method=name, num_steps=5, **TIGHT)
        torch.testing.assert_close(sol.y[:, row], alone.y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("adjoint", ["backprop", "checkpoint"])
@pytest.mark.parametrize("end", [1.0, 300.0])
@BOTH_MODES
@EACH
def test_gradients_to_state_times_and_through_the_operator(name, batch_dim, end, adjoint):
    y0 = torch.randn(*([] if batch_dim is None else [2]), 4, 2, dtype=DOUBLE, requires_grad=True)
    K = torch.randn(2, 2, dtype=DOUBLE, requires_grad=True)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=DOUBLE).mul(end).requires_grad_()

    def run(y0: Tensor, K: Tensor, t: Tensor) -> Tensor:
        return solve(
            Attention(K), y0, t, method=name, num_steps=3, batch_dim=batch_dim, adjoint=adjoint, **TIGHT
        ).y  # fmt: skip

    assert gradcheck(run, (y0, K, t), rtol=1e-4, atol=1e-6, fast_mode=True)


@EACH
def test_second_derivatives(name):
    y0 = torch.randn(3, 1, dtype=DOUBLE, requires_grad=True)
    K = torch.randn(1, 1, dtype=DOUBLE, requires_grad=True)
    run = lambda y0, K: solve(Attention(K), y0, [0.0, 2.0], method=name, num_steps=2, **TIGHT).y[-1]
    assert gradgradcheck(run, (y0, K), rtol=1e-4, atol=1e-6, fast_mode=True)


@EACH
def test_single_precision(name):
    y0, K = start()
    t = torch.linspace(0, 100, 11, dtype=DOUBLE)
    single = solve(Attention(K.float()), y0.float(), t, method=name, controller="fixed")
    double = solve(Attention(K), y0, t, method=name, controller="fixed")
    assert single.y.dtype == torch.float32
    torch.testing.assert_close(single.y.double(), double.y, rtol=1e-4, atol=1e-4)


@EACH
def test_what_is_refused(name):
    y0, K = start()
    with pytest.raises(ArgumentError, match=r"QuasiLinearField, which has operator\(t, y\)"):
        solve(lambda t, y: -y, y0, [0.0, 1.0], method=name, num_steps=2)
    with pytest.raises(ArgumentError, match="num_steps"):
        solve(Attention(K), y0, [0.0, 1.0], method=name)
    with pytest.raises(InnerSolverError, match="max_iters"):
        solve(Attention(K), y0, [0.0, 1e4], method=name, num_steps=1, max_iters=1, inner="fletcher_reeves", rtol=1e-9)
    broken = solve(Attention(K * torch.nan), y0, [0.0, 1.0], method=name, num_steps=2, throw=False)
    assert broken.status == Status.NON_FINITE
