"""How a solve is differentiated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from ..loop import Plan, Trajectory
from ..registry import Registry


class Adjoint(ABC):
    """Runs a plan so that gradients of the outputs reach y0, t, the arguments of f and whatever f has captured.

    Keyword-only dataclass fields are the options that ``solve`` accepts for it.
    """

    @abstractmethod
    def run(self, plan: Plan, y0: Tensor, stats: Any) -> Trajectory:
        """Integrate the flat ``y0``. ``stats.backward`` is filled when a backward pass runs."""


ADJOINTS: Registry[Adjoint] = Registry("adjoint")
