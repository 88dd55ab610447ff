"""The engines' terms add up, never shorten a step, and without them a prediction is the cost model's own price."""

from __future__ import annotations

from dataclasses import replace

import pytest

from datamodules.planning.price import Evaluator
from lit_modules.execution.engine import TERMS, Engine, predict, work_of
from lit_modules.execution.plans import combined, executable_plans
from lit_modules.execution.workloads import WORKLOADS
from tests.lit_modules.execution.test_plans import machine

NAMES = ("mlp_tiny", "bert_tiny", "vgg_tiny")
SOME = Engine(dict.fromkeys(TERMS, 1e-3), 0.25)


def _plans(name: str) -> tuple[Evaluator, dict]:
    graph = WORKLOADS[name].graph()
    return Evaluator(graph, machine()), executable_plans(graph, 2, "any")


@pytest.mark.parametrize("name", NAMES)
def test_without_an_engine_a_step_is_as_the_cost_model_prices_it(name: str) -> None:
    evaluator, plans = _plans(name)
    for plan in plans.values():
        found = predict(evaluator, plan, WORKLOADS[name].net(), None)
        assert found.step_s == evaluator.price(plan).step_s
        assert sum(found.parts.values()) == pytest.approx(found.step_s, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", [Engine(), SOME], ids=["free", "dear"])
def test_parts_add_up_to_the_step(name: str, engine: Engine) -> None:
    evaluator, plans = _plans(name)
    for plan in plans.values():
        found = predict(evaluator, plan, WORKLOADS[name].net(), engine)
        assert sum(found.parts.values()) == pytest.approx(found.step_s, rel=1e-9)
        assert found.parts.get("bubble", 0.0) >= -1e-12


def test_a_free_engine_only_moves_gradients_where_nothing_is_split() -> None:
    workload, fast = WORKLOADS["bert_tiny"], replace(machine(), memory_bytes_per_s=1e18)
    evaluator, plans = Evaluator(workload.graph(), fast), executable_plans(workload.graph(), 2, "any")
    for kind in ("dp", "gpipe_2", "1f1b_4"):
        found = predict(evaluator, plans[kind], workload.net(), Engine())
        assert found.step_s == pytest.approx(evaluator.price(plans[kind]).step_s, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_more_of_a_term_never_makes_a_step_shorter(name: str) -> None:
    evaluator, plans = _plans(name)
    dearer = [replace(SOME, seconds={**SOME.seconds, term: 5e-3}) for term in TERMS]
    dearer.append(replace(SOME, overlap=0.0))
    for plan in plans.values():
        base = predict(evaluator, plan, WORKLOADS[name].net(), SOME).step_s
        for engine in dearer:
            assert predict(evaluator, plan, WORKLOADS[name].net(), engine).step_s >= base * (1 - 1e-12)


def test_a_term_adds_its_seconds_as_often_as_it_comes() -> None:
    """Two blocks of two Linears; data parallelism wraps once; a pipeline's critical path is M + S - 1 chunks."""
    evaluator, plans = _plans("mlp_tiny")
    expected = {
        ("dp", "reducer"): 1,
        ("dp", "styled"): 0,
        ("tp", "styled"): 4,
        ("tp", "moved"): 3,  # no gradient of the first input is wanted
        ("tp", "reducer"): 0,
        ("mixed", "moved"): 7,
        ("gpipe_2", "chunk"): 3,
        ("gpipe_4", "chunk"): 5,
    }
    net = WORKLOADS["mlp_tiny"].net()
    for (kind, term), count in expected.items():
        free, dear = (predict(evaluator, plans[kind], net, Engine({term: s})).step_s for s in (0.0, 10.0))
        assert (dear - free) / 10 == pytest.approx(count, abs=1e-3), (kind, term)


def test_gradients_are_added_up_once_for_each_micro_batch_after_the_first() -> None:
    evaluator, plans = _plans("mlp_tiny")
    net, rate = WORKLOADS["mlp_tiny"].net(), machine().memory_rate
    held = 4.0 * (8 * 16 + 16 + 16 * 8 + 8)  # one block's bytes
    parts = {kind: predict(evaluator, plans[kind], net, Engine()).parts for kind in ("dp", "gpipe_2", "gpipe_4")}
    assert parts["gpipe_2"]["accumulate"] == pytest.approx((3 * 1 + 2) * held / rate)
    assert parts["gpipe_4"]["accumulate"] == pytest.approx((3 * 3 + 2) * held / rate)
    assert parts["dp"]["copies"] == pytest.approx(4 * 2 * held / rate)
    assert "accumulate" not in parts["dp"]


def test_what_does_not_hide_is_added() -> None:
    evaluator, plans = _plans("mlp_tiny")
    net, hidden = WORKLOADS["mlp_tiny"].net(), evaluator.price(plans["dp"]).overlap_s
    assert hidden > 0
    steps = [predict(evaluator, plans["dp"], net, Engine({}, share)).step_s for share in (1.0, 0.5, 0.0)]
    assert steps[1] - steps[0] == pytest.approx(hidden / 2)
    assert steps[2] - steps[0] == pytest.approx(hidden)


def test_stages_of_columns_and_micro_batches_count_both() -> None:
    workload = WORKLOADS["bert_tiny"]
    graph, net = workload.graph(), workload.net()
    plan, whole = combined(graph, "any")["1f1b_tp"], executable_plans(graph, 2, "any")["tp"]
    stages = zip(plan.stages, Evaluator(graph, machine(4)).price(plan).stages, strict=True)
    works = [work_of(graph, plan, stage, priced, net) for stage, priced in stages]
    alone = work_of(graph, whole, whole.stages[0], Evaluator(graph, machine()).price(whole).stages[0], net)
    for term in ("styled", "moved"):
        assert sum(w.counts[term] for w in works) == plan.micro_batches * alone.counts[term]
    assert all(w.counts["chunk"] == plan.micro_batches for w in works)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seconds": {"styld": 1.0}}, "styled"),
        ({"seconds": {"styled": -1.0}}, "0 or more seconds"),
        ({"seconds": {"styled": float("nan")}}, "0 or more seconds"),
        ({"overlap": 1.5}, "0 to 1"),
    ],
)
def test_impossible_engines_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Engine(**arguments)
