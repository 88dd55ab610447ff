"""`fivefold plan-model | explain-plan | diff-plans`: what they write, that it explains itself, what they refuse."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from datamodules.planning.graph import Graph
from datamodules.planning.plan import Plan
from datamodules.planning.price import price
from datamodules.planning.topology import load_topology
from experiments.cli import app
from experiments.errors import UserError
from tests.datamodules.planning.hand_graphs import perceptron

FACTORY = """
import torch
from torch import nn

def make(width=256, batch=16):
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 8))
    inputs = {"input": torch.zeros(batch, 64)}
    return model, inputs, lambda output, input: output.square().mean()

def nothing():
    return 3
"""


def call(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words: object) -> str:
    result = call(*words)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def refused(*words: object) -> str:
    result = call(*words)
    assert isinstance(result.exception, UserError), result.output + repr(result.exception)
    return str(result.exception)


@pytest.fixture
def graph_file(tmp_path: Path) -> Path:
    perceptron(16, (64, 256, 64)).save(tmp_path / "graph.json.gz")
    return tmp_path / "graph.json.gz"


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "planned_by_a_test.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    yield "planned_by_a_test"
    sys.modules.pop("planned_by_a_test", None)


def test_a_folder_holds_all_that_explains_the_plan(graph_file: Path, tmp_path: Path) -> None:
    output = done("plan-model", graph_file, "--mesh", "2x4", "--out", tmp_path / "out")
    folder = tmp_path / "out"
    assert {f.name for f in folder.iterdir()} == {
        "plan.json",
        "graph.json.gz",
        "topology.yaml",
        "explanation.txt",
        "plan.svg",
    }
    plan, graph = Plan.load(folder / "plan.json"), Graph.load(folder / "graph.json.gz")
    machine = load_topology(folder / "topology.yaml")
    assert machine.sizes == (4, 4)
    step = price(graph, machine, plan).step_s
    assert f"step {step * 1e3:,.3f} ms" in output
    best = re.search(r"best ([\d.,]+) ms; within ([\d.]+)%", output)
    assert best
    assert float(best[1]) == pytest.approx(step * 1e3, abs=1e-3)
    again = done("explain-plan", folder / "plan.json")
    assert again.strip() in (folder / "explanation.txt").read_text()
    assert "<svg" in (folder / "plan.svg").read_text()
    assert "perceptron" in again


def test_a_model_of_the_user_s_is_traced_and_its_pictures_do_not_change(factory: str, tmp_path: Path) -> None:
    words = ("plan-model", f"{factory}:make", "--argument", "width=128", "--data", 2)
    done(*words, "--out", tmp_path / "a")
    done(*words, "--out", tmp_path / "b")
    graph = Graph.load(tmp_path / "a" / "graph.json.gz")
    assert graph.tensors[graph.parameters[0].tensor].shape == (128, 64)
    for name in ("plan.json", "plan.svg", "graph.json.gz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert Plan.load(tmp_path / "a" / "plan.json").stages[0].data == 2


@pytest.mark.parametrize("searcher", ["greedy", "beam", "anneal", "mcmc", "random"])
def test_searchers_make_plans_that_fit(graph_file: Path, tmp_path: Path, searcher: str) -> None:
    words = ("plan-model", graph_file, "--searcher", searcher, "--seconds", 4, "--data", 2, "--out", tmp_path / "out")
    output = done(*words)
    folder = tmp_path / "out"
    cost = price(
        Graph.load(folder / "graph.json.gz"), load_topology(folder / "topology.yaml"), Plan.load(folder / "plan.json")
    )
    assert cost.feasible
    assert f"best {cost.step_s * 1e3:,.3f} ms, without a proof" in output


@pytest.mark.slow
def test_the_agent_makes_a_plan(graph_file: Path, tmp_path: Path) -> None:
    done("plan-model", graph_file, "--searcher", "dqn", "--seconds", 20, "--data", 1, "--out", tmp_path / "out")
    assert Plan.load(tmp_path / "out" / "plan.json").stages[0].data == 1


def test_differences_between_plans(graph_file: Path, tmp_path: Path) -> None:
    for data in (1, 8):
        done("plan-model", graph_file, "--data", data, "--out", tmp_path / str(data))
    text = done("diff-plans", tmp_path / "1" / "plan.json", tmp_path / "8" / "plan.json")
    assert re.search(
        r"stage 0: operations 0 to \d+, devices 0-7 as 1 x 8 -> operations 0 to \d+, devices 0-7 as 8 x 1", text
    )
    steps = [json.loads((tmp_path / d / "plan.json").read_text()) for d in ("1", "8")]
    assert steps[0]["graph"] == steps[1]["graph"]


def test_a_plan_is_drawn_where_asked(graph_file: Path, tmp_path: Path) -> None:
    done("plan-model", graph_file, "--out", tmp_path / "out")
    done("explain-plan", tmp_path / "out" / "plan.json", "--draw", tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    assert "as .svg, .png or .pdf" in refused(
        "explain-plan", tmp_path / "out" / "plan.json", "--draw", tmp_path / "plan.txt"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mesh", "2"), "nodes x devices of each, such as 2x4, not '2'"),
        (("--mesh", "0x4"), "not '0x4'"),
        (("--topology", "v100_2x9"), "did you mean v100_"),
        (("--searcher", "greedi"), "nearest valid: 'greedy'"),
        (("--searcher", "greedy", "--stages", "2"), "stages are planned by --searcher optimum"),
        (("--stages", "two"), "not 'two'"),
        (("--stages", "3"), "8 devices cannot be shared out evenly to 3 stages"),
        (("--data", "3"), "cannot split a batch 3 ways"),
        (("--micro-batches", "32"), "cannot be cut into 32 micro-batches"),
    ],
)
def test_bad_requests_name_the_value_and_leave_nothing(graph_file: Path, tmp_path: Path, words, message: str) -> None:
    assert message in refused("plan-model", graph_file, *words, "--out", tmp_path / "out")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["graph.json.gz"]


def test_models_that_are_none_are_refused(factory: str, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out")
    assert "unknown workload 'bert-13'" in refused("plan-model", "bert-13", *out)
    assert "returned a int" in refused("plan-model", f"{factory}:nothing", *out)
    assert "no 'mak'" in refused("plan-model", f"{factory}:mak", *out)
    assert "NAME=VALUE, not 'width'" in refused("plan-model", f"{factory}:make", "--argument", "width", *out)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(graph_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    assert "left alone" in refused("plan-model", graph_file, "--out", tmp_path / "mine", "--force")
    done("plan-model", graph_file, "--out", tmp_path / "out")
    assert "--force replaces it" in refused("plan-model", graph_file, "--out", tmp_path / "out")
    done("plan-model", graph_file, "--out", tmp_path / "out", "--force", "--data", 8)
    assert Plan.load(tmp_path / "out" / "plan.json").stages[0].data == 8


def test_plans_without_their_graph_or_of_another_are_refused(graph_file: Path, tmp_path: Path) -> None:
    done("plan-model", graph_file, "--out", tmp_path / "out")
    plan = tmp_path / "out" / "plan.json"
    (tmp_path / "plan.json").write_bytes(plan.read_bytes())
    graph_file.rename(tmp_path / "elsewhere.json.gz")
    assert "name the plan's graph with --graph" in refused("explain-plan", tmp_path / "plan.json")
    assert "step" in done("explain-plan", tmp_path / "plan.json", "--graph", tmp_path / "elsewhere.json.gz")
    perceptron(8).save(tmp_path / "other.json.gz")
    assert "not of perceptron" in refused("explain-plan", plan, "--graph", tmp_path / "other.json.gz")
    (tmp_path / "no.json").write_text("{}")
    assert "not a plan" in refused("explain-plan", tmp_path / "no.json")
