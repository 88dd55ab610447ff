"""What tests of tracking share: a store on a migrated template, real worker processes, and what they do."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from experiments import tracking
from experiments.records import CellKey

PAPER, TITLE = "tropical_cnn", "3. Tropical Convolutional Neural Networks"
AXES = {"paper": PAPER, "ablation": "net1", "data": "mnist", "profile": "small"}


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs/ folder with a migrated database, made once."""
    root = tmp_path_factory.mktemp("template") / "runs"
    tracking.prepare(tracking.Store(root))
    return root


@pytest.fixture
def store(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tracking.Store:
    """A store on a copy of the template, from a working folder that must stay empty."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    shutil.copytree(template, tmp_path / "runs")
    store = tracking.Store(tmp_path / "runs")
    tracking.prepare(store)
    return store


@pytest.fixture
def parent(store: tracking.Store) -> tuple[str, str]:
    """(experiment id, parent run id) in the store."""
    return make_parent(store)


def make_parent(store: tracking.Store) -> tuple[str, str]:
    experiment = tracking.experiment_id(store, PAPER, TITLE, "**About**")
    return experiment, tracking.parent_run(store, experiment, **AXES, params={"width": 8})


def child(store: tracking.Store | None, parent: tuple[str, str], seed: int = 0, **changed: Any) -> Any:
    """`open_child` with the arguments that a test does not care about."""
    key = CellKey(AXES["paper"], AXES["ablation"], AXES["data"], seed, AXES["profile"])
    arguments: dict[str, Any] = {
        "key": key,
        "signature": f"signature{seed}",
        "params": {"optim.lr": 0.02, "budget.max_epochs": 3},
        "config_yaml": "optim:\n  lr: 0.02\n",
        "manifest": {"commit": "0123abc", "command": "fivefold reproduce tropical_cnn"},
        "log_system_metrics": False,
    }
    return tracking.open_child(store, *parent, **(arguments | changed))


def client_of(store: tracking.Store) -> MlflowClient:
    return MlflowClient(store.uri)


def children(store: tracking.Store, parent: tuple[str, str]) -> list[Any]:
    return client_of(store).search_runs([parent[0]], f"tags.`mlflow.parentRunId` = '{parent[1]}'")


def files(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start a process as workers are: forked from one that has imported the heavy libraries."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def joined(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def wait_for(path: Path, seconds: float = 60) -> str:
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.02)
    return path.read_text()


def together(gate: Path, me: int, peers: int) -> None:
    """Return in all of `peers` processes at about the same moment."""
    (gate / str(me)).touch()
    while len(list(gate.iterdir())) < peers:
        time.sleep(0.0005)


def race_for_parents(store: tracking.Store, gate: Path, me: int, peers: int, groups: int) -> None:
    """One of several processes that all ask for the same parents in the same order."""
    make_parent(store)  # the imports are over with
    experiment = tracking.experiment_id(store, PAPER, TITLE, "**About**")
    for group in range(groups):
        (gate / str(group)).mkdir(exist_ok=True)
        together(gate / str(group), me, peers)
        tracking.experiment_id(store, f"paper{group}", f"Paper {group}", "")
        tracking.parent_run(store, experiment, **(AXES | {"ablation": f"net{group}_wide"}), params={"n": group})


def from_nothing(root: Path, cwd: Path, seed: int, gate: Path, peers: int) -> None:
    """One of several processes that all find no database: prepare, experiment, parent, child, metrics."""
    os.chdir(cwd)
    os.environ["HOME"] = str(cwd)
    together(gate, seed, peers)
    store = tracking.Store(root)
    tracking.prepare(store)
    with child(store, make_parent(store), seed, log_system_metrics=True) as run:
        for step in range(40):
            run.logger.log_metrics({"train/loss": step / 2, "train/acc": float(step)}, step)
            run.logger.flush()


def log_once(store: tracking.Store, parent: tuple[str, str], seed: int) -> None:
    """A run in a process forked from one whose connection to the database is open."""
    with child(store, parent, seed) as run:
        run.logger.log_metrics({"train/loss": 1.0}, 0)


def hang(store: tracking.Store, parent: tuple[str, str], told: Path) -> None:
    """Open a run, log, say so, and wait to be killed."""
    with child(store, parent) as run:
        run.logger.log_metrics({"train/loss": 7.0}, 1)
        run.logger.flush()
        told.write_text(run.run_id)
        time.sleep(120)


def serve(root: Path, port: int, said: Path) -> None:
    """`fivefold ui` in a process of its own, its words in a file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which the background jobs of a shell ignore
    # Under pytest, sys.stdout is an object of its own and not descriptor 1.
    with open(said, "w", buffering=1) as out, redirect_stdout(out):
        tracking.serve(tracking.Store(root), port=port)
