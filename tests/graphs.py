"""What the tests of graphops share: backends that are here, awkward graphs, and dense references."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

import graphops
from graphops.backends import BACKENDS

needs = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
    for name in ("torch_scatter", "torch_geometric", "networkx", "triton")
}

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
MARKS = {"scatter": [needs["torch_scatter"]], "triton": [needs["triton"], pytest.mark.cuda, no_cuda]}
EACH_BACKEND = [pytest.param(name, marks=MARKS.get(name, [])) for name in BACKENDS]

EDGES = torch.tensor([[1, 2, 0, 0, 4, 4, 2, 5, 4, 5, 2], [3, 0, 1, 2, 2, 2, 4, 4, 5, 5, 0]])
"""Unsorted, with parallel edges (4 -> 2 and 2 -> 0), a loop (5 -> 5) and a node, 6, without any edge."""


def awkward(dtype: torch.dtype | None = None) -> graphops.Graph:
    weight = None if dtype is None else torch.linspace(0.5, 2, EDGES.shape[1], dtype=dtype)
    return graphops.Graph(EDGES, 7, weight)


def random_graph(nodes: int, edges: int, seed: int = 0) -> graphops.Graph:
    generator = torch.Generator().manual_seed(seed)
    return graphops.Graph(torch.randint(nodes, (2, edges), generator=generator), nodes)


def dense(graph: graphops.Graph, weights: Tensor) -> Tensor:
    """The matrix with w_e added at (target, source)."""
    matrix = weights.new_zeros(graph.num_targets, graph.num_sources)
    return matrix.index_put((graph.target, graph.source), weights, accumulate=True)


def by_segment(index: Tensor, values: Tensor, size: int, reduce, empty: float) -> Tensor:
    """``reduce`` of the rows of each segment, one after the other."""
    rows = [values[index == i] for i in range(size)]
    return torch.stack([reduce(row) if len(row) else values.new_full(values.shape[1:], empty) for row in rows])
