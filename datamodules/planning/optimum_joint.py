"""The best plan over meshes and stages together: pipeline stages, batch rows and split columns.

Each mesh of a stage's devices has its own optimum of placements (the integer programme, on the whole graph); the stages are
then cut by branch and bound over what every operation takes there. What comes out is priced as a whole, so its value is
exact; the bound is one that no plan of these stages and micro-batches is below, since some stage has its share of the work,
each operation done in the fastest way and nothing sent.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from datamodules.planning.graph import Graph
from datamodules.planning.optimum import TIGHT, NoPlan, Optimal, sharding_optimum
from datamodules.planning.optimum_stages import stage_optimum
from datamodules.planning.placement import REPLICATED
from datamodules.planning.plan import Plan, PlanError, Schedule, StagePlan, batch_of, stage_of_ops
from datamodules.planning.price import Evaluator
from datamodules.planning.stages import Layers, Pipeline, ends_of, sizes_of
from datamodules.planning.topology import Topology


@dataclass(frozen=True)
class Tried:
    """One kind of mesh: stages, rows of each, and what the best plan of that kind costs (infinite where none fits)."""

    stages: int
    data: int
    value: float
    bound: float
    seconds: float
    why: str


@dataclass(frozen=True)
class Joint:
    """The best of what was tried. `proven` speaks of all that was tried, not of meshes that were not."""

    best: Optimal
    tried: tuple[Tried, ...]

    @property
    def bound(self) -> float:
        return min(row.bound for row in self.tried)

    @property
    def gap(self) -> float:
        """How far below the best plan a plan of the meshes tried might still lie, as a share."""
        return max(0.0, 1 - self.bound / self.best.value)

    @property
    def proven(self) -> bool:
        return self.gap <= TIGHT


def joint_optimum(
    graph: Graph,
    topology: Topology,
    stages: Sequence[int] = (1,),
    data: Sequence[int] | None = None,
    micro_batches: int = 1,
    schedule: Schedule = "1f1b",
    overlap: bool = True,
    granularity: int = 64,
    time_limit: float = 600.0,
    precision: float = 1e-4,
) -> Joint:
    """The best plan with any of these numbers of stages, each on an equal share of the devices.

    Args:
        data: rows of a stage's mesh to try; None for every number that divides both devices and batch.
        granularity: buckets that stages are cut between.
        time_limit: seconds for all of it; what no time is left for is not tried.
        precision: how far apart value and bound of a mesh may lie, as a share.
    Raises:
        NoPlan: nothing that was tried fits; says what stands in the way of each.
        PlanError: a number of stages that does not divide the devices.
    """
    started, batch = time.perf_counter(), batch_of(graph)
    found: list[Optimal] = []
    tried: list[Tried] = []
    for count in stages:
        if topology.devices % count:
            raise PlanError(f"{topology.devices} devices cannot be shared out evenly to {count} stages")
        each = topology.devices // count
        rows = [d for d in range(each, 0, -1) if each % d == 0 and batch % (d * micro_batches) == 0]
        for d in [d for d in rows if data is None or d in data]:
            left, begun = time_limit - (time.perf_counter() - started), time.perf_counter()
            if left <= 0:
                tried.append(Tried(count, d, float("inf"), 0.0, 0.0, "not tried: time is up"))
                continue
            try:
                if count == 1:
                    one = sharding_optimum(graph, topology, d, micro_batches, overlap, None, left, precision)
                else:
                    one = _staged(
                        graph, topology, count, d, micro_batches, schedule, overlap, granularity, left, precision
                    )
                found.append(one)
                tried.append(Tried(count, d, one.value, one.bound, one.seconds, one.certificate))
            except NoPlan as error:
                tried.append(Tried(count, d, float("inf"), float("inf"), time.perf_counter() - begun, str(error)))
    if not found:
        reasons = "; ".join(dict.fromkeys(f"{t.stages} x {t.data} rows: {t.why}" for t in tried))
        micro = f" into {micro_batches} micro-batches" if micro_batches > 1 else ""
        raise NoPlan(reasons or f"{graph.name}: a batch of {batch} cannot be cut{micro} on {topology.devices} devices")
    return Joint(min(found, key=lambda one: one.value), tuple(tried))


def _staged(
    graph: Graph,
    topology: Topology,
    count: int,
    data: int,
    micro_batches: int,
    schedule: Schedule,
    overlap: bool,
    granularity: int,
    time_limit: float,
    precision: float,
) -> Optimal:
    """Stages of equal devices, every operation placed as on one of them that has the whole model."""
    started, each = time.perf_counter(), topology.devices // count
    roomy = replace(topology, memory_bytes=topology.memory_bytes * count)
    whole = sharding_optimum(
        graph, roomy, data, micro_batches, overlap, None, time_limit, precision, devices=range(each)
    )
    placed = whole.plan.stages[0].placements
    splits = whole.plan.stages[0].splits
    layers = _layers(graph, roomy, whole, micro_batches, granularity)
    starts = tuple(range(each, topology.devices, each))
    pipeline = Pipeline(layers, topology, micro_batches, schedule)
    cut = stage_optimum(pipeline, count, radius=0) if _even(topology, count) else stage_optimum(pipeline, count)
    cuts = cut.cuts if cut.devices == starts else stage_optimum(pipeline, count, radius=0).cuts
    edges = [0, *(layers.ends_K[c - 1] + 1 for c in cuts), len(graph.ops)]
    bounds = [0, *starts, topology.devices]
    chosen = tuple(
        StagePlan(edges[s], edges[s + 1] - 1, tuple(range(bounds[s], bounds[s + 1])), data, splits, placed)
        for s in range(count)
    )
    plan = Plan(graph.digest, topology.name, chosen, micro_batches, schedule)
    evaluator = Evaluator(graph, topology, overlap)
    cost = evaluator.price(plan)
    if not cost.feasible:
        raise NoPlan("; ".join(cost.violations))
    least = _least(graph, roomy, each, data, micro_batches) / count
    certificate = f"stages cut by {cut.certificate}; placements: {whole.certificate}"
    return Optimal(plan, cost.step_s, least, time.perf_counter() - started, certificate, whole.size)


def _even(topology: Topology, count: int) -> bool:
    """Whether an equal share of the devices is what windows of radius 0 give."""
    return len(topology.sizes) != count or len(set(topology.sizes)) == 1


def _layers(graph: Graph, topology: Topology, whole: Optimal, micro_batches: int, granularity: int) -> Layers:
    """Buckets of operations whose times, divided by devices and micro-batches as a pipeline does, are those of the mesh."""
    stage = whole.plan.stages[0]
    evaluator = Evaluator(graph, topology)
    tables = evaluator.tables(stage, tuple(range(len(graph.ops))), micro_batches)
    place = evaluator.places(stage, micro_batches)
    cost, _ = tables.price_ops(place)
    times = micro_batches * len(stage.devices)
    forward = [i for i, op in enumerate(graph.ops) if op.phase == "forward"]
    at = np.array(stage_of_ops(graph, [StagePlan(i, i, (0,)) for i in range(forward[-1] + 1)]))
    ends = ends_of(np.bincount(at, cost, forward[-1] + 1), granularity)
    bucket_of, back, count = np.searchsorted(ends, at), tables.backward_N, len(ends)
    crossing, kept, weights = sizes_of(graph, bucket_of, count)
    split_bytes = sum(graph.tensors[p.tensor].bytes for p in graph.parameters if place[p.tensor] != REPLICATED)
    share = 1 - split_bytes / max(graph.parameter_bytes, 1) * (1 - 1 / stage.ways)
    return Layers(
        graph.name,
        np.bincount(bucket_of[~back], cost[~back], count) * times,
        np.bincount(bucket_of[back], cost[back], count) * times,
        crossing,
        weights * share,
        kept,
        ends_K=tuple(int(end) for end in ends),
    )


def _least(graph: Graph, topology: Topology, each: int, data: int, micro_batches: int) -> float:
    """Seconds that all operations take in their fastest way with nothing sent, on one stage's devices."""
    stage = StagePlan(0, len(graph.ops) - 1, tuple(range(each)), data)
    tables = Evaluator(graph, topology).tables(stage, tuple(range(len(graph.ops))), micro_batches)
    fastest = np.minimum.reduceat(tables.row_seconds, tables.row_ptr[:-1])
    return micro_batches * float(fastest[tables.table_of_N].sum())
