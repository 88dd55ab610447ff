"""The Gymnasium environment over any plan problem: observations with an action mask, rewards to choose from.

Legend: K actions, F features.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces

from datamodules.planning.problem import Problem

Reward = Literal["structural", "relative", "inverse_sqrt", "negative_log", "shaped"]
PENALTY = -1.0  # for an action that breaks a rule, where it is not masked, and for a plan that does not fit
Redraw = Callable[[np.random.Generator], Problem]


class Observer(Protocol):
    """Told of every decision and of every finished plan."""

    def on_step(self) -> None:
        """A decision is about to be taken."""

    def on_plan(self, cost: float, decisions: tuple[int, ...]) -> None:
        """A plan is finished; its cost is infinite where it does not fit."""


class PlanEnvironment(gymnasium.Env[dict[str, np.ndarray], int]):
    """One plan an episode; each step is one decision.

    Args:
        problem: what is decided, or a function that draws one for each episode.
        reward: "structural": the share of variables newly partitioned, at each step (the paper's operator partitioning);
            "inverse_sqrt": at the end sqrt(reference / cost), the paper's 1 / sqrt(L) in a scale where the reference earns 1;
            "negative_log": at the end log(reference / cost); "relative": at the end (reference - cost) / reference;
            "shaped": the same in parts, at each step what it saves with later decisions at their default.
        width: length of the observation, padded with zeros; the problem's own where it is None.
        actions: K of the action space, at least the problem's; the problem's where it is None.
        observer: told of decisions and plans.
    Observation: {"obs": (width,) float32, "mask": (K,) bool, True for what may be taken}.
    Raises:
        ValueError: an unknown reward, or a width or K that does not hold the problem.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (gymnasium's own way)

    def __init__(
        self,
        problem: Problem | Redraw,
        reward: Reward = "structural",
        width: int | None = None,
        actions: int | None = None,
        observer: Observer | None = None,
        seed: int = 0,
    ) -> None:
        if reward not in REWARDS:
            raise ValueError(f"unknown reward {reward!r} (valid: {', '.join(REWARDS)})")
        self._draw: Redraw | None = None if isinstance(problem, Problem) else problem
        self._random, self._number = np.random.default_rng(seed), 0
        self.problem: Problem = problem if isinstance(problem, Problem) else self._drawn()
        self.reward, self.observer = reward, observer
        self.width = self.problem.width if width is None else width
        actions = self.problem.actions if actions is None else actions
        if self.width < self.problem.width or actions < self.problem.actions:
            raise ValueError(
                f"{self.problem.name} needs observations of {self.problem.width} numbers and {self.problem.actions} actions; "
                f"there is room for {self.width} and {actions}"
            )
        self._mask_width = actions
        self.action_space: Any = spaces.Discrete(actions)
        self.observation_space: Any = spaces.Dict(
            {
                "obs": spaces.Box(-np.inf, np.inf, (self.width,), np.float32),
                "mask": spaces.Box(0, 1, (actions,), np.bool_),
            }
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin another plan; `seed` starts the generator that problems are drawn with."""
        super().reset(seed=seed)
        if seed is not None:
            self._random = np.random.default_rng(seed)
        if self._draw is not None:
            self.problem = self._drawn()
        self.problem.reset()
        return self._observation(), {}

    def _drawn(self, number: int | None = None) -> Problem:
        assert self._draw is not None
        self._number = int(self._random.integers(2**62)) if number is None else number
        return self._draw(np.random.default_rng(self._number))

    def step(self, action: int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Take a decision.

        Returns:
            (observation, reward, whether the plan is finished, False, {}).
        Raises:
            ValueError: an action that the problem does not have.
        """
        problem, action = self.problem, int(action)
        if not 0 <= action < problem.actions:
            raise ValueError(f"{problem.name} has actions 0 to {problem.actions - 1}, got {action}")
        if self.observer is not None:
            self.observer.on_step()
        before = self._worth()
        kept = problem.step(action)
        if not kept:
            return self._observation(), PENALTY, True, False, {}
        if not problem.done:
            return self._observation(), self._worth() - before, False, False, {}
        cost = problem.cost()
        if self.observer is not None:
            self.observer.on_plan(cost, problem.decisions)
        if not math.isfinite(cost):
            return self._observation(), PENALTY, True, False, {}
        earned = REWARDS[self.reward](problem.reference, cost)
        return self._observation(), self._worth() - before + earned, True, False, {}

    def _worth(self) -> float:
        """What the decisions so far have earned, of the rewards that are paid at each step."""
        if self.reward == "structural":
            return self.problem.progress()
        if self.reward == "shaped":
            cost = self.problem.cost()
            return (self.problem.reference - cost) / self.problem.reference if math.isfinite(cost) else PENALTY
        return 0.0

    def _observation(self) -> dict[str, np.ndarray]:
        found = np.zeros(self.width, dtype=np.float32)
        found[: self.problem.width] = self.problem.features()
        mask = np.zeros(self._mask_width, dtype=np.bool_)
        if self.problem.done:
            mask[: self.problem.actions] = (
                True  # nothing is chosen any more, and a mask of zeros would spoil the target
            )
        else:
            mask[: self.problem.actions] = self.problem.allowed()
        return {"obs": found, "mask": mask}

    # a cut run goes on from here

    def snapshot(self) -> dict[str, Any]:
        """Return where the environment stands: the generator, the problem drawn and the decisions of the running plan."""
        random, decisions = self._random.bit_generator.state, list(self.problem.decisions)
        return {"random": random, "number": self._number, "decisions": decisions}

    def restore(self, kept: dict[str, Any]) -> None:
        """Stand where `snapshot` was taken."""
        if self._draw is not None:
            self.problem = self._drawn(kept["number"])
        self._random.bit_generator.state = kept["random"]
        self.problem.reset()
        for action in kept["decisions"]:
            self.problem.step(action)


REWARDS: dict[str, Callable[[float, float], float]] = {
    "structural": lambda reference, cost: 0.0,
    "shaped": lambda reference, cost: 0.0,
    "relative": lambda reference, cost: (reference - cost) / reference,
    "inverse_sqrt": lambda reference, cost: math.sqrt(reference / cost),
    "negative_log": lambda reference, cost: math.log(reference / cost),
}
