"""Derive the coefficients of the stabilised method `rock4`: ``python -m benchmarks.derive_rock4 > FILE`` (some minutes).

Stability polynomial R = w P_{s-4} (Abdulle 2002, SIAM J. Sci. Comput. 23, section 3): w of degree 4 with two pairs of complex
zeros, P_j orthogonal on [-1, 1] with respect to w(x)**2 / sqrt(1 - x**2), where z = (x - 1) d - gap. The zeros, gap and
d / s**2 are such that R agrees with exp to order 4, |R| <= DAMPING holds for x in [-1, 1], and that interval reaches as far
along the negative axis as it may. P is carried out by its recursion, w by a formula of four stages whose coefficients solve
the order conditions of the composition (those of the eight rooted trees to order 4), with the smallest sum of squares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from scipy.optimize import least_squares, minimize

from solvers.methods.rock4_recursion import recursion, weight

STAGES = (*range(8, 31), *range(32, 60, 3), 70, 80, 100, 120, 150)
DAMPING = 0.95
START = (0.24, 3.28, 2.31, 1.24, 3.96, 0.123)
"""Zeros -q_i +- i r_i of w, gap, d / s**2, of the shortest one; each next one begins where the last ended."""
FIRST = (-0.2, 0.6, -0.3, -0.1, 0.0, 0.55, 0.5, -0.2, 0.0, 0.45)
"""a_21, a_31, a_32, a_41, a_42, a_43, b_1 .. b_4 that the search for the four stages begins at."""
DENSITIES = np.array([1, 2, 3, 6, 4, 8, 12, 24])
"""Of the trees: t, [t], [t t], [[t]], [t t t], [t [t]], [[t t]], [[[t]]]."""
TARGET = np.array([1 / math.factorial(k) for k in range(5)])


def taylor(shape: np.ndarray, s: int) -> np.ndarray:
    """Coefficients of R to z**4."""
    mu, kappa = recursion(s, tuple(shape))
    before, p = np.zeros(5), np.eye(5)[0]
    for m, k in zip(mu, kappa, strict=True):
        before, p = p, (1 + k) * p - k * before + m * np.concatenate([[0], p[:-1]])
    w = np.array([1.0])
    for q, r in (shape[:2], shape[2:4]):
        size = q * q + r * r
        w = np.convolve(w, [1, 2 * q / size, 1 / size])
    return np.convolve(p, w)[:5]


def stability(shape: np.ndarray, s: int, points: int) -> np.ndarray:
    """R on the interval of x."""
    gap, d = shape[4], shape[5] * s * s
    z = (np.cos(np.linspace(0, np.pi, points)) - 1) * d - gap
    before, p = np.zeros_like(z), np.ones_like(z)
    for m, k in zip(*recursion(s, tuple(shape)), strict=True):
        before, p = p, (m * z + 1 + k) * p - k * before
    return weight(z, tuple(shape)) * p


def length(shape: np.ndarray, s: int) -> float:
    return 2 * shape[5] * s * s + shape[4]


def best_shape(s: int, start: np.ndarray) -> np.ndarray:
    def order(shape: np.ndarray) -> np.ndarray:
        return taylor(shape, s)[1:] / TARGET[1:] - 1

    damped = {"type": "ineq", "fun": lambda shape: DAMPING**2 - stability(shape, s, 8 * s + 1) ** 2}
    exact = {"type": "eq", "fun": order}
    options = {"maxiter": 200, "ftol": 1e-12}
    found = minimize(lambda u: -length(u, s) / s**2, start, constraints=[exact, damped], method="SLSQP", options=options).x
    near = lambda u: np.concatenate([order(u) * 1e3, (u - found) * 1e-6])
    return least_squares(near, found, xtol=1e-15, ftol=1e-15, gtol=1e-15).x


# --- the four stages that carry out w: weights of rooted trees ---------------------------------------------------------


def slope(p: np.ndarray) -> np.ndarray:
    """Weights of the trees in dt f(y), for y with weights ``p``."""
    return np.array([1, p[0], p[0] ** 2, p[1], p[0] ** 3, p[0] * p[1], p[2], p[3]])


def recursion_weights(s: int, shape: np.ndarray) -> np.ndarray:
    before, p = np.zeros(8), np.zeros(8)
    for m, k in zip(*recursion(s, tuple(shape)), strict=True):
        before, p = p, (1 + k) * p - k * before + m * slope(p)
    return p


def finished(p: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Weights of the result, and of the slopes of the four stages and of the result."""
    k: list[np.ndarray] = []
    for row in ((), c[:1], c[1:3], c[3:6]):
        k.append(slope(p + sum((a * x for a, x in zip(row, k)), np.zeros(8))))
    y = p + sum(b * x for b, x in zip(c[6:], k))
    return y, [*k, slope(y)]


def best_finish(p: np.ndarray, start: np.ndarray) -> np.ndarray:
    def conditions(c: np.ndarray) -> np.ndarray:
        return finished(p, c)[0] - 1 / DENSITIES

    small = {"maxiter": 500, "ftol": 1e-14}
    exact = {"type": "eq", "fun": conditions}
    c = minimize(lambda c: 0.5 * c @ c, start, constraints=[exact], method="SLSQP", options=small).x
    for _ in range(20):
        steps = 1e-7 * np.eye(10)
        jacobian = np.stack([(conditions(c + e) - conditions(c - e)) / 2e-7 for e in steps], 1)
        c = c - np.linalg.lstsq(jacobian, conditions(c), rcond=None)[0]
    return c


def embedded(p: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Weights of the four slopes that cancel that of the result in the trees to order 3."""
    k = finished(p, c)[1]
    return np.linalg.solve(np.stack([x[:4] for x in k[:4]], 1), -k[4][:4])


def rows(stages: Iterable[int] = STAGES) -> dict[int, tuple[float, ...]]:
    """Stages -> shape (6), the four stages (10), the embedded weights (4)."""
    shape, c, table = np.array(START), np.array(FIRST), {}
    for s in stages:
        shape = best_shape(s, shape)
        p = recursion_weights(s, shape)
        c = best_finish(p, c)
        table[s] = (*shape, *c, *embedded(p, c))
    return table


if __name__ == "__main__":
    for count, row in rows().items():
        print(f"    {count}: ({', '.join(repr(float(x)) for x in row)}),", flush=True)
