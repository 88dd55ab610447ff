"""How near searchers come to the best solution of sharding instances in the IOPDDL contest's format, in the same time each.

Instances are exports of our own models with memory so short that it binds; the contest's own are not among them. The yardstick
is integer programming, which also says what no solution is below.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from datamodules.planning.iopddl import Problem, evaluate

if TYPE_CHECKING:
    from rich.table import Table

US = 1e-6  # of an instance's cost, which counts picoseconds

SECONDS = 2.0  # of each searcher
PROGRAMME_S = 15.0  # of the programme, at most
METHODS = ("annealing", "mcmc", "greedy", "beam", "random")
DEVICES = 8


@dataclass(frozen=True)
class Workload:
    """A model's training step on 8 devices of a machine, and its memory limit in multiples of the least that suffices."""

    model: str
    room: float
    topology: str = "v100_1x8"


WORKLOADS = (Workload("bert-tiny", 2.0), Workload("vgg19", 1.15), Workload("bert-2", 1.4))


@dataclass(frozen=True)
class Yardstick:
    """One method on one instance.

    Attributes:
        limit_mib: memory of a device, in MiB.
        cost_us: of the best solution, in microseconds of a step; not a number where none was finished.
        gap_percent: above the best solution that any method found.
        bound_gap_percent: above what no solution is below.
    """

    instance: str
    nodes: int
    edges: int
    strategies: int
    limit_mib: float
    method: str
    seconds: float
    decisions: int
    plans: int
    cost_us: float
    gap_percent: float
    bound_gap_percent: float


def instance(workload: Workload) -> Problem:
    """Return a workload as an instance whose memory limit binds."""
    from datamodules.planning.iopddl_export import export
    from datamodules.planning.topology import load_topology
    from datamodules.planning.workloads import load_graph

    source = export(load_graph(workload.model), load_topology(workload.topology), DEVICES)
    least = evaluate(source, [int(usages.argmin()) for usages in source.usages]).peak
    return replace(source, name=workload.model, usage_limit=int(workload.room * least))


def measure(source: Problem, seconds: float = SECONDS, programme_s: float = PROGRAMME_S) -> list[Yardstick]:
    """Return a row for the programme and one for each searcher.

    Raises:
        IopddlError: no solution fits.
    """
    from datamodules.planning.iopddl_problem import StrategyProblem, options_for
    from datamodules.planning.optimum_iopddl import strategy_optimum
    from datamodules.planning.searchers import Budget, search

    best = strategy_optimum(source, programme_s)
    found: list[tuple[str, float, int, int, float]] = [("programme", best.seconds, 0, 0, best.cost)]
    problem = StrategyProblem(source)
    for method in METHODS:
        result = search(problem, method, Budget(seconds=seconds), **options_for(problem, method, seconds))
        found.append((method, result.seconds, result.steps, result.evaluations, result.cost))
    least = min(row[-1] for row in found)
    shape = (source.name, len(source.sizes), len(source.edges), sum(source.sizes), (source.usage_limit or 0) / 2**20)
    return [
        Yardstick(*shape, method, spent, steps, plans, cost * US, _above(cost, least), _above(cost, best.bound))
        for method, spent, steps, plans, cost in found
    ]


def _above(cost: float, least: float) -> float:
    return 100 * (cost - least) / least if least > 0 and math.isfinite(cost) else math.nan


def run_iopddl_bench(
    out: Path,
    workloads: Sequence[Workload] = WORKLOADS,
    seconds: float = SECONDS,
    programme_s: float = PROGRAMME_S,
) -> list[Yardstick]:
    """Measure on one thread, print a table, and write plan_iopddl.csv with the hardware named."""
    os.environ["OMP_NUM_THREADS"] = "1"
    from rich.console import Console

    from experiments.provenance import hardware, versions
    from experiments.store import write_atomically

    rows = [row for workload in workloads for row in measure(instance(workload), seconds, programme_s)]
    console, text = Console(width=max(124, Console().width)), io.StringIO()
    machine = hardware()["cpu"]
    text.write(f"# {machine}, one thread, scipy {version('scipy')}, torch {versions()['torch']}\n")
    writer = csv.DictWriter(text, list(asdict(rows[0])), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: _shown(v) for k, v in asdict(row).items()} for row in rows)
    write_atomically(out / "plan_iopddl.csv", text.getvalue())
    console.print(_table(rows, machine))
    console.print(f"written: {out / 'plan_iopddl.csv'}", soft_wrap=True)
    return rows


def _shown(value: object) -> object:
    """A cell of the file: a number that is missing is left empty."""
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return value


def _table(rows: Sequence[Yardstick], cpu: str) -> Table:
    from rich.table import Table

    table = Table(title=f"{cpu}, one thread; searchers on sharding instances, gap to the best solution known", box=None)
    table.add_column("instance", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for name in ("s", "plans", "cost us", "gap", "above the bound"):
        table.add_column(name, justify="right")
    for row in rows:
        first = f"{row.instance}: {row.nodes} nodes, {row.edges} edges, {row.strategies} strategies, {row.limit_mib:.1f} MiB"
        table.add_row(
            first if row.method == "programme" else "",
            row.method,
            f"{row.seconds:.1f}",
            f"{row.plans:,}" if row.plans else "",
            *_worth(row),
        )
    return table


def _worth(row: Yardstick) -> tuple[str, str, str]:
    """Cost and gaps of a row for people; a solution with a move that does not exist is priced out of all proportion."""
    from datamodules.planning.iopddl_export import FORBIDDEN

    if not math.isfinite(row.cost_us):
        return "no plan", "", ""
    if row.cost_us >= FORBIDDEN * US:
        return "impossible", "", ""
    gaps = (row.gap_percent, row.bound_gap_percent)
    return (f"{row.cost_us:,.1f}", *("" if math.isnan(gap) else f"{gap:.2f}%" for gap in gaps))  # type: ignore[return-value]
