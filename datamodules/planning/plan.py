"""A plan: which operations form which stage, on which devices, how the batch and the variables are split there.

The devices of a stage form a mesh of `data` rows by `ways` columns, row after row, so that the columns of one row are
neighbours. The batch is cut over rows: every row holds the stage's variables whole (over its columns) and gradients are
all-reduced between rows. Over the `ways` columns `splits` says which dim of a variable, or of an input, is split; -1 is
replicated. Interior tensors follow from these (`placement.settle`) unless `placements` names them. Pure data parallelism has
one column.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datamodules.planning.graph import Graph
from datamodules.planning.topology import Topology

Schedule = Literal["gpipe", "1f1b"]
SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b")
VERSION = 1


class PlanError(ValueError):
    """A plan that does not fit its graph or its machine; the message names the value and the way out."""


@dataclass(frozen=True)
class StagePlan:
    """One stage: forward operations `first_op` to `last_op` (indices into Graph.ops, both included) with their backward.

    Attributes:
        devices: numbers of the stage's devices.
        data: rows of the mesh: ways in which the batch is split.
        splits: variable or input -> dim split over the columns of the mesh, or -1.
        placements: interior tensor -> dim, -1 (replicated) or -2 (partial sums), where the plan says so itself.
    """

    first_op: int
    last_op: int
    devices: tuple[int, ...]
    data: int = 1
    splits: Mapping[int, int] = field(default_factory=dict, hash=False)
    placements: Mapping[int, int] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not self.devices or len(set(self.devices)) != len(self.devices):
            raise PlanError(f"a stage needs devices, each once, got {list(self.devices)}")
        if self.data < 1 or len(self.devices) % self.data:
            raise PlanError(f"{len(self.devices)} devices cannot be cut into {self.data} rows for the batch")
        if not 0 <= self.first_op <= self.last_op:
            raise PlanError(f"a stage runs from operation {self.first_op} to {self.last_op}")

    @property
    def ways(self) -> int:
        """Columns of the mesh."""
        return len(self.devices) // self.data

    @property
    def columns(self) -> tuple[int, ...]:
        """The devices of the first row: those that one split spans."""
        return self.devices[: self.ways]

    @property
    def rows(self) -> tuple[int, ...]:
        """The devices of the first column: those that all-reduce a gradient."""
        return self.devices[:: self.ways]


@dataclass(frozen=True)
class Plan:
    """Stages in order, the micro-batches of a step and their schedule, for one graph on one topology."""

    graph_digest: str
    topology: str
    stages: tuple[StagePlan, ...]
    micro_batches: int = 1
    schedule: Schedule = "gpipe"

    def __post_init__(self) -> None:
        if not self.stages:
            raise PlanError("a plan needs a stage")
        if self.micro_batches < 1:
            raise PlanError(f"a step has 1 or more micro-batches, got {self.micro_batches}")
        if self.schedule not in SCHEDULES:
            raise PlanError(f"unknown schedule {self.schedule!r}; there are {', '.join(SCHEDULES)}")
        if self.stages[0].first_op:
            raise PlanError(f"the first stage starts at operation 0, not {self.stages[0].first_op}")
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if after.first_op != before.last_op + 1:
                raise PlanError(f"a stage ends at operation {before.last_op}, the next begins at {after.first_op}")
        used = [device for stage in self.stages for device in stage.devices]
        if len(set(used)) != len(used):
            raise PlanError(f"a device belongs to two stages: {sorted({d for d in used if used.count(d) > 1})}")

    def save(self, path: Path | str) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Read what `save` wrote; PlanError for anything else."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"{path} holds no plan: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "version": VERSION,
            "graph": self.graph_digest,
            "topology": self.topology,
            "micro_batches": self.micro_batches,
            "schedule": self.schedule,
            "stages": [
                {
                    "ops": [stage.first_op, stage.last_op],
                    "devices": list(stage.devices),
                    "data": stage.data,
                    "splits": _to_pairs(stage.splits),
                    "placements": _to_pairs(stage.placements),
                }
                for stage in self.stages
            ],
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`."""
        try:
            if plain["version"] != VERSION:
                raise PlanError(f"a plan of version {plain['version']}; this code reads version {VERSION}")
            stages = tuple(
                StagePlan(
                    first_op=int(stage["ops"][0]),
                    last_op=int(stage["ops"][1]),
                    devices=tuple(int(device) for device in stage["devices"]),
                    data=int(stage["data"]),
                    splits={int(t): int(s) for t, s in stage["splits"]},
                    placements={int(t): int(s) for t, s in stage["placements"]},
                )
                for stage in plain["stages"]
            )
            return cls(plain["graph"], plain["topology"], stages, int(plain["micro_batches"]), plain["schedule"])
        except PlanError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"not a plan: {error!r}") from None


def _to_pairs(mapping: Mapping[int, int]) -> list[list[int]]:
    return [[tensor, split] for tensor, split in sorted(mapping.items())]


def batch_of(graph: Graph) -> int:
    """Examples in a step: the size of the inputs' batch dims; PlanError where there is none or inputs disagree."""
    sizes = {graph.tensors[tensor].shape[dim] for tensor, dim in batch_dims(graph).items()}
    if len(sizes) != 1:
        found = f"inputs disagree about it: {sorted(sizes)}" if sizes else "no input has one"
        raise PlanError(f"{graph.name}: the batch is not known, {found}; name it in the graph's batch_dims")
    return sizes.pop()


def batch_dims(graph: Graph) -> dict[int, int]:
    """Input -> its batch dim: what the front end says, else dim 0 of every input that is as long as most there."""
    if graph.batch_dims:
        return dict(graph.batch_dims)
    lengths = [graph.tensors[tensor].shape[0] for tensor in graph.inputs if graph.tensors[tensor].shape]
    if not lengths:
        return {}
    usual = max(lengths, key=lengths.count)
    return {t: 0 for t in graph.inputs if graph.tensors[t].shape and graph.tensors[t].shape[0] == usual}


def pure_data_parallel(graph: Graph, topology: Topology, micro_batches: int = 1) -> Plan:
    """Every activation split on the batch over all devices, and an all-reduce of every gradient.

    Raises:
        PlanError: the devices do not divide the batch.
    """
    batch, n = batch_of(graph), topology.devices
    if batch % (n * micro_batches):
        raise PlanError(
            f"{graph.name}: a batch of {batch} cannot be cut into {micro_batches} micro-batches for {n} devices; take a "
            f"batch that {n * micro_batches} divides, or fewer devices"
        )
    stage = StagePlan(0, len(graph.ops) - 1, tuple(range(n)), data=n)
    return Plan(graph.digest, topology.name, (stage,), micro_batches)


def stage_of_ops(graph: Graph, stages: Sequence[StagePlan]) -> tuple[int, ...]:
    """The stage of every operation: forward ones by the plan's ranges, backward ones with what they are the gradient of.

    A backward operation works where the forward tensors it reads were last used, yet never before (in stages) a gradient it
    reads exists: gradients travel from the last stage to the first. A variable's gradient is made where the variable is used.
    """
    last_forward = max((i for i, op in enumerate(graph.ops) if op.phase == "forward"), default=-1)
    if stages[-1].last_op < last_forward:
        raise PlanError(f"the stages end at operation {stages[-1].last_op}, the forward pass at {last_forward}")
    stage_at: list[int] = [0] * len(graph.ops)
    ends = [stage.last_op for stage in stages]
    current = 0
    for i, op in enumerate(graph.ops):
        while current < len(ends) - 1 and i > ends[current]:
            current += 1
        if op.phase == "forward":
            stage_at[i] = current
    home: dict[int, int] = {}
    for i, op in enumerate(graph.ops):
        if op.phase == "forward":
            for tensor in (*op.inputs, *op.outputs):
                home[tensor] = max(home.get(tensor, 0), stage_at[i])
    flow: dict[int, int] = {}
    for i, op in enumerate(graph.ops):
        if op.phase == "backward":
            gradients = [flow[t] for t in op.inputs if t in flow]
            saved = [home[t] for t in op.inputs if t in home]
            latest = min(gradients) if gradients else len(stages) - 1
            stage_at[i] = min(latest, max(saved)) if saved else latest
            flow.update(dict.fromkeys(op.outputs, stage_at[i]))
    return tuple(stage_at)
