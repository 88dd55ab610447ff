"""What cannot be upcycled is refused with its reason, before anything is written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from upcycle import tiny

from experiments.errors import UserError
from experiments.upcycle.convert import Options, convert, prepare
from experiments.upcycle.source import open_source

TS = Options(4, 2, 2, "topk_softmax")
ST = Options(4, 2, 2, "softmax_topk", router_std=1e-4)


def make(source: Path, target: Path, options: Options = TS) -> dict[str, Any]:
    return convert(open_source(source), target, options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("llama", Options(4, 1, 2, "softmax_topk", host="mixtral"), "divides the kept probabilities"),
        ("llama", Options(4, 1, 2, "topk_softmax", host="qwen3_moe"), "norms on queries and keys"),
        ("llama", Options(4, 1, 2, "topk_softmax", host="mixtral", layers=(0,)), "no dense layers"),
        ("llama", Options(4, 1, 2, "topk_softmax", host="mixtrall"), "nearest valid: 'mixtral'"),
        ("qwen2", Options(4, 1, 2, "topk_softmax", host="mixtral"), "biases"),
        ("llama", Options(4, 3, 3), "not divisible by G=3"),
        ("llama", Options(4, 1, 1, "topk_softmax"), "cannot learn to route"),
        ("llama", Options(4, 1, 5), "between 1 and the 4 experts"),
        ("llama", Options(4, 1, 2, layers=(2,)), "indices from 0 to 1"),
        ("llama", Options(4, 1, 2, scale="exakt"), "nearest: 'exact'"),
        ("llama", Options(4, 1, 2, scale="output"), "down_only"),
        ("llama", Options(4, 1, 2, "topk-softmax"), "nearest: 'topk_softmax'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, kind: str, options: Options, message: str
) -> None:
    source = tiny.dense(tmp_path / "dense", kind)
    with pytest.raises(UserError, match=message):
        make(source, tmp_path / "moe", options)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"missing: blocks\.1\.mlp\.up\.weight"),
        ("extra", r"no place .*\n  model\.layers\.0\.mlp\.secret\.weight"),
        ("layer", r"not asked for by config\.json: model\.layers\.7\.input_layernorm\.weight"),
        ("shape", r"model\.norm\.weight has shape \(31,\), config\.json asks for \(32,\)"),
        ("head", r"missing: head\.weight"),
    ],
)
def test_weights_and_configuration_must_match(tmp_path: Path, change: str, message: str) -> None:
    source = tiny.dense(tmp_path / "dense")
    weights = load_file(source / "model.safetensors")
    match change:
        case "missing":
            del weights["model.layers.1.mlp.up_proj.weight"]
        case "extra":
            weights["model.layers.0.mlp.secret.weight"] = torch.zeros(1)
        case "layer":
            weights["model.layers.7.input_layernorm.weight"] = torch.ones(32)
        case "shape":
            weights["model.norm.weight"] = torch.ones(31)
        case "head":
            del weights["lm_head.weight"]
    save_file(weights, source / "model.safetensors")
    with pytest.raises(UserError, match=message):
        open_source(source)


def test_position_buffers_and_a_tied_copy_of_the_head_are_left_out_with_a_note(tmp_path: Path) -> None:
    source = tiny.dense(tmp_path / "dense", tie_word_embeddings=True)
    weights = load_file(source / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors")
    assert len(open_source(source).warnings) == 2
    weights["lm_head.weight"] += 1
    save_file(weights, source / "model.safetensors")
    with pytest.raises(UserError, match="ties the head"):
        open_source(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "cannot be upcycled here; known: llama"),
        ({"model_type": "mixtral"}, "mixture of experts already"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"hidden_act": "relu2"}, "hidden_act 'relu2' is not known"),
    ],
)
def test_configurations_that_are_not_for_us(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    source = tiny.dense(tmp_path / "dense")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        open_source(source)


def test_biases_of_llama_and_windows_have_no_host(tmp_path: Path) -> None:
    biased = tiny.dense(tmp_path / "biased", attention_bias=True)
    with pytest.raises(UserError, match="biases"):
        make(biased, tmp_path / "moe")
    window = tiny.dense(tmp_path / "window", "mistral", sliding_window=16)
    with pytest.raises(UserError, match="sliding"):
        make(window, tmp_path / "moe", ST)
    make(window, tmp_path / "moe", Options(4, 1, 2, "topk_softmax", measure=False))
    assert (tiny.logits(tmp_path / "moe") - tiny.logits(window)).abs().max() < 3e-6


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no config\.json"):
        open_source(tmp_path)
    source = tiny.dense(tmp_path / "dense", shard="20KB")
    next(source.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"model-00002.*not there"):
        open_source(source)


def test_transformers_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.dense(tmp_path / "dense")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"transformers: .*fivefold\[smollm2\]"):
        make(source, tmp_path / "moe")
    make(source, tmp_path / "moe", Options(4, 1, 2, "topk_softmax", measure=False))
    assert prepare(open_source(source), TS).host == "mixtral"
