"""Coefficients of backward differentiation formulas on the grid as it is, for Python floats and for tensors.

With s_j = (t_n - t_{n-j}) / dt and Phi*_j the modified divided differences of y at t_n, continued to the new point
(``adams_weights``; sum_{j<=k} Phi*_j is the polynomial through the last k + 1 values of y at t_n + dt),

    dt d/dt of that polynomial there = sum_{j<=k} d_j Phi*_j,    d_j = sum_{i<j} 1 / (1 + s_i),

because N_j(1) = 1. The formula of order k with fixed leading coefficient (Jackson & Sacks-Davis 1980, ACM TOMS 6; Brayton,
Gustavson & Hachtel 1972) asks for z = a + g f(z) with g = dt / H_k, H_k = 1 + 1/2 + .. + 1/k, and

    a = sum_{j<=k} (1 - d_j / H_k) Phi*_j,

the one with variable coefficients for g = dt / d_k and a = sum_{j<k} (1 - d_j / d_k) Phi*_j; on equal steps d_k = H_k, and
the two are one. All weights below are of y_n, y_{n-1}, ..
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adams_weights import differences, weigh

HARMONIC = tuple(sum(1.0 / j for j in range(1, k + 1)) for k in range(8))
"""H_0, H_1, .."""


class Backward(NamedTuple):
    """Weights of a step of order k: lists, or ``(K, ...)``. Of the differences y - (foreseen by the polynomial of degree
    k - 1, k, k + 1), which are Phi_k, Phi_{k+1}, Phi_{k+2}, the multiples that are the errors of orders k - 1, k, k + 1.

    predicted: the polynomial of degree k. base: a. lower, higher: those of degrees k - 1 and k + 1. errors: the multiples.
    """

    predicted: Any
    base: Any
    lower: Any
    higher: Any
    errors: tuple[Any, Any, Any]


def slopes(s: Any) -> Any:
    """d_0 .. d_K for K = len(s): a list, or ``(K + 1, ...)``."""
    if isinstance(s, Tensor):
        return torch.cat([torch.zeros_like(s[:1]), (1.0 / (1.0 + s)).cumsum(0)])
    d = [0.0]
    for x in s:
        d.append(d[-1] + 1.0 / (1.0 + x))
    return d


def fixed_leading(s: Any, k: Any) -> Backward:
    """The step of order ``k`` (int or ``(B,)``) over nodes at distances ``s``, of which it takes k + 1, and one more to tell
    the error of order k + 1 where there is one.

    errors: of order k by Byrne & Hindmarsh's constant for variable steps (Hairer, Nørsett & Wanner III.5; the larger of two,
    as in SUNDIALS IDA); of the others, dt^j y^(j) / j by the divided difference.
    """
    if isinstance(s, Tensor):
        return _fixed_leading_tensors(s, k)
    d, T = slopes(s), differences(s[: k + 2])
    base = [1.0 - x / HARMONIC[k] for x in d[: k + 1]]
    reach = 1.0 / (1.0 + s[k])
    own = max(reach, abs(reach - HARMONIC[k] + d[k]))
    products = [1.0]
    for x in s[: k + 2]:
        products.append(products[-1] * (1.0 + x))
    more = len(s) > k + 1
    return Backward(
        weigh(T, [1.0] * (k + 1)),
        weigh(T, base),
        weigh(T, [1.0] * k) if k > 1 else None,
        weigh(T, [1.0] * (k + 2)) if more else None,
        (
            math.factorial(k - 1) / products[k],
            own,
            math.factorial(k + 1) / products[k + 2] if more else math.inf,
        ),
    )


def base_weights(s: Tensor, k: Any) -> Tensor:
    """The weights of a alone, ``(K, ...)``, with gradients to ``s``; ``k``: int or ``(B,)``."""
    harmonic = torch.tensor(HARMONIC, dtype=s.dtype, device=s.device)[k]
    mix = torch.where(_numbers(s) <= k, 1.0 - slopes(s)[:-1] / harmonic, 0.0)
    return weigh(differences(s), mix)


def _fixed_leading_tensors(s: Tensor, k: Tensor) -> Backward:
    d, T, number = slopes(s), differences(s), _numbers(s)
    predicted, lower, higher = (weigh(T, (number <= k + shift).to(s.dtype)) for shift in (0, -1, 1))
    harmonic = torch.tensor(HARMONIC, dtype=s.dtype, device=s.device)[k]
    reach = 1.0 / (1.0 + _pick(s, k))
    own = torch.maximum(reach, (reach - harmonic + _pick(d, k)).abs())
    products = torch.cat([torch.ones_like(s[:1]), (1.0 + s).cumprod(0)])
    factorial = torch.tensor([float(math.factorial(j)) for j in range(len(HARMONIC))], dtype=s.dtype, device=s.device)
    below = factorial[k - 1] / _pick(products, k)
    above = factorial[k + 1] / _pick(products, (k + 2).clamp(max=len(s)))
    return Backward(predicted, base_weights(s, k), lower, higher, (below, own, above))


def _numbers(s: Tensor) -> Tensor:
    return torch.arange(len(s), device=s.device).reshape((-1,) + (1,) * (s.dim() - 1))


def _pick(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(0, index.expand(values.shape[1:]).unsqueeze(0))[0]


def combined(layout: Any, weights: Any, tensors: tuple[Tensor, ...]) -> Tensor:
    """sum_i weights_i tensors_i; ``weights``: floats, or ``(K, ...)``."""
    if isinstance(weights, Tensor):
        weights = layout.spread(weights).unbind(0) if not layout.joint else weights.to(layout.real_dtype).unbind(0)
    total: Any = None
    for weight, x in zip(weights, tensors):
        if total is None:
            total = weight * x
        elif isinstance(weight, Tensor):
            total = torch.addcmul(total, weight, x) if not x.is_complex() else total + weight * x
        else:
            total = torch.add(total, x, alpha=weight)
    return total


def variable_coefficients(s: Any, dt: Any) -> tuple[Any, Any]:
    """(weights of a, g) of the formula of order len(s) with the coefficients of this grid."""
    d, T = slopes(s), differences(s)
    if isinstance(s, Tensor):
        return weigh(T, 1.0 - d[:-1] / d[-1]), dt / d[-1]
    return weigh(T, [1.0 - x / d[-1] for x in d[:-1]]), dt / d[-1]


def increments(s: Any) -> list[Any]:
    """Weights of Phi*_1, Phi*_2, ..: what each degree more adds to the polynomial through the nodes at the new point."""
    T = differences(s)
    return list(T[:, 1:].unbind(1)) if isinstance(T, Tensor) else T[1:]


def lagrange(x: Tensor, count: Any) -> Tensor:
    """Coefficients in powers of u of the Lagrange polynomials of the first ``count`` (int or ``(B,)``) of the nodes ``x``
    ``(K, ...)``: ``(K, powers, ...)``, 0 for the other nodes."""
    number = _numbers(x)
    inside = (number < count).expand(x.shape)
    rows = inside.to(x.dtype).unsqueeze(1)
    for i, node in enumerate(x):
        own = (number == i) | ~inside | ~inside[i]
        gap = torch.where(own, 1.0, x - node).unsqueeze(1)
        raised = torch.cat([torch.zeros_like(rows[:, :1]), rows], 1)
        plain = torch.cat([rows, torch.zeros_like(rows[:, :1])], 1)
        rows = torch.where(own.unsqueeze(1), plain, (raised - node * plain) / gap)
    return rows


def values(rows: Tensor, theta: Tensor, derivative: int = 0) -> Tensor:
    """Polynomials ``rows`` ``(K, powers, ...)`` or their derivatives in u at ``theta`` ``(n, ...)``: ``(K, n, ...)``."""
    result = torch.zeros_like(theta).expand(len(rows), *theta.shape)
    for power in reversed(range(derivative, rows.shape[1])):
        factor = math.perm(power, derivative)
        result = result * theta + factor * rows[:, power].unsqueeze(1)
    return result
