"""What this machine does per second and per byte, and what torch's engines cost on it, measured by the processes that will run
the plans, as a Topology and an Engine.

Every point is a median of repeats in which all ranks are at work, since they share memory and caches. Lines are fitted with
non-negative coefficients to relative errors: small messages count as much as large ones.

Legend: P points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from statistics import median

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from datamodules.planning.topology import Link, Topology
from lit_modules.execution.engine import Engine
from lit_modules.execution.engine_points import Bench, Equation, equations, measure_engine, ready, solve
from lit_modules.execution.launch import backend, device
from lit_modules.execution.timing import Point, point, rounds
from lit_modules.execution.workloads import mlp

KINDS = ("all_reduce", "send", "compute", "memory")  # lines
LAYER = ("arithmetic", "packing")  # the two rates of one fit
MESSAGES = (1 << 12, 1 << 15, 1 << 18, 1 << 20, 1 << 22, 1 << 24)  # bytes
PRODUCTS = ((64, 512, 2048), (512, 512, 2048), (2048, 64, 512), (256, 1024, 1024), (128, 256, 256))  # m, k, n
LAYERS = ((8, 320, 1280), (24, 640, 640), (48, 384, 1536), (160, 768, 384), (600, 320, 640))  # rows, inputs, outputs
SUMS = (1 << 14, 1 << 17, 1 << 20, 1 << 22)  # elements
TINY = mlp("overhead", 2, 8, 8, 4)  # a net so small that only the start of its operations costs
REPEATS, TURNS = 5, 9
DRAWS = 200


@dataclass(frozen=True)
class Fit:
    """seconds = intercept + amount / rate, and the mean error of that over the points, relative."""

    intercept: float
    rate: float
    error: float


@dataclass(frozen=True)
class Calibration:
    """A machine as fitted, the fits it came from, and the points those were made on.

    Attributes:
        topology: with what products cost beside their arithmetic, where points measure that.
        plain: without it, as the cost model had it before there were engines.
        engine: what torch's engines cost on it; nothing where no point measures it.
        engine_error: mean relative error of that over its micro-benchmarks.
        intervals: 95 % bootstrap over repeats, by the names of `terms`.
    """

    topology: Topology
    plain: Topology
    fits: Mapping[str, Fit]
    points: tuple[Point, ...]
    engine: Engine = field(default_factory=Engine)
    engine_error: float = 0.0
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def terms(self) -> dict[str, float]:
        """Every calibrated number by name; seconds, bytes/s or operations/s."""
        return _terms(self.fits, self.topology.launch_s, self.engine)


class Calibrator:
    """Micro-benchmarks set up in a rank, to be gone through before and after plans are timed. A collective."""

    def __init__(self, benches: Sequence[Bench]) -> None:
        self.works = ready(benches)

    def measure(self, repeats: int = REPEATS, turns: int = TURNS) -> list[Point]:
        """Measure all kinds. A collective; each rank returns its own times."""
        found = [*_messages(repeats), *_products(repeats), *_sums(repeats), _overhead(repeats)]
        if self.works:
            found += [*_layers(repeats), *measure_engine(self.works, turns)]
        return found


def measure_points(benches: Sequence[Bench] = (), repeats: int = REPEATS) -> list[Point]:
    """Set up and measure once. A collective; each rank returns its own times."""
    return Calibrator(benches).measure(repeats)


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


def calibration(
    points: Sequence[Point], ranks: int, name: str = "this_machine", benches: Sequence[Bench] = ()
) -> Calibration:
    """Fit points to a topology of one node and, where they measure it, to an engine.

    An all-reduce of b bytes over n ranks is 2 (n - 1) (latency + b / n / bandwidth), as `collectives` has it for a ring.

    Args:
        benches: of the engine's points.
    Raises:
        ValueError: points that are no line.
    """
    fits = _fits(points)
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
    made = Calibration(topology, topology, fits, tuple(points))
    if "packing" in fits:
        arithmetic, packing = fits["arithmetic"].rate, fits["packing"].rate
        rates = {"float32": arithmetic, "float64": arithmetic / 2}
        topology = replace(topology, flops_per_s=rates, product_bytes_per_s=packing)
        made = replace(made, topology=topology)
    asked: list[Equation] = []
    if benches and any(p.kind == "step" for p in points):
        overlap = float(backend(ranks) == "nccl")  # a process that sends by its own core does not compute meanwhile
        asked = equations(benches, topology, overlap)
        seconds, error = solve(asked, *_steps(points))
        made = replace(made, engine=Engine(seconds, overlap), engine_error=error)
    return replace(made, intervals=_intervals(points, asked))


def _fits(points: Sequence[Point]) -> dict[str, Fit]:
    found = {kind: fit_line([p for p in points if p.kind == kind]) for kind in KINDS}
    layers = [p for p in points if p.kind == "layer"]
    return found | fit_products(layers) if layers else found


def fit_products(points: Sequence[Point]) -> dict[str, Fit]:
    """Fit seconds = operations / rate + bytes / rate of products of several shapes, both non-negative, to relative errors.

    Raises:
        ValueError: times that do not grow with the operations.
    """
    from scipy.optimize import nnls

    seconds_P = np.array([p.seconds for p in points])
    amounts_P2 = np.array([(p.amount, p.bytes) for p in points])
    top_2 = amounts_P2.max(axis=0)
    slopes_2, _ = nnls(amounts_P2 / top_2 / seconds_P[:, None], np.ones(len(points)))
    if slopes_2[0] <= 0:
        raise ValueError("layer: times do not grow with the operations; measure on a quieter machine")
    error = float(np.mean(np.abs(amounts_P2 / top_2 @ slopes_2 / seconds_P - 1)))
    rates = [float(top / slope) if slope > 0 else np.inf for top, slope in zip(top_2, slopes_2, strict=True)]
    return {name: Fit(0.0, rate, error) for name, rate in zip(LAYER, rates, strict=True)}


def _steps(points: Sequence[Point]) -> tuple[dict[str, float], float]:
    """Seconds of the engine's benches, and of a barrier alone: medians over the times that all was gone through."""
    found: dict[str, list[float]] = {}
    for p in points:
        if p.kind == "step":
            found.setdefault(p.what, []).append(p.seconds)
    barriers = [p.seconds for p in points if p.kind == "barrier"]
    return {what: median(seconds) for what, seconds in found.items()}, median(barriers) if barriers else 0.0


def _terms(fits: Mapping[str, Fit], launch_s: float, engine: Engine) -> dict[str, float]:
    found = {"start_s": launch_s}
    for kind, fit in fits.items():
        found |= (
            {f"{kind}_per_s": fit.rate} if kind in LAYER else {f"{kind}_s": fit.intercept, f"{kind}_per_s": fit.rate}
        )
    return found | {f"{name}_s": s for name, s in engine.seconds.items()}


def _intervals(points: Sequence[Point], asked: Sequence[Equation], seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap over the repeats of each point. What the cost model says of the engine's benches is kept as it
    is, so an interval of an engine's term is of its own measurement alone.
    """
    if not all(p.samples for p in points):
        return {}
    generator = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {}
    for _ in range(DRAWS):
        again = [_resampled(p, generator) for p in points]
        try:
            fits = _fits(again)
        except ValueError:
            continue  # a draw that is no line
        starts = [p.seconds / p.amount for p in again if p.kind == "overhead"]
        engine = Engine(solve(asked, *_steps(again))[0]) if asked else Engine()
        for name, value in _terms(fits, median(starts), engine).items():
            drawn.setdefault(name, []).append(value)
    quantiles = {name: np.quantile(values, [0.025, 0.975]) for name, values in drawn.items()}
    return {name: (float(low), float(high)) for name, (low, high) in quantiles.items()}


def _resampled(p: Point, generator: np.random.Generator) -> Point:
    return replace(p, seconds=float(np.median(generator.choice(p.samples, len(p.samples)))))


def _messages(repeats: int) -> list[Point]:
    found = []
    for size in MESSAGES:
        data = torch.ones(size // 4, device=device())
        found.append(point("all_reduce", size, rounds(partial(dist.all_reduce, data), repeats)))
        data.fill_(1.0)
        found.append(point("send", size, rounds(partial(_there, data), repeats)))
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
        found.append(point("compute", 2.0 * m * k * n, rounds(partial(torch.matmul, a, b.T), repeats)))
    return found


def _layers(repeats: int) -> list[Point]:
    """A layer's three products, forwards and backwards, of weights that were not used a moment ago."""
    found = []
    for m, k, n in LAYERS:
        x, dy = torch.ones(m, k, device=device()), torch.ones(m, n, device=device())
        weights = cycle([torch.ones(n, k, device=device()) for _ in range(4)])
        size = 4 * (m * k + k * n + m * n)
        works = {
            "forward": lambda x=x, w=weights: x @ next(w).T,
            "input": lambda dy=dy, w=weights: dy @ next(w),
            "weight": lambda dy=dy, x=x: dy.T @ x,
        }
        for name, work in works.items():
            made = point("layer", 2.0 * m * k * n, rounds(work, repeats), f"{name} {m} {k} {n}")
            found.append(replace(made, bytes=size))
    return found


def _sums(repeats: int) -> list[Point]:
    found = []
    for size in SUMS:
        a, b = torch.ones(size, device=device()), torch.ones(size, device=device())
        found.append(point("memory", 12.0 * size, rounds(partial(torch.add, a, b), repeats)))
    return found


def _overhead(repeats: int) -> Point:
    """Seconds of a whole step of a net of next to no work, and how many operations of its graph cost a start."""
    from datamodules.planning.vocabulary import VIEWS

    net: nn.Module = TINY.net().to(device())
    x, y = (tensor.to(device()) for tensor in TINY.data())

    def step() -> None:
        TINY.loss(net(x), y).backward()

    count = sum(op.kind not in VIEWS for op in TINY.graph().ops)
    return point("overhead", count, rounds(step, repeats))
