"""``install_as_torchdiffeq``: ``import torchdiffeq`` then means this package."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from ... import compat
from ...status import ArgumentError
from ..classes import BUILT_IN, OVERRIDES, SOLVERS
from . import adjoint, fixed_grid, interp, misc, rk_common, solvers
from .fixed_grid import RK4, Euler, Heun2, Heun3, Midpoint
from .rk_common import RKAdaptiveStepsizeODESolver, butcher, middle

VERSION = "0.2.5"
"""That of torchdiffeq whose names and behaviour these are."""


def _pair(class_name: str, method: str, order: int) -> type:
    body = {"order": order, "tableau": butcher(method), "mid": middle(method), "__module__": __name__}
    return type(class_name, (RKAdaptiveStepsizeODESolver,), body)


Dopri5Solver = _pair("Dopri5Solver", "dopri5", 5)
Dopri8Solver = _pair("Dopri8Solver", "dopri8", 8)
Bosh3Solver = _pair("Bosh3Solver", "bosh3", 3)
Fehlberg2 = _pair("Fehlberg2", "fehlberg2", 2)
AdaptiveHeunSolver = _pair("AdaptiveHeunSolver", "adaptive_heun", 2)


class _ByName:
    """A method that is no solver object here: it can be chosen by name only."""

    def __init__(self, **arguments: Any) -> None:
        raise ArgumentError(f"{type(self).__name__} cannot be made by hand: pass its name to odeint")

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        return set()


class AdamsBashforth(_ByName):
    """"explicit_adams"."""


class AdamsBashforthMoulton(_ByName):
    """"implicit_adams"."""


class ScipyWrapperODESolver(_ByName):
    """"scipy_solver"."""


BUILT_IN.update(
    dopri8=Dopri8Solver, dopri5=Dopri5Solver, bosh3=Bosh3Solver, fehlberg2=Fehlberg2, adaptive_heun=AdaptiveHeunSolver,
    euler=Euler, midpoint=Midpoint, heun2=Heun2, heun3=Heun3, rk4=RK4, explicit_adams=AdamsBashforth,
    implicit_adams=AdamsBashforthMoulton, fixed_adams=AdamsBashforthMoulton, scipy_solver=ScipyWrapperODESolver,
)
SOLVERS.update(BUILT_IN)
OVERRIDES.append(rk_common.patched)


def _module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(names)
    return module


def _tree() -> dict[str, ModuleType]:
    """Full names of torchdiffeq's modules, and what stands for each."""
    public = {name: getattr(compat, name) for name in compat.__all__}
    shared = {"_ButcherTableau": rk_common._ButcherTableau, "RKAdaptiveStepsizeODESolver": RKAdaptiveStepsizeODESolver}
    dopri5 = {"_DORMAND_PRINCE_SHAMPINE_TABLEAU": Dopri5Solver.tableau, "DPS_C_MID": Dopri5Solver.mid}  # type: ignore[attr-defined]
    bosh3 = {"_BOGACKI_SHAMPINE_TABLEAU": Bosh3Solver.tableau, "_BS_C_MID": Bosh3Solver.mid}  # type: ignore[attr-defined]
    parts: dict[str, Any] = {
        "misc": misc, "solvers": solvers, "rk_common": rk_common, "fixed_grid": fixed_grid, "interp": interp, "adjoint": adjoint,
    }
    front = "torchdiffeq"
    impl = f"{front}._impl"

    def made(name: str, **names: Any) -> None:
        parts[name] = _module(f"{impl}.{name}", **names)

    made("odeint", SOLVERS=SOLVERS, **public, **{n: getattr(misc, n) for n in ("_check_inputs", "_flat_to_shape")},
         _interp_evaluate=interp._interp_evaluate)
    made("dopri5", Dopri5Solver=Dopri5Solver, **dopri5, **shared)
    made("dopri8", Dopri8Solver=Dopri8Solver, **shared)
    made("bosh3", Bosh3Solver=Bosh3Solver, **bosh3, **shared)
    made("fehlberg2", Fehlberg2=Fehlberg2, **shared)
    made("adaptive_heun", AdaptiveHeunSolver=AdaptiveHeunSolver, **shared)
    made("fixed_adams", AdamsBashforth=AdamsBashforth, AdamsBashforthMoulton=AdamsBashforthMoulton)
    made("scipy_wrapper", ScipyWrapperODESolver=ScipyWrapperODESolver)
    # As in torchdiffeq, where the package's attribute ``odeint`` is the function and not the module.
    package = _module(impl, **(parts | public), __path__=[])
    tree = {front: _module(front, **public, _impl=package, __version__=VERSION, __path__=[]), impl: package}
    return tree | {f"{impl}.{name}": part for name, part in parts.items()}


_installed: dict[str, ModuleType] = {}


def install_as_torchdiffeq() -> ModuleType:
    """Make ``import torchdiffeq``, and of ``torchdiffeq._impl.*``, mean this package; returns the module.

    Call it before the code that imports torchdiffeq. Again: nothing more happens. An installed torchdiffeq is not touched,
    only not found.

    Raises ``ArgumentError`` if torchdiffeq itself has been imported: code that holds its functions would go on using them.
    """
    if _installed:
        sys.modules.update(_installed)
        return _installed["torchdiffeq"]
    if "torchdiffeq" in sys.modules:
        raise ArgumentError(
            "torchdiffeq has been imported already: call install_as_torchdiffeq() before the first import of torchdiffeq"
        )
    _installed.update(_tree())
    sys.modules.update(_installed)
    return _installed["torchdiffeq"]


def uninstall_torchdiffeq() -> None:
    """Take back :func:`install_as_torchdiffeq`; what has been imported meanwhile stays as it is."""
    for name, module in _installed.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]
    _installed.clear()
