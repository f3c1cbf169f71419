"""Work and precision on stiff problems: ours, scipy, CVODE and torchdiffeq, and the figures that have to be reached."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .peers import Peer, sundae_cvode
from .registry import BENCHMARKS, PEERS, Benchmark, BenchmarkError, Column, Result, Settings, Table, unknown
from .running import Ours, Outcome, solve_ours
from .stiff_problems import LARGE, STIFF, StiffProblem
from .timing import Deadline, Timing, interleaved, one_thread, peak_memory

__all__ = ["ADAPTIVE", "Case", "run"]

ADAPTIVE = ("prox_bdf", "auto", "rkc2", "rock4", "esdirk547", "radauIIA5", "exp_linear")
"""Our methods that choose their steps."""
FIXED = ("prox_euler", "prox_cn", "prox_bdf2", "prox_bdf4")
SINGLE = ("prox_bdf", "rkc2", "auto")
"""What is run in single precision, too."""
DENSE, MATRIX_FREE = ("scipy-bdf", "scipy-radau", "scipy-lsoda", "cvode-dense"), ("scipy-bdf", "cvode-gmres")
EXPLICIT = "torchdiffeq-dopri5"

TOLERANCES = (1e-3, 1e-5, 1e-7)
FINER = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
USUAL = 1e-5
LOOSE = 1e-4  # of single precision
QUICK = ("robertson", "diff1d_128")
QUICK_BUDGET = 2.0  # s for one solver
REPEATS = 3
ENOUGH = 1.0  # s after which a solver is not timed again
WRONG = 5e-3  # error that single precision may have
BEYOND_SINGLE = {"e5": "rates that cancel to 1e-7 of their size leave rounding errors of 5 % of the state in an implicit step"}
"""Why a problem is not for single precision."""

COLUMNS = [
    Column("solver", "solver"),
    Column("tolerance", "tolerance", "error"),
    Column("evaluations", "evaluations", "count"),
    Column("error", "error", "error"),
    Column("time", "CPU time", "seconds"),
    Column("runs", "runs", "count"),
    Column("faster", "dopri5's time / this"),
    Column("ended", "ended"),
]
SINGLES = [
    Column("problem", "problem"),
    Column("solver", "solver, float32"),
    Column("tolerance", "tolerance", "error"),
    Column("evaluations", "evaluations", "count"),
    Column("error", "error", "error"),
    Column("verdict", "error <= 5e-3, or why not"),
]

JUDGED = {(name, "prox_bdf"): (1e-6,) for name in ("robertson", "hires", "orego", "vdp1000")}
"""Further tolerances that a bar is set for."""
MEMORY = [
    Column("solver", "solver"),
    Column("megabytes", "peak", "megabytes"),
    Column("states", "peak, states", "number"),
    Column("stated", "held at calls of f, states", "count"),
]
HUGE = ("heat3d_100",)
STATES = {"rkc2": 12, "prox_bdf": 30}
"""States that a method holds at most while f is called; the tests hold the methods to it."""
GMRES200 = Peer("cvode-gmres200", "sksundae", "peers", sundae_cvode(linsolver="gmres", krylov_dim=200))

KRYLOV = Ours("prox_bdf", variant="Newton-Krylov", options={"inner": "newton_krylov"})
SEARCH = Ours("prox_bdf", variant="FR, line search", options={"inner": "fletcher_reeves", "rate": "line_search"})
VARIANTS: dict[str, tuple[Ours, ...]] = {"diff1d_128": (KRYLOV, SEARCH)}
"""Other inner solvers, on the problems where they are compared."""


@dataclass(frozen=True)
class Case:
    """One solver on one problem at one tolerance (None: fixed steps)."""

    solver: str
    tolerance: float | None
    run: Callable[[], Outcome]
    ours: bool = True

    @property
    def label(self) -> str:
        return self.solver if self.tolerance is None else f"{self.solver} {self.tolerance:g}"


Found = dict[tuple[str, str, float | None], dict[str, Any]]
"""Lines of the tables by problem, solver and tolerance."""


def processor(seconds: float) -> Deadline:
    """A budget of this process's CPU time: what a loaded machine stops is what an idle one does."""
    return Deadline(seconds, time.process_time)


def serves(name: str, problem: StiffProblem) -> bool:
    """Whether a method of ours is for this problem."""
    from solvers.methods import METHODS

    if problem.solvers is not None and name not in problem.solvers:
        return False
    if METHODS[name].demands is not None and not hasattr(problem.field, "matvec"):
        return False
    return problem.real or name not in ("rkc2", "rock4")


def attempt(problem: StiffProblem, ours: Ours, deadline: Deadline) -> Outcome:
    """``solve_ours``, a refusal told in the table."""
    from solvers.status import ProxodeError

    try:
        return solve_ours(problem, ours, deadline)
    except ProxodeError as error:
        return Outcome(None, 0, failed=str(error))


def our_cases(problem: StiffProblem, settings: Settings, tolerances: tuple[float, ...], budget: float) -> list[Case]:
    """Adaptive methods at every tolerance, and at their step counts those of fixed step."""
    names = settings.methods or (*ADAPTIVE, *FIXED)
    chosen = [Ours(name) for name in names if name in ADAPTIVE or name not in FIXED]
    chosen = [ours for ours in chosen if serves(ours.method, problem)]
    chosen += [ours for ours in VARIANTS.get(problem.name, ()) if ours.method in names]
    cases = []
    for ours in chosen:
        judged = () if settings.quick else JUDGED.get((problem.name, ours.label), ())
        for tolerance in sorted({*tolerances, *judged}, reverse=True):
            cases.append(Case(ours.label, tolerance, partial(attempt, problem.at(tolerance), ours, processor(budget))))
    steps = () if settings.quick and settings.methods is None else problem.steps
    fixed = [Ours(name, count, options={"energy": False}) for name in names if name in FIXED for count in steps]
    return cases + [Case(ours.label, None, partial(attempt, problem.at(USUAL), ours, processor(budget))) for ours in fixed]


def peer_cases(problem: StiffProblem, settings: Settings, tolerances: tuple[float, ...], budget: float) -> list[Case]:
    """Other packages' solvers; torchdiffeq's where it gets through, at one tolerance."""
    named = settings.peers if settings.peers is not None else (EXPLICIT, *(MATRIX_FREE if problem.real else DENSE))
    peers = [*PEERS.choose(named), *([GMRES200] if settings.peers is None else [])]
    cases = []
    for peer in peers:
        if peer.absent or not peer.fits(problem) or (peer.name == EXPLICIT and not problem.mild):
            continue
        if peer.name not in (problem.solvers or named):
            continue
        for tolerance in (USUAL,) if peer.name == EXPLICIT else tolerances:
            cases.append(Case(peer.name, tolerance, partial(peer.attempt, problem.at(tolerance), processor(budget)), False))
    return cases


def line(problem: StiffProblem, case: Case, timing: Timing) -> dict[str, Any]:
    outcome: Outcome = timing.value
    found: dict[str, Any] = {
        "problem": problem.name,
        "solver": case.solver,
        "ours": case.ours,
        "tolerance": case.tolerance,
        "evaluations": outcome.evaluations,
        "time": timing.median_cpu,
        "runs": len(timing.wall),
        "ended": outcome.ended,
    }
    if outcome.y is not None:
        found["error"] = problem.error(outcome.y)
    return found


def compared(lines: list[dict[str, Any]]) -> None:
    """How many times faster than torchdiffeq's dopri5 each line is, in place."""
    explicit = next((found for found in lines if found["solver"] == EXPLICIT), None)
    for found in lines:
        if explicit is None or found is explicit or "error" not in found:
            continue
        more = "" if "error" in explicit else "> "
        found["faster"] = f"{more}{explicit['time'] / found['time']:.3g}"


def measure(problem: StiffProblem, settings: Settings) -> Table:
    """Every solver on one problem."""
    tolerances: tuple[float, ...] = FINER if settings.full else TOLERANCES[:2] if settings.quick else TOLERANCES
    if problem.solvers is not None:
        tolerances = (USUAL if problem.y0.dtype == torch.float64 else LOOSE,)
    budget = QUICK_BUDGET if settings.quick else problem.budget
    cases = our_cases(problem, settings, tolerances, budget) + peer_cases(problem, settings, tolerances, budget)
    if not cases:
        raise BenchmarkError(f"no solver is left to run on {problem.name}; name one in --methods or --peers")
    runs = {case.label: case.run for case in cases}
    cases[0].run()  # what is set up once in a process is in nobody's time
    timings = interleaved(runs, 1 if settings.quick else REPEATS, ENOUGH, warm=False)
    table = Table(f"{problem.name}: {problem.title}", COLUMNS)
    table.rows = [line(problem, case, timings[case.label]) for case in cases]
    compared(table.rows)
    said = "of each component" if problem.floor is not None else "the worst output's largest, relative to its largest value"
    table.notes = [*problem.notes, f"error: {said}; atol = {problem.ratio:g} rtol; {budget:g} s for one solver"]
    return table


def in_single(problems: list[StiffProblem], settings: Settings) -> Table:
    """Every problem in single precision."""
    table = Table(f"single precision at {LOOSE:g}", SINGLES)
    for problem in problems:
        for name in settings.methods or SINGLE:
            if serves(name, problem):
                table.rows.append(single(problem, Ours(name), LOOSE, settings.quick))
    return table


def single(problem: StiffProblem, ours: Ours, tolerance: float, quick: bool = False) -> dict[str, Any]:
    """One line of the table of single precision."""
    deadline = processor(QUICK_BUDGET if quick else problem.budget)
    outcome = attempt(problem.at(tolerance).single(), ours, deadline)
    found = {"problem": problem.name, "solver": ours.label, "tolerance": tolerance, "evaluations": outcome.evaluations}
    why = f": {BEYOND_SINGLE[problem.name]}" if problem.name in BEYOND_SINGLE else ""
    if outcome.y is None:
        return {**found, "verdict": f"{outcome.ended}{why}"}
    error = problem.error(outcome.y)
    return {**found, "error": error, "verdict": "" if error is None else "yes" if error <= WRONG else f"SHORT{why}"}


def short(name: str, method: str) -> Callable[[], Outcome]:
    """A solve to the first output at a loose tolerance, as its memory is measured in a process of its own."""
    problem = STIFF[name]()
    problem = replace(problem, times=problem.times[:2]).at(LOOSE)
    return lambda: solve_ours(problem, Ours(method), Deadline(float("inf")))


def memory(problem: StiffProblem) -> Table:
    """By how much the resident memory of a process peaks above its start while a method runs, in states."""
    table = Table(f"{problem.name}: working memory", MEMORY)
    state = problem.y0.numel() * problem.y0.element_size() / 2**20
    for method in problem.solvers or ():
        peak = peak_memory(f"__import__('benchmarks.stiff_suite', fromlist=['x']).short({problem.name!r}, {method!r})")
        states = None if peak is None else peak / state
        table.rows.append({"solver": method, "megabytes": peak, "states": states, "stated": STATES.get(method)})
    table.notes = [f"a state takes {state:.1f} MB; the peak has all temporaries in it, and what the solve keeps for its outputs"]
    return table


def chosen_problems(settings: Settings) -> list[StiffProblem]:
    """Those named, or all but the large ones."""
    if settings.problems is not None:
        return [build() for build in STIFF.choose(settings.problems)]
    if settings.quick:
        return [STIFF[name]() for name in QUICK]
    return [build() for name, build in STIFF.items() if settings.full or name not in LARGE]


def run(settings: Settings) -> Result:
    """Measure every problem, then set what was found against what has to be reached."""
    from solvers.methods import METHODS

    from .stiff_targets import judged

    one_thread(settings, "stiff-suite compares with solvers that run on the CPU")
    for name in settings.methods or ():
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    problems = chosen_problems(settings)
    found: Found = {}
    tables = []
    for problem in problems:
        print(f"{problem.name} ...", file=sys.stderr, flush=True)
        table = measure(problem, settings)
        tables.append(table)
        found |= {(problem.name, row["solver"], row["tolerance"]): row for row in table.rows}
    singles = in_single([problem for problem in problems if problem.solvers is None], settings)
    targets = judged(found, settings)
    tables += [memory(problem) for problem in problems if problem.name in HUGE]
    if settings.problems is None and not settings.full:
        singles.notes.append(f"with --full only: {', '.join(LARGE)}")
    return Result([*tables, singles, targets])


def draw(result: Result, path: Path) -> None:
    """Error against evaluations and against time, a pair of panels a problem."""
    from .pictures import figure, save

    tables = [table for table in result.tables if table.columns is COLUMNS]
    rows = -(-len(tables) // 2)
    drawn, axes = figure(rows, 4, figsize=(15, 3.1 * rows), squeeze=False)
    pairs = axes.reshape(-1, 2)
    for (work, clock), table in zip(pairs, tables):
        show(work, table, "evaluations", legend=True)
        show(clock, table, "time", legend=False)
    for panel in pairs[len(tables) :].flat:
        panel.axis("off")
    save(drawn, path)


def show(panel: Any, table: Table, key: str, legend: bool) -> None:
    """One line a solver; ours are solid."""
    from matplotlib.ticker import NullFormatter

    solvers = dict.fromkeys(row["solver"].split(", ")[0] if row["tolerance"] is None else row["solver"] for row in table.rows)
    for place, solver in enumerate(solvers):
        rows = [row for row in table.rows if row["solver"] == solver or row["solver"].startswith(f"{solver}, ")]
        rows = [row for row in rows if row.get("error") and (row["solver"] == solver or row["tolerance"] is None)]
        style = "-o" if any(row["ours"] for row in rows) else "--s"
        values, errors = [row[key] for row in rows], [row["error"] for row in rows]
        panel.loglog(values, errors, style, color=f"C{place % 10}", markersize=3, linewidth=1, label=solver)
    panel.set_title(table.title, fontsize=8)
    panel.set_xlabel("evaluations of f" if key == "evaluations" else "CPU time, s", fontsize=8)
    panel.tick_params(labelsize=7)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.3)
    if legend:
        panel.set_ylabel("error", fontsize=8)
        panel.legend(fontsize=5)


BENCHMARKS.add(
    "stiff-suite",
    Benchmark(
        "stiff-suite",
        "work and precision on stiff problems, and the figures that have to be reached",
        "12 min (--full: 30 min)",
        "1 min",
        run,
        draw,
        problems=STIFF,
    ),
)
