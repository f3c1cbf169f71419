"""Solver classes of the fixed-step methods, for those who derive from them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...methods import METHODS
from .misc import Perturb
from .rk_common import _increment, rk2_step_func, rk3_step_func, rk4_alt_step_func  # noqa: F401  (imported from here by others)
from .solvers import FixedGridODESolver


class _Tabled(FixedGridODESolver):
    method: str

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        f0 = func(t0, y0, perturb=Perturb.NEXT if self.perturb else Perturb.NONE)
        table: Any = METHODS[self.method]
        return _increment(func, t0, dt, t1, y0, table.tableau, f0, self.perturb), f0


class Euler(_Tabled):
    method, order = "euler", 1


class Midpoint(_Tabled):
    method, order = "midpoint", 2


class Heun2(_Tabled):
    method, order = "heun2", 2


class Heun3(_Tabled):
    method, order = "heun3", 3


class RK4(_Tabled):
    method, order = "rk4", 4

    def _step_func(self, func: Any, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        f0 = func(t0, y0, perturb=Perturb.NEXT if self.perturb else Perturb.NONE)
        return rk4_alt_step_func(func, t0, dt, t1, y0, f0=f0, perturb=self.perturb), f0


STEPPING = ("rk4_alt_step_func", "_increment")
"""Functions that the classes look up here at each step."""
