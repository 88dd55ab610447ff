"""Tiny random dense models for the upcycling tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
KINDS = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def dense(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, shard: str = "5GB", **changes: Any
) -> Path:
    """Write a random dense model and return its folder."""
    own = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 16}}.get(kind, {})
    config = getattr(transformers, f"{KINDS[kind]}Config")(**SIZES | own | changes)
    torch.manual_seed(1)
    model = getattr(transformers, f"{KINDS[kind]}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # norms of ones and biases of zeros would hide a mistake
                weight.add_(torch.randn_like(weight) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def tokens() -> torch.Tensor:
    """Return a batch of tokens (2, 24)."""
    return torch.randint(SIZES["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """Return the logits (2, 24, V) of a checkpoint, in float32, loaded without remote code."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(tokens()).logits
