"""Edges of graphs made from nothing: grids, and nearest neighbours of points."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from .errors import ArgumentError

__all__ = ["grid_edges", "knn_edges"]


def grid_edges(shape: Sequence[int], periodic: bool | Sequence[bool], device: torch.device | str | None) -> Tensor:
    """Both directions between neighbours along each axis, nodes numbered with the last axis fastest; sorted by target."""
    shape = tuple(int(n) for n in shape)
    wraps = (bool(periodic),) * len(shape) if isinstance(periodic, bool) else tuple(bool(p) for p in periodic)
    if not shape or min(shape) < 1:
        raise ArgumentError(f"shape must have one positive length an axis, not {shape}")
    if len(wraps) != len(shape):
        raise ArgumentError(f"periodic has {len(wraps)} entries for {len(shape)} axes: give a bool, or one for each")
    nodes = torch.arange(math.prod(shape), device=device).reshape(shape)
    sources, targets = [], []
    for axis, (length, wrap) in enumerate(zip(shape, wraps)):
        if length == 1:
            continue
        for step in (1, -1):
            source = torch.roll(nodes, step, axis)
            inside = slice(None) if wrap else slice(1, None) if step == 1 else slice(None, -1)
            place = (slice(None),) * axis + (inside,)
            sources.append(source[place].reshape(-1))
            targets.append(nodes[place].reshape(-1))
    if not sources:
        return torch.empty(2, 0, dtype=torch.int64, device=device)
    edges = torch.stack([torch.cat(sources), torch.cat(targets)])
    return edges[:, torch.argsort(edges[1], stable=True)]


def knn_edges(points: Tensor, k: int) -> Tensor:
    """An edge from each of the ``k`` nearest other points to each point; sorted by target, nearest first."""
    if points.dim() != 2:
        raise ArgumentError(f"points must have shape (n, dimensions), not {tuple(points.shape)}")
    count = points.shape[0]
    if not 1 <= k < max(count, 1):
        raise ArgumentError(f"k = {k} neighbours among {count} points: k must be from 1 to {count - 1}")
    places = points.detach().cpu().double().numpy()
    if not np.isfinite(places).all():
        raise ArgumentError("points hold NaN or infinity: remove these rows first")
    _, found = cKDTree(places).query(places, k=k + 1)
    # Among coincident points a point need not be the first of its own neighbours, nor among those returned at all.
    own = found == np.arange(count)[:, None]
    own[~own.any(axis=1), -1] = True
    neighbours = found[~own].reshape(count, k)
    targets = np.repeat(np.arange(count), k)
    return torch.from_numpy(np.stack([neighbours.reshape(-1), targets])).to(points.device, torch.int64)
