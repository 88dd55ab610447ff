"""Expert and router tensors out of a dense MLP: the layout, the virtual-group router, and ways to make copies differ.

Follows appendix A and section 2.3 of arXiv 2410.07524 (checked against Megatron-LM's converter). With N = E * G experts,
expert e holds shard e mod G of the hidden units and answers to the router row of replica e div G:

    shard(e) = e mod G         the G shards, repeated E times        (tiling)
    replica(e) = e div G       E rows, each repeated G times in a row (repeat_interleave)

Keying the router rows by shard instead is the classic bug: then a token's T = G winners are E copies of few shards.

Legend: E expansion, G granularity, N experts, F hidden units of the dense MLP, H = F / G of an expert, D width.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

NOISE_SHARE = 0.5  # OLMoE 4.1.5 adds its noise to half of the MLP weights


def expert_layout(d_ff: int, granularity: int, expansion: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for every expert e its shard, its replica, and the hidden units it holds.

    Returns:
        shard (N,), replica (N,) and units (N, F/G), all int64; expert e holds units[e] = shard * F/G ... + F/G - 1.
    Raises:
        ValueError: F is not divisible by G.
    """
    if d_ff % granularity:
        raise ValueError(f"d_ff={d_ff} is not divisible by granularity={granularity}: shards would differ in size")
    experts_N = torch.arange(expansion * granularity)
    shard_N = experts_N % granularity
    width = d_ff // granularity
    return shard_N, experts_N // granularity, shard_N[:, None] * width + torch.arange(width)


def virtual_group_router(rows_ED: Tensor, granularity: int) -> Tensor:
    """Return router rows (N, D): each of the E rows repeated G times consecutively, so that all groups route alike."""
    return rows_ED.repeat_interleave(granularity, dim=0)


def held_units(d_ff: int, granularity: int, expansion: int, order_EF: Tensor | None = None) -> Tensor:
    """Return (N, F/G) the hidden units of every expert, each replica in its own order if `order_EF` is given.

    Raises:
        ValueError: F is not divisible by G.
    """
    _, replica_N, units_NH = expert_layout(d_ff, granularity, expansion)
    return units_NH if order_EF is None else order_EF[replica_N].gather(1, units_NH)


def shard_experts(weight: Tensor, granularity: int, expansion: int, dim: int, order_EF: Tensor | None = None) -> Tensor:
    """Return the N experts' part of one dense matrix.

    Args:
        weight: up or gate (F, D) with dim=0, or down (D, F) with dim=1; a gate fused with up is to be split before.
        order_EF: a permutation of the hidden units for every replica, the same one for all matrices of an MLP; None
            leaves them in order.
    Returns:
        (N, F/G, D) for dim=0, (N, D, F/G) for dim=1, of the weight's dtype; a new tensor.
    Raises:
        ValueError: F is not divisible by G.
    """
    units_NH = held_units(weight.shape[dim], granularity, expansion, order_EF)
    split = weight.index_select(dim, units_NH.flatten().to(weight.device)).unflatten(dim, units_NH.shape)
    return split if dim == 0 else split.movedim(1, 0).contiguous()


def unit_shares(d_ff: int, granularity: int, shared: int) -> Tensor:
    """Return (F,) float64: 1 / how often every hidden unit is held at step 0, by the routed and the shared experts.

    Ours: if each holder carries that share of the unit's output, step 0 is the dense MLP for any number of shared
    experts. shared = 0 gives ones, shared = G gives one half everywhere.
    """
    slots = torch.arange(shared) % granularity
    copies_G = 1 + torch.bincount(slots, minlength=granularity)
    return (1 / copies_G.double()).repeat_interleave(d_ff // granularity)


def shared_units(d_ff: int, granularity: int, shared: int) -> Tensor:
    """Return (shared * F/G,) the hidden units of the shared part: shards 0, 1, ..., `shared` - 1 (mod G) side by side.

    shared = G is the dense MLP itself; fewer are its first shared/G part; more start again from the first shard. Ours:
    the paper tried 8 shared experts beside 64 routed ones (3.9) and does not say how they were initialised.

    Raises:
        ValueError: F is not divisible by G.
    """
    return held_units(d_ff, granularity, 1)[torch.arange(shared) % granularity].flatten()


class Draws:
    """Independent random streams, one per name, out of one seed.

    A converter that streams a checkpoint in any order, or in pieces, then makes the same model.
    """

    def __init__(self, generator: torch.Generator) -> None:
        """Take one number from `generator`; nothing else of it is used."""
        self._seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device).item())

    def of(self, name: str) -> torch.Generator:
        """Return a fresh CPU generator for `name`."""
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def permutations(expansion: int, d_ff: int, generator: torch.Generator) -> Tensor:
    """Return (E, F): for every replica its own order of the hidden units."""
    return torch.stack([torch.randperm(d_ff, generator=generator) for _ in range(expansion)])


def reinit_entries(weight: Tensor, fraction: float, fresh: Tensor, generator: torch.Generator) -> Tensor:
    """Return a copy in which each entry is, with probability `fraction`, that of `fresh` (Qwen2's rule, there 50%).

    Entry by entry and independently for each expert is how we read "half of the parameters".
    """
    chosen = torch.rand(weight.shape, generator=generator) < fraction
    return torch.where(chosen.to(weight.device), fresh.to(weight), weight)


def dropped_units(experts: int, width: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Return (N, round(fraction * H)) the hidden units that every expert forgets, the same for gate, up and down."""
    count = round(fraction * width)
    return torch.stack([torch.randperm(width, generator=generator)[:count] for _ in range(experts)])


def reinit_units(weight: Tensor, units_NR: Tensor, dim: int, generator: torch.Generator) -> Tensor:
    """Return a copy in which whole hidden units are redrawn (Drop-Upcycling's rule).

    The new values are normal with the mean and the standard deviation of the values they replace, expert by expert. The
    same units go in gate, up and down, as the Drop-Upcycling paper says; its released script draws them anew for every
    matrix.

    Args:
        weight: (N, H, D) with dim=1 or (N, D, H) with dim=2.
        units_NR: the R units to redraw in every expert.
    """
    if units_NR.shape[1] == 0:
        return weight.clone()
    shape = list(weight.shape)
    shape[dim] = units_NR.shape[1]
    spread = units_NR.unsqueeze(3 - dim).expand(shape).to(weight.device)
    old = weight.gather(dim, spread)
    wide = old.to(torch.promote_types(old.dtype, torch.float32))
    mean = wide.mean((1, 2), keepdim=True)
    std = wide.std((1, 2), keepdim=True, correction=0)
    fresh = torch.randn(shape, generator=generator).to(wide)
    return weight.scatter(dim, spread, (mean + std * fresh).to(weight.dtype))


def add_noise(weight: Tensor, level: float, generator: torch.Generator) -> Tensor:
    """Return a copy with Gaussian noise of `level` times the matrix's own standard deviation on half of the entries.

    OLMoE 4.1.5 tried noise on 50% of the MLP weights; its size relative to the matrix is ours.
    """
    chosen = torch.rand(weight.shape, generator=generator) < NOISE_SHARE
    std = weight.to(torch.promote_types(weight.dtype, torch.float32)).std(correction=0)
    noise = torch.randn(weight.shape, generator=generator).to(std) * (level * std)
    return weight + torch.where(chosen.to(weight.device), noise, 0.0).to(weight.dtype)
