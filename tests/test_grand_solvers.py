"""The benchmarks of solvers on graph diffusion, on tiny graphs; what they judge by is checked against what it stands for."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
import torch

from benchmarks import grand_claims, grand_solvers, grand_sparsity, grand_stepsize, grand_training, image_diffusion, random_walk
from benchmarks.grand_problems import GRAPHS, Model, sharpened
from benchmarks.graph_problems import DATA, communities, community_of
from benchmarks.registry import BENCHMARKS, BenchmarkError, discover
from graphops import Graph

discover()


@pytest.fixture
def extras():
    for package in ("matplotlib", "rich"):
        pytest.importorskip(package, reason=f"{package} of the bench extra is not installed")


def served(tmp_path, *arguments: str) -> dict:
    """The record that one command writes."""
    from benchmarks.cli import main

    target = tmp_path / "found.json"
    assert main(["run", *arguments, "--json", str(target), "--plot", str(tmp_path / "found.png")]) == 0
    assert (tmp_path / "found.png").stat().st_size > 0
    return json.loads(target.read_text())


# --- random walk -----------------------------------------------------------------------------------------------------


def test_walks_go_against_the_edges_and_stay_as_often_as_they_should():
    graph = Graph(torch.tensor([[1, 2, 0, 3], [0, 0, 1, 2]]), 4)  # 0 hears 1 and 2, 1 hears 0, 2 hears 3; 3 hears nobody
    ends = random_walk.walked(graph, torch.zeros(40_000, dtype=torch.int64), torch.Generator().manual_seed(0), 1, 0.3)
    share = ends.bincount(minlength=4) / len(ends)
    assert share.tolist() == pytest.approx([0.7, 0.15, 0.15, 0.0], abs=0.01)


def test_forward_euler_is_the_mean_of_walks_within_four_standard_errors():
    _, graph, x = random_walk.problem(quick=True)
    row = random_walk.compared(graph, x, 3_000, torch.Generator().manual_seed(3))
    assert row["worst"] <= 4
    assert row["rms"] == pytest.approx(row["expected"], rel=0.5)


def test_random_walk_command(extras, tmp_path):
    rows = served(tmp_path, "random-walk", "--quick")["tables"][0]["rows"]
    assert [row["verdict"] for row in rows] == ["met"] * 3
    assert rows[0]["rms"] > rows[2]["rms"]


# --- solvers ---------------------------------------------------------------------------------------------------------


def test_simulated_communities_know_their_members():
    graph, member = communities(300, 900, 4), torch.from_numpy(community_of(300, 4))
    inside = (member[graph.source] == member[graph.target])[graph.source != graph.target]
    assert inside.float().mean() > 0.75


@pytest.fixture(scope="module")
def case():
    model = Model(GRAPHS["tiny"]()).eval()
    with torch.no_grad():
        sharpened(model, model.encode(), 0.5)
    return grand_solvers.prepared("tiny", model, False)


def scheme(label: str) -> grand_solvers.Scheme:
    return next(s for s in [*grand_solvers.FIXED, *grand_solvers.ADAPTIVE] if s.label == label)


def test_an_error_is_truncation_and_what_the_inner_solver_left(case):
    row = grand_solvers.line(case, scheme("prox_bdf2, fletcher_reeves"), torch.float32, 8)
    assert row["ended"] == "done"
    assert abs(row["error"] - row["truncation"]) <= row["inner"] <= 1e-3 < row["truncation"]
    assert "truncation" not in grand_solvers.line(case, scheme("rk4"), torch.float32, 8)


def test_the_largest_step_is_good_and_longer_ones_are_not(case):
    rk4 = scheme("rk4")
    largest, least = grand_solvers.sweep(case, rk4, torch.float32)
    steps = round(grand_solvers.END / largest)
    errors = [case.error(grand_solvers.attempt(case, rk4, torch.float32, count).y) for count in (steps // 2, steps)]
    assert errors[1] <= grand_claims.GOOD < errors[0]
    assert least == 4 * steps


def test_an_unstable_or_failed_solve_is_told_apart(case):
    assert grand_solvers.attempt(case, scheme("rk4"), torch.float32, 8).done
    assert grand_solvers.solved(lambda t, x: 2.0 * x, torch.ones(3), 10.0, method="rk4", num_steps=50).ended == "unstable"
    assert grand_solvers.solved(lambda t, x: x**2, torch.ones(3), 10.0, method="dopri5").ended not in ("done", "unstable")


def test_claims_follow_from_the_rows():
    rows = [
        {"scheme": "prox_bdf2, x", "nfe": 40, "error": 5e-4, "least": 30},
        {"scheme": "prox_bdf2, y", "nfe": 90, "error": 4e-4},
        {"scheme": "prox_cn, x", "nfe": 20, "error": 5e-3, "least": None},
        {"scheme": "prox_euler, x", "nfe": 5, "ended": "non finite"},
        {"scheme": "dopri5", "nfe": 50, "error": 1e-5, "least": 44},
        {"scheme": "dopri8", "nfe": 35, "error": 1e-7},
    ]
    summary, bdf2, cn = grand_claims.claims(rows, 1.25)
    assert "of 2 proximal methods" in summary and "within 0.001 holds for 1, about half of dopri5's evaluations for 1" in summary
    assert "2 fewer than dopri5, 1 fewer than dopri8" in summary
    assert "within 0.001; 40" in bdf2 and "NOT within" not in bdf2 and "0.80" in bdf2 and "NOT about half" in bdf2
    assert "30 evaluations, dopri5 44" in bdf2
    assert "NOT within" in cn and "0.40" in cn and "NOT about half" not in cn and "more than 1000" in cn
    assert grand_claims.claims(rows[:4], 1.25) == ["no claim is judged without dopri5"]


def test_products_with_the_transposed_jacobian_are_counted():
    problem = GRAPHS["tiny"]()
    for options, least in (({"adjoint": "checkpoint"}, 32), ({"adjoint": "backprop"}, 32)):
        run = grand_training.train(problem, grand_training.Scheme("rk4", "", "rk4_classic", {"dt": 1.25, **options}), 1)
        assert (run.forward, run.backward) == ([32], [least])
    implicit = grand_training.Scheme("", "", "prox_euler", {"dt": 1.25, "inner_tol": 1.0})
    run = grand_training.train(problem, implicit, 1)
    assert run.backward[0] > 8


def test_training_through_implicit_steps_lowers_the_loss():
    steps = {"dt": 1.25, "inner_tol": 1.0, "backward_tol": 1e-4}
    run = grand_training.train(GRAPHS["tiny"](), grand_training.Scheme("", "", "prox_bdf2", steps), 8)
    assert run.ended == "done" and len(run.loss) == 8 and len(run.accuracy) == 2
    assert run.loss[-1] < run.loss[0]


def test_the_work_of_proximal_methods_is_told_beside_that_of_others():
    def row(solver, gradient, forward, backward, ended="done", seconds=0.5):
        work = {"forward": forward, "backward": backward, "seconds": seconds}
        return {"solver": solver, "gradient": gradient, **work, "ended": ended}

    rows = [row("dopri5", "backsolve", 60, 140, "epoch 4: MaxStepsError"), row("dopri5", "discrete", 60, 58, seconds=2.0)]
    rows += [row("AM4, PECE", "discrete", 32, 32), row("prox_cn, x", "implicit", 40, 50)]
    rows.append({"solver": "prox_bdf2, x", "gradient": "implicit", "forward": 40, "ended": "epoch 1: InnerSolverError"})
    _, line = grand_training.findings(rows)
    assert line.startswith("prox_cn, x: 90 evaluations, 0.5 s an epoch; ") and "AM4" not in line
    assert "0.45 / 1.00 of dopri5 (backsolve, ended at epoch 4: MaxStepsError)" in line
    assert "0.76 / 0.25 of dopri5 (discrete)" in line
    assert grand_training.findings(rows[:3]) == []


def test_a_solver_that_fails_ends_its_training_and_says_so():
    scheme = grand_training.Scheme("", "", "dopri5", {"dt_min": 9.0})
    run = grand_training.train(GRAPHS["tiny"](), scheme, 2)
    assert run.ended.startswith("epoch 1: ") and not run.loss


@pytest.mark.slow
def test_grand_solvers_command(extras, tmp_path):
    record = served(tmp_path, "grand-solvers", "--quick")
    titles = [table["title"] for table in record["tables"]]
    assert titles[0] == "what has to be reached" and any("Fig. 5.1" in title for title in titles)
    rows = {row["scheme"]: row for row in record["tables"][1]["rows"]}
    assert {"euler", "rk4", "AB4", "AM4, PECE", "AM4, iterated", "semi_implicit_euler", "dopri8"} <= set(rows)
    assert any(note.startswith("prox_bdf2") and "of dopri5's" in note for note in record["tables"][1]["notes"])
    assert any(row["scheme"] == "exp_linear" for table in record["tables"][1:] for row in table["rows"] if "scheme" in row)


@pytest.mark.slow
def test_grand_solvers_trains_every_solver(extras, tmp_path):
    record = served(tmp_path, "grand-solvers", "--quick", "--train", "2")
    rows = record["tables"][0]["rows"]
    assert {row["gradient"] for row in rows} == {"backsolve", "discrete", "implicit"}
    assert all(row["backward"] > 0 for row in rows if row["ended"] == "done")


# --- step sizes and sparsity -----------------------------------------------------------------------------------------


def test_steps_within_a_percent_are_told_from_the_others():
    rows = [{"solver": "AB4", "step": step, "ended": "done", "error": error} for step, error in ((0.1, 1e-5), (0.5, 3.0))]
    rows.append({"solver": "AB4", "step": 1.0, "ended": "non finite"})
    assert "within 1 % at steps 0.1, not at 0.5, 1;" in grand_stepsize.verdicts(rows)[0]


def test_rewiring_keeps_the_heaviest_edges_and_a_loop():
    problem = GRAPHS["tiny"]()
    graph = grand_sparsity.rewired_problem(problem, 3).graph
    loops = graph.source == graph.target
    assert int(loops.sum()) == graph.num_sources and graph.weight is None
    assert graph.degree().max() <= 4 and graph.num_edges < problem.graph.num_edges


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["l", "nl"])
def test_grand_stepsize_command(extras, tmp_path, variant):
    record = served(tmp_path, "grand-stepsize", "--quick", "--variant", variant)
    rows = {(row["solver"], row.get("step")): row for row in record["tables"][0]["rows"]}
    assert rows["AB4", 0.1]["error"] < 1e-4 and rows["AB4", 1.0]["ended"] != "done"
    assert rows["AM4, iterated", 1.0]["ended"] == "done" != rows["AM4, PECE", 2.0].get("error", 1.0)
    assert all(row["ended"] == "done" for row in record["tables"][1]["rows"])


@pytest.mark.slow
def test_grand_sparsity_command(extras, tmp_path):
    rows = served(tmp_path, "grand-sparsity", "--quick")["tables"][0]["rows"]
    assert [row["kept"] for row in rows] == ["4", "8", "16", "as given"]
    assert rows[0]["edges"] < rows[1]["edges"] < rows[2]["edges"]


# --- images ----------------------------------------------------------------------------------------------------------


def test_patches_that_share_a_side_are_joined():
    labels = np.array([[0, 0, 1], [2, 2, 1]])
    graph = image_diffusion.adjacent(labels)
    pairs = {(int(i), int(j)) for i, j in graph.edge_index.T}
    assert pairs == {(0, 0), (1, 1), (2, 2), (0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)}


def test_images_become_their_patches_and_back():
    images = image_diffusion.drawn_digits()
    data = image_diffusion.patches(images, "squares")
    back = data.painted(data.x)
    assert back.shape == images.shape and data.graph.num_sources == len(data.x) == 2 * 14 * 14
    expected = images.reshape(2, 14, 2, 14, 2).mean((2, 4), keepdims=True)
    np.testing.assert_allclose(back.reshape(2, 14, 2, 14, 2), expected.repeat(2, 2).repeat(2, 4), atol=1e-6)


def test_superpixels_follow_the_outline():
    pytest.importorskip("skimage", reason="scikit-image of the bench extra is not installed")
    image = image_diffusion.drawn_digits()[0]
    labels = image_diffusion.cut(image, "slic")
    assert 20 < labels.max() < 200
    within = [image[labels == label].var() for label in range(labels.max() + 1)]
    assert np.average(within, weights=np.bincount(labels.ravel())) < 0.3 * image.var()


def test_image_diffusion_command(extras, tmp_path):
    record = served(tmp_path, "image-diffusion", "--quick", "--patches", "squares")
    own, other = record["tables"][0]["rows"]
    assert own["contrast"] > other["contrast"] and own["across"] < other["across"]
    at = {row["t"]: row for row in record["tables"][1]["rows"]}
    assert at[2.0]["perona"] < 0.5 * at[0.0]["perona"] and at[2.0]["perona_edges"] > 2 * at[2.0]["heat_edges"]


def test_images_are_read_from_either_file(tmp_path, monkeypatch):
    monkeypatch.setenv(DATA, str(tmp_path))
    with pytest.raises(BenchmarkError, match="t10k-images"):
        image_diffusion.mnist(1)
    (tmp_path / "mnist_t10k").mkdir()
    pixels = np.arange(2 * 784, dtype=np.int64).reshape(2, 28, 28).astype(np.uint8)
    (tmp_path / "mnist_t10k" / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16) + pixels.tobytes()))
    raw = image_diffusion.mnist(2)
    np.savez(tmp_path / "mnist_t10k" / "mnist_t10k.npz", images=pixels)
    assert (raw == pixels / 255).all() and (image_diffusion.mnist(2) == raw).all()


# --- data and options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["grand-solvers", "random-walk", "grand-stepsize", "grand-sparsity", "image-diffusion"])
def test_absent_data_ends_with_2_and_says_which_file(extras, monkeypatch, capsys, name):
    from benchmarks.cli import main

    monkeypatch.delenv(DATA, raising=False)
    assert main(["run", name]) == 2
    missing = "mnist_t10k.npz" if name == "image-diffusion" else "cora_planetoid.npz"
    assert missing in capsys.readouterr().err


def test_an_option_of_another_benchmark_is_refused(extras, capsys):
    from benchmarks.cli import main

    assert main(["run", "random-walk", "--train", "3"]) == 2
    assert "random-walk has no --train" in capsys.readouterr().err
    assert main(["run", "grand-solvers", "--graphs", "korá"]) == 2
    assert "unknown graph" in capsys.readouterr().err


def test_they_are_registered():
    assert {"grand-solvers", "random-walk", "grand-stepsize", "grand-sparsity", "image-diffusion"} <= set(BENCHMARKS)
