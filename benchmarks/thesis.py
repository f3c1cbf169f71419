"""Figures 5.2, 5.4 and 5.5 of the thesis: two scalar equations, inner solvers on one step, time against grid size (Xia 2023)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solvers.optim import INNER_OPTIMIZERS, InnerOptimizer

from .registry import BENCHMARKS, Benchmark, Column, Result, Settings, Table
from .running import ending
from .stiff_checks import NOTHING
from .stiff_problems import STIFF, line
from .timing import interleaved, one_thread

__all__ = ["run_grid", "run_inner", "run_scalar", "traced"]


ON_CPU = "the thesis' figures are made on the CPU"


# -- figure 5.2 -------------------------------------------------------------------------------------------------------

SCALAR: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[Tensor], Tensor], float]] = {
    # f, the solution from 1, the end (the thesis gives neither its ranges nor its tolerances but in the picture)
    "y' = 3 y - 2 cos t - 4 sin t": (
        lambda t, y: 3 * y - 2 * torch.cos(t) - 4 * torch.sin(t), lambda t: torch.cos(t) + torch.sin(t), 2.0,
    ),
    "y' = -50 (y - cos t)": (
        lambda t, y: -50 * (y - torch.cos(t)),
        lambda t: (2500 * torch.cos(t) + 50 * torch.sin(t) + torch.exp(-50 * t)) / 2501, 1.5,
    ),
}  # fmt: skip
WIDTH = 0.01
INNER = (1e-2, 1e-3, 1e-4, 1e-6)
SCALARS = [
    Column("equation", "equation"),
    Column("solver", "solver"),
    Column("tolerance", "inner tolerance", "error"),
    Column("distance", "largest distance from BE", "error"),
    Column("middle", "error halfway", "error"),
    Column("end", "error at the end", "error"),
    Column("evaluations", "evaluations", "count"),
]


def run_scalar(settings: Settings) -> Result:
    """Figure 5.2: proximal backward Euler with several inner tolerances against backward and forward Euler, step 0.01."""
    one_thread(settings, ON_CPU)
    table, arrays = Table("Figure 5.2: two scalar equations, step 0.01", SCALARS), {}
    for name, (field, exact, end) in SCALAR.items():
        times = torch.linspace(0, end, round(end / WIDTH) + 1, dtype=torch.float64)
        solved = {"euler": by_euler(field, times, "euler"), "implicit_euler": by_euler(field, times, "implicit_euler")}
        solved |= {f"prox_euler, {tol:g}": by_euler(field, times, "prox_euler", tol) for tol in INNER}
        exactly, backward = exact(times), solved["implicit_euler"][0]
        for solver, (y, evaluations) in solved.items():
            error = (y - exactly).abs()
            table.rows.append(
                {
                    "equation": name, "solver": solver.split(",")[0], "evaluations": evaluations,
                    "tolerance": float(solver.split(", ")[1]) if "," in solver else None,
                    "distance": float((y - backward).abs().max()), "middle": float(error[len(times) // 2]),
                    "end": float(error[-1]),
                }
            )  # fmt: skip
        arrays[name] = (times, {solver: (y - exactly).abs() for solver, (y, _) in solved.items()})
        table.notes += said(name, table.rows[-len(solved) :])
    return Result([table], arrays=arrays)


def by_euler(field: Any, times: Tensor, method: str, tol: float | None = None) -> tuple[Tensor, int]:
    """``(T,)`` states on a grid of equal steps, and evaluations; ``tol``: of the proximal step's residual."""
    from solvers import solve

    options: dict[str, Any] = {"rtol": NOTHING, "atol": 1e-12}
    if tol is not None:
        options |= {"inner": "fletcher_reeves", "rate": "constant", "atol": tol, "inner_tol": 1.0}
    with torch.no_grad():
        found = solve(
            field, torch.ones(1, dtype=torch.float64), times, method=method, num_steps=len(times) - 1, max_steps=10**6, **options
        )
    return found.y[:, 0], int(found.stats.nfe)


def said(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """The thesis' claims beside what is found here."""
    by = {(found["solver"], found["tolerance"]): found for found in rows}
    distances = [by["prox_euler", tol]["distance"] for tol in INNER]
    falls = all(later < before for before, later in pairwise(distances))
    proximal, forward = by["prox_euler", INNER[-1]], by["euler", None]
    return [
        f"{name}. Thesis: proximal BE approaches BE as the inner tolerance falls. Here: {'yes' if falls else 'no'}, "
        f"{', '.join(f'{d:.1e}' for d in distances)}",
        f"thesis: smaller error than forward Euler's. Here at the end: {proximal['end']:.2e} against {forward['end']:.2e}"
        + ("; thesis: it falls with time" if "50" in name else ""),
    ]


def draw_scalar(result: Result, path: Path) -> None:
    """Error against time, a panel an equation."""
    from .pictures import figure, save

    drawn, axes = figure(1, len(result.arrays), figsize=(11, 4.2))
    for panel, (name, (times, errors)) in zip(axes, result.arrays.items()):
        for solver, error in errors.items():
            panel.semilogy(times, error.clamp(min=1e-12), "--" if solver == "euler" else "-", linewidth=1, label=solver)
        panel.set_title(name, fontsize=9)
        panel.set_xlabel("t")
        panel.set_ylabel("error")
        panel.legend(fontsize=7)
    save(drawn, path)


# -- figure 5.4 -------------------------------------------------------------------------------------------------------

ONE_STEP = 1 / 2000
LEVELS = (1e-2, 1e-4, 1e-6, 1e-8)
STARTS = [
    Column("solver", "inner solver"),
    Column("start", "start"),
    *(Column(f"at {level:g}", f"iterations to {level:g}", "count") for level in LEVELS),
    Column("iterations", "iterations", "count"),
    Column("evaluations", "evaluations", "count"),
    Column("error", "|z - h1| at last", "error"),
    Column("ended", "ended"),
]


def traced(inner: InnerOptimizer, path: list[Tensor]) -> InnerOptimizer:
    """``inner``, whose iterates are written into ``path``."""
    kind: Any = type(inner)

    class Traced(kind):
        def chosen(self, layout: Any) -> InnerOptimizer:
            found = inner.chosen(layout)
            return self if found is inner else traced(found, path)

        def init(self, problem: Any, point: Any, running: Any, memory: Any) -> Any:
            path.append(point.z.clone())
            return super().init(problem, point, running, memory)

        def step(self, problem: Any, z: Tensor, r: Tensor, state: Any, running: Any) -> Any:
            out = super().step(problem, z, r, state, running)
            path.append(out.z.clone())
            return out

    found = copy.copy(inner)
    object.__setattr__(found, "__class__", Traced)  # with the fields as they are, which are frozen
    return found


def inner_solvers(quick: bool) -> dict[str, InnerOptimizer]:
    """Everything registered, Fletcher-Reeves at its three rates and at the thesis' number."""
    from dataclasses import replace

    found: dict[str, InnerOptimizer] = {}
    for name, solver in INNER_OPTIMIZERS.items():
        if name != "fletcher_reeves":
            found[name] = solver
            continue
        for rate in ("cg",) if quick else ("cg", "line_search", "constant", 0.1):
            bare = {"restart": False} if rate == 0.1 else {}
            found[f"{name}, {rate}"] = replace(solver, rate=rate, **bare)  # type: ignore[type-var]
    found.pop("newton_sparse", None)  # asks for a pattern
    return found


def run_inner(settings: Settings) -> Result:
    """Figure 5.4: the iterates of every inner solver in the first step of backward Euler."""
    one_thread(settings, ON_CPU)
    table, arrays = Table("Figure 5.4: inner solvers on the first step of backward Euler, 128 points, step 1/2000", STARTS), {}
    problem = STIFF["diff1d_128"]()
    noise = torch.randn(128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for start, y0 in (("density", problem.y0), ("noise", noise)):
        matrix = torch.from_numpy(problem.field.jacobian(y0).toarray())
        exact = torch.linalg.solve(torch.eye(128, dtype=torch.float64) - ONE_STEP * matrix, y0)
        for name, solver in inner_solvers(settings.quick).items():
            row, path = one_step(problem.field, y0, exact, solver)
            table.rows.append({"solver": name, "start": start, **row})
            arrays[f"{start}: {name}"] = (path, exact)
    table.notes = [
        "thesis: GD, NAG, restarted NAG and FR are alike at first, FR is best later, all with the same rate 0.1, which in units "
        "of the scaled residual is above 2 / L = 0.06 of this step; 1 / L = 0.03 is taken in its place",
        "levels: largest |z - h1|, h1 the solution by elimination; iterations of Newton solvers hold a linear solve each",
    ]
    return Result([table], arrays=arrays)


def one_step(field: Any, y0: Tensor, exact: Tensor, solver: InnerOptimizer) -> tuple[dict[str, Any], list[Tensor]]:
    """The line of one solver and its iterates."""
    from solvers import solve

    path: list[Tensor] = []
    with torch.no_grad():
        found = solve(
            field, y0, (0.0, ONE_STEP), method="prox_euler", num_steps=1, inner=traced(solver, path), rtol=NOTHING, atol=1e-10,
            inner_tol=1.0, max_iters=2000, energy=False, throw=False,
        )  # fmt: skip
    distances = [float((z - exact).abs().max()) for z in path]
    row: dict[str, Any] = {
        "iterations": len(path) - 1, "evaluations": int(found.stats.nfe), "error": distances[-1],
        "ended": ending(found),
    }  # fmt: skip
    for level in LEVELS:
        row[f"at {level:g}"] = next((place for place, distance in enumerate(distances) if distance <= level), None)
    return row, path


def draw_inner(result: Result, path: Path) -> None:
    """|z_{i+1} - z_i| and |z_i - h1| against iterations, a row a start."""
    from .pictures import figure, save

    drawn, axes = figure(2, 2, figsize=(11, 8))
    for row, start in zip(axes, ("density", "noise")):
        found = {label.split(": ")[1]: kept for label, kept in result.arrays.items() if label.startswith(start)}
        solvers = [(name, *kept) for name, kept in found.items()]
        for place, (name, iterates, exact) in enumerate(solvers):
            steps = [float((b - a).norm()) for a, b in pairwise(iterates)]
            away = [float((z - exact).norm()) for z in iterates]
            for panel, values in zip(row, (steps, away)):
                shown = [value if 1e-14 < value < 1e3 else math.nan for value in values[:200]]
                panel.semilogy(shown, ("-", "--", ":")[place // 10], color=f"C{place % 10}", linewidth=1, label=name)
        row[0].set_ylabel(f"|z_(i+1) - z_i|, {start}")
        row[1].set_ylabel(f"|z_i - h1|, {start}")
    axes[0, 1].legend(fontsize=6)
    for panel in axes[1]:
        panel.set_xlabel("iteration")
    save(drawn, path)


# -- figure 5.5 -------------------------------------------------------------------------------------------------------

GRIDS, QUICK_GRIDS = (64, 128, 256, 512, 1024), (32, 64, 128)
GRID_STEPS = 20
GRID = [
    Column("solver", "inner solver"),
    Column("points", "points", "count"),
    Column("time", "time", "seconds"),
    Column("evaluations", "evaluations", "count"),
    Column("ratio", "time / proximal's", "ratio"),
    Column("ended", "ended"),
]
PROXIMAL = "proximal, FR"


def run_grid(settings: Settings) -> Result:
    """Figure 5.5: time of 20 steps of backward Euler, step 1/2000, against the number of points."""
    one_thread(settings, ON_CPU)
    ways: dict[str, dict[str, Any]] = {PROXIMAL: {"inner": "fletcher_reeves", "rate": "cg"}, "Newton": {"inner": "newton"}}
    ways["Newton, Krylov"] = {"inner": "newton_krylov"}
    ways["fixed point"] = {"inner": "fixed_point"}
    table = Table("Figure 5.5: 20 steps of backward Euler, step 1/2000, by inner solver and number of points", GRID)
    for points in QUICK_GRIDS if settings.quick else GRIDS:
        problem = line(points)
        cases = {name: grid_case(problem, options) for name, options in ways.items()}
        timings = interleaved(cases, 1 if settings.quick else 3, 2.0)
        first = timings[PROXIMAL].median_wall
        for name, timing in timings.items():
            evaluations, ended = timing.value
            ratio = timing.median_wall / first if ended == "done" else None
            table.rows.append(
                {"solver": name, "points": points, "time": timing.median_wall, "evaluations": evaluations, "ratio": ratio,
                 "ended": ended}
            )  # fmt: skip
    margins = [row["ratio"] for row in table.rows if row["solver"] == "Newton" and row["ratio"]]
    table.notes = [
        "thesis: the proximal step is fastest, the margin grows with the size, Newton does not scale. Here Newton's time over "
        f"the proximal step's, from the smallest to the largest: {', '.join(f'{ratio:.2g}' for ratio in margins)}",
        "the residual is solved to 1e-7 of the root mean square; a fixed point iteration contracts for step x rho below 1; "
        "beyond, its rate is cut",
    ]
    return Result([table])


def grid_case(problem: Any, options: dict[str, Any]) -> Callable[[], tuple[int, str]]:
    from solvers import solve

    def case() -> tuple[int, str]:
        with torch.no_grad():
            found = solve(
                problem.field, problem.y0, (0.0, GRID_STEPS * ONE_STEP), method="prox_euler", num_steps=GRID_STEPS, rtol=NOTHING,
                atol=1e-7, inner_tol=1.0, energy=False, throw=False, **options,
            )  # fmt: skip
        return int(found.stats.nfe), ending(found)

    return case


def draw_grid(result: Result, path: Path) -> None:
    from .pictures import figure, save

    drawn, panel = figure(figsize=(6, 4.2))
    rows = result.tables[0].rows
    for name in dict.fromkeys(row["solver"] for row in rows):
        mine = [row for row in rows if row["solver"] == name and row["ended"] == "done"]
        panel.loglog([row["points"] for row in mine], [row["time"] for row in mine], "o-", label=name)
    panel.set_xlabel("points")
    panel.set_ylabel("time, s")
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)
    save(drawn, path)


def add(name: str, summary: str, usual: str, quick: str, run: Any, draw: Any) -> None:
    BENCHMARKS.add(name, Benchmark(name, summary, usual, quick, run, draw, takes_peers=False))


add("thesis-5.2", "two scalar equations: inner tolerances (figure 5.2)", "10 s", "10 s", run_scalar, draw_scalar)
add("thesis-5.4", "inner solvers on one step (figure 5.4)", "20 s", "10 s", run_inner, draw_inner)
add("thesis-5.5", "time against grid size by inner solver (figure 5.5)", "1 min", "10 s", run_grid, draw_grid)
