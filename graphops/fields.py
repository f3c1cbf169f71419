"""Diffusion on graphs as fields: dX/dt = div(G grad X) = alpha (A - I) X + b, where row i of A says what i takes from whom.

A is fixed (``LinearDiffusion``, whose structure lets `solve` be exact in time) or attention of the state
(``NonlinearDiffusion``). States are ``(n, ...)``, features last. Where the rows of A are shares, not negative and of sum 1,
and b = 0, every feature stays between its least and its greatest value at the start (the maximum principle, eq. 3).

Equations are those of Chamberlain et al. 2021 (GRAND) unless another source is named; GRAND++ is Thorpe et al. 2022.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from . import segment
from .attention import SCORES, Attention, averaged, normalise
from .autograd import hidden
from .calculus import check_nodes, check_square, on_loops, spread
from .errors import ArgumentError, ArgumentTypeError, unknown_name
from .graph import Graph
from .pattern import Segments
from .rewire import threshold, transition
from .segment import check_values, spmm, widened

__all__ = [
    "ATTENTIONS",
    "PENALTIES",
    "ClusterAttention",
    "EarlyStopping",
    "EdgeAttention",
    "LinearDiffusion",
    "NonlinearDiffusion",
    "PenalisedField",
    "laplacian_diffusion",
    "rewired",
    "stationary_distribution",
    "trusted_source",
]

EdgeWeights = Callable[[Graph, Tensor], Tensor]
"""Weights of the edges ``(E,)``, in their order, from a graph and the state of its nodes."""


# --- A ---------------------------------------------------------------------------------------------------------------


def divided(dim: int, heads: int) -> tuple[int, int]:
    """Heads, and features of each; raises ``ArgumentError``."""
    if not (isinstance(heads, int) and isinstance(dim, int) and heads > 0 and dim > 0 and dim % heads == 0):
        raise ArgumentError(f"heads = {heads!r} must divide the dimension of attention, {dim!r}")
    return heads, dim // heads


class EdgeAttention(nn.Module):
    """A_ij as attention of what stands at i and j, the mean over its heads: ``(graph, (n, channels)) -> (E,)``.

    Args:
        channels: features at a node.
        kind: a name of ``attention.SCORES``. ``"additive"`` is that of GAT, with the projection for queries and keys alike.
        dim: features of all queries, and of all keys; None: ``channels``.
        heads: divides ``dim``.
        normaliser, over, reweight: see ``attention.normalise``. ``over="outgoing"``, the sender, is what the code of GRAND
            does on citation graphs; rows then do not sum to 1, and there is no maximum principle.
        scale: of the dot product: ``"sqrt_d_k"``, ``"d_k"`` (eq. 10) or a number.

    Matrices of queries and keys start at 1e-5, so that A starts near uniform shares; that of GAT as Glorot & Bengio 2010.

    Raises ``UnknownNameError`` for a name, ``ArgumentError`` for heads that do not divide ``dim``.
    """

    def __init__(
        self,
        channels: int,
        kind: str = "dot_product",
        dim: int | None = None,
        heads: int = 4,
        *,
        normaliser: str = "softmax",
        over: str = "incoming",
        reweight: str | None = None,
        scale: str | float | None = None,
    ) -> None:
        super().__init__()
        if kind not in SCORES:
            raise unknown_name("attention", kind, SCORES)
        dim = channels if dim is None else dim
        self.kind, (self.heads, self.width) = kind, divided(dim, heads)
        self.attention = Attention(kind, scale, normaliser, over, reweight)
        if kind == "additive":
            self.project = nn.Linear(channels, dim, bias=False)
            self.vectors = nn.Parameter(torch.empty(2, heads, self.width))
            for tensor in (self.project.weight, self.vectors):
                nn.init.xavier_uniform_(tensor)
            return
        self.query, self.key = nn.Linear(channels, dim), nn.Linear(channels, dim)
        for linear in (self.query, self.key):
            nn.init.constant_(linear.weight, 1e-5)
        if kind == "exponential_kernel":
            self.log_kernel = nn.Parameter(torch.zeros(2, heads))

    def _heads(self, values: Tensor) -> Tensor:
        return values.view(values.shape[0], self.heads, self.width)

    def forward(self, graph: Graph, x: Tensor) -> Tensor:
        """Weights of the edges, in their order."""
        check_values(x, graph.num_sources, graph.device, "x", "nodes")
        if self.kind == "additive":
            projected = self._heads(self.project(x))
            return self.attention.weights(graph, *((projected * vector).sum(-1) for vector in self.vectors))
        options = {}
        if self.kind == "exponential_kernel":
            options = dict(zip(("variance", "lengthscale"), self.log_kernel.exp()))
        return self.attention.weights(graph, self._heads(self.query(x)), self._heads(self.key(x)), **options)

    def extra_repr(self) -> str:
        return f"{self.kind}, heads={self.heads}, normaliser={self.attention.normaliser}, over={self.attention.over}"


class ClusterAttention(nn.Module):
    """A_ij as attention between the clusters that i and j are in, ``(graph, (n, channels)) -> (E,)``: "dorsey" of GRAND's code.

    Nodes are put into ``clusters`` groups by ``iterations`` of k-means, from the first ``clusters`` nodes on (as many as there
    are); a table of softmax_b(<q_a, k_b> / sqrt(d_k)) of the groups' means a, b has the scores of the edges, which are then
    normalised. Who is in which group is a constant to the gradient. ``dim``, ``heads`` and what follows are of
    ``EdgeAttention``. Matrices start as Glorot & Bengio 2010.

    Raises ``ArgumentError`` for heads that do not divide ``dim``, and numbers of clusters or iterations below 1.
    """

    def __init__(
        self,
        channels: int,
        clusters: int = 10,
        dim: int | None = None,
        heads: int = 4,
        *,
        iterations: int = 10,
        normaliser: str = "softmax",
        over: str = "incoming",
    ) -> None:
        super().__init__()
        self.heads, self.width = divided(channels if dim is None else dim, heads)
        for name, value in (("clusters", clusters), ("iterations", iterations)):
            if not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} = {value!r}: a whole number from 1 on")
        self.clusters, self.iterations, self.normaliser, self.over = clusters, iterations, normaliser, over
        Attention("dot_product", None, normaliser, over)  # names that are wrong are refused now
        self.query, self.key = (nn.Linear(channels, self.heads * self.width, bias=False) for _ in range(2))
        for linear in (self.query, self.key):
            nn.init.xavier_uniform_(linear.weight)

    @torch.no_grad()
    def groups(self, x: Tensor) -> Segments:
        """Nodes by group; a group that loses all its nodes stays where it was."""
        centres = x[: self.clusters]
        for _ in range(self.iterations):
            groups = Segments(torch.cdist(x, centres).argmin(1), len(centres))
            centres = torch.where((groups.counts > 0)[:, None], segment.mean(groups, x), centres)
        return groups

    def forward(self, graph: Graph, x: Tensor) -> Tensor:
        """Weights of the edges, in their order."""
        check_values(x, graph.num_sources, graph.device, "x", "nodes")
        groups = self.groups(x.detach())
        means = segment.mean(groups, x)
        q, k = (part(means).unflatten(1, (self.heads, self.width)).transpose(0, 1) for part in (self.query, self.key))
        table = (q @ k.mT / math.sqrt(self.width)).softmax(2).permute(1, 2, 0)
        scores = table[groups.index[graph.target], groups.index[graph.source]]
        return averaged(normalise(graph, scores, self.normaliser, self.over))


ATTENTIONS = (*SCORES, "dorsey")
"""Names of attention that a layer knows."""


def attention_named(kind: str, channels: int) -> nn.Module:
    """An ``EdgeAttention`` or, for "dorsey", a ``ClusterAttention``; raises ``UnknownNameError``."""
    if kind not in ATTENTIONS:
        raise unknown_name("attention", kind, ATTENTIONS)
    return ClusterAttention(channels) if kind == "dorsey" else EdgeAttention(channels, kind)


@torch.no_grad()
def rewired(graph: Graph, weights: EdgeWeights, x: Tensor, rho: float) -> Graph:
    """The edges whose weight at ``x`` is greater than ``rho``, and all loops, so that no node that has one ends up alone.

    What GRAND-nl-rw does at the start of an epoch; attention is then of these edges, its shares summing to 1 again.
    """
    values = weights(graph, x)
    return threshold(graph, rho, torch.where(graph.source == graph.target, math.inf, values))[0]


# --- fields ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LinearDiffusion:
    """dX/dt = alpha (A - I) X + b with everything constant: a linear field, X(T) = exp(T alpha (A - I)) X(0) if b = 0.

    ``weight`` ``(E,)``: the entries of A, A_ij on the edges from j to i; None: those of ``graph``. ``alpha``: a number, or a
    tensor that is 0-dim or has one entry a feature. ``source``: b, like the state, or None. All may require gradients.

    Where every node has one loop the identity stands on the loops, and one sparse product does it all. As `solve` asks of a
    linear field: ``matvec``, ``rmatvec``, ``source``, ``spectral_bound()``, ``rate`` and ``jacobian_diagonal``. States keep their
    dtype; edges that are not sorted by target are kept sorted, in ``graph`` and ``weight``.

    Raises ``ArgumentError`` for weights or an ``alpha`` of another shape.
    """

    graph: Graph
    weight: Tensor | None = None
    alpha: float | Tensor = 1.0
    source: Tensor | None = None
    _entries: Tensor = field(init=False, repr=False)
    _folded: bool = field(init=False, repr=False)
    _casts: dict[torch.dtype, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        graph = self.graph
        check_square(graph, "LinearDiffusion")
        weight = graph.weight if self.weight is None else self.weight
        if weight is None:
            raise ArgumentError("weight is None and the graph has none: give A's entries, or laplacian_diffusion(graph)")
        check_values(weight, graph.num_edges, graph.device, "weight", "E, edges")
        if weight.dim() != 1 or (isinstance(self.alpha, Tensor) and self.alpha.dim() > 1):
            alpha = tuple(getattr(self.alpha, "shape", ()))
            raise ArgumentError(f"weight must be (E,) and alpha () or (F,), not {tuple(weight.shape)} and {alpha}")
        if not graph.is_sorted:
            graph, weight = graph.sort(weighted=False), weight[graph.perm]
        for name, value in (("graph", graph), ("weight", weight)):
            object.__setattr__(self, name, value)
        identity = None if self._per_feature else graph.pattern.identity(weight.dtype)
        # alpha (A - I) as weights of edges, the identity on the loops; else A.
        object.__setattr__(self, "_folded", identity is not None)
        object.__setattr__(self, "_entries", weight if identity is None else self.alpha * (weight - identity))

    @property
    def _per_feature(self) -> bool:
        return isinstance(self.alpha, Tensor) and self.alpha.dim() == 1

    def _entries_as(self, dtype: torch.dtype) -> Tensor:
        """The entries in ``dtype``; kept, unless they would keep a graph of gradients with them."""
        if self._entries.dtype == dtype or self._entries.requires_grad or hidden(self._entries):
            return self._entries.to(dtype)
        if dtype not in self._casts:
            self._casts[dtype] = self._entries.to(dtype)
        return self._casts[dtype]

    def _product(self, graph: Graph, x: Tensor) -> Tensor:
        check_nodes(self.graph, x, "LinearDiffusion")
        wide = widened(x)
        moved = spmm(graph, self._entries_as(wide.real.dtype if wide.is_complex() else wide.dtype), wide)
        if not self._folded:
            moved = self.alpha * (moved - wide)
        return moved.to(x.dtype)

    def matvec(self, x: Tensor) -> Tensor:
        """alpha (A - I) x, ``(n, ...) -> (n, ...)``."""
        return self._product(self.graph, x)

    def rmatvec(self, x: Tensor) -> Tensor:
        """Its transpose, (A^T - I) alpha x: ``alpha`` is a number for every feature, so that the order does not matter."""
        return self._product(self.graph.reverse(), x)

    def __call__(self, t: Any, x: Tensor) -> Tensor:
        moved = self.matvec(x)
        return moved if self.source is None else moved + self.source

    def jacobian_diagonal(self, t: Any, x: Tensor) -> Tensor:
        """alpha (A_ii - 1) at every node, like ``x``; no product."""
        loops = spread(on_loops(self.graph, self._entries), x)
        return loops if self._folded else (self.alpha * (loops - 1)).to(x.dtype)

    @cached_property
    def _largest_alpha(self) -> float:
        return float(self.alpha.detach().abs().max()) if isinstance(self.alpha, Tensor) else abs(self.alpha)

    @cached_property
    def _sums(self) -> tuple[Tensor, Tensor]:
        """Absolute sums of the rows and of the columns of A."""
        size = widened(self.weight.detach()).abs()  # type: ignore[union-attr]
        return segment.sum(self.graph.incoming, size), segment.sum(self.graph.outgoing, size)

    def spectral_bound(self) -> float:
        """An upper bound of |lambda|: alpha times 1 and the lesser of the largest absolute row and column sums of A."""
        if not self.graph.num_sources:
            return 0.0
        return self._largest_alpha * (1 + min(float(sums.max()) for sums in self._sums))

    @cached_property
    def rate(self) -> float | None:
        """The greatest alpha, if A has no entry below 0, rows or columns of sum 1, and no alpha is below 0; else None.

        exp(t alpha (A - I)) is then a matrix of probabilities, and uniformisation with this rate computes it.
        """
        least = float(self.alpha.detach().min()) if isinstance(self.alpha, Tensor) else self.alpha
        return self._largest_alpha if least >= 0 and any(self._shares()) else None

    def _shares(self) -> tuple[bool, bool]:
        """Whether the rows of A, and its columns, are shares: not below 0 and of sum 1."""
        if bool((self.weight.detach() < 0).any()):  # type: ignore[union-attr]
            return False, False
        off = [(sums - 1).abs() > 100 * torch.finfo(sums.dtype).eps for sums in self._sums]
        return not bool(off[0].any()), not bool(off[1].any())


def laplacian_diffusion(graph: Graph, alpha: float | Tensor = 1.0, source: Tensor | None = None) -> LinearDiffusion:
    """Heat flow without attention, A = D^-1 W: the random-walk Laplacian, and a GCN's smoothing in continuous time.

    The walk of n steps of size dt of forward Euler stays with 1 - dt and goes to j with dt W_ij / d_i (Thorpe et al. 2022).
    A node without edges into it goes to 0: give it a loop. Without weights A is worked out in float64. Raises
    ``ArgumentError`` for weights below 0.
    """
    dtype = torch.float64 if graph.weight is None else None
    return LinearDiffusion(transition(graph, "random_walk", None, dtype), None, alpha, source)


@dataclass(frozen=True, eq=False)
class NonlinearDiffusion:
    """dX/dt = alpha (A(X) - I) X + b: a quasi-linear field, whose ``operator(t, X)`` is a ``LinearDiffusion``.

    ``weights``: an ``EdgeAttention``, or any function of the graph and the state that returns ``(E,)``. ``alpha`` and
    ``source`` as of ``LinearDiffusion``.
    """

    graph: Graph
    weights: EdgeWeights
    alpha: float | Tensor = 1.0
    source: Tensor | None = None

    def __post_init__(self) -> None:
        check_square(self.graph, "NonlinearDiffusion")
        object.__setattr__(self, "graph", self.graph.sort())  # once, for all evaluations

    def operator(self, t: Any, x: Tensor) -> LinearDiffusion:
        """The linear field whose A is that of the state ``x``."""
        return LinearDiffusion(self.graph, self.weights(self.graph, x), self.alpha, self.source)

    def __call__(self, t: Any, x: Tensor) -> Tensor:
        return self.operator(t, x)(t, x)


# --- sources ---------------------------------------------------------------------------------------------------------


def trusted_source(x: Tensor, trusted: Tensor, by: Tensor | None = None) -> Tensor:
    """x_i - mean of x over the trusted nodes, at these, 0 elsewhere: the source of GRAND++ as its paper prints it.

    ``trusted``: mask ``(n,)``. ``by`` ``(n,)`` divides it. Undivided, the mean of the state, weighted by A's stationary
    distribution pi, drifts linearly in t, for the source has the weighted sum sum_I pi_i (x_i - mean). Divided by pi, or by
    any multiple of it such as the degrees of a random walk, that sum is 0 and the state has a limit, which is not constant.

    Raises ``ArgumentTypeError`` for no mask, ``ArgumentError`` for another shape, or a mask without a node.
    """
    if not isinstance(trusted, Tensor) or trusted.dtype != torch.bool:
        raise ArgumentTypeError(f"trusted must be a boolean mask (n,), not {getattr(trusted, 'dtype', type(trusted).__name__)}")
    if trusted.shape != x.shape[:1] or not bool(trusted.any()):
        raise ArgumentError(
            f"trusted must be a mask ({x.shape[0]},) with a node in it, not {tuple(trusted.shape)} with {int(trusted.sum())}: "
            "give it the nodes whose labels are known"
        )
    mask = trusted.view(-1, *[1] * (x.dim() - 1))
    away = torch.where(mask, x - x[trusted].mean(0), 0.0)
    return away if by is None else away / torch.where(trusted, by, 1.0).to(x.dtype).view_as(mask)


@torch.no_grad()
def stationary_distribution(graph: Graph, weight: Tensor | None = None, tol: float = 1e-10, max_iters: int = 100_000) -> Tensor:
    """pi with pi A = pi and sum 1, ``(n,)``, of A with the entries ``weight`` (None: the graph's) and rows of sum 1.

    By powers of (I + A) / 2, which has no cycles; ``tol`` is the change of a step in the 1-norm. On a graph in several parts
    each keeps the share of the nodes that it has. Raises ``ArgumentError`` where rows do not sum to 1 or it does not settle.
    """
    walk = LinearDiffusion(graph, weight, 0.5)
    if not walk._shares()[0]:
        raise ArgumentError("weight must not be below 0 and must sum to 1 over the edges into each node")
    share = torch.full((graph.num_sources,), 1 / max(graph.num_sources, 1), dtype=torch.float64, device=graph.device)
    for _ in range(max_iters):
        change = walk.rmatvec(share)
        share = share + change
        if float(change.abs().sum()) <= tol:
            return share / share.sum()
    raise ArgumentError(f"no stationary distribution to tol = {tol} in {max_iters} steps: the graph mixes slowly, raise either")


# --- penalties, and the best time ------------------------------------------------------------------------------------


def kinetic(x: Tensor, dx: Tensor, noise: Tensor) -> Tensor:
    """|f|^2 (Finlay et al. 2020)."""
    return dx.square().mean()


def jacobian(x: Tensor, dx: Tensor, noise: Tensor) -> Tensor:
    """|e^T df/dx|^2 with e of mean 0 and variance 1: in the mean the squared Frobenius norm (Hutchinson; Finlay et al. 2020)."""
    return torch.autograd.grad(dx, x, noise, create_graph=True)[0].square().mean()


def total_derivative(x: Tensor, dx: Tensor, noise: Tensor) -> Tensor:
    """|df/dt|^2 along the solution, (df/dx) f of a field without t (Kelly et al. 2020, of order 2)."""
    probe = torch.zeros_like(dx, requires_grad=True)
    (pulled,) = torch.autograd.grad(dx, x, probe, create_graph=True)
    return torch.autograd.grad(pulled, probe, dx, create_graph=True)[0].square().mean()


PENALTIES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "kinetic": kinetic,
    "jacobian": jacobian,
    "total_derivative": total_derivative,
}
"""Each is a mean over the numbers of the state, so that it does not depend on the size of the graph."""


class PenalisedField:
    """A field with integrals of penalties beside its state: ``f(t, (x, r))``, where dr/dt ``(K,)`` are the penalties at x.

    ``penalties``: names of ``PENALTIES``; start from ``(x0, field.zeros(x0))``. ``noise``: e of the Jacobian's penalty, like the
    state; None: drawn once for a solve, with torch's generator, from -1 and 1. Of fields without t. Its gradients are those
    of autograd, not of a method that needs the structure of f.

    Raises ``UnknownNameError``.
    """

    def __init__(self, field: Callable[..., Tensor], penalties: Sequence[str], noise: Tensor | None = None) -> None:
        for name in penalties:
            if name not in PENALTIES:
                raise unknown_name("penalty", name, PENALTIES)
        self.field, self.penalties, self.noise = field, tuple(penalties), noise

    def zeros(self, x: Tensor) -> Tensor:
        """The integrals at the start."""
        return x.new_zeros(len(self.penalties))

    def __call__(self, t: Any, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, recorded = state[0], torch.is_grad_enabled()
        if self.noise is None:
            self.noise = torch.randint(2, x.shape, device=x.device).to(x.dtype) * 2 - 1
        with torch.enable_grad():
            x = x if x.requires_grad and recorded else x.detach().requires_grad_()
            dx = self.field(t, x)
            rates = torch.stack([PENALTIES[name](x, dx, self.noise) for name in self.penalties])
        return (dx, rates) if recorded else (dx.detach(), rates.detach())


class EarlyStopping:
    """Observer of `solve` that keeps the state of the highest score among the ends of its steps.

    ``score``: of the state, a number, such as the accuracy on validation nodes. ``patience``: steps without a higher one
    after which the solve is stopped; None: never.

    Attributes:
        best, t, state: the highest score so far, where, and of what (detached); None before the first step.
    """

    def __init__(self, score: Callable[[Any], Any], patience: int | None = None) -> None:
        if patience is not None and patience < 1:
            raise ArgumentError(f"patience must be None or at least 1 step, not {patience}")
        self.score, self.patience = score, patience
        self.best: float | None = None
        self.t: Any = None
        self.state: Any = None
        self._idle = 0

    @torch.no_grad()
    def __call__(self, step: Any) -> bool:
        value = float(self.score(step.y))
        if self.best is None or value > self.best:
            state = step.y.detach() if isinstance(step.y, Tensor) else tuple(part.detach() for part in step.y)
            self.best, self.t, self.state, self._idle = value, float(step.t), state, 0
        else:
            self._idle += 1
        return self.patience is not None and self._idle >= self.patience
