"""The orthogonal polynomials behind ROCK4, from the zeros of their weight.

Shape: (q1, r1, q2, r2, gap, D): zeros -q_i +- i r_i of the weight, and z = (x - 1) d - gap with d = D s**2 for x in [-1, 1].
"""

from __future__ import annotations

import numpy as np

Shape = tuple[float, ...]


def weight(z: np.ndarray, shape: Shape) -> np.ndarray:
    """w(z), of degree 4 with w(0) = 1."""
    value = np.ones_like(z)
    for q, r in (shape[:2], shape[2:4]):
        value = value * ((z + q) ** 2 + r * r) / (q * q + r * r)
    return value


def recursion(s: int, shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """mu_j, kappa_j, j = 1 .. s - 4, of P_j = (mu_j z + 1 + kappa_j) P_{j-1} - kappa_j P_{j-2}, P_j(0) = 1.

    P_j are orthogonal on [-1, 1] with respect to w**2 / sqrt(1 - x**2): Stieltjes' procedure with the Gauss-Chebyshev rule
    of s + 3 nodes, which is exact for all that is integrated.
    """
    nodes = s + 3
    x = np.cos((2 * np.arange(1, nodes + 1) - 1) * np.pi / (2 * nodes))
    d = shape[5] * s * s
    at_zero = 1 + shape[4] / d
    measure = weight((x - 1) * d - shape[4], shape) ** 2
    mu, kappa = np.zeros(s - 4), np.zeros(s - 4)
    before, p, size, last, ratio = np.zeros(nodes), np.ones(nodes), measure.sum(), 1.0, 0.0
    for j in range(s - 4):
        centre = (measure * x * p * p).sum() / size
        spread = size / last if j else 0.0
        # P_{j-1}(0) / P_j(0) of the monic polynomials.
        ratio, previous = 1 / (at_zero - centre - spread * ratio), ratio
        mu[j], kappa[j] = ratio / d, spread * ratio * previous
        before, p, last = p, (x - centre) * p - spread * before, size
        size = (measure * p * p).sum()
        # Monic polynomials shrink by about a half at each degree.
        before, p, last, size = 2 * before, 2 * p, 4 * last, 4 * size
    return mu, kappa
