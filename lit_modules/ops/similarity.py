"""How far experts have moved from their parent and from one another, and whether virtual groups still hold.

The cosine is figure 6 of arXiv 2410.07524, which averages it over experts and layers (about 1 after training at a constant
low learning rate, 0.6 to 0.7 after a reset). Coverage and purity are ours. Legend: N = E * G experts, expert e holds shard
e mod G; F hidden units of the dense MLP, H = F / G of an expert, D width, S tokens, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_cosine(up_NHD: Tensor, dense_up_FD: Tensor, granularity: int) -> Tensor:
    """Return (N,) float32 or wider: the cosine of every expert's matrix to the parent's shard it was copied from.

    Scale invariant, so weight scaling does not show. Permuted or re-initialised experts do: they no longer hold the
    parent's units in the parent's order.

    Raises:
        ValueError: shapes that do not belong together.
    """
    experts, width, dim = up_NHD.shape
    if experts % granularity or dense_up_FD.shape != (width * granularity, dim):
        raise ValueError(
            f"experts {tuple(up_NHD.shape)} at granularity {granularity} are not shards of {tuple(dense_up_FD.shape)}"
        )
    shards_GX = dense_up_FD.unflatten(0, (granularity, width)).flatten(1)
    return torch.einsum("egx,gx->eg", _units(up_NHD).unflatten(0, (-1, granularity)), _units(shards_GX)).flatten()


def replica_cosine(up_NHD: Tensor, granularity: int) -> Tensor:
    """Return (G,) float32 or wider: for every shard the mean cosine over all pairs of its E replicas.

    Raises:
        ValueError: fewer than two replicas, or N not divisible by G.
    """
    replicas, rest = divmod(len(up_NHD), granularity)
    if rest or replicas < 2:
        raise ValueError(
            f"{len(up_NHD)} experts at granularity {granularity} are not two or more replicas of each shard"
        )
    units_EGX = _units(up_NHD).unflatten(0, (replicas, granularity))
    # |sum of unit vectors|^2 = E + 2 * (sum of cosines over pairs)
    return (units_EGX.sum(0).square().sum(-1) - replicas) / (replicas * (replicas - 1))


def shard_coverage(experts_SK: Tensor, granularity: int) -> Tensor:
    """Return the mean share of the G shards that a token's picks hold at least once, a float32 scalar in [1 / G, 1].

    Raises:
        ValueError: as `shard_counts`.
    """
    return (shard_counts(experts_SK, granularity) > 0).float().mean()


def replica_purity(experts_SK: Tensor, granularity: int) -> Tensor:
    """Return the share of tokens whose K picks hold every shard exactly K / G times, a float32 scalar.

    1 at step 0 with virtual groups; each such token still computes whole copies of the dense MLP, though not necessarily
    of one replica.

    Raises:
        ValueError: K is not divisible by G, so that no token could, or as `shard_counts`.
    """
    top_k = experts_SK.shape[1]
    if top_k % granularity:
        raise ValueError(f"top_k={top_k} is not divisible by granularity={granularity}: purity is not defined")
    return (shard_counts(experts_SK, granularity) == top_k // granularity).all(1).float().mean()


def shard_counts(experts_SK: Tensor, granularity: int) -> Tensor:
    """Return (S, G) int64: how often each token's picks hold each shard.

    Raises:
        ValueError: not a table of at least one token.
    """
    if experts_SK.ndim != 2 or not experts_SK.numel():
        raise ValueError(f"picks are (S, K) with S and K at least 1, got {tuple(experts_SK.shape)}")
    shards_SK = experts_SK % granularity
    counts_SG = torch.zeros(len(shards_SK), granularity, dtype=torch.int64, device=shards_SK.device)
    return counts_SG.scatter_add_(1, shards_SK, torch.ones_like(shards_SK))


def _units(x: Tensor) -> Tensor:
    """Flatten all but the first dimension and divide by the norm; a matrix of zeros gives NaN: it has no direction."""
    flat = x.flatten(1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    return flat / flat.norm(dim=1, keepdim=True)
