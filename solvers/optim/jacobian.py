"""The Jacobian of f on the flat state: given, by reverse-mode differentiation, or by differences, dense or coloured.

A matrix acts on the real numbers of a sample's state: ``n`` of them, twice as many as elements where those are complex.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from ..status import ArgumentError, ArgumentTypeError
from .base import Point, StageProblem

GIVEN, EXACT, DIFFERENCED, COLOURED = "jac", "autograd", "differences", "coloured differences"
SMALL = 1e-3
"""Share of the mean |y| below which an element's own size says nothing about the length of a difference."""


class Pattern:
    """Where the Jacobian of a joint state may differ from 0, and groups of columns that share no row (Curtis, Powell and Reid
    1974, J. Inst. Math. Appl. 13): one call of f gives all columns of a group."""

    def __init__(self, sparsity: Any) -> None:
        if not scipy.sparse.issparse(sparsity) and not isinstance(sparsity, np.ndarray):
            raise ArgumentTypeError(f"jac_sparsity must be a scipy sparse matrix or an array, found {type(sparsity).__name__}")
        if len(sparsity.shape) != 2 or sparsity.shape[0] != sparsity.shape[1]:
            raise ArgumentError(f"jac_sparsity must be square, found shape {tuple(sparsity.shape)}")
        pattern = scipy.sparse.csc_matrix(sparsity != 0).astype(np.float64)
        self.csc = scipy.sparse.csc_matrix(pattern + scipy.sparse.identity(pattern.shape[0], format="csc"))
        self.csc.sort_indices()
        self.size = pattern.shape[0]
        self.groups = _colours(self.csc)
        self.columns = np.repeat(np.arange(self.size), np.diff(self.csc.indptr))
        self.count = int(self.groups.max()) + 1 if self.size else 0


def _colours(pattern: Any) -> np.ndarray:
    """A colour for each column, greedily: the least that no column with a common row has."""
    by_row = pattern.tocsr()
    # Columns that share a row: where the product of the pattern with its transpose is not 0.
    near = (by_row.T @ by_row).tocsr()
    colours = np.full(pattern.shape[1], -1)
    for column in np.argsort(-np.diff(near.indptr), kind="stable"):
        taken = set(colours[near.indices[near.indptr[column] : near.indptr[column + 1]]].tolist())
        colour = 0
        while colour in taken:
            colour += 1
        colours[column] = colour
    return colours


def real_parts(x: Tensor) -> Tensor:
    """The real numbers of ``(..., N)``: itself, or ``(..., 2 N)``."""
    return torch.view_as_real(x).flatten(-2) if x.is_complex() else x


def complex_again(x: Tensor, like: Tensor) -> Tensor:
    """Inverse of :func:`real_parts`."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) if like.is_complex() else x


def given(problem: StageProblem, jac: Callable[..., Any], t: Tensor, y: Tensor) -> Any:
    """What the user's ``jac(t, y, *args)`` returns: ``(n, n)``, ``(B, n, n)``, or a scipy matrix.

    Raises ``ArgumentError`` for another shape.
    """
    layout = problem.layout
    problem.algebra.how = GIVEN
    matrix = jac(t, layout.unflatten(y), *problem.field.args)
    size = y.shape[-1]
    if scipy.sparse.issparse(matrix):
        if matrix.shape != (size, size) or not layout.joint:
            raise ArgumentError(f"jac must return a matrix of shape ({size}, {size}) in joint mode, found {matrix.shape}")
        return scipy.sparse.csc_matrix(matrix)
    shape = (size, size) if layout.joint else (layout.rows, size, size)
    if not isinstance(matrix, Tensor) or matrix.numel() != math.prod(shape):
        found = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ArgumentError(f"jac must return a tensor of shape {shape}, or one that can be viewed so, found {found}")
    matrix = matrix.detach().reshape(shape).to(y.dtype)
    if not y.is_complex():
        return matrix
    columns = torch.stack([matrix, 1j * matrix], -1).flatten(-2)
    return real_parts(columns.transpose(-1, -2)).transpose(-1, -2)


def dense(problem: StageProblem, t: Tensor, y: Tensor) -> Tensor:
    """``(n, n)``, or ``(B, n, n)`` (of groups, the largest's n).

    One call of f and n products with J^T; where f can't be differentiated, n + 1 calls.
    """
    matrix = _reverse(problem, t, y)
    return _differenced(problem, t, y) if matrix is None else matrix


def _reverse(problem: StageProblem, t: Tensor, y: Tensor) -> Tensor | None:
    """By reverse mode: a row of every sample's matrix is one product. None where f can't be differentiated."""
    with torch.enable_grad():
        z = y.detach().clone().requires_grad_()
        problem.calls += 1
        try:
            f = problem.field.raw(t, z)
        except Exception:
            # f refuses a state that requires a gradient (numpy, in-place work). Were it another error, differences meet it.
            return None
    if not f.requires_grad:
        return None
    basis = complex_again(_basis(problem, y), y)
    try:
        rows = torch.autograd.grad(f, z, basis, is_grads_batched=True, retain_graph=True, allow_unused=True)[0]
    except Exception:
        # Some operation of f has no batched derivative.
        try:
            each = [torch.autograd.grad(f, z, row, retain_graph=True, allow_unused=True)[0] for row in basis]
        except Exception:
            return None
        rows = None if each[0] is None else torch.stack(each)
    problem.algebra.nvjp += len(basis)
    problem.algebra.how = EXACT
    rows = torch.zeros_like(basis) if rows is None else rows
    return problem.layout.gather(real_parts(rows.detach())).movedim(0, -2)


def _basis(problem: StageProblem, y: Tensor) -> Tensor:
    """``(n, *real_parts(y).shape)``: in the j-th, a 1 for the j-th number of every sample."""
    layout, shape = problem.layout, problem.layout.gather(real_parts(y)).shape
    eye = torch.eye(shape[-1], dtype=layout.real_dtype, device=y.device)
    return eye if layout.joint else layout.scatter(eye.unsqueeze(1).expand(-1, *shape))


def _lengths(y: Tensor) -> Tensor:
    """Lengths of forward differences in each real number of the state, like ``real_parts(y)``."""
    size = real_parts(y).abs()
    floor = SMALL * size.mean(-1, keepdim=True)
    floor = torch.where(floor > 0, floor, 1.0)
    return torch.finfo(size.dtype).eps ** 0.5 * torch.maximum(size, floor)


def _differenced(problem: StageProblem, t: Tensor, y: Tensor) -> Tensor:
    layout, start, steps = problem.layout, real_parts(y), _lengths(y)
    base, columns = real_parts(_call(problem, t, y)), []
    for j, unit in enumerate(_basis(problem, y)):
        shifted = start + unit * steps
        length = layout.gather(shifted - start)[..., j : j + 1]
        change = layout.gather(real_parts(_call(problem, t, complex_again(shifted, y))) - base)
        columns.append(torch.where(length == 0, 0.0, change / torch.where(length == 0, 1.0, length)))
    problem.algebra.how = DIFFERENCED
    return torch.stack(columns, -1)


def _call(problem: StageProblem, t: Tensor, y: Tensor) -> Tensor:
    problem.calls += 1
    return problem.field(t, y)


def coloured(problem: StageProblem, pattern: Pattern, t: Tensor, y: Tensor) -> Any:
    """A scipy matrix by one forward difference for each group of columns, and one call for f itself; joint mode."""
    if pattern.size != y.numel():
        raise ArgumentError(f"jac_sparsity must have shape ({y.numel()}, {y.numel()}) like the state, found {pattern.csc.shape}")
    start, steps = y.cpu().numpy(), _lengths(y).cpu().numpy()
    base = _call(problem, t, y).cpu().numpy().astype(np.float64)
    matrix = pattern.csc.copy()
    for colour in range(pattern.count):
        mine = pattern.groups == colour
        shifted = start + np.where(mine, steps, 0.0).astype(start.dtype)
        change = _call(problem, t, torch.from_numpy(shifted).to(y)).cpu().numpy() - base
        here = mine[pattern.columns]
        matrix.data[here] = change[pattern.csc.indices[here]] / (shifted - start)[pattern.columns[here]]
    problem.algebra.how = COLOURED
    return matrix


def known_diagonal(problem: StageProblem, t: Tensor, y: Tensor) -> Tensor | None:
    """The diagonal of J by f's own method ``jacobian_diagonal``, like ``y``; None where f has none.

    Raises ``ArgumentError`` / ``ArgumentTypeError`` for a value that is not like the state.
    """
    own, layout = getattr(problem.field.func, "jacobian_diagonal", None), problem.layout
    if own is None:
        return None
    return layout.flatten(own(t, layout.unflatten(y), *problem.field.args), "the value returned by jacobian_diagonal").detach()


def diagonal(problem: StageProblem, t: Tensor, y: Tensor, probes: int) -> Tensor:
    """About the diagonal of J, like ``y``: the mean of s * (J s) over vectors s of random signs (Hutchinson 1989; Bekas,
    Kokiopoulou & Saad 2007, Appl. Numer. Math. 57), one forward difference each, and one call for f itself. The signs are
    always the same, and a sample's do not depend on its place."""
    layout, total = problem.layout, torch.zeros_like(y)
    base, shape = _call(problem, t, y), layout.gather(y).shape
    random = torch.Generator().manual_seed(0)
    point = Point(y, base)
    for _ in range(probes):
        signs = (torch.randint(0, 2, shape[-1:], generator=random) * 2 - 1).to(y)
        s = signs if layout.joint else layout.scatter(signs.expand(shape))
        step = layout.spread(problem.difference_step(point, s))
        total = total + s * (_call(problem, t, y + step * s) - base) / step
    problem.algebra.how = DIFFERENCED
    return total / probes
