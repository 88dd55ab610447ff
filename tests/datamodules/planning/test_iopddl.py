"""The contest's format: read, written, refused and priced, against sums written out and against every solution."""

from __future__ import annotations

import copy
import gzip
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.planning import iopddl
from datamodules.planning.graph import Graph, Op, Parameter, TensorInfo
from datamodules.planning.iopddl import Edge, IopddlError, Problem, evaluate
from datamodules.planning.iopddl_export import export, intervals
from datamodules.planning.sharding_space import SOURCE, sharding_space
from datamodules.planning.topology import Link, Topology

# five nodes in the contest's form, with an edge of three nodes and a node that never uses memory
SMALL: dict[str, Any] = {
    "problem": {
        "name": "small",
        "nodes": {
            "intervals": [[0, 3], [1, 4], [2, 2], [3, 6], [5, 9]],
            "costs": [[10, 20], [5, 7, 9], [100], [0, 4], [3, 1]],
            "usages": [[8, 2], [4, 3, 2], [50], [6, 1], [9, 7]],
        },
        "edges": {
            "nodes": [[0, 1], [1, 3], [0, 3, 4]],
            "costs": [[0, 1, 2, 3, 4, 5], [9, 8, 7, 6, 5, 4], [1, 2, 3, 4, 5, 6, 7, 8]],
        },
        "usage_limit": 11,
    }
}


def test_costs_are_the_sums_of_nodes_and_edges() -> None:
    problem = iopddl.from_json(SMALL)
    found = evaluate(problem, [1, 2, 0, 1, 0])
    # nodes 20 + 9 + 100 + 4 + 3; edges: [1, 2] of 2 x 3 is 5, [2, 1] of 3 x 2 is 4, [1, 1, 0] of 2 x 2 x 2 is 7
    assert found.cost == 136 + 5 + 4 + 7
    # memory over time: 2, 4, 4, 2 + 1, 1, 1 + 9, 9, 9, 9
    assert (found.peak, found.peak_time, found.feasible) == (10, 5, True)
    assert evaluate(problem, [0, 0, 0, 0, 0]).peak == 15  # 6 + 9 at time 5, against 8 + 4 before and 4 + 6 between
    assert not evaluate(problem, [0, 0, 0, 0, 0]).feasible


def _slow(problem: Problem, solution: tuple[int, ...]) -> tuple[int, int]:
    """Cost and peak by the definition: a sum over all, and memory at every time."""
    cost = sum(int(c[s]) for c, s in zip(problem.costs, solution, strict=True))
    for edge in problem.edges:
        table = edge.costs.reshape([problem.sizes[n] for n in edge.nodes])
        cost += int(table[tuple(solution[n] for n in edge.nodes)])
    end = max(last for _, last in problem.intervals)
    held = [
        sum(int(u[s]) for (a, b), u, s in zip(problem.intervals, problem.usages, solution, strict=True) if a <= t < b)
        for t in range(end)
    ]
    return cost, max(held)


def test_every_solution_has_the_cost_of_the_definition() -> None:
    problem = iopddl.from_json(SMALL)
    for solution in itertools.product(*(range(k) for k in problem.sizes)):
        found = evaluate(problem, solution)
        assert (found.cost, found.peak) == _slow(problem, solution)
        assert found.feasible == (found.peak <= 11)


def test_sums_beyond_64_bits_are_exact() -> None:
    huge = np.array([2**62], dtype=np.int64)
    problem = Problem("huge", ((0, 1),) * 9, (huge,) * 9, (huge,) * 9, (), None)
    assert evaluate(problem, [0] * 9).cost == 9 * 2**62
    assert evaluate(problem, [0] * 9).peak == 9 * 2**62


def test_a_node_may_meet_itself() -> None:
    one = np.array([0, 0], dtype=np.int64)
    problem = Problem("loop", ((0, 1),), (one,), (one,), (Edge((0, 0), np.array([1, 2, 3, 4])),))
    assert [evaluate(problem, [s]).cost for s in (0, 1)] == [1, 4]


@pytest.mark.parametrize("name", ["p.json", "p.json.gz"])
def test_problems_survive_a_file(tmp_path: Path, name: str) -> None:
    problem = iopddl.from_json(SMALL)
    iopddl.write(problem, tmp_path / "deep" / name)
    again = iopddl.read(tmp_path / "deep" / name)
    assert iopddl.to_json(again) == iopddl.to_json(problem) == SMALL
    assert (again.usage_limit, again.name) == (11, "small")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == [name]


def test_without_a_limit_everything_fits() -> None:
    value = copy.deepcopy(SMALL)
    del value["problem"]["usage_limit"]
    problem = iopddl.from_json(value)
    assert problem.usage_limit is None
    assert evaluate(problem, [0, 0, 0, 0, 0]).feasible
    assert "usage_limit" not in iopddl.to_json(problem)["problem"]


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        inner: Any = value["problem"]
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to

    return change


def _drop(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda value: value["problem"].pop(key)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (_drop("nodes"), "'nodes' is missing"),
        (_drop("edges"), "'edges' is missing"),
        (_set("nodes", "costs", 1, to=[1, 2]), "node 1 has 2 costs and 3 usages"),
        (_set("nodes", "costs", 1, to=[]), "node 1 has 0 costs"),
        (_set("nodes", "costs", to=[[1]]), r"of \[1, 5\] nodes"),
        (_set("nodes", "costs", 0, to=[1.5, 2]), "1.5 is not a whole number"),
        (_set("nodes", "costs", 0, to=[2**63, 2]), "is not a whole number of 64 bits"),
        (_set("nodes", "usages", 2, to=[-1]), "node 2 uses -1"),
        (_set("nodes", "intervals", 0, to=[3, 1]), r"alive over \[3, 1\]"),
        (_set("nodes", "intervals", 0, to=[3]), r"alive over \[3\]"),
        (_set("edges", "nodes", 0, to=[0, 9]), r"nodes \[0, 9\]; there are nodes 0 to 4"),
        (_set("edges", "costs", 0, to=[1, 2]), "2 costs, wanted 6"),
        (_set("edges", "costs", to=[[1]]), "not a problem"),
        (_set("usage_limit", to=-5), "usage_limit is -5"),
        (_set("usage_limit", to="much"), "'much' is not a whole number"),
    ],
)
def test_what_is_no_problem_is_refused(tmp_path: Path, change: Callable[..., None], complaint: str) -> None:
    value = copy.deepcopy(SMALL)
    change(value)
    (tmp_path / "p.json").write_text(json.dumps(value))
    with pytest.raises(IopddlError, match=complaint):
        iopddl.read(tmp_path / "p.json")


@pytest.mark.parametrize("content", [b"", b"{", gzip.compress(b"{}", mtime=0)[:9], b"[1, 2]", b"3"])
def test_what_is_no_file_of_this_kind_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "p").write_bytes(content)
    with pytest.raises(IopddlError):
        iopddl.read(tmp_path / "p")


def test_solutions_that_are_none() -> None:
    problem = iopddl.from_json(SMALL)
    with pytest.raises(IopddlError, match="4 strategies for 5 nodes"):
        evaluate(problem, [0, 0, 0, 0])
    with pytest.raises(IopddlError, match="node 1 has no strategy 3; it has 3"):
        evaluate(problem, [0, 3, 0, 0, 0])
    with pytest.raises(IopddlError, match="node 0 has no strategy -1"):
        evaluate(problem, [-1, 0, 0, 0, 0])


MACHINE = Topology(
    name="two",
    nodes=1,
    devices_per_node=4,
    inside=Link(1e-6, 1e9),
    between=Link(1e-5, 1e8),
    flops_per_s={"float32": 1e12},
    memory_bytes_per_s=1e11,
    memory_bytes=1000,
)


def layer() -> Graph:
    """y = relu(view(x) w), dw = x' dy; the view hides that x is read late."""
    sizes = [
        ("w", (8, 4)),
        ("x", (4, 2, 8)),
        ("x2", (8, 8)),
        ("z", (8, 4)),
        ("y", (8, 4)),
        ("xt", (8, 8)),
        ("dw", (8, 4)),
    ]
    ops = (
        Op("view_0", "view", (1,), (2,)),
        Op("mm_1", "mm", (2, 0), (3,), {}, 512),
        Op("relu_2", "relu", (3,), (4,), {}, 32),
        Op("permute_3", "permute", (2,), (5,), {"dims": [1, 0]}, 0, "backward"),
        Op("mm_4", "mm", (5, 4), (6,), {}, 512, "backward"),
    )
    tensors = tuple(TensorInfo(n, s, "float32") for n, s in sizes)
    return Graph("layer", tensors, ops, (Parameter("w", 0, 6),), (1,), (4, 6))


def test_a_graph_becomes_a_problem_whose_costs_are_those_of_its_space() -> None:
    graph = layer()
    problem = export(graph, MACHINE, 4)
    space = sharding_space(graph, 4)
    assert len(problem.costs) == len(space.nodes) == 2 + len(graph.ops)
    assert problem.sizes == tuple(space.sizes.tolist())
    assert problem.usage_limit == 900
    whole = [0] * len(problem.sizes)  # everything replicated: no move costs anything
    assert all(edge.costs[0] == 0 for edge in problem.edges)
    rows = 8 * 8 + 8 * 4 + 8 * 4  # of each product: bytes bind it, at 1e11 bytes/s
    assert evaluate(problem, whole).cost == round((2 * rows + 2 * 32) * 4 / 1e11 * 1e12)


def test_splitting_costs_what_it_moves() -> None:
    problem = export(layer(), MACHINE, 4)
    space = sharding_space(layer(), 4)
    weight = next(i for i, node in enumerate(space.nodes) if node.name == "w")
    edge = next(e for e in problem.edges if e.nodes[0] == weight)
    split = next(k for k, row in enumerate(space.nodes[weight].strategies.tolist()) if row == [0])
    product = space.nodes[edge.nodes[1]]
    whole = next(k for k, row in enumerate(product.strategies.tolist()) if row[1] == -1)
    found = edge.costs.reshape(problem.sizes[weight], problem.sizes[edge.nodes[1]])[split, whole]
    assert found == pytest.approx((2 * 1e-6 + 0.75 * 128 / 1e9) * 1e12)  # an all-gather by a tree of two storeys


def test_more_devices_use_less_memory_and_views_none() -> None:
    graph = layer()
    two, four = (export(graph, MACHINE, devices) for devices in (2, 4))
    assert min(four.usages[0]) == 32
    assert min(two.usages[0]) == 64
    space = sharding_space(graph, 4)
    views = [
        i for i, node in enumerate(space.nodes) if node.op != SOURCE and graph.ops[node.op].kind in ("view", "permute")
    ]
    assert len(views) == 2
    assert all((four.usages[i] == 0).all() for i in views)


def test_what_is_read_through_a_view_is_alive_until_then() -> None:
    ops = (
        Op("relu_0", "relu", (0,), (1,)),
        Op("view_1", "view", (1,), (2,)),
        Op("exp_2", "exp", (0,), (3,)),
        Op("add_3", "add", (2, 3), (4,)),
    )
    shapes = [(4, 4), (4, 4), (16,), (4, 4), (16,)]
    tensors = tuple(TensorInfo(str(i), s, "float32") for i, s in enumerate(shapes))
    space = sharding_space(Graph("g", tensors, ops, (), (0,), (4,)), 2)
    alive = {node.name: interval for node, interval in zip(space.nodes, intervals(space), strict=True)}
    assert alive == {"0": (0, 4), "relu_0": (0, 4), "view_1": (1, 4), "exp_2": (2, 4), "add_3": (3, 4)}


def test_machines_that_are_too_small() -> None:
    with pytest.raises(ValueError, match="has 4 devices, asked for 8"):
        export(layer(), MACHINE, 8)
