"""The graph benchmarks: graphs of the stated size, implementations that agree, bars read the right way round."""

from __future__ import annotations

import pytest
import torch

import graphops
from benchmarks.graph_kernels import RATIOS, Ratio, adjointness, compared, second_derivatives
from benchmarks.graph_operators import OPERATORS
from benchmarks.graph_problems import DATA, citation, communities, many_edges, power_law
from benchmarks.registry import BENCHMARKS, BenchmarkError, discover

discover()


def test_graphs_have_the_size_asked_for():
    directed, undirected = power_law(300, 2000), communities(300, 900, 4)
    assert (directed.num_nodes, directed.num_edges) == (300, 2300)
    assert (undirected.num_nodes, undirected.num_edges) == (300, 2100)
    assert undirected.to_undirected().num_edges == undirected.num_edges
    assert many_edges(300, 5000).num_edges == 5000
    for graph in (directed, undirected, many_edges(300, 5000)):
        assert graph.is_sorted
    assert directed.degree().max() > 5 * directed.degree().float().mean()


def test_a_citation_graph_is_read_from_the_folder_that_is_named(tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.delenv(DATA, raising=False)
    with pytest.raises(BenchmarkError, match=DATA):
        citation("cora")
    monkeypatch.setenv(DATA, str(tmp_path))
    with pytest.raises(BenchmarkError, match="not there"):
        citation("cora")
    (tmp_path / "cora").mkdir()
    np.savez(tmp_path / "cora" / "cora_planetoid.npz", edge_index=[[0, 1, 3, 2, 1], [1, 0, 2, 3, 2]], x_shape=[6, 2])
    graph = citation("cora")  # one component of 0, 1, 2, 3, whose loops are added
    assert (graph.num_nodes, graph.num_edges) == (4, 9)


@pytest.mark.parametrize("name", OPERATORS)
def test_implementations_agree(name):
    graph = power_law(40, 200)
    operator = OPERATORS[name]
    operands = [x.double() for x in operator.operands(graph, 8)]
    expected = operator.ours(graph, *operands)
    for other, function in operator.implementations().items():
        tolerance = 2e-6 if name == "std" else 1e-11  # torch-scatter adds 1e-6 to the divisor
        torch.testing.assert_close(function(graph, *operands), expected, rtol=tolerance, atol=tolerance, msg=other)


def test_a_bar_is_met_by_being_faster():
    ratio = Ratio("x", "spmm", "forward", "them", {"g": 2})
    lines = [{"name": n, "operator": "spmm", "graph": "g", "forward": t} for n, t in (("graphops, native", 1.0), ("them", 3.0))]
    assert compared(ratio, "g", lines)["verdict"] == "met"
    lines[1]["forward"] = 1.5
    assert compared(ratio, "g", lines)["verdict"] == "SHORT"
    assert "installed" in compared(ratio, "g", lines[:1])["verdict"]
    assert "not run" in compared(ratio, "g", [])["verdict"]


def test_derivatives_and_adjointness_hold():
    assert [line["verdict"] for line in second_derivatives()] == ["met"] * 3
    assert adjointness(power_law(100, 800), "g")["verdict"] == "met"


def test_bars_name_what_is_timed():
    assert {"graph-kernels", "graph-memory"} <= set(BENCHMARKS)
    for ratio in RATIOS:
        assert ratio.against in OPERATORS[ratio.operator].others
    assert graphops.spmm in {operator.ours for operator in OPERATORS.values()}
