"""From a graph, or from published profiles, to the arrays that pipelines are cut by, and what a pipeline of them costs.

Legend: K buckets, S stages, X stages and hops, N operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from datamodules.planning.collectives import collective, group_of, transfer
from datamodules.planning.graph import Graph
from datamodules.planning.pipeline import in_flight, step_length, timeline
from datamodules.planning.pipeline_env import Buckets, bucketed
from datamodules.planning.placement import batch_places
from datamodules.planning.plan import Schedule
from datamodules.planning.roofline import op_seconds, update_seconds
from datamodules.planning.topology import Topology

STATE = 4  # a weight, its gradient and Adam's two moments


class ArrayStages:
    """Prices a cut row of buckets on a topology: exact schedule, hops between stages, gradient sums inside them, memory.

    Inside a stage the batch is split evenly over its devices. Sizes are of the whole batch.

    Args:
        forward_share: of a bucket's seconds that is the forward pass.
        micro_batches, schedule: of the pipeline.
    Source: the same exact recursion as `price`; the arrays C, A, W are the paper's (dossier 1.8).
    """

    def __init__(
        self,
        buckets: Buckets,
        topology: Topology,
        micro_batches: int = 8,
        schedule: Schedule = "1f1b",
        forward_share: float = 1 / 3,
    ) -> None:
        if micro_batches < 1:
            raise ValueError(f"a step has 1 or more micro-batches, got {micro_batches}")
        self.buckets, self.topology, self.schedule = buckets, topology, schedule
        self.micro_batches, self.forward_share = micro_batches, forward_share
        self._time_K1 = np.concatenate([[0.0], np.cumsum(buckets.seconds_K)])
        self._weights_K1 = np.concatenate([[0.0], np.cumsum(buckets.parameters_K)])
        self._kept_K1 = np.concatenate([[0.0], np.cumsum(buckets.kept_K)])
        self._hops: dict[tuple[int, int, int, int], float] = {}
        self._tails: dict[tuple[int, int, int, int], float] = {}

    @cached_property
    def _every(self) -> tuple[int, ...]:
        return tuple(range(self.topology.devices))

    def length(self, cuts: Sequence[int], devices: Sequence[int]) -> float:
        """Return the seconds of a step; infinite where a stage does not fit into its devices' memory."""
        rows, ends = (0, *cuts, len(self.buckets)), (0, *devices, self.topology.devices)
        count, m = len(rows) - 1, self.micro_batches
        for n in range(count):
            if not self._held(n, count, rows[n], rows[n + 1], ends[n + 1] - ends[n]):
                return math.inf
        both = [
            (self._time_K1[rows[n + 1]] - self._time_K1[rows[n]]) / (ends[n + 1] - ends[n]) / m for n in range(count)
        ]
        ahead = [self._hop(rows[n + 1], ends[n], ends[n + 1], ends[n + 2]) for n in range(count - 1)]
        share = self.forward_share
        line = timeline(
            [share * t for t in both], [(1 - share) * t for t in both], ahead, ahead, m, self.schedule
        )  # fmt: skip
        return step_length(line, [self._tail(rows[n], rows[n + 1], ends[n], ends[n + 1]) for n in range(count)])

    def fits(self, stage: int, first: int, last: int, devices: int) -> bool:
        """Return whether a stage fits, were it the last of all: what later ones add is not known yet."""
        return self._held(0, 1, first, last, devices)

    def least(self, cuts: Sequence[int], devices: Sequence[int]) -> float:
        """Return a length that none with these first cuts is below.

        A stage begins once a micro-batch has come through those before it and ends before its way back through them; in between
        it has all micro-batches to do. What is left is shared evenly by the devices that are left.
        """
        rows, ends, m = (0, *cuts), (0, *devices, self.topology.devices), self.micro_batches
        before, best = 0.0, 0.0
        for n in range(len(rows) - 1):
            each = (self._time_K1[rows[n + 1]] - self._time_K1[rows[n]]) / (ends[n + 1] - ends[n]) / m
            best = max(best, before + m * each + (self._tail(rows[n], rows[n + 1], 0, ends[1]) if n == 0 else 0.0))
            before += each + 2 * self._hop(rows[n + 1], ends[n], ends[n + 1], ends[n + 2])
        rest = (self._time_K1[-1] - self._time_K1[rows[-1]]) / (ends[-1] - ends[len(rows) - 1])
        return float(max(best, before + rest))

    def _held(self, stage: int, stages: int, first: int, last: int, devices: int) -> bool:
        held = in_flight(stages, self.micro_batches, self.schedule)[stage]
        state = STATE * (self._weights_K1[last] - self._weights_K1[first])
        kept = (self._kept_K1[last] - self._kept_K1[first]) / devices / self.micro_batches * held
        return bool(state + kept <= self.topology.memory_limit)

    def _hop(self, cut: int, first: int, middle: int, last: int) -> float:
        key = (cut, first, middle, last)
        if key not in self._hops:
            size = float(self.buckets.activation_K[cut - 1]) / self.micro_batches
            senders, receivers = self._every[first:middle], self._every[middle:last]
            self._hops[key] = transfer(size, self.topology, senders, receivers) if size else 0.0
        return self._hops[key]

    def _tail(self, first: int, last: int, low: int, high: int) -> float:
        key = (first, last, low, high)
        if key not in self._tails:
            size = float(self._weights_K1[last] - self._weights_K1[first])
            group = group_of(self.topology, self._every[low:high])
            summed = collective("all_reduce", size, group, self.topology) if high - low > 1 and size else 0.0
            self._tails[key] = summed + update_seconds(size, self.topology)
        return self._tails[key]


def graph_buckets(graph: Graph, topology: Topology, granularity: int | None = 128) -> tuple[Buckets, float]:
    """Return a training step as buckets of forward operations with their backward, and the forward pass's share of the time.

    A backward operation belongs to the latest forward operation whose tensors it reads; one that reads none, to where its
    gradient comes from. A boundary carries the tensors of the batch made before it and read behind it.

    Args:
        granularity: how many buckets of about equal time; None for one for each forward operation.
    """
    forward = [i for i, op in enumerate(graph.ops) if op.phase == "forward"]
    at = {i: place for place, i in enumerate(forward)}
    home = _homes(graph, at)
    n = len(forward)
    seconds_N, crossing_N, weights_N, kept_N = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(n)
    ahead = 0.0
    for i, op in enumerate(graph.ops):
        nothing_split = ((-1,) * len(op.inputs), (-1,) * len(op.outputs))
        taken = op_seconds(op, graph, nothing_split, 1, topology)
        seconds_N[home[i]] += taken
        ahead += taken if i in at else 0.0
    batch = batch_places(graph)
    for i, place in at.items():
        for tensor in graph.ops[i].outputs:
            users = graph.consumers(tensor)
            last = max((at[user] for user in users if user in at), default=place)
            if tensor in batch:
                crossing_N[place:last] += graph.tensors[tensor].bytes
            if any(user not in at for user in users):
                kept_N[place] += graph.tensors[tensor].bytes
    for parameter in graph.parameters:
        users = [at[user] for user in graph.consumers(parameter.tensor) if user in at]
        weights_N[min(users, default=0)] += graph.tensors[parameter.tensor].bytes
    whole = Buckets(graph.name, seconds_N, crossing_N, weights_N, kept_N)
    share = ahead / float(seconds_N.sum())
    return (whole if granularity is None else bucketed(whole, granularity)), share


def _homes(graph: Graph, at: dict[int, int]) -> list[int]:
    """The place in the forward pass of every operation."""
    made: dict[int, int] = {}
    for i, place in at.items():
        for tensor in (*graph.ops[i].inputs, *graph.ops[i].outputs):
            made[tensor] = max(made.get(tensor, 0), place) if tensor not in graph.ops[i].outputs else place
    flow: dict[int, int] = {}
    homes = []
    for i, op in enumerate(graph.ops):
        if i in at:
            homes.append(at[i])
            continue
        saved = [made[t] for t in op.inputs if t in made]
        gradients = [flow[t] for t in op.inputs if t in flow]
        place = max(saved) if saved else min(gradients, default=len(at) - 1)
        if saved and gradients:
            place = min(place, max(gradients))
        homes.append(place)
        flow.update(dict.fromkeys(op.outputs, place))
    return homes


# V100 profiles of BERT-48 that AlibabaPAI/DAPPLE publishes (profiling_results), at 2 sequences: dossier 3.2.
LAYER_FORWARD_S, LAYER_BACKWARD_S = 2.69e-3, 4.47e-3
LAYER_BOUNDARY_BYTES, LAYER_BYTES, EMBEDDING_BYTES = 4_325_376, 50_384_896, 127_131_648
HEAD_IN_LAYERS = 2.4  # masked-language head over 30,522 words at width 1024, by operations: ours, the profile has none


def dapple_bert_48(batch: int) -> tuple[Buckets, float]:
    """Return BERT-48 as embedding, 48 layers and head, from DAPPLE's V100 profile, for a batch of that many sequences.

    The embedding takes a tenth of a layer and the head 2.4 layers (by arithmetic, ours); layers keep ten boundaries for the
    backward pass (ours).
    """
    scale = batch / 2
    layer = (LAYER_FORWARD_S + LAYER_BACKWARD_S) * scale
    seconds = np.array([0.1 * layer, *[layer] * 48, HEAD_IN_LAYERS * layer])
    crossing = np.full(50, LAYER_BOUNDARY_BYTES * scale)
    weights = np.array([EMBEDDING_BYTES, *[LAYER_BYTES] * 48, 4.0 * 1024 * 1024 + 4 * 30_522], dtype=np.float64)
    kept = np.array([1.0, *[10.0] * 48, 2.0]) * LAYER_BOUNDARY_BYTES * scale
    share = LAYER_FORWARD_S / (LAYER_FORWARD_S + LAYER_BACKWARD_S)
    return Buckets("bert-48, DAPPLE's V100 profile", seconds, crossing, weights, kept), share


def divided(buckets: Buckets, parts: int) -> Buckets:
    """Return the same row with every bucket cut into `parts` equal ones, within which as much crosses as at its end."""
    if parts < 1:
        raise ValueError(f"a bucket is cut into 1 or more parts, got {parts!r}")
    each = [np.repeat(row, parts) for row in (buckets.seconds_K, buckets.parameters_K, buckets.kept_K)]
    seconds, weights, kept = (row / parts for row in each)
    return Buckets(buckets.name, seconds, np.repeat(buckets.activation_K, parts), weights, kept)
