"""Forward kernels by name: which backend serves which call."""

from __future__ import annotations

import contextlib
import contextvars
import importlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import unknown_name
from .base import KERNELS, Backend
from .native import Native
from .plain import Plain

__all__ = ["BACKENDS", "KERNELS", "Backend", "backend", "chosen", "get"]

BACKENDS = {"native": "Native", "plain": "Plain", "scatter": "Scatter", "triton": "Triton"}
"""Name, which is that of the file here too, and class of each backend."""

NATIVE, PLAIN = Native(), Plain()
_BUILT: dict[str, Backend] = {"native": NATIVE, "plain": PLAIN}

_ASKED_FOR: contextvars.ContextVar[str] = contextvars.ContextVar("backend", default="native")


def get(name: str) -> Backend:
    """The backend called ``name``. Raises ``UnknownNameError``, or ``MissingPackageError`` without its package."""
    if name not in BACKENDS:
        raise unknown_name("backend", name, BACKENDS)
    if name not in _BUILT:
        _BUILT[name] = getattr(importlib.import_module(f"{__name__}.{name}"), BACKENDS[name])()
    return _BUILT[name]


@contextlib.contextmanager
def backend(name: str) -> Iterator[Backend]:
    """Within the block, and in the backward pass of what is computed there, kernels come from the backend ``name``."""
    served = get(name)
    token = _ASKED_FOR.set(name)
    try:
        yield served
    finally:
        _ASKED_FOR.reset(token)


_IS_BATCHED = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)  # not public


def in_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open, of ``torch.func.jvp`` or ``forward_ad`` alike."""
    level = getattr(forward_ad, "_current_level", None)  # not public
    return _can_make_dual() if level is None else level >= 0


def _can_make_dual() -> bool:
    """The same by public means, which cost an exception a call: without an open level there are no dual tensors."""
    try:
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
    except RuntimeError:
        return False
    return True


def batched_by_autograd(values: Tensor) -> bool:
    """Whether ``values`` is a batch that `torch.autograd.grad(is_grads_batched=True)` hides in one tensor."""
    return _IS_BATCHED is not None and _IS_BATCHED(values)


def chosen(kernel: str, asked_for: str | None, *operands: Tensor) -> Backend:
    """The backend that serves ``kernel`` on ``operands``, of one dtype and device, now.

    Autograd functions of torch 2.13 with a forward rule of their own give wrong second forward derivatives without a word,
    so forward mode goes the plain way, as tracing must, and as does that batching which asks no function for its rule.
    """
    first = operands[0]
    if torch.compiler.is_compiling() or first.dtype not in (torch.float32, torch.float64) or in_forward_mode():
        return PLAIN
    for operand in operands:
        if batched_by_autograd(operand):
            return PLAIN
    found = get(asked_for or _ASKED_FOR.get())
    return found if kernel in found.provides and first.device.type in found.devices else NATIVE


def asked_for() -> str:
    """The name of the backend in force."""
    return _ASKED_FOR.get()
