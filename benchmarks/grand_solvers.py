"""Solvers on the diffusion of GRAND (Xia 2023, Figs 5.1 and 5.7): work, error and what it consists of, and the claims."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import grand_targets, grand_training
from .grand_claims import GOOD, MOST_WORK, claims
from .grand_pictures import draw
from .grand_problems import END, GRAPHS, GrandProblem, Model, chosen, relative, rms, sharpened, within
from .registry import BENCHMARKS, Benchmark, Column, Option, Result, Settings, Table, known_names
from .running import ending
from .timing import one_thread

__all__ = ["ADAPTIVE", "FIXED", "Attempt", "Case", "Scheme", "attempt", "prepared", "run"]

STEPS = 8
"""Of size s = 1.25 to T = 10, as in the thesis."""
TOLERANCE = 1e-4
"""Of the adaptive methods and of the inner solvers, as in the thesis."""
REFERENCE = 1e-10
SOLVED = 1e-8
"""To which equations are solved where only the truncation is to be seen."""
PARTS = ("targets", "first", "tolerances", "held", "sharp")
"""What is measured: the rows to be reached; attention of the first epoch, nearly uniform; work by tolerance (Fig. 5.1) there;
attention far from uniform, held at the start; the same of the state, on Cora alone."""


@dataclass(frozen=True)
class Scheme:
    """One of our methods with its options; `inner`: those that `solve` takes for an inner solver, None where there is none."""

    label: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    inner: str | None = None
    linear: bool = False

    def tight(self) -> Scheme | None:
        """The same with its equations solved to rounding; None where it solves none."""
        if self.method == "implicit_adams":
            return Scheme(self.label, self.method, {"corrector_tol": 1.0, "max_corrections": 500})
        return self if self.inner is not None else None


INNER_SOLVERS = ("fletcher_reeves", "anderson", "newton_krylov")


def proximal() -> list[Scheme]:
    names = ("prox_euler", "prox_cn", "prox_bdf2", "prox_bdf3", "prox_bdf4")
    pairs = [(name, inner) for name in names for inner in INNER_SOLVERS]
    return [Scheme(f"{name}, {inner}", name, {"inner": inner, "inner_tol": 1.0}, inner) for name, inner in pairs]


FIXED = [
    Scheme("euler", "euler"),
    Scheme("rk4", "rk4_classic"),
    Scheme("AB4", "explicit_adams"),
    Scheme("AM4, PECE", "implicit_adams"),
    Scheme("AM4, iterated", "implicit_adams", {"corrector_tol": 1.0, "max_corrections": 150}),
    *proximal(),
    Scheme("semi_implicit_euler", "semi_implicit_euler", {"inner_tol": 1.0}, "gmres"),
    Scheme("semi_implicit_bdf2", "semi_implicit_bdf2", {"inner_tol": 1.0}, "gmres"),
]
ADAPTIVE = [
    *(Scheme(name, name) for name in ("adaptive_heun", "dopri5", "dopri8")),
    Scheme("exp_linear", "exp_linear", linear=True),
]

TRIALS = {
    "prox_euler, anderson": (46, 2.1e-2),
    "prox_euler, fletcher_reeves": (86, None),
    "prox_bdf2, anderson": (42, 6.8e-3),
    "prox_bdf2, fletcher_reeves": (71, None),
    "adaptive_heun": (87, 1.5e-4),
    "dopri5": (56, 1.8e-4),
    "dopri8": (90, 1.5e-4),
}
"""Evaluations and errors of a trial implementation on Cora after training, where it had them; one of dopri5's own, the others
torchdiffeq's."""

COLUMNS = [
    Column("scheme", "scheme"),
    Column("nfe", "NFE", "count"),
    Column("seconds", "CPU", "seconds"),
    Column("error", "error", "error"),
    Column("truncation", "truncation", "error"),
    Column("inner", "inner", "error"),
    Column("largest", f"largest s to {GOOD:g}", "number"),
    Column("least", f"least NFE to {GOOD:g}", "count"),
    Column("trial", "trial's NFE", "count"),
    Column("trial_error", "trial's error", "error"),
    Column("ended", "ended"),
]


@dataclass(frozen=True)
class Case:
    """A field with its start, in float64, and the end of the solution to `REFERENCE`."""

    name: str
    model: Model
    start: Tensor
    linear: bool
    end: Tensor
    made: str

    def field(self, dtype: torch.dtype) -> tuple[Any, Tensor]:
        model, x = self.model.to(dtype), self.start.to(dtype)
        return model.field(x, self.linear), x

    def error(self, y: Tensor) -> float:
        """Relative, in the Euclidean norm of all numbers."""
        return relative(y, self.end)


@dataclass(frozen=True)
class Attempt:
    """What one solve gave."""

    y: Tensor
    nfe: int
    seconds: float
    ended: str

    @property
    def done(self) -> bool:
        return self.ended == "done"


@torch.no_grad()
def solved(field: Any, x: Tensor, end: float, **options: Any) -> Attempt:
    """Solve, counting process CPU time; a failure is part of the answer."""
    from solvers import ArgumentError, solve

    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            solution = solve(field, x, [0.0, end], throw=False, max_steps=20_000, **options)
        except ArgumentError as error:
            return Attempt(torch.full_like(x, torch.nan), 0, 0.0, f"refused: {error}")
    seconds = time.process_time() - started
    y = solution.y[-1]
    ended = ending(solution)
    if ended == "done" and not float(y.abs().max()) < 1e3 * max(1.0, float(x.abs().max())):
        ended = "unstable"
    return Attempt(y, int(solution.stats.nfe), seconds, ended)


def attempt(case: Case, scheme: Scheme, dtype: torch.dtype, steps: int | None, tolerance: float = TOLERANCE) -> Attempt:
    """Solve a case by a scheme, with `steps` steps or by its tolerance."""
    field, x = case.field(dtype)
    options = dict(scheme.options) | within(x, tolerance)
    if steps is not None:
        options["num_steps"] = steps
    return solved(field, x, END, method=scheme.method, **options)


def prepared(name: str, model: Model, linear: bool) -> Case:
    """A case with its reference, by one method of high order and another to confirm it."""
    with torch.no_grad():
        x = model.double().encode()
    case = Case(name, model, x, linear, x, "")
    first = attempt(case, Scheme("", "dop853"), torch.float64, None, REFERENCE)
    second = attempt(case, Scheme("", "dopri8"), torch.float64, None, REFERENCE)
    apart = relative(second.y, first.y)
    made = f"reference: dop853 at {REFERENCE:g}, {first.nfe} evaluations; dopri8 at {REFERENCE:g} differs from it by {apart:.1e}"
    return Case(name, model, x, linear, first.y, made)


def sharp(problem: GrandProblem) -> Model:
    model = Model(problem).eval()
    with torch.no_grad():
        return sharpened(model, model.encode())


def tables_of(problem: GrandProblem, parts: Sequence[str], schemes: list[Scheme], quick: bool) -> Iterable[Table]:
    """What was asked for, of one graph."""
    if "first" in parts or "tolerances" in parts:
        case = prepared(f"{problem.name}, first epoch", Model(problem).eval(), False)
        if "first" in parts:
            yield table_of(case, schemes, quick)
        if "tolerances" in parts:
            yield tolerances(case, quick)
    if "held" in parts:
        yield table_of(prepared(f"{problem.name}, sharp attention held", sharp(problem), True), schemes, quick)
    if "sharp" in parts and problem.name == "Cora":
        yield table_of(prepared(f"{problem.name}, sharp attention", sharp(problem), False), schemes, quick)


def bisected(good: Callable[[int], bool], low: int, high: int) -> int:
    """The least number of steps that is good, between one that is not and one that is, to a sixteenth."""
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high


def sweep(case: Case, scheme: Scheme, dtype: torch.dtype) -> tuple[float | None, int | None]:
    """The largest step and the smallest number of evaluations with an error of at most `GOOD`; None beyond `MOST_WORK`."""
    tried: dict[int, tuple[bool, int]] = {}

    def good(steps: int) -> bool:
        if steps not in tried:
            found = attempt(case, scheme, dtype, steps)
            tried[steps] = (found.done and case.error(found.y) <= GOOD, found.nfe)
        return tried[steps][0]

    steps = 2
    while not good(steps):
        if tried[steps][1] > MOST_WORK / 2:
            return None, None
        steps *= 2
    least = bisected(good, steps // 2, steps)
    return END / least, min(nfe for fine, nfe in tried.values() if fine)


def least_adaptive(case: Case, scheme: Scheme, dtype: torch.dtype) -> int | None:
    """The smallest number of evaluations with an error of at most `GOOD`, among half decades of the tolerance."""
    found = None
    for half in range(2, 13):
        one = attempt(case, scheme, dtype, None, 10 ** (-half / 2))
        if one.done and case.error(one.y) <= GOOD:
            found = one.nfe if found is None else min(found, one.nfe)
        elif found is not None:
            break
        if found is not None and one.nfe > 2 * found:
            break
    return found


def line(case: Case, scheme: Scheme, dtype: torch.dtype, steps: int | None) -> dict[str, Any]:
    """One scheme's row, of steps of 1.25 or at the tolerance."""
    one = attempt(case, scheme, dtype, steps)
    row: dict[str, Any] = {"scheme": scheme.label, "nfe": one.nfe, "seconds": one.seconds, "ended": one.ended}
    if case.name == "Cora, first epoch" and scheme.label in TRIALS:
        row["trial"], row["trial_error"] = TRIALS[scheme.label]
    if one.done:
        row["error"] = case.error(one.y)
        tight = scheme.tight() if steps is not None else None
        if tight is not None:
            exact = attempt(case, tight, torch.float64, steps, SOLVED)
            if exact.done:
                row["truncation"] = case.error(exact.y)
                row["inner"] = relative(one.y, exact.y, case.end)
    return row


def cheapest(schemes: list[Scheme], rows: list[dict[str, Any]]) -> list[bool]:
    """Of each method, whatever its inner solvers and options, whether this one took the fewest evaluations."""
    best: dict[str, int] = {}
    for place, (scheme, row) in enumerate(zip(schemes, rows)):
        group = scheme.method if scheme.inner else scheme.label
        if group not in best or (row["ended"] == "done" and row["nfe"] < rows[best[group]]["nfe"]):
            best[group] = place
    return [place in best.values() for place in range(len(schemes))]


def table_of(case: Case, schemes: list[Scheme], quick: bool) -> Table:
    """Every scheme on one case, in float32."""
    title = f"{case.name}, float32: s = {END / STEPS:g} or tolerance {TOLERANCE:g}, T = {END:g}"
    chosen = [scheme for scheme in schemes if case.linear or not scheme.linear]
    steps = [None if scheme in ADAPTIVE else STEPS for scheme in chosen]
    rows = [line(case, scheme, torch.float32, count) for scheme, count in zip(chosen, steps)]
    for scheme, row, count, swept in zip(chosen, rows, steps, cheapest(chosen, rows)):
        if not swept or (quick and scheme.method not in ("prox_bdf2", "dopri5")):
            continue
        if count is None:
            row["least"] = least_adaptive(case, scheme, torch.float32)
        else:
            row["largest"], row["least"] = sweep(case, scheme, torch.float32)
    size = rms(case.start)
    notes = [
        case.made,
        f"errors: relative, Euclidean norm; truncation: equations solved to {SOLVED:g} in float64; inner: the rest",
        f"tolerance of inner solvers {TOLERANCE:g}; the cheapest is tried with other steps; semi-implicit: products with A count",
        f"tolerances are of the state's size, here {size:.2g}: the trial's, absolute as the thesis', were looser by that factor",
    ]
    return Table(title, COLUMNS, rows, [*notes, *claims(rows, END / STEPS)])


def tolerances(case: Case, quick: bool) -> Table:
    """Fig. 5.1: evaluations against tolerance, forward and by the continuous adjoint."""
    columns = [Column("tolerance", "tolerance", "error"), Column("method", "method"), Column("forward", "forward NFE", "count")]
    columns += [Column("backward", "backward NFE", "count"), Column("error", "error", "error"), Column("ended", "backward ended")]
    table = Table(f"{case.name}, float32: evaluations against tolerance, adjoint='backsolve' (Fig. 5.1)", columns)
    for half in (4, 8) if quick else (4, 6, 8, 10):
        for name in ("adaptive_heun", "dopri5", "dopri8"):
            table.rows.append(grand_training.backsolved(case, name, 10 ** (-half / 2)))
    table.notes = ["of half the square of the end along the start; the thesis: dopri5 and dopri8 often fail on the adjoint"]
    return table


def run(settings: Settings) -> Result:
    """Measure, and judge the claims; raises BenchmarkError without the data."""
    one_thread(settings, "grand-solvers counts evaluations and CPU seconds")
    problems = chosen(settings.options["graphs"], settings.quick)
    epochs = settings.options["train"]
    if epochs:
        return trained(problems, min(epochs, 2) if settings.quick else epochs)
    parts = settings.options["parts"]
    tables = [grand_targets.table(settings.quick)] if "targets" in parts else []
    schemes = [s for s in [*FIXED, *ADAPTIVE] if settings.methods is None or s.method in settings.methods]
    for problem in problems:
        for table in tables_of(problem, parts, schemes, settings.quick):
            print(f"  {table.title}", flush=True)
            tables.append(table)
    return Result(tables)


def trained(problems: list[GrandProblem], epochs: int) -> Result:
    """Training in place of the rest; `data` has the numbers of each epoch."""
    result = Result([])
    for problem in problems:
        table, result.data[problem.name] = grand_training.table(problem, epochs)
        result.tables.append(table)
    return result


BENCHMARKS.add(
    "grand-solvers",
    Benchmark(
        "grand-solvers",
        "solvers on graph diffusion: evaluations, error and its parts, the thesis' claims; training",
        "25 min (--train 50: 15 min on Cora, an hour on CS-like)",
        "30 s",
        run,
        draw,
        takes_peers=False,
        options=(
            Option("graphs", f"comma-separated, of {', '.join(GRAPHS)}", "cora,cs-like"),
            Option("parts", "comma-separated, of " + ", ".join(PARTS), PARTS, partial(known_names, "part", PARTS)),
            Option("train", "epochs to train each solver for instead", 0, int),
        ),
    ),
)
