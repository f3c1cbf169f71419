"""Images as graphs of patches, diffused (Chamberlain et al. 2021, Fig. 4): attention against a Laplacian; Perona and Malik."""

from __future__ import annotations

import gzip
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import graphops
from graphops import Graph
from graphops.fields import EdgeAttention, LinearDiffusion, NonlinearDiffusion, laplacian_diffusion
from solvers import solve

from .graph_problems import DATA
from .registry import BENCHMARKS, Benchmark, BenchmarkError, Column, Option, Result, Settings, Table, installed, positive
from .timing import one_thread

__all__ = ["Patches", "adjacent", "cut", "drawn_digits", "mnist", "run"]

END, STEP = 4.8, 0.8
"""Six layers, as in the paper."""
PATCHES = 100
INK = 0.5
"""Grey level above which a patch is the number and not the background."""
NOISE = 0.2
CONTRAST = 0.15
"""Of Perona and Malik: the slope above which an edge stays."""
TIMES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)
SHOWN = 3

FIGURE = [
    Column("field", "field"),
    Column("accuracy", "unseen patches right, %", "number"),
    Column("contrast", "contrast kept, %", "number"),
    Column("moved", "rms change", "number"),
    Column("across", "weight across the outline, %", "number"),
]
DENOISED = [
    Column("t", "t, pixels^2", "number"),
    Column("heat", "heat: rms error", "number"),
    Column("perona", "Perona-Malik: rms error", "number"),
    Column("heat_edges", "heat: outline kept, %", "number"),
    Column("perona_edges", "Perona-Malik: outline kept, %", "number"),
]


# --- images ----------------------------------------------------------------------------------------------------------


def mnist(count: int) -> np.ndarray:
    """The first test images, `(count, 28, 28)` in grey levels [0, 1]; raises BenchmarkError where they are not."""
    name, raw = "mnist_t10k/mnist_t10k.npz", "mnist_t10k/t10k-images-idx3-ubyte.gz"
    remedy = f"{raw} is the file of that name of LeCun, Cortes and Burges's MNIST; {name} has it as array images (n, 28, 28)"
    folder = os.environ.get(DATA)
    if folder is None:
        raise BenchmarkError(f"set {DATA} to the folder that holds {name} or {raw}: {remedy}")
    if (Path(folder) / name).is_file():
        with np.load(Path(folder) / name, allow_pickle=False) as stored:
            return stored["images"][:count] / 255
    if (Path(folder) / raw).is_file():
        values = np.frombuffer(gzip.decompress((Path(folder) / raw).read_bytes()), np.uint8, offset=16)
        return values.reshape(-1, 28, 28)[:count] / 255
    raise BenchmarkError(f"neither {name} nor {raw} is in {folder}: {remedy}")


def drawn_digits() -> np.ndarray:
    """A nought and a one, for a run that only shows that it works, `(2, 28, 28)`."""
    rows, columns = np.mgrid[:28, :28] - 13.5
    ring = np.clip(3.0 - abs(np.hypot(rows, columns) - 8), 0, 1)
    bar = np.clip(3.0 - abs(columns), 0, 1) * (abs(rows) < 10)
    return np.stack([ring, bar])


# --- patches ---------------------------------------------------------------------------------------------------------


def cut(image: np.ndarray, way: str) -> np.ndarray:
    """The number of each pixel's patch, from 0: by SLIC (Achanta et al. 2012), or 2 x 2 squares."""
    if way == "slic":
        from skimage.segmentation import slic

        labels = slic(image, n_segments=PATCHES, compactness=0.1, channel_axis=None, start_label=0)
    else:
        rows, columns = np.indices(image.shape) // 2
        labels = rows * ((image.shape[1] + 1) // 2) + columns
    return np.unique(labels, return_inverse=True)[1].reshape(image.shape)


def adjacent(labels: np.ndarray) -> Graph:
    """Patches that share a side of a pixel joined both ways, and a loop at each."""
    sides = [(labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])]
    pairs = np.concatenate([np.stack([a.ravel(), b.ravel()]) for a, b in sides], 1)
    pairs = np.unique(pairs[:, pairs[0] != pairs[1]], axis=1)
    graph = Graph(torch.from_numpy(pairs), int(labels.max()) + 1)
    return graph.to_undirected().add_self_loops().sort()


@dataclass(frozen=True)
class Patches:
    """All images as one graph: grey level of each patch `(n, 1)`, and `labels` of each image's pixels, numbered throughout."""

    graph: Graph
    x: Tensor
    labels: np.ndarray

    @property
    def ink(self) -> Tensor:
        """Which patches are the number."""
        return (self.x[:, 0] > INK).float()

    def painted(self, y: Tensor) -> np.ndarray:
        """Grey levels of patches as pixels."""
        return y[:, 0].numpy()[self.labels]


def patches(images: np.ndarray, way: str) -> Patches:
    """Every image cut, side by side."""
    labels = [cut(image, way) for image in images]
    graph = Graph.batch([adjacent(one) for one in labels])
    counts = np.array([one.max() + 1 for one in labels])
    numbered = np.stack(labels) + (counts.cumsum() - counts)[:, None, None]
    sums = np.bincount(numbered.ravel(), images.ravel())
    means = sums / np.bincount(numbered.ravel())
    return Patches(graph.sort(), torch.from_numpy(means).float().unsqueeze(1), numbered)


# --- Fig. 4 ----------------------------------------------------------------------------------------------------------


class Classifier(nn.Module):
    """Diffusion of the grey levels in six Euler steps, then a threshold that is learned."""

    def __init__(self, graph: Graph, attention: EdgeAttention | None) -> None:
        super().__init__()
        self.graph, self.attention = graph, attention
        self.slope, self.middle = nn.Parameter(torch.tensor(5.0)), nn.Parameter(torch.tensor(0.5))

    def field(self) -> LinearDiffusion | NonlinearDiffusion:
        return laplacian_diffusion(self.graph) if self.attention is None else NonlinearDiffusion(self.graph, self.attention)

    def diffused(self, x: Tensor) -> Tensor:
        return solve(self.field(), x, [0.0, END], method="euler", dt=STEP).y[-1]

    def logits(self, y: Tensor) -> Tensor:
        return self.slope * (y[:, 0] - self.middle)


def learned(data: Patches, seen: Tensor, attention: bool, epochs: int) -> Classifier:
    """Trained on the patches that are `seen`."""
    torch.manual_seed(0)
    model = Classifier(data.graph, EdgeAttention(1, dim=8, heads=1) if attention else None)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(epochs):
        optimiser.zero_grad()
        logits = model.logits(model.diffused(data.x))
        binary_cross_entropy_with_logits(logits[seen], data.ink[seen]).backward()
        optimiser.step()
    return model


@torch.no_grad()
def judged(name: str, data: Patches, model: Classifier, seen: Tensor) -> dict[str, Any]:
    """What is left of the image, and of the weights what goes across the outline."""
    y, ink = model.diffused(data.x), data.ink.bool()
    right = (model.logits(y) > 0) == ink
    spread = [float(z[ink].mean() - z[~ink].mean()) for z in (data.x, y)]
    field = model.field()
    operator = field.operator(0.0, data.x) if isinstance(field, NonlinearDiffusion) else field
    across = ink[operator.graph.source] != ink[operator.graph.target]
    weight = operator.weight if operator.weight is not None else torch.ones(operator.graph.num_edges)
    outline = torch.zeros(len(ink), dtype=torch.bool)
    outline[operator.graph.target[across]] = True
    return {
        "field": name,
        "accuracy": 100 * float(right[~seen].float().mean()),
        "contrast": 100 * spread[1] / spread[0],
        "moved": float((y - data.x).square().mean().sqrt()),
        "across": 100 * float(weight[across].sum()) / int(outline.sum()),
    }


def figure_table(data: Patches, way: str, epochs: int) -> tuple[Table, dict[str, Any]]:
    """Attention and Laplacian on the same patches, half of which are seen; and the ends for the picture."""
    seen = torch.rand(len(data.x), generator=torch.Generator().manual_seed(0)) < 0.5
    models = {"nonlinear, attention": learned(data, seen, True, epochs), "Laplacian": learned(data, seen, False, epochs)}
    rows = [judged(name, data, model, seen) for name, model in models.items()]
    kind = "SLIC superpixels" if way == "slic" else "2 x 2 squares"
    title = f"{len(data.labels)} images, {len(data.x):,} patches ({kind}), T = {END:g}, {round(END / STEP)} Euler steps"
    own, other = rows
    keeps = "keeps" if own["contrast"] > 1.2 * other["contrast"] else "does NOT keep"
    notes = [
        f"{int(seen.sum())} patches train, {epochs} epochs; weight across: of A at the start, mean of patches at the outline",
        f"the paper: attention finds edges and keeps the image, the Laplacian does not; here attention {keeps} more of the "
        f"contrast, {own['contrast']:.0f} % against {other['contrast']:.0f} %",
    ]
    with torch.no_grad():
        ends = {name: data.painted(model.diffused(data.x)) for name, model in models.items()}
        weights = models["nonlinear, attention"].attention(data.graph, data.x)  # type: ignore[misc]
    return Table(title, FIGURE, rows, notes), {"ends": ends, "weights": weights}


# --- Perona and Malik ------------------------------------------------------------------------------------------------


def denoised(images: np.ndarray) -> tuple[Table, dict[str, Any]]:
    """Noisy images on the grid of pixels, by heat and by Perona and Malik's diffusion."""
    grid = Graph.grid(images.shape[1:])
    clean = torch.from_numpy(images.reshape(len(images), -1).T.copy())
    noisy = clean + NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0), dtype=clean.dtype)
    fields = {"heat": graphops.Dirichlet(grid), "perona": graphops.PeronaMalik(grid, CONTRAST)}
    with torch.no_grad():
        states = {}
        for key, field in fields.items():
            times = torch.tensor(TIMES, dtype=torch.float64)
            # One image at a time: the energy's conductance is that of all features of an edge together.
            one = [solve(field, noisy[:, i], times, method="rkc2", rtol=1e-3, atol=1e-4).y for i in range(noisy.shape[1])]
            states[key] = torch.stack(one, -1)
        steep = outline(grid, clean)
        rows = []
        for place, t in enumerate(TIMES):
            row: dict[str, Any] = {"t": t}
            for key, y in states.items():
                row[key] = float((y[place] - clean).square().mean().sqrt())
                row[f"{key}_edges"] = 100 * float(jumps(grid, y[place], clean)[steep].mean())
            rows.append(row)
    best = {key: min(row[key] for row in rows) for key in fields}
    notes = [
        f"noise of deviation {NOISE:g}; contrast {CONTRAST:g}; outline kept: differences across steep edges, of the clean ones",
        f"least rms error: heat {best['heat']:.3f}, Perona-Malik {best['perona']:.3f}",
    ]
    title = f"{len(images)} noisy images on the grid of {images.shape[1]} x {images.shape[2]} pixels"
    pictures = {key: y[3, :, 0].numpy().reshape(images.shape[1:]) for key, y in states.items()}
    pictures["noisy"] = noisy[:, 0].numpy().reshape(images.shape[1:])
    return Table(title, DENOISED, rows, notes), pictures


def outline(grid: Graph, clean: Tensor) -> Tensor:
    """Edges and images where the grey level jumps."""
    return (clean[grid.source] - clean[grid.target]).abs() > 0.5


def jumps(grid: Graph, y: Tensor, clean: Tensor) -> Tensor:
    """Differences along edges, over those of the clean images."""
    before, after = (z[grid.source] - z[grid.target] for z in (clean, y))
    return after / torch.where(before == 0, torch.inf, before)


# --- the benchmark ---------------------------------------------------------------------------------------------------


def run(settings: Settings) -> Result:
    """Cut, train, diffuse; raises BenchmarkError without the images."""
    one_thread(settings, "image-diffusion runs on the CPU")
    images = drawn_digits() if settings.quick else mnist(settings.options["images"])
    way = "slic" if settings.options["patches"] == "slic" and installed("skimage") else "squares"
    data = patches(images, way)
    table, arrays = figure_table(data, way, 20 if settings.quick else 150)
    if way != settings.options["patches"]:
        table.notes.append('squares in place of superpixels: scikit-image is not installed, pip install "proxode[bench]"')
    second, pictures = denoised(images)
    return Result([table, second], {}, {"data": data, "images": images, "pictures": pictures, **arrays})


def draw(result: Result, path: Path) -> None:
    """A row an image: as it is, patches and attention, both ends; below, a noisy one, heat and Perona and Malik."""
    from .pictures import figure, save

    data, images = result.arrays["data"], result.arrays["images"]
    shown = min(SHOWN, len(images))
    drawn, axes = figure(shown + 1, 4, figsize=(8, 2 * (shown + 1)), squeeze=False)
    grey = {"cmap": "gray", "vmin": 0, "vmax": 1}
    for place, line in enumerate(axes[:shown]):
        ends = list(result.arrays["ends"].items())
        line[0].imshow(images[place], **grey)
        show_edges(line[1], data, place, result.arrays["weights"])
        for panel, (name, end) in zip(line[2:], ends):
            panel.imshow(end[place], **grey)
            panel.set_title(name, fontsize=8)
        line[0].set_title("image", fontsize=8)
        line[1].set_title("patches; attention", fontsize=8)
    pictures = result.arrays["pictures"]
    names = {"noisy": "noisy", "heat": "heat, t = 2", "perona": "Perona-Malik, t = 2"}
    for panel, (key, title) in zip(axes[-1], names.items()):
        panel.imshow(pictures[key], **grey)
        panel.set_title(title, fontsize=8)
    for panel in axes.ravel():
        panel.set_axis_off()
    save(drawn, path)


def show_edges(axes: Any, data: Patches, place: int, weights: Tensor) -> None:
    """Patches in grey, and lines between them as thick as the attention that they pay each other."""
    from matplotlib.collections import LineCollection

    labels = data.labels[place]
    axes.imshow(data.painted(data.x)[place], cmap="gray", vmin=0, vmax=1)
    rows, columns = np.indices(labels.shape)
    first, count = labels.min(), np.bincount(labels.ravel() - labels.min())
    centres = np.stack([np.bincount(labels.ravel() - first, z.ravel()) / count for z in (columns, rows)], 1)
    source, target = data.graph.source.numpy() - first, data.graph.target.numpy() - first
    inside = (source != target) & (source >= 0) & (source < len(count))
    share = weights.numpy()[inside] / weights.max().item()
    ends = np.stack([centres[source[inside]], centres[target[inside]]], 1)
    axes.add_collection(LineCollection(list(ends), linewidths=2 * share, array=share, cmap="autumn"))


BENCHMARKS.add(
    "image-diffusion",
    Benchmark(
        "image-diffusion",
        "superpixels of digits diffused with attention and with a Laplacian; Perona-Malik (GRAND, Fig. 4)",
        "1 min",
        "5 s",
        run,
        draw,
        takes_peers=False,
        options=(
            Option("images", "how many of the MNIST test images", 20, positive),
            Option("patches", "slic, with scikit-image, or squares", "slic", choices=("slic", "squares")),
        ),
    ),
)
