"""Sparsity against time and accuracy on Cora (Chamberlain et al. 2021, Fig. 3 right): GDC's K heaviest edges of each node."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from graphops.rewire import PageRank, gdc

from .grand_problems import END, GrandProblem, chosen
from .grand_stepsize import EPOCHS, VARIANTS, fit, forward
from .graph_problems import tidy
from .registry import BENCHMARKS, Benchmark, Column, Result, Settings, Table
from .timing import one_thread

__all__ = ["rewired_problem", "run"]

KEPT = (2, 4, 8, 16, 32, 64, 128)
SOLVERS = {
    "AB4, 0.005": ("explicit_adams", {"dt": 0.005}),
    "AM4, 1.0": ("implicit_adams", {"dt": 1.0, "corrector_tol": 1.0, "max_corrections": 100}),
    "dopri5": ("dopri5", {}),
}
"""With the paper's step sizes."""
REPEATS = 3

COLUMNS = [
    Column("kept", "K"),
    Column("edges", "edges", "count"),
    *(Column(f"time {name}", f"CPU, {name}", "seconds") for name in SOLVERS),
    Column("nfe", "NFE of AM4", "count"),
    *(Column(f"accuracy {name}", f"test, {name}", "number") for name in SOLVERS),
]


def rewired_problem(problem: GrandProblem, kept: int) -> GrandProblem:
    """The same nodes with the K heaviest edges of PageRank into each, and a loop."""
    graph = gdc(problem.graph.remove_self_loops(), PageRank(), k=kept).with_weight(None)
    return replace(problem, graph=tidy(graph))


def measured(problem: GrandProblem, kept: str, linear: bool, epochs: int, quick: bool) -> dict[str, Any]:
    """A row: one model is trained, and solved by each solver; the least of some times."""
    model = fit(problem, linear, epochs)
    row: dict[str, Any] = {"kept": kept, "edges": problem.graph.num_edges}
    for name, (method, options) in SOLVERS.items():
        if quick and method == "explicit_adams":
            options = {"dt": 0.1}
        found = [forward(model, linear, None, method, **options) for _ in range(1 if quick else REPEATS)]
        row[f"time {name}"] = min(one["seconds"] for one in found)
        row[f"accuracy {name}"] = found[0].get("accuracy")
        if method == "implicit_adams":
            row["nfe"] = found[0]["nfe"]
    return row


def findings(rows: list[dict[str, Any]]) -> list[str]:
    """The paper's two claims, by these numbers."""
    sparse, dense = rows[0], rows[-2]
    lines = []
    for name in SOLVERS:
        ratio = dense[f"time {name}"] / sparse[f"time {name}"]
        lines.append(f"{name}: {ratio:.2g} times faster at K = {sparse['kept']} than at K = {dense['kept']}")
    scores = {row["kept"]: row["accuracy dopri5"] for row in rows if row.get("accuracy dopri5") is not None}
    text = ", ".join(f"{kept}: {score:.1f}" for kept, score in scores.items())
    lines.append(f"test accuracy by K: {text}; the paper: similar from K = 8 on, and below a drop")
    return lines


def run(settings: Settings) -> Result:
    """Rewire, train, solve; raises BenchmarkError without the data."""
    one_thread(settings, "grand-sparsity measures CPU seconds")
    (problem,) = chosen("cora", settings.quick)
    linear = settings.options["variant"] == "l"
    epochs = 2 if settings.quick else settings.options["epochs"]
    rows = []
    for kept in KEPT[1:4] if settings.quick else KEPT:
        rows.append(measured(rewired_problem(problem, kept), f"{kept}", linear, epochs, settings.quick))
    rows.append(measured(problem, "as given", linear, epochs, settings.quick))
    kind = "A of the start" if linear else "A of the state"
    title = f"{problem.name}, {kind}, T = {END:g}: the K heaviest edges of PageRank into each node"
    notes = [
        f"trained through dopri5 for {epochs} epochs, one seed, a random split with 20 labels a class; test accuracy at the end",
        *findings(rows),
    ]
    return Result([Table(title, COLUMNS, rows, notes)])


def draw(result: Result, path: Path) -> None:
    """Time and accuracy against K."""
    from .pictures import figure, save

    rows = [row for row in result.tables[0].rows if row["kept"] != "as given"]
    drawn, axes = figure(1, 2, figsize=(9, 3.6))
    kept = [int(row["kept"]) for row in rows]
    for name in SOLVERS:
        axes[0].loglog(kept, [row[f"time {name}"] for row in rows], "o-", markersize=3, label=name)
    axes[1].semilogx(kept, [row["accuracy dopri5"] for row in rows], "o-", markersize=3)
    for panel, title in zip(axes, ("CPU seconds of a solve", "test accuracy, %")):
        panel.set_xlabel("K")
        panel.set_title(title, fontsize=9)
    axes[0].legend(fontsize=7)
    save(drawn, path)


BENCHMARKS.add(
    "grand-sparsity",
    Benchmark(
        "grand-sparsity",
        "sparsity of the graph against time and accuracy on Cora (GRAND, Fig. 3 right)",
        "5 min",
        "15 s",
        run,
        draw,
        takes_peers=False,
        options=(EPOCHS, VARIANTS),
    ),
)
