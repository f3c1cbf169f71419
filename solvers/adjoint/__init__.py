"""Ways to differentiate a solve, registered by name in :data:`ADJOINTS`."""

from . import backprop, discrete  # noqa: F401  (registration)
from .base import ADJOINTS, Adjoint

__all__ = ["ADJOINTS", "Adjoint"]
