"""Vectors to probe a problem with: the same for a sample wherever it stands in a batch, and in every run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def waves(layout: Any, like: Tensor, rate: float) -> Tensor:
    """A state that holds every frequency, the same for a sample wherever it stands in a batch; another for another rate."""
    count = torch.arange(layout.width, device=like.device, dtype=torch.float64)
    if not layout.joint:
        count = count + layout.width * _rank(layout).unsqueeze(-1)
    return torch.cos(rate * count * count).to(like.dtype)


def signs(layout: Any, like: Tensor) -> Tensor:
    """1 or -1, as good as at random, for every number of one state or of several side by side."""
    part = waves(layout, like.real if like.is_complex() else like, 0.7)
    return torch.where(part < 0, -1.0, 1.0).to(part).tile(like.shape[-1] // max(layout.width, 1))


def _rank(layout: Any) -> Tensor:
    """Position of every row within its sample, ``(R,)``."""
    if layout.index is None:
        return torch.zeros(layout.rows, device=layout.device)
    order = torch.argsort(layout.index, stable=True)
    sizes = torch.bincount(layout.index, minlength=layout.batch)
    first = torch.cumsum(sizes, 0) - sizes
    rank = torch.arange(layout.rows, device=layout.device) - first[layout.index[order]]
    return torch.empty_like(rank).index_copy_(0, order, rank)
