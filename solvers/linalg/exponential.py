"""The exponential of a matrix known by products with it only, applied to a vector: Krylov spaces, and the small matrices
whose exponential stands for that of the large one; each sample of a batch its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

FEW = 4
"""Combinations up to which a copy of all vectors in one matrix does not pay."""
TINY = 1e-300
"""In place of 0 where a logarithm is taken."""

Product = Callable[[Tensor], Tensor]


class KrylovSpace:
    """L V = V H, built vector by vector from ``start`` (Arnoldi; Lanczos where L is symmetric).

    H is kept with the row below its last column, and a column of zeros to match: the exponential of that matrix is one
    order better than that of the square one (the corrected scheme of Saad 1992, SIAM J. Numer. Anal. 29, section 4).

    Args:
        layout: of the states. start: flat. symmetric: orthogonalise against the last two vectors only.

    Attributes:
        vectors: orthonormal in each sample, or 0. images: L v of all but the last, as
            ``product`` gave them, if they are recorded by autograd.
        length: Euclidean norm of ``start``, 0-dim or ``(B,)``, float64.
        skew: largest |H[j-1, j] - H[j, j-1]| |H[j, j-1]| / |L v_j|^2 found: of rounding where L is symmetric.
    """

    def __init__(self, layout: Any, start: Tensor, symmetric: bool) -> None:
        self.layout, self.symmetric = layout, symmetric
        self.length = self._length(start)
        self.vectors = [self._unit(start, self.length)]
        self.images: list[Tensor] = []
        self.columns: list[list[Tensor]] = []
        self.skew = self.largest = torch.zeros_like(self.length)

    def __len__(self) -> int:
        return len(self.columns)

    def grow(self, product: Product) -> None:
        """One more vector: one product."""
        w = product(self.vectors[-1])
        if w.requires_grad:
            self.images.append(w)
        w, first, own = w.detach(), max(0, len(self) - 1) if self.symmetric else 0, None
        column: list[Tensor] = []
        for v in self.vectors[first:]:
            h = self._dot(v, w)
            column.append(h)
            # Not into what the user's function returned, but into one state from then on: fresh memory costs more than the sum.
            w = own = torch.addcmul(w, v, self._wide(-h), out=own)
        column = [torch.zeros_like(column[0])] * first + column
        after = self._length(w)
        # Of orthogonal parts: saves a pass over the state.
        before = torch.stack([*(h.abs() for h in column[first:]), after]).square().sum(0).sqrt()
        # What is left of a vector inside the space is rounding.
        self.largest = torch.maximum(self.largest, before)
        after = torch.where(after > 32 * torch.finfo(w.dtype).eps * self.largest, after, 0.0)
        if self.symmetric and first < len(self):
            # A short last vector is inaccurate in proportion.
            short = self.columns[-1][-1]
            mismatch = ((column[first] - short) * short).abs() / before.square().clamp(min=TINY)
            self.skew = torch.maximum(self.skew, mismatch.to(self.skew.dtype))
        column.append(after.to(column[-1].dtype))
        self.columns.append(column)
        self.vectors.append(self._unit(w, after, out=w))

    def matrix(self, used: Any = None) -> Tensor:
        """H ``(m + 1, m + 1)`` or ``(B, m + 1, m + 1)``; ``used``: columns that count, int or ``(B,)``."""
        m = len(self)
        none = torch.zeros_like(self.columns[0][0])
        full = [torch.stack(column + [none] * (m - j - 1), -1) for j, column in enumerate(self.columns)]
        H = torch.stack([*full, torch.zeros_like(full[0])], -1)
        if isinstance(used, Tensor):
            H = torch.where(torch.arange(m + 1, device=H.device) < used.reshape(-1, 1, 1), H, 0.0)
        return H

    def _dot(self, x: Tensor, y: Tensor) -> Tensor:
        value = torch.vdot(x, y) if self.layout.joint else self.layout.sum(x.conj() * y if x.is_complex() else x * y)
        return value.to(torch.complex128 if value.is_complex() else torch.float64)

    def _length(self, x: Tensor) -> Tensor:
        if self.layout.joint:
            return torch.linalg.vector_norm(x).to(torch.float64)
        return self.layout.sum(x.abs().square() if x.is_complex() else x.square()).to(torch.float64).sqrt()

    def _unit(self, x: Tensor, length: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mul(x, self._wide(torch.where(length > 0, 1 / length, 0.0)), out=out)

    def _wide(self, c: Tensor) -> Tensor:
        dtype = self.layout.dtype if c.is_complex() else self.layout.real_dtype
        return c.to(dtype) if self.layout.joint else self.layout.per_row(c.to(dtype)).unsqueeze(-1)


def combine(layout: Any, vectors: list[Tensor], coefficients: Tensor) -> Tensor:
    """sum_j c_j v_j for c ``(n, [B,] m)`` with m up to the number of vectors: ``(n, *state)``. Differentiable."""
    c = coefficients.to(layout.device)
    c = c.to(layout.dtype if c.is_complex() or layout.joint else layout.real_dtype)
    if layout.joint and len(c) > FEW:
        return c @ torch.stack(vectors[: c.shape[-1]])
    # In a batch always one after the other: the order in which a product of matrices adds depends on its size.
    wide = (c if layout.joint else layout.per_row(c.movedim(-1, 0)).movedim(0, -1)).unsqueeze(-1)
    total, recorded = wide[..., 0, :] * vectors[0], torch.is_grad_enabled()
    for j in range(1, c.shape[-1]):
        total = torch.addcmul(total, wide[..., j, :], vectors[j], out=None if recorded else total)
    return total


def integrated(H: Tensor) -> Tensor:
    """[[H, e_1], [0, 0]]: the last column of e^{tau that} is (tau phi_1(tau H) e_1, 1)."""
    size = H.shape[-1]
    wide = torch.zeros(*H.shape[:-2], size + 1, size + 1, dtype=H.dtype, device=H.device)
    wide[..., :size, :size] = H
    wide[..., 0, size] = 1.0
    return wide


def expm(H: Tensor, tau: Tensor) -> Tensor:
    """e^{tau H} ``(n, [B,] m, m)`` for ``tau`` ``(n,)`` or ``(n, B)``; NaN for what is not finite."""
    small = H * tau.to(H.device)[..., None, None]
    finite = torch.isfinite(small).flatten(-2).all(-1)[..., None, None]
    return torch.where(finite, torch.linalg.matrix_exp(torch.where(finite, small, 0.0)), torch.nan)


def crossed(first: Tensor, second: Tensor, row: int, tau: Tensor) -> Tensor:
    """int_0^tau (first column of e^{(tau - s) first}) (``row`` of e^{s second}) ds, ``(n, [B,] a, b)`` (Van Loan 1978)."""
    a, b = first.shape[-1], second.shape[-1]
    block = torch.zeros(*first.shape[:-2], a + b, a + b, dtype=first.dtype, device=first.device)
    block[..., :a, :a], block[..., a:, a:] = first, second
    block[..., 0, a + row] = 1.0
    return expm(block, tau)[..., :a, a:]


def poisson_tails(x: Tensor, terms: int) -> Tensor:
    """P(N > k) for N Poisson of mean ``x`` (any shape) and k = 0 .. terms - 1, on a last dimension; differentiable in x."""
    k = torch.arange(1, terms + 1, dtype=x.dtype, device=x.device)
    return torch.special.gammainc(k, x.unsqueeze(-1) + TINY)


def poisson_terms(x: Tensor, terms: int, derivative: int) -> Tensor:
    """The ``derivative``-th derivative in x of P(N = k), k = 0 .. terms - 1."""
    k = torch.arange(terms, dtype=x.dtype, device=x.device)
    x = x.unsqueeze(-1)
    p = torch.exp(torch.special.xlogy(k, x) - x - torch.lgamma(k + 1))
    for _ in range(derivative):
        p = torch.nn.functional.pad(p, (1, 0))[..., :-1] - p
    return p
