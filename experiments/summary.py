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
from experiments.prices import Pricer
from experiments.watch import clock

STATES = ("done", "running", "stale", "failed", "not run")
LARGE = 1e9  # bytes on a device from which on memory is worth a word


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
    memory = any((node.memory or 0) >= LARGE for node in plan.nodes)
    for name in (*shown, "params", "GB" if memory else "ops/sample", "s/cell"):
        table.add_column(name, justify="right", no_wrap=True)
    for (ablation, data), nodes in groups.items():
        counts = [sum(node.record.state == state for node in nodes) for state in shown]
        priced = next((node for node in nodes if node.seconds is not None), None)
        prices = _prices(priced, memory) if priced else ["", "", ""]
        table.add_row(escape(ablation), escape(data), *[str(count) if count else "·" for count in counts], *prices)
    console.print(table)
    total = {state: len(plan.of(state)) for state in STATES}
    console.print(", ".join(f"{count} {state}" for state, count in total.items() if count) or "no cells")
    for name in plan.missing:
        console.print(
            f"{name} is not on this machine, so which of its runs are done is not known; `fivefold data {name}` fetches it.",
            soft_wrap=True,
        )
    for line in _language_model_costs(plan):
        console.print(line, soft_wrap=True, highlight=False)
    if plan.to_run:
        console.print(
            f"{len(plan.to_run)} cells to run on {jobs} processes: about {duration(plan.eta_seconds(jobs))}",
            soft_wrap=True,
        )
    if plan.of("stale") and not plan.rerun_stale:
        console.print(
            "Stale cells ran with other code or settings; `--rerun-stale` (make: RERUN=stale) runs them again.",
            soft_wrap=True,
        )


def _prices(node: Node, memory: bool) -> list[str]:
    """Parameters, operations or, of large nets, gigabytes on each device, and seconds."""
    if not memory:
        return [f"{node.params:,}", f"{node.operations_per_sample:,}", f"{node.seconds:.0f}"]
    size = {"trillion": "T", "billion": "B", "million": "M", "thousand": "k"}
    count, _, word = number(node.params or 0).partition(" ")
    seconds = node.seconds or 0.0
    gigabytes = f"{node.memory / 1e9:.3g}" if node.memory else ""
    return [count + size.get(word, ""), gigabytes, f"{seconds:.0f}" if seconds < 1e6 else f"{seconds:.1e}"]


def _language_model_costs(plan: Plan) -> list[str]:
    """What the dearest language model of a plan takes, and all that is to run together; nothing for other nets."""
    known = [node for node in plan.nodes if node.cost and node.cost.training_flops]
    largest = max(known, key=lambda node: (node.memory or 0, node.samples), default=None)
    if largest is None or ((largest.memory or 0) < LARGE and largest.cell.config["trainer"]["accelerator"] == "cpu"):
        return []
    cost, budget = largest.cost, largest.cell.config["budget"]
    assert cost is not None
    assert cost.training_flops is not None
    assert cost.tokens is not None
    flops = sum(n.samples * (n.cost.training_flops or 0) for n in plan.to_run if n.cost)
    tokens = sum(n.samples * (n.cost.tokens or 0) for n in plan.to_run if n.cost)
    at_once, devices = budget.get("micro_batch") or budget["batch_size"], plan.processes
    trainer = largest.cell.config["trainer"]
    lines = [
        f"Largest: {largest.cell.key.ablation}, {number(cost.params)} parameters, of which a token meets "
        f"{number(cost.active or 0)}; {number(cost.training_flops // cost.tokens)} FLOPs per training token of "
        f"{cost.tokens} in a row; {(largest.memory or 0) / 1e9:.3g} GB (GB above) on each of {devices} device(s) with "
        f"{at_once} sequences at once over all, workspace and the block being gathered not counted.",
        f"To train on: {number(tokens)} tokens in {number(flops)} FLOPs.",
    ]
    if trainer["strategy"] == "fsdp":
        counts = [n for n in (2, 4, 8, 16, 32, 64) if at_once % n == 0]
        shares = ", ".join(f"{cost.memory(budget, 'fsdp', n) / 1e9:.3g}" for n in counts)  # type: ignore[operator]
        lines.append(f"Divided among {', '.join(map(str, counts))} devices that is {shares} GB on each.")
    if trainer["accelerator"] != "cpu":
        lines.append(
            f"Times are a guess where no run has been timed: {Pricer.GPU_FLOPS_PER_S:.1e} FLOP/s on each of {devices} GPU(s)."
        )
    return lines


def duration(seconds: float) -> str:
    """Return a time to wait for: as h:mm:ss or m:ss, or in days where it is many."""
    return f"{seconds / 86_400:,.0f} days" if seconds > 100 * 3600 else f"{clock(seconds)} (h:mm:ss or m:ss)"


def number(value: float) -> str:
    """Return a count in words: 1.3 million, 83 billion, 1.1 trillion; beyond, as a power of ten."""
    for size, word in ((1e15, ""), (1e12, " trillion"), (1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if value >= size:
            return f"{value:.2e}" if not word else f"{value / size:.3g}{word}"
    return f"{value:.0f}"


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
