"""How fast plans are searched: decisions a second of every kind of environment, and what each step costs as a model grows.

The named peers, in the same run and through the same environment: the whole plan evaluated again at each decision, from what
is split to where every tensor lies and what that costs; and, for times, placements kept up to date, but all operations priced
again by the compiled loops. Sizes are BERT of ever more layers, up to 100,000 operations: small ones are traced, large ones
written out from four traced blocks. Seconds are those of the processor, so that other programs do not count.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LAYERS = (2, 12, 48, 192, 1041)  # about 250 to 100,000 operations
TRACED = 12  # layers up to which a model is traced: that takes a minute for 45,000 operations
BUDGET_S = 1.0  # of each measurement
OURS, WHOLE, EVERY = "incremental (ours)", "whole plan again", "every operation again"
PARTITIONS = (
    *(("bert-24", "count", True), ("bert-24", "count", False), ("bert-24", "time", True), ("bert-24", "time", False)),
    *(("t5-large-paper", "count", True), ("t5-large-paper", "time", True), ("vgg19", "count", True)),
    ("vgg19", "time", True),
)  # model, objective, whether repeated blocks are tied


@dataclass(frozen=True)
class Family:
    """One kind of problem.

    Attributes:
        make: a fresh problem.
        peers: other ways to find the cost of the plan that a problem stands at.
    """

    name: str
    model: str
    operations: int | None
    make: Callable[[], Any]
    peers: dict[str, Callable[[Any], float]]


@dataclass(frozen=True)
class Speed:
    """Decisions a second of an environment that is paid at each decision, and what ours are of them."""

    problem: str
    model: str
    operations: int | None
    way: str
    decisions_per_s: float
    ratio: float


@dataclass(frozen=True)
class Size:
    """Seconds to make a graph, to work out linkage groups, to set prices up, and to find the best of the paper's plans.

    Then decisions a second, each priced, and how many times as many as the whole plan evaluated again at each would allow.
    """

    operations: int
    variables: int
    graph: str
    graph_s: float
    linkage_s: float
    prices_s: float
    search_s: float
    decisions_per_s: float
    ratio: float


def partition(graph: Any, model: str, objective: str, tying: bool) -> Family:
    """Return operator partitioning on one server."""
    from datamodules.planning.optimum import value_of
    from datamodules.planning.partition_env import Pruning
    from datamodules.planning.price import Evaluator
    from datamodules.planning.problems import Partitioning
    from datamodules.planning.topology import load_topology

    topology = load_topology("v100_1x8")
    source = Partitioning(graph, topology, objective, Pruning(tying=tying))  # type: ignore[arg-type]
    evaluator = Evaluator(graph, topology)

    def seconds(problem: Any) -> float:
        cost = evaluator.price(source.plan(problem))
        return cost.step_s if cost.feasible else float("inf")

    def every(problem: Any) -> float:
        step_s = value_of(problem.pricer.tables, problem.pricer.place, topology, 1, True)
        return step_s if problem.pricer.memory_bytes <= topology.memory_limit else float("inf")

    def missed(problem: Any) -> float:
        sizes = {p.tensor: graph.tensors[p.tensor].bytes for p in graph.parameters}
        return _missed(graph, topology.devices, source.split(problem), sizes)

    name = f"operators, {objective}{'' if tying else ', untied'}"
    peers: dict[str, Callable[[Any], float]] = (
        {WHOLE: seconds, EVERY: every} if objective == "time" else {WHOLE: missed}
    )
    return Family(name, model, len(graph.ops), source.problem, peers)


def inputs(graph: Any, model: str) -> Family:
    """Return automatic data parallelism on one server."""
    from datamodules.planning.problems import InputSplitting
    from datamodules.planning.topology import load_topology

    source = InputSplitting(graph, load_topology("v100_1x8"))
    sizes = {t: graph.tensors[t].bytes for t in graph.inputs}

    def missed(problem: Any) -> float:
        slots = zip(source.decided.slots, problem.values(), strict=True)
        return _missed(graph, source.topology.devices, {s.variable: s.dim for s, value in slots if value == 1}, sizes)

    return Family("inputs", model, len(graph.ops), source.problem, {WHOLE: missed})


def _missed(graph: Any, devices: int, splits: dict[int, int], sizes: dict[int, int]) -> float:
    """The cost of the objective "count" by propagating a whole plan: what it does not split, and the share of bytes."""
    from datamodules.planning.partition_env import TIE
    from datamodules.planning.propagate import Conflict, propagate

    found = propagate(graph, devices, splits)
    if isinstance(found, Conflict):
        return float("inf")
    split = [t for t in sizes if found.get(t, -1) >= 0]
    share = sum(sizes[t] for t in split) / max(1, sum(sizes.values()))
    return 1 + len(sizes) - len(split) + TIE * (1 - share)


def stages() -> list[Family]:
    """Return pipelines of BERT-48's measured profile, and of made-up models, each episode another, on four servers."""
    from functools import partial

    import numpy as np

    from datamodules.planning.pipeline_env import Window
    from datamodules.planning.problems import drawn_problem, profile_staging
    from datamodules.planning.topology import load_topology

    topology, options = load_topology("v100_4x8"), {"window": Window(2, 2), "micro_batches": 16}
    source, rng = profile_staging(topology, 4, 64, None, **options), np.random.default_rng(0)
    draw = partial(drawn_problem, rng, topology, 4, 128, options)

    def length(problem: Any) -> float:
        return problem.model.pipeline.length(*problem.completed())

    return [
        Family("pipeline", "bert-48-profile", None, source.problem, {WHOLE: length}),
        Family("pipelines", "made-up models", None, draw, {WHOLE: length}),
    ]


def families() -> Iterator[Family]:
    """Yield every kind of problem."""
    from datamodules.planning.workloads import load_graph

    for model, objective, tying in PARTITIONS:
        yield partition(load_graph(model), model, objective, tying)
    yield inputs(load_graph("bert-24"), "bert-24")
    yield from stages()


def environment(family: Family, way: str = OURS) -> Any:
    """Return an environment that is paid at each decision, its plans priced our way or a peer's."""
    from datamodules.planning.environment import PlanEnvironment

    def drawn(_: Any = None) -> Any:
        problem = family.make()
        if way != OURS:
            known: dict[tuple[int, ...], float] = {}

            def cost() -> float:
                if problem.decisions not in known:  # it is asked twice, before a decision and after
                    known.clear()
                    known[problem.decisions] = family.peers[way](problem)
                return known[problem.decisions]

            problem.cost = cost
        return problem

    return PlanEnvironment(drawn if family.model == "made-up models" else drawn(), "shaped")


def rate(env: Any) -> float:
    """Return decisions a second over random plans."""
    import numpy as np

    rng, steps, spent, begun = random.Random(0), 0, 0.0, time.process_time()
    while spent < BUDGET_S:
        observed, _ = env.reset()
        done = False
        while not done and spent < BUDGET_S:
            actions = np.flatnonzero(observed["mask"])
            observed, _, done, _, _ = env.step(int(actions[int(rng.random() * len(actions))]))
            steps, spent = steps + 1, time.process_time() - begun
    return steps / spent


def speeds() -> list[Speed]:
    """Return decisions a second of every family, our way and its peers'."""
    found = []
    for family in families():
        walks = {way: environment(family, way) for way in (OURS, *family.peers)}
        for env in walks.values():
            env.reset()
            env.step(int(env.problem.allowed().argmax()))  # what is compiled is compiled
        rates = {way: rate(env) for way, env in walks.items()}
        for way, value in rates.items():
            found.append(Speed(family.name, family.model, family.operations, way, value, rates[OURS] / value))
    return found


def sizes(layers: tuple[int, ...] = LAYERS) -> list[Size]:
    """Return what each step costs as a BERT grows."""
    from datamodules.planning.partition_env import Pruning
    from datamodules.planning.price import Evaluator
    from datamodules.planning.problems import Partitioning
    from datamodules.planning.repeat import repeated
    from datamodules.planning.searchers import Budget, search
    from datamodules.planning.topology import load_topology
    from datamodules.planning.trace import trace
    from datamodules.planning.workloads import build_step

    rows, topology = [], load_topology("v100_1x8")
    for count in layers:
        clock, traced = [time.process_time()], count <= TRACED
        graph = trace(lambda n=count if traced else 4: build_step("bert-2", layers=n), f"bert-{count}")  # type: ignore[misc]
        graph = graph if traced else repeated(graph, count)
        clock.append(time.process_time())
        source = Partitioning(graph, topology, "time", Pruning())
        clock.append(time.process_time())
        problem = source.problem()
        clock.append(time.process_time())
        search(problem, "exhaustive", Budget(steps=100_000))
        clock.append(time.process_time())
        quick = rate(environment(Family("", "", len(graph.ops), source.problem, {})))
        evaluator, best = Evaluator(graph, topology), source.plan(problem)
        evaluator.price(best)  # sets up what plans share
        again = time.process_time()
        evaluator.price(best)
        whole = quick * (time.process_time() - again)
        made, linked, priced, searched = (after - before for before, after in itertools.pairwise(clock))
        kind = "traced" if traced else "written out"
        counts = len(graph.ops), len(graph.parameters)
        rows.append(Size(*counts, kind, made, linked, priced, searched, quick, whole))
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
