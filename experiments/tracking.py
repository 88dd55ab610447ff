"""The only module that imports mlflow: a paper is an experiment, an ablation a parent run, a seed its child.

MLflow takes seconds to import, so the functions that need it import it, and `import experiments.tracking` does not.
Runs are made through the client with explicit tags: the fluent API would probe git, change the process's tracking URI
and keep a stack of open runs, all of which would leak from one cell to the next.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.errors import UserError
from experiments.records import CellKey
from experiments.tracking_database import Database
from experiments.tracking_server import free_port, run_server, sigterm_interrupts

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow.tracking import MlflowClient

    from experiments.tracking_logger import GuestLogger, Row

# Read by MLflow when it is imported, here and in every process started from here.
for _name in ("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"):
    os.environ.setdefault(_name, "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")

GROUP = "fivefold.group"  # on parents only: paper/ablation/data/profile
PARENT = "mlflow.parentRunId"
PARAM_CHARS, NAME_CHARS = 500, 250  # how much of a parameter is worth a column; MLflow's own limit on names
PARAMS_PER_BATCH, METRICS_PER_BATCH = 100, 1000  # MLflow's limits
Estimate = tuple[float | None, float | None, float | None, int | None]


@dataclass(frozen=True)
class Store:
    """Where runs are tracked: SQLite and files under `root`, or an http(s) server.

    `server`, or else MLFLOW_TRACKING_URI, is used where it is an http(s) address; anything else there is ignored, so
    that nothing is ever written outside `root`.
    """

    root: Path
    server: str | None = None

    @property
    def remote(self) -> str | None:
        """The server's address, or None where tracking is local."""
        address = self.server or os.environ.get("MLFLOW_TRACKING_URI", "")
        return address if address.startswith(("http://", "https://")) else None

    @property
    def uri(self) -> str:
        """The tracking URI, absolute."""
        return self.remote or f"sqlite:///{self.database.path}"

    @property
    def artifacts(self) -> str:
        """The file URI of the folder that holds artifacts, absolute."""
        return (self.root.resolve() / "mlartifacts").as_uri()

    @property
    def database(self) -> Database:
        """The local database; its lock also keeps experiments and parents single."""
        return Database(self.root.resolve() / "mlflow.db", self.artifacts, _make_tables, _upgrade_tables)


@dataclass
class ChildRun:
    """An open run of one seed. `run_id` and `logger` are None where tracking is off.

    `log_every` is for `Trainer(log_every_n_steps=...)`.
    """

    run_id: str | None = None
    logger: GuestLogger | None = None
    log_every: int = 50


def prepare(store: Store) -> None:
    """Make or upgrade the database once, whichever process comes first; without mlflow when nothing is to be done.

    Where `root` was moved or copied, the absolute addresses of its artifacts are brought along.

    Raises:
        UserError: mlflow.db is no MLflow database, or a newer MLflow wrote it.
    """
    if not store.remote:
        store.database.prepare()


def experiment_id(store: Store, paper_key: str, title: str, description: str) -> str:
    """Return the id of a paper's experiment, made if need be. The key finds it; title and description may change.

    Raises:
        UserError: an experiment of another paper has this title.
    """
    from mlflow.entities import ViewType

    client = _client(store)
    tags = {"mlflow.experimentKind": "custom_model_development", "mlflow.note.content": description}
    with store.database.lock:
        # With the trash: an experiment there still holds its name.
        found = client.search_experiments(ViewType.ALL, filter_string=f"tags.paper = {_quoted(paper_key)}")
        if not found:
            if client.get_experiment_by_name(title) is not None:
                raise UserError(f"the tracker has an experiment '{title}' not of {paper_key}: rename it there")
            location = None if store.remote else f"{store.artifacts}/{paper_key}"
            return str(client.create_experiment(title, artifact_location=location, tags=tags | {"paper": paper_key}))
        experiment = found[0]
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        if experiment.name != title:
            client.rename_experiment(experiment.experiment_id, title)
        for name, value in tags.items():
            if experiment.tags.get(name) != value:
                client.set_experiment_tag(experiment.experiment_id, name, value)
        return str(experiment.experiment_id)


def parent_run(
    store: Store, experiment_id: str, *, paper: str, ablation: str, data: str, profile: str, params: Mapping[str, Any]
) -> str:
    """Return the id of the one parent run of a group of seeds, made if need be, and RUNNING again if it had ended."""
    client = _client(store)
    axes = {"paper": paper, "ablation": ablation, "data": data, "profile": profile}
    group = "/".join(axes.values())
    with store.database.lock:
        found = client.search_runs([experiment_id], f"tags.`{GROUP}` = {_quoted(group)}", max_results=1)
        if found:
            run_id = str(found[0].info.run_id)
            client.update_run(run_id, status="RUNNING")
        else:
            tags = axes | {GROUP: group, "mlflow.source.name": "fivefold"}
            name = f"{ablation} on {data} ({profile})"
            run_id = str(client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)
        _log_params(client, run_id, {**params, **axes})
    return run_id


@contextmanager
def open_child(
    store: Store | None,
    experiment_id: str,
    parent_run_id: str,
    key: CellKey,
    signature: str,
    params: Mapping[str, Any],
    config_yaml: str,
    manifest: Mapping[str, Any],
    resume_run_id: str | None = None,
    log_system_metrics: bool = True,
    log_every: int = 50,
) -> Iterator[ChildRun]:
    """Open the run of one seed under its parent, and end it as what happened inside.

    FINISHED on success; FAILED, with the tag `error`, when an exception leaves; KILLED on Ctrl-C, SIGTERM or exit;
    FINISHED with the tag `state` PRUNED on optuna's TrialPruned. A run that kill -9 left RUNNING goes on under its id,
    as does one that ended and is run again; steps since its last checkpoint are then logged twice, with equal values.

    Args:
        store: None goes untracked.
        params: the resolved configuration, flattened; the axes of `key` and the signature are added, as tags also.
        config_yaml: the whole configuration, kept as the artifact config.yaml.
        manifest: kept as the artifact manifest.json.
        resume_run_id: the id this cell had before; ignored where it is gone or of another signature.
    Raises:
        UserError: the parent is a child itself (the UI loses deeper levels) or there is none.
    """
    if store is None:
        yield ChildRun(log_every=log_every)
        return
    from experiments.tracking_logger import GuestLogger

    client = _client(store)
    if not parent_run_id or PARENT in client.get_run(parent_run_id).data.tags:
        raise UserError(f"'{parent_run_id}' is not a parent run: seeds lie exactly one level below their ablation")
    tags = {name: str(value) for name, value in asdict(key).items()} | {"signature": signature, PARENT: parent_run_id}
    tags |= {"mlflow.source.name": str(manifest.get("command", "fivefold"))}
    if manifest.get("commit"):
        tags["mlflow.source.git.commit"] = str(manifest["commit"])
    with sigterm_interrupts():
        run_id, resumed = _child_id(store, client, experiment_id, key, tags, resume_run_id)
        with _ended(store, run_id):
            _log_params(client, run_id, {**params, **asdict(key), "signature": signature})
            client.log_text(run_id, config_yaml, "config.yaml")
            known = {**manifest, "mlflow_run_id": run_id, "mlflow_experiment_id": experiment_id}
            client.log_text(run_id, json.dumps(known, indent=2, sort_keys=True), "manifest.json")
            logger = GuestLogger(store.uri, experiment_id, run_id, partial(_log_metrics, client, run_id))
            with logger.flushed(), _system_metrics(store, run_id, resumed, log_system_metrics):
                yield ChildRun(run_id, logger, log_every)


def mark_pruned(store: Store, run_id: str, step: int | None = None) -> None:
    """Tag a trial that was stopped early because it was losing, at `step`: it has not failed."""
    _client(store).set_tag(run_id, "state", "PRUNED")
    if step is not None:
        _client(store).set_tag(run_id, "pruned_at", step)


def summarise_parent(store: Store, parent_run_id: str, estimates: Mapping[str, Estimate], status: str) -> None:
    """Log a parent's numbers over seeds and end it: `<metric>`, `<metric>.ci_low`, `<metric>.ci_high`, `<metric>.n`.

    Args:
        estimates: metric -> (mean, ci_low, ci_high, n), each in the metric's unit; what is None or NaN is left out.
        status: FINISHED, FAILED or KILLED.
    """
    client, now_ms = _client(store), int(time.time() * 1000)
    rows = [
        (metric + suffix, float(value), now_ms, 0)
        for metric, estimate in estimates.items()
        for suffix, value in zip(("", ".ci_low", ".ci_high", ".n"), estimate, strict=True)
        if value is not None and not math.isnan(value)
    ]
    _log_metrics(client, parent_run_id, rows)
    client.set_terminated(parent_run_id, status)


def log_artifacts(store: Store, run_id: str, paths: Iterable[Path], folder: str | None = None) -> None:
    """Attach files to a run, under `folder` there."""
    for path in paths:
        _client(store).log_artifact(run_id, str(path), folder)


def log_figure(store: Store, run_id: str, figure: Figure, name: str) -> None:
    """Attach a matplotlib figure to a run, as figures/<name>; the ending chooses the format."""
    _client(store).log_figure(run_id, figure, f"figures/{name}")


def serve(store: Store, host: str = "127.0.0.1", port: int = 5000) -> None:
    """Serve the MLflow UI over the store, on this machine only, until Ctrl-C or SIGTERM. Prints the address.

    The next free port is taken where `port` is not. The server's own words go to server.log in the root.

    Raises:
        UserError: other machines could reach `host`, no port is free, or the server did not start.
    """
    if store.remote:
        return print(f"Runs are tracked at {store.remote}", flush=True)
    from experiments.tracking_views import doors

    port = free_port(host, port)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store.uri, "--artifacts-destination", store.artifacts]
    # No job queue: it would start helper processes and a database of its own.
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    run_server(command, address, store.root, quiet, "MLflow UI", doors(store, address))


def _make_tables(uri: str, artifacts: str) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    logging.getLogger("alembic").setLevel(logging.WARNING)
    SqlAlchemyStore(uri, artifacts).engine.dispose()


def _upgrade_tables(uri: str) -> None:
    from mlflow.store.db import utils

    logging.getLogger("alembic").setLevel(logging.WARNING)
    engine = utils.create_sqlalchemy_engine(uri)
    try:
        if utils._get_schema_version(engine) != utils._get_latest_schema_revision():
            utils._upgrade_db(engine)
    finally:
        engine.dispose()


def _client(store: Store) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    return MlflowClient(store.uri)


def _quoted(value: str) -> str:
    if "'" in value:
        raise UserError(f"{value!r}: a name in the tracker cannot hold a quotation mark")
    return f"'{value}'"


def _child_id(
    store: Store, client: MlflowClient, experiment: str, key: CellKey, tags: dict[str, str], resume: str | None
) -> tuple[str, bool]:
    """Return the run to log to, RUNNING and tagged, and whether it existed before."""
    from mlflow.entities import RunTag

    run = _resumable(store, client, experiment, tags["signature"], resume)
    if run is None:
        name = f"seed {key.seed} of {key.ablation} on {key.data}"
        return str(client.create_run(experiment, run_name=name, tags=tags).info.run_id), False
    run_id = str(run.info.run_id)
    for name in {"error", "state"} & run.data.tags.keys():
        client.delete_tag(run_id, name)
    client.log_batch(run_id, tags=[RunTag(name, value) for name, value in tags.items()])
    client.update_run(run_id, status="RUNNING")
    return run_id, True


def _resumable(store: Store, client: MlflowClient, experiment: str, signature: str, resume: str | None) -> Any:
    """The run that this cell had before, or None. Never one of another cell."""
    from mlflow.exceptions import MlflowException

    if resume:
        try:
            run = client.get_run(resume)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
        else:
            alive = run.info.lifecycle_stage == "active" and run.info.experiment_id == experiment
            if alive and run.data.tags.get("signature") == signature:
                return run
    if store.remote:
        return None  # there, a run of this signature may be alive on another machine
    # Killed after its run was made and before the manifest that names it was written.
    query = f"tags.signature = {_quoted(signature)} AND attributes.status = 'RUNNING'"
    return next(iter(client.search_runs([experiment], query, max_results=1)), None)


@contextmanager
def _ended(store: Store, run_id: str) -> Iterator[None]:
    """End a run as what happened inside."""
    client = _client(store)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        client.set_terminated(run_id, "KILLED")
        raise
    except BaseException as error:
        # Told by name, since only sweeps may import optuna.
        if any(kind.__name__ == "TrialPruned" for kind in type(error).__mro__):
            mark_pruned(store, run_id)
            client.set_terminated(run_id, "FINISHED")
        else:
            client.set_tag(run_id, "error", f"{type(error).__name__}: {error}"[:PARAM_CHARS])
            client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")


@contextmanager
def _system_metrics(store: Store, run_id: str, resumed: bool, wanted: bool) -> Iterator[None]:
    """Sample CPU, memory, disk, network and GPU in a thread that has ended when this has."""
    if not wanted:
        yield
        return
    from mlflow.exceptions import MlflowException
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=resumed, tracking_uri=store.uri)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()
        # The thread leaves without its last sample, and a run shorter than its interval would have none at all.
        with suppress(MlflowException):
            for kind in monitor.monitors:
                kind.clear_metrics()
            monitor.collect_metrics()
            monitor.publish_metrics(monitor.aggregate_metrics())
            monitor.mlflow_logger.flush()


def _log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """Log what is not there yet: MLflow refuses a second value, and a resumed run has its parameters."""
    from mlflow.entities import Param

    there = client.get_run(run_id).data.params
    values = {_clean(name): str(value) for name, value in params.items()}
    short = {name: v if len(v) <= PARAM_CHARS else v[: PARAM_CHARS - 1] + "…" for name, v in values.items()}
    new = [Param(name, value) for name, value in short.items() if name not in there]
    for start in range(0, len(new), PARAMS_PER_BATCH):
        client.log_batch(run_id, params=new[start : start + PARAMS_PER_BATCH])


def _clean(name: str) -> str:
    """A name that MLflow takes."""
    return re.sub(r"[^\w/.: -]", "_", name, flags=re.ASCII)[:NAME_CHARS]


def _log_metrics(client: MlflowClient, run_id: str, rows: Sequence[Row]) -> None:
    from mlflow.entities import Metric

    for start in range(0, len(rows), METRICS_PER_BATCH):
        batch = [Metric(_clean(name), v, ms, step) for name, v, ms, step in rows[start : start + METRICS_PER_BATCH]]
        client.log_batch(run_id, metrics=batch)
