"""Step size and solvers on Cora (Chamberlain et al. 2021, Fig. 3 left): Adams-Bashforth, Adams-Moulton, dopri5."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .grand_problems import END, GrandProblem, Model, chosen, relative, within
from .grand_solvers import solved
from .grand_training import Scheme, accuracies, fitted, train
from .registry import BENCHMARKS, Benchmark, Column, Option, Result, Settings, Table, positive
from .timing import one_thread

__all__ = ["EPOCHS", "FAMILIES", "VARIANTS", "Family", "fit", "forward", "run", "trained"]

TOLERANCE = 1e-4
EPOCHS = Option("epochs", "of each training", 30, positive)
VARIANTS = Option("variant", "l: A of the start throughout; nl: of the state", "l", choices=("l", "nl"))


@dataclass(frozen=True)
class Family:
    """A method with the step sizes to solve and to train with; `said`: what the paper says of it."""

    label: str
    method: str
    steps: tuple[float, ...]
    said: str
    options: Mapping[str, Any] = field(default_factory=dict)
    training: tuple[float, ...] = ()


ONLY = "unstable but at 0.005"
FAMILIES = (
    Family("AB4", "explicit_adams", (0.005, 0.02, 0.1, 0.2, 0.25, 0.3, 0.5, 1.0), ONLY, training=(0.1, 0.2, 0.5)),
    Family("AB, order 12", "explicit_adams", (0.005, 0.02, 0.1, 0.5), ONLY, {"order": 12}),
    Family("AM4, PECE", "implicit_adams", (0.1, 0.25, 0.5, 1.0, 2.0), "stable at every step", training=(0.5, 1.0)),
    Family(
        "AM4, iterated",
        "implicit_adams",
        (0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5),
        "stable at every step",
        {"corrector_tol": 1.0, "max_corrections": 100},
        (0.5, 1.0, 1.5),
    ),
)

SOLVED = [
    Column("solver", "solver"),
    Column("step", "step", "number"),
    Column("nfe", "NFE", "count"),
    Column("seconds", "CPU", "seconds"),
    Column("error", "error", "error"),
    Column("accuracy", "test accuracy", "number"),
    Column("ended", "ended"),
    Column("said", "the paper"),
]
TRAINED = [
    Column("solver", "solver"),
    Column("step", "step", "number"),
    Column("forward", "forward NFE", "number"),
    Column("backward", "backward NFE", "number"),
    Column("seconds", "CPU an epoch", "seconds"),
    Column("accuracy", "test accuracy", "number"),
    Column("ended", "ended"),
]


def fit(problem: GrandProblem, linear: bool, epochs: int) -> Model:
    """A model trained through dopri5 with its exact gradient."""
    model = Model(problem)
    fitted(model, Scheme("dopri5", "discrete", "dopri5", {"adjoint": "checkpoint"}, linear=linear), epochs)
    return model.eval()


def forward(model: Model, linear: bool, exact: Tensor | None, method: str, **options: Any) -> dict[str, Any]:
    """One solve of a trained model, with the accuracy that comes of it."""
    with torch.no_grad():
        x = model.encode()
        field = model.field(x, linear)
    one = solved(field, x, END, method=method, **{**within(x, TOLERANCE), **options})
    row: dict[str, Any] = {"nfe": one.nfe, "seconds": one.seconds, "ended": one.ended}
    if one.done:
        row["accuracy"] = accuracies(model, one.y)[1]
        if exact is not None:
            error = relative(one.y, exact)
            row |= {"error": error, "ended": "done" if error < 1 else "diverged"}
    return row


def solves(model: Model, linear: bool, quick: bool) -> Table:
    """Every family and step size on one model."""
    with torch.no_grad():
        x = model.encode()
        field = model.field(x, linear)
    exact = solved(field, x, END, method="dop853", rtol=1e-7, atol=1e-9).y
    rows = [{"solver": "dopri5", **forward(model, linear, exact, "dopri5")}]
    for family in FAMILIES:
        for step in family.steps[2 if quick else 0 :]:
            found = forward(model, linear, exact, family.method, dt=step, **family.options)
            rows.append({"solver": family.label, "step": step, **found, "said": family.said})
    kind = "A of the start" if linear else "A of the state"
    title = f"{model.problem.name}, {kind}, T = {END:g}: one model, trained through dopri5, solved by each"
    return Table(title, SOLVED, rows, [f"error: relative, against dop853 at 1e-7; dopri5 at {TOLERANCE:g}", *verdicts(rows)])


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The largest step of each family that ends within 1 % of the solution, beside the paper's words."""
    lines = []
    for family in FAMILIES:
        own = [row for row in rows if row["solver"] == family.label]
        good = [row["step"] for row in own if row["ended"] == "done" and row["error"] <= 1e-2]
        bad = [row["step"] for row in own if row["step"] not in good]
        text = f"{family.label}: within 1 % at steps {listed(good)}, not at {listed(bad)}; the paper: {family.said}"
        lines.append(text)
    return lines


def listed(steps: list[float]) -> str:
    return ", ".join(f"{step:g}" for step in steps) or "none"


def trained(problem: GrandProblem, label: str, scheme: Scheme, epochs: int) -> dict[str, Any]:
    """A row of one training."""
    run = train(problem, scheme, epochs)
    row: dict[str, Any] = {"solver": label, "step": scheme.options.get("dt"), "ended": run.ended, "accuracy": run.best}
    if run.loss:
        row |= {"forward": statistics.mean(run.forward), "backward": statistics.mean(run.backward)}
        row["seconds"] = statistics.median(run.seconds)
    return row


def trainings(problem: GrandProblem, linear: bool, epochs: int) -> Table:
    """Trained through each solver, from the same start."""
    rows = [trained(problem, "dopri5", Scheme("", "", "dopri5", {"adjoint": "checkpoint"}, linear=linear), epochs)]
    for family in FAMILIES:
        for step in family.training:
            options = {**family.options, "adjoint": "checkpoint", "dt": step}
            rows.append(trained(problem, family.label, Scheme("", "", family.method, options, linear=linear), epochs))
    notes = ["test accuracy at the best validation score; discrete gradients; 20 labels a class, a random split, one seed"]
    return Table(f"{problem.name}: trained through each for {epochs} epochs", TRAINED, rows, notes)


def run(settings: Settings) -> Result:
    """Solve and train; raises BenchmarkError without the data."""
    one_thread(settings, "grand-stepsize counts evaluations and CPU seconds")
    (problem,) = chosen("cora", settings.quick)
    linear = settings.options["variant"] == "l"
    epochs = 3 if settings.quick else settings.options["epochs"]
    model = fit(problem, linear, epochs)
    return Result([solves(model, linear, settings.quick), trainings(problem, linear, epochs)])


def draw(result: Result, path: Path) -> None:
    """Error and accuracy against the step size."""
    from .pictures import figure, save

    drawn, axes = figure(1, 2, figsize=(9, 3.6))
    rows = result.tables[0].rows
    for family in FAMILIES:
        own = [row for row in rows if row["solver"] == family.label and "error" in row]
        for panel, key in zip(axes, ("error", "accuracy")):
            panel.plot([row["step"] for row in own], [row[key] for row in own], "o-", markersize=3, label=family.label)
    axes[0].set_yscale("log")
    axes[1].axhline(rows[0].get("accuracy", 0.0), color="black", linewidth=0.5, label="dopri5")
    for panel, title in zip(axes, ("relative error", "test accuracy, %")):
        panel.set_xscale("log")
        panel.set_xlabel("step size")
        panel.set_title(f"{title}; unstable steps left out", fontsize=9)
    axes[1].legend(fontsize=7)
    save(drawn, path)


BENCHMARKS.add(
    "grand-stepsize",
    Benchmark(
        "grand-stepsize",
        "step size and solvers on Cora: Adams-Bashforth, Adams-Moulton, dopri5 (GRAND, Fig. 3 left)",
        "4 min",
        "15 s",
        run,
        draw,
        takes_peers=False,
        options=(EPOCHS, VARIANTS),
    ),
)
