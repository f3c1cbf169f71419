"""The README's table of methods, from the registry: ``python -m benchmarks.methods_table [--write]``."""

from __future__ import annotations

import argparse
from pathlib import Path

from solvers.methods import METHODS

BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
README = Path(__file__).resolve().parents[1] / "README.md"


def row(name: str) -> str:
    """One line of the table. The estimate is given as the power of dt with which it falls."""
    method = METHODS[name]
    order = f"variable, {method.order} by default" if method.variable_order else str(method.order)
    order = "exact in time" if method.exact else order
    estimate = f"dt^{method.error_order}" if method.error_order is not None else "none: fixed step"
    estimate = "of the Krylov space" if method.exact else estimate
    kind = "implicit" if method.implicit else "explicit"
    return f"| `{name}` | {order} | {estimate} | {kind} | {method.reference} |"


def table() -> str:
    """Markdown: a line for each registered method, in the order of registration."""
    head = ["| method | order | error estimate | kind | source |", "|---|---|---|---|---|"]
    return "\n".join(head + [row(name) for name in METHODS])


def between_markers(text: str) -> str:
    """The part of ``text`` that the table fills. Raises ``ValueError`` without exactly one pair of markers."""
    _, after = text.split(BEGIN)
    part, _ = after.split(END)
    return part.strip()


def filled(text: str) -> str:
    """``text`` with the present table between its markers."""
    between_markers(text)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the table of methods.")
    parser.add_argument("--write", action="store_true", help="put it into README.md instead")
    if parser.parse_args().write:
        README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(table())


if __name__ == "__main__":
    main()
