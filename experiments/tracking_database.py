"""The tracking database as a file: made once by whichever process comes first, whole or absent, and movable.

Plain sqlite3 and file operations; what MLflow itself must do (its tables, its migrations) is handed in, so that the
check that nothing is to be done stays free of MLflow's import.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock

from experiments.errors import UserError
from experiments.store import read_json, sync_folder, write_json


@dataclass(frozen=True)
class Database:
    """An MLflow SQLite file `path` and the file URI of the folder beside it that holds artifacts.

    `make(uri, artifacts)` makes all tables in a new file; `upgrade(uri)` migrates an old file and returns whether there
    was anything to do.
    """

    path: Path
    artifacts: str
    make: Callable[[str, str], None]
    upgrade: Callable[[str], None]

    @property
    def lock(self) -> FileLock:
        """The lock between processes under which this file, and anything that must be unique in it, is made."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self.path.with_name(".mlflow.lock"))

    def prepare(self) -> None:
        """Make, upgrade or move the database if need be.

        Raises:
            UserError: the file is no MLflow database, or a newer MLflow wrote it.
        """
        if self._is_current():
            return
        with self.lock:
            if self._is_current():
                return
            if self.path.exists() and self.path.stat().st_size:
                self._bring_forward()
            else:
                self._create()
            write_json(self._marker, self._stamp())

    @property
    def _marker(self) -> Path:
        return self.path.with_name(".mlflow-schema.json")

    def _stamp(self) -> dict[str, str]:
        return {"mlflow": version("mlflow"), "revision": self._ask("SELECT version_num FROM alembic_version")}

    def _is_current(self) -> bool:
        with suppress(json.JSONDecodeError, sqlite3.DatabaseError):
            marker = read_json(self._marker)
            if marker and self.path.exists() and marker == self._stamp():
                return self._old_artifacts() in (None, self.artifacts)
        return False

    def _ask(self, query: str) -> str:
        with closing(sqlite3.connect(self.path, timeout=20)) as connection:
            row = connection.execute(query).fetchone()
        return str(row[0]) if row else ""

    def _create(self) -> None:
        draft = self.path.with_name(".mlflow.db.tmp")
        # A stale write-ahead log beside a new database would be replayed into it.
        for base in (draft, self.path):
            for suffix in ("", "-wal", "-shm", "-journal"):
                base.with_name(base.name + suffix).unlink(missing_ok=True)
        self.make(f"sqlite:///{draft}", self.artifacts)
        with closing(sqlite3.connect(draft)) as connection:
            # Kept in the file: readers and the one writer do not block each other.
            connection.execute("PRAGMA journal_mode = WAL")
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        draft.replace(self.path)
        sync_folder(self.path.parent)

    def _bring_forward(self) -> None:
        """Upgrade and relocate; a copy of the file as it was stays beside it until that has worked."""
        backup = self.path.with_name("mlflow.db.bak")
        try:
            before = self._ask("SELECT version_num FROM alembic_version")
            with closing(sqlite3.connect(self.path)) as source, closing(sqlite3.connect(backup)) as target:
                source.backup(target)
        except sqlite3.DatabaseError as error:
            backup.unlink(missing_ok=True)
            raise UserError(f"{self.path} is no MLflow database ({error}); move it away and run again") from error
        try:
            self.upgrade(f"sqlite:///{self.path}")
        except Exception as error:
            raise UserError(
                f"{self.path} has schema {before or 'of no version'}, which MLflow {version('mlflow')} cannot upgrade "
                f"({error}); install the MLflow that wrote it, or move it away. As it was, it is {backup.name}"
            ) from error
        self._relocate()
        backup.unlink()

    def _old_artifacts(self) -> str | None:
        """Where the artifacts lay when the file was made, if it was made here: told by MLflow's default experiment."""
        location = self._ask("SELECT artifact_location FROM experiments WHERE experiment_id = 0").removesuffix("/0")
        return location if location.endswith("/" + self.artifacts.rsplit("/", 1)[1]) else None

    def _relocate(self) -> None:
        """Follow a folder that was moved or copied: the file holds absolute addresses of its artifacts."""
        old = self._old_artifacts()
        if old is None or old == self.artifacts:
            return
        with closing(sqlite3.connect(self.path, timeout=20)) as connection, connection:
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (self.artifacts, len(old) + 1, len(old), old),
                )
