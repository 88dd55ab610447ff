"""A decoder-only transformer whose MLPs may be mixtures of experts.

Legend: B batch, S sequence, D width, H heads, k head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_modules.nets.moe import MLP, Experts, MoE
from lit_modules.ops.counting import OpCount, linear_ops

__all__ = ["MLP", "Attention", "Block", "Transformer"]


class Attention(nn.Module):
    """Causal self-attention with rotary positions; kv_heads below heads shares keys and values between groups of heads."""

    def __init__(self, width: int, heads: int, kv_heads: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, head_width
        self.query = nn.Linear(width, heads * head_width, bias=False)
        self.key = nn.Linear(width, kv_heads * head_width, bias=False)
        self.value = nn.Linear(width, kv_heads * head_width, bias=False)
        self.output = nn.Linear(heads * head_width, width, bias=False)

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Map (B, S, D) to (B, S, D); `rope` is what rope_table gives."""
        q_BHSk = self._split(rotate(self.query(x_BSD), rope, self.head_width))
        k_BHSk = self._split(rotate(self.key(x_BSD), rope, self.head_width))
        v_BHSk = self._split(self.value(x_BSD))
        if self.kv_heads < self.heads:  # not enable_gqa: some of torch's attention kernels do not take it
            group = self.heads // self.kv_heads
            k_BHSk, v_BHSk = k_BHSk.repeat_interleave(group, 1), v_BHSk.repeat_interleave(group, 1)
        y_BHSk = F.scaled_dot_product_attention(q_BHSk, k_BHSk, v_BHSk, is_causal=True)
        return self.output(y_BHSk.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_width)).transpose(1, 2)


def rope_table(length: int, heads: int, head_width: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and signed sines (S, H * k) in the dtype and on the device of `like`, for `rotate`.

    Angles are taken in float32 whatever the dtype, as in transformers' Llama, whose checkpoints were trained with those.
    """
    exponents = torch.arange(0, head_width, 2, device=like.device).float() / head_width
    angles = torch.arange(length, device=like.device).float()[:, None] * (1.0 / base**exponents)
    cos, sin = angles.cos().to(like.dtype), angles.sin().to(like.dtype)
    return torch.cat([cos, cos], 1).repeat(1, heads), torch.cat([-sin, sin], 1).repeat(1, heads)


def rotate(x_BSW: Tensor, rope: tuple[Tensor, Tensor], head_width: int) -> Tensor:
    """Turn the pair (i, i + k / 2) of each head by its angle; W is any number of heads side by side.

    All heads in one row, with the halves of each exchanged by a roll: on CPU 2.5 times as fast as head by head.

    Source: RoFormer (arXiv 2104.09864), in the half-split convention of transformers' Llama. RoFormer's own pairs are
        (2i, 2i + 1); the two differ by a permutation of query and key rows.
    """
    cos_SW, sin_SW = (table[:, : x_BSW.shape[-1]] for table in rope)
    exchanged_BSW = x_BSW.unflatten(-1, (-1, 2, head_width // 2)).roll(1, -2).flatten(2)
    return torch.addcmul(x_BSW * cos_SW, exchanged_BSW, sin_SW)


def attention_sizes(width: int, heads: int, kv_heads: int | None, head_width: int | None) -> tuple[int, int]:
    """Return kv_heads and head_width, as given or by default.

    Raises:
        ValueError: sizes that do not divide, or an odd head width, which has no pairs to rotate.
    """
    if head_width is None and width % heads:
        raise ValueError(f"{heads} heads do not divide width {width}; give head_width")
    kv_heads, head_width = kv_heads or heads, head_width or width // heads
    if heads % kv_heads:
        raise ValueError(f"{kv_heads} heads of keys and values do not divide {heads} heads")
    if head_width % 2:
        raise ValueError(f"rotary positions need an even head width, got {head_width}")
    return kv_heads, head_width


def sparse_layers(layers: int, experts: Experts | None, moe_layers: Sequence[int] | None) -> list[int]:
    """Return the indices of the blocks that hold experts.

    Raises:
        ValueError: moe_layers without experts, out of range or twice the same.
    """
    if experts is None:
        if moe_layers:
            raise ValueError(f"moe_layers {list(moe_layers)} need experts")
        return []
    chosen = list(range(layers)) if moe_layers is None else sorted(moe_layers)
    if len(set(chosen)) < len(chosen) or not all(0 <= i < layers for i in chosen):
        raise ValueError(f"moe_layers must be different indices from 0 to {layers - 1}, got {chosen}")
    return chosen


class Block(nn.Module):
    """x + attention(norm x), and then x + mlp(norm x)."""

    def __init__(self, width: int, attention: Attention, mlp: MLP | MoE, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=norm_eps)
        self.attention = attention
        self.mlp_norm = nn.RMSNorm(width, eps=norm_eps)
        self.mlp = mlp

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """Map (B, S, D) to (B, S, D)."""
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))


class Transformer(nn.Module):
    """Next-token logits of every position.

    No biases; RMSNorm before each branch. Weights are drawn from N(0, init_std ** 2), those that write to the residual
    stream (attention's output, down) from a law narrower by sqrt(2 * layers), as in GPT-2 and Megatron-LM.

    Args:
        vocab, width, layers, heads, hidden: V, D, number of blocks, H, hidden width of the dense MLP.
        kv_heads: heads of keys and values; None for as many as heads.
        head_width: k; None for width / heads.
        activation: a name in lit_modules.ops.experts.ACTIVATIONS.
        tied: the head is the embedding, and there is no head.weight.
        experts: None for dense MLPs.
        moe_layers: indices of the blocks whose MLP is a mixture of experts; None for all, if there are experts.
    Shape: int64 (B, S) to (B, S, V).
    Raises:
        ValueError: sizes that do not divide, an odd head width, moe_layers without experts or out of range.
    """

    input_dtype = torch.int64

    def __init__(
        self,
        vocab: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        kv_heads: int | None = None,
        head_width: int | None = None,
        activation: str = "squared_relu",
        tied: bool = False,
        rope_base: float = 10000.0,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        experts: Experts | None = None,
        moe_layers: Sequence[int] | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self.arguments: dict[str, Any] = arguments  # for a twin, or a price
        kv_heads, head_width = attention_sizes(width, heads, kv_heads, head_width)
        sparse = sparse_layers(layers, experts, moe_layers)
        self.heads, self.head_width, self.rope_base = heads, head_width, rope_base
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList()
        for i in range(layers):
            routed = experts if i in sparse else None
            mlp = MLP(width, hidden, activation) if routed is None else MoE(width, hidden, activation, routed)
            self.blocks.append(Block(width, Attention(width, heads, kv_heads, head_width), mlp, norm_eps))
        self.norm = nn.RMSNorm(width, eps=norm_eps)
        self.head = None if tied else nn.Linear(width, vocab, bias=False)
        self.reset_parameters(init_std)

    def reset_parameters(self, std: float) -> None:
        """Draw all matrices but the routers' again."""
        residual_std = std / (2 * len(self.blocks)) ** 0.5
        for name, weight in self.named_parameters():
            if weight.ndim > 1 and not name.endswith("router.weight"):
                residual = name.endswith(("attention.output.weight", "down", "down.weight"))
                nn.init.normal_(weight, std=residual_std if residual else std)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """Return logits (B, S, V); those at s depend on tokens up to s."""
        x_BSD = self.embedding(tokens_BS)
        rope = rope_table(tokens_BS.shape[1], self.heads, self.head_width, self.rope_base, x_BSD)
        for block in self.blocks:
            x_BSD = block(x_BSD, rope)
        x_BSD = self.norm(x_BSD)
        return F.linear(x_BSD, self.embedding.weight) if self.head is None else self.head(x_BSD)

    def scalar_ops(self, tokens_BS: Tensor) -> OpCount:
        """Count the matrix products of a forward pass over these tokens, by formula; nothing is run.

        Projections, routers, the K experts that each token goes to (none dropped), shared experts, head, and attention's
        two products over all S * S pairs, as the dense formula has it, although the causal kernel skips half of them.
        Norms, activations, rotations and the weighted sum over experts are left out.
        """
        tokens, length = tokens_BS.numel(), tokens_BS.shape[-1]
        rows = [self.embedding.weight if self.head is None else self.head.weight]
        total = OpCount()
        block: Any
        for block in self.blocks:
            attention, mlp = block.attention, block.mlp
            rows += [attention.query.weight, attention.key.weight, attention.value.weight, attention.output.weight]
            for inner, outer in ((attention.head_width, length), (length, attention.head_width)):
                total += linear_ops(inner, tokens * attention.heads * outer, bias=False)
            if isinstance(mlp, MoE):
                rows += [mlp.router.weight, *(mlp.shared.parameters() if mlp.experts.shared else ())]
                active = [w[0] for w in (mlp.up, mlp.gate, mlp.down) if w is not None]
                rows += active * mlp.experts.top_k
            else:
                rows += list(mlp.parameters())
        for weight in rows:
            total += linear_ops(weight.shape[1], tokens * weight.shape[0], bias=False)
        return total

    def moe_layers(self) -> dict[int, MoE]:
        """Return the mixtures of experts by the index of their block."""
        return {i: block.mlp for i, block in enumerate(self.blocks) if isinstance(block.mlp, MoE)}
