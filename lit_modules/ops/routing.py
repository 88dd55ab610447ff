"""Which experts a token goes to, and with what weight.

Legend: S tokens, N experts, K experts chosen per token. All of it is done in float32 (float64 for float64 logits): in
bfloat16 replicas whose logits differ come out equal, and the wrong one wins or, if ties are broken anyhow, parts of each do.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Order = Literal["softmax_topk", "topk_softmax"]
LOW_BITS = 1 << 16  # room for the index of an expert under its logit


class Routing(NamedTuple):
    """Where S tokens go.

    Attributes:
        weights_SK: float32, what the output of each chosen expert is multiplied by; 0 where the choice was dropped.
        experts_SK: int64, the chosen experts, highest logit first.
        probs_SN: float32, softmax over all experts, whatever the order of softmax and top-k.
        logits_SN: float32.
        kept_SK: bool, False where capacity dropped the choice; None when nothing can be dropped.
    """

    weights_SK: Tensor
    experts_SK: Tensor
    probs_SN: Tensor
    logits_SN: Tensor
    kept_SK: Tensor | None = None


def check_routing(experts: int, top_k: int, order: str) -> None:
    """Refuse what cannot route.

    Raises:
        ValueError: an unknown order; K outside 1..N; K = 1 with topk_softmax.
    """
    if order not in get_args(Order):
        raise ValueError(f"unknown order {order!r}; known: {', '.join(get_args(Order))}")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must lie between 1 and the number of experts, {experts}, got {top_k}")
    if top_k == 1 and order == "topk_softmax":
        raise ValueError(
            "topk_softmax needs top_k of at least 2: the softmax of one number is always 1, so the router would get no "
            "gradient; use softmax_topk"
        )


def route(logits_SN: Tensor, top_k: int, order: Order) -> Routing:
    """Choose K of N experts per token.

    softmax_topk keeps the K largest probabilities of a softmax over all experts as they are, without renormalising.
    topk_softmax takes a softmax over the K largest logits only, so that weights sum to 1.

    Ties go to the lowest index, on every device. So where the N rows of a router are E rows, each repeated G times in a row
    (virtual groups), K = kG always picks k whole groups, even if two groups tie with each other.

    Args:
        logits_SN: any floating dtype; computed in float32, or float64 if that is what comes in.
    Raises:
        ValueError: see check_routing.
    Source: arXiv 2410.07524, 2.1.2; topk_softmax is Mixtral's order.
    """
    check_routing(logits_SN.shape[-1], top_k, order)
    logits_SN = logits_SN.to(torch.promote_types(logits_SN.dtype, torch.float32))
    probs_SN = logits_SN.softmax(-1)
    experts_SK = top_indices(logits_SN.detach(), top_k)
    if order == "softmax_topk":
        return Routing(probs_SN.gather(-1, experts_SK), experts_SK, probs_SN, logits_SN)
    return Routing(logits_SN.gather(-1, experts_SK).softmax(-1), experts_SK, probs_SN, logits_SN)


def top_indices(x_SN: Tensor, top_k: int) -> Tensor:
    """Return the indices of the K largest per row, largest first and, among equals, lowest index first: int64 (S, K).

    torch.topk promises no order among equals, and on CPU does not give the lowest. A stable sort does, but takes 2.5 times
    as long at N = 64; so float32 values become integers in the same order, with the index in the low bits.
    """
    if top_k == 1:
        return x_SN.argmax(-1, keepdim=True)  # documented to return the first of several maxima
    if x_SN.dtype != torch.float32 or x_SN.shape[-1] > LOW_BITS:
        return x_SN.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    bits_SN = (x_SN + 0.0).view(torch.int32)  # + 0.0 makes -0.0 the 0.0 it is equal to
    bits_SN = bits_SN ^ ((bits_SN >> 31) & 0x7FFFFFFF)  # negative floats are ordered by magnitude: turn them round
    backwards_N = torch.arange(LOW_BITS - 1, LOW_BITS - 1 - x_SN.shape[-1], -1, device=x_SN.device)
    keys_SN = bits_SN.long() * LOW_BITS + backwards_N
    return LOW_BITS - 1 - (keys_SN.topk(top_k).values & (LOW_BITS - 1))


def expert_counts(experts_SK: Tensor, experts: int) -> Tensor:
    """Return how many of the S * K choices fell on each expert: int64 (N,). Does not wait for the device."""
    flat = experts_SK.flatten()
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def capacity_of(tokens: int, experts: int, top_k: int, factor: float) -> int:
    """Return how many choices an expert may take: factor times its fair share S * K / N, rounded up, at least 1.

    Raises:
        ValueError: a factor that is not above 0.
    Source: Switch Transformers (arXiv 2101.03961), eq. 3, with K choices per token as in GShard.
    """
    if not factor > 0:
        raise ValueError(f"the capacity factor must be above 0, got {factor}")
    return max(1, math.ceil(factor * tokens * top_k / experts))


def drop_over_capacity(routing: Routing, capacity: int) -> Routing:
    """Let each expert take at most `capacity` choices: first choices before second ones, then earlier tokens first.

    The weights of the others become 0 and `kept_SK` is False there; probabilities and choices stay, as the balancing loss
    must see what the router wanted.

    Raises:
        ValueError: a capacity below 0.
    Source: the order of precedence is GShard's (arXiv 2006.16668, algorithm 1).
    """
    if capacity < 0:
        raise ValueError(f"capacity must be at least 0, got {capacity}")
    S, K = routing.experts_SK.shape
    flat = routing.experts_SK.T.flatten()  # all first choices, then all second ones
    order = flat.argsort(stable=True)
    counts = expert_counts(flat, routing.probs_SN.shape[-1])
    starts = (counts.cumsum(0) - counts)[flat[order]]
    rank = torch.empty_like(flat)
    rank[order] = torch.arange(len(flat), device=flat.device) - starts
    kept_SK = (rank < capacity).view(K, S).T
    return routing._replace(weights_SK=routing.weights_SK.masked_fill(~kept_SK, 0.0), kept_SK=kept_SK)


def load_balancing_loss(routing: Routing, counts_N: Tensor | None = None) -> Tensor:
    """Return N * sum of f_i * P_i, a scalar: f_i the share of choices that fell on expert i, P_i its mean probability.

    1 when choices are balanced and probabilities uniform; N if all probability and, at K = 1, every choice falls on one
    expert (N / K at K > 1). P is of the softmax over all experts for both orders; f has no gradient, and counts choices
    before any are dropped. Hugging Face's `load_balancing_loss_func` on one layer is K times this.

    Args:
        counts_N: choices that fell on each expert in the batches of all processes; None for this one's own. Given those, the
            mean over processes with batches of one size is the loss of all batches as one, and so is its gradient.
    Source: Switch Transformers (arXiv 2101.03961), eq. 4-6; ST-MoE (arXiv 2202.08906), 2.2; for K > 1 divided by K as in
        Megatron-LM's switch_load_balancing_loss_func.
    """
    S, N = routing.probs_SN.shape
    if counts_N is None:
        share_N = expert_counts(routing.experts_SK, N).to(routing.probs_SN.dtype) / max(1, routing.experts_SK.numel())
    else:
        share_N = counts_N.to(routing.probs_SN.dtype) / counts_N.sum().clamp_min(1)
    return N * share_N @ (routing.probs_SN.sum(0) / max(1, S))


def z_loss(logits_SN: Tensor) -> Tensor:
    """Return the mean over tokens of the squared logsumexp of the logits, a scalar in float32; 0 for no tokens.

    Source: ST-MoE (arXiv 2202.08906), eq. 5.
    """
    logits_SN = logits_SN.to(torch.promote_types(logits_SN.dtype, torch.float32))
    return logits_SN.logsumexp(-1).square().sum() / max(1, len(logits_SN))


def jitter(x: Tensor, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """Return x times noise drawn uniformly from [1 - eps, 1 + eps], element by element.

    Raises:
        ValueError: eps outside [0, 1).
    Source: Switch Transformers (arXiv 2101.03961), appendix C.
    """
    if not 0 <= eps < 1:
        raise ValueError(f"jitter must lie in [0, 1), got {eps}")
    return x if eps == 0 else x * torch.empty_like(x).uniform_(1 - eps, 1 + eps, generator=generator)
