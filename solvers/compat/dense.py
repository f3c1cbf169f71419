"""``odeint_dense``: the solution as a function of t."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adjoint import ADJOINTS
from ..status import ArgumentError
from .errors import CheckError, CheckTypeError
from .odeint import Problem
from .options import SCIPY, choose


def odeint_dense(
    func: Any,
    y0: Any,
    t0: Any,
    t1: Any,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: Any = None,
) -> Any:
    """Solve from t0 to t1 and return a function of t that gives the state anywhere between.

    ``solution(t)``: t 0-dim gives ``y0.shape``, ``(k,)`` gives ``(k, *y0.shape)`` (a tuple of them for a tuple y0); t < t0
    where t1 < t0. Differentiable with respect to y0, t0, t, and everything func uses.

    Raises as :func:`~solvers.odeint`; ``solution`` raises ``ArgumentError`` outside of the interval.
    """
    ends = [_end(t0, "t0"), _end(t1, "t1")]
    wide = torch.promote_types(ends[0].dtype, ends[1].dtype)
    t = torch.stack([end.to(wide) for end in ends])
    problem = Problem.checked(func, y0, t, rtol, atol)
    choice = choose(method, options, func, y0, problem.t)
    if choice.name == SCIPY:
        raise ArgumentError(f"odeint_dense needs a method of this package, found {SCIPY!r}")
    return problem.run(choice, ADJOINTS["backprop"], dense=True).dense


def _end(value: Any, what: str) -> Tensor:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    if not isinstance(value, Tensor):
        raise CheckTypeError(f"{what} must be a torch.Tensor or a number, found {type(value).__name__}")
    if value.numel() != 1:
        raise CheckError(f"{what} must hold one time, found shape {tuple(value.shape)}")
    return value.reshape(())
