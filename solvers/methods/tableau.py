"""Runge-Kutta tableaux as frozen data, checked when they are built.

The checks are those of the theory, written once: every condition is a rooted tree t with the elementary weight
sum_i b_i Phi_i(t) = 1 / gamma(t) (Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, 2nd ed., II.2;
below HNW), so a misprinted digit can't reach a solve. What follows from the coefficients (FSAL, which stage is
f(t1, y1), the exponent of the error estimate) is derived from them and never declared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import isfinite
from operator import mul
from typing import Any, NamedTuple

__all__ = ["Extension", "RootedTree", "Tableau", "TableauError", "rooted_trees", "stage_weights"]

Row = Sequence[float]

CHECKED_ORDER = 5
"""Order conditions are checked through this order when a tableau is built: 17 trees; order 8 would need 200."""
TOLERANCE = 1e-13
"""Largest residual of a condition, relative to max(1, sum of the absolute values of its terms)."""
HAIRER_ERROR_ORDERS = (5, 3)
"""Orders of the two embedded solutions behind a pair of error rows (HNW II.10, the 8(5,3) estimator)."""


class TableauError(ValueError):
    """A tableau contradicts itself: says which tableau, which condition (or rooted tree) and by how much."""

    def __init__(self, tableau: str, condition: str, residual: float | None = None):
        self.tableau, self.condition, self.residual = tableau, condition, residual
        size = "" if residual is None else f" (residual {residual:.3e})"
        super().__init__(f"tableau {tableau!r}: {condition}{size}")


class RootedTree(NamedTuple):
    """A rooted tree: its subtrees, the number of its vertices, and its density gamma (HNW I, II.2)."""

    children: tuple[RootedTree, ...]
    order: int
    density: int

    def __str__(self) -> str:
        return "[" + ",".join(map(str, self.children)) + "]" if self.children else "t"


def _forests(trees: tuple[RootedTree, ...], vertices: int) -> Iterator[tuple[RootedTree, ...]]:
    """Multisets of ``trees`` with that many vertices in all; each once, its members in falling position."""
    if vertices == 0:
        yield ()
    for i, tree in enumerate(trees):
        if tree.order <= vertices:
            for rest in _forests(trees[: i + 1], vertices - tree.order):
                yield (tree, *rest)


@cache
def rooted_trees(order: int) -> tuple[RootedTree, ...]:
    """All rooted trees with 1 to ``order`` vertices, the smaller first (1, 1, 2, 4, 9, 20, 48, 115 of each order)."""
    trees: tuple[RootedTree, ...] = ()
    for vertices in range(1, order + 1):
        grown = []
        for children in _forests(trees, vertices - 1):
            density = vertices
            for child in children:
                density *= child.density
            grown.append(RootedTree(children, vertices, density))
        trees += tuple(grown)
    return trees


def _dot(x: Row, y: Row) -> float:
    return sum(map(mul, x, y))


def polynomial(coefficients: Sequence[float], theta: Any, derivative: int = 0) -> Any:
    """sum_p coefficients_p theta^p, p = 0, 1, 2, ..., or its d-th derivative, by Horner's rule."""
    for _ in range(derivative):
        coefficients = [p * c for p, c in enumerate(coefficients)][1:]
    total: Any = 0.0 * theta
    for c in reversed(coefficients):
        total = total * theta + c
    return total


def stage_weights(a: Sequence[Row], order: int) -> dict[RootedTree, list[float]]:
    """Elementary weights Phi_i(t) of each stage i, for all trees through ``order`` (HNW I, II.2, eq. 2.15).

    ``a`` has one row per stage; a row may stop where only zeros follow, so explicit rows need no padding.
    """
    weights: dict[RootedTree, list[float]] = {}
    advanced: dict[RootedTree, list[float]] = {}  # sum_j a_ij Phi_j(t): what a tree gives as a subtree
    for tree in rooted_trees(order):
        phi = [1.0] * len(a)
        for child in tree.children:
            phi = list(map(mul, phi, advanced[child]))
        weights[tree] = phi
        if tree.order < order:
            advanced[tree] = [_dot(row, phi) for row in a]
    return weights


@dataclass(frozen=True)
class Extension:
    """Continuous extension y(theta) = y0 + dt sum_i b_i(theta) k_i with b_i(theta) = sum_j P[i][j] theta^(j+1).

    ``order``: uniform in theta, the local error is O(dt^(order + 1)). ``P``: one row per stage, the main stages first,
    then the extra ones. ``a_extra``, ``c_extra``: the extra stages; a row stands over all stages before it, main and
    extra.
    """

    order: int
    P: tuple[tuple[float, ...], ...]
    a_extra: tuple[tuple[float, ...], ...] = ()
    c_extra: tuple[float, ...] = ()


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method: k_i = f(t0 + c_i dt, y0 + dt sum_j a_ij k_j), y1 = y0 + dt sum_i b_i k_i.

    ``a``: row i has i entries, ``a[0] == ()``; nodes lie in [0, 1], for f is never called outside a step.
    ``b_error``: rows r of weights of error estimates dt sum_i b_error[r][i] k_i, in units of y. None: ``()``; one row
    is b - b_hat, b_hat of order ``embedded_order``; two rows are (E5, E3) of Hairer's 8(5,3) estimator, whose blend
    behaves like dt^8: there ``embedded_order`` is 7 by bookkeeping, to give the exponent 1/8; no solution of order 7
    stands behind it.
    ``extension``: None derives the one that costs nothing: linear at order 1, the quadratic through y0, k0, y1 at
    order 2, the cubic through y0, k0, y1, f(t1, y1) above; a method that isn't FSAL then has one extra stage, which
    is the next step's first.
    ``reference``: paper or book, with its equation or table.

    Raises TableauError where shapes, row sums or an order condition (through order 5) of the solution, of the embedded
    solution or of the extension do not hold.
    """

    name: str
    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    reference: str
    b_error: tuple[tuple[float, ...], ...] = ()
    embedded_order: int | None = None
    extension: Extension = None  # type: ignore[assignment]  # None becomes the free extension, so nobody meets it

    def __post_init__(self) -> None:
        _check_shapes(self)
        if self.extension is None:
            object.__setattr__(self, "extension", _free_extension(self))
        _check_extension_shapes(self)
        _check_nodes(self)
        weights = stage_weights(self.all_a, CHECKED_ORDER)
        check_solution(self, weights)
        check_errors(self, weights)
        check_extension(self, weights)

    def __hash__(self) -> int:
        # Tableaux are keys of caches in the step: the name tells them apart faster than some hundred coefficients.
        return hash((self.name, self.order))

    @property
    def stages(self) -> int:
        """Number of main stages; the extra stages of the extension are not among them."""
        return len(self.b)

    @property
    def all_a(self) -> tuple[tuple[float, ...], ...]:
        """Rows of the main stages, then of the extra ones."""
        return self.a + self.extension.a_extra

    @property
    def all_c(self) -> tuple[float, ...]:
        """Nodes of the main stages, then of the extra ones."""
        return self.c + self.extension.c_extra

    @property
    def error_order(self) -> int | None:
        """Exponent of dt in the error estimate, or None without an estimate: 1 + the lower order of the pair."""
        return None if self.embedded_order is None else min(self.order, self.embedded_order) + 1

    @cached_property
    def later_a(self) -> tuple[tuple[float, ...], ...]:
        """Rows of all stages but the first, as one object."""
        return tuple(self.a[1:])

    @cached_property
    def later_c(self) -> tuple[float, ...]:
        """Nodes of all stages but the first, as one object."""
        return tuple(self.c[1:])

    @cached_property
    def fsal(self) -> bool:
        """First same as last: the last stage is f(t1, y1), and so the first of the next step."""
        return self.stages > 1 and self.c[-1] == 1 and self.a[-1] == self.b[:-1] and self.b[-1] == 0

    @cached_property
    def real_limit(self) -> float:
        """The least x with |R(-x)| > 1, to 0.01, R(z) = 1 + z b (I - z A)^-1 1 being the stability function (HNW II, IV.2)."""
        coefficients, column = [1.0], [1.0] * self.stages
        for _ in range(self.stages):
            coefficients.append(_dot(self.b, column))
            column = [_dot(row, column) for row in self.a]
        x, value = 0.0, 1.0
        while abs(value) <= 1.0 and x < 100.0:
            x += 0.01
            value = sum(c * (-x) ** power for power, c in enumerate(coefficients))
        return x

    @cached_property
    def f1_stage(self) -> int | None:
        """Index, among main and extra stages, of the one that equals f(t1, y1), or None if there is none."""
        if self.fsal:
            return self.stages - 1
        for i in range(self.stages, len(self.all_a)):
            row = self.all_a[i]
            if self.all_c[i] == 1 and row[: self.stages] == self.b and not any(row[self.stages :]):
                return i
        return None


def _free_extension(tableau: Tableau) -> Extension:
    """The extension that follows from y0, y1 and the slopes known at both ends."""
    b, stages = tableau.b, tableau.stages
    if tableau.order == 1:
        return Extension(1, tuple((weight,) for weight in b))
    first = [1.0] + [0.0] * (stages - 1)
    if tableau.order == 2:
        return Extension(2, tuple((e, weight - e) for e, weight in zip(first, b)))
    if tableau.fsal:
        return Extension(3, _cubic(first, b, [0.0] * (stages - 1) + [1.0]))
    return Extension(3, _cubic([*first, 0.0], [*b, 0.0], [0.0] * stages + [1.0]), (b,), (1.0,))


def _cubic(first: Row, b: Row, last: Row) -> tuple[tuple[float, ...], ...]:
    """y0 + th^2 (3 - 2 th) (y1 - y0) + dt th (1 - th)^2 k0 + dt th^2 (th - 1) f1, by powers of th.

    ``first``, ``b``, ``last``: weights over the stages that give k0, (y1 - y0) / dt and f1.
    """
    return tuple((e, 3 * weight - 2 * e - f, e + f - 2 * weight) for e, weight, f in zip(first, b, last))


def _check_shapes(tableau: Tableau) -> None:
    name, stages = tableau.name, tableau.stages
    if stages == 0 or tableau.order < 1:
        raise TableauError(name, "needs at least one stage and an order of at least 1")
    if len(tableau.c) != stages or len(tableau.a) != stages:
        raise TableauError(name, f"c, a, b must agree on the stages, got {len(tableau.c)}, {len(tableau.a)}, {stages}")
    for i, row in enumerate(tableau.a):
        if len(row) != i:
            raise TableauError(name, f"row {i} of an explicit tableau has {i} entries, got {len(row)}")
    if len(tableau.b_error) > 2 or any(len(row) != stages for row in tableau.b_error):
        raise TableauError(name, f"b_error takes at most two rows of {stages} weights")
    if bool(tableau.b_error) != (tableau.embedded_order is not None):
        raise TableauError(name, "b_error and embedded_order come together")


def _check_extension_shapes(tableau: Tableau) -> None:
    extension, total = tableau.extension, len(tableau.all_a)
    if len(extension.c_extra) != len(extension.a_extra):
        raise TableauError(tableau.name, "c_extra and a_extra must agree on the extra stages")
    for i, row in enumerate(extension.a_extra, tableau.stages):
        if len(row) != i:
            raise TableauError(tableau.name, f"extra stage {i} stands on {i} stages, got a row of {len(row)}")
    if len(extension.P) != total or not extension.P[0] or len(set(map(len, extension.P))) != 1:
        raise TableauError(tableau.name, f"P needs {total} rows (main and extra stages) of one length")


def _check_nodes(tableau: Tableau) -> None:
    """Every number finite, every node in [0, 1] and equal to its row's sum."""
    rows = (*tableau.all_a, tableau.all_c, tableau.b, *tableau.b_error, *tableau.extension.P)
    if not all(isfinite(value) for row in rows for value in row):
        raise TableauError(tableau.name, "has a coefficient that is not finite")
    for i, (node, row) in enumerate(zip(tableau.all_c, tableau.all_a)):
        require(tableau.name, f"row sum of stage {i}", row, [1.0] * len(row), node)
        if not 0 <= node <= 1:
            raise TableauError(tableau.name, f"node of stage {i} must lie in [0, 1], got {node}")


def require(name: str, condition: str, row: Row, phi: Row, target: float) -> None:
    """Raise unless sum_i row_i phi_i = target up to rounding."""
    residual = _dot(row, phi) - target
    # Rounding grows with the terms of the sum, which for high orders are much larger than the sum itself.
    if not abs(residual) <= TOLERANCE * max(1.0, sum(abs(x * y) for x, y in zip(row, phi))):
        raise TableauError(name, condition, residual)


def _checked(order: int, weights: dict[RootedTree, list[float]]) -> tuple[RootedTree, ...]:
    """Trees through ``order``, as far as their weights are known."""
    return tuple(tree for tree in weights if tree.order <= order)


def check_solution(tableau: Any, weights: dict[RootedTree, list[float]]) -> None:
    for tree in _checked(tableau.order, weights):
        condition = f"order condition {tree} (order {tree.order}) of the solution"
        require(tableau.name, condition, tableau.b, weights[tree], 1 / tree.density)


def check_errors(tableau: Any, weights: dict[RootedTree, list[float]]) -> None:
    """An error row kills every tree through the order of its embedded solution, and not all of the next order.

    For b satisfies the same conditions, this says that b_hat = b - row does; the last part, that the estimate isn't of
    a higher order than its exponent assumes (zero, for one).
    """
    if tableau.embedded_order is None:
        return
    orders = HAIRER_ERROR_ORDERS if len(tableau.b_error) == 2 else (min(tableau.embedded_order, tableau.order),)
    for r, (row, order) in enumerate(zip(tableau.b_error, orders)):
        for tree in _checked(order, weights):
            require(tableau.name, f"order condition {tree} of error row {r}", row, weights[tree], 0.0)
        following = [tree for tree in _checked(order + 1, weights) if tree.order == order + 1]
        if following and all(abs(_dot(row, weights[tree])) <= TOLERANCE for tree in following):
            raise TableauError(tableau.name, f"error row {r} is of a higher order than {order + 1}")


def check_extension(tableau: Any, weights: dict[RootedTree, list[float]]) -> None:
    """sum_i b_i(theta) Phi_i(t) = theta^|t| / gamma(t) as polynomials in theta, and b_i(1) = b_i."""
    name, extension = tableau.name, tableau.extension
    powers = list(zip(*extension.P))
    for tree in _checked(extension.order, weights):
        if tree.order > len(powers):
            raise TableauError(name, f"extension of degree {len(powers)} can't be of order {extension.order}")
        for power, column in enumerate(powers, 1):
            target = 1 / tree.density if power == tree.order else 0.0
            condition = f"order condition {tree} of the extension, coefficient of theta^{power}"
            require(name, condition, column, weights[tree], target)
    end = [*tableau.b, *[0.0] * len(extension.a_extra)]
    for i, (row, weight) in enumerate(zip(extension.P, end)):
        require(name, f"extension at theta = 1, weight of stage {i}", row, [1.0] * len(row), weight)
