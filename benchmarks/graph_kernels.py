"""Graph kernels: operator by implementation by graph, with the ratios that have to be reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphops
from graphops import Graph

from . import graph_memory
from .graph_operators import HEADS, OPERATORS, Function, Operator
from .graph_problems import GRAPHS, GraphProblem, allocator, made, quick_graphs
from .registry import BENCHMARKS, Benchmark, BenchmarkError, Column, Result, Settings, Table
from .timing import interleaved, one_thread

__all__ = ["RATIOS", "Ratio", "run"]

MODES = ("forward", "training", "double")

KERNELS = [
    Column("name", "implementation"),
    Column("operator", "operator"),
    Column("graph", "graph"),
    Column("forward", "forward", "milliseconds"),
    Column("training", "with backward", "milliseconds"),
    Column("double", "and again", "milliseconds"),
    Column("rate", "GB/s", "number"),
    Column("share", "of copy", "percent"),
]
TARGETS = [
    Column("row", "what"),
    Column("graph", "graph"),
    Column("against", "against"),
    Column("ours", "ours", "number"),
    Column("theirs", "theirs", "number"),
    Column("ratio", "ratio", "number"),
    Column("target", "bar"),
    Column("verdict", "verdict"),
]


def job(function: Function, graph: Graph, operands: list[Tensor], mode: str) -> Callable[[], Any]:
    """One evaluation: forward; with gradients to all operands; or those and the gradients of a function of them."""
    if mode == "forward":
        return torch.no_grad()(lambda: function(graph, *operands))
    leaves = [x.detach().requires_grad_() for x in operands]

    def gradients() -> Any:
        out = function(graph, *leaves)
        if mode == "training":
            return torch.autograd.grad(out, leaves, out.detach())
        first = torch.autograd.grad(out, leaves, out, create_graph=True)
        return torch.autograd.grad(first, leaves, [x.detach() for x in leaves])

    return gradients


def jobs(operator: Operator, graph: Graph, operands: list[Tensor]) -> dict[tuple[str, str], Callable[[], Any]]:
    """Everything to be timed of one operator, those that cannot be differentiated twice left out."""
    found = {}
    for name, function in operator.implementations().items():
        modes = MODES if name not in operator.forward_only else ("forward",)
        for mode in modes:
            found[name, mode] = job(function, graph, operands, mode)
    return found


def in_a_row(run: Callable[[], Any], calls: int) -> Callable[[], Any]:
    """`run`, `calls` times."""

    def repeated() -> None:
        for _ in range(calls):
            run()

    return repeated


def copy_rate() -> float:
    """GB/s of a stream copy of 240 MB, bytes counted once, as those of the kernels are."""
    source = torch.rand(60_000_000)
    target = torch.empty_like(source)
    timing = interleaved({"copy": lambda: target.copy_(source)}, 7)["copy"]
    return source.numel() * 4 / min(timing.cpu) / 1e9


def rounds(todo: dict[tuple[str, str], Callable[[], Any]], calls: int, *modes: str) -> dict[str, Callable[[], Any]]:
    """What is to be timed in these modes, by name, `calls` times each."""
    return {" / ".join(key): in_a_row(run, calls) for key, run in todo.items() if key[1] in modes}


def measure(name: str, problem: GraphProblem, graph: Graph, copy: float) -> list[dict[str, Any]]:
    """The lines of one graph."""
    lines = []
    for operator_name, operator in OPERATORS.items():
        if problem.operators is not None and operator_name not in problem.operators:
            continue
        operands = operator.operands(graph, problem.width)
        todo = jobs(operator, graph, operands)
        # The second derivative takes most of the time, and no bar is set for it.
        timings = interleaved(rounds(todo, problem.calls, "forward", "training"), problem.repeats)
        timings |= interleaved(rounds(todo, problem.calls, "double"), 1, warm=False)
        for implementation in dict.fromkeys(key[0] for key in todo):
            line: dict[str, Any] = {"name": implementation, "operator": operator_name, "graph": name}
            for mode in MODES:
                if (implementation, mode) in todo:
                    line[mode] = 1e3 * min(timings[f"{implementation} / {mode}"].cpu) / problem.calls
            line["rate"] = operator.traffic(graph, problem.width) / line["forward"] / 1e6
            line["share"] = 100 * line["rate"] / copy
            lines.append(line)
    return lines


@dataclass(frozen=True)
class Ratio:
    """A bar: how many times faster ours is than `against` in `mode`, on each graph that has one."""

    what: str
    operator: str
    mode: str
    against: str
    bars: dict[str, float]


RATIOS = (
    Ratio("1 SpMM forward", "spmm", "forward", "gather, index_add", {"CS-like": 20, "arxiv-like": 8}),
    Ratio("2 SpMM forward", "spmm", "forward", "torch_scatter.scatter_add", {"arxiv-like": 6}),
    Ratio("3 SpMM with backward", "spmm", "training", "gather, index_add", {"Cora": 4, "CS-like": 15, "arxiv-like": 7}),
    Ratio("4 softmax forward", "softmax", "forward", "torch_scatter.scatter_softmax", {"CS-like": 3, "arxiv-like": 3}),
    Ratio("5 attention step", "attention", "training", "authors' form", {"Cora": 5, "CS-like": 6, "arxiv-like": 6}),
    Ratio("5 attention step", "attention", "training", "gather, scatter_reduce", {"Cora": 2, "CS-like": 5}),
)


def compared(ratio: Ratio, graph: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The line of one bar on one graph."""
    bar = ratio.bars[graph]
    line: dict[str, Any] = {"row": ratio.what, "graph": graph, "against": ratio.against, "target": f"{bar:g} or more"}
    found = {x["name"]: x.get(ratio.mode) for x in lines if (x["graph"], x["operator"]) == (graph, ratio.operator)}
    if not found:
        return {**line, "verdict": "not run: no such graph here"}
    ours, theirs = found["graphops, native"], found.get(ratio.against)
    if ours is None or theirs is None:
        return {**line, "verdict": "absent: its package is not installed"}
    verdict = "met" if theirs / ours >= bar else "SHORT"
    return {**line, "ours": ours, "theirs": theirs, "ratio": theirs / ours, "verdict": verdict}


def bandwidth(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Row 6: the share of a stream copy that the forward product reaches, each row of x counted once an edge."""
    for line in lines:
        if (line["name"], line["operator"], line["graph"]) == ("graphops, native", "spmm", "arxiv-like"):
            verdict = "met" if line["share"] >= 30 else "SHORT"
            found = {"ours": line["rate"], "theirs": 100 * line["rate"] / line["share"], "ratio": line["share"] / 100}
            what = {"row": "6 SpMM forward, GB/s", "graph": "arxiv-like", "against": "stream copy"}
            return [{**what, **found, "target": "0.3 or more", "verdict": verdict}]
    return []


def adjointness(graph: Graph, name: str) -> dict[str, Any]:
    """Row 21, second half: <A x, y> against <x, A^T y> and the weights' <w, sddmm>, float64, relative to the norms."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(graph.num_edges, dtype=torch.float64, generator=generator)
    x, y = (torch.randn(graph.num_sources, 16, dtype=torch.float64, generator=generator) for _ in range(2))
    forward = (graphops.spmm(graph, weights, x) * y).sum()
    others = (x * graphops.spmm(graph.reverse(), weights, y)).sum(), (weights * graphops.sddmm(graph, y, x)).sum()
    worst = max(float(abs(forward - other)) for other in others) / float(x.norm() * y.norm())
    verdict = "met" if worst <= 1e-12 else "SHORT"
    what = {"row": "21 adjointness, float64", "graph": name, "against": "transpose and sampled product"}
    return {**what, "ours": worst, "target": "1e-12 or less", "verdict": verdict}


def second_derivatives() -> list[dict[str, Any]]:
    """Row 8: `gradgradcheck` in float64 on a graph with parallel edges, a loop and a node without edges."""
    graph = Graph(torch.tensor([[1, 2, 0, 0, 4, 4, 2, 5, 4, 5], [3, 0, 1, 2, 2, 2, 4, 4, 5, 5]]), 7)
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    cases: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "SpMM": (lambda w, x: graphops.spmm(graph, w, x), (leaf(10), leaf(7, 3))),
        "SDDMM": (lambda q, k: graphops.sddmm(graph, q, k), (leaf(7, 3), leaf(7, 3))),
        "attention": (lambda q, k, v: graphops.attend(graph, q, k, v), tuple(leaf(7, 2, 3) for _ in range(3))),
    }
    lines = []
    for name, (function, inputs) in cases.items():
        passed = torch.autograd.gradgradcheck(function, inputs, raise_exception=False)
        line = {"row": f"8 second derivatives: {name}", "graph": "7 nodes", "against": "differences"}
        lines.append({**line, "target": "pass", "verdict": "met" if passed else "SHORT"})
    return lines


def run(settings: Settings) -> Result:
    """Time every operator on every graph on one thread, then set the ratios against their bars."""
    one_thread(settings, "graph-kernels compares times of one CPU thread")
    copy = copy_rate()
    kernels = Table("graph kernels, one thread, float32", KERNELS)
    targets = Table("what has to be reached", TARGETS)
    checked: list[dict[str, Any]] = []
    for name, problem in (quick_graphs() if settings.quick else GRAPHS).items():
        try:
            graph = problem.build() if settings.quick else made(name)
        except BenchmarkError as error:
            kernels.notes.append(f"{name} left out: {error}")
            continue
        kernels.rows += measure(name, problem, graph, copy)
        kernels.notes.append(f"{name}: {graph.num_nodes:,} nodes, E = {graph.num_edges:,}, d = {problem.width}, {HEADS} heads")
        checked.append(adjointness(graph, name))
    targets.rows = [compared(ratio, graph, kernels.rows) for ratio in RATIOS for graph in ratio.bars]
    targets.rows += [*bandwidth(kernels.rows), *graph_memory.targets(settings), *second_derivatives(), *checked]
    kernels.notes += [
        f"allocator: {allocator()}; stream copy {copy:.1f} GB/s; times: minimum process CPU time of interleaved runs",
        f"reductions take {HEADS} numbers an edge; edges come sorted by target; GB/s: of the forward pass, nothing read twice",
        "and again, of one run: forward, backward of half the square of the result, and the derivative of that gradient",
    ]
    targets.notes = ["times in ms and ratios theirs / ours; memory in MB above the start and ours / theirs; bandwidth in GB/s"]
    if settings.quick:
        targets.notes.append("--quick: small graphs, on which no ratio is judged")
        for row in targets.rows:
            row["verdict"] = "not judged" if row["verdict"] == "SHORT" else row["verdict"]
    return Result([kernels, targets])


def draw(result: Result, path: Path) -> None:
    """Forward times of every implementation, a panel an operator."""
    from .pictures import figure, save

    rows = [row for row in result.tables[0].rows if row["operator"] in ("softmax", "spmm", "attention")]
    drawn, axes = figure(figsize=(8, 0.28 * len(rows) + 1.2))
    colours = ["tab:green" if row["name"] == "graphops, native" else "tab:gray" for row in rows]
    axes.barh(range(len(rows)), [row["forward"] for row in rows], color=colours)
    axes.set_yticks(range(len(rows)), [f"{row['graph']}, {row['operator']}: {row['name']}" for row in rows], fontsize=7)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("forward, ms (green: graphops, native)")
    save(drawn, path)


BENCHMARKS.add(
    "graph-kernels",
    Benchmark(
        "graph-kernels",
        "graph operators against torch-scatter, PyG and torch.sparse",
        "25 min",
        "1 min",
        run,
        draw,
        takes_peers=False,
    ),
)
