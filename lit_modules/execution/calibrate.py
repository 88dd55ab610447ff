"""What this machine does per second and per byte, measured by the processes that will run the plans, as a Topology.

Every point is a median of repeats in which all ranks are at work, since they share memory and caches. Lines are fitted with
non-negative coefficients to relative errors: small messages count as much as large ones.

Legend: P points.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from datamodules.planning.topology import Link, Topology
from lit_modules.execution.launch import device
from lit_modules.execution.workloads import mlp

KINDS = ("all_reduce", "send", "compute", "memory", "overhead")
MESSAGES = (1 << 12, 1 << 15, 1 << 18, 1 << 20, 1 << 22, 1 << 24)  # bytes
PRODUCTS = ((64, 512, 2048), (512, 512, 2048), (2048, 64, 512), (256, 1024, 1024), (128, 256, 256))  # m, k, n
SUMS = (1 << 14, 1 << 17, 1 << 20, 1 << 22)  # elements
TINY = mlp("overhead", 2, 8, 8, 4)  # a net so small that only the start of its operations costs
REPEATS = 5


@dataclass(frozen=True)
class Point:
    """One measurement: `amount` bytes, operations, or graph operations started, in `seconds`."""

    kind: str
    amount: float
    seconds: float


@dataclass(frozen=True)
class Fit:
    """seconds = intercept + amount / rate, and the mean error of that over the points, relative."""

    intercept: float
    rate: float
    error: float


@dataclass(frozen=True)
class Calibration:
    """A machine as fitted, the fits it came from, and the points those were made on."""

    topology: Topology
    fits: Mapping[str, Fit]
    points: tuple[Point, ...]


def measure_points(repeats: int = REPEATS) -> list[Point]:
    """Measure all kinds. A collective; each rank returns its own times."""
    found = [*_messages(repeats), *_products(repeats), *_sums(repeats)]
    return [*found, _overhead(repeats)]


def fit_line(points: Sequence[Point]) -> Fit:
    """Fit seconds = intercept + amount / rate, both non-negative, to relative errors.

    Raises:
        ValueError: fewer than two amounts, or times that do not grow with the amount.
    """
    from scipy.optimize import nnls

    amounts_P = np.array([p.amount for p in points], dtype=float)
    seconds_P = np.array([p.seconds for p in points], dtype=float)
    if len(set(amounts_P)) < 2:
        raise ValueError(f"a line needs two amounts or more, got {sorted(set(amounts_P))}")
    top = amounts_P.max()  # so that both columns are of one size
    (intercept, slope), _ = nnls(np.stack([1 / seconds_P, amounts_P / top / seconds_P], 1), np.ones(len(points)))
    if slope <= 0:
        raise ValueError(f"{points[0].kind}: times do not grow with the amount; measure on a quieter machine")
    predicted_P = intercept + amounts_P * slope / top
    return Fit(float(intercept), float(top / slope), float(np.mean(np.abs(predicted_P / seconds_P - 1))))


def calibration(points: Sequence[Point], ranks: int, name: str = "this_machine") -> Calibration:
    """Fit points to a topology of one node.

    An all-reduce of b bytes over n ranks is 2 (n - 1) (latency + b / n / bandwidth), as `collectives` has it for a ring.
    """
    fits = {kind: fit_line([p for p in points if p.kind == kind]) for kind in KINDS if kind != "overhead"}
    starts = [p.seconds / p.amount for p in points if p.kind == "overhead"]
    ring, stream = fits["all_reduce"], fits["send"]
    hops = 2 * (ranks - 1)
    inside = Link(ring.intercept / hops, hops / ranks * ring.rate)
    topology = Topology(
        name=name,
        nodes=1,
        devices_per_node=ranks,
        inside=inside,
        between=inside,
        flops_per_s={"float32": fits["compute"].rate, "float64": fits["compute"].rate / 2},
        memory_bytes_per_s=fits["memory"].rate,
        memory_bytes=max(1, psutil.virtual_memory().available // ranks),
        launch_s=median(starts) if starts else 0.0,
        send_inside=Link(stream.intercept, stream.rate),
        source=f"calibrated on this machine with {ranks} ranks; float64 is taken as half of float32",
    )
    return Calibration(topology, fits, tuple(points))


def timed(work: Callable[[], object], repeats: int, warm_up: int = 1) -> float:
    """Median seconds of a piece of work that all ranks begin together; `warm_up` rounds before are not counted."""
    seconds = []
    for _ in range(repeats + warm_up):
        dist.barrier()
        _finish()
        start = time.perf_counter()
        work()
        _finish()
        seconds.append(time.perf_counter() - start)
    return median(seconds[warm_up:])


def _finish() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def _messages(repeats: int) -> list[Point]:
    found = []
    for size in MESSAGES:
        data = torch.ones(size // 4, device=device())
        found.append(Point("all_reduce", size, timed(partial(dist.all_reduce, data), repeats)))
        data.fill_(1.0)
        found.append(Point("send", size, timed(partial(_there, data), repeats)))
    return found


def _there(data: Tensor) -> None:
    """Rank 0 sends to rank 1; the others wait. Both halves of the pair see the same time within a latency."""
    if dist.get_rank() == 0:
        dist.send(data, 1)
    elif dist.get_rank() == 1:
        dist.recv(data, 0)


def _products(repeats: int) -> list[Point]:
    found = []
    for m, k, n in PRODUCTS:
        a, b = torch.ones(m, k, device=device()), torch.ones(n, k, device=device())
        found.append(Point("compute", 2.0 * m * k * n, timed(partial(torch.matmul, a, b.T), repeats)))
    return found


def _sums(repeats: int) -> list[Point]:
    found = []
    for size in SUMS:
        a, b = torch.ones(size, device=device()), torch.ones(size, device=device())
        found.append(Point("memory", 12.0 * size, timed(partial(torch.add, a, b), repeats)))
    return found


def _overhead(repeats: int) -> Point:
    """Seconds of a whole step of a net of next to no work, and how many operations of its graph cost a start."""
    from datamodules.planning.vocabulary import VIEWS

    net: nn.Module = TINY.net().to(device())
    x, y = (tensor.to(device()) for tensor in TINY.data())

    def step() -> None:
        TINY.loss(net(x), y).backward()

    count = sum(op.kind not in VIEWS for op in TINY.graph().ops)
    return Point("overhead", count, timed(step, repeats))
