"""What the solvers of graph diffusion have to reach on Cora: products for an exponential, its gradients, Adams methods."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.stats import poisson
from torch import Tensor, nn

from graphops import Graph
from graphops.fields import EdgeAttention, LinearDiffusion, NonlinearDiffusion

from .grand_problems import relative
from .graph_problems import citation_data, communities, tidy
from .registry import BenchmarkError, Column, Table

__all__ = ["table"]

COLUMNS = [
    Column("row", "what"),
    Column("setting", "setting"),
    Column("measured", "measured", "number"),
    Column("bar", "bar", "number"),
    Column("stretch", "stretch", "number"),
    Column("trial", "trial's", "number"),
    Column("verdict", "verdict"),
]


def judged(
    row: str, setting: str, measured: float | None, bar: float, stretch: float | None = None, trial: float | None = None
) -> dict[str, Any]:
    """A line that is met by being no more than the bar."""
    line = {"row": row, "setting": setting, "measured": measured, "bar": bar, "stretch": stretch, "trial": trial}
    return {**line, "verdict": "met" if measured is not None and measured <= bar else "SHORT"}


def start(quick: bool) -> tuple[Graph, Tensor]:
    """The graph with loops and 16 random features of the words of each node, `(n, 16)` float32."""
    torch.manual_seed(0)
    if quick:
        return communities(200, 500, 3), torch.randn(200, 16)
    data = citation_data("cora")
    if data.x is None:
        raise BenchmarkError("this Cora has no features x: take cora_planetoid.npz or the original files whole")
    return tidy(data.graph), data.x @ torch.randn(data.x.shape[1], 16) / 30


# --- row 9 -----------------------------------------------------------------------------------------------------------

PRODUCTS = {9.15: (28, 16, 28), 32.0: (63, 29, 63), 64.0: (106, 41, 106)}
"""By the time: the bar, the stretch, and what uniformisation took in a trial."""


def exponential(field: LinearDiffusion, x: Tensor, tau: float) -> Tensor:
    """exp(tau (A - I)) x to rounding, by the sum that uniformisation cuts short."""
    most = int(tau + 12 * tau**0.5) + 40
    shares = poisson.pmf(np.arange(most), tau)
    term, total = x, shares[0] * x
    for share in shares[1:]:
        term = term + field.matvec(term)
        total = total + share * term
    return total


def products(graph: Graph, x: Tensor) -> Iterator[dict[str, Any]]:
    """Least products for an error of 1e-6, over tolerances, of each way to the exponential; A by attention, not symmetric."""
    from solvers import solve

    torch.manual_seed(0)
    attention = EdgeAttention(16, dim=128, heads=8)
    with torch.no_grad():
        for linear in (attention.query, attention.key):
            linear.weight.copy_(3 * torch.randn(linear.weight.shape) / 4)
            linear.bias.zero_()
        field = LinearDiffusion(graph, attention.double()(graph, x.double()))
        for tau, (bar, stretch, trial) in PRODUCTS.items():
            exact = exponential(field, x.double(), tau)
            for expm in ("auto", "uniformisation", "arnoldi"):
                least = None
                for tenth in range(30, 90, 5):
                    tol = 10 ** (-tenth / 10)
                    found = solve(field, x.double(), [0.0, tau], method="exp_linear", expm=expm, rtol=tol, atol=tol * 1e-2)
                    if relative(found.y[-1], exact) <= 1e-6:
                        least = int(found.stats.nfe)
                        break
                yield judged("9 products to 1e-6", f"tau = {tau:g}, {expm}", least, bar, stretch, trial)


# --- row 10 ----------------------------------------------------------------------------------------------------------

GRADIENTS = {18.3: 7e-7, 64.0: 3.5e-6, 128.0: 4.9e-6}
"""By the time: the worst of a trial."""


def pulled(graph: Graph, parts: list[Tensor], dtype: torch.dtype, end: float, cotangent: Tensor, **options: Any) -> list[Tensor]:
    """Gradients to the weights, the start, alpha and the source."""
    from solvers import solve

    weight, x, alpha, source = (part.to(dtype).requires_grad_() for part in parts)
    y = solve(LinearDiffusion(graph, weight, alpha, source), x, [0.0, end], **options).y[-1]
    return list(torch.autograd.grad(y, (weight, x, alpha, source), cotangent.to(dtype)))


def gradients(graph: Graph, quick: bool) -> Iterator[dict[str, Any]]:
    """float32 exponentials against dopri5 at 1e-9 in float64 with its exact discrete adjoint; largest entry by largest entry."""
    torch.manual_seed(0)
    n, width = graph.num_sources, 80
    weight = torch.rand(graph.num_edges)
    weight = weight / torch.zeros(n).index_add(0, graph.target, weight)[graph.target]
    parts = [weight, torch.randn(n, width), torch.tensor(0.5), 0.1 * torch.randn(n, width)]
    cotangent = torch.randn(n, width)
    for end, trial in list(GRADIENTS.items())[: 1 if quick else None]:
        fine = pulled(
            graph, parts, torch.float64, end, cotangent, method="dopri5", rtol=1e-9, atol=1e-9, adjoint="checkpoint"
        )
        own = pulled(graph, parts, torch.float32, end, cotangent, method="exp_linear", rtol=1e-6, atol=1e-6)
        worst = max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(own, fine))
        yield judged("10 gradients of the exponential", f"T = {end:g}, to w, x0, alpha, b", worst, 1e-5, 5e-6, trial)


# --- row 20 ----------------------------------------------------------------------------------------------------------

ADAMS: tuple[tuple[str, str, float, dict[str, Any], tuple[int, float], tuple[int, float]], ...] = (
    ("AB4, h = 0.1", "explicit_adams", 0.1, {}, (130, 1e-6), (127, 2e-7)),
    ("AB-AM4, h = 0.5, iterated", "implicit_adams", 0.5, {"corrector_tol": 1.0}, (105, 5e-5), (102, 2.6e-5)),
    ("AB-AM4, h = 0.5, PECE", "implicit_adams", 0.5, {}, (105, 5e-5), (102, 2.6e-5)),
)
"""Method, step and options; bars of evaluations and error, and what a trial took and left."""


def adams(graph: Graph, x: Tensor) -> Iterator[dict[str, Any]]:
    """T = 12.1, alpha = 1/2, 16 features and 16 zeros, A fixed and of the state; float32 against dop853 at 1e-10 in float64."""
    from solvers import solve

    end = 12.1
    torch.manual_seed(0)
    attention = EdgeAttention(32, heads=4)
    with torch.no_grad():
        for linear in (attention.query, attention.key):
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
        wide = torch.cat([x, torch.zeros_like(x)], 1)
        for linear_field in (True, False):
            kind = "A fixed" if linear_field else "A of the state"

            def field(dtype: torch.dtype, linear_field: bool = linear_field) -> Any:
                made = attention.to(dtype)
                if linear_field:
                    return LinearDiffusion(graph, made(graph, wide.to(dtype)), 0.5)
                return NonlinearDiffusion(graph, made, 0.5)

            exact = solve(field(torch.float64), wide.double(), [0.0, end], method="dop853", rtol=1e-10, atol=1e-12).y[-1]
            for label, method, step, options, bars, trial in ADAMS:
                found = solve(field(torch.float32), wide, [0.0, end], method=method, dt=step, rtol=1e-6, atol=1e-6, **options)
                row = f"20 {label}"
                yield judged(row, f"{kind}: evaluations", int(found.stats.nfe), bars[0], None, trial[0])
                yield judged(row, f"{kind}: error", relative(found.y[-1], exact), bars[1], 2e-7, trial[1])


def table(quick: bool) -> Table:
    """All rows; for `quick` on a small graph, on which none is judged."""
    graph, x = start(quick)
    found = Table("what has to be reached", COLUMNS)
    found.rows = [*products(graph, x), *gradients(graph, quick), *adams(graph, x)]
    found.notes = ["errors: relative, Euclidean norm; of gradients largest error over largest entry; trial's: tried before"]
    if quick:
        found.notes.append("--quick: a small graph, on which nothing is judged")
        for row in found.rows:
            row["verdict"] = "not judged"
    return found
