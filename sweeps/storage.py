"""Where studies lie, and the bookkeeping that makes any number of workers share one: what is spent, what is to be retried."""

from __future__ import annotations

import copy
import os
import platform
import warnings
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.errors import UserError
from experiments.store import read_json
from sweeps.samplers import REJECTED, make_pruner

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

    from sweeps.space import Space

SURPLUS = "surplus"  # user attribute of a trial that two workers started at once for one place
WORKER = "worker"  # user attribute: {"host", "pid", "started"} of the process that runs a trial
RETRIES = 3
HEARTBEAT_S, GRACE_S = 15, 60
LOST = "retry_history"  # Optuna's own attribute of a retried trial: the numbers of those it replaces


def default_storage(runs: Path) -> str:
    """Return the address of the database beside the runs."""
    return f"sqlite:///{runs.resolve() / 'optuna.db'}"


def shown(url: str) -> str:
    """Return an address as it may be shown: without its password."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return url


def is_journal(url: str) -> bool:
    """Whether an address is a journal file: journal:FILE, or a file named *.journal."""
    return url.startswith("journal:") or (url.endswith(".journal") and "://" not in url)


def open_storage(url: str, heartbeat_s: int = HEARTBEAT_S, grace_s: int = GRACE_S) -> BaseStorage:
    """Open a storage; its tables are made if need be.

    Args:
        url: sqlite:///FILE, postgresql://USER@HOST/NAME, mysql://..., or journal:FILE.
        heartbeat_s, grace_s: how often a worker says that its trial lives, and after how long without a word it does not.
    Raises:
        UserError: an address that leads nowhere, a driver that is not installed, or a database that does not answer.
    """
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    try:
        if is_journal(url):
            file = Path(url.removeprefix("journal:").removeprefix("//"))
            file.parent.mkdir(parents=True, exist_ok=True)
            return JournalStorage(JournalFileBackend(str(file)))
        return _locked(
            url,
            lambda: RDBStorage(
                _with_driver(url),
                engine_kwargs={"connect_args": {"timeout": 120}}
                if url.startswith("sqlite")
                else {"pool_pre_ping": True},
                heartbeat_interval=heartbeat_s,
                grace_period=grace_s,
                heartbeat_stale_trial_callback=retry,
            ),
        )
    except (ArgumentError, NoSuchModuleError) as error:
        raise UserError(
            f"storage: '{shown(url)}' is no address of a database ({error}); such as sqlite:////tmp/sweeps.db, "
            "postgresql://user@host/name or journal:/tmp/sweeps.journal"
        ) from None
    except (ImportError, ModuleNotFoundError) as error:
        raise UserError(
            f"storage: {error}: the driver for '{shown(url)}' is not installed; see the extra 'postgres'"
        ) from None
    except (SQLAlchemyError, OSError) as error:
        raise UserError(f"storage: '{shown(url)}' does not answer: {str(error).splitlines()[0]}") from None


def _locked(url: str, make: Any) -> Any:
    """Make a database's tables once, whichever process comes first: SQLite's own locking does not cover it."""
    from filelock import FileLock

    if not url.startswith("sqlite:///"):
        return _again(make)
    file = Path(url.removeprefix("sqlite:///"))
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock"), timeout=120):
        return make()


def _again(make: Any) -> Any:
    """Two processes that make a server's tables at the same moment: one of them finds them there at its second try."""
    from sqlalchemy.exc import IntegrityError, ProgrammingError

    try:
        return make()
    except (IntegrityError, ProgrammingError):
        return make()


def _with_driver(url: str) -> str:
    """PostgreSQL by psycopg 3 where psycopg2, SQLAlchemy's default, is not named."""
    for plain in ("postgresql://", "postgres://"):
        if url.startswith(plain):
            return f"postgresql+psycopg://{url.removeprefix(plain)}"
    return url


def open_study(space: Space, storage: BaseStorage, arm: str = "") -> optuna.Study:
    """Open a space's study, made if need be; its attributes say what was searched, with which Optuna."""
    import optuna

    study = optuna.create_study(
        storage=storage,
        study_name=space.study_name(arm),
        directions=[_direction(o.direction) for o in space.objectives],
        pruner=make_pruner(space),
        load_if_exists=True,
    )
    if "definition" not in study.user_attrs:
        about = {"definition": space.definition, "code": space.code, "optuna": optuna.__version__, "title": space.title}
        for name, value in about.items():
            study.set_user_attr(name, value)
        study.set_metric_names([o.metric for o in space.objectives])
    return study


def _direction(word: str) -> Literal["minimize", "maximize"]:
    return "maximize" if word == "higher" else "minimize"


def this_process() -> dict[str, Any]:
    """Return what tells this process from every other, also from a later one with its number."""
    import psutil

    return {"host": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def is_dead(worker: dict[str, Any] | None) -> bool:
    """Whether a worker was of this machine and is gone. Of another machine's only its heartbeat tells."""
    import psutil

    if not worker or worker["host"] != platform.node():
        return False
    try:
        return abs(psutil.Process(worker["pid"]).create_time() - worker["started"]) > 1
    except psutil.NoSuchProcess:
        return True


def counted(trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that take a place of the total: not those that others replace, nor those that never trained."""
    trials = list(trials)
    replaced = {number for trial in trials for number in trial.system_attrs.get(LOST, ())}
    return [
        trial
        for trial in trials
        if trial.number not in replaced and SURPLUS not in trial.user_attrs and REJECTED not in trial.user_attrs
    ]


def places(space: Space, trials: Iterable[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that take a place of a space's total: where all combinations are gone through, refused ones too."""
    trials = list(trials)
    taken = counted(trials)
    return taken + [t for t in trials if REJECTED in t.user_attrs] if space.exhaustive else taken


def retry(study: optuna.Study, trial: FrozenTrial, most: int | None = RETRIES) -> None:
    """Queue a lost trial again, `most` times at most; without the name of its worker, which is not that of the next."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    again = copy.deepcopy(trial)
    again.user_attrs = {name: value for name, value in trial.user_attrs.items() if name != WORKER}
    RetryHeartbeatStaleTrialCallback(most)(study, again)


def recover(study: optuna.Study) -> int:
    """Queue again what dead workers were running, and return how many trials of this machine's that were."""
    from optuna.storages import fail_stale_trials
    from optuna.storages._heartbeat import is_heartbeat_enabled
    from optuna.trial import TrialState

    if is_heartbeat_enabled(study._storage):
        fail_stale_trials(study)
    count = 0
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_lost(trial) and _fail(study, trial):
            retry(study, trial)
            count += 1
    return count


def _is_lost(trial: FrozenTrial) -> bool:
    """Whether whoever ran a trial is gone, as far as this machine can know; one that never said who it is, after a while."""
    worker = trial.user_attrs.get(WORKER)
    if worker is not None:
        return is_dead(worker)
    started = trial.datetime_start
    return started is not None and (datetime.now() - started).total_seconds() > GRACE_S


def _fail(study: optuna.Study, trial: FrozenTrial) -> bool:
    """End a trial as failed; False where it has ended, or somebody else was quicker."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        return study._storage.set_trial_state_values(trial._trial_id, state=TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


def latest(storage: BaseStorage, space: Space, arm: str = "") -> tuple[str | None, bool]:
    """Return the name of the space's study, and whether it is of the code, data and definition as they are now.

    Where there is none of these, the newest of others; None where there is none at all.
    """
    import optuna

    names = optuna.get_all_study_names(storage)
    if (name := space.study_name(arm)) in names:
        return name, True
    prefix = space.prefix(arm)
    others = [n for n in names if n.startswith(prefix) and "." not in n.removeprefix(prefix)]
    dated = []
    for other in others:
        trials = optuna.load_study(study_name=other, storage=storage).get_trials(deepcopy=False)
        starts = [t.datetime_start.timestamp() for t in trials if t.datetime_start]
        dated.append((max(starts, default=0.0), other))
    return (max(dated)[1] if dated else None), False


def seconds_of(signatures: Iterable[str], runs: Path) -> float:
    """Return how long these cells took together."""
    return sum(read_json(runs / s / "done.json").get("seconds", 0.0) for s in signatures)
