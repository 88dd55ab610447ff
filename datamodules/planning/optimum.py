"""The best plan there is, with a proof: operator partitioning by linear and integer programming over the cost model itself.

First the linear relaxation (a bound that no plan is below), its solution rounded and priced; where price and bound meet, the
plan is proven. Otherwise HiGHS branches until they do or time is up. Memory is a hard limit: where the plan found does not fit,
the moment at which it is fullest becomes a constraint and the programme is solved again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import optimize

from datamodules.planning.graph import Graph
from datamodules.planning.linkage import Decisions
from datamodules.planning.memory import memory_of
from datamodules.planning.placement import REPLICATED, RowsOf, full_rows, settle, spread
from datamodules.planning.plan import Plan, StagePlan
from datamodules.planning.price import Evaluator
from datamodules.planning.program import UNIT, Sharding, formulate
from datamodules.planning.roofline import update_seconds
from datamodules.planning.tables import Tables, kernels
from datamodules.planning.topology import Topology

TIGHT = 1e-6  # relative distance of value and bound that counts as none
PASSES = 4  # over all tensors, when a rounded solution is improved
MEMORY_ROUNDS = 12


class NoPlan(ValueError):
    """No plan fits; the message says what stands in the way, and by how many bytes."""


@dataclass(frozen=True)
class Optimal:
    """A plan, what it costs, and a bound that no plan in the same space is below.

    Attributes:
        value, bound: seconds of a step.
        seconds: what finding and proving took.
        certificate: how it is known.
    """

    plan: Plan
    value: float
    bound: float
    seconds: float
    certificate: str
    size: Mapping[str, int] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """(value - bound) / value."""
        return max(self.value - self.bound, 0.0) / self.value if self.value > 0 else 0.0

    @property
    def proven(self) -> bool:
        return self.gap <= TIGHT


def value_of(tables: Tables, place_T: np.ndarray, topology: Topology, micro_batches: int, overlap: bool) -> float:
    """Seconds of a step, as `price` has them for a plan of one stage."""
    cost_N, _ = tables.price_ops(place_T)
    forward, backward, _, exposed = tables.finish(cost_N, tables.sync(place_T), overlap)
    return micro_batches * (forward + backward) + (exposed + update_seconds(tables.variable_bytes(place_T), topology))


def sharding_optimum(
    graph: Graph,
    topology: Topology,
    data: int = 1,
    micro_batches: int = 1,
    overlap: bool = True,
    fixed: Mapping[int, int] | None = None,
    time_limit: float = 600.0,
    precision: float = TIGHT,
    rows_of: RowsOf = full_rows,
    devices: Sequence[int] | None = None,
) -> Optimal:
    """The best placement of every tensor, variables included, over the columns of a mesh of `data` rows, in one stage.

    Args:
        fixed: tensor -> placement, where that is not to be chosen.
        time_limit: seconds for HiGHS; what is best then comes back, with the bound reached.
        precision: how far value and bound may lie apart, as a share of the value, for the search to stop.
        devices: those of the mesh; all by default.
    Raises:
        NoPlan: nothing fits into memory.
        PlanError: rows that do not divide devices or batch.
    """
    started = time.perf_counter()
    evaluator = Evaluator(graph, topology, overlap, rows_of)
    every = tuple(range(topology.devices)) if devices is None else tuple(devices)
    stage = StagePlan(0, len(graph.ops) - 1, every, data)
    tables = evaluator.tables(stage, tuple(range(len(graph.ops))), micro_batches)
    sharding = formulate(tables, micro_batches, overlap, fixed)
    solved = _solve(sharding, topology, micro_batches, overlap, time_limit, precision)
    placed = {t: int(split) for t, split in enumerate(solved.place)}
    seeds = {*(p.tensor for p in graph.parameters), *graph.inputs}
    stage = StagePlan(0, stage.last_op, every, data, {t: placed[t] for t in sorted(seeds)}, placed)
    plan = Plan(graph.digest, topology.name, (stage,), micro_batches)
    return Optimal(plan, solved.value, solved.bound, time.perf_counter() - started, solved.certificate, solved.size)


@dataclass(frozen=True)
class _Solved:
    place: np.ndarray
    value: float
    bound: float
    certificate: str
    size: dict[str, int]


def _solve(
    sharding: Sharding,
    topology: Topology,
    micro_batches: int,
    overlap: bool,
    time_limit: float,
    precision: float = TIGHT,
    improve: bool = True,
) -> _Solved:
    """Relax, round, and branch where they differ; again with a constraint more while memory does not suffice."""
    tables, started = sharding.tables, time.perf_counter()
    for rounds in range(MEMORY_ROUNDS):
        left = max(time_limit - (time.perf_counter() - started), 1.0)
        solved = _once(sharding, topology, micro_batches, overlap, left, precision, improve)
        memory = memory_of(tables, solved.place, micro_batches)
        if memory.total <= topology.memory_limit:
            extra = f"; {rounds} memory constraints" if rounds else ""
            return _Solved(solved.place, solved.value, solved.bound, solved.certificate + extra, solved.size)
        position, held = _fullest(tables, solved.place, micro_batches)
        sharding.limit_memory(position, held + memory.buffers, topology.memory_limit)
    raise NoPlan(
        memory_of(tables, solved.place, micro_batches).violation(topology, "the plan found last") or "no plan fits"
    )


def _fullest(tables: Tables, place_T: np.ndarray, micro_batches: int) -> tuple[int, float]:
    """The operation at which memory peaks, and the bytes kept of other micro-batches."""
    alloc_ptr, allocs, free_ptr, frees = tables.memory
    local = np.where(place_T >= 0, tables.size_T / tables.devices, tables.size_T)
    gained = np.concatenate([[0.0], np.cumsum(local[allocs])])[alloc_ptr[1:]]
    lost = np.concatenate([[0.0], np.cumsum(local[frees])])[free_ptr[:-1]]
    _, kept = tables.live(place_T)
    return int(np.argmax(gained - lost)), (micro_batches - 1) * kept


def _once(
    sharding: Sharding,
    topology: Topology,
    micro_batches: int,
    overlap: bool,
    time_limit: float,
    precision: float,
    improve: bool,
) -> _Solved:
    program, tables, started = sharding.program, sharding.tables, time.perf_counter()
    cost, matrix = np.array(program.cost), program.matrix()
    bounds = optimize.Bounds(np.array(program.least), np.array(program.most))
    rules = optimize.LinearConstraint(matrix, np.array(program.low), np.array(program.high))
    size = {"variables": len(cost), "whole": int(sum(program.whole)), "constraints": len(program.low)}

    def finished(solution: np.ndarray) -> tuple[bool, float, np.ndarray]:
        """Whether a memory constraint is broken by rounding, seconds of a step, placements."""
        place, rounded = sharding.chosen(solution), sharding.fractional(solution) > 0
        if improve and rounded:
            place = _descended(sharding, place, topology, micro_batches, overlap)
        broken = rounded and sharding.limits > 0
        broken = broken and memory_of(tables, place, micro_batches).total > topology.memory_limit
        return broken, value_of(tables, place, topology, micro_batches, overlap), place

    relaxed = optimize.milp(cost, bounds=bounds, constraints=rules, options={"time_limit": time_limit})
    if relaxed.status == 2:
        raise NoPlan(_too_large(tables, topology))
    best: tuple[bool, float, np.ndarray] | None = None
    bound = -np.inf
    if relaxed.x is not None and relaxed.status == 0:
        bound, size["fractional"] = float(relaxed.fun) / UNIT, sharding.fractional(relaxed.x)
        if improve or not size["fractional"]:
            best = finished(relaxed.x)
            if not best[0] and best[1] - bound <= precision * best[1]:
                return _Solved(best[2], best[1], bound, "the linear relaxation reaches the same value", size)
    left = max(time_limit - (time.perf_counter() - started), 1.0)
    options = {"time_limit": left, "mip_rel_gap": precision / 2}
    whole = optimize.milp(cost, integrality=np.array(program.whole), bounds=bounds, constraints=rules, options=options)
    if whole.status == 2:
        raise NoPlan(_too_large(tables, topology))
    if whole.x is not None:
        other = finished(whole.x)
        best = other if best is None or other[:2] <= best[:2] else best
    if whole.mip_dual_bound is not None:
        bound = max(bound, float(whole.mip_dual_bound) / UNIT)
    if best is None:
        raise NoPlan(f"{tables.graph.name}: no plan was found within {time_limit:.0f} s; allow more time")
    reached = (best[1] - bound) / best[1]
    done = f"branch and bound closed the gap to {max(reached, 0):.1e}"
    return _Solved(
        best[2], best[1], bound, done if reached <= precision else f"time is up at a gap of {reached:.3%}", size
    )


def _descended(
    sharding: Sharding, place_T: np.ndarray, topology: Topology, micro_batches: int, overlap: bool
) -> np.ndarray:
    """A rounded solution after moving single tensors while that helps; as it was where memory would not suffice then."""
    tables = sharding.tables
    rows = [list(sharding.place.get(t, {})) for t in range(len(place_T))]
    touch_ptr, touching = tables.touching()
    better, (cost_N, chosen_N) = place_T.copy(), tables.price_ops(place_T)
    update = np.array([update_seconds(float(tables.size_T[t]), topology) for t in tables.variable_V])
    kernels.descend(
        *(better, np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)),
        *(np.array([split for row in rows for split in row], dtype=np.int8), touch_ptr, touching, *tables.row_arrays),
        *(cost_N, chosen_N, tables.backward_N, tables.maker_V, tables.gradient_V, tables.variable_V, tables.sums_V4),
        *(tables.across_V2, update, tables.devices, micro_batches, overlap, PASSES),
    )
    fits = memory_of(tables, better, micro_batches).total <= topology.memory_limit
    return better if fits else place_T


def _too_large(tables: Tables, topology: Topology) -> str:
    """Why memory cannot suffice: even with every variable split."""
    least = 4 * float(tables.size_T[tables.variable_V].sum()) / tables.devices
    over = least - topology.memory_limit
    cause = (
        f"its variables, gradients and optimiser state alone are {least:,.0f} bytes on each of {tables.devices} devices, "
        f"{over:,.0f} too many"
        if over > 0
        else "with its activations it exceeds the limit wherever they lie"
    )
    return (
        f"{tables.graph.name} does not fit on topology {topology.name} ({topology.memory_limit:,} bytes a device): {cause}; "
        "take more devices, more micro-batches or a smaller batch"
    )


def paper_optimum(
    graph: Graph,
    topology: Topology,
    decided: Decisions,
    data: int = 1,
    inputs: Mapping[int, int] | None = None,
    overlap: bool = True,
    time_limit: float = 600.0,
) -> Optimal:
    """The best plan in the paper's space: each dim of each variable split over all columns, or not, by linkage groups.

    One 0/1 variable for each family of slots that are split together; at most one of two that exclude each other; every tensor
    that a family determines follows it. Interior tensors that nothing determines stay as `inputs` has them.

    Raises:
        NoPlan: nothing fits into memory.
    """
    started = time.perf_counter()
    evaluator = Evaluator(graph, topology, overlap)
    stage = StagePlan(0, len(graph.ops) - 1, tuple(range(topology.devices)), data)
    tables = evaluator.tables(stage, tuple(range(len(graph.ops))), 1)
    base = settle(tables.graph, tables.devices, dict(inputs or {}))
    writers = _writers(tables, decided)
    written = {t for family in writers for t, _ in family}
    sharding = formulate(tables, 1, overlap, {t: s for t, s in enumerate(base) if t not in written})
    switches = _switches(sharding, decided, writers, base)
    solved = _solve(sharding, topology, 1, overlap, time_limit, improve=False)  # families move together
    on = [f for f, family in enumerate(writers) if all(solved.place[t] == s for t, s in family)]
    splits = dict(inputs or {}) | {p.tensor: REPLICATED for p in graph.parameters}
    for f in on:
        for slot in decided.families[f]:
            for tensor in decided.members[decided.variable[slot]]:
                splits[tensor] = decided.slots[slot].dim
    chosen = StagePlan(0, stage.last_op, stage.devices, data, splits)
    plan = Plan(graph.digest, topology.name, (chosen,))
    value = evaluator.price(plan).step_s
    size = {**solved.size, "families": len(switches)}
    return Optimal(plan, value, solved.bound, time.perf_counter() - started, solved.certificate, size)


def _writers(tables: Tables, decided: Decisions) -> list[dict[int, int].items]:  # type: ignore[valid-type]
    found = []
    for family in decided.families:
        written: dict[int, int] = {}
        for slot in family:
            for tensor in decided.members[decided.variable[slot]]:
                for t, s in spread(tables.graph, tables.devices, tensor, decided.slots[slot].dim):
                    written.setdefault(t, s)
        found.append(written.items())
    return found


def _switches(sharding: Sharding, decided: Decisions, writers: Sequence, base: Sequence[int]) -> list[int]:
    """One variable for each family; a tensor lies as a family that is on writes it, and else as before."""
    program = sharding.program
    switches = [program.variable(whole=True) for _ in writers]
    for a, b in decided.exclusions:
        program.constraint([(switches[a], 1.0), (switches[b], 1.0)], 0, 1)
    by_place: dict[int, dict[int, list[int]]] = {}
    for switch, family in zip(switches, writers, strict=True):
        for tensor, split in family:
            by_place.setdefault(tensor, {}).setdefault(split, []).append(switch)
    for tensor, options in sharding.place.items():
        if tensor not in by_place:
            continue
        for split, column in options.items():
            causes = by_place[tensor].get(split, [])
            if split == base[tensor]:
                continue
            for cause in causes:
                program.constraint([(column, 1.0), (cause, -1.0)], 0, np.inf)
            program.constraint([(column, 1.0), *((cause, -1.0) for cause in causes)], -np.inf, 0)
    return switches
