"""Factorised matrices of the form I - g J with a real or complex g: solve(b, transposed) gives x with (I - g J) x = b.

What is singular or not finite is factorised all the same and solved into NaN, which callers look for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor


class HostFactor:
    """LU by LAPACK of one matrix ``(N, N)`` in memory, float64 or complex128: for small systems called directly, since a
    solution costs as little as a handful of operations."""

    def __init__(self, jacobian: np.ndarray, g: complex) -> None:
        matrix = -g * jacobian
        matrix[np.diag_indices_from(matrix)] += 1.0
        self.complex, lapack = np.iscomplexobj(matrix), scipy.linalg.lapack
        factor, self._solve = (lapack.zgetrf, lapack.zgetrs) if self.complex else (lapack.dgetrf, lapack.dgetrs)
        self.lu, self.pivots, info = factor(matrix)
        self.good = info == 0

    def solve(self, b: np.ndarray, transposed: bool = False) -> np.ndarray:
        """``b``: ``(N,)``."""
        if not self.good or (np.iscomplexobj(b) and not self.complex):
            return np.full_like(b, np.nan)
        return self._solve(self.lu, self.pivots, b, trans=int(transposed))[0]


class DenseFactor:
    """LU of the matrices ``(B, N, N)`` of a batch, or of one ``(N, N)``, on any device. ``g``: number, or ``(B,)``."""

    def __init__(self, jacobian: Tensor, g: Any) -> None:
        if isinstance(g, Tensor):
            g = g.reshape(-1, 1, 1)
        eye = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device)
        self.lu, self.pivots, _ = torch.linalg.lu_factor_ex(eye - g * jacobian)

    def solve(self, b: Tensor, transposed: bool = False) -> Tensor:
        """``b``: ``(N,)`` or ``(B, N)``; the transposed system of a real matrix only."""
        right = b.to(self.lu.dtype).unsqueeze(-1)
        return torch.linalg.lu_solve(self.lu, self.pivots, right, adjoint=transposed).squeeze(-1)


class SparseFactor:
    """Sparse LU (SuperLU) of one matrix in memory.

    Differential equations on grids and graphs have patterns that are symmetric or nearly so, and I - g J a heavy diagonal:
    ordered by minimum degree on A + A^T and with pivots from the diagonal, the factors are less than half of those of
    SuperLU's default (measured on a 2D grid: 2.3 and 5.6 million entries). Where that loses digits, the default it is.
    """

    def __init__(self, jacobian: Any, g: complex) -> None:
        matrix = (_identity(jacobian.shape[0]) - g * jacobian).tocsc()
        self.dtype = np.complex128 if np.iscomplexobj(matrix.data) else np.float64
        self.lu: Any = None
        if np.isfinite(matrix.data).all():
            symmetric = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
            self.lu = _factored(matrix, **symmetric) or _factored(matrix)

    def solve(self, b: np.ndarray, transposed: bool = False) -> np.ndarray:
        """``b``: ``(N,)``."""
        if self.lu is None:
            return np.full_like(b, np.nan)
        return self.lu.solve(b.astype(self.dtype), "T" if transposed else "N")


LOST = 1e-6
"""Relative residual of a trial solution from which a factorisation is no good."""


def _factored(matrix: Any, **options: Any) -> Any:
    """None where the matrix is singular or its factors are inaccurate."""
    try:
        lu = scipy.sparse.linalg.splu(matrix, **options)
    except RuntimeError:
        return None
    b = np.ones(matrix.shape[0], matrix.dtype)
    with np.errstate(all="ignore"):
        residual = np.abs(matrix @ lu.solve(b) - b).max(initial=0.0)
    return lu if residual <= LOST else None


@lru_cache(maxsize=8)
def _identity(size: int) -> Any:
    return scipy.sparse.identity(size, format="csc")
