"""Micro-benchmarks of torch's engines on nets that cost nothing else, and the engines' terms fitted to them.

None of these nets is among the workloads that plans are compared on. Every plan of every net gives one equation: measured
seconds = what the cost model says + sum over terms of (how often it lies on the critical path) x (its seconds). A move, which
plans have about as often as styled modules, has an equation of its own, of moves alone; the other terms are then the
non-negative solution of least relative error.

Legend: N equations, U terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from datamodules.planning import collectives
from datamodules.planning.graph import Graph
from datamodules.planning.plan import Plan, StagePlan
from datamodules.planning.price import Evaluator
from datamodules.planning.topology import Topology
from lit_modules.execution.apply import apply
from lit_modules.execution.engine import TERMS, Engine, predict
from lit_modules.execution.launch import device
from lit_modules.execution.plans import executable_plans, pipeline
from lit_modules.execution.timing import Point, once, point
from lit_modules.execution.workloads import Workload, encoder, mlp

ADAM = partial(torch.optim.Adam, lr=1e-4, fused=True)  # reads and writes each tensor once, as the cost model has it
ALONE, MOVES = "alone", "moves"
MICRO_BATCHES = (1, 2, 4, 8)
MOVED_BYTES, MOVES_IN_A_ROW = 256, 8


@dataclass(frozen=True)
class Bench:
    """A tiny net under a plan; the plan named "alone" has one device and is run by every rank for itself."""

    name: str
    workload: Workload
    plan: Plan
    graph: Graph

    @property
    def what(self) -> str:
        """Its name in points."""
        return f"{self.workload.name}/{self.name}"


@dataclass(frozen=True)
class Equation:
    """What is predicted of a bench's step without the engines' terms, and how often each of these comes (U,)."""

    what: str
    base_s: float
    counts_U: np.ndarray


def benches(ranks: int) -> list[Bench]:
    """Return every plan of two depths of an MLP and of one encoder, and pipelines of one to eight micro-batches."""
    rows = 8 * ranks
    nets = [mlp(f"engine_mlp{n}", rows, 4 * ranks, 8 * ranks, n) for n in (2, max(4, ranks))]
    sizes = {"tokens": 2, "width": 8 * ranks, "hidden": 16 * ranks, "heads": ranks, "blocks": 1, "vocab": 8}
    nets.append(encoder("engine_encoder", rows, **sizes))
    found = []
    for net in nets:
        graph = net.graph()
        plans = executable_plans(graph, ranks, "any")
        kept = {name: plan for name, plan in plans.items() if len(plan.stages) == 1}
        kept[ALONE] = Plan(graph.digest, "any", (StagePlan(0, len(graph.ops) - 1, (0,)),))
        if net is nets[1]:
            kept |= {f"gpipe_{m}": pipeline(graph, ranks, "any", m, "gpipe") for m in MICRO_BATCHES}
            kept[f"1f1b_{2 * ranks}"] = pipeline(graph, ranks, "any", 2 * ranks, "1f1b")
        found += [Bench(name, net, plan, graph) for name, plan in kept.items()]
    return found


def ready(chosen: Sequence[Bench]) -> dict[str, Callable[[], object]]:
    """Set benches up in this rank: name -> a piece of work. A collective."""
    works: dict[str, Callable[[], object]] = {}
    for bench in chosen:
        net, batch = bench.workload.net(), bench.workload.data()
        if bench.name == ALONE:
            net = net.to(device())
            optimizer = ADAM(net.parameters())
            x, y = (tensor.to(device()) for tensor in batch)
            works[bench.what] = partial(_alone, bench.workload, net, optimizer, x, y)
            continue
        applied = apply(bench.plan, bench.graph, net, bench.workload.loss, ADAM)
        works[bench.what] = partial(applied.step, *batch)
        if bench.name == "tp":
            mesh = applied.mesh["column"]
            works[MOVES] = partial(_move, torch.ones(MOVED_BYTES // 4, device=device()), mesh)
    return works


def measure_engine(works: Mapping[str, Callable[[], object]], repeats: int) -> list[Point]:
    """Go round all benches `repeats` times. A collective; what ranks do together ends when the last has ended it."""
    seconds: dict[str, list[float]] = {what: [] for what in works}
    for turn in range(repeats + 2):  # pipelines learn their shapes in the first
        for what, work in works.items():
            spent = once(partial(_until_all_are_done, work))
            if turn >= 2:
                seconds[what].append(spent)
    empty = [once(dist.barrier) for _ in range(repeats + 1)][1:]
    return [*(point("step", 0.0, s, what) for what, s in seconds.items()), point("barrier", 0.0, empty)]


def equations(chosen: Sequence[Bench], topology: Topology, overlap: float) -> list[Equation]:
    """Return what is predicted of each bench without the engine's terms, and how often each of these comes."""
    found = []
    for bench in chosen:
        evaluator, net = Evaluator(bench.graph, topology), bench.workload.net()

        def step(seconds: Mapping[str, float], evaluator=evaluator, bench=bench, net=net) -> float:
            return predict(evaluator, bench.plan, net, Engine(seconds, overlap)).step_s

        base = step({})
        # A whole second of a term puts it on the critical path, as it is in nets without work.
        counts_U = np.array([round(step({name: 1.0}) - base) for name in TERMS], dtype=float)
        found.append(Equation(bench.what, base, counts_U))
    group = collectives.group_of(topology, range(topology.devices))
    message = collectives.collective("all_reduce", MOVED_BYTES, group, topology)
    counts_U = np.array([MOVES_IN_A_ROW * (name == "moved") for name in TERMS], dtype=float)
    found.append(Equation(MOVES, MOVES_IN_A_ROW * message, counts_U))
    return found


def solve(
    found: Sequence[Equation], seconds: Mapping[str, float], barrier_s: float = 0.0
) -> tuple[dict[str, float], float]:
    """Return the terms, and the mean relative error of the equations.

    Args:
        seconds: measured, by name.
        barrier_s: what each contains beside its work.
    """
    from scipy.optimize import nnls

    whole_N = np.array([seconds[e.what] for e in found])
    measured_N = np.maximum(whole_N - barrier_s, whole_N / 4)  # a barrier may be late when what it ends is not
    lacking_N = measured_N - np.array([e.base_s for e in found])
    counts_NU, u = np.stack([e.counts_U for e in found]), np.zeros(len(TERMS))
    own_N, moved = np.array([e.what == MOVES for e in found]), TERMS.index("moved")
    u[moved] = max(float(lacking_N[own_N].mean()) / MOVES_IN_A_ROW, 0.0)
    others = np.arange(len(TERMS)) != moved
    rest_N = (lacking_N - counts_NU[:, moved] * u[moved]) / measured_N
    u[others], _ = nnls((counts_NU / measured_N[:, None])[~own_N][:, others], rest_N[~own_N])
    errors_N = np.abs(counts_NU @ u - lacking_N) / measured_N
    return dict(zip(TERMS, u.tolist(), strict=True)), float(errors_N.mean())


def _until_all_are_done(work: Callable[[], object]) -> None:
    work()
    dist.barrier()


def _alone(workload: Workload, net: Any, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    workload.loss(net(x), y).backward()
    optimizer.step()


def _move(data: Tensor, mesh: Any) -> None:
    for _ in range(MOVES_IN_A_ROW):
        DTensor.from_local(data, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()]).to_local()
