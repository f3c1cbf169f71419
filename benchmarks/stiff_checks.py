"""What the stiff suite measures beside work and precision: fixed steps, exponentials, gradients, order, preconditioning."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .convergence import SPAN, Variant, errors_of, observed_order
from .running import ending
from .stiff_problems import StiffProblem
from .timing import interleaved

NOTHING = 1e-15
"""A relative tolerance beside which the absolute one is all there is."""

__all__ = [
    "Exponential",
    "FixedRun",
    "discrete_adjoint",
    "exponential",
    "fixed_run",
    "graph_step",
    "implicit_gradient",
    "multistage_order",
]


# -- fixed steps ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FixedRun:
    """Evaluations, and the largest |y - ref| at every output; none where it did not get to the end, ``ended`` says why."""

    evaluations: int
    errors: tuple[float, ...]
    ended: str


def fixed_run(problem: StiffProblem, method: str, steps: int, inner_tol: float, **options: Any) -> FixedRun:
    """``steps`` equal steps of a proximal method whose inner solver stops at a residual of Euclidean length ``inner_tol``.

    By f alone: an energy that the field has is not used, as none is in the thesis.
    """
    from solvers import solve

    absolute = inner_tol / math.sqrt(problem.y0.numel())  # of the root mean square
    times = torch.tensor(problem.times, dtype=torch.float64)
    with torch.no_grad():
        found = solve(
            problem.field, problem.y0, times, method=method, num_steps=steps, rtol=NOTHING, atol=absolute, inner_tol=1.0,
            energy=False, throw=False, max_steps=10**7, **options,
        )  # fmt: skip
    if not found.success:
        return FixedRun(int(found.stats.nfe), (), f"{ending(found)} at t = {float(found.last.t):.3g}")
    differences = (found.y[1:] - problem.reference).abs().flatten(1).amax(1)
    return FixedRun(int(found.stats.nfe), tuple(differences.tolist()), "done")


# -- exponentials -----------------------------------------------------------------------------------------------------


class Walk:
    """x' = (A - I) x, A a sparse matrix whose rows sum to 1 (``rate``), or symmetric."""

    def __init__(self, matrix: Tensor, symmetric: bool) -> None:
        self.matrix, self.symmetric = matrix, symmetric
        if not symmetric:
            self.rate = 1.0
        self.calls = 0

    def matvec(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.matrix @ x - x

    def __call__(self, t: Any, x: Tensor) -> Tensor:
        return self.matvec(x)


def random_walk(nodes: int, kind: str, generator: torch.Generator) -> Walk:
    """A random graph of mean degree 8 with self-loops: "symmetric", its normalised adjacency; "directed", attention with a half
    of the edges one way."""
    m = nodes * 4
    one, other = (torch.randint(0, nodes, (m,), generator=generator) for _ in range(2))
    back = slice(m // 2, None) if kind == "directed" else slice(None)
    loop = torch.arange(nodes)
    source, target = torch.cat([one, other[back], loop]), torch.cat([other, one[back], loop])
    if kind == "symmetric":
        degree = torch.zeros(nodes, dtype=torch.float64).index_add(0, target, torch.ones(len(target), dtype=torch.float64))
        weight = (degree[source] * degree[target]).rsqrt()
    else:
        score = torch.randn(len(source), generator=generator, dtype=torch.float64).exp()
        weight = score / torch.zeros(nodes, dtype=torch.float64).index_add(0, target, score)[target]
    matrix = torch.sparse_coo_tensor(torch.stack([target, source]), weight, (nodes, nodes)).coalesce().to_sparse_csr()
    return Walk(matrix, kind == "symmetric")


def poisson_series(walk: Walk, x: Tensor, t: float) -> Tensor:
    """exp(t (A - I)) x as the Poisson mixture of A^k x, to rounding: an independent reference."""
    weight, total = math.exp(-t), math.exp(-t) * x
    for k in range(1, int(t + 12 * math.sqrt(t) + 40)):
        x, weight = walk.matrix @ x, weight * t / k
        total = total + weight * x
    return total


@dataclass(frozen=True)
class Exponential:
    """Products, relative error in the Euclidean norm, and times faster than torchdiffeq's dopri5 (None: not there), by medians of
    interleaved CPU times."""

    products: int
    error: float
    faster: float | None


def exponential(kind: str, nodes: int, width: int = 64, end: float = 20.0, tolerance: float = 1e-6) -> Exponential:
    """``exp_linear`` on a random graph against the series and torchdiffeq's dopri5."""
    from solvers import solve

    from .registry import installed

    generator = torch.Generator().manual_seed(0)
    walk = random_walk(nodes, kind, generator)
    x = torch.randn(nodes, width, generator=generator, dtype=torch.float64)
    exact = poisson_series(walk, x, end)
    times = torch.tensor([0.0, end], dtype=torch.float64)
    options: dict[str, Any] = {"rtol": tolerance, "atol": 1e-2 * tolerance}
    ours = torch.no_grad()(lambda: solve(walk, x, times, method="exp_linear", **options))
    found, products = ours(), walk.calls
    faster = None
    if installed("torchdiffeq"):
        import torchdiffeq

        theirs = torch.no_grad()(lambda: torchdiffeq.odeint(walk, x, times, method="dopri5", **options))
        taken = interleaved({"ours": ours, "theirs": theirs}, 3, warm=False)
        faster = taken["theirs"].median_cpu / taken["ours"].median_cpu
    return Exponential(products, float((found.y[-1] - exact).norm() / exact.norm()), faster)


# -- gradients --------------------------------------------------------------------------------------------------------


class Conductivities:
    """G1: diffusion on a ring of 64 cells whose logarithmic conductivities are the parameters."""

    end, steps = 0.02, 40

    def __init__(self) -> None:
        generator, n = torch.Generator().manual_seed(0), 64
        place = torch.arange(n, dtype=torch.float64) / n
        self.cells = n
        self.y0 = torch.sin(2 * math.pi * place) + 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
        self.theta = 0.3 * torch.randn(n, generator=generator, dtype=torch.float64)
        self.goal = 0.3 * torch.cos(2 * math.pi * place)

    def field(self, t: Any, y: Tensor, theta: Tensor) -> Tensor:
        flow = theta.exp() * self.cells**2 * (y.roll(-1) - y)
        return flow - flow.roll(1)

    @property
    def curvature(self) -> float:
        return 4 * math.exp(float(self.theta.max())) * self.cells**2


class Attention:
    """G2: diffusion on a random graph of 200 nodes x 8 features whose weights are attention, its matrices the parameters."""

    end, steps, curvature = 6.0, 12, 2.5

    def __init__(self) -> None:
        generator, n, d = torch.Generator().manual_seed(0), 200, 8
        one, other = (torch.randint(0, n, (3 * n,), generator=generator) for _ in range(2))
        loop = torch.arange(n)
        self.source, self.target = torch.cat([one, other, loop]), torch.cat([other, one, loop])
        self.theta = torch.randn(2, d, d, generator=generator, dtype=torch.float64) / math.sqrt(d)
        self.y0 = torch.randn(n, d, generator=generator, dtype=torch.float64)
        self.goal = 0.3 * torch.randn(n, d, generator=generator, dtype=torch.float64)

    def field(self, t: Any, x: Tensor, theta: Tensor) -> Tensor:
        queries, keys = x @ theta[0], x @ theta[1]
        score = (queries[self.target] * keys[self.source]).sum(1) / math.sqrt(x.shape[1])
        score = (score - score.detach().max()).exp()
        total = torch.zeros(len(x), dtype=x.dtype).index_add(0, self.target, score)
        weight = score / total[self.target]
        return torch.zeros_like(x).index_add(0, self.target, weight[:, None] * x[self.source]) - x


CASES: dict[str, Callable[[], Any]] = {"G1": Conductivities, "G2": Attention}


class Counted:
    """A case's field that counts its calls, and the backward passes through them."""

    def __init__(self, case: Any) -> None:
        self.case, self.calls, self.pulls = case, 0, 0

    def __call__(self, t: Any, y: Tensor, theta: Tensor) -> Tensor:
        self.calls += 1
        out = self.case.field(t, y, theta)
        if out.requires_grad:
            out.register_hook(self._pulled)
        return out

    def _pulled(self, _: Tensor) -> None:
        self.pulls += 1


def solved(field: Any, case: Any, theta: Tensor, y0: Tensor, **options: Any) -> Tensor:
    from solvers import solve

    times = torch.tensor([0.0, case.end], dtype=torch.float64)
    return solve(field, y0, times, args=(theta,), **options).y[-1]


def loss(case: Any, y: Tensor) -> Tensor:
    return (y - case.goal).square().sum() / 2


def fixed_options(method: str, case: Any, tol: float, backward: float) -> dict[str, Any]:
    """Fixed steps with the inner equations solved to an absolute ``tol``."""
    absolute = tol / math.sqrt(case.y0.numel())
    return {
        "method": method, "num_steps": case.steps, "rtol": NOTHING, "atol": absolute, "inner_tol": 1.0, "backward_tol": backward,
        "inner": "newton_krylov",
    }  # fmt: skip


@dataclass(frozen=True)
class Gradient:
    """Error of the directional derivative against central differences, relative; calls and backward passes; memory kept for
    the backward pass, of this and of the unrolled loop, in bytes."""

    error: float
    calls: int
    pulls: int
    memory: int
    unrolled: int


def implicit_gradient(name: str, method: str, tol: float, backward: float) -> Gradient:
    """The gradient of fixed steps by the implicit function theorem against differences of the same map at 1e-12."""
    case = CASES[name]()
    direction = torch.randn(case.theta.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    direction /= direction.norm()
    tight, width, values = fixed_options(method, case, 1e-12, 1e-12), 1e-4, []
    for sign in (1, -1):
        with torch.no_grad():
            y = solved(case.field, case, case.theta + sign * width * direction, case.y0, **tight)
            values.append(float(loss(case, y)))
    slope = (values[0] - values[1]) / (2 * width)
    field = Counted(case)
    theta, y0 = case.theta.clone().requires_grad_(), case.y0.clone().requires_grad_()
    options = fixed_options(method, case, tol, backward)
    y = solved(field, case, theta, y0, **options)
    calls = field.calls
    gradient, _ = torch.autograd.grad(loss(case, y), (theta, y0))
    error = abs(float((gradient * direction).sum()) - slope) / abs(slope)
    # The same gradient from the states alone, f evaluated again on the way back.
    _, memory = kept(lambda: solved(case.field, case, theta, y0, adjoint="checkpoint", **options))
    _, unrolled = kept(lambda: chebyshev_loop(case, theta, y0, 1e-6))
    return Gradient(error, calls, field.pulls, memory, unrolled)


def tensors() -> list[Tensor]:
    """Those that Python holds and that have a storage of their own, as sparse ones have not."""
    return [x for x in gc.get_objects() if type(x) is Tensor and x.layout is torch.strided]


def kept(run: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The result, and the bytes that are kept for its backward pass: by autograd, and in tensors that Python holds."""
    seen: dict[int, int] = {}
    gc.collect()
    before = {x.untyped_storage().data_ptr() for x in tensors()}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = run()
    gc.collect()
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors()}
    seen |= {place: size for place, size in held.items() if place not in before}
    return y, sum(seen.values())


def chebyshev_loop(case: Any, theta: Tensor, y0: Tensor, tol: float) -> Tensor:
    """Backward Euler steps by Chebyshev's iteration on [1, L], recorded: what differentiating through a loop costs."""
    g = case.end / case.steps
    largest = 1 + 1.02 * g * case.curvature
    middle, half = (largest + 1) / 2, (largest - 1) / 2
    before, y = y0, y0
    for _ in range(case.steps):
        z, rho = 2 * y - before, half / middle
        r = z - y - g * case.field(None, z, theta)
        step = -r / middle
        while float(r.detach().norm()) > tol:
            z = z + step
            r = z - y - g * case.field(None, z, theta)
            rho_next = 1 / (2 * middle / half - rho)
            step, rho = rho_next * rho * step - (2 * rho_next / half) * r, rho_next
        before, y = y, z
    return y


@dataclass(frozen=True)
class AdjointRun:
    """Error against the exact discrete gradient, relative, the worse of theta and y0; backward passes per call."""

    error: float
    ratio: float


def discrete_adjoint(name: str, backward: float, rtol: float = 1e-5) -> AdjointRun:
    """The checkpointed adjoint of adaptive ``prox_bdf`` at ``backward`` against itself at 1e-12."""
    case = CASES[name]()
    found: list[tuple[Tensor, Tensor, float]] = []
    for tol in (backward, 1e-12):
        field = Counted(case)
        theta, y0 = case.theta.clone().requires_grad_(), case.y0.clone().requires_grad_()
        y = solved(
            field, case, theta, y0, method="prox_bdf", inner="newton_krylov", adjoint="checkpoint", rtol=rtol, atol=1e-2 * rtol,
            backward_tol=tol,
        )  # fmt: skip
        calls = field.calls
        ours, start = torch.autograd.grad(loss(case, y), (theta, y0))
        found.append((ours, start, field.pulls / calls))
    (*ours_two, ratio), (*exact_two, _) = found
    return AdjointRun(max(float((x - exact).norm() / exact.norm()) for x, exact in zip(ours_two, exact_two)), ratio)


# -- order, preconditioning -------------------------------------------------------------------------------------------


def multistage_order(order: int) -> float:
    """Observed on a nonlinear system of two equations."""
    return observed_order(errors_of(Variant(f"prox_multistage{order}", order), SPAN, 200))


@dataclass(frozen=True)
class Hubs:
    """dy/dt = (A - D) y, A with a 1 for every edge from ``source`` to ``target``, D their number into each node."""

    source: Tensor
    target: Tensor
    degree: Tensor

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        return torch.zeros_like(y).index_add(0, self.target, y[self.source]) - self.degree * y

    def jacobian_diagonal(self, t: Any, y: Tensor) -> Tensor:
        return -self.degree  # the graph has no loops


def graph_step(nodes: int = 5000, g: float = 10.0, known: bool = False, **options: Any) -> int:
    """Evaluations of one step of backward Euler of size ``g`` on the Laplacian of a power-law graph, by Newton and MINRES or
    GMRES to 1e-6 of the first residual; ``known``: whether the field tells its diagonal."""
    from solvers import solve

    generator = torch.Generator().manual_seed(0)
    share = torch.arange(1, nodes + 1, dtype=torch.float64) ** -0.8
    one, other = (torch.multinomial(share, 4 * nodes, replacement=True, generator=generator) for _ in range(2))
    one, other = one[one != other], other[one != other]
    source, target = torch.cat([one, other]), torch.cat([other, one])
    degree = torch.zeros(nodes, dtype=torch.float64).index_add(0, target, torch.ones(len(target), dtype=torch.float64))
    hubs = Hubs(source, target, degree)
    field: Any = hubs if known else hubs.__call__
    y0 = torch.randn(nodes, generator=generator, dtype=torch.float64)
    enough = 1e-6 * g * float(field(None, y0).norm()) / math.sqrt(nodes)
    with torch.no_grad():
        found = solve(
            field, y0, (0.0, g), method="prox_euler", num_steps=1, inner="newton_krylov", rtol=NOTHING, atol=enough,
            inner_tol=1.0, **options,
        )  # fmt: skip
    return int(found.stats.nfe)
