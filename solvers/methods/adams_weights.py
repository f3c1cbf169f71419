"""Coefficients of Adams formulas on the grid as it is, for Python floats and for tensors.

Everything follows from the polynomial through the last values of f in Newton's form (Hairer, Nørsett & Wanner I, 2nd ed.,
III.5; below HNW). With s_j = (t_n - t_{n-j}) / dt, u = (t - t_n) / dt and

    N_j(u) = prod_{i<j} (u + s_i) / (1 + s_i),        g_j = integral of N_j over 0 <= u <= 1,

the modified divided differences Phi_j of f at t_n, continued to the new point, are

    Phi*_j = beta_j Phi_j = sum_{i<=j} T_ij f_{n-i},   beta_j = prod_{i<j} (1 + s_i) / s_{i+1},                 (HNW 5.9)
    T_ij = prod_{l<j} (1 + s_l) / prod_{l<=j, l!=i} (s_l - s_i),

so that f(t_n + u dt) = sum_{j<k} N_j(u) Phi*_j + O(dt^k). The explicit formula of order k is dt sum_{j<k} g_j Phi*_j; a
value f_{n+1} adds the term N_k (f_{n+1} - sum_{j<k} Phi*_j). For one i all T_ij have the same sign, and the g_j fall with
j, so the weights of the f's come out without cancellation.

The Python version is fast for a few numbers; the tensor version (0-dim or ``(B,)`` step sizes) does the same with vectors
``(K, ...)``, keeps gradients to the step sizes, and gives each sample bits that do not depend on its batch.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def distances(dt: Any, steps: tuple[Any, ...]) -> Any:
    """s_0 = 0, s_1, ..: how far back past nodes lie, in units of ``dt``.

    ``steps``: t_n - t_{n-1}, t_{n-1} - t_{n-2}, .., in units of t and like ``dt``: floats (gives a list), or tensors
    (gives ``(K, *dt.shape)``). Samples that rest (dt = 0) get finite distances.
    """
    if not isinstance(dt, Tensor):
        s, total = [0.0], 0.0
        for step in steps:
            total += step
            s.append(total / dt)
        return s
    # Where dt is 0 any unit of the history's own sign will do: one of the other could make 1 + s_1 vanish.
    unit = torch.where(dt == 0, steps[0] if steps else torch.ones_like(dt), dt) if dt.dim() else dt
    return torch.stack([torch.zeros_like(unit), *steps]).cumsum(0) / unit


def integrals(s: Any) -> Any:
    """g_0 .. g_K for K = len(s) nodes: a list, or ``(K + 1, ...)``.

    By HNW 5.10, c_{j,q} = c_{j-1,q} - c_{j-1,q+1} / (1 + s_{j-1}) with c_{0,q} = 1/q and g_j = c_{j,1}.
    """
    if not isinstance(s, Tensor):
        c = [1.0 / q for q in range(1, len(s) + 2)]
        g = [1.0]
        for last in s:
            reach = 1.0 + last
            c = [a - b / reach for a, b in pairwise(c)]
            g.append(c[0])
        return g
    rows = _column(torch.arange(1, len(s) + 2, dtype=s.dtype, device=s.device), s).reciprocal()
    found = [rows[0].expand_as(s[0])]
    for last in s:
        rows = rows[:-1] - rows[1:] / (1.0 + last)
        found.append(rows[0])
    return torch.stack(found)


def continuation(s: Any) -> Any:
    """beta_0 .. beta_{K-1} (HNW 5.9): what takes differences at t_n to the new point; a list, or ``(K, ...)``."""
    if not isinstance(s, Tensor):
        beta = [1.0]
        for near, far in pairwise(s):
            beta.append(beta[-1] * ((1.0 + near) / far))
        return beta
    return torch.cat([torch.ones_like(s[:1]), ((1.0 + s[:-1]) / s[1:]).cumprod(0)])


def differences(s: Any) -> Any:
    """T: a list of its columns j (entries i <= j), or the matrix ``(K, K, ...)`` with zeros below its diagonal."""
    return _differences_tensors(s) if isinstance(s, Tensor) else _differences_floats(s)


def _differences_floats(s: list[float]) -> list[list[float]]:
    column = [1.0]
    T = [column]
    for j in range(1, len(s)):
        far, reach, own = s[j], 1.0 + s[j - 1], 1.0
        following = []
        for i in range(j):
            gap = far - s[i]
            following.append(column[i] * reach / gap)
            own *= -(1.0 + s[i]) / gap
        following.append(own)
        column = following
        T.append(column)
    return T


def _differences_tensors(s: Tensor) -> Tensor:
    number = torch.arange(len(s), device=s.device)
    i, l = _column(number.unsqueeze(1), s.unsqueeze(0)), _column(number.unsqueeze(0), s.unsqueeze(0))
    # The factors of T_ij for l = 0 .. j: the one with l = i is 1, and those beyond i take 1 + s of the node before.
    gaps = torch.where(i == l, 1.0, s.unsqueeze(0) - s.unsqueeze(1))
    reach = torch.where(l < i, 1.0 + s.unsqueeze(0), 1.0 + torch.roll(s, 1, 0).unsqueeze(0))
    return torch.where(i == l, 1.0, reach / gaps).cumprod(1) * (i <= l)


def _column(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with as many trailing dimensions as ``like`` has behind its first ``x.dim()``."""
    return x.reshape(x.shape + (1,) * (like.dim() - x.dim()))


def weigh(T: Any, mix: Any) -> Any:
    """Weights of f_n, f_{n-1}, .. in sum_j mix_j Phi*_j; ``mix``: a list as long as the combination is, or ``(K, ...)``."""
    if isinstance(T, Tensor):
        # A running sum has one order of additions, whatever the shape.
        return (T * mix).cumsum(1)[:, -1]
    weights = [0.0] * len(mix)
    for factor, column in zip(mix, T):
        for i, entry in enumerate(column):
            weights[i] += factor * entry
    return weights


def explicit_weights(dt: Any, steps: tuple[Any, ...]) -> Any:
    """dt b_i of y1 = y0 + sum_i dt b_i f_{n-i}: Adams-Bashforth of order ``len(steps) + 1``. A list, or ``(K, ...)``."""
    return _explicit(dt, steps) if isinstance(dt, Tensor) else _explicit_known(dt, steps)


def _explicit(dt: Any, steps: tuple[Any, ...]) -> Any:
    s = distances(dt, steps)
    g = integrals(s)[:-1]
    return dt * weigh(differences(s), g) if isinstance(dt, Tensor) else [dt * w for w in weigh(differences(s), g)]


def implicit_weights(dt: Any, steps: tuple[Any, ...]) -> tuple[Any, Any]:
    """(dt b_i of the past, dt b of the new point): Adams-Moulton of order ``len(steps) + 2``.

    sum_{j<k} (g_j - g_k) Phi*_j + g_k f_{n+1} with k = ``len(steps) + 1``.
    """
    return _implicit(dt, steps) if isinstance(dt, Tensor) else _implicit_known(dt, steps)


def _implicit(dt: Any, steps: tuple[Any, ...]) -> tuple[Any, Any]:
    s = distances(dt, steps)
    g = integrals(s)
    if isinstance(dt, Tensor):
        return dt * weigh(differences(s), g[:-1] - g[-1]), dt * g[-1]
    return [dt * w for w in weigh(differences(s), [a - g[-1] for a in g[:-1]])], dt * g[-1]


# Constant steps ask for the same numbers again and again.
_explicit_known = lru_cache(maxsize=256)(_explicit)
_implicit_known = lru_cache(maxsize=256)(_implicit)


def basis(s: Tensor) -> Tensor:
    """N_0 .. N_K in powers of u, ``(K + 1, K + 1, ...)``: rows j, columns the powers. All coefficients are >= 0."""
    row = _column(torch.arange(len(s) + 1, device=s.device) == 0, s).to(s.dtype).expand(-1, *s.shape[1:])
    rows = [row]
    for here in s:
        row = (row * here + torch.cat([torch.zeros_like(row[:1]), row[:-1]])) / (1.0 + here)
        rows.append(row)
    return torch.stack(rows)


def evaluate(rows: Tensor, theta: Tensor, derivative: int = 0) -> Tensor:
    """Integrals of polynomials in u from 0 to ``theta``, or their ``derivative``-th derivative.

    ``rows``: ``(K, powers, ...)``. ``theta``: ``(n, ...)``. Returns ``(K, n, ...)``.
    """
    result = None
    for m in range(rows.shape[1] - 1, max(derivative - 2, -1), -1):
        factor = 1.0 / (m + 1)
        for lost in range(derivative):
            factor *= m + 1 - lost
        term = (rows[:, m] * factor).unsqueeze(1)
        result = term.expand(-1, *theta.shape) if result is None else result * theta + term
    if result is None:
        return rows.new_zeros((len(rows), *theta.shape))
    return result * theta if derivative == 0 else result
