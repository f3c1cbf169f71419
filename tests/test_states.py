"""States, times, outputs and batches of every kind: what a solve sees, gives back, and costs."""

import math
from collections import Counter, OrderedDict
from typing import NamedTuple

import pytest
import torch
from problems import ANY_FIELD, takes
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from solvers import METHODS, Jump, solve
from solvers.norms import max_norm, rms

F32, F64, C64, C128 = torch.float32, torch.float64, torch.complex64, torch.complex128
ADAPTIVE = [name for name in ANY_FIELD if METHODS[name].error_order is not None]
EXPLICIT = [name for name in ADAPTIVE if not METHODS[name].implicit]
FIXED = [name for name in ANY_FIELD if not METHODS[name].variable_order]
WAYS = [pytest.param(name, {}, id=name) for name in ADAPTIVE]
WAYS += [pytest.param(name, dict(dt=0.1), id=f"{name}-fixed") for name in FIXED]
MODES = {
    "joint": {},
    "samples": dict(batch_dim=0),
    "groups": dict(batch_index=torch.tensor([1, 0, 1])),
}
modes = pytest.mark.parametrize("mode", MODES)
grads = pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])


def double(*values):
    return torch.tensor(values, dtype=F64)


def decay(t, y):
    return pytree.tree_map(torch.neg, y)


def lorenz(t, y):
    """Operations + - * only; ``(..., 3)``."""
    a, b, c = y.unbind(-1)
    return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - c * (8 / 3)], -1)


class Counting:
    """A field that remembers how often, and when, it was asked."""

    def __init__(self, f):
        self.f = f
        self.times = []

    def __call__(self, t, y, *args):
        self.times.append(t.detach().clone())
        return self.f(t, y, *args)

    @property
    def calls(self):
        return len(self.times)


# --- shapes and structures -------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    position: torch.Tensor
    velocity: torch.Tensor


def ones(*shape, dtype=F64):
    return torch.ones(shape, dtype=dtype)


STATES = {
    "0-dim": ones(),
    "vector": ones(3),
    "matrix": ones(3, 2),
    "four dimensions": ones(3, 1, 2, 2),
    "one element": ones(3, 1),
    "nothing": ones(3, 0),
    "not contiguous": ones(2, 3).T,
    "expanded": ones(1, 1).expand(3, 2),
    "tuple": (ones(3), ones(3, 2)),
    "tuple of one": (ones(3, 2),),
    "list": [ones(3, 2), ones(3)],
    "dict": {"b": ones(3, 2), "a": ones(3, 1, 2)},
    "ordered dict": OrderedDict(z=ones(3, 2), a=ones(3)),
    "named tuple": Pair(ones(3, 2), ones(3, 2)),
    "nested": {"x": (ones(3), [ones(3, 2)]), "p": Pair(ones(3, 1), ones(3, 2))},
    "with nothing": (ones(3), ones(3, 0)),
}


@grads
@pytest.mark.parametrize(
    "method", [dict(), dict(method="rk4", dt=0.05), dict(method="dop853")], ids=["dopri5", "rk4", "dop853"]
)
@modes
@pytest.mark.parametrize("name", STATES)
def test_any_structure_of_any_shapes_comes_back_with_an_axis_of_time(name, mode, method, grad):
    y0 = STATES[name]
    leaves, spec = pytree.tree_flatten(y0)
    if mode != "joint" and leaves[0].dim() == 0:
        pytest.skip("no dimension of samples")

    def f(t, y):
        seen, structure = pytree.tree_flatten(y)
        assert structure == spec
        assert [x.shape for x in seen] == [x.shape for x in leaves]
        return decay(t, y)

    with torch.set_grad_enabled(grad):
        solution = solve(f, y0, [0.0, 0.3, 1.0], **MODES[mode], **method)
    values, structure = pytree.tree_flatten(solution.y)
    assert structure == spec
    decayed = torch.exp(-double(0.0, 0.3, 1.0))
    for value, start in zip(values, leaves, strict=True):
        assert value.dtype == start.dtype
        expected = decayed.reshape(3, *[1] * start.dim()) * start
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
        assert torch.equal(value[0], start)
    last, structure = pytree.tree_flatten(solution.last.y)
    assert structure == spec
    assert all(torch.equal(a, b[-1]) for a, b in zip(last, values, strict=True))


@modes
def test_an_empty_batch_is_solved(mode):
    how = dict(MODES[mode], batch_index=torch.zeros(0, dtype=torch.long)) if mode == "groups" else MODES[mode]
    assert solve(decay, ones(0, 2), [0.0, 1.0], **how).y.shape == (2, 0, 2)


def test_a_field_of_a_small_state_may_answer_in_the_same_memory_every_time():
    answer = torch.empty(3, dtype=F64)

    def f(t, y):
        return torch.neg(y, out=answer)

    with torch.no_grad():
        assert torch.equal(solve(f, ones(3), [0.0, 0.5, 1.0]).y, solve(decay, ones(3), [0.0, 0.5, 1.0]).y)


@modes
def test_a_field_may_ask_for_the_gradient_of_its_time(mode):
    """As the nested autograd of a time-dependent Hamiltonian does."""

    def f(t, y):
        with torch.enable_grad():
            t.requires_grad_(True)
            (g,) = torch.autograd.grad((t**2).sum(), t)
        return g.reshape(-1, *[1] * (y.dim() - 1)).expand_as(y) if mode == "samples" else y * 0 + g.mean()

    y = solve(f, torch.zeros(3, 2, dtype=F64), [0.0, 2.0], **MODES[mode]).y
    torch.testing.assert_close(y[-1], torch.full((3, 2), 4.0, dtype=F64))


# --- dtypes ----------------------------------------------------------------------------------------------------------


@grads
@pytest.mark.parametrize(
    "method", [dict(), dict(method="bosh3"), dict(method="rk4", dt=0.01)], ids=["dopri5", "bosh3", "rk4"]
)
@pytest.mark.parametrize("dtype", [C64, C128])
@modes
def test_complex_states(dtype, mode, method, grad):
    y0 = torch.tensor([[1 + 1j, 2], [0.5, -1j], [3, 1]], dtype=dtype)
    omega = 2.0

    def f(t, y):
        assert y.dtype == dtype
        assert t.dtype == (F32 if dtype == C64 else F64)
        return 1j * omega * y

    tolerance = dict(rtol=1e-5, atol=1e-6)
    with torch.set_grad_enabled(grad):
        solution = solve(f, y0, [0.0, 0.4, 1.0], **tolerance, **MODES[mode], **method)
    phase = torch.exp(1j * omega * double(0.0, 0.4, 1.0)).to(dtype)
    assert solution.y.dtype == dtype
    torch.testing.assert_close(solution.y, phase[:, None, None] * y0, rtol=1e-3, atol=1e-4)


MIXED = {"half": torch.float16, "single": F32, "double": F64, "complex": C64}


@pytest.mark.parametrize("method", [dict(), dict(method="rk4", dt=0.05)], ids=["dopri5", "rk4"])
@grads
@modes
def test_mixed_dtypes_are_kept(mode, method, grad):
    y0 = {name: ones(3, 2, dtype=dtype) for name, dtype in MIXED.items()}

    def f(t, y):
        assert {name: leaf.dtype for name, leaf in y.items()} == MIXED
        return decay(t, y)

    with torch.set_grad_enabled(grad):
        solution = solve(f, y0, [0.0, 0.3, 1.0], **MODES[mode], **method)
    for name, dtype in MIXED.items():
        assert solution.y[name].dtype == dtype
        assert solution.last.y[name].dtype == dtype
        torch.testing.assert_close(
            solution.y[name][-1].to(C128), torch.full((3, 2), math.exp(-1), dtype=C128), rtol=1e-3, atol=0
        )


@pytest.mark.parametrize(
    "method", [dict(), dict(method="rk4", dt=0.01), dict(method="dop853")], ids=["dopri5", "rk4", "dop853"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@grads
@modes
def test_half_precision_is_integrated_in_single(mode, dtype, method, grad):
    """y' = -y from 1e4 in half precision is right to its rounding; integrated in it, it would stand still."""

    def f(t, y):
        assert y.dtype == dtype
        assert t.dtype == F32
        return -y

    y0 = torch.full((3, 2), 1e4, dtype=dtype)
    times = torch.linspace(0.0, 1.0, 5)
    with torch.set_grad_enabled(grad):
        y = solve(f, y0, times, rtol=1e-3, atol=1e-3, **MODES[mode], **method).y
    exact = y0.double() * torch.exp(-times.double()).reshape(5, 1, 1)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_half_precision_from_zero_takes_its_first_step():
    y = solve(lambda t, y: 1 - y, torch.zeros(3, dtype=torch.float16), [0.0, 1.0], rtol=1e-3, atol=1e-4).y
    torch.testing.assert_close(y[-1].double(), torch.full((3,), 1 - math.exp(-1), dtype=F64), rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    "method", [dict(), dict(method="rk4", dt=0.01), dict(method="dop853")], ids=["dopri5", "rk4", "dop853"]
)
@modes
@grads
def test_single_precision_at_a_late_time_with_times_in_double(mode, method, grad):
    """At t = 1e7 single precision has steps of 1, so that f could not tell its stages apart."""
    late = 1e7

    def f(t, y):
        assert t.dtype == F64
        rate = torch.cos(t - late)
        return rate.mean().to(F32).expand_as(y)

    seen = []
    save = lambda t, y: (seen.append(t), t - late + 0 * y.double().sum())[1]
    with torch.set_grad_enabled(grad):
        how = dict(time_dtype=F64, rtol=1e-5, atol=1e-6) | MODES[mode] | method
        y0, times = torch.zeros(3, 1), double(late, late + 0.25, late + 1)
        y = solve(f, y0, times, **how).y
        kept = solve(f, y0, times, save=save, **how).y
    torch.testing.assert_close(y[-1], torch.full((3, 1), math.sin(1.0)), rtol=1e-4, atol=0)
    torch.testing.assert_close(y[1], torch.full((3, 1), math.sin(0.25)), rtol=1e-4, atol=0)
    assert all(t.dtype == F64 for t in seen)
    assert kept.reshape(3, -1)[:, 0].tolist() == [0.0, 0.25, 1.0]


# --- tolerances and norms --------------------------------------------------------------------------------------------


def error_of(solution):
    return (solution.y[-1] - math.exp(-5.0)).abs()


@modes
def test_tolerances_per_element(mode):
    """A tight tolerance in one element makes its error small; the same one everywhere is a plain number."""
    y0 = ones(3, 2)
    loose = solve(decay, y0, [0.0, 5.0], rtol=1e-3, atol=1e-3, **MODES[mode])
    tight = solve(decay, y0, [0.0, 5.0], rtol=1e-3, atol=double(1e-9, 1e-3), **MODES[mode])
    same = solve(decay, y0, [0.0, 5.0], rtol=torch.full((3, 2), 1e-3), atol=double(1e-3, 1e-3), **MODES[mode])
    assert (error_of(tight) < 0.3 * error_of(loose)).all()
    torch.testing.assert_close(same.y, loose.y, rtol=1e-6, atol=1e-9)
    assert torch.equal(torch.as_tensor(same.stats.accepted), torch.as_tensor(loose.stats.accepted))


def test_tolerances_per_sample():
    y = solve(decay, ones(3, 1), [0.0, 5.0], rtol=double([1e-2], [1e-5], [1e-8]), atol=1e-12, batch_dim=0)
    a, b, c = error_of(y).flatten().tolist()
    assert a > 30 * b > 900 * c
    assert y.stats.accepted.tolist() == sorted(y.stats.accepted.tolist())


@modes
def test_tolerances_as_trees(mode):
    y0 = {"a": ones(3, 2), "b": ones(3)}
    loose = solve(decay, y0, [0.0, 5.0], rtol=1e-3, atol=1e-3, **MODES[mode])
    same = solve(
        decay,
        y0,
        [0.0, 5.0],
        rtol={"a": 1e-3, "b": ones(3) * 1e-3},
        atol={"a": ones(2) * 1e-3, "b": 1e-3},
        **MODES[mode],
    )
    tight = solve(decay, y0, [0.0, 5.0], rtol=1e-3, atol={"a": 1e-3, "b": 1e-9}, **MODES[mode])
    for name in y0:
        torch.testing.assert_close(same.y[name], loose.y[name], rtol=1e-6, atol=1e-9)
        wrong = [(s.y[name][-1] - math.exp(-5.0)).abs().max() for s in (loose, tight)]
        assert wrong[1] < 0.3 * wrong[0]


def test_tolerances_may_be_0_dim_tensors():
    y = solve(decay, ones(3), [0.0, 1.0], rtol=torch.tensor(1e-4), atol=torch.tensor(1e-7)).y
    assert torch.equal(
        y, solve(decay, ones(3), [0.0, 1.0], rtol=float(torch.tensor(1e-4)), atol=float(torch.tensor(1e-7))).y
    )


def test_the_norm_of_a_tree_is_the_maximum_over_its_leaves():
    """A large quiet leaf does not dilute the error of a small one."""
    alone = solve(decay, (ones(1),), [0.0, 5.0], rtol=1e-4, atol=1e-12)
    mixed = solve(lambda t, y: (-y[0], 0 * y[1]), (ones(1), ones(10_000)), [0.0, 5.0], rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(mixed.y[0], alone.y[0], rtol=1e-4, atol=0)
    assert abs(mixed.stats.accepted - alone.stats.accepted) <= 1
    rates = torch.nn.functional.pad(double(-1.0), (0, 10_000))
    diluted = solve(lambda t, y: rates * y, ones(10_001), [0.0, 5.0], rtol=1e-4, atol=1e-12)
    assert mixed.stats.accepted > diluted.stats.accepted


def test_custom_norms():
    y0 = double(1.0, 2.0, 0.1)
    plain = solve(lorenz, y0, [0.0, 1.0])
    assert solve(lorenz, y0, [0.0, 1.0], norm=rms).stats.accepted == plain.stats.accepted
    assert solve(lorenz, y0, [0.0, 1.0], norm=max_norm).stats.accepted > plain.stats.accepted
    first = solve(lorenz, y0, [0.0, 1.0], norm=lambda error: 1e-3 * error[0].abs())
    assert first.stats.accepted < 0.5 * plain.stats.accepted


def test_a_custom_norm_of_a_batch_sees_all_samples_and_gives_one_number_each():
    y0 = torch.stack([double(1.0, 2.0, 0.1), double(0.1, -1.0, 20.0)])
    plain = solve(lorenz, y0, [0.0, 1.0], batch_dim=0)
    same = solve(lorenz, y0, [0.0, 1.0], batch_dim=0, norm=lambda error: error.square().mean(1).sqrt())
    torch.testing.assert_close(same.y, plain.y, rtol=1e-9, atol=1e-9)
    assert torch.equal(same.stats.accepted, plain.stats.accepted)


# --- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "how"), WAYS)
@modes
def test_time_may_run_backwards(method, how, mode):
    y0 = torch.full((3, 2), 0.5, dtype=F64)
    how = dict(method=method, **how, **MODES[mode])
    how |= dict(dt=0.02) if "dt" in how else dict(rtol=1e-4, atol=1e-4)
    back = solve(lambda t, y: y * (1 - y), y0, [1.0, 0.4, 0.0], **how).y
    exact = 1 / (1 + torch.exp(1.0 - double(1.0, 0.4, 0.0))).reshape(3, 1, 1).expand(3, 3, 2)
    torch.testing.assert_close(back, exact, rtol=1e-2, atol=0)


@grads
@modes
@pytest.mark.parametrize("times", [[2.0], [2.0, 2.0]], ids=["one time", "no length"])
def test_an_interval_without_length_gives_the_start_and_asks_nothing(times, mode, grad):
    f = Counting(decay)
    y0 = torch.rand(3, 2, dtype=F64, requires_grad=grad)
    solution = solve(f, y0, times, **MODES[mode])
    assert torch.equal(solution.y, y0.expand(len(times), 3, 2))
    assert solution.success
    assert f.calls == solution.stats.nfe == 0
    for save in ("final", "steps"):
        assert torch.equal(solve(f, y0, times, save=save, **MODES[mode]).y, y0[None])
    assert torch.equal(solve(f, y0, times, dense=True, **MODES[mode]).dense(2.0), y0)
    if grad:
        (g,) = torch.autograd.grad(solution.y.sum(), y0)
        assert torch.equal(g, torch.full((3, 2), float(len(times)), dtype=F64))


@pytest.mark.parametrize(
    "times",
    [
        torch.tensor([0.0, 0.5, 1.0]),
        torch.tensor([0, 1, 2]),
        [0, 0.5, 1],
        (0.0, 1.0),
        [torch.tensor(0.0), 1.0],
        double(0, 1),
    ],
    ids=["float32", "integers", "list", "tuple", "mixed list", "float64"],
)
@modes
def test_times_of_any_kind_are_float64_inside(times, mode):
    solution = solve(decay, ones(3), times, **MODES[mode])
    assert solution.t.dtype == F64
    assert solution.t.shape == ((len(times),) if mode == "joint" else (2 if mode == "groups" else 3, len(times)))
    expected = torch.exp(-torch.stack([torch.as_tensor(t, dtype=F64) for t in times]))
    torch.testing.assert_close(solution.y, expected[:, None].expand(-1, 3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_a_single_precision_output_grid_has_no_steps_of_no_length(shift):
    """arange in single precision, as people write it, with fixed steps: no sliver at the end of an interval."""
    times = shift + torch.arange(0, 1.1, 0.1, dtype=F32)
    f = Counting(decay)
    solution = solve(f, ones(3), times.unique(), method="euler", dt=0.01 if shift == 0 else 0.125)
    assert solution.success
    assert f.calls <= 1 + math.ceil(float(times[-1] - times[0]) / (0.01 if shift == 0 else 0.125))


# --- what is kept ----------------------------------------------------------------------------------------------------

TIMES = double(0.0, 0.2, 0.7, 1.0)


def both(t, y):
    """Depends on the time and on the state, in a tree of its own."""
    total = y.sum(-1)
    return {"total": total, "with t": (total + t.reshape(-1) if t.dim() and len(t) == len(y) else total + t.mean(),)}


@grads
@modes
@pytest.mark.parametrize(
    "method", [dict(), dict(method="dop853"), dict(method="rk4", num_steps=20)], ids=["dopri5", "dop853", "rk4"]
)
def test_every_kind_of_save(mode, grad, method):
    y0 = torch.rand(3, 2, dtype=F64, requires_grad=grad)
    how = MODES[mode] | method
    plain = solve(decay, y0, TIMES, **how)
    assert plain.y.requires_grad == grad
    final = solve(decay, y0, TIMES, save="final", **how)
    assert torch.equal(final.y, plain.y[-1:])
    assert (final.t == 1.0).all()
    steps = solve(decay, y0, TIMES, save="steps", **how)
    assert len(steps.y) == int(torch.as_tensor(steps.stats.accepted).max()) + 1
    assert torch.equal(steps.y[0], y0)
    assert torch.equal(steps.last.y, plain.last.y)
    function = solve(decay, y0, TIMES, save=both, **how).y
    torch.testing.assert_close(function["total"], plain.y.sum(-1))
    torch.testing.assert_close(function["with t"][0], plain.y.sum(-1) + TIMES[:, None])
    pair = solve(decay, y0, TIMES, save=("final", both), **how).y
    torch.testing.assert_close(pair["with t"][0], plain.y[-1:].sum(-1) + 1.0)
    whole = solve(decay, y0, TIMES, save=("steps", both), **how)
    torch.testing.assert_close(whole.y["total"], steps.y.sum(-1))
    if grad:
        for part, same in ((final.y, plain.y[-1:]), (function["total"], plain.y.sum(-1)), (steps.y[-1], plain.y[-1])):
            got, expected = (torch.autograd.grad(x.square().sum(), y0, retain_graph=True)[0] for x in (part, same))
            torch.testing.assert_close(got, expected)


def test_steps_of_a_batch_are_padded_where_a_sample_took_fewer():
    y0 = double([1.0], [1.0])
    solution = solve(lambda t, y: -double([1.0], [30.0]) * y, y0, [0.0, 1.0], batch_dim=0, save="steps")
    counts = (solution.stats.accepted + 1).tolist()
    assert counts[0] < counts[1] == len(solution.y)
    assert solution.t.shape == (2, counts[1])
    for row, count in enumerate(counts):
        assert torch.isfinite(solution.t[row, :count]).all()
        assert torch.isnan(solution.t[row, count:]).all()
        assert torch.isnan(solution.y[count:, row]).all()
        rate = [1.0, 30.0][row]
        torch.testing.assert_close(
            solution.y[:count, row, 0], torch.exp(-rate * solution.t[row, :count]), rtol=1e-4, atol=1e-6
        )


@modes
def test_a_function_of_the_time_has_the_gradient_to_the_time(mode):
    """d/dt of t^2 y(t) is 2 t y + t^2 f: neither part may be lost."""
    t = TIMES.clone().requires_grad_()
    y0 = ones(3, 1)
    save = lambda time, y: {"v": (time**2).reshape(-1, 1) * y if mode == "samples" else time.mean() ** 2 * y}
    for kind, index in ((save, [1, 2, 3]), (("final", save), [3])):
        y = solve(decay, y0, t, save=kind, **MODES[mode]).y["v"]
        (g,) = torch.autograd.grad(y.sum(), t)
        exact = 3 * (2 * TIMES - TIMES**2) * torch.exp(-TIMES)
        torch.testing.assert_close(g[index], exact[index], rtol=1e-4, atol=1e-6)


# --- times that steps must end at ------------------------------------------------------------------------------------


@modes
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "tsit5", "dop853"])
def test_step_t_is_hit_exactly_and_the_step_size_restored(mode, sign, method):
    stops = [0.25, 0.6, 0.6000001, 0.85]
    y0 = ones(3, 1)
    ends = []

    def observer(step):
        ends.append(tuple(torch.as_tensor(x, dtype=F64).reshape(-1)[0].item() for x in (step.t, step.dt)))

    how = dict(method=method, dt0=0.1, dt_max=0.1, rtol=1e-2, atol=1e-2, observer=observer, **MODES[mode])
    step_t = [sign * s for s in reversed(stops)] + [sign * 5.0, -sign * 1.0]
    solution = solve(decay, y0, [0.0, sign], step_t=step_t, **how)
    assert solution.success
    times = [t for t, _ in ends]
    assert {sign * s for s in stops} <= set(times)
    for before, (_, dt) in zip([0.0, *times], ends, strict=False):
        left = [s for s in (*stops, 1.0) if s > abs(before) + 1e-12]
        assert math.isclose(abs(dt), min(0.1, left[0] - abs(before)), rel_tol=1e-9), (
            "neither a full step nor a clipped one"
        )
    assert len(ends) == sum(math.ceil(round((b - a) / 0.1, 6)) for a, b in zip([0.0, *stops], [*stops, 1.0]))


def test_step_t_per_sample():
    stops = double([0.3, 0.5], [0.4, 0.41])
    solution = solve(decay, ones(2, 1), [0.0, 1.0], batch_dim=0, step_t=stops, save="steps")
    for row in (0, 1):
        assert set(stops[row].tolist()) <= set(solution.t[row].tolist())
        assert not set(stops[1 - row].tolist()) & set(solution.t[row].tolist())


def test_a_stop_on_a_discontinuity_makes_it_cheap():
    def f(t, y):
        return torch.where(t < 0.5, torch.ones_like(y), -3 * torch.ones_like(y))

    plain = solve(f, ones(1), [0.0, 1.0], rtol=1e-8, atol=1e-8)
    told = solve(f, ones(1), [0.0, 1.0], rtol=1e-8, atol=1e-8, jumps=[Jump(0.5)])
    assert told.stats.nfe < 0.5 * plain.stats.nfe
    assert told.stats.rejected == 0


INTERVALS = [
    *[(0.0, 0.3), (-3.7, 7.1), (1e3, -2.9), (0.1, 0.3), (0.3, 0.1), (1 / 3, 2 / 3)],
    *[(1.0, 1.0 + gap) for gap in (1e-15, -1e-15, 1e-12, -1e-5)],
    *[(-1e-12, 1e-12), (1e6, 1e6 + 0.1), (2.5370871348371294e-05, -6.631014135890494e-05)],
]  # fmt: skip


@modes
@pytest.mark.parametrize(("method", "how"), WAYS)
def test_f_is_never_asked_outside_the_interval(method, how, mode):
    """In a state of either precision; also by the search for the first step and by the stages of the outputs."""
    samples = dict(joint=1, samples=3, groups=2)[mode]
    for number, (start, end) in enumerate(INTERVALS):
        dtype = F32 if number % 3 == 0 and takes(method, F32) else F64
        f = Counting(decay)
        times = torch.tensor([start, start + 0.4 * (end - start), end], dtype=F64).expand(samples, 3).clone()
        times[-1] += 0.37 * (end - start)
        if not bool((times.diff() * (end - start) > 0).all()):
            times = times[:, ::2]
        times = times[0] if mode == "joint" else times
        step = dict(dt=0.37 * abs(end - start)) if "dt" in how else dict(dt_max=0.6 * abs(end - start), rtol=1e-3)
        solve(f, ones(3, 1, dtype=dtype), times, method=method, throw=False, max_steps=5, **step, **MODES[mode])
        rounded = times.to(dtype)
        low, high = rounded.amin(-1), rounded.amax(-1)
        assert f.calls
        for t in f.times:
            assert (t >= low).all(), (start, end, t)
            assert (t <= high).all(), (start, end, t)


def test_f_is_never_asked_outside_random_intervals():
    torch.manual_seed(1)
    for _ in range(100):
        t = (torch.randn(2, dtype=F64) * 10 ** torch.randint(-3, 4, (2,)).double()).tolist()
        f = Counting(lorenz)
        stops = [t[0] + x * (t[1] - t[0]) for x in torch.rand(3).tolist()]
        solve(f, ones(3), t, rtol=1e-3, max_steps=20, throw=False, step_t=stops, dense=True)
        assert min(t) <= min(f.times)
        assert max(f.times) <= max(t)


# --- samples with times of their own ---------------------------------------------------------------------------------

NAN = math.nan
RAGGED = double(
    [0.0, 0.3, 0.9, 2.0, NAN],
    [5.0, 4.0, 3.5, 1.0, 0.5],
    [-1.0, -0.5, NAN, NAN, NAN],
    [7.0, NAN, NAN, NAN, NAN],
    [0.1, 0.2, 0.3, 0.4, 10.0],
)
STARTS = double([0.5, 1.0], [-1.0, 0.3], [2.0, 2.0], [1.0, -1.0], [0.0, 0.1])


def swing(t, y):
    """A driven pendulum; per sample ``t`` is ``(B,)``."""
    return torch.stack([y[..., 1], -torch.sin(y[..., 0]) + 0.3 * torch.cos(0.7 * t)], -1)


@grads
@pytest.mark.parametrize("method", [*EXPLICIT, "rk4", "prox_euler"])
def test_ragged_times_per_sample_reproduce_each_sample_alone(method, grad):
    """Different starts, ends, directions and numbers of outputs: the irregular series of an ODE-RNN."""
    # An error estimate that is all rounding would turn a different bit into a different step.
    tolerance = 1e-4 if METHODS[method].order <= 3 else 1e-8
    how = dict(method=method, rtol=tolerance, atol=tolerance)
    how |= dict(dt=0.11) if METHODS[method].error_order is None else {}
    with torch.set_grad_enabled(grad):
        solution = solve(swing, STARTS, RAGGED, batch_dim=0, **how)
        assert torch.equal(solution.t.isnan(), RAGGED.isnan())
        for row, times in enumerate(RAGGED):
            times = times[torch.isfinite(times)]
            alone = solve(swing, STARTS[row], times, **how)
            torch.testing.assert_close(solution.y[: len(times), row], alone.y, rtol=1e-10, atol=1e-10)
            assert torch.isnan(solution.y[len(times) :, row]).all()
            assert solution.last.t[row] == times[-1]
            assert solution.stats.accepted[row] == alone.stats.accepted
            assert solution.stats.rejected[row] == alone.stats.rejected


def test_ragged_times_of_groups_reproduce_each_group_alone():
    index = torch.tensor([2, 0, 1, 1, 2, 4, 3])
    y0 = torch.randn(7, 2, dtype=F64)
    f = lambda t, y: swing(t[index] if t.dim() else t, y)
    solution = solve(f, y0, RAGGED, batch_index=index, rtol=1e-5, atol=1e-6)
    for group, times in enumerate(RAGGED):
        times, rows = times[torch.isfinite(times)], index == group
        alone = solve(swing, y0[rows], times, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(solution.y[: len(times), rows], alone.y, rtol=1e-10, atol=1e-10)
        assert torch.isnan(solution.y[len(times) :, rows]).all()
        assert solution.stats.accepted[group] == alone.stats.accepted


JUMP_T = double(0.9, 2.2, NAN, 7.0, 0.25)
LATER_T = double(1.1, 4.5, -0.7, 0.0, 0.3)


def kick(t, y):
    return y * 0.5 + torch.stack([0 * t, 0.1 * t], -1)


def turn(t, y):
    return y.flip(-1)


@grads
@pytest.mark.parametrize("method", ["dopri5", "bosh3", "dop853", "rk4"])
def test_jumps_per_sample_reproduce_each_sample_alone(method, grad):
    how = dict(method=method) | (dict(dt=0.07) if method == "rk4" else {})
    with torch.set_grad_enabled(grad):
        solution = solve(
            swing, STARTS, RAGGED, batch_dim=0, jumps=[Jump(JUMP_T, kick), Jump(LATER_T, turn), Jump(0.3)], **how
        )
        assert solution.success
        for row, times in enumerate(RAGGED):
            times = times[torch.isfinite(times)]
            jumps = [Jump(t[row].item(), g) for t, g in ((JUMP_T, kick), (LATER_T, turn)) if torch.isfinite(t[row])]
            alone = solve(swing, STARTS[row], times, jumps=[*jumps, Jump(0.3)], **how)
            torch.testing.assert_close(solution.y[: len(times), row], alone.y, rtol=1e-10, atol=1e-10)
            assert solution.stats.accepted[row] == alone.stats.accepted


@modes
def test_an_output_at_a_jump_shows_the_state_after_it_and_jumps_at_one_time_keep_their_order(mode):
    jumps = [
        Jump(0.5, lambda t, y: y + 1),
        Jump(0.5, lambda t, y: 10 * y),
        Jump(1.0, lambda t, y: -y),
        Jump(0.0, lambda t, y: NAN * y),
    ]
    y = solve(lambda t, y: 0 * y, ones(3, 1), [0.0, 0.5, 1.0], jumps=jumps, **MODES[mode]).y
    assert y[:, 0, 0].tolist() == [1.0, 20.0, -20.0]


def jump_loss(mode, parameters, method):
    """One number from a solve with a jump whose time, map and starting state come from ``parameters`` (tensors)."""
    time, factor, start = parameters
    how = dict(method=method, rtol=1e-10, atol=1e-12) | (dict(dt=0.02) if method == "rk4" else {})
    jumps = [Jump(time, lambda t, y: factor * y + torch.stack([0 * t, t], -1) * 0.2)]
    outputs = [0.0, 0.4, 0.8, 1.5]
    if mode == "joint":
        return solve(swing, start, outputs, jumps=jumps, **how).y[1:].square().sum()
    rows = torch.stack([start, 2 * start])
    times = double([0.0, 0.4, 0.8, 1.5], [0.1, 0.5, 0.9, NAN])
    y = solve(swing, rows, times, jumps=jumps, batch_dim=0, **how).y
    return y[1:][torch.isfinite(y[1:])].square().sum()


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize(
    ("mode", "time"), [("joint", 0.61), ("samples", [0.61, 0.37]), ("samples", 0.61)], ids=["joint", "own", "shared"]
)
def test_gradients_through_the_time_and_the_map_of_a_jump(mode, time, method):
    parameters = [torch.tensor(time, dtype=F64), double(0.7), double(0.5, 1.0)]
    leaves = [p.clone().requires_grad_() for p in parameters]
    gradients = torch.autograd.grad(jump_loss(mode, leaves, method), leaves)
    for number, gradient in enumerate(gradients):
        for place in range(gradient.numel()):
            ends = []
            for sign in (1, -1):
                moved = [p.clone() for p in parameters]
                moved[number].view(-1)[place] += sign * 1e-5
                ends.append(jump_loss(mode, moved, method).item())
            difference = (ends[0] - ends[1]) / 2e-5
            torch.testing.assert_close(gradient.view(-1)[place].item(), difference, rtol=1e-5, atol=1e-7)


# --- a sample does not notice its batch ------------------------------------------------------------------------------


def rational(t, y):
    """Operations + - * / only."""
    a, b, c = y.unbind(-1)
    return torch.stack([10 * (b - a) + 0.1 * t, a * (28 - c) - b / (1 + a * a), a * b - c * 2.5], -1)


@pytest.mark.parametrize(("dtype", "grad"), [(F64, False), (F64, True), (F32, False)], ids=["double", "grad", "single"])
@pytest.mark.parametrize(("method", "how"), WAYS)
def test_a_sample_is_bit_for_bit_the_same_in_every_batch(method, how, dtype, grad):
    """In a batch of the same size with other company, and in batches of other sizes at other places."""
    if not takes(method, dtype):
        pytest.skip(f"{method} refuses {dtype}")
    torch.manual_seed(3)
    rows = torch.randn(17, 3, dtype=dtype) * 3
    times = [0.0, 0.05, 0.11, 0.2]
    how = dict(how, method=method, batch_dim=0, rtol=1e-3, atol=1e-3, max_steps=10, throw=False)
    how |= dict(dt=0.02) if "dt" in how else {}
    with torch.set_grad_enabled(grad):
        whole = solve(rational, rows, times, **how).y
        other = solve(rational, torch.cat([rows[:4], 2 * rows[4:]]), times, **how).y
        assert torch.equal(other[:, :4].nan_to_num(), whole[:, :4].nan_to_num())
        for size, first in ((1, 0), (1, 16), (2, 15), (3, 2), (5, 12), (8, 0)):
            part = solve(rational, rows[first : first + size], times, **how).y
            same = whole[:, first : first + size]
            assert torch.equal(part.nan_to_num(), same.nan_to_num()), (size, first, (part - same).abs().max())


@grads
@pytest.mark.parametrize("method", EXPLICIT)
def test_a_group_is_bit_for_bit_the_same_among_other_groups(method, grad):
    torch.manual_seed(3)
    index = torch.tensor([0, 0, 1, 2, 2, 2, 3, 1])
    rows = torch.randn(8, 3, dtype=F64)
    how = dict(method=method, rtol=1e-4, atol=1e-4)
    times = [0.0, 0.05, 0.11, 0.3]

    def field(index):
        return lambda t, y: rational(t[index], y)

    with torch.set_grad_enabled(grad):
        whole = solve(field(index), rows, times, batch_index=index, **how).y
        moved = torch.where((index == 1).unsqueeze(1), rows, 2 * rows + 1)
        other = solve(field(index), moved, times, batch_index=index, **how).y
        assert torch.equal(other[:, index == 1], whole[:, index == 1])
        for group in range(4):
            mine = index == group
            none = index[mine] * 0
            alone = solve(field(none), rows[mine], times, batch_index=none, **how).y
            assert torch.equal(alone, whole[:, mine])


@pytest.mark.parametrize(("method", "how"), WAYS)
@grads
def test_joint_equals_a_batch_of_one(method, how, grad):
    y0 = double(1.0, 2.0, 0.5)
    how = dict(how, method=method, rtol=1e-4, atol=1e-4)
    if "dt" in how:
        how["dt"] = 0.01
    elif method == "dop853":
        # Its automatic first step is so short that the error estimate is rounding, which no two modes share.
        how["dt0"] = 0.1
    with torch.set_grad_enabled(grad):
        joint = solve(lorenz, y0, [0.0, 0.1, 0.3], **how)
        batch = solve(lorenz, y0[None], [0.0, 0.1, 0.3], batch_dim=0, **how)
        group = solve(lorenz, y0[None], [0.0, 0.1, 0.3], batch_index=torch.tensor([0]), **how)
    for other in (batch, group):
        torch.testing.assert_close(other.y[:, 0], joint.y, rtol=1e-12, atol=1e-12)
        assert joint.stats.nfe <= other.stats.nfe <= joint.stats.nfe + 2
        assert other.stats.accepted.tolist() == [joint.stats.accepted]
        assert other.stats.rejected.tolist() == [joint.stats.rejected]


# --- work ------------------------------------------------------------------------------------------------------------


@grads
@modes
@pytest.mark.parametrize(("method", "how"), WAYS)
def test_nfe_is_the_number_of_calls(method, how, mode, grad):
    f = Counting(lorenz)
    y0 = double([1.0, 2.0, 0.5], [-1.0, 0.0, 3.0], [0.1, 0.1, 20.0])
    jumps = [Jump(0.2, lambda t, y: y + 0.1)]
    how = dict(how, method=method, rtol=1e-3, atol=1e-3)
    how |= dict(dt=0.02) if "dt" in how else {}
    with torch.set_grad_enabled(grad):
        for extra in ({}, dict(dense=True)) if grad else ({}, dict(save="final"), dict(step_t=[0.15])):
            f.times.clear()
            stats = solve(f, y0, [0.0, 0.11, 0.13, 0.3], jumps=jumps, **how, **MODES[mode], **extra).stats
            assert stats.nfe == f.calls
            assert (torch.as_tensor(stats.nfe_per_sample) <= f.calls).all()
            assert (torch.as_tensor(stats.accepted) > 0).all()


@pytest.mark.parametrize("mode", ["joint", "samples"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5"])
def test_outputs_cost_these_methods_nothing(method, mode, grad):
    """One evaluation to start, one for the first step size, and one less than its stages per attempted step."""
    stages = {"bosh3": 3, "dopri5": 6, "tsit5": 6}[method]
    y0 = double([1.0, 2.0, 0.5]) if mode == "samples" else double(1.0, 2.0, 0.5)
    with torch.set_grad_enabled(grad):
        runs = [
            solve(lorenz, y0, torch.linspace(0, 1, n), method=method, **MODES[mode]).stats for n in (2, 3, 50, 1001)
        ]
    assert len({stats.nfe for stats in runs}) == 1
    tried = int(torch.as_tensor(runs[0].accepted + runs[0].rejected))
    assert runs[0].nfe == 2 + stages * tried


@modes
@pytest.mark.parametrize("method", ["dopri8", "dop853"])
def test_stages_for_outputs_are_evaluated_once_in_steps_that_contain_one(method, mode):
    y0 = ones(3, 3) * double([1.0, 2.0, 0.5])
    runs = {n: solve(lorenz, y0, torch.linspace(0, 1, n), method=method, **MODES[mode]).stats for n in (2, 3, 2001)}
    extra = len(METHODS[method].tableau.extension.c_extra)
    steps = int(torch.as_tensor(runs[2].accepted).max())
    assert 0 < runs[3].nfe - runs[2].nfe <= extra
    assert 0 < runs[2001].nfe - runs[2].nfe <= extra * steps
    assert torch.equal(torch.as_tensor(runs[2001].accepted), torch.as_tensor(runs[2].accepted))


class Dispatches(TorchDispatchMode):
    """Counts operations outside of f, and reads of a tensor's values by the host."""

    READS = ("tolist", "numpy", "item", "__bool__", "__float__", "__int__", "__index__", "__array__", "__complex__")

    def __init__(self, monkeypatch):
        super().__init__()
        self.operations, self.reads, self.inside = Counter(), Counter(), False
        for name in self.READS:
            monkeypatch.setattr(torch.Tensor, name, self._read(name, getattr(torch.Tensor, name)))

    def _read(self, name, original):
        def read(tensor, *args, **kwargs):
            before, self.inside = self.inside, True
            self.reads[name] += 1
            try:
                return original(tensor, *args, **kwargs)
            finally:
                self.inside = before

        return read

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.inside:
            self.operations[str(func)] += 1
            if func is torch.ops.aten._local_scalar_dense.default:
                self.reads["_local_scalar_dense"] += 1
        return func(*args, **(kwargs or {}))

    def field(self, f):
        """f, whose own operations do not count."""

        def quiet(t, y):
            self.inside = True
            try:
                return f(t, y)
            finally:
                self.inside = False

        return quiet


def per_step(monkeypatch, f, y0, **how):
    """Operations and reads of one more attempted step, from two solves of different length."""
    found = []
    for end in (1.0, 2.0):
        with monkeypatch.context() as patch, torch.no_grad():
            count = Dispatches(patch)
            with count:
                stats = solve(count.field(f), y0, [0.0, end], dt_max=0.02, rtol=1e-3, atol=1e-3, **how).stats
        tried = int(torch.as_tensor(stats.accepted + stats.rejected).max())
        found.append((tried, count.operations.total(), count.reads.total()))
    (steps, operations, reads), (more_steps, more_operations, more_reads) = found
    assert more_steps >= steps + 45
    return (more_operations - operations) / (more_steps - steps), (more_reads - reads) / (more_steps - steps)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 2, 3), (2000, 3)])
def test_a_joint_step_dispatches_little_and_reads_once(monkeypatch, shape, dtype):
    operations, reads = per_step(monkeypatch, lambda t, y: -y, ones(*shape, dtype=dtype))
    assert operations <= 30
    assert reads <= 1


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("shape", [(3, 1), (4, 3), (2, 2, 3), (2000, 3)])
@pytest.mark.parametrize("mode", ["samples", "groups"])
def test_a_step_of_a_batch_reads_once(monkeypatch, shape, dtype, mode):
    how = dict(batch_dim=0) if mode == "samples" else dict(batch_index=torch.arange(shape[0]) // 2)
    operations, reads = per_step(monkeypatch, lambda t, y: -y, ones(*shape, dtype=dtype), **how)
    assert reads <= 1
    assert operations <= 100


def test_the_counter_of_reads_sees_them_all(monkeypatch):
    x = torch.ones(1)
    count = Dispatches(monkeypatch)
    with count:
        x.item(), x.tolist(), x.numpy(), bool(x), float(x), int(x)
        (x + 1).add(2)
    assert count.reads.total() == 6
    assert count.operations.total() == 2


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("adjoint", ["backprop", "checkpoint"])
@pytest.mark.parametrize("batch_dim", [None, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_meet_f_on_their_own_side_of_a_jump(adjoint, batch_dim, dtype, right):
    """Whether f counts the time itself to the one side or to the other."""
    late = []

    def f(t, y):
        late.append(bool((t == 0.5).any()))
        after = t >= 0.5 if right else t > 0.5
        after = after.unsqueeze(-1) if batch_dim == 0 else after
        return torch.where(after, 3.0 * y, -y)

    y0 = torch.tensor([[1.0], [2.0]], dtype=dtype, requires_grad=True)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-9
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    sol = solve(f, y0, t, rtol=tolerance, jumps=[Jump(0.5)], batch_dim=batch_dim, adjoint=adjoint)
    assert not any(late)
    assert int(torch.as_tensor(sol.stats.rejected).max()) <= 3
    exact = y0.detach() * math.exp(1.0)
    assert torch.allclose(sol.y[-1], exact, rtol=20 * tolerance)
    sol.y[-1].sum().backward()
    assert torch.allclose(y0.grad, torch.full_like(y0, math.exp(1.0)), rtol=20 * tolerance)
