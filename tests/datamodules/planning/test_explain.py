"""Explanations: their numbers are the price's, their blocks are the model's, differences are differences."""

from __future__ import annotations

from dataclasses import replace

import pytest

from datamodules.planning.explain import block_of, blocks, causes, differences, explain, word
from datamodules.planning.plan import Plan, StagePlan, batch_dims, pure_data_parallel
from datamodules.planning.price import Evaluator, price
from datamodules.planning.topology import load_topology
from tests.datamodules.planning.hand_graphs import perceptron

ONE = load_topology("v100_1x8")
GRAPH = perceptron(64, (64, 256, 64, 256, 64))


def columns() -> Plan:
    stage = StagePlan(0, len(GRAPH.ops) - 1, tuple(range(8)), 1, {**batch_dims(GRAPH), 0: 1, 1: 0})
    return Plan(GRAPH.digest, ONE.name, (stage,))


def staged() -> Plan:
    cut = [i for i, op in enumerate(GRAPH.ops) if op.kind == "relu"][1]
    stages = (StagePlan(0, cut, (0, 1), 2), StagePlan(cut + 1, len(GRAPH.ops) - 1, (2, 3), 2))
    return Plan(GRAPH.digest, ONE.name, stages, 4, "1f1b")


@pytest.mark.parametrize("make", [columns, staged, lambda: pure_data_parallel(GRAPH, ONE)])
def test_causes_add_up_and_blocks_hold_all_the_time(make) -> None:
    plan = make()
    cost = price(GRAPH, ONE, plan)
    assert sum(seconds for _, seconds, _ in causes(cost)) == pytest.approx(cost.step_s)
    found = blocks(GRAPH, ONE, plan)
    spent = sum(s.forward_s + s.backward_s for s in cost.stages) * plan.micro_batches
    assert sum(block.seconds for block in found) == pytest.approx(spent)
    inside = sum(v for s in cost.stages for k, v in s.collective_s.items() if k not in ("gradient_sum", "tied_sum"))
    assert sum(block.moved for block in found) == pytest.approx(inside)
    assert sum(len(block.variables) * block.count for block in found) == len(GRAPH.parameters)


def test_text_names_what_is_split_and_what_it_costs() -> None:
    text = explain(GRAPH, ONE, columns())
    cost = price(GRAPH, ONE, columns())
    assert "w0 [64, 256]: dim 1 in 8 (256 -> 32)" in text
    assert f"step {cost.step_s * 1e3:,.3f} ms" in text
    plain = price(GRAPH, ONE, pure_data_parallel(GRAPH, ONE)).step_s
    assert f"pure data parallelism takes {plain * 1e3:,.3f} ms: this plan is {plain / cost.step_s:.2f} times" in text
    assert "gradient_sum" in text
    assert "stages" not in text.splitlines()[2]
    assert "2 stages, 1f1b, 4 micro-batches" in explain(GRAPH, ONE, staged())


def test_text_says_what_does_not_fit_and_which_rules_are_missing() -> None:
    small = replace(ONE, memory_bytes=1000)
    assert "DOES NOT FIT: stage 0" in explain(GRAPH, small, columns())
    odd = replace(GRAPH, ops=tuple(replace(op, kind="warp") if op.kind == "relu" else op for op in GRAPH.ops))
    with pytest.warns(UserWarning, match="warp"):
        text = explain(odd, ONE, replace(columns(), graph_digest=odd.digest))
    assert "no sharding rule for operations of kind 'warp'" in text


def test_alike_neighbours_are_folded() -> None:
    layers = [replace(op, layer=op.layer.replace("layer", "encoder.") if op.layer else "") for op in GRAPH.ops]
    graph = replace(GRAPH, ops=tuple(layers))
    stage = StagePlan(0, len(graph.ops) - 1, tuple(range(8)), 8)
    found = blocks(graph, ONE, Plan(graph.digest, ONE.name, (stage,)), Evaluator(graph, ONE))
    assert any(block.name.startswith("encoder.0") for block in found)
    assert block_of("encoder.layer.3.attention.q") == "encoder.layer.3"
    assert block_of("features.conv1_1.inner") == "features.conv1_1"
    assert block_of("") == ""


def test_words() -> None:
    assert word(-1, (8,), 4) == "whole"
    assert word(-2, (8,), 4) == "partial sums"
    assert word(0, (8, 4), 4) == "dim 0 in 4 (8 -> 2)"
    assert word(0, (8, 4), 1) == "whole"


def test_differences_of_plans() -> None:
    same = differences(GRAPH, ONE, columns(), columns())
    assert "every variable and input lies alike" in same
    text = differences(GRAPH, ONE, pure_data_parallel(GRAPH, ONE), columns())
    assert "stage 0: operations 0 to" in text
    assert "w0: whole -> dim 1 in 8 (256 -> 32)" in text
    assert "w2" not in text
    a, b = price(GRAPH, ONE, pure_data_parallel(GRAPH, ONE)).step_s, price(GRAPH, ONE, columns()).step_s
    assert f"{(b - a) * 1e3:,.3f} ms" in text.splitlines()[1]
    assert "schedule: gpipe -> 1f1b" in differences(GRAPH, ONE, columns(), staged())
