"""Time plans on this machine, interleaved, and compare with what the cost model predicts on the machine as calibrated.

Legend: P plans.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import torch.distributed as dist
from filelock import FileLock

from datamodules.planning.graph import Graph
from datamodules.planning.plan import Plan
from datamodules.planning.topology import Topology
from lit_modules.execution.apply import Applied, apply
from lit_modules.execution.calibrate import Calibration, Calibrator, calibration
from lit_modules.execution.engine import Engine, Predicted
from lit_modules.execution.engine import predict as predict_step
from lit_modules.execution.engine_points import ADAM, Bench, benches
from lit_modules.execution.launch import launch
from lit_modules.execution.plans import executable_plans
from lit_modules.execution.rank_statistics import interval, kendall, right_pairs, spearman, within
from lit_modules.execution.timing import Point, once
from lit_modules.execution.verify import Case, largest_error
from lit_modules.execution.workloads import WORKLOADS, Workload

LIMIT_S = 900.0
RATIO = 1.3  # predicted times nearer than this are not told apart
TINY = ("mlp_tiny", "bert_tiny", "vgg_tiny")
LOCK = Path(tempfile.gettempdir()) / "fivefold-timing.lock"


@dataclass(frozen=True)
class Timed:
    """One plan: seconds of a step as predicted, and as measured, one for each repeat.

    Attributes:
        bare_s: what the cost model predicts without the engines' costs; NaN if it was not asked.
        parts: of the prediction, by cause.
    """

    workload: str
    plan: str
    predicted_s: float
    measured_s: tuple[float, ...]
    bare_s: float = math.nan
    parts: Mapping[str, float] = field(default_factory=dict)

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
        load: processes at work or waiting for a core, before and after; this measurement's own among the latter.
    """

    plans: tuple[Timed, ...]
    machine: Calibration
    error: float
    drift: float
    seconds: float
    load: tuple[float, float] = (math.nan, math.nan)

    def metrics(self) -> dict[str, float]:
        """The numbers that a cell logs; `lit_modules.auto_map_checks` says what each is. NaN never: what is not defined is left
        out.
        """
        found = {"plans": len(self.plans), "workloads": len(self.by_workload()), "error": self.error}
        found |= {"drift": 100 * self.drift, "seconds": self.seconds}
        found |= {"load_before": self.load[0], "load_after": self.load[1]}
        found |= self._agreement() | self._without_engine() | self._gains() | self._machine()
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

    def _without_engine(self) -> dict[str, float]:
        """The same measured times against the cost model alone, what the engine's terms change, and what repeats allow."""
        names = [plan.workload for plan in self.plans]
        everything, measured_P = np.arange(len(names)), np.array([plan.median_s for plan in self.plans])
        found: dict[str, float] = {}
        repeats = min(len(plan.measured_s) for plan in self.plans)
        if repeats > 1:
            one_P, other_P = (np.array([median(plan.measured_s[h::2]) for plan in self.plans]) for h in (0, 1))
            found["tau_within_repeated"] = within(names, one_P, other_P, everything)
        bare_P = np.array([plan.bare_s for plan in self.plans])
        if not np.isfinite(bare_P).all():
            return found
        predicted_P = np.array([plan.predicted_s for plan in self.plans])

        def gain(new_P: np.ndarray, measured_P: np.ndarray, chosen_I: np.ndarray) -> float:
            return within(names, new_P, measured_P, chosen_I) - within(names, bare_P, measured_P, chosen_I)

        values = {
            "tau_bare": (kendall(bare_P, measured_P), interval(kendall, bare_P, measured_P)),
            "tau_within_bare": (
                within(names, bare_P, measured_P, everything),
                interval(partial(within, names), bare_P, measured_P, indexed=True),
            ),
            "tau_within_gain": (
                gain(predicted_P, measured_P, everything),
                interval(gain, predicted_P, measured_P, indexed=True),
            ),
        }
        for name, (value, (low, high)) in values.items():
            found |= {name: value, f"{name}_low": low, f"{name}_high": high}
        return found | {"factor_bare": float(np.median(np.exp(np.abs(np.log(bare_P / measured_P)))))}

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
            "packing_gb_s": (topology.product_bytes_per_s or math.nan) / 1e9,
            "fit_engine": 100 * self.machine.engine_error,
            **{f"{name}_us": 1e6 * seconds for name, seconds in self.machine.engine.seconds.items()},
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
        started, load = time.monotonic(), os.getloadavg()[0]
        plans = [executable_plans(workload.graph(), ranks, "this_machine") for workload in workloads]
        error = largest_error(checks(ranks))
        graphs, small = [workload.graph() for workload in workloads], benches(ranks)
        answers = launch(_time_all, ranks, list(workloads), graphs, plans, small, repeats, seed, timeout_s=limit_s)
        before, after, seconds = answers[0]
        machine = calibration([*before, *after], ranks, benches=small)
        found = []
        for w, (workload, of_workload) in enumerate(zip(workloads, plans, strict=True)):
            bare = predict(workload, of_workload, machine.plain, None)
            for name, predicted in predict(workload, of_workload, machine.topology, machine.engine).items():
                times = predicted.step_s, tuple(seconds[w][name]), bare[name].step_s
                found.append(Timed(workload.name, name, *times, predicted.parts))
        took = time.monotonic() - started
        return Report(tuple(found), machine, error, _drift(before, after), took, (load, os.getloadavg()[0]))


def checks(ranks: int) -> list[Case]:
    """Every kind of plan on tiny nets, and FSDP2."""
    cases = []
    for name in TINY:
        plans = executable_plans(WORKLOADS[name].graph(), ranks, "any")
        cases += [Case(kind, WORKLOADS[name], plan) for kind, plan in plans.items()]
        cases.append(Case("fsdp", WORKLOADS[name], plans["dp"], "fsdp"))
    return cases


def predict(
    workload: Workload, plans: Mapping[str, Plan], topology: Topology, engine: Engine | None
) -> dict[str, Predicted]:
    """A step of each plan on a machine, with what torch's engines cost there; with None the cost model alone."""
    from datamodules.planning.price import Evaluator

    evaluator, net = Evaluator(workload.graph(), topology), workload.net()
    return {name: predict_step(evaluator, plan, net, engine) for name, plan in plans.items()}


def _drift(before: Sequence[Point], after: Sequence[Point]) -> float:
    return median(abs(b.seconds / a.seconds - 1) for a, b in zip(before, after, strict=True))


def _time_all(
    workloads: Sequence[Workload],
    graphs: Sequence[Graph],
    plans: Sequence[Mapping[str, Plan]],
    small: Sequence[Bench],
    repeats: int,
    seed: int,
) -> tuple[list[Point], list[Point], list[dict[str, list[float]]]]:
    """In each rank: set up every plan, warm each up, and go round all of them `repeats` times, each time in another order."""
    calibrator = Calibrator(small)
    before = calibrator.measure()
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
    return before, calibrator.measure(), seconds


def _once(applied: Applied, batch: Any) -> float:
    """Seconds from when all ranks begin a step until the last has ended it."""
    return once(lambda: (applied.step(*batch), dist.barrier()))
