"""torchdiffeq's names: ``import solvers as torchdiffeq``."""

from .adjoint import odeint_adjoint
from .dense import odeint_dense
from .odeint import odeint
from .odeint_event import odeint_event

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]
