"""A search looked at again: its report from what is stored, its best configuration as an ablation, its dashboard."""

from __future__ import annotations

from rich.console import Console

from experiments.errors import UserError
from experiments.reproduce import Places
from experiments.tracking_server import free_port
from sweeps import finals
from sweeps.report import print_outcome, write_report
from sweeps.space import WINNER, load
from sweeps.storage import default_storage, latest, open_storage, shown


def report_again(paper: str, name: str, profile: str, storage: str, promoted: str | None, console: Console) -> None:
    """Write the report of a search from its study and the runs on disk, and promote its winner where asked to.

    Raises:
        UserError: there is no study of this space, or no trial of it has come to its end.
    """
    import optuna

    from sweeps.promote import promote

    space, places = load(paper, name, profile), Places.default(profile)
    address = storage or default_storage(places.runs)
    database, studies = open_storage(address), {}
    for arm in ("", *(n for n, a in space.arms.items() if a.tuned)):
        found, current = latest(database, space.arm(arm) if arm else space, arm)
        if found is not None:
            studies[arm] = (optuna.load_study(study_name=found, storage=database), current)
    if "" not in studies:
        raise UserError(
            f"no study of {name} ({profile}) in {shown(address)}: run `fivefold sweep {paper} --space {name}`"
        )
    opened = {arm: study for arm, (study, _) in studies.items()}
    contenders = [finals.with_records(space, f, places.runs) for f in finals.contenders(space, opened)]
    if contenders[0].arm != WINNER:
        raise UserError(f"no trial of {opened[''].study_name} has come to its end yet")
    current = all(is_current for _, is_current in studies.values())
    print_outcome(console, write_report(space, opened, contenders, places.results, current))
    if promoted is not None:
        file = promote(space, contenders[0], promoted, opened[""].study_name)
        console.print(f"Ablation: {file}", soft_wrap=True, highlight=False)


def serve(storage: str, port: int) -> None:
    """Serve optuna-dashboard until Ctrl-C. Prints the address.

    Raises:
        UserError: it is not installed, or no port is free.
    """
    try:
        from optuna_dashboard import run_server
    except ImportError:
        raise UserError("optuna-dashboard is not installed: pip install 'fivefold[sweeps]'") from None
    address = storage or default_storage(Places.default().runs)
    database, port = open_storage(address), free_port("127.0.0.1", port)
    print(f"Optuna studies of {shown(address)}: http://127.0.0.1:{port}/dashboard  (Ctrl-C stops it)", flush=True)
    run_server(database, host="127.0.0.1", port=port)
