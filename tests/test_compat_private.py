"""Client code that uses torchdiffeq's private names: the same lines on torchdiffeq and on ``install_as_torchdiffeq``."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]

COMMON = """
import torch
import torchdiffeq
from torchdiffeq._impl import *
torch.set_default_dtype(torch.float64)
t = torch.linspace(0.0, 1.0, 5)
y0 = torch.tensor([[1.0, 0.5], [0.2, -1.0]])
def f(t, y):
    return torch.sin(t) * y - 0.3 * y ** 3
"""

CLIENTS = {
    "names imported from where they are used, and questions whether torchdiffeq is there": """
import hashlib
import importlib.util
from importlib import import_module
from pathlib import Path
from torchdiffeq._impl.adaptive_heun import _AH_C_MID
from torchdiffeq._impl.adjoint import SOLVERS, _all_callback_names, _check_inputs, odeint
from torchdiffeq._impl.fixed_adams import _MAX_ORDER, FixedGridODESolver, Perturb
from torchdiffeq._impl.fixed_grid import rk3_step_func
from torchdiffeq._impl.misc import _assert_floating, _assert_one_dimensional, _flip_option
from torchdiffeq._impl.odeint import RK4, AdamsBashforthMoulton, Dopri5Solver, ScipyWrapperODESolver
from torchdiffeq._impl.rk_common import _one_sixth, _one_third, _two_thirds
names = ["torchdiffeq", "torchdiffeq._impl", "torchdiffeq._impl.odeint", "torchdiffeq._impl.dopri5"]
there = [importlib.util.find_spec(name) is not None for name in names]
files = [len(hashlib.sha256(Path(import_module(name).__file__).read_bytes()).digest()) for name in names]
options = {"step_t": t}
_flip_option(options, "step_t")
out = [torch.tensor([*there, *files, _MAX_ORDER, _one_third + _two_thirds + _one_sixth]), options["step_t"], _AH_C_MID.sum()]
out += [torch.tensor([SOLVERS["rk4"] is RK4, SOLVERS["dopri5"] is Dopri5Solver]), odeint(f, y0, t, method="rk4")]
for check, wrong in ((_assert_floating, t.int()), (_assert_one_dimensional, y0)):
    try:
        check("t", wrong)
    except (TypeError, AssertionError) as error:
        out.append(torch.tensor(float(isinstance(error, TypeError))))
solver = SOLVERS["euler"](func=f, y0=y0, rtol=1e-3, atol=1e-3, max_steps=10)
out += list(solver._step_func(lambda *args, **kwargs: y0, t[0], t[1] - t[0], t[1], y0))
""",
    "a step function inserted into SOLVERS": """
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.solvers import FixedGridODESolver
class Ralston(FixedGridODESolver):
    order = 2
    def _step_func(self, func, t0, dt, t1, y0):
        f0 = func(t0, y0)
        f1 = func(t0 + 2 * dt / 3, y0 + 2 * dt / 3 * f0)
        return dt * (f0 / 4 + 3 * f1 / 4), f0
SOLVERS["ralston"] = Ralston
y = y0.clone().requires_grad_()
out = [torchdiffeq.odeint(f, y, t, method="ralston")]
out += [torchdiffeq.odeint(f, y, t, method="ralston", options={"step_size": 0.1})]
out += [torchdiffeq.odeint(f, y0, t.flip(0), method="ralston", options={"step_size": 0.125, "interp": "cubic"})]
out += torch.autograd.grad(out[1][-1].sum(), y)
out += list(torchdiffeq.odeint(lambda t, y: (y[1], -y[0]), (y0, y0 + 1), t, method="ralston"))
grid = lambda func, y0, t: torch.tensor([0.0, 0.1, 0.4, 1.0])
out += [torchdiffeq.odeint(f, y0, t, method="ralston", options={"grid_constructor": grid})]
""",
    "a class that integrates itself": """
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.solvers import FixedGridODESolver
class Recorder(FixedGridODESolver):
    order = 1
    def __init__(self, func, y0, scale=1.0, **kwargs):
        super().__init__(func, y0, **kwargs)
        self.scale = scale
    def _step_func(self, func, t0, dt, t1, y0):
        f0 = func(t0, y0)
        return dt * f0 * self.scale, f0
    def integrate(self, t):
        grid = self.grid_constructor(self.func, self.y0, t)
        ys = [self.y0]
        for t0, t1 in zip(grid[:-1], grid[1:]):
            dy, f0 = self._step_func(self.func, t0, t1 - t0, t1, ys[-1])
            ys.append(ys[-1] + dy)
        return torch.stack(ys)
SOLVERS["recorder"] = Recorder
out = [torchdiffeq.odeint(f, y0, t, method="recorder", options={"scale": 0.5, "step_size": 0.2})]
""",
    "early stopping by hand on dopri5": """
from torchdiffeq._impl.dopri5 import _DORMAND_PRINCE_SHAMPINE_TABLEAU, DPS_C_MID
from torchdiffeq._impl.rk_common import RKAdaptiveStepsizeODESolver
from torchdiffeq._impl.interp import _interp_evaluate
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.misc import _check_inputs, _flat_to_shape
version = int(torchdiffeq.__version__[0] + torchdiffeq.__version__[2] + torchdiffeq.__version__[4])
class Early(RKAdaptiveStepsizeODESolver):
    order = 5
    tableau = _DORMAND_PRINCE_SHAMPINE_TABLEAU
    mid = DPS_C_MID
    def __init__(self, func, y0, rtol, atol, opt, **kwargs):
        super().__init__(func, y0, rtol=rtol, atol=atol, **kwargs)
        self.best = opt["best"]
    def integrate(self, t):
        solution = torch.empty(len(t), *self.y0.shape)
        solution[0] = self.y0
        t = t.to(self.dtype)
        self._before_integrate(t)
        self.track = []
        for i in range(1, len(t)):
            while t[i] > self.rk_state.t1:
                self.rk_state = self._adaptive_step(self.rk_state)
                self.track += [self.rk_state.t0, self.rk_state.t1, self.rk_state.y1.sum(), self.rk_state.dt]
                self.best = max(self.best, float(self.rk_state.y1.max()))
            s = self.rk_state
            solution[i] = _interp_evaluate(s.interp_coeff, s.t0, s.t1, t[i])
        return solution
SOLVERS["early"] = Early
checked = _check_inputs(f, y0, t, 1e-6, 1e-8, "early", {"max_step": 0.4}, None, SOLVERS)
shapes, func, y, tt, rtol, atol, method, options, event_fn, turned = checked
solver = Early(func, y, rtol, atol, opt={"best": 0.0}, **options)
out = [version, turned, len(checked), solver.integrate(tt), solver.best, torch.stack(solver.track)]
""",
    "early stopping by hand on rk4": """
from torchdiffeq._impl.misc import Perturb, _check_inputs
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.rk_common import rk4_alt_step_func
from torchdiffeq._impl.solvers import FixedGridODESolver
class Early(FixedGridODESolver):
    order = 4
    def __init__(self, func, y0, opt=None, **kwargs):
        super().__init__(func, y0, **kwargs)
        self.opt = opt
    def _step_func(self, func, t0, dt, t1, y0):
        f0 = func(t0, y0, perturb=Perturb.NEXT if self.perturb else Perturb.NONE)
        return rk4_alt_step_func(func, t0, dt, t1, y0, f0=f0, perturb=self.perturb), f0
    def integrate(self, t):
        grid = self.grid_constructor(self.func, self.y0, t)
        out, j, y0 = [self.y0], 1, self.y0
        for t0, t1 in zip(grid[:-1], grid[1:]):
            dy, f0 = self._step_func(self.func, t0, t1 - t0, t1, y0)
            y1 = y0 + dy
            while j < len(t) and t1 >= t[j]:
                out.append(self._linear_interp(t0, t1, y0, y1, t[j]))
                j += 1
            y0 = y1
        return torch.stack(out)
checked = _check_inputs(f, y0, t, 1e-6, 1e-8, "rk4", {"step_size": 0.1}, None, SOLVERS)
out = [Early(checked[1], checked[2], rtol=1e-6, atol=1e-8, opt=1, **checked[7]).integrate(t)]
""",
    "derived pairs by name": """
from torchdiffeq._impl.bosh3 import Bosh3Solver
from torchdiffeq._impl.dopri5 import Dopri5Solver
from torchdiffeq._impl.odeint import SOLVERS
times = []
class Mine(Dopri5Solver):
    def _adaptive_step(self, state):
        new = super()._adaptive_step(state)
        times.append(new.t1)
        return new
class Third(Bosh3Solver):
    pass
SOLVERS["mine"], SOLVERS["third"] = Mine, Third
out = [torchdiffeq.odeint(f, y0, t, rtol=1e-6, atol=1e-8, method="mine")]
out += [torch.stack(times), torchdiffeq.odeint(f, y0, t.flip(0), rtol=1e-5, atol=1e-7, method="third")]
""",
    "a replaced step size rule": """
import torchdiffeq._impl.rk_common as rk
calls = []
def rule(last_step, error_ratio, safety, ifactor, dfactor, order):
    calls.append(1.0)
    return last_step * 0 + 0.125
kept = rk._optimal_step_size
rk._optimal_step_size = rule
out = [torchdiffeq.odeint(f, y0, t, method="dopri5", options={"first_step": 0.125}), len(calls)]
rk._optimal_step_size = kept
""",
    "pieces": """
from torchdiffeq._impl import misc, interp, rk_common
from torchdiffeq._impl.dopri5 import _DORMAND_PRINCE_SHAMPINE_TABLEAU as tableau
from torchdiffeq._impl.misc import *
from torchdiffeq._impl.misc import (_rms_norm, _mixed_norm, _compute_error_ratio, _select_initial_step, _flat_to_shape,
                                    _PerturbFunc, _optimal_step_size, _all_callback_names)
g = _PerturbFunc(lambda t, y: y * t)
time = torch.tensor(0.3)
out = [_rms_norm(y0), _mixed_norm((y0, 3 * y0)), _mixed_norm(())]
out += [_compute_error_ratio(y0 * 1e-6, 1e-5, 1e-7, y0, 2 * y0, _rms_norm)]
out += [_select_initial_step(g, time, y0, 4, 1e-6, 1e-8, _rms_norm)]
out += [_select_initial_step(f, time, y0, 2, torch.tensor(1e-6), torch.tensor(1e-8), _rms_norm, f0=f(time, y0))]
one = torch.tensor(1.0)
out += [_optimal_step_size(one, one * r, 0.9 * one, 10 * one, 0.2 * one, 5) for r in (0.0, 1e-9, 0.3, 0.99, 1.5, 1e9)]
out += list(_flat_to_shape(torch.arange(14.0).view(2, 7), (2,), [torch.Size([2, 2]), torch.Size([3])]))
out += [g(time, y0, perturb=p) - g(time, y0) for p in misc.Perturb]
h = torch.tensor(0.25)
step = rk_common._runge_kutta_step(_PerturbFunc(f), y0, f(time, y0), time, h, time + h, tableau)
out += list(step)
coefficients = interp._interp_fit(y0, step[0], y0 + 0.1, f(time, y0), step[1], h)
out += coefficients + [interp._interp_evaluate(coefficients, time, time + h, time + 0.1)]
out += [rk_common.rk4_alt_step_func(_PerturbFunc(f), time, h, time + h, y0), len(_all_callback_names)]
out += [rk_common.rk4_step_func(_PerturbFunc(f), time, h, time + h, y0)]
out += [tableau.alpha, tableau.c_sol, tableau.c_error, *tableau.beta]
""",
    "adjoint names": """
from torchdiffeq._impl.adjoint import find_parameters, handle_adjoint_norm_, OdeintAdjointMethod
from torchdiffeq._impl.misc import _rms_norm, _check_inputs
from torchdiffeq._impl.odeint import SOLVERS
torch.manual_seed(0)
net = torch.nn.Linear(2, 2)
func = type("F", (torch.nn.Module,), {})()
func.net = net
func.forward = lambda t, y: torch.tanh(net(y))
params = find_parameters(func)
options = {}
handle_adjoint_norm_(options, None, _rms_norm)
semi = {"norm": "seminorm"}
handle_adjoint_norm_(semi, None, _rms_norm)
own = {"norm": lambda state: len(state)}
handle_adjoint_norm_(own, [torch.Size([2]), torch.Size([2])], _rms_norm)
state = (torch.tensor(0.1), y0, 2 * y0, 100 * y0)
out = [len(list(params)), options["norm"](state), semi["norm"](state)]
out += [own["norm"]((torch.tensor(0.1), torch.ones(4), torch.ones(4)))]
x = y0.clone().requires_grad_()
y = OdeintAdjointMethod.apply(None, func, x, t, 1e-9, 1e-10, "dopri5", {}, None, 1e-9, 1e-10, "dopri5", {}, False, *params)
out += [y, *torch.autograd.grad(y[-1].square().sum(), [x, *params])]
""",
    "a user's class in odeint_adjoint": """
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.fixed_grid import Euler, Midpoint, RK4
class Named(RK4):
    pass
SOLVERS["named"] = Named
torch.manual_seed(0)
net = torch.nn.Linear(2, 2)
class Func(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net
    def forward(self, t, y):
        return torch.tanh(self.net(y)) * torch.cos(t)
x = y0.clone().requires_grad_()
y = torchdiffeq.odeint_adjoint(Func(), x, t, method="named", options={"step_size": 0.01})
out = [y, *torch.autograd.grad(y[-1].square().sum(), [x, *net.parameters()])]
""",
    "callbacks of a user's class": """
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.fixed_grid import Midpoint
class Named(Midpoint):
    pass
SOLVERS["named"] = Named
seen = []
class Func(torch.nn.Module):
    def forward(self, t, y):
        return -y
    def callback_step(self, t0, y0, dt):
        seen.append(torch.stack([t0, y0.sum(), dt]))
out = [torchdiffeq.odeint(Func(), y0, t.flip(0), method="named"), torch.stack(seen)]
""",
}

CLIENTS |= {
    "replaced methods of built-in classes": """
from torchdiffeq._impl.dopri5 import Dopri5Solver
from torchdiffeq._impl.fixed_grid import RK4
import torchdiffeq._impl.fixed_grid as fixed_grid
from torchdiffeq._impl.rk_common import rk4_step_func
seen = []
def noted(function):
    def call(self, *args):
        seen.append(1.0)
        return function(self, *args)
    return call
adaptive, fixed, increment = Dopri5Solver._adaptive_step, RK4._step_func, fixed_grid.rk4_alt_step_func
Dopri5Solver._adaptive_step = noted(adaptive)
out = [torchdiffeq.odeint(f, y0, t, rtol=1e-5, atol=1e-7), len(seen)]
Dopri5Solver._adaptive_step = adaptive
RK4._step_func = noted(fixed)
out += [torchdiffeq.odeint(f, y0, t, method="rk4"), len(seen)]
RK4._step_func = fixed
fixed_grid.rk4_alt_step_func = rk4_step_func
out += [torchdiffeq.odeint(f, y0, t, method="rk4")]
fixed_grid.rk4_alt_step_func = increment
""",
    "events of solver classes": """
from torchdiffeq._impl.odeint import SOLVERS
from torchdiffeq._impl.fixed_grid import RK4
from torchdiffeq._impl.dopri5 import Dopri5Solver
class Fixed(RK4): pass
class Adaptive(Dopri5Solver): pass
SOLVERS["fixed"], SOLVERS["adaptive"] = Fixed, Adaptive
zero, one = torch.tensor(0.0), torch.ones(1)
half = lambda t, y: y - 0.5
options = {"step_size": 0.01, "interp": "cubic"}
out = list(torchdiffeq.odeint_event(lambda t, y: -y, one, zero, event_fn=half, method="fixed", options=options, atol=1e-10))
y = torch.ones(1, requires_grad=True)
time, states = torchdiffeq.odeint_event(lambda t, y: -y, y, zero, event_fn=half, method="adaptive", atol=1e-10)
out += [time, states, *torch.autograd.grad(time, y)]
two = lambda t, y: y[0] - 2.0
time, states = torchdiffeq.odeint_event(lambda t, y: (-y[0], y[1]), (one, one + 1), zero, event_fn=two, method="adaptive",
                                        atol=1e-10, reverse_time=True)
out += [time, *states]
""",
    "a step of a backward method, a norm and jumps in adjoint options": """
torch.manual_seed(0)
net = torch.nn.Linear(2, 2)
func = type("F", (torch.nn.Module,), {})()
func.net = net
func.forward = lambda t, y: torch.tanh(net(y))
def gradients(**more):
    y = y0.clone().requires_grad_()
    loss = torchdiffeq.odeint_adjoint(func, y, t, rtol=1e-9, atol=1e-10, **more)[-1].square().sum()
    return list(torch.autograd.grad(loss, [y, *net.parameters()]))
jumps = {"jump_t": torch.tensor([0.3])}
out = gradients(adjoint_method="rk4", adjoint_options={"step_size": 0.01})
out += gradients(options=jumps, adjoint_options={"norm": "seminorm", **jumps})
""",
    "a flow with a divergence, which marks t and y": """
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
class Flow(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net
    def forward(self, t, state):
        z, _ = state
        with torch.set_grad_enabled(True):
            z.requires_grad_(True)
            t.requires_grad_(True)
            dz = self.net(z) * torch.cos(t)
            div = sum(torch.autograd.grad(dz[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2))
        return dz, -div.view(-1, 1)
z, change = torchdiffeq.odeint_adjoint(Flow(), (y0, torch.zeros(2, 1)), torch.tensor([1.0, 0.0]), rtol=1e-9, atol=1e-10)
out = [z, change, *torch.autograd.grad(z[-1].sum() + change[-1].sum(), list(net.parameters()), allow_unused=True)[:3]]
""",
    "tolerances as lists and numpy numbers, Adams derived from": """
import numpy
from torchdiffeq._impl.fixed_adams import AdamsBashforthMoulton
from torchdiffeq._impl.odeint import SOLVERS
class Mine(AdamsBashforthMoulton): pass
SOLVERS["mine"] = Mine
g = lambda t, y: (-y[0], y[1] * torch.cos(t))
out = [*torchdiffeq.odeint(g, (y0, y0[0]), torch.tensor([0.0, 1.0]), rtol=[1e-9, 1e-10], atol=numpy.float32(1e-10))]
out += [torchdiffeq.odeint(f, y0, torch.linspace(0, 1, 161), method="mine", options={"max_order": 4})]
""",
}

# Gradients of the backward ODE are as accurate as its tolerance; all else is the same arithmetic in another order.
TOLERANCE = {
    "adjoint names": 1e-6, "a user's class in odeint_adjoint": 1e-8, "events of solver classes": 1e-8,
    "a step of a backward method, a norm and jumps in adjoint options": 1e-6,
    "a flow with a divergence, which marks t and y": 1e-6,
    "tolerances as lists and numpy numbers, Adams derived from": 1e-6, "replaced methods of built-in classes": 1e-9,
}

DRIVER = """
import json, sys, warnings
import torch
warnings.simplefilter("ignore")
install = sys.argv[1] == "ours"
if install:
    import solvers
    solvers.install_as_torchdiffeq()
found = {}
common, clients = json.load(sys.stdin)
for name, code in clients.items():
    scope = {}
    try:
        exec(common + code, scope)
        found[name] = [torch.as_tensor(x, dtype=torch.float64).detach().reshape(-1).tolist() for x in scope["out"]]
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
import torchdiffeq
assert install == ("solvers" in torchdiffeq.__file__), "the wrong torchdiffeq"
print("RESULT" + json.dumps(found))
"""


@functools.cache
def results(whose: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, whose], input=json.dumps([COMMON, CLIENTS]), cwd=ROOT, capture_output=True, text=True,
        check=False, timeout=300,
    )
    assert "RESULT" in done.stdout, done.stderr
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.mark.parametrize("client", CLIENTS)
def test_clients_run_and_get_finite_numbers(client: str) -> None:
    found = results("ours")[client]
    assert not isinstance(found, str), found
    assert all(math.isfinite(x) for values in found for x in values)


@pytest.mark.parametrize("client", CLIENTS)
def test_clients_get_torchdiffeqs_numbers(client: str) -> None:
    if importlib.util.find_spec("torchdiffeq") is None:
        pytest.skip("torchdiffeq is not installed")
    ours, theirs = results("ours")[client], results("theirs")[client]
    assert not isinstance(ours, str), ours
    assert not isinstance(theirs, str), theirs
    assert [len(x) for x in ours] == [len(x) for x in theirs]
    tolerance = TOLERANCE.get(client, 1e-11)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance), number


INSTALL = """
import sys, solvers
first = solvers.install_as_torchdiffeq()
assert solvers.install_as_torchdiffeq() is first
import torchdiffeq, torchdiffeq._impl.rk_common
assert torchdiffeq is first and torchdiffeq.odeint is solvers.odeint and torchdiffeq.__version__ == "0.2.5"
from solvers.compat.private import uninstall_torchdiffeq
uninstall_torchdiffeq()
assert not [name for name in sys.modules if name.split(".")[0] == "torchdiffeq"]
sys.modules["torchdiffeq"] = first
try:
    solvers.install_as_torchdiffeq()
except solvers.ArgumentError as error:
    assert "imported already" in str(error)
else:
    raise SystemExit("installed over an imported torchdiffeq")
"""


def test_installing_twice_taking_it_back_and_coming_too_late() -> None:
    done = subprocess.run([sys.executable, "-c", INSTALL], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


EXAMPLES = [
    ("bouncing_ball.py", [], r"Gradient check (passed)"),
    ("bouncing_ball.py", ["--adjoint"], r"Gradient check (passed)"),
    ("learn_physics.py", ["--num_iterations", "11"], r"(?m)^\d+ ([\d.]+) "),
    ("ode_demo.py", ["--niters", "40", "--test_freq", "20", "--data_size", "200"], r"Total Loss ([\d.]+)"),
    ("cnf.py", ["--niters", "5", "--num_samples", "128"], r"loss: ([\d.]+)"),
    ("latent_ode.py", ["--niters", "5"], r"elbo: (-[\d.]+)"),
]
"""torchdiffeq's examples: bounded iterations, and where what they reach stands in what they print."""

EXAMPLE = """
import os, random, runpy, sys, warnings
warnings.simplefilter("ignore")
whose, path, *sys.argv[1:] = sys.argv[1:]
if whose == "ours":
    import solvers
    solvers.install_as_torchdiffeq()
import numpy, torch
torch.manual_seed(0), numpy.random.seed(0), random.seed(0)
sys.argv[0] = path
sys.path.insert(0, os.path.dirname(path))
runpy.run_path(path, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments", "pattern"), EXAMPLES)
def test_torchdiffeqs_examples_reach_the_same(name: str, arguments: list[str], pattern: str, tmp_path: Path) -> None:
    folder = os.environ.get("TORCHDIFFEQ_EXAMPLES")
    if folder is None:
        pytest.skip("TORCHDIFFEQ_EXAMPLES names no folder of torchdiffeq's examples")
    for package in ("torchdiffeq", "matplotlib", "sklearn"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    reached = {}
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    for whose in ("ours", "theirs"):
        command = [sys.executable, "-c", EXAMPLE, whose, str(Path(folder) / name), *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300,
            env=os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": paths},
        )
        assert done.returncode == 0, done.stderr
        reached[whose] = re.findall(pattern, done.stdout)[-1]
    if reached["theirs"] == "passed":
        assert reached["ours"] == "passed"
    else:
        assert float(reached["ours"]) == pytest.approx(float(reached["theirs"]), rel=0.05)


CDE = """
import json, sys, warnings
warnings.simplefilter("ignore")
if sys.argv[1] == "ours":
    import solvers
    solvers.install_as_torchdiffeq()
import torch, torchcde
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
class Func(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 12)
    def forward(self, t, z):
        return torch.tanh(self.linear(z)).view(*z.shape[:-1], 4, 3)
func = Func()
x, found = torch.randn(2, 5, 3), {}
spline = torchcde.CubicSpline(torchcde.natural_cubic_coeffs(x))
straight = torchcde.LinearInterpolation(torchcde.linear_interpolation_coeffs(x))
cases = {"cubic": (spline, {}), "linear, jump_t": (straight, {"options": {"jump_t": straight.grid_points}})}
for name, (X, more) in cases.items():
    for adjoint in (True, False):
        z0 = torch.ones(2, 4, requires_grad=True)
        z = torchcde.cdeint(X=X, func=func, z0=z0, t=X.interval, adjoint=adjoint, method="dopri5", rtol=1e-8, atol=1e-10, **more)
        gradients = torch.autograd.grad(z.square().sum(), [z0, func.linear.weight])
        found[f"{name}, adjoint={adjoint}"] = [part.reshape(-1).tolist() for part in (z, *gradients)]
print("RESULT" + json.dumps(found))
"""


@pytest.mark.slow
def test_torchcde_gets_the_same_numbers_forwards_and_backwards() -> None:
    for package in ("torchcde", "torchdiffeq"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    found = {}
    for whose in ("ours", "theirs"):
        command = [sys.executable, "-c", CDE, whose]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
        assert "RESULT" in done.stdout, done.stderr
        found[whose] = json.loads(done.stdout.split("RESULT")[1])
    for name, numbers in found["theirs"].items():
        for ours, theirs in zip(found["ours"][name], numbers, strict=True):
            assert ours == pytest.approx(theirs, rel=3e-5, abs=3e-5), name
