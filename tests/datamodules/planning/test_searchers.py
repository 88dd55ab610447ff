"""Searchers: they find what brute force finds, keep their budgets, and prove only what is proved."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from datamodules.planning.partition_env import PartitionProblem, Pruning
from datamodules.planning.pipeline_env import Buckets, PipelineProblem, Window
from datamodules.planning.problem import Problem, cost_of, gap_percent, take
from datamodules.planning.searchers import METHODS, Budget, search
from datamodules.planning.toys import (
    EvenStages,
    blocks_table,
    chained_table,
    coupled_pricer,
    exclusive_table,
)


def _coupled(slots: int = 8, seed: int = 1) -> PartitionProblem:
    free = chained_table(1)
    names = tuple(f"v{n}[0]" for n in range(slots))
    nothing = ((),) * slots
    table = type(free)(names, tuple(range(slots)), (100,) * slots, nothing, nothing, (1,) * slots)
    return PartitionProblem("coupled", table, "time", coupled_pricer(slots, seed))


def _pipeline(stages: int = 3, radius: int | None = 2) -> PipelineProblem:
    rng = np.random.default_rng(3)
    buckets = Buckets("toy", rng.uniform(0.5, 2.0, 20), rng.uniform(1e6, 5e7, 20), rng.uniform(1e6, 1e7, 20))
    return PipelineProblem(buckets, EvenStages(buckets, 8), stages, 8, window=Window(radius, radius))


PROBLEMS = {
    "blocks": lambda: PartitionProblem("blocks", blocks_table(3)),
    "exclusive": lambda: PartitionProblem("exclusive", exclusive_table()),
    "chained": lambda: PartitionProblem("chained", chained_table(9)),
    "coupled": _coupled,
    "pipeline": _pipeline,
}


def _brute(problem: Problem) -> float:
    """The least cost over every sequence of allowed actions, by recursion that knows nothing of bounds."""
    if problem.done:
        return problem.cost()
    best = math.inf
    for action in np.flatnonzero(problem.allowed()):
        problem.step(int(action))
        best = min(best, _brute(problem))
        problem.undo()
    return best


@pytest.mark.parametrize("name", PROBLEMS)
def test_exhaustive_search_proves_what_brute_force_finds_and_the_bound_only_saves_steps(name: str) -> None:
    problem = PROBLEMS[name]()
    wanted = _brute(problem)
    budget = Budget(steps=10**6)
    with_bound = search(problem, "exhaustive", budget)
    without = search(problem, "exhaustive", budget, bounded=False)
    assert with_bound.proven
    assert without.proven
    assert with_bound.cost == pytest.approx(wanted, abs=1e-12)
    assert without.cost == pytest.approx(wanted, abs=1e-12)
    assert with_bound.steps <= without.steps
    assert cost_of(problem, with_bound.decisions) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "exhaustive"])
def test_no_searcher_beats_the_optimum_or_spends_more_than_its_budget(name: str, method: str) -> None:
    problem = PROBLEMS[name]()
    wanted = _brute(problem)
    found = search(problem, method, Budget(steps=400), seed=5)
    assert found.cost >= wanted - 1e-12
    assert found.steps <= 400
    assert not found.proven
    assert gap_percent(problem, found.cost, wanted) >= -1e-9
    assert cost_of(problem, found.decisions) == found.cost
    costs = [point.cost for point in found.trace]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) == len(costs)
    assert costs[-1] == found.cost
    assert all(a.steps <= b.steps and a.seconds <= b.seconds for a, b in itertools.pairwise(found.trace))


@pytest.mark.parametrize("method", ["random", "annealing", "mcmc"])
def test_random_methods_reach_a_small_optimum_and_are_a_function_of_the_seed(method: str) -> None:
    problem = _coupled()
    wanted = search(problem, "exhaustive", Budget(steps=10**6)).cost
    first, again = (search(problem, method, Budget(evaluations=2000), seed=7) for _ in range(2))
    assert first.cost == pytest.approx(wanted)
    assert first.decisions == again.decisions
    assert [p.steps for p in first.trace] == [p.steps for p in again.trace]


def test_a_beam_of_one_is_no_better_than_wider_ones_and_a_wide_one_is_exact() -> None:
    problem = _coupled(7, seed=4)
    wanted = search(problem, "exhaustive", Budget(steps=10**6)).cost
    costs = [search(problem, "beam", Budget(steps=10**6), width=width).cost for width in (1, 4, 128)]
    assert costs[0] >= costs[1] >= costs[2]
    assert costs[2] == pytest.approx(wanted)


def test_greedy_is_caught_where_couplings_decide() -> None:
    gaps = []
    for seed in range(8):
        problem = _coupled(8, seed)
        wanted = search(problem, "exhaustive", Budget(steps=10**6)).cost
        gaps.append(search(problem, "greedy", Budget(steps=10**6)).cost - wanted)
    assert min(gaps) >= -1e-12
    assert max(gaps) > 1e-6


@pytest.mark.parametrize("method", ["annealing", "mcmc"])
@pytest.mark.parametrize("radius", [0, 2, None])
def test_a_walk_starts_at_the_plan_that_undecided_cuts_make(method: str, radius: int | None) -> None:
    """Boundaries and equal shares of time, which is the reference: not a corner of the window."""
    problem = _pipeline(3, radius)
    first = search(problem, method, Budget(evaluations=1)).trace[0]
    assert first.cost == problem.reference
    assert first.steps == problem.horizon


def test_evaluations_and_seconds_are_limits_too() -> None:
    problem = _coupled()
    assert search(problem, "random", Budget(evaluations=7)).evaluations == 7
    timed = search(problem, "random", Budget(seconds=0.05))
    assert 0.05 <= timed.seconds < 2.0


def test_steps_to_a_cost_are_those_of_the_first_plan_at_most_as_dear() -> None:
    problem = PROBLEMS["chained"]()
    found = search(problem, "random", Budget(steps=500), seed=0)
    assert found.steps_to(found.cost) == found.trace[-1].steps
    assert found.steps_to(found.cost - 1.0) is None
    assert found.steps_to(found.trace[0].cost) == found.trace[0].steps
    assert found.seconds_to(found.cost) == found.trace[-1].seconds


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Budget(), "at least one"),
        (lambda: Budget(steps=0), "steps"),
        (lambda: search(_coupled(), "gradient", Budget(steps=5)), "unknown searcher"),
        (lambda: search(_coupled(), "beam", Budget(steps=5), breadth=3), "breadth"),
        (lambda: search(_coupled(), "beam", Budget(steps=5), width=0), "width"),
    ],
)
def test_what_cannot_be_searched_is_refused(call, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call()


def test_the_raw_space_is_longer_but_holds_the_same_optimum() -> None:
    table = blocks_table(2)
    folded = PartitionProblem("blocks", table)
    raw = PartitionProblem("blocks", table, pruning=Pruning(linkage=False, ordering=False, tying=False))
    a = search(folded, "exhaustive", Budget(steps=10**6))
    b = search(raw, "exhaustive", Budget(steps=10**6))
    assert a.cost == b.cost
    assert len(a.decisions) < len(b.decisions) == raw.horizon
    assert take(raw, b.decisions)
    assert take(folded, a.decisions)
    assert folded.plan() == raw.plan()
