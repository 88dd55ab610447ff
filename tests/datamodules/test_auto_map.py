"""Paper 5's data: problems made from real graphs, their proven optima, and what is said of plans."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from datamodules.auto_map import PlanData, sized
from datamodules.planning.names import is_workload, workload_card, workload_sha256
from datamodules.planning.partition_env import Pruning
from datamodules.planning.pipeline_env import Window
from datamodules.planning.price import Evaluator
from datamodules.planning.problem import take
from datamodules.planning.searchers import Budget, search
from datamodules.planning.stage_model import StagePricer, divided, rebucketed
from datamodules.planning.stages import Pipeline, load_profile
from datamodules.planning.topology import load_topology

TIGHT = {"rel": 1e-9}


@pytest.mark.parametrize("objective", ["count", "time"])
def test_the_optimum_is_what_an_unpruned_search_finds(objective: Any) -> None:
    folded = PlanData("bert-tiny", objective=objective)
    raw = PlanData("bert-tiny", objective=objective, pruning=Pruning(False, False, False))
    found = search(raw.source.problem(), "exhaustive", Budget(steps=300_000), bounded=objective == "count")
    assert folded.optimum.proven
    assert folded.optimum.cost >= found.cost - 1e-12  # tying can only cost
    if objective == "count":
        assert found.proven
        assert folded.optimum.cost == pytest.approx(found.cost)


def test_enumeration_and_the_integer_programme_agree() -> None:
    data = PlanData("t5-tiny-paper", objective="time")
    assert data.optimum.method == "exhaustive"
    programme = data.source.programme()
    assert programme.proven
    assert programme.cost == pytest.approx(data.optimum.cost, rel=1e-6)


def test_incremental_costs_are_those_of_the_whole_plan() -> None:
    data = PlanData("bert-tiny", objective="time", pruning=Pruning(tying=False))
    problem, rng = data.source.problem(), np.random.default_rng(0)
    evaluator = Evaluator(data.source.graph, data.topology)
    for _ in range(5):
        problem.reset()
        while not problem.done:
            actions = np.flatnonzero(problem.allowed())
            problem.step(int(actions[rng.integers(len(actions))]))
        assert evaluator.price(data.source.plan(problem)).step_s == pytest.approx(problem.cost(), **TIGHT)


def test_problems_of_one_source_do_not_share_decisions() -> None:
    data = PlanData("bert-tiny", objective="time")
    first, second = data.source.problem(), data.source.problem()
    before = second.cost()
    while not first.done:
        first.step(int(np.flatnonzero(first.allowed())[-1]))
    assert second.cost() == before
    first.reset()
    assert first.cost() == before


@pytest.mark.parametrize("name", ["vgg19-tiny", "bert-tiny", "t5-tiny-paper", "gpt2-tiny"])
def test_batch_dims_are_found_and_nothing_else(name: str) -> None:
    data = PlanData(name, task="data")
    problem = data.source.problem()
    assert take(problem, data.optimum.decisions)
    assert data.source.say(problem)["plan/batch_dims"] == 100
    problem.reset()
    while not problem.done:
        problem.step(0)
    assert data.source.say(problem)["plan/batch_dims"] < 100


@pytest.mark.parametrize(
    ("name", "agreed"), [("t5-tiny-paper", 100.0), ("bert-tiny", 100.0), ("vgg19-tiny", 100 * 37 / 38)]
)
def test_the_best_plans_by_the_papers_reward_are_the_printed_ones(name: str, agreed: float) -> None:
    data = PlanData(name)
    problem = data.source.problem()
    assert take(problem, data.optimum.decisions)
    assert data.source.say(problem)["plan/published"] == pytest.approx(agreed)


def test_devices_make_whole_servers_or_one() -> None:
    base = load_topology("v100_4x8")
    for devices, sizes in ((2, (2,)), (8, (8,)), (16, (8, 8)), (64, (8,) * 8), (32, (8,) * 4)):
        assert sized(base, devices).sizes == sizes
    with pytest.raises(ValueError, match="devices"):
        sized(base, 0)


def test_a_row_in_other_pieces_holds_the_same() -> None:
    layers = load_profile("bert48_v100", 64)
    fine = divided(layers, 4)
    assert len(fine) == 4 * len(layers)
    for row in (fine, rebucketed(fine, 64), rebucketed(layers, 8)):
        for name in ("forward_K", "backward_K", "parameters_K", "saved_K"):
            assert getattr(row, name).sum() == pytest.approx(getattr(layers, name).sum())
        assert set(row.activation_K) <= set(layers.activation_K)
    assert len(rebucketed(layers, 8)) == 8
    for make in (lambda: divided(layers, 0), lambda: rebucketed(layers, 1)):
        with pytest.raises(ValueError, match="got"):
            make()


@pytest.mark.parametrize("stages", [2, 3])
def test_stage_bounds_are_bounds_and_the_window_holds_its_optimum(stages: int) -> None:
    data = PlanData(
        "bert-48-profile",
        task="pipeline",
        topology=f"v100_{stages}x8",
        stages=stages,
        granularity=None,
        window=Window(1, 2),
    )
    problem, rng = data.source.problem(), np.random.default_rng(1)
    assert data.optimum.proven
    for _ in range(30):
        problem.reset()
        bounds = []
        while not problem.done:
            actions = np.flatnonzero(problem.allowed())
            problem.step(int(actions[rng.integers(len(actions))]))
            bounds.append(problem.bound())
        assert max(bounds) <= problem.cost() + 1e-12
        assert problem.cost() >= data.optimum.cost - 1e-12
    assert data.optimum.cost <= problem.reference + 1e-12


def test_what_does_not_fit_is_infinite_and_not_offered() -> None:
    layers, topology = load_profile("bert48_v100", 64), load_topology("v100_2x8")
    heavy = replace(layers, parameters_K=layers.parameters_K * 3)
    model = StagePricer(Pipeline(heavy, topology, 16))
    assert model.length((45,), (8,)) == math.inf
    assert not model.fits(0, 0, 45, 8)
    assert model.fits(0, 0, 10, 8)


def test_the_general_task_has_models_nobody_trains_on() -> None:
    options: dict[str, Any] = {
        "task": "general",
        "topology": "v100_2x8",
        "stages": 2,
        "window": Window(1, 2),
        "granularity": 32,
    }
    data, other = (PlanData("made-up-models", seed=seed, val_models=2, test_models=1, **options) for seed in (0, 1))
    assert [len(data.cases[split]) for split in ("val", "test")] == [2, 1]
    for split in ("val", "test"):  # held-out models do not depend on the seed, training ones do
        for a, b in zip(data.cases[split], other.cases[split], strict=True):
            assert a.problem.reference == b.problem.reference
    drawn = [
        PlanData("made-up-models", seed=seed, **options).environments(1)[0].reset()[0]["obs"] for seed in (0, 0, 1)
    ]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_names_and_hashes_need_no_graph() -> None:
    assert is_workload("vgg19")
    assert is_workload("bert-48-profile")
    assert not is_workload("mnist")
    assert workload_sha256("vgg19") != workload_sha256("bert-24")
    assert workload_card("made-up-models").real is False
    assert workload_card("vgg19").sha256 == workload_sha256("vgg19")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "mnist"}, "names no workload"),
        ({"name": "vgg19", "task": "fly"}, "task must be one of"),
        ({"name": "vgg19", "train_steps": 4, "collect": 8}, "must hold one collection of 8"),
        ({"name": "vgg19", "topology": "moon"}, "no topology"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PlanData(**options)
