"""The LightningModule trains, selects and tests as it says: every ablation takes two batches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hydra.utils import instantiate
from lightning import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.cell import ablations, resolve
from experiments.records import CellKey
from lit_modules.ops.noise import NOISE_SUITE, add_noise, noise_generator
from lit_modules.schedules import step_decay
from lit_modules.tropical_cnn import TropicalClassifier, condition_name


class Toy(LightningDataModule):
    """Two batches of random images for each split."""

    def __init__(self, channels: int = 1, side: int = 28) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(16, channels, side, side, generator=generator)
        self.set = TensorDataset(x, torch.arange(16) % 10)

    def train_dataloader(self):
        return DataLoader(self.set, batch_size=8)

    def val_dataloader(self):
        return [self.train_dataloader(), self.train_dataloader()]

    def test_dataloader(self):
        return self.train_dataloader()


def _trainer(tmp_path, epochs: int = 1) -> Trainer:
    return Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path,
    )  # fmt: skip


@pytest.mark.parametrize("ablation", ablations("tropical_cnn"))
def test_every_ablation_trains_two_batches(ablation: str, tmp_path) -> None:
    data = "cifar10" if ablation.startswith("resnet") else "mnist"
    config = resolve(CellKey("tropical_cnn", ablation, data, 0, "smoke")).config
    torch.manual_seed(0)
    net = instantiate(config["net"])
    before = {name: p.clone() for name, p in net.named_parameters()}
    module = TropicalClassifier(net, partial(torch.optim.Adam, lr=1e-3), steps_per_epoch=2, noise=False)
    channels, side = config["data"]["channels"], config["data"]["image_size"]
    trainer = _trainer(tmp_path)
    trainer.fit(module, datamodule=Toy(channels, side))
    assert {"val/acc", "published/test_acc", "train/acc"} <= trainer.callback_metrics.keys()
    moved = [name for name, p in net.named_parameters() if not torch.equal(before[name], p)]
    assert len(moved) >= len(before) - 1


class _Constant(nn.Module):
    """Always answers class 3, whatever it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.zeros(10))

    def forward(self, x):
        return (self.score + 5 * torch.nn.functional.one_hot(torch.tensor(3), 10)).expand(len(x), 10)


def test_accuracies_are_percent_of_the_images(tmp_path) -> None:
    module = TropicalClassifier(_Constant(), partial(torch.optim.SGD, lr=0.0), steps_per_epoch=2)
    (tested,) = _trainer(tmp_path).test(module, datamodule=Toy(), verbose=False)
    assert tested["test/acc"] == pytest.approx(100 * 2 / 16)
    names = {f"noise/{condition_name(k, v)}/acc" for k, v in NOISE_SUITE}
    assert names <= tested.keys()
    assert all(tested[name] == pytest.approx(12.5) for name in names)


class _Recorder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(10))
        self.seen: list[torch.Tensor] = []

    def forward(self, x):
        self.seen.append(x.clone())
        return self.bias.expand(len(x), 10)


def test_the_noise_is_the_keyed_one(tmp_path) -> None:
    net = _Recorder()
    module = TropicalClassifier(net, partial(torch.optim.SGD, lr=0.0), steps_per_epoch=2, noise_seed=7)
    data = Toy()
    _trainer(tmp_path).test(module, datamodule=data, verbose=False)
    per_batch = 1 + len(NOISE_SUITE)
    assert len(net.seen) == 2 * per_batch
    for batch in (0, 1):
        clean = data.set.tensors[0][8 * batch : 8 * batch + 8]
        assert torch.equal(net.seen[batch * per_batch], clean)
        for i, (kind, level) in enumerate(NOISE_SUITE):
            expected = add_noise(clean, kind, level, noise_generator(7, kind, level, batch))
            assert torch.equal(net.seen[batch * per_batch + 1 + i], expected)


def test_the_schedule_runs_by_epochs_counted_in_steps(tmp_path) -> None:
    module = TropicalClassifier(
        _Constant(), partial(torch.optim.Adam, lr=0.02), steps_per_epoch=2, schedule=step_decay(0.5, 2)
    )
    trainer = _trainer(tmp_path, epochs=3)
    trainer.fit(module, datamodule=Toy())
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(0.02 * 0.5**2)  # the step after epoch 2 belongs to epoch 3: floor(4 / 2) halvings


def test_a_diverging_loss_stops_the_run(tmp_path) -> None:
    module = TropicalClassifier(_Constant(), partial(torch.optim.SGD, lr=0.1), steps_per_epoch=2)
    module.net.score.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="nan in epoch 0"):
        _trainer(tmp_path).fit(module, datamodule=Toy())


def test_the_published_number_is_the_best_watched_epoch_and_survives_a_checkpoint() -> None:
    module = TropicalClassifier(_Constant(), partial(torch.optim.SGD, lr=0.0), steps_per_epoch=2)
    module.published_best = 42.0
    checkpoint: dict = {}
    module.on_save_checkpoint(checkpoint)
    other = TropicalClassifier(_Constant(), partial(torch.optim.SGD, lr=0.0), steps_per_epoch=2)
    other.on_load_checkpoint(checkpoint)
    assert other.published_best == 42.0
