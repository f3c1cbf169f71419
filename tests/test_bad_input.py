"""Bad arguments raise before f is called, and the message names the argument, what was found, and what to do."""

from typing import NamedTuple

import pytest
import torch

from solvers import (
    ArgumentError,
    ArgumentTypeError,
    Jump,
    ProxodeError,
    UnknownNameError,
    UnsupportedError,
    solve,
)

VALUE, TYPE, NAME = ArgumentError, ArgumentTypeError, UnknownNameError
NAN, INF = float("nan"), float("inf")
Y = torch.tensor([1.0, 2.0], dtype=torch.float64)
ROWS = torch.ones(3, 2, dtype=torch.float64)
T = torch.linspace(0.0, 1.0, 3, dtype=torch.float64)
BATCH = dict(y0=ROWS, batch_dim=0)
GROUPS = dict(y0=ROWS, batch_index=torch.tensor([0, 0, 1]))
PAIR = (Y, ROWS)
GRAD = torch.tensor(1e-6, dtype=torch.float64, requires_grad=True)


class Counting:
    """f(t, y) = -y, and how often it was asked."""

    def __init__(self, answer=None):
        self.calls = 0
        self.answer = answer or (lambda y: torch.utils._pytree.tree_map(torch.neg, y))

    def __call__(self, t, y, *args):
        self.calls += 1
        return self.answer(y)


def bad(name, error, *words, **changes):
    return pytest.param(changes, error, words, id=name)


def meta(*shape):
    return torch.ones(*shape, dtype=torch.float64, device="meta")


def complain(f, changes):
    """The call solve(f, Y, T) with changed arguments."""
    arguments = dict(field=f, y0=Y, t=T) | changes
    return solve(arguments.pop("field"), arguments.pop("y0"), arguments.pop("t"), **arguments)


STATE = [
    bad("field not callable", TYPE, "field", "callable", "f(t, y, *args)", "int", field=3),
    bad("y0 a list of floats", TYPE, "leaf 0 of y0", "float 1.0", "torch.tensor", y0=[1.0, 2.0]),
    bad("y0 a number", TYPE, "y0 must be a tensor", "float 1.0", "torch.tensor", y0=1.0),
    bad("y0 None", TYPE, "y0", "NoneType", "torch.tensor", y0=None),
    bad("y0 numpy", TYPE, "y0", "ndarray", "torch.tensor", y0=Y.numpy()),
    bad("y0 integer", TYPE, "y0", "int64", ".double()", y0=torch.arange(3)),
    bad("y0 bool in a dict", TYPE, "leaf 1 of y0", "bool", y0={"a": Y, "b": Y > 0}),
    bad("y0 an empty tuple", TYPE, "y0", "at least one tensor", "empty", y0=()),
    bad("y0 on two devices", VALUE, "leaf 1 of y0", "meta", "cpu", "move", y0=(Y, meta(2))),
    bad("args not a tuple", TYPE, "args", "tuple", "Tensor", "(x,)", args=Y),
    bad("args a list", TYPE, "args", "list", "(x,)", args=[Y]),
]

TIMES = [
    bad("t 0-dim", VALUE, "t must have shape (T,)", "()", t=torch.tensor(1.0)),
    bad("t a number", TYPE, "t must be", "sequence of numbers", "1.0", t=1.0),
    bad("t text", TYPE, "t must be", "sequence of numbers", "soon", t="soon"),
    bad("t empty", VALUE, "t must hold at least one time", "none", t=torch.zeros(0)),
    bad("t an empty list", VALUE, "t must hold at least one time", "none", t=[]),
    bad("t complex", TYPE, "t must be real", "complex128", t=T + 0j),
    bad("t bool", TYPE, "t must be real", "bool", t=torch.tensor([False, True])),
    bad("t NaN", VALUE, "t must be finite", "t[1] = nan", t=[0.0, NAN, 1.0]),
    bad("t NaN at the end in joint mode", VALUE, "t must be finite", "t[2] = nan", t=[0.0, 1.0, NAN]),
    bad("t infinite", VALUE, "t must be finite", "t[1] = inf", t=[0.0, INF]),
    bad("t turns round", VALUE, "strictly", "t[1] = 2", "t[2] = 1", t=[0.0, 2.0, 1.0]),
    bad("t repeats", VALUE, "strictly", "t[1] = 0.5", "t[2] = 0.5", t=[0.0, 0.5, 0.5, 1.0]),
    bad("t repeats at once", VALUE, "strictly", "t[0] = 0", "t[1] = 0", t=[0.0, 0.0, 1.0]),
    bad("t per sample in joint mode", VALUE, "t must have shape (T,)", "(3, 3)", "batch_dim=0", t=T.expand(3, 3)),
    bad("t of too few samples", VALUE, "(T,) or (3, T)", "(2, 3)", t=T.expand(2, 3), **BATCH),
    bad("t of too few groups", VALUE, "(T,) or (2, T)", "(3, 3)", t=T.expand(3, 3), **GROUPS),
    bad("t with three dimensions", VALUE, "(T,) or (3, T)", "(1, 3, 3)", t=T.expand(1, 3, 3), **BATCH),
    bad("t padded in the middle", VALUE, "NaN may only pad", "t[1, 1] = nan",
        t=torch.tensor([[0, 1, 2.0], [0, NAN, 2], [0, 1, 2]]), **BATCH),
    bad("t row without times", VALUE, "NaN may only pad", "t[2, 0] = nan",
        t=torch.tensor([[0, 1.0], [0, 1], [NAN, NAN]]), **BATCH),
    bad("t row turns round", VALUE, "strictly", "t[2, 1] = 1", "t[2, 2] = 0.5",
        t=torch.tensor([[0, 1, 2], [0, -1, -2], [0, 1, 0.5]]), **BATCH),
]  # fmt: skip

TOLERANCES = [
    bad("rtol zero", VALUE, "rtol must be positive", "found 0", rtol=0.0),
    bad("atol negative", VALUE, "atol must be positive", "-1e-09", atol=-1e-9),
    bad("atol zero in one element", VALUE, "atol must be positive", "found 0", "tiny", atol=torch.tensor([1.0, 0.0])),
    bad("rtol NaN", VALUE, "rtol must be positive", "nan", rtol=NAN),
    bad("rtol text", TYPE, "rtol must be a number", "str", rtol="small"),
    bad("rtol bool", TYPE, "rtol must be a number", "bool", rtol=True),
    bad("rtol None", TYPE, "rtol must be a number", "None", rtol=None),
    bad("atol complex", TYPE, "atol must be", "real", "complex128", atol=Y + 0j),
    bad("rtol with a gradient", VALUE, "rtol", "gradient", "rtol.detach()", rtol=GRAD),
    bad("atol of the wrong shape", VALUE, "atol", "(3,)", "(2,)", "broadcast", atol=torch.ones(3)),
    bad("atol of the wrong structure", TYPE, "atol", "structure of the state", y0=PAIR, atol=[1.0, 1.0]),
    bad("rtol a tensor for a tree", TYPE, "rtol", "structure of the state", "tensor", y0=PAIR, rtol=torch.ones(2)),
    bad("norm not callable", TYPE, "norm must be callable", "str", norm="rms"),
]  # fmt: skip

MODES = [
    bad("batch_dim 1", VALUE, "batch_dim must be None or 0", "1", "move the batch", y0=ROWS, batch_dim=1),
    bad("batch_dim -1", VALUE, "batch_dim must be None or 0", "-1", "move the batch", y0=ROWS, batch_dim=-1),
    bad("batch_dim of a 0-dim state", VALUE, "y0", "no dimension 0", "(B, ...)", y0=Y[0], batch_dim=0),
    bad("batch_dim of unequal leaves", VALUE, "leaf 1 of y0 has 3 rows", "2", y0=(Y, ROWS), batch_dim=0),
    bad("batch_dim and batch_index", VALUE, "exclude each other", **BATCH, batch_index=torch.tensor([0, 0, 1])),
    bad("batch_index float", TYPE, "batch_index", "integer", "float32", y0=ROWS, batch_index=torch.zeros(3)),
    bad("batch_index bool", TYPE, "batch_index", "integer", "bool", y0=ROWS, batch_index=torch.zeros(3) > 0),
    bad("batch_index a list", TYPE, "batch_index", "integer tensor", "list", y0=ROWS, batch_index=[0, 0, 1]),
    bad("batch_index negative", VALUE, "batch_index", "-1", y0=ROWS, batch_index=torch.tensor([0, -1, 1])),
    bad("batch_index too short", VALUE, "batch_index", "(3,)", "(2,)", y0=ROWS, batch_index=torch.tensor([0, 1])),
    bad("batch_index elsewhere", VALUE, "batch_index", "meta", y0=ROWS, batch_index=meta(3).long()),
]

NAMES = [
    bad("method unknown", NAME, "method 'dorpi5'", "'dopri5'", method="dorpi5"),
    bad("method unlike any", NAME, "method 'xyzzy'", "known", "dopri5", method="xyzzy"),
    bad("method not a method", TYPE, "method must be a name or a Method", "int", method=5),
    bad("controller unknown", NAME, "controller 'fixd'", "'fixed'", controller="fixd"),
    bad(
        "controller not a controller",
        TYPE,
        "controller must be a name or a Controller",
        "int",
        controller=5,
    ),
    bad("adjoint unknown", NAME, "adjoint 'backprob'", "'backprop'", adjoint="backprob"),
    bad("adjoint not an adjoint", TYPE, "adjoint must be a name or a Adjoint", "NoneType", adjoint=None),
    bad("save unknown", NAME, "save 'finale'", "'final'", save="finale"),
    bad("save a number", TYPE, "save", "'final'", "3", save=3),
    bad("save a pair the wrong way round", TYPE, "save", "pair", save=(max, "final")),
    bad("save a pair with an unknown name", NAME, "save 'step'", "'steps'", save=("step", max)),
    bad("option unknown", NAME, "option 'saftey'", "'safety'", saftey=0.9),
    bad("option of solve misspelt", NAME, "option 'max_step'", "'max_steps'", max_step=10),
    bad("option of another method", VALUE, "inner_tol", "dopri5", inner_tol=1e-3),
    bad("option of another controller", VALUE, "safety", "controller", dt=0.1, safety=0.5),
    bad("inner of an explicit method", VALUE, "dopri5", "no inner solver", "inner='cg'", inner="cg"),
]

STEPS = [
    bad("dt zero", VALUE, "dt must be positive", "0", method="rk4", dt=0.0),
    bad("dt negative", VALUE, "dt must be positive", "-0.1", "sign follows t", method="rk4", dt=-0.1, t=[1.0, 0.0]),
    bad("dt infinite", VALUE, "dt must be positive and finite", "inf", method="rk4", dt=INF),
    bad("dt text", TYPE, "dt must be a number", "str", method="rk4", dt="0.1"),
    bad("dt bool", TYPE, "dt must be a number", "bool", method="rk4", dt=True),
    bad("dt per sample in joint mode", VALUE, "dt must be a number", "(2,)", method="rk4", dt=torch.ones(2)),
    bad("dt of too few samples", VALUE, "dt must be a number", "(2,)", method="rk4", dt=torch.ones(2), **BATCH),
    bad("dt and num_steps", VALUE, "dt=0.1", "num_steps=10", "exclude", method="rk4", dt=0.1, num_steps=10),
    bad("num_steps zero", VALUE, "num_steps", "integer >= 1", "0", method="rk4", num_steps=0),
    bad("num_steps bool", VALUE, "num_steps", "integer >= 1", "True", method="rk4", num_steps=True),
    bad("num_steps float", VALUE, "num_steps", "integer >= 1", "10.0", method="rk4", num_steps=10.0),
    bad("dt0 with dt", VALUE, "dt0", "fixed", "dt= or num_steps=", method="rk4", dt0=0.1, dt=0.1),
    bad("dt0 on a fixed grid", VALUE, "dt0", "dt= or num_steps=", method="rk4", dt0=0.1, controller="fixed"),
    bad("dt0 zero", VALUE, "dt0 must be positive", "0", dt0=0.0),
    bad("dt0 NaN", VALUE, "dt0 must be positive and finite", "nan", dt0=NAN),
    bad("dt0 text", TYPE, "dt0 must be a number", "str", dt0="0.1"),
    bad("dt0 of too few samples", VALUE, "dt0 must be a number", "(2,)", dt0=torch.ones(2), **BATCH),
    bad("fixed-step method without dt", VALUE, "rk4", "dt=", "num_steps=", "controller='fixed'", method="rk4"),
    bad("fixed-step method with a controller", VALUE, "rk4", "dt=", "num_steps=", method="rk4", controller="pid"),
    bad("dt with an adaptive controller", VALUE, "dt=", "fixed", "controller='pid'", dt=0.1, controller="pid"),
    bad("num_steps with an adaptive controller", VALUE, "num_steps=", "controller='i'", num_steps=3, controller="i"),
    bad("dt_min above dt_max", VALUE, "dt_min=0.1", "dt_max=0.01", dt_min=0.1, dt_max=0.01),
    bad("dt_min negative", VALUE, "dt_min", ">= 0", "-1", dt_min=-1.0),
    bad("dt_min text", TYPE, "dt_min", "number", "tiny", dt_min="tiny"),
    bad("dt_max zero", VALUE, "dt_max", "> 0", "found 0", dt_max=0.0),
    bad("dt_max NaN", VALUE, "dt_max", "> 0", "nan", dt_max=NAN),
    bad("force_dt_min without dt_min", VALUE, "force_dt_min", "dt_min=", force_dt_min=True),
    bad("max_steps zero", VALUE, "max_steps", "integer >= 1", "0", max_steps=0),
    bad("max_steps float", VALUE, "max_steps", "integer >= 1", "1000.0", max_steps=1e3),
    bad("max_steps bool", VALUE, "max_steps", "integer >= 1", "True", max_steps=True),
    bad("safety above 1", VALUE, "safety", "(0, 1]", "1.5", safety=1.5),
    bad("safety zero", VALUE, "safety", "(0, 1]", "0", safety=0.0),
    bad("safety text", TYPE, "safety", "number", "high", safety="high"),
    bad("factor_min above 1", VALUE, "factor_min", "(0, 1)", "2.0", factor_min=2.0),
    bad("factor_max below 1", VALUE, "factor_max", "above 1", "0.5", factor_max=0.5),
    bad("gain not finite", VALUE, "kP", "finite", "nan", controller="pi", kP=NAN),
]  # fmt: skip

EXTRAS = [
    bad("step_t NaN", VALUE, "step_t", "finite", "nan", step_t=[0.1, NAN]),
    bad("step_t a number", VALUE, "step_t", "(S,)", "()", step_t=0.5),
    bad("step_t text", TYPE, "step_t", "numbers", "half", step_t="half"),
    bad("step_t per sample in joint mode", VALUE, "step_t", "(S,)", "(3, 1)", step_t=torch.ones(3, 1)),
    bad("step_t of too few samples", VALUE, "step_t", "(B, S)", "(2, 1)", step_t=torch.ones(2, 1), **BATCH),
    bad("jumps one Jump", TYPE, "jumps", "sequence of Jump", "[Jump(...)]", jumps=Jump(0.5)),
    bad("jumps a number", TYPE, "jumps", "sequence of Jump", "float", jumps=0.5),
    bad("jumps of numbers", TYPE, "jumps[0] must be a Jump", "float", jumps=[0.5]),
    bad("jump without a time", TYPE, "t of jumps[0]", "number", "str", jumps=[Jump("noon")]),
    bad("jump at infinity", VALUE, "t of jumps[0]", "finite", "inf", jumps=[Jump(INF)]),
    bad("jump at NaN in joint mode", VALUE, "t of jumps[0]", "finite", "nan", jumps=[Jump(NAN)]),
    bad("jump map not callable", TYPE, "map of jumps[1]", "callable", "int", jumps=[Jump(0.5), Jump(0.5, 3)]),
    bad("jump per sample in joint mode", VALUE, "t of jumps[0]", "(2,)", jumps=[Jump(torch.ones(2))]),
    bad("jump of too few samples", VALUE, "t of jumps[0]", "(2,)", jumps=[Jump(torch.ones(2))], **BATCH),
    bad("observer not callable", TYPE, "observer must be callable", "str", observer="print"),
    bad("time_dtype half", VALUE, "time_dtype", "torch.float64", "float16", time_dtype=torch.float16),
    bad("time_dtype text", VALUE, "time_dtype", "torch.float64", "'float64'", time_dtype="float64"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "words"), STATE + TIMES + TOLERANCES + MODES + NAMES + STEPS + EXTRAS)
def test_bad_arguments_raise_before_f_is_called(changes, error, words):
    f = Counting()
    with pytest.raises(error) as caught:
        complain(f, changes)
    assert f.calls == 0
    assert type(caught.value) is error
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, str(caught.value)


def test_the_calls_without_a_bad_argument_pass():
    """What the tables change is what they complain about: the rest of each call is good."""
    good = ({}, BATCH, GROUPS, dict(y0=PAIR), dict(method="rk4", dt=0.1), dict(controller="pi", safety=0.8))
    for changes in (*good, dict(max_steps=2**40), dict(dt_min=1e-9, force_dt_min=True), dict(dt0=torch.tensor(0.1))):
        assert complain(Counting(), dict(changes)).success


# --- what f returns, which only a call of f can show -----------------------------------------------------------------


class Named(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


ANSWERS = [
    bad("a number", ArgumentTypeError, "returned by f", "tensor", "float", answer=lambda y: 1.0),
    bad("nothing", ArgumentTypeError, "returned by f", "tensor", "NoneType", answer=lambda y: None),
    bad("a tuple for a tensor", ArgumentTypeError, "returned by f", "tensor", "tuple", answer=lambda y: (y,)),
    bad("too long", ArgumentError, "returned by f", "(2,)", "(3,)", answer=lambda y: torch.ones(3).double()),
    bad("0-dim, which would broadcast", ArgumentError, "returned by f", "(2,)", "()", answer=lambda y: y.sum()),
    bad("one element, which would broadcast", ArgumentError, "returned by f", "(2,)", "(1,)", answer=lambda y: y[:1]),
    bad("a row more", ArgumentError, "returned by f", "(2,)", "(1, 2)", answer=lambda y: y[None]),
    bad("a row per sample short", ArgumentError, "returned by f", "(3, 2)", "(1, 2)", answer=lambda y: y[:1], **BATCH),
    bad("single precision", ArgumentTypeError, "returned by f", "float64", "float32", answer=lambda y: y.float()),
    bad("complex", ArgumentTypeError, "returned by f", "float64", "complex128", answer=lambda y: y + 0j),
    bad("integers", ArgumentTypeError, "returned by f", "float64", "int64", answer=lambda y: y.long()),
    bad("another device", ArgumentError, "returned by f", "cpu", "meta", answer=lambda y: meta(2)),
    bad("a leaf too few", ArgumentTypeError, "returned by f", "structure", y0=PAIR, answer=lambda y: (y[0],)),
    bad("a list for a tuple", ArgumentTypeError, "returned by f", "structure", y0=PAIR, answer=lambda y: list(y)),
    bad("a wrong leaf", ArgumentError, "leaf 1 of the value returned by f", "(3, 2)", "(2,)", y0=PAIR,
        answer=lambda y: (y[0], y[0])),
    bad("other keys", ArgumentTypeError, "returned by f", "structure", y0={"x": Y}, answer=lambda y: {"z": y["x"]}),
    bad("a plain tuple for a named one", ArgumentTypeError, "returned by f", "structure", y0=Named(Y, Y),
        answer=lambda y: (y.a, y.b)),
]  # fmt: skip


@pytest.mark.parametrize("fixed", [False, True], ids=["adaptive", "fixed"])
@pytest.mark.parametrize(("changes", "error", "words"), ANSWERS)
def test_a_wrong_answer_of_f_raises_at_its_first_call(changes, error, words, fixed):
    changes = dict(changes) | (dict(method="euler", dt=0.1) if fixed else {})
    f = Counting(changes.pop("answer"))
    with pytest.raises(error) as caught:
        complain(f, changes)
    assert f.calls == 1
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, str(caught.value)


@pytest.mark.parametrize("after", [1, 2, 3, 7, 20])
def test_a_wrong_answer_of_f_raises_at_any_call(after):
    """Also where stages are written into a buffer, in which a wrong shape would broadcast."""
    f = Counting(lambda y: -y if f.calls <= after else -y[:1])
    with torch.no_grad(), pytest.raises(ArgumentError, match=r"returned by f.*\(2,\).*\(1,\)"):
        solve(f, Y, T)
    assert f.calls == after + 1


def test_a_jump_map_that_changes_the_shape_is_named():
    jumps = [Jump(0.2, lambda t, y: 2 * y), Jump(0.5, lambda t, y: y[:1])]
    with pytest.raises(ArgumentError, match=r"map of jump 1.*\(2,\).*\(1,\)"):
        solve(Counting(), Y, T, jumps=jumps)


@pytest.mark.parametrize("norm", [lambda e: e, lambda e: e.abs().amax(), lambda e: 1.0], ids=["rows", "0-dim", "float"])
def test_a_norm_without_one_number_per_sample_is_named(norm):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=r"norm.*\(3,\)"):
        complain(Counting(), dict(BATCH, norm=norm))


# --- transforms ------------------------------------------------------------------------------------------------------

TRANSFORMS = {
    "grad": lambda f, **how: torch.func.grad(lambda y: solve(f, y, T, **how).y.sum())(Y),
    "jacrev": lambda f, **how: torch.func.jacrev(lambda y: solve(f, y, T, **how).y[-1])(Y),
    "jvp": lambda f, **how: torch.func.jvp(lambda y: solve(f, y, T, **how).y[-1], (Y,), (Y,)),
}


@pytest.mark.parametrize("method", ["prox_euler", "radauIIA5", "rkc2"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_do_not_go_through_solved_systems(transform, method):
    f = Counting()
    with pytest.raises(UnsupportedError) as caught:
        TRANSFORMS[transform](f, method=method)
    assert f.calls == 0
    assert all(word in str(caught.value) for word in ("torch.func", method, "autograd"))


def test_vmap_of_an_adaptive_solve_says_what_works():
    f = Counting()
    with pytest.raises(UnsupportedError) as caught:
        torch.func.vmap(lambda y: solve(f, y, T).y[-1])(ROWS)
    assert f.calls == 0
    assert all(word in str(caught.value) for word in ("torch.func", "fixed steps", "dt=", "num_steps=", "batch_dim=0"))
    hidden = lambda rate: solve(lambda t, y: -rate * y, Y, T).y[-1]
    with pytest.raises(UnsupportedError, match="batch_dim=0"):
        torch.func.vmap(hidden)(torch.ones(2))


# --- after the solve -------------------------------------------------------------------------------------------------

DENSE = [
    ("not kept", {}, lambda s: s.dense(0.5), ProxodeError, ("dense=True",)),
    ("outside", dict(dense=True), lambda s: s.dense(1.5), ArgumentError, ("1.5", "outside", "[0, 1]")),
    ("before", dict(dense=True), lambda s: s.dense([0.5, -0.1]), ArgumentError, ("-0.1", "outside")),
    ("NaN", dict(dense=True), lambda s: s.dense(NAN), ArgumentError, ("nan",)),
    ("two dimensions", dict(dense=True), lambda s: s.dense(torch.zeros(1, 2)), ArgumentError, ("(k,)", "(1, 2)")),
    ("samples", dict(dense=True, **BATCH), lambda s: s.dense(torch.zeros(2, 1)), ArgumentError, ("(B, k)", "(2, 1)")),
    ("derivative", dict(dense=True), lambda s: s.dense(0.5, derivative=-1), ArgumentError, ("derivative", "-1")),
]


@pytest.mark.parametrize(
    ("changes", "ask", "error", "words"), [row[1:] for row in DENSE], ids=[row[0] for row in DENSE]
)
def test_bad_questions_to_the_dense_output(changes, ask, error, words):
    solution = complain(Counting(), dict(changes))
    with pytest.raises(error) as caught:
        ask(solution)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, str(caught.value)
