"""The equation of an implicit step with its inner iterations recorded by autograd, start and data included."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Point, ProximalProblem


class UnrolledProblem(ProximalProblem):
    """A proximal problem whose iterates are functions of everything they came from.

    Step lengths and momentum are numbers made of inner products, which are constants here: a derivative of theirs multiplies
    the residual, and goes with it. With constant rates the derivative converges as the iterates do. Where lengths follow the
    residual, as in conjugate gradients, what they leave of other directions is not bounded by the tolerance (measured: up to
    ten times the rest); with L-BFGS and Anderson's method it was the whole gradient, so that those do not unroll.

    Args: as of :class:`ProximalProblem`; ``wide``: g with its gradient, spread over the state.
    """

    def __init__(self, *arguments: Any, wide: Any) -> None:
        super().__init__(*arguments)
        self.wide = wide

    def evaluate(self, z: Tensor) -> Point:
        f = self.slopes(z)
        return Point(z, z - self.a - self.wide * f, f)

    def dot(self, x: Tensor, y: Tensor) -> Any:
        return super().dot(x.detach(), y.detach())

    def norm(self, x: Tensor) -> Any:
        return super().norm(x.detach())

    def ratio(self, numerator: Any, denominator: Any) -> Any:
        """0, not NaN, where there is none: a sample that rests would multiply its derivative by it, and one that fails stands
        still as well."""
        found = super().ratio(numerator, denominator)
        return self.ops.where(denominator > 0, found, 0.0)

    def value(self, z: Tensor) -> Any:
        return super().value(z.detach())
