"""Exponentials of linear fields: exact in time, by three ways to know the matrix, with gradients."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from solvers import ArgumentError, InnerSolverError, Status, UnsupportedError, solve
from solvers.layout import Layout
from solvers.linalg import KrylovSpace, poisson_tails, poisson_terms

DOUBLE = torch.float64


class Linear:
    """f = A y + b with the matrix's own structure; counts its products. Not callable."""

    def __init__(self, A: Tensor, b: Tensor | None = None, **structure: object) -> None:
        self.A, self.b, self.calls = A, b, 0
        for name, value in structure.items():
            setattr(self, name, value)

    def matvec(self, y: Tensor) -> Tensor:
        self.calls += 1
        return y @ self.A.mT

    def rmatvec(self, y: Tensor) -> Tensor:
        return y @ self.A.conj()

    def source(self) -> Tensor:
        return torch.zeros(len(self.A), dtype=self.A.dtype) if self.b is None else self.b


def exact(A: Tensor, b: Tensor, y0: Tensor, t: float) -> Tensor:
    """By the exponential of the matrix with the source as one more unknown."""
    n = len(A)
    whole = torch.zeros(n + 1, n + 1, dtype=A.dtype)
    whole[:n, :n], whole[:n, n] = A, b
    start = torch.cat([y0, torch.ones_like(y0[..., :1])], -1)
    return (start @ torch.linalg.matrix_exp(whole * t).mT)[..., :n]


def general(raw: Tensor) -> Tensor:
    return raw - 2 * torch.eye(len(raw), dtype=raw.dtype)


def symmetric(raw: Tensor) -> Tensor:
    return -(raw @ raw.mT)


def generator(raw: Tensor) -> Tensor:
    """Of a Markov chain: rows sum to 0, no entry off the diagonal is negative, none on it below -3."""
    walk = raw.abs() / raw.abs().sum(1, keepdim=True)
    return 3 * (walk - torch.eye(len(raw), dtype=raw.dtype))


WAYS = {"arnoldi": (general, {}), "lanczos": (symmetric, {"symmetric": True}), "uniformisation": (generator, {"rate": 3.0})}
EACH_WAY = pytest.mark.parametrize("way", WAYS)
BOTH_MODES = pytest.mark.parametrize("batch_dim", [None, 0], ids=["joint", "rows"])


def problem(way: str, n: int = 20) -> tuple[Linear, Tensor, Tensor, Tensor]:
    build, structure = WAYS[way]
    A, b = build(0.5 * torch.randn(n, n, dtype=DOUBLE)), torch.randn(n, dtype=DOUBLE)
    return Linear(A, b, **structure), torch.randn(n, dtype=DOUBLE), A, b


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-10])
@EACH_WAY
def test_one_step_to_the_end_whatever_its_length_and_outputs_for_nothing(way, tol):
    f, y0, A, b = problem(way)
    settings = {"method": "exp_linear", "rtol": tol, "atol": tol}
    few = solve(f, y0, [0.0, 5.0], **settings)
    assert f.calls == few.stats.nfe <= 45
    t = torch.linspace(0, 5, 30, dtype=DOUBLE)
    sol = solve(f, y0, t, dense=True, **settings)
    assert (sol.stats.accepted, sol.stats.rejected, sol.stats.nfe) == (1, 0, few.stats.nfe)
    for time, y in zip(t.tolist(), sol.y):
        wanted = exact(A, b, y0, time)
        assert ((y - wanted).abs() / (1 + wanted.abs())).max() < 10 * tol + 1e-12
        if tol < 1e-9 and time in (0.0, 5.0):
            slope = A @ wanted + b
            torch.testing.assert_close(sol.dense(time, derivative=1), slope, rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(sol.dense(time, derivative=2), A @ slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("t", [0.3, 2.0, 9.0])
@pytest.mark.parametrize("walk", ["dense", "two steps", "cycle"])
def test_terms_whose_norm_is_not_looked_at_cost_no_product(walk, t, tol):
    """A joint state looks at few norms, a batch at all of them; of walks that mix at once, in turns, and slowly."""
    raw = {"dense": torch.rand(40, 40), "two steps": torch.eye(40).roll(20, 0) + 1e-3, "cycle": torch.eye(40).roll(1, 0)}[walk]
    f, y0 = Linear(generator(raw.double()), rate=3.0), torch.randn(40, dtype=DOUBLE)
    joint = solve(f, y0, [0.0, t], method="exp_linear", rtol=tol, atol=1e-2 * tol)
    batch = solve(f, y0[None], [0.0, t], method="exp_linear", rtol=tol, atol=1e-2 * tol, batch_dim=0)
    torch.testing.assert_close(joint.y[-1], batch.y[-1, 0], rtol=tol, atol=tol)
    assert batch.stats.nfe <= joint.stats.nfe <= batch.stats.nfe + 1


@EACH_WAY
def test_samples_of_all_scales_and_both_directions(way):
    """Each with its own times; a frozen one stays where it is; none changes what another gives beyond the tolerance."""
    f, _, A, b = problem(way, 8)
    y0 = torch.randn(4, 8, dtype=DOUBLE) * torch.tensor([[1.0], [1e-3], [10.0], [1.0]], dtype=DOUBLE)
    t = torch.tensor([[0.0, 0.1, 2.0], [0.0, 0.5, 1.0], [1.0, 0.8, 0.5], [0.0, 0.01, torch.nan]], dtype=DOUBLE)
    settings = {"method": "exp_linear", "rtol": 1e-6, "atol": 1e-8, "batch_dim": 0}
    sol = solve(f, y0, t, **settings)
    for row in range(4):
        alone = solve(f, y0[row : row + 1], t[row : row + 1], **settings)
        known = t[row].isfinite()
        for time, y, other in zip(t[row, known].tolist(), sol.y[known, row], alone.y[known, 0]):
            wanted = exact(A, b, y0[row], time - float(t[row, 0]))
            assert ((y - wanted).abs() / (1e-2 + wanted.abs())).max() < 1e-5
            assert ((y - other).abs() / (1e-2 + wanted.abs())).max() < 1e-5


def test_groups_of_unequal_size():
    sizes, mats = (3, 7), [symmetric(torch.randn(n, n, dtype=DOUBLE)) for n in (3, 7)]
    index = torch.tensor([0] * 3 + [1] * 7)
    f = Linear(torch.block_diag(*mats), symmetric=True)
    f.matvec = lambda y: f.A @ y
    f.source = lambda: torch.zeros(10, 2, dtype=DOUBLE)
    y0, times = torch.randn(10, 2, dtype=DOUBLE), torch.tensor([[0.0, 1.0], [0.0, 5.0]], dtype=DOUBLE)
    y = solve(f, y0, times, method="exp_linear", batch_index=index, rtol=1e-8, atol=1e-10).y[-1]
    for A, part, found, end in zip(mats, y0.split(sizes), y.split(sizes), (1.0, 5.0)):
        torch.testing.assert_close(found, torch.linalg.matrix_exp(A * end) @ part, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype, tol, most", [(DOUBLE, 1e-5, 900), (torch.float32, 1e-3, 900)])
def test_stiffness_beyond_one_space_is_crossed_in_steps(dtype, tol, most):
    """dt rho = 65,000; a rejected step costs nothing but small matrices."""
    n, c = 128, 127.0**2
    x = torch.linspace(0, 1, n, dtype=DOUBLE)
    y0 = torch.exp(-x.square() / 2) * (1 + torch.sin(37 * x) * torch.cos(91 * x.square()))

    class Heat(Linear):
        def matvec(self, y: Tensor) -> Tensor:
            self.calls += 1
            return c * (torch.roll(y, 1, -1) - 2 * y + torch.roll(y, -1, -1))

    f = Heat(torch.eye(n, dtype=dtype), symmetric=True)
    sol = solve(f, y0.to(dtype), [0.0, 0.001, 0.01, 0.1, 1.0], method="exp_linear", rtol=tol, atol=tol / 100)
    assert f.calls == sol.stats.nfe < most
    assert sol.stats.accepted > 1 and sol.stats.rejected > 0
    wave = 2 * np.pi * torch.arange(n, dtype=DOUBLE) / n
    for time, y in zip([0.001, 0.01, 0.1, 1.0], sol.y[1:]):
        wanted = torch.fft.ifft(torch.fft.fft(y0) * torch.exp(-2 * c * time * (1 - torch.cos(wave)))).real
        assert (y - wanted).abs().max() < 5 * tol * wanted.abs().max()


def test_rest_and_intervals_without_length():
    f, y0, A, b = problem("arnoldi")
    rest = torch.linalg.solve(A, -b)
    torch.testing.assert_close(solve(f, rest, [0.0, 3.0], method="exp_linear").y[-1], rest, rtol=1e-9, atol=1e-9)
    assert torch.equal(solve(f, y0, [0.0, 0.0], method="exp_linear").y[-1], y0)
    f.b = torch.zeros_like(b)
    assert torch.equal(solve(f, 0 * y0, [0.0, 3.0], method="exp_linear").y[-1], 0 * y0)


def test_a_matrix_that_is_not_finite_ends_with_a_status():
    f, y0, *_ = problem("arnoldi")
    f.A = f.A.clone()
    f.A[0, 0] = torch.nan
    assert solve(f, y0, [0.0, 1.0], method="exp_linear", throw=False).status == Status.NON_FINITE


# --- gradients -------------------------------------------------------------------------------------------------------


def solution(way: str, batch_dim: int | None, adjoint: str, **how):
    build, structure = WAYS[way]

    def run(y0: Tensor, raw: Tensor, b: Tensor, t: Tensor) -> Tensor:
        f = Linear(build(raw), b, **structure)
        settings = {"rtol": 1e-9, "atol": 1e-9, "inner_tol": 1e-3, "backward_tol": 1e-12} | how
        return solve(f, y0, t, method="exp_linear", batch_dim=batch_dim, adjoint=adjoint, **settings).y

    return run


def inputs(batch_dim: int | None, n: int = 3) -> tuple[Tensor, ...]:
    y0 = torch.randn(n, dtype=DOUBLE) if batch_dim is None else torch.randn(2, n, dtype=DOUBLE)
    raw, b, t = torch.randn(n, n, dtype=DOUBLE), torch.randn(n, dtype=DOUBLE), torch.tensor([0.0, 0.3, 1.0], dtype=DOUBLE)
    return tuple(x.requires_grad_() for x in (y0, raw, b, t))


@pytest.mark.parametrize("how", [{}, {"num_steps": 2}], ids=["adaptive", "fixed"])
@pytest.mark.parametrize("adjoint", ["backprop", "checkpoint"])
@BOTH_MODES
@EACH_WAY
def test_gradients_to_state_times_source_and_what_the_products_depend_on(way, batch_dim, adjoint, how):
    """Through outputs inside the step, at its end, and to t."""
    assert gradcheck(solution(way, batch_dim, adjoint, **how), inputs(batch_dim), rtol=1e-4, atol=1e-6, fast_mode=True)


def test_gradients_of_many_small_steps_and_without_rmatvec():
    _, y0, A, b = problem("arnoldi", 12)
    leaf = A.clone().requires_grad_()
    whole = exact(leaf, b, y0, 2.0)
    (wanted,) = torch.autograd.grad(whole.square().sum(), leaf)

    class Forward:
        def matvec(self, y: Tensor) -> Tensor:
            return y @ leaf.mT

        def source(self) -> Tensor:
            return b

    y = solve(Forward(), y0, [0.0, 2.0], method="exp_linear", krylov_dim=6, rtol=1e-9, atol=1e-9).y[-1]
    torch.testing.assert_close(y, whole, rtol=1e-7, atol=1e-7)
    (found,) = torch.autograd.grad(y.square().sum(), leaf)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@BOTH_MODES
def test_second_derivatives_of_uniformisation(batch_dim):
    run = solution("uniformisation", batch_dim, "backprop")
    assert gradgradcheck(run, inputs(batch_dim, 2), rtol=1e-4, atol=1e-5, fast_mode=True)


def test_second_derivatives_of_krylov_spaces_are_refused():
    y0, raw, b, t = inputs(None)
    y = solution("arnoldi", None, "backprop")(y0, raw, b, t)
    (first,) = torch.autograd.grad(y[-1].square().sum(), raw, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_complex_states_and_their_gradients():
    """Schroedinger's equation with a Hermitian H = R + R^*: the norm stays."""
    raw = torch.randn(3, 3, dtype=torch.complex128, requires_grad=True)
    y0 = torch.randn(3, dtype=torch.complex128, requires_grad=True)

    def run(y0: Tensor, raw: Tensor) -> Tensor:
        f = Linear(-1j * (raw + raw.mH))
        return solve(f, y0, [0.0, 0.4, 1.0], method="exp_linear", rtol=1e-9, atol=1e-9, backward_tol=1e-12).y

    y = run(y0, raw)
    torch.testing.assert_close(torch.linalg.vector_norm(y, dim=1), torch.linalg.vector_norm(y0).expand(3))
    torch.testing.assert_close(y[-1], torch.linalg.matrix_exp(-1j * (raw + raw.mH)) @ y0, rtol=1e-8, atol=1e-8)
    assert gradcheck(run, (y0, raw), rtol=1e-4, atol=1e-6, fast_mode=True)


def test_a_module_with_parameters():
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(0.3 * torch.randn(4, 4, dtype=DOUBLE))

        def matvec(self, y: Tensor) -> Tensor:
            return y @ self.weight.mT

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.matvec(y)

    field, y0 = Field(), torch.randn(5, 4, dtype=DOUBLE)
    found = []
    for adjoint in ("backprop", "checkpoint"):
        y = solve(field, y0, [0.0, 1.0], method="exp_linear", rtol=1e-9, atol=1e-9, adjoint=adjoint).y[-1]
        found.append(torch.autograd.grad(y.square().sum(), field.weight)[0])
    (wanted,) = torch.autograd.grad((y0 @ torch.linalg.matrix_exp(field.weight).mT).square().sum(), field.weight)
    for gradient in found:
        torch.testing.assert_close(gradient, wanted, rtol=1e-7, atol=1e-7)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_field_that_is_not_linear_is_refused_before_it_is_called():
    def f(t: Tensor, y: Tensor) -> Tensor:
        raise AssertionError("f was called")

    with pytest.raises(ArgumentError, match="LinearField, which has matvec"):
        solve(f, torch.ones(2), [0.0, 1.0], method="exp_linear")


class Callable(Linear):
    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return y @ self.A.mT + self.b + self.extra(t, y)

    def extra(self, t: Tensor, y: Tensor) -> Tensor:
        return y**3


def test_an_f_that_is_not_its_parts_is_refused():
    _, y0, A, b = problem("arnoldi")
    with pytest.raises(ArgumentError, match="not matvec"):
        solve(Callable(A, b), y0, [0.0, 1.0], method="exp_linear")


@pytest.mark.parametrize("structure", [{"symmetric": True}, {"rate": 0.1}], ids=["symmetric", "rate"])
def test_claims_about_the_matrix_that_are_wrong_are_refused(structure):
    f, y0, *_ = problem("arnoldi")
    for name, value in structure.items():
        setattr(f, name, value)
    with pytest.raises(ArgumentError, match=f"the field says {next(iter(structure))}"):
        solve(f, y0, [0.0, 3.0], method="exp_linear")


def test_fixed_steps_too_long_for_the_space_are_no_success():
    f, y0, *_ = problem("lanczos")
    with pytest.raises(InnerSolverError, match="krylov_dim"):
        solve(f, y0, [0.0, 30.0], method="exp_linear", num_steps=1, krylov_dim=3)


@pytest.mark.parametrize("bad", [{"expm": "pade"}, {"krylov_dim": 1}, {"inner_tol": 0.0}, {"backward_tol": -1.0}])
def test_options_out_of_range(bad):
    f, y0, *_ = problem("arnoldi")
    with pytest.raises(ArgumentError, match=next(iter(bad))):
        solve(f, y0, [0.0, 1.0], method="exp_linear", **bad)
    with pytest.raises(ArgumentError, match="rate="):
        solve(f, y0, [0.0, 1.0], method="exp_linear", expm="uniformisation")


def test_what_the_method_can_not_be_used_for():
    f, y0, *_ = problem("arnoldi")
    with pytest.raises(UnsupportedError, match="LinearField"):
        solve(f, y0.requires_grad_(), [0.0, 1.0], method="exp_linear", adjoint="backsolve")
    with pytest.raises(UnsupportedError, match=r"torch\.func"):
        torch.func.vmap(lambda y: solve(f, y, [0.0, 1.0], method="exp_linear").y)(y0.detach().expand(2, -1))


# --- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [False, True], ids=["arnoldi", "lanczos"])
def test_the_relation_of_krylov_spaces(same):
    """L V_m = V_{m+1} H, with orthonormal V, per sample; past an invariant space only zeros follow."""
    A = torch.randn(2, 9, 9, dtype=DOUBLE)
    A = A + A.mT if same else A
    layout = Layout(torch.zeros(2, 9, dtype=DOUBLE), 0)
    start = torch.randn(2, 9, dtype=DOUBLE)
    start[1] = torch.linalg.eig(A[1] @ A[1].mT)[1][:, :1].real.squeeze(1) if not same else torch.linalg.eigh(A[1])[1][:, 2]
    space = KrylovSpace(layout, start, same)
    for _ in range(6):
        space.grow(lambda v: torch.einsum("bij,bj->bi", A, v))
    V, H = torch.stack(space.vectors, -1), space.matrix()
    torch.testing.assert_close(A @ V[..., :-1], (V @ H)[..., :-1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(V[0].mT @ V[0], torch.eye(7, dtype=DOUBLE), rtol=1e-8, atol=1e-8)
    if same:
        assert V[1, :, 2:].abs().max() < 1e-8


def test_poisson_weights_are_those_of_scipy():
    x = torch.tensor([0.0, 0.3, 20.0, 110.0], dtype=DOUBLE, requires_grad=True)
    k = np.arange(150)
    np.testing.assert_allclose(poisson_tails(x, 150).detach(), scipy.stats.poisson.sf(k, x.detach()[:, None]), atol=1e-12)
    np.testing.assert_allclose(poisson_terms(x, 150, 0).detach(), scipy.stats.poisson.pmf(k, x.detach()[:, None]), atol=1e-12)
    gradients = [torch.autograd.grad(poisson_tails(x, 5)[:, j].sum(), x)[0] for j in range(5)]
    torch.testing.assert_close(torch.stack(gradients, 1), poisson_terms(x.detach(), 5, 0))
