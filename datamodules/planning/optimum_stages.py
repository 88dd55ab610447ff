"""The best cut of a row of layers into stages on devices, with a proof.

The short form (sum of all resources + (M - 1) times the slowest) by an exact dynamic programme over stages, layers and devices:
solved under a ceiling on the slowest resource that is lowered until nothing is left, so that every pair (sum, slowest) worth
having is seen. The exact length by branch and bound from there.

Source: Alpa (OSDI 2022) section 5 for the dynamic programme, which tries a list of ceilings; here the next ceiling is the
slowest resource of the last solution, and the short form has hops as resources of their own.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datamodules.planning import _stages_numba
from datamodules.planning.collectives import _one_way, _possible, group_of, transfer
from datamodules.planning.optimum import TIGHT, NoPlan
from datamodules.planning.pipeline import in_flight, short_form
from datamodules.planning.roofline import update_seconds
from datamodules.planning.stages import STATE, Pipeline

kernels: Any = _stages_numba
NODES = 200_000_000


@dataclass(frozen=True)
class StageOptimum:
    """Cuts (first layers of stages 1 to S - 1), first devices of the same stages, and what is proven of them."""

    cuts: tuple[int, ...]
    devices: tuple[int, ...]
    value: float
    bound: float
    seconds: float
    certificate: str
    nodes: int = 0

    @property
    def gap(self) -> float:
        """(value - bound) / value."""
        return max(self.value - self.bound, 0.0) / self.value if self.value > 0 else 0.0

    @property
    def proven(self) -> bool:
        return self.gap <= TIGHT


def windows(pipeline: Pipeline, stages: int, radius: int | None = None) -> list[list[int]]:
    """Where each stage but the first may have its first device.

    Anywhere, or within a radius of the servers' boundaries where these are as many as the stages, else of an even share.
    """
    d = pipeline.topology.devices
    if stages > d or stages > len(pipeline.layers) or stages < 1:
        raise NoPlan(f"{stages} stages do not fit on {d} devices and {len(pipeline.layers)} layers")
    sizes = pipeline.topology.sizes
    centres = list(np.cumsum(sizes[:-1])) if len(sizes) == stages else [round(d * s / stages) for s in range(1, stages)]
    return [
        [p for p in range(s, d - stages + s + 1) if radius is None or abs(p - centres[s - 1]) <= radius]
        for s in range(1, stages)
    ]


@dataclass(frozen=True)
class _Arrays:
    """What the compiled searches read; see there."""

    places: np.ndarray
    count: np.ndarray
    sums: np.ndarray
    hop: np.ndarray
    fits: np.ndarray


def stage_optimum(
    pipeline: Pipeline, stages: int, radius: int | None = None, exact: bool = True, nodes: int = NODES
) -> StageOptimum:
    """The best pipeline of `stages` stages.

    Args:
        radius: how far device cuts may lie from the servers' boundaries; None for anywhere.
        exact: minimise the exact length of the schedule, with gradient sums and updates; otherwise the short form alone.
        nodes: how many partial pipelines branch and bound may look at.
    Raises:
        NoPlan: more stages than layers or devices, or no cut fits into memory.
    """
    started = time.perf_counter()
    arrays = _prepare(pipeline, stages, windows(pipeline, stages, radius))
    value, cuts, devices = _programme(pipeline, stages, arrays)
    if not exact:
        spent = time.perf_counter() - started
        return StageOptimum(cuts, devices, value, value, spent, "dynamic programme, every (sum, slowest) worth having")
    length = pipeline.length(cuts, devices)
    best, cuts, devices, looked, finished = _branch(pipeline, stages, arrays, length, cuts, devices, nodes)
    spent = time.perf_counter() - started
    if finished:
        return StageOptimum(cuts, devices, best, best, spent, f"branch and bound, {looked:,} partial pipelines", looked)
    least = _root_bound(pipeline, stages)
    return StageOptimum(cuts, devices, best, least, spent, f"stopped after {looked:,} partial pipelines", looked)


def _root_bound(pipeline: Pipeline, stages: int) -> float:
    """No pipeline is shorter than all its work on all its devices."""
    return float(pipeline.layers.seconds_K.sum()) / pipeline.topology.devices


def _prepare(pipeline: Pipeline, stages: int, options: Sequence[Sequence[int]]) -> _Arrays:
    topology, layers = pipeline.topology, pipeline.layers
    boundaries = [[0], *options, [topology.devices]]
    width = max(map(len, boundaries))
    places = np.full((stages + 1, width), -1, dtype=np.int64)
    for s, row in enumerate(boundaries):
        places[s, : len(row)] = row
    count = np.zeros((stages, width, width), dtype=np.int64)
    sums = np.zeros((stages, width, width, 3, 2))
    hop = np.zeros((max(stages - 1, 1), width, width, width, 2))
    fits = np.zeros((stages, width, width, len(layers) + 1, len(layers) + 1), dtype=np.bool_)
    held = in_flight(stages, pipeline.micro_batches, pipeline.schedule)
    weights, saved = pipeline._sums["parameters_K"], pipeline._sums["saved_K"]
    for s in range(stages):
        for a, start in enumerate(boundaries[s]):
            for b, stop in enumerate(boundaries[s + 1]):
                if stop <= start:
                    continue
                count[s, a, b] = stop - start
                sums[s, a, b] = _lines(pipeline, range(start, stop))
                kept = (saved[None, :] - saved[:, None]) * held[s] / pipeline.micro_batches / (stop - start)
                need = STATE * (weights[None, :] - weights[:, None]) + kept
                fits[s, a, b] = need <= topology.memory_limit
                if s < stages - 1:
                    for c, end in enumerate(boundaries[s + 2]):
                        if end > stop:
                            hop[s, a, b, c] = _line(pipeline, range(start, stop), range(stop, end))
    return _Arrays(places, count, sums, hop, fits)


def _lines(pipeline: Pipeline, devices: range) -> np.ndarray:
    """The least of these lines is the all-reduce of any number of bytes."""
    group, topology = group_of(pipeline.topology, devices), pipeline.topology
    if group.size == 1:
        return np.zeros((3, 2))
    found = []
    for algorithm in _possible(group):
        offset = _one_way(algorithm, 0.0, group, topology, 2)
        found.append((offset, (_one_way(algorithm, 1e9, group, topology, 2) - offset) / 1e9))
    return np.array(found + found[:1] * (3 - len(found)))


def _line(pipeline: Pipeline, senders: range, receivers: range) -> tuple[float, float]:
    offset = transfer(0.0, pipeline.topology, senders, receivers)
    return offset, (transfer(1e9, pipeline.topology, senders, receivers) - offset) / 1e9


def _cross(pipeline: Pipeline) -> np.ndarray:
    """Bytes over the boundary before each layer (K + 1,)."""
    return np.concatenate([[0.0], pipeline.layers.activation_K])


def _programme(pipeline: Pipeline, stages: int, arrays: _Arrays) -> tuple[float, tuple[int, ...], tuple[int, ...]]:
    """Least short form: lower the ceiling on the slowest resource until no pipeline is left."""
    m, k = pipeline.micro_batches, len(pipeline.layers)
    both = (pipeline._sums["forward_K"] + pipeline._sums["backward_K"]) / m
    cross = _cross(pipeline) / m
    width = arrays.count.shape[1]
    values = np.full((stages, k + 1, width, width), np.inf)
    came = np.zeros((stages, k + 1, width, width, 2), dtype=np.int64)
    ceiling = np.inf
    best: tuple[float, tuple[int, ...], tuple[int, ...]] = (np.inf, (), ())
    while True:
        total, a, b = kernels.cheapest_under(ceiling, both, cross, arrays.count, arrays.hop, arrays.fits, values, came)
        if total == np.inf:
            break
        cuts, devices = _back(arrays, came, stages, k, a, b)
        parts = pipeline.parts(cuts, devices)
        length = short_form(parts["forward"], parts["backward"], parts["ahead"], parts["back"], m)
        if length < best[0]:
            best = (length, cuts, devices)
        resources = [f + b for f, b in zip(parts["forward"], parts["backward"], strict=True)]
        resources += [f + b for f, b in zip(parts["ahead"], parts["back"], strict=True)]
        ceiling = min(max(resources), ceiling) * (1 - 1e-12)
        if total + (m - 1) * both[-1] / pipeline.topology.devices >= best[0]:
            break
    if best[0] == np.inf:
        raise NoPlan(_why(pipeline, stages))
    return best


def _back(
    arrays: _Arrays, came: np.ndarray, stages: int, k: int, a: int, b: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    cuts, devices = [], []
    for s in range(stages - 1, 0, -1):
        j, z = came[s, k, a, b]
        cuts.append(int(j))
        devices.append(int(arrays.places[s, a]))
        k, a, b = int(j), int(z), a
    return tuple(reversed(cuts)), tuple(reversed(devices))


def _branch(
    pipeline: Pipeline,
    stages: int,
    arrays: _Arrays,
    length: float,
    cuts: tuple[int, ...],
    devices: tuple[int, ...],
    nodes: int,
) -> tuple[float, tuple[int, ...], tuple[int, ...], int, bool]:
    """Exact search from a pipeline that is known already."""
    held = in_flight(stages, pipeline.micro_batches, pipeline.schedule)
    warm_up = np.repeat(np.array(held, dtype=np.int64), 2)[: 2 * stages - 1]
    found, options = np.array(cuts, dtype=np.int64), np.full(stages - 1, -1, dtype=np.int64)
    best, looked, finished = kernels.search(
        *(pipeline._sums["forward_K"], pipeline._sums["backward_K"], _cross(pipeline)),
        *(pipeline._sums["parameters_K"], arrays.places, arrays.count, arrays.sums, arrays.hop, arrays.fits, warm_up),
        *(update_seconds(1.0, pipeline.topology), pipeline.micro_batches, found, options, length, nodes),
    )
    if (options >= 0).all() and stages > 1:
        devices = tuple(int(arrays.places[s + 1, o]) for s, o in enumerate(options))
        cuts = tuple(int(cut) for cut in found)
    return float(best), cuts, devices, int(looked), bool(finished)


def _why(pipeline: Pipeline, stages: int) -> str:
    """Which layer or share of layers is too large, and by how many bytes."""
    limit, layers = pipeline.topology.memory_limit, pipeline.layers
    held = in_flight(stages, pipeline.micro_batches, pipeline.schedule)[-1]
    most = pipeline.topology.devices - stages + 1
    need = STATE * layers.parameters_K + layers.saved_K * held / pipeline.micro_batches / most
    worst = int(np.argmax(need))
    if need[worst] > limit:
        name = layers.names_K[worst] if layers.names_K else f"layer {worst}"
        return f"{layers.name}: {name} alone needs {need[worst]:,.0f} bytes on a device, {need[worst] - limit:,.0f} too many"
    share = STATE * float(layers.parameters_K.sum()) / stages
    over = share - limit
    return (
        f"{layers.name} does not fit on {stages} stages of topology {pipeline.topology.name} ({limit:,} bytes a device): "
        f"variables with gradients and optimiser state are {share:,.0f} bytes a stage on average"
        + (f", {over:,.0f} too many" if over > 0 else ", the rest is activations")
        + "; take more stages, more micro-batches or 1f1b"
    )
