"""Figure 5.3 and Table 5.2 of the thesis: a line of 128 points by proximal steps of size 1/2000 (Xia 2023, section 5.4.1).

Two settings that the text does not keep apart: the table stops its inner solver at 5e-9, the figure at 1e-3 to 1e-7. The
rate 0.1 can only refer to the scaled residual z - a - g f(z), whose curvature lies in [1, L], L = 1 + g rho: it diverges
where 2 / L is below, which is so for backward Euler and BDF2. "Standard Gaussian" may be the density on [0, 1] or noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .registry import BENCHMARKS, Benchmark, Column, Result, Settings, Table, unknown
from .running import Ours, solve_ours
from .stiff_checks import fixed_run
from .stiff_problems import STIFF, StiffProblem
from .stiff_suite import processor
from .thesis import ON_CPU
from .timing import one_thread

__all__ = ["SCHEMES", "largest_curvature", "run_figure", "run_table"]

STEP = 1 / 2000
SCHEMES: dict[str, tuple[str, float, float]] = {
    # name of ours: name in the thesis, g / step, smallest final error printed in Table 5.2
    "prox_euler": ("Backward Euler", 1.0, 4.68e-7),
    "prox_cn": ("Crank-Nicolson", 1 / 2, 1.75e-6),
    "prox_bdf2": ("BDF2", 2 / 3, 1.36e-6),
    "prox_bdf3": ("BDF3", 6 / 11, 5.71e-7),
    "prox_bdf4": ("BDF4", 12 / 25, 1.15e-6),
}
RATES: tuple[Any, ...] = (0.1, 0.05, "constant", "cg")
TABLE_TOLERANCE = 5e-9
FIGURE_TOLERANCES = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7)
ADAPTIVE = ("adaptive_heun", "dopri5")
BUDGET = 40.0  # s of CPU time for one adaptive solve

COMMON = [
    Column("scheme", "scheme"),
    Column("start", "start"),
    Column("rate", "rate eta"),
    Column("limit", "2 / L", "number"),
]
TABLE = [
    *COMMON,
    Column("thesis", "thesis: final error", "error"),
    Column("error", "final error", "error"),
    Column("middle", "error at t = 0.1", "error"),
    Column("evaluations", "evaluations", "count"),
    Column("ended", "ended"),
]
FIGURE = [
    *COMMON,
    Column("tolerance", "inner tolerance", "error"),
    Column("evaluations", "evaluations", "count"),
    Column("error", "final error", "error"),
    Column("middle", "error at t = 0.1", "error"),
    Column("ended", "ended"),
]


def problem_from(start: str, quick: bool) -> StiffProblem:
    """The line from the "density" or from "noise" (PCG64 of numpy has no part in it: torch, seed 0); ``quick``: to t = 0.1."""
    found = STIFF["diff1d_128"]()
    times = (0.0, 0.01, 0.1) if quick else (0.0, 0.1, 1.0)
    y0 = found.y0
    if start == "noise":
        y0 = torch.randn(len(y0), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return replace(found, y0=y0, times=times, reference=found.field.exact(y0, torch.tensor(times[1:], dtype=torch.float64)))


def largest_curvature(scheme: str) -> float:
    """L = 1 + g rho of the scaled residual."""
    return 1 + SCHEMES[scheme][1] * STEP * 4 * 127**2


def inner_options(rate: Any) -> dict[str, Any]:
    """Fletcher-Reeves; a number is the thesis' bare iteration with that rate, stopped by the length of its step."""
    literal = {"restart": False, "inner_stop": "step", "fallback": None, "max_iters": 1000}
    bare: dict[str, Any] = literal if isinstance(rate, float) else {}
    return {"inner": "fletcher_reeves", "rate": rate, **bare}


def row(problem: StiffProblem, scheme: str, start: str, rate: Any, tolerance: float) -> dict[str, Any]:
    steps = round(problem.times[-1] / STEP)
    found = fixed_run(problem, scheme, steps, tolerance, **inner_options(rate))
    errors = found.errors or (None, None)
    words = {"constant": "1 / L", "cg": "exact line search"}
    return {
        "scheme": SCHEMES[scheme][0], "method": scheme, "start": start, "rate": words.get(rate) or f"{rate:g}",
        "limit": 2 / largest_curvature(scheme), "tolerance": tolerance, "evaluations": found.evaluations, "error": errors[1],
        "middle": errors[0], "ended": "done" if found.errors else f"diverges: {found.ended}", "thesis": SCHEMES[scheme][2],
    }  # fmt: skip


def schemes(settings: Settings) -> list[str]:
    for name in settings.methods or ():
        if name not in SCHEMES:
            raise unknown("scheme of the thesis", name, SCHEMES)
    one_thread(settings, ON_CPU)
    return list(settings.methods or (("prox_euler", "prox_bdf4") if settings.quick else SCHEMES))


def run_table(settings: Settings) -> Result:
    """Table 5.2: the final errors with inner iterations to 5e-9."""
    table = Table("Table 5.2: smallest final error, step 1/2000, inner iterations stopped at 5e-9", TABLE)
    for scheme in schemes(settings):
        for start in ("density", "noise"):
            problem = problem_from(start, settings.quick)
            table.rows += [row(problem, scheme, start, rate, TABLE_TOLERANCE) for rate in RATES]
    table.notes = [
        "rates in units of the scaled residual z - a - g f(z); the thesis has 0.1 for all, which converges below 2 / L only",
        "at t = 1 the solution is constant to 1e-17: the final error measures the inner tolerance alone (in the thesis, single "
        "precision); at t = 0.1 it is that of the scheme",
        "0.1 and 0.05: the thesis' iteration, stopped by the length of its step; the others stop by that of the residual, which "
        "may be L times larger",
        *failing(table.rows),
    ]
    return Result([table])


def failing(rows: list[dict[str, Any]]) -> list[str]:
    """Which schemes diverge at the thesis' rate."""
    literal = [found for found in rows if found.get("rate") == "0.1"]
    bad = dict.fromkeys(found["scheme"] for found in literal if found["ended"] != "done")
    good = dict.fromkeys(found["scheme"] for found in literal if found["ended"] == "done")
    return [f"eta = 0.1 diverges for {', '.join(bad) or 'none'}; converges for {', '.join(good) or 'none'}"]


def figure_rows(settings: Settings, problem: StiffProblem) -> Iterator[dict[str, Any]]:
    tolerances = FIGURE_TOLERANCES[::2] if settings.quick else FIGURE_TOLERANCES
    for scheme in schemes(settings):
        for rate in (0.1, "cg"):
            for tolerance in tolerances:
                found = row(problem, scheme, "density", rate, tolerance)
                yield found
                if found["ended"] != "done":
                    break
    for method in ADAPTIVE:
        for tolerance in tolerances[:1] if settings.quick else (1e-3, 1e-5):
            at = problem.at(tolerance)
            outcome = solve_ours(at, Ours(method), processor(2.0 if settings.quick else BUDGET))
            errors: Any = (None, None)
            if outcome.y is not None and problem.reference is not None:
                errors = (outcome.y - problem.reference).abs().amax(1).tolist()
            yield {
                "scheme": method, "method": method, "start": "density", "tolerance": tolerance, "error": errors[1],
                "evaluations": outcome.evaluations, "middle": errors[0], "ended": outcome.ended,
            }  # fmt: skip


def run_figure(settings: Settings) -> Result:
    """Figure 5.3: final error against evaluations, as the inner tolerance falls."""
    table = Table("Figure 5.3: final error against evaluations, step 1/2000", FIGURE)
    table.rows = list(figure_rows(settings, problem_from("density", settings.quick)))
    adaptive = [found for found in table.rows if found["method"] in ADAPTIVE]
    ours = [found for found in table.rows if found["method"] in SCHEMES and found["ended"] == "done"]
    least, most = min(found["evaluations"] for found in adaptive), max((found["evaluations"] for found in ours), default=0)
    spread = {
        name: [found["evaluations"] for found in adaptive if found["method"] == name and found["ended"] == "done"]
        for name in ADAPTIVE
    }
    flat = "; ".join(f"{name} {' and '.join(f'{n:,}' for n in counts)}" for name, counts in spread.items() if counts)
    cost = {found["scheme"]: found["evaluations"] for found in ours if found["rate"] == "exact line search"}
    told = ", ".join(f"{name} {count:,}" for name, count in cost.items())
    table.notes = [
        f"thesis: adaptive solvers need many more evaluations. Here: {least:,} at least, proximal steps {most:,} at most",
        f"thesis: theirs are nearly independent of the error, as stability limits them. Here, at two tolerances: {flat}",
        "thesis: a BDF of higher order costs more evaluations an iteration. Here, at the tightest tolerance with exact line "
        f"searches: {told}; the curvature 1 + g rho falls with the order",
        *failing(table.rows),
    ]
    return Result([table])


def draw(result: Result, path: Path) -> None:
    """Final error against evaluations; one marker a run."""
    from .pictures import figure, save

    drawn, axes = figure(1, 2, figsize=(11, 4.2))
    groups = dict.fromkeys((row["scheme"], row.get("rate", "")) for row in result.tables[0].rows)
    for panel, key in zip(axes, ("error", "middle")):
        for place, (scheme, rate) in enumerate(groups):
            rows = [row for row in result.tables[0].rows if (row["scheme"], row.get("rate", "")) == (scheme, rate) and row[key]]
            style = {"0.1": "s--", "": "D"}.get(rate, "o-")
            panel.loglog(
                [row["evaluations"] for row in rows], [row[key] for row in rows], style, color=f"C{place % 10}", markersize=4,
                label=f"{scheme}{f', {rate}' if rate else ''}",
            )  # fmt: skip
        panel.set_xlabel("evaluations of f")
        panel.set_title("error at the end" if key == "error" else "error before, where the scheme shows", fontsize=9)
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize=6)
    save(drawn, path)


BENCHMARKS.add(
    "thesis-5.3",
    Benchmark(
        "thesis-5.3", "a line by proximal steps: final error against evaluations (figure 5.3)", "2 min", "10 s", run_figure, draw,
        takes_peers=False,
    ),
)  # fmt: skip
BENCHMARKS.add(
    "table-5.2",
    Benchmark(
        "table-5.2", "a line by proximal steps: final errors and rates (table 5.2)", "1 min", "10 s", run_table, draw,
        takes_peers=False,
    ),
)  # fmt: skip
