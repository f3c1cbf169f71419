"""The plan of the house, kept true: who imports whom, what stays optional, how long a function is."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Rooms of solvers, from the ground up. A room may import lower floors, never a room of its own floor or a higher one.
# Rooms that are not built yet may stand here; a room that is built must.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("status",),
    ("registry", "norms", "layout", "linalg", "problem"),
    ("field", "interpolate", "solution", "saveat"),
    ("optim",),
    ("control", "events"),
    ("methods",),
    ("loop",),
    ("adjoint", "runtime"),
    ("api", "nn"),
    ("compat",),
)
SIDEWAYS = {("nn", "api"): "a solve as a module is a call of solve"}

# The same of graphops.
GRAPH_FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("pattern",),
    ("backends",),
    ("autograd",),
    ("convert", "generate", "pickles"),
    ("graph",),
    ("segment",),
    ("calculus", "attention", "rewire", "data", "scatter_api"),
    ("message", "fields"),
    ("nn",),
)
PLANS = {"solvers": FLOORS, "graphops": GRAPH_FLOORS}

# In these folders a file knows its base and the modules named here; its siblings only by name through the registry.
SHARED_IN_FOLDER: dict[str, set[str]] = {
    "solvers.methods": {
        "base", "tableau", "tableaus", "implicit_tableaus", "stages", "adams_weights", "rock4_table", "rock4_recursion",
        "backward_weights", "solving", "stiffness",
    },
    "solvers.control": {"base"},
    "solvers.optim": {
        "base", "linesearch", "evaluating", "secant", "implicit", "curvature", "jacobian", "linearisation", "precondition",
        "probes",
    },
    "solvers.adjoint": {"base", "capture", "whole"},
    "graphops.backends": {"base"},
}

REQUIRED = {"torch", "numpy", "scipy"}
OPTIONAL = {
    "torchdiffeq", "torchode", "sksundae", "matplotlib", "rich", "torch_scatter", "torch_geometric", "networkx", "triton"
}
GRAPHOPS_MAY_IMPORT_SOLVERS = {"graphops.nn"}

LONGEST_FUNCTION = 60
LONG_FUNCTIONS: dict[str, str] = {  # "path::qualified name": why it is longer
    "solvers/api.py::solve": "its signature and the documentation of every argument; the body only calls the checks in turn",
}


class Import(NamedTuple):
    """One imported module: its dotted name, where it is imported, and whether that happens inside a function."""

    module: str
    line: int
    deferred: bool


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file of every module of ``package``; a folder's ``__init__`` has the folder's name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


SOLVERS, GRAPHOPS = modules("solvers"), modules("graphops")
KNOWN = SOLVERS | GRAPHOPS


def imports_in(tree: ast.AST, module: str, is_package: bool, known: set[str] | dict[str, Path]) -> Iterator[Import]:
    """All imports of a parsed module, absolute; ``from package import submodule`` counts as ``package.submodule``."""

    def walk(node: ast.AST, deferred: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - 1 if is_package else node.level
                parents = module.split(".")
                base = ".".join([*parents[: len(parents) - up], *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield Import(name if name in known else base, node.lineno, deferred)
        inside = deferred or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return walk(tree, False)


def imports_of(module: str) -> list[Import]:
    path = KNOWN[module]
    return list(imports_in(ast.parse(path.read_text(encoding="utf-8")), module, path.name == "__init__.py", KNOWN))


def room_of(module: str) -> str:
    """``solvers.methods.rk`` -> ``methods``; the package itself -> the empty name."""
    return (module.split(".") + [""])[1]


def floor_of(room: str, floors: tuple[tuple[str, ...], ...]) -> int:
    return next(number for number, rooms in enumerate(floors) if room in rooms)


def floor_breach(importer: str, imported: str) -> str | None:
    """Why ``importer`` may not import ``imported``, both modules of one package; None if it may."""
    floors = PLANS[top(importer)]
    here, there = room_of(importer), room_of(imported)
    if here in ("", there):  # the front door imports what it likes; a room's own files have their own test
        return None
    if there == "":
        return f"{importer} imports the package itself, which stands above every room"
    if floor_of(there, floors) > floor_of(here, floors):
        return f"{importer} imports {imported}, which is on a higher floor"
    if floor_of(there, floors) == floor_of(here, floors) and (here, there) not in SIDEWAYS:
        return f"{importer} imports {imported}, which is on the same floor"
    return None


def sibling_breach(importer: str, imported: str) -> str | None:
    """Why a file in a folder with a base may not import its sibling; None if it may."""
    for folder, shared in SHARED_IN_FOLDER.items():
        if not (importer.startswith(folder + ".") and imported.startswith(folder + ".")):
            continue
        sibling = imported.removeprefix(folder + ".").split(".")[0]
        if importer != imported and sibling not in shared:
            return f"{importer} imports its sibling {imported}: use the registry, or list it as shared"
    return None


def top(name: str) -> str:
    return name.split(".")[0]


@pytest.mark.parametrize("package", PLANS)
def test_every_room_is_on_the_plan(package: str) -> None:
    planned = {room for floor in PLANS[package] for room in floor}
    assert {room_of(module) for module in KNOWN if top(module) == package} - {""} <= planned


@pytest.mark.parametrize("module", KNOWN)
def test_imports_run_downward(module: str) -> None:
    internal = [item for item in imports_of(module) if top(item.module) == top(module)]
    breaches = [(item.line, why) for item in internal if (why := floor_breach(module, item.module))]
    assert not breaches


@pytest.mark.parametrize("module", [m for m in KNOWN if any(m.startswith(f + ".") for f in SHARED_IN_FOLDER)])
def test_files_of_a_folder_know_only_their_base(module: str) -> None:
    breaches = [(item.line, why) for item in imports_of(module) if (why := sibling_breach(module, item.module))]
    assert not breaches


@pytest.mark.parametrize("module", KNOWN)
def test_imports_from_outside(module: str) -> None:
    """At import time: the standard library, torch, numpy, scipy. An optional package only inside a function."""
    own = "solvers" if module in SOLVERS else "graphops"
    for item in imports_of(module):
        name = top(item.module)
        assert name not in ("benchmarks", "tests", "proxode"), item
        assert not (own == "solvers" and name == "graphops"), item
        if own == "graphops" and name == "solvers":
            assert module in GRAPHOPS_MAY_IMPORT_SOLVERS and item.module in ("solvers", "solvers.nn"), item
        if name not in sys.stdlib_module_names | REQUIRED | {"solvers", "graphops"}:
            assert item.deferred and name in OPTIONAL, item


@pytest.mark.parametrize(
    ("module", "source", "floors", "siblings"),
    [
        ("solvers.norms", "from .status import Status", 0, 0),
        ("solvers.status", "from .registry import Registry", 1, 0),
        ("solvers.norms", "from solvers.layout import Layout", 1, 0),
        ("solvers.loop", "from . import adjoint", 1, 0),
        ("solvers.loop", "def f():\n    import solvers.adjoint.backprop", 1, 0),
        ("solvers.loop", "import solvers", 1, 0),
        ("solvers.nn", "from .api import solve", 0, 0),
        ("solvers.api", "from .nn import ODEBlock", 1, 0),
        ("solvers.methods.rk", "from ..field import Field\nfrom .base import Method", 0, 0),
        ("solvers.methods.rk", "from . import base, bdf", 0, 1),
        ("solvers.methods.rk", "from ..methods.bdf import Bdf", 0, 1),
        ("solvers.methods", "from . import rk, bdf", 0, 0),
        ("graphops.segment", "from .graph import Graph", 0, 0),
        ("graphops.graph", "from . import segment", 1, 0),
        ("graphops.backends.native", "from ..pattern import Pattern\nfrom .plain import Plain", 0, 1),
    ],
)
def test_the_tests_above_see_what_they_should(module: str, source: str, floors: int, siblings: int) -> None:
    known = {f"{package}.{room}" for package, floors in PLANS.items() for floor in floors for room in floor}
    known |= {f"solvers.methods.{name}" for name in ("base", "rk", "bdf")}
    known |= {f"graphops.backends.{name}" for name in ("base", "native", "plain")}
    found = list(imports_in(ast.parse(source), module, module == "solvers.methods", known))
    assert sum(floor_breach(module, item.module) is not None for item in found) == floors
    assert sum(sibling_breach(module, item.module) is not None for item in found) == siblings


def test_base_install_imports_without_any_extra() -> None:
    program = f"""
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"{{name}} is not part of the base install", name=name)

sys.meta_path.insert(0, Absent())
for name in {list(KNOWN)!r}:
    importlib.import_module(name)
from proxode import graphops, solvers
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def project_files() -> list[Path]:
    """Files of the project as git sees it: tracked, or new and not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_no_file_names_a_private_path() -> None:
    """A path of one machine in a file is of no use to anybody else."""
    private = re.compile(r"(?<![\w.])/(work|tmp|root|home|opt/\w+)(?![\w-])|\.\./shared\b")
    found = []
    for path in project_files():
        data = path.read_bytes()
        if b"\0" in data or path == Path(__file__).resolve():
            continue
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), 1):
            found += [f"{path.relative_to(ROOT)}:{number}: {match[0]}" for match in private.finditer(line)]
    assert not found


def functions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Qualified name and number of lines, signature and docstring included, of every function below ``tree``."""
    for node in ast.iter_child_nodes(tree):
        name = f"{prefix}{node.name}" if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else ""
        if name and not isinstance(node, ast.ClassDef):
            yield name, (node.end_lineno or node.lineno) - node.lineno + 1
        yield from functions(node, f"{name}." if name else prefix)


def test_long_functions_are_named_with_their_reason() -> None:
    found = set()
    for folder in ("solvers", "graphops", "benchmarks", "tests"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            where = path.relative_to(ROOT).as_posix()
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found |= {f"{where}::{name}" for name, lines in functions(tree) if lines > LONGEST_FUNCTION}
    assert found == set(LONG_FUNCTIONS)
    assert all(LONG_FUNCTIONS.values())


@pytest.mark.parametrize(("package", "marker"), [("solvers", "rooms"), ("graphops", "graph-rooms")])
def test_contributing_lists_the_rooms_that_exist(package: str, marker: str) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split(f"<!-- {marker}:begin -->")[1].split(f"<!-- {marker}:end -->")[0]
    rooms = [row.split("|")[1] for row in table.splitlines() if row.startswith("| `")]
    listed = set(re.findall(r"`([\w/.]+)`", " ".join(rooms)))
    home, paths = ROOT / package, set(modules(package).values())
    folders = {path.parent for path in paths} - {home}
    files = {path for path in paths if path.parent == home} - {home / "__init__.py"}
    assert listed == {f"{folder.name}/" for folder in folders} | {file.name for file in files}
