"""The choice of a placement for every tensor of a stage as an integer programme over the same tables as the price.

Variables, all between 0 and 1: z[t, a], tensor t lies as a; y[o, r], operation o runs by rule r; e[o, i, a, b], operand i
of o is brought from a to b. One placement a tensor, one rule an operation, and the moves between them as a flow; only z
must be whole, since with z whole the rest is a shortest choice for each operation alone. Gradients that run beside the
backward pass add a chain of free variables. Differs from Alpa's, which has a variable for each pair of strategies of
neighbours.

Source: Alpa (OSDI 2022) section 4 for the idea; the flow form as in autoparallel.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy import sparse

from datamodules.planning.placement import PARTIAL, REPLICATED
from datamodules.planning.price import move_kind
from datamodules.planning.roofline import update_seconds
from datamodules.planning.tables import MOVES, Tables

UNIT = 1e6  # the programme counts microseconds, since HiGHS's tolerances are absolute


@dataclass
class Program:
    """minimise cost x subject to low <= A x <= high, 0 <= x (free where said), whole where said."""

    cost: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    least: list[float] = field(default_factory=list)
    most: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)

    def variable(self, cost: float = 0.0, whole: bool = False, least: float = 0.0, most: float = 1.0) -> int:
        self.cost.append(cost)
        self.whole.append(whole)
        self.least.append(least)
        self.most.append(most)
        return len(self.cost) - 1

    def constraint(self, terms: Iterable[tuple[int, float]], low: float, high: float) -> int:
        row = len(self.low)
        for column, value in terms:
            self.rows.append(row)
            self.columns.append(column)
            self.values.append(value)
        self.low.append(low)
        self.high.append(high)
        return row

    def matrix(self) -> sparse.csr_array:
        shape = (len(self.low), len(self.cost))
        return sparse.coo_array((self.values, (self.rows, self.columns)), shape=shape).tocsr()


@dataclass
class Sharding:
    """A programme for one stage, and which of its variables mean what."""

    tables: Tables
    program: Program
    place: dict[int, dict[int, int]]  # tensor -> placement -> variable
    limits: int = 0  # constraints on memory

    def chosen(self, solution: np.ndarray) -> np.ndarray:
        """Placement (T,) by the largest z of each tensor; replicated where nothing touches it."""
        found = np.full(len(self.tables.size_T), REPLICATED, dtype=np.int8)
        for tensor, options in self.place.items():
            found[tensor] = max(options, key=lambda split: solution[options[split]])
        return found

    def fractional(self, solution: np.ndarray) -> int:
        """How many z are not whole."""
        values = solution[[column for options in self.place.values() for column in options.values()]]
        return int((np.abs(values - np.round(values)) > 1e-5).sum())

    def limit_memory(self, position: int, held_bytes: float, limit: float) -> None:
        """Forbid that what is alive at one operation, with all that stays, exceeds the limit."""
        k, size = self.tables.devices, self.tables.size_T
        self.limits += 1
        weight: dict[int, float] = {int(t): 4 * size[t] for t in self.tables.variable_V}
        for tensor in alive(self.tables, position):
            weight[tensor] = weight.get(tensor, 0.0) + size[tensor]
        terms, fixed = [], held_bytes
        for tensor, amount in weight.items():
            for split, column in self.place.get(tensor, {}).items():
                terms.append((column, amount / limit / (k if split >= 0 else 1)))
            if tensor not in self.place:
                fixed += amount
        self.program.constraint(terms, -np.inf, 1 - fixed / limit)


def alive(tables: Tables, position: int) -> set[int]:
    """Activations alive while an operation runs."""
    alloc_ptr, allocs, free_ptr, frees = tables.memory
    return set(allocs[: alloc_ptr[position + 1]].tolist()) - set(frees[: free_ptr[position]].tolist())


def formulate(
    tables: Tables,
    micro_batches: int = 1,
    overlap: bool = True,
    fixed: Mapping[int, int] | None = None,
) -> Sharding:
    """The programme of a stage.

    Args:
        fixed: tensor -> placement, where that is not to be chosen.
    """
    program, place = Program(), {}
    options = candidates(tables)
    for tensor, allowed in options.items():
        if fixed and tensor in fixed:
            allowed = [fixed[tensor]]
        place[tensor] = {split: program.variable(whole=len(allowed) > 1) for split in allowed}
        program.constraint([(column, 1.0) for column in place[tensor].values()], 1, 1)
    sharding = Sharding(tables, program, place)
    spans: list[list[tuple[int, float]]] = []
    for position in range(len(tables.ops)):
        spans.append(_operation(sharding, position, micro_batches))
    syncs = _gradients(sharding)
    for tensor in tables.variable_V.tolist():
        whole = UNIT * update_seconds(float(tables.size_T[tensor]), tables.topology)
        for split, column in place[tensor].items():
            program.cost[column] += whole / (tables.devices if split >= 0 else 1)
    _exposed(sharding, spans, syncs, micro_batches, overlap)
    return sharding


def candidates(tables: Tables) -> dict[int, list[int]]:
    """Where each tensor may lie: as some rule of an operation that touches it has it; variables and inputs never partial."""
    found: dict[int, set[int]] = {}
    for position in range(len(tables.ops)):
        first, last = tables.operand_ptr[position], tables.operand_ptr[position + 1]
        rules = tables.rules[tables.table_of_N[position]]
        for i, tensor in enumerate(tables.operands[first:last].tolist()):
            if tensor >= 0:
                splits = found.setdefault(tensor, {REPLICATED})
                splits.update((*placed.row[0], *placed.row[1])[i] for placed in rules)
    graph = tables.graph
    for tensor in (*(p.tensor for p in graph.parameters), *graph.inputs, *graph.buffers):
        found.get(tensor, set()).discard(PARTIAL)
    return {tensor: sorted(splits) for tensor, splits in found.items()}


def move_time(before: int, after: int, moves: np.ndarray) -> float:
    """Time of one move, as the price has it."""
    kind = move_kind(before, after)
    return UNIT * float(moves[MOVES.index(kind)]) if kind else 0.0


def _operation(sharding: Sharding, position: int, micro_batches: int) -> list[tuple[int, float]]:
    """Rules and moves of one operation; returns (variable, time) of one micro-batch."""
    tables, program = sharding.tables, sharding.program
    first, last = tables.operand_ptr[position], tables.operand_ptr[position + 1]
    table = tables.table_of_N[position]
    seconds = tables.row_seconds[tables.row_ptr[table] : tables.row_ptr[table + 1]]
    rows = [(*placed.row[0], *placed.row[1]) for placed in tables.rules[table]]
    ys = [program.variable() for _ in rows]
    spent = [(y, UNIT * float(s)) for y, s in zip(ys, seconds, strict=True)]
    program.constraint([(y, 1.0) for y in ys], 1, 1)
    for i, tensor in enumerate(tables.operands[first:last].tolist()):
        if tensor < 0:
            continue
        made = i >= tables.inputs_N[position]
        by_split: dict[int, list[int]] = {}
        for y, row in zip(ys, rows, strict=True):
            by_split.setdefault(row[i], []).append(y)
        spent += _flow(sharding, tensor, by_split, made)
    for column, s in spent:
        program.cost[column] += micro_batches * s
    return [(column, s) for column, s in spent if s]


def _flow(sharding: Sharding, tensor: int, by_split: Mapping[int, list[int]], made: bool) -> list[tuple[int, float]]:
    """Moves between where a tensor lies and where an operation wants or makes it."""
    program, places = sharding.program, sharding.place[tensor]
    moves = sharding.tables.moves_T4[tensor]
    if len(places) == 1:
        (here,) = places
        spent = []
        for split, ys in by_split.items():
            cost = move_time(split, here, moves) if made else move_time(here, split, moves)
            spent += [(y, cost) for y in ys if cost]
        return spent
    edges: dict[tuple[int, int], int] = {}
    spent = []
    for here in places:
        for split in by_split:
            column = edges[here, split] = program.variable()
            cost = move_time(split, here, moves) if made else move_time(here, split, moves)
            if cost:
                spent.append((column, cost))
    for here, column in places.items():
        program.constraint([(column, -1.0), *((edges[here, split], 1.0) for split in by_split)], 0, 0)
    for split, ys in by_split.items():
        program.constraint([*((y, -1.0) for y in ys), *((edges[here, split], 1.0) for here in places)], 0, 0)
    return spent


def _gradients(sharding: Sharding) -> list[list[tuple[int, float]]]:
    """(variable, time) of bringing each gradient to its variable, in the tables' order."""
    tables, program, found = sharding.tables, sharding.program, []
    for v in range(len(tables.variable_V)):
        gradient, tensor = int(tables.gradient_V[v]), int(tables.variable_V[v])
        spent: list[tuple[int, float]] = []
        if gradient >= 0:
            sources, targets = sharding.place[gradient], sharding.place[tensor]
            for after, column in targets.items():
                spent.append((column, UNIT * float(tables.across_V2[v, 1 if after >= 0 else 0])))
            edges = {(a, b): program.variable() for a in sources for b in targets}
            for (a, b), column in edges.items():
                spent.append((column, move_time(a, b, tables.sums_V4[v])))
            for a, column in sources.items():
                program.constraint([(column, -1.0), *((edges[a, b], 1.0) for b in targets)], 0, 0)
            for b, column in targets.items():
                program.constraint([(column, -1.0), *((edges[a, b], 1.0) for a in sources)], 0, 0)
        found.append([(column, s) for column, s in spent if s])
    return found


def _exposed(
    sharding: Sharding,
    spans: list[list[tuple[int, float]]],
    syncs: list[list[tuple[int, float]]],
    micro_batches: int,
    overlap: bool,
) -> None:
    """Add what the backward pass does not hide of the gradients: the largest, over gradients, of what is still to be summed
    when each is made less what is still to be computed."""
    tables, program = sharding.tables, sharding.program
    if not overlap:
        for spent in syncs:
            for column, s in spent:
                program.cost[column] += s
        return
    exposed = program.variable(cost=1.0, most=np.inf)
    later: int | None = None
    end = len(tables.ops)
    for v in reversed(range(len(syncs))):
        maker = int(tables.maker_V[v])
        terms: dict[int, float] = {}
        for column, s in syncs[v]:
            terms[column] = terms.get(column, 0.0) + s
        for position in range(maker + 1, end):
            for column, s in spans[position]:
                terms[column] = terms.get(column, 0.0) - s
        end = maker + 1
        here = program.variable(least=-np.inf, most=np.inf)
        chain = [(here, -1.0), *terms.items()]
        if later is not None:
            chain.append((later, 1.0))
        program.constraint(chain, 0, 0)
        program.constraint([(exposed, 1.0), (here, -1.0)], 0, np.inf)
        later = here
