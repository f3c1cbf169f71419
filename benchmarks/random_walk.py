"""Diffusion by forward Euler as the mean over random walks (Xia 2023, Prop. 5), by Monte Carlo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphops import Graph
from graphops.fields import laplacian_diffusion
from solvers import solve

from .graph_problems import citation_data, communities
from .registry import BENCHMARKS, Benchmark, BenchmarkError, Column, Result, Settings, Table

__all__ = ["euler", "run", "walked"]

STEPS, STEP = 20, 0.5
STARTS = 50
"""Nodes from which the walks start."""
WALKERS = {100: (None, 0.120), 1_000: (None, 0.0475), 10_000: (0.02, 0.0149)}
"""By their number: the root mean square error that has to be reached, and that of a trial."""

COLUMNS = [
    Column("walkers", "walkers", "count"),
    Column("rms", "rms error", "error"),
    Column("expected", "rms standard error", "error"),
    Column("worst", "worst, standard errors", "number"),
    Column("bar", "bar", "number"),
    Column("trial", "trial's rms", "number"),
    Column("verdict", "verdict"),
]


def euler(graph: Graph, x: Tensor, steps: int = STEPS, step: float = STEP) -> Tensor:
    """The state after `steps` of the random-walk Laplacian, `(n,)` -> `(n,)`."""
    with torch.no_grad():
        return solve(laplacian_diffusion(graph), x, [0.0, steps * step], method="euler", num_steps=steps).y[-1]


def walked(
    graph: Graph, start: Tensor, generator: torch.Generator, steps: int = STEPS, step: float = STEP
) -> Tensor:
    """Where lazy walks end that stay with 1 - `step` and else go along a random edge backwards, to a node that `start` hears.

    Every node must have an edge into it.
    """
    pattern = graph.sort()
    degree = pattern.degree()
    first = degree.cumsum(0) - degree
    place = start.clone()
    for _ in range(steps):
        moves = torch.rand(place.shape, generator=generator) < step
        at = place[moves]
        turn = (torch.rand(at.shape, generator=generator, dtype=torch.float64) * degree[at]).long()
        place[moves] = pattern.source[first[at] + turn]
    return place


def compared(graph: Graph, x: Tensor, walkers: int, generator: torch.Generator) -> dict[str, Any]:
    """Walks from some nodes against Euler there."""
    nodes = torch.randperm(graph.num_sources, generator=generator)[:STARTS]
    values = x[walked(graph, nodes.repeat_interleave(walkers), generator)].view(-1, walkers)
    error = values.mean(1) - euler(graph, x)[nodes]
    deviation = values.std(1) / walkers**0.5
    return {
        "walkers": walkers,
        "rms": float(error.square().mean().sqrt()),
        "expected": float(deviation.square().mean().sqrt()),
        "worst": float((error.abs() / deviation.clamp(min=1e-12)).max()),
    }


def limit(graph: Graph, x: Tensor, steps: int) -> dict[str, float]:
    """Many steps: how far the state is from a constant, and that constant from the mean weighted by degree (Prop. 7)."""
    y = euler(graph, x, steps)
    degree = graph.degree().to(x.dtype)
    mean = (degree * x).sum() / degree.sum()
    return {"spread": float(y.max() - y.min()), "off": float((y - mean).abs().max())}


def problem(quick: bool) -> tuple[str, Graph, Tensor]:
    """A connected graph without loops, and one number a node."""
    if quick:
        graph = communities(120, 500, 3).remove_self_loops().largest_component()[0]
        return "simulated", graph, torch.randn(graph.num_sources, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = citation_data("cora")
    if data.x is None or data.y is None:
        raise BenchmarkError("this Cora has no features x or labels y: take cora_planetoid.npz or the original files whole")
    return "Cora", data.graph, data.x[:, :8].double().sum(1) + data.y


def run(settings: Settings) -> Result:
    """Compare, and judge; raises BenchmarkError without the data."""
    if settings.device != "cpu":
        raise BenchmarkError("random-walk runs on the CPU; leave --device out")
    name, graph, x = problem(settings.quick)
    generator = torch.Generator().manual_seed(0)
    table = Table(f"{name}: {STEPS} steps of forward Euler, size {STEP:g}, against walks from {STARTS} nodes", COLUMNS)
    for walkers, (bar, trial) in WALKERS.items():
        row = compared(graph, x, walkers, generator) | {"bar": bar}
        if not settings.quick:
            row["trial"] = trial
        fine = row["worst"] <= 4 and (bar is None or settings.quick or row["rms"] <= bar)
        table.rows.append({**row, "verdict": "met" if fine else "SHORT"})
    many = 500 if settings.quick else 20_000
    found = limit(graph, x, many)
    table.notes = [
        f"{graph.num_nodes:,} nodes, {graph.num_edges:,} edges; met: all within 4 standard errors, and the bar",
        f"after {many:,} steps the state differs from the mean weighted by degree by {found['off']:.1e}, its spread is "
        f"{found['spread']:.1e}",
    ]
    return Result([table])


def draw(result: Result, path: Path) -> None:
    """Error against the number of walkers, with the standard error."""
    from .pictures import figure, save

    rows = result.tables[0].rows
    drawn, axes = figure(figsize=(5, 3.5))
    walkers = [row["walkers"] for row in rows]
    axes.loglog(walkers, [row["rms"] for row in rows], "o-", label="rms error")
    axes.loglog(walkers, [row["expected"] for row in rows], "--", label="standard error")
    axes.set_xlabel("walkers")
    axes.legend()
    save(drawn, path)


BENCHMARKS.add(
    "random-walk",
    Benchmark(
        "random-walk",
        "forward Euler of graph diffusion as the mean over random walks (thesis, Prop. 5)",
        "20 s",
        "5 s",
        run,
        draw,
        takes_peers=False,
    ),
)
