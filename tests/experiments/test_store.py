"""Run folders: whole files or none, one holder at a time, states read off what lies there."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.records import CellKey
from experiments.store import CellBusy, Index, cell_lock, is_held, read_run, write_atomically, write_json

KEY = CellKey("tropical_cnn", "net1", "mnist", 0, "small")


def _run(runs: Path, signature: str, **files: dict) -> Path:
    folder = runs / signature
    write_json(folder / "manifest.json", {**vars(KEY), "signature": signature})
    for name, content in files.items():
        write_json(folder / f"{name}.json", content)
    return folder


def test_a_failed_write_leaves_the_old_file_whole_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "done.json"
    write_json(file, {"a": 1})

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, "half")
    assert json.loads(file.read_text()) == {"a": 1}
    assert [f.name for f in tmp_path.iterdir()] == ["done.json"]


def test_nan_is_refused_because_a_missing_value_is_left_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "metrics.json", {"acc": float("nan")})
    assert not list(tmp_path.iterdir())


def test_states_are_read_off_the_files(tmp_path: Path) -> None:
    assert read_run(_run(tmp_path, "a")).state == "not run"
    assert read_run(_run(tmp_path, "b", failed={"error": "E: x"})).error == "E: x"
    done = read_run(_run(tmp_path, "c", done={"seconds": 1}, metrics={"test/acc": 90.0}, failed={"error": "old"}))
    assert (done.state, done.metrics) == ("done", {"test/acc": 90.0})


def test_metrics_of_an_unfinished_run_are_not_read(tmp_path: Path) -> None:
    assert read_run(_run(tmp_path, "a", metrics={"test/acc": 90.0})).metrics == {}


def test_index_calls_a_cell_stale_only_if_other_code_has_finished_it(tmp_path: Path) -> None:
    _run(tmp_path, "old", done={"seconds": 2.0}, metrics={"test/acc": 1.0})
    index = Index.scan(tmp_path)
    stale = index.record(KEY, "new")
    assert (stale.state, stale.signature, stale.metrics) == ("stale", "old", {})
    assert index.record(KEY, "old").state == "done"
    _run(tmp_path, "new", failed={"error": "E"})
    assert Index.scan(tmp_path).record(KEY, "new").state == "failed"
    assert index.seconds([KEY]) == [2.0]


def test_ablations_that_come_to_the_same_experiment_share_its_run_under_their_own_names(tmp_path: Path) -> None:
    _run(tmp_path, "same", done={"seconds": 2.0}, metrics={"test/acc": 1.0})
    other = replace(KEY, ablation="net1_by_another_name")
    found = Index.scan(tmp_path).record(other, "same")
    assert (found.key, found.state, found.metrics) == (other, "done", {"test/acc": 1.0})


def _hold(folder: Path) -> None:
    with cell_lock(folder):
        (folder / "held").touch()
        time.sleep(60)


def test_a_lock_dies_with_its_process_even_when_killed(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_hold, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "held").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert is_held(tmp_path)
    with pytest.raises(CellBusy), cell_lock(tmp_path, wait_s=0):
        pass
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert not is_held(tmp_path)
    with cell_lock(tmp_path, wait_s=0):
        assert is_held(tmp_path)
