"""Our transformer and Hugging Face's models hold the same function under each other's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from upcycle import tiny

from experiments.errors import UserError
from experiments.upcycle.export import export, load_dense, load_run
from experiments.upcycle.names import from_llama_names, host_tensors, to_llama_names
from experiments.upcycle.source import open_source
from lit_modules.nets.moe import Experts
from lit_modules.nets.transformer import Transformer

NET: dict[str, Any] = {"vocab": 96, "width": 32, "layers": 2, "heads": 4, "hidden": 64, "kv_heads": 2, "init_std": 0.1}


def logits_of(net: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(tiny.tokens())


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"hidden_act": "gelu"}, {"head_dim": 12}])
def test_a_dense_checkpoint_comes_in_and_goes_out(tmp_path: Path, changes: dict[str, Any]) -> None:
    source = tiny.dense(tmp_path / "dense", **changes)
    net = load_dense(open_source(source))
    parent = tiny.logits(source)
    assert (logits_of(net) - parent).abs().max() < 1e-5
    export(net, tmp_path / "out", context=128)
    assert torch.equal(tiny.logits(tmp_path / "out"), parent)


@pytest.mark.parametrize(
    ("experts", "layers", "kind"),
    [
        (Experts(4, 2, 2, "topk_softmax", router_std=0.3), None, "mixtral"),
        (Experts(4, 2, 2, "softmax_topk", router_std=0.3), None, "qwen2_moe"),
        (Experts(4, 2, 2, "topk_softmax", router_std=0.3), [1], "qwen2_moe"),
        (Experts(4, 1, 1, "softmax_topk", output="constant", output_value=3.0), None, "qwen2_moe"),
        (Experts(4, 1, 1, "softmax_topk", output="learnable", output_value=3.0), None, "qwen2_moe"),
    ],
)
def test_a_mixture_goes_out(tmp_path: Path, experts: Experts, layers: list[int] | None, kind: str) -> None:
    torch.manual_seed(0)
    net = Transformer(**NET, activation="swiglu", experts=experts, moe_layers=layers)
    config = export(net, tmp_path / "out", context=128, balance=0.02)
    assert config["model_type"] == kind
    assert config["router_aux_loss_coef"] == 0.02 / experts.top_k
    assert (logits_of(net) - tiny.logits(tmp_path / "out")).abs().max() < 1e-5


@pytest.mark.parametrize("activation", ["squared_relu", "relu", "gelu", "silu"])
def test_what_has_no_host_is_refused(tmp_path: Path, activation: str) -> None:
    with pytest.raises(UserError, match=f"no Hugging Face architecture has softmax routing and {activation} MLPs"):
        export(Transformer(**NET, activation=activation), tmp_path / "out", 128)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("more", [{"shared": 1}, {"output": "layernorm"}])
def test_parts_that_no_host_has_are_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    net = Transformer(**NET, activation="swiglu", experts=Experts(4, 1, 2, **more))
    with pytest.raises(UserError, match="no Hugging Face architecture here has"):
        export(net, tmp_path / "out", 128)


def test_a_run_goes_out(tmp_path: Path) -> None:
    net = Transformer(**NET, activation="swiglu", experts=Experts(4, 1, 2, output="constant", output_value=2.0))
    target = {"_target_": "lit_modules.nets.transformer.Transformer", **NET, "activation": "swiglu"}
    experts = {"_target_": "lit_modules.nets.moe.Experts", "expansion": 4, "top_k": 2, "output": "constant"}
    parent = {"inherit": {"_target_": "lit_modules.nets.upcycled.Upcycle", "scale": "output"}}
    config = {"net": target | {"experts": experts}, "datamodule": {"context": 128}, "parent": parent}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save({"state_dict": {f"net.{key}": w for key, w in net.state_dict().items()}}, tmp_path / "best.ckpt")
    loaded, context = load_run(tmp_path / "best.ckpt")
    assert context == 128
    assert loaded.moe_layers()[0].experts.output_value == 2.0  # C = E / T, settled as when the run was resumed
    export(loaded, tmp_path / "out", context)
    assert (logits_of(net) - tiny.logits(tmp_path / "out")).abs().max() < 1e-5
    with pytest.raises(UserError, match="there is no"):
        load_run(tmp_path / "last.ckpt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"net": {"_target_": "lit_modules.nets.cnn.CNN"}}))
    with pytest.raises(UserError, match="not of a language model"):
        load_run(tmp_path / "best.ckpt")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("qwen3", {}, "query_norm"),
        ("qwen2", {}, "query_bias"),
        ("mistral", {"sliding_window": 16}, "sliding"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "scaled rotary"),
    ],
)
def test_what_our_transformer_has_not(tmp_path: Path, kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_dense(open_source(tiny.dense(tmp_path / "dense", kind, **changes)))


def test_names_go_there_and_back(tmp_path: Path) -> None:
    ours = list(Transformer(**NET, activation="swiglu").state_dict())
    theirs = to_llama_names(ours)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.dense(tmp_path / "dense"))
    assert set(theirs.values()) == set(model.state_dict())
    assert from_llama_names(theirs.values()) == {hf: key for key, hf in theirs.items()}
    with pytest.raises(UserError, match=r"2 weights have no place in our transformer:\n  a\n  b"):
        from_llama_names(["a", "model.norm.weight", "b"])
    with pytest.raises(UserError, match="router"):
        to_llama_names(["blocks.0.mlp.router.weight"])
    with pytest.raises(UserError, match="output_scale"):
        dict(host_tensors("mixtral", "blocks.0.mlp.output_scale", torch.ones(1)))
