"""torchdiffeq's method names and options, translated to a method, a controller and keywords of ``solve``."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..control import CONTROLLERS, Controller, Jump
from ..layout import Layout
from ..loop import Plan
from ..methods import METHODS, Method
from ..registry import options_of
from ..status import ArgumentError, ArgumentTypeError
from . import strict as exact
from .errors import CheckError, CheckTypeError, MethodNameError
from .wrappers import Corrected, FromStart, Watch, Watched, WatchedController, linear, perturbed

CLASS_NAMES = {
    "dopri8": "Dopri8Solver",
    "dopri5": "Dopri5Solver",
    "tsit5": "Tsit5Solver",
    "bosh3": "Bosh3Solver",
    "fehlberg2": "Fehlberg2",
    "adaptive_heun": "AdaptiveHeunSolver",
    "euler": "Euler",
    "midpoint": "Midpoint",
    "heun2": "Heun2",
    "heun3": "Heun3",
    "rk4": "RK4",
    "explicit_adams": "AdamsBashforth",
    "implicit_adams": "AdamsBashforthMoulton",
    "fixed_adams": "AdamsBashforthMoulton",
    "implicit_euler": "ImplicitEuler",
    "implicit_midpoint": "ImplicitMidpoint",
    "trapezoid": "Trapezoid",
    "radauIIA3": "RadauIIA3",
    "gl4": "GaussLegendre4",
    "radauIIA5": "RadauIIA5",
    "gl6": "GaussLegendre6",
    "sdirk2": "SDIRK2",
    "trbdf2": "TRBDF2",
    "scipy_solver": "ScipyWrapperODESolver",
}
"""torchdiffeq's methods, and the classes that its warnings name."""

ADAPTIVE = ("dopri8", "dopri5", "tsit5", "bosh3", "fehlberg2", "adaptive_heun")
ADAMS = ("explicit_adams", "implicit_adams", "fixed_adams")
OPEN = ("implicit_midpoint", "gl4", "gl6")
"""Methods without a node at the ends of a step; callers of torchdiffeq see func evaluated at every time of the grid."""
SCIPY = "scipy_solver"
OTHERS = ("fixed_adams", SCIPY)
"""Names that are no method of ``solvers``."""

ADAPTIVE_OPTIONS = (
    "norm", "min_step", "max_step", "first_step", "step_t", "jump_t", "safety", "ifactor", "dfactor", "max_num_steps", "dtype",
)
FIXED_OPTIONS = ("step_size", "grid_constructor", "interp", "perturb")

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
ENDLESS = 2**31 - 1
CORRECTED = 0.1
"""The last correction of a converged Adams step, in units of the tolerance: so small that it does not add to the error."""


class Choice(NamedTuple):
    """What is to be run: a method with its options, keywords for ``solve``, and a last change to its plan.

    ``watch``: the user's callbacks, or None; :meth:`watched` puts them around method and controller.
    """

    name: str
    method: Method
    controller: Controller | None
    keywords: dict[str, Any]
    adapt: tuple[Callable[[Plan], Plan], ...]
    max_steps: int
    options: dict[str, Any]

    @property
    def adaptive(self) -> bool:
        return self.controller is None or self.controller.adaptive

    @property
    def own_grid(self) -> bool:
        """Whether the options say where f is evaluated, on the way back too."""
        return "grid_constructor" in self.options or "perturb" in self.options

    def watched(self, watch: Watch | None) -> Choice:
        if watch is None:
            return self
        steering = self.controller or CONTROLLERS[self.method.controller]
        return self._replace(method=Watched(self.method, watch), controller=WatchedController(steering, watch))


def known_methods() -> tuple[str, ...]:
    """Every name that ``method=`` takes: torchdiffeq's, as far as they are built, and those of ``solvers.METHODS``."""
    own = [name for name in CLASS_NAMES if name in METHODS or name in OTHERS]
    return tuple(dict.fromkeys([*own, *METHODS]))


def choose(method: Any, options: Any, func: Any, y0: Any, t: Tensor, strict: bool = False) -> Choice:
    """Resolve ``method`` and ``options`` for a solve of ``func`` from ``y0`` over ``t``.

    Raises ``MethodNameError`` for an unknown method, ``CheckError`` / ``ArgumentError`` for values that cannot be used;
    warns of options that mean nothing to the method.
    """
    name = "dopri5" if method is None else method
    if not isinstance(name, str) or not (name in METHODS or name in OTHERS):
        known = ", ".join(f'"{known}"' for known in known_methods())
        raise MethodNameError(f'Invalid method "{name}". Must be one of {{{known}}}.')
    options = _copied(options)
    if strict and name not in exact.METHODS:
        raise ArgumentError(f"strict=True reproduces {', '.join(exact.METHODS)}, found method={name!r}")
    if name == SCIPY:
        choice = Choice(name, METHODS["dopri5"], None, {}, (), ENDLESS, options)
        # What torchdiffeq drops without a word is known, too: here, and "norm" for fixed steps.
        _warn_unused(name, options, ("solver", "min_step", "max_step", "max_nfe", "norm", "grid_points", "eps"))
        return choice
    fixed = (name in CLASS_NAMES and name not in ADAPTIVE) or METHODS[name].error_order is None or _stepped(name, options)
    builder = _fixed if fixed else _adaptive
    choice = builder(name, _method(name, options, y0), options, func, y0, t)
    return exact.made(choice) if strict else choice


def _stepped(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a native method that could choose its steps is asked not to."""
    return name not in CLASS_NAMES and ("step_size" in options or "grid_constructor" in options)


def _copied(options: Any) -> dict[str, Any]:
    if options is None:
        return {}
    if not isinstance(options, Mapping):
        raise ArgumentTypeError(f"options must be a dict, found {type(options).__name__}")
    return dict(options)


def _warn_unused(name: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unused = {key: value for key, value in options.items() if key not in known}
    if unused:
        warnings.warn(f"{CLASS_NAMES.get(name, name)}: Unexpected arguments {unused}", stacklevel=5)


# -- methods ----------------------------------------------------------------------------------------------------------


def _method(name: str, options: Mapping[str, Any], y0: Any) -> Method:
    if name in ADAMS:
        return _adams(name, options)
    method = METHODS[name]
    inner = options.get("inner", "auto")
    optimiser = method.choose_inner(inner) if inner != "auto" or method.implicit else None
    if optimiser is not None:
        method = _with(method, {"inner": _with(optimiser, options)}, ("inner",))
    return _with(method, options)


def _with(thing: Any, options: Mapping[str, Any], names: tuple[str, ...] | None = None) -> Any:
    """``thing`` with those ``options`` that are its own, or that are named."""
    if not options:
        return thing
    own = {key: options[key] for key in (options_of(thing) if names is None else names) if key in options}
    return dataclasses.replace(thing, **own) if own else thing


def _own(method: Method) -> tuple[str, ...]:
    """Options of a method and its inner solver."""
    return (*options_of(method), "inner", *options_of(getattr(method, "inner", method)))


def _adams(name: str, options: Mapping[str, Any]) -> Method:
    """torchdiffeq counts differently: ``max_order`` m is the Adams-Bashforth method of m - 1 steps, and its corrector's order."""
    order = options.get("max_order", 12)
    if isinstance(order, bool) or not isinstance(order, int):
        raise ArgumentTypeError(f"max_order must be an integer, found {order!r}")
    if order > 12:
        raise CheckError(f"max_order must be at most 12, found {order}")
    if order < 4:
        warnings.warn("max_order is below 4, so the solver reduces to `rk4`.", stacklevel=6)
        return METHODS["rk4"]
    if "max_order" not in options:
        warnings.warn(
            f"{name} runs with torchdiffeq's default max_order=12, which is stable for tiny steps only and diverges for most "
            "problems: pass options={'max_order': 5}",
            stacklevel=6,
        )
    implicit = options.get("implicit", name != "explicit_adams")
    if not implicit:
        return _with(METHODS["explicit_adams"], {"order": order - 1})
    corrections = options.get("max_iters", 4)
    if isinstance(corrections, bool) or not isinstance(corrections, int) or corrections < 1:
        raise ArgumentError(f"max_iters must be an integer >= 1, found {corrections!r}")
    return Corrected(order=order, max_corrections=corrections, corrector_tol=CORRECTED)


# -- fixed steps ------------------------------------------------------------------------------------------------------


def _fixed(name: str, method: Method, options: dict[str, Any], func: Any, y0: Any, t: Tensor) -> Choice:
    known = (*FIXED_OPTIONS, *(("max_order", "max_iters", "implicit") if name in ADAMS else ()))
    _warn_unused(name, options, (*known, "norm", "max_iters", *_own(method)))
    size, build = options.get("step_size"), options.get("grid_constructor")
    if size is not None and build is not None:
        raise ArgumentError("step_size and grid_constructor are mutually exclusive arguments.")
    interp = options.get("interp")
    if interp not in (None, "linear", "cubic"):
        raise ArgumentError(f"Unknown interpolation method {interp}: interp must be 'linear' or 'cubic'")
    if interp == "linear":
        method = linear(method)
    if name in OPEN:
        method = FromStart(method)
    changes = (perturbed,) if options.get("perturb", False) else ()
    keywords: dict[str, Any] = {"controller": "fixed"}
    if size is not None and len(t) > 1:
        keywords = {"dt": _number(size, "step_size", positive=True)}
    elif build is not None and len(t) > 1:
        keywords = on_grid(build(*_as_vector(func, y0), t), t)
    return Choice(name, method, CONTROLLERS["fixed"], keywords, changes, ENDLESS, options)


def _as_vector(func: Any, y0: Any) -> tuple[Any, Tensor]:
    """Function and state as a grid constructor of torchdiffeq is given them: of a tuple state one vector."""
    if not isinstance(y0, tuple):
        return func, y0
    layout = Layout(y0)
    layout.lenient = True
    return lambda t, y: layout.flatten(func(t, layout.unflatten(y)), "the value returned by func"), layout.flatten(y0)


def on_grid(grid: Any, t: Tensor) -> dict[str, Any]:
    """Keywords for steps that end at the times in ``grid``, and nowhere else."""
    if not isinstance(grid, Tensor) or grid.dim() != 1 or len(grid) < 2:
        raise CheckTypeError(f"grid_constructor must return a one-dimensional tensor of times, found {grid!r:.60}")
    ends = grid.detach()[[0, -1]].to(torch.float64), t.detach()[[0, -1]].to(torch.float64).to(grid.device)
    if not torch.allclose(*ends, rtol=torch.finfo(grid.dtype).eps * 4, atol=0.0):
        raise CheckError(f"grid_constructor must return a grid from t[0] to t[-1], {ends[1].tolist()}, found {ends[0].tolist()}")
    return {"dt": float((ends[1][1] - ends[1][0]).abs()), "step_t": grid.detach()[1:-1]}


def _number(value: Any, what: str, positive: bool = False) -> float:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{what} must be a number, found {value!r:.40}")
    if math.isnan(value) or (positive and not 0 < value < math.inf):
        raise ArgumentError(f"{what} must be {'positive and finite' if positive else 'a number'}, found {value}")
    return float(value)


# -- adaptive steps ---------------------------------------------------------------------------------------------------


def _adaptive(name: str, method: Method, options: dict[str, Any], func: Any, y0: Any, t: Tensor) -> Choice:
    if not options:  # the usual case, and a tenth of what a short solve takes
        return Choice(name, method, None, {}, (), ENDLESS, options)
    _warn_unused(name, options, (*ADAPTIVE_OPTIONS, *_own(method)))
    limit = options.get("max_num_steps", ENDLESS)
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise ArgumentError(f"max_num_steps must be an integer >= 1, found {limit!r}")
    keywords: dict[str, Any] = {"max_steps": limit}
    if "norm" in options:
        keywords["norm"] = options["norm"]
    if options.get("first_step") is not None:
        keywords["dt0"] = _number(options["first_step"], "first_step", positive=True)
    smallest = _number(options.get("min_step", 0.0), "min_step")
    largest = _number(options.get("max_step", math.inf), "max_step")
    if smallest > 0:
        keywords |= {"dt_min": smallest, "force_dt_min": True}
    if largest < math.inf:
        keywords["dt_max"] = max(largest, smallest)
    keywords |= _stops(options)
    return Choice(name, method, _controller(method, options), keywords, (), limit, options)


def _controller(method: Method, options: Mapping[str, Any]) -> Controller | None:
    names = {"safety": "safety", "ifactor": "factor_max", "dfactor": "factor_min"}
    given = {ours: _number(options[theirs], theirs) for theirs, ours in names.items() if theirs in options}
    if not given:
        return None
    usual = CONTROLLERS[method.controller]
    for ours in given:
        if ours not in options_of(usual):
            raise ArgumentError(f"{', '.join(names)} do not steer method {method.name!r}: leave them away")
    return _with(usual, given)


def _stops(options: Mapping[str, Any]) -> dict[str, Any]:
    steps, jumps = _times(options.get("step_t"), "step_t"), _times(options.get("jump_t"), "jump_t")
    values = [*steps.tolist(), *jumps.tolist()]
    if len(set(values)) < len(values):
        raise ArgumentError("`step_t` and `jump_t` must not have any repeated elements between them.")
    found: dict[str, Any] = {}
    if len(steps):
        found["step_t"] = steps
    if len(jumps):
        found["jumps"] = [Jump(time) for time in jumps.tolist()]
    return found


def _times(value: Any, what: str) -> Tensor:
    try:
        times = torch.as_tensor([] if value is None else value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentTypeError(f"{what} must be a tensor or a sequence of numbers, found {value!r:.40}") from None
    if times.dim() > 1:
        raise ArgumentError(f"{what} must be one dimensional, found shape {tuple(times.shape)}")
    return times.reshape(-1)


# -- callbacks --------------------------------------------------------------------------------------------------------


def callbacks(func: Any, choice: Choice, view: Callable[[Any], Any], suffix: str = "") -> Watch | None:
    """The callbacks that ``func`` carries as attributes; warns of those that the method cannot serve."""
    found = {name: getattr(func, name + suffix, None) for name in CALLBACKS}
    served = () if choice.name == SCIPY else CALLBACKS if choice.adaptive else CALLBACKS[:1]
    unserved = {name + suffix for name, call in found.items() if call is not None and name not in served}
    if unserved:
        warnings.warn(f"Solver '{choice.name}' does not support callbacks {unserved}", stacklevel=4)
    if all(found[name] is None for name in served):
        return None
    step, accept, reject = (found[name] if name in served else None for name in CALLBACKS)
    return Watch(step, accept, reject, view)
