"""Implicit Runge-Kutta methods as checked data; adding one is one entry in ``IMPLICIT_TABLEAUS``.

HW: Hairer & Wanner, Solving Ordinary Differential Equations II, 2nd ed., Springer 1996.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import isfinite, sqrt

import numpy as np

from .tableau import Extension, TableauError, check_errors, check_extension, check_solution, require, stage_weights

CHECKED_ORDER = 6
FIT = 1e-11
"""Largest residual of order conditions that a continuous extension satisfies."""


@dataclass(frozen=True)
class ImplicitTableau:
    """k_i = f(t0 + c_i dt, y0 + dt sum_j a_ij k_j) with a full matrix a, y1 = y0 + dt sum_i b_i k_i.

    ``b_error``: one row of weights of the error estimate, or (); ``start_weight``: that of f(t0, y0) in it.
    ``filtered``: whether the estimate is multiplied by (I - gamma dt J)^-1, which keeps it from growing with the stiffness
    (HW IV.8.19; Hosea & Shampine 1996). What follows from ``a`` (an explicit first stage, which stages are coupled, stiff
    accuracy) is derived. So is the continuous extension: the collocation polynomial where that ends at y1, else the
    smallest weights of the highest order that do.

    Raises TableauError where row sums or an order condition (through order 6) of the solution, of the embedded solution
    or of the extension do not hold, or a node lies outside [0, 1].
    """

    name: str
    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    reference: str
    b_error: tuple[tuple[float, ...], ...] = ()
    embedded_order: int | None = None
    filtered: bool = False
    start_weight: float = 0.0

    def __post_init__(self) -> None:
        size = len(self.b)
        if len(self.c) != size or len(self.a) != size or any(len(row) != size for row in (*self.a, *self.b_error)):
            raise TableauError(self.name, f"c, b and all rows must have {size} entries")
        if not all(isfinite(value) for row in (*self.a, self.b, self.c, *self.b_error) for value in row):
            raise TableauError(self.name, "has a coefficient that is not finite")
        for i, (node, row) in enumerate(zip(self.c, self.a, strict=True)):
            require(self.name, f"row sum of stage {i}", row, [1.0] * size, node)
            if not 0 <= node <= 1:
                raise TableauError(self.name, f"node of stage {i} must lie in [0, 1], got {node}")
        weights = stage_weights(self.a, CHECKED_ORDER)
        check_solution(self, weights)
        self._check_errors(weights)
        check_extension(self, weights)

    def _check_errors(self, weights: dict) -> None:
        if not self.start_weight:
            check_errors(self, weights)
            return
        # f(t0, y0) is one more stage, before the others.
        a = ((0.0,) * (self.stages + 1), *((0.0, *row) for row in self.a))
        check_errors(_ErrorRow(self.name, self.order, self.embedded_order, ((self.start_weight, *self.b_error[0]),)),
                     stage_weights(a, CHECKED_ORDER))  # fmt: skip

    def __hash__(self) -> int:
        return hash((self.name, self.order))

    @property
    def stages(self) -> int:
        return len(self.b)

    @property
    def error_order(self) -> int | None:
        """Exponent of dt in the error estimate, or None without one."""
        return None if self.embedded_order is None else min(self.order, self.embedded_order) + 1

    @cached_property
    def explicit_first(self) -> bool:
        """Whether the first stage is f(t0, y0)."""
        return not any(self.a[0])

    @cached_property
    def stiffly_accurate(self) -> bool:
        """Whether y1 is the last stage's argument."""
        return self.a[-1] == self.b and self.c[-1] == 1.0

    @cached_property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """Stages that are solved together: one by one where a is lower triangular."""
        implicit = range(1 if self.explicit_first else 0, self.stages)
        triangular = not any(self.a[i][j] for i in implicit for j in implicit if j > i)
        return tuple((i,) for i in implicit) if triangular else (tuple(implicit),)

    @cached_property
    def structure(self) -> str:
        """What the blocks say: "ESDIRK", "SDIRK", "DIRK" or "coupled"."""
        if len(self.blocks[0]) > 1:
            return "coupled"
        same = len({self.a[i][i] for block in self.blocks for i in block}) == 1
        return ("E" if self.explicit_first else "") + ("SDIRK" if same else "DIRK")

    @cached_property
    def extension(self) -> Extension:
        collocation = _collocation(self.c)
        if np.allclose(collocation.sum(1), self.b, rtol=0, atol=1e-13):
            return Extension(min(self.stages, self.order), tuple(map(tuple, collocation.tolist())))
        return _fitted(self.name, self.a, self.b, self.order)

    @cached_property
    def gamma(self) -> float:
        """Coefficient of the real linear system that every step solves: the diagonal of a, or its real eigenvalue."""
        if self.structure != "coupled":
            return self.a[-1][-1]
        values = np.linalg.eigvals(np.array(self.a))
        return float(values[np.abs(values.imag).argmin()].real)


@dataclass(frozen=True)
class _ErrorRow:
    """As much of a tableau as the check of an error estimate reads."""

    name: str
    order: int
    embedded_order: int | None
    b_error: tuple[tuple[float, ...], ...]


def _collocation(c: tuple[float, ...]) -> np.ndarray:
    """Coefficients ``(s, s)`` of b_i(theta) by powers theta, .., theta^s: integrals of Lagrange's polynomials."""
    size = len(c)
    if len(set(c)) < size:
        return np.full((size, size), np.nan)
    lagrange = np.linalg.inv(np.vander(c, size, increasing=True)).T
    return lagrange / np.arange(1, size + 1)


def _fitted(name: str, a: tuple[tuple[float, ...], ...], b: tuple[float, ...], order: int) -> Extension:
    """The b_i(theta) of least norm with b_i(1) = b_i and the highest order that they can have, at most that of b."""
    size = len(b)
    for q in range(order, 0, -1):
        rows, right = [], []
        for power in range(1, q + 1):
            for tree, phi in stage_weights(a, q).items():
                row = np.zeros((size, q))
                row[:, power - 1] = phi
                rows.append(row.ravel())
                right.append(1 / tree.density if tree.order == power else 0.0)
        for i, weight in enumerate(b):
            row = np.zeros((size, q))
            row[i] = 1.0
            rows.append(row.ravel())
            right.append(weight)
        matrix, wanted = np.array(rows), np.array(right)
        solution = np.linalg.lstsq(matrix, wanted, rcond=1e-12)[0]
        if np.abs(matrix @ solution - wanted).max() < FIT:
            # One step of refinement: least squares lose some digits that the check of the extension asks for.
            solution = solution - np.linalg.lstsq(matrix, matrix @ solution - wanted, rcond=1e-12)[0]
            return Extension(q, tuple(map(tuple, solution.reshape(size, q).tolist())))
    raise TableauError(name, "has no continuous extension")


def _gauss(size: int) -> tuple[tuple[float, ...], tuple[tuple[float, ...], ...], tuple[float, ...]]:
    """c, a, b of the Gauss method: nodes are the roots of the shifted Legendre polynomial (HW IV.5)."""
    nodes, weights = np.polynomial.legendre.leggauss(size)
    c = tuple(((nodes + 1) / 2).tolist())
    integrals = _collocation(c)
    a = tuple(tuple(float(row @ (node ** np.arange(1, size + 1))) for row in integrals) for node in c)
    return c, a, tuple((weights / 2).tolist())


def _esdirk(
    name: str, order: int, gamma: str, nodes: str, rows: str, b: str, b_hat: str, embedded_order: int, reference: str
) -> ImplicitTableau:
    """A stiffly accurate ESDIRK from its table as text: ``nodes`` of stages 2 to s - 1; ``rows``: entries 2 to i - 1 of
    the rows of those stages, the first of each following from the node; ``b``, ``b_hat``: all but the first weight."""
    diagonal = Fraction(gamma)
    inner = [Fraction(word) for word in nodes.split()]
    size = len(inner) + 2
    a = [[Fraction(0)] * size]
    for i, (node, text) in enumerate(zip(inner, rows.split(";"), strict=True), 1):
        rest = [*(Fraction(word) for word in text.split()), diagonal]
        a.append([node - sum(rest), *rest, *[Fraction(0)] * (size - i - 1)])
    weights, embedded = ([Fraction(word) for word in text.split()] for text in (b, b_hat))
    weights, embedded = ([Fraction(1) - sum(row), *row] for row in (weights, embedded))
    a.append(weights)
    error = [x - y for x, y in zip(weights, embedded, strict=True)]
    exact = [[Fraction(0), *inner, Fraction(1)], *a, weights, error]
    c, *table, b_, e = (tuple(map(float, row)) for row in exact)
    return ImplicitTableau(name, order, c, tuple(table), b_, reference, (e,), embedded_order)


_S2, _S6 = sqrt(2.0), sqrt(6.0)
_D, _W = 1 - _S2 / 2, _S2 / 4
_GL4, _GL6 = _gauss(2), _gauss(3)
_RADAU5 = (
    ((88 - 7 * _S6) / 360, (296 - 169 * _S6) / 1800, (-2 + 3 * _S6) / 225),
    ((296 + 169 * _S6) / 1800, (88 + 7 * _S6) / 360, (-2 - 3 * _S6) / 225),
    ((16 - _S6) / 36, (16 + _S6) / 36, 1 / 9),
)
_RADAU5_GAMMA = 1 / (3 + 3 ** (2 / 3) - 3 ** (1 / 3))
# gamma (dt f0 + sum_i e_i z_i / 3) of HW IV.8.19 with e = (-13 - 7 sqrt 6, -13 + 7 sqrt 6, -1) and z = dt A k.
_RADAU5_ERROR = tuple(
    float(x) for x in _RADAU5_GAMMA / 3 * np.array([-13 - 7 * _S6, -13 + 7 * _S6, -1]) @ np.array(_RADAU5)
)

_ALL = (
    ImplicitTableau("implicit_euler", 1, (1.0,), ((1.0,),), (1.0,), "Euler 1768; HW IV.3"),
    ImplicitTableau("implicit_midpoint", 2, (0.5,), ((0.5,),), (1.0,), "HW IV.5, Gauss, one stage"),
    ImplicitTableau(
        "trapezoid", 2, (0.0, 1.0), ((0.0, 0.0), (0.5, 0.5)), (0.5, 0.5),
        "Crank & Nicolson 1947; HW IV.5, Lobatto IIIA",
    ),
    ImplicitTableau(
        "sdirk2", 2, (_D, 1.0), ((_D, 0.0), (1 - _D, _D)), (1 - _D, _D),
        "Alexander 1977, SIAM J. Numer. Anal. 14, theorem 5", ((-_D, _D),), 1, True,
    ),
    ImplicitTableau(
        "trbdf2", 2, (0.0, 2 * _D, 1.0), ((0.0, 0.0, 0.0), (_D, _D, 0.0), (_W, _W, _D)), (_W, _W, _D),
        "Bank et al. 1985; Hosea & Shampine 1996, Appl. Numer. Math. 20",
        ((_W - (1 - _W) / 3, _W - (3 * _W + 1) / 3, _D - _D / 3),), 3, True,
    ),
    ImplicitTableau(
        "radauIIA3", 3, (1 / 3, 1.0), ((5 / 12, -1 / 12), (3 / 4, 1 / 4)), (3 / 4, 1 / 4), "HW IV.5, table 5.5",
    ),
    ImplicitTableau("gl4", 4, *_GL4, "HW IV.5, table 5.1"),
    ImplicitTableau(
        "radauIIA5", 5, ((4 - _S6) / 10, (4 + _S6) / 10, 1.0), _RADAU5, _RADAU5[-1],
        "HW IV.5, table 5.6; estimate: IV.8.19", (_RADAU5_ERROR,), 3, True, _RADAU5_GAMMA,
    ),
    _esdirk(
        "esdirk547", 5, "23/125",
        nodes="46/125 7121331996143/11335814405378 49/353 3706679970760/5295570149437 347/382",
        rows="""; 791020047304/3561426431547; -158159076358/11257294102345 -85517644447/5003708988389;
            -1653327111580/4048416487981 1514767744496/9099671765375 14283835447591/12247432691556;
            -4540011970825/8418487046959 -1790937573418/7393406387169 10819093665085/7266595846747
            4109463131231/7386972500302""",
        b="""-188593204321/4778616380481 2809310203510/10304234040467 1021729336898/2364210264653
            870612361811/2470410392208 -1307970675534/8059683598661 23/125""",
        b_hat="""-582099335757/7214068459310 615023338567/3362626566945 3192122436311/6174152374399
            6156034052041/14430468657929 -1011318518279/9693750372484 1914490192573/13754262428401""",
        embedded_order=4,
        reference="Kennedy & Carpenter 2019, Appl. Numer. Math. 146, ESDIRK5(4)7L[2]SA2",
    ),
    ImplicitTableau("gl6", 6, *_GL6, "HW IV.5, table 5.2"),
)  # fmt: skip

IMPLICIT_TABLEAUS: dict[str, ImplicitTableau] = {tableau.name: tableau for tableau in _ALL}
"""Name -> tableau."""
