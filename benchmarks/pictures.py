"""Pictures of the main job, and what every picture here shares."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

from .registry import Result, need

__all__ = ["draw_main_job", "figure", "save"]

LARGEST = 300_000  # bytes of a picture that a document shows


def figure(*shape: Any, **options: Any) -> tuple[Any, Any]:
    """matplotlib's `subplots` without a display; raises MissingExtra."""
    need("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*shape, layout="constrained", **options)


def save(drawn: Any, path: Path) -> None:
    """Write a figure as PNG, with fewer dots until it is below 300 kB (at last with a palette), and close it."""
    from matplotlib import pyplot
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    for dots in (110, 100, 90, 80, 70):
        stream = io.BytesIO()
        drawn.savefig(stream, format="png", dpi=dots)
        image = Image.open(stream).convert("RGB")
        image.save(path, format="PNG", optimize=True)
        if path.stat().st_size < LARGEST:
            break
    else:
        image.quantize(256).save(path, format="PNG", optimize=True)
    pyplot.close(drawn)


def draw_main_job(result: Result, path: Path) -> None:
    """One row a problem: before, after, and error against evaluations."""
    count = len(result.tables)
    drawn, axes = figure(count, 3, figsize=(11, 3.3 * count), squeeze=False)
    for line, table, (problem, solutions) in zip(axes, result.tables, result.arrays.values()):
        show_states(line[0], line[1], problem, solutions)
        show_work(line[2], table.rows, problem)
    save(drawn, path)


def show_states(before: Any, after: Any, problem: Any, solutions: dict[str, Any]) -> None:
    """The start and the end: of the proximal solve of least error among those that finished, else of the first that did."""
    finished = {name: y for name, y in solutions.items() if y is not None}
    errors = {name: problem.error(y) or math.inf for name, y in finished.items() if name.startswith("prox")}
    chosen = min(errors, key=lambda name: errors[name], default=next(iter(finished), None))
    paint = {"line": paint_line, "terrain": paint_terrain, "terrain-full": paint_terrain}.get(problem.name, paint_grey)
    paint(before, [problem.y0.cpu().numpy()], problem)
    before.set_title(f"{problem.title}: before", fontsize=9)
    if chosen is None:
        after.text(0.5, 0.5, "no solver finished", ha="center")
        return
    paint(after, list(finished[chosen].cpu().numpy()), problem)
    after.set_title(f"after ({chosen})", fontsize=9)


def paint_line(axes: Any, states: list[Any], problem: Any) -> None:
    """One curve an output."""
    times = problem.times[1:] if len(states) > 1 else problem.times[:1]
    for y, t in zip(states, times):
        axes.plot(y, label=f"t = {t:g}")
    start = problem.y0.cpu().numpy()
    axes.set_ylim(start.min() - 0.02, start.max() + 0.02)
    axes.set_xlabel("point", fontsize=8)
    axes.legend(fontsize=7)


def paint_terrain(axes: Any, states: list[Any], problem: Any) -> None:
    """Heights in m, with the shade of a low sun."""
    height = states[-1]
    from matplotlib import colormaps
    from matplotlib.colors import LightSource, Normalize

    rows, columns = problem.extra["spacing"]
    start = problem.y0.cpu().numpy()
    shades = LightSource(azdeg=315, altdeg=45).shade(
        height,
        cmap=colormaps["gist_earth"],
        norm=Normalize(start.min() - 150, start.max()),
        blend_mode="soft",
        vert_exag=2,
        dx=columns,
        dy=rows,
    )
    extent = (0, columns * height.shape[1] / 1000, 0, rows * height.shape[0] / 1000)
    axes.imshow(shades, extent=extent, interpolation="nearest")
    axes.set_xlabel(f"km; heights {height.min():.0f} to {height.max():.0f} m", fontsize=8)


def paint_grey(axes: Any, states: list[Any], problem: Any) -> None:
    axes.imshow(states[-1], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def show_work(axes: Any, rows: list[dict[str, Any]], problem: Any) -> None:
    """Error against evaluations of every solver that finished; the proximal step counts are joined."""
    from matplotlib.ticker import NullFormatter

    joined = [row for row in rows if row["solver"].startswith("prox_euler") and row.get("error")]
    fixed = [row for row in joined if "steps" in row["solver"]]
    axes.loglog([row["evaluations"] for row in fixed], [row["error"] for row in fixed], color="tab:red", alpha=0.5)
    for row in rows:
        if not row.get("error"):
            continue
        colour = "tab:red" if row["solver"].startswith("prox") else ("tab:gray" if "-" in row["solver"] else "tab:blue")
        axes.plot(row["evaluations"], row["error"], "o", color=colour, markersize=4)
        label = row["solver"].removeprefix("prox_euler, ")
        axes.annotate(label, (row["evaluations"], row["error"]), fontsize=6, xytext=(3, 2), textcoords="offset points")
    stopped = [row for row in rows if row.get("ended", "").startswith("stopped") and row.get("evaluations")]
    for place, row in enumerate(stopped):  # it has no error: at the upper border, at the evaluations it had made
        at = (row["evaluations"], 0.97 - 0.05 * place)
        axes.plot(*at, ">", color="black", markersize=4, transform=axes.get_xaxis_transform())
        axes.text(*at, f"{row['solver']} stopped  ", transform=axes.get_xaxis_transform(), fontsize=6, ha="right", va="center")
    for axis, scale, values in (
        (axes.xaxis, axes.set_xscale, [row["evaluations"] for row in [*stopped, *rows] if row.get("error") or row in stopped]),
        (axes.yaxis, axes.set_yscale, [row["error"] for row in rows if row.get("error")]),
    ):
        scale("log")
        axis.set_minor_formatter(NullFormatter())
        if values:
            whole = [math.floor(math.log10(min(values))), math.ceil(math.log10(max(values) * 1.3))]
            if axis is axes.yaxis:  # room for the stopped ones above the others
                whole[1] += math.ceil(0.06 * len(stopped) * (whole[1] - whole[0]))
            axis.set_view_interval(10.0 ** whole[0], 10.0 ** whole[1], ignore=True)
    axes.set_xlabel("evaluations of f", fontsize=8)
    axes.set_title(f"error{f' ({problem.unit})' if problem.unit else ', relative'}; red: proximal", fontsize=9)
    axes.grid(alpha=0.3)
