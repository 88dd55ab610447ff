"""Arrays that take long to make (aligned or drawn faces, what a detector finds), kept in files that are checked by hash:
written whole or not at all.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from datamodules import sources

PARTS = ("crops", "points", "names", "people", "splits")
Arrays = dict[str, np.ndarray]


def kept(
    stem: str,
    key: str,
    make: Callable[[], tuple[Arrays, str]],
    parts: Sequence[str] = PARTS,
    folder: str = "face_crops",
) -> tuple[Arrays, str]:
    """Arrays and a note from their file, or made and written; a file that is not what was written is made again."""
    file = sources.cache_root() / folder / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npz"
    if (there := _read(file, parts)) is not None:
        return there
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if (there := _read(file, parts)) is None:  # another process may have made it meanwhile
            there = make()
            _write(file, *there)
    return there


def _read(file: Path, parts: Sequence[str]) -> tuple[Arrays, str] | None:
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as opened:
            arrays, note, digest = {part: opened[part] for part in parts}, str(opened["note"]), str(opened["sha256"])
        if _digest(arrays, note) != digest:
            raise ValueError("its content does not have the sha256 it was written with")
    except Exception as error:
        print(f"{file} is corrupt ({error}); making it again", file=sys.stderr)
        file.unlink(missing_ok=True)
        return None
    return arrays, note


def _digest(arrays: Arrays, note: str) -> str:
    whole = hashlib.sha256(note.encode())
    for part in sorted(arrays):
        whole.update(f"{part}{arrays[part].dtype.str}{arrays[part].shape}".encode() + arrays[part].tobytes())
    return whole.hexdigest()


def _write(file: Path, arrays: Arrays, note: str) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with open(temporary, "wb") as opened:
            digest = np.array(_digest(arrays, note))
            np.savez(opened, note=np.array(note), sha256=digest, **arrays)  # type: ignore[arg-type]
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
