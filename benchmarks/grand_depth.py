"""Accuracy and Dirichlet energy against depth: GRAND by Runge-Kutta steps of 1, GCN, and GCN with residual connections."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .citation_models import GRAND, LAYERED
from .citation_training import Job, Run, campaign, protocol, spread, summary
from .grand import OPTIONS, ledger_of
from .grand_pp import counts
from .published import DEPTH
from .registry import BENCHMARKS, Benchmark, Column, Option, Result, Settings, Table, positive
from .timing import one_thread

__all__ = ["run"]

COLUMNS = [
    Column("model", "model"),
    Column("depth", "depth", "count"),
    Column("mean", "test %", "number"),
    Column("deviation", "±", "number"),
    Column("printed", "published"),
    Column("difference", "difference", "number"),
    Column("energy", "energy", "error"),
    Column("seconds", "CPU a run", "seconds"),
    Column("status", "failed runs"),
]
CLAIMS = [Column("model", "model"), Column("shallow", "best up to 4", "number"), Column("deep", "at the deepest", "number"),
          Column("loss", "lost", "number"), Column("claim", "claim"), Column("verdict", "holds")]  # fmt: skip
DEPTHS = (1, 2, 4, 8, 16, 32)
MODELS = ("GRAND-l", "GCN", "GCN, residual")
EPOCHS = 100
OWN = (
    Option("depths", "T of GRAND, layers of GCN, in place of 1, 2, 4, ..., 32", DEPTHS, counts),
    Option("seeds", "random splits, from 0 on", 3, positive),
)


def jobs_of(settings: Settings, model: str, depth: int) -> list[Job]:
    """A job for each split: RK4 with steps of 1 to T = depth, or so many layers."""
    options = settings.options
    dataset, epochs = options["dataset"], options["epochs"] or (2 if settings.quick else EPOCHS)
    if model == "GRAND-l":
        recipe = replace(GRAND[dataset], time=float(depth), epochs=epochs)
        name, chosen = "grand-l", {"method": "rk4", "num_steps": depth}
    else:
        recipe = replace(LAYERED["gcn"], layers=depth, epochs=epochs)
        name, chosen = "gcn", {"residual": model != "GCN"}
    common: tuple[Any, ...] = (name, options["graph"], "random", 20, options["norm"], recipe, chosen)
    return [Job(dataset, seed, *common) for seed in range(1 if settings.quick else options["seeds"])]


def run(settings: Settings) -> Result:
    """All models at all depths."""
    one_thread(settings, "grand-depth trains on the CPU")
    options, ledger = settings.options, ledger_of(settings, "grand-depth")
    depths = options["depths"][:2] if settings.quick else options["depths"]
    about = protocol(jobs_of(settings, MODELS[0], depths[0])[0])
    print(about)
    table = Table(f"accuracy and energy against depth, {about}", COLUMNS)
    for model in MODELS:
        for depth in depths:
            jobs = jobs_of(settings, model, depth)
            table.rows.append(row(model, depth, jobs[0], campaign(jobs, ledger)))
    table.notes = [
        "depth: T of GRAND by RK4 with steps of 1 (GRAND Fig. 2), layers of GCN",
        "energy: Dirichlet energy of x / sqrt(1 + d), x the last hidden state, over |x|^2 (Cai & Wang 2020); 0: all nodes alike",
        "published: Xia 2023, Table 4.1, GRAND-l by dopri5; GRAND's own figure has no numbers",
    ]
    tables = [table] if max(depths) <= 4 or min(depths) > 4 else [table, claims(table)]
    return Result(tables, {"recipes": {model: asdict(jobs_of(settings, model, depths[0])[0]) for model in MODELS}})


def row(model: str, depth: int, job: Job, runs: list[Run]) -> dict[str, Any]:
    """A line of the table."""
    told = None if "residual" in model else DEPTH[f"{job.model} {job.dataset}"].get(depth)
    return {"model": model, "depth": depth, **summary(runs, told), "energy": spread(run.energy for run in runs)[0]}


def claims(table: Table) -> Table:
    """What GRAND's section 6.2 says of depth, and whether it is so here."""
    found = Table("what the paper says of depth", CLAIMS)
    for model in MODELS:
        lines = [line for line in table.rows if line["model"] == model]
        shallow = max(line["mean"] for line in lines if line["depth"] <= 4)
        deep = lines[-1]["mean"]
        loses = model != "GRAND-l"
        lost = shallow - deep
        holds = lost >= 30 if loses else lost <= 3
        claim = "loses about 50 points" if loses else "keeps its accuracy (3 points)"
        found.rows.append(
            {"model": model, "shallow": shallow, "deep": deep, "loss": lost, "claim": claim, "verdict": "yes" if holds else "no"}
        )
    return found


def draw(result: Result, path: Path) -> None:
    """Accuracy, and energy, against depth."""
    from .pictures import figure, save

    drawn, (left, right) = figure(1, 2, figsize=(9, 3.8))
    for model in MODELS:
        lines = [line for line in result.tables[0].rows if line["model"] == model]
        depths = [line["depth"] for line in lines]
        left.errorbar(depths, [line["mean"] for line in lines], [line["deviation"] for line in lines], fmt="o-", label=model)
        right.plot(depths, [line["energy"] for line in lines], "o-", label=model)
    left.set_ylabel("test accuracy, %")
    right.set_ylabel("Dirichlet energy / squared norm")
    right.set_yscale("log")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("T, or layers")
    left.legend(fontsize=8)
    save(drawn, path)


BENCHMARKS.add(
    "grand-depth",
    Benchmark(
        "grand-depth",
        "GRAND, GCN and residual GCN against depth: accuracy and Dirichlet energy",
        "12 min",
        "10 s",
        run,
        draw,
        takes_peers=False,
        options=(*OPTIONS, *OWN),
    ),
)
