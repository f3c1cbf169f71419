"""Structure that a field may show beyond f(t, y), and that some methods live on. Met by structure: nothing to inherit.

An object may be both, the callable f and one of these; one without ``__call__`` is made callable by :func:`callable_field`.
States and results are in the user's shapes, batches included; ``args`` of the solve are passed on as to f.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .status import ArgumentError


@runtime_checkable
class LinearField(Protocol):
    """f(t, y) = L y + b, both constant in t.

    Optional:
        ``source(*args)``: b, a tree like the state, or broadcastable to it.
        ``rmatvec(y, *args)``: L^T y, the adjoint for complex states; else the derivative of ``matvec`` is taken.
        ``symmetric``: True where L^T = L.
        ``rate``: number with which L + rate I has no negative entry and rows, or columns, that sum to ``rate``, as for D^-1 W - I
            with 1.
        ``spectral_bound()``: a bound of |lambda| of L, number or ``(B,)``.
    """

    def matvec(self, y: Any, /, *args: Any) -> Any:
        """L y."""


@runtime_checkable
class QuasiLinearField(Protocol):
    """f(t, y) = A(t, y) y (+ b): a :class:`LinearField` at every state."""

    def operator(self, t: Tensor, y: Any, /, *args: Any) -> LinearField:
        """A(t, y), whose ``matvec`` takes no arguments but the vector."""


@runtime_checkable
class GradientField(Protocol):
    """f(t, y) = -grad F(t, y), the gradient by y: proximal methods then minimise |z - a|**2 / 2 + g F(t, z)."""

    def energy(self, t: Tensor, y: Any, /, *args: Any) -> Tensor:
        """F(t, y), 0-dim, or in the batched modes ``(B,)``: one number per sample."""


def potential(field: Any, layout: Any, args: tuple[Any, ...]) -> Callable[[Tensor, Tensor], Tensor] | None:
    """(t, flat y) -> F, or None where ``field`` has no ``energy`` that takes (t, y, *args)."""
    energy = getattr(field, "energy", None)
    if not callable(energy) or not _takes(getattr(energy, "__func__", energy), len(args) + 2 + hasattr(energy, "__func__")):
        return None

    def value(t: Tensor, y: Tensor) -> Tensor:
        found = energy(t, layout.unflatten(y), *args)
        wanted = () if layout.joint else (layout.batch,)
        if not isinstance(found, Tensor) or tuple(found.shape) != wanted:
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ArgumentError(
                f"the energy of a gradient field must return a tensor of shape {wanted}, one number per sample, found {what}: "
                "sum over a sample's elements only, or pass energy=False"
            )
        return found

    return value


@lru_cache(maxsize=64)
def _takes(function: Any, count: int) -> bool:
    """Whether ``function`` can be called with so many positional arguments; True where nobody can tell."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:
        return True
    return True


def check_energy(field: Any, y: Any, t: float = 0.0, *, args: tuple[Any, ...] = (), rtol: float = 1e-5) -> float:
    """|f + grad F| / |f| at (t, y), in Euclidean norms, for a :class:`GradientField` ``field`` and its state ``y``, a tensor or a
    tree of tensors; batches too.

    Raises ``ArgumentError`` if that is more than ``rtol``, or ``field`` has no energy.
    """
    if not isinstance(field, GradientField):
        raise ArgumentError(f"{type(field).__name__} has no energy(t, y): a gradient field has one")
    leaves, spec = pytree.tree_flatten(y)
    with torch.enable_grad():
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        state, time = pytree.tree_unflatten(leaves, spec), torch.as_tensor(t, dtype=torch.float64)
        gradient = torch.autograd.grad(field.energy(time, state, *args).sum(), leaves, materialize_grads=True)
    with torch.no_grad():
        f = pytree.tree_leaves(callable_field(field)(time, pytree.tree_map(torch.detach, state), *args))
        left = sum(float((a + b).abs().square().sum()) for a, b in zip(f, gradient, strict=True)) ** 0.5
        size = sum(float(a.abs().square().sum()) for a in f) ** 0.5
    found = left / size if size > 0 else left
    if not found <= rtol:
        raise ArgumentError(f"f must be minus the gradient of energy, found a difference of {found:.2g} of |f| at t = {t}")
    return found


class FlatOperator:
    """A :class:`LinearField` on the flat states of ``layout``.

    Attributes:
        calls: products made so far.
    """

    def __init__(self, op: Any, layout: Any, args: tuple[Any, ...] = ()) -> None:
        self.op, self.layout, self.args, self.calls = op, layout, args, 0

    @property
    def symmetric(self) -> bool:
        return bool(getattr(self.op, "symmetric", False))

    @property
    def rate(self) -> float | None:
        rate = getattr(self.op, "rate", None)
        return None if rate is None else float(rate)

    def product(self, v: Tensor) -> Tensor:
        """L v."""
        self.calls += 1
        layout = self.layout
        return layout.flatten(self.op.matvec(layout.unflatten(v), *self.args), "the value returned by matvec")

    def adjoint(self, v: Tensor) -> Tensor:
        """L^T v, or its adjoint; a constant to autograd."""
        layout = self.layout
        with torch.no_grad():
            if self.symmetric:
                return self.product(v)
            if hasattr(self.op, "rmatvec"):
                self.calls += 1
                return layout.flatten(self.op.rmatvec(layout.unflatten(v), *self.args), "the value returned by rmatvec")
        with torch.enable_grad():
            x = torch.zeros_like(v, requires_grad=True)
            return torch.autograd.grad(self.product(x), x, v)[0]

    def slope(self, y: Tensor) -> Tensor:
        """L y + b."""
        self.calls += 1
        layout = self.layout
        return layout.flatten(affine(self.op, layout.unflatten(y), self.args), "the value returned by matvec")


class Function:
    """f(t, y) of an object that shows its structure only."""

    def __init__(self, func: Any, value: Callable[..., Any]) -> None:
        self.func, self.value = func, value

    def __call__(self, t: Tensor, y: Any, *args: Any) -> Any:
        return self.value(self.func, t, y, args)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.func, name)


def callable_field(field: Any) -> Any:
    """``field`` itself, or as f(t, y, *args) if it is a linear or quasi-linear field that can't be called."""
    if callable(field):
        return field
    if isinstance(field, QuasiLinearField):
        return Function(field, lambda f, t, y, args: affine(f.operator(t, y, *args), y))
    if isinstance(field, LinearField):
        return Function(field, lambda f, t, y, args: affine(f, y, args))
    return field


def affine(op: Any, y: Any, args: tuple[Any, ...] = ()) -> Any:
    """L y + b in the user's shapes."""
    source = getattr(op, "source", None)
    value = op.matvec(y, *args)
    if source is None:
        return value
    return pytree.tree_map(torch.add, value, source(*args) if callable(source) else source)


def demand(method: Any, field: Any) -> None:
    """Raise ``ArgumentError`` if ``field`` does not show the structure that ``method`` lives on."""
    protocol = method.demands
    # Of a linear field A(t, y) is the field itself.
    if protocol is not None and not isinstance(field, (protocol, LinearField)):
        needed = "matvec(y)" if protocol is LinearField else "operator(t, y)"
        raise ArgumentError(
            f"method {method.name!r} takes a {protocol.__name__}, which has {needed}; found {type(field).__name__}, which has "
            "not: add it, or take a method for any f, such as 'rkc2' or an implicit one"
        )
