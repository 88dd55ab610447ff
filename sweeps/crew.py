"""The worker processes of one command: started, looked after, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from experiments.errors import UserError
from experiments.executors import KEEP_MEMORY, SINGLE_THREADED
from experiments.provenance import ROOT
from sweeps.worker import EXIT_USER, REFUSED, Task

DEATHS = 5  # workers lost one after the other before the sweep gives up


@dataclass
class Crew:
    """The worker processes of one command."""

    task: Task
    folder: Path
    most: int
    module: str = "sweeps.worker"
    _running: dict[int, tuple[subprocess.Popen[str], IO[str]]] = field(default_factory=dict)
    _next: int = 0
    _deaths: int = 0

    def fill(self, ready: int) -> None:
        """Start workers up to as many as there are trials for them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for _ in range(min(self.most, ready) - len(self._running)):
            number, self._next = self._next, self._next + 1
            log = open(self.folder / f"worker-{os.getpid()}-{number}.log", "w+")  # noqa: SIM115  # closed with the worker
            process = subprocess.Popen(
                [sys.executable, "-m", self.module],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ | SINGLE_THREADED | KEEP_MEMORY,
            )
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.write(replace(self.task, worker=number, command=os.getpid()).written())
                process.stdin.close()
            self._running[number] = process, log

    def check(self) -> None:
        """Take note of workers that have ended.

        Raises:
            UserError: one says that all trials would fail, or workers die one after the other.
        """
        for number, (process, log) in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[number]
            log.seek(0)
            words = log.read().strip()
            log.close()
            if process.returncode == EXIT_USER:
                raise UserError(words.rpartition(REFUSED)[2] or "a worker refused its task")
            if process.returncode == 0:
                self._deaths = 0
                continue
            self._deaths += 1
            if process.returncode > 0 or self._deaths > DEATHS:
                raise UserError(f"a worker ended with status {process.returncode}; its last words:\n{words[-2000:]}")

    def wait(self) -> None:
        """Wait for workers that have nothing left to do."""
        for process, _ in self._running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=120)
        self.close()

    def close(self) -> None:
        """Ask all workers to stop, and see to it."""
        for process, _ in self._running.values():
            process.send_signal(signal.SIGTERM)
        for process, log in self._running.values():
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()
        self._running.clear()
