"""The language models that plans are made for, written plainly: every head-split attention is one call, every weight is apart.

Legend: B batch, S length (T of keys), D width, H heads, k head width, V vocabulary.

Shapes and parameter names follow the published models; dropout is left out, so that a planned step can be compared with an
unplanned one. Query, key and value have a weight each, also in GPT-2, whose own code holds them in one matrix: split on its
columns that matrix would give a device queries of all heads and values of none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.planning.trace import Step


class Attention(nn.Module):
    """Multi-head attention; `memory` is what keys and values are made of (x itself if None)."""

    def __init__(self, width: int, heads: int, head_width: int | None = None, bias: bool = True) -> None:
        super().__init__()
        inner = heads * (head_width or width // heads)
        self.heads = heads
        self.query = nn.Linear(width, inner, bias)
        self.key = nn.Linear(width, inner, bias)
        self.value = nn.Linear(width, inner, bias)
        self.output = nn.Linear(inner, width, bias)

    def forward(
        self,
        x_BSD: Tensor,
        mask: Tensor | None = None,
        memory: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Map (B, S, D) to (B, S, D); the mask is bool or added to the scores, and broadcasts to (B, H, S, T)."""
        source = x_BSD if memory is None else memory
        q, k, v = self._split(self.query(x_BSD)), self._split(self.key(source)), self._split(self.value(source))
        y_BHSk = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
        return self.output(y_BHSk.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """down(activation(up x))."""

    def __init__(self, width: int, hidden: int, bias: bool = True, activation: str = "gelu") -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias)
        self.down = nn.Linear(hidden, width, bias)
        self.activation = getattr(F, activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.down(self.activation(self.up(x)))


class BertLayer(nn.Module):
    """Attention and feed-forward, each followed by its LayerNorm (the original order)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width)
        self.mlp = FeedForward(width, hidden)
        self.mlp_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, D)."""
        x = self.attention_norm(x + self.attention(x, mask))
        return self.mlp_norm(x + self.mlp(x))


class Bert(nn.Module):
    """BERT with its masked-word head, whose matrix is the embedding (arXiv 1810.04805)."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int, hidden: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocab, width), nn.Embedding(max(length, 512), width)
        self.segments, self.norm = nn.Embedding(2, width), nn.LayerNorm(width)
        self.layers = nn.ModuleList(BertLayer(width, heads, hidden) for _ in range(layers))
        self.head, self.head_norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.head_bias = nn.Parameter(torch.zeros(vocab))

    def forward(self, ids: Tensor, segments: Tensor, mask: Tensor) -> Tensor:
        """Return logits (B, S, V); `mask` is bool (B, S), False where there is padding."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.places(places) + self.segments(segments))
        for layer in self.layers:
            x = layer(x, mask[:, None, None, :])
        x = self.head_norm(F.gelu(self.head(x)))
        return F.linear(x, self.words.weight) + self.head_bias


class GptLayer(nn.Module):
    """x + attention(norm x), and then x + mlp(norm x)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.mlp_norm, self.mlp = nn.LayerNorm(width), FeedForward(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, D)."""
        x = x + self.attention(self.attention_norm(x), causal=True)
        return x + self.mlp(self.mlp_norm(x))


class Gpt(nn.Module):
    """GPT-2 (Radford et al. 2019); the head is the embedding."""

    def __init__(self, vocab: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocab, width), nn.Embedding(max(length, 1024), width)
        self.layers = nn.ModuleList(GptLayer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (B, S, V)."""
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.words.weight)


def buckets(queries: int, keys: int, both_ways: bool, count: int = 32, furthest: int = 128) -> Tensor:
    """Return T5's bucket of each distance, int64 (S, T): exact up to count / 2 (a quarter both ways), then logarithmic."""
    distance = torch.arange(keys)[None, :] - torch.arange(queries)[:, None]
    offset = torch.zeros_like(distance)
    if both_ways:
        count //= 2
        offset, distance = (distance > 0) * count, distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = count // 2
    far = torch.log(distance.clamp(min=1) / exact) / math.log(furthest / exact) * (count - exact)
    return offset + torch.where(distance < exact, distance, (exact + far.long()).clamp(max=count - 1))


class T5Layer(nn.Module):
    """Self-attention, attention to the encoder (in the decoder) and feed-forward, each on a norm of its input."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int, decoder: bool, biases: bool) -> None:
        super().__init__()
        self.causal = decoder
        self.attention_norm, self.attention = t5_norm(width, biases), Attention(width, heads, head_width, bias=False)
        if decoder:
            self.cross_norm, self.cross = t5_norm(width, biases), Attention(width, heads, head_width, bias=False)
        self.mlp_norm, self.mlp = t5_norm(width, biases), FeedForward(width, hidden, biases, "relu")

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D); T5's scores are not scaled."""
        x = x + self.attention(self.attention_norm(x), bias, scale=1.0)
        if self.causal:
            x = x + self.cross(self.cross_norm(x), mask, memory, scale=1.0)
        return x + self.mlp(self.mlp_norm(x))


def t5_norm(width: int, biases: bool) -> nn.Module:
    """T5's norm has no mean and no bias; that of the Auto-MAP paper's T5 has a scale and a bias."""
    return nn.LayerNorm(width) if biases else nn.RMSNorm(width, eps=1e-6)


class T5Stack(nn.Module):
    """Encoder or decoder: layers with one table of position biases, added to the scores of each self-attention."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        head_width: int,
        hidden: int,
        length: int,
        decoder: bool,
        biases: bool,
    ) -> None:
        super().__init__()
        self.position = nn.Embedding(32, heads)
        self.layers = nn.ModuleList(T5Layer(width, heads, head_width, hidden, decoder, biases) for _ in range(layers))
        self.norm = t5_norm(width, biases)
        self.register_buffer("distance", buckets(length, length, both_ways=not decoder), persistent=False)
        future = torch.full((length, length), torch.finfo(torch.get_default_dtype()).min).triu(1) if decoder else None
        self.register_buffer("future", future, persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None) -> Tensor:
        """Map (B, S, D) to (B, S, D); `mask` (B, 1, 1, T) is added to scores, of the encoder's positions."""
        bias = self.position(self.distance).permute(2, 0, 1).unsqueeze(0)
        bias = bias + (mask if self.future is None else self.future)
        for layer in self.layers:
            x = layer(x, bias, memory, mask)
        return self.norm(x)


class T5(nn.Module):
    """T5 (arXiv 1910.10683), encoder and decoder; the head is the embedding, scaled.

    Args:
        biases: feed-forward biases, and norms with scale and bias, as the Auto-MAP paper's Table 3 lists them. The published
            T5 has neither.
    """

    def __init__(
        self,
        vocab: int,
        width: int,
        layers: int,
        heads: int,
        head_width: int,
        hidden: int,
        length: int,
        biases: bool = False,
    ) -> None:
        super().__init__()
        self.scale = width**-0.5
        self.words = nn.Embedding(vocab, width)
        self.encoder = T5Stack(width, layers, heads, head_width, hidden, length, decoder=False, biases=biases)
        self.decoder = T5Stack(width, layers, heads, head_width, hidden, length, decoder=True, biases=biases)

    def forward(self, ids: Tensor, mask: Tensor, decoder_ids: Tensor) -> Tensor:
        """Return logits (B, S, V); `mask` is bool (B, T), False where the encoder's input is padding."""
        x = self.words(ids)
        added = (~mask[:, None, None, :]).to(x.dtype) * torch.finfo(x.dtype).min
        memory = self.encoder(x, added)
        y = self.decoder(self.words(decoder_ids), added, memory)
        return F.linear(y * self.scale, self.words.weight)


def word_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """Mean cross-entropy over all positions."""
    return F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten())


def bert_loss(model: nn.Module, ids: Tensor, segments: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Loss of one BERT step."""
    return word_loss(model(ids, segments, mask), labels)


def gpt_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Loss of one GPT-2 (or mixture-of-experts) step."""
    return word_loss(model(ids), labels)


def t5_loss(model: nn.Module, ids: Tensor, mask: Tensor, decoder_ids: Tensor, labels: Tensor) -> Tensor:
    """Loss of one T5 step."""
    return word_loss(model(ids, mask, decoder_ids), labels)


def bert(batch: int, length: int, vocab: int, width: int, layers: int, heads: int, hidden: int) -> Step:
    """A BERT step: ids, segments, mask and labels, (B, S) each."""
    inputs = words(vocab, batch, length, "ids", "labels")
    inputs["segments"] = torch.randint(0, 2, (batch, length))
    inputs["mask"] = torch.ones(batch, length, dtype=torch.bool)
    ordered = {name: inputs[name] for name in ("ids", "segments", "mask", "labels")}
    return Step(Bert(vocab, width, layers, heads, hidden, length), ordered, bert_loss)


def gpt2(batch: int, length: int, vocab: int, width: int, layers: int, heads: int) -> Step:
    """A GPT-2 step: ids and labels, (B, S) each."""
    return Step(Gpt(vocab, width, layers, heads, length), words(vocab, batch, length, "ids", "labels"), gpt_loss)


def t5(
    batch: int,
    length: int,
    vocab: int,
    width: int,
    layers: int,
    heads: int,
    head_width: int,
    hidden: int,
    biases: bool = False,
) -> Step:
    """A T5 step: ids, mask, decoder_ids and labels, (B, S) each."""
    model = T5(vocab, width, layers, heads, head_width, hidden, length, biases)
    inputs = words(vocab, batch, length, "ids", "decoder_ids", "labels")
    inputs["mask"] = torch.ones(batch, length, dtype=torch.bool)
    return Step(model, {name: inputs[name] for name in ("ids", "mask", "decoder_ids", "labels")}, t5_loss)


def words(vocab: int, batch: int, length: int, *names: str) -> dict[str, Tensor]:
    """Random words (B, S) under each name."""
    return {name: torch.randint(0, vocab, (batch, length)) for name in names}


SIZES: Mapping[str, Mapping[str, int]] = {
    "bert-2": {"vocab": 30522, "width": 1024, "layers": 2, "heads": 16, "hidden": 4096},
    "bert-12": {"vocab": 30522, "width": 768, "layers": 12, "heads": 12, "hidden": 3072},
    "bert-24": {"vocab": 30522, "width": 1024, "layers": 24, "heads": 16, "hidden": 4096},
    "bert-48": {"vocab": 30522, "width": 1024, "layers": 48, "heads": 16, "hidden": 4096},
    "gpt2-small": {"vocab": 50257, "width": 768, "layers": 12, "heads": 12},
    "gpt2-medium": {"vocab": 50257, "width": 1024, "layers": 24, "heads": 16},
    "gpt2-large": {"vocab": 50257, "width": 1280, "layers": 36, "heads": 20},
    "gpt2-xl": {"vocab": 50257, "width": 1600, "layers": 48, "heads": 25},
    "t5-small": {"vocab": 32128, "width": 512, "layers": 6, "heads": 8, "head_width": 64, "hidden": 2048},
    "t5-base": {"vocab": 32128, "width": 768, "layers": 12, "heads": 12, "head_width": 64, "hidden": 3072},
    "t5-large": {"vocab": 32128, "width": 1024, "layers": 24, "heads": 16, "head_width": 64, "hidden": 4096},
    "t5-3b": {"vocab": 32128, "width": 1024, "layers": 24, "heads": 32, "head_width": 128, "hidden": 16384},
    "t5-11b": {"vocab": 32128, "width": 1024, "layers": 24, "heads": 128, "head_width": 128, "hidden": 65536},
}
