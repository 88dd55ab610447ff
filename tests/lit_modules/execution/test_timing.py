"""A point is the median of its repeats; rounds leave the warm-up out."""

from __future__ import annotations

import torch.distributed as dist

from lit_modules.execution.launch import launch
from lit_modules.execution.timing import once, point, rounds


def counted() -> tuple[int, int, bool]:
    """In each rank: how many rounds are timed and run, and whether a time is one."""
    calls: list[int] = []
    seconds = rounds(lambda: calls.append(1), repeats=3, warm_up=2)
    return len(seconds), len(calls), once(dist.barrier) > 0 and min(seconds) > 0


def test_rounds() -> None:
    assert launch(counted, 2) == [(3, 5, True)] * 2


def test_a_point_is_the_median() -> None:
    made = point("send", 8, [3.0, 1.0, 100.0], "x")
    assert made.seconds == 3
    assert made.samples == (3.0, 1.0, 100.0)
    assert made.what == "x"
