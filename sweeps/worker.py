"""A worker: a process that runs trials of one study until the study has as many as were asked for.

    python -m sweeps.worker < job.json

Any number of them share a study, on this machine or on others, through nothing but the study's storage. The job comes on
standard input, since a database's address may hold a password and a command line can be read by everybody.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.errors import UserError
from experiments.executors import KEEP_MEMORY, SINGLE_THREADED, interrupt
from sweeps.objective import MLFLOW, Surplus, TrialFailed, Trials
from sweeps.samplers import REJECTED, combinations, make_sampler
from sweeps.space import Space, load
from sweeps.storage import LOST, WORKER, open_storage, open_study, places, recover, retry, this_process

if TYPE_CHECKING:
    import optuna

    from experiments.tracking_trials import TrialRun

REJECTIONS = 50  # trials that the constraints do not allow, for each one that they do, before a search gives up
EXIT_USER = 2
REFUSED = "refused: "  # before the words of a worker that cannot do its task


@dataclass(frozen=True)
class Task:
    """What a worker is to do."""

    paper: str
    space: str
    profile: str
    trainer: str
    arm: str
    total: int
    storage: str
    runs: str
    worker: int = 0
    experiment: str = ""  # of the tracker; empty goes untracked
    parent: str = ""  # the study's run there
    command: int = 0  # process that started the worker, which ends with it; 0 for none

    @classmethod
    def read(cls, text: str) -> Task:
        """Read a task from JSON."""
        return cls(**{f.name: value for f in fields(cls) if (value := json.loads(text).get(f.name)) is not None})

    def written(self) -> str:
        """Return the task as JSON."""
        return json.dumps(asdict(self))

    def load_space(self) -> Space:
        """Return the space that is searched: of an arm, what that leaves open."""
        space = load(self.paper, self.space, self.profile, self.trainer)
        return space.arm(self.arm) if self.arm else space


def reachable(space: Space, trials: int) -> int:
    """Return how many trials a study is to have: no more than there are combinations where all of them are gone through."""
    most = combinations(space)
    return min(trials, most) if most is not None and space.exhaustive else trials


def work(task: Task, space: Space, study: optuna.Study, trials: Trials) -> int:
    """Run trials until the study has `task.total`, or those that are missing are being run by others.

    Returns:
        how many trials this worker ran.
    Raises:
        UserError: what stops every trial, or constraints that next to nothing meets.
        KeyboardInterrupt: asked to stop; the trial at hand is queued again.
    """
    from optuna.trial import TrialState

    ran = 0
    while True:
        recover(study)
        all_trials = study.get_trials(deepcopy=False)
        taken = places(space, all_trials)
        if len(taken) >= task.total and not any(t.state == TrialState.WAITING for t in taken):
            return ran
        rejected = sum(REJECTED in trial.user_attrs for trial in all_trials)
        if rejected > REJECTIONS * (1 + len(taken)):
            raise UserError(f"{space.name}: of {rejected + len(taken)} trials the constraints allow {len(taken)}")
        study.sampler = make_sampler(space, len(all_trials), task.worker)
        try:
            study.optimize(trials, n_trials=1, catch=(TrialFailed, Surplus))
        except KeyboardInterrupt:
            _queue_interrupted(study)
            raise
        except Exception:
            if not _overtaken(study, trials.number):
                raise
        ran += 1


def _overtaken(study: optuna.Study, number: int | None) -> bool:
    """Whether a trial was given to another worker, as one is that was silent for long, such as a process that was suspended."""
    return any(number in trial.system_attrs.get(LOST, ()) for trial in study.get_trials(deepcopy=False))


def _queue_interrupted(study: optuna.Study) -> None:
    """Queue again the trial that an interrupt ended as failed."""
    from optuna.trial import TrialState

    mine = this_process()
    own = [t for t in study.trials if t.user_attrs.get(WORKER) == mine and t.state == TrialState.FAIL]
    if own and own[-1].values is None:
        retry(study, own[-1], most=None)


def run_task(task: Task) -> int:
    """Open the study and run its trials in this process; see `work`."""
    from experiments.run import run_cell

    space = task.load_space()
    study = open_study(space, open_storage(task.storage), task.arm)
    track = _tracker(task, space, study) if task.parent else None
    trials = Trials(space, Path(task.runs), task.total, lambda cell, runs: run_cell(cell, runs), track)
    return work(task, space, study, trials)


def _tracker(task: Task, space: Space, study: optuna.Study) -> Any:
    """Return what makes the context in which a trial is tracked, as a child of the study's run."""
    from experiments.tracking import Store
    from experiments.tracking_trials import open_trial
    from sweeps.study import tags_of

    store = Store(Path(task.runs))

    @contextmanager
    def track(trial: optuna.Trial, values: Mapping[str, Any]) -> Iterator[TrialRun]:
        tags = tags_of(task, study, trial.number)
        with open_trial(
            store, task.experiment, task.parent, f"trial {trial.number}", values, tags, trial.user_attrs.get(MLFLOW)
        ) as child:
            yield child

    return track


def main() -> None:
    """Entry point of the process."""
    os.environ.update(SINGLE_THREADED | KEEP_MEMORY)
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    task = Task.read(sys.stdin.read())
    if task.trainer == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # else each optimiser step looks for a driver again
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the command, which ends its workers with SIGTERM
    signal.signal(signal.SIGTERM, interrupt)
    if task.command:
        threading.Thread(target=_die_with, args=(task.command,), daemon=True).start()
    try:
        run_task(task)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except UserError as error:
        print(f"{REFUSED}{error}", file=sys.stderr)
        raise SystemExit(EXIT_USER) from None


def _die_with(parent: int) -> None:
    """End this process when the command that started it is gone: its trial is queued again by whoever goes on."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
