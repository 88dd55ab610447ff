"""Sweeps in the tracker: a study is a parent run, its trials are the children, one level and no more."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from experiments.tracking import GROUP, PARENT, Store, _client, _ended, _log_metrics, _log_params, _quoted
from experiments.tracking_server import sigterm_interrupts


@dataclass
class TrialRun:
    """The open run of one trial."""

    store: Store
    run_id: str

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of one seed, which is the step."""
        now_ms = int(time.time() * 1000)
        rows = [(name, float(value), now_ms, step) for name, value in metrics.items()]
        _log_metrics(_client(self.store), self.run_id, rows)


def study_run(
    store: Store, experiment_id: str, study: str, name: str, params: Mapping[str, Any], tags: Mapping[str, str]
) -> str:
    """Return the id of the one parent run of a study, made if need be, and RUNNING again if it had ended.

    Args:
        study: the study's name, by which its run is found.
        name: what the run is called.
    """
    client = _client(store)
    with store.database.lock:
        found = client.search_runs([experiment_id], f"tags.`{GROUP}` = {_quoted(study)}", max_results=1)
        if found:
            run_id = str(found[0].info.run_id)
            client.update_run(run_id, status="RUNNING")
        else:
            own = {**tags, GROUP: study, "mlflow.source.name": "fivefold sweep"}
            run_id = str(client.create_run(experiment_id, run_name=name, tags=own).info.run_id)
        _log_params(client, run_id, params)
    return run_id


@contextmanager
def open_trial(
    store: Store,
    experiment_id: str,
    study_run_id: str,
    name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    resume_run_id: str | None = None,
) -> Iterator[TrialRun]:
    """Open the run of one trial under its study, and end it as what happened inside.

    FINISHED on success; FINISHED with the tag `state` PRUNED on optuna's TrialPruned; FAILED, with the tag `error`, when any
    other exception leaves; KILLED on Ctrl-C and SIGTERM. A trial that is retried goes on under the run it had.
    """
    client, own = _client(store), {**tags, PARENT: study_run_id, "mlflow.source.name": "fivefold sweep"}
    with sigterm_interrupts():
        run_id = _resumed(client, experiment_id, study_run_id, resume_run_id)
        if run_id is None:
            run_id = str(client.create_run(experiment_id, run_name=name, tags=own).info.run_id)
        else:
            for tag, value in own.items():
                client.set_tag(run_id, tag, value)
        with _ended(store, run_id):
            _log_params(client, run_id, params)
            yield TrialRun(store, run_id)


def _resumed(client: Any, experiment_id: str, study_run_id: str, run_id: str | None) -> str | None:
    """The run that this trial had before it was lost, RUNNING; None where it is gone or of another study."""
    from mlflow.exceptions import MlflowException

    if not run_id:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException:
        return None
    if run.info.experiment_id != experiment_id or run.data.tags.get(PARENT) != study_run_id:
        return None
    for name in {"error", "state"} & run.data.tags.keys():
        client.delete_tag(run_id, name)
    client.update_run(run_id, status="RUNNING")
    return run_id


def log_outcome(store: Store, run_id: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
    """Write a study's result on its run."""
    now_ms, client = int(time.time() * 1000), _client(store)
    _log_metrics(client, run_id, [(name, float(value), now_ms, 0) for name, value in metrics.items()])
    for name, value in tags.items():
        client.set_tag(run_id, name, value)
