"""The solution between the steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .status import ArgumentError


class DenseOutput:
    """Continuous extension of a whole solve: every step's own interpolant.

    Args:
        method: interpolates one step.
        layout: of the state.
        pieces: the accepted steps (``solvers.loop.Piece``), in the order of travel.
        start, end: of the solved interval, float or ``(B,)``.
    """

    def __init__(self, method: Any, layout: Any, pieces: list[Any], start: Any, end: Any, y0: Tensor) -> None:
        self.method, self.layout, self.pieces, self.y0 = method, layout, pieces, y0
        self.device = layout.device
        shape = () if layout.joint else (layout.batch,)
        self.start = torch.as_tensor(start, dtype=torch.float64, device=self.device).expand(shape)
        self.end = torch.as_tensor(end, dtype=torch.float64, device=self.device).expand(shape)
        self.sign = torch.where(self.end >= self.start, 1.0, -1.0).to(torch.float64)
        self.nodes = self._nodes()

    def _nodes(self) -> Tensor:
        """End of every piece in the direction of travel, ``(S,)`` or ``(B, S)``; samples that did not move repeat theirs."""
        if not self.pieces:
            return (self.start * self.sign).unsqueeze(-1)[..., :0]
        if self.layout.joint:
            return torch.tensor([p.t1 for p in self.pieces], dtype=torch.float64, device=self.device) * self.sign
        ends = torch.stack([torch.where(p.accept, p.t1, p.t) for p in self.pieces], dim=1)
        return (ends * self.sign.unsqueeze(1)).contiguous()

    def __call__(self, t: Any, derivative: int = 0) -> Any:
        """The state (or its ``derivative``-th derivative in t) at ``t``.

        ``t``: a number or 0-dim tensor (gives the state's own shape), ``(k,)``, or ``(B, k)`` in the batched modes (give
        ``(k, *y0.shape)``). Raises ``ArgumentError`` outside the solved interval.
        """
        if derivative not in (0, 1, 2):
            raise ArgumentError(f"derivative must be 0, 1 or 2, found {derivative!r}")
        times = torch.as_tensor(t, dtype=torch.float64, device=self.device)
        alone = times.dim() == 0
        wanted = times.reshape(1) if alone else times
        if not self.layout.joint:
            wanted = (wanted.expand(self.layout.batch, -1) if wanted.dim() == 1 else wanted).T
        if wanted.dim() != (1 if self.layout.joint else 2) or wanted.shape[1:] != self.start.shape:
            expected = "(k,)" if self.layout.joint else "(k,) or (B, k)"
            raise ArgumentError(f"t of dense output must have shape {expected}, found {tuple(times.shape)}")
        self._check(wanted.detach())
        flat = self._evaluate(wanted, derivative)
        return self.layout.unflatten(flat[0] if alone else flat)

    def _check(self, t: Tensor) -> None:
        slack = 1e-12 * (self.start.abs() + self.end.abs())
        outside = ~(((t - self.start) * self.sign >= -slack) & ((self.end - t) * self.sign >= -slack))
        if bool(outside.any()):
            raise ArgumentError(
                f"t = {t[outside].flatten()[0].item():.17g} of dense output is outside the solved interval "
                f"[{self.start.flatten()[0].item():.6g}, {self.end.flatten()[0].item():.6g}]"
            )

    def _evaluate(self, t: Tensor, derivative: int) -> Tensor:
        """``t``: ``(k,)`` or ``(k, B)``. Each piece is evaluated once, at all its times together."""
        if not self.pieces:
            state = self.y0 if derivative == 0 else torch.zeros_like(self.y0)
            return state.expand(len(t), *state.shape)
        keys = t.detach() * self.sign
        if self.layout.joint:
            index = torch.searchsorted(self.nodes, keys).clamp(max=len(self.pieces) - 1)
        else:
            index = torch.searchsorted(self.nodes, keys.T.contiguous()).T.clamp(max=len(self.pieces) - 1)
        blocks, places = [], []
        for number in index.unique().tolist():
            here = index == number
            rows = here if self.layout.joint else here.any(1)
            place = rows.nonzero().squeeze(1)
            block = self._piece(number, t[place], None if self.layout.joint else here[place], derivative)
            blocks.append(block)
            places.append(place)
        if self.layout.joint:
            order = torch.argsort(torch.cat(places))
            return torch.cat(blocks)[order]
        result = torch.zeros((len(t), *self.layout.shape), dtype=self.layout.dtype, device=self.device)
        for block, place in zip(blocks, places, strict=True):
            result = result.index_add(0, place, block)
        return result

    def _piece(self, number: int, t: Tensor, here: Tensor | None, derivative: int) -> Tensor:
        piece = self.pieces[number]
        if here is None:
            return self.method.interpolate(piece.dense, (t - piece.lo) / piece.h, derivative)
        length = torch.where(piece.h == 0, 1.0, piece.h)
        theta = torch.where(here, (t - piece.lo) / length, 0.0)
        values = self.method.interpolate(piece.dense, theta, derivative)
        mask = self.layout.per_row(here).unsqueeze(-1)
        return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
