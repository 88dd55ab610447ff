"""Nets as a sequence of named blocks, one tensor in and one out, so that a pipeline may be cut between any two of them.

Small enough to be run for real by several processes on one machine. Names of weights and the traced graph agree.
Legend: N rows, D width, F hidden width, B sequences, S tokens, H heads, k head width, V vocabulary, C channels, K outputs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """x + down(gelu(up(x))), the last dimension being D; without `residual` the x is left out."""

    def __init__(self, width: int, hidden: int, residual: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        y = self.down(F.gelu(self.up(x)))
        return x + y if self.residual else y


class SelfAttention(nn.Module):
    """Bidirectional attention with biases, by SDPA. Sequences and heads are counted by what the projections return, so that a
    process that holds some rows of q, k and v, and the columns of o that belong to them, computes with some of the heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"{heads} heads do not divide width {width}")
        self.head_width = width // heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, D)."""
        heads = (-1, self.head_width)
        q, k, v = (f(x_BSD).unflatten(-1, heads).transpose(1, 2) for f in (self.q, self.k, self.v))
        y_BHSk = F.scaled_dot_product_attention(q, k, v)
        return self.o(y_BHSk.transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """BERT's layer: attention and MLP, a LayerNorm after each sum. Source: arXiv 1810.04805 (post-norm, GELU)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention, self.attention_norm = SelfAttention(width, heads), nn.LayerNorm(width)
        self.mlp, self.mlp_norm = FeedForward(width, hidden), nn.LayerNorm(width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, D)."""
        x_BSD = self.attention_norm(x_BSD + self.attention(x_BSD))
        return self.mlp_norm(x_BSD + self.mlp(x_BSD))


class TokensToVectors(nn.Module):
    """Embedding and LayerNorm. Integer (B, S) to (B, S, D)."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(vocab, width), nn.LayerNorm(width)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Map tokens (B, S) to (B, S, D)."""
        return self.norm(self.table(ids_BS))


class ConvStage(nn.Module):
    """Convolutions 3 x 3 with ReLU, and then max-pooling by 2."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(channels))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C', H / 2, W / 2)."""
        for conv in self.convs:
            x_NCHW = F.relu(conv(x_NCHW))
        return F.max_pool2d(x_NCHW, 2)


class Classifier(nn.Module):
    """VGG's end: three fully connected layers on the flattened maps, which hold nearly all weights."""

    def __init__(self, features: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(features, hidden), nn.Linear(hidden, hidden)
        self.predictions = nn.Linear(hidden, classes)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, K)."""
        return self.predictions(F.relu(self.fc2(F.relu(self.fc1(x_NCHW.flatten(1))))))


def mlp_stack(blocks: int, width: int, hidden: int) -> nn.Sequential:
    """Return `blocks` residual blocks D -> F -> D."""
    return _named("block", [FeedForward(width, hidden, residual=True) for _ in range(blocks)])


def encoder_stack(blocks: int, width: int, heads: int, hidden: int, vocab: int) -> nn.Sequential:
    """Return an embedding, `blocks` BERT layers and a head that returns logits of every position (B, S, V)."""
    layers = [EncoderBlock(width, heads, hidden) for _ in range(blocks)]
    return _named("block", layers, first=TokensToVectors(vocab, width), last=nn.Linear(width, vocab))


def conv_stack(channels: Sequence[Sequence[int]], image: int, hidden: int, classes: int) -> nn.Sequential:
    """Return one ConvStage for each list of channels, each beginning with what the one before ends with, and a Classifier.

    Raises:
        ValueError: an image that cannot be halved that often.
    """
    side = image >> len(channels)
    if side << len(channels) != image or side == 0:
        raise ValueError(f"an image of {image} pixels cannot be halved {len(channels)} times")
    end = Classifier(channels[-1][-1] * side * side, hidden, classes)
    return _named("stage", [ConvStage(c) for c in channels], last=end)


def _named(
    name: str, blocks: Sequence[nn.Module], first: nn.Module | None = None, last: nn.Module | None = None
) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if first is not None:
        parts["embedding"] = first
    parts.update((f"{name}{i}", block) for i, block in enumerate(blocks))
    if last is not None:
        parts["head"] = last
    return nn.Sequential(parts)


def initialise_(net: nn.Module, seed: int) -> nn.Module:
    """Draw all weights again from a generator of their own, U(-1, 1) / sqrt(fan in); LayerNorms stay at 1 and 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.LayerNorm):
                continue
            for parameter in module.parameters(recurse=False):
                fan_in = parameter[0].numel() if parameter.ndim > 1 else parameter.numel()
                drawn = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) * 2 - 1
                parameter.copy_(drawn / fan_in**0.5)
    return net
