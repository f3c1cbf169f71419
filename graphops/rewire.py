"""Other edges for a graph: diffusion (GDC), the heaviest edges, two hops, nearest neighbours, random dropping.

What keeps some of a graph's edges returns them as ``(graph, edges)``: values ``(E, ...)`` on the old edges go on as
``values[edges]``. What makes new edges records no gradient.

Sources: Gasteiger, Weissenberger & Guennemann 2019 (GDC; "eq." below is theirs); Andersen, Chung & Lang 2006 (push for
PageRank); Kloster & Gleich 2014 (push for the heat kernel).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import scipy.sparse
import scipy.special
import torch
from scipy.sparse import csr_array
from torch import Tensor

from . import autograd
from .errors import ArgumentError, unknown_name
from .graph import Graph
from .segment import check_floating, check_values, gather, spmm, widened

__all__ = ["Heat", "PageRank", "diffuse", "drop_edges", "gdc", "knn", "threshold", "top_k", "transition", "two_hop"]

NORMALISATIONS = ("symmetric", "random_walk")
BASES = ("power", "chebyshev")
METRICS = ("euclidean", "cosine")
BLOCK = 128
"""Nodes whose rows of a diffusion matrix, or distances to all others, are held at once."""
ROUNDING = {torch.float32: 1e-7, torch.float64: 1e-10}
"""Error of the series behind an exact diffusion matrix, whose entries are at most 1."""
FAR = 42.0
"""exp(-42) is beyond the digits of float64: where series are cut before any tolerance is known."""


# --- transition matrices and kernels ---------------------------------------------------------------------------------


def transition(
    graph: Graph, normalisation: str = "symmetric", self_loops: float | None = 1.0, dtype: torch.dtype | None = None
) -> Graph:
    """The graph weighted as a transition matrix T, ``self_loops`` added where a node has none (None: nowhere).

    ``"symmetric"``: D^-1/2 W D^-1/2, with which ``spmm`` is the GCN's aggregation; ``"random_walk"``: D^-1 W, whose rows, the
    edges into each node, sum to 1. D adds up the weights into each node; where that is 0, T is. A graph without weights has
    ones of ``dtype`` (torch's default if None). Differentiable in the weights. Raises ``UnknownNameError``;
    ``ArgumentError`` for negative weights.
    """
    return normalised(weighted(graph, self_loops, dtype), normalisation)


def weighted(graph: Graph, self_loops: float | None, dtype: torch.dtype | None = None) -> Graph:
    """The graph with weights that are not negative, and loops."""
    graph._square("transition")
    weight = torch.ones(graph.num_edges, dtype=dtype, device=graph.device) if graph.weight is None else graph.weight
    if not autograd.hidden(weight) and not graph.is_nonnegative:
        raise ArgumentError("transition needs weights that are not below 0: take their absolute values, or drop these edges")
    graph = graph.with_weight(weight)
    return graph if self_loops is None else graph.add_self_loops(self_loops)


def normalised(graph: Graph, normalisation: str) -> Graph:
    """Weights as a transition matrix."""
    if normalisation not in NORMALISATIONS:
        raise unknown_name("normalisation", normalisation, NORMALISATIONS)
    weight, degree = cast(Tensor, graph.weight), graph.degree(weighted=True)
    if normalisation == "random_walk":
        return graph.with_weight(weight * gather(graph.incoming, inverse_power(degree, 1.0)))
    scale = inverse_power(degree, 0.5)
    return graph.with_weight(gather(graph.incoming, scale) * weight * gather(graph.outgoing, scale))


def inverse_power(degree: Tensor, power: float) -> Tensor:
    """degree^-power, 0 where it is 0, derivatives included."""
    nothing = degree == 0
    return torch.where(nothing, 0.0, torch.where(nothing, 1.0, degree).pow(-power))


@dataclass(frozen=True)
class PageRank:
    """Personalised PageRank: alpha (I - (1 - alpha) T)^-1, coefficients alpha (1 - alpha)^k; 0 < ``alpha`` < 1."""

    alpha: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ArgumentError(f"alpha = {self.alpha}: the probability of returning lies strictly between 0 and 1")

    def powers(self, tol: float) -> np.ndarray:
        """Coefficients of T^0, T^1, ..., without those that add up to ``tol``."""
        rest = 1 - self.alpha
        return up_to(self.alpha * rest ** np.arange(math.ceil(FAR / -math.log(rest))), tol)

    def chebyshev(self, tol: float) -> np.ndarray:
        """Coefficients of Chebyshev polynomials of T, of which alpha / (1 - b z) has 2 alpha rho^k / sqrt(1 - b^2)."""
        b = 1 - self.alpha
        root = math.sqrt(1 - b * b)
        rho = (1 - root) / b
        terms = 2 * self.alpha / root * rho ** np.arange(math.ceil(FAR / -math.log(rho)))
        return up_to(np.where(np.arange(len(terms)) == 0, 0.5, 1.0) * terms, tol)


@dataclass(frozen=True)
class Heat:
    """The heat kernel exp(-t (I - T)), coefficients e^-t t^k / k!; ``t`` > 0 is the time of diffusion."""

    t: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.t < math.inf:
            raise ArgumentError(f"t = {self.t}: the time of diffusion is positive and finite")

    def _orders(self) -> np.ndarray:
        return np.arange(math.ceil(self.t + 10 * math.sqrt(self.t) + FAR))

    def powers(self, tol: float) -> np.ndarray:
        """Coefficients of T^0, T^1, ..., without those that add up to ``tol``."""
        order = self._orders()
        return up_to(np.exp(order * math.log(self.t) - self.t - scipy.special.gammaln(order + 1)), tol)

    def chebyshev(self, tol: float) -> np.ndarray:
        """Coefficients of Chebyshev polynomials of T: 2 e^-t I_k(t), with modified Bessel functions."""
        order = self._orders()
        return up_to(scipy.special.ive(order, self.t) * np.where(order == 0, 1, 2), tol)


Kernel = PageRank | Heat | Sequence[float] | Tensor
"""A kernel, or its coefficients of T^0, T^1, ...; as a tensor they may be learned, in ``diffuse``."""


def up_to(terms: np.ndarray, tol: float) -> np.ndarray:
    """The first of ``terms``, without those that add up to ``tol``."""
    rest = np.cumsum(terms[::-1])[::-1]
    return terms[: max(1, int((rest > tol).sum()))]


def coefficients(kernel: Kernel, basis: str, tol: float) -> Any:
    """Coefficients of the powers, or of the Chebyshev polynomials, of T."""
    if basis not in BASES:
        raise unknown_name("basis", basis, BASES)
    if not 0 < tol < 1:
        raise ArgumentError(f"tol = {tol}: what may be left out of a sum of 1 lies strictly between 0 and 1")
    if isinstance(kernel, (PageRank, Heat)):
        return (kernel.powers if basis == "power" else kernel.chebyshev)(tol).tolist()
    if basis == "chebyshev":
        raise ArgumentError("basis 'chebyshev' is for PageRank and Heat; coefficients of powers go with basis 'power'")
    if isinstance(kernel, str) or len(kernel) == 0:
        raise ArgumentError(f"kernel = {kernel!r}: give PageRank(alpha), Heat(t), or coefficients of T^0, T^1, ...")
    return kernel


def diffuse(graph: Graph, kernel: Kernel, x: Tensor, *, basis: str = "power", tol: float = 1e-6) -> Tensor:
    """sum_k theta_k T^k x with T the weights of ``graph``, by products with T alone: ``(n, ...) -> (n, ...)``.

    ``transition`` gives T. ``tol``: what the coefficients left out may add up to, so the error relative to x where no row of
    T sums to more than 1. ``basis="chebyshev"`` needs about a third of the products, and a T whose eigenvalues are real and
    in [-1, 1], as those of every transition matrix of a symmetric graph are. Differentiable in ``x``, the weights, and
    coefficients given as a tensor.
    """
    theta = coefficients(kernel, basis, tol)
    if graph.weight is None:
        raise ArgumentError("diffuse needs the weights of a transition matrix: diffuse(transition(graph), ...)")
    check_values(x, graph._square("diffuse"), graph.device, "x", "n, nodes")
    total = theta[0] * x
    for factor, term in zip(theta[1:], terms(graph, basis, x)):
        total = total + factor * term
    return total


def terms(graph: Graph, basis: str, x: Tensor) -> Iterator[Tensor]:
    """T x, T^2 x, ..., or Chebyshev polynomials of T from the first on, applied to x."""
    before, term = None, x
    while True:
        after = spmm(graph, graph.weight, term)
        if basis == "chebyshev" and before is not None:
            after = after.mul_(2).sub_(before)
        before, term = term, after
        yield term


# --- graph diffusion convolution -------------------------------------------------------------------------------------

Entries = tuple[Tensor, Tensor, Tensor]
"""Rows, columns and values of entries of a matrix, row by row."""


@torch.no_grad()
def gdc(
    graph: Graph,
    kernel: Kernel | None = None,
    *,
    k: int | None = None,
    threshold: float | None = None,
    normalisation: str = "symmetric",
    self_loops: float | None = 1.0,
    eps: float | None = None,
) -> Graph:
    """The diffused graph of GDC: S = sum_k theta_k T^k (eq. 1) of T = ``transition(graph, normalisation, self_loops)``, thinned.

    Of the edges into each node, weighted by S, the ``k`` heaviest are kept, or those of weight ``threshold`` and more; that
    from the node itself counts like any other. ``kernel`` is ``PageRank()`` by default. Normalise again, where wanted, by
    ``transition(gdc(...), "random_walk", self_loops=None)``, or ``gdc(...).to_undirected()`` first and then ``"symmetric"``.

    ``eps=None`` works out every entry of S, to 1e-6 (1e-10 for weights in float64), 128 rows at a time by products with T: no
    inverse and no (n, n) matrix at any size, but work n E, some 40 s at 20,000 nodes and 100,000 edges. With ``eps``, weight
    is pushed outward from each node only while it matters, at a cost for each that does not grow with n. On a symmetric graph
    the weight of an edge from j to i is then at most that of S, and short of it by eps d_j or less under ``"random_walk"``, eps
    sqrt(d_i d_j) under ``"symmetric"``: choose eps well below the weights to be kept.

    Raises ``ArgumentError`` for both or none of ``k`` and ``threshold``, negative coefficients, and as ``transition``.
    """
    kernel = PageRank() if kernel is None else kernel
    if not isinstance(kernel, (PageRank, Heat)):
        kernel = [float(c) for c in coefficients(kernel, "power", 0.5)]
    check_thinning(kernel, k, threshold, eps)
    base = weighted(graph, self_loops)
    base = base.with_weight(widened(cast(Tensor, base.weight))).to("cpu")
    matrix = normalised(base, normalisation)
    if eps is None:
        chebyshev = isinstance(kernel, (PageRank, Heat)) and base.is_symmetric
        rows = exact_rows(matrix.reverse().sort(), kernel, "chebyshev" if chebyshev else "power", k)
    else:
        rows = pushed_rows(matrix, base.degree(weighted=True).double().numpy(), kernel, normalisation, eps)
    kept = [thinned(entries, k, threshold) for entries in rows]
    target, source, weight = (torch.cat(part) for part in zip(*kept))
    dtype = torch.get_default_dtype() if graph.weight is None else graph.weight.dtype
    edges = torch.stack([source, target]).to(graph.device)
    return Graph(edges, graph.num_sources, weight.to(graph.device, dtype), node_counts=graph.node_counts)


def check_thinning(kernel: Kernel, k: int | None, threshold: float | None, eps: float | None) -> None:
    """Options of ``gdc``."""
    if (k is None) == (threshold is None):
        raise ArgumentError(f"k = {k} and threshold = {threshold}: give one of them")
    if k is not None and k < 1:
        raise ArgumentError(f"k = {k}: keep one edge into each node or more")
    if threshold is not None and not threshold > 0:
        raise ArgumentError(f"threshold = {threshold}: a positive weight, as S is full")
    if eps is not None and not 0 < eps < 1:
        raise ArgumentError(f"eps = {eps}: what may be missing from an entry lies strictly between 0 and 1")
    if not isinstance(kernel, (PageRank, Heat)) and min(kernel) < 0:
        raise ArgumentError("gdc needs coefficients that are not negative; diffuse takes any")


def thinned(entries: Entries, k: int | None, threshold: float | None) -> Entries:
    """The ``k`` largest entries of each row, or those of ``threshold`` and more."""
    row, column, value = entries
    kept = (value >= threshold).nonzero()[:, 0] if threshold is not None else heaviest(row, value, cast(int, k))
    return row[kept], column[kept], value[kept]


def exact_rows(transposed: Graph, kernel: Kernel, basis: str, k: int | None) -> Iterator[Entries]:
    """Entries of S, block by block, of which not more than the ``k`` largest of a row are needed."""
    nodes, dtype = transposed.num_sources, cast(Tensor, transposed.weight).dtype
    tol = ROUNDING[dtype]
    theta = coefficients(kernel, basis, tol)
    for block in torch.arange(nodes).split(BLOCK):
        units = torch.zeros(nodes, len(block), dtype=dtype)
        units[block, torch.arange(len(block))] = 1.0
        total = theta[0] * units
        for factor, term in zip(theta[1:], terms(transposed, basis, units)):
            total.add_(term, alpha=factor)  # without memory of its own, which costs as much as the product
        rows = total.t().contiguous()
        if k is not None and k < nodes:
            rows = torch.zeros_like(rows).scatter_(1, *reversed(rows.topk(k)))
        row, column = (rows > tol).nonzero().unbind(1)
        yield block[row], column, rows[row, column]


def pushed_rows(matrix: Graph, degree: np.ndarray, kernel: Kernel, normalisation: str, eps: float) -> Iterator[Entries]:
    """Entries of S that matter, block by block, from those of D^-1 W: S = D^1/2 S_random_walk D^-1/2 under ``"symmetric"``."""
    walk = matrix.to_scipy().T.astype(np.float64)
    scale = np.sqrt(degree if normalisation == "symmetric" else np.ones_like(degree))
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=scale > 0)
    walk = (scipy.sparse.diags_array(inverse) @ walk @ scipy.sparse.diags_array(scale)).tocsr()
    push: Callable[..., Any] = push_pagerank if isinstance(kernel, PageRank) else push_series
    for block in np.split(np.arange(len(degree)), np.arange(BLOCK, len(degree), BLOCK)):
        units = csr_array((np.ones(len(block)), (np.arange(len(block)), block)), shape=(len(block), len(degree)))
        rows = push(walk, units, degree, kernel, eps)
        rows.eliminate_zeros()
        rows = rows.tocoo()
        row, column = block[rows.row], rows.col.astype(np.int64)
        value = rows.data * np.where(row == column, 1.0, scale[row] * inverse[column])
        yield torch.from_numpy(row), torch.from_numpy(column), torch.from_numpy(value)


def part_of(matrix: csr_array, mask: np.ndarray) -> csr_array:
    """The stored entries that ``mask`` marks."""
    before = np.concatenate([[0], np.cumsum(mask)])
    return csr_array((matrix.data[mask], matrix.indices[mask], before[matrix.indptr]), shape=matrix.shape)


def push_pagerank(walk: Any, rest: Any, degree: np.ndarray, kernel: PageRank, eps: float) -> Any:
    """Rows of the PageRank matrix: all nodes whose rest is eps times their degree or more push it on, until none is left.

    What is missing is the PageRank of the rest (Andersen, Chung & Lang 2006, section 3).
    """
    pushes = [csr_array(rest.shape)]
    while (large := rest.data >= eps * degree[rest.indices]).any():
        pushes.append(part_of(rest, large))
        rest = part_of(rest, ~large) + (1 - kernel.alpha) * (pushes[-1] @ walk)
    return kernel.alpha * summed(pushes, rest.shape)


def summed(parts: list[Any], shape: tuple[int, int]) -> Any:
    """The sum of sparse matrices, added up once instead of two by two."""
    entries = [part.tocoo() for part in parts]
    row, column, value = (np.concatenate([getattr(part, name) for part in entries]) for name in ("row", "col", "data"))
    return scipy.sparse.coo_array((value, (row, column)), shape=shape).tocsr()


def push_series(walk: Any, term: Any, degree: np.ndarray, kernel: Kernel, eps: float) -> Any:
    """Rows of sum_k theta_k walk^k, without what is too small at each power.

    A quantity r of walk^k at node u adds up to r times the coefficients from k on. It is dropped where that is less than
    eps / (2 N) of the degree, so that over N powers half of eps may be missing, and the other half for the powers left out
    (Kloster & Gleich 2014, for the heat kernel).
    """
    least = degree[degree > 0].min(initial=1.0)
    theta = np.asarray(coefficients(kernel, "power", min(eps * least / 2, 0.5)))
    later = np.cumsum(theta[::-1])[::-1]
    found = theta[0] * term
    for factor, rest in zip(theta[1:], later[1:]):
        term = term @ walk
        term = part_of(term, term.data * rest >= eps * degree[term.indices] / (2 * len(theta)))
        found = found + factor * term
    return found


# --- some of the edges -----------------------------------------------------------------------------------------------


def heaviest(group: Tensor, values: Tensor, k: int) -> Tensor:
    """Numbers of the ``k`` largest values of each group, ascending; of equal ones the first."""
    order = torch.argsort(values, descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    groups = group[order]
    place = torch.arange(len(order), device=order.device) - torch.searchsorted(groups, groups)
    return order[place < k].sort().values


def edge_values(graph: Graph, values: Tensor | None) -> Tensor:
    """One number an edge: the mean over heads of ``values``, or the weights."""
    if values is None:
        values = graph.weight
    if values is None:
        raise ArgumentError("the graph has no weights to judge its edges by: give values, one or one a head for each edge")
    check_values(values, graph.num_edges, graph.device, "values", "E, edges")
    check_floating(values, "rewire")
    if values.dim() > 2:
        raise ArgumentError(f"values must have shape (E,) or (E, H), not {tuple(values.shape)}")
    return values.detach() if values.dim() == 1 else values.detach().mean(1)


def top_k(graph: Graph, k: int, values: Tensor | None = None) -> tuple[Graph, Tensor]:
    """The ``k`` edges of largest value into each node, all where there are fewer, and their numbers, ascending.

    ``values``: ``(E,)``, or ``(E, H)`` whose heads are averaged; the weights if None. Of equal ones the first is kept. The
    edges out of each node are chosen by ``top_k(graph.reverse(), ...)``.
    """
    if k < 1:
        raise ArgumentError(f"k = {k}: keep one edge into each node or more")
    edges = heaviest(graph.target, edge_values(graph, values), k)
    return graph.edge_subgraph(edges), edges


def threshold(graph: Graph, rho: float, values: Tensor | None = None) -> tuple[Graph, Tensor]:
    """The edges whose value is greater than ``rho``, and their numbers, ascending; ``values`` as for ``top_k``.

    With attention as values this is the rewiring of GRAND-nl-rw, at the start of an epoch (Chamberlain et al. 2021). A
    node may lose all its edges: loops added beforehand and kept by their values are the remedy.
    """
    edges = (edge_values(graph, values) > rho).nonzero()[:, 0]
    return graph.edge_subgraph(edges), edges


def drop_edges(
    graph: Graph, p: float, *, undirected: bool = False, generator: torch.Generator | None = None
) -> tuple[Graph, Tensor]:
    """Each edge left out with probability ``p``, by itself; those kept, and their numbers, ascending (Rong et al. 2020).

    ``undirected``: all edges between two nodes, in either direction, share one fate. ``generator`` is one of the graph's device.
    Weights are left as they are: divide by 1 - p to keep their expectation.
    """
    if not 0 <= p <= 1:
        raise ArgumentError(f"p = {p}: a probability lies between 0 and 1")
    if not undirected:
        edges = (torch.rand(graph.num_edges, generator=generator, device=graph.device) >= p).nonzero()[:, 0]
        return graph.edge_subgraph(edges), edges
    low, high = graph.edge_index.amin(0), graph.edge_index.amax(0)
    pairs, place = torch.unique(low * graph._square("undirected") + high, return_inverse=True)
    kept = torch.rand(len(pairs), generator=generator, device=graph.device) >= p
    edges = kept[place].nonzero()[:, 0]
    return graph.edge_subgraph(edges), edges


# --- new edges -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def two_hop(graph: Graph) -> Graph:
    """The graph with an edge also from j to i wherever one leads from j to some m and one from m to i; sorted, each once.

    Of a graph with weights W they are those of W + W^2. Paths from a node back to itself add no loop, and no weight to one.
    """
    nodes = graph._square("two_hop")
    ones = torch.ones(graph.num_edges, dtype=torch.float64, device=graph.device)
    edges = graph.with_weight(ones if graph.weight is None else graph.weight.double()).to_scipy().tocsr()
    paths = (edges @ edges).tocoo()
    away = paths.row != paths.col
    both = scipy.sparse.coo_array((paths.data[away], (paths.row[away], paths.col[away])), shape=(nodes, nodes)) + edges
    found = Graph.from_scipy(both).to(graph.device)
    weight = None if graph.weight is None else found.weight.to(graph.weight.dtype)  # type: ignore[union-attr]
    return Graph(found.edge_index, nodes, weight, node_counts=graph.node_counts).sort()


@torch.no_grad()
def knn(x: Tensor, k: int, metric: str = "euclidean") -> Graph:
    """An edge from each of the ``k`` nearest other rows of ``x`` ``(n, F)`` to each row; sorted by target, nearest first.

    ``metric``: ``"euclidean"`` or ``"cosine"``, of which rows of zeros are at distance 1 from all. Distances to all others are
    worked out 128 rows at a time, in float64 on the device of ``x``, whatever F; in few dimensions ``Graph.knn`` is faster.
    """
    if metric not in METRICS:
        raise unknown_name("metric", metric, METRICS)
    if not isinstance(x, Tensor) or x.dim() != 2:
        raise ArgumentError(f"x must be a tensor of shape (n, F), not {tuple(getattr(x, 'shape', ()))}")
    count = x.shape[0]
    if not 1 <= k < max(count, 1):
        raise ArgumentError(f"k = {k} neighbours among {count} rows: k must be from 1 to {count - 1}")
    rows = x.double()
    if not bool(rows.isfinite().all()):
        raise ArgumentError("x holds NaN or infinity: remove these rows first")
    if metric == "cosine":
        rows = rows * inverse_power(rows.norm(dim=1, keepdim=True), 1.0)
    else:
        rows = rows - rows.mean(0)  # distances come from products, which lose the digits of a common part
    half = rows.square().sum(1) / 2 if metric == "euclidean" else rows.new_zeros(count)
    found = []
    for block in torch.arange(count, device=x.device).split(BLOCK):
        near = rows[block] @ rows.t() - half
        near[torch.arange(len(block), device=x.device), block] = -math.inf
        found.append(near.topk(k).indices)
    target = torch.arange(count, device=x.device).repeat_interleave(k)
    return Graph(torch.stack([torch.cat(found).reshape(-1), target]), count)
