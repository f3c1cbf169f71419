"""Pictures of `grand-solvers`: a panel a table, by what the table holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from .grand_claims import GOOD, method_of
from .registry import Result, Table

__all__ = ["draw"]

ACROSS = 3


def draw(result: Result, path: Path) -> None:
    """Targets as shares of their bars, errors by work, work by tolerance, losses by time."""
    from .pictures import figure, save

    count = len(result.tables)
    across = min(ACROSS, count)
    drawn, axes = figure(math.ceil(count / across), across, figsize=(5 * across, 4 * math.ceil(count / across)), squeeze=False)
    for panel, table in zip(axes.ravel(), result.tables):
        keys = {column.key for column in table.columns}
        show = show_targets if "bar" in keys else show_tolerances if "tolerance" in keys else show_errors
        if "loss" in keys:
            show_training(panel, result.data[table.title.split(":")[0]])
        else:
            show(panel, table)
        panel.set_title(table.title.split(": ")[0], fontsize=9)
        panel.tick_params(labelsize=7)
    for panel in axes.ravel()[count:]:
        panel.set_axis_off()
    save(drawn, path)


def show_targets(axes: Any, table: Table) -> None:
    """What was measured over what was to be reached."""
    rows = [row for row in table.rows if row["measured"] is not None]
    shares = [row["measured"] / row["bar"] for row in rows]
    axes.barh(range(len(rows)), shares, color=["tab:green" if share <= 1 else "tab:red" for share in shares])
    axes.set_yticks(range(len(rows)), [f"{row['row']}, {row['setting']}" for row in rows], fontsize=5)
    axes.axvline(1.0, color="black", linewidth=0.7)
    axes.invert_yaxis()
    axes.set_xlabel("measured / bar", fontsize=8)


def show_errors(axes: Any, table: Table) -> None:
    """Relative error against evaluations, proximal steps in red, named once whatever their inner solvers."""
    named = set()
    for row in table.rows:
        if not row.get("error") or not row["error"] < 10:
            continue
        colour = "tab:red" if row["scheme"].startswith("prox") else "tab:blue"
        axes.loglog(row["nfe"], row["error"], "o", color=colour, markersize=4)
        label = method_of(row) if row["scheme"].startswith("prox") else row["scheme"]
        if label not in named:
            axes.annotate(label, (row["nfe"], row["error"]), fontsize=5, xytext=(3, 2), textcoords="offset points")
        named.add(label)
    axes.axhline(GOOD, color="black", linewidth=0.5)
    axes.set_xlabel("evaluations of f", fontsize=8)
    axes.set_ylabel("relative error", fontsize=8)


def show_tolerances(axes: Any, table: Table) -> None:
    """Evaluations against tolerance, dashed for the backward solve; a cross where it failed."""
    for place, name in enumerate(dict.fromkeys(row["method"] for row in table.rows)):
        own = [row for row in table.rows if row["method"] == name and row.get("forward")]
        colour = f"C{place}"
        tolerances, forward = [row["tolerance"] for row in own], [row["forward"] for row in own]
        axes.loglog(tolerances, forward, "o-", color=colour, label=name, markersize=3)
        for style, ended in (("o--", True), ("x", False)):
            part = [row for row in own if (row["ended"] == "done") == ended and row["backward"]]
            axes.loglog([row["tolerance"] for row in part], [row["backward"] for row in part], style, color=colour, markersize=4)
    axes.set_xlabel("tolerance", fontsize=8)
    axes.set_ylabel("evaluations; dashed: backward", fontsize=8)
    axes.legend(fontsize=6)


def show_training(axes: Any, runs: dict[str, dict[str, Any]]) -> None:
    """Loss against CPU seconds of each training."""
    for name, run in runs.items():
        if run["loss"]:
            axes.plot(np.cumsum(run["seconds"]), run["loss"], label=name, linestyle="--" if "backsolve" in name else "-")
    axes.set_xlabel("CPU seconds; dashed: continuous adjoint", fontsize=8)
    axes.set_ylabel("loss", fontsize=8)
    axes.legend(fontsize=5)
