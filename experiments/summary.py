"""What the terminal shows: a plan before it runs, verdicts after."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from experiments.claims import PaperSpec
from experiments.graph import Node, Plan
from experiments.watch import clock

STATES = ("done", "running", "stale", "failed", "not run")


def from_shell(command: str) -> str:
    """Return a command as a person can type it in the project's folder: by its path where it is not on PATH, or where it
    is python, of which any may be there.
    """
    program = command.split(maxsplit=1)[0]
    return command if program != "python" and shutil.which(program) else f".venv/bin/{command}"


def print_plan(console: Console, plan: Plan, jobs: int) -> None:
    """Print one row per ablation and data set: states of its seeds, parameters, operations and expected time."""
    groups: dict[tuple[str, str], list[Node]] = defaultdict(list)
    for node in plan.nodes:
        groups[node.cell.key.ablation, node.cell.key.data].append(node)
    table = Table(box=None, header_style="bold", pad_edge=False)
    shown = [state for state in STATES if plan.of(state)]
    table.add_column("ablation", no_wrap=True, min_width=max(len(ablation) for ablation, _ in groups))
    table.add_column("data", no_wrap=True, min_width=max(len(data) for _, data in groups))
    for name in (*shown, "params", "ops/sample", "s/cell"):
        table.add_column(name, justify="right", no_wrap=True)
    for (ablation, data), nodes in groups.items():
        counts = [sum(node.record.state == state for node in nodes) for state in shown]
        priced = next((node for node in nodes if node.seconds is not None), None)
        prices = (
            [f"{priced.params:,}", f"{priced.operations_per_sample:,}", f"{priced.seconds:.0f}"]
            if priced
            else ["", "", ""]
        )
        table.add_row(escape(ablation), escape(data), *[str(count) if count else "·" for count in counts], *prices)
    console.print(table)
    total = {state: len(plan.of(state)) for state in STATES}
    console.print(", ".join(f"{count} {state}" for state, count in total.items() if count) or "no cells")
    if plan.to_run:
        console.print(
            f"{len(plan.to_run)} cells to run on {jobs} processes: about {clock(plan.eta_seconds(jobs))} (h:mm:ss or m:ss)",
            soft_wrap=True,
        )
    if plan.of("stale") and not plan.rerun_stale:
        console.print(
            "Stale cells ran with other code or settings; `--rerun-stale` (make: RERUN=stale) runs them again.",
            soft_wrap=True,
        )


def print_verdicts(console: Console, spec: PaperSpec, verdicts: list[dict[str, Any]], results: Path) -> None:
    """Print one row per claim, then where the tables, figures and runs are."""
    table = Table(
        header_style="bold",
        title=escape(f"{spec.title} (arXiv {spec.arxiv})"),
        title_justify="left",
        show_lines=False,
    )
    table.add_column("claim", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    table.add_column("why", overflow="fold")
    for verdict in verdicts:
        table.add_row(*(escape(verdict[name]) for name in ("id", "verdict", "reason")))
    console.print(table)
    if (results / spec.key).exists():
        console.print(f"Tables and figures: {results / spec.key}", soft_wrap=True, markup=False)
    if (results / "report.html").exists():
        console.print(f"Every number with its runs: {results / 'report.html'}", soft_wrap=True, markup=False)
    console.print("Compare the runs in a browser: make ui")
