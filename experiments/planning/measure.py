"""What `fivefold calibrate-machine` and `fivefold measure-plans` do; the commands themselves are registered in `cli`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.console import Console
from rich.table import Table

from experiments.errors import UserError
from experiments.store import write_atomically

if TYPE_CHECKING:
    from lit_modules.execution.calibrate import Calibration
    from lit_modules.execution.measure import Report


def calibrate_machine(console: Console, ranks: int = 2, target: Path | None = None) -> None:
    """Measure this machine with `ranks` processes, print the fits, and write a topology that `--topology FILE` reads.

    Raises:
        UserError: a target that exists, fewer than 2 ranks, or processes that failed.
    """
    from filelock import FileLock

    from lit_modules.execution.calibrate import calibration, measure_points
    from lit_modules.execution.launch import RanksFailed, launch
    from lit_modules.execution.measure import LOCK

    _refuse(ranks, target)
    name = target.stem if target is not None else "this_machine"
    try:
        with FileLock(LOCK):
            machine = calibration(launch(measure_points, ranks)[0], ranks, name)
    except (RanksFailed, ValueError) as error:
        raise UserError(f"this machine could not be calibrated: {error}") from None
    console.print(fits_table(machine))
    if target is not None:
        write_atomically(target, yaml.safe_dump(machine.topology.to_dict(), sort_keys=False))
        console.print(f"Written to {target}.", soft_wrap=True)


def measure_plans(
    console: Console, names: Sequence[str], ranks: int = 2, repeats: int = 7, target: Path | None = None
) -> None:
    """Run every executable plan of some workloads, print predicted and measured times, and write the numbers as YAML.

    Raises:
        UserError: an unknown workload, a target that exists, fewer than 2 ranks, or processes that failed.
    """
    from datamodules.planning.plan import PlanError
    from lit_modules.execution.launch import RanksFailed
    from lit_modules.execution.measure import measure
    from lit_modules.execution.workloads import workload_of

    _refuse(ranks, target)
    try:
        report = measure([workload_of(name) for name in names], ranks, repeats)
    except (RanksFailed, PlanError, ValueError) as error:
        raise UserError(str(error)) from None
    console.print(fits_table(report.machine))
    console.print(plans_table(report))
    for name, value in report.metrics().items():
        console.print(f"{name:32} {value:.6g}", highlight=False)
    if target is not None:
        rows = [{**vars(plan), "measured_s": list(plan.measured_s)} for plan in report.plans]
        whole = {"metrics": report.metrics(), "plans": rows, "topology": report.machine.topology.to_dict()}
        write_atomically(target, yaml.safe_dump(whole, sort_keys=False))
        console.print(f"Written to {target}.", soft_wrap=True)


def fits_table(machine: Calibration) -> Table:
    """Each fitted line: what a message or an operation costs at once, its rate, and how far points are from the line."""
    table = Table("measured", "start (us)", "rate", "mean error", title=machine.topology.name)
    units = {"compute": ("GFLOP/s", 1e9), "memory": ("GB/s", 1e9)}
    for kind, fit in machine.fits.items():
        unit, scale = units.get(kind, ("MB/s", 1e6))
        table.add_row(kind, f"{1e6 * fit.intercept:.1f}", f"{fit.rate / scale:.1f} {unit}", f"{100 * fit.error:.1f} %")
    table.add_row("operation", f"{1e6 * machine.topology.launch_s:.1f}", "", "")
    return table


def plans_table(report: Report) -> Table:
    """Every plan, fastest predicted first within its workload."""
    table = Table("workload", "plan", "predicted (ms)", "measured (ms)", "against dp")
    for workload, plans in report.by_workload().items():
        base = next((plan.median_s for plan in plans if plan.plan == "dp"), None)
        for plan in sorted(plans, key=lambda plan: plan.predicted_s):
            against = f"{base / plan.median_s:.2f} x" if base else ""
            table.add_row(workload, plan.plan, f"{1e3 * plan.predicted_s:.1f}", f"{1e3 * plan.median_s:.1f}", against)
    return table


def _refuse(ranks: int, target: Path | None) -> None:
    if ranks < 2:
        raise UserError(f"plans are run by 2 or more ranks, got {ranks}")
    if target is not None and target.exists():
        raise UserError(f"{target} exists; give another name or remove it")
