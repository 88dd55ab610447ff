"""Prices against nets that are really built, against what autograd really keeps, and against published totals."""

from __future__ import annotations

import inspect
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_modules.nets.counting import count_ops, count_params
from lit_modules.nets.moe import Experts
from lit_modules.nets.pricing import KEPT, SIZES, Shape, price
from lit_modules.nets.transformer import Transformer
from lit_modules.ops.experts import ACTIVATIONS

NANO = replace(SIZES["nano"], vocab=64, width=32, hidden=64)
VARIANTS = {
    "dense": NANO,
    "tied, grouped query": replace(NANO, tied=True, kv_heads=2, head_width=16, activation="swiglu"),
    "E8G1T1": replace(NANO, experts=Experts(8, 1, 1)),
    "E8G1T2": replace(NANO, experts=Experts(8, 1, 2)),
    "E8G8T8": replace(NANO, experts=Experts(8, 8, 8)),
    "topk first": replace(NANO, experts=Experts(4, 2, 4, "topk_softmax"), activation="geglu"),
    "shared, learnable": replace(NANO, experts=Experts(2, 4, 4, shared=3, output="learnable"), activation="reglu"),
    "some layers, norm": replace(NANO, experts=Experts(4, 2, 2, output="layernorm"), moe_layers=(0, 2)),
    "no layer": replace(NANO, experts=Experts(), moe_layers=()),
}


def _build(shape: Shape) -> Transformer:
    return Transformer(**vars(shape))


def test_a_shape_has_the_arguments_of_the_net_and_their_defaults() -> None:
    arguments = {name: p.default for name, p in inspect.signature(Transformer).parameters.items()}
    assert [field.name for field in fields(Shape)] == list(arguments)
    shape = Shape(8, 8, 1, 1, 8)
    assert all(getattr(shape, n) == d for n, d in arguments.items() if d is not inspect.Parameter.empty)
    assert set(KEPT) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", [*VARIANTS, "nano", "micro"])
def test_parameters_are_those_of_the_net(name: str) -> None:
    shape = VARIANTS.get(name) or SIZES[name]
    net, cost = _build(shape), price(shape, 16)
    assert cost.params == count_params(net)
    head = 0 if net.head is None else net.head.weight.numel()
    assert cost.params_embedding == net.embedding.weight.numel() + head
    experts = [w for moe in net.moe_layers().values() for w in (moe.up, moe.gate, moe.down) if w is not None]
    assert cost.params_experts == sum(w.numel() for w in experts)
    idle = sum(w[shape.experts.top_k :].numel() for w in experts) if shape.experts else 0
    assert cost.params_active == cost.params - idle


@pytest.mark.parametrize("name", VARIANTS)
def test_flops_are_twice_the_multiplications_of_the_net(name: str) -> None:
    shape = VARIANTS[name]
    cost = price(shape, 24)
    assert 24 * cost.flops_forward == 2 * count_ops(_build(shape), (24,)).multiplications
    assert cost.flops_training == 3 * cost.flops_forward


@pytest.mark.parametrize(("granularity", "top_k"), [(1, 1), (1, 2), (2, 2), (8, 8), (8, 16)])
def test_experts_cost_k_over_g_mlps_and_a_router(granularity: int, top_k: int) -> None:
    experts = Experts(8, granularity, top_k)
    dense, sparse = price(NANO, 24), price(replace(NANO, experts=experts), 24)
    mlp, routers = 2 * NANO.width * NANO.hidden, NANO.layers * experts.count * NANO.width
    extra = sparse.flops_forward - dense.flops_forward
    assert extra == 2 * NANO.layers * (top_k - granularity) * mlp // granularity + 2 * routers
    assert (extra == 2 * routers) == (top_k == granularity)  # iso-FLOP, the router aside
    assert sparse.params == dense.params + NANO.layers * 7 * mlp + routers


def _kept(shape: Shape, sequences: int, context: int, mixed: bool) -> int:
    """Bytes that autograd keeps for the backward pass, other than parameters; each storage once."""
    net = _build(shape)
    own = {weight.untyped_storage().data_ptr() for weight in net.parameters()}
    sizes: dict[int, int] = {}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        alive.append(tensor)  # an address that is free again must not be taken for the same storage
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens_BS = torch.randint(0, shape.vocab, (sequences, context))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            logits_BSV = net(tokens_BS)
        loss = F.cross_entropy(logits_BSV.float().flatten(0, 1), tokens_BS.flatten())
    assert loss.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", ["dense", "E8G1T1", "E8G1T2", "E8G8T8", "topk first"])
@pytest.mark.parametrize("activation", ["squared_relu", "relu", "gelu", "reglu", "swiglu"])
def test_activation_bytes_are_what_autograd_keeps(activation: str, name: str, mixed: bool) -> None:
    shape, sequences, context = replace(VARIANTS[name], activation=activation), 16, 64
    cost = price(shape, context, "bf16-mixed" if mixed else "fp32")
    copies = cost.bytes_weights - 4 * cost.params  # what autocast keeps of weights
    # On CPU a norm is not fused, and keeps its input divided by the root mean square as well.
    unfused = sequences * context * (2 * shape.layers + 1) * 4 * shape.width
    assert _kept(shape, sequences, context, mixed) == pytest.approx(
        sequences * cost.bytes_activations + copies + unfused, rel=0.01
    )


def test_states_are_16_bytes_a_parameter() -> None:
    cost = price(NANO, 16, "fp32")
    assert cost.bytes_weights + cost.bytes_gradients + cost.bytes_adam == 16 * cost.params


def test_totals_of_the_paper_and_of_public_models() -> None:
    dense = price(SIZES["nemotron_15b"], 4096)
    assert dense.params - dense.params_embedding == pytest.approx(12.5e9, rel=0.005)
    assert dense.params_embedding == pytest.approx(3.15e9, rel=0.005)
    totals = {}
    for experts in (Experts(8, 1, 1), Experts(8, 1, 2), Experts(8, 8, 8), Experts(8, 8, 16)):
        totals[experts] = price(replace(SIZES["nemotron_15b"], experts=experts), 4096)
    assert {round(cost.params / 1e9) for cost in totals.values()} == {83}
    assert [round(cost.params_active / 1e9, 1) for cost in totals.values()] == [15.6, 25.3, 15.6, 25.3]
    assert next(iter(totals.values())).params_experts / 8 == pytest.approx(9.66e9, rel=0.001)  # the dense MLPs
    assert price(SIZES["smollm2_135m"], 2048).params == 134_515_008
    assert price(SIZES["gpt_2b"], 4096).params == pytest.approx(2.25e9, rel=0.01)
    assert price(SIZES["nano"], 128).params == 180_672
    assert price(SIZES["base"], 1024).params == pytest.approx(110e6, rel=0.01)
    assert price(SIZES["large"], 1024).params == pytest.approx(1e9, rel=0.05)


def test_a_large_shape_is_priced_without_building_it() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    huge = replace(SIZES["nemotron_15b"], experts=Experts(8, 32, 32))
    assert price(huge, 4096).bytes_adam > 600e9
    assert torch.equal(torch.get_rng_state(), before)  # nothing was drawn


def test_bad_shapes_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="5 heads do not divide"):
        replace(NANO, heads=5)
    with pytest.raises(ValueError, match="unknown activation"):
        replace(NANO, activation="tanh")
    with pytest.raises(ValueError, match="need experts"):
        replace(NANO, moe_layers=(0,))
    with pytest.raises(ValueError, match="granularity 3 does not divide"):
        replace(NANO, experts=Experts(8, 3, 1))
    with pytest.raises(ValueError, match="unknown precision 'fp8'; known: fp32, bf16-mixed"):
        price(NANO, 16, "fp8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        price(NANO, 0)
