"""What a plan costs: seconds of a training step by cause, bytes on each device, and whether it fits.

A stage's time is its operations' (roofline) and what brings their operands together (alpha-beta); gradient sums run beside the
backward pass of the last micro-batch as far as they fit there. Stages then follow the pipeline's schedule.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from datamodules.planning.collectives import transfer
from datamodules.planning.graph import Graph
from datamodules.planning.memory import Memory, memory_of
from datamodules.planning.pipeline import Timeline, in_flight, step_length, timeline
from datamodules.planning.placement import RowsOf, Spread, batch_places, cached, full_rows, settle, shrink, spread
from datamodules.planning.plan import Plan, PlanError, StagePlan, batch_of, pure_data_parallel, stage_of_ops
from datamodules.planning.pricer import PartitionPricer
from datamodules.planning.roofline import update_seconds
from datamodules.planning.tables import MOVES, Tables, build, hidden
from datamodules.planning.topology import Topology

__all__ = ["Breakdown", "Evaluator", "PartitionPricer", "StageCost", "price", "pure_data_parallel"]

GRADIENTS, TIED = "gradient_sum", "tied_sum"


@dataclass(frozen=True)
class StageCost:
    """One stage: seconds of one micro-batch forwards and backwards, of a whole step by cause, and memory.

    `collective_s` has the kinds of moves inside the stage, `gradient_sum`, and `tied_sum`: gradients of variables that another
    stage reads too. `overlap_s` is how much of the latter the
    backward pass hides. `tail_s` is what follows the last backward: the rest of the gradient sums and Adam's step.
    """

    devices: tuple[int, ...]
    forward_s: float
    backward_s: float
    compute_s: float
    collective_s: Mapping[str, float]
    overlap_s: float
    update_s: float
    tail_s: float
    memory: Memory
    held: int
    moves: tuple[Move, ...] = field(repr=False, default=())

    @property
    def busy_s(self) -> float:
        """Seconds of a step in which the stage computes or waits for its own communication."""
        return self.compute_s + self.update_s + sum(self.collective_s.values()) - self.overlap_s


@dataclass(frozen=True)
class Move:
    """One communication inside a stage: which operation (or gradient) causes it, of which tensor, seconds of a step."""

    kind: str
    op: int
    tensor: int
    seconds: float


@dataclass(frozen=True)
class Breakdown:
    """What a plan costs. step_s = compute_s + update_s + all of collective_s - overlap_s + bubble_s.

    Of several stages these are of the one that ends the step, and `bubble_s` is when it waits for others; `send_s` is the time
    of one micro-batch on the hops, part of that wait. `memory_bytes` is the fullest device, by part.
    """

    step_s: float
    compute_s: float
    update_s: float
    collective_s: Mapping[str, float]
    overlap_s: float
    bubble_s: float
    send_s: float
    memory_bytes: Mapping[str, float]
    feasible: bool
    violations: tuple[str, ...]
    batch: int
    stages: tuple[StageCost, ...]
    line: Timeline | None = field(default=None, repr=False)

    @property
    def throughput(self) -> float:
        """Examples a second."""
        return self.batch / self.step_s

    @property
    def bubble_share(self) -> float:
        return self.bubble_s / self.step_s


class Evaluator:
    """Prices plans of one graph on one topology, keeping what several plans share.

    Args:
        overlap: whether gradient sums run beside the backward pass.
        rows_of, spread_of: rules and propagation; those of the suite by default.
    """

    def __init__(
        self,
        graph: Graph,
        topology: Topology,
        overlap: bool = True,
        rows_of: RowsOf = full_rows,
        spread_of: Callable[[Graph, int, int, int], Spread] = spread,
    ) -> None:
        self.graph, self.topology, self.overlap = graph, topology, overlap
        self.rows_of, self.spread_of = cached(rows_of), spread_of
        self._graphs: dict[int, Graph] = {1: graph}
        self._tables: dict[tuple, Tables] = {}
        self._places: dict[int, int] | None = None

    def shrunk(self, ways: int) -> Graph:
        """The graph on 1/ways of the batch."""
        if ways not in self._graphs:
            self._graphs[ways] = shrink(self.graph, ways, self.rows_of)
        return self._graphs[ways]

    def tables(self, stage: StagePlan, ops: tuple[int, ...], micro_batches: int) -> Tables:
        """Arrays of a stage."""
        key = (stage.devices, stage.data, ops if len(ops) < len(self.graph.ops) else None, micro_batches)
        if key not in self._tables:
            small = self.shrunk(stage.data * micro_batches)
            self._tables[key] = build(small, ops, stage, self.topology, self.rows_of)
        return self._tables[key]

    def places(self, stage: StagePlan, micro_batches: int) -> np.ndarray:
        """Placement (T,) of every tensor, int8."""
        small = self.shrunk(stage.data * micro_batches)
        placed = settle(small, stage.ways, stage.splits, stage.placements, self.rows_of, self.spread_of)
        return np.array(placed, dtype=np.int8)

    def price(self, plan: Plan) -> Breakdown:
        """Cost of a plan.

        Raises:
            PlanError: a plan of another graph, devices that are not there, a batch that cannot be cut so.
        """
        self._check(plan)
        batch = batch_of(self.graph)
        stage_at = stage_of_ops(self.graph, plan.stages)
        held = in_flight(len(plan.stages), plan.micro_batches, plan.schedule)
        costs = []
        for s, stage in enumerate(plan.stages):
            ops = tuple(i for i, at in enumerate(stage_at) if at == s)
            costs.append(self._stage(stage, ops, plan.micro_batches, held[s]))
        line, step_s, send_s = None, 0.0, 0.0
        tails = [cost.tail_s for cost in costs]
        if len(costs) == 1:
            step_s = plan.micro_batches * (costs[0].forward_s + costs[0].backward_s) + tails[0]
            last = costs[0]
        else:
            ahead, back, once = self._hops(plan, stage_at)
            forward, backward = [c.forward_s for c in costs], [c.backward_s for c in costs]
            line = timeline(forward, backward, ahead, back, plan.micro_batches, plan.schedule)
            costs = [_late(cost, late) for cost, late in zip(costs, once, strict=True)]
            tails = [cost.tail_s for cost in costs]
            step_s, send_s = step_length(line, tails), sum(ahead) + sum(back)
            ends = line.start_b[-1, ::2] + line.backward_X[::2]
            last = costs[int(np.argmax(ends + tails))]
        violations = [
            cost.memory.violation(self.topology, f"stage {s} of {self.graph.name}") for s, cost in enumerate(costs)
        ]
        fullest = max((cost.memory for cost in costs), key=lambda memory: memory.total)
        return Breakdown(
            step_s=step_s,
            compute_s=last.compute_s,
            update_s=last.update_s,
            collective_s=last.collective_s,
            overlap_s=last.overlap_s,
            bubble_s=max(step_s - last.busy_s, 0.0) if len(costs) > 1 else 0.0,
            send_s=send_s,
            memory_bytes={**asdict(fullest), "total": fullest.total},
            feasible=not any(violations),
            violations=tuple(v for v in violations if v),
            batch=batch,
            stages=tuple(costs),
            line=line,
        )

    def _check(self, plan: Plan) -> None:
        if plan.graph_digest != self.graph.digest:
            raise PlanError(
                f"the plan is of graph {plan.graph_digest[:12]}, not of {self.graph.name} ({self.graph.digest[:12]}): make a "
                "plan of this graph, or name the other one"
            )
        top = max(device for stage in plan.stages for device in stage.devices)
        if top >= self.topology.devices:
            raise PlanError(
                f"the plan uses device {top}; topology {self.topology.name} has {self.topology.devices}, numbered from 0"
            )

    def _stage(self, stage: StagePlan, ops: tuple[int, ...], micro_batches: int, held: int) -> StageCost:
        tables, place = self.tables(stage, ops, micro_batches), self.places(stage, micro_batches)
        cost_N, chosen_N = tables.price_ops(place)
        sync_V = tables.sync(place)
        forward_s, backward_s, sums, exposed = tables.finish(cost_N, sync_V, self.overlap)
        moves = tuple(moves_of(tables, place, chosen_N, micro_batches))
        by_kind = {kind: sum(m.seconds for m in moves if m.kind == kind) for kind in MOVES}
        update_s = update_seconds(tables.variable_bytes(place), self.topology)
        return StageCost(
            devices=stage.devices,
            forward_s=forward_s,
            backward_s=backward_s,
            compute_s=micro_batches * (forward_s + backward_s) - sum(by_kind.values()),
            collective_s={**by_kind, GRADIENTS: sums},
            overlap_s=sums - exposed,
            update_s=update_s,
            tail_s=exposed + update_s,
            memory=memory_of(tables, place, held),
            held=held,
            moves=(*moves, *sums_of(tables, sync_V)),
        )

    def _hops(self, plan: Plan, stage_at: tuple[int, ...]) -> tuple[list[float], list[float], list[float]]:
        """Seconds of a micro-batch on each hop, forwards and backwards, and of what crosses once a step, per stage."""
        count = len(plan.stages)
        if self._places is None:
            self._places = batch_places(self.graph, self.rows_of)
        ahead, back, once = [0.0] * (count - 1), [0.0] * (count - 1), [0.0] * count
        for i, op in enumerate(self.graph.ops):
            for tensor in op.outputs:
                size = self.graph.tensors[tensor].bytes
                users = {stage_at[user] for user in self.graph.consumers(tensor)} - {stage_at[i]}
                if not users:
                    continue
                if tensor not in self._places and op.phase == "backward":
                    once[min(users)] += size
                    continue
                for hop in range(stage_at[i], max(users)):
                    ahead[hop] += size / plan.micro_batches
                for hop in range(min(users), stage_at[i]):
                    back[hop] += size / plan.micro_batches
        devices = [stage.devices for stage in plan.stages]
        pairs = list(itertools.pairwise(devices))
        forwards = [transfer(b, self.topology, *pair) if b else 0.0 for b, pair in zip(ahead, pairs, strict=True)]
        backwards = [transfer(b, self.topology, y, x) if b else 0.0 for b, (x, y) in zip(back, pairs, strict=True)]
        late = [transfer(b, self.topology, devices[-1], devices[s]) if b else 0.0 for s, b in enumerate(once)]
        return forwards, backwards, late


def _late(cost: StageCost, seconds: float) -> StageCost:
    """A stage that also waits for gradients of variables it shares."""
    collective_s = {**cost.collective_s, TIED: seconds}
    return replace(cost, tail_s=cost.tail_s + seconds, collective_s=collective_s)


def price(graph: Graph, topology: Topology, plan: Plan, overlap: bool = True) -> Breakdown:
    """Cost of one plan; see `Evaluator` to price many."""
    return Evaluator(graph, topology, overlap).price(plan)


def moves_of(tables: Tables, place_T: np.ndarray, chosen_N: np.ndarray, micro_batches: int = 1) -> list[Move]:
    """Every communication between and inside operations, of a whole step."""
    found: list[Move] = []
    if tables.devices == 1:
        return found
    for position, i in enumerate(tables.ops):
        op = tables.graph.ops[i]
        placed = tables.rules[tables.table_of_N[position]][chosen_N[position]]
        pairs = {t: (int(place_T[t]), split) for t, split in zip(op.inputs, placed.row[0], strict=True)}
        moves = [*pairs.items(), *((t, (s, int(place_T[t]))) for t, s in zip(op.outputs, placed.row[1], strict=True))]
        for tensor, (before, after) in moves:
            kind = move_kind(before, after)
            if kind:
                seconds = float(tables.moves_T4[tensor, MOVES.index(kind)]) * micro_batches
                found.append(Move(kind, i, tensor, seconds))
        within = hidden(placed, op, tables.graph, tables.inner, tables.topology)
        if within:
            found.append(Move("all_reduce", i, op.outputs[0], within * micro_batches))
    return found


def sums_of(tables: Tables, sync_V: np.ndarray) -> list[Move]:
    """Every gradient that is summed, once a step."""
    return [
        Move(GRADIENTS, tables.ops[maker], int(gradient), float(seconds))
        for maker, gradient, seconds in zip(tables.maker_V, tables.gradient_V, sync_V, strict=True)
        if seconds > 0
    ]


def move_kind(before: int, after: int) -> str | None:
    """The collective that brings a tensor from one placement to another; None where nothing is sent."""
    if before == after or before == -1:
        return None
    if before == -2:
        return "all_reduce" if after == -1 else "reduce_scatter"
    return "all_gather" if after < 0 else "all_to_all"
