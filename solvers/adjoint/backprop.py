"""Differentiation by plain autograd through the steps that were taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..loop import Plan, Trajectory, drive
from .base import ADJOINTS, Adjoint


@dataclass(frozen=True)
class Backprop(Adjoint):
    """Records every accepted step on autograd's tape: exact for the discrete solution, differentiable again, memory
    proportional to the number of evaluations."""

    def run(self, plan: Plan, y0: Tensor, stats: Any) -> Trajectory:
        return drive(plan, y0)


ADJOINTS.register("backprop", Backprop())
