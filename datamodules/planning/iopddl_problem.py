"""An IOPDDL instance as a problem for the searchers: one decision for each node that has a choice.

Legend: K strategies of a node, M moments at which memory can be short, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from datamodules.planning import iopddl
from datamodules.planning.iopddl_bound import Bound, Relaxed, relax
from datamodules.planning.iopddl_factors import Factors, Wide, condense, connected_order
from datamodules.planning.searchers import Budget, search


class StrategyProblem:
    """Choose one strategy for each node; costs are exact whole numbers, however large.

    Decisions are taken along edges: each next node is the one with the most neighbours among those before it. A node of one
    strategy is no decision. Action 0 at each decision is the strategy of the reference plan, the others follow in the file's
    order. Open nodes stand at the reference plan's strategies, so that `cost` is that of a whole solution.

    An action is allowed where the nodes decided so far fit into memory with every open node at its smallest, which is all that
    memory can forbid: an allowed action always leaves one at the next decision. A plan whose open nodes do not fit at the
    reference plan's strategies costs infinity until they are decided.

    `reference`, the plan to beat, is cheapest fit: in the order of decisions, each node takes the strategy that costs least
    with its edges (those to later nodes at their best) among those that fit with all later nodes at their smallest.

    Args:
        source: the instance.
    Raises:
        IopddlError: no solution fits into memory; by how many bytes.
    """

    scale: float | None = None

    def __init__(self, source: iopddl.Problem) -> None:
        self.source, self.name = source, source.name
        self.factors: Factors = condense(source)
        whole = connected_order(self.factors, source.intervals)
        sizes = self.factors.sizes
        self.whole_order = whole  # with nodes of one strategy
        self.order = tuple(node for node in whole if sizes[node] > 1)
        self.horizon = len(self.order)
        self.actions = max(sizes, default=1)
        self.width = 2 * self.actions + 2
        self._near, self._wides = self.factors.neighbours(), self.factors.wides_of()
        self._default = cheapest_fit(self.factors, whole)
        self._smallest = self.factors.least()
        self._strategies = [_reference_first(self._default[node], sizes[node]) for node in self.order]
        self._default_cost = iopddl.evaluate(source, self._default).cost
        self._default_held = self.factors.held(self._default)
        self._smallest_held = self.factors.held(self._smallest)
        self._relaxed: Relaxed | None = None
        self.reset()
        self.reference = float(self._default_cost) if self._default_cost > 0 else 1.0

    # what has been decided -----------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every decision."""
        self._chosen = list(self._default)
        self._taken: list[int] = []
        self._total = self._default_cost
        self._held = self._default_held.copy()  # with open nodes as in the reference plan
        self._needed = self._smallest_held.copy()  # with open nodes at their smallest
        self._broken = False
        self._bound: Bound | None = None
        self._bounded = 0  # decisions that the bound knows

    @property
    def done(self) -> bool:
        """Whether every node is decided or memory is exceeded."""
        return self._broken or len(self._taken) == self.horizon

    @property
    def decisions(self) -> tuple[int, ...]:
        """The actions taken so far."""
        return tuple(self._taken)

    def allowed(self) -> np.ndarray:
        """Return which strategies of the next node fit into memory with all later nodes at their smallest (K,), bool."""
        found = np.zeros(self.actions, dtype=bool)
        if not self.done:
            place = len(self._taken)
            node, strategies = self.order[place], self._strategies[place]
            usages = self.factors.usages[node]
            room = self._room(node, self._needed, usages.item(self._smallest[node]))
            found[: len(strategies)] = True if room is None else usages[strategies] <= room
        return found

    def _room(self, node: int, held: np.ndarray, own: int) -> int | None:
        """Memory that a node may use beside the others, where `held` has it at `own`; None for any amount."""
        first, last = self.factors.alive[node]
        return self.factors.limit - int(held[first:last].max()) + own if first < last else None

    def step(self, action: int) -> bool:
        """Decide the next node; False where it has no such strategy, or where it cannot fit into memory any more.

        Raises:
            ValueError: the plan is finished, or no node has such an action.
        """
        if self.done:
            raise ValueError(f"{self.name}: the plan is finished")
        if not 0 <= action < self.actions:
            raise ValueError(f"{self.name} has actions 0 to {self.actions - 1}, got {action}")
        place = len(self._taken)
        if action >= self.options(place):
            self._taken.append(action)
            self._broken = True
            return False
        node, strategy = self.order[place], int(self._strategies[place][action])
        usages = self.factors.usages[node]
        room = self._room(node, self._needed, usages.item(self._smallest[node]))
        self._taken.append(action)
        self._hold(self._needed, node, self._smallest[node], strategy)
        self._put(node, strategy)
        self._broken = room is not None and usages.item(strategy) > room
        return not self._broken

    def undo(self) -> None:
        """Take the last decision back.

        Raises:
            ValueError: there is none.
        """
        if not self._taken:
            raise ValueError(f"{self.name}: there is no decision to take back")
        action, place, self._broken = self._taken.pop(), len(self._taken), False
        if action < self.options(place):  # else it was refused, and nothing followed from it
            node = self.order[place]
            self._hold(self._needed, node, self._chosen[node], self._smallest[node])
            self._put(node, self._default[node])
            self._forget(place)

    def options(self, place: int) -> int:
        """Return how many actions a decision has, whether or not they fit."""
        return len(self._strategies[place])

    def decision(self, place: int) -> int:
        """Return the action taken at a decision."""
        return self._taken[place]

    def change(self, place: int, action: int) -> bool:
        """Decide one node of a finished plan anew; False, and nothing changed, where that does not fit into memory.

        Raises:
            ValueError: the plan is not finished, or the node has no such strategy.
        """
        if len(self._taken) < self.horizon or self._broken:
            raise ValueError(f"{self.name}: only a finished plan is changed")
        if not 0 <= action < self.options(place):
            raise ValueError(
                f"{self.name}: node {self.order[place]} has actions 0 to {self.options(place) - 1}, got {action}"
            )
        node, strategy = self.order[place], int(self._strategies[place][action])
        usages, before = self.factors.usages[node], self._chosen[node]
        more = usages.item(strategy) - usages.item(before)
        if more > 0:
            room = self._room(node, self._held, 0)
            if room is not None and more > room:
                return False
        self._taken[place] = action
        self._hold(self._needed, node, before, strategy)
        self._put(node, strategy)
        self._forget(place)
        return True

    def _put(self, node: int, strategy: int) -> None:
        """Let a node have a strategy: the cost and the memory of the whole solution follow."""
        before, own, chosen = self._chosen[node], self.factors.own[node], self._chosen
        change = own.item(strategy) - own.item(before)
        for other, table in self._near[node]:
            change += table.item(strategy, chosen[other]) - table.item(before, chosen[other])
        for wide in self._wides[node]:
            change -= _entry(wide, chosen)
        self._hold(self._held, node, before, strategy)
        chosen[node] = strategy
        for wide in self._wides[node]:
            change += _entry(wide, chosen)
        self._total += change

    def _hold(self, held: np.ndarray, node: int, before: int, after: int) -> None:
        first, last = self.factors.alive[node]
        usages = self.factors.usages[node]
        if first < last and (change := usages.item(after) - usages.item(before)):
            held[first:last] += change

    # what it is worth ----------------------------------------------------------------------------------------------

    def cost(self) -> float:
        """Return the exact cost, a whole number, with open nodes as in the reference plan; infinite where it does not fit."""
        open_ones = len(self._taken) < self.horizon  # else everything fits, since it is not broken
        if self._broken or (open_ones and self.factors.moments and self._held.max() > self.factors.limit):
            return math.inf
        return self._total

    def bound(self) -> float:
        """Return a whole number that no solution with these decisions costs less than, memory left aside."""
        if self._broken:
            return math.inf
        if self._bound is None:
            self._bound, self._bounded = Bound(self.relaxed()), 0
            for node, size in enumerate(self.factors.sizes):
                if size == 1:
                    self._bound.push(node, 0)
        for place in range(self._bounded, len(self._taken)):
            node = self.order[place]
            self._bound.push(node, self._chosen[node])
        self._bounded = len(self._taken)
        return self._bound.value

    def relaxed(self) -> Relaxed:
        """Return the costs with all that every solution pays taken out of them as one constant, a lower bound of any plan."""
        if self._relaxed is None:
            self._relaxed = relax(self.factors, self.whole_order, self._default_cost)
        return self._relaxed

    def _forget(self, place: int) -> None:
        """The bound is to know no more than the decisions before a place."""
        if self._bound is not None:
            for _ in range(self._bounded - place):
                self._bound.pop()
            self._bounded = min(self._bounded, place)

    def progress(self) -> float:
        """Return the share of decisions taken."""
        return len(self._taken) / self.horizon if self.horizon else 1.0

    # what others see -----------------------------------------------------------------------------------------------

    def features(self) -> np.ndarray:
        """Return (F,), float32: what each action at the next node adds to the cost as things stand, as a share of the
        reference (K); which are allowed (K); the share of decisions taken; the share of the limit in use at its fullest.
        """
        found = np.zeros(self.width, dtype=np.float32)
        found[2 * self.actions] = self.progress()
        if self.factors.moments:
            found[2 * self.actions + 1] = float(self._needed.max()) / max(1, self.factors.limit)
        if self.done:
            return found
        place = len(self._taken)
        node, start = self.order[place], self._total
        for action, strategy in enumerate(self._strategies[place]):
            self._put(node, int(strategy))
            found[action] = (self._total - start) / self.reference
        self._put(node, self._default[node])
        found[self.actions : 2 * self.actions] = self.allowed()
        return found

    def plan(self) -> tuple[int, ...]:
        """Return the strategy of each node, as the contest writes solutions; open nodes as in the reference plan."""
        return tuple(self._chosen)

    def actions_of(self, solution: Sequence[int]) -> tuple[int, ...]:
        """Return the decisions that make a solution.

        Raises:
            IopddlError: not one strategy of each node.
        """
        iopddl.evaluate(self.source, solution)
        rows = zip(self._strategies, self.order, strict=True)
        return tuple(int(np.flatnonzero(strategies == solution[node])[0]) for strategies, node in rows)


def _reference_first(chosen: int, size: int) -> np.ndarray:
    return np.array([chosen, *(s for s in range(size) if s != chosen)], dtype=np.int64)


def _entry(wide: Wide, chosen: Sequence[int]) -> int:
    return wide.table.item(*(chosen[node] for node in wide.nodes))


def cheapest_fit(factors: Factors, order: Sequence[int]) -> tuple[int, ...]:
    """Return the solution of one greedy pass, which fits into memory (see `StrategyProblem`); wide edges count once all but
    one of their nodes are decided.

    Args:
        order: of the nodes.
    """
    smallest, near, wides = factors.least(), factors.neighbours(), factors.wides_of()
    needed, chosen = factors.held(smallest), list(smallest)
    decided: set[int] = set()
    for node in order:
        costs = factors.own[node].astype(object)
        for other, table in near[node]:
            costs = costs + (table[:, chosen[other]] if other in decided else table.min(axis=1))
        for wide in wides[node]:
            if all(n in decided or n == node for n in wide.nodes):
                costs = costs + wide.table[tuple(slice(None) if n == node else chosen[n] for n in wide.nodes)]
        usages, (first, last) = factors.usages[node], factors.alive[node]
        fits = np.arange(len(costs))
        if first < last:
            spare = factors.limit - int(needed[first:last].max())
            fits = np.flatnonzero(usages <= spare + usages.item(smallest[node]))
        best = min(fits.tolist(), key=lambda strategy, costs=costs: (costs[strategy], strategy))  # type: ignore[misc]
        if first < last:
            needed[first:last] += usages.item(best) - usages.item(smallest[node])
        chosen[node] = best
        decided.add(node)
    return tuple(chosen)


def descend(problem: StrategyProblem) -> None:
    """Change single decisions of a finished plan, the best at each place in turn, until none of them helps."""
    better = True
    while better:
        better = False
        for place in range(problem.horizon):
            cost, kept = problem.cost(), problem.decision(place)
            for action in range(problem.options(place)):
                if action != kept and problem.change(place, action) and problem.cost() < cost:
                    cost, kept, better = problem.cost(), action, True
            problem.change(place, kept)


def cooled(problem: StrategyProblem, plans: int) -> dict[str, Any]:
    """Return the options of "annealing" for a search of so many plans: temperatures in changes of single nodes."""
    share = 1.0 / max(1, problem.horizon)  # of the reference, what a node costs on average
    return {"hot": 3 * share, "cold": 3e-3 * share, "expected": max(1, plans)}


def options_for(problem: StrategyProblem, method: str, seconds: float) -> dict[str, Any]:
    """Return the options of a search method for a budget in seconds: how many plans it will be is measured first."""
    if method == "exhaustive":
        return {"eager": False, "first": "greedy"}
    if method not in ("annealing", "mcmc"):
        return {}
    trial = search(problem, "annealing", Budget(seconds=min(0.3, seconds / 10)), **cooled(problem, 1))
    plans = int(trial.evaluations * seconds / max(trial.seconds, 1e-9))
    return cooled(problem, plans) if method == "annealing" else {"expected": max(100, plans)}
