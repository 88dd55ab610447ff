"""From a graph and a machine to the problems that are searched, each with its proven optimum and what is said of a plan.

Legend: N slots, V variables.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np

from datamodules.planning.data_env import batch_agreement, input_problem
from datamodules.planning.graph import Graph
from datamodules.planning.linkage import Decisions, decisions
from datamodules.planning.optimum import NoPlan, paper_optimum, sharding_optimum
from datamodules.planning.optimum_stages import stage_optimum
from datamodules.planning.partition_env import Objective, PartitionProblem, Pruning, SlotTable
from datamodules.planning.pipeline_env import Buckets, PipelineProblem, Window, random_buckets
from datamodules.planning.plan import Plan, StagePlan, batch_dims, pure_data_parallel
from datamodules.planning.price import Evaluator, PartitionPricer
from datamodules.planning.problem import Optimum, Problem
from datamodules.planning.published import agreement
from datamodules.planning.rules import REPLICATED, Space
from datamodules.planning.searchers import Budget, search
from datamodules.planning.stage_model import StagePricer, divided, layers_from, rebucketed
from datamodules.planning.stages import Layers, Pipeline, layers_of, load_profile
from datamodules.planning.topology import Topology

Task = Literal["partition", "data", "pipeline", "general", "none"]
ENUMERATED = 14  # families up to which all plans are gone through, which is quicker than a programme


@dataclass(frozen=True)
class Case:
    """A problem, its optimum where that is known, a label among several, and what is to be said of its plan."""

    problem: Problem
    optimum: Optimum | None = None
    label: str = ""
    say: Callable[[Any], dict[str, float]] = field(default=lambda problem: {})

    def facts(self) -> dict[str, float]:
        """Return what is said of the plan that the problem holds."""
        return self.say(self.problem)


def slot_table(decided: Decisions) -> SlotTable:
    """Return decisions with their linkage groups in the form that is searched; tied variables count as often as they occur."""
    count = len(decided.slots)
    copies = decided.copies_V
    return SlotTable(
        names=decided.names,
        variable=decided.variable,
        bytes_V=tuple(size * copy for size, copy in zip(decided.bytes_V, copies, strict=True)),
        replicated=tuple(decided.groups[slot, 0] for slot in range(count)),
        partitioned=tuple(decided.groups[slot, 1] for slot in range(count)),
        reach=decided.reach,
        copies_V=copies,
    )


@dataclass(frozen=True)
class Partitioning:
    """Operator partitioning of a graph: makes fresh problems that share what is costly.

    Args:
        objective: "count", the paper's, or "time".
        data: rows of the mesh, over which the batch is split; the columns are the devices divided by it, and variables are
            split over those.
        columns: whether the columns split the batch too, where a variable is not split over them.
        space: of the rules, see `rules`.
    """

    graph: Graph
    topology: Topology
    objective: Objective = "count"
    pruning: Pruning = field(default_factory=Pruning)
    data: int = 1
    columns: bool = True
    space: Space = "paper"
    decided: Decisions = field(init=False, repr=False)
    reference: float | None = field(init=False)

    def __post_init__(self) -> None:
        if self.topology.devices % self.data:
            raise ValueError(f"{self.topology.devices} devices cannot be cut into {self.data} rows")
        ways = self.topology.devices // self.data
        object.__setattr__(self, "decided", decisions(self.graph, ways, "variables", self.pruning.tying, self.space))
        object.__setattr__(self, "reference", self._pure_data_parallel() if self.objective == "time" else None)

    def _pure_data_parallel(self) -> float:
        return Evaluator(self.graph, self.topology).price(pure_data_parallel(self.graph, self.topology)).step_s

    @property
    def inputs(self) -> dict[int, int]:
        """How the columns split the inputs."""
        return batch_dims(self.graph) if self.columns else {}

    def problem(self) -> PartitionProblem:
        """Return a problem of its own state."""
        return self._problem(self.pruning)

    def _problem(self, pruning: Pruning) -> PartitionProblem:
        pricer = None
        if self._pricer is not None:
            pricer = copy.copy(self._pricer)  # shares what does not change,
            pricer.reset()  # and makes anew what does
        return PartitionProblem(self.graph.name, self._table, self.objective, pricer, pruning, self.reference)

    @cached_property
    def _table(self) -> SlotTable:
        return slot_table(self.decided)

    @cached_property
    def _pricer(self) -> PartitionPricer | None:
        if self.objective != "time":
            return None
        members = [self.decided.members[v] for v in self.decided.variable]
        return PartitionPricer(self.graph, self.topology, self.decided.slots, self.data, self.inputs, members=members)

    def optimum(self) -> Optimum:
        """Return the least cost, proven: by going through all plans, or where they are many by the integer programme.

        Raises:
            NoPlan: none fits into memory.
        """
        begun = time.perf_counter()
        folded = self._problem(Pruning())
        if self.objective == "count" or len(self.decided.families) <= ENUMERATED:
            found = search(folded, "exhaustive", Budget(steps=2_000_000))
            if not math.isfinite(found.cost):
                raise NoPlan(f"{self.graph.name}: no plan of the paper's space fits on {self.topology.name}")
            return Optimum(found.cost, "exhaustive", found.proven, time.perf_counter() - begun, found.decisions)
        return self.programme()

    def programme(self) -> Optimum:
        """Return the least step time in the paper's space by the integer programme.

        Raises:
            NoPlan: none fits into memory.
        """
        best = paper_optimum(self.graph, self.topology, self.decided, self.data, self.inputs)
        return Optimum(best.value, "integer programme", best.proven, best.seconds)

    def sharding(self) -> tuple[Optimum, dict[str, float]]:
        """Return the least step time over every placement of every tensor, and what of the variables that plan splits."""
        best = sharding_optimum(self.graph, self.topology, self.data)
        kinds = {op.kind: {t for o in self.graph.ops if o.kind == op.kind for t in o.inputs} for op in self.graph.ops}
        conv = {p.tensor for p in self.graph.parameters} & kinds.get("convolution", set())
        split = {p.tensor for p in self.graph.parameters if best.plan.stages[0].splits.get(p.tensor, -1) >= 0}
        said = {"plan/partitioned": float(len(split)), "plan/split_convolutions": float(len(split & conv))}
        return Optimum(best.value, "integer programme", best.proven, best.seconds), said

    def say(self, problem: Any) -> dict[str, float]:
        """Return what a finished plan partitions, how far it agrees with the paper's tables, and what its space is like."""
        values, split = problem.values(), self.split(problem)
        feasible = len(self.decided.feasible)
        found = {
            "plan/partitioned": float(round(problem.progress() * problem.variables)),
            "space/slots": float(len(values)),
            "space/feasible": float(feasible),
            "space/families": float(len(self.decided.families)),
            "space/log2_raw": float(sum(len(self.decided.members[v]) for v in self.decided.variable)),
        }
        if (agreed := agreement(self.graph, split, self.topology.devices // self.data)) is not None:
            found["plan/published"] = agreed
        return found

    def plan(self, problem: PartitionProblem) -> Plan:
        """Return a finished plan in the form that is priced, drawn and run."""
        splits = dict(self.inputs) | {p.tensor: REPLICATED for p in self.graph.parameters} | self.split(problem)
        stage = StagePlan(0, len(self.graph.ops) - 1, tuple(range(self.topology.devices)), self.data, splits)
        return Plan(self.graph.digest, self.topology.name, (stage,))

    def split(self, problem: PartitionProblem) -> dict[int, int]:
        """Return {variable: dim} of what a plan splits, every copy of a tied variable named."""
        return {
            tensor: slot.dim
            for slot, owner, value in zip(self.decided.slots, self.decided.variable, problem.values(), strict=True)
            if value == 1
            for tensor in self.decided.members[owner]
        }


@dataclass(frozen=True)
class InputSplitting:
    """Automatic data parallelism of a graph: which dims of which inputs are the batch."""

    graph: Graph
    topology: Topology
    pruning: Pruning = field(default_factory=Pruning)
    space: Space = "paper"
    decided: Decisions = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "decided", decisions(self.graph, self.topology.devices, "inputs", False, self.space))

    def problem(self) -> PartitionProblem:
        """Return a problem of its own state."""
        return input_problem(self.graph, slot_table(self.decided), self.pruning)

    def optimum(self) -> Optimum:
        """Return the least cost, proven by going through all plans."""
        begun = time.perf_counter()
        found = search(
            input_problem(self.graph, slot_table(self.decided), Pruning()), "exhaustive", Budget(steps=10**6)
        )
        return Optimum(found.cost, "exhaustive", found.proven, time.perf_counter() - begun, found.decisions)

    def say(self, problem: Any) -> dict[str, float]:
        """Return whether the split dims are the batch dims, all of them and no other, in percent of the inputs."""
        values = problem.values()
        split = {(slot.variable, slot.dim) for slot, v in zip(self.decided.slots, values, strict=True) if v == 1}
        return {
            "plan/batch_dims": batch_agreement(self.graph, split),
            "plan/partitioned": float(len(split)),
            "space/slots": float(len(values)),
            "space/feasible": float(len(self.decided.feasible)),
        }


@dataclass(frozen=True)
class Staging:
    """Pipeline stages of one model: a row of layers or buckets on a topology.

    Args:
        window: where an agent may cut; the optimum is over device cuts within its radius, and model cuts anywhere.
        arrays: whether an agent sees the row.
        published: cuts that the paper prints, in layers.
    """

    layers: Layers
    topology: Topology
    stages: int
    window: Window = field(default_factory=Window)
    micro_batches: int = 16
    arrays: bool = False
    published: tuple[int, ...] = ()

    @cached_property
    def _pricer(self) -> StagePricer:
        return StagePricer(Pipeline(self.layers, self.topology, self.micro_batches))

    def problem(self) -> PipelineProblem:
        """Return a problem of its own state."""
        sizes = set(self.topology.sizes)
        per_server = sizes.pop() if len(sizes) == 1 else None
        buckets = Buckets(
            self.layers.name,
            self.layers.seconds_K,
            self.layers.activation_K,
            self.layers.parameters_K,
            self.layers.saved_K,
        )
        return PipelineProblem(
            buckets, self._pricer, self.stages, self.topology.devices, per_server, self.window, self.arrays
        )

    def optimum(self) -> Optimum:
        """Return the least length, proven by branch and bound.

        Raises:
            NoPlan: no cut fits into memory.
        """
        best = stage_optimum(self._pricer.pipeline, self.stages, self.window.device_radius)
        return Optimum(best.value, "branch and bound", best.proven, best.seconds)

    def say(self, problem: Any) -> dict[str, float]:
        """Return the cuts, and the largest distance of model cuts from the published ones."""
        plan = problem.plan()
        found = {f"plan/device_cut_{n}": float(cut) for n, cut in enumerate(plan["devices"], start=1)}
        found |= {f"plan/cut_{n}": float(cut) for n, cut in enumerate(plan["cuts"], start=1)}
        boundaries = set(np.cumsum(self.topology.sizes).tolist())
        found["plan/at_servers"] = 100.0 * float(np.mean([cut in boundaries for cut in plan["devices"]] or [True]))
        if self.published:
            off = [abs(cut - 1 - known) for cut, known in zip(plan["cuts"], self.published, strict=True)]
            found["plan/cuts_off"] = float(max(off))  # the row begins with the embedding
        return found


def drawn_staging(
    rng: np.random.Generator, topology: Topology, stages: int, granularity: int, **options: Any
) -> Staging:
    """Return the stages of a made-up model, its weights no more than fit."""
    buckets = random_buckets(rng, granularity)
    limit = topology.memory_limit * stages / 10
    weights = buckets.parameters_K * min(1.0, limit / buckets.parameters_K.sum())
    drawn = Buckets(buckets.name, buckets.seconds_K, buckets.activation_K, weights)
    return Staging(layers_from(drawn), topology, stages, arrays=True, **options)


def drawn_problem(
    rng: np.random.Generator, topology: Topology, stages: int, granularity: int, options: Mapping[str, Any]
) -> PipelineProblem:
    """Return a fresh problem of a made-up model."""
    return drawn_staging(rng, topology, stages, granularity, **options).problem()


def drawer(
    topology: Topology, stages: int, granularity: int, options: Mapping[str, Any]
) -> Callable[..., PipelineProblem]:
    """Return what draws problems for the general agent."""
    return partial(drawn_problem, topology=topology, stages=stages, granularity=granularity, options=options)


HEAD_IN_LAYERS = 2.4  # masked-language head over 30,522 words at width 1024, by operations: ours, the profile has none


def with_head(layers: Layers) -> Layers:
    """Return a row of transformer layers with a masked-language head behind it, as long as 2.4 of the last layer."""
    rows: dict[str, Any] = {
        name: np.append(getattr(layers, name), HEAD_IN_LAYERS * getattr(layers, name)[-1])
        for name in ("forward_K", "backward_K")
    }
    rows["parameters_K"] = np.append(layers.parameters_K, 4.0 * (1024 * 1024 + 30_522))
    for name in ("activation_K", "saved_K"):
        rows[name] = np.append(getattr(layers, name), getattr(layers, name)[-1])
    return Layers(layers.name, names_K=(*layers.names_K, "head"), **rows)


def profile_staging(topology: Topology, stages: int, batch: int, granularity: int | None, **options: Any) -> Staging:
    """Return BERT-48 from DAPPLE's V100 profile: by layers, or in buckets of about equal time."""
    layers = with_head(load_profile("bert48_v100", batch))
    if granularity is None:
        published = {2: (23,), 3: (17, 32), 4: (14, 27, 40)}.get(stages, ())
        return Staging(layers, topology, stages, published=published, **options)
    return Staging(rebucketed(divided(layers, 4), granularity), topology, stages, **options)


def graph_staging(graph: Graph, topology: Topology, stages: int, granularity: int, **options: Any) -> Staging:
    """Return the stages of a traced model, priced by the roofline."""
    return Staging(layers_of(graph, topology, granularity), topology, stages, **options)
