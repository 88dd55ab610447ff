"""Paper 4: a Min-Max-Plus net that classifies images or approximates a function.

Shape legend: B batch, K outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, Literal, NamedTuple

import torch
from lightning import Callback, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MaxMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanSquaredError

from lit_modules.normalisation import DeadWeights, Normalisation, RestrictedNormalisation
from lit_modules.pace import logs_now
from lit_modules.schedules import Schedule

WINDOW = 20  # steps whose mean training loss counts as reached
PARTS = 10  # of the training, for which the mean loss is kept


class Losses(NamedTuple):
    """Cross entropy in nats or mean squared error (scalar), and the outputs it was taken from (B, K)."""

    loss: Tensor
    outputs_BK: Tensor


class MinMaxPlus(LightningModule):
    """Train `net`; choose weights on validation; test them once. How fast the training loss falls is a result too.

    Args:
        net: maps x (B, ...) to logits (B, num_classes), or to values (B, 1) for a regression.
        optimizer: takes parameters, returns the optimiser.
        schedule: learning-rate factor of the epoch, or None for constant.
        steps_per_epoch: optimiser steps in one epoch, which turns steps into epochs for the schedule.
        task: "classification" (cross entropy) or "regression" (mean squared error).
        num_classes: K of a classification.
        normalisation: schedule of the restricted normalisation, or None for none at all.
        thresholds: training losses whose first step is logged.
        active_samples: inputs over which the share of winning weights is taken after each epoch; 0 for not at all.
        epochs: of the whole training, which its tenths are of; 0 for not keeping them.
    Logs: `train/mean_loss`, the mean over all steps (the area under the curve), and `curve/01` to `curve/10`, the mean over
        each tenth of them; `steps_to/loss_T`, the step at which the mean
        loss of the last 20 steps first is at most T (missing if it never is); `active/*`, in percent; `test/acc` in percent, or
        `test/rmse`, `test/max_error` and, where the net proves one, `test/bound`.
    Source: arXiv 2102.06358, abstract.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer],
        steps_per_epoch: int,
        schedule: Schedule | None = None,
        task: Literal["classification", "regression"] = "classification",
        num_classes: int = 10,
        normalisation: Normalisation | None = None,
        thresholds: tuple[float, ...] = (),
        active_samples: int = 0,
        epochs: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters("steps_per_epoch", "epochs", "task", "num_classes", "active_samples")
        if task not in ("classification", "regression"):
            raise ValueError(f"task must be classification or regression, got {task!r}")
        self.net, self.optimizer, self.schedule, self.task = net, optimizer, schedule, task
        self.normalisation, self.thresholds, self.active_samples = normalisation, tuple(thresholds), active_samples
        self.val_scores, self.test_scores = self._scores("val/", num_classes), self._scores("test/", num_classes)
        self.worst = MaxMetric(nan_strategy="error")  # by default it would skip them
        self.curve = LossCurve()

    def _scores(self, prefix: str, classes: int) -> MetricCollection:
        if self.task == "regression":
            return MetricCollection({"rmse": MeanSquaredError(squared=False)}, prefix=prefix)
        accuracy = MulticlassAccuracy(classes, average="micro", validate_args=False)
        return MetricCollection({"acc": accuracy}, prefix=prefix)

    def configure_callbacks(self) -> list[Callback]:
        found: list[Callback] = []
        if self.normalisation is not None:
            found.append(RestrictedNormalisation(self.normalisation))
        if self.active_samples:
            found.append(DeadWeights(self.active_samples))
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Map samples (B, ...) to outputs (B, K)."""
        return self.net(x)

    def step(self, batch: tuple[Tensor, Tensor]) -> Losses:
        """Return the loss and outputs of a batch of samples (B, ...) and labels or values (B,)."""
        x, y_B = batch
        outputs_BK = self(x)
        if self.task == "regression":
            if outputs_BK.shape != (len(y_B), 1):
                raise ValueError(f"a regression needs outputs ({len(y_B)}, 1), got {tuple(outputs_BK.shape)}")
            return Losses(F.mse_loss(outputs_BK[:, 0], y_B.to(outputs_BK)), outputs_BK)
        return Losses(F.cross_entropy(outputs_BK, y_B), outputs_BK)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = self.step(batch).loss
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss.item()} in epoch {self.current_epoch}")
        self.curve.add(loss.item(), self.thresholds, self.hparams["steps_per_epoch"] * self.hparams["epochs"])
        if logs_now(self.trainer):
            self.log("train/loss", loss, on_step=True, on_epoch=False)
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("train/mean_loss", self.curve.mean)
        for threshold, step in self.curve.reached.items():
            self.log(f"steps_to/loss_{threshold}", float(step))
        for part, mean in self.curve.parts.items():
            self.log(f"curve/{part:02d}", mean)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        losses = self.step(batch)
        self._score(self.val_scores, losses, batch)
        self.log("val/loss", losses.loss, batch_size=len(batch[1]))

    def on_validation_epoch_end(self) -> None:
        self._log_scores(self.val_scores)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        losses = self.step(batch)
        self._score(self.test_scores, losses, batch)
        if self.task == "regression":
            self.worst.update((losses.outputs_BK[:, 0] - batch[1]).abs().max())

    def on_test_epoch_end(self) -> None:
        self._log_scores(self.test_scores)
        if self.task == "regression":
            self.log("test/max_error", self.worst.compute())
            self.worst.reset()
        bound = getattr(self.net, "bound", None)
        if bound is not None:
            self.log("test/bound", float(bound))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches that are there already are left alone: looking through them takes as long as a small net."""
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.net.parameters())
        if self.schedule is None:
            return optimizer
        schedule, steps = self.schedule, self.hparams["steps_per_epoch"]
        law = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": law, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["curve"] = deepcopy(vars(self.curve))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        vars(self.curve).update(deepcopy(checkpoint["curve"]))

    def _score(self, scores: MetricCollection, losses: Losses, batch: tuple[Tensor, Tensor]) -> None:
        outputs = losses.outputs_BK.detach()
        scores.update(outputs[:, 0].contiguous() if self.task == "regression" else outputs, batch[1])

    def _log_scores(self, scores: MetricCollection) -> None:
        for name, value in scores.compute().items():
            self.log(name, 100 * value if self.task == "classification" else value)
        scores.reset()


class LossCurve:
    """The training loss over all steps: its mean, the means of ten parts, and when a threshold was first reached."""

    def __init__(self) -> None:
        self.steps, self.total = 0, 0.0
        self.sums: dict[int, float] = {}
        self.counts: dict[int, int] = {}
        self.last: list[float] = []
        self.reached: dict[str, int] = {}

    @property
    def mean(self) -> float:
        """The mean over all steps so far; NaN before the first."""
        return self.total / self.steps if self.steps else math.nan

    @property
    def parts(self) -> dict[int, float]:
        """The mean of each tenth of the training that has begun, from 1."""
        return {part: self.sums[part] / self.counts[part] for part in sorted(self.sums)}

    def add(self, loss: float, thresholds: Iterable[float], planned: int = 0) -> None:
        """Take in one step's loss; `planned` is the number of steps of the whole training, 0 where it is not known."""
        if planned > 0:
            part = 1 + min(PARTS - 1, self.steps * PARTS // planned)
            self.sums[part] = self.sums.get(part, 0.0) + loss
            self.counts[part] = self.counts.get(part, 0) + 1
        self.steps, self.total = self.steps + 1, self.total + loss
        self.last = [*self.last, loss][-WINDOW:]
        if len(self.last) == WINDOW:
            mean = sum(self.last) / WINDOW
            for threshold in thresholds:
                if mean <= threshold:
                    self.reached.setdefault(f"{threshold:g}", self.steps)
