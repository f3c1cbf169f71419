"""The training benchmarks on a small made-up citation graph: they run, go on after an interruption, and refuse what is absent."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import citation_training, grand, grand_pp, published
from benchmarks.citation_models import GRAND, LAYERED, Recipe, grand_model, layered
from benchmarks.citation_training import Job, Ledger, prepared, split_for, trained
from benchmarks.graph_problems import DATA
from benchmarks.registry import BENCHMARKS, BenchmarkError, Settings, discover
from graphops.message import GATConv, GCNConv, SAGEConv

discover()

NODES = 120
SMALL = Recipe(8, 2, 0.2, 0.1, "Adam", 0.02, 1e-3, 4, 8, 3.0)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two groups of 60 nodes that cite each other rarely, words that tell them apart, a fixed split with one unknown label."""
    random = np.random.default_rng(0)
    group = np.arange(NODES) % 2
    pairs = np.argwhere(np.triu(random.random((NODES, NODES)) < np.where(group[:, None] == group, 0.08, 0.01), 1)).T
    ring = np.stack([np.arange(NODES), (np.arange(NODES) + 2) % NODES])
    edges = np.concatenate([pairs, ring, [[0], [1]]], 1)
    words = random.random((NODES, 12)) < np.where(group[:, None] == (np.arange(12) % 2), 0.4, 0.1)
    words[:, 0] |= ~words.any(1)
    y = group.copy()
    y[119] = -1
    splits = dict(train_idx=np.arange(8), val_idx=np.arange(8, 50), test_idx=np.arange(50, NODES))
    folder = tmp_path / "data" / "cora"
    folder.mkdir(parents=True)
    edge_index = np.unique(np.concatenate([edges, edges[::-1]], 1), axis=1)
    np.savez(folder / "cora_planetoid.npz", edge_index=edge_index, x=words.astype(np.float32), y=y, **splits)
    monkeypatch.setenv(DATA, str(tmp_path / "data"))
    clear()
    yield prepared("cora", "lcc")
    clear()


def clear() -> None:
    citation_training.prepared.cache_clear()
    citation_training.diffusion_graph.cache_clear()


@pytest.fixture
def run(data, tmp_path):
    """`python -m benchmarks run ...`; what it wrote."""
    for package in ("matplotlib", "rich"):
        pytest.importorskip(package, reason=f"{package} of the bench extra is not installed")
    from benchmarks.cli import main

    def call(*arguments):
        target = tmp_path / "result.json"
        assert main(["run", *arguments, "--json", str(target), "--plot", str(tmp_path / "picture.png")]) == 0
        assert (tmp_path / "picture.png").stat().st_size > 0
        return json.loads(target.read_text())

    return call


# --- each benchmark --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["l", "nl", pytest.param("nl-rw", marks=pytest.mark.slow)])
def test_grand_lists_every_seed_beside_what_is_printed(run, variant):
    models = ("gcn", "gat", "sage") if variant == "l" else ()
    record = run("grand", "--quick", "--variant", variant, "--models", ",".join(models), "--seeds", "2")
    assert record["data"]["recipes"][f"grand-{variant}"]["norm"] == ("col" if variant == "l" else "authors")
    accuracy, seeds = record["tables"]
    assert [line["model"] for line in accuracy["rows"]] == [f"grand-{variant}", *models]
    assert len(seeds["rows"]) == 2 * (1 + len(models)) and all(line["status"] == "done" for line in seeds["rows"])
    for line in accuracy["rows"]:
        own = [seed["test_accuracy"] for seed in seeds["rows"] if seed["model"] == line["model"]]
        assert own == record["data"]["test_accuracy"][line["model"]]
        assert line["mean"] == pytest.approx(np.mean(own), abs=0.006)
        assert line["difference"] == pytest.approx(line["mean"] - published.PLANETOID[line["model"]]["cora"][0], abs=0.006)
    assert record["data"]["recipes"][f"grand-{variant}"]["recipe"]["time"] == GRAND["cora"].time


def test_the_time_of_a_whole_graph_is_that_chosen_by_validation():
    common = {option.name: option.default for option in BENCHMARKS["grand"].options}

    def time(**options):
        return grand.jobs_of(Settings(options={**common, "norm": "col", **options}), "grand-l")[0].recipe.time

    assert time(dataset="citeseer") == GRAND["citeseer"].time
    assert time(dataset="citeseer", graph="full") == 16.0
    assert time(dataset="citeseer", graph="full", time=2.0) == time(time=2.0) == 2.0
    assert time(dataset="cora", graph="full") == GRAND["cora"].time


def test_grand_pp_pairs_splits_and_tells_failures_of_the_thesis(run):
    record = run("grand-pp", "--quick", "--times", "1,256", "--labels", "5", "--splits", "2", "--epochs", "1")
    lines = {line["cell"]: line for line in record["tables"][0]["rows"]}
    assert set(lines) == {"T = 1, 20", "T = 256, 20", "T = 18.29, 5"}
    assert all(line["status"] == "done" and line["wins"].endswith("of 2") for line in lines.values())
    assert lines["T = 1, 20"]["plain_printed"] == "78.59 ± 1.17"
    assert lines["T = 18.29, 5"]["verdict"] in ("met", "SHORT")
    seeds = [(line["model"], line["seed"]) for line in record["tables"][1]["rows"] if line["cell"] == "T = 1, 20"]
    assert seeds == [("grand-l", 0), ("grand-l", 1), ("grand++-l", 0), ("grand++-l", 1)]


def test_grand_pp_fills_the_cells_where_the_solver_of_the_thesis_failed():
    common = {option.name: option.default for option in BENCHMARKS["grand-pp"].options}
    failed = {}
    for variant, dataset in (("l", "citeseer"), ("nl", "cora"), ("nl-rw", "citeseer")):
        settings = Settings(options={**common, "variant": variant, "dataset": dataset})
        cells = grand_pp.cells_of(settings)
        failed[variant] = [cell.time for cell in cells if grand_pp.printed(variant, dataset, cell, True) == "failed"]
        methods = [grand_pp.jobs_of(settings, cell, "x0")[0].options["method"] for cell in cells]
        stiff = [cell.time for cell, method in zip(cells, methods) if method == "rkc2"]
        assert stiff == ([] if variant == "l" else [128.0, 256.0])
    assert failed == {"l": [128.0, 256.0], "nl": [64.0, 128.0, 256.0], "nl-rw": [256.0]}


@pytest.mark.parametrize("source", ["degree", "printed"])
def test_grand_pp_with_the_source_of_the_trusted_nodes(run, source):
    record = run("grand-pp", "--quick", "--source", source, "--times", "1", "--beta", "0")
    assert [line["status"] for line in record["tables"][0]["rows"]] == ["done"]


def test_grand_depth_has_energy_and_judges_the_claims(run):
    record = run("grand-depth", "--quick", "--depths", "1,8", "--epochs", "1")
    table, claims = record["tables"]
    energy = {(line["model"], line["depth"]): line["energy"] for line in table["rows"]}
    assert 0 < energy["GCN", 8] < energy["GCN", 1] < 1 and energy["GRAND-l", 8] < energy["GRAND-l", 1]
    assert [line["model"] for line in claims["rows"]] == ["GRAND-l", "GCN", "GCN, residual"]


@pytest.mark.parametrize("variant", ["l", pytest.param("nl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("norm", ["row", "col", "authors"])
def test_the_model_on_torchdiffeq_is_the_same_one(run, variant, norm):
    pytest.importorskip("torchdiffeq", reason="torchdiffeq of the bench extra is not installed")
    record = run("grand", "--quick", "--against", "torchdiffeq", "--variant", variant, "--norm", norm)
    for line in record["tables"][0]["rows"]:
        assert line["error"] < (2e-3 if "rkc2" in line["name"] else 2e-4), line["name"]


# --- runs ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_campaign_keeps_its_finished_seeds(run, tmp_path, monkeypatch):
    runs = tmp_path / "runs.jsonl"
    arguments = ("grand", "--quick", "--seeds", "2", "--runs", str(runs))
    first = run(*arguments)["data"]["test_accuracy"]
    lines = runs.read_text().splitlines()
    assert len(lines) == 2
    runs.write_text(lines[0] + "\n" + lines[1][:40])  # stopped while it wrote
    done = []
    monkeypatch.setattr(citation_training, "trained", lambda job, tick: done.append(job.seed) or trained(job, tick))
    assert run(*arguments)["data"]["test_accuracy"] == first
    assert done == [1]
    assert run(*arguments, "--epochs", "2")["data"]["test_accuracy"] is not None
    assert done == [1, 0, 1]  # another job is another run


def test_equal_jobs_give_equal_runs_and_learn(data):
    job = Job("cora", 3, recipe=Recipe(8, 2, 0.2, 0.1, "Adam", 0.05, 0.0, 30, 8, 3.0))
    first, second = (trained(job)[0] for _ in range(2))
    assert (first.test_accuracy, first.epoch) == (second.test_accuracy, second.epoch)
    assert first.test_accuracy > 90 and first.nfe > 5


def test_patience_ends_a_training_and_a_failed_solve_is_told(data):
    patient = Job("cora", 0, recipe=Recipe(8, 2, 0.2, 0.1, "Adam", 0.0, 0.0, 30, 8, 3.0, patience=3))
    assert trained(patient)[0].epochs <= 8
    failed = trained(Job("cora", 0, recipe=SMALL, model="grand-nl", options={"method": "dopri5", "max_steps": 1}))[0]
    assert failed.status.startswith("epoch 1:") and "max_steps" in failed.status
    assert Ledger(None).runs == {}


def test_splits(data):
    fixed = split_for(data, "planetoid")
    assert int(fixed.test.sum()) == NODES - 50 - 1  # that without a label is in no part
    few, more = (split_for(data, "random", n, seed=4) for n in (2, 5))
    assert int(few.train.sum()) == 4 and bool((few.train <= more.train).all())
    assert torch.equal(few.test, more.test)
    assert not torch.equal(split_for(data, "random", 2, seed=5).test, few.test)


@pytest.mark.parametrize("kind", LAYERED)
def test_the_first_layer_is_that_of_the_library(data, kind):
    """With its matrix in the layer, and dense features."""
    model, graph = layered(kind, data, LAYERED[kind])
    out, graph, x = model.eval().states(data.features, graph)[0], graph.with_weight(None), data.x
    weight, width = model.matrices[0].weight, LAYERED[kind].hidden
    if kind == "gcn":
        layer, graph = GCNConv(12, width), data.graph
        layer.lin.weight = weight
    elif kind == "sage":
        layer = SAGEConv(12, width)
        layer.lin_l.weight, layer.lin_r.weight = (torch.nn.Parameter(part) for part in weight.chunk(2))
        torch.nn.init.zeros_(layer.lin_l.bias)
    else:
        layer, conv = GATConv(12, width // 8, 8), model.propagations[0].conv
        layer.lin.weight, layer.att_src, layer.att_dst = weight, conv.att_src, conv.att_dst
    torch.testing.assert_close(out, layer(x, graph))


def test_sparse_features_are_the_dense_ones(data):
    torch.manual_seed(0)
    model = grand_model(data, SMALL).eval()
    torch.testing.assert_close(model(data.features, data.graph), model(data.x, data.graph), rtol=1e-4, atol=1e-5)


# --- bad requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grand", "grand-pp", "grand-depth"])
def test_absent_data_end_with_2_and_say_which_file_is_missing(tmp_path, monkeypatch, capsys, name):
    pytest.importorskip("rich")
    from benchmarks.cli import main

    clear()
    monkeypatch.setenv(DATA, str(tmp_path))
    assert main(["run", name, "--quick"]) == 2
    error = capsys.readouterr().err
    assert "cora_planetoid.npz" in error and "kimiyoung/planetoid" in error
    monkeypatch.delenv(DATA)
    assert main(["run", name, "--quick"]) == 2
    assert DATA in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["grand", "--dataset", "coral"], "did you mean 'cora'"),
        (["grand", "--variant", "nlrw"], "did you mean 'nl-rw'"),
        (["grand", "--models", "gcm"], "did you mean 'gcn'"),
        (["grand", "--seeds", "0"], "1 or more"),
        (["grand", "--time", "-1"], "above 0"),
        (["grand", "--device", "cuda"], "cuda" if torch.cuda.is_available() else "CUDA"),
        (["grand-pp", "--times", "4,-1"], "above 0"),
        (["grand-pp", "--labels", "0"], "1 or more"),
        (["grand-pp", "--source", "degre"], "did you mean 'degree'"),
        (["grand-depth", "--split", "random"], "no --split"),
    ],
)
def test_bad_requests(data, arguments, words, capsys):
    pytest.importorskip("rich")
    from benchmarks.cli import main

    assert main(["run", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_what_can_not_be_trained(data):
    from dataclasses import replace

    with pytest.raises(BenchmarkError, match="labels"):
        split_for(replace(data, y=None), "planetoid")
    with pytest.raises(BenchmarkError, match="--split random"):
        split_for(replace(data, split=None), "planetoid")
    with pytest.raises(BenchmarkError, match="attention_dim"):
        grand_model(data, LAYERED["gcn"])
