"""Graphs with features, labels and a split of their nodes, read from files that cannot run code."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError, MissingDataError, MissingPackageError, unknown_name
from .graph import Graph
from .pickles import checked_csr, read_pickle

__all__ = ["NodeData", "Split", "example", "random_split", "read_arrays", "read_edges", "read_npz", "read_planetoid"]

EXAMPLES = {
    "karate_club": ("karate_club_graph", "club"),
    "davis_southern_women": ("davis_southern_women_graph", "bipartite"),
    "florentine_families": ("florentine_families_graph", None),
    "les_miserables": ("les_miserables_graph", None),
}
"""Generator in networkx, and the attribute of nodes that serves as label."""

PLANETOID: dict[str, type] = {
    **dict.fromkeys(("x", "tx", "allx"), csr_array),
    **dict.fromkeys(("y", "ty", "ally", "test.index"), np.ndarray),
    "graph": dict,
}
WHERE = "the files ind.*.{x,tx,allx,y,ty,ally,graph,test.index} are in the folder data of github.com/kimiyoung/planetoid"


class Split(NamedTuple):
    """Which nodes train, validate and test: masks ``(n,)``, disjoint; a node may be in none."""

    train: Tensor
    val: Tensor
    test: Tensor


@dataclass(frozen=True, eq=False)
class NodeData:
    """A graph whose nodes have features ``x`` ``(n, F)`` float32 and labels ``y`` ``(n,)`` int64, -1 where unknown.

    ``split`` is the fixed one that came with the data. What the file does not hold is None.
    """

    graph: Graph
    x: Tensor | None = None
    y: Tensor | None = None
    split: Split | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return 0 if self.y is None or self.y.numel() == 0 else int(self.y.max()) + 1

    @cached_property
    def features(self) -> Graph:
        """The non-zero features as a bipartite graph, from features to nodes, weighted by their values.

        With ``f = data.features``, ``spmm(f, f.weight, theta)`` is ``x @ theta`` at the cost of the non-zeros alone.
        """
        if self.x is None:
            raise ArgumentError("this data has no features x: give it some, dataclasses.replace(data, x=...)")
        node, feature = self.x.nonzero().unbind(1)
        return Graph(torch.stack([feature, node]), (self.x.shape[1], self.x.shape[0]), self.x[node, feature])

    def subgraph(self, nodes: Tensor) -> NodeData:
        """The ``nodes``, a mask or numbers, with the edges among them; see ``Graph.subgraph``."""
        split = None if self.split is None else Split(*(mask[nodes] for mask in self.split))
        x, y = (None if part is None else part[nodes] for part in (self.x, self.y))
        return NodeData(self.graph.subgraph(nodes), x, y, split)

    def largest_component(self) -> NodeData:
        """The largest weakly connected component, as most results on citation graphs are stated for it; check which ones."""
        return self.subgraph(self.graph.largest_component()[1])

    def to(self, device: torch.device | str) -> NodeData:
        """The same on another device."""
        split = None if self.split is None else Split(*(mask.to(device) for mask in self.split))
        x, y = (None if part is None else part.to(device) for part in (self.x, self.y))
        return NodeData(self.graph.to(device), x, y, split)


def random_split(
    y: Tensor, per_class: int = 20, development: int = 1500, generator: torch.Generator | None = None
) -> Split:
    """``per_class`` training nodes of each class out of ``development`` random nodes, the rest of these to validate.

    All other nodes test; those without label (-1) do nothing. ``generator`` is one of the CPU. Raises ``ArgumentError`` where
    there are not so many nodes, in all or in a class. Source: Gasteiger, Weissenberger & Guennemann 2019 (GDC), and after
    them the random splits of GRAND.
    """
    if y.dim() != 1 or y.is_floating_point():
        raise ArgumentTypeError(f"y must be labels (n,) of an integer dtype, not {y.dtype} of shape {tuple(y.shape)}")
    labels = y.cpu()
    known = (labels >= 0).nonzero()[:, 0]
    if not 0 < development <= len(known):
        raise ArgumentError(f"development = {development}: choose from 1 to {len(known)}, the nodes with a label")
    chosen = known[torch.randperm(len(known), generator=generator)]
    masks = torch.zeros(3, len(labels), dtype=torch.bool)
    masks[1, chosen[:development]] = True
    masks[2, chosen[development:]] = True
    for label in labels[known].unique().tolist():
        nodes = chosen[:development][labels[chosen[:development]] == label][:per_class]
        if len(nodes) < per_class:
            raise ArgumentError(
                f"class {label} has {len(nodes)} of the {development} development nodes, fewer than per_class = {per_class}: "
                "take more development nodes, or less of each class"
            )
        masks[0, nodes] = True
    masks[1] &= ~masks[0]
    return Split(*masks.to(y.device))


# --- files -----------------------------------------------------------------------------------------------------------


def present(path: str | Path, remedy: str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise MissingDataError(f"{path} is not there: {remedy}")
    return path


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of an ``.npz`` by name; arrays of Python objects are refused, as reading them would run code.

    Raises ``MissingDataError`` if the file is absent, ``ArgumentError`` if it is no such archive.
    """
    path = present(path, "give the path of an .npz file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, AttributeError) as error:
        raise ArgumentError(f"{path} is not an .npz of numbers: {error}") from error


def read_npz(path: str | Path) -> NodeData:
    """A graph from an ``.npz`` with ``edge_index`` ``(2, E)`` and, if there, features, labels and a split.

    Features: ``x`` ``(n, F)``, or as CSR ``x_indptr``, ``x_indices``, ``x_shape`` and ``x_data``, which is 1 if absent. Labels:
    ``y`` ``(n,)``. Split: numbers of nodes ``train_idx``, ``val_idx``, ``test_idx``. Raises as ``read_arrays``, and
    ``ArgumentError`` for arrays that do not fit together.
    """
    arrays = read_arrays(path)
    if "edge_index" not in arrays:
        raise ArgumentError(f"{path} has no edge_index; it has {', '.join(arrays)}")
    x = stored_features(arrays, path)
    y = torch.from_numpy(arrays["y"].astype(np.int64)) if "y" in arrays else None
    sizes = [len(part) for part in (x, y) if part is not None]
    nodes = sizes[0] if sizes else int(arrays["x_shape"][0]) if "x_shape" in arrays else None
    if len(set(sizes)) > 1:
        raise ArgumentError(f"{path} has features of {sizes[0]} nodes and labels of {sizes[1]}")
    graph = Graph(torch.from_numpy(arrays["edge_index"].astype(np.int64)), nodes)
    numbers = [arrays.get(f"{part}_idx") for part in Split._fields]
    split = None if any(n is None for n in numbers) else split_of(numbers, graph.num_sources)
    return NodeData(graph, x, y, split)


def stored_features(arrays: Mapping[str, np.ndarray], path: str | Path) -> Tensor | None:
    """Features of an archive, dense float32."""
    if "x" in arrays:
        return torch.from_numpy(arrays["x"].astype(np.float32))
    if "x_indptr" not in arrays:
        return None
    indices = arrays["x_indices"].astype(np.int64)
    data = arrays.get("x_data", np.ones(len(indices), np.float32))
    try:
        matrix = checked_csr(data, indices, arrays["x_indptr"].astype(np.int64), arrays["x_shape"])
    except (ValueError, KeyError) as error:
        raise ArgumentError(f"{path}: x_indptr, x_indices and x_shape are no CSR matrix: {error}") from error
    return torch.from_numpy(matrix.toarray().astype(np.float32))


def split_of(numbers: Any, nodes: int) -> Split:
    """Masks of numbers of nodes."""
    masks = torch.zeros(3, nodes, dtype=torch.bool)
    for mask, part, name in zip(masks, numbers, Split._fields):
        if len(part) and not 0 <= part.min() <= part.max() < nodes:
            raise ArgumentError(f"{name} has nodes from {part.min()} to {part.max()}, outside [0, {nodes})")
        mask[torch.from_numpy(part.astype(np.int64))] = True
    return Split(*masks)


def read_edges(
    path: str | Path, num_nodes: int | None = None, *, directed: bool = True, delimiter: str | None = None, comments: str = "#"
) -> Graph:
    """A graph from lines ``source target`` or ``source target weight``; nodes are numbers from 0, kept as they are.

    ``directed=False`` adds the other direction of each edge. ``delimiter``: white space if None. Raises ``MissingDataError``,
    and ``ArgumentError`` with the row for what is no such line.
    """
    path = present(path, "give the path of a text file of edges")
    try:
        with warnings.catch_warnings():  # an empty file is a graph without edges
            warnings.simplefilter("ignore", UserWarning)
            table = np.loadtxt(path, delimiter=delimiter, comments=comments, ndmin=2)
    except ValueError as error:
        raise ArgumentError(f"{path}: {error}") from error
    if table.size and table.shape[1] not in (2, 3):
        raise ArgumentError(f"{path} has {table.shape[1]} columns: source, target and, if any, weight are read")
    ends = table[:, :2] if table.size else np.empty((0, 2))
    odd = np.flatnonzero((ends != np.floor(ends)).any(1) | (ends < 0).any(1))
    if odd.size:
        raise ArgumentError(f"{path}: edge {odd[0]} is {ends[odd[0]].tolist()}; nodes are numbers 0, 1, 2, ...")
    weight = torch.from_numpy(table[:, 2]) if table.size and table.shape[1] == 3 else None
    graph = Graph(torch.from_numpy(ends.T.astype(np.int64)), num_nodes, weight)
    return graph if directed else graph.to_undirected()


def read_planetoid(folder: str | Path, name: str) -> NodeData:
    """Cora, CiteSeer or PubMed (``name`` in lower case) with the split of Yang et al. 2016 from ``folder`` or ``folder/name``.

    Reads ``{name}_planetoid.npz`` (see ``read_npz``) or else the original ``ind.{name}.*``, which are pickles: they are decoded
    without being run. Edges go both ways, once, without loops; nodes that the original leaves out have features 0 and label
    -1. Raises ``MissingDataError``, saying where the files are to be had, and ``ArgumentError`` for a file that is not one.
    """
    folders = (Path(folder), Path(folder) / name)
    for place in folders:
        if (place / f"{name}_planetoid.npz").is_file():
            return read_npz(place / f"{name}_planetoid.npz")
    for place in folders:
        if (place / f"ind.{name}.graph").is_file():
            return raw_planetoid(place, name)
    looked = " or ".join(str(place) for place in folders)
    raise MissingDataError(f"neither {name}_planetoid.npz nor ind.{name}.graph is in {looked}: {WHERE}")


def raw_planetoid(folder: Path, name: str) -> NodeData:
    """From the original files, each checked by itself."""
    paths = {part: present(folder / f"ind.{name}.{part}", WHERE) for part in PLANETOID}
    parts = {part: planetoid_part(path, kind) for (part, path), kind in zip(paths.items(), PLANETOID.values())}
    try:
        return assembled(parts)
    except (ValueError, IndexError, TypeError) as error:
        raise ArgumentError(f"the files ind.{name}.* in {folder} do not fit together: {error}") from error


def planetoid_part(path: Path, kind: type) -> Any:
    """What one of the files holds."""
    try:
        if path.name.endswith("test.index"):
            return np.array(path.read_text().split(), np.int64)
        part = read_pickle(path.read_bytes())
    except (pickle.UnpicklingError, ValueError) as error:
        raise ArgumentError(f"{path} is not a file of the Planetoid data: {error}") from error
    if not isinstance(part, kind):
        raise ArgumentError(f"{path} holds a {type(part).__name__}, not a {kind.__name__}")
    return part


def assembled(parts: dict[str, Any]) -> NodeData:
    """The whole: rows of ``allx`` and ``ally`` are nodes 0, 1, ...; those of ``tx`` and ``ty`` are the nodes of test.index."""
    test = parts["test.index"]
    nodes, known, train = int(test.max()) + 1, len(parts["ally"]), len(parts["y"])
    x = np.zeros((nodes, parts["allx"].shape[1]), np.float32)
    x[:known], x[test] = parts["allx"].toarray(), parts["tx"].toarray()
    marks = np.zeros((nodes, parts["ally"].shape[1]))
    marks[:known], marks[test] = parts["ally"], parts["ty"]
    y = np.where(marks.any(1), marks.argmax(1), -1)
    pairs = [(i, j) for i, neighbours in parts["graph"].items() for j in neighbours]
    graph = Graph(torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).t(), nodes).remove_self_loops().to_undirected()
    split = split_of((np.arange(train), np.arange(train, min(train + 500, known)), test), nodes)
    return NodeData(graph, torch.from_numpy(x), torch.from_numpy(y), split)


def example(name: str) -> NodeData:
    """A small graph that comes with networkx: karate_club, davis_southern_women, florentine_families, les_miserables.

    The first two have labels ``y``. Raises ``MissingPackageError`` without networkx, ``UnknownNameError`` for another name.
    """
    if name not in EXAMPLES:
        raise unknown_name("example", name, EXAMPLES)
    try:
        import networkx
    except ImportError as error:
        raise MissingPackageError("example needs networkx: pip install networkx") from error
    generator, attribute = EXAMPLES[name]
    graph = getattr(networkx, generator)()
    y = None
    if attribute is not None:
        values = [graph.nodes[node][attribute] for node in graph]
        y = torch.from_numpy(np.unique(values, return_inverse=True)[1].astype(np.int64))
    return NodeData(Graph.from_networkx(graph), None, y)
