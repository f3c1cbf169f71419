"""Preconditioners of matrix-free Newton iterations: nearly the inverse of M = I - g A x J, at little cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from ..status import ArgumentError
from . import jacobian
from .base import Point, StageProblem
from .linearisation import AGED, FACTORS

NAMES = ("jacobi", "ilu")
PROBES = 40
"""Random vectors for the diagonal of J (power-law graph, to 1e-6: 41 products, 28 with the exact one, 289 without)."""
AGE = 50
"""Linear systems that one Jacobian, or diagonal of it, serves."""
DROP = 1e-4
"""Entries of an incomplete factorisation that are left out, relative to their column."""


class Preconditioner:
    """v -> nearly M^-1 v, from a diagonal of J, or one or an incomplete factorisation that is kept for some systems.

    ``kind``: "jacobi", "ilu", or a callable ``(t, y, g, v)`` on the user's state, g a float or ``(B,)``, for M = I - g J at
    (t, y). ``sparsity``: pattern of J, for "ilu" and for an exact diagonal. The diagonal that f itself knows costs no call and
    is taken anew for every system. Of coupled stages each is served by itself.
    """

    def __init__(self, kind: Any, sparsity: Any) -> None:
        self.kind = kind
        self.pattern = None if sparsity is None else jacobian.Pattern(sparsity)
        self.age = 0
        self.known: Any = None
        self.factors: list[tuple[Any, Any]] = []

    def at(self, problem: StageProblem, point: Point) -> Callable[[Tensor], Tensor]:
        """The preconditioner of the system at ``point``."""
        places = [(t, y, problem.g * problem.matrix[i][i]) for i, (t, y) in enumerate(zip(problem.times, problem.split(point.z)))]
        parts = [self._part(problem, point, *place) for place in places]
        if len(parts) == 1:
            return parts[0]
        return lambda v: torch.cat([part(x) for part, x in zip(parts, problem.split(v), strict=True)], -1)

    def _part(self, problem: StageProblem, point: Point, t: Tensor, y: Tensor, g: Any) -> Callable[[Tensor], Tensor]:
        layout = problem.layout
        if callable(self.kind):
            found = self.kind
            state = layout.unflatten(y)
            return lambda v: layout.flatten(found(t, state, g, layout.unflatten(v)), "the value returned by precond")
        own = jacobian.known_diagonal(problem, t, y) if self.kind == "jacobi" else None
        if own is not None:
            return _scaled(layout, g, own)
        if self.known is None or self.age >= AGE * len(problem.times):
            self.age, self.known, self.factors = 0, self._taken(problem, t, y), []
        self.age += 1
        if self.kind == "jacobi":
            return _scaled(layout, g, self.known)
        factor = self._factor(g)
        return lambda v: torch.from_numpy(factor.solve(v.cpu().numpy().astype(np.float64))).to(v)

    def _taken(self, problem: StageProblem, t: Tensor, y: Tensor) -> Any:
        """J, or its diagonal."""
        if self.pattern is None:
            return jacobian.diagonal(problem, t, y, PROBES)
        matrix = jacobian.coloured(problem, self.pattern, t, y)
        return torch.from_numpy(matrix.diagonal()).to(y) if self.kind == "jacobi" else matrix

    def _factor(self, g: Any) -> Any:
        for size, factor in self.factors:
            if 1.0 / AGED <= size / g <= AGED:
                return factor
        whole = (scipy.sparse.identity(self.known.shape[0], format="csc") - g * self.known).tocsc()
        self.factors = [*self.factors[1 - FACTORS :], (g, scipy.sparse.linalg.spilu(whole, drop_tol=DROP))]
        return self.factors[-1][1]


def _scaled(layout: Any, g: Any, diagonal: Tensor) -> Callable[[Tensor], Tensor]:
    """v -> v / (1 - g J_ii). Where J grows, M may be singular: that is left to the iteration."""
    weight = 1.0 / (1.0 - layout.spread(g) * diagonal).clamp(min=1.0)
    return lambda v: weight * v


def check(kind: Any, sparsity: Any) -> None:
    """Raise ``ArgumentError`` for what is no preconditioner, or lacks its pattern."""
    if kind is None or callable(kind):
        if sparsity is not None:
            raise ArgumentError("jac_sparsity of inner='newton_krylov' serves precond='jacobi' or 'ilu'")
        return
    if kind not in NAMES:
        raise ArgumentError(f"precond must be callable, or one of {', '.join(map(repr, NAMES))}, found {kind!r:.40}")
    if kind == "ilu" and sparsity is None:
        raise ArgumentError("precond='ilu' needs jac_sparsity=, a scipy matrix or an array")
