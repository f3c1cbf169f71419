"""What a solve returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .status import FIRST_FAILURE, ProxodeError


@dataclass
class Stats:
    """Work that was done. Numbers are ints in joint mode and, but for ``nfe``, ``(B,)`` tensors in the batched modes.

    nfe: calls of f, for whatever purpose. nfe_per_sample: those made while the sample was still moving. njvp, nvjp: exact
    Jacobian products. accepted, rejected: attempted steps. inner_iterations: of implicit steps. forced: steps accepted at
    ``dt_min`` against the error estimate. njac, nlu: Jacobians and factorisations made by Newton iterations, and in
    jacobian how: "jac", "autograd", "differences", "coloured differences" or "matrix-free". inner: the inner solvers that
    implicit steps were solved by, the chosen one first. energy: of every output, ``(T,)`` or ``(T, B)``, where steps minimise
    that of a :class:`~solvers.GradientField`. switches: changes between explicit and implicit steps, by a method that has
    both; nfe_by_method: the calls of f in the steps of each. backward: the same for the backward pass, once one has run.
    """

    nfe: int = 0
    nfe_per_sample: Any = 0
    njvp: int = 0
    nvjp: int = 0
    accepted: Any = 0
    rejected: Any = 0
    inner_iterations: Any = 0
    forced: Any = 0
    njac: int = 0
    nlu: int = 0
    jacobian: str = ""
    inner: tuple[str, ...] = ()
    energy: Tensor | None = None
    switches: Any = 0
    nfe_by_method: dict[str, int] = field(default_factory=dict)
    backward: Stats | None = None


class Last(NamedTuple):
    """Where a solve ended, reached or not: ``solve(f, last.y, (last.t, t1), dt0=last.dt)`` goes on from there.

    ``t``, ``dt``: float, or ``(B,)``.
    """

    t: Any
    y: Any
    dt: Any


@dataclass
class Solution:
    """Result of :func:`~solvers.solve`.

    t: output times, ``(T,)`` or ``(B, T)``, float64. y: ``(T, *y0.shape)`` for every leaf; NaN where a failed sample did
    not arrive. status: int8, 0-dim or ``(B,)``, of :class:`~solvers.Status`. success: no sample failed. message: what
    happened, and the remedy. stats: :class:`Stats`. last: :class:`Last`. events: those that fired.
    """

    t: Tensor
    y: Any
    status: Tensor
    message: str
    stats: Stats
    last: Last
    events: tuple[Any, ...] = ()
    dense_output: Callable[..., Any] | None = field(default=None, repr=False)

    @property
    def success(self) -> bool:
        return not bool((self.status >= FIRST_FAILURE).any())

    @property
    def dense(self) -> Callable[..., Any]:
        """``dense(t, derivative=0)``: the solution anywhere in the solved interval.

        ``t``: a number, ``(k,)``, or ``(B, k)`` in the batched modes; gives ``(k, *y0.shape)``. Raises ``ProxodeError``
        unless ``solve`` was called with ``dense=True``, ``ArgumentError`` for a ``t`` outside.
        """
        if self.dense_output is None:
            raise ProxodeError("no dense output was kept: call solve(..., dense=True)")
        return self.dense_output

    def __repr__(self) -> str:
        shape = tuple(self.y.shape) if isinstance(self.y, torch.Tensor) else type(self.y).__name__
        return f"Solution({self.message} y: {shape}, nfe: {self.stats.nfe})"
