"""Tables on the terminal, results as JSON, and one self-contained page of HTML from a folder of them."""

from __future__ import annotations

import base64
import html
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .registry import BenchmarkError, Column, Result, Table, need

__all__ = ["page", "read_json", "show", "write_json", "written"]


def written(kind: str, value: Any) -> str:
    """A raw value as text. Kinds: text, count, seconds, milliseconds, error, percent, ratio, megabytes, number."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and not math.isfinite(value):
        return "none" if math.isnan(value) else ("unbounded" if value > 0 else "-unbounded")
    forms = {
        "text": "{}",
        "count": "{:,d}",
        "seconds": "{:.3g} s",
        "milliseconds": "{:.3g} ms",
        "error": "{:.1e}",
        "percent": "{:.2g} %",
        "ratio": "{:.3g}x",
        "megabytes": "{:.1f} MB",
        "number": "{:.4g}",
    }
    return forms[kind].format(int(value) if kind == "count" else value)


def show(tables: list[Table]) -> None:
    """Print tables with rich; raises MissingExtra without it."""
    need("rich")
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    console = Console(width=None if _is_terminal() else 160)
    for table in tables:
        drawn = RichTable(title=table.title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
        for column in table.columns:
            drawn.add_column(
                column.heading,
                justify="left" if column.kind == "text" else "right",
                overflow="fold",
                no_wrap=column is table.columns[0],
            )
        for row in table.rows:
            drawn.add_row(*(escape(written(c.kind, row.get(c.key))) for c in table.columns))
        console.print(drawn)
        for note in table.notes:
            console.print(f"  {note}", style="dim", markup=False, highlight=False)
        console.print()


def _is_terminal() -> bool:
    import sys

    return sys.stdout.isatty()


def write_json(
    path: Path, name: str, settings: dict[str, Any], machine: dict[str, Any], result: Result, picture: Path | None
) -> None:
    """Everything that was found, with the machine and the settings it was found with."""
    record = {
        "benchmark": name,
        "settings": settings,
        "machine": machine,
        "tables": [asdict(table) for table in result.tables],
        "data": result.data,
        "picture": None if picture is None else _relative(picture, path.parent),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(record), indent=1) + "\n")


def _relative(path: Path, folder: Path) -> str:
    import os

    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _finite(value: Any) -> Any:
    """The same structure with numbers that JSON has no word for written as text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return written("number", value)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """One record; raises BenchmarkError if the file is none."""
    try:
        record = json.loads(path.read_text())
        record["benchmark"], record["tables"], record["machine"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise BenchmarkError(f"{path} is no result of `run` ({error!r}); remove it or run that benchmark again") from error
    return record


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76em; margin: 2em auto; padding: 0 1em; color: #1a1a1a; }
table { border-collapse: collapse; margin: .6em 0; } caption { text-align: left; font-weight: 600; padding: .3em 0; }
th, td { padding: .15em .7em; border-bottom: 1px solid #ddd; text-align: right; } th { border-bottom: 1px solid #555; }
th.text, td.text { text-align: left; } .note, .machine { color: #666; font-size: 13px; margin: .1em 0; }
img { max-width: 100%; }
"""


def page(folder: Path) -> Path:
    """Write `report.html` into `folder` from the results in it: one file that needs no other. Raises BenchmarkError."""
    if not folder.is_dir():
        raise BenchmarkError(f"{folder} is no folder; give the one that `run` wrote its JSON files to")
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise BenchmarkError(
            f"{folder} holds no results; `python -m benchmarks run NAME --json {folder / 'NAME.json'}` writes one"
        )
    records = [{**read_json(path), "file": path.stem} for path in paths]
    sections = [_summary(records), *(_section(record, folder) for record in records)]
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Benchmarks</title>'
        f"<style>{STYLE}</style></head>\n"
        f"<body><h1>Benchmarks</h1>\n{''.join(sections)}</body></html>\n"
    )
    target = folder / "report.html"
    target.write_text(text)
    return target


def _heading(record: dict[str, Any]) -> str:
    """The benchmark's name, with that of the file where one folder may hold several."""
    name, file = str(record["benchmark"]), record["file"]
    return name if file == name else f"{name} ({file})"


def _summary(records: list[dict[str, Any]]) -> str:
    """What had to be reached, over all benchmarks that say so: how many lines are met, and those that are not."""
    rows = []
    for record in records:
        for table in record["tables"]:
            judged = [row for row in table["rows"] if row.get("verdict")]
            if not judged:
                continue
            short = [row for row in judged if str(row["verdict"]).startswith("SHORT")]
            first = table["columns"][0]["key"]
            rows.append(
                {
                    "benchmark": _heading(record),
                    "table": table["title"],
                    "met": sum(row["verdict"] in ("met", "yes") for row in judged),
                    "all": len(judged),
                    "short": "; ".join(f"{row.get(first)}" for row in short),
                }
            )
    if not rows:
        return ""
    columns = [Column("benchmark", "benchmark"), Column("table", "table"), Column("met", "met", "count")]
    columns += [Column("all", "of", "count"), Column("short", "short")]
    return _table(asdict(Table("What had to be reached", columns, rows)))


def _section(record: dict[str, Any], folder: Path) -> str:
    """One benchmark: heading, machine, tables, picture."""
    about, settings = record["machine"], record.get("settings", {})
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    chosen = ", ".join(f"{key} {value}" for key, value in settings.items() if value)
    lines = [
        f"<h2>{html.escape(_heading(record))}</h2>",
        f'<p class="machine">{html.escape(str(about.get("date")))}; {html.escape(str(about.get("cpu")))}, '
        f"{about.get('threads')} threads; {html.escape(versions)}{'; ' if chosen else ''}{html.escape(chosen)}</p>",
    ]
    lines += [_table(table) for table in record["tables"]]
    lines.append(_picture(record, folder))
    return "\n".join(lines) + "\n"


def _table(table: dict[str, Any]) -> str:
    columns = [Column(**column) for column in table["columns"]]

    def cell(tag: str, column: Column, text: str) -> str:
        return f'<{tag} class="{"text" if column.kind == "text" else "number"}">{html.escape(text)}</{tag}>'

    head = "".join(cell("th", c, c.heading) for c in columns)
    body = "".join(
        "<tr>" + "".join(cell("td", c, written(c.kind, row.get(c.key))) for c in columns) + "</tr>\n" for row in table["rows"]
    )
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in table.get("notes", ()))
    caption = f"<caption>{html.escape(table['title'])}</caption>"
    return f"<table>{caption}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>{notes}"


def _picture(record: dict[str, Any], folder: Path) -> str:
    """The benchmark's picture inside the page, or a line that says that it is gone."""
    if not record.get("picture"):
        return ""
    path = folder / record["picture"]
    if not path.is_file():
        return f'<p class="note">picture {html.escape(path.name)} not found beside the result</p>'
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(record["benchmark"])}" src="data:image/png;base64,{data}">'
