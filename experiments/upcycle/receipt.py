"""The receipt of a conversion: what was done, what it costs, and how far the start is from the parent."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from experiments.upcycle.hosts import ACTIVATIONS, extra_shapes
from experiments.upcycle.measure import Step0
from lit_modules.nets.moe import Experts
from lit_modules.nets.pricing import Price, Shape, price
from lit_modules.ops.upcycling import Target

if TYPE_CHECKING:
    from experiments.upcycle.convert import Conversion

PRICED_CONTEXT = 2048
ROUTER_STD = 0.02  # of a net that is built only to be priced


def shape_of(config: Mapping[str, Any], target: Target | None = None) -> Shape:
    """Return a completed dense configuration as a shape to be priced or built; biases and norms on q and k are left out."""
    rope = config.get("rope_parameters") or {}
    experts = None
    if target is not None:
        order: Any = target.order
        std = target.router_std if target.router_std is not None else ROUTER_STD
        experts = Experts(target.expansion, target.granularity, target.top_k, order, router_std=std)
    return Shape(
        vocab=config["vocab_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        kv_heads=config["num_key_value_heads"],
        head_width=config["head_dim"],
        activation=ACTIVATIONS[config["hidden_act"]],
        tied=config["tie_word_embeddings"],
        rope_base=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        norm_eps=config["rms_norm_eps"],
        init_std=config["initializer_range"],
        experts=experts,
        moe_layers=target.layers if target is not None else None,
    )


def receipt_of(
    job: Conversion, layers: Mapping[int, Step0], sample: int, files: list[str], size: int
) -> dict[str, Any]:
    """Return everything that was done, as plain data."""
    source, receipt, config = job.source, job.plan.receipt, job.source.config
    extra = {key: s for i in job.target.layers for key, s in extra_shapes(job.host, i, config["hidden_size"]).items()}
    added = sum(math.prod(shape) for shape in extra.values())
    prices = [price(shape_of(config, target), PRICED_CONTEXT) for target in (None, job.target)]
    options = {key: value for key, value in asdict(job.options).items() if key != "text"}
    return {
        "source": {"name": source.name, "sha256": source.sha256, "model_type": config["model_type"]},
        "host": job.host,
        "options": options | {"router_std": job.recipe.router_std, "layers": list(job.target.layers)},
        "correction": receipt.correction,
        "factors": asdict(receipt.factors),
        "router_sigma_expected": receipt.router_sigma,
        "parameters": {
            "before": receipt.parameters_before,
            "after": receipt.parameters_after + added,
            "of_the_host_alone": added,
            "active": _active(prices, receipt.parameters_after),
        },
        "flops_per_token": {
            "context": PRICED_CONTEXT,
            "before": prices[0].flops_forward,
            "after": prices[1].flops_forward,
        },
        "bytes": size,
        "step0": _summary(layers, sample),
        "router_aux_loss_coef": {
            "ours_per_layer": job.options.balance,
            "hugging_face": job.config["router_aux_loss_coef"],
            "note": "ours / T; Hugging Face pools all layers into one term where the paper adds one term per layer",
        },
        "keys": {"copied": receipt.copied, "derived": receipt.derived, "new": [*receipt.new, *extra]},
        "tokenizer_files": files,
        "versions": {name: _version(name) for name in ("fivefold", "torch", "safetensors", "transformers")},
        "warnings": list(job.warnings),
    }


def _active(prices: Sequence[Price], after: int) -> int:
    """Parameters that a token meets: all but the experts that it does not go to."""
    return after - (prices[1].params - prices[1].params_active)


def _summary(layers: Mapping[int, Step0], sample: int) -> dict[str, Any] | None:
    if not layers:
        return None
    worst = max(layers, key=lambda i: layers[i].relative_error)
    return {
        "tokens": sample,
        "largest_relative_error": layers[worst].relative_error,
        "at_layer": worst,
        "layers": {str(i): step.as_dict() for i, step in layers.items()},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
