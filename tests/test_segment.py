"""Segment reductions and sparse products: one conformance class for every backend, derivatives, transforms, determinism."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from graphs import EACH_BACKEND, EDGES, awkward, by_segment, dense, needs, random_graph
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import graphops as go
from graphops import autograd, backends
from graphops.pattern import Pattern

DOUBLE = torch.float64
E, N = EDGES.shape[1], 7
REDUCTIONS = {
    "sum": (go.sum, lambda v: v.sum(0), 0.0),
    "mean": (go.mean, lambda v: v.mean(0), 0.0),
    "max": (go.max, lambda v: v.amax(0), -math.inf),
    "min": (go.min, lambda v: v.amin(0), math.inf),
    "prod": (go.prod, lambda v: v.prod(0), 1.0),
    "std": (go.std, lambda v: v.std(0) if len(v) > 1 else v[0] * 0, 0.0),
    "logsumexp": (go.logsumexp, lambda v: v.logsumexp(0), -math.inf),
}
ALONG = {"softmax": (go.softmax, lambda v: v.softmax(0)), "log_softmax": (go.log_softmax, lambda v: v.log_softmax(0))}
EVERY = {name: entry[0] for name, entry in (REDUCTIONS | ALONG).items()}


def finite(function):
    """The function with its infinities, of segments without elements, taken out: they have no derivative to check."""
    return lambda *args: torch.where((out := function(*args)).isinf(), 0.0, out)


def along(index, values, function):
    out = torch.empty_like(values)
    for i in index.unique():
        out[index == i] = function(values[index == i])
    return out


@pytest.fixture(params=EACH_BACKEND)
def kernels(request):
    with go.backend(request.param) as served:
        yield served


@pytest.fixture
def graph():
    return awkward()


class TestBackend:
    """What every backend must do; a new one is tested by its line in the registry."""

    def where(self, kernels):
        return "cuda" if "cpu" not in kernels.devices else "cpu"

    @pytest.mark.parametrize("name", REDUCTIONS)
    @pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
    def test_reductions_are_those_of_each_segment(self, kernels, graph, name, dtype):
        function, reference, empty = REDUCTIONS[name]
        graph = graph.to(self.where(kernels))
        for shape in ((), (3,), (2, 3)):
            values = torch.randn(E, *shape, dtype=dtype, device=graph.device)
            expected = by_segment(graph.target, values, N, reference, empty)
            torch.testing.assert_close(function(graph, values), expected)

    @pytest.mark.parametrize("spread", [1, 60, 1000])  # exp of the last overflows and underflows without a shift
    @pytest.mark.parametrize("name", ALONG)
    def test_shares_are_those_of_each_segment(self, kernels, graph, name, spread):
        function, reference = ALONG[name]
        graph = graph.to(self.where(kernels))
        values = spread * torch.randn(E, 3, dtype=DOUBLE, device=graph.device)
        torch.testing.assert_close(function(graph, values), along(graph.target, values, reference))

    def test_sparse_products_are_the_dense_ones(self, kernels, graph):
        graph = graph.to(self.where(kernels))
        weights = torch.randn(E, 2, dtype=DOUBLE, device=graph.device)
        q, k = (torch.randn(N, 2, 3, dtype=DOUBLE, device=graph.device) for _ in range(2))
        per_head = torch.stack([dense(graph, weights[:, h]) @ k[:, h] for h in range(2)], 1)
        torch.testing.assert_close(go.spmm(graph, weights, k), per_head)
        torch.testing.assert_close(go.spmm(graph, weights[:, 0], k[:, 0]), per_head[:, 0])
        torch.testing.assert_close(go.spmm(graph, None, k), torch.einsum("ij,jhf->ihf", dense(graph, weights[:, 0] * 0 + 1), k))
        scores = (q[graph.target] * k[graph.source]).sum(-1)
        torch.testing.assert_close(go.sddmm(graph, q, k), scores)
        torch.testing.assert_close(go.sddmm(graph, q[:, 1], k[:, 1]), scores[:, 1])

    def test_scores_of_more_edges_than_there_are_pairs_of_nodes(self, kernels):
        graph = go.Graph(torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 1, 1, 0]])).to(self.where(kernels))
        for heads in ((), (1,), (2,)):
            q, k = (torch.randn(2, *heads, 3, dtype=DOUBLE, device=graph.device) for _ in range(2))
            torch.testing.assert_close(go.sddmm(graph, q, k), (q[graph.target] * k[graph.source]).sum(-1))

    def test_attention_is_the_dense_one(self, kernels, graph):
        graph = graph.to(self.where(kernels)).coalesce()  # a matrix holds one entry a pair
        q, k, v = (torch.randn(N, 2, 4, dtype=DOUBLE, device=graph.device) for _ in range(3))
        there = dense(graph, torch.ones(graph.num_edges, dtype=DOUBLE, device=graph.device)) > 0
        scores = torch.einsum("ihf,jhf->hij", q, k).div(2).masked_fill(~there, -math.inf).softmax(-1).nan_to_num(0.0)
        torch.testing.assert_close(go.attend(graph, q, k, v), torch.einsum("hij,jhf->ihf", scores, v))

    @pytest.mark.parametrize("name", EVERY)
    def test_derivatives_of_reductions(self, kernels, graph, name):
        graph = graph.to(self.where(kernels))
        values = torch.randn(E, 2, dtype=DOUBLE, device=graph.device, requires_grad=True)
        function = finite(lambda v: EVERY[name](graph, v))
        assert gradcheck(function, values, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
        assert gradgradcheck(function, values, check_fwd_over_rev=True, fast_mode=True)

    @pytest.mark.parametrize("name", ["spmm", "spmm_none", "spmm_heads", "sddmm", "sddmm_heads", "gather", "attend"])
    def test_derivatives_of_products(self, kernels, graph, name):
        graph = graph.to(self.where(kernels))

        def leaf(*shape):
            return torch.randn(*shape, dtype=DOUBLE, device=graph.device, requires_grad=True)

        function, inputs = {
            "spmm": (lambda w, x: go.spmm(graph, w, x), (leaf(E), leaf(N, 3))),
            "spmm_none": (lambda x: go.spmm(graph, None, x), (leaf(N, 3),)),
            "spmm_heads": (lambda w, x: go.spmm(graph, w, x), (leaf(E, 2), leaf(N, 2, 3))),
            "sddmm": (lambda q, k: go.sddmm(graph, q, k), (leaf(N, 3), leaf(N, 3))),
            "sddmm_heads": (lambda q, k: go.sddmm(graph, q, k), (leaf(N, 2, 3), leaf(N, 2, 3))),
            "gather": (lambda x: go.gather(graph.outgoing, x), (leaf(N, 3),)),
            "attend": (lambda q, k, v: go.attend(graph, q, k, v), (leaf(N, 2, 3), leaf(N, 2, 3), leaf(N, 2, 2))),
        }[name]
        assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
        assert gradgradcheck(function, inputs, check_fwd_over_rev=True, fast_mode=True)

    def test_what_it_provides_is_there_and_the_rest_is_not(self, kernels, graph):
        graph = graph.to(self.where(kernels))
        values, x = torch.randn(E, 2, device=graph.device), torch.randn(N, 2, device=graph.device)
        segments, pattern = graph.incoming, graph.pattern
        calls = {
            "sum": lambda: kernels.sum(segments, values),
            "extremum": lambda: kernels.extremum(segments, values, True),
            "first": lambda: kernels.first(segments, values, False),
            "product": lambda: kernels.product(segments, values),
            "softmax": lambda: kernels.softmax(segments, values),
            "logsumexp": lambda: kernels.logsumexp(segments, values),
            "spmm": lambda: kernels.spmm(pattern, values[:, 0], x),
            "sddmm": lambda: kernels.sddmm(pattern, x, x),
        }
        assert set(calls) == set(backends.KERNELS) >= kernels.provides
        for name, call in calls.items():
            serves = backends.chosen(name, kernels.name, values)
            assert serves is (kernels if name in kernels.provides else backends.NATIVE)
            if name in kernels.provides:
                assert call().isfinite().any()

    def test_no_elements_no_segments_no_features(self, kernels):
        device = self.where(kernels)
        nothing = go.Graph(torch.empty(2, 0, dtype=torch.int64, device=device), 3)
        for name, (function, _, empty) in REDUCTIONS.items():
            out = function(nothing, torch.empty(0, 2, device=device))
            assert out.tolist() == [[empty] * 2] * 3, name
        assert go.softmax(nothing, torch.empty(0, 2, device=device)).shape == (0, 2)
        assert go.spmm(nothing, torch.empty(0, device=device), torch.ones(3, 2, device=device)).tolist() == [[0, 0]] * 3
        assert go.sddmm(nothing, *[torch.ones(3, 2, device=device)] * 2).shape == (0,)
        graph = awkward().to(device)
        assert go.sum(graph, torch.empty(E, 0, device=device)).shape == (N, 0)
        assert go.spmm(graph, torch.ones(E, device=device), torch.ones(N, 0, device=device)).shape == (N, 0)

    def test_the_masked_and_the_missing(self, kernels, graph):
        graph = graph.to(self.where(kernels))
        values = torch.zeros(E, device=graph.device)
        values[graph.target == 2] = -math.inf
        assert go.softmax(graph, values)[graph.target == 2].eq(0).all()
        assert go.logsumexp(graph, values)[2] == -math.inf
        assert go.log_softmax(graph, values)[graph.target == 2].eq(-math.inf).all()
        values[0] = math.nan
        assert go.max(graph, values).isnan().tolist() == [i == 3 for i in range(N)]
        assert go.min(graph, values).isnan().tolist() == [i == 3 for i in range(N)]

    def test_scores_far_apart_do_not_underflow(self, kernels, graph):
        """A shift common to all segments loses whole rows once scores lie more than 88 apart in float32."""
        graph = graph.to(self.where(kernels))
        values = torch.linspace(-500, 500, E, device=graph.device)
        rows = go.sum(graph, go.softmax(graph, values))
        torch.testing.assert_close(rows, (graph.incoming.counts > 0).float())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_summed_in_float32(self, kernels, dtype):
        """1 + 4,096 times 2^-10 is 5; added one at a time in half precision it stays below 3."""
        device = self.where(kernels)
        values = torch.full((4097,), 2.0**-10, dtype=dtype, device=device)
        values[0] = 1
        index = torch.zeros(4097, dtype=torch.int64, device=device)
        assert go.sum(index, values, size=1).item() == 5
        star = go.Graph(torch.stack([torch.arange(4097, device=device), index]), (4097, 1))
        out = go.spmm(star, values, torch.ones(4097, 2, dtype=dtype, device=device))
        assert out.dtype == dtype and out.tolist() == [[5, 5]]

    def test_results_do_not_depend_on_repetition_or_threads(self, kernels):
        graph = random_graph(300, 10_000).to(self.where(kernels))
        weights = torch.randn(graph.num_edges, device=graph.device, requires_grad=True)
        x = torch.randn(300, 8, device=graph.device, requires_grad=True)

        def everything():
            out = go.spmm(graph, go.softmax(graph, weights), x)
            first = torch.autograd.grad(out.square().sum(), (weights, x), create_graph=True)
            second = torch.autograd.grad(first[0].square().sum() + first[1].square().sum(), (weights, x))
            others = [go.max(graph, weights.detach()), go.prod(graph, 1 + weights.detach() / 100)]
            return [t.detach() for t in (out, *first, *second, *others)]

        known, threads = everything(), torch.get_num_threads()
        try:
            for repeat in range(100):
                torch.set_num_threads(1 + repeat % 2)
                assert all(map(torch.equal, everything(), known))
        finally:
            torch.set_num_threads(threads)


# --- transforms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_vmap_vjp_jvp_and_hessian(graph, name):
    function = finite(lambda v: EVERY[name](graph, v))
    batch = torch.randn(3, E, 2, dtype=DOUBLE)
    one_by_one = torch.stack([function(values) for values in batch])
    torch.testing.assert_close(torch.func.vmap(function)(batch), one_by_one)
    torch.testing.assert_close(torch.func.vmap(function, in_dims=2)(batch.movedim(0, 2)), one_by_one)

    values, tangent = batch[0], batch[1]
    out, push = torch.func.jvp(function, (values,), (tangent,))
    cotangent = torch.randn_like(out)
    (pull,) = torch.func.vjp(function, values)[1](cotangent)
    torch.testing.assert_close((push * cotangent).sum(), (pull * tangent).sum())

    def energy(v):
        return function(v).pow(3).sum()

    expected = torch.func.jacrev(torch.func.jacrev(energy))(values)
    for outer in (torch.func.jacfwd, torch.func.jacrev):
        for inner in (torch.func.jacfwd, torch.func.jacrev):
            torch.testing.assert_close(outer(inner(energy))(values), expected)


@pytest.mark.parametrize("which", [(0, None), (None, 0), (0, 0), (1, 2)])
@pytest.mark.parametrize("heads", [(), (2,)])
def test_vmap_of_products(graph, which, heads):
    weights, x, q = torch.randn(4, E, *heads), torch.randn(4, N, *heads, 3), torch.randn(4, N, *heads, 3)

    def check(function, left, right):
        args = [a.movedim(0, d) if d is not None else a[0] for a, d in zip((left, right), which)]
        expected = [function(*(a.select(d, i) if d is not None else a for a, d in zip(args, which))) for i in range(4)]
        torch.testing.assert_close(torch.func.vmap(function, in_dims=which)(*args), torch.stack(expected))

    check(lambda w, x: go.spmm(graph, w, x), weights, x)
    check(lambda q, k: go.sddmm(graph, q, k), q, x)


def test_gradients_per_sample(graph):
    weights, x = torch.randn(E), torch.randn(4, N, 3)

    def loss(w, x):
        return go.spmm(graph, go.softmax(graph, w), x).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x)
    torch.testing.assert_close(found, torch.stack([torch.func.grad(loss)(weights, one) for one in x]))


def compiled(function, inputs, backend):
    """Values and gradients of the compiled function against the eager one."""
    torch._dynamo.reset()
    outputs = [run(*inputs) for run in (torch.compile(function, fullgraph=True, backend=backend), function)]
    torch.testing.assert_close(*outputs)
    leaves = [x for x in inputs if x.requires_grad]
    gradients = [torch.autograd.grad(finite(lambda o: o)(out).square().sum(), leaves) for out in outputs]
    torch.testing.assert_close(*gradients)


def compile_cases():
    graph = awkward()
    values = torch.randn(E, 2, requires_grad=True)
    cases = {name: ((lambda v, f=f: f(graph, v)), (values,)) for name, f in EVERY.items()}
    q = torch.randn(N, 2, 3, requires_grad=True)
    cases["index"] = (lambda v, index: go.softmax(index, v, size=N), (values, EDGES[1]))
    cases["spmm"] = (lambda w, x: go.spmm(graph.with_weight(w), w, x), (values[:, 0], q[:, 0]))
    cases["sddmm"] = (lambda q: go.sddmm(graph, q, q), (q,))
    cases["attend"] = (lambda q: go.attend(graph, q, q, q), (q,))
    cases["bfloat16"] = (lambda v: go.sum(graph, v.bfloat16()), (values,))
    return cases


@pytest.mark.parametrize("name", list(compile_cases()))
def test_compiles_as_one_graph(name):
    function, inputs = compile_cases()[name]
    compiled(function, [x.detach().requires_grad_(x.is_floating_point()) for x in inputs], "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "max", "spmm", "attend"])
def test_compiles_to_machine_code(name):
    function, inputs = compile_cases()[name]
    compiled(function, [x.detach().requires_grad_() for x in inputs], "inductor")


def test_wrappers_that_outlive_their_transform(graph):
    """A tensor kept from inside `torch.func.grad` is still a wrapper afterwards."""
    kept = []

    def keep(v):
        kept.append(v * 1)
        return v.sum()

    values = torch.randn(E)
    torch.func.grad(keep)(values)
    torch.testing.assert_close(go.sum(graph, kept[0]), go.sum(graph, values))


@pytest.mark.parametrize("missing", ["_TRANSFORMS_ACTIVE", "_IS_WRAPPED", "forward_ad"])
def test_without_torchs_private_helpers_the_public_way_serves(monkeypatch, graph, missing):
    """What is only for speed, or to notice a mode, may vanish from torch."""
    public = type("Public", (), {"make_dual": torch.autograd.forward_ad.make_dual})
    monkeypatch.setattr(backends if missing == "forward_ad" else autograd, missing, public if missing == "forward_ad" else None)
    weights = torch.randn(E, dtype=DOUBLE, requires_grad=True)
    x = torch.randn(N, 2, dtype=DOUBLE, requires_grad=True)

    def function(w, x):
        return go.spmm(graph, go.softmax(graph, w), x)

    assert gradcheck(function, (weights, x), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, (weights, x), fast_mode=True)


# --- meaning ---------------------------------------------------------------------------------------------------------

indices = st.lists(st.integers(0, 5), max_size=12)


@given(indices)
def test_an_index_in_any_order_pointers_and_a_graph_agree(entries):
    index = torch.tensor(entries, dtype=torch.int64)
    values = torch.randn(len(entries), 2, dtype=DOUBLE)
    order = torch.argsort(index, stable=True)
    pointers = torch.searchsorted(index[order], torch.arange(7))
    graph = go.Graph(torch.stack([torch.zeros_like(index), index]), (1, 6))
    for name, function in EVERY.items():
        found = function(index, values, size=6)
        assert torch.equal(function(graph, values), found)
        sorted_ones = function(go.Segments.from_pointers(pointers), values[order])
        assert torch.equal(sorted_ones, found[order] if name in ALONG else found)


@given(indices, st.integers(0, 3))
def test_sum_and_gather_are_transposes(entries, features):
    index = torch.tensor(entries, dtype=torch.int64)
    segments = go.Segments.from_index(index, 6)
    values = torch.randn(len(entries), features, dtype=DOUBLE)
    x = torch.randn(6, features, dtype=DOUBLE)
    torch.testing.assert_close((go.sum(segments, values) * x).sum(), (values * go.gather(segments, x)).sum())


def test_adjointness_of_products_to_rounding():
    graph = random_graph(200, 3000)
    weights = torch.rand(3000, dtype=DOUBLE)
    x, y = (torch.randn(200, 8, dtype=DOUBLE) for _ in range(2))
    left = (go.spmm(graph, weights, x) * y).sum()
    right = (x * go.spmm(graph.reverse(), weights, y)).sum()
    edges = (weights * go.sddmm(graph, y, x)).sum()
    scale = x.norm() * y.norm() * weights.norm()
    assert abs(left - right) / scale < 1e-12 and abs(left - edges) / scale < 1e-12


def test_order_of_the_users_edges_is_kept():
    """Shuffling the edges shuffles what is on them and changes nothing at the nodes."""
    graph = random_graph(50, 400)
    shuffle = torch.randperm(400)
    other = graph.edge_subgraph(shuffle)
    weights, x = torch.randn(400, dtype=DOUBLE), torch.randn(50, 3, dtype=DOUBLE)
    torch.testing.assert_close(go.softmax(other, weights[shuffle]), go.softmax(graph, weights)[shuffle])
    torch.testing.assert_close(go.sddmm(other, x, x), go.sddmm(graph, x, x)[shuffle])
    torch.testing.assert_close(go.spmm(other, weights[shuffle], x), go.spmm(graph, weights, x))
    tidy = graph.sort()
    assert tidy.is_sorted and not graph.is_sorted
    torch.testing.assert_close(go.softmax(tidy, weights[graph.perm]), go.softmax(graph, weights)[graph.perm])


def test_zeros_in_a_product_have_their_derivatives():
    index = torch.tensor([0, 0, 0, 1, 1, 2])
    values = torch.tensor([2.0, 0, 3, 0, 0, 5], dtype=DOUBLE, requires_grad=True)
    (first,) = torch.autograd.grad(go.prod(index, values, size=3).sum(), values, create_graph=True)
    assert first.tolist() == [0, 6, 0, 0, 0, 1]
    (second,) = torch.autograd.grad(first[3], values)
    assert second.tolist() == [0, 0, 0, 0, 1, 0]  # d2(xy)/dxdy = 1 at x = y = 0
    tangent = torch.func.jvp(lambda v: go.prod(index, v, size=3), (values.detach(),), (torch.ones(6, dtype=DOUBLE),))[1]
    assert tangent.tolist() == [6, 0, 1]


def test_of_equal_elements_the_first_has_the_derivative():
    index = torch.tensor([1, 0, 1, 1])
    values = torch.tensor([2.0, 1, 2, 1], requires_grad=True)
    (found,) = torch.autograd.grad(go.max(index, values, size=2).sum(), values)
    assert found.tolist() == [1, 1, 0, 0]


def test_integers_and_complex_numbers_are_served(graph):
    whole = torch.arange(E)
    assert go.sum(graph, whole).tolist() == by_segment(graph.target, whole, N, lambda v: v.sum(0), 0).tolist()
    assert go.max(graph, whole, fill=-1).tolist() == by_segment(graph.target, whole, N, lambda v: v.amax(0), -1).tolist()
    assert go.max(graph, whole)[6] == torch.iinfo(torch.int64).min
    imaginary = torch.randn(E, 2, dtype=torch.complex128, requires_grad=True)
    torch.testing.assert_close(go.sum(graph, imaginary).real, go.sum(graph, imaginary.real))
    assert gradcheck(lambda v: go.mean(graph, v), imaginary)


def test_mixed_dtypes_are_promoted(graph):
    out = go.spmm(graph, torch.ones(E, dtype=torch.bfloat16), torch.ones(N, 2, dtype=DOUBLE))
    assert out.dtype == DOUBLE and out[:, 0].tolist() == graph.degree().tolist()


def test_attention_forms_no_features_at_edges():
    """The largest tensor of a forward and backward pass, on a graph with 50 edges a node; the plain way does form them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for one in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(one, torch.Tensor) and one.layout == torch.strided:
                    self.numbers = max(self.numbers, one.numel())
            return out

    graph = random_graph(400, 20_000).sort()
    inputs = [torch.randn(400, 2, 64, requires_grad=True) for _ in range(3)]
    found = {}
    for name in ("native", "plain"):
        with go.backend(name), Largest() as watch:
            torch.autograd.grad(go.attend(graph, *inputs).sum(), inputs)
        found[name] = watch.numbers
    assert found["native"] <= 400 * 2 * 64 < 20_000 * 2 * 64 <= found["plain"]


def test_the_backend_of_the_forward_pass_serves_the_backward(graph):
    called = []

    class Counting(type(backends.NATIVE)):
        def sum(self, *args):
            called.append(self)
            return super().sum(*args)

    backends._BUILT["counting"], backends.BACKENDS["counting"] = Counting(), "Counting"
    try:
        x = torch.randn(N, requires_grad=True)
        with go.backend("counting"):
            out = go.gather(graph, x)
        out.sum().backward()
        assert len(called) == 1
    finally:
        del backends._BUILT["counting"], backends.BACKENDS["counting"]


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda g: go.sum(g, torch.ones(E + 1)), go.ArgumentError, f"first dimension must be {E}"),
        (lambda g: go.sum(g, torch.tensor(1.0)), go.ArgumentError, "first dimension"),
        (lambda g: go.sum(g, [1.0] * E), go.ArgumentTypeError, "must be a tensor"),
        (lambda g: go.sum(g, torch.ones(E, dtype=torch.bool)), go.ArgumentTypeError, "boolean"),
        (lambda g: go.sum(g, torch.ones(E, device="meta")), go.ArgumentError, "move one"),
        (lambda g: go.sum(g, torch.ones(E), size=3), go.ArgumentError, "leave size out"),
        (lambda g: go.softmax(g, torch.arange(E)), go.ArgumentTypeError, "floating point"),
        (lambda g: go.mean(g, torch.arange(E)), go.ArgumentTypeError, "floating point"),
        (lambda g: go.max(g, torch.ones(E, dtype=torch.cfloat)), go.ArgumentTypeError, "no order"),
        (lambda g: go.sum(torch.tensor([0, 3]), torch.ones(2), size=3), go.ArgumentError, "outside \\[0, 3\\)"),
        (lambda g: go.sum(torch.tensor([0, -1]), torch.ones(2), size=3), go.ArgumentError, "-1"),
        (lambda g: go.sum(torch.tensor([0, 1]).int(), torch.ones(2)), go.ArgumentTypeError, "int64"),
        (lambda g: go.sum(torch.tensor([[0, 1]]), torch.ones(2)), go.ArgumentError, "one dimension"),
        (lambda g: go.Segments.from_pointers(torch.tensor([0, 2, 1])), go.ArgumentError, "descend"),
        (lambda g: go.Segments.from_pointers(torch.tensor([1, 2])), go.ArgumentError, "start at 0"),
        (lambda g: go.Segments.from_pointers(torch.tensor([0.0, 1])), go.ArgumentTypeError, "int64"),
        (lambda g: go.spmm(g, torch.ones(E, 2), torch.ones(N, 3)), go.ArgumentError, "\\(n, H, F\\)"),
        (lambda g: go.spmm(g, torch.ones(E, 2), torch.ones(N, 3, 1)), go.ArgumentError, "\\(n, H, F\\)"),
        (lambda g: go.spmm(g, torch.ones(E, 2, 2), torch.ones(N, 3)), go.ArgumentError, "\\(E,\\) or \\(E, H\\)"),
        (lambda g: go.spmm(g, torch.ones(E), torch.ones(N + 1, 3)), go.ArgumentError, "sources"),
        (lambda g: go.sddmm(g, torch.ones(N, 3), torch.ones(N, 2)), go.ArgumentError, "agree"),
        (lambda g: go.attend(g, *[torch.ones(N, 3)] * 2, torch.ones(N, 1, 3)), go.ArgumentError, "heads of q"),
        (lambda g: go.backend("nativ").__enter__(), go.UnknownNameError, "did you mean 'native'"),
    ],
)
def test_bad_input_is_named(graph, call, error, words):
    with pytest.raises(error, match=words):
        call(graph)


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_scatter", None)
    monkeypatch.delitem(backends._BUILT, "scatter", raising=False)
    with pytest.raises(go.MissingPackageError, match="pip install"):
        with go.backend("scatter"):
            pass


def test_indices_are_int32_only_where_they_fit():
    from graphops.pattern import narrow

    assert narrow(torch.tensor([1]), 2**31 - 1).dtype == torch.int32
    assert narrow(torch.tensor([1]), 2**31).dtype == torch.int64
    assert all(t.dtype == torch.int32 for t in random_graph(5, 9).pattern.blocks(3))


def test_a_pattern_and_its_transpose_know_each_other(graph):
    pattern = graph.pattern
    assert pattern.transposed.transposed is pattern and isinstance(pattern.transposed, Pattern)
    assert autograd.spmm(pattern.transposed, None, torch.ones(N, 1))[:, 0].tolist() == graph.degree("out").tolist()


@needs["triton"]
def test_the_triton_kernel_under_its_interpreter():
    program = """
import torch, graphops as go
from graphops.backends.triton import Triton
from graphs import awkward
graph, kernels = awkward(torch.float32), Triton()
x = torch.randn(7, 2, 70)
heads = torch.rand(graph.num_edges, 2)
torch.testing.assert_close(kernels.spmm(graph.pattern, graph.weight, x[:, 0]), go.spmm(graph, graph.weight, x[:, 0]))
torch.testing.assert_close(kernels.spmm(graph.pattern, None, x[:, 0]), go.spmm(graph, None, x[:, 0]))
torch.testing.assert_close(kernels.spmm(graph.pattern, heads, x), go.spmm(graph, heads, x))
"""
    tests = Path(__file__).parent
    paths = {"PYTHONPATH": f"{tests.parent}:{tests}", "TRITON_INTERPRET": "1"}
    import os

    done = subprocess.run([sys.executable, "-c", program], env=os.environ | paths, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
