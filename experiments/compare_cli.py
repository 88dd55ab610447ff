"""Commands over finished runs: `fivefold compare | export-runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(emoji=False)


@app.command()
def compare(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="A B...",
            help="Ablations (net1, or net1@mnist), or runs: the start of a signature or of an MLflow id.",
        ),
    ],
    profile: Annotated[str, typer.Option(help="Only runs of this profile; default the one with most runs.")] = "",
    data: Annotated[str, typer.Option(help="The data set of ablations that have run on several.")] = "",
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Metrics to show, such as 'noise/*'; may be repeated. Default the paper's headline metrics."),
    ] = None,
) -> None:
    """Show what differs between ablations or runs: configuration, metrics with intervals, cost."""
    from experiments.compare import compare as show

    show(console, names, _runs(), profile, data, metric or ())


@app.command("export-runs")
def export_runs(
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A file that ends in .csv, .parquet or .json.")],
    paper: Annotated[str, typer.Option(help="Only runs of this paper, a number or a key.")] = "",
    profile: Annotated[str, typer.Option(help="Only runs of this profile.")] = "",
    everything: Annotated[
        bool, typer.Option("--all", help="Runs that failed, are running or were stopped, too; their state is a column.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
) -> None:
    """Write every finished run as a row: identity, settings (config.*), metrics (metric.*), how it was made."""
    from experiments.claims import KNOWN_PAPERS
    from experiments.errors import UserError
    from experiments.export_runs import all_runs, export
    from experiments.schema import nearest

    if paper.isdigit() and int(paper) in KNOWN_PAPERS:
        paper = KNOWN_PAPERS[int(paper)]
    if paper and paper not in KNOWN_PAPERS.values():
        raise UserError(f"there is no paper '{paper}'{nearest(paper, KNOWN_PAPERS.values())}")
    if target.exists() and not force:
        raise UserError(f"{target} exists; --force replaces it")
    chosen = [
        record
        for record in all_runs(_runs())
        if (everything or record.state == "done")
        and (not paper or record.key.paper == paper)
        and (not profile or record.key.scale == profile)
    ]
    count, columns = export(chosen, target)
    console.print(f"{count} runs with {columns} columns: {target}", soft_wrap=True, markup=False, highlight=False)


def _runs() -> Path:
    from experiments.reproduce import Places

    return Places.default().runs
