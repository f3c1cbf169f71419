"""A solve as a module: what people do with modules."""

import copy
import io
import pickle
import sys

import pytest
import torch

import solvers
from solvers import ArgumentError, ArgumentTypeError, MaxStepsError, Status, UnknownNameError, solve
from solvers.nn import ODEBlock

T = [0.0, 0.5, 1.0]


class Net(torch.nn.Module):
    """A small field with parameters, at module level so that it can be pickled."""

    def __init__(self, width=3):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(width, 8), torch.nn.Tanh(), torch.nn.Linear(8, width))

    def forward(self, t, y, *args):
        return self.layers(y) * torch.cos(t).unsqueeze(-1) + sum(args)


def decay(t, y, *args):
    return -y


SETTINGS = [
    pytest.param({}, id="joint"),
    pytest.param(dict(batch_dim=0), id="samples"),
    pytest.param(dict(batch_index=torch.arange(4)), id="groups"),
    pytest.param(dict(method="rk4", dt=0.1), id="fixed"),
    pytest.param(dict(method="bosh3", rtol=1e-3, atol=torch.full((3,), 1e-4), safety=0.8), id="options"),
]
settings = pytest.mark.parametrize("options", SETTINGS)


def pass_through(block, y0, *args):
    """Output and gradients of a forward and backward pass."""
    block.zero_grad()
    y = block(y0, *args)
    y.square().sum().backward()
    return y.detach(), [p.grad.clone() for p in block.parameters()]


def assert_equal(found, expected):
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


# --- it is a solve ---------------------------------------------------------------------------------------------------


@settings
def test_a_block_gives_what_solve_gives(options):
    net, y0 = Net(), torch.randn(4, 3)
    block = ODEBlock(net, T, **options)
    assert block.stats is None
    y = block(y0)
    expected = solve(net, y0, T, **options)
    assert torch.equal(y, expected.y)
    assert y.shape == (3, 4, 3)
    assert block.stats.nfe == expected.stats.nfe
    assert torch.equal(block.status, expected.status)
    assert block.message == expected.message


def test_arguments_go_through_with_their_gradients():
    block = ODEBlock(lambda t, y, a, b: a * y + b["c"], T)
    a, c = torch.tensor(0.5, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    block(torch.ones(3), a, {"c": c})[-1].sum().backward()
    assert a.grad > 0
    assert c.grad > 0


def test_states_may_be_trees():
    y = ODEBlock(lambda t, y: {"a": -y["a"], "b": y["a"]}, T)({"a": torch.ones(2), "b": torch.zeros(2)})
    torch.testing.assert_close(y["a"] + y["b"], torch.ones(3, 2))


def test_blocks_stand_among_other_modules():
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), ODEBlock(Net(), [0.0, 1.0], save="final"), torch.nn.Linear(3, 1))
    model(torch.randn(4, 5)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model[:2].parameters())


def test_parameters_of_the_field_are_the_blocks():
    net = Net()
    block = ODEBlock(net, T)
    assert [name for name, _ in block.named_parameters()] == [f"field.{name}" for name, _ in net.named_parameters()]
    assert list(ODEBlock(decay, T).parameters()) == []


def test_training_a_block_learns():
    torch.manual_seed(0)
    block = ODEBlock(Net(2), [0.0, 1.0], rtol=1e-4, atol=1e-5, save="final")
    optimiser = torch.optim.Adam(block.parameters(), lr=0.02)
    y0 = torch.randn(16, 2)
    losses = []
    for _ in range(40):
        optimiser.zero_grad()
        loss = (block(y0)[-1] - y0.flip(-1)).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- times -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "t", [T, tuple(T), torch.tensor(T), torch.tensor([0, 1, 2])], ids=["list", "tuple", "float32", "int"]
)
def test_times_are_a_buffer_in_double(t):
    block = ODEBlock(decay, t)
    assert block.t.dtype == torch.float64
    assert "t" in dict(block.named_buffers())
    assert "t" in block.state_dict()


def test_a_parameter_as_times_is_learned():
    block = ODEBlock(decay, torch.nn.Parameter(torch.tensor([0.0, 1.0], dtype=torch.float64)))
    assert dict(block.named_parameters())["t"] is block.t
    block(torch.ones(1))[-1].sum().backward()
    torch.testing.assert_close(
        block.t.grad, torch.tensor([1.0, -1.0], dtype=torch.float64) * torch.exp(torch.tensor(-1.0))
    )


@pytest.mark.parametrize("change", [lambda b: b.half(), lambda b: b.to(torch.bfloat16), lambda b: b.float()])
def test_a_change_of_dtype_leaves_the_times_alone(change):
    block = change(ODEBlock(Net(), [0.0, 0.1, 2049.1]))
    assert block.t.dtype == torch.float64
    assert block.t.tolist() == [0.0, 0.1, 2049.1]
    assert next(block.parameters()).dtype != torch.float64


def test_tensors_among_the_options_move_with_the_block():
    block = ODEBlock(decay, T, batch_index=torch.tensor([0, 0, 1]), atol=torch.ones(2)).to("meta")
    assert block.t.is_meta
    assert block.option_batch_index.is_meta
    assert block.option_atol.is_meta
    assert "option_atol" not in block.state_dict()


# --- copies ----------------------------------------------------------------------------------------------------------


def through_state_dict(block):
    other = ODEBlock(
        Net(), [0.0, 3.0, 4.0], **{**block.options, **{n: getattr(block, f"option_{n}") for n in block.tensor_options}}
    )
    other.load_state_dict(block.state_dict())
    return other


def through_a_file(block):
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda block: pickle.loads(pickle.dumps(block)),
    "state_dict": through_state_dict,
    "file": through_a_file,
}


@settings
@pytest.mark.parametrize("adjoint", ["backprop", "checkpoint"])
@pytest.mark.parametrize("how", COPIES)
def test_a_copy_made_before_or_after_a_solve_does_the_same(how, options, adjoint):
    if adjoint not in solvers.ADJOINTS:
        pytest.skip(f"no adjoint {adjoint!r}")
    block, y0 = ODEBlock(Net(), T, adjoint=adjoint, **options), torch.randn(4, 3)
    before = COPIES[how](block)
    expected = pass_through(block, y0)
    after = COPIES[how](block)
    with torch.no_grad():
        block(y0)
    for other in (before, after, COPIES[how](block)):
        assert_equal(pass_through(other, y0), expected)


def test_a_solve_does_not_change_the_state_dict():
    block = ODEBlock(Net(), T)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    pass_through(block, torch.randn(4, 3))
    after = block.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_solve_leaves_nothing_that_holds_the_graph():
    block = ODEBlock(Net(), T)
    y = block(torch.randn(4, 3))
    assert y.requires_grad
    kept = [*vars(block.stats).values(), block.status]
    assert not any(isinstance(value, torch.Tensor) and value.requires_grad for value in kept)
    copy.deepcopy(block)


# --- fields in wrappers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [*SETTINGS[:2], SETTINGS[3]])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_field(options, backend):
    torch._dynamo.reset()
    net, y0 = Net(), torch.randn(4, 3)
    plain = ODEBlock(net, T, **options)
    compiled = ODEBlock(torch.compile(net, backend=backend), T, **options)
    expected, found = pass_through(plain, y0), pass_through(compiled, y0)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(y0), expected[0])


def test_a_compiled_field_is_compiled_once_not_once_per_step():
    torch._dynamo.reset()
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    net = Net()
    block = ODEBlock(torch.compile(net, backend=backend), torch.linspace(0, 3, 20), rtol=1e-3)
    with torch.no_grad():
        block(torch.randn(4, 3))
        assert block.stats.nfe > 10
        before = len(graphs)
        block(torch.randn(4, 3))
    assert len(graphs) == before <= 2


@settings
def test_autocast(options):
    """The field answers in bfloat16, the state stays single, and the result is right to bfloat16's rounding of f."""
    net, y0 = Net(), torch.randn(4, 3)
    options = {name: value for name, value in options.items() if name != "atol"}
    loose = {} if "dt" in options else dict(rtol=1e-2, atol=1e-2)
    block = ODEBlock(net, T, **{**options, **loose})
    expected = block(y0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = block(y0)
        y.sum().backward()
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05)
    assert not torch.equal(y, expected)
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in net.parameters())


@pytest.fixture
def process_group(tmp_path):
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch.distributed without gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("where", ["around the field", "around the block"])
@pytest.mark.parametrize("options", SETTINGS[:2])
def test_distributed_data_parallel(process_group, where, options):
    net, y0 = Net(), torch.randn(4, 3)
    wrap = torch.nn.parallel.DistributedDataParallel
    block = ODEBlock(wrap(net), T, **options) if where == "around the field" else wrap(ODEBlock(net, T, **options))
    expected = pass_through(ODEBlock(copy.deepcopy(net), T, **options), y0)
    for _ in range(2):
        assert_equal(pass_through(block, y0), expected)


# --- mistakes --------------------------------------------------------------------------------------------------------

BUILD = [
    ("method", dict(method="dorpi5"), UnknownNameError, "dopri5"),
    ("option", dict(saftey=0.9), UnknownNameError, "safety"),
    ("adjoint", dict(adjoint="backprob"), UnknownNameError, "backprop"),
    ("controller", dict(controller="fixd"), UnknownNameError, "fixed"),
    ("save", dict(save="finale"), UnknownNameError, "final"),
    ("value of an option", dict(safety=2.0), ArgumentError, "safety"),
    ("steps", dict(method="rk4"), ArgumentError, "num_steps="),
    ("dt", dict(method="rk4", dt=-1.0), ArgumentError, "dt"),
    ("max_steps", dict(max_steps=0), ArgumentError, "max_steps"),
    ("observer", dict(observer=3), ArgumentTypeError, "observer"),
    ("args", dict(args=(1,)), ArgumentError, r"block\(y0, \*args\)"),
]


@pytest.mark.parametrize(("options", "error", "words"), [row[1:] for row in BUILD], ids=[row[0] for row in BUILD])
def test_bad_options_raise_when_the_block_is_built(options, error, words):
    with pytest.raises(error, match=words):
        ODEBlock(decay, T, **options)


def test_a_bad_field_or_bad_times_raise_when_the_block_is_built():
    with pytest.raises(ArgumentTypeError, match="field"):
        ODEBlock(None, T)
    with pytest.raises(ArgumentTypeError, match="t must be.*soon"):
        ODEBlock(decay, "soon")


def test_steps_per_sample_are_left_for_the_call():
    block = ODEBlock(decay, T, method="rk4", dt=torch.tensor([0.1, 0.2]), batch_dim=0)
    assert block(torch.ones(2, 3)).shape == (3, 2, 3)
    with pytest.raises(ArgumentError, match="dt"):
        block(torch.ones(3, 3))


def test_failures_are_those_of_solve():
    with pytest.raises(MaxStepsError):
        ODEBlock(decay, T, max_steps=1)(torch.ones(3))
    block = ODEBlock(decay, T, max_steps=1, throw=False)
    assert torch.isnan(block(torch.ones(3))[-1]).all()
    assert block.status == Status.MAX_STEPS
    assert "max_steps" in block.message


def test_the_representation_names_the_options():
    text = repr(ODEBlock(Net(), T, method="bosh3", atol=torch.ones(3)))
    assert all(word in text for word in ("ODEBlock", "method='bosh3'", "t: (3,)", "atol", "(field): Net"))


def test_a_block_puts_no_wrapper_around_the_calls_of_f():
    seen = []

    def f(t, y):
        frame, depth = sys._getframe(), 0
        while frame:
            frame, depth = frame.f_back, depth + 1
        seen.append(depth)
        return -y

    with torch.no_grad():
        solve(f, torch.ones(3), T)
        plain, seen[:] = max(seen), []
        ODEBlock(f, T)(torch.ones(3))
    assert max(seen) <= plain + 4
