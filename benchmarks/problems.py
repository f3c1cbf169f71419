"""The problems of the main job: what is solved, from which start, to which outputs, and against which reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import references
from .diffusion import HillslopeDiffusion, PeriodicDiffusion, PeronaMalik
from .registry import PROBLEMS, need

__all__ = ["DiffusionProblem", "photograph", "terrain", "thesis_line"]

EARTH_RADIUS = 6_371_008.8  # m, the mean radius


@dataclass(frozen=True)
class DiffusionProblem:
    """A diffusion from `y0` over `times` (start first), its `reference` at the other times, and how errors are told.

    `reference` is `(T-1, *shape)`. With `scale` None the error is the largest |y - ref| / (|ref| + atol/rtol); else it
    is the largest |y - ref| in `unit`, and `scale` (same unit) is what a percentage refers to. `budget`: seconds that
    one solver may take.
    """

    name: str
    title: str
    field: Any
    y0: Tensor
    times: tuple[float, ...]
    reference: Tensor | None
    rtol: float
    atol: float
    steps: tuple[int, ...]
    budget: float
    unit: str = ""
    scale: float | None = None
    notes: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def unknowns(self) -> int:
        return self.y0.numel()

    def error(self, y: Tensor) -> float | None:
        """The error of `y` `(T-1, *shape)` as said above; None without a reference."""
        if self.reference is None:
            return None
        difference = (y.to(self.reference) - self.reference).abs()
        if self.scale is None:
            difference = difference / (self.reference.abs() + self.atol / self.rtol)
        return float(difference.max())

    def drift(self, y: Tensor) -> float:
        """How far the mean has moved from the start's, relative to the start's (the field conserves it)."""
        mean = float(self.y0.double().mean())
        return abs(float(y[-1].double().mean()) - mean) / abs(mean)


def thesis_line(full: bool = False) -> DiffusionProblem:
    """128 points with spacing 1/127, periodic, from the standard Gaussian density on [0, 1] (Xia 2023, Table 5.2)."""
    place = torch.linspace(0, 1, 128, dtype=torch.float64)
    start = torch.exp(-place.square() / 2) / math.sqrt(2 * math.pi)
    diffusion = PeriodicDiffusion(1 / 127)
    times = (0.0, 0.001, 0.01, 0.1, 1.0)
    exact = diffusion.exact(start, torch.tensor(times[1:], dtype=torch.float64))
    return DiffusionProblem(
        "line",
        "linear diffusion, 128 points",
        diffusion,
        start,
        times,
        exact,
        rtol=1e-5,
        atol=1e-7,
        steps=(200, 1000, 2000),
        budget=1.5,
        notes=("reference: closed form; outputs at 0.001, 0.01, 0.1, 1; error relative, the worst of all outputs",),
    )


def sample(name: str) -> Any:
    """The path of a sample file that matplotlib ships; raises MissingExtra."""
    need("matplotlib")
    from matplotlib.cbook import get_sample_data

    return get_sample_data(name, asfileobj=False)


def elevation() -> tuple[np.ndarray, tuple[float, float]]:
    """The Jacksboro fault terrain, heights `(344, 403)` in m, and its spacing between rows and columns in m."""
    with np.load(sample("jacksboro_fault_dem.npz")) as stored:
        heights = stored["elevation"].astype(np.float64)
        box = {key: float(stored[key]) for key in ("xmin", "xmax", "ymin", "ymax")}
    degree = math.pi / 180 * EARTH_RADIUS
    latitude = math.radians((box["ymin"] + box["ymax"]) / 2)
    rows = abs(box["ymax"] - box["ymin"]) / heights.shape[0] * degree
    columns = abs(box["xmax"] - box["xmin"]) / heights.shape[1] * degree * math.cos(latitude)
    return heights, (rows, columns)


def terrain(full: bool = False) -> DiffusionProblem:
    """10**8 years of hillslope diffusion of a real terrain: the middle 172 x 200 cells, or all 344 x 403."""
    heights, spacing = elevation()
    if not full:
        heights = heights[86:258, 101:301]
    start = torch.from_numpy(heights.copy())
    relief = float(start.max() - start.min())
    name = "terrain-full" if full else "terrain"
    reference, notes = stored_reference(name, start)
    notes = (f"error: the largest height difference, in m; the relief is {relief:.0f} m", *notes)
    return DiffusionProblem(
        name,
        f"hillslope diffusion, {heights.shape[0]} x {heights.shape[1]} cells, 1e8 yr",
        HillslopeDiffusion(spacing),
        start,
        (0.0, 1e8),
        reference,
        rtol=1e-5,
        atol=1e-3,
        steps=(10, 20, 50, 100),
        budget=40.0 if full else 5.0,
        unit="m",
        scale=relief,
        notes=notes,
        extra={"spacing": spacing},
    )


def grey_photograph(shrink: int = 4) -> np.ndarray:
    """The shipped portrait in grey levels [0, 1], averaged over `shrink` x `shrink` pixels."""
    path = sample("grace_hopper.jpg")
    from matplotlib.image import imread

    with open(path, "rb") as stream:
        grey = imread(stream, format="jpg")[..., :3] @ np.array([0.299, 0.587, 0.114]) / 255
    rows, columns = (n // shrink for n in grey.shape)
    return grey[: rows * shrink, : columns * shrink].reshape(rows, shrink, columns, shrink).mean((1, 3))


def photograph(full: bool = False) -> DiffusionProblem:
    """Perona-Malik denoising of a photograph, 150 x 128 pixels, noise of deviation 0.2, to t = 20 pixels**2."""
    clean = grey_photograph()
    noise = np.random.Generator(np.random.PCG64(0)).standard_normal(clean.shape)
    start = torch.from_numpy(clean + 0.2 * noise)
    reference, notes = stored_reference("photograph", start)
    notes = ("error: the largest difference in grey level, of 1", *notes)
    return DiffusionProblem(
        "photograph",
        f"Perona-Malik denoising, {clean.shape[0]} x {clean.shape[1]} pixels",
        PeronaMalik(0.02),
        start,
        (0.0, 20.0),
        reference,
        rtol=1e-3,
        atol=1e-3,
        steps=(20, 50, 100, 200),
        budget=2.0,
        unit="grey level",
        scale=1.0,
        notes=notes,
        extra={"clean": clean},
    )


def stored_reference(name: str, start: Tensor) -> tuple[Tensor | None, tuple[str, ...]]:
    """The stored solution `(1, rows, columns)` that belongs to `start`, and a line on how it was made."""
    found = references.load(name)
    if found is None:
        return None, (f"no reference is stored for {name}: python -m benchmarks.make_references {name}",)
    if not found.belongs_to(start):
        return None, (f"the stored reference belongs to another start: python -m benchmarks.make_references {name}",)
    return found.y[None], (f"reference: {found.facts['made']}; {found.facts['confirmed']}",)


Build = Callable[..., DiffusionProblem]
PROBLEMS.add("line", thesis_line)
PROBLEMS.add("terrain", terrain)
PROBLEMS.add("photograph", photograph)
