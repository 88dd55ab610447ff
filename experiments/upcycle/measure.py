"""How far an upcycled layer is from its parent before any training, on the parent's own activations.

The parent is walked layer by layer in float32, with Hugging Face's own modules, so that no more than one layer is held.
Legend: S tokens, D width, N experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.errors import UserError
from experiments.upcycle.names import to_llama_name
from experiments.upcycle.source import Source
from lit_modules.ops.experts import expert_mlp
from lit_modules.ops.routing import Order, route
from lit_modules.ops.similarity import shard_coverage

SAMPLE = (
    "The lighthouse keeper climbed the stairs every evening, counting them as his father had done, and lit the lamp before "
    "the first ships came round the point. In winter the wind took the words out of his mouth; in summer he read aloud to "
    "the gulls. def area(width, height): return width * height. Between 1850 and 1900 the number of lights on this coast "
    "grew from 12 to 47, and most of them were tended by families. Nobody thought that a machine would ever do it."
)


def require_transformers() -> Any:
    """Return the transformers package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError("this needs the package transformers: uv pip install 'fivefold[smollm2]'") from error
    return transformers


def sample_tokens(tokenizer: Path | None, vocab: int, text: str | None = None, length: int = 96) -> Tensor:
    """Return at most `length` tokens (S,) of a text, or random ones, always the same, where there is no tokeniser.

    Args:
        tokenizer: the folder that holds one.
    Raises:
        UserError: a text of fewer than two tokens; transformers is not installed.
    """
    if tokenizer is None or not any(tokenizer.glob("tokenizer*")):
        return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(0))
    coder = require_transformers().AutoTokenizer.from_pretrained(tokenizer)
    tokens = coder(text or SAMPLE, return_tensors="pt").input_ids[0, :length]
    if len(tokens) < 2:
        raise UserError(f"the sample text gives {len(tokens)} tokens; at least 2 are needed")
    return tokens


class DenseWalk:
    """The parent's forward pass over a few tokens, one layer at a time, in float32.

    Args:
        source: the parent; its tensors are read when their layer is reached.
        tokens_S: fewer than any sliding window.
    """

    def __init__(self, source: Source, tokens_S: Tensor) -> None:
        transformers = require_transformers()
        self.source = source
        config = transformers.AutoConfig.for_model(**source.config)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", dtype=torch.float32
            )
        self.layers = model.model.layers
        embedding = source["embedding.weight"]
        self.hidden = embedding[tokens_S].float()[None]
        self.positions = torch.arange(len(tokens_S))[None]
        self.rope = type(model.model.rotary_emb)(config)(self.hidden, self.positions)

    @torch.no_grad()
    def step(self, index: int) -> tuple[Tensor, Tensor]:
        """Go through layer `index`, to be called in order; return what its MLP saw and said, (S, D) each."""
        layer, block = self.layers[index], f"blocks.{index}."
        prefix = f"model.layers.{index}."
        keys = [key for key in self.source if key.startswith(block)]
        state = {str(to_llama_name(key)).removeprefix(prefix): self.source[key].float() for key in keys}
        layer.load_state_dict(state, assign=True)
        layer.eval()
        seen: list[Tensor] = []
        hook = layer.mlp.register_forward_hook(lambda _, given, said: seen.extend((given[0][0], said[0])))
        out = layer(self.hidden, attention_mask=None, position_ids=self.positions, position_embeddings=self.rope)
        hook.remove()
        self.hidden = out[0] if isinstance(out, tuple) else out
        layer.to("meta")
        return seen[0], seen[1]


@dataclass(frozen=True)
class Step0:
    """One layer before any training.

    Attributes:
        relative_error: norm of (mixture - dense) over the norm of dense, all tokens together.
        gain: the regression slope of the mixture's output on the dense one's; 1 where they agree.
        router_logit_std: over the N logits of a token, mean over tokens.
        kept_probability: sum of the K kept weights, mean over tokens; T / (E G) for softmax_topk with equal logits, else 1.
        shard_coverage: share of the G shards that a token's picks hold, mean over tokens.
    """

    relative_error: float
    gain: float
    router_logit_std: float
    kept_probability: float
    shard_coverage: float

    def as_dict(self) -> dict[str, float]:
        """As plain data."""
        return asdict(self)


@torch.no_grad()
def measure_step0(
    x_SD: Tensor,
    dense_SD: Tensor,
    made: Mapping[str, Tensor],
    top_k: int,
    order: Order,
    granularity: int,
    activation: str,
) -> Step0:
    """Compare a mixture with the MLP that it was made of.

    Args:
        x_SD, dense_SD: what the MLP saw and said, float32.
        made: router.weight (N, D), up, gate and down of the mixture, in any dtype; computed in float32.
    """
    routing = route(x_SD @ made["router.weight"].float().T, top_k, order)
    mixed_SD = expert_mlp(x_SD, routing, made["up"].float(), made["down"].float(), made["gate"].float(), activation)
    return Step0(
        relative_error=((mixed_SD - dense_SD).norm() / dense_SD.norm()).item(),
        gain=((mixed_SD * dense_SD).sum() / dense_SD.square().sum()).item(),
        router_logit_std=routing.logits_SN.std(1).mean().item() if routing.logits_SN.shape[1] > 1 else 0.0,
        kept_probability=routing.weights_SK.sum(1).mean().item(),
        shard_coverage=shard_coverage(routing.experts_SK, granularity).item(),
    )
