"""Searchers of plans behind one interface: budgets in steps, evaluations and seconds, the best plan at any time.

A step is one decision taken (as the agent's environment counts them), an evaluation one finished plan priced.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from datamodules.planning.problem import Problem, default_action, legal_actions
from datamodules.planning.walks import Changeable, Changes


@dataclass(frozen=True)
class Budget:
    """What a search may use; None for no limit. At least one limit must be set.

    Raises:
        ValueError: a limit below 1 step or evaluation, or not above 0 seconds, or none at all.
    """

    steps: int | None = None
    evaluations: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            raise ValueError("a budget needs at least one of steps, evaluations and seconds")
        for name, value in given.items():
            if value <= 0:
                raise ValueError(f"{name} of a budget must be above 0, got {value!r}")


@dataclass(frozen=True)
class Point:
    """The best cost once so much had been spent."""

    seconds: float
    steps: int
    evaluations: int
    cost: float


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        cost: of the best plan; infinite where none was finished.
        decisions: that make it.
        trace: each improvement, in order.
        proven: whether the whole space was searched or bounded away.
    """

    method: str
    cost: float
    decisions: tuple[int, ...]
    trace: tuple[Point, ...]
    steps: int
    evaluations: int
    seconds: float
    proven: bool = False

    def steps_to(self, cost: float) -> int | None:
        """Return the steps after which the best cost was at most `cost` (to 1e-9 of it); None if never."""
        return next((point.steps for point in self.trace if reached(point.cost, cost)), None)

    def seconds_to(self, cost: float) -> float | None:
        """Return the seconds after which the best cost was at most `cost` (to 1e-9 of it); None if never."""
        return next((point.seconds for point in self.trace if reached(point.cost, cost)), None)


def reached(cost: float, wanted: float) -> bool:
    """Return whether a cost is at most another, to 1e-9 of it: costs are sums in different orders."""
    return cost <= wanted + 1e-9 * max(1.0, abs(wanted))


class OutOfBudget(Exception):
    """Ends a search; what was found until then stands."""


@dataclass
class Ledger:
    """Counts what is spent, keeps the best plan, and ends the search when the budget is spent."""

    budget: Budget
    clock: Callable[[], float] = time.perf_counter
    steps: int = 0
    evaluations: int = 0
    cost: float = math.inf
    decisions: tuple[int, ...] = ()
    trace: list[Point] = field(default_factory=list)
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def seconds(self) -> float:
        """Spent so far."""
        return self.clock() - self.started

    def pay_step(self) -> None:
        """Count a step.

        Raises:
            OutOfBudget: none is left.
        """
        if self.budget.steps is not None and self.steps >= self.budget.steps:
            raise OutOfBudget
        if self.budget.seconds is not None and self.steps % 16 == 0 and self.seconds >= self.budget.seconds:
            raise OutOfBudget
        self.steps += 1

    def price(self, problem: Problem) -> float:
        """Evaluate the finished plan and keep it where it is the best.

        Raises:
            OutOfBudget: no evaluation is left.
        """
        if self.budget.evaluations is not None and self.evaluations >= self.budget.evaluations:
            raise OutOfBudget
        self.evaluations += 1
        cost = problem.cost()
        if cost < self.cost:
            self.cost, self.decisions = cost, problem.decisions
            self.trace.append(Point(self.seconds, self.steps, self.evaluations, cost))
        return cost


def search(problem: Problem, method: str, budget: Budget, seed: int = 0, **options: Any) -> Found:
    """Look for the plan of least cost.

    Args:
        problem: left with the best plan taken, or reset where there is none.
        method: a name in `METHODS`.
        budget: of all, until which the best plan is looked for; a method that ends by itself ends earlier.
        seed: of the method's own generator.
        options: of the method, such as `width` of "beam".
    Raises:
        ValueError: an unknown method or option.
    """
    if method not in METHODS:
        raise ValueError(f"unknown searcher {method!r} (valid: {', '.join(sorted(METHODS))})")
    ledger, proven = Ledger(budget), False
    problem.reset()
    try:
        proven = METHODS[method](problem, ledger, np.random.default_rng(seed), **options)
    except OutOfBudget:
        pass
    except TypeError as error:
        if "unexpected keyword" in str(error):
            raise ValueError(f"{method}: {error}") from error
        raise
    finally:
        problem.reset()
    seconds = ledger.seconds
    for action in ledger.decisions:
        problem.step(action)
    return Found(
        method, ledger.cost, ledger.decisions, tuple(ledger.trace), ledger.steps, ledger.evaluations, seconds, proven
    )


def _finish(problem: Problem, ledger: Ledger, wish: Sequence[int], choose: Callable[[list[int]], int]) -> float:
    """From where the problem stands take the wishes where they are allowed, else what `choose` says; price the plan."""
    place = len(problem.decisions)
    while not problem.done:
        actions = legal_actions(problem)
        wanted = wish[place] if place < len(wish) else -1
        ledger.pay_step()
        problem.step(wanted if wanted in actions else choose(actions))
        place += 1
    return ledger.price(problem)


def random_search(problem: Problem, ledger: Ledger, rng: np.random.Generator) -> bool:
    """Uniform allowed actions, again and again. It never proves anything."""
    while True:
        problem.reset()
        _finish(problem, ledger, (), lambda actions: actions[int(rng.integers(len(actions)))])


def greedy(problem: Problem, ledger: Ledger, rng: np.random.Generator) -> bool:
    """At each decision the action whose plan, all later ones at their default, costs least; ties to the higher progress, then
    to the first action. One pass.
    """
    while not problem.done:
        best: tuple[float, float, int] | None = None
        for action in legal_actions(problem):
            ledger.pay_step()
            problem.step(action)
            key = (problem.cost(), -problem.progress(), action)
            best = key if best is None or key < best else best
            problem.undo()
        assert best is not None
        ledger.pay_step()
        problem.step(best[2])
    ledger.price(problem)
    return False


def beam(problem: Problem, ledger: Ledger, rng: np.random.Generator, width: int = 8) -> bool:
    """Keep the `width` prefixes that cost least with later decisions at their default. One pass.

    Raises:
        ValueError: a width below 1.
    """
    if width < 1:
        raise ValueError(f"width of a beam must be at least 1, got {width!r}")
    kept: list[tuple[int, ...]] = [()]
    while kept:
        ahead: list[tuple[float, float, tuple[int, ...]]] = []
        for prefix in kept:
            problem.reset()
            for action in prefix:
                ledger.pay_step()
                problem.step(action)
            if problem.done:
                ledger.price(problem)
                continue
            for action in legal_actions(problem):
                ledger.pay_step()
                problem.step(action)
                ahead.append((problem.cost(), -problem.progress(), problem.decisions))
                problem.undo()
        kept = [prefix for _, _, prefix in sorted(ahead)[:width]]
    return False


def _neighbour(problem: Problem, ledger: Ledger, rng: np.random.Generator, decisions: Sequence[int]) -> float:
    """Change one decision at random; later ones stay where they are still allowed."""
    place = int(rng.integers(len(decisions)))
    problem.reset()
    for action in decisions[:place]:
        problem.step(action)
    others = [action for action in legal_actions(problem) if action != decisions[place]]
    wish = list(decisions)
    if others:
        wish[place] = others[int(rng.integers(len(others)))]
    for _ in range(place):  # the environment would have to walk there
        ledger.pay_step()
    return _finish(problem, ledger, wish, lambda _: default_action(problem))


def _start(problem: Problem, ledger: Ledger) -> tuple[float, tuple[int, ...]]:
    """The default plan: for a pipeline servers' boundaries and equal shares of time, else the first allowed actions."""
    problem.reset()
    while not problem.done:
        ledger.pay_step()
        problem.step(default_action(problem))
    return ledger.price(problem), problem.decisions


@dataclass
class _Prefixes:
    """The walk from plan to plan where later decisions depend on earlier ones, which are taken again."""

    problem: Problem
    ledger: Ledger
    rng: np.random.Generator
    decisions: Sequence[int]

    def move(self) -> float:
        return _neighbour(self.problem, self.ledger, self.rng, self.decisions)

    def keep(self) -> None:
        self.decisions = self.problem.decisions

    def drop(self) -> None:
        pass  # the next move starts from the decisions kept

    def back(self) -> None:
        self.decisions = self.ledger.decisions or self.decisions


def _walk(problem: Problem, ledger: Ledger, rng: np.random.Generator) -> tuple[float, _Prefixes | Changes]:
    """The default plan's cost, and the walk that starts there: by single changes where the problem has them."""
    cost, decisions = _start(problem, ledger)
    if isinstance(problem, Changeable):
        return cost, Changes(problem, ledger, rng, list(decisions))
    return cost, _Prefixes(problem, ledger, rng, decisions)


def _difference(cost: float, current: float, scale: float) -> float:
    if not math.isfinite(cost):
        return math.inf
    return -math.inf if not math.isfinite(current) else (cost - current) / scale


def annealing(
    problem: Problem,
    ledger: Ledger,
    rng: np.random.Generator,
    hot: float = 0.1,
    cold: float = 1e-4,
    expected: int = 500,
) -> bool:
    """Simulated annealing from the default plan: temperature from `hot` to `cold` (of the reference cost), falling
    geometrically over `expected` plans, then staying.
    """
    current, walk = _walk(problem, ledger, rng)
    for done in range(10**12):
        if not walk.decisions:
            return True  # there is nothing to decide
        temperature = hot * (cold / hot) ** min(1.0, done / expected)
        cost = walk.move()
        worse = _difference(cost, current, problem.reference)
        if worse <= 0 or rng.random() < math.exp(-worse / temperature):
            current = cost
            walk.keep()
        else:
            walk.drop()
    return False


def mcmc(problem: Problem, ledger: Ledger, rng: np.random.Generator, alpha: float = 1.2, expected: int = 500) -> bool:
    """Metropolis search as FlexFlow's: from the default plan, a worse one accepted with exp(-alpha * percent worse than the
    reference); back to the best every `expected` / 100 plans, at most every 1000.

    Source: FlexFlow's public src/runtime/model.cc (its difference is in milliseconds, ours in percent of the reference).
    """
    current, walk = _walk(problem, ledger, rng)
    period = max(1, min(1000, expected // 100))
    for done in range(1, 10**12):
        if not walk.decisions:
            return True
        if done % period == 0:
            current = ledger.cost
            walk.back()
        cost = walk.move()
        worse = _difference(cost, current, problem.reference)
        if worse <= 0 or rng.random() < math.exp(-alpha * 100 * worse):
            current = cost
            walk.keep()
        else:
            walk.drop()
    return False


def exhaustive(
    problem: Problem,
    ledger: Ledger,
    rng: np.random.Generator,
    bounded: bool = True,
    eager: bool = True,
    first: Literal["greedy"] | None = None,
) -> bool:
    """Depth-first through every plan, branches below the bound dropped where `bounded`; then what remains is proven.

    Args:
        eager: the last action of each decision first, which is to partition.
        first: "greedy" for a plan to bound by.
    """
    if first == "greedy":
        greedy(problem, ledger, rng)
        problem.reset()

    def choices() -> list[int]:
        """What is still to be tried where the problem stands, in the order of popping."""
        if problem.done:
            ledger.price(problem)
            return []
        if bounded and problem.bound() >= ledger.cost:
            return []
        actions = legal_actions(problem)
        return actions if eager else actions[::-1]

    waiting = [choices()]  # a stack of its own: plans may be longer than Python's
    while waiting:
        if not waiting[-1]:
            waiting.pop()
            if waiting:
                problem.undo()
            continue
        ledger.pay_step()
        problem.step(waiting[-1].pop())
        waiting.append(choices())
    return True


METHODS: dict[str, Callable[..., bool]] = {
    "random": random_search,
    "greedy": greedy,
    "beam": beam,
    "annealing": annealing,
    "mcmc": mcmc,
    "exhaustive": exhaustive,
}
