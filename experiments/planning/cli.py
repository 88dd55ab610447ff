"""Commands of paper 5's tools: `fivefold plan-model | explain-plan | diff-plans | plan-iopddl | calibrate-machine |
measure-plans`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(emoji=False)

Machine = Annotated[
    str,
    typer.Option("--topology", metavar="NAME", help="A machine of conf/topology, or a YAML file of your own."),
]
Workload = Annotated[
    str,
    typer.Option(
        "--graph", help="The plan's graph: a file, a workload or module:factory; default the file beside the plan."
    ),
]


@app.command("plan-model")
def plan_model(
    model: Annotated[str, typer.Argument(help="module:factory, a workload such as bert-12, or a graph file.")],
    mesh: Annotated[str, typer.Option(help="Nodes x devices of each, such as 2x4; default the machine's own.")] = "",
    topology: Machine = "v100_1x8",
    searcher: Annotated[
        str, typer.Option(help="optimum (with a bound), greedy, beam, anneal, mcmc, random or dqn.")
    ] = "optimum",
    out: Annotated[Path, typer.Option(help="Folder for the plan, its graph, machine, explanation and picture.")] = Path(
        "plan"
    ),
    stages: Annotated[str, typer.Option(help="Pipeline stages to try, such as 1,2 (optimum only).")] = "1",
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of a step (optimum only).")] = 1,
    data: Annotated[
        int | None, typer.Option(min=1, help="Ways in which the batch is split first; default: all are tried.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Time for the search.")] = 120.0,
    seed: Annotated[int, typer.Option(help="Of searchers that draw.")] = 0,
    argument: Annotated[
        list[str] | None,
        typer.Option("--argument", metavar="NAME=VALUE", help="For the factory or workload; may be repeated."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a plan that is there.")] = False,
) -> None:
    """Find a distributed execution plan for a model, and say how good it is.

    The factory returns (model, inputs) or (model, inputs, loss); the first dim of each input is the batch. No weight is
    allocated. Devices need not be there: the machine is described, not used.
    """
    from experiments.planning import commands

    wish = commands.Wish(searcher, stages, micro_batches, data, seconds, seed)
    folder = commands.plan_model(model, mesh, topology, wish, out, argument or [], force, console)
    console.print(f"written to {folder}/", markup=False, highlight=False, soft_wrap=True)


@app.command("explain-plan")
def explain_plan(
    plan: Annotated[Path, typer.Argument(metavar="PLAN.json")],
    graph: Workload = "",
    topology: Annotated[str, typer.Option(help="Another machine than the plan's.")] = "",
    draw: Annotated[Path | None, typer.Option(help="Also draw it, as .svg or .png.")] = None,
) -> None:
    """Say what a plan does with each block of its model, what each part of its cost is, and whether it fits."""
    from experiments.planning import commands

    text = commands.explain_plan(plan, graph, topology, draw)
    console.print(text, markup=False, highlight=False, soft_wrap=True, end="")


@app.command("diff-plans")
def diff_plans(
    a: Annotated[Path, typer.Argument(metavar="A.json")],
    b: Annotated[Path, typer.Argument(metavar="B.json")],
    graph: Workload = "",
    topology: Annotated[str, typer.Option(help="The machine both are priced on; default A's.")] = "",
) -> None:
    """Show what two plans of one model do differently, and what that changes in their cost."""
    from experiments.planning import commands

    text = commands.diff_plans(a, b, graph, topology)
    console.print(text, markup=False, highlight=False, soft_wrap=True, end="")


@app.command("plan-iopddl")
def plan_iopddl(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="An instance as .json or .json.gz.")],
    method: Annotated[
        str, typer.Option(help="programme (with a bound), annealing, mcmc, greedy, beam, random or exhaustive.")
    ] = "annealing",
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for the search.")] = 60.0,
    seed: Annotated[int, typer.Option(min=0, help="Of searchers that draw.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="SOLUTION.json", help="Write the solution, a list of strategies.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a solution that is there.")] = False,
) -> None:
    """Find a solution of an instance in the IOPDDL contest's format, and say how far it may be from the best.

    The contest (ASPLOS 2025 / EuroSys 2025) asks for one strategy for each node, at the least sum of node and edge costs, with
    the memory of the nodes alive within a limit at every time. Its instances are in google/iopddl on GitHub.
    """
    from experiments.planning import iopddl_commands

    iopddl_commands.plan_iopddl(file, method, seconds, seed, out, force, console)


Ranks = Annotated[int, typer.Option(help="Processes, one thread each.")]


@app.command("calibrate-machine")
def calibrate_machine(
    ranks: Ranks = 2,
    out: Annotated[
        Path | None,
        typer.Option(metavar="MACHINE.yaml", help="Where to write the machine, for plan-model's --topology."),
    ] = None,
) -> None:
    """Measure what this machine and torch's engines cost, with as many processes as plans will have; about 20 seconds."""
    from experiments.planning import measure

    measure.calibrate_machine(console, ranks, out)


@app.command("measure-plans")
def measure_plans(
    workload: Annotated[list[str] | None, typer.Option(metavar="NAME", help="A workload; may be repeated.")] = None,
    ranks: Ranks = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps of each plan.")] = 7,
    out: Annotated[Path | None, typer.Option(metavar="NUMBERS.yaml", help="Where to write all numbers.")] = None,
) -> None:
    """Run plans for real and compare their times with what the calibrated cost model predicts. Keep the machine quiet."""
    from experiments.planning import measure

    measure.measure_plans(console, workload or (), ranks, repeats, out)
