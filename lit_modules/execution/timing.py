"""Seconds of a piece of work that all ranks begin together, and such measurements as points to fit to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from lit_modules.execution.launch import device


@dataclass(frozen=True)
class Point:
    """One measurement: `amount` bytes, operations, or graph operations started, in `seconds`, the median of `samples`.

    Attributes:
        what: which micro-benchmark, where a kind has several that no amount tells apart.
        bytes: of operands and results, where the amount is operations and they cost as well.
    """

    kind: str
    amount: float
    seconds: float
    samples: tuple[float, ...] = ()
    what: str = ""
    bytes: float = 0.0


def point(kind: str, amount: float, samples: list[float], what: str = "") -> Point:
    """The point of some repeats."""
    return Point(kind, amount, median(samples), tuple(samples), what)


def once(work: Callable[[], object]) -> float:
    """Seconds of a piece of work that all ranks begin together."""
    dist.barrier()
    _finish()
    start = time.perf_counter()
    work()
    _finish()
    return time.perf_counter() - start


def rounds(work: Callable[[], object], repeats: int, warm_up: int = 1) -> list[float]:
    """Seconds of `repeats` rounds, after `warm_up` that are not counted."""
    return [once(work) for _ in range(repeats + warm_up)][warm_up:]


def _finish() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
