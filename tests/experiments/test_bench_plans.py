"""What is compared on speed says the same: each peer's costs are ours at every decision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from datamodules.planning.trace import trace
from datamodules.planning.workloads import build_step
from experiments import bench_plans as bench


def bert() -> Any:
    return trace(lambda: build_step("bert-tiny"), "bert-tiny")


FAMILIES = {
    "count": lambda: [bench.partition(bert(), "bert-tiny", "count", True)],
    "count, untied": lambda: [bench.partition(bert(), "bert-tiny", "count", False)],
    "time": lambda: [bench.partition(bert(), "bert-tiny", "time", True)],
    "time, untied": lambda: [bench.partition(bert(), "bert-tiny", "time", False)],
    "inputs": lambda: [bench.inputs(bert(), "bert-tiny")],
    "stages": bench.stages,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_peers_are_paid_as_ours(name: str) -> None:
    for number in range(len(FAMILIES[name]())):
        family = FAMILIES[name]()[number]
        for way in family.peers:
            # made-up models are drawn from one generator, so that each walk needs its own
            ours, other = (bench.environment(FAMILIES[name]()[number], each) for each in (bench.OURS, way))
            rng = np.random.default_rng(0)
            for _ in range(4):
                seen = [environment.reset()[0] for environment in (ours, other)]
                done = False
                while not done:
                    assert np.array_equal(seen[0]["obs"], seen[1]["obs"])
                    action = int(rng.choice(np.flatnonzero(seen[0]["mask"])))
                    first, second = ours.step(action), other.step(action)
                    assert first[1] == pytest.approx(second[1], rel=1e-9, abs=1e-12)
                    seen, done = [first[0], second[0]], first[2]
                    assert done == second[2]


def test_sizes_are_told_with_what_each_step_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BUDGET_S", 0.05)
    monkeypatch.setattr(bench, "TRACED", 2)
    two, five = bench.sizes((2, 5))
    assert (two.graph, five.graph) == ("traced", "written out")
    assert (two.variables, five.variables) == (10 + 2 * 16, 10 + 5 * 16)
    assert five.operations > two.operations
    assert min(two.prices_s, five.prices_s, two.decisions_per_s, five.ratio) > 0
