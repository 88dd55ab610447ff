"""Paper 1's mixture of experts as a workload.

Legend: B batch, S tokens of a batch, D width, N experts, K chosen per token, C capacity, F hidden width of an expert, V words.

The model that paper 1 trains is dropless. It can be traced too, by `load_user_model`, with its grouped products as single
operations; but how many rows a group has depends on the data, so no plan can give each device an equal share of experts. Here
each expert takes a fixed number C of tokens, those that want it most, as its `capacity_factor` allows; with C = S this is the
dropless layer. The router and its choices are paper 1's own (`lit_modules.ops.routing`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.planning.trace import Step
from datamodules.planning.workloads_text import Attention, gpt_loss, words
from lit_modules.ops.routing import capacity_of, route


class CapacityExperts(nn.Module):
    """N feed-forward nets behind a router; each takes C tokens at most, in tensors of fixed shape.

    Parameters as in `lit_modules.nets.moe.MoE`: router.weight (N, D), up (N, F, D), down (N, D, F).
    """

    def __init__(self, width: int, hidden: int, experts: int, top_k: int, capacity_factor: float) -> None:
        super().__init__()
        self.top_k, self.capacity_factor = top_k, capacity_factor
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, hidden, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) * hidden**-0.5)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        x_SD = x_BSD.flatten(0, -2)
        tokens, experts = len(x_SD), len(self.up)
        routing = route(self.router(x_SD), self.top_k, "softmax_topk")
        weights_SN = torch.zeros_like(routing.probs_SN).scatter(1, routing.experts_SK, routing.weights_SK)
        capacity = min(tokens, capacity_of(tokens, experts, self.top_k, self.capacity_factor))
        weights_NC, chosen_NC = weights_SN.t().topk(capacity, dim=1)
        x_NCD = x_SD.index_select(0, chosen_NC.flatten()).view(experts, capacity, -1)
        hidden_NCF = F.relu(torch.bmm(x_NCD, self.up.mT)).square()
        y_NCD = torch.bmm(hidden_NCF, self.down.mT) * weights_NC.unsqueeze(-1)
        y_SD = torch.zeros_like(x_SD).index_add(0, chosen_NC.flatten(), y_NCD.flatten(0, 1).to(x_SD.dtype))
        return y_SD.view_as(x_BSD)


class ExpertLayer(nn.Module):
    """x + attention(norm x), and then x + experts(norm x)."""

    def __init__(self, width: int, heads: int, hidden: int, experts: int, top_k: int, capacity_factor: float) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(width), Attention(width, heads, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = CapacityExperts(width, hidden, experts, top_k, capacity_factor)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, S, D) to (B, S, D)."""
        x = x + self.attention(self.attention_norm(x), causal=True)
        return x + self.mlp(self.mlp_norm(x))


class ExpertTransformer(nn.Module):
    """A decoder whose feed-forward nets are mixtures of experts (arXiv 2410.07524), without rotary positions."""

    def __init__(
        self,
        vocab: int,
        width: int,
        layers: int,
        heads: int,
        hidden: int,
        experts: int,
        top_k: int,
        capacity_factor: float,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(
            ExpertLayer(width, heads, hidden, experts, top_k, capacity_factor) for _ in range(layers)
        )
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits (B, S, V)."""
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def moe(
    batch: int,
    length: int,
    vocab: int,
    width: int,
    layers: int,
    heads: int,
    hidden: int,
    experts: int,
    top_k: int = 2,
    capacity_factor: float = 1.25,
) -> Step:
    """A step of the mixture: ids and labels, (B, S) each."""
    model = ExpertTransformer(vocab, width, layers, heads, hidden, experts, top_k, capacity_factor)
    return Step(model, words(vocab, batch, length, "ids", "labels"), gpt_loss)
