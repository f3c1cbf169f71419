"""What the stiff suite has to reach, as data, and how it is judged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import stiff_checks
from .registry import Column, Settings, Table
from .running import Ours
from .stiff_problems import STIFF

__all__ = ["BARS", "Bar", "judged"]

COLUMNS = [
    Column("row", "row"),
    Column("what", "what"),
    Column("ours", "ours", "number"),
    Column("bar", "bar"),
    Column("verdict", "verdict"),
]
STAGES = ("scipy-bdf", "scipy-radau", "scipy-lsoda")


@dataclass(frozen=True)
class Bar:
    """One of our solvers on one problem at one tolerance: at most so many evaluations, an error not above, times faster than
    torchdiffeq's dopri5, evaluations no more than those of ``fewer`` (which got there), times faster than other peers."""

    row: int
    problem: str
    solver: str
    most: int | None = None
    error: float | None = None
    faster: float | None = None
    fewer: tuple[str, ...] = ()
    than: tuple[tuple[str, float], ...] = ()
    sharper: tuple[tuple[str, float], ...] = ()
    tolerance: float = 1e-5


FR, NK = "prox_bdf, FR, line search", "prox_bdf, Newton-Krylov"
BARS = (
    Bar(1, "diff1d_128", "rkc2", 1400, tolerance=1e-3),
    Bar(1, "diff1d_128", "rkc2", 2200, 5e-5, 200),
    Bar(1, "diff1d_128", "rkc2", 4400, tolerance=1e-7),
    Bar(2, "diff1d_128", NK, 700, tolerance=1e-3),
    Bar(2, "diff1d_128", NK, 1300, 1e-5, 100),
    Bar(2, "diff1d_128", NK, 2200, tolerance=1e-7),
    Bar(3, "diff1d_128", FR, 3000, 2e-5),
    Bar(3, "diff1d_128", "prox_bdf", 580, 1e-5),
    Bar(6, "diff1d_4096", "prox_bdf", 45_000, 2e-5, fewer=("cvode-gmres",), than=(("cvode-gmres", 1), ("cvode-gmres200", 4)),
        sharper=(("cvode-gmres", 10),)),
    Bar(7, "diff1d_4096", "rkc2", 67_000, 4e-5),
    Bar(8, "heat2d_128", "prox_bdf", 1500, 3e-5, 25),
    Bar(8, "heat2d_128", "rkc2", 2600, 3e-4, 40),
    Bar(9, "heat2d_316", "prox_bdf", 3200, 3e-5, than=(("cvode-gmres", 1),)),
    Bar(10, "allencahn_128", "prox_bdf", 820, 3e-5, 10),
    Bar(10, "allencahn_128", "rkc2", 1450, 6e-4),
    Bar(11, "bruss1d_500", "prox_bdf", 6300, 3e-5, fewer=("cvode-gmres",)),
    Bar(11, "bruss1d_500", "rkc2", 11_000),
    Bar(12, "robertson", "prox_bdf", 650, 3e-5, fewer=STAGES),
    Bar(12, "hires", "prox_bdf", 680, 2e-4, fewer=STAGES),
    Bar(12, "orego", "prox_bdf", 3100, 4e-4, fewer=STAGES),
    Bar(12, "vdp1000", "prox_bdf", 1900, 5e-4, fewer=STAGES),
    Bar(13, "robertson", "prox_bdf", 850, 1e-4, tolerance=1e-6),
    Bar(13, "hires", "prox_bdf", 800, 1e-4, tolerance=1e-6),
    Bar(13, "orego", "prox_bdf", 3900, 1e-4, tolerance=1e-6),
    Bar(13, "vdp1000", "prox_bdf", 2600, 1e-4, tolerance=1e-6),
    *(Bar(14, name, "auto", most) for name, most in
      {"diff1d_128": 1800, "robertson": 800, "hires": 1700, "orego": 3100, "vdp1000": 2100}.items()),
)  # fmt: skip


def judge(bar: Bar, found: Any) -> Iterator[dict[str, Any]]:
    """The lines of one bar; one that was not run, or did not end, says so."""
    name = f"{bar.problem}, {bar.solver}, {bar.tolerance:g}"
    line = found.get((bar.problem, bar.solver, bar.tolerance))
    if line is None or "error" not in line:
        ended = "not run" if line is None else line["ended"]
        yield {"row": str(bar.row), "what": name, "verdict": ended if line is None else f"SHORT: {ended}"}
        return
    peers = {peer: found.get((bar.problem, peer, bar.tolerance)) for peer in
             {"torchdiffeq-dopri5", *bar.fewer, *(n for n, _ in bar.than), *(n for n, _ in bar.sharper)}}  # fmt: skip
    ended = {peer: row for peer, row in peers.items() if row is not None and "error" in row}
    if bar.most is not None:
        yield below(bar.row, f"{name}: evaluations", line["evaluations"], bar.most)
    if bar.error is not None and line["error"] is not None:
        yield below(bar.row, f"{name}: error", line["error"], bar.error)
    fewest = [row["evaluations"] for peer, row in ended.items() if peer in bar.fewer]
    if fewest:
        yield below(bar.row, f"{name}: evaluations, the peers' fewest the bar", line["evaluations"], min(fewest))
    faster = (("torchdiffeq-dopri5", bar.faster),) if bar.faster else ()
    for peer, factor in (*faster, *bar.than):
        if peers[peer] is not None:
            verdict = above(bar.row, f"{name}: times faster than {peer}", peers[peer]["time"] / line["time"], factor)
            if verdict["verdict"] == "SHORT" and peer not in ended:
                verdict["verdict"] = f"at least this: {peer} {peers[peer]['ended']}"
            yield verdict
    for peer, factor in bar.sharper:
        if peer in ended:
            yield above(bar.row, f"{name}: {peer}'s error / ours", ended[peer]["error"] / line["error"], factor)


def below(row: Any, what: str, value: float, bar: float) -> dict[str, Any]:
    verdict = "met" if value <= bar else "SHORT"
    return {"row": str(row), "what": what, "ours": value, "bar": f"{bar:g} or less", "verdict": verdict}


def above(row: Any, what: str, value: float, bar: float) -> dict[str, Any]:
    verdict = "met" if value >= bar else "SHORT"
    return {"row": str(row), "what": what, "ours": value, "bar": f"{bar:g} or more", "verdict": verdict}


STEPS = 2000
RATES: tuple[tuple[str, Any, float, int], ...] = (
    ("constant", "constant", 1e-5, 16_500),
    ("line search", "line_search", 1e-6, 10_500),
    ("CG form", "cg", 1e-6, 5_500),
)
"""Row 4: the rate's name and option, the length of the residual at which the inner solver stops, evaluations."""


def fixed_steps() -> Iterator[dict[str, Any]]:
    """Rows 4 and 5."""
    problem = STIFF["diff1d_128"]()
    for name, rate, tol, most in RATES:
        run = stiff_checks.fixed_run(problem, "prox_euler", STEPS, tol, inner="fletcher_reeves", rate=rate)
        what = f"prox_euler, {STEPS} steps, FR, {name}"
        yield below(4, f"{what}: evaluations", run.evaluations, most)
        yield below(4, f"{what}: error at t = 1", run.errors[-1] if run.errors else float("nan"), 1e-6)
    run = stiff_checks.fixed_run(problem, "prox_bdf2", STEPS, 1.5e-6, inner="fletcher_reeves", rate="cg")
    yield below(5, f"prox_bdf2, {STEPS} steps, FR, CG form: evaluations", run.evaluations, 4700)
    yield below(5, "the same: error at t = 0.1 and 1", max(run.errors[-2:], default=float("nan")), 1e-6)


def exponentials(quick: bool) -> Iterator[dict[str, Any]]:
    """Row 15."""
    nodes = 2000 if quick else 20_000
    for kind, most in (("directed", 46), ("symmetric", 27)):
        run = stiff_checks.exponential(kind, nodes)
        what = f"exp_linear, {kind} graph, {nodes} x 64, t = 20"
        yield below(15, f"{what}: products", run.products, most)
        yield below(15, f"{what}: error", run.error, 2e-6)
        if run.faster is not None:
            yield above(15, f"{what}: times faster than torchdiffeq's dopri5", run.faster, 30)


def gradients() -> Iterator[dict[str, Any]]:
    """Rows 16 and 17."""
    for name in stiff_checks.CASES:
        for method in ("prox_euler", "prox_bdf2"):
            tight = stiff_checks.implicit_gradient(name, method, 1e-12, 1e-12)
            loose = stiff_checks.implicit_gradient(name, method, 1e-9, 1e-6)
            yield below(16, f"{name}, {method}: against differences, all 1e-12", tight.error, 1e-6)
            yield below(16, f"{name}, {method}: the same, 1e-9 and 1e-6", loose.error, 5e-5)
            yield below(16, f"{name}, {method}: backward passes per evaluation", loose.pulls / loose.calls, 1)
            if name == "G2":
                yield above(16, f"{name}, {method}: unrolled memory / ours", loose.unrolled / loose.memory, 300)
        run = stiff_checks.discrete_adjoint(name, 1e-6)
        yield below(17, f"{name}, prox_bdf, checkpoint, 1e-6: error", run.error, 1e-4)
        yield below(17, f"{name}, prox_bdf, checkpoint, 1e-6: backward passes per evaluation", run.ratio, 3)


def singles() -> Iterator[dict[str, Any]]:
    """Row 18."""
    from .stiff_suite import KRYLOV, single

    for name, ours, tolerance, most, error in (
        ("diff1d_128", Ours("rkc2"), 1e-3, 2000, 5e-4),
        ("diff1d_128", KRYLOV, 1e-4, 900, 1e-3),
        ("allencahn_128", Ours("prox_bdf"), 1e-5, 950, 1e-4),
    ):
        line = single(STIFF[name](), ours, tolerance)
        what = f"{name}, {ours.label}, float32, {tolerance:g}"
        yield below(18, f"{what}: evaluations", line["evaluations"], most)
        yield below(18, f"{what}: error", line.get("error", float("nan")), error)


def preconditioned() -> Iterator[dict[str, Any]]:
    """Row 20."""
    plain, what = stiff_checks.graph_step(), "power-law graph, g = 10: evaluations without / with Jacobi"
    yield above(20, f"{what}, the field's own diagonal", plain / stiff_checks.graph_step(precond="jacobi", known=True), 5)
    probed = plain / stiff_checks.graph_step(precond="jacobi")
    yield {"row": "20", "what": f"{what}, by 40 probes for one system", "ours": probed, "bar": "-", "verdict": "for comparison"}


def orders() -> Iterator[dict[str, Any]]:
    """Row 19."""
    for order, least in ((2, 1.95), (3, 2.9)):
        yield above(19, f"prox_multistage{order}: order", stiff_checks.multistage_order(order), least)


def judged(found: Any, settings: Settings) -> Table:
    """Every row whose problem was run, and, unless methods or problems were chosen, those measured on their own."""
    table = Table("what has to be reached", COLUMNS)
    bars = [bar for bar in BARS if settings.problems is None or bar.problem in settings.problems]
    table.rows = [line for bar in bars for line in judge(bar, found)]
    if settings.methods is None and settings.problems is None:
        more = [exponentials(settings.quick)]
        if not settings.quick:
            more += [fixed_steps(), gradients(), singles(), orders(), preconditioned()]
        table.rows += [line for lines in more for line in lines]
    table.rows.sort(key=lambda line: int(line["row"]))
    table.notes = ["times: ratios of medians in this run; not run: another choice of problems, or --full"]
    if settings.quick:
        table.notes.append("--quick: short budgets and small graphs, on which no ratio is judged")
        for line in table.rows:
            line["verdict"] = "not judged" if line["verdict"].startswith("SHORT") else line["verdict"]
    return table
