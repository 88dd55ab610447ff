"""The names of weights: ours (lit_modules.nets.transformer) and Hugging Face's, for dense models and for mixtures.

A mapping here never drops a key: what it does not know is an error that names every such key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from experiments.errors import UserError

OUTER = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
INNER = {
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    **{
        f"attention.{ours}{a}": f"self_attn.{theirs}_proj.{b}"
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o"))
        for a, b in ((".weight", "weight"), ("_bias", "bias"))
    },
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    **{f"mlp.{name}.weight": f"mlp.{name}_proj.weight" for name in ("up", "gate", "down")},
}
# Biases have names of their own here ("query_bias"), as the mixtures' converter refuses keys that end in ".bias".
BUFFERS = re.compile(r"(.+\.)?rotary_emb\.inv_freq")  # old checkpoints hold it; it follows from the configuration
EXPERTS = {
    "mixtral": ("block_sparse_moe", {"up": "w3", "gate": "w1", "down": "w2"}),
    "qwen2_moe": ("mlp", {"up": "up_proj", "gate": "gate_proj", "down": "down_proj"}),
    "qwen3_moe": ("mlp", {"up": "up_proj", "gate": "gate_proj", "down": "down_proj"}),
}


def to_llama_name(key: str) -> str | None:
    """Return Hugging Face's name of one of our dense weights, or None where there is none."""
    if key in OUTER:
        return OUTER[key]
    hit = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    return f"model.layers.{hit[1]}.{INNER[hit[2]]}" if hit and hit[2] in INNER else None


def from_llama_name(key: str) -> str | None:
    """Return our name of one of Hugging Face's dense weights, or None where there is none."""
    for ours, theirs in OUTER.items():
        if key == theirs:
            return ours
    hit = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", key)
    inner = {theirs: ours for ours, theirs in INNER.items()}
    return f"blocks.{hit[1]}.{inner[hit[2]]}" if hit and hit[2] in inner else None


def to_llama_names(keys: Iterable[str]) -> dict[str, str]:
    """Return {our name: Hugging Face's name} of dense weights, in the order of `keys`.

    Raises:
        UserError: keys that have no such name, all of them.
    """
    return _mapped(keys, to_llama_name, "a Llama-like Hugging Face model")


def from_llama_names(keys: Iterable[str]) -> dict[str, str]:
    """Return {Hugging Face's name: our name} of dense weights, in the order of `keys`; position buffers are left out.

    Raises:
        UserError: keys that have no such name, all of them.
    """
    return _mapped((key for key in keys if not BUFFERS.fullmatch(key)), from_llama_name, "our transformer")


def _mapped(keys: Iterable[str], name: Callable[[str], str | None], target: str) -> dict[str, str]:
    found = {key: name(key) for key in keys}
    unknown = [key for key, mapped in found.items() if mapped is None]
    if unknown:
        shown = "\n".join(f"  {key}" for key in unknown[:20]) + (
            f"\n  and {len(unknown) - 20} more" if unknown[20:] else ""
        )
        raise UserError(f"{len(unknown)} weights have no place in {target}:\n{shown}")
    return {key: mapped for key, mapped in found.items() if mapped is not None}


def host_tensors(host: str, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield one of our weights as `host` names it: an expert matrix (N, ., .) as N views, everything else as it is.

    Raises:
        UserError: a weight that has no place in the host.
    """
    module, matrices = EXPERTS[host]
    hit = re.fullmatch(r"blocks\.(\d+)\.mlp\.(router\.weight|up|gate|down)", key)
    if hit is None:
        yield to_llama_names([key])[key], tensor
    elif hit[2] == "router.weight":
        yield f"model.layers.{hit[1]}.{module}.gate.weight", tensor
    else:
        for expert, part in enumerate(tensor):
            yield f"model.layers.{hit[1]}.{module}.experts.{expert}.{matrices[hit[2]]}.weight", part
