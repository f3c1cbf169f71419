"""Ways to differentiate a solve, registered by name in :data:`ADJOINTS`."""

from . import backprop, backsolve, discrete
from .base import ADJOINTS, Adjoint

__all__ = ["ADJOINTS", "Adjoint"]
