"""Step lengths of inner solvers. The constant one, 1 / L, needs L = 1 + |g| rho: the spectral radius of df/dy."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..status import ArgumentError, ArgumentTypeError
from .base import Point, ProximalProblem, any_true
from .probes import waves

STEPS = 25
"""Steps in time over which an estimate is kept."""
MARGIN = 1.2
"""Power iterations approach the radius from below; stopped at 2 % of change they are within a fifth of it."""
ITERATIONS = 30


class SeenRadius(NamedTuple):
    """|lambda|_max of df/dy as far as the iterations of the last step in time have seen it (1/time)."""

    rho: Any

    @classmethod
    def fresh(cls, layout: Any, y0: Tensor) -> SeenRadius:
        return cls(_zeros(layout))


class PowerMemory(NamedTuple):
    """The vector of the last power iteration, the radius it gave (1/time), and the steps since (0: none yet)."""

    v: Tensor
    rho: Any
    age: Any

    @classmethod
    def fresh(cls, layout: Any, y0: Tensor) -> PowerMemory:
        v = waves(layout, y0, 0.7)
        zero = _zeros(layout)
        return cls(v, zero, 0 if layout.joint else zero.to(torch.int64))


def spectral_radius(problem: ProximalProblem, point: Point, running: Any, memory: PowerMemory) -> tuple[Any, PowerMemory]:
    """Upper estimate of |lambda|_max of df/dy at ``point``, float or ``(B,)`` in 1/time, by power iterations.

    Kept for ``STEPS`` steps and then begun where it ended. Each iteration is one call of f.
    """
    ops = problem.ops
    due = running & ((memory.age % STEPS) == 0)
    v, rho = memory.v, memory.rho
    pending = due
    for _ in range(ITERATIONS):
        if not any_true(pending):
            break
        length = problem.dot(v, v) ** 0.5
        gjv = v - problem.jv(point, problem.keep(pending, v, 0.0))
        grown = problem.dot(gjv, gjv) ** 0.5
        found = problem.ratio(grown, abs(problem.g) * length)
        usable = pending & ops.isfinite(found) & (found > 0)
        v = problem.keep(usable, gjv * problem.layout.spread(problem.ratio(1.0, grown)), v)
        settled = abs(found - rho) <= 0.02 * found
        rho = ops.where(usable, found, rho)
        pending = usable & ops.invert(settled)
    return MARGIN * rho, PowerMemory(v, rho, memory.age + 1)


class Rated:
    """What optimisers with a ``rate``, a word or a number, and ``lipschitz`` share."""

    rate: str | float
    lipschitz: float | None

    def check_rate(self, *words: str) -> None:
        """Raise ``ArgumentTypeError`` / ``ArgumentError`` unless the rate is one of ``words`` or positive, and lipschitz >= 0."""
        if isinstance(self.rate, str):
            if self.rate not in words:
                raise ArgumentError(f"rate must be one of {', '.join(words)} or a number, found {self.rate!r}")
        elif not isinstance(self.rate, (int, float)):
            raise ArgumentTypeError(f"rate must be a word or a number, found {type(self.rate).__name__}")
        elif not self.rate > 0:
            raise ArgumentError(f"rate must be positive, found {self.rate}")
        if self.lipschitz is not None and not self.lipschitz >= 0:
            raise ArgumentError(f"lipschitz must be >= 0, found {self.lipschitz}")

    @property
    def estimates(self) -> bool:
        """Whether the constant rate has to be found."""
        return self.rate == "constant" and self.lipschitz is None

    def remember(self, layout: Any, y0: Tensor) -> Any:
        return (PowerMemory if self.estimates else SeenRadius).fresh(layout, y0)

    def begun(self, problem: Any, point: Point, running: Any, memory: Any) -> tuple[Any, Any, Any]:
        """The rate, the curvature 1 + |g| rho as far as known, and the memory."""
        rho = memory.rho if self.lipschitz is None else self.lipschitz
        if self.estimates:
            rho, memory = spectral_radius(problem, point, running, memory)
        known = 1 + abs(problem.g) * rho
        return (1 / known if self.rate == "constant" else self.rate), known, memory


def _zeros(layout: Any) -> Any:
    return 0.0 if layout.joint else torch.zeros(layout.batch, dtype=torch.float64, device=layout.device)
