"""Named things: methods, controllers, adjoints, inner solvers, and the options that each of them owns."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from .status import ArgumentError, UnknownNameError

T = TypeVar("T")

_OPTION_OWNER: dict[str, str] = {}
"""Option name -> the one kind of thing that it belongs to, so that ``solve`` can route it without guessing."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Text naming the closest of ``names``, or all of them when none is close."""
    names = sorted(names)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"


def claim_options(kind: str, names: Iterable[str]) -> None:
    """Record that options ``names`` belong to ``kind``.

    Raises ``ArgumentError`` if another kind owns one of them: an option must have one meaning in ``solve``.
    """
    for name in names:
        owner = _OPTION_OWNER.setdefault(name, kind)
        if owner != kind:
            raise ArgumentError(f"option {name!r} of a {kind} is already an option of a {owner}: give it another name")


def option_owner(name: str) -> str | None:
    return _OPTION_OWNER.get(name)


def all_options() -> tuple[str, ...]:
    return tuple(_OPTION_OWNER)


def options_of(thing: Any) -> tuple[str, ...]:
    """The keyword-only dataclass fields of ``thing``: what a user may set by name through ``solve``."""
    return tuple(f.name for f in dataclasses.fields(thing) if f.init and f.kw_only)


class Registry(Mapping[str, T], Generic[T]):
    """Name -> prototype instance (a frozen dataclass); its keyword-only fields are its options."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str, item: T) -> T:
        """Add ``item`` under ``name``. Raises ``ArgumentError`` if the name is taken."""
        if name in self._items:
            raise ArgumentError(f"{self.kind} {name!r} is already registered")
        claim_options(self.kind, options_of(item))
        self._items[name] = item
        return item

    def __getitem__(self, name: str) -> T:
        try:
            return self._items[name]
        except (KeyError, TypeError):
            raise UnknownNameError(f"unknown {self.kind} {name!r}: {nearest(name, self._items)}") from None

    def __contains__(self, name: object) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
