"""A model as a row of layers (or buckets of operations) that pipeline stages are cut from, and what a cut costs.

Legend: K layers or buckets, S stages, D devices, M micro-batches. Units: seconds and bytes, of the whole batch on one device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from datamodules.planning.collectives import group_of, slowest, transfer
from datamodules.planning.graph import Graph
from datamodules.planning.pipeline import in_flight, step_length, timeline
from datamodules.planning.placement import RowsOf, full_rows
from datamodules.planning.plan import Plan, Schedule, StagePlan, stage_of_ops
from datamodules.planning.price import Evaluator
from datamodules.planning.roofline import update_seconds
from datamodules.planning.topology import Topology
from datamodules.planning.vocabulary import VIEWS

PROFILES = Path(__file__).parent / "profiles"
STATE = 4  # a variable, its gradient and Adam's two moments


@dataclass(frozen=True)
class Layers:
    """The paper's arrays: time, activations and weights of a row of layers.

    Attributes:
        forward_K, backward_K: seconds of the whole batch on one device.
        activation_K: bytes that cross the boundary behind each, one way.
        parameters_K: bytes of variables.
        saved_K: bytes kept from the forward pass for the backward pass.
        names_K: for people.
        ends_K: the last forward operation of each, where they come from a graph.
    Raises:
        ValueError: rows of different length, or negative or not finite numbers.
    """

    name: str
    forward_K: np.ndarray
    backward_K: np.ndarray
    activation_K: np.ndarray
    parameters_K: np.ndarray
    saved_K: np.ndarray
    names_K: tuple[str, ...] = ()
    ends_K: tuple[int, ...] = ()
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for name in ("forward_K", "backward_K", "activation_K", "parameters_K", "saved_K"):
            row = np.asarray(getattr(self, name), dtype=np.float64)
            if row.ndim != 1 or len(row) != len(self.forward_K) or not len(row):
                raise ValueError(f"{self.name}: {name} must have one number for each of {len(self.forward_K)} layers")
            if not (np.isfinite(row).all() and (row >= 0).all()):
                raise ValueError(f"{self.name}: {name} must be finite and not negative")
            object.__setattr__(self, name, row)

    def __len__(self) -> int:
        return len(self.forward_K)

    @property
    def seconds_K(self) -> np.ndarray:
        return self.forward_K + self.backward_K

    def scaled(self, times: float) -> Layers:
        """The same model on `times` the batch: time and activations grow with it, variables do not."""
        if not times > 0:
            raise ValueError(f"{self.name}: a batch cannot be {times} times another")
        rows = {name: getattr(self, name) * times for name in ("forward_K", "backward_K", "activation_K", "saved_K")}
        return replace(self, **rows)


def load_profile(name: str, batch: int) -> Layers:
    """A measured model (profiles/NAME.yaml) at another batch than it was measured at.

    Raises:
        ValueError: no such profile.
    """
    path = PROFILES / f"{name}.yaml"
    if not path.exists():
        raise ValueError(f"no profile '{name}'; there are {', '.join(sorted(f.stem for f in PROFILES.glob('*.yaml')))}")
    plain = yaml.safe_load(path.read_text())
    rows = [layer for layer in plain["layers"] for _ in range(layer["count"])]
    names, seen = [], dict.fromkeys((layer["name"] for layer in rows), 0)
    for layer in rows:
        names.append(f"{layer['name']} {seen[layer['name']]}" if layer["count"] > 1 else layer["name"])
        seen[layer["name"]] += 1

    def row(key: str) -> np.ndarray:
        return np.array([float(layer[key]) for layer in rows])

    boundary = row("boundary_bytes")
    layers = Layers(
        plain["name"],
        row("forward_s"),
        row("backward_s"),
        boundary,
        row("parameter_bytes"),
        saved_K=boundary,  # the profile knows no more: layers recomputed from their inputs
        names_K=tuple(names),
        source=plain["source"],
    )
    return layers.scaled(batch / plain["batch"])


def layers_of(graph: Graph, topology: Topology, granularity: int = 128, rows_of: RowsOf = full_rows) -> Layers:
    """A graph's forward operations in at most `granularity` buckets of nearly equal time, with their backward.

    A backward operation counts where the forward operation is that it is the gradient of.
    """
    forward = [i for i, op in enumerate(graph.ops) if op.phase == "forward"]
    if len(forward) < 2 or granularity < 2:
        raise ValueError(f"{graph.name}: {len(forward)} forward operations cannot be put into {granularity} buckets")
    single = replace(topology, nodes=1, devices_per_node=1, node_sizes=None)
    evaluator = Evaluator(graph, single, rows_of=rows_of)
    plain = StagePlan(0, len(graph.ops) - 1, (0,))
    tables = evaluator.tables(plain, tuple(range(len(graph.ops))), 1)
    cost, _ = tables.price_ops(evaluator.places(plain, 1))
    at = np.array(stage_of_ops(graph, [StagePlan(i, i, (0,)) for i in range(forward[-1] + 1)]))
    ends = ends_of(np.bincount(at, cost, forward[-1] + 1), granularity)
    bucket_of = np.searchsorted(ends, at)
    back = tables.backward_N
    count = len(ends)
    crossing, kept, weights = sizes_of(graph, bucket_of, count)
    return Layers(
        graph.name,
        np.bincount(bucket_of[~back], cost[~back], count),
        np.bincount(bucket_of[back], cost[back], count),
        crossing,
        weights,
        kept,
        names_K=tuple(graph.layer_of(int(end)) or graph.ops[int(end)].name for end in ends),
        ends_K=tuple(int(end) for end in ends),
        source=f"roofline on {topology.name}",
    )


def ends_of(cost: np.ndarray, granularity: int) -> np.ndarray:
    """Last operation of each bucket: where the time so far passes another 1/granularity of the whole."""
    share = np.cumsum(cost) / max(cost.sum(), 1e-30)
    wanted = np.searchsorted(share, np.arange(1, granularity + 1) / granularity - 1e-12)
    return np.unique(np.minimum(np.append(wanted, len(cost) - 1), len(cost) - 1))


def sizes_of(graph: Graph, bucket_of: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes that cross each boundary, are kept for the backward pass, and of variables, per bucket."""
    crossing, kept, weights = np.zeros(count), np.zeros(count), np.zeros(count)
    for i, op in enumerate(graph.ops):
        if op.phase == "backward":
            continue
        for tensor in op.outputs:
            users = graph.consumers(tensor)
            last = max((bucket_of[user] for user in users), default=bucket_of[i])
            crossing[bucket_of[i] : last] += graph.tensors[tensor].bytes
            if op.kind not in VIEWS and any(graph.ops[user].phase == "backward" for user in users):
                kept[bucket_of[i]] += graph.tensors[tensor].bytes
    for parameter in graph.parameters:
        users = graph.consumers(parameter.tensor)
        if users:
            weights[bucket_of[users[0]]] += graph.tensors[parameter.tensor].bytes
    return crossing, kept, weights


@dataclass(frozen=True)
class Pipeline:
    """Prices cuts of a row of layers on a machine; each stage splits its micro-batches evenly over its devices.

    Devices are taken in order. A stage's gradients are summed when its last backward is done, as DAPPLE's planner has it.
    """

    layers: Layers
    topology: Topology
    micro_batches: int
    schedule: Schedule = "1f1b"

    def __post_init__(self) -> None:
        if self.micro_batches < 1:
            raise ValueError(f"a step has 1 or more micro-batches, got {self.micro_batches}")

    @cached_property
    def _sums(self) -> dict[str, np.ndarray]:
        names = ("forward_K", "backward_K", "parameters_K", "saved_K")
        return {name: np.concatenate([[0.0], np.cumsum(getattr(self.layers, name))]) for name in names}

    def _between(self, name: str, first: int, last: int) -> float:
        return float(self._sums[name][last] - self._sums[name][first])

    def parts(self, cuts: Sequence[int], devices: Sequence[int]) -> dict[str, list[float]]:
        """Times of a micro-batch and of what follows the last one, per stage and hop.

        Args:
            cuts, devices: first layers and first devices of stages 1 to S - 1, ascending.
        """
        edges, starts = [0, *cuts, len(self.layers)], [0, *devices, self.topology.devices]
        if any(a >= b for row in (edges, starts) for a, b in itertools.pairwise(row)):
            raise ValueError(f"cuts {list(cuts)} and device cuts {list(devices)} must ascend and leave no stage empty")
        groups = [range(a, b) for a, b in itertools.pairwise(starts)]
        spans = list(itertools.pairwise(edges))
        share = [self.micro_batches * len(group) for group in groups]
        hop_bytes = [self.layers.activation_K[end - 1] / self.micro_batches for _, end in spans[:-1]]
        pairs = list(itertools.pairwise(groups))
        return {
            "forward": [self._between("forward_K", *span) / n for span, n in zip(spans, share, strict=True)],
            "backward": [self._between("backward_K", *span) / n for span, n in zip(spans, share, strict=True)],
            "ahead": [self._known("hop", b, x, y) for b, (x, y) in zip(hop_bytes, pairs, strict=True)],
            "back": [self._known("hop", b, y, x) for b, (x, y) in zip(hop_bytes, pairs, strict=True)],
            "tails": [self._known("tail", *span, group) for span, group in zip(spans, groups, strict=True)],
        }

    def _known(self, what: Literal["hop", "tail"], *given: Any) -> float:
        """Seconds of a hop (bytes, senders, receivers) or a tail (layers, devices), worked out once: plans share them."""
        if (what, *given) not in self._seconds:
            found = self.tail(*given) if what == "tail" else transfer(given[0], self.topology, *given[1:])
            self._seconds[what, *given] = found
        return self._seconds[what, *given]

    @cached_property
    def _seconds(self) -> dict[tuple[Any, ...], float]:
        return {}

    def tail(self, first: int, last: int, devices: Sequence[int]) -> float:
        """Gradient sum and Adam's step of layers `first` to `last` - 1."""
        size = self._between("parameters_K", first, last)
        group = group_of(self.topology, devices)
        return slowest("all_reduce", size, [group], self.topology) + update_seconds(size, self.topology)

    def length(self, cuts: Sequence[int], devices: Sequence[int]) -> float:
        """Seconds of a step, exactly; infinite where a stage does not fit into memory."""
        edges, starts = [0, *cuts, len(self.layers)], [0, *devices, self.topology.devices]
        for s in range(len(edges) - 1):
            if not self.fits(s, edges[s], edges[s + 1], starts[s + 1] - starts[s], len(edges) - 1):
                return float("inf")
        parts = self.parts(cuts, devices)
        line = timeline(
            *(parts["forward"], parts["backward"], parts["ahead"], parts["back"]), self.micro_batches, self.schedule
        )
        return step_length(line, parts["tails"])

    def memory(self, stage: int, first: int, last: int, devices: int, stages: int | None = None) -> float:
        """Bytes on each device of a stage. Without the number of stages, as if all micro-batches were held."""
        held = in_flight(stages, self.micro_batches, self.schedule)[stage] if stages else self.micro_batches
        saved = self._between("saved_K", first, last) * held / self.micro_batches / devices
        return STATE * self._between("parameters_K", first, last) + saved

    def fits(self, stage: int, first: int, last: int, devices: int, stages: int | None = None) -> bool:
        """Whether layers `first` to `last` - 1 fit into the memory of a stage's devices."""
        return self.memory(stage, first, last, devices, stages) <= self.topology.memory_limit

    def plan(self, graph: Graph, cuts: Sequence[int], devices: Sequence[int]) -> Plan:
        """The plan of a graph whose buckets these are: every stage splits its batch over its devices."""
        if not self.layers.ends_K:
            raise ValueError(f"{self.layers.name} was not made from a graph")
        edges = [0, *(self.layers.ends_K[cut - 1] + 1 for cut in cuts), len(graph.ops)]
        starts = [0, *devices, self.topology.devices]
        stages = tuple(
            StagePlan(edges[s], edges[s + 1] - 1, tuple(range(starts[s], starts[s + 1])), starts[s + 1] - starts[s])
            for s in range(len(edges) - 1)
        )
        return Plan(graph.digest, self.topology.name, stages, self.micro_batches, self.schedule)


def buckets_of(layers: Layers) -> Any:
    """The same row as the environment of pipelines takes it."""
    from datamodules.planning.pipeline_env import Buckets

    return Buckets(layers.name, layers.seconds_K, layers.activation_K, layers.parameters_K)
