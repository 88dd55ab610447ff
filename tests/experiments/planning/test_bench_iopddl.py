"""Searchers against the programme on our own instances: every row a solution that fits, no gap below 0, one file."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import pytest

from datamodules.planning.iopddl import Problem, evaluate
from datamodules.planning.iopddl_export import FORBIDDEN, export
from datamodules.planning.topology import load_topology
from experiments import bench_iopddl
from experiments.bench_iopddl import METHODS, Workload, Yardstick, instance, measure, run_iopddl_bench
from tests.datamodules.planning.hand_graphs import perceptron


@pytest.fixture(scope="module")
def small() -> Problem:
    source = export(perceptron(16, (64, 256, 64)), load_topology("v100_1x8"), 8)
    least = evaluate(source, [int(usages.argmin()) for usages in source.usages]).peak
    return replace(source, name="small", usage_limit=2 * least)


def test_every_searcher_is_measured_against_the_programme(small: Problem) -> None:
    rows = measure(small, 0.3, 5.0)
    assert [row.method for row in rows] == ["programme", *METHODS]
    best = rows[0]
    assert best.gap_percent == 0
    assert 0 <= best.bound_gap_percent < 1e-3
    for row in rows:
        assert (row.nodes, row.edges, row.strategies) == (len(small.sizes), len(small.edges), sum(small.sizes))
        assert row.cost_us >= best.cost_us
        assert 0 <= row.gap_percent <= row.bound_gap_percent
        assert row.gap_percent == pytest.approx(100 * (row.cost_us / best.cost_us - 1))
    assert next(row for row in rows if row.method == "annealing").gap_percent < 1


def test_the_table_is_written_with_the_hardware_named(
    small: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(bench_iopddl, "instance", lambda workload: replace(small, name=workload.model))
    rows = run_iopddl_bench(tmp_path, [Workload("a", 2.0), Workload("b", 2.0)], 0.1, 2.0)
    assert [f.name for f in tmp_path.iterdir()] == ["plan_iopddl.csv"]
    first, *lines = (tmp_path / "plan_iopddl.csv").read_text().splitlines()
    assert "one thread" in first
    found = list(csv.DictReader(lines))
    assert [(r["instance"], r["method"]) for r in found] == [(r.instance, r.method) for r in rows]
    assert {r["instance"] for r in found} == {"a", "b"}
    assert "gap to the best" in capsys.readouterr().out


def test_no_plan_and_impossible_plans_are_named_not_numbered() -> None:
    row = Yardstick("a", 1, 1, 1, 1.0, "beam", 1.0, 1, 0, math.inf, math.nan, math.nan)
    assert bench_iopddl._worth(row) == ("no plan", "", "")
    assert bench_iopddl._shown(row.gap_percent) == bench_iopddl._shown(row.cost_us) == ""
    assert bench_iopddl._worth(replace(row, cost_us=3e-6 * FORBIDDEN, gap_percent=1e9))[0] == "impossible"
    assert bench_iopddl._worth(replace(row, cost_us=1234.56, gap_percent=1.5, bound_gap_percent=2.25)) == (
        "1,234.6",
        "1.50%",
        "2.25%",
    )


def test_the_limit_of_an_instance_is_a_multiple_of_the_least_memory() -> None:
    source = instance(Workload("bert-tiny", 2.0))
    least = evaluate(source, [int(usages.argmin()) for usages in source.usages]).peak
    assert source.usage_limit == 2 * least
    assert not evaluate(source, [0] * len(source.sizes)).feasible  # everything replicated
