"""Time plans on this machine, interleaved, and compare with what the cost model predicts on the machine as calibrated.

Legend: P plans.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock

from datamodules.planning.graph import Graph
from datamodules.planning.plan import Plan
from lit_modules.execution.apply import Applied, apply
from lit_modules.execution.calibrate import Calibration, Point, calibration, measure_points, timed
from lit_modules.execution.launch import launch
from lit_modules.execution.plans import executable_plans
from lit_modules.execution.rank_statistics import interval, kendall, right_pairs, spearman, within
from lit_modules.execution.verify import Case, largest_error
from lit_modules.execution.workloads import WORKLOADS, Workload

LIMIT_S = 900.0
RATIO = 1.3  # predicted times nearer than this are not told apart
ADAM = partial(torch.optim.Adam, lr=1e-4, fused=True)  # reads and writes each tensor once, as the cost model has it
TINY = ("mlp_tiny", "bert_tiny", "vgg_tiny")
LOCK = Path(tempfile.gettempdir()) / "fivefold-timing.lock"


@dataclass(frozen=True)
class Timed:
    """One plan: seconds of a step as predicted, and as measured, one for each repeat."""

    workload: str
    plan: str
    predicted_s: float
    measured_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Median of the repeats."""
        return median(self.measured_s)


@dataclass(frozen=True)
class Report:
    """Everything that was measured.

    Attributes:
        error: of the steps under each kind of plan, relative to one process.
        drift: median relative change of a calibration point between before and after.
    """

    plans: tuple[Timed, ...]
    machine: Calibration
    error: float
    drift: float
    seconds: float

    def metrics(self) -> dict[str, float]:
        """The numbers that a cell logs; `lit_modules.auto_map_checks` says what each is. NaN never: what is not defined is left
        out.
        """
        found = {"plans": len(self.plans), "workloads": len(self.by_workload()), "error": self.error}
        found |= {"drift": 100 * self.drift, "seconds": self.seconds}
        found |= self._agreement() | self._gains() | self._machine()
        return {name: float(value) for name, value in found.items() if math.isfinite(value)}

    def by_workload(self) -> dict[str, list[Timed]]:
        """Plans of each workload."""
        groups: dict[str, list[Timed]] = {}
        for plan in self.plans:
            groups.setdefault(plan.workload, []).append(plan)
        return groups

    def best(self, workload: str) -> Timed:
        """The plan predicted to be fastest."""
        return min(self.by_workload()[workload], key=lambda plan: plan.predicted_s)

    def _agreement(self) -> dict[str, float]:
        names = [plan.workload for plan in self.plans]
        predicted_P = np.array([plan.predicted_s for plan in self.plans])
        measured_P = np.array([plan.median_s for plan in self.plans])
        found: dict[str, float] = {}
        statistics: dict[str, Callable[..., float]] = {"tau": kendall, "spearman": spearman}
        statistics |= {"tau_within": partial(within, names), "pairs_right": partial(right_pairs, names, RATIO)}
        for name, statistic in statistics.items():
            by_index = name in ("tau_within", "pairs_right")
            low, high = interval(statistic, predicted_P, measured_P, indexed=by_index)
            everything = np.arange(len(names))
            value = statistic(predicted_P, measured_P, everything) if by_index else statistic(predicted_P, measured_P)
            found |= {name: value, f"{name}_low": low, f"{name}_high": high}
        apart = [
            (a, b)
            for group in self.by_workload().values()
            for i, a in enumerate(group)
            for b in group[:i]
            if max(a.predicted_s, b.predicted_s) > RATIO * min(a.predicted_s, b.predicted_s)
        ]
        factors = np.exp(np.abs(np.log(predicted_P / measured_P)))
        return found | {"pairs": len(apart), "factor": float(np.median(factors))}

    def _gains(self) -> dict[str, float]:
        gains, regrets, found = [], [], {}
        for workload, group in self.by_workload().items():
            times = {plan.plan: plan.median_s for plan in group}
            chosen = self.best(workload).median_s
            regrets.append(chosen / min(times.values()))
            if "dp" in times:
                gains.append(times["dp"] / chosen)
                found[f"gain_{workload}"] = gains[-1]
                if "tp" in times:
                    found[f"tp_over_dp_{workload}"] = times["tp"] / times["dp"]
        if gains:
            found |= {"gain": geometric_mean(gains), "gain_low": min(gains)}
        return found | {"regret": geometric_mean(regrets)}

    def _machine(self) -> dict[str, float]:
        topology, fits = self.machine.topology, self.machine.fits
        return {
            **{f"fit_{kind}": 100 * fit.error for kind, fit in fits.items()},
            "latency_us": 1e6 * topology.inside.latency_s,
            "bandwidth_mb_s": topology.inside.bytes_per_s / 1e6,
            "gflops": topology.flops_per_s["float32"] / 1e9,
            "memory_gb_s": topology.memory_bytes_per_s / 1e9,
            "launch_us": 1e6 * topology.launch_s,
        }


def measure(
    workloads: Sequence[Workload], ranks: int = 2, repeats: int = 7, seed: int = 0, limit_s: float = LIMIT_S
) -> Report:
    """Check, calibrate, time and calibrate again, while no other process does the same on this machine.

    Args:
        workloads: each is timed under all of its `executable_plans`.
        ranks: processes of one thread each.
        repeats: timed steps of each plan.
        limit_s: after so many seconds the processes are stopped.
    Raises:
        RanksFailed: a process failed, or time was up.
        PlanError: a batch that `ranks` does not divide.
    """
    with FileLock(LOCK):
        started = time.monotonic()
        plans = [executable_plans(workload.graph(), ranks, "this_machine") for workload in workloads]
        error = largest_error(checks(ranks))
        graphs = [workload.graph() for workload in workloads]
        answers = launch(_time_all, ranks, list(workloads), graphs, plans, repeats, seed, timeout_s=limit_s)
        before, after, seconds = answers[0]
        machine = calibration([*before, *after], ranks)
        found = tuple(
            Timed(workload.name, name, predicted, tuple(seconds[w][name]))
            for w, (workload, of_workload) in enumerate(zip(workloads, plans, strict=True))
            for name, predicted in predict(workload, of_workload, machine).items()
        )
        return Report(found, machine, error, _drift(before, after), time.monotonic() - started)


def checks(ranks: int) -> list[Case]:
    """Every kind of plan on tiny nets, and FSDP2."""
    cases = []
    for name in TINY:
        plans = executable_plans(WORKLOADS[name].graph(), ranks, "any")
        cases += [Case(kind, WORKLOADS[name], plan) for kind, plan in plans.items()]
        cases.append(Case("fsdp", WORKLOADS[name], plans["dp"], "fsdp"))
    return cases


def predict(workload: Workload, plans: Mapping[str, Plan], machine: Calibration) -> dict[str, float]:
    """Seconds of a step by the cost model on a calibrated machine, for each plan."""
    from datamodules.planning.price import Evaluator

    evaluator = Evaluator(workload.graph(), machine.topology)
    return {name: evaluator.price(plan).step_s for name, plan in plans.items()}


def _drift(before: Sequence[Point], after: Sequence[Point]) -> float:
    return median(abs(b.seconds / a.seconds - 1) for a, b in zip(before, after, strict=True))


def _time_all(
    workloads: Sequence[Workload],
    graphs: Sequence[Graph],
    plans: Sequence[Mapping[str, Plan]],
    repeats: int,
    seed: int,
) -> tuple[list[Point], list[Point], list[dict[str, list[float]]]]:
    """In each rank: set up every plan, warm each up, and go round all of them `repeats` times, each time in another order."""
    before = measure_points()
    ready: list[tuple[int, str, Applied, Any]] = []
    for w, (workload, of_workload) in enumerate(zip(workloads, plans, strict=True)):
        batch = workload.data(seed)
        for name, plan in of_workload.items():
            applied = apply(plan, graphs[w], workload.net(seed), workload.loss, ADAM)
            ready.append((w, name, applied, batch))
    for _, _, applied, batch in ready:
        applied.step(*batch)  # pipelines learn their shapes, optimisers make their state
    seconds: list[dict[str, list[float]]] = [{name: [] for name in of_workload} for of_workload in plans]
    order = np.random.default_rng(seed)  # the same on all ranks
    for _ in range(repeats):
        for k in order.permutation(len(ready)):
            w, name, applied, batch = ready[k]
            seconds[w][name].append(_once(applied, batch))
    return before, measure_points(), seconds


def _once(applied: Applied, batch: Any) -> float:
    """Seconds from when all ranks begin a step until the last has ended it."""
    return timed(lambda: (applied.step(*batch), dist.barrier()), repeats=1, warm_up=0)
