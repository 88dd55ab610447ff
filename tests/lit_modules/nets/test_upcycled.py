"""A whole transformer starts where its parent was; what is loaded is loaded strictly, and nothing is shared with the parent."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_modules.nets.moe import Experts
from lit_modules.nets.transformer import Transformer
from lit_modules.nets.upcycled import Copy, Upcycle
from lit_modules.ops.similarity import expert_cosine, replica_cosine, replica_purity
from lit_modules.ops.upcycling import UpcycleError

ST, TS = "softmax_topk", "topk_softmax"
SIZES: dict[str, Any] = {"vocab": 32, "width": 32, "layers": 3, "heads": 4, "hidden": 64, "init_std": 0.2}
TOKENS_BS = torch.randint(32, (4, 24), generator=torch.Generator().manual_seed(0))


def build(seed: int, dtype: torch.dtype = torch.float64, **more: Any) -> Transformer:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Transformer(**SIZES | more).to(dtype)


def pair(experts: Experts, upcycle: Upcycle, dtype: torch.dtype = torch.float64, **more: Any) -> tuple:
    """Return a dense net, its mixture, and the receipt."""
    layers = more.pop("moe_layers", None)
    dense, net = build(0, dtype, **more), build(1, dtype, **more, experts=experts, moe_layers=layers)
    receipt = upcycle(net, dense.state_dict(), torch.Generator().manual_seed(2))
    return dense, net, receipt


@torch.no_grad()
def worst(dense: Transformer, net: Transformer) -> float:
    """The largest difference between logits, relative to the largest logit."""
    wanted = dense(TOKENS_BS)
    return ((net(TOKENS_BS) - wanted).abs().max() / wanted.abs().max()).item()


EXACT = {
    "squared_relu": Upcycle(),
    "relu": Upcycle(),
    "reglu": Upcycle(),
    "swiglu": Upcycle(scale="exact"),
    "geglu": Upcycle(scale="exact"),
    "gelu": Upcycle(scale="exact"),
}


@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.parametrize(("E", "G", "K"), [(8, 1, 2), (8, 8, 8), (4, 4, 8)])
def test_topk_softmax_starts_at_the_parent(activation: str, E: int, G: int, K: int) -> None:
    """With the net's own router, whatever it is."""
    experts = Experts(E, G, K, TS, router_std=0.3)
    dense, net, receipt = pair(experts, EXACT[activation], activation=activation)
    assert worst(dense, net) < 1e-12
    assert receipt.warnings == ()
    dense, net, _ = pair(experts, EXACT[activation], torch.float32, activation=activation)
    assert worst(dense, net) < 3e-6
    for layer in net.moe_layers().values():
        assert replica_purity(layer.routed.experts_SK, G) == 1


@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.parametrize(("E", "G", "K"), [(8, 1, 1), (8, 1, 2), (8, 8, 8), (8, 8, 16)])
def test_softmax_topk_starts_at_the_parent_as_its_router_goes_to_zero(activation: str, E: int, G: int, K: int) -> None:
    found = []
    for std in (0.0, 1e-5, 1e-4):
        recipe = dataclasses.replace(EXACT[activation], router_std=std)
        dense, net, _ = pair(Experts(E, G, K, ST), recipe, activation=activation)
        found.append(worst(dense, net))
    assert found[0] < 1e-12
    assert found[2] / found[1] == pytest.approx(10, rel=0.05)
    assert found[2] < 1e-2


@settings(max_examples=25, deadline=None)
@given(
    G=st.sampled_from([1, 2, 4]),
    k=st.integers(1, 3),
    shared=st.integers(0, 5),
    layers=st.sets(st.integers(0, 2), min_size=1),
    tied=st.booleans(),
    kv_heads=st.sampled_from([1, 2, 4]),
    order=st.sampled_from([ST, TS]),
    activation=st.sampled_from(["squared_relu", "swiglu"]),
    permute=st.booleans(),
)
def test_no_special_cases(G, k, shared, layers, tied, kv_heads, order, activation, permute) -> None:
    """Mixed dense and MoE layers, tied embeddings, grouped queries, shared experts, permuted replicas."""
    K = k * G if (k * G > 1 or order == ST) else 2
    recipe = Upcycle(scale="exact", router_std=0.0 if order == ST else 0.3, permute=permute)
    more = {"tied": tied, "kv_heads": kv_heads, "activation": activation, "moe_layers": sorted(layers)}
    dense, net, receipt = pair(Experts(4, G, K, order, shared=shared), recipe, **more)
    assert worst(dense, net) < 1e-12
    assert receipt.parameters_after == sum(p.numel() for p in net.parameters())
    assert receipt.parameters_before == sum(p.numel() for p in dense.parameters())
    assert ("head.weight" in receipt.copied) != tied


def test_shared_experts_of_full_width_carry_half() -> None:
    dense, net, _ = pair(Experts(4, 4, 4, TS, shared=4), Upcycle())
    assert worst(dense, net) < 1e-12
    x_SD = torch.randn(16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for i, layer in net.moe_layers().items():
        whole, half = dense.blocks[i].mlp(x_SD), layer.shared(x_SD)
        torch.testing.assert_close(half, whole / 2, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(layer(x_SD) - half, whole / 2, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shared", [0, 8])
@pytest.mark.parametrize("output", ["constant", "learnable"])
def test_the_output_factor_can_carry_the_scale(output: str, shared: int) -> None:
    experts = Experts(8, 8, 8, ST, output=output, shared=shared)
    recipe = Upcycle(scale="output", router_std=0.0)
    dense, net, receipt = pair(experts, recipe)
    assert worst(dense, net) < 1e-12
    assert receipt.factors.output == receipt.correction == 64
    layer = net.moe_layers()[1]
    if not shared:
        assert torch.equal(layer.up[8:16].flatten(0, 1), dense.blocks[1].mlp.up.weight)  # weights are untouched
    assert (layer.output_scale.item() if output == "learnable" else layer.experts.output_value) == 64
    # a checkpoint holds a learnable factor but no constant: a net built again needs it told
    again = build(5, experts=experts)
    again.load_state_dict(net.state_dict())
    recipe.settle(again)
    assert worst(dense, again) < 1e-12
    with pytest.raises(UpcycleError, match=r"scale='output' needs a constant or learnable output factor"):
        pair(Experts(8, 8, 8, ST), Upcycle(scale="output"))


def test_a_given_output_value_is_kept_and_told() -> None:
    for output in ("constant", "learnable"):
        experts = Experts(8, 8, 8, ST, output=output, output_value=64.0)
        dense, net, receipt = pair(experts, Upcycle(scale="none", router_std=0.0))
        assert worst(dense, net) < 1e-12
        assert any("output factor 64 comes on top" in warning for warning in receipt.warnings)
    _, net, _ = pair(Experts(8, 8, 8, ST, output="layernorm", output_value=0.5), Upcycle(router_std=0.0))
    assert (net.moe_layers()[0].output_norm.weight == 0.5).all()


@pytest.mark.parametrize("control", ["keyed by shard", "random router", "no scale"])
def test_negative_controls_start_elsewhere(control: str) -> None:
    recipe = {
        "random router": Upcycle(init="random_router"),
        "no scale": Upcycle(scale="none"),
        "keyed by shard": Upcycle(),
    }[control]
    dense, net, _ = pair(Experts(8, 8, 8, TS, router_std=0.02), recipe)
    if control == "keyed by shard":
        for layer in net.moe_layers().values():
            layer.router.weight.data = layer.router.weight[::8].repeat(8, 1)
    assert worst(dense, net) > 0.1
    purity = replica_purity(net.moe_layers()[0].routed.experts_SK, 8)
    assert purity == 1 if control == "no scale" else purity < 0.05


@pytest.mark.parametrize("std", [1e-3, 0.02])
def test_groups_hold_under_bf16_autocast(std: float) -> None:
    """The router stays in float32 there, and it has to: with a softmax in bf16 the groups break."""
    _, net, _ = pair(Experts(8, 8, 8, ST), Upcycle(router_std=std), torch.float32)
    tokens_BS = torch.randint(32, (16, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        net(tokens_BS)
    for layer in net.moe_layers().values():
        assert layer.routed.logits_SN.dtype == torch.float32
        assert replica_purity(layer.routed.experts_SK, 8) == 1
    low_SN = net.moe_layers()[0].routed.logits_SN.bfloat16().softmax(-1)
    assert replica_purity(low_SN.topk(8).indices, 8) < 0.995


def train(net: Transformer, steps: int = 1) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
    for _ in range(steps):
        logits_BSV = net(TOKENS_BS[:, :-1])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), TOKENS_BS[:, 1:].flatten()).backward()
        optimizer.step()


def test_one_step_makes_replicas_differ() -> None:
    dense, net, _ = pair(Experts(4, 2, 2, ST), Upcycle(router_std=0.02))
    layer, parent = net.moe_layers()[0], dense.blocks[0].mlp.up.weight.detach()
    assert replica_cosine(layer.up.detach(), 2) == pytest.approx([1, 1], abs=1e-14)
    train(net)
    assert (replica_cosine(layer.up.detach(), 2) < 1 - 1e-9).all()
    cosine_N = expert_cosine(layer.up.detach(), parent, 2)
    assert (cosine_N < 1 - 1e-9).any()
    assert (cosine_N > 0.99).all()


def test_a_single_replica_trains_as_its_parent() -> None:
    dense, net, receipt = pair(Experts(1, 1, 1, ST), Upcycle())
    router = copy.deepcopy(net.moe_layers()[0].router.weight)
    assert any("expansion 1" in warning for warning in receipt.warnings)
    train(dense, 3)
    train(net, 3)
    assert worst(dense, net) < 1e-12
    assert torch.equal(net.moe_layers()[0].router.weight, router)


def test_nothing_is_shared_with_the_parent_and_draws_are_repeatable() -> None:
    dense, net, _ = pair(Experts(4, 2, 2, ST), Upcycle(router_std=0.02))
    before = {key: tensor.clone() for key, tensor in dense.state_dict().items()}
    train(net)
    assert all(torch.equal(before[key], tensor) for key, tensor in dense.state_dict().items())
    state = dense.state_dict()
    nets = [build(seed, experts=Experts(4, 2, 2, ST)) for seed in (3, 4)]
    for made in nets:  # different fresh nets, one generator seed: the same start
        Upcycle(router_std=0.02, reinit=0.5, init_std=0.02)(made, state, torch.Generator().manual_seed(6))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


@pytest.mark.parametrize("tied", [False, True])
def test_copy_continues_the_parent(tied: bool) -> None:
    dense, net = build(0, tied=tied), build(1, tied=tied)
    assert worst(dense, net) > 0.1
    receipt = Copy()(net, dense.state_dict(), torch.Generator())
    assert worst(dense, net) == 0
    assert receipt.copied == tuple(dense.state_dict())
    assert receipt.parameters_before == receipt.parameters_after == sum(p.numel() for p in net.parameters())
    train(net)
    assert worst(dense, net) > 1e-9


@pytest.mark.parametrize(
    ("parent", "net", "message"),
    [
        (
            {"width": 16},
            {},
            "'embedding.weight' has shape (32, 32), but source key 'embedding.weight' of shape (32, 16)",
        ),
        (
            {"layers": 2},
            {},
            "target key 'blocks.2.attention_norm.weight' needs source key 'blocks.2.attention_norm.weight'",
        ),
        ({"layers": 4}, {}, "source key 'blocks.3.attention_norm.weight' is used by no target key"),
        ({"activation": "swiglu"}, {}, "source key 'blocks.0.mlp.gate.weight' is used by no target key"),
        ({}, {"activation": "swiglu"}, "needs source key 'blocks.0.mlp.gate.weight', which the checkpoint has not"),
        ({"kv_heads": 2}, {}, "'blocks.0.attention.key.weight' has shape (32, 32)"),
        ({"dtype": torch.float32}, {}, "'embedding.weight' is torch.float64, but source key"),
    ],
)
def test_a_parent_that_does_not_fit_is_refused(parent: dict, net: dict, message: str) -> None:
    state = build(0, **parent).state_dict()
    for call, made in ((Upcycle(), build(1, **net, experts=Experts(4))), (Copy(), build(1, **net))):
        before = {key: tensor.clone() for key, tensor in made.state_dict().items()}
        with pytest.raises(UpcycleError, match=re.escape(message)):
            call(made, state, torch.Generator())
        assert all(torch.equal(before[key], tensor) for key, tensor in made.state_dict().items())


def test_kinds_of_nets_that_cannot_be_upcycled() -> None:
    state = build(0).state_dict()
    with pytest.raises(UpcycleError, match="no MoE layer to upcycle into: a dense continuation is Copy"):
        Upcycle()(build(1), state, torch.Generator())
    net = build(1, experts=Experts(4, 1, 2))
    net.blocks[2].mlp.experts = Experts(4, 1, 1)
    with pytest.raises(UpcycleError, match="MoE layers 0 and 2 differ"):
        Upcycle()(net, state, torch.Generator())


def test_a_configuration_builds_it() -> None:
    made = instantiate({"_target_": "lit_modules.nets.upcycled.Upcycle", "scale": 2.5, "router_std": 1e-3})
    assert made == Upcycle(scale=2.5, router_std=1e-3)
    assert instantiate({"_target_": "lit_modules.nets.upcycled.Copy"}) == Copy()
    with pytest.raises(Exception, match="unknown scale mode 'papers', nearest: 'paper'"):
        instantiate({"_target_": "lit_modules.nets.upcycled.Upcycle", "scale": "papers"})
