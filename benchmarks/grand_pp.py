"""GRAND++ on Cora and CiteSeer: with a source and without, by depth T and by labels per class, on the same splits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from graphops.nn import SOURCES

from .citation_models import GRAND, WORDS, solver
from .citation_training import Job, Run, campaign, protocol, spread
from .grand import OPTIONS, ledger_of
from .published import DEPTH, LABELS, NONLINEAR_DEPTH, NONLINEAR_LABELS
from .registry import BENCHMARKS, Benchmark, Column, Option, Result, Settings, Table, names, positive
from .timing import one_thread

__all__ = ["Cell", "cells_of", "paired", "run"]

COLUMNS = [
    Column("cell", "T, labels"),
    Column("plain", "GRAND, %"),
    Column("plain_printed", "published"),
    Column("plain_difference", "diff.", "number"),
    Column("sourced", "GRAND++, %"),
    Column("sourced_printed", "published"),
    Column("sourced_difference", "diff.", "number"),
    Column("gain", "gain"),
    Column("printed_gain", "published", "number"),
    Column("wins", "wins"),
    Column("p", "p", "error"),
    Column("nfe", "NFE"),
    Column("nfe_backward", "backwards"),
    Column("status", "status"),
    Column("bar", "bar"),
    Column("verdict", "verdict"),
]
RUNS = [
    Column("cell", "T, labels"),
    Column("model", "model"),
    Column("seed", "split", "count"),
    Column("test_accuracy", "test %", "number"),
    Column("val_accuracy", "validation %", "number"),
    Column("epoch", "at epoch", "count"),
    Column("nfe", "NFE", "number"),
    Column("nfe_backward", "backwards", "number"),
    Column("cpu_seconds", "CPU", "seconds"),
    Column("status", "status"),
]
TIMES = (1.0, 4.0, 16.0, 32.0, 64.0, 128.0, 256.0)
RATES = (1, 2, 5, 10, 20)
EPOCHS = {"l": 80, "nl": 20, "nl-rw": 20}
SPLITS = {"l": 5, "nl": 2, "nl-rw": 2}
STIFF = 100.0
"""From this T on the rest state is long reached and stability alone bounds the steps of dopri5: on Cora at T = 256 it takes 387
evaluations forwards and 360 backwards, rkc2 142 and 183, both within 1.3e-4 of the solution."""
TABLES = {"l": "4.1 (by T) and 4.3 (by labels)", "nl": "4.9 and 4.10", "nl-rw": "4.9 and 4.10"}
BARS = {(18.294754260552843, 5): (1.0, 0.0), (128.0, 20): (2.0, 79.5)}
"""By T and labels, of GRAND-l with beta x(0) on Cora: least gain, and least accuracy with the source."""


def numbers(text: str) -> tuple[float, ...]:
    """Positive numbers, comma-separated; raises ValueError."""
    found = tuple(map(float, names(text)))
    if not found or min(found) <= 0:
        raise ValueError("must be numbers above 0, separated by commas")
    return found


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers from 1, comma-separated; raises ValueError."""
    return tuple(map(positive, names(text)))


OWN = (
    Option("source", "x0 (beta x(0)), degree or printed (the trusted nodes')", "x0", choices=tuple(SOURCES)),
    Option("times", "depths T, with 20 labels per class, in place of 1, 4, ..., 256", None, numbers),
    Option("labels", "labels per class, at the recipe's T, in place of 1, 2, 5, 10, 20", None, counts),
    Option("splits", "random splits, from 0 on", None, positive),
    Option("beta", "where the learned factor of the source starts, in place of 0 (x0) and 1", None, float),
    Option("patience", "epochs without a better validation score that end a run, in place of all of them", None, positive),
)


@dataclass(frozen=True)
class Cell:
    """One place of the tables: T and labels per class."""

    time: float
    labels: int

    @property
    def name(self) -> str:
        return f"T = {self.time:.4g}, {self.labels}"


def cells_of(settings: Settings) -> list[Cell]:
    """By depth, then by labels, none twice."""
    options, quick = settings.options, settings.quick
    times, rates = options["times"], options["labels"]
    if times is None:
        times = () if rates else (1.0,) if quick else TIMES
    if rates is None:
        rates = () if options["times"] else (5,) if quick else RATES
    recipe_time = GRAND[options["dataset"]].time
    cells = [Cell(time, 20) for time in times] + [Cell(recipe_time, n) for n in rates]  # type: ignore[arg-type]
    return list(dict.fromkeys(cells))


def jobs_of(settings: Settings, cell: Cell, source: str | None) -> list[Job]:
    """A job for each split of a cell."""
    options = settings.options
    variant = options["variant"]
    splits = options["splits"] or (1 if settings.quick else 20 if settings.full else SPLITS[variant])
    epochs = options["epochs"] or (2 if settings.quick else EPOCHS[variant])
    recipe = replace(GRAND[options["dataset"]], time=cell.time, epochs=epochs, patience=options["patience"])
    method = settings.methods[0] if settings.methods else "rkc2" if variant != "l" and cell.time > STIFF else None
    chosen = {"source": source, **solver(variant, method)}
    if source is not None and options["beta"] is not None:
        chosen["beta"] = options["beta"]
    if chosen["method"] == "exp_linear" and cell.time > 100:
        chosen["krylov_dim"] = 200  # uniformisation in one step; it needs no more products than it uses
    if chosen["method"] != "exp_linear" and cell.time > 40:
        chosen["adjoint"] = "checkpoint"  # the graph of a thousand evaluations would take gigabytes
    common = (f"grand-{variant}", options["graph"], "random", cell.labels, options["norm"], recipe, chosen)
    return [Job(options["dataset"], seed, *common) for seed in range(splits)]


def printed(variant: str, dataset: str, cell: Cell, plus: bool) -> Any:
    """What the thesis prints for a cell: a pair, "failed" where its solver did, or None."""
    name = f"grand{'++' if plus else ''}-{variant} {dataset}"
    depths, labels = (DEPTH, LABELS) if variant == "l" else (NONLINEAR_DEPTH, NONLINEAR_LABELS)
    if cell.time == GRAND[dataset].time:
        return labels.get(name, {}).get(cell.labels)
    known = depths.get(name, {})
    if cell.time in known:
        return known[int(cell.time)] or "failed"
    return "failed" if known and cell.time > max(known) else None


def paired(plain: list[float], sourced: list[float]) -> tuple[float, float, int, float | None]:
    """Mean and standard deviation of the gain on the same splits, how often it is above 0, and p of a two-sided t-test."""
    from scipy.stats import ttest_rel

    gains = [after - before for before, after in zip(plain, sourced)]
    p = float(ttest_rel(sourced, plain).pvalue) if len(set(gains)) > 1 else None
    return *spread(gains), sum(gain > 0 for gain in gains), p


def run(settings: Settings) -> Result:
    """Both models in every cell, on the same splits from the same start."""
    one_thread(settings, "grand-pp trains on the CPU")
    options, ledger = settings.options, ledger_of(settings, "grand-pp")
    variant, dataset, source = options["variant"], options["dataset"], options["source"]
    cells = cells_of(settings)
    about = protocol(jobs_of(settings, cells[0], None)[0])
    print(about)
    table = Table(f"GRAND-{variant} and GRAND++-{variant} ({source}) on {dataset}", COLUMNS)
    every = Table("every run", RUNS)
    for cell in cells:
        jobs = {source: jobs_of(settings, cell, source) for source in (None, source)}
        runs = {source: campaign(of_source, ledger) for source, of_source in jobs.items()}
        table.rows.append(row(settings, cell, runs[None], runs[source]))
        for name, model in ((None, f"grand-{variant}"), (source, f"grand++-{variant}")):
            found = zip(jobs[name], runs[name])
            every.rows += [{"cell": cell.name, "model": model, "seed": job.seed, **asdict(run)} for job, run in found]
    patience = f", until {options['patience']} epochs bring no better one" if options["patience"] else ""
    table.notes = [
        f"{about}; attention {WORDS[options['norm']]}",
        "± is the sample standard deviation over splits; gain, wins and p (paired t-test, two-sided) are of the same splits",
        f"at the epoch of the best validation score{patience}",
        f"published: Xia 2023, Tables {TABLES[variant]}",
        "NFE, backwards: median of an epoch of the first split, GRAND / GRAND++",
        "failed: the thesis has no number because its solver did not finish; here status says how ours ended",
    ]
    return Result([table, every], {"recipe": asdict(jobs_of(settings, cells[0], source)[0])})


def row(settings: Settings, cell: Cell, plain: list[Run], sourced: list[Run]) -> dict[str, Any]:
    """A line of the table."""
    variant, dataset, source = (settings.options[name] for name in ("variant", "dataset", "source"))
    line: dict[str, Any] = {"cell": cell.name}
    means = {}
    for name, runs, plus in (("plain", plain, False), ("sourced", sourced, True)):
        mean, deviation = spread(run.test_accuracy for run in runs)
        told = means[name] = printed(variant, dataset, cell, plus)
        line[name] = f"{mean:.2f} ± {deviation:.2f}"
        line[f"{name}_printed"] = told if told is None or told == "failed" else f"{told[0]} ± {told[1]}"
        line[f"{name}_difference"] = None if told is None or told == "failed" else round(mean - told[0], 2)
    gain, deviation, wins, p = paired([r.test_accuracy for r in plain], [r.test_accuracy for r in sourced])
    failed = [r.status for r in (*plain, *sourced) if r.status != "done"]
    line |= {
        "gain": f"{gain:+.2f} ± {deviation:.2f}",
        "wins": f"{wins} of {len(plain)}",
        "p": p,
        "status": failed[0] if failed else "done",
    }
    for count in ("nfe", "nfe_backward"):
        found = (getattr(runs[0], count) for runs in (plain, sourced))
        line[count] = " / ".join("-" if n is None else f"{n:g}" for n in found)
    if all(isinstance(told, tuple) for told in means.values()):
        line["printed_gain"] = round(means["sourced"][0] - means["plain"][0], 2)
    bar = BARS.get((cell.time, cell.labels)) if (variant, dataset, source) == ("l", "cora", "x0") else None
    if bar is not None:
        met = gain >= bar[0] and spread(r.test_accuracy for r in sourced)[0] >= bar[1]
        line["bar"] = f"gain {bar[0]:g}" + (f", {bar[1]:g} %" if bar[1] else "")
        line["verdict"] = "met" if met else "SHORT"
    return line


def draw(result: Result, path: Path) -> None:
    """Mean accuracy of both by cell, with what is printed."""
    from .pictures import figure, save

    rows = result.tables[0].rows
    drawn, axes = figure(figsize=(1.5 + 0.9 * len(rows), 4.2))
    for key, colour, label in (("plain", "tab:gray", "GRAND"), ("sourced", "tab:green", "GRAND++")):
        axes.plot([float(line[key].split()[0]) for line in rows], "o", color=colour, label=label)
        told = [line[f"{key}_printed"] for line in rows]
        places = [place for place, text in enumerate(told) if text and text != "failed"]
        published = [float(told[place].split()[0]) for place in places]
        axes.plot(places, published, "_", color=colour, markersize=18, label=f"{label}, published")
    axes.set_xticks(range(len(rows)), [line["cell"] for line in rows], rotation=45, ha="right", fontsize=8)
    axes.set_ylabel("test accuracy, %")
    axes.legend(fontsize=8)
    save(drawn, path)


BENCHMARKS.add(
    "grand-pp",
    Benchmark(
        "grand-pp",
        "GRAND++ against GRAND by depth and labels per class, paired splits, every cell of the thesis' tables",
        "12 min (l), 20 min (nl)",
        "10 s",
        run,
        draw,
        takes_peers=False,
        options=(*(replace(o, default="row") if o.name == "norm" else o for o in OPTIONS), *OWN),
    ),
)
