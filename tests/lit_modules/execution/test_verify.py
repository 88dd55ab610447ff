"""A step under a plan is the step of one process: loss, gradients and new weights, for every kind of plan, on real ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from lit_modules.execution.plans import combined, executable_plans
from lit_modules.execution.verify import Case, Taken, alone, distance, together
from lit_modules.execution.workloads import WORKLOADS

NAMES = ("mlp_tiny", "bert_tiny", "vgg_tiny")
KINDS = ("dp", "fsdp", "tp", "mixed", "gpipe_2", "1f1b_2", "gpipe_4", "1f1b_4")
TOLERANCE = 1e-11  # float64 sums in another order, after two steps


def _cases(name: str) -> list[Case]:
    workload = WORKLOADS[name]
    plans = executable_plans(workload.graph(), 2, "any")
    return [*(Case(kind, workload, plan) for kind, plan in plans.items()), Case("fsdp", workload, plans["dp"], "fsdp")]


@pytest.fixture(scope="module")
def two_ranks() -> dict[tuple[str, str], Taken]:
    """All plans of all nets in one pair of processes."""
    cases = [case for name in NAMES for case in _cases(name)]
    return {(c.workload.name, c.name): taken for c, taken in zip(cases, together(cases), strict=True)}


@cache
def _reference(name: str) -> Taken:
    return alone(WORKLOADS[name])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_take_the_step_of_one(name: str, kind: str, two_ranks: dict[tuple[str, str], Taken]) -> None:
    assert distance(_reference(name), two_ranks[name, kind]) < TOLERANCE


@pytest.mark.parametrize("kind", ["tp_attention", "tp_mlp"])
def test_a_part_of_the_net_may_be_split(kind: str, two_ranks: dict[tuple[str, str], Taken]) -> None:
    assert distance(_reference("bert_tiny"), two_ranks["bert_tiny", kind]) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_four_ranks_take_the_step_of_one(name: str) -> None:
    """Data x tensor, pipeline x data, pipeline x tensor."""
    cases = [Case(kind, WORKLOADS[name], plan) for kind, plan in combined(WORKLOADS[name].graph(), "any").items()]
    assert {case.name for case in cases} == {"dp_tp", "gpipe_dp", "1f1b_tp"}
    for case, taken in zip(cases, together(cases), strict=True):
        assert distance(_reference(name), taken) < TOLERANCE, case.name


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: replace(t, losses=(t.losses[0] * (1 + 1e-6), *t.losses[1:])),
        lambda t: replace(t, gradients={**t.gradients, "block0.up.weight": t.gradients["block0.up.weight"] * 2}),
        lambda t: replace(t, gradients={n: g for n, g in t.gradients.items() if n != "block0.up.bias"}),
        lambda t: replace(t, weights={n: w + 1e-6 for n, w in t.weights.items()}),
        lambda t: replace(t, weights={n: w * float("nan") for n, w in t.weights.items()}),
    ],
    ids=["loss", "gradient not averaged", "gradient missing", "weights", "not a number"],
)
def test_a_step_that_differs_is_noticed(spoil: Callable[[Taken], Taken]) -> None:
    reference = _reference("mlp_tiny")
    assert distance(reference, reference) == 0
    assert distance(reference, spoil(reference)) > 1e3 * TOLERANCE


def test_plans_for_different_numbers_of_ranks_are_not_run_at_once() -> None:
    workload = WORKLOADS["mlp_tiny"]
    two, four = executable_plans(workload.graph(), 2, "any")["dp"], executable_plans(workload.graph(), 4, "any")["dp"]
    with pytest.raises(ValueError, match=r"plans for \[2, 4\] ranks"):
        together([Case("two", workload, two), Case("four", workload, four)])


def test_float32_steps_agree_too() -> None:
    workload = WORKLOADS["mlp_tiny"]
    plan = executable_plans(workload.graph(), 2, "any")["tp"]
    (taken,) = together([Case("tp", workload, plan)], torch.float32)
    assert distance(alone(workload, dtype=torch.float32), taken) < 1e-4
