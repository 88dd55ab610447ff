"""Optima: equal to going through everything, never above any plan of their space, bounds that hold, memory that is kept."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import numpy as np
import pytest

from datamodules.planning.linkage import decisions
from datamodules.planning.optimum import NoPlan, paper_optimum, sharding_optimum, value_of
from datamodules.planning.optimum_joint import joint_optimum
from datamodules.planning.plan import PlanError, StagePlan, batch_dims
from datamodules.planning.price import Evaluator, PartitionPricer, price, pure_data_parallel
from datamodules.planning.program import candidates, formulate
from datamodules.planning.topology import load_topology
from tests.datamodules.planning.hand_graphs import perceptron

ONE, TWO = load_topology("v100_1x8"), load_topology("v100_2x8")
SMALL = perceptron(16, (8, 32, 8))
DEEP = perceptron(64, (1024, 4096, 1024, 4096, 1024))
CASES = [(graph, machine, overlap) for graph in (SMALL, DEEP) for machine in (ONE, TWO) for overlap in (True, False)]


@pytest.mark.parametrize(("graph", "machine", "overlap"), CASES)
def test_the_value_is_the_price_of_the_plan_and_the_bound_is_not_above(graph, machine, overlap: bool) -> None:
    found = sharding_optimum(graph, machine, overlap=overlap)
    assert price(graph, machine, found.plan, overlap).step_s == pytest.approx(found.value, rel=1e-12)
    assert found.bound <= found.value * (1 + 1e-9)
    assert found.proven
    assert found.certificate
    assert price(graph, machine, found.plan, overlap).feasible


@pytest.mark.parametrize(("graph", "machine", "overlap"), CASES)
def test_no_drawn_placement_is_below_the_bound(graph, machine, overlap: bool) -> None:
    found = sharding_optimum(graph, machine, overlap=overlap)
    stage = StagePlan(0, len(graph.ops) - 1, tuple(range(machine.devices)))
    tables = Evaluator(graph, machine, overlap).tables(stage, tuple(range(len(graph.ops))), 1)
    options, rng = candidates(tables), random.Random(0)
    best = np.array([found.plan.stages[0].placements[t] for t in range(len(graph.tensors))], dtype=np.int8)
    for _ in range(200):
        place = best.copy()
        for tensor in rng.sample(sorted(options), k=rng.randint(1, len(options))):
            place[tensor] = rng.choice(options[tensor])
        assert value_of(tables, place, machine, 1, overlap) >= found.bound * (1 - 1e-9)


def test_it_is_the_minimum_over_all_placements_of_a_tiny_graph() -> None:
    graph, machine = perceptron(4, (4, 4)), ONE.meshed(1, 2)
    stage = StagePlan(0, len(graph.ops) - 1, (0, 1))
    tables = Evaluator(graph, machine).tables(stage, tuple(range(len(graph.ops))), 1)
    options = candidates(tables)
    tensors, least = sorted(options), float("inf")
    place = np.full(len(graph.tensors), -1, dtype=np.int8)
    for chosen in itertools.product(*(options[t] for t in tensors)):
        place[tensors] = chosen
        least = min(least, value_of(tables, place, machine, 1, True))
    assert sharding_optimum(graph, machine).value == pytest.approx(least, rel=1e-9)


def test_it_is_no_worse_than_any_plan_of_the_same_mesh() -> None:
    for machine in (ONE, TWO):
        best = sharding_optimum(DEEP, machine).value
        for splits in ({}, batch_dims(DEEP), {0: 1, 1: 0, 2: 1, 3: 0}, {**batch_dims(DEEP), 0: 1, 1: 0}):
            stage = StagePlan(0, len(DEEP.ops) - 1, tuple(range(machine.devices)), 1, splits)
            plan = replace(pure_data_parallel(DEEP, machine), stages=(stage,))
            assert best <= price(DEEP, machine, plan).step_s * (1 + 1e-6)


def test_large_variables_and_a_small_batch_are_split_by_columns_and_rows() -> None:
    splits = sharding_optimum(DEEP, ONE).plan.stages[0].splits
    assert [splits[p.tensor] for p in DEEP.parameters][::2] == [1, 1]
    assert [splits[p.tensor] for p in DEEP.parameters][1::2] == [0, 0]


def test_without_variables_to_choose_the_programme_only_evaluates() -> None:
    stage = StagePlan(0, len(SMALL.ops) - 1, tuple(range(8)))
    tables = Evaluator(SMALL, ONE).tables(stage, tuple(range(len(SMALL.ops))), 1)
    whole = dict.fromkeys(range(len(SMALL.tensors)), -1)
    found = sharding_optimum(SMALL, ONE, fixed=whole)
    assert found.value == pytest.approx(value_of(tables, np.full(len(whole), -1, dtype=np.int8), ONE, 1, True))
    assert formulate(tables, fixed=whole).place[0] == {-1: formulate(tables, fixed=whole).place[0][-1]}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("batch_too", [False, True])
@pytest.mark.parametrize("machine", [ONE, TWO])
def test_the_paper_s_space_has_the_optimum_that_going_through_it_finds(machine, batch_too: bool, overlap: bool) -> None:
    decided = decisions(DEEP, machine.devices, tie=False)
    inputs = batch_dims(DEEP) if batch_too else {}
    pricer = PartitionPricer(DEEP, machine, decided.slots, 1, inputs, overlap=overlap)
    least = float("inf")
    for chosen in itertools.product([0, 1], repeat=len(decided.families)):
        if any(chosen[a] and chosen[b] for a, b in decided.exclusions):
            continue
        on = [slot for family, value in zip(decided.families, chosen, strict=True) if value for slot in family]
        for slot in on:
            pricer.set(slot, 1)
        least = min(least, pricer.step_s)
        for _ in on:
            pricer.undo()
    found = paper_optimum(DEEP, machine, decided, inputs=inputs, overlap=overlap)
    assert found.value == pytest.approx(least, rel=1e-9)
    assert found.proven
    assert price(DEEP, machine, found.plan, overlap).step_s == pytest.approx(found.value)


def test_memory_is_kept_where_that_costs_time() -> None:
    graph = perceptron(4096, (512, 2048, 512))
    free = sharding_optimum(graph, ONE)
    need = price(graph, ONE, free.plan).memory_bytes["total"]
    tight = replace(ONE, memory_bytes=int(0.8 * need), usable_memory=1.0)
    kept = sharding_optimum(graph, tight)
    assert price(graph, tight, kept.plan).feasible
    assert kept.value >= free.value
    assert "memory constraint" in kept.certificate


def test_a_model_that_cannot_fit_says_by_how_many_bytes() -> None:
    small = replace(ONE, memory_bytes=10_000_000, usable_memory=1.0)
    least = 4 * DEEP.parameter_bytes / 8
    with pytest.raises(NoPlan, match=f"{least - 10_000_000:,.0f} too many"):
        sharding_optimum(DEEP, small)


def test_all_meshes_are_tried_and_the_best_is_kept() -> None:
    found = joint_optimum(DEEP, TWO, stages=[1, 2], micro_batches=2, granularity=8)
    assert {(row.stages, row.data) for row in found.tried} >= {(1, 1), (1, 16), (2, 1), (2, 8)}
    assert found.best.value == min(row.value for row in found.tried)
    assert found.bound <= found.best.value
    assert price(DEEP, TWO, found.best.plan).step_s == pytest.approx(found.best.value)
    plain = price(DEEP, TWO, pure_data_parallel(DEEP, TWO, 2)).step_s
    assert found.best.value <= plain * (1 + 1e-9)


def test_joint_search_says_why_nothing_fits() -> None:
    with pytest.raises(NoPlan, match="does not fit on topology"):
        joint_optimum(DEEP, replace(ONE, memory_bytes=10_000_000), data=[1])
    with pytest.raises(PlanError, match="shared out evenly to 3"):
        joint_optimum(DEEP, ONE, stages=[3])
    with pytest.raises(NoPlan, match="cannot be cut into 5 micro-batches"):
        joint_optimum(DEEP, ONE, micro_batches=5)
