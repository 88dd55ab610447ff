"""Paper 2: a generator that takes motion blur off faces, trained by pixels, by features and against a critic.

Shape legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics import MeanMetric

from lit_modules.deblur_report import DeblurReport
from lit_modules.nets.critic import ScorePool, check_penalty
from lit_modules.nets.perceptual import perceptual
from lit_modules.ops.adversarial import Baseline, critic_loss, generator_loss, gradient_penalty
from lit_modules.ops.image_quality import psnr
from lit_modules.ops.restoration import restoration_loss
from lit_modules.pace import logs_now
from lit_modules.schedules import Schedule

Make = Callable[[Any], torch.optim.Optimizer]


class Losses(NamedTuple):
    """What the generator is trained by, scalars before weighting; a term whose weight is 0 is not computed and reads 0."""

    pixel: Tensor
    perceptual: Tensor
    adversarial: Tensor


class FaceDeblur(LightningModule):
    """Train `net` on pairs of blurred and sharp faces: pixel, perceptual and adversarial loss, each with its weight.

    With a critic, each batch first teaches the critic to tell sharp faces from restored ones; the generator moves at every
    `critic_steps`-th batch. Both see fresh pairs every time.

    Args:
        net: the generator, images (B, 3, H, W) in [0, 1] to images of the same shape.
        optimizer: takes parameters, returns the generator's optimiser.
        steps_per_epoch: batches in one epoch, which turns batches into epochs for the schedule of both optimisers.
        report: measures the test sets.
        schedule: learning-rate factor of the epoch, or None for constant.
        pixel: a loss of lit_modules.ops.restoration.
        features: a network of lit_modules.nets.perceptual, whose distance is the perceptual loss; "none" for none.
        critic: makes the critic, whose first weights come from a generator of their own; None to train without.
        critic_optimizer: takes parameters, returns the critic's optimiser; None for the generator's.
        game: a kind of lit_modules.ops.adversarial.
        pixel_weight, perceptual_weight, adversarial_weight: of the three terms.
        penalty: weight of the critic's gradient penalty; 0 for none.
        pool: steps that a relativistic game averages scores over; 0 for the batch at hand.
        critic_steps: batches per step of the generator.
        ema: decay per step of the averaged generator, which is then what is validated and tested; 0 for none.
        clip: largest norm of the generator's gradient; 0 for no limit.
        seed: of the critic's first weights.
    Logs: `val/psnr` and `val/gain`, over the blurred images, in dB; `val/batches` seen so far, by which the last epoch is
        chosen; after the last epoch, with a judge, `val/confidence`, MTCNN's mean probability in percent; all that the
        report measures.
    Raises:
        ValueError: a weight below 0, a decay outside [0, 1), an adversarial weight without a critic or the reverse.
    Source: arXiv 2103.02121, whose body is not known; losses and game after DeblurGAN (arXiv 1711.07064) and DeblurGAN-v2
        (arXiv 1908.03826), without the faults of their public code (README of the paper, deviations).
    """

    automatic_optimization = False  # two optimisers, of which one may move more often than the other

    def __init__(
        self,
        net: nn.Module,
        optimizer: Make,
        steps_per_epoch: int,
        report: DeblurReport,
        schedule: Schedule | None = None,
        pixel: str = "psnr",
        features: str = "none",
        critic: Callable[[], nn.Module] | None = None,
        critic_optimizer: Make | None = None,
        game: str = "wgan",
        pixel_weight: float = 1.0,
        perceptual_weight: float = 0.0,
        adversarial_weight: float = 0.0,
        penalty: float = 0.0,
        pool: int = 0,
        critic_steps: int = 1,
        ema: float = 0.0,
        clip: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            ignore=["net", "optimizer", "schedule", "report", "critic", "critic_optimizer"], logger=False
        )
        check_terms(dict(self.hparams), critic is not None)
        self.net, self.optimizer, self.schedule, self.report = net, optimizer, schedule, report
        self.pixel_loss = restoration_loss(pixel)
        self.features = perceptual(features) if perceptual_weight else None
        self.critic = _drawn(critic, seed) if critic is not None else None
        if self.critic is not None and penalty:
            check_penalty(self.critic)
        self.critic_optimizer = critic_optimizer or optimizer
        scales = len(getattr(self.critic, "critics", [None]))
        self.pools = nn.ModuleList([ScorePool(pool, scales) for _ in ("real", "fake")]) if pool else None
        self.averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(ema), use_buffers=True) if ema else None
        self.val_psnr, self.val_blurred, self.val_confidence = MeanMetric(), MeanMetric(), MeanMetric()
        self.batches = 0  # seen so far: Lightning's own count is of optimiser steps

    def forward(self, blurred_BCHW: Tensor) -> Tensor:
        """Restore images (B, 3, H, W) in [0, 1] with the generator that is tested: the averaged one, if there is one."""
        return (self.net if self.averaged is None else self.averaged)(blurred_BCHW).clamp(0, 1)

    def step(self, pairs: Any) -> Losses:
        """Return the generator's losses on a batch of pairs, their blurred and sharp images (B, 3, H, W)."""
        restored, zero = self.net(pairs.blurred), pairs.sharp.new_zeros(())
        perceptual_loss, adversarial = zero, zero
        if self.features is not None:
            perceptual_loss = self.features.perceptual_distance(restored, pairs.sharp).mean()
        if self.critic is not None:
            with torch.no_grad():
                real = self.critic(pairs.sharp, pairs.blurred)
            fake = self.critic(restored, pairs.blurred)
            adversarial = generator_loss(self.hparams["game"], fake, real, self._baseline())
        return Losses(self.pixel_loss(restored, pairs.sharp), perceptual_loss, adversarial)

    def training_step(self, pairs: Any, batch_idx: int) -> None:
        generators, *critics = self._listed(self.optimizers())
        self.batches += 1
        if self.critic is not None:
            self._train_critic(critics[0], pairs)
        if self.batches % self.hparams["critic_steps"] == 0:
            self._train_generator(generators, pairs)
        with warnings.catch_warnings():  # torch warns of a rate that moves before the weights do
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for law in self._listed(self.lr_schedulers()):
                law.step()  # one per batch, whether the generator moved or not

    def _train_generator(self, optimiser: Any, pairs: Any) -> None:
        with self.toggled_optimizer(optimiser):
            losses, of = self.step(pairs), self.hparams
            loss = of["pixel_weight"] * losses.pixel + of["perceptual_weight"] * losses.perceptual
            self._finite("generator", loss := loss + of["adversarial_weight"] * losses.adversarial)
            self.manual_backward(loss)
            if of["clip"]:
                nn.utils.clip_grad_norm_(self.net.parameters(), of["clip"])
            optimiser.step()
            optimiser.zero_grad()
        if self.averaged is not None:
            self.averaged.update_parameters(self.net)
        if logs_now(self.trainer):
            self.log_dict({f"train/{name}": term.detach() for name, term in losses._asdict().items()})

    def _train_critic(self, optimiser: Any, pairs: Any) -> None:
        assert self.critic is not None
        critic, blurred = self.critic, pairs.blurred
        with torch.no_grad():
            restored = self.net(blurred)
        with self.toggled_optimizer(optimiser):
            real, fake = critic(pairs.sharp, blurred), critic(restored, blurred)
            if self.pools is not None:
                for pool, scores in zip(self.pools, (real, fake), strict=True):
                    pool.push(scores)  # type: ignore[operator]
            loss = critic_loss(self.hparams["game"], real, fake, self._baseline())
            if self.hparams["penalty"]:  # images are in [0, 1], the published penalty is for [-1, 1]
                steep = gradient_penalty(lambda x: critic(x, blurred), pairs.sharp, restored, image_scale=2.0)
                loss = loss + self.hparams["penalty"] * steep
            self._finite("critic", loss)
            self.manual_backward(loss)
            optimiser.step()
            optimiser.zero_grad()
        if logs_now(self.trainer):
            self.log("train/critic", loss.detach())

    def validation_step(self, pairs: Any, batch_idx: int) -> None:
        restored = self(pairs.blurred)
        self.val_psnr.update(psnr(restored, pairs.sharp))
        self.val_blurred.update(psnr(pairs.blurred, pairs.sharp))
        if self.report.judge is not None and self.trainer.current_epoch + 1 == self.trainer.max_epochs:
            scores = self.report.judge.score(restored, pairs.sharp)
            self.val_confidence.update(100 * scores.prob_B[scores.counted_B].to(self.device, torch.float32))

    def on_validation_epoch_end(self) -> None:
        restored, blurred = (metric.compute() for metric in (self.val_psnr, self.val_blurred))
        self.log_dict({"val/psnr": restored, "val/gain": restored - blurred, "val/batches": float(self.batches)})
        if self.val_confidence.update_called:
            self.log("val/confidence", self.val_confidence.compute())
        for metric in (self.val_psnr, self.val_blurred, self.val_confidence):
            metric.reset()

    def on_test_epoch_start(self) -> None:
        self.report.start(self.trainer.datamodule.test_names)  # type: ignore[attr-defined]

    def test_step(self, pairs: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.report.add(dataloader_idx, pairs, self(pairs.blurred), self)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.report.finish(self.trainer.default_root_dir))

    def configure_optimizers(self) -> Any:
        optimisers = [self.optimizer(self.net.parameters())]
        if self.critic is not None:
            optimisers.append(self.critic_optimizer(self.critic.parameters()))
        if self.schedule is None:
            return optimisers
        schedule, steps = self.schedule, self.hparams["steps_per_epoch"]
        laws = [torch.optim.lr_scheduler.LambdaLR(each, lambda batch: schedule(batch / steps)) for each in optimisers]
        return optimisers, [{"scheduler": law, "interval": "step"} for law in laws]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["batches"] = self.batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches = checkpoint["batches"]

    def on_inherit(self, state: dict[str, Tensor]) -> None:
        """Average from the inherited weights on, not from those the net was drawn with."""
        if self.averaged is not None:
            self.averaged.module.load_state_dict(self.net.state_dict())

    def _baseline(self) -> Baseline | None:
        if self.pools is None or self.hparams["game"] != "ralsgan":
            return None
        real, fake = (pool.mean() for pool in self.pools)  # type: ignore[operator]
        return Baseline(real, fake)

    def _finite(self, who: str, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the {who}'s loss became {loss.item()} in epoch {self.current_epoch}")

    @staticmethod
    def _listed(found: Any) -> list[Any]:
        return list(found) if isinstance(found, list | tuple) else [found] if found is not None else []


def check_terms(terms: dict[str, Any], critic: bool) -> None:
    """Refuse settings that cannot be trained with.

    Raises:
        ValueError: see FaceDeblur.
    """
    for name in ("pixel_weight", "perceptual_weight", "adversarial_weight", "penalty", "pool", "clip"):
        if terms[name] < 0:
            raise ValueError(f"{name} must be at least 0, got {terms[name]}")
    if not 0 <= terms["ema"] < 1:
        raise ValueError(f"ema must lie in [0, 1), got {terms['ema']}")
    if terms["critic_steps"] < 1:
        raise ValueError(f"critic_steps must be at least 1, got {terms['critic_steps']}")
    if terms["perceptual_weight"] and terms["features"] == "none":
        raise ValueError(f"perceptual_weight is {terms['perceptual_weight']}, but features is none: name a network")
    if bool(terms["adversarial_weight"]) != critic:
        there = "there is a critic" if critic else "there is no critic"
        raise ValueError(f"adversarial_weight is {terms['adversarial_weight']}, but {there}: give both or neither")


def _drawn(critic: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build the critic with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"critic {seed}".encode()))
        return critic()
