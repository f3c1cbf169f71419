"""Integration methods: pure steps, registered by name in :data:`METHODS`."""

from . import adams, auto, bdf, exponential, implicit, proximal, rk, semi_implicit, stabilised  # (registration)
from .base import METHODS, Method, StepOut
from .stiffness import stiffness, unseen

__all__ = ["METHODS", "Method", "StepOut", "stiffness", "unseen"]
