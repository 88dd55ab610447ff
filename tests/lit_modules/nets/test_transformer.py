"""The transformer against its own symmetries and against transformers' Llama.

Legend: B batch, S sequence, D width, H heads, k head width, V vocabulary.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lit_modules.nets.counting import count_ops
from lit_modules.nets.moe import Experts
from lit_modules.nets.transformer import Transformer, rope_table, rotate
from lit_modules.ops import experts as expert_ops

SPARSE = Experts(4, 2, 2, "topk_softmax", shared=1)


def _net(**changes: object) -> Transformer:
    torch.manual_seed(0)
    shape = {"vocab": 40, "width": 32, "layers": 2, "heads": 4, "hidden": 64, "init_std": 0.2, **changes}
    return Transformer(**shape)  # type: ignore[arg-type]


def _tokens(B: int = 3, S: int = 12) -> Tensor:
    return torch.randint(0, 40, (B, S), generator=torch.Generator().manual_seed(0))


KINDS = {"dense": {}, "grouped query": {"kv_heads": 2, "activation": "swiglu"}, "experts": {"experts": SPARSE}}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_depend_on_the_past_only(kind: str) -> None:
    net, tokens_BS = _net(**KINDS[kind]).double(), _tokens()
    logits_BSV = net(tokens_BS)
    changed_BS = tokens_BS.clone()
    changed_BS[:, 7] = (changed_BS[:, 7] + 1) % 40
    difference_S = (net(changed_BS) - logits_BSV).abs().amax((0, 2))
    assert (difference_S[:7] < 1e-12).all()  # not 0: an expert's rows are other ones, and sums run in another order
    assert (difference_S[7:] > 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_its_sequences_one_by_one_and_a_prefix_is_a_prefix(kind: str) -> None:
    net, tokens_BS = _net(**KINDS[kind]).double(), _tokens()
    logits_BSV = net(tokens_BS)
    alone_BSV = torch.cat([net(tokens_S[None]) for tokens_S in tokens_BS])
    torch.testing.assert_close(alone_BSV, logits_BSV, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(net(tokens_BS[:, :5]), logits_BSV[:, :5], rtol=1e-10, atol=1e-12)


def test_rotation_keeps_lengths_and_makes_products_depend_on_the_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q_k, k_k = torch.randn(8, generator=generator).double(), torch.randn(8, generator=generator).double()
    rope = rope_table(20, 2, 8, 10000.0, q_k)
    q_Sk, k_Sk = (rotate(v.repeat(1, 20, 2), rope, 8)[0, :, 8:] for v in (q_k, k_k))  # the second of two heads
    torch.testing.assert_close(q_Sk.norm(dim=-1), q_k.norm().expand(20))
    scores_SS = q_Sk @ k_Sk.T
    for distance in (0, 1, 7):
        diagonal = scores_SS.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert (scores_SS[0, :8].diff().abs() > 1e-3).all()
    by_hand = complex(q_k[1], q_k[5]) * complex(math.cos(3 * 0.1), math.sin(3 * 0.1))  # pair (1, 1 + k / 2), position 3
    assert (q_Sk[3, 1].item(), q_Sk[3, 5].item()) == pytest.approx((by_hand.real, by_hand.imag), abs=1e-6)


NAMES = {
    "q_proj": "attention.query",
    "k_proj": "attention.key",
    "v_proj": "attention.value",
    "o_proj": "attention.output",
    "gate_proj": "mlp.gate",
    "up_proj": "mlp.up",
    "down_proj": "mlp.down",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("kv_heads", "head_width"), [(4, None), (2, None), (1, 16)])
def test_parity_with_llama_in_float64(kv_heads: int, head_width: int | None, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=head_width or 8,
        intermediate_size=48,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    llama = _float64_norms(transformers.LlamaForCausalLM(config).double().eval())
    shape = {"hidden": 48, "kv_heads": kv_heads, "head_width": head_width, "tied": tied, "activation": "swiglu"}
    net = _net(**shape).double()
    weights = net.state_dict()
    for name, weight in llama.state_dict().items():
        with torch.no_grad():
            weight.copy_(weights[_renamed(name)] if _renamed(name) in weights else weights["embedding.weight"])
    torch.testing.assert_close(net(_tokens()), llama(_tokens()).logits, rtol=1e-11, atol=1e-12)


def _float64_norms(model: nn.Module) -> nn.Module:
    """Llama's own RMSNorm casts to float32 whatever comes in."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, nn.RMSNorm(child.weight.shape[0], eps=1e-5).double())
    return model


def _renamed(name: str) -> str:
    name = name.removeprefix("model.").replace("layers.", "blocks.").replace("embed_tokens", "embedding")
    parts = name.replace("lm_head", "head").replace("self_attn.", "").replace("mlp.", "").split(".")
    return ".".join(NAMES.get(part, part) for part in parts)


def test_parity_with_mixtral() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=40,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        num_local_experts=6,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    config._experts_implementation = "eager"
    mixtral = transformers.MixtralForCausalLM(config).double().eval()
    net = _net(hidden=48, kv_heads=2, activation="swiglu", experts=Experts(6, 1, 2, "topk_softmax")).double()
    weights = net.state_dict()
    for name, weight in mixtral.state_dict().items():
        with torch.no_grad():
            block = f"blocks.{name.split('.')[2]}.mlp." if ".layers." in name else ""
            if name.endswith("gate_up_proj"):
                weight.copy_(torch.cat([weights[f"{block}gate"], weights[f"{block}up"]], 1))
            elif name.endswith("down_proj"):
                weight.copy_(weights[f"{block}down"])
            elif name.endswith("gate.weight"):
                weight.copy_(weights[f"{block}router.weight"])
            else:
                weight.copy_(weights[_renamed(name)])
    # 1e-6, as its routing weights are float32 even here
    torch.testing.assert_close(net(_tokens()), mixtral(_tokens()).logits, rtol=1e-5, atol=1e-6)


def test_names_in_the_state_dict() -> None:
    block = {"attention_norm", "attention.query", "attention.key", "attention.value", "attention.output", "mlp_norm"}
    mlp = {"mlp.up", "mlp.gate", "mlp.down"}
    names = {f"blocks.{i}.{name}.weight" for i in range(2) for name in block | mlp}
    assert set(_net(activation="swiglu").state_dict()) == names | {"embedding.weight", "norm.weight", "head.weight"}
    assert set(_net(tied=True).state_dict()) == set(_net().state_dict()) - {"head.weight"}
    assert not any("bias" in name for name in _net(experts=SPARSE).state_dict())


def test_weights_start_from_the_laws_that_are_promised() -> None:
    net = _net(width=128, heads=4, hidden=512, init_std=0.02, layers=8, experts=Experts(2, 1, 1, router_std=0.1))
    for name, weight in net.named_parameters():
        residual = name.endswith(("output.weight", "down"))
        std = 0.1 if "router" in name else 0.02 / 4 if residual else 0.02  # sqrt(2 * 8)
        if weight.ndim > 1:
            assert weight.std().item() == pytest.approx(std, rel=0.15), name
        else:
            assert (weight == 1).all()


def test_experts_go_where_they_are_asked_for() -> None:
    assert list(_net(layers=3, experts=SPARSE).moe_layers()) == [0, 1, 2]
    mixed = _net(layers=3, experts=SPARSE, moe_layers=[2, 0])
    assert list(mixed.moe_layers()) == [0, 2]
    mixed(_tokens())
    assert all(moe.routed is not None and len(moe.routed.experts_SK) == 36 for moe in mixed.moe_layers().values())
    assert _net(experts=SPARSE, moe_layers=[]).moe_layers() == {}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True, "activation": "swiglu", "kv_heads": 2, "head_width": 16},
        {"experts": Experts(8, 1, 1)},
        {"experts": Experts(4, 4, 8, shared=2), "activation": "geglu", "moe_layers": [1]},
    ],
)
def test_operations_by_formula_are_those_torch_counts(changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_ops, "_GROUPED_MM", None)  # torch counts plain products only
    net, tokens_BS = _net(**changes), _tokens(2, 8)
    with FlopCounterMode(display=False) as counter:
        net(tokens_BS)
    ops = net.scalar_ops(tokens_BS)
    assert 2 * ops.multiplications == counter.get_total_flops()
    assert ops.comparisons == 0
    assert count_ops(net, (8,)) == net.scalar_ops(tokens_BS[:1])


def test_additions_are_one_fewer_than_the_terms() -> None:
    net = _net(layers=1, heads=1, width=4, hidden=8, vocab=10)
    tokens = 3
    sums = tokens * (4 * 4 + 8 + 4 + 10), tokens * (tokens + 4)  # outputs of the projections; scores and values
    ops = net.scalar_ops(torch.zeros(1, tokens, dtype=torch.int64))
    assert ops.additions == ops.multiplications - sum(sums)


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_it_learns_under_autocast(kind: str) -> None:
    net, tokens_BS = _net(**KINDS[kind], init_std=0.02), _tokens(4, 16)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        with torch.autocast("cpu", torch.bfloat16):
            logits_BSV = net(tokens_BS)
        assert logits_BSV.dtype == torch.bfloat16
        loss = F.cross_entropy(logits_BSV[:, :-1].float().flatten(0, 1), tokens_BS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(40), abs=0.1)
    assert losses[-1] < 1.0


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_compiled_it_computes_the_same(kind: str) -> None:
    net, tokens_BS = _net(**KINDS[kind]), _tokens()
    compiled = torch.compile(net, backend="aot_eager")
    gradients = []
    for run in (net, compiled):
        logits_BSV = run(tokens_BS)
        gradients.append(torch.autograd.grad(logits_BSV.logsumexp(-1).mean(), list(net.parameters())))
    torch.testing.assert_close(compiled(tokens_BS), net(tokens_BS), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert all(moe.routed is not None for moe in net.moe_layers().values())


def test_any_sequence_length_down_to_none() -> None:
    for kind in KINDS.values():
        net = _net(**kind)
        assert net(_tokens(2, 1)).shape == (2, 1, 40)
        assert net(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 5, 40)


def test_bad_shapes_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="5 heads do not divide width 32; give head_width"):
        _net(heads=5)
    with pytest.raises(ValueError, match="3 heads of keys and values do not divide 4 heads"):
        _net(kv_heads=3)
    with pytest.raises(ValueError, match="even head width, got 7"):
        _net(head_width=7)
    with pytest.raises(ValueError, match=r"moe_layers \[0\] need experts"):
        _net(moe_layers=[0])
    for layers in ([2], [-1], [0, 0]):
        with pytest.raises(ValueError, match="different indices from 0 to 1"):
            _net(experts=SPARSE, moe_layers=layers)
    with pytest.raises(ValueError, match="unknown activation"):
        _net(activation="tanh")
    assert isinstance(_net(kv_heads=1).blocks, nn.ModuleList)
