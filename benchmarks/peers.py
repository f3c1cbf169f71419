"""Other solvers of the same problems. A peer is one entry; one that is not installed is named as absent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .diffusion import sparsity
from .problems import DiffusionProblem
from .registry import PEERS, installed
from .running import Outcome, TimedField
from .timing import Deadline, OutOfTime

__all__ = ["Peer"]

DENSE_LIMIT = 2000  # unknowns above which a solver that factorises a dense Jacobian is not run


@dataclass(frozen=True)
class Peer:
    """A solver from another package: `solve(problem, deadline)`; run on problems of at most `largest` unknowns."""

    name: str
    package: str
    extra: str
    solve: Callable[[DiffusionProblem, Deadline], Outcome]
    largest: int | None = None

    @property
    def absent(self) -> str | None:
        """Why it cannot run here, or None."""
        if installed(self.package):
            return None
        return f'absent: pip install "proxode[{self.extra}]"'

    def attempt(self, problem: DiffusionProblem, deadline: Deadline) -> Outcome:
        """`solve`, with an error of the other package told in the table in place of ending the run."""
        try:
            return self.solve(problem, deadline)
        except Exception as error:  # whatever a foreign package raises belongs into its line of the table
            return Outcome(None, 0, failed=f"{type(error).__name__}: {error}")

    def fits(self, problem: DiffusionProblem) -> bool:
        return self.largest is None or problem.unknowns <= self.largest


def torchdiffeq_dopri5(problem: DiffusionProblem, deadline: Deadline) -> Outcome:
    """torchdiffeq's dopri5, its steps counted by its own call-backs."""
    import torchdiffeq

    timed = TimedField(problem.field, deadline.start())
    steps = {"accepted": 0, "rejected": 0}

    def count(kind: str) -> Callable[..., None]:
        def add(t: Any, y: Any, dt: Any) -> None:
            steps[kind] += 1

        return add

    timed.callback_accept_step, timed.callback_reject_step = count("accepted"), count("rejected")  # type: ignore[attr-defined]
    times = torch.tensor(problem.times, dtype=torch.float64, device=problem.y0.device)
    try:
        with torch.no_grad():
            y = torchdiffeq.odeint(timed, problem.y0, times, rtol=problem.rtol, atol=problem.atol, method="dopri5")
    except OutOfTime as late:
        return Outcome(None, timed.calls, steps["accepted"], steps["rejected"], stopped_at=late.t)
    return Outcome(y[1:], timed.calls, steps["accepted"], steps["rejected"])


def pattern(field: Any, start: torch.Tensor) -> dict[str, Any]:
    """The option that tells scipy's implicit methods where the Jacobian is not 0, where the field knows."""
    if hasattr(field, "sparsity"):
        return {"jac_sparsity": field.sparsity()}
    return {"jac_sparsity": sparsity(field.jacobian(start))} if hasattr(field, "jacobian") else {}


def scipy_method(method: str) -> Callable[[DiffusionProblem, Deadline], Outcome]:
    """One of scipy's stiff methods; BDF and Radau difference the Jacobian along its sparsity pattern."""

    def solve(problem: DiffusionProblem, deadline: Deadline) -> Outcome:
        from scipy.integrate import solve_ivp

        shape = problem.y0.shape
        start = problem.y0.cpu()
        timed = TimedField(problem.field, deadline.start())
        known = {} if method == "LSODA" else pattern(problem.field, start)

        def field(t: float, y: np.ndarray) -> np.ndarray:
            return timed(t, torch.from_numpy(y).view(shape)).reshape(-1).numpy()

        try:
            found = solve_ivp(
                field,
                (problem.times[0], problem.times[-1]),
                start.reshape(-1).numpy(),
                method,
                dense_output=True,
                rtol=problem.rtol,
                atol=problem.atol,
                **known,
            )
        except OutOfTime as late:
            return Outcome(None, timed.calls, stopped_at=late.t)
        if not found.success:
            return Outcome(None, timed.calls, len(found.t) - 1, failed=found.message)
        y = torch.from_numpy(np.stack([found.sol(t) for t in problem.times[1:]])).view(-1, *shape)
        return Outcome(y, timed.calls, len(found.t) - 1)

    return solve


def sundae_cvode(**options: Any) -> Callable[[DiffusionProblem, Deadline], Outcome]:
    """SUNDIALS' CVODE, BDF with the linear solver of ``options``, through scikit-sundae."""

    def solve(problem: DiffusionProblem, deadline: Deadline) -> Outcome:
        from sksundae.cvode import CVODE

        shape = problem.y0.shape
        timed = TimedField(problem.field, deadline.start())

        def field(t: float, y: np.ndarray, change: np.ndarray) -> None:
            change[:] = timed(t, torch.from_numpy(np.array(y)).view(shape)).reshape(-1).numpy()

        outputs = len(problem.times) - 1  # CVODE gives every step when asked for one output, the last of them at its time
        solver = CVODE(field, method="BDF", rtol=problem.rtol, atol=problem.atol, max_num_steps=10**6, **options)
        try:
            found = solver.solve(np.array(problem.times), problem.y0.cpu().reshape(-1).numpy())
        except OutOfTime as late:
            return Outcome(None, timed.calls, stopped_at=late.t)
        if not found.success:
            return Outcome(None, timed.calls, failed=str(found.message))
        return Outcome(torch.from_numpy(np.array(found.y[-outputs:])).view(-1, *shape), timed.calls)

    return solve


for entry in (
    Peer("torchdiffeq-dopri5", "torchdiffeq", "bench", torchdiffeq_dopri5),
    Peer("scipy-bdf", "scipy", "bench", scipy_method("BDF")),
    Peer("scipy-radau", "scipy", "bench", scipy_method("Radau"), largest=DENSE_LIMIT),
    Peer("scipy-lsoda", "scipy", "bench", scipy_method("LSODA"), largest=DENSE_LIMIT),
    Peer("cvode-gmres", "sksundae", "peers", sundae_cvode(linsolver="gmres", krylov_dim=50)),
    Peer("cvode-dense", "sksundae", "peers", sundae_cvode(linsolver="dense"), largest=400),
):
    PEERS.add(entry.name, entry)
