"""The README says what is true: its table, its examples, its two commands, its links."""

from __future__ import annotations

import re

import pytest

from benchmarks import methods_table

TEXT = methods_table.README.read_text(encoding="utf-8")
ROOT = methods_table.README.parent


def blocks(*languages: str) -> list[str]:
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", TEXT, re.S | re.M)


def test_table_of_methods_is_the_registry() -> None:
    assert methods_table.between_markers(TEXT) == methods_table.table(), (
        "run: python -m benchmarks.methods_table --write"
    )


def test_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the page, each seeing the names that those before it defined."""
    names: dict[str, object] = {"__name__": "readme"}
    examples = blocks("python")
    assert len(examples) >= 2
    for number, example in enumerate(examples, 1):
        exec(compile(example, f"README.md, example {number}", "exec"), names)
    assert capsys.readouterr().out


def test_first_example_is_short() -> None:
    assert len(blocks("python")[0].splitlines()) <= 15


def test_first_two_bash_blocks_stand_alone() -> None:
    job, tests = blocks("bash", "sh", "console")[:2]
    for block, command in ((job, "python -m benchmarks run stiff-diffusion"), (tests, "python -m pytest")):
        assert block.startswith("python3 -m venv .venv")
        assert "-c constraints.txt" in block
        assert command in block


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT)
    local = [target for target in targets if "://" not in target]
    assert local
    assert not [target for target in local if not (ROOT / target).exists()]
