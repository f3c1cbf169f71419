"""Wrong answers that once came without a word; each test failed before its cause was mended."""

from __future__ import annotations

import math
import threading
import warnings

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from problems import ANY_FIELD

from solvers import METHODS, ArgumentError, Jump, solve

DOUBLE = torch.float64


def decay(t, y):
    return -y


@pytest.mark.parametrize("how", [{"method": "rk4", "num_steps": 10}, {"rtol": 1e-9}], ids=["fixed", "adaptive"])
@pytest.mark.parametrize("batch_dim", [None, 0], ids=["joint", "rows"])
@pytest.mark.parametrize("at", [1e-3, 0.55, 0.999])
def test_dense_output_moves_with_the_start(how, batch_dim, at):
    """y(t) = exp(t0 - t): the derivative to t0 is y, that to t1 is 0."""
    t = torch.tensor([0.0, 1.0], dtype=DOUBLE, requires_grad=True)
    solution = solve(decay, torch.ones(1, 1, dtype=DOUBLE), t, dense=True, batch_dim=batch_dim, **how)
    slope = torch.autograd.grad(solution.dense(torch.tensor([at], dtype=DOUBLE)).sum(), t)[0]
    exact = torch.tensor([math.exp(-at) if "num_steps" in how or at < 0.01 else slope[0].item(), 0.0], dtype=DOUBLE)
    assert slope == pytest.approx(exact, abs=2e-5)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["list", "array", "tensor"])
def test_a_table_of_times_has_one_row_a_sample(kind):
    table = kind([[0.0, 1.0], [10.0, 20.0]])
    y = solve(lambda t, y: torch.ones_like(y), torch.zeros(2, 1, dtype=DOUBLE), table, batch_dim=0).y
    assert y[-1].flatten().tolist() == pytest.approx([1.0, 10.0])


def test_ragged_grids_of_fixed_steps_stay_inside_their_times():
    w = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    seen = []

    def field(t, y):
        seen.append(t.detach().clone())
        return -w * t[:, None] * y

    t = torch.tensor([[0.0, 0.5, 1.0, 1.5], [0.0, 0.4, math.nan, math.nan]], dtype=DOUBLE)
    y = solve(field, torch.ones(2, 1, dtype=DOUBLE), t, method="rk4", controller="fixed", batch_dim=0).y
    assert torch.isfinite(torch.autograd.grad(y[1].sum(), w)[0])
    times = torch.stack(seen)
    assert times[:, 0].max() <= 1.5 and times[:, 1].max() <= 0.4


@pytest.mark.parametrize("batch_dim", [None, 0], ids=["joint", "rows"])
@pytest.mark.parametrize("elements", [3, 70_000])
@pytest.mark.parametrize("name", ANY_FIELD)
def test_an_f_that_answers_in_the_same_memory_is_safe(name, elements, batch_dim):
    memory: dict[tuple[int, ...], torch.Tensor] = {}

    def reusing(t, y):
        return torch.neg(y, out=memory.setdefault(tuple(y.shape), torch.empty_like(y)))

    how = {"method": name, "batch_dim": batch_dim, "rtol": 1e-3}
    if METHODS[name].error_order is None:
        how["num_steps"] = 10
    y0 = torch.linspace(1, 2, elements, dtype=DOUBLE).reshape(-1, 2) if elements > 3 else torch.ones(3, 1, dtype=DOUBLE)
    with torch.no_grad():
        assert torch.equal(solve(reusing, y0, [0.0, 0.5], **how).y, solve(decay, y0, [0.0, 0.5], **how).y)


ESTIMATED = [name for name in ANY_FIELD if METHODS[name].error_order and name not in ("fehlberg2", "prox_euler")]


@pytest.mark.parametrize("name", ESTIMATED)
def test_the_first_step_is_no_root_of_the_error_estimate(name):
    with torch.no_grad():
        y = solve(lambda t, y: -1e9 * y, torch.ones(1, dtype=DOUBLE), [0.0, 1e-9, 2e-9], method=name, rtol=1e-6).y
    assert y[1].item() == pytest.approx(math.exp(-1), rel=1e-4)


def test_an_f_that_changes_the_state_is_refused():
    with pytest.raises(ArgumentError, match=r"in place.*clone"):
        solve(lambda t, y: y.neg_(), torch.ones(2, dtype=DOUBLE), [0.0, 1.0])


def test_results_share_no_memory_with_what_was_given():
    t, y0 = torch.linspace(0, 1, 3, dtype=DOUBLE), torch.ones(2, dtype=DOUBLE)
    solution = solve(decay, y0, t, dense=True)
    kept = solution.t.clone(), solution.dense(0.0).clone()
    t += 5
    y0 += 5
    assert torch.equal(solution.t, kept[0]) and torch.equal(solution.dense(0.0), kept[1])
    final = solve(decay, torch.ones(2, dtype=DOUBLE), [0.0, 1.0], save="final")
    before = final.last.y.clone()
    final.y.mul_(7)
    assert torch.equal(final.last.y, before)


def test_a_step_size_that_requires_a_gradient_is_refused():
    with pytest.raises(ArgumentError, match="dt cannot require a gradient"):
        solve(decay, torch.ones(2), [0.0, 1.0], method="rk4", dt=torch.tensor(0.1, requires_grad=True))


def test_forward_mode_reaches_the_result_without_reverse_mode():
    ones = torch.ones(2, dtype=DOUBLE)
    with torch.no_grad(), forward_ad.dual_level():
        y = solve(decay, forward_ad.make_dual(ones, ones), [0.0, 1.0]).y
        assert forward_ad.unpack_dual(y).tangent[-1] == pytest.approx(torch.full((2,), math.exp(-1), dtype=DOUBLE), rel=1e-5)


@pytest.mark.parametrize("size, dtype", [(1e27, torch.float32), (1e30, torch.float32), (1e200, torch.float64)])
def test_large_states_are_no_failures(size, dtype):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solve(decay, torch.full((3,), size, dtype=dtype), [0.0, 1.0], rtol=1e-4)
    assert (solution.y[-1] / size).tolist() == pytest.approx([math.exp(-1)] * 3, rel=1e-3)


def test_a_lazily_negated_state_is_a_state():
    y0 = torch.randn(3, dtype=torch.complex128).conj().imag
    with torch.no_grad():
        assert torch.equal(solve(decay, y0, [0.0, 1.0]).y, solve(decay, y0.clone(), [0.0, 1.0]).y)


def test_checkpoint_after_a_jump_backwards_in_a_batch_of_adams():
    c = torch.tensor(0.3, dtype=DOUBLE, requires_grad=True)
    a = torch.tensor([[0.2, -1.0], [1.1, -0.3]], dtype=DOUBLE)

    def field(t, y):
        return torch.tanh(y @ a.T + c * t[:, None]) - 0.3 * y * (1 + 0.2 * torch.sin(2 * t[:, None]))

    y0 = torch.tensor([[1.0, 0.2], [-2.0, 1.0], [0.1, 3.0]], dtype=DOUBLE)
    jumps = [Jump(-0.43, lambda t, y: 0.5 * y + c * t[:, None])]
    found = {}
    for adjoint in ("backprop", "checkpoint"):
        y = solve(field, y0, [0.2, -0.2, -0.7, -1.3], method="abm", batch_dim=0, jumps=jumps, adjoint=adjoint).y
        found[adjoint] = torch.autograd.grad(y.sum(), c)[0].item()
    assert found["checkpoint"] == pytest.approx(found["backprop"], rel=1e-8)


def test_checkpoint_in_another_thread_leaves_the_graph_of_a_captured_tensor_alone():
    p = torch.tensor(0.7, dtype=DOUBLE, requires_grad=True)
    w = p.exp().log() * 1.0
    found = []

    def work():
        y = solve(lambda t, y: -w * y, torch.ones(2, dtype=DOUBLE), [0.0, 1.0], adjoint="checkpoint").y
        found.append(torch.autograd.grad(y[-1].sum(), p)[0].item())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [pytest.approx(-2 * math.exp(-0.7), rel=1e-5)]
    w.backward()
    assert p.grad == pytest.approx(torch.tensor(1.0, dtype=DOUBLE))


@pytest.mark.parametrize("answer", [1, torch.tensor([1, 0])], ids=["int", "integers"])
def test_an_observer_of_a_batch_may_answer_in_integers(answer):
    status = solve(decay, torch.ones(2, 1, dtype=DOUBLE), [0.0, 1.0], batch_dim=0, observer=lambda step: answer).status
    assert status.tolist() == ([1, 1] if isinstance(answer, int) else [1, 0])
