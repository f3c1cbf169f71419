"""Graphs to time kernels on: one of a citation data set where it is at hand, and random ones of the size of larger sets."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from graphops import Graph
from graphops.data import WHERE, NodeData, read_planetoid
from graphops.errors import MissingDataError

from .registry import BenchmarkError

__all__ = [
    *("DATA", "GRAPHS", "allocator", "citation", "citation_data", "communities", "community_of"),
    *("made", "quick_graphs", "tidy"),
]

DATA = "PROXODE_DATA"
"""The environment variable that names the folder of data sets, `<folder>/cora/cora_planetoid.npz` and so on."""


@dataclass(frozen=True)
class GraphProblem:
    """A graph with a loop at each node, edges sorted by target; features are `width` numbers.

    `repeats` rounds of timing, of `calls` in a row: where the graph fits a cache, a solver finds it there, while a single call
    after the garbage collection of a round does not.
    """

    build: Callable[[], Graph]
    width: int = 64
    repeats: int = 5
    operators: tuple[str, ...] | None = None
    calls: int = 1


def citation_data(name: str, component: bool = True) -> NodeData:
    """The largest component of a Planetoid data set (or all of it), without loops, from the folder that PROXODE_DATA names."""
    folder = os.environ.get(DATA)
    if folder is None:
        raise BenchmarkError(f"set {DATA} to the folder that holds {name}/{name}_planetoid.npz, or the original files: {WHERE}")
    try:
        whole = read_planetoid(folder, name)
    except MissingDataError as error:
        raise BenchmarkError(f"{name} is not there: {error}; {DATA} names another folder") from error
    return whole.largest_component() if component else whole


def citation(name: str) -> Graph:
    """Its graph alone, with loops."""
    return tidy(citation_data(name).graph)


def tidy(graph: Graph) -> Graph:
    return graph.remove_self_loops().add_self_loops().coalesce()


def drawn(random: np.random.Generator, weights: np.ndarray, count: int) -> np.ndarray:
    """`count` nodes with probabilities in proportion to `weights`."""
    cumulative = np.cumsum(weights)
    return np.minimum(np.searchsorted(cumulative, random.random(count) * cumulative[-1]), len(weights) - 1)


def distinct(random: np.random.Generator, nodes: int, edges: int, draw: Callable[[int], np.ndarray]) -> Graph:
    """A graph of `edges` different edges, none a loop, out of those that `draw(count)` gives as pairs `(2, count)`."""
    keys = np.empty(0, np.int64)
    while len(keys) < edges:
        source, target = draw(int(1.2 * (edges - len(keys))) + 10)
        keys = np.unique(np.concatenate([keys, (source * nodes + target)[source != target]]))
    keys = random.permutation(keys)[:edges]
    return Graph(torch.from_numpy(np.stack([keys // nodes, keys % nodes])), nodes)


def power_law(nodes: int, edges: int, seed: int = 0) -> Graph:
    """Directed: in-degrees with a tail of exponent 2.6, out-degrees lognormal, numbers without order, as of citations."""
    random = np.random.default_rng(seed)
    cited = np.minimum(random.pareto(1.6, nodes) + 1, 5000)
    citing = random.lognormal(0, 0.8, nodes)
    return tidy(distinct(random, nodes, edges, lambda count: np.stack([drawn(random, w, count) for w in (citing, cited)])))


def members(random: np.random.Generator, nodes: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Expected degree and community of each place, and the number of the node there."""
    degree = random.lognormal(0, 0.7, nodes)
    return degree, np.sort(random.integers(groups, size=nodes)), random.permutation(nodes)


def community_of(nodes: int, groups: int, seed: int = 0) -> np.ndarray:
    """The community of each node of `communities` with the same arguments."""
    _, group, numbers = members(np.random.default_rng(seed), nodes, groups)
    found = np.empty(nodes, np.int64)
    found[numbers] = group
    return found


def communities(nodes: int, pairs: int, groups: int, seed: int = 0) -> Graph:
    """Undirected, degrees lognormal; four pairs of five within one of `groups` communities, as of authors."""
    random = np.random.default_rng(seed)
    degree, group, numbers = members(random, nodes, groups)
    cumulative = np.concatenate([[0.0], np.cumsum(degree)])
    bounds = cumulative[np.searchsorted(group, np.arange(groups + 1))]

    def draw(count: int) -> np.ndarray:
        source = drawn(random, degree, count)
        inside = random.random(count) < 0.8
        low = np.where(inside, bounds[group[source]], 0.0)
        high = np.where(inside, bounds[group[source] + 1], cumulative[-1])
        target = np.searchsorted(cumulative, low + random.random(count) * (high - low), side="right") - 1
        ends = numbers[np.stack([source, np.minimum(target, nodes - 1)])]
        return np.sort(ends, axis=0)

    return tidy(distinct(random, nodes, pairs, draw).to_undirected())


def many_edges(nodes: int, edges: int, seed: int = 0) -> Graph:
    """As `power_law`, parallel edges left in: at ten million edges sorting them out would take longer than the timing."""
    random = np.random.default_rng(seed)
    cited = np.minimum(random.pareto(1.6, nodes) + 1, 5000)
    pairs = np.stack([random.integers(nodes, size=edges), drawn(random, cited, edges)])
    return Graph(torch.from_numpy(pairs), nodes).sort()


GRAPHS: dict[str, GraphProblem] = {
    "Cora": GraphProblem(lambda: citation("cora"), repeats=15, calls=50),
    "CS-like": GraphProblem(lambda: communities(18_333, 81_894, 15), repeats=15),
    "arxiv-like": GraphProblem(lambda: power_law(169_343, 1_166_243), repeats=5),
    "power law": GraphProblem(lambda: many_edges(1_000_000, 10_000_000), 16, 1, ("softmax", "spmm")),
}


def quick_graphs() -> dict[str, GraphProblem]:
    """Small ones that show that it works."""
    return {
        "CS-like": GraphProblem(lambda: communities(1_000, 4_000, 5), repeats=3),
        "arxiv-like": GraphProblem(lambda: power_law(2_000, 14_000), repeats=3),
    }


@cache
def made(name: str) -> Graph:
    """The graph called `name`, built once."""
    return GRAPHS[name].build()


def allocator() -> str:
    """How large blocks of memory come, as far as the environment says: page faults decide what large results cost."""
    keys = ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE", "LD_PRELOAD")
    return ", ".join(f"{key}={os.environ[key]}" for key in keys if os.environ.get(key)) or "default"
