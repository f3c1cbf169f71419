"""The adjoints agree with plain backpropagation, or refuse; what they hold in memory, and what they count."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from solvers import METHODS, ArgumentError, UnsupportedError, solve
from solvers.adjoint import ADJOINTS
from solvers.adjoint.discrete import Tape
from solvers.control import Jump
from solvers.methods.implicit import ImplicitRungeKutta
from solvers.status import SolveError

D = torch.float64
MODES = ("joint", "batch", "index")
INDEX = torch.tensor([0, 1, 1, 2, 0, 2])
OPTIONS: dict[str, dict[str, Any]] = {"joint": {}, "batch": {"batch_dim": 0}, "index": {"batch_index": INDEX}}
BATCH = {"batch": 4, "index": 3}


class Dynamics(nn.Module):
    """Nonlinear, not autonomous, with a parameter, a captured tensor and an argument."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Linear(3, 3).double()
        self.mode = mode
        self.captured = [(0.2 * torch.randn(3, 3, dtype=D)).requires_grad_()]  # in a list, which hides it from parameters()

    def forward(self, t: Tensor, y: Tensor, options: dict[str, Tensor]) -> Tensor:
        if self.mode != "joint":
            t = (t[INDEX] if self.mode == "index" else t).unsqueeze(-1)
        return torch.tanh(self.net(y)) + options["w"] * torch.sin(t) * y - 1.5 * torch.sin(3 * y) + y @ self.captured[0]


def start(mode: str) -> Tensor:
    torch.manual_seed(4)
    shape = {"joint": (3,), "batch": (4, 3), "index": (6, 3)}[mode]
    return torch.randn(shape, dtype=D).requires_grad_()


def grid(mode: str, kind: str = "plain") -> Tensor:
    t = torch.tensor([0.0, 0.43, 0.9, 1.21, 1.6], dtype=D)
    if kind == "reversed":
        t = t.flip(0)
    if kind == "ragged":
        t = t.expand(BATCH[mode], -1) + 0.1 * torch.arange(BATCH[mode], dtype=D).unsqueeze(1)
        t[0, -1] = t[1, -2:] = math.nan
        t[2] = t[2].flip(0)
    return t.clone().requires_grad_()


def gradients(mode: str, adjoint: str, kind: str = "plain", **options: Any) -> tuple[Any, list[Tensor]]:
    """The solution, and the gradients of a weighted sum of it to y0, t, the argument, the captured tensor, parameters."""
    field, y0, t = Dynamics(mode), start(mode), grid(mode, kind)
    w = torch.tensor(0.3, dtype=D, requires_grad=True)
    solution = solve(field, y0, t, args=({"w": w},), adjoint=adjoint, **OPTIONS[mode], **options)
    torch.manual_seed(5)
    loss = (solution.y.nan_to_num() * torch.randn_like(solution.y)).sum() + solution.last.y.square().sum()
    wanted = [y0, t, w, *field.captured, *field.parameters()]
    return solution, list(torch.autograd.grad(loss, wanted))


def distance(found: list[Tensor], reference: list[Tensor]) -> float:
    """Largest relative difference, in the Euclidean norm of each gradient."""
    return max(float((x - r).norm() / r.norm()) for x, r in zip(found, reference, strict=True))


def agrees(mode: str, tolerance: float = 1e-12, extra: dict[str, Any] | None = None, **options: Any) -> Any:
    reference = gradients(mode, "backprop", **options)
    found = gradients(mode, "checkpoint", **options, **(extra or {}))
    torch.testing.assert_close(found[0].y, reference[0].y, rtol=1e-9, atol=1e-11, equal_nan=True)
    assert distance(found[1], reference[1]) < tolerance
    return found[0]


# -- checkpoint is backprop -------------------------------------------------------------------------------------------

ADAPTIVE = ("dopri5", "tsit5", "bosh3", "adaptive_heun", "abm")
FIXED = ("euler", "rk4", "dopri5", "dop853", "explicit_adams", "implicit_adams")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_steps(method: str, mode: str) -> None:
    # Where the estimated error is rounding noise, two ways to add it up do not choose the same steps.
    rtol = {"adaptive_heun": 1e-3, "bosh3": 1e-4, "abm": 1e-5}.get(method, 1e-7)
    agrees(mode, 1e-11 if mode != "joint" else 1e-12, method=method, rtol=rtol, atol=1e-2 * rtol)


# Groups differ from rows in the layout only, which two methods are enough for.
@pytest.mark.parametrize(
    ("method", "mode"), [(m, k) for m in FIXED for k in MODES if k != "index" or m in ("rk4", "implicit_adams")]
)
@pytest.mark.parametrize("steps", [{"num_steps": 7}, {"dt": 0.21}, {"controller": "fixed"}], ids=["num", "dt", "grid"])
def test_fixed_steps(method: str, steps: dict[str, Any], mode: str) -> None:
    agrees(mode, method=method, **steps)


@pytest.mark.parametrize("method", ["dopri8", "dop853"])
def test_high_orders_adaptive(method: str) -> None:
    agrees("joint", 1e-9, method=method, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extra", [{}, {"checkpoints": 2}], ids=["all", "two"])
def test_implicit_steps(mode: str, extra: dict[str, Any]) -> None:
    agrees(mode, 1e-9, extra, method="prox_euler", num_steps=12)


@pytest.mark.parametrize("mode", ["joint", pytest.param("batch", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["prox_cn", "prox_bdf4", "prox_multistage3"])
def test_proximal_steps_of_higher_order(method: str, mode: str) -> None:
    agrees(mode, 1e-9, {"checkpoints": 2}, method=method, num_steps=12)


IMPLICIT = [name for name in METHODS if isinstance(METHODS[name], ImplicitRungeKutta)]


@pytest.mark.parametrize("mode", ["joint", "batch"])
@pytest.mark.parametrize("method", IMPLICIT)
def test_implicit_runge_kutta_steps(method: str, mode: str) -> None:
    """The Jacobian, kept over several steps, is found again from the checkpoint before them."""
    agrees(mode, 1e-9, {"checkpoints": 2}, method=method, num_steps=20)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", ["trbdf2", "radauIIA5"])
def test_adaptive_implicit_runge_kutta_steps(method: str, mode: str) -> None:
    agrees(mode, 1e-6 if mode == "index" else 1e-9, method=method, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "inner",
    ["newton", pytest.param("newton_krylov", marks=pytest.mark.slow), pytest.param("fletcher_reeves", marks=pytest.mark.slow)],
)
def test_backward_differentiation(inner: str, mode: str) -> None:
    """Orders, steps, Jacobians and what the inner solver has learnt come back from the checkpoint before them."""
    found = agrees(mode, 1e-9, {"checkpoints": 2}, method="prox_bdf", inner=inner, rtol=1e-4, atol=1e-6, dt0=0.1)
    assert bool((torch.as_tensor(found.stats.rejected) > 0).any()), "no rejection to leave out"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["reversed", "ragged"])
@pytest.mark.parametrize("options", [{"rtol": 1e-5}, {"method": "rk4", "dt": 0.11}, {"method": "abm"}], ids=str)
def test_directions_and_ragged_times(options: dict[str, Any], kind: str, mode: str) -> None:
    if mode == "joint" and kind == "ragged":
        kind = "plain"  # rows of times need rows
    agrees(mode, 1e-10, kind=kind, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("save", ["final", "steps"])
@pytest.mark.parametrize("options", [{"rtol": 1e-5}, {"method": "rk4", "num_steps": 7}], ids=str)
def test_saving(save: str, options: dict[str, Any], mode: str) -> None:
    agrees(mode, 1e-10, save=save, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(
    "options",
    [{"rtol": 1e-6}, {"method": "implicit_adams", "num_steps": 13}, {"method": "abm", "rtol": 1e-4}],
    ids=str,
)
def test_few_checkpoints(options: dict[str, Any], count: int, mode: str) -> None:
    few = agrees(mode, 1e-10, {"checkpoints": count}, **options)
    if count == 1:
        assert few.stats.backward.nfe > few.stats.backward.nvjp


def test_an_output_on_a_node_by_chance_has_its_gradient_to_t() -> None:
    for mode, steps in (("joint", {"dt": 0.125}), ("batch", {"dt": 0.125}), ("joint", {"step_t": [0.5]})):
        values = []
        for adjoint in ("backprop", "checkpoint"):
            t = torch.tensor([0.0, 0.5, 1.0], dtype=D, requires_grad=True)
            y0 = torch.ones(2, 1, dtype=D)
            options = {**steps, "method": "dopri5", "batch_dim": None if mode == "joint" else 0, "adjoint": adjoint}
            y = solve(lambda t, y: -y, y0, t, **options).y
            values.append(torch.autograd.grad(y[1].sum(), t)[0])
        torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=1e-13)
        slope = 2 * math.exp(-0.5)
        torch.testing.assert_close(values[0], torch.tensor([slope, -slope, 0.0], dtype=D), rtol=1e-4, atol=1e-6)


def jumping(mode: str, adjoint: str, **options: Any) -> list[Tensor]:
    y0 = start("joint" if mode == "joint" else "batch")
    when = torch.tensor(0.63 if mode == "joint" else [0.63, 0.4, math.nan, 1.0], dtype=D, requires_grad=True)
    factor = torch.tensor(0.7, dtype=D, requires_grad=True)
    weight = (0.3 * torch.ones(3, 3, dtype=D)).requires_grad_()
    t = torch.tensor([0.0, 0.5, 0.8, 1.1], dtype=D, requires_grad=True)

    def column(t: Tensor) -> Tensor:
        return t if t.dim() == 0 else t.unsqueeze(1)

    jumps = [Jump(when, lambda t, y: factor * y + column(t) ** 2), Jump(0.5)]
    f = lambda t, y: torch.tanh(y @ weight) + torch.cos(5 * column(t))
    y = solve(f, y0, t, jumps=jumps, adjoint=adjoint, **OPTIONS[mode], **options).y
    torch.manual_seed(5)
    return list(torch.autograd.grad((y * torch.randn_like(y)).sum(), (y0, t, when, factor, weight)))


@pytest.mark.parametrize("mode", ["joint", "batch"])
@pytest.mark.parametrize(
    "options",
    [{}, {"method": "rk4", "num_steps": 7}, {"method": "implicit_adams", "dt": 0.1}, {"method": "abm"}],
    ids=str,
)
def test_jumps(options: dict[str, Any], mode: str) -> None:
    reference = jumping(mode, "backprop", **options)
    for checkpoints in (None, 2):
        assert distance(jumping(mode, "checkpoint", checkpoints=checkpoints, **options), reference) < 1e-10


def test_gradcheck() -> None:
    weight = torch.randn(2, 2, dtype=D, requires_grad=True)
    y0, t = torch.randn(2, dtype=D, requires_grad=True), torch.tensor([0.0, 0.4, 1.0], dtype=D, requires_grad=True)

    def run(y0: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        f = lambda t, y, w: torch.tanh(w @ y) * torch.cos(t)
        return solve(f, y0, t, args=(weight,), method="rk4", num_steps=6, adjoint="checkpoint").y

    assert torch.autograd.gradcheck(run, (y0, t, weight))


def test_states_of_other_kinds() -> None:
    rate = torch.tensor(0.4, requires_grad=True)

    def run(adjoint: str) -> list[Tensor]:
        z = torch.tensor([1.0 + 2j, 0.5j], dtype=torch.complex64, requires_grad=True)
        half = torch.tensor([0.5, -1.0], dtype=torch.float16, requires_grad=True)
        f = lambda t, state: {"z": 1j * rate * state["z"], "half": -state["half"] * state["z"].abs().half()}
        y = solve(f, {"z": z, "half": half}, [0.0, 0.5, 1.0], method="rk4", num_steps=5, adjoint=adjoint).y
        loss = (y["z"] * (1 + 2j)).real.sum() + y["half"].float().square().sum()
        return list(torch.autograd.grad(loss, (z, half, rate)))

    for found, reference in zip(run("checkpoint"), run("backprop"), strict=True):
        assert found.dtype == reference.dtype
        torch.testing.assert_close(found, reference)


@pytest.mark.parametrize("adjoint", ["checkpoint", "backsolve"])
@pytest.mark.parametrize("mode", ["joint", "batch"])
@pytest.mark.parametrize("kind", ["t", "final", "steps"])
def test_a_saved_function_is_differentiated(kind: str, mode: str, adjoint: str) -> None:
    scale = torch.tensor(1.5, dtype=D, requires_grad=True)

    def run(adjoint: str) -> list[Tensor]:
        y0 = start(mode)
        save = (kind, lambda t, y: {"sum": scale * y.sum(-1), "one": torch.ones_like(y)})
        y = solve(lambda t, y: -y, y0, [0.0, 0.4, 1.0], save=save, rtol=1e-8, adjoint=adjoint, **OPTIONS[mode]).y
        assert y["one"].shape == (*y["sum"].shape, 3)
        return list(torch.autograd.grad(y["sum"].nan_to_num().square().sum(), (y0, scale)))

    assert distance(run(adjoint), run("backprop")) < 1e-5


# -- captured tensors -------------------------------------------------------------------------------------------------


def field_with(kind: str, p: Tensor, q: Tensor, y0: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    if kind == "leaf":
        return lambda t, y: torch.tanh(y @ p) + q
    w = 2 * torch.tanh(p)
    if kind == "not a leaf":
        return lambda t, y: torch.tanh(y @ w) + q
    if kind == "both":
        return lambda t, y: torch.tanh(y @ w) + y @ p + q
    if kind == "a chain":
        v = torch.sin(w)
        return lambda t, y: torch.tanh(y @ w) + y @ v + q
    if kind == "of y0":
        v = 0.5 * y0
        return lambda t, y: torch.tanh(y @ p) + q * v
    if kind == "two outputs":
        w, v = torch.stack([torch.sin(p), torch.cos(p)]).unbind(0)
        return lambda t, y: torch.tanh(y @ w) + y @ v + q
    module = nn.Identity()
    module.forward = lambda t, y: y @ w + q  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("adjoint", ["checkpoint", "backsolve"])
@pytest.mark.parametrize("kind", ["leaf", "not a leaf", "both", "a chain", "of y0", "two outputs", "in a module"])
def test_captured_tensors(kind: str, adjoint: str) -> None:
    def run(adjoint: str) -> list[Tensor]:
        torch.manual_seed(1)
        p, q, y0 = (torch.randn(s, dtype=D, requires_grad=True) for s in ((2, 2), (2,), (2,)))
        y = solve(field_with(kind, p, q, y0), y0, [0.0, 0.5, 1.0], rtol=1e-8, atol=1e-10, adjoint=adjoint).y
        return list(torch.autograd.grad(y.square().sum(), (p, q, y0)))

    assert distance(run(adjoint), run("backprop")) < (1e-11 if adjoint == "checkpoint" else 1e-6)


@pytest.mark.parametrize("adjoint", ["checkpoint", "backsolve"])
def test_a_gradient_to_the_captured_tensor_itself(adjoint: str) -> None:
    w = 2 * torch.ones(2, 2, dtype=D, requires_grad=True)
    y = solve(lambda t, y: torch.tanh(y @ w), torch.ones(2, dtype=D), [0.0, 1.0], adjoint=adjoint).y
    assert torch.autograd.grad(y.sum(), w)[0].abs().min() > 0


@pytest.mark.parametrize("adjoint", ["checkpoint", "backsolve"])
def test_a_tensor_met_late_is_refused(adjoint: str) -> None:
    y0, late = torch.ones(2, dtype=D, requires_grad=True), torch.ones(2, dtype=D, requires_grad=True)
    y = solve(lambda t, y: -y * late if t > 0.5 else -y, y0, [0.0, 1.0], adjoint=adjoint).y
    with pytest.raises(UnsupportedError, match=r"shape \(2,\).*args=.*adjoint='backprop'"):
        y.sum().backward()


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", ["checkpoint", "backsolve"])
def test_second_derivatives_are_refused_when_asked_for(adjoint: str) -> None:
    y0 = torch.ones(2, dtype=D, requires_grad=True)
    y = solve(lambda t, y: -y * y, y0, [0.0, 1.0], adjoint=adjoint).y[-1]
    (first,) = torch.autograd.grad(y.sum(), y0, create_graph=True)
    torch.testing.assert_close(first.detach(), torch.full((2,), 0.25, dtype=D), rtol=1e-4, atol=0)
    # Another term keeps the graph alive: the solve's own must not be dropped.
    with pytest.raises(UnsupportedError, match="adjoint='backprop'"):
        (first.square().sum() + y0.sum()).backward()


@pytest.mark.parametrize("adjoint", ["checkpoint", "backsolve"])
def test_dense_output_and_transforms_are_refused(adjoint: str) -> None:
    y0 = torch.ones(2, requires_grad=True)
    with pytest.raises(UnsupportedError, match="backprop"):
        solve(lambda t, y: -y, y0, [0.0, 1.0], adjoint=adjoint, dense=True)
    run = lambda y: solve(lambda t, y: -y, y, [0.0, 1.0], adjoint=adjoint, method="rk4", num_steps=2).y.sum()
    with pytest.raises(UnsupportedError, match="backprop"):
        torch.func.grad(run)(y0.detach())


def test_backsolve_refuses_what_it_cannot_do() -> None:
    y0 = torch.ones(2, 1, requires_grad=True)
    run = lambda **options: solve(lambda t, y: -y, y0, [0.0, 1.0], adjoint="backsolve", **options)
    with pytest.raises(UnsupportedError, match="checkpoint"):
        run(jumps=[Jump(0.5, lambda t, y: 2 * y)])
    with pytest.raises(UnsupportedError, match="joint"):
        run(adjoint_norm="full", batch_dim=0)
    with pytest.raises(ArgumentError, match="error estimate"):
        run(adjoint_method="rk4")
    with pytest.raises(ArgumentError, match="adjoint_norm"):
        run(adjoint_norm="half")
    with pytest.raises(ArgumentError, match="checkpoints"):
        solve(lambda t, y: -y, y0, [0.0, 1.0], adjoint="checkpoint", checkpoints=0)


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_work_is_counted() -> None:
    calls = [0]

    def f(t: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        return -y * y

    y0 = torch.ones(2, dtype=D, requires_grad=True)
    for adjoint in ("checkpoint", "backsolve"):
        calls[0] = 0
        solution = solve(f, y0, [0.0, 1.0], adjoint=adjoint)
        assert solution.stats.nfe == calls[0]
        assert solution.stats.backward is None
        calls[0] = 0
        solution.y.sum().backward()
        assert solution.stats.backward.nfe == calls[0]
        if adjoint == "checkpoint":
            assert solution.stats.backward.nvjp == calls[0] == 6 * solution.stats.accepted


def test_without_anything_to_differentiate_for_it_is_a_plain_solve() -> None:
    y0 = torch.ones(2)
    for adjoint in ADJOINTS:
        assert not solve(lambda t, y: -y, y0, [0.0, 1.0], adjoint=adjoint).y.requires_grad
        with torch.no_grad():
            assert not solve(lambda t, y: -y, y0.clone().requires_grad_(), [0.0, 1.0], adjoint=adjoint).y.requires_grad


@pytest.mark.parametrize("limit", [1, 3, 8])
def test_the_tape_never_holds_more_points_than_allowed(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    most = [0]
    record = Tape.__call__

    def watched(tape: Tape, step: Any) -> None:
        record(tape, step)
        most[0] = max(most[0], len(tape.points))

    monkeypatch.setattr(Tape, "__call__", watched)
    y0 = torch.ones(2, dtype=D, requires_grad=True)
    solution = solve(lambda t, y: -y, y0, [0.0, 10.0], rtol=1e-10, adjoint="checkpoint", checkpoints=limit)
    assert solution.stats.accepted > 20
    assert most[0] == limit
    torch.testing.assert_close(torch.autograd.grad(solution.y[-1].sum(), y0)[0], solution.y[-1].detach(), rtol=1e-8, atol=0)


@pytest.mark.parametrize(("limit", "allowed"), [(2, 5), (4, 9)])
def test_states_alive_are_bounded(limit: int, allowed: int) -> None:
    """States that f has seen and that still exist, in the backward pass: twice the checkpoints and the one at work."""
    seen: list[weakref.ref] = []
    most = [0]

    def f(t: Tensor, y: Tensor) -> Tensor:
        seen[:] = [reference for reference in seen if reference() is not None]
        most[0] = max(most[0], len({x.data_ptr() for x in (r() for r in seen) if x is not None}))
        seen.append(weakref.ref(y))
        return -0.3 * y

    y0 = torch.ones(100_000, requires_grad=True)
    solution = solve(f, y0, [0.0, 1.0], method="euler", num_steps=40, adjoint="checkpoint", checkpoints=limit)
    loss = solution.y[-1].sum()
    del solution
    gc.collect()
    most[0] = 0
    loss.backward()
    assert most[0] <= allowed


def test_the_graph_frees_the_states() -> None:
    y0 = torch.ones(2, dtype=D, requires_grad=True)
    y = solve(lambda t, y: -y, y0, [0.0, 1.0], adjoint="checkpoint").y
    first = torch.autograd.grad(y.sum(), y0, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(y.sum(), y0)[0], first, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_a_parameter_changed_before_the_backward_pass_is_noticed() -> None:
    weight = torch.ones(2, requires_grad=True)
    y = solve(lambda t, y: -weight * y, torch.ones(2), [0.0, 1.0], adjoint="checkpoint").y
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# -- backsolve --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "options",
    [
        {"method": "dopri5"},
        {"method": "tsit5", "save": "final"},
        {"method": "bosh3", "rtol": 1e-5, "atol": 1e-7},
        {"method": "dopri5", "adjoint_method": "tsit5", "adjoint_rtol": 1e-7, "adjoint_atol": 1e-9},
        {"method": "dopri5", "kind": "reversed"},
        {"method": "dopri5", "kind": "ragged"},
    ],
    ids=str,
)
def test_backsolve_is_good_to_its_tolerance(options: dict[str, Any], mode: str) -> None:
    options = {"rtol": 1e-6, "atol": 1e-9, **options}
    kind, save = options.pop("kind", "plain"), options.get("save", "t")
    if mode == "joint" and kind == "ragged":
        kind = "plain"  # rows of times need rows
    truth = gradients(mode, "backprop", kind, method="dop853", rtol=1e-11, atol=1e-12, save=save)[1]
    solution, found = gradients(mode, "backsolve", kind, **options)
    assert distance(found, truth) < 100 * options["rtol"]
    assert solution.stats.backward.nfe > 0


def test_backsolve_with_parameters_in_the_norm() -> None:
    truth = gradients("joint", "backprop", method="dop853", rtol=1e-11, atol=1e-12)[1]
    assert distance(gradients("joint", "backsolve", rtol=1e-6, adjoint_norm="full")[1], truth) < 1e-4


@pytest.mark.parametrize("mode", ["joint", "batch"])
@pytest.mark.parametrize("options", [{"num_steps": 100}, {"dt": 0.016}], ids=str)
def test_backsolve_with_fixed_steps(options: dict[str, Any], mode: str) -> None:
    truth = gradients(mode, "backprop", method="rk4", **options)[1]
    assert distance(gradients(mode, "backsolve", method="rk4", **options)[1], truth) < 1e-4


def test_backsolve_goes_on_with_its_step_size() -> None:
    """Many outputs do not cost a new search for the step at each of them."""
    y0 = torch.ones(2, dtype=D, requires_grad=True)
    counts = []
    for outputs in (2, 102):
        solution = solve(lambda t, y: -y, y0, torch.linspace(0, 10, outputs, dtype=D), rtol=1e-9, adjoint="backsolve")
        solution.y.sum().backward()
        counts.append(solution.stats.backward.nfe)
    # One step and one new start for each output, and a few where the step was not short enough.
    assert counts[1] <= counts[0] + 100 * 8


def test_backsolve_says_that_the_backward_solve_failed() -> None:
    factor = [-1.0]
    y0 = torch.ones(1, dtype=D, requires_grad=True)
    y = solve(lambda t, y: factor[0] * y, y0, [0.0, 1.0], adjoint="backsolve").y
    factor[0] = math.nan
    with pytest.raises(SolveError, match=r"backward solve of adjoint='backsolve' failed \(NON_FINITE\)"):
        y.sum().backward()
