"""An epoch of GRAND against the same model written with gathers and torchdiffeq, in one run, weights and data alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from graphops import Graph
from graphops.attention import squareplus
from graphops.data import NodeData
from graphops.nn import GraphDiffusion

from .citation_models import GRAND, NORMS, TOLERANCES
from .citation_training import Job, Training, protocol, training_for
from .graph_operators import authors_scores, authors_shares, gathered_spmm, scattered_spmm
from .graph_problems import allocator
from .registry import Column, Result, Settings, Table, installed, need
from .timing import interleaved, peak_memory

__all__ = ["Gathered", "compare", "draw", "epoch_job"]

COLUMNS = [
    Column("name", "one epoch"),
    Column("cpu", "CPU", "milliseconds"),
    Column("wall", "wall", "milliseconds"),
    Column("ratio", "torchdiffeq / this", "ratio"),
    Column("bar", "bar", "ratio"),
    Column("peak", "peak", "megabytes"),
    Column("nfe", "NFE", "count"),
    Column("nfe_backward", "backwards", "count"),
    Column("error", "differs", "error"),
    Column("verdict", "verdict"),
]
PEER, AUTHORS = "torchdiffeq dopri5, gathers", "torchdiffeq dopri5, authors' kernels"
"""The second, with torch-scatter, is what bars are of where it is installed; else the first, of torch alone."""
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "l": {"exp_linear": {}, "dopri5, checkpoint": {"method": "dopri5", "adjoint": "checkpoint"}, PEER: {}},
    "nl": {
        "dopri5, checkpoint": {"method": "dopri5", "adjoint": "checkpoint"},
        "dopri5, backprop": {"method": "dopri5", "adjoint": "backprop"},
        "rkc2, backprop": {"method": "rkc2", "rtol": 5e-4, "atol": 5e-4},
        PEER: {},
    },
}
BARS = {("l", "exp_linear"): 12.0, ("l", "dopri5, checkpoint"): 3.5, ("nl", "dopri5, checkpoint"): 2.0}
PEAK = {("nl", "dopri5, checkpoint"): 100.0}
"""MB above the start, of Cora's largest component."""
STATEMENT = "__import__('benchmarks.grand_timing', fromlist=['x']).epoch_job({!r}, {!r}, {!r}, {!r}, {!r})"


class Gathered(nn.Module):
    """The model of a `GraphDiffusion`, parameters shared, with dense features, values of d numbers at the edges, and odeint."""

    stats = None
    product = staticmethod(gathered_spmm)

    def __init__(self, model: GraphDiffusion, data: NodeData, norm: str) -> None:
        super().__init__()
        self.model: Any
        self.model, self.data, self.norm = model, data, norm
        self.calls = 0

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, ``(n, H, F)``."""
        attention = self.model.attention
        q, k = (part(x).unflatten(1, (attention.heads, attention.width)) for part in (attention.query, attention.key))
        return q, k

    def by(self, graph: Graph) -> tuple[Tensor, bool]:
        """The node at each edge over whose edges shares sum to 1, and whether by squareplus."""
        how = NORMS[self.norm]
        return graph.source if how["over"] == "outgoing" else graph.target, how["normaliser"] == "squareplus"

    def lowered(self, scores: Tensor) -> Tensor:
        """Less their maximum, where the authors' code is followed in that too."""
        return scores - scores.max() if self.norm == "authors" else scores

    def weights(self, graph: Graph, x: Tensor) -> Tensor:
        """Shares of the edges, a mean over heads."""
        q, k = self.ends(x)
        scores = (q.index_select(0, graph.target) * k.index_select(0, graph.source)).sum(-1) / q.shape[-1] ** 0.5
        index, by_squareplus = self.by(graph)
        if by_squareplus:
            scores = squareplus(self.lowered(scores))
        else:
            rows = index[:, None].expand_as(scores)
            top = scores.new_full((graph.num_nodes, scores.shape[1]), -torch.inf).scatter_reduce(0, rows, scores, "amax")
            scores = (scores - top.detach().index_select(0, index)).exp()
        total = scores.new_zeros(graph.num_nodes, scores.shape[1]).index_add(0, index, scores)
        return (scores / total.index_select(0, index)).mean(1)

    def forward(self, features: Graph, edges: Graph, *, trusted: Tensor | None = None) -> Tensor:
        import torchdiffeq

        model, self.calls = self.model, 0
        x: Any = self.data.x
        graph = model.graph_of(edges, len(x))
        z = model.encoder(dropout(x, model.input_dropout, self.training))
        alpha, source = torch.sigmoid(model.raw_alpha), model.beta * z.detach()
        fixed = self.weights(graph, z) if model.field == "linear" else None

        def field(t: Tensor, x: Tensor) -> Tensor:
            self.calls += 1
            weights = self.weights(graph, x) if fixed is None else fixed
            return alpha * (self.product(graph, weights, x) - x) + source

        times = torch.tensor([0.0, model.time])
        return model.decode(torchdiffeq.odeint(field, z, times, method="dopri5", **TOLERANCES)[-1])


class Authors(Gathered):
    """The same with the kernels of graph-neural-pde."""

    product = staticmethod(scattered_spmm)

    def weights(self, graph: Graph, x: Tensor) -> Tensor:
        index, by_squareplus = self.by(graph)
        scores = self.lowered(authors_scores(graph, *self.ends(x)))
        return authors_shares(index, graph.num_targets, scores, by_squareplus).mean(1)


PEERS: dict[str, type[Gathered]] = {PEER: Gathered, AUTHORS: Authors}


def cases_of(variant: str) -> dict[str, dict[str, Any]]:
    """The lines of a variant."""
    return CASES[variant] | ({AUTHORS: {}} if installed("torch_scatter") else {})


def case_training(case: str, dataset: str, variant: str, graph: str, norm: str) -> Training:
    """Model and data of one line, from the same seed."""
    job = Job(dataset, 0, f"grand-{variant}", graph, norm=norm, recipe=GRAND[dataset], options=cases_of(variant)[case])
    training = training_for(job)
    if case in PEERS:
        training.model = PEERS[case](training.model, training.data, norm)
    return training


def epoch_job(case: str, dataset: str, variant: str, graph: str, norm: str) -> Callable[[], Any]:
    """One epoch of one line; names, so that a fresh process can be told which."""
    return case_training(case, dataset, variant, graph, norm).step


def compare(settings: Settings) -> Result:
    """Interleaved epochs of every line; peaks in fresh processes; outputs of the same weights beside the peer's."""
    need("torchdiffeq")
    dataset, variant, graph, norm = (settings.options[name] for name in ("dataset", "variant", "graph", "norm"))
    variant = "l" if variant == "l" else "nl"
    trainings = {case: case_training(case, dataset, variant, graph, norm) for case in cases_of(variant)}
    outputs = evaluated(trainings)
    repeats = 1 if settings.quick else 15 if settings.full else 5
    timings = interleaved({case: training.step for case, training in trainings.items()}, repeats)
    slow = AUTHORS if AUTHORS in timings else PEER
    table = Table(f"GRAND-{variant}, one training epoch", COLUMNS)
    for case, timing in timings.items():
        nfe, backwards = timing.value
        bar, most = BARS.get((variant, case)), PEAK.get((variant, case))
        peak = None if settings.quick else peak_memory(STATEMENT.format(case, dataset, variant, graph, norm))
        ratio = timings[slow].median_cpu / timing.median_cpu
        line = {"name": case, "cpu": 1e3 * timing.median_cpu, "wall": 1e3 * timing.median_wall, "ratio": ratio, "bar": bar}
        line |= {"peak": peak, "nfe": nfe, "nfe_backward": backwards, "error": outputs[case]}
        if case in PEERS:
            line["nfe"] = trainings[case].model.calls
        if bar is not None:
            line["verdict"] = "met" if ratio >= bar and (most is None or peak is None or peak <= most) else "SHORT"
        table.rows.append(line)
    job = Job(dataset, 0, graph=graph)
    table.notes = [
        f"{protocol(job)}; d = {GRAND[dataset].hidden}; attention: {norm}; allocator: {allocator()}",
        f"one thread; medians of {repeats} rounds",
        "peers: dense features, torchdiffeq's dopri5 with backpropagation, the same tolerances; gathers and index_add, or "
        f"advanced indexing and torch_scatter as the authors' code; ratios are to {slow!r}",
        "differs: of the output of the same weights from the peer's, relative to its largest; peak: MB above the start",
    ]
    return Result([table], {"against": "torchdiffeq"})


@torch.no_grad()
def evaluated(trainings: dict[str, Training]) -> dict[str, float]:
    """How far outputs at weights that are not those of the start, alike for all, are from the peer's."""
    torch.manual_seed(1)
    source = trainings[PEER].model.model
    for parameter in source.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    found = {}
    for case, training in trainings.items():
        own = training.model.model if case in PEERS else training.model
        own.load_state_dict(copy.deepcopy(source.state_dict()))
        training.model.eval()
        found[case] = training.output()
    largest = found[PEER].abs().max()
    return {case: float((output - found[PEER]).abs().max() / largest) for case, output in found.items()}


def draw(result: Result, path: Path) -> None:
    """Milliseconds as bars."""
    from .pictures import figure, save

    rows = result.tables[0].rows
    drawn, axes = figure(figsize=(7, 0.6 * len(rows) + 1.2))
    axes.barh([row["name"] for row in rows], [row["cpu"] for row in rows], color="tab:green")
    axes.invert_yaxis()
    axes.set_xlabel("CPU time of an epoch, ms")
    save(drawn, path)
