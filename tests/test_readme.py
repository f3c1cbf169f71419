"""The README says what is true: its table, its examples, its two commands, its links."""

from __future__ import annotations

import os
import re

import pytest
import torch

from benchmarks import methods_table

TEXT = methods_table.README.read_text(encoding="utf-8")
ROOT = methods_table.README.parent
DATA = "PROXODE_DATA"


def blocks(*languages: str) -> list[str]:
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", TEXT, re.S | re.M)


def test_table_of_methods_is_the_registry() -> None:
    assert methods_table.between_markers(TEXT) == methods_table.table(), (
        "run: python -m benchmarks.methods_table --write"
    )


def test_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the page, each seeing the names that those before it defined."""
    names: dict[str, object] = {"__name__": "readme"}
    examples = [example for example in blocks("python") if DATA not in example]
    assert len(examples) >= 2
    for number, example in enumerate(examples, 1):
        exec(compile(example, f"README.md, example {number}", "exec"), names)
    assert capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(DATA not in os.environ, reason="PROXODE_DATA names no folder of data sets")
def test_example_with_data_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Cora in 25 lines, to a test accuracy of four in five."""
    (example,) = (example for example in blocks("python") if DATA in example)
    assert len(example.splitlines()) <= 25
    exec(compile(example, "README.md, Cora", "exec"), {"__name__": "readme", "torch": torch, "nn": torch.nn})
    assert float(capsys.readouterr().out.split(":")[1]) >= 0.79


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
