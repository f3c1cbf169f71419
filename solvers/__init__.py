"""Differentiable ODE solvers for PyTorch: explicit, Adams and proximal methods on one time loop."""

from . import nn
from .adjoint import ADJOINTS, Adjoint
from .api import solve
from .compat import odeint, odeint_adjoint, odeint_dense, odeint_event
from .compat.private import install_as_torchdiffeq
from .control import CONTROLLERS, Controller, Jump
from .events import Event, Fired
from .loop import Step
from .methods import METHODS, Method
from .problem import GradientField, LinearField, QuasiLinearField, check_energy
from .solution import Solution, Stats
from .status import (
    ArgumentError,
    ArgumentTypeError,
    EventsAccumulateError,
    InnerSolverError,
    MaxStepsError,
    NonFiniteError,
    ProxodeError,
    RoundingWarning,
    SolveError,
    Status,
    StepUnderflowError,
    StiffnessWarning,
    UnknownNameError,
    UnsupportedError,
)

__version__ = "0.1.0"

__all__ = [
    "ADJOINTS",
    "CONTROLLERS",
    "METHODS",
    "Adjoint",
    "ArgumentError",
    "ArgumentTypeError",
    "Controller",
    "Event",
    "EventsAccumulateError",
    "Fired",
    "GradientField",
    "InnerSolverError",
    "Jump",
    "LinearField",
    "MaxStepsError",
    "Method",
    "NonFiniteError",
    "ProxodeError",
    "QuasiLinearField",
    "RoundingWarning",
    "Solution",
    "SolveError",
    "Stats",
    "Status",
    "Step",
    "StepUnderflowError",
    "StiffnessWarning",
    "UnknownNameError",
    "UnsupportedError",
    "check_energy",
    "install_as_torchdiffeq",
    "nn",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "solve",
]
