"""Calculus on graphs: gradient, divergence, Laplacians, and energies whose negative gradient is a diffusion.

An edge e from j to i has the weight w_e, 1 in a graph without weights, and W_ij is what the edges from j to i weigh together.

    gradient      (grad x)_e = x_j - x_i
    divergence    (div X)_i = sum over the edges e into i of w_e X_e
    products      <x, y> = sum over nodes of x y,   <X, Y>_E = 1/2 sum over edges of w X Y
    Laplacian     L = -div grad = D - W, where D has the row sums of W, the weights into each node

Values at nodes are ``(n, ...)``, at edges ``(E, ...)`` in the order of the graph's edges; features are independent of each
other except in the nonlinear energies, which take the length of a difference over all of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, cast

import scipy.sparse
import torch
from torch import Tensor

from . import autograd, segment
from .autograd import hidden
from .errors import ArgumentError, UnsupportedError, unknown_name
from .graph import Graph
from .pattern import Segments
from .segment import check_floating, check_values, column, counts_of, gather, spmm, widened

__all__ = [
    "Dirichlet",
    "Energy",
    "GraphOperator",
    "PLaplacian",
    "PeronaMalik",
    "TotalVariation",
    "dirichlet_energy",
    "divergence",
    "gradient",
    "gradient_adjoint",
    "laplacian",
    "laplacian_operator",
]

KINDS = ("combinatorial", "random_walk", "symmetric")


def check_square(graph: Graph, what: str) -> None:
    if graph.is_bipartite:
        raise UnsupportedError(f"{what} compares nodes of one set; this graph is bipartite, {graph.num_nodes}")


def check_nodes(graph: Graph, x: Tensor, what: str) -> None:
    """Floating or complex values at the nodes of a graph with one set of them."""
    check_square(graph, what)
    check_values(x, graph.num_sources, graph.device, "x", "nodes")
    if not x.is_complex():
        check_floating(x, what)


def check_edges(graph: Graph, values: Tensor) -> None:
    check_square(graph, "the divergence")
    check_values(values, graph.num_edges, graph.device, "X", "E, edges")


def weighted(values: Tensor, weight: Tensor | None) -> Tensor:
    """w X at each edge."""
    return values if weight is None else column(weight, values) * values


def flat(values: Tensor) -> Tensor:
    """``(n, ...)`` as ``(n, F)``."""
    return values.reshape(values.shape[0], math.prod(values.shape[1:]))


def on_loops(graph: Graph, entries: Tensor) -> Tensor:
    """Sum of ``entries`` ``(E,)`` on the loops of each node, ``(n,)``: the diagonal of the matrix they are of."""
    return segment.sum(graph.incoming, torch.where(graph.source == graph.target, widened(entries), 0.0))


def spread(diagonal: Tensor, y: Tensor) -> Tensor:
    """The diagonal ``(n,)`` of a matrix that acts on every feature of ``y`` ``(n, ...)``, like ``y``."""
    return column(diagonal, y).to(y.dtype).expand_as(y)


def gradient(graph: Graph, x: Tensor) -> Tensor:
    """x_j - x_i at each edge from j to i: ``(n, ...) -> (E, ...)``."""
    check_nodes(graph, x, "gradient")
    out = autograd.difference(graph.pattern, flat(widened(x))).reshape(graph.num_edges, *x.shape[1:])
    return out.to(x.dtype)


def weighted_sum(segments: Segments, weight: Tensor | None, values: Tensor) -> Tensor:
    """Sum of w_e X_e over each segment."""
    if weight is None:
        return segment.sum(segments, values)
    dtype = torch.promote_types(weight.dtype, values.dtype)
    out = autograd.weighted_total(segments, widened(weight.to(dtype)), flat(widened(values.to(dtype))))
    return out.reshape(segments.size, *values.shape[1:]).to(dtype)


def divergence(graph: Graph, X: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum of w_e X_e over the edges into each node: ``(E, ...) -> (n, ...)``; ``weight`` ``(E,)`` in place of the graph's."""
    check_edges(graph, X)
    if weight is not None:
        check_values(weight, graph.num_edges, graph.device, "weight", "E, edges")
        if weight.dim() != 1:
            raise ArgumentError(f"weight must have shape (E,), not {tuple(weight.shape)}")
    return weighted_sum(graph.incoming, graph.weight if weight is None else weight, X)


def gradient_adjoint(graph: Graph, X: Tensor) -> Tensor:
    """The transpose of the gradient, <grad x, X>_E = <x, gradient_adjoint X> on any graph: ``(E, ...) -> (n, ...)``.

    It is minus the divergence for X that changes sign with the edge's direction, on a symmetric graph.
    """
    check_edges(graph, X)
    return (weighted_sum(graph.outgoing, graph.weight, X) - weighted_sum(graph.incoming, graph.weight, X)) / 2


# --- Laplacians ------------------------------------------------------------------------------------------------------


def check_kind(graph: Graph, kind: str) -> None:
    """A Laplacian that this graph has; weights are looked at once a graph, and not where a transform hides them."""
    check_square(graph, "the Laplacian")
    if kind not in KINDS:
        raise unknown_name("kind of Laplacian", kind, KINDS)
    if kind == "combinatorial" or hidden(graph.weight):
        return
    if not graph.is_nonnegative:
        raise ArgumentError(f"kind = {kind!r} divides by degrees, and weights below 0 (or NaN) spoil them: mend the weights")
    if kind == "symmetric" and not graph.is_symmetric:
        raise ArgumentError(
            "kind = 'symmetric' needs as much weight from j to i as from i to j: use g.to_undirected(), or 'random_walk'"
        )


def degrees(graph: Graph, like: Tensor) -> Tensor:
    """What the edges into each node weigh together, ``(n,)``; in the dtype of ``like`` where there are no weights."""
    if graph.weight is None:
        return counts_of(graph.incoming, like.real if like.is_complex() else like)
    return segment.sum(graph.incoming, widened(graph.weight))


def power_or_zero(degree: Tensor, exponent: float) -> Tensor:
    """A negative power of degrees; 0 of 0, so that a node without edges has a row, and a column, of zeros."""
    nothing = degree == 0
    return torch.where(nothing, 0.0, torch.where(nothing, 1.0, degree).pow(exponent))


def laplacian(graph: Graph, x: Tensor, kind: str = "combinatorial") -> Tensor:
    """L x: ``(n, ...) -> (n, ...)``.

    ``kind``: ``"combinatorial"`` D - W; ``"random_walk"`` 1 - D^-1 W; ``"symmetric"`` 1 - D^-1/2 W D^-1/2. A node of degree 0
    has a row of zeros in each. ``laplacian_operator`` has the normalisation worked out, for many products.

    Raises ``UnknownNameError`` for another kind, ``ArgumentError`` where a normalised one meets weights below 0, or
    ``"symmetric"`` weights that are not; both are looked up once a graph, and not while `torch.compile` traces.
    """
    check_kind(graph, kind)
    check_nodes(graph, x, "laplacian")
    wide = widened(x)
    degree = degrees(graph, wide)
    if kind == "symmetric":
        scale = column(power_or_zero(degree, -0.5), wide)
        wide = wide * scale
    out = column(degree, wide) * wide - spmm(graph, graph.weight, wide)
    if kind == "symmetric":
        out = out * scale
    elif kind == "random_walk":
        out = out * column(power_or_zero(degree, -1.0), wide)
    return out.to(x.dtype) if wide.dtype != x.dtype else out


@dataclass(frozen=True, eq=False)
class GraphOperator:
    """The matrix A with a graph's weights as entries, A_ij of the edges from j to i, as the field dy/dt = A y.

    ``graph`` has weights, and loops for what is on the diagonal. ``bound``: of the spectral radius, where one is known that is
    better than that of ``spectral_bound``. Called as ``f(t, y)`` it is ``matvec(y)``; ``2 * A`` and ``-A`` are operators.

    States are ``(n, ...)`` and keep their dtype. What is worked out at construction is not followed when weights change
    in place: build it anew.
    """

    graph: Graph
    bound: float | None = None
    _casts: dict[torch.dtype, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_square(self.graph, "GraphOperator")
        if self.graph.weight is None:
            raise ArgumentError("graph has no weights, the entries of the matrix: with_weight gives it some")
        object.__setattr__(self, "graph", self.graph.sort())  # once, for all products
        self.graph.reverse()  # kept by the graph; `torch.compile` could not trace how it is made

    def _weight(self, dtype: torch.dtype) -> Tensor:
        """The entries in ``dtype``; kept, unless they would keep a graph of gradients with them."""
        weight = self.entries
        if weight.dtype == dtype:
            return weight
        if weight.requires_grad or hidden(weight):
            return weight.to(dtype)
        if dtype not in self._casts:
            self._casts[dtype] = weight.to(dtype)
        return self._casts[dtype]

    @property
    def entries(self) -> Tensor:
        """Weights of ``graph``, ``(E,)``."""
        return cast("Tensor", self.graph.weight)

    def _product(self, graph: Graph, x: Tensor) -> Tensor:
        check_nodes(self.graph, x, "GraphOperator")
        wide = widened(x)
        out = spmm(graph, self._weight(wide.real.dtype if wide.is_complex() else wide.dtype), wide)
        return out if wide is x else out.to(x.dtype)

    def matvec(self, x: Tensor) -> Tensor:
        """A x, ``(n, ...) -> (n, ...)``."""
        return self._product(self.graph, x)

    def rmatvec(self, x: Tensor) -> Tensor:
        """A^T x, ``(n, ...) -> (n, ...)``."""
        return self._product(self.graph.reverse(), x)

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        return self.matvec(y)

    def jacobian_diagonal(self, t: Any, y: Tensor) -> Tensor:
        """A_ii at every node, like ``y``: what stands on its loops; no product."""
        return spread(on_loops(self.graph, self.entries), y)

    def __mul__(self, factor: float | Tensor) -> GraphOperator:
        if isinstance(factor, Tensor) and factor.dim():
            raise ArgumentError(f"factor must be a number or a 0-dim tensor, not of shape {tuple(factor.shape)}")
        # The size of a tensor is left on its device: the bound is then worked out if it is asked for.
        bound = None if self.bound is None or isinstance(factor, Tensor) else self.bound * abs(factor)
        return GraphOperator(self.graph.with_weight(self.entries * factor), bound)

    __rmul__ = __mul__

    def __neg__(self) -> GraphOperator:
        return self * -1.0

    @cached_property
    def symmetric(self) -> bool:
        """Whether A is its transpose, to rounding."""
        return self.graph.is_symmetric

    @cached_property
    def _largest_sum(self) -> float:
        size = widened(self.entries.detach()).abs()
        if not self.graph.num_edges:
            return 0.0
        return min(float(segment.sum(ends, size).max()) for ends in (self.graph.incoming, self.graph.outgoing))

    def spectral_bound(self) -> float:
        """An upper bound of the spectral radius: ``bound``, or the lesser of the largest absolute row and column sums."""
        return self._largest_sum if self.bound is None else self.bound

    @cached_property
    def rate(self) -> float | None:
        """The least r >= 0 for which A + r has no entry below 0, if its rows then add up to r; else None.

        exp(t A) is then a matrix of probabilities, and uniformisation with this rate computes it.
        """
        entries = widened(self.entries.detach())
        off = self.graph.source != self.graph.target
        rows = self.graph.incoming
        rounding = 100 * torch.finfo(entries.dtype).eps * segment.sum(rows, entries.abs())
        if bool((entries[off] < 0).any()) or not bool((segment.sum(rows, entries).abs() <= rounding).all()):
            return None
        leaving = segment.sum(rows, torch.where(off, entries, 0.0))
        return float(leaving.max()) if leaving.numel() else 0.0

    def to_scipy(self) -> Any:
        """The ``(n, n)`` matrix as a ``scipy.sparse.csr_array``, without gradient."""
        return scipy.sparse.csr_array(self.graph.to_scipy().T)


def laplacian_operator(graph: Graph, kind: str = "combinatorial") -> GraphOperator:
    """The Laplacian with its normalisation worked out, one sparse product each; ``-laplacian_operator(g)`` is heat flow.

    The diagonal stands on loops among the edges, which takes a half to a third of the time of a product and a sum (`python -m
    benchmarks run graph-kernels`). ``kind`` and errors as of ``laplacian``. Without weights it is worked out in float64.

    Its bound of the spectral radius, without weights below 0: twice the largest diagonal entry; for the symmetric
    combinatorial one the largest L_ii + L_jj of neighbours (Anderson & Morley 1985, Linear Multilinear Algebra 18).
    """
    check_kind(graph, kind)
    like = torch.empty(0, dtype=torch.float64, device=graph.device)
    degree = degrees(graph, like)
    weight = degree.new_ones(graph.num_edges) if graph.weight is None else widened(graph.weight)
    share = weight if kind == "combinatorial" else weight * gather(graph.incoming, power_or_zero(degree, -1.0))
    entries = share
    if kind == "symmetric":
        root = power_or_zero(degree, -0.5)
        entries = weight * gather(graph.incoming, root) * gather(graph.outgoing, root)
    between = graph.source != graph.target
    diagonal = segment.sum(graph.incoming, torch.where(between, share, 0.0))
    inner = graph.edge_subgraph(between)
    nodes = torch.arange(graph.num_sources, device=graph.device)
    edges = torch.cat([inner.edge_index, nodes.expand(2, -1)], 1)
    whole = Graph(edges, graph.num_nodes, node_counts=graph.node_counts)
    return GraphOperator(whole.with_weight(torch.cat([-entries[between], diagonal])), laplacian_bound(inner, diagonal, kind))


def laplacian_bound(inner: Graph, diagonal: Tensor, kind: str) -> float | None:
    """Of the spectral radius of a Laplacian, from its edges other than loops; None where weights may be below 0."""
    if hidden(inner.weight, diagonal) or not inner.is_nonnegative:
        return None
    diagonal = diagonal.detach()
    if not inner.num_edges:
        return 0.0
    if kind == "combinatorial" and inner.is_symmetric:
        return float((gather(inner.incoming, diagonal) + gather(inner.outgoing, diagonal)).max())
    return 2 * float(diagonal.max())


# --- energies --------------------------------------------------------------------------------------------------------


def lengths(change: Tensor) -> Tensor:
    """|.|^2 of each row over all its features, ``(E, ...) -> (E,)``."""
    squares = change.square()
    return squares.flatten(1).sum(1) if squares.dim() > 1 else squares


def per_graph(graph: Graph, values: Tensor, nodes: Tensor | None = None) -> Tensor:
    """Sum of ``values`` that stand at ``nodes`` (or at all): 0-dim, or ``(B,)`` for a batch of graphs."""
    if graph.node_counts is None:
        return values.sum()
    owner = graph.batch_index if nodes is None else graph.batch_index[nodes]
    return segment.sum(Segments(owner, len(graph.node_counts)), values)


def dirichlet_energy(graph: Graph, x: Tensor) -> Tensor:
    """1/4 of the sum over edges of w |grad x|^2, 0-dim, or ``(B,)`` for a batch; its gradient is L x on a symmetric graph."""
    check_nodes(graph, x, "dirichlet_energy")
    wide = widened(x)
    change = gradient(graph, torch.view_as_real(wide) if wide.is_complex() else wide)
    return per_graph(graph, weighted(lengths(change), graph.weight), graph.target) / 4


def neighbours(graph: Graph) -> tuple[Graph, Tensor | None]:
    """Each pair of neighbours as one edge, and half of what the edges between them weigh; None where all are 1."""
    count = graph.num_sources
    between = graph.source != graph.target
    low, high = graph.edge_index[:, between].sort(0).values
    keys, place = torch.unique(high * count + low, return_inverse=True)
    pairs = Graph(torch.stack([keys % max(count, 1), keys // max(count, 1)]), count, node_counts=graph.node_counts)
    parallel = Segments(place, keys.numel())
    if graph.weight is not None:
        return pairs, segment.sum(parallel, widened(graph.weight)[between]) / 2
    twice = bool((parallel.counts == 2).all())
    return pairs, None if twice else parallel.counts.double() / 2


def positive(value: float | Tensor, name: str) -> None:
    if isinstance(value, Tensor) and hidden(value):
        return
    number = float(value.detach()) if isinstance(value, Tensor) else value
    if not number > 0:
        raise ArgumentError(f"{name} must be above 0, not {number}")


def divergence_of_pairs(pairs: Graph, conductance: Tensor, change: Tensor) -> Tensor:
    """What the flow conductance x change along each pair brings to its target and takes from its source."""
    into, out = (weighted_sum(ends, conductance, change) for ends in (pairs.incoming, pairs.outgoing))
    return into - out


@dataclass(frozen=True, eq=False)
class Diffusion:
    """x -> div(c grad x) with a ``conductance`` w c of each of ``pairs``, ``(E,)``: a symmetric linear field."""

    pairs: Graph
    conductance: Tensor
    symmetric: ClassVar[bool] = True

    def matvec(self, x: Tensor) -> Tensor:
        """A x, ``(n, ...) -> (n, ...)``."""
        return divergence_of_pairs(self.pairs, self.conductance, gradient(self.pairs, widened(x))).to(x.dtype)

    rmatvec = matvec

    def jacobian_diagonal(self, t: Any, y: Tensor) -> Tensor:
        """Minus the conductances at every node, like ``y``."""
        into, out = (segment.sum(ends, self.conductance) for ends in (self.pairs.incoming, self.pairs.outgoing))
        return spread(-(into + out), y)

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        return self.matvec(y)


@dataclass(frozen=True, eq=False)
class Energy(ABC):
    """F(x) = 1/2 sum over edges of w Phi(|x_j - x_i|), as the field -grad F that is called as ``f(t, y)``.

    On a symmetric graph the field is div(c grad x) with the diffusivity c(r) = Phi'(r) / r; on any other it is that of the
    graph with (w_ij + w_ji) / 2 both ways, of which F is the energy as well. Edges in both directions are evaluated once.

    ``isotropic`` takes the slope r_i of a node in place of each edge's own, r_i^2 being half the sum of w |x_j - x_i|^2 over
    its neighbours: F(x) = sum over nodes of Phi(r_i), and an edge has the mean diffusivity of its ends (after Elmoataz,
    Lezoray & Bougleux 2008, IEEE Trans. Image Process. 17). On a fine image it prefers no direction, as the sum over
    edges does.

    States are ``(n, ...)`` real; ``energy`` is 0-dim, or ``(B,)``, one a graph, for a batch. Features of a node are one
    vector: for several states on one graph use ``torch.func.vmap`` or ``Graph.batch``. What is worked out of the graph
    at construction is not followed when its weights change in place: build it anew.
    """

    graph: Graph
    isotropic: bool = field(default=False, kw_only=True)
    pairs: Graph = field(init=False, repr=False)
    """The graph with one edge a pair of neighbours, from the lower number to the higher."""
    weight: Tensor | None = field(init=False, repr=False)
    """Half of what the edges of each pair weigh together, or None where that is 1."""

    def __post_init__(self) -> None:
        check_square(self.graph, type(self).__name__)
        pairs, weight = neighbours(self.graph)
        object.__setattr__(self, "pairs", pairs)
        object.__setattr__(self, "weight", weight)

    @abstractmethod
    def density(self, squares: Tensor) -> Tensor:
        """Phi(r) of r^2, elementwise."""

    @abstractmethod
    def diffusivity(self, squares: Tensor) -> Tensor:
        """c(r) = Phi'(r) / r of r^2, elementwise."""

    def _change(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Differences over the pairs, and the pairs' weights in their dtype."""
        check_nodes(self.graph, y, type(self).__name__)
        check_floating(y, type(self).__name__)
        change = gradient(self.pairs, widened(y))
        return change, None if self.weight is None else self.weight.to(change.dtype)

    def _slopes(self, weighted_squares: Tensor) -> Tensor:
        """r^2 at the nodes."""
        return (segment.sum(self.pairs.incoming, weighted_squares) + segment.sum(self.pairs.outgoing, weighted_squares)) / 2

    def energy(self, t: Any, y: Tensor) -> Tensor:
        """F(y): 0-dim, or ``(B,)`` for a batch of graphs."""
        change, weight = self._change(y)
        squares = lengths(change)
        if self.isotropic:
            return per_graph(self.graph, self.density(self._slopes(weighted(squares, weight))))
        return per_graph(self.pairs, weighted(self.density(squares), weight), self.pairs.target)

    def _conductance(self, change: Tensor, weight: Tensor | None) -> Tensor:
        """w c of each pair."""
        squares = lengths(change)
        if self.isotropic:
            at_nodes = self.diffusivity(self._slopes(weighted(squares, weight)))
            c = (gather(self.pairs.incoming, at_nodes) + gather(self.pairs.outgoing, at_nodes)) / 2
        else:
            c = self.diffusivity(squares)
        return weighted(c, weight)

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        """-grad F(y), like ``y``."""
        change, weight = self._change(y)
        return divergence_of_pairs(self.pairs, self._conductance(change, weight), change).to(y.dtype)

    def operator(self, t: Any, y: Tensor) -> Diffusion:
        """The linear diffusion with the diffusivity at ``y`` held fixed, of which ``matvec(y)`` is the field: what
        semi-implicit methods solve with."""
        return Diffusion(self.pairs, self._conductance(*self._change(y)))


@dataclass(frozen=True, eq=False)
class Dirichlet(Energy):
    """Phi = r^2 / 2: linear diffusion, dy/dt = -L y on a symmetric graph."""

    def density(self, squares: Tensor) -> Tensor:
        return squares / 2

    def diffusivity(self, squares: Tensor) -> Tensor:
        return torch.ones_like(squares)

    def jacobian_diagonal(self, t: Any, y: Tensor) -> Tensor:
        """-L_ii at every node, like ``y``."""
        return self.operator(t, y).jacobian_diagonal(t, y)


@dataclass(frozen=True, eq=False)
class PLaplacian(Energy):
    """Phi = (r^2 + eps^2)^(p/2) / p: the p-Laplacian. ``p`` >= 1; below 2 the diffusivity needs ``eps`` > 0."""

    p: float
    eps: float | Tensor = 0.0

    def __post_init__(self) -> None:
        if not self.p >= 1:
            raise ArgumentError(f"p must be at least 1, where the energy is convex, not {self.p}")
        if self.p < 2 and not isinstance(self.eps, Tensor) and self.eps == 0:
            raise ArgumentError(f"p = {self.p} below 2 needs eps > 0: the diffusivity is infinite where x is constant")
        if isinstance(self.eps, Tensor) or self.eps != 0:
            positive(self.eps, "eps")
        super().__post_init__()

    def _power(self, squares: Tensor, exponent: float) -> Tensor:
        """(r^2 + eps^2)^exponent; where x is constant and eps = 0 the power of 0 has no derivative to multiply 0 with."""
        if isinstance(self.eps, Tensor) or self.eps != 0:
            return (squares + self.eps**2).pow(exponent)
        flat = squares == 0
        return torch.where(flat, float(exponent == 0), torch.where(flat, 1.0, squares).pow(exponent))

    def density(self, squares: Tensor) -> Tensor:
        return self._power(squares, self.p / 2) / self.p

    def diffusivity(self, squares: Tensor) -> Tensor:
        return self._power(squares, self.p / 2 - 1)


@dataclass(frozen=True, eq=False)
class TotalVariation(Energy):
    """Phi = sqrt(r^2 + eps^2), ``eps`` > 0: total variation (Rudin, Osher & Fatemi 1992), smoothed where x is flat."""

    eps: float | Tensor

    def __post_init__(self) -> None:
        positive(self.eps, "eps")
        super().__post_init__()

    def density(self, squares: Tensor) -> Tensor:
        return (squares + self.eps**2).sqrt()

    def diffusivity(self, squares: Tensor) -> Tensor:
        return (squares + self.eps**2).rsqrt()


@dataclass(frozen=True, eq=False)
class PeronaMalik(Energy):
    """c = 1 / (1 + (r / contrast)^2), or exp(-(r / contrast)^2) (Perona & Malik 1990).

    ``conductance``: ``"rational"`` or ``"exponential"``. The energy is not convex: above the slope ``contrast`` (times
    1/sqrt(2) for the exponential) differences grow, which is how edges stay.
    """

    contrast: float | Tensor
    conductance: str = "rational"

    def __post_init__(self) -> None:
        positive(self.contrast, "contrast")
        if self.conductance not in ("rational", "exponential"):
            raise unknown_name("conductance", self.conductance, ("rational", "exponential"))
        super().__post_init__()

    def density(self, squares: Tensor) -> Tensor:
        ratio = squares / self.contrast**2
        rises = torch.log1p(ratio) if self.conductance == "rational" else -torch.expm1(-ratio)
        return rises * (self.contrast**2 / 2)

    def diffusivity(self, squares: Tensor) -> Tensor:
        ratio = squares / self.contrast**2
        return 1 / (1 + ratio) if self.conductance == "rational" else torch.exp(-ratio)
