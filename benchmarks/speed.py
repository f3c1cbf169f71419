"""The speed table: each row a problem, a peer, and the ratio that has to be reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from .registry import BENCHMARKS, Benchmark, BenchmarkError, Column, Result, Settings, Table, installed
from .report import written
from .timing import Prepared, Timing, interleaved, peak_memory

__all__ = ["FRONTS", "ROWS", "Row", "Task", "run"]

COLUMNS = [
    Column("row", "problem"),
    Column("against", "against"),
    Column("ours", "ours", "milliseconds"),
    Column("theirs", "theirs", "milliseconds"),
    Column("wall", "wall ratio", "ratio"),
    Column("ratio", "ratio", "ratio"),
    Column("target", "at least", "ratio"),
    Column("verdict", "verdict"),
    Column("ours_evaluations", "f: ours", "count"),
    Column("theirs_evaluations", "f: theirs", "count"),
    Column("difference", "differ by", "error"),
]


Field = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """A problem to be timed: `field()` builds f afresh, a plain function where f is cheap; the rest is given."""

    field: Callable[[], Field]
    y0: Tensor
    times: Tensor
    tolerance: float
    batched: bool = False


class Counted(nn.Module):
    """A field that counts its calls."""

    def __init__(self, inner: Field) -> None:
        super().__init__()
        self.inner = inner
        self.calls = [0]

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls[0] += 1
        return self.inner(t, y)


def lorenz_field() -> Field:
    def field(t: Tensor, y: Tensor) -> Tensor:
        first, second, third = y[..., 0], y[..., 1], y[..., 2]
        return torch.stack([10 * (second - first), first * (28 - third) - second, first * second - 8 / 3 * third], -1)

    return field


def linear3_field() -> Field:
    matrix = torch.tensor([[0.0, 1, 0], [-1, 0, 0.1], [0, -0.1, 0]], dtype=torch.float64)
    return lambda t, y: torch.mv(matrix, y)


def van_der_pol_field(count: int) -> Field:
    """One oscillator a row, mu from 1 to 50."""
    mu = torch.linspace(1, 50, count, dtype=torch.float64)

    def field(t: Tensor, y: Tensor) -> Tensor:
        place, speed = y[:, 0], y[:, 1]
        return torch.stack([speed, mu * (1 - place * place) * speed - place], -1)

    return field


class Perceptron(nn.Module):
    """Linear, tanh, linear, with PyTorch's initial weights doubled."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, width))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(2.0)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(y)


class Decay(nn.Module):
    """y' = -rate y with a rate for each component."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.linspace(0.1, 1, size))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.rate * y


def lorenz(quick: bool) -> Task:
    y0 = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    return Task(lorenz_field, y0, torch.tensor([0.0, 2.0 if quick else 10.0], dtype=torch.float64), 1e-8)


def linear3(quick: bool) -> Task:
    y0 = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    return Task(linear3_field, y0, torch.tensor([0.0, 20.0 if quick else 100.0], dtype=torch.float64), 1e-8)


def perceptron(batch: int, width: int, hidden: int, tolerance: float, quick: bool) -> Task:
    def field() -> nn.Module:
        torch.manual_seed(0)
        return Perceptron(width, hidden)

    torch.manual_seed(1)
    return Task(field, torch.randn(batch, width), torch.linspace(0, 10.0, 10), tolerance)


def small_perceptron(quick: bool) -> Task:
    return perceptron(20, 2, 50, 1e-5, quick)


def large_perceptron(quick: bool) -> Task:
    return perceptron(256, 64, 64, 1e-8, quick)


def van_der_pol(quick: bool) -> Task:
    count = 64 if quick else 1024
    y0 = torch.tensor([2.0, 0.0], dtype=torch.float64).repeat(count, 1)
    return Task(partial(van_der_pol_field, count), y0, torch.tensor([0.0, 20.0], dtype=torch.float64), 1e-6, batched=True)


def many_outputs(quick: bool) -> Task:
    size = 10_000
    return Task(partial(Decay, size), torch.ones(size), torch.linspace(0, 1, 200 if quick else 1600), 1e-5)


Front = Callable[[Field, Task], Tensor]


def by_solve(field: Field, task: Task, **options: Any) -> Tensor:
    """Our rich front door."""
    from solvers import solve

    options = {"batch_dim": 0, **options} if task.batched else options
    return solve(field, task.y0, task.times, method="dopri5", rtol=task.tolerance, atol=task.tolerance, **options).y


def by_odeint(field: Field, task: Task) -> Tensor:
    """Our front door with torchdiffeq's signature."""
    from solvers import odeint

    return odeint(field, task.y0, task.times, method="dopri5", rtol=task.tolerance, atol=task.tolerance)


def by_torchdiffeq(field: Field, task: Task, adjoint: bool = False) -> Tensor:
    import torchdiffeq

    integrate = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
    return integrate(field, task.y0, task.times, method="dopri5", rtol=task.tolerance, atol=task.tolerance)


def by_torchode(field: Field, task: Task) -> Tensor:
    import torchode

    term = torchode.ODETerm(field)
    controller = torchode.IntegralController(atol=task.tolerance, rtol=task.tolerance, term=term)
    solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), controller)
    times = task.times.expand(task.y0.shape[0], -1)
    return solver.solve(torchode.InitialValueProblem(y0=task.y0, t_eval=times)).ys.transpose(0, 1)


FRONTS: dict[str, tuple[str | None, Front]] = {
    # name: (the package it needs, how it solves a task); another front door of ours is one more line, named in a row
    "solve": (None, by_solve),
    "odeint": (None, by_odeint),
    "solve, checkpoint": (None, partial(by_solve, adjoint="checkpoint")),
    "torchdiffeq": ("torchdiffeq", by_torchdiffeq),
    "torchdiffeq odeint_adjoint": ("torchdiffeq", partial(by_torchdiffeq, adjoint=True)),
    "torchode": ("torchode", by_torchode),
}


@dataclass(frozen=True)
class Row:
    """One line: a task, what is measured (forward, training, backward, memory of a training step), against whom."""

    name: str
    task: Callable[[bool], Task]
    what: str
    ours: str
    theirs: str
    target: float
    repeats: int = 7


ROWS = (
    Row("Lorenz, T=10, 1e-8", lorenz, "forward", "solve", "torchdiffeq", 4, 5),
    Row("linear 3-dim, T=100, 1e-8", linear3, "forward", "solve", "torchdiffeq", 9, 5),
    Row("MLP 20x2, 10 outputs: forward", small_perceptron, "forward", "solve", "torchdiffeq", 2.8, 25),
    Row("MLP 20x2, 10 outputs: training step", small_perceptron, "training", "solve", "torchdiffeq", 2.2, 25),
    Row("MLP 256x64, 10 outputs: forward", large_perceptron, "forward", "solve", "torchdiffeq", 2.8, 9),
    Row("MLP 256x64, 10 outputs: training step", large_perceptron, "training", "solve", "torchdiffeq", 2.2, 7),
    Row(
        "MLP 256x64, checkpoint: training step",
        large_perceptron,
        "training",
        "solve, checkpoint",
        "torchdiffeq odeint_adjoint",
        4,
        5,
    ),
    Row("same, peak memory", large_perceptron, "memory", "solve, checkpoint", "torchdiffeq odeint_adjoint", 1, 3),
    Row("1,024 Van der Pol, mu 1..50, own steps", van_der_pol, "forward", "solve", "torchode", 2, 5),
    Row("1,600 outputs of 10,000 floats: backward", many_outputs, "backward", "solve", "torchdiffeq", 100, 1),
    # the other front door may cost 3 %
    Row("Lorenz, T=10, 1e-8: odeint", lorenz, "forward", "odeint", "solve", 0.97, 15),
    Row("MLP 20x2, 10 outputs: odeint forward", small_perceptron, "forward", "odeint", "solve", 0.97, 75),
    Row("MLP 20x2, 10 outputs: odeint training step", small_perceptron, "training", "odeint", "solve", 0.97, 75),
)


def loss_of(task: Task, field: Field, front: Front) -> Tensor:
    """Mean square of the outputs, with gradients to the start and the parameters cleared."""
    task.y0.grad = None
    if isinstance(field, nn.Module):
        field.zero_grad(set_to_none=True)
    return front(field, task).square().mean()


def job(task: Task, what: str, front: Front, field: Field) -> Callable[[], Any]:
    """What is timed; of a Prepared one the first half is not. It gives the outputs or the gradient to y0."""
    if what == "forward":
        return torch.no_grad()(partial(front, field, task))
    task.y0.requires_grad_()

    def backward(loss: Tensor) -> Tensor | None:
        loss.backward()
        return task.y0.grad

    if what == "backward":
        return Prepared(partial(loss_of, task, field, front), backward)
    return lambda: backward(loss_of(task, field, front))


def training_job(task: str, front: str) -> Callable[[], Any]:
    """The training step that the memory row runs in a fresh process; names, so that they can be written as text."""
    built = globals()[task](False)
    return job(built, "training", FRONTS[front][1], built.field())


def evaluations(task: Task, what: str, front: Front) -> int:
    """Calls of f in one run, forward and backward."""
    field = Counted(task.field())
    run = job(task, what, front, field)
    run()
    return field.calls[0]


STEP = "__import__('benchmarks.speed', fromlist=['speed']).training_job({!r}, {!r})"


def memory(row: Row, repeats: int) -> dict[str, Any]:
    """The line of a memory row: MB above the start, ours and theirs."""
    line: dict[str, Any] = {"row": row.name, "against": row.theirs, "target": row.target}
    peaks: dict[str, list[float]] = {row.ours: [], row.theirs: []}
    for _ in range(repeats):
        for front, found in peaks.items():
            peak = peak_memory(STEP.format(row.task.__name__, front))
            if not peak:
                return {**line, "verdict": "not measurable on this system"}
            found.append(peak)
    ours, theirs = (median(peaks[front]) for front in (row.ours, row.theirs))
    ratio = theirs / ours
    line |= {"ours": written("megabytes", ours), "theirs": written("megabytes", theirs), "ratio": ratio}
    return {**line, "verdict": "met" if ratio >= row.target else "SHORT"}


def measure(row: Row, settings: Settings) -> dict[str, Any]:
    """One line of the table."""
    package = FRONTS[row.theirs][0]
    if package and not installed(package):
        return {
            "row": row.name,
            "against": row.theirs,
            "target": row.target,
            "verdict": f"absent: {package} is not installed",
        }
    if row.what == "memory":
        return memory(row, 1 if settings.quick else row.repeats)
    task = row.task(settings.quick)
    fronts = {"ours": FRONTS[row.ours][1], "theirs": FRONTS[row.theirs][1]}
    jobs = {name: job(task, row.what, front, task.field()) for name, front in fronts.items()}
    repeats = min(row.repeats, 3) if settings.quick else row.repeats
    timings = interleaved(jobs, repeats, warm=row.repeats > 1)
    counts = {name: evaluations(task, row.what, front) for name, front in fronts.items()} if row.repeats > 1 else {}
    return line_of(row, timings, counts)


def line_of(row: Row, timings: dict[str, Timing], counts: dict[str, int]) -> dict[str, Any]:
    """The row's values from its timings."""
    ours, theirs = timings["ours"], timings["theirs"]
    ratio = theirs.median_cpu / ours.median_cpu
    return {
        "row": row.name,
        "against": row.theirs,
        "ours": 1e3 * ours.median_cpu,
        "theirs": 1e3 * theirs.median_cpu,
        "ratio": ratio,
        "wall": theirs.median_wall / ours.median_wall,
        "target": row.target,
        "verdict": "met" if ratio >= row.target else "SHORT",
        "ours_evaluations": counts.get("ours"),
        "theirs_evaluations": counts.get("theirs"),
        "difference": float((ours.value - theirs.value).abs().max()),
    }


def chosen_rows(settings: Settings) -> list[Row]:
    """Rows whose peer is among those asked for, and that run where asked."""
    if settings.device != "cpu":
        raise BenchmarkError("speed compares CPU times of one thread; leave --device out")
    if settings.peers is None:
        return list(ROWS)
    rows = [row for row in ROWS if any(row.theirs.startswith(name.split("-")[0]) for name in settings.peers)]
    if not rows:
        raise BenchmarkError(f"no row of speed is against {', '.join(settings.peers)}; its peers are torchdiffeq and torchode")
    return rows


def run(settings: Settings) -> Result:
    """Measure every row on one thread."""
    rows = chosen_rows(settings)
    torch.set_num_threads(1)
    table = Table("speed against the peers, one thread", COLUMNS, [measure(row, settings) for row in rows])
    table.notes = [
        "times: median process CPU time of interleaved runs; ratio: theirs / ours; wall ratio: the same of wall time",
        "forward: under no_grad; training: forward and backward; differ by: of the outputs or of the gradient to y0",
        "memory: how far one training step lifts the peak of a fresh process's resident memory; ratio theirs / ours",
    ]
    if settings.quick:
        table.notes.append(
            "--quick: shorter times, 64 oscillators, 200 outputs in place of 1,600: not the problems of the targets"
        )
    return Result([table])


def draw(result: Result, path: Path) -> None:
    """Ratio reached, as bars, with a mark at the target."""
    from .pictures import figure, save

    rows = [row for row in result.tables[0].rows if row.get("ratio")]
    drawn, axes = figure(figsize=(8, 0.45 * len(rows) + 1.2))
    places = range(len(rows))
    axes.barh(
        places,
        [row["ratio"] for row in rows],
        color=["tab:green" if row["verdict"] == "met" else "tab:orange" for row in rows],
    )
    axes.plot([row["target"] for row in rows], places, "k|", markersize=16, label="to be reached")
    axes.set_yticks(places, [row["row"] for row in rows], fontsize=8)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("times faster than the peer (CPU time), or times less memory")
    axes.legend(fontsize=8)
    save(drawn, path)


BENCHMARKS.add("speed", Benchmark("speed", "time and memory against torchdiffeq and torchode", "3 to 4 min", "40 s", run, draw))
