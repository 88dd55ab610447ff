"""What `fivefold calibrate-machine` and `fivefold measure-plans` do; the commands themselves are registered in `cli`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console
from rich.table import Table

from experiments.errors import UserError
from experiments.schema import nearest
from experiments.store import write_atomically

if TYPE_CHECKING:
    from lit_modules.execution.calibrate import Calibration
    from lit_modules.execution.measure import Report

COMPARED = ("mlp_64", "mlp_1024", "bert_8x16", "vgg_8")  # as conf/ablation/auto_map/machine_2.yaml has them
WORDS = {
    "start": "operation",
    "all_reduce": "all-reduce",
    "send": "send",
    "compute": "square product",
    "memory": "sum",
    "arithmetic": "layer: arithmetic",
    "packing": "layer: operands",
    "styled": "DTensor module",
    "moved": "DTensor message",
    "reducer": "DDP step",
    "chunk": "pipeline chunk",
}


def calibrate_machine(console: Console, ranks: int = 2, target: Path | None = None) -> None:
    """Measure this machine with `ranks` processes, print each term, and write a topology that `--topology FILE` reads.

    Raises:
        UserError: a target that exists, fewer than 2 ranks, or processes that failed.
    """
    from filelock import FileLock

    from lit_modules.execution.calibrate import calibration, measure_points
    from lit_modules.execution.engine_points import benches
    from lit_modules.execution.launch import RanksFailed, launch
    from lit_modules.execution.measure import LOCK

    _refuse(ranks, target)
    _warn(console, ranks)
    name, small = target.stem if target is not None else "this_machine", benches(ranks)
    try:
        with FileLock(LOCK):
            before = os.getloadavg()[0]
            machine = calibration(launch(measure_points, ranks, small)[0], ranks, name, small)
    except (RanksFailed, ValueError) as error:
        raise UserError(f"this machine could not be calibrated: {error}") from None
    console.print(terms_table(machine))
    console.print(f"load {before:.1f} before, {os.getloadavg()[0]:.1f} after, of {_cores()} cores", highlight=False)
    if target is not None:
        write_atomically(target, _as_text(machine))
        console.print(f"Written to {target}.", soft_wrap=True)


def measure_plans(
    console: Console, names: Sequence[str] = (), ranks: int = 2, repeats: int = 7, target: Path | None = None
) -> None:
    """Run every executable plan of some workloads, print predicted and measured times, and write the numbers as YAML.

    Args:
        names: of workloads; none for those of the suite's own comparison.
    Raises:
        UserError: an unknown workload, a target that exists, fewer than 2 ranks, or processes that failed.
    """
    from datamodules.planning.plan import PlanError
    from lit_modules.execution.launch import RanksFailed
    from lit_modules.execution.measure import measure
    from lit_modules.execution.workloads import WORKLOADS

    _refuse(ranks, target)
    for name in names:
        if name not in WORKLOADS:
            raise UserError(f"unknown workload '{name}'{nearest(name, WORKLOADS)}")
    _warn(console, ranks)
    try:
        report = measure([WORKLOADS[name] for name in dict.fromkeys(names or COMPARED)], ranks, repeats)
    except (RanksFailed, PlanError, ValueError) as error:
        raise UserError(f"the plans could not be measured: {error}") from None
    console.print(terms_table(report.machine))
    console.print(plans_table(report))
    console.print(summary(report), markup=False, highlight=False, soft_wrap=True)
    if target is not None:
        rows = [{**vars(p), "measured_s": list(p.measured_s), "parts": dict(p.parts)} for p in report.plans]
        whole = {"metrics": report.metrics(), "plans": rows, "topology": report.machine.topology.to_dict()}
        whole["terms"] = report.machine.terms
        write_atomically(target, yaml.safe_dump(whole, sort_keys=False))
        console.print(f"Written to {target}.", soft_wrap=True)


def terms_table(machine: Calibration) -> Table:
    """Every calibrated term with its 95 % interval over repeats, and how far points are from their line, on average."""
    table = Table("measured", "each (us)", "rate", "error", title=machine.topology.name)
    giga = {"compute": "GFLOP/s", "arithmetic": "GFLOP/s", "packing": "GB/s", "memory": "GB/s"}
    terms, between = machine.terms, machine.intervals
    for kind in dict.fromkeys(name.removesuffix("_per_s").removesuffix("_s") for name in terms):
        each, rate, error = "", "", ""
        if f"{kind}_s" in terms:
            each = _ranged(terms[f"{kind}_s"], between.get(f"{kind}_s"), 1e-6)
        if f"{kind}_per_s" in terms:
            scale = 1e9 if kind in giga else 1e6
            amount = _ranged(terms[f"{kind}_per_s"], between.get(f"{kind}_per_s"), scale)
            rate, error = f"{amount} {giga.get(kind, 'MB/s')}", f"{100 * machine.fits[kind].error:.0f} %"
        table.add_row(WORDS[kind], each, rate, error)
    if machine.engine.seconds:
        missed = f"{100 * machine.engine_error:.0f} %"
        table.caption = f"DTensor, DDP and pipeline: steps of the tiny nets missed by {missed} on average"
    return table


def plans_table(report: Report) -> Table:
    """Every plan, fastest predicted first within its workload; "model alone" is without what torch's engines cost."""
    table = Table("workload", "plan", "predicted (ms)", "model alone", "measured (ms)", "against dp")
    for workload, plans in report.by_workload().items():
        base = next((plan.median_s for plan in plans if plan.plan == "dp"), None)
        for plan in sorted(plans, key=lambda plan: plan.predicted_s):
            against = f"{base / plan.median_s:.2f} x" if base else ""
            times = (f"{1e3 * s:.1f}" for s in (plan.predicted_s, plan.bare_s, plan.median_s))
            table.add_row(workload, plan.plan, *times, against)
    return table


def summary(report: Report) -> str:
    """Do predictions order plans as measurements do, and does the plan predicted to be best beat data parallelism?"""
    found = report.metrics()

    def ranged(name: str) -> str:
        if name not in found:
            return "not defined"
        low, high = found.get(f"{name}_low"), found.get(f"{name}_high")
        return f"{found[name]:.2f}" + (
            f" (95 % {low:.2f} to {high:.2f})" if low is not None and high is not None else ""
        )

    lines = [
        f"Kendall's tau of predicted and measured, all plans: {ranged('tau')}; by the cost model alone {ranged('tau_bare')}",
        f"among plans of one workload: {ranged('tau_within')}; by the cost model alone {ranged('tau_within_bare')}; "
        f"one half of the repeats against the other {ranged('tau_within_repeated')}",
    ]
    for workload in report.by_workload():
        best = report.best(workload)
        gain = found.get(f"gain_{workload}")
        against = f", {gain:.2f} times as fast as pure data parallelism" if gain is not None else ""
        lines.append(f"{workload}: predicted best {best.plan}, {1e3 * best.median_s:.1f} ms measured{against}")
    lines.append(f"steps under plans differ from one process's by {report.error:.1e} at most (float64, relative)")
    lines.append(
        f"calibration drifted by {found['drift']:.0f} %; load {report.load[0]:.1f} before, {report.load[1]:.1f} after, of "
        f"{_cores()} cores; {report.seconds:.0f} s"
    )
    return "\n".join(lines)


def _as_text(machine: Calibration) -> str:
    """A topology as YAML, and as comments what a topology has no field for."""
    notes = [f"# {name}: {value:.6g}" for name, value in machine.terms.items()]
    head = [
        "# What torch's engines cost on this machine, and lines as fitted (seconds, bytes/s, operations/s):",
        *notes,
    ]
    return "\n".join(head) + "\n" + yaml.safe_dump(machine.topology.to_dict(), sort_keys=False)


def _ranged(value: float, low_high: tuple[float, float] | None, scale: float) -> str:
    between = f" ({low_high[0] / scale:.1f} to {low_high[1] / scale:.1f})" if low_high else ""
    return f"{value / scale:.1f}{between}"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _refuse(ranks: int, target: Path | None) -> None:
    if ranks < 2:
        raise UserError(f"plans are run by 2 or more ranks, got {ranks}")
    if target is not None and target.exists():
        raise UserError(f"{target} exists; give another name or remove it")


def _warn(console: Console, ranks: int) -> None:
    if ranks > _cores():
        console.print(
            f"warning: {ranks} ranks share {_cores()} cores; times are those of a machine with too few, and scatter more",
            style="yellow",
            soft_wrap=True,
        )
