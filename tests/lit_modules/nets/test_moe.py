"""The mixture of experts as a layer: what it holds, what it computes, and how it leaves the dense MLP.

Legend: B batch, S tokens, D width, F hidden width, N experts, K chosen.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import Tensor, nn

from lit_modules.nets.moe import MLP, Experts, MoE
from lit_modules.ops import routing
from lit_modules.ops.routing import load_balancing_loss

D, F = 16, 32


def _x(S: int = 24, width: int = D, seed: int = 0) -> Tensor:
    return torch.randn(2, S // 2, width, generator=torch.Generator().manual_seed(seed))


def _moe(activation: str = "squared_relu", **spec: object) -> MoE:
    torch.manual_seed(0)
    return MoE(D, F, activation, Experts(**spec))  # type: ignore[arg-type]


def _copies(mlp: MLP, experts: Experts) -> MoE:
    """Every expert is the MLP itself (G = 1)."""
    moe = MoE(D, F, "squared_relu", experts)
    with torch.no_grad():
        moe.up.copy_(mlp.up.weight.expand_as(moe.up))
        moe.down.copy_(mlp.down.weight.expand_as(moe.down))
    return moe


def test_parameters_have_these_names_and_shapes() -> None:
    moe = _moe("swiglu", expansion=4, granularity=2, top_k=2, shared=3, output="layernorm")
    assert {name: tuple(weight.shape) for name, weight in moe.state_dict().items()} == {
        "router.weight": (8, D),
        "up": (8, F // 2, D),
        "gate": (8, F // 2, D),
        "down": (8, D, F // 2),
        "shared.up.weight": (3 * F // 2, D),
        "shared.gate.weight": (3 * F // 2, D),
        "shared.down.weight": (D, 3 * F // 2),
        "output_norm.weight": (D,),
    }
    assert set(_moe().state_dict()) == {"router.weight", "up", "down"}
    assert set(_moe(output="constant").state_dict()) == {"router.weight", "up", "down"}
    assert set(_moe(output="learnable").state_dict()) == {"router.weight", "up", "down", "output_scale"}


@pytest.mark.parametrize("activation", ["squared_relu", "swiglu"])
@pytest.mark.parametrize(("expansion", "granularity", "top_k"), [(8, 1, 1), (8, 1, 2), (8, 8, 8), (2, 4, 4)])
def test_parameters_are_e_mlps_and_a_router(expansion: int, granularity: int, top_k: int, activation: str) -> None:
    moe = _moe(activation, expansion=expansion, granularity=granularity, top_k=top_k)
    mlp = sum(weight.numel() for weight in MLP(D, F, activation).parameters())
    held = sum(weight.numel() for weight in moe.parameters())
    assert held == expansion * mlp + expansion * granularity * D


def test_copies_of_an_mlp_are_the_mlp_times_the_kept_weight() -> None:
    mlp, x_BSD = MLP(D, F), _x()
    y_BSD = mlp(x_BSD)
    for spec in (Experts(4, 1, 2, "topk_softmax"), Experts(4, 1, 4)):  # weights sum to 1
        torch.testing.assert_close(_copies(mlp, spec)(x_BSD), y_BSD)
    moe = _copies(mlp, Experts(4, 1, 1))
    output_BSD = moe(x_BSD)
    assert moe.routed is not None
    torch.testing.assert_close(output_BSD, y_BSD * moe.routed.weights_SK.view(2, 12, 1))


def test_one_step_parts_the_replicas_and_one_expert_stays_the_dense_mlp() -> None:
    mlp, x_BSD, wanted_BSD = MLP(D, F), _x(), _x(seed=1)
    many, one = _copies(mlp, Experts(4, 1, 1)), _copies(mlp, Experts(1, 1, 1))
    for net in (mlp, many, one):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        (net(x_BSD) - wanted_BSD).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(one.up[0], mlp.up.weight)
    torch.testing.assert_close(one.down[0], mlp.down.weight)
    assert one.router.weight.grad is not None
    assert one.router.weight.grad.abs().max() < 1e-7  # the softmax of one logit is 1
    assert all((many.up[i] - many.up[j]).abs().max() > 1e-5 for i in range(4) for j in range(i))


@pytest.mark.parametrize(("order", "top_k"), [("softmax_topk", 1), ("softmax_topk", 2), ("topk_softmax", 2)])
def test_every_parameter_gets_a_gradient(order: str, top_k: int) -> None:
    moe = _moe("geglu", expansion=4, granularity=2, top_k=top_k, order=order, shared=1, output="learnable")
    moe(_x(400)).square().sum().backward()
    for name, weight in moe.named_parameters():
        assert weight.grad is not None
        assert weight.grad.abs().max() > 0, name


def _groups(width: int = 64) -> MoE:
    """Tied router rows: 8 replicas of 8 shards."""
    torch.manual_seed(0)
    moe = MoE(width, 64, "squared_relu", Experts(8, 8, 8))
    moe.router.weight.data = moe.router.weight.data[:8].repeat_interleave(8, 0)
    return moe


def _purity(moe: MoE) -> float:
    """Share of tokens whose choices hold each shard once."""
    assert moe.routed is not None
    shards_SK = (moe.routed.experts_SK % 8).sort(-1).values
    return (shards_SK == torch.arange(8)).all(-1).float().mean().item()


def test_the_router_is_float32_under_autocast_so_that_groups_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x_BSD = _groups(), _x(4096, 64)
    moe(x_BSD)
    exact = moe.routed
    assert exact is not None
    with torch.autocast("cpu", torch.bfloat16):
        moe(x_BSD)
        assert _purity(moe) == 1.0
        assert moe.routed is not None
        assert torch.equal(moe.routed.logits_SN, exact.logits_SN)
        assert moe.routed.weights_SK.dtype == torch.float32
        moe(x_BSD.bfloat16())
        assert _purity(moe) == 1.0
        # The counterpart: with a router and softmax in bfloat16 replicas tie, and the wrong one wins for some tokens; a
        # top-k that breaks ties in any order then mixes two replicas.
        monkeypatch.setattr(moe.router, "forward", lambda x: nn.functional.linear(x, moe.router.weight))
        monkeypatch.setattr(torch, "promote_types", lambda a, b: a)
        moe(x_BSD)
        assert moe.routed.probs_SN.dtype == torch.bfloat16
        assert _purity(moe) == 1.0
        assert 0.001 < (moe.routed.experts_SK != exact.experts_SK).any(-1).float().mean() < 0.5
        monkeypatch.setattr(routing, "top_indices", lambda x_SN, top_k: x_SN.topk(top_k).indices)
        moe(x_BSD)
        assert 0.5 < _purity(moe) < 0.999


def test_a_float64_layer_is_float64_throughout() -> None:
    moe = _moe(expansion=4, top_k=2, order="topk_softmax").double()
    assert moe(_x().double()).dtype == torch.float64
    assert moe.routed is not None
    assert moe.routed.weights_SK.dtype == torch.float64


def test_jitter_and_capacity_are_for_training_only() -> None:
    moe, plain, x_BSD = _moe(jitter=0.3, capacity_factor=0.25), _moe(), _x(256)
    moe.load_state_dict(plain.state_dict())
    assert torch.equal(moe.eval()(x_BSD), plain(x_BSD))
    moe.train()(x_BSD)
    assert moe.routed is not None
    assert plain.routed is not None
    assert not torch.equal(moe.routed.logits_SN, plain.routed.logits_SN)
    assert moe.routed.kept_SK is not None
    kept_S = moe.routed.kept_SK[:, 0]
    counts = torch.bincount(moe.routed.experts_SK[kept_S, 0], minlength=8)
    assert counts.max() == 8  # 0.25 * 256 / 8
    y_SD = moe(x_BSD).flatten(0, 1)
    assert (y_SD[~moe.routed.kept_SK[:, 0]] == 0).all()


def test_shared_experts_are_added_and_the_output_is_scaled_before() -> None:
    x_BSD = _x()
    moe = _moe(shared=2, granularity=2, top_k=2, output="constant", output_value=3.0)
    routed = _moe(granularity=2, top_k=2)
    routed.load_state_dict({k: v for k, v in moe.state_dict().items() if "shared" not in k})
    torch.testing.assert_close(moe(x_BSD), 3.0 * routed(x_BSD) + moe.shared(x_BSD))
    learnable = _moe(granularity=2, top_k=2, output="learnable", output_value=0.5)
    learnable.load_state_dict({**routed.state_dict(), "output_scale": learnable.output_scale.detach()})
    torch.testing.assert_close(learnable(x_BSD), 0.5 * routed(x_BSD))
    normed = _moe(granularity=2, top_k=2, output="layernorm", output_value=2.0)(x_BSD)
    torch.testing.assert_close(normed.mean(-1), torch.zeros(2, 12), rtol=0, atol=1e-5)
    assert (normed.std(-1, correction=0) < 2.001).all()


def test_copies_and_pickles_leave_the_graph_behind() -> None:
    moe, x_BSD = _moe(), _x()
    y_BSD = moe(x_BSD)
    assert moe.routed is not None
    assert torch.autograd.grad(load_balancing_loss(moe.routed), moe.router.weight)[0].abs().max() > 0
    for twin in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert twin.routed is None
        assert torch.equal(twin(x_BSD), y_BSD)


@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax"])
def test_parity_with_qwen3_moe(order: str) -> None:
    qwen = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = qwen.Qwen3MoeConfig(
        hidden_size=D,
        moe_intermediate_size=F // 2,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=order == "topk_softmax",
    )
    config._experts_implementation = "eager"
    theirs = qwen.Qwen3MoeSparseMoeBlock(config)
    moe = _moe("swiglu", expansion=4, granularity=2, top_k=3, order=order, router_std=1.0)
    theirs.gate.weight.data = moe.router.weight.data
    theirs.experts.gate_up_proj.data = torch.cat([moe.gate.data, moe.up.data], 1)
    theirs.experts.down_proj.data = moe.down.data
    for cast in (nn.Module.float, nn.Module.double):
        x_BSD = _x().to(cast(moe).up.dtype)
        torch.testing.assert_close(moe(x_BSD), cast(theirs)(x_BSD), rtol=1e-5, atol=1e-6)


def test_bad_specifications_are_refused_with_the_reason() -> None:
    for name in ("expansion", "granularity", "top_k"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            Experts(**{name: 0})
    with pytest.raises(ValueError, match="between 1 and the number of experts, 16, got 17"):
        Experts(8, 2, 17)
    with pytest.raises(ValueError, match="softmax of one number is always 1"):
        Experts(8, 1, 1, "topk_softmax")
    with pytest.raises(ValueError, match="unknown order 'sigmoid'"):
        Experts(order="sigmoid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown output 'scale'; known: none, constant"):
        Experts(output="scale")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="capacity_factor must be above 0"):
        Experts(capacity_factor=0.0)
    with pytest.raises(ValueError, match=r"jitter must lie in \[0, 1\)"):
        Experts(jitter=1.0)
    with pytest.raises(ValueError, match="granularity 3 does not divide the hidden width 32"):
        MoE(D, F, "relu", Experts(8, 3, 1))
    with pytest.raises(ValueError, match="unknown activation 'tanh'"):
        MoE(D, F, "tanh", Experts())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Experts().top_k = 2  # type: ignore[misc]
