"""The thesis' claims for proximal steps on graph diffusion (Xia 2023, sections 5.4.2 and 5.4.3), judged by what was measured."""

from __future__ import annotations

from typing import Any

__all__ = ["GOOD", "HALF", "MOST_WORK", "claims", "method_of"]

GOOD = 1e-3
"""The output error that the thesis states."""
HALF = 0.6
"""A share of dopri5's evaluations that passes for about a half."""
MOST_WORK = 1000
"""Evaluations beyond which smaller steps are not tried: some twenty times those of dopri5."""

Row = dict[str, Any]


def claims(rows: list[Row], step: float) -> list[str]:
    """An error of at most 1e-3 at s = 1.25, about half of dopri5's evaluations, fewer than the adaptive methods'."""
    adaptive = {row["scheme"]: row for row in rows if row["scheme"] in ("adaptive_heun", "dopri5", "dopri8") and "error" in row}
    if "dopri5" not in adaptive:
        return ["no claim is judged without dopri5"]
    names = dict.fromkeys(method_of(row) for row in rows if row["scheme"].startswith("prox"))
    best = [found for name in names if (found := cheapest(rows, name)) is not None]
    if not best:
        return ["no claim is judged without a proximal step that ended"]
    return [summary(best, adaptive, step), *(sentence(row, rows, adaptive["dopri5"], step) for row in best)]


def method_of(row: Row) -> str:
    """The name without that of the inner solver."""
    return row["scheme"].split(", ")[0]


def cheapest(rows: list[Row], name: str) -> Row | None:
    """The row of the fewest evaluations among the inner solvers of a method."""
    return min((row for row in rows if method_of(row) == name and "error" in row), key=lambda row: row["nfe"], default=None)


def summary(best: list[Row], adaptive: dict[str, Row], step: float) -> str:
    """How many of the proximal steps keep each claim."""
    good = sum(row["error"] <= GOOD for row in best)
    half = sum(row["nfe"] <= HALF * adaptive["dopri5"]["nfe"] for row in best)
    fewer = ", ".join(f"{sum(row['nfe'] < other['nfe'] for row in best)} fewer than {name}" for name, other in adaptive.items())
    return (
        f"the thesis' claims at s = {step:g}, of {len(best)} proximal methods with their cheapest inner solvers: an output error "
        f"within {GOOD:g} holds for {good}, about half of dopri5's evaluations for {half}; {fewer}"
    )


def sentence(row: Row, rows: list[Row], explicit: Row, step: float) -> str:
    """One method."""
    within = "within" if row["error"] <= GOOD else "NOT within"
    share = row["nfe"] / explicit["nfe"]
    half = "about half or less" if share <= HALF else "NOT about half"
    text = f"{row['scheme']} at s = {step:g}: error {row['error']:.1e}, {within} {GOOD:g}; "
    text += f"{row['nfe']} evaluations, {share:.2f} of dopri5's {explicit['nfe']}, {half}"
    swept = [other["least"] for other in rows if method_of(other) == method_of(row) and "least" in other]
    if swept and explicit.get("least"):
        least = f"more than {MOST_WORK} evaluations" if swept[0] is None else f"{swept[0]} evaluations"
        text += f"; to an error of {GOOD:g}: {least}, dopri5 {explicit['least']}"
    return text
