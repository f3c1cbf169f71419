"""Constant steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .base import CONTROLLERS, Controller, Decision


@dataclass(frozen=True)
class FixedController(Controller):
    """Accepts every finite step and keeps dt."""

    adaptive: ClassVar[bool] = False

    def update(self, ops: Any, ratio: Any, error_order: int, state: Any, method_state: Any) -> Decision:
        return Decision(ops.isfinite(ratio), 1.0, state)


CONTROLLERS.register("fixed", FixedController())
