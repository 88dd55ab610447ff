"""Which Hugging Face architecture can hold an upcycled model without code of its own, and the configuration that says so.

    source           topk_softmax            softmax_topk
    Qwen3            qwen3_moe               qwen3_moe
    Qwen2            qwen2_moe               qwen2_moe (with biases on query, key and value)
    Llama, Mistral   mixtral (all layers)    qwen2_moe (no biases, a shared expert of zeros)

Mixtral divides the kept probabilities by their sum, which is topk_softmax; it cannot express softmax_topk. The Qwen
architectures have norm_topk_prob for either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.errors import UserError
from experiments.schema import nearest

HOSTS = {"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}
SOURCES = ("llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu"}
SHARED = 8  # width of the shared expert that Qwen2-MoE insists on; all zeros, it neither acts nor gets a gradient

# What a source's configuration means where it is silent. The hosts' own defaults differ, so all of it is written out.
COMMON = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": COMMON | {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": COMMON
    | {
        "max_position_embeddings": 131_072,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    "qwen2": COMMON | {"max_position_embeddings": 32_768, "use_sliding_window": False},
    "qwen3": COMMON | {"max_position_embeddings": 32_768, "use_sliding_window": False, "head_dim": 128},
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Of the source's own architecture: meaningless or wrong in the host.
DROPPED = {
    *("architectures", "auto_map", "_name_or_path", "_model_name_or_path", "transformers_version"),
    *("attention_bias", "mlp_bias", "pretraining_tp", "quantization_config"),
    *("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"),
}


def completed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a dense model's configuration with what it leaves to its architecture's defaults written out.

    Raises:
        UserError: an architecture that is not known here, sizes that are missing, or a quantised checkpoint.
    """
    kind = config.get("model_type")
    if kind in HOSTS:
        raise UserError(f"the source is a mixture of experts already ({kind})")
    if kind not in SOURCES:
        raise UserError(f"model_type {kind!r} cannot be upcycled here; known: {', '.join(SOURCES)}")
    missing = [name for name in REQUIRED if name not in config]
    if missing:
        raise UserError(f"the source's config.json lacks {', '.join(missing)}")
    if config.get("quantization_config"):
        raise UserError("the source is quantised: save it with full weights first")
    full = DEFAULTS[kind] | dict(config)
    if full.get("num_key_value_heads") is None:
        full["num_key_value_heads"] = full["num_attention_heads"]
    if full.get("head_dim") is None:
        full["head_dim"] = full["hidden_size"] // full["num_attention_heads"]
    if not full.get("rope_parameters") and "rope_theta" not in full:
        full["rope_theta"] = 10_000.0
    if full["hidden_act"] not in ACTIVATIONS:
        raise UserError(f"hidden_act {full['hidden_act']!r} is not known here; known: {', '.join(ACTIVATIONS)}")
    return full


def source_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return our names and the shapes of all weights that a completed dense configuration asks for, in a model's order."""
    D, F, k = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    rows = {"query": config["num_attention_heads"] * k, "key": config["num_key_value_heads"] * k}
    rows["value"] = rows["key"]
    kind = config["model_type"]
    biased = ["query", "key", "value"] if kind == "qwen2" else []
    if kind in ("llama", "qwen3") and config.get("attention_bias"):
        biased = ["query", "key", "value", "output"]
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (config["vocab_size"], D)}
    for i in range(config["num_hidden_layers"]):
        block = f"blocks.{i}"
        shapes[f"{block}.attention_norm.weight"] = (D,)
        shapes |= {f"{block}.attention.{name}.weight": (count, D) for name, count in rows.items()}
        shapes[f"{block}.attention.output.weight"] = (D, rows["query"])
        shapes |= {f"{block}.attention.{name}_bias": (rows.get(name, D),) for name in biased}
        if kind == "qwen3":
            shapes |= {f"{block}.attention.{name}_norm.weight": (k,) for name in ("query", "key")}
        shapes[f"{block}.mlp_norm.weight"] = (D,)
        shapes |= {f"{block}.mlp.{name}.weight": (F, D) for name in ("up", "gate")}
        shapes[f"{block}.mlp.down.weight"] = (D, F)
    shapes["norm.weight"] = (D,)
    if not config["tie_word_embeddings"]:
        shapes["head.weight"] = (config["vocab_size"], D)
    return shapes


def choose_host(config: Mapping[str, Any], order: str, partial: bool, forced: str | None = None) -> str:
    """Return the architecture that will hold the mixture.

    Args:
        config: a completed dense configuration.
        partial: whether some layers stay dense.
        forced: the one that was asked for, which is checked.
    Raises:
        UserError: none can hold it, or the one that was asked for cannot, with the reason.
    """
    kind = config["model_type"]
    natural = {"qwen3": "qwen3_moe", "qwen2": "qwen2_moe"}.get(kind)
    host = forced or natural or ("mixtral" if order == "topk_softmax" and not partial else "qwen2_moe")
    if host not in HOSTS:
        raise UserError(f"unknown host '{host}'{nearest(host, HOSTS)}")
    reason = _refusal(config, host, order, partial)
    if reason:
        raise UserError(f"{kind} with {order} does not fit into {host}: {reason}")
    return host


def _refusal(config: Mapping[str, Any], host: str, order: str, partial: bool) -> str | None:
    kind = config["model_type"]
    if (kind == "qwen3") != (host == "qwen3_moe"):
        return "only Qwen3 has norms on queries and keys, and only Qwen3-MoE can hold them"
    if kind == "qwen2" and host != "qwen2_moe":
        return "Qwen2 has biases on query, key and value, which only Qwen2-MoE can hold"
    if host == "mixtral" and order == "softmax_topk":
        return (
            "Mixtral divides the kept probabilities by their sum, which is topk_softmax, and has no switch for it; "
            "use --host qwen2_moe, or --order topk_softmax with T of at least 2"
        )
    if host == "mixtral" and partial:
        return "Mixtral has no dense layers; use --host qwen2_moe"
    if kind == "llama" and (config.get("attention_bias") or config.get("mlp_bias")):
        return "it has biases, which no mixture here can hold"
    if kind == "mistral" and host == "qwen2_moe" and config["sliding_window"] is not None:
        return "Qwen2-MoE applies sliding windows to other layers than Mistral; set sliding_window to null if it is not used"
    if kind in ("qwen2", "qwen3") and config["use_sliding_window"]:
        return "models with sliding windows in some layers are not supported"
    return None


def host_config(
    config: Mapping[str, Any],
    host: str,
    experts: int,
    width: int,
    top_k: int,
    order: str,
    dense_layers: list[int],
    balance: float,
) -> dict[str, Any]:
    """Return the content of config.json.

    Args:
        config: a completed dense configuration.
        experts, width, top_k, order: N, hidden width of an expert, T, and of softmax and topK.
        dense_layers: indices of the layers that stay dense.
        balance: our coefficient of the load-balancing loss. Hugging Face's loss counts T choices per token as T, so its
            coefficient is ours / T; and it pools all layers into one term where the paper adds one term per layer.
    """
    made = {key: value for key, value in config.items() if key not in DROPPED}
    made |= {
        "architectures": [HOSTS[host]],
        "model_type": host,
        "num_experts_per_tok": top_k,
        "router_aux_loss_coef": balance / top_k,
        "output_router_logits": False,
    }
    if host == "mixtral":
        window = config.get("sliding_window")
        return made | {"num_local_experts": experts, "intermediate_size": width, "sliding_window": window}
    made |= {
        "num_experts": experts,
        "moe_intermediate_size": width,
        "norm_topk_prob": order == "topk_softmax",
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense_layers,
        "use_sliding_window": False,
    }
    if host == "qwen2_moe":
        made |= {"shared_expert_intermediate_size": SHARED, "qkv_bias": config["model_type"] == "qwen2"}
    else:
        made["attention_bias"] = bool(config.get("attention_bias", False))
    return made


def extra_shapes(host: str, layer: int, width: int) -> dict[str, tuple[int, int]]:
    """Return the weights that only the host has: Qwen2-MoE's shared expert and its gate."""
    if host != "qwen2_moe":
        return {}
    mlp = f"model.layers.{layer}.mlp"
    return {
        f"{mlp}.shared_expert.gate_proj.weight": (SHARED, width),
        f"{mlp}.shared_expert.up_proj.weight": (SHARED, width),
        f"{mlp}.shared_expert.down_proj.weight": (width, SHARED),
        f"{mlp}.shared_expert_gate.weight": (1, width),
    }
