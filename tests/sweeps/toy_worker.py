"""A worker process on the toy space: as sweeps.worker, with a training that only waits. Its job comes on standard input."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

from experiments.executors import interrupt
from sweeps.worker import Task
from tests.sweeps.toys import Train, run_toy, space

SECONDS = 0.3  # that a toy cell trains

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    task = Task.read(sys.stdin.read())
    try:
        run_toy(space(), Path(task.runs), task.storage, task.total, Train(SECONDS), task.worker)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
