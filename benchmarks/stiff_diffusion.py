"""The main job: three diffusions by explicit methods, the proximal step, scipy and torchdiffeq, on a time budget."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .peers import Peer
from .problems import DiffusionProblem
from .registry import BENCHMARKS, PEERS, PROBLEMS, Benchmark, BenchmarkError, Column, Result, Settings, Table, unknown
from .running import Ours, Outcome, adaptive_explicit, solve_ours
from .timing import Deadline, Timing, interleaved

__all__ = ["run"]

TOTAL = 65.0  # s for all solvers together; --full lifts it
RESERVE = 4.0  # times its budget, kept for a problem while those before it run
LEAST = 0.3  # s that a solver has in any case
QUICK_BUDGET = 2.0  # s for one solver with --quick
REPEATS = 3
SLACK = 5.0  # s that must be left of a problem's share for a solver to be timed again
ENOUGH = 0.7  # s after which a solver is not timed again
FEW = ("dopri5", "bosh3", "adaptive_heun")
STIFF = ("prox_bdf", "rkc2", "rock4", "prox_bdf2", "prox_cn")
"""Beside ``prox_euler``, which has all step counts of a problem; these have one, where they do not choose their steps."""

COLUMNS = [
    Column("solver", "solver"),
    Column("evaluations", "evaluations", "count"),
    Column("accepted", "accepted", "count"),
    Column("rejected", "rejected", "count"),
    Column("time", "time", "seconds"),
    Column("runs", "runs", "count"),
    Column("error", "error", "error"),
    Column("share", "of scale", "percent"),
    Column("drift", "mean moved by", "error"),
    Column("ratio", "time: 1st peer / this"),
    Column("ended", "ended"),
]


def methods_for(problem: DiffusionProblem, settings: Settings) -> list[Ours]:
    """Our solvers for `problem`: explicit ones by tolerance, proximal ones at its step counts and by tolerance."""
    from solvers.methods import METHODS

    usual = ["prox_euler", *FEW, *STIFF]
    if problem.name.startswith("terrain") and settings.full:
        usual += [name for name in adaptive_explicit() if name not in usual]
    names = settings.methods if settings.methods is not None else usual
    chosen: list[Ours] = []
    for name in names:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
        adaptive = METHODS[name].error_order is not None
        fixed = (METHODS[name].implicit and not METHODS[name].variable_order) or not adaptive
        steps = problem.steps[1:2] if name in STIFF else problem.steps[::2] if settings.quick else problem.steps
        chosen += [Ours(name, count) for count in steps] if fixed else []
        chosen += [Ours(name)] if adaptive else []
    return chosen


def peers_for(problem: DiffusionProblem, settings: Settings) -> list[Peer]:
    """The peers asked for, or all that can take a problem of this size."""
    chosen = PEERS.choose(settings.peers)
    return [peer for peer in chosen if peer.fits(problem)]


class Allowance:
    """Hands each solve its budget: less when one problem's share of the `total` seconds runs out.

    `reserved` seconds are kept for the problems that follow, so that a slow machine shortens every problem's tail
    and none is starved.
    """

    def __init__(self, total: float, problems: Sequence[DiffusionProblem]) -> None:
        self.end = time.perf_counter() + total
        self.later = {
            problem.name: RESERVE * sum(after.budget for after in problems[place + 1 :]) for place, problem in enumerate(problems)
        }

    def left(self, problem: DiffusionProblem) -> float:
        """Seconds that `problem` may still use."""
        return self.end - self.later[problem.name] - time.perf_counter()

    def deadline(self, problem: DiffusionProblem, budget: float) -> Deadline:
        return Deadline(max(LEAST, min(budget, self.left(problem))))


def measure(problem: DiffusionProblem, settings: Settings, allowance: Allowance) -> tuple[Table, dict[str, Timing]]:
    """Run every solver on `problem` and tabulate them."""
    budget = QUICK_BUDGET if settings.quick else problem.budget
    cases: dict[str, Callable[[], Outcome]] = {}
    peers = peers_for(problem, settings)
    present = [peer for peer in peers if not peer.absent]
    for peer in present:
        cases[peer.name] = partial(lambda peer: peer.attempt(problem, allowance.deadline(problem, budget)), peer)
    for ours in methods_for(problem, settings):
        cases[ours.label] = partial(lambda ours: solve_ours(problem, ours, allowance.deadline(problem, budget)), ours)
    timings = interleaved(
        cases,
        1 if settings.quick else REPEATS,
        ENOUGH,
        warm=False,
        device=settings.device,
        more=lambda: allowance.left(problem) > SLACK,
    )
    first = present[0].name if present else None
    table = Table(problem.title, COLUMNS)
    for name, timing in timings.items():
        table.rows.append(row(problem, name, timing, None if first in (None, name) else timings[first]))
    absent = [peer for peer in peers if peer.absent]
    table.rows += [{"solver": peer.name, "ended": "absent"} for peer in absent]
    table.notes = [
        *problem.notes,
        f"tolerances {problem.rtol:g} relative, {problem.atol:g} absolute; {budget:g} s for one solver",
    ]
    table.notes += [f"{peer.name}: {peer.absent}" for peer in absent]
    table.notes += findings(problem, table.rows)
    return table, timings


def row(problem: DiffusionProblem, name: str, timing: Timing, first: Timing | None) -> dict[str, Any]:
    """One solver's line."""
    outcome: Outcome = timing.value
    line: dict[str, Any] = {
        "solver": name,
        "evaluations": outcome.evaluations,
        "accepted": outcome.accepted,
        "rejected": outcome.rejected,
        "time": timing.median_wall,
        "runs": len(timing.wall),
        "ended": outcome.ended,
    }
    if outcome.y is not None:
        line["error"] = problem.error(outcome.y)
        line["drift"] = problem.drift(outcome.y)
        if problem.scale and line["error"] is not None:
            line["share"] = 100 * line["error"] / problem.scale
        if first is not None:
            more = "> " if first.value.y is None else ""
            line["ratio"] = f"{more}{first.median_wall / timing.median_wall:.2g}"
    return line


def findings(problem: DiffusionProblem, rows: list[dict[str, Any]]) -> list[str]:
    """What the table says: the proximal step's work against the explicit methods', and what happened to the mean."""
    from solvers.methods import METHODS

    notes = []
    drifts = [line["drift"] for line in rows if "drift" in line]
    if drifts:
        notes.append(f"the mean is conserved: it moved by at most {max(drifts):.1e} (relative) in any solver that finished")
    limited = {name for name in adaptive_explicit() if METHODS[name].real_limit != math.inf}  # stabilised ones are not
    explicit = [line for line in rows if line["solver"] in limited]
    others = [line for line in explicit if line["ended"] == "done"]
    good = [line for line in rows if line["solver"].startswith("prox_euler") and line.get("share", 100.0) < 1]
    if others and good:
        best = min(good, key=lambda line: line["evaluations"])
        least = min(others, key=lambda line: line["evaluations"])
        notes.append(
            f"{best['solver']}: {best['evaluations']:,} evaluations, error {best['share']:.2g} % of the scale; "
            f"explicit adaptive methods, which stability limits, took {least['evaluations'] / best['evaluations']:.2g} times as "
            f"many or more ({least['solver']} the fewest; {len(explicit) - len(others)} of {len(explicit)} were stopped)"
        )
    return notes


def to_device(problem: DiffusionProblem, device: str) -> DiffusionProblem:
    return problem if device == "cpu" else replace(problem, y0=problem.y0.to(device))


def run(settings: Settings) -> Result:
    """Measure every problem; raises UnknownName, MissingExtra, BenchmarkError."""
    torch.set_num_threads(1)
    names = list(settings.problems or (("line", "terrain") if settings.quick else PROBLEMS))
    problems = [to_device(PROBLEMS[name](full=settings.full), settings.device) for name in names]
    for problem in problems:  # wrong names end the run before any work
        if not methods_for(problem, settings) and not peers_for(problem, settings):
            raise BenchmarkError("no solver is left to run; name one in --methods or --peers")
    allowance = Allowance(float("inf") if settings.full else TOTAL, problems)
    result = Result([])
    for problem in problems:
        table, timings = measure(problem, settings, allowance)
        result.tables.append(table)
        result.arrays[problem.name] = (problem, {name: timing.value.y for name, timing in timings.items()})
    result.data["units"] = {problem.name: problem.unit for problem in problems}
    return result


def draw(result: Result, path: Path) -> None:
    """Before and after of every problem, above its work-precision plot."""
    from .pictures import draw_main_job

    draw_main_job(result, path)


BENCHMARKS.add(
    "stiff-diffusion",
    Benchmark(
        "stiff-diffusion",
        "the main job: a line, a real terrain and a photograph, diffused",
        "50 to 80 s (--full: 6 min)",
        "20 s",
        run,
        draw,
    ),
)
