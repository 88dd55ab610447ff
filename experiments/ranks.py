"""A cell on several devices: a process for each, started and watched by the one that holds the cell."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeAlias

from experiments.cell import Cell
from experiments.executors import SINGLE_THREADED, die_with_parent, interrupt
from experiments.store import read_json, write_json

Body: TypeAlias = Callable[[Cell, Path, Any, tuple[str, str] | None], None]


class RankFailed(RuntimeError):
    """One of a cell's processes failed, and the others were stopped."""


def leads() -> bool:
    """Whether this process writes down what a cell comes to: the only one it has, or the first of several."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0


def run_ranks(body: Body, cell: Cell, folder: Path, store: Any, parent: tuple[str, str] | None, count: int) -> None:
    """Run a cell in `count` processes and wait for them; when one fails, stop the others.

    Args:
        body: what each process does with cell, folder, store (None in all but the first) and parent.
    Raises:
        RankFailed: what the first that failed said.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.run", cell.config["module"]["_target_"].rpartition(".")[0]])
    port = _free_port()
    for file in folder.glob(".rank*.json"):
        file.unlink()
    ranks = [
        context.Process(target=_rank, args=(body, cell, folder, store, parent, rank, count, port), name=f"rank {rank}")
        for rank in range(count)
    ]
    died: dict[int, int] = {}  # by rank, with what: only those that ended before they were asked to
    try:
        for process in ranks:
            process.start()
        running = dict(enumerate(ranks))
        while running and not died:
            wait([process.sentinel for process in running.values()])
            codes = {rank: process.exitcode for rank, process in running.items()}
            running = {rank: process for rank, process in running.items() if codes[rank] is None}
            died = {rank: code for rank, code in codes.items() if code}
    finally:
        _stop(ranks)
    if died:
        raise _failure(folder, died, count)


def _stop(ranks: Sequence[BaseProcess]) -> None:
    """End what still runs: the first process is asked, so that it can close its tracker's run, the others are not."""
    started = [process for process in ranks if process.pid is not None]
    for rank, process in enumerate(started):
        process.terminate() if rank == 0 else process.kill()
    for process in started:
        process.join(timeout=5)
        if process.exitcode is None:
            process.kill()
            process.join()


def _failure(folder: Path, died: Mapping[int, int], count: int) -> RankFailed:
    """What the first process to fail has left, or how it died."""
    left = [(read_json(file), file) for file in folder.glob(".rank*.json")]
    for _, file in left:
        file.unlink()
    if left:
        first = min((said for said, _ in left), key=lambda said: said["time"])
        error = RankFailed(f"process {first['rank'] + 1} of {count}: {first['error']}")
        error.add_note(first["traceback"])
        return error
    rank, code = min(died.items())
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return RankFailed(f"process {rank + 1} of {count} ended with {name}{hint}")


def _rank(
    body: Body,
    cell: Cell,
    folder: Path,
    store: Any,
    parent: tuple[str, str] | None,
    rank: int,
    count: int,
    port: int,
) -> None:
    """Body of one of the processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, interrupt)
    threading.Thread(target=die_with_parent, daemon=True).start()
    place = {"LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update(SINGLE_THREADED | {name: str(value) for name, value in place.items()})
    if cell.config["trainer"]["accelerator"] == "cpu" and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name need not lead to an address
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")  # where it is left out, all processes log the same
    try:
        body(cell, folder, store if rank == 0 else None, parent)
    except Exception as error:
        said = {"rank": rank, "time": time.time(), "error": f"{type(error).__name__}: {error}"}
        write_json(folder / f".rank{rank}.json", said | {"traceback": "".join(traceback.format_exception(error))})
        sys.exit(1)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
