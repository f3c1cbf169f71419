"""Step-size control, and the times that steps must end at."""

from . import auto, bdf, fixed, order, pid, predictive  # (registration)
from .base import CONTROLLERS, Controller, Decision
from .clip import JointClock, Jump, RowClock
from .initial import initial_step

__all__ = ["CONTROLLERS", "Controller", "Decision", "JointClock", "Jump", "RowClock", "initial_step"]
