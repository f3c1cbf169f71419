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
) -> Tensor:
    """x with |b - M x| <= ``enough`` where ``max_iters`` products get there, else as near as they got.

    GMRES(restart) with modified Gram-Schmidt and right preconditioning (Saad & Schultz 1986, SIAM J. Sci. Stat. Comput. 7,
    algorithm 4; the preconditioner may change from product to product, Saad 1993).

    Args: as of :func:`gcr`.
        running: the samples to be solved. restart: vectors kept, twice as many with a preconditioner.
    """
    x, r, done = torch.zeros_like(b), b, 0
    while True:
        size = geometry.dot(r, r) ** 0.5
        running = running & (size > enough)
        if not _any(running) or done >= max_iters:
            return x
        step, used, left = _cycle(product, r, size, geometry, enough, running, min(restart, max_iters - done), precond)
        x, done = x + step, done + used
        if not _any(running & (left > enough)) or done >= max_iters:
            return x
        r = b - product(geometry.keep(running, x, 0.0))
        done += 1


def _cycle(product, r, size, geometry, enough, running, count, precond) -> tuple[Tensor, int, Any]:
    """The correction of least residual in a Krylov space of at most ``count`` vectors, products made, the residual left."""
    ops, spread = geometry.ops, geometry.layout.spread
    v = geometry.keep(running, r * spread(geometry.ratio(1.0, size)), 0.0)
    basis: list[Any] = [v]
    directions, columns, right, rotations = ([], [], [], [])  # type: tuple[list[Any], list[Any], list[Any], list[Any]]
    left = size
    for _ in range(count):
        z = v if precond is None else precond(v)
        w = product(z)
        column = []
        for u in basis:
            column.append(geometry.dot(u, w))
            w = w - spread(column[-1]) * u
        length = geometry.dot(w, w) ** 0.5
        for i, (c, s) in enumerate(rotations):
            column[i], column[i + 1] = c * column[i] + s * column[i + 1], c * column[i + 1] - s * column[i]
        radius = (column[-1] ** 2 + length**2) ** 0.5
        good = running & (radius > 0)
        safe = ops.where(good, radius, 1.0)
        c, s = ops.where(good, column[-1] / safe, 1.0), ops.where(good, length / safe, 0.0)
        column[-1] = safe
        rotations.append((c, s))
        columns.append(column)
        directions.append(z)
        right.append(ops.where(good, c * left, 0.0))
        left = ops.where(good, -s * left, left)
        running = good & (abs(left) > enough) & (length > 0)
        if not _any(running):
            break
        v = geometry.keep(running, w * spread(geometry.ratio(1.0, length)), 0.0)
        basis.append(v)
    return _combine(directions, columns, right, spread), len(columns), abs(left)


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
