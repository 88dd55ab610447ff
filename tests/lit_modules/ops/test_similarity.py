"""Cosines by hand and against torch's own, coverage and purity by enumeration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_modules.ops.similarity import expert_cosine, replica_cosine, replica_purity, shard_counts, shard_coverage
from lit_modules.ops.upcycling import shard_experts


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None)
@given(E=st.integers(1, 5), G=st.sampled_from([1, 2, 4]), scale=st.floats(1e-3, 1e3))
def test_fresh_experts_point_where_their_parent_does(E: int, G: int, scale: float) -> None:
    dense_FD = _random(8, 3)
    experts_NHD = scale * shard_experts(dense_FD, G, E, 0)
    torch.testing.assert_close(expert_cosine(experts_NHD, dense_FD, G), torch.ones(E * G, dtype=torch.float64))
    if E > 1:
        torch.testing.assert_close(replica_cosine(experts_NHD, G), torch.ones(G, dtype=torch.float64))


def test_each_expert_is_compared_with_its_own_shard() -> None:
    dense_FD, experts_NHD = _random(8, 3), _random(12, 2, 3, seed=1)
    got_N = expert_cosine(experts_NHD, dense_FD, 4)
    for e in range(12):
        shard = dense_FD[2 * (e % 4) : 2 * (e % 4) + 2].flatten()
        wanted = torch.cosine_similarity(experts_NHD[e].flatten(), shard, dim=0)
        assert got_N[e].item() == pytest.approx(wanted.item(), abs=1e-14)
    assert got_N.abs().max() < 0.95
    torch.testing.assert_close(expert_cosine(-experts_NHD, dense_FD, 4), -got_N)


@settings(deadline=None)
@given(E=st.integers(2, 5), G=st.integers(1, 3), seed=st.integers(0, 99))
def test_replica_cosine_is_the_mean_over_pairs(E: int, G: int, seed: int) -> None:
    experts_NHD = _random(E * G, 2, 3, seed=seed)
    got_G = replica_cosine(experts_NHD, G)
    for g in range(G):
        flat = [experts_NHD[e].flatten() for e in range(E * G) if e % G == g]
        pairs = [torch.cosine_similarity(a, b, dim=0) for i, a in enumerate(flat) for b in flat[:i]]
        assert got_G[g].item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-12)


def test_half_precision_is_compared_in_float32() -> None:
    dense_FD = _random(8, 3).bfloat16()
    cosine_N = expert_cosine(shard_experts(dense_FD, 2, 2, 0), dense_FD, 2)
    assert cosine_N.dtype == torch.float32
    torch.testing.assert_close(cosine_N, torch.ones(4))


def test_coverage_and_purity_of_known_picks() -> None:
    # G = 2: even experts hold shard 0, odd ones shard 1
    picks_SK = torch.tensor([[0, 1], [2, 1], [0, 2], [5, 7]])
    assert shard_counts(picks_SK, 2).tolist() == [[1, 1], [1, 1], [2, 0], [0, 2]]
    assert shard_coverage(picks_SK, 2).item() == 0.75
    assert replica_purity(picks_SK, 2).item() == 0.5
    # every shard is there, but not equally often
    picks_SK = torch.tensor([[0, 2, 4, 1], [0, 1, 2, 3]])
    assert shard_coverage(picks_SK, 2).item() == 1.0
    assert replica_purity(picks_SK, 2).item() == 0.5


@settings(deadline=None)
@given(E=st.integers(1, 4), G=st.integers(1, 4), k=st.integers(1, 3), seed=st.integers(0, 99))
def test_bounds_and_what_purity_implies(E: int, G: int, k: int, seed: int) -> None:
    K = min(k, E) * G
    random = torch.Generator().manual_seed(seed)
    picks_SK = torch.stack([torch.randperm(E * G, generator=random)[:K] for _ in range(16)])
    purity, coverage = replica_purity(picks_SK, G).item(), shard_coverage(picks_SK, G).item()
    assert 0 <= purity <= coverage <= 1
    assert coverage >= 1 / G - 1e-6
    if G == 1 or min(k, E) == E:
        assert purity == coverage == 1
    order_S = torch.randperm(16, generator=random)
    assert replica_purity(picks_SK[order_S].flip(1), G).item() == pytest.approx(purity)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: expert_cosine(_random(4, 2, 3), _random(8, 3), 2), "are not shards of"),
        (lambda: expert_cosine(_random(3, 4, 3), _random(8, 3), 2), "are not shards of"),
        (lambda: replica_cosine(_random(4, 2, 3), 4), "two or more replicas"),
        (lambda: replica_cosine(_random(5, 2, 3), 2), "two or more replicas"),
        (lambda: replica_purity(torch.zeros(4, 3, dtype=torch.int64), 2), "purity is not defined"),
        (lambda: shard_coverage(torch.zeros(0, 2, dtype=torch.int64), 2), "at least 1"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
