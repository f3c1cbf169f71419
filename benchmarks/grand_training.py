"""Training through each solver (Xia 2023, Fig. 5.7): evaluations forward and backward, time, loss, validation accuracy."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .grand_problems import END, GrandProblem, Model, within
from .registry import Column, Table

__all__ = ["Counted", "Run", "Scheme", "accuracies", "backsolved", "fitted", "schemes", "table", "train"]

TOLERANCE = 1e-4
MOST_STEPS = 400
"""Of a solve or a backward solve: with s = 1.25 eight are needed, and the adaptive methods at 1e-4 take some twenty."""
EVERY = 5
"""Epochs between looks at the validation nodes."""


class Counted(nn.Module):
    """A field that counts products with the transpose of its Jacobian, whoever asks for them."""

    def __init__(self, inner: nn.Module, field: Any) -> None:
        super().__init__()
        self.inner, self.field, self.pulled = inner, field, 0

    def forward(self, t: Any, x: Tensor) -> Tensor:
        out = self.field(t, x)
        if out.requires_grad:
            out.register_hook(self._pull)
        return out

    def _pull(self, cotangent: Tensor) -> None:
        self.pulled += 1


@dataclass(frozen=True)
class Scheme:
    """A solver and how it is differentiated; `linear`: with A of the start throughout. `trial`: evaluations forward and backward
    and CPU seconds an epoch of a trial implementation on Cora, where it had them."""

    label: str
    gradient: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    trial: tuple[float, float, float] | None = None
    linear: bool = False


def schemes() -> list[Scheme]:
    """The thesis' way first: the continuous adjoint, solved by the method itself."""
    inner, step = "anderson", {"dt": 1.25}
    found = [Scheme(name, "backsolve", name, {"adjoint": "backsolve"}, trial) for name, trial in BACKSOLVED.items()]
    found.append(Scheme("dopri5", "discrete", "dopri5", {"adjoint": "checkpoint"}, (56, 54, 0.76)))
    found.append(Scheme("rk4", "discrete", "rk4_classic", {"adjoint": "checkpoint", **step}))
    found.append(Scheme("AM4, iterated", "discrete", "implicit_adams", {"adjoint": "checkpoint", "corrector_tol": 1.0, **step}))
    for name in ("prox_euler", "prox_cn", "prox_bdf2", "prox_bdf3", "prox_bdf4"):
        options = {"inner": inner, "inner_tol": 1.0, "backward_tol": TOLERANCE, **step}
        found.append(Scheme(f"{name}, {inner}", "implicit", name, options, IMPLICIT.get(name)))
    options = {"inner": inner, "inner_tol": 1.0, "adjoint": "backsolve", "adjoint_method": "prox_bdf2", **step}
    found.append(Scheme(f"prox_bdf2, {inner}", "backsolve", "prox_bdf2", options))
    return found


BACKSOLVED = {"adaptive_heun": (87, 111, 3.78), "dopri5": None, "dopri8": (90, 140, 2.96)}
IMPLICIT = {"prox_euler": (46, 65, 0.64), "prox_bdf2": (42, 58, 0.55)}
COLUMNS = [
    Column("solver", "solver"),
    Column("gradient", "gradient"),
    Column("forward", "forward NFE", "number"),
    Column("backward", "backward NFE", "number"),
    Column("most", "most backward", "count"),
    Column("seconds", "CPU an epoch", "seconds"),
    Column("loss", "loss", "number"),
    Column("accuracy", "validation", "percent"),
    Column("trial", "trial's NFE"),
    Column("trial_seconds", "trial's CPU", "seconds"),
    Column("ended", "ended"),
]


@dataclass
class Run:
    """What came of training: a number an epoch, but of `accuracy` and `test` (%) every `EVERY` epochs and at the end."""

    forward: list[int] = field(default_factory=list)
    backward: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    test: list[float] = field(default_factory=list)
    ended: str = "done"

    @property
    def best(self) -> float | None:
        """Accuracy on the test nodes where that on the validation nodes was highest."""
        return self.test[self.accuracy.index(max(self.accuracy))] if self.accuracy else None


def end_of(model: Model, scheme: Scheme, x: Tensor) -> tuple[Any, Counted]:
    """The solution from `x`, and the field with its counts."""
    from solvers import solve

    counted = Counted(model.attention, model.field(x, scheme.linear))
    return solve(counted, x, [0.0, END], method=scheme.method, **bounds(x, TOLERANCE), **scheme.options), counted


def bounds(x: Tensor, tolerance: float) -> dict[str, Any]:
    """The tolerance, and the most steps."""
    return {**within(x, tolerance), "max_steps": MOST_STEPS}


def train(problem: GrandProblem, scheme: Scheme, epochs: int, seed: int = 0) -> Run:
    """Full batches for `epochs` from a new model; a solver that fails ends the run, and that is part of the answer."""
    return fitted(Model(problem, seed), scheme, epochs)


def fitted(model: Model, scheme: Scheme, epochs: int) -> Run:
    """The same of a model that is there, which is left as the last epoch leaves it."""
    from solvers import ProxodeError

    problem, run = model.problem, Run()
    optimiser = getattr(torch.optim, problem.optimiser)(model.parameters(), **problem.training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for epoch in range(epochs):
            try:
                one_epoch(model, scheme, optimiser, run)
                if epoch % EVERY == EVERY - 1 or epoch == epochs - 1:
                    validation, test = scored(model, scheme)
                    run.accuracy.append(validation)
                    run.test.append(test)
            except ProxodeError as error:
                run.ended = f"epoch {epoch + 1}: {type(error).__name__}"
                break
            if run.loss[-1] != run.loss[-1]:
                run.ended = f"epoch {epoch + 1}: the loss is NaN"
                break
    return run


def one_epoch(model: Model, scheme: Scheme, optimiser: Any, run: Run) -> None:
    model.train()
    optimiser.zero_grad()
    started = time.process_time()
    solution, counted = end_of(model, scheme, model.encode())
    mask = model.problem.split.train
    loss = cross_entropy(model.decode(solution.y[-1])[mask], model.problem.y[mask])
    run.forward.append(int(solution.stats.nfe))
    loss.backward()
    optimiser.step()
    run.backward.append(counted.pulled)
    run.seconds.append(time.process_time() - started)
    run.loss.append(float(loss.detach()))


@torch.no_grad()
def scored(model: Model, scheme: Scheme) -> tuple[float, float]:
    """Accuracy on the validation and on the test nodes, %."""
    model.eval()
    return accuracies(model, end_of(model, scheme, model.encode())[0].y[-1])


@torch.no_grad()
def accuracies(model: Model, z: Tensor) -> tuple[float, float]:
    """Of the decoded end `z` of a solve."""
    right = (model.decode(z).argmax(1) == model.problem.y).float()
    split = model.problem.split
    return 100 * float(right[split.val].mean()), 100 * float(right[split.test].mean())


def table(problem: GrandProblem, epochs: int) -> tuple[Table, dict[str, Any]]:
    """Every solver trained from the same start, and the numbers of each epoch."""
    found = Table(f"{problem.name}: {epochs} epochs, s = 1.25 or tolerance {TOLERANCE:g}, T = {END:g}, float32", COLUMNS)
    curves: dict[str, Any] = {}
    for scheme in schemes():
        run = train(problem, scheme, epochs)
        name = f"{scheme.label}, {scheme.gradient}"
        print(f"  {problem.name}, {name}: {run.ended}", flush=True)
        curves[name] = vars(run)
        row: dict[str, Any] = {"solver": scheme.label, "gradient": scheme.gradient, "ended": run.ended}
        if run.forward:
            row["forward"] = statistics.mean(run.forward)
        if run.loss:
            row |= {"backward": statistics.mean(run.backward), "most": max(run.backward)}
            row |= {"seconds": statistics.median(run.seconds), "loss": run.loss[-1]}
        if run.accuracy:
            row["accuracy"] = run.accuracy[-1]
        if problem.name == "Cora" and scheme.trial is not None:
            row["trial"], row["trial_seconds"] = f"{scheme.trial[0]:g} / {scheme.trial[1]:g}", scheme.trial[2]
        found.rows.append(row)
    found.notes = [
        "NFE: means an epoch; backward: products with the transpose of the Jacobian. A run ends where its solver fails",
        f"backsolve: the continuous adjoint, at most {MOST_STEPS} steps; implicit: of solved steps; discrete: of steps as made",
        "proximal steps of the adjoint equation need s times its growth below 1: f shrinks forwards at a rate of up to 2",
        "tolerances are of the state's size; the trial's were absolute, which is looser where the state is less than 1",
        *findings(found.rows),
    ]
    return found, curves


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """Work of each proximal method, differentiated as solved, as shares of that of explicit ones, however differentiated."""
    ended = [row for row in rows if "backward" in row]
    others = [row for row in ended if row["solver"] in (*BACKSOLVED, "rk4")]
    proximal = [row for row in ended if row["gradient"] == "implicit" and row["ended"] == "done"]
    if not proximal or not others:
        return []
    told = []
    for row in proximal:
        shares = (
            f"{evaluations(row) / evaluations(other):.2f} / {row['seconds'] / other['seconds']:.2f} of {named(other)}"
            for other in others
        )
        told.append(f"{row['solver']}: {evaluations(row):.0f} evaluations, {row['seconds']:.2g} s an epoch; {', '.join(shares)}")
    return ["the thesis: fewer evaluations and less time than adaptive methods; below, shares of evaluations / of time", *told]


def evaluations(row: dict[str, Any]) -> float:
    return row["forward"] + row["backward"]


def named(row: dict[str, Any]) -> str:
    return f"{row['solver']} ({row['gradient']}{'' if row['ended'] == 'done' else ', ended at ' + row['ended']})"


def backsolved(case: Any, name: str, tolerance: float) -> dict[str, Any]:
    """Evaluations of a solve and of its continuous adjoint, at one tolerance."""
    from solvers import ProxodeError, solve

    field, x = case.field(torch.float32)
    counted = Counted(case.model.attention, field)
    row: dict[str, Any] = {"tolerance": tolerance, "method": name, "ended": "done"}
    start = x.clone().requires_grad_()
    try:
        solution = solve(counted, start, [0.0, END], method=name, adjoint="backsolve", **bounds(x, tolerance))
        row |= {"forward": int(solution.stats.nfe), "error": case.error(solution.y[-1].detach())}
        (0.5 * solution.y[-1].square().sum()).backward()
    except ProxodeError as error:
        row["ended"] = type(error).__name__
    row["backward"] = counted.pulled
    return row
