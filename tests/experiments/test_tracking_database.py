"""The tracking database as a file: whole or absent, one for all processes, and movable."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from tracking_fixtures import (
    TITLE,
    child,
    children,
    client_of,
    files,
    from_nothing,
    joined,
    log_once,
    make_parent,
    parent,
    race_for_parents,
    start,
    store,
    template,
)

from experiments import tracking
from experiments.errors import UserError
from experiments.tracking import Store

__all__ = ["parent", "store", "template"]  # fixtures
ROOT = Path(__file__).resolve().parents[2]
Parent = tuple[str, str]


def python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_database_half_made_is_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(uri: str, artifacts: str) -> None:
        Path(uri.removeprefix("sqlite:///")).write_bytes(b"half a database")
        raise MemoryError

    store = Store(tmp_path / "runs")
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "_make_tables", dies)
        with pytest.raises(MemoryError):
            tracking.prepare(store)
    assert not (store.root / "mlflow.db").exists()
    # A log left from a deleted database must not be replayed into the new one.
    (store.root / "mlflow.db-wal").write_bytes(b"stale")
    tracking.prepare(store)
    make_parent(store)
    assert not (store.root / ".mlflow.db.tmp").exists()
    with sqlite3.connect(store.root / "mlflow.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database, " * 100)
    with pytest.raises(UserError, match=r"is no MLflow database.*move it away"):
        tracking.prepare(Store(tmp_path))
    assert (tmp_path / "mlflow.db").read_text().startswith("not a database")


def test_a_database_of_a_newer_mlflow_is_refused_and_kept(store: Store) -> None:
    with sqlite3.connect(store.root / "mlflow.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'f00f00f00f00'")
    with pytest.raises(UserError, match=r"schema f00f00f00f00, which MLflow .* cannot upgrade"):
        tracking.prepare(store)
    with sqlite3.connect(store.root / "mlflow.db") as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("f00f00f00f00",)


def test_neither_import_nor_a_prepared_store_costs_mlflow(store: Store) -> None:
    code = (
        "import sys; from pathlib import Path; from experiments import tracking;"
        "tracking.prepare(tracking.Store(Path(sys.argv[1])));"
        "print({'mlflow', 'torch', 'lightning', 'sqlalchemy'} & set(sys.modules) or 'none')"
    )
    assert python(code, str(store.root)) == "none"


def test_a_moved_folder_takes_its_artifacts_along(store: Store, parent: Parent, tmp_path: Path) -> None:
    with child(store, parent) as before:
        pass
    store.root.rename(tmp_path / "moved to é")
    moved = Store(tmp_path / "moved to é")
    tracking.prepare(moved)
    assert make_parent(moved) == parent
    with child(moved, parent, seed=1) as after:
        pass
    for run in (before, after):
        assert client_of(moved).download_artifacts(run.run_id, "config.yaml", str(tmp_path / "cwd"))
    assert not store.root.exists()


def test_a_process_forked_with_an_open_connection_logs_safely(store: Store, parent: Parent) -> None:
    assert joined([start(log_once, store, parent, seed) for seed in (1, 2)]) == [0, 0]
    log_once(store, parent, 3)
    assert [run.info.status for run in children(store, parent)] == ["FINISHED"] * 3
    with sqlite3.connect(store.root / "mlflow.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_four_processes_on_no_database_share_one_experiment_and_one_parent(tmp_path: Path) -> None:
    root, cwd, gate = tmp_path / "runs", tmp_path / "cwd", tmp_path / "gate"
    cwd.mkdir()
    gate.mkdir()
    assert joined([start(from_nothing, root, cwd, seed, gate, 4) for seed in range(4)]) == [0] * 4
    assert files(cwd) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cwd", "gate", "runs"]
    store = Store(root)
    experiments = [e for e in client_of(store).search_experiments() if e.name != "Default"]
    assert [e.name for e in experiments] == [TITLE]
    runs = client_of(store).search_runs([experiments[0].experiment_id])
    parents = [run for run in runs if tracking.PARENT not in run.data.tags]
    assert len(parents) == 1
    seeds = children(store, (experiments[0].experiment_id, parents[0].info.run_id))
    assert sorted(run.data.params["seed"] for run in seeds) == ["0", "1", "2", "3"]
    for run in seeds:
        assert run.info.status == "FINISHED"
        history = client_of(store).get_metric_history(run.info.run_id, "train/acc")
        assert [point.value for point in history] == [float(step) for step in range(40)]


def test_processes_that_ask_at_once_get_the_same_experiment_and_the_same_parent(store: Store, tmp_path: Path) -> None:
    (tmp_path / "gate").mkdir()
    assert joined([start(race_for_parents, store, tmp_path / "gate", me, 4, 12) for me in range(4)]) == [0] * 4
    experiments = client_of(store).search_experiments(filter_string="attribute.name LIKE 'Paper %'")
    assert sorted(e.tags["paper"] for e in experiments) == sorted(f"paper{group}" for group in range(12))
    runs = client_of(store).search_runs([make_parent(store)[0]], "tags.ablation LIKE '%_wide'")
    assert sorted(run.data.params["n"] for run in runs) == sorted(str(group) for group in range(12))
