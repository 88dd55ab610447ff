"""The cost of a step while decisions are taken and taken back, one at a time: what environments and searchers ask for.

A decision places the tensors that propagation determines; only the operations that touch them are priced again. The same
placement costs the same, to the last bit, however it was reached, and the same as `price` of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from datamodules.planning import _price_numba
from datamodules.planning.graph import Graph
from datamodules.planning.memory import memory_of
from datamodules.planning.placement import REPLICATED, RowsOf, Spread, cached, full_rows, settle, shrink, spread
from datamodules.planning.plan import Plan, PlanError, StagePlan
from datamodules.planning.roofline import update_seconds
from datamodules.planning.tables import build
from datamodules.planning.topology import Topology

kernels: Any = _price_numba


class SlotLike(Protocol):
    """A dim of a variable."""

    @property
    def variable(self) -> int: ...

    @property
    def dim(self) -> int: ...


class PartitionPricer:
    """One stage on all devices, in which any of `slots` may be split over the columns of the mesh.

    Args:
        slots: (variable's tensor, dim), as numbered by `set`.
        members: per slot, the variables that it stands for where repeated blocks are decided together.
        data: rows of the mesh; the columns are the devices divided by it.
        inputs: input -> dim split over the columns; {} leaves the batch whole there.
        micro_batches, overlap: as in `price`.
    Raises:
        PlanError: rows that do not divide the devices or the batch, a slot that the columns do not divide.
    """

    def __init__(
        self,
        graph: Graph,
        topology: Topology,
        slots: Sequence[SlotLike],
        data: int = 1,
        inputs: Mapping[int, int] | None = None,
        micro_batches: int = 1,
        overlap: bool = True,
        members: Sequence[Sequence[int]] | None = None,
        rows_of: RowsOf = full_rows,
        spread_of: Callable[[Graph, int, int, int], Spread] = spread,
    ) -> None:
        self.graph, self.topology, self.slots, self.overlap = graph, topology, tuple(slots), overlap
        self.micro_batches = micro_batches
        self.members = tuple(map(tuple, members)) if members else tuple((slot.variable,) for slot in self.slots)
        self._inputs = dict(inputs or {})
        self._stage = StagePlan(0, len(graph.ops) - 1, tuple(range(topology.devices)), data)
        rows_of = cached(rows_of)
        small = shrink(graph, data * micro_batches, rows_of)
        self.tables = build(small, range(len(graph.ops)), self._stage, topology, rows_of)
        k = self._stage.ways
        self._base = np.array(settle(small, k, self._inputs, None, rows_of, spread_of), dtype=np.int8)
        self._prepare(small, k, spread_of)
        self._ops_ptr, self._ops_of = self.tables.touching()
        self.reset()

    def _prepare(self, small: Graph, k: int, spread_of: Callable[[Graph, int, int, int], Spread]) -> None:
        """What each slot writes, and for each tensor who writes it, earlier variables first."""
        rank = {p.tensor: i for i, p in enumerate(self.graph.parameters)}
        writes: list[Spread] = []
        for slot, tensors in zip(self.slots, self.members, strict=True):
            if any(tensor not in rank for tensor in tensors):
                raise PlanError(f"slot of tensors {list(tensors)}, not all of which are variables of {small.name}")
            shape = small.tensors[tensors[0]].shape
            fits = slot.dim < len(shape) and shape[slot.dim] % k == 0 and k > 1
            parts = [spread_of(small, k, tensor, slot.dim) if fits else () for tensor in tensors]
            writes.append(tuple({t: s for part in reversed(parts) for t, s in part}.items()))
        self._possible = [bool(written) or k == 1 for written in writes]
        self._values_ptr = np.concatenate([[0], np.cumsum([len(w) for w in writes])]).astype(np.int64)
        self._tensors = np.array([t for w in writes for t, _ in w], dtype=np.int64)
        order = sorted(range(len(writes)), key=lambda s: (rank[self.slots[s].variable], self.slots[s].dim))
        writers: list[list[tuple[int, int]]] = [[] for _ in small.tensors]
        for slot_number in order:
            for tensor, split in writes[slot_number]:
                writers[tensor].append((slot_number, split))
        self._writer_ptr = np.concatenate([[0], np.cumsum([len(w) for w in writers])]).astype(np.int64)
        self._writer_slot = np.array([s for w in writers for s, _ in w], dtype=np.int64)
        self._writer_split = np.array([split for w in writers for _, split in w], dtype=np.int8)

    def reset(self) -> None:
        """Nothing is split but the inputs."""
        n, t = len(self.tables.ops), len(self._base)
        self.place = self._base.copy()
        self._active = np.zeros(len(self.slots), dtype=np.bool_)
        self._dim_of: dict[int, int] = {}
        self._cost, self._chosen = self.tables.price_ops(self.place)
        self._mark, self._stamp = np.zeros(n, dtype=np.int64), 0
        self._log, self._old = np.zeros(t, dtype=np.int64), np.zeros(t, dtype=np.int8)
        self._dirty, self._wanted = np.zeros(n, dtype=np.int64), np.zeros(len(self._tensors), dtype=np.int8)
        self._taken: list[tuple[int, bool, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        self._step: float | None = None

    def set(self, slot: int | SlotLike, value: int) -> None:
        """Split a slot (1) or replicate it (0).

        Raises:
            PlanError: a dim that the columns do not divide, or another dim of the variable is split already.
            ValueError: any other value, or no such slot.
        """
        number = slot if isinstance(slot, int) else self.slots.index(slot)
        if not 0 <= number < len(self.slots) or value not in (0, 1):
            raise ValueError(f"slot {slot} cannot be set to {value}: there are {len(self.slots)} slots, each 0 or 1")
        before = bool(self._active[number])
        if value and not before:
            self._check(number)
        if bool(value) == before:
            empty = np.zeros(0, dtype=np.int64)
            self._taken.append((number, before, empty, empty, empty, empty))
            return
        self._mark_slot(number, bool(value))
        first, last = self._values_ptr[number], self._values_ptr[number + 1]
        wanted = self._wanted[: last - first]
        one = np.array([number], dtype=np.int64)
        kernels.winners(
            *(one, self._values_ptr, self._writer_ptr, self._writer_slot, self._writer_split),
            *(self._active, self._base, self._tensors, wanted),
        )
        self._stamp += 1
        changed, count = kernels.set_places(
            *(self._tensors[first:last], wanted, self.place, self._ops_ptr, self._ops_of),
            *(self._mark, self._stamp, self._log, self._old, self._dirty),
        )
        dirty = self._dirty[:count].copy()
        kept = self._cost[dirty]
        self._taken.append((number, before, self._log[:changed].copy(), self._old[:changed].copy(), dirty, kept))
        kernels.price_ops(dirty, self.place, *self.tables.row_arrays, self._cost, self._chosen)
        self._step = None

    def _check(self, number: int) -> None:
        slot, info = self.slots[number], self.graph.tensors[self.slots[number].variable]
        if not self._possible[number]:
            raise PlanError(
                f"dim {slot.dim} of {info.name} {list(info.shape)} cannot be split over {self._stage.ways} devices"
            )
        taken = [tensor for tensor in self.members[number] if tensor in self._dim_of]
        if taken:
            raise PlanError(
                f"{self.graph.tensors[taken[0]].name} is split on dim {self._dim_of[taken[0]]} already: take that back first"
            )

    def _mark_slot(self, number: int, active: bool) -> None:
        self._active[number] = active
        for tensor in self.members[number]:
            if active:
                self._dim_of[tensor] = self.slots[number].dim
            else:
                self._dim_of.pop(tensor, None)

    def undo(self) -> None:
        """Take the last `set` back; ValueError where there is none."""
        if not self._taken:
            raise ValueError("there is no decision to take back")
        number, before, tensors, old, dirty, kept = self._taken.pop()
        if bool(self._active[number]) != before:
            self._mark_slot(number, before)
        self.place[tensors] = old
        self._cost[dirty] = kept
        self._step = None

    @property
    def step_s(self) -> float:
        """Seconds of a step, memory left aside."""
        if self._step is None:
            tables = self.tables
            forward, backward, _, exposed = tables.finish(self._cost, tables.sync(self.place), self.overlap)
            update = update_seconds(tables.variable_bytes(self.place), self.topology)
            self._step = self.micro_batches * (forward + backward) + (exposed + update)
        return self._step

    @property
    def memory_bytes(self) -> float:
        """Bytes on each device."""
        return memory_of(self.tables, self.place, self.micro_batches).total

    @property
    def feasible(self) -> bool:
        """Whether they fit."""
        return self.memory_bytes <= self.topology.memory_limit

    def plan(self) -> Plan:
        """The plan as decided so far."""
        splits = {**self._inputs, **self._dim_of}
        splits |= {tensor: REPLICATED for tensors in self.members for tensor in tensors if tensor not in splits}
        stage = StagePlan(0, len(self.graph.ops) - 1, self._stage.devices, self._stage.data, splits)
        return Plan(self.graph.digest, self.topology.name, (stage,), self.micro_batches)
