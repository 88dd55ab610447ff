"""Kill a run at any moment: the same command goes on, and ends with the weights of an uninterrupted run."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from experiments.cell import Cell, resolve
from experiments.executors import PRELOAD, Job, LocalPool
from experiments.records import CellKey


def _cell(ablation: str, epochs: int = 4) -> Cell:
    config = dict(resolve(CellKey("tropical_cnn", ablation, "mnist", 0, "smoke")).config)
    config["budget"] = {**config["budget"], "max_epochs": epochs, "train_samples": 3200}
    config["datamodule"] = {**config["datamodule"], "train_samples": 3200}
    config["tracking"] = {**config["tracking"], "enabled": False}
    return Cell(CellKey("tropical_cnn", ablation, "mnist", 0, "smoke"), config)


def _nothing() -> None:
    """Only starts the server, which takes seconds to import its libraries, so that later times are a run's own."""


def _body(cell: Cell, runs: Path) -> None:
    from experiments.run import run_cell

    run_cell(cell, runs)


@pytest.fixture(scope="module")
def forkserver():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_nothing)
    process.start()
    process.join()
    return context


@pytest.fixture(scope="module", autouse=True)
def _needs_mnist() -> None:
    from datamodules.sources import DataUnavailable, load_images

    try:
        load_images("mnist")
    except DataUnavailable as error:
        pytest.skip(f"MNIST cannot be had here: {error}")


def _written(file: Path) -> int:
    """When a file was last written, in nanoseconds; 0 where there is none."""
    return file.stat().st_mtime_ns if file.exists() else 0


def _done(runs: Path, cell: Cell) -> dict:
    return json.loads((runs / cell.signature / "done.json").read_text())


@pytest.mark.parametrize("ablation", ["net1", "net0_relu"])
def test_killed_at_random_points_it_ends_with_the_same_weights(ablation: str, forkserver, tmp_path: Path) -> None:
    cell = _cell(ablation)
    whole = forkserver.Process(target=_body, args=(cell, tmp_path / "whole"))
    started = time.monotonic()
    whole.start()
    whole.join()
    length = time.monotonic() - started
    assert whole.exitcode == 0
    moments = random.Random(f"{ablation} moments")
    checkpoint = tmp_path / "cut" / cell.signature / "last.ckpt"
    kills = resumed = 0
    for attempt in range(30):
        before = _written(checkpoint)
        process = forkserver.Process(target=_body, args=(cell, tmp_path / "cut"))
        process.start()
        resumed += before > 0
        if attempt == 0:
            process.join(timeout=moments.uniform(0.05, 0.5) * length)
        elif kills < 5:  # somewhere in the epoch that follows the next checkpoint
            while process.is_alive() and _written(checkpoint) == before:
                time.sleep(0.002)
            process.join(timeout=moments.uniform(0.0, 0.15) * length)
        else:
            process.join()
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
            continue
        assert process.exitcode == 0
        break
    assert kills >= 2, "too few kills came before the end: the test would say nothing"
    assert resumed >= 1, "no run went on from a checkpoint: the test would say nothing"
    assert _done(tmp_path / "cut", cell)["weights_sha256"] == _done(tmp_path / "whole", cell)["weights_sha256"]
    metrics = [json.loads((tmp_path / side / cell.signature / "metrics.json").read_text()) for side in ("whole", "cut")]
    for side in metrics:
        side.pop("train/seconds")
    assert metrics[0] == metrics[1]


def test_the_last_epochs_training_accuracy_is_recorded_although_the_module_logs_it_at_the_very_end(
    tmp_path: Path,
) -> None:
    from experiments.run import run_cell

    cell = _cell("net0", epochs=1)
    run_cell(cell, tmp_path)
    recorded = json.loads((tmp_path / cell.signature / "metrics.json").read_text())
    assert 50 < recorded["train/acc"] <= 100


def test_what_is_recorded_of_training_is_the_last_epochs_although_an_earlier_one_is_tested(tmp_path: Path) -> None:
    from experiments.run import run_cell

    cell = _cell("net0", epochs=3)
    cell.config["selection"] = {"monitor": "val/acc", "mode": "min"}  # the first epoch is the worst, so it is chosen
    started = time.monotonic()
    record = run_cell(cell, tmp_path)
    took = time.monotonic() - started
    folder = tmp_path / cell.signature
    first, last = (torch.load(folder / f"{name}.ckpt", weights_only=False) for name in ("best", "last"))
    assert first["epoch"] < last["epoch"] == 2
    states = [next(s for name, s in c["callbacks"].items() if name.startswith("History")) for c in (first, last)]
    assert states[0]["metrics"]["train/acc"] != states[1]["metrics"]["train/acc"]
    assert record.metrics["train/acc"] == states[1]["metrics"]["train/acc"]
    assert record.metrics["published/test_acc"] == states[1]["metrics"]["published/test_acc"]
    assert 0.5 * took < record.metrics["train/seconds"] <= took


def test_a_cell_of_no_epochs_tests_the_net_as_it_was_built(tmp_path: Path) -> None:
    from experiments.run import build_net, run_cell, weights_sha256

    cell = _cell("net0", epochs=0)
    record = run_cell(cell, tmp_path)
    built = {f"net.{name}": value for name, value in build_net(cell.config).state_dict().items()}
    assert _done(tmp_path, cell)["weights_sha256"] == weights_sha256(built)
    assert record.metrics["train/samples"] == 0
    assert "test/acc" in record.metrics
    assert "val/acc" not in record.metrics


def test_killed_after_its_last_epoch_a_run_still_has_its_metrics(forkserver, tmp_path: Path) -> None:
    cell = _cell("net0", epochs=2)
    for _ in range(2):
        process = forkserver.Process(target=_body, args=(cell, tmp_path))
        process.start()
        process.join()
        folder = tmp_path / cell.signature
        metrics = json.loads((folder / "metrics.json").read_text())
        (folder / "done.json").unlink()
        (folder / "metrics.json").unlink()
        metrics.pop("train/seconds")
        if _ == 0:
            first = metrics
    assert metrics == first
    assert {"val/acc", "test/acc", "published/test_acc", "cost/multiplications"} <= metrics.keys()


def test_a_crash_is_kept_and_the_other_cells_go_on(tmp_path: Path) -> None:
    good, bad = _cell("net0", epochs=1), _cell("net1", epochs=1)
    bad.config["optim"] = {"optimizer": {"_target_": "torch.optim.Adam", "lr": 1e30}, "schedule": None}
    pool = LocalPool(jobs=2)
    outcomes = {}
    for cell in (bad, good):
        pool.submit(Job(cell, tmp_path, tracked=False))
    while len(outcomes) < 2:
        outcomes |= {f.handle: f.outcome for f in pool.poll(timeout_s=1)}
    assert outcomes == {good.signature: "done", bad.signature: "failed"}
    failed = json.loads((tmp_path / bad.signature / "failed.json").read_text())
    assert "FloatingPointError" in failed["error"]
    assert "training_step" in failed["traceback"]
    assert not (tmp_path / bad.signature / "metrics.json").exists()


def test_a_killed_worker_is_failed_with_its_signal_named(tmp_path: Path) -> None:
    cell = _cell("net1", epochs=200)
    pool = LocalPool(jobs=1)
    pool.submit(Job(cell, tmp_path, tracked=False))
    (_, process), *_ = pool._running.values()
    _wait_for(tmp_path / cell.signature / "last.ckpt")
    os.kill(process.pid or 0, signal.SIGKILL)
    finished = []
    while not finished:
        finished = pool.poll(timeout_s=1)
    assert [f.outcome for f in finished] == ["failed"]
    assert "SIGKILL" in json.loads((tmp_path / cell.signature / "failed.json").read_text())["error"]


def test_cancel_stops_a_running_cell_and_keeps_what_it_had(tmp_path: Path) -> None:
    cell = _cell("net1", epochs=200)
    pool = LocalPool(jobs=1)
    handle = pool.submit(Job(cell, tmp_path, tracked=False))
    _wait_for(tmp_path / cell.signature / "last.ckpt")
    pool.cancel(handle)
    assert pool.poll(timeout_s=0.1) == []
    assert (tmp_path / cell.signature / "last.ckpt").exists()
    assert not (tmp_path / cell.signature / "done.json").exists()
    assert not (tmp_path / cell.signature / "failed.json").exists()


def _wait_for(path: Path, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.05)
