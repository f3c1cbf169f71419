"""Diffusions of GRAND to solve and to train: Cora, and a simulated graph of the size of CoauthorCS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from graphops import Graph, spmm
from graphops.data import Split, random_split
from graphops.fields import EdgeAttention, LinearDiffusion, NonlinearDiffusion

from .graph_problems import citation_data, communities, community_of, tidy
from .registry import BenchmarkError, known_names

__all__ = ["END", "GRAPHS", "GrandProblem", "Model", "chosen", "relative", "rms", "sharpened", "within"]

END = 10.0
"""Time to which the thesis solves (Xia 2023, section 5.4.3)."""


@dataclass(frozen=True)
class GrandProblem:
    """Nodes with words, labels and a split, and the sizes and the training of the model.

    `graph`: a loop at each node. `words`: from words to the nodes that have them, so that an encoder is a sparse product.
    `optimiser`: of `torch.optim`, with its `training` settings.
    """

    name: str
    graph: Graph
    words: Graph
    y: Tensor
    split: Split
    hidden: int
    dim: int
    heads: int
    optimiser: str = "Adamax"
    training: Mapping[str, float] = field(default_factory=lambda: {"lr": 0.0229, "weight_decay": 0.005})
    input_dropout: float = 0.5
    dropout: float = 0.05


def cora() -> GrandProblem:
    """Largest component, random split, and sizes of GRAND's own model."""
    data = citation_data("cora")
    if data.y is None:
        raise BenchmarkError("this Cora has no labels y: take cora_planetoid.npz or the original files whole")
    split = random_split(data.y, generator=torch.Generator().manual_seed(0))
    return GrandProblem("Cora", tidy(data.graph), data.features, data.y, split, 80, 128, 8)


def simulated(name: str, nodes: int, pairs: int, groups: int, vocabulary: int, each: int, **sizes: Any) -> GrandProblem:
    """Communities whose nodes have `each` words: a third drawn from those of the community, the others from all."""
    y = community_of(nodes, groups)
    random = np.random.default_rng(1)
    own = random.dirichlet(np.full(vocabulary, 0.05), groups)
    common = random.dirichlet(np.full(vocabulary, 0.3))
    words = np.empty((nodes, each), np.int64)
    for group in range(groups):
        shares = 0.35 * own[group] + 0.65 * common
        words[y == group] = random.choice(vocabulary, (int((y == group).sum()), each), p=shares / shares.sum())
    pairs_of = np.stack([words.ravel(), np.repeat(np.arange(nodes), each)])
    distinct = Graph(torch.from_numpy(np.unique(pairs_of, axis=1)), (vocabulary, nodes))
    labels = torch.from_numpy(y)
    development = nodes // 4
    per_class = min(20, int(torch.bincount(labels[:development]).min()) // 3)
    split = random_split(labels, per_class, development, torch.Generator().manual_seed(0))
    graph = communities(nodes, pairs, groups)
    return GrandProblem(name, graph, distinct, labels, split, **sizes)


def coauthor_like() -> GrandProblem:
    """18,333 nodes, 81,894 pairs, 6,805 words, 15 classes, with the sizes of GRAND's model for CoauthorCS."""
    training = {"lr": 0.005, "weight_decay": 0.0047}
    return simulated(
        "CS-like", 18_333, 81_894, 15, 6_805, 60, hidden=16, dim=8, heads=4, optimiser="RMSprop", training=training, dropout=0.5
    )


def tiny() -> GrandProblem:
    """For a run that only shows that it works."""
    return simulated("tiny", 150, 400, 3, 40, 8, hidden=8, dim=8, heads=2)


GRAPHS: dict[str, Callable[[], GrandProblem]] = {"cora": cora, "cs-like": coauthor_like, "tiny": tiny}


def chosen(names: str, quick: bool) -> list[GrandProblem]:
    """The problems in a comma-separated list, the tiny one alone for `quick`; raises BenchmarkError."""
    return [GRAPHS[name]() for name in (("tiny",) if quick else known_names("graph", GRAPHS, names))]


class Model(nn.Module):
    """Encoder, du/dt = A(u) u - u, decoder; the solve in between is the caller's. Queries and keys start at 1e-5, as GRAND's."""

    def __init__(self, problem: GrandProblem, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.problem = problem
        self.encoder = nn.Linear(problem.words.num_sources, problem.hidden)
        self.attention = EdgeAttention(problem.hidden, dim=problem.dim, heads=problem.heads)
        self.decoder = nn.Linear(problem.hidden, int(problem.y.max()) + 1)

    def encode(self) -> Tensor:
        """The state at the start, `(n, hidden)`."""
        words = self.problem.words
        present = torch.ones(words.num_edges, dtype=self.encoder.bias.dtype)
        present = dropout(present, self.problem.input_dropout, self.training)
        return spmm(words, present, self.encoder.weight.t().contiguous()) + self.encoder.bias

    def field(self, x: Tensor, linear: bool) -> LinearDiffusion | NonlinearDiffusion:
        """With A of the state; or, `linear`, with that of `x` throughout: GRAND-l."""
        graph = self.problem.graph
        return LinearDiffusion(graph, self.attention(graph, x)) if linear else NonlinearDiffusion(graph, self.attention)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(dropout(z.relu(), self.problem.dropout, self.training))


def rms(x: Tensor) -> float:
    return float(x.detach().square().mean().sqrt())


def within(x: Tensor, tolerance: float) -> dict[str, float]:
    """A tolerance relative to the size of the state, whatever the encoder makes that."""
    return {"rtol": tolerance, "atol": tolerance * rms(x)}


def relative(y: Tensor, reference: Tensor, scale: Tensor | None = None) -> float:
    """|y - reference| / |scale| in the Euclidean norm of all numbers, `scale` being the reference unless given."""
    scale = reference if scale is None else scale
    return float((y.double() - reference.double()).norm() / scale.double().norm())


@torch.no_grad()
def sharpened(model: Model, x: Tensor, spread: float = 1.5) -> Model:
    """The model with queries and keys of deviation `spread` at `x`: attention far from uniform, which moves with the state."""
    scale = spread / (model.problem.hidden**0.5 * rms(x))
    generator = torch.Generator().manual_seed(1)
    for linear in (model.attention.query, model.attention.key):
        linear.weight.copy_(scale * torch.randn(linear.weight.shape, generator=generator))
    return model
