"""A cell on several devices: a process for each, started and watched by torch's own launcher."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from torch.multiprocessing import ProcessContext, ProcessExitedException, ProcessRaisedException, start_processes

from experiments.cell import Cell
from experiments.executors import SINGLE_THREADED, interrupt
from lit_modules.processes import die_with_parent

Body: TypeAlias = Callable[[Cell, Path, Any, tuple[str, str] | None], None]
GRACE_S = 2.0  # for a process that is asked to end; those that wait for the failed one inside a collective cannot hear


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
    # torch takes the context of the whole process, whose server then starts quickly
    preload = ["experiments.run", cell.config["module"]["_target_"].rpartition(".")[0]]
    multiprocessing.get_context("forkserver").set_forkserver_preload(preload)
    arguments = (body, cell, folder, store, parent, count, _free_port())
    context = start_processes(_rank, arguments, count, join=False, start_method="forkserver")
    assert context is not None
    try:
        while not context.join(grace_period=GRACE_S):
            pass
    except (ProcessExitedException, ProcessRaisedException) as error:
        raise _failure(error, count) from None
    finally:
        _stop(context)


def _stop(context: ProcessContext) -> None:
    """End what still runs when this process was interrupted: they are asked, so that the tracker's run is closed."""
    running = [process for process in context.processes if process.is_alive()]
    for process in running:
        process.terminate()
    for process in running:
        process.join(timeout=2 * GRACE_S)
        if process.is_alive():
            process.kill()
            process.join()


def _failure(error: ProcessExitedException | ProcessRaisedException, count: int) -> RankFailed:
    """The failure of a process in one line, its traceback as a note."""
    name = f"process {error.error_index + 1} of {count}"
    if isinstance(error, ProcessExitedException):
        how = error.signal_name or f"exit code {error.exit_code}"
        return RankFailed(f"{name} ended with {how}" + " (out of memory?)" * (how == "SIGKILL"))
    _, _, said = str(error).partition("terminated with the following error:\n")
    # the error itself, of as many lines as it has, is what follows the last frame's
    lines = said.rstrip().splitlines()
    frame = max((number for number, line in enumerate(lines) if line.startswith('  File "')), default=-1)
    lines = list(itertools.dropwhile(lambda line: line.startswith("  "), lines[frame + 1 :]))
    failed = RankFailed(f"{name}: " + "\n".join(lines))
    failed.add_note(said)
    return failed


def _rank(
    rank: int, body: Body, cell: Cell, folder: Path, store: Any, parent: tuple[str, str] | None, count: int, port: int
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
    body(cell, folder, store if rank == 0 else None, parent)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
