"""`fivefold plan-iopddl`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from datamodules.planning import iopddl
from datamodules.planning.topology import Link, Topology
from experiments.cli import app
from experiments.errors import UserError
from tests.datamodules.planning.hand_graphs import perceptron

MACHINE = Topology(
    name="two",
    nodes=1,
    devices_per_node=4,
    inside=Link(1e-6, 1e9),
    between=Link(1e-5, 1e8),
    flops_per_s={"float32": 1e12},
    memory_bytes_per_s=1e11,
    memory_bytes=10**6,
)


@pytest.fixture(scope="module")
def source() -> iopddl.Problem:
    """An instance of our own in whose best solution memory is short."""
    from datamodules.planning.iopddl_export import export
    from datamodules.planning.optimum_iopddl import strategy_optimum

    free = export(perceptron(16, (64, 256, 64)), MACHINE, 4, usage_limit=10**9)
    most = iopddl.evaluate(free, strategy_optimum(free).solution).peak
    least = iopddl.evaluate(free, [int(u.argmin()) for u in free.usages]).peak
    assert least < most
    return replace(free, usage_limit=(least + most) // 2)


@pytest.fixture
def file(source: iopddl.Problem, tmp_path: Path) -> Path:
    iopddl.write(source, tmp_path / "instance.json.gz")
    return tmp_path / "instance.json.gz"


def call(*words: object):
    return CliRunner().invoke(app, ["plan-iopddl", *map(str, words)])


def done(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def refused(*words: object) -> str:
    result = call(*words)
    assert isinstance(result.exception, UserError), result.output + repr(result.exception)
    return str(result.exception)


def number(text: str, before: str) -> int:
    found = re.search(rf"{before} ([\d,]+)", text)
    assert found, text
    return int(found[1].replace(",", ""))


def test_the_programme_proves_what_it_writes(file: Path, source: iopddl.Problem, tmp_path: Path) -> None:
    out = tmp_path / "solution.json"
    text = done(file, "--method", "programme", "--seconds", 20, "--out", out)
    solution = json.loads(out.read_text())
    assert out.read_text() == f"{solution}\n"  # the contest's form
    value = iopddl.evaluate(source, solution)
    assert value.feasible
    assert f"{source.name}: {len(source.sizes):,} nodes" in text
    assert f"{len(source.edges):,} edges, {sum(source.sizes):,} strategies" in text
    assert f"memory limit {source.usage_limit:,}" in text
    cost, bound = number(text, "  cost"), number(text, "no solution costs less than")
    assert cost == value.cost
    assert cost * (1 - 1e-6) <= bound <= cost
    assert number(text, "memory at most") == value.peak
    assert ("gap 0%: nothing is cheaper" in text) == (cost == bound)
    assert number(text, "cheapest fit\\)") >= value.cost


@pytest.mark.parametrize("method", ["annealing", "mcmc", "greedy", "beam", "random"])
def test_searchers_find_what_fits_and_say_how_far_it_may_be_from_the_best(
    file: Path, source: iopddl.Problem, tmp_path: Path, method: str
) -> None:
    out = tmp_path / "deep" / "solution.json"
    text = done(file, "--method", method, "--seconds", 1, "--out", out)
    value = iopddl.evaluate(source, json.loads(out.read_text()))
    assert value.feasible
    cost, bound = number(text, "  cost"), number(text, "no solution costs less than")
    assert cost == value.cost >= bound > 0
    if cost > bound:
        assert f"gap at most {100 * (cost - bound) / bound:.2g}%" in text


def test_exhaustive_search_proves_a_small_instance(tmp_path: Path) -> None:
    value = {
        "problem": {
            "name": "small",
            "nodes": {"intervals": [[0, 3], [1, 4]], "costs": [[5, 20], [7, 1]], "usages": [[8, 2], [4, 9]]},
            "edges": {"nodes": [[0, 1]], "costs": [[0, 1, 2, 3]]},
            "usage_limit": 12,
        }
    }
    (tmp_path / "p.json").write_text(json.dumps(value))
    text = done(tmp_path / "p.json", "--method", "exhaustive", "--seconds", 5)
    assert number(text, "  cost") == 5 + 7 + 0  # 5 + 1 + 1 is less, but 8 + 9 is more than 12
    assert "gap 0%" in text
    del value["problem"]["usage_limit"]
    (tmp_path / "p.json").write_text(json.dumps(value))
    text = done(tmp_path / "p.json", "--method", "exhaustive", "--seconds", 5)
    assert "no limit on memory" in text
    assert number(text, "  cost") == 7


def test_files_that_are_no_instance_are_refused(file: Path, source: iopddl.Problem, tmp_path: Path) -> None:
    assert f"there is no file {tmp_path / 'none.json'}" in refused(tmp_path / "none.json")
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    assert "bad.json is not JSON" in refused(bad)
    bad.write_text("{}")
    assert "key 'problem' is missing" in refused(bad)
    value = copy.deepcopy(iopddl.to_json(source))
    del value["problem"]["nodes"]["usages"]
    bad.write_text(json.dumps(value))
    assert "key 'usages' is missing" in refused(bad)
    assert "Is a directory" in refused(tmp_path)


def test_an_instance_that_cannot_fit_says_by_how_many_bytes(source: iopddl.Problem, tmp_path: Path) -> None:
    least = iopddl.evaluate(source, [int(u.argmin()) for u in source.usages]).peak
    iopddl.write(replace(source, usage_limit=least - 7), tmp_path / "tight.json")
    for method in ("programme", "annealing"):
        text = refused(tmp_path / "tight.json", "--method", method, "--out", tmp_path / "out.json")
        assert f"no solution fits: with the smallest strategy of each node {least:,} bytes" in text
        assert f", 7 more than the limit of {least - 7:,}" in text
    assert not (tmp_path / "out.json").exists()


def test_bad_requests_are_refused_before_anything_is_searched(file: Path, tmp_path: Path) -> None:
    assert "no method 'anealing' (nearest valid: 'annealing')" in refused(file, "--method", "anealing")
    assert "is a folder" in refused(file, "--out", tmp_path)
    out = tmp_path / "thesis.json"
    out.write_text("years")
    assert "is there already: --force replaces it" in refused(file, "--out", out)
    assert out.read_text() == "years"
    done(file, "--method", "greedy", "--out", out, "--force")
    assert isinstance(json.loads(out.read_text()), list)
    assert call(file, "--seconds", 0).exit_code == 2


def test_a_search_that_finishes_no_plan_says_so(tmp_path: Path) -> None:
    import numpy as np

    nodes = 3000
    costs, none = np.arange(9), np.zeros(9, dtype=np.int64)
    long = iopddl.Problem("long", ((0, 0),) * nodes, (costs,) * nodes, (none,) * nodes, ())
    iopddl.write(long, tmp_path / "long.json")
    message = refused(tmp_path / "long.json", "--method", "beam", "--seconds", 0.2)
    assert "beam finished no plan of 3,000 decisions within 0.2 s; allow more --seconds" in message
