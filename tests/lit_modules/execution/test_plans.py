"""Plans that can be run: which there are, where pipelines are cut, and that the cost model can price each."""

from __future__ import annotations

import itertools
import math

import pytest

from datamodules.planning.plan import PlanError
from datamodules.planning.price import Evaluator
from datamodules.planning.topology import Link, Topology
from lit_modules.execution.plans import _balanced, children, combined, executable_plans, pipeline
from lit_modules.execution.workloads import WORKLOADS, workload_of


def machine(ranks: int = 2, rate: float = 2e8) -> Topology:
    """A made-up machine of one node."""
    link = Link(1e-4, rate)
    return Topology("made_up", 1, ranks, link, link, {"float32": 2e10}, 5e9, 1 << 32, 1e-5)


@pytest.mark.parametrize("work", [[5, 1, 1, 1, 5], [1, 2, 3, 4, 5, 6], [9, 1], [1, 1, 1, 10]])
@pytest.mark.parametrize("stages", [1, 2])
def test_pipelines_are_cut_where_the_fullest_stage_is_least(work: list[int], stages: int) -> None:
    def fullest(cuts: tuple[int, ...]) -> int:
        ends = [0, *cuts, len(work)]
        return max(sum(work[a:b]) for a, b in itertools.pairwise(ends))

    found = _balanced(work, stages)
    assert len(found) == stages - 1
    assert fullest(tuple(found)) == min(map(fullest, itertools.combinations(range(1, len(work)), stages - 1)))


@pytest.mark.parametrize("name", ["mlp_tiny", "bert_tiny", "vgg_tiny"])
def test_every_plan_is_priced(name: str) -> None:
    graph = workload_of(name).graph()
    evaluator = Evaluator(graph, machine())
    plans = executable_plans(graph, 2, "made_up")
    assert {"dp", "tp", "mixed", "gpipe_2", "1f1b_4"} <= plans.keys()
    assert ("tp_attention" in plans) == (name == "bert_tiny")
    for plan in plans.values():
        cost = evaluator.price(plan)
        assert 0 < cost.step_s < 1
        assert cost.feasible
    for plan in combined(graph, "made_up").values():
        assert math.isfinite(Evaluator(graph, machine(4)).price(plan).step_s)


def test_the_cost_model_sees_the_crossover() -> None:
    """Few rows: columns beat rows, whose gradients are large. Many rows: the other way round."""
    for name, faster in (("mlp_64", "tp"), ("mlp_1024", "dp")):
        graph = workload_of(name).graph()
        plans = executable_plans(graph, 2, "made_up")
        times = {kind: Evaluator(graph, machine()).price(plans[kind]).step_s for kind in ("dp", "tp")}
        if faster == "tp":
            assert times["tp"] < times["dp"]
        else:
            small = workload_of("mlp_64").graph()
            ratio = Evaluator(small, machine()).price(executable_plans(small, 2, "made_up")["tp"]).step_s
            base = Evaluator(small, machine()).price(executable_plans(small, 2, "made_up")["dp"]).step_s
            assert times["tp"] / times["dp"] > ratio / base


def test_names_of_blocks_are_the_nets_own() -> None:
    for name in ("mlp_tiny", "bert_tiny", "vgg_tiny"):
        workload = WORKLOADS[name]
        assert list(children(workload.graph())) == [child for child, _ in workload.net().named_children()]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown workload 'resnet'; there are mlp_64"):
        workload_of("resnet")
    with pytest.raises(PlanError, match="a batch of 7 cannot be cut into 2"):
        executable_plans(WORKLOADS["mlp_tiny"].with_batch(7).graph(), 2, "any")
    with pytest.raises(PlanError, match="2 blocks and cannot be cut into 3 stages"):
        pipeline(WORKLOADS["mlp_tiny"].graph(), 3, "any", 3, "gpipe")
