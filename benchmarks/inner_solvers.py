"""Every inner solver on the equations of implicit steps: symmetric, strongly nonsymmetric, and nonlinear."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .registry import BENCHMARKS, Benchmark, Column, Option, Result, Settings, Table, names, unknown
from .running import ending
from .stiff_problems import STIFF, AllenCahn, BrusselatorLine
from .timing import interleaved, one_thread

__all__ = ["CASES", "Case", "run"]

RTOL, ATOL = 1e-6, 1e-8
ITERATIONS = 1000
"""For every solver, Newton's too, which otherwise gives a step up after ten for the next solver to try."""
RATES = {"fletcher_reeves": ("line_search", "constant")}  # beside the usual one

COLUMNS = [
    Column("solver", "inner solver"),
    Column("ended", "ended"),
    Column("iterations", "iterations", "count"),
    Column("evaluations", "evaluations", "count"),
    Column("time", "CPU time", "seconds"),
    Column("residual", "largest residual / tolerance", "number"),
    Column("error", "error", "error"),
]


@dataclass(frozen=True)
class Case:
    """A field, its start, and the steps of implicit Euler whose equations are solved: ``steps`` of ``dt``; ``stiffness``:
    dt rho."""

    title: str
    field: Callable[[Any, Tensor], Tensor]
    start: Tensor
    dt: float
    steps: int
    pattern: Any
    stiffness: float


def diffusion(quick: bool) -> Case:
    """Xia 2023, section 5.3: 128 points on a periodic line, dx = 1/127, a density of the normal distribution."""
    problem = STIFF["diff1d_128"]()
    title, stiffness = "symmetric: diffusion on a line, 128 unknowns", 0.002 * 4 * 127**2
    return Case(title, problem.field, problem.y0, 0.002, 5 if quick else 50, problem.field.jacobian(problem.y0), stiffness)


def brusselator(quick: bool) -> Case:
    """Hairer & Wanner II, IV.10, from a wave."""
    field = BrusselatorLine(100 if quick else 500)
    stiffness = 0.1 * 4 * field.diffusion * (field.cells + 1) ** 2
    title = f"strongly nonsymmetric: Brusselator on a line, {2 * field.cells} unknowns"
    return Case(title, field, field.start(), 0.1, 5 if quick else 20, field.sparsity(), stiffness)


def allen_cahn(quick: bool) -> Case:
    """u' = 50 Lap u + u - u^3 on a periodic grid from noise; dt times the growth rate is 1/2."""
    cells, rate = 16 if quick else 32, 50.0
    field = AllenCahn(cells, 2 * rate**0.5 / cells)
    start = torch.randn(cells, cells, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    title = f"nonlinear: Allen-Cahn on a grid, {cells * cells} unknowns"
    return Case(title, field, start, 0.5, 5 if quick else 20, field.sparsity(), 0.5 * 8 * rate)


CASES: dict[str, Callable[[bool], Case]] = {"diffusion": diffusion, "brusselator": brusselator, "allen-cahn": allen_cahn}


def solved(case: Case, inner: str, options: dict[str, Any], fallback: str | None = None) -> Any:
    """The steps of ``case`` by implicit Euler; a failure is a status, not an exception."""
    from solvers import solve

    more = {"jac_sparsity": case.pattern} if inner == "newton_sparse" else {}
    with torch.no_grad():
        return solve(
            case.field, case.start, (0.0, case.dt * case.steps), method="prox_euler", num_steps=case.steps, save="steps",
            inner=inner, fallback=fallback, max_iters=ITERATIONS, energy=False, rtol=RTOL, atol=ATOL, throw=False, **more,
            **options,
        )  # fmt: skip


def largest_residual(case: Case, y: Tensor) -> float | None:
    """Largest |z - y - dt f(z)| of the steps that were made, in the error norm, in units of the solvers' tolerance."""
    largest = None
    for before, after in pairwise(y):
        if not bool(after.isfinite().all()):
            break
        r = after - before - case.dt * case.field(0.0, after)
        largest = max(largest or 0.0, float((r / (ATOL + RTOL * before.abs())).square().mean().sqrt()) / 0.1)
    return largest


def solvers() -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> name and options of all inner solvers."""
    from solvers.optim import INNER_OPTIMIZERS

    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for name in INNER_OPTIMIZERS:
        found[name] = (name, {})
        found |= {f"{name}, {rate}": (name, {"rate": rate}) for rate in RATES.get(name, ())}
    return found


def measure(case: Case, chosen: dict[str, tuple[str, dict[str, Any]]], repeats: int) -> Table:
    """One line for each inner solver."""
    reference = solved(case, "newton", {"inner_tol": 1e-5}).y
    runs = {label: partial(solved, case, name, options) for label, (name, options) in chosen.items()}
    table = Table(f"{case.title}; {case.steps} steps of {case.dt:g}, L = 1 + dt rho = {1 + case.stiffness:.0f}", COLUMNS)
    for label, timing in interleaved(runs, repeats, enough=5.0, warm=False).items():
        found = timing.value
        row: dict[str, Any] = {
            "solver": label,
            "ended": ending(found),
            "iterations": int(found.stats.inner_iterations),
            "evaluations": int(found.stats.nfe),
            "time": timing.median_cpu,
            "residual": largest_residual(case, found.y),
        }
        if found.success:
            row["error"] = float((found.y[-1] - reference[-1]).abs().max() / reference[-1].abs().max())
        table.rows.append(row)
    return table


def run(settings: Settings) -> Result:
    """Every inner solver on every case; raises UnknownName."""
    one_thread(settings, "inner-solvers factorises sparse matrices, which is done on the CPU")
    every = solvers()
    asked = settings.options.get("inner")
    for name in asked or ():
        if name not in every:
            raise unknown("inner solver", name, every)
    chosen = {label: entry for label, entry in every.items() if asked is None or label in asked}
    result = Result([])
    for build in CASES.values():
        result.tables.append(measure(build(settings.quick), chosen, 1 if settings.quick else 3))
    done = [row for table in result.tables for row in table.rows if row["ended"] == "done"]
    result.tables[-1].notes = [
        f"implicit Euler from the extrapolated start, tolerances {RTOL:g} and {ATOL:g}, residuals solved to a tenth of them, "
        "no second solver for what the first cannot do",
        "residual: of all steps made, evaluated afterwards; Newton iterations stop by corrections, so theirs may be above 1",
        f"of {sum(len(table.rows) for table in result.tables)} solves {len(done)} ended well, with errors of at most "
        f"{max((row['error'] for row in done), default=float('nan')):.1e} against Newton's method at 1e-5 of the tolerance; "
        "all others said that they failed",
    ]
    return result


def draw(result: Result, path: Path) -> None:
    """Evaluations of each solver, a panel for each case; failures are left blank."""
    from .pictures import figure, save

    drawn, axes = figure(1, len(result.tables), figsize=(4.5 * len(result.tables), 5), sharey=True)
    for axis, table in zip(axes, result.tables, strict=True):
        names = [row["solver"] for row in table.rows]
        counts = [row["evaluations"] if row["ended"] == "done" else 0 for row in table.rows]
        axis.barh(names, counts)
        axis.set_xscale("symlog", linthresh=10)
        axis.set_xlabel("evaluations")
        axis.set_title(table.title.split(",")[0], fontsize=9)
    axes[0].invert_yaxis()
    save(drawn, path)


BENCHMARKS.add(
    "inner-solvers",
    Benchmark(
        "inner-solvers",
        "all inner solvers on steps of a diffusion, the Brusselator and Allen-Cahn: iterations, evaluations, time, failures",
        "3 min",
        "20 s",
        run,
        draw,
        takes_peers=False,
        options=(Option("inner", "only these inner solvers, by commas", read=names),),
    ),
)
