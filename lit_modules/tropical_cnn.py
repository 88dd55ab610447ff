"""Paper 3: an image classifier, judged clean and under test-time noise.

Shape legend: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lit_modules.ops.noise import NOISE_SUITE, add_noise, noise_generator
from lit_modules.pace import logs_now
from lit_modules.schedules import Schedule


class Losses(NamedTuple):
    """Cross entropy in nats (scalar) and the logits it was taken from (B, K)."""

    loss: Tensor
    logits_BK: Tensor


def condition_name(kind: str, level: float) -> str:
    """Return the metric-safe name of a noise condition, such as "salt_pepper_0.05"."""
    return f"{kind}_{level:g}"


def _scores(classes: int, prefix: str) -> MetricCollection:
    accuracy = MulticlassAccuracy(classes, average="micro", validate_args=False)
    return MetricCollection({"acc": accuracy}, prefix=prefix)


class TropicalClassifier(LightningModule):
    """Train `net` by cross entropy; choose weights on validation; test them once, clean and under 14 noises.

    Args:
        net: maps images (B, C, H, W) float32 in [0, 1] to logits (B, K).
        optimizer: takes parameters, returns the optimiser.
        schedule: learning-rate factor of the epoch, or None for constant.
        steps_per_epoch: optimiser steps in one epoch, which turns steps into epochs for the schedule.
        num_classes: K.
        noise: whether to test under noise too.
        noise_seed: seed of the evaluation noise, the same for every net and training seed.
    Logs, in percent: `val/acc`, `test/acc`, `noise/<kind>_<level>/acc`, and `published/test_acc`, the best test accuracy
    over epochs. The last is the published protocol, which selects on the test set; it decides nothing here.
    Source: the co-author's code of arXiv 2103.02096; the noise suite is ours.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        steps_per_epoch: int,
        schedule: Schedule | None = None,
        num_classes: int = 10,
        noise: bool = True,
        noise_seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters("steps_per_epoch", "num_classes", "noise_seed")
        self.suite = NOISE_SUITE if noise else ()
        self.net = net
        self.optimizer = optimizer
        self.schedule = schedule
        self.val_scores, self.test_scores = _scores(num_classes, "val/"), _scores(num_classes, "test/")
        self.watched_scores = _scores(num_classes, "watched/")
        self.trained, self.correct = 0, torch.zeros((), dtype=torch.long)  # of this epoch: a metric a step costs more
        self.test_loss = MeanMetric()
        self.noise_scores = nn.ModuleList([_scores(num_classes, "") for _ in self.suite])
        self.published_best = 0.0

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [0, 1] to logits (B, K)."""
        return self.net(x_BCHW)

    def step(self, batch: tuple[Tensor, Tensor]) -> Losses:
        """Return the loss and logits of a batch of images (B, C, H, W) and labels (B,)."""
        x_BCHW, y_B = batch
        logits_BK = self(x_BCHW)
        return Losses(F.cross_entropy(logits_BK, y_B), logits_BK)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        losses = self.step(batch)
        if not torch.isfinite(losses.loss):
            raise FloatingPointError(f"the loss became {losses.loss.item()} in epoch {self.current_epoch}")
        self.trained += len(batch[1])
        self.correct = self.correct.to(self.device) + (losses.logits_BK.detach().argmax(1) == batch[1]).sum()
        if logs_now(self.trainer):
            self.log("train/loss", losses.loss, on_step=True, on_epoch=False)
        return losses.loss

    def on_train_epoch_start(self) -> None:
        self.trained, self.correct = 0, torch.zeros_like(self.correct)

    def on_train_epoch_end(self) -> None:
        self.log("train/acc", 100 * self.correct.float() / self.trained)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        losses = self.step(batch)
        self._score(self.val_scores if dataloader_idx == 0 else self.watched_scores, losses, batch)
        if dataloader_idx == 0:
            self.log("val/loss", losses.loss, add_dataloader_idx=False, batch_size=len(batch[1]))

    def on_validation_epoch_end(self) -> None:
        self._log_percent(self.val_scores)
        watched = 100 * self.watched_scores.compute()["watched/acc"].item()
        self.published_best = max(self.published_best, watched)
        self.log("published/test_acc", self.published_best)
        self.watched_scores.reset()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x_BCHW, y_B = batch
        losses = self.step(batch)
        self._score(self.test_scores, losses, batch)
        self.test_loss.update(losses.loss, weight=len(y_B))
        for kind, level, score in self._conditions():
            generator = noise_generator(self.hparams["noise_seed"], kind, level, batch_idx)
            noisy_BCHW = add_noise(x_BCHW.cpu(), kind, level, generator).to(x_BCHW)
            score.update(self(noisy_BCHW), y_B)

    def on_test_epoch_end(self) -> None:
        self._log_percent(self.test_scores)
        self.log("test/loss", self.test_loss.compute())
        for kind, level, score in self._conditions():
            self.log(f"noise/{condition_name(kind, level)}/acc", 100 * score.compute()["acc"])
            score.reset()
        self.test_loss.reset()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches that are there already are left alone: looking through them takes as long as a small net."""
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.net.parameters())
        if self.schedule is None:
            return optimizer
        schedule, steps = self.schedule, self.hparams["steps_per_epoch"]
        # Per step, not per epoch: Lightning writes its checkpoint before it steps an epoch-wise scheduler.
        law = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": law, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["published_best"] = self.published_best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.published_best = checkpoint["published_best"]

    def _conditions(self) -> Iterator[tuple[str, float, Any]]:
        for (kind, level), score in zip(self.suite, self.noise_scores, strict=True):
            yield kind, level, score

    @staticmethod
    def _score(scores: MetricCollection, losses: Losses, batch: tuple[Tensor, Tensor]) -> None:
        scores.update(losses.logits_BK.detach(), batch[1])

    def _log_percent(self, scores: MetricCollection) -> None:
        for name, value in scores.compute().items():
            self.log(name, 100 * value)
        scores.reset()
