"""``odeint`` with torchdiffeq's signature, on ``solve``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adjoint import ADJOINTS, Adjoint
from ..api import solve
from ..loop import Plan, Trajectory
from ..solution import Solution
from ..status import ArgumentError, SolveError, UnsupportedError
from . import classes, scipy_solver
from .errors import CheckError, CheckTypeError, failure
from .event import check_event_times, solve_event
from .options import SCIPY, Choice, callbacks, choose


def odeint(
    func: Any,
    y0: Any,
    t: Any,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Any = None,
    event_fn: Any = None,
    batch_dim: int | None = None,
    args: tuple[Any, ...] = (),
    strict: bool = False,
) -> Any:
    """Solve dy/dt = func(t, y) from y(t[0]) = y0, differentiably, as ``torchdiffeq.odeint`` does.

    Args:
        func: called as ``func(t, y)``, t 0-dim in y's real dtype. y0: a tensor of any shape, or a tuple of tensors.
        t: ``(T,)`` strictly monotone. rtol, atol: numbers, tensors, or tuples for the parts of a tuple state.
        method: one of torchdiffeq's (None: "dopri5") or of ``solvers.METHODS``. options: of that method, a dict.
        event_fn: ``(t, y) -> tensor``: stop where an element crosses 0; then ``t`` is ``(2,)`` and tells the direction.
        batch_dim, args: as in :func:`~solvers.solve`, and not in torchdiffeq.
        strict: take the very steps that torchdiffeq 0.2.5 takes ("dopri5", "bosh3", "euler", "midpoint", "rk4").

    Returns the states ``(T, *y0.shape)``, a tuple of them for a tuple y0; with ``event_fn`` a pair (time of the event, ``(2,
    *y0.shape)``).

    Raises what torchdiffeq raises, as classes that are also ``solvers`` errors; a failed solve's carries ``.solution``.
    """
    problem = Problem.checked(func, y0, t, rtol, atol)
    if event_fn is not None:
        check_event_times(problem.t)
    solver = classes.own(method)
    if solver is not None:
        classes.refuse(method, batch_dim, strict)
        return classes.run(solver, func, y0, problem.t, rtol, atol, method, options, event_fn, args)
    choice = choose(method, options, func, y0, problem.t, strict)
    if event_fn is not None:
        return solve_event(problem, choice, event_fn, ADJOINTS["backprop"], batch_dim=batch_dim, args=args)
    return problem.run(choice, ADJOINTS["backprop"], batch_dim, args).y


@dataclass(frozen=True)
class Problem:
    """The arguments of a solve, checked. ``t`` is on the state's device."""

    func: Any
    y0: Any
    t: Tensor
    rtol: Any
    atol: Any

    @classmethod
    def checked(cls, func: Any, y0: Any, t: Any, rtol: Any, atol: Any) -> Problem:
        """Raises torchdiffeq's complaints, each before func is called."""
        if not isinstance(y0, (Tensor, tuple)):
            raise CheckTypeError(f"y0 must be either a torch.Tensor or a tuple, found {type(y0).__name__}")
        leaves = y0 if isinstance(y0, tuple) else (y0,)
        if not leaves:
            raise ArgumentError("y0 must be a tensor or a tuple of at least one, found an empty tuple")
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise CheckTypeError(f"y0 must be either a torch.Tensor or a tuple of them, found a {type(leaf).__name__} in it")
        rtol, atol = _tolerance("rtol", rtol, y0), _tolerance("atol", atol, y0)
        return cls(func, y0, check_times(t, leaves[0].device), rtol, atol)

    def run(
        self,
        choice: Choice,
        adjoint: Adjoint,
        batch_dim: int | None = None,
        args: tuple[Any, ...] = (),
        **more: Any,
    ) -> Solution:
        """The solution; raises the torchdiffeq relative of ``solve``'s error."""
        choice = choice.watched(callbacks(self.func, choice, lambda y: y))
        if choice.name == SCIPY:
            return scipy_solver.run(self, choice, adjoint, args)
        adapted = Adapted(adjoint, choice.adapt)
        throw = choice.adaptive or choice.method.implicit
        keywords: dict[str, Any] = {"max_steps": choice.max_steps, "throw": throw} | choice.keywords | more
        if choice.adaptive:
            keywords["controller"] = choice.controller
        try:
            solution = solve(
                self.func, self.y0, self.t, method=choice.method, rtol=self.rtol, atol=self.atol, adjoint=adapted,
                batch_dim=batch_dim, args=args, **keywords,
            )  # fmt: skip
        except SolveError as error:
            raise failure(error, choice.max_steps) from None
        _warn(solution, not keywords["throw"])
        return solution


@dataclass(frozen=True)
class Adapted(Adjoint):
    """Another adjoint, on a plan that was changed last."""

    wrapped: Adjoint
    changes: tuple[Callable[[Plan], Plan], ...] = ()

    def run(self, plan: Plan, y0: Tensor, stats: Any) -> Trajectory:
        # torchdiffeq takes what f returns as it comes: other dtypes, parts in other shapes of as many elements.
        plan.layout.lenient = True
        for change in self.changes:
            plan = change(plan)
        return self.wrapped.run(plan, y0, stats)


def check_one_dimensional(name: str, t: Tensor) -> None:
    if t.dim() != 1:
        raise CheckError(f"{name} must be one dimensional, found shape {tuple(t.shape)}")


def check_floating(name: str, t: Tensor) -> None:
    if not t.is_floating_point():
        raise TypeError(f"`{name}` must be a floating point Tensor but is a {t.type()}")


def check_times(t: Any, device: torch.device, what: str = "t") -> Tensor:
    """``t`` on ``device``; raises for what is not a strictly monotone 1-D tensor of floats."""
    if not isinstance(t, Tensor):
        raise CheckTypeError(f"{what} must be a torch.Tensor, found {type(t).__name__}")
    check_one_dimensional(what, t)
    check_floating(what, t)
    if t.device != device:
        warnings.warn(f"{what} is not on the same device as y0. Coercing to y0.device.", stacklevel=4)
        t = t.to(device)
    try:
        times = t.tolist()
    except RuntimeError as error:
        raise UnsupportedError(f"the values of {what} decide what is done: torch.func.vmap cannot map over them") from error
    if not times:
        raise CheckError(f"{what} must hold at least one time, found none")
    pairs = list(pairwise(times))
    if not (all(a < b for a, b in pairs) or all(a > b for a, b in pairs)):
        raise CheckError(f"{what} must be strictly increasing or decreasing, found {times!r:.80}")
    return t


def _tolerance(name: str, value: Any, y0: Any) -> Any:
    if isinstance(y0, tuple) and (isinstance(value, list) or getattr(value, "shape", ()) == (len(y0),)):
        value = tuple(value)
    parts = value if isinstance(value, tuple) else (value,)
    for part in parts:
        if isinstance(part, Tensor) and part.requires_grad:
            raise CheckError(f"{name} cannot require gradient: pass {name}.detach()")
    if isinstance(value, tuple):
        if not isinstance(y0, tuple):
            raise CheckTypeError(f"{name} must be a number or a tensor where y0 is a tensor, found a tuple")
        if len(value) != len(y0):
            raise CheckError(
                f"If using tupled {name} it must have the same length as the tuple y0, found {len(value)} and {len(y0)}"
            )
        return tuple(torch.as_tensor(_positive(part)) for part in value)
    if isinstance(value, Tensor) and isinstance(y0, tuple) and value.dim() > 0:
        # For a tuple state torchdiffeq has one vector of all elements.
        sizes = [part.numel() for part in y0]
        flat = _positive(value).broadcast_to((sum(sizes),))
        return tuple(part.view(like.shape) for part, like in zip(flat.split(sizes), y0))
    return _positive(value)


def _positive(value: Any) -> Any:
    """A tolerance of 0, which torchdiffeq takes, as the smallest number that can be divided by."""
    if isinstance(value, Tensor):
        return torch.where(value == 0, torch.finfo(torch.float32).tiny, value) if value.is_floating_point() else value
    if isinstance(value, (np.ndarray, np.generic)):
        return _positive(torch.as_tensor(value))
    return torch.finfo(torch.float32).tiny if isinstance(value, (int, float)) and value == 0 else value


def _warn(solution: Solution, may_fail: bool) -> None:
    forced = solution.stats.forced
    if bool((forced > 0).any() if isinstance(forced, Tensor) else forced):
        warnings.warn(
            f"{forced} steps of min_step were accepted although their error is above the tolerance: the result may be wrong. "
            "Lower min_step, or try another method",
            stacklevel=4,
        )
    if may_fail and not solution.success:
        warnings.warn(f"{solution.message} The rows that were not reached are NaN.", stacklevel=4)


