"""The vector field as solvers see it: the user's function on the flat state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .layout import Layout
from .status import ArgumentError


class Field:
    """dy/dt = f(t, y, *args) on the flat state of a :class:`~solvers.layout.Layout`.

    Frozen for the length of a solve, counts nothing and holds no solver state; ``f`` is called in one place, here.

    Args:
        func: the user's ``f(t, y, *args)``.
        layout: of the state.
        args: extra arguments, passed through.
        time_dtype: dtype of the ``t`` that f sees; None: the state's real dtype.
        norm: the solve's error norm, for methods that stop an inner iteration by it.
    """

    __slots__ = ("_arrays", "_constants", "_double", "args", "func", "layout", "norm", "time_dtype")

    def __init__(
        self,
        func: Callable[..., Any],
        layout: Layout,
        args: tuple[Any, ...] = (),
        time_dtype: torch.dtype | None = None,
        norm: Any = None,
    ) -> None:
        self.func = func
        self.layout = layout
        self.args = args
        self.time_dtype = time_dtype or layout.real_dtype
        self.norm = norm
        self._arrays: dict[int, Any] = {}
        self._double = self.time_dtype == torch.float64
        self._constants: dict[tuple[float, ...], Tensor] = {}

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """f at time ``t`` (a tensor from :meth:`times`) and flat state ``y``; same shape as ``y``, and the caller's own.

        Without gradients f may answer in the same memory every time, so the answer is copied then.
        Raises ``ArgumentError`` / ``ArgumentTypeError`` if f returns another structure, shape, dtype or device.
        """
        dy = self.raw(t, y)
        return dy if torch.is_grad_enabled() else dy.clone()

    def raw(self, t: Tensor, y: Tensor) -> Tensor:
        """The same for whoever is done with the answer before f is called again: it is not copied."""
        layout = self.layout
        if layout.trivial:
            dy = self.func(t, y, *self.args)
            if type(dy) is Tensor and dy.shape == layout.shape and dy.dtype == layout.dtype and dy.device == y.device:
                return dy
        else:
            dy = self.func(t, layout.unflatten(y), *self.args)
        return layout.flatten(dy, "the value returned by f")

    def shaped(self, t: Tensor, y: Tensor) -> Tensor:
        """f on a state ``y`` in the user's shape (tensor states only)."""
        dy = self.func(t, y, *self.args)
        if type(dy) is Tensor and dy.shape == y.shape and dy.dtype == y.dtype and dy.device == y.device:
            return dy
        return self.layout.flatten(dy, "the value returned by f").view(y.shape)

    def into(self, t: Tensor, y: Tensor, out: Tensor) -> None:
        """Write f(t, y) into ``out``, which has the user's shape (tensor states only)."""
        layout = self.layout
        dy = self.func(t, layout.unflatten(y), *self.args)
        if type(dy) is Tensor and dy.shape == out.shape and dy.dtype == out.dtype:
            out.copy_(dy)
        else:
            out.copy_(layout.flatten(dy, "the value returned by f").view(out.shape))

    def times(self, t0: Any, dt: Any, nodes: tuple[float, ...]) -> tuple[Tensor, ...]:
        """Stage times ``t0 + c dt`` for c in ``nodes``, as f wants them: 0-dim in joint mode, else ``(B,)``.

        Computed in float64 and rounded once, so that float32 states at large t keep their stage times apart. Each is a
        tensor of its own that f may mark as requiring a gradient.
        """
        layout = self.layout
        if not isinstance(t0, Tensor) and not isinstance(dt, Tensor):
            if layout.device.type == "cpu":
                known = self._arrays.get(id(nodes))
                if known is None:
                    # The tuple is kept with its array, so that its id stays its own.
                    known = self._arrays[id(nodes)] = (np.array(nodes), nodes)
                values = known[0] * dt
                values += t0
                # Through numpy: three quarters of the time of torch.tensor(list) for a handful of numbers.
                return torch.from_numpy(values if self._double else values.astype(np.float32)).unbind(0)
            # Values from the host would make the device wait; a fill does not.
            return tuple(torch.full((), t0 + c * dt, dtype=self.time_dtype, device=layout.device) for c in nodes)
        c = self._nodes(nodes)
        if not layout.joint:
            c = c.unsqueeze(1)
        if isinstance(t0, Tensor):
            times = torch.addcmul(t0, c, dt) if isinstance(dt, Tensor) else t0 + c * dt
        else:
            times = t0 + c * dt
        return times.to(self.time_dtype).unbind(0)

    def time(self, t: Any) -> Tensor:
        """One time as f wants it."""
        if isinstance(t, Tensor):
            # A fresh tensor: f may mark its t as requiring a gradient.
            return t.to(self.time_dtype) if t.dtype != self.time_dtype or t.requires_grad else t.clone()
        return torch.full((), t, dtype=self.time_dtype, device=self.layout.device)

    def spectral_bound(self) -> Any:
        """The bound of |lambda| of df/dy that f knows: float in joint mode, else ``(B,)``; None if it knows none.

        Raises ``ArgumentError`` for one that is no such number.
        """
        bound = getattr(self.func, "spectral_bound", None)
        if bound is None:
            return None
        layout = self.layout
        value = torch.as_tensor(bound(), dtype=torch.float64, device=layout.device).detach()
        if value.shape not in ((), (layout.batch,)) or (layout.joint and value.dim()) or not bool((value >= 0).all()):
            expected = "a number" if layout.joint else f"a number, or ({layout.batch},) of them,"
            raise ArgumentError(f"spectral_bound() of f must return {expected} >= 0, found {value!r:.60}")
        return value.item() if layout.joint else value.expand(layout.batch)

    def within(self, start: Any, end: Any, sign: Any) -> Field:
        """This field for a step between ``start`` and ``end``, where f is discontinuous: it meets neither time, but the next one
        inside, on whichever side of the discontinuity f counts them.

        start, end: None, float, or ``(B,)`` with NaN where nothing is to be kept away from. ``sign``: of the direction of
        travel.
        """
        return _Within(self, start, end, sign)

    def renewed(self, args: tuple[Any, ...], norm: Any) -> Field:
        """The same field with other arguments and another error norm."""
        return type(self)(self.func, self.layout, args, self.time_dtype, norm)

    def _nodes(self, nodes: tuple[float, ...]) -> Tensor:
        if nodes not in self._constants:
            self._constants[nodes] = torch.tensor(nodes, dtype=torch.float64, device=self.layout.device)
        return self._constants[nodes]


class _Within(Field):
    """A field whose times keep away from one or both ends by the smallest step of their dtype."""

    __slots__ = ("_earliest", "_latest", "_sign")

    def __init__(self, field: Field, start: Any, end: Any, sign: Any) -> None:
        super().__init__(field.func, field.layout, field.args, field.time_dtype, field.norm)
        self._sign = torch.as_tensor(sign, dtype=self.time_dtype, device=field.layout.device)
        self._earliest, self._latest = self._beside(start, self._sign), self._beside(end, -self._sign)

    def _beside(self, t: Any, toward: Tensor) -> Tensor | None:
        if t is None:
            return None
        value = torch.as_tensor(t, dtype=torch.float64, device=self.layout.device).detach().to(self.time_dtype)
        return torch.nextafter(value, toward * torch.inf)

    def _cut(self, t: Tensor) -> Tensor:
        # The time moves, its gradient stays: a stage at the end of the step still follows that end.
        for bound, side in ((self._earliest, -self._sign), (self._latest, self._sign)):
            if bound is not None:
                beyond = (t.detach() - bound) * side > 0
                t = t + torch.where(beyond, bound - t.detach(), 0.0)
        return t

    def times(self, t0: Any, dt: Any, nodes: tuple[float, ...]) -> tuple[Tensor, ...]:
        return tuple(self._cut(t) for t in super().times(t0, dt, nodes))

    def time(self, t: Any) -> Tensor:
        return self._cut(super().time(t))
