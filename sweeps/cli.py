"""Commands of the sweeps: `fivefold sweep | sweep-report | sweep-ui`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console(emoji=False)

Paper = Annotated[str, typer.Argument(help="Paper number 1 to 5, or its key.")]
Name = Annotated[str | None, typer.Option("--space", help="A search space of the paper; without, they are listed.")]
Profile = Annotated[str, typer.Option(help="How much is run: smoke, small, gpu or paper.")]
Storage = Annotated[
    str,
    typer.Option(
        envvar="FIVEFOLD_STORAGE",
        help="Where studies lie: sqlite:///FILE, postgresql://USER@HOST/NAME or journal:FILE; default runs/optuna.db.",
    ),
]


@app.command()
def sweep(
    paper: Paper,
    space: Name = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Trials in all, in place of the space's own number.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes at once; default one per core.")] = None,
    storage: Storage = "",
    profile: Profile = "small",
    trainer: Annotated[str, typer.Option(help="Where cells run: cpu or gpu.")] = "cpu",
) -> None:
    """Search a space with Optuna; then run the winner, the default and the paper's setting on fresh seeds, and report.

    Stopped at any moment, the same command goes on from there; given more trials, it adds those. Two commands at once, on
    this machine or on two that share the storage and the folder of runs, divide the work.
    """
    from experiments.executors import default_jobs
    from sweeps.study import make_sweep

    key = _paper(paper)
    if space is None:
        _list(key)
        return
    made = make_sweep(key, space, profile, console, trials, workers or default_jobs(), storage, trainer)
    raise typer.Exit(made.run())


@app.command("sweep-report")
def sweep_report(
    paper: Paper,
    space: Name = None,
    storage: Storage = "",
    profile: Profile = "small",
    promote: Annotated[
        str | None, typer.Option(metavar="NAME", help="Write the best configuration as conf/ablation/PAPER/NAME.yaml.")
    ] = None,
) -> None:
    """Write the report of a search again, and perhaps its best configuration as an ablation. Runs nothing."""
    from experiments.errors import UserError
    from sweeps.again import report_again

    key = _paper(paper)
    if space is None:
        raise UserError(f"name a search space by --space: {', '.join(_spaces(key))}")
    report_again(key, space, profile, storage, promote, console)


@app.command("sweep-ui")
def sweep_ui(
    storage: Storage = "",
    port: Annotated[int, typer.Option(help="The next free port is taken where this one is not.")] = 8080,
) -> None:
    """Serve optuna-dashboard over the studies, on this machine only (the extra 'sweeps')."""
    from sweeps.again import serve

    serve(storage, port)


def _paper(paper: str) -> str:
    from experiments.claims import KNOWN_PAPERS, available_papers
    from experiments.errors import UserError
    from experiments.schema import nearest

    known = available_papers()
    if paper.isdigit() and int(paper) in KNOWN_PAPERS:
        paper = KNOWN_PAPERS[int(paper)]
    if paper not in known.values():
        raise UserError(f"there is no paper '{paper}'{nearest(paper, known.values())}")
    return paper


def _spaces(key: str) -> list[str]:
    from sweeps.space import spaces

    return spaces(key)


def _list(key: str) -> None:
    import yaml

    from sweeps.space import SPACES

    console.print(f"Search spaces of {key} (make sweep-paper-N SPACE=name):")
    for name in _spaces(key):
        raw = yaml.safe_load((SPACES / key / f"{name}.yaml").read_text())
        console.print(f"  {name}: {escape(raw['title'])}", soft_wrap=True, highlight=False)
