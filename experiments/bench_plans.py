"""How fast plans are searched: decisions a second, priced incrementally, against pricing the whole plan; and what size costs.

Sizes are BERT of ever more layers, up to 100,000 operations, traced, folded and searched like any other model.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LAYERS = (2, 12, 48, 192, 1041)  # about 250 to 100,000 operations
BUDGET_S = 2.0  # of each measurement


@dataclass(frozen=True)
class Speed:
    """Decisions a second of one way to price a plan on one model, and what the other way's are of them."""

    model: str
    operations: int
    way: str
    decisions_per_s: float
    ratio: float


@dataclass(frozen=True)
class Size:
    """Seconds to trace a model, to work out linkage groups, to set prices up, and to find the best of the paper's plans."""

    operations: int
    variables: int
    trace_s: float
    linkage_s: float
    prices_s: float
    search_s: float
    decisions_per_s: float


def _walks(problem: Any, price: Callable[[], float]) -> float:
    """Decisions a second over random plans, each decision priced."""
    import numpy as np

    rng, steps, begun = np.random.default_rng(0), 0, time.perf_counter()
    while time.perf_counter() - begun < BUDGET_S:
        problem.reset()
        while not problem.done:
            actions = np.flatnonzero(problem.allowed())
            problem.step(int(actions[rng.integers(len(actions))]))
            price()
            steps += 1
    return steps / (time.perf_counter() - begun)


def speeds(name: str = "bert-24") -> list[Speed]:
    """Return decisions a second with incremental prices, and with the whole plan priced again after each decision."""
    from datamodules.planning.partition_env import Pruning
    from datamodules.planning.price import Evaluator
    from datamodules.planning.problems import Partitioning
    from datamodules.planning.topology import load_topology
    from datamodules.planning.workloads import load_graph

    graph, topology = load_graph(name), load_topology("v100_1x8")
    found = []
    source = Partitioning(graph, topology, "time", Pruning(tying=False))
    problem, evaluator = source.problem(), Evaluator(graph, topology)
    pricer: Any = problem.pricer
    quick = _walks(problem, lambda: pricer.step_s)
    whole = _walks(problem, lambda: evaluator.price(source.plan(problem)).step_s)
    for way, rate in (("incremental (ours)", quick), ("whole plan again", whole)):
        found.append(Speed(name, len(graph.ops), way, rate, quick / rate))
    return found


def sizes(layers: tuple[int, ...] = LAYERS) -> list[Size]:
    """Return what each step costs as a BERT grows."""
    from datamodules.planning.partition_env import Pruning
    from datamodules.planning.problems import Partitioning
    from datamodules.planning.searchers import Budget, search
    from datamodules.planning.topology import load_topology
    from datamodules.planning.trace import trace
    from datamodules.planning.workloads import build_step

    rows, topology = [], load_topology("v100_1x8")
    for count in layers:
        begun = time.perf_counter()
        graph = trace(lambda count=count: build_step("bert-2", layers=count), f"bert-{count}")  # type: ignore[misc]
        traced = time.perf_counter()
        source = Partitioning(graph, topology, "time", Pruning())
        linked = time.perf_counter()
        problem = source.problem()
        priced = time.perf_counter()
        search(problem, "exhaustive", Budget(steps=100_000))
        searched = time.perf_counter()
        pricer: Any = problem.pricer
        rate = _walks(problem, lambda pricer=pricer: pricer.step_s)  # type: ignore[misc]
        times = (traced - begun, linked - traced, priced - linked, searched - priced)
        rows.append(Size(len(graph.ops), len(graph.parameters), *times, rate))
    return rows


def run_plan_bench(out: Path, layers: tuple[int, ...] = LAYERS) -> None:
    """Measure both on one thread, print them, and write plan_speed.csv and plan_size.csv with the hardware named."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    from rich.console import Console

    from experiments.provenance import hardware, versions
    from experiments.store import write_atomically

    torch.set_num_threads(1)
    console = Console(width=max(124, Console().width))
    first = f"# {hardware()['cpu']}, one thread, torch {versions()['torch']}\n"
    results: dict[str, list[Any]] = {"plan_speed": list(speeds()), "plan_size": list(sizes(layers))}
    for name, rows in results.items():
        text = io.StringIO()
        text.write(first)
        writer = csv.DictWriter(text, list(asdict(rows[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows)
        write_atomically(out / f"{name}.csv", text.getvalue())
        console.print(text.getvalue(), soft_wrap=True, highlight=False)
