"""The typed errors of graphops; each names the argument, its value and what to do instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GraphopsError(Exception):
    """Base of everything that this package raises on purpose."""


class ArgumentError(GraphopsError, ValueError):
    """An argument has a value that cannot be used; raised before any work is done."""


class ArgumentTypeError(GraphopsError, TypeError):
    """An argument has a type or dtype that cannot be used; raised before any work is done."""


class UnknownNameError(ArgumentError):
    """A name that nothing here is called by; the message offers the nearest one."""


class UnsupportedError(GraphopsError, NotImplementedError):
    """A combination that is understood but not provided."""


class MissingPackageError(GraphopsError, ImportError):
    """An optional package is asked for and not installed."""


class MissingDataError(GraphopsError, FileNotFoundError):
    """A file of data is not where it was looked for; the message says where to get it."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UnknownNameError:
    """The error for an unknown ``name``, suggesting the nearest of ``known``."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
    return UnknownNameError(f"unknown {kind} {name!r}: {hint}")
