"""Make the stored references: python -m benchmarks.make_references [terrain] [terrain-full] [photograph] [robertson] ...

Those of the main job are scipy's BDF with the exact sparse Jacobian at 1e-9, confirmed by a method of another family:
Radau, or for the photograph, which is only mildly stiff, the explicit DOP853. They take 1, 2 and 3 minutes on one core.
Those of the stiff suite are Radau's for small systems and DOP853's for large ones, each confirmed by the BDF.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import numpy as np
import scipy
import torch
from scipy.integrate import solve_ivp

from . import references
from .problems import DiffusionProblem, photograph, terrain
from .registry import BenchmarkError, unknown
from .stiff_problems import STIFF, StiffProblem

__all__ = ["main"]


@dataclass(frozen=True)
class Plan:
    """How one reference is made: BDF's tolerance, the confirming method and its tolerance, the quantum of storage."""

    bdf: float
    second: str
    second_rtol: float
    quantum: float | None


PLANS = {
    "terrain": Plan(1e-9, "Radau", 1e-8, 2.0**-14),
    "photograph": Plan(1e-9, "DOP853", 1e-10, 2.0**-23),
    "terrain-full": Plan(1e-9, "Radau", 1e-7, 2.0**-14),
}


def build(name: str) -> DiffusionProblem:
    """The problem that reference `name` belongs to."""
    return photograph() if name == "photograph" else terrain(full=name == "terrain-full")


def integrate(problem: DiffusionProblem, method: str, rtol: float) -> np.ndarray:
    """The state at the last time by one of scipy's methods; prints what it took."""
    shape, scale = problem.y0.shape, float(problem.y0.abs().mean())

    def field(t: float, y: np.ndarray) -> np.ndarray:
        return problem.field(t, torch.from_numpy(y).view(shape)).reshape(-1).numpy()

    def jacobian(t: float, y: np.ndarray) -> object:
        return problem.field.jacobian(torch.from_numpy(y).view(shape))

    started = time.perf_counter()
    start, end = problem.times[0], problem.times[-1]
    implicit = {} if method == "DOP853" else {"jac": jacobian}
    found = solve_ivp(
        field, (start, end), problem.y0.reshape(-1).numpy(), method, [end], rtol=rtol, atol=rtol * scale, **implicit
    )
    if not found.success:
        raise BenchmarkError(f"{method} at {rtol:g} failed on {problem.name}: {found.message}")
    seconds = time.perf_counter() - started
    print(f"  {method} at {rtol:g}: {found.nfev} evaluations, {found.nlu} factorisations, {seconds:.0f} s", flush=True)
    return found.y[:, -1].reshape(shape)


STATES = {
    **dict.fromkeys(("robertson", "hires", "orego", "vdp1000", "e5", "pollution"), Plan(1e-8, "Radau", 1e-10, None)),
    "bruss1d_500": Plan(1e-8, "Radau", 1e-9, None),
    "burgers_256": Plan(1e-8, "Radau", 1e-10, None),
    "cahnhilliard_64": Plan(1e-8, "Radau", 1e-9, 2.0**-24),
    "bruss2d_64": Plan(1e-7, "DOP853", 1e-10, 2.0**-24),
    "allencahn_128": Plan(1e-6, "DOP853", 1e-10, 2.0**-24),
}
"""Of the stiff suite, with DOP853 where that is cheaper: here the second method's result is stored, and the BDF confirms it."""


def outputs(problem: StiffProblem, method: str, rtol: float) -> np.ndarray:
    """The states at all outputs ``(T-1, n)`` by one of scipy's methods; prints what it took."""
    shape = problem.y0.shape

    def field(t: float, y: np.ndarray) -> np.ndarray:
        return problem.field(t, torch.from_numpy(y).view(shape)).reshape(-1).numpy()

    more = {"jac_sparsity": problem.field.sparsity()} if problem.real and method != "DOP853" else {}
    span, marks = (problem.times[0], problem.times[-1]), problem.times[1:]
    started, atol = time.perf_counter(), rtol * problem.ratio
    found = solve_ivp(field, span, problem.y0.reshape(-1).numpy(), method, marks, rtol=rtol, atol=atol, **more)
    if not found.success:
        raise BenchmarkError(f"{method} at {rtol:g} failed on {problem.name}: {found.message}")
    print(f"  {method} at {rtol:g}: {found.nfev} evaluations, {time.perf_counter() - started:.0f} s", flush=True)
    return found.y.T


def make_states(name: str) -> None:
    """Compute, confirm, print and store one reference of the stiff suite."""
    plan, problem = STATES[name], STIFF[name]()
    print(f"{name}: {problem.title}", flush=True)
    best, other = outputs(problem, plan.second, plan.second_rtol), outputs(problem, "BDF", plan.bdf)
    scale = np.abs(best) + (np.abs(best).max(1, keepdims=True) if problem.floor is None else problem.floor)
    facts = {
        "made": f"scipy {scipy.__version__} {plan.second}, rtol {plan.second_rtol:g}",
        "confirmed": f"differs from BDF at {plan.bdf:g} by at most {float((np.abs(best - other) / scale).max()):.1e}, relative",
        "rtol": plan.second_rtol,
    }
    rows = best if plan.quantum is None else best.reshape(-1, problem.y0.shape[-1])
    path = references.store(name, rows, plan.quantum, problem.y0, facts)
    print(f"  {facts['confirmed']}; {path.name} {path.stat().st_size} bytes", flush=True)


def make(name: str) -> None:
    """Compute, confirm, print and store one reference."""
    if name in STATES:
        return make_states(name)
    plan, problem = PLANS[name], build(name)
    print(f"{name}: {problem.title}", flush=True)
    best = integrate(problem, "BDF", plan.bdf)
    unit = problem.unit

    def keep(confirmed: str) -> None:
        made = f"scipy {scipy.__version__} BDF, exact sparse Jacobian, rtol {plan.bdf:g}"
        facts = {"made": made, "confirmed": confirmed, "rtol": plan.bdf}
        path = references.store(name, best, plan.quantum, problem.y0, facts)
        print(f"  {confirmed}; {path.name} {path.stat().st_size} bytes", flush=True)

    keep("not confirmed")
    other = integrate(problem, plan.second, plan.second_rtol)
    keep(f"differs from {plan.second} at {plan.second_rtol:g} by at most {abs(best - other).max():.1e} {unit}")


def main(names: list[str]) -> int:
    """Make the named references, or all."""
    torch.set_num_threads(1)
    try:
        for name in names or [*PLANS, *STATES]:
            if name not in {**PLANS, **STATES}:
                raise unknown("reference", name, [*PLANS, *STATES])
            make(name)
    except BenchmarkError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
