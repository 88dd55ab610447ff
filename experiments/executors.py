"""Where cells run: submit / poll / cancel. The local pool gives each cell a process of its own, one thread each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, Protocol

from experiments.cell import Cell
from experiments.store import CellBusy, cell_lock, write_json
from lit_modules.processes import die_with_parent

SINGLE_THREADED = dict.fromkeys(
    ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"
)
KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
}  # fewer page faults per step
EXIT_BUSY = 75  # the cell is being run by another command
PRELOAD = [
    "experiments.run",
    "experiments.cli",
    "experiments.tracking_logger",
    "lit_modules.tropical_cnn",
    "lit_modules.min_max_plus",
    "lit_modules.moe_upcycling",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.system_metrics.system_metrics_monitor",
    "experiments.warm",
]
PRELOAD_OF = {"auto_map": ["experiments.warm_plans"]}  # beside those, where the first cell is of this paper


@dataclass(frozen=True)
class Job:
    """A cell to run, where its results go, and its place in the tracking store."""

    cell: Cell
    runs: Path
    tracked: bool = True
    parent: tuple[str, str] | None = None

    @property
    def alone(self) -> bool:
        """Whether nothing may run beside it, since it measures time."""
        return bool(self.cell.config.get("alone", False))


@dataclass(frozen=True)
class Finished:
    """What became of a submitted job: done, failed, or busy (another command is running the same cell)."""

    handle: str
    outcome: Literal["done", "failed", "busy"]


class Executor(Protocol):
    """Three methods; a SLURM or Ray executor fills in the same ones."""

    def submit(self, job: Job) -> str:
        """Queue a job and return its handle."""

    def poll(self, timeout_s: float) -> list[Finished]:
        """Return what has finished, waiting at most `timeout_s` seconds for the first."""

    def cancel(self, handle: str) -> None:
        """Stop a job, queued or running. What it had finished stays; it can be submitted again."""


def default_jobs(trainer: Mapping[str, Any] | None = None) -> int:
    """Return how many cells run at once: one per usable core or, on GPUs, one."""
    if trainer is not None and trainer["accelerator"] != "cpu":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = trainer["devices"] if trainer is not None else 1
    return max(1, cores // devices) if isinstance(devices, int) and devices > 0 else cores


@dataclass
class LocalPool:
    """At most `jobs` single-threaded processes at once, forked from a server that has imported the heavy libraries."""

    jobs: int = field(default_factory=default_jobs)
    _queue: deque[Job] = field(default_factory=deque)
    _running: dict[str, tuple[Job, BaseProcess]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        os.environ.update(SINGLE_THREADED | KEEP_MEMORY)  # glibc reads the latter when the server starts
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)

    def submit(self, job: Job) -> str:
        self._queue.append(job)
        paper = job.cell.key.paper
        self._context.set_forkserver_preload([*PRELOAD, *PRELOAD_OF.get(paper, [])])  # of no effect once it runs
        self._fill()
        return job.cell.signature

    def poll(self, timeout_s: float = 1.0) -> list[Finished]:
        self._fill()
        if self._running:
            wait([process.sentinel for _, process in self._running.values()], timeout=timeout_s)
        finished = []
        for handle, (job, process) in list(self._running.items()):
            if process.exitcode is None:
                continue
            process.join()
            del self._running[handle]
            finished.append(Finished(handle, _outcome(job, process.exitcode)))
        self._fill()
        return finished

    def cancel(self, handle: str) -> None:
        self._queue = deque(job for job in self._queue if job.cell.signature != handle)
        if handle in self._running:
            _, process = self._running.pop(handle)
            process.terminate()
            process.join(timeout=5)
            if process.exitcode is None:
                process.kill()
                process.join()

    def close(self) -> None:
        """Cancel everything: first ask all processes to stop, then wait for each."""
        self._queue.clear()
        for _, process in self._running.values():
            process.terminate()
        for handle in list(self._running):
            self.cancel(handle)

    def _fill(self) -> None:
        while len(self._running) < self.jobs and (job := self._next()) is not None:
            self._queue.remove(job)
            process = self._context.Process(target=_work, args=(job,), name=job.cell.signature)
            process.start()
            self._running[job.cell.signature] = (job, process)

    def _next(self) -> Job | None:
        """The first that may start now. Cells that must be alone come last, each when nothing else runs."""
        if any(job.alone for job, _ in self._running.values()):
            return None
        shared = next((job for job in self._queue if not job.alone), None)
        if shared is None and self._queue and not self._running:
            return self._queue[0]
        return shared


def _outcome(job: Job, exitcode: int) -> Literal["done", "failed", "busy"]:
    if exitcode == EXIT_BUSY:
        return "busy"
    folder = job.runs / job.cell.signature
    if exitcode != 0 and not (folder / "failed.json").exists() and not (folder / "done.json").exists():
        _record_death(job, folder, exitcode)
    return "done" if exitcode == 0 else "failed"


def _record_death(job: Job, folder: Path, exitcode: int) -> None:
    """A process that died without a word: killed from outside, or by the kernel for want of memory."""
    name = signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"
    hint = " (out of memory?)" if exitcode == -signal.SIGKILL else ""
    try:
        with cell_lock(folder, wait_s=1):
            if not (folder / "manifest.json").exists():
                cell = job.cell
                identity = {**vars(cell.key), "signature": cell.signature, "command": cell.command}
                write_json(folder / "manifest.json", identity)
            error = f"the process ended with {name}{hint}; the same command goes on from its last epoch"
            write_json(folder / "failed.json", {"error": error, "traceback": ""})
    except CellBusy:
        pass


def _work(job: Job) -> None:
    """Body of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends its workers with SIGTERM
    signal.signal(signal.SIGTERM, interrupt)
    threading.Thread(target=die_with_parent, daemon=True).start()
    from experiments.run import run_cell
    from experiments.tracking import Store

    os.environ.update(SINGLE_THREADED)
    if job.cell.config["trainer"]["accelerator"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # else each optimiser step looks for a driver again, as long as a small net takes
        )
    log = job.runs / job.cell.signature / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        run_cell(job.cell, job.runs, Store(job.runs) if job.tracked else None, job.parent)
    except CellBusy:
        sys.exit(EXIT_BUSY)


def interrupt(*_: object) -> None:
    """Answer SIGTERM as Ctrl-C is answered."""
    raise KeyboardInterrupt("asked to stop")
