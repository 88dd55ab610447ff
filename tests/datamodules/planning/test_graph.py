"""Graphs say what they hold, refuse what contradicts itself and survive a file."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest

from datamodules.planning.assemble import assemble
from datamodules.planning.flops import bytes_moved, flops_of
from datamodules.planning.graph import Graph, GraphError, Op, Parameter, TensorInfo


def product(phase: str = "forward") -> Graph:
    """y = x w, dw = x' y: a step whose loss nobody needs to believe in."""
    tensors = (
        TensorInfo("w", (4, 6), "float32"),
        TensorInfo("x", (8, 4), "float32"),
        TensorInfo("y", (8, 6), "float32"),
        TensorInfo("xt", (4, 8), "float32"),
        TensorInfo("dw", (4, 6), "float32"),
    )
    ops = (
        Op("mm_0", "mm", (1, 0), (2,), {}, 384, "forward", "layers.0"),
        Op("permute_1", "permute", (1,), (3,), {"dims": [1, 0]}, 0, "backward", "layers.0"),
        Op("mm_2", "mm", (3, 2), (4,), {}, 384, "backward", "layers.0"),
    )
    return Graph("product", tensors, ops, (Parameter("w", 0, 4),), (1,), (2, 4), batch_dims=((1, 0),))


def test_who_makes_and_who_reads() -> None:
    graph = product()
    assert [graph.producer(t) for t in range(5)] == [None, None, 0, 1, 2]
    assert graph.consumers(1) == (0, 1)
    assert graph.consumers(4) == ()
    assert graph.layer_of(0) == graph.layer_of(graph.ops[0]) == "layers.0"
    assert graph.tensors[1].numel == 32
    assert graph.tensors[1].bytes == 128
    assert graph.flops == 768
    assert graph.parameter_bytes == 96


def test_the_digest_is_of_the_content() -> None:
    assert product().digest == product().digest
    graph = product()
    changed = replace(graph, ops=(replace(graph.ops[0], flops=1), *graph.ops[1:]))
    assert changed.digest != graph.digest


def test_a_graph_survives_a_file(tmp_path: Path) -> None:
    graph = product()
    graph.save(tmp_path / "deep" / "g.json.gz")
    assert Graph.load(tmp_path / "deep" / "g.json.gz") == graph
    assert Graph.load(tmp_path / "deep" / "g.json.gz").digest == graph.digest
    first = (tmp_path / "deep" / "g.json.gz").read_bytes()
    graph.save(tmp_path / "deep" / "g.json.gz")
    assert (tmp_path / "deep" / "g.json.gz").read_bytes() == first
    assert len(list((tmp_path / "deep").iterdir())) == 1  # nothing half-written lies about


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no graph"),
        (b"not gzip", "holds no graph"),
        (gzip.compress(b"{}", mtime=0), "version None"),
        (gzip.compress(b"[1", mtime=0), "holds no graph"),
        (gzip.compress(json.dumps({"version": 1, "layers": [], "tensors": 3}).encode(), mtime=0), "not a graph"),
    ],
)
def test_files_that_hold_no_graph(tmp_path: Path, content: bytes, complaint: str) -> None:
    (tmp_path / "g").write_bytes(content)
    with pytest.raises(GraphError, match=complaint):
        Graph.load(tmp_path / "g")
    with pytest.raises(FileNotFoundError):
        Graph.load(tmp_path / "absent")


def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    product().save(tmp_path / "g")
    whole = (tmp_path / "g").read_bytes()
    for cut in range(0, len(whole), 7):
        (tmp_path / "g").write_bytes(whole[:cut])
        with pytest.raises(GraphError):
            Graph.load(tmp_path / "g")


def test_graphs_that_contradict_themselves() -> None:
    graph = product()
    with pytest.raises(GraphError, match=r"mm_2.*reads tensor 3"):
        replace(graph, ops=(graph.ops[0], graph.ops[2]))
    with pytest.raises(GraphError, match="made by permute_1"):
        replace(graph, ops=(graph.ops[0], replace(graph.ops[1], outputs=(2,)), graph.ops[2]))
    with pytest.raises(GraphError, match="out of range"):
        replace(graph, inputs=(1, 9))
    with pytest.raises(GraphError, match="float12"):
        replace(graph, tensors=(TensorInfo("w", (4, 6), "float12"), *graph.tensors[1:]))
    with pytest.raises(GraphError, match="sideways"):
        replace(graph, ops=(replace(graph.ops[0], phase="sideways"),))
    with pytest.raises(GraphError, match="nothing makes it"):
        replace(graph, ops=graph.ops[:2])


def test_dead_operations_go_and_views_of_views_are_one() -> None:
    """x -> view -> view -> identity view is x again; what nothing asks for is not kept."""
    tensors = [TensorInfo(n, s, "float32") for n, s in (("w", (4, 6)), ("x", (2, 4)), ("a", (8,)), ("b", (2, 2, 2)))]
    tensors += [
        TensorInfo("c", (2, 4), "float32"),
        TensorInfo("y", (2, 6), "float32"),
        TensorInfo("d", (2, 4), "float32"),
    ]
    ops = [
        Op("view_0", "view", (1,), (2,)),
        Op("view_1", "view", (2,), (3,)),
        Op("view_2", "view", (3,), (4,)),
        Op("relu_3", "relu", (4,), (6,)),
        Op("mm_4", "mm", (4, 0), (5,)),
    ]
    graph = assemble("g", tensors, ops, [Parameter("w", 0, None)], [1], [5], buffers=[], batch_dims=[(1, 0)])
    assert [op.kind for op in graph.ops] == ["mm"]
    assert graph.ops[0].inputs == (1, 0)
    assert graph.batch_dims == ((1, 0),)


def test_transposes_compose() -> None:
    tensors = [TensorInfo(str(i), s, "float32") for i, s in enumerate([(2, 3, 4), (4, 2, 3), (3, 4, 2), (2, 3, 4)])]
    turn = {"dims": [2, 0, 1]}
    ops = [Op(f"permute_{i}", "permute", (i,), (i + 1,), turn) for i in range(3)]
    twice = assemble("g", tensors[:3], ops[:2], [], [0], [2])
    assert [dict(op.attributes) for op in twice.ops] == [{"dims": [1, 2, 0]}]
    thrice = assemble("g", tensors, ops, [], [0], [3])
    assert thrice.ops == ()
    assert thrice.outputs == thrice.inputs


def test_flops_and_bytes_of_products() -> None:
    assert flops_of("mm", [(8, 4), (4, 6)], [(8, 6)], {}) == 2 * 8 * 4 * 6
    assert flops_of("bmm", [(3, 8, 4), (3, 4, 6)], [(3, 8, 6)], {}) == 2 * 3 * 8 * 4 * 6
    dot = {"contract": [[0, 2], [1, 0]], "batch": [[], []]}
    assert flops_of("dot_general", [(5, 7, 3), (3, 5, 2)], [(7, 2)], dot) == 2 * 7 * 2 * 5 * 3
    conv = [(2, 4, 8, 8), (6, 2, 3, 3)]  # two groups
    assert flops_of("convolution", conv, [(2, 6, 8, 8)], {"transposed": False}) == 2 * (2 * 6 * 64) * (2 * 9)
    q, k, v = (2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)
    assert flops_of("sdpa", [q, k, v], [(2, 3, 5, 6)], {}) == 2 * 2 * 3 * 5 * 7 * (4 + 6)
    graph = product()
    assert bytes_moved(graph.ops[0], graph) == 4 * (32 + 24 + 48)
    assert bytes_moved(graph.ops[1], graph) == 0


def test_a_lookup_moves_only_the_rows_it_takes() -> None:
    tensors = (
        TensorInfo("t", (1000, 4), "float32"),
        TensorInfo("i", (3,), "int64"),
        TensorInfo("o", (3, 4), "float32"),
    )
    graph = Graph("g", tensors, (Op("embedding_0", "embedding", (0, 1), (2,)),), (Parameter("t", 0, None),), (1,), (2,))
    assert bytes_moved(graph.ops[0], graph) == 2 * 48 + 24
