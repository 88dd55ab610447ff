"""Is the mixture its parent before training, and what has become of its experts since?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.errors import UserError
from experiments.upcycle.hosts import HOSTS
from experiments.upcycle.measure import require_transformers, sample_tokens
from experiments.upcycle.names import EXPERTS
from experiments.upcycle.smollm2 import NAME, load_smollm2, opened
from experiments.upcycle.source import Files, read_config
from lit_modules.ops.similarity import expert_cosine, replica_cosine


@dataclass(frozen=True)
class Difference:
    """Two models on the same tokens, both in float32.

    Attributes:
        tokens: how many.
        max_logit, mean_logit: largest and mean absolute difference of logits.
        logit_std: of the dense model's logits, to compare with.
        same_choice: share of positions with the same most likely token.
        loss_dense, loss_moe: nats per token.
    """

    tokens: int
    max_logit: float
    mean_logit: float
    logit_std: float
    same_choice: float
    loss_dense: float
    loss_moe: float


def verify(dense: str, moe: Path, text: str | None = None) -> Difference:
    """Run both models on a text, one after the other, each as a whole in memory, in float32.

    Raises:
        UserError: no such checkpoint, or one of another vocabulary.
    """
    config = read_config(moe)
    with_tokenizer = moe if any(moe.glob("tokenizer*")) else None
    tokens_S = sample_tokens(with_tokenizer, config["vocab_size"], text)
    outputs = [_logits(name, tokens_S) for name in (dense, str(moe))]
    if outputs[0].shape != outputs[1].shape:
        raise UserError(f"vocabularies differ: {outputs[0].shape[1]} and {outputs[1].shape[1]}")
    apart = (outputs[0] - outputs[1]).abs()
    losses = [torch.nn.functional.cross_entropy(out[:-1], tokens_S[1:]).item() for out in outputs]
    return Difference(
        tokens=len(tokens_S),
        max_logit=apart.max().item(),
        mean_logit=apart.mean().item(),
        logit_std=outputs[0].std().item(),
        same_choice=(outputs[0].argmax(1) == outputs[1].argmax(1)).float().mean().item(),
        loss_dense=losses[0],
        loss_moe=losses[1],
    )


@torch.no_grad()
def _logits(name: str, tokens_S: Tensor) -> Tensor:
    if name == NAME:
        model: Any = load_smollm2()[0]
    else:
        read_config(Path(name))
        model = require_transformers().AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model.eval()(tokens_S[None]).logits[0]


@dataclass(frozen=True)
class LayerState:
    """One layer's experts (see lit_modules.ops.similarity) and router.

    Attributes:
        parent: mean cosine of experts to the parent's shard, over up, gate and down.
        parent_least: the least of them.
        replicas: mean cosine between replicas of a shard; None where there is one replica.
        router_std: of the router's weights.
    """

    layer: int
    parent: float
    parent_least: float
    replicas: float | None
    router_std: float


def inspect_experts(moe: Path, dense: str) -> list[LayerState]:
    """Compare every mixture's experts with the dense MLP that they came from; read matrix by matrix.

    Raises:
        UserError: not a mixture that is known here, or one that does not come from this parent.
    """
    config = read_config(moe)
    host = config.get("model_type")
    if host not in HOSTS:
        raise UserError(f"{moe} is not a mixture of experts that is known here ({host}); known: {', '.join(HOSTS)}")
    files = Files(moe)
    width = config["intermediate_size"] if host == "mixtral" else config["moe_intermediate_size"]
    sparse = [i for i in range(config["num_hidden_layers"]) if i not in (config.get("mlp_only_layers") or [])]
    with opened(dense) as source:
        hidden = source.config["intermediate_size"]
        if hidden % width or source.config["num_hidden_layers"] != config["num_hidden_layers"]:
            raise UserError(f"{moe} does not come from {dense}: experts of {width} units are no shards of {hidden}")
        return [_state(files, host, i, source, hidden // width) for i in sparse]


def _state(files: Files, host: str, layer: int, source: Any, granularity: int) -> LayerState:
    module, names = EXPERTS[host]
    prefix = f"model.layers.{layer}.{module}"
    router = files[f"{prefix}.gate.weight"].float()
    cosines, replicas = [], []
    for ours, theirs in names.items():
        experts = torch.stack([files[f"{prefix}.experts.{e}.{theirs}.weight"] for e in range(len(router))]).double()
        dense = source[f"blocks.{layer}.mlp.{ours}.weight"].double()
        if ours == "down":  # shards are of its columns
            experts, dense = experts.mT, dense.T
        cosines.append(expert_cosine(experts, dense, granularity))
        if len(router) > granularity:
            replicas.append(replica_cosine(experts, granularity).mean().item())
    return LayerState(
        layer,
        torch.stack(cosines).mean().item(),
        torch.stack(cosines).min().item(),
        sum(replicas) / len(replicas) if replicas else None,
        router.std(correction=0).item(),
    )
