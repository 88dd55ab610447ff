"""The LightningModule of paper 4: what it learns, what it logs, and that a cut run goes on exactly."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from lightning import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from datamodules import tropical_cnn
from datamodules.min_max_plus import FunctionData, SampledImages
from datamodules.sources import DataCard, ImageArrays
from experiments.cell import ablations, resolve
from experiments.records import CellKey
from lit_modules.min_max_plus import WINDOW, LossCurve, MinMaxPlus
from lit_modules.nets.cone import ConeNet
from lit_modules.nets.mmp import ConvMMPNet, MMPNet
from lit_modules.normalisation import Normalisation, tropical_layers, winning_shares
from lit_modules.schedules import step_decay

ADAM = partial(torch.optim.Adam, lr=0.02)
STILL = partial(torch.optim.SGD, lr=0.0)


class _Recorded(MinMaxPlus):
    """Keeps every training loss."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.seen: list[float] = []

    def on_train_batch_end(self, outputs, *_) -> None:
        self.seen.append(outputs["loss"].item())


def _trainer(tmp_path, epochs: int = 1, **options) -> Trainer:
    return Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=tmp_path, **options,
    )  # fmt: skip


def _sine(**options) -> FunctionData:
    given = {"batch_size": 32, "seed": 0, "train_samples": 512, "val_samples": 200, "test_samples": 200}
    return FunctionData("sine_1d", **{**given, **options})


def _regressor(spec: str = "L16 m16 M16 L1", inputs: int = 1, seed: int = 0, **options) -> _Recorded:
    torch.manual_seed(seed)
    return _Recorded(MMPNet(spec, inputs), ADAM, **{"steps_per_epoch": 16, "task": "regression", **options})


def test_a_regression_learns_and_its_curve_is_the_mean_of_its_losses(tmp_path) -> None:
    module = _regressor(thresholds=(0.5, 0.1, 1e-6), active_samples=100)
    trainer, data = _trainer(tmp_path, epochs=12), _sine()
    trainer.fit(module, datamodule=data)
    losses, logged = module.seen, trainer.callback_metrics
    assert len(losses) == 12 * 16
    assert np.mean(losses[-WINDOW:]) < 0.05 * losses[0]
    assert logged["val/rmse"] < 0.2 < np.std(data.val_set.y_N.numpy())  # a constant would stay at the deviation
    assert logged["val/loss"].item() == pytest.approx(logged["val/rmse"].item() ** 2, rel=1e-4)
    assert logged["train/mean_loss"].item() == pytest.approx(np.mean(losses), rel=1e-5)
    means = [np.mean(losses[low : low + WINDOW]) for low in range(len(losses) - WINDOW + 1)]
    for threshold in (0.5, 0.1):
        reached = next(i for i, mean in enumerate(means) if mean <= threshold) + WINDOW
        assert logged[f"steps_to/loss_{threshold:g}"] == reached
    assert "steps_to/loss_1e-06" not in logged  # never reached is missing, not a number
    shares = winning_shares(module.net, data.sample_inputs(100, key=0))
    for place, share in enumerate(shares.values(), start=1):
        assert logged[f"active/layer{place}"].item() == pytest.approx(100 * share)
    assert logged["active/mean"].item() == pytest.approx(50 * sum(shares.values()))
    assert 0 < logged["active/mean"] < 100


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> SampledImages:
    """Ten classes told apart by which of ten pixels is bright, behind noise."""
    generator = np.random.default_rng(0)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count, dtype=np.uint8) % 10
        pixels = generator.integers(0, 60, (count, 16), dtype=np.uint8)
        pixels[np.arange(count), labels] += 190
        return pixels.reshape(count, 4, 4, 1), labels

    arrays = ImageArrays(*draw(500), *draw(100), DataCard("Toy", 600, "0" * 64, "none", False, "made up"))
    monkeypatch.setattr(tropical_cnn, "load_images", lambda *_: arrays)
    return SampledImages("mnist", batch_size=32, seed=0, val_samples=100, eval_batch_size=64)


@pytest.mark.parametrize("net", ["L16 m16 M16 L10", "convolutional"])
def test_a_classification_learns_with_normalisation_on_the_way(net: str, images, tmp_path) -> None:
    torch.manual_seed(0)
    made = (
        ConvMMPNet(["Conv2d", "MaxP-Max"], "m16 M16 L10", 1, 4, stride=1) if net == "convolutional" else MMPNet(net, 16)
    )
    module = _Recorded(made, ADAM, steps_per_epoch=13, normalisation=Normalisation("steps", every=20, samples=50))
    trainer = _trainer(tmp_path, epochs=12)
    trainer.fit(module, datamodule=images)
    assert np.mean(module.seen[-WINDOW:]) < 0.25 * np.mean(module.seen[:5])
    (tested,) = trainer.test(module, datamodule=images, verbose=False)
    assert tested["test/acc"] > 80
    right = sum((made(x).argmax(1) == y).sum().item() for x, y in images.test_dataloader())
    assert tested["test/acc"] == pytest.approx(right)  # percent of 100 images


class _Fixed(LightningDataModule):
    """The same few rows for every split."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int = 2) -> None:
        super().__init__()
        self.set, self.batch_size = TensorDataset(x, y), batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.set, batch_size=self.batch_size)

    val_dataloader = test_dataloader = train_dataloader


class _Given(nn.Module):
    """Hands the input on, whatever its one weight is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0 * self.weight


def test_regression_scores_are_over_all_points(tmp_path) -> None:
    x, y = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([0.0, 3.0, 1.0])
    module = MinMaxPlus(_Given(), STILL, steps_per_epoch=2, task="regression")
    (tested,) = _trainer(tmp_path).test(module, datamodule=_Fixed(x, y), verbose=False)
    assert tested["test/rmse"] == pytest.approx(math.sqrt(5 / 3))  # not the mean of the batches' values
    assert tested["test/max_error"] == pytest.approx(2.0)
    assert "test/bound" not in tested
    module.net.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="nan"):
        _trainer(tmp_path).test(module, datamodule=_Fixed(x, y), verbose=False)


def test_accuracy_is_percent_of_all_rows(tmp_path) -> None:
    x, y = torch.eye(10)[[0, 1, 2, 3, 4]], torch.tensor([0, 1, 2, 9, 9])
    module = MinMaxPlus(_Given(), STILL, steps_per_epoch=3)
    (tested,) = _trainer(tmp_path).test(module, datamodule=_Fixed(x, y), verbose=False)
    assert tested == {"test/acc": pytest.approx(60.0)}


def test_a_construction_is_tested_as_it_is_against_its_own_bound(tmp_path) -> None:
    net = ConeNet("waves_2d", 3, 24)
    before = [p.clone() for p in net.parameters()]
    module = MinMaxPlus(net, STILL, steps_per_epoch=1, task="regression")
    data = FunctionData("waves_2d", 32, 3, train_samples=1, val_samples=1, test_samples=2000)
    (tested,) = _trainer(tmp_path).test(module, datamodule=data, verbose=False)
    assert tested["test/bound"] == pytest.approx(8 / 24)
    assert 0.1 < tested["test/max_error"] <= tested["test/bound"]
    assert 0 < tested["test/rmse"] < tested["test/max_error"]
    other = FunctionData("waves_2d", 32, 4, train_samples=1, val_samples=1, test_samples=2000)
    (wrong,) = _trainer(tmp_path).test(module, datamodule=other, verbose=False)
    assert wrong["test/max_error"] > wrong["test/bound"]  # of another member of the family nothing is promised
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


RECIPES = {
    "plain": {},
    "steps": {"normalisation": Normalisation("steps", every=5, samples=40, share=0.5, reset_moments=True)},
    "epoch": {"normalisation": Normalisation("epoch", samples=40), "schedule": step_decay(0.5, 2)},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_is_cut_ends_with_the_same_weights_curve_and_numbers(recipe: str, tmp_path) -> None:
    def run(epochs: int, checkpoint=None):
        module = _regressor(thresholds=(0.5, 0.3, 0.2), active_samples=50, steps_per_epoch=8, **RECIPES[recipe])
        trainer = _trainer(tmp_path, epochs=epochs)
        data = _sine(train_samples=256)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=False)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return module, {name: float(value) for name, value in trainer.callback_metrics.items()}

    whole, numbers = run(6)
    run(4)
    rest, same = run(6, tmp_path / "4.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), rest.parameters(), strict=True))
    assert vars(rest.curve) == vars(whole.curve)
    assert rest.curve.steps == 48
    assert same == numbers
    assert len(whole.curve.reached) > 0


def test_a_checkpoint_does_not_change_with_the_run_it_came_from() -> None:
    module, checkpoint = _regressor(), {}
    for loss in [1.0] * WINDOW:
        module.curve.add(loss, (2.0,))
    module.on_save_checkpoint(checkpoint)
    for loss in [0.0] * WINDOW:
        module.curve.add(loss, (0.5,))
    other = _regressor()
    other.on_load_checkpoint(checkpoint)
    kept = {"steps": WINDOW, "total": 20.0, "last": [1.0] * WINDOW, "reached": {"2": WINDOW}}
    assert vars(other.curve) == {**kept, "sums": {}, "counts": {}}
    other.curve.add(0.0, (3.0,))
    assert checkpoint["curve"]["reached"] == {"2": WINDOW}


def test_a_threshold_is_reached_by_the_mean_of_a_window_and_once() -> None:
    curve = LossCurve()
    assert math.isnan(curve.mean)  # of no loss there is no mean
    assert curve.reached == {}
    losses = [4.0] * 10 + [0.0] * 30 + [9.0] * 5
    for loss in losses:
        curve.add(loss, (2.0, 1.0, 0.25, 0.0, -1.0))
    assert curve.mean == pytest.approx(sum(losses) / 45)
    # windows hold 10, 9, 8, ... fours: 2.0 at step 20, 1.0 at step 25, 0.25 at step 29 (0.2), 0 at step 30
    assert curve.reached == {"2": 20, "1": 25, "0.25": 29, "0": 30}


def test_one_low_loss_reaches_nothing() -> None:
    curve = LossCurve()
    for loss in [0.0] * (WINDOW - 1):
        curve.add(loss, (1.0,))
    assert curve.reached == {}  # the window is not full
    for loss in [100.0] * 5 + [0.0] * 5:
        curve.add(loss, (1.0,))
    assert curve.reached == {}


def test_the_schedule_runs_by_epochs_counted_in_steps(tmp_path) -> None:
    module = _regressor(schedule=step_decay(0.5, 2), steps_per_epoch=4)
    trainer = _trainer(tmp_path, epochs=3)
    trainer.fit(module, datamodule=_sine(train_samples=128))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 * 0.5**2)
    assert _regressor().configure_optimizers().param_groups[0]["lr"] == 0.02


def test_a_diverging_loss_stops_the_run(tmp_path) -> None:
    module = _regressor()
    module.net[1].weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="nan in epoch 0"):
        _trainer(tmp_path).fit(module, datamodule=_sine())


def test_the_loss_is_what_the_task_says() -> None:
    x, y = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    classifier = MinMaxPlus(_Given(), STILL, steps_per_epoch=1, num_classes=3)
    expected = -torch.log_softmax(x, 1)[torch.arange(6), y].mean()
    assert classifier.step((x, y)).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    regressor = MinMaxPlus(_Given(), STILL, steps_per_epoch=1, task="regression")
    assert regressor.step((x[:, :1], x[:, 1])).loss.item() == pytest.approx(((x[:, 0] - x[:, 1]) ** 2).mean().item())
    with pytest.raises(ValueError, match=r"a regression needs outputs \(6, 1\), got \(6, 3\)"):
        regressor.step((x, x[:, 0]))
    with pytest.raises(ValueError, match="classification or regression, got 'clustering'"):
        MinMaxPlus(_Given(), STILL, steps_per_epoch=1, task="clustering")


def test_callbacks_come_with_the_module_only_where_they_are_asked_for() -> None:
    def kinds(**options) -> list[str]:
        return [type(callback).__name__ for callback in _regressor(**options).configure_callbacks()]

    assert kinds() == []
    assert kinds(normalisation=Normalisation("init")) == ["RestrictedNormalisation"]
    assert kinds(active_samples=10) == ["DeadWeights"]


def test_a_net_without_tropical_layers_is_a_baseline_like_any(tmp_path) -> None:
    """Its dead weights are missing, not zero."""
    module = _regressor("L8 R L1", active_samples=20)
    trainer = _trainer(tmp_path)
    trainer.fit(module, datamodule=_sine(train_samples=64))
    assert not [name for name in trainer.callback_metrics if name.startswith("active/")]


def test_the_tenths_of_a_training_are_means_over_their_steps() -> None:
    curve = LossCurve()
    for step in range(25):
        curve.add(float(step), (), planned=25)
    whole = [step * 10 // 25 for step in range(25)]
    assert curve.parts == {
        part + 1: sum(s for s in range(25) if whole[s] == part) / whole.count(part) for part in range(10)
    }


@pytest.fixture
def made_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random images in the place of MNIST: these tests are about ablations, not about accuracy."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1400, 28, 28, 1), dtype=np.uint8)
    labels = rng.permutation(np.arange(1400) % 10).astype(np.uint8)
    card = DataCard("MNIST", 1400, "0", "none", False, "made up")
    arrays = ImageArrays(images[:1200], labels[:1200], images[1200:], labels[1200:], card)
    monkeypatch.setattr(tropical_cnn, "load_images", lambda *_: arrays)


def _resolved(ablation: str) -> dict:
    data = "waves_2d" if ablation.startswith(("fit", "sine", "cone", "wave8")) else "mnist"
    return resolve(CellKey("min_max_plus", ablation, data, 0, "smoke")).config


@pytest.mark.parametrize("ablation", [a for a in ablations("min_max_plus") if not a.startswith(("cone", "check"))])
def test_every_ablation_trains_two_batches(ablation: str, made_images: None, tmp_path) -> None:
    config = _resolved(ablation)
    data = instantiate(config["datamodule"], batch_size=64, train_samples=128, val_samples=100, test_samples=100)
    torch.manual_seed(0)
    net = instantiate(config["net"])
    before = {name: p.clone() for name, p in net.named_parameters()}
    optim = config["optim"]
    module = instantiate(
        config["module"],
        net=net,
        optimizer=instantiate(optim["optimizer"], _partial_=True),
        schedule=instantiate(optim["schedule"], epochs=1) if optim["schedule"] else None,
        steps_per_epoch=2,
    )
    trainer = _trainer(tmp_path)
    trainer.fit(module, datamodule=data)
    assert {"train/mean_loss", config["selection"]["monitor"], "val/loss"} <= trainer.callback_metrics.keys()
    assert ("active/mean" in trainer.callback_metrics) == bool(tropical_layers(net))
    moved = [name for name, p in net.named_parameters() if not torch.equal(before[name], p)]
    assert len(moved) >= len(before) - 1


@pytest.mark.parametrize("ablation", [a for a in ablations("min_max_plus") if a.startswith(("cone", "check"))])
def test_every_construction_and_check_is_tested_as_it_is(ablation: str, made_images: None, tmp_path) -> None:
    config = _resolved(ablation)
    data = instantiate(config["datamodule"], train_samples=128, val_samples=100, test_samples=100)
    module = instantiate(config["module"], net=instantiate(config["net"]), optimizer=STILL, steps_per_epoch=1)
    (tested,) = _trainer(tmp_path).test(module, datamodule=data, verbose=False)
    if ablation.startswith("cone"):
        assert tested["test/rmse"] <= tested["test/max_error"] <= tested["test/bound"]
    else:
        assert any(name.startswith("check/") for name in tested)
