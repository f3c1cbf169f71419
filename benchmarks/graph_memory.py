"""Peak memory of graph operators with their backward, ours and written with gathers, each in a fresh process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from .graph_operators import OPERATORS
from .graph_problems import GRAPHS, allocator, made, quick_graphs
from .registry import BENCHMARKS, Benchmark, BenchmarkError, Column, Result, Settings, Table
from .timing import peak_memory

__all__ = ["run", "targets", "training_job"]

COLUMNS = [
    Column("operator", "operator with backward"),
    Column("graph", "graph"),
    Column("ours", "ours", "megabytes"),
    Column("theirs", "gathers", "megabytes"),
    Column("ratio", "ours / gathers", "number"),
    Column("edges", "one (E, d)", "megabytes"),
]
GATHERS = {"attention": "gather, scatter_reduce", "spmm": "gather, index_add"}
BARS = {"attention": 0.25, "spmm": 0.1}
STEP = "__import__('benchmarks.graph_memory', fromlist=['x']).training_job({!r}, {!r}, {!r}, {!r})"


def training_job(graph_name: str, operator_name: str, implementation: str, quick: bool) -> Callable[[], Any]:
    """Forward and backward of one implementation; names, so that a fresh process can be told which."""
    problem = (quick_graphs() if quick else GRAPHS)[graph_name]
    graph = problem.build() if quick else made(graph_name)
    operator = OPERATORS[operator_name]
    function = graph_function(operator_name, implementation)
    leaves = [x.requires_grad_() for x in operator.operands(graph, problem.width)]
    cotangent = torch.ones(graph.num_targets, problem.width)
    return lambda: torch.autograd.grad(function(graph, *leaves), leaves, cotangent)


def graph_function(operator_name: str, implementation: str) -> Callable[..., torch.Tensor]:
    operator = OPERATORS[operator_name]
    return operator.ours if implementation == "ours" else operator.others[implementation]


def measured(operator: str, graph: str, settings: Settings) -> dict[str, Any]:
    """One line: median of three fresh processes each."""
    line: dict[str, Any] = {"operator": operator, "graph": graph}
    for key, implementation in (("ours", "ours"), ("theirs", GATHERS[operator])):
        statement = STEP.format(graph, operator, implementation, settings.quick)
        peaks = [peak for _ in range(1 if settings.quick else 3) if (peak := peak_memory(statement))]
        if peaks:
            line[key] = median(peaks)
    if "ours" in line and "theirs" in line:
        line["ratio"] = line["ours"] / line["theirs"]
    return line


def targets(settings: Settings) -> list[dict[str, Any]]:
    """Row 7 on the graph of middle size, in the columns of graph-kernels."""
    lines = []
    for operator, bar in BARS.items():
        found = measured(operator, "CS-like", settings)
        line = {"row": f"7 peak memory, MB: {operator}", "graph": "CS-like", "against": GATHERS[operator]}
        ratio = found.get("ratio")
        verdict = "not measurable here" if ratio is None else "met" if ratio <= bar else "SHORT"
        kept = {key: found.get(key) for key in ("ours", "theirs", "ratio")}
        lines.append({**line, **kept, "target": f"{bar:g} or less", "verdict": verdict})
    return lines


def run(settings: Settings) -> Result:
    """Measure both operators on the graphs of middle and large size."""
    if settings.device != "cpu":
        raise BenchmarkError("graph-memory reads the resident memory of a process; leave --device out")
    table = Table("peak memory of graph operators, forward and backward", COLUMNS)
    for graph in ("CS-like", "arxiv-like"):
        problem = (quick_graphs() if settings.quick else GRAPHS)[graph]
        built = problem.build() if settings.quick else made(graph)
        edges = built.num_edges * problem.width * 4 / 2**20
        table.rows += [{**measured(operator, graph, settings), "edges": edges} for operator in GATHERS]
        table.notes.append(f"{graph}: {built.num_nodes:,} nodes, E = {built.num_edges:,}, d = {problem.width}")
    table.notes += [
        f"allocator: {allocator()}; how far one forward and backward lifts the peak of a fresh process's resident memory",
        "what is kept after the first call (permutations, int32 indices) is not counted",
    ]
    return Result([table])


def draw(result: Result, path: Path) -> None:
    """Both as bars."""
    from .pictures import figure, save

    rows = [row for row in result.tables[0].rows if row.get("ratio")]
    drawn, axes = figure(figsize=(7, 0.7 * len(rows) + 1.2))
    places = range(len(rows))
    axes.barh([p - 0.2 for p in places], [row["ours"] for row in rows], 0.4, color="tab:green", label="graphops")
    axes.barh([p + 0.2 for p in places], [row["theirs"] for row in rows], 0.4, color="tab:gray", label="gathers")
    axes.set_yticks(places, [f"{row['graph']}, {row['operator']}" for row in rows])
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("MB above the start")
    axes.legend()
    save(drawn, path)


BENCHMARKS.add(
    "graph-memory",
    Benchmark(
        "graph-memory",
        "peak memory of graph operators against gathers",
        "4 min",
        "20 s",
        run,
        draw,
        takes_peers=False,
    ),
)
