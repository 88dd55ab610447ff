"""Walks from plan to plan by one decision at a time, for problems whose decisions can be changed where they stand.

A problem whose later decisions depend on earlier ones has no such change: there searchers walk to the place again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np

from datamodules.planning.problem import Problem, take

if TYPE_CHECKING:
    from datamodules.planning.searchers import Ledger


@runtime_checkable
class Changeable(Problem, Protocol):
    """A problem in which a decision of a finished plan can be taken anew and all others stay as they are."""

    def options(self, place: int) -> int:
        """Return how many actions a decision has, allowed or not."""

    def change(self, place: int, action: int) -> bool:
        """Take a decision of the finished plan anew; False, and nothing changed, where that breaks a rule."""


@dataclass
class Changes:
    """A walk by changes. A change tried costs one step, allowed or not, and one that is allowed also an evaluation; taking one
    back, and going back to the best plan, cost nothing: the plan before is known.
    """

    problem: Changeable
    ledger: Ledger
    rng: np.random.Generator
    decisions: list[int]
    _last: tuple[int, int] | None = None  # place and former action of the change that is neither kept nor dropped
    _moved: set[int] = field(default_factory=set)  # places at which the plan may differ from the best

    def move(self) -> float:
        """Change one decision at random to any other action of it; the new plan's cost, infinite where that is not allowed."""
        place = int(self.rng.random() * len(self.decisions))
        count, before, self._last = self.problem.options(place), self.decisions[place], None
        self.ledger.pay_step()
        if count < 2:
            return float("inf")
        action = int(self.rng.random() * (count - 1))
        action += action >= before
        if not self.problem.change(place, action):
            return float("inf")
        self.decisions[place], self._last = action, (place, before)
        known = len(self.ledger.trace)
        cost = self.ledger.price(self.problem)
        self._moved.add(place)
        if len(self.ledger.trace) > known:
            self._moved.clear()  # this is the best plan
        return cost

    def keep(self) -> None:
        """Go on from the plan that the last change made."""
        self._last = None

    def drop(self) -> None:
        """Go on from the plan before the last change."""
        if self._last is not None:
            place, before = self._last
            self.problem.change(place, before)
            self.decisions[place], self._last = before, None
            self._moved.add(place)

    def back(self) -> None:
        """Go on from the best plan. On the way each plan must keep the rules, so that the order of changes matters."""
        best, left = self.ledger.decisions, sorted(self._moved)
        if len(best) != len(self.decisions):
            return  # no plan was finished yet
        while left:
            still = [place for place in left if not self.problem.change(place, best[place])]
            if len(still) == len(left):
                take(self.problem, best)
                break
            left = still
        self.decisions[:] = best
        self._moved.clear()
