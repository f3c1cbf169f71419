"""A solve as a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .api import check_options, solve
from .solution import Stats
from .status import ArgumentError, ArgumentTypeError


class ODEBlock(torch.nn.Module):
    """``block(y0, *args)`` is ``solve(field, y0, t, args=args, **solve_options).y``: ``(T, *y0.shape)`` for every leaf.

    Args:
        field: f, called as ``f(t, y, *args)``; a module becomes a submodule, so that its parameters are the block's.
        t: output times as for :func:`~solvers.solve`. A ``Parameter`` is learned; anything else becomes a float64
            buffer, which a change of the block's dtype leaves alone.
        **solve_options: keywords of :func:`~solvers.solve` except ``args``. Tensors among them move with the block.

    Attributes:
        stats, status, message: of the last solve, None before the first. They hold no graph.

    Raises what ``solve`` raises, as soon as it can be known: choices when the block is built, shapes when it is called.
    Modules inside ``jumps`` or ``save`` are used, but their parameters are not the block's.
    """

    t: Tensor

    def __init__(self, field: Callable[..., Any], t: Any, **solve_options: Any) -> None:
        super().__init__()
        if "args" in solve_options:
            raise ArgumentError("args belong to the call of the block, found them among its options: block(y0, *args)")
        check_options(field, **solve_options)
        self.field = field
        if isinstance(t, torch.nn.Parameter):
            self.t = t
        else:
            self.register_buffer("t", _as_times(t))
        self.options = {name: value for name, value in solve_options.items() if not isinstance(value, Tensor)}
        self.tensor_options = [name for name in solve_options if name not in self.options]
        for name in self.tensor_options:
            self.register_buffer(f"option_{name}", solve_options[name], persistent=False)
        self.stats: Stats | None = None
        self.status: Tensor | None = None
        self.message: str | None = None

    def forward(self, y0: Any, *args: Any) -> Any:
        """The solution from ``y0`` at ``t``."""
        tensors = {name: getattr(self, f"option_{name}") for name in self.tensor_options}
        solution = solve(self.field, y0, self.t, args=args, **self.options, **tensors)
        self.stats, self.status, self.message = solution.stats, solution.status, solution.message
        return solution.y

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ODEBlock:
        times = self.t
        super()._apply(fn, recurse)
        # Half precision would move the times; they follow the block to its device only.
        if not isinstance(times, torch.nn.Parameter) and self.t.dtype != times.dtype:
            self.t = times.to(self.t.device)
        return self

    def extra_repr(self) -> str:
        shown = [f"t: {tuple(self.t.shape)}", *(f"{name}={value!r}" for name, value in self.options.items())]
        return ", ".join(shown + self.tensor_options)


def _as_times(t: Any) -> Tensor:
    try:
        return torch.as_tensor(t, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentTypeError(f"t must be a tensor or a sequence of numbers, found {t!r:.60}") from None
