"""Krylov methods: linear systems by products with the matrix only, each sample of a batch its own.

``geometry`` (an inner problem) gives inner products, one number per sample, and what is done with those numbers; a sample
that is done keeps still while others go on, so that none sees another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def gcr(
    product: Product, b: Tensor, geometry: Any, enough: Any, max_iters: int, window: int = 10, precond: Product | None = None
) -> tuple[Tensor, Any]:
    """x with |b - M x| <= ``enough``, and the samples for which it was not found.

    Generalised conjugate residuals with a window (Vinsome 1976; Eisenstat, Elman and Schultz 1983, SIAM J. Numer. Anal. 20,
    345-357): the residual never grows, M need not be symmetric, a symmetric M needs only short recurrences.

    Args:
        product: v -> M v. enough: Euclidean, float or ``(B,)``. window: directions whose images the next one is made
            orthogonal to. precond: v -> nearly M^-1 v.
    """
    spread = geometry.layout.spread
    x, r = torch.zeros_like(b), b
    running = geometry.dot(b, b) ** 0.5 > enough
    kept: list[tuple[Tensor, Tensor]] = []
    for _ in range(max_iters):
        if not _any(running):
            break
        p = r if precond is None else precond(r)
        q = product(geometry.keep(running, p, 0.0))
        for old_p, old_q in kept:
            c = spread(geometry.dot(old_q, q))
            p, q = p - c * old_p, q - c * old_q
        scale = spread(geometry.ratio(1.0, geometry.dot(q, q) ** 0.5))
        p, q = geometry.keep(running, p * scale, 0.0), geometry.keep(running, q * scale, 0.0)
        kept = [*kept[1 - window :], (p, q)]
        c = spread(geometry.dot(q, r))
        x, r = x + c * p, r - c * q
        running = running & (geometry.dot(r, r) ** 0.5 > enough)
    return x, running


def gmres(
    product: Product,
    b: Tensor,
    geometry: Any,
    enough: Any,
    *,
    running: Any,
    restart: int = 30,
    max_iters: int = 150,
    precond: Product | None = None,
) -> tuple[Tensor, Tensor, Any]:
    """x with |b - M x| <= ``enough``, b - M x, and the samples for which ``max_iters`` products did not get there.

    GMRES(restart) with modified Gram-Schmidt and right preconditioning (Saad & Schultz 1986, SIAM J. Sci. Stat. Comput. 7,
    algorithm 4; the preconditioner may change from product to product, Saad 1993). The residual is put together from the
    basis, which costs no product.

    Args: as of :func:`gcr`.
        running: the samples to be solved. restart: vectors kept, twice as many with a preconditioner.
    """
    x, r, done = torch.zeros_like(b), b, 0
    while True:
        size = geometry.dot(r, r) ** 0.5
        running = running & (size > enough)
        if not _any(running) or done >= max_iters:
            return x, r, running
        step, r, used = _cycle(product, r, size, geometry, enough, running, min(restart, max_iters - done), precond)
        x, done = x + step, done + used


def _cycle(product, r, size, geometry, enough, running, count, precond) -> tuple[Tensor, Tensor, int]:
    """The correction of least residual in a Krylov space of at most ``count`` vectors, what it leaves, products made."""
    ops, spread = geometry.ops, geometry.layout.spread
    started = running
    v = geometry.keep(running, r * spread(geometry.ratio(1.0, size)), 0.0)
    basis = _Basis(geometry, v, count)
    directions, columns, right, rotations = ([], [], [], [])  # type: tuple[list[Any], list[Any], list[Any], list[Any]]
    left = size
    for _ in range(count):
        z = v if precond is None else precond(v)
        column, w = basis.orthogonal(product(z))
        length = geometry.dot(w, w) ** 0.5
        for i, (c, s, _) in enumerate(rotations):
            column[i], column[i + 1] = c * column[i] + s * column[i + 1], c * column[i + 1] - s * column[i]
        radius = (column[-1] ** 2 + length**2) ** 0.5
        good = running & (radius > 0)
        safe = ops.where(good, radius, 1.0)
        c, s = ops.where(good, column[-1] / safe, 1.0), ops.where(good, length / safe, 0.0)
        column[-1] = safe
        rotations.append((c, s, good))
        columns.append(column)
        directions.append(z)
        right.append(ops.where(good, c * left, 0.0))
        left = ops.where(good, -s * left, left)
        running = good & (abs(left) > enough) & (length > 0)
        v = geometry.keep(good & (length > 0), w * spread(geometry.ratio(1.0, length)), 0.0)
        basis.append(v)
        if not _any(running):
            break
    step = _combine(directions, columns, right, spread)
    return step, geometry.keep(started, _residual(basis.vectors, rotations, left, geometry), r), len(columns)


class _Basis:
    """Orthonormal vectors of every sample; of one real state as rows of a matrix, whose products with a vector are faster."""

    def __init__(self, geometry: Any, v: Tensor, count: int) -> None:
        self.geometry, self.vectors = geometry, [v]
        self.rows: Any = None
        if geometry.layout.joint and not v.is_complex():
            # Not filled, so that memory is taken as it is used.
            self.rows = v.new_empty((count + 1, v.numel()))
            self.rows[0] = v

    def append(self, v: Tensor) -> None:
        if self.rows is not None:
            self.rows[len(self.vectors)] = v
        self.vectors.append(v)

    def orthogonal(self, w: Tensor) -> tuple[list[Any], Tensor]:
        """<v_i, w>, and what is left of w: by modified Gram-Schmidt, or the classical one twice, which is as good."""
        if self.rows is not None:
            rows = self.rows[: len(self.vectors)]
            once = rows.mv(w)
            w = torch.addmv(w, rows.t(), once, alpha=-1.0)
            twice = rows.mv(w)
            w = torch.addmv(w, rows.t(), twice, alpha=-1.0)
            return (once + twice).tolist(), w
        column = []
        for v in self.vectors:
            column.append(self.geometry.dot(v, w))
            w = w - self.geometry.layout.spread(column[-1]) * v
        return column, w


def _residual(basis: list[Tensor], rotations: list[Any], left: Any, geometry: Any) -> Tensor:
    """V Q^T (0, .., left, .., 0): what is left of the residual, which for each sample ends with its last vector."""
    ops, spread = geometry.ops, geometry.layout.spread
    total = torch.zeros_like(basis[0])
    for u, (c, s, moved) in zip(reversed(basis[1:]), reversed(rotations), strict=True):
        total = total + spread(ops.where(moved, c * left, 0.0)) * u
        left = ops.where(moved, -s * left, left)
    return total + spread(left) * basis[0]


def minres(
    product: Product, b: Tensor, geometry: Any, norm: Callable[[Tensor], Any], enough: Any, *, running: Any, max_iters: int = 500
) -> tuple[Tensor, Tensor, Any, Any]:
    """x with norm(b - M x) <= ``enough`` for a symmetric M, b - M x, the samples for which it was not found, and those of them
    in which the iteration broke down.

    The method of minimal residuals in the form of conjugate residuals (Stiefel 1955, Comment. Math. Helv. 29): four vectors,
    one product an iteration. For M that is not positive definite it may break down, which leaves the sample unsolved.

    Args: as of :func:`gcr`.
        norm: of a residual, one number per sample. running: the samples to be solved.
    """
    ops, spread = geometry.ops, geometry.layout.spread
    x, r = torch.zeros_like(b), b
    running = running & (norm(r) > enough)
    unsolved = running
    p, mp, before = r, r, None
    for _ in range(max_iters):
        if not _any(running):
            break
        mr = product(geometry.keep(running, r, 0.0))
        energy = geometry.dot(r, mr)
        running = running & (energy > 0)
        if before is None:
            p, mp = r, mr
        else:
            beta = spread(ops.where(running, energy / ops.where(before > 0, before, 1.0), 0.0))
            p, mp = r + beta * p, mr + beta * mp
        alpha = spread(ops.where(running, geometry.ratio(energy, geometry.dot(mp, mp)), 0.0))
        x, r, before = x + alpha * p, r - alpha * mp, energy
        small = norm(r) <= enough
        unsolved, running = unsolved & ops.invert(running & small), running & ops.invert(small)
    return x, r, unsolved, unsolved & ops.invert(running)


def _combine(directions: list[Tensor], columns: list[list[Any]], right: list[Any], spread: Callable[[Any], Any]) -> Tensor:
    """sum_j y_j directions_j with the upper triangular system R y = right; column j of R has j + 1 entries."""
    y: list[Any] = list(right)
    for j in reversed(range(len(columns))):
        y[j] = y[j] / columns[j][j]
        for i in range(j):
            y[i] = y[i] - columns[j][i] * y[j]
    total = spread(y[0]) * directions[0]
    for weight, direction in zip(y[1:], directions[1:]):
        total = total + spread(weight) * direction
    return total


def _any(mask: Any) -> bool:
    return bool(mask.any()) if isinstance(mask, Tensor) else mask
