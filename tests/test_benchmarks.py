"""The benchmarks: registry, command line, the fields of the main job, stored references, the page of results."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import references
from benchmarks.diffusion import HillslopeDiffusion, PeriodicDiffusion, PeronaMalik, sparsity
from benchmarks.registry import (
    BENCHMARKS,
    PEERS,
    PROBLEMS,
    BenchmarkError,
    Column,
    MissingExtra,
    Option,
    Registry,
    Result,
    Table,
    UnknownName,
    discover,
    need,
)
from benchmarks.report import page, written
from benchmarks.timing import Deadline, OutOfTime, Prepared, interleaved

discover()

FIELDS = {
    "line": (PeriodicDiffusion(0.3), (12,)),
    "terrain": (HillslopeDiffusion((3.0, 2.0)), (7, 9)),
    "photograph": (PeronaMalik(0.3), (7, 9)),
}


def state(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(FIELDS[name][1], generator=generator, dtype=torch.float64)


@pytest.fixture
def extras():
    """Skip, with the reason, where the `bench` extra is not installed."""
    for package in ("matplotlib", "rich"):
        pytest.importorskip(package, reason=f"{package} of the bench extra is not installed")


# --- fields ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIELDS)
def test_the_sparse_jacobian_is_the_derivative_of_the_field(name):
    field, y = FIELDS[name][0], state(name)
    dense = torch.func.jacfwd(lambda x: field(None, x.view_as(y)).reshape(-1))(y.reshape(-1))
    jacobian = field.jacobian(y)
    assert np.abs(jacobian.toarray() - dense.numpy()).max() < 1e-12
    assert (sparsity(jacobian).toarray()[dense.numpy() != 0] == 1).all()


@pytest.mark.parametrize("name", ["line", "terrain"])
def test_the_field_is_the_negative_gradient_of_its_energy(name):
    field, y = FIELDS[name][0], state(name).requires_grad_()
    (gradient,) = torch.autograd.grad(field.energy(None, y), y)
    assert torch.allclose(field(None, y), -gradient, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", FIELDS)
def test_the_field_conserves_the_mean(name):
    change = FIELDS[name][0](None, state(name))
    assert abs(float(change.sum())) < 1e-13 * float(change.abs().sum())


def test_hillslope_energy_is_convex():
    curvature = HillslopeDiffusion((3.0, 2.0)).jacobian(state("terrain")).toarray()
    assert np.abs(curvature - curvature.T).max() == 0
    assert np.linalg.eigvalsh(curvature).max() < 1e-12


def test_the_closed_form_of_the_line_is_the_matrix_exponential():
    field, y = FIELDS["line"][0], state("line")
    matrix = torch.from_numpy(field.jacobian(y).toarray())
    times = torch.tensor([0.01, 0.3], dtype=torch.float64)
    expected = torch.stack([torch.matrix_exp(t * matrix) @ y for t in times])
    assert torch.allclose(field.exact(y, times), expected, atol=1e-12)


# --- references ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["terrain", "terrain-full", "photograph"])
def test_a_reference_is_stored_small_and_says_how_it_was_made(name):
    path = references.FOLDER / f"{name}.npz"
    assert path.stat().st_size < references.LARGEST
    stored = references.load(name)
    assert stored is not None and torch.isfinite(stored.y).all()
    assert "rtol 1e-09" in stored.facts["made"]
    difference = re.fullmatch(r"differs from \w+ at \S+ by at most (\S+) .*", stored.facts["confirmed"])
    assert difference and float(difference[1]) < 1e-4


@pytest.mark.parametrize("name", ["terrain", "photograph"])
def test_a_reference_belongs_to_its_problem_and_has_its_mean(extras, name):
    problem = PROBLEMS[name]()
    assert problem.reference is not None, problem.notes
    assert problem.reference.shape == (len(problem.times) - 1, *problem.y0.shape)
    assert problem.drift(problem.reference) < 1e-6
    assert problem.error(problem.reference) == 0


def test_packing_a_reference_loses_only_the_quantum():
    y = np.random.default_rng(0).standard_normal((6, 5)).cumsum(0) * 100
    assert np.abs(references.unpack(references.pack(y, 2.0**-10), 2.0**-10) - y).max() <= 2.0**-11


def test_a_reference_of_another_start_is_not_used(extras):
    problem = PROBLEMS["terrain"]()
    stored = references.load("terrain")
    assert stored.belongs_to(problem.y0) and not stored.belongs_to(problem.y0 + 1)


# --- registry and command line ---------------------------------------------------------------------------------------


def test_an_unknown_name_suggests_the_nearest():
    with pytest.raises(UnknownName, match="did you mean 'stiff-diffusion'"):
        BENCHMARKS["stif-diffusion"]


def test_a_name_is_registered_once():
    registry: Registry[int] = Registry("thing")
    registry.add("a", 1)
    with pytest.raises(BenchmarkError, match="twice"):
        registry.add("a", 2)


def test_a_missing_package_names_its_extra():
    with pytest.raises(MissingExtra, match=r"proxode\[bench\]"):
        need("a_package_that_nobody_has")


def test_every_entry_of_the_registries_is_described():
    from benchmarks import cli

    assert {"stiff-diffusion", "speed", "convergence", "stability"} <= set(BENCHMARKS)
    text = cli.parser().format_help()
    for entry in BENCHMARKS.values():
        assert entry.summary in text and entry.usual_time in text
    assert all(build.__doc__ for build in PROBLEMS.values())
    assert all(peer.package and peer.name == name for name, peer in PEERS.items())


def test_list_prints_benchmarks_problems_and_peers(capsys):
    from benchmarks.cli import main

    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*BENCHMARKS, *PROBLEMS, *PEERS))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "convergense"], "did you mean 'convergence'"),
        (["run", "convergence", "--methods", "bosh33"], "did you mean 'bosh3'"),
        (["run", "stiff-diffusion", "--peers", "scipy-bfd"], "did you mean 'scipy-bdf'"),
        (["run", "stiff-diffusion", "--problems", "terain"], "did you mean 'terrain'"),
        (["run", "convergence", "--peers", "scipy-bdf"], "leave --peers out"),
        (["run", "convergence", "--device", "gpu"], "known: cpu, cuda"),
        (["report", "no-such-folder"], "no folder"),
    ],
)
def test_a_bad_request_ends_with_2_and_says_what_to_do(extras, arguments, words, capsys):
    from benchmarks.cli import main

    assert main(arguments) == 2
    assert words in capsys.readouterr().err


def test_an_option_is_read_or_refused_with_its_name():
    turns, way = Option("turns", "how many", 3, int), Option("way", "which", "x", choices=("x", "yy"))
    assert [turns.value(None), turns.value("5"), way.value(None), way.value("yy")] == [3, 5, "x", "yy"]
    with pytest.raises(BenchmarkError, match="--turns five"):
        turns.value("five")
    with pytest.raises(UnknownName, match="did you mean 'yy'"):
        way.value("y")


def test_a_run_writes_its_table_json_and_picture_and_the_page_holds_all(extras, tmp_path, capsys):
    from benchmarks.cli import main

    target, plot = tmp_path / "convergence.json", tmp_path / "convergence.png"
    arguments = ["run", "convergence", "--quick", "--methods", "euler,rk4", "--json", str(target), "--plot", str(plot)]
    assert main(arguments) == 0
    assert "rk4" in capsys.readouterr().out and plot.stat().st_size > 0
    record = json.loads(target.read_text())
    assert {"date", "cpu", "threads", "versions"} <= set(record["machine"])
    assert [row["verdict"] for row in record["tables"][0]["rows"]] == ["yes", "yes"]

    html = page(tmp_path).read_text()
    assert "rk4" in html and "data:image/png;base64," in html
    assert not re.search(r'(src|href)="(?!data:)', html) and "<script" not in html and "@import" not in html


def test_the_page_says_first_what_was_to_be_reached(tmp_path):
    from benchmarks.report import write_json

    columns = [Column("row", "row"), Column("verdict", "verdict")]
    rows = [{"row": "a", "verdict": "met"}, {"row": "<b>", "verdict": "SHORT"}, {"row": "c", "verdict": "not judged"}]
    for name in ("first", "second"):
        result = Result([Table("bars", columns, rows), Table("others", columns[:1], [{"row": "d"}])])
        write_json(tmp_path / f"{name}.json", "first", {}, {"date": "today"}, result, None)
    html = page(tmp_path).read_text()
    summary, *sections = html.split("<h2>")
    assert len(sections) == 2 and "others" not in summary
    for name in ("first", "first (second)"):
        numbers = '<td class="number">1</td><td class="number">3</td>'
        assert f'<td class="text">{name}</td><td class="text">bars</td>{numbers}' in summary
    assert "&lt;b&gt;" in summary and "<b>" not in html


def test_the_main_job_stops_a_solver_at_its_budget_and_shows_it(extras, tmp_path, capsys, monkeypatch):
    from benchmarks.cli import main

    def over(deadline):  # by looks at the clock, not by the clock: a loaded machine stops the same solvers
        deadline.looks = getattr(deadline, "looks", 0) + 1
        return deadline.looks > 2500

    monkeypatch.setattr(Deadline, "over", over)
    target = tmp_path / "a.json"
    arguments = ["run", "stiff-diffusion", "--quick", "--methods", "dopri5", "--peers", "scipy-bdf,cvode-gmres"]
    assert main([*arguments, "--problems", "line", "--json", str(target), "--plot", str(tmp_path / "a.png")]) == 0
    rows = {row["solver"]: row for row in json.loads(target.read_text())["tables"][0]["rows"]}
    assert rows["dopri5"]["ended"].startswith("stopped at t=") and rows["dopri5"]["evaluations"] > 0
    assert rows["scipy-bdf"]["ended"] == "done" and rows["scipy-bdf"]["error"] < 1e-3
    assert rows["cvode-gmres"]["ended"] == "done" or "absent" in rows["cvode-gmres"]["ended"]


def test_inner_solvers_fail_or_solve_and_say_which(extras, tmp_path, capsys):
    from benchmarks.cli import main

    target = tmp_path / "inner.json"
    asked = ["run", "inner-solvers", "--quick", "--inner", "newton_sparse,fixed_point", "--json", str(target)]
    assert main([*asked, "--plot", str(tmp_path / "inner.png")]) == 0
    for table in json.loads(target.read_text())["tables"]:
        ended = {row["solver"]: row["ended"] for row in table["rows"]}
        assert ended == {"newton_sparse": "done", "fixed_point": "inner not converged"}
    assert main([*asked[:4], "newtn"]) == 2
    assert "newton" in capsys.readouterr().err


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(BenchmarkError, match="no results"):
        page(tmp_path)
    Path(tmp_path / "broken.json").write_text("{}")
    with pytest.raises(BenchmarkError, match="no result of `run`"):
        page(tmp_path)


# --- clocks and values -----------------------------------------------------------------------------------------------


def test_interleaved_runs_take_turns_and_prepare_is_not_timed():
    order: list[str] = []
    prepared = Prepared(lambda: order.append("prepare"), lambda _: order.append("b"))
    timings = interleaved({"a": lambda: order.append("a"), "b": prepared}, 2, warm=False)
    assert order == ["a", "prepare", "b", "a", "prepare", "b"]
    assert len(timings["a"].wall) == len(timings["b"].cpu) == 2


def test_a_timed_field_raises_when_its_budget_is_spent():
    from benchmarks.running import TimedField

    timed = TimedField(lambda t, y: y, Deadline(-1.0).start())
    with pytest.raises(OutOfTime):
        timed(0.5, torch.ones(1))


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("count", 1234, "1,234"),
        ("error", 0.00123, "1.2e-03"),
        ("ratio", 2.0, "2x"),
        ("number", float("inf"), "unbounded"),
        ("seconds", None, ""),
    ],
)
def test_values_are_written_by_their_kind(kind, value, text):
    assert written(kind, value) == text


# --- known limits of stability ---------------------------------------------------------------------------------------


def test_known_real_limits_of_adams_bashforth_follow_from_its_weights():
    from benchmarks.stability import KNOWN

    for order in range(1, 13):
        # In fractions: as a linear system in floats, order 12 is too ill-conditioned to be solved alike on every machine.
        weights = [_lagrange_integral(j, order) for j in range(order)]
        known, _ = KNOWN[f"explicit_adams, order {order}"]
        assert known == pytest.approx(float(2 / sum(map(abs, weights))), rel=1e-6)


def _lagrange_integral(j: int, order: int) -> Fraction:
    """Integral over [0, 1] of the polynomial that is 1 at node -j and 0 at the others of 0, -1, ..., 1 - order."""
    polynomial = [Fraction(1)]
    for m in set(range(order)) - {j}:
        times_x = [Fraction(0), *polynomial]
        polynomial = [(m * a + b) / (m - j) for a, b in zip([*polynomial, Fraction(0)], times_x)]
    return sum((c / (power + 1) for power, c in enumerate(polynomial)), Fraction(0))


def test_known_real_limits_of_runge_kutta_are_roots_of_its_stability_polynomial():
    from benchmarks.stability import KNOWN
    from solvers.methods import METHODS

    for name in METHODS:
        tableau = getattr(METHODS[name], "tableau", None)
        if tableau is None or name not in KNOWN:
            continue
        matrix = np.zeros((tableau.stages, tableau.stages))
        for row, entries in enumerate(tableau.a):
            matrix[row, : len(entries)] = entries

        def factor(z, matrix=matrix, b=tableau.b):
            return abs(1 + z * np.array(b) @ np.linalg.solve(np.eye(len(b)) - z * matrix, np.ones(len(b))))

        limit = KNOWN[name][0]
        if limit == float("inf"):
            assert max(map(factor, -np.logspace(-3, 8, 200))) <= 1 + 1e-12, name
            continue
        assert factor(-limit) == pytest.approx(1, abs=1e-6), name
        assert factor(-limit * 1.001) > 1 and max(map(factor, np.linspace(-0.999 * limit, -0.01, 200))) < 1, name
