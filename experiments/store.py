"""Runs on disk: one folder per signature, every file whole or absent, one writer at a time."""

from __future__ import annotations

import json
import os
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from experiments.records import CellKey, Record, State


class CellBusy(RuntimeError):
    """Another process holds this cell."""


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename survives a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON atomically; NaN and infinity are refused, since a missing value is left out instead."""
    write_atomically(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON of a file, or {} where there is none."""
    with suppress(FileNotFoundError):
        return json.loads(path.read_text())
    return {}


@contextmanager
def cell_lock(folder: Path, wait_s: float = 3.0) -> Iterator[None]:
    """Hold a cell's folder. The kernel lets go of it when the process dies, however it dies.

    Raises:
        CellBusy: another process holds it after `wait_s` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=wait_s)
    except Timeout:
        raise CellBusy(f"another process is running {folder.name}") from None
    try:
        yield
    finally:
        lock.release()


def is_held(folder: Path) -> bool:
    """Say whether some process is running this cell now."""
    if not (folder / ".lock").exists():
        return False
    try:
        with cell_lock(folder, wait_s=0):
            return False
    except CellBusy:
        return True


def key_of(manifest: Mapping[str, Any]) -> CellKey:
    """Return the cell key that a manifest names."""
    names = ("paper", "ablation", "data", "seed", "profile")
    return CellKey(**{name: manifest[name] for name in names}, model=manifest.get("model", ""))


def read_run(folder: Path, state: State | None = None) -> Record:
    """Read one run folder. Its state is what its files say unless `state` is given.

    Raises:
        FileNotFoundError: the folder holds no manifest.
    """
    manifest = read_json(folder / "manifest.json")
    if not manifest:
        raise FileNotFoundError(f"{folder} holds no manifest.json: not a run")
    done, failed = read_json(folder / "done.json"), read_json(folder / "failed.json")
    if state is None:
        state = _state(folder, done, failed)
    return Record(
        key=key_of(manifest),
        signature=folder.name,
        state=state,
        path=folder,
        metrics=read_json(folder / "metrics.json") if state == "done" else {},
        manifest=manifest,
        done=done,
        error=failed.get("error"),
    )


def _state(folder: Path, done: dict[str, Any], failed: dict[str, Any]) -> State:
    if done:
        return "done"
    if is_held(folder):
        return "running"
    return "failed" if failed else "not run"


@dataclass
class Index:
    """What lies under runs/: for each cell key, the signatures ever started."""

    runs: Path
    signatures: dict[CellKey, list[str]]

    @classmethod
    def scan(cls, runs: Path) -> Index:
        """Read every manifest under `runs` once."""
        found: dict[CellKey, list[str]] = defaultdict(list)
        for file in sorted(runs.glob("*/manifest.json")):
            with suppress(KeyError, TypeError, json.JSONDecodeError):
                found[key_of(read_json(file))].append(file.parent.name)
        return cls(runs, dict(found))

    def record(self, key: CellKey, signature: str) -> Record:
        """Return the record of a cell as configured and coded now; `stale` where only older code has run."""
        folder = self.runs / signature
        if (folder / "manifest.json").exists():
            current = read_run(folder)
            if current.state != "not run":
                return replace(current, key=key)  # two ablations that come to the same experiment share its run
        older = [s for s in self.signatures.get(key, []) if s != signature]
        finished = [s for s in older if (self.runs / s / "done.json").exists()]
        if finished:
            latest = max(finished, key=lambda s: (self.runs / s / "done.json").stat().st_mtime_ns)
            return read_run(self.runs / latest, state="stale")
        return Record(key=key, signature=signature, state="not run", path=folder)

    def seconds(self, keys: Iterable[CellKey]) -> list[float]:
        """Return how long finished runs of these keys took, in seconds."""
        folders = [self.runs / s for key in keys for s in self.signatures.get(key, [])]
        return [done["seconds"] for folder in folders if (done := read_json(folder / "done.json"))]
