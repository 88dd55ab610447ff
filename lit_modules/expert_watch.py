"""What the experts of a MoE do: their load, the router's certainty, and whether virtual groups survive training.

Legend: S tokens, N experts, K chosen, G granularity.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from lit_modules.nets.moe import MoE
from lit_modules.nets.sharding import divided_like, whole
from lit_modules.nets.transformer import Transformer
from lit_modules.ops.routing import Routing, load_balancing_loss, z_loss
from lit_modules.ops.similarity import replica_purity, shard_coverage

STEPS = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)  # updates after which groups are looked at
DEAD = 0.01  # an expert that gets less than this part of its fair share


class Tally:
    """Sums over evaluation batches of one layer's routing, and the statistics they give."""

    def __init__(self) -> None:
        self.tokens = 0
        self.counts_N: Tensor | None = None
        self.sums: dict[str, float] = {}

    def add(self, routing: Routing, granularity: int) -> None:
        """Take in the routing of a batch."""
        tokens, experts = routing.probs_SN.shape
        counts_N = torch.bincount(routing.experts_SK.flatten(), minlength=experts)
        self.counts_N = counts_N if self.counts_N is None else self.counts_N + counts_N
        p_SN = routing.probs_SN
        found: dict[str, Tensor] = {
            "entropy": -(p_SN * p_SN.clamp_min(1e-30).log()).sum(1).mean(),
            "kept": routing.weights_SK.sum(1).mean(),
            "logit_std": routing.logits_SN.std(1).mean(),
            "balance": load_balancing_loss(routing),
            "z": z_loss(routing.logits_SN),
        }
        found |= group_measures(routing.experts_SK, granularity)
        for name, value in found.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value) * tokens
        self.tokens += tokens

    def load(self) -> Tensor:
        """Return each expert's tokens as a multiple of the fair share (N,)."""
        assert self.counts_N is not None
        counts_N = self.counts_N.double()
        return counts_N * len(counts_N) / counts_N.sum()

    def statistics(self) -> dict[str, float]:
        """Return the means over tokens, and how evenly the experts are loaded; shares in percent."""
        load_N = self.load()
        share_N = load_N / load_N.sum()
        means = {name: total / self.tokens for name, total in self.sums.items()}
        groups = {name: 100 * means[name] for name in ("purity", "coverage") if name in means}
        return (
            means
            | groups
            | {
                "load_max": float(load_N.max()),
                "load_min": float(load_N.min()),
                "load_cv": float(load_N.std(correction=0)),
                "dead": 100 * float((load_N < DEAD).double().mean()),
                "effective": 100 * float(torch.special.entr(share_N).sum().exp()) / len(load_N),
            }
        )


def group_measures(experts_SK: Tensor, granularity: int) -> dict[str, Tensor]:
    """Return what became of virtual groups, as shares: `coverage`, and `purity` where K is divisible by G and a token's picks
    can hold every shard equally often.
    """
    found = {"coverage": shard_coverage(experts_SK, granularity)}
    if experts_SK.shape[1] % granularity == 0:
        found["purity"] = replica_purity(experts_SK, granularity)
    return found


class ExpertWatch(Callback):
    """Watch every MoE layer on evaluation data, and the virtual groups on training batches.

    Logs at test, for each layer as `moe/layer<i>/<name>` and over all as `moe/<name>` (mean; for load_max and dead, which
    are about the worst, too): tokens per expert as multiples of the fair share (`load_max`, `load_min`, `load_cv`), `dead`
    experts and `effective` ones in percent, the router's `entropy` per token in nats, the sum of `kept` probabilities, the
    standard deviation of its logits, both auxiliary losses, `purity` (percent of tokens whose picks hold every shard
    equally often; only where topK is divisible by G), `coverage` (percent of shards that they hold) and the `cosine` of
    experts to what they started from.
    From training: `purity/<s>` and `coverage/<s>` on the batch after s updates, and `train/dropped`, percent of choices.
    The load of every expert after each epoch goes to expert_load.json in the run's folder.

    Processes that train together share batches and validation data, of which they see the sums; test data each sees whole.

    Args:
        net: as it starts, since its experts' similarity is to what they are now.
    """

    def __init__(self, net: Transformer) -> None:
        self.start = {at: layer.up.detach().clone() for at, layer in net.moe_layers().items()}
        self.tallies = {at: Tally() for at in self.start}
        self.groups: dict[str, float] = {}
        self.dropped: list[float] = [0.0, 0.0]  # choices dropped, and all
        self.loads: list[list[list[float]]] = []  # epoch, layer, expert

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold no more of the start than of the net itself, where that is divided among processes."""
        self.start = {at: divided_like(self.start[at], layer.up) for at, layer in _layers(pl_module).items()}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_fit_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        layers, updates = _layers(pl_module), trainer.global_step - 1
        for layer in layers.values():
            if layer.routed is not None and layer.routed.kept_SK is not None:
                lost = trainer.strategy.reduce((~layer.routed.kept_SK).sum(), reduce_op="sum")
                self.dropped[0] += float(lost)
                self.dropped[1] += layer.routed.kept_SK.numel() * trainer.world_size
        if updates in STEPS:
            found = [group_measures(_routing(x).experts_SK, x.experts.granularity) for x in layers.values()]
            for name in found[0] if found else ():
                mean = trainer.strategy.reduce(torch.stack([each[name] for each in found]).mean(), reduce_op="mean")
                self.groups[f"{name}/{updates:05d}"] = 100 * float(mean)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log_dict(self.groups)
        if self.dropped[1]:
            pl_module.log("train/dropped", 100 * self.dropped[0] / self.dropped[1])

    def on_validation_epoch_start(self, *_: Any) -> None:
        self.tallies = {at: Tally() for at in self.tallies}

    def on_test_epoch_start(self, *_: Any) -> None:
        self.on_validation_epoch_start()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for at, layer in _layers(pl_module).items():
            self.tallies[at].add(_routing(layer), layer.experts.granularity)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.on_validation_batch_end(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            for tally in self.tallies.values():
                tally.counts_N = trainer.strategy.reduce(tally.counts_N, reduce_op="sum")
            self.loads.append([[round(x, 4) for x in tally.load().tolist()] for tally in self.tallies.values()])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = _layers(pl_module)
        found = {at: tally.statistics() for at, tally in self.tallies.items()}
        for at, layer in layers.items():
            up = whole(layer.up.detach())
            start = whole(self.start[at]).to(up)
            found[at]["cosine"] = float(F.cosine_similarity(up.flatten(1), start.flatten(1)).mean())
        for at, values in found.items():
            pl_module.log_dict({f"moe/layer{at}/{name}": value for name, value in values.items()})
        names = next(iter(found.values()))
        pl_module.log_dict({f"moe/{name}": sum(v[name] for v in found.values()) / len(found) for name in names})
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir) / "expert_load.json"
            file.write_text(json.dumps({"layers": list(found), "epochs": self.loads}))

    def state_dict(self) -> dict[str, Any]:
        return {"groups": dict(self.groups), "dropped": list(self.dropped), "loads": list(self.loads)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.groups, self.dropped = dict(state_dict["groups"]), list(state_dict["dropped"])
        self.loads = list(state_dict["loads"])


def _layers(module: Any) -> dict[int, MoE]:
    return module.net.moe_layers()


def _routing(layer: MoE) -> Routing:
    if layer.routed is None:
        raise RuntimeError("the MoE layer has not routed anything yet")
    return layer.routed
