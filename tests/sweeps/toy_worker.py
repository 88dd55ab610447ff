"""A worker process on the toy space: as sweeps.worker, with a training that only waits. Its job comes on standard input."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from experiments.executors import interrupt
from sweeps.worker import Task
from tests.sweeps.toys import Train, run_toy, space

SECONDS = 0.3  # that a toy cell trains


def wait_for_all(folder: Path) -> None:
    """Wait until TOY_WORKERS workers are there, so that each of them gets something to do."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / str(os.getpid())).touch()
    while len(list(folder.iterdir())) < int(os.environ.get("TOY_WORKERS", "1")):
        time.sleep(0.05)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    task = Task.read(sys.stdin.read())
    wait_for_all(Path(task.runs) / "arrived")
    try:
        run_toy(space(), Path(task.runs), task.storage, task.total, Train(SECONDS), task.worker)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
