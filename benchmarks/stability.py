"""Linear stability, measured by applying every method to y' = lambda y: limits on both axes, pictures of |R(z)|."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from .convergence import Variant, variants
from .registry import BENCHMARKS, Benchmark, Column, Result, Settings, Table

__all__ = ["KNOWN", "axis_limit", "growth_of_steps", "run", "step_factor"]

EXCESS = 1e-9  # growth of |y| by this much a step counts as unstable
FARTHEST = 50.0  # |z| beyond which an axis is called unbounded
FORCED_UNTIL = 24.0  # steps during which a multistep method's roots are all excited
SHORT, LONG = 240, 1200  # steps of a multistep method

# One-step formulas whose state is only a predictor of their own solution.
PREDICTED = ("prox_euler", "prox_multistage2", "prox_multistage3")

THREE = (2.512745326618329, math.sqrt(3))
FOUR = (2.785293563405282, math.sqrt(8))
KNOWN: dict[str, tuple[float | None, float | None]] = {
    # (limit on the negative real axis, on the imaginary axis); None: none is given here.
    # Taylor polynomials of degree 1 to 4: Hairer & Wanner, Solving ODEs II, IV.2. Methods with more stages than their
    # order, and their imaginary limits: roots of |R(z)| = 1 of the published coefficients, by hand.
    "euler": (2, 0),
    "midpoint": (2, 0),
    "heun2": (2, 0),
    "ralston2": (2, 0),
    "adaptive_heun": (2, 0),
    "fehlberg2": (512 / 255, 0),
    "heun3": THREE,
    "ssprk33": THREE,
    "bosh3": THREE,
    "rk4": FOUR,
    "rk4_classic": FOUR,
    "dopri5": (3.3065678926, 0.9972),
    "tsit5": (3.5068469938, None),
    "dopri8": (5.1666336200, None),
    "dop853": (6.3936515228, 5.9603598),
    # A-stable implicit methods (Hairer & Wanner II, IV.3 and IV.5; Kennedy & Carpenter 2019 for esdirk547).
    **dict.fromkeys(
        (
            *("implicit_euler", "implicit_midpoint", "trapezoid", "sdirk2", "trbdf2"),
            *("radauIIA3", "radauIIA5", "gl4", "gl6", "esdirk547"),
        ),
        (math.inf, math.inf),
    ),
    **dict.fromkeys(("prox_euler", "prox_cn", "prox_bdf2"), (math.inf, math.inf)),
    # A(86) and A(73) stable (Hairer & Wanner II, V.2); the multi-stage ones and those of many stages on the real axis.
    **dict.fromkeys(("prox_bdf3", "prox_bdf4", "prox_multistage2", "prox_multistage3", "rkc2", "rock4"), (math.inf, None)),
    # Adams-Bashforth k: 2 / sum_j |b_j| (Hairer & Wanner II, V.1); imaginary: the orders whose locus encloses a part.
    "explicit_adams, order 1": (2, 0),
    "explicit_adams, order 2": (1, 0),
    "explicit_adams, order 3": (6 / 11, 0.72363),
    "explicit_adams, order 4": (3 / 10, 0.42999),
    "explicit_adams, order 5": (90 / 551, 0),
    "explicit_adams, order 6": (5 / 57, 0),
    "explicit_adams, order 7": (0.0465139173, 0.05809),
    "explicit_adams, order 8": (0.0244085133, 0.02949),
    "explicit_adams, order 9": (0.0127044760, None),
    "explicit_adams, order 10": (0.0065712465, None),
    "explicit_adams, order 11": (0.0033825471, None),
    "explicit_adams, order 12": (0.0017346562, None),
    # Adams-Bashforth k predicting, Adams-Moulton of order k correcting once, evaluated again (PECE): by root locus.
    "implicit_adams, order 1": (1, None),
    "implicit_adams, order 2": (2, None),
    "implicit_adams, order 3": (1.728784, None),
    "implicit_adams, order 4": (1.284816, None),
    "implicit_adams, order 5": (0.946917, None),
    "implicit_adams, order 6": (0.698003, None),
    "implicit_adams, order 7": (0.515316, None),
    "implicit_adams, order 8": (0.381569, None),
    "implicit_adams, order 9": (0.283920, None),
    "implicit_adams, order 10": (0.212824, None),
    "implicit_adams, order 11": (0.161196, None),
    "implicit_adams, order 12": (0.123787, None),
}

COLUMNS = [
    Column("method", "method"),
    Column("real", "real axis, measured", "number"),
    Column("known_real", "known", "number"),
    Column("imaginary", "imaginary axis, measured", "number"),
    Column("known_imaginary", "known", "number"),
    Column("verdict", "real axis within 1 %"),
]


def step_factor(method: str, z: Tensor) -> Tensor:
    """|R(z)| of a one-step method: one step of size 1 from y = 1 with lambda = z `(B,)`; infinite where it fails."""
    from solvers import solve

    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    rate = z[:, None]
    with torch.no_grad():
        solution = solve(
            lambda t, y: rate * y,
            torch.ones_like(rate),
            times,
            method=method,
            num_steps=1,
            batch_dim=0,
            rtol=1e-11,
            atol=1e-11,
            throw=False,
        )
    return solution.y[-1, :, 0].abs().nan_to_num(nan=math.inf)


def growth_of_steps(variant: Variant, z: Tensor, steps: int) -> Tensor:
    """Mean growth factor a step of |y| for lambda = z `(B,)`, after a forcing that excites every root of the method.

    Compares the largest |y| of four successive steps halfway with that of the last four; infinite where it overflows.
    """
    from solvers import solve

    rate = z[:, None]

    def forced(t: Tensor, y: Tensor) -> Tensor:
        now = t[:, None] if t.dim() else t
        noise = torch.sin(12.9898 * now) + torch.cos(3.1 * now)
        return rate * y + torch.where(now < FORCED_UNTIL, noise, 0.0)

    half = steps // 2
    marks = [0, *range(half - 3, half + 1), *range(steps - 3, steps + 1)]
    times = torch.tensor(marks, dtype=torch.float64)
    with torch.no_grad():
        solution = solve(
            forced,
            torch.ones_like(rate),
            times,
            method=variant.method,
            num_steps=steps,
            batch_dim=0,
            rtol=1e-11,
            atol=1e-11,
            throw=False,
            **variant.options,
        )
    sizes = solution.y[1:, :, 0].abs()
    middle, end = sizes[:4].amax(0), sizes[4:].amax(0)
    return (end / middle).pow(1 / (steps - half)).nan_to_num(nan=math.inf)


def axis_limit(growth: Callable[[Tensor], Tensor], direction: complex, scan: Tensor, rounds: int = 2) -> float:
    """Largest |z| along `direction` below which no scanned point grows: a scan `(n,)`, then finer ones."""
    low, high = 0.0, math.inf
    for _ in range(1 + rounds):
        unstable = ~(growth(scan * direction) <= 1 + EXCESS)
        if not unstable.any():
            return math.inf if high == math.inf else float(scan[-1])
        first = int(unstable.int().argmax())
        low, high = (float(scan[first - 1]) if first else low), float(scan[first])
        scan = torch.linspace(low, high, 66, dtype=scan.dtype)[1:]
    return (low + high) / 2 if low else 0.0


def limits(variant: Variant, one_step: bool, quick: bool) -> tuple[float, float]:
    """The limits on the negative real and on the imaginary axis."""
    real, imaginary = (limit(variant, one_step, direction, quick) for direction in (-1.0, 1j))
    return real, imaginary


def limit(variant: Variant, one_step: bool, direction: complex, quick: bool) -> float:
    """The limit along one direction: for multistep methods a rough one from few steps first, then one from many."""
    scan = torch.logspace(-3.3, math.log10(FARTHEST), 100 if quick else 300, dtype=torch.float64)
    if one_step:
        return axis_limit(partial(step_factor, variant.method), direction, scan, rounds=3)
    rough = axis_limit(partial(growth_of_steps, variant, steps=SHORT), direction, scan, rounds=0)
    if not 0 < rough < math.inf:
        return rough
    near = rough * torch.linspace(0.85, 1.15, 40 if quick else 121, dtype=torch.float64)
    found = axis_limit(partial(growth_of_steps, variant, steps=SHORT if quick else LONG), direction, near, rounds=0)
    return found if 0 < found < near[-1] else rough


def verdict(measured: float, known: float | None) -> str:
    if known is None:
        return ""
    return "yes" if math.isclose(measured, known, rel_tol=0.01) else "NO"


def run(settings: Settings) -> Result:
    """Measure every method of fixed order, or those asked for."""
    from solvers.methods import METHODS

    torch.set_num_threads(1)
    fixed, varying = variants(settings.methods)
    if settings.quick:
        fixed = [variant for variant in fixed if not variant.options or variant.order in (2, 4)]
    table = Table("limits of linear stability, |z| = dt |lambda|", COLUMNS)
    result = Result([table])
    for variant in fixed:
        one_step = METHODS[variant.method].one_step or variant.method in PREDICTED
        real, imaginary = limits(variant, one_step, settings.quick)
        known = KNOWN.get(variant.label, (None, None))
        table.rows.append(
            {
                "method": variant.label,
                "real": real,
                "known_real": known[0],
                "imaginary": imaginary,
                "known_imaginary": known[1],
                "verdict": verdict(real, known[0]),
            }
        )
        if one_step:
            result.arrays[variant.label] = plane(variant.method, 60 if settings.quick else 140)
    table.notes.append(f"unstable: |y| grows by more than {EXCESS:g} a step; unbounded: up to |z| = {FARTHEST:g}")
    if varying:
        table.notes.append(f"order and step vary, so there is no limit to measure: {', '.join(varying)}")
    return result


def plane(method: str, points: int) -> tuple[Tensor, Tensor, Tensor]:
    """Real parts `(points,)`, imaginary parts `(points,)` and |R| `(points, points)` on a grid of the plane."""
    reach = 8.0 if method in ("dopri8", "dop853") else 5.0
    real = torch.linspace(-reach, 0.5 * reach, points, dtype=torch.float64)
    imaginary = torch.linspace(-0.8 * reach, 0.8 * reach, points, dtype=torch.float64)
    z = torch.complex(*torch.meshgrid(real, imaginary, indexing="xy"))
    return real, imaginary, step_factor(method, z.reshape(-1)).view(points, points)


def draw(result: Result, path: Path) -> None:
    """One panel a one-step method: |R(z)| where it is below 1, and its border."""
    from .pictures import figure, save

    count = max(1, len(result.arrays))
    columns = min(4, count)
    drawn, axes = figure(
        math.ceil(count / columns), columns, figsize=(3 * columns, 3 * math.ceil(count / columns)), squeeze=False
    )
    for panel in axes.flat[len(result.arrays) :]:
        panel.axis("off")
    for panel, (label, (real, imaginary, factor)) in zip(axes.flat, result.arrays.items()):
        size = factor.clamp(max=2).numpy()
        panel.contourf(real, imaginary, size, levels=[0, 0.2, 0.4, 0.6, 0.8, 1], cmap="viridis")
        panel.contour(real, imaginary, size, levels=[1], colors="black", linewidths=0.8)
        panel.axhline(0, color="gray", linewidth=0.4)
        panel.axvline(0, color="gray", linewidth=0.4)
        panel.set_title(label, fontsize=9)
        panel.set_aspect("equal")
    save(drawn, path)


BENCHMARKS.add(
    "stability",
    Benchmark(
        "stability",
        "limits on the real and imaginary axis, pictures of |R(z)|",
        "1 min",
        "20 s",
        run,
        draw,
        takes_peers=False,
    ),
)
