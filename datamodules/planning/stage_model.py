"""Prices a cut row of buckets while it is being cut: the pipeline of `stages`, remembered, and a bound for what is not yet cut.

Legend: K buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from datamodules.planning.pipeline_env import Buckets
from datamodules.planning.stages import Layers, Pipeline, ends_of


class StagePricer:
    """What a pipeline problem asks of a `Pipeline`."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._time_K1 = np.concatenate([[0.0], np.cumsum(pipeline.layers.seconds_K)])
        self._lengths: dict[tuple[int, ...], float] = {}

    def length(self, cuts: Sequence[int], devices: Sequence[int]) -> float:
        """Return the seconds of a step; infinite where a stage does not fit into its devices' memory."""
        key = (*cuts, *devices)
        if key not in self._lengths:
            self._lengths[key] = self.pipeline.length(cuts, devices)
        return self._lengths[key]

    def fits(self, stage: int, first: int, last: int, devices: int) -> bool:
        """Return whether a stage's variables and one micro-batch of activations fit: later stages may let it hold more."""
        pipeline = self.pipeline
        return pipeline.memory(0, first, last, devices, 1) <= pipeline.topology.memory_limit

    def least(self, cuts: Sequence[int], devices: Sequence[int]) -> float:
        """Return a length that none with these first cuts is below.

        A stage begins once a micro-batch has come through those before it and ends before its way back through them; in between
        it has all micro-batches to do. What is left is shared evenly by the devices that are left.
        """
        rows, ends, m = (0, *cuts), (0, *devices, self.pipeline.topology.devices), self.pipeline.micro_batches
        before, best = 0.0, 0.0
        for n in range(len(rows) - 1):
            each = (self._time_K1[rows[n + 1]] - self._time_K1[rows[n]]) / (ends[n + 1] - ends[n]) / m
            best = max(best, before + m * each)
            before += each
        rest = (self._time_K1[-1] - self._time_K1[rows[-1]]) / (ends[-1] - ends[len(rows) - 1])
        return float(max(best, before + rest))


def layers_from(buckets: Buckets, forward_share: float = 1 / 3) -> Layers:
    """Return buckets as the rows that `Pipeline` prices; a third of the time is the forward pass where nothing is known."""
    return Layers(
        buckets.name,
        buckets.seconds_K * forward_share,
        buckets.seconds_K * (1 - forward_share),
        buckets.activation_K,
        buckets.parameters_K,
        buckets.kept_K,
    )


def divided(layers: Layers, parts: int) -> Layers:
    """Return the same row with every layer cut into `parts` equal ones, within which as much crosses as at its end.

    Raises:
        ValueError: fewer than one part.
    """
    if parts < 1:
        raise ValueError(f"a layer is cut into 1 or more parts, got {parts!r}")
    rows: dict[str, Any] = {
        name: np.repeat(getattr(layers, name), parts) / parts
        for name in ("forward_K", "backward_K", "parameters_K", "saved_K")
    }
    return Layers(layers.name, activation_K=np.repeat(layers.activation_K, parts), **rows)


def rebucketed(layers: Layers, granularity: int) -> Layers:
    """Return a row as at most `granularity` buckets of about equal time.

    Raises:
        ValueError: a granularity below 2.
    """
    if granularity < 2:
        raise ValueError(f"granularity must be at least 2, got {granularity!r}")
    ends = ends_of(layers.seconds_K, granularity)
    starts = np.concatenate([[0], ends[:-1] + 1])
    rows: dict[str, Any] = {
        name: np.add.reduceat(getattr(layers, name), starts)
        for name in ("forward_K", "backward_K", "parameters_K", "saved_K")
    }
    return Layers(layers.name, activation_K=layers.activation_K[ends], **rows)
