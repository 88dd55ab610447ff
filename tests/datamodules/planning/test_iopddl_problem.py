"""IOPDDL instances as a problem: the evaluator's costs, masks sound and complete, bounds that hold, plans that fit."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from datamodules.planning import iopddl
from datamodules.planning.environment import PlanEnvironment
from datamodules.planning.iopddl import IopddlError, Problem, evaluate
from datamodules.planning.iopddl_problem import StrategyProblem, cooled, descend, options_for
from datamodules.planning.optimum_iopddl import strategy_optimum
from datamodules.planning.partition_env import PartitionProblem
from datamodules.planning.problem import Problem as Searchable
from datamodules.planning.problem import cost_of, take
from datamodules.planning.searchers import METHODS, Budget, search
from datamodules.planning.toys import blocks_table
from datamodules.planning.walks import Changeable, Changes
from tests.datamodules.planning.iopddl_made import best_of, made, solutions

SEEDS = range(12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("share", [0.0, 0.4, None])
def test_every_solution_costs_what_the_evaluator_says_and_is_allowed_just_where_it_fits(
    seed: int, share: float | None
) -> None:
    source = made(seed, share=share)
    problem = StrategyProblem(source)
    for solution in solutions(source):
        wanted = evaluate(source, solution)
        cost = cost_of(problem, problem.actions_of(solution))
        assert cost == (wanted.cost if wanted.feasible else math.inf)
        if wanted.feasible:
            assert problem.done
            assert problem.plan() == solution


@pytest.mark.parametrize("seed", SEEDS)
def test_allowed_actions_lead_to_every_solution_that_fits_and_to_no_other(seed: int) -> None:
    source = made(seed, share=0.2)
    problem = StrategyProblem(source)
    reached = []

    def walk() -> None:
        if problem.done:
            assert math.isfinite(problem.cost())
            reached.append(problem.plan())
            return
        allowed = problem.allowed()
        assert allowed.any()
        for action in np.flatnonzero(allowed):
            assert problem.step(int(action))
            walk()
            problem.undo()

    walk()
    assert sorted(reached) == [s for s in solutions(source) if evaluate(source, s).feasible]


def test_costs_and_memory_beyond_64_bits_are_exact() -> None:
    source = made(3, scale=2**57)
    source = replace(source, usages=tuple(u * 2**57 for u in source.usages), usage_limit=source.usage_limit * 2**57)
    problem = StrategyProblem(source)
    costs = [evaluate(source, s) for s in solutions(source)]
    assert max(c.cost for c in costs) > 2**63
    for solution, wanted in zip(solutions(source), costs, strict=True):
        cost = cost_of(problem, problem.actions_of(solution))
        assert cost == (wanted.cost if wanted.feasible else math.inf)
    assert problem.relaxed().constant <= min(c.cost for c in costs if c.feasible)
    found = search(problem, "exhaustive", Budget(steps=10**6))
    assert found.proven
    assert found.cost == min(c.cost for c in costs if c.feasible)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_reference_fits_and_the_first_action_is_the_reference_s(seed: int) -> None:
    source = made(seed, share=0.1)
    problem = StrategyProblem(source)
    assert isinstance(problem, Searchable)
    wanted = evaluate(source, problem.plan())
    assert wanted.feasible
    assert wanted.cost == problem.cost() == problem.reference
    assert cost_of(problem, [0] * problem.horizon) == problem.reference
    assert problem.horizon == sum(k > 1 for k in source.sizes)


def _seen(problem: StrategyProblem) -> tuple:
    return (
        *(problem.cost(), problem.decisions, problem.done, problem.bound(), problem.progress(), problem.plan()),
        *(problem.allowed().tolist(), problem.features().tolist()),
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_undo_restores_everything(seed: int) -> None:
    source, rng = made(seed, nodes=8, share=0.3), np.random.default_rng(seed)
    problem, before = StrategyProblem(source), []
    for _ in range(200):
        deeper = not problem.done and (not before or rng.random() < 0.6)
        if deeper:
            place = len(before)
            before.append(_seen(problem))
            action = int(rng.integers(problem.actions))  # whether or not it is allowed
            allowed = action < problem.options(place) and problem.allowed()[action]
            assert problem.step(action) == allowed
        elif before:
            problem.undo()
            assert _seen(problem) == before.pop()
    other = StrategyProblem(source)
    take(other, problem.decisions)
    assert _seen(other) == _seen(problem)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_change_is_the_plan_taken_again_and_a_refused_one_is_none(seed: int) -> None:
    source, rng = made(seed, nodes=8, share=0.3), np.random.default_rng(seed)
    problem, other = StrategyProblem(source), StrategyProblem(source)
    take(problem, [0] * problem.horizon)
    for _ in range(100):
        place = int(rng.integers(problem.horizon))
        action = int(rng.integers(problem.options(place)))
        before = _seen(problem)
        wish = list(problem.decisions)
        wish[place] = action
        if problem.change(place, action):
            assert take(other, wish)
            assert _seen(problem) == _seen(other)
        else:
            assert not take(other, wish)
            assert _seen(problem) == before


def test_some_changes_are_refused_for_memory() -> None:
    source = made(1, share=0.0)
    problem = StrategyProblem(source)
    take(problem, [0] * problem.horizon)
    tried = [problem.change(p, a) for p in range(problem.horizon) for a in range(problem.options(p))]
    assert not all(tried)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_bound_is_below_every_completion_and_meets_the_cost_at_the_end(seed: int) -> None:
    source = made(seed, nodes=5, share=None)
    problem = StrategyProblem(source)

    def least() -> float:
        bound, cost = problem.bound(), problem.cost()
        if problem.done:
            assert bound == cost if cost <= problem.reference else problem.reference < bound <= cost
            return cost
        best = math.inf
        for action in range(problem.options(len(problem.decisions))):
            problem.step(action)
            best = min(best, least())
            problem.undo()
            assert problem.bound() == bound
        assert bound <= best
        return best

    assert least() == min(evaluate(source, s).cost for s in solutions(source))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "exhaustive"])
@pytest.mark.parametrize("seed", range(4))
def test_searchers_return_plans_that_fit_by_a_trace_that_falls(method: str, seed: int) -> None:
    source, wanted = made(seed, share=0.25), best_of(seed, 0.25)
    problem = StrategyProblem(source)
    options = {"expected": 500} if method in ("annealing", "mcmc") else {}
    found, again = (search(problem, method, Budget(steps=3000), seed=seed, **options) for _ in range(2))
    value = evaluate(source, problem.plan())
    assert value.feasible
    assert value.cost == found.cost >= wanted
    assert found.decisions == again.decisions
    costs = [point.cost for point in found.trace]
    assert costs == sorted(set(costs), reverse=True)
    assert found.steps <= 3000
    if method in ("annealing", "mcmc"):
        assert found.cost == wanted


def test_a_change_costs_one_step_and_an_allowed_one_an_evaluation() -> None:
    problem = StrategyProblem(made(2, nodes=9, share=None))
    assert isinstance(problem, Changeable)
    for method in ("annealing", "mcmc"):
        found = search(problem, method, Budget(evaluations=100), seed=1)
        assert found.evaluations == 100
        assert (
            found.steps == problem.horizon + 100
        )  # the start is walked to, and the last change found no evaluation left
    tight = search(StrategyProblem(made(2, nodes=9, share=0.0)), "annealing", Budget(steps=300), seed=1)
    assert tight.evaluations < 300 - problem.horizon


def test_problems_whose_decisions_depend_on_each_other_are_walked_as_before() -> None:
    assert not isinstance(PartitionProblem("blocks", blocks_table(2)), Changeable)


@pytest.mark.parametrize("seed", SEEDS)
def test_going_back_to_the_best_keeps_the_rules_on_the_way(seed: int) -> None:
    from datamodules.planning.searchers import Ledger

    source, rng = made(seed, nodes=9, share=0.15), np.random.default_rng(seed)
    problem, ledger = StrategyProblem(source), Ledger(Budget(steps=10**4))
    take(problem, [0] * problem.horizon)
    ledger.price(problem)
    walk = Changes(problem, ledger, rng, list(problem.decisions))
    for turn in range(200):
        walk.move()
        (walk.keep if rng.random() < 0.7 else walk.drop)()
        assert tuple(walk.decisions) == problem.decisions
        assert evaluate(source, problem.plan()).feasible
        if turn % 10 == 9:
            walk.back()
            assert tuple(walk.decisions) == problem.decisions == ledger.decisions
            assert problem.cost() == ledger.cost


@pytest.mark.parametrize("seed", SEEDS)
def test_descent_ends_where_no_single_change_helps(seed: int) -> None:
    problem = StrategyProblem(made(seed, nodes=8, share=0.3))
    take(problem, [0] * problem.horizon)
    descend(problem)
    cost, plan = problem.cost(), problem.decisions
    assert cost <= problem.reference
    for place in range(problem.horizon):
        for action in range(problem.options(place)):
            if problem.change(place, action):
                assert problem.cost() >= cost
        assert problem.change(place, plan[place])


def test_what_cannot_fit_is_said_in_bytes() -> None:
    source = replace(made(0), usage_limit=None)
    least = evaluate(source, [int(u.argmin()) for u in source.usages])
    assert least.peak > 1
    tight = replace(source, usage_limit=least.peak - 1)
    for build in (StrategyProblem, strategy_optimum):
        with pytest.raises(
            IopddlError, match=rf"no solution fits: .* {least.peak} bytes .* time {least.peak_time}, 1 more"
        ):
            build(tight)
    assert strategy_optimum(replace(source, usage_limit=least.peak)).proven


def test_misuse_is_refused() -> None:
    problem = StrategyProblem(made(0))
    with pytest.raises(ValueError, match="no decision to take back"):
        problem.undo()
    with pytest.raises(ValueError, match="only a finished plan is changed"):
        problem.change(0, 0)
    with pytest.raises(ValueError, match="has actions 0 to 2, got 9"):
        problem.step(9)
    take(problem, [0] * problem.horizon)
    with pytest.raises(ValueError, match="the plan is finished"):
        problem.step(0)
    with pytest.raises(ValueError, match=r"has actions 0 to \d+, got -1"):
        problem.change(0, -1)
    with pytest.raises(ValueError, match="above 0, got 0"):
        strategy_optimum(made(0), time_limit=0)


@pytest.mark.parametrize("nodes", [0, 2])
def test_instances_without_a_choice(nodes: int) -> None:
    one = np.array([7])
    source = Problem("fixed", ((0, 3),) * nodes, (one,) * nodes, (one,) * nodes, (), 20)
    problem = StrategyProblem(source)
    assert problem.done
    assert problem.cost() == 7 * nodes
    for method in METHODS:
        if method != "random":  # it would draw the one plan for ever
            assert search(problem, method, Budget(steps=5)).cost == 7 * nodes
    best = strategy_optimum(source)
    assert (best.cost, best.bound, best.proven) == (7 * nodes, 7 * nodes, True)


def test_options_of_searches_in_seconds_are_measured() -> None:
    problem = StrategyProblem(made(1, nodes=20))
    options = options_for(problem, "annealing", 0.5)
    assert options["expected"] > 100
    assert options["hot"] > options["cold"] > 0
    assert options_for(problem, "mcmc", 0.5)["expected"] >= 100
    assert options_for(problem, "beam", 0.5) == {}
    assert cooled(problem, 50)["expected"] == 50


def test_the_agent_s_environment_takes_an_instance() -> None:
    problem, rng = StrategyProblem(made(1, nodes=8, share=0.1)), np.random.default_rng(0)
    environment = PlanEnvironment(problem, "relative", seed=0)
    for _ in range(5):
        observation, _ = environment.reset()
        ended = False
        while not ended:
            assert (observation["mask"] == problem.allowed()).all()
            assert np.isfinite(observation["obs"]).all()
            assert observation["obs"].shape == (problem.width,)
            observation, reward, ended, _, _ = environment.step(int(rng.choice(np.flatnonzero(observation["mask"]))))
        assert reward == pytest.approx(1 - problem.cost() / problem.reference)
        assert evaluate(problem.source, problem.plan()).feasible


def test_files_become_problems(tmp_path) -> None:
    source = made(7)
    iopddl.write(source, tmp_path / "p.json.gz")
    a, b = StrategyProblem(source), StrategyProblem(iopddl.read(tmp_path / "p.json.gz"))
    assert (a.reference, a.plan(), a.order) == (b.reference, b.plan(), b.order)
