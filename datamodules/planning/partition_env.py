"""Operator partitioning as decisions: one slot for each dimension of each trainable variable, partitioned or not.

Legend: N slots, V variables, F features.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import numpy as np

from datamodules.planning.slot_table import (
    OPEN,
    PARTITIONED,
    REPLICATED,
    Assignments,
    Pruning,
    SlotTable,
    closed,
    largest_first,
    natural_order,
    opponents,
)

__all__ = ["OPEN", "PARTITIONED", "REPLICATED", "Assignments", "PartitionProblem", "Pricer", "Pruning", "SlotTable"]

EXTRAS = 6  # features beside the slots and the pointer
TIE = 0.5  # what all bytes together weigh against one variable, where numbers of variables are equal

Objective = Literal["count", "time"]


class Pricer(Protocol):
    """A cost that follows single decisions, which can be taken back in reverse order."""

    @property
    def step_s(self) -> float:
        """Seconds of a training step with the slots set so far."""

    @property
    def feasible(self) -> bool:
        """Whether it fits into memory."""

    def set(self, slot: int, value: int) -> None:
        """Set a slot to PARTITIONED; replicated is what it was."""

    def undo(self) -> None:
        """Take the last set back."""


class PartitionProblem:
    """Decide for each slot whether its dimension is split over all devices; one dimension of a variable at most.

    Args:
        name: for people.
        table: what decisions bring with them.
        objective: "count": as many variables as possible, then as many of their bytes (the paper's reward); the cost is
            one more than the number of variables not partitioned, plus at most half for bytes. "time": seconds of a step by
            `pricer`.
        pricer: of the "time" objective; with the "count" objective it is left alone.
        pruning: which of the paper's strategies are on.
        reference: cost of the plan to beat; of the plan with nothing partitioned where it is None.
    Raises:
        ValueError: "time" without a pricer.
    Source: dossier 1.4, 1.5; the state is the paper's vector of slots with a pointer.
    """

    actions = 2

    def __init__(
        self,
        name: str,
        table: SlotTable,
        objective: Objective = "count",
        pricer: Pricer | None = None,
        pruning: Pruning | None = None,
        reference: float | None = None,
    ) -> None:
        if objective == "time" and pricer is None:
            raise ValueError(f"{name}: the objective 'time' needs a pricer")
        self.name, self.table, self.objective = name, table, objective
        self.pricer = pricer if objective == "time" else None
        self.pruning = pruning or Pruning()
        self.order = largest_first(table) if self.pruning.ordering else natural_order(table)
        self.horizon = len(table.names)
        self.width = 2 * self.horizon + EXTRAS
        self._weight_V, self._bytes = table.weight_V, sum(table.bytes_V)
        self.variables = sum(self._weight_V)
        self.scale = float(max(1, self.variables)) if objective == "count" else None
        self._groups = closed(table)
        self._opponents = opponents(self._groups, self.horizon)
        self._place = {slot: place for place, slot in enumerate(self.order)}
        self._priced = 0  # slots that the pricer has set
        self.reset()
        self.reference = self.cost() if reference is None else reference

    # what has been decided -----------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget every decision."""
        if self.pricer is not None:
            for _ in range(self._priced):
                self.pricer.undo()
        self._priced = 0
        self._value: list[int] = [OPEN] * self.horizon
        self._blocked = [0] * (2 * self.horizon)
        for pair, group in enumerate(self._groups):
            if group is None:
                self._blocked[pair] = 1
        self._frames: list[list[int]] = []
        self._taken: list[tuple[int, int, int]] = []  # (slot, action, where the pointer stood)
        self._pointer, self._broken = 0, False
        self._count, self._bytes_split = 0, 0
        self._hopes = [0] * len(self.table.bytes_V)  # slots of each variable that may still be partitioned
        self._hopeful, self._hopeful_bytes = 0, 0  # of the variables that have one
        for slot in range(self.horizon):
            if not self._blocked[2 * slot + 1]:
                self._hope(slot, 1)
        self._forced = [self._settle()]  # frames that followed without a step, after each decision

    @property
    def done(self) -> bool:
        """Whether every slot is decided or a rule is broken."""
        return self._broken or self._pointer >= self.horizon

    @property
    def decisions(self) -> tuple[int, ...]:
        """The actions taken so far, those without a choice left out."""
        return tuple(action for _, action, _ in self._taken)

    @property
    def slot(self) -> int:
        """The slot that is to be decided."""
        return self.order[self._pointer]

    @property
    def broken(self) -> bool:
        """Whether the last action broke a rule."""
        return self._broken

    def consistent(self) -> np.ndarray:
        """Return which actions keep every rule (2,), bool, whatever the mask is."""
        slot = self.slot
        return np.array([not self._blocked[2 * slot], not self._blocked[2 * slot + 1]])

    def allowed(self) -> np.ndarray:
        """Return which actions may be taken (2,), bool: all of them where the mask is off."""
        return self.consistent() if self.pruning.mask else np.ones(2, dtype=bool)

    def step(self, action: int) -> bool:
        """Decide the slot; False where that contradicts an earlier decision."""
        if self.done:
            raise ValueError(f"{self.name}: the plan is finished")
        slot, pointer = self.slot, self._pointer
        self._taken.append((slot, action, pointer))
        if self._blocked[2 * slot + action]:
            self._broken = True
            self._frames.append([])
            self._forced.append(0)
            return False
        self._apply(slot, action)
        self._pointer += 1
        self._forced.append(self._settle())
        return not self._broken

    def undo(self) -> None:
        """Take the last decision back, and all that followed from it."""
        if not self._taken:
            raise ValueError(f"{self.name}: there is no decision to take back")
        self._broken = False
        for _ in range(self._forced.pop() + 1):
            self._retract(self._frames.pop())
        _, _, self._pointer = self._taken.pop()

    def _settle(self) -> int:
        """Move to the next slot with a choice; decide on the way those that have none. Returns how many frames that took."""
        frames = 0
        if not self.pruning.linkage:
            return 0
        while self._pointer < self.horizon:
            slot = self.order[self._pointer]
            if self._value[slot] == OPEN:
                free = [action for action in (0, 1) if not self._blocked[2 * slot + action]]
                if len(free) == 2 or (free and not self.pruning.mask):
                    break
                if not free:
                    self._broken = True
                    break
                self._apply(slot, free[0])
                frames += 1
            self._pointer += 1
        return frames

    def _apply(self, slot: int, action: int) -> None:
        group = self._groups[2 * slot + action]
        assert group is not None
        frame = []
        for other, value in group:
            if self._value[other] == OPEN:
                self._assign(other, value)
                frame.append(other)
        self._frames.append(frame)

    def _hope(self, slot: int, change: int) -> None:
        """Count a slot that may be partitioned in (1) or out (-1)."""
        variable, before = self.table.variable[slot], self._hopes[self.table.variable[slot]]
        self._hopes[variable] = before + change
        if (before == 0) != (before + change == 0):
            self._hopeful += change * self._weight_V[variable]
            self._hopeful_bytes += change * self.table.bytes_V[variable]

    def _assign(self, slot: int, value: int) -> None:
        blocked, values = self._blocked, self._value
        if not blocked[2 * slot + 1]:
            self._hope(slot, -1)
        values[slot] = value
        for pair in self._opponents[2 * slot + value]:
            if pair & 1 and not blocked[pair] and values[pair >> 1] == OPEN:
                self._hope(pair >> 1, -1)
            blocked[pair] += 1
        if value == PARTITIONED:
            self._note(slot, 1)

    def _note(self, slot: int, change: int) -> None:
        variable = self.table.variable[slot]
        self._count += change * self._weight_V[variable]
        self._bytes_split += change * self.table.bytes_V[variable]
        if self.pricer is not None:
            self._priced += change
            if change > 0:
                self.pricer.set(slot, PARTITIONED)
            else:
                self.pricer.undo()

    def _retract(self, frame: list[int]) -> None:
        blocked, values = self._blocked, self._value
        for slot in reversed(frame):
            value = values[slot]
            if value == PARTITIONED:
                self._note(slot, -1)
            for pair in self._opponents[2 * slot + value]:
                blocked[pair] -= 1
                if pair & 1 and not blocked[pair] and values[pair >> 1] == OPEN:
                    self._hope(pair >> 1, 1)
            values[slot] = OPEN
            if not blocked[2 * slot + 1]:
                self._hope(slot, 1)

    # what it is worth ----------------------------------------------------------------------------------------------

    def cost(self) -> float:
        """Return the cost with every open slot replicated; infinite where a rule is broken."""
        if self._broken:
            return math.inf
        if self.pricer is not None:
            return self.pricer.step_s if self.pricer.feasible else math.inf
        return 1 + self.variables - self._count + TIE * (1 - self._bytes_split / max(1, self._bytes))

    def bound(self) -> float:
        """Return a cost that no plan from here is below: all that may still be partitioned is (HPGO's bound, and bytes)."""
        if self._broken:
            return math.inf
        if self.pricer is not None:
            return -math.inf
        missed = 1 - (self._bytes_split + self._hopeful_bytes) / max(1, self._bytes)
        return 1 + self.variables - self._count - self._hopeful + TIE * missed

    def progress(self) -> float:
        """Return the share of variables that are partitioned."""
        return self._count / max(1, self.variables)

    # what others see -----------------------------------------------------------------------------------------------

    def features(self) -> np.ndarray:
        """Return the slots' values (N), the pointer (N), and what the current slot would bring (6), float32."""
        n = self.horizon
        found = np.zeros(self.width, dtype=np.float32)
        if self.pruning.linkage:
            found[:n] = self._value
        else:  # without groups only what was decided is known
            found[:n] = OPEN
            for slot, action, _ in self._taken:
                found[slot] = action
        found[2 * n + 4] = self.progress()
        if self.done:
            return found
        slot, tail = self.slot, found[2 * n :]
        found[n + slot] = 1.0
        tail[0] = self._pointer / n
        if self.pruning.linkage:
            new = [other for other, value in self._groups[2 * slot + 1] or () if value == PARTITIONED]
            new = [other for other in new if self._value[other] == OPEN]
            tail[1] = len(new) / max(1, self.variables)
            tail[2] = sum(self.table.bytes_V[self.table.variable[s]] for s in new) / max(1, self._bytes)
        tail[3] = self.table.bytes_V[self.table.variable[slot]] / max(1, self._bytes)
        tail[5] = 0.0 if self.pruning.mask and self._blocked[2 * slot + 1] else 1.0
        return found

    def values(self) -> tuple[int, ...]:
        """Return each slot's value, OPEN where it is not decided."""
        return tuple(self._value)

    def plan(self) -> dict[str, int]:
        """Return {slot's name: 1} of what is partitioned, in the model's order."""
        return {name: value for name, value in zip(self.table.names, self._value, strict=True) if value == PARTITIONED}
