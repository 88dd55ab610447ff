"""The best solution of IOPDDL instances: bounds that hold, and proofs that agree with looking at every solution."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from datamodules.planning.iopddl import Edge, Problem, evaluate
from datamodules.planning.iopddl_bound import Bound, relax
from datamodules.planning.iopddl_factors import condense, connected_order
from datamodules.planning.iopddl_problem import StrategyProblem
from datamodules.planning.optimum_iopddl import strategy_optimum
from datamodules.planning.searchers import Budget, search
from tests.datamodules.planning.iopddl_made import best_of, made, solutions

SEEDS = range(12)


@pytest.mark.parametrize("seed", SEEDS)
def test_costs_that_are_moved_stay_the_same_in_all(seed: int) -> None:
    source = made(seed, share=None)
    factors = condense(source)
    costs = {s: evaluate(source, s).cost for s in solutions(source)}
    ceiling = sorted(costs.values())[len(costs) // 2]
    moved = relax(factors, connected_order(factors, source.intervals), ceiling)
    assert all(
        table.min() >= 0 for table in (*moved.own, *(p.table for p in moved.pairs), *(w.table for w in moved.wides))
    )
    for solution, cost in costs.items():
        found = moved.constant + sum(int(own[s]) for own, s in zip(moved.own, solution, strict=True))
        found += sum(int(p.table[solution[p.first], solution[p.second]]) for p in moved.pairs)
        found += sum(int(w.table[tuple(solution[n] for n in w.nodes)]) for w in moved.wides)
        assert found == cost if cost <= ceiling else ceiling < found <= cost


def test_message_passing_is_exact_on_a_tree() -> None:
    """On a chain the relaxation has no gap, up to what whole numbers lose to division."""
    rng = np.random.default_rng(0)
    costs = tuple(rng.integers(0, 10**6, 4) for _ in range(20))
    edges = tuple(Edge((n, n + 1), rng.integers(0, 10**6, 16)) for n in range(19))
    source = Problem("chain", ((0, 0),) * 20, costs, tuple(np.zeros(4, np.int64) for _ in range(20)), edges)
    reached = costs[0].copy()
    for n in range(1, 20):
        reached = (reached[:, None] + edges[n - 1].costs.reshape(4, 4)).min(0) + costs[n]
    problem = StrategyProblem(source)
    assert reached.min() * (1 - 1e-3) <= problem.relaxed().constant <= reached.min()
    assert strategy_optimum(source).cost == reached.min()


def test_a_bound_forgets_what_it_is_told_to() -> None:
    source = made(5, nodes=7, share=None)
    factors = condense(source)
    bound = Bound(relax(factors, connected_order(factors, source.intervals), 10**6))
    values = [bound.value]
    for node in range(7):
        bound.push(node, 0)
        values.append(bound.value)
    assert values == sorted(values)
    for value in reversed(values[:-1]):
        bound.pop()
        assert bound.value == value


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [0.0, 0.25, None])
def test_exhaustive_search_and_the_programme_prove_what_brute_force_finds(seed: int, share: float | None) -> None:
    source, wanted = made(seed, share=share), best_of(seed, share)
    found = search(StrategyProblem(source), "exhaustive", Budget(steps=10**6), eager=False, first="greedy")
    assert found.proven
    assert found.cost == wanted
    best = strategy_optimum(source, 20)
    assert best.proven
    assert best.gap == 0
    assert best.cost == best.bound == wanted
    value = evaluate(source, best.solution)
    assert (value.cost, value.feasible) == (wanted, True)


def test_the_programme_branches_where_neither_message_passing_nor_the_relaxation_suffice() -> None:
    """Five odd cycles whose neighbours must differ, and memory that only some may use."""
    differ = np.array([100, 0, 0, 100])
    ends = [(3 * c + a, 3 * c + b) for c in range(5) for a, b in ((0, 1), (1, 2), (2, 0))]
    costs, uses = np.array([0, 1]), np.array([5, 1])
    edges = tuple(Edge(e, differ) for e in ends)
    source = Problem("odd", ((0, 9),) * 15, (costs,) * 15, (uses,) * 15, edges, 15 + 4 * 6)
    best = strategy_optimum(source, 30)
    assert best.proven
    assert best.cost == 5 * 100 + 15 - 6  # a clash in each cycle; 6 nodes may take strategy 0, of each cycle one or two
    assert best.cost == evaluate(source, best.solution).cost
    assert "branch and bound" in best.certificate


def test_a_byte_too_many_is_too_many_whatever_the_solver_s_tolerance() -> None:
    """Both at strategy 0 use a byte more than the limit, a share of 1e-12 of it."""
    costs, uses = np.array([0, 10]), np.array([10**12, 0])
    source = Problem("byte", ((0, 2), (1, 3)), (costs,) * 2, (uses,) * 2, (), 2 * 10**12 - 1)
    best = strategy_optimum(source, 10)
    assert (best.cost, best.bound, best.proven) == (10, 10, True)
    assert strategy_optimum(replace(source, usage_limit=2 * 10**12)).cost == 0


def test_little_time_still_gives_a_solution_that_fits_and_a_bound() -> None:
    source = made(1, nodes=60, share=0.3, largest=10**6)
    best = strategy_optimum(source, 1e-3)
    value = evaluate(source, best.solution)
    assert value.feasible
    assert value.cost == best.cost >= best.bound
    longer = strategy_optimum(source, 20)
    assert best.bound <= longer.bound <= longer.cost <= best.cost
