"""Arrays out of a pickle without running it: nothing that the file names is imported or called.

A pickle is a program; a list of permitted names would still hand its arguments to the constructors of numpy and scipy. Here
each name becomes a stand-in that only notes what it is called with, and arrays are built from the notes, checked.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from typing import Any

import numpy as np
import scipy.sparse

__all__ = ["checked_csr", "read_pickle"]


class Noted(dict):
    """Stands in for what a pickle names: keeps the arguments of its call, its state, and items set on it."""

    name = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any) -> Noted:
        noted = super().__new__(cls)
        noted.args = args
        return noted

    def __init__(self, *args: Any) -> None:
        """Nothing: that of dict would take the arguments for items."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Reader(pickle.Unpickler):
    """Runs the stack machine of a pickle over builtin containers and `Noted` alone."""

    def find_class(self, module: str, name: str) -> type[Noted]:
        return type("Stand_in", (Noted,), {"name": name})  # a new class for each: nothing done to one reaches the next file


def read_pickle(content: bytes) -> Any:
    """An array, a ``csr_matrix`` or a dict of lists, as Python 2 or 3 and numpy or scipy of any version pickled it.

    Raises ``pickle.UnpicklingError`` for anything else, and for arrays whose parts do not fit together.
    """
    try:
        return decoded(Reader(io.BytesIO(content), encoding="latin1").load())
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # a pickle that is not one fails in as many ways as there are instructions
        raise pickle.UnpicklingError(f"not a pickled array, csr_matrix or dict ({error})") from error


def decoded(value: Any) -> Any:
    """What a note stands for; plain numbers, texts, lists and dicts as they are."""
    if isinstance(value, type):
        raise pickle.UnpicklingError("it holds a name alone")
    if not isinstance(value, Noted):
        return value
    if value.name == "_reconstruct":
        return array_of(value)
    if value.name in ("encode", "bytes"):  # how protocols before 3 write bytes in Python 3, the latter none at all
        return "".join(value.args[:1]).encode("latin1")
    if value.name == "defaultdict":
        return dict(value)
    if value.name == "csr_matrix" or (value.name == "_reconstructor" and value.args[0].name == "csr_matrix"):
        parts = {key: decoded(part) for key, part in value.state.items()}
        shape = parts["_shape"] if "_shape" in parts else parts["shape"]
        return checked_csr(parts["data"], parts["indices"], parts["indptr"], shape)
    raise pickle.UnpicklingError(f"it holds an object called {value.name!r}, which is neither an array nor a csr_matrix")


def array_of(note: Noted) -> np.ndarray:
    """The array of numbers that ``_reconstruct`` and its state describe."""
    _, shape, dtype, fortran, content = note.state
    code, order = dtype.args[0], dtype.state[1]
    if not re.fullmatch("[biuf][1248]", code) or order not in ("<", ">", "|", "="):
        raise pickle.UnpicklingError(f"it holds an array of dtype {order}{code}; only numbers are read")
    content = decoded(content)
    content = content.encode("latin1") if isinstance(content, str) else content
    size = np.dtype(order + code).itemsize * math.prod(shape)
    if len(content) != size:
        raise pickle.UnpicklingError(f"an array of shape {shape} has {len(content)} bytes instead of {size}")
    return np.ndarray(shape, order + code, content, order="F" if fortran else "C").copy()


def checked_csr(data: Any, indices: Any, indptr: Any, shape: Any) -> scipy.sparse.csr_array:
    """A CSR array whose indices are all within ``shape``: scipy's compiled code does not check them again."""
    matrix = scipy.sparse.csr_array((data, indices, indptr), shape=tuple(int(n) for n in shape))
    matrix.check_format(full_check=True)
    return matrix
