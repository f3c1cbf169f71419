"""What a method is: a pure step from one state to the next, and an interpolant over it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..registry import Registry
from ..status import ArgumentError


class StepOut(NamedTuple):
    """What one attempted step gives.

    y1: the state at the end, flat. error: an estimate of its local error (units of y, detached, flat), a tuple of those
    for the orders (k-1, k, k+1) of a method of variable order, whatever else the method's own ``ratio`` takes, or None.
    dense: whatever ``interpolate`` needs. state: the method's state if the step is accepted. work: calls of f made.
    status: None if all went well, else a :class:`~solvers.status.Status` (joint) or ``(B,)`` int8 tensor of them that is
    ``SUCCESS`` (0) where it went well; a failing code rejects the step. inner: inner iterations, int or ``(B,)``. algebra:
    the :class:`~solvers.optim.Algebra` that it took, or None. spent: of a step made of several methods' steps, the calls of f
    by the method's name.
    """

    y1: Tensor
    error: Any
    dense: Any
    state: Any
    work: int
    status: Any = None
    inner: Any = 0
    algebra: Any = None
    spent: Any = None


class Method(ABC):
    """A one-step or multistep formula. Instances are frozen dataclasses without any per-solve data.

    Keyword-only dataclass fields are the options that ``solve`` accepts for it.

    What an implementation may rely on, and must keep:

    1. ``t0`` and ``dt`` are Python floats in joint mode, or 0-dim float64 tensors when a gradient to ``t`` is wanted;
       ``(B,)`` float64 tensors in the batched modes. ``dt < 0`` integrates backwards. ``dt`` is 0 for frozen samples.
    2. ``step`` is pure: the same arguments give the same result; a rejected step is repeated with another ``dt`` and the
       same ``state``. Workspaces may live in the state as long as that stays true.
    3. A state is a nest of tuples. Tensor leaves are state-like (``layout.shape``) or, in the batched modes, ``(B,)``;
       joint mode also holds Python numbers. History is a tuple of tensors, so that steps share them.
    4. Whoever calls f counts the call in ``work``.
    5. Under ``torch.is_grad_enabled()`` nothing that enters ``y1``, ``dense`` or ``state`` is computed in place.
    """

    name: str
    order: int
    error_order: int | None
    """Exponent of dt in the error estimate (embedded order + 1), or None without an estimate."""
    reference: str
    implicit: ClassVar[bool] = False
    one_step: ClassVar[bool] = True
    """Whether ``state`` can be rebuilt from (t, y) alone, so that a replay need not store it."""
    variable_order: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False
    """Whether values of the state decide what an explicit step does, so that no transform of torch.func can follow it."""
    demands: ClassVar[Any] = None
    """The protocol of :mod:`~solvers.problem` that f has to keep; None: any f will do."""
    exact: ClassVar[bool] = False
    """Whether its steps have no error of discretisation, so that the first may be as long as the solve."""
    graded_failure: ClassVar[bool] = False
    """Whether ``ratio`` says by how much a failed step was too long; else it is shortened as far as may be."""
    real_limit: float = 1.0
    """About how large -dt lambda may be for y' = lambda y; only judges whether an explicit method was held back by it."""
    remedy: ClassVar[str] = "smaller steps"
    """What helps where the equations of its step were not solved."""
    controller: ClassVar[str] = "i"
    """Name of the controller that steers it unless the user chooses one."""

    def choose_inner(self, inner: Any) -> Any:
        """The inner solver that ``inner`` (a name, an instance or "auto") means here; None if the method has none.

        Raises ``ArgumentError`` where one is asked for in vain.
        """
        if inner != "auto":
            raise ArgumentError(f"method {self.name!r} has no inner solver: leave inner={inner!r} away")
        return None

    def at_fixed_steps(self) -> Method:
        """The method for steps that cannot be made smaller."""
        return self

    def check(self, layout: Any) -> None:
        """Raise ``UnsupportedError`` / ``ArgumentError`` for a state that the method can't take; calls no f."""
        return None

    @abstractmethod
    def init(self, field: Any, t0: Any, dt: Any, y0: Tensor, f0: Tensor | None) -> Any:
        """State for a (re)start at ``t0``; ``f0 = f(t0, y0)`` if it is known. Calls no f."""

    @abstractmethod
    def step(self, field: Any, t0: Any, dt: Any, y0: Tensor, state: Any, active: Any) -> StepOut:
        """Attempt one step. ``active``: True, or the ``(B,)`` mask of samples that still move."""

    def prepare(self, field: Any, dense: Any) -> tuple[Any, int]:
        """Complete ``dense`` for interpolation, with the calls of f that took; called once per step with outputs."""
        return dense, 0

    def replay(
        self, field: Any, t0: Any, dt: Any, y0: Tensor, state: Any, active: Any, interior: bool
    ) -> StepOut:
        """An accepted step once more, under autograd, for an adjoint: only ``y1`` and ``state`` are used and, if outputs
        lie in its ``interior``, ``dense``, which is prepared then. ``state``: that of the step, or None for one-step methods.
        """
        if state is None:
            state = self.init(field, t0, dt, y0, None)
        out = self.step(field, t0, dt, y0, state, active)
        if not interior:
            return out
        dense, work = self.prepare(field, out.dense)
        return out._replace(dense=dense, work=out.work + work)

    @abstractmethod
    def interpolate(self, dense: Any, theta: Tensor, derivative: int = 0) -> Tensor:
        """The continuous extension at ``t0 + theta dt``.

        ``theta``: ``(n,)`` (joint) or ``(n, B)``, float64. Returns ``(n, *layout.shape)``; with ``derivative`` d the d-th
        derivative in t.
        """

    def snapshot(self, dense: Any) -> Any:
        """A prepared ``dense`` that stays valid after later steps (workspaces copied)."""
        return dense

    def ratio(self, norm: Any, y0: Tensor, out: StepOut) -> Any:
        """Error of the step in units of the tolerance (float or ``(B,)``); a tuple, one per order, if ``out.error`` is.

        ``norm``: the solve's :class:`~solvers.norms.ErrorNorm`. Called under ``no_grad``, for adaptive steps only, so a
        method may put into ``out.error`` whatever lets it compute the estimate here.
        """
        scale = norm.scale(y0, out.y1)
        if isinstance(out.error, tuple):
            return tuple(norm(e, scale) for e in out.error)
        return norm(out.error, scale)


class TableauMethod(Method):
    """A method that is what its ``tableau`` says."""

    tableau: Any

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.tableau.name

    @property
    def order(self) -> int:  # type: ignore[override]
        return self.tableau.order

    @property
    def error_order(self) -> int | None:  # type: ignore[override]
        return self.tableau.error_order

    @property
    def reference(self) -> str:  # type: ignore[override]
        return self.tableau.reference


def number(x: Any) -> Any:
    """Without a gradient: a float in joint mode, else ``(B,)``."""
    if not isinstance(x, Tensor):
        return x
    return x.item() if x.dim() == 0 else x.detach()


def inverse(dt: Any) -> Any:
    """1 / dt, 0 where dt is 0."""
    if not isinstance(dt, Tensor):
        return 1.0 / dt if dt else 0.0
    still = dt == 0
    return torch.where(still, 0.0, 1.0 / torch.where(still, 1.0, dt))


METHODS: Registry[Method] = Registry("method")
