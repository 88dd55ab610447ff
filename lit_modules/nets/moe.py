"""A mixture of experts in the place of a transformer's MLP.

Legend: B batch, S sequence, D width, F hidden width of the dense MLP, N = E * G experts of hidden width F / G, K chosen.
E is the expansion (parameters against the dense MLP), G the granularity; K is T in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_modules.ops.experts import activation_named, expert_mlp
from lit_modules.ops.routing import Order, Routing, capacity_of, check_routing, drop_over_capacity, jitter, route

Output = Literal["none", "constant", "learnable", "layernorm"]


@dataclass(frozen=True)
class Experts:
    """How many experts there are and how tokens reach them. E8G1T2 is expansion 8, granularity 1, top_k 2.

    Args:
        expansion: E, parameters of all experts against those of the dense MLP.
        granularity: G, by how much an expert is narrower than the dense MLP; there are E * G experts.
        top_k: T, experts per token; as much computation as the dense MLP where T = G.
        order: softmax over all experts and then top-k without renormalising, or top-k and then softmax.
        shared: experts of width hidden / G that every token goes through, held as one MLP.
        capacity_factor: choices an expert takes in training, against its fair share; None for no limit.
        jitter: in training the router sees its input times noise from [1 - jitter, 1 + jitter].
        output: what is done to the routed sum (not to shared experts): nothing, a constant or a learnable factor, or a
            LayerNorm without bias over the width.
        output_value: the factor, or its first value, or the first weight of the LayerNorm.
        router_std: standard deviation of the router's initial weights.
    Raises:
        ValueError: what cannot be built, with the reason.
    Source: arXiv 2410.07524, 2.1 and 2.2; output is its 3.5, shared its 3.9. Capacity and jitter are not in the paper.
    """

    expansion: int = 8
    granularity: int = 1
    top_k: int = 1
    order: Order = "softmax_topk"
    shared: int = 0
    capacity_factor: float | None = None
    jitter: float = 0.0
    output: Output = "none"
    output_value: float = 1.0
    router_std: float = 0.02

    def __post_init__(self) -> None:
        for name, least in (("expansion", 1), ("granularity", 1), ("top_k", 1), ("shared", 0), ("router_std", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        check_routing(self.count, self.top_k, self.order)
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor must be above 0, or null for no limit, got {self.capacity_factor}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must lie in [0, 1), got {self.jitter}")
        if self.output not in get_args(Output):
            raise ValueError(f"unknown output {self.output!r}; known: {', '.join(get_args(Output))}")

    @property
    def count(self) -> int:
        """N, the number of routed experts."""
        return self.expansion * self.granularity

    def width(self, hidden: int) -> int:
        """Return the hidden width of one expert.

        Raises:
            ValueError: G does not divide it.
        """
        if hidden % self.granularity:
            raise ValueError(f"granularity {self.granularity} does not divide the hidden width {hidden}")
        return hidden // self.granularity


class MLP(nn.Module):
    """y = down(activation(up x)), or down(activation(gate x) * up x) for a gated activation; no biases."""

    def __init__(self, width: int, hidden: int, activation: str = "squared_relu") -> None:
        super().__init__()
        self.function, self.gated = activation_named(activation)
        self.up = nn.Linear(width, hidden, bias=False)
        if self.gated:
            self.gate = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self.down(self.function(self.gate(x)) * self.up(x) if self.gated else self.function(self.up(x)))


class Router(nn.Linear):
    """Logits of each token for each expert, in float32 (float64 for float64 weights) whatever autocast says.

    Virtual groups live on rows that are tied to the bit and told from all others: in bfloat16, 0.3 to 0.6 % of tokens (pilot
    with torch.topk) no longer get one of each shard.
    """

    def __init__(self, width: int, experts: int) -> None:
        super().__init__(width, experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., N)."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            return F.linear(x.to(dtype), self.weight.to(dtype))


class MoE(nn.Module):
    """N experts behind a router.

    Parameters: router.weight (N, D), up and gate (N, F/G, D), down (N, D, F/G), shared.{up,gate,down}.weight,
    output_scale (1,), output_norm.weight (D,); gates only for a gated activation, the last three only when asked for.

    Attributes:
        routed: the Routing of the last forward, with its graph, for losses and monitors; None before. It is left out of
            copies and pickles. Under activation checkpointing it is that of the last recomputation, without a graph in
            the first pass: take losses from layers that are not checkpointed.
    Raises:
        ValueError: hidden is not divisible by the granularity; an unknown activation.
    """

    def __init__(self, width: int, hidden: int, activation: str, experts: Experts) -> None:
        super().__init__()
        N, narrow = experts.count, experts.width(hidden)
        self.experts, self.activation = experts, activation
        self.router = Router(width, N)
        self.up = nn.Parameter(torch.empty(N, narrow, width))
        gated = activation_named(activation).gated
        self.gate = nn.Parameter(torch.empty(N, narrow, width)) if gated else None
        self.down = nn.Parameter(torch.empty(N, width, narrow))
        if experts.shared:
            self.shared = MLP(width, experts.shared * narrow, activation)
        if experts.output == "learnable":
            self.output_scale = nn.Parameter(torch.tensor([float(experts.output_value)]))  # FSDP2 takes no scalar
        if experts.output == "layernorm":
            self.output_norm = nn.LayerNorm(width, bias=False)
            nn.init.constant_(self.output_norm.weight, experts.output_value)
        nn.init.normal_(self.router.weight, std=experts.router_std)
        for weight in (self.up, self.gate, self.down):  # as nn.Linear; a Transformer draws them again
            if weight is not None:
                bound = weight.shape[-1] ** -0.5
                nn.init.uniform_(weight, -bound, bound)
        self.routed: Routing | None = None

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        x_SD = x_BSD.flatten(0, -2)
        self.routed = self.route(x_SD)
        y_SD = expert_mlp(x_SD, self.routed, self.up, self.down, self.gate, self.activation)
        y_BSD = self._output(y_SD).view_as(x_BSD)
        return y_BSD + self.shared(x_BSD) if self.experts.shared else y_BSD

    def route(self, x_SD: Tensor) -> Routing:
        """Choose experts for tokens (S, D); jitter and capacity only in training."""
        spec = self.experts
        if self.training and spec.jitter:
            x_SD = jitter(x_SD, spec.jitter)
        routing = route(self.router(x_SD), spec.top_k, spec.order)
        if self.training and spec.capacity_factor is not None:
            capacity = capacity_of(len(x_SD), spec.count, spec.top_k, spec.capacity_factor)
            routing = drop_over_capacity(routing, capacity)
        return routing

    def _output(self, y_SD: Tensor) -> Tensor:
        match self.experts.output:
            case "constant":
                return y_SD * self.experts.output_value
            case "learnable":
                return y_SD * self.output_scale
            case "layernorm":
                return self.output_norm(y_SD)
        return y_SD

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "routed": None}  # tensors with a graph can be neither copied nor pickled
