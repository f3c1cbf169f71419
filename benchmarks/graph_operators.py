"""What is timed on a graph: each operator as ours and as others write it, on the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

import graphops
from graphops import Graph

from .registry import installed

__all__ = ["HEADS", "OPERATORS", "Operator", "attention_step", "gathered_attention_step", "gathered_spmm"]

HEADS = 4

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Operator:
    """One operator: its operands, the bytes it moves if no row is read twice from a cache, and who computes it.

    `others` gives name -> function of (graph, *operands), and in `forward_only` those whose backward is not to be run.
    """

    operands: Callable[[Graph, int], list[Tensor]]
    traffic: Callable[[Graph, int], float]
    ours: Function
    others: dict[str, Function] = field(default_factory=dict)
    forward_only: frozenset[str] = frozenset()

    def implementations(self) -> dict[str, Function]:
        """Ours on each backend that is here, then the others whose package is."""
        found: dict[str, Function] = {}
        for backend in ("native", "plain", "scatter"):
            if backend != "scatter" or installed("torch_scatter"):
                found[f"graphops, {backend}"] = on_backend(backend, self.ours)
        needs = {"torch_scatter": "torch_scatter", "PyG": "torch_geometric", "authors": "torch_scatter"}
        for name, function in self.others.items():
            package = next((package for start, package in needs.items() if name.startswith(start)), "torch")
            if installed(package):
                found[name] = function
        return found


def on_backend(name: str, function: Function) -> Function:
    def call(*operands: Any) -> Tensor:
        with graphops.backend(name):
            return function(*operands)

    return call


# --- segment reductions: four numbers an edge, as of four heads -------------------------------------------------------


def at_edges(graph: Graph, width: int) -> list[Tensor]:
    return [torch.randn(graph.num_edges, HEADS, generator=torch.Generator().manual_seed(0))]


def edge_traffic(graph: Graph, width: int) -> float:
    return 4.0 * HEADS * graph.num_edges


def by_torch_scatter(name: str) -> Function:
    def call(graph: Graph, values: Tensor) -> Tensor:
        import torch_scatter

        function = getattr(torch_scatter, f"scatter_{name}")
        out = function(values, graph.target, dim=0, dim_size=graph.num_nodes)
        return out[0] if isinstance(out, tuple) else out

    return call


def by_segment_csr(name: str) -> Function:
    def call(graph: Graph, values: Tensor) -> Tensor:
        import torch_scatter

        return torch_scatter.segment_csr(values, graph.incoming.pointers, reduce=name)

    return call


def pyg_softmax(graph: Graph, values: Tensor) -> Tensor:
    from torch_geometric.utils import softmax

    return softmax(values, ptr=graph.incoming.pointers)


def index_add(graph: Graph, values: Tensor) -> Tensor:
    return values.new_zeros(graph.num_targets, *values.shape[1:]).index_add(0, graph.target, values)


def reduction(name: str, **others: Function) -> Operator:
    known = {f"torch_scatter.scatter_{name}": by_torch_scatter(name)}
    if name in ("sum", "mean", "max"):
        known["torch_scatter.segment_csr"] = by_segment_csr(name)
    ours = getattr(graphops, "prod" if name == "mul" else name)
    # Second derivatives of segment_csr are wrong for sums and not there for maxima.
    return Operator(at_edges, edge_traffic, ours, known | others, frozenset({"torch_scatter.segment_csr"}))


# --- products --------------------------------------------------------------------------------------------------------


def weights_and(rows: int, graph: Graph, width: int) -> list[Tensor]:
    """A weight for each edge, and values ``(rows, width)``."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(graph.num_edges, generator=generator), torch.randn(rows, width, generator=generator)]


def weighted(graph: Graph, width: int) -> list[Tensor]:
    return weights_and(graph.num_sources, graph, width)


def spmm_traffic(graph: Graph, width: int) -> float:
    return 4.0 * (graph.num_edges * (width + 2) + graph.num_targets * width)


def gathered_spmm(graph: Graph, weights: Tensor, x: Tensor) -> Tensor:
    return index_add(graph, x.index_select(0, graph.source) * weights.unsqueeze(-1))


def scattered_spmm(graph: Graph, weights: Tensor, x: Tensor) -> Tensor:
    import torch_scatter

    messages = x.index_select(0, graph.source) * weights.unsqueeze(-1)
    return torch_scatter.scatter_add(messages, graph.target, dim=0, dim_size=graph.num_targets)


def sparse_spmm(graph: Graph, weights: Tensor, x: Tensor) -> Tensor:
    neighbours, pointers = graph.pattern.blocks()
    shape = graph.num_targets, graph.num_sources
    return torch.sparse_csr_tensor(pointers, neighbours, weights, shape, check_invariants=False) @ x


@cache
def pyg_layer() -> Any:
    """PyG's sum of weighted messages, built once: it generates code of its own then."""
    from torch_geometric.nn import SimpleConv

    return SimpleConv(aggr="add")


def pyg_spmm(graph: Graph, weights: Tensor, x: Tensor) -> Tensor:
    return pyg_layer()(x, graph.edge_index, weights)


def two_at_nodes(graph: Graph, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(graph.num_sources, width, generator=generator) for _ in range(2)]


def sddmm_traffic(graph: Graph, width: int) -> float:
    return 4.0 * graph.num_edges * (2 * width + 2)


def gathered_sddmm(graph: Graph, q: Tensor, k: Tensor) -> Tensor:
    return (q.index_select(0, graph.target) * k.index_select(0, graph.source)).sum(-1)


# --- one step of attention: scores of all heads, softmax, their mean, product ----------------------------------------


def three_at_nodes(graph: Graph, width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(graph.num_sources, width, generator=generator) for _ in range(3)]


def attention_traffic(graph: Graph, width: int) -> float:
    return sddmm_traffic(graph, width) + 2 * edge_traffic(graph, width) + spmm_traffic(graph, width)


ATTENTION = graphops.Attention("dot_product", heads="mean")


def heads_of(x: Tensor) -> Tensor:
    return x.view(x.shape[0], HEADS, -1)


def attention_step(graph: Graph, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    return ATTENTION(graph, heads_of(q), heads_of(k), x)


def gathered_attention_step(graph: Graph, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    """Gathers, `scatter_reduce` for the maximum, `index_add` for sums: torch alone, as one writes it first."""
    scale = (HEADS / q.shape[1]) ** 0.5
    scores = (heads_of(q.index_select(0, graph.target)) * heads_of(k.index_select(0, graph.source))).sum(-1) * scale
    index = graph.target.unsqueeze(1).expand_as(scores)
    top = scores.new_full((graph.num_nodes, HEADS), -torch.inf).scatter_reduce(0, index, scores.detach(), "amax")
    powers = (scores - top.index_select(0, graph.target)).exp()
    shares = powers / index_add(graph, powers).index_select(0, graph.target)
    return gathered_spmm(graph, shares.mean(1), x)


def authors_shares(index: Tensor, size: int, scores: Tensor, squareplus: bool = False) -> Tensor:
    """Scores ``(E, H)`` over their sums, softmax or squareplus, as graph-neural-pde computes them: sums by torch-scatter."""
    import torch_scatter

    if squareplus:
        powers = (scores + (scores**2 + 4).sqrt()) / 2
    else:
        top = torch_scatter.scatter(scores.detach(), index, dim=0, dim_size=size, reduce="max")
        powers = (scores - top.index_select(0, index)).exp()
    total = torch_scatter.scatter(powers, index, dim=0, dim_size=size, reduce="sum") + 1e-16
    return powers / total.index_select(0, index)


def authors_scores(graph: Graph, q: Tensor, k: Tensor) -> Tensor:
    """Scores ``(E, H)`` as there, of ``(n, H, F)``: advanced indexing, heads last."""
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    return (q[graph.target, :, :] * k[graph.source, :, :]).sum(1) / q.shape[1] ** 0.5


def authors_attention_step(graph: Graph, q: Tensor, k: Tensor, x: Tensor) -> Tensor:
    scores = authors_scores(graph, heads_of(q), heads_of(k))
    return scattered_spmm(graph, authors_shares(graph.target, graph.num_targets, scores).mean(1), x)


# --- calculus --------------------------------------------------------------------------------------------------------


def one_at_nodes(graph: Graph, width: int) -> list[Tensor]:
    return [torch.randn(graph.num_sources, width, generator=torch.Generator().manual_seed(0))]


def gradient_traffic(graph: Graph, width: int) -> float:
    return 4.0 * graph.num_edges * (3 * width + 2)


def gathered_gradient(graph: Graph, x: Tensor) -> Tensor:
    return x.index_select(0, graph.source) - x.index_select(0, graph.target)


def flow_at_edges(graph: Graph, width: int) -> list[Tensor]:
    return weights_and(graph.num_edges, graph, width)


def divergence(graph: Graph, weights: Tensor, flow: Tensor) -> Tensor:
    return graphops.divergence(graph, flow, weights)


def summed_divergence(graph: Graph, weights: Tensor, flow: Tensor) -> Tensor:
    return index_add(graph, weights.unsqueeze(-1) * flow)


def scattered_divergence(graph: Graph, weights: Tensor, flow: Tensor) -> Tensor:
    import torch_scatter

    return torch_scatter.scatter_add(weights.unsqueeze(-1) * flow, graph.target, dim=0, dim_size=graph.num_targets)


@cache
def laplacian_of(graph: Graph) -> graphops.GraphOperator:
    return graphops.laplacian_operator(graph, "random_walk")


def laplacian(graph: Graph, x: Tensor) -> Tensor:
    return laplacian_of(graph).matvec(x)


def laplacian_function(graph: Graph, x: Tensor) -> Tensor:
    return graphops.laplacian(graph, x, "random_walk")


def gathered_laplacian(graph: Graph, x: Tensor) -> Tensor:
    degree = graph.degree().clamp(min=1).to(x.dtype).unsqueeze(1)
    return -index_add(graph, gathered_gradient(graph, x)) / degree


OPERATORS: dict[str, Operator] = {
    "sum": reduction("sum", index_add=index_add),
    "mean": reduction("mean"),
    "max": reduction("max"),
    "prod": reduction("mul"),
    "std": reduction("std"),
    "logsumexp": reduction("logsumexp"),
    "softmax": reduction("softmax", **{"PyG softmax": pyg_softmax}),
    "spmm": Operator(
        weighted,
        spmm_traffic,
        graphops.spmm,
        {
            "gather, index_add": gathered_spmm,
            "torch_scatter.scatter_add": scattered_spmm,
            "torch.sparse CSR": sparse_spmm,
            "PyG MessagePassing": pyg_spmm,
        },
        frozenset({"torch.sparse CSR"}),  # its gradient to the values is a dense (n, n)
    ),
    "sddmm": Operator(two_at_nodes, sddmm_traffic, graphops.sddmm, {"gather": gathered_sddmm}),
    "attention": Operator(
        three_at_nodes,
        attention_traffic,
        attention_step,
        {"gather, scatter_reduce": gathered_attention_step, "authors' form": authors_attention_step},
    ),
    "gradient": Operator(one_at_nodes, gradient_traffic, graphops.gradient, {"gather": gathered_gradient}),
    "divergence": Operator(
        flow_at_edges,
        spmm_traffic,
        divergence,
        {"index_add": summed_divergence, "torch_scatter.scatter_add": scattered_divergence},
    ),
    "laplacian": Operator(
        one_at_nodes,
        spmm_traffic,
        laplacian,
        {"graphops.laplacian": laplacian_function, "gather, index_add": gathered_laplacian},
    ),
}
