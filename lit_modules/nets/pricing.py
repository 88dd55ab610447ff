"""What a transformer of any shape costs, without building it: parameters, FLOPs per token and bytes.

Legend: D width, F hidden width, H heads, k head width, V vocabulary, N experts, K chosen per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lit_modules.nets.moe import Experts
from lit_modules.nets.transformer import attention_sizes, sparse_layers
from lit_modules.ops.experts import activation_named

Precision = Literal["fp32", "bf16-mixed"]

# How many tensors of the hidden width an eager backward pass needs, the input of the down projection among them. The ReLU
# keeps its result, which is what comes after it; the others keep what comes before and after them.
KEPT = {"relu": 1, "squared_relu": 2, "gelu": 2, "silu": 2, "reglu": 3, "swiglu": 4, "geglu": 4}


@dataclass(frozen=True)
class Shape:
    """The arguments of lit_modules.nets.transformer.Transformer, which says what they mean.

    Raises:
        ValueError: what the Transformer would refuse.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    hidden: int
    kv_heads: int | None = None
    head_width: int | None = None
    activation: str = "squared_relu"
    tied: bool = False
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    experts: Experts | None = None
    moe_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        attention_sizes(self.width, self.heads, self.kv_heads, self.head_width)
        activation_named(self.activation)
        sparse_layers(self.layers, self.experts, self.moe_layers)
        if self.experts is not None:
            self.experts.width(self.hidden)


@dataclass(frozen=True)
class Price:
    """What a shape costs.

    Attributes:
        params: all parameters.
        params_embedding: those of the embedding and, unless tied, of the head.
        params_active: those that one token meets: all but the experts it does not go to.
        params_experts: those of all routed experts.
        flops_forward: per token, two for each multiplication of a matrix product; attention as if over all pairs.
        flops_training: per token, forward and backward: three times the forward pass.
        bytes_weights: in bf16-mixed with the bfloat16 copy of every matrix that autocast keeps until the backward pass.
        bytes_gradients: in the dtype of the weights, float32.
        bytes_adam: two float32 moments.
        bytes_activations: per sequence, what the backward pass needs of the forward pass and the loss, nothing recomputed.
    """

    params: int
    params_embedding: int
    params_active: int
    params_experts: int
    flops_forward: int
    flops_training: int
    bytes_weights: int
    bytes_gradients: int
    bytes_adam: int
    bytes_activations: int


def price(shape: Shape, context: int, precision: Precision = "bf16-mixed") -> Price:
    """Price a shape for sequences of `context` tokens, with AdamW.

    A mixture of experts costs 2 (K/G) MLP + 2 N D FLOPs per token, and 2 MLP per shared one of width F / G over G.

    Raises:
        ValueError: an unknown precision, a context below 1.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"unknown precision {precision!r}; known: {', '.join(get_args(Precision))}")
    if context < 1:
        raise ValueError(f"the context must be at least 1, got {context}")
    kv_heads, head_width = attention_sizes(shape.width, shape.heads, shape.kv_heads, shape.head_width)
    sparse = len(sparse_layers(shape.layers, shape.experts, shape.moe_layers))
    dense = shape.layers - sparse
    matrices = 3 if activation_named(shape.activation).gated else 2
    table, mlp = shape.vocab * shape.width, matrices * shape.width * shape.hidden
    attention = 2 * shape.width * head_width * (shape.heads + kv_heads)
    norms = shape.width * (2 * shape.layers + 1)
    routed, chosen, aside, extra = _experts(shape, mlp)

    active = (
        shape.layers * attention + dense * mlp + sparse * (chosen + aside) + table
    )  # matrices that a token multiplies
    matrix = active + sparse * (routed - chosen)
    lookup = 0 if shape.tied else table
    params = matrix + lookup + norms + sparse * extra
    flops = 2 * active + 4 * shape.layers * context * shape.heads * head_width
    return Price(
        params=params,
        params_embedding=table + lookup,
        params_active=params - sparse * (routed - chosen),
        params_experts=sparse * routed,
        flops_forward=flops,
        flops_training=3 * flops,
        bytes_weights=4 * params + (2 * matrix if precision == "bf16-mixed" else 0),
        bytes_gradients=4 * params,
        bytes_adam=8 * params,
        bytes_activations=context * _activations(shape, head_width, dense, sparse, 4 if precision == "fp32" else 2),
    )


def _experts(shape: Shape, mlp: int) -> tuple[int, int, int, int]:
    """Parameters of one layer: routed experts, those of the K chosen, router and shared experts, factor or norm."""
    spec = shape.experts
    if spec is None:
        return 0, 0, 0, 0
    expert = mlp // spec.granularity
    extra = {"learnable": 1, "layernorm": shape.width}.get(spec.output, 0)
    return spec.count * expert, spec.top_k * expert, spec.count * shape.width + spec.shared * expert, extra


def _activations(shape: Shape, head_width: int, dense: int, sparse: int, size: int) -> int:
    """Bytes per token; `size` is that of a number in a matrix product. The residual stream, norms and router are float32.

    Norms are taken as fused: their input and one number are kept. Attention is flash: query, key, value, output and one
    number per head, with keys and values repeated for every head. Autocast casts the input of each projection anew.
    """
    D, H, mixed = shape.width, shape.heads, size < 4
    gates = activation_named(shape.activation).gated
    norm, kept = 4 * (D + 1), size * KEPT[shape.activation]
    attention = size * (4 * H * head_width + D * (3 if mixed else 1)) + 4 * H
    mlp_input = size * D * (1 + gates if mixed else 1)
    total = shape.layers * (2 * norm + attention) + dense * (mlp_input + kept * shape.hidden)
    total += norm + size * D + 4 * shape.vocab  # head, and log-softmax of the logits
    spec = shape.experts
    if spec is None or not sparse:
        return total
    narrow, N, K = shape.hidden // spec.granularity, spec.count, spec.top_k
    routing = 4 * (D + N) + 8 * K  # input of the router, probabilities, choices
    if spec.order == "topk_softmax":
        routing += 4 * (N + K)  # logits and weights as well
    rows = K * (
        8 * (2 if K == 1 else 3) + 4 + size * D + kept * narrow + size * min(narrow, D)
    )  # indices, weight, numbers
    shared = kept * spec.shared * narrow + (mlp_input if mixed else 0) if spec.shared else 0
    return total + sparse * (routing + rows + shared)


# Named shapes. nano and micro are for one CPU core; base and large are ours, in GPT-2's proportions.
# gpt_2b: sizes from the NeMo configuration inside nvidia/GPT-2B-001's checkpoint, as printed in public copies of it; inferred
#   for the paper, which gives none. The checkpoint rotates half of each head and has LayerNorm; here all is rotated, and norms
#   are RMSNorm.
# nemotron_15b: 32 layers, 6144, 48 heads and 8 of keys and values are public; hidden 4 * 6144 is inferred, and gives the public
#   12.5B + 3.1B parameters. LayerNorm and half-rotated heads as above.
# smollm2_135m: from the configuration of HuggingFaceTB/SmolLM2-135M.
SIZES = {
    "nano": Shape(vocab=256, width=64, layers=3, heads=4, hidden=256),
    "micro": Shape(vocab=256, width=96, layers=4, heads=4, hidden=384),
    "base": Shape(vocab=32_000, width=768, layers=12, heads=12, hidden=3072, tied=True),
    "large": Shape(vocab=32_000, width=1792, layers=24, heads=14, hidden=7168),
    "gpt_2b": Shape(vocab=256_000, width=2048, layers=24, heads=16, hidden=5440, activation="swiglu"),
    "nemotron_15b": Shape(vocab=256_000, width=6144, layers=32, heads=48, hidden=24_576, kv_heads=8),
    "smollm2_135m": Shape(
        vocab=49_152,
        width=576,
        layers=30,
        heads=9,
        hidden=1536,
        kv_heads=3,
        activation="swiglu",
        tied=True,
        rope_base=100_000.0,
    ),
}
