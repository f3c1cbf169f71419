"""Helpers that code written for torchdiffeq imports from ``torchdiffeq._impl.misc``, on this package's own parts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from ...control.pid import PIDController
from ...field import Field
from ...layout import Layout, ScalarOps
from ...norms import ErrorNorm, rms
from ...status import ArgumentError, ArgumentTypeError
from ..errors import CheckError, CheckTypeError, MethodNameError
from ..odeint import _positive, check_floating, check_one_dimensional, check_times
from ..strict import first_step
from .event_handling import combine_event_functions

_assert_floating, _assert_one_dimensional = check_floating, check_one_dimensional
_all_callback_names = ["callback_step", "callback_accept_step", "callback_reject_step"]
_all_adjoint_callback_names = [f"{name}_adjoint" for name in _all_callback_names]


def _null_callback(*args: Any, **kwargs: Any) -> None:
    return None


def _handle_unused_kwargs(solver: Any, unused_kwargs: Mapping[str, Any]) -> None:
    if unused_kwargs:
        warnings.warn(f"{type(solver).__name__}: Unexpected arguments {dict(unused_kwargs)}", stacklevel=3)


# -- norms and step sizes ---------------------------------------------------------------------------------------------


def _rms_norm(tensor: Tensor) -> Tensor:
    return rms(tensor)


def _linf_norm(tensor: Tensor) -> Tensor:
    return tensor.abs().amax()


def _zero_norm(tensor: Any) -> float:
    return 0.0


def _mixed_norm(tensor_tuple: Any) -> Any:
    """The largest of the parts' RMS norms."""
    return max((rms(part) for part in tensor_tuple), default=0.0)


def error_norm(y0: Tensor, rtol: Any, atol: Any, norm: Any) -> tuple[Layout, ErrorNorm]:
    """Layout and error norm of a solve of tensor ``y0``."""

    def number(value: Any) -> Any:
        value = _positive(value)
        return value.item() if isinstance(value, Tensor) and value.dim() == 0 else value

    layout = Layout(y0)
    return layout, ErrorNorm(layout, number(rtol), number(atol), norm)


def _compute_error_ratio(error_estimate: Tensor, rtol: Any, atol: Any, y0: Tensor, y1: Tensor, norm: Any) -> Tensor:
    """Norm of the error in units of the tolerance."""
    return torch.as_tensor(norm(error_estimate / (atol + rtol * torch.maximum(y0.abs(), y1.abs())))).abs()


def _select_initial_step(
    func: Any, t0: Tensor, y0: Tensor, order: int, rtol: Any, atol: Any, norm: Any, f0: Tensor | None = None
) -> Tensor:
    """First step size, in t0's dtype; ``order``: of the error estimate's solution, one less than its exponent."""
    layout, measure = error_norm(y0.detach(), rtol, atol, norm)
    with torch.no_grad():
        slope = func(t0, y0) if f0 is None else f0
        field = Field(func, layout, (), None, measure)
        flat = layout.flatten(y0.detach()), layout.flatten(slope.detach())
        dt, _ = first_step(field, measure, float(t0), *flat, order + 1, 1.0)
    return torch.as_tensor(dt, dtype=t0.dtype, device=y0.device)


@torch.no_grad()
def _optimal_step_size(last_step: Tensor, error_ratio: Any, safety: Any, ifactor: Any, dfactor: Any, order: int) -> Tensor:
    """The next step size by the loop's I controller, which does not shrink accepted steps here."""
    rule = PIDController(
        safety=float(safety), factor_min=float(dfactor), factor_max=float(ifactor), factor_min_accepted=1.0
    )
    return last_step * rule.update(ScalarOps, float(error_ratio), order, (), None).factor


# -- states -----------------------------------------------------------------------------------------------------------


def _flat_to_shape(tensor: Tensor, length: tuple[int, ...], shapes: Any) -> tuple[Tensor, ...]:
    """The last dimension of ``tensor`` cut into parts of ``shapes``, each with ``length`` in front."""
    parts = tensor.split([shape.numel() for shape in shapes], dim=-1)
    return tuple(part.reshape((*length, *shape)) for part, shape in zip(parts, shapes, strict=True))


class _Between(nn.Module):
    """Stands between a solver and ``base_func``: translates what is asked, and what is answered."""

    def __init__(self, base_func: Any) -> None:
        super().__init__()
        self.base_func = base_func

    def asked(self, t: Tensor, y: Any) -> tuple[Tensor, Any]:
        return t, y

    def answered(self, value: Any) -> Any:
        return value

    def forward(self, t: Tensor, y: Any) -> Any:
        return self.answered(self.base_func(*self.asked(t, y)))


class _TupleInputOnlyFunc(_Between):
    """Asked about a flat state, for a function of a tuple of ``shapes``."""

    def __init__(self, base_func: Any, shapes: Any) -> None:
        super().__init__(base_func)
        self.shapes = shapes

    def asked(self, t: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        return t, _flat_to_shape(y, (), self.shapes)


class _TupleFunc(_TupleInputOnlyFunc):
    """The same for one that answers with a tuple, too."""

    def answered(self, value: Any) -> Tensor:
        return _joined(value)


class _ReverseFunc(_Between):
    """Asked at -t; with ``mul=-1`` the answer is the slope of time running backwards."""

    def __init__(self, base_func: Any, mul: float = 1.0) -> None:
        super().__init__(base_func)
        self.mul = mul

    def asked(self, t: Tensor, y: Any) -> tuple[Tensor, Any]:
        return t.neg(), y

    def answered(self, value: Any) -> Any:
        return value if self.mul == 1.0 else value * self.mul


class Perturb(Enum):
    """Whether a time stands for the one just before or after it."""

    NONE = 0
    PREV = 1
    NEXT = 2


class _PerturbFunc(_Between):
    """Can be asked just before or after a time; ``base_func`` sees times in the state's real dtype."""

    def forward(self, t: Tensor, y: Tensor, *, perturb: Perturb = Perturb.NONE) -> Any:
        if not isinstance(perturb, Perturb):
            raise CheckTypeError(f"perturb argument must be of type Perturb enum, found {perturb!r}")
        t = (t.real if t.is_complex() else t).to(y.real.dtype if y.is_complex() else y.dtype)
        if perturb is not Perturb.NONE:
            t = _nextafter(t, torch.full_like(t.detach(), torch.inf if perturb is Perturb.NEXT else -torch.inf))
        return self.base_func(t, y)


def _joined(parts: Any) -> Tensor:
    """A tuple state as one vector."""
    return torch.cat([part.reshape(-1) for part in parts])


def _nextafter(x1: Tensor, x2: Tensor) -> Tensor:
    """The neighbour of ``x1`` towards ``x2``, with the gradient of ``x1``."""
    return _StitchGradient.apply(x1, torch.nextafter(x1.detach(), x2.detach()))


class _StitchGradient:
    """``apply(x, value)``: ``value`` with the gradient of ``x``."""

    @staticmethod
    def apply(x: Tensor, value: Tensor) -> Tensor:
        return x + (value - x.detach()) if x.requires_grad else value


# -- inputs -----------------------------------------------------------------------------------------------------------


def _tuple_tol(name: str, tol: Any, shapes: Any) -> Any:
    if (isinstance(tol, Tensor) and tol.dim() == 0) or not hasattr(tol, "__iter__"):
        return tol
    parts = tuple(tol)
    if len(parts) != len(shapes):
        raise CheckError(f"If using tupled {name} it must have the same length as the tuple y0")
    return torch.cat([torch.as_tensor(part).expand(shape.numel()) for part, shape in zip(parts, shapes, strict=True)])


def _decreasing(t: Tensor) -> Tensor:
    return (t.diff() < 0).all()


def _assert_increasing(name: str, t: Tensor) -> None:
    if not bool((t.diff() > 0).all()):
        raise CheckError(f"{name} must be strictly increasing or decreasing")


def _flip_option(options: dict[str, Any], option_name: str) -> None:
    if options.get(option_name) is not None:
        options[option_name] = -torch.as_tensor(options[option_name])


def _check_timelike(name: str, timelike: Any, can_grad: bool) -> None:
    check_times(timelike, timelike.device if isinstance(timelike, Tensor) else torch.device("cpu"), name)
    if not can_grad and timelike.requires_grad:
        raise CheckError(f"{name} cannot require gradient")


def _check_inputs(
    func: Any, y0: Any, t: Any, rtol: Any, atol: Any, method: Any, options: Any, event_fn: Any, SOLVERS: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The problem as a solver class takes it: flat state, ascending times, func with ``perturb=`` and callbacks.

    Returns (shapes, func, y0, t, rtol, atol, method, options, event_fn, t_is_reversed).
    """
    if event_fn is not None and len(t) != 2:
        raise ArgumentError(f"We require len(t) == 2 when in event handling mode, but got len(t)={len(t)}.")
    if event_fn is not None:
        event_fn = combine_event_functions(event_fn, t[0], y0)
    original, shapes = func, None
    if not isinstance(y0, Tensor):
        if not isinstance(y0, tuple):
            raise CheckTypeError(f"y0 must be either a torch.Tensor or a tuple, found {type(y0).__name__}")
        shapes = [part.shape for part in y0]
        rtol, atol = _tuple_tol("rtol", rtol, shapes), _tuple_tol("atol", atol, shapes)
        y0 = _joined(y0)
        func = _TupleFunc(func, shapes)
        event_fn = event_fn if event_fn is None else _TupleInputOnlyFunc(event_fn, shapes)
    if options is not None and not isinstance(options, Mapping):
        raise ArgumentTypeError(f"options must be a dict, found {type(options).__name__}")
    options = dict(options or {})
    method = "dopri5" if method is None else method
    if method not in SOLVERS:
        known = ", ".join(f'"{name}"' for name in SOLVERS)
        raise MethodNameError(f'Invalid method "{method}". Must be one of {{{known}}}.')
    options["norm"] = _flat_norm(options.get("norm"), shapes)
    t = check_times(t, y0.device)
    t_is_reversed = len(t) > 1 and bool(t[0] > t[1])
    if t_is_reversed:
        t, func = -t, _ReverseFunc(func, mul=-1.0)
        event_fn = event_fn if event_fn is None else _ReverseFunc(event_fn)
        _turn(options)
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if isinstance(tolerance, Tensor) and tolerance.requires_grad:
            raise CheckError(f"{name} cannot require gradient")
    func = _PerturbFunc(func)
    _attach_callbacks(func, original, shapes, t_is_reversed, method, SOLVERS[method])
    return shapes, func, y0, t, rtol, atol, method, options, event_fn, t_is_reversed


def _flat_norm(norm: Any, shapes: Any) -> Any:
    if shapes is None:
        return _rms_norm if norm is None else norm
    of_tuple = _mixed_norm if norm is None else norm
    return lambda tensor: of_tuple(_flat_to_shape(tensor, (), shapes))


def _turn(options: dict[str, Any]) -> None:
    """Options that are times, or make them, for time running backwards."""
    build = options.get("grid_constructor")
    if build is not None:
        options["grid_constructor"] = lambda func, y0, t: -build(func, y0, -t)
    for name in ("step_t", "jump_t"):
        _flip_option(options, name)


def _attach_callbacks(func: Any, original: Any, shapes: Any, turned: bool, method: str, solver: Any) -> None:
    def translated(call: Any) -> Any:
        def told(t0: Any, y0: Any, dt: Any) -> Any:
            return call(-t0 if turned else t0, y0 if shapes is None else _flat_to_shape(y0, (), shapes), dt)

        return told

    given = set()
    for name in _all_callback_names:
        call = getattr(original, name, None)
        if call is not None and call is not _null_callback:
            given.add(name)
        setattr(func, name, _null_callback if call is None else translated(call))
    for name in _all_adjoint_callback_names:
        if hasattr(original, name):
            setattr(func, name, getattr(original, name))
    unserved = given - solver.valid_callbacks()
    if unserved:
        warnings.warn(f"Solver '{method}' does not support callbacks {unserved}", stacklevel=4)
