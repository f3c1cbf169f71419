"""torch_scatter's names: against torch-scatter 2.1.2 where it is installed and right, against known values where it is wrong."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from graphs import needs
from torch.autograd import gradcheck, gradgradcheck

import graphops as go
from graphops import scatter_api as ours

DOUBLE = torch.float64
REDUCES = ["sum", "add", "mean", "mul", "max", "min"]

# shape of src, shape of index, dim
CASES = [
    ((8,), (8,), -1),
    ((8, 3), (8,), 0),
    ((3, 8), (8,), -1),
    ((2, 8, 3), (8,), 1),
    ((8, 3), (8, 3), 0),
    ((3, 8), (3, 8), 1),
    ((2, 8, 3), (2, 8, 1), 1),
    ((2, 8, 3), (2, 8), 1),
    ((2, 3, 8), (1, 1, 8), -1),
]
DTYPES = [torch.float32, DOUBLE, torch.int64, torch.int32]


def made(src_shape, index_shape, dtype=DOUBLE, groups=5):
    src = torch.randn(src_shape, dtype=DOUBLE)
    src = src if dtype.is_floating_point else (10 * src).round()
    index = torch.randint(groups, index_shape)
    index[index == 3] = 2  # a group without elements
    return src.to(dtype), index


def same(one, other):
    one, other = (x if isinstance(x, tuple) else (x,) for x in (one, other))
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


def test_names_and_arguments_are_there():
    assert {"scatter", "segment_csr", "segment_coo", "gather_csr", "gather_coo"} <= set(ours.__all__)
    assert list(inspect.signature(ours.scatter).parameters) == ["src", "index", "dim", "out", "dim_size", "reduce"]


@needs["torch_scatter"]
class TestAgainstTorchScatter:
    def test_every_function_with_its_signature(self):
        import torch_scatter as theirs

        names = set(theirs.__all__) - {"torch_scatter", "__version__"}
        assert names == set(ours.__all__)
        for name in names:
            mine, known = (inspect.signature(getattr(m, name)).parameters for m in (ours, theirs))
            assert [(p.name, p.default) for p in mine.values()] == [(p.name, p.default) for p in known.values()], name

    @pytest.mark.parametrize("case", CASES, ids=str)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_scatter(self, case, dtype):
        import torch_scatter as theirs

        src, index = made(case[0], case[1], dtype)
        for reduce in REDUCES:
            same(ours.scatter(src, index, case[2], reduce=reduce), theirs.scatter(src, index, case[2], reduce=reduce))
            same(
                ours.scatter(src, index, case[2], dim_size=7, reduce=reduce),
                theirs.scatter(src, index, case[2], dim_size=7, reduce=reduce),
            )
        for name in ("scatter_max", "scatter_min", "scatter_mean", "scatter_mul", "scatter_add", "scatter_sum"):
            same(getattr(ours, name)(src, index, case[2]), getattr(theirs, name)(src, index, case[2]))

    @pytest.mark.parametrize("case", CASES, ids=str)
    @pytest.mark.parametrize("reduce", REDUCES)
    def test_out_takes_part(self, case, reduce):
        import torch_scatter as theirs

        src, index = made(case[0], case[1])
        shape = list(case[0])
        shape[case[2]] = 6
        outs = [torch.linspace(-1, 1, math.prod(shape), dtype=DOUBLE).view(shape) for _ in range(2)]
        mine = ours.scatter(src, index, case[2], out=outs[0], reduce=reduce)
        same(mine, theirs.scatter(src, index, case[2], out=outs[1], reduce=reduce))
        assert mine is outs[0]
        if reduce in ("max", "min"):
            outs = [torch.linspace(-1, 1, math.prod(shape), dtype=DOUBLE).view(shape) for _ in range(2)]
            name = f"scatter_{reduce}"
            same(getattr(ours, name)(src, index, case[2], outs[0]), getattr(theirs, name)(src, index, case[2], outs[1]))

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_composites(self, case):
        import torch_scatter as theirs

        src, index = made(case[0], case[1])
        for name in ("scatter_softmax", "scatter_log_softmax", "scatter_logsumexp"):
            same(getattr(ours, name)(src, index, case[2]), getattr(theirs, name)(src, index, case[2]))
        for unbiased in (True, False):  # theirs adds 1e-6 to the divisor
            mine = ours.scatter_std(src, index, case[2], unbiased=unbiased)
            torch.testing.assert_close(mine, theirs.scatter_std(src, index, case[2], unbiased=unbiased), rtol=2e-6, atol=1e-9)

    @pytest.mark.parametrize("shape", [(8,), (8, 3), (8, 3, 2)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_segments_in_one_order(self, shape, dtype):
        import torch_scatter as theirs

        src, index = made(shape, shape[:1], dtype)
        index = index.sort().values
        pointers = torch.tensor([0, 3, 3, 7, 8])
        for reduce in ("sum", "add", "mean", "max", "min"):
            same(ours.segment_coo(src, index, reduce=reduce), theirs.segment_coo(src, index, reduce=reduce))
            same(ours.segment_csr(src, pointers, reduce=reduce), theirs.segment_csr(src, pointers, reduce=reduce))
        for name in ("segment_sum_coo", "segment_mean_coo", "segment_max_coo", "segment_min_coo"):
            same(getattr(ours, name)(src, index, dim_size=6), getattr(theirs, name)(src, index, dim_size=6))
            csr = name.replace("coo", "csr")
            same(getattr(ours, csr)(src, pointers), getattr(theirs, csr)(src, pointers))
        same(ours.gather_coo(src, index), theirs.gather_coo(src, index))
        same(ours.gather_csr(src[:4], pointers), theirs.gather_csr(src[:4], pointers))

    def test_segments_in_an_order_for_each_row(self):
        import torch_scatter as theirs

        src = torch.randn(2, 6, 3, dtype=DOUBLE)
        index = torch.tensor([[0, 0, 1, 1, 1, 3], [0, 1, 1, 2, 2, 2]])
        pointers = torch.tensor([[0, 2, 5, 5, 6], [0, 1, 3, 6, 6]])
        for reduce in ("sum", "mean", "max", "min"):
            same(ours.segment_coo(src, index, reduce=reduce), theirs.segment_coo(src, index, reduce=reduce))
            same(ours.segment_csr(src, pointers, reduce=reduce), theirs.segment_csr(src, pointers, reduce=reduce))
            same(ours.segment_csr(src, pointers[:1], reduce=reduce), theirs.segment_csr(src, pointers[:1], reduce=reduce))
        same(ours.gather_coo(src, index), theirs.gather_coo(src, index))
        same(ours.gather_csr(src[:, :4], pointers), theirs.gather_csr(src[:, :4], pointers))

    def test_out_of_segments(self):
        import torch_scatter as theirs

        src, index, pointers = torch.tensor([1.0, 2, 3]), torch.tensor([0, 0, 2]), torch.tensor([0, 2, 2, 3])
        for reduce in ("sum", "mean", "max", "min"):
            outs = [torch.full((4,), 2.5) for _ in range(2)]
            same(ours.segment_coo(src, index, outs[0], reduce=reduce), theirs.segment_coo(src, index, outs[1], reduce=reduce))
            outs = [torch.full((3,), 2.5) for _ in range(2)]
            same(ours.segment_csr(src, pointers, outs[0], reduce), theirs.segment_csr(src, pointers, outs[1], reduce))
            same(outs[0], outs[1])

    def test_pointers_that_leave_elements_out(self):
        import torch_scatter as theirs

        src, pointers = torch.arange(1.0, 7), torch.tensor([1, 3, 5])
        for reduce in ("sum", "mean", "max", "min"):
            same(ours.segment_csr(src, pointers, reduce=reduce), theirs.segment_csr(src, pointers, reduce=reduce))

    def test_first_derivatives(self):
        import torch_scatter as theirs

        src, index = made((8, 3), (8,))
        for reduce in REDUCES:
            found = []
            for module in (ours, theirs):
                leaf = src.clone().requires_grad_()
                module.scatter(leaf, index, 0, reduce=reduce).pow(2).sum().backward()
                found.append(leaf.grad)
            same(*found)

    def test_nothing_at_all(self):
        import torch_scatter as theirs

        src, index = torch.empty(0, 3), torch.empty(0, dtype=torch.int64)
        for reduce in ("sum", "mean", "max", "min"):
            same(ours.scatter(src, index, 0, dim_size=2, reduce=reduce), theirs.scatter(src, index, 0, dim_size=2, reduce=reduce))


# --- what is wrong in torch-scatter 2.1.2 and right here --------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["sum", "mean", "max", "min"])
def test_second_derivatives_of_segments(reduce):
    """There `gradgradcheck` of segment_csr and segment_coo fails."""
    src = torch.randn(8, 2, dtype=DOUBLE, requires_grad=True)
    index, pointers = torch.tensor([0, 0, 0, 2, 2, 2, 2, 3]), torch.tensor([0, 3, 3, 7, 8])
    for function in (
        lambda s: ours.segment_csr(s, pointers, reduce=reduce).pow(3),
        lambda s: ours.segment_coo(s, index, reduce=reduce).pow(3),
    ):
        assert gradcheck(function, src) and gradgradcheck(function, src)


def test_derivative_of_a_product_with_a_zero():
    """There it is (0, 0, 0)."""
    src = torch.tensor([0.0, 2, 3], dtype=DOUBLE, requires_grad=True)
    (found,) = torch.autograd.grad(ours.scatter_mul(src, torch.zeros(3, dtype=torch.int64)).sum(), src)
    assert found.tolist() == [6, 0, 0]


def test_logsumexp_of_nothing_but_minus_infinity():
    """There it is 0, and every sum has 1e-12 added."""
    src, index = torch.tensor([-math.inf, -math.inf, -60.0], dtype=DOUBLE), torch.tensor([0, 0, 1])
    assert ours.scatter_logsumexp(src, index).tolist() == [-math.inf, -60]
    out = torch.tensor([1.0, -60.0], dtype=DOUBLE)
    assert ours.scatter_logsumexp(src, index, out=out).tolist() == pytest.approx([1, -60 + math.log(2)], abs=1e-13)


def test_derivative_of_the_deviation_of_a_constant_group():
    """There it is NaN."""
    src = torch.tensor([2.0, 2, 2, 1, 3], dtype=DOUBLE, requires_grad=True)
    std = ours.scatter_std(src, torch.tensor([0, 0, 0, 1, 1]))
    (found,) = torch.autograd.grad(std.sum(), src)
    assert std.tolist() == pytest.approx([0, math.sqrt(2)], abs=1e-14)
    assert found.tolist() == pytest.approx([0, 0, 0, -math.sqrt(0.5), math.sqrt(0.5)], abs=1e-14)


def test_of_equal_elements_the_first_is_the_maximum():
    src = torch.tensor([1.0, 2, 2, 2], requires_grad=True)
    best, place = ours.scatter_max(src, torch.tensor([0, 0, 0, 1]))
    (found,) = torch.autograd.grad(best.sum(), src)
    assert place.tolist() == [1, 3] and found.tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("reduce", REDUCES)
def test_compiles_and_goes_through_torch_func(reduce):
    """There only sum and mean compile, and nothing goes through `torch.func`."""
    index = torch.tensor([0, 2, 0, 1, 2])

    def function(src):
        return ours.scatter(src, index, 0, dim_size=4, reduce=reduce)

    src, tangent = torch.randn(2, 5, 3, dtype=DOUBLE)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(src), function(src))
    out, push = torch.func.jvp(function, (src,), (tangent,))
    (pull,) = torch.func.vjp(function, src)[1](torch.ones_like(out))
    torch.testing.assert_close(push.sum(), (pull * tangent).sum())
    batch = torch.stack([src, tangent])
    torch.testing.assert_close(torch.func.vmap(function)(batch), torch.stack([function(src), function(tangent)]))


def test_not_a_number_is_not_passed_over():
    src = torch.tensor([1.0, math.nan, 2, 3])
    best, place = ours.scatter_max(src, torch.tensor([0, 0, 0, 1]))
    assert best.isnan().tolist() == [True, False] and place.tolist() == [1, 3]


def test_a_product_of_nothing_is_one():
    assert ours.scatter_mul(torch.empty(0), torch.empty(0, dtype=torch.int64), dim_size=2).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda s: ours.scatter(s, torch.tensor([0, 1, -1])), go.ArgumentError, "-1"),
        (lambda s: ours.scatter(s, torch.tensor([0, 1, 5]), dim_size=3), go.ArgumentError, "\\[0, 3\\)"),
        (lambda s: ours.scatter(s, torch.tensor([0, 1, 5]), out=torch.zeros(3)), go.ArgumentError, "\\[0, 3\\)"),
        (lambda s: ours.scatter(s, torch.tensor([0, 1, 2]).int()), go.ArgumentTypeError, "index.long"),
        (lambda s: ours.scatter(s, torch.tensor([0, 1, 2]), dim=1), go.ArgumentError, "dim = 1"),
        (lambda s: ours.scatter(s, torch.tensor([0, 1])), go.ArgumentError, "first dimension"),
        (lambda s: ours.scatter(s.expand(2, 3), torch.zeros(2, 2).long()), go.ArgumentError, "broadcast"),
        (lambda s: ours.scatter(s, torch.tensor([0, 1, 2]), reduce="summ"), go.UnknownNameError, "'sum'"),
        (lambda s: ours.segment_csr(s, torch.tensor([0, 2, 1])), go.ArgumentError, "descends"),
        (lambda s: ours.segment_csr(s, torch.tensor([0, 2, 4])), go.ArgumentError, "\\[0, 3\\]"),
        (lambda s: ours.segment_csr(s, torch.tensor([[0, 3]])), go.ArgumentError, "dimensions"),
        (lambda s: ours.segment_csr(s, torch.tensor([0, 3]), reduce="mul"), go.UnknownNameError, "reduce"),
        (lambda s: ours.gather_csr(s, torch.tensor([1, 2, 3, 4])), go.ArgumentError, "start at 0"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.ones(3))
