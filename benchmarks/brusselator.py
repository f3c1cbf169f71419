"""A stiff field on a grid with a known sparsity pattern: implicit Runge-Kutta steps against scipy's BDF, work and precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from .registry import BENCHMARKS, Benchmark, BenchmarkError, Column, Result, Settings, Table, unknown
from .timing import Timing, interleaved, one_thread

__all__ = ["Brusselator", "run"]

TOLERANCES = (1e-3, 1e-4, 1e-5)
TIGHT = 1e-7  # of the reference
USUAL = ("esdirk547", "radauIIA5")
FLOOR = 1e-2  # of a concentration, below which errors count as absolute: both are of order 1

COLUMNS = [
    Column("solver", "solver"),
    Column("tolerance", "tolerance", "error"),
    Column("error", "error", "error"),
    Column("time", "CPU time", "seconds"),
    Column("evaluations", "evaluations", "count"),
    Column("jacobians", "Jacobians", "count"),
    Column("factorisations", "LU", "count"),
    Column("ratio", "time: BDF at this error / this", "number"),
]


@dataclass(frozen=True)
class Brusselator:
    """u' = 1 + u^2 v - 4.4 u + a Lap u, v' = 3.4 u - u^2 v + a Lap v, periodic on the unit square (Hairer & Wanner II,
    IV.10, BRUSS-2D without its late source), ``cells`` x ``cells``, to t = 11.5; the state is ``(2, cells, cells)``."""

    cells: int = 100
    diffusion: float = 0.1
    times: tuple[float, ...] = (0.0, 0.1, 1.0, 5.0, 11.5)

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        u, v = y
        reaction = u.square() * v
        change = torch.stack([1.0 + reaction - 4.4 * u, 3.4 * u - reaction])
        neighbours = y.roll(1, 1) + y.roll(-1, 1) + y.roll(1, 2) + y.roll(-1, 2)
        return change.add_(neighbours.sub_(y, alpha=4.0), alpha=self.diffusion * self.cells**2)

    def start(self) -> Tensor:
        x = torch.arange(self.cells, dtype=torch.float64) / self.cells
        u, v = 22.0 * x * (1.0 - x) ** 1.5, 27.0 * x * (1.0 - x) ** 1.5
        return torch.stack([u[:, None].expand(-1, self.cells), v.expand(self.cells, -1)]).contiguous()

    def sparsity(self) -> Any:
        """Each cell with its four neighbours, and both concentrations of a cell."""
        n = self.cells
        ring = scipy.sparse.diags_array([1.0, 1.0, 1.0, 1.0], offsets=[-1, 1, n - 1, 1 - n], shape=(n, n))
        one = scipy.sparse.eye_array(self.cells)
        grid = scipy.sparse.kron(ring, one) + scipy.sparse.kron(one, ring)
        whole = scipy.sparse.kron(np.eye(2), grid) + scipy.sparse.kron(np.ones((2, 2)), scipy.sparse.eye_array(self.cells**2))
        return scipy.sparse.csc_matrix(whole)


@dataclass
class Outcome:
    """Outputs ``(T-1, 2, cells, cells)`` and the work."""

    y: np.ndarray
    evaluations: int
    jacobians: int
    factorisations: int


def by_scipy(problem: Brusselator, pattern: Any, tolerance: float) -> Outcome:
    from scipy.integrate import solve_ivp

    start = problem.start()
    count = 0

    def field(t: float, y: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return problem(t, torch.from_numpy(y).view(start.shape)).reshape(-1).numpy()

    first, last = problem.times[0], problem.times[-1]
    found = solve_ivp(
        field, (first, last), start.reshape(-1).numpy(), "BDF", problem.times[1:],
        jac_sparsity=pattern, rtol=tolerance, atol=0.01 * tolerance,
    )  # fmt: skip
    if not found.success:
        raise BenchmarkError(f"scipy's BDF failed at {tolerance:g}: {found.message}")
    return Outcome(found.y.T.reshape(-1, *start.shape), count, found.njev, found.nlu)


def by_ours(problem: Brusselator, pattern: Any, method: str, tolerance: float) -> Outcome:
    from solvers import solve

    times = torch.tensor(problem.times, dtype=torch.float64)
    with torch.no_grad():
        found = solve(problem, problem.start(), times, method=method, jac_sparsity=pattern, rtol=tolerance, atol=0.01 * tolerance)
    stats = found.stats
    return Outcome(found.y[1:].numpy(), int(stats.nfe), int(stats.njac), int(stats.nlu))


def time_at(error: float, lines: list[dict[str, Any]]) -> float | None:
    """The peer's CPU time at this error, between two of its runs on logarithmic scales; None beyond them."""
    points = sorted((np.log(line["error"]), np.log(line["time"])) for line in lines)
    errors, times = zip(*points, strict=True)
    inside = errors[0] <= np.log(error) <= errors[-1]
    return float(np.exp(np.interp(np.log(error), errors, times))) if inside else None


def run(settings: Settings) -> Result:
    """Every solver at three tolerances, interleaved, against the peer's own solution at a tight one."""
    from solvers.methods import METHODS

    one_thread(settings, "brusselator factorises sparse matrices, which is done on the CPU")
    chosen = settings.methods or USUAL
    for name in chosen:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    problem = Brusselator(24) if settings.quick else Brusselator()
    pattern = problem.sparsity()
    reference = by_scipy(problem, pattern, TIGHT).y
    cases: dict[str, Callable[[], Outcome]] = {}
    labels: dict[str, tuple[str, float]] = {}
    for tolerance in TOLERANCES:
        solvers: dict[str, Callable[[], Outcome]] = {"scipy BDF": partial(by_scipy, problem, pattern, tolerance)}
        solvers |= {name: partial(by_ours, problem, pattern, name, tolerance) for name in chosen}
        for name, solver in solvers.items():
            label = f"{name} {tolerance:g}"
            cases[label], labels[label] = solver, (name, tolerance)
    timings = interleaved(cases, 3 if settings.full else 1, warm=False)
    table = Table(f"Brusselator on {problem.cells} x {problem.cells} cells with its sparsity pattern", COLUMNS)
    table.rows = [row(labels[label], timing, reference) for label, timing in timings.items()]
    peers = [line for line in table.rows if line["solver"] == "scipy BDF"]
    for line in table.rows:
        same = None if line in peers else time_at(line["error"], peers)
        line["ratio"] = None if same is None else same / line["time"]
    table.notes = [
        f"{problem.start().numel():,} unknowns; outputs at {', '.join(f'{t:g}' for t in problem.times[1:])}",
        "absolute tolerance: a hundredth of the relative one",
        f"error: the largest |y - ref| / (|ref| + {FLOOR:g}), ref: scipy's BDF at {TIGHT:g}",
        "ratio: scipy's time at the same error, interpolated between its runs; above 1 the method is faster",
    ]
    return Result([table])


def row(label: tuple[str, float], timing: Timing, reference: np.ndarray) -> dict[str, Any]:
    outcome: Outcome = timing.value
    return {
        "solver": label[0],
        "tolerance": label[1],
        "error": float((np.abs(outcome.y - reference) / (np.abs(reference) + FLOOR)).max()),
        "time": timing.median_cpu,
        "evaluations": outcome.evaluations,
        "jacobians": outcome.jacobians,
        "factorisations": outcome.factorisations,
    }


def draw(result: Result, path: Path) -> None:
    """Time over error."""
    from .pictures import figure, save

    drawn, axes = figure(figsize=(6, 4))
    rows = result.tables[0].rows
    for name in dict.fromkeys(line["solver"] for line in rows):
        lines = [line for line in rows if line["solver"] == name]
        axes.loglog([line["error"] for line in lines], [line["time"] for line in lines], "o-", label=name)
    axes.set_xlabel("error")
    axes.set_ylabel("CPU time in s")
    axes.legend()
    save(drawn, path)


BENCHMARKS.add(
    "brusselator",
    Benchmark(
        "brusselator",
        "implicit Runge-Kutta with jac_sparsity= on 20,000 unknowns, against scipy's BDF with the same pattern",
        "7 min",
        "15 s",
        run,
        draw,
        takes_peers=False,
    ),
)
