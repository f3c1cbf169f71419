"""Between the user's state and the one flat tensor that solvers work on; the only place that knows the batch mode.

Joint mode keeps the state as ``(N,)`` and everything that is one number per sample as a Python float or bool. The batched
modes keep the state as ``(R, M)`` and one number per sample as a ``(B,)`` tensor. Code above this floor is written once for
both through :class:`Layout` and :class:`ScalarOps` / :class:`RowOps`.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .status import ArgumentError, ArgumentTypeError

REAL_OF = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}
VECTOR = 32
"""A multiple of the numbers that a CPU's vector unit takes in one turn of a loop."""

WORKING = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}
"""Half precision loses every small increment, so such states are integrated in single precision."""


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    return REAL_OF.get(dtype, dtype)


def transforms_active() -> bool:
    """Whether a torch.func transform is running: then values may not be read and nothing may be written in place."""
    probe = getattr(torch._C, "_are_functorch_transforms_active", None)
    return bool(probe()) if probe is not None else False


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on: buffers and numpy would drop the tangents."""
    return getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0


def carries_gradient(x: Any) -> bool:
    """Whether ``x`` is a tensor through which a derivative is taken: in reverse, or by a torch.func transform."""
    if not isinstance(x, Tensor):
        return False
    wrapped = getattr(getattr(torch._C, "_functorch", None), "is_functorch_wrapped_tensor", None)
    return x.requires_grad or bool(wrapped is not None and wrapped(x))


class ScalarOps:
    """Algebra of per-sample numbers in joint mode: Python floats and bools, no device work."""

    joint = True

    @staticmethod
    def where(condition, a, b):
        return a if condition else b

    minimum = staticmethod(min)
    maximum = staticmethod(max)
    isfinite = staticmethod(math.isfinite)

    @staticmethod
    def invert(condition):
        return not condition

    @staticmethod
    def clip(x, low, high):
        return min(max(x, low), high)

    @staticmethod
    def rescale(ratio, exponent, safety, low, high):
        """safety ratio^exponent (a negative exponent) within [low, high]; ``low`` where the ratio is not finite."""
        if not math.isfinite(ratio):
            return low
        return min(max(safety * max(ratio, 1e-300) ** exponent, low), high)

    @staticmethod
    def copysign(x, sign):
        return math.copysign(x, sign)

    @staticmethod
    def power(x, exponent):
        return x**exponent


class RowOps:
    """The same algebra on ``(B,)`` tensors."""

    joint = False
    invert = staticmethod(torch.logical_not)
    isfinite = staticmethod(torch.isfinite)
    clip = staticmethod(torch.clamp)
    copysign = staticmethod(torch.copysign)

    where = staticmethod(torch.where)

    @staticmethod
    def power(x, exponent):
        """A new tensor x ** exponent, with the same bits for a sample wherever it stands in the batch: vector units and the
        scalar code for the rest of a row round powers differently, so on the CPU rows are filled up to whole vectors."""
        if x.device.type != "cpu" or len(x) % VECTOR == 0:
            return x.pow(exponent)
        missing = (0, -len(x) % VECTOR)
        if isinstance(exponent, Tensor):
            exponent = torch.nn.functional.pad(exponent, missing, value=1.0)
        return torch.nn.functional.pad(x, missing, value=1.0).pow_(exponent)[: len(x)]

    @staticmethod
    def rescale(ratio, exponent, safety, low, high):
        # infinity becomes 0 and 0 infinity, both of which the clamp takes; only NaN passes it.
        return RowOps.power(ratio, exponent).mul_(safety).clamp_(low, high).nan_to_num_(low)

    @staticmethod
    def minimum(a, b):
        if isinstance(b, Tensor):
            return torch.minimum(a, b) if isinstance(a, Tensor) else b.clamp(max=a)
        return a.clamp(max=b)

    @staticmethod
    def maximum(a, b):
        if isinstance(b, Tensor):
            return torch.maximum(a, b) if isinstance(a, Tensor) else b.clamp(min=a)
        return a.clamp(min=b)


NARROW = 4
"""Columns of a batch below which a mask is repeated rather than broadcast (measured: selecting is twice as fast)."""


class Layout:
    """How a state is laid out flat.

    Args:
        example: the state: a tensor, or a nested tuple, list, dict or named tuple of tensors.
        batch_dim: None (joint) or 0 (dimension 0 of every leaf counts samples).
        batch_index: ``(R,)`` integers, the group of each row; dimension 0 of every leaf counts rows.

    Attributes:
        lenient: whether f may answer in another dtype and, for trees, another sequence and other shapes of as many elements.

    Raises ``ArgumentTypeError`` for leaves that are no floating or complex tensors, ``ArgumentError`` for leaves on
    different devices or with different numbers of rows.
    """

    def __init__(self, example: Any, batch_dim: int | None = None, batch_index: Tensor | None = None) -> None:
        leaves, self.spec = pytree.tree_flatten(example)
        _check_leaves(leaves)
        self.shapes = [leaf.shape for leaf in leaves]
        self.dtypes = [leaf.dtype for leaf in leaves]
        self.device = leaves[0].device
        dtype = self.dtypes[0]
        for other in self.dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        self.dtype = WORKING.get(dtype, dtype)
        self.real_dtype = real_dtype(self.dtype)
        self.single = len(leaves) == 1
        self.is_tensor = self.single and isinstance(example, Tensor)
        # Such a tuple needs no general tree functions, which cost more than a small state's own arithmetic.
        self.flat_tuple = type(example) is tuple and all(isinstance(leaf, Tensor) for leaf in example)
        self.joint = batch_dim is None and batch_index is None
        self.ops = ScalarOps if self.joint else RowOps
        self.rows = 1 if self.joint else _count_rows(leaves, batch_dim, batch_index)
        self.index, self.batch = _check_index(batch_index, self.rows, self.device)
        head = 0 if self.joint else 1
        self.sizes = [math.prod(shape[head:]) for shape in self.shapes]
        self.width = sum(self.sizes)
        self.shape = (self.width,) if self.joint else (self.rows, self.width)
        self.same_dtype = all(d == self.dtype for d in self.dtypes)
        self.trivial = self.is_tensor and self.same_dtype and tuple(self.shapes[0]) == tuple(self.shape)
        self.lenient = False
        if self.index is not None:
            self.group_sizes = torch.bincount(self.index, minlength=self.batch).to(self.real_dtype)

    # -- the user's tree <-> flat -------------------------------------------------------------------------------------

    def flatten(self, tree: Any, what: str = "y0") -> Tensor:
        """The state as one tensor of shape ``self.shape``; checks structure, shapes and device.

        Raises ``ArgumentTypeError`` / ``ArgumentError`` naming ``what``.
        """
        known = self.trivial and isinstance(tree, Tensor)
        if known and tree.shape == self.shape and tree.dtype == self.dtype and tree.device == self.device:
            return tree
        if self.is_tensor:
            leaves = [tree]
            if not isinstance(tree, Tensor):
                raise ArgumentTypeError(f"{what} must be a tensor like the state, found {type(tree).__name__}")
        elif self.flat_tuple and type(tree) is tuple and len(tree) == len(self.shapes):
            leaves = list(tree)
        else:
            leaves, spec = pytree.tree_flatten(tree)
            if spec != self.spec and not (self.lenient and len(leaves) == len(self.shapes)):
                raise ArgumentTypeError(f"{what} must have the structure of the state, {self.spec}, found {spec}")
        flat = [self._flatten_leaf(leaf, i, what) for i, leaf in enumerate(leaves)]
        return flat[0] if self.single else torch.cat(flat, dim=-1)

    def _flatten_leaf(self, leaf: Any, i: int, what: str) -> Tensor:
        known = type(leaf) is Tensor and leaf.dtype == self.dtype == self.dtypes[i] and leaf.shape == self.shapes[i]
        if known and leaf.device == self.device:
            return leaf.reshape(-1) if self.joint else leaf.reshape(self.rows, self.sizes[i])
        where = what if self.is_tensor else f"leaf {i} of {what}"
        if not isinstance(leaf, Tensor):
            raise ArgumentTypeError(f"{where} must be a tensor, found {type(leaf).__name__}")
        if self.lenient:
            leaf = self._adapted(leaf, i)
        if leaf.shape != self.shapes[i]:
            raise ArgumentError(f"{where} must have shape {tuple(self.shapes[i])}, found {tuple(leaf.shape)}")
        if leaf.dtype != self.dtypes[i] and not _lossless(leaf.dtype, self.dtypes[i]):
            raise ArgumentTypeError(
                f"{where} must have the state's dtype {self.dtypes[i]}, found {leaf.dtype}: convert one to the other"
            )
        if leaf.device != self.device:
            raise ArgumentError(f"{where} must be on the state's device {self.device}, found {leaf.device}")
        leaf = leaf.reshape(-1) if self.joint else leaf.reshape(self.rows, self.sizes[i])
        return leaf if leaf.dtype == self.dtype else leaf.to(self.dtype)

    def _adapted(self, leaf: Tensor, i: int) -> Tensor:
        """Leaf ``i`` in the state's dtype and, for a tree, in any shape of as many elements."""
        if leaf.dtype != self.dtypes[i] and (self.dtypes[i].is_complex or not leaf.is_complex()):
            leaf = leaf.to(self.dtypes[i])
        same = leaf.numel() == math.prod(self.shapes[i])
        return leaf.reshape(self.shapes[i]) if same and not self.is_tensor else leaf

    def unflatten(self, flat: Tensor) -> Any:
        """Inverse of :meth:`flatten`; extra leading dimensions of ``flat`` are kept in front of every leaf's shape."""
        if self.trivial:
            return flat
        lead = flat.shape[: flat.dim() - len(self.shape)]
        if self.is_tensor and self.same_dtype:
            return flat.view(lead + self.shapes[0]) if flat.is_contiguous() else flat.reshape(lead + self.shapes[0])
        parts: Any = torch.split_with_sizes(flat, self.sizes, -1)
        if not self.same_dtype:
            parts = [_narrow(part, dtype) for part, dtype in zip(parts, self.dtypes, strict=True)]
        shapes = [lead + shape for shape in self.shapes] if lead else self.shapes
        leaves = [part if part.shape == shape else part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        return tuple(leaves) if self.flat_tuple else pytree.tree_unflatten(leaves, self.spec)

    def unpack(self, tensors: list[Tensor]) -> Any:
        """One tensor per leaf (of any shape) as a tree like the state."""
        return pytree.tree_unflatten(tensors, self.spec)

    def broadcast(self, value: Any, what: str) -> float | Tensor:
        """A tolerance as a float or as a tensor broadcastable to the flat state.

        ``value``: a number, a 0-dim tensor, a tensor broadcastable to the state (for a pytree: a tree of those with the
        state's structure).
        """
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, Tensor) and value.dim() == 0:
            return float(value.detach())
        if isinstance(value, Tensor):
            if not self.is_tensor:
                raise ArgumentTypeError(f"{what} must be a number or have the structure of the state, found a tensor")
            parts = [value]
        else:
            parts, spec = pytree.tree_flatten(value)
            if spec != self.spec:
                raise ArgumentTypeError(
                    f"{what} must be a number or have the structure of the state, {self.spec}, found {spec}"
                )
        flat = []
        for part, shape, size in zip(parts, self.shapes, self.sizes, strict=True):
            part = torch.as_tensor(part, dtype=self.real_dtype, device=self.device).detach()
            try:
                part = part.broadcast_to(shape)
            except RuntimeError:
                raise ArgumentError(
                    f"{what} of shape {tuple(part.shape)} must broadcast to the state's shape {tuple(shape)}"
                ) from None
            flat.append(part.reshape(-1) if self.joint else part.reshape(self.rows, size))
        return torch.cat(flat, dim=-1)

    # -- samples ------------------------------------------------------------------------------------------------------

    @cached_property
    def members(self) -> tuple[Tensor, Tensor, Tensor]:
        """For groups: the rows of each, ``(B, most)``; which of those entries are rows; the place of each row in its group."""
        index: Any = self.index
        order = torch.argsort(index, stable=True)
        counts = torch.bincount(index, minlength=self.batch)
        first = counts.cumsum(0) - counts
        place = torch.empty_like(order)
        place[order] = torch.arange(self.rows, device=self.device) - first[index[order]]
        along = torch.arange(int(counts.amax()) if self.batch else 0, device=self.device)
        there = along < counts.unsqueeze(1)
        return order[(first.unsqueeze(1) + along).clamp(max=max(self.rows - 1, 0))], there, place

    def gather(self, x: Tensor) -> Tensor:
        """``(..., R, m)`` per row -> ``(..., B, n)``, the numbers of each sample side by side, 0 beyond the end of a group."""
        if self.index is None:
            return x
        rows, there, _ = self.members
        return (x[..., rows, :] * there.unsqueeze(-1)).flatten(-2)

    def scatter(self, x: Tensor) -> Tensor:
        """Inverse of :meth:`gather`."""
        if self.index is None:
            return x
        rows, _, place = self.members
        return x.unflatten(-1, (rows.shape[1], -1))[..., self.index, place, :]

    def per_row(self, v: Tensor) -> Tensor:
        """``(..., B)`` per sample -> ``(..., R)`` per row."""
        return v if self.index is None else v[..., self.index]

    def spread(self, v: Any) -> Any:
        """One number per sample, broadcastable to the state in its real dtype; Python numbers stay as they are."""
        if not isinstance(v, Tensor):
            return v
        if v.dtype.is_floating_point and v.dtype != self.real_dtype:
            v = v.to(self.real_dtype)
        return v if self.joint else self.per_row(v).unsqueeze(-1)

    def norm(self, x: Tensor) -> Any:
        """RMS over each sample's elements, maximum over the leaves: float in joint mode, else ``(B,)`` (real dtype)."""
        if self.joint:
            if self.single:
                return torch.linalg.vector_norm(x).item() / math.sqrt(self.width) if self.width else 0.0
            norms = [torch.linalg.vector_norm(p) / math.sqrt(max(p.numel(), 1)) for p in x.split(self.sizes)]
            return torch.stack(norms).amax().item()
        if self.single and self.index is None:
            return torch.linalg.vector_norm(x, dim=1).mul_(max(self.width, 1) ** -0.5)
        norms = [self._mean_square(p) for p in x.split(self.sizes, dim=1)]
        return norms[0].sqrt() if self.single else torch.stack(norms).amax(0).sqrt()

    def _mean_square(self, x: Tensor) -> Tensor:
        square = x.abs().square().sum(1) if x.is_complex() else x.square().sum(1)
        count = float(max(x.shape[1], 1))
        if self.index is None:
            return square / count
        total = torch.zeros(self.batch, dtype=square.dtype, device=square.device).index_add_(0, self.index, square)
        return total / (self.group_sizes * count).clamp(min=1.0)

    def sum(self, x: Tensor) -> Any:
        """Sum over each sample's elements (0-dim, or ``(B,)``): not finite where an element is not."""
        if self.joint:
            return x.sum()
        total = x.sum(1)
        if self.index is None:
            return total
        return torch.zeros(self.batch, dtype=x.dtype, device=x.device).index_add_(0, self.index, total)

    def finite(self, x: Tensor) -> Any:
        """Whether every element of a sample is finite: bool, or ``(B,)``."""
        if self.joint:
            value = x.sum().item()
            if isinstance(value, complex):
                value = value.real + value.imag
            # A finite state can overflow its sum, so a bad sum is only a suspicion.
            return math.isfinite(value) or bool(torch.isfinite(x).all())
        bad = self.sum(torch.isfinite(x).logical_not_().to(self.real_dtype))
        return bad == 0

    def merge(self, accept: Any, new: Any, old: Any) -> Any:
        """``new`` where ``accept``, else ``old``, for every tensor of a nest of tuples.

        Joint mode swaps the whole object. What is no tensor (workspaces, static numbers) is taken from ``new``.
        """
        if self.joint:
            return new if accept else old
        return self._merge(accept, self._wide(accept), new, old)

    def _wide(self, mask: Tensor) -> Tensor:
        """``spread``, written out where that makes the selections that follow cheaper."""
        if self.width > NARROW or self.index is not None:
            return self.spread(mask)
        return mask.unsqueeze(1) if self.width <= 1 else torch.stack([mask] * self.width, 1)

    def _merge(self, accept: Tensor, wide: Tensor, new: Any, old: Any) -> Any:
        if isinstance(new, Tensor):
            return torch.where(accept if new.dim() == 1 else wide, new, old)
        if isinstance(new, tuple):
            parts = [self._merge(accept, wide, n, o) for n, o in zip(new, old, strict=True)]
            return type(new)(*parts) if hasattr(new, "_fields") else type(new)(parts)
        return new


def _narrow(part: Tensor, dtype: torch.dtype) -> Tensor:
    if part.is_complex() and not dtype.is_complex:
        part = part.real
    return part.to(dtype)


def _lossless(found: torch.dtype, expected: torch.dtype) -> bool:
    """Half precision coming back for a wider state is what autocast does, and nothing is lost by widening it."""
    return found in (torch.float16, torch.bfloat16) and torch.promote_types(found, expected) == expected


def _check_leaves(leaves: list[Any]) -> None:
    if not leaves:
        raise ArgumentTypeError("y0 must hold at least one tensor, found an empty structure")
    for i, leaf in enumerate(leaves):
        name = "y0" if len(leaves) == 1 else f"leaf {i} of y0"
        if not isinstance(leaf, Tensor):
            raise ArgumentTypeError(
                f"{name} must be a tensor, found {type(leaf).__name__} {leaf!r:.40}: wrap it in torch.tensor(...)"
            )
        if not (leaf.dtype.is_floating_point or leaf.dtype.is_complex):
            raise ArgumentTypeError(f"{name} must be floating or complex, found {leaf.dtype}: call .float() or .double()")
        if leaf.device != leaves[0].device:
            raise ArgumentError(f"{name} is on {leaf.device}, the first leaf on {leaves[0].device}: move them together")


def _count_rows(leaves: list[Tensor], batch_dim: int | None, batch_index: Any) -> int:
    if batch_dim is not None and batch_index is not None:
        raise ArgumentError("batch_dim and batch_index exclude each other: batch_index names the sample of every row")
    if batch_dim not in (None, 0):
        raise ArgumentError(f"batch_dim must be None or 0, found {batch_dim!r}: move the batch to dimension 0")
    for i, leaf in enumerate(leaves):
        name = "y0" if len(leaves) == 1 else f"leaf {i} of y0"
        if leaf.dim() == 0:
            raise ArgumentError(f"{name} has no dimension 0 to count samples along: give it shape (B, ...)")
        if leaf.shape[0] != leaves[0].shape[0]:
            raise ArgumentError(f"{name} has {leaf.shape[0]} rows, the first leaf has {leaves[0].shape[0]}")
    return leaves[0].shape[0]


def _check_index(index: Any, rows: int, device: torch.device) -> tuple[Tensor | None, int]:
    if index is None:
        return None, rows
    found = index.dtype if isinstance(index, Tensor) else type(index).__name__
    if not isinstance(found, torch.dtype) or found.is_floating_point or found.is_complex or found == torch.bool:
        raise ArgumentTypeError(f"batch_index must be an integer tensor of shape (R,), found {found}")
    if index.shape != (rows,):
        raise ArgumentError(f"batch_index must have shape ({rows},), one entry for every row, found {tuple(index.shape)}")
    if index.device != device:
        raise ArgumentError(f"batch_index must be on the state's device {device}, found {index.device}")
    index = index.long()
    low, high = (int(index.min()), int(index.max())) if rows else (0, -1)
    if low < 0:
        raise ArgumentError(f"batch_index must be >= 0, found {low}")
    return index, high + 1
