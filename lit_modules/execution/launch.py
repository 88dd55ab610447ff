"""Several processes of one machine as ranks of a process group, started by torch's own launcher; what they return comes back.

Gloo on CPU, one thread a process; NCCL where each rank has a GPU of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessContext, ProcessException

from lit_modules.processes import die_with_parent

PRELOAD = ["lit_modules.execution.measure", "lit_modules.execution.verify"]


class RanksFailed(RuntimeError):
    """One of the processes failed, or they did not end in time; the message is what the first one said."""


def launch(body: Callable[..., Any], ranks: int, *args: Any, timeout_s: float = 600.0) -> list[Any]:
    """Run `body(*args)` in `ranks` processes that form a process group; return what each returned, by rank.

    Args:
        body: a function of a module, so that other processes find it; what it returns is saved by torch.
        timeout_s: how long all of them may take, and how long a collective may wait.
    Raises:
        RanksFailed: one failed (its traceback is in the message) or time was up; the others have been stopped.
        ValueError: no rank at all.
    """
    if ranks < 1:
        raise ValueError(f"a plan runs on 1 or more ranks, got {ranks}")
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        PRELOAD
    )  # without effect where a server runs already
    with tempfile.TemporaryDirectory(prefix="fivefold-ranks-") as folder:
        meeting = (folder, ranks, timeout_s)
        context = mp.start_processes(
            _rank, (body, args, meeting), nprocs=ranks, join=False, daemon=False, start_method="forkserver"
        )
        assert context is not None
        _wait(context, timeout_s, getattr(body, "__name__", "a rank"))
        return [torch.load(_answer(folder, rank), weights_only=False) for rank in range(ranks)]


def backend(ranks: int) -> str:
    """NCCL if there is a GPU for each rank, else gloo."""
    return "nccl" if torch.cuda.is_available() and torch.cuda.device_count() >= ranks else "gloo"


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", dist.get_rank()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _wait(context: ProcessContext, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    try:
        while not context.join(timeout=1.0):
            if time.monotonic() > deadline:
                raise RanksFailed(f"{what} did not end within {timeout_s:g} s and was stopped")
    except ProcessException as error:
        raise RanksFailed(str(error)) from None
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
            process.join()


def _rank(rank: int, body: Callable[..., Any], args: tuple[Any, ...], meeting: tuple[str, int, float]) -> None:
    folder, ranks, timeout_s = meeting
    threading.Thread(target=die_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's name need not lead to an address
    kind = backend(ranks)
    if kind == "nccl":
        torch.cuda.set_device(rank)
    store = dist.FileStore(str(Path(folder) / "meeting"), ranks)  # no port that someone else may take
    dist.init_process_group(kind, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=timeout_s))
    try:
        torch.save(body(*args), _answer(folder, rank))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _answer(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.pt"
