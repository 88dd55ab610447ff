"""A process without a parent of ours lives on; one whose parent is gone ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

from lit_modules.processes import die_with_parent


def test_the_first_process_is_nobodys_child() -> None:
    die_with_parent()  # returns


def _child(pids: multiprocessing.Queue) -> None:
    pids.put(os.getpid())
    threading.Thread(target=die_with_parent, daemon=True).start()
    time.sleep(60)


def _parent(pids: multiprocessing.Queue) -> None:
    multiprocessing.get_context("spawn").Process(target=_child, args=(pids,), daemon=False).start()
    time.sleep(60)


def test_a_child_ends_with_the_process_that_started_it() -> None:
    context = multiprocessing.get_context("spawn")
    pids = context.Queue()
    parent = context.Process(target=_parent, args=(pids,))
    parent.start()
    child = pids.get(timeout=60)
    assert parent.pid is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.join()
    deadline = time.monotonic() + 20
    while _lives(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _lives(child)


def _lives(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
