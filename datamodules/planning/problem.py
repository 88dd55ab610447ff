"""What searchers, the environment and the agent share: a plan made by a sequence of decisions, whose cost is minimised.

Legend: K actions, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np


class Stuck(RuntimeError):
    """No action is left although the plan is not finished, which a sound mask never leads to."""


@dataclass(frozen=True)
class Optimum:
    """The least cost, how it was found, and whether nothing less was proved to exist."""

    cost: float
    method: str
    proven: bool
    seconds: float = 0.0
    decisions: tuple[int, ...] = ()


@runtime_checkable
class Problem(Protocol):
    """A plan as a sequence of decisions, each one of `actions` choices.

    Attributes:
        name: for people.
        actions: K, the same at each decision; which of them may be taken, `allowed` says.
        horizon: the most decisions that a plan takes.
        width: F, the length of `features`.
        reference: cost of the plan that the search must beat (pure data parallelism, or stages of equal time); above 0.
        scale: what a gap is relative to: the optimum's cost for times, the number of variables for counts; None for the former.
    """

    name: str
    actions: int
    horizon: int
    width: int
    reference: float
    scale: float | None

    def reset(self) -> None:
        """Forget every decision."""

    @property
    def done(self) -> bool:
        """Whether the plan is finished."""

    @property
    def decisions(self) -> tuple[int, ...]:
        """The actions taken so far."""

    def allowed(self) -> np.ndarray:
        """Return which actions keep every rule (K,), bool."""

    def step(self, action: int) -> bool:
        """Take an action; False where it breaks a rule, after which the plan can only be undone or reset."""

    def undo(self) -> None:
        """Take the last action back."""

    def cost(self) -> float:
        """Return the cost of the plan with every open decision at its default; infinite where it is not feasible."""

    def bound(self) -> float:
        """Return a cost that no plan with these decisions is below."""

    def progress(self) -> float:
        """Return the share of variables partitioned so far, from 0 to 1: the paper's structural reward adds up to it."""

    def features(self) -> np.ndarray:
        """Return what the agent sees (F,), float32."""

    def plan(self) -> Any:
        """Return the finished plan in the form of its kind."""


def default_action(problem: Problem) -> int:
    """Return the action that leaves the next decision as it is by default: what the problem's `default` says where it has one
    and that is allowed, else the first allowed action.
    """
    actions = legal_actions(problem)
    wish = getattr(problem, "default", None)
    wanted = actions[0] if wish is None else wish()
    return wanted if wanted in actions else actions[0]


def take(problem: Problem, decisions: Sequence[int]) -> bool:
    """Start again and take these decisions; False as soon as one breaks a rule."""
    problem.reset()
    return all(problem.step(action) for action in decisions)


def cost_of(problem: Problem, decisions: Sequence[int]) -> float:
    """Return the cost of the plan that these decisions make; infinite where they break a rule."""
    return problem.cost() if take(problem, decisions) else math.inf


def gap_percent(problem: Problem, cost: float, optimum: float) -> float:
    """Return how far a cost lies above the optimum, in percent of the problem's scale; infinite for no plan at all."""
    scale = problem.scale if problem.scale is not None else optimum
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"a gap needs a finite scale above 0, got {scale!r} for {problem.name}")
    return 100.0 * (cost - optimum) / scale


def legal_actions(problem: Problem) -> list[int]:
    """Return the allowed actions in order.

    Raises:
        Stuck: there is none.
    """
    found = [int(action) for action in np.flatnonzero(problem.allowed())]
    if not found:
        raise Stuck(f"{problem.name}: no action is allowed after {list(problem.decisions)}")
    return found
