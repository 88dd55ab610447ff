"""Slots and what follows from deciding them: the table that operator partitioning and data parallelism are searched on.

Legend: N slots, V variables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

OPEN, REPLICATED, PARTITIONED = -1, 0, 1  # the paper's three values of a slot

Assignments = tuple[tuple[int, int], ...]  # (slot, REPLICATED or PARTITIONED)


@dataclass(frozen=True)
class Pruning:
    """The paper's pruning strategies as switches.

    Attributes:
        linkage: a decision takes its whole linkage group with it, and slots that it leaves no choice take no step.
        ordering: slots whose propagation reaches most come first.
        tying: repeated blocks are decided once.
        mask: actions that break a rule are not offered; without, taking one ends the plan.
        bound: branches that cannot beat the best plan are dropped (exhaustive search only).
    """

    linkage: bool = True
    ordering: bool = True
    tying: bool = True
    mask: bool = True
    bound: bool = True


@dataclass(frozen=True)
class SlotTable:
    """What each decision brings with it.

    Attributes:
        names: of the slots, such as "encoder.0.q.weight[0]".
        variable: of each slot, from 0 to V - 1.
        bytes_V: of each variable.
        replicated: per slot, what follows from replicating it; None for a conflict.
        partitioned: per slot, what follows from partitioning it, itself not included; None for a conflict.
        reach: per slot, how many tensors its partitioning determines.
        copies_V: how many variables of the model each stands for, where repeated blocks are tied; empty for one each.
    Raises:
        ValueError: lengths that differ or a slot out of range.
    """

    names: tuple[str, ...]
    variable: tuple[int, ...]
    bytes_V: tuple[int, ...]
    replicated: tuple[Assignments | None, ...]
    partitioned: tuple[Assignments | None, ...]
    reach: tuple[int, ...]
    copies_V: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.names)
        for name in ("variable", "replicated", "partitioned", "reach"):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {count} slots")
        for group in (*self.replicated, *self.partitioned):
            for slot, value in group or ():
                if not 0 <= slot < count or value not in (REPLICATED, PARTITIONED):
                    raise ValueError(f"a group assigns {value} to slot {slot}, of {count} slots")
        if count and not 0 <= min(self.variable) <= max(self.variable) < len(self.bytes_V):
            raise ValueError(f"slots name variables {sorted(set(self.variable))}, of {len(self.bytes_V)}")
        if self.copies_V and len(self.copies_V) != len(self.bytes_V):
            raise ValueError(f"copies_V has {len(self.copies_V)} entries for {len(self.bytes_V)} variables")

    @property
    def weight_V(self) -> tuple[int, ...]:
        """How many variables each one counts for."""
        return self.copies_V or (1,) * len(self.bytes_V)

    @cached_property
    def groups(self) -> list[Assignments | None]:
        """What each decision (2 * slot + action) assigns, itself included; see `closed`."""
        return closed(self)

    @cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The table as compiled loops read it: variable of each slot, weight and bytes of each variable, and in rows the groups
        (starts, slots, values) and the opponents (starts, decisions).
        """
        groups, rivals = [group or () for group in self.groups], opponents(self.groups, len(self.names))
        given = (self.variable, self.weight_V, self.bytes_V)
        members = [[slot for slot, _ in group] for group in groups]
        values = [value for group in groups for _, value in group]
        return (
            *(np.array(row, dtype=np.int64) for row in given),
            *in_rows(members),
            np.array(values, dtype=np.int8),
            *in_rows(rivals),
        )


def natural_order(table: SlotTable) -> tuple[int, ...]:
    """Return the slots as they stand in the model."""
    return tuple(range(len(table.names)))


def largest_first(table: SlotTable) -> tuple[int, ...]:
    """Return the slots by how many tensors they determine, most first (HPGO's order of parameters)."""
    return tuple(sorted(range(len(table.names)), key=lambda slot: (-table.reach[slot], slot)))


def closed(table: SlotTable) -> list[Assignments | None]:
    """Each decision's group with the slot itself and, of every variable it partitions, the other dimensions replicated."""
    siblings: dict[int, list[int]] = {}
    for slot, variable in enumerate(table.variable):
        siblings.setdefault(variable, []).append(slot)
    found: list[Assignments | None] = []
    for slot in range(len(table.names)):
        found.append(_merged(table, siblings, slot, REPLICATED, table.replicated[slot]))
        found.append(_merged(table, siblings, slot, PARTITIONED, table.partitioned[slot]))
    return found


def _merged(
    table: SlotTable, siblings: dict[int, list[int]], slot: int, action: int, group: Assignments | None
) -> Assignments | None:
    if group is None:
        return None
    merged = {slot: action}
    for other, value in group:
        if merged.setdefault(other, value) != value:
            return None
    for other in [slot for slot, value in merged.items() if value == PARTITIONED]:
        for sibling in siblings[table.variable[other]]:
            if sibling != other and merged.setdefault(sibling, REPLICATED) != REPLICATED:
                return None
    return tuple(merged.items())


def opponents(groups: Sequence[Assignments | None], slots: int) -> list[list[int]]:
    """For each (slot, value), the decisions (2 * slot + action) whose groups give that slot the other value."""
    found: list[list[int]] = [[] for _ in range(2 * slots)]
    for pair, group in enumerate(groups):
        for slot, value in group or ():
            found[2 * slot + 1 - value].append(pair)
    return found


def in_rows(lists: Iterable[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of numbers one after another: where each starts, with the end, and the numbers, int64."""
    lists = list(lists)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in lists])]).astype(np.int64)
    return starts, np.array([number for row in lists for number in row], dtype=np.int64)
