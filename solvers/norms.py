"""Error norms: how large an error is in units of the tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .status import ArgumentError, ArgumentTypeError


def rms(x: Any) -> Tensor:
    """Root mean square over all elements of a tensor, maximum over the leaves of a tree (0-dim tensor)."""
    leaves = torch.utils._pytree.tree_leaves(x)
    return torch.stack([leaf.abs().square().mean().sqrt() for leaf in leaves]).amax()


def max_norm(x: Any) -> Tensor:
    """Largest absolute element (0-dim tensor)."""
    return torch.stack([leaf.abs().amax() for leaf in torch.utils._pytree.tree_leaves(x)]).amax()


class ErrorNorm:
    """|error / (atol + rtol max(|y0|, |y1|))| of each sample: 1 is an error as large as the tolerance allows.

    Args:
        layout: the state's :class:`~solvers.layout.Layout`.
        rtol, atol: numbers, or tensors broadcastable to the state (trees for tree states). Units: none, and those of y.
        norm: None for the RMS norm (maximum over leaves), or a callable from the user's tree of scaled errors to a 0-dim
            tensor (joint) or ``(B,)`` tensor.

    Not shared between solves: it keeps |y| of the last state it saw, which saves one pass over the state per step.
    """

    def __init__(self, layout: Any, rtol: Any, atol: Any, norm: Callable[[Any], Tensor] | None = None) -> None:
        self.layout = layout
        self.rtol = _tolerance(layout, rtol, "rtol")
        self.atol = _tolerance(layout, atol, "atol")
        if norm is not None and not callable(norm):
            raise ArgumentTypeError(f"norm must be callable or None, found {type(norm).__name__}")
        self.custom = norm
        self._atol = self.atol if isinstance(self.atol, Tensor) else torch.tensor(
            self.atol, dtype=layout.real_dtype, device=layout.device
        )
        self._seen: tuple[tuple[Tensor, Tensor], ...] = ()
        self._host_seen: tuple[Any, Any] = (None, None)
        numbers = isinstance(self.rtol, float) and isinstance(self.atol, float)
        self.on_host = _fits_host(layout) and norm is None and numbers
        self._host_atol = self.atol if self.on_host else None

    def _absolute(self, y: Tensor) -> Tensor:
        for seen, magnitude in self._seen:
            if seen is y:
                return magnitude
        return y.abs()

    def scale(self, y0: Tensor, y1: Tensor | None = None) -> Tensor:
        """atol + rtol max(|y0|, |y1|), in units of y, shaped like the state. Call under ``no_grad``."""
        magnitude = self._absolute(y0)
        if y1 is not None:
            end = y1.abs()
            # Both, because the next step starts from y1 if this one is accepted and from y0 if not.
            self._seen = ((y0, magnitude), (y1, end))
            magnitude = torch.maximum(magnitude, end)
        if isinstance(self.rtol, Tensor):
            return torch.addcmul(self._atol, self.rtol, magnitude)
        return torch.add(self._atol, magnitude, alpha=self.rtol)

    def host_ratio(self, error: np.ndarray, y0: np.ndarray, y1: np.ndarray) -> float:
        """Norm of ``error / scale(y0, y1)`` in numpy: for a few numbers half the time of tensor operations.

        Arrays ``(n,)`` that nobody writes to. Only where ``on_host``.
        """
        before, start = self._host_seen
        if before is not y0:
            start = np.abs(y0)
        end = np.abs(y1)
        scale = np.maximum(start, end)
        scale *= self.rtol
        scale += self._host_atol
        # What is not finite must pass without numpy's warnings, but it is rare, and silencing them is not for free.
        if not math.isfinite(float((scale + error).sum(dtype=np.float64))):
            with np.errstate(all="ignore"):
                if not (np.isfinite(scale).all() and np.isfinite(error).all()):
                    return math.inf
        error = np.divide(error, scale, dtype=np.float64)
        square = float(error.dot(error))
        # Kept for y1 only: a rejected step, the rarer case, computes |y0| again.
        self._host_seen = (y1, end)
        return math.sqrt(square / max(self.layout.width, 1)) if square < math.inf else math.inf

    def __call__(self, x: Tensor, scale: Tensor) -> Any:
        """Norm of ``x / scale``: float in joint mode, else ``(B,)``. Call under ``no_grad``."""
        return self.measure(x / scale)

    def measure(self, scaled: Tensor) -> Any:
        """Norm of an already scaled state-like tensor."""
        if self.custom is None:
            return self.layout.norm(scaled)
        return self._checked(self.custom(self.layout.unflatten(scaled)))

    def _checked(self, value: Any) -> Any:
        """What a custom norm returned, as :meth:`Layout.norm` would; raises ``ArgumentError`` for a wrong shape."""
        layout = self.layout
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        if layout.joint and shape == ():
            return float(value)
        if layout.joint or shape != (layout.batch,):
            expected = "one number" if layout.joint else f"a tensor of shape ({layout.batch},), one number per sample"
            raise ArgumentError(f"norm must return {expected}, found shape {shape}")
        return value.to(layout.real_dtype)


HOST_LIMIT = 2048
"""Elements up to which numpy's lower cost per operation pays."""


def _fits_host(layout: Any) -> bool:
    small = layout.joint and layout.is_tensor and layout.same_dtype and 0 < layout.width <= HOST_LIMIT
    return small and layout.device.type == "cpu" and not layout.dtype.is_complex


def _tolerance(layout: Any, value: Any, what: str) -> Any:
    leaves = torch.utils._pytree.tree_leaves(value)
    for leaf in leaves:
        if not isinstance(leaf, (int, float, Tensor)) or isinstance(leaf, bool):
            raise ArgumentTypeError(f"{what} must be a number or tensors like the state, found {type(leaf).__name__}")
        if isinstance(leaf, Tensor) and (leaf.is_complex() or leaf.dtype == torch.bool):
            raise ArgumentTypeError(f"{what} must be real numbers, found {leaf.dtype}")
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            raise ArgumentError(f"{what} cannot require a gradient: pass {what}.detach()")
        smallest = float(leaf.min()) if isinstance(leaf, Tensor) and leaf.numel() else leaf
        if not isinstance(smallest, Tensor) and not smallest > 0:
            hint = ": an absolute tolerance of 0 divides by 0 where y is 0, use a tiny one" if what == "atol" else ""
            raise ArgumentError(f"{what} must be positive, found {smallest}{hint}")
    return layout.broadcast(value, what)
