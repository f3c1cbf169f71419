"""Whether somebody has replaced, from outside, what a built-in solver class is made of: then the class has to run itself."""

from __future__ import annotations

from types import FunctionType
from typing import Any

from torch import Tensor

from . import fixed_grid, misc, rk_common
from .rk_common import RKAdaptiveStepsizeODESolver
from .solvers import FixedGridODESolver

NORMS = ("_rms_norm", "_mixed_norm")

_attributes: dict[type, list[tuple[str, Any]]] = {}
_functions: dict[type, list[tuple[dict[str, Any], str, Any]]] = {}


def watch(solver: type) -> None:
    """Remember ``solver``, and the functions that it looks up in its modules, as they are now."""
    if not issubclass(solver, (FixedGridODESolver, RKAdaptiveStepsizeODESolver)):
        return
    names = {name for base in solver.__mro__[:-1] for name in vars(base) if name == "__init__" or not name.startswith("__")}
    found = [(name, getattr(solver, name)) for name in sorted(names)]
    _attributes[solver] = [(n, x) for n, x in found if isinstance(x, (FunctionType, Tensor, tuple, int, str))]
    own = fixed_grid if issubclass(solver, FixedGridODESolver) else rk_common
    used = [(vars(own), name) for name in own.STEPPING] + [(vars(misc), name) for name in NORMS]
    _functions[solver] = [(module, name, module[name]) for module, name in used]


def patched(solver: type) -> bool:
    """Whether anything of ``solver`` is not what it was."""
    return any(module[name] is not x for module, name, x in _functions.get(solver, ())) or any(
        getattr(solver, name, None) is not x for name, x in _attributes.get(solver, ())
    )
