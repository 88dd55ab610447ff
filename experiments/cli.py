"""The command line: `fivefold plan | reproduce | report | explain | verify | diff | data | ui | bench | sweep`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from experiments.compare_cli import app as comparing
from experiments.deblur.cli import app as deblurring
from experiments.planning.cli import app as planning
from experiments.upcycle.cli import app as upcycling
from sweeps.cli import app as sweeping

app = typer.Typer(
    help="Reproduce five papers' ablations, with verdicts, and see where each number came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(upcycling)
app.add_typer(deblurring)
app.add_typer(planning)
app.add_typer(comparing)
app.add_typer(sweeping)
console = Console(emoji=False)

Paper = Annotated[str, typer.Argument(help="Paper number 1 to 5, its key, or 'all'.")]
Profile = Annotated[str, typer.Option(help="How much is run: smoke, small, gpu (paper 1) or paper.")]
Model = Annotated[str, typer.Option(help="Another size than the profile's, a file of conf/model/PAPER (paper 1).")]
Seeds = Annotated[int | None, typer.Option(min=1, help="Seeds per cell, instead of the profile's.")]
OneSeed = Annotated[list[int] | None, typer.Option("--seed", min=0, help="Only this seed; may be repeated.")]
Jobs = Annotated[int | None, typer.Option(min=1, help="Processes at once; default one per core.")]
Only = Annotated[list[str] | None, typer.Option(help="Only this ablation; may be repeated.")]
OnlyData = Annotated[list[str] | None, typer.Option("--data", help="Only this data set; may be repeated.")]
Trainer = Annotated[
    str,
    typer.Option(help="Where cells run: cpu, gpu (one), ddp or fsdp (all GPUs), fsdp_cpu (two cores)."),
]
Instead = Annotated[
    list[str] | None,
    typer.Option(help="OTHER=NAME: take data set NAME in the place of the paper's OTHER, such as faces=lfw (paper 2)."),
]
OnlyTable = Annotated[list[str] | None, typer.Option("--table", help="Only what this table needs; may be repeated.")]
Stale = Annotated[bool, typer.Option("--rerun-stale", help="Run cells again whose code or settings have changed.")]


@app.command()
def plan(
    paper: Paper,
    profile: Profile = "small",
    seeds: Seeds = None,
    seed: OneSeed = None,
    jobs: Jobs = None,
    only: Only = None,
    data: OnlyData = None,
    table: OnlyTable = None,
    trainer: Trainer = "cpu",
    model: Model = "",
    instead: Instead = None,
    rerun_stale: Stale = False,
) -> None:
    """Show what is done, stale, failed and to do, with parameters, operations and an ETA. Runs nothing."""
    from experiments import graph
    from experiments.executors import default_jobs
    from experiments.summary import print_plan

    selection = _selection(profile, seeds, seed, only, data, trainer, table, model, instead)
    for spec in _specs(paper, profile, instead):
        found = graph.plan(spec, selection, _places(profile).runs, rerun_stale)
        print_plan(console, found, jobs or default_jobs(found.nodes[0].cell.config["trainer"]))


@app.command()
def reproduce(
    paper: Paper,
    profile: Profile = "small",
    seeds: Seeds = None,
    seed: OneSeed = None,
    jobs: Jobs = None,
    only: Only = None,
    data: OnlyData = None,
    table: OnlyTable = None,
    trainer: Trainer = "cpu",
    model: Model = "",
    instead: Instead = None,
    rerun_stale: Stale = False,
) -> None:
    """Run what a paper's claims need and is not done yet, then write tables, figures and verdicts."""
    from experiments.reproduce import Reproduction

    status = 0
    selection = _selection(profile, seeds, seed, only, data, trainer, table, model, instead)
    specs = _specs(paper, profile, instead)
    for spec in specs:
        try:
            status |= Reproduction(spec, selection, _places(profile), console, jobs, rerun_stale).run()
        except _mendable() as error:  # of several papers the others go on: one may want data that are not here
            if len(specs) == 1:
                raise
            console.print(f"[bold]Paper {spec.number}:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            status |= 1
    raise typer.Exit(status)


@app.command()
def report(profile: Profile = "small", seeds: Seeds = None, jobs: Jobs = None) -> None:
    """Write results/ again from the finished runs of every paper that has all of them."""
    from experiments.errors import UserError
    from experiments.reproduce import Reproduction
    from experiments.summary import print_verdicts

    selection, refused = _selection(profile, seeds), []
    for spec in _specs("all", profile):
        reproduction = Reproduction(spec, selection, _places(profile), console)
        try:
            print_verdicts(console, spec, reproduction.report(), reproduction.results)
        except UserError as error:
            refused.append(str(error))
    if refused:
        raise UserError("\n".join(refused))


@app.command()
def explain(
    claim: Annotated[str, typer.Argument(help="A claim's id, such as A1.mnist.")],
    profile: Profile = "small",
    seeds: Seeds = None,
) -> None:
    """Say what a claim means, how it is decided, and every number behind its verdict."""
    from experiments.claims import PROFILES
    from experiments.inspection import explain_claim

    _check("profile", [profile], PROFILES)
    explain_claim(console, claim, _places(profile), profile, seeds)


@app.command()
def verify(
    run: Annotated[str, typer.Argument(help="A run: the start of its signature or of its MLflow id.")],
    rerun: Annotated[bool, typer.Option(help="Train it again from nothing and compare the weights hash.")] = True,
) -> None:
    """Check that a run is what it says: its files, its code, its data, and that running it again gives the same weights."""
    from experiments.inspection import verify_run

    raise typer.Exit(0 if verify_run(console, run, _places("small"), rerun) else 1)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="A run: the start of its signature or of its MLflow id.")],
    b: Annotated[str, typer.Argument(help="Another.")],
) -> None:
    """Show every difference between two runs: configuration, code, data, versions, hardware, metrics."""
    from experiments.inspection import diff_runs

    diff_runs(console, a, b, _places("small"))


@app.command()
def data(
    names: Annotated[
        list[str] | None, typer.Argument(help="Data sets; by default those that the small profiles need.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say what is there; fetch nothing.")] = False,
) -> None:
    """Fetch and check data sets, and say what each is: size, hash, licence, and where it came from."""
    from experiments.inspection import show_data

    _check("data set", names or (), _stems("data"))
    raise typer.Exit(0 if show_data(console, names, check) else 1)


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="The next free port is taken where this one is not.")] = 5000,
) -> None:
    """Serve the MLflow UI over runs/mlflow.db, on this machine only."""
    from experiments import tracking

    store = tracking.Store(_places("small").runs)
    tracking.prepare(store)
    tracking.serve(store, port=port)


@app.command()
def bench() -> None:
    """Measure the kernels against named peers in the same run, as ratios."""
    from experiments.bench import run_bench
    from experiments.bench_iopddl import run_iopddl_bench
    from experiments.bench_layers import run_layer_bench
    from experiments.bench_plans import run_plan_bench

    out = _places("small").results / "bench"
    run_bench(out)
    run_layer_bench(out)
    run_plan_bench(out)
    run_iopddl_bench(out)


def main() -> None:
    """Entry point: errors that a user can mend are one message, not a traceback."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        app()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if not isinstance(error, _mendable()):
            raise
        console.print(f"[bold]fivefold:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(2) from None


def _mendable() -> tuple[type[Exception], ...]:
    from datamodules.sources import DataUnavailable, UnknownData
    from experiments.errors import UserError

    return UserError, DataUnavailable, UnknownData


def _specs(paper: str, profile: str, instead: Iterable[str] | None = None) -> list:
    from experiments.claims import KNOWN_PAPERS, available_papers, load_paper
    from experiments.errors import UserError
    from experiments.schema import nearest

    if paper == "all":
        if instead:
            raise UserError("--instead is of one paper's data: name that paper")
        has = [key for _, key in sorted(available_papers().items()) if profile in _stems(f"profile/{key}")]
        return [load_paper(key).in_profile(profile) for key in has]
    if paper.isdigit() and int(paper) in KNOWN_PAPERS:
        paper = KNOWN_PAPERS[int(paper)]
    if paper not in KNOWN_PAPERS.values():
        raise UserError(f"there is no paper '{paper}'{nearest(paper, KNOWN_PAPERS.values())}")
    return [load_paper(paper).on_data(_pairs(instead or ())).in_profile(profile)]


def _pairs(instead: Iterable[str]) -> dict[str, str]:
    """What is given as OTHER=NAME, by OTHER; names that are data sets."""
    from experiments.errors import UserError

    pairs = {}
    for text in instead:
        other, _, name = text.partition("=")
        if not other or not name:
            raise UserError(f"--instead takes OTHER=NAME, such as faces=lfw; got '{text}'")
        pairs[other] = name
    _check("data set", pairs.values(), _stems("data"))
    return pairs


def _selection(profile, seeds, seed=None, only=None, data=None, trainer="cpu", table=None, model="", instead=None):
    """What was asked for, every name checked that does not depend on the paper."""
    from experiments.claims import PROFILES
    from experiments.graph import Selection

    _check("profile", [profile], PROFILES)
    _check("data set", data or (), _stems("data"))
    _check("trainer", [trainer], _stems("trainer"))
    chosen = {
        "seed": tuple(seed or ()),
        "only": tuple(only or ()),
        "data": tuple(data or ()),
        "table": tuple(table or ()),
    }
    return Selection(profile, seeds, trainer=trainer, model=model, instead=tuple(sorted(instead or ())), **chosen)


def _check(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse the first name that is not known, with the nearest that is."""
    from experiments.errors import UserError
    from experiments.schema import nearest

    known = list(known)
    for name in names:
        if name not in known:
            raise UserError(f"unknown {what} '{name}'{nearest(name, known)}")


def _stems(group: str) -> list[str]:
    from experiments.cell import CONF

    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def _places(profile: str):
    from experiments.reproduce import Places

    return Places.default(profile)


if __name__ == "__main__":
    main()
