"""Training on citation graphs: the split, one run from a seed, and many runs of which none that is finished is done again."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from graphops import Graph, dirichlet_energy
from graphops.data import NodeData, Split, random_split
from graphops.nn import GraphDiffusion
from solvers import SolveError, Stats

from .citation_models import GRAND, LAYERED, Recipe, grand_model, graph_for, layered
from .graph_problems import citation_data
from .registry import BenchmarkError

__all__ = [
    *("DATASETS", "Job", "Ledger", "Run"),
    *("campaign", "prepared", "protocol", "spread", "split_for", "summary", "trained"),
]

DATASETS = ("cora", "citeseer")
DEVELOPMENT = 1500
"""Random splits: nodes out of which those for training are drawn, and whose rest validates; all others test."""


@dataclass(frozen=True)
class Job:
    """One training, told in full: two equal ones give the same result. `options` are of `GraphDiffusion` and `solve`."""

    dataset: str
    seed: int
    model: str = "grand-l"
    graph: str = "lcc"
    split: str = "planetoid"
    per_class: int = 20
    norm: str = "col"
    recipe: Recipe = GRAND["cora"]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


@dataclass
class Run:
    """What a training came to: accuracies in percent at the epoch of the best validation score, and its work."""

    test_accuracy: float
    val_accuracy: float
    epoch: int
    epochs: int
    status: str
    nfe: float | None
    nfe_backward: float | None
    seconds: float
    cpu_seconds: float
    energy: float
    counts: dict[str, int]


# --- data ------------------------------------------------------------------------------------------------------------


@cache
def prepared(dataset: str, graph: str) -> NodeData:
    """A data set, its largest component or all of it."""
    return citation_data(dataset, component=graph == "lcc")


@cache
def diffusion_graph(dataset: str, graph: str, variant: str) -> Graph:
    return graph_for(prepared(dataset, graph), variant)


def split_for(data: NodeData, split: str, per_class: int = 20, seed: int = 0) -> Split:
    """The fixed one without nodes of unknown label, or a random one; of one seed, fewer labels are some of the more.

    Raises BenchmarkError where the data have no labels, or no fixed split.
    """
    if data.y is None:
        raise BenchmarkError("these data have no labels y: nothing can be trained on them")
    if split == "planetoid":
        if data.split is None:
            raise BenchmarkError("these data have no fixed split: ask for --split random")
        return Split(*(mask & (data.y >= 0) for mask in data.split))
    known = int((data.y >= 0).sum())
    return random_split(data.y, per_class, min(DEVELOPMENT, 3 * known // 5), torch.Generator().manual_seed(seed))


def protocol(job: Job) -> str:
    """Data, graph and split in words, with the counts."""
    data = prepared(job.dataset, job.graph)
    split = split_for(data, job.split, job.per_class, job.seed)
    parts = ", ".join(f"{int(mask.sum())} {name}" for name, mask in zip(("training", "validation", "test"), split))
    graph = "largest component" if job.graph == "lcc" else "full graph"
    labels = "" if job.split == "planetoid" else f", {job.per_class} labels per class"
    counts = f"{data.graph.num_nodes:,} nodes, {data.graph.num_edges // 2:,} edges"
    return f"{job.dataset}, {graph} ({counts}), {job.split} split{labels} ({parts} nodes)"


# --- one training ----------------------------------------------------------------------------------------------------


def built(job: Job, data: NodeData) -> tuple[nn.Module, Graph]:
    """The model of a job from its seed, and the graph for it."""
    torch.manual_seed(job.seed)
    if job.model in LAYERED:
        return layered(job.model, data, job.recipe, **job.options)
    variant = job.model.partition("-")[2]
    return grand_model(data, job.recipe, variant, job.norm, **job.options), diffusion_graph(job.dataset, job.graph, variant)


@dataclass
class Training:
    """Data, model and optimiser between two epochs."""

    data: Any
    split: Split
    graph: Graph
    model: Any
    optimiser: torch.optim.Optimizer

    def output(self) -> Tensor:
        return self.model(self.data.features, self.graph, trusted=self.split.train)

    def step(self) -> tuple[int | None, int | None]:
        """One epoch; evaluations of f forwards and backwards, None of models without."""
        self.model.train()
        self.optimiser.zero_grad()
        train = self.split.train
        loss = cross_entropy(self.output()[train], self.data.y[train])
        if not bool(loss.isfinite()):
            raise BenchmarkError("the loss is not finite")
        loss.backward()
        self.optimiser.step()
        stats: Stats | None = self.model.stats
        if stats is None:
            return None, None
        return int(stats.nfe), None if stats.backward is None else int(stats.backward.nfe)

    @torch.no_grad()
    def scores(self) -> tuple[float, float]:
        """Accuracy on validation and test nodes, in percent."""
        self.model.eval()
        right = self.output().argmax(1) == self.data.y
        val, test = (100 * float(right[mask].float().mean()) for mask in self.split[1:])
        return val, test


def training_for(job: Job, data: NodeData | None = None) -> Training:
    """Everything before the first epoch."""
    data = prepared(job.dataset, job.graph) if data is None else data
    split = split_for(data, job.split, job.per_class, job.seed)
    model, graph = built(job, data)
    recipe = job.recipe
    optimiser = getattr(torch.optim, recipe.optimiser)(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    return Training(data, split, graph, model, optimiser)


def trained(job: Job, tick: Callable[[], Any] = lambda: None) -> tuple[Run, Training]:
    """One training, and the model as its last epoch left it; a solve that fails ends it and is told in `status`."""
    training = training_for(job)
    wall, cpu = time.perf_counter(), time.process_time()
    val = test = 0.0
    best = epoch = 0
    status, work = "done", []
    for epoch in range(1, job.recipe.epochs + 1):
        try:
            work.append(training.step())
            scores = training.scores()
        except (SolveError, BenchmarkError) as error:
            status = f"epoch {epoch}: {error}"
            break
        tick()
        if scores[0] > val:
            (val, test), best = scores, epoch
        elif job.recipe.patience is not None and epoch - best >= job.recipe.patience:
            break
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    counts = {name: int(mask.sum()) for name, mask in zip(("train", "val", "test"), training.split)}
    counts |= {"nodes": training.data.graph.num_sources, "edges": training.data.graph.num_edges // 2}
    nfe, backwards = (median_of([step[i] for step in work]) for i in (0, 1))
    energy = smoothness(training)
    return Run(test, val, best, epoch, status, nfe, backwards, seconds, cpu_seconds, energy, counts), training


def median_of(values: list[int | None]) -> float | None:
    """Of those that are there."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


@torch.no_grad()
def smoothness(training: Training) -> float:
    """Dirichlet energy of x_i / sqrt(1 + d_i), x the last hidden state, over |x|^2 (Cai & Wang 2020): from 0, the limit of
    deep GCNs, to 1."""
    model, features = training.model.eval(), training.data.features
    if isinstance(model, GraphDiffusion):
        try:
            state = model.diffuse(model.encode(features), training.graph, training.split.train)
        except SolveError:
            return math.nan
    else:
        state = model.states(features, training.graph)[-2:][0]
    graph = training.data.graph
    norm = float(state.square().sum())
    scaled = state / (1 + graph.degree()).sqrt()[:, None]
    return float(dirichlet_energy(graph, scaled)) / norm if norm > 0 else 0.0


# --- many ------------------------------------------------------------------------------------------------------------


class Ledger:
    """Finished runs, a line of JSON each, in a file that an interrupted campaign goes on with."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.runs: dict[str, Run] = {}
        if path is not None and path.is_file():
            for line in path.read_text().splitlines():
                try:
                    record = json.loads(line)
                    self.runs[json.dumps(record["job"], sort_keys=True)] = Run(**record["run"])
                except (ValueError, KeyError, TypeError):
                    continue  # cut off in the middle of a line: that run is done again

    def add(self, job: Job, run: Run) -> None:
        self.runs[job.key] = run
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"job": json.loads(job.key), "run": asdict(run)}) + "\n")


class Bar:
    """Progress of a campaign: a bar of epochs on a terminal, and one line a run anywhere."""

    def __init__(self, jobs: list[Job]) -> None:
        from rich.progress import Progress, TimeRemainingColumn

        self.bar = Progress(*Progress.get_default_columns()[:3], TimeRemainingColumn(), transient=True)
        self.task = self.bar.add_task("epochs", total=sum(job.recipe.epochs for job in jobs))
        self.planned = 0

    def __enter__(self) -> Bar:
        self.bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()

    def tick(self) -> None:
        self.bar.advance(self.task)

    def finished(self, job: Job, run: Run) -> None:
        self.planned += job.recipe.epochs
        self.bar.update(self.task, completed=self.planned)
        labels = f"{job.per_class} labels, " if job.split == "random" else ""
        time = "" if job.recipe.time is None else f"T = {job.recipe.time:g}, "
        source = f"source {job.options['source'] or 'none'}, " if "source" in job.options else ""
        result = f"test {run.test_accuracy:.2f} % at epoch {run.epoch} of {run.epochs}, {run.cpu_seconds:.1f} s CPU"
        self.bar.console.print(
            f"{job.dataset} {job.model}, {time}{source}{labels}seed {job.seed}: {result if run.status == 'done' else run.status}",
            highlight=False,
            soft_wrap=True,
        )


def campaign(jobs: Iterable[Job], ledger: Ledger) -> list[Run]:
    """The runs of all jobs, in order; those that the ledger has are taken from it."""
    jobs = list(jobs)
    missing = [job for job in {job.key: job for job in jobs}.values() if job.key not in ledger.runs]
    if len(missing) < len(jobs) and ledger.path is not None:
        print(f"{len(jobs) - len(missing)} of {len(jobs)} runs are in {ledger.path}; remove it to have them run again")
    bar: AbstractContextManager[Any] = Bar(missing) if missing else nullcontext()
    with bar:
        for job in missing:
            run, _ = trained(job, bar.tick)  # type: ignore[attr-defined]
            ledger.add(job, run)
            bar.finished(job, run)  # type: ignore[attr-defined]
    return [ledger.runs[job.key] for job in jobs]


def summary(runs: list[Run], printed: tuple[float, float] | None) -> dict[str, Any]:
    """Cells of a table: accuracy on the test nodes beside what is printed, time of a run, runs that failed."""
    mean, deviation = spread(run.test_accuracy for run in runs)
    return {
        "mean": round(mean, 2),
        "deviation": round(deviation, 2),
        "printed": printed and f"{printed[0]} ± {printed[1]}",
        "difference": printed and round(mean - printed[0], 2),
        "seconds": spread(run.cpu_seconds for run in runs)[0],
        "status": f"{sum(run.status != 'done' for run in runs)} of {len(runs)}",
    }


def spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 of a single value."""
    values = list(values)
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
