"""Observed order of every method at fixed step, forwards and backwards in time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .registry import BENCHMARKS, Benchmark, Column, Result, Settings, Table

__all__ = ["Variant", "observed_order", "run", "variants"]

SPAN = (0.3, 1.5)
FLOOR = 1e-12  # errors below are rounding
MOST_STEPS = 500  # of the finest grid
MARGIN = 0.2  # by which an order may be missed
ADAMS_ORDERS = range(1, 13)
HIGHEST = 8  # order that is judged

COLUMNS = [
    Column("method", "method"),
    Column("order", "order", "count"),
    Column("forwards", "observed forwards", "number"),
    Column("backwards", "observed backwards", "number"),
    Column("finest", "smallest error", "error"),
    Column("steps", "at steps", "count"),
    Column("verdict", "at least order - 0.2"),
]


@dataclass(frozen=True)
class Variant:
    """A method with the options that fix its order."""

    method: str
    order: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.method}, order {self.order}" if self.options else self.method


def variants(names: Sequence[str] | None = None) -> tuple[list[Variant], list[str]]:
    """Every registered method of a fixed order, the Adams families once an order; and those whose order varies."""
    from solvers.methods import METHODS

    fixed, varying = [], []
    for name in names if names is not None else [name for name in METHODS if METHODS[name].demands is None]:
        if name in ("explicit_adams", "implicit_adams"):
            fixed += [Variant(name, order, {"order": order}) for order in ADAMS_ORDERS]
        elif name == "abm":
            varying.append(name)
        else:
            fixed.append(Variant(name, METHODS[name].order))
    return fixed, varying


def coupled(t: Tensor, y: Tensor) -> Tensor:
    """y1' = 2 t y1 log y2, y2' = -2 t y2 log y1: nonlinear, coupled, depends on t."""
    first, second = y.unbind(-1)
    return torch.stack([2 * t * first * second.log(), -2 * t * second * first.log()], -1)


def coupled_exact(t: float) -> Tensor:
    """Its solutions y1 = exp(sin(t**2 + p)), y2 = exp(cos(t**2 + p)) for 16 phases p, `(16, 2)`."""
    angle = t * t + torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)
    return torch.stack([angle.sin().exp(), angle.cos().exp()], -1)


def error_at(variant: Variant, span: tuple[float, float], steps: int) -> float:
    """RMS error at the quarters of `span` with `steps` (a multiple of 4) equal steps; infinite where the solve fails.

    Many solutions at four times, because the error of one alone may pass through zero as the steps shrink.
    """
    from solvers import solve

    times = torch.linspace(*span, 5, dtype=torch.float64)
    exact = torch.stack([coupled_exact(t) for t in times.tolist()])
    with torch.no_grad():
        solution = solve(
            coupled,
            exact[0],
            times,
            method=variant.method,
            num_steps=steps,
            rtol=1e-13,
            atol=1e-13,
            throw=False,
            **variant.options,
        )
    error = float((solution.y - exact).square().mean().sqrt())
    return error if math.isfinite(error) else math.inf


def errors_of(variant: Variant, span: tuple[float, float], most: int) -> list[tuple[int, float]]:
    """(steps, error) on finer and finer grids, until rounding or `most` steps."""
    found: list[tuple[int, float]] = []
    steps = max(4, 4 * math.ceil(variant.order / 2)) if variant.options else 4  # past the start of a multistep method
    while steps <= most:
        error = error_at(variant, span, steps)
        found.append((steps, error))
        if error < FLOOR:
            break
        steps = 4 * math.ceil(0.35 * steps)
    return found


def observed_order(found: Sequence[tuple[int, float]]) -> float:
    """Slope of log error against log steps over the three finest grids above rounding; NaN without two."""
    points = [(math.log(steps), math.log(error)) for steps, error in found if FLOOR < error < math.inf][-3:]
    if len(points) < 2:
        return math.nan
    middle = [sum(values) / len(points) for values in zip(*points)]
    rise = sum((x - middle[0]) * (y - middle[1]) for x, y in points)
    return -rise / sum((x - middle[0]) ** 2 for x, _ in points)


def verdict(variant: Variant, orders: tuple[float, float]) -> str:
    """Whether the order is met; none above order 8, where Adams' stability and rounding leave no range to see it in."""
    if variant.order > HIGHEST:
        return ""
    return "yes" if min(orders) >= variant.order - MARGIN else "NO"


def run(settings: Settings) -> Result:
    """Measure every method, or those asked for."""
    torch.set_num_threads(1)
    fixed, varying = variants(settings.methods)
    if settings.quick:
        fixed = [variant for variant in fixed if not variant.options or variant.order in (2, 4)]
    table = Table("observed order at fixed step: y1' = 2 t y1 log y2, y2' = -2 t y2 log y1", COLUMNS)
    result = Result([table])
    most = 100 if settings.quick else MOST_STEPS
    for variant in fixed:
        forwards, backwards = (errors_of(variant, span, most) for span in (SPAN, SPAN[::-1]))
        orders = observed_order(forwards), observed_order(backwards)
        steps, finest = min(forwards, key=lambda point: point[1])
        table.rows.append(
            {
                "method": variant.label,
                "order": variant.order,
                "forwards": orders[0],
                "backwards": orders[1],
                "finest": finest,
                "steps": steps,
                "verdict": verdict(variant, orders),
            }
        )
        result.data[variant.label] = {"forwards": forwards, "backwards": backwards}
    table.notes.append(
        f"t from {SPAN[0]} to {SPAN[1]} and back; RMS error of 16 solutions at 4 times; "
        f"slope over the three finest grids with an error above {FLOOR:g}"
    )
    if any(variant.order > HIGHEST for variant in fixed):
        table.notes.append(f"orders above {HIGHEST} are not judged: stability and rounding leave no range to see them in")
    if varying:
        table.notes.append(f"no fixed order, so not in this table: {', '.join(varying)}")
    return result


def draw(result: Result, path: Path) -> None:
    """Error against steps, forwards, one panel for one-step methods and one for each Adams family."""
    from .pictures import figure, save

    groups: dict[str, list[str]] = {}
    for label in result.data:
        groups.setdefault(label.split(",")[0] if ", order" in label else "one-step methods", []).append(label)
    drawn, axes = figure(1, len(groups), figsize=(5.5 * len(groups), 4.5), squeeze=False)
    for panel, (title, labels) in zip(axes[0], groups.items()):
        for place, label in enumerate(labels):
            points = [(steps, error) for steps, error in result.data[label]["forwards"] if 0 < error < math.inf]
            style = {"color": f"C{place % 10}", "linestyle": "-" if place < 10 else "--", "marker": "."}
            panel.loglog(*zip(*points), label=label.replace(f"{title}, ", ""), **style) if points else None
        panel.set(title=title, xlabel="steps", ylabel="RMS error")
        panel.legend(fontsize=7)
        panel.grid(alpha=0.3)
    save(drawn, path)


BENCHMARKS.add(
    "convergence",
    Benchmark(
        "convergence",
        "observed order of every method, forwards and backwards",
        "25 s",
        "8 s",
        run,
        draw,
        takes_peers=False,
    ),
)
