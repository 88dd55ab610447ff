"""Paper 1: a language model, dense or a mixture of experts, pretrained from scratch or continued from its dense parent.

Shape legend: B sequences, S tokens of a sequence, V vocabulary, C candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanMetric

from lit_modules.expert_watch import ExpertWatch
from lit_modules.nets.pricing import Shape, price
from lit_modules.nets.sharding import shard
from lit_modules.nets.transformer import Transformer
from lit_modules.ops.cloze import cloze_hits
from lit_modules.ops.routing import Routing, expert_counts, load_balancing_loss, z_loss
from lit_modules.pace import logs_now
from lit_modules.schedules import Schedule

CANDIDATES = 4  # continuations to choose from in the cloze test: chance is 25%


class Losses(NamedTuple):
    """Scalars: cross entropy in nats per token, and the router's two losses, each summed over the MoE layers."""

    cross_entropy: Tensor
    balance: Tensor
    z: Tensor


class MoEUpcycling(LightningModule):
    """Predict the next token; keep the experts evenly loaded; test the weights of the last epoch.

    Args:
        net: maps tokens (B, S) to logits (B, S, V).
        optimizer: takes parameter groups, returns the optimiser. Routers and norms are not decayed.
        steps_per_epoch: optimiser steps in one epoch, which turns steps into epochs for the schedule. An epoch is a fixed
            number of tokens, so the schedule is one of tokens whatever the batch.
        schedule: learning-rate factor of the epoch, or None for constant.
        balance: coefficient of the load-balancing loss of every MoE layer.
        z: coefficient of the router z-loss of every MoE layer.
        router_lr: the routers' learning rate, as a multiple of all others' (1 in the paper, which does not mention it).
        clip: largest norm of the gradient; longer ones are scaled down to it.
        epochs: of the whole training, for naming points of the validation curve.
    Logs: `val/loss` and `test/loss` in nats per token, `val/bpb` and `test/bpb` in bits per byte, `val/tokens` seen so far,
        by which the last epoch is chosen; `val_at/P`, the validation loss after P percent of the training;
        `test/cloze`, percent of true continuations preferred among 4; `train/tokens`, `cost/active_params` and
        `cost/flops_per_token`. What the experts do is logged by `lit_modules.expert_watch.ExpertWatch`.
    Source: arXiv 2410.07524, sections 2 and 3; load-balancing coefficient 1e-2 and no z-loss as there.
    """

    net: Transformer

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        steps_per_epoch: int,
        schedule: Schedule | None = None,
        balance: float = 1e-2,
        z: float = 0.0,
        router_lr: float = 1.0,
        clip: float = 1.0,
        epochs: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["net", "optimizer", "schedule"])
        for name, value in {"balance": balance, "z": z, "router_lr": router_lr}.items():
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if clip <= 0:
            raise ValueError(f"clip must be above 0, got {clip}")
        self.net, self.optimizer, self.schedule = net, optimizer, schedule  # type: ignore[assignment]
        self.watch = ExpertWatch(self.net) if self.net.moe_layers() else None
        self.val_loss = MeanMetric()
        self.tokens = 0  # trained on so far
        self.curve: dict[int, float] = {}  # validation loss after so many percent of the training

    def configure_model(self) -> None:
        """Shard the net over the processes of a strategy that has a device mesh (FSDP2); any other needs nothing here."""
        for net in self.children():
            if self.device_mesh is not None and isinstance(net, Transformer):
                shard(net, self.device_mesh["data_parallel"])

    def configure_callbacks(self) -> list[Callback]:
        return [self.watch] if self.watch is not None else []

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Map tokens (B, S) to the logits (B, S, V) of the token that follows each."""
        return self.net(tokens_BS)

    def step(self, batch: tuple[Tensor, Tensor]) -> Losses:
        """Return the losses on tokens (B, S) and those that follow them (B, S)."""
        x_BS, y_BS = batch
        cross_entropy = F.cross_entropy(self(x_BS).flatten(0, 1).float(), y_BS.flatten())
        routings = [layer.routed for layer in self.net.moe_layers().values() if layer.routed is not None]
        zero = cross_entropy.new_zeros(())
        counts = _counts_of_all(routings)
        balance = sum((load_balancing_loss(*each) for each in zip(routings, counts, strict=True)), zero)
        return Losses(cross_entropy, balance, sum((z_loss(routing.logits_SN) for routing in routings), zero))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        losses = self.step(batch)
        loss = losses.cross_entropy + self.hparams["balance"] * losses.balance + self.hparams["z"] * losses.z
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {loss.item()} in epoch {self.current_epoch}")
        self.tokens += batch[0].numel() * self.trainer.world_size
        if logs_now(self.trainer):
            self.log_dict({f"train/{name}": value.detach() for name, value in losses._asdict().items()})
        return loss

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Clip by norm here: Lightning's own refuses it under FSDP."""
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.hparams["clip"])

    def on_train_epoch_end(self) -> None:
        self.log("train/tokens", float(self.tokens))
        self.log_dict({f"val_at/{percent:03d}": loss for percent, loss in self.curve.items()})

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.val_loss.update(self._log_losses("val", batch), weight=batch[0].numel())

    def on_validation_epoch_end(self) -> None:
        percent = round(100 * (self.current_epoch + 1) / self.hparams["epochs"])
        self.curve[percent] = float(self.val_loss.compute())
        self.val_loss.reset()
        self.log("val/tokens", float(self.tokens))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x_BS, y_BS = batch
        hits_B = cloze_hits(self.net, x_BS[::CANDIDATES], y_BS[::CANDIDATES], candidates=CANDIDATES)
        if hits_B is not None:
            self.log("test/cloze", 100 * hits_B.float().mean(), batch_size=len(hits_B))
        self._log_losses("test", batch)  # last, so that the routing that is watched is that of the text itself

    def on_test_epoch_end(self) -> None:
        cost = price(Shape(**self.net.arguments), int(self.trainer.datamodule.input_shape[0]))  # type: ignore[attr-defined]
        self.log("cost/active_params", float(cost.params_active))
        self.log("cost/flops_per_token", float(cost.flops_forward))

    def _log_losses(self, split: str, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss, count = self.step(batch).cross_entropy, batch[0].numel()
        bits = loss / math.log(2) / self.trainer.datamodule.bytes_per_token  # type: ignore[attr-defined]
        self.log_dict({f"{split}/loss": loss, f"{split}/bpb": bits}, batch_size=count, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(parameter_groups(self.net))
        for group in optimizer.param_groups:
            group["lr"] *= self.hparams["router_lr"] if group["name"] == "routers" else 1.0
        if self.schedule is None:
            return optimizer
        schedule, steps = self.schedule, self.hparams["steps_per_epoch"]
        law = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": law, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["tokens"], checkpoint["curve"] = self.tokens, dict(self.curve)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.tokens, self.curve = checkpoint["tokens"], dict(checkpoint["curve"])


def parameter_groups(net: nn.Module) -> list[dict[str, Any]]:
    """Return matrices (decayed), norms and scalars, and routers (neither of them decayed) as named parameter groups."""
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "norms": [], "routers": []}
    for name, parameter in _trainable(net.named_parameters()):
        kind = "routers" if ".router." in f".{name}" else "matrices" if parameter.ndim > 1 else "norms"
        groups[kind].append(parameter)
    decay: dict[str, dict[str, float]] = {
        "matrices": {},
        "norms": {"weight_decay": 0.0},
        "routers": {"weight_decay": 0.0},
    }
    return [{"params": params, "name": name, **decay[name]} for name, params in groups.items() if params]


def _counts_of_all(routings: Sequence[Routing]) -> Sequence[Tensor | None]:
    """For each layer, how many choices fell on each expert in the batches of all processes; None where there is one."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not several or not routings:
        return [None] * len(routings)
    counts_LN = torch.stack([expert_counts(r.experts_SK, r.probs_SN.shape[1]) for r in routings])
    dist.all_reduce(counts_LN)
    return list(counts_LN)


def _trainable(named: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in named if parameter.requires_grad]
