"""How long a pipeline takes: GPipe and 1F1B, exactly and by the short form.

S stages are S - 1 hops apart; stages and hops alike are resources, 2S - 1 of them, which take one task at a time. Legend:
X resources, S stages, M micro-batches. Units: seconds.

Source: the recursion of HPGO's FPL (start of f(i, x): the end of f(i-1, x), of f(i, x-1), of b(i-phi_x, x); start of b(i, x):
the end of b(i, x+1), of b(i-1, x) and of f(i+phi_x-1, x)), and its short form. Departs from it where phi falls: here phi is a
stage's number from the end (1F1B), its hop the same as the stage before it, so that no more micro-batches are held than 1F1B
holds; FPL lets it fall by one a resource.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datamodules.planning import _pipeline_numba
from datamodules.planning.plan import SCHEDULES, Schedule

kernels: Any = _pipeline_numba  # numba's dispatchers have no static signature


@dataclass(frozen=True)
class Timeline:
    """When every task starts: (M, X) arrays; even columns are stages, odd ones hops. `length` is the end of the last."""

    start_f: np.ndarray
    start_b: np.ndarray
    forward_X: np.ndarray
    backward_X: np.ndarray
    length: float


def in_flight(stages: int, micro_batches: int, schedule: Schedule) -> list[int]:
    """Micro-batches whose activations each stage holds at most: all of them (GPipe), or its number from the end (1F1B)."""
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; there are {', '.join(SCHEDULES)}")
    if schedule == "gpipe":
        return [micro_batches] * stages
    return [min(micro_batches, stages - stage) for stage in range(stages)]


def interleave(of_stages: Sequence[float], of_hops: Sequence[float]) -> np.ndarray:
    """Stages and the hops between them in one row (X,)."""
    if len(of_hops) != len(of_stages) - 1:
        raise ValueError(f"{len(of_stages)} stages are {len(of_stages) - 1} hops apart, got {len(of_hops)}")
    row = np.zeros(2 * len(of_stages) - 1)
    row[::2] = of_stages
    row[1::2] = of_hops
    if not (np.isfinite(row).all() and (row >= 0).all()):
        raise ValueError(f"times must be finite and not negative, got {row.tolist()}")
    return row


def timeline(
    forward: Sequence[float],
    backward: Sequence[float],
    hops_forward: Sequence[float],
    hops_backward: Sequence[float],
    micro_batches: int,
    schedule: Schedule = "1f1b",
) -> Timeline:
    """Every start, exactly. Times are of one micro-batch, per stage and per hop.

    Raises:
        ValueError: lengths that do not fit, times that are negative or not finite, no micro-batch.
    """
    if micro_batches < 1:
        raise ValueError(f"a step has 1 or more micro-batches, got {micro_batches}")
    forward_X, backward_X = interleave(forward, hops_forward), interleave(backward, hops_backward)
    held = in_flight(len(forward), micro_batches, schedule)
    warm_up_X = np.repeat(np.array(held, dtype=np.int64), 2)[: len(forward_X)]
    start_f = np.zeros((micro_batches, len(forward_X)))
    start_b = np.zeros_like(start_f)
    length = kernels.schedule(forward_X, backward_X, warm_up_X, micro_batches, start_f, start_b)
    assert length >= 0  # warm-ups never rise along the pipeline, so no task waits forever
    return Timeline(start_f, start_b, forward_X, backward_X, float(length))


def short_form(
    forward: Sequence[float],
    backward: Sequence[float],
    hops_forward: Sequence[float],
    hops_backward: Sequence[float],
    micro_batches: int,
    tails: Sequence[float] | None = None,
) -> float:
    """Sum of all resources + (M - 1) times the slowest + what gradient sums (`tails`, per stage) stick out.

    Stage i ends i stages' backward before the first one does, which hides as much of its gradient sum. Of GPipe it is never
    above the exact length and equals it where one resource is the slowest both ways; of 1F1B it may lie on either side.
    """
    both = interleave(forward, hops_forward) + interleave(backward, hops_backward)
    behind = np.concatenate([[0.0], np.cumsum(interleave(backward, hops_backward))[:-1]])[::2]
    late = max((tail - hidden for tail, hidden in zip(tails or [0.0], behind, strict=False)), default=0.0)
    return float(both.sum() + (micro_batches - 1) * both.max() + max(late, 0.0))


def step_length(line: Timeline, tails: Sequence[float]) -> float:
    """End of a step: each stage's last backward and then its own gradient sum and update."""
    ends = line.start_b[-1, ::2] + line.backward_X[::2]
    return float(max(end + tail for end, tail in zip(ends, tails, strict=True)))
