"""Several processes for one cell: when one fails the others are stopped, and what it said is kept."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from experiments import run
from experiments.cell import Cell, resolve
from experiments.ranks import RankFailed, run_ranks
from experiments.records import CellKey
from experiments.store import read_json


def _cell() -> Cell:
    cell = resolve(CellKey("moe_upcycling", "scratch_10", "python_stdlib", 0, "smoke"))
    cell.config["tracking"]["enabled"] = False
    cell.config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    return cell


def second_fails(cell: Cell, folder: Path, store: Any, parent: Any) -> None:
    (folder / f"pid{os.environ['LOCAL_RANK']}").write_text(str(os.getpid()))
    if os.environ["LOCAL_RANK"] == "1":
        while not (folder / "pid0").exists():
            time.sleep(0.01)
        raise FloatingPointError("the loss became nan")
    time.sleep(600)


def second_dies(cell: Cell, folder: Path, store: Any, parent: Any) -> None:
    if os.environ["LOCAL_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def who(cell: Cell, folder: Path, store: Any, parent: Any) -> None:
    names = ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    (folder / f"rank{os.environ['LOCAL_RANK']}").write_text(" ".join([*(os.environ[n] for n in names), str(store)]))


def _gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.slow
def test_each_process_knows_its_place_and_only_the_first_has_the_tracker(tmp_path: Path) -> None:
    run_ranks(who, _cell(), tmp_path, "the store", None, 2)
    first, second = ((tmp_path / f"rank{rank}").read_text().split(maxsplit=5) for rank in (0, 1))
    assert first[:3] == ["0", "2", "127.0.0.1"]
    assert second[:3] == ["1", "2", "127.0.0.1"]
    assert first[3] == second[3]  # the port
    assert (first[4:], second[4:]) == (["1", "the store"], ["1", "None"])


@pytest.mark.slow
def test_one_that_fails_stops_the_others_and_is_named(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="process 2 of 2: FloatingPointError: the loss became nan") as error:
        run_ranks(second_fails, _cell(), tmp_path, None, None, 2)
    assert "in second_fails" in "".join(error.value.__notes__)  # its own traceback
    assert _gone(int((tmp_path / "pid0").read_text()))
    assert not list(tmp_path.glob(".rank*"))


@pytest.mark.slow
def test_one_that_is_killed_is_named_with_its_signal(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="process 2 of 2 ended with SIGKILL"):
        run_ranks(second_dies, _cell(), tmp_path, None, None, 2)


@pytest.mark.slow
def test_a_cell_keeps_what_its_process_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_execute", second_fails)
    with pytest.raises(RankFailed):
        run.run_cell(cell := _cell(), tmp_path)
    failed = read_json(tmp_path / cell.signature / "failed.json")
    assert failed["error"] == "RankFailed: process 2 of 2: FloatingPointError: the loss became nan"
    assert "in second_fails" in failed["traceback"]
