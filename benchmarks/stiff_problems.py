"""The problems of the stiff suite: chemistry, oscillators, reaction and diffusion, from 2 unknowns to a million."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sparse
import torch
from torch import Tensor

from . import references
from .brusselator import Brusselator
from .diffusion import PeriodicDiffusion
from .problems import DiffusionProblem, terrain, thesis_line
from .registry import Registry

__all__ = ["LARGE", "STIFF", "Heat", "StiffProblem"]

STIFF: Registry[Callable[[], StiffProblem]] = Registry("problem of the stiff suite")
LARGE = ("diff1d_4096", "heat2d_316", "heat3d_100")
"""Run with --full, or by name."""


@dataclass(frozen=True)
class StiffProblem(DiffusionProblem):
    """A problem that is solved at several tolerances, and how its error is told.

    ``ratio``: atol / rtol. ``floor``: None, for fields of one kind of quantity, whose error is the worst over outputs of
    max |y - ref| / max |ref|; else the error is the largest |y - ref| / (|ref| + floor) of all components. ``mild``: an
    explicit method gets through in bearable time. ``real``: the spectrum lies near the negative real axis. ``solvers``: the
    only ones that are run (None: all that can).
    """

    ratio: float = 1e-2
    floor: float | None = None
    mild: bool = False
    real: bool = False
    solvers: tuple[str, ...] | None = None

    def at(self, tolerance: float) -> StiffProblem:
        """The same at relative tolerance ``tolerance``."""
        return replace(self, rtol=tolerance, atol=tolerance * self.ratio)

    def single(self) -> StiffProblem:
        """The same in single precision."""
        return replace(self, y0=self.y0.float())

    def error(self, y: Tensor) -> float | None:
        if self.reference is None:
            return None
        reference = self.reference.flatten(1)
        difference = (y.to(reference).flatten(1) - reference).abs()
        size = reference.abs()
        size = size.amax(1, keepdim=True) if self.floor is None else size + self.floor
        return float((difference / size).max())


def made(
    name: str, title: str, field: Any, y0: Tensor, times: tuple[float, ...], reference: Tensor | None = None, **more: Any
) -> StiffProblem:
    """A problem at 1e-5, with its stored reference where none is given."""
    notes: tuple[str, ...] = ("reference: closed form",)
    y0 = y0.double()
    if reference is None:
        reference, notes = stored(name, y0, len(times) - 1)
    more = {"steps": (), "budget": 10.0, "notes": notes, **more}
    return StiffProblem(name, title, field, y0, times, reference, rtol=0.0, atol=0.0, **more).at(1e-5)


def stored(name: str, y0: Tensor, outputs: int) -> tuple[Tensor | None, tuple[str, ...]]:
    """The stored solution ``(outputs, *y0.shape)``, and a line on how it was made."""
    found = references.load(name)
    if found is None or not found.belongs_to(y0) or found.y.numel() != outputs * y0.numel():
        return None, (f"no reference is stored for this start: python -m benchmarks.make_references {name}",)
    return found.y.reshape(outputs, *y0.shape), (f"reference: {found.facts['made']}; {found.facts['confirmed']}",)


# -- small systems ----------------------------------------------------------------------------------------------------


def robertson() -> StiffProblem:
    """Robertson's reaction of three species (Hairer & Wanner II, IV.1), to t = 1e5."""

    def field(t: Any, y: Tensor) -> Tensor:
        a, b, c = y.unbind(-1)
        r1, r2, r3 = 0.04 * a, 1e4 * b * c, 3e7 * b * b
        return torch.stack([r2 - r1, r1 - r2 - r3, r3], -1)

    start = torch.tensor([1.0, 0.0, 0.0])
    return made("robertson", "Robertson, 3 species", field, start, (0.0, 1.0, 1e3, 1e5), ratio=1e-6, floor=1e-12)


def van_der_pol() -> StiffProblem:
    """Van der Pol's oscillator with mu = 1000, to t = 2000: slow drifts and jumps (Hairer & Wanner II, IV.1)."""

    def field(t: Any, y: Tensor) -> Tensor:
        x, v = y.unbind(-1)
        return torch.stack([v, 1000.0 * (1 - x * x) * v - x], -1)

    start, times = torch.tensor([2.0, 0.0]), (0.0, 500.0, 1500.0, 2000.0)
    return made("vdp1000", "Van der Pol, mu = 1000", field, start, times, ratio=1e-3, floor=1e-12)


def hires() -> StiffProblem:
    """High irradiance response, 8 species (Schäfer 1975; Hairer & Wanner II, IV.10)."""

    def field(t: Any, y: Tensor) -> Tensor:
        a, b, c, d, e, f, g, h = y.unbind(-1)
        fh = 280.0 * f * h
        return torch.stack(
            [
                -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
                1.71 * a - 8.75 * b,
                -10.03 * c + 0.43 * d + 0.035 * e,
                8.32 * b + 1.71 * c - 1.12 * d,
                -1.745 * e + 0.43 * f + 0.43 * g,
                -fh + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
                fh - 1.81 * g,
                1.81 * g - fh,
            ],
            -1,
        )

    start, times = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0.0057], dtype=torch.float64), (0.0, 1.0, 50.0, 321.8122)
    return made("hires", "HIRES, 8 species", field, start, times, ratio=1e-4, floor=1e-12)


def oregonator() -> StiffProblem:
    """The Belousov-Zhabotinskii reaction as three species (Field & Noyes 1974; Hairer & Wanner II, IV.10)."""

    def field(t: Any, y: Tensor) -> Tensor:
        a, b, c = y.unbind(-1)
        first = 77.27 * (b + a * (1 - 8.375e-6 * a - b))
        return torch.stack([first, (c - (1 + a) * b) / 77.27, 0.161 * (a - c)], -1)

    start, times = torch.tensor([1.0, 2.0, 3.0]), (0.0, 30.0, 200.0, 360.0)
    return made("orego", "Oregonator, 3 species", field, start, times, ratio=1e-6, floor=1e-12)


def e5() -> StiffProblem:
    """Pyrolysis, 4 species of which three stay below 1e-9 (Enright, Hull & Lindberg 1975, E5; Hairer & Wanner II, IV.10)."""

    def field(t: Any, y: Tensor) -> Tensor:
        a, b, c, d = y.unbind(-1)
        r1, r2, r3, r4 = 7.89e-10 * a, 1.1e7 * a * c, 1.13e9 * b * c, 1.13e3 * d
        return torch.stack([-r1 - r2, r1 - r3, r1 - r2 - r3 + r4, r2 - r4], -1)

    start = torch.tensor([1.76e-3, 0.0, 0.0, 0.0], dtype=torch.float64)
    # Later y2 - y3 - y4 = 0 holds to rounding only, which decides what y2 and y3 are.
    times = (0.0, 1e1, 1e3, 1e5, 1e7)
    return made("e5", "E5, 4 species", field, start, times, ratio=1e-20, floor=1e-15)


# Reactions of air pollution: rate, and what goes in and comes out, as numbers of species from 1.
REACTIONS: tuple[tuple[float, tuple[int, ...], tuple[int, ...]], ...] = (
    (0.35, (1,), (2, 3)),
    (26.6, (2, 4), (1,)),
    (1.23e4, (5, 2), (6, 1)),
    (8.6e-4, (7,), (5, 5, 8)),
    (8.2e-4, (7,), (8,)),
    (1.5e4, (7, 6), (5, 8)),
    (1.3e-4, (9,), (5, 8, 10)),
    (2.4e4, (9, 6), (11,)),
    (1.65e4, (11, 2), (10, 1, 12)),
    (9e3, (11, 1), (13,)),
    (0.022, (13,), (11, 1)),
    (1.2e4, (10, 2), (14, 1)),
    (1.88, (14,), (7, 5)),
    (1.63e4, (1, 6), (15,)),
    (4.8e6, (3,), (4,)),
    (3.5e-4, (4,), (16,)),
    (0.0175, (4,), (3,)),
    (1e8, (16,), (6, 6)),
    (4.44e11, (16,), (3,)),
    (1.24e3, (17, 6), (18, 5)),
    (2.1, (19,), (2,)),
    (5.78, (19,), (1, 3)),
    (0.0474, (1, 4), (19,)),
    (1.78e3, (19, 1), (20,)),
    (3.12, (20,), (1, 19)),
)


def pollution() -> StiffProblem:
    """Air pollution, 25 reactions of 20 species (Verwer 1994, SIAM J. Sci. Comput. 15, 1243-1250), to t = 60 min."""
    balance = torch.zeros(20, len(REACTIONS), dtype=torch.float64)
    for j, (_, consumed, produced) in enumerate(REACTIONS):
        for i in consumed:
            balance[i - 1, j] -= 1
        for i in produced:
            balance[i - 1, j] += 1
    rates = torch.tensor([rate for rate, _, _ in REACTIONS], dtype=torch.float64)
    first = torch.tensor([consumed[0] - 1 for _, consumed, _ in REACTIONS])
    pairs = torch.tensor([j for j, (_, consumed, _) in enumerate(REACTIONS) if len(consumed) > 1])
    second = torch.tensor([consumed[1] - 1 for _, consumed, _ in REACTIONS if len(consumed) > 1])

    def field(t: Any, y: Tensor) -> Tensor:
        one = torch.ones(len(REACTIONS), dtype=y.dtype).index_put((pairs,), y[second])
        return balance.to(y.dtype) @ (rates.to(y.dtype) * y[first] * one)

    start = torch.zeros(20, dtype=torch.float64)
    for species, value in {2: 0.2, 4: 0.04, 7: 0.1, 8: 0.3, 9: 0.01, 17: 0.007}.items():
        start[species - 1] = value
    return made("pollution", "air pollution, 20 species", field, start, (0.0, 1.0, 10.0, 60.0), ratio=1e-6, floor=1e-6)


# -- reaction and diffusion -------------------------------------------------------------------------------------------


class Line(PeriodicDiffusion):
    """The thesis' line as a linear field."""

    symmetric = True

    def matvec(self, y: Tensor) -> Tensor:
        return self(None, y)  # type: ignore[arg-type]


def line(points: int) -> StiffProblem:
    """Linear diffusion on a periodic line of ``points`` with spacing 1 / (points - 1) (Xia 2023, section 5.4.1)."""
    place = torch.linspace(0, 1, points, dtype=torch.float64)
    start = torch.exp(-place.square() / 2) / math.sqrt(2 * math.pi)
    diffusion, times = Line(1 / (points - 1)), thesis_line().times
    exact = diffusion.exact(start, torch.tensor(times[1:], dtype=torch.float64))
    small = points <= 128
    return made(
        f"diff1d_{points}", f"diffusion on a line, {points} points", diffusion, start, times, exact, mild=small, real=True,
        budget=90.0, steps=(1000, 2000) if small else (),
        solvers=None if small else ("prox_bdf", "rkc2", "auto", "cvode-gmres", "cvode-gmres200"),
    )  # fmt: skip


@dataclass(frozen=True)
class Heat:
    """Linear diffusion in the unit cube of ``dimensions``, ``cells`` unknowns along each, 0 on its faces.

    Working memory of a call: the result.
    """

    cells: int
    dimensions: int = 2
    symmetric = True

    @property
    def stiffness(self) -> float:
        return float((self.cells + 1) ** 2)

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        change, inner = y * (-2.0 * self.dimensions), self.cells - 1
        for axis in range(self.dimensions):
            change.narrow(axis, 1, inner).add_(y.narrow(axis, 0, inner))
            change.narrow(axis, 0, inner).add_(y.narrow(axis, 1, inner))
        return change.mul_(self.stiffness)

    def matvec(self, y: Tensor) -> Tensor:
        return self(None, y)

    def sparsity(self) -> Any:
        one, ring = sparse.eye_array(self.cells), sparse.diags_array([1.0, 1.0, 1.0], offsets=[-1, 0, 1], shape=(self.cells,) * 2)
        total = 0
        for axis in range(self.dimensions):
            factor = ring if axis == 0 else one
            for other in range(1, self.dimensions):
                factor = sparse.kron(factor, ring if axis == other else one)
            total = total + factor
        return sparse.csc_matrix(total)

    def exact(self, y0: Tensor, times: Tensor) -> Tensor:
        """Solution at ``times`` ``(T,)``: the Laplacian is diagonal in the sines."""
        k = torch.arange(1, self.cells + 1, dtype=y0.dtype)
        sines = torch.sin(math.pi * torch.outer(k, k) / (self.cells + 1)) * math.sqrt(2 / (self.cells + 1))
        decay = (2 * torch.cos(math.pi * k / (self.cells + 1)) - 2) * self.stiffness
        found = []
        for t in times:
            y = y0
            for _ in range(self.dimensions):  # each takes the first axis to the last
                change = (sines * torch.exp(t * decay)) @ sines
                y = torch.tensordot(y, change, ([0], [0]))
            found.append(y)
        return torch.stack(found)


def heat(cells: int) -> StiffProblem:
    """Heat on a square of ``cells`` x ``cells``, from a bump and noise."""
    field = Heat(cells)
    place = torch.arange(1, cells + 1, dtype=torch.float64) / (cells + 1)
    x, y = torch.meshgrid(place, place, indexing="ij")
    noise = torch.randn(cells, cells, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.exp(-100 * ((x - 0.3) ** 2 + (y - 0.4) ** 2)) + 0.1 * noise
    times = (0.0, 0.001, 0.01, 0.1)
    exact = field.exact(start, torch.tensor(times[1:], dtype=torch.float64))
    small = cells <= 128
    return made(
        f"heat2d_{cells}", f"heat on a square, {cells} x {cells}", field, start, times, exact, mild=small, real=True,
        budget=90.0, steps=(100, 400) if small else (),
        solvers=None if small else ("prox_bdf", "rkc2", "auto", "cvode-gmres"),
    )  # fmt: skip


def cube(cells: int = 100) -> StiffProblem:
    """Heat in a cube of a million unknowns, from a bump and noise, single precision."""
    field = Heat(cells, 3)
    place = torch.arange(1, cells + 1, dtype=torch.float64) / (cells + 1)
    x, y, z = torch.meshgrid(place, place, place, indexing="ij")
    noise = torch.randn(cells, cells, cells, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.exp(-50 * ((x - 0.3) ** 2 + (y - 0.4) ** 2 + (z - 0.5) ** 2)) + 0.05 * noise
    times = (0.0, 0.001, 0.01, 0.05)
    exact = field.exact(start, torch.tensor(times[1:], dtype=torch.float64))
    return made(
        f"heat3d_{cells}", f"heat in a cube, {cells} x {cells} x {cells}, float32", field, start, times, exact, real=True,
        budget=240.0, notes=("reference: closed form",), solvers=("prox_bdf", "rkc2"),
    ).single()  # fmt: skip


@dataclass(frozen=True)
class AllenCahn:
    """u' = width**2 Lap u + u - u**3, periodic on [-1, 1]**2: minus the gradient of ``energy``, over the area of a cell."""

    cells: int = 128
    width: float = 0.1

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        neighbours = y.roll(1, 0) + y.roll(-1, 0) + y.roll(1, 1) + y.roll(-1, 1)
        return (neighbours - 4 * y) * (self.width * self.cells / 2) ** 2 + y - y**3

    def energy(self, t: Any, y: Tensor) -> Tensor:
        square = sum(((y.roll(1, axis) - y) * (self.width * self.cells / 2)).square().sum() for axis in (0, 1))
        return square / 2 + ((y * y - 1).square() / 4).sum()

    def sparsity(self) -> Any:
        n = self.cells
        ring = sparse.diags_array([1.0] * 5, offsets=[1 - n, -1, 0, 1, n - 1], shape=(n, n))
        one = sparse.eye_array(n)
        return sparse.csc_matrix(sparse.kron(ring, one) + sparse.kron(one, ring))


def allen_cahn() -> StiffProblem:
    """Allen-Cahn on 128 x 128 cells: phases separate, then their borders move by curvature."""
    field = AllenCahn()
    place = -1 + torch.arange(field.cells, dtype=torch.float64) * (2 / field.cells)
    x, y = torch.meshgrid(place, place, indexing="ij")
    noise = torch.randn(field.cells, field.cells, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = 0.05 * noise + 0.3 * torch.sin(2 * math.pi * x) * torch.cos(math.pi * y)
    times = (0.0, 0.1, 1.0, 10.0)
    return made(
        "allencahn_128", "Allen-Cahn, 128 x 128", field, start, times, mild=True, real=True, budget=60.0, steps=(100, 400)
    )


@dataclass(frozen=True)
class CahnHilliard:
    """u' = Lap (u**3 - u - width**2 Lap u), periodic on [-1, 1]**2 (Cahn & Hilliard 1958): the mean of u is conserved.

    The largest rate is width**2 (8 / h**2)**2. The Jacobian is a product of two symmetric matrices: not symmetric, with a
    real spectrum.
    """

    cells: int = 64
    width: float = 0.1

    def laplacian(self, y: Tensor) -> Tensor:
        neighbours = y.roll(1, 0) + y.roll(-1, 0) + y.roll(1, 1) + y.roll(-1, 1)
        return (neighbours - 4 * y) * (self.cells / 2) ** 2

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        return self.laplacian(y**3 - y - self.width**2 * self.laplacian(y))

    def sparsity(self) -> Any:
        once = AllenCahn(self.cells).sparsity()
        return sparse.csc_matrix(once @ once)


def cahn_hilliard() -> StiffProblem:
    """Cahn-Hilliard on 64 x 64 cells: a mixture separates into drops, then the small ones feed the large."""
    field = CahnHilliard()
    noise = torch.randn(field.cells, field.cells, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    times = (0.0, 0.05, 0.2, 1.0)
    return made(
        "cahnhilliard_64", "Cahn-Hilliard, 64 x 64", field, 0.2 + 0.1 * noise, times, real=True, budget=20.0, steps=(400,)
    )


@dataclass(frozen=True)
class Burgers:
    """u' = viscosity u_xx - (u**2 / 2)_x on (0, 1), u = 0 at its ends, central differences in conservative form."""

    cells: int = 256
    viscosity: float = 0.01

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        wide = torch.nn.functional.pad(y, (1, 1))
        middle = (wide[1:] + wide[:-1]) / 2
        flux = (wide[1:] - wide[:-1]) * (self.viscosity * (self.cells + 1)) - middle * middle / 2
        return (flux[1:] - flux[:-1]) * (self.cells + 1)


def burgers() -> StiffProblem:
    """Burgers' equation with 256 unknowns: a wave steepens into a front, which runs into the border and decays."""
    field = Burgers()
    x = torch.arange(1, field.cells + 1, dtype=torch.float64) / (field.cells + 1)
    start = torch.sin(2 * math.pi * x) + 0.5 * torch.sin(math.pi * x)
    return made("burgers_256", "Burgers, 256 unknowns", field, start, (0.0, 0.2, 1.0, 4.0), mild=True, steps=(200, 800))


@dataclass(frozen=True)
class BrusselatorLine:
    """u' = 1 + u^2 v - 4 u + a u_xx, v' = 3 u - u^2 v + a v_xx on (0, 1), u = 1 and v = 3 at its ends, state ``(cells, 2)``
    (Hairer & Wanner II, IV.10, BRUSS)."""

    cells: int = 500
    diffusion: float = 0.02

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        u, v = y.unbind(1)
        reaction = u * u * v
        change = torch.stack([1.0 + reaction - 4.0 * u, 3.0 * u - reaction], 1)
        border = torch.tensor([[1.0, 3.0]], dtype=y.dtype, device=y.device)
        wide = torch.cat([border, y, border])
        return change + (wide[2:] - 2 * y + wide[:-2]) * (self.diffusion * (self.cells + 1) ** 2)

    def start(self) -> Tensor:
        x = torch.arange(1, self.cells + 1, dtype=torch.float64) / (self.cells + 1)
        return torch.stack([1 + torch.sin(2 * math.pi * x), torch.full_like(x, 3.0)], 1)

    def sparsity(self) -> Any:
        ring = sparse.diags_array([1.0, 1.0, 1.0], offsets=[-1, 0, 1], shape=(self.cells,) * 2)
        return sparse.csc_matrix(sparse.kron(ring, np.eye(2)) + sparse.kron(sparse.eye_array(self.cells), np.ones((2, 2))))


def brusselator_line() -> StiffProblem:
    """The Brusselator with diffusion on a line, 500 points."""
    field = BrusselatorLine()
    times = (0.0, 1.0, 4.0, 10.0)
    return made("bruss1d_500", "Brusselator on a line, 1000 unknowns", field, field.start(), times, real=True, steps=(400, 1600))


def brusselator_square() -> StiffProblem:
    """The Brusselator with diffusion on 64 x 64 cells, periodic."""
    field = Brusselator(64)
    times = (0.0, 1.0, 5.0, 11.5)
    return made("bruss2d_64", "Brusselator on a square, 8192 unknowns", field, field.start(), times, real=True)


def hillslope() -> StiffProblem:
    """1e8 years of nonlinear hillslope diffusion of a real terrain, 172 x 200 cells."""
    found = terrain()
    return made(
        "terrain", found.title, found.field, found.y0, found.times, found.reference, ratio=100.0, real=True,
        steps=(20, 100), notes=found.notes[1:],
    )  # fmt: skip


for _name, _build in {
    "robertson": robertson,
    "hires": hires,
    "orego": oregonator,
    "vdp1000": van_der_pol,
    "e5": e5,
    "pollution": pollution,
    "diff1d_128": lambda: line(128),
    "heat2d_128": lambda: heat(128),
    "allencahn_128": allen_cahn,
    "cahnhilliard_64": cahn_hilliard,
    "burgers_256": burgers,
    "bruss1d_500": brusselator_line,
    "bruss2d_64": brusselator_square,
    "terrain": hillslope,
    "diff1d_4096": lambda: line(4096),
    "heat2d_316": lambda: heat(316),
    "heat3d_100": cube,
}.items():
    STIFF.add(_name, _build)
