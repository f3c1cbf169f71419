"""``install_as_torchdiffeq``: ``import torchdiffeq`` then means this package."""

from __future__ import annotations

import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import Tensor

from ... import compat
from ...adjoint import ADJOINTS
from ...status import ArgumentError
from ..classes import BUILT_IN, OVERRIDES, SOLVERS
from ..odeint import Problem
from ..options import SCIPY, choose
from . import adjoint, event_handling, fixed_grid, interp, misc, patches, rk_common, solvers
from .event_handling import ImplicitFnGradientRerouting
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


class _Whole:
    """A method as an object that integrates all at once: there is nothing to step by hand."""

    method: str

    def __init__(self, func: Any, y0: Any, rtol: Any = 1e-7, atol: Any = 1e-9, **options: Any) -> None:
        self.func, self.y0, self.rtol, self.atol, self.options = func, y0, rtol, atol, options

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        return {"callback_step"} if cls.method != SCIPY else set()

    def integrate(self, t: Tensor) -> Tensor:
        """States ``(T, *y0.shape)`` at the ascending times ``t``."""
        func = partial(self.func)
        if self.valid_callbacks() and hasattr(self.func, "callback_step"):
            func.callback_step = self.func.callback_step  # type: ignore[attr-defined]
        problem = Problem.checked(func, self.y0, t, self.rtol, self.atol)
        return problem.run(choose(self.method, self.options, func, self.y0, t), ADJOINTS["backprop"]).y


class AdamsBashforth(_Whole):
    method = "explicit_adams"


class AdamsBashforthMoulton(_Whole):
    method = "implicit_adams"


class ScipyWrapperODESolver(_Whole):
    method = "scipy_solver"


BUILT_IN.update(
    dopri8=Dopri8Solver, dopri5=Dopri5Solver, bosh3=Bosh3Solver, fehlberg2=Fehlberg2, adaptive_heun=AdaptiveHeunSolver,
    euler=Euler, midpoint=Midpoint, heun2=Heun2, heun3=Heun3, rk4=RK4, explicit_adams=AdamsBashforth,
    implicit_adams=AdamsBashforthMoulton, fixed_adams=AdamsBashforthMoulton, scipy_solver=ScipyWrapperODESolver,
)
SOLVERS.update(BUILT_IN)
for _solver in BUILT_IN.values():
    patches.watch(_solver)
OVERRIDES.append(patches.patched)


def _module(name: str, **names: Any) -> ModuleType:
    """With a specification and a file, which code reads that asks whether torchdiffeq is there, and what it is made of."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None, origin=__file__, is_package="__path__" in names)
    module.__file__ = __file__
    vars(module).update(names)
    return module


def _tree() -> dict[str, ModuleType]:
    """Full names of torchdiffeq's modules, and what stands for each."""
    public = {name: getattr(compat, name) for name in compat.__all__}
    shared = {"_ButcherTableau": rk_common._ButcherTableau, "RKAdaptiveStepsizeODESolver": RKAdaptiveStepsizeODESolver}

    def coefficients(solver: Any, tableau: str, middle: str) -> dict[str, Any]:
        return {solver.__name__: solver, tableau: solver.tableau, middle: solver.mid, **shared}

    parts: dict[str, Any] = {
        "misc": misc, "solvers": solvers, "rk_common": rk_common, "fixed_grid": fixed_grid, "interp": interp, "adjoint": adjoint,
        "event_handling": event_handling,
    }
    front = "torchdiffeq"
    impl = f"{front}._impl"

    def made(name: str, **names: Any) -> None:
        parts[name] = _module(f"{impl}.{name}", **names)

    checks = {name: getattr(misc, name) for name in ("_check_inputs", "_flat_to_shape")}
    made("odeint", SOLVERS=SOLVERS, ImplicitFnGradientRerouting=ImplicitFnGradientRerouting,
         _interp_evaluate=interp._interp_evaluate, **{solver.__name__: solver for solver in BUILT_IN.values()}, **public,
         **checks)
    made("dopri5", **coefficients(Dopri5Solver, "_DORMAND_PRINCE_SHAMPINE_TABLEAU", "DPS_C_MID"))
    made("dopri8", **coefficients(Dopri8Solver, "_DOPRI8_TABLEAU", "_C_mid"))
    made("bosh3", **coefficients(Bosh3Solver, "_BOGACKI_SHAMPINE_TABLEAU", "_BS_C_MID"))
    made("fehlberg2", **coefficients(Fehlberg2, "_FEHLBERG2_TABLEAU", "_FE_C_MID"))
    made("adaptive_heun", **coefficients(AdaptiveHeunSolver, "_ADAPTIVE_HEUN_TABLEAU", "_AH_C_MID"))
    made("fixed_adams", AdamsBashforth=AdamsBashforth, AdamsBashforthMoulton=AdamsBashforthMoulton, _MIN_ORDER=4, _MAX_ORDER=12,
         _MAX_ITERS=4, FixedGridODESolver=solvers.FixedGridODESolver, Perturb=misc.Perturb, _linf_norm=misc._linf_norm,
         _compute_error_ratio=misc._compute_error_ratio, rk4_alt_step_func=rk_common.rk4_alt_step_func)
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
