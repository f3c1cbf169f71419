"""Where things are summed: elements in segments, and the sparsity pattern of a graph as two such groupings of its edges.

Both are plain index arithmetic, worked out on first use and kept. No kernel asks the device for a number.
"""

from __future__ import annotations

import warnings
from functools import cached_property

import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError

__all__ = ["Pattern", "Segments"]

INT32_LIMIT = 2**31 - 1


def narrow(index: Tensor, largest: int) -> Tensor:
    """``index`` as int32 where ``largest`` fits: half the memory traffic of a kernel that is bound by it."""
    return index.int() if largest <= INT32_LIMIT else index.long()


def inverted(permutation: Tensor) -> Tensor:
    """The place of each number in ``permutation`` ``(N,)``, in its dtype."""
    every = torch.arange(permutation.numel(), dtype=permutation.dtype, device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation.long(), every)


class Segments:
    """E elements, each in one of ``size`` segments; ``index`` ``(E,)`` names the segment of each, in any order.

    Values are always in the order of ``index``. Kernels read them in *stored* order, sorted by segment and stable, so
    that the order of a sum is that of the elements whatever the number of threads.
    """

    def __init__(self, index: Tensor, size: int) -> None:
        self.index = index
        self.size = size

    @classmethod
    def from_index(cls, index: Tensor, size: int | None = None) -> Segments:
        """Segments of ``index`` ``(E,)`` int64 in ``[0, size)``; ``size=None`` takes the largest index plus one.

        Reads the index on the host once, to check it. Raises ``ArgumentTypeError`` (dtype), ``ArgumentError`` (shape, range).
        """
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            found = getattr(index, "dtype", type(index).__name__)
            raise ArgumentTypeError(f"index must be an int64 tensor, not {found}: use index.long()")
        if index.dim() != 1:
            raise ArgumentError(f"index must have one dimension, not shape {tuple(index.shape)}")
        if torch.compiler.is_compiling():  # its numbers do not exist yet: nothing to check
            if size is None:
                raise ArgumentError("size must be given under torch.compile: the largest index is not known when tracing")
            return cls(index, size)
        low, high = (int(v) for v in torch.aminmax(index)) if index.numel() else (0, -1)
        size = high + 1 if size is None else size
        if low < 0 or high >= size:
            raise ArgumentError(f"index has values from {low} to {high}, outside [0, {size}): mend it or give a larger size")
        return cls(index, size)

    @classmethod
    def from_pointers(cls, pointers: Tensor) -> Segments:
        """Segment i holds the elements from ``pointers[i]`` up to ``pointers[i + 1]``; ``pointers`` ``(size + 1,)`` int64.

        Raises ``ArgumentTypeError`` (dtype), ``ArgumentError`` (shape, a start other than 0, a descent).
        """
        if not isinstance(pointers, Tensor) or pointers.dtype != torch.int64:
            found = getattr(pointers, "dtype", type(pointers).__name__)
            raise ArgumentTypeError(f"pointers must be an int64 tensor, not {found}: use pointers.long()")
        if pointers.dim() != 1 or pointers.numel() == 0:
            raise ArgumentError(f"pointers must have shape (size + 1,), not {tuple(pointers.shape)}")
        counts = pointers.diff()
        if int(pointers[0]) != 0 or bool((counts < 0).any()):
            raise ArgumentError("pointers must start at 0 and never descend: sort them, or use Segments.from_index")
        size = pointers.numel() - 1
        segments = cls(torch.repeat_interleave(torch.arange(size, device=pointers.device), counts), size)
        segments.__dict__.update(pointers=pointers, order=None, inverse=None)
        return segments

    @property
    def count(self) -> int:
        """Number of elements E."""
        return self.index.shape[0]

    @property
    def device(self) -> torch.device:
        return self.index.device

    @cached_property
    def order(self) -> Tensor | None:
        """Element at each stored place, ``(E,)``; None where the index is sorted as it came."""
        if self.count < 2 or not bool((self.index[1:] < self.index[:-1]).any()):
            return None
        return torch.argsort(self.index, stable=True)

    @cached_property
    def inverse(self) -> Tensor | None:
        """Stored place of each element, ``(E,)``; None where the index is sorted as it came."""
        if self.order is None:
            return None
        return inverted(self.order)

    @cached_property
    def pointers(self) -> Tensor:
        """Where each segment starts in stored order, and the end: ``(size + 1,)`` int64."""
        counts = torch.bincount(self.index, minlength=self.size)
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    @cached_property
    def counts(self) -> Tensor:
        """Number of elements of each segment, ``(size,)`` int64."""
        return self.pointers.diff()

    @cached_property
    def longest(self) -> int:
        """Number of elements of the largest segment; one read of the device, once."""
        return int(self.counts.max()) if self.size else 0

    @cached_property
    def bags(self) -> tuple[Tensor, Tensor]:
        """Elements in stored order and pointers, as the bags of ``embedding_bag``, int32 where they fit."""
        order = torch.arange(self.count, device=self.device) if self.order is None else self.order
        return narrow(order, self.count), narrow(self.pointers, self.count)

    @cached_property
    def membership(self) -> Pattern:
        """The pattern with a row a segment and a column an element, and an entry where one belongs to the other."""
        return Pattern(self, Segments(torch.arange(self.count, device=self.device), self.count))

    def stored(self, values: Tensor) -> Tensor:
        """``values`` ``(E, ...)`` brought into stored order."""
        return values if self.order is None else values.index_select(0, self.order)

    def unstored(self, values: Tensor) -> Tensor:
        """``values`` ``(E, ...)`` brought back from stored order."""
        return values if self.inverse is None else values.index_select(0, self.inverse)

    def to(self, device: torch.device | str) -> Segments:
        """The same on another device, with all that is worked out so far."""
        moved = Segments(self.index.to(device), self.size)
        for name, value in self.__dict__.items():
            if name == "membership":  # made anew there, of the segments there
                continue
            if isinstance(value, tuple):
                value = tuple(part.to(device) for part in value)
            moved.__dict__[name] = value.to(device) if isinstance(value, Tensor) else value
        return moved


class Pattern:
    """Which entries of a matrix of ``rows.size`` x ``columns.size`` are there: entry e at ``(rows.index[e], columns.index[e])``.

    Values of entries are in that order for a pattern and for its transpose alike, so the derivative of a product with one
    is a product with the other and nothing is permuted in between.
    """

    def __init__(self, rows: Segments, columns: Segments) -> None:
        self.rows = rows
        self.columns = columns
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}
        self._entries: dict[int, Tensor] = {}
        self._places: dict[int, Tensor] = {}
        self._zeros: dict[tuple[int, torch.dtype], Tensor] = {}
        self._signs: dict[torch.dtype, Tensor] = {}
        self._identities: dict[torch.dtype, Tensor | None] = {}

    @cached_property
    def transposed(self) -> Pattern:
        """Rows and columns exchanged; the transpose of that is this pattern again."""
        other = Pattern(self.columns, self.rows)
        other.__dict__["transposed"] = self
        return other

    def blocks(self, heads: int = 1) -> tuple[Tensor, Tensor]:
        """Columns ``(heads * E,)`` and row pointers of the pattern times the identity of ``heads``, entries in stored order.

        Row i with head h is row ``i * heads + h`` of it, as in ``(rows, heads, F)`` itself, and so for columns: one kernel
        serves all heads at once and copies no x. int32 where the largest number fits.
        """
        if heads not in self._blocks:
            head = torch.arange(heads, device=self.rows.device)
            starts = heads * self.rows.pointers[:-1, None] + head * self.rows.counts[:, None]
            pointers = torch.cat([starts.reshape(-1), starts.new_full((1,), heads * self.rows.count)])
            columns = self.columns.index[:, None] * heads + head
            neighbours = self.stored(columns.squeeze(1))  # of one head, entries need no numbering of their own
            largest = heads * max(self.rows.count, self.rows.size, self.columns.size)
            self._blocks[heads] = narrow(neighbours, largest), narrow(pointers, largest)
        return self._blocks[heads]

    def stored(self, values: Tensor) -> Tensor:
        """Values at entries, ``(E,)`` or ``(E, heads)``, in the order of ``blocks``, in a row."""
        if values.dim() == 1:
            return self.rows.stored(values)
        return values.reshape(-1).index_select(0, self.entries(values.shape[1]))

    def entries(self, heads: int) -> Tensor:
        """Which of the numbers ``(E, heads)``, read in a row, stands at each stored place of ``blocks(heads)``."""
        if heads not in self._entries:
            self._entries[heads] = inverted(self.places(heads))
        return self._entries[heads]

    def places(self, heads: int) -> Tensor:
        """The stored place in ``blocks(heads)`` of each of the numbers ``(E, heads)``, read in a row."""
        if heads not in self._places:
            row = self.rows.index
            start, count = (x.index_select(0, row) for x in (self.rows.pointers, self.rows.counts))
            inverse = self.rows.inverse
            stored = torch.arange(self.rows.count, device=row.device) if inverse is None else inverse
            place = ((heads - 1) * start + stored)[:, None] + torch.arange(heads, device=row.device) * count[:, None]
            self._places[heads] = narrow(place.reshape(-1), heads * self.rows.count)
        return self._places[heads]

    def zeros(self, heads: int, dtype: torch.dtype) -> Tensor:
        """``blocks(heads)`` as a sparse CSR matrix of zeros, which ``sampled_addmm`` fills."""
        if (heads, dtype) not in self._zeros:
            neighbours, pointers = self.blocks(heads)
            values = torch.zeros(neighbours.shape[0], dtype=dtype, device=neighbours.device)
            shape = heads * self.rows.size, heads * self.columns.size
            with warnings.catch_warnings():  # torch says once that its CSR tensors are in beta
                warnings.simplefilter("ignore", UserWarning)
                zeros = torch.sparse_csr_tensor(pointers, neighbours, values, shape, check_invariants=False)
            self._zeros[heads, dtype] = zeros
        return self._zeros[heads, dtype]

    @cached_property
    def stored_pattern(self) -> Pattern:
        """This pattern with its entries renumbered in stored order; itself where they are."""
        if self.rows.order is None:
            return self
        rows = Segments.from_pointers(self.rows.pointers)
        return Pattern(rows, Segments(self.rows.stored(self.columns.index), self.columns.size))

    @cached_property
    def incidence(self) -> Pattern:
        """The pattern with a row an entry here, and in it the entry's column and its row (of one set of nodes)."""
        ends = torch.stack([self.columns.index, self.rows.index], 1).reshape(-1)
        owner = torch.arange(self.rows.count, device=ends.device).repeat_interleave(2)
        return Pattern(Segments(owner, self.rows.count), Segments(ends, self.columns.size))

    def signs(self, dtype: torch.dtype) -> Tensor:
        """1 and -1 in turn, the values that make ``incidence`` a difference, ``(2 E,)``."""
        if dtype not in self._signs:
            self._signs[dtype] = torch.tensor([1, -1], dtype=dtype, device=self.rows.device).repeat(self.rows.count)
        return self._signs[dtype]

    def identity(self, dtype: torch.dtype) -> Tensor | None:
        """The identity as values at entries ``(E,)``: 1 on the diagonal, 0 elsewhere. None unless it has one entry a row."""
        if dtype not in self._identities:
            diagonal = self.rows.index == self.columns.index
            nodes = self.rows.index[diagonal]
            whole = nodes.numel() == self.rows.size and bool((nodes.bincount(minlength=nodes.numel()) == 1).all())
            self._identities[dtype] = diagonal.to(dtype) if whole else None
        return self._identities[dtype]

    def to(self, device: torch.device | str) -> Pattern:
        """The same on another device; what depends on heads or dtype is worked out anew there."""
        return Pattern(self.rows.to(device), self.columns.to(device))
