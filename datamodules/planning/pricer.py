"""The cost of a step while decisions are taken and taken back, one at a time: what environments and searchers ask for.

A decision places the tensors that propagation determines; only the operations that touch them are priced again, and only once
somebody asks. The same placement costs the same, to the last bit, however it was reached, and the same as `price` of the plan.
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
from datamodules.planning.slot_table import in_rows
from datamodules.planning.tables import build
from datamodules.planning.topology import Topology

kernels: Any = _price_numba
KNOWN = 2**14  # operations with their operands' places whose seconds are remembered


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
        self._touching = self.tables.touching()
        self._base_cost, _ = self.tables.price_ops(self._base)
        self._known = np.zeros(KNOWN, dtype=np.int64), np.full(KNOWN, -1), np.zeros(KNOWN)  # see `price_known`
        # Splitting only takes bytes away, and bytes are whole numbers, so what fits before still fits after.
        self._base_fits = 0 if self._bytes(self._base) <= topology.memory_limit else None
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
        order = sorted(range(len(writes)), key=lambda s: (rank[self.slots[s].variable], self.slots[s].dim))
        writers: list[list[tuple[int, int]]] = [[] for _ in small.tensors]
        for slot_number in order:
            for tensor, split in writes[slot_number]:
                writers[tensor].append((slot_number, split))
        splits = [split for row in writers for _, split in row]
        self._writes = (
            *in_rows([[tensor for tensor, _ in written] for written in writes]),
            *in_rows([[number for number, _ in row] for row in writers]),
            np.array(splits, dtype=np.int8),
        )
        owners: dict[int, list[int]] = {}
        for number, tensors in enumerate(self.members):
            for tensor in tensors:
                owners.setdefault(tensor, []).append(number)
        self._rivals = [
            sorted({n for tensor in tensors for n in owners[tensor]} - {number})
            for number, tensors in enumerate(self.members)
        ]

    def reset(self) -> None:
        """Nothing is split but the inputs."""
        n, t = len(self.tables.ops), len(self._base)
        self._place, self._cost = self._base.copy(), self._base_cost.copy()
        self._active = np.zeros(len(self.slots), dtype=np.bool_)
        self._seen, self._mark, self._stamp = np.zeros(t, dtype=np.int64), np.zeros(n, dtype=np.int64), 0
        self._log, self._old = np.zeros(t, dtype=np.int64), np.zeros(t, dtype=np.int8)
        self._dirty, self._kept = np.zeros(n, dtype=np.int64), np.zeros(n)
        self._taken: list[tuple[int, bool]] = []  # (slot, whether it was split before)
        self._priced = 0  # how many of them `_place` and `_cost` know
        self._batches: list[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []  # how to go back, see undo
        self._fits = self._base_fits  # decisions after which memory suffices whatever else is split; None if unknown
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
        self._taken.append((number, before))
        if bool(value) != before:
            self._active[number] = bool(value)
            self._step = None
            if before:
                self._fits = self._base_fits

    def _check(self, number: int) -> None:
        slot, info = self.slots[number], self.graph.tensors[self.slots[number].variable]
        if not self._possible[number]:
            raise PlanError(
                f"dim {slot.dim} of {info.name} {list(info.shape)} cannot be split over {self._stage.ways} devices"
            )
        if any(self._active[rival] for rival in self._rivals[number]):
            dims = self._dims()
            taken = next(tensor for tensor in self.members[number] if tensor in dims)
            raise PlanError(
                f"{self.graph.tensors[taken].name} is split on dim {dims[taken]} already: take that back first"
            )

    def _dims(self) -> dict[int, int]:
        """The split variables with their dims."""
        active = np.flatnonzero(self._active).tolist()
        return {tensor: self.slots[number].dim for number in active for tensor in self.members[number]}

    def _follow(self) -> None:
        """Place and price what has been decided since the last time."""
        if self._priced == len(self._taken):
            return
        slots = np.array([number for number, _ in self._taken[self._priced :]], dtype=np.int64)
        self._stamp += 1
        changed, count = kernels.follow(
            *(slots, self._writes, self._active, self._base, self._place, *self._touching),
            *(self._seen, self._mark, self._stamp, self._log, self._old, self._dirty, self._kept, self._cost),
        )
        kernels.price_known(self._dirty[:count], self._place, *self._known, *self.tables.row_arrays, self._cost)
        before = (self._log[:changed], self._old[:changed], self._dirty[:count], self._kept[:count])
        tensors, places, ops, seconds = (array.copy() for array in before)
        self._batches.append((self._priced, tensors, places, ops, seconds))
        self._priced = len(self._taken)

    def undo(self) -> None:
        """Take the last `set` back; ValueError where there is none."""
        if not self._taken:
            raise ValueError("there is no decision to take back")
        number, before = self._taken.pop()
        if bool(self._active[number]) != before:
            self._active[number] = before
            self._step = None
        if len(self._taken) < self._priced:
            self._priced, tensors, places, ops, seconds = self._batches.pop()
            self._place[tensors], self._cost[ops] = places, seconds
        if self._fits is not None and len(self._taken) < self._fits:
            self._fits = self._base_fits

    @property
    def place(self) -> np.ndarray:
        """Placement of every tensor (T,), int8."""
        self._follow()
        return self._place

    @property
    def step_s(self) -> float:
        """Seconds of a step, memory left aside."""
        if self._step is None:
            tables = self.tables
            forward, backward, exposed, held = kernels.parts(
                *(self.place, self._cost, tables.backward_N, tables.maker_V, tables.gradient_V, tables.variable_V),
                *(tables.sums_V4, tables.across_V2, tables.size_T, tables.devices, self.overlap),
            )
            self._step = self.micro_batches * (forward + backward) + (exposed + update_seconds(held, self.topology))
        return self._step

    @property
    def memory_bytes(self) -> float:
        """Bytes on each device."""
        return self._bytes(self.place)

    def _bytes(self, place: np.ndarray) -> float:
        return memory_of(self.tables, place, self.micro_batches).total

    @property
    def feasible(self) -> bool:
        """Whether they fit."""
        if self._fits is None and self.memory_bytes <= self.topology.memory_limit:
            self._fits = len(self._taken)
        return self._fits is not None

    def plan(self) -> Plan:
        """The plan as decided so far."""
        splits = {**self._inputs, **self._dims()}
        splits |= {tensor: REPLICATED for tensors in self.members for tensor in tensors if tensor not in splits}
        stage = StagePlan(0, len(self.graph.ops) - 1, self._stage.devices, self._stage.data, splits)
        return Plan(self.graph.digest, self.topology.name, (stage,), self.micro_batches)
