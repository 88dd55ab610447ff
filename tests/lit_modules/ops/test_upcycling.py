"""Upcycling against a slow float64 mixture: selection, exactness at step 0, scales, negative controls.

Legend: E expansion, G granularity, K experts per token, N = E * G, F hidden units, D width, S tokens.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_modules.ops.similarity import replica_purity
from lit_modules.ops.upcycling import (
    Recipe,
    Target,
    correction,
    expected_error,
    expected_gain,
    expert_layout,
    scale_of,
    upcycle,
    virtual_group_router,
)

ST, TS = "softmax_topk", "topk_softmax"
SMALL = Recipe(router_std=1e-3)
FUNCTIONS = {"squared_relu": lambda x: F.relu(x).square(), "relu": F.relu, "gelu": F.gelu, "silu": F.silu}
GATES = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}


def mlp(x_SD: Tensor, up: Tensor, gate: Tensor | None, down: Tensor, activation: str) -> Tensor:
    hidden = x_SD @ up.T
    hidden = FUNCTIONS[activation](hidden) if gate is None else GATES[activation](x_SD @ gate.T) * hidden
    return hidden @ down.T


def picks_of(logits_SN: Tensor, top_k: int) -> Tensor:
    return logits_SN.argsort(dim=1, descending=True, stable=True)[:, :top_k]


def mixture(x_SD: Tensor, state: dict[str, Tensor], top_k: int, order: str, activation: str) -> Tensor:
    """Every token through every expert it picked, one by one."""
    get = {key.removeprefix("blocks.0.mlp."): value for key, value in state.items()}
    logits_SN = x_SD @ get["router.weight"].T
    picks_SK = picks_of(logits_SN, top_k)
    kept_SK = logits_SN.gather(1, picks_SK)
    weights_SK = logits_SN.softmax(1).gather(1, picks_SK) if order == ST else kept_SK.softmax(1)
    y_SD = torch.zeros_like(x_SD)
    for token in range(len(x_SD)):
        for weight, e in zip(weights_SK[token], picks_SK[token].tolist(), strict=True):
            gate = get["gate"][e] if "gate" in get else None
            y_SD[token] += weight * mlp(x_SD[token : token + 1], get["up"][e], gate, get["down"][e], activation)[0]
    if "shared.up.weight" in get:
        y_SD += mlp(x_SD, get["shared.up.weight"], get.get("shared.gate.weight"), get["shared.down.weight"], activation)
    return y_SD


def case(
    E: int,
    G: int,
    K: int,
    order: str,
    activation: str = "squared_relu",
    recipe: Recipe = SMALL,
    **more,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the dense output, the mixture's, and the mixture's state, in float64 unless told otherwise."""
    D, width, S, dtype = more.get("D", 32), more.get("width", 32), more.get("S", 24), more.get("dtype", torch.float64)
    random = torch.Generator().manual_seed(more.get("seed", 0))
    shared = more.get("shared", 0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) / math.sqrt(shape[-1])

    names = ("up", "gate", "down") if activation in GATES else ("up", "down")
    dense = {n: draw(D, width) if n == "down" else draw(width, D) for n in names}
    shapes: dict[str, tuple[int, ...]] = {"blocks.0.mlp.router.weight": (E * G, D)}
    for n in names:
        shapes[f"blocks.0.mlp.{n}"] = (E * G, D, width // G) if n == "down" else (E * G, width // G, D)
        if shared:
            part = shared * width // G
            shapes[f"blocks.0.mlp.shared.{n}.weight"] = (D, part) if n == "down" else (part, D)
    target = Target(E, G, K, order, activation, (0,), shared=shared)
    state, _ = upcycle({f"blocks.0.mlp.{n}.weight": w for n, w in dense.items()}, shapes, target, recipe, random)
    x_SD = draw(S, D) * math.sqrt(D) * more.get("spread", 1.0)
    y_SD = mlp(x_SD, dense["up"], dense.get("gate"), dense["down"], activation)
    return y_SD, mixture(x_SD, state, K, order, activation), state


def error(dense: Tensor, mixed: Tensor) -> float:
    """Of the whole output, relative to the dense one."""
    return ((mixed - dense).norm() / dense.norm()).item()


def worst(dense: Tensor, mixed: Tensor) -> float:
    return ((mixed - dense).abs().max() / dense.abs().max()).item()


def slope(dense: Tensor, mixed: Tensor) -> float:
    return ((mixed * dense).sum() / dense.square().sum()).item()


# T1: every token selects every shard exactly k times


@pytest.mark.parametrize("D", [64, 100, 2048])
@pytest.mark.parametrize("std", [1e-4, 1e-3, 0.02])
def test_every_token_picks_each_shard_equally_often(D: int, std: float) -> None:
    random = torch.Generator().manual_seed(D)
    router_ND = virtual_group_router(torch.randn(8, D, generator=random) * std, 8)
    logits_SN = torch.randn(4096, D, generator=random) @ router_ND.T
    for K in (8, 16, 24):
        assert replica_purity(logits_SN.topk(K).indices, 8) == 1.0
        assert replica_purity(picks_of(logits_SN, K), 8) == 1.0


@settings(deadline=None)
@given(E=st.integers(1, 9), G=st.integers(1, 9), d=st.integers(1, 4))
def test_layout_tiles_shards_and_repeats_replicas(E: int, G: int, d: int) -> None:
    shard_N, replica_N, units_NH = expert_layout(G * d, G, E)
    assert shard_N.tolist() == list(range(G)) * E
    assert replica_N.tolist() == [r for r in range(E) for _ in range(G)]
    for e in range(E * G):
        assert units_NH[e].tolist() == list(range(shard_N[e] * d, (shard_N[e] + 1) * d))
    for r in range(E):  # each replica holds every hidden unit once
        assert sorted(units_NH[replica_N == r].flatten().tolist()) == list(range(G * d))


# T2: topK-then-softmax is exact for any router


@settings(max_examples=60, deadline=None)
@given(
    E=st.integers(2, 5),
    G=st.sampled_from([1, 2, 4, 8]),
    k=st.integers(1, 2),
    std=st.floats(1e-4, 3.0),
    activation=st.sampled_from(["squared_relu", "relu", "reglu"]),
    mode=st.sampled_from(["paper", "exact", "down_only"]),
    permute=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_topk_softmax_is_exact_for_any_router(E, G, k, std, activation, mode, permute, seed) -> None:
    K = k * G if k * G > 1 else 2
    recipe = Recipe(scale=mode, router_std=std, permute=permute)
    dense, mixed, _ = case(E, G, K, TS, activation, recipe, seed=seed, S=8)
    assert worst(dense, mixed) < 1e-12


@pytest.mark.parametrize(("E", "G", "K"), [(8, 8, 8), (8, 8, 16), (4, 2, 2)])
def test_topk_softmax_in_float32(E: int, G: int, K: int) -> None:
    dense, mixed, _ = case(E, G, K, TS, recipe=Recipe(router_std=0.02), dtype=torch.float32)
    assert worst(dense, mixed) < 4e-6


@settings(max_examples=40, deadline=None)
@given(
    E=st.integers(1, 5),
    G=st.sampled_from([1, 2, 4]),
    k=st.integers(1, 2),
    activation=st.sampled_from([*FUNCTIONS, *GATES]),
    shared=st.integers(0, 6),
    permute=st.booleans(),
    mode=st.sampled_from(["exact", "down_only"]),
)
def test_softmax_topk_is_exact_for_a_zero_router(E, G, k, activation, shared, permute, mode) -> None:
    """Uniform probabilities, the assumption behind C, hold for a router of zeros; any number of shared experts."""
    K = min(k, E) * G
    recipe = Recipe(scale=mode, router_std=0.0, permute=permute)
    dense, mixed, _ = case(E, G, K, ST, activation, recipe, shared=shared, S=6)
    assert worst(dense, mixed) < 1e-12


# T3: softmax-then-topK is exact as the router's logits go to zero, linearly


@pytest.mark.parametrize(("K", "published"), [(8, 1.4e-3), (16, 1.0e-3)])
def test_softmax_topk_error_is_linear_in_the_routers_spread(K: int, published: float) -> None:
    errors = []
    for sigma in (8e-4, 8e-5, 8e-6):
        dense, mixed, _ = case(8, 8, K, ST, recipe=Recipe(router_std=sigma / 8), D=64, width=64, S=64)
        errors.append(error(dense, mixed))
    assert errors[0] == pytest.approx(published, rel=0.25)
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.01)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize(("K", "gains"), [(8, (1.07, 1.15, 1.31)), (16, (1.06, 1.12, 1.24))])
def test_gain_of_a_spread_router_is_the_measured_one(K: int, gains: tuple[float, ...]) -> None:
    for sigma, gain in zip((0.05, 0.10, 0.20), gains, strict=True):
        assert expected_gain(8, 8, K, sigma) == pytest.approx(gain, abs=0.03)
        dense, mixed, _ = case(8, 8, K, ST, recipe=Recipe(router_std=sigma / 8), D=64, width=64, S=96)
        assert slope(dense, mixed) == pytest.approx(gain, abs=0.03)


# T4, T5: without scaling the output is too small by C


@pytest.mark.parametrize(("E", "G", "K", "measured"), [(8, 1, 1, 0.1265), (8, 1, 2, 0.2524), (8, 8, 8, 0.0158)])
def test_unscaled_softmax_topk_is_too_small(E: int, G: int, K: int, measured: float) -> None:
    dense, mixed, _ = case(E, G, K, ST, recipe=Recipe(scale="none", router_std=1e-3), D=64, width=64, S=96)
    assert slope(dense, mixed) == pytest.approx(K / (E * G**2), rel=0.015)
    assert slope(dense, mixed) == pytest.approx(measured, rel=5e-3)


@pytest.mark.parametrize(("E", "G", "K", "expected"), [(8, 1, 2, 1.0), (8, 8, 16, 0.125), (8, 8, 8, 0.125)])
def test_unscaled_topk_softmax_is_too_small_by_the_granularity(E: int, G: int, K: int, expected: float) -> None:
    dense, mixed, _ = case(E, G, K, TS, recipe=Recipe(scale="none", router_std=0.5))
    assert worst(dense * expected, mixed) < 1e-12


# T6: SwiGLU


@pytest.mark.parametrize(("E", "G", "K", "published"), [(8, 1, 1, 0.23), (8, 1, 2, 0.15), (8, 8, 8, 0.48)])
def test_equal_scale_does_not_preserve_swiglu(E: int, G: int, K: int, published: float) -> None:
    """By how much depends on the spread of the gate; the published numbers are those of about 0.4."""
    for spread in (0.4, 1.0):
        size = {"D": 64, "width": 128, "S": 96, "spread": spread}
        dense, mixed, _ = case(E, G, K, ST, "swiglu", Recipe(router_std=1e-6), **size)
        gate = torch.randn(10**6, generator=torch.Generator().manual_seed(0)) * spread
        factor = scale_of(E, G, K, ST, "swiglu").gate
        change = gate * ((factor * gate).sigmoid() - gate.sigmoid())
        assert error(dense, mixed) == pytest.approx((change.norm() / F.silu(gate).norm()).item(), rel=0.1)
        if spread == 0.4:
            assert error(dense, mixed) == pytest.approx(published, abs=0.05)
        dense, mixed, _ = case(E, G, K, ST, "swiglu", Recipe(scale="exact", router_std=1e-6), **size)
        assert error(dense, mixed) < 5e-5


@pytest.mark.parametrize("activation", [*FUNCTIONS, *GATES])
def test_exact_scale_is_exact_for_every_activation(activation: str) -> None:
    for K in (4, 8):
        dense, mixed, _ = case(3, 4, K, TS, activation, Recipe(scale="exact", router_std=0.5))
        assert worst(dense, mixed) < 1e-12


# T7: negative controls


def keyed_by_shard(router_ND: Tensor, G: int) -> Tensor:
    """The classic bug: rows tiled as the shards are, instead of repeated as the replicas are."""
    return router_ND[::G].repeat(G, 1)


@pytest.mark.parametrize("control", ["keyed_by_shard", "random_router"])
def test_wrong_routers_break_the_selection_and_the_function(control: str) -> None:
    init = "random_router" if control == "random_router" else "virtual_group"
    size = {"D": 64, "width": 64, "S": 256}
    dense, mixed, state = case(8, 8, 8, TS, recipe=Recipe(init=init, router_std=0.02), **size)
    if control == "keyed_by_shard":
        state["blocks.0.mlp.router.weight"] = keyed_by_shard(state["blocks.0.mlp.router.weight"], 8)
    x_SD = torch.randn(256, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    picks_SK = picks_of(x_SD @ state["blocks.0.mlp.router.weight"].T, 8)
    assert replica_purity(picks_SK, 8) < 0.05
    if control == "random_router":
        assert error(dense, mixed) == pytest.approx(expected_error(8, 8, 8, init), rel=0.15)


# T8: why the router must stay in float32


@pytest.mark.parametrize(("std", "broken"), [(1e-3, 0.3), (0.02, 0.005)])
def test_a_bf16_softmax_breaks_the_groups(std: float, broken: float) -> None:
    random = torch.Generator().manual_seed(0)
    router_ND = virtual_group_router(torch.randn(8, 64, generator=random) * std, 8)
    logits_SN = torch.randn(4096, 64, generator=random) @ router_ND.T
    assert replica_purity(logits_SN.softmax(1).topk(8).indices, 8) == 1.0
    assert replica_purity(logits_SN.bfloat16().softmax(1).topk(8).indices, 8) < 1 - broken


# what is lost where G does not divide K, and with a random router


@pytest.mark.parametrize(
    ("E", "G", "K", "init"),
    [(4, 8, 4, "virtual_group"), (4, 8, 12, "virtual_group"), (8, 4, 2, "virtual_group"), (8, 8, 8, "random_router")],
)
def test_expected_error_is_what_happens(E: int, G: int, K: int, init: str) -> None:
    errors = [
        error(*case(E, G, K, TS, recipe=Recipe(init=init, router_std=1e-3), D=64, width=128, S=64, seed=seed)[:2])
        for seed in range(3)
    ]
    assert sum(errors) / 3 == pytest.approx(expected_error(E, G, K, init), rel=0.12)


@settings(deadline=None)
@given(E=st.integers(1, 12), G=st.integers(1, 12), k=st.integers(1, 3))
def test_whole_groups_lose_nothing(E: int, G: int, k: int) -> None:
    K = min(k, E) * G
    assert expected_error(E, G, K, "virtual_group") == 0
    assert expected_error(E, 1, min(k, E), "random_router") == pytest.approx(0, abs=1e-12)
    if E > 1 or k >= E:
        assert correction(E, G, K, ST) * K == pytest.approx(E * G**2)
        assert scale_of(E, G, K, ST, "relu", "exact").down == pytest.approx((E * G**2 / K) ** 0.5)
