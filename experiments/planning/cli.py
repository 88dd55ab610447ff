"""Commands of paper 5's tools: `fivefold plan-model | explain-plan | diff-plans`."""

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
