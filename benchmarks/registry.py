"""One registry of benchmarks, problems and peers: adding one is one entry; an unknown name suggests the nearest."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from solvers.registry import nearest

__all__ = [
    "BENCHMARKS",
    "PEERS",
    "PROBLEMS",
    "Benchmark",
    "BenchmarkError",
    "Column",
    "MissingExtra",
    "Option",
    "Registry",
    "Result",
    "Settings",
    "Table",
    "UnknownName",
    "discover",
    "need",
    "unknown",
]

Entry = TypeVar("Entry")


class BenchmarkError(Exception):
    """A request that cannot be served; the message says what to do instead."""


class UnknownName(BenchmarkError):
    """A name that no entry has."""


def unknown(kind: str, name: str, known: Iterable[str]) -> UnknownName:
    """The error for an unknown `name`, suggesting the nearest known one."""
    return UnknownName(f"unknown {kind} {name!r}: {nearest(name, known)}")


class MissingExtra(BenchmarkError):
    """An optional package is needed and not installed."""


def installed(package: str) -> bool:
    """Whether `package` can be imported here."""
    return importlib.util.find_spec(package) is not None


def need(package: str, extra: str = "bench") -> None:
    """Raise MissingExtra if `package` is not installed, naming the extra that holds it."""
    if not installed(package):
        raise MissingExtra(f'{package} is not installed; it is part of the {extra!r} extra: pip install "proxode[{extra}]"')


class Registry(Mapping[str, Entry], Generic[Entry]):
    """Named entries of one kind, in the order of their registration."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> Entry:
        """Register `entry`; a name is taken once."""
        if name in self._entries:
            raise BenchmarkError(f"the {self.kind} {name!r} is registered twice; rename one of them")
        self._entries[name] = entry
        return entry

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def choose(self, names: Sequence[str] | None) -> list[Entry]:
        """The entries called `names`, or all of them for None; raises UnknownName."""
        return [self[name] for name in (self if names is None else names)]


@dataclass(frozen=True)
class Settings:
    """What the command line asked for; names are None for a benchmark's own choice, `options` those of the benchmark alone."""

    methods: tuple[str, ...] | None = None
    peers: tuple[str, ...] | None = None
    problems: tuple[str, ...] | None = None
    quick: bool = False
    full: bool = False
    device: str = "cpu"
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Column:
    """One column: the key in each row, its heading, and how its values are written (see `report.written`)."""

    key: str
    heading: str
    kind: str = "text"


@dataclass
class Table:
    """A table of raw values; rows are dictionaries by column key, missing keys are blank."""

    title: str
    columns: list[Column]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Result:
    """What a benchmark found: tables and `data` go into the JSON, `arrays` are only for its picture."""

    tables: list[Table]
    data: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)


def names(text: str) -> tuple[str, ...]:
    """A comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def known_names(kind: str, known: Iterable[str], text: str) -> tuple[str, ...]:
    """The same of names of one `kind` that are known; raises UnknownName."""
    found, known = names(text), tuple(known)
    for name in found:
        if name not in known:
            raise unknown(kind, name, known)
    return found


def positive(text: str) -> int:
    """A number of things; raises ValueError."""
    value = int(text)
    if value < 1:
        raise ValueError("must be 1 or more")
    return value


@dataclass(frozen=True)
class Option:
    """A setting that one benchmark has, `--name VALUE`; `read` makes the value in `Settings.options[name]` of the text."""

    name: str
    about: str
    default: Any = None
    read: Callable[[str], Any] = str
    choices: tuple[str, ...] | None = None

    def value(self, text: str | None) -> Any:
        """What was asked for, the default for None; raises BenchmarkError for what cannot be read."""
        if text is None:
            return self.default
        if self.choices is not None and text not in self.choices:
            raise unknown(f"--{self.name}", text, self.choices)
        try:
            return self.read(text)
        except ValueError as error:
            raise BenchmarkError(f"--{self.name} {text}: {error}") from error


@dataclass(frozen=True)
class Benchmark:
    """A registered benchmark: `run` measures, `draw` makes its picture from the result; `problems` it can choose from."""

    name: str
    summary: str
    usual_time: str
    quick_time: str
    run: Callable[[Settings], Result]
    draw: Callable[[Result, Path], None]
    takes_peers: bool = True
    options: tuple[Option, ...] = ()
    problems: Registry[Any] | None = None


BENCHMARKS: Registry[Benchmark] = Registry("benchmark")
PROBLEMS: Registry[Any] = Registry("problem")
PEERS: Registry[Any] = Registry("peer")


def discover() -> None:
    """Import every file of this folder, so that what they register is there: a new file needs no other edit."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__package__}.{module.name}")
