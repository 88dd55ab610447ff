"""Several processes on one study: they share the work, and one that is killed loses nothing but time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from experiments.errors import UserError
from experiments.provenance import ROOT
from sweeps.crew import Crew
from sweeps.storage import LOST, WORKER, counted, is_dead, open_storage, open_study, recover, this_process
from sweeps.worker import Task
from tests.sweeps.postgres import Server, unavailable
from tests.sweeps.toys import space

WAIT_S = 600  # a machine may be busy


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A PostgreSQL server of our own."""
    if reason := unavailable():
        pytest.skip(reason)
    with Server(tmp_path_factory.mktemp("postgres")) as running:
        yield running


@pytest.fixture(params=["sqlite", "journal", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty storage of each kind."""
    if request.param == "postgresql":
        return request.getfixturevalue("server").database()
    return (
        f"journal:{tmp_path / 'optuna.journal'}"
        if request.param == "journal"
        else f"sqlite:///{tmp_path / 'optuna.db'}"
    )


def _task(url: str, runs: Path, total: int) -> Task:
    return Task("tropical_cnn", "toy", "smoke", "cpu", "", total, url, str(runs))


def _crew(task: Task, most: int = 2) -> Crew:
    return Crew(task, Path(task.runs) / "logs", most, "tests.sweeps.toy_worker")


def _until(condition: Callable[[], Any], crew: Crew | None = None) -> Any:
    """Look after the crew until something is so."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if crew is not None:
            crew.check()
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it never came to be so")


def _finish(study: Any, crew: Crew, total: int) -> None:
    """What `fivefold sweep` does: keep workers at it until the study has its trials."""

    def over() -> bool:
        recover(study)
        taken = counted(study.get_trials(deepcopy=False))
        left = total - sum(t.state.is_finished() for t in taken)
        if left > 0:
            crew.fill(left)
        return left <= 0

    _until(over, crew)
    crew.wait()


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_loses_only_its_trial_which_is_retried(url: str, tmp_path: Path) -> None:
    runs, total = tmp_path / "runs", 6
    study = open_study(space(), open_storage(url))
    crew = _crew(_task(url, runs, total))
    try:
        crew.fill(total)

        def in_the_middle() -> list[Any]:
            running = study.get_trials(deepcopy=False, states=(_state("RUNNING"),))
            return [t for t in running if t.user_attrs.get("scores")]

        victim = _until(in_the_middle, crew)[0]
        os.kill(victim.user_attrs[WORKER]["pid"], signal.SIGKILL)
        _finish(study, crew, total)
    finally:
        crew.close()
    trials = study.trials
    taken = counted(trials)
    assert len(taken) == total
    assert {t.state.name for t in taken} == {"COMPLETE"}
    heirs = [t for t in taken if victim.number in t.system_attrs.get(LOST, ())]
    assert [t.params for t in heirs] == [trials[victim.number].params]
    trained = Counter((runs / "trained.txt").read_text().split())
    assert set(trained.values()) == {1}, "a seed that was finished is not trained again"
    assert victim.user_attrs[WORKER]["pid"] not in {t.user_attrs[WORKER]["pid"] for t in heirs}


@pytest.mark.slow
def test_two_commands_at_once_share_the_work_and_keep_the_total(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_WORKERS", "4")  # nobody starts before all are there
    runs, total = tmp_path / "runs", 8
    study = open_study(space(), open_storage(url))
    crews = [_crew(_task(url, runs, total)) for _ in range(2)]
    try:
        for crew in crews:
            crew.fill(total)

        def over() -> bool:
            for crew in crews:
                crew.check()
            return sum(t.state.is_finished() for t in counted(study.get_trials(deepcopy=False))) >= total

        _until(over)
        for crew in crews:
            crew.wait()
    finally:
        for crew in crews:
            crew.close()
    taken = counted(study.trials)
    assert len(taken) == total
    assert len({t.user_attrs[WORKER]["pid"] for t in taken}) > 1
    before = len(study.trials)
    again = _crew(_task(url, runs, total))
    again.fill(1)
    again.wait()
    assert len(study.trials) == before, "the same command again adds nothing"


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


def test_a_worker_is_dead_where_its_process_is_gone_or_another_has_its_number() -> None:
    mine = this_process()
    assert not is_dead(mine)
    assert is_dead({**mine, "started": mine["started"] - 100})
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert is_dead({**mine, "pid": process.pid})
    assert not is_dead({**mine, "host": "elsewhere", "pid": process.pid})  # only its heartbeat can tell
    assert not is_dead(None)


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_trial_of_a_dead_worker_is_queued_once_with_its_parameters(tmp_path: Path) -> None:
    study = open_study(space(), open_storage(f"sqlite:///{tmp_path / 'optuna.db'}"))
    trial = study.ask()
    drawn = trial.suggest_float("rate", 0.001, 0.1, log=True)
    trial.set_user_attr(WORKER, {**this_process(), "started": 0.0})
    assert recover(study) == 1
    assert recover(study) == 0
    states = [t.state.name for t in study.trials]
    assert states == ["FAIL", "WAITING"]
    assert WORKER not in study.trials[1].user_attrs  # else it would be taken for dead as soon as it starts
    assert study.trials[1].params == {"rate": drawn}
    assert [t.number for t in counted(study.trials)] == [1]
    assert study.ask().suggest_float("rate", 0.001, 0.1, log=True) == drawn


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_trial_that_kills_its_worker_again_and_again_is_given_up(tmp_path: Path) -> None:
    study = open_study(space(), open_storage(f"sqlite:///{tmp_path / 'optuna.db'}"))
    for _ in range(10):
        if study.trials and study.trials[-1].state.name != "WAITING":
            break
        study.ask().set_user_attr(WORKER, {**this_process(), "started": 0.0})
        recover(study)
    assert [t.state.name for t in study.trials] == ["FAIL"] * 4  # once and three times again
    assert len(counted(study.trials)) == 1, "it has its place, so that the search comes to an end"


def test_a_worker_that_cannot_do_its_task_says_why(tmp_path: Path) -> None:
    task = Task("tropical_cnn", "layer_mixx", "smoke", "cpu", "", 1, f"sqlite:///{tmp_path / 'o.db'}", str(tmp_path))
    crew = Crew(task, tmp_path / "logs", 1)
    crew.fill(1)
    with pytest.raises(UserError, match="nearest valid: 'layer_mix'"):
        _until(lambda: False, crew)


def test_workers_end_with_the_command_that_started_them(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from sweeps.crew import Crew; from sweeps.worker import Task\n"
        f"crew = Crew(Task('tropical_cnn', 'layer_mix', 'smoke', 'cpu', '', 50, 'sqlite:///{tmp_path / 'o.db'}',"
        f" r'{tmp_path}'), Path(r'{tmp_path}') / 'logs', 1)\n"
        "crew.fill(1)\n"
        "print(next(iter(crew._running.values()))[0].pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    command = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert command.stdout is not None
    worker = int(command.stdout.readline())
    try:
        command.kill()
        command.wait()
        _until(lambda: not _alive(worker))
    finally:
        with suppress(ProcessLookupError):
            os.kill(worker, signal.SIGKILL)


def _alive(pid: int) -> bool:
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_addresses_are_shown_without_their_password_and_refused_with_a_way_out(tmp_path: Path) -> None:
    from sweeps.storage import shown

    assert "secret" not in shown("postgresql://user:secret@host/name")
    with pytest.raises(UserError, match="no address of a database"):
        open_storage("nonsense")
    with pytest.raises(UserError, match="does not answer"):
        open_storage(f"sqlite:///{tmp_path}")  # a folder
