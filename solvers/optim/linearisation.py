"""Jacobians of a solve, kept from step to step, and the factorised matrices of implicit stages made of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import scipy
import torch
from torch import Tensor

from ..linalg import DenseFactor, HostFactor, SparseFactor
from .base import StageProblem, all_true, any_true
from .jacobian import complex_again, real_parts

FACTORS = 4
"""Factorisations kept for one Jacobian: those of the coefficients of a step, and of the step before."""
AGED = 1.3
"""Ratio of step sizes up to which a sparse matrix factorised for one serves the other: a factorisation costs as much as tens
of solutions (2D grid of 10,000 cells: 40)."""
_STAMPS = itertools.count(1)

Taken = Callable[[StageProblem, Tensor, Tensor], Any]
"""(problem, t, y) -> a Jacobian."""


class Linearisation:
    """J of every sample at its own (t, y), and solutions of (I - g A x J) x = b.

    ``matrix``: numpy, scipy or torch. ``t``: float or ``(B,)``. ``stamp``: int or ``(B,)``, a name for (t, y). ``exact``: a g
    for which no other's factorisation is good enough.
    """

    def __init__(self, matrix: Any, t: Any, y: Tensor, stamp: Any) -> None:
        self.matrix, self.t, self.y, self.stamp = matrix, t, y, stamp
        self.factors: list[tuple[complex, Any, Any]] = []
        self.exact: Any = None

    @cached_property
    def size(self) -> Any:
        """The lesser of the norms of J that sum along columns and along rows: no |lambda| is larger. Float or ``(B,)``."""
        sizes = abs(self.matrix)
        if isinstance(sizes, Tensor):
            both = torch.minimum(sizes.sum(-2).amax(-1), sizes.sum(-1).amax(-1))
            return both.item() if both.dim() == 0 else both
        return float(min(sizes.sum(0).max(), sizes.sum(1).max()))

    def solve(self, problem: StageProblem, r: Tensor) -> Tensor:
        """x with M x = r for M = I - g A x J, by one system of the size of a state for each eigenvalue of A."""
        if r.numel() == 0:
            return r
        if not problem.coupled:
            return self.single(problem, problem.matrix[0][0], r)
        right = real_parts(r).unflatten(-1, (len(problem.times), -1))
        if not isinstance(self.matrix, Tensor):
            found = torch.from_numpy(self._on_host(problem, right.cpu().numpy())).to(right)
        else:
            found = self._on_device(problem, right)
        return complex_again(found.flatten(-2), r)

    def _on_host(self, problem: StageProblem, right: np.ndarray) -> np.ndarray:
        """For one sample in memory: ``right`` and the answer ``(s, N)``."""
        values, forward, back = spectrum(problem.matrix)
        mixed = forward @ right
        for i, value in enumerate(values):
            # The rows of real eigenvalues are real.
            b = mixed[i] if isinstance(value, complex) else mixed[i].real
            mixed[i] = self.factor(problem, value).solve(b)
        return (back @ mixed).real

    def _on_device(self, problem: StageProblem, right: Tensor) -> Tensor:
        """``(..., s, N)``. By sums, not by matrix products, whose rounding depends on the batch."""
        values, forward, back = spectrum(problem.matrix)
        layout = problem.layout
        parts = [layout.gather(part) for part in right.unbind(-2)]
        total: list[Any] = [0.0] * len(problem.times)
        for value, row, column in zip(values, forward.tolist(), back.T.tolist(), strict=True):
            if not isinstance(value, complex):
                row, column = [w.real for w in row], [w.real for w in column]
            b = row[0] * parts[0]
            for weight, part in zip(row[1:], parts[1:], strict=True):
                b = b + weight * part
            x = self.factor(problem, value).solve(b)
            total = [t + (w * x).real for t, w in zip(total, column, strict=True)]
        return torch.stack([layout.scatter(part) for part in total], -2).to(right.dtype)

    def single(self, problem: StageProblem, weight: float, r: Tensor) -> Tensor:
        """x with (I - g weight J) x = r, for one flat state."""
        return solved(self.factor(problem, weight), r, problem) if r.numel() else r

    def factor(self, problem: StageProblem, weight: complex) -> Any:
        """Of I - g weight J, or near it."""
        g = problem.g
        # The real eigenvalue of A is known by two ways that may differ in a last digit.
        known = [(size, factor) for w, size, factor in self.factors if abs(w - weight) <= 1e-12 * abs(weight)]
        for size, factor in known:
            if _same(size, g):
                return factor
        for size, factor in known:
            if self._near(size, g):
                return AgedFactor(factor, 2.0 / (1.0 + g / size))
        factor = factorise(self.matrix, g * weight)
        problem.algebra.nlu += 1
        self.factors = [*self.factors[1 - FACTORS :], (weight, g, factor)]
        return factor

    def aged(self, g: Any) -> bool:
        """Whether g will be served by what was factorised for another."""
        sizes = [size for _, size, _ in self.factors]
        return any(self._near(size, g) for size in sizes) and not any(_same(size, g) for size in sizes)

    def _near(self, size: Any, g: Any) -> bool:
        patient = scipy.sparse.issparse(self.matrix) and self.exact != g
        return patient and 1.0 / AGED <= size / g <= AGED


class AgedFactor:
    """(I - g' J)^-1 in place of (I - g J)^-1: times 2 / (1 + g / g'), between what it needs where J vanishes and where J is
    all (Brown, Byrne & Hindmarsh 1989, SIAM J. Sci. Stat. Comput. 10, section 3)."""

    def __init__(self, factor: Any, scale: float) -> None:
        self.factor, self.scale = factor, scale

    def solve(self, b: np.ndarray, transposed: bool = False) -> np.ndarray:
        return self.scale * self.factor.solve(b, transposed)


def factorise(matrix: Any, g: Any) -> Any:
    if isinstance(matrix, Tensor):
        return DenseFactor(matrix, g)
    return HostFactor(matrix, g) if isinstance(matrix, np.ndarray) else SparseFactor(matrix, g)


def solved(factor: Any, b: Tensor, problem: StageProblem, transposed: bool = False) -> Tensor:
    """x with M x = b, or the transposed system, for a real matrix on the real numbers of ``b``, of one stage or several."""
    if not isinstance(factor, DenseFactor):
        right = real_parts(b)
        return complex_again(torch.from_numpy(factor.solve(right.cpu().numpy(), transposed)).to(right), b)
    layout = problem.layout
    parts = [layout.gather(real_parts(part)) for part in problem.split(b)]
    x = factor.solve(torch.cat(parts, -1), transposed).to(layout.real_dtype)
    return complex_again(torch.cat([layout.scatter(part) for part in x.tensor_split(len(parts), -1)], -1), b)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or bool(torch.equal(a, b))
    return a == b


@lru_cache(maxsize=64)
def spectrum(matrix: tuple[tuple[float, ...], ...]) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """Eigenvalues of A, rows of T^-1 and columns of T, A = T diag T^-1 (HW IV.8); one of each conjugate pair, its column
    doubled, so that the real part of what they give together is the whole."""
    values, vectors = np.linalg.eig(np.array(matrix))
    inverse = np.linalg.inv(vectors)
    kept: list[Any] = []
    rows, columns = [], []
    for i, value in enumerate(values):
        if abs(value.imag) < 1e-10:
            turn = vectors[np.abs(vectors[:, i]).argmax(), i]
            kept.append(float(value.real))
            columns.append((vectors[:, i] / turn).real)
            rows.append((inverse[i] * turn).real)
        elif value.imag > 0:
            kept.append(complex(value))
            columns.append(2 * vectors[:, i])
            rows.append(inverse[i])
    return kept, np.array(rows, np.complex128), np.array(columns, np.complex128).T


class Memory(NamedTuple):
    """Where the Jacobian to go on with was taken: t, y, and the stamp that names them (0: nowhere yet, or it no longer
    serves). The Jacobian follows from these; ``cache`` only saves the work of taking it again. rate: the ratio of successive
    corrections that the next iteration has to expect (0: unknown)."""

    t: Any
    y: Tensor
    stamp: Any
    cache: Cache
    rate: Any


def forgotten(layout: Any, y0: Tensor) -> Memory:
    """The memory of a solve that begins."""
    if layout.joint:
        return Memory(0.0, y0, 0, Cache(), 0.0)
    zero = torch.zeros(layout.batch, dtype=torch.float64, device=layout.device)
    return Memory(zero, y0, zero.long(), Cache(), zero)


class Cache:
    """The linearisation in use, and the last one that was taken anew."""

    __slots__ = ("current", "fresh")

    def __init__(self) -> None:
        self.current: Linearisation | None = None
        self.fresh: Linearisation | None = None

    def recall(self, problem: StageProblem, memory: Memory, wanted: Any, take: Taken) -> Linearisation:
        """That of ``memory`` for the samples ``wanted``; of the others, anything."""
        best: Any = self.current
        for known in (self.current, self.fresh):
            if known is None:
                continue
            best = known if best is known else _pick(problem, known.stamp == memory.stamp, known, best)
            if all_true((best.stamp == memory.stamp) | problem.ops.invert(wanted)):
                self.current = best
                return best
        found = Linearisation(self._take(problem, memory.t, memory.y, take), memory.t, memory.y, memory.stamp)
        self.current = found if best is None else _pick(problem, best.stamp != memory.stamp, found, best)
        return self.current

    def renew(self, problem: StageProblem, t: Any, y: Tensor, wanted: Any, take: Taken) -> Linearisation:
        """At (t, y), for the samples ``wanted``: a step that was rejected begins where it did before."""
        known = self.fresh
        if known is not None and known.y.shape == y.shape:
            same = (known.t == t) & _equal(problem.layout, known.y, y)
            if all_true(same | problem.ops.invert(wanted)):
                return known
        stamp = next(_STAMPS)
        stamps: Any = stamp if problem.layout.joint else torch.full_like(t, stamp, dtype=torch.int64)
        self.fresh = Linearisation(self._take(problem, t, y, take), t, y, stamps)
        return self.fresh

    @staticmethod
    def _take(problem: StageProblem, t: Any, y: Tensor, take: Taken) -> Any:
        problem.algebra.njac += 1
        return take(problem, problem.field.time(t), y.detach())

    def merged(self, problem: StageProblem, mask: Any, new: Linearisation, old: Linearisation) -> Linearisation:
        """``new`` for the samples in ``mask``; becomes the one in use."""
        self.current = _pick(problem, mask, new, old)
        return self.current


def _equal(layout: Any, a: Tensor, b: Tensor) -> Any:
    return torch.equal(a, b) if layout.joint else (layout.gather(a) == layout.gather(b)).all(1)


def _pick(problem: StageProblem, mask: Any, new: Linearisation, old: Linearisation) -> Linearisation:
    if problem.layout.joint:
        return new if mask else old
    if all_true(mask):
        return new
    if not any_true(mask):
        return old
    matrix = torch.where(mask.reshape(-1, 1, 1), new.matrix, old.matrix)
    y = torch.where(problem.layout.spread(mask), new.y, old.y)
    return Linearisation(matrix, torch.where(mask, new.t, old.t), y, torch.where(mask, new.stamp, old.stamp))
