"""Operator partitioning as decisions: one slot for each dimension of each trainable variable, partitioned or not.

Legend: N slots, V variables, F features.
"""

from __future__ import annotations

import math
from typing import Any, Literal, Protocol

import numpy as np

from datamodules.planning import _partition_numba
from datamodules.planning.slot_table import (
    OPEN,
    PARTITIONED,
    REPLICATED,
    Assignments,
    Pruning,
    SlotTable,
    largest_first,
    natural_order,
)

kernels: Any = _partition_numba  # numba's dispatchers have no static signature

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
        self._bytes = sum(table.bytes_V)
        self.variables = sum(table.weight_V)
        self.scale = float(max(1, self.variables)) if objective == "count" else None
        self._order_N = np.array(self.order, dtype=np.int64)
        self._begun = self._begin()
        self._state = tuple(array.copy() for array in self._begun)
        self._tables = (*self._state, *table.arrays)
        self._priced = 0  # slots that the pricer has set
        self.reset()
        self.reference = self.cost() if reference is None else reference

    # what has been decided -----------------------------------------------------------------------------------------

    def _begin(self) -> tuple[np.ndarray, ...]:
        """The state before any decision; see `_partition_numba`."""
        n = self.horizon
        state = (
            np.full(n, OPEN, dtype=np.int8),
            np.array([group is None for group in self.table.groups], dtype=np.int32),
            np.zeros(len(self.table.bytes_V), dtype=np.int32),
            np.zeros(n, dtype=np.int64),
            np.zeros(kernels.TOTALS, dtype=np.int64),
        )
        kernels.begin(self._order_N, self.pruning.linkage, self.pruning.mask, (*state, *self.table.arrays))
        return state

    def reset(self) -> None:
        """Forget every decision."""
        if self.pricer is not None:
            for _ in range(self._priced):
                self.pricer.undo()
        for array, begun in zip(self._state, self._begun, strict=True):
            array[:] = begun
        self._taken: list[tuple[int, int, int, int]] = []  # (action, pointer, slots assigned, slots priced) before
        self._own_N = np.full(self.horizon, OPEN, dtype=np.int8)  # what was decided, without what followed
        self._priced = 0
        self._read()
        self._note(0)

    def _read(self) -> None:
        """Take over what the compiled state counts."""
        totals = self._state[-1].tolist()
        self._pointer, self._broken, self._assigned, self._count, self._bytes_split = totals[:5]
        self._hopeful, self._hopeful_bytes, self._new, self._new_bytes = totals[5:]

    def _note(self, first: int) -> None:
        """Tell the pricer of the slots partitioned since `first` were assigned."""
        if self.pricer is None or first == self._assigned:
            return
        slots = self._state[3][first : self._assigned]
        for slot in slots[self._state[0][slots] == PARTITIONED].tolist():
            self.pricer.set(slot, PARTITIONED)
            self._priced += 1

    @property
    def done(self) -> bool:
        """Whether every slot is decided or a rule is broken."""
        return bool(self._broken) or self._pointer >= self.horizon

    @property
    def decisions(self) -> tuple[int, ...]:
        """The actions taken so far, those without a choice left out."""
        return tuple(action for action, *_ in self._taken)

    @property
    def slot(self) -> int:
        """The slot that is to be decided."""
        return self.order[self._pointer]

    @property
    def broken(self) -> bool:
        """Whether the last action broke a rule."""
        return bool(self._broken)

    def consistent(self) -> np.ndarray:
        """Return which actions keep every rule (2,), bool, whatever the mask is."""
        pair = 2 * self.slot
        return self._state[1][pair : pair + 2] == 0

    def allowed(self) -> np.ndarray:
        """Return which actions may be taken (2,), bool: all of them where the mask is off."""
        return self.consistent() if self.pruning.mask else np.ones(2, dtype=bool)

    def step(self, action: int) -> bool:
        """Decide the slot; False where that contradicts an earlier decision."""
        if self.done:
            raise ValueError(f"{self.name}: the plan is finished")
        assigned = self._assigned
        self._taken.append((action, self._pointer, assigned, self._priced))
        self._own_N[self.slot] = action
        pruning = self.pruning
        kernels.decide(action, self._order_N, pruning.linkage, pruning.mask, self._tables)
        self._read()
        self._note(assigned)
        return not self._broken

    def undo(self) -> None:
        """Take the last decision back, and all that followed from it."""
        if not self._taken:
            raise ValueError(f"{self.name}: there is no decision to take back")
        _, pointer, assigned, priced = self._taken.pop()
        if self.pricer is not None:
            for _ in range(self._priced - priced):
                self.pricer.undo()
        self._priced = priced
        kernels.retract(assigned, pointer, self._order_N, self._tables)
        self._read()
        self._own_N[self.slot] = OPEN

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
        n, table = self.horizon, self.table
        found = np.zeros(self.width, dtype=np.float32)
        found[:n] = self._state[0] if self.pruning.linkage else self._own_N  # without groups nothing follows
        found[2 * n + 4] = self.progress()
        if self.done:
            return found
        slot, size = self.slot, max(1, self._bytes)
        found[n + slot] = 1.0
        found[2 * n] = self._pointer / n
        if self.pruning.linkage:
            found[2 * n + 1] = self._new / max(1, self.variables)
            found[2 * n + 2] = self._new_bytes / size
        found[2 * n + 3] = table.bytes_V[table.variable[slot]] / size
        found[2 * n + 5] = not (self.pruning.mask and self._state[1][2 * slot + 1])
        return found

    def values(self) -> tuple[int, ...]:
        """Return each slot's value, OPEN where it is not decided."""
        return tuple(self._state[0].tolist())

    def plan(self) -> dict[str, int]:
        """Return {slot's name: 1} of what is partitioned, in the model's order."""
        return {
            name: value for name, value in zip(self.table.names, self.values(), strict=True) if value == PARTITIONED
        }
