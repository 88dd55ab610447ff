"""Terms are found again from steps that were made up of them, on nets that no comparison has."""

from __future__ import annotations

import numpy as np
import pytest

from lit_modules.execution.engine import TERMS
from lit_modules.execution.engine_points import ALONE, Bench, Equation, benches, equations, solve
from lit_modules.execution.workloads import WORKLOADS
from tests.lit_modules.execution.test_plans import machine

TRUE = {"styled": 1.5e-3, "moved": 4e-4, "reducer": 1e-3, "chunk": 2e-3}


@pytest.fixture(scope="module")
def small() -> list[Bench]:
    return benches(2)


@pytest.fixture(scope="module")
def asked(small: list[Bench]) -> list[Equation]:
    return equations(small, machine(), 0.3)


def _made_up(asked: list[Equation], noise: float = 0.0, barrier: float = 3e-4) -> tuple[dict[str, float], float]:
    generator, u = np.random.default_rng(0), np.array([TRUE[name] for name in TERMS])
    late = np.exp(noise * generator.normal(size=len(asked)))
    return {e.what: (e.base_s + float(e.counts_U @ u)) * f + barrier for e, f in zip(asked, late, strict=True)}, barrier


def test_the_terms_that_steps_were_made_of_are_found(asked: list[Equation]) -> None:
    found, error = solve(asked, *_made_up(asked))
    assert found == pytest.approx(TRUE, rel=1e-6)
    assert error < 1e-9


def test_noise_moves_the_larger_terms_little(asked: list[Equation]) -> None:
    found, error = solve(asked, *_made_up(asked, noise=0.05))
    assert 0.01 < error < 0.1
    for name in ("styled", "chunk", "reducer"):
        assert found[name] == pytest.approx(TRUE[name], rel=0.25), name


def test_terms_are_never_negative(asked: list[Equation]) -> None:
    early = {key: seconds / 2 for key, seconds in _made_up(asked)[0].items()}
    assert min(solve(asked, early)[0].values()) >= 0
    nothing = {e.what: e.base_s + 1e-9 for e in asked}
    assert max(solve(asked, nothing)[0].values()) < 1e-7


def test_every_term_can_be_told_apart(asked: list[Equation]) -> None:
    assert np.linalg.matrix_rank(np.stack([e.counts_U for e in asked])) == len(TERMS)


def test_no_bench_is_a_net_that_plans_are_compared_on(small: list[Bench]) -> None:
    compared = {(w.kind, w.batch, w.sizes) for w in WORKLOADS.values()}
    assert not compared & {(b.workload.kind, b.workload.batch, b.workload.sizes) for b in small}
    assert {b.name for b in small} >= {ALONE, "dp", "tp", "mixed", "gpipe_1", "gpipe_8", "1f1b_4"}
    assert len({b.what for b in small}) == len(small)


@pytest.mark.parametrize("ranks", [3, 4])
def test_there_are_benches_for_more_ranks(ranks: int) -> None:
    for bench in benches(ranks):
        used = {device for stage in bench.plan.stages for device in stage.devices}
        assert used == ({0} if bench.name == ALONE else set(range(ranks)))
