"""Data: what the readers give back, what they refuse, that a pickle is never run, and the splits of the protocols."""

from __future__ import annotations

import os
import pickle
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch
from graphs import needs

import graphops as go
from graphops.data import NodeData, Split, example, random_split, read_arrays, read_edges, read_npz, read_planetoid
from graphops.pickles import read_pickle

FOLDER = os.environ.get("PROXODE_DATA")
has_data = pytest.mark.skipif(FOLDER is None, reason="PROXODE_DATA names no folder of data sets")

X = scipy.sparse.csr_matrix(np.array([[0, 1, 0], [2, 0, 0], [0, 0, 3.5], [1, 1, 0], [0, 0, 1]], np.float32))
LABELS = np.array([0, 1, 1, 0, 1])


def write_planetoid(folder: Path, protocol: int = 2, test: tuple[int, ...] = (6, 3, 5)) -> None:
    """Nodes 0, 1, 2 known, of which one trains; tests in the file's order 6, 3, 5; node 4 left out."""
    one_hot = np.eye(2, dtype=np.int32)[LABELS]
    parts = {
        "x": X[:1], "allx": X[:3], "tx": X[np.array([3, 4, 0])],
        "y": one_hot[:1], "ally": one_hot[:3], "ty": one_hot[np.array([3, 4, 0])],
        "graph": defaultdict(list, {0: [1, 3, 3], 1: [0], 2: [2, 6], 3: [0], 4: [], 5: [6], 6: [2]}),
    }  # fmt: skip
    for name, part in parts.items():
        (folder / f"ind.tiny.{name}").write_bytes(pickle.dumps(part, protocol))
    (folder / "ind.tiny.test.index").write_text("\n".join(map(str, test)))


# --- pickles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(5))
def test_a_pickled_array_is_decoded(protocol):
    arrays = [
        np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6, dtype=">i4").reshape(2, 3)),
        np.zeros((0, 4), np.float32), np.array([[True, False]]),
    ]  # fmt: skip
    for array in arrays:
        found = read_pickle(pickle.dumps(array, protocol))
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
        found[...] = 0  # it owns its memory
    matrix = read_pickle(pickle.dumps(X, protocol))
    np.testing.assert_array_equal(matrix.toarray(), X.toarray())
    assert read_pickle(pickle.dumps(defaultdict(list, {1: [2, 3]}), protocol)) == {1: [2, 3]}


def test_the_names_of_old_versions_are_known():
    """Python 2's cPickle, protocol 0, of numpy.array([[1.5, -2.0]]): texts instead of bytes, and the older module."""
    text = (
        b"cnumpy.core.multiarray\n_reconstruct\np1\n(cnumpy\nndarray\np2\n(I0\ntp3\nS'b'\np4\ntp5\nRp6\n(I1\n(I1\nI2\ntp7\n"
        b"cnumpy\ndtype\np8\n(S'f8'\np9\nI0\nI1\ntp10\nRp11\n(I3\nS'<'\np12\nNNNI-1\nI-1\nI0\ntp13\nbI00\n"
        b"S'\\x00\\x00\\x00\\x00\\x00\\x00\\xf8?\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\xc0'\np14\ntp15\nb."
    )
    np.testing.assert_array_equal(read_pickle(text), [[1.5, -2.0]])


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_is_never_run(tmp_path, protocol):
    trace = tmp_path / "trace"
    made = [
        Evil(os.mkdir, str(trace)),
        Evil(eval, f"__import__('os').mkdir({str(trace)!r})"),
        defaultdict(list, {0: Evil(os.mkdir, str(trace))}),
    ]
    for thing in made[:2]:
        with pytest.raises(pickle.UnpicklingError, match="called"):
            read_pickle(pickle.dumps(thing, protocol))
    read_pickle(pickle.dumps(made[2], protocol))  # a dict of notes, which the caller refuses
    assert not trace.exists()


def changed(array: np.ndarray, **changes) -> bytes:
    """The pickle of an array with another shape, dtype or content in its state."""
    make, args, state = array.__reduce__()
    names = ("version", "shape", "dtype", "fortran", "content")
    state = tuple(changes.get(name, value) for name, value in zip(names, state))

    class Changed:
        def __reduce__(self):
            return make, args, state

    return pickle.dumps(Changed(), 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (changed(np.zeros(3), shape=(10**9,)), "bytes instead of"),
        (changed(np.zeros(3), shape=(-3,)), "instead of"),
        (changed(np.zeros(3), content=b"12"), "2 bytes"),
        (changed(np.zeros(3), dtype=np.dtype(object)), "only numbers"),
        (changed(np.zeros(3), dtype=np.dtype("M8[s]")), "only numbers"),
        (b"", "not a pickled"),
        (b"neither", "."),
        (pickle.dumps(torch.nn.Linear, 2), "name alone"),
    ],
)
def test_what_does_not_fit_is_refused(content, words):
    with pytest.raises(pickle.UnpicklingError, match=words):
        read_pickle(content)


def test_a_file_cut_short_is_refused():
    content = pickle.dumps(X, 2)
    for length in range(len(content)):
        with pytest.raises(pickle.UnpicklingError):
            read_pickle(content[:length])


def test_sparse_indices_out_of_range_are_refused():
    """scipy's own kernels would read and write out of bounds."""
    bad = scipy.sparse.csr_matrix(X)
    bad.indices = np.where(bad.indices == 2, 10**6, bad.indices)
    with pytest.raises(pickle.UnpicklingError, match="indices must be < 3"):
        read_pickle(pickle.dumps(bad, 2))


# --- Planetoid -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_original_planetoid_files(tmp_path, protocol):
    write_planetoid(tmp_path, protocol)
    data = read_planetoid(tmp_path, "tiny")
    expected = np.zeros((7, 3), np.float32)
    expected[[0, 1, 2, 6, 3, 5]] = X.toarray()[[0, 1, 2, 3, 4, 0]]
    np.testing.assert_array_equal(data.x, expected)
    assert data.y.tolist() == [0, 1, 1, 1, -1, 0, 0] and data.num_classes == 2
    assert [mask.nonzero()[:, 0].tolist() for mask in data.split] == [[0], [1, 2], [3, 5, 6]]
    pairs = [(0, 1), (0, 3), (2, 6), (5, 6)]
    assert sorted(map(tuple, data.graph.edge_index.t().tolist())) == sorted(pairs + [pair[::-1] for pair in pairs])
    assert data.graph.is_sorted


def test_files_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(go.MissingDataError, match="github.com/kimiyoung/planetoid"):
        read_planetoid(tmp_path, "tiny")
    write_planetoid(tmp_path)
    (tmp_path / "ind.tiny.tx").unlink()
    with pytest.raises(FileNotFoundError, match="ind.tiny.tx"):
        read_planetoid(tmp_path, "tiny")
    (tmp_path / "ind.tiny.tx").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(go.ArgumentError, match="ind.tiny.tx holds a list"):
        read_planetoid(tmp_path, "tiny")
    (tmp_path / "ind.tiny.tx").write_bytes(pickle.dumps(Evil(os.getcwd)))
    with pytest.raises(go.ArgumentError, match="getcwd"):
        read_planetoid(tmp_path, "tiny")
    write_planetoid(tmp_path, test=(6, 3))
    with pytest.raises(go.ArgumentError, match="fit together"):
        read_planetoid(tmp_path, "tiny")


@has_data
def test_cora_and_citeseer_as_published():
    """Counts of the largest component: GRAND++, table 4.11; of the split inside it: counted when the files were made."""
    for name, nodes, edges, classes, unknown, inside in (
        ("cora", (2708, 2485), (10556, 10138), 7, 0, [122, 459, 915]),
        ("citeseer", (3327, 2120), (9104, 7358), 6, 15, [80, 328, 663]),
    ):
        data = read_planetoid(FOLDER, name)
        assert (data.graph.num_nodes, data.graph.num_edges, data.num_classes) == (nodes[0], edges[0], classes)
        assert int((data.y == -1).sum()) == unknown and not data.x[data.y == -1].any()
        assert [int(mask.sum()) for mask in data.split] == [20 * classes, 500, 1000]
        part = data.largest_component()
        assert (part.graph.num_nodes, part.graph.num_edges) == (nodes[1], edges[1])
        assert [int(mask.sum()) for mask in part.split] == inside
        kept = torch.from_numpy(read_arrays(Path(FOLDER) / name / f"{name}_planetoid.npz")["lcc_mask"])
        torch.testing.assert_close(part.x, data.x[kept])
        theta = torch.randn(part.x.shape[1], 4)
        torch.testing.assert_close(go.spmm(part.features, part.features.weight, theta), part.x @ theta, rtol=1e-4, atol=1e-4)


@has_data
def test_other_archives_of_the_folder():
    pubmed = read_npz(Path(FOLDER) / "pubmed_graph" / "pubmed_topology.npz")
    assert (pubmed.graph.num_nodes, pubmed.graph.num_edges, pubmed.x, pubmed.num_classes) == (19717, 88648, None, 3)
    assert [int(mask.sum()) for mask in pubmed.split] == [60, 500, 1000]
    assert read_npz(Path(FOLDER) / "cora" / "cora_shchur.npz").split is None
    assert read_arrays(Path(FOLDER) / "mnist_t10k" / "mnist_t10k.npz")["images"].shape == (10000, 28, 28)


# --- archives, edge lists, examples ----------------------------------------------------------------------------------


def test_an_archive_holds_what_it_holds(tmp_path):
    edges = np.array([[0, 1, 2], [1, 2, 0]], np.int32)
    path = tmp_path / "a.npz"
    np.savez(path, edge_index=edges)
    bare = read_npz(path)
    assert (bare.graph.num_nodes, bare.x, bare.y, bare.split, bare.num_classes) == (3, None, None, None, 0)
    with pytest.raises(go.ArgumentError, match="no features"):
        bare.features  # noqa: B018
    csr = {"x_indptr": [0, 1, 1, 3], "x_indices": [2, 0, 1], "x_shape": [3, 3]}
    index = {"train_idx": np.array([2]), "val_idx": np.array([0]), "test_idx": np.empty(0, int)}
    np.savez(path, edge_index=edges, y=[1, 0, 1], **csr, **index)
    data = read_npz(path)
    assert data.x.tolist() == [[0, 0, 1], [0, 0, 0], [1, 1, 0]] and data.split.train.tolist() == [False, False, True]
    np.savez(path, edge_index=edges, x_data=[2.0, 3, 4], **csr)
    assert read_npz(path).x.tolist() == [[0, 0, 2], [0, 0, 0], [3, 4, 0]]
    moved = data.subgraph(torch.tensor([2, 0])).to("cpu")
    assert moved.y.tolist() == [1, 1] and moved.split.train.tolist() == [True, False]
    assert moved.graph.edge_index.tolist() == [[0], [1]] and moved.x.tolist() == [[1, 1, 0], [0, 0, 1]]


def test_archives_that_do_not_fit_are_named(tmp_path):
    edges, path = np.array([[0, 1], [1, 0]]), tmp_path / "a.npz"
    cases = [
        (dict(x=np.ones((2, 1))), "no edge_index; it has x"),
        (dict(edge_index=edges, x=np.ones((2, 1)), y=np.ones(3)), "features of 2 nodes and labels of 3"),
        (dict(edge_index=edges, x_indptr=[0, 1, 1], x_indices=[5], x_shape=[2, 2]), "no CSR matrix"),
        (dict(edge_index=edges, train_idx=np.array([2]), val_idx=edges[0], test_idx=edges[0]), "train has nodes from 2"),
        (dict(edge_index=edges + 2, y=[0, 1]), "too small"),
        (dict(edge_index=edges, y=np.array([{}, {}])), "not an .npz of numbers"),
    ]
    for arrays, words in cases:
        np.savez(path, **arrays)
        with pytest.raises(go.ArgumentError, match=words):
            read_npz(path)
    path.write_text("text")
    with pytest.raises(go.ArgumentError, match="not an .npz"):
        read_arrays(path)
    with pytest.raises(go.MissingDataError, match="b.npz is not there"):
        read_npz(tmp_path / "b.npz")


def test_lists_of_edges(tmp_path):
    path = tmp_path / "edges.txt"
    path.write_text("# comment\n0 2\n\n3\t1\n")
    assert read_edges(path).edge_index.tolist() == [[0, 3], [2, 1]]
    assert read_edges(path, 9).num_nodes == 9 and read_edges(path).weight is None
    assert read_edges(path, directed=False).edge_index.t().tolist() == [[2, 0], [3, 1], [0, 2], [1, 3]]
    path.write_text("% comment\n0,2,0.5\n")
    graph = read_edges(path, delimiter=",", comments="%")
    assert graph.weight.tolist() == [0.5] and graph.num_nodes == 3
    path.write_text("")
    assert read_edges(path, 4).num_edges == 0
    bad = {"0 a\n": "row 0", "0 1\n2\n": "columns", "0 1\n-1 2\n": "edge 1", "0 1.5\n": "edge 0", "7\n": "1 columns"}
    for text, words in bad.items():
        path.write_text(text)
        with pytest.raises(go.ArgumentError, match=words):
            read_edges(path)
    with pytest.raises(go.MissingDataError):
        read_edges(tmp_path / "absent")


@needs["networkx"]
def test_examples():
    club = example("karate_club")
    assert (club.graph.num_nodes, club.graph.num_edges, club.y.bincount().tolist()) == (34, 156, [17, 17])
    assert example("davis_southern_women").y.bincount().tolist() == [18, 14]
    assert example("florentine_families").y is None and example("les_miserables").graph.weight.max() == 31
    with pytest.raises(go.UnknownNameError, match="karate_club"):
        example("karate-club")


def test_networkx_absent_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "networkx", None)
    with pytest.raises(go.MissingPackageError, match="pip install networkx"):
        example("karate_club")


# --- splits ----------------------------------------------------------------------------------------------------------


def test_random_split_counts():
    y = torch.arange(600) % 6
    y[5:600:6] = -1
    split = random_split(y, per_class=7, development=300, generator=torch.Generator().manual_seed(1))
    assert isinstance(split, Split)
    assert [int(mask.sum()) for mask in split] == [35, 265, 200]
    assert torch.stack(split).sum(0).tolist() == (y >= 0).long().tolist()
    assert y[split.train].bincount().tolist() == [7] * 5
    again = random_split(y, 7, 300, torch.Generator().manual_seed(1))
    other = random_split(y, 7, 300, torch.Generator().manual_seed(2))
    assert all(torch.equal(a, b) for a, b in zip(split, again)) and not torch.equal(split.train, other.train)


def test_random_split_is_uniform():
    """Each node of a class trains equally often: 2000 draws of 2 of 10, whose counts have a deviation of 18."""
    y, generator = torch.tensor([0] * 10 + [1] * 20), torch.Generator().manual_seed(0)
    counts = sum(random_split(y, 2, 25, generator).train.long() for _ in range(2000))
    assert (counts[:10] - 400).abs().max() < 4 * 18 and (counts[10:] - 200).abs().max() < 4 * 14


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda y: random_split(y, 2, 7), go.ArgumentError, "from 1 to 6"),
        (lambda y: random_split(y, 2, 0), go.ArgumentError, "from 1 to 6"),
        (lambda y: random_split(y, 3, 6), go.ArgumentError, "class 1 has 2"),
        (lambda y: random_split(y.float()), go.ArgumentTypeError, "integer"),
        (lambda y: NodeData(go.Graph.grid((7,))).features, go.ArgumentError, "no features"),
    ],
)
def test_bad_splits_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.tensor([0, 1, 0, 1, 0, 0, -1]))
