"""The price of plans: hand-made sums, identities, and how it moves with everything it depends on."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest

from datamodules.planning.collectives import Group, bucketed
from datamodules.planning.linkage import decisions
from datamodules.planning.placement import PARTIAL, REPLICATED, batch_places, deduce, settle, shrink
from datamodules.planning.plan import Plan, PlanError, StagePlan, batch_dims
from datamodules.planning.price import Evaluator, PartitionPricer, price, pure_data_parallel
from datamodules.planning.roofline import ADAM_PASSES, op_seconds, seconds
from datamodules.planning.topology import Link, load_topology
from tests.datamodules.planning.hand_graphs import named, perceptron

ONE, TWO = load_topology("v100_1x8"), load_topology("v100_2x8")
GRAPH = perceptron(64, (64, 256, 64, 256, 64))


def one_stage(graph, devices: int, data: int, splits=None, micro_batches: int = 1) -> Plan:
    stage = StagePlan(0, len(graph.ops) - 1, tuple(range(devices)), data, splits or {})
    return Plan(graph.digest, "v100_1x8", (stage,), micro_batches)


def two_stages(graph, micro_batches: int, schedule="1f1b") -> Plan:
    cut = [i for i, op in enumerate(graph.ops) if op.kind == "relu"][1]
    stages = (StagePlan(0, cut, (0, 1), 2), StagePlan(cut + 1, len(graph.ops) - 1, (2, 3), 2))
    return Plan(graph.digest, "v100_1x8", stages, micro_batches, schedule)


def test_the_batch_reaches_every_activation_and_gradients_are_partial() -> None:
    places = deduce(GRAPH, 8, batch_dims(GRAPH))
    gradients = {p.gradient for p in GRAPH.parameters}
    variables = {p.tensor for p in GRAPH.parameters}
    for tensor, info in enumerate(GRAPH.tensors):
        if tensor in gradients or not info.shape:
            assert places[tensor] == PARTIAL
        elif tensor in variables or info.name.startswith("wT"):
            assert places[tensor] == REPLICATED
        else:
            assert info.shape[places[tensor]] == 64
    assert all(GRAPH.tensors[t].shape[d] % 64 == 0 for t, d in batch_places(GRAPH).items())


def test_constants_that_are_not_of_the_batch_stay_whole() -> None:
    from datamodules.planning.trace import trace
    from datamodules.planning.workloads import build_step

    graph = trace(lambda: build_step("bert-tiny", batch=4), "bert")
    small = shrink(graph, 2)
    lengths = {graph.tensors[t].shape[d] // small.tensors[t].shape[d] for t, d in batch_places(graph).items()}
    assert lengths == {2}
    positions = [t for t, info in enumerate(graph.tensors) if info.shape == (16, 32)]
    assert positions
    assert all(small.tensors[t].shape == (16, 32) for t in positions)


def test_shrinking_keeps_variables_and_divides_arithmetic() -> None:
    small = shrink(GRAPH, 4)
    assert small.parameter_bytes == GRAPH.parameter_bytes
    assert small.flops * 4 == GRAPH.flops
    with pytest.raises(PlanError, match=r"dim 0 of input x \[64, 64\], cannot be cut into 3"):
        shrink(GRAPH, 3)


def test_pure_data_parallelism_by_hand() -> None:
    cost = price(GRAPH, ONE, pure_data_parallel(GRAPH, ONE), overlap=False)
    small = shrink(GRAPH, 8)
    compute = sum(op_seconds(op, small, ((-1,) * len(op.inputs), (-1,) * len(op.outputs)), 1, ONE) for op in small.ops)
    sums = sum(bucketed("all_reduce", GRAPH.tensors[p.gradient].bytes, [Group((8,))], ONE) for p in GRAPH.parameters)
    update = ADAM_PASSES * GRAPH.parameter_bytes / ONE.memory_rate
    assert cost.compute_s == pytest.approx(compute)
    assert cost.collective_s["gradient_sum"] == pytest.approx(sums)
    assert cost.update_s == pytest.approx(update)
    assert cost.step_s == pytest.approx(compute + sums + update)
    assert sum(v for k, v in cost.collective_s.items() if k != "gradient_sum") == 0
    assert cost.throughput == pytest.approx(64 / cost.step_s)


def test_column_then_row_costs_one_all_reduce_a_pass() -> None:
    splits = {named(GRAPH, "w0"): 1, named(GRAPH, "w1"): 0, named(GRAPH, "w2"): 1, named(GRAPH, "w3"): 0}
    cost = price(GRAPH, ONE, one_stage(GRAPH, 8, 1, splits), overlap=False)
    reduced = [m for m in cost.stages[0].moves if m.kind == "all_reduce"]
    assert {GRAPH.tensors[m.tensor].name for m in reduced} == {"z1", "z3", "da2"}
    assert cost.collective_s["gradient_sum"] == 0
    whole = price(GRAPH, ONE, one_stage(GRAPH, 8, 1), overlap=False)
    assert cost.memory_bytes["variables"] == pytest.approx(whole.memory_bytes["variables"] / 8)
    assert cost.compute_s < whole.compute_s


PLANS = {
    "data": lambda: one_stage(GRAPH, 8, 8),
    "columns": lambda: one_stage(GRAPH, 8, 1, {0: 1, 1: 0, 2: 1, 3: 0}),
    "both": lambda: one_stage(GRAPH, 8, 2, {0: 1, 1: 0}),
    "mixed": lambda: one_stage(GRAPH, 8, 1, {**batch_dims(GRAPH), 2: 1, 3: 0}),
    "micro": lambda: one_stage(GRAPH, 8, 2, {0: 1, 1: 0}, micro_batches=4),
    "gpipe": lambda: two_stages(GRAPH, 8, "gpipe"),
    "1f1b": lambda: two_stages(GRAPH, 8),
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("overlap", [True, False])
def test_the_parts_add_up_to_the_step(name: str, overlap: bool) -> None:
    cost = price(GRAPH, ONE, PLANS[name](), overlap)
    parts = cost.compute_s + cost.update_s + sum(cost.collective_s.values()) - cost.overlap_s + cost.bubble_s
    assert parts == pytest.approx(cost.step_s)
    assert min(cost.compute_s, cost.update_s, cost.overlap_s, cost.bubble_s) >= 0
    assert cost.overlap_s <= cost.collective_s["gradient_sum"]
    if not overlap:
        assert cost.overlap_s == 0
        assert cost.step_s >= price(GRAPH, ONE, PLANS[name](), True).step_s
    memory = dict(cost.memory_bytes)
    assert memory.pop("total") == pytest.approx(sum(memory.values()))


BETTER = {
    "bandwidth inside": {"inside": Link(ONE.inside.latency_s, 2 * ONE.inside.bytes_per_s)},
    "latency inside": {"inside": Link(ONE.inside.latency_s / 2, ONE.inside.bytes_per_s)},
    "streams": {"send_inside": Link(1e-6, 1e12)},
    "bandwidth between": {"between": Link(TWO.between.latency_s, 2 * TWO.between.bytes_per_s)},
    "arithmetic": {"flops_per_s": {"float32": 1e15}},
    "memory bandwidth": {"memory_bytes_per_s": 2 * ONE.memory_bytes_per_s},
    "efficiency": {"efficiency": 1.0},
    "memory efficiency": {"memory_efficiency": 1.0},
    "launch": {"launch_s": 0.0},
}


@pytest.mark.parametrize("change", BETTER)
@pytest.mark.parametrize("machine", [ONE, load_topology("v100_2x8").meshed(4, 2)])
def test_a_better_machine_never_takes_longer(change: str, machine) -> None:
    for make in PLANS.values():
        for overlap in (True, False):
            before = price(GRAPH, machine, make(), overlap).step_s
            after = price(GRAPH, replace(machine, **BETTER[change]), make(), overlap).step_s
            assert after <= before * (1 + 1e-12)


def test_a_larger_batch_never_takes_less_and_needs_no_less_memory() -> None:
    costs = []
    for batch in (64, 128, 256, 512):
        graph = perceptron(batch, (64, 256, 64))
        costs.append(price(graph, ONE, pure_data_parallel(graph, ONE)))
    assert all(a.step_s <= b.step_s for a, b in itertools.pairwise(costs))
    activations = [cost.memory_bytes["activations"] for cost in costs]
    assert activations == sorted(activations)
    assert all(cost.memory_bytes["variables"] == costs[0].memory_bytes["variables"] for cost in costs)


def test_arithmetic_and_traffic_are_a_roof() -> None:
    assert seconds(0, 0, "float32", ONE) == ONE.launch_s
    assert seconds(1e12, 1, "float32", ONE) == pytest.approx(ONE.launch_s + 1e12 / ONE.rate("float32"))
    assert seconds(1, 1e9, "float32", ONE) == pytest.approx(ONE.launch_s + 1e9 / ONE.memory_rate)
    assert seconds(1e12, 1, "float16", ONE) < seconds(1e12, 1, "float32", ONE)
    with pytest.raises(ValueError, match="-1"):
        seconds(-1, 0, "float32", ONE)


def test_1f1b_holds_fewer_activations_than_gpipe() -> None:
    gpipe, early = price(GRAPH, ONE, two_stages(GRAPH, 8, "gpipe")), price(GRAPH, ONE, two_stages(GRAPH, 8))
    assert [stage.held for stage in gpipe.stages] == [8, 8]
    assert [stage.held for stage in early.stages] == [2, 1]
    for a, b in zip(early.stages, gpipe.stages, strict=True):
        assert a.memory.activations < b.memory.activations
        assert a.memory.variables == b.memory.variables
    total = price(GRAPH, ONE, one_stage(GRAPH, 4, 4)).memory_bytes["variables"]
    assert sum(stage.memory.variables for stage in early.stages) == pytest.approx(total)


def test_memory_is_a_hard_limit_and_says_by_how_many_bytes() -> None:
    plan = pure_data_parallel(GRAPH, ONE)
    fits = price(GRAPH, ONE, plan)
    need = fits.memory_bytes["total"]
    tight = replace(ONE, memory_bytes=int(need) - 1000, usable_memory=1.0)
    cost = price(GRAPH, tight, plan)
    assert fits.feasible
    assert not cost.feasible
    assert cost.step_s == fits.step_s
    over = need - tight.memory_limit
    assert f"{over:,.0f} more than the {tight.memory_limit:,}" in cost.violations[0]


def test_activations_of_a_chain_by_hand() -> None:
    graph = perceptron(16, (8, 32, 8))
    memory = price(graph, ONE, one_stage(graph, 1, 1)).memory_bytes
    size = {info.name: info.bytes for info in graph.tensors}
    ends = size["x"] + size["a0"] + size["ones"] + size["loss"]  # what dw1, da1 and dw0 will need, with the gradient
    assert memory["activations"] >= ends
    assert memory["activations"] <= ends + size["z0"] + size["da1"] + size["mask1"] + size["dz1"]
    assert memory["variables"] == 2 * 8 * 32 * 4
    assert memory["optimiser"] == 2 * memory["variables"]


def test_bad_plans_are_refused_by_name() -> None:
    for plan, message in [
        (replace(one_stage(GRAPH, 8, 8), graph_digest="0" * 64), "is of graph 000000000000, not of perceptron"),
        (one_stage(GRAPH, 9, 1), "uses device 8; topology v100_1x8 has 8"),
        (one_stage(GRAPH, 8, 1, {0: 2}), r"w0 \[64, 256\] cannot be placed as 2"),
        (one_stage(GRAPH, 6, 1, {0: 0}), "6 does not divide 64"),
        (one_stage(GRAPH, 8, 1, {9: 0}), "neither variable nor input"),
        (one_stage(GRAPH, 8, 8, micro_batches=16), "cannot be cut into 128"),
        (one_stage(GRAPH, 8, 1, {10_000: 0}), "places tensor 10000"),
    ]:
        with pytest.raises(PlanError, match=message):
            price(GRAPH, ONE, plan)


@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize("batch_too", [False, True])
@pytest.mark.parametrize("overlap", [True, False])
def test_the_pricer_equals_the_price_after_any_sequence(data: int, batch_too: bool, overlap: bool) -> None:
    slots = decisions(GRAPH, 8 // data, tie=False).slots
    inputs = batch_dims(GRAPH) if batch_too else {}
    evaluator = Evaluator(GRAPH, ONE, overlap)
    pricer = PartitionPricer(GRAPH, ONE, slots, data, inputs, overlap=overlap)
    rng, depth, seen = random.Random(data), 0, [pricer.step_s]
    for _ in range(120):
        if depth and rng.random() < 0.4:
            pricer.undo()
            depth -= 1
            seen.pop()
            assert pricer.step_s == seen[-1]
        else:
            try:
                pricer.set(rng.randrange(len(slots)), int(rng.random() < 0.7))
            except PlanError:
                continue
            depth += 1
            seen.append(pricer.step_s)
        cost = evaluator.price(pricer.plan())
        assert pricer.step_s == cost.step_s
        assert pricer.memory_bytes == pytest.approx(cost.memory_bytes["total"])
    pricer.reset()
    assert pricer.step_s == seen[0]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.8, 0.99, 1.0])
def test_a_pricer_that_is_seldom_asked_says_the_same(share: float) -> None:
    slots = decisions(GRAPH, 8, tie=False).slots
    whole = PartitionPricer(GRAPH, ONE, slots, 1, batch_dims(GRAPH)).memory_bytes
    machine = replace(ONE, memory_bytes=int(share * whole), usable_memory=1.0)
    evaluator, pricer = Evaluator(GRAPH, machine), PartitionPricer(GRAPH, machine, slots, 1, batch_dims(GRAPH))
    rng, depth, fitted = random.Random(5), 0, set()
    for _ in range(300):
        if depth and rng.random() < 0.45:
            pricer.undo()
            depth -= 1
        else:
            try:
                pricer.set(rng.randrange(len(slots)), int(rng.random() < 0.8))
            except PlanError:
                continue
            depth += 1
        if rng.random() < 0.25:
            cost = evaluator.price(pricer.plan())
            assert pricer.feasible == cost.feasible
            fitted.add(cost.feasible)
        if rng.random() < 0.25:
            assert pricer.step_s == evaluator.price(pricer.plan()).step_s
    assert fitted == {0.01: {False}, 1.0: {True}}.get(share, {False, True})


def test_the_pricer_does_not_depend_on_the_order() -> None:
    slots = decisions(GRAPH, 8, tie=False).slots
    chosen = [i for i, slot in enumerate(slots) if (slot.variable, slot.dim) in {(0, 1), (1, 0), (3, 0)}]
    found = set()
    for order in (chosen, chosen[::-1], chosen[1:] + chosen[:1]):
        pricer = PartitionPricer(GRAPH, ONE, slots)
        for slot in order:
            pricer.set(slot, 1)
        found.add(pricer.step_s)
    assert len(found) == 1


def test_tied_slots_are_set_together() -> None:
    slots = decisions(GRAPH, 8, tie=False).slots
    both = PartitionPricer(GRAPH, ONE, [slots[1]], members=[(0, 2)])
    both.set(0, 1)
    alone = PartitionPricer(GRAPH, ONE, slots)
    for slot in (1, 5):
        alone.set(slot, 1)
    assert both.step_s == alone.step_s
    assert both.plan().stages[0].splits == {0: 1, 2: 1}


def test_the_pricer_refuses_what_cannot_be() -> None:
    slots = decisions(GRAPH, 8, tie=False).slots
    pricer = PartitionPricer(GRAPH, ONE, slots)
    with pytest.raises(ValueError, match="no decision"):
        pricer.undo()
    with pytest.raises(ValueError, match="there are 8 slots"):
        pricer.set(8, 1)
    with pytest.raises(ValueError, match="cannot be set to 2"):
        pricer.set(0, 2)
    pricer.set(0, 1)
    with pytest.raises(PlanError, match="split on dim 0 already"):
        pricer.set(1, 1)
    odd = perceptron(8, (8, 12, 8))
    with pytest.raises(PlanError, match=r"dim 1 of w0 \[8, 12\] cannot be split over 8 devices"):
        PartitionPricer(odd, ONE, decisions(odd, 8, tie=False).slots).set(1, 1)


def test_placements_do_not_depend_on_the_machine_and_complete_ones_win() -> None:
    splits = {0: 1, 1: 0}
    assert settle(GRAPH, 8, splits) == settle(GRAPH, 8, dict(reversed(splits.items())))
    complete = dict.fromkeys(range(len(GRAPH.tensors)), -1)
    assert settle(GRAPH, 8, splits, complete) == [-1] * len(GRAPH.tensors)
    assert json.loads(json.dumps(one_stage(GRAPH, 8, 1, splits).to_dict()))


def test_evaluators_share_work_without_changing_it() -> None:
    evaluator = Evaluator(GRAPH, ONE)
    for _ in range(2):
        for make in PLANS.values():
            assert evaluator.price(make()).step_s == price(GRAPH, ONE, make()).step_s
    assert np.isfinite(evaluator.price(PLANS["data"]()).step_s)
