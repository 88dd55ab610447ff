"""A run that stops on one layout of devices goes on on another, and ends as one that never stopped (T16 of the dossier).

Real processes on one machine, over gloo; each layout takes batches in halves.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.token_order import TrainOrder
from experiments import run
from experiments.cell import Cell, resolve
from experiments.ranks import RankFailed, run_ranks
from experiments.records import CellKey
from experiments.store import read_json
from experiments.strategies import compile_blocks, processes, trainer_arguments

LAYOUTS = {"alone": ("auto", 1), "ddp": ("ddp", 2), "fsdp": ("fsdp", 2)}
EPOCHS = 4
TOLERANCE = 2e-5  # float32 sums in another order, after sixteen updates; relative


def _cell(layout: str = "alone", ablation: str = "scratch_10", **budget: Any) -> Cell:
    """A MoE from random weights, small even beside the smoke profile's: 4 epochs of 4 batches of 8 short sequences."""
    cell = resolve(CellKey("moe_upcycling", ablation, "python_stdlib", 0, "smoke"))
    config = cell.config
    sizes = {"max_epochs": EPOCHS, "batch_size": 8, "micro_batch": 4, "train_samples": 32, "val_samples": 8}
    config["budget"] |= sizes | {"test_samples": 12} | budget
    config["datamodule"] |= {n: config["budget"][n] for n in config["datamodule"] if n in config["budget"]}
    config["datamodule"]["context"] = config["data"]["context"] = 32
    config["module"]["epochs"] = config["budget"]["max_epochs"]
    config["net"] |= {"layers": 2, "width": 32, "hidden": 64}
    config["tracking"]["enabled"] = False
    strategy, devices = LAYOUTS[layout]
    config["trainer"] |= {"strategy": strategy, "devices": devices, "micro_batch": config["budget"]["micro_batch"]}
    return Cell(cell.key, config)


class Stopped(Exception):
    """What the tests raise in the place of a kill."""


def body(cell: Cell, folder: Path, store: Any, parent: Any, *, stop: int | None = None) -> None:
    """What each process does: the run, up to the first batch of epoch `stop`."""
    seeded = run.EpochRandomness.on_train_epoch_start

    def begin(self: Any, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == stop:
            raise Stopped
        seeded(self, trainer, module)

    run.EpochRandomness.on_train_epoch_start = begin  # type: ignore[method-assign]
    try:
        run._execute(cell, folder, store, parent)
    finally:
        run.EpochRandomness.on_train_epoch_start = seeded  # type: ignore[method-assign]


def _train(runs: Path, *legs: tuple[str, int | None]) -> Path:
    """Run a cell on one layout after the other, each up to an epoch; return its folder."""
    for layout, stop in legs:
        cell = _cell(layout)
        folder = runs / cell.signature
        folder.mkdir(parents=True, exist_ok=True)
        work, count = partial(body, stop=stop), processes(cell.config["trainer"])
        if stop is None:
            _on(work, cell, folder, count)
        else:
            with pytest.raises((Stopped, RankFailed)) as error:
                _on(work, cell, folder, count)
            assert isinstance(error.value, Stopped) or "Stopped" in str(error.value)
            assert torch.load(folder / "last.ckpt", weights_only=False)["epoch"] == stop - 1
    return folder


def _on(work: Callable[..., None], cell: Cell, folder: Path, count: int) -> None:
    if count == 1:
        work(cell, folder, None, None)
    else:
        run_ranks(work, cell, folder, None, None, count)


def _last(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.ckpt", weights_only=False)


def _apart(one: Path, other: Path) -> float:
    """The distance of the final weights, relative to their norm."""
    a, b = (_last(folder)["state_dict"] for folder in (one, other))
    assert a.keys() == b.keys()
    squares = [((a[n] - b[n]).double().square().sum(), a[n].double().square().sum()) for n in a]
    return float((sum(s for s, _ in squares) / sum(s for _, s in squares)) ** 0.5)


def _assert_same_run(one: Path, other: Path) -> None:
    """Final weights, optimiser states, and everything that was measured on the way and after it."""
    assert _apart(one, other) < TOLERANCE
    states = [_last(folder)["optimizer_states"][0] for folder in (one, other)]
    assert [group["params"] for group in states[0]["param_groups"]] == [g["params"] for g in states[1]["param_groups"]]
    for index, mine in states[0]["state"].items():
        for name, value in mine.items():
            theirs = states[1]["state"][index][name]
            assert (value - theirs).norm() <= 1e-4 * value.norm() + 1e-12, (index, name)
    metrics = [read_json(folder / "metrics.json") for folder in (one, other)]
    assert metrics[0].keys() == metrics[1].keys()
    assert {"test/loss", "val_at/050", "train/tokens", "moe/balance", "purity/00001"} <= metrics[0].keys()
    for name in metrics[0].keys() - {"train/seconds"}:
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-4, abs=1e-6), name
    loads = [read_json(folder / "expert_load.json") for folder in (one, other)]
    assert loads[0] == loads[1]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that never stopped, in one process."""
    return _train(tmp_path_factory.mktemp("alone"), ("alone", None))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_processes_do_what_one_does(layout: str, alone: Path, tmp_path: Path) -> None:
    _assert_same_run(alone, _train(tmp_path, (layout, None)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "legs",
    [
        (("ddp", 1), ("fsdp", 2), ("alone", 3), ("ddp", None)),  # 2 -> 2 otherwise -> 1 -> 2
        (("fsdp", 1), ("alone", 2), ("fsdp", None)),  # 2 -> 1 -> 2
        (("alone", 2), ("fsdp", None)),
    ],
    ids=lambda legs: "-".join(layout for layout, _ in legs),
)
def test_stopped_on_one_layout_it_goes_on_on_another(legs: Any, alone: Path, tmp_path: Path) -> None:
    _assert_same_run(alone, _train(tmp_path, *legs))


def test_stopped_and_gone_on_in_one_process_nothing_differs_at_all(alone: Path, tmp_path: Path) -> None:
    folder = _train(tmp_path, ("alone", 2), ("alone", None))
    assert read_json(folder / "done.json")["weights_sha256"] == read_json(alone / "done.json")["weights_sha256"]


@pytest.mark.parametrize("fault", ["moments", "exchanged", "skipped", "schedule"])
def test_a_resume_that_loses_something_is_noticed(
    fault: str, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what the tests above would say of a resume that forgets, mixes up or skips."""
    folder = _train(tmp_path, ("alone", 2))
    file = folder / "last.ckpt"
    checkpoint = _last(folder)
    states = checkpoint["optimizer_states"][0]["state"]
    if fault == "moments":
        for state in states.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
    elif fault == "exchanged":  # two matrices of one shape, as when parameters are numbered in another order
        same = [i for i, state in states.items() if state["exp_avg"].shape == states[1]["exp_avg"].shape]
        states[same[0]], states[same[1]] = states[same[1]], states[same[0]]
    elif fault == "schedule":
        checkpoint["lr_schedulers"][0]["last_epoch"] = 0
    else:
        order = TrainOrder.batch
        monkeypatch.setattr(TrainOrder, "batch", lambda self, epoch, number: order(self, epoch + 1, number))
    torch.save(checkpoint, file)
    after = _train(tmp_path, ("alone", None))
    assert _apart(alone, after) > 20 * TOLERANCE


def test_parts_of_a_batch_add_up_to_it(tmp_path: Path) -> None:
    """Of a dense net: a balancing loss is about the sequences that go through together."""
    folders = []
    for micro in (None, 8, 3, 1):  # 3 does not divide 8: the last part is smaller, and weighs less
        cell = _cell("alone", "dense", max_epochs=1, micro_batch=micro)
        folders.append(tmp_path / str(micro))
        body(cell, folders[-1], None, None)
    for folder in folders[1:]:
        assert _apart(folders[0], folder) < TOLERANCE
    whole, *parts = (read_json(folder / "metrics.json") for folder in folders)
    for other in parts:
        assert other["train/tokens"] == whole["train/tokens"] == 32 * 32
        assert other["test/loss"] == pytest.approx(whole["test/loss"], rel=1e-6)


def test_parts_that_cannot_be_dealt_to_the_processes_are_refused() -> None:
    trainer = {"accelerator": "cpu", "devices": 2, "num_nodes": 1, "strategy": "fsdp", "micro_batch": 3}
    with pytest.raises(ValueError, match="micro-batch of 3 sequences cannot be dealt evenly to 2 processes"):
        trainer_arguments(trainer)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(tmp_path: Path) -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler on CPU, and there is none")
    from lit_modules.nets.moe import Experts
    from lit_modules.nets.transformer import Transformer
    from lit_modules.ops.routing import load_balancing_loss

    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = Transformer(64, 32, 2, 2, 64, experts=Experts(4, 2, 2))
        if compiled:
            compile_blocks(net)
        tokens = torch.arange(64).view(2, 32) * 7 % 64
        loss = net(tokens).logsumexp(-1).mean()
        (loss + sum(load_balancing_loss(layer.routed) for layer in net.moe_layers().values())).backward()
        found.append((list(net.state_dict()), loss.item(), {n: p.grad for n, p in net.named_parameters()}))
    (names, loss, gradients), (names_c, loss_c, gradients_c) = found
    assert names == names_c  # so that a checkpoint of one is one of the other
    assert loss_c == pytest.approx(loss, rel=1e-6)
    for name in gradients:
        torch.testing.assert_close(gradients_c[name], gradients[name], rtol=1e-4, atol=1e-6)
