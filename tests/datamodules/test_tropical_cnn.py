"""Splits are fixed, orders are keyed by (seed, epoch), and batches are what a net expects."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer

from datamodules import tropical_cnn
from datamodules.images import EpochShuffle, Images, InOrder, loader, split_indices
from datamodules.sources import DataCard, ImageArrays
from datamodules.tropical_cnn import ImageClassificationData

RNG = np.random.default_rng(0)
CARD = DataCard("Toy", 90, "0" * 64, "none", False, "made up")


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch):
    arrays = ImageArrays(
        RNG.integers(0, 256, (60, 6, 6, 3), dtype=np.uint8),
        np.arange(60, dtype=np.uint8) % 10,
        RNG.integers(0, 256, (30, 6, 6, 3), dtype=np.uint8),
        np.arange(30, dtype=np.uint8) % 10,
        CARD,
    )
    monkeypatch.setattr(tropical_cnn, "load_images", lambda *_: arrays)

    def make(**options) -> ImageClassificationData:
        made = ImageClassificationData("mnist", **{"batch_size": 8, "seed": 0, "val_samples": 20, **options})
        made.setup("fit")
        return made

    return make


def test_the_split_is_fixed_disjoint_and_nested() -> None:
    train, val = split_indices(1000, 200)
    assert sorted([*train, *val]) == list(range(1000))
    small, same = split_indices(1000, 200, train_samples=50)
    assert np.array_equal(val, same)
    assert np.array_equal(small, train[:50])


@pytest.mark.parametrize(("n", "val", "train"), [(10, 10, None), (10, 0, None), (10, 3, 8), (10, 3, 0)])
def test_impossible_splits_are_refused(n: int, val: int, train: int | None) -> None:
    with pytest.raises(ValueError, match="must lie between"):
        split_indices(n, val, train)


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochShuffle(100, 32, seed)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert [len(b) for b in batches] == [32, 32, 32, 4]
        return [index for batch in batches for index in batch]

    assert sorted(order(0, 0)) == list(range(100))
    assert order(0, 3) == order(0, 3)
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_evaluation_is_in_order() -> None:
    assert list(InOrder(7, 3)) == [[0, 1, 2], [3, 4, 5], [6]]


def test_batches_are_floats_in_the_unit_interval(data) -> None:
    made = data()
    x, y = next(iter(made.train_dataloader()))
    assert x.shape == (8, 3, 6, 6)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert 0 <= x.min() <= x.max() <= 1
    assert (made.input_shape, made.num_classes, made.train_size) == ((3, 6, 6), 10, 40)
    assert torch.equal(made.test_set[[0]][0] * 255, made.test_set.images_NCHW[[0]].float())


def test_validation_is_the_same_for_every_seed_and_comes_with_the_watched_test_set(data) -> None:
    a, b = data(seed=0), data(seed=1)
    assert torch.equal(a.val_set.images_NCHW, b.val_set.images_NCHW)
    val, watched = a.val_dataloader()
    assert sum(len(y) for _, y in val) == 20
    assert sum(len(y) for _, y in watched) == 30
    assert len(data(test_samples=7).test_set) == 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"eval_batch_size": -1}, "eval_batch_size"),
        ({"test_samples": 0}, "test_samples"),
        ({"name": "mnits"}, "did you mean 'mnist'"),
    ],
)
def test_bad_arguments_are_named(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ImageClassificationData(**{"name": "mnist", "batch_size": 8, "seed": 0, **options})


class _Listener(LightningModule):
    """Keeps the labels it is given, epoch by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: dict[int, list[int]] = {}

    def training_step(self, batch, _):
        self.seen.setdefault(self.current_epoch, []).extend(batch[1].tolist())
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_sets_the_epoch_also_after_a_restart(data, tmp_path) -> None:
    def run(epochs: int, checkpoint=None):
        listener = _Listener()
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path, limit_val_batches=0, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(listener, datamodule=data(seed=3), ckpt_path=checkpoint, weights_only=False)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return listener.seen

    whole, first = run(3), run(1)
    rest = run(3, tmp_path / "1.ckpt")
    assert first[0] == whole[0]
    assert (rest[1], rest[2]) == (whole[1], whole[2])
    assert whole[1] != whole[2]


def test_images_hand_out_a_whole_batch() -> None:
    images = Images(RNG.integers(0, 256, (4, 2, 2, 1), dtype=np.uint8), np.array([3, 1, 2, 0], dtype=np.uint8))
    x, y = images[[2, 0]]
    assert x.shape == (2, 1, 2, 2)
    assert y.tolist() == [2, 3]


def _orders_seen(epochs: int, workers: int, resume: Path | None, folder: Path) -> list[list[int]]:
    class Watch(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.seen = torch.nn.Linear(1, 1), []

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
            self.seen.append(batch[1].tolist())
            return self.layer(batch[0].flatten(1)[:, :1]).sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.0)

    images = Images(np.zeros((8, 2, 2, 1), np.uint8), np.arange(8))
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False,
                      enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder)  # fmt: skip
    module = Watch()
    trainer.fit(module, loader(images, EpochShuffle(8, 4, seed=0), workers), ckpt_path=resume, weights_only=False)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return module.seen


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_sees_the_order_of_its_own_epoch_with_and_without_workers(workers: int, tmp_path: Path) -> None:
    whole = _orders_seen(3, 0, None, tmp_path)
    _orders_seen(2, workers, None, tmp_path)
    assert _orders_seen(3, workers, tmp_path / "2.ckpt", tmp_path) == whole[4:]
    assert whole[:2] != whole[4:]
