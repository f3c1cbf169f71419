"""Stored reference solutions: small, checked against the start they belong to, and carrying how they were made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .registry import BenchmarkError

__all__ = ["FOLDER", "Reference", "load", "store"]

FOLDER = Path(__file__).parent / "references"
LARGEST = 300_000  # bytes of a stored file


@dataclass(frozen=True)
class Reference:
    """A solution `y` `(rows, columns)`, float64; the `facts` of its making.

    Large ones are read from integers times `quantum`; None: stored as they are, for components of very different size.
    """

    y: Tensor
    quantum: float | None
    facts: dict[str, Any]

    def belongs_to(self, start: Tensor) -> bool:
        """Whether it was computed from this start (compared by two moments)."""
        return bool(np.allclose(self.facts["start"], fingerprint(start), rtol=1e-9, atol=0))


def fingerprint(start: Tensor) -> list[float]:
    """Mean and mean square of a state."""
    return [float(start.mean()), float(start.square().mean())]


def pack(y: np.ndarray, quantum: float) -> np.ndarray:
    """Integers whose double running sum along both axes is `y / quantum`: smooth fields become small numbers."""
    steps = np.rint(y / quantum).astype(np.int64)
    for axis in (0, 0, 1, 1):
        steps = np.diff(steps, axis=axis, prepend=0)
    return steps.astype(np.int32)


def unpack(packed: np.ndarray, quantum: float) -> np.ndarray:
    """The inverse of `pack`."""
    steps = packed.astype(np.int64)
    for axis in (0, 0, 1, 1):
        steps = np.cumsum(steps, axis=axis)
    return steps * quantum


def store(name: str, y: np.ndarray, quantum: float | None, start: Tensor, facts: dict[str, Any]) -> Path:
    """Write `y` `(rows, columns)`; raises BenchmarkError above 300 kB. `quantum`: about one float32 ulp of y, or None."""
    path = FOLDER / f"{name}.npz"
    facts = {**facts, "start": fingerprint(start), "quantum": quantum}
    packed = y if quantum is None else _smallest(pack(y, quantum))
    np.savez_compressed(path, packed=packed, facts=np.array(json.dumps(facts)))
    if path.stat().st_size > LARGEST:
        raise BenchmarkError(f"{path.name} has {path.stat().st_size} bytes, more than {LARGEST}; store with a larger quantum")
    return path


def _smallest(values: np.ndarray) -> np.ndarray:
    """The same integers in int16 where they fit."""
    fits = values.min() >= -(2**15) and values.max() < 2**15
    return values.astype(np.int16) if fits else values


def load(name: str) -> Reference | None:
    """The stored reference, or None where the file is absent."""
    path = FOLDER / f"{name}.npz"
    if not path.exists():
        return None
    with np.load(path) as stored:
        facts = json.loads(str(stored["facts"]))
        packed, quantum = stored["packed"], facts["quantum"]
        return Reference(torch.from_numpy(packed if quantum is None else unpack(packed, quantum)), quantum, facts)
